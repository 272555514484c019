"""Section 2, and what errors of an API say in section 5: which class, which numbers, which words"""

import itertools
import json
import os
import pathlib
import pickle
from typing import Any, NamedTuple, Optional
from unittest.mock import ANY

import pytest
import requests

import sheepsse
from conftest import HANG, PATIENT, asking
from local_provider import DIALECT_BASES, Answer, chat_events, data_event
from sheepsse import (
    AuthenticationError,
    ConnectError,
    InvalidRequestError,
    InvalidStreamError,
    ModelNotFoundError,
    QuotaError,
    RateLimitError,
    ServerError,
    SheepError,
    StreamCancelled,
    StreamError,
    StreamInterrupted,
    StreamTimeout,
)

HTML = b"<!doctype html><html><head><title>Bad Gateway</title></head><body><h1>Bad Gateway</h1></body></html>"
KIB = 1024


def raised(server, client, answer, **options):
    """The error that a stream of this answer ends with"""
    server.answer(answer)
    with pytest.raises(SheepError) as caught:
        for _ in client.stream("Good day?", **options):
            pass
    return caught.value


def refused(status, body=b"", headers=(), content_type="application/json", **fields):
    """An answer of this status; a body that is not bytes goes out as JSON"""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Answer(status=status, headers=headers, body=data, content_type=content_type, framing="length", **fields)


# The classes

CLASSES = {
    AuthenticationError: ("AUTH_ERROR", False),
    QuotaError: ("QUOTA_EXCEEDED", False),
    RateLimitError: ("RATE_LIMIT", True),
    ModelNotFoundError: ("MODEL_NOT_FOUND", False),
    InvalidRequestError: ("INVALID_REQUEST", False),
    ServerError: ("SERVER_ERROR", True),
    ConnectError: ("NETWORK_ERROR", True),
    StreamTimeout: ("TIMEOUT", True),
    InvalidStreamError: ("INVALID_SSE_FORMAT", False),
    StreamError: ("STREAM_ERROR", False),
    StreamInterrupted: ("CONNECTION_LOST", True),
    StreamCancelled: ("CANCELLED", False),
}


@pytest.mark.parametrize("kind", CLASSES)
def test_each_class_has_its_code_and_says_whether_to_try_again(kind):
    error = kind("words")
    assert (error.code, error.retryable) == CLASSES[kind]
    assert str(error) == "words"


@pytest.mark.parametrize("kind", CLASSES)
def test_an_old_except_clause_for_requests_catches_every_error(kind):
    assert issubclass(kind, SheepError)
    assert issubclass(kind, requests.RequestException)
    assert issubclass(ConnectError, requests.ConnectionError)
    assert issubclass(StreamTimeout, requests.Timeout)


def test_every_attribute_has_a_value_also_where_nothing_is_known():
    error = SheepError()
    for name in ("retry_after", "request_id", "status", "vendor_code", "request", "response"):
        assert getattr(error, name) is None
    assert error.code == "ERROR"
    assert error.partial == sheepsse.Completion()
    assert error.partial.text == ""
    assert StreamInterrupted().resume_point == sheepsse.ResumePoint()


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_survives_pickling_as_itself_without_request_and_response(kind):
    request = requests.Request("POST", "http://127.0.0.1/", headers={"Authorization": "Bearer secret-key"}).prepare()
    response = requests.Response()
    response.request, response._content = request, b"an answer"
    known = {
        "code": "a_code",
        "retryable": True,
        "retry_after": 1.5,
        "request_id": "req-1",
        "status": 418,
        "vendor_code": 7,
        "partial": sheepsse.Completion(text="so far"),
    }
    pickled = pickle.dumps(kind("words", request=request, response=response, **known))
    assert b"secret-key" not in pickled
    error = pickle.loads(pickled)
    assert type(error) is kind
    assert str(error) == "words"
    assert {name: getattr(error, name) for name in known} == known
    assert error.request is None
    assert error.response is None


def test_what_a_stream_raises_survives_pickling_with_all_it_knows(server, client):
    error = raised(server, client, refused(429, {"error": {"message": "Slow", "code": "busy"}}, {"Retry-After": "7"}))
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is RateLimitError
    assert (again.status, again.retry_after, again.vendor_code) == (429, 7.0, "busy")
    assert (str(again), again.request_id, again.partial) == (str(error), error.request_id, error.partial)


