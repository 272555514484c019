"""Section 10: what survives a kill, a full disk and a damaged file; and that it costs the same for each chunk"""

import contextlib
import errno
import importlib
import itertools
import json
import os
import pickle
import random
import re
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from decimal import Decimal

import pytest
import responses
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import sheepsse
from conftest import HANG, cpu_seconds, in_another_thread, read
from sheepsse import Chunk, Completion, StreamInterrupted, ToolCall, Usage

section = sheepsse if hasattr(sheepsse, "Checkpoints") else importlib.import_module("section10")

Checkpoints, CheckpointError = section.Checkpoints, section.CheckpointError
Journal, record, replay = section._Journal, section.record, section.replay
fields_of = section._chunk_fields

#: each field in use, line ends and what is no ASCII among them
FULL = [
    Chunk(id="c1", model="m"),
    Chunk(text="Grüße, 世界 🐑\n\r\u2028\x00", event_id="7"),
    Chunk(reasoning="hm", refusal="no", index=1),
    Chunk(tool_calls=(ToolCall(1, "call", "look", '{"a'), ToolCall(2)), vendor={"anthropic": [{"signature": "s"}]}),
    Chunk(finish_reason="end_turn", finish="stop", usage=Usage(1, 2, 3, 4, 5, 6, Decimal("0.000120"))),
]


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "journal")


def pieces(count):
    """A generated answer"""
    return [Chunk(text=f"wörd {number} ") for number in range(count)]


def write(path, chunks, finish=True):
    with Journal.open(path) as journal:
        for chunk in chunks:
            journal.write([fields_of(chunk)])
        if finish:
            journal.finish()


def content(path):
    with open(path, "rb") as file:
        return file.read()


def saved(path):
    """The chunks of a journal and whether it is complete, as the next run finds them"""
    with Journal.open(path) as journal:
        return journal.chunks, journal.complete


