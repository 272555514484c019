"""Sections 9 and 11, one Stream over real sockets: at once, whole or an error, and its connection let go"""

import asyncio
import contextlib
import gc
import itertools
import json
import os
import random
import re
import signal
import socket
import ssl
import sys
import threading
import time
import urllib.parse
import uuid

import pytest
import requests
import trustme

import sheepsse
from conftest import HANG, PATIENT, InTurns, asking, in_another_thread, read, until
from local_provider import (
    COMMENT,
    FRAMINGS,
    JSON,
    MODEL,
    TEXT,
    Answer,
    LocalProvider,
    chat_events,
    chunk_event,
    data_event,
    error_answer,
    error_body,
    framed,
    json_completion,
    split_words,
)

every_framing = pytest.mark.parametrize("framing", FRAMINGS)
WORDS = split_words(TEXT)
#: seconds that no test waits for
FOREVER = 1_000_000


@pytest.fixture(scope="session")
def authority():
    return trustme.CA()


@pytest.fixture
def tls_server(authority, monkeypatch, tmp_path):
    """A server that speaks TLS, by a certificate that this process trusts"""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    bundle = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(bundle))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(bundle))
    with LocalProvider(ssl_context=context) as provider:
        yield provider


@pytest.fixture(params=["plain", "tls"])
def either_server(request):
    """The server over plain TCP, then over TLS"""
    return request.getfixturevalue("server" if request.param == "plain" else "tls_server")


def open_files():
    """How many file descriptors this process holds; None where it cannot be seen"""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return None


@pytest.fixture
def keeps_files(server):
    """Fails when the test leaves a connection or a file descriptor behind"""
    before = open_files()
    yield
    assert server.wait_closed(HANG)
    gc.collect()
    assert until(lambda: open_files() == before)  # the server may not have taken the last client yet


# At once


def random_text(size, seed=0):
    return "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz ", k=size))


def check_in_turns(server, client, framing, size):
    """Each event is sent when the text of the one before was returned: the server waits for the caller"""
    texts = [random_text(size, seed) for seed in range(15)]
    server.answer(Answer(events=chat_events(texts), framing=framing))
    server.sent_at = turns = InTurns(1 + len(texts))
    turns.next()  # the first event brings the role
    turns.next()
    came = []
    for text in client.stream("Go"):
        came.append(text)
        turns.next()
    assert (came, turns.in_vain) == (texts, False)


@pytest.mark.parametrize("size", [20, 20_000])
@every_framing
def test_the_text_of_an_event_is_returned_before_the_next_event_is_sent(server, client, framing, size):
    check_in_turns(server, client, framing, size)


@every_framing
def test_the_text_of_an_event_is_returned_before_the_next_is_sent_over_tls_too(tls_server, framing):
    with asking(tls_server) as client:
        check_in_turns(tls_server, client, framing, 20)


@every_framing
@pytest.mark.parametrize("block", [1, 7, 4096])
def test_the_text_is_the_same_however_it_travels(server, client, framing, block):
    server.answer(Answer(framing=framing, block=block))
    stream = client.stream("Go")
    assert list(stream) == WORDS
    assert stream.completion.complete


# Whole, or an error


def cut_error(server, client, after_two_words=lambda: None, **how):
    """Reads a stream that goes wrong after two words; what came, and the error"""
    server.answer(Answer(**{"cut_after": 3, **how}))
    stream = client.stream("Go", resume="never")
    came = [next(stream), next(stream)]
    after_two_words()
    more, error = read(stream)
    came += more
    assert error is not None, "taken for whole"
    assert came == WORDS[:2], "what was received is given out first"
    assert error.partial.text == "".join(came) == stream.text
    assert error.partial.complete is stream.completion.complete is False
    return error


@every_framing
@pytest.mark.parametrize("cut", ["fin", "reset"])
def test_a_cut_stream_is_never_taken_for_whole(either_server, framing, cut):
    with asking(either_server) as client:
        error = cut_error(either_server, client, framing=framing, cut=cut)
    assert type(error) is sheepsse.StreamInterrupted
    assert (error.code, error.retryable) == ("CONNECTION_LOST", True)
    text = "".join(WORDS[:2])
    assert error.resume_point[:4] == ("", None, len(text), text)


@pytest.mark.parametrize("framing", ["length", "gzip-length"])
def test_a_body_shorter_than_its_content_length_is_an_error_that_says_so(server, client, framing):
    assert "IncompleteRead" in str(cut_error(server, client, framing=framing))


@pytest.mark.parametrize("framing", ["chunked", "one-chunk", "gzip"])
def test_a_missing_last_chunk_is_an_error_where_no_end_marker_came(server, client, framing):
    events = chat_events(WORDS[:2], finish=None, done=False)
    assert type(cut_error(server, client, events=events, framing=framing)) is sheepsse.StreamInterrupted


@every_framing
def test_a_body_that_ends_in_order_without_an_end_marker_is_an_error(server, client, framing):
    events = chat_events(WORDS[:2], finish=None, done=False)
    error = cut_error(server, client, events=events, framing=framing, cut_after=None)
    assert type(error) is sheepsse.StreamInterrupted
    assert "end marker" in str(error)


@every_framing
def test_a_read_timeout_in_the_body_gives_out_what_came_first(either_server, framing, hurry):
    with asking(either_server, timeout=HANG) as client:
        error = cut_error(either_server, client, hurry.begin, framing=framing, cut_after=None, stall_after=3)
    assert type(error) is sheepsse.StreamTimeout
    assert "no byte came for the read time-out" in str(error)
    assert either_server.wait_closed(HANG)


@pytest.mark.parametrize("framing", ["close", "chunked", "gzip"])
def test_a_cut_inside_a_character_gives_no_unicode_error_and_no_half_character(server, client, framing):
    events = [*chat_events(["before "], finish=None, done=False), chunk_event(content="🐑")]
    body = b"".join(events)
    cut = body[: body.index("🐑".encode()) + 2]
    server.answer(Answer(body=cut, framing=framing))
    came, error = read(client.stream("Go"))
    assert came == ["before "]
    assert type(error) is sheepsse.StreamInterrupted
    assert error.partial.text == "before "


def small(content=None, finish_reason=None):
    choice = {"finish_reason": finish_reason} if content is None else {"delta": {"content": content}}
    return data_event({"choices": [choice]})


SHORT_TEXTS = ["é", "chữ", " 🐑", "."]
SHORT = [*map(small, SHORT_TEXTS), small(finish_reason="stop"), data_event("[DONE]")]


@pytest.mark.parametrize("cut", ["fin", "reset"])
@pytest.mark.parametrize("framing", ["chunked", "gzip", "close"])
def test_a_cut_at_any_byte_loses_nothing_that_came_and_invents_nothing(server, client, framing, cut):
    body = framed(framing, SHORT)
    writes = list(body.writes)
    ends = list(itertools.accumulate(map(len, writes)))
    total = ends[-1] + len(body.ending())
    for at in range(total + 1):
        server.answer(Answer(events=SHORT, framing=framing, cut_at=at, cut=cut))
        stream = client.stream("Go", resume="never")
        came, error = read(stream)
        assert "".join(SHORT_TEXTS).startswith("".join(came)), at
        # a chunk's last two bytes only close the chunk
        arrived = sum(end - 2 * (framing != "close") <= at for end in ends)
        assert came[:arrived] == SHORT_TEXTS[:arrived], at
        if error is None:
            assert came == SHORT_TEXTS, at
            assert stream.completion.complete, at
            assert arrived >= len(SHORT_TEXTS), at
        else:
            assert type(error) is sheepsse.StreamInterrupted, at
            assert error.partial == stream.completion, at
            assert error.partial.text == "".join(came), at
            assert not error.partial.complete, at
            assert arrived <= len(SHORT_TEXTS), at  # with the finish reason it is whole


BROKEN_BODIES = {
    "a chunk size that is no number": [b"zz\r\nnot a chunk\r\n"],
    "a chunk size without an end": [b"1" * 70_000],
    "no chunk at all": [b"\r\n"],
}


@pytest.mark.parametrize("broken", BROKEN_BODIES.values(), ids=BROKEN_BODIES)
def test_broken_chunks_are_one_clear_error(server, client, broken):
    first = chat_events(WORDS[:2], finish=None, done=False)
    chunks = [b"%x\r\n%s\r\n" % (len(event), event) for event in first]
    server.answer(Answer(events=chunks + broken, framing="close", headers={"Transfer-Encoding": "chunked"}))
    came, error = read(client.stream("Go"))
    assert came == WORDS[:2]
    assert type(error) is sheepsse.StreamInterrupted
    assert error.partial.text == "".join(came)


def test_a_body_that_is_not_what_its_content_encoding_says_is_one_clear_error(server, client):
    server.answer(Answer(framing="length", headers={"Content-Encoding": "gzip"}))
    came, error = read(client.stream("Go"))
    assert came == []
    assert type(error) is sheepsse.InvalidStreamError
    assert "Content-Encoding" in str(error)


@every_framing
def test_a_finish_reason_without_done_is_whole(server, client, framing):
    server.answer(Answer(events=chat_events(WORDS, done=False), framing=framing))
    stream = client.stream("Go")
    assert list(stream) == WORDS
    assert stream.finish_reason == "stop"
    assert stream.completion.complete


@every_framing
@pytest.mark.parametrize("cut", ["fin", "reset"])
def test_a_cut_after_the_finish_reason_loses_only_the_usage(server, client, framing, cut):
    server.answer(Answer(framing=framing, cut_after=len(WORDS) + 2, cut=cut))
    stream = client.stream("Go")
    assert list(stream) == WORDS
    assert stream.completion.complete
    assert stream.usage is None


@every_framing
def test_done_is_whole_even_where_the_body_is_not(server, client, framing):
    server.answer(Answer(framing=framing, cut_after=len(WORDS) + 4))
    stream = client.stream("Go")
    assert list(stream) == WORDS
    assert stream.completion.complete
    assert stream.usage is not None


@every_framing
def test_silence_after_the_finish_reason_ends_the_stream_with_the_usage_wait(server, monkeypatch, framing):
    monkeypatch.setattr(sheepsse, "_USAGE_WAIT", 0.05)
    server.answer(Answer(framing=framing, stall_after=len(WORDS) + 2))
    with asking(server, **PATIENT) as client:
        stream = client.stream("Go")
        assert list(stream) == WORDS
    assert stream.completion.complete
    assert stream.usage is None
    assert server.wait_closed(HANG)


@pytest.mark.parametrize("framing", ["chunked", "close", "gzip"])
def test_comments_after_the_finish_reason_do_not_prolong_the_usage_wait(server, monkeypatch, framing):
    monkeypatch.setattr(sheepsse, "_USAGE_WAIT", 0.05)
    server.answer(Answer(framing=framing, stall_after=len(WORDS) + 2, keepalive=0.01))
    with asking(server, **PATIENT) as client:
        assert list(client.stream("Go")) == WORDS


