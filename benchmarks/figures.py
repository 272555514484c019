"""What is measured: each figure a class that measures one peer in one case, and says what the result should be."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Callable, ClassVar, ContextManager, Dict, Iterator, NamedTuple, Sequence
from unittest import mock

from peers import Ask, Bare, Peer, Sheepsse
from streams import Scenario


class Differs(Exception):
    """A peer's text is not what was sent"""


class Absent(Exception):
    """A peer has nothing of the kind"""


#: who is nobody to compare with: what cannot be done without, and ourselves
OURS_AND_BARE = frozenset({"sheepsse", "chunks()", "bare", "read1"})


class Target(NamedTuple):
    """What the median of sheepsse's figure in one row should be"""

    row: str
    limit: float
    #: the peer it is compared with; "others" is the best of all but the bare socket, "" nobody
    of: str = "bare"
    #: times the other's, or so much more than it; with nobody to compare with, the figure itself
    how: str = "times"
    at_least: bool = False
    #: whose figure it is
    ours: str = "sheepsse"

    def theirs(self, values: dict[str, list[float]]) -> list[float] | None:
        """The runs of the one that it is compared with, None where there are none"""
        if self.of == "others":
            others = [runs for name, runs in values.items() if name not in OURS_AND_BARE]
            return min(others, key=statistics.median, default=None)
        return values.get(self.of)

    def measured(self, values: dict[str, list[float]]) -> float | None:
        """The median of what each run says; None where one of the two was not measured"""
        ours = values.get(self.ours)
        if not ours:
            return None
        if not self.of:
            return statistics.median(ours)
        theirs = self.theirs(values)
        if not theirs:
            return None
        pairs = zip(ours, theirs)
        if self.how == "times":
            return statistics.median(one / max(other, 1e-12) for one, other in pairs)
        return statistics.median(one - other for one, other in pairs)

    def is_met(self, measured: float) -> bool:
        return measured >= self.limit if self.at_least else measured <= self.limit


class Figure:
    """One figure"""

    name: ClassVar[str]
    title: ClassVar[str]
    unit: ClassVar[str]
    cases: ClassVar[tuple[str, ...]] = ("",)
    targets: ClassVar[tuple[Target, ...]] = ()
    #: whether what was measured before in a process changes what is measured after
    fresh: ClassVar[bool] = False

    def __init__(self, quick: bool) -> None:
        self.quick = quick

    def takes(self, peer: type[Peer], case: str) -> bool:
        """Whether a peer can do what is measured"""
        return "openai" in peer.dialects and not peer.for_chunks

    def measure(self, peer: Peer, case: str) -> dict[str, float]:
        """The figure of one run, by its row in the table; raises Differs where the text is not what was sent"""
        raise NotImplementedError

    def pick(self, full: int, quick: int) -> int:
        return quick if self.quick else full


def cpu_of(ask: Ask, scenario: Scenario) -> float:
    """Seconds of this process to read a stream whose text is kept"""
    start = time.process_time()
    text = "".join(ask())
    taken = time.process_time() - start
    check(text, scenario)
    return taken


def check(text: str, scenario: Scenario) -> None:
    sent = "".join(scenario.texts())
    if text != sent:
        same = len(os.path.commonprefix([text, sent]))
        raise Differs(
            f"{scenario.path}: expected {len(sent)} characters, got {len(text)}, "
            f"and from character {same} {text[same : same + 40]!r} for {sent[same : same + 40]!r}"
        )


def warmed(peer: Peer, scenario: Scenario) -> Ask:
    """A way to ask for a scenario, after all that is done once in a process is done"""
    small = scenario._replace(chunks=10, pace=0.0)
    cpu_of(peer.open(small), small)
    return peer.open(scenario)


