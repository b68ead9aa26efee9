"""An engine for tests of the server: the real scheduler and tokenizer over a model that takes no time."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from fake_model import FakeModel, Floats

from tulle.engine.kv_cache import PAGE, KVCache
from tulle.engine.scheduler import Scheduler
from tulle.text.tokenizer_folder import read_tokenizer


class ScriptedModel(FakeModel):
    """Says what it is told; anything else by chance. A pass takes ``delay`` seconds, and waits for ``gate``."""

    def __init__(self, pages: int, slots: int, vocabulary: int):
        super().__init__(pages, slots, vocabulary)
        self.delay, self.gate = 0.0, threading.Event()
        self.gate.set()
        self.fault: Exception | None = None
        self.script: list[int] = []

    def logits(self, tokens: list[int]) -> Floats:
        found = super().logits(tokens)
        if self.script:
            said = next(n for n in range(len(self.script), -1, -1) if tokens[len(tokens) - n :] == self.script[:n])
            if said < len(self.script):
                found[self.script[said]] = 100.0
        return found

    def forward(self, *arguments: Any) -> None:
        self.gate.wait(20)
        if self.fault is not None:
            raise self.fault
        if self.delay:
            time.sleep(self.delay)
        super().forward(*arguments)


class FakeEngine:
    """What the server uses of :class:`tulle.engine.Engine`."""

    def __init__(self, folder: Path, sequences: int = 4, context: int = 256):
        self.text = read_tokenizer(folder)
        self.context, self.hidden, self.sequences = context, 8, sequences
        self.vocabulary = self.text.tokenizer.get_vocab_size()
        self.config: dict[str, Any] = {"model_type": "llama"}
        self.pages = sequences * context // PAGE
        self.model = ScriptedModel(self.pages, sequences, self.vocabulary)
        self.scheduler = Scheduler(
            self.model, KVCache(self.pages), self.text, slots=sequences, context=context, batch=64,
            vocabulary=self.vocabulary, hidden=self.hidden,
        )  # fmt: skip

    def say(self, text: str) -> None:
        """What every answer is from now on; '' for chance again."""
        end = min(self.text.end_tokens)
        self.model.script = [*self.text.encode(text, special=False), end] if text else []

    def log_softmax(self, tokens: list[int]) -> Floats:
        """Of the next token, computed apart from the scheduler."""
        logits = self.model.logits(tokens).astype(np.float64)
        shifted = logits - logits.max()
        return shifted - np.log(np.exp(shifted).sum())
