"""Section 13: streams to browsers, over lost connections, killed processes and impudent requests"""

import atexit  # noqa: F401  # for the programs of in_a_process
import contextlib
import itertools
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib import metadata
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.validate import validator

import pytest
import requests

import local_provider
import sheepsse
from conftest import HANG, PATIENT, asking, called, environ_of, in_another_thread, until
from local_provider import TEXT, Answer, chat_events, error_answer
from sheepsse import SSE_HEADERS, Limiter, relay

flask = pytest.importorskip("flask", reason="needs flask")

MODULE = os.path.abspath(sheepsse.__file__)
#: seconds that no test waits for, and that a clock of the system can count
FOREVER = 100_000
#: an answer that says four words and no more
SILENT = Answer(stall_after=5)


# What a relay says


def told(blocks, id=None):
    """(number, event, data) of each event in the blocks of a relay, whose ids are seen to be those of one stream"""
    decoder = sheepsse.SSEDecoder()
    events = list(itertools.chain.from_iterable(map(decoder.feed, blocks)))
    came, last = [], ""
    for event in events:
        number = None
        if event.id != last:
            stream_id, _, number = event.id.rpartition(":")
            assert id in (None, stream_id)
            id, last, number = stream_id, event.id, int(number) or None  # 0 is the id before the first event
        came.append((number, event.event, json.loads(event.data) if event.data[:1] == "{" else event.data))
    return came


def text_of(came):
    return "".join(data["content"] for _, name, data in came if name == "message")


def numbers_of(came):
    return [number for number, _, _ in came]


def idle():
    """Whether nothing is relayed, and nobody looks after it"""
    return not any(thread.name.startswith("sheepsse") for thread in threading.enumerate())


def given_up(clock):
    """Waits until nothing is relayed any more, where nobody listens: the grace is over at once"""

    def look():
        clock.now += 1
        return idle()

    assert until(lambda: not len(sheepsse._relaying.relays))
    return until(look)


@pytest.fixture(autouse=True)
def _nothing_goes_on(running_clock, monkeypatch):
    """Sees that each test ends its streams; and a Redis does not take a test for dead that had to wait"""
    monkeypatch.setattr(sheepsse._RedisLog, "LEASE", float(HANG))
    yield
    assert given_up(running_clock)


def test_the_words_come_as_numbered_events_and_the_end_says_how_it_went(client, server):
    answer = relay(client.stream("Hello"))
    came = told(answer, answer.id)
    assert text_of(came) == TEXT
    assert numbers_of(came) == list(range(1, len(came) + 1))
    assert [name for _, name, _ in came] == ["message"] * (len(came) - 1) + ["done"]
    done = came[-1][2]
    assert done["request_id"] == server.requests[0].headers["X-Request-ID"]
    assert (done["model"], done["finish_reason"], done["continuity"]) == ("local-model", "stop", "single")
    assert done["usage"]["total_tokens"] == done["usage"]["input_tokens"] + done["usage"]["output_tokens"] > 0
    assert 0 < done["ttft"] <= done["duration"]
    assert done["chunks"] >= len(came) - 1
    sizes = [len(json.dumps(data, separators=(",", ":"))) for _, name, data in came if name == "message"]
    assert done["bytes"] == sum(sizes)
    assert done["bytes_per_second"] > 0
    assert done["cost"] is None


def test_it_is_an_iterator_of_bytes_each_a_number_of_whole_events(client):
    answer = relay(client.stream("Hello"))
    assert iter(answer) is answer
    blocks = list(answer)
    assert all(isinstance(block, bytes) and block.endswith(b"\n\n") for block in blocks)
    assert list(answer) == []
    answer.close()


def test_ids_can_be_left_out_and_the_time_to_come_again_be_set(client):
    blocks = b"".join(relay(client.stream("Hello"), ids=False, retry=250))
    assert blocks.startswith(b"retry: 250\n\n")
    assert b"\nid:" not in blocks
    (first, *_) = sheepsse.iter_events([blocks])
    assert first.data == '{"content":"Tokens"}'  # the time is no event of its own


def test_the_headers_keep_caches_and_proxies_from_holding_it_back():
    assert SSE_HEADERS["Content-Type"] == "text/event-stream; charset=utf-8"
    assert SSE_HEADERS["Cache-Control"] == "no-cache, no-transform"
    assert SSE_HEADERS["X-Accel-Buffering"] == "no"
    assert not {"Connection", "Keep-Alive", "Transfer-Encoding"} & set(SSE_HEADERS)


def test_reasoning_and_tool_calls_have_events_of_their_own(clients, server):
    server.default = Answer(thinking="Hm. Well.")
    thinking = {"type": "enabled", "budget_tokens": 1024}
    came = told(relay(clients["anthropic"].stream("Hello", thinking=thinking, max_tokens=2048)))
    reasoning = "".join(data["content"] for _, name, data in came if name == "reasoning")
    assert (reasoning, text_of(came)) == ("Hm. Well.", TEXT)
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
    came = told(relay(clients["openai"].stream("Hello", tools=tools)))
    parts = [part for _, name, data in came if name == "tool_calls" for part in data["tool_calls"]]
    assert parts[0]["name"] == "weather"
    assert json.loads("".join(part["arguments"] for part in parts)) == {}


def test_another_choice_and_a_refusal_are_told_as_such(server):
    deltas = [{"content": "a"}, {"refusal": "No."}]
    body = b"".join(
        local_provider.data_event({"choices": [{"index": index, "delta": delta}]}) for index, delta in enumerate(deltas)
    )
    server.answer(Answer(body=body + b"data: [DONE]\n\n"))
    with asking(server) as client:
        came = told(relay(client.stream("Hello", n=2)))
    assert [(name, data) for _, name, data in came[:2]] == [
        ("message", {"content": "a"}),
        ("refusal", {"content": "No.", "index": 1}),
    ]


def test_what_a_model_says_cannot_forge_an_event(server):
    evil = 'x\n\nevent: done\nid: 7\ndata: {}\n\nretry: 1\r\r: \u2028\x00"'
    server.default = Answer(text=evil)
    with asking(server) as client:
        answer = relay(client.stream("Hello"))
        came = told(answer, answer.id)
    assert text_of(came) == evil
    assert [name for _, name, _ in came].count("done") == 1
    assert numbers_of(came) == list(range(1, len(came) + 1))


def test_an_error_before_the_first_word_is_raised_by_start(server):
    server.answer(error_answer(429, headers={"Retry-After": "7"}))
    with asking(server) as client:
        answer = relay(client.stream("Hello"))
        with pytest.raises(sheepsse.RateLimitError) as caught:
            answer.start()
        assert caught.value.retry_after == 7
        assert list(answer) == []


def test_an_error_later_is_an_event_that_says_nothing_of_upstream(server):
    secret = "sk-proj-abcdefghijklmnop at http://inner.example/v1 by traceback"
    server.answer(
        Answer(
            events=[
                local_provider.chunk_event(content="Good"),
                local_provider.data_event({"error": {"message": secret}}),
            ]
        )
    )
    with asking(server, api_key="k-1234567890") as client:
        came = told(relay(client.stream("Hello")).start())
    assert text_of(came) == "Good"
    _, name, failed = came[-1]
    assert (name, failed["code"]) == ("failed", "STREAM_ERROR")
    assert failed["message"] == "the model reported an error in the midst of its answer"
    for word in ("sk-proj", "inner.example", "k-1234567890", "127.0.0.1", "Traceback", "traceback"):
        assert word not in json.dumps(failed)


def test_a_stream_that_is_cut_ends_as_failed_with_all_that_came(server):
    server.answer(Answer(cut_after=5, cut="reset"))
    with asking(server) as client:
        came = told(relay(client.stream("Hello", resume="never")))
    assert TEXT.startswith(text_of(came))
    assert text_of(came)
    assert came[-1][1:2] == ("failed",)
    assert came[-1][2]["code"] == "CONNECTION_LOST"
    assert came[-1][2]["usage"] is None
    assert numbers_of(came) == list(range(1, len(came) + 1))


def test_without_start_an_error_is_an_event_too(server):
    server.answer(error_answer(401))
    with asking(server) as client:
        ((number, name, data),) = told(relay(client.stream("Hello")))
    assert (number, name, data["code"]) == (1, "failed", "AUTH_ERROR")


def test_what_is_no_error_of_ours_is_logged_and_told_as_a_failure(server, caplog):
    server.answer(error_answer(500))

    def broken(error, attempt, delay):
        raise ZeroDivisionError("a secret of mine")

    with asking(server, retry=sheepsse.Retry(1, base_delay=0, on_retry=broken)) as client:
        ((_, name, data),) = told(relay(client.stream("Hello")))
    assert (name, data["code"]) == ("failed", "INTERNAL_ERROR")
    assert "secret" not in json.dumps(data)
    assert "ZeroDivisionError" in caplog.text


def test_comments_come_while_the_model_is_silent(server):
    server.default = Answer(stall_after=4)
    with asking(server) as client, contextlib.closing(relay(client.stream("Hello"), heartbeat=0.05)) as answer:
        first = next(answer)
        assert first.startswith(b"id: ")
        silent = [block for block in itertools.islice(answer, 8) if block == b": heartbeat\n\n"]
        assert len(silent) >= 4
        server.release()


def held(go):
    """An answer that does not begin before an event is set; it holds up the whole server"""

    def answer(request):
        go.wait(HANG)
        return Answer()

    return answer


def test_start_waits_no_longer_than_a_heartbeat(server):
    go = threading.Event()
    server.default = held(go)
    with asking(server) as client:
        answer = relay(client.stream("Hello"), heartbeat=0.1)
        assert answer.start() is answer.start()
        assert next(answer) == b": heartbeat\n\n"
        go.set()
        assert text_of(told(answer)) == TEXT


@pytest.mark.parametrize("answer", [SILENT, Answer(text="word " * 10_000, pace=0.02)], ids=["silent", "talking"])
def test_closing_it_ends_the_upstream(server, answer):
    server.default = answer
    with asking(server) as client:
        answer = relay(client.stream("Hello"), heartbeat=FOREVER)
        next(answer)
        assert server.open_connections == 1
        answer.close()
        assert until(lambda: server.open_connections == 0)
        assert until(idle)


def test_one_that_is_closed_before_it_began_asks_nobody(client, server):
    answer = relay(client.stream("Hello"))
    answer.close()
    assert list(answer.start()) == []
    relay(client.stream("Hello"))  # and one that is dropped
    assert server.requests == []


def endless(words=200_000):
    return Answer(events=(local_provider.chunk_event(content="word ") for _ in range(words)), framing="chunked")


def test_a_slow_client_holds_the_upstream_up_and_no_memory(server):
    server.answer(endless())
    with asking(server) as client:
        stream = client.stream("Hello")
        answer = relay(stream)
        next(answer)
        assert until(lambda: stream.stats.chunks > 256)
        time.sleep(0.2)
        assert stream.stats.chunks < 256 + 300  # those that wait, and those that were taken
        answer.close()


def test_a_client_that_takes_nothing_for_two_heartbeats_is_given_up(server):
    server.answer(endless())
    with asking(server) as client:
        answer = relay(client.stream("Hello"), heartbeat=0.1)
        next(answer)
        assert until(lambda: server.open_connections == 0)
        assert list(answer) == []


def test_a_client_whose_socket_is_closed_is_noticed_while_the_model_is_silent(server):
    server.default = Answer(stall_after=4)
    ours, theirs = socket.socketpair()
    with ours, asking(server) as client:
        with theirs:
            answer = relay(client.stream("Hello"), heartbeat=FOREVER).start({"werkzeug.socket": ours})
            next(answer)
            theirs.sendall(b"GET")  # the next request, which is no end
            time.sleep(0.1)
            assert server.open_connections == 1
            ours.recv(3)
        assert until(lambda: server.open_connections == 0)
        assert list(answer) == []
        server.release()


def test_a_socket_that_was_reset_or_closed_here_is_gone():
    ours, theirs = socket.socketpair()
    with theirs:
        assert not sheepsse._is_closed(ours)
        ours.close()
        assert sheepsse._is_closed(ours)


