"""A tiny random model, tiny adapters, and a real engine process that serves them."""

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import torch
from safetensors.torch import save_file
from sqlalchemy.orm import Session
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from engine.digest import base_digest, file_digest
from engine.messages import Generate, Sampling
from engine.sync_client import SyncEngineClient
from engine.text.tokenizer import Tokenizer
from services.platform.paths import temporary_home
from services.settings import Settings
from services.store import projects
from services.store.base import Sessions
from services.store.models import (
    Artifact,
    Dataset,
    Evaluation,
    EvaluationRow,
    Example,
    Project,
    Revision,
    Run,
)

ROOT = Path(__file__).parents[2]
HIDDEN, HEADS, KV_HEADS, LAYERS, INTERMEDIATE, RANK = 32, 4, 2, 2, 64, 4
WORDS = ["<eos>", "<user>", "<assistant>", *(f"w{number}" for number in range(125))]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
PROMPTS = [[{"role": "user", "content": f"w{n} w{n + 7} w{3 * n}"}] for n in range(10)]


def make_model(directory: Path) -> None:
    """A random Llama and a tokenizer of whole words."""
    directory.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(WORDS), "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "intermediate_size": INTERMEDIATE, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "hidden_act": "silu", "tie_word_embeddings": True, "eos_token_id": 0, "bos_token_id": 0, "head_dim": 8,
        "attention_bias": False, "mlp_bias": False, "dtype": "float32",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    noise = torch.Generator().manual_seed(7)
    kv = KV_HEADS * 8
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (kv, HIDDEN), "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN), "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }  # fmt: skip
    tensors = {"model.embed_tokens.weight": torch.randn(len(WORDS), HIDDEN, generator=noise)}
    tensors["model.norm.weight"] = torch.ones(HIDDEN)
    for layer in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(HIDDEN)
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.randn(shape, generator=noise) * 0.3
    save_file(tensors, directory / "model.safetensors")
    backend = Backend(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(WORDS[:3])
    backend.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)


