"""Drafted or not: every answer is token for token what it is without speculation, whoever drafts, whatever is asked."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from engine.core import Engine
from engine.digest import base_digest
from engine.messages import LoadAdapter, Pool
from tests.engine.conftest import peft_model, write_artifact
from tests.engine.constraining import VOCABULARY
from tests.engine.drafters import Oracle, at_most, pair
from tests.engine.lossless import (
    DRAWN,
    GREEDY,
    STOPS,
    Always,
    accepted,
    asks,
    check_equal,
    command,
    force,
    load,
    plain,
    run,
    started,
)
from tests.engine.speculators import bigram_speculator, random_speculator


@pytest.fixture(scope="module", params=["native", "torch"])
def core(
    request: pytest.FixtureRequest, talking_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """An engine with small steps, so that long prompts are read in chunks beside drafts."""
    native = request.param == "native"
    root = tmp_path_factory.mktemp("artifacts")
    with started(talking_model, root, step_tokens=128, native=native, pack=native, adapter_rank=4) as core:
        assert core.forward.kernels.startswith(request.param)
        yield core


@pytest.mark.parametrize("length", range(1, 17))
def test_every_length_of_draft_right_wrong_or_in_between_changes_nothing(core: Engine, length: int) -> None:
    requests = asks([GREEDY, *DRAWN], seed=length)
    slow = plain(core, requests)
    oracle = Oracle(slow, VOCABULARY, seed=length)
    for drafter in (oracle.right, oracle.wrong, oracle.partly):
        force(core, at_most(length, drafter))
        fast = run(core, requests)
        check_equal(fast, slow)
        drafts = [draft for answer in fast.values() for draft in answer.drafts]
        assert max(draft.drafted for draft in drafts) <= length
        if drafter == oracle.right:
            assert sum(draft.drafted == draft.accepted == length for draft in drafts) >= len(requests)
        if drafter == oracle.wrong:
            assert max(draft.drafted for draft in drafts) == length
            assert not accepted(fast)


@pytest.mark.parametrize("kind", ["nonsense", "runner_up", "meddling"])
def test_random_and_adversarial_drafters_change_nothing(core: Engine, kind: str) -> None:
    kinds = [one | {"top_logprobs": 2, "stop_token_ids": STOPS} for one in (GREEDY, *DRAWN)]
    requests = asks(kinds, copies=2, seed=7)
    slow = plain(core, requests)
    oracle = Oracle(slow, VOCABULARY)
    force(core, oracle.meddling(STOPS) if kind == "meddling" else getattr(oracle, kind))
    fast = run(core, requests)
    check_equal(fast, slow)
    greedy = {name: answer for name, answer in fast.items() if name.startswith("0")}
    assert not accepted(greedy) if kind == "runner_up" else fast


@pytest.mark.parametrize("lead", ["suffix", "heads"])
def test_two_drafts_of_a_row_are_lossless_and_either_may_win(core: Engine, lead: str) -> None:
    requests = asks([GREEDY, *DRAWN], copies=2, seed=3, tokens=60)
    slow = plain(core, requests)
    force(core, *pair(Oracle(slow, VOCABULARY)), policy=Always(lead=lead))
    fast = run(core, requests)
    check_equal(fast, slow)
    wins = [draft for answer in fast.values() for draft in answer.drafts if draft.won]
    losses = [draft for answer in fast.values() for draft in answer.drafts if not draft.won]
    assert len(losses) > 30
    for drafter in ("suffix", "heads"):
        assert sum(draft.drafter == drafter and draft.accepted > 0 for draft in wins) > 15
        assert any(draft.drafter == drafter and draft.accepted > 0 for draft in losses)


def test_what_follows_a_drafted_answer_reads_the_right_keys_and_values(core: Engine) -> None:
    """The next turn begins with blocks that drafts and branches have filled."""
    first = asks([GREEDY, *DRAWN], seed=5, tokens=70)
    slow = plain(core, first)
    force(core, *pair(Oracle(slow, VOCABULARY)))
    fast = run(core, [replace(request, cache_salt="turns") for request in first])
    check_equal(fast, slow)
    second = [
        replace(request, prompt=request.prompt + slow[request.id].tokens + [7, 8], cache_salt="turns")
        for request in first
    ]
    slow = plain(core, second)
    force(core, *pair(Oracle(slow, VOCABULARY)))
    again = run(core, second)
    check_equal(again, slow)
    assert all(answer.end is not None and answer.end.cached_tokens >= 64 for answer in again.values())


def test_suffix_drafts_are_lossless(core: Engine) -> None:
    """The second time the same is asked nearly all of it is drafted right, drawn with the same noise or not."""
    requests = asks([GREEDY, *DRAWN], copies=2, seed=9, namespace="n")
    slow = plain(core, requests)
    force(core)
    first, second = run(core, requests), run(core, requests)
    check_equal(first, slow)
    check_equal(second, slow)
    others = [replace(one, sampling=replace(one.sampling, seed=one.sampling.seed + 1)) for one in requests]
    check_equal(run(core, others), plain(core, others))
    assert accepted(second) > 0.6 * sum(len(answer.tokens) for answer in second.values())
    assert {draft.drafter for answer in second.values() for draft in answer.drafts} == {"suffix"}


@pytest.fixture(scope="module")
def adapters(core: Engine, talking_model: Path) -> list[str]:
    """Two adapters, loaded."""
    digests = []
    for seed in range(2):
        adapted = peft_model(talking_model, seed, 4, ["q_proj", "down_proj"])
        digests.append(write_artifact(core.config.artifacts, base_digest(talking_model), adapted))
        order = LoadAdapter(id=f"load {seed}", digest=digests[-1], path=digests[-1])
        assert not command(core, core.load_adapter, order).error
    return digests


def test_heads_suffix_adapters_and_long_prompts_in_one_batch_are_lossless(
    core: Engine, talking_model: Path, adapters: list[str]
) -> None:
    """Random heads, heads that know the text, heads of an adapter; rows without; prompts in chunks; vectors beside."""
    root = core.config.artifacts
    requests = asks([GREEDY, *DRAWN], copies=3, seed=11, namespace="n", speculator="base")
    slow = plain(core, requests)
    texts = [request.prompt + slow[request.id].tokens for request in requests]
    random_heads = random_speculator(root, talking_model, tokens=list(range(600)), conditioning="hydra", seed=1)
    knowing = bigram_speculator(root, talking_model, texts)
    adapted = random_speculator(root, talking_model, adapter=adapters[0], conditioning="none", recurrent=False, seed=2)
    for digest in (random_heads, knowing, adapted):
        assert load(core, digest).serving == digest
    rows = [(None, random_heads), (None, knowing), (None, "not loaded"), (adapters[0], adapted), (adapters[1], adapted)]
    mixed = [
        replace(request, adapter=rows[number % 5][0], speculator=rows[number % 5][1], speculate=number % 7 > 0)
        for number, request in enumerate(requests)
    ]
    dice = random.Random(1)
    long = [replace(mixed[at], id=f"long {at}", prompt=[dice.randrange(5, 900) for _ in range(300)]) for at in (3, 4)]
    slow = plain(core, mixed + long)
    for lead in ("heads", "suffix"):
        force(core, policy=Always(lead=lead))
        core.submit_pool(b"pool", Pool(id="vector", prompt=[9] * 200, adapter=adapters[1]))
        fast = run(core, mixed + long)
        check_equal(fast, slow)
        speculators = {digest for answer in fast.values() for digest in answer.speculators}
        assert speculators == ({random_heads, knowing, adapted} if lead == "heads" else speculators)
        assert not any(fast[one.id].drafts for one in mixed if not one.speculate)
    helped = [fast[one.id] for one in mixed if one.speculator == knowing and one.speculate]
    assert accepted({str(number): answer for number, answer in enumerate(helped)}) > 20
    assert not any(fast[one.id].speculators for one in mixed if one.adapter == adapters[1])
