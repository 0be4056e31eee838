"""LoRA slots: equal to PEFT's merged weights, mixed in one batch, swapped under running requests, never half-loaded."""

import hashlib
import json
import pickle
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.adapters import loading
from engine.adapters.files import AdapterRefused, read
from engine.adapters.loading import Adapter, AdapterReader
from engine.adapters.recipe import read_recipe
from engine.client import Completion
from engine.config import EngineConfig
from engine.core import Engine
from engine.digest import base_digest
from engine.layers import lora as lora_module
from engine.messages import Done, Generate, LoadAdapter, Sampling, UnloadAdapter, encode
from engine.offline import LocalEngine, collect
from tests.engine.conftest import (
    ALL_TARGETS,
    EngineMaker,
    peft_model,
    reference,
    reference_logits,
    seal,
    write_artifact,
)

ArtifactMaker = Callable[..., str]
GREEDY = Sampling(temperature=0.0, seed=0, max_tokens=6)


@pytest.fixture
def core(model_dir: Path, artifacts: Path) -> Engine:
    """An engine with three slots (one of them spare) on the shared model."""
    config = EngineConfig(
        model=model_dir, artifacts=artifacts, precision="fp32", device="cpu", threads=1, kv_tokens=2048,
        adapter_slots=3, adapter_rank=8,
    )  # fmt: skip
    engine = Engine(config)
    yield engine
    engine.close()


def settle(core: Engine, message_id: str) -> str:
    """Step until a command is answered; its error."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        core.step()
        for entry in list(core.outbox):
            if isinstance(entry[1], Done) and entry[1].id == message_id:
                core.outbox.remove(entry)
                return entry[1].error
        time.sleep(0.002)
    raise AssertionError(f"{message_id} was never answered")


def load(core: Engine, digest: str, path: str | None = None) -> str:
    core.load_adapter(b"c", LoadAdapter(id=f"load-{digest}", digest=digest, path=path or digest))
    return settle(core, f"load-{digest}")


def run(core: Engine, name: str, adapter: str | None, prompt: list[int] | None = None) -> Completion:
    core.submit(b"c", Generate(id=name, prompt=prompt or [5, 6, 7], adapter=adapter, sampling=GREEDY))
    while core.step():
        continue
    return collect(core)[name]


@pytest.mark.parametrize(
    ("rank", "targets", "options"),
    [
        (4, ["q_proj", "v_proj"], {}),
        (8, ALL_TARGETS, {"use_rslora": True}),
        (3, ["k_proj", "up_proj"], {}),
        (64, ["q_proj", "v_proj", "down_proj"], {"use_rslora": True}),
        (8, ALL_TARGETS, {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 16}, "alpha_pattern": {"k_proj": 3}}),
        (4, ["v_proj", "gate_proj"], {"rank_pattern": {"gate_proj": 1}, "alpha_pattern": {"^model.layers.0.*": 9},
                                      "use_rslora": True}),
    ],
)  # fmt: skip
def test_logits_equal_peft_merged_weights(
    rank: int,
    targets: list[str],
    options: dict[str, object],
    model_dir: Path,
    artifacts: Path,
    make_engine: EngineMaker,
) -> None:
    adapted = peft_model(model_dir, rank, rank, targets, **options)
    digest = write_artifact(artifacts, base_digest(model_dir), adapted)
    engine = make_engine(model_dir, adapter_rank=64)
    assert engine.load_adapter(artifacts / digest) == digest
    token_ids = list(range(10, 70))
    expected = reference_logits(adapted.merge_and_unload(), token_ids)
    assert (expected - reference_logits(reference(model_dir), token_ids)).abs().max() > 0.05
    for chunks in ([60], [16, 30, 1, 13]):
        assert (engine.logits(token_ids, digest, chunks) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("max_runs", [12, 0])
def test_a_smaller_adapter_in_a_used_slot_sees_nothing_of_the_larger_one(
    max_runs: int, model_dir: Path, make_artifact: ArtifactMaker, artifacts: Path, make_engine: EngineMaker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(lora_module, "MAX_RUNS", max_runs)
    engine = make_engine(model_dir, native=False)
    slots = engine.core.adapters.slots
    large = engine.load_adapter(artifacts / make_artifact(1, 8, ALL_TARGETS))
    slot = slots.get(large).slot
    slots.drain(large)
    adapted = peft_model(model_dir, 5, 2, ["q_proj"])
    small = engine.load_adapter(artifacts / write_artifact(artifacts, base_digest(model_dir), adapted))
    token_ids = list(range(10, 40))
    expected = reference_logits(adapted.merge_and_unload(), token_ids)
    assert slots.get(small).slot == slot
    assert (engine.logits(token_ids, small) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("max_runs", [12, 0])
def test_rows_of_different_adapters_share_a_batch_without_touching_each_other(
    max_runs: int, model_dir: Path, make_artifact: ArtifactMaker, artifacts: Path, make_engine: EngineMaker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(lora_module, "MAX_RUNS", max_runs)
    digests = [make_artifact(1), make_artifact(2, 8, ALL_TARGETS), make_artifact(3, 2)]
    engine = make_engine(model_dir, native=False)
    for digest in digests:
        engine.load_adapter(artifacts / digest)
    choices = [None, *digests] * 3
    asked = [
        Generate(id=str(index), prompt=list(range(4, 9 + 5 * index)), adapter=adapter, sampling=GREEDY)
        for index, adapter in enumerate(choices)
    ]
    together = [done.token_ids for done in engine.generate(asked)]
    alone = [engine.generate([request])[0].token_ids for request in asked]
    assert together == alone
    bare = engine.generate([list(request.prompt) for request in asked], GREEDY)
    assert [index for index, done in enumerate(bare) if done.token_ids == together[index]][:3] == [0, 4, 8]


def test_the_reply_names_the_adapter_that_answered(core: Engine, make_artifact: ArtifactMaker) -> None:
    digest = make_artifact(1)
    assert load(core, digest) == ""
    assert run(core, "with", digest).finished.adapter == digest
    assert run(core, "without", None).finished.adapter is None


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Reading an artefact waits for this event."""
    gate, read = threading.Event(), AdapterReader.read

    def wait(self: AdapterReader, digest: str, path: str) -> Adapter:
        assert gate.wait(30)
        return read(self, digest, path)

    monkeypatch.setattr(AdapterReader, "read", wait)
    yield gate
    gate.set()