def make_adapter(artifacts: Path, base: str, seed: int) -> str:
    """A random LoRA large enough to change every answer; returns its digest."""
    building = artifacts / f"building-{seed}"
    building.mkdir(parents=True)
    noise = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for name, size in (("q_proj", HIDDEN), ("o_proj", HIDDEN)):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, HIDDEN, generator=noise)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(size, RANK, generator=noise)
    save_file(tensors, building / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj", "o_proj"]}
    (building / "adapter_config.json").write_text(json.dumps(config))
    files = {name: file_digest(building / name) for name in ("adapter_config.json", "adapter_model.safetensors")}
    manifest = json.dumps({"kind": "adapter", "base": base, "files": files, "seed": seed}).encode()
    (building / "manifest.json").write_bytes(manifest)
    digest = hashlib.sha256(manifest).hexdigest()
    building.rename(artifacts / digest)
    return digest


class EngineUnderTest:
    """An engine process on the tiny model that can be killed and started again."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.model = home / "model"
        self.artifacts = home / "artifacts"
        self.socket = f"ipc://{home / 'run' / 'engine.sock'}"
        make_model(self.model)
        self.base = base_digest(self.model)
        self._process: subprocess.Popen[bytes] | None = None

    def adapter(self, seed: int) -> str:
        """A fresh adapter in the artefact root."""
        return make_adapter(self.artifacts, self.base, seed)

    def start(self) -> None:
        """Start and wait until it answers."""
        command = [
            sys.executable, "-m", "engine.process", "--model", str(self.model), "--socket", self.socket,
            "--artifacts", str(self.artifacts), "--precision", "fp32", "--threads", "1", "--adapter-slots", "6",
            "--kv-tokens", "4096", "--adapter-rank", "8",
        ]  # fmt: skip
        with (self.home / "engine.log").open("ab") as log:
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        with SyncEngineClient(self.socket, connect_seconds=60) as client:
            client.status()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Stop it, politely or not; it may have been stopped before."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(10)
            self._process = None

    def digests(self) -> set[str]:
        """What is in its slots."""
        with SyncEngineClient(self.socket) as client:
            return {slot.digest for slot in client.status().slots}

    def answer(self, messages: list[dict[str, Any]], adapter: str | None, max_tokens: int = 12) -> str:
        """What it says greedily. The adapter must be loaded."""
        tokenizer = Tokenizer.load(self.model)
        sampling = Sampling(temperature=0.0, seed=0, max_tokens=max_tokens, stop_token_ids=tokenizer.eos_ids)
        prompt = tokenizer.encode_chat(messages)
        with SyncEngineClient(self.socket) as client:
            done = client.generate(Generate(id="ask", prompt=prompt, sampling=sampling, adapter=adapter))
        assert done.finished.reason in ("stop", "length"), done.finished.error
        assert done.finished.adapter == adapter
        return tokenizer.decode(done.token_ids)

    def load(self, digest: str) -> None:
        with SyncEngineClient(self.socket) as client:
            client.load_adapter(digest, str(self.artifacts / digest))


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineUnderTest]:
    """A running engine for the module's tests; one that a test has stopped must be started again by it."""
    with temporary_home("whet-test-") as home:
        (home / "run").mkdir()
        under_test = EngineUnderTest(home)
        under_test.start()
        try:
            yield under_test
        finally:
            under_test.stop(signal.SIGKILL)


@pytest.fixture
def settings(engine: EngineUnderTest, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings on the module's engine and the test's own database; in the environment too."""
    monkeypatch.setenv("WHET_HOME", str(engine.home))
    monkeypatch.setenv("WHET_MODEL", str(engine.model))
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return Settings()


@dataclass
class World:
    """A project with a data set of golden prompts."""

    sessions: Sessions
    project_id: UUID
    revision_id: UUID
    example_ids: list[UUID]

    def artifact(self, digest: str, state: str, *, project_id: UUID | None = None, base: str = "base") -> str:
        """The row of an artefact."""
        with self.sessions.begin() as session:
            session.add(
                Artifact(
                    digest=digest, kind="adapter", project_id=project_id or self.project_id, base_digest=base,
                    manifest={}, state=state,
                )
            )  # fmt: skip
        return digest

    def state(self, digest: str) -> str:
        with self.sessions() as session:
            return session.get_one(Artifact, digest).state

    def run(self, digest: str, *, baseline: str | None = None, outputs: list[str]) -> UUID:
        """An unfinished run whose gate has promoted `digest` on these outputs."""
        with self.sessions.begin() as session:
            run = Run(
                project_id=self.project_id, kind="sft", state="running", phase="deploying", params={},
                artifact_digest=digest, created_by="test",
            )  # fmt: skip
            session.add(run)
            session.flush()
            self._evaluation(session, run.id, digest, baseline, outputs)
            return run.id

    def read_run(self, run_id: UUID) -> Run:
        with self.sessions() as session:
            return session.get_one(Run, run_id)

    def _evaluation(
        self, session: Session, run_id: UUID, digest: str, baseline: str | None, outputs: list[str]
    ) -> None:
        evaluation = Evaluation(
            project_id=self.project_id, run_id=run_id, revision_id=self.revision_id, candidate_digest=digest,
            baseline_digest=baseline, decision="promote",
        )  # fmt: skip
        session.add(evaluation)
        session.flush()
        session.add_all(
            EvaluationRow(
                evaluation_id=evaluation.id, example_id=example_id, slice="target", group_key=str(index),
                baseline_output="", candidate_output=output, baseline_scores={}, candidate_scores={},
            )
            for index, (example_id, output) in enumerate(zip(self.example_ids, outputs, strict=False))
        )  # fmt: skip


@pytest.fixture
def world(sessions: Sessions) -> World:
    with sessions.begin() as session:
        project = projects.create(session, "support", config={"rollout": {"mode": "direct"}})
        dataset = Dataset(project_id=project.id, name="golden")
        session.add(dataset)
        session.flush()
        revision = Revision(dataset_id=dataset.id, digest="r1", train_count=0, held_out_count=len(PROMPTS), report={})
        session.add(revision)
        examples = [make_example(project, index) for index in range(len(PROMPTS))]
        session.add_all(examples)
        session.flush()
        return World(sessions, project.id, revision.id, [example.id for example in examples])


def make_example(project: Project, index: int) -> Example:
    return Example(
        project_id=project.id, content_hash=f"h{index}", kind="completion", source="corrected", split="held_out",
        group_key=str(index), messages=PROMPTS[index], completion="w1", annotation_ids=[], reviewers=[],
    )  # fmt: skip
