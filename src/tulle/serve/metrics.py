"""What Prometheus reads at ``/metrics``. Counts of the engine are read when they are asked for, not per token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from tulle.serve.served import ServedModel

FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 30, 60)
NEXT_TOKEN = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.4, 1.0, 3.0)
REQUEST = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one server."""

    def __init__(self, models: Callable[[], list[ServedModel]]):
        self.registry = CollectorRegistry()
        self._first = Histogram(
            "tulle_time_to_first_token_seconds", "From a request to its first token.", ["model"],
            buckets=FIRST_TOKEN, registry=self.registry,
        )  # fmt: skip
        self._next = Histogram(
            "tulle_time_between_tokens_seconds", "Between two tokens of a sequence.", ["model"],
            buckets=NEXT_TOKEN, registry=self.registry,
        )  # fmt: skip
        self._finished = Counter(
            "tulle_sequences_finished", "Sequences that ended, by reason.", ["model", "reason"], registry=self.registry
        )
        self.requests = Counter(
            "tulle_http_requests", "Answered requests.", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "tulle_http_request_seconds", "From a request to the end of its answer.", ["route"],
            buckets=REQUEST, registry=self.registry,
        )  # fmt: skip
        self.registry.register(_Engines(models))

    def observer(self, model: str) -> ModelMetrics:
        """What a model's worker tells."""
        return ModelMetrics(self._first.labels(model), self._next.labels(model), self._finished, model)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class ModelMetrics:
    """Of one model; its histograms are looked up once."""

    def __init__(self, first: Histogram, following: Histogram, finished: Counter, model: str):
        self.first_token: Callable[[float], None] = first.observe
        self.next_token: Callable[[float], None] = following.observe
        self._finished, self._model = finished, model

    def finished(self, reason: str) -> None:
        self._finished.labels(self._model, reason).inc()


class _Engines(Collector):
    """Reads the schedulers of the loaded models. Other threads write the numbers: two of them may be of different
    steps."""

    def __init__(self, models: Callable[[], list[ServedModel]]):
        self._models = models

    def collect(self) -> Iterator[Metric]:
        gauges: dict[str, GaugeMetricFamily] = {}
        counters: dict[str, CounterMetricFamily] = {}

        def gauge(name: str, help: str, model: str, value: float) -> None:
            found = gauges.setdefault(name, GaugeMetricFamily(name, help, labels=["model"]))
            found.add_metric([model], value)

        def count(name: str, help: str, model: str, value: float) -> None:
            found = counters.setdefault(name, CounterMetricFamily(name, help, labels=["model"]))
            found.add_metric([model], value)

        for served in self._models():
            name, scheduler = served.name, served.engine.scheduler
            stats = scheduler.stats
            gauge("tulle_sequences_waiting", "Sequences that have not begun.", name, scheduler.waiting)
            gauge("tulle_sequences_running", "Sequences that have a slot.", name, scheduler.running)
            count("tulle_prompt_tokens", "Tokens of prompts, with cached ones.", name, stats.prompt_tokens)
            count("tulle_cached_tokens", "Tokens of prompts that were found in the cache.", name, stats.cached_tokens)
            count("tulle_computed_tokens", "Tokens that passes computed.", name, stats.computed_tokens)
            count("tulle_generated_tokens", "Tokens that were generated.", name, stats.generated_tokens)
            count("tulle_steps", "Forward passes.", name, stats.steps)
            count("tulle_step_seconds", "Time in forward passes.", name, stats.step_seconds)
            count("tulle_preempted", "Sequences that gave their pages back.", name, stats.preempted)
            read = getattr(stats, "weight_bytes_read", stats.steps * served.facts.weight_bytes)
            count("tulle_weight_bytes_read", "Bytes of weights that passes read.", name, read)
            cache = scheduler.cache
            gauge("tulle_cache_pages", "Pages of keys and values, of 16 tokens.", name, cache.pages)
            gauge("tulle_cache_pages_used", "Pages in use by sequences.", name, cache.pages - cache.available)
            gauge("tulle_cache_pages_cached", "Pages that only the prefix tree holds.", name, cache.idle)
        yield from gauges.values()
        yield from counters.values()
