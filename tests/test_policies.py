"""Section 7: when a request is sent again and after how long, as a value, through session() and by a Client"""

import email.utils
import random
import socket
import ssl
import time

import pytest
import requests
import responses
import trustme
import urllib3
from hypothesis import example, given
from hypothesis import strategies as st

import sheepsse
from local_provider import TEXT, Answer, LocalProvider, error_answer
from sheepsse import (
    AuthenticationError,
    ConnectError,
    InvalidRequestError,
    ModelNotFoundError,
    QuotaError,
    RateLimitError,
    Retry,
    ServerError,
    StreamCancelled,
    StreamTimeout,
)

BUSY = ServerError("busy", status=503)
TOO_FAST = RateLimitError("too fast", status=429)
LOST = ConnectError("no connection")


def still(**options):
    """A policy whose waits can be foreseen"""
    return Retry(**{"jitter": False, **options})


def closed_port():
    """A port on which nobody listens"""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


# A value


def test_it_is_a_retry_of_urllib3_that_requests_takes_as_it_is():
    policy = Retry(3)
    assert isinstance(policy, urllib3.util.Retry)
    assert requests.adapters.HTTPAdapter(max_retries=policy).max_retries is policy


def test_the_defaults_are_those_that_are_documented():
    policy = Retry()
    shown = {name: getattr(policy, name) for name in ("total", "base_delay", "multiplier", "max_delay", "jitter")}
    assert shown == {"total": 5, "base_delay": 0.5, "multiplier": 2, "max_delay": 30, "jitter": True}
    assert (policy.rate_limit_delay, policy.max_retry_after) == (5, 120)
    assert policy.statuses == sheepsse.RETRYABLE_STATUS


OPTIONS = {
    "total": 7,
    "base_delay": 0.25,
    "multiplier": 3,
    "max_delay": 11,
    "jitter": False,
    "rate_limit_delay": 2,
    "max_retry_after": 60,
    "statuses": frozenset({503}),
    "should_retry": lambda error, attempt: True,
    "on_retry": lambda error, attempt, delay: None,
    "on_reconnect": lambda attempt, latency: None,
    "on_give_up": lambda error, attempt: None,
}


def sleeper(seconds):
    """Sleeps not at all"""


def test_new_gives_another_policy_that_differs_in_what_was_named_only():
    policy = Retry(**OPTIONS, sleep=sleeper)
    for name, value in {**OPTIONS, "total": 9, "base_delay": 9, "max_delay": 9, "jitter": True}.items():
        other = policy.new(**{name: value})
        assert type(other) is Retry
        assert other is not policy
        assert {key: getattr(other, key) for key in OPTIONS} == {**OPTIONS, name: value}
        assert other.sleep_function is sleeper
    assert {key: getattr(policy, key) for key in OPTIONS} == OPTIONS


def test_a_subclass_stays_one_in_its_successors():
    class Patient(Retry):
        pass

    assert type(Patient(2).new(total=1)) is Patient
    assert type(Patient(2).increment(error=OSError())) is Patient


def test_increment_gives_a_successor_and_leaves_the_policy_as_it_was():
    policy = still(total=2)
    first = policy.increment("POST", "/a", error=OSError("gone"))
    second = first.increment("POST", "/a", error=OSError("gone"))
    assert (policy.total, policy.history, policy.delay) == (2, (), 0.0)
    assert (first.total, len(first.history), first.delay) == (1, 1, 0.5)
    assert (second.total, len(second.history), second.delay) == (0, 2, 1.0)
    assert second.history[0].method == "POST"
    assert second.history[0].url == "/a"
    assert str(second.history[0].error) == "gone"
    with pytest.raises(urllib3.exceptions.MaxRetryError) as caught:
        second.increment("POST", "/a", error=OSError("gone"))
    assert str(caught.value.reason) == "gone"


def test_increment_notes_the_status_it_was_given():
    failed = urllib3.HTTPResponse(status=503, headers={})
    assert still().increment("GET", "/", response=failed).history[0].status == 503
    with pytest.raises(urllib3.exceptions.MaxRetryError, match="404 is not tried again"):
        still().increment("GET", "/", response=urllib3.HTTPResponse(status=404, headers={}))