def life(work, until=None):
    """Runs work in a process of its own, which is killed after some seconds; gives the signal or the exit status"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: this one only writes files
        child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    if until is not None:
        time.sleep(until)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


# What a journal keeps


def texts():
    return st.text(st.characters(), max_size=8)  # lone surrogates too


def optional(strategy):
    return st.none() | strategy


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | texts(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts(), inner, max_size=3),
    max_leaves=5,
)
COUNTS = st.integers(0, 2**40)
USAGES = st.builds(
    Usage, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS, optional(st.decimals(allow_nan=False)), texts()
)
CHUNKS = st.builds(
    Chunk,
    text=texts(),
    reasoning=texts(),
    refusal=texts(),
    tool_calls=st.lists(st.builds(ToolCall, COUNTS, texts(), texts(), texts()), max_size=2).map(tuple),
    finish_reason=optional(texts()),
    finish=optional(texts()),
    usage=optional(USAGES),
    index=COUNTS,
    event_id=texts(),
    raw=optional(st.just({"raw": "is not kept"})),
    id=texts(),
    model=texts(),
    vendor=optional(st.dictionaries(texts(), JSON_VALUES, max_size=3)),
)


#: One file will do for all examples, and a busy machine is slow
SLOW_FILES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=100, suppress_health_check=SLOW_FILES)
@example(FULL)
@example([Chunk(text="\ud83d\ude00"), Chunk(text="\U0001f600"), Chunk(), Chunk(usage=Usage(cost=Decimal("1E+3")))])
@given(st.lists(CHUNKS, max_size=4))
def test_all_of_a_chunk_but_its_raw_form_comes_back_exactly(path, chunks):
    given_on = list(record(chunks, path))
    came = list(replay(path))
    assert given_on == chunks
    assert came == [chunk._replace(raw=None) for chunk in chunks]
    assert [repr(c.usage) for c in came] == [repr(c.usage) for c in chunks]  # a Decimal's digits, too
    assert [type(part) for c in came for part in c] == [type(part) for c in chunks for part in c._replace(raw=None)]


def test_each_line_is_json_and_a_checksum_of_all_so_far(path):
    write(path, FULL[:2])
    lines = content(path).split(b"\n")[:-1]
    assert [json.loads(line[:-9]) for line in lines] == [
        {"sheepsse": 1},
        {"id": "c1", "model": "m"},
        {"text": FULL[1].text, "event_id": "7"},
        {"complete": True},
    ]
    checksum = 0
    for line in lines:
        checksum = zlib.crc32(line[:-9], checksum)
        assert line[-9:] == b" %08x" % checksum


@pytest.mark.parametrize("order", [(0, 2, 1, 3, 4), (0, 1, 3, 4), (0, 1, 2, 2, 3, 4), (1, 2, 3, 4)])
def test_whole_lines_lost_doubled_or_in_another_order_are_damage(path, order):
    write(path, pieces(3))
    lines = content(path).split(b"\n")[:-1]
    with open(path, "wb") as file:
        file.write(b"".join(lines[number] + b"\n" for number in order))
    with pytest.raises(CheckpointError):
        Journal.open(path)


def test_an_unfinished_journal_is_gone_on_with(path):
    write(path, FULL[:2], finish=False)
    with Journal.open(path) as journal:
        assert (journal.chunks, journal.complete) == (FULL[:2], False)
        for chunk in FULL[2:]:
            journal.write([fields_of(chunk)])
        journal.finish()
        assert journal.complete
    assert saved(path) == (FULL, True)


def test_a_journal_without_a_chunk_is_an_empty_file_and_goes_on_as_a_new_one(path):
    write(path, [], finish=False)
    assert content(path) == b""
    write(path, FULL)
    assert saved(path) == (FULL, True)


def test_restart_gives_up_what_was_saved_for_something_newer_and_keeps_the_lock(path):
    write(path, FULL, finish=False)
    before = content(path)
    with Journal.open(path) as journal:
        journal.restart()
        assert (journal.chunks, journal.complete, content(path)) == ([], False, before)
        with pytest.raises(CheckpointError, match="in use"):
            Journal.open(path)
        journal.write([fields_of(FULL[0])])
        journal.restart()
        journal.write([fields_of(FULL[1])])
        journal.finish()
    assert saved(path) == ([FULL[1]], True)


def test_refresh_gives_up_what_was_saved_only_for_something_newer(path):
    write(path, FULL)
    with Journal.open(path, refresh=True) as journal:
        assert (journal.chunks, journal.complete) == ([], False)
    assert saved(path) == (FULL, True)
    with Journal.open(path, refresh=True) as journal:
        journal.write([fields_of(FULL[0])])
    assert saved(path) == (FULL[:1], False)


def test_nothing_can_be_put_after_the_end(path):
    with Journal.open(path) as journal:
        journal.finish()
        for more in (lambda: journal.write([fields_of(FULL[0])]), journal.finish):
            with pytest.raises(CheckpointError, match="complete or closed"):
                more()
    with Journal.open(path) as journal, pytest.raises(CheckpointError, match="complete or closed"):
        journal.write([fields_of(FULL[0])])
    assert saved(path) == ([], True)


def test_a_journal_may_be_closed_twice_and_takes_nothing_then(path):
    journal = Journal.open(path)
    journal.close()
    journal.close()
    with pytest.raises(CheckpointError, match="closed"):
        journal.write([fields_of(FULL[0])])


def test_a_chunk_that_is_no_json_is_an_error_that_leaves_the_journal_good(path):
    deep = {}
    for _ in range(100_000):
        deep = {"": deep}
    with Journal.open(path) as journal:
        for vendor in ({"a": object()}, deep):
            with pytest.raises(CheckpointError, match="JSON"):
                journal.write([fields_of(Chunk(vendor=vendor))])
        journal.write([fields_of(FULL[0])])
    assert saved(path) == (FULL[:1], False)
    while deep:  # a chain this long must not be freed at once, by 3.8
        deep = deep.pop("")


# Record and replay


def test_record_gives_a_chunk_on_only_when_it_is_kept(path):
    for number, _ in enumerate(record(iter(FULL), path), 1):
        came, error = read(replay(path))
        assert came == FULL[:number]
        assert isinstance(error, StreamInterrupted)
    assert read(replay(path)) == (FULL, None)


def test_what_ended_with_an_error_is_kept_but_not_complete(path):
    def failing():
        yield from FULL[:2]
        raise StreamInterrupted("lost")

    came, error = read(record(failing(), path))
    assert (came, str(error)) == (FULL[:2], "lost")
    came, error = read(replay(path))
    assert came == FULL[:2]
    assert isinstance(error, StreamInterrupted)
    assert error.partial == sheepsse.collect(FULL[:2])._replace(complete=False)
    assert error.resume_point.event_id == "7"


def test_what_is_left_early_is_kept_but_not_complete(path):
    chunks = record(FULL, path)
    next(chunks)
    chunks.close()
    came, error = read(replay(path))
    assert came == FULL[:1]
    assert isinstance(error, StreamInterrupted)


def test_record_makes_the_file_anew_and_never_passes_the_old_one_off_as_new(path):
    list(record(FULL, path))
    with pytest.raises(ZeroDivisionError):
        list(record((1 / 0 for _ in FULL), path))
    came, error = read(replay(path))
    assert came == []
    assert isinstance(error, StreamInterrupted)


def test_an_empty_answer_that_was_whole_is_whole(path):
    assert list(record([], path)) == []
    assert list(replay(path)) == []


def test_nothing_recorded_is_an_error_that_says_so(path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        list(replay(path))


def test_record_and_replay_take_paths(tmp_path):
    assert list(record(FULL, tmp_path / "new" / "a")) == list(replay(tmp_path / "new" / "a")) == FULL


# Whose it is


@pytest.mark.parametrize("mask", [0, 0o077])
def test_files_are_for_their_owner_alone_whatever_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        store = Checkpoints(tmp_path / "store")
        store.save("a", "text")
        write(str(tmp_path / "other" / "journal"), FULL)
    finally:
        os.umask(before)
    for folder in ("store", "other"):
        assert stat.S_IMODE((tmp_path / folder).stat().st_mode) == 0o700
        (file,) = (tmp_path / folder).iterdir()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_file_holds_neither_prompt_nor_key(tmp_path):
    store = Checkpoints(tmp_path)
    key = store.key("a-secret-prompt", model="m", api_key="sk-secret-key", headers={"Authorization": "sk-secret-key"})
    with section._as_checkpoint(tmp_path).open(key) as journal:
        journal.write([fields_of(Chunk(text="answer", raw={"prompt": "a-secret-prompt"}))])
    (file,) = tmp_path.iterdir()
    assert file.name == f"{key}.jsonl"
    assert b"secret" not in file.read_bytes()
    assert b"answer" in file.read_bytes()


def test_a_second_thread_is_refused_at_once(path):
    with Journal.open(path) as journal:
        journal.write([fields_of(FULL[0])])
        errors = []

        def other():
            with pytest.raises(CheckpointError) as caught:
                Journal.open(path)
            errors.append(caught.value)

        with in_another_thread(other):
            pass  # it ends while the journal is held
        journal.write([fields_of(FULL[1])])
    assert re.search("in use by another process or thread", str(errors[0]))
    assert path in str(errors[0])
    assert errors[0].retryable
    assert saved(path) == (FULL[:2], False)


OTHER = """
import sys, sheepsse, importlib
section = sheepsse if hasattr(sheepsse, "Checkpoints") else importlib.import_module("section10")
journal = section._Journal.open(sys.argv[1])
print("open", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_at_once_and_welcome_when_the_first_was_killed(path):
    command = [sys.executable, "-W", "ignore", "-c", OTHER, path]
    folders = os.pathsep.join([os.path.dirname(section.__file__), os.path.dirname(sheepsse.__file__)])
    environment = {**os.environ, "PYTHONPATH": folders}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as other:
        try:
            assert other.stdout.readline() == b"open\n"
            with pytest.raises(CheckpointError, match="in use"):
                Journal.open(path)
            with pytest.raises(CheckpointError, match="in use"):
                list(record(FULL, path))
        finally:
            other.kill()
    write(path, FULL)
    assert saved(path) == (FULL, True)


def test_a_complete_one_is_read_by_many_at_once_and_while_it_is_written_anew(path):
    write(path, FULL)
    with Journal.open(path), Journal.open(path, refresh=True):
        assert saved(path) == (FULL, True)
        assert list(replay(path)) == FULL


def test_a_fork_that_closes_its_copy_does_not_end_the_lock(path):
    with Journal.open(path) as journal:
        assert life(journal.close) == 0
        with pytest.raises(CheckpointError, match="in use"):
            Journal.open(path)


def test_a_fork_that_lives_on_does_not_hold_the_lock(path):
    journal = Journal.open(path)
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    try:
        journal.close()
        assert saved(path) == ([], False)
    finally:
        os.close(writer)
        os.close(reader)
        os.waitpid(child, 0)


def test_a_process_that_did_not_open_it_does_not_unlock_it(path, monkeypatch):
    unlocked = []
    monkeypatch.setattr(section, "_unlock", unlocked.append)
    journal = Journal.open(path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: 0)
        journal.close()
    assert unlocked == []
    Journal.open(path).close()
    assert len(unlocked) == 1


@pytest.mark.parametrize("instead", ["nothing", "another"])
def test_a_file_that_is_gone_when_it_is_locked_is_not_written(path, monkeypatch, instead):
    lock = section._lock
    removals = iter([True])

    def removed_first(file):
        if next(removals, False):
            os.unlink(path)
            if instead == "another":
                write(path, FULL[:2], finish=False)
        lock(file)

    monkeypatch.setattr(section, "_lock", removed_first)
    with Journal.open(path) as journal:
        assert journal.chunks == ([] if instead == "nothing" else FULL[:2])
        for chunk in FULL[len(journal.chunks) :]:
            journal.write([fields_of(chunk)])
        journal.finish()
    assert saved(path) == (FULL, True)


def test_a_file_that_is_gone_when_it_is_locked_to_be_removed_is_no_error(tmp_path, monkeypatch):
    store, lock, removals = Checkpoints(tmp_path), section._lock, iter([True])
    store.save("a", "b")
    (path,) = tmp_path.iterdir()

    def removed_first(file):
        if next(removals, False):
            os.unlink(path)
        lock(file)

    monkeypatch.setattr(section, "_lock", removed_first)
    store.clear("a")
    assert list(tmp_path.iterdir()) == []


def test_one_that_became_complete_before_it_was_locked_is_read_and_not_held(path, monkeypatch):
    lock = section._lock
    finishes = iter([True])

    def finished_first(file):
        if next(finishes, False):
            write(path, FULL)
        lock(file)

    monkeypatch.setattr(section, "_lock", finished_first)
    with Journal.open(path) as journal:
        assert (journal.chunks, journal.complete) == (FULL, True)
        Journal.open(path, refresh=True).close()


class _Windows:
    """msvcrt, as far as it is asked: a byte that one opening of a file has at a time"""

    LK_NBLCK, LK_UNLCK = 2, 0

    def __init__(self):
        self.locked = {}
        self.positions = set()

    def locking(self, descriptor, mode, count):
        place = (os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR), count)
        self.positions.add(place[1])
        if mode == self.LK_UNLCK:
            assert self.locked.pop(place) == descriptor
        elif place in self.locked:
            raise PermissionError(errno.EACCES, "Permission denied")
        else:
            self.locked[place] = descriptor


