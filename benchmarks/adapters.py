"""What LoRA costs: 16 adapters on one batch of 16 over one adapter, and one adapter over none, in one run.

    python -m benchmarks.adapters [--model DIR] [--ranks 8,64] [--repeats 3]

Adapters are random, on all seven projections of every layer. The engine's slots are as wide as the rank measured.
"""

import argparse
import hashlib
import json
import os
import statistics
import tempfile
from functools import partial
from itertools import count
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from safetensors.torch import save_file

from benchmarks.figures import STARTER, config_of, in_turns, load_average, random_prompts, show, spread, timed
from engine.digest import base_digest
from engine.messages import Generate, Sampling
from engine.offline import LocalEngine
from engine.process import KEEP_BYTES, tune_heap

BATCH = 16


def main() -> None:
    """Measure every rank and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=STARTER)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--ranks", default="8,64")
    parser.add_argument("--prompt", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    tune_heap(KEEP_BYTES)
    show(model=str(options.model), load_average=load_average(), torch=torch.__version__)
    for rank in (int(part) for part in options.ranks.split(",")):
        measure(options, rank)


def measure(options: argparse.Namespace, rank: int) -> None:
    """One engine with 16 adapters of a rank: none, one and all of them on the same batch, in turns."""
    ids = count()
    with (
        tempfile.TemporaryDirectory(prefix="whet-bench-") as root,
        LocalEngine(
            options.model, precision=options.precision, adapter_slots=BATCH + 2, adapter_rank=rank, max_running=BATCH
        ) as engine,
    ):
        digests = [engine.load_adapter(write_adapter(Path(root), options.model, rank, seed)) for seed in range(BATCH)]

        def speed(adapters: list[str | None], turn: int) -> float:
            prompts = random_prompts(options.model, BATCH, options.prompt, f"{rank} {turn} {len(set(adapters))}")
            sampling = Sampling(temperature=0.0, seed=0, max_tokens=options.tokens, min_tokens=options.tokens)
            requests = [
                Generate(id=f"{next(ids)}", prompt=prompt, sampling=sampling, adapter=adapter)
                for prompt, adapter in zip(prompts, adapters, strict=True)
            ]
            tokens: int = BATCH * options.tokens
            return tokens / timed(lambda: engine.generate(requests))

        batches: dict[str, list[str | None]] = {
            "none": [None] * BATCH, "one": [digests[0]] * BATCH, "sixteen": list(digests),
        }  # fmt: skip
        runs = in_turns({name: partial(speed, adapters) for name, adapters in batches.items()}, options.repeats)
    middle = {name: statistics.median(values) for name, values in runs.items()}
    show(rank=rank, tokens_per_second={name: spread(values, 0) for name, values in runs.items()},
         sixteen_over_one=round(middle["sixteen"] / middle["one"], 3),
         lora_on_over_off=round(middle["one"] / middle["none"], 3))  # fmt: skip


def write_adapter(root: Path, model: Path, rank: int, seed: int, scale: float = 0.01) -> Path:
    """A random adapter as PEFT would save it, with the manifest the engine asks for."""
    directory = root / f"adapter-{seed}"
    directory.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (wide, high) in projections(config_of(model)).items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, wide, generator=generator) / wide**0.5
        tensors[f"{name}.lora_B.weight"] = torch.randn(high, rank, generator=generator) * scale
    save_file(tensors, directory / "adapter_model.safetensors")
    targets = sorted({name.rpartition(".")[2] for name in projections(config_of(model))})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    names = ("adapter_config.json", "adapter_model.safetensors")
    files = {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in names}
    manifest = {"kind": "adapter", "base": base_digest(model), "files": files}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def projections(config: dict[str, int]) -> dict[str, tuple[int, int]]:
    """PEFT's name of every projection, with its input and output size."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    sizes = {
        "self_attn.q_proj": (hidden, queries), "self_attn.k_proj": (hidden, keys), "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (queries, hidden), "mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }  # fmt: skip
    layers = range(config["num_hidden_layers"])
    return {f"base_model.model.model.layers.{i}.{name}": size for i in layers for name, size in sizes.items()}


if __name__ == "__main__":
    main()