def test_silence_after_the_usage_ends_the_stream_with_the_usage_wait(server, monkeypatch):
    monkeypatch.setattr(sheepsse, "_USAGE_WAIT", 0.05)
    server.answer(Answer(stall_after=len(WORDS) + 3))
    with asking(server, **PATIENT) as client:
        stream = client.stream("Go")
        assert list(stream) == WORDS
    assert stream.usage is not None


def repeated(clock, event, seconds=1):
    """An event again and again; with each of them so many seconds pass"""
    while True:
        clock.now += seconds
        yield event


def test_the_usage_wait_is_no_longer_than_the_idle_timeout(server, clock, monkeypatch):
    monkeypatch.setattr(sheepsse, "_USAGE_WAIT", FOREVER)
    words = chat_events(WORDS, done=False)
    server.answer(Answer(events=itertools.chain(words, repeated(clock, COMMENT)), pace=0.001))
    with asking(server, **{**PATIENT, "idle_timeout": 5}) as client:
        assert list(client.stream("Go")) == WORDS


def test_a_deadline_that_passes_in_the_usage_wait_takes_nothing_from_a_whole_answer(server, running_clock, monkeypatch):
    monkeypatch.setattr(sheepsse, "_USAGE_WAIT", FOREVER)
    server.answer(Answer(stall_after=len(WORDS) + 2))
    with asking(server, **PATIENT) as client:
        stream = client.stream("Go", deadline=HANG)
        for chunk in stream.chunks():
            if chunk.finish_reason:
                running_clock.now += HANG - LIMIT
    assert stream.text == TEXT
    assert stream.completion.complete


def test_a_deadline_that_passes_as_the_last_chunk_is_handled_takes_nothing_either(server, client, clock):
    server.answer(Answer(events=chat_events(WORDS)))
    stream = client.stream("Go", deadline=5)
    for chunk in stream.chunks():
        if chunk.finish_reason:
            clock.now += 5
    assert stream.text == TEXT
    assert stream.completion.complete


def test_the_usage_that_comes_late_is_waited_for(server, client, monkeypatch):
    monkeypatch.setattr(sheepsse, "_USAGE_WAIT", HANG)
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    server.answer(Answer(events=chat_events(WORDS[:2], usage=usage), pace=0.03))
    stream = client.stream("Go")
    assert list(stream) == WORDS[:2]
    assert stream.usage == sheepsse.Usage(3, 2, 5)


def test_an_answer_in_several_choices_is_whole_when_each_has_finished(server, client):
    both = [chunk_event(index=index, content=f"choice {index}") for index in (0, 1)]
    ends = [chunk_event(index=index, finish_reason="stop") for index in (0, 1)]
    server.answer(Answer(events=[*both, *ends]))
    stream = client.stream("Go", n=2)
    assert list(stream) == ["choice 0"]
    assert stream.completion.complete
    server.answer(Answer(events=[*both, ends[0]]))
    came, error = read(client.stream("Go", n=2))
    assert came == ["choice 0"]
    assert type(error) is sheepsse.StreamInterrupted


def test_a_dialect_may_do_without_an_end_marker(server):
    class Endless(sheepsse.DIALECTS["openai"]):
        require_end = False

    events = chat_events(WORDS, finish=None, done=False)
    server.answer(Answer(events=events))
    with asking(server, dialect=Endless) as client:
        assert list(client.stream("Go")) == WORDS
        server.answer(Answer(events=events, cut_after=3))
        assert type(read(client.stream("Go"))[1]) is sheepsse.StreamInterrupted  # a lost connection is one still


@pytest.mark.parametrize("size", [b"", b"zz", b"-1", b"f" * 21, b"-" + b"f" * 21])
def test_a_chunk_whose_size_is_none_ends_the_stream_like_a_lost_connection(server, client, size):
    body = b"5\r\n: a\n\n\r\n" + size + b"\r\ndata: {}\n\n\r\n0\r\n\r\n"
    server.answer(Answer(body=body, block=4096, framing="close", headers={"Transfer-Encoding": "chunked"}))
    came, error = read(client.stream("Good day?", resume="never"))
    assert (came, type(error)) == ([], sheepsse.StreamInterrupted)


# The mistakes that code of this kind makes


def served(client, server, *payloads):
    server.answer(Answer(events=[data_event(payload) for payload in payloads], content_type="text/event-stream"))
    return read(client.stream("Go"))


def test_broken_json_is_not_skipped_in_silence(server, client):
    came, error = served(
        client, server, {"choices": [{"index": 0, "delta": {"content": "a"}}]}, '{"choices": [', "[DONE]"
    )
    assert came == ["a"]
    assert type(error) is sheepsse.InvalidStreamError
    assert error.partial.text == "a"
    assert error.retryable is False


