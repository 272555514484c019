"""No error, repr, log line or output shows a key, and no other host is sent one"""

import contextlib
import json
import logging
import os
import pathlib
import pickle
import socket
import subprocess
import sys
import traceback
from urllib.parse import unquote

import pytest
import requests

import sheepsse
from conftest import HANG
from local_provider import EVENT_STREAM, TEXT, Answer, LocalProvider, chat_events, data_event, error_answer
from sheepsse import (
    AuthenticationError,
    ConnectError,
    InvalidRequestError,
    InvalidStreamError,
    Retry,
    SheepError,
    StreamError,
    StreamInterrupted,
    StreamTimeout,
)

KEY = "sk-sheep-7f3a9c51d2e8b604"
#: so much of a key gives it away
PIECE = KEY[:12]
#: what else is secret: a password or a key in a URL, which other libraries log, unlike a header
SECRET = "open-sesame-4be1"


@pytest.fixture(autouse=True)
def _nothing_is_logged_or_printed(caplog, capsys):
    """Whatever a test does, no logger's line and no output shows the key"""
    caplog.set_level(logging.DEBUG)
    yield
    for record in caplog.get_records("call"):
        assert PIECE not in record.getMessage(), record.name
    assert PIECE not in "".join(capsys.readouterr())


def closed_port():
    """A port on which nobody listens"""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture
def asking(server):
    """A function that makes clients of the server, closed after the test"""
    with contextlib.ExitStack() as stack:

        def make(**options):
            defaults = {"base_url": server.base_url, "api_key": KEY, "model": "m", "retry": 0}
            return stack.enter_context(sheepsse.Client(**{**defaults, **options}))

        yield make


def raised(client, **options):
    """The error that a stream of this client ends with"""
    with pytest.raises(SheepError) as caught:
        for _ in client.stream("Good day?", **options):
            pass
    return caught.value


def causes(error):
    """The error and all behind it, in whichever way they are"""
    found = []
    waiting = [error]
    while waiting:
        link = waiting.pop()
        if link is not None and link not in found:
            found.append(link)
            waiting += [link.__cause__, link.__context__]
    return found


def requests_of(error):
    """The requests that can be reached from an error and from those behind it"""
    for link in causes(error):
        response = getattr(link, "response", None)
        found = [getattr(link, "request", None), None if response is None else response.request]
        yield from (request for request in found if request is not None)


def trace(error):
    return "".join(traceback.format_exception(type(error), error, error.__traceback__))


def shown(error):
    """All that an error shows, in the ways that errors are shown"""
    parts = [trace(error), repr(vars(error)), pickle.dumps(error).decode("latin-1")]
    parts += [f"{link!r} {link} {link.args!r}" for link in causes(error)]
    parts += [repr(request.headers) for request in requests_of(error)]
    if error.response is not None:
        parts += [error.response.text, repr(error.response)]
    return "\n".join(parts)


def hides(error, secret=PIECE):
    """Whether the error shows nothing of the secret"""
    text = shown(error)
    assert secret not in text, text[max(0, text.index(secret) - 300) : text.index(secret) + 100]
    return True


# Answers that repeat the key