def test_a_request_for_a_loading_adapter_waits_while_others_go_on(
    core: Engine, make_artifact: ArtifactMaker, reading: threading.Event
) -> None:
    digest = make_artifact(1)
    core.load_adapter(b"c", LoadAdapter(id="l", digest=digest, path=digest))
    core.submit(b"c", Generate(id="early", prompt=[5, 6], adapter=digest, sampling=GREEDY))
    assert run(core, "other", None).finished.reason == "length"
    assert [(slot.digest, slot.state) for slot in core.status("s").slots] == [(digest, "loading")]
    assert core.status("s").waiting == 1
    reading.set()
    assert settle(core, "l") == ""
    while core.step():
        continue
    assert collect(core)["early"].finished.adapter == digest


def test_a_request_for_an_adapter_that_fails_to_load_is_answered(
    core: Engine, make_artifact: ArtifactMaker, artifacts: Path, reading: threading.Event
) -> None:
    digest = make_artifact(1)
    (artifacts / digest / "adapter_model.safetensors").write_bytes(b"")
    core.load_adapter(b"c", LoadAdapter(id="l", digest=digest, path=digest))
    core.submit(b"c", Generate(id="early", prompt=[5, 6], adapter=digest, sampling=GREEDY))
    reading.set()
    assert "does not match" in settle(core, "l")
    assert collect(core)["early"].finished.code == "adapter_not_loaded"
    assert core.status("s").waiting == 0