def test_an_empty_list_of_choices_and_a_null_delta_are_nothing(server, client):
    good = {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": "stop"}]}
    came, error = served(
        client, server, {"choices": []}, {"choices": None}, {"choices": [{"index": 0, "delta": None}]}, good, "[DONE]"
    )
    assert (came, error) == (["a"], None)


def test_an_error_in_the_stream_is_read_and_raised_after_what_came(server, client):
    server.answer(Answer(events=[chunk_event(content="a"), error_body(500, "Overheated").join([b"data: ", b"\n\n"])]))
    came, error = read(client.stream("Go"))
    assert came == ["a"]
    assert type(error) is sheepsse.StreamError
    assert "Overheated" in str(error)
    assert error.partial.text == "a"
    assert len(server.requests) == 1


def test_an_error_status_is_not_read_as_an_empty_stream(server, client):
    server.answer(Answer(status=500, body=b"".join(chat_events(WORDS)), content_type="text/event-stream"))
    came, error = read(client.stream("Go"))
    assert came == []
    assert type(error) is sheepsse.ServerError


def test_an_html_page_is_no_stream_and_is_asked_for_once(server):
    server.default = Answer(body=b"<!doctype html><p>Welcome", content_type="text/html")
    with asking(server, retry=sheepsse.Retry(3, base_delay=0)) as client:
        came, error = read(client.stream("Go"))
    assert came == []
    assert type(error) is sheepsse.InvalidStreamError
    assert "text/html" in str(error)
    assert "base URL" in str(error)
    assert len(server.requests) == 1


@pytest.mark.parametrize("kind", [ValueError, KeyError, json.JSONDecodeError, requests.ConnectionError, OSError])
def test_the_consumers_own_error_is_never_swallowed(server, client, keeps_files, kind):
    mine = kind("mine", "", 0) if kind is json.JSONDecodeError else kind("mine")
    server.answer(Answer(stall_after=3))
    with pytest.raises(kind) as caught:
        for _ in client.stream("Go"):
            raise mine
    assert caught.value is mine
    caught.value.__traceback__ = None


def test_reasoning_comes_in_chunks_and_is_not_text(server, client):
    server.answer(Answer(events=chat_events(["So", " it", " is"], reasoning=["Hm", "..."])))
    stream = client.stream("Go")
    chunks = list(stream.chunks())
    assert [chunk.reasoning for chunk in chunks if chunk.reasoning] == ["Hm", "..."]
    assert (stream.reasoning, stream.text) == ("Hm...", "So it is")


# Cancel

TIMES = 30
#: A policy whose waits nobody sees the end of
SLOW_RETRY = sheepsse.Retry(3, base_delay=FOREVER, max_delay=FOREVER, jitter=False)


def cancelled(stream, when=lambda: None):
    """Reads a stream that another thread cancels when ``when`` returns; what came, and the error

    Nothing else ends these streams: the server says no more, and the client knows no limit.
    """
    with in_another_thread(lambda: (when(), stream.cancel())):
        return read(stream)


def moment(number):
    """Some milliseconds, another number of them each time"""
    return (number * 7 % 10) / 4000


@every_framing
def test_cancel_ends_the_read_of_a_silent_server_every_time(either_server, framing):
    before = open_files()
    either_server.default = Answer(framing=framing, stall_after=3)
    with asking(either_server, **PATIENT) as client:
        for number in range(TIMES):
            stream = client.stream("Go")
            came = [next(stream), next(stream)]
            more, error = cancelled(stream, lambda number=number: time.sleep(moment(number)))
            assert type(error) is sheepsse.StreamCancelled, number
            assert (came, more) == (WORDS[:2], [])
            assert error.partial.text == "".join(came)
            assert error.partial.complete is False
            assert (error.code, error.retryable) == ("CANCELLED", False)
            error.__traceback__ = None
    assert either_server.wait_closed(HANG)
    assert until(lambda: open_files() == before)  # the server may not have taken the last client yet


def test_cancel_ends_a_wait_for_headers_every_time(either_server):
    before = open_files()
    either_server.default = Answer(delay=FOREVER)
    with asking(either_server, **PATIENT) as client:
        for number in range(TIMES):
            asked = len(either_server.requests)
            came, error = cancelled(
                client.stream("Go"), lambda asked=asked: until(lambda: len(either_server.requests) > asked)
            )
            assert (came, type(error)) == ([], sheepsse.StreamCancelled), number
            assert error.partial == sheepsse.Completion()
    assert either_server.wait_closed(HANG)
    assert until(lambda: open_files() == before)  # the server may not have taken the last client yet


def test_cancel_ends_a_wait_for_headers_on_a_connection_from_the_pool(either_server):
    with asking(either_server, **PATIENT) as client:
        for number in range(20):
            assert list(client.stream("Go")) == WORDS
            either_server.answer(Answer(delay=FOREVER))
            asked, connections = len(either_server.requests), either_server.connections
            _, error = cancelled(
                client.stream("Go"), lambda asked=asked: until(lambda: len(either_server.requests) > asked)
            )
            assert type(error) is sheepsse.StreamCancelled, number
            assert either_server.connections == connections
    assert either_server.wait_closed(HANG)


def test_cancel_ends_a_call_in_whatever_it_does_as_it_begins(either_server):
    before = open_files()
    either_server.default = Answer(delay=FOREVER)
    with asking(either_server, **PATIENT) as client:
        for number in range(TIMES):
            _, error = cancelled(client.stream("Go"), lambda number=number: time.sleep(moment(number)))
            assert type(error) is sheepsse.StreamCancelled, number
    assert either_server.wait_closed(HANG)
    assert until(lambda: open_files() == before)  # the server may not have taken the last client yet


def test_cancel_ends_a_back_off_every_time(either_server):
    before = open_files()
    either_server.default = error_answer(503)
    with asking(either_server, retry=SLOW_RETRY, **PATIENT) as client:
        for number in range(TIMES):
            waiting = threading.Event()
            stream = client.stream("Go", on_retry=lambda *_, waiting=waiting: waiting.set())
            came, error = cancelled(stream, lambda waiting=waiting: waiting.wait(HANG))
            assert (came, type(error)) == ([], sheepsse.StreamCancelled), number
            assert len(either_server.requests) == number + 1
    assert either_server.wait_closed(HANG)
    assert until(lambda: open_files() == before)  # the server may not have taken the last client yet


def test_cancel_ends_the_reading_of_an_errors_body(server, monkeypatch):
    monkeypatch.setattr(sheepsse, "_ERROR_BODY_TIME", FOREVER)
    server.default = error_answer(500)._replace(stall_at=10)
    with asking(server, retry=sheepsse.Retry(3, base_delay=0), **PATIENT) as client:
        _, error = cancelled(client.stream("Go"), lambda: until(lambda: server.sent_at))
    assert type(error) is sheepsse.StreamCancelled
    assert len(server.requests) == 1
    assert server.wait_closed(HANG)


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
def test_cancel_ends_the_wait_for_the_usage(either_server, framing, monkeypatch):
    monkeypatch.setattr(sheepsse, "_USAGE_WAIT", FOREVER)
    either_server.default = Answer(framing=framing, stall_after=len(WORDS) + 2)
    with asking(either_server, **PATIENT) as client:
        stream = client.stream("Go")
        came = []
        for chunk in stream.chunks():
            came.append(chunk.text)
            if chunk.finish_reason:
                break
        more, error = cancelled(stream, lambda: time.sleep(0.02))
    assert ("".join(came), more) == (TEXT, [])
    assert type(error) is sheepsse.StreamCancelled
    assert (error.partial.text, error.partial.complete) == (TEXT, False)
    assert either_server.wait_closed(HANG)


def test_cancel_ends_the_wait_to_ask_anew_for_a_lost_stream(server):
    server.default = Answer(cut_after=1)
    with asking(server, retry=SLOW_RETRY, **PATIENT) as client:
        waiting = threading.Event()
        stream = client.stream("Go", on_retry=lambda *_: waiting.set())
        _, error = cancelled(stream, lambda: waiting.wait(HANG))
    assert type(error) is sheepsse.StreamCancelled
    assert len(server.requests) == 1


def test_a_hook_may_cancel_or_close(server):
    server.default = error_answer(503)
    with asking(server, retry=SLOW_RETRY, **PATIENT) as client:
        stream = client.stream("Go", on_retry=lambda *_: stream.cancel())
        assert type(read(stream)[1]) is sheepsse.StreamCancelled
        stream = client.stream("Go", on_retry=lambda *_: stream.close())
        assert read(stream) == ([], None)
    assert len(server.requests) == 2


def test_cancel_ends_a_stream_of_comments(server):
    server.default = Answer(stall_after=1, keepalive=0.005)
    with asking(server, **PATIENT) as client:
        _, error = cancelled(client.stream("Go"), lambda: time.sleep(0.02))
    assert type(error) is sheepsse.StreamCancelled


def test_cancel_between_two_words_gives_no_further_word(server, client, keeps_files):
    server.answer(Answer(stall_after=5))  # more than one word has arrived
    stream = client.stream("Go")
    came = [next(stream)]
    stream.cancel()
    more, error = read(stream)
    assert more == []
    assert type(error) is sheepsse.StreamCancelled
    assert error.partial.text == "".join(came)


def test_cancel_in_the_loop_that_reads_ends_it(server, client, keeps_files):
    server.answer(Answer(pace=0.005))
    stream = client.stream("Go")
    came = []
    with pytest.raises(sheepsse.StreamCancelled) as caught:
        for text in stream:
            came.append(text)
            if len(came) == 2:
                stream.cancel()
    assert came == WORDS[:2]
    assert caught.value.partial.text == "".join(came)
    caught.value.__traceback__ = None


def test_a_stream_cancelled_before_its_start_sends_nothing(server, client):
    stream = client.stream("Go")
    stream.cancel()
    came, error = read(stream)
    assert (came, type(error)) == ([], sheepsse.StreamCancelled)
    assert (server.connections, server.requests) == (0, [])
    assert list(stream) == []


def test_a_request_that_a_cancel_prevented_is_not_counted_as_sent(client):
    stream = client.stream("Go")
    stream.cancel()
    read(stream)
    assert stream.stats.attempts == 0


def test_entering_a_cancelled_stream_raises_too(server, client):
    stream = client.stream("Go")
    stream.cancel()
    with pytest.raises(sheepsse.StreamCancelled):
        with stream:
            pytest.fail("entered")
    assert server.requests == []


def test_cancel_after_the_end_does_nothing(server, client):
    stream = client.stream("Go")
    assert list(stream) == WORDS
    stream.cancel()
    stream.cancel()
    assert next(stream, None) is None
    assert stream.completion.complete
    assert list(client.stream("Go")) == WORDS
    assert server.connections == 1


def test_cancel_after_an_error_does_nothing(server, client):
    stream = client.stream("Go")
    server.answer(error_answer(500))
    assert type(read(stream)[1]) is sheepsse.ServerError
    stream.cancel()
    assert read(stream) == ([], None)


def test_a_cancel_is_not_undone_by_close_nor_a_close_by_cancel(server, client):
    server.default = Answer(stall_after=3)
    stream = client.stream("Go")
    next(stream)
    stream.cancel()
    stream.close()
    assert read(stream) == ([], None)
    assert server.wait_closed(HANG)


@pytest.mark.parametrize("framing", ["chunked", "length", "gzip"])
def test_a_cancel_as_a_stream_ends_never_hurts_the_next_on_its_connection(either_server, framing):
    either_server.default = Answer(framing=framing)
    outcomes = {}
    with asking(either_server) as client:
        for number in range(3 * (len(WORDS) + 1)):
            first, words = client.stream("Go"), "".join(WORDS[: number // 3])
            ended = threading.Event()

            def cancel(number=number, first=first, words=words, ended=ended):
                if number // 3 == len(WORDS):
                    ended.wait(HANG)
                until(lambda: first.text.startswith(words) or ended.is_set())
                time.sleep(number % 3 / 10_000)
                first.cancel()

            if number == 0:
                cancel()
            with in_another_thread(cancel):
                came, error = read(first)
                ended.set()
                assert list(client.stream("And go")) == WORDS, number
            assert error is None or type(error) is sheepsse.StreamCancelled, number
            assert came == WORDS[: len(came)]
            outcomes[number] = type(error)
            assert list(client.stream("And go again")) == WORDS, number
    assert (outcomes[0], outcomes[number]) == (sheepsse.StreamCancelled, type(None))


def test_a_late_cancel_never_hurts_the_stream_that_has_the_connection_now(either_server):
    with asking(either_server) as client:
        first = client.stream("Go")
        assert list(first) == WORDS
        either_server.answer(Answer(stall_after=3))
        second = client.stream("Go")
        came = [next(second)]
        first.cancel()
        first.close()
        either_server.release()
        assert came + list(second) == WORDS
    assert either_server.connections == 1


def test_a_cancelled_stream_frees_the_thread_that_reads_its_chunks(server, client):
    server.answer(Answer(stall_after=3))
    stream = client.stream("Go")
    with in_another_thread(read, stream.chunks()) as results:
        assert until(lambda: stream.text)
        stream.cancel()
    (came, error), *_ = results
    assert "".join(chunk.text for chunk in came) == error.partial.text == stream.text
    assert type(error) is sheepsse.StreamCancelled


# The connection is let go


@every_framing
def test_leaving_the_loop_early_lets_go_of_the_connection(either_server, framing):
    either_server.default = Answer(framing=framing, stall_after=3)
    with asking(either_server) as client:
        for text in client.stream("Go"):
            assert text == WORDS[0]
            break
        assert either_server.wait_closed(HANG)


def test_leaving_a_loop_over_chunks_early_lets_go_of_the_connection(server, client):
    server.answer(Answer(stall_after=3))
    for chunk in client.stream("Go").chunks():
        assert chunk.model == MODEL
        break
    assert server.wait_closed(HANG)


def test_an_error_in_the_loop_lets_go_of_the_connection(server, client):
    server.answer(Answer(stall_after=3))
    with pytest.raises(ZeroDivisionError) as caught:
        for _ in client.stream("Go"):
            1 / 0  # noqa: B018
    caught.value.__traceback__ = None  # it refers to the frame that refers to the stream
    assert server.wait_closed(HANG)


def test_collection_lets_go_of_the_connection(server, client, keeps_files):
    server.answer(Answer(stall_after=3))
    stream = client.stream("Go")
    next(stream)
    assert server.open_connections == 1
    del stream


def test_collection_lets_go_of_a_stream_in_a_reference_cycle(server, client, keeps_files):
    server.answer(Answer(stall_after=3))
    stream = client.stream("Go")
    next(stream)
    cycle = [stream]
    cycle.append(cycle)
    del stream, cycle
    gc.collect()
    assert server.wait_closed(HANG)


def test_collection_lets_go_of_a_stream_that_was_entered_and_never_read(server, client, keeps_files):
    server.answer(Answer(stall_after=1))
    stream = client.stream("Go")
    stream.__enter__()
    assert server.open_connections == 1
    del stream
    assert server.wait_closed(HANG)


def test_a_stream_that_was_never_iterated_costs_and_sends_nothing(server, client):
    before = open_files()
    streams = [client.stream("Go") for _ in range(10)]
    assert open_files() == before
    assert server.connections == 0
    assert streams[0].stats == sheepsse.StreamStats()
    streams[0].close()
    with_keywords = sheepsse.stream("Go", model=MODEL, base_url=server.base_url, api_key=False)
    del with_keywords, streams
    assert (server.connections, server.requests) == (0, [])
    assert until(lambda: open_files() == before)  # the server may not have taken the last client yet


def test_leaving_with_lets_go_of_the_connection(server, client, keeps_files):
    server.answer(Answer(stall_after=3))
    with client.stream("Go") as stream:
        assert len(server.requests) == 1, "entering opens the connection"
        assert stream.response.status_code == 200
        assert next(stream) == WORDS[0]
    assert server.wait_closed(HANG)
    assert list(stream) == []


def test_leaving_with_before_the_first_word_lets_go_of_the_connection(server, client, keeps_files):
    server.answer(Answer(stall_after=1))
    with client.stream("Go"):
        pass
    assert server.wait_closed(HANG)


def test_with_leaves_the_consumers_error_alone(server, client, keeps_files):
    server.answer(Answer(stall_after=3))
    with pytest.raises(LookupError, match="mine") as caught:
        with client.stream("Go") as stream:
            next(stream)
            raise LookupError("mine")
    caught.value.__traceback__ = None
    assert server.wait_closed(HANG)


def test_close_ends_a_stream_quietly_and_may_be_called_again(server, client, keeps_files):
    server.answer(Answer(stall_after=3))
    stream = client.stream("Go")
    next(stream)
    stream.close()
    stream.close()
    assert server.wait_closed(HANG)
    assert list(stream) == []
    assert stream.text == WORDS[0]
    assert stream.completion.complete is False


def test_a_closed_stream_is_not_opened_by_with_nor_by_next(server, client):
    stream = client.stream("Go")
    stream.close()
    with stream:
        assert list(stream) == []
    assert server.requests == []


def test_close_in_the_loop_that_reads_ends_it_quietly(server, client, keeps_files):
    server.answer(Answer(stall_after=5))
    stream = client.stream("Go")
    came = []
    for text in stream:
        came.append(text)
        stream.close()
    assert came == WORDS[:1]


def test_close_ends_a_reader_quietly_that_asks_for_more_meanwhile(server, client, keeps_files):
    server.default = Answer(stall_after=3)
    stream = client.stream("Go")
    next(stream)
    closing, response_close = threading.Event(), stream.response.close

    def slow_close():
        closing.set()
        time.sleep(0.05)
        response_close()

    stream.response.close = slow_close
    with in_another_thread(stream.close):
        assert closing.wait(HANG)
        assert list(stream) == []


def test_a_cancel_and_a_close_from_another_thread_are_no_second_reader(server, client, keeps_files):
    server.default = Answer(stall_after=3)
    stream = client.stream("Go")
    next(stream)
    closing, response_close = threading.Event(), stream.response.close

    def slow_close():
        closing.set()
        time.sleep(0.05)
        response_close()

    stream.response.close = slow_close
    with in_another_thread(lambda: (stream.cancel(), stream.close())):
        assert closing.wait(HANG)
        came, error = read(stream)
    assert came == []
    assert error is None or type(error) is sheepsse.StreamCancelled


def test_close_from_another_thread_as_a_chunk_is_returned_needs_no_further_read(server, monkeypatch):
    limiter, plain = sheepsse.Limiter(1), sheepsse.Stream._next

    def closed_meanwhile(stream):
        chunk = plain(stream)
        closer = threading.Thread(target=stream.close)
        closer.start()
        closer.join(HANG)
        return chunk

    server.default = Answer(stall_after=5)
    monkeypatch.setattr(sheepsse.Stream, "_next", closed_meanwhile)
    with asking(server, limiter=limiter, **PATIENT) as client:
        chunks = client.stream("Go").chunks()
        next(chunks)
        assert limiter.stats().active == 0
        assert server.wait_closed(HANG)
        assert list(chunks) == []


@every_framing
def test_close_from_another_thread_ends_a_reader_quietly(either_server, framing):
    either_server.default = Answer(framing=framing, stall_after=3)
    with asking(either_server, **PATIENT) as client:
        for number in range(10):
            stream = client.stream("Go")
            came = [next(stream), next(stream)]
            with in_another_thread(lambda stream=stream, number=number: (time.sleep(moment(number)), stream.close())):
                more, error = read(stream)
            assert (came + more, error) == (WORDS[:2], None), number
    assert either_server.wait_closed(HANG)


def test_close_from_another_thread_ends_a_wait_for_headers_quietly(server):
    server.default = Answer(delay=FOREVER)
    with asking(server, **PATIENT) as client:
        stream = client.stream("Go")
        with in_another_thread(lambda: (until(lambda: server.requests), stream.close())):
            assert read(stream) == ([], None)
        stream = client.stream("Go")
        with in_another_thread(lambda: (until(lambda: len(server.requests) > 1), stream.close())):
            with stream:
                assert list(stream) == []
    assert server.wait_closed(HANG)


def test_close_from_another_thread_ends_a_back_off_quietly(server):
    server.default = error_answer(503)
    waiting = threading.Event()
    with asking(server, retry=SLOW_RETRY, **PATIENT) as client:
        stream = client.stream("Go", on_retry=lambda *_: waiting.set())
        with in_another_thread(lambda: (waiting.wait(HANG), stream.close())):
            assert read(stream) == ([], None)
    assert len(server.requests) == 1


@pytest.mark.parametrize("framing", ["chunked", "one-chunk", "length", "gzip", "gzip-length"])
def test_a_stream_read_to_its_end_gives_its_connection_back(either_server, framing):
    either_server.default = Answer(framing=framing)
    with asking(either_server) as client:
        for _ in range(5):
            assert list(client.stream("Go")) == WORDS
        with client.stream("Go") as stream:
            assert list(stream) == WORDS
        assert list(client.stream("Go")) == WORDS
        assert either_server.connections == either_server.open_connections == 1
    assert either_server.wait_closed(HANG)


@pytest.mark.parametrize("framing", ["chunked", "length", "gzip", "gzip-length"])
def test_what_follows_done_is_read_out_and_means_nothing(server, client, framing):
    trailing = [COMMENT * 3000, chunk_event(content="too late"), b"data: not JSON\n\n", data_event("[DONE]")]
    server.default = Answer(events=[*chat_events(WORDS), *trailing], framing=framing)
    for _ in range(3):
        assert list(client.stream("Go")) == WORDS
    assert server.connections == 1


@every_framing
def test_a_server_that_stays_silent_after_done_is_not_waited_for(server, framing, monkeypatch):
    monkeypatch.setattr(sheepsse, "_DRAIN_TIME", 0.05)
    events = [*chat_events(WORDS), COMMENT, COMMENT]
    server.default = Answer(events=events, framing=framing, stall_after=len(events) - 1)
    with asking(server, **PATIENT) as client:
        stream = client.stream("Go")
        assert list(stream) == WORDS
        assert stream.completion.complete
        assert server.wait_closed(HANG)


def test_a_server_that_never_stops_talking_after_done_is_not_listened_to(server, monkeypatch):
    monkeypatch.setattr(sheepsse, "_DRAIN_TIME", 0.05)
    events = itertools.chain(chat_events(WORDS), itertools.repeat(COMMENT * 2_000_000))
    server.answer(Answer(events=events, framing="close"))
    with asking(server, **PATIENT) as client:
        assert list(client.stream("Go")) == WORDS


def test_the_connection_of_an_error_is_given_back(server, client):
    server.default = error_answer(400)
    for _ in range(3):
        assert type(read(client.stream("Go"))[1]) is sheepsse.InvalidRequestError
    assert server.connections == 1


def test_the_connection_of_an_error_that_is_tried_again_is_given_back(server):
    server.answer(error_answer(503), error_answer(429))
    with asking(server, retry=sheepsse.Retry(3, sleep=lambda _: None)) as client:
        assert list(client.stream("Go")) == WORDS
    assert server.connections == 1


def test_a_stream_made_from_keywords_closes_its_client(server, keeps_files):
    def ask(**params):
        return sheepsse.stream("Go", model=MODEL, base_url=server.base_url, api_key=False, **params)

    stream = ask()
    assert list(stream) == WORDS
    assert server.wait_closed(HANG), "read to its end"
    server.answer(Answer(stall_after=3))
    stream = ask()
    next(stream)
    stream.close()
    assert server.wait_closed(HANG), "closed"
    server.answer(error_answer(400))
    with pytest.raises(sheepsse.InvalidRequestError):
        next(ask())
    assert server.wait_closed(HANG), "refused"
    server.answer(Answer(stall_after=3))
    for _ in ask():
        break
    assert server.wait_closed(HANG), "left"


def test_complete_made_from_keywords_closes_its_client(server, keeps_files):
    answer = sheepsse.complete("Go", model=MODEL, base_url=server.base_url, api_key=False)
    assert answer.text == TEXT
    assert server.wait_closed(HANG)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs POSIX signals")
def test_an_interrupt_from_the_keyboard_comes_through_and_lets_go(server, client, keeps_files):
    def interrupt(*_):
        raise KeyboardInterrupt

    def is_reading():
        return sys._current_frames()[threading.main_thread().ident].f_code.co_name == "readinto"

    server.default = Answer(stall_after=3)
    old = signal.signal(signal.SIGUSR1, interrupt)
    try:
        stream = client.stream("Go")
        next(stream)
        with in_another_thread(lambda: (until(is_reading), os.kill(os.getpid(), signal.SIGUSR1))):
            with pytest.raises(KeyboardInterrupt) as caught:
                list(stream)
    finally:
        signal.signal(signal.SIGUSR1, old)
    caught.value.__traceback__ = None
    assert server.wait_closed(HANG)
    assert list(stream) == []


def test_an_error_of_a_hook_comes_through_and_lets_go(server, keeps_files):
    def hook(*_):
        raise LookupError("mine")

    server.default = error_answer(503)
    with asking(server, retry=2) as client:
        stream = client.stream("Go", on_retry=hook)
        with pytest.raises(LookupError, match="mine"):
            list(stream)
        assert list(stream) == []


# One reader


def test_words_and_chunks_are_one_stream(client):
    stream = client.stream("Go")
    came = [next(stream)]
    came += [chunk.text for chunk in stream.chunks() if chunk.text]
    assert came == WORDS


def test_a_second_thread_that_reads_gets_an_error_and_disturbs_nobody(server, client):
    server.answer(Answer(stall_after=3))
    stream = client.stream("Go")
    with in_another_thread(read, stream) as results:
        assert until(lambda: stream.text == "".join(WORDS[:2]))
        with pytest.raises(RuntimeError, match="one thread"):
            next(stream)
        with pytest.raises(RuntimeError, match="one thread"):
            next(stream.chunks())
        server.release()
    assert results == [(WORDS, None)]


# Limits

LIMIT = 0.1


def late(server, limit, clock=None, **options):
    """Reads a stream that runs into a limit, which the error names: nothing else ends it; what came before

    With a clock most of the deadline passes behind the first word.
    """
    call = {name: options.pop(name) for name in ("deadline",) if name in options}
    with asking(server, **{**PATIENT, **options}) as client:
        stream = client.stream("Go", **call)
        came = []
        if clock is not None:
            came.append(next(stream))
            clock.now += call["deadline"] - LIMIT
        more, error = read(stream)
    assert type(error) is sheepsse.StreamTimeout
    assert (error.code, error.retryable) == ("TIMEOUT", True)
    assert limit in str(error)
    assert error.partial.text == "".join(came + more)
    assert server.wait_closed(HANG)
    return came + more


#: in one write, as nothing is said of what comes between the role and the word
FIRST = [b"".join(chat_events(WORDS[:1], finish=None, done=False))]
LONG = chunk_event(content="x" * 5000)
PING = b'event: ping\ndata: {"type": "ping"}\n\n'
SLOW = {"pace": 0.01}
BY_HAND = {"framing": "close", "headers": {"Transfer-Encoding": "chunked"}}  # the chunks are in the events


def by_bytes(data):
    return [data[at : at + 1] for at in range(len(data))]


def in_chunks(events):
    return [b"%x\r\n%s\r\n" % (len(event), event) for event in events]


#: answers that never bring a chunk
NO_CHUNK = {
    "silence": Answer(delay=FOREVER),
    "the header byte by byte": Answer(header_pace=0.05, headers={"X-Long": "x" * 1000}),
    "silence after the header": Answer(stall_at=0),
    "a chunk's size byte by byte": Answer(events=[b"0"] * 5000, **BY_HAND, **SLOW),
    "an event byte by byte": Answer(body=LONG, block=1, framing="length", **SLOW),
    "an event byte by byte, each in a chunk": Answer(body=LONG, block=1, **SLOW),
    "an event byte by byte, compressed": Answer(body=LONG, block=1, framing="gzip", **SLOW),
    "comments": Answer(stall_after=0, keepalive=0.01),
    "comments without a length": Answer(stall_after=0, keepalive=0.01, framing="close"),
    "compressed comments": Answer(stall_after=0, keepalive=0.01, framing="gzip"),
    "blank lines": Answer(events=itertools.repeat(b"\n"), **SLOW),
    "events without data": Answer(events=itertools.repeat(b"data:\n\n"), **SLOW),
}
#: answers that bring one word and never another
ONE_WORD = {
    "silence": Answer(events=[*FIRST, b":"], stall_after=1),
    "a chunk's size byte by byte": Answer(events=[*in_chunks(FIRST), *[b"0"] * 5000], **BY_HAND, **SLOW),
    "an event byte by byte": Answer(events=[*FIRST, *by_bytes(LONG)], framing="length", **SLOW),
    "an event byte by byte, each in a chunk": Answer(events=[*FIRST, *by_bytes(LONG)], **SLOW),
    "an event byte by byte, compressed": Answer(events=[*FIRST, *by_bytes(LONG)], framing="gzip-close", **SLOW),
    "comments": Answer(events=[*FIRST, b":"], stall_after=1, keepalive=0.01),
    "compressed comments": Answer(events=[*FIRST, b":"], stall_after=1, keepalive=0.01, framing="gzip"),
    "events without data": Answer(events=[*FIRST, *[b"data:\n\n"] * 5000], **SLOW),
}
without_a_chunk = pytest.mark.parametrize("answer", NO_CHUNK.values(), ids=NO_CHUNK)
with_one_word = pytest.mark.parametrize("answer", ONE_WORD.values(), ids=ONE_WORD)


@without_a_chunk
def test_first_timeout_holds_against(server, answer):
    server.answer(answer)
    assert late(server, "first_timeout", first_timeout=LIMIT) == []


@with_one_word
def test_idle_timeout_holds_against(server, answer):
    server.answer(answer)
    assert late(server, "idle_timeout", idle_timeout=LIMIT) == WORDS[:1]


@without_a_chunk
def test_a_deadline_holds_before_the_first_word_against(server, answer):
    server.answer(answer)
    assert late(server, "deadline", deadline=LIMIT) == []


@with_one_word
def test_a_deadline_holds_after_a_word_against(server, answer, running_clock):
    server.answer(answer)
    assert late(server, "deadline", running_clock, deadline=HANG) == WORDS[:1]


@pytest.mark.parametrize("limit", ["first_timeout", "idle_timeout", "deadline"])
def test_limits_hold_against_comments_without_a_pause(server, limit):
    comments = COMMENT * 1_000_000
    first = [] if limit == "first_timeout" else FIRST
    server.answer(Answer(events=itertools.chain(first, itertools.repeat(comments, 1000)), framing="close"))
    late(server, limit, **{limit: LIMIT})


@pytest.mark.parametrize("limit", ["first_timeout", "idle_timeout"])
def test_pings_are_no_chunks(server, limit):
    before = [] if limit == "first_timeout" else FIRST
    server.answer(Answer(events=itertools.chain(before, itertools.repeat(PING)), pace=0.01))
    late(server, limit, **{limit: LIMIT})


@pytest.mark.parametrize(
    "answer",
    [Answer(delay=FOREVER), Answer(header_pace=FOREVER), *(Answer(stall_at=at) for at in (0, 1, 50))],
    ids=["before the header", "in the header", "after the header", "in a chunk's size", "in an event"],
)
def test_the_read_timeout_is_for_silence_anywhere(either_server, answer):
    either_server.answer(answer)
    late(either_server, "read time-out", timeout=(5, LIMIT))


def test_the_read_timeout_does_not_end_what_trickles(server, clock):
    comments = itertools.islice(repeated(clock, COMMENT, HANG / 2), 10)
    server.answer(Answer(events=itertools.chain(comments, chat_events(["done"])), pace=0.005))
    with asking(server, **{**PATIENT, "timeout": HANG}) as client:
        assert list(client.stream("Go")) == ["done"]


def test_limits_hold_over_tls(tls_server, running_clock):
    tls_server.answer(NO_CHUNK["the header byte by byte"])
    late(tls_server, "first_timeout", first_timeout=LIMIT)
    tls_server.answer(ONE_WORD["comments"])
    late(tls_server, "idle_timeout", idle_timeout=LIMIT)
    tls_server.answer(ONE_WORD["an event byte by byte"])
    late(tls_server, "deadline", running_clock, deadline=HANG)


def test_a_deadline_holds_against_text_that_keeps_coming(server, running_clock):
    server.answer(Answer(events=itertools.repeat(chunk_event(content="x")), pace=0.01))
    assert late(server, "deadline", running_clock, deadline=HANG)


def test_a_deadline_counts_the_time_of_the_consumer_too(server, client, clock):
    server.answer(Answer(events=chat_events(WORDS, finish=None, done=False)))
    came = []
    with pytest.raises(sheepsse.StreamTimeout, match="deadline"):
        for text in client.stream("Go", deadline=20):
            came.append(text)
            clock.now += 10
    assert came == WORDS[:2]


def test_a_slow_consumer_is_not_an_idle_stream(server, clock):
    server.answer(Answer(pace=0.005))
    with asking(server, idle_timeout=20, timeout=20) as client:
        came = []
        for text in client.stream("Go"):
            came.append(text)
            if len(came) in (1, 4):
                clock.now += 30
    assert came == WORDS


def test_a_consumer_that_is_slow_to_begin_is_not_a_late_stream(server, clock):
    server.answer(Answer(events=[COMMENT, COMMENT, *chat_events(WORDS)], pace=0.005))
    with asking(server, first_timeout=20) as client:
        with client.stream("Go") as stream:
            clock.now += 30
            assert list(stream) == WORDS


def test_a_limit_of_none_is_no_limit(server):
    server.answer(Answer(delay=0.05, pace=0.01))
    with asking(server, timeout=None, first_timeout=None, idle_timeout=None) as client:
        assert list(client.stream("Go")) == WORDS


def test_a_call_may_set_limits_of_its_own(server, client):
    server.default = Answer(delay=FOREVER)
    for option, words in (
        ({"timeout": LIMIT}, "read time-out"),
        ({"timeout": (5, LIMIT)}, "read time-out"),
        ({"first_timeout": LIMIT}, "first_timeout"),
    ):
        assert words in str(read(client.stream("Go", **option))[1])
    server.default = ONE_WORD["silence"]
    assert "idle_timeout" in str(read(client.stream("Go", idle_timeout=LIMIT))[1])


@pytest.mark.parametrize("option", ["timeout", "first_timeout", "idle_timeout"])
def test_a_call_may_switch_a_limit_of_its_client_off(server, option):
    server.answer(Answer(text="late", delay=0.05, pace=0.05))
    with asking(server, **{option: 0.02}) as client:
        came, error = read(client.stream("Go", **{option: None}))
    assert (came, error) == (["late"], None)


def test_a_deadline_in_a_back_off_raises_the_real_error_at_once(server):
    server.default = error_answer(503, "Down for repairs")
    retry, waits = quick(base_delay=2 * HANG, max_delay=2 * HANG, jitter=False)
    with asking(server, retry=retry) as client:
        _, error = read(client.stream("Go", deadline=HANG))
    assert type(error) is sheepsse.ServerError
    assert "Down for repairs" in str(error)
    assert (waits, len(server.requests)) == ([], 1)


def test_nothing_is_sent_after_the_deadline(server, running_clock):
    def answer(request):
        running_clock.now += HANG - LIMIT
        return NO_CHUNK["the header byte by byte"]

    server.default = answer
    with asking(server, retry=sheepsse.Retry(3, base_delay=0), **PATIENT) as client:
        _, error = read(client.stream("Go", deadline=HANG))
    assert type(error) is sheepsse.StreamTimeout
    assert "deadline" in str(error)
    assert len(server.requests) == 1


@pytest.fixture
def deaf_port():
    """A port at which connecting takes for ever: its queue is full"""
    with contextlib.ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            filler = sockets.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        probe = sockets.enter_context(socket.socket())
        probe.settimeout(0.05)
        with contextlib.suppress(socket.timeout):
            probe.connect(listener.getsockname())
            pytest.skip("needs a system that lets a connection wait where a queue is full")
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("timeout", "deadline", "kind", "words"),
    [
        ((LIMIT, None), None, sheepsse.ConnectError, "no connection"),
        ((FOREVER, None), LIMIT, sheepsse.StreamTimeout, "deadline"),
        (None, LIMIT, sheepsse.StreamTimeout, "deadline"),
    ],
)
def test_connecting_is_limited_by_the_connect_timeout_and_the_deadline(deaf_port, timeout, deadline, kind, words):
    options = {**PATIENT, "timeout": timeout}
    with sheepsse.Client(
        base_url=f"http://127.0.0.1:{deaf_port}/v1", api_key=False, model=MODEL, retry=0, **options
    ) as client:
        _, error = read(client.stream("Go", deadline=deadline))
    assert type(error) is kind
    assert words in str(error)


def test_cancel_ends_connecting_with_the_connect_timeout(deaf_port):
    options = {**PATIENT, "timeout": (LIMIT, None)}
    with sheepsse.Client(
        base_url=f"http://127.0.0.1:{deaf_port}/v1", api_key=False, model=MODEL, retry=SLOW_RETRY, **options
    ) as client:
        stream = client.stream("Go")
        _, error = cancelled(stream)
    assert type(error) is sheepsse.StreamCancelled
    assert stream.stats.attempts <= 1


# Asked again


def quick(total=3, **options):
    """A policy that does not wait, and the list of the waits it would have made"""
    waits = []
    return sheepsse.Retry(total, sleep=waits.append, **options), waits


def asked(server, retry, **params):
    """Asks once by a policy; what came, and the error"""
    with asking(server, retry=retry) as client:
        return read(client.stream("Go", **params))


ONCE = {
    "400": error_answer(400),
    "401": error_answer(401),
    "402": error_answer(402),
    "403": error_answer(403),
    "404": error_answer(404),
    "413": error_answer(413),
    "422": error_answer(422),
    "418": error_answer(418),
    "501": error_answer(501),
    "a spent quota": error_answer(429, "You exceeded your current quota", code="insufficient_quota", retry_after=1),
    "a 500 that says no": error_answer(500, headers={"x-should-retry": "false"}),
    "a 429 that says no": error_answer(429, headers={"x-should-retry": "false"}),
    "a 401 that says yes": error_answer(401, headers={"x-should-retry": "true"}),
    "a redirect": Answer(status=307, headers={"Location": "http://127.0.0.1:1/"}, framing="length"),
    "a redirect to nowhere": Answer(status=302, framing="length"),
}
AGAIN = {
    **{str(status): error_answer(status) for status in (408, 409, 429, 500, 502, 503, 504, 529)},
    "a 400 that says yes": error_answer(400, headers={"x-should-retry": "true"}),
    "a 501 that says yes": error_answer(501, headers={"x-should-retry": "TRUE"}),
    "a dropped connection": Answer(drop=True),
    "a reset connection": Answer(drop=True, cut="reset"),
    "a stream without a word": Answer(events=[], framing="length"),
    "a stream cut before its first word": Answer(cut_after=1),
}


@pytest.mark.parametrize("answer", ONCE.values(), ids=ONCE)
def test_one_request_is_sent_for(server, answer):
    server.default = answer
    retry, waits = quick()
    came, error = asked(server, retry)
    assert (came, waits) == ([], [])
    assert isinstance(error, sheepsse.SheepError)
    assert error.status == answer.status
    assert len(server.requests) == 1


@pytest.mark.parametrize("total", [0, 1, 3])
@pytest.mark.parametrize("answer", AGAIN.values(), ids=AGAIN)
def test_one_request_and_total_more_are_sent_for(server, answer, total):
    server.default = answer
    retry, waits = quick(total)
    came, error = asked(server, retry)
    assert came == []
    assert error.retryable
    assert len(server.requests) == 1 + total
    assert len(waits) == total, "no wait after the last try"


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_refused_connection_is_tried_again_as_often(server):
    retry, waits = quick(2)
    with sheepsse.Client(base_url=f"http://127.0.0.1:{closed_port()}", api_key=False, model="m", retry=retry) as client:
        stream = client.stream("Go")
        _, error = read(stream)
    assert type(error) is sheepsse.ConnectError
    assert isinstance(error, requests.ConnectionError)
    assert (error.code, error.retryable) == ("NETWORK_ERROR", True)
    assert "no connection to http://127.0.0.1" in str(error)
    assert len(waits) == 2
    assert stream.stats.attempts == 3


def test_an_unknown_certificate_is_not_tried_again(tls_server, monkeypatch):
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    retry, waits = quick()
    _, error = asked(tls_server, retry)
    assert type(error) is sheepsse.ConnectError
    assert "certificate" in str(error)
    assert error.retryable is False
    assert waits == []


def test_a_timeout_before_the_header_is_tried_again_like_a_drop(server, hurry):
    server.answer(Answer(delay=FOREVER))
    retry, waits = quick(on_retry=lambda *_: hurry.end())
    hurry.begin()
    with asking(server, retry=retry, timeout=HANG) as client:
        stream = client.stream("Go")
        assert list(stream) == WORDS
    assert len(waits) == 1
    assert (stream.stats.attempts, stream.stats.reconnects, stream.continuity) == (2, 0, "single")


def test_first_timeout_begins_anew_with_each_request(server, clock):
    ten_seconds = itertools.islice(repeated(clock, COMMENT), 10)
    server.answer(
        Answer(events=repeated(clock, COMMENT), pace=0.005),
        Answer(events=itertools.chain(ten_seconds, chat_events(WORDS))),
    )
    retry, _ = quick()
    with asking(server, retry=retry, **{**PATIENT, "first_timeout": 15}) as client:
        assert list(client.stream("Go")) == WORDS
    assert len(server.requests) == 2


def test_after_failures_comes_success(server):
    server.answer(error_answer(429), error_answer(503), Answer(drop=True))
    retry, waits = quick(base_delay=0.5, jitter=False, rate_limit_delay=5)
    with asking(server, retry=retry) as client:
        stream = client.stream("Go")
        assert list(stream) == WORDS
    assert waits == [5, 1, 2]
    assert (stream.stats.attempts, stream.continuity) == (4, "single")
    assert stream.completion.complete


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"retry-after-ms": "20"}, 0.02),
        ({"retry-after-ms": "20", "Retry-After": "7"}, 0.02),
        ({"retry-after-ms": "0", "Retry-After": "1"}, 1),
        ({"Retry-After": "1"}, 1),
        ({"Retry-After": "1.5"}, 1.5),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 5),
        ({"Retry-After": "-5"}, 5),
        ({"Retry-After": "abc"}, 5),
        ({"Retry-After": ""}, 5),
        ({}, 5),
    ],
)
def test_the_wait_is_what_the_answer_asks_for(server, headers, wait):
    server.answer(error_answer(429, headers=headers))
    retry, waits = quick(base_delay=0, rate_limit_delay=5)
    assert asked(server, retry) == (WORDS, None)
    assert waits == [wait]


