"""What a server counts and times, for Prometheus. Owns names and units; who calls is the guard and the desk.

    metrics = Metrics()
    metrics.request("/v1/rerank", 200, 0.125)
    data, kind = metrics.render()

Where PROMETHEUS_MULTIPROC_DIR is set, before this file is imported, workers count into files in that folder, and each
of them answers for all.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Final, Literal

from m0kit.errors import DependencyError

try:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
    from prometheus_client.exposition import CONTENT_TYPE_LATEST
    from prometheus_client.multiprocess import MultiProcessCollector
except ImportError:
    raise DependencyError("metrics need prometheus-client. pip install 'm0kit[serve]'.") from None

Stage = Literal["prepare", "prefix", "suffix"]
_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_TOKENS: Final = tuple(float(1 << power) for power in range(6, 20))  # 64 to half a million
_RATIOS: Final = tuple(tenth / 10 for tenth in range(1, 11))


@dataclass(frozen=True, slots=True)
class CacheCounts:
    """Of one cache, since the process began."""

    hits: int
    misses: int
    evictions: int
    num_bytes: int


class Metrics:
    """All of one process. Thread-safe."""

    def __init__(self, caches: Callable[[], Mapping[str, CacheCounts]] = dict) -> None:
        """`caches` gives those of each cache ("image", "prefix", "disk"); it is asked after requests: be quick."""
        own = self._registry = CollectorRegistry()
        self._shared = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        self._caches, self._seen, self._lock = caches, dict[str, CacheCounts](), Lock()
        if not self._shared:
            ProcessCollector(registry=own)
        self._requests = Counter("m0kit_requests", "Requests answered", ["route", "status"], registry=own)
        self._durations = Histogram(
            "m0kit_request_duration_seconds",
            "From the head of a request to the end of its answer",
            ["route"],
            buckets=_SECONDS,
            registry=own,
        )
        self._waits = Histogram(
            "m0kit_queue_duration_seconds", "From admission to the first work", buckets=_SECONDS, registry=own
        )
        self._stages = Histogram(
            "m0kit_stage_duration_seconds", "Runs of each stage", ["stage"], buckets=_SECONDS, registry=own
        )
        self._documents = Counter("m0kit_documents", "Documents scored or read", ["kind"], registry=own)
        self._tokens = Counter("m0kit_tokens", "Tokens of the decoder", ["kind"], registry=own)
        self._queue_requests = Gauge(
            "m0kit_queue_requests", "Requests admitted and not answered", registry=own, multiprocess_mode="livesum"
        )
        self._queue_tokens = Gauge(
            "m0kit_queue_tokens", "Their tokens, as estimated", registry=own, multiprocess_mode="livesum"
        )
        self._batch_tokens = Histogram("m0kit_batch_tokens", "Tokens of a run", buckets=_TOKENS, registry=own)
        self._batch_fill = Histogram(
            "m0kit_batch_fill_ratio", "Tokens of a run over those it may have", buckets=_RATIOS, registry=own
        )
        self._rejected = Counter("m0kit_rejected", "Requests and connections refused", ["reason"], registry=own)
        self._cancelled = Counter("m0kit_cancelled", "Requests whose client hung up", registry=own)
        self._hits = Counter("m0kit_cache_hits", "Found in a cache", ["cache"], registry=own)
        self._misses = Counter("m0kit_cache_misses", "Not found in it", ["cache"], registry=own)
        self._evictions = Counter("m0kit_cache_evictions", "Dropped for others", ["cache"], registry=own)
        self._cache_bytes = Gauge(
            "m0kit_cache_bytes", "What a cache holds", ["cache"], registry=own, multiprocess_mode="livesum"
        )
        self._models = Gauge(
            "m0kit_model_info",
            "1 for each artifact that is served",
            ["name", "precision", "artifact_sha"],
            registry=own,
            multiprocess_mode="livemax",
        )

    def request(self, route: str, status: int, seconds: float) -> None:
        """One that was answered. `route` as it is declared, "/v1/documents/{id}"; status 499 where the client left."""
        self._requests.labels(route, str(status)).inc()
        self._durations.labels(route).observe(seconds)
        self._look_at_caches()

    def rejected(self, reason: str) -> None:
        """A request or connection that got no work done. `reason` is one of few: an error's code in small letters."""
        self._rejected.labels(reason).inc()

    def cancelled(self) -> None:
        """A request whose client hung up before its answer."""
        self._cancelled.inc()

    def queue(self, requests: int, tokens: int) -> None:
        """What is admitted and not answered now."""
        self._queue_requests.set(requests)
        self._queue_tokens.set(tokens)

    def waited(self, seconds: float) -> None:
        """From a request's admission to its first work."""
        self._waits.observe(seconds)

    def stage(self, stage: Stage, seconds: float) -> None:
        """One run of it."""
        self._stages.labels(stage).observe(seconds)

    def documents(self, kind: Literal["text", "image"], count: int = 1) -> None:
        """Scored, or read into an index."""
        self._documents.labels(kind).inc(count)

    def tokens(self, kind: Literal["text", "visual"], count: int) -> None:
        """That the decoder was given."""
        self._tokens.labels(kind).inc(count)

    def batch(self, tokens: int, most: int) -> None:
        """One run of the decoder: its tokens, and how many it may have."""
        self._batch_tokens.observe(tokens)
        self._batch_fill.observe(tokens / most)

    def model_info(self, name: str, precision: str, artifact_sha: str) -> None:
        """An artifact that is served from now on."""
        self._models.labels(name, precision, artifact_sha).set(1)

    def render(self) -> tuple[bytes, str]:
        """All numbers as Prometheus reads them, and the content type of that."""
        self._look_at_caches()
        registry = self._registry
        if self._shared:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry), CONTENT_TYPE_LATEST

    def _look_at_caches(self) -> None:
        """Counters take differences, since files of several processes cannot be asked."""
        with self._lock:
            for name, now in self._caches().items():
                was = self._seen.get(name, CacheCounts(0, 0, 0, 0))
                self._hits.labels(name).inc(max(0, now.hits - was.hits))
                self._misses.labels(name).inc(max(0, now.misses - was.misses))
                self._evictions.labels(name).inc(max(0, now.evictions - was.evictions))
                self._cache_bytes.labels(name).set(now.num_bytes)
                self._seen[name] = now
