"""Words as a model writes them, without a key: streams from a provider on this machine.

    $ python examples/demo.py
    $ python examples/demo.py --dialect anthropic

With a key, the client is made from the environment and the rest stays as it is:
`sheepsse.stream("...", model="deepseek-chat")`.
"""

from __future__ import annotations

import argparse
import sys
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
    parser = argparse.ArgumentParser(description="Stream an answer from a provider on this machine; no key is needed.")
    parser.add_argument("--pace", type=float, default=0.03, metavar="SECONDS", help="between two words (%(default)s)")
    names = sorted(sheepsse.DIALECTS)
    parser.add_argument("--dialect", choices=names, default="openai", help="what the provider speaks (%(default)s)")
    options = parser.parse_args(argv)
    with LocalProvider() as server:
        server.default = Answer(text=ANSWER, pace=options.pace)
        base_url = server.origin + DIALECT_BASES[options.dialect]
        with sheepsse.Client(base_url=base_url, dialect=options.dialect, api_key=False) as client:
            show(sheepsse.stream(QUESTION, model="local-model", client=client))


def show(stream: sheepsse.Stream) -> None:
    """Print the text as it comes, then how it came on stderr."""
    for text in stream:
        print(text, end="", flush=True)
    print(flush=True)
    print(summary(stream), file=sys.stderr)


def summary(stream: sheepsse.Stream) -> str:
    stats, usage = stream.stats, stream.usage
    first = "no text" if stats.ttft is None else f"first text after {stats.ttft * 1000:.0f} ms"
    tokens = "unknown usage" if usage is None else f"{usage.input_tokens} tokens in, {usage.output_tokens} out"
    return f"[{first}, {stats.chunks} chunks in {stats.elapsed:.2f} s, {tokens}]"


if __name__ == "__main__":
    main()