def test_a_longer_wait_than_the_policys_is_not_waited_but_raised(server):
    server.default = error_answer(503, retry_after=99999999)
    retry, waits = quick()
    _, error = asked(server, retry)
    assert type(error) is sheepsse.ServerError
    assert error.retry_after == 99999999
    assert (waits, len(server.requests)) == ([], 1)


def test_a_number_of_retries_is_a_policy_too(server):
    server.default = error_answer(503, headers={"retry-after-ms": "1"})
    asked(server, 2)
    assert len(server.requests) == 3


def test_a_call_may_set_a_policy_of_its_own(server):
    server.default = error_answer(503)
    retry, waits = quick(2)
    with asking(server, retry=5) as client:
        assert type(read(client.stream("Go", retry=retry))[1]) is sheepsse.ServerError
        assert (len(server.requests), len(waits)) == (3, 2)
        assert type(read(client.stream("Go", retry=0))[1]) is sheepsse.ServerError
        assert len(server.requests) == 4


def test_should_retry_is_asked_about_each_failure(server):
    seen = []

    def should_retry(error, attempt):
        seen.append((type(error).__name__, attempt))
        return {1: 0.25, 2: True, 3: False}[attempt]

    server.default = error_answer(500)
    retry, waits = quick(5, should_retry=should_retry, base_delay=1, jitter=False)
    asked(server, retry)
    assert seen == [("ServerError", 1), ("ServerError", 2), ("ServerError", 3)]
    assert waits == [0.25, 2]
    assert len(server.requests) == 3


