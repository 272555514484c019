"""Section 8, over real sockets: iter_sse, session's redirects, proxies, TLS, and the wire that limits and cancels"""

import contextlib
import itertools
import re
import select
import socket
import ssl
import threading
import time
from urllib.parse import urlsplit

import pytest
import requests
import trustme
import urllib3

import sheepsse
from conftest import HANG, PATIENT, in_another_thread, until
from local_provider import EVENT_STREAM, TEXT, Answer, LocalProvider, error_answer
from sheepsse import (
    ConnectError,
    InvalidRequestError,
    InvalidStreamError,
    Retry,
    ServerError,
    ServerSentEvent,
    StreamCancelled,
    StreamInterrupted,
    StreamTimeout,
)

#: seconds that no test waits for
FOREVER = 1_000_000
#: what tells an EventSource not to come back
END = Answer(status=204, body=b"")
KEY_HEADERS = ("Authorization", "x-api-key", "X-Api-Key", "Api-Key", "X-GOOG-API-KEY", "Proxy-Authorization", "Cookie")


def says(body, **fields):
    return Answer(body=body, content_type=EVENT_STREAM, framing=fields.pop("framing", "close"), **fields)


def read(url, **options):
    """All events until the source ends, and the waits between its connections"""
    waits = []
    policy = options.pop("retry", Retry(jitter=False)).new(sleep=waits.append)
    return list(sheepsse.iter_sse(url, retry=policy, **options)), waits


def failed(url, **options):
    """The events before the error that ends them, the error, and the waits"""
    waits, events = [], []
    policy = options.pop("retry", Retry(jitter=False)).new(sleep=waits.append)
    with pytest.raises(sheepsse.SheepError) as caught:
        for event in sheepsse.iter_sse(url, retry=policy, **options):
            events.append(event)
    return events, caught.value, waits


def data_of(events):
    return [event.data for event in events]


def ids_sent(server):
    """The Last-Event-ID of each request; http.server takes header bytes for latin-1"""
    sent = [request.headers.get("Last-Event-ID") for request in server.requests]
    return [None if value is None else value.encode("latin-1").decode("utf-8") for value in sent]


def closed_port():
    """A port on which nobody listens"""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


# iter_sse: what it gives and asks for


def test_events_come_as_an_event_source_gives_them(server):
    server.answer(says(b": hi\nevent: add\nid: 1\nretry: 50\ndata: a\ndata: b\n\ndata: c\n\n"), END)
    events, _ = read(server.origin)
    assert events == [ServerSentEvent("add", "a\nb", "1", 50), ServerSentEvent("message", "c", "1", None)]


def test_a_request_says_that_it_wants_events_and_no_cache(server):
    server.answer(END)
    assert read(server.origin, headers={"X-Own": "yes", "Cache-Control": "max-age=9"}) == ([], [])
    sent = server.requests[0].headers
    assert server.requests[0].method == "GET"
    assert (sent["Accept"], sent["X-Own"], sent["Cache-Control"]) == ("text/event-stream", "yes", "max-age=9")
    assert sent["Last-Event-ID"] is None
    server.answer(END)
    read(server.origin)
    assert server.requests[1].headers["Cache-Control"] == "no-cache"


def test_options_go_to_the_request(server):
    server.answer(END)
    read(server.origin, params={"q": "a b"}, auth=("user", "word"))
    assert server.requests[0].path == "/?q=a+b"
    assert server.requests[0].headers["Authorization"].startswith("Basic ")


def test_nothing_is_sent_before_the_first_event_is_asked_for(server):
    events = sheepsse.iter_sse(server.origin)
    assert server.requests == []
    events.close()
    assert server.connections == 0


def test_a_post_is_sent_again_with_its_body(server):
    server.answer(says(b"id: 1\ndata: a\n\n"), END)
    events, _ = read(server.origin, method="POST", json={"q": "x"})
    assert data_of(events) == ["a"]
    assert [(request.method, request.json) for request in server.requests] == [("POST", {"q": "x"})] * 2


@pytest.mark.parametrize("framing", ["chunked", "length", "close", "gzip", "gzip-close", "gzip-length", "one-chunk"])
def test_every_framing_of_the_body_gives_the_same_events(server, framing):
    server.answer(says("data: ä\n\ndata: 🐑\n\n".encode(), framing=framing, block=3), END)
    events, _ = read(server.origin)
    assert data_of(events) == ["ä", "🐑"]


def test_an_event_comes_before_the_next_is_sent(server):
    server.answer(says(b"data: a\n\ndata: b\n\n", framing="chunked", stall_after=1))
    with contextlib.closing(sheepsse.iter_sse(server.origin, reconnect=False)) as events:
        assert next(events).data == "a"
        server.release()
        assert next(events).data == "b"


# iter_sse: reconnecting


@pytest.mark.parametrize("id", ["7", "a b", "số 3", "羊-🐑", "ÿ", "\x7f:"])
def test_it_reconnects_with_the_last_id_as_utf_8(server, id):
    server.answer(says(f"id: {id}\ndata: a\n\n".encode()), says(b"data: b\n\n"), END)
    events, _ = read(server.origin)
    assert [(event.data, event.id) for event in events] == [("a", id), ("b", id)]
    assert ids_sent(server) == [None, id, id]


def test_an_id_given_is_sent_with_the_first_request(server):
    server.answer(says(b"data: a\n\n"), END)
    events, _ = read(server.origin, last_event_id="ñ-9")
    assert events[0].id == "ñ-9"
    assert ids_sent(server) == ["ñ-9", "ñ-9"]


def test_an_id_given_in_a_header_of_ones_own_is_replaced_by_the_servers(server):
    server.answer(says(b"id: 2\ndata: a\n\n"), END)
    read(server.origin, headers={"Last-Event-ID": "1"})
    assert ids_sent(server) == ["1", "2"]


def test_an_empty_id_ends_the_one_before(server):
    server.answer(says(b"id: 1\ndata: a\n\nid\ndata: b\n\n"), END)
    read(server.origin)
    assert ids_sent(server) == [None, None]


def test_an_id_counts_also_in_a_block_without_data(server):
    server.answer(says(b"id: 1\ndata: a\n\nid: 2\n\n"), END)
    read(server.origin)
    assert ids_sent(server) == [None, "2"]