# The bodies that services really sent


class Expected(NamedTuple):
    kind: Any
    retryable: bool
    retry_after: Optional[float]
    request_id: Optional[str]
    vendor_code: Any
    message: str


#: where the error's own code says more than its status
BY_CODE = {
    "model_not_found": ModelNotFoundError,
    "DeploymentNotFound": ModelNotFoundError,
    "not_found_error": ModelNotFoundError,
    "insufficient_quota": QuotaError,
    "API_KEY_INVALID": AuthenticationError,
}
#: where only its words do: a host and its code for a key that is refused with a 400
BY_HOST = {("api.x.ai", "invalid-argument"): AuthenticationError}
BY_STATUS = {
    401: AuthenticationError,
    402: QuotaError,
    403: AuthenticationError,
    404: ModelNotFoundError,  # of an API's own address: what is not found is the model
    429: RateLimitError,
}


def class_by_status(status):
    if status in (408, 409) or status >= 500:
        return ServerError
    return BY_STATUS.get(status, InvalidRequestError)


def codes_in(value):
    """Whatever an error calls itself, at any depth"""
    if isinstance(value, list):
        return {code for item in value for code in codes_in(item)}
    if not isinstance(value, dict):
        return set()
    own = {value.get(name) for name in ("code", "type", "reason") if isinstance(value.get(name), str)}
    return own.union(*map(codes_in, value.values()))


def retry_delay_in(body):
    details = body["error"].get("details") if isinstance(body.get("error"), dict) else None
    delays = [detail["retryDelay"] for detail in details or [] if isinstance(detail, dict) and "retryDelay" in detail]
    return float(delays[0].rstrip("s")) if delays else None


def expectation(entry):
    status, headers, body = entry["status"], entry["headers"], entry["body"]
    error = body.get("error", body)
    named = error if isinstance(error, dict) else body
    kinds = [BY_CODE[code] for code in codes_in(body) if code in BY_CODE]
    kinds += [kind for (host, code), kind in BY_HOST.items() if host == entry["host"] and code in codes_in(body)]
    kind = kinds[0] if kinds else class_by_status(status)
    wait = float(headers.get("retry-after-ms", 0)) / 1000 or float(headers.get("retry-after", 0)) or None
    says = {"true": True, "false": False, None: kind in (RateLimitError, ServerError)}[headers.get("x-should-retry")]
    return Expected(
        kind=kind,
        retryable=says,
        retry_after=wait or retry_delay_in(body),
        request_id=headers.get("x-request-id") or headers.get("request-id") or body.get("request_id"),
        vendor_code=next((named[name] for name in ("code", "type", "status") if named.get(name) is not None), None),
        message=error if isinstance(error, str) else error.get("message") or error.get("detail"),
    )


def recorded_errors():
    folder = os.environ.get("SHEEPSSE_RECORDINGS")
    return json.loads((pathlib.Path(folder) / "http_errors.json").read_text(encoding="utf-8")) if folder else [None]


def name_of(entry):
    return f"{entry['host']} {entry['status']}" if entry else "none"


@pytest.mark.usefixtures("recordings")
@pytest.mark.parametrize("entry", recorded_errors(), ids=name_of)
def test_a_recorded_error_means_what_its_status_and_its_own_code_say(server, client, entry):
    headers = {"x-request-id": None, **entry["headers"]}
    error = raised(server, client, refused(entry["status"], entry["body"], headers))
    expected = expectation(entry)
    assert type(error) is expected.kind
    assert error.code == expected.kind.code
    assert error.retryable is expected.retryable
    assert error.retry_after == expected.retry_after
    assert error.request_id == (expected.request_id or server.requests[0].headers["X-Request-ID"])
    assert error.status == entry["status"]
    assert error.vendor_code == expected.vendor_code
    assert " ".join(expected.message.split()) in " ".join(str(error).split())
    assert error.response.json() == entry["body"]
    assert len(server.requests) == 1


# The same behaviours in bodies of our own


class Case(NamedTuple):
    name: str
    status: int
    body: Any
    kind: Any
    vendor_code: Any = ANY
    words: str = ""
    retry_after: Optional[float] = None
    request_id: Any = ANY


def openai(message, type="invalid_request_error", code=None):
    return {"error": {"message": message, "type": type, "param": None, "code": code}}


def gemini(code, message, status, *details):
    return {"error": {"code": code, "message": message, "status": status, "details": list(details)}}