def test_windows_locks_a_byte_that_no_reader_wants(path, monkeypatch):
    windows = _Windows()
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", windows)
    monkeypatch.setattr(section, "_CAN_REPLACE_OPEN", False)
    with Journal.open(path) as journal:
        journal.write([fields_of(FULL[0])])
        with pytest.raises(CheckpointError, match="in use"):
            Journal.open(path)
        journal.write([fields_of(FULL[1])])
    assert windows.locked == {}
    assert windows.positions == {2**31 - 2}
    assert saved(path) == (FULL[:2], False)
    assert content(path).startswith(b'{"sheepsse":1} ')


def test_windows_has_a_file_closed_before_it_is_replaced_or_removed(tmp_path, monkeypatch):
    opened = section._open
    files = []

    def noted(*arguments):
        file = opened(*arguments)
        files.append(file)
        return file

    def all_closed(function):
        def checked(*names):
            assert all(file is None or file.closed for file in files)
            function(*names)

        return checked

    monkeypatch.setattr(section, "_CAN_REPLACE_OPEN", False)
    monkeypatch.setattr(section, "_open", noted)
    monkeypatch.setattr(os, "replace", all_closed(os.replace))
    monkeypatch.setattr(os, "unlink", all_closed(os.unlink))
    store = Checkpoints(tmp_path)
    store.save("a", "text")
    assert store.load("a").text == "text"
    store.clear("a")
    assert store.load("a") is None


# What a file has become


def test_a_torn_last_line_is_cut_off_before_more_is_written(path):
    write(path, FULL, finish=False)
    whole = content(path)
    start = whole.rindex(b"\n", 0, -1) + 1
    for end in range(start, len(whole)):
        with open(path, "wb") as file:
            file.write(whole[:end])
        assert saved(path) == (FULL[:-1], False)
        write(path, FULL[-1:])
        assert saved(path) == (FULL, True)
        assert content(path).startswith(whole)


def test_a_last_line_that_is_not_as_it_was_written_is_cut_off_too(path):
    write(path, FULL)
    whole = content(path)
    for torn in (b"\0" * 40, b"\0\n", b'{"text":"x"} 00000000\n', b"{"):
        with open(path, "wb") as file:
            file.write(whole[: whole.rindex(b"\n", 0, -1) + 1] + torn)
        assert saved(path) == (FULL, False)
        write(path, [])
        assert saved(path) == (FULL, True)
        assert content(path) == whole


def test_a_file_cut_off_at_any_byte_gives_a_prefix_and_can_be_finished(path):
    write(path, FULL)
    whole = content(path)
    for end in range(len(whole)):
        with open(path, "wb") as file:
            file.write(whole[:end])
        with Journal.open(path) as journal:
            count = len(journal.chunks)
            assert not journal.complete
            assert journal.chunks == FULL[:count]
            for chunk in FULL[count:]:
                journal.write([fields_of(chunk)])
            journal.finish()
        assert content(path) == whole


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80, None], ids=["low bit", "case", "high bit", "line end"])
def test_a_flipped_byte_never_gives_a_wrong_chunk(path, flip):
    """At every position: an error that leaves the file alone, or what was before the torn last line"""
    write(path, FULL)
    whole = content(path)
    last = whole.rindex(b"\n", 0, -1) + 1
    errors = 0
    for position, byte in enumerate(whole):
        other = (0x0A if byte != 0x0A else 0x20) if flip is None else byte ^ flip
        damaged = whole[:position] + bytes([other]) + whole[position + 1 :]
        with open(path, "wb") as file:
            file.write(damaged)
        try:
            chunks, complete = saved(path)
        except CheckpointError as damage:
            message = str(damage)
        else:
            # the end of the line before, lost, leaves both as one torn line
            assert (chunks, complete) == (FULL if position >= last else FULL[:-1], False)
            assert position >= last - 1
            continue
        errors += 1
        assert path in message
        assert re.search("remove|move it away", message)
        assert content(path) == damaged
    assert errors >= last - 1


