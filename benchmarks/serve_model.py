"""A packed model of a large shape with random weights and a tokenizer of its whole vocabulary, to be served.

python benchmarks/serve_model.py FOLDER [--shape 1.1b] [--bits 4] [--sparsity 0.0] [--input-bits N]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from compress_large import COMMON
from synthetic import write_packed


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Bytes, and tokens t256, t257 …: every id has a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary_of = {c: i for i, c in enumerate(alphabet)} | {f"t{i}": i for i in range(len(alphabet), vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary_of, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="1.1b")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--sparsity", type=float, default=0.0)
    parser.add_argument("--input-bits", type=int)
    options = parser.parse_args()
    write_packed(options.folder, options.shape, options.bits, options.sparsity, options.input_bits)
    write_tokenizer(options.folder, COMMON["vocab_size"])


if __name__ == "__main__":
    main()