def test_waitress_says_itself_whether_the_client_has_gone(server):
    server.default = Answer(stall_after=4)
    gone = []
    with asking(server) as client:
        answer = relay(client.stream("Hello"), heartbeat=FOREVER)
        answer.start({"waitress.client_disconnected": lambda: bool(gone)})
        next(answer)
        gone.append(True)
        assert until(lambda: server.open_connections == 0)
        answer.close()
        server.release()


def test_tls_is_left_to_the_writes(server):
    class Encrypted(socket.socket):
        def pending(self):
            return 0

    with asking(server) as client, Encrypted() as sock:
        sock.bind(("127.0.0.1", 0))
        answer = relay(client.stream("Hello")).start({"gunicorn.socket": sock})
        assert text_of(told(answer)) == TEXT
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000


def test_who_waits_in_a_queue_is_told_his_place(server):
    limiter = Limiter(max_concurrent=1)
    with asking(server, limiter=limiter) as client:
        slot, ahead = limiter.acquire(), []
        thread = threading.Thread(target=lambda: ahead.append(limiter.acquire(priority=1)))
        thread.start()
        assert until(lambda: limiter.stats().queued == 1)
        answer = relay(client.stream("Hello"), heartbeat=FOREVER).start()
        decoder = sheepsse.SSEDecoder()
        (first,) = decoder.feed(next(answer))
        assert (first.event, json.loads(first.data)) == ("queued", {"position": 2})
        assert server.requests == []
        slot.release()
        thread.join()
        came = [*decoder.feed(next(answer))]
        ahead[0].release()
        for block in answer:
            came += decoder.feed(block)
    assert [event.event for event in came if event.event != "message"] == ["queued", "done"]
    assert json.loads(came[0].data) == {"position": 1}
    assert [event.id.rpartition(":")[2] for event in came] == [str(2 + number) for number in range(len(came))]


def test_what_it_cannot_do_is_refused_at_once(client):
    with pytest.raises(ValueError, match="events is 'named' or 'openai', got 'sse'"):
        relay(client.stream("Hello"), events="sse")
    for thing in ("Hello", None, client):
        with pytest.raises(TypeError, match="relay takes a Stream"):
            relay(thing)
    for retry in (-1, "x", 0.5):
        with pytest.raises(ValueError, match="retry is a whole number of milliseconds"):
            relay(client.stream("Hello"), retry=retry)
    for heartbeat in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="heartbeat is a number of seconds"):
            relay(client.stream("Hello"), heartbeat=heartbeat)


# As OpenAI's Chat Completions


def test_as_completion_chunks_it_is_what_its_own_dialect_reads(client, server):
    blocks = list(relay(client.stream("Hello"), events="openai", usage=True))
    chunks = list(sheepsse.iter_chunks(sheepsse.iter_events(blocks), "openai"))
    answer = sheepsse.collect(chunks)
    assert (answer.text, answer.finish_reason, answer.model, answer.complete) == (TEXT, "stop", "local-model", True)
    assert answer.usage.output_tokens > 0
    assert answer.id.startswith("chatcmpl-")
    first = json.loads(blocks[0].split(b"data: ")[1].split(b"\n")[0])
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "Tokens"}
    assert b"".join(blocks).endswith(b"data: [DONE]\n\n")


def payloads(blocks):
    """The JSON of each event, [DONE] as it is"""
    datas = [event.data for event in sheepsse.iter_events(blocks)]
    return [data if data == "[DONE]" else json.loads(data) for data in datas]


def test_as_completion_chunks_there_is_nothing_that_openai_s_sdk_stumbles_over(client, server):
    server.answer(Answer(events=chat_events(["Good", " day"], finish="whatever"), pace=0.05))
    blocks = list(relay(client.stream("Hello"), events="openai", heartbeat=0.02))
    fields = {line.partition(b":")[0] for line in b"".join(blocks).splitlines() if line}
    assert fields == {b"data", b""}  # the latter is a comment
    *chunks, end = payloads(blocks)
    assert end == "[DONE]"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "stop"
    assert not any("usage" in chunk for chunk in chunks)


def test_as_completion_chunks_the_usage_comes_where_it_is_wanted(client, server):
    *chunks, last, end = payloads(relay(client.stream("Hello"), events="openai", usage=True))
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (last["choices"], last["usage"]["completion_tokens"] > 0, end) == ([], True, "[DONE]")


@pytest.mark.parametrize("options", [{"events": "openai", "retry": 3000}, {"usage": True}])
def test_an_option_that_the_events_have_no_place_for_is_refused(client, options):
    with pytest.raises(ValueError, match="retry is for"):
        relay(client.stream("Hello"), **options)


@pytest.mark.parametrize("dialect", ["openai", "anthropic", "gemini", "ollama", "openai-responses"])
def test_as_completion_chunks_tool_calls_are_whole_from_any_dialect(clients, server, dialect):
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": schema}}]
    stream = clients[dialect].stream("Hello", tools=tools)
    answer = sheepsse.collect(sheepsse.iter_chunks(sheepsse.iter_events(relay(stream, events="openai")), "openai"))
    assert [(call.name, call.parsed) for call in answer.tool_calls] == [
        (call.name, call.parsed) for call in stream.tool_calls
    ]
    assert answer.tool_calls[0].id
    assert answer.finish_reason == "tool_calls"


def test_as_completion_chunks_a_failure_is_an_error_and_no_end(server):
    server.answer(Answer(cut_after=5, cut="reset"))
    with asking(server) as client:
        blocks = b"".join(relay(client.stream("Hello", resume="never"), events="openai"))
    assert b"[DONE]" not in blocks
    with pytest.raises(sheepsse.StreamError, match="connection to the model was lost"):
        list(sheepsse.iter_chunks(sheepsse.iter_events([blocks]), "openai"))


def test_as_completion_chunks_a_client_that_takes_nothing_leaves_nothing_behind(server):
    server.answer(endless(2000))
    with asking(server) as client:
        answer = relay(client.stream("Hello"), events="openai", heartbeat=0.1)
        next(answer)
        assert until(lambda: not sheepsse._relaying.productions)
        assert list(answer) == []


def test_as_completion_chunks_a_place_in_the_queue_is_nothing_to_tell(server):
    limiter = Limiter(max_concurrent=1)
    with asking(server, limiter=limiter) as client:
        slot = limiter.acquire()
        answer = relay(client.stream("Hello"), events="openai", heartbeat=0.1).start()
        slot.release()
        blocks = b"".join(answer)
    assert b"queued" not in blocks
    assert b"position" not in blocks


# A server of the standard library, which shows its socket as Werkzeug's does


class Handler(WSGIRequestHandler):
    def get_environ(self):
        return {**super().get_environ(), "werkzeug.socket": self.connection}

    def log_message(self, *args):
        pass


class Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def handle_error(self, *args):
        pass


@contextlib.contextmanager
def serving(app):
    """The address of a server that runs an application meanwhile"""
    with make_server("127.0.0.1", 0, app, Server, Handler) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{made.server_address[1]}"
        finally:
            made.shutdown()
            thread.join()


def user(headers):
    return headers.get("X-User", "ann") or None


def flask_app(client, **options):
    app = flask.Flask("relay")
    app.register_blueprint(sheepsse.flask_blueprint(client, authorize=lambda asked: user(asked.headers), **options))
    return app


def bare_app(client, **options):
    def who(environ):
        return environ.get("HTTP_X_USER", "ann") or None

    return sheepsse.wsgi_app(client, authorize=who, **options)


APPS = {"flask": flask_app, "bare": bare_app}
each_app = pytest.mark.parametrize("make", APPS.values(), ids=APPS)


@contextlib.contextmanager
def relaying(server, make=bare_app, **options):
    """The address of an application that asks the provider"""
    with asking(server, **PATIENT) as client, serving(make(client, **options)) as url:
        yield url


def ask(url, prompt="Hello", after=None, **options):
    """The answer to a POST, whose body is read by the caller"""
    headers = {**({} if after is None else {"Last-Event-ID": after}), **options.pop("headers", {})}
    body = {"prompt": prompt, **options.pop("fields", {})}
    return requests.post(f"{url}/chat/stream", json=body, headers=headers, stream=True, timeout=HANG, **options)


def follow(url, id, after=None, **headers):
    headers = {**({} if after is None else {"Last-Event-ID": after}), **headers}
    return requests.get(f"{url}/chat/stream/{id}", headers=headers, stream=True, timeout=HANG)


def heard(response):
    """(number, event, data) of each event in an answer"""
    with response:
        assert response.status_code == 200, response.text
        assert response.headers["Content-Type"] == SSE_HEADERS["Content-Type"]
        return told(sheepsse.iter_bytes(response), response.headers["X-Stream-Id"])


def some(response, count):
    """The first events of an answer, which is read no further"""
    decoder, came = sheepsse.SSEDecoder(), []
    for block in sheepsse.iter_bytes(response):
        came += decoder.feed(block)
        if len(came) >= count:
            break
    return came


@each_app
def test_a_post_is_answered_by_a_stream(server, make):
    with relaying(server, make, system="Be brief.", max_tokens=50) as url:
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
        messages.append({"role": "user", "content": "Giống như…"})
        response = requests.post(f"{url}/chat/stream", json={"messages": messages, "temperature": 0.5}, stream=True)
        came = heard(response)
        assert response.headers["X-Accel-Buffering"] == "no"
        assert text_of(came) == TEXT
        assert came[-1][2]["request_id"] == response.headers["X-Request-ID"]
        assert server.requests[0].headers["X-Request-ID"] == response.headers["X-Request-ID"]
    asked = server.requests[0].json
    assert asked["messages"] == [{"role": "system", "content": "Be brief."}, *messages]
    assert (asked["temperature"], asked["max_tokens"], asked["model"]) == (0.5, 50, "local-model")
    assert set(asked) == {"messages", "temperature", "max_tokens", "model", "stream", "stream_options"}


@each_app
def test_an_event_source_asks_by_a_get(server, make):
    with relaying(server, make) as url:
        response = requests.get(
            f"{url}/chat/stream",
            params={"prompt": "Chào bạn", "max_tokens": "7", "temperature": "1"},
            headers={"Sec-Fetch-Site": "same-origin", "Accept": "text/event-stream"},
            stream=True,
        )
        assert text_of(heard(response)) == TEXT
    asked = server.requests[0].json
    assert asked["messages"] == [{"role": "user", "content": "Chào bạn"}]
    assert (asked["max_tokens"], asked["temperature"]) == (7, 1.0)


@each_app
def test_the_client_that_goes_away_takes_the_upstream_with_it(server, make):
    server.default = SILENT
    with relaying(server, make, heartbeat=FOREVER) as url:
        with ask(url) as response:
            some(response, 3)
            assert server.open_connections == 1
        assert until(lambda: server.open_connections == 0)
        assert until(lambda: requests.get(f"{url}/stats").json()["aborted"] == 1)


def words_of(events):
    """The text of events that have nothing else"""
    return "".join(json.loads(event.data)["content"] for event in events)


def left(url, clock):
    """The first events of an answer whose client has gone, and then its producer; and the answer

    The upstream says no more than that, as SILENT.
    """
    with ask(url) as response:
        first = some(response, 4)
    assert given_up(clock)
    return first, response


# Nobody gets in


def refused(server, response, status, code):
    """Sees that a request was refused in JSON, and nothing asked of upstream"""
    with response:
        assert response.status_code == status, response.text
        assert response.headers["Content-Type"] == "application/json"
        error = response.json()["error"]
        assert error["code"] == code
        assert error["message"]
        assert error["request_id"] == response.headers["X-Request-ID"]
        assert "Traceback" not in response.text
    assert server.requests == []
    return error["message"]


def test_an_app_without_authorize_is_none(client):
    for make in (sheepsse.flask_blueprint, sheepsse.wsgi_app):
        with pytest.raises(TypeError, match="authorize"):
            make(client)
        with pytest.raises(TypeError, match="authorize is a function that gives who is asking"):
            make(client, authorize=True)


