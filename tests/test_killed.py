"""A stream with checkpoint= in a process that is killed, or whose disk fails: end to end, over real sockets

SHEEPSSE_EVERY_KILL=1 kills 500 times at random, and at each write of every set-up; without it, a sample is killed.
"""

import contextlib
import errno
import itertools
import json
import os
import pathlib
import random
import re
import signal
import stat
import subprocess
import sys
import time
from typing import Any, Mapping, NamedTuple

import pytest

import sheepsse
from conftest import HANG, ROOT, asking, read, until
from local_provider import DIALECT_BASES, TEXT, Answer, LocalProvider, another, error_answer
from sheepsse import CheckpointError, Checkpoints, StreamInterrupted

EVERY = bool(os.environ.get("SHEEPSSE_EVERY_KILL"))
#: at random moments, over all set-ups
KILLS = 500 if EVERY else 18
MODULE = pathlib.Path(sheepsse.__file__)
QUESTION = "A secret question"

#: Forks a process for each line of its input, a job, and says its id; at an empty line it waits for its end
NURSERY = """
import itertools, json, os, resource, signal, sys
import sheepsse

sheepsse.PROVIDERS["vllm"] = sheepsse.Provider("http://127.0.0.1", "", "openai", continuation="vllm")
write = os.write


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def fatal(real, turns, number, how):
    def call(file, *data):
        turn = next(turns)
        if turn == number and how == "midst" and real is write:
            real(file, data[0][: len(data[0]) // 2])
        if turn == number and how != "after":
            kill()
        result = real(file, *data)
        if turn == number:
            kill()
        return result

    return call


def live(question, options, received, dies=(None, None), file_size=None):
    turns = itertools.count()
    for name in ("write", "ftruncate", "fsync"):
        setattr(os, name, fatal(getattr(os, name), turns, *dies))
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

    def tell(**fields):
        write(file, json.dumps(fields).encode() + b"\\n")

    file = os.open(received, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    stream = sheepsse.stream(question, api_key=False, retry=sheepsse.Retry(3, base_delay=0), **options)
    try:
        for chunk in stream.chunks():
            calls = [f"{call.name}{call.arguments}" for call in chunk.tool_calls]
            tell(said=[chunk.text, chunk.reasoning, "".join(calls)])
    except sheepsse.SheepError as error:
        tell(error=type(error).__name__, message=str(error), partial=error.partial.text)
    else:
        usage = stream.usage and stream.usage[:3]
        finish = [stream.finish_reason, stream.tool_calls, usage]
        tell(finish=finish, continuity=stream.continuity, cached=stream.stats.cached, operations=next(turns))


try:  # for what is imported at the first request alone
    list(sheepsse.stream("Hi", model="m", base_url="http://127.0.0.1:1/v1", api_key=False, retry=0))
except sheepsse.SheepError:
    pass
print("ready", flush=True)
for line in iter(sys.stdin.readline, ""):
    child = os.fork()
    if child == 0:
        try:
            live(**json.loads(line))
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    print(child, flush=True)
    sys.stdin.readline()
    print(os.waitpid(child, 0)[1], flush=True)
"""


def environment():
    paths = [str(MODULE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "error", "no_proxy": "*"}


class Life:
    """What the caller in one process received, up to its end or its death"""

    def __init__(self, status, lines):
        self.killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert self.killed or status == 0
        said = [line["said"] for line in lines if "said" in line]
        self.text, self.reasoning, self.calls = map("".join, zip(*said)) if said else ("", "", "")
        self.end = lines[-1] if lines and "said" not in lines[-1] else {}

    @property
    def said(self):
        return self.text, self.reasoning, self.calls

    @property
    def whole(self):
        return "finish" in self.end


class Nursery:
    """A process that has imported sheepsse and forks one for each life, which costs a few milliseconds"""

    def __init__(self, folder):
        self._received = folder / "received"
        command = [sys.executable, "-c", NURSERY]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), cwd=folder
        )
        self._process.stdout.readline()

    def close(self):
        with self._process:
            self._process.stdin.close()

    def begin(self, options, **job):
        """Starts a process that asks, and gives its id, which is no other's until ``end``"""
        with contextlib.suppress(FileNotFoundError):
            self._received.unlink()
        job.update(question=QUESTION, options=options, received=str(self._received))
        self._tell(json.dumps(job))
        return int(self._process.stdout.readline())

    def end(self):
        """Waits for the end of the process"""
        self._tell("")
        status = int(self._process.stdout.readline())
        return Life(status, self.received())

    def live(self, options, seconds=None, **job):
        """The life of a process that is killed after some seconds, if it still lives then"""
        child = self.begin(options, **job)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        return self.end()

    def received(self):
        """What the process has said so far"""
        data = self._received.read_bytes() if self._received.exists() else b""
        return [json.loads(line) for line in data.split(b"\n")[:-1]]

    def _tell(self, line):
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    with contextlib.closing(Nursery(tmp_path_factory.mktemp("nursery"))) as made:
        yield made


