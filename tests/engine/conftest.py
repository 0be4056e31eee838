"""Small random models and adapters, made once per session; every test engine is closed again."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from engine.digest import base_digest
from engine.offline import LocalEngine
from tests.engine.constraining import EOS, TOKENIZER, VOCABULARY

SHAPE: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "eos_token_id": 3,
    "bos_token_id": 1,
}
ALL_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]

ModelMaker = Callable[..., Path]
EngineMaker = Callable[..., LocalEngine]


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> ModelMaker:
    """Writes a random Llama with the given configuration overrides (biases get random values too)."""

    def make(seed: int = 0, shards: str | None = None, **overrides: object) -> Path:
        torch.manual_seed(seed)
        directory = tmp_path_factory.mktemp("model")
        model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **overrides}))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(directory, max_shard_size=shards or "1GB")
        return directory

    return make


@pytest.fixture(scope="session")
def model_dir(make_model: ModelMaker) -> Path:
    """The model most tests share."""
    return make_model()


@pytest.fixture(scope="session")
def talking_model(make_model: ModelMaker) -> Path:
    """A random model with the starter's tokenizer, for grammars."""
    directory = make_model(vocab_size=VOCABULARY, eos_token_id=EOS)
    shutil.copy(TOKENIZER, directory)
    return directory


@pytest.fixture
def make_engine() -> Iterator[EngineMaker]:
    """Starts fp32 engines on a model directory and closes them after the test."""
    engines: list[LocalEngine] = []

    def make(directory: Path, **options: object) -> LocalEngine:
        engine = LocalEngine(
            directory, **{"precision": "fp32", "device": "cpu", "threads": 1, "kv_tokens": 4096} | options
        )
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def engine(model_dir: Path, make_engine: EngineMaker) -> LocalEngine:
    """An fp32 engine on the shared model."""
    return make_engine(model_dir)


def reference(directory: Path) -> PreTrainedModel:
    """transformers' own fp32 model of a directory."""
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """What transformers computes, [tokens, vocabulary]."""
    return model(torch.tensor([token_ids])).logits[0]


def peft_model(directory: Path, seed: int, rank: int, targets: list[str], **options: object) -> PeftModel:
    """A PEFT LoRA with random A and B, so that it changes the model visibly."""
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM", **options)
    adapted = get_peft_model(model, config)
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


def write_artifact(root: Path, base: str, adapted: PeftModel) -> str:
    """Save a PEFT model as an artefact directory below `root`; returns its digest."""
    draft = root / "draft"
    adapted.save_pretrained(draft, save_embedding_layers=False)
    return seal(root, draft, base)


def seal(root: Path, draft: Path, base: str) -> str:
    """Write the manifest for the files in `draft` and give the directory its digest as name."""
    names = ("adapter_model.safetensors", "adapter_config.json")
    files = {name: hashlib.sha256((draft / name).read_bytes()).hexdigest() for name in names}
    manifest = json.dumps({"kind": "adapter", "base": base, "files": files}).encode()
    digest = hashlib.sha256(manifest).hexdigest()
    (draft / "manifest.json").write_bytes(manifest)
    draft.rename(root / digest)
    return digest


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    """An artefact root."""
    root = tmp_path / "artifacts"
    root.mkdir()
    return root


@pytest.fixture
def make_artifact(model_dir: Path, artifacts: Path) -> Callable[..., str]:
    """Writes a random adapter for the shared model; returns its digest."""

    def make(seed: int, rank: int = 4, targets: list[str] | None = None) -> str:
        adapted = peft_model(model_dir, seed, rank, targets or ["q_proj", "v_proj", "down_proj"])
        return write_artifact(artifacts, base_digest(model_dir), adapted)

    return make
