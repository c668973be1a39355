"""The journal: all comes back, a torn end is left out, no edit passes, one process at a time, no disk stops it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splitwise_llm.engine import chain
from splitwise_llm.engine.boundaries import Boundaries
from splitwise_llm.engine.chain import Chain
from splitwise_llm.engine.journal import EVENTS_KEPT, Decided, Entry, Journal, Saved, check, read_journal
from splitwise_llm.errors import BrokenInvariant, JournalError
from splitwise_llm.model.sampling import Sampling
from splitwise_llm.wire.codec import ElementLoss

ENTRY = Entry(
    session="5e55",
    fingerprint="f1",
    protocol=3,
    prompt=(7, 8, 9),
    max_new_tokens=20,
    stop_ids=(2,),
    sampling=Sampling(0.7, 40, 0.9, -(2**63)),
    loss=ElementLoss(0.25, 4),
    workers={"cloud": "host:1"},
    options={"model": "bundled", "policy": "drift", "chunk": None, "links": [["cloud", "lte"]], "limits": {"a": 1.5}},
)
U = Decided(run=1, partition="edge[0:1] cloud[1:3] edge[3:4]", wire="bf16", prefill_chunk=64, position=0, why="given")


def boundaries() -> Boundaries:
    return Boundaries(8, 1 << 20)


def begun(path: Path, tokens: int = 3, entry: Entry = ENTRY) -> Journal:
    journal = Journal.create(path, entry, boundaries())
    journal.decide(U)
    for token in range(tokens):
        journal.token(100 + token)
    return journal


def small(path: Path) -> bytes:
    """The bytes of a journal with every kind of record but the last one's."""
    journal = begun(path, 1)
    journal.event("link", 'cloud: "reset"\nby peer — \udcff')
    journal.token(5)
    journal.close()
    resumed = Journal.continue_from(read_journal(path), path, boundaries())
    resumed.token(6)
    resumed.close()
    return path.read_bytes()


def lines(data: bytes) -> list[bytes]:
    return data.splitlines(keepends=True)


def told(saved: Saved) -> tuple[object, ...]:
    return saved.entry, saved.tokens, saved.decisions, saved.events, saved.resumed, saved.finished


