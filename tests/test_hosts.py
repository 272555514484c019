"""Sections 7, 8 and 11, where it lives: signals, forks, slow lines, proxies, leaking secrets, hostile bounds"""

import base64
import contextlib
import gc
import json
import os
import pickle
import signal
import socket
import ssl
import sys
import threading
import time
import traceback

import pytest
import requests
import trustme
import urllib3

import sheepsse
from conftest import HANG, PATIENT, asking, in_another_thread, read, until
from local_provider import COMMENT, TEXT, Answer, LocalProvider, chat_events, error_answer
from sheepsse import (
    CheckpointError,
    Checkpoints,
    ConnectError,
    InvalidRequestError,
    InvalidStreamError,
    Limiter,
    StreamError,
    StreamTimeout,
)

KEY = "sk-test-0123456789abcdef"


class RawServer:
    """Calls ``handle(connection, number)`` for each connection, in a thread of its own"""

    def __init__(self, handle, **options):
        self._handle, self._socket = handle, socket.create_server(("127.0.0.1", 0), **options)
        self.port = self._socket.getsockname()[1]
        self.connections = []
        self.ended = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self.connections.append(connection)
                threading.Thread(target=self._serve, args=(connection, len(self.connections)), daemon=True).start()

    def _serve(self, connection, number):
        with contextlib.suppress(OSError), connection:
            self._handle(connection, number)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.ended.set()
        for each in (self._socket, *self.connections):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def client(self, **options):
        options = {"retry": 0, **PATIENT, **options}
        return sheepsse.Client(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=False, model="m", **options)


def request_of(connection, between=lambda: None):
    """Reads one request to its end"""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(4096) or pytest.fail("no request")
    head, _, body = data.partition(b"\r\n\r\n")
    size = int(next(line[15:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")))
    while len(body) < size:
        between()
        body += connection.recv(65536) or b""
    return head, body


def answer_of(*texts):
    body = b"".join(chat_events(texts))
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


# Signals: what a handler raises is the caller's own


class OwnTimeout(TimeoutError):
    pass


class OwnReset(ConnectionResetError):
    pass


class OwnValue(ValueError):
    pass


@pytest.fixture
def alarm():
    """Has the handler of a signal raise this in the main thread; gives what sends the signal"""
    before = signal.getsignal(signal.SIGUSR1)

    def set_up(raised, as_arguments=False):
        def handler(signum, frame):
            raise raised

        def any_handler(*arguments):
            raise raised

        signal.signal(signal.SIGUSR1, any_handler if as_arguments else handler)
        return lambda: os.kill(os.getpid(), signal.SIGUSR1)

    yield set_up
    signal.signal(signal.SIGUSR1, before)


#: when the signal comes: what the server does, and whether the client waits for that now
MOMENTS = {
    "headers": (Answer(stall_at=0, delay=HANG), lambda server: bool(server.requests)),
    "the first chunk": (Answer(stall_after=0), lambda server: bool(server.requests)),
    "a chunk": (Answer(stall_after=3), lambda server: len(server.sent_at) >= 3),
    "a chunk, compressed": (Answer(stall_after=3, framing="gzip"), lambda server: len(server.sent_at) >= 3),
    "the body of an error": (error_answer(500)._replace(stall_at=5), lambda server: bool(server.requests)),
}


@pytest.mark.parametrize("session", [False, True], ids=["", "a session of one's own"])
@pytest.mark.parametrize("kind", [OwnTimeout, OwnReset, OwnValue, requests.Timeout])
@pytest.mark.parametrize("moment", MOMENTS)
def test_what_a_signal_handler_raises_reaches_the_caller_and_ends_the_call(server, alarm, moment, kind, session):
    answer, is_time = MOMENTS[moment]
    raised = kind("mine")
    server.default = answer
    ring = alarm(raised, as_arguments=session)

    def ring_in_time():
        assert until(lambda: is_time(server))
        time.sleep(0.05)  # it should be in its recv by then; wherever it is, the test holds
        ring()

    options = {"session": requests.Session()} if session else {}
    with contextlib.ExitStack() as stack:
        if session:
            stack.enter_context(options["session"])
        client = stack.enter_context(asking(server, retry=3, **PATIENT, **options))
        stream = client.stream("Go")
        with in_another_thread(ring_in_time):
            with pytest.raises(kind) as caught:
                list(stream)
        assert caught.value is raised
        assert list(stream) == []
    assert len(server.requests) == 1
    server.release()


def test_what_a_signal_handler_raises_while_a_checkpoint_is_written_reaches_the_caller(
    server, alarm, tmp_path, monkeypatch
):
    raised, write = OwnTimeout("mine"), os.write
    ring = alarm(raised)

    def write_and_ring(descriptor, data):
        ring()
        return write(descriptor, data)

    with asking(server) as client:
        stream = client.stream("Go", checkpoint=tmp_path)
        monkeypatch.setattr(os, "write", write_and_ring)
        with pytest.raises(OwnTimeout) as caught:
            list(stream)
        monkeypatch.undo()
    assert caught.value is raised


def test_a_connection_that_the_system_gave_up_is_no_time_out_of_ours(server, client, monkeypatch):
    plain = sheepsse._WireReader.readinto

    def readinto(self, buffer):
        if len(server.sent_at) >= 3:
            raise TimeoutError(110, "Connection timed out")  # what TCP says when keep-alive found nobody
        return plain(self, buffer)

    server.answer(Answer(stall_after=3))
    stream = client.stream("Go", resume="never", **PATIENT)
    assert next(stream)
    monkeypatch.setattr(sheepsse._WireReader, "readinto", readinto)
    _, error = read(stream)
    assert type(error) is sheepsse.StreamInterrupted
    server.release()


# Forks


def save_coverage():
    """os._exit() leaves no time for it"""
    coverage = sys.modules.get("coverage")
    if coverage is not None and coverage.Coverage.current() is not None:
        coverage.Coverage.current().save()


def in_a_child(function):
    """What a function gives in a forked process, as JSON can carry it"""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reader)
            result = function()
            os.write(writer, json.dumps(result).encode())
            save_coverage()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    with open(reader, "rb") as pipe:
        result = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return json.loads(result)


LEAVES = {
    "leaves": lambda stream: stream.__exit__(),
    "closes": lambda stream: stream.close(),
    "cancels": lambda stream: stream.cancel(),
    "collects": lambda stream: (stream.__del__(), gc.collect()),
}


@pytest.fixture
def tls_server(monkeypatch, tmp_path):
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "authority.pem"))
    with LocalProvider(ssl_context=context) as provider:
        yield provider


