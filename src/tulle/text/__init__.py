"""Texts and data sets as documents, and the standard library's sources as a corpus that is always there."""