def test_an_id_that_http_cannot_carry_does_not_end_the_stream(server):
    # requests refuses a header value that begins with a blank, which the value of an id may
    server.answer(says(b"id:  2\ndata: a\n\n"), END)
    events, _ = read(server.origin)
    assert data_of(events) == ["a"]


def test_an_event_that_was_not_ended_is_dropped_and_comes_once(server):
    server.answer(
        says(b"id: 1\ndata: a\n\nid: 2\ndata: b\n"),
        says(b'id: 2\ndata: b\n\nid: 3\ndata: {"whole": 1}\n'),
        says(b"id: 3\ndata: [DONE]"),
        END,
    )
    events, _ = read(server.origin)
    assert [(event.data, event.id) for event in events] == [("a", "1"), ("b", "2")]
    assert ids_sent(server) == [None, "1", "2", "2"]


def test_an_event_lost_in_the_middle_of_a_body_is_not_given_out_twice(server):
    body = b"id: 1\ndata: a\n\nid: 2\ndata: b\n\n"
    for framing in ("chunked", "length"):
        for cut in ("fin", "reset"):
            server.answer(says(body, framing=framing, cut=cut, cut_after=1), says(b"id: 2\ndata: b\n\n"), END)
            events, _ = read(server.origin)
            assert data_of(events) == ["a", "b"]


def test_it_waits_three_seconds_before_it_reconnects_or_as_long_as_the_server_says(server):
    server.answer(says(b"data: a\n\n"), says(b"retry: 20\n\ndata: b\n\n"), says(b"data: c\n\n"), END)
    events, waits = read(server.origin)
    assert data_of(events) == ["a", "b", "c"]
    assert waits == [3, 0.02, 0.02]


def test_a_retry_of_0_reconnects_at_once(server):
    server.answer(says(b"retry: 0\ndata: a\n\n"), says(b"data: b\n\n"), END)
    assert read(server.origin)[1] == [0, 0]


def test_a_retry_that_is_no_number_changes_nothing(server):
    server.answer(says(b"retry: 1.5\nretry: -1\nretry:\ndata: a\n\n"), END)
    assert read(server.origin)[1] == [3]


def test_it_really_waits(server, clock):
    server.answer(says(b"retry: 60\ndata: a\n\n"), END)
    assert data_of(sheepsse.iter_sse(server.origin)) == ["a"]
    assert clock.slept == [0.06]


def test_a_retry_of_ages_is_a_wait_that_the_system_takes(server, clock):
    # time.sleep raises OverflowError for what the server says
    server.answer(says(b"retry: 9999999999999999\ndata: a\n\n"), END)
    assert data_of(sheepsse.iter_sse(server.origin)) == ["a"]
    assert len(clock.slept) == 1
    assert 3600 <= clock.slept[0] <= threading.TIMEOUT_MAX


def test_a_204_ends_it(server):
    server.answer(says(b"data: a\n\n"), END)
    assert data_of(read(server.origin)[0]) == ["a"]
    assert len(server.requests) == 2


def test_one_connection_is_read_where_reconnecting_is_switched_off(server):
    server.default = says(b"data: a\n\ndata: b\n\n")
    events, waits = read(server.origin, reconnect=False)
    assert data_of(events) == ["a", "b"]
    assert waits == []
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (error_answer(503), ServerError),
        (says(b"data: a\n\ndata: b\n\n", framing="length", cut_after=1), StreamInterrupted),
        (Answer(drop=True), ConnectError),
    ],
    ids=["status", "cut", "dropped"],
)
def test_every_failure_is_final_where_reconnecting_is_switched_off(server, answer, kind):
    server.answer(answer)
    _, error, waits = failed(server.origin, reconnect=False)
    assert type(error) is kind
    assert waits == []
    assert len(server.requests) == 1


def test_it_gives_up_after_total_tries_in_a_row_without_an_event(server):
    server.default = says(b": nothing\n\n")
    told, given_up = [], []
    policy = Retry(
        2,
        jitter=False,
        on_retry=lambda error, attempt, delay: told.append((type(error), attempt, delay)),
        on_give_up=lambda error, attempt: given_up.append((type(error), attempt)),
    )
    events, error, waits = failed(server.origin, retry=policy)
    assert events == []
    assert type(error) is StreamInterrupted
    assert str(error) == f"{server.origin} gave no event before it closed"
    assert len(server.requests) == 3
    assert waits == [3, 3]
    assert told == [(StreamInterrupted, 1, 3), (StreamInterrupted, 2, 3)]
    assert given_up == [(StreamInterrupted, 3)]


def test_an_event_starts_the_count_of_tries_anew(server):
    silent, speaking = says(b"retry: 0\n\n"), says(b"data: a\n\n")
    server.answer(silent, silent, speaking, silent, silent, speaking, silent, silent, silent)
    events, error, waits = failed(server.origin, retry=Retry(2, base_delay=0))
    assert data_of(events) == ["a", "a"]
    assert type(error) is StreamInterrupted
    assert len(server.requests) == 9


def test_a_total_of_0_still_reconnects_after_events(server):
    server.answer(says(b"data: a\n\n"), says(b"data: b\n\n"), says(b""))
    events, error, waits = failed(server.origin, retry=Retry(0))
    assert data_of(events) == ["a", "b"]
    assert len(waits) == 2
    assert type(error) is StreamInterrupted


def test_waits_grow_while_nothing_comes_but_are_no_shorter_than_the_server_says(server):
    server.answer(says(b"retry: 700\n\n"))
    server.default = says(b"")
    _, _, waits = failed(server.origin, retry=Retry(4, jitter=False))
    assert waits == [0.7, 1, 2, 4]


@pytest.mark.parametrize(
    ("answer", "waits"),
    [
        (error_answer(503), [3]),
        (error_answer(503, retry_after=7), [7]),
        (error_answer(429), [5]),
        (error_answer(400, headers={"x-should-retry": "true"}), [3]),
        (Answer(drop=True), [3]),
        (Answer(drop=True, cut="reset"), [3]),
        (Answer(body=b"", content_type=EVENT_STREAM), [3]),
    ],
    ids=["503", "Retry-After", "429", "x-should-retry", "dropped", "reset", "empty"],
)
def test_a_failure_that_may_pass_is_tried_again_as_the_policy_says(server, answer, waits):
    server.answer(answer, says(b"data: a\n\n"), END)
    events, waited = read(server.origin)
    assert data_of(events) == ["a"]
    assert waited == [*waits, 3]