class SetUp(NamedTuple):
    """A provider, and how one that was killed goes on there"""

    #: when something was given out
    continuity: str
    options: Mapping[str, Any] = {}
    answer: Answer = Answer()
    #: when nothing was, but the answer's id is known
    begun: str = "restarted"

    def asked(self, server, folder):
        base_url = server.origin + DIALECT_BASES[self.options.get("dialect", "openai")]
        return {"model": "local-model", "base_url": base_url, "checkpoint": str(folder), **self.options}


def replayed(options, **answer):
    return SetUp("replayed", options, Answer(**answer), "replayed")


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}]
NUMBERED = Answer(ids="numbers")
ANTHROPIC = {"dialect": "anthropic", "max_tokens": 500}
BACKGROUND = {"dialect": "openai-responses", "background": True}

SETUPS = {
    "event ids": replayed({}, ids="numbers"),
    "event ids, inclusive": replayed({}, ids="numbers", replay="inclusive"),
    "event ids, from the start": replayed({}, ids="numbers", replay="whole"),
    "anthropic with event ids": replayed(ANTHROPIC, ids="numbers"),
    "gemini with event ids": replayed({"dialect": "gemini"}, ids="numbers"),
    "in the background": replayed(BACKGROUND),
    "a tool in the background": replayed({**BACKGROUND, "tools": TOOLS}),
    "reasoning in the background": replayed({**BACKGROUND, "reasoning": {"effort": "low"}}),
    "nothing to go on by": SetUp("restarted"),
    "a tool call": SetUp("restarted", {"tools": TOOLS}),
    "a tool call with event ids": SetUp("restarted", {"tools": TOOLS}, NUMBERED, "replayed"),
    "the Responses dialect with event ids": SetUp("restarted", {"dialect": "openai-responses"}, NUMBERED),
    "ollama": SetUp("restarted", {"dialect": "ollama"}),
    "deepseek": SetUp("continued", {"provider": "deepseek", "model": "deepseek-chat"}),
    "mistral": SetUp("continued", {"provider": "mistral"}, Answer(continuation="echo")),
    "vllm": SetUp("continued", {"provider": "vllm"}),
    "anthropic": SetUp("continued", {**ANTHROPIC, "provider": "anthropic", "model": "claude-sonnet-4-5"}),
    "verify": SetUp("verified", {"resume": "verify"}, begun="verified"),
}


#: how a text was made whole, the weakest last
CONTINUITIES = ("single", "replayed", "verified", "restarted", "continued")


def said_in(answer):
    calls = "".join(f"{call.name}{call.arguments}" for call in answer.tool_calls)
    return answer.text, answer.reasoning, calls


def begins(said, whole):
    return all(map(str.startswith, whole, said))


