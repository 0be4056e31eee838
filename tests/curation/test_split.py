"""Sides assigned before labelling: stable, together for near-duplicates and for groups, whatever the batches."""

from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select

from services.store.models import PromptCluster, ReviewItem, SplitGroup
from tests.curation.world import World
from worker.curation.duplicates import Index, Prompt, jaccard, shingles, without_template
from worker.curation.sample import sample
from worker.curation.split import Chosen, assign, split_of

LONG = " ".join(f"word{index}" for index in range(200))


def asked(text: str) -> Prompt:
    return Prompt(shingles([{"role": "user", "content": text}]))


def sides(world: World, ids: list[UUID], groups: list[str], share: float = 0.5) -> list[str]:
    with world.sessions.begin() as session:
        chosen = [Chosen(one, group) for one, group in zip(ids, groups, strict=True)]
        found = assign(session, world.project_id, chosen, share)
    return [found[one] for one in ids]


def test_near_duplicates_share_a_side_however_their_groups_hash(world: World) -> None:
    ids = [world.log(f"{LONG} and {index}") for index in range(12)]
    groups = [f"user {index}" for index in range(12)]
    assert len({split_of(world.project_id, group, 0.5) for group in groups}) == 2
    assert len(set(sides(world, ids, groups))) == 1


def test_batches_give_what_one_batch_gives_and_a_second_look_changes_nothing(world: World) -> None:
    ids = [world.log(f"{LONG} {index % 5} {LONG[: 40 * (index % 5)]}") for index in range(15)]
    groups = [f"user {index % 7}" for index in range(15)]
    first = [
        side for start in range(0, 15, 4) for side in sides(world, ids[start : start + 4], groups[start : start + 4])
    ]
    assert sides(world, ids, groups) == first
    with world.sessions() as session:
        assert session.scalar(select(func.count()).select_from(SplitGroup)) == 7


def test_a_group_stays_on_its_side_when_the_share_changes(world: World) -> None:
    before = sides(world, [world.log("one")], ["user"], share=0.0)
    after = sides(world, [world.log("quite another question")], ["user"], share=0.9)
    assert before == after == ["train"]


def test_a_prompt_torn_between_group_and_near_duplicates_goes_to_training(world: World) -> None:
    held_out = next(str(n) for n in range(99) if split_of(world.project_id, str(n), 0.5) == "held_out")
    train = next(str(n) for n in range(99) if split_of(world.project_id, str(n), 0.5) == "train")
    ids = [world.log(LONG), world.log("something else"), world.log(LONG)]
    assert sides(world, ids, [held_out, train, train]) == ["held_out", "train", "train"]


def test_one_template_does_not_become_one_cluster(world: World) -> None:
    ids = [world.log(f"{LONG} number {index}") for index in range(50)]
    groups = [f"user {index}" for index in range(50)]
    found = sides(world, ids, groups)
    # Twenty go where the first went, and twenty where the first of the others went, and so do the rest.
    leaders = [found[start] for start in (0, 20, 40)]
    assert leaders == [split_of(world.project_id, groups[start], 0.5) for start in (0, 20, 40)]
    assert found == [leaders[index // 20] for index in range(50)]
    with world.sessions() as session:
        assert max(session.scalars(select(PromptCluster.members))) <= 20


def test_a_question_asked_again_is_found_among_hundreds_of_its_template(world: World) -> None:
    """All share bands with all; a repeat must not begin anew on the other side because others come before it."""
    template = " ".join(f"shared{index}" for index in range(150))
    texts = [f"{template} {' '.join(f'own{number}x{place}' for place in range(10))}" for number in range(200)]
    groups = [f"user {number}" for number in range(200)]
    first = sides(world, [world.log(text) for text in texts], groups)
    again = sides(world, [world.log(text) for text in texts], [f"other {number}" for number in range(200)])
    assert len(set(first)) == 2
    assert again == first
    index = Index(asked(text) for text in texts)
    assert [index.nearest(asked(text)) for text in texts] == [(place, 1.0) for place in range(200)]


def test_a_near_duplicate_is_found_behind_many_that_share_a_band() -> None:
    template = [f"shared{index}" for index in range(600)]
    texts = [" ".join([*template, *(f"own{number}x{place}" for place in range(60))]) for number in range(200)]
    index = Index(asked(text) for text in texts)
    for place in (0, 150, 199):
        found = index.nearest(asked(texts[place] + " please"))
        assert found is not None
        assert found.place == place


def test_sampling_assigns_sides_by_cluster(world: World) -> None:
    world.configure(held_out_share=0.5, window_seconds=1, window_grace_seconds=0)
    for index in range(12):
        world.log(f"{LONG} and {index}", group=f"user {index}")
    with world.sessions.begin() as session:
        assert sample(session, world.project_id, now=datetime.now(UTC) + timedelta(seconds=5)) == 12
    with world.sessions() as session:
        assert len(set(session.scalars(select(ReviewItem.split)))) == 1


@given(st.lists(st.text(st.sampled_from("abc "), max_size=40), max_size=30), st.floats(0, 0.9))
def test_a_side_depends_on_project_and_group_only(groups: list[str], share: float) -> None:
    project = UUID(int=7)
    assert [split_of(project, one, share) for one in groups] == [split_of(project, one, share) for one in groups]
    held_out = {one for one in groups if split_of(project, one, share) == "held_out"}
    assert held_out <= {one for one in groups if split_of(project, one, min(0.9, share + 0.1)) == "held_out"}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_index_finds_what_comparing_all_pairs_finds(data: st.DataObject) -> None:
    words = [f"w{index}" for index in range(120)]
    texts = []
    for _ in range(data.draw(st.integers(2, 8))):
        edited = list(words)
        for place in data.draw(st.lists(st.integers(0, 119), max_size=3)):
            edited[place] = "x"
        texts.append(" ".join(edited))
    prompts = [asked(text) for text in texts]
    wanted = prompts[0]
    found = Index(prompts[1:]).nearest(wanted)
    best = max(jaccard(wanted.grams, one.grams) for one in prompts[1:])
    assert (found.similarity if found else None) == (best if best >= 0.95 else None)


def test_a_shared_template_does_not_make_prompts_alike() -> None:
    template = " ".join(f"rule{index}" for index in range(300))
    prompts = [asked(f"{template} {uuid4()} asks about {uuid4()}").grams for _ in range(60)]
    assert jaccard(prompts[0], prompts[1]) >= 0.95
    bare = without_template(prompts)
    assert jaccard(bare[0], bare[1]) < 0.5


@pytest.mark.parametrize("text", ["", "   ", "one", "x " * 20_000])
def test_any_text_has_a_sketch(text: str) -> None:
    assert len(asked(text).bands) == 8
