"""A Decoder's weights brought into the native layout layer by layer, each dense copy let go as soon as it is packed."""

import ctypes

import torch

from engine.layers.linear import Linear
from engine.layers.moe import MoeLayer, SeparateExperts
from engine.layers.rope import Rope
from engine.models.decoder import Decoder
from engine.models.decoder import Layer as DenseLayer
from engine.models.spec import DecoderSpec
from engine.native.library import Layer, Lora, Matrix, Model, Moe
from engine.native.memory import Arena
from engine.native.weights import Packed, interleave, pad, padded
from engine.runner.placement import parameters

# Weights above this are read from memory at each step; last-level caches are about this large.
CACHE_BYTES = 32 << 20


class Packing:
    """Takes layers while they are loaded, then the rest of the decoder. Keeps everything the structures point to."""

    def __init__(self, spec: DecoderSpec, dtype: torch.dtype, *, int8: bool) -> None:
        self.spec, self.dtype = spec, dtype
        self.arena = Arena()
        self.layers = (Layer * spec.layers)()
        self._packed = 0
        self._int8 = int8
        self._far = parameters(spec) * (1 if int8 else dtype.itemsize) > CACHE_BYTES
        self._keep: list[torch.Tensor] = []
        self._arrays: list[ctypes.Array[Matrix]] = []

    def layer(self, layer: DenseLayer) -> None:
        """Pack the next layer; its dense weights are gone afterwards."""
        self.layers[self._packed] = packed = Layer(
            qkv=self._matrix(layer.qkv, layer.qkv.weight),
            o=self._matrix(layer.o, layer.o.weight),
            attention_norm=self._kept(layer.attention_norm_E),
            mlp_norm=self._kept(layer.mlp_norm_E),
            q_norm=self._kept(layer.q_norm_D),
            k_norm=self._kept(layer.k_norm_D),
            window=self.spec.windows[self._packed],
        )
        if layer.moe is not None:
            packed.moe = self._moe(layer.moe)
        else:
            assert layer.gate_up is not None, "a layer without experts is dense"
            assert layer.down is not None, "a layer without experts is dense"
            packed.gate_up, packed.down = self._gated(layer.gate_up), self._matrix(layer.down, layer.down.weight)
        self.layers[self._packed] = packed
        self._packed += 1

    def model(self, decoder: Decoder, positions: int) -> Model:
        """The whole model, once all layers are in; contexts up to `positions`."""
        spec, half = self.spec, self.spec.head_dim // 2
        assert self._packed == spec.layers, "every layer is packed before the model is described"
        assert decoder.head is not None, "models with an LM head only"
        embedding = None
        if not spec.tied:
            self._keep.append(self.arena.copy(decoder.embedding_VE))
            embedding = self._keep[-1].data_ptr()
        # In fp32 whatever the model computes in: the products round, the angles need not.
        cos, sin = Rope(spec.rope, spec.head_dim, positions, torch.float32, decoder.device).tables()
        return Model(
            layers=spec.layers, hidden=spec.hidden_size, intermediate=padded(spec.intermediate_size),
            heads=spec.heads, kv_heads=spec.kv_heads, head_dim=spec.head_dim, vocabulary=spec.vocab_size,
            fp32=int(self.dtype == torch.float32), context=positions, eps=spec.norm_eps, scale=spec.head_dim**-0.5,
            layer=ctypes.cast(self.layers, ctypes.POINTER(Layer)),
            experts=spec.moe.experts if spec.moe else 0, per_token=spec.moe.per_token if spec.moe else 0,
            expert_intermediate=padded(spec.moe.intermediate_size) if spec.moe else 0,
            head=self._matrix(decoder.head, decoder.head.weight), lora_head=Lora(), embedding=embedding,
            norm=self._kept(decoder.norm_E), cos=self._kept(cos[:, :half]), sin=self._kept(sin[:, half:]),
        )  # fmt: skip

    def _gated(self, gate_up: Linear) -> Matrix:
        """Gate and up interleaved, bias and all."""
        if gate_up.bias is not None:
            halves = [pad(half[:, None])[:, :1] for half in gate_up.bias.chunk(2)]
            gate_up.bias = interleave(torch.cat(halves)).squeeze(1)
        return self._matrix(gate_up, interleave(torch.cat([pad(half) for half in gate_up.weight.chunk(2)])))

    def _moe(self, layer: MoeLayer) -> Moe:
        experts = layer.experts
        assert isinstance(experts, SeparateExperts), "experts are stacked on a GPU only"
        gate_up = (Matrix * layer.spec.experts)(*[self._gated(linear) for linear in experts.gate_up])
        down = (Matrix * layer.spec.experts)(*[self._matrix(linear, linear.weight) for linear in experts.down])
        self._arrays += [gate_up, down]
        return Moe(
            # Rounding the router's weights to eight bits would choose other experts.
            router=self._matrix(layer.router, layer.router.weight, int8=False),
            gate_up=gate_up,
            down=down,
            experts=layer.spec.experts,
            per_token=layer.spec.per_token,
            normalize=layer.spec.normalize,
        )

    def _matrix(self, linear: Linear, weight: torch.Tensor, *, int8: bool | None = None) -> Matrix:
        packed = Packed.of(pad(weight), linear.bias, self.arena, int8=self._int8 if int8 is None else int8)
        packed.matrix.far = self._far
        self._keep += packed.tensors
        linear.weight = torch.empty(0)
        return packed.matrix

    def _kept(self, tensor: torch.Tensor | None) -> int | None:
        """The address of an fp32 copy that lives as long as we do."""
        if tensor is None:
            return None
        self._keep.append(tensor.float().contiguous())
        return self._keep[-1].data_ptr()