def test_running_requests_finish_on_the_adapter_they_started_with(core: Engine, make_artifact: ArtifactMaker) -> None:
    old, new = make_artifact(1), make_artifact(2)
    load(core, old)
    alone = run(core, "alone", old)
    core.submit(b"c", Generate(id="running", prompt=[5, 6, 7], adapter=old, sampling=GREEDY))
    core.step()
    core.unload_adapter(b"c", UnloadAdapter(id="u", digest=old))
    assert load(core, new) == ""
    while core.step():
        continue
    done = collect(core)["running"]
    assert (done.finished.adapter, done.token_ids) == (old, alone.token_ids)
    assert run(core, "swapped", new).token_ids != alone.token_ids
    assert core.adapters.slots.get(old) is None
    assert run(core, "late", old).finished.code == "adapter_not_loaded"


def test_an_unload_is_answered_when_the_last_request_has_finished(core: Engine, make_artifact: ArtifactMaker) -> None:
    digest = make_artifact(1)
    load(core, digest)
    core.submit(b"c", Generate(id="running", prompt=[5, 6, 7], adapter=digest, sampling=GREEDY))
    core.step()
    core.unload_adapter(b"c", UnloadAdapter(id="u", digest=digest))
    core.step()
    assert not any(isinstance(message, Done) for _, message in core.outbox)
    assert settle(core, "u") == ""
    assert core.adapters.slots.get(digest) is None


def test_an_adapter_loaded_again_while_draining_serves_on(core: Engine, make_artifact: ArtifactMaker) -> None:
    digest = make_artifact(1)
    load(core, digest)
    core.submit(b"c", Generate(id="running", prompt=[5, 6, 7], adapter=digest, sampling=GREEDY))
    core.step()
    core.unload_adapter(b"c", UnloadAdapter(id="u", digest=digest))
    assert load(core, digest) == ""
    assert "loaded again" in settle(core, "u")
    assert run(core, "next", digest).finished.reason == "length"
    assert core.adapters.slots.ready(digest)


def test_the_least_recently_used_idle_adapter_makes_room(core: Engine, make_artifact: ArtifactMaker) -> None:
    first, second, third = (make_artifact(seed) for seed in (1, 2, 3))
    load(core, first)
    load(core, second)
    run(core, "touch", first)
    assert load(core, third) == ""
    ready = [digest for digest in (first, second, third) if core.adapters.slots.ready(digest)]
    assert ready == [first, third]


def test_a_newcomer_waits_for_a_slot_and_then_gets_it(core: Engine, make_artifact: ArtifactMaker) -> None:
    busy = [make_artifact(seed) for seed in (1, 2, 3)]
    for index, digest in enumerate(busy):
        load(core, digest)
        long = Sampling(temperature=0.0, seed=0, max_tokens=60)
        core.submit(b"c", Generate(id=f"r{index}", prompt=[5], adapter=digest, sampling=long))
    newcomer = make_artifact(4)
    core.load_adapter(b"c", LoadAdapter(id="n", digest=newcomer, path=newcomer))
    assert settle(core, "n") == ""
    while core.step():
        continue
    assert sorted(done.finished.reason for done in collect(core).values()) == ["length"] * 3
    assert core.adapters.slots.ready(newcomer)