@pytest.mark.parametrize(
    "name", ["total", "base_delay", "multiplier", "max_delay", "rate_limit_delay", "max_retry_after"]
)
def test_negative_numbers_are_refused(name):
    with pytest.raises(ValueError, match="no negative numbers"):
        Retry(**{name: -1})


@pytest.mark.parametrize("name", ["base_delay", "multiplier", "max_delay", "rate_limit_delay", "max_retry_after"])
def test_every_number_may_be_0(name):
    assert getattr(Retry(**{name: 0}), name) == 0


def test_a_client_takes_a_number_of_retries_and_nothing_that_is_neither():
    with sheepsse.Client(base_url="http://127.0.0.1:1", api_key=False, retry=2):
        pass
    with pytest.raises(TypeError, match=r"sheepsse\.Retry or a number of retries, got Retry"):
        sheepsse.Client(base_url="http://127.0.0.1:1", api_key=False, retry=urllib3.util.Retry(2))


@pytest.mark.parametrize(("given", "total"), [(3, 3), (0, 0), (None, 5)])
def test_a_number_of_retries_makes_a_policy_where_urllib3_wants_one(given, total):
    policy = Retry.from_int(given)
    assert type(policy) is Retry
    assert policy.total == total


def test_a_policy_is_taken_as_it_is_where_urllib3_wants_one():
    policy, plain = Retry(3), urllib3.util.Retry(1)
    assert Retry.from_int(policy, redirect=False) is policy
    assert Retry.from_int(None, default=policy) is policy
    assert Retry.from_int(plain) is plain


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_pool_manager_of_urllib3_follows_redirects_with_it(server, status):
    server.answer(Answer(status=status, headers={"Location": "/there"}, body=b""), Answer(body=b"{}"))
    with urllib3.PoolManager() as manager:
        assert manager.request("GET", server.origin, retries=Retry(2)).status == 200
    assert server.requests[1].path == "/there"


def test_a_pool_manager_of_urllib3_retries_with_it(server):
    server.answer(error_answer(503), error_answer(503), Answer(body=b"{}"))
    waits = []
    with urllib3.PoolManager() as manager:
        assert manager.request("POST", server.origin, retries=still(sleep=waits.append)).status == 200
    assert waits == [0.5, 1]


# How long


def test_the_wait_doubles_up_to_the_longest():
    policy = still(total=10)
    assert [policy.wait(BUSY, attempt) for attempt in range(1, 9)] == [0.5, 1, 2, 4, 8, 16, 30, 30]


@pytest.mark.parametrize(
    ("options", "waits"),
    [
        ({"base_delay": 2}, [2, 4, 8]),
        ({"multiplier": 1}, [0.5, 0.5, 0.5]),
        ({"multiplier": 0}, [0.5, 0, 0]),
        ({"base_delay": 0}, [0, 0, 0]),
        ({"max_delay": 0.75}, [0.5, 0.75, 0.75]),
        ({"max_delay": 0}, [0, 0, 0]),
        ({"base_delay": 1, "multiplier": 10, "max_delay": 50}, [1, 10, 50]),
    ],
)
def test_base_delay_multiplier_and_max_delay_shape_the_wait(options, waits):
    assert [still(**options).wait(BUSY, attempt) for attempt in (1, 2, 3)] == waits


def test_jitter_takes_half_of_the_wait_at_most_and_never_adds():
    random.seed(7)
    policy = Retry(total=20)
    for attempt, whole in ((1, 0.5), (2, 1), (7, 30), (19, 30)):
        waits = [policy.wait(BUSY, attempt) for _ in range(300)]
        assert whole / 2 <= min(waits) < whole * 0.55
        assert whole * 0.95 < max(waits) <= whole
        assert len(set(waits)) > 100


@pytest.mark.parametrize("multiplier", [2, 2.5])
def test_a_huge_attempt_waits_no_longer_than_the_longest(multiplier):
    assert still(multiplier=multiplier).backoff(5000) == 30
    assert Retry(multiplier=multiplier).backoff(5000) <= 30