class Block(Figure):
    name = "block"
    title = "CPU per chunk, many chunks in a block"
    unit = "us"
    cases = ("openai", "anthropic", "responses", "gemini", "ollama")
    targets = (
        Target("openai", 1.8, "read1"),
        Target("openai", 1.8, "read1", ours="chunks()"),
        Target("openai", 1 / 8, "openai"),
        Target("anthropic", 2.5, "read1"),
        Target("anthropic", 1 / 8, "anthropic"),
        Target("responses", 2.5, "read1"),
        Target("gemini", 2.5, "read1"),
        Target("ollama", 2.5, "read1"),
    )

    def takes(self, peer: type[Peer], case: str) -> bool:
        return case in peer.dialects

    def measure(self, peer: Peer, case: str) -> dict[str, float]:
        chunks = self.pick(100_000, 10_000) if case in ("openai", "anthropic") else self.pick(20_000, 5_000)
        # anthropic's helper takes the longer for a chunk the more there are, so in a full run all read the same
        scenario = Scenario(case, chunks=chunks // 10 if self.quick and peer.slow else chunks)
        return {case: cpu_of(warmed(peer, scenario), scenario) / scenario.chunks * 1e6}


class Alone(Figure):
    name = "alone"
    title = "CPU per chunk that arrives alone, 1 ms after the one before"
    unit = "us"
    targets = (
        Target("openai", 1.5, "read1"),
        Target("openai", 1.5, "read1", ours="chunks()"),
        Target("openai", 1 / 4, "openai"),
        Target("openai", 1.6, "others"),
    )

    def takes(self, peer: type[Peer], case: str) -> bool:
        return "openai" in peer.dialects

    def measure(self, peer: Peer, case: str) -> dict[str, float]:
        scenario = Scenario(chunks=self.pick(2000, 200), pace=0.001)
        texts = iter(warmed(peer, scenario)())
        first = next(texts)
        start = time.process_time()
        rest = "".join(texts)
        taken = time.process_time() - start
        check(first + rest, scenario)
        return {"openai": taken / (scenario.chunks - 1) * 1e6}


FRAMINGS = ("chunked", "one-chunk", "length", "close", "gzip")


class Delay(Figure):
    name = "delay"
    title = "Delay from the server's write to the caller's hand, chunk alone"
    unit = "us"
    cases = FRAMINGS
    targets = tuple(
        target
        for framing in FRAMINGS
        for target in (
            Target(f"{framing}, median", 50, how="more"),
            Target(f"{framing}, p99", 1000, how="more"),
        )
    )

    def measure(self, peer: Peer, case: str) -> dict[str, float]:
        scenario = Scenario(chunks=self.pick(1000, 60), pace=0.001, framing=case)
        ask = warmed(peer, scenario)
        texts, came = [], []
        for text in ask():
            came.append(time.perf_counter())
            texts.append(text)
        check("".join(texts), scenario)
        if len(texts) != scenario.chunks:
            raise Differs(f"{scenario.path}: expected {scenario.chunks} pieces of text, got {len(texts)}")
        delays = sorted((after - before) * 1e6 for before, after in zip(stamps(peer)[1:], came))  # the head comes first
        return {f"{case}, median": statistics.median(delays), f"{case}, p99": delays[int(len(delays) * 0.99)]}


def stamps(peer: Peer) -> list[float]:
    """When the server wrote"""
    connection = http.client.HTTPConnection(peer.origin.rpartition("/")[2])
    with contextlib.closing(connection):
        connection.request("GET", "/stamps")
        moments: list[float] = json.loads(connection.getresponse().read())
    return moments


class FirstText(Figure):
    name = "first"
    title = "Time to the first text, on a warm connection"
    unit = "ms"
    targets = (Target("openai", 1.5, how="more"), Target("openai", 0.5, "openai"))

    def measure(self, peer: Peer, case: str) -> dict[str, float]:
        scenario = Scenario()
        ask = warmed(peer, scenario)
        cpu_of(ask, scenario)  # which opens the connection
        times = []
        for _ in range(self.pick(200, 30)):
            start = time.perf_counter()
            texts = iter(ask())
            first = next(texts)
            times.append((time.perf_counter() - start) * 1000)
            check(first + "".join(texts), scenario)
        return {"openai": statistics.median(times)}


class Streams(Figure):
    name = "streams"
    title = "Streams of 10 chunks, started and finished on 8 threads"
    unit = "a second"
    targets = (Target("openai", 2.5, "openai", at_least=True),)

    def measure(self, peer: Peer, case: str) -> dict[str, float]:
        scenario, count = Scenario(), self.pick(2000, 240)
        ask = warmed(peer, scenario)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: cpu_of(ask, scenario), range(16)))
            start = time.perf_counter()
            texts = list(pool.map(lambda _: "".join(ask()), range(count)))
            taken = time.perf_counter() - start
        for text in texts:
            check(text, scenario)
        return {"openai": count / taken}


class Import(Figure):
    name = "import"
    title = "Import, with what it needs (CPU time)"
    unit = "ms"
    targets = (Target("after requests", 7, ""), Target("all", 1 / 4, "openai"))

    _PROGRAM = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
for name in sys.argv[1:]:
    start = time.process_time()
    __import__(name)
    print((time.process_time() - start) * 1000)
