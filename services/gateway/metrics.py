"""Prometheus metrics of the gateway; vLLM's names where the meaning is the same."""

from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from engine.messages import SlotState, Status
from services.gateway.speculating import Speculating

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counters of one gateway process in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        model = ("model_name",)
        self.prompt_tokens = Counter(
            "vllm:prompt_tokens", "Prompt tokens of finished requests.", model, registry=self.registry
        )
        self.generation_tokens = Counter(
            "vllm:generation_tokens", "Generated tokens of finished requests.", model, registry=self.registry
        )
        self.prefix_queries = Counter(
            "vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", model, registry=self.registry
        )
        self.prefix_hits = Counter(
            "vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", model, registry=self.registry
        )
        self.finished = Counter(
            "vllm:request_success", "Ended requests.", (*model, "finished_reason"), registry=self.registry
        )
        self.pinned = Counter(
            "whet:pinned_answers", "Ended requests that a pinned answer served.", model, registry=self.registry
        )
        self.first_token = Histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first text.", model,
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.latency = Histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the end.", model,
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.queued = Histogram(
            "vllm:request_queue_time_seconds", "From the engine's receipt to its first step.", model,
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.token_time = Histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time a token took after the first.", model,
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.longest_gap = Histogram(
            "whet:longest_gap_seconds", "Longest silence between two chunks of a request.", model,
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.speculation = SpeculationMetrics(self.registry)
        self.running = Gauge("whet:gateway_requests_running", "Choices now being served.", registry=self.registry)
        self._engine_running = Gauge("vllm:num_requests_running", "Sequences in the step.", registry=self.registry)
        self._engine_waiting = Gauge("vllm:num_requests_waiting", "Sequences not begun.", registry=self.registry)
        self._kv = Gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", registry=self.registry)
        self._steps = Gauge("whet:engine_steps", "Steps since the engine started.", registry=self.registry)
        self._generated = Gauge(
            "whet:engine_generated_tokens", "Tokens since the engine started.", registry=self.registry
        )
        self._slots = Gauge(
            "whet:adapter_slots", "Adapter slots by state; free ones hold nothing.", ("state",), registry=self.registry
        )
        self._speculators = Gauge(
            "whet:speculator_slots", "Speculator slots that hold heads, and free ones.", ("state",),
            registry=self.registry,
        )  # fmt: skip
        self._corpora = Gauge(
            "whet:suffix_corpora", "Namespaces the suffix drafter has a corpus of.", registry=self.registry
        )
        self._corpus_tokens = Gauge(
            "whet:suffix_corpus_tokens", "Tokens in all suffix corpora.", registry=self.registry
        )
        self._corpus_bytes = Gauge("whet:suffix_corpus_bytes", "Memory of all suffix corpora.", registry=self.registry)
        self._spool = Gauge("whet:log_spool_bytes", "Spool not yet shipped and unlinked.", registry=self.registry)
        self._age = Gauge("whet:snapshot_age_seconds", "Age of what is known of keys.", registry=self.registry)
        self._engine_up = Gauge("whet:engine_up", "1 while the engine is connected.", registry=self.registry)

    def render(self, *, engine: Status | None, spool_bytes: int, snapshot_age: float) -> bytes:
        """The exposition text now."""
        self._engine_up.set(engine is not None)
        if engine is not None:
            self._engine_running.set(engine.running)
            self._engine_waiting.set(engine.waiting)
            # An encoder has no KV blocks.
            self._kv.set(1 - engine.blocks_free / engine.blocks_total if engine.blocks_total else 0)
            self._steps.set(engine.steps)
            self._generated.set(engine.generated_tokens)
            self._show_slots(engine)
            self._show_drafters(engine)
        self._spool.set(spool_bytes)
        self._age.set(snapshot_age)
        return generate_latest(self.registry)

    def _show_slots(self, engine: Status) -> None:
        states = [slot.state for slot in engine.slots]
        for state in get_args(SlotState):
            self._slots.labels(state).set(states.count(state))
        self._slots.labels("free").set(max(0, engine.slots_total - len(states)))

    def _show_drafters(self, engine: Status) -> None:
        self._speculators.labels("loaded").set(len(engine.speculators))
        self._speculators.labels("free").set(max(0, engine.speculators_total - len(engine.speculators)))
        self._corpora.set(len(engine.corpora))
        self._corpus_tokens.set(sum(corpus.tokens for corpus in engine.corpora))
        self._corpus_bytes.set(sum(corpus.bytes for corpus in engine.corpora))


class SpeculationMetrics:
    """Steps, and drafts by drafter. Of two drafts verified side by side both count, in every figure alike."""

    def __init__(self, registry: CollectorRegistry) -> None:
        model, drafter, position = ("model_name",), ("model_name", "drafter"), ("model_name", "drafter", "position")
        self._steps = Counter("whet:decode_steps", "Steps that answers took.", model, registry=registry)
        self._drafts = Counter("vllm:spec_decode_num_drafts", "Verified drafts.", drafter, registry=registry)
        self._drafted = Counter(
            "vllm:spec_decode_num_draft_tokens", "Tokens of verified drafts.", drafter, registry=registry
        )
        self._accepted = Counter(
            "vllm:spec_decode_num_accepted_tokens", "Drafted tokens that matched.", drafter, registry=registry
        )
        self._accepted_at = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "Drafted tokens that matched, by position.",
            position, registry=registry,
        )  # fmt: skip
        self._tried_at = Counter(
            "whet:spec_decode_num_tried_tokens_per_pos", "Drafted tokens behind accepted ones only, by position.",
            position, registry=registry,
        )  # fmt: skip

    def count(self, model: str, speculating: Speculating) -> None:
        """Take one ended answer's drafts into the counters."""
        self._steps.labels(model).inc(speculating.steps)
        for drafter, counts in speculating.by_drafter.items():
            self._drafts.labels(model, drafter).inc(counts.drafts)
            self._drafted.labels(model, drafter).inc(counts.drafted_tokens)
            self._accepted.labels(model, drafter).inc(sum(counts.accepted))
            for position, (tried, accepted) in enumerate(zip(counts.tried, counts.accepted, strict=True)):
                self._tried_at.labels(model, drafter, position).inc(tried)
                self._accepted_at.labels(model, drafter, position).inc(accepted)
