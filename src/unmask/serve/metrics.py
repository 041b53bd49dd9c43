"""Prometheus metrics: vLLM's names where it has them, and what only a canvas has."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from unmask.engine import Engine, Ticket
from unmask.serve.worker import Worker

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
RATES = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32)


class Metrics:
    """What a server counts, in a registry of its own."""

    def __init__(self, worker: Worker) -> None:
        self.registry = CollectorRegistry()
        more = {"labelnames": ("model_name",), "registry": self.registry}
        self.success = Counter(
            "vllm:request_success", "Requests that ended.", ("model_name", "finished_reason"), registry=self.registry
        )
        self.ttft = Histogram(
            "vllm:time_to_first_token_seconds", "To the first committed token of the text.", buckets=SECONDS, **more
        )
        self.latency = Histogram("vllm:e2e_request_latency_seconds", "From arrival to end.", buckets=SECONDS, **more)
        self.queued = Histogram("vllm:request_queue_time_seconds", "In the queue.", buckets=SECONDS, **more)
        self.steps = Histogram("unmask:request_steps", "Forwards of a request.", buckets=STEPS, **more)
        self.rate = Histogram("unmask:tokens_per_forward", "Cells decided for each forward.", buckets=RATES, **more)
        self.registry.register(Engines(worker))

    def ended(self, model: str, tickets: Iterable[Ticket]) -> None:
        """Count requests that are over."""
        for ticket in tickets:
            done = ticket.done
            self.success.labels(model, done.reason if done else "error" if ticket.error else "abort").inc()
            if done is None:
                continue
            self.latency.labels(model).observe(done.waited + done.seconds)
            self.queued.labels(model).observe(done.waited)
            self.ttft.labels(model).observe(max(0.0, ticket.first - ticket.submitted))
            self.steps.labels(model).observe(done.forwards)
            self.rate.labels(model).observe(done.tokens_per_forward)

    def text(self) -> bytes:
        """In Prometheus' own format."""
        return generate_latest(self.registry)


class Engines:
    """The state of the engines, read when it is asked for."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def collect(self) -> Iterable[Metric]:
        """One family a metric."""
        gauges = {
            "vllm:num_requests_running": ("Requests being decoded.", lambda e: e.live),
            "vllm:num_requests_waiting": ("Requests in the queue.", lambda e: e.waiting),
            "vllm:kv_cache_usage_perc": ("Share of the cell budget in use, 0 to 1.", lambda e: e.used / e.cells),
            "unmask:slots_used": ("Rows being decoded.", lambda e: e.live),
            "unmask:slots": ("Rows there are.", lambda e: e.rows),
        }
        counters = {
            "vllm:prompt_tokens": ("Cells of prompts.", lambda e: e.counts.prompt_tokens),
            "vllm:generation_tokens": ("Useful tokens written.", lambda e: e.counts.useful_tokens),
            "unmask:forwards": ("Forwards of rows.", lambda e: e.counts.forwards),
            "unmask:batched_forwards": ("Forwards of batches.", lambda e: e.counts.steps),
            "unmask:positions": ("Cells run through a model.", lambda e: e.counts.positions),
        }
        for kind, table in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (told, value) in table.items():
                family = kind(name, told, labels=("model_name",))
                for model, engine in self.worker.engines.items():
                    family.add_metric([model], _number(value, engine))
                yield family


def _number(value, engine: Engine) -> float:
    try:
        return float(value(engine))
    except RuntimeError:  # lanes came or went while they were counted
        return float("nan")