"""

    def takes(self, peer: type[Peer], case: str) -> bool:
        is_twice = peer.for_chunks or peer.name == "anthropic events"  # the same modules again
        return bool(peer.modules) and not is_twice

    def measure(self, peer: Peer, case: str) -> dict[str, float]:
        root = str(Path(__file__).resolve().parent.parent)
        command = [sys.executable, "-c", self._PROGRAM, root, *peer.modules]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        times = list(map(float, done.stdout.split()))
        rows = {"all": sum(times)}
        return {**rows, "after requests": times[-1]} if peer.modules[:-1] == ("requests",) else rows


class Memory(Figure):
    name = "memory"
    title = "Memory for 1,000 streams held open, each on its thread"
    unit = "MB"
    targets = (Target("openai", 52, ""), Target("openai", 0.6, "openai"))
    fresh = True

    def takes(self, peer: type[Peer], case: str) -> bool:
        return super().takes(peer, case) and (not self.quick or peer.name in ("sheepsse", "bare", "openai"))

    def measure(self, peer: Peer, case: str) -> dict[str, float]:
        if memory("VmRSS") is None:
            raise Absent("memory is measured on Linux alone")
        count = self.pick(1000, 500)
        allow_files(count + 100)
        scenario = Scenario(hold=True)
        warmed(peer, Scenario())
        ask = peer.open(scenario)
        first = next(scenario.texts())
        came = threading.Semaphore(0)
        wrong: list[str] = []

        def hold() -> None:
            try:
                if isinstance(peer, Bare):
                    held: Any = peer.connected(scenario)
                    text = first if first.encode() in held.recv(4096) else ""
                else:
                    held = iter(ask())
                    text = next(held)
                if text != first:
                    wrong.append(f"expected {first!r}, got {text!r}")
            except Exception as error:
                wrong.append(repr(error))
            came.release()
            time.sleep(600)

        before = memory("VmRSS") or 0.0
        for _ in range(count):
            threading.Thread(target=hold, daemon=True).start()
        for _ in range(count):
            came.acquire()
        if wrong:
            raise Differs(wrong[0])
        return {"openai": ((memory("VmRSS") or 0.0) - before) / count * 1000}


def memory(name: str) -> float | None:
    """What the kernel says of this process's memory, in MB; None where it says nothing, as Linux alone does"""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return float(next(line for line in lines if line.startswith(name + ":")).split()[1]) / 1024


def allow_files(count: int) -> None:
    import resource  # not on Windows, where nothing of this is measured

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard), hard))


class Reconnect(Figure):
    name = "reconnect"
    title = "Reconnect after a cut, to the first new text"
    unit = "ms"
    targets = (Target("openai", 10, ""),)

    def takes(self, peer: type[Peer], case: str) -> bool:
        return peer.reconnects and not peer.for_chunks

    def measure(self, peer: Peer, case: str) -> dict[str, float]:
        scenario = Scenario(chunks=20, cut=10)
        warmed(peer, Scenario())
        ask = peer.open(scenario)
        times = []
        for _ in range(self.pick(50, 10)):
            texts: list[str] = []
            came = 0.0
            for text in ask():
                if len(texts) == scenario.cut:
                    came = time.perf_counter()
                texts.append(text)
            check("".join(texts), scenario)
            times.append((came - stamps(peer)[0]) * 1000)
        return {"openai": statistics.median(times)}


