"""Texts and data sets as documents, the standard library's sources as a corpus that is always there, and the tokenizer
of a model: tokens, text in pieces, chat templates."""