def anthropic(type, message):
    return {"type": "error", "error": {"type": type, "message": message}, "request_id": "req_inside"}


KEY_REFUSED = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}
RETRY_INFO = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "48.5s"}
ODD_DELAY = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "soon"}
PER_DAY = {
    "@type": "type.googleapis.com/google.rpc.QuotaFailure",
    "violations": [{"quotaId": "RequestsPerDayPerModel-Free", "quotaValue": "20"}],
}
PER_MINUTE = {
    "@type": "type.googleapis.com/google.rpc.QuotaFailure",
    "violations": [{"quotaId": "RequestsPerMinutePerModel-Free", "quotaValue": "5"}],
}

CASES = [
    Case("a key refused", 401, openai("No such key", code="invalid_api_key"), AuthenticationError, "invalid_api_key"),
    Case("a region refused", 403, openai("Not there", code="region"), AuthenticationError, "region", "Not there"),
    Case("no such model", 404, openai("No alpha", code="model_not_found"), ModelNotFoundError, "model_not_found"),
    Case("no such model, as a 400", 400, openai("No", code="model_not_found"), ModelNotFoundError, "model_not_found"),
    Case("no such model, in words", 400, openai("Model Not Exist", code="bad"), ModelNotFoundError, "bad"),
    Case("no such address", 404, openai("Invalid URL (POST /v2)"), InvalidRequestError, "invalid_request_error"),
    Case("too long", 400, openai("Too long", code="context_length_exceeded"), InvalidRequestError),
    Case("too fast", 429, openai("Slower", "requests", "rate_limit_exceeded"), RateLimitError, "rate_limit_exceeded"),
    Case("spent, by code", 429, openai("Pay", "x", "insufficient_quota"), QuotaError, "insufficient_quota"),
    Case("spent, by type", 429, openai("Pay", "insufficient_quota"), QuotaError, "insufficient_quota", "Pay"),
    Case("a limit of spending", 400, openai("Pay", code="billing_hard_limit_reached"), QuotaError),
    Case("a fault of theirs", 500, openai("Sorry", "server_error"), ServerError, "server_error", "Sorry"),
    Case("an int for a code", 400, {"error": {"message": "Bad", "code": 400}}, InvalidRequestError, 400, "Bad"),
    Case("no credit, an int", 402, {"error": {"message": "Top up", "code": 402}}, QuotaError, 402, "Top up"),
    Case("too fast, an int", 429, {"error": {"message": "Slower", "code": 429}}, RateLimitError, 429, "Slower"),
    Case("a code that is neither", 500, {"error": {"message": "Bad", "code": True}}, ServerError, None, "Bad"),
    Case("a deployment", 404, openai("None", code="DeploymentNotFound"), ModelNotFoundError, "DeploymentNotFound"),
    Case("a code inside", 400, {"error": {"details": {"error_code": "c9"}, "message": "m"}}, InvalidRequestError, "c9"),
    Case("gemini, a key", 400, gemini(400, "Not valid", "INVALID_ARGUMENT", KEY_REFUSED), AuthenticationError, 400),
    Case("gemini, a model", 404, gemini(404, "models/x is not found", "NOT_FOUND"), ModelNotFoundError, 404),
    Case(
        "gemini, a minute's quota",
        429,
        gemini(429, "Exhausted", "RESOURCE_EXHAUSTED", PER_MINUTE, RETRY_INFO),
        RateLimitError,
        429,
        "Exhausted",
        48.5,
    ),
    Case(
        "gemini, a day's quota",
        429,
        gemini(429, "Exhausted", "RESOURCE_EXHAUSTED", RETRY_INFO, PER_DAY),
        QuotaError,
        429,
        "Exhausted",
        48.5,
    ),
    Case("gemini, an odd delay", 429, gemini(429, "E", "R", ODD_DELAY, RETRY_INFO), RateLimitError, 429, "E", 48.5),
    Case("gemini, an array of one", 503, [gemini(503, "Overloaded", "UNAVAILABLE")], ServerError, 503, "Overloaded"),
    Case(
        "anthropic, a model",
        404,
        anthropic("not_found_error", "model: x"),
        ModelNotFoundError,
        "not_found_error",
        "model: x",
        None,
        "req_inside",
    ),
    Case("anthropic, overloaded", 529, anthropic("overloaded_error", "Busy"), ServerError, "overloaded_error", "Busy"),
    Case("anthropic, credit", 400, anthropic("billing_error", "Pay"), QuotaError, "billing_error", "Pay"),
    Case("ollama, a model", 404, {"error": "model 'x' not found"}, ModelNotFoundError, None, "model 'x' not found"),
    Case("ollama, another", 400, {"error": "no messages"}, InvalidRequestError, None, "no messages"),
    Case("xai, a key", 400, {"code": "bad-arg", "error": "Incorrect API key provided"}, AuthenticationError, "bad-arg"),
    Case("xai, another", 400, {"code": "bad-arg", "error": "No messages"}, InvalidRequestError, "bad-arg", "No mess"),
    Case("mistral, a key", 401, {"detail": "Unknown key"}, AuthenticationError, None, "Unknown key"),
    Case(
        "fastapi",
        422,
        {"detail": [{"loc": ["body", "n"], "msg": "n is odd"}, {"loc": ["body"], "msg": "m is missing"}]},
        InvalidRequestError,
        None,
        "n is odd; m is missing",
    ),
    Case("cohere", 429, {"message": "Trial keys are slow"}, RateLimitError, None, "Trial keys are slow"),
    Case("old vllm", 400, {"object": "error", "message": "Bad", "type": "T", "code": 40}, InvalidRequestError, 40),
    Case("a request time-out", 408, openai("Late", code="timeout"), ServerError, "timeout", "Late"),
    Case("a conflict", 409, openai("Locked", code="conflict"), ServerError, "conflict", "Locked"),
    Case("too large", 413, {"error": {"message": "Too large"}}, InvalidRequestError, None, "Too large"),
    Case("a teapot", 418, {"msg": "Short and stout"}, InvalidRequestError, None, "Short and stout"),
    Case("JSON text", 500, "upstream is gone", ServerError, None, "upstream is gone"),
    Case("a JSON number", 500, 42, ServerError, None, "42"),
    Case("a JSON null", 500, None, ServerError, None, "null"),
    Case("an empty array", 500, [], ServerError, None, "[]"),
    Case("an empty object", 503, {}, ServerError, None, "{}"),
    Case("an unknown shape", 503, {"fault": {"faultstring": "Spike"}}, ServerError, None, "Spike"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_error_body_of_any_vendors_shape_gives_class_code_and_message(server, client, case):
    error = raised(server, client, refused(case.status, case.body, {"x-request-id": None}))
    assert type(error) is case.kind
    assert error.code == case.kind.code
    assert error.retryable is (case.kind in (RateLimitError, ServerError))
    assert error.status == case.status
    assert error.retry_after == case.retry_after
    assert error.vendor_code == case.vendor_code
    assert error.request_id == case.request_id
    assert case.words in str(error)
    assert str(error).startswith(f"{case.status} from {server.base_url}/chat/completions: ")
    assert not str(error).endswith(".")


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (502, ServerError, "try again later"),
        (404, InvalidRequestError, "is {url} the right address?"),
        (401, AuthenticationError, "check the API key"),
        (429, RateLimitError, "wait, or send fewer requests at a time"),
        (402, QuotaError, "check its plan and billing"),
    ],
)
def test_an_html_page_with_an_error_status_says_what_it_is_and_what_to_do(server, client, status, kind, words):
    error = raised(server, client, refused(status, HTML, content_type="text/html"))
    assert type(error) is kind
    assert "text/html" in str(error)
    assert "<h1>Bad Gateway</h1>" in str(error)
    assert words.format(url=f"{server.base_url}/chat/completions") in str(error)