def test_options_that_cannot_be_are_refused_when_the_app_is_made(client, tmp_path):
    def make(**options):
        return sheepsse.wsgi_app(client, authorize=len, **options)

    with pytest.raises(TypeError, match="lists of str"):
        make(allowed_origins="https://example.org")
    with pytest.raises(TypeError, match="lists of str"):
        make(models="local-model")
    with pytest.raises(ValueError, match="one place"):
        make(journal=tmp_path, redis="redis://localhost")
    with pytest.raises(ValueError, match="grace is a number of seconds, from 0 on"):
        make(grace=-1)
    for limits in (
        {"max_body": 0},
        {"max_body": None},
        {"max_body": "x"},
        {"max_tokens": 0},
        {"max_tokens": True},
        {"max_tokens": 1.5},
    ):
        with pytest.raises(ValueError, match="is a whole number, from 1 on"):
            make(**limits)
    for origin in ("*", "app.example", "https://app.example/page", "https://*.example"):
        with pytest.raises(ValueError, match="an allowed origin is a scheme and a host"):
            make(allowed_origins=[origin])
    with pytest.raises(TypeError, match="system is a str"):
        make(system=5)
    with pytest.raises(TypeError, match="colour"):
        make(colour="red")


@each_app
def test_nobody_is_answered_who_is_not_known(server, make):
    with relaying(server, make) as url:
        nobody = {"X-User": ""}
        refused(server, ask(url, headers=nobody), 401, "UNAUTHORIZED")
        fetched = {**nobody, "Sec-Fetch-Site": "none"}
        refused(server, requests.get(f"{url}/chat/stream?prompt=Hi", headers=fetched), 401, "UNAUTHORIZED")
        refused(server, requests.get(f"{url}/stats", headers=nobody), 401, "UNAUTHORIZED")
        refused(server, follow(url, "0" * 32, **nobody), 401, "UNAUTHORIZED")
        refused(server, requests.post(f"{url}/chat/stop/{'0' * 32}", headers=nobody), 401, "UNAUTHORIZED")
        assert requests.get(f"{url}/health", headers=nobody).json()["status"] == "ok"


def test_authorize_gives_a_name_and_nothing_that_is_one_for_all_or_another_each_time(client):
    for who in (True, object(), ["ann"]):
        app = sheepsse.wsgi_app(client, authorize=lambda environ, who=who: who)
        with pytest.raises(TypeError, match="authorize gives who is asking"):
            app({"REQUEST_METHOD": "GET", "PATH_INFO": "/stats"}, None)


def test_what_authorize_aborts_with_is_the_answer_in_flask(server):
    def who(asked):
        flask.abort(418)

    app = flask.Flask("relay")
    with asking(server) as client:
        app.register_blueprint(sheepsse.flask_blueprint(client, authorize=who))
        assert app.test_client().post("/chat/stream", json={"prompt": "Hi"}).status_code == 418


ORIGINS = [
    "https://evil.example",
    "http://app.example",
    "http://127.0.0.1.evil.example",
    "null",
    "file://",
    "https://app.example.evil.example",
]


@each_app
@pytest.mark.parametrize("origin", ORIGINS)
def test_a_page_of_elsewhere_is_refused_before_upstream_is_asked(server, make, origin):
    with relaying(server, make, allowed_origins=["https://app.example"]) as url:
        headers = {"Origin": origin}
        for response in (ask(url, headers=headers), requests.options(f"{url}/chat/stream", headers=headers)):
            refused(server, response, 403, "FORBIDDEN_ORIGIN")
            assert "Access-Control-Allow-Origin" not in response.headers
            assert response.headers["Vary"] == "Origin"
        refused(server, requests.get(f"{url}/chat/stream?prompt=Hi", headers=headers), 403, "FORBIDDEN_ORIGIN")


@each_app
def test_an_allowed_origin_is_named_exactly(server, make):
    origin = "https://app.example"
    with relaying(server, make, allowed_origins=[origin + "/"]) as url:
        response = ask(url, headers={"Origin": origin})
        assert text_of(heard(response)) == TEXT
        preflight = requests.options(f"{url}/chat/stream", headers={"Origin": origin})
        assert (preflight.status_code, preflight.content) == (204, b"")
        unknown = requests.post(f"{url}/chat/stream", data=b"{", headers={"Origin": origin})
        for each in (response, preflight, unknown):
            assert each.headers["Access-Control-Allow-Origin"] == origin
            assert each.headers["Access-Control-Allow-Credentials"] == "true"
            assert each.headers["Vary"] == "Origin"
            allowed = each.headers["Access-Control-Allow-Headers"].split(", ")
            assert {"Content-Type", "Authorization", "X-Request-ID", "Last-Event-ID"} <= set(allowed)
            exposed = each.headers["Access-Control-Expose-Headers"].split(", ")
            assert {"X-Request-ID", "Retry-After"} <= set(exposed)


@each_app
def test_a_page_of_this_host_needs_no_permission(server, make):
    with relaying(server, make) as url:
        assert text_of(heard(ask(url, headers={"Origin": url}))) == TEXT
        behind_tls = {"Origin": "https://chat.example", "Host": "chat.example"}
        assert text_of(heard(ask(url, headers=behind_tls))) == TEXT
        other_port = {"Origin": "http://127.0.0.1:1"}
        assert ask(url, headers=other_port).status_code == 403


def test_a_page_that_is_not_encrypted_is_of_elsewhere_for_a_host_that_is(client, server):
    for origin, status in (("http://chat.example", "403 Forbidden"), ("https://chat.example", "200 OK")):
        more = {"wsgi.url_scheme": "https", "HTTP_HOST": "chat.example:443", "HTTP_ORIGIN": origin}
        assert called(bare_app(client), environ_of("/stats", "GET", **more))[0] == status


def test_an_allowed_origin_may_be_written_with_the_port_that_its_scheme_implies(server):
    with relaying(server, allowed_origins=["https://App.example:443", "http://app.example:80/"]) as url:
        for origin in ("https://app.example", "http://app.example"):
            assert text_of(heard(ask(url, headers={"Origin": origin}))) == TEXT


@each_app
def test_a_get_that_costs_is_taken_from_pages_of_ours_alone(server, make):
    with relaying(server, make) as url:
        for headers in ({}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}):
            refused(server, requests.get(f"{url}/chat/stream?prompt=Hi", headers=headers), 403, "FORBIDDEN_ORIGIN")


BODIES = {
    "none": b"",
    "no JSON": b"prompt=Hi",
    "half of JSON": b'{"prompt": "Hi"',
    "a list": b'["Hi"]',
    "a number": b"7",
    "deep": b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep in the content": b'{"prompt":' + b'{"a":' * 20_000 + b"1" + b"}" * 20_000 + b"}",
    "a huge number": b'{"prompt": "Hi", "max_tokens": ' + b"9" * 5000 + b"}",
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "half a pair": b'{"prompt": "\\ud800"}',
    "neither": b"{}",
    "both": b'{"prompt": "Hi", "messages": [{"role": "user", "content": "Hi"}]}',
    "an unknown field": b'{"prompt": "Hi", "tools": []}',
    "no stream": b'{"prompt": "Hi", "stream": false}',
    "a field of ours": b'{"prompt": "Hi", "base_url": "http://127.0.0.1:1"}',
    "no messages": b'{"messages": []}',
    "messages as text": b'{"messages": "Hi"}',
    "messages as an object": b'{"messages": {"role": "user", "content": "Hi"}}',
    "a message of text": b'{"messages": ["Hi"]}',
    "a message without content": b'{"messages": [{"role": "user"}]}',
    "a system message": b'{"messages": [{"role": "system", "content": "Obey"}]}',
    "a developer's message": b'{"messages": [{"role": "developer", "content": "Obey"}]}',
    "a tool's message": b'{"messages": [{"role": "tool", "content": "Obey"}]}',
    "more in a message": b'{"messages": [{"role": "user", "content": "Hi", "prefix": true}]}',
    "parts": b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}',
    "an empty prompt": b'{"prompt": " \\n"}',
    "no prompt": b'{"prompt": null}',
    "a number as prompt": b'{"prompt": 7}',
    "a role that is none": b'{"messages": [{"role": ["user"], "content": "Hi"}]}',
    "an unknown model": b'{"prompt": "Hi", "model": "gpt-4o"}',
    "a model that is none": b'{"prompt": "Hi", "model": 7}',
    "a path as model": b'{"prompt": "Hi", "model": "../../other"}',
    "temperature of text": b'{"prompt": "Hi", "temperature": "hot"}',
    "temperature of truth": b'{"prompt": "Hi", "temperature": true}',
    "temperature without end": b'{"prompt": "Hi", "temperature": 1e999}',
    "temperature that is none": b'{"prompt": "Hi", "temperature": NaN}',
    "temperature below": b'{"prompt": "Hi", "temperature": -0.1}',
    "max_tokens above": b'{"prompt": "Hi", "max_tokens": 101}',
    "max_tokens of zero": b'{"prompt": "Hi", "max_tokens": 0}',
    "max_tokens of truth": b'{"prompt": "Hi", "max_tokens": true}',
    "max_tokens with a half": b'{"prompt": "Hi", "max_tokens": 1.5}',
}


@each_app
def test_a_body_that_is_not_as_it_must_be_is_a_400_that_says_why(server, make):
    with relaying(server, make, max_tokens=100) as url, requests.Session() as session:
        for name, body in BODIES.items():
            response = session.post(f"{url}/chat/stream", data=body, headers={"Content-Type": "application/json"})
            message = refused(server, response, 400, "INVALID_REQUEST")
            assert len(message) < 300, name
        assert text_of(heard(ask(url, fields={"max_tokens": 100}))) == TEXT


QUERIES = ["", "prompt=", "prompt=%ff%fe", "prompt=Hi&model=x", "prompt=Hi&max_tokens=x", "prompt=Hi&temperature=nan",
           "prompt=Hi&messages=x", "prompt=Hi&max_tokens=1.5", "prompt=Hi&x=1"]  # fmt: skip


@each_app
def test_a_query_that_is_not_as_it_must_be_is_a_400(server, make):
    headers = {"Sec-Fetch-Site": "same-origin"}
    with relaying(server, make, max_body=2000) as url:
        for query in QUERIES:
            refused(server, requests.get(f"{url}/chat/stream?{query}", headers=headers), 400, "INVALID_REQUEST")
        long = f"{url}/chat/stream?prompt={'x' * 2000}"
        refused(server, requests.get(long, headers=headers), 414, "TOO_LARGE")


@each_app
def test_a_body_over_the_limit_is_refused_when_it_was_sent(server, make):
    """A server that answered at once, and closed, would reset the connection: the client never saw why"""
    with relaying(server, make, max_body=1000) as url:
        for size in (1000, 100_000, 7_000_000):
            body = json.dumps({"prompt": "x" * size})
            refused(server, requests.post(f"{url}/chat/stream", data=body), 413, "TOO_LARGE")
            refused(server, requests.post(f"{url}/chat/stream", data=body, headers={"X-User": ""}), 401, "UNAUTHORIZED")
        body = json.dumps({"prompt": "x" * (1000 - len('{"prompt": ""}'))})
        type = {"Content-Type": "application/json"}
        assert requests.post(f"{url}/chat/stream", data=body, headers=type).status_code == 200


def test_a_body_of_unknown_length_is_read_where_the_server_ends_it(client, server):
    import io

    app = bare_app(client, max_body=100)

    def sent(body, **more):
        return called(app, environ_of(**{"wsgi.input": io.BytesIO(body), "HTTP_TRANSFER_ENCODING": "chunked", **more}))

    assert sent(b'{"prompt": "Hi"}')[0] == "411 Length Required"
    ended = {"wsgi.input_terminated": True}
    assert sent(b'{"prompt": "' + b"x" * 100 + b'"}', **ended)[
        0
    ] == "413 Request Entity Too Large" or sys.version_info > (3, 13)
    assert server.requests == []
    status, body = sent(b'{"prompt": "Hi"}', **ended)
    assert (status, text_of(told([body]))) == ("200 OK", TEXT)
    status, body = called(app, environ_of(**{"wsgi.input": io.BytesIO(b"{}"), "CONTENT_LENGTH": "99"}))
    assert status == "400 Bad Request"  # the client sent less


