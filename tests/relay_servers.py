"""Real servers on loopback, each in processes of its own, and clients of theirs that look at the clock

    with running("gunicorn-gthread", tmp_path, {"client": {"base_url": provider.base_url}}, workers=3) as server:
        reply = ask(server, "Good day?")
        for event in reply.events():
            ...

Run as a program it is the server itself, where that has no command of its own.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from http.client import HTTPConnection, IncompleteRead
from typing import Any, Mapping, NamedTuple

import sheepsse

#: Seconds after which a wait is given up, as it can only be a hang
HANG = 60
HERE = pathlib.Path(__file__).resolve().parent
MODULE = pathlib.Path(sheepsse.__file__).resolve()
#: The kinds of server, and what each needs
NEEDS = {
    "werkzeug": ["werkzeug"],
    "gunicorn-sync": ["gunicorn"],
    "gunicorn-gthread": ["gunicorn"],
    "gunicorn-gevent": ["gunicorn", "gevent"],
    "waitress": ["waitress"],
}
KINDS = list(NEEDS)
TERMINAL = ("done", "failed", "interrupted")

#: What gunicorn is told beside its command line: to end streams in words when it is to end
DRAINING = """
import signal
import sheepsse


def post_worker_init(worker):
    before = signal.getsignal(signal.SIGTERM)

    def drained(number, frame):
        sheepsse.drain()
        before(number, frame)

    signal.signal(signal.SIGTERM, drained)