@settings(max_examples=200, suppress_health_check=SLOW_FILES)
@given(st.binary(max_size=60), st.integers(0, 10_000), st.integers(0, 10_000))
def test_any_other_bytes_in_the_middle_never_give_a_wrong_chunk(path, other, start, length):
    whole = section._journal_lines([{"sheepsse": 1}, *map(fields_of, FULL), {"complete": True}])[0]
    start %= len(whole)
    with open(path, "wb") as file:
        file.write(whole[:start] + other + whole[start + length % (len(whole) - start) :])
    try:
        chunks, complete = saved(path)
    except CheckpointError:
        return
    assert chunks == FULL[: len(chunks)]
    assert not complete or chunks == FULL


def test_another_version_is_left_alone(path):
    line, _ = section._journal_lines([{"sheepsse": 2, "name": "new"}])
    for data in (line, line + b"in a form of its own\n" * 3, b'{"sheepsse":20}\n'):
        with open(path, "wb") as file:
            file.write(data)
        with pytest.raises(CheckpointError, match=r"version 2.*reads version 1: use the sheepsse that wrote it"):
            Journal.open(path)
        assert content(path) == data


@pytest.mark.parametrize("data", [b"hello", b"{}", b'{"text":"a"}\n{"text":"b"}\n', b"\n", b"\0" * 20, b"\xff\xfe"])
@pytest.mark.parametrize("refresh", [False, True])
def test_what_is_no_journal_is_never_touched(path, data, refresh):
    with open(path, "wb") as file:
        file.write(data)
    for attempt in (lambda: Journal.open(path, refresh), lambda: list(record(FULL, path)), lambda: list(replay(path))):
        with pytest.raises(CheckpointError, match="no checkpoint and was left as it is"):
            attempt()
    assert content(path) == data


def test_refresh_replaces_what_is_damaged(path):
    write(path, FULL)
    with open(path, "r+b") as file:
        file.seek(30)
        file.write(b"damage")
    with pytest.raises(CheckpointError, match="is damaged"):
        Journal.open(path)
    with Journal.open(path, refresh=True) as journal:
        journal.write([fields_of(FULL[0])])
        journal.finish()
    assert saved(path) == (FULL[:1], True)


@pytest.mark.parametrize(
    "content_of_line",
    [{"unknown": 1}, {"complete": True}, {"usage": {"cost": "much"}}, {"tool_calls": [1]}, {"usage": 1}, [1]],
    ids=str,
)
def test_a_line_that_is_no_chunk_is_damage(path, content_of_line):
    data, checksum = b"", 0
    for line in ({"sheepsse": 1}, content_of_line, {"text": "a"}):
        made, checksum = section._journal_lines([line], checksum)
        data += made
    with open(path, "wb") as file:
        file.write(data)
    with pytest.raises(CheckpointError, match="no chunk"):
        Journal.open(path)


def test_a_line_that_is_no_json_is_damage(path, no_collection):
    header, checksum = section._journal_lines([{"sheepsse": 1}])
    for data in (b"{", b"\xff", b"[" * 100_000):
        with open(path, "wb") as file:
            file.write(header + b"%b %08x\n" % (data, zlib.crc32(data, checksum)))
        with pytest.raises(CheckpointError, match="no JSON"):
            Journal.open(path)


def test_only_a_regular_file_is_opened(tmp_path):
    target = tmp_path / "target"
    write(str(target), FULL, finish=False)
    before = target.read_bytes()
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "dangling", "folder", "pipe"):
        for attempt in (Journal.open, lambda path: list(replay(path)), lambda path: list(record(FULL, path))):
            with pytest.raises(CheckpointError, match=name):
                attempt(str(tmp_path / name))
    with pytest.raises(CheckpointError, match="null"):
        Journal.open(str(tmp_path / "nu\0l"))
    assert target.read_bytes() == before
    assert not (tmp_path / "nothing").exists()
    assert len(os.listdir(tmp_path)) == 5


# What the operating system refuses


REFUSALS = [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT]


@pytest.mark.parametrize("refusal", REFUSALS, ids=errno.errorcode.get)
@pytest.mark.parametrize("taken", [0, 1, 20])
def test_a_write_that_fails_loses_nothing_and_a_rerun_goes_on(path, monkeypatch, refusal, taken):
    """At each write of a journal, also after it took some bytes"""
    real = os.write
    for failing in range(len(FULL) + 1):
        calls = itertools.count()

        def write_some(descriptor, data, calls=calls, failing=failing):
            call = next(calls)
            if call < failing:
                return real(descriptor, data)
            if call == failing and taken:
                return real(descriptor, bytes(data)[:taken])
            raise OSError(refusal, os.strerror(refusal))

        came = []
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", write_some)
            with pytest.raises(CheckpointError, match=os.strerror(refusal)) as caught:
                for chunk in record(FULL, path):
                    came.append(chunk)
        assert path in str(caught.value)
        assert came == FULL[:failing]
        assert saved(path) == (came, False)
        write(path, FULL[len(came) :])
        assert saved(path) == (FULL, True)


@pytest.mark.parametrize("taken", [0, 1, 20])
def test_a_writer_that_tries_again_after_a_failure_writes_it_once(path, monkeypatch, taken):
    real = os.write
    failures = iter([False, True, False, True] * 10)

    def sometimes(descriptor, data):
        if next(failures):
            raise OSError(errno.ENOSPC, "full")
        return real(descriptor, bytes(data)[:taken] if taken else data)

    with Journal.open(path) as journal:
        for chunk in FULL:
            while True:
                with monkeypatch.context() as patched:
                    patched.setattr(os, "write", sometimes)
                    with contextlib.suppress(CheckpointError):
                        journal.write([fields_of(chunk)])
                        break
                journal.write([fields_of(chunk)])
                break
        journal.finish()
    assert saved(path) == (FULL, True)


@pytest.mark.parametrize("written", [False, True])
def test_ctrl_c_in_a_write_leaves_a_journal_that_is_good_for_more(path, monkeypatch, written):
    real = os.write

    def interrupted(descriptor, data):
        if written:
            real(descriptor, data)
        raise KeyboardInterrupt

    with Journal.open(path) as journal:
        for chunk in FULL:
            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
                patched.setattr(os, "write", interrupted)
                journal.write([fields_of(chunk)])
            journal.write([fields_of(chunk)])
        journal.finish()
    assert saved(path) == (FULL, True)


