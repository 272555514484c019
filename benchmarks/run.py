"""Measures sheepsse against others that read streams: the same stream, from the same server in a process of its own.

    python -m pip install -r benchmarks/requirements.txt && python benchmarks/run.py

Prints a Markdown table on the standard output, and writes a JSON file and a picture if asked to. The peers take turns,
and a target is held against the ratio within each run. Fails where a benchmark breaks or a peer's text is not what was
sent, and never because a machine is slow.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Iterator, Sequence

from figures import FIGURES, Figure
from peers import PEERS
from report import Result, as_json, draw, markdown

HERE = Path(__file__).resolve().parent
#: seconds after which a measurement is given up
PATIENCE = 600


class Process:
    """Another Python that runs a program of this folder, and is told by lines what to do"""

    def __init__(self, program: str, *arguments: str) -> None:
        command = [sys.executable, str(HERE / program), *arguments]
        # else each import would compile again
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            universal_newlines=True,
            bufsize=1,
            env=environment,
        )

    def write(self, line: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def read(self) -> str:
        """The next line, "" where the process has ended or takes too long"""
        assert self._process.stdout
        timer = threading.Timer(PATIENCE, self._process.kill)
        timer.start()
        try:
            return self._process.stdout.readline()
        finally:
            timer.cancel()

    def close(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class Workers:
    """The processes that measure, one a peer, each made when it is first needed"""

    def __init__(self) -> None:
        self._server = Process("server.py")
        self._origin = f"http://127.0.0.1:{self._server.read().strip()}"
        self._processes: dict[str, Process] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in (*self._processes.values(), self._server):
            process.close()

    def measured(self, peer: str, figure: Figure, case: str) -> dict[str, Any]:
        """What a worker answers: rows, or why there are none"""
        process = self._processes.pop(peer, None) or Process("worker.py", peer, self._origin)
        process.write(json.dumps({"figure": figure.name, "case": case, "quick": figure.quick}))
        line = process.read()
        if line and not figure.fresh:
            self._processes[peer] = process
        else:
            process.close()
        answer: dict[str, Any] = json.loads(line) if line else {"broken": "the process that measures died"}
        return answer


def turns(figure: Figure, runs: int) -> Iterator[tuple[str, str]]:
    """The cases and peers in turn; each run begins with another peer"""
    names = list(PEERS)
    for run in range(runs):
        for case in figure.cases:
            start = run % len(names)
            for name in names[start:] + names[:start]:
                if figure.takes(PEERS[name], case):
                    yield case, name


def measure(figures: Sequence[Figure], runs: int, command: str) -> Result:
    """All figures, one after the other"""
    result = Result(command, [], {}, [], [])
    with Workers() as workers:
        for figure in figures:
            rows = result.samples.setdefault(figure.name, {})
            for case, peer in turns(figure, runs):
                show(f"{figure.name} {case} {peer}")
                answer = workers.measured(peer, figure, case)
                if peer not in result.peers:
                    result.peers.append(peer)
                if any(target.row == case for target in figure.targets):
                    rows.setdefault(case, {})  # dashes, where nobody has it
                for row, value in answer.get("rows", {}).items():
                    rows.setdefault(row, {}).setdefault(peer, []).append(value)
                note(result, peer, f"{peer}, {figure.name} {case}".rstrip(), answer)
    show("")
    return result


def note(result: Result, peer: str, where: str, answer: dict[str, Any]) -> None:
    """Notes what was left out, or broke, once"""
    kinds = (("missing", peer, result.absent), ("absent", where, result.absent), ("broken", where, result.broken))
    for kind, subject, lines in kinds:
        line = f"{subject}: {answer.get(kind)}"
        if kind in answer and line not in lines:
            lines.append(line)


def show(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    figures = "\n".join(f"  {kind.name:<11}{kind.title}" for kind in FIGURES.values())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"figures:\n{figures}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a minute: shorter streams, fewer peers, rough figures")
    parser.add_argument(
        "--only", action="append", choices=list(FIGURES), metavar="NAME", help="this figure alone; may be repeated"
    )
    parser.add_argument("--runs", type=int, metavar="N", help="how often each is measured (default: 5; with --quick 3)")
    parser.add_argument("--json", metavar="FILE", help="write all runs into this file")
    parser.add_argument("--picture", metavar="FILE", help="draw the table into this file (.png, .svg, .pdf)")
    options = parser.parse_args(argv)
    if options.runs is None:
        options.runs = 3 if options.quick else 5
    if options.runs < 1:
        parser.error("--runs is 1 or more")
    if options.picture:  # not when all has been measured
        try:
            importlib.import_module("matplotlib")
        except ImportError as error:
            parser.error(f"--picture needs matplotlib: {error}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parsed(argv)
    given: list[str] = sys.argv[1:] if argv is None else list(argv)
    command = shlex.join(["python", "benchmarks/run.py", *given])
    figures = [FIGURES[name](options.quick) for name in options.only or FIGURES]
    result = measure(figures, options.runs, command)
    print(markdown(result))
    if options.json:
        Path(options.json).write_text(as_json(result) + "\n", encoding="utf-8")
    if options.picture:
        draw(result, options.picture)
    for line in result.broken:
        print(f"broken: {line}", file=sys.stderr)
    return 1 if result.broken else 0


if __name__ == "__main__":
    sys.exit(main())