def test_hooks_are_told_of_each_retry_and_of_giving_up(server):
    told = []
    retry, waits = quick(
        2,
        base_delay=1,
        jitter=False,
        on_retry=lambda error, attempt, delay: told.append(("retry", error.code, attempt, delay)),
        on_give_up=lambda error, attempt: told.append(("give up", error.code, attempt)),
    )
    server.default = error_answer(500)
    asked(server, retry)
    assert told == [("retry", "SERVER_ERROR", 1, 1), ("retry", "SERVER_ERROR", 2, 2), ("give up", "SERVER_ERROR", 3)]
    assert waits == [1, 2]


def test_a_calls_on_retry_takes_the_place_of_the_policys(server):
    server.answer(error_answer(500), error_answer(500))
    retry, _ = quick(on_retry=lambda *_: pytest.fail("the policy's own was called"))
    told = []
    with asking(server, retry=retry) as client:
        assert list(client.stream("Go", on_retry=lambda *args: told.append(args))) == WORDS
        server.answer(error_answer(500))
        assert client.complete("Go", on_retry=lambda *args: told.append(args)).text == TEXT
    assert [attempt for _, attempt, _ in told] == [1, 2, 1]


def test_nobody_is_told_of_giving_up_where_the_caller_cancelled(server):
    retry, _ = quick(on_give_up=lambda *_: pytest.fail("told"))
    with asking(server, retry=retry) as client:
        stream = client.stream("Go")
        next(stream)
        stream.cancel()
        assert type(read(stream)[1]) is sheepsse.StreamCancelled