def test_a_long_page_is_quoted_in_part(server, client):
    error = raised(server, client, refused(500, b"<p>" + b"words " * 10_000, content_type="text/html"))
    assert len(str(error)) < 600
    assert "words..." in str(error) or "..." in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("body", [b"", b"  \r\n"], ids=["empty", "blank"])
@pytest.mark.parametrize(
    ("status", "kind"), [(500, ServerError), (401, AuthenticationError), (400, InvalidRequestError)]
)
def test_an_empty_error_body_is_an_error_that_says_so(server, client, status, kind, body):
    error = raised(server, client, refused(status, body, content_type="text/plain"))
    assert type(error) is kind
    assert "no message" in str(error)


def test_an_answer_without_content_type_is_quoted_all_the_same(server, client):
    error = raised(server, client, refused(500, b"it broke", {"Content-Type": None}, None))
    assert "no Content-Type with 'it broke'" in str(error)


def test_a_redirect_is_an_error_that_says_where_it_led(server, client):
    answer = refused(307, b"", {"Location": "https://user:pass@elsewhere.example/v1?key=secret#part"})
    error = raised(server, client, answer)
    assert type(error) is InvalidRequestError
    assert "a redirect to https://elsewhere.example/v1, which is not followed" in str(error)
    assert f"is {server.base_url}/chat/completions the right address?" in str(error)
    assert "secret" not in str(error)
    assert "pass" not in str(error)