def test_writes_that_take_a_byte_each_write_it_all(path, monkeypatch):
    real = os.write
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data)[:1]))
        write(path, FULL)
    assert saved(path) == (FULL, True)


@pytest.mark.parametrize("call", ["open", "ftruncate", "fsync", "makedirs"])
def test_whatever_is_refused_is_a_checkpoint_error(tmp_path, monkeypatch, call):
    def refused(*arguments, **options):
        raise OSError(errno.EIO, "the disk is gone")

    path = str(tmp_path / "a" / "journal")
    with monkeypatch.context() as patched:
        patched.setattr(os, call, refused)
        with pytest.raises(CheckpointError, match="the disk is gone"):
            list(record(FULL, path))
        with pytest.raises(CheckpointError, match="the disk is gone"):
            Checkpoints(tmp_path / "b").save("a", "text")
            Checkpoints(tmp_path / "b").save("a", "text")
            write(path, FULL)
    assert list(record(FULL, path)) == FULL


@pytest.mark.parametrize("call", ["replace", "unlink", "listdir"])
def test_a_folder_that_refuses_is_a_checkpoint_error(tmp_path, monkeypatch, call):
    def refused(*arguments):
        raise PermissionError(errno.EACCES, "not for you")

    store = Checkpoints(tmp_path, max_age=-1)
    store.save("a", "old")
    monkeypatch.setattr(os, call, refused)
    with pytest.raises(CheckpointError, match="not for you"):
        {"replace": lambda: store.save("a", "new"), "unlink": lambda: store.clear("a"), "listdir": store.expire}[call]()
    assert store.load("a").text == "old"


def test_a_disk_that_cannot_be_read_or_locked_is_a_checkpoint_error(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path)
    store.save("a", "text")
    fcntl = importlib.import_module("fcntl")

    def refused(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", refused)
        for attempt in (lambda: store.save("a", "b"), lambda: store.clear("a"), Checkpoints(tmp_path, -1).expire):
            with pytest.raises(CheckpointError, match="No locks available") as caught:
                attempt()
            assert not caught.value.retryable
    opened = section._opened

    class Broken:
        def __init__(self, file):
            self.close = file.close

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.close()

        def seek(self, position):
            raise OSError(errno.EIO, "Input/output error")

        read = seek

    monkeypatch.setattr(section, "_opened", lambda *arguments: Broken(opened(*arguments)))
    for attempt in (lambda: store.load("a"), lambda: list(store)):
        with pytest.raises(CheckpointError, match="Input/output error"):
            attempt()


def test_a_folder_that_is_removed_meanwhile_is_a_checkpoint_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "makedirs", lambda *arguments, **options: None)
    with pytest.raises(CheckpointError, match="cannot be made: No such file or directory"):
        Checkpoints(tmp_path / "gone").save("a", "text")


def full_disk(path):
    """Records an answer that does not fit, and finds what was given of it"""
    came, error = read(record(pieces(10_000), path))
    assert isinstance(error, CheckpointError)
    assert re.search("No space left|too large", str(error))
    assert came
    assert read(replay(path))[0] == came
    return came


def test_a_file_that_may_not_grow_loses_nothing_that_was_given(path):
    """The kernel's own refusal, which takes a part of the last line"""

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_001, 10_001))
        full_disk(path)

    assert life(work) == 0
    chunks, complete = saved(path)
    assert (chunks, complete) == (pieces(len(chunks)), False)
    write(path, pieces(10_000)[len(chunks) :])
    assert saved(path) == (pieces(10_000), True)


def test_a_full_disk_loses_nothing_that_was_given(tmp_path):
    options = ["-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)]
    try:
        subprocess.run(["mount", *options], check=True, capture_output=True, timeout=HANG)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a disk")
    try:
        path = str(tmp_path / "journal")
        came = full_disk(path)
        subprocess.run(["mount", "-o", "remount,size=8m", str(tmp_path)], check=True, timeout=HANG)
        write(path, pieces(10_000)[len(came) :])
        assert saved(path) == (pieces(10_000), True)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True, timeout=HANG)


def test_a_read_only_folder_refuses_what_is_new_and_gives_what_is_complete():
    """By a user who may not write there, which root always may"""
    with tempfile.TemporaryDirectory() as folder:
        store = Checkpoints(folder)
        store.save("whole", "text")
        key = store.key("q")
        with section._as_checkpoint(folder).open(key) as journal:
            journal.write([fields_of(FULL[0])])
            journal.finish()
        for name in os.listdir(folder):
            os.chmod(os.path.join(folder, name), 0o444)
        os.chmod(folder, 0o555)

        def work():
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            for attempt in (lambda: store.save("new", ""), lambda: store.clear("whole")):
                with pytest.raises(CheckpointError, match="Permission denied"):
                    attempt()
            with pytest.raises(CheckpointError, match="Permission denied"):
                list(record(FULL, os.path.join(folder, "other")))
            assert store.load("whole").text == "text"
            with section._as_checkpoint(folder).open(key) as journal:
                assert (journal.chunks, journal.complete) == (FULL[:1], True)

        try:
            assert life(work) == 0
        finally:
            os.chmod(folder, 0o700)


# Killed


def answer_with_journal(path, chunks, receive):
    """What a client does: gives what was saved, then what follows, each kept before it is given"""
    with Journal.open(path) as journal:
        for chunk in journal.chunks:
            receive(chunk)
        if not journal.complete:
            for chunk in chunks[len(journal.chunks) :]:
                journal.write([fields_of(chunk)])
                receive(chunk)
            journal.finish()


def received_by(path):
    """A caller that notes what it was given where its end does not reach"""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    return lambda chunk: os.write(descriptor, chunk.text.encode())


def killed_at_random(folder, kills, seed=1):
    """Starts a writer again and again and kills it, until it has been killed that often; gives the lives it took"""
    moments = random.Random(seed)
    chunks = pieces(1500)
    whole = "".join(chunk.text for chunk in chunks).encode()
    path, given_path = os.path.join(folder, "journal"), os.path.join(folder, "given")

    def work():
        answer_with_journal(path, chunks, received_by(given_path))

    count = finished = lives = 0
    while count < kills:
        lives += 1
        open(given_path, "wb").close()
        outcome = life(work, until=moments.expovariate(150))
        assert outcome in (0, -signal.SIGKILL)
        came = content(given_path)
        assert whole.startswith(came)
        kept = read(replay(path))[0] if os.path.exists(path) else []
        assert kept == chunks[: len(kept)]
        assert "".join(chunk.text for chunk in kept).encode().startswith(came)
        count += outcome != 0
        if outcome == 0:
            finished += 1
            assert came == whole
            assert kept == chunks
            assert life(work) == 0  # a finished one is given again, and not written
            assert content(given_path) == whole
            os.unlink(path)
    assert life(work) == 0
    assert content(given_path) == whole
    return lives, finished


