"""A model provider on this machine, for the demo, the tests and the benchmarks; the standard library is all it needs.

It listens on 127.0.0.1, speaks the OpenAI chat dialect over real sockets, paces its words, and goes wrong at the byte
or event that the caller names. In the same process::

    from local_provider import Answer, LocalProvider

    with LocalProvider(Answer(text="Not the whole story", cut_after=3)) as server:
        requests.post(server.base_url + "/chat/completions", json={"stream": True, "messages": []}, stream=True)

In a process of its own, each request says what is to go wrong::

    $ python examples/local_provider.py --port 8000 --pace 0.03
    http://127.0.0.1:8000/v1
    $ curl -N http://127.0.0.1:8000/v1/chat/completions -d '{"stream": true, "messages": []}' \\
        -H 'X-Local-Answer: {"cut_at": 700, "framing": "length"}'

The way of an answer, with what a body says on the left of `framed` and how it travels on the right::

    Answer --content_of--> Content --framed--> Framed --script--> bytes, pauses and faults --Connection--> socket
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import enum
import http.client
import io
import itertools
import json
import re
import socket
import ssl
import struct
import threading
import time
import zlib
from collections import deque
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Sequence, Tuple, Union, final

MODEL = "local-model"
COMPLETION_ID = "chatcmpl-local"
CREATED = 1700000000
TEXT = "Tokens arrive one by one, so you can read along 🐑 chữ đến dần, từng từ một."

EVENT_STREAM = "text/event-stream; charset=utf-8"
JSON = "application/json"
NDJSON = "application/x-ndjson"

Headers = Union[Mapping[str, Union[str, None]], Sequence[Tuple[str, Union[str, None]]]]


# ---------------------------------------------------------------------------
# Values
# What is asked and how it is answered; nothing here knows a dialect or a socket.
# ---------------------------------------------------------------------------


class Answer(NamedTuple):
    """How one request is answered. With no `body` and no `events`, the request's path decides what is said."""

    status: int = 200
    #: Further headers, or others in place of the usual ones; a value of None leaves a header out.
    headers: Headers = ()
    #: The exact body, before framing. It is written event by event (line by line if it is NDJSON).
    body: bytes | None = None
    #: The body as separate writes. It may be an iterator without end, if the framing promises no length; one that
    #: blocks stops the whole server.
    events: Iterable[bytes] | None = None
    #: What the model says, where there is neither `body` nor `events`.
    text: str = TEXT
    content_type: str | None = None
    #: chunked, one-chunk (the whole body in one chunk), length, close, gzip (chunked), gzip-length or gzip-close.
    framing: str = "chunked"
    #: Write the body in pieces of so many bytes; 0 writes an event at a time.
    block: int = 0
    #: Seconds between two writes.
    pace: float = 0.0
    #: Seconds before the status line.
    delay: float = 0.0
    #: Seconds between two bytes of the header.
    header_pace: float = 0.0
    #: End the connection after so many framed bytes: what follows the header, chunk sizes and all.
    cut_at: int | None = None
    #: End the connection after so many writes; after the last one, only what closes the framing is missing.
    cut_after: int | None = None
    #: How a cut ends the connection: fin, which looks orderly (TLS sends no close_notify), or reset.
    cut: str = "fin"
    #: Fall silent after so many framed bytes, until `LocalProvider.release()`.
    stall_at: int | None = None
    #: Fall silent after so many writes, until `LocalProvider.release()`.
    stall_after: int | None = None
    #: While stalled, send a comment every so many seconds. It counts as body, so the framing must promise no length.
    keepalive: float | None = None
    #: The Connection header: keep-alive or close.
    connection: str = "keep-alive"
    #: Take the request and end the connection, by `cut`, with no answer at all.
    drop: bool = False


class Request(NamedTuple):
    """A request as it came; `headers` are looked up in any case, `path` includes the query."""

    method: str
    path: str
    headers: http.client.HTTPMessage
    body: bytes = b""
    version: str = "HTTP/1.1"

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Content(NamedTuple):
    """What an answer says: its pieces joined are the body."""

    status: int
    content_type: str
    pieces: Iterable[bytes]


def checked(answer: Answer) -> Answer:
    """The answer itself; ValueError if one of its words is unknown."""
    for field, allowed in (("framing", FRAMINGS), ("cut", CUTS), ("connection", CONNECTIONS)):
        if getattr(answer, field) not in allowed:
            raise ValueError(f"expected {field} to be one of {', '.join(allowed)}, got {getattr(answer, field)!r}")
    return answer


