"""Greedy and sampled text, stop strings, batches, and what is refused."""

from __future__ import annotations

import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers_in_memory import byte_fallback
from transformers import AutoModelForCausalLM

from checkpoints import write_checkpoint
from tulle.engine import Engine, Request, Sampling
from tulle.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m"
    write_checkpoint(path)
    return path


def test_greedy_text_is_that_of_transformers(folder: Path) -> None:
    engine = Engine(folder, threads=1, cache="f32", head="as stored")
    prompt = engine.text.encode("The square of 12")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        whole = model.generate(
            torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    found = engine.generate("The square of 12", 64, ignore_end=True)
    assert found.tokens == whole[0, len(prompt) :].tolist()
    assert engine.text.decode(prompt) + found.text == engine.text.decode(prompt + found.tokens)
    assert found.prompt_tokens == len(prompt) and found.finish == "length"


def test_seeds(folder: Path) -> None:
    engine = Engine(folder, threads=1)
    texts = [engine.generate("a", 40, Sampling(1.0, seed=s), ignore_end=True).tokens for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_batches_give_the_texts_that_each_prompt_gets_alone(folder: Path) -> None:
    engine = Engine(folder, threads=1, sequences=3, cache="f32")
    prompts = ["one", "The second prompt is longer", "3", "four!", "and five"]
    assert engine.generate_many(prompts, 24) == [engine.generate(p, 24).text for p in prompts]


def test_stop_strings_and_streaming(folder: Path) -> None:
    engine = Engine(folder, threads=1)
    whole = engine.generate("Sentence", 60, ignore_end=True).text
    assert len(whole) > 20
    stop = whole[9:12]
    pieces: list[str] = []
    found = engine.generate("Sentence", 60, stop=[stop, "never in there"], on_text=pieces.append, ignore_end=True)
    assert found.finish == "stop"
    assert found.text == "".join(pieces) == whole[: whole.index(stop)]


def test_the_end_token_ends(folder: Path) -> None:
    engine = Engine(folder, threads=1)
    end = min(engine.text.end_tokens)
    found = engine.generate("x", 10, Sampling(logit_bias={end: 1e4}))
    assert (found.finish, found.tokens, found.text) == ("end", [], "")
    assert len(engine.generate("x", 10, Sampling(logit_bias={end: 1e4}), ignore_end=True).tokens) == 10


def test_a_prompt_that_goes_on_is_taken_from_the_cache(folder: Path) -> None:
    prompt = list(range(40))
    engine = Engine(folder, threads=1, sequences=2, cache="f32")
    first = engine.generate(prompt, 20, ignore_end=True)
    turn = [*prompt, *first.tokens, 5, 6, 7]
    second = engine.generate(turn, 20, ignore_end=True)
    assert (first.cached_tokens, second.cached_tokens) == (0, 48)
    assert second.tokens == Engine(folder, threads=1, cache="f32").generate(turn, 20, ignore_end=True).tokens
    assert engine.generate(turn, 20, ignore_end=True).cached_tokens == 48


def test_two_threads_on_one_engine(folder: Path) -> None:
    engine = Engine(folder, threads=1, sequences=2)
    prompts = [f"{number}, the text of thread {number}" for number in range(6)]
    alone = [Engine(folder, threads=1).generate(prompt, 24).tokens for prompt in prompts]
    logits = engine.forward(list(range(30)))
    found: dict[int, list[int]] = {}

    def run(number: int) -> None:
        for _ in range(3):
            found[number] = engine.generate(prompts[number], 24).tokens
            assert np.array_equal(engine.forward(list(range(30))), logits)

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(run, number) for number in range(6)]:
            done.result()
    assert [found[number] for number in range(6)] == alone


def test_an_engine_that_serves_refuses_what_would_disturb_it(folder: Path) -> None:
    engine = Engine(folder, threads=1)
    engine.scheduler.add(Request([1, 2, 3], 5))
    for call in (lambda: engine.forward([1]), lambda: engine.generate("a", 2)):
        with pytest.raises(UserError, match="whose scheduler runs requests"):
            call()
    while not engine.scheduler.idle:
        engine.scheduler.step()
    engine.generate("a", 2)


def test_text_made_by_hand_is_forgotten_when_text_is_generated(folder: Path) -> None:
    engine = Engine(folder, threads=1)
    engine.forward([1, 2, 3])
    engine.forward([4], 0, 3)
    with pytest.raises(UserError, match="expected at most 4, up to where its past was given, found 9"):
        engine.forward([4], 0, 9)
    engine.generate("a", 2)
    with pytest.raises(UserError, match="expected at most 0"):
        engine.forward([4], 0, 4)


def test_embeddings_and_memory(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = list(range(40))
    engine = Engine(folder, threads=1, cache="f32", cache_memory=5 << 20)
    assert engine.cache_bytes <= 5 << 20
    with torch.inference_mode():
        hidden = model.model(torch.tensor([prompt])).last_hidden_state[0].numpy()
    for kind, expected in (("mean", hidden.mean(0)), ("last", hidden[-1])):
        sequence = engine.scheduler.add(Request(prompt, 0, embedding=kind))  # type: ignore[arg-type]
        while not engine.scheduler.idle:
            engine.scheduler.step()
        assert sequence.embedding is not None
        assert np.abs(sequence.embedding - expected).max() < 1e-4 * np.abs(expected).max()
    with pytest.raises(UserError, match="at least one page"):
        Engine(folder, cache_memory=100)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.generate("", 5), "at least one token"),
        (lambda e: e.generate("abc", 0), "at least one token"),
        (lambda e: e.generate("abc" * 60, 5), "within 128 tokens"),
        (lambda e: e.forward([5000]), "tokens below"),
        (lambda e: e.forward([-1]), "tokens below"),
        (lambda e: e.forward([1], 1), "slots below"),
        (lambda e: e.forward([1], 0, 128), "positions below"),
        (lambda e: e.forward([1], 0, -1), "positions below"),
        (lambda e: e.generate_many(["a"], 3, [Sampling(), Sampling()]), "one sampling per prompt"),
        (lambda e: e.generate("a", 5, Sampling(seed=-1)), "a seed of 0 or more"),
        (lambda e: e.generate("caf\udce9", 5), "text in UTF-8"),
        (lambda e: e.text.chat([]), "chat template"),
    ],
)
def test_bad_calls(folder: Path, call: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(Engine(folder, threads=1))  # type: ignore[operator]


@pytest.mark.parametrize(
    "options",
    [
        {"threads": 0}, {"context": 0}, {"context": 4096}, {"sequences": 0}, {"cache": "int3"},
        {"activations": "int4"}, {"head": "int2"},
    ],
)  # fmt: skip
def test_bad_options(folder: Path, options: dict[str, object]) -> None:
    with pytest.raises(UserError, match="expected"):
        Engine(folder, **options)  # type: ignore[arg-type]


def chain(folder: Path, following: dict[int, int], vocabulary: int) -> None:
    """A model whose likeliest next token is ``following[t]``, else ``t + 1``: attention and MLP add nothing."""
    model = write_checkpoint(
        folder, vocab_size=vocabulary, hidden_size=128, num_attention_heads=2, num_hidden_layers=1, head_dim=16
    )
    table = torch.nn.functional.normalize(torch.randn(vocabulary, 128), dim=1)
    head = torch.zeros(vocabulary, 128)
    for token in range(vocabulary):
        head[following.get(token, min(token + 1, vocabulary - 1))] += table[token]
    state = model.state_dict()
    state |= {"model.embed_tokens.weight": table, "lm_head.weight": 5 * head}
    state |= {k: torch.zeros_like(v) for k, v in state.items() if "o_proj" in k or "down_proj" in k}
    state |= {k: torch.ones_like(v) for k, v in state.items() if "norm" in k}
    for file in folder.glob("*.safetensors"):
        save_file({k: v.contiguous() for k, v in state.items()}, file, {"format": "pt"})


def test_every_way_to_text_keeps_the_first_space(tmp_path: Path) -> None:
    tokenizer = byte_fallback()
    once = tokenizer.encode("Once upon a").ids
    ids = [tokenizer.token_to_id(t) for t in ("\u2581", "t", "i", "<0xE4>", "<0xB8>", "<0x96>", "m")]
    text = " ti世m"
    end = tokenizer.token_to_id("<|im_end|>")
    following = dict(itertools.pairwise([once[-1], *ids, end]))
    assert once[-1] not in ids
    folder = tmp_path / "m"
    chain(folder, following, tokenizer.get_vocab_size())
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    engine = Engine(folder, threads=1, sequences=2)
    pieces: list[str] = []
    assert engine.generate("Once upon a", len(ids), on_text=pieces.append).text == "".join(pieces) == text
    assert engine.generate_many(["Once upon a", once], len(ids)) == [text, text]
    found = engine.generate("Once upon a", len(ids) + 5, stop=["<|im_end|>"])
    assert (found.text, found.finish, len(found.tokens)) == (text, "stop", len(ids) + 1)


RESERVE = """
import sys, psutil
from tulle.engine import Engine
engine = Engine(sys.argv[1], threads=1, cache="f32", cache_memory=96 << 20)
before = psutil.Process().memory_info().rss
engine.reserve_cache()
print(engine.cache_bytes, psutil.Process().memory_info().rss - before)
"""


def test_the_cache_is_reserved_up_front(folder: Path) -> None:
    # In a process of its own: here, other tests' memory goes back to the system at the same time.
    done = subprocess.run(
        [sys.executable, "-c", RESERVE, str(folder)], check=True, capture_output=True, text=True
    ).stdout.split()
    cache, grown = int(done[0]), int(done[1])
    assert 0.9 * cache < grown < 1.1 * cache
    engine = Engine(folder, threads=1, cache="f32", cache_memory=96 << 20)
    engine.reserve_cache()
    assert (
        engine.generate("The square of", 8).tokens
        == Engine(folder, threads=1, cache="f32").generate("The square of", 8).tokens
    )