def corrupt(directory: Path, how: str) -> None:
    """Damage the weights of an artefact draft in one way."""
    weights = directory / "adapter_model.safetensors"
    raw, tensors = weights.read_bytes(), load_file(weights)
    name = next(key for key in tensors if "lora_A" in key)
    if how == "truncated":
        weights.write_bytes(raw[: len(raw) // 2])
    elif how == "pickle":
        weights.write_bytes(pickle.dumps({"weights": [1, 2, 3]}))
    elif how == "huge header":
        weights.write_bytes(struct.pack("<Q", 1 << 40) + raw[8:])
    elif how == "overlapping header":
        weights.write_bytes(struct.pack("<Q", 2) + b"[]" + raw[8:])
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "list for a dtype":
        (length,) = struct.unpack("<Q", raw[:8])
        entries = json.loads(raw[8 : 8 + length])
        entries[name]["dtype"] = []
        changed = json.dumps(entries).encode()
        weights.write_bytes(struct.pack("<Q", len(changed)) + changed + raw[8 + length :])
    else:
        save_file(damaged(tensors, name, how), weights)


def damaged(tensors: dict[str, torch.Tensor], name: str, how: str) -> dict[str, torch.Tensor]:
    if how == "nan":
        tensors[name][0, 0] = float("nan")
    elif how == "infinity":
        tensors[name][0, 0] = float("inf")
    elif how == "shape":
        tensors[name] = torch.zeros(4, 3)
    elif how == "dtype":
        tensors[name] = tensors[name].to(torch.int32)
    elif how == "lonely":
        del tensors[name]
    elif how == "foreign":
        tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(2, 2)
    elif how == "layer":
        tensors[name.replace("layers.0", "layers.7").replace("layers.1", "layers.7")] = tensors.pop(name)
    return tensors


BROKEN = {
    "truncated": "not a valid safetensors",
    "pickle": "truncated or not a safetensors",
    "huge header": "truncated or not a safetensors",
    "overlapping header": "not a JSON object",
    "empty": "truncated",
    "list for a dtype": "has dtype []",
    "nan": "NaN",
    "infinity": "NaN or infinity",
    "shape": "has shape",
    "dtype": "has dtype",
    "lonely": "only one of its two",
    "foreign": "no place in this base",
    "layer": "no place in this base",
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_weights_are_refused_and_the_old_adapter_serves_on(
    how: str, core: Engine, make_artifact: ArtifactMaker, artifacts: Path
) -> None:
    good = make_artifact(1)
    load(core, good)
    before = core.adapters.table()
    draft = artifacts / "draft"
    shutil.copytree(artifacts / good, draft)
    corrupt(draft, how)
    broken = seal(artifacts, draft, core.base)
    assert BROKEN[how] in load(core, broken)
    assert core.adapters.table() == before
    assert run(core, "after", good).finished.reason == "length"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"peft_type": "IA3"}, "supported: LORA"),
        ({"use_dora": True}, "use_dora: DoRA rescales the base's own weights"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "LoRA on mixture-of-experts weights is not served"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"modules_to_save": ["score"]}, "this base has no head"),
        ({"rank_pattern": {"q_proj": 2}}, "has shape"),
        ({"rank_pattern": {"q_proj": 9}}, "rank 9 is above the 8"),
        ({"rank_pattern": {"(a+)+": 2}}, "simple patterns"),
        ({"rank_pattern": {"[": 2}}, "simple patterns"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must map"),
        ({"rank_pattern": {f".*.*.*{place}": 2 for place in range(11)}}, "too many patterns with"),
        ({"alpha_pattern": {"q_proj": "x"}}, "lora_alpha 'x'"),
        ({"init_lora_weights": "pissa"}, "changes the base weights"),
        ({"something_new": 1}, "something_new"),
        ({"r": 99}, "rank 99 is above the 8 this engine was started with: see --adapter-rank"),
        ({"r": True}, "rank True"),
        ({"lora_alpha": "a lot"}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"r": 3}, "has shape"),
    ],
)
def test_configurations_we_do_not_compute_are_refused_by_name(
    change: dict[str, object], complaint: str, core: Engine, make_artifact: ArtifactMaker, artifacts: Path
) -> None:
    draft = artifacts / "draft"
    (artifacts / make_artifact(1)).rename(draft)
    config = json.loads((draft / "adapter_config.json").read_text())
    (draft / "adapter_config.json").write_text(json.dumps(config | change))
    assert complaint in load(core, seal(artifacts, draft, core.base))


def test_half_a_surrogate_pair_in_an_artefact_does_not_reach_the_answer(
    core: Engine, make_artifact: ArtifactMaker, artifacts: Path
) -> None:
    draft = artifacts / "draft"
    (artifacts / make_artifact(1)).rename(draft)
    config = json.loads((draft / "adapter_config.json").read_text())
    (draft / "adapter_config.json").write_text(json.dumps(config | {"\ud800x": 1}))
    error = load(core, seal(artifacts, draft, core.base))
    assert "uses ?x" in error
    assert encode(Done(epoch=1, id="l", error=error))


