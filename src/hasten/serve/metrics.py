"""What Prometheus reads: hasten's names, and vLLM's for the dashboards that know these."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from hasten.serve.answers import Groups
from hasten.serve.worker import Worker

NAMES = "hasten", "vllm"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class _Now(Collector):
    """What is so at the moment it is asked."""

    def __init__(self, worker: Worker, model: str) -> None:
        self._worker, self._model = worker, model

    def collect(self) -> Iterator[GaugeMetricFamily]:
        cache = self._worker.llm.engine.cache
        limit = cache.limit_bytes
        known = {
            "num_requests_running": ("Choices in the batch.", self._worker.running),
            "num_requests_waiting": ("Choices that wait for a place in it.", self._worker.waiting),
            "kv_cache_usage_perc": (
                "Share of the KV cache's limit; 0 without one.",
                cache.used_bytes / limit if limit else 0,
            ),
            "kv_cache_bytes": ("What the KV cache holds.", cache.used_bytes),
        }
        for prefix in NAMES:
            for name, (what, value) in known.items():
                family = GaugeMetricFamily(f"{prefix}:{name}", what, labels=["model_name"])
                family.add_metric([self._model], value)
                yield family


class Metrics:
    """Counters of a server.

    Args:
        worker: whose state is told.
        model: the label of all of them.
    """

    def __init__(self, worker: Worker, model: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Now(worker, model))

        def counter(name: str, what: str, *labels: str) -> list[Counter]:
            told = ["model_name", *labels]
            return [Counter(f"{prefix}:{name}", what, told, registry=self._registry) for prefix in NAMES]

        def histogram(name: str, what: str) -> list[Histogram]:
            return [
                Histogram(f"{prefix}:{name}", what, ["model_name"], registry=self._registry, buckets=SECONDS)
                for prefix in NAMES
            ]

        self._model = model
        self._prompt = counter("prompt_tokens", "Tokens of prompts, once for all choices.")
        self._output = counter("generation_tokens", "New tokens.")
        self._cached = counter("prefix_cache_hits", "Tokens of prompts that were in the cache.")
        self._ended = counter("request_success", "Choices that ended, by why.", "finished_reason")
        self._proposed = counter("spec_decode_num_draft_tokens", "Tokens of drafts.")
        self._accepted = counter("spec_decode_num_accepted_tokens", "Of these, accepted.")
        self._first = histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self._between = histogram("time_per_output_token_seconds", "Between tokens, the mean of a choice.")
        self._all = histogram("e2e_request_latency_seconds", "From arrival to the last token.")
        self._errors = Gauge("hasten:errors", "Answers with an error, by status.", ["status"], registry=self._registry)

    def ended(self, groups: Groups, counted: Mapping[str, Any]) -> None:
        """An answer is complete, or was given up.

        Args:
            counted: its tokens (`answers.usage`).
        """
        self._add(self._prompt, counted["prompt_tokens"])
        self._add(self._output, counted["completion_tokens"])
        self._add(self._cached, counted["prompt_tokens_details"]["cached_tokens"])
        for job in (job for group in groups for job in group):
            for counter in self._ended:
                counter.labels(self._model, job.finish_reason or "abort").inc()
            self._add(self._proposed, job.statistics.proposed)
            self._add(self._accepted, job.statistics.accepted)
            if job.first_token_at is not None:
                first, rest = job.first_token_at - job.arrived, len(job.output) - 1
                self._observe(self._first, first)
                self._observe(self._all, job.seconds)
                if rest > 0:
                    self._observe(self._between, (job.seconds - first) / rest)

    def failed(self, status: int) -> None:
        """An answer was an error."""
        self._errors.labels(str(status)).inc()

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)

    def _add(self, counters: Iterable[Counter], amount: float) -> None:
        for counter in counters:
            counter.labels(self._model).inc(amount)

    def _observe(self, histograms: Iterable[Histogram], seconds: float) -> None:
        for histogram in histograms:
            histogram.labels(self._model).observe(max(0.0, seconds))