REFUSED = {"error": {"message": f"No such key: {KEY}", "type": "auth", "code": "invalid_api_key"}}
REPEATING = {
    "401": (error_answer(401, f"Incorrect API key provided: {KEY}."), AuthenticationError),
    "401, the whole header": (error_answer(401, f"Bad header 'Bearer {KEY}'"), AuthenticationError),
    "401, as a code": (error_answer(401, "Bad key", code=KEY), AuthenticationError),
    "401, as a type": (error_answer(401, "Bad key", type=KEY), AuthenticationError),
    "400, twice": (error_answer(400, f"{KEY} is not {KEY}"), InvalidRequestError),
    "401, in a detail": (Answer(status=401, body=json.dumps({"detail": KEY}).encode()), AuthenticationError),
    "500, in another shape": (Answer(status=500, body=json.dumps({"fault": {"key": KEY}}).encode()), SheepError),
    "401, as HTML": (
        Answer(status=401, body=f"<p>The key {KEY} is unknown</p>".encode(), content_type="text/html"),
        AuthenticationError,
    ),
    "401, as text": (Answer(status=401, body=KEY.encode(), content_type="text/plain"), AuthenticationError),
    "401, in a request id": (error_answer(401, "Bad key", headers={"x-request-id": f"req-{KEY}"}), AuthenticationError),
    "401, in a type of content": (
        Answer(status=401, body=b"no", content_type=f"text/plain; key={KEY}"),
        AuthenticationError,
    ),
    "200, a JSON error": (Answer(body=json.dumps(REFUSED).encode()), InvalidStreamError),
    "200, HTML": (Answer(body=f"<p>{KEY}</p>".encode(), content_type="text/html"), InvalidStreamError),
    "200, text": (Answer(body=f"Bad key {KEY}".encode(), content_type="text/plain"), InvalidStreamError),
    "200, a type of content": (Answer(body=b"<p>", content_type=f"text/{KEY}"), InvalidStreamError),
    "200, no JSON": (Answer(body=f"data: {KEY}\n\n".encode(), content_type=EVENT_STREAM), InvalidStreamError),
    "200, broken JSON": (Answer(body=f'{{"key": {KEY}}}'.encode()), InvalidStreamError),
    "an error event": (Answer(events=[data_event(REFUSED)]), StreamError),
    "an error event, as a code": (Answer(events=[data_event({"error": {"code": KEY}})]), StreamError),
    "an error event, as a request id": (
        Answer(events=[data_event({"error": {"message": "x"}, "request_id": KEY})]),
        StreamError,
    ),
    "an event named error": (Answer(events=[data_event({"message": KEY}, "error")]), StreamError),
    "a redirect": (
        Answer(status=302, headers={"Location": f"https://x.example/{KEY}?key={KEY}#{KEY}"}, body=b""),
        InvalidRequestError,
    ),
    "a redirect with a user": (
        Answer(status=307, headers={"Location": f"https://{KEY}:{KEY}@x.example/"}, body=b""),
        InvalidRequestError,
    ),
    "a lost stream": (Answer(cut_at=150), StreamInterrupted),
    "a dropped request": (Answer(drop=True), ConnectError),
    "an encoding that is none": (
        Answer(body=KEY.encode(), headers={"Content-Encoding": "gzip"}, framing="length"),
        InvalidStreamError,
    ),
}


@pytest.mark.parametrize("name", REPEATING)
def test_an_error_does_not_show_the_key_that_the_server_repeats(server, asking, name):
    answer, kind = REPEATING[name]
    server.answer(answer)
    error = raised(asking())
    assert isinstance(error, kind)
    assert hides(error)
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("name", ["401", "200, a JSON error", "200, broken JSON", "a redirect", "a lost stream"])
def test_complete_does_not_show_it_either(server, asking, name):
    server.answer(REPEATING[name][0])
    with pytest.raises(SheepError) as caught:
        asking().complete("Good day?")
    assert hides(caught.value)


@pytest.mark.parametrize("name", ["401", "401, the whole header", "200, HTML", "an error event"])
@pytest.mark.parametrize("header", ["Authorization", "x-api-key", "X-Goog-Api-Key"])
def test_a_key_in_a_header_of_ones_own_is_hidden_too(server, asking, name, header):
    server.answer(REPEATING[name][0])
    value = f"Bearer {KEY}" if header == "Authorization" else KEY
    error = raised(asking(api_key=None, headers={header: value}))
    assert hides(error)
    assert server.requests[0].headers[header] == value


def test_a_short_key_is_hidden_too(server, asking):

    server.answer(error_answer(401, "Incorrect API key provided: s3cret7"))
    assert hides(raised(asking(api_key="s3cret7")), "s3cret7")


def test_a_key_in_the_headers_of_a_session_of_ones_own_is_hidden_too(server, asking):

    with requests.Session() as session:
        session.headers["Authorization"] = f"Bearer {KEY}"
        server.answer(error_answer(401, f"Bad key {KEY}"), error_answer(401, f"Bad key {KEY}"))
        assert hides(raised(asking(session=session, api_key=False)))
        assert PIECE not in repr(asking(session=session, api_key=False).check())
        assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"


GATEWAY_HEADERS = ["cf-aig-authorization", "Helicone-Auth", "Ocp-Apim-Subscription-Key", "X-Auth-Token"]