@given(
    attempt=st.integers(1, 2000),
    base_delay=st.floats(0, 1e9),
    multiplier=st.floats(0, 1e9),
    max_delay=st.floats(0, 1e9),
    jitter=st.booleans(),
)
def test_no_numbers_make_a_wait_longer_than_the_longest_or_shorter_than_none(
    attempt, base_delay, multiplier, max_delay, jitter
):
    policy = Retry(base_delay=base_delay, multiplier=multiplier, max_delay=max_delay, jitter=jitter)
    assert 0 <= policy.backoff(attempt) <= max_delay


def test_a_429_without_a_word_waits_longer_each_time():
    assert [still().wait(TOO_FAST, attempt) for attempt in (1, 2, 3)] == [5, 10, 15]
    assert [still(rate_limit_delay=0.1).wait(TOO_FAST, attempt) for attempt in (1, 2, 3)] == [0.5, 1, 2]
    assert Retry(rate_limit_delay=0).wait(TOO_FAST, 1) <= 0.5


def test_what_the_server_asks_for_is_waited_exactly():
    asked = [
        RateLimitError("later", status=429, retry_after=1),
        ServerError("later", status=503, retry_after=119.5),
    ]
    assert [Retry().wait(error, 3) for error in asked] == [1, 119.5]


def test_a_wait_longer_than_the_longest_allowed_is_given_up():
    long = RateLimitError("later", status=429, retry_after=121)
    assert Retry().wait(long, 1) is None
    assert Retry(max_retry_after=121).wait(long, 1) == 121
    assert Retry(max_retry_after=0).wait(RateLimitError("later", status=429, retry_after=0.1), 1) is None


# How often


def test_there_is_no_wait_after_the_last_try():
    assert [Retry(2).wait(BUSY, attempt) is None for attempt in (1, 2, 3)] == [False, False, True]


def test_a_total_of_0_switches_it_off():
    assert Retry(0).wait(BUSY, 1) is None
    assert Retry(0).wait(LOST, 1) is None


def test_a_wait_is_the_same_whether_asked_of_the_policy_or_of_its_successor():
    policy = still(total=3)
    followed = policy.increment(error=OSError())
    assert [followed.wait(BUSY, attempt) for attempt in (2, 3, 4)] == [1, 2, None]


@pytest.mark.parametrize(
    "error",
    [
        QuotaError("spent", status=429, retry_after=1),
        AuthenticationError("no", status=401),
        InvalidRequestError("no", status=400),
        ModelNotFoundError("no", status=404),
        StreamCancelled("stop"),
        sheepsse.InvalidStreamError("what is this"),
    ],
)
def test_what_cannot_get_better_is_not_tried_again_and_nobody_is_asked(error):
    asked = []
    policy = Retry(should_retry=lambda error, attempt: asked.append(error) or True)
    assert policy.wait(error, 1) is None
    assert asked == []


@pytest.mark.parametrize("status", sorted(sheepsse.RETRYABLE_STATUS))
def test_each_status_that_may_pass_is_tried_again(status):
    assert Retry().wait(ServerError("busy", status=status), 1) is not None


@pytest.mark.parametrize("error", [LOST, StreamTimeout("late"), sheepsse.StreamInterrupted("cut")])
def test_what_has_no_status_is_tried_again_where_it_may_pass(error):
    assert Retry().wait(error, 1) is not None
    assert Retry(statuses=()).wait(error, 1) is not None


def test_statuses_of_ones_own_replace_the_usual_ones():
    policy = Retry(statuses=[503, 501])
    assert policy.wait(ServerError("no", status=501), 1) is not None
    assert policy.wait(BUSY, 1) is not None
    assert policy.wait(ServerError("no", status=500), 1) is None
    assert Retry(statuses=[]).wait(BUSY, 1) is None


# Asking and telling


def test_should_retry_may_refuse_allow_or_say_how_long():
    def verdict(value):
        return still(should_retry=lambda error, attempt: value).wait(BUSY, 2)

    assert verdict(False) is None
    assert verdict(None) is None  # what a function without a word gives
    assert verdict(True) == 1
    assert verdict(0.2) == 0.2
    assert verdict(7) == 7
    assert verdict(0) == 0
    assert verdict(-3) == 0
    assert verdict(1000) == 1000