def test_the_request_id_is_a_uuid4_and_the_same_for_all_tries(server):
    server.answer(error_answer(503), error_answer(503), Answer(cut_after=1))
    retry, _ = quick()
    with asking(server, retry=retry) as client:
        assert list(client.stream("Go")) == list(client.stream("Go")) == WORDS
    ids = [request.headers["X-Request-ID"] for request in server.requests]
    assert len(ids) == 5
    assert len(set(ids[:4])) == 1
    assert ids[4] != ids[0]
    assert {uuid.UUID(id).version for id in ids} == {4}
    assert len({request.body for request in server.requests}) == 1


@pytest.mark.parametrize(
    "lost",
    [
        Answer(cut_after=0),
        Answer(cut_after=1),
        Answer(cut_after=1, cut="reset"),
        Answer(cut_after=1, framing="close"),
        Answer(cut_after=1, framing="gzip-length"),
        Answer(stall_after=1),
        Answer(events=[data_event({"error": {"message": "Overloaded", "code": 503}})], framing="close"),
        Answer(events=[data_event({"error": {"message": "Overloaded", "type": "overloaded_error"}}, "error")]),
    ],
    ids=["before its role", "after its role", "by a reset", "close", "gzip", "silent", "error 503", "overloaded"],
)
def test_a_stream_lost_before_its_first_word_is_asked_for_anew(server, lost, hurry):
    reconnects = []
    retry, waits = quick(
        on_retry=lambda *_: hurry.end(),
        on_reconnect=lambda attempt, latency: reconnects.append((attempt, latency)),
    )
    server.answer(error_answer(500), lost)
    with asking(server, retry=retry, timeout=HANG) as client:
        stream, came = client.stream("Go"), []
        for chunk in stream.chunks():
            came.append(chunk.text)
            if lost.stall_after and len(came) == 1:  # the role: from now on the server is silent
                hurry.begin()
        assert list(filter(None, came)) == WORDS, "exactly once"
    assert stream.continuity == "restarted"
    assert (stream.stats.attempts, stream.stats.reconnects, len(waits)) == (3, 1, 2)
    ((attempt, latency),) = reconnects
    assert attempt == 3
    assert latency >= 0
    assert stream.completion.complete
    assert stream.completion.usage is not None