class Lives:
    """The lives of one request, each after the death of the one before; each is held against the whole answer"""

    def __init__(self, nursery, server, setup, folder, whole, further_ways=()):
        self._nursery, self._server, self._setup, self._whole = nursery, server, setup, whole
        self._store = Checkpoints(folder)
        self._options = setup.asked(server, folder)
        self._ways = []  # how each life goes on, as far as it comes
        self._further_ways = further_ways
        self._billed_before = server.billed
        self.kills = 0

    @property
    def billed(self):
        return self._server.billed - self._billed_before

    def saved(self):
        names = list(self._store)
        return self._store.load(names[0]) if names else sheepsse.Completion()

    def live(self, seconds=None, **job):
        before = self.saved()
        self._ways.append(self._way(before))
        life = self._nursery.live(self._options, seconds, **job)
        self.kills += life.killed
        assert begins(life.said, self._whole.said)
        assert begins(life.said, said_in(self.saved()))
        if life.whole:
            self._check_end(life)
        return life

    def finish(self):
        """A life up to the whole answer, and one more, which asks for nothing"""
        last = self.live()
        assert last.whole, last.end
        sent = len(self._server.requests)
        again = self._nursery.live(self._options)
        assert len(self._server.requests) == sent
        assert again.said == last.said
        assert again.end == {**last.end, "cached": True, "operations": 0}

    def check_billing(self):
        """A generation for the first life, and one more only where the one before could not be gone on with"""
        assert 1 <= self.billed <= sum(way not in ("replayed", "kept") for way in self._ways)

    def _way(self, saved):
        """How an answer of which this was saved is gone on with"""
        if saved.complete:
            return "kept"
        if saved.finish_reason:
            return "ended"
        if any(said_in(saved)):
            return self._setup.continuity
        if saved.id:
            return self._setup.begun
        return "single"

    def _check_end(self, life):
        assert life.said == self._whole.said
        continuity, way = life.end["continuity"], self._ways[-1]
        if "ended" in self._ways:  # one that had all but the end may be gone on with in any way, or not at all
            assert life.end["finish"][:2] == self._whole.end["finish"][:2]
        elif way == "kept":
            assert life.end["cached"]
        else:
            assert not life.end["cached"]
            assert continuity in (*self._ways, *self._further_ways)
            assert CONTINUITIES.index(continuity) >= CONTINUITIES.index(way)
            assert continuity == "continued" or life.end["finish"] == self._whole.end["finish"]


def whole_answer(nursery, server, setup, folder):
    """The life of one that nobody kills"""
    life = nursery.live(setup.asked(server, folder))
    assert life.end["continuity"] == "single"
    assert not life.end["cached"]
    assert any(life.said)
    return life


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SETUPS)
def test_one_killed_at_any_moment_is_whole_in_the_end(name, nursery, server, tmp_path):
    setup, dice = SETUPS[name], random.Random(name)
    server.default = setup.answer._replace(pace=0.001)
    whole = whole_answer(nursery, server, setup, tmp_path / "whole")
    kills = 0
    for number in itertools.count():
        lives = Lives(nursery, server, setup, tmp_path / str(number), whole)
        for _ in range(dice.randint(1, 3)):
            lives.live(dice.uniform(0, 0.05))
        lives.finish()
        lives.check_billing()
        kills += lives.kills
        if kills >= KILLS / len(SETUPS):
            break


#: those that are killed at each of their writes, the others only at some
THOROUGHLY = ["gemini with event ids", "in the background", "nothing to go on by"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SETUPS)
def test_one_killed_at_each_write_is_whole_in_the_end(name, nursery, server, tmp_path):
    """And so is one that is killed again, at a write of its second life"""
    setup, dice = SETUPS[name], random.Random(name)
    server.default = setup.answer._replace(text="One, two, three", thinking="Well, then")
    whole = whole_answer(nursery, server, setup, tmp_path / "whole")
    moments = list(itertools.product(range(whole.end["operations"]), ("before", "midst", "after")))
    for first in moments if EVERY or name in THOROUGHLY else dice.sample(moments, 4):
        for second in dice.sample(moments, 4 if EVERY else 1):
            folder = tmp_path / "-".join(map(str, first + second))
            lives = Lives(nursery, server, setup, folder, whole)
            assert lives.live(dies=first).killed
            lives.live(dies=second)
            lives.finish()
            lives.check_billing()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SETUPS)
def test_one_killed_whose_connections_are_lost_too_is_whole_in_the_end(name, nursery, server, tmp_path):
    setup, dice = SETUPS[name], random.Random(name)
    server.default = setup.answer
    whole = whole_answer(nursery, server, setup, tmp_path / "whole")
    for number in range(12 if EVERY else 1):
        # in the same life, one goes on in other ways than after a kill
        lives = Lives(nursery, server, setup, tmp_path / str(number), whole, CONTINUITIES)
        for _ in range(4):
            # behind the first event, which tells what to go on by
            server.default = setup.answer._replace(pace=0.001, cut_at=dice.randint(700, 4000))
            lives.live(dice.uniform(0, 0.05))
        server.default = setup.answer
        lives.finish()
        if setup.continuity == "replayed":
            lives.check_billing()


REPLAYED = ["event ids", "anthropic with event ids", "in the background"]


