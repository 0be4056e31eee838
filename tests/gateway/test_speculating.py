"""What drafts leave in the usage, the log and the metrics, whoever ends the answer."""

import contextlib
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy import update

from engine.messages import Draft, Tokens
from services.gateway.speculating import Speculating
from services.store import projects
from services.store.models import Artifact, Deployment, Project
from tests.gateway.parts import World, eventually

# The fake engine drafts where a prompt holds it.
DRAFTED = "\x06"
HEADS = "5bec" * 16
NO_BASELINE = {"speculation": {"baseline_share": 0.0, "control_share": 0.0}}


def tokens(count: int, *drafts: Draft, steps: int = 1, speculator: str = "") -> Tokens:
    return Tokens(
        epoch=1, id="r", token_ids=[7] * count, logprobs=[0.0] * count, steps=steps, drafts=list(drafts),
        speculator=speculator,
    )  # fmt: skip


# --- adding up ---------------------------------------------------------------------------------------------


def test_a_position_is_tried_when_all_before_it_were_accepted() -> None:
    speculating = Speculating()
    for accepted in (0, 2, 4):
        speculating.add(tokens(accepted + 1, Draft("suffix", 4, accepted)), accepted + 1)
    assert speculating.document() == {
        "steps": 3,
        "suffix": {"drafts": 3, "won": 3, "tried": [3, 2, 2, 1], "accepted": [2, 2, 1, 1], "lengths": [0, 0, 0, 0, 3]},
    }
    assert (speculating.drafted_tokens, speculating.accepted_tokens) == (12, 6)


def test_a_position_behind_the_answers_end_was_drafted_and_never_tried() -> None:
    speculating = Speculating()
    speculating.add(tokens(4, Draft("suffix", 8, 4, ended=True)), 4)
    counts = speculating.by_drafter["suffix"]
    assert (counts.tried, counts.accepted) == ([1, 1, 1, 1], [1, 1, 1, 1])
    assert (speculating.drafted_tokens, speculating.accepted_tokens) == (8, 4)


def test_a_twin_counts_as_drafted_and_never_as_accepted() -> None:
    speculating = Speculating()
    speculating.add(tokens(3, Draft("suffix", 3, 2), Draft("heads", 4, 1, won=False), speculator="aa"), 3)
    document = speculating.document()
    assert document is not None
    assert (document["suffix"]["won"], document["heads"]["won"]) == (1, 0)
    assert document["heads"]["tried"] == [1, 1]
    assert document["heads"]["accepted"] == [1, 0]
    assert (speculating.drafted_tokens, speculating.accepted_tokens) == (7, 2)
    assert speculating.speculator == "aa"


def test_nothing_drafted_leaves_nothing() -> None:
    speculating = Speculating()
    speculating.add(tokens(5, steps=5), 5)
    assert speculating.document() is None
    assert (speculating.steps, speculating.speculator) == (5, None)


@pytest.mark.parametrize(("used", "accepted"), [(0, 0), (1, 1), (3, 3), (4, 4), (5, 4)])
def test_what_lies_behind_a_cut_was_drafted_and_not_accepted(used: int, accepted: int) -> None:
    speculating = Speculating()
    speculating.add(tokens(5, Draft("heads", 6, 4)), used)
    assert (speculating.drafted_tokens, speculating.accepted_tokens) == (6, accepted)
    # What the drafter was worth does not depend on where the answer was cut.
    assert speculating.by_drafter["heads"].accepted == [1, 1, 1, 1, 0]


def test_steps_that_came_together_keep_their_own_tokens() -> None:
    speculating = Speculating()
    speculating.add(tokens(8, Draft("suffix", 3, 2), Draft("heads", 4, 3), steps=3), 8)
    assert (speculating.steps, speculating.accepted_tokens) == (3, 5)


# --- through the gateway -----------------------------------------------------------------------------------


def say(text: str) -> str:
    return f"{DRAFTED}\x01{text}\x02"


def chat(text: str, **fields: object) -> dict[str, Any]:
    return {"model": "entities", "messages": [{"role": "user", "content": say(text)}], **fields}


def details(usage: dict[str, Any]) -> tuple[int, int]:
    found = usage["completion_tokens_details"]
    return found["accepted_prediction_tokens"], found["rejected_prediction_tokens"]


@pytest.fixture(scope="module")
def drafting(world: World) -> Iterator[World]:
    """Every request of `entities` may be drafted for."""
    with configured(world, NO_BASELINE):
        yield world


@contextlib.contextmanager
def configured(world: World, config: dict[str, Any]) -> Iterator[None]:
    project_id = world.projects["entities"]
    with world.sessions.begin() as session:
        project = session.get_one(Project, project_id)
        before = project.config
        projects.configure(session, project, config)
    settle(world)
    yield
    with world.sessions.begin() as session:
        session.execute(update(Project).where(Project.id == project_id).values(config=before))
    settle(world)


def settle(world: World) -> None:
    """Wait until the gateway has heard of what was committed just now."""
    with world.sessions.begin() as session:
        changed = session.execute(
            update(Deployment)
            .where(Deployment.project_id == world.projects["entities"])
            .values(generation=Deployment.generation + 1)
            .returning(Deployment.generation)
        ).scalar_one()
    eventually(lambda: world.get("/v1/models/entities").json()["whet"]["generation"] == changed)