def test_a_writer_killed_at_any_moment_goes_on_where_it_was(tmp_path):
    lives, finished = killed_at_random(str(tmp_path), 60)
    assert lives == 60 + finished


SYSTEM_CALLS = [(os, name) for name in ("open", "write", "ftruncate", "fsync", "replace", "unlink", "mkdir")]
SYSTEM_CALLS += [(importlib.import_module("fcntl"), "flock")]


def killing_at(moment):
    """Has this process kill itself before the system call of that number, counted from 0; at a write, after k bytes

    A moment is a number of calls and, for a write, of bytes.
    """
    number, taken = moment
    calls = itertools.count()

    def wrapped(real, name):
        def called(*arguments, **options):
            if next(calls) == number:
                if name == "write" and taken:
                    real(arguments[0], bytes(arguments[1])[:taken])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return called

    for module, name in SYSTEM_CALLS:
        setattr(module, name, wrapped(getattr(module, name), name))


def moments_of(work):
    """Each moment of a work: before each of its system calls, and after each byte of its writes"""
    moments = []

    def noted(real, name):
        def called(*arguments, **options):
            moments.append((name, len(arguments[1]) if name == "write" else 0))
            return real(*arguments, **options)

        return called

    with pytest.MonkeyPatch.context() as patched:
        for module, name in SYSTEM_CALLS:
            patched.setattr(module, name, noted(getattr(module, name), name))
        work()
    return [(number, taken) for number, (_, size) in enumerate(moments) for taken in range(size + 1)]


def killed(work, moment):
    def until_killed():
        killing_at(moment)
        work()

    assert life(until_killed) == -signal.SIGKILL


def test_a_writer_killed_at_each_system_call_and_each_byte_goes_on_where_it_was(tmp_path):
    chunks = pieces(3)
    path = str(tmp_path / "folder" / "journal")
    moments = moments_of(lambda: write(path, chunks))
    assert len(moments) > len(content(path)) + 5
    for moment in moments:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        killed(lambda: write(path, chunks), moment)
        came = []
        answer_with_journal(path, chunks, came.append)
        assert came == chunks
        assert saved(path) == (chunks, True)


def test_a_rerun_killed_at_each_moment_too_goes_on_where_it_was(tmp_path):
    """From a torn line, through a restart, to the end"""
    chunks = pieces(2)
    path = str(tmp_path / "journal")
    write(path, chunks[:1], finish=False)
    torn = content(path) + '{"text":"wö'.encode()[:-1]

    def lay():
        with open(path, "wb") as file:
            file.write(torn)

    def go_on():
        write(path, chunks[1:])

    def begin_afresh():
        with Journal.open(path) as journal:
            journal.restart()
            for chunk in chunks:
                journal.write([fields_of(chunk)])
            journal.finish()

    for work in (go_on, begin_afresh):
        lay()
        for moment in moments_of(work):
            lay()
            killed(work, moment)
            came = []
            answer_with_journal(path, chunks, came.append)
            assert came == chunks
            assert saved(path) == (chunks, True)


def test_a_save_killed_at_each_moment_leaves_the_old_text_or_the_new(tmp_path):
    store = Checkpoints(tmp_path)
    seen = set()
    store.save("a", "old")
    for moment in moments_of(lambda: store.save("a", "new")):
        store.save("a", "old")
        killed(lambda: store.save("a", "new"), moment)
        found = store.load("a")
        assert found.complete
        seen.add(found.text)
        assert list(store) == ["a"]
    assert seen == {"old", "new"}
    store.clear("a")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "remove", [lambda store: store.clear("a"), lambda store: store.expire()], ids=["clear", "expire"]
)
def test_what_a_kill_left_of_a_save_goes_with_its_checkpoint(tmp_path, monkeypatch, remove):
    def refused(*names):
        raise OSError(errno.EIO, "refused")

    store = Checkpoints(tmp_path, max_age=-1)
    store.save("a", "old")
    with monkeypatch.context() as patched, pytest.raises(CheckpointError):
        patched.setattr(os, "replace", refused)
        store.save("a", "new")
    assert len(os.listdir(tmp_path)) == 2
    assert store.load("a").text == "old"
    remove(store)
    assert os.listdir(tmp_path) == []


def test_a_clear_killed_at_each_moment_leaves_all_or_nothing(tmp_path):
    store = Checkpoints(tmp_path)
    store.save("a", "old")
    for moment in moments_of(lambda: store.clear("a")):
        store.save("a", "old")
        killed(lambda: store.clear("a"), moment)
        found = store.load("a")
        assert found is None or (found.complete, found.text) == (True, "old")
        store.clear("a")
        assert os.listdir(tmp_path) == []


# Checkpoints


def test_none_and_empty_are_told_apart(tmp_path):
    store = Checkpoints(tmp_path / "not yet")
    assert store.load("a") is None
    store.save("a", "")
    assert store.load("a") == Completion(complete=True)
    store.clear("a")
    assert store.load("a") is None
    with section._as_checkpoint(store.named("a")).open("0" * 64):
        assert store.load("a") is None
    assert list(store) == []


def test_an_unfinished_checkpoint_is_loaded_as_far_as_it_came(tmp_path):
    store = Checkpoints(tmp_path)
    with store.named("a").open("0" * 64) as journal:
        for chunk in FULL:
            journal.write([fields_of(chunk)])
        assert store.load("a") == sheepsse.collect(FULL)._replace(complete=False)
        journal.finish()
    assert store.load("a") == sheepsse.collect(FULL)


def test_save_replaces_what_there_was(tmp_path):
    store = Checkpoints(tmp_path)
    for text in ("first", "second, 世界\ud800", ""):
        store.save("a", text)
        assert store.load("a") == Completion(text=text, complete=True)
    assert list(store) == ["a"]