"""


# ---------------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------------


def is_there(module):
    """Whether there is such a module, be it one of a package that is not there either"""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def require(*modules, programs=()):
    """Skips, and says what is missing, unless each of them is on this machine"""
    import pytest  # here, as this file is also what a server runs

    missing = [name for name in modules if not is_there(name)]
    missing += [name for name in programs if not shutil.which(name)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


def wait_until(condition, pause=0.002):
    """The seconds until the condition holds, to be shown; AssertionError where it never does"""
    start = time.perf_counter()
    while not condition():
        assert time.perf_counter() - start < HANG
        time.sleep(pause)
    return time.perf_counter() - start


@contextlib.contextmanager
def process(command, log, **options):
    """A process that leads a group of its own; the whole group ends with the block"""
    with open(log, "ab") as output:
        leader = subprocess.Popen(
            list(map(str, command)), stdout=output, stderr=output, start_new_session=True, **options
        )
    try:
        yield leader
    finally:
        if "COVERAGE_PROCESS_START" in os.environ:  # what a killed process ran is not measured
            with contextlib.suppress(subprocess.TimeoutExpired):
                leader.send_signal(signal.SIGINT)
                leader.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader.pid, signal.SIGKILL)
        leader.wait()
        print(f"--- {log.name} ---\n{log.read_text(errors='replace')[-20000:]}")  # pytest shows it where a test fails


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def can_connect(port):
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True
    return False


class Server(NamedTuple):
    """A running server"""

    kind: str
    port: int
    leader: subprocess.Popen
    log: pathlib.Path

    @property
    def origin(self):
        return f"http://127.0.0.1:{self.port}"

    def workers(self):
        """The ids of the processes that answer"""
        return children_of(self.leader.pid) if self.kind.startswith("gunicorn") else [self.leader.pid]

    def complaints(self):
        """The lines of its log that speak of exceptions"""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line for line in lines if "Traceback" in line or "Exception" in line]


def command_of(kind, fd, app, workers, threads, options):
    """The command that serves `app` at the listening socket of this number"""
    if not kind.startswith("gunicorn"):
        return [sys.executable, HERE / "relay_servers.py", kind, fd, app, threads]
    command = [sys.executable, "-m", "gunicorn", "--bind", f"fd://{fd}", "--worker-class", kind.partition("-")[2]]
    command += ["--workers", workers, "--graceful-timeout", 5, *options]
    command += ["--threads", threads] if kind == "gunicorn-gthread" else []  # with them the sync worker is a gthread
    return [*command, f"relay_app:{app}"]


@contextlib.contextmanager
def running(kind, folder, settings, *, app="app", workers=1, threads=16, options=(), name=None):
    """A server of this kind with the apps of relay_app.py, from when it answers until the end of the block"""
    require(*NEEDS[kind], *(["flask"] if app == "app" else []))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(MODULE.parent)]),
        "RELAY_APP": json.dumps(settings),
        "HOME": str(folder),  # where gunicorn 25 puts a socket to control it by
        "no_proxy": "*",
    }
    log = folder / f"{name or kind}.log"
    with contextlib.ExitStack() as stack:
        with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
            port, fd = listener.getsockname()[1], listener.fileno()
            command = command_of(kind, fd, app, workers, threads, options)
            leader = stack.enter_context(process(command, log, cwd=folder, env=environment, pass_fds=[fd]))
        server = Server(kind, port, leader, log)
        wait_until(lambda: leader.poll() is not None or is_up(server, workers), 0.02)
        assert leader.poll() is None, log.read_text(errors="replace")
        yield server


def is_up(server, workers):
    """Whether all its workers are there, and one answers"""
    if len(server.workers()) < (workers if server.kind.startswith("gunicorn") else 1):
        return False
    with contextlib.suppress(OSError):
        return get(server, "/health").status == 200
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Clients
# ---------------------------------------------------------------------------------------------------------------------


class Event(NamedTuple):
    """An event, its data read as JSON, and when it came by `time.perf_counter()`"""

    id: str
    name: str
    data: Any
    at: float

    @property
    def number(self):
        return int(self.id.rpartition(":")[2]) if self.id else None

    @property
    def is_terminal(self):
        return self.name in TERMINAL


class Reply:
    """What a server answers, read as it comes; to be closed"""

    def __init__(self, connection, response, sock):
        self._connection, self._response, self._socket = connection, response, sock
        self.status = response.status
        self.headers = response.headers
        self.retry = None  # what the stream says of it, in milliseconds
        self.comments = []  # when each came

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        self._response.close()
        self._connection.close()

    def leave(self):
        """Goes away with no good-bye but the kernel's"""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self.close()

    def pieces(self):
        """The body as it comes; a connection that is lost is its end"""
        unzipped = zlib.decompressobj(31) if self.headers.get("Content-Encoding") == "gzip" else None
        with contextlib.suppress(IncompleteRead, ConnectionError):
            while True:
                piece = self._response.read1(65536)
                if not piece:
                    return
                yield unzipped.decompress(piece) if unzipped else piece

    def body(self):
        return b"".join(self.pieces())

    def json(self):
        return json.loads(self.body())

    def events(self):
        rest = b""
        for piece in self.pieces():
            at = time.perf_counter()
            *blocks, rest = (rest + piece).split(b"\n\n")
            for block in blocks:
                fields = [line.partition(": ")[::2] for line in block.decode().split("\n")]
                yield from self._event(fields, at)

    def _event(self, fields, at):
        named = dict(fields)
        if any(not name or name.startswith(":") for name in named):
            self.comments.append(at)
        self.retry = int(named.get("retry", self.retry or 0))
        if "data" in named:
            data = "\n".join(value for name, value in fields if name == "data")
            yield Event(named.get("id", ""), named.get("event", ""), json.loads(data), at)

    def texts(self):
        return (event for event in self.events() if not event.name)


def open_at(server, method, path, body=None, headers=()):
    """The reply to a request, as soon as its header is there"""
    port = server if isinstance(server, int) else server.port
    connection = HTTPConnection("127.0.0.1", port, timeout=HANG)
    try:
        connection.connect()
        sock = connection.sock
        fields = {"Content-Type": "application/json", **dict(headers)}
        connection.request(method, path, None if body is None else json.dumps(body), fields)
        return Reply(connection, connection.getresponse(), sock)
    except BaseException:
        connection.close()
        raise


def ask(server, prompt="Good day?", *, after=None, headers=(), body=None):
    """The reply to a prompt, after the event of that id if one is given"""
    headers = {**dict(headers), **({} if after is None else {"Last-Event-ID": after})}
    return open_at(server, "POST", "/chat/stream", body or {"prompt": prompt}, headers)