class Growth(Figure):
    """How the CPU time grows with the size (an exponent: 1 is linear, 2 quadratic), and what memory grows by"""

    name = "growth"
    title = "Growth with the number of chunks, the size of an event, the length of the text"
    unit = ""
    cases = ("chunks", "event", "text")
    targets = (
        Target("chunks, exponent", 1.05, ""),
        Target("chunks, MB beyond the text", 10, how="more"),
        Target("event, exponent", 1.05, ""),
        Target("text, exponent", 1.05, ""),
        Target("text, MB beyond the text", 10, how="more"),
    )
    fresh = True

    #: number of chunks, bytes in an event, bytes in the text
    _SIZES: ClassVar[dict[str, tuple[int, ...]]] = {
        "chunks": (1_000, 10_000, 100_000, 1_000_000),
        "event": (1 << 10, 1 << 14, 1 << 18, 1 << 22),
        "text": (1_000, 100_000, 10_000_000, 100_000_000),
    }

    def takes(self, peer: type[Peer], case: str) -> bool:
        return super().takes(peer, case) and (not self.quick or peer.name in ("sheepsse", "bare"))

    def measure(self, peer: Peer, case: str) -> dict[str, float]:
        sizes = self._SIZES[case]
        sizes = sizes[:-1] if self.quick or peer.slow else sizes
        measure: Callable[[Peer, int], tuple[float, float | None]] = getattr(self, "_" + case)
        measure(peer, sizes[0])
        times, peaks = zip(*(measure(peer, size) for size in sizes))
        # the smallest is left out: there it is the request that counts
        slope = exponent(sizes[1:], times[1:])
        rows = {f"{case}, exponent": slope}
        if peaks[0] is not None:
            kept = sizes[-1] if case == "text" else len("".join(Scenario(chunks=sizes[-1]).texts()).encode())
            rows[f"{case}, MB beyond the text"] = peaks[-1] - peaks[0] - kept / 2**20
        return rows

    @staticmethod
    def _chunks(peer: Peer, size: int) -> tuple[float, float | None]:
        """Seconds and the peak of memory for a stream of which the caller keeps nothing"""
        scenario = Scenario(chunks=size)
        ask = warmed(peer, scenario)
        start = time.process_time()
        same = all(got == sent for got, sent in itertools.zip_longest(ask(), scenario.texts()))
        taken = time.process_time() - start
        if not same:
            raise Differs(f"{scenario.path}: the pieces of text are not those that were sent")
        return taken, memory("VmHWM")

    def _event(self, peer: Peer, size: int) -> tuple[float, float | None]:
        """Seconds for an event of this size"""
        scenario = Scenario(chunks=max(1, self.pick(1 << 23, 1 << 21) // size), size=size)
        warmed(peer, Scenario())
        return cpu_of(peer.open(scenario), scenario) / scenario.chunks, None

    @staticmethod
    def _text(peer: Peer, size: int) -> tuple[float, float | None]:
        """Seconds and the peak of memory for a text that is kept, in pieces of a thousand letters"""
        scenario = Scenario(chunks=size // 1000, size=1000)
        ask = warmed(peer, scenario)
        start = time.process_time()
        text = "".join(ask())
        taken, peak = time.process_time() - start, memory("VmHWM")
        check(text, scenario)
        return taken, peak


def exponent(sizes: Sequence[int], times: Sequence[float]) -> float:
    """The slope of the times over the sizes, both as logarithms, by least squares"""
    xs, ys = [math.log(size) for size in sizes], [math.log(max(taken, 1e-9)) for taken in times]
    middle_x, middle_y = statistics.mean(xs), statistics.mean(ys)
    return sum((x - middle_x) * (y - middle_y) for x, y in zip(xs, ys)) / sum((x - middle_x) ** 2 for x in xs)


class Features(Figure):
    name = "features"
    title = "CPU a chunk more, with a feature switched on"
    unit = "us"
    cases = ("stats", "checkpoint", "limiter")
    targets = (Target("stats", 1.0, ""), Target("checkpoint", 4, ""), Target("limiter", 1.0, ""))

    def takes(self, peer: type[Peer], case: str) -> bool:
        return peer is Sheepsse

    def measure(self, peer: Peer, case: str) -> dict[str, float]:
        assert isinstance(peer, Sheepsse)
        scenario = Scenario(chunks=self.pick(20_000, 5_000))
        client = peer.client(scenario)
        more = []
        for _ in range(3):
            taken = []
            for switched in SWITCHES[case]:
                with switched() as options:
                    taken.append(cpu_of(partial(client.stream, "Hi", **options), scenario))
            more.append((taken[1] - taken[0]) / scenario.chunks * 1e6)
        return {case: statistics.median(more)}


Options = Iterator[Dict[str, Any]]
Switch = Callable[[], ContextManager[Dict[str, Any]]]


@contextlib.contextmanager
def plain() -> Options:
    yield {}


def no_note(*_: Any) -> None:
    pass


@contextlib.contextmanager
def without_stats() -> Options:
    """Stats are always on: a clock that notes nothing is what comes nearest to a stream without them"""
    import sheepsse

    with mock.patch.object(sheepsse._Clock, "note", no_note):
        yield {}


@contextlib.contextmanager
def checkpointed() -> Options:
    with tempfile.TemporaryDirectory() as folder:
        yield {"checkpoint": folder}


@contextlib.contextmanager
def limited() -> Options:
    import sheepsse

    if not hasattr(sheepsse, "Limiter"):
        raise Absent("sheepsse has no Limiter yet")
    yield {"limiter": sheepsse.Limiter()}


#: without a feature, and with it
SWITCHES: dict[str, tuple[Switch, Switch]] = {
    "stats": (without_stats, plain),
    "checkpoint": (plain, checkpointed),
    "limiter": (plain, limited),
}


FIGURES: dict[str, type[Figure]] = {
    figure.name: figure
    for figure in (Block, Alone, Delay, FirstText, Streams, Import, Memory, Reconnect, Growth, Features)
}
