"""The streams that are measured: what a scenario sends, and what its text must be.

Their chunks differ as those of the real services do: OpenAI's in their text alone; Anthropic's also in the blanks that
pad them; those of Responses in their numbers and their obfuscation; Gemini's in their counts; Ollama's in their times.
The same scenario is always the same bytes.
"""

from __future__ import annotations

import itertools
import json
import random
import string
import time
from typing import Any, Callable, Iterator, NamedTuple

#: what a model says, over and over: most pieces are plain, some need an escape, some are not ASCII
WORDS = (
    "Tokens", " arrive", " one", " by", " one", ",", " so", " a", " reader", " can", " follow", " along", ".", "\n\n",
    "- **", "First", "**:", ' "', "quoted", '"', " words", ";", "\n", "-", " Sau", " đó", " là", " tiếng", " Việt", ".",
    " A", " path", " C", ":\\", "temp", " and", " 🐑", " sheep", "!", " It", " is", " all", " said", " in", " pieces",
    " of", " four", " letters", " or", " so", " (", "more", " or", " less", ")", ".", " 世界", " wide", ".", " Next",
)  # fmt: skip

EVENT_STREAM = "text/event-stream; charset=utf-8"


class Scenario(NamedTuple):
    """What a server is to send; it is a part of the path of the request"""

    dialect: str = "openai"
    #: pieces of text, each of them an event
    chunks: int = 10
    #: seconds between two events; 0 for as many in one write as there is room for
    pace: float = 0.0
    #: chunked, one-chunk, length, close or gzip (closed at its end)
    framing: str = "chunked"
    #: letters in a piece of text; 0 for WORDS
    size: int = 0
    #: send the first event, and then nothing until the client goes
    hold: bool = False
    #: give the events ids, and lose the connection after so many of them
    cut: int = 0

    @property
    def path(self) -> str:
        """The beginning of a path that asks for it"""
        return "/" + ",".join(f"{name}={value}" for name, value in self._asdict().items())

    @classmethod
    def of(cls, path: str) -> Scenario:
        """The scenario that the first part of a path names"""
        fields = dict(pair.split("=") for pair in path.split("/")[1].split(","))
        kinds: dict[str, Callable[[str], Any]] = {"dialect": str, "framing": str, "pace": float, "hold": "True".__eq__}
        return cls(**{name: kinds.get(name, int)(value) for name, value in fields.items()})

    @property
    def content_type(self) -> str:
        return "application/x-ndjson" if self.dialect == "ollama" else EVENT_STREAM

    def texts(self) -> Iterator[str]:
        """The pieces of text, in order"""
        words = (f"{'x' * (self.size - 1)} ",) if self.size else WORDS
        return itertools.islice(itertools.cycle(words), self.chunks)

    def events(self) -> Iterator[bytes]:
        """All that comes before the first piece of text, then an event for each piece, then all that follows"""
        return DIALECTS[self.dialect](self)


def quoted(value: Any) -> str:
    """The JSON of a value, as the services write it: UTF-8, and no blanks"""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def openai(scenario: Scenario) -> Iterator[bytes]:
    """Chat Completions, without obfuscation"""
    start = (
        '{"id":"chatcmpl-Bx7Zf0Kq3mWn9TtYvRb2LdQe","object":"chat.completion.chunk","created":1763700000,'
        '"model":"gpt-4.1-mini-2025-04-14","service_tier":"default","system_fingerprint":"fp_6f2eabb9a5","choices":'
    )

    def event(choices: str, usage: str = "null") -> bytes:
        return f'data: {start}{choices},"usage":{usage}}}\n\n'.encode()

    def choice(delta: str, reason: str = "null") -> str:
        return f'[{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{reason}}}]'

    yield event(choice('{"role":"assistant","content":"","refusal":null}'))
    for text in scenario.texts():
        yield event(choice(f'{{"content":{quoted(text)}}}'))
    usage = (
        f'{{"prompt_tokens":12,"completion_tokens":{scenario.chunks},"total_tokens":{scenario.chunks + 12},'
        '"prompt_tokens_details":{"cached_tokens":0,"audio_tokens":0},'
        '"completion_tokens_details":{"reasoning_tokens":0,"audio_tokens":0}}'
    )
    yield event(choice("{}", '"stop"')) + event("[]", usage) + b"data: [DONE]\n\n"


