"""Continuous batching on a fake model whose pages can be read: texts, fairness, memory, what ends when."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from fake_model import FakeModel
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_in_memory import byte_level

from tulle.engine import Event, QueueFull, Request, Sampling, Scheduler, Sequence
from tulle.engine.kv_cache import PAGE, KVCache
from tulle.engine.sampling import Sampler
from tulle.engine.scheduler import MAX_STEP
from tulle.errors import UserError
from tulle.text.tokenizer import ModelTokenizer

TEXT = ModelTokenizer(byte_level())
VOCABULARY = TEXT.tokenizer.get_vocab_size()


def made(
    pages: int = 64, slots: int = 4, context: int = 512, batch: int = 64, **options: object
) -> tuple[Scheduler, FakeModel]:
    recurrent, seconds = bool(options.pop("recurrent", False)), float(options.pop("seconds", 0.0))  # type: ignore[arg-type]
    model = FakeModel(pages, slots, VOCABULARY, recurrent, seconds)
    model.batch = batch
    snapshots = int(options.pop("snapshots", pages))  # type: ignore[call-overload]
    cache = KVCache(pages, snapshots if recurrent else 0, recurrent)
    sizes = {"slots": slots, "context": context, "batch": batch, "vocabulary": VOCABULARY, "hidden": 8}
    return Scheduler(model, cache, TEXT, clock=model.clock, **sizes, **options), model  # type: ignore[arg-type]


def run(scheduler: Scheduler, each: Callable[[list[Event]], None] = lambda events: None) -> list[Event]:
    found: list[Event] = []
    for _ in range(10_000):
        if scheduler.idle:
            return found
        events = scheduler.step()
        found += events
        each(events)
    raise AssertionError("it does not end")


def alone(request: Request) -> list[int]:
    """The tokens that a request gets, computed without a scheduler."""
    model = FakeModel(1, 1, VOCABULARY)
    sampler, tokens = Sampler(request.sampling, TEXT), list(request.prompt)
    assert request.max_tokens is not None
    for _ in range(request.max_tokens):
        tokens.append(sampler.choose(model.logits(tokens), tokens))
    return tokens[len(request.prompt) :]


def clean(scheduler: Scheduler) -> None:
    """No page is lost when all is done."""
    cache = scheduler.cache
    assert scheduler.idle and np.all(scheduler.tables == -1)
    assert cache.free + cache.cached == cache.pages and cache.idle == cache.cached
    cache.clear()
    assert cache.free == cache.pages


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


PIECES = st.lists(st.sampled_from([(0, 40), (1, 16), (2, 7), (3, 90)]), min_size=1, max_size=4)
REQUESTS = st.lists(st.tuples(PIECES, st.integers(1, 40), st.integers(0, 30)), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(REQUESTS, st.integers(1, 4), st.integers(24, 60), st.sampled_from([None, 0, 1, 3, 60]), st.data())
def test_everybody_gets_the_tokens_that_they_get_alone(
    wanted: list[tuple[list[tuple[int, int]], int, int]],
    slots: int,
    pages: int,
    snapshots: int | None,
    data: st.DataObject,
) -> None:
    """Whatever shares pages, waits, is cancelled or gives its pages back; recurrent models with few snapshots, too."""
    recurrent, room = snapshots is not None, snapshots or 0
    scheduler, _ = made(pages, slots, context=pages * PAGE, batch=32, recurrent=recurrent, snapshots=room)
    coming = []
    for pieces, count, after in wanted:
        tokens = [t for seed, length in pieces for t in prompt(length, seed)]
        if len(tokens) + count <= pages * PAGE:
            sampling = Sampling(1.0, seed=count) if count % 2 else Sampling()
            coming.append((after, Request(tokens, count, sampling, ignore_end=True)))
    coming.sort(key=lambda item: item[0])
    texts: dict[int, str] = {}
    sequences: list[Sequence] = []
    cancelled = set()
    for step in range(10_000):
        while coming and coming[0][0] <= step:
            sequences.append(scheduler.add(coming.pop(0)[1]))
        if not coming and scheduler.idle:
            break
        for event in scheduler.step():
            number = event.sequence.number
            texts[number] = texts.get(number, "") + event.text
        if sequences and step % 7 == 3 and data.draw(st.booleans()):
            chosen = data.draw(st.sampled_from(sequences))
            if chosen.finish is None:
                scheduler.cancel(chosen)
                cancelled.add(chosen.number)
    for sequence in sequences:
        expected = alone(sequence.request)
        if sequence.number in cancelled:
            assert sequence.finish == "cancelled" and sequence.tokens == expected[: len(sequence.tokens)]
            continue
        assert (sequence.finish, sequence.tokens) == ("length", expected)
        whole = TEXT.decode([*sequence.request.prompt, *expected])
        assert TEXT.decode(sequence.request.prompt) + texts[sequence.number] == whole
    clean(scheduler)


@pytest.mark.parametrize("recurrent", [False, True])
def test_a_second_prompt_computes_its_own_part_alone(recurrent: bool) -> None:
    scheduler, model = made(recurrent=recurrent)
    system = prompt(200)
    scheduler.add(Request([*system, *prompt(20, 1)], 5, ignore_end=True))
    run(scheduler)
    model.passes.clear()
    own = prompt(20, 2)
    second = scheduler.add(Request([*system, *own], 1, ignore_end=True))
    run(scheduler)
    assert second.cached_tokens == 200 // PAGE * PAGE == scheduler.stats.cached_tokens
    assert sum(map(len, model.passes)) == len(own) + 200 % PAGE
    assert second.tokens == alone(second.request)


def computed(scheduler: Scheduler, model: FakeModel, tokens: list[int], count: int = 1) -> tuple[int, list[int]]:
    """How many tokens passes compute for a request, and its tokens."""
    model.passes.clear()
    sequence = scheduler.add(Request(tokens, count, ignore_end=True))
    run(scheduler)
    assert sequence.tokens == alone(sequence.request)
    return sum(map(len, model.passes)), sequence.tokens


def test_few_snapshots_stand_where_others_go_on() -> None:
    """Three places: a prompt's parts and text that grows take one in turn, not those of beginnings that are shared."""
    scheduler, model = made(pages=200, context=1024, batch=64, recurrent=True, snapshots=3)
    system, own = prompt(20 * PAGE), [prompt(3 * PAGE + 5, seed) for seed in (1, 2, 3)]
    computed(scheduler, model, [*system, *own[0]], 70)
    # Where the second one leaves the first nothing was kept; it is by now.
    assert computed(scheduler, model, [*system, *own[1]])[0] > len(own[1])
    count, said = computed(scheduler, model, [*system, *own[2]], 70)
    assert count == len(own[2]) + 69
    # The conversation goes on at the last full page of what was said.
    text = [*system, *own[2], *said]
    assert computed(scheduler, model, [*text, *own[0]])[0] == len(own[0]) + 1 + (len(text) - 1) % PAGE
    clean(scheduler)


