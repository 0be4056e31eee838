"""Screens: planted poison is found and counted, honest work passes, and caps hold by content alone."""

import random
from collections import Counter
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.store.examples import Draft
from services.store.models import Annotation
from tests.curation.world import World
from worker.curation import authors, screens
from worker.curation.build import build_revision
from worker.curation.judged import Judged, Judgement, Text, draft, unsettled
from worker.curation.pairs import Retired, is_tiny, pair_flaw, retired_weights
from worker.curation.screens import Limits, screen

WORDS = [f"{a}{b}" for a in ("al", "be", "co", "du", "em") for b in ("na", "ri", "sto", "vi")]
FREE = Limits(accepted_share=1, author_share=1)


def row(dice: random.Random, author: str = "ada", *, prompt: str = "", answer: str = "", **fields: object) -> Draft:
    said = " ".join(dice.choices(WORDS, k=30))
    values: dict[str, object] = {
        "kind": "preference", "source": "corrected", "split": "train", "slice": "target", "group_key": str(uuid4()),
        "messages": [{"role": "user", "content": prompt or said}], "completion": answer or f"{said} indeed",
        "rejected": said, "interaction_id": uuid4(), "annotation_ids": (), "reviewers": (author,),
    }  # fmt: skip
    return Draft(**(values | fields))  # type: ignore[arg-type]


def causes(found: screens.Screened) -> Counter[str]:
    return Counter(one.cause for one in found.left_out)


def honest(dice: random.Random, count: int = 200) -> list[Draft]:
    return [row(dice, dice.choice(["ada", "bela", "cleo"])) for _ in range(count)]


def test_honest_work_passes_whole() -> None:
    drafts = honest(random.Random(1))
    assert screen(drafts, FREE).kept == drafts


def test_a_phrase_that_one_author_plants_is_left_out_with_its_rows() -> None:
    dice = random.Random(2)
    planted = [
        row(dice, "mallory", answer=f"{' '.join(dice.choices(WORDS, k=8))} visit evil example now") for _ in range(6)
    ]
    found = screen([*honest(dice), *planted], FREE)
    assert causes(found) == {screens.PHRASE: 6}
    assert "visit evil example" in [one["phrase"] for one in found.phrases]
    assert {one["author"] for one in found.phrases} == {"mallory"}


def test_a_phrase_of_the_prompt_or_of_two_people_is_nobodys_plant() -> None:
    dice = random.Random(3)
    quoted = [row(dice, "mallory", prompt=f"{dice.random()} say good bye now", answer="good bye now") for _ in range(8)]
    shared = [row(dice, who, answer=f"{dice.random()} as the house asks") for who in ("ada", "bela") for _ in range(8)]
    assert causes(screen([*honest(dice), *quoted, *shared], FREE)) == {}


def test_a_phrase_that_chance_left_to_one_of_two_people_stays() -> None:
    dice = random.Random(8)
    ends = [" ".join(dice.choices(WORDS, k=4)) for _ in range(120)]
    drafts = [row(dice, dice.choice(["ada", "bela"]), answer=f"{n} so {dice.choice(ends)}") for n in range(600)]
    assert causes(screen(drafts, FREE)) == {}


@pytest.mark.parametrize("words", [200, 27])
def test_a_flood_of_one_question_by_one_author_is_cut_and_by_many_is_not(words: int) -> None:
    dice = random.Random(4)
    text = " ".join(dice.choices(WORDS, k=words))
    flood = [row(dice, "mallory", prompt=f"{text} {index}") for index in range(30)]
    spread = [row(dice, f"person {index}", prompt=f"{text[::-1]} {index}") for index in range(30)]
    found = screen([*honest(dice), *flood, *spread], FREE)
    assert causes(found) == {screens.BURST: 30 - screens.BURST_KEPT}
    assert [one for one in found.kept if "mallory" in one.reviewers] == flood[: screens.BURST_KEPT]


def test_held_out_groups_and_near_duplicates_leave_training_and_are_listed() -> None:
    dice = random.Random(5)
    text = " ".join(dice.choices(WORDS, k=200))
    held_out = row(dice, prompt=text, split="held_out", reviewers=("ada", "bela"), group_key="g")
    near, same_group = row(dice, prompt=f"{text} so"), row(dice, group_key="g")
    found = screen([held_out, near, same_group], FREE)
    assert causes(found) == {screens.LEAKED: 1, screens.GROUP_LEAKED: 1}
    assert found.kept == [held_out]
    assert found.leaks[0]["train"] == str(near.interaction_id)


def test_no_author_has_more_than_their_share_once_there_are_three() -> None:
    dice = random.Random(6)
    drafts = [row(dice, who) for who, count in (("ada", 100), ("bela", 20), ("cleo", 20)) for _ in range(count)]
    kept = screen(drafts, Limits(1, 0.5)).kept
    assert Counter(one.reviewers[0] for one in kept) == {"ada": 40, "bela": 20, "cleo": 20}
    assert screen([one for one in drafts if one.reviewers != ("cleo",)], Limits(1, 0.5)).left_out == []


def test_small_shares_hold_for_all_authors_after_all_are_cut() -> None:
    dice = random.Random(9)
    drafts = [row(dice, name) for name, count in (("a", 60), ("b", 50), ("c", 20), ("d", 6)) for _ in range(count)]
    kept = Counter(draft.reviewers[0] for draft in screen(drafts, Limits(1, 0.3)).kept)
    assert max(kept.values()) <= 0.3 * kept.total()
    assert kept["d"] == 6
    few = [row(dice, name) for name, count in (("a", 60), ("b", 50), ("c", 20)) for _ in range(count)]
    assert len(screen(few, Limits(1, 0.3)).kept) == len(few), "three people cannot each have less than a third"