def overridden(answer: Answer, text: str | None) -> Answer:
    """The answer with the fields that an X-Local-Answer header names; an error says what is wrong with them."""
    if text is None:
        return answer
    fields = json.loads(text)
    if not isinstance(fields, dict):
        raise TypeError(f"expected X-Local-Answer to be a JSON object, got {text!r}")
    if isinstance(fields.get("body"), str):
        fields["body"] = fields["body"].encode()
    if isinstance(fields.get("events"), list):
        fields["events"] = [event.encode() for event in fields["events"]]
    return checked(answer._replace(**fields))


# ---------------------------------------------------------------------------
# What is said in every dialect
# From an Answer and a Request to a Content; errors are worded as OpenAI words them.
# ---------------------------------------------------------------------------

#: Type, code and message of an error, by status, where the caller gives none.
ERRORS: Mapping[int, tuple[str, str | None, str]] = {
    400: ("invalid_request_error", None, "We could not parse the JSON body of your request."),
    401: ("invalid_request_error", "invalid_api_key", "Incorrect API key provided."),
    403: ("invalid_request_error", "unsupported_country_region_territory", "Country or region not supported"),
    404: ("invalid_request_error", "model_not_found", "The model does not exist or you do not have access to it."),
    429: ("requests", "rate_limit_exceeded", "Rate limit reached for requests."),
    500: ("server_error", None, "The server had an error while processing your request. Sorry about that!"),
    503: ("server_error", None, "The engine is currently overloaded, please try again later."),
}


def dumps(value: Any) -> bytes:
    """Compact JSON in UTF-8, non-ASCII characters as they are: what the services send."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def data_event(payload: Any, event: str = "") -> bytes:
    """One event of an event stream; a str or bytes goes out as it is, anything else as JSON."""
    data = payload.encode() if isinstance(payload, str) else payload if isinstance(payload, bytes) else dumps(payload)
    name = b"event: %s\n" % event.encode() if event else b""
    return b"%sdata: %s\n\n" % (name, data)


def error_body(status: int, message: str | None = None, *, code: Any = None, type: str | None = None) -> bytes:
    """An error as OpenAI words it; what is not given is what OpenAI says with that status, and a code of "" is null."""
    other = ("invalid_request_error" if status < 500 else "server_error", None, _phrase(status))
    usual_type, usual_code, usual_message = ERRORS.get(status, other)
    fields = {
        "message": usual_message if message is None else message,
        "type": type or usual_type,
        "param": None,
        "code": usual_code if code is None else code or None,
    }
    return dumps({"error": fields})


def error_answer(
    status: int,
    message: str | None = None,
    *,
    code: Any = None,
    type: str | None = None,
    headers: Headers = (),
    retry_after: str | float | None = None,
) -> Answer:
    """An answer of this status with an OpenAI-shaped JSON body and, if given, a Retry-After."""
    fields = _pairs(headers) + ([] if retry_after is None else [("Retry-After", str(retry_after))])
    body = error_body(status, message, code=code, type=type)
    return Answer(status=status, headers=fields, body=body, framing="length")


def content_of(answer: Answer, request: Request) -> Content:
    """What this answer says to this request."""
    content = _given(answer) or _by_path(answer, request)
    return content._replace(content_type=answer.content_type or content.content_type)


def _given(answer: Answer) -> Content | None:
    """What the answer spells out, byte by byte or as an error's status."""
    usual = JSON if answer.status >= 400 else EVENT_STREAM
    if answer.events is not None:
        return Content(answer.status, usual, answer.events)
    if answer.body is not None:
        content_type = answer.content_type or (JSON if answer.body.lstrip()[:1] in (b"{", b"[") else usual)
        return Content(answer.status, content_type, _events_of(answer.body, content_type))
    if answer.status >= 400:
        return Content(answer.status, JSON, [error_body(answer.status)])
    return None


def _by_path(answer: Answer, request: Request) -> Content:
    path = request.path.partition("?")[0]
    for method, ending, content in ROUTES:
        if request.method == method and path.endswith(ending):
            return _said(content, answer, request)
    return _refused(404, f"Invalid URL ({request.method} {path})")


def _said(content: Callable[[Answer, Request], Content], answer: Answer, request: Request) -> Content:
    try:
        return content(answer, request)
    except (ValueError, TypeError, LookupError, AttributeError):
        # No JSON, or not of the shape that the dialect takes.
        return _refused(400)


def _refused(status: int, message: str | None = None) -> Content:
    # Without a code: OpenAI gives one only where the model or the key is at fault.
    return Content(status, JSON, [error_body(status, message, code="")])