@pytest.mark.parametrize("kind", ["server", "tls_server"])
@pytest.mark.parametrize("way", LEAVES)
def test_a_child_that_leaves_its_parents_stream_leaves_it_alone(request, way, kind):
    server = request.getfixturevalue(kind)
    server.answer(Answer(stall_after=4))
    with asking(server, **PATIENT) as client:
        stream = client.stream("Go")
        came = [next(stream)]
        in_a_child(lambda: LEAVES[way](stream) and None)
        server.release()
        assert "".join(came + list(stream)) == TEXT
    assert len(server.requests) == 1


def test_a_child_that_leaves_does_not_cancel_its_parents_job(server):
    server.answer(Answer(stall_after=6))
    with asking(server, dialect="openai-responses", **PATIENT) as client:
        stream = client.stream("Go", background=True)
        came = [next(stream)]
        in_a_child(lambda: stream.close())
        server.release()
        assert "".join(came + list(stream)) == TEXT
    assert [sent.path for sent in server.requests] == ["/v1/responses"]


def test_a_child_does_not_read_its_parents_stream(server):
    server.answer(Answer(stall_after=4))
    with asking(server, **PATIENT) as client:
        stream = client.stream("Go")
        came = [next(stream)]

        def read_on():
            with pytest.raises(RuntimeError, match="before a fork"):
                next(stream)

        in_a_child(read_on)
        server.release()
        assert "".join(came + list(stream)) == TEXT


def test_parent_and_child_have_connections_of_their_own(server):
    with asking(server, **PATIENT) as client:
        waiting = client.stream("Go")
        assert "".join(client.stream("Go")) == TEXT
        assert server.connections == 1
        assert in_a_child(lambda: ["".join(client.stream("Go")), "".join(waiting)]) == [TEXT, TEXT]
        assert server.connections == 2
        assert "".join(client.stream("Go")) == TEXT
        assert server.connections == 2


