"""Exported heads, read back by modules written from what LoRAX and vLLM document, not from our own writer."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from services import exports
from services.cli import app
from services.errors import InvalidRequest, NotFound
from worker.training import artifact, head_files
from worker.training.head_model import Heads

HIDDEN, HEADS, VOCABULARY = 16, 3, 40
TOKENS = torch.tensor([0, 2, 3, 5, 8, 13, 21, 34, 39])


def published(root: Path, *, conditioning: str = "none", recurrent: bool = False, adapter: str | None = None) -> str:
    """Random heads in an artefact directory below `root`; their digest."""
    torch.manual_seed(0)
    heads = Heads(torch.randn(len(TOKENS), HIDDEN), HEADS, conditioning=conditioning, recurrent=recurrent)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_()
    head_files.save(heads, TOKENS, root / "work")
    shape = {
        "heads": HEADS, "hidden": HIDDEN, "vocabulary": len(TOKENS), "conditioning": conditioning,
        "recurrent": recurrent,
    }  # fmt: skip
    report = {"shape": shape, "tau": {"greedy": 2.0, "shared": 2.0}, "requests": 1, "tokens": 1}
    built = artifact.describe_speculator(
        root / "work", base="b" * 64, vocabulary="v" * 64, adapter=adapter, report=report, params={}
    )
    artifact.publish(root / "work", built, root / "artifacts")
    return built.digest


def ours(root: Path, digest: str) -> Heads:
    """The heads as they were published, without conditioning."""
    tensors = load_file(root / "artifacts" / digest / "speculator.safetensors")
    heads = Heads(tensors["head"].float(), HEADS, conditioning="none", recurrent=False)
    with torch.no_grad():
        heads.weight.copy_(tensors["weight"].float())
        heads.bias.copy_(tensors["bias"].float())
    return heads


def to(root: Path, digest: str, target: exports.Target, vocabulary: int = VOCABULARY) -> exports.Exported:
    return exports.export(root / "artifacts", digest, target, root / "out", model="org/base", vocabulary=vocabulary)


class LoraxBlock(nn.Module):
    """LoRAX: a linear layer with a bias, SiLU, added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + nn.functional.silu(self.linear(x))


def test_lorax_reads_version_two_medusa_heads(tmp_path: Path) -> None:
    digest = published(tmp_path)

    exported = to(tmp_path, digest, "lorax")

    config = json.loads((exported.directory / "config.json").read_text())
    assert config == {
        "base_model_name_or_path": "org/base", "medusa_num_heads": HEADS, "medusa_num_layers": 1, "version": 2,
    }  # fmt: skip
    medusa = nn.ModuleList(nn.ModuleList([LoraxBlock()]) for _ in range(config["medusa_num_heads"]))
    medusa.load_state_dict(load_file(exported.directory / "medusa_lm_head.safetensors"), strict=True)
    hidden, previous = torch.randn(5, HIDDEN), torch.zeros(5, dtype=torch.long)
    reference = ours(tmp_path, digest)
    for head, blocks in enumerate(medusa):
        assert isinstance(blocks, nn.ModuleList)
        assert torch.allclose(blocks[0](hidden), reference.step(head, hidden, previous), atol=1e-6)