def test_a_state_is_kept_for_those_that_wait() -> None:
    scheduler, model = made(pages=200, context=1024, batch=200, recurrent=True, snapshots=4)
    system = prompt(100)
    sequences = [scheduler.add(Request([*system, *prompt(30, seed)], 1)) for seed in (1, 2, 3)]
    run(scheduler)
    assert [s.cached_tokens for s in sequences] == [0, 96, 96]


def test_equal_prompts_that_come_together_are_computed_once() -> None:
    scheduler, model = made(pages=200)
    same = prompt(160)
    sequences = [scheduler.add(Request(same, 4, Sampling(1.0, seed=s), ignore_end=True)) for s in range(4)]
    run(scheduler)
    assert sum(map(len, model.passes)) < 160 + 3 * PAGE + 4 * 4
    assert [s.tokens for s in sequences] == [alone(s.request) for s in sequences]
    assert len({tuple(s.tokens) for s in sequences}) > 1


def test_a_conversation_that_goes_on() -> None:
    scheduler, model = made()
    first = scheduler.add(Request(prompt(50), 30, ignore_end=True))
    run(scheduler)
    model.passes.clear()
    turn = [*first.request.prompt, *first.tokens, *prompt(10, 5)]
    second = scheduler.add(Request(turn, 1, ignore_end=True))
    run(scheduler)
    # All but the last token that was generated has keys and values.
    assert second.cached_tokens == (50 + 30 - 1) // PAGE * PAGE