def _events_of(body: bytes, content_type: str) -> list[bytes]:
    """The body cut after each blank line, or after each line if it is NDJSON."""
    ends = rb"\n" if content_type.startswith(NDJSON) else rb"(?:\r\n|\n|\r(?!\n)){2,}"
    cuts = [0, *(match.end() for match in re.finditer(ends, body)), len(body)]
    return [body[start:end] for start, end in zip(cuts, cuts[1:])]


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"


def _pairs(headers: Headers) -> list[tuple[str, str | None]]:
    return list(headers.items()) if isinstance(headers, Mapping) else [(name, value) for name, value in headers]


# ---------------------------------------------------------------------------
# The OpenAI chat dialect
# Chunks, completions and the model list; a further dialect is one more such part and its rows in ROUTES.
# ---------------------------------------------------------------------------


def chunk_event(
    payload: Mapping[str, Any] | None = None,
    *,
    index: int = 0,
    finish_reason: str | None = None,
    model: str = MODEL,
    id: str = COMPLETION_ID,
    **delta: Any,
) -> bytes:
    """One chunk: `delta` is that of choice `index`, `payload` adds to the chunk's own fields or replaces them."""
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    chunk = {"id": id, "object": "chat.completion.chunk", "created": CREATED, "model": model, "choices": [choice]}
    return data_event({**chunk, **(payload or {})})


def chat_events(
    deltas: Iterable[str | Mapping[str, Any]],
    *,
    model: str = MODEL,
    id: str = COMPLETION_ID,
    finish: str | None = "stop",
    usage: Mapping[str, Any] | None = None,
    done: bool = True,
    reasoning: Iterable[str] = (),
) -> list[bytes]:
    """A stream: role, reasoning, deltas (a mapping is a delta as it is), finish, usage if given, `[DONE]`."""
    # Once usage is asked for, OpenAI gives every chunk the field, null in all but the last.
    extra = {} if usage is None else {"usage": None}

    def chunk(payload: Mapping[str, Any] = extra, **fields: Any) -> bytes:
        return chunk_event(payload, model=model, id=id, **fields)

    events = [chunk(role="assistant", content="")]
    events += [chunk(reasoning_content=text) for text in reasoning]
    events += [chunk(content=delta) if isinstance(delta, str) else chunk(**delta) for delta in deltas]
    if finish is not None:
        events.append(chunk(finish_reason=finish))
    if usage is not None:
        events.append(chunk({"choices": [], "usage": usage}))
    if done:
        events.append(data_event("[DONE]"))
    return events


def json_completion(
    text: str | None,
    *,
    model: str = MODEL,
    id: str = COMPLETION_ID,
    finish: str | None = "stop",
    usage: Mapping[str, Any] | None = None,
    reasoning: str = "",
    tool_calls: Sequence[Mapping[str, Any]] = (),
) -> bytes:
    """The same answer in one piece, as a request that does not stream gets it."""
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if reasoning:
        message["reasoning_content"] = reasoning
    if tool_calls:
        message["tool_calls"] = list(tool_calls)
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
    completion = {"id": id, "object": "chat.completion", "created": CREATED, "model": model, "choices": [choice]}
    return dumps(completion if usage is None else {**completion, "usage": usage})


def chat_content(answer: Answer, request: Request) -> Content:
    """What POST .../chat/completions says: the answer's text, or a call of the first tool if the user may have one."""
    asked = request.json
    tool = _tool_wanted(asked)
    deltas = _call_deltas(tool) if tool else split_words(answer.text)
    finish, model, usage = "tool_calls" if tool else "stop", asked.get("model", MODEL), _usage(asked, deltas)
    if asked.get("stream") is True:
        wants_usage = (asked.get("stream_options") or {}).get("include_usage")
        events = chat_events(deltas, model=model, finish=finish, usage=usage if wants_usage else None)
        return Content(answer.status, EVENT_STREAM, events)
    text, calls = (None, [_whole_call(tool)]) if tool else (answer.text, [])
    completion = json_completion(text, model=model, finish=finish, usage=usage, tool_calls=calls)
    return Content(answer.status, JSON, [completion])


def models_content(answer: Answer, request: Request) -> Content:
    """What GET .../models says."""
    model = {"id": MODEL, "object": "model", "created": CREATED, "owned_by": "local"}
    return Content(answer.status, JSON, [dumps({"object": "list", "data": [model]})])


def split_words(text: str) -> list[str | Mapping[str, Any]]:
    """The text as a model's tokens would have it, each word with the space before it; joined, they are the text."""
    return re.findall(r"\s*\S+|\s+", text)