def test_what_is_being_written_is_neither_saved_over_nor_cleared(tmp_path):
    store = Checkpoints(tmp_path, max_age=-1)
    with store.named("a").open("0" * 64) as journal:
        journal.write([fields_of(FULL[1])])
        for attempt in (lambda: store.save("a", "other"), lambda: store.clear("a")):
            with pytest.raises(CheckpointError, match="in use"):
                attempt()
        assert store.expire() == []
    assert store.load("a").text == FULL[1].text
    assert store.expire() == ["a"]


def test_clear_is_quiet_where_there_is_none_and_works_on_what_is_damaged(tmp_path):
    store = Checkpoints(tmp_path)
    store.clear("a")
    Checkpoints(tmp_path / "no folder").clear("a")
    store.save("a", "text")
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[1:])
    with pytest.raises(CheckpointError):
        store.load("a")
    store.clear("a")
    assert os.listdir(tmp_path) == []


def test_a_name_belongs_to_one_request(tmp_path):
    store = Checkpoints(tmp_path)
    first, second = store.key("one"), store.key("two")
    with store.named("a").open(first) as journal:
        journal.write([fields_of(FULL[1])])
    with pytest.raises(CheckpointError, match=r"'a' holds the answer to another request .*clear\(\).*refresh=True"):
        store.named("a").open(second)
    with store.named("a").open(first) as journal:
        assert journal.chunks == FULL[1:2]
        journal.finish()
    with pytest.raises(CheckpointError, match="another request"):
        store.named("a").open(second)
    with store.named("a").open(second, refresh=True) as journal:
        journal.write([fields_of(FULL[2])])
    with pytest.raises(CheckpointError, match="another request"):
        store.named("a").open(first)
    store.save("b", "text")
    with pytest.raises(CheckpointError, match="another request"):
        store.named("b").open(first)


def test_a_file_under_the_name_of_another_is_not_taken_for_it(tmp_path):
    store = Checkpoints(tmp_path)
    store.save("a", "text")
    os.rename(store._path("a"), store._path("b"))
    with pytest.raises(CheckpointError, match="holds the checkpoint 'a', not 'b'"):
        store.load("b")
    assert list(store) == []


def test_a_folder_names_checkpoints_by_the_request(tmp_path):
    store = Checkpoints(tmp_path)
    key = store.key("q")
    for place in (str(tmp_path), tmp_path, store, store.named(key)):
        with section._as_checkpoint(place).open(key) as journal:
            journal.write([fields_of(FULL[1])])
        assert list(store) == [key]
        assert store.load(key).text.startswith(FULL[1].text)
    for place in (1, b"folder", None):
        with pytest.raises(TypeError, match="checkpoint is a folder"):
            section._as_checkpoint(place)
    named = store.named("x")
    assert pickle.loads(pickle.dumps(named)) == named


UNSAFE = [
    "",
    ".",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "a:b",
    "a_b",
    "a\0b",
    "a\nb",
    "A",
    "a",
    "a ",
    "a.",
    "CON",
    "con",
    "nul.txt",
    "COM1",
    "x" * 5000,
    "x" * 5001,
    "é",
    "e\u0301",
    "\ud800",
    "-rf",
    ".hidden",
    "~",
    "$HOME",
    "0" * 64,
    "F" * 64,
    "f" * 64,
    "a.jsonl",
]


def test_any_name_is_safe_and_none_meets_another(tmp_path):
    store = Checkpoints(tmp_path / "inner" / "store")
    for name in UNSAFE:
        store.save(name, f"text of {name}")
    assert sorted(store) == sorted(UNSAFE)
    for name in UNSAFE:
        assert store.load(name).text == f"text of {name}"
    files = os.listdir(tmp_path / "inner" / "store")
    assert len({name.lower() for name in files}) == len(UNSAFE)
    for name in files:
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}\.jsonl", name)
        assert not re.fullmatch(r"(con|nul|com1)(\..*)?", name, re.IGNORECASE)
    assert os.listdir(tmp_path) == ["inner"]
    assert os.listdir(tmp_path / "inner") == ["store"]
    for name in UNSAFE:
        store.clear(name)
    assert os.listdir(tmp_path / "inner" / "store") == []


def test_a_name_that_is_no_str_is_refused(tmp_path):
    store = Checkpoints(tmp_path)
    for attempt in (store.load, store.clear, store.named, lambda name: store.save(name, "")):
        with pytest.raises(TypeError, match="the name of a checkpoint is a str"):
            attempt(1)


def test_expire_removes_what_is_old_and_names_it(tmp_path):
    store = Checkpoints(tmp_path, max_age=60)
    for name in ("old", "new", "used"):
        store.save(name, "text")
    foreign = tmp_path / ("0" * 64 + ".jsonl")
    foreign.write_text("somebody's\n")
    record_of_another = tmp_path / "record.jsonl"
    list(record(FULL, record_of_another))
    empty = tmp_path / ("1" * 64 + ".jsonl")
    empty.touch()
    nameless = tmp_path / ("2" * 64 + ".jsonl")
    nameless.write_bytes(b'{"sheepsse":1')
    past = time.time() - 61
    for file in (store._path("old"), foreign, record_of_another, empty, nameless):
        os.utime(file, (past, past))
    assert Checkpoints(tmp_path).expire() == []
    assert store.expire() == ["old"]
    assert sorted(store) == ["new", "used"]
    assert {foreign, record_of_another} <= set(tmp_path.iterdir())
    assert not empty.exists()
    assert store.expire() == []
    assert Checkpoints(tmp_path / "none", max_age=0).expire() == []


def test_what_vanishes_meanwhile_is_not_there(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path, max_age=-1)
    ghosts = [str(tmp_path / ("0" * 64 + ".jsonl"))]
    monkeypatch.setattr(Checkpoints, "_paths", lambda self: ghosts)
    assert list(store) == []
    assert store.expire() == []


def test_a_very_long_name_is_read_whole(tmp_path):
    store = Checkpoints(tmp_path)
    store.save("x" * 200_000, "text")
    assert list(store) == ["x" * 200_000]


# The key of a request


TOOL = {"a": 1, "b": {"c": 2, "d": 3}}


def test_the_key_is_of_what_is_asked_and_not_of_how():
    store = Checkpoints("nowhere")
    key = store.key("hi", model="m", temperature=0.5, tools=[TOOL])
    assert re.fullmatch("[0-9a-f]{64}", key)
    same = [
        store.key("hi", tools=[{"b": {"d": 3, "c": 2}, "a": 1}], temperature=0.5, model="m"),
        store.key([{"content": "hi", "role": "user"}], **{"tools": [TOOL], "temperature": 0.5, "model": "m"}),
        store.key("hi", model="m", extra_body={"temperature": 0.5}, tools=[TOOL]),
        store.key(
            "hi",
            model="m",
            temperature=0.5,
            tools=[TOOL],
            api_key="sk-other",
            headers={"Authorization": "sk"},
            timeout=5,
            retry=object(),
            deadline=3,
        ),
    ]
    assert set(same) == {key}