def follow(server, stream, *, after=None, headers=()):
    """The reply to one who follows a stream that another asked for"""
    headers = {**dict(headers), **({} if after is None else {"Last-Event-ID": after})}
    return open_at(server, "GET", f"/chat/stream/{stream}", None, headers)


class Page(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self):
        return json.loads(self.body)


def get(server, path, method="GET", body=None, headers=()):
    """A whole answer"""
    with open_at(server, method, path, body, headers) as reply:
        return Page(reply.status, reply.headers, reply.body())


def stop(server, stream):
    return get(server, f"/chat/stop/{stream}", "POST", {})


def text_of(events):
    return "".join(event.data["content"] for event in events if not event.name)


def whole(server, prompt="Good day?", **options):
    """All events of a stream"""
    with ask(server, prompt, **options) as reply:
        assert reply.status == 200, reply.body()
        return list(reply.events())


# ---------------------------------------------------------------------------------------------------------------------
# What the kernel knows of a process
# ---------------------------------------------------------------------------------------------------------------------


class Held(NamedTuple):
    """What processes hold, all together"""

    threads: int
    files: int
    sockets: int


def children_of(pid):
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(path.parent.name))
    return sorted(found)


def files_of(pid):
    """What each of its file descriptors is"""
    found = []
    with contextlib.suppress(OSError):
        for path in pathlib.Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.append(os.readlink(path))
    return found


def held_by(pids):
    files = [files_of(pid) for pid in pids]
    threads = sum(len(os.listdir(f"/proc/{pid}/task")) for pid in pids)
    return Held(threads, sum(map(len, files)), sum(name.startswith("socket:") for names in files for name in names))


def memory_of(pid):
    """What a process has in memory, in bytes"""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def connected_to(port, pids):
    """Those of the processes that have a connection to this port of loopback"""
    inodes = set()
    for line in pathlib.Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[2].rpartition(":")[2], 16) == port and fields[3] == "01":
            inodes.add(f"socket:[{fields[9]}]")
    return [pid for pid in pids if inodes & set(files_of(pid))]


# ---------------------------------------------------------------------------------------------------------------------
# nginx and Redis
# ---------------------------------------------------------------------------------------------------------------------

NGINX = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log stderr;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {folder}/nginx-body;
    proxy_temp_path {folder}/nginx-proxy;
    fastcgi_temp_path {folder}/nginx-fastcgi;
    uwsgi_temp_path {folder}/nginx-uwsgi;
    scgi_temp_path {folder}/nginx-scgi;
    {options}
    server {{
        listen 127.0.0.1:{port};
        location / {{ proxy_pass {origin}; }}
    }}
}}
"""


@contextlib.contextmanager
def nginx(folder, server, options=""):
    """The port of an nginx before the server, with its default settings but for these"""
    require(programs=["nginx"])
    port = free_port()
    config = folder / f"nginx-{port}.conf"
    config.write_text(NGINX.format(folder=folder, options=options, port=port, origin=server.origin))
    with process(["nginx", "-e", "stderr", "-p", folder, "-c", config], folder / "nginx.log"):
        wait_until(lambda: can_connect(port))
        yield port


@contextlib.contextmanager
def redis_server(folder):
    """The URL of a Redis that keeps nothing"""
    require("redis", programs=["redis-server"])
    port = free_port()
    command = ["redis-server", "--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with process([*command, "--dir", folder], folder / "redis.log"):
        wait_until(lambda: can_connect(port))
        yield f"redis://127.0.0.1:{port}/0"


# ---------------------------------------------------------------------------------------------------------------------
# The servers without a command of their own
# ---------------------------------------------------------------------------------------------------------------------


def main(kind, fd, app, threads, *options):
    import relay_app

    served = getattr(relay_app, app)
    if kind == "werkzeug":
        from werkzeug.serving import make_server

        make_server("127.0.0.1", 0, served, threaded=True, fd=int(fd)).serve_forever()
    else:
        import waitress

        listener = socket.socket(fileno=int(fd))
        waitress.serve(served, sockets=[listener], threads=int(threads), channel_request_lookahead=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
