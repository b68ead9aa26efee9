"""Small tokenizers of every kind that the `tokenizers` library can make, trained on a few words of many scripts."""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SCRIPTS = (
    "Once upon a time there was a boy's dog . Did n't it bark , or ' did it ' ? Yes !",
    "Grüße aus Köln, naïve café – œuvre",
    "Быстрая коричневая лиса",
    "敏捷的棕色狐狸跳过了懒狗。世界和平",
    "すばやい茶色の狐がのろまな犬",
    "빠른 갈색 여우가 게으른 개를",
    "สุนัขจิ้งจอกสีน้ำตาลกระโดดข้าม",
    "तेज भूरी लोमड़ी आलसी कुत्ते",
    "الثعلب البني السريع يقفز",
    "🙂🙃👩‍👩‍👧‍👦🏳️‍🌈 ∑∏√ \N{LINE SEPARATOR}\u0085\t\r\n  x",
)
BYTES = [f"<0x{b:02X}>" for b in range(256)]
MARK = "\u2581"


def _added(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("é!", normalized=False)])
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(SCRIPTS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    return _added(tokenizer)


def _pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary with bytes, as SentencePiece makes it."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(MARK, "first", split=False)
    trained.train_from_iterator(SCRIPTS[:3], trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", *BYTES]))
    vocabulary = trained.get_vocab()
    merges = []
    for token in sorted(vocabulary, key=vocabulary.__getitem__):
        for cut in range(1, len(token)):
            if token[:cut] in vocabulary and token[cut:] in vocabulary and token not in BYTES and token != "<unk>":
                merges.append((token[:cut], token[cut:]))
    return vocabulary, merges


def byte_fallback(prefix: str = "first") -> Tokenizer:
    """As Llama 2's."""
    tokenizer = Tokenizer(models.BPE(*_pieces(), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(MARK, prefix, split=False)
    steps = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps if prefix == "never" else [*steps, decoders.Strip(" ", 1, 0)])
    return _added(tokenizer)


def metaspace(unigram: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram() if unigram else models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    if unigram:
        trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=["<unk>"], unk_token="<unk>")
    else:
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"])
    tokenizer.train_from_iterator(SCRIPTS, trainer)
    return _added(tokenizer)


def unigram_with_bytes() -> Tokenizer:
    vocabulary = [("<unk>", 0.0), *((b, -20.0) for b in BYTES), (MARK, -2.0), *((c, -3.0) for c in "abcdehinot")]
    tokenizer = Tokenizer(models.Unigram(vocabulary, 0, True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(MARK, "first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(MARK, "first")])
    return _added(tokenizer)


def word_piece(cleanup: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFC(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=cleanup)
    tokenizer.train_from_iterator(SCRIPTS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"]))
    return _added(tokenizer)


def word_level() -> Tokenizer:
    """Without a decoder: words with spaces between."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(SCRIPTS, trainers.WordLevelTrainer(special_tokens=["[UNK]"]))
    return _added(tokenizer)


def end_of_word() -> Tokenizer:
    """As the first GPT's: a suffix marks the end of a word."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], end_of_word_suffix="</w>")
    tokenizer.train_from_iterator(SCRIPTS, trainer)
    return _added(tokenizer)


def with_decoder(decoder: decoders.Decoder) -> Tokenizer:
    """Single characters and bytes under another decoder."""
    characters = dict.fromkeys([*BYTES, MARK, "<pad>", "|", *"".join(SCRIPTS)])
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(characters)}, [], byte_fallback=True))
    tokenizer.decoder = decoder
    return _added(tokenizer)


CHAINS = {
    "ctc": decoders.CTC(),
    "strip both ends": decoders.Sequence([decoders.Replace(" ", ""), decoders.Fuse(), decoders.Strip("e", 2, 0)]),
    "replace in the text": decoders.Sequence(
        [decoders.Fuse(), decoders.Replace("ee", "e"), decoders.Replace("e ", "")]
    ),
    "pattern per token": decoders.Sequence([decoders.Replace(Regex("[aeiou]"), "*"), decoders.ByteFallback()]),
    "pattern in the text": decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex("e[a-z]"), "E")]),
    "bytes after joining": decoders.Sequence([decoders.Fuse(), decoders.ByteLevel()]),
    "nested": decoders.Sequence([decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]), decoders.Fuse()]),
    "no steps": decoders.Sequence([]),
}
KINDS = {
    "byte-level BPE": byte_level,
    "byte fallback, first space": byte_fallback,
    "byte fallback, no space": lambda: byte_fallback("never"),
    "byte fallback, spaces after special tokens": lambda: byte_fallback("always"),
    "Metaspace BPE": metaspace,
    "Metaspace unigram": lambda: metaspace(True),
    "unigram with bytes": unigram_with_bytes,
    "WordPiece": word_piece,
    "WordPiece without cleaning up": lambda: word_piece(False),
    "WordLevel": word_level,
    "BPE with ends of words": end_of_word,
} | {name: (lambda decoder=decoder: with_decoder(decoder)) for name, decoder in CHAINS.items()}


@cache
def tokenizer_of_kind(name: str) -> Tokenizer:
    return KINDS[name]()
