"""Heads and adapters come, go and take each other's place between any two steps of requests that draft with them."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from engine.core import Engine
from engine.digest import base_digest
from engine.messages import Done, Generate, LoadAdapter, LoadSpeculator, UnloadAdapter, UnloadSpeculator
from engine.speculation.loading import HEADS, LARGEST
from tests.engine.conftest import peft_model, write_artifact
from tests.engine.lossless import (
    CLIENT,
    DRAWN,
    GREEDY,
    Always,
    Answer,
    asks,
    check_equal,
    command,
    force,
    load,
    plain,
    read,
    run,
    started,
)
from tests.engine.speculators import bigram_speculator, manifest_of, random_heads, random_speculator, write_speculator

# More heads than slots: a load may take the place of others without a word.
SLOTS = 2


class Stage(NamedTuple):
    """An engine, what may be loaded into it, and requests with their answers."""

    core: Engine
    adapters: list[str]
    heads: list[str]
    requests: list[Generate]
    slow: dict[str, Answer]


@pytest.fixture(scope="module", params=[True, False], ids=["native", "torch"])
def stage(
    request: pytest.FixtureRequest, talking_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    """Two adapters, the second with room for a third; five heads, of which two know the base's answers."""
    root, native = tmp_path_factory.mktemp("artifacts"), bool(request.param)
    options = {"speculator_slots": SLOTS, "adapter_slots": 3, "adapter_rank": 4, "step_tokens": 128}
    with started(talking_model, root, native=native, pack=native, **options) as core:
        adapters = []
        for seed in range(3):
            adapted = peft_model(talking_model, seed, 4, ["q_proj", "down_proj"])
            adapters.append(write_artifact(root, base_digest(talking_model), adapted))
        for digest in adapters[:2]:
            assert not command(core, core.load_adapter, LoadAdapter(id="a", digest=digest, path=digest)).error
        requests = [
            replace(one, adapter=[None, None, *adapters[:2]][number % 4])
            for number, one in enumerate(asks([GREEDY, *DRAWN], copies=2, seed=71, tokens=40))
        ]
        slow = plain(core, requests)
        texts = [one.prompt + slow[one.id].tokens for one in requests if one.adapter is None]
        heads = [
            bigram_speculator(root, talking_model, texts),
            bigram_speculator(root, talking_model, texts, run="again"),
            random_speculator(root, talking_model, seed=3),
            random_speculator(root, talking_model, adapter=adapters[0], seed=4),
            random_speculator(root, talking_model, adapter=adapters[0], heads=2, recurrent=False, seed=5),
        ]
        yield Stage(core, adapters, heads, requests, slow)


moments = st.integers(0, 40)
choices = st.integers(0, 4)
loads = st.tuples(st.just("load"), choices, st.none() | choices)
others = st.tuples(st.sampled_from(["unload", "adapt", "leave"]), choices, st.none())
scripts = st.lists(st.tuples(moments, loads | others), max_size=12)
names = st.lists(st.none() | choices, min_size=12, max_size=12)


