"""Imports: every format, row-level errors, all rows or none, and what a build makes of them."""

import contextlib
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import func, select

from engine.text.tools import CLOSE, FORCED_PREFIX
from services.cli_datasets import to_parquet
from services.errors import InvalidRequest, TooLarge, Unprocessable, WhetError
from services.store import dataset_export, datasets, import_files, imports, revisions
from services.store.forms import Form
from services.store.imports import Parsed
from services.store.models import Dataset, DatasetImport, DatasetImportExample, Example
from tests.curation.world import World
from worker.curation.build import build_revision

ROWS: list[dict[str, Any]] = [{"prompt": f"question {index}", "completion": f"answer {index}"} for index in range(5)]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def parsed(rows: list[dict[str, Any]], **mapping: str) -> Parsed:
    return imports.parse("rows.jsonl", jsonl(rows), mapping or None, "ada")


@pytest.mark.parametrize(("name", "written"), [("a.jsonl", jsonl), ("a.csv", table), ("a.parquet", parquet)])
def test_every_format_gives_the_same_examples(name: str, written: Callable[[list[dict[str, Any]]], bytes]) -> None:
    found = imports.parse(name, written(ROWS), None, "ada")
    assert found.refusal is None
    assert [one.content_hash for one in found.drafts] == [one.content_hash for one in parsed(ROWS).drafts]
    assert {(one.source, one.split, one.reviewers) for one in found.drafts} == {("imported", "train", ("ada",))}


def test_forms_of_trl_are_taken_as_they_are() -> None:
    prompt, yes, no = (
        [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "y"}],
        [{"role": "assistant", "content": "n"}],
    )  # fmt: skip
    [pair] = parsed([{"prompt": prompt, "chosen": yes, "rejected": no}]).drafts
    good, bad = parsed([{"prompt": prompt, "completion": yes, "label": True},
                        {"prompt": prompt, "completion": no, "label": "false"}]).drafts  # fmt: skip
    [chat] = parsed([{"messages": [*prompt, *yes]}]).drafts
    assert (pair.kind, pair.messages, pair.completion, pair.rejected) == ("preference", prompt, "y", "n")
    assert (good.kind, good.completion, good.rejected) == ("unpaired", "y", None)
    assert (bad.kind, bad.completion, bad.rejected) == ("unpaired", None, "n")
    assert (chat.kind, chat.messages, chat.completion) == ("completion", prompt, "y")


def test_tools_come_back_as_they_were_exported(world: World, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    given = (None, tools, json.dumps(tools, indent=1), "[]")
    rows = [row | {"tools": offered} for row, offered in zip(ROWS, given, strict=False)]
    _, record = begin(world, jsonl(rows))
    with world.sessions.begin() as session:
        imports.finish(session, session.get_one(DatasetImport, record.id), None, "ada")
        revision = build_revision(session, world.project_id, "golden")

    file = tmp_path / "train.jsonl"
    file.write_bytes(b"".join(dataset_export.lines(world.sessions, revision.id, "prompt-completion")))
    to_parquet(file)

    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(line["tools"] or "" for line in lines) == ["", "", json.dumps(tools), json.dumps(tools)]
    for name in ("train.jsonl", "train.parquet"):
        again = imports.parse(name, (tmp_path / name).read_bytes(), None, "ada")
        assert again.refusal is None
        assert {one.content_hash for one in again.drafts} == {line["example"] for line in lines}


def test_a_forced_call_is_exported_with_the_beginning_that_stood_in_its_prompt(world: World) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    call = '{"name": "weather", "arguments": {}}\n</tool_call>'
    _, record = begin(world, jsonl([ROWS[0] | {"completion": call, "tools": tools}]))
    with world.sessions.begin() as session:
        imports.finish(session, session.get_one(DatasetImport, record.id), None, "ada")
        revision = build_revision(session, world.project_id, "golden")
        [example] = session.scalars(select(Example))
        example.asked = {"tools": tools, "forced": True}

    for form, name in (("prompt-completion", "completion"), ("unpaired", "completion")):
        [line] = dataset_export.lines(world.sessions, revision.id, cast(Form, form))
        assert json.loads(line)[name] == [{"role": "assistant", "content": f"{FORCED_PREFIX['hermes']}{call}"}]
    assert CLOSE == dataset_export.CALL_CLOSE


@pytest.mark.parametrize("nothing", [None, "", " ", "null", "[]", "[ ]"])
def test_no_tools_may_be_spelled_in_many_ways(nothing: str | None) -> None:
    [plain], [spelled] = (parsed([row]).drafts for row in (ROWS[0], ROWS[0] | {"tools": nothing}))
    assert spelled.content_hash == plain.content_hash


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "", "completion": "x"}, "row 6 has an empty prompt"),
        ({"prompt": "x", "completion": None}, "row 6 has no answer"),
        ({"prompt": "x", "completion": 7}, "row 6 has a completion that is no text"),
        ({"prompt": [{"role": "boss", "content": "x"}], "completion": "x"}, "without a role"),
        ({"prompt": "x\x00", "completion": "x"}, "a character that cannot be stored"),
        ({"prompt": "x", "completion": "x" * 100_001}, "they end at 100,000"),
        ({"prompt": "x", "completion": "x", "tools": "weather"}, "row 6 has tools that are no list of functions"),
    ],
)
def test_a_bad_row_is_told_by_its_number_and_stops_the_file(row: dict[str, Any], sentence: str) -> None:
    found = parsed([*ROWS, row, *ROWS])
    assert found.refusal is not None
    assert sentence in found.refusal
    assert found.error_count == 1


