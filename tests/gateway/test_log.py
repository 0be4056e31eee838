"""What an answer leaves in the log, whichever way it ended."""

import json
import time

import httpx

from services.store import interactions
from tests.gateway.parts import World, eventually

HELLO = [{"role": "user", "content": "hello"}]


def body(**fields: object) -> dict[str, object]:
    return {"model": "entities", "messages": HELLO, "max_tokens": 5, **fields}


def test_everything_later_diagnosis_needs_is_logged(world: World) -> None:
    extra = {"session": "s1", "tags": {"route": "a"}, "retrieved": [{"id": "doc-1", "text": "…"}]}
    response = world.post(
        "/v1/chat/completions", body(seed=5, top_p=0.9, stop="zz", user="mia", whet=extra, temperature=0.3)
    )
    assert response.headers["x-whet-adapter"] == "base"
    assert response.headers["x-whet-durability"] == "process"
    logged = world.interaction(response.headers["x-whet-interaction-id"])
    row, wide = logged.interaction, logged.body
    assert wide is not None
    assert response.json()["id"] == f"chatcmpl-{row.id}"
    assert (row.project_id, row.origin, row.arm, row.endpoint, row.stream) == (
        world.projects["entities"], "live", "active", "/v1/chat/completions", False,
    )  # fmt: skip
    assert (row.session_key, row.end_user, row.group_key, row.tags) == ("s1", "mia", "s1", {"route": "a"})
    assert (row.finish_reason, row.prompt_tokens, row.completion_tokens) == ("length", 8, 5)
    assert (row.mean_logprob, row.min_logprob) == (-0.25, -0.25)
    assert row.base_digest == "ba5e" * 16
    assert row.adapter_digest is None
    assert row.ttft_ms is not None
    assert row.latency_ms is not None
    assert 0 < row.ttft_ms <= row.latency_ms
    assert row.longest_gap_ms is not None
    assert row.finished_at is not None
    assert row.started_at < row.finished_at
    assert (wide.messages, wide.output) == (HELLO, "fghij")
    assert wide.token_ids == [10, 11, 12, 13, 14]
    assert wide.token_logprobs == [-0.25] * 5
    assert wide.retrieved == extra["retrieved"]
    wanted = {"temperature": 0.3, "top_p": 0.9, "top_k": 0, "seed": 5, "max_tokens": 5, "stop": ["zz"]}
    assert wide.parameters.items() >= wanted.items()
    assert len(wide.template_hash) == len(wide.tokenizer_hash) == len(wide.prompt_hash) == 64


def test_the_group_is_the_apps_word_else_session_else_user_else_the_prompt(world: World) -> None:
    def group(**fields: object) -> str:
        response = world.post("/v1/chat/completions", body(**fields))
        return world.interaction(response.json()["id"]).interaction.group_key

    whet = {"session": "s", "group": "g"}
    assert group(user="u", whet=whet) == "g"
    assert group(user="u", whet={"session": "s"}) == "s"
    assert group(user="u") == "u"
    assert group() == group(seed=1)
    assert group().startswith("prompt:")


def test_a_client_gone_mid_stream_cancels_in_the_engine_and_is_logged(world: World) -> None:
    long = body(max_tokens=480, stream=True)
    with httpx.stream("POST", f"{world.url}/v1/chat/completions", json=long, headers=world.headers()) as response:
        interaction_id = response.headers["x-whet-interaction-id"]
        lines = response.iter_lines()
        next(lines)
        assert running_in_engine(world) == 1
    eventually(lambda: running_in_engine(world) == 0, seconds=2)
    row = world.interaction(interaction_id).interaction
    assert row.finish_reason == "cancelled"
    assert 0 < row.completion_tokens < 480


def test_a_client_gone_before_a_whole_answer_cancels_too(world: World) -> None:
    marker = f"gone-{time.time_ns()}"
    request = httpx.Request(
        "POST", f"{world.url}/v1/chat/completions", json=body(max_tokens=480, user=marker), headers=world.headers()
    )
    with httpx.Client(timeout=httpx.Timeout(5, read=0.1)) as client:
        try:
            client.send(request)
        except httpx.ReadTimeout:
            pass
        else:
            raise AssertionError("the answer came before the client could leave")
    eventually(lambda: running_in_engine(world) == 0, seconds=2)
    eventually(lambda: finish_reasons(world, marker) == ["cancelled"])


def test_leaving_one_choice_of_several_leaves_none_running(world: World) -> None:
    several = body(max_tokens=480, stream=True, n=3)
    with httpx.stream("POST", f"{world.url}/v1/chat/completions", json=several, headers=world.headers()) as response:
        lines = response.iter_lines()
        next(lines)
        assert running_in_engine(world) == 3
    eventually(lambda: running_in_engine(world) == 0, seconds=2)
    eventually(lambda: world_is_quiet(world))


def running_in_engine(world: World) -> int:
    return int(metric(world, "vllm:num_requests_running"))


def world_is_quiet(world: World) -> bool:
    return metric(world, "whet:gateway_requests_running") == 0


def metric(world: World, name: str) -> float:
    lines = world.get("/metrics", key="admin").text.splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


def finish_reasons(world: World, end_user: str) -> list[str]:
    with world.sessions.begin() as session:
        only = interactions.Filter(end_user=end_user)
        rows = interactions.page(session, world.projects["entities"], only=only)
        return [row.interaction.finish_reason for row in rows]


def test_metrics_use_vllms_names_and_count(world: World) -> None:
    world.post("/v1/chat/completions", body())
    text = world.get("/metrics", key="admin").text
    for name in (
        "vllm:generation_tokens_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:num_requests_running",
    ):
        assert name in text
    assert 'vllm:request_success_total{finished_reason="length",model_name="entities"}' in text


def test_health_names_what_works(world: World) -> None:
    report = httpx.get(f"{world.url}/health").json()
    assert report["status"] == "ok"
    assert report["engine"]["connected"] is True
    assert report["database"]["connected"] is True
    assert json.dumps(report).find("entities") == -1
