"""One generic decoder-only transformer, configured by a DecoderSpec.

Suffixes: T tokens of a step, R rows that are sampled, A attention width, E hidden size, D head dimension, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional

from engine.layers.attention import Attention
from engine.layers.linear import Linear
from engine.layers.lora import LoraBatch, LoraWeights
from engine.layers.moe import MoeLayer
from engine.layers.rope import Rope
from engine.memory.cache import KVCache
from engine.models.experts import load_experts
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
    """Slot tensors of one layer's fused projections; a sparse layer has none for its MLP."""

    qkv: LoraWeights | None = None
    o: LoraWeights | None = None
    gate_up: LoraWeights | None = None
    down: LoraWeights | None = None


NO_LORA = LayerLora()


class Layer:
    """Weights of one block; gate and up are one matrix, and so are query, key and value.

    A sparse layer has `moe` in place of `gate_up` and `down`; `q_norm_D` and `k_norm_D` are None where there are none.
    """

    def __init__(self, spec: DecoderSpec, checkpoint: Checkpoint, index: int, device: torch.device, pack: bool) -> None:
        prefix = f"model.layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        narrow, kv_size = spec.hidden_size, spec.kv_heads * spec.head_dim
        parts = {"q_proj": spec.attention_size, "k_proj": kv_size, "v_proj": kv_size}
        gates = {"gate_proj": spec.intermediate_size, "up_proj": spec.intermediate_size}

        def fused(owner: str, outs: dict[str, int], in_size: int, bias: bool) -> Linear:
            weights = [checkpoint.take(f"{owner}.{name}.weight", out, in_size) for name, out in outs.items()]
            biases = [checkpoint.take(f"{owner}.{name}.bias", out) for name, out in outs.items()] if bias else None
            joined = torch.cat(biases).to(device) if biases else None
            return Linear(torch.cat(weights).to(device), joined, pack=pack)

        def norm(name: str, width: int) -> torch.Tensor:
            return checkpoint.take(f"{name}.weight", width).to(device)

        self.attention_norm_E = norm(f"{prefix}.input_layernorm", narrow)
        self.mlp_norm_E = norm(f"{prefix}.post_attention_layernorm", narrow)
        self.q_norm_D = norm(f"{attention}.q_norm", spec.head_dim) if spec.qk_norm else None
        self.k_norm_D = norm(f"{attention}.k_norm", spec.head_dim) if spec.qk_norm else None
        self.qkv = fused(attention, parts, narrow, spec.qkv_bias)
        self.o = fused(attention, {"o_proj": narrow}, spec.attention_size, spec.output_bias)
        self.moe: MoeLayer | None = None
        self.gate_up: Linear | None = None
        self.down: Linear | None = None
        if spec.moe is not None and spec.sparse[index]:
            self.moe = load_experts(checkpoint, prefix, spec.moe, narrow, device, pack)
        else:
            self.gate_up = fused(mlp, gates, narrow, spec.mlp_bias)
            self.down = fused(mlp, {"down_proj": narrow}, spec.intermediate_size, spec.mlp_bias)


class Decoder:
    """The model. Stateless between steps but for its weights and adapter slots; the cache is handed in.

    A classifier has a `score` head [labels, E] and no LM `head`; every other model the other way round. `each` sees
    every layer as soon as it is loaded, and may take its weights over.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        directory: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        positions: int,
        pack: bool = True,
        each: Callable[[Layer], None] = lambda _: None,
    ) -> None:
        self.spec, self.dtype, self.device = spec, dtype, device
        self.rope = Rope(spec.rope, spec.head_dim, positions, dtype, device)
        with Checkpoint(directory, dtype) as checkpoint:
            self.embedding_VE = checkpoint.take("model.embed_tokens.weight", spec.vocab_size, spec.hidden_size).to(
                device
            )
            self.layers: list[Layer] = []
            for index in range(spec.layers):
                self.layers.append(Layer(spec, checkpoint, index, device, pack))
                each(self.layers[-1])
            self.norm_E = checkpoint.take("model.norm.weight", spec.hidden_size).to(device)
            self.score = self._score_weight(checkpoint)
            self.head = None if spec.labels else Linear(self._head_weight(checkpoint), pack=pack)
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
            self._norm_heads(layer, heads_THD)
            self.rope.rotate_(heads_THD[:, :turning], cos_T1D, sin_T1D)
            cache.write(index, heads_THD[:, spec.heads :], step.write_index)
            mixed_TA = attention(index, heads_THD[:, : spec.heads], step.plan)
            h_TE += _project(layer.o, mixed_TA, lora.o, step.lora)
            h_TE += self._mlp(layer, self._norm(h_TE, layer.mlp_norm_E), lora, step.lora)
        return h_TE

    def final(self, h_RE: torch.Tensor) -> torch.Tensor:
        """The LM head's input: what speculator heads read."""
        return self._norm(h_RE, self.norm_E)

    def logits(self, x_RE: torch.Tensor, lora: LoraBatch | None) -> torch.Tensor:
        """Logits [R, V] of normalised hidden states; `lora` runs over these rows."""
        assert self.head is not None, "a classifier has no LM head"
        return _project(self.head, x_RE, self.head_lora if lora is not None else None, lora)

    def add_slots(self, slots: int, rank: int) -> None:
        """Allocate the adapter slot tensors: slot 0 stays empty, 1 .. slots are for adapters."""

        def make(linear: Linear, parts: int) -> LoraWeights:
            return LoraWeights(slots + 1, parts * rank, linear.in_size, linear.out_size, self.dtype, self.device)

        self.lora = [
            LayerLora(
                make(layer.qkv, 3),
                make(layer.o, 1),
                make(layer.gate_up, 2) if layer.gate_up else None,
                make(layer.down, 1) if layer.down else None,
            )
            for layer in self.layers
        ]
        self.head_lora = make(self.head, 1) if self.head else None

    def _mlp(self, layer: Layer, x_TE: torch.Tensor, lora: LayerLora, batch: LoraBatch | None) -> torch.Tensor:
        if layer.moe is not None:
            return layer.moe(x_TE)
        assert layer.gate_up is not None, "a layer without experts is dense"
        assert layer.down is not None, "a layer without experts is dense"
        gate_T, up_T = _project(layer.gate_up, x_TE, lora.gate_up, batch).chunk(2, dim=-1)
        return _project(layer.down, functional.silu(gate_T).mul_(up_T), lora.down, batch)

    def _norm_heads(self, layer: Layer, heads_THD: torch.Tensor) -> None:
        """Normalise every query and key head in place, where the model does."""
        if layer.q_norm_D is None or layer.k_norm_D is None:
            return
        split, (width, eps) = self.spec.heads, (self.spec.head_dim, self.spec.norm_eps)
        q_THD, k_TKD = heads_THD[:, :split], heads_THD[:, split : split + self.spec.kv_heads]
        q_THD.copy_(functional.rms_norm(q_THD, (width,), layer.q_norm_D, eps))
        k_TKD.copy_(functional.rms_norm(k_TKD, (width,), layer.k_norm_D, eps))

    def _norm(self, x: torch.Tensor, weight_E: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (self.spec.hidden_size,), weight_E, self.spec.norm_eps)

    def _score_weight(self, checkpoint: Checkpoint) -> torch.Tensor | None:
        if not self.spec.labels:
            return None
        return checkpoint.take("score.weight", len(self.spec.labels), self.spec.hidden_size).to(self.device)

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
