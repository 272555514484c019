"""A simulated world: its clock, connections, file operations and threads take the place of those of the module

A simulation sets the module's names `time`, `socket`, `os` and `threading`; no hour of this file takes a second.
"""

import errno
import io
import json
import os
import socket
import threading
import time

import pytest

import sheepsse
from conftest import called, environ_of, read
from local_provider import chat_events
from sheepsse import Retry

WORDS = [f"w{number} " for number in range(6)]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


class Instead:
    """A module, of which some names are others"""

    def __init__(self, module, **names):
        self.__dict__.update(names)
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, name)


class World:
    """What happens to each connection in turn: None refuses it; else (seconds, bytes) pieces, and then the end"""

    def __init__(self, clock, connections):
        self.clock = clock
        self.connections = list(connections)
        self.requests = []
        self.open = 0
        self.started = []
        self.disk_is_full = False

    def sleep(self, seconds):
        self.clock.now += seconds

    def write(self, file, data):
        if self.disk_is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.write(file, data)

    def enter(self, monkeypatch):
        world = self

        class Event(type(threading.Event())):
            def wait(self, timeout=None):
                if not self.is_set():
                    assert timeout is not None, "a wait that nobody ends"
                    world.sleep(timeout)
                return self.is_set()

        class Lock:
            def __init__(self):
                self._lock = threading.Lock()
                self.release = self._lock.release

            def acquire(self, blocking=True, timeout=-1):
                if blocking and self._lock.locked():
                    assert timeout >= 0, "a wait that nobody ends"
                    world.sleep(timeout)
                return self._lock.acquire(blocking=False)

            def __enter__(self):
                return self.acquire()

            def __exit__(self, *error):
                self.release()

        class Thread:
            """Runs to its end as it starts; a watcher, which has none, does not run"""

            def __init__(self, target, args=(), name="", daemon=None):
                self.run, self.name = lambda: target(*args), name

            def start(self):
                world.started.append(self.name)
                if self.name == "sheepsse relay":
                    self.run()

        address = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("203.0.113.1", 80))
        modules = {
            "socket": Instead(socket, getaddrinfo=lambda *_: [address], socket=lambda *_: Socket(self)),
            "os": Instead(os, write=self.write),
            "threading": Instead(threading, Event=Event, Lock=Lock, Thread=Thread),
        }
        for name, module in modules.items():
            monkeypatch.setattr(sheepsse, name, module)
        # a watcher that never runs must not stay behind as that of the relays of other tests
        monkeypatch.setattr(sheepsse, "_relaying", sheepsse._Relaying())


class Socket:
    def __init__(self, world):
        self.world, self.timeout, self.sent, self.pieces = world, None, b"", None
        self.users = 1  # the connection, and each of its files

    def setsockopt(self, *option):
        pass

    def settimeout(self, seconds):
        self.timeout = seconds

    def connect(self, address):
        self.pieces = self.world.connections.pop(0)
        if self.pieces is None:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")
        self.pieces = list(self.pieces)
        self.world.open += 1
        self.world.requests.append(self)

    def send(self, data):
        self.sent += bytes(data)
        return len(data)

    sendall = send

    def recv_into(self, buffer):
        if not self.pieces:
            return 0
        seconds, data = self.pieces.pop(0)
        if self.timeout is not None and seconds > self.timeout:
            self.world.sleep(self.timeout)
            self.pieces.insert(0, (seconds - self.timeout, data))
            raise socket.timeout("timed out")
        self.world.sleep(seconds)
        if len(data) > len(buffer):
            self.pieces.insert(0, (0, data[len(buffer) :]))
        size = min(len(data), len(buffer))
        buffer[:size] = data[:size]
        return size

    def makefile(self, mode, buffering):
        self.users += 1
        return self

    def shutdown(self, how):
        pass

    def close(self):
        self.users -= 1
        if not self.users and self.pieces is not None:
            self.world.open -= 1


def answer(pace, count=None):
    """The words of an answer, `pace` seconds before each; cut off after some events"""
    events = [b"id: %d\n" % number + event for number, event in enumerate(chat_events(WORDS), 1)]
    return [(0, HEAD), *((pace, event) for event in events[:count])]


@pytest.fixture
def simulated(monkeypatch, clock):
    def made(*connections):
        world = World(clock, connections)
        world.enter(monkeypatch)
        return world

    return made


def client(**options):
    return sheepsse.Client(base_url="http://model.example", api_key=False, model="m", **options)


def test_an_hour_of_refusals_and_silence_passes_at_once_and_gives_the_whole_text(simulated):
    world = simulated(None, None, None, answer(pace=290))
    began = time.process_time()
    with client(retry=Retry(5, base_delay=600, max_delay=600, jitter=False)) as ours:
        came, error = read(ours.stream("Go"))
    assert ("".join(came), error) == ("".join(WORDS), None)
    assert world.clock.now > 3 * 600 + len(WORDS) * 290
    assert (len(world.requests), world.open) == (1, 0)
    assert json.loads(world.requests[0].sent.partition(b"\r\n\r\n")[2])["model"] == "m"
    assert time.process_time() - began < 10


def test_a_silence_longer_than_the_read_time_out_is_late_on_the_simulated_clock(simulated):
    world = simulated(answer(pace=301))
    with client(idle_timeout=None, first_timeout=None, retry=0) as ours:
        came, error = read(ours.stream("Go", resume="never"))
    assert (came, type(error), world.clock.now) == ([], sheepsse.StreamTimeout, pytest.approx(300, abs=1))
    assert world.open == 0


def test_a_lost_answer_goes_on_over_simulated_connections(simulated):
    world = simulated(answer(pace=1, count=4), None, answer(pace=1))
    with client(retry=Retry(5, base_delay=60, jitter=False)) as ours:
        came, error = read(ours.stream("Go", resume="replay"))
    assert (came, error, world.open) == (WORDS, None, 0)


def test_a_simulated_disk_that_fills_up_loses_nothing_that_was_saved(simulated, tmp_path):
    world = simulated(answer(pace=1), answer(pace=1))
    with client(retry=0) as ours:
        stream = ours.stream("Go", checkpoint=tmp_path, resume="replay")
        came = [next(stream) for _ in range(3)]
        world.disk_is_full = True
        _, error = read(stream)
        assert type(error) is sheepsse.CheckpointError
        world.disk_is_full = False
        again, error = read(ours.stream("Go", checkpoint=tmp_path, resume="replay"))
    assert error is None
    assert "".join(again) == "".join(WORDS)
    assert "".join(again).startswith("".join(came))


def test_a_relay_runs_without_a_thread_of_the_system(simulated, tmp_path):
    world = simulated(answer(pace=1))
    threads = threading.active_count()
    with client() as ours:
        app = sheepsse.wsgi_app(ours, authorize=lambda environ: "someone", journal=tmp_path, models=["m"])
        sent = {"wsgi.input": io.BytesIO(b'{"prompt": "Go"}'), "CONTENT_LENGTH": "16"}
        status, body = called(app, environ_of(**sent))
    assert all(json.dumps(word)[1:-1].encode() in body for word in WORDS)
    assert "sheepsse relay" in world.started
    assert status == "200 OK"
    assert threading.active_count() == threads