def test_hundreds_of_named_modules_are_looked_up_in_no_time() -> None:
    names = {f"model.layers.{place}.self_attn.q_proj": 2 for place in range(1000)}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": names, "alpha_pattern": names}
    recipe = read_recipe(config, 8, classifier=False)
    began = time.process_time()
    for layer in range(40):
        assert recipe.rank_of(f"model.layers.{layer}.self_attn.q_proj") == 2
        assert recipe.scaling_of(f"model.layers.{layer}.mlp.up_proj") == 2.0
    assert time.process_time() - began < 2


def test_a_pattern_for_each_of_many_layers_is_taken() -> None:
    patterns = {rf".*layers\.{layer}\..*": layer % 8 + 1 for layer in range(200)}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": patterns}
    recipe = read_recipe(config, 8, classifier=False)
    assert [recipe.rank_of(f"model.layers.{layer}.mlp.up_proj") for layer in (2, 19, 199, 200)] == [3, 4, 8, 4]


def test_the_manifest_that_was_hashed_is_the_one_that_counts(
    core: Engine, make_artifact: ArtifactMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_and_replace(path: Path, limit: int) -> bytes:
        raw = read(path, limit)
        path.write_bytes(b"{}")
        return raw

    digest = make_artifact(1)
    monkeypatch.setattr(loading, "read", read_and_replace)
    assert load(core, digest) == ""


def test_an_adapter_of_another_base_is_refused(core: Engine, model_dir: Path, artifacts: Path) -> None:
    foreign = write_artifact(artifacts, "0" * 64, peft_model(model_dir, 1, 4, ["q_proj"]))
    assert "another base" in load(core, foreign)


def test_files_changed_after_sealing_are_refused(core: Engine, make_artifact: ArtifactMaker, artifacts: Path) -> None:
    digest = make_artifact(1)
    weights = artifacts / digest / "adapter_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert "does not match the digest" in load(core, digest)


def test_a_manifest_that_is_not_the_asked_one_is_refused(core: Engine, make_artifact: ArtifactMaker) -> None:
    digest = make_artifact(1)
    assert "was changed" in load(core, "f" * 64, digest)


@pytest.mark.parametrize(
    "path", ["../outside", "a/../../outside", "/etc", "", ".", "missing", "linked", "a\0b", "x" * 300]
)
def test_paths_outside_the_artifact_root_are_refused(
    path: str, core: Engine, make_artifact: ArtifactMaker, artifacts: Path
) -> None:
    digest = make_artifact(1)
    shutil.copytree(artifacts / digest, artifacts.parent / "outside")
    (artifacts / "linked").symlink_to(artifacts.parent / "outside")
    core.load_adapter(b"c", LoadAdapter(id="l", digest=digest, path=path))
    assert "artefact" in settle(core, "l")
    assert not core.adapters.slots.ready(digest)


def test_a_symlinked_file_inside_an_artifact_is_refused(
    core: Engine, make_artifact: ArtifactMaker, artifacts: Path
) -> None:
    digest = make_artifact(1)
    weights = artifacts / digest / "adapter_model.safetensors"
    elsewhere = weights.rename(artifacts / "elsewhere")
    weights.symlink_to(elsewhere)
    assert "cannot be read" in load(core, digest)


def test_local_engine_refuses_a_directory_without_a_manifest(engine: LocalEngine, tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused, match=r"manifest\.json"):
        engine.load_adapter(tmp_path)


def test_base_digest_follows_the_content(model_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_dir, copy)
    assert base_digest(copy) == base_digest(model_dir)
    config = copy / "config.json"
    config.write_text(config.read_text() + " ")
    assert base_digest(copy) != base_digest(model_dir)
    assert len(base_digest(copy)) == len(hashlib.sha256().hexdigest())