def test_the_client_of_the_environment_too(server, monkeypatch):
    monkeypatch.setitem(sheepsse.PROVIDERS, "openai", sheepsse.PROVIDERS["openai"]._replace(base_url=server.base_url))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    sheepsse._default_client.cache_clear()
    try:
        ask = lambda: "".join(sheepsse.stream("Go", model="gpt-4o"))  # noqa: E731
        assert ask() == in_a_child(ask) == ask() == TEXT
        assert server.connections == 2
    finally:
        sheepsse._default_client().close()
        sheepsse._default_client.cache_clear()


def test_a_child_holds_no_slot_and_no_lock_of_its_parent():
    limiter, bucket = Limiter(1, max_queue=0), sheepsse.TokenBucket(1000, 1000)
    breaker = sheepsse.CircuitBreaker(1, 0)
    with contextlib.suppress(ConnectError), breaker.enter():
        raise ConnectError("down")
    trial, slot = breaker.enter(), limiter.acquire()
    held = [limiter._lock, bucket._lock, breaker._lock]

    def hold(ready, done):
        with contextlib.ExitStack() as stack:
            for lock in held:
                stack.enter_context(lock)
            ready.set()
            assert done.wait(HANG)

    def use_them():
        slot.release()  # which it never had
        with limiter.acquire():
            active = limiter.stats().active
        bucket.acquire()
        with breaker.enter():
            pass
        return [active, limiter.stats().active, breaker.state]

    ready, done = threading.Event(), threading.Event()
    with in_another_thread(hold, ready, done):
        assert ready.wait(HANG)
        assert in_a_child(use_them) == [1, 0, "closed"]
        done.set()
    assert limiter.stats().active == 1
    trial.end(True)
    slot.release()


# Sending and connecting


def slow_reader(between):
    def handle(connection, number):
        request_of(connection, between)
        connection.sendall(answer_of("Hello"))

    return handle


def small_buffers(handle):
    """A server that takes little before it reads"""
    server = RawServer(handle)
    server._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    return server


def test_an_upload_that_moves_is_not_late():
    with small_buffers(slow_reader(lambda: time.sleep(0.02))) as server:
        with server.client(timeout=(0.2, 10), first_timeout=None) as client:
            assert "".join(client.stream("x" * 3_000_000)) == "Hello"
    assert len(server.connections) == 1


def test_an_upload_that_stands_still_is_late_for_the_read_time_out():
    with small_buffers(lambda connection, number: server.ended.wait(HANG)) as server:
        with server.client(timeout=(10, 0.3), retry=0) as client:
            _, error = read(client.stream("x" * 8_000_000))
    assert type(error) is StreamTimeout
    assert len(server.connections) == 1


def test_the_deadline_holds_for_an_upload():
    with small_buffers(slow_reader(lambda: time.sleep(0.05))) as server:
        with server.client(retry=3) as client:
            # a second and more may go into making the body, where the machine is busy
            _, error = read(client.stream("x" * 30_000_000, deadline=4))
    assert type(error) is StreamTimeout
    assert "deadline" in str(error)
    assert len(server.connections) == 1


def test_the_time_of_an_upload_is_not_that_of_the_first_chunk(running_clock):
    def between():
        running_clock.now = 100.0  # while the client sends: more than the sockets hold is to be read yet

    with small_buffers(slow_reader(between)) as server:
        with server.client(first_timeout=50) as client:
            assert "".join(client.stream("x" * 20_000_000)) == "Hello"


