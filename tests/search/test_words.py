"""Words find what was said, in one's own project only, whatever is typed and however long the text was."""

import random
import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qsl

import pytest
from sqlalchemy import Select, select, text, true
from sqlalchemy.orm import Session

from services.store import feedback, interactions, partitions, search, search_walk
from services.store.base import Sessions, uuid7
from services.store.models import Interaction, InteractionBody, Project
from services.store.pages import first_id
from services.store.search import Search, newest, parsed
from tests.console import seed


def found(sessions: Sessions, project: Project, words: str, **filters: str) -> list[uuid.UUID]:
    with sessions() as session:
        return newest(session, project.id, Search(words=words, **filters)).ids


@pytest.fixture
def said(sessions: Sessions, project: Project) -> dict[str, uuid.UUID]:
    """Answers with something to find, oldest first."""
    texts = {
        "crack": "The white backpack arrived with a crack", "refund": "A refund was sent to Viola Kelman",
        "both": "refund for the cracked backpack", "other": "Nothing of the kind",
    }  # fmt: skip
    with sessions.begin() as session:
        made = {
            name: seed.interaction(session, project.id, output=said, ago=timedelta(seconds=60 - place))
            for place, (name, said) in enumerate(texts.items())
        }
        made["asked"] = seed.interaction(
            session, project.id, output="yes",
            messages=[
                {"role": "system", "content": "be kind"},
                {"role": "user", "content": [{"type": "text", "text": "where is my parcel"}]},
            ],
        )  # fmt: skip
        return {name: row.id for name, row in made.items()}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("backpack", ["both", "crack"]),
        ("BACKPACK white", ["crack"]),
        ('"white backpack"', ["crack"]),
        ('"backpack white"', []),
        ("backpack -white", ["both"]),
        ("parcel or kelman", ["asked", "refund"]),
        ("refu", ["both", "refund"]),
        ("re", []),
        ("parcel", ["asked"]),
        ("kind", ["asked", "other"]),
        ("user", []),
    ],
)
def test_words_find_answers_and_prompts_newest_first(
    sessions: Sessions, project: Project, said: dict[str, uuid.UUID], words: str, expected: list[str]
) -> None:
    names = {one: name for name, one in said.items()}
    assert [names[one] for one in found(sessions, project, words)] == expected


HOSTILE = [
    "'; DROP TABLE interaction; --", "' OR '1'='1", "a & | ! ( ) <-> :* \\", ":*", "'''", '"""', "-", "--", "!!",
    "or or or",
    "a:b:c", "<script>", "%s %(x)s {} :name", "\\'", "\u202e\u2066abc\u2069", "\ufeff", "x" * 10_000, "a " * 5_000,
    "-a " * 700, '"' + "b " * 900, "\x00", "a\x00b", "\U0001f600", "\ufdfa" * 300, "select pg_sleep(10)",
]  # fmt: skip


@pytest.mark.parametrize("words", HOSTILE, ids=range(len(HOSTILE)))
def test_nothing_that_is_typed_breaks_the_search(
    sessions: Sessions, project: Project, said: dict[str, uuid.UUID], words: str
) -> None:
    began = time.monotonic()
    with sessions() as session:
        newest(session, project.id, parsed({"q": words}))
        assert session.scalar(select(Interaction.id).limit(1)) is not None
    assert time.monotonic() - began < 3


def test_no_project_finds_what_another_said_not_even_by_spelling_its_word(
    sessions: Sessions, project: Project, other: Project
) -> None:
    with sessions.begin() as session:
        mine = seed.interaction(session, project.id, output="our secret needle")
        seed.interaction(session, other.id, output=f"their needle project{project.id.hex}")
    assert found(sessions, project, "needle") == [mine.id]
    assert found(sessions, project, "their") == []
    assert found(sessions, other, "secret") == []


def test_an_answer_longer_than_an_index_entry_is_logged_and_found_by_its_beginning(
    sessions: Sessions, project: Project
) -> None:
    huge = "beginning " + " ".join(uuid.uuid4().hex for _ in range(40_000)) + " ending"
    with sessions.begin() as session:
        logged = seed.interaction(
            session, project.id, output=huge, messages=[{"role": "user", "content": "w" * 90_000}]
        )
    assert found(sessions, project, "beginning") == [logged.id]
    assert found(sessions, project, "ending") == []