def test_any_other_value_makes_another_key():
    store = Checkpoints("nowhere")
    keys = [
        store.key("hi", model="m"),
        store.key("Hi", model="m"),
        store.key("hi ", model="m"),
        store.key([{"role": "system", "content": "hi"}], model="m"),
        store.key([{"role": "user", "content": "hi"}, {"role": "user", "content": "hi"}], model="m"),
        store.key([], model="m"),
        store.key("hi", model="n"),
        store.key("hi"),
        store.key("hi", model="m", dialect="anthropic"),
        store.key("hi", model="m", base_url="https://a.example"),
        store.key("hi", model="m", provider="ollama"),
        store.key("hi", model="m", n=1),
        store.key("hi", model="m", n=1.0),
        store.key("hi", model="m", n=True),
        store.key("hi", model="m", n="1"),
        store.key("hi", model="m", n=None),
        store.key("hi", model="m", stop=["a", "b"]),
        store.key("hi", model="m", stop=["b", "a"]),
        store.key("é"),
        store.key("e\u0301"),
    ]
    assert len(set(keys)) == len(keys)


def test_what_is_no_request_has_no_key():
    store = Checkpoints("nowhere")
    with pytest.raises(sheepsse.InvalidRequestError, match="JSON"):
        store.key("hi", tools=[object()])
    with pytest.raises(TypeError):
        store.key(b"hi")


def test_a_checkpoint_error_says_what_it_is(path):
    error = CheckpointError("message", retryable=True)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is CheckpointError
    assert (again.code, again.args, again.retryable) == ("CHECKPOINT_ERROR", ("message",), True)
    assert isinstance(error, sheepsse.SheepError)
    assert repr(Checkpoints("folder", 5)) == "Checkpoints('folder', max_age=5)"


# What it costs


def test_each_chunk_is_one_write_and_so_is_the_end(path, monkeypatch):
    real, sizes = os.write, []

    def counted(descriptor, data):
        sizes.append(len(data))
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", counted)
    for number, _ in enumerate(record(pieces(1000), path), 1):
        assert len(sizes) == number
    assert len(sizes) == 1001
    assert sum(sizes) == os.path.getsize(path)


def test_a_chunk_costs_the_same_in_a_long_answer_as_in_a_short_one(path):
    """16 times as many cost some 16 times as much; a cost that grows with the journal, 256 times as much"""

    def recording(count):
        chunks = pieces(count)
        return cpu_seconds(lambda: list(record(chunks, path)))

    assert recording(16_000) < 3 * 16 * recording(1_000)


def test_a_long_journal_is_read_in_time_proportional_to_its_length(path):
    def reading(count):
        list(record(pieces(count), path))
        return cpu_seconds(lambda: saved(path))

    assert reading(16_000) < 3 * 16 * reading(1_000)


# The names of files: an answer that was saved is found by the next version, too

LOOK = {
    "name": "look",
    "description": "Looks",
    "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
}
CALL = {"id": "c-1", "type": "function", "function": {"name": "look", "arguments": '{"at": "Hà Nội"}'}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
PINNED_REQUESTS = {
    "a prompt": ("Good day?", {}),
    "options": (
        [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Good day?"}],
        {"temperature": 0.5, "max_tokens": 100, "stop": ["\n"]},
    ),
    "an image": ([{"role": "user", "content": [{"type": "text", "text": "What?"}, IMAGE]}], {"seed": 1}),
    "tools": (
        [
            {"role": "user", "content": "Look"},
            {"role": "assistant", "content": "I look", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c-1", "content": "Rain"},
        ],
        {"tools": [{"type": "function", "function": LOOK}], "tool_choice": "auto"},
    ),
}
#: the first digits of each name
PINNED_NAMES = {
    ("openai", "a prompt"): "60654c564752f76b9cefb749",
    ("openai", "options"): "71ebd2a174aa4dd6fcb6cb38",
    ("openai", "an image"): "d096b85c7216365e68281e9a",
    ("openai", "tools"): "06f0ab0b85c8328f7539b07c",
    ("openai-responses", "a prompt"): "1f0e34b5720ec1f77e042d59",
    ("openai-responses", "options"): "baf267a3f1b9c47fe606b324",
    ("openai-responses", "an image"): "59d7ebf9868bd71150e983f4",
    ("openai-responses", "tools"): "5aa50a4979fdd954ddedd6aa",
    ("anthropic", "a prompt"): "eea888bc778fd3a09f08ff5b",
    ("anthropic", "options"): "ba2df6e7535fadca90ba112d",
    ("anthropic", "an image"): "812bad35c33bfd150cf22d37",
    ("anthropic", "tools"): "f5f406f23e3e9f956be76b11",
    ("gemini", "a prompt"): "b02ee3a93d9b8ca14153d9fd",
    ("gemini", "options"): "70310dd0d527f144f936e582",
    ("gemini", "an image"): "48dce462db1e2b40e16e5b16",
    ("gemini", "tools"): "c2dab932d6f161c56bf9d7c3",
    ("ollama", "a prompt"): "4a596de15ae07b517368a66d",
    ("ollama", "options"): "890b05d771fe457b12c17366",
    ("ollama", "an image"): "af1a73f44dcef8481d111abe",
    ("ollama", "tools"): "1cf64198e8b6d55c397f65b8",
}


@pytest.mark.parametrize(("dialect", "request_name"), PINNED_NAMES)
def test_a_request_has_the_same_checkpoint_in_each_version(tmp_path, dialect, request_name):
    messages, params = PINNED_REQUESTS[request_name]
    with responses.RequestsMock() as mock, sheepsse.Client(
        base_url="https://api.example.com/v1", dialect=dialect, api_key=False, model="m", retry=0
    ) as client:
        mock.add("POST", re.compile("https://api.example.com/.*"), status=500, body="{}")
        with pytest.raises(sheepsse.ServerError):
            list(client.stream(messages, checkpoint=tmp_path, **params))
    (name,) = os.listdir(tmp_path)
    assert name.startswith(PINNED_NAMES[dialect, request_name])