@pytest.mark.parametrize("header", GATEWAY_HEADERS)
def test_a_key_in_a_gateways_header_is_hidden_and_does_not_replace_the_providers(server, asking, header):
    server.answer(error_answer(401, f"Bad key {SECRET}"))
    error = raised(asking(headers={header: f"Bearer {SECRET}"}))
    assert hides(error, SECRET)
    assert server.requests[0].headers[header] == f"Bearer {SECRET}"
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"


def test_what_an_error_says_beside_the_key_stays(server, asking):
    server.answer(error_answer(401, f"Incorrect API key provided: {KEY}. See the manual"))
    error = raised(asking())
    assert "Incorrect API key provided: [hidden]. See the manual" in str(error)
    assert error.response.json()["error"]["message"] == "Incorrect API key provided: [hidden]. See the manual"
    assert error.request.headers["Authorization"] == "[hidden]"


def test_the_headers_of_an_error_that_are_no_key_stay(server, asking):
    server.answer(error_answer(401))
    error = raised(asking(headers={"X-Own": "yes"}))
    assert error.request.headers["X-Own"] == "yes"
    assert error.request.headers["X-Request-ID"]


@pytest.mark.parametrize("left", [9, 12, 20])
def test_a_key_that_a_quotation_cuts_is_not_shown_in_part(server, asking, left):
    page = "<p>" + "x" * (197 - left) + KEY + "</p>"
    server.answer(Answer(status=500, body=page.encode(), content_type="text/html"))
    error = raised(asking())
    assert "x..." not in str(error)  # the quotation goes on into the key
    assert hides(error, KEY[:8])


def test_a_key_at_the_end_of_what_is_read_of_a_body_is_not_shown_in_part(server, asking):
    page = b"x" * (sheepsse._ERROR_BODY - 15) + KEY.encode()
    server.answer(Answer(status=500, body=page, content_type="text/html"))
    assert PIECE not in raised(asking()).response.text


# Failures of the connection


def test_a_refused_connection_does_not_show_the_key(asking):
    error = raised(asking(base_url=f"http://127.0.0.1:{closed_port()}/v1"))
    assert type(error) is ConnectError
    assert hides(error)


def test_a_name_that_is_not_found_does_not_show_the_key(asking):
    assert hides(raised(asking(base_url="http://nothing.invalid/v1")))


@pytest.mark.parametrize("answer", [Answer(delay=30), Answer(stall_after=2), Answer(header_pace=0.05)])
def test_a_time_out_does_not_show_the_key(server, asking, answer):
    server.answer(answer)
    error = raised(asking(timeout=(1, 0.1)), deadline=0.15)
    assert type(error) is StreamTimeout
    assert hides(error)


@pytest.mark.parametrize("cut", ["fin", "reset"])
@pytest.mark.parametrize("framing", ["chunked", "length", "close", "gzip"])
def test_a_cut_stream_does_not_show_the_key(server, asking, framing, cut):
    server.answer(Answer(framing=framing, cut_after=3, cut=cut))
    error = raised(asking(), resume="never")
    assert type(error) is StreamInterrupted
    assert hides(error)


def test_a_cancelled_stream_does_not_show_the_key(server, asking):
    stream = asking().stream("Good day?")
    next(stream)
    stream.cancel()
    with pytest.raises(sheepsse.StreamCancelled) as caught:
        list(stream)
    assert hides(caught.value)


def test_a_failure_after_tries_does_not_show_the_key(server, asking):
    server.answer(error_answer(503, KEY), Answer(drop=True), Answer(cut_after=1), error_answer(503, KEY))
    error = raised(asking(retry=Retry(3, base_delay=0)))
    assert len(server.requests) == 4
    assert hides(error)


def test_a_session_of_ones_own_does_not_show_the_key_either(server, asking):
    with requests.Session() as session:
        client = asking(session=session)
        for name in ("401", "200, a JSON error", "a redirect", "a lost stream", "a dropped request"):
            server.answer(REPEATING[name][0])
            assert hides(raised(client))


# Hooks