def test_a_wait_longer_than_allowed_is_an_error(server):
    server.default = error_answer(503, retry_after=500)
    _, error, waits = failed(server.origin)
    assert type(error) is ServerError
    assert error.retry_after == 500
    assert waits == []


def test_a_server_that_stays_down_is_given_up(server):
    server.default = error_answer(503, "Down for the night")
    _, error, waits = failed(server.origin, retry=Retry(3))
    assert type(error) is ServerError
    assert "Down for the night" in str(error)
    assert (len(server.requests), len(waits)) == (4, 3)


def test_silence_longer_than_the_read_time_out_is_a_lost_connection(server, hurry):
    waits, came = [], []
    server.answer(says(b"data: a\n\ndata: b\n\n", framing="chunked", stall_after=1), says(b"data: b\n\n"), END)
    policy = Retry(jitter=False, sleep=lambda seconds: (waits.append(seconds), hurry.end()))
    for event in sheepsse.iter_sse(server.origin, retry=policy, timeout=HANG):
        if not came:
            hurry.begin()
        came.append(event.data)
    assert came == ["a", "b"]
    assert waits == [3, 3]


@pytest.mark.parametrize("timeout", [0.1, (5, 0.1), (None, 0.1)])
def test_no_answer_within_the_read_time_out_is_a_time_out_that_is_tried_again(server, timeout):
    server.default = says(b"data: a\n\n", delay=FOREVER)
    _, error, waits = failed(server.origin, timeout=timeout, retry=Retry(1))
    assert type(error) is StreamTimeout
    assert str(error) == f"no answer from {server.origin} for the read time-out"
    assert len(waits) == 1


def test_there_may_be_no_time_out_at_all(server):
    server.answer(says(b"data: a\n\n"), END)
    assert data_of(read(server.origin, timeout=None)[0]) == ["a"]


# iter_sse: what is no event stream


@pytest.mark.parametrize("content_type", ["text/event-stream", "Text/Event-Stream ; charset=UTF-8; x=y"])
def test_the_content_type_may_have_capitals_and_parameters(server, content_type):
    server.answer(Answer(body=b"data: a\n\n", content_type=content_type), END)
    assert data_of(read(server.origin)[0]) == ["a"]


@pytest.mark.parametrize("content_type", ["text/plain", "application/json", "text/html", "text/event-streams", None])
def test_another_content_type_is_an_error_that_says_what_was_expected(server, content_type):
    headers = {"Content-Type": content_type}
    server.answer(Answer(body=b"data: a\n\n", headers=headers))
    events, error, waits = failed(server.origin)
    assert events == waits == []
    assert type(error) is InvalidStreamError
    assert str(error) == f"expected Content-Type text/event-stream from {server.origin}/, got {content_type or ''!r}"
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [201, 206, 400, 404, 410, 501])
def test_another_status_is_an_error_that_is_not_tried_again(server, status):
    server.answer(Answer(status=status, body=b"data: a\n\n", content_type=EVENT_STREAM))
    events, error, waits = failed(server.origin)
    assert events == waits == []
    assert error.status == status
    assert str(error).startswith(f"{status} from {server.origin}/: ")
    assert len(server.requests) == 1


def test_the_error_of_an_answer_has_the_servers_words(server):
    server.answer(error_answer(404, "No such feed", code=""))
    _, error, _ = failed(server.origin + "/feed?key=1")
    assert type(error) is InvalidRequestError
    assert "No such feed" in str(error)
    assert f"404 from {server.origin}/feed: " in str(error)


def test_an_event_over_the_size_limit_is_an_error_after_those_before_it(server):
    given_up = []
    policy = Retry(on_give_up=lambda error, attempt: given_up.append(attempt))
    server.default = says(b"data: a\n\ndata: " + b"x" * 100 + b"\n\n")
    events, error, waits = failed(server.origin, max_event_size=50, retry=policy)
    assert data_of(events) == ["a"]
    assert type(error) is InvalidStreamError
    assert waits == []
    assert len(given_up) == 1


def test_attempts_count_from_1_also_for_a_failure_after_events(server):
    given_up = []
    policy = Retry(on_give_up=lambda error, attempt: given_up.append(attempt))
    server.default = says(b"data: a\n\ndata: " + b"x" * 100 + b"\n\n")
    failed(server.origin, max_event_size=50, retry=policy)
    assert given_up == [1]


@pytest.mark.parametrize("own", [False, True], ids=["", "session of one's own"])
def test_an_error_body_that_trickles_for_ever_is_left_after_a_while(server, monkeypatch, own):
    monkeypatch.setattr(sheepsse, "_ERROR_BODY_TIME", 0.1)
    server.answer(Answer(status=404, events=itertools.repeat(b"x"), pace=0.01, framing="close"))
    with requests.Session() as session:
        _, error, _ = failed(server.origin, session=session if own else None, timeout=None)
    assert error.status == 404


def test_a_huge_error_body_is_read_in_part(server):
    drawn = []

    def blocks():
        for _ in range(1600):
            drawn.append(1)
            yield b"x" * 65536

    server.answer(Answer(status=500, events=blocks(), content_type="text/html"))
    _, error, _ = failed(server.origin, reconnect=False)
    assert type(error) is ServerError
    assert server.wait_closed(HANG)
    assert len(drawn) < 400


# iter_sse: letting go


@pytest.mark.parametrize("framing", ["chunked", "close", "gzip"])
def test_closing_the_generator_lets_go_of_the_connection(server, framing):
    server.answer(says(b"data: a\n\ndata: b\n\n", framing=framing, stall_after=1))
    events = sheepsse.iter_sse(server.origin)
    assert next(events).data == "a"
    assert server.open_connections == 1
    events.close()
    assert server.wait_closed(HANG)


def test_leaving_the_loop_lets_go_of_the_connection(server):
    server.answer(says(b"data: a\n\ndata: b\n\n", framing="chunked", stall_after=1))
    for _ in sheepsse.iter_sse(server.origin):
        break
    assert server.wait_closed(HANG)