def test_broken_lines_and_ragged_rows_are_told_by_their_numbers() -> None:
    lines = imports.parse("a.jsonl", b'{"prompt":"a","completion":"b"}\n{oops\n[1]\n', None, "ada")
    cells = imports.parse("a.csv", b"prompt,completion\na,b\nonly one\n", None, "ada")
    assert [error.row for error in lines.errors] == [2, 3]
    assert [error.row for error in cells.errors] == [2]


def test_a_file_without_a_mapping_says_what_is_missing() -> None:
    with pytest.raises(Unprocessable, match=r"columns: wanted, said"):
        parsed([{"wanted": "a", "said": "b"}])
    with pytest.raises(Unprocessable, match="no column 'nowhere'"):
        parsed(ROWS, prompt="nowhere", completion="completion")


def test_sizes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_files, "ROWS_MOST", 4)
    with pytest.raises(TooLarge, match="more than 4 rows"):
        parsed(ROWS)
    monkeypatch.setattr(import_files, "UNPACKED_MOST", 10)
    with pytest.raises(TooLarge, match="unpacks to more"):
        import_files.read("a.parquet", parquet(ROWS[:2]))
    with pytest.raises(InvalidRequest, match="not UTF-8"):
        import_files.read("a.csv", b"a\xff")


def test_a_parquet_file_of_a_kilobyte_that_holds_gigabytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(import_files, "UNPACKED_MOST", 20_000_000)
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 5000), pa.array(["x" * 4_000_000]))
    file = io.BytesIO()
    pq.write_table(pa.table({"prompt": column, "completion": column}), file, compression="zstd")
    assert len(file.getvalue()) < 10_000
    with pytest.raises(TooLarge, match="unpacks to more"):
        import_files.read("a.parquet", file.getvalue())


@pytest.mark.parametrize(
    "content", [b"PAR1", b"PAR1" + b"\0" * 64 + b"PAR1", parquet(ROWS)[:-30], b"no parquet at all"]
)
def test_a_broken_parquet_file_is_told_in_a_sentence(content: bytes) -> None:
    with pytest.raises(InvalidRequest, match="the Parquet file cannot be read"):
        import_files.read("a.parquet", content)


def test_blank_lines_of_a_sheet_are_no_rows_and_a_lone_byte_order_mark_is_no_file() -> None:
    found = imports.parse("a.csv", b"prompt,completion\n\na,b\n\n\nonly one\n\n", None, "ada")
    assert (found.rows, [error.row for error in found.errors]) == (2, [2])
    with pytest.raises(InvalidRequest, match="the file is empty"):
        import_files.read("a.csv", b"\xef\xbb\xbf")


@given(st.binary(max_size=200), st.sampled_from(["a.jsonl", "a.csv"]))
def test_any_bytes_are_rows_errors_or_a_sentence(content: bytes, name: str) -> None:
    with contextlib.suppress(WhetError):
        found = imports.parse(name, content, {"prompt": "a", "completion": "b"}, "ada")
        assert found.rows == len(found.drafts) + found.error_count + len(found.repeats)


def begin(world: World, content: bytes) -> tuple[Dataset, DatasetImport]:
    with world.sessions.begin() as session:
        dataset = datasets.get_or_create(session, world.project_id, "golden")
        return dataset, imports.begin(session, dataset, "rows.jsonl", content, "ada@example.org")


def test_a_file_that_fails_at_its_last_row_leaves_nothing(world: World) -> None:
    _, record = begin(world, jsonl([*ROWS, {"prompt": "x"}]))
    with (
        pytest.raises(Unprocessable, match="row 6 has no answer; nothing was imported"),
        world.sessions.begin() as session,
    ):
        imports.finish(session, session.get_one(DatasetImport, record.id), None, "ada")
    with world.sessions() as session:
        assert session.scalar(select(func.count()).select_from(Example)) == 0
        assert session.scalar(select(func.count()).select_from(DatasetImportExample)) == 0
        assert session.get_one(DatasetImport, record.id).state == "preview"


def test_repeated_rows_are_told_and_a_build_takes_each_once(world: World) -> None:
    done = []
    for content in (jsonl([*ROWS, ROWS[0]]), jsonl([*ROWS[3:], {"prompt": "question 9", "completion": "answer 9"}])):
        _, record = begin(world, content)
        with world.sessions.begin() as session:
            done.append(imports.finish(session, session.get_one(DatasetImport, record.id), None, "ada"))
    assert [(one.rows, one.duplicates) for one in done] == [(5, 1), (3, 2)]
    with world.sessions.begin() as session:
        revision = build_revision(session, world.project_id, "golden")
        assert revisions.counts(session, revision.id)["train"] == {"imported": 6}


def test_an_import_that_repeats_a_held_out_prompt_stays_out_of_training(world: World) -> None:
    world.corrected("question 1", "wrong answer", "right answer", "held_out")
    _, record = begin(world, jsonl(ROWS))
    with world.sessions.begin() as session:
        imports.finish(session, session.get_one(DatasetImport, record.id), None, "ada")
        revision = build_revision(session, world.project_id, "golden")
    assert (revision.train_count, revision.report["left_out"]) == (4, {"nearly repeats a held-out prompt": 1})


def test_personal_data_of_an_import_is_masked_before_it_is_written(world: World) -> None:
    world.configure(pii="mask")
    _, record = begin(world, jsonl([{"prompt": "I am bob@example.com", "completion": "hello"}]))
    with world.sessions.begin() as session:
        done = imports.finish(session, session.get_one(DatasetImport, record.id), None, "ada")
        assert done.content is None
        build_revision(session, world.project_id, "golden")
    with world.sessions() as session:
        assert [(one.messages[0]["content"], one.pii) for one in session.scalars(select(Example))] == [
            ("I am [EMAIL]", ["email"])
        ]
