"""The figures of GET /metrics, for Prometheus: the server's own counts, and the worker's figures as it last sent them.

One registry for each app, so that two in a process stay apart.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from sfumato.server.backend import Backend

GAUGES = {
    "queue_jobs": ("queue", "Jobs that wait for a row"),
    "rows": ("rows", "Rows in use"),
    "rows_max": ("rows_max", "Rows at most"),
    "tokens_per_pass": ("tokens_per_pass", "Tokens per pass of the answers that ended lately"),
    "cache_bytes": ("cache_bytes", "Memory of the rows' caches"),
    "adapters": ("adapters", "Adapters that are loaded"),
    "adapter_bytes": ("adapter_bytes", "Memory of adapters, beside the weights"),
    "prefix_bytes": ("prefix_bytes", "Memory of kept prefixes"),
    "stalled_seconds": ("stalled", "Seconds for which the job that has been prepared for longest has been prepared"),
    "memory_bytes": ("memory_bytes", "Resident memory of the worker"),
}
COUNTERS = {
    "steps": ("steps", "Denoising steps"),
    "canvases": ("canvases", "Canvases committed"),
    "tokens": ("tokens", "Tokens committed"),
    "passes": ("passes", "Passes of the whole stack"),
    "prefix_hits": ("prefix_hits", "Prompts of which a beginning was kept"),
    "prefix_tokens": ("prefix_tokens", "Prompt tokens that needed no encoding"),
    "worker_restarts": ("restarts", "Times that the worker was started again"),
}
_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 600)


class Metrics:
    """The figures of one application."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.registry = CollectorRegistry()
        self.requests = Counter("sfumato_requests", "Requests answered", ["route", "status"], registry=self.registry)
        self.request_seconds = Histogram(
            "sfumato_request_seconds", "From a request to its answer's end", buckets=_BUCKETS, registry=self.registry
        )
        self.first_commit_seconds = Histogram(
            "sfumato_first_commit_seconds",
            "From a job's start, the wait for a row included, to its first committed text",
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.steps_per_canvas = Histogram(
            "sfumato_steps_per_canvas",
            "Steps a canvas, the mean of each answer",
            buckets=(1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128),
            registry=self.registry,
        )
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """The worker's figures, for the registry."""
        stats = self._backend.stats()
        for name, (source, text) in GAUGES.items():
            yield GaugeMetricFamily(f"sfumato_{name}", text, value=getattr(stats, source))
        for name, (source, text) in COUNTERS.items():
            yield CounterMetricFamily(f"sfumato_{name}", text, value=getattr(stats, source))

    def page(self) -> bytes:
        """All figures in Prometheus's text format."""
        return generate_latest(self.registry)