def test_an_error_lets_go_of_the_connection(server):
    # with urllib3 2 an idle connection stays open for as long as somebody holds a response of its pool
    server.answer(error_answer(404))
    _, error, _ = failed(server.origin)
    assert server.wait_closed(HANG)
    assert error.status == 404


def test_an_exception_of_the_callers_own_passes_through(server):
    server.answer(says(b"data: a\n\n", framing="chunked", stall_after=1))
    with pytest.raises(ZeroDivisionError):
        for event in sheepsse.iter_sse(server.origin):
            len(event.data) / 0
    assert server.wait_closed(HANG)


class Noted(requests.Session):
    """A session that notes whether it was closed"""

    closed = False

    def close(self):
        self.closed = True
        super().close()


def test_a_session_of_ones_own_is_used_and_left_open(server):
    server.answer(says(b"data: a\n\n", framing="length"), END)
    with Noted() as session:
        session.headers["X-Own"] = "yes"
        assert data_of(read(server.origin, session=session)[0]) == ["a"]
        assert [request.headers["X-Own"] for request in server.requests] == ["yes", "yes"]
        assert not session.closed


def test_a_session_of_ones_own_is_left_open_by_an_error_too(server):
    server.answer(error_answer(404))
    with Noted() as session:
        failed(server.origin, session=session)
        assert not session.closed


def test_a_session_with_a_policy_may_be_used(server):
    server.answer(error_answer(503), says(b"data: a\n\n"), END)
    with sheepsse.session(Retry(2, base_delay=0)) as session:
        assert data_of(read(server.origin, session=session)[0]) == ["a"]
    assert len(server.requests) == 3


# Redirects


@contextlib.contextmanager
def by_session(url, headers):
    with sheepsse.session() as session:
        yield session.get(url, headers=headers)


@contextlib.contextmanager
def by_iter_sse(url, headers):
    yield list(sheepsse.iter_sse(url, headers=headers, reconnect=False))


WAYS = [by_session, by_iter_sse]


@pytest.fixture
def elsewhere():
    """A server of another origin"""
    with LocalProvider() as provider:
        yield provider


def moved(location, status=302):
    return Answer(status=status, headers={"Location": location}, body=b"")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("header", KEY_HEADERS)
@pytest.mark.parametrize("way", WAYS)
def test_a_redirect_to_another_origin_carries_no_key(server, elsewhere, way, header, status):
    server.answer(moved(elsewhere.origin + "/there", status))
    elsewhere.answer(says(b"data: a\n\n"))
    with way(server.origin, {header: "secret", "X-Kept": "kept"}):
        pass
    assert server.requests[0].headers[header] == "secret"
    assert elsewhere.requests[0].headers[header] is None
    assert elsewhere.requests[0].headers["X-Kept"] == "kept"
    assert "secret" not in str(elsewhere.requests[0].headers)


@pytest.mark.parametrize("header", ["cf-aig-authorization", "Helicone-Auth", "Subscription-Key", "X-Auth-Token"])
def test_a_redirect_to_another_origin_carries_no_key_of_a_gateway(server, elsewhere, header):
    server.answer(moved(elsewhere.origin))
    elsewhere.answer(says(b"data: a\n\n"))
    with by_session(server.origin, {header: "secret"}):
        pass
    assert elsewhere.requests[0].headers[header] is None


@pytest.mark.parametrize("header", ["Authorization", "X-API-Key", "api-key", "x-goog-api-key"])
@pytest.mark.parametrize("way", WAYS)
def test_a_redirect_within_the_origin_keeps_the_key(server, way, header):
    server.answer(moved("/there"), says(b"data: a\n\n"))
    with way(server.origin, {header: "secret"}):
        pass
    assert server.requests[1].path == "/there"
    assert server.requests[1].headers[header] == "secret"


@pytest.mark.parametrize("way", WAYS)
def test_a_key_does_not_come_back_on_the_way_back(server, elsewhere, way):
    server.answer(moved(elsewhere.origin), says(b"data: a\n\n"))
    elsewhere.answer(moved(server.origin + "/there"))
    with way(server.origin, {"x-api-key": "secret"}):
        pass
    assert [request.headers["x-api-key"] for request in server.requests] == ["secret", None]


def test_a_cookie_that_belongs_to_the_other_origin_is_sent_there(server, elsewhere):
    server.answer(moved(elsewhere.origin.replace("127.0.0.1", "localhost")))
    elsewhere.answer(Answer(body=b"{}"))
    with sheepsse.session() as session:
        session.cookies.set("seen", "yes", domain="localhost.local")
        session.get(server.origin)
    assert elsewhere.requests[0].headers["Cookie"] == "seen=yes"


def test_a_netrc_entry_of_the_other_host_counts_there(server, elsewhere, tmp_path, monkeypatch):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine localhost login user password word\n")
    monkeypatch.setenv("NETRC", str(netrc))
    server.answer(moved(elsewhere.origin.replace("127.0.0.1", "localhost")))
    elsewhere.answer(Answer(body=b"{}"))
    with sheepsse.session() as session:
        session.get(server.origin)
    assert elsewhere.requests[0].headers["Authorization"].startswith("Basic ")


def test_a_client_follows_no_redirect(server, elsewhere):
    server.answer(moved(elsewhere.base_url + "/chat/completions", 307))
    with sheepsse.Client(base_url=server.base_url, api_key="secret-key", model="m", retry=0) as client:
        with pytest.raises(InvalidRequestError, match="redirect"):
            client.complete("Good day?")
    assert elsewhere.requests == []


def test_redirects_without_end_are_a_wrong_request_and_not_tried_again(server):
    server.default = moved("/again")
    _, error, waits = failed(server.origin)
    assert type(error) is InvalidRequestError
    assert "redirects" in str(error)
    assert waits == []


def test_a_redirect_that_leads_nowhere_is_a_wrong_request(server):
    server.answer(moved("http://[broken/"))
    _, error, waits = failed(server.origin)
    assert type(error) is InvalidRequestError
    assert waits == []