def test_the_errors_that_hooks_are_given_do_not_show_the_key(server, asking):
    seen = []
    policy = Retry(
        4,
        sleep=lambda seconds: None,
        should_retry=lambda error, attempt: seen.append(error) or True,
        on_retry=lambda error, attempt, delay: seen.append(error),
        on_give_up=lambda error, attempt: seen.append(error),
    )
    passing = {"error": {"message": KEY, "type": "server_error", "code": KEY}}
    server.answer(
        error_answer(503, f"Overloaded by {KEY}"),
        Answer(drop=True),
        Answer(events=[data_event(passing)]),
        error_answer(429, f"Too fast, {KEY}", code=KEY),
        error_answer(401, f"Bad key {KEY}"),
    )
    raised(asking(retry=policy))
    assert len(seen) == 9
    for error in seen:
        assert hides(error)


# What goes wrong before anything is sent


# requests quotes the value with its line end escaped; where it lets the value pass, http.client quotes it
@pytest.mark.parametrize("value", ["Bearer {}\n", "Bearer {}\r\n", "Bearer {}\nX-Other: 1", " Bearer {}"])
def test_a_key_in_a_header_that_cannot_be_sent_is_not_shown(server, asking, value):
    error = raised(asking(api_key=None, headers={"Authorization": value.format(KEY)}))
    assert type(error) is InvalidRequestError
    assert hides(error)
    assert server.requests == []


# a UnicodeEncodeError holds the whole value, and its repr() shows it escaped
@pytest.mark.parametrize("value", ["Bearer {}ключ", "Bearer \u200b{}", "Bearer {}\u2028"])
def test_a_key_beside_characters_that_cannot_be_sent_is_not_shown(server, asking, value):
    error = raised(asking(api_key=None, headers={"Authorization": value.format(KEY)}))
    assert type(error) is InvalidRequestError
    assert hides(error)
    assert server.requests == []


@pytest.mark.parametrize("key", [f"{KEY}\nX: 1", f"{KEY} {KEY}", f"{KEY}ключ", f"\x00{KEY}", f"{KEY}\u200b"])
def test_a_key_that_cannot_be_one_is_refused_without_being_shown(server, asking, key):
    with pytest.raises(AuthenticationError) as caught:
        asking(api_key=key).stream("Good day?")
    assert "api_key is no API key" in str(caught.value)
    assert hides(caught.value)
    assert server.requests == []


def test_a_key_from_a_file_may_end_in_a_newline(server, asking):
    assert asking(api_key=f"  {KEY}\r\n").complete("Good day?").text == TEXT
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("key", ["", "  ", "YOUR_API_KEY", "your-key-here", "<api key>", "changeme", None])
def test_a_missing_or_placeholder_key_sends_nothing(server, asking, key):
    with pytest.raises(AuthenticationError, match="api_key=False is for servers that take none"):
        asking(api_key=key).stream("Good day?")
    assert server.requests == []
    assert server.connections == 0
    health = asking(api_key=key).check()
    assert (health.ok, health.status) == (False, "no_key")
    assert server.connections == 0


@pytest.mark.parametrize("value", [None, "", "YOUR_KEY", f"{KEY}\nX: 1"])
def test_an_environment_without_a_proper_key_sends_nothing_and_says_which_variable_to_set(monkeypatch, value):
    if value is not None:
        monkeypatch.setenv("DEEPSEEK_API_KEY", value)
    with sheepsse.Client("deepseek") as client:
        with pytest.raises(AuthenticationError, match="DEEPSEEK_API_KEY") as caught:
            client.stream("Good day?", model="deepseek-chat")
    assert hides(caught.value)


def test_a_key_of_the_environment_goes_to_no_other_host(server, monkeypatch):
    keyed = {name: row.key_variable for name, row in sheepsse.PROVIDERS.items() if row.key_variable}
    for variable in keyed.values():
        monkeypatch.setenv(variable, KEY)
    for provider in (None, *keyed):
        with sheepsse.Client(provider, base_url=server.base_url) as client:
            with pytest.raises(AuthenticationError) as caught:
                client.stream("Good day?", model="m")
            assert client.check().status == "no_key"
        assert hides(caught.value)
    assert server.connections == 0


# URLs that hold something secret


@pytest.mark.parametrize(
    "base_url",
    [
        f"127.0.0.1:1/v1?key={SECRET}",
        f"ftp://user:{SECRET}@127.0.0.1/v1",
        f"user:{SECRET}@127.0.0.1/v1",
        f"http://user:{SECRET}@[broken/v1",
        f"http://user:{SECRET}@127.0.0.1:0/v1",
    ],
)
def test_a_base_url_that_cannot_be_used_is_refused_without_what_is_secret_in_it(base_url):
    with pytest.raises(InvalidRequestError, match="expected a base_url like") as caught:
        sheepsse.Client(base_url=base_url)
    assert hides(caught.value, SECRET)