@pytest.mark.parametrize("name", REPLAYED)
def test_one_killed_before_its_first_word_is_replayed(name, nursery, server, tmp_path):
    """The answer's id is known by then, as while a model thinks"""
    setup = SETUPS[name]
    server.default = setup.answer
    options = setup.asked(server, tmp_path / "lives")
    assert nursery.live(options, dies=(1, "after")).killed
    assert len(server.requests) == 1
    again = nursery.live(options)
    assert (again.text, again.end["continuity"], server.billed) == (TEXT, "replayed", 1)


@pytest.mark.parametrize("cut_after", [1, 4, 8])
@pytest.mark.parametrize("name", ["event ids", "in the background", "a tool in the background", "vllm"])
def test_one_killed_whose_next_connection_is_lost_early_repeats_nothing(name, nursery, server, tmp_path, cut_after):
    setup = SETUPS[name]
    server.default = setup.answer
    whole = whole_answer(nursery, server, setup, tmp_path / "whole")
    options = setup.asked(server, tmp_path / "lives")
    assert nursery.live(options, dies=(5, "after")).killed
    server.answer(setup.answer._replace(cut_after=cut_after))
    again = nursery.live(options)
    assert (again.whole, again.said) == (True, whole.said)


@pytest.mark.parametrize("dialect", ["openai", "gemini"])
def test_one_killed_that_the_server_has_forgotten_is_asked_anew(dialect, nursery, server, tmp_path):
    setup = replayed({"dialect": dialect}, ids="numbers")
    server.default = setup.answer
    options = setup.asked(server, tmp_path / "lives")
    assert nursery.live(options, dies=(5, "after")).killed
    server.default = setup.answer._replace(replay="forget")
    nursery.live(options)
    again = nursery.live(options)
    assert again.whole, again.end
    assert again.text in (TEXT, another(setup.answer).text)


def test_one_killed_whose_job_is_gone_is_asked_anew(nursery, tmp_path):
    setup = SETUPS["in the background"]
    with LocalProvider(setup.answer) as server:
        options = setup.asked(server, tmp_path / "lives")
        assert nursery.live(options, dies=(5, "after")).killed
        port = int(server.origin.rpartition(":")[2])
    with LocalProvider(port=port) as server:
        again = nursery.live(options)
        assert (again.text, again.end["continuity"], server.billed) == (TEXT, "restarted", 1)


@pytest.mark.parametrize("expired", [True, False])
def test_one_killed_gets_the_whole_of_a_job(expired, nursery, server, tmp_path):
    setup = SETUPS["in the background"]
    options = setup.asked(server, tmp_path / "lives")
    assert nursery.live(options, dies=(5, "after")).killed
    server.default = Answer(expired=expired)
    again = nursery.live(options)
    assert (again.text, again.end["continuity"], server.billed) == (TEXT, "replayed", 1)


def test_one_whose_job_was_cancelled_asks_for_it_no_more(server, tmp_path):
    options = SETUPS["in the background"].asked(server, tmp_path / "lives")
    retry = sheepsse.Retry(3, base_delay=0, jitter=False)
    with sheepsse.stream(QUESTION, api_key=False, **options) as given_up:
        next(given_up)
    assert len(server.cancelled) == 1
    server.default = Answer(expired=True)
    read(sheepsse.stream(QUESTION, api_key=False, retry=retry, deadline=1, **options))
    assert len(server.requests) < 10


@pytest.mark.parametrize(
    "refusal", [error_answer(401), error_answer(503), Answer(drop=True)], ids=["401", "503", "drop"]
)
@pytest.mark.parametrize("name", ["nothing to go on by", "a tool call", "event ids", "in the background", "deepseek"])
def test_what_was_saved_outlives_a_life_without_an_answer(name, nursery, server, tmp_path, refusal):
    setup = SETUPS[name]
    server.default = setup.answer
    whole = whole_answer(nursery, server, setup, tmp_path / "whole")
    lives = Lives(nursery, server, setup, tmp_path / "lives", whole)
    assert any(lives.live(dies=(5, "after")).said)
    saved = lives.saved()
    server.default = refusal
    refused = lives.live()
    assert (refused.whole, refused.end["partial"]) == (False, saved.text)
    assert lives.saved() == saved
    server.default = setup.answer
    lives.finish()


# What is finished