class VllmBlock(nn.Module):
    """vLLM: residual layers, with a bias where the configuration says so."""

    def __init__(self, config: dict[str, int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(config["hidden_size"], config["hidden_size"], bias=bool(config.get("medusa_fc_bias", False)))
            for _ in range(config["num_hidden_layers"])
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + nn.functional.silu(layer(x))
        return x


class VllmMedusa(nn.Module):
    """vLLM with `original_lm_head`: one LM head of the truncated vocabulary for all, mapped back to all tokens."""

    def __init__(self, config: dict[str, int], mapped: bool) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(VllmBlock(config) for _ in range(config["num_heads"]))
        self.lm_heads = nn.ModuleList([nn.Linear(config["hidden_size"], config["truncated_vocab_size"], bias=False)])
        if mapped:
            self.register_buffer("token_map", torch.zeros(config["truncated_vocab_size"], dtype=torch.long))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        found = []
        for block in self.blocks:
            logits = self.lm_heads[0](block(x))
            if hasattr(self, "token_map"):
                everything = torch.full((len(x), self.config["vocab_size"]), float("-inf"))
                everything[:, self.token_map] = logits  # type: ignore[index]
                logits = everything
            found.append(logits)
        return found


def test_vllm_reads_medusa_heads_with_a_truncated_vocabulary(tmp_path: Path) -> None:
    digest = published(tmp_path)

    exported = to(tmp_path, digest, "vllm-medusa")

    config = json.loads((exported.directory / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("medusa", ["MedusaModel"])
    assert config["original_lm_head"] is True
    assert config["truncated_vocab_size"] < config["vocab_size"]
    medusa = VllmMedusa(config, mapped=True)
    medusa.load_state_dict(load_file(exported.directory / "model.safetensors"), strict=True)
    hidden, previous = torch.randn(5, HIDDEN), torch.zeros(5, dtype=torch.long)
    reference = ours(tmp_path, digest)
    for head, logits in enumerate(medusa(hidden)):
        expected = reference.logits(head, reference.step(head, hidden, previous), previous)
        assert torch.allclose(logits[:, TOKENS], expected, atol=1e-4)
        assert torch.equal(logits.argmax(-1), TOKENS[expected.argmax(-1)])
        assert torch.isinf(logits[:, 1]).all()  # a token that is not among ours


def test_a_whole_vocabulary_needs_no_map(tmp_path: Path) -> None:
    exported = to(tmp_path, published(tmp_path), "vllm-medusa", vocabulary=len(TOKENS))

    config = json.loads((exported.directory / "config.json").read_text())
    assert config["truncated_vocab_size"] == config["vocab_size"]
    VllmMedusa(config, mapped=False).load_state_dict(load_file(exported.directory / "model.safetensors"), strict=True)


def test_what_is_lost_is_said_and_written(tmp_path: Path) -> None:
    plain = to(tmp_path, published(tmp_path), "vllm-medusa")
    assert len(plain.lost) == 1
    told = to_again(tmp_path, conditioning="hydra", adapter="a" * 64)

    text = " ".join(told.lost)
    for word in ("confidence", "token before", "conditioning=none", f"{len(TOKENS)} words", "aaaaaaaaaaaa"):
        assert word in text
    assert all(sentence in (told.directory / "NOTE.txt").read_text() for sentence in told.lost)


def to_again(tmp_path: Path, *, conditioning: str, adapter: str) -> exports.Exported:
    root = tmp_path / "again"
    root.mkdir()
    return to(root, published(root, conditioning=conditioning, adapter=adapter), "lorax")


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    recurrent = published(tmp_path, recurrent=True)
    with pytest.raises(InvalidRequest, match="one another's states"):
        to(tmp_path, recurrent, "lorax")
    with pytest.raises(NotFound, match="begin with"):
        to(tmp_path, "0" * 64, "lorax")
    with pytest.raises(InvalidRequest, match="hexadecimal"):
        to(tmp_path, "../../etc", "lorax")
    weights = tmp_path / "artifacts" / recurrent / "speculator.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(InvalidRequest, match="was changed"):
        to(tmp_path, recurrent, "lorax")


def test_the_command_writes_what_lorax_reads(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = published(tmp_path)
    monkeypatch.setenv("WHET_HOME", str(tmp_path))
    monkeypatch.setenv("WHET_MODEL", str(tiny_model))
    out = tmp_path / "taken"

    result = CliRunner().invoke(app, ["artifact", "export", digest[:12], "--to", "lorax", "--out", str(out)])

    assert result.exit_code == 0, result.output
    assert "Left behind: the confidence" in result.output
    assert "not noted in the audit log: no API key" in result.output
    assert sorted(path.name for path in out.iterdir()) == ["NOTE.txt", "config.json", "medusa_lm_head.safetensors"]
    wrong = CliRunner().invoke(app, ["artifact", "export", digest[:12], "--to", "tgi", "--out", str(out)])
    assert wrong.exit_code == 1