acts = st.lists(
    st.tuples(st.just("token"), st.integers(0, 2**31 - 1))
    | st.tuples(st.just("event"), st.text(max_size=20), st.text(max_size=50))
    | st.tuples(st.just("decide"), st.integers(0, 9), st.text(max_size=9), st.none() | st.integers(1, 99)),
    max_size=20,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(acts, acts, st.text(min_size=1, max_size=9))
def test_what_was_told_before_and_after_a_resume_is_read_again(
    tmp_path: Path, before: list[tuple], after: list[tuple], reason: str
) -> None:
    path = tmp_path / "j"
    path.unlink(missing_ok=True)

    def play(journal: Journal, acts: list[tuple]) -> None:
        for kind, *what in acts:
            if kind == "token" and len(journal.tokens) < ENTRY.max_new_tokens:
                journal.token(*what)
            elif kind == "event":
                journal.event(*what)
            elif kind == "decide":
                journal.decide(Decided(what[0], what[1], "fp32", what[2], len(journal.ids), "because"))
        journal.close()
        journal.close()

    def agree(journal: Journal, saved: Saved) -> None:
        assert saved.ids == journal.ids == [*ENTRY.prompt, *journal.tokens]
        assert [token.at_s for token in saved.tokens] == journal.times_s == sorted(journal.times_s)
        assert list(saved.decisions) == journal.decisions
        assert list(saved.events) == list(journal.events)
        assert (saved.entry, saved.finished, saved.note) == (journal.entry, journal.finished, "")
        assert saved.last_run == max([decided.run for decided in journal.decisions], default=0)

    journal = Journal.create(path, ENTRY, boundaries())
    play(journal, before)
    agree(journal, read_journal(path))
    resumed = Journal.continue_from(read_journal(path), path, boundaries())
    assert (resumed.ids, resumed.times_s, resumed.decisions) == (journal.ids, journal.times_s, journal.decisions)
    resumed.finish(reason)
    with pytest.raises(BrokenInvariant, match="finished"):
        resumed.token(1)
    resumed.close()
    assert read_journal(path).finished == reason
    path.write_bytes(b"".join(lines(path.read_bytes())[:-2]))  # without the resume and the end
    resumed = Journal.continue_from(read_journal(path), path, boundaries())
    play(resumed, after)
    agree(resumed, read_journal(path))
    assert read_journal(path).resumed == 1


def test_a_journal_in_memory_needs_no_file() -> None:
    journal = Journal(ENTRY, boundaries())
    journal.decide(U)
    journal.token(4)
    for _ in range(2 * EVENTS_KEPT):
        journal.event("link", "lost")
    journal.finish("stop")
    journal.close()
    assert (journal.ids, journal.path, journal.failed, len(journal.events)) == ([7, 8, 9, 4], None, "", EVENTS_KEPT)


# What was read is what was written, or it is refused


def test_a_record_torn_at_any_byte_is_left_out_and_the_session_goes_on_without_it(tmp_path: Path) -> None:
    path = tmp_path / "j"
    data = small(path)
    *_, last = lines(data)
    whole = data[: -len(last)]
    path.write_bytes(whole)
    without = read_journal(path)
    for size in range(1, len(last)):
        path.write_bytes(whole + last[:size])
        saved = read_journal(path)
        assert told(saved) == told(without)
        assert f"{size} bytes" in saved.note
        journal = Journal.continue_from(saved, path, boundaries())
        journal.token(6)
        journal.close()
        assert read_journal(path).ids == [7, 8, 9, 100, 5, 6]
        assert read_journal(path).note == ""


def test_zeros_that_a_lost_power_left_at_the_end_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "j"
    data = small(path)
    path.write_bytes(data + bytes(4096))
    assert read_journal(path).ids == [7, 8, 9, 100, 5, 6]
    path.write_bytes(data[:-9] + bytes(4096))
    assert read_journal(path).ids == [7, 8, 9, 100, 5]


def test_no_edit_of_a_single_byte_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "j"
    data = small(path)
    last = len(data) - len(lines(data)[-1])
    records = chain.sound(data, "j").records
    refused = 0
    for at in range(len(data)):
        for byte in (*range(256), None):
            new = b"" if byte is None else bytes([byte])
            if new == data[at : at + 1]:
                continue
            try:
                found = chain.sound(data[:at] + new + data[at + 1 :], "j")
            except JournalError:
                refused += 1
                continue
            assert at >= last, f"byte {at} became {new!r}"
            assert found.records == records[:-1]
            assert found.torn_bytes
    assert refused >= 256 * last


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows: rows[:2] + rows[3:], "record 3 at byte"),
        (lambda rows: rows[:1] + rows[2:1:-1] + rows[3:], "record 2 at byte"),
        (lambda rows: rows[:3] + rows[2:], "record 2 at byte"),
        (lambda rows: [*rows[:2], rows[2].replace(b"100", b"101"), *rows[3:]], "record 2 with a wrong checksum"),
        (lambda rows: [*rows[:2], rows[2][:20], *rows[3:]], "record 3 at byte"),
        (lambda rows: [*rows[:2], rows[2][:20] + b"\n", *rows[3:]], "no whole record at byte"),
        (lambda rows: rows[1:], "does not begin with a whole record"),
        (lambda rows: [rows[0][:-1]], "does not begin with a whole record"),
        (lambda rows: [b"once upon a time\n"], "does not begin with a whole record"),
        (lambda rows: [b"once upon a time\n", b"there was\n"], "does not begin with a whole record"),
        (lambda rows: [bytes(range(256))], "does not begin with a whole record"),
        (lambda rows: [], "is empty"),
    ],
)
def test_a_journal_that_was_cut_or_edited_says_where_and_what_to_do(
    tmp_path: Path, change: Callable[[list[bytes]], list[bytes]], says: str
) -> None:
    path = tmp_path / "j"
    rows = lines(small(path))
    path.write_bytes(b"".join(change(rows)))
    with pytest.raises(JournalError, match=says) as raised:
        read_journal(path)
    assert "begin anew" in str(raised.value) or "can be resumed" in str(raised.value)
    if "can be resumed" in str(raised.value):
        path.write_bytes(path.read_bytes()[: int(str(raised.value).split("its first ")[1].split()[0])])
        assert read_journal(path).tokens == read_journal(path).tokens[: len(rows)]