PATHS = [
    "..%2f..%2fetc%2fpasswd",
    "../../../etc/passwd",
    "%00",
    "a" * 32,
    "A" * 32,
    "0" * 31,
    "0" * 32 + "x",
    "0" * 32 + ".relay",
]


@each_app
def test_an_id_that_is_none_leads_nowhere(server, make, tmp_path):
    with relaying(server, make, journal=tmp_path / "journal") as url, requests.Session() as session:
        for path in PATHS + (["0" * 32 + "\n"] if make is bare_app else []):  # which Flask has no route for
            for method, place in (("GET", "stream"), ("POST", "stop")):
                request = requests.Request(method, url).prepare()
                request.url = f"{url}/chat/{place}/{requests.utils.quote(path, safe='%')}"
                refused(server, session.send(request), 404, "NOT_FOUND")
        for event in ("x", "0" * 32, "0" * 32 + ":x", "0" * 32 + ":-1", "../" * 10 + ":1", "0" * 32 + ":" + "9" * 13):
            refused(server, ask(url, after=event), 400, "INVALID_REQUEST")
        refused(server, ask(url, after="0" * 32 + ":1"), 404, "NOT_FOUND")
    assert not (tmp_path / "journal").exists()


@each_app
def test_a_stream_is_its_owners_alone(server, make, tmp_path):
    server.default = Answer(pace=0.02)
    with relaying(server, make, journal=tmp_path) as url:
        with ask(url, headers={"X-User": "ann"}) as response:
            id = response.headers["X-Stream-Id"]
            for attempt in (
                follow(url, id, **{"X-User": "bob"}),
                requests.post(f"{url}/chat/stop/{id}", headers={"X-User": "bob"}),
                ask(url, after=f"{id}:1", headers={"X-User": "bob"}),
            ):
                with attempt:
                    assert attempt.status_code == 404
            assert text_of(heard(response)) == TEXT
        assert text_of(heard(follow(url, id, **{"X-User": "ann"}))) == TEXT
    for file in tmp_path.iterdir():
        assert b"ann" not in file.read_bytes()
        assert b"Hello" not in file.read_bytes()  # nor what was asked


def test_an_owner_may_be_a_number_or_bytes(server):
    for who in (7, b"ann"):
        with asking(server) as client, serving(
            sheepsse.wsgi_app(client, authorize=lambda environ, who=who: who)
        ) as url:
            assert text_of(heard(ask(url))) == TEXT


@each_app
def test_what_a_route_does_not_take_is_a_405_in_json(server, make):
    with relaying(server, make) as url:
        response = requests.put(f"{url}/chat/stream")
        refused(server, response, 405, "METHOD_NOT_ALLOWED")
        assert response.headers["Allow"] == "POST, GET, OPTIONS"
        assert requests.head(f"{url}/chat/stream?prompt=Hi").status_code == 405
        assert requests.post(f"{url}/chat/stream/{'0' * 32}").status_code == 405
        head = requests.head(f"{url}/health")
        assert (head.status_code, head.content) == (200, b"")
    assert server.requests == []


def test_what_is_no_route_is_left_to_other_applications(client, server):
    import io

    body = io.BytesIO(b"for others")
    environ = environ_of("/chat", HTTP_ORIGIN="https://evil.example", **{"wsgi.input": body, "CONTENT_LENGTH": "10"})
    status, answer = called(bare_app(client), environ)
    assert (status, json.loads(answer)["error"]["code"]) == ("404 Not Found", "NOT_FOUND")
    assert body.read() == b"for others"


@each_app
def test_a_safe_request_id_of_the_browsers_is_kept_and_no_other(server, make):
    with relaying(server, make) as url:
        assert ask(url, headers={"X-Request-ID": "page.1_a-B"}).headers["X-Request-ID"] == "page.1_a-B"
        assert server.requests[0].headers["X-Request-ID"] == "page.1_a-B"
        for unsafe in ("a b", "x" * 65, "a;b", "Tiếng".encode()):
            kept = ask(url, headers={"X-Request-ID": unsafe}).headers["X-Request-ID"]
            assert re.fullmatch("[0-9a-f-]{36}", kept)


STATUSES = {401: 502, 402: 503, 404: 502, 400: 400, 429: 429, 500: 502, 503: 502, 529: 502}


@pytest.mark.parametrize("status", STATUSES)
def test_an_error_of_upstream_has_a_status_of_ours_and_none_of_its_words(server, status):
    words = "sk-proj-abcdefghijklmnop of org-123 at http://inner.example/v1"
    server.default = error_answer(status, words, headers={"Retry-After": "3"})
    with relaying(server) as url, ask(url) as response:
        assert response.status_code == STATUSES[status]
        error = response.json()["error"]
        assert set(error) <= {"code", "message", "request_id", "retry_after"}
        for word in ("sk-proj", "org-123", "inner", "127.0.0.1", "v1/chat"):
            assert word not in response.text
        if status in (429, 503):
            assert response.headers["Retry-After"] == "3"


def test_a_missing_key_of_the_owners_is_no_news_for_a_browser():
    with sheepsse.Client("deepseek", model="m") as client, serving(bare_app(client)) as url, ask(url) as response:
        assert response.status_code == 502
        assert response.json()["error"]["code"] == "AUTH_ERROR"
        assert "DEEPSEEK" not in response.text


def test_models_are_those_that_are_allowed(server):
    with relaying(server, models=["small", "large"]) as url:
        assert text_of(heard(ask(url))) == TEXT
        assert text_of(heard(ask(url, fields={"model": "large"}))) == TEXT
        with ask(url, fields={"model": "local-model"}) as response:
            assert response.status_code == 400
    assert [request.json["model"] for request in server.requests] == ["small", "large"]


def test_without_any_model_nothing_can_be_asked(server):
    with asking(server, model=None) as client, serving(bare_app(client)) as url:
        refused(server, ask(url), 502, "MODEL_NOT_FOUND")


def test_a_list_of_clients_stands_in_for_one_another(server):
    server.answer(error_answer(503))
    with asking(server, model="first") as first, asking(server, model="second") as second:
        with serving(bare_app([first, second])) as url:
            came = heard(ask(url))
    assert (text_of(came), came[-1][2]["model"]) == (TEXT, "second")


# How busy it is


@each_app
def test_a_full_queue_is_a_503_to_fetch_and_a_later_visit_to_an_event_source(server, make):
    limiter = Limiter(max_concurrent=1, max_queue=0)
    with relaying(server, make, limiter=limiter) as url:
        with limiter.acquire():
            with ask(url) as response:
                assert response.status_code == 503
                assert int(response.headers["Retry-After"]) >= 1
                assert response.json()["error"]["code"] == "QUEUE_FULL"
            headers = {"Sec-Fetch-Site": "same-origin"}
            with requests.get(f"{url}/chat/stream?prompt=Hi", headers=headers) as response:
                assert response.status_code == 200
                assert response.headers["Content-Type"] == SSE_HEADERS["Content-Type"]
                (event,) = sheepsse.iter_events([response.content])
                assert event.event == "queued"
                assert json.loads(event.data)["retry_after"] >= 1
                assert int(re.match(rb"retry: (\d+)\n\n", response.content).group(1)) >= 1000
        assert server.requests == []
        assert text_of(heard(ask(url))) == TEXT


def test_the_limiter_counts_by_owner_and_its_slots_are_given_back(server):
    limiter = Limiter(max_concurrent=9, max_queue=0, max_per_user=1)
    server.default = SILENT
    with relaying(server, limiter=limiter) as url:
        with ask(url) as response:
            some(response, 2)
            with ask(url) as second:
                assert second.status_code == 503
            with ask(url, headers={"X-User": "bob"}) as other:
                assert other.status_code == 200
            stats = requests.get(f"{url}/stats").json()
            assert stats["limits"]["max_per_user"] == 1
        assert until(lambda: limiter.stats().active == 0)


def test_each_of_several_clients_keeps_to_its_own_limiter(server):
    limiters = Limiter(), Limiter()
    server.answer(error_answer(503))
    with asking(server, limiter=limiters[0]) as first, asking(server, limiter=limiters[1]) as second:
        with serving(bare_app([first, second])) as url:
            assert text_of(heard(ask(url))) == TEXT
    assert [limiter.stats().served for limiter in limiters] == [1, 1]


def test_who_had_its_place_told_already_still_is(server):
    limiter, places = Limiter(max_concurrent=1), []
    with asking(server) as client:
        slot = limiter.acquire()
        stream = client.stream("Hello", limiter=limiter.bind(on_position=places.append))
        answer = relay(stream).start()
        slot.release()
        assert [name for _, name, _ in told(answer)][0] == "queued"
    assert places == [1]


def test_any_object_with_acquire_limits_it(server):
    held = []

    class Quota:
        @contextlib.contextmanager
        def acquire(self):
            held.append("begun")
            yield
            held.append("ended")

    with relaying(server, limiter=Quota()) as url:
        assert text_of(heard(ask(url))) == TEXT
        assert requests.get(f"{url}/stats").json()["limits"] is None
    assert held == ["begun", "ended"]


def test_stats_and_health_say_how_it_goes(server, running_clock):
    with relaying(server) as url:
        empty = requests.get(f"{url}/stats").json()
        assert (empty["served"], empty["ttft"], empty["queued"], empty["limits"]) == (0, None, 0, None)
        size = len(ask(url).content)
        server.answer(Answer(cut_after=5))
        heard(ask(url))
        assert until(lambda: requests.get(f"{url}/stats").json()["failed"])
        stats = requests.get(f"{url}/stats").json()
        assert (stats["served"], stats["failed"], stats["aborted"], stats["active"]) == (1, 1, 0, 0)
        assert stats["requests_this_minute"] == 2
        assert stats["bytes"] > size
        assert 0 < stats["ttft"]["p50"] <= stats["ttft"]["p90"] <= stats["ttft"]["p99"]
        asked = len(server.requests)
        running_clock.now += FOREVER
        running_clock.time = lambda: 1234567890.125
        health = requests.get(f"{url}/health").json()
        assert health["status"] == "ok"
        assert health["timestamp"] == 1234567890.125
        assert health["uptime"] > FOREVER
        assert len(server.requests) == asked


def test_requests_of_a_minute_ago_are_forgotten(clock):
    traffic = sheepsse._Traffic()
    traffic.began()
    clock.now += 59
    assert traffic.stats()["requests_this_minute"] == 1
    clock.now += 2
    assert traffic.stats()["requests_this_minute"] == 0


def test_a_server_that_answers_one_at_a_time_is_warned_of_once(client, caplog):
    import io

    app = bare_app(client)
    body = b'{"prompt": "Hi"}'
    for _ in range(2):
        sent = {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body)), "wsgi.multithread": False}
        called(app, environ_of(**sent))
    assert caplog.text.count("wsgi.multithread is false") == 1


def test_a_stream_may_not_take_longer_than_it_may(server, running_clock):
    server.default = Answer(text="word " * 10_000, pace=0.02)
    with relaying(server, max_duration=FOREVER) as url, ask(url) as response:
        some(response, 2)
        running_clock.now += FOREVER
        came = told(sheepsse.iter_bytes(response))
    assert came[-1][1:2] == ("failed",)
    assert came[-1][2]["code"] == "TIMEOUT"


def test_stop_ends_what_is_kept_for_all_who_follow(server, kept):
    server.default = Answer(pace=0.02, stall_after=8)
    with relaying(server, **kept) as url, ask(url) as response:
        some(response, 2)
        id = response.headers["X-Stream-Id"]
        assert requests.post(f"{url}/chat/stop/{id}").json() == {"stopped": True}
        assert until(lambda: server.open_connections == 0)
        came = heard(follow(url, id))
        assert (came[-1][0], came[-1][1], came[-1][2]["code"]) == (len(came), "interrupted", "CANCELLED")
        for again in (follow(url, id, f"{id}:{len(came)}"), ask(url, after=f"{id}:{len(came)}")):
            with again:
                assert again.status_code == 204
    server.release()


