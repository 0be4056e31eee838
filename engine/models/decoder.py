"""One generic decoder-only transformer, configured by a DecoderSpec.

Suffixes: T tokens of a step, R rows that are sampled, A attention width, E hidden size, D head dimension, V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional

from engine.layers.attention import Attention
from engine.layers.linear import Linear
from engine.layers.lora import LoraBatch, LoraWeights
from engine.layers.rope import Rope
from engine.memory.cache import KVCache
from engine.models.loading import Checkpoint
from engine.models.spec import DecoderSpec


class StepInput(NamedTuple):
    """A ragged step, flattened: what every layer sees. `plan` is the attention backend's own."""

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    write_index: torch.Tensor
    plan: object
    lora: LoraBatch | None


@dataclass
class LayerLora:
    """Slot tensors of one layer's four fused projections."""

    qkv: LoraWeights | None = None
    o: LoraWeights | None = None
    gate_up: LoraWeights | None = None
    down: LoraWeights | None = None


NO_LORA = LayerLora()


class Layer:
    """Weights of one block; gate and up are one matrix, and so are query, key and value."""

    def __init__(self, spec: DecoderSpec, checkpoint: Checkpoint, index: int, device: torch.device, pack: bool) -> None:
        prefix = f"model.layers.{index}"
        kv_size = spec.kv_heads * spec.head_dim
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        parts = {"q_proj": spec.attention_size, "k_proj": kv_size, "v_proj": kv_size}
        gates = {"gate_proj": spec.intermediate_size, "up_proj": spec.intermediate_size}
        wide, narrow = spec.intermediate_size, spec.hidden_size

        def fused(owner: str, outs: dict[str, int], in_size: int, bias: bool) -> Linear:
            weights = [checkpoint.take(f"{owner}.{name}.weight", out, in_size) for name, out in outs.items()]
            biases = [checkpoint.take(f"{owner}.{name}.bias", out) for name, out in outs.items()] if bias else None
            joined = torch.cat(biases).to(device) if biases else None
            return Linear(torch.cat(weights).to(device), joined, pack=pack)

        self.attention_norm_E = checkpoint.take(f"{prefix}.input_layernorm.weight", narrow).to(device)
        self.mlp_norm_E = checkpoint.take(f"{prefix}.post_attention_layernorm.weight", narrow).to(device)
        self.qkv = fused(attention, parts, narrow, spec.qkv_bias)
        self.o = fused(attention, {"o_proj": narrow}, spec.attention_size, spec.output_bias)
        self.gate_up = fused(mlp, gates, narrow, spec.mlp_bias)
        self.down = fused(mlp, {"down_proj": narrow}, wide, spec.mlp_bias)


class Decoder:
    """The model. Stateless between steps but for its weights and adapter slots; the cache is handed in."""

    def __init__(
        self,
        spec: DecoderSpec,
        directory: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        positions: int,
        pack: bool = True,
    ) -> None:
        self.spec, self.dtype, self.device = spec, dtype, device
        self.rope = Rope(spec.rope, spec.head_dim, positions, dtype, device)
        with Checkpoint(directory, dtype) as checkpoint:
            self.embedding_VE = checkpoint.take("model.embed_tokens.weight", spec.vocab_size, spec.hidden_size).to(
                device
            )
            self.layers = [Layer(spec, checkpoint, index, device, pack) for index in range(spec.layers)]
            self.norm_E = checkpoint.take("model.norm.weight", spec.hidden_size).to(device)
            self.head = Linear(self._head_weight(checkpoint), pack=pack)
            checkpoint.finish()
        self.lora: list[LayerLora] = []
        self.head_lora: LoraWeights | None = None

    def forward(self, step: StepInput, cache: KVCache, attention: Attention) -> torch.Tensor:
        """Hidden states [T, E] before the final norm; keys and values of the step are written to the cache."""
        spec = self.spec
        turning = spec.heads + spec.kv_heads
        cos_T1D, sin_T1D = self.rope.at(step.positions_T)
        h_TE = functional.embedding(step.tokens_T, self.embedding_VE)
        for index, layer in enumerate(self.layers):
            lora = self.lora[index] if step.lora is not None else NO_LORA
            x_TE = self._norm(h_TE, layer.attention_norm_E)
            qkv_T = _project(layer.qkv, x_TE, lora.qkv, step.lora)
            heads_THD = qkv_T.view(-1, spec.heads + 2 * spec.kv_heads, spec.head_dim)
            self.rope.rotate_(heads_THD[:, :turning], cos_T1D, sin_T1D)
            cache.write(index, heads_THD[:, spec.heads :], step.write_index)
            mixed_TA = attention(index, heads_THD[:, : spec.heads], step.plan)
            h_TE += _project(layer.o, mixed_TA, lora.o, step.lora)
            x_TE = self._norm(h_TE, layer.mlp_norm_E)
            gate_T, up_T = _project(layer.gate_up, x_TE, lora.gate_up, step.lora).chunk(2, dim=-1)
            h_TE += _project(layer.down, functional.silu(gate_T).mul_(up_T), lora.down, step.lora)
        return h_TE

    def final(self, h_RE: torch.Tensor) -> torch.Tensor:
        """The LM head's input: what speculator heads read."""
        return self._norm(h_RE, self.norm_E)

    def logits(self, x_RE: torch.Tensor, lora: LoraBatch | None) -> torch.Tensor:
        """Logits [R, V] of normalised hidden states; `lora` runs over these rows."""
        return _project(self.head, x_RE, self.head_lora if lora is not None else None, lora)

    def add_slots(self, slots: int, rank: int) -> None:
        """Allocate the adapter slot tensors: slot 0 stays empty, 1 .. slots are for adapters."""

        def make(linear: Linear, parts: int) -> LoraWeights:
            return LoraWeights(slots + 1, parts * rank, linear.in_size, linear.out_size, self.dtype, self.device)

        self.lora = [
            LayerLora(make(layer.qkv, 3), make(layer.o, 1), make(layer.gate_up, 2), make(layer.down, 1))
            for layer in self.layers
        ]
        self.head_lora = make(self.head, 1)

    def _norm(self, x: torch.Tensor, weight_E: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (self.spec.hidden_size,), weight_E, self.spec.norm_eps)

    def _head_weight(self, checkpoint: Checkpoint) -> torch.Tensor:
        if self.spec.tied:
            checkpoint.ignore("lm_head.weight")
            return self.embedding_VE
        return checkpoint.take("lm_head.weight", self.spec.vocab_size, self.spec.hidden_size).to(self.device)


def _project(linear: Linear, x: torch.Tensor, weights: LoraWeights | None, batch: LoraBatch | None) -> torch.Tensor:
    y = linear(x)
    if weights is not None and batch is not None:
        weights.add_(y, x, batch)
    return y