def test_a_long_prompt_does_not_keep_others_waiting() -> None:
    scheduler, model = made(pages=400, context=4096, batch=256, seconds=0.001)
    short = scheduler.add(Request(prompt(20), 60, ignore_end=True))
    scheduler.step()
    scheduler.add(Request(prompt(3000, 1), 1, ignore_end=True))
    last, waits = model.now, []

    def note(events: list[Event]) -> None:
        nonlocal last
        if any(event.sequence is short for event in events):
            waits.append(model.now - last)
            last = model.now

    run(scheduler, note)
    assert len(waits) == 59 and max(waits) <= MAX_STEP


def test_a_short_prompt_behind_a_long_one_begins_soon() -> None:
    scheduler, _ = made(pages=400, context=4096, batch=64)
    long = scheduler.add(Request(prompt(3000, 1), 1, ignore_end=True))
    short = scheduler.add(Request(prompt(20), 5, ignore_end=True))
    steps = 0
    while not short.tokens:
        scheduler.step()
        steps += 1
    assert steps <= 2 and long.finish is None
    run(scheduler)


@pytest.mark.parametrize("generating", range(0, 12, 3))
def test_many_long_prompts_fit_into_a_pass(generating: int) -> None:
    scheduler, model = made(pages=4000, slots=24, context=1024, batch=250)
    for number in range(generating):
        scheduler.add(Request(prompt(1, number), 200, ignore_end=True))
    scheduler.step()
    for number in range(12):
        scheduler.add(Request(prompt(600, number + 50), 1, ignore_end=True))
    run(scheduler)
    assert max(map(len, model.passes)) == 250


def test_order_of_arrival() -> None:
    scheduler, _ = made(slots=1)
    sequences = [scheduler.add(Request(prompt(10 + i, i), 3, ignore_end=True)) for i in range(4)]
    ended = [event.sequence for event in run(scheduler) if event.finish]
    assert ended == sequences


def test_without_memory_the_last_one_waits_and_nothing_changes() -> None:
    scheduler, _ = made(pages=12, slots=4, context=12 * PAGE)
    requests = [Request(prompt(30, i), 100, ignore_end=True) for i in range(4)]
    sequences = [scheduler.add(request) for request in requests]
    run(scheduler)
    assert scheduler.stats.preempted > 0
    assert [s.tokens for s in sequences] == [alone(r) for r in requests]
    clean(scheduler)


def test_cancelled_sequences_end_within_a_step() -> None:
    scheduler, _ = made(slots=1)
    runs, waits = (scheduler.add(Request(prompt(30, i), 50, ignore_end=True)) for i in range(2))
    scheduler.step()
    for sequence in (runs, waits):
        scheduler.cancel(sequence)
        scheduler.cancel(sequence)
    events = scheduler.step()
    assert [(e.sequence, e.finish) for e in events] == [(runs, "cancelled"), (waits, "cancelled")]
    clean(scheduler)


def test_deadlines() -> None:
    scheduler, model = made(slots=1, seconds=0.01)
    late = scheduler.add(Request(prompt(10), 100, ignore_end=True, deadline=0.5))
    never = scheduler.add(Request(prompt(10), 100, ignore_end=True, deadline=0.3))
    run(scheduler)
    assert late.finish == never.finish == "deadline"
    assert 20 < len(late.tokens) < 50 and never.tokens == [] and model.now < 0.6
    assert scheduler.stats.finished == {"deadline": 2}