@pytest.mark.parametrize(
    "location",
    [
        None,
        "http://[broken/",  # requests looks where it leads, though it does not follow
    ],
)
def test_a_redirect_to_nowhere_is_an_error_too(server, client, location):
    error = raised(server, client, refused(302, b"", {"Location": location}))
    assert type(error) is InvalidRequestError
    assert "a redirect to ?" in str(error)


def test_a_url_that_cannot_be_taken_apart_is_not_shown():
    assert sheepsse._public_url("http://[broken/?key=secret") == "?"


# What a body may do to us


def test_of_a_hundred_megabytes_of_error_64_kib_are_read(server, client):
    block, drawn = b"x" * 50_000, []

    def blocks():
        for _ in range(2000):
            drawn.append(1)
            yield block

    error = raised(server, client, Answer(status=500, events=blocks(), content_type="text/html"))
    assert type(error) is ServerError
    assert len(error.response.content) == 64 * KIB
    assert server.wait_closed(HANG)
    assert len(drawn) < 400  # what the buffers of two sockets hold


def test_the_body_of_a_redirect_is_not_read_whole_either(server, client):
    # requests would, to give the connection back, also where it does not follow
    drawn = []

    def blocks():
        for _ in range(1600):
            drawn.append(1)
            yield b"x" * (64 * KIB)

    error = raised(server, client, Answer(status=302, headers={"Location": "/"}, events=blocks()))
    assert type(error) is InvalidRequestError
    assert server.wait_closed(HANG)
    assert len(drawn) < 400


def test_an_error_body_that_promises_a_hundred_megabytes_is_not_waited_for(server, client):
    block, drawn = b"x" * (64 * KIB), []

    def blocks():
        while True:  # as far as anybody reads
            drawn.append(1)
            yield block

    headers = {"Content-Length": str(1600 * len(block))}
    error = raised(server, client, Answer(status=500, headers=headers, events=blocks(), framing="close"))
    assert len(error.response.content) == 64 * KIB
    assert len(str(error)) < 600
    assert server.wait_closed(HANG)
    assert len(drawn) < 400  # what the buffers of two sockets hold


def test_an_error_body_shorter_than_promised_still_gives_its_error(server, client):
    body = json.dumps(openai("Bad", code="c")).encode()
    answer = refused(400, body + b" " * 100, cut_at=len(body))
    error = raised(server, client, answer)
    assert type(error) is InvalidRequestError
    assert error.vendor_code == "c"


@pytest.mark.parametrize("status", [400, 503])
def test_an_error_body_that_trickles_for_ever_is_left_after_a_while(server, client, clock, status):
    clock.step = sheepsse._ERROR_BODY_TIME / 50  # so many looks at the clock take that long
    error = raised(server, client, Answer(status=status, events=itertools.repeat(b"x"), pace=0.001, framing="close"))
    assert type(error) is class_by_status(status)
    assert "'xx" in str(error)
    assert server.wait_closed(HANG)


@pytest.mark.parametrize("pace", [0, 0.01], ids=["silent", "trickling"])
def test_a_session_of_ones_own_does_not_wait_for_ever_for_an_error_body_either(server, monkeypatch, pace):
    monkeypatch.setattr(sheepsse, "_ERROR_BODY_TIME", 0.1)
    stall = None if pace else 1
    server.answer(Answer(status=400, events=itertools.repeat(b"x"), pace=pace, framing="close", stall_after=stall))
    with requests.Session() as session, asking(server, session=session, **PATIENT) as client:
        with pytest.raises(InvalidRequestError):
            client.complete("Good day?")


