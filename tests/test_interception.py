"""Section 8, among other libraries: what intercepts requests, gevent, eventlet, niquests; where it is installed"""

import contextlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import textwrap
import time
import types

import pytest
import requests

import sheepsse
from conftest import HANG, asking, in_another_thread, read, until
from local_provider import TEXT, Answer, chat_events, error_answer, split_words

KEY = "sk-test-0123456789abcdef"
URL = "http://llm.test/v1"
WORDS = split_words(TEXT)
BODY = b"".join(chat_events(WORDS))
EXAMPLES = pathlib.Path(sys.modules["local_provider"].__file__).parent


def needs(*names):
    """Skips a test where one of these modules is not there"""
    missing = any(importlib.util.find_spec(name) is None for name in names)
    what = "niquests and hypercorn, in an environment of their own" if "niquests" in names else "the extra 'mocks'"
    return pytest.mark.skipif(missing, reason=f"needs {what}")


def ask(base_url=URL, **options):
    with sheepsse.Client(base_url=base_url, api_key=KEY, model="m", retry=0, **options) as client:
        return "".join(client.stream("Go"))


@pytest.fixture
def no_network(monkeypatch):
    """A real connection fails the test"""

    def refuse(*args, **options):
        raise AssertionError("a real connection")

    return lambda: monkeypatch.setattr("socket.getaddrinfo", refuse)


@needs("vcr")
@pytest.mark.parametrize("when", ["client made inside", "client made before, and used"])
def test_vcrpy_records_and_plays_and_refuses_what_it_has_not(server, tmp_path, when):
    import vcr

    path = str(tmp_path / "cassette.yaml")
    with contextlib.ExitStack() as stack:
        client = None
        if when != "client made inside":
            client = stack.enter_context(sheepsse.Client(base_url=server.base_url, api_key=KEY, model="m", retry=0))
            list(client.stream("Before"))
        count = len(server.requests)

        def go(prompt="Go"):
            with contextlib.ExitStack() as inner:
                used = client or inner.enter_context(
                    sheepsse.Client(base_url=server.base_url, api_key=KEY, model="m", retry=0)
                )
                return "".join(used.stream(prompt))

        with vcr.use_cassette(path, record_mode="once", match_on=["method", "uri", "body"]):
            assert go() == TEXT
        assert len(server.requests) == count + 1
        with vcr.use_cassette(path, record_mode="none", match_on=["method", "uri", "body"]):
            assert go() == TEXT
            with pytest.raises((vcr.errors.CannotOverwriteExistingCassetteException, sheepsse.SheepError)):
                go("Something else")
        assert len(server.requests) == count + 1


@needs("vcr")
def test_a_stream_that_vcrpy_plays_can_be_cancelled(server, tmp_path):
    import vcr

    for mode in ("once", "none"):
        with vcr.use_cassette(str(tmp_path / "cassette.yaml"), record_mode=mode):
            with sheepsse.Client(base_url=server.base_url, api_key=KEY, model="m", retry=0) as client:
                stream = client.stream("Go")
                assert next(stream) == WORDS[0]
                stream.cancel()
                assert isinstance(read(stream)[1], sheepsse.StreamCancelled)


@needs("requests_mock")
def test_requests_mock_stands_in_for_the_network(no_network):
    import requests_mock

    no_network()
    with requests_mock.Mocker() as mock:
        mock.post(f"{URL}/chat/completions", content=BODY, headers={"Content-Type": "text/event-stream"})
        assert ask() == TEXT
        assert mock.last_request.json()["model"] == "m"
        assert mock.last_request.headers["Authorization"] == f"Bearer {KEY}"
        mock.post(f"{URL}/chat/completions", status_code=401, json={"error": {"message": "No"}})
        with pytest.raises(sheepsse.AuthenticationError):
            ask()


@needs("httmock")
def test_httmock_stands_in_for_the_network(no_network):
    import httmock

    no_network()

    @httmock.all_requests
    def answer(url, request):
        assert json.loads(request.body)["model"] == "m"
        return httmock.response(200, BODY, {"Content-Type": "text/event-stream"}, request=request)

    with httmock.HTTMock(answer):
        assert ask() == TEXT


@needs("pook")
def test_pook_stands_in_for_the_network(no_network):
    import pook

    no_network()
    with pook.use():
        pook.post(f"{URL}/chat/completions", reply=200, response_headers={"Content-Type": "text/event-stream"}).reply(
            200
        ).body(BODY)
        assert ask() == TEXT


@pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")  # of betamax
@needs("betamax")
def test_betamax_records_and_plays_by_a_session_of_ones_own(server, tmp_path):
    import betamax

    for mode in ("once", "none"):
        with requests.Session() as session:
            recorder = betamax.Betamax(session, cassette_library_dir=str(tmp_path))
            with recorder.use_cassette("answer", record=mode):
                assert ask(server.base_url, session=session) == TEXT
    assert len(server.requests) == 1


@needs("pytest_httpserver")
def test_pytest_httpserver_is_a_server_as_any():
    from pytest_httpserver import HTTPServer

    with HTTPServer() as server:
        server.expect_request("/v1/chat/completions", method="POST").respond_with_data(
            BODY, content_type="text/event-stream"
        )
        assert ask(server.url_for("/v1")) == TEXT


def test_responses_stands_in_for_the_network(no_network):
    import responses

    no_network()
    with responses.RequestsMock() as mock:
        mock.post(f"{URL}/chat/completions", body=BODY, content_type="text/event-stream")
        assert ask() == TEXT
        mock.post(f"{URL}/chat/completions", body=requests.ConnectionError("down"))
        with pytest.raises(sheepsse.ConnectError, match="down"):
            ask()


# Green threads: each in a process of its own, which it patches

GREEN = """
    import sys, threading
    sys.path.insert(0, {examples!r})
    {before}
    import sheepsse
    {after}
    client = sheepsse.Client(base_url={url!r}, api_key=False, model="m", retry=0)
    print(repr(sheepsse.Client))
    {body}
"""
PATCHES = {
    "gevent": "from gevent import monkey; monkey.patch_all()",
    "eventlet": "import eventlet; eventlet.monkey_patch()",
}
each_green = pytest.mark.parametrize("green", [pytest.param(name, marks=needs(name)) for name in PATCHES])


def in_green(server, green, body, before=True):
    patch = PATCHES[green]
    code = textwrap.dedent(GREEN).format(
        examples=str(EXAMPLES),
        url=server.base_url,
        before=patch if before else "",
        after="" if before else patch,
        body=textwrap.dedent(body).strip(),
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        timeout=HANG,
        cwd=pathlib.Path(sheepsse.__file__).parent,
        env={**os.environ, "EVENTLET_HUB": "poll"},
    )
    return done.stdout.decode() + done.stderr.decode()


@each_green
def test_green_threads_read_at_once_and_their_clients_leave_one_another_alone(server, green):
    # each waits for the others amid its answer: only if all are read together do they end
    server.default = Answer(stall_after=4)
    body = """
        streams = [client.stream(str(number)) for number in range(5)]
        came, all_there = [], threading.Event()
        def read(stream):
            came.append(next(stream))
            if len(came) == 5:
                all_there.set()
            assert all_there.wait(30)
            stream.cancel()
            try:
                list(stream)
            except sheepsse.StreamCancelled as error:
                came.append(error.partial.text)
        threads = [threading.Thread(target=read, args=(stream,)) for stream in streams]
        [thread.start() for thread in threads]
        [thread.join(30) for thread in threads]
        print("read", len(came))
    """
    assert "read 10" in in_green(server, green, body)
    server.release()


@each_green
def test_a_green_thread_can_be_cancelled_while_it_waits(server, green):
    server.default = Answer(stall_after=3)
    body = """
        stream = client.stream("Go")
        next(stream)
        ended = []
        def read():
            try:
                list(stream)
            except sheepsse.StreamCancelled as error:
                ended.append("cancelled after " + repr(error.partial.text))
        thread = threading.Thread(target=read)
        thread.start()
        threading.Event().wait(0.1)
        stream.cancel()
        thread.join(30)
        print(ended)
        stream = client.stream("Go")
        next(stream)
        stream.close()
        print("left", list(stream))
    """
    said = in_green(server, green, body)
    assert "cancelled after" in said
    assert "left []" in said
    server.release()


@each_green
def test_the_relay_works_on_green_threads(server, green):
    server.default = Answer()
    body = """
        blocks = b"".join(sheepsse.relay(client.stream("Go")))
        print(blocks.decode())
        relay = sheepsse.relay(client.stream("Go"))
        next(relay)
        relay.close()
        print("closed", list(relay))
    """
    said = in_green(server, green, body)
    assert "event: done" in said
    assert "closed []" in said


@each_green
def test_patching_after_the_import_is_an_error_that_says_in_which_order(server, green):
    said = in_green(server, green, 'list(client.stream("Go"))', before=False)
    assert "patch first, then import" in said
    assert not server.requests


# niquests, which puts urllib3-future in urllib3's place