def _usage(asked: Mapping[str, Any], deltas: Sequence[Any]) -> Mapping[str, int]:
    """A word counts as a token: enough to tell one request from another."""
    prompt = len(json.dumps(asked.get("messages")).split())
    return {"prompt_tokens": prompt, "completion_tokens": len(deltas), "total_tokens": prompt + len(deltas)}


def _tool_wanted(asked: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The first tool, if there is one, it may be used, and it was the user who spoke last."""
    tools, messages = asked.get("tools"), asked.get("messages")
    if not tools or not messages or asked.get("tool_choice") == "none" or messages[-1]["role"] != "user":
        return None
    function: Mapping[str, Any] = tools[0]["function"]
    return function


_SAMPLES = {"string": "Hà Nội", "integer": 3, "number": 0.5, "boolean": True, "array": [], "object": {}}


def _whole_call(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A call of the tool in which each parameter has a value of its type."""
    parameters = (tool.get("parameters") or {}).get("properties") or {}
    arguments = {
        name: schema["enum"][0] if schema.get("enum") else _SAMPLES.get(schema.get("type"))
        for name, schema in parameters.items()
    }
    function = {"name": tool.get("name"), "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": "call_local", "type": "function", "function": function}


def _call_deltas(tool: Mapping[str, Any]) -> list[str | Mapping[str, Any]]:
    """The call as OpenAI streams it: id and name once, then the arguments in fragments."""
    call = _whole_call(tool)
    arguments = call["function"]["arguments"]
    first = {**call, "function": {**call["function"], "arguments": ""}}
    fragments = [{"function": {"arguments": arguments[at : at + 5]}} for at in range(0, len(arguments), 5)]
    return [{"tool_calls": [{"index": 0, **part}]} for part in [first, *fragments]]


#: Method, end of the path, and who says what is said there.
ROUTES: list[tuple[str, str, Callable[[Answer, Request], Content]]] = [
    ("POST", "/chat/completions", chat_content),
    ("GET", "/models", models_content),
]


# ---------------------------------------------------------------------------
# Framing, pacing and faults
# From the pieces of a body to the bytes of each write, and to what goes wrong between them; any bytes will do.
# ---------------------------------------------------------------------------

#: Each framing as a content coding and a way to tell where the body ends.
FRAMINGS: Mapping[str, tuple[str, str]] = {
    "chunked": ("", "chunked"),
    "one-chunk": ("", "one-chunk"),
    "length": ("", "length"),
    "close": ("", "close"),
    "gzip": ("gzip", "chunked"),
    "gzip-length": ("gzip", "length"),
    "gzip-close": ("gzip", "close"),
}
CUTS = ("fin", "reset")
CONNECTIONS = ("keep-alive", "close")
COMMENT = b": keep-alive\n\n"

#: HTTP/1.0 knows no chunks.
_WITHOUT_CHUNKS = {"chunked": "close", "one-chunk": "close", "gzip": "gzip-close"}


class _Plain:
    """The pieces as they are."""

    def piece(self, data: bytes) -> bytes:
        return data

    def ending(self) -> bytes:
        return b""


class _Gzip(_Plain):
    """Each piece compressed so that it can be decoded as soon as it is there."""

    def __init__(self) -> None:
        self._compressor = zlib.compressobj(wbits=31)

    def piece(self, data: bytes) -> bytes:
        return self._compressor.compress(data) + self._compressor.flush(zlib.Z_SYNC_FLUSH)

    def ending(self) -> bytes:
        return self._compressor.flush()


class _Chunked(_Plain):
    """Each piece of `inner` as one chunk."""

    def __init__(self, inner: _Plain) -> None:
        self._inner = inner

    def piece(self, data: bytes) -> bytes:
        return _chunk(self._inner.piece(data))

    def ending(self) -> bytes:
        return _chunk(self._inner.ending()) + b"0\r\n\r\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data) if data else b""


class Framed(NamedTuple):
    """A body ready to be sent: `ending` closes it, once all `writes` were drawn; `piece` frames a further one."""

    headers: list[tuple[str, str]]
    writes: Iterable[bytes]
    ending: Callable[[], bytes]
    piece: Callable[[bytes], bytes]


def framed(framing: str, pieces: Iterable[bytes]) -> Framed:
    """The pieces framed, each when it is drawn; only a framing that promises a length draws them all at once."""
    coding, transfer = FRAMINGS[framing]
    headers = [("Content-Encoding", coding)] if coding else []
    coder: _Plain = _Gzip() if coding else _Plain()
    if transfer == "chunked":
        headers.append(("Transfer-Encoding", "chunked"))
        coder = _Chunked(coder)
    body = Framed(headers, map(coder.piece, filter(None, pieces)), coder.ending, coder.piece)
    if transfer == "length":
        return _of_known_length(body)
    return _in_one_chunk(body) if transfer == "one-chunk" else body


def _of_known_length(body: Framed) -> Framed:
    writes, ending = list(body.writes), body.ending()
    length = sum(map(len, writes)) + len(ending)
    headers = [*body.headers, ("Content-Length", str(length))]
    return Framed(headers, writes, lambda: ending, body.piece)


def _in_one_chunk(body: Framed) -> Framed:
    writes, headers = list(body.writes), [("Transfer-Encoding", "chunked")]
    if not writes:
        return Framed(headers, writes, lambda: b"0\r\n\r\n", body.piece)
    # The chunk's size goes out with the first write, so that writes count as with any other framing.
    writes[:1] = [b"%x\r\n%s" % (sum(map(len, writes)), writes[0])]
    return Framed(headers, writes, lambda: b"\r\n0\r\n\r\n", body.piece)


def blocks(pieces: Iterable[bytes], size: int) -> Iterator[bytes]:
    """The same bytes in blocks of `size`; as they are if `size` is 0."""
    if not size:
        yield from pieces
        return
    held = b""
    for piece in pieces:
        held += piece
        whole = len(held) - len(held) % size
        yield from (held[start : start + size] for start in range(0, whole, size))
        held = held[whole:]
    yield held


class Step(enum.Enum):
    """What happens between two pieces of a body."""

    WRITE = "a write begins"
    PAUSE = "wait for the pace"
    STALL = "fall silent"
    CUT = "end the connection"


def script(answer: Answer, body: Framed) -> Iterator[bytes | Step]:
    """All that is to be done to send a body, in order.

    A write is drawn only when those before it were sent, so that a comment sent meanwhile is framed in its place.
    """
    return _with_faults_by_byte(answer, _with_faults_by_write(answer, body))


def _with_faults_by_write(answer: Answer, body: Framed) -> Iterator[bytes | Step]:
    yield from _due(0, answer.stall_after, answer.cut_after)
    for number, write in enumerate(body.writes, 1):
        if number > 1:
            yield Step.PAUSE
        yield Step.WRITE
        yield write
        yield from _due(number, answer.stall_after, answer.cut_after)
    yield body.ending()


def _with_faults_by_byte(answer: Answer, steps: Iterable[bytes | Step]) -> Iterator[bytes | Step]:
    sent = 0
    stops = [at for at in (answer.stall_at, answer.cut_at) if at is not None]
    yield from _due(0, answer.stall_at, answer.cut_at)
    for step in steps:
        if isinstance(step, Step):
            yield step
            continue
        for piece in _split(step, [at - sent for at in stops]):
            yield piece
            sent += len(piece)
            yield from _due(sent, answer.stall_at, answer.cut_at)


def _due(count: int, stall: int | None, cut: int | None) -> Iterator[Step]:
    """The faults that come after so many bytes or writes."""
    if count == stall:
        yield Step.STALL
    if count == cut:
        yield Step.CUT


def _split(data: bytes, stops: Iterable[int]) -> list[bytes]:
    """The data cut where a stop falls inside it; no piece is empty."""
    cuts = sorted({0, len(data), *(stop for stop in stops if 0 < stop < len(data))})
    return [data[start:end] for start, end in zip(cuts, cuts[1:])]


# ---------------------------------------------------------------------------
# Sockets
# Bytes in and out of one connection, to the byte; of what they say, it knows how a request is framed.
# ---------------------------------------------------------------------------

_NOT_YET = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_HEADER_LIMIT = 65536


class Connection:
    """A socket that one task reads and writes.

    Nothing blocks, and nobody has to ask whether the client is still there: once it goes, the task is cancelled,
    whatever it waits for.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._received = bytearray()
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[Any] | None = None

    async def open(self, ssl_context: ssl.SSLContext | None) -> None:
        """Shake hands, then take in what the client sends until it goes; the task to cancel is the one that calls."""
        if ssl_context:
            await self._shake_hands(ssl_context)
        self._task = asyncio.current_task()
        self._loop.add_reader(self._sock, self._receive)

    async def first_byte(self) -> bytes:
        """The next byte, left where it is."""
        await self._need(lambda: bool(self._received))
        return bytes(self._received[:1])

    async def read_until(self, mark: bytes) -> bytes:
        """All up to and including the mark; ValueError if it does not come soon."""
        await self._need(lambda: mark in self._received or len(self._received) > _HEADER_LIMIT)
        end = self._received.find(mark)
        if end < 0:
            raise ValueError(f"expected {mark!r} within {_HEADER_LIMIT} bytes")
        return self._take(end + len(mark))

    async def read_exactly(self, size: int) -> bytes:
        await self._need(lambda: len(self._received) >= size)
        return self._take(size)

    async def send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._sock.send(rest) :]
            except _NOT_YET:
                await self._ready(self._loop.add_writer, self._loop.remove_writer)
        # A client as fast as we are would never let anything else have its turn.
        await asyncio.sleep(0)

    def finish(self) -> None:
        """Say that all was sent; `close` alone says it as a cut would."""
        with contextlib.suppress(OSError, ValueError):
            if isinstance(self._sock, ssl.SSLSocket):
                self._sock.unwrap()

    async def reset(self) -> None:
        """Let `close` send a RST, once the client has what was sent."""
        # A RST throws away what the kernel still holds, and the client is to get all up to the cut.
        for _ in range(1000):
            if not _unsent(self._sock):
                break
            await asyncio.sleep(0.001)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
            self._sock.close()

    async def _shake_hands(self, ssl_context: ssl.SSLContext) -> None:
        secure = ssl_context.wrap_socket(self._sock, server_side=True, do_handshake_on_connect=False)
        self._sock = secure
        while True:
            try:
                return secure.do_handshake()
            except ssl.SSLWantReadError:
                await self._ready(self._loop.add_reader, self._loop.remove_reader)
            except ssl.SSLWantWriteError:
                await self._ready(self._loop.add_writer, self._loop.remove_writer)

    async def _ready(self, add: Callable[..., None], remove: Callable[[socket.socket], object]) -> None:
        """Wait until the socket can be read or written, as the loop's two methods say."""
        ready = asyncio.Event()
        add(self._sock, ready.set)
        try:
            await ready.wait()
        finally:
            remove(self._sock)

    def _receive(self) -> None:
        try:
            data = self._sock.recv(65536)
        except _NOT_YET:
            return
        except OSError:
            data = b""
        if not data and self._task:
            self._loop.remove_reader(self._sock)
            self._task.cancel()
        self._received += data
        self._arrived.set()

    async def _need(self, enough: Callable[[], bool]) -> None:
        while not enough():
            self._arrived.clear()
            await self._arrived.wait()

    def _take(self, size: int) -> bytes:
        taken = bytes(self._received[:size])
        del self._received[:size]
        return taken


def _unsent(sock: socket.socket) -> int:
    """How many bytes the client has not acknowledged; 0 where the system does not tell."""
    try:
        import fcntl
        import termios

        answer = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, struct.pack("i", 0))
    except (ImportError, OSError):
        return 0
    return int(struct.unpack("i", answer)[0])