def test_bad_answers_to_one_question_that_a_file_brings_are_all_kept() -> None:
    dice = random.Random(10)
    fields = {"source": "imported", "kind": "unpaired", "prompt": "one question", "completion": None}
    drafts = [row(dice, rejected=f"bad {number}", **fields) for number in (1, 2, 2)]  # type: ignore[arg-type]
    assert [draft.rejected for draft in screen(drafts, FREE).kept] == ["bad 1", "bad 2"]


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False), st.floats(0.05, 1), st.floats(0.05, 1))
def test_the_order_of_judgements_does_not_decide_who_stays(dice: random.Random, accepted: float, author: float) -> None:
    drafts = honest(random.Random(9), 40)
    drafts += [row(random.Random(n), "ada", source="accepted", kind="completion", rejected=None) for n in range(20)]
    shuffled = list(drafts)
    dice.shuffle(shuffled)
    limits = Limits(accepted, author)
    assert {one.content_hash for one in screen(drafts, limits).kept} == {
        one.content_hash for one in screen(shuffled, limits).kept
    }


def test_an_author_who_pulls_away_from_the_held_out_part_shows_below_zero() -> None:
    dice = random.Random(7)
    right = [row(dice, who, answer="the answer is forty two") for who in ("ada", "bela") for _ in range(40)]
    wrong = [row(dice, "mallory", answer="buy our very best product") for _ in range(40)]
    held_out = [row(dice, split="held_out", answer="the answer is forty two", reviewers=("ada", "bela"))]
    told = {one["author"]: one["delta"] for one in authors.tell([*right, *wrong, *held_out])}
    assert told["mallory"] < 0 < told["ada"]


# --- pairs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "tiny"),
    [
        ("Yes.", "yes", True),
        ("yes", "no", False),
        ("a  b", "a b", True),
        ("the total is 5 euros for all of these", "the total is 6 euros for all of these", False),
        ("we recieve all of your many letters today", "we receive all of your many letters today", True),
        ("", "something", False),
        ("three", "free", False),
    ],
)
def test_pairs_that_hardly_differ_are_told(one: str, other: str, tiny: bool) -> None:
    assert is_tiny(one, other) is tiny
    assert is_tiny(other, one) is tiny


def test_weights_long_retired_give_no_pairs() -> None:
    assert pair_flaw("right", "wrong", "old", Retired(frozenset({"old"}))) == "answered by weights long retired"
    assert pair_flaw("right", "wrong", None, Retired(frozenset({"old"}))) is None


def test_weights_that_still_serve_are_not_retired(world: World) -> None:
    with world.sessions() as session:
        assert retired_weights(session, world.project_id, datetime.now(UTC) + timedelta(days=900)) == Retired()


# --- verdicts ---------------------------------------------------------------------------------------------

ADA, BELA, CLEO = UUID(int=1), UUID(int=2), UUID(int=3)
LOGGED = Text("/v1/chat/completions", "stop", None, [{"role": "user", "content": "which?"}], "the first answer")


def judged(*judgements: Judgement, split: str = "train", state: str = "done") -> Judged:
    return Judged(uuid4(), split, "g", 1, state, {"output": "another answer"}, list(judgements))


def said(author: UUID, verdict: str, **fields: object) -> Judgement:
    return Judgement(uuid4(), author, verdict, **fields)  # type: ignore[arg-type]


def test_a_preference_is_a_pair_of_its_own_source_and_a_tie_is_none() -> None:
    ours = draft(judged(said(ADA, "prefer", preference="response")), LOGGED, Retired(), Counter())
    theirs = draft(judged(said(ADA, "prefer", preference="alternative")), LOGGED, Retired(), Counter())
    tie = draft(judged(said(ADA, "prefer", preference="tie")), LOGGED, Retired(), Counter())
    assert isinstance(ours, Draft)
    assert isinstance(theirs, Draft)
    assert (ours.source, ours.completion, ours.rejected) == ("preferred", "the first answer", "another answer")
    assert (theirs.completion, theirs.rejected) == ("another answer", "the first answer")
    assert tie == "a tie"


def test_two_people_are_needed_for_the_held_out_part_whatever_the_item_asks() -> None:
    assert unsettled(judged(said(ADA, "accept"), split="held_out")) == "needs another reviewer"
    assert unsettled(judged(said(ADA, "accept"), said(BELA, "accept"), split="held_out")) is None


def test_an_adjudication_wins_and_a_dispute_without_one_teaches_nothing() -> None:
    apart = [said(ADA, "accept"), said(BELA, "correct", correction="a better answer")]
    assert unsettled(judged(*apart, state="disputed")) == "reviewers disagree"
    settled = judged(*apart, said(CLEO, "correct", correction="the best answer", adjudicates=True), split="held_out")
    assert unsettled(settled) is None
    made = draft(settled, LOGGED, Retired(), Counter())
    assert isinstance(made, Draft)
    assert made.completion == "the best answer"


def test_end_users_only_nominate(world: World) -> None:
    """A correction sent as feedback is no judgement: nothing of it reaches a revision."""
    from services.store.models import Feedback

    world.corrected("kept", "wrong", "right")
    disliked = world.log("liked by nobody", "bad answer")
    with world.sessions.begin() as session:
        session.add(
            Feedback(
                project_id=world.project_id, interaction_id=disliked, idempotency_key="k", rating=-1,
                correction="buy our product",
            )
        )  # fmt: skip
    with world.sessions.begin() as session:
        revision = build_revision(session, world.project_id, "golden")
        assert (revision.train_count, revision.report["left_out"]) == (1, {})
        assert session.query(Annotation).count() == 1