def test_an_error_body_that_trickles_does_not_keep_from_trying_again(server, client, monkeypatch):
    monkeypatch.setattr(sheepsse, "_ERROR_BODY_TIME", 0.05)
    server.answer(Answer(status=503, events=itertools.repeat(b"x"), pace=0.01, framing="close"), Answer(text="Good"))
    assert client.complete("Good day?", retry=sheepsse.Retry(1, sleep=lambda seconds: None)).text == "Good"


@pytest.mark.parametrize(
    "body",
    [bytes(range(256)) * 20, b"[" * 100_000, b'{"a":' * 20_000, b'{"error": {"message": "cut', b"\xff\xfe{\x00}\x00"],
    ids=["binary", "deep array", "deep object", "cut JSON", "UTF-16"],
)
def test_an_error_body_that_cannot_be_read_is_quoted_on_one_line(server, client, no_collection, body):
    error = raised(server, client, refused(502, body, content_type="application/octet-stream"))
    assert type(error) is ServerError
    assert "application/octet-stream" in str(error)
    assert str(error).isprintable()
    assert len(str(error)) < 1500


def test_an_error_body_in_gzip_is_read(server, client):
    body = json.dumps(openai("Compressed", code="c")).encode()
    answer = Answer(status=400, body=body, content_type="application/json", framing="gzip")
    assert "Compressed" in str(raised(server, client, answer))


def test_a_body_whose_compression_is_broken_still_gives_its_status(server, client):
    error = raised(server, client, refused(503, b"not gzip", {"Content-Encoding": "gzip"}))
    assert type(error) is ServerError


def test_the_response_of_an_error_can_still_be_read(server, client):
    body = openai("Größe: 3", code="c")
    error = raised(server, client, refused(400, body, {"X-Own": "yes"}))
    assert error.response.json() == body
    assert error.response.text == json.dumps(body)
    assert error.response.status_code == error.status == 400
    assert error.response.headers["X-Own"] == "yes"
    assert error.request.url == error.response.request.url == f"{server.base_url}/chat/completions"
    assert json.loads(error.request.body)["model"] == "local-model"


@pytest.mark.parametrize(
    ("body", "content_type"),
    [(bytes(range(256)), "application/octet-stream"), ("Größe".encode("latin-1"), "text/html; charset=iso-8859-1")],
    ids=["binary", "latin-1"],
)
def test_the_response_of_an_error_has_the_bytes_that_were_sent(server, client, body, content_type):
    error = raised(server, client, refused(500, body, content_type=content_type))
    assert error.response.content == body


# What the server says of trying again


@pytest.mark.parametrize(
    ("status", "says", "retryable"),
    [
        (400, "true", True),
        (400, " TRUE ", True),
        (503, "false", False),
        (429, "False", False),
        (503, "perhaps", True),
        (400, "perhaps", False),
        (401, "true", False),
        (402, "true", False),
    ],
)
def test_x_should_retry_counts_over_the_status_but_not_over_key_and_money(server, client, status, says, retryable):
    error = raised(server, client, refused(status, openai("No"), {"x-should-retry": says}))
    assert error.retryable is retryable


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, "sent"),
        ({"x-request-id": "req_a"}, "req_a"),
        ({"request-id": "req_b"}, "req_b"),
        ({"x-request-id": "req_a", "request-id": "req_b"}, "req_a"),
    ],
)
def test_the_request_id_is_the_vendors_or_else_our_own(server, client, headers, expected):
    error = raised(server, client, refused(400, openai("No"), {"x-request-id": None, **headers}))
    sent = server.requests[0].headers["X-Request-ID"]
    assert error.request_id == (sent if expected == "sent" else expected)


# Answers of status 200 that are none


def test_a_200_with_a_json_error_is_no_stream_and_names_the_vendors_words(server, client):
    answer = refused(200, {**openai("The key is unknown", code="invalid_api_key"), "request_id": "req_c"})
    error = raised(server, client, answer)
    assert type(error) is InvalidStreamError
    assert error.retryable is False
    assert error.vendor_code == "invalid_api_key"
    assert "expected an answer, got status 200 with an error: The key is unknown" in str(error)


def test_a_200_with_json_that_is_no_answer_asks_whether_the_address_is_right(server, client):
    error = raised(server, client, refused(200, {"status": "up"}))
    assert type(error) is InvalidStreamError
    assert str(error).endswith("is the base URL that of the API?")