def test_a_key_in_the_place_of_the_providers_name_is_not_shown():
    with pytest.raises(InvalidRequestError, match="no provider") as caught:
        sheepsse.Client(KEY)
    assert hides(caught.value)


@pytest.mark.parametrize("name", ["code", "auth", "password", "access"])
def test_a_secret_in_the_query_is_hidden_whatever_it_is_called(server, asking, name):
    server.answer(error_answer(401, f"No such {SECRET}"))
    assert hides(raised(asking(base_url=f"{server.base_url}?{name}={SECRET}", api_key=False)), SECRET)


ENCODED = f"%2F%2B%2B{SECRET}%3D"


@pytest.fixture(params=["password", "key", "encoded"])
def secret_url(request):
    """A function that puts something secret into a base URL, and that"""

    def make(origin):
        scheme, _, host = origin.partition("://")
        return {
            "password": f"{scheme}://user:{SECRET}@{host}/v1",
            "key": f"{origin}/v1?api-version=1&key={SECRET}",
            "encoded": f"{origin}/v1?sig={ENCODED}",
        }[request.param]

    return make


@pytest.mark.parametrize("answer", [error_answer(401, "No"), Answer(cut_after=2)], ids=["401", "cut"])
def test_a_secret_in_the_base_url_is_not_shown_by_an_error(server, asking, secret_url, answer):
    server.answer(answer)
    assert hides(raised(asking(base_url=secret_url(server.origin), api_key=False)), SECRET)


@pytest.mark.parametrize("answer", [error_answer(401, "No"), Answer(cut_after=2)], ids=["401", "cut"])
def test_a_secret_in_the_base_url_is_in_no_url_that_an_error_has(server, asking, secret_url, answer):
    server.answer(answer)
    error = raised(asking(base_url=secret_url(server.origin), api_key=False))
    assert SECRET not in error.response.url
    assert SECRET not in "".join(request.url for request in requests_of(error))


def test_a_short_password_in_the_base_url_is_in_no_url_that_an_error_has(server, asking):

    server.answer(error_answer(401, "No"))
    error = raised(asking(base_url=server.base_url.replace("://", "://user:hunter2@"), api_key=False))
    assert "hunter2" not in error.response.url
    assert "hunter2" not in "".join(request.url for request in requests_of(error))


def test_a_secret_in_the_base_url_is_not_shown_where_the_server_repeats_it(server, asking, secret_url):
    base_url = secret_url(server.origin)
    server.answer(error_answer(401, f"No such address as {base_url}, which is {unquote(base_url)}"))
    assert SECRET not in str(raised(asking(base_url=base_url, api_key=False)))


def test_a_secret_in_the_base_url_is_not_shown_by_a_failed_connection(asking, secret_url):
    base_url = secret_url(f"http://127.0.0.1:{closed_port()}")
    assert hides(raised(asking(base_url=base_url, api_key=False)), SECRET)


def test_a_secret_in_the_base_url_is_in_no_log_line_of_ours(server, asking, secret_url, caplog):
    asking(base_url=secret_url(server.origin), api_key=False).complete("Good day?")
    lines = [record.getMessage() for record in caplog.records if record.name == "sheepsse"]
    assert lines
    assert SECRET not in "".join(lines)


def test_a_secret_in_the_base_url_is_in_no_repr(server, asking, secret_url):
    client = asking(base_url=secret_url(server.origin), api_key=False)
    stream = client.stream("Good day?")
    list(stream)
    assert SECRET not in repr(client) + repr(stream) + repr(client.check()) + repr(stream.response)


# Reprs, logs, output


def test_no_repr_shows_the_key(server, asking):
    client = asking()
    stream = client.stream("Good day?")
    shown_of = [repr(client), str(client), repr(stream)]
    list(stream)
    shown_of += [repr(stream), repr(stream.response), repr(stream.stats), repr(stream.completion), repr(client.check())]
    assert PIECE not in "".join(shown_of)
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"


