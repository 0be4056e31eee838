"""Which code runs the model here: the native CPU path where it can, torch's kernels everywhere else."""

import sys
from functools import partial

import torch

from engine.config import EngineConfig
from engine.layers.backends import choose_attention
from engine.layers.varlen import VarlenAttention
from engine.memory.cache import KVCache
from engine.models.decoder import Decoder
from engine.models.spec import DecoderSpec
from engine.native.build import NoNative, library
from engine.native.decoder import NativeDecoder, unsupported
from engine.native.packing import Packing
from engine.native.sampling import available
from engine.runner.forward import Forward, TorchForward
from engine.runner.graphs import GraphedForward, capturable
from engine.runner.placement import block_size, choose_device, choose_dtype, choose_pool, choose_threads

# Tokens a row of a captured step: one, or one and up to 4 or 16 drafted ones.
DRAFTED_TIERS = (1, 5, 17)


def build_forward(config: EngineConfig, spec: DecoderSpec, *, blocks: int, positions: int) -> Forward:
    """Load the model. Raises UnsupportedModel, and ValueError when the precision asked for cannot be had."""
    device, threads = choose_device(config), choose_threads(config, spec)
    dtype = choose_dtype(config, device)
    torch.set_num_threads(threads)
    refusal = no_native(config, spec, device)
    if refusal and config.precision == "int8":
        raise ValueError(f"--precision int8 needs the native CPU path: {refusal}")
    load = partial(Decoder, spec, config.model, dtype=dtype, device=device, positions=positions)
    if not refusal:
        packing = Packing(spec, dtype, int8=config.precision == "int8")
        decoder, pool = load(pack=False, each=packing.layer), choose_pool(config, spec)
        return NativeDecoder(decoder, packing, blocks=blocks, tokens=config.step_tokens, positions=positions, pool=pool)
    decoder = load(pack=config.pack)
    if config.native and device.type == "cpu":
        print(f"torch kernels serve this model: {refusal}", file=sys.stderr)
        # The sampler is native all the same, and must not be compiled inside a step.
        available()
    cache = KVCache(spec, blocks, block_size(device), dtype, device)
    attention = choose_attention(spec, cache, device)
    if isinstance(attention, VarlenAttention) and capturable(spec):
        fresh = DRAFTED_TIERS if config.speculation else (1,)
        return GraphedForward(decoder, cache, attention, rows=config.max_running, longest=positions, fresh=fresh)
    return TorchForward(decoder, cache, attention)


def no_native(config: EngineConfig, spec: DecoderSpec, device: torch.device) -> str:
    """Why the native path is not taken, as a sentence; empty when it is."""
    if not config.native:
        return "it is switched off"
    if device.type != "cpu":
        return "the model runs on a GPU"
    if reason := unsupported(spec, config.adapter_rank):
        return reason
    try:
        library()
    except NoNative as error:
        return str(error)
    return ""