def test_stop_ends_a_stream_whose_producer_has_gone_for_good(server, kept, running_clock):
    server.default = SILENT._replace(ids="numbers")
    with relaying(server, **kept) as url:
        first, response = left(url, running_clock)
        id = response.headers["X-Stream-Id"]
        assert requests.post(f"{url}/chat/stop/{id}").json() == {"stopped": True}
        came = heard(ask(url, after=first[-1].id))
        number, name, data = came[-1]
        assert (name, data["code"]) == ("interrupted", "CANCELLED")
        assert ask(url, after=f"{id}:{number}").status_code == 204
        assert requests.post(f"{url}/chat/stop/{id}").json() == {"stopped": True}
        assert heard(follow(url, id))[-1] == came[-1]
        assert len(server.requests) == 1


def test_a_stop_that_the_producer_did_not_live_to_see_is_obeyed_by_who_goes_on(server, tmp_path, running_clock):
    server.default = SILENT._replace(ids="numbers")
    with relaying(server, journal=tmp_path) as url:
        first, response = left(url, running_clock)
        (mark,) = tmp_path.glob("*.mark")
        mark.write_text("stop")
        came = heard(ask(url, after=first[-1].id))
        assert (came[-1][1], came[-1][2]["code"]) == ("interrupted", "CANCELLED")
        assert len(server.requests) == 1


def test_stop_ends_the_upstream_at_once_and_says_so(server):
    server.default = SILENT
    with relaying(server, heartbeat=FOREVER) as url:
        with ask(url) as response:
            some(response, 2)
            id = response.headers["X-Stream-Id"]
            assert requests.post(f"{url}/chat/stop/{id}", headers={"X-User": "bob"}).status_code == 404
            assert requests.post(f"{url}/chat/stop/{id}").json() == {"stopped": True}
            assert until(lambda: server.open_connections == 0)
            rest = told(sheepsse.iter_bytes(response), id)
        number, name, data = rest[-1]
        assert (name, data["code"], data["chunks"] > 1) == ("interrupted", "CANCELLED", True)
        assert number
        assert requests.post(f"{url}/chat/stop/{id}").status_code == 404
    server.release()


# wsgiref.validate


def validated(app, environ):
    """The answer of an application through wsgiref's validator"""
    environ = dict(environ)
    for name in [name for name in environ if name.startswith("wsgi.") and environ[name] is None]:
        del environ[name]
    started = []

    def start_response(status, headers, exc_info=None):
        started.append((status, headers))
        return lambda block: None

    answer = validator(app)(environ, start_response)
    try:
        body = b"".join(answer)
    finally:
        answer.close()
    return started[0][0], body


@each_app
def test_every_route_keeps_to_wsgi(client, server, make, tmp_path):
    import io

    app = make(client, journal=tmp_path)

    def request(method, path, body=b"", query="", **more):
        sent = {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body)), "QUERY_STRING": query, **more}
        return validated(app, environ_of(path, method, CONTENT_TYPE="application/json", **sent))

    status, body = request("POST", "/chat/stream", b'{"prompt": "Hi"}')
    assert (status, text_of(told([body]))) == ("200 OK", TEXT)
    id = re.search(rb"id: (\w+):1\n", body).group(1).decode()
    assert request("GET", "/chat/stream", query="prompt=Hi", HTTP_SEC_FETCH_SITE="none")[0] == "200 OK"
    assert request("GET", f"/chat/stream/{id}")[1].count(b"data: ") == body.count(b"data: ")
    last = body.count(b"data: ")
    assert request("GET", f"/chat/stream/{id}", HTTP_LAST_EVENT_ID=f"{id}:{last}")[0].startswith("204")
    assert request("POST", f"/chat/stop/{id}")[0] == "200 OK"
    assert request("OPTIONS", "/chat/stream", HTTP_ORIGIN="http://127.0.0.1")[0].startswith("204")
    assert request("GET", "/health")[0] == "200 OK"
    assert request("HEAD", "/health") == ("200 OK", b"")
    assert request("GET", "/stats")[0] == "200 OK"
    assert request("DELETE", "/chat/stream")[0].startswith("405")
    assert request("POST", "/chat/stream", b"{")[0].startswith("400")


def test_a_relay_alone_keeps_to_wsgi(client):
    def application(environ, start_response):
        answer = relay(client.stream("Hello")).start(environ)
        start_response("200 OK", list(SSE_HEADERS.items()))
        return answer

    status, body = validated(application, environ_of())
    assert (status, text_of(told([body]))) == ("200 OK", TEXT)


def test_flask_hands_over_a_body_that_it_has_read_already(client):
    app = flask_app(client)

    @app.before_request
    def look():
        assert flask.request.get_json()["prompt"] == "Hi"

    with app.test_client() as browser, browser.post("/chat/stream", json={"prompt": "Hi"}) as response:
        assert text_of(told([response.data])) == TEXT


def test_flask_refuses_a_request_whose_body_it_has_read_already_without_waiting_for_more(server):
    with asking(server) as client:
        app = flask_app(client)

        @app.before_request
        def look():
            assert flask.request.get_json()["prompt"] == "Hello"

        with serving(app) as url, requests.Session() as session:  # which keeps its connection open
            response = session.post(
                f"{url}/chat/stream", json={"prompt": "Hello"}, headers={"X-User": ""}, timeout=HANG
            )
            refused(server, response, 401, "UNAUTHORIZED")


WERKZEUG = tuple(map(int, metadata.version("werkzeug").split(".")[:2]))


@pytest.mark.skipif(WERKZEUG < (2, 3), reason="needs Werkzeug 2.3")
def test_a_limit_of_flasks_own_is_told_in_json_too(server):
    with asking(server) as client:
        app = flask_app(client)
        app.config["MAX_CONTENT_LENGTH"] = 100
        with serving(app) as url:
            refused(server, ask(url, "x" * 200), 413, "TOO_LARGE")
            nobody = ask(url, "x" * 200, headers={"X-User": ""})
            refused(server, nobody, 401, "UNAUTHORIZED")

            def fail():
                raise ZeroDivisionError

            with pytest.raises(ZeroDivisionError):
                sheepsse._within_limit(fail)


def test_a_system_that_gives_no_more_threads_leaves_nothing_behind(server, tmp_path):
    assert in_a_process(
        """if 1:
        import resource
        with local_provider.LocalProvider() as server, asking(server) as client:
            start = threading.Thread.start

            def refuse(thread):
                if thread.name == "sheepsse relay":
                    raise RuntimeError("can't start new thread")
                start(thread)

            threading.Thread.start = refuse
            for kept in ({}, {"journal": sys.argv[1]}):
                with serving(bare_app(client, **kept)) as url:
                    print(ask(url).status_code, requests.get(f"{url}/stats").json()["active"], until(idle))
        """,
        str(tmp_path),
    ) == ["502 0 True", "502 0 True"]
    assert list(tmp_path.iterdir()) == []


def test_without_flask_the_error_says_what_to_install(client, monkeypatch):
    monkeypatch.setitem(sys.modules, "flask", None)
    with pytest.raises(sheepsse.MissingExtraError, match=r"pip install 'sheepsse\[flask\]'"):
        sheepsse.flask_blueprint(client, authorize=len)


def test_without_redis_the_error_says_what_to_install(client, monkeypatch):
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(sheepsse.MissingExtraError, match=r"pip install 'sheepsse\[redis\]'"):
        sheepsse.wsgi_app(client, authorize=len, redis="redis://localhost")