def anthropic(scenario: Scenario) -> Iterator[bytes]:
    """Messages, padded with blanks"""
    chance = random.Random(1)

    def event(kind: str, fields: str = "") -> bytes:
        padding = " " * chance.randrange(16)
        return f'event: {kind}\ndata: {{"type":"{kind}"{fields}{padding}}}\n\n'.encode()

    message = (
        ',"message":{"model":"claude-sonnet-4-5-20250929","id":"msg_01Hq8Zt5bYw2Rk7NdVx3LcPm","type":"message",'
        '"role":"assistant","content":[],"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":17,'
        '"cache_creation_input_tokens":0,"cache_read_input_tokens":0,"output_tokens":1,"service_tier":"standard"}}'
    )
    begin = event("content_block_start", ',"index":0,"content_block":{"type":"text","text":""}')
    yield event("message_start", message) + begin + b'event: ping\ndata: {"type": "ping"}\n\n'
    for text in scenario.texts():
        yield event("content_block_delta", f',"index":0,"delta":{{"type":"text_delta","text":{quoted(text)}}}')
    delta = (
        ',"delta":{"stop_reason":"end_turn","stop_sequence":null},"usage":{"input_tokens":17,'
        f'"cache_creation_input_tokens":0,"cache_read_input_tokens":0,"output_tokens":{scenario.chunks}}}'
    )
    yield event("content_block_stop", ',"index":0') + event("message_delta", delta) + event("message_stop")


def responses(scenario: Scenario) -> Iterator[bytes]:
    """Responses, numbered and obfuscated; the end repeats the text four times"""
    chance = random.Random(2)
    letters = string.ascii_letters + string.digits
    item = "msg_0c4d1e7a92b35f6800691f3a5e71d48196a2c7e0b94d5f8a31"
    numbers = itertools.count()

    def event(kind: str, fields: str) -> bytes:
        return f'event: {kind}\ndata: {{"type":"{kind}",{fields},"sequence_number":{next(numbers)}}}\n\n'.encode()

    def response(status: str, output: str = "", usage: str = "null") -> str:
        return (
            '"response":{"id":"resp_0c4d1e7a92b35f6800691f3a5d60c08196b1d6f9a83c4e7b20","object":"response",'
            f'"created_at":1763700000,"status":"{status}","background":false,"error":null,"incomplete_details":null,'
            f'"instructions":null,"metadata":{{}},"model":"gpt-4.1-mini-2025-04-14","output":[{output}],'
            '"parallel_tool_calls":true,"temperature":1.0,"tool_choice":"auto","tools":[],"top_p":1.0,'
            f'"usage":{usage}}}'
        )

    def message(status: str, content: str = "") -> str:
        return f'{{"id":"{item}","type":"message","status":"{status}","content":[{content}],"role":"assistant"}}'

    def part(text: str) -> str:
        return f'{{"type":"output_text","annotations":[],"logprobs":[],"text":{quoted(text)}}}'

    place = f'"content_index":0,"item_id":"{item}","output_index":0'
    yield (
        event("response.created", response("in_progress"))
        + event("response.in_progress", response("in_progress"))
        + event("response.output_item.added", f'"item":{message("in_progress")},"output_index":0')
        + event("response.content_part.added", f'{place},"part":{part("")}')
    )
    for text in scenario.texts():
        noise = "".join(chance.choices(letters, k=max(1, 16 - len(text))))
        fields = (
            f'"content_index":0,"delta":{quoted(text)},"item_id":"{item}","logprobs":[],"obfuscation":"{noise}",'
            '"output_index":0'
        )
        yield event("response.output_text.delta", fields)
    said = "".join(scenario.texts())
    whole = message("completed", part(said))
    usage = (
        f'{{"input_tokens":10,"input_tokens_details":{{"cached_tokens":0}},"output_tokens":{scenario.chunks},'
        f'"output_tokens_details":{{"reasoning_tokens":0}},"total_tokens":{scenario.chunks + 10}}}'
    )
    yield (
        event("response.output_text.done", f'{place},"logprobs":[],"text":{quoted(said)}')
        + event("response.content_part.done", f'{place},"part":{part(said)}')
        + event("response.output_item.done", f'"item":{whole},"output_index":0')
        + event("response.completed", response("completed", whole, usage))
    )