@given(script=scripts, names=names, lead=st.sampled_from(["suffix", "heads"]))
@settings(max_examples=25, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_no_swap_changes_a_token(
    stage: Stage, script: list[tuple[int, tuple[str, int, int | None]]], names: list[int | None], lead: str
) -> None:
    core = stage.core
    force(core, policy=Always(lead=lead))
    requests = [
        replace(one, speculator=None if name is None else stage.heads[name])
        for one, name in zip(stage.requests, names, strict=True)
    ]

    def between(step: int) -> None:
        for number, (moment, order) in enumerate(script):
            if moment == step:
                obey(stage, f"{step} {number}", *order)

    fast = run(core, requests, between)
    check_equal(fast, stage.slow)
    known = {**dict.fromkeys(stage.heads[:3]), **dict.fromkeys(stage.heads[3:], stage.adapters[0])}
    for one in requests:
        assert all(known[digest] == one.adapter for digest in fast[one.id].speculators)
        assert not fast[one.id].speculators if one.speculator is None else True
    slots = core.status("s").speculators
    assert len({slot.index for slot in slots}) == len(slots) <= SLOTS


def obey(stage: Stage, name: str, what: str, which: int, replaced: int | None) -> None:
    """Give the engine an order; answers are dropped with what else is in the outbox."""
    core, digest = stage.core, stage.heads[which]
    if what == "load":
        old = "" if replaced is None else stage.heads[replaced]
        core.load_speculator(CLIENT, LoadSpeculator(id=name, digest=digest, path=digest, replaces=old))
    elif what == "unload":
        core.unload_speculator(CLIENT, UnloadSpeculator(id=name, digest=digest))
    elif what == "adapt":
        adapter = stage.adapters[2]
        core.load_adapter(CLIENT, LoadAdapter(id=name, digest=adapter, path=adapter))
    else:
        core.unload_adapter(CLIENT, UnloadAdapter(id=name, digest=stage.adapters[2]))


def test_requests_follow_to_the_heads_that_replace_theirs(stage: Stage) -> None:
    """In the middle of the answer, and those that come later under the old name."""
    core, (first, second) = stage.core, stage.heads[:2]
    for digest in stage.heads:
        command(core, core.unload_speculator, UnloadSpeculator(id="u", digest=digest))
    assert load(core, first).serving == first
    force(core, policy=Always(lead="heads"))
    requests = [replace(one, speculator=first, adapter=None) for one in stage.requests]
    slow = plain(core, requests)

    def between(step: int) -> None:
        if step == 3:
            core.load_speculator(CLIENT, LoadSpeculator(id="r", digest=second, path=second, replaces=first))
            core.drafting.speculators._loads[second].future.exception()

    fast = run(core, requests, between)
    check_equal(fast, slow)
    assert set().union(*(answer.speculators for answer in fast.values())) == {first, second}
    later = run(core, requests)
    check_equal(later, slow)
    assert set().union(*(answer.speculators for answer in later.values())) == {second}
    assert sum(draft.accepted for answer in later.values() for draft in answer.drafts) > 30
    assert [slot.digest for slot in core.status("s").speculators] == [second]


def spoiled(stage: Stage, model: Path, how: str) -> tuple[str, str]:
    """An artefact that must not be served, and what the refusal says."""
    root, made = stage.core.config.artifacts, random_heads(64, list(range(40)), seed=len(how))
    if how == "other base":
        return write_speculator(root, manifest_of(model, made, base="0" * 64), made), "another base"
    if how == "other vocabulary":
        return write_speculator(root, manifest_of(model, made, vocabulary="0" * 64), made), "another tokenizer"
    if how == "not a number":
        made["weight"][0, 0, 0] = float("nan")
        return write_speculator(root, manifest_of(model, made), made), "NaN"
    if how == "foreign id":
        made["tokens"][-1] = 10**6
        return write_speculator(root, manifest_of(model, made), made), "outside this model's vocabulary"
    if how == "other kind":
        return write_speculator(root, manifest_of(model, made, kind="adapter"), made), "not a speculator"
    if how == "another size":
        other = random_heads(32, list(range(40)))
        return write_speculator(root, manifest_of(model, other), other), "hidden size"
    digest = write_speculator(root, manifest_of(model, made, run=how), made)
    file = root / digest / HEADS
    content = bytearray(file.read_bytes())
    if how == "flipped bit":
        content[-5] ^= 1
        file.write_bytes(content)
    elif how == "cut off":
        file.write_bytes(content[:-100])
    else:
        file.unlink()
    return digest, ""


SPOILED = (
    "other base", "other vocabulary", "not a number", "foreign id", "other kind", "another size", "flipped bit",
    "cut off", "no file",
)  # fmt: skip


@pytest.mark.parametrize("how", SPOILED)
def test_bad_heads_are_refused_while_serving_goes_on(stage: Stage, talking_model: Path, how: str) -> None:
    """In the place of those that draft: these go on drafting."""
    core, good = stage.core, stage.heads[0]
    load(core, good)
    digest, reason = spoiled(stage, talking_model, how)
    force(core, policy=Always(lead="heads"))
    requests = [replace(one, speculator=(good, digest)[number % 2]) for number, one in enumerate(stage.requests)]
    done: list[Done] = []

    def between(step: int) -> None:
        if step == 2:
            core.load_speculator(b"other", LoadSpeculator(id="bad", digest=digest, path=digest, replaces=good))

    fast = run(core, requests, between, done)
    check_equal(fast, stage.slow)
    for _ in range(5_000):
        if done:
            break
        core.step()
        done += read(core, {})
        time.sleep(0.001)
    assert done[0].error
    assert reason in done[0].error
    assert "/" not in done[0].error
    assert done[0].serving == good
    assert digest not in {slot.digest for slot in core.status("s").speculators}
    assert {digest for answer in fast.values() for digest in answer.speculators} == {good}


def test_heads_that_draft_nonsense_are_harmless(stage: Stage, talking_model: Path) -> None:
    """Numbers as large as may be, and the greatest confidence: whatever overflows, drafts are only drafts."""
    core = stage.core
    made = random_heads(64, list(range(5, 900)), heads=4)
    for name, tensor in made.items():
        if name != "tokens":
            made[name] = tensor / tensor.abs().max() * LARGEST
    made["confidence_bias"] = torch.full((4,), LARGEST)
    digest = write_speculator(core.config.artifacts, manifest_of(talking_model, made), made)
    assert load(core, digest).serving == digest
    force(core, policy=Always(lead="heads"))
    requests = [replace(one, speculator=digest, adapter=None) for one in stage.requests]
    slow = plain(core, requests)
    check_equal(run(core, requests), slow)