def test_a_body_landed_by_a_release_that_knows_no_documents_is_found(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        logged = seed.interaction(session, project.id, output="old")
        body = session.get_one(InteractionBody, logged.id)
        columns = ", ".join(name for name in interactions.WIDE if name not in ("id", "project_id", "output"))
        session.execute(text("DELETE FROM interaction_body WHERE id = :id").bindparams(id=body.id))
        session.execute(
            text(
                f"INSERT INTO interaction_body (id, output, {columns}) "
                "VALUES (:id, 'shipped needle', '[]', '{}', '[]', '[]', '[]', 'p', 't', 'k', '[]', '[]', 1)"
            ).bindparams(id=logged.id)
        )
    assert found(sessions, project, "needle") == [logged.id]


def test_a_text_that_is_changed_is_no_longer_found_by_what_it_was(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        logged = seed.interaction(session, project.id, output="a name to erase")
        session.execute(text("UPDATE interaction_body SET output = 'erased' WHERE id = :id").bindparams(id=logged.id))
    assert found(sessions, project, "name") == []
    assert found(sessions, project, "erased") == [logged.id]


# --- windows of time --------------------------------------------------------------------------------------


@pytest.fixture
def month(sessions: Sessions, project: Project) -> list[uuid.UUID]:
    """An answer a day for thirty days, newest first."""
    with sessions.begin() as session:
        partitions.ensure(session, since=datetime.now(UTC) - timedelta(days=31))
        return [
            seed.interaction(session, project.id, output=f"needle {day}", ago=timedelta(days=day, minutes=1)).id
            for day in range(30)
        ]


def test_days_before_the_newest_are_searched_too_and_paging_misses_none(
    sessions: Sessions, project: Project, month: list[uuid.UUID]
) -> None:
    assert found(sessions, project, "needle") == month
    seen: list[uuid.UUID] = []
    with sessions() as session:
        while page := newest(
            session, project.id, Search(words="needle"), before=seen[-1] if seen else None, limit=7
        ).ids:
            seen += page
    assert seen == month
    assert len(found(sessions, project, "needle", window="week")) == 7
    assert found(sessions, project, "needle 29") == [month[29]]


def test_a_search_whose_time_is_spent_says_how_far_it_came(
    sessions: Sessions, project: Project, month: list[uuid.UUID], monkeypatch: pytest.MonkeyPatch
) -> None:
    spent: list[Any] = []
    timed = search_walk._timed

    def second_is_slow(session: Session, query: Select[uuid.UUID], seconds: float) -> Sequence[Any] | None:
        spent.append(seconds)
        return None if len(spent) > 2 else timed(session, query, seconds)

    monkeypatch.setattr(search_walk, "_timed", second_is_slow)
    monkeypatch.setattr(search_walk, "WALKED", 0)
    with sessions() as session:
        got = newest(session, project.id, Search(words="needle"))
    assert got.back_to is not None
    assert got.ids == [one for one in month if one >= first_id(got.back_to)]
    assert 0 < len(got.ids) < 30


def test_a_statement_that_takes_too_long_is_ended_and_the_transaction_goes_on(
    sessions: Sessions, project: Project
) -> None:
    slow = select(Interaction.id).where(text("pg_sleep(5) IS NOT NULL"))
    with sessions.begin() as session:
        seed.interaction(session, project.id, output="one")
        began = time.monotonic()
        assert search_walk._timed(session, slow, 0.1) is None
        assert time.monotonic() - began < 2
        assert session.scalar(text("SHOW statement_timeout")) == "0"


WAYS: dict[str, dict[str, float]] = {
    "as it is": {}, "read a few, then by the index": {"SAMPLED": 3, "WALKED": 7}, "by the index": {"WALKED": 0},
    "by the filters": {"SAMPLED": 3, "WALKED": 3, "FREQUENT": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_find_finds_what_reading_everything_finds(
    sessions: Sessions, project: Project, other: Project, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Words of all frequencies, alone and narrowed, whole and in pages, against one plain query."""
    dice = random.Random(7)
    with sessions.begin() as session:
        partitions.ensure(session, since=datetime.now(UTC) - timedelta(days=12))
        for number in range(120):
            said = " ".join(word for word, share in FREQUENCIES.items() if dice.random() < share)
            owner = other if dice.random() < 0.1 else project
            made = seed.interaction(
                session, owner.id, output=f"{said} n{number}", ago=timedelta(hours=dice.uniform(0, 240)),
                mean_logprob=-2.0 if dice.random() < 0.2 else -0.1,
            )  # fmt: skip
            if dice.random() < 0.2:
                opinion = feedback.Opinion(rating=dice.choice((-1, 1)))
                feedback.add(session, owner.id, made.id, f"opinion {number}", opinion)
                feedback.add(session, owner.id, made.id, f"again {number}", opinion)
            if dice.random() < 0.2:
                seed.item(session, made)
    for name, value in WAYS[way].items():
        monkeypatch.setattr(search_walk, name, value)
    with sessions() as session:
        for words in (
            "",
            "always",
            "often",
            "seldom",
            "often seldom",
            '"always often"',
            "always -seldom",
            "nowhere",
            "of",
        ):
            for filters in NARROWED:
                wanted = Search(words=words, **filters)
                expected = plainly(session, project.id, wanted)
                assert newest(session, project.id, wanted, limit=200, seconds=60).ids == expected, (words, filters)
                seen: list[uuid.UUID] = []
                while page := newest(
                    session, project.id, wanted, before=seen[-1] if seen else None, limit=9, seconds=60
                ).ids:
                    seen += page
                assert seen == expected, (words, filters)


NARROWED: tuple[dict[str, str], ...] = (
    {}, {"confidence": "low"}, {"feedback": "negative"}, {"feedback": "none"}, {"window": "week"},
    {"verdict": "waiting"}, {"verdict": "none", "feedback": "positive"}, {"split": "train", "confidence": "low"},
)  # fmt: skip
FREQUENCIES = {"always": 1.0, "often": 0.5, "seldom": 0.05}


def plainly(session: Session, project_id: uuid.UUID, wanted: Search) -> list[uuid.UUID]:
    """All of it in one query that knows no windows."""
    asked = search.terms(session, wanted.words)
    if wanted.words and not asked.text:
        return []
    holding = InteractionBody.document.op("@@")(asked.query) if wanted.words else true()
    matching = (
        select(Interaction.id)
        .join(InteractionBody, InteractionBody.id == Interaction.id)
        .where(Interaction.project_id == project_id, *search.conditions(project_id, wanted))
        .where(holding)
        .order_by(Interaction.id.desc())
    )
    return list(session.scalars(matching))


# --- filters ----------------------------------------------------------------------------------------------


def test_every_filter_narrows_and_stands_in_the_address(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        rows: dict[str, dict[str, Any]] = {
            "plain": {}, "unsure": {"mean_logprob": -1.2}, "drafted": {"drafted_tokens": 9},
            "user": {"end_user": "eve"}, "session": {"session_key": "s 1"}, "pinned": {"origin": "pinned"},
            "tagged": {"tags": {"app": "desk & co"}},
        }  # fmt: skip
        made = {name: seed.interaction(session, project.id, output="needle", **values) for name, values in rows.items()}
        seed.item(session, made["plain"], overlap=2)
    for name, filters in {
        "unsure": {"confidence": "low"}, "drafted": {"drafted": "yes"}, "user": {"user": "eve"},
        "session": {"session": "s 1"}, "tagged": {"tag": "app=desk & co"}, "pinned": {"origin": "pinned"},
        "plain": {"split": "held_out"},
    }.items():  # fmt: skip
        for words in ("", "needle"):
            assert found(sessions, project, words, **filters) == [made[name].id], (name, words)
    assert found(sessions, project, "", tag="app") == [made["tagged"].id]
    assert found(sessions, project, "", verdict="waiting") == [made["plain"].id]
    assert len(found(sessions, project, "", verdict="none")) == 6
    wanted = Search(words="a b", mode="words", tag="app=desk & co", user="eve", window="week")
    assert parsed(dict(parse_qsl(wanted.query))) == wanted


def test_what_lands_by_copy_is_found(sessions: Sessions, project: Project) -> None:
    """As the shipper lands it: the document is made by the database."""
    with sessions.begin() as session:
        logged = seed.interaction(session, project.id, output="needle")
        record: dict[str, Any] = {
            **{name: getattr(logged, name) for name in interactions.NARROW},
            **{
                name: getattr(session.get_one(InteractionBody, logged.id), name)
                for name in interactions.WIDE
                if name != "project_id"
            },
        }
        record["id"] = uuid7()
        driver: Any = session.connection().connection.driver_connection
        assert interactions.land(driver, [record]) == 1
    assert found(sessions, project, "needle") == [record["id"], logged.id]