def test_a_body_that_json_cannot_carry_is_a_wrong_request_and_not_tried_again(server):
    if not hasattr(requests.exceptions, "InvalidJSONError"):
        pytest.skip("needs requests 2.26")
    _, error, waits = failed(server.origin, method="POST", json={"n": float("nan")})
    assert type(error) is InvalidRequestError
    assert waits == []


# No connection


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def server_context(authority):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    return context


@pytest.fixture
def trusted(authority, tmp_path, monkeypatch):
    """Lets requests trust the authority"""
    bundle = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(bundle))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(bundle))


@pytest.fixture
def tls_server(server_context):
    with LocalProvider(ssl_context=server_context) as provider:
        yield provider


def asked(base_url, **options):
    """The error of a client's request, and the waits before it"""
    waits = []
    policy = Retry(2, sleep=waits.append)
    with sheepsse.Client(base_url=base_url, api_key=False, model="m", retry=policy, **options) as client:
        with pytest.raises(sheepsse.SheepError) as caught:
            client.complete("Good day?")
    return caught.value, waits


def test_a_certificate_that_does_not_verify_is_not_tried_again(tls_server):
    error, waits = asked(tls_server.base_url)
    assert type(error) is ConnectError
    assert error.retryable is False
    assert f"no connection to {tls_server.base_url}/chat/completions: " in str(error)
    assert "certificate verify failed" in str(error)
    assert waits == []
    assert tls_server.requests == []
    _, error, waits = failed(tls_server.origin)
    assert type(error) is ConnectError
    assert "certificate verify failed" in str(error)
    assert waits == []


def test_a_certificate_of_another_name_is_not_tried_again(authority, trusted):
    # urllib3 1.26 says "hostname ... doesn't match ...", and nothing of a certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("other.example").configure_cert(context)
    with LocalProvider(ssl_context=context) as server:
        error, waits = asked(server.base_url)
    assert type(error) is ConnectError
    assert waits == []


def test_a_session_does_not_try_a_certificate_again_that_does_not_verify(tls_server):
    waits = []
    with sheepsse.session(Retry(2, sleep=waits.append)) as session:
        with pytest.raises(requests.exceptions.SSLError):
            session.get(tls_server.origin)
    assert waits == []


def test_a_trusted_certificate_is_taken(tls_server, trusted):
    with sheepsse.Client(base_url=tls_server.base_url, api_key=False, model="m", retry=0) as client:
        assert client.complete("Good day?").text == TEXT
    tls_server.answer(says(b"data: a\n\n"), END)
    assert data_of(read(tls_server.origin)[0]) == ["a"]


def test_tls_where_none_is_spoken_is_a_connect_error_that_names_the_host(server):
    error, _ = asked(server.base_url.replace("http://", "https://"))
    assert type(error) is ConnectError
    assert f"no connection to https://127.0.0.1:{urlsplit(server.origin).port}/v1/chat/completions: " in str(error)


@pytest.mark.parametrize(
    ("base_url", "cause"),
    [("http://nothing.invalid", r"Errno -?\d+|not known|resol"), ("http://127.0.0.1:{port}", "Connection refused")],
    ids=["name", "port"],
)
def test_no_name_and_no_port_are_connect_errors_that_name_host_and_cause(base_url, cause):
    url = base_url.format(port=closed_port())
    error, waits = asked(url)
    assert type(error) is ConnectError
    assert isinstance(error, requests.ConnectionError)
    assert str(error).startswith(f"no connection to {url}/chat/completions: ")
    assert error.__cause__ is not None
    assert re.search(cause, str(error))
    assert "object at" not in str(error)
    assert "Max retries" not in str(error)
    assert len(str(error)) < 200
    assert len(waits) == 2
    _, error, waits = failed(url, retry=Retry(1))
    assert type(error) is ConnectError
    assert str(error).startswith(f"no connection to {url}: ")
    assert len(waits) == 1


def test_the_cause_that_is_named_is_that_of_this_connection_and_not_of_what_the_caller_handles():
    # the chain of an error goes on into what was being handled before
    url = f"http://127.0.0.1:{closed_port()}"
    try:
        raise ZeroDivisionError("the caller's own")
    except ZeroDivisionError:
        error, _ = asked(url)
        _, other, _ = failed(url, retry=Retry(0))
    assert "Connection refused" in str(error)
    assert "Connection refused" in str(other)


def test_the_cause_that_is_named_after_a_lost_stream_is_that_of_the_last_try(server):
    # the restart happens while the loss is being handled
    server.answer(Answer(cut_after=1))
    policy = Retry(1, sleep=lambda seconds: server.close())
    with sheepsse.Client(base_url=server.base_url, api_key=False, model="m", retry=policy) as client:
        with pytest.raises(ConnectError, match="Connection refused"):
            list(client.stream("Good day?"))


@pytest.mark.parametrize(
    "url",
    ["nonsense", "ftp://127.0.0.1/", "http://", "http://[::1", "//127.0.0.1/", "http://127.0.0.1:x/"],
)
def test_a_url_that_cannot_be_asked_is_a_wrong_request_and_not_tried_again(url):
    _, error, waits = failed(url)
    assert type(error) is InvalidRequestError
    assert "cannot be sent" in str(error)
    assert waits == []


@pytest.mark.parametrize("value", ["a\nb", "ключ", " a"])
def test_a_header_that_cannot_be_sent_is_a_wrong_request_and_not_tried_again(server, value):
    _, error, waits = failed(server.origin, headers={"X-Own": value})
    assert type(error) is InvalidRequestError
    assert f"the request to {server.origin} cannot be sent: " in str(error)
    assert waits == []


def test_a_header_that_ends_in_a_newline_is_a_wrong_request_and_not_tried_again(server):
    # requests lets it pass, and http.client raises a ValueError
    _, error, waits = failed(server.origin, headers={"X-Own": "a\n"})
    assert type(error) is InvalidRequestError
    assert waits == []


def test_a_refused_connection_is_tried_again_whatever_its_address_says():
    url = f"http://127.0.0.1:{closed_port()}/certificate"
    error, waits = asked(url)
    assert type(error) is ConnectError
    assert len(waits) == 2
    _, _, waits = failed(url, retry=Retry(1))
    assert len(waits) == 1