def test_usage_and_log_tell_what_was_drafted(drafting: World) -> None:
    answer = drafting.post("/v1/chat/completions", chat("abcdefg")).json()
    # One token of the first step, then three a step; the last ends with the answer's end.
    assert details(answer["usage"]) == (5, 4)
    row = drafting.interaction(answer["id"]).interaction
    assert (row.drafted_tokens, row.accepted_tokens, row.speculated, row.speculator_digest) == (9, 5, True, None)
    assert row.speculation == {
        "steps": 4,
        "suffix": {"drafts": 3, "won": 3, "tried": [3, 3, 3], "accepted": [3, 3, 0], "lengths": [0, 0, 0, 3]},
    }


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_streams_last_chunk_says_what_the_whole_answer_does(drafting: World, path: str) -> None:
    body = chat("abcdefg") if "chat" in path else {"model": "entities", "prompt": say("abcdefg")}
    whole = drafting.post(path, body).json()["usage"]
    streamed = drafting.post(path, body | {"stream": True, "stream_options": {"include_usage": True}}).text
    assert f'"completion_tokens_details":{{"accepted_prediction_tokens":{details(whole)[0]},' in streamed
    assert sum(details(whole)) == 9


def test_an_answer_the_gateway_ends_counts_what_stands_in_it(drafting: World) -> None:
    answer = drafting.post("/v1/chat/completions", chat("abcdefg", stop="cd")).json()
    assert answer["usage"]["completion_tokens"] == 4
    row = drafting.interaction(answer["id"]).interaction
    assert row.accepted_tokens == details(answer["usage"])[0] <= 3
    assert row.drafted_tokens >= 3
    assert row.speculation is not None
    assert row.speculation["suffix"]["accepted"][0] == row.speculation["suffix"]["drafts"]


def test_a_client_that_leaves_has_its_drafts_logged(drafting: World) -> None:
    body = {"model": "entities", "prompt": DRAFTED, "max_tokens": 480, "stream": True}
    with httpx.stream("POST", f"{drafting.url}/v1/completions", json=body, headers=drafting.headers()) as response:
        interaction_id = response.headers["x-whet-interaction-id"]
        lines = response.iter_lines()
        for _ in range(8):
            next(lines)
    row = drafting.interaction(interaction_id).interaction
    assert row.finish_reason == "cancelled"
    assert 0 < row.accepted_tokens < row.completion_tokens < 480
    assert row.speculation is not None
    assert row.accepted_tokens <= sum(row.speculation["suffix"]["accepted"]) < row.drafted_tokens


def test_the_log_names_the_heads_that_drafted_and_counts_their_twins(drafting: World) -> None:
    with drafting.sessions.begin() as session:
        session.add(
            Artifact(digest=HEADS, kind="speculator", project_id=drafting.projects["entities"], base_digest="b",
                     manifest={})
        )  # fmt: skip
        session.flush()
        session.execute(
            update(Deployment).where(Deployment.project_id == drafting.projects["entities"])
            .values(speculator_digest=HEADS)
        )  # fmt: skip
    settle(drafting)
    answer = drafting.post("/v1/chat/completions", chat("abcdefg")).json()
    row = drafting.interaction(answer["id"]).interaction
    assert details(answer["usage"]) == (5, 10)
    assert row.speculator_digest == HEADS
    assert row.speculation is not None
    assert row.speculation["heads"] == {
        "drafts": 3, "won": 0, "tried": [3, 3], "accepted": [3, 0], "lengths": [0, 0, 3],
    }  # fmt: skip
    plain = drafting.post("/v1/chat/completions", {**chat("x"), "messages": [{"role": "user", "content": "hello"}]})
    undrafted = drafting.interaction(plain.json()["id"]).interaction
    assert (undrafted.speculator_digest, undrafted.speculation, undrafted.speculated) == (None, None, True)
    with drafting.sessions.begin() as session:
        session.execute(
            update(Deployment).where(Deployment.project_id == drafting.projects["entities"])
            .values(speculator_digest=None)
        )  # fmt: skip
    settle(drafting)


def test_a_baseline_request_is_logged_as_one_and_drafts_nothing(world: World) -> None:
    with configured(world, {"speculation": {"enabled": False}}):
        answer = world.post("/v1/chat/completions", chat("abcdefg")).json()
    row = world.interaction(answer["id"]).interaction
    assert (row.speculated, row.speculation, row.drafted_tokens) == (False, None, 0)
    assert details(answer["usage"]) == (0, 0)


def test_metrics_count_drafts_by_drafter_and_position(drafting: World) -> None:
    def counted() -> dict[str, float]:
        lines = drafting.get("/metrics", key="admin").text.splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    before = counted()
    drafting.post("/v1/chat/completions", chat("abcdefg"))
    after = counted()
    labels = 'drafter="suffix",model_name="entities"'
    assert {
        name.partition("{")[0]: after[name] - before.get(name, 0.0)
        for name in (
            'whet:decode_steps_total{model_name="entities"}',
            f"vllm:spec_decode_num_drafts_total{{{labels}}}",
            f"vllm:spec_decode_num_draft_tokens_total{{{labels}}}",
            f"vllm:spec_decode_num_accepted_tokens_total{{{labels}}}",
            f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{labels},position="1"}}',
            f'whet:spec_decode_num_tried_tokens_per_pos_total{{{labels},position="2"}}',
        )
    } == {
        "whet:decode_steps_total": 4,
        "vllm:spec_decode_num_drafts_total": 3,
        "vllm:spec_decode_num_draft_tokens_total": 9,
        "vllm:spec_decode_num_accepted_tokens_total": 6,
        "vllm:spec_decode_num_accepted_tokens_per_pos_total": 3,
        "whet:spec_decode_num_tried_tokens_per_pos_total": 3,
    }
    assert (after['whet:speculator_slots{state="loaded"}'], after['whet:speculator_slots{state="free"}']) == (1, 3)
    corpora = [after[f"whet:suffix_{name}"] for name in ("corpora", "corpus_tokens", "corpus_bytes")]
    assert corpora == [2, 320, 10_000]