def test_should_retry_is_given_the_error_and_the_number_of_the_attempt():
    asked = []
    policy = Retry(2, should_retry=lambda error, attempt: asked.append((error, attempt)) or True)
    for attempt in (1, 2, 3):
        policy.wait(BUSY, attempt)
    assert asked == [(BUSY, 1), (BUSY, 2)]  # there is nothing to ask after the last try


def test_what_should_retry_says_counts_over_what_the_server_asks():
    policy = Retry(should_retry=lambda error, attempt: 0.5)
    assert policy.wait(RateLimitError("later", status=429, retry_after=60), 1) == 0.5


# What the answers say, as a Client takes it


def told(server, headers, status=429, total=1, **options):
    """The waits before further requests, and what came in the end, when the first answer has these headers"""
    server.answer(*[error_answer(status, "Later", headers=headers)] * total)
    waits = []
    policy = still(total=total, sleep=waits.append, **options)
    with sheepsse.Client(base_url=server.base_url, api_key=False, model="m", retry=policy) as client:
        try:
            return waits, client.complete("Good day?").text
        except sheepsse.SheepError as error:
            return waits, error


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"Retry-After": "1"}, 1),
        ({"Retry-After": "1.5"}, 1.5),
        ({"Retry-After": " 2 "}, 2),
        ({"Retry-After": "0"}, 5),
        ({"Retry-After": "-5"}, 5),
        ({"Retry-After": "abc"}, 5),
        ({"Retry-After": ""}, 5),
        ({"Retry-After": "1e1"}, 5),
        ({"Retry-After": "5 seconds"}, 5),
        ({"Retry-After": "Wed, 99 Foo 2015 99:99:99 GMT"}, 5),
        ({"Retry-After": "Fri, 31 Dec 99999 23:59:59 GMT"}, 5),
        ({"Retry-After": "Fri, 31 Dec 999999999999 23:59:59 GMT"}, 5),
        ({"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}, 5),
        ({"retry-after-ms": "1500"}, 1.5),
        ({"retry-after-ms": "250.5"}, 0.2505),
        ({"retry-after-ms": "1500", "Retry-After": "9"}, 1.5),
        ({"retry-after-ms": "0", "Retry-After": "1"}, 1),
        ({"retry-after-ms": "0"}, 5),
        ({"retry-after-ms": "-1", "Retry-After": "1"}, 1),
        ({"retry-after-ms": "soon", "Retry-After": "1"}, 1),
        ({}, 5),
    ],
    ids=str,
)
def test_a_wait_that_the_server_asks_for_is_kept_and_a_malformed_one_ignored(server, headers, wait):
    assert told(server, headers) == ([wait], TEXT)


def plain(server):
    """A client of this server that asks once"""
    return sheepsse.Client(base_url=server.base_url, api_key=False, model="m", retry=0)


def test_an_http_date_is_waited_for(server, clock):
    clock.time = lambda: 1_500_000_000.5
    date = email.utils.formatdate(1_500_000_060, usegmt=True)
    assert told(server, {"Retry-After": date}) == ([59.5], TEXT)


@pytest.mark.parametrize(
    "asked",
    [
        "121",
        "99999999",
        "Fri, 31 Dec 9999 23:59:59 GMT",
        "9" * 12,
        "9" * 13,
        "9" * 400,
    ],
    ids=lambda asked: asked[:30],
)
def test_a_wait_that_is_too_long_is_raised_with_its_length_and_not_slept(server, asked):
    waits, error = told(server, {"Retry-After": asked})
    assert waits == []
    assert type(error) is RateLimitError
    assert error.retry_after > 120
    assert len(server.requests) == 1


def test_geminis_retry_info_is_waited_for(server):
    body = b'{"error": {"code": 429, "message": "Slow", "details": [{"retryDelay": "3.5s"}]}}'
    server.answer(Answer(status=429, body=body, content_type="application/json"))
    waits = []
    with plain(server) as client:
        assert client.complete("Good day?", retry=Retry(1, sleep=waits.append)).text
    assert waits == [3.5]