def test_a_200_with_an_html_page_says_what_was_expected_and_asks_whether_the_address_is_right(server, client):
    error = raised(server, client, refused(200, HTML, content_type="text/html; charset=utf-8"))
    assert type(error) is InvalidStreamError
    assert error.retryable is False
    assert str(error).startswith("expected Content-Type text/event-stream, got 'text/html; charset=utf-8' with '<!doc")
    assert str(error).endswith("is the base URL that of the API?")


def test_an_html_page_that_calls_itself_a_stream_is_none(server, client):
    error = raised(server, client, refused(200, HTML, content_type="text/event-stream"))
    assert type(error) is InvalidStreamError


# the lines of an event stream begin with the same letters
@pytest.mark.parametrize(
    "body",
    [b"Not here", b"no upstream", b"error code: 1033", b"internal server error", b"rate limited", b"denied"],
)
def test_a_200_with_plain_text_is_no_stream(server, client, body):
    error = raised(server, client, refused(200, body, content_type="text/plain"))
    assert type(error) is InvalidStreamError
    assert body.decode() in str(error)


# Errors inside a stream


def in_stream(error, *texts, event=""):
    """A stream of these texts, then the error"""
    return Answer(events=[*chat_events(texts, finish=None, done=False), data_event(error, event)])


@pytest.mark.parametrize(
    ("error", "retryable", "code", "vendor_code"),
    [
        (openai("Sorry", "server_error"), True, "STREAM_ERROR", "server_error"),
        (openai("Sorry", "server_error", "internal"), True, "internal", "internal"),
        (openai("Slow", "requests", "rate_limit_exceeded"), True, "rate_limit_exceeded", "rate_limit_exceeded"),
        (openai("Pay", "insufficient_quota", "insufficient_quota"), False, "insufficient_quota", "insufficient_quota"),
        (openai("No", "invalid_request_error", "too_long"), False, "too_long", "too_long"),
        ({"error": {"message": "Gone", "code": 502}}, True, "STREAM_ERROR", 502),
        ({"error": {"message": "Gone", "code": "503"}}, True, "503", "503"),
        ({"error": {"message": "No", "code": 400}}, False, "STREAM_ERROR", 400),
        ({"error": {"message": "Pay", "code": 429, "details": [PER_DAY]}}, False, "STREAM_ERROR", 429),
        ({"error": "it broke"}, False, "STREAM_ERROR", None),
        ({"object": "error", "message": "Bad", "type": "Overloaded", "code": None}, True, "STREAM_ERROR", "Overloaded"),
    ],
)
def test_an_error_event_has_the_vendors_code_and_whether_it_may_pass(
    server, client, error, retryable, code, vendor_code
):
    found = raised(server, client, in_stream(error))
    assert type(found) is StreamError
    assert (found.retryable, found.code, found.vendor_code) == (retryable, code, vendor_code)
    words = error.get("error", error)
    assert (words if isinstance(words, str) else words["message"]) in str(found)


def test_an_error_event_keeps_what_came_before_it(server, client):
    found = raised(server, client, in_stream({"error": {"message": "Sorry", "code": 502}}, "So ", "far"))
    assert found.partial.text == "So far"
    assert found.partial.complete is False


@pytest.mark.parametrize(
    ("data", "words"),
    [({"error": {}}, "no message"), ({"message": "Plain"}, "Plain"), ({"code": "e7"}, "e7")],
)
def test_an_event_named_error_is_one_whatever_its_shape(server, client, data, words):
    found = raised(server, client, in_stream(data, event="error"))
    assert type(found) is StreamError
    assert words in str(found)


def test_the_request_id_inside_an_error_event_is_kept(server, client):
    found = raised(server, client, in_stream({**anthropic("overloaded_error", "Busy")}))
    assert found.request_id == "req_inside"


def test_an_empty_error_beside_an_answer_is_none(server, client):
    body = b"".join(chat_events(["Good"])).replace(b'"model":', b'"error":null,"object":"x","model":')
    server.answer(Answer(body=body))
    assert "".join(client.stream("Good day?")) == "Good"


# What the vendors call a model that is not there


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, {"object": "error", "message": "Invalid model: x", "type": "invalid_model", "code": "1500"}),
        (400, {"error": {"message": "x is not a valid model ID", "code": 400}}),
    ],
    ids=["mistral", "openrouter"],
)
def test_a_model_that_is_not_there_is_known_by_what_mistral_and_openrouter_call_it(server, client, status, body):
    assert type(raised(server, client, refused(status, body))) is ModelNotFoundError


