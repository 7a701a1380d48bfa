"""What Prometheus is told: https://prometheus.io/docs/instrumenting/exposition_formats/."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from pliant.engine.answers import Answer, Piece
from pliant.engine.kinds import Report
from pliant.engine.scheduler import State

__all__ = ["Metrics"]

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Belongs to the event loop; `text` is for any thread."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._first = self._histogram("first_token", "From the request to its first token.")
        self._between = self._histogram("between_tokens", "Between two tokens of an answer.")
        self._whole = self._histogram("answer", "From the request to the end of its answer.")
        self.moves = Counter(
            "pliant_budget_moves", "Changes of the budget.", ["result"], registry=self._registry
        )
        self._times: dict[int, tuple[float, float | None]] = {}
        self._now: tuple[State, Report] | None = None
        self._registry.register(_Snapshot(self))

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"pliant_{name}_seconds", text, registry=self._registry, buckets=_SECONDS)

    def begin(self, answers: Sequence[Answer]) -> None:
        """Answers were asked for now."""
        now = perf_counter()
        for answer in answers:
            self._times[answer.number] = (now, None)

    def piece(self, answer: Answer, piece: Piece) -> None:
        """A piece has come."""
        now = perf_counter()
        start, last = self._times.get(answer.number, (now, None))
        if answer.tokens:
            (self._first if last is None else self._between).observe(now - (last or start))
            self._times[answer.number] = (start, now)
        if piece.last:
            self._times.pop(answer.number, None)
            self._whole.observe(now - start)

    def text(self, state: State, report: Report) -> bytes:
        """Everything, in the text format of Prometheus."""
        self._now = state, report
        return generate_latest(self._registry)

    def collect_now(self) -> Iterator[Metric]:
        """For the registry: what is read when it is asked for."""
        if self._now is None:
            return
        state, report = self._now
        counters = state.counters
        yield _labelled(
            CounterMetricFamily("pliant_prompt_tokens", "Tokens of prompts.", labels=["source"]),
            computed=counters.prompt_tokens,
            cache=counters.cached_tokens,
            disk=counters.read_tokens,
        )
        for name, text, value in (
            ("answer_tokens", "Tokens of answers.", counters.answer_tokens),
            ("steps", "Steps of the model.", counters.steps),
            ("step_seconds", "Time of all steps.", counters.step_seconds),
            ("preemptions", "Answers that lost their place for a while.", counters.preemptions),
            ("resumed_tokens", "Tokens that these had when they went on.", counters.resumed_tokens),
        ):
            yield CounterMetricFamily(f"pliant_{name}", text, value=value)
        yield _labelled(
            CounterMetricFamily("pliant_answers", "Answers that ended.", labels=["reason"]),
            **counters.finished,
        )
        yield _labelled(
            GaugeMetricFamily("pliant_kv_pages", "Pages of the KV cache.", labels=["state"]),
            used=state.pages - state.kept,
            kept=state.kept,
        )
        yield _labelled(
            GaugeMetricFamily("pliant_kv_bytes", "Bytes of the KV cache.", labels=["state"]),
            used=state.kv_used,
            free=max(state.kv - state.kv_used, 0),
        )
        park = report.park
        yield _labelled(
            CounterMetricFamily(
                "pliant_given_up_pages", "Kept pages that had to go.", labels=["to"]
            ),
            disk=park.kept,
            nowhere=park.lost,
        )
        yield _labelled(
            CounterMetricFamily(
                "pliant_parked_pages", "Pages on disk that were wanted.", labels=["result"]
            ),
            read=park.read,
            computed=park.computed,
            broken=park.broken,
        )
        ledger = GaugeMetricFamily(
            "pliant_ledger_bytes", "Memory by owner.", labels=["owner", "state"]
        )
        for owner, (held, touched) in report.ledger.items():
            ledger.add_metric([owner, "held"], held)
            ledger.add_metric([owner, "touched"], touched)
        yield ledger
        for name, text, value in (
            ("waiting", "Answers in the queue.", state.waiting),
            ("running", "Answers in work.", state.running),
            ("parked_bytes", "KV on disk, of sessions and answers.", report.parked_bytes),
            ("park_bytes", "Pages in the folder of --park.", park.bytes),
            ("park_read_bytes_per_second", "Of pages on disk.", park.bytes_per_second or 0),
            ("prefill_tokens_per_second", "Of prompts.", park.tokens_per_second or 0),
            ("resident_bytes", "Resident set of the process.", report.resident),
            ("resident_peak_bytes", "The most it ever was.", report.peak),
            ("budget_bytes", "The budget; 0 without one.", report.budget or 0),
            ("rungs", "Rungs of the ladder in use.", report.rungs),
            ("bits_per_weight", "Of resident plies and scales.", report.bits_per_weight or 0),
            ("expected_kl", "Expected KL divergence in nats.", report.expected_kl or 0),
        ):
            yield GaugeMetricFamily(f"pliant_{name}", text, value=value)


def _labelled(
    family: CounterMetricFamily | GaugeMetricFamily, **values: float
) -> CounterMetricFamily | GaugeMetricFamily:
    """A family with one label, and its values by that label."""
    for label, value in values.items():
        family.add_metric([label], value)
    return family


class _Snapshot:
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics.collect_now()