@given(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126), max_size=40))
def test_nothing_that_a_retry_after_can_hold_is_an_error(value):
    for status in (429, 503):
        wait = sheepsse._status_error(status, {"retry-after": value, "retry-after-ms": value}).retry_after
        assert wait is None or wait >= 0


PARTS = ["Wed,", "21", "Oct", "2015", "07:28:00", "GMT", "12.34.56.78+0800", "-0000", "99:99", "", "-", ","]


# before Python 3.10 email.utils raises IndexError or UnboundLocalError for these two
@given(st.lists(st.sampled_from(PARTS), max_size=8).map(" ".join))
@example("21 Oct 07:28:00 ,")
@example("Wed, 21 Oct 2015 12.34.56.78+0800")
def test_nothing_that_resembles_a_date_is_an_error(value):
    wait = sheepsse._status_error(503, {"retry-after": value}).retry_after
    assert wait is None or wait >= 0


@pytest.mark.parametrize(
    ("status", "says", "requests_sent"),
    [(503, "false", 1), (503, "true", 3), (400, "true", 3), (400, "false", 1), (501, "true", 3), (401, "true", 1)],
)
def test_x_should_retry_counts_over_the_status(server, status, says, requests_sent):
    waits, error = told(server, {"x-should-retry": says}, status=status, total=2)
    assert len(server.requests) == requests_sent
    assert len(waits) == requests_sent - 1


@pytest.mark.parametrize(
    ("status", "code", "requests_sent"),
    [(status, None, 4) for status in (408, 409, 429, 500, 502, 503, 504, 529)]
    + [(status, None, 1) for status in (400, 401, 402, 403, 404, 413, 422, 501)]
    + [(429, "insufficient_quota", 1)],
)
def test_a_client_sends_one_request_or_one_and_as_many_as_total(server, status, code, requests_sent):
    server.default = error_answer(status, "No", code=code)
    waits, told_of, given_up = [], [], []
    policy = Retry(
        3,
        sleep=waits.append,
        on_retry=lambda error, attempt, delay: told_of.append((error.status, attempt, delay)),
        on_give_up=lambda error, attempt: given_up.append((error.status, attempt)),
    )
    with sheepsse.Client(base_url=server.base_url, api_key=False, model="m", retry=policy) as client:
        with pytest.raises(sheepsse.SheepError) as caught:
            client.complete("Good day?")
    assert caught.value.status == status
    assert len(server.requests) == requests_sent
    assert told_of == [(status, attempt, delay) for attempt, delay in enumerate(waits, 1)]
    assert len(waits) == requests_sent - 1
    assert given_up == [(status, requests_sent)]


def test_a_refused_connection_is_tried_again_by_a_client():
    waits = []
    url = f"http://127.0.0.1:{closed_port()}/v1"
    with sheepsse.Client(base_url=url, api_key=False, model="m", retry=Retry(2, sleep=waits.append)) as client:
        with pytest.raises(ConnectError):
            client.complete("Good day?")
    assert len(waits) == 2


def test_a_dropped_request_is_tried_again_by_a_client(server):
    server.answer(Answer(drop=True), Answer(drop=True, cut="reset"), Answer(text="Good"))
    waits = []
    with plain(server) as client:
        assert client.complete("Good day?", retry=still(total=2, sleep=waits.append)).text == "Good"
    assert waits == [0.5, 1]
    assert len(server.requests) == 3


def test_on_retry_beside_a_call_replaces_the_policys(server):
    server.answer(error_answer(503))
    policy_told, call_told = [], []
    policy = Retry(1, base_delay=0, on_retry=lambda *seen: policy_told.append(seen))
    with sheepsse.Client(base_url=server.base_url, api_key=False, model="m", retry=policy) as client:
        client.complete("Good day?", on_retry=lambda error, attempt, delay: call_told.append((attempt, delay)))
    assert policy_told == []
    assert call_told == [(1, 0)]


# Through session()


@pytest.fixture
def opened():
    """sheepsse.session, whose sessions are closed after the test"""
    made = []

    def open_one(*args, **options):
        made.append(sheepsse.session(*args, **options))
        return made[-1]

    yield open_one
    for session in made:
        session.close()


