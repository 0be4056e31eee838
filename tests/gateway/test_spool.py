"""The spool and its tail without any process: budgets, torn ends, damage, deaths."""

import asyncio
import errno
import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import msgspec
import pytest

from services.errors import Unavailable
from services.gateway import log_spool
from services.gateway.log_spool import LogSpool
from services.gateway.spool_format import HEADER, Admitted, Final, frame, segment_numbers, segment_path, to_row
from services.gateway.spool_tail import Ended, Tail, is_dead
from services.store.base import uuid7


def admitted(text: str = "hello") -> Admitted:
    return Admitted(
        id=uuid7(), project_id=uuid7(), api_key_id=None, endpoint="/v1/chat/completions", stream=False,
        adapter_digest=None, base_digest="b", generation=1, namespace="n", session_key=None, end_user=None,
        group_key="g", tags={}, config_hash="c", started_at=1.0, messages=[{"role": "user", "content": text}],
        parameters={}, prompt_token_ids=[1, 2], prompt_hash="p", template_hash="t", tokenizer_hash="k", retrieved=[],
    )  # fmt: skip


def final(of: Admitted) -> Final:
    return Final(id=of.id, adapter_digest=None, finish_reason="stop", output="done")


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[LogSpool]:
    made = LogSpool(tmp_path, budget_bytes=10_000_000, segment_bytes=2000)
    yield made
    if not made._closing:
        made.close()


def log_one(spool: LogSpool) -> UUID:
    record = admitted()
    spool.admit(record)
    spool.finish(final(record))
    return record.id


def read_all(tail: Tail) -> list[Ended]:
    read: list[Ended] = []
    while ended := tail.read(1500):
        read += ended
        tail.keep_place()
    return read


def test_what_was_logged_is_read_once_and_its_segments_go(spool: LogSpool) -> None:
    written = [log_one(spool) for _ in range(50)]
    tail = Tail(spool.directory)
    read = read_all(tail)
    assert [ended.final.id for ended in read] == written
    assert segment_numbers(spool.directory) == [spool._number]
    assert not tail.drained


def test_a_reader_that_starts_again_repeats_only_what_it_had_not_kept(spool: LogSpool) -> None:
    written = [log_one(spool) for _ in range(10)]
    first = Tail(spool.directory)
    kept = [ended.final.id for ended in first.read(3000)]
    first.keep_place()
    first.read(3000)
    again = [ended.final.id for ended in read_all(Tail(spool.directory))]
    assert kept + again == written


def test_an_unfinished_interaction_holds_its_place_and_finishes_later(spool: LogSpool) -> None:
    long = admitted()
    spool.admit(long)
    short = [log_one(spool) for _ in range(20)]
    assert len(read_all(Tail(spool.directory))) == 20
    spool.finish(final(long))
    restarted = Tail(spool.directory)
    ids = [ended.final.id for ended in read_all(restarted)]
    assert set(ids) == {*short, long.id}
    assert restarted.orphans == []


def test_a_dead_gateways_unfinished_interaction_is_interrupted_and_its_directory_goes(spool: LogSpool) -> None:
    orphan = admitted()
    spool.admit(orphan)
    done = log_one(spool)
    assert not is_dead(spool.directory)
    spool.close()
    assert is_dead(spool.directory)
    tail = Tail(spool.directory)
    assert [ended.final.id for ended in tail.read(10_000)] == [done]
    tail.keep_place()
    (left,) = tail.read(10_000)
    assert (left.final.id, left.final.finish_reason, left.final.prompt_tokens) == (orphan.id, "interrupted", 2)
    tail.keep_place()
    tail.remove()
    assert not spool.directory.exists()