@pytest.fixture
def dead_addresses(monkeypatch):
    """A name whose addresses swallow packets, as a broken IPv6 does; gives what adds a living one"""
    held, addresses, plain = [], [], socket.getaddrinfo
    for _ in range(4):
        full = socket.socket()
        held.append(full)
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(3):
            waiting = socket.socket()
            held.append(waiting)
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(full.getsockname())
        addresses.append(full.getsockname())

    def resolve(host, port, *args, **options):
        if host != "llm.test":
            return plain(host, port, *args, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    yield addresses.append
    for each in held:
        each.close()


@pytest.mark.parametrize("options", [{"timeout": (0.8, 30)}, {"deadline": 0.8}], ids=str)
def test_connecting_has_one_limit_for_all_addresses(dead_addresses, options):
    limits = []
    plain = socket.socket.settimeout
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(socket.socket, "settimeout", lambda sock, left: (limits.append(left), plain(sock, left))[1])
        with sheepsse.Client(base_url="http://llm.test/v1", api_key=False, model="m", retry=0) as client:
            _, error = read(client.stream("Go", **options))
    assert type(error) is (StreamTimeout if "deadline" in options else ConnectError)
    assert len(limits) == 4
    assert sum(limits) < 1.7  # each has a part of what is left


def test_an_address_that_swallows_packets_leaves_time_for_the_next(dead_addresses, server):
    dead_addresses(("127.0.0.1", int(server.origin.rpartition(":")[2])))
    with sheepsse.Client(base_url="http://llm.test/v1", api_key=False, model="m", retry=0, timeout=(2, 30)) as client:
        assert "".join(client.stream("Go")) == TEXT


@pytest.mark.parametrize("kind", [OwnTimeout, OwnReset, OwnValue, KeyboardInterrupt])
def test_what_a_signal_handler_raises_while_connecting_reaches_the_caller(dead_addresses, alarm, kind):
    raised, connecting = kind("mine"), threading.Event()
    ring = alarm(raised)
    plain = socket.socket.settimeout

    def settimeout(sock, seconds):
        plain(sock, seconds)
        connecting.set()

    def ring_in_time():
        assert connecting.wait(HANG)
        time.sleep(0.05)  # it should be in its connect by then; wherever it is, the test holds
        ring()

    with sheepsse.Client(base_url="http://llm.test/v1", api_key=False, model="m", retry=3, timeout=HANG) as client:
        stream = client.stream("Go")
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(socket.socket, "settimeout", settimeout)
            with in_another_thread(ring_in_time), pytest.raises(kind) as caught:
                list(stream)
    assert caught.value is raised


def test_a_dead_peer_is_found_by_keep_alive(server, client):
    stream = client.stream("Go")
    next(stream)
    sock = stream.response.raw._connection.sock
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert [
        sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL")
    ] == [60, 60]
    stream.close()


@pytest.mark.parametrize("limit", ["first_timeout", "timeout"])
def test_a_slow_provider_is_asked_once_where_another_stands_by(server, limit):
    with LocalProvider() as other:
        server.default = Answer(stall_after=0)
        limits = {"first_timeout": 0.3} if limit == "first_timeout" else {"timeout": (30, 0.3)}
        with asking(server, retry=5, **limits) as slow, asking(other) as fast:
            assert "".join(sheepsse.stream("Go", client=[slow, fast])) == TEXT
        assert (len(server.requests), len(other.requests)) == (1, 1)
        server.release()


@pytest.mark.parametrize("before", ["100 Continue", "102 Processing", "103 Early Hints"])
def test_what_comes_before_the_answer_is_skipped(before):
    def handle(connection, number):
        request_of(connection)
        early = f"HTTP/1.1 {before}\r\nLink: </style.css>; rel=preload\r\n\r\n".encode()
        connection.sendall(early * 2 + answer_of("Hello"))

    with RawServer(handle) as server, server.client() as client:
        assert "".join(client.stream("Go")) == "Hello"


# Proxies


def refusing_proxy(status, body=b"<html>Go away</html>"):
    def handle(connection, number):
        data = b""
        while b"\r\n\r\n" not in data:
            data += connection.recv(65536)
        head = f"HTTP/1.1 {status}\r\nContent-Type: text/html\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)

    return RawServer(handle)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_wants_a_login_is_named_and_not_asked_again(scheme):
    with refusing_proxy("407 Proxy Authentication Required") as proxy:
        proxies = {scheme: f"http://bob:hunter2-and-more@127.0.0.1:{proxy.port}"}
        with sheepsse.Client(base_url=f"{scheme}://llm.test/v1", api_key=False, model="m", proxies=proxies) as client:
            _, error = read(client.stream("Go", retry=sheepsse.Retry(3, base_delay=0)))
        assert (type(error), error.retryable, len(proxy.connections)) == (InvalidRequestError, False, 1)
        assert f"http://127.0.0.1:{proxy.port}" in str(error)
        assert "hunter2" not in str(error)


def test_a_page_of_a_proxy_between_us_and_this_machine_names_the_proxy(server, monkeypatch):
    with refusing_proxy("503 Service Unavailable") as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
        with asking(server) as client:
            _, error = read(client.stream("Go"))
    assert f"through the proxy http://127.0.0.1:{proxy.port}" in str(error)


#: proxies whose password no parser takes whole
PROXIES = ["http://bob:{}#x@127.0.0.1:1", "http://bob:{}/x@127.0.0.1:1", "http://bob:{}[x@127.0.0.1:1",
           "http://bob:{}@127.0.0.1:1", "bob:{}@127.0.0.1:1", "http://bob:{}%21@127.0.0.1:1"]  # fmt: skip


@pytest.mark.parametrize("given", [False, True], ids=["environment", "proxies="])
@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("proxy", PROXIES)
def test_the_password_of_a_proxy_is_shown_nowhere(monkeypatch, caplog, proxy, scheme, given):
    proxy = proxy.format("hunter2")
    options = {"proxies": {scheme: proxy}} if given else {}
    if not given:
        monkeypatch.setenv(f"{scheme}_proxy", proxy)
    caplog.set_level(0, "sheepsse")
    with sheepsse.Client(base_url=f"{scheme}://llm.test/v1", api_key=False, model="m", retry=0, **options) as client:
        _, error = read(client.stream("Go"))
    shown = "".join(traceback.TracebackException(type(error), error, error.__traceback__, capture_locals=True).format())
    ours = [
        line for line in shown.splitlines() if "hunter2" in line and "proxy = " not in line and "options = " not in line
    ]
    assert not ours
    assert "hunter2" not in repr(error) + caplog.text + str(pickle.dumps(error))


def test_options_of_a_connection_are_as_in_requests_and_never_overruled(tls_server, monkeypatch, tmp_path):
    bundle = os.environ.pop("REQUESTS_CA_BUNDLE")
    with asking(tls_server) as client, pytest.raises(ConnectError, match="certificate"):
        list(client.stream("Go"))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere")
    with asking(tls_server, verify=bundle) as client:
        assert "".join(client.stream("Go")) == TEXT
        assert client.check().ok
    options = {"model": "m", "base_url": tls_server.base_url, "api_key": False}
    assert "".join(sheepsse.stream("Go", verify=bundle, **options)) == TEXT
    with pytest.warns(urllib3.exceptions.InsecureRequestWarning):
        assert "".join(sheepsse.stream("Go", verify=False, **options)) == TEXT
    with requests.Session() as own:
        assert "".join(sheepsse.stream("Go", verify=bundle, session=own, **options)) == TEXT
    assert "verify" not in tls_server.requests[-1].json
    with pytest.raises(ConnectError):
        list(sheepsse.stream("Go", verify=bundle, cert="/nowhere.pem", retry=0, **options))


def test_proxies_that_are_given_are_all_there_are(server, monkeypatch):
    with refusing_proxy("503 Service Unavailable") as proxy:
        for name in ("http_proxy", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        for proxies in ({}, {"https": "http://127.0.0.1:1"}):
            with asking(server, proxies=proxies) as client:
                assert "".join(client.stream("Go")) == TEXT
        assert not proxy.connections


@pytest.mark.parametrize("host", ["bücher", "BÜCHER", "faß", "日本語"])
def test_international_host_names_work_as_in_requests(monkeypatch, server, host):
    names, plain, port = [], socket.getaddrinfo, int(server.origin.rpartition(":")[2])

    def resolve(name, *args, **options):
        names.append(name)
        return plain("127.0.0.1", *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    for session in (None, requests.Session()):
        with sheepsse.Client(
            base_url=f"http://{host}.test:{port}/v1", api_key=False, model="m", session=session
        ) as client:
            assert "".join(client.stream("Go")) == TEXT
        if session:
            session.close()
    assert len(set(names)) == 1
    assert names[0].isascii()


# Secrets


def crash_report(error):
    """What a crash reporter keeps of an error, but for the test's own functions"""
    report = traceback.TracebackException(type(error), error, error.__traceback__, capture_locals=True)
    frames, link = [], report
    while link is not None:
        frames += [frame for frame in link.stack if frame.filename != __file__]
        link = link.__cause__ or link.__context__
    return repr([(frame.name, frame.locals) for frame in frames]) + str(error)


FAILING = {
    "a key that is refused": lambda server: (server.answer(error_answer(401)), {})[1],
    "no connection": lambda server: {"base_url": "http://127.0.0.1:1/v1"},
    "no model": lambda server: {"model": None},
    "no such provider": lambda server: {"provider": "nobody", "base_url": None},
    "no address": lambda server: {"base_url": "http://a b"},
    "a wrong option": lambda server: {"retry": "five"},
    "a key that is none": lambda server: {"api_key": f"{KEY} {KEY}"},
    "a loss": lambda server: (server.answer(Answer(cut_at=100)), {})[1],
    "a wrong prompt": lambda server: {"messages": 5},
}


@pytest.mark.parametrize("place", ["api_key", "header", "bytes"])
@pytest.mark.parametrize("failing", FAILING)
def test_a_crash_report_holds_no_key(server, failing, place):
    if place == "header":
        if failing == "a key that is none":
            return  # it is not looked at
        key = {"headers": {"Authorization": f"Bearer {KEY}"}}
    else:
        key = {"api_key": KEY.encode() if place == "bytes" else KEY}
    options = {
        "messages": "Go",
        "model": "m",
        "base_url": server.base_url,
        "retry": 0,
        **key,
        **FAILING[failing](server),
    }
    for ask in (lambda: list(sheepsse.stream(**options)), lambda: sheepsse.complete(**options)):
        with pytest.raises((sheepsse.SheepError, TypeError)) as caught:
            ask()
        assert KEY not in crash_report(caught.value)
        if failing in ("a key that is refused", "a loss"):
            FAILING[failing](server)


@pytest.mark.parametrize(
    "echo",
    [KEY, KEY.upper(), KEY[6:], KEY[3:-2], f"...{KEY[-12:]}", base64.b64encode(KEY.encode()).decode(),
     base64.b64encode(f"x{KEY}".encode()).decode(), base64.urlsafe_b64encode(f"user:{KEY}".encode()).decode()],
)  # fmt: skip
def test_an_echo_of_the_key_is_hidden_in_whatever_form(server, echo):
    server.answer(error_answer(401, f"Wrong key: {echo}!", code=""))
    with asking(server, api_key=KEY) as client:
        _, error = read(client.stream("Go"))
    assert "Wrong key: " in str(error)
    for text in (str(error), error.response.text):
        folded = text.lower()
        assert not any(echo.lower()[at : at + 12] in folded for at in range(len(echo) - 11))


def test_words_that_are_no_key_stay():
    secrets = sheepsse._Secrets({"Authorization": f"Bearer {KEY}"})
    for text in ("Wrong key: sk-tes...", "İstanbul ẞ " * 20, "0123456789", "x" * 100):
        assert secrets.hide(text) == text


@pytest.mark.parametrize("key", [lambda: KEY, 5, 1.5, True, ["k"], object()])
def test_a_key_of_another_type_is_an_error_and_no_other_is_sent(server, monkeypatch, key):
    monkeypatch.setenv("HOLYSHEEP_API_KEY", KEY)
    with pytest.raises(TypeError, match="api_key is a str"):
        sheepsse.Client(base_url=server.base_url, api_key=key)


def test_a_key_may_be_bytes(server):
    with asking(server, api_key=KEY.encode()) as client:
        list(client.stream("Go"))
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"


def test_cookies_of_one_call_are_not_sent_with_the_next(server, client):
    server.default = Answer(headers={"Set-Cookie": "session=ann; Path=/"})
    for _ in range(2):
        list(client.stream("Go"))
    assert [sent.headers.get("Cookie") for sent in server.requests] == [None, None]


# Folders and files of others


@pytest.fixture
def other_user(monkeypatch):
    """As of now this process is of another user, who is not root"""
    if not hasattr(os, "geteuid"):
        pytest.skip("needs POSIX")
    mine = os.geteuid()
    return lambda: monkeypatch.setattr(os, "geteuid", lambda: mine + 4711)


def as_nobody(path, uid=65534):
    if os.geteuid():
        pytest.skip("needs root")
    os.chown(path, uid, -1)


@pytest.mark.parametrize("place", ["folder", "file"])
def test_a_checkpoint_of_another_user_is_refused(server, client, tmp_path, place):
    folder = tmp_path / "kept"
    list(client.stream("Go", checkpoint=folder))
    (path,) = folder.iterdir()
    as_nobody(folder if place == "folder" else path)
    store = Checkpoints(folder)
    attempts = [
        lambda: list(client.stream("Go", checkpoint=folder)),
        lambda: list(store),
        lambda: store.load(path.stem),
        lambda: store.clear(path.stem),
        Checkpoints(folder, -1).expire,
    ]
    for attempt in attempts:
        with pytest.raises(CheckpointError, match="another user"):
            attempt()
    assert len(server.requests) == 1
    assert path.exists()


@pytest.mark.parametrize("place", ["folder", "file"])
@pytest.mark.parametrize(
    ("mode", "refused", "refused_shared"), [(0o022, True, True), (0o002, True, True), (0o020, True, False)]
)
def test_a_checkpoint_that_others_may_write_is_refused(server, client, tmp_path, place, mode, refused, refused_shared):
    folder = tmp_path / "kept"
    list(client.stream("Go", checkpoint=folder))
    (path,) = folder.iterdir()
    target = folder if place == "folder" else path
    target.chmod(target.stat().st_mode | mode)
    for shared, is_refused in ((False, refused), (True, refused_shared)):
        stream = client.stream("Go", checkpoint=Checkpoints(folder, shared=shared))
        if is_refused:
            with pytest.raises(CheckpointError, match="may be written by"):
                list(stream)
        else:
            assert "".join(stream) == TEXT
    assert len(server.requests) == 1


def test_a_system_without_owners_of_files_has_none_to_check(server, client, tmp_path, monkeypatch):
    assert "".join(client.stream("Go", checkpoint=tmp_path)) == TEXT
    (path,) = tmp_path.iterdir()
    path.chmod(0o666)
    monkeypatch.delattr(os, "geteuid")
    assert "".join(client.stream("Go", checkpoint=tmp_path)) == TEXT
    assert len(server.requests) == 1


def test_a_link_is_no_checkpoint_and_no_recording(tmp_path):
    store = Checkpoints(tmp_path / "kept")
    store.save("a", "text")
    (path,) = (tmp_path / "kept").iterdir()
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    for attempt in (lambda: store.load("a"), lambda: store.save("a", "b"), lambda: list(sheepsse.replay(path))):
        with pytest.raises(CheckpointError, match="link"):
            attempt()


HOSTILE = {
    "a text that is a number": {"text": 5},
    "a text that is a list": {"text": ["a"]},
    "a flag for a number": {"text": "a", "index": True},
    "an index that is text": {"text": "a", "index": "0"},
    "a field of no chunk": {"text": "a", "__class__": "b"},
    "calls that are a text": {"tool_calls": "abc"},
    "a call that is a number": {"tool_calls": [5]},
    "a call with a wrong field": {"tool_calls": [{"arguments": {}}]},
    "a usage that is a list": {"usage": [1]},
    "a count that is text": {"usage": {"input_tokens": "9"}},
    "a cost that is none": {"usage": {"cost": "much"}},
    "a finish that is a number": {"finish_reason": 5},
    "what the vendor wants that is text": {"vendor": "x"},
    "a way of continuing that is none": {"continuity": "wonderful"},
    "a way of continuing that is a list": {"continuity": []},
    "a list": [1, 2],
    "a number": 5,
    "null": None,
}


@pytest.mark.parametrize("line", HOSTILE)
def test_a_hostile_checkpoint_with_right_checksums_is_an_error_of_ours(server, client, tmp_path, line):
    lines = [{"sheepsse": 1}, {"text": "a", "event_id": ""}, HOSTILE[line]]
    data, _ = sheepsse._journal_lines(lines)
    path = tmp_path / "planted"
    path.write_bytes(data)
    path.chmod(0o600)
    with pytest.raises(CheckpointError, match="damaged"):
        list(sheepsse.replay(path))


@pytest.mark.parametrize("header", [[], 5, None, "x"])
def test_a_header_that_is_none_is_an_error_of_ours(tmp_path, header):
    data, _ = sheepsse._journal_lines([header])
    (tmp_path / "planted").write_bytes(data)
    with pytest.raises(CheckpointError):
        list(sheepsse.replay(tmp_path / "planted"))


DEEP = "[" * 100_000 + "]" * 100_000
POINTS = [
    {"cursor": DEEP},
    {"cursor": "5"},
    {"cursor": '["", "", [], ""]'},
    {"cursor": '["", "", [[5, 5, 5, 5]], "", [null, null, false], []]'},
    {"cursor": '["", "", [[0, "a", "b", ["c"]]], "", [null, null, false], []]'},
    {"cursor": '["", "", [], "", [5, null, false], []]'},
    {"cursor": '["", "", [], "", [null, null, false], [5]]'},
    {"text": 5},
    {"text": ["a"]},
    {"event_id": 5, "text": "a"},
    {"nothing": "known"},
    [1, 2, 3, 4, 5, 6, 7, 8, 9],
]


@pytest.mark.parametrize("point", POINTS, ids=lambda point: str(point)[:50])
def test_a_wrong_resume_point_is_a_value_error_before_anything_is_sent(server, client, point):
    with pytest.raises(ValueError, match="resume_from takes"):
        list(client.stream("Go", resume_from=point))
    assert not server.requests


# Bounds


def test_an_id_that_stays_in_force_is_kept_once():
    decoder = sheepsse.SSEDecoder()
    events = decoder.feed(b"id: " + b"x" * 1_000_000 + b"\n" + b"data: a\n\n" * 1000)
    assert len({id(event.id) for event in events}) == 1
    assert events[0].id == "x" * 1_000_000


@pytest.mark.parametrize("size", [16_384, 16_385])
def test_an_id_has_a_limit_for_the_client(server, client, size):
    events = chat_events(["Good", " day"])
    server.answer(Answer(events=[events[0], b"id: " + b"x" * size + b"\n" + events[1], *events[2:]]))
    came, error = read(client.stream("Go", resume="never"))
    if size <= 16_384:
        assert (came, error) == (["Good", " day"], None)
    else:
        assert type(error) is InvalidStreamError
        assert "id" in str(error)


LARGE = {
    "text": [{"content": "é" * 100}] * 30,
    "reasoning": [{"reasoning_content": "x" * 200}] * 30,
    "refusal": [{"refusal": "x" * 200}] * 30,
    "arguments": [{"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": "x" * 200}}]}] * 30,
    "several": [{"content": "x" * 100}, {"reasoning_content": "x" * 100}] * 30,
}


