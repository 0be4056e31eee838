"""What the engine makes of a GPU: an 8 B-shaped model of random bf16 weights against what the device could do.

    python -m benchmarks.gpu [--directory DIR] [--layers 32] [--batch 64] [--prompt 128] [--tokens 256] [--no-peer]

Prints one JSON object; a quarter of an hour at most on one GPU with 40 GB of memory and 20 GB of disk in DIR (a
temporary directory unless given). Without CUDA it says so and measures nothing.

- `floor_share`: speed at batch 1 over the bandwidth floor, the time to read every weight a token needs and the keys and
  values before it at the copy bandwidth measured in the same run. Goal 0.8.
- `over_transformers`: tokens a second at `--batch` over transformers' continuous batching on the same weights, with
  prompts of the same length; the peer's figure is one run, from its first request to its last token. Goal 1.5.
- `lora_share`: the same batch with four rank-16 adapters over none. Goal 0.85.
- `speculation`: decode rate with drafts over that without, at forced acceptance (benchmarks/gpu_speculation.py).
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks import gpu_speculation
from benchmarks.adapters import write_adapter
from benchmarks.figures import random_prompts
from engine.config import Device
from engine.messages import Generate, Sampling
from engine.models.registry import read_spec
from engine.models.spec import DecoderSpec
from engine.offline import LocalEngine

DEVICE: Device = "cuda"
SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
COPY_BYTES, COPIES = 4 << 30, 10
BF16_BYTES = 2
ADAPTERS, RANK = 4, 16
REPEATS = 3
SEED = 0


def main() -> None:
    """Make the model, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(json.dumps({"measured": False, "reason": "this torch finds no CUDA device"}))
        return
    with tempfile.TemporaryDirectory(prefix="whet-bench-", dir=options.directory) as root:
        print(json.dumps(measure(Path(root), options), indent=2))


def measure(root: Path, options: argparse.Namespace) -> dict[str, object]:
    """All figures of one run."""
    model = root / "model"
    write_model(model, options.layers)
    bandwidth = copy_bandwidth()
    figures: dict[str, object] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "layers": options.layers,
        "batch": options.batch, "prompt": options.prompt, "tokens": options.tokens,
        "copy_gb_per_second": round(bandwidth / 1e9, 1),
    }  # fmt: skip
    batched = whet(model, root, options, bandwidth, figures)
    if not options.no_peer:
        peer = transformers_speed(model, prompts_of(model, options.batch, options.prompt), options.tokens)
        figures |= {"transformers_tokens_per_second": round(peer, 1), "over_transformers": round(batched / peer, 2)}
    return figures


def whet(model: Path, root: Path, options: argparse.Namespace, bandwidth: float, figures: dict[str, object]) -> float:
    """Add the engine's own figures; returns tokens a second of the batch without adapters."""
    room = options.batch * (options.prompt + options.tokens + 256) + 4096
    begun = time.perf_counter()
    with LocalEngine(
        model, precision="bf16", device=DEVICE, kv_tokens=room, max_running=options.batch, adapter_rank=RANK,
        max_context=min(8192, options.prompt + options.tokens + 256), step_tokens=8192, adapter_slots=ADAPTERS + 1,
    ) as engine:  # fmt: skip
        run(engine, prompts_of(model, 2, options.prompt), 8)
        figures["start_seconds"] = round(time.perf_counter() - begun, 1)
        single = seconds_per_token(engine, prompts_of(model, 1, options.prompt), options.tokens)
        floor = step_bytes(read_spec(model), options.prompt + options.tokens // 2) / bandwidth
        plain = throughput(engine, model, options)
        digests = [engine.load_adapter(write_adapter(root, model, RANK, seed)) for seed in range(ADAPTERS)]
        adapted = throughput(engine, model, options, digests)
        batches = [size for size in gpu_speculation.BATCHES if size <= options.batch]
        forced = gpu_speculation.measure(engine, model, options.prompt, options.tokens, batches=batches)
    figures |= {
        "milliseconds_per_token_alone": round(single * 1e3, 3),
        "milliseconds_floor": round(floor * 1e3, 3),
        "floor_share": round(floor / single, 3),
        "tokens_per_second": round(plain, 1),
        "tokens_per_second_with_adapters": round(adapted, 1),
        "lora_share": round(adapted / plain, 3),
        "speculation": forced,
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1),
    }
    release()
    return plain


