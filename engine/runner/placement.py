"""Where and how the model runs: device, dtype, threads, page size."""

import os
from typing import NamedTuple

import torch

from engine.config import EngineConfig
from engine.models.spec import DecoderSpec

# Below this many parameters a second thread gains nothing (measured on the starter model's shape).
ONE_THREAD_PARAMETERS = 50_000_000
# Steps of a small model that are shorter than this stay on one thread: the other cores have a gateway to run. Both are
# about a millisecond's work, the second without AVX-512.
SOLO_TOKENS, SOLO_TOKENS_NARROW = 48, 8
CPU_BLOCK, CUDA_BLOCK = 16, 256


class Pool(NamedTuple):
    """`threads` share a step; steps of fewer than `solo` tokens run on the caller's alone."""

    threads: int
    solo: int


def choose_device(config: EngineConfig) -> torch.device:
    """The configured device; `auto` takes a GPU when there is one. Raises ValueError when CUDA is asked for in vain."""
    if config.device == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if config.device == "cuda":
        raise ValueError("--device cuda: this torch finds no CUDA device")
    return torch.device("cpu")


def choose_dtype(config: EngineConfig, device: torch.device) -> torch.dtype:
    """`auto` is bf16 where the hardware multiplies it natively, else fp32."""
    if config.precision != "auto":
        return torch.float32 if config.precision == "fp32" else torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16
    native = torch.cpu.get_capabilities()
    return torch.bfloat16 if native.get("avx512_bf16") or native.get("amx_bf16") else torch.float32


def choose_threads(config: EngineConfig, spec: DecoderSpec) -> int:
    """One thread for a small model, else every core this process may use."""
    if config.threads:
        return config.threads
    if parameters(spec) < ONE_THREAD_PARAMETERS:
        return 1
    return len(os.sched_getaffinity(0))


def choose_pool(config: EngineConfig, spec: DecoderSpec) -> Pool:
    """For the native path: every core, but with a small model only for steps that are worth waking the others."""
    if config.threads:
        return Pool(config.threads, 0)
    small = parameters(spec) < ONE_THREAD_PARAMETERS
    solo = SOLO_TOKENS if torch.cpu.get_capabilities().get("avx512_f") else SOLO_TOKENS_NARROW
    return Pool(len(os.sched_getaffinity(0)), solo if small else 0)


def block_size(device: torch.device) -> int:
    """Tokens in a KV page: flash attention's paged kernel wants multiples of 256 (FA2)."""
    return CUDA_BLOCK if device.type == "cuda" else CPU_BLOCK


def parameters(spec: DecoderSpec) -> int:
    """About how many parameters the model has (biases and norms left out)."""
    mixture = spec.moe.experts * spec.moe.intermediate_size if spec.moe else 0
    widths = sum(mixture if sparse else spec.intermediate_size for sparse in spec.sparse)
    blocks = spec.layers * (spec.qkv_size + spec.attention_size) + 3 * widths
    return spec.hidden_size * blocks + spec.vocab_size * spec.hidden_size * (1 if spec.tied else 2)