def gemini(scenario: Scenario) -> Iterator[bytes]:
    """Lines that end with CRLF, JSON with blanks, and in each chunk the count of what came so far"""

    def event(text: str, count: int, reason: str = "") -> bytes:
        return (
            f'data: {{"candidates": [{{"content": {{"parts": [{{"text": {quoted(text)}}}],"role": "model"}},{reason}'
            f'"index": 0}}],"usageMetadata": {{"promptTokenCount": 15,"candidatesTokenCount": {count},'
            f'"totalTokenCount": {count + 15},"promptTokensDetails": [{{"modality": "TEXT","tokenCount": 15}}]}},'
            '"modelVersion": "gemini-2.5-flash","responseId": "k3RfaZq7Ht2dvdIPyMm1sAo"}\r\n\r\n'
        ).encode()

    yield b""
    for count, text in enumerate(scenario.texts(), 1):
        yield event(text, count)
    yield event("", scenario.chunks, '"finishReason": "STOP",')


def ollama(scenario: Scenario) -> Iterator[bytes]:
    """A line of JSON a chunk, each with its time, written as Go does: no zeros at the end of the fraction"""
    chance = random.Random(3)
    micros = 0

    def event(text: str, end: str = '"done":false') -> bytes:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(1_795_000_000 + micros // 1_000_000))
        fraction = f".{micros % 1_000_000:06d}".rstrip("0").rstrip(".")
        return (
            f'{{"model":"llama3.2","created_at":"{moment}{fraction}Z",'
            f'"message":{{"role":"assistant","content":{quoted(text)}}},{end}}}\n'
        ).encode()

    yield b""
    for text in scenario.texts():
        micros += chance.randrange(20_000, 45_000)
        yield event(text)
    yield event(
        "",
        '"done_reason":"stop","done":true,"total_duration":2104518250,"load_duration":1820417,"prompt_eval_count":17,'
        f'"prompt_eval_duration":298120000,"eval_count":{scenario.chunks},"eval_duration":1763400000',
    )


DIALECTS: dict[str, Callable[[Scenario], Iterator[bytes]]] = {
    "openai": openai,
    "anthropic": anthropic,
    "responses": responses,
    "gemini": gemini,
    "ollama": ollama,
}

#: where the piece of text is in the JSON of an event, for a caller who takes it out without a library
TEXT_OF: dict[str, Callable[[Any], str]] = {
    "openai": lambda payload: payload["choices"][0]["delta"].get("content", "") if payload["choices"] else "",
    "anthropic": lambda payload: payload["delta"]["text"] if payload["type"] == "content_block_delta" else "",
    "responses": lambda payload: payload["delta"] if payload["type"] == "response.output_text.delta" else "",
    "gemini": lambda payload: payload["candidates"][0]["content"]["parts"][0]["text"],
    "ollama": lambda payload: payload["message"]["content"],
}

#: whether the JSON of an event is the last of its stream, for a caller who must stop by himself
IS_LAST: dict[str, Callable[[Any], bool]] = {
    "openai": lambda payload: False,  # [DONE], which is no JSON
    "anthropic": lambda payload: payload["type"] == "message_stop",
    "responses": lambda payload: payload["type"] == "response.completed",
    "gemini": lambda payload: "finishReason" in payload["candidates"][0],
    "ollama": lambda payload: bool(payload["done"]),
}