def forged(path: Path, *records: bytes) -> Path:
    """A file of sound checksums and any records."""
    path.unlink(missing_ok=True)
    file = Chain.create(path, records[0])
    for record in records[1:]:
        file.append(record)
    file.close()
    return path


@pytest.mark.parametrize(
    ("records", "says"),
    [
        ([b'{"record":"token","id":4,"position":5,"at_s":0.1}'], "position 5, expected 3"),
        ([b'{"record":"token","id":4,"position":3,"at_s":0.1}'] * 2, "position 3, expected 4"),
        ([b'{"record":"token","id":-4,"position":3,"at_s":0.1}'], ">= 0"),
        ([b'{"record":"token","id":4,"position":3}'], "at_s"),
        ([b'{"record":"token","id":4,"position":3,"at_s":0.1,"more":1}'], "unknown field `more`"),
        ([b'{"record":"dance","at_s":0.1}'], "dance"),
        ([b'{"record":"event","kind":"\xff"}'], "utf-8|UTF-8|decode"),
        ([b'{"record":"finished","reason":"stop","at_s":1}', b'{"record":"event","kind":"late"}'], "behind the end"),
        ([msgspec.json.encode(ENTRY)], "second opening"),
    ],
)
def test_records_that_cannot_be_are_refused_though_their_checksums_are_right(
    tmp_path: Path, records: list[bytes], says: str
) -> None:
    path = forged(tmp_path / "j", msgspec.json.encode(ENTRY), *records)
    with pytest.raises(JournalError, match=says):
        read_journal(path)


def test_more_tokens_than_were_asked_for_are_refused(tmp_path: Path) -> None:
    journal = begun(tmp_path / "j", 1, msgspec.structs.replace(ENTRY, max_new_tokens=1))
    journal.token(3)
    journal.close()
    with pytest.raises(JournalError, match="1 tokens at most"):
        read_journal(tmp_path / "j")


@pytest.mark.parametrize(
    ("opening", "says"),
    [
        (b'{"some":"json"}', "no journal of a session"),
        (b"{nonsense}", "no journal of a session"),
        (b'{"record":"token","id":4,"position":3,"at_s":0.1}', "no journal of a session"),
        (b'{"record":"opening","journal":2,"all":"else"}', "format 2, this version reads 1"),
        (b'{"record":"opening","journal":1}', "missing required field"),
        (msgspec.json.encode(msgspec.structs.replace(ENTRY, prompt=())), "no prompt"),
        (msgspec.json.encode(ENTRY).replace(b'"top_p":0.9', b'"top_p":9.0'), "top-p is 9.0"),
    ],
)
def test_another_kind_or_version_of_file_is_named(tmp_path: Path, opening: bytes, says: str) -> None:
    with pytest.raises(JournalError, match=says):
        read_journal(forged(tmp_path / "j", opening))


def test_a_journal_of_another_model_or_protocol_is_refused_by_name(tmp_path: Path) -> None:
    begun(tmp_path / "j").close()
    saved = read_journal(tmp_path / "j")
    check(saved, "f1", 3)
    with pytest.raises(JournalError, match=r"ran model f1, this one is f2; .*\(bundled\)"):
        check(saved, "f2", 3)
    with pytest.raises(JournalError, match="protocol version 3, this is 4"):
        check(saved, "f1", 4)