async def read_request(connection: Connection) -> Request:
    """The next request; ValueError if what comes is no HTTP."""
    # A client that speaks TLS where none is spoken waits for an answer: it is not to wait for a header's end.
    if not (await connection.first_byte()).isalpha():
        raise ValueError("expected an HTTP request; is the URL's scheme right?")
    line, _, fields = (await connection.read_until(b"\r\n\r\n")).partition(b"\r\n")
    method, path, version = line.decode("latin-1").split(" ")
    try:
        headers = http.client.parse_headers(io.BytesIO(fields))
    except http.client.HTTPException as error:
        raise ValueError(str(error)) from error
    if headers.get("Expect", "").lower() == "100-continue":
        await connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    return Request(method, path, headers, await _read_body(connection, headers), version)


async def _read_body(connection: Connection, headers: http.client.HTTPMessage) -> bytes:
    if headers.get("Transfer-Encoding", "").lower() != "chunked":
        return await connection.read_exactly(int(headers.get("Content-Length", 0)))
    body = bytearray()
    while True:
        size = int((await connection.read_until(b"\r\n")).partition(b";")[0], 16)
        chunk = await connection.read_exactly(size + 2)
        if not size:
            return bytes(body)
        body += chunk[:size]


# ---------------------------------------------------------------------------
# The server
# Puts the parts above together: one thread with an event loop, and in it a task for each connection.
# ---------------------------------------------------------------------------