def test_connecting_and_reconnecting_share_one_budget(server):
    server.answer(error_answer(500), Answer(cut_after=1), error_answer(500))
    server.default = Answer(cut_after=1)
    retry, waits = quick(4)
    _, error = asked(server, retry)
    assert type(error) is sheepsse.StreamInterrupted
    assert (len(server.requests), len(waits)) == (5, 4)


def test_what_a_lost_stream_said_of_itself_is_forgotten_with_it(server):
    lost = chat_events([], model="first-model", id="first-id", finish=None, done=False)
    server.answer(Answer(events=lost), Answer(events=chat_events(WORDS, model="second-model", id="second-id")))
    retry, _ = quick()
    with asking(server, retry=retry) as client:
        stream = client.stream("Go")
        assert list(stream) == WORDS
    assert (stream.model, stream.id) == ("second-model", "second-id")


@pytest.mark.parametrize(
    "given",
    [{"content": "a"}, {"reasoning_content": "a"}, {"refusal": "a"}, {"tool_calls": [{"index": 0, "id": "1"}]}],
    ids=lambda given: next(iter(given)),
)
def test_a_stream_lost_after_something_was_given_out_is_never_started_over(server, given):
    server.answer(Answer(events=chat_events([given], finish=None, done=False)))
    retry, waits = quick()
    with asking(server, retry=retry) as client:
        stream = client.stream("Go")
        chunks, error = read(stream.chunks())
    assert len(chunks) == 2
    assert type(error) is sheepsse.StreamInterrupted
    assert (len(server.requests), waits, stream.continuity) == (1, [], "single")


def test_a_word_of_another_choice_is_something_given_out_too(server):
    server.answer(Answer(events=[chunk_event(index=1, content="a")]))
    retry, _ = quick()
    with asking(server, retry=retry) as client:
        came, error = read(client.stream("Go", n=2))
    assert came == []
    assert type(error) is sheepsse.StreamInterrupted
    assert len(server.requests) == 1


def test_resume_never_does_not_ask_again_for_a_lost_stream(server):
    server.answer(Answer(cut_after=1))
    retry, waits = quick()
    _, error = asked(server, retry, resume="never")
    assert type(error) is sheepsse.StreamInterrupted
    assert (len(server.requests), waits) == (1, [])
    server.answer(error_answer(500))
    assert asked(server, retry, resume="never") == (WORDS, None)  # before the answer begins nothing is lost


@pytest.mark.parametrize(
    "error", [{"message": "No", "code": 400}, {"message": "No", "type": "invalid_request_error"}, {"code": "whatever"}]
)
def test_an_error_in_the_stream_that_no_retry_mends_is_raised(server, error):
    server.default = Answer(events=[data_event({"error": error})], content_type="text/event-stream")
    retry, waits = quick()
    _, raised = asked(server, retry)
    assert type(raised) is sheepsse.StreamError
    assert raised.retryable is False
    assert (len(server.requests), waits) == (1, [])


# stream_options

REFUSAL = error_answer(400, "Unrecognized request argument supplied: stream_options")


@pytest.mark.parametrize("refusal", [REFUSAL, error_answer(422, "stream_options: extra fields not permitted")])
def test_stream_options_that_are_refused_are_left_out_and_that_is_remembered(server, refusal):
    server.answer(refusal)
    with asking(server, retry=sheepsse.Retry(0, on_retry=lambda *_: pytest.fail("a retry"))) as client:
        stream = client.stream("Go")
        assert list(stream) == WORDS
        assert stream.stats.attempts == 2
        assert list(client.stream("Go")) == WORDS
    sent = [request.json for request in server.requests]
    options = sent[0].pop("stream_options")
    assert options == {"include_usage": True, "include_obfuscation": False}
    assert sent[0] == sent[1] == sent[2]
    with asking(server) as other:
        assert list(other.stream("Go")) == WORDS
    assert "stream_options" in server.requests[-1].json


def test_a_refusal_is_remembered_also_where_the_next_request_failed(server):
    server.answer(REFUSAL, error_answer(500))
    retry, _ = quick()
    with asking(server, retry=retry) as client:
        assert list(client.stream("Go")) == WORDS
        assert list(client.stream("Go")) == WORDS
    asked_for = ["stream_options" in request.json for request in server.requests]
    assert asked_for == [True, False, False, False]


def test_leaving_stream_options_out_takes_nothing_from_the_budget(server):
    server.answer(error_answer(500), REFUSAL, error_answer(500))
    retry, waits = quick(2)
    assert asked(server, retry) == (WORDS, None)
    assert len(server.requests) == 4
    assert len(waits) == 2


def test_a_400_that_does_not_name_them_keeps_stream_options(server, client):
    server.answer(error_answer(400, "temperature is too high"))
    assert type(read(client.stream("Go"))[1]) is sheepsse.InvalidRequestError
    assert len(server.requests) == 1
    assert list(client.stream("Go")) == WORDS
    assert "stream_options" in server.requests[-1].json


def test_a_400_that_names_them_again_is_raised_and_not_remembered_as_a_refusal(server, client):
    server.default = REFUSAL
    assert type(read(client.stream("Go"))[1]) is sheepsse.InvalidRequestError
    assert len(server.requests) == 2
    assert type(read(client.stream("Go"))[1]) is sheepsse.InvalidRequestError
    assert len(server.requests) == 4


def test_the_callers_own_stream_options_are_sent_as_they_are_and_never_left_out(server, client):
    server.default = REFUSAL
    mine = {"include_usage": False}
    assert type(read(client.stream("Go", stream_options=mine))[1]) is sheepsse.InvalidRequestError
    assert [request.json["stream_options"] for request in server.requests] == [mine]


# What is known of it


def test_what_is_known_before_during_and_after(server, client):
    server.answer(Answer(stall_after=2))
    stream = client.stream("Go", model="asked-for")
    assert (stream.text, stream.reasoning, stream.tool_calls, stream.finish_reason) == ("", "", (), None)
    assert (stream.usage, stream.cost, stream.id, stream.model) == (None, None, "", "asked-for")
    assert (stream.response, stream.continuity) == (None, "single")
    assert stream.completion == sheepsse.Completion()
    assert uuid.UUID(stream.request_id)
    assert next(stream) == stream.text == WORDS[0]
    assert (stream.id, stream.model, stream.finish_reason) == ("chatcmpl-local", "asked-for", None)
    assert stream.request_id == stream.response.headers["x-request-id"] == "req_local_1"
    assert stream.completion.complete is False
    server.release()
    assert [WORDS[0], *stream] == WORDS
    assert (stream.text, stream.finish_reason) == (TEXT, "stop")
    assert stream.usage == sheepsse.Usage(4, len(WORDS), 4 + len(WORDS))
    assert stream.completion == sheepsse.Completion(
        text=TEXT, finish_reason="stop", usage=stream.usage, model="asked-for", id="chatcmpl-local", complete=True
    )


def test_the_cost_is_what_the_provider_says(server, client):
    server.answer(Answer(events=chat_events(["a"], usage={"completion_tokens": 1, "cost": 0.25})))
    stream = client.stream("Go")
    list(stream)
    assert str(stream.cost) == "0.25"


def test_tool_calls_are_there_as_they_come_and_at_the_end(server, client):
    function = {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}
    stream = client.stream("How is it?", tools=[{"type": "function", "function": function}])
    assert list(stream) == []
    (call,) = stream.tool_calls
    assert (call.index, call.name, call.parsed) == (0, "weather", {"city": "Hà Nội"})
    assert stream.completion.tool_calls == stream.tool_calls
    assert stream.finish_reason == "tool_calls"


def test_the_request_id_is_our_own_where_the_provider_gives_none(server, client):
    server.answer(error_answer(500, headers={"x-request-id": None}))
    stream = client.stream("Go")
    _, error = read(stream)
    assert error.request_id == stream.request_id == server.requests[0].headers["X-Request-ID"]
    server.answer(Answer(headers={"x-request-id": None, "request-id": "theirs"}))
    stream = client.stream("Go")
    list(stream)
    assert stream.request_id == "theirs"


def test_a_request_id_of_the_callers_own_is_the_one_that_errors_name(server, client):
    server.answer(error_answer(500, headers={"x-request-id": None}))
    stream = client.stream("Go", headers={"X-Request-ID": "mine"})
    _, error = read(stream)
    assert server.requests[0].headers["X-Request-ID"] == "mine"
    assert error.request_id == "mine"


def test_an_error_has_its_response_and_request(server, client):
    server.answer(error_answer(400, "No such thing"))
    stream = client.stream("Go")
    _, error = read(stream)
    assert error.response is stream.response
    assert error.response.json()["error"]["message"] == "No such thing"
    assert error.response.status_code == error.status == 400
    assert error.request.url == f"{server.base_url}/chat/completions"
    server.answer(Answer(cut_after=2))
    _, error = read(client.stream("Go"))
    assert error.response.status_code == 200
    assert error.request.method == "POST"
    assert error.request_id == "req_local_2"


def test_stats_tell_how_it_went(server, client, clock):
    events = chat_events(["", "one", "two", "three"], usage={"completion_tokens": 3})
    pauses = iter([0, 1, 1, 1, 4, 1, 1, 1, 1])  # before the body of the error, and before each event

    def let_time_pass(seconds):
        clock.now += seconds

    def answer(request):
        let_time_pass(3)
        return Answer(events=events)

    server.answer(error_answer(503))
    server.default = answer
    server.sent_at = turns = InTurns(1 + len(events), lambda: let_time_pass(next(pauses)))
    turns.next()
    retry, _ = quick()
    came = []
    with client.stream("Go", retry=retry) as stream:
        turns.next()
        for chunk in stream.chunks():
            came.append(chunk.text)
            turns.next()
    stats = stream.stats
    assert ("".join(came), turns.in_vain) == ("onetwothree", False)
    assert stats.ttfb == 3
    assert stats.ttft == 6, "neither a role nor an empty text is the first word"
    assert stats.elapsed == 14
    assert stats.chunks == 7
    assert stats.chars == len("onetwothree")
    assert stats.longest_gap == 4
    assert stats.attempts == 2
    assert stats.reconnects == 0
    assert stats.cached is False
    assert stats.tokens_per_second == pytest.approx(3 / (stats.elapsed - stats.ttft))
    clock.now += 1
    assert stream.stats == stats, "the clock stands still after the end"


def test_a_chunk_is_not_a_token(server, client):
    server.answer(Answer(events=chat_events(WORDS)))
    stream = client.stream("Go")
    list(stream)
    assert stream.stats.chunks > 3
    assert stream.stats.tokens_per_second is None


