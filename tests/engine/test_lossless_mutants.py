"""The proofs have teeth: each fault that speculation is known for is put in, and the same checks find it."""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

import engine.core
import engine.runner.runner
from engine.core import Engine
from engine.grammar.matcher import GrammarMatcher
from engine.layers.penalties import Counts
from engine.layers.sampler import Draw, Sampled
from engine.messages import Generate
from engine.runner.sampling import Place, Sampler, draw_at
from engine.scheduling.scheduler import Branch, Row, Scheduler
from engine.sequence import Sequence
from engine.speculation.drafting import Drafting
from engine.speculation.verify import Verified
from tests.engine.constraining import EOS, VOCABULARY, regex
from tests.engine.drafters import Oracle, pair
from tests.engine.lossless import DRAWN, GREEDY, Answer, asks, check_equal, force, plain, run, started

Patch = pytest.MonkeyPatch
real_draw = engine.runner.runner.draw
real_verify = engine.core.verify
real_marks, real_fill = Counts.marks, GrammarMatcher.fill
real_fork, real_keep = Scheduler.fork, Scheduler.keep
real_choose, real_accept = Drafting.choose, Sequence.accept


@pytest.fixture(scope="module")
def core(talking_model: Path) -> Iterator[Engine]:
    with started(talking_model, step_tokens=192) as core:
        yield core


@pytest.fixture(scope="module")
def battery(core: Engine) -> tuple[list[Generate], dict[str, Answer]]:
    """A little of everything, and what it answers without speculation."""
    # Cool ones too: only where draws often agree does noise that is not shared win a draft at all.
    kinds = [GREEDY, *DRAWN[:3], {"temperature": 0.2}, DRAWN[0] | {"stop_token_ids": tuple(range(0, VOCABULARY, 30))}]
    requests = asks(kinds, copies=3, seed=41, tokens=60)
    kinds = [DRAWN[0] | {"frequency_penalty": 1.5, "presence_penalty": 0.5}, GREEDY | {"repetition_penalty": 1.6}]
    requests += [replace(one, id=f"penalties {one.id}") for one in asks(kinds, copies=2, seed=42, tokens=60)]
    kinds = [DRAWN[0] | {"stop_token_ids": (EOS,)}, GREEDY | {"stop_token_ids": (EOS,)}]
    spoken = asks(kinds, copies=2, seed=43, tokens=60, grammar=regex("([a-z]{3}[0-9]{3} ){20}"))
    requests += [replace(one, id=f"grammar {one.id}") for one in spoken]
    return requests, plain(core, requests)


def check(core: Engine, battery: tuple[list[Generate], dict[str, Answer]], seed: int = 0) -> None:
    """What the other proofs check: half right drafts, then two at once."""
    requests, slow = battery
    oracle = Oracle(slow, VOCABULARY, seed)
    for drafters in ((oracle.partly,), pair(oracle)):
        force(core, *drafters)
        check_equal(run(core, requests), slow)


def check_often(core: Engine, battery: tuple[list[Generate], dict[str, Answer]]) -> None:
    """Which row's noise wins is chance: a mutant may come through one round of drafts, not through four."""
    for seed in range(4):
        check(core, battery, seed)


def test_the_engine_as_it_is_passes(core: Engine, battery: tuple[list[Generate], dict[str, Answer]]) -> None:
    check(core, battery)


def cold_bonus(patch: Patch) -> None:
    """The token behind an accepted draft is the likeliest one, not drawn."""

    def draw(rows: Many[Row], logits_RV: torch.Tensor, sample: Sampler) -> Sampled:
        sampled = real_draw(rows, logits_RV, sample)
        end = 0
        for row in rows:
            end += 1 + len(row.drafted)
            if row.drafted:
                sampled.token_ids[end - 1] = int(logits_RV[end - 1].argmax())
        return sampled

    patch.setattr(engine.runner.runner, "draw", draw)


def first_unverified(patch: Patch) -> None:
    """A draft's first token is taken on trust."""

    def verify(rows: Many[Row], sampled: Sampled) -> list[Verified]:
        first = 0
        for row in rows:
            if row.samples:
                sampled.token_ids[first] = row.drafted[0] if row.drafted else sampled.token_ids[first]
                first += 1 + len(row.drafted)
        return real_verify(rows, sampled)

    patch.setattr(engine.core, "verify", verify)