def test_a_list_of_plain_words_is_a_message_too(server, client):
    error = raised(server, client, refused(422, {"detail": ["n is odd", "m is missing"]}))
    assert "n is odd" in str(error)
    assert "m is missing" in str(error)


# What is asked for again, counted at the server


def spend_limit(code):
    error = {"type": "rate_limit_error", "message": "Limit", "details": {"error_code": code}}
    return {"type": "error", "error": error, "request_id": "req_inside"}


def times_asked(server, dialect, *answers):
    """How often the server is asked by one who may ask three times"""
    for answer in answers:
        server.answer(answer)
    before = len(server.requests)
    base_url = server.origin + DIALECT_BASES[dialect]
    with asking(server, base_url=base_url, dialect=dialect, retry=sheepsse.Retry(2, base_delay=0)) as client:
        try:
            "".join(client.stream("Good day?"))
        except SheepError:
            pass
    return len(server.requests) - before


SPENT = [
    ("openai", 429, openai("Pay", "insufficient_quota", "insufficient_quota")),
    ("openai", 402, {"error": {"message": "Top up", "code": 402}}),
    ("openai", 402, openai("Insufficient Balance", "unknown_error", "invalid_request_error")),
    ("openai-responses", 429, openai("Pay", "insufficient_quota", "insufficient_quota")),
    ("anthropic", 402, anthropic("billing_error", "Pay")),
    ("anthropic", 429, spend_limit("contract_spend_limit_reached")),
    ("anthropic", 429, spend_limit("enforced_spend_limit_reached")),
    ("gemini", 429, gemini(429, "Exhausted", "RESOURCE_EXHAUSTED", RETRY_INFO, PER_DAY)),
    ("gemini", 429, [gemini(429, "Exhausted", "RESOURCE_EXHAUSTED", PER_DAY)]),
    ("ollama", 402, {"error": "upgrade for more"}),
]


@pytest.mark.parametrize(("dialect", "status", "body"), SPENT)
def test_no_vendor_is_asked_again_where_a_quota_is_spent(server, dialect, status, body):
    assert times_asked(server, dialect, refused(status, body, {"retry-after": "0.01"})) == 1


LIMITED = [
    ("openai", 429, openai("Slower", "requests", "rate_limit_exceeded")),
    ("openai-responses", 500, openai("Sorry", "server_error")),
    ("anthropic", 429, anthropic("rate_limit_error", "Slower")),
    ("anthropic", 429, spend_limit("ramp_limit_exceeded")),
    ("anthropic", 529, anthropic("overloaded_error", "Busy")),
    ("gemini", 429, gemini(429, "Exhausted", "RESOURCE_EXHAUSTED", PER_MINUTE)),
    ("gemini", 503, gemini(503, "Busy", "UNAVAILABLE")),
    ("ollama", 429, {"error": "too many requests"}),
]


@pytest.mark.parametrize(("dialect", "status", "body"), LIMITED)
def test_every_vendor_is_asked_again_where_waiting_helps(server, dialect, status, body):
    answer = refused(status, body, {"retry-after": "0.01"})
    assert times_asked(server, dialect, answer, answer) == 3


QUOTA_IN_STREAM = [
    ("openai", openai("Pay", "insufficient_quota", "insufficient_quota")),
    ("openai-responses", {"type": "error", "sequence_number": 0, **openai("Pay", code="insufficient_quota")}),
    ("anthropic", anthropic("billing_error", "Pay")),
    ("gemini", gemini(429, "Exhausted", "RESOURCE_EXHAUSTED", PER_DAY)),
]


@pytest.mark.parametrize(("dialect", "payload"), QUOTA_IN_STREAM)
def test_a_quota_that_is_spent_inside_a_stream_is_not_asked_for_again(server, dialect, payload):
    assert times_asked(server, dialect, Answer(body=data_event(payload))) == 1


@pytest.mark.usefixtures("recordings")
@pytest.mark.parametrize("entry", recorded_errors(), ids=name_of)
def test_a_recorded_error_is_asked_for_again_only_where_it_may_pass(server, entry):
    waits = {"retry-after", "retry-after-ms"}
    headers = {name: value for name, value in entry["headers"].items() if name not in waits}
    answer = refused(entry["status"], entry["body"], {**headers, "retry-after": "0.01"})
    assert times_asked(server, "openai", answer, answer) == (3 if expectation(entry).retryable else 1)
