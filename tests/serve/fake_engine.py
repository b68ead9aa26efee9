"""An engine for tests of the server: the real scheduler and tokenizer over a model that takes no time."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from fake_model import FakeModel

from tulle.engine.kv_cache import PAGE, KVCache
from tulle.engine.scheduler import Scheduler
from tulle.text.tokenizer_folder import read_tokenizer


class SlowModel(FakeModel):
    """A pass takes ``delay`` seconds, and waits while ``gate`` is closed."""

    def __init__(self, *arguments: Any, delay: float = 0.0, **more: Any):
        super().__init__(*arguments, **more)
        self.delay, self.gate = delay, threading.Event()
        self.gate.set()

    def forward(self, *arguments: Any) -> None:
        self.gate.wait(20)
        if self.delay:
            time.sleep(self.delay)
        super().forward(*arguments)


class FakeEngine:
    """What the server uses of :class:`tulle.engine.Engine`."""

    def __init__(self, folder: Path, sequences: int = 4, context: int = 256, delay: float = 0.0):
        self.text = read_tokenizer(folder)
        self.context, self.hidden, self.sequences = context, 8, sequences
        self.vocabulary = self.text.tokenizer.get_vocab_size()
        self.config: dict[str, Any] = {"model_type": "llama"}
        pages = sequences * context // PAGE
        self.model = SlowModel(pages, sequences, self.vocabulary, delay=delay)
        self.scheduler = Scheduler(
            self.model, KVCache(pages), self.text, slots=sequences, context=context, batch=64,
            vocabulary=self.vocabulary, hidden=self.hidden,
        )  # fmt: skip