def one_too_many(patch: Patch) -> None:
    """The draft's first wrong token is accepted with those before it."""

    def verify(rows: Many[Row], sampled: Sampled) -> list[Verified]:
        return [
            each._replace(accepted=min(len(each.row.drafted), each.accepted + 1)) for each in real_verify(rows, sampled)
        ]

    patch.setattr(engine.core, "verify", verify)


def stale_penalties(patch: Patch) -> None:
    """Penalties do not see what was drafted before."""
    patch.setattr(Counts, "marks", lambda self, sampling, drafted=(): real_marks(self, sampling))  # noqa: ARG005


def blind_grammar(patch: Patch) -> None:
    """Every place is masked as the first one."""
    patch.setattr(GrammarMatcher, "fill", lambda self, words, _=(), *rest: real_fill(self, words, (), *rest))


def independent_noise(patch: Patch) -> None:
    """A second draft is drawn with noise of its own."""

    class Other(Place):
        @property
        def draw(self) -> Draw:
            return super().draw._replace(choice=77)

    def draw(rows: Many[Row], logits_RV: torch.Tensor, sample: Sampler) -> Sampled:
        places = [
            (Place if row.branch is None else Other)(row.sequence, row.drafted[:count])
            for row in rows
            for count in range(len(row.drafted) + 1)
        ]
        return draw_at(places, logits_RV, sample)

    patch.setattr(engine.runner.runner, "draw", draw)


def noise_of_the_first_place(patch: Patch) -> None:
    """All places of a row are drawn with the first one's noise."""
    real = Place.draw.fget  # type: ignore[attr-defined]
    patch.setattr(
        Place, "draw", property(lambda self: real(self)._replace(position=len(self.sequence.tokens), behind=None))
    )


def rejected_counted(patch: Patch) -> None:
    """All that was computed counts, rejected tokens' keys and values, too."""

    def advance(self: Scheduler, rows: Many[Row]) -> None:
        for row in rows:
            if row.branch is None:
                real_keep(self, row.sequence, row.length)

    patch.setattr(Scheduler, "advance", advance)
    patch.setattr(Scheduler, "keep", lambda *_: None)


def branch_without_a_copy(patch: Patch) -> None:
    """A branch begins with an empty block where the sequence's last one is partly filled."""

    def fork(self: Scheduler, sequence: Sequence, length: int) -> Branch | None:
        branch = real_fork(self, sequence, length)
        self.copies.clear()
        return branch

    patch.setattr(Scheduler, "fork", fork)


def branch_not_adopted(patch: Patch) -> None:
    """Tokens of the second draft, keys and values of the first."""
    patch.setattr(Scheduler, "adopt", lambda self, _, branch: self.prune(branch))


def branch_leaked(patch: Patch) -> None:
    """Nobody gives the blocks of a branch that lost back."""
    patch.setattr(Scheduler, "prune", lambda *_: None)


def both_emitted(patch: Patch) -> None:
    """Of two drafts the second one's tokens are told, too."""

    def choose(self: Drafting, verified: list[Verified]) -> list[Verified]:
        real_choose(self, verified)
        return verified

    patch.setattr(Drafting, "choose", choose)


def swallowed_stop(patch: Patch) -> None:
    """What stands behind a token that ends the answer is told."""

    def accept(self: Sequence, token: int, logprob: float) -> str | None:
        ended = self.tokens[-1] in self.stops and self.produced > 0
        reason = real_accept(self, token, logprob)
        return "stop" if ended else None if reason == "stop" else reason

    patch.setattr(Sequence, "accept", accept)


def logprobs_of_another_place(patch: Patch) -> None:
    """Every token is told the log-probability of the place before it."""

    def draw(rows: Many[Row], logits_RV: torch.Tensor, sample: Sampler) -> Sampled:
        sampled = real_draw(rows, logits_RV, sample)
        return sampled._replace(logprobs=[sampled.logprobs[0], *sampled.logprobs[:-1]])

    patch.setattr(engine.runner.runner, "draw", draw)


MUTANTS = [
    cold_bonus, first_unverified, one_too_many, stale_penalties, blind_grammar, independent_noise,
    noise_of_the_first_place, rejected_counted, branch_without_a_copy, branch_not_adopted, branch_leaked, both_emitted,
    swallowed_stop, logprobs_of_another_place,
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_every_mutant_is_caught(
    mutant: Callable[[Patch], None], talking_model: Path, battery: tuple[list[Generate], dict[str, Answer]]
) -> None:
    """On an engine of its own, which it may ruin."""
    with started(talking_model, step_tokens=192) as core, pytest.MonkeyPatch.context() as patch:
        mutant(patch)
        with pytest.raises(AssertionError):
            check_often(core, battery)
