"""What all tests share: a real server on loopback, and an environment that holds no key and no proxy"""

import collections
import contextlib
import gc
import json
import os
import pathlib
import signal
import socket
import sys
import threading
import time

import pytest
from hypothesis import HealthCheck, settings

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import local_provider  # noqa: E402  # found by the line above
import sheepsse  # noqa: E402

settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")  # for a busy machine everything is slow


@pytest.fixture(scope="module", autouse=True)
def _what_is_loaded_is_no_garbage():
    """To look through all that after each test, as _nothing_leaks does, would cost more than the tests"""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch, tmp_path):
    for row in sheepsse.PROVIDERS.values():
        monkeypatch.delenv(row.key_variable, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.fixture(autouse=True)
def _nothing_leaks():
    """A socket left open warns when it is collected, and warnings are errors: so collect while the test's name is up"""
    yield
    gc.collect()


@pytest.fixture
def no_collection():
    """For what recurses to the limit: a callback of the collector there, such as hypothesis has, aborts Python 3.8"""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def server():
    with local_provider.LocalProvider() as provider:
        yield provider


@pytest.fixture
def client(server):
    """A client of the server that asks once"""
    with sheepsse.Client(base_url=server.base_url, api_key=False, model="local-model", retry=0) as made:
        yield made


@contextlib.contextmanager
def asking(server, **options):
    """A client of the server that asks once, unless it is told otherwise"""
    defaults = {"base_url": server.base_url, "api_key": False, "model": local_provider.MODEL, "retry": 0}
    with sheepsse.Client(**{**defaults, **options}) as made:
        yield made


@pytest.fixture
def clients(server):
    """A client of the server in each dialect, by its name"""
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(asking(server, base_url=server.origin + base, dialect=name))
            for name, base in local_provider.DIALECT_BASES.items()
        }


def read(pieces):
    """What comes of an iterator, and the SheepError that ended it or None; any other error is a failure"""
    came = []
    try:
        for piece in pieces:
            came.append(piece)
    except sheepsse.SheepError as error:
        return came, error
    return came, None


# Time: no test compares the clock on the wall, as the machine may be busy with something else


#: Seconds after which a wait is given up, as it can only be a hang
HANG = 60
#: The options of a client that nothing but the test itself ends
PATIENT = {"timeout": None, "first_timeout": None, "idle_timeout": None}


def until(condition):
    """Waits until the condition holds; False where it never does"""
    end = time.monotonic() + HANG
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


@contextlib.contextmanager
def in_another_thread(function, *arguments):
    """Runs a function beside the block, and waits for it at the block's end; gives a list for its result"""
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*arguments)), daemon=True)
    thread.start()
    try:
        yield results
    finally:
        thread.join(HANG)
        assert not thread.is_alive()


class InTurns(list):
    """A server's `sent_at` that lets it write an event only when it is told to, up to so many events"""

    def __init__(self, events, before=lambda: None):
        self._events, self._before = events, before
        self._turns = threading.Semaphore(0)
        self.in_vain = False  # whether it was not told to, and has gone on by itself

    def next(self):
        self._turns.release()

    def append(self, moment):
        if len(self) < self._events and not self.in_vain:
            self.in_vain = not self._turns.acquire(timeout=HANG)
            self._before()
        super().append(moment)


def cpu_seconds(function, rounds=5):
    """The processor time that this thread takes for a function: the least of some rounds, as noise only adds to it"""
    taken = []
    for _ in range(rounds):
        start = time.thread_time()
        function()
        taken.append(time.thread_time() - start)
    return min(taken)


class Clock:
    """The `time` of sheepsse: it stands still but for what a test adds to `now`, and for `step` at each look"""

    def __init__(self):
        self.now = self.step = 0.0
        self.slept = []

    def monotonic(self):
        self.now += self.step
        return self.now

    def sleep(self, seconds):
        assert seconds > 0
        self.slept.append(seconds)
        self.now += seconds

    def __call__(self):
        return self.monotonic()

    def __getattr__(self, name):
        return getattr(time, name)


class RunningClock(Clock):
    """The `time` of sheepsse as it is, to which a test adds what it likes"""

    def monotonic(self):
        return time.monotonic() + self.now

    def sleep(self, seconds):
        time.sleep(seconds)


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(sheepsse, "time", made)
    return made


@pytest.fixture
def running_clock(monkeypatch):
    made = RunningClock()
    monkeypatch.setattr(sheepsse, "time", made)
    return made


class Hurry:
    """From `begin` to `end` whoever may wait for a socket for a limited time waits for a tenth of a second at most"""

    is_on = False

    def begin(self):
        self.is_on = True

    def end(self):
        self.is_on = False


@pytest.fixture
def hurry(monkeypatch):
    made, plain, recv_into = Hurry(), socket.socket.settimeout, socket.socket.recv_into

    def settimeout(sock, seconds):
        plain(sock, 0.1 if made.is_on and seconds else seconds)

    def hurried(sock, *args):  # what requests reads by itself has the limit of its request
        if made.is_on and sock.gettimeout():
            plain(sock, 0.1)
        return recv_into(sock, *args)

    monkeypatch.setattr(socket.socket, "settimeout", settimeout)
    monkeypatch.setattr(socket.socket, "recv_into", hurried)
    return made


@pytest.fixture(autouse=True)
def _what_is_not_waited_for_long_is_waited_for(monkeypatch):
    """The end of a body, so that its connection can be used again, and the leave to end a job that nobody wants"""
    for name in ("_DRAIN_TIME", "_GIVE_UP_TIME"):
        monkeypatch.setattr(sheepsse, name, float(HANG))


# What is not on every machine


#: Fixtures that need a folder of files that are not part of this repository, and the variables that name it
FOLDERS = {"recordings": "SHEEPSSE_RECORDINGS", "cases": "SHEEPSSE_CASES"}


def pytest_configure():
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # so it is in a job that a script runs in the background, and the processes of the tests would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)


def environ_of(path="/chat/stream", method="POST", **more):
    from wsgiref.util import setup_testing_defaults

    environ = {"PATH_INFO": path, "REQUEST_METHOD": method, "SCRIPT_NAME": "", "QUERY_STRING": ""}
    environ.update({"CONTENT_TYPE": "application/json", **more})
    setup_testing_defaults(environ)
    return environ


def called(app, environ):
    """The status and the body that an application gives"""
    statuses = []
    answer = app(environ, lambda status, headers: statuses.append(status))
    body = b"".join(answer)
    getattr(answer, "close", bool)()
    return statuses[0], body


def pytest_collection_modifyitems(config, items):
    """Leaves out the tests whose folder is not there: nobody who has the repository alone can run them"""
    missing = {fixture for fixture, variable in FOLDERS.items() if not os.environ.get(variable)}
    left_out = [item for item in items if missing & set(getattr(item, "fixturenames", ()))]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def recordings():
    """Real recorded streams: the folder and its index"""
    folder = pathlib.Path(os.environ[FOLDERS["recordings"]])
    return folder, json.loads((folder / "INDEX.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def cases():
    """The folder of the conformance files"""
    return pathlib.Path(os.environ[FOLDERS["cases"]])


def pytest_terminal_summary(terminalreporter):
    """What each skipped test needs, one line for each need"""
    reports = terminalreporter.stats.get("skipped", [])
    reasons = collections.Counter(report.longrepr[2].partition("Skipped: ")[2] for report in reports)
    if reasons:
        terminalreporter.section("skipped")
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"{reason}: {count}")