@pytest.mark.parametrize("kind", LARGE)
def test_an_answer_has_a_limit_and_the_error_what_came(server, client, kind):
    server.answer(Answer(events=chat_events(LARGE[kind])))
    _, error = read(client.stream("Go", max_answer_size=2000, retry=3).chunks())
    assert type(error) is StreamError
    assert "max_answer_size" in str(error)
    came = error.partial
    size = sum(map(len, (came.text, came.reasoning, came.refusal, *(call.arguments for call in came.tool_calls))))
    assert 1000 <= size <= 2400
    assert len(server.requests) == 1


def test_an_answer_at_its_limit_is_whole(server, client):
    server.answer(Answer(events=chat_events(["x" * 1000] * 2)))
    assert len("".join(client.stream("Go", max_answer_size=2000))) == 2000
    assert sheepsse.Client(api_key=False, base_url="http://x")._options.max_answer_size == 64 * 1024 * 1024


@pytest.mark.parametrize("delta", [{"content": ""}, {"role": "assistant"}, {}])
@pytest.mark.parametrize("limit", ["first_timeout", "idle_timeout"])
def test_empty_deltas_are_no_chunks_for_the_limits(server, limit, delta):
    def endless():
        yield from chat_events(["Good"] if limit == "idle_timeout" else [], finish=None, done=False)
        while True:
            yield chat_events([delta], finish=None, done=False)[-1]

    server.answer(Answer(events=endless(), pace=0.02))
    with asking(server, **{**PATIENT, limit: 0.4}) as client:
        _, error = read(client.stream("Go", resume="never"))
    assert type(error) is StreamTimeout
    assert limit in str(error)


def test_one_header_does_not_hold_a_limiter_for_a_day(server):
    exhausted = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "9999h"}
    server.default = Answer(headers=exhausted)
    limiter = Limiter()
    with LocalProvider() as other, asking(server, limiter=limiter) as client, asking(other, limiter=limiter) as another:
        list(client.stream("Go", retry=sheepsse.Retry(max_retry_after=30)))
        assert "".join(another.stream("Go")) == TEXT  # of another provider, which did not say so
        with pytest.raises(StreamTimeout, match="waiting for a slot"):
            list(client.stream("Go", deadline=0.1))
        (until_then,) = limiter._held_until.values()
        assert until_then - time.monotonic() < 31


def test_comments_do_not_count_either(server):
    server.answer(Answer(stall_after=2, keepalive=0.02))
    with asking(server, **{**PATIENT, "idle_timeout": 0.4}) as client:
        _, error = read(client.stream("Go", resume="never"))
    assert type(error) is StreamTimeout
    assert COMMENT
