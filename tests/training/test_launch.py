"""Several GPUs, four-bit weights, older examples, validation groups: what decides how and on what a trainer works."""

import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest
from sqlalchemy import select

from services.store import datasets, examples, replay, revisions, runs
from services.store.jobs import JobFailed
from services.store.models import Artifact, Example, Run
from services.store.run_params import ADAPTER_KINDS, SftParams
from tests.curation.world import World
from tests.training.kinds import corrected, make_spec, rows_of
from worker.curation.build import build_revision
from worker.training import checkpoints, child, launch, loading, trainers
from worker.training.parting import draw, parted
from worker.training.process import Refused
from worker.training.rows import AnyRow, usable
from worker.training.spec import Progress, Spec, decode_report, encode

# --- several devices --------------------------------------------------------------------------------------


@pytest.fixture
def four(tiny_model: Path, tmp_path: Path) -> Spec:
    return msgspec.structs.replace(make_spec("sft", tiny_model, tmp_path, devices=4), device="cuda")


def test_four_gpus_are_launched_by_accelerate_on_this_machine_alone(four: Spec, tmp_path: Path) -> None:
    file = tmp_path / "spec.json"
    made = launch.command(four, file, 29_123)

    assert made[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert made[-4:] == ["--module", "worker.training.lora", "--spec", str(file)]
    told = dict(zip(made[4:-4:2], made[5:-4:2], strict=True))
    assert made[3] == "--multi_gpu"
    assert told == {
        "--num_processes": "4", "--num_machines": "1", "--machine_rank": "0", "--main_process_ip": "127.0.0.1",
        "--main_process_port": "29123", "--mixed_precision": "no", "--dynamo_backend": "no",
        "--num_cpu_threads_per_process": "1",
    }  # fmt: skip


def test_accelerate_understands_the_command(four: Spec, tmp_path: Path) -> None:
    from accelerate.commands.launch import launch_command_parser

    told = launch_command_parser().parse_args(launch.command(four, tmp_path / "spec.json", 29_123)[3:])

    assert (told.multi_gpu, told.num_processes, told.module) == (True, 4, True)
    assert told.training_script == "worker.training.lora"
    assert told.training_script_args == ["--spec", str(tmp_path / "spec.json")]


def test_only_the_worker_s_child_turns_into_the_launcher(four: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert launch.is_wanted(four)
    assert not launch.is_wanted(msgspec.structs.replace(four, devices=1))
    monkeypatch.setenv("RANK", "2")
    assert not launch.is_wanted(four)


def test_without_enough_gpus_the_worker_hears_why(tiny_model: Path, tmp_path: Path) -> None:
    spec = make_spec("sft", tiny_model, tmp_path, devices=2)
    with pytest.raises(child.TrainerRefused, match="devices=2 needs as many GPUs; torch sees 0 here"):
        child.run(spec, tmp_path, on_report=lambda _: None, stop=lambda: False)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_launcher_that_ends_is_worth_another_attempt(
    devices: int, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own status hides whether a rank was killed. A trainer's own failure would only be repeated."""
    monkeypatch.setattr(child, "LORA", "json.tool")  # which knows no --spec
    spec = make_spec("sft", tiny_model, tmp_path, devices=devices)
    with pytest.raises(child.TrainerDied, match="status 2") as died:
        child.run(spec, tmp_path, on_report=lambda _: None, stop=lambda: False)
    assert died.value.killed == (devices > 1)


def test_two_ranks_train_one_adapter_and_only_the_first_reports(tiny_model: Path, tmp_path: Path) -> None:
    """The ranks as accelerate would start them, by torch's own launcher: accelerate's wants GPUs."""
    spec = make_spec("dpo", tiny_model, tmp_path, devices=2, checkpoint_steps=5, max_steps=6)
    (tmp_path / "spec.json").write_bytes(encode(spec))
    ranks = ["--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", str(launch._free_port())]
    made = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *ranks, "--module", launch.MODULE, "--spec", "spec.json"],
        env=child._environment() | {"ACCELERATE_USE_CPU": "true"}, cwd=tmp_path, capture_output=True, timeout=300,
        check=False,
    )  # fmt: skip

    assert made.returncode == 0, made.stderr[-2000:]
    reports = [decode_report.decode(line) for line in made.stdout.splitlines()]
    steps = [report.step for report in reports if isinstance(report, Progress)]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert checkpoints.newest(tmp_path / checkpoints.TRAINER, "") is not None


def test_only_the_first_rank_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []

    def train(report: Any) -> None:  # noqa: ANN401
        report("said")

    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        launch.only_first(train)(heard.append)  # type: ignore[arg-type]
    assert heard == ["said"]


def test_each_device_takes_a_batch_of_its_own(four: Spec) -> None:
    alone = msgspec.structs.replace(four, devices=1)
    assert trainers.planned_steps(160, alone) == 4 * trainers.planned_steps(160, four)


# --- four bits --------------------------------------------------------------------------------------------


def test_four_bits_without_bitsandbytes_are_refused_in_words(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(Refused, match="quantize=nf4 needs bitsandbytes, which this worker lacks"):
        loading.require_quantizer("nf4")
    loading.require_quantizer("none")
    with pytest.raises(Refused, match="quantize=nf4 needs a GPU"):
        loading.on_cuda(make_spec("sft", tiny_model, tmp_path, quantize="nf4"))


def test_four_bits_load_the_base_as_nf4(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def take(_model: str, **options: object) -> str:
        asked.update(options)
        return "the model"

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", take)
    loading.load(make_spec("sft", tiny_model, tmp_path, quantize="nf4"), 100, on_gpu=False)

    told = asked["quantization_config"].to_dict()
    assert (told["load_in_4bit"], told["bnb_4bit_quant_type"], told["bnb_4bit_use_double_quant"]) == (True, "nf4", True)
    asked.clear()
    loading.load(make_spec("sft", tiny_model, tmp_path), 100, on_gpu=False)
    assert "quantization_config" not in asked


# --- validation groups ------------------------------------------------------------------------------------


def split(rows: list[AnyRow], **params: object) -> tuple[set[str], set[str]]:
    groups = {str(one.id): one.group_key for one in corrected(200)}
    made = parted(rows, groups, SftParams.model_validate(params))
    return ({groups[row.example_id] for row in made.trained}, {groups[row.example_id] for row in made.held_back})


def test_whole_groups_are_held_back_and_stay_there_when_more_come(tiny_model: Path) -> None:
    rows = rows_of("kto", tiny_model, 200)
    trained, held_back = split(rows, validation=0.2)

    assert trained.isdisjoint(held_back)
    assert 20 <= len(held_back) <= 60
    earlier = split(rows[:300], validation=0.2)[1]
    assert earlier == {group for group in held_back if int(group[1:]) < 150}


def test_few_groups_are_all_trained_on_and_a_sweep_holds_back_a_fifth(tiny_model: Path) -> None:
    rows = rows_of("sft", tiny_model, 200)
    assert split(rows[:40])[1] == set()
    assert split(rows, validation=0)[1] == set()
    assert len(split(rows, validation=0, sweep=4)[1]) >= 20


# --- replay -----------------------------------------------------------------------------------------------


def revised(world: World, words: str, count: int, dataset: str = "golden", *, split: str = "train") -> UUID:
    """A revision of `dataset` with so many corrections that no other holds."""
    drafts = [
        examples.Draft(
            kind="preference", source="corrected", split=split, slice="target", group_key=f"{words} {number}",
            messages=[{"role": "user", "content": f"{words} {number}"}], completion="right", rejected="wrong",
            interaction_id=None, annotation_ids=(), reviewers=(),
        )
        for number in range(count)
    ]  # fmt: skip
    with world.sessions.begin() as session:
        target = datasets.get_or_create(session, world.project_id, dataset)
        return revisions.create(session, target, examples.add_examples(session, world.project_id, drafts), {}).id


def run_on(world: World, revision: UUID, **params: object) -> UUID:
    with world.sessions.begin() as session:
        found = revisions.get(session, revision)
        return runs.start(session, world.project(session), params=params, created_by="ada", revision=found).id


def drawn(world: World, run_id: UUID, own: int, **params: object) -> tuple[list[Example], dict[str, Any]]:
    with world.sessions.begin() as session:
        made = draw(session, session.get_one(Run, run_id), SftParams.model_validate(params), own)
    return made.examples, made.told


def test_what_the_revision_before_taught_is_replayed_to_its_share(world: World) -> None:
    revised(world, "old", 50)
    run_id = run_on(world, revised(world, "new", 40))

    examples, told = drawn(world, run_id, 40, replay=0.2)

    assert len(examples) == told["drawn"] == told["wanted"] == 10
    assert told["share"] == 0.2
    assert all(one.messages[0]["content"].startswith("old") for one in examples)
    with world.sessions() as session:
        assert {one.id for one in replay.kept(session, run_id)} == {one.id for one in examples}


def test_every_attempt_replays_the_same_rows_in_the_same_order_or_none_again(world: World) -> None:
    revised(world, "old", 50)
    run_id = run_on(world, revised(world, "new", 40))
    first, told = drawn(world, run_id, 40, replay=0.2)
    with world.sessions.begin() as session:
        session.get_one(Run, run_id).preflight = {"replay": told}
    revised(world, "older", 50)

    assert [one.id for one in drawn(world, run_id, 40, replay=0.2)[0]] == [one.id for one in first]
    with world.sessions.begin() as session:
        replay.keep(session, run_id, [])
    assert drawn(world, run_id, 40, replay=0.2)[0] == []


def test_the_trainer_tells_the_time_as_its_worker_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates print the local day."""
    monkeypatch.setenv("TZ", "America/New_York")
    assert child._environment()["TZ"] == "America/New_York"


def test_each_rank_loads_onto_its_own_gpu(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    loading.load(make_spec("sft", tiny_model, tmp_path), 64, on_gpu=True)
    assert chosen == [3]


def test_what_adapters_that_served_had_learned_is_replayed(world: World) -> None:
    first = revised(world, "first", 20, "other")
    served = run_on(world, first)
    with world.sessions.begin() as session:
        session.add(
            Artifact(
                digest="a" * 64, kind="adapter", project_id=world.project_id, base_digest="b", manifest={}, state="live"
            )
        )
        session.flush()
        run = session.get_one(Run, served)
        run.artifact_digest, run.state = "a" * 64, "succeeded"
    run_id = run_on(world, revised(world, "new", 20))

    examples, _ = drawn(world, run_id, 20, replay=0.5)

    assert len(examples) == 20
    assert all(one.messages[0]["content"].startswith("first") for one in examples)


def test_a_named_data_set_is_replayed_and_a_missing_one_is_said(world: World) -> None:
    revised(world, "kept", 10, "keep")
    revision = revised(world, "new", 30)
    run_id = run_on(world, revision)

    examples, told = drawn(world, run_id, 30, replay=0.1, replay_from="keep")

    assert len(examples) == 4
    assert told["from"] == "keep"
    with world.sessions.begin() as session:
        run = session.get_one(Run, run_id)
        replay.keep(session, run_id, [])
        with pytest.raises(JobFailed, match="replay_from: no dataset 'lost'"):
            draw(session, run, SftParams(replay_from="lost"), 30)


def test_nothing_of_a_held_out_group_and_nothing_erased_is_replayed(world: World) -> None:
    revised(world, "same", 6)
    run_id = run_on(world, revised(world, "same", 6, "blind", split="held_out"))
    assert drawn(world, run_id, 40, replay=0.2, replay_from="golden")[0] == []

    revised(world, "gone", 6, "gone")
    with world.sessions.begin() as session:
        for one in session.query(Example).filter(Example.group_key.like("gone%")):
            one.content_hash = f"{examples.ERASED}{one.content_hash}"
    assert drawn(world, run_id, 40, replay=0.2, replay_from="gone")[0] == []


@pytest.mark.parametrize("kind", ADAPTER_KINDS)
def test_what_says_nothing_to_the_kind_takes_no_room_in_the_share(world: World, kind: str) -> None:
    """The same choice as the trainer's rows make."""
    revision = revised(world, "old", 40)
    with world.sessions.begin() as session:
        for place, one in enumerate(session.scalars(select(Example).order_by(Example.content_hash))):
            one.source = ("corrected", "preferred", "imported", "rejected")[place % 4]
            one.kind = ("preference", "completion")[place // 4 % 2]
            one.completion = one.completion if place // 8 % 5 else None
            one.rejected = one.rejected if place // 8 % 5 != 1 else None
    run_id = run_on(world, revised(world, "new", 40))

    with world.sessions.begin() as session:
        run = session.get_one(Run, run_id)
        run.kind = kind
        older = [member.example for member in revisions.members(session, revision, "train")]
        wanted = {one.id for one in older if usable(kind, one)}
        assert 5 < len(wanted) < 40
        assert {one.id for one in replay.pool(session, run, "", limit=len(wanted))} == wanted


def test_a_first_run_has_nothing_to_replay(world: World) -> None:
    for index in range(4):
        world.corrected(f"say number {index}", "no", f"the answer is {index}")
    with world.sessions.begin() as session:
        revision = build_revision(session, world.project_id, "golden").id
    _, told = drawn(world, run_on(world, revision), 4)
    assert told == {"wanted": 1, "drawn": 0, "share": 0.0, "from": ""}