class Odd(requests.Session):
    """A session from which an error of urllib3 comes as it is"""

    def request(self, *args, **options):
        raise urllib3.exceptions.HTTPError("odd")


def test_an_error_of_urllib3_that_comes_as_it_is_is_a_connect_error():
    with Odd() as session:
        error, waits = asked("http://127.0.0.1:1/v1", session=session)
        assert type(error) is ConnectError
        assert "odd" in str(error)
        _, error, waits = failed("http://127.0.0.1:1/", session=session, retry=Retry(0))
        assert type(error) is ConnectError


def test_a_connection_that_takes_too_long_is_a_connect_error():
    with socket.socket() as sock:  # one that listens, but whose queue is full
        sock.bind(("127.0.0.1", 0))
        sock.listen(0)
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(sock.getsockname())
            url = f"http://127.0.0.1:{sock.getsockname()[1]}"
            error, _ = asked(url, **{**PATIENT, "timeout": (0.1, None)})
    assert type(error) is ConnectError
    assert "no connection to " in str(error)


# Proxies


class Proxy:
    """A forward proxy on loopback: whole URLs for http, CONNECT for https"""

    def __init__(self, ssl_context=None):
        self._ssl_context = ssl_context
        #: the first lines of the requests
        self.lines = []
        self._sockets = []
        self._threads = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        scheme = "https" if ssl_context else "http"
        self.url = f"{scheme}://127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)

    def close(self):
        for sock in [self._listener, *self._sockets]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in [self._listener, *self._sockets]:
            sock.close()

    def _start(self, target, *arguments):
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                self._start(self._serve, self._listener.accept()[0])

    def _serve(self, client):
        try:
            if self._ssl_context:
                client = self._ssl_context.wrap_socket(client, server_side=True)
            self._sockets.append(client)
            self._forward(client)
        except OSError:
            client.close()

    def _forward(self, client):
        head = b""
        while b"\r\n\r\n" not in head:
            head += client.recv(65536) or b"\r\n\r\n"
        line, _, rest = head.partition(b"\r\n")
        method, target, version = line.split(b" ")
        self.lines.append(line.decode())
        parts = urlsplit(b"//" + target if method == b"CONNECT" else target)
        upstream = socket.create_connection((parts.hostname.decode(), parts.port))
        self._sockets.append(upstream)
        if method == b"CONNECT":
            client.sendall(b"HTTP/1.1 200 Connection established\r\nX-Proxy: yes\r\n\r\n")
        else:
            upstream.sendall(b" ".join([method, parts.path, version]) + b"\r\n" + rest)
        self._relay(client, upstream)

    def _relay(self, one, other):
        while True:
            pending = [sock for sock in (one,) if isinstance(sock, ssl.SSLSocket) and sock.pending()]
            for sock in pending or select.select([one, other], [], [])[0]:
                data = sock.recv(65536)
                if not data:
                    for end in (one, other):
                        with contextlib.suppress(OSError):
                            socket.socket.shutdown(end, socket.SHUT_RDWR)
                    return
                (other if sock is one else one).sendall(data)


@pytest.fixture(params=["http", "https", "https by TLS"])
def route(request, server, tls_server, server_context, trusted, monkeypatch):
    """A server, and the proxy in the environment that leads to it"""
    proxy = Proxy(server_context if "TLS" in request.param else None)
    monkeypatch.setenv("HTTP_PROXY" if request.param == "http" else "HTTPS_PROXY", proxy.url)
    monkeypatch.setenv("http_proxy" if request.param == "http" else "https_proxy", proxy.url)
    yield (server if request.param == "http" else tls_server), proxy
    proxy.close()


def by_this_proxy(proxy, server):
    """Whether all that the proxy was asked for is this server, as its scheme has it"""
    plain, host = server.origin.startswith("http:"), urlsplit(server.origin).netloc
    start = f"POST {server.origin}/" if plain else f"CONNECT {host} "
    return [line for line in proxy.lines if line.startswith(start)] == proxy.lines != []


def test_a_stream_goes_through_the_proxy_of_the_environment(route):
    server, proxy = route
    with sheepsse.Client(base_url=server.base_url, api_key=False, model="m", retry=0) as client:
        for _ in range(2):
            assert "".join(client.stream("Good day?")) == TEXT
    assert by_this_proxy(proxy, server)
    assert server.connections == 1
    assert server.wait_closed(HANG)


def cancelled(server, answer, ready):
    """What had come of an answer without an end when another thread cancelled it, once it was ready"""
    server.answer(answer)
    with sheepsse.Client(base_url=server.base_url, api_key=False, model="m", retry=0, **PATIENT) as client:
        stream = client.stream("Good day?")

        def cancel():
            until(lambda: ready(stream))
            time.sleep(0.02)  # the reader goes back to waiting
            stream.cancel()

        with in_another_thread(cancel), pytest.raises(StreamCancelled) as caught:
            for _ in stream:
                pass
    assert server.wait_closed(HANG)
    return caught.value.partial.text


def test_cancel_ends_a_wait_for_headers_behind_a_proxy(route):
    server, _ = route
    assert cancelled(server, Answer(delay=FOREVER), lambda stream: server.requests) == ""


@pytest.mark.parametrize("framing", ["chunked", "close", "gzip"])
def test_cancel_ends_a_wait_for_bytes_behind_a_proxy(route, framing):
    server, _ = route
    answer = Answer(text="So far and on", stall_after=3, framing=framing)
    assert cancelled(server, answer, lambda stream: stream.text == "So far") == "So far"


def test_iter_sse_goes_through_the_proxy_of_the_environment(route):
    server, proxy = route
    server.answer(says(b"data: a\n\n"), END)
    assert data_of(read(server.origin)[0]) == ["a"]
    assert len(proxy.lines) == 2