@pytest.mark.parametrize(
    "params", [{}, {"tools": TOOLS}, {"n": 1, "temperature": 0.5}], ids=["text", "tool", "options"]
)
def test_a_finished_request_is_never_sent_again(server, client, tmp_path, params):
    first = client.stream(QUESTION, checkpoint=tmp_path, **params)
    chunks = list(first.chunks())
    again = client.stream(QUESTION, checkpoint=tmp_path, **params)
    assert list(again.chunks()) == [chunk._replace(raw=None) for chunk in chunks]
    assert again.completion == first.completion
    assert first.completion.complete
    assert (again.usage, again.finish_reason, again.id) == (first.usage, first.finish_reason, first.id)
    assert (first.stats.cached, again.stats.cached) == (False, True)
    assert (first.stats.attempts, again.stats.attempts) == (1, 0)
    assert client.complete(QUESTION, checkpoint=tmp_path, **params) == first.completion
    assert len(server.requests) == 1


def test_a_finished_request_is_answered_where_there_is_no_server_any_more(tmp_path):
    with LocalProvider() as server, asking(server) as client:
        first = client.complete(QUESTION, checkpoint=tmp_path)
    assert client.complete(QUESTION, checkpoint=tmp_path) == first
    assert client.stream(QUESTION, checkpoint=tmp_path).completion.text == ""
    assert "".join(client.stream(QUESTION, checkpoint=tmp_path)) == TEXT


def test_refresh_asks_anew_and_keeps_the_new_answer(server, client, tmp_path):
    server.answer(Answer(text="Old"), Answer(text="New"))
    assert client.complete(QUESTION, checkpoint=tmp_path).text == "Old"
    assert client.complete(QUESTION, checkpoint=tmp_path, refresh=True).text == "New"
    assert client.complete(QUESTION, checkpoint=tmp_path).text == "New"
    assert len(os.listdir(tmp_path)) == 1


def test_refresh_that_is_refused_leaves_the_old_answer(server, client, tmp_path):
    server.answer(Answer(text="Old"), error_answer(500))
    client.complete(QUESTION, checkpoint=tmp_path)
    with pytest.raises(sheepsse.ServerError):
        client.complete(QUESTION, checkpoint=tmp_path, refresh=True)
    assert client.complete(QUESTION, checkpoint=tmp_path).text == "Old"


def test_what_failed_is_no_finished_request(server, client, tmp_path):
    server.answer(error_answer(500), Answer(cut_after=4))
    for error in (sheepsse.ServerError, StreamInterrupted):
        assert isinstance(read(client.stream(QUESTION, checkpoint=tmp_path))[1], error)
    assert "".join(client.stream(QUESTION, checkpoint=tmp_path)) == TEXT
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    "other",
    [
        {"messages": "Another question"},
        {"messages": [{"role": "system", "content": QUESTION}]},
        {"temperature": 0.5},
        {"tools": TOOLS},
        {"extra_body": {"seed": 1}},
        {"base": "/other/v1"},
        {"dialect": "openai-responses"},
    ],
    ids=str,
)
def test_another_request_has_another_file(server, tmp_path, other):
    for changes in ({}, other):
        options = {"messages": QUESTION, "base": "/v1", "dialect": "openai", **changes}
        base_url = server.origin + options.pop("base")
        with asking(server, base_url=base_url, dialect=options.pop("dialect")) as client:
            assert not read(client.stream(**options, checkpoint=tmp_path).chunks())[1]
    assert (len(server.requests), len(os.listdir(tmp_path))) == (2, 2)


@pytest.mark.parametrize("dialect", DIALECT_BASES)
def test_another_model_is_another_request(server, tmp_path, dialect):
    with asking(server, base_url=server.origin + DIALECT_BASES[dialect], dialect=dialect) as client:
        for model in ("first-model", "second-model"):
            client.complete(QUESTION, model=model, max_tokens=500, checkpoint=tmp_path)
    assert (len(server.requests), len(os.listdir(tmp_path))) == (2, 2)


def test_no_key_and_no_header_makes_it_another_request(server, tmp_path):
    for key in ("sk-first-secret", "sk-second-secret"):
        with asking(server, api_key=key, headers={"X-Trace": key}, timeout=9) as client:
            assert "".join(client.stream(QUESTION, checkpoint=tmp_path, retry=1)) == TEXT
    assert len(server.requests) == 1


def test_an_answer_is_given_from_its_file_until_it_is_removed(server, client, tmp_path):
    store = Checkpoints(tmp_path, max_age=-1)
    for sent in (1, 1):
        assert client.complete(QUESTION, checkpoint=store).text == TEXT
        assert len(server.requests) == sent
    assert len(store.expire()) == 1
    assert client.complete(QUESTION, checkpoint=store).text == TEXT
    assert len(server.requests) == 2


