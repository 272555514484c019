"""Words as a model writes them, without a key: streams from a provider on this machine.

    $ python examples/demo.py
    $ python examples/demo.py --dialect anthropic
    $ python examples/demo.py --drop 3 --kill

With a key, the client is made from the environment and the rest stays as it is:
`sheepsse.stream("...", model="deepseek-chat")`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from typing import Sequence

import sheepsse
from local_provider import DIALECT_BASES, Answer, LocalProvider

QUESTION = "What is it like to read an answer while it is being written?"
ANSWER = (
    "Like listening instead of waiting for a letter: each word is here the moment it is chosen, "
    "and you can already nod, or say stop. 🐑\n"
    "Giống như nghe ai đó kể chuyện: từng chữ đến ngay khi vừa được nghĩ ra."
)


def main(argv: Sequence[str] | None = None) -> None:
    options = parsed(argv)
    if options.asks:  # the process that --kill kills
        with sheepsse.Client(base_url=options.asks, dialect=options.dialect, api_key=False) as client:
            show(sheepsse.stream(QUESTION, model="local-model", client=client, checkpoint=options.checkpoint))
        return
    with LocalProvider() as server:
        # the event ids let the client ask for the rest of an answer whose connection was lost
        server.default = Answer(
            text=ANSWER, pace=options.pace, ids="numbers" if options.drop or options.kill else "none"
        )
        for _ in range(options.drop):
            server.answer(server.default._replace(cut_after=max(2, 24 // options.drop), cut="reset"))
        base_url = server.origin + DIALECT_BASES[options.dialect]
        if options.kill:
            killed_once(server, base_url, options.dialect, options.drop)
            return
        with sheepsse.Client(base_url=base_url, dialect=options.dialect, api_key=False) as client:
            text = show(sheepsse.stream(QUESTION, model="local-model", client=client))
        if options.drop:
            account(server, options.drop, 0, text)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Stream an answer from a provider on this machine; no key is needed.")
    parser.add_argument("--pace", type=float, default=0.03, metavar="SECONDS", help="between two words (%(default)s)")
    names = sorted(sheepsse.DIALECTS)
    parser.add_argument("--dialect", choices=names, default="openai", help="what the provider speaks (%(default)s)")
    parser.add_argument("--drop", type=int, default=0, metavar="TIMES", help="lose the connection so many times")
    parser.add_argument("--kill", action="store_true", help="kill the process that asks once, and start it again")
    parser.add_argument("--asks", metavar="URL", help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.dialect == "ollama" and (options.drop or options.kill):
        parser.error("--drop and --kill go on by the ids of events, and Ollama's stream has none")
    return options


def show(stream: sheepsse.Stream) -> str:
    """Print the text as it comes, then how it came on stderr."""
    for text in stream:
        print(text, end="", flush=True)
    print(flush=True)
    print(summary(stream), file=sys.stderr)
    return stream.text


def summary(stream: sheepsse.Stream) -> str:
    stats, usage = stream.stats, stream.usage
    first = "no text" if stats.ttft is None else f"first text after {stats.ttft * 1000:.0f} ms"
    tokens = "unknown usage" if usage is None else f"{usage.input_tokens} tokens in, {usage.output_tokens} out"
    return f"[{first}, {stats.chunks} chunks in {stats.elapsed:.2f} s, {tokens}, {stream.continuity}]"


def killed_once(server: LocalProvider, base_url: str, dialect: str, drops: int) -> None:
    """Ask in a process of its own, kill that when most of the answer is there, and start it again."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--asks", base_url, "--dialect", dialect, "--checkpoint", folder]
        most, _ = passed_on(command, len(ANSWER.encode()) * 3 // 4)
        print("\n[killed; the same command again:]", file=sys.stderr, flush=True)
        whole, status = passed_on(command)
    if status:
        sys.exit(status)
    if not ANSWER.startswith(most):
        sys.exit("the first process has written what is not in the answer")
    account(server, drops, 1, whole.rstrip("\r\n"))


def passed_on(command: Sequence[str], limit: int = sys.maxsize) -> tuple[str, int]:
    """What a command prints, printed as it comes, and its status; killed (SIGKILL) after so many bytes."""
    said = b""
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        while len(said) < limit:
            piece = process.stdout.read(65536)
            if not piece:
                break
            said += piece
            sys.stdout.buffer.write(piece)
            sys.stdout.flush()
        if len(said) >= limit:
            process.kill()
    return said.decode("utf-8", "ignore"), process.returncode


def account(server: LocalProvider, drops: int, kills: int, text: str) -> None:
    """Say what it took, and whether the text is the answer."""
    drops -= len(server.queued)  # those that nobody came for
    exact = "exact" if text == ANSWER else "NOT EXACT"
    lost = f"{drops} connections lost, {kills} process{'' if kills == 1 else 'es'} killed"
    asked = f"{len(server.requests)} requests, {server.billed} generation{'' if server.billed == 1 else 's'} billed"
    print(f"[{lost}, {asked}; the text is {exact}]", file=sys.stderr)
    if text != ANSWER:
        sys.exit(1)


if __name__ == "__main__":
    main()