@pytest.mark.parametrize("options", [{"a": float("inf")}, {"a": (1, 2)}, {"a": object()}])
def test_an_opening_that_would_not_be_read_again_is_our_own_fault(tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises(BrokenInvariant, match="plain data"):
        begun(tmp_path / "j", entry=msgspec.structs.replace(ENTRY, options=options))
    assert not (tmp_path / "j").exists()


# One process at a time


WRITER = """
    import sys, time
    from pathlib import Path
    from splitwise_llm.engine.boundaries import Boundaries
    from splitwise_llm.engine.journal import Entry, Journal
    entry = Entry("5e55", "f1", 3, (7, 8, 9), 100000)
    journal = Journal.create(Path(sys.argv[1]), entry, Boundaries(8, 1000))
    for token in range(100000):
        journal.token(token)
        print(token, flush=True)
        time.sleep(0.0005)
"""


def test_a_live_process_keeps_its_journal_and_a_killed_one_loses_no_token_that_was_printed(tmp_path: Path) -> None:
    path = tmp_path / "j"
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout
        for _ in range(20):
            writer.stdout.readline()
        live = read_journal(path, live=True)
        assert len(live.tokens) >= 20
        for use in (
            lambda: read_journal(path),
            lambda: Journal.continue_from(live, path, boundaries()),
            lambda: Journal.create(path, ENTRY, boundaries(), replace=True),
        ):
            with pytest.raises(JournalError, match=f"in use by process {writer.pid}"):
                use()
        os.kill(writer.pid, signal.SIGKILL)
        printed = 20 + len(writer.stdout.readlines())
    saved = read_journal(path)
    assert len(saved.tokens) >= printed
    journal = Journal.continue_from(saved, path, boundaries())
    with pytest.raises(JournalError, match=f"in use by process {os.getpid()}"):
        read_journal(path)
    journal.close()
    assert read_journal(path).resumed == 1


def test_a_journal_that_somebody_else_went_on_with_is_not_cut_back(tmp_path: Path) -> None:
    path = tmp_path / "j"
    begun(path).close()
    stale = read_journal(path)
    other = Journal.continue_from(stale, path, boundaries())
    other.token(1)
    other.close()
    with pytest.raises(JournalError, match="changed since it was read"):
        Journal.continue_from(stale, path, boundaries())
    assert read_journal(path).ids[-1] == 1


def test_a_finished_session_is_not_gone_on_with(tmp_path: Path) -> None:
    journal = begun(tmp_path / "j")
    journal.finish("stop")
    with pytest.raises(BrokenInvariant, match="finishes once"):
        journal.finish("again")
    journal.event("link", "lost while saying good-bye")
    journal.close()
    journal.event("link", "closed")
    saved = read_journal(tmp_path / "j")
    assert (saved.finished, saved.events, len(journal.events)) == ("stop", (), 2)
    with pytest.raises(JournalError, match=r"has finished \(stop\)"):
        Journal.continue_from(saved, tmp_path / "j", boundaries())


def test_what_exists_is_replaced_only_on_demand_and_only_if_it_is_a_journal(tmp_path: Path) -> None:
    path, text = tmp_path / "j", tmp_path / "letter"
    journal = begun(path)
    journal.finish("stop")
    journal.close()
    before = path.read_bytes()
    with pytest.raises(JournalError, match="exists; name another file, or say"):
        begun(path)
    assert path.read_bytes() == before
    path.chmod(0o644)
    Journal.create(path, ENTRY, boundaries(), replace=True).close()
    assert read_journal(path).tokens == ()
    assert path.stat().st_mode & 0o777 == 0o600
    text.write_text("Dear Ada,\nhow are you?\n")
    with pytest.raises(JournalError, match="no journal and is not replaced"):
        Journal.create(text, ENTRY, boundaries(), replace=True)
    assert text.read_text().startswith("Dear")
    text.write_text("")
    begun(text).close()  # an empty file is nobody's


def test_a_journal_is_for_its_owner_only(tmp_path: Path) -> None:
    begun(tmp_path / "j").close()
    assert (tmp_path / "j").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("name", "says"),
    [("none/j", "No such file"), ("", "directory|no regular"), ("fifo", "no regular file")],
)
def test_a_place_where_no_journal_can_be_is_named(tmp_path: Path, name: str, says: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(JournalError, match=says):
        begun(tmp_path / name)
    with pytest.raises(JournalError, match=says):
        read_journal(tmp_path / name)


# Disks


LIMITED = """
    import resource, sys
    from pathlib import Path
    from splitwise_llm.engine.boundaries import Boundaries
    from splitwise_llm.engine.journal import Entry, Journal
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    journal = Journal.create(Path(sys.argv[1]), Entry("5e55", "f1", 3, (7, 8, 9), 500), Boundaries(8, 1000))
    for token in range(500):
        journal.token(token)
    assert list(journal.tokens) == list(range(500))
    assert "no longer written: File too large" in journal.failed, journal.failed
    assert [event.kind for event in journal.events] == ["journal"]
    journal.finish("length")
    journal.close()
"""


def test_the_generation_goes_on_when_the_file_may_grow_no_more_and_what_is_written_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "j"
    subprocess.run([sys.executable, "-c", textwrap.dedent(LIMITED), str(path)], check=True, timeout=60)
    saved = read_journal(path)
    assert saved.note == ""
    assert 10 < len(saved.tokens) < 40
    assert [token.id for token in saved.tokens] == list(range(len(saved.tokens)))
    assert path.stat().st_size > 1900


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("gets", [0, 1, 30])
def test_a_write_that_fails_half_way_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, gets: int
) -> None:
    journal, write, room = begun(tmp_path / "j", 2), os.write, [gets]

    def full(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(error, os.strerror(error))
        size = write(descriptor, data[: room[0]])
        room[0] -= size
        return size

    monkeypatch.setattr(os, "write", full)
    for token in range(5):
        journal.token(token)
    assert journal.ids == [7, 8, 9, 100, 101, 0, 1, 2, 3, 4]
    assert os.strerror(error) in journal.failed
    assert [(event.kind, event.text) for event in journal.events] == [("journal", journal.failed)]
    journal.close()
    saved = read_journal(tmp_path / "j")
    assert (saved.ids, saved.note) == ([7, 8, 9, 100, 101], "")


def test_a_disk_that_is_full_at_once_is_said_before_the_session_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    begun(tmp_path / "old").close()
    old = read_journal(tmp_path / "old")
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(JournalError, match="No space left"):
        begun(tmp_path / "j")
    journal = Journal.continue_from(old, tmp_path / "old", boundaries())  # but a resume gives the text
    journal.token(1)
    assert "No space left" in journal.failed
    journal.close()


def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.005)
    pytest.fail("it did not come to pass in 5 s")