def test_a_proxy_that_is_not_there_is_a_connect_error(server, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{closed_port()}")
    error, waits = asked(server.base_url)
    assert type(error) is ConnectError
    assert "Connection refused" in str(error)
    assert len(waits) == 2
    assert server.requests == []


def test_a_client_looks_at_the_environment_as_it_is_at_each_request(server, monkeypatch):
    with sheepsse.Client(base_url=server.base_url, api_key=False, model="m", retry=0) as client:
        assert "".join(client.stream("Good day?")) == TEXT
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{closed_port()}")
        with pytest.raises(ConnectError):
            "".join(client.stream("Good day?"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert "".join(client.stream("Good day?")) == TEXT


def test_a_body_of_known_length_gives_its_connection_back_with_its_last_byte(server):
    server.default = Answer(text="Good day to you.", framing="length", block=1 << 20)
    with sheepsse.Client(base_url=server.base_url, api_key=False, model="m", retry=0) as client:
        for _ in range(3):
            with client.stream("Good day?") as stream:
                assert "Good day to you.".startswith(next(stream))
        assert "".join(client.stream("Good day?")) == "Good day to you."
    assert server.connections == 1


def test_a_body_that_is_not_all_there_does_not_give_its_connection_back(server):
    server.default = Answer(framing="length", stall_after=3)
    with sheepsse.Client(base_url=server.base_url, api_key=False, model="m", retry=0) as client:
        for _ in range(3):
            with client.stream("Good day?") as stream:
                assert TEXT.startswith(next(stream))
    assert server.connections == 3


def test_a_socks_proxy_keeps_the_pools_of_its_own(monkeypatch):
    manager = urllib3.PoolManager()
    own = manager.pool_classes_by_scheme
    adapter = sheepsse._WireAdapter()
    adapter.proxy_manager["socks5://127.0.0.1:1"] = manager
    assert adapter.proxy_manager_for("socks5://127.0.0.1:1").pool_classes_by_scheme is own
    adapter.proxy_manager["http://127.0.0.1:1"] = manager
    assert adapter.proxy_manager_for("http://127.0.0.1:1").pool_classes_by_scheme is not own
    adapter.close()


# The adapter


def test_closing_the_adapter_closes_idle_connections_while_a_response_still_refers_to_them(server):
    with sheepsse.Client(base_url=server.base_url, api_key=False, model="m", retry=0) as client:
        stream = client.stream("Good day?")
        assert "".join(stream) == TEXT
        assert server.open_connections == 1
    assert stream.response is not None
    assert server.wait_closed(HANG)


def test_closing_the_adapter_closes_the_connections_to_proxies_too(route):
    server, _ = route
    with sheepsse.Client(base_url=server.base_url, api_key=False, model="m", retry=0) as client:
        stream = client.stream("Good day?")
        assert "".join(stream) == TEXT
    assert stream.response is not None
    assert server.wait_closed(HANG)


def test_a_pool_that_goes_while_the_adapter_closes_does_no_harm():
    adapter = sheepsse._WireAdapter()
    pools = adapter.poolmanager.pools
    pools["gone"] = None
    pools.dispose_func = None  # urllib3's own, which closes what is thrown out
    adapter.close()
    assert len(pools) == 0


# The wire


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_a_wire_without_limits_has_no_time_left_to_keep():
    assert sheepsse._Wire().seconds_left() is None
    sheepsse._Wire().check()


def test_the_nearest_limit_counts(clock):
    wire = sheepsse._Wire(read_timeout=5, deadline=60)
    assert wire.seconds_left() == 5
    wire.expect(2, "no word")
    assert wire.seconds_left() == 2
    wire.expect(None, "")
    assert wire.seconds_left() == 5
    clock.now += 59
    assert wire.seconds_left() == 1


def test_a_limit_that_has_passed_is_no_wait_without_end(pair):
    wire = sheepsse._Wire()
    wire.expect(-1, "no word")
    assert 0 < wire.seconds_left() < 0.01
    with pytest.raises(socket.timeout, match="no word"):
        wire.before_recv(pair[0])


def test_the_deadline_is_named_before_what_was_due():
    wire = sheepsse._Wire(deadline=-1)
    wire.expect(-1, "no word")
    assert wire.overdue() == "the deadline of the call has passed"
    wire.deadline = None
    assert wire.overdue() == "no word"
    wire.expect(1, "no word")
    assert wire.overdue() == ""


def test_each_recv_gets_the_time_that_is_left(pair):
    wire = sheepsse._Wire(read_timeout=3)
    wire.before_recv(pair[0])
    assert pair[0].gettimeout() == 3


def test_ending_a_wire_ends_the_recv_on_its_socket(pair):
    wire = sheepsse._Wire()
    wire.attach(pair[0])
    timer = threading.Timer(0.05, wire.end, ["cancelled"])
    timer.start()
    assert pair[0].recv(1) == b""
    timer.join()
    with pytest.raises(ConnectionAbortedError, match="cancelled"):
        wire.check()


def test_a_wire_that_was_ended_takes_no_further_socket(pair):
    wire = sheepsse._Wire()
    wire.end("cancelled")
    with pytest.raises(ConnectionAbortedError):
        wire.attach(pair[0])


def test_the_first_reason_to_end_a_wire_stays():
    wire = sheepsse._Wire()
    wire.end("closed")
    wire.end("cancelled")
    assert wire.ended == "closed"


def test_a_socket_that_was_given_back_is_left_alone(pair):
    wire = sheepsse._Wire()
    wire.attach(pair[0])
    wire.detach(pair[0])
    wire.end("cancelled")
    pair[1].sendall(b"still there")
    assert pair[0].recv(99) == b"still there"


def test_the_return_of_another_socket_leaves_the_one_in_use(pair):
    wire = sheepsse._Wire()
    wire.attach(pair[0])
    wire.detach(pair[1])
    wire.end("cancelled")
    assert pair[0].recv(1) == b""


def test_ending_a_wire_whose_socket_is_closed_already_is_quiet(pair):
    wire = sheepsse._Wire()
    wire.attach(pair[0])
    pair[0].close()
    wire.end("closed")


def test_a_socket_inside_another_object_is_found(pair):
    class Wrapped:
        socket = pair[0]

    wire = sheepsse._Wire()
    wire.attach(Wrapped())
    wire.end("cancelled")
    assert pair[1].recv(1) == b""


def test_what_reads_for_a_wire_may_be_closed_again(pair):
    wire = sheepsse._Wire()
    reader = sheepsse._WireReader(pair[0], pair[0].makefile("rb", buffering=0), wire)
    wire.attach(pair[0])
    reader.close()
    reader.close()
    wire.end("cancelled")
    pair[1].sendall(b"still there")
    assert pair[0].recv(99) == b"still there"


def test_a_pause_lasts_as_long_as_asked_or_until_the_wire_is_ended(monkeypatch):
    wire, waits = sheepsse._Wire(), []
    with monkeypatch.context() as patched:
        patched.setattr(wire.wake, "wait", waits.append)
        wire.pause(5)
    assert waits == [5]
    wire.pause(0.01)
    timer = threading.Timer(0.05, wire.end, ["cancelled"])
    timer.start()
    wire.pause(FOREVER)
    timer.join()
    wire.pause(FOREVER)  # ended already


def test_a_cancel_after_the_end_does_no_harm_to_the_next_on_the_same_connection(server):
    with sheepsse.Client(base_url=server.base_url, api_key=False, model="m", retry=0) as client:
        first = client.stream("Good day?")
        assert "".join(first) == TEXT
        server.answer(Answer(text="Still here, all of it", stall_after=2))
        second = client.stream("And?")
        pieces = [next(second)]
        first.cancel()
        server.release()
        pieces.extend(second)
    assert "".join(pieces) == "Still here, all of it"
    assert server.connections == 1


def test_a_connection_of_a_client_is_an_ordinary_one_where_no_wire_waits(server):
    with requests.Session() as session:
        session.mount("http://", sheepsse._WireAdapter())
        assert session.get(server.base_url + "/models").json()["data"]


def test_a_deadline_holds_against_headers_that_trickle(server):
    server.answer(Answer(header_pace=0.1))
    with sheepsse.Client(base_url=server.base_url, api_key=False, model="m", retry=0, **PATIENT) as client:
        with pytest.raises(StreamTimeout, match="deadline"):
            client.complete("Good day?", deadline=0.1)


def test_a_call_that_was_cancelled_before_it_began_sends_nothing(server, client):
    stream = client.stream("Good day?")
    stream.cancel()
    with pytest.raises(StreamCancelled):
        next(stream)
    assert server.requests == []


# Bodies of others


class Foreign:
    """A response of a library that is shaped like requests"""

    raw = None

    def __init__(self, body):
        self.body = body
        self.asked = []

    def iter_content(self, size):
        self.asked.append(size)
        return (self.body[start : start + size] for start in range(0, len(self.body), size))


def test_the_body_of_another_librarys_response_is_read_a_byte_at_a_time():
    response = Foreign(b"data: a\n\n")
    assert list(sheepsse.iter_bytes(response)) == [b"%c" % byte for byte in b"data: a\n\n"]
    assert response.asked == [1]


def test_a_body_that_requests_has_read_already_is_read_again(server):
    server.answer(says(b"data: a\n\ndata: b\n\n"))
    with requests.get(server.origin) as response:
        assert data_of(sheepsse.iter_events(response)) == ["a", "b"]
        assert data_of(sheepsse.iter_events(response)) == ["a", "b"]


@pytest.mark.parametrize("connection", ["keep-alive", "close"])
@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
def test_the_socket_under_a_response_is_found(server, connection, framing):
    server.answer(says(b"data: a\n\n", framing=framing, connection=connection, stall_after=0))
    with requests.get(server.origin, stream=True) as response:
        sock = sheepsse._socket_of(response)
        assert isinstance(sock, socket.socket)
        assert sock.getpeername()[1] == urlsplit(server.origin).port


def test_a_response_without_a_socket_is_no_error():
    assert sheepsse._socket_of(Foreign(b"")) is None


@pytest.mark.parametrize("connection", ["keep-alive", "close"])
@pytest.mark.parametrize("framing", ["chunked", "length", "close", "gzip", "gzip-length", "gzip-close", "one-chunk"])
def test_a_body_of_any_framing_comes_whole_and_lets_its_connection_go(server, framing, connection):
    body = bytes(range(256)) * 999
    server.answer(Answer(body=body, content_type="x/y", framing=framing, connection=connection, block=5000))
    with requests.Session() as session:
        response = session.get(server.origin, stream=True)
        assert b"".join(sheepsse.iter_bytes(response)) == body
        assert list(sheepsse.iter_bytes(response)) == []
        session.get(server.base_url + "/models")
    kept = connection == "keep-alive" and not framing.endswith("close")
    assert server.connections == (1 if kept else 2)


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
def test_an_answer_without_a_body_has_none(server, method, status):
    server.answer(Answer(status=status, body=b"" if status != 200 else b"some", framing="length"))
    with requests.Session() as session:
        response = session.request(method, server.origin, stream=True)
        assert list(sheepsse.iter_bytes(response)) == []


def test_a_body_after_its_response_was_closed_is_over(server):
    server.answer(says(b"data: a\n\ndata: b\n\n", framing="length", stall_after=1))
    response = requests.get(server.origin, stream=True)
    blocks = sheepsse.iter_bytes(response)
    assert next(blocks) == b"data: a\n\n"
    response.close()
    with contextlib.suppress(StreamInterrupted):  # which the newer urllib3 versions make of it
        assert list(blocks) == []


def test_what_came_before_a_cut_is_given_out_before_the_error(server):
    server.answer(says(b"data: a\n\ndata: b\n\n", framing="length", cut_after=1))
    with requests.get(server.origin, stream=True) as response:
        blocks = sheepsse.iter_bytes(response)
        assert next(blocks) == b"data: a\n\n"
        with pytest.raises(StreamInterrupted):
            next(blocks)


def test_a_wire_that_was_ended_between_two_blocks_ends_the_body_of_a_session_of_ones_own(server):
    server.answer(says(b"data: a\n\ndata: b\n\n", framing="chunked", stall_after=1))
    wire = sheepsse._Wire()
    with requests.get(server.origin, stream=True) as response:
        blocks = sheepsse._limited_blocks(response, wire)
        assert next(blocks) == b"data: a\n\n"
        wire.end("cancelled")
        with pytest.raises(StreamInterrupted):
            next(blocks)


def test_a_session_accepts_an_event_stream_unless_a_request_says_otherwise(server):
    with sheepsse.session() as session:
        session.get(server.base_url + "/models")
        session.get(server.base_url + "/models", headers={"Accept": "application/json"})
    accepted = [request.headers.get_all("Accept") for request in server.requests]
    assert accepted == [["text/event-stream"], ["application/json"]]