def test_where_there_are_no_file_locks_it_says_so(client, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(ValueError, match="needs the file locks of POSIX"):
        sheepsse.wsgi_app(client, authorize=len, journal=tmp_path)


# What is kept: a folder, or Redis


@contextlib.contextmanager
def redis_server(folder):
    """A Redis of our own, on a socket in a folder of its own: its URL, and its process"""
    redis = pytest.importorskip("redis", reason="needs redis")
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("needs redis-server")
    path = folder / "socket"
    command = [program, "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            url = f"unix://{path}"
            with redis.Redis.from_url(url) as connection:

                def is_up():
                    with contextlib.suppress(redis.ConnectionError):
                        return connection.ping()

                assert until(is_up)
            yield url, process
        finally:
            process.kill()


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory):
    with redis_server(tmp_path_factory.mktemp("redis")) as (url, _):
        yield url


@pytest.fixture(params=["folder", "redis"])
def kept(request, tmp_path):
    """The options of a relay that keeps its streams"""
    if request.param == "folder":
        yield {"journal": str(tmp_path / "journal")}
        return
    import redis

    with redis.Redis.from_url(request.getfixturevalue("redis_url")) as connection:
        yield {"redis": connection}
        assert until(lambda: not any(thread.name == "sheepsse relay" for thread in threading.enumerate()))


def test_a_stream_that_is_kept_can_be_followed_from_any_event(server, kept):
    with relaying(server, **kept) as url:
        came = heard(ask(url))
        id = ask(url).headers["X-Stream-Id"]
        whole = heard(follow(url, id))
        assert text_of(whole) == TEXT
        assert [(number, name) for number, name, _ in whole] == [(number, name) for number, name, _ in came]
        billed = server.billed
        for after in (0, 1, 7, len(whole) - 1):
            for response in (follow(url, id, f"{id}:{after}"), ask(url, after=f"{id}:{after}")):
                assert heard(response) == whole[after:]
        for response in (follow(url, id, f"{id}:{len(whole)}"), ask(url, after=f"{id}:{len(whole)}")):
            with response:
                assert (response.status_code, response.content) == (204, b"")
        for response in (follow(url, id, f"{id}:{len(whole) + 1}"), ask(url, "Other", after=f"{id}:1")):
            with response:
                assert response.status_code == 409
        assert heard(follow(url, id, "f" * 32 + ":5")) == whole  # of another stream
        assert server.billed == billed


def test_several_follow_while_it_is_written(server, kept):
    server.default = Answer(pace=0.01)
    with relaying(server, **kept) as url, relaying(server, **kept) as other, ask(url) as response:
        first = some(response, 3)
        id = response.headers["X-Stream-Id"]
        came = []
        threads = [
            threading.Thread(target=lambda place=place: came.append(heard(follow(place, id))))
            for place in (url, other, url)
        ]
        for thread in threads:
            thread.start()
        rest = told(sheepsse.iter_bytes(response), id)
        for thread in threads:
            thread.join()
    assert [text_of(each) for each in came] == [TEXT] * 3
    assert TEXT.endswith(text_of(rest))
    assert len(first) + len(rest) == len(came[0])
    assert server.billed == 1


def test_who_left_has_the_grace_to_come_back(server, kept, running_clock):
    server.default = SILENT
    with relaying(server, grace=FOREVER, max_duration=2 * FOREVER, **kept) as url:
        with ask(url) as response:
            first = some(response, 3)
        id = response.headers["X-Stream-Id"]
        assert until(lambda: not len(sheepsse._relaying.relays))
        running_clock.now += FOREVER / 2
        with in_another_thread(lambda: (until(lambda: len(sheepsse._relaying.relays)), server.release())):
            came = heard(ask(url, after=first[-1].id))
        assert words_of(first) + text_of(came) == TEXT
        assert numbers_of(came) == list(range(len(first) + 1, len(first) + 1 + len(came)))
        assert server.billed == 1
        assert heard(follow(url, id))[-1][1] == "done"


def test_nobody_who_comes_back_ends_the_upstream_after_the_grace(server, kept, running_clock):
    server.default = SILENT
    with relaying(server, grace=FOREVER, **kept) as url:
        with ask(url) as response:
            some(response, 3)
        assert until(lambda: not len(sheepsse._relaying.relays))
        time.sleep(0.3)  # for whoever looks whether somebody still follows
        assert server.open_connections == 1
        running_clock.now += FOREVER
        assert until(lambda: server.open_connections == 0)
        assert until(idle)
        came = heard(follow(url, response.headers["X-Stream-Id"]))
        number, name, data = came[-1]
        assert (number, name, data["code"]) == (None, "interrupted", "ABANDONED")


def test_a_stream_whose_producer_has_gone_is_carried_on_where_upstream_can(server, kept, running_clock):
    server.answer(SILENT._replace(ids="numbers"))
    server.default = Answer(ids="numbers")
    with relaying(server, **kept) as url:
        first, response = left(url, running_clock)
        id = response.headers["X-Stream-Id"]
        assert until(lambda: server.open_connections == 0)
        asked = len(server.requests)
        came = heard(ask(url, after=first[-1].id))
        assert words_of(first) + text_of(came) == TEXT
        assert numbers_of(came) == list(range(len(first) + 1, len(first) + 1 + len(came)))
        assert came[-1][2]["continuity"] == "replayed"
        assert server.requests[asked].headers["Last-Event-ID"]
        whole = heard(follow(url, id))
        assert (text_of(whole), numbers_of(whole)) == (TEXT, list(range(1, len(whole) + 1)))
        assert server.billed == 1


def test_where_upstream_cannot_go_on_nothing_is_repeated_and_nothing_billed(server, kept, running_clock):
    server.answer(SILENT)
    with relaying(server, **kept) as url:
        first, response = left(url, running_clock)
        for _ in range(2):
            came = heard(ask(url, after=first[-1].id))
            number, name, data = came[-1]
            assert (number, name, data["code"]) == (None, "interrupted", "CONNECTION_LOST")
            assert TEXT.startswith(words_of(first) + text_of(came))
        assert (server.billed, len(server.requests)) == (1, 1)


def test_a_stream_of_which_nothing_came_is_asked_for_anew_when_somebody_comes_back(server, kept, running_clock):
    server.answer(Answer(delay=FOREVER))
    with relaying(server, heartbeat=0.1, **kept) as url:
        with ask(url) as response:
            id = response.headers["X-Stream-Id"]
        assert given_up(running_clock)
        assert until(lambda: server.open_connections == 0)
        came = heard(ask(url, after=f"{id}:0"))
        assert (text_of(came), numbers_of(came)) == (TEXT, list(range(1, len(came) + 1)))


def test_an_event_source_that_comes_back_follows_and_asks_nobody(server, kept, running_clock):
    """It comes back by itself, for ever, and might be billed each time"""
    server.answer(SILENT._replace(ids="numbers"))
    server.default = Answer(ids="numbers")
    headers = {"Sec-Fetch-Site": "same-origin"}
    with relaying(server, **kept) as url:
        place = f"{url}/chat/stream?prompt=Hello"
        with requests.get(place, headers=headers, stream=True) as response:
            first = some(response, 3)
        assert given_up(running_clock)
        came = heard(requests.get(place, headers={**headers, "Last-Event-ID": first[-1].id}, stream=True))
        assert came[-1][1] == "interrupted"
        last = max([number for number in numbers_of(came) if number], default=len(first))
        id = response.headers["X-Stream-Id"]
        for again in (place, f"{url}/chat/stream/{id}"):
            with requests.get(again, headers={**headers, "Last-Event-ID": f"{id}:{last}"}) as ended:
                ((number, name, _),) = told([ended.content])
                assert (number, name) == (None, "interrupted")
                assert int(re.match(rb"retry: (\d+)\n", ended.content).group(1)) >= 15_000
        assert len(server.requests) == 1
        assert text_of(heard(ask(url, after=f"{id}:0"))) == TEXT  # a page that asks for it gets it


def test_an_event_source_that_is_cut_off_before_the_first_event_does_not_ask_anew(server, kept):
    go = threading.Event()
    server.default = held(go)
    headers = {"Sec-Fetch-Site": "same-origin"}
    with relaying(server, heartbeat=0.1, grace=FOREVER, **kept) as url:
        place = f"{url}/chat/stream?prompt=Hello"
        with requests.get(place, headers=headers, stream=True) as response:
            block = next(sheepsse.iter_bytes(response))
            id = response.headers["X-Stream-Id"]
            assert re.match(rb"retry: \d+\n\nid: %s:0\n\n" % id.encode(), block)
        response = requests.get(place, headers={**headers, "Last-Event-ID": f"{id}:0"}, stream=True)
        go.set()
        assert text_of(heard(response)) == TEXT
        assert server.billed == 1


def test_a_stream_that_could_not_go_on_three_times_is_given_up(server, kept, running_clock):
    server.default = SILENT
    with relaying(server, **kept) as url:
        first, response = left(url, running_clock)
        server.default = error_answer(400)
        for _ in range(3):
            came = heard(ask(url, after=first[-1].id))
            assert came[-1][1] == "interrupted"
            assert until(idle)
        came = heard(ask(url, after=first[-1].id))
        number, name, data = came[-1]
        assert (name, data["code"]) == ("failed", "CONNECTION_LOST")
        assert ask(url, after=f"{response.headers['X-Stream-Id']}:{number}").status_code == 204


def test_an_event_that_never_was_is_refused_before_anything_is_asked(server, kept, running_clock):
    server.default = SILENT._replace(ids="numbers")
    with relaying(server, **kept) as url:
        _, response = left(url, running_clock)
        assert ask(url, after=f"{response.headers['X-Stream-Id']}:999999").status_code == 409
        assert len(server.requests) == 1


def test_a_takeover_that_upstream_refuses_leaves_the_stream_to_another_try(server, kept, running_clock):
    server.answer(SILENT._replace(ids="numbers"), error_answer(503))
    server.default = Answer(ids="numbers")
    with relaying(server, **kept) as url:
        first, response = left(url, running_clock)
        came = heard(ask(url, after=first[-1].id))
        assert came[-1][1] == "interrupted"
        rest = heard(ask(url, after=first[-1].id))
        assert words_of(first) + text_of(rest) == TEXT


def test_tool_calls_and_reasoning_are_kept_too(server, kept, running_clock):
    lines = [
        {"choices": [{"index": 0, "delta": {"reasoning_content": "Hm.", "content": "So"}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f"}}]}}]},
    ]
    server.answer(Answer(events=[*map(local_provider.data_event, lines)], stall_after=2))
    with relaying(server, **kept) as url:
        with ask(url) as response:
            some(response, 3)
        id = response.headers["X-Stream-Id"]
        assert given_up(running_clock)
        came = heard(ask(url, after=f"{id}:0"))
        assert [name for _, name, _ in came] == ["reasoning", "message", "tool_calls", "interrupted"]
        assert came[2][2]["tool_calls"][0] == {"index": 0, "id": "c", "name": "f", "arguments": ""}
    server.release()


def test_a_refused_request_leaves_nothing_behind(server, tmp_path):
    server.default = error_answer(500)
    with relaying(server, journal=tmp_path) as url, ask(url) as response:
        assert response.status_code == 502
        assert until(lambda: os.listdir(tmp_path) == [])


def test_a_refused_request_leaves_nothing_behind_in_redis(server, redis_url):
    import redis

    server.default = error_answer(500)
    with redis.Redis.from_url(redis_url) as connection:
        connection.flushall()
        with relaying(server, redis=connection) as url, ask(url) as response:
            assert response.status_code == 502
            assert until(lambda: connection.keys() == [])


def test_a_mark_that_cannot_be_removed_leaves_no_stream_behind(server, tmp_path, caplog):
    def answer(request):
        for mark in tmp_path.glob("*.mark"):
            mark.unlink()
        return error_answer(500)

    server.default = answer
    with relaying(server, journal=tmp_path) as url:
        with ask(url) as response:
            assert response.status_code == 502
        assert until(idle)
        assert requests.get(f"{url}/stats").json()["active"] == 0
    assert "No such file" in caplog.text


def test_old_streams_are_removed_and_none_that_is_being_written(server, tmp_path):
    with relaying(server, journal=tmp_path, max_age=100) as url:
        heard(ask(url))
    old, foreign = os.listdir(tmp_path), tmp_path / "notes.txt"
    foreign.write_text("mine")
    server.default = Answer(stall_after=4)
    with relaying(server, journal=tmp_path, max_age=100) as url, ask(url) as response:
        some(response, 3)  # all that come before it stalls
        for name in os.listdir(tmp_path):
            os.utime(tmp_path / name, (0, 0))
        server.default = Answer()
        with relaying(server, journal=tmp_path, max_age=100) as other:
            heard(ask(other))
        left = set(os.listdir(tmp_path))
        assert not left & set(old)
        assert f"{response.headers['X-Stream-Id']}.relay" in left
        assert foreign.read_text() == "mine"
        server.release()
        assert text_of(told(sheepsse.iter_bytes(response)))


def test_the_files_are_for_their_owner_alone(server, tmp_path):
    folder = tmp_path / "a" / "journal"
    with relaying(server, journal=folder) as url:
        heard(ask(url))
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_a_damaged_journal_ends_as_interrupted(server, tmp_path):
    with relaying(server, journal=tmp_path) as url:
        id = ask(url).headers["X-Stream-Id"]
        path = tmp_path / f"{id}.relay"
        assert until(lambda: b'"done"' in path.read_bytes())
        assert until(idle)
        data = path.read_bytes()
        path.write_bytes(data[:-40] + b"x" * 30 + data[-10:])
        with follow(url, id) as response:
            assert response.status_code in (200, 502, 500)
            assert "done" not in response.text


def test_a_line_that_is_longer_than_a_block_is_read_whole(server, kept):
    long = "x" * 200_000
    server.default = Answer(
        events=[
            local_provider.chunk_event(content=long),
            local_provider.chunk_event(finish_reason="stop"),
        ]
    )
    with relaying(server, **kept) as url:
        response = ask(url)
        assert text_of(heard(response)) == long


# Other processes


@contextlib.contextmanager
def served(server, *options):
    """The command `serve` in a process of its own: its address, and the process"""
    command = [sys.executable, MODULE, "serve", "--base-url", server.base_url, "--no-key", "-m", "local-model"]
    with subprocess.Popen([*command, "--port", "0", *options], stdout=subprocess.PIPE) as process:
        try:
            assert select.select([process.stdout], [], [], HANG)[0]
            line = process.stdout.readline().decode()
            yield re.match(r"(http://\S+)/ \(Ctrl-C ends it\)", line).group(1), process
            process.terminate()
            process.wait(HANG)
        finally:
            process.kill()


def own_app(client, **options):
    """One whose only user is that of the command"""
    return sheepsse.wsgi_app(client, authorize=lambda environ: "anybody", **options)


def test_a_stream_is_followed_stopped_and_carried_on_by_other_processes(server, tmp_path):
    server.default = Answer(pace=0.01)
    with served(server, "--journal", str(tmp_path)) as (theirs, process):
        with relaying(server, own_app, journal=tmp_path) as url:
            with ask(theirs) as response:
                id = response.headers["X-Stream-Id"]
                assert text_of(heard(follow(url, id))) == TEXT
            server.default = SILENT
            with ask(theirs) as response:
                first = some(response, 2)
                assert first
                id = response.headers["X-Stream-Id"]
                assert requests.post(f"{url}/chat/stop/{id}").json() == {"stopped": True}
                assert until(lambda: server.open_connections == 0)
                came = heard(follow(url, id))
                assert came[-1][2]["code"] == "CANCELLED"
                assert came[-1][0] == len(came)
                assert ask(url, after=f"{id}:{len(came)}").status_code == 204
            server.default = SILENT._replace(ids="numbers")
            with ask(theirs) as response:
                first = some(response, 3)
                id = response.headers["X-Stream-Id"]
                following = follow(url, id)
                process.send_signal(signal.SIGKILL)
                came = heard(following)
                number, name, data = came.pop()
                assert (number, name, data["code"]) == (None, "interrupted", "PRODUCER_LOST")
                assert numbers_of(came) == list(range(1, len(came) + 1))
            billed = server.billed
            server.default = Answer(ids="numbers")
            rest = heard(ask(url, after=f"{id}:{len(came)}"))
            assert text_of(came) + text_of(rest) == TEXT
            assert numbers_of(rest) == list(range(len(came) + 1, len(came) + len(rest) + 1))
            assert server.billed == billed


def test_somebody_who_follows_from_another_process_is_somebody(server, tmp_path, running_clock):
    server.default = SILENT
    with served(server, "--journal", str(tmp_path)) as (theirs, _):
        with relaying(server, own_app, journal=tmp_path, grace=FOREVER, max_duration=9 * FOREVER) as url:
            with ask(url) as response:
                some(response, 2)
                id = response.headers["X-Stream-Id"]
                other = follow(theirs, id)
            assert until(lambda: not len(sheepsse._relaying.relays))
            (mark,) = tmp_path.glob("*.mark")
            for _ in range(5):  # for longer than the grace, of which most passes each time that they say they follow
                seen = mark.stat().st_mtime_ns
                assert until(lambda seen=seen: mark.stat().st_mtime_ns != seen)
                running_clock.now += FOREVER * 0.9
            server.release()
            assert text_of(heard(other)) == TEXT
            with ask(url) as response:
                some(response, 2)
                stopped = requests.post(f"{theirs}/chat/stop/{response.headers['X-Stream-Id']}")
                assert stopped.json() == {"stopped": True}
                assert until(lambda: server.open_connections == 0)
                assert told(sheepsse.iter_bytes(response))[-1][2]["code"] == "CANCELLED"


def test_drain_ends_all_with_a_terminal_event_and_refuses_more(redis_url, tmp_path):
    """In a process of its own: what has drained does not go on"""
    code = """if 1:
        sheepsse._RedisLog.LEASE = 60.0
        with local_provider.LocalProvider() as server:
            server.default = SILENT
            for kept in map(json.loads, sys.argv[1:]):
                with relaying(server, **kept) as url, ask(url) as response:
                    some(response, 2)
                    threading.Timer(0.1, sheepsse.drain, (0,)).start()
                    number, name, data = told(sheepsse.iter_bytes(response))[-1]
                    print(number, name, data["code"])
                    assert sheepsse.drain(60)
                    refusal = ask(url)
                    print(refusal.status_code, refusal.json()["error"]["code"], refusal.headers["Retry-After"])
                    health = requests.get(url + "/health")
                    print(health.status_code, health.json()["status"])
                    if kept:
                        id = response.headers["X-Stream-Id"]
                        print(heard(ask(url, after=id + ":1"))[-1][2]["code"])
                    with asking(server) as client:
                        print(told(relay(client.stream("Hello")))[-1][2]["code"])
                        blocks = b"".join(relay(client.stream("Hello"), events="openai"))
                        assert blocks.startswith(b'data: {"error":{"code":"SHUTTING_DOWN"'), blocks
                    sheepsse._relaying.draining = False
    """
    said = ["None interrupted SHUTTING_DOWN", "503 SHUTTING_DOWN 1", "503 draining"]
    ways = [json.dumps({}), json.dumps({"journal": str(tmp_path)}), json.dumps({"redis": redis_url})]
    kept = [*said, "SHUTTING_DOWN", "SHUTTING_DOWN"]
    assert in_a_process(code, *ways) == [*said, "SHUTTING_DOWN", *kept, *kept]


def test_the_command_serves_a_page_and_ends_when_it_is_told_to(server):
    server.default = SILENT
    with served(server) as (url, process):
        page = requests.get(f"{url}/")
        assert (page.status_code, page.text) == (200, sheepsse.CHAT_PAGE)
        assert "default-src 'none'" in page.headers["Content-Security-Policy"]
        assert requests.head(f"{url}/").headers["Content-Length"] == str(len(page.content))
        assert ask(url, headers={"Host": "evil.example"}).status_code == 401
        with ask(url) as response:
            some(response, 2)
            process.send_signal(signal.SIGTERM)
            assert told(sheepsse.iter_bytes(response))[-1][2]["code"] == "SHUTTING_DOWN"
        assert process.wait(HANG) == 0


# What goes wrong in the midst


def in_a_process(code, *options):
    """What a program prints, which has these tests at hand; nothing of it is left"""
    folders = [os.path.dirname(__file__), os.path.dirname(MODULE), os.path.dirname(local_provider.__file__)]
    begin = f"import sys; sys.path[:0] = {folders!r}\nfrom test_relay import *\n"
    done = subprocess.run(
        [sys.executable, "-c", begin + code, *options], stdout=subprocess.PIPE, timeout=3 * HANG, check=True
    )
    return done.stdout.decode().splitlines()


def test_what_is_relayed_when_the_main_thread_has_ended_is_drained():
    """As of a server whose threads are waited for: each would go on for as long as its stream does"""
    assert in_a_process(
        """if 1:
        begun = threading.Event()
        def serve(server=local_provider.LocalProvider(SILENT)):
            with asking(server) as client:
                answer = relay(client.stream("Hello"))
                first = next(answer)
                begun.set()
                number, name, data = told([first, *answer])[-1]
                print(name, data["code"], flush=True)
        threading.Thread(target=serve).start()
        begun.wait(60)
        """
    ) == ["interrupted SHUTTING_DOWN"]


def test_a_process_that_ends_ends_what_it_relays_first(tmp_path):
    in_a_process(
        """if 1:
        server = local_provider.LocalProvider()
        server.default = SILENT
        client = sheepsse.Client(base_url=server.base_url, api_key=False, model="m")
        app = bare_app(client, journal=sys.argv[1])
        import io
        environ = environ_of(**{"wsgi.input": io.BytesIO(b'{"prompt": "Hi"}'), "CONTENT_LENGTH": "16"})
        answer = app(environ, lambda status, headers: None)
        next(answer)
        """,
        str(tmp_path),
    )
    (journal,) = tmp_path.glob("*.relay")
    assert '"code\\":\\"SHUTTING_DOWN' in journal.read_text().splitlines()[-1]


def test_a_fork_leaves_the_relays_to_its_parent():
    assert in_a_process(
        """if 1:
        server = local_provider.LocalProvider()
        server.default = Answer(pace=0.02)
        with asking(server) as client:
            answer = relay(client.stream("Hello"))
            first = next(answer)
            child = os.fork()
            if not child:
                left = sheepsse._relaying.productions or len(sheepsse._relaying.relays)
                atexit._run_exitfuncs()
                os._exit(bool(left))
            print(os.waitpid(child, 0)[1], text_of(told([first, *answer])) == TEXT)
        """
    ) == ["0 True"]


def test_a_forked_process_does_not_keep_the_lock_of_a_stream(server, tmp_path):
    """It would be taken for the producer, when that was killed"""
    assert in_a_process(
        """if 1:
        import fcntl
        server = local_provider.LocalProvider()
        server.default = SILENT
        with relaying(server, journal=sys.argv[1]) as url, ask(url) as response:
            some(response, 2)
            id = response.headers["X-Stream-Id"]
            ours = sheepsse._relaying.productions[id].sink._lines
            child = os.fork()
            if not child:
                has_it = ours._file is not None
                atexit._run_exitfuncs()
                os._exit(has_it)
            print(os.waitpid(child, 0)[1], ours._file is not None)
            with open(f"{sys.argv[1]}/{id}.relay") as file:
                print(sheepsse._is_free(file))
        """,
        str(tmp_path),
    ) == ["0 True", "False"]


def test_a_relay_that_is_dropped_ends_its_stream(server):
    server.default = SILENT
    with asking(server) as client:
        answer = relay(client.stream("Hello"), heartbeat=FOREVER)
        next(answer)
        del answer
        assert until(lambda: server.open_connections == 0)


def test_a_server_whose_hook_fails_is_looked_after_no_more_and_goes_on(server, caplog):
    server.default = Answer(pace=0.01)

    def broken():
        raise ZeroDivisionError

    with asking(server) as client:
        answer = relay(client.stream("Hello")).start({"waitress.client_disconnected": broken})
        assert text_of(told(answer)) == TEXT
    assert caplog.text.count("cannot be looked after any more") == 1


def test_a_production_that_ends_leaves_one_that_went_on_with_its_stream_alone():
    first, second = (sheepsse._Production("0" * 32, sheepsse._Pipe(1), sheepsse._NamedEvents()) for _ in range(2))
    sheepsse._relaying.add(second)
    sheepsse._relaying.remove(first)
    assert sheepsse._relaying.productions == {"0" * 32: second}
    sheepsse._relaying.remove(second)


def test_one_that_is_closed_is_looked_at_no_more(client):
    answer = relay(client.stream("Hello")).start({"waitress.client_disconnected": lambda: 1 / 0})
    answer.close()
    answer.look()


def test_a_system_without_tcp_user_timeout_does_without(client, monkeypatch):
    monkeypatch.delattr(socket, "TCP_USER_TIMEOUT", raising=False)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert text_of(told(relay(client.stream("Hello")).start({"werkzeug.socket": ours}))) == TEXT


def test_a_full_disk_ends_the_upstream_and_its_followers_are_told(tmp_path):
    (said,) = in_a_process(
        """if 1:
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        server = local_provider.LocalProvider()
        server.default = Answer(pace=0.01, text="word " * 200)
        with relaying(server, journal=sys.argv[1]) as url:
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
            came = heard(ask(url))
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
            assert ask(url).status_code == 500
            assert server.billed == 1
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert until(lambda: not server.open_connections)
            print(json.dumps([*came[-1], text_of(came)]))
        """,
        str(tmp_path),
    )
    number, name, data, text = json.loads(said)
    assert (number, name, data["code"]) == (None, "interrupted", "PRODUCER_LOST")
    assert ("word " * 200).startswith(text)
    assert len(text) > 20


def test_a_mark_that_was_removed_is_not_missed(server, tmp_path):
    server.default = Answer(pace=0.02)
    with relaying(server, journal=tmp_path) as url, ask(url) as response:
        first = some(response, 2)
        (mark,) = tmp_path.glob("*.mark")
        mark.unlink()
        rest = told(sheepsse.iter_bytes(response))
    assert words_of(first) + text_of(rest) == TEXT


def test_a_stream_whose_folder_has_gone_ends(server, tmp_path, caplog):
    server.default = SILENT
    folder = tmp_path / "journal"
    with relaying(server, journal=folder) as url, ask(url) as response:
        some(response, 2)
        folder.rename(tmp_path / "elsewhere")
        folder.write_text("no folder")
        assert until(lambda: server.open_connections == 0)
        assert told(sheepsse.iter_bytes(response))[-1][2]["code"] == "INTERNAL_ERROR"
    assert "cannot be looked after" in caplog.text


def test_an_event_that_says_nothing_counts_when_the_stream_goes_on(server, kept, running_clock):
    def event(number, **delta):
        chunk = local_provider.chunk_event(**delta)
        return b"id: %d\n" % number + chunk if number else chunk

    said = [event(1, role="assistant"), event(2, content="Good"), event(3), event(0), event(5, content=" day")]
    server.answer(Answer(events=[*said[:4], b": silence\n\n"], stall_after=4))
    with relaying(server, **kept) as url:
        with ask(url) as response:
            some(response, 1)
        id = response.headers["X-Stream-Id"]
        assert until(lambda: len(server.sent_at) == 4)
        assert given_up(running_clock)
        server.answer(Answer(events=[*said, local_provider.chunk_event(finish_reason="stop"), b"data: [DONE]\n\n"]))
        came = heard(ask(url, after=f"{id}:0"))
        assert server.requests[-1].headers["Last-Event-ID"] == "3"
        assert text_of(came) in ("Good day", "Good")  # a second event without an id may be any
    server.release()


def test_a_follower_that_looks_does_not_keep_another_from_taking_over(server, tmp_path, running_clock):
    import fcntl

    server.answer(SILENT._replace(ids="numbers"))
    server.default = Answer(ids="numbers")
    with relaying(server, journal=tmp_path) as url:
        first, response = left(url, running_clock)
        (path,) = tmp_path.glob("*.relay")
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            threading.Timer(0.1, fcntl.flock, (file, fcntl.LOCK_UN)).start()
            rest = heard(ask(url, after=first[-1].id))
    assert words_of(first) + text_of(rest) == TEXT


def test_a_journal_that_is_damaged_far_behind_is_not_carried_on(server, tmp_path):
    server.default = Answer(text=f"{'w' * 200} " * 400)
    with relaying(server, journal=tmp_path) as url:
        id = ask(url).headers["X-Stream-Id"]
        assert until(idle)
        (path,) = tmp_path.glob("*.relay")
        data = path.read_bytes()
        path.write_bytes(data[:-1000] + b"x" + data[-999:])
        with ask(url, after=f"{id}:1") as response:
            assert response.status_code == 500
            assert str(tmp_path) not in response.text
        came = heard(follow(url, id, f"{id}:1"))
        number, name, data = came[-1]
        assert (number, name, data["code"]) == (None, "interrupted", "PRODUCER_LOST")
        assert server.billed == 1


def test_an_event_far_behind_is_found(server, kept):
    server.default = Answer(text=f"{'w' * 200} " * 400)
    with relaying(server, **kept) as url:
        with ask(url) as response:
            id = response.headers["X-Stream-Id"]
            whole = told(sheepsse.iter_bytes(response), id)
        assert heard(follow(url, id, f"{id}:390")) == whole[390:]


def test_a_journal_that_is_a_link_is_not_written_to(tmp_path):
    (tmp_path / f"{'0' * 32}.relay").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(sheepsse.CheckpointError, match="is a link"):
        sheepsse._Folder(tmp_path, 100).take_over("0" * 32)


def test_a_journal_that_goes_away_while_it_is_looked_for_is_nobodys(tmp_path, monkeypatch):
    folder, id = sheepsse._Folder(tmp_path, 100), "0" * 32
    opened = sheepsse._opened

    def expired(path, flags, *shared):
        if flags == os.O_RDONLY:
            log.discard()
        return opened(path, flags, *shared)

    monkeypatch.setattr(sheepsse, "_opened", expired)
    with contextlib.closing(folder.begin(id, {})._lines) as lines:
        log = sheepsse._FileLog(id, lines, str(tmp_path / f"{id}.mark"))
        assert folder.take_over(id) is None
    assert os.listdir(tmp_path) == []
    folder.stop(id)
    assert os.listdir(tmp_path) == []


def test_a_key_that_is_gone_when_a_stream_is_to_go_on_leaves_it_to_another_try(
    server, tmp_path, monkeypatch, running_clock
):
    monkeypatch.setitem(sheepsse.PROVIDERS, "mine", sheepsse.Provider(server.base_url, "MY_KEY", "openai"))
    monkeypatch.setenv("MY_KEY", "k-1234567890")
    server.answer(SILENT._replace(ids="numbers"))
    server.default = Answer(ids="numbers")
    with sheepsse.Client("mine", model="m") as client, serving(bare_app(client, journal=tmp_path)) as url:
        first, response = left(url, running_clock)
        monkeypatch.delenv("MY_KEY")
        assert ask(url, after=first[-1].id).status_code == 502
        monkeypatch.setenv("MY_KEY", "k-1234567890")
        rest = heard(ask(url, after=first[-1].id))
    assert words_of(first) + text_of(rest) == TEXT


# Redis


class LossyProxy:
    """Stands before a Redis, and loses the connection instead of one reply when it is told to"""

    def __init__(self, path):
        self._path = path
        self.loses = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client):
        with client, socket.socket(socket.AF_UNIX) as redis, contextlib.suppress(OSError):
            redis.connect(self._path)
            while True:
                for sock in select.select([client, redis], [], [])[0]:
                    data = sock.recv(65536)
                    if not data:
                        return
                    if sock is client:
                        written = b"xadd" in data
                    elif self.loses and written:
                        self.loses = False
                        return
                    (redis if sock is client else client).sendall(data)

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def test_a_reply_of_redis_that_is_lost_loses_and_repeats_nothing(server, redis_url):
    import redis

    server.default = Answer(pace=0.02)
    with contextlib.closing(LossyProxy(redis_url[len("unix://") :])) as proxy:
        with redis.Redis.from_url(proxy.url) as connection, relaying(server, redis=connection) as url:
            with ask(url) as response:
                first = some(response, 2)
                proxy.loses = True
                rest = told(sheepsse.iter_bytes(response))
            assert not proxy.loses
            came = heard(follow(url, response.headers["X-Stream-Id"]))
            assert (text_of(came), numbers_of(came)) == (TEXT, list(range(1, len(came) + 1)))
            assert text_of(came).endswith(text_of(rest))
            assert len(first) + len(rest) == len(came)
            assert until(idle)


def test_events_that_redis_has_lost_are_missed(server, redis_url):
    import redis

    with redis.Redis.from_url(redis_url) as connection, relaying(server, redis=connection) as url:
        id = ask(url).headers["X-Stream-Id"]
        assert heard(follow(url, id))
        connection.xdel(f"sheepsse:{{{id}}}", "3-0")
        came = heard(follow(url, id))
        assert (came[-1][0], came[-1][1]) == (None, "interrupted")
        assert numbers_of(came[:-1]) == [1, 2]
        ((number, name, _),) = heard(follow(url, id, f"{id}:2"))
        assert (number, name) == (None, "interrupted")


def test_redis_that_hangs_ends_all_that_it_keeps_at_once(server, tmp_path, running_clock):
    """It is waited for once, and not for each of the streams"""
    import redis

    server.default = SILENT
    with redis_server(tmp_path) as (url_of_redis, process):
        options = {"socket_timeout": 0.5, "socket_connect_timeout": 0.5}
        with redis.Redis.from_url(url_of_redis, **options) as connection:
            with relaying(server, redis=connection) as url, contextlib.ExitStack() as stack:
                for _ in range(4):
                    some(stack.enter_context(ask(url)), 2)
                waits, plain = [], connection.pipeline

                def pipeline(**options):
                    waits.append(options)
                    return plain(**options)

                now = running_clock.monotonic() + 1
                running_clock.monotonic = lambda: now  # at one moment it is asked once
                connection.pipeline = pipeline
                process.send_signal(signal.SIGSTOP)
                assert until(lambda: server.open_connections == 0)
                assert until(idle)
                assert waits.count({"transaction": False}) == 2  # once more, as a reply may be lost


def test_redis_that_dies_ends_the_upstream_and_its_followers_are_told(server, tmp_path):
    server.default = SILENT
    with redis_server(tmp_path) as (url_of_redis, process), relaying(server, redis=url_of_redis) as url:
        with ask(url) as response:
            some(response, 3)
            process.kill()
            number, name, data = told(sheepsse.iter_bytes(response))[-1]
            assert (number, name, data["code"]) == (None, "interrupted", "PRODUCER_LOST")
        assert until(lambda: server.open_connections == 0)
        assert ask(url).status_code == 500


@pytest.mark.parametrize("answer", [Answer(pace=0.05, text="word " * 10_000), SILENT], ids=["talking", "silent"])
def test_a_producer_that_was_taken_for_dead_writes_no_more(server, redis_url, answer):
    import redis

    server.default = answer
    with redis.Redis.from_url(redis_url, decode_responses=True) as connection:
        with relaying(server, redis=connection) as url, ask(url) as response:
            some(response, 3)
            key = f"sheepsse:{{{response.headers['X-Stream-Id']}}}"
            connection.set(f"{key}:owner", "another")
            assert until(lambda: server.open_connections == 0)
            connection.delete(f"{key}:owner")
            assert told(sheepsse.iter_bytes(response))[-1][1] == "interrupted"
    server.release()


# The command


def test_the_command_needs_a_model_and_a_port_that_is_free(server, capsys):
    with pytest.raises(SystemExit) as caught:
        sheepsse.main(["serve", "--base-url", server.base_url, "--no-key"])
    assert caught.value.code == 2
    assert "-m is needed" in capsys.readouterr().err
    port = server.origin.rpartition(":")[2]
    options = ["serve", "--base-url", server.base_url, "--no-key", "-m", "m", "--port"]
    for taken in (port, "70000"):
        assert sheepsse.main([*options, taken]) == 1
        assert f"127.0.0.1:{taken} cannot be served" in capsys.readouterr().err


def test_the_command_says_which_variable_to_set(capsys):
    assert sheepsse.main(["serve", "--provider", "deepseek", "-m", "m"]) == 1
    assert "DEEPSEEK_API_KEY" in capsys.readouterr().err


def test_without_a_key_the_provider_beside_the_file_answers(tmp_path):
    shutil.copy(MODULE, tmp_path / "sheepsse.py")
    (tmp_path / "examples").mkdir()
    shutil.copy(local_provider.__file__, tmp_path / "examples")
    command = [sys.executable, str(tmp_path / "sheepsse.py"), "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            url = re.match(r"(http://\S+)/ ", process.stdout.readline().decode()).group(1)
            assert text_of(heard(ask(url))) == TEXT
            process.send_signal(signal.SIGINT)
            assert process.wait(HANG) == 130
            assert b"HOLYSHEEP_API_KEY" in process.stderr.read()
        finally:
            process.kill()


def test_a_request_that_is_reset_is_no_news_for_the_terminal(server):
    with served(server) as (url, _):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as sock:
            sock.sendall(b"POST /chat/stream HT")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        assert requests.get(f"{url}/health").status_code == 200


# Requests that a page elsewhere may send


@each_app
def test_a_post_from_another_site_is_refused_also_without_an_origin(server, make):
    with relaying(server, make) as url:
        elsewhere = {"Sec-Fetch-Site": "cross-site"}
        refused(server, ask(url, headers=elsewhere), 403, "FORBIDDEN_ORIGIN")
        refused(server, requests.post(f"{url}/chat/stop/x", headers=elsewhere), 403, "FORBIDDEN_ORIGIN")
        assert requests.get(f"{url}/health", headers=elsewhere).status_code == 200
        assert text_of(heard(ask(url, headers={"Sec-Fetch-Site": "same-origin"}))) == TEXT
    with relaying(server, make, allowed_origins=["https://page.example"]) as url:
        assert text_of(heard(ask(url, headers={**elsewhere, "Origin": "https://page.example"}))) == TEXT


@each_app
@pytest.mark.parametrize("type", ["text/plain", "application/x-www-form-urlencoded", None])
def test_only_json_is_taken(server, make, type):
    with relaying(server, make) as url:
        headers = {} if type is None else {"Content-Type": type}
        response = requests.post(f"{url}/chat/stream", data=b'{"prompt": "Hi"}', headers=headers)
        refused(server, response, 415, "INVALID_REQUEST")
        headers = {"Content-Type": "application/json; charset=utf-8"}
        response = requests.post(f"{url}/chat/stream", data=b'{"prompt": "Hi"}', headers=headers, stream=True)
        assert text_of(heard(response)) == TEXT


@pytest.mark.parametrize(
    ("origin", "host", "is_own"),
    [
        ("https://app", "app", True),
        ("https://app", "app:443", True),
        ("http://app:8000", "app:8000", True),
        ("http://app", "app:80", True),
        ("https://app:80", "app", False),
        ("http://app:443", "app", False),
        ("http://app:8000", "app", False),
        ("http://app", "app:8000", False),
        ("ftp://app", "app", False),
    ],
)
def test_scheme_and_port_of_an_origin_count(server, origin, host, is_own):
    with relaying(server) as url:
        response = ask(url, headers={"Origin": origin, "Host": host})
        if is_own:
            assert text_of(heard(response)) == TEXT
        else:
            refused(server, response, 403, "FORBIDDEN_ORIGIN")


@each_app
def test_the_last_message_is_the_users_unless_a_prefill_is_allowed(server, make):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "I"}]
    with relaying(server, make) as url:
        response = requests.post(f"{url}/chat/stream", json={"messages": messages})
        refused(server, response, 400, "INVALID_REQUEST")
    with relaying(server, make, allow_prefill=True) as url:
        response = requests.post(f"{url}/chat/stream", json={"messages": messages}, stream=True)
        assert heard(response)[-1][1] == "done"


@each_app
def test_a_model_that_is_null_is_the_fault_of_the_request(server, make):
    with relaying(server, make) as url:
        response = requests.post(f"{url}/chat/stream", json={"prompt": "Hi", "model": None})
        refused(server, response, 400, "INVALID_REQUEST")


def test_a_host_that_others_reach_needs_the_name_of_the_server(server, capsys):
    options = ["serve", "--base-url", server.base_url, "--no-key", "-m", "m", "--host", "0.0.0.0"]
    with pytest.raises(SystemExit) as ended:
        sheepsse.main(options)
    assert ended.value.code == 2
    assert "--host needs --allow-host NAME" in capsys.readouterr().err


def test_a_name_that_leads_to_the_server_by_another_s_dns_is_refused(server):
    with served(server, "--host", "127.0.0.1", "--allow-host", "chat.example") as (url, _):
        for host, status in (("chat.example:80", 200), ("127.0.0.1", 200), ("evil.example", 401)):
            with ask(url, headers={"Host": host}) as response:
                assert response.status_code == status