def write_model(directory: Path, layers: int) -> None:
    """config.json and one safetensors shard per layer, filled on the GPU: seconds instead of minutes."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": layers}))
    generator = torch.Generator(DEVICE).manual_seed(SEED)
    where: dict[str, str] = {}
    for index, shard in enumerate(shards(layers)):
        name = f"model-{index:03}.safetensors"
        tensors = {
            key: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.randn(shape, generator=generator, device=DEVICE).mul_(0.02).bfloat16().cpu()
            for key, shape in shard.items()
        }
        save_file(tensors, directory / name, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    release()


def shards(layers: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes of a Llama's weights: the ends, then layer by layer."""
    hidden, wide, vocabulary = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    keys = SHAPE["num_key_value_heads"] * SHAPE["head_dim"]
    ends: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    yield ends | {"lm_head.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        yield {
            f"{attention}.q_proj.weight": (hidden, hidden), f"{attention}.k_proj.weight": (keys, hidden),
            f"{attention}.v_proj.weight": (keys, hidden), f"{attention}.o_proj.weight": (hidden, hidden),
            f"{mlp}.gate_proj.weight": (wide, hidden), f"{mlp}.up_proj.weight": (wide, hidden),
            f"{mlp}.down_proj.weight": (hidden, wide), f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
        }  # fmt: skip


def step_bytes(spec: DecoderSpec, context: int) -> int:
    """Bytes one token alone must read: all weights but the embedding table, and its keys and values."""
    per_layer = spec.hidden_size * (spec.qkv_size + spec.attention_size + 3 * spec.intermediate_size)
    keys_and_values = 2 * spec.kv_heads * spec.head_dim * context
    return BF16_BYTES * (spec.layers * (per_layer + keys_and_values) + spec.vocab_size * spec.hidden_size)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy on the device; the best of ten."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(COPIES):
        start, stop = (torch.Event(DEVICE, enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        stop.record()
        stop.synchronize()
        best = max(best, 2 * COPY_BYTES / (start.elapsed_time(stop) / 1e3))
    del source, target
    release()
    return best


_turns = count()


def prompts_of(model: Path, number: int, length: int) -> list[list[int]]:
    """Prompts nobody has seen: neither prefix cache can help."""
    return random_prompts(model, number, length, f"gpu {next(_turns)}")


def run(engine: LocalEngine, prompts: Sequence[list[int]], tokens: int, adapters: Sequence[str] = ()) -> float:
    """Seconds to answer all prompts greedily, `tokens` each, prompt i with adapter i mod the number of them."""
    sampling = Sampling(temperature=0.0, seed=0, max_tokens=tokens)
    requests = [
        Generate(
            id=f"gpu-{next(_turns)}", prompt=prompt, sampling=sampling,
            adapter=adapters[index % len(adapters)] if adapters else None,
        )
        for index, prompt in enumerate(prompts)
    ]  # fmt: skip
    begun = time.perf_counter()
    answers = engine.generate(requests)
    seconds = time.perf_counter() - begun
    assert all(len(answer.token_ids) == tokens for answer in answers), "an answer ended early"
    return seconds


def throughput(engine: LocalEngine, model: Path, options: argparse.Namespace, adapters: Sequence[str] = ()) -> float:
    """Output tokens a second, prompts included in the time: the median of three runs after one that warms up."""
    seconds = [
        run(engine, prompts_of(model, options.batch, options.prompt), options.tokens, adapters)
        for _ in range(REPEATS + 1)
    ]
    return float(options.batch * options.tokens / statistics.median(seconds[1:]))


def seconds_per_token(engine: LocalEngine, prompts: Sequence[list[int]], tokens: int) -> float:
    """Time of one further token: a long answer minus a short one, so that the prompt's share falls out."""
    short = run(engine, prompts, 2)
    return (run(engine, [prompt[::-1] for prompt in prompts], tokens) - short) / (tokens - 2)


def transformers_speed(model: Path, prompts: list[list[int]], tokens: int) -> float:
    """Output tokens a second of continuous batching, from its first request to its last token, warm-up left out."""
    peer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, device_map=DEVICE).eval()
    settings = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    outputs = peer.generate_batch(prompts, generation_config=settings, record_timestamps=True).values()
    assert all(len(output.generated_tokens) == tokens for output in outputs), "an answer ended early"
    begun = min(output.created_time for output in outputs)
    seconds: float = max(output.timestamps[-1] for output in outputs) - begun
    del peer
    release()
    return len(prompts) * tokens / seconds


def release() -> None:
    """Give memory that nobody refers to back to the device."""
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
