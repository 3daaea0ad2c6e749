"""Metrics of the server in Prometheus' text format."""

from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of a server; ``running`` and ``waiting`` return numbers of sequences in the batch and before it."""

    def __init__(self, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        self.registry = registry = CollectorRegistry()
        Gauge("lmchat_running", "Completions in the batch", registry=registry).set_function(running)
        Gauge("lmchat_waiting", "Completions waiting for a place in the batch", registry=registry).set_function(waiting)
        counter, histogram = partial(Counter, registry=registry), partial(Histogram, registry=registry)
        self.requests = counter("lmchat_requests", "Requests by path and HTTP status", ["path", "status"])
        self.disconnects = counter(
            "lmchat_disconnects", "Requests whose client disconnected before the answer was complete"
        )
        self.prompt_tokens = counter("lmchat_prompt_tokens", "Tokens of prompts")
        self.generated_tokens = counter("lmchat_generated_tokens", "Generated tokens")
        self.first_token = histogram("lmchat_first_token_seconds", "Time to the first token", buckets=_SECONDS)
        self.token_interval = histogram(
            "lmchat_token_interval_seconds",
            "Mean time between a completion's tokens",
            buckets=(0.001, 0.0025, *_SECONDS),
        )
        self.duration = histogram("lmchat_request_seconds", "Time of a request", buckets=_SECONDS)

    def text(self) -> bytes:
        return generate_latest(self.registry)