def test_a_session_has_the_policy_on_http_and_https(opened):
    policy = Retry(3)
    session = opened(policy, pool_size=7)
    for url in ("http://a.example", "https://a.example"):
        assert session.get_adapter(url).max_retries is policy
        assert session.get_adapter(url)._pool_maxsize == 7
    assert type(opened().get_adapter("https://a.example").max_retries) is Retry
    assert opened().get_adapter("https://a.example").max_retries.total == 5


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH"])
def test_a_session_sends_every_method_again(server, opened, method):
    server.answer(error_answer(503), error_answer(500), Answer(body=b"{}"))
    waits = []
    answer = opened(still(sleep=waits.append)).request(method, server.origin, json={"n": 1})
    assert answer.status_code == 200
    assert [request.method for request in server.requests] == [method] * 3
    assert [request.body for request in server.requests] == [server.requests[0].body] * 3
    assert waits == [0.5, 1]


def test_a_session_retries_over_https_too(opened):
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with LocalProvider(error_answer(503), Answer(body=b"{}"), ssl_context=context) as server:
        with authority.cert_pem.tempfile() as bundle:
            answer = opened(Retry(base_delay=0)).post(server.origin, verify=bundle, json={})
        assert answer.status_code == 200
        assert len(server.requests) == 2


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 529])
def test_a_session_returns_the_response_it_gives_up_on(server, opened, status):
    server.default = error_answer(status, "Sorry")
    waits = []
    answer = opened(Retry(2, sleep=waits.append)).post(server.origin, json={})
    assert answer.status_code == status
    assert answer.json()["error"]["message"] == "Sorry"
    assert len(server.requests) == 3
    assert len(waits) == 2


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 413, 422, 501])
def test_a_session_returns_at_once_what_would_not_get_better(server, opened, status):
    server.default = error_answer(status)
    assert opened(Retry(sleep=pytest.fail)).post(server.origin, json={}).status_code == status
    assert len(server.requests) == 1


def test_a_total_of_0_switches_a_sessions_retries_off(server, opened):
    server.default = error_answer(503)
    assert opened(Retry(0, sleep=pytest.fail)).get(server.origin).status_code == 503
    assert len(server.requests) == 1


@pytest.mark.parametrize(("says", "requests_sent"), [("false", 1), ("true", 3)])
def test_x_should_retry_counts_in_a_session(server, opened, says, requests_sent):
    server.default = error_answer(400 if says == "true" else 503, headers={"x-should-retry": says})
    opened(Retry(2, base_delay=0)).post(server.origin, json={})
    assert len(server.requests) == requests_sent


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"Retry-After": "1"}, 1),
        ({"Retry-After": "1.5"}, 1.5),
        ({"Retry-After": "-5"}, 0.5),
        ({"Retry-After": "abc"}, 0.5),
        ({"Retry-After": ""}, 0.5),
        ({"retry-after-ms": "20"}, 0.02),
        ({"retry-after-ms": "0", "Retry-After": "1"}, 1),
    ],
    ids=str,
)
def test_a_session_waits_as_the_server_asks_and_never_raises_for_what_is_malformed(server, opened, headers, wait):
    server.answer(error_answer(503, headers=headers), Answer(body=b"{}"))
    waits = []
    assert opened(still(sleep=waits.append)).post(server.origin, json={}).status_code == 200
    assert waits == [wait]


def test_a_malformed_retry_after_of_the_last_answer_does_not_raise_either(server, opened):
    server.default = error_answer(503, headers={"Retry-After": "abc"})
    assert opened(Retry(1, base_delay=0)).get(server.origin).status_code == 503


def test_a_session_does_not_sleep_longer_than_allowed(server, opened):
    server.default = error_answer(429, headers={"Retry-After": "99999999"})
    answer = opened(Retry(sleep=pytest.fail)).post(server.origin, json={})
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "99999999")
    assert len(server.requests) == 1