def test_records_are_synced_soon_and_not_by_the_one_who_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[float] = []
    monkeypatch.setattr(chain, "SYNC_PERIOD_S", 0.02)
    journal = begun(tmp_path / "j", 1)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (time.sleep(0.2), synced.append(time.monotonic())))
    time.sleep(0.5)
    synced.clear()
    start = time.monotonic()
    journal.token(1)
    assert time.monotonic() - start < 0.15
    until(lambda: len(synced) == 1)
    time.sleep(0.3)
    assert len(synced) == 1  # nothing new
    journal.token(1)
    journal.close()
    assert len(synced) >= 2
    assert synced[-1] > start


def test_a_disk_that_cannot_sync_is_a_journal_no_longer_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "SYNC_PERIOD_S", 0.01)
    journal = begun(tmp_path / "j", 1)

    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    journal.token(1)
    until(lambda: bool(journal.failed))
    journal.token(2)
    assert "Input/output error" in journal.failed
    assert [event.kind for event in journal.events] == ["journal"]
    journal.close()


def test_a_wall_clock_that_was_set_back_does_not_turn_the_journal_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = begun(tmp_path / "j", 2)
    journal.close()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    resumed = Journal.continue_from(read_journal(tmp_path / "j"), tmp_path / "j", boundaries())
    resumed.token(1)
    resumed.close()
    assert resumed.times_s == sorted(resumed.times_s)
    assert [token.at_s for token in read_journal(tmp_path / "j").tokens] == resumed.times_s


def test_no_descriptor_and_no_thread_stays_behind(tmp_path: Path) -> None:

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    before = held()
    for number in range(5):
        path = tmp_path / f"j{number}"
        begun(path).close()
        Journal.continue_from(read_journal(path), path, boundaries()).close()
        with pytest.raises(JournalError):
            begun(path)
        with pytest.raises(JournalError):
            read_journal(tmp_path)
    assert held() == before
