"""The C++ structures as Python sees them; field for field those of decoder.cpp, matmul.h and lora.h."""

import ctypes
from functools import cache
from typing import Any, ClassVar

import torch

from engine.native.build import library

Pointer = ctypes.c_void_p
Int = ctypes.c_int32

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
PANEL = 16
# The most projections fused into one: query, key and value.
PARTS = 3


class Matrix(ctypes.Structure):
    """A packed matrix: y = x Wᵀ · scale + bias."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("data", Pointer), ("scale", Pointer), ("bias", Pointer),
        ("outputs", Int), ("inputs", Int), ("kind", Int), ("far", Int),
    ]  # fmt: skip


class Moe(ctypes.Structure):
    """A mixture of experts; none where `experts` is 0."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("router", Matrix), ("gate_up", ctypes.POINTER(Matrix)), ("down", ctypes.POINTER(Matrix)),
        ("experts", Int), ("per_token", Int), ("normalize", Int), ("unused", Int),
    ]  # fmt: skip


class Lora(ctypes.Structure):
    """Slot tensors of one projection; all null when adapters cannot touch it."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("a", Pointer), ("b", Pointer), ("a_bytes", ctypes.c_int64), ("b_bytes", ctypes.c_int64),
        ("width", Pointer), ("parts", Int), ("inputs", Int), ("first", Int * PARTS), ("panels", Int * PARTS),
        ("spacing", Int), ("unused", Int),
    ]  # fmt: skip


class Layer(ctypes.Structure):
    """One block."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("qkv", Matrix), ("o", Matrix), ("gate_up", Matrix), ("down", Matrix), ("moe", Moe),
        ("lora_qkv", Lora), ("lora_o", Lora), ("lora_gate_up", Lora), ("lora_down", Lora),
        ("attention_norm", Pointer), ("mlp_norm", Pointer), ("q_norm", Pointer), ("k_norm", Pointer),
        ("keys", Pointer), ("values", Pointer), ("window", ctypes.c_int64),
    ]  # fmt: skip


class Model(ctypes.Structure):
    """The decoder; copied by whet_open, but the arrays it points to are ours and must stay."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("layers", Int), ("hidden", Int), ("intermediate", Int), ("heads", Int), ("kv_heads", Int), ("head_dim", Int),
        ("vocabulary", Int), ("fp32", Int), ("tokens", Int), ("context", Int),
        ("experts", Int), ("per_token", Int), ("expert_intermediate", Int), ("solo", Int),
        ("eps", ctypes.c_float), ("scale", ctypes.c_float), ("layer", ctypes.POINTER(Layer)),
        ("head", Matrix), ("lora_head", Lora), ("embedding", Pointer), ("norm", Pointer),
        ("cos", Pointer), ("sin", Pointer),
    ]  # fmt: skip


class Step(ctypes.Structure):
    """One ragged step."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("rows", Int), ("tokens", Int), ("takes", Int), ("unused", Int),
        ("token_ids", Pointer), ("starts", Pointer), ("lengths", Pointer), ("slots", Pointer), ("tables", Pointer),
        ("take", Pointer), ("hidden", Pointer), ("logits", Pointer),
    ]  # fmt: skip


class Draw(ctypes.Structure):
    """What one sampled row needs; engine.layers.sampler.Draw, flattened."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("seed", ctypes.c_uint64), ("choice", ctypes.c_int64), ("position", ctypes.c_int64),
        ("temperature", ctypes.c_float), ("top_p", ctypes.c_float), ("min_p", ctypes.c_float), ("top_k", Int),
    ]  # fmt: skip


@cache
def functions() -> ctypes.CDLL:
    """The library with its signatures declared. Raises NoNative."""
    native = library()
    native.whet_open.restype = Pointer
    native.whet_open.argtypes = [ctypes.POINTER(Model), ctypes.c_int]
    native.whet_close.restype = None
    native.whet_close.argtypes = [Pointer]
    native.whet_threads.argtypes = [Pointer]
    native.whet_forward.restype = None
    native.whet_forward.argtypes = [Pointer, ctypes.POINTER(Step)]
    native.whet_project.restype = None
    native.whet_project.argtypes = [Pointer, Pointer, Pointer, ctypes.c_int, Pointer]
    native.whet_pack.restype = None
    native.whet_pack.argtypes = [Pointer, Pointer, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    native.whet_sample.argtypes = [
        Pointer, ctypes.c_int64, ctypes.c_int, ctypes.c_int, ctypes.POINTER(Draw), Pointer, Pointer, Pointer,
    ]  # fmt: skip
    native.whet_instructions.restype, native.whet_instructions.argtypes = ctypes.c_char_p, [Int]
    return native