_WITHOUT_BODY = frozenset({100, 101, 103, 204, 304})


@final
class LocalProvider:
    """A provider on 127.0.0.1 that runs from its making to `close()`, which `with` calls.

    The answers given are used first, one a request and in order, then `default` for every further one. With a `key`,
    requests without it get a 401 and use up no answer.
    """

    def __init__(
        self, *answers: Answer, port: int = 0, ssl_context: ssl.SSLContext | None = None, key: str | None = None
    ) -> None:
        #: How a request is answered when no answer is queued.
        self.default = Answer()
        #: Every request, in order of arrival, also those refused; as a list it may be cleared.
        self.requests: list[Request] = []
        #: When each write of a body began, by `time.perf_counter()`; as a list it may be cleared.
        self.sent_at: list[float] = []
        #: How many TCP connections were accepted.
        self.connections = 0
        #: How many generations were started: a POST that is answered with a 200, whether or not anyone reads it.
        self.billed = 0
        self._queue = deque(map(checked, answers))
        self._key = key
        self._ssl_context = ssl_context
        self._numbers = itertools.count(1)
        self._open: dict[Connection, asyncio.Task[None]] = {}
        self._changed = threading.Condition()
        self._listener = socket.create_server(("127.0.0.1", port), backlog=4096)
        self._listener.setblocking(False)
        scheme = "https" if ssl_context else "http"
        #: scheme://127.0.0.1:port
        self.origin = f"{scheme}://127.0.0.1:{self._listener.getsockname()[1]}"
        #: The origin with the path that a client of the OpenAI dialect takes as its base.
        self.base_url = f"{self.origin}/v1"
        self._loop = asyncio.SelectorEventLoop()
        self._stop = self._loop.create_future()
        self._gate = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name="local-provider", daemon=True)
        self._thread.start()

    def __enter__(self) -> LocalProvider:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def open_connections(self) -> int:
        """How many connections are open now; one that its client let go is no longer counted."""
        return len(self._open)

    def wait_closed(self, timeout: float | None = None) -> bool:
        """Wait until no connection is open; False if one still is after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, timeout)

    def answer(self, *answers: Answer) -> None:
        """Queue answers for the next requests."""
        self._queue.extend(map(checked, answers))

    def release(self) -> None:
        """Let the answers whose request has come go on where they stall; later ones stall again."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._release)

    def close(self) -> None:
        """End every connection, and the thread, at once."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set_result, None)
            self._thread.join()

    def _release(self) -> None:
        self._gate.set_result(None)
        self._gate = self._loop.create_future()

    def _run(self) -> None:
        with contextlib.closing(self._loop), self._listener:
            self._loop.run_until_complete(self._listen())

    async def _listen(self) -> None:
        """Accept clients until `close`, then send them away."""
        self._loop.add_reader(self._listener, self._accept)
        await self._stop
        self._loop.remove_reader(self._listener)
        for task in self._open.values():
            task.cancel()
        if self._open:
            await asyncio.wait(self._open.values())

    def _accept(self) -> None:
        try:
            connection = Connection(self._listener.accept()[0])
        except OSError:
            # Nobody is there any more, or there are no file descriptors left, which takes a moment to change.
            time.sleep(0.001)
            return
        task = self._loop.create_task(self._serve(connection))
        self.connections += 1
        self._open[connection] = task
        # Not the task's own `finally`: a task that is cancelled before its first step has none.
        task.add_done_callback(lambda _: self._forget(connection))

    def _forget(self, connection: Connection) -> None:
        connection.close()
        with self._changed:
            del self._open[connection]
            self._changed.notify_all()

    async def _serve(self, connection: Connection) -> None:
        """Answer one request after another, until either side has had enough."""
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await connection.open(self._ssl_context)
            while await self._exchange(connection):
                pass

    async def _exchange(self, connection: Connection) -> bool:
        """Read a request and answer it; True if the connection can take another."""
        try:
            request = await read_request(connection)
        except ValueError as error:
            request = Request("", "", http.client.HTTPMessage())
            return await self._respond(connection, request, _close(error_answer(400, str(error))))
        self.requests.append(request)
        return await self._respond(connection, request, self._answer_to(request))

    def _answer_to(self, request: Request) -> Answer:
        authorization = request.headers.get("Authorization")
        if self._key is not None and authorization != f"Bearer {self._key}":
            return _unauthorized(authorization)
        answer = self._queue.popleft() if self._queue else self.default
        try:
            return overridden(answer, request.headers.get("X-Local-Answer"))
        except (TypeError, ValueError) as error:
            return error_answer(400, str(error))

    async def _respond(self, connection: Connection, request: Request, answer: Answer) -> bool:
        # The gate of now: a release that comes before the stall itself is then not missed.
        gate, content = self._gate, content_of(answer, request)
        if request.version == "HTTP/1.0":
            answer = _close(answer._replace(framing=_WITHOUT_CHUNKS.get(answer.framing, answer.framing)))
        self.billed += request.method == "POST" and content.status == 200 and not answer.drop
        await asyncio.sleep(answer.delay)
        if answer.drop:
            return await _cut(connection, answer)
        body, keep = _framed_for(request, answer, content), _keeps(request, answer)
        await _send_slowly(connection, head(answer, content, body, next(self._numbers), keep), answer.header_pace)
        if not await self._perform(connection, answer, body, gate):
            return False
        if not keep:
            connection.finish()
        return keep

    async def _perform(self, connection: Connection, answer: Answer, body: Framed, gate: asyncio.Future[None]) -> bool:
        """Go through the script of a body; False if it ends with a cut."""
        for step in script(answer, body):
            if isinstance(step, bytes):
                await connection.send(step)
            elif step is Step.WRITE:
                self.sent_at.append(time.perf_counter())
            elif step is Step.PAUSE:
                await asyncio.sleep(answer.pace)
            elif step is Step.STALL:
                await _stall(connection, answer, body, gate)
            else:
                return await _cut(connection, answer)
        return True


async def _stall(connection: Connection, answer: Answer, body: Framed, gate: asyncio.Future[None]) -> None:
    while not gate.done():
        await asyncio.wait([gate], timeout=answer.keepalive)
        if not gate.done():
            await connection.send(body.piece(COMMENT))


def _unauthorized(authorization: str | None) -> Answer:
    where = "You can find your API key at https://platform.openai.com/account/api-keys."
    if authorization is None:
        return error_answer(401, f"You didn't provide an API key. {where}", code="")
    # OpenAI masks the key that it repeats; not every service does.
    return error_answer(401, f"Incorrect API key provided: {authorization.partition(' ')[2]}. {where}")


def _close(answer: Answer) -> Answer:
    return answer._replace(connection="close")


def _keeps(request: Request, answer: Answer) -> bool:
    """Whether the connection may take another request after this answer."""
    asked_to_close = request.headers.get("Connection", "").lower() == "close"
    return answer.connection == "keep-alive" and FRAMINGS[answer.framing][1] != "close" and not asked_to_close


def _framed_for(request: Request, answer: Answer, content: Content) -> Framed:
    if content.status in _WITHOUT_BODY:
        return Framed([], (), bytes, bytes)
    body = framed(answer.framing, blocks(content.pieces, answer.block))
    return body._replace(writes=(), ending=bytes) if request.method == "HEAD" else body


def head(answer: Answer, content: Content, body: Framed, number: int, keep: bool) -> bytes:
    """Status line and header fields; those that the answer names are in place of ours."""
    given = _pairs(answer.headers)
    named = {name.lower() for name, _ in given}
    usual = [
        ("Content-Type", content.content_type),
        *body.headers,
        ("Connection", "keep-alive" if keep else "close"),
        ("x-request-id", f"req_local_{number}"),
    ]
    fields = [(name, value) for name, value in usual if name.lower() not in named]
    fields += [(name, value) for name, value in given if value is not None]
    lines = [f"HTTP/1.1 {content.status} {_phrase(content.status)}", *(f"{name}: {value}" for name, value in fields)]
    return "\r\n".join([*lines, "", ""]).encode()


async def _send_slowly(connection: Connection, data: bytes, pace: float) -> None:
    for piece in blocks([data], 1 if pace else 0):
        await connection.send(piece)
        await asyncio.sleep(pace)


async def _cut(connection: Connection, answer: Answer) -> bool:
    """Set how the connection ends; False, as nothing can follow."""
    if answer.cut == "reset":
        await connection.reset()
    return False


# ---------------------------------------------------------------------------
# Command line
# The server in a process of its own.
# ---------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A model provider on this machine, for trials without a key.")
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1 (default: a free one)")
    parser.add_argument("--pace", type=float, default=0.03, metavar="SECONDS", help="between two events (%(default)s)")
    parser.add_argument("--file", type=Path, help="the body that answers every request, such as a recorded stream")
    options = parser.parse_args(argv)
    try:
        answer = Answer(pace=options.pace, **_recorded(options.file))
        server = LocalProvider(port=options.port)
    except OSError as error:
        parser.error(str(error))
    server.default = answer
    with server, contextlib.suppress(KeyboardInterrupt):
        print(server.base_url, flush=True)
        while True:
            time.sleep(60)
            # Nobody looks at these here, and a server that runs for days is not to grow.
            server.requests.clear()
            server.sent_at.clear()


def _recorded(file: Path | None) -> dict[str, Any]:
    """The fields of an answer that sends this file."""
    if file is None:
        return {}
    return {"body": file.read_bytes(), "content_type": NDJSON if file.suffix in (".jsonl", ".ndjson") else None}


if __name__ == "__main__":
    main()