def test_a_session_sleeps_with_time_sleep_where_nothing_else_is_given(server, opened, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    server.answer(error_answer(503), error_answer(503), Answer(body=b"{}"))
    opened(still(base_delay=0.25, multiplier=4)).get(server.origin)
    opened(still(base_delay=0)).get(server.origin)
    assert waits == [0.25, 1]


def test_a_wait_of_0_does_not_sleep(server, opened):
    server.answer(error_answer(503))
    opened(Retry(base_delay=0, sleep=pytest.fail)).get(server.origin)
    assert len(server.requests) == 2


def test_a_session_sends_again_what_was_dropped(server, opened):
    server.answer(Answer(drop=True), Answer(drop=True, cut="reset"), Answer(body=b"{}"))
    waits, told_of = [], []
    policy = still(sleep=waits.append, on_retry=lambda error, attempt, delay: told_of.append((type(error), attempt)))
    assert opened(policy).post(server.origin, json={}).status_code == 200
    assert waits == [0.5, 1]
    assert told_of == [(ConnectError, 1), (ConnectError, 2)]


def test_a_session_raises_requests_own_error_when_no_connection_can_be_had(opened):
    told_of, given_up = [], []
    policy = Retry(
        2,
        base_delay=0,
        on_retry=lambda error, attempt, delay: told_of.append((attempt, delay)),
        on_give_up=lambda error, attempt: given_up.append((type(error), attempt)),
    )
    with pytest.raises(requests.ConnectionError, match="refused"):
        opened(policy).post(f"http://127.0.0.1:{closed_port()}/", json={})
    assert told_of == [(1, 0), (2, 0)]
    assert given_up == [(ConnectError, 3)]


def test_a_sessions_hooks_are_told_status_attempt_and_wait(server, opened):
    server.default = error_answer(503, headers={"x-request-id": "req_d"})
    told_of, given_up = [], []
    policy = still(
        total=2,
        sleep=sleeper,
        on_retry=lambda error, attempt, delay: told_of.append((error.status, error.request_id, attempt, delay)),
        on_give_up=lambda error, attempt: given_up.append((error.status, attempt)),
    )
    opened(policy).post(server.origin, json={})
    assert told_of == [(503, "req_d", 1, 0.5), (503, "req_d", 2, 1)]
    assert given_up == [(503, 3)]


def test_should_retry_decides_in_a_session(server, opened):
    server.default = error_answer(503)
    waits = []
    policy = Retry(5, sleep=waits.append, should_retry=lambda error, attempt: 0.1 * attempt if attempt < 3 else False)
    opened(policy).get(server.origin)
    assert waits == [0.1, 0.2]


def test_a_policy_may_be_used_for_many_requests(server, opened):
    session = opened(Retry(1, base_delay=0))
    for _ in range(3):
        server.answer(error_answer(503), Answer(body=b"{}"))
        assert session.get(server.origin).status_code == 200
    assert len(server.requests) == 6


def test_a_session_follows_redirects_as_requests_does(server, opened):
    server.answer(Answer(status=302, headers={"Location": "/there"}, body=b""), Answer(body=b"{}"))
    assert opened(Retry(sleep=pytest.fail)).get(server.origin).history[0].status_code == 302
    assert server.requests[1].path == "/there"


def test_a_session_does_not_read_the_whole_of_a_failed_answer_before_it_tries_again(server, opened):
    drawn = []

    def blocks():
        for _ in range(1600):
            drawn.append(1)
            yield b"x" * 65536

    server.answer(Answer(status=503, events=blocks()), Answer(body=b"{}"))
    assert opened(Retry(base_delay=0)).get(server.origin).status_code == 200
    assert len(drawn) < 400


def test_a_session_gives_the_connections_of_failed_tries_back(server, opened):
    server.answer(*[error_answer(503)] * 3, Answer(body=b"{}"))
    assert opened(Retry(base_delay=0)).get(server.origin).status_code == 200
    assert server.connections == 1


@responses.activate
def test_a_session_works_where_the_package_responses_answers(opened):
    url, headers = "https://api.example.com/v1", {"Retry-After": "0"}
    for status in (503, 429, 200):
        responses.add(responses.POST, url, status=status, json={}, headers=headers)
    assert opened(Retry(base_delay=0, rate_limit_delay=0)).post(url).status_code == 200
    assert len(responses.calls) == 3