@needs("niquests")
@pytest.mark.parametrize("whose", ["niquests", "ours"])
def test_with_niquests_installed_streams_are_read_and_end_in_time(server, whose):
    import niquests

    with contextlib.ExitStack() as stack:
        options = {"session": stack.enter_context(niquests.Session())} if whose == "niquests" else {}
        client = stack.enter_context(asking(server, **options))
        assert list(client.stream("Go")) == WORDS
        server.answer(error_answer(401))
        assert isinstance(read(client.stream("Go"))[1], sheepsse.AuthenticationError)
        server.answer(Answer(stall_after=3))
        came, error = read(client.stream("Go", timeout=(5, 0.3), resume="never"))
        assert (came, type(error)) == (WORDS[:2], sheepsse.StreamTimeout)
        server.answer(Answer(stall_after=3))
        stream = client.stream("Go")
        assert next(stream) == WORDS[0]
        stream.cancel()
        assert isinstance(read(stream)[1], sheepsse.StreamCancelled)
    server.release()


H2 = """
    async def app(scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        import asyncio
        head = [(b"content-type", b"text/event-stream"), (b"x-version", scope["http_version"].encode())]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        for event in EVENTS:
            await send({"type": "http.response.body", "body": event, "more_body": True})
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b""})
"""


@needs("niquests", "hypercorn")
def test_http_2_through_niquests(tmp_path):
    import niquests
    import trustme

    authority = trustme.CA()
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    (tmp_path / "served.py").write_text(f"EVENTS = {chat_events(WORDS)!r}\n" + textwrap.dedent(H2))
    pem = str(tmp_path / "server.pem")
    command = ["-m", "hypercorn", "--bind", "127.0.0.1:0", "--certfile", pem, "--keyfile", pem, "served:app"]
    with subprocess.Popen([sys.executable, *command], cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        try:
            port = next(line for line in process.stderr if "Running on" in line).split(":")[-1].split()[0]
            with niquests.Session() as session:
                verify = str(tmp_path / "authority.pem")
                url = f"https://localhost:{port}/v1"
                client = sheepsse.Client(base_url=url, api_key=False, session=session, verify=verify)
                stream = client.stream("Go", model="m")
                assert list(stream) == WORDS
                assert stream.response.headers["x-version"] == "2"
        finally:
            process.kill()


@needs("curl_cffi")
def test_a_session_of_another_shape_is_an_error_that_says_what_is_needed(server):
    import curl_cffi.requests

    with curl_cffi.requests.Session() as session, asking(server, session=session, api_key=KEY) as client:
        with pytest.raises(TypeError, match=r"not shaped like a requests.Session.*curl_cffi"):
            list(client.stream("Go"))


@pytest.mark.parametrize("takes", [("method", "url"), ("method", "url", "**options")], ids=", ".join)
def test_what_is_no_session_is_an_error_that_says_what_is_needed(server, takes):
    class Other:
        request = eval(f"lambda self, {', '.join(takes)}: object()")

    with asking(server, session=Other()) as client:
        with pytest.raises(TypeError, match=r"stream, timeout, headers, auth and allow_redirects"):
            list(client.stream("Go"))
    assert server.requests == []


def test_a_type_error_of_a_session_of_requests_stays_as_it_is(server):
    class Own(requests.Session):
        def request(self, *args, **options):
            raise TypeError("mine")

    with Own() as session, asking(server, session=session) as client:
        with pytest.raises(TypeError, match="^mine$"):
            list(client.stream("Go"))


def test_a_stream_is_cancelled_whose_connection_is_no_socket(server):
    class Other(requests.Session):
        def request(self, *args, **options):
            response = super().request(*args, **options)
            response.raw._connection = Connection(response.raw._connection)
            return response

    class Connection:
        def __init__(self, plain):
            self.plain, self.sock = plain, types.SimpleNamespace(settimeout=plain.sock.settimeout)

        def __getattr__(self, name):
            return getattr(self.plain, name)

    server.default = Answer(stall_after=3)
    with Other() as session, asking(server, session=session) as client:
        stream = client.stream("Go")
        next(stream)

        def cancel():
            assert until(lambda: len(server.sent_at) >= 3)
            time.sleep(0.05)  # it should be in its recv by then; wherever it is, the test holds
            stream.cancel()
            server.release()

        with in_another_thread(cancel), pytest.raises(sheepsse.StreamCancelled):
            list(stream)


def test_a_socket_that_raises_for_any_attribute_is_closed_already():
    class Closed:  # as gevent's are
        def __getattr__(self, name):
            raise OSError(9, "Bad file descriptor")

    wire = sheepsse._Wire()
    wire.attach(Closed())
    wire.end("closed")
    assert wire.ended == "closed"