def test_tokens_without_text_have_no_rate(server, client):
    server.answer(Answer(events=chat_events([], usage={"completion_tokens": 3})))
    stream = client.stream("Go")
    list(stream)
    assert stream.stats.ttft is None
    assert stream.stats.tokens_per_second is None


def test_an_answer_in_one_piece_has_no_rate(server, client):
    server.answer(Answer(body=json_completion("All at once", usage={"completion_tokens": 3}), content_type=JSON))
    stream = client.stream("Go")
    list(stream)
    assert stream.usage.output_tokens == 3
    assert stream.stats.tokens_per_second is None


def test_reasoning_counts_for_the_rate_of_tokens_too(server, client):
    usage = {"completion_tokens": 4}
    server.answer(Answer(events=chat_events([" a", " b"], reasoning=["x", "y"], usage=usage), pace=0.01))
    stream = client.stream("Go")
    list(stream)
    stats = stream.stats
    assert 4 / stats.elapsed < stats.tokens_per_second < 4 / (stats.elapsed - stats.ttft)


def test_the_consumers_time_is_no_gap_of_the_stream(server, client, clock):
    stream = client.stream("Go")
    for number, _ in enumerate(stream):
        if number == 2:
            clock.now += 10
    assert stream.stats.longest_gap == 0
    assert stream.stats.elapsed == 10


def test_only_the_text_of_choice_0_counts_as_text(server, client):
    events = [chunk_event(index=1, content="other"), chunk_event(content="mine"), data_event("[DONE]")]
    server.answer(Answer(events=events))
    stream = client.stream("Go", n=2)
    assert list(stream) == ["mine"]
    assert (stream.stats.chars, stream.stats.chunks) == (4, 2)


def test_the_clock_runs_while_the_stream_does(server, client, clock):
    server.answer(Answer(stall_after=3))
    stream = client.stream("Go")
    clock.now += 1
    assert stream.stats.elapsed == 0
    next(stream)
    before = stream.stats.elapsed
    clock.now += 5
    assert stream.stats.elapsed == before + 5
    stream.close()
    after = stream.stats
    clock.now += 5
    assert stream.stats == after


# Answers of other shapes


def test_a_server_that_ignores_stream_true_gives_one_piece(server, client):
    server.answer(Answer(body=json_completion("All at once", usage={"completion_tokens": 3}), content_type=JSON))
    stream = client.stream("Go")
    assert list(stream) == ["All at once"]
    assert stream.completion.complete
    assert stream.usage.output_tokens == 3


@pytest.mark.parametrize("framing", ["chunked", "length", "close", "gzip", "gzip-close"])
def test_a_json_answer_that_is_cut_is_an_interrupted_one(server, client, framing):
    body = json_completion(random_text(2000))
    server.answer(Answer(body=body, content_type=JSON, framing=framing, block=100, cut_at=600))
    came, error = read(client.stream("Go", resume="never"))
    assert came == []
    assert type(error) is sheepsse.StreamInterrupted
    assert error.retryable


def test_a_204_is_no_answer_and_is_asked_for_once(server):
    server.default = Answer(status=204)
    retry, waits = quick()
    _, error = asked(server, retry)
    assert type(error) is sheepsse.InvalidStreamError
    assert error.status == 204
    assert (len(server.requests), waits) == (1, [])


@pytest.mark.parametrize("body", [b"{}", b'{"ok": true}', b"[]", b'{"choices": []}'])
def test_other_json_is_no_answer(server, client, body):
    server.answer(Answer(body=body, content_type=JSON))
    came, error = read(client.stream("Go"))
    assert came == []
    assert type(error) is sheepsse.InvalidStreamError
    assert "base URL" in str(error)


def test_a_json_error_with_status_200_is_no_stream_and_keeps_the_servers_words(server, client):
    server.answer(Answer(body=error_body(400, "Bad model", code="bad"), content_type=JSON))
    _, error = read(client.stream("Go"))
    assert type(error) is sheepsse.InvalidStreamError
    assert "Bad model" in str(error)
    assert error.vendor_code == "bad"


def test_format_overrides_the_content_type(server, client):
    body = b"".join(chat_events(WORDS))
    server.answer(Answer(body=body, content_type="text/html"))
    assert list(client.stream("Go", format="sse")) == WORDS
    server.answer(Answer(body=body, content_type="text/html"))
    assert type(read(client.stream("Go"))[1]) is sheepsse.InvalidStreamError
    server.answer(Answer(body=json_completion("One"), content_type="text/plain"))
    assert list(client.stream("Go", format="json")) == ["One"]


def test_an_event_over_the_size_limit_is_an_error_and_the_limit_can_be_set(server, client):
    text = "x" * 5000
    server.default = Answer(events=chat_events(["before", text]))
    came, error = read(client.stream("Go", max_event_size=1000))
    assert came == ["before"]
    assert type(error) is sheepsse.InvalidStreamError
    assert "max_event_size" in str(error)
    assert list(client.stream("Go")) == ["before", text]


def test_a_url_of_the_server_is_in_messages_without_its_query(server):
    url = f"{server.base_url}?api_key=very-secret&v=1"
    assert urllib.parse.urlsplit(url).query
    server.answer(error_answer(404, ""))
    with asking(server, base_url=url) as client:
        _, error = read(client.stream("Go"))
    assert f"{server.base_url}/chat/completions" in str(error)
    assert "very-secret" not in str(error)


# Amid a block: many events that arrive together


def in_one_block(count=300, **options):
    """An answer in so many words, written in large blocks"""
    return Answer(events=[b"".join(chat_events(numbered_words(count)))], **options)


def numbered_words(count=300):
    return [f" w{number}" for number in range(count)]


def take(stream, count):
    return list(itertools.islice(stream, count))


def test_a_cancel_amid_a_block_ends_the_stream_with_what_was_returned(server, client):
    server.answer(in_one_block())
    stream = client.stream("Go", resume="never")
    came = take(stream, 200)
    stream.cancel()
    rest, error = read(stream)
    assert rest == []
    assert type(error) is sheepsse.StreamCancelled
    assert error.partial.text == stream.text == "".join(came)


def test_a_deadline_amid_a_block_ends_the_stream_with_what_was_returned(server, client, clock):
    server.answer(in_one_block())
    stream = client.stream("Go", resume="never", deadline=5)
    came = take(stream, 200)
    clock.now += 6  # what the caller does counts too
    rest, error = read(stream)
    assert rest == []
    assert type(error) is sheepsse.StreamTimeout
    assert error.partial.text == stream.text == "".join(came)


def test_closing_a_stream_amid_a_block_ends_it_quietly(server, client):
    server.answer(in_one_block())
    stream = client.stream("Go", resume="never")
    came = take(stream, 200)
    stream.close()
    assert list(stream) == []
    assert stream.text == "".join(came)
    assert stream.stats.chars == len(stream.text)


def test_text_received_before_the_connection_was_lost_is_returned_first(server, client):
    whole = in_one_block()
    server.answer(whole._replace(framing="length", cut_at=len(whole.events[0]) // 2))
    came, error = read(client.stream("Go", resume="never"))
    assert type(error) is sheepsse.StreamInterrupted
    assert came == numbered_words()[: len(came)]
    assert len(came) > 100
    assert error.partial.text == "".join(came)


def test_text_and_chunks_may_be_taken_in_turns(server, client):
    server.answer(in_one_block())
    stream = client.stream("Go", resume="never")
    came = []
    for number in range(250):
        came.append(next(stream) if number % 5 else next(stream.chunks()).text)
    came += [chunk.text for chunk in stream.chunks()]
    assert [text for text in came if text] == numbered_words()
    assert stream.text == "".join(numbered_words())


def test_text_seen_from_another_thread_only_grows(server, client):
    whole, seen = "".join(numbered_words(5000)), []
    server.answer(in_one_block(5000))
    stream = client.stream("Go")
    ended = threading.Event()

    def look():
        while not ended.is_set():
            text = stream.text
            seen.append(len(text) if whole.startswith(text) else -1)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with in_another_thread(look):
            try:
                assert "".join(stream) == whole
            finally:
                ended.set()
    finally:
        sys.setswitchinterval(interval)
    assert seen == sorted(seen)
    assert seen[0] >= 0


def test_usage_in_each_event_is_that_of_the_last_chunk_returned(server):
    def event(number):
        parts = [{"text": f" w{number}"}]
        usage = {"promptTokenCount": 9, "candidatesTokenCount": number, "totalTokenCount": number + 9}
        return data_event({"candidates": [{"content": {"parts": parts}, "index": 0}], "usageMetadata": usage})

    server.answer(Answer(events=[b"".join(map(event, range(1, 301)))]))
    with asking(server, dialect="gemini", base_url=server.origin) as client:
        stream = client.stream("Go", resume="never")
        take(stream, 200)
        assert stream.usage.output_tokens == stream.completion.usage.output_tokens == 200
        assert [usage.output_tokens for usage in stream.stats.usage_by_attempt] == [200]
        assert next(stream.chunks()).usage == stream.usage
        assert stream.usage.output_tokens == 201
        stream.cancel()
        _, error = read(stream)
        assert error.partial.usage.output_tokens == error.resume_point.tokens_received == 201


# What a Stream says of itself


def test_a_second_iteration_is_an_error_that_says_where_the_text_is(server, client):
    stream = client.stream("Go")
    assert next(stream)
    assert "".join(stream)  # what is left
    with pytest.raises(RuntimeError, match="this stream has been read: its text is stream.text"):
        list(stream)
    assert next(stream, None) is None
    assert list(stream.chunks()) == []
    assert stream.text == TEXT
    assert len(server.requests) == 1


def test_its_repr_says_what_to_do(server, client):
    stream = client.stream("Go", model="m-1")
    assert repr(stream) == "<Stream m-1: not started, iterate it>"
    next(stream)
    assert re.fullmatch(r"<Stream .+: \d+ characters, not at its end>", repr(stream))
    list(stream)
    assert repr(stream).endswith(f": {len(TEXT)} characters, read to its end>")


def test_in_asyncio_it_says_how_to_read_it(server, client):
    async def awaits():
        await client.stream("Go")

    async def iterates():
        async for _ in client.stream("Go"):
            pass

    for wrong in (awaits, iterates):
        with pytest.raises(TypeError, match="asyncio.to_thread"):
            asyncio.run(wrong())


def test_a_completion_is_its_text_and_knows_its_cost(server):
    prices = {"m": sheepsse.Price(1, 2)}
    with sheepsse.Client(base_url=server.base_url, api_key=False, prices=prices) as client:
        answer = client.complete("Go", model="m")
        stream = client.stream("Go", model="m")
        list(stream)
    assert str(answer) == answer.text == TEXT
    assert answer.cost == stream.cost == stream.completion.cost
    assert answer.cost > 0
