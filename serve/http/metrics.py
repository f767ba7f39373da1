"""Numbers for Prometheus, at `/metrics`. They belong to the API process, of which there is one."""

from collections.abc import Iterable
from typing import Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric

from lit_llm.inference.engine import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
WHOLE = (0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


class EngineState(Protocol):
    """What the metrics read of the engine when they are requested."""

    @property
    def ready(self) -> bool:
        """Whether a new request would be computed."""

    @property
    def in_flight(self) -> int:
        """Requests with a waiting client."""

    @property
    def stats(self) -> EngineStats | None:
        """The worker's last statistics; null without a worker."""


class Metrics:
    """All metrics of a server."""

    def __init__(self) -> None:
        disable_created_metrics()                   # otherwise a second, unused line for each
        self.registry = registry = CollectorRegistry()
        self._responses = Counter("lit_llm_requests", "Responses by route and HTTP status; 0 is a lost connection.",
                                  ["route", "code"], registry=registry)
        self._seconds = Histogram("lit_llm_request_seconds", "Duration of requests, by route.", ["route"],
                                  registry=registry, buckets=WHOLE)
        self.first_token = Histogram("lit_llm_time_to_first_token_seconds", "Seconds until the first token.",
                                     registry=registry, buckets=FIRST)
        self.next_token = Histogram("lit_llm_inter_token_seconds", "Seconds between two tokens of an answer.",
                                    registry=registry, buckets=BETWEEN)
        self.prompt_tokens = Counter("lit_llm_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.generated_tokens = Counter("lit_llm_generated_tokens", "Generated tokens.", registry=registry)
        self.reused_tokens = Counter("lit_llm_reused_tokens", "Tokens of prompts whose keys and values were in the "
                                     "cache.", registry=registry)
        self.restarts = Counter("lit_llm_worker_restarts", "Restarts of the worker.", registry=registry)
        ProcessCollector(registry=registry)

    def of_engine(self, engine: EngineState) -> None:
        """Add the current state of the engine."""
        self.registry.register(_Gauges(engine))

    def response(self, route: str, status: int, seconds: float) -> None:
        """Count a response."""
        self._responses.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)


class _Gauges:
    """State of the engine at the time of a request for the metrics."""

    def __init__(self, engine: EngineState) -> None:
        self.engine = engine

    def collect(self) -> Iterable[Metric]:
        """The present values."""
        yield _gauge("ready", "Whether the engine computes requests.", int(self.engine.ready))
        yield _gauge("requests_in_flight", "Requests with a waiting client.", self.engine.in_flight)
        stats = self.engine.stats
        if stats is not None:
            yield _gauge("requests_running", "Requests that are computed.", stats.running)
            yield _gauge("requests_waiting", "Requests that wait to be computed.", stats.waiting)
            yield _gauge("cache_tokens", "Tokens of running requests in the cache.", stats.cached_tokens)
            yield _gauge("cache_limit_tokens", "Most tokens whose keys and values are kept.", stats.cache_limit)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"lit_llm_{name}", text, value)