def test_records_of_version_1_are_read_and_say_nothing_of_drafts(spool: LogSpool) -> None:
    first = admitted()
    fields = msgspec.to_builtins(first) | {"version": 1}
    ending = {
        "type": "final", "id": str(first.id), "adapter_digest": None, "finish_reason": "stop", "output": "done",
        "drafted_tokens": 0, "accepted_tokens": 0, "latency_ms": 9.5,
    }  # fmt: skip
    for record in (fields, ending):
        payload = msgspec.json.encode(record)
        os.write(spool._descriptor, HEADER.pack(len(payload), zlib.crc32(payload)) + payload)
    (ended,) = read_all(Tail(spool.directory))
    row = to_row(ended.admitted, ended.final)
    assert (row["spool_version"], row["output"], row["latency_ms"]) == (1, "done", 9.5)
    assert (row["speculated"], row["speculation"], row["speculator_digest"]) == (True, None, None)


def test_what_was_drafted_is_read_back(spool: LogSpool) -> None:
    record = admitted()
    spool.admit(record)
    suffix = {"drafts": 1, "won": 1, "tried": [1, 1], "accepted": [1, 0], "lengths": [0, 0, 1]}
    told = {"speculated": False, "speculation": {"steps": 3, "suffix": suffix}, "speculator_digest": "5bec"}
    spool.finish(msgspec.structs.replace(final(record), **told))
    (ended,) = read_all(Tail(spool.directory))
    row = to_row(ended.admitted, ended.final)
    assert {name: row[name] for name in told} == told
    assert row["spool_version"] == 2


def test_a_torn_end_is_counted_and_nothing_before_it_is_lost(spool: LogSpool) -> None:
    written = [log_one(spool) for _ in range(3)]
    torn = frame(admitted())[:-7]
    os.write(spool._descriptor, torn)
    spool.close()
    tail = Tail(spool.directory)
    assert [ended.final.id for ended in read_all(tail)] == written
    assert (tail.damage.torn_records, tail.damage.bad_segments, tail.damage.lost_bytes) == (1, 0, len(torn))


def test_a_record_still_being_written_is_waited_for(spool: LogSpool) -> None:
    record = admitted()
    spool.admit(record)
    data = frame(final(record))
    os.write(spool._descriptor, data[:10])
    tail = Tail(spool.directory)
    assert tail.read(10_000) == []
    os.write(spool._descriptor, data[10:])
    assert [ended.final.id for ended in tail.read(10_000)] == [record.id]
    assert tail.damage.torn_records == 0


def test_any_flipped_bit_or_cut_recovers_to_the_first_bad_checksum_and_says_so(tmp_path: Path) -> None:
    spool = LogSpool(tmp_path, budget_bytes=1 << 30)
    records = [admitted(f"text {index}") for index in range(12)]
    frames = [(frame(record), frame(final(record))) for record in records]
    whole = b"".join(first + second for first, second in frames)
    ends = [sum(len(first + second) for first, second in frames[: count + 1]) for count in range(len(frames))]
    spool.close()
    generator = random.Random(7)
    for trial in range(300):
        data = bytearray(whole)
        place = generator.randrange(len(data))
        if trial % 2:
            data[place] ^= 1 << generator.randrange(8)
        else:
            del data[place:]
        directory = tmp_path / f"{trial:032x}"
        directory.mkdir()
        segment_path(directory, 1).write_bytes(bytes(data))
        tail = Tail(directory)
        read = []
        while not tail.drained:
            read += [ended.final.id for ended in tail.read(4000) if ended.final.finish_reason != "interrupted"]
            tail.unlanded = []
        untouched = [record.id for record, end in zip(records, ends, strict=True) if end <= place]
        assert read == untouched, (trial, place)
        clean_cut = trial % 2 == 0 and place in {0, *_boundaries(frames)}
        assert tail.damage.torn_records + tail.damage.bad_segments == (0 if clean_cut else 1), (trial, place)


def _boundaries(frames: list[tuple[bytes, bytes]]) -> set[int]:
    places, at = set(), 0
    for pair in frames:
        for part in pair:
            at += len(part)
            places.add(at)
    return places


def test_an_ending_whose_beginning_is_lost_is_set_aside(spool: LogSpool) -> None:
    lost = final(admitted())
    spool.finish(lost)
    tail = Tail(spool.directory)
    assert tail.read(10_000) == []
    assert tail.orphans == [lost]


