"""The relay under the servers that run it: the same events on each, nothing left behind, nothing lost with a worker

SHEEPSSE_RELAY_FULL=1 aborts 500 streams on each server, and reads 200 at once, again and again; without it, fewer.
"""

import contextlib
import itertools
import os
import random
import re
import signal
import socket
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from conftest import InTurns
from local_provider import Answer, LocalProvider, chunk_event, split_words
from relay_servers import (
    DRAINING,
    HANG,
    KINDS,
    ask,
    connected_to,
    follow,
    get,
    held_by,
    is_there,
    memory_of,
    nginx,
    redis_server,
    require,
    running,
    stop,
    text_of,
    wait_until,
    whole,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux (/proc)")

FULL = bool(os.environ.get("SHEEPSSE_RELAY_FULL"))
ABORTED = 500 if FULL else 60
AT_ONCE, ROUNDS, PACE = (200, 5, 0.1) if FULL else (30, 3, 0.01)
LONG = pytest.mark.timeout(20 * HANG if FULL else 5 * HANG)
#: an answer that says so many words and no more
SILENT = Answer(stall_after=20, text=" ".join(f"word{number}" for number in range(60)))

#: Servers that show the relay nothing of their sockets: who is gone is noticed when something is written
BLIND = set() if is_there("werkzeug.sansio") else {"werkzeug"}  # which has it since 2.0
#: One of these serves one at a time
WORKERS = {"gunicorn-sync": 4}


def said(count):
    """Words that differ, so that none can be lost or repeated unseen"""
    return " ".join(f"word{number}" for number in range(count))


@pytest.fixture
def serve(server, tmp_path):
    """Starts relays to the provider; they end with the test"""
    with contextlib.ExitStack() as stack:

        def start(kind="gunicorn-gthread", *, relay=(), limiter=None, **options):
            settings = {"client": {"base_url": server.base_url}, "relay": dict(relay), "limiter": limiter}
            options.setdefault("workers", WORKERS.get(kind, 1))
            return stack.enter_context(running(kind, tmp_path, settings, **options))

        yield start


@pytest.fixture(scope="module")
def provider():
    with LocalProvider() as provider:
        yield provider


@pytest.fixture(scope="module", params=KINDS)
def shared(request, provider, tmp_path_factory):
    """A relay without a journal, on each kind of server; several tests ask it"""
    relay = {"heartbeat": 0.2 if request.param in BLIND else 1000}
    settings = {"client": {"base_url": provider.base_url}, "relay": relay}
    folder, workers = tmp_path_factory.mktemp("shared"), WORKERS.get(request.param, 1)
    with running(request.param, folder, settings, workers=workers) as started:
        yield started


@pytest.fixture
def each(shared, provider):
    """The relay on each kind of server, and the provider behind it, which has said nothing yet"""
    assert provider.wait_closed(HANG)
    provider.requests.clear()
    provider.sent_at = []
    yield shared, provider
    assert shared.complaints() == []


@pytest.fixture
def journal(tmp_path):
    return {"journal": str(tmp_path / "journal")}


def check_whole(events, text, *, after=0, end="done"):
    """These are all events of one stream after that one: numbered without gaps, one end, the text exact"""
    assert [event.name for event in events if event.is_terminal] == [end]
    assert events[-1].name == end
    numbered = [event for event in events if event.id]
    assert [event.number for event in numbered] == list(range(after + 1, after + 1 + len(numbered)))
    assert len({event.id.partition(":")[0] for event in numbered}) == 1
    assert text_of(events) == text


def check_log(relay):
    assert relay.complaints() == []


def idle(relay):
    """Whether no worker of the relay has a stream"""
    left, answers = set(relay.workers()), []
    while left and len(answers) < 1000:
        answers.append(get(relay, "/stats"))
        if answers[-1].json()["active"]:
            return False
        left.discard(int(answers[-1].headers["X-Pid"]))
    return not left


# The same on each server


def asked_in_turns(server, words, relay, **options):
    """A reply and its events; upstream sends each of so many words when the client has the one before"""
    server.sent_at = turns = InTurns(1 + words)
    turns.next()  # the first write has no text
    turns.next()
    events = []
    with ask(relay, **options) as reply:
        for event in reply.events():
            events.append(event)
            turns.next()
    assert not turns.in_vain
    return reply, events


def check_same(relay, server):
    """The prompt's events are what they are on every server; each is there before the next is sent"""
    server.default = Answer(text=said(30), connection="close")
    reply, events = asked_in_turns(server, 30, relay)
    assert reply.status == 200
    assert reply.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert {event.id.partition(":")[0] for event in events} == {reply.headers["X-Stream-Id"]}
    check_whole(events, said(30))
    assert [event.data["content"] for event in events[:-1]] == split_words(said(30))
    done = events[-1].data
    assert (done["model"], done["finish_reason"], done["usage"]["output_tokens"]) == ("local-model", "stop", 30)
    lags = [event.at - sent for event, sent in zip(events, server.sent_at[1:])]  # the first write has no text
    print("ms from upstream's write to the client:", round(statistics.median(lags) * 1000, 1))


def test_the_same_prompt_gives_the_same_events_on_every_server_as_they_are_sent(each):
    check_same(*each)


@pytest.mark.parametrize("kind", KINDS)
def test_it_does_so_without_flask(serve, server, kind):
    relay = serve(kind, app="bare")
    check_same(relay, server)
    check_log(relay)


def test_a_user_who_may_not_ask_reaches_no_upstream(each):
    relay, server = each
    with ask(relay, headers={"X-User": "nobody"}) as reply:
        assert reply.status == 401
        assert set(reply.json()["error"]) == {"code", "message", "request_id"}
    assert server.requests == []


# Clients that go away


def begin(relay, prompt="Good day?", **options):
    """A reply whose first text has come, and its iterator"""
    reply = ask(relay, prompt, **options)
    events = reply.events()
    next(event for event in events if not event.name)
    return reply, events


@pytest.mark.parametrize("answer", [SILENT, Answer(pace=0.05, text=said(10_000))], ids=["silent", "talking"])
def test_a_client_that_goes_away_ends_the_upstream(each, answer):
    relay, server = each
    server.default = answer
    reply, _ = begin(relay)
    at = time.perf_counter()
    reply.leave()
    assert server.wait_closed(HANG)
    print(f"ms to upstream's end: {(time.perf_counter() - at) * 1000:.0f}")


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_journal_the_upstream_ends_when_the_grace_is_over(serve, server, journal, kind):
    server.default = SILENT
    relay = serve(kind, relay={"heartbeat": 0.2 if kind in BLIND else 1000, "grace": 1, **journal})
    reply, _ = begin(relay)
    at = time.perf_counter()
    reply.leave()
    assert server.wait_closed(HANG)
    print(f"ms to upstream's end: {(time.perf_counter() - at) * 1000:.0f}")


def test_with_a_journal_the_upstream_does_not_end_before_the_grace_is_over(serve, server, journal):
    server.default = SILENT
    hasty, patient = (serve(relay={"grace": grace, **journal}, name=f"grace {grace}") for grace in (0, 1000))
    for relay in (patient, hasty):
        reply, _ = begin(relay)
        reply.leave()
    wait_until(lambda: server.open_connections == 1)
    assert connected_to(int(server.origin.rpartition(":")[2]), patient.workers())


@LONG
@pytest.mark.parametrize("kind", KINDS)
def test_streams_that_are_aborted_leave_nothing_behind(serve, server, kind):
    choose = random.Random(f"aborted {kind}")
    at_once = WORKERS.get(kind, 25)
    limiter = {"max_concurrent": at_once // WORKERS.get(kind, 1)}
    relay = serve(kind, threads=at_once, relay={"heartbeat": 0.2}, limiter=limiter)
    together = threading.Barrier(at_once)

    def hold(_):
        reply, _ = begin(relay)
        together.wait(HANG)
        reply.leave()

    def abort(count):
        reply = ask(relay)
        for _ in itertools.islice(reply.events(), count):
            pass
        reply.leave()

    def settled():
        assert server.wait_closed(HANG)
        wait_until(lambda: idle(relay), 0.05)
        return held_by(relay.workers())

    def holds_no_more():
        after = settled()
        # gevent looks up names in threads, of which it makes up to ten at need
        threads = max(before.threads, 11) if "gevent" in kind else before.threads
        return after.threads <= threads and after.files <= before.files and after.sockets <= before.sockets

    with ThreadPoolExecutor(at_once) as clients:
        server.default = Answer(stall_after=3)
        list(clients.map(hold, range(at_once)))  # every thread that the server starts at need is there now
        before = settled()
        server.default = Answer(text=said(60), pace=0.01)
        list(clients.map(abort, [choose.choice([0, 0, 1, 5, 20]) for _ in range(ABORTED)]))
        try:
            wait_until(holds_no_more, 0.05)
        finally:
            print(f"{ABORTED} aborted: {before} before, {settled()} after")
        server.default = Answer(text=said(10), pace=0.02)
        for events in clients.map(whole, [relay] * at_once):  # each at once, so no slot is lost
            check_whole(events, said(10))
            assert "queued" not in [event.name for event in events]
    check_log(relay)


@contextlib.contextmanager
def frozen(relay):
    """A client that asks, and then reads nothing"""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", relay.port))
        sock.sendall(
            b"POST /chat/stream HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b'Content-Length: 16\r\n\r\n{"prompt": "Go"}'
        )
        yield sock


def test_a_client_that_reads_nothing_is_given_up_after_a_heartbeat_or_two(serve, server):
    server.default = Answer(events=itertools.repeat(chunk_event(content=1000 * "x")))
    relay = serve(relay={"heartbeat": 1})
    with frozen(relay):
        wait_until(lambda: server.open_connections == 1)
        at = time.perf_counter()
        assert server.wait_closed(HANG)
        print(f"given up after {time.perf_counter() - at:.1f} s")
        server.default = Answer(text=said(10))
        check_whole(whole(relay), said(10))


def test_a_client_that_reads_nothing_holds_up_nobody_who_follows(serve, server, journal):
    words = [chunk_event(content=1000 * "x")] * 8_000
    server.default = Answer(events=[*words, chunk_event(finish_reason="stop"), b"data: [DONE]\n\n"])
    relay = serve(relay={"heartbeat": 1, **journal})
    with frozen(relay) as sock:
        head = sock.recv(2048)
        stream = re.search(rb"X-Stream-Id: ([0-9a-f]{32})", head, re.IGNORECASE).group(1).decode()
        with follow(relay, stream) as reply:
            check_whole(list(reply.events()), 1000 * "x" * 8_000)


# Workers that die


def other_worker(relay, stream, process):
    """One who follows the stream from another process than this one"""
    while True:
        reply = follow(relay, stream)
        assert reply.status == 200, reply.body()
        if reply.headers["X-Pid"] != str(process):
            return reply
        reply.close()


def killed_midway(relay, server):
    """What one who follows from another worker gets when the producing worker is killed"""
    reply, events = begin(relay)
    with reply:
        producer = int(reply.headers["X-Pid"])
        assert connected_to(int(server.origin.rpartition(":")[2]), relay.workers()) == [producer]
        with other_worker(relay, reply.headers["X-Stream-Id"], producer) as following:
            followed = following.events()
            seen = list(itertools.islice(followed, 10))
            os.kill(producer, signal.SIGKILL)
            at = time.perf_counter()
            seen += followed
            assert [event.name for event in events if event.is_terminal] == []  # cut, with no word
    print(f"noticed after {(seen[-1].at - at) * 1000:.0f} ms")
    return seen


def test_a_worker_that_is_killed_is_taken_over_by_another_where_upstream_has_ids(serve, server, journal):
    server.default = SILENT._replace(ids="numbers")
    relay = serve(workers=3, relay=journal)
    first = killed_midway(relay, server)
    server.default = Answer(text=said(60), ids="numbers")
    assert (first[-1].name, first[-1].id) == ("interrupted", "")
    last = first[-2]
    assert last.number == len(first) - 1
    with ThreadPoolExecutor(6) as clients:  # all come back at once, each to any worker, and one of these takes over
        for rest in clients.map(lambda _: whole(relay, after=last.id), range(6)):
            check_whole(rest, said(60)[len(text_of(first)) :], after=last.number)
    assert (server.billed, len(server.requests)) == (1, 2)


def test_a_worker_that_is_killed_ends_the_answer_where_upstream_cannot_go_on(serve, server, journal):
    server.default = SILENT
    relay = serve(workers=3, relay=journal)
    first = killed_midway(relay, server)
    for _ in range(2):
        rest = whole(relay, after=first[-2].id)
        assert [(event.name, event.id) for event in rest] == [("interrupted", "")]
    assert server.billed == 1
    with ask(relay, "Another question?", after=first[-2].id) as reply:
        assert reply.status == 409


# Many at once


@LONG
def test_of_many_at_once_those_who_stay_get_every_event_once(serve, server):
    relay = serve(workers=3, threads=AT_ONCE, relay={"heartbeat": 1})
    server.default = Answer(text=said(120), pace=PACE, connection="close")
    failures, memory, figures = [], [], {"whole": 0, "left": 0}

    def client(number):
        choose = random.Random(number)
        for _ in range(ROUNDS):
            stays = choose.random() < 0.6
            try:
                if stays:
                    check_whole(whole(relay), said(120))
                else:
                    reply = ask(relay)
                    for _ in itertools.islice(reply.events(), choose.randrange(100)):
                        pass
                    reply.leave()
            except Exception as error:
                failures.append(repr(error))
            figures["whole" if stays else "left"] += 1
            if number % 10 == 0:
                memory.append(sum(map(memory_of, relay.workers())) / 1e6)

    with ThreadPoolExecutor(AT_ONCE) as clients:
        list(clients.map(client, range(AT_ONCE)))
    assert failures == []
    assert server.wait_closed(HANG)
    print(figures, [round(size) for size in memory])
    assert figures["whole"] > AT_ONCE / 2
    assert memory[-1] < memory[len(memory) // 3] * 1.05 + 3
    check_log(relay)


# nginx


GZIP = "gzip on; gzip_types text/event-stream; gzip_proxied any;"


@pytest.mark.parametrize(("options", "encoding"), [("", None), (GZIP, "gzip")], ids=["plain", "zipped"])
def test_behind_nginx_as_it_comes_each_text_is_there_before_the_next_is_sent(
    serve, server, tmp_path, options, encoding
):
    server.default = Answer(text=said(10))
    with nginx(tmp_path, serve(), options) as port:
        reply, events = asked_in_turns(server, 10, port, headers={"Accept-Encoding": "gzip"})
    assert reply.headers["Content-Encoding"] == encoding
    check_whole(events, said(10))
    lags = [event.at - sent for event, sent in zip(events, server.sent_at[1:])]  # the first write has no text
    print("ms from upstream's write to the client:", [round(lag * 1000, 1) for lag in lags])


# A server that ends


@pytest.fixture
def draining(tmp_path):
    (tmp_path / "draining.py").write_text(DRAINING)
    return {"options": ["--config", "draining.py"], "workers": 2}


def told_to_end(relay, server, count):
    """The events that each client of a server has got when this was sent SIGTERM in the midst of their streams"""
    replies = [ask(relay) for _ in range(count)]
    streams = [reply.events() for reply in replies]
    told = [list(itertools.islice(events, 3)) for events in streams]
    relay.leader.send_signal(signal.SIGTERM)
    at = time.perf_counter()
    for reply, came, events in zip(replies, told, streams):
        came += events
        reply.close()
        last = came[-1]
        assert (last.name, last.id, last.data["code"]) == ("interrupted", "", "SHUTTING_DOWN")
    relay.leader.wait(HANG)
    took = time.perf_counter() - at
    print(f"clients were told after {(last.at - at) * 1000:.0f} ms, the server ended after {took:.1f} s")
    assert server.wait_closed(HANG)
    return told


def test_a_server_that_is_told_to_end_says_so_to_every_client(serve, server, draining):
    server.default = Answer(text=said(10_000), pace=0.05)
    told_to_end(serve(**draining), server, 4)


def test_the_next_server_carries_on_what_one_that_was_told_to_end_left(serve, server, draining, journal):
    server.default = SILENT._replace(ids="numbers")
    left = [events[-2] for events in told_to_end(serve(relay=journal, **draining), server, 2)]
    server.default = Answer(text=said(60), ids="numbers")
    relay = serve(relay=journal, name="the next")
    for last in left:
        words = split_words(said(60))[last.number :]
        check_whole(whole(relay, after=last.id), "".join(words), after=last.number)
    assert (server.billed, len(server.requests)) == (2, 4)


# Two servers


@pytest.fixture(params=["journal", "redis"])
def two(request, serve, tmp_path, journal):
    """Two servers that have nothing in common but a folder, or a Redis as if they were two machines"""
    with contextlib.ExitStack() as stack:
        place = {"redis": stack.enter_context(redis_server(tmp_path))} if request.param == "redis" else journal
        yield [serve(relay=place, name=name) for name in ("one", "other")]


def test_a_stream_can_be_followed_on_another_server(server, two):
    one, other = two
    server.default = Answer(text=said(60), pace=0.02)
    reply, events = begin(one)
    with follow(other, reply.headers["X-Stream-Id"]) as following, reply:
        check_whole(list(following.events()), said(60))
        assert text_of(events).endswith("word59")
    assert server.billed == 1


def test_a_stream_can_be_stopped_on_another_server(server, two):
    one, other = two
    server.default = SILENT
    reply, events = begin(one)
    with reply:
        at = time.perf_counter()
        assert stop(other, reply.headers["X-Stream-Id"]).json() == {"stopped": True}
        assert server.wait_closed(HANG)
        print(f"ms to upstream's end: {(time.perf_counter() - at) * 1000:.0f}")
        last = list(events)[-1]
    assert (last.name, last.data["code"]) == ("interrupted", "CANCELLED")


def test_a_server_that_dies_is_taken_over_by_another(server, two):
    one, other = two
    server.default = SILENT._replace(ids="numbers")
    reply, _ = begin(one)
    with follow(other, reply.headers["X-Stream-Id"]) as following, reply:
        events = following.events()
        first = list(itertools.islice(events, 10))
        os.killpg(one.leader.pid, signal.SIGKILL)
        at = time.perf_counter()
        first += events
    assert (first[-1].name, first[-1].id) == ("interrupted", "")
    print(f"noticed after {(first[-1].at - at) * 1000:.0f} ms")
    server.default = Answer(text=said(60), ids="numbers")
    rest = whole(other, after=first[-2].id)
    check_whole(rest, said(60)[len(text_of(first)) :], after=first[-2].number)
    assert server.billed == 1


# OpenAI's own client

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture
def openai_client(serve, server):
    require("openai", "flask")
    import openai

    with openai.OpenAI(base_url=serve().origin + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_openai_sdk_reads_text_and_usage(server, openai_client):
    server.default = Answer(text=said(20), pace=0.01)
    chunks = list(
        openai_client.chat.completions.create(
            model="local-model",
            messages=[{"role": "user", "content": "Good day?"}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    deltas = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(deltas) == said(20)
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "stop"
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [20]


def test_the_openai_sdk_reads_tool_calls(server, openai_client):
    chunks = openai_client.chat.completions.create(
        model="local-model",
        messages=[{"role": "user", "content": "What is the weather in Huế?"}],
        tools=[TOOL],
        stream=True,
    )
    calls = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or ()]
    assert (calls[0].id, calls[0].function.name) == ("call_local", "weather")
    assert {call.index for call in calls} == {0}
    assert "city" in "".join(call.function.arguments or "" for call in calls)