# What is in the folder


def test_a_file_is_for_its_owner_alone_and_holds_neither_key_nor_prompt(server, tmp_path):
    folder = tmp_path / "new" / "folder"
    with asking(server, api_key="sk-secret", headers={"X-Secret": "a-secret"}) as client:
        client.complete(
            [{"role": "system", "content": "secret"}, {"role": "user", "content": QUESTION}], checkpoint=folder
        )
        client.complete(QUESTION, checkpoint=Checkpoints(folder).named("of mine"))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for file in folder.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert b"secret" not in file.read_bytes()
    assert len(list(folder.iterdir())) == 2


def test_each_chunk_is_kept_by_one_write_before_it_is_given_out(server, client, tmp_path, monkeypatch):
    real, written = os.write, []

    def counted(file, data):
        written.append(bytes(data))
        return real(file, data)

    monkeypatch.setattr(os, "write", counted)
    for number, chunk in enumerate(client.stream(QUESTION, checkpoint=tmp_path).chunks(), 1):
        assert len(written) == number
        assert chunk.text in json.loads(written[-1].splitlines()[-1][:-9]).get("text", "")
    assert len(written) == number + 1
    (file,) = tmp_path.iterdir()
    assert file.read_bytes() == b"".join(written)


def test_a_name_never_leads_out_of_the_folder(server, client, tmp_path):
    store = Checkpoints(tmp_path / "inner")
    name = "../../x"
    assert client.complete(QUESTION, checkpoint=store.named(name)).text == TEXT
    assert client.complete(QUESTION, checkpoint=store.named(name)).text == TEXT
    assert len(server.requests) == 1
    assert list(store) == [name]
    assert store.load(name).text == TEXT
    assert os.listdir(tmp_path) == ["inner"]
    with pytest.raises(CheckpointError, match="another request"):
        client.complete("Another question", checkpoint=store.named(name))
    assert len(server.requests) == 1


# What goes wrong with the file


def failing(monkeypatch, name, turn):
    """Lets a function of os fail at its n-th call, for want of space"""
    real, turns = getattr(os, name), itertools.count()

    def call(*arguments):
        if next(turns) >= turn:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize("setup", ["event ids", "in the background", "nothing to go on by"])
@pytest.mark.parametrize(("name", "turn"), [("write", 0), ("write", 1), ("write", 6), ("write", -1), ("fsync", 0)])
def test_a_full_disk_loses_nothing(server, tmp_path, monkeypatch, setup, name, turn):
    setup = SETUPS[setup]
    server.default = setup.answer
    options = {**setup.asked(server, tmp_path / "kept"), "api_key": False, "retry": 0}
    whole = list(sheepsse.stream(QUESTION, **{**options, "checkpoint": tmp_path / "whole"}).chunks())
    with monkeypatch.context() as patched:
        failing(patched, name, len(whole) if turn < 0 else turn)
        stream = sheepsse.stream(QUESTION, **options)
        came, error = read(stream.chunks())
    assert isinstance(error, CheckpointError)
    assert re.search("written: No space left on device", str(error))
    assert len(came) == (len(whole) if turn < 0 or name == "fsync" else turn)
    assert error.partial.text.startswith(sheepsse.collect(came).text)
    assert not error.partial.complete
    assert server.cancelled == []
    again = sheepsse.stream(QUESTION, **options)
    assert "".join(again) == TEXT
    if setup.continuity == "replayed" and turn != 0:
        assert server.billed == 2


def test_a_file_that_may_not_grow_loses_nothing(nursery, server, tmp_path):
    setup = SETUPS["event ids"]
    server.default = setup.answer
    whole = whole_answer(nursery, server, setup, tmp_path / "whole")
    lives = Lives(nursery, server, setup, tmp_path / "lives", whole)
    life = lives.live(file_size=900)
    assert (life.end["error"], life.whole) == ("CheckpointError", False)
    assert life.text
    assert life.end["partial"].startswith(life.text)
    lives.finish()
    lives.check_billing()


