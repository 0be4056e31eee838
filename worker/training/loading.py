"""The base model as a trainer wants it: precision, attention, and four-bit weights when asked."""

import importlib.util
import os
from typing import Any

from worker.training.process import Refused
from worker.training.spec import Spec

EAGER_TOKENS = 512


def require_quantizer(quantize: str) -> None:
    """Raises Refused where four-bit weights cannot be made; cheap enough to ask before anything is loaded."""
    if quantize == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise Refused("quantize=nf4 needs bitsandbytes, which this worker lacks: install it there, or leave it at none")


def on_cuda(spec: Spec) -> bool:
    """Whether to train on a GPU. Raises Refused when one was asked for and torch sees none."""
    import torch

    found = spec.device != "cpu" and torch.cuda.is_available()
    if not found and (spec.device == "cuda" or spec.quantize == "nf4"):
        wanted = "WHET_DEVICE is cuda" if spec.device == "cuda" else "quantize=nf4 needs a GPU"
        raise Refused(f"{wanted}, but torch sees no CUDA device")
    return found


def load(spec: Spec, longest: int, *, on_gpu: bool) -> Any:  # noqa: ANN401 - transformers ships no types
    """The base model; `longest` row in tokens. In four bits the adapter computes in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if on_gpu and (rank := os.environ.get("LOCAL_RANK")):
        torch.cuda.set_device(int(rank))  # four-bit weights go to the current device at once, accelerate moves none
    dtype = torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported() else torch.float32
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention(longest, on_gpu=on_gpu)}
    if spec.quantize == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    return AutoModelForCausalLM.from_pretrained(spec.model, **options)


def attention(longest: int, *, on_gpu: bool) -> str:
    """On CPU the plain kernel took 0.31 s of processor time a step of 8 x 150 tokens, torch's fused one 0.40; it needs
    memory for the square of the length, though."""
    return "sdpa" if on_gpu or longest > EAGER_TOKENS else "eager"


def bf16_pays(*, on_gpu: bool) -> bool:
    """On CPUs without the instructions bf16 is emulated, slower than fp32."""
    import torch

    if on_gpu:
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