def test_a_full_budget_refuses_new_requests_and_lets_admitted_ones_end(tmp_path: Path) -> None:
    spool = LogSpool(tmp_path, budget_bytes=5000)
    fitting = [admitted() for _ in range(5000 // len(frame(admitted())) + 1)]
    for record in fitting:
        spool.admit(record)
    with pytest.raises(Unavailable) as refused:
        spool.admit(admitted())
    assert refused.value.code == "log_spool_full"
    for record in fitting:
        spool.finish(final(record))
    spool.close()


def test_a_short_write_is_refused_and_the_next_record_goes_to_a_new_segment(
    spool: LogSpool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = log_one(spool)
    write = os.write
    monkeypatch.setattr(log_spool.os, "write", lambda descriptor, data: write(descriptor, data[:20]))
    with pytest.raises(Unavailable):
        spool.admit(admitted())
    monkeypatch.undo()
    after = log_one(spool)
    spool.close()
    tail = Tail(spool.directory)
    assert [ended.final.id for ended in read_all(tail)] == [before, after]
    assert tail.damage.torn_records == 1


def test_a_full_disk_is_refused_and_logging_goes_on_when_there_is_room(
    spool: LogSpool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(log_spool.os, "write", no_space)
        with pytest.raises(Unavailable):
            spool.admit(admitted())
    written = log_one(spool)
    assert [ended.final.id for ended in Tail(spool.directory).read(10_000)] == [written]
    assert segment_numbers(spool.directory) == [1]


def test_power_durability_waits_for_the_disk_and_process_durability_does_not(tmp_path: Path) -> None:
    async def synced(spool: LogSpool) -> int:
        count = 0
        fdatasync = os.fdatasync

        def counting(descriptor: int) -> None:
            nonlocal count
            count += 1
            fdatasync(descriptor)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(log_spool.os, "fdatasync", counting)
            spool.admit(admitted())
            await asyncio.wait_for(spool.durable(), 5)
            return count

    power = LogSpool(tmp_path / "a", budget_bytes=1 << 20, durability="power")
    assert asyncio.run(synced(power)) >= 1
    power.close()


def test_a_failed_sync_is_told_to_who_waits_and_the_segment_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    spool = LogSpool(tmp_path, budget_bytes=1 << 20, durability="power")
    monkeypatch.setattr(log_spool.os, "fdatasync", broken)

    async def wait() -> None:
        spool.admit(admitted())
        await asyncio.wait_for(spool.durable(), 5)

    with pytest.raises(Unavailable):
        asyncio.run(wait())
    monkeypatch.undo()
    spool.admit(admitted())
    assert segment_numbers(spool.directory) == [1, 2]
    spool.close()


def test_a_directory_that_goes_during_the_scan_counts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gone", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "here" / "segment").write_bytes(b"12345")
    scan = os.scandir

    def scan_after_the_shipper(path: str | Path) -> Iterator[os.DirEntry[str]]:
        if Path(path).name == "gone":
            Path(path).rmdir()
        return scan(path)

    monkeypatch.setattr(os, "scandir", scan_after_the_shipper)
    assert log_spool.scan_bytes(tmp_path) == 5
    assert not (tmp_path / "gone").exists()
    assert log_spool.scan_bytes(tmp_path / "never") == 0


def test_an_unexpected_error_while_syncing_fails_who_waits_and_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[bool] = []

    def break_down(broken: LogSpool) -> None:
        if broken._waiters:
            raise ValueError("unexpected")

    monkeypatch.setattr(log_spool, "_end_process", lambda: ended.append(True))
    monkeypatch.setattr(LogSpool, "_sync", break_down)
    spool = LogSpool(tmp_path, budget_bytes=10_000_000, durability="power")
    with pytest.raises(Unavailable, match="could not be logged durably"):
        asyncio.run(asyncio.wait_for(spool.durable(), 5))
    spool.close()
    assert ended == [True]