def test_what_a_stream_is_made_of_does_not_show_the_key_in_a_debuggers_list_of_locals(asking):
    stream = asking(headers={"x-api-key": KEY}, api_key=None).stream("Good day?")
    assert PIECE not in "".join(map(repr, [*vars(stream).values(), *vars(stream._sender).values()]))
    assert PIECE not in repr(asking()._target("m", {}))


def test_the_request_of_a_streams_response_shows_no_key(server, asking):
    stream = asking().stream("Good day?")
    list(stream)
    assert stream.response.request.headers["Authorization"] == "[hidden]"
    assert stream.response.request is stream.response.request


def test_the_request_id_of_a_stream_shows_no_key(server, asking):
    server.answer(Answer(headers={"x-request-id": f"req-{KEY}"}))
    stream = asking().stream("Good day?")
    list(stream)
    assert PIECE not in stream.request_id


def test_no_log_line_shows_the_key_however_a_call_goes(server, asking, caplog):
    passing = {"error": {"message": KEY, "type": "server_error"}}
    server.answer(error_answer(503, KEY), Answer(drop=True), Answer(events=[data_event(passing)]), Answer(cut_after=3))
    error = raised(asking(retry=Retry(3, base_delay=0)))
    assert type(error) is StreamInterrupted
    assert len([record for record in caplog.records if record.name == "sheepsse"]) > 8
    assert "WARNING" in [record.levelname for record in caplog.records]


def test_a_vendors_code_that_is_the_key_is_in_no_log_line(server, asking, caplog):
    server.answer(Answer(events=[data_event({"error": {"message": "x", "type": "server_error", "code": KEY}})]))
    asking(retry=Retry(1, base_delay=0)).complete("Good day?")
    assert PIECE not in caplog.text