@pytest.mark.parametrize("place", ["under a file", "read-only"])
def test_a_folder_that_cannot_be_written_is_known_before_anything_is_sent(server, client, tmp_path, place):
    folder = tmp_path / "place"
    if place == "under a file":
        folder.write_text("a file")
        folder = folder / "folder"
    elif os.geteuid() == 0:
        pytest.skip("needs a user other than root")
    else:
        folder.mkdir(0o500)
    came, error = read(client.stream(QUESTION, checkpoint=folder))
    assert (came, type(error)) == ([], CheckpointError)
    assert str(folder) in str(error)
    assert server.requests == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data.replace(b'"sheepsse":1', b'"sheepsse":2'), "version 2"),
        (lambda data: data.replace(b"arrive", b"arrivd"), "damaged"),
        (lambda data: data[200:], "no checkpoint"),
        (lambda data: b"notes of mine\n", "no checkpoint"),
    ],
    ids=["another version", "a flipped bit", "without its beginning", "somebody's file"],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_file_that_is_not_as_it_was_written_is_left_alone(server, client, tmp_path, damage, message, finished):
    server.answer(Answer() if finished else Answer(cut_after=12))
    read(client.stream(QUESTION, checkpoint=tmp_path))
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    data = file.read_bytes()
    with pytest.raises(CheckpointError, match=message) as caught:
        client.complete(QUESTION, checkpoint=tmp_path)
    assert str(file) in str(caught.value)
    assert len(server.requests) == 1
    assert file.read_bytes() == data


def test_a_second_process_is_refused_and_sends_nothing(nursery, server, tmp_path):
    setup = SETUPS["event ids"]
    options = setup.asked(server, tmp_path)
    server.answer(setup.answer._replace(stall_after=6))
    child = nursery.begin(options)
    try:
        assert until(lambda: len(nursery.received()) == 6)
        for refresh in (False, True):
            stream = sheepsse.stream(QUESTION, api_key=False, refresh=refresh, **options)
            came, error = read(stream)
            assert (came, type(error), error.retryable) == ([], CheckpointError, True)
        assert len(server.requests) == 1
    finally:
        os.kill(child, signal.SIGKILL)
        first = nursery.end()
    assert TEXT.startswith(first.text)
    second = sheepsse.stream(QUESTION, api_key=False, **options)
    server.default = setup.answer
    assert ("".join(second), second.continuity, server.billed) == (TEXT, "replayed", 1)


def test_a_checkpoint_error_on_the_way_says_what_came(server, client, tmp_path, monkeypatch):
    failing(monkeypatch, "write", 5)
    stream = client.stream(QUESTION, checkpoint=tmp_path)
    came, error = read(stream)
    assert TEXT.startswith("".join(came))
    assert error.partial.text.startswith("".join(came))
    assert stream.text == error.partial.text
    assert server.wait_closed(HANG)


# Scripts


def test_a_command_that_was_killed_prints_the_whole_answer_when_run_again(server, tmp_path):
    server.default = NUMBERED._replace(pace=0.005)
    command = [sys.executable, "-m", "sheepsse", QUESTION, "-m", "local-model", "--no-key"]
    command += ["--base-url", server.base_url, "--checkpoint", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0, env=environment()) as process:
        said = b""
        while len(said) < len(TEXT) // 2:
            said += process.stdout.read(100)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert TEXT.encode().startswith(said)
    for sent in (2, 2):
        done = subprocess.run(command, stdout=subprocess.PIPE, env=environment(), timeout=HANG, check=True)
        assert done.stdout.decode() == TEXT
        assert (len(server.requests), server.billed) == (sent, 1)


def demo(*options):
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--pace", "0.003", *options]
    done = subprocess.run(command, capture_output=True, env=environment(), timeout=HANG, check=False)
    return done.returncode, done.stderr.decode()


@pytest.mark.parametrize(
    ("dialect", "billed"),
    [
        ("openai", "1 generation billed"),
        ("anthropic", "1 generation billed"),
        ("openai-responses", "2 generations billed"),
    ],
)
def test_the_demo_survives_lost_connections_and_a_kill(dialect, billed):
    status, said = demo("--drop", "3", "--kill", "--dialect", dialect)
    assert (status, said.splitlines()[-1]) == (
        0,
        f"[3 connections lost, 1 process killed, 5 requests, {billed}; the text is exact]",
    )
    assert "Traceback" not in said


def test_the_demo_says_what_it_cannot_show():
    status, said = demo("--drop", "3", "--kill", "--dialect", "ollama")
    assert (status, "Traceback" in said) == (2, False)
    assert "Ollama" in said


def test_an_empty_folder_name_is_refused(client):
    with pytest.raises(ValueError, match="empty"):
        client.stream("Hi", checkpoint="")