def test_the_queue_has_a_bound() -> None:
    scheduler, _ = made(slots=1, queue_limit=2)
    for i in range(3):
        scheduler.add(Request(prompt(9, i), 3))
    with pytest.raises(QueueFull, match="at most 2 requests"):
        scheduler.add(Request(prompt(9), 3))
    scheduler.step()
    run(scheduler)
    scheduler.add(Request(prompt(9), 3))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (lambda: Request([], 3), "at least one token"),
        (lambda: Request([1], 0), "at least one token"),
        (lambda: Request([1], -2), "at least one token"),
        (lambda: Request(prompt(510), 3), "within 512 tokens, found 510 and 3"),
        (lambda: Request(prompt(512)), "within 512 tokens, found 512"),
        (lambda: Request([5, VOCABULARY], 3), f"tokens below {VOCABULARY}"),
        (lambda: Request([5, -1], 3), "found -1"),
        (lambda: Request([5], 3, Sampling(logit_bias={VOCABULARY: 1.0})), "biases for tokens below"),
    ],
)
def test_what_can_never_run_is_refused(request_: Callable[[], Request], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made()[0].add(request_())


def test_without_a_number_of_tokens_the_context_ends_it() -> None:
    scheduler, _ = made(context=64)
    sequence = scheduler.add(Request(prompt(40), ignore_end=True))
    run(scheduler)
    assert len(sequence.tokens) == 24 and sequence.finish == "length"


def test_log_probabilities_of_a_prompt_and_of_what_follows() -> None:
    scheduler, model = made()
    scheduler.add(Request(prompt(100), 1))
    run(scheduler)
    tokens = prompt(100)
    sequence = scheduler.add(Request(tokens, 3, ignore_end=True, logprobs=2, prompt_logprobs=0))
    events = run(scheduler)
    assert sequence.cached_tokens == 0 and sequence.prompt_logprobs[0] is None
    assert len(sequence.prompt_logprobs) == 100

    def logprobs(past: list[int]) -> np.ndarray:
        logits = model.logits(past).astype(np.float64)
        return logits - np.log(np.exp(logits).sum())

    for place, found in enumerate(sequence.prompt_logprobs[1:], 1):
        assert found is not None and found.token == tokens[place] and found.top == ()
        assert abs(found.logprob - logprobs(tokens[:place])[tokens[place]]) < 1e-5
    for place, event in enumerate(e for e in events if e.sequence is sequence):
        expected = logprobs([*tokens, *sequence.tokens[:place]])
        assert event.logprobs is not None and event.token == event.logprobs.token
        assert [token for token, _ in event.logprobs.top] == np.argsort(-expected)[:2].tolist()
        assert abs(event.logprobs.logprob - expected[event.token]) < 1e-5
    only = scheduler.add(Request(tokens, 0, prompt_logprobs=0))
    run(scheduler)
    assert only.tokens == [] and only.finish == "length" and len(only.prompt_logprobs) == 100


@pytest.mark.parametrize("length", [1, 17, 100])
def test_embeddings_beside_text(length: int) -> None:
    scheduler, model = made(batch=32)
    text = scheduler.add(Request(prompt(20, 9), 30, ignore_end=True))
    scheduler.step()
    tokens = prompt(length)
    mean = scheduler.add(Request(tokens, 0, embedding="mean"))
    last = scheduler.add(Request(tokens, 0, embedding="last"))
    run(scheduler)
    hidden = np.stack([model.hidden(tokens[: i + 1]) for i in range(length)])
    assert mean.embedding is not None and last.embedding is not None
    assert np.allclose(mean.embedding, hidden.mean(0), atol=1e-6) and np.array_equal(last.embedding, hidden[-1])
    assert text.tokens == alone(text.request)
    clean(scheduler)


class OnlyEven:
    """Even tokens, four of them."""

    def __init__(self) -> None:
        self.given: list[int] = []
        self.asked = 0

    def mask(self) -> np.ndarray:
        self.asked += 1
        return np.packbits(np.arange(VOCABULARY + (-VOCABULARY) % 32) % 2 == 0, bitorder="little").view(np.uint32)

    def accept(self, token: int) -> None:
        self.given.append(token)

    @property
    def finished(self) -> bool:
        return len(self.given) == 4


def test_constraints() -> None:
    constraint = OnlyEven()
    scheduler, _ = made()
    bound = scheduler.add(Request(prompt(70), 30, Sampling(1.0), ignore_end=True, constraint=lambda: constraint))
    free = scheduler.add(Request(prompt(70), 30, Sampling(1.0), ignore_end=True))
    run(scheduler)
    assert bound.tokens == constraint.given and all(t % 2 == 0 for t in bound.tokens) and bound.finish == "end"
    assert constraint.asked == 4
    assert free.tokens == alone(free.request)


def test_a_fault_of_one_sequence_is_its_own() -> None:
    class Broken(OnlyEven):
        def accept(self, token: int) -> None:
            raise UserError("expected a token of the grammar, found another")

    scheduler, _ = made()
    broken = scheduler.add(Request(prompt(20), 9, constraint=Broken))
    well = scheduler.add(Request(prompt(20), 9, ignore_end=True))
    events = run(scheduler)
    assert broken.finish == "error" and broken.error == "expected a token of the grammar, found another"
    assert [e.finish for e in events if e.sequence is broken] == ["error"]
    assert well.tokens == alone(well.request)
    clean(scheduler)