def command(*arguments, **environment):
    """What the command prints on both its outputs"""
    home = pathlib.Path(sheepsse.__file__).parent
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
    paths = os.pathsep.join(filter(None, [str(home), kept.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "sheepsse", "Good day?", "-m", "m", *arguments],
        capture_output=True,
        env={**kept, "PYTHONPATH": paths, **environment},
        timeout=HANG,
        check=False,
    )
    assert done.returncode in (1, 3)
    assert b"Traceback" not in done.stderr
    return (done.stdout + done.stderr).decode()


SPOKEN = [*chat_events(["So ", "far"], finish=None, done=False), data_event(REFUSED)]


@pytest.mark.parametrize(
    "answer",
    [REPEATING["401"][0], REPEATING["401, in a request id"][0], Answer(events=SPOKEN), Answer(events=SPOKEN[:-1])],
    ids=["401", "401, in a request id", "an error event after words", "a lost stream"],
)
@pytest.mark.parametrize("options", [(), ("--json", "--stats")], ids=["text", "json"])
def test_the_command_does_not_print_the_key(server, answer, options):
    server.default = answer
    where = ("--base-url", server.base_url, "--key-variable", "OWN_KEY", "--timeout", "20")
    printed = command(*where, *options, OWN_KEY=KEY)
    assert PIECE not in printed
    assert printed
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"


def test_the_command_does_not_print_the_key_of_an_address_that_cannot_be_used():
    assert PIECE not in command("--base-url", f"127.0.0.1/v1?key={KEY}", "--no-key")


# check()


REACHED = ["401", "401, as HTML", "401, in a request id", "200, HTML", "a redirect", "a dropped request"]


@pytest.mark.parametrize("name", REACHED)
def test_check_does_not_show_the_key(server, asking, name):
    server.answer(REPEATING[name][0])
    health = asking().check()
    assert PIECE not in repr(health)
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("header", ["Authorization", "x-api-key"])
def test_check_does_not_show_a_key_in_a_header_of_ones_own(server, asking, header):
    server.answer(error_answer(401, f"Bad key {KEY}"))
    health = asking(api_key=None, headers={header: f"Bearer {KEY}"}).check()
    assert health.status == "bad_key"
    assert PIECE not in repr(health)


def test_check_of_what_cannot_be_reached_does_not_show_the_key(asking):
    health = asking(base_url=f"http://127.0.0.1:{closed_port()}/v1").check()
    assert health.status == "unreachable"
    assert PIECE not in repr(health)


def test_check_with_a_header_that_cannot_be_sent_does_not_show_the_key(asking):
    health = asking(api_key=None, headers={"Authorization": f"Bearer {KEY}\n"}).check()
    assert PIECE not in repr(health)


# .netrc


@pytest.fixture
def netrc(tmp_path, monkeypatch):
    """A .netrc with an entry for every host"""
    path = tmp_path / "netrc"
    path.write_text("machine 127.0.0.1 login user password word\ndefault login user password word\n")
    monkeypatch.setenv("NETRC", str(path))


@pytest.mark.usefixtures("netrc")
def test_a_netrc_entry_does_not_replace_the_key(server, asking):
    list(asking().stream("Good day?"))
    asking().complete("Good day?")
    asking().check()
    assert [request.headers["Authorization"] for request in server.requests] == [f"Bearer {KEY}"] * 3


@pytest.mark.usefixtures("netrc")
def test_a_netrc_entry_does_not_replace_a_key_in_a_header_of_ones_own(server, asking):
    asking(api_key=None, headers={"authorization": f"Bearer {KEY}"}).complete("Good day?")
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"


@pytest.mark.usefixtures("netrc")
def test_a_netrc_entry_does_not_replace_it_in_check(server, asking):
    asking(api_key=None, headers={"Authorization": f"Bearer {KEY}"}).check()
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"


@pytest.mark.usefixtures("netrc")
def test_a_netrc_entry_is_not_sent_beside_a_key_in_another_header(server, asking):
    asking(api_key=None, headers={"x-api-key": KEY}).complete("Good day?")
    assert server.requests[0].headers["x-api-key"] == KEY
    assert server.requests[0].headers["Authorization"] is None


@pytest.mark.usefixtures("netrc")
def test_a_netrc_entry_does_not_replace_the_key_in_a_session_of_ones_own(server, asking):
    with requests.Session() as session:
        session.auth = ("user", "word")
        asking(session=session).complete("Good day?")
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"


def test_a_user_in_the_base_url_does_not_replace_the_key(server, asking):
    asking(base_url=server.base_url.replace("://", "://user:word@")).complete("Good day?")
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"


# Redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_client_takes_the_key_nowhere_it_is_redirected_to(server, asking, status):
    with LocalProvider() as elsewhere, requests.Session() as session:
        server.default = Answer(status=status, headers={"Location": elsewhere.base_url + "/models"}, body=b"")
        for client in (asking(), asking(session=session)):
            assert hides(raised(client))
            assert client.check().ok is False
        assert elsewhere.connections == 0


@pytest.mark.parametrize("own", [False, True], ids=["", "session of one's own"])
@pytest.mark.parametrize("header", [None, "x-api-key"])
def test_the_request_that_a_redirect_leads_to_is_not_kept_with_the_key_in_it(server, asking, header, own):
    # requests prepares it though it is not sent, and keeps it as the response's `next`
    server.answer(Answer(status=307, headers={"Location": "/there"}, body=b""))
    options = {} if header is None else {"api_key": None, "headers": {header: KEY}}
    with requests.Session() as session:
        error = raised(asking(session=session if own else None, **options))
    following = error.response.next
    assert following is None or PIECE not in repr(following.headers)


# What lies behind an error


@pytest.mark.parametrize("name", ["200, no JSON", "200, broken JSON", "a dropped request", "a lost stream"])
def test_what_lies_behind_an_error_does_not_hold_the_key(server, asking, name):
    # a JSONDecodeError keeps the document that it could not read, as its `doc`
    server.answer(REPEATING[name][0])
    for error in causes(raised(asking())):
        assert PIECE not in repr(vars(error))


# iter_sse


@pytest.mark.parametrize("name", ["401", "401, as HTML", "200, a type of content", "a dropped request"])
def test_an_error_of_iter_sse_does_not_show_the_key_in_its_headers(server, name):
    server.answer(REPEATING[name][0])
    with pytest.raises(SheepError) as caught:
        list(sheepsse.iter_sse(server.origin, headers={"Authorization": f"Bearer {KEY}"}, reconnect=False))
    assert hides(caught.value)


def test_an_error_of_iter_sse_does_not_show_the_query_of_its_url_in_its_message(server):
    for answer in (error_answer(404), Answer(body=b"", content_type="text/html"), Answer(drop=True)):
        server.answer(answer)
        with pytest.raises(SheepError) as caught:
            list(sheepsse.iter_sse(f"{server.origin}/?key={SECRET}", reconnect=False))
        assert SECRET not in str(caught.value)
