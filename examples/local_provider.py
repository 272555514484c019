"""A model provider on this machine, for the demo, the tests and the benchmarks; the standard library is all it needs.

It listens on 127.0.0.1, speaks over real sockets what OpenAI (chat and Responses), Anthropic, Gemini and Ollama speak,
paces its words, and goes wrong at the byte or event that the caller names. In the same process::

    from local_provider import Answer, LocalProvider

    with LocalProvider(Answer(text="Not the whole story", cut_after=3)) as server:
        requests.post(server.base_url + "/chat/completions", json={"stream": True, "messages": []}, stream=True)

In a process of its own, each request says what is to go wrong::

    $ python examples/local_provider.py --port 8000 --pace 0.03
    http://127.0.0.1:8000/v1
    $ curl -N http://127.0.0.1:8000/v1/chat/completions -d '{"stream": true, "messages": []}' \\
        -H 'X-Local-Answer: {"cut_at": 700, "framing": "length"}'

The path decides the dialect (`DIALECT_BASES` has the base of each). A request that the service itself would refuse gets
its 400 here as well: one that lost a signature, left a tool's call without a result, or kept another dialect's names.

The way of an answer, with what a body says on the left of `framed` and how it travels on the right::

    Answer --content_of--> Content --framed--> Framed --script--> bytes, pauses and faults --Connection--> socket

A stream that was lost can be asked for again, as with the services: by `Last-Event-ID`, where the answer had `ids`; by
the GET of a background response; by an answer's beginning that is to be continued; by words that are to be repeated.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import enum
import http.client
import io
import itertools
import json
import re
import secrets
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
CREATED_AT = "2023-11-14T22:13:20Z"
TEXT = "Tokens arrive one by one, so you can read along 🐑 chữ đến dần, từng từ một."
THINKING = "A question, then. Trả lời ngắn gọn: one line 🐑 will do."

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
    #: What it thinks first, in a dialect where the request can ask to see it and does.
    thinking: str = THINKING
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
    #: While stalled, send a comment every so many seconds, or an empty line where the body is JSON. It counts as body,
    #: so the framing must promise no length.
    keepalive: float | None = None
    #: The Connection header: keep-alive or close.
    connection: str = "keep-alive"
    #: Take the request and end the connection, by `cut`, with no answer at all.
    drop: bool = False
    #: The end of the completion's id, which every dialect but Ollama has: with another it is another generation.
    generation: str = "local"
    #: The ids of the events of an event stream (not of `events`): none; numbers from 1; unique, which nobody can guess;
    #: or sparse, the number of the first event and of each third one after it. A stream with ids is remembered: the
    #: same request with one of them as its Last-Event-ID gets it again, not billed, with the faults of the Answer whose
    #: turn it is.
    ids: str = "none"
    #: What this answer says to a Last-Event-ID, or to the GET of a background response's stream: what comes after that
    #: event; the same, inclusive of it; the whole stream; or forget, as if nothing were remembered, which answers a
    #: Last-Event-ID with a new generation, of another id and other words.
    replay: str = "after"
    #: How this answer goes on where the request has its beginning: with the rest; with an echo of the beginning first,
    #: echo-stripped of its trailing white space, or an echo-part, the first half of it; ignore says other words; refuse
    #: is a 400. It is an assistant's message that has the beginning, the last of all: in Anthropic's dialect any, in
    #: OpenAI's one with `prefix` or with `continue_final_message`. If `text` begins otherwise, all of it is said.
    continuation: str = "rest"
    #: How it goes on where the last message, a user's, quotes the last words (20 characters or more) of the answer
    #: before it, if that is the beginning of `text`: it repeats them exactly, none of them, partially (their second
    #: half), changed by a letter, or after a preamble; then comes the rest.
    anchor: str = "exact"
    #: What a plain GET of a background response finds: completed; running, with half of its text and no usage; or
    #: queued, with no text either.
    job: str = "completed"
    #: Whether a background response is too old to be streamed again, which is a 400.
    expired: bool = False


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
    #: Whether it is new: what was said before is not billed again.
    new: bool = True


class Call(NamedTuple):
    """A model's call of a tool, before a dialect gives it a shape."""

    name: str
    arguments: Mapping[str, Any]


class Refusal(ValueError):
    """What a service says with a 400 to a request that it does not take."""


def checked(answer: Answer) -> Answer:
    """The answer itself; ValueError if one of its words is unknown."""
    for field, allowed in WORDS.items():
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
# From an Answer and a Request to a Content, by way of ROUTES; where no dialect is asked, errors are worded as OpenAI's.
# ---------------------------------------------------------------------------


class Dialect(NamedTuple):
    """What goes for every path of a dialect."""

    #: What follows a server's origin in the base URL of a client.
    base: str
    #: The body of an error, from its status and its message; with no message, what the service usually says.
    error: Callable[[int, str | None], bytes]
    #: The answer to a request with this key, which is not the right one, or with none.
    unauthorized: Callable[[str | None], Answer]


class Route(NamedTuple):
    """Who says what is said to this method and end of the path, and in which dialect."""

    method: str
    #: A regular expression.
    ending: str
    content: Callable[[Answer, Request], Content]
    dialect: Dialect


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
    route = route_of(request)
    content = _given(answer, route.dialect) or _said(answer, request, route)
    return content._replace(content_type=answer.content_type or content.content_type)


def route_of(request: Request) -> Route:
    """The first route of this method and path, else one that knows no path."""
    path = request.path.partition("?")[0]
    fitting = (route for route in ROUTES if request.method == route.method and re.search(route.ending + "$", path))
    return next(fitting, Route(request.method, path, _unknown_path, OPENAI))


def _given(answer: Answer, dialect: Dialect) -> Content | None:
    """What the answer spells out, byte by byte or as an error's status."""
    usual = JSON if answer.status >= 400 else EVENT_STREAM
    if answer.events is not None:
        return Content(answer.status, usual, answer.events)
    if answer.body is not None:
        content_type = answer.content_type or (JSON if answer.body.lstrip()[:1] in (b"{", b"[") else usual)
        return Content(answer.status, content_type, _events_of(answer.body, content_type))
    if answer.status >= 400:
        return Content(answer.status, JSON, [dialect.error(answer.status, None)])
    return None


def _said(answer: Answer, request: Request, route: Route) -> Content:
    try:
        return route.content(answer, request)
    except Refusal as error:
        return Content(400, JSON, [route.dialect.error(400, str(error))])
    except (ValueError, TypeError, LookupError, AttributeError):
        # No JSON, or not of the shape that the dialect takes.
        return Content(400, JSON, [route.dialect.error(400, None)])


def _unknown_path(answer: Answer, request: Request) -> Content:
    message = f"Invalid URL ({request.method} {request.path.partition('?')[0]})"
    return Content(404, JSON, [OPENAI.error(404, message)])


def require(fulfilled: Any, message: str) -> None:
    """Refusal, with this message, of a request for which something does not hold."""
    if not fulfilled:
        raise Refusal(message)


def require_known(asked: Mapping[str, Any], known: str, message: str) -> None:
    """Refusal of a field that is none of the known ones; %s in the message is its name."""
    for name in asked:
        require(name in known.split(), message % name)


def split_words(text: str) -> list[str]:
    """The text as a model's tokens would have it, each word with the space before it; joined, they are the text."""
    return re.findall(r"\s*\S+|\s+", text)


def fragments(text: str) -> list[str]:
    """The text of a call's arguments in the pieces in which it is streamed."""
    return [text[at : at + 5] for at in range(0, len(text), 5)]


def signature(value: Any) -> str:
    """What a service signs this value with: a client has to send it back with the value as it was."""
    # A client may keep the fields of an object in another order.
    checksum = zlib.crc32(json.dumps(value, sort_keys=True).encode())
    return base64.b64encode(b"local signature %08x" % checksum).decode()


def token_count(prompt: Any) -> int:
    """A word counts as a token: enough to tell one request from another."""
    return len(json.dumps(prompt).split())


_SAMPLES = {"string": "Hà Nội", "integer": 3, "number": 0.5, "boolean": True, "array": [], "object": {}}


def sample_call(tool: Mapping[str, Any], schema: str = "parameters") -> Call:
    """A call of this tool in which each parameter has a value of its type; `schema` is where they are told."""
    properties = (tool.get(schema) or {}).get("properties") or {}
    return Call(tool["name"], {name: _sample(parameter) for name, parameter in properties.items()})


def _sample(schema: Mapping[str, Any]) -> Any:
    # Gemini's types may be in capitals.
    return schema["enum"][0] if schema.get("enum") else _SAMPLES.get(str(schema.get("type")).lower())


def _of_type(values: Any, *types: str) -> list[Any]:
    """Those of these items or blocks that are of one of the types; none of a text's."""
    return [] if isinstance(values, str) else [value for value in values if value.get("type") in types]


def _events_of(body: bytes, content_type: str) -> list[bytes]:
    """The body cut after each blank line, after each line if it is NDJSON, or after each element of Gemini's array."""
    array = content_type.startswith(JSON) and body.lstrip()[:1] == b"["
    lines, elements, blanks = rb"\n", rb"\n(?=,\r\n)", rb"(?:\r\n|\n|\r(?!\n)){2,}"
    ends = lines if content_type.startswith(NDJSON) else elements if array else blanks
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
# Answers that go on
# What a model says when its answer was cut and the request has what was received, in the messages of any dialect.
# ---------------------------------------------------------------------------

CONTINUATIONS = ("rest", "echo", "echo-stripped", "echo-part", "ignore", "refuse")
ANCHORS = ("exact", "none", "partial", "changed", "preamble")

_NO_PREFILL = "This model does not support assistant message prefill. The conversation must end with a user message."
_SHORTEST_ANCHOR = 20


def prefilled(answer: Answer, message: Mapping[str, Any]) -> Answer:
    """The answer with the text that goes on after this message, which is its beginning."""
    require(answer.continuation != "refuse", _NO_PREFILL)
    begun = plain_text(message)
    if not answer.text.startswith(begun):
        return answer
    if answer.continuation == "ignore":
        return answer._replace(text=_other_words(answer.text))
    echoes = {"echo": begun, "echo-stripped": begun.rstrip(), "echo-part": begun[: len(begun) // 2]}
    return answer._replace(text=echoes.get(answer.continuation, "") + answer.text[len(begun) :])


def anchored(answer: Answer, messages: Sequence[Mapping[str, Any]]) -> Answer:
    """The answer with the text that goes on from the words that the last message quotes, if it quotes some."""
    if [message.get("role") for message in messages[-2:]] not in (["assistant", "user"], ["model", "user"]):
        return answer
    begun, asked = map(plain_text, messages[-2:])
    words = _quoted_ending(begun, asked)
    if not words or not answer.text.startswith(begun):
        return answer
    repeated = {"none": "", "partial": words[len(words) // 2 :], "changed": _misspelt(words)}.get(answer.anchor, words)
    preamble = "Sure, here it is: " if answer.anchor == "preamble" else ""
    return answer._replace(text=preamble + repeated + answer.text[len(begun) :])


def another(answer: Answer) -> Answer:
    """The answer as another generation: other ids, and other words from the first one on."""
    text, thinking = _other_words(answer.text), _other_words(answer.thinking)
    return answer._replace(generation=answer.generation + "_again", text=text, thinking=thinking)


def plain_text(message: Mapping[str, Any]) -> str:
    """The text of a message, whatever its dialect."""
    content = message.get("content", message.get("parts")) or ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def _other_words(text: str) -> str:
    return f"On second thoughts: {text}"


def _quoted_ending(text: str, quoting: str) -> str:
    """The longest ending of the text that the other one holds; empty if it is a short one."""
    size = 0
    while size < len(text) and text[-size - 1 :] in quoting:
        size += 1
    return text[-size:] if size >= _SHORTEST_ANCHOR else ""


def _misspelt(text: str) -> str:
    """The text with another letter in its middle."""
    middle = len(text) // 2
    at = next((at for at in range(middle, len(text)) if text[at].isalpha()), middle)
    return text[:at] + ("y" if text[at] == "x" else "x") + text[at + 1 :]


# ---------------------------------------------------------------------------
# The OpenAI chat dialect
# Chunks, completions and the model list; each dialect is one such part and its rows in ROUTES.
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


#: the fields of a chat completion: OpenAI's, and those of DeepSeek, Mistral, OpenRouter, vLLM and others that copy it
_CHAT_FIELDS = """
audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens max_tokens messages metadata
modalities model n parallel_tool_calls prediction presence_penalty prompt_cache_key prompt_cache_retention
reasoning_effort response_format safety_identifier seed service_tier stop store stream stream_options temperature
tool_choice tools top_logprobs top_p user verbosity web_search_options
add_generation_prompt best_of chat_template_kwargs continue_final_message guided_choice guided_grammar guided_json
guided_regex ignore_eos include_reasoning length_penalty min_p min_tokens models plugins provider random_seed reasoning
repetition_penalty route safe_prompt stop_token_ids think thinking top_a top_k transforms
"""


def chat_content(answer: Answer, request: Request) -> Content:
    """What POST .../chat/completions says: the answer's text, or a call of the first tool if the user may have one."""
    asked = request.json
    require_known(asked, _CHAT_FIELDS, "Unrecognized request argument supplied: %s")
    tool, answer = _tool_wanted(asked), _chat_resumed(answer, request)
    deltas = _call_deltas(tool) if tool else split_words(answer.text)
    finish, model, usage = "tool_calls" if tool else "stop", asked.get("model", MODEL), _usage(asked, deltas)
    id = f"chatcmpl-{answer.generation}"
    if asked.get("stream") is True:
        wants_usage = (asked.get("stream_options") or {}).get("include_usage")
        events = chat_events(deltas, model=model, id=id, finish=finish, usage=usage if wants_usage else None)
        return Content(answer.status, EVENT_STREAM, events)
    text, calls = (None, [_whole_call(tool)]) if tool else (answer.text, [])
    completion = json_completion(text, model=model, id=id, finish=finish, usage=usage, tool_calls=calls)
    return Content(answer.status, JSON, [completion])


def models_content(answer: Answer, request: Request) -> Content:
    """What GET .../models says; Gemini, which has the same path, is known by the header of its key."""
    if "x-goog-api-key" in request.headers:
        return gemini_models_content(answer, request)
    model = {"id": MODEL, "object": "model", "created": CREATED, "owned_by": "local"}
    return Content(answer.status, JSON, [dumps({"object": "list", "data": [model]})])


def _chat_resumed(answer: Answer, request: Request) -> Answer:
    """The answer as it goes on, if the request is for that in one of the ways that these services have."""
    asked = request.json
    messages, continues = asked.get("messages") or [], asked.get("continue_final_message")
    # Without the second, vLLM takes it for true.
    both = continues and asked.get("add_generation_prompt", True)
    require(not both, "Cannot set both `continue_final_message` and `add_generation_prompt` to True.")
    if not messages or messages[-1]["role"] != "assistant":
        return anchored(answer, messages)
    if messages[-1].get("prefix"):
        beta = "/beta/" in request.path or not asked.get("model", MODEL).startswith("deepseek")
        where = 'set base_url="https://api.deepseek.com/beta"'
        require(beta, f"prefix is only available when using beta api ({where})")
    return prefilled(answer, messages[-1]) if continues or messages[-1].get("prefix") else answer


def _usage(asked: Mapping[str, Any], deltas: Sequence[Any]) -> Mapping[str, int]:
    prompt = token_count(asked.get("messages"))
    return {"prompt_tokens": prompt, "completion_tokens": len(deltas), "total_tokens": prompt + len(deltas)}


def _tool_wanted(asked: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The first tool, if there is one, it may be used, and it was the user who spoke last."""
    tools, messages = asked.get("tools"), asked.get("messages")
    if not tools or not messages or asked.get("tool_choice") == "none" or messages[-1]["role"] != "user":
        return None
    function: Mapping[str, Any] = tools[0]["function"]
    return function


def _whole_call(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    call = sample_call(tool)
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return {"id": "call_local", "type": "function", "function": function}


def _call_deltas(tool: Mapping[str, Any]) -> list[str | Mapping[str, Any]]:
    """The call as OpenAI streams it: id and name once, then the arguments in fragments."""
    call = _whole_call(tool)
    arguments = call["function"]["arguments"]
    first = {**call, "function": {**call["function"], "arguments": ""}}
    rest = [{"function": {"arguments": fragment}} for fragment in fragments(arguments)]
    return [{"tool_calls": [{"index": 0, **part}]} for part in [first, *rest]]


def _openai_error(status: int, message: str | None) -> bytes:
    # No code with a message: OpenAI gives one only where the model or the key is at fault.
    return error_body(status, message, code=None if message is None else "")


def _openai_unauthorized(key: str | None) -> Answer:
    where = "You can find your API key at https://platform.openai.com/account/api-keys."
    if key is None:
        return error_answer(401, f"You didn't provide an API key. {where}", code="")
    # OpenAI masks the key that it repeats; not every service does.
    return error_answer(401, f"Incorrect API key provided: {key}. {where}")


OPENAI = Dialect("/v1", _openai_error, _openai_unauthorized)


# ---------------------------------------------------------------------------
# The OpenAI Responses dialect
# A response is made whole; its stream is made from it. Errors are those of OpenAI chat.
# ---------------------------------------------------------------------------

#: The ids of a call and of the same call after reasoning, without which it is not to come back.
CALL_ID, REASONED_CALL_ID = "call_local", "call_local_reasoned"

_MOVED = {"messages": "input", "max_tokens": "max_output_tokens", "max_completion_tokens": "max_output_tokens"}


def message_item(text: str) -> dict[str, Any]:
    part = {"type": "output_text", "annotations": [], "logprobs": [], "text": text}
    return {"id": "msg_local", "type": "message", "status": "completed", "content": [part], "role": "assistant"}


def reasoning_item(text: str) -> dict[str, Any]:
    """Reasoning with its summary, and what OpenAI wants back in place of the reasoning itself."""
    summary = [{"type": "summary_text", "text": text}]
    return {"id": "rs_local", "type": "reasoning", "summary": summary, "encrypted_content": signature(summary)}


def call_item(call: Call, call_id: str = CALL_ID) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    item = {"id": "fc_local", "type": "function_call", "status": "completed", "arguments": arguments}
    return {**item, "call_id": call_id, "name": call.name}


def response_object(
    *items: Mapping[str, Any],
    model: str = MODEL,
    id: str = "resp_local",
    status: str = "completed",
    input_tokens: int = 0,
    **fields: Any,
) -> dict[str, Any]:
    """A response with these output items; `fields` are further ones of its own, or others in place of the usual."""
    head = {"id": id, "object": "response", "created_at": CREATED, "status": status, "model": model}
    options = {"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "metadata": {}}
    usual = {**options, "error": None, "incomplete_details": None, "usage": _response_usage(input_tokens, items)}
    return {**head, "output": list(items), **usual, **fields}


def _response_usage(prompt: int, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    reasoning, output = (sum(map(_item_tokens, some)) for some in (_of_type(items, "reasoning"), items))
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": output,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": prompt + output,
    }


def response_events(response: Mapping[str, Any]) -> list[bytes]:
    """The response as a stream, its last event named by its status; in the background it is queued first."""
    begun = {**response, "status": "in_progress", "output": [], "usage": None}
    queued = {**begun, "status": "queued"}
    payloads = [_status_payload("created", begun), _status_payload("in_progress", begun)]
    if response.get("background"):
        payloads[:1] = [_status_payload("created", queued), _status_payload("queued", queued)]
    for index, item in enumerate(response["output"]):
        payloads += [{**payload, "output_index": index} for payload in _item_payloads(item)]
    payloads.append(_status_payload(response["status"], response))
    return [data_event({**payload, "sequence_number": at}, payload["type"]) for at, payload in enumerate(payloads)]


def responses_content(answer: Answer, request: Request) -> Content:
    """What POST .../responses says: the answer's text, or a call of the first tool; reasoning first, if asked for."""
    asked = request.json
    _check_responses(asked)
    answer = anchored(answer, [] if isinstance(asked["input"], str) else asked["input"])
    tool, reasoned = _response_tool(asked), bool(asked.get("reasoning"))
    items = [reasoning_item(answer.thinking)] if reasoned else []
    call_id = REASONED_CALL_ID if reasoned else CALL_ID
    items.append(call_item(sample_call(tool), call_id) if tool else message_item(answer.text))
    background: dict[str, Any] = {"background": True} if asked.get("background") is True else {}
    # By its id a background response is asked for again, so no two are to have the same.
    id = f"resp_{answer.generation}" + (f"_{secrets.token_hex(8)}" if background else "")
    prompt, model = token_count(asked["input"]), asked.get("model", MODEL)
    response = response_object(*items, model=model, id=id, input_tokens=prompt, **background)
    if asked.get("stream") is True:
        return Content(answer.status, EVENT_STREAM, response_events(response))
    return Content(answer.status, JSON, [dumps(response)])


def unfinished(response: Mapping[str, Any], status: str) -> dict[str, Any]:
    """The response before its end: half of its text, and no usage."""
    messages = [{**item, "status": "incomplete"} for item in _of_type(response["output"], "message")]
    output = [{**item, "content": [_half(part) for part in item["content"]]} for item in messages]
    return {**response, "status": status, "output": output, "usage": None}


def unknown_response_content(answer: Answer, request: Request) -> Content:
    """What is said of a response that is not in the server's memory."""
    id = request.path.partition("?")[0].partition("/responses/")[2].partition("/")[0]
    return Content(404, JSON, [OPENAI.error(404, f"Response with id '{id}' not found.")])


def _half(part: Mapping[str, Any]) -> dict[str, Any]:
    words = split_words(part.get("text") or "")
    return {**part, "text": "".join(words[: len(words) // 2])}


def _status_payload(name: str, response: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": f"response.{name}", "response": response}


def _item_payloads(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is said of one output item, from its start to its end."""
    inside = _INSIDE[item["type"]](item) if item["type"] in _INSIDE else []
    return [
        {"type": "response.output_item.added", "item": _begun(item)},
        *({**payload, "item_id": item["id"]} for payload in inside),
        {"type": "response.output_item.done", "item": item},
    ]


def _begun(item: Mapping[str, Any]) -> dict[str, Any]:
    """The item as it is added, with nothing in it yet."""
    empty: Mapping[str, Any] = {"status": "in_progress", "content": [], "summary": [], "arguments": ""}
    begun = {name: empty.get(name, value) for name, value in item.items()}
    if "encrypted_content" in item:
        # Only the item that is done has all of it.
        begun["encrypted_content"] = item["encrypted_content"][:8]
    return begun


def _parts_payloads(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    payloads: list[dict[str, Any]] = []
    for index, part in enumerate(item["content"]):
        said = _text_payloads("response.content_part", "response.output_text", part, {"logprobs": []})
        payloads += [{**payload, "content_index": index} for payload in said]
    return payloads


def _summary_payloads(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    payloads: list[dict[str, Any]] = []
    for index, part in enumerate(item["summary"]):
        said = _text_payloads("response.reasoning_summary_part", "response.reasoning_summary_text", part, {})
        payloads += [{**payload, "summary_index": index} for payload in said]
    return payloads


def _text_payloads(
    part_name: str, text_name: str, part: Mapping[str, Any], extra: Mapping[str, Any]
) -> list[dict[str, Any]]:
    text = part["text"]
    return [
        {"type": f"{part_name}.added", "part": {**part, "text": ""}},
        *({"type": f"{text_name}.delta", "delta": word, **extra} for word in split_words(text)),
        {"type": f"{text_name}.done", "text": text, **extra},
        {"type": f"{part_name}.done", "part": part},
    ]


def _arguments_payloads(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    name, arguments = "response.function_call_arguments", item["arguments"]
    deltas = [{"type": f"{name}.delta", "delta": fragment} for fragment in fragments(arguments)]
    return [*deltas, {"type": f"{name}.done", "arguments": arguments}]


_INSIDE: Mapping[str, Callable[[Mapping[str, Any]], list[dict[str, Any]]]] = {
    "message": _parts_payloads,
    "reasoning": _summary_payloads,
    "function_call": _arguments_payloads,
}


def _item_tokens(item: Mapping[str, Any]) -> int:
    return sum("delta" in payload for payload in _item_payloads(item))


def _response_tool(asked: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The first tool that is a function, if it may be called and it was the user who spoke last."""
    tools: list[Mapping[str, Any]] = _of_type(asked.get("tools") or [], "function")
    last = {"role": "user"} if isinstance(asked["input"], str) else asked["input"][-1]
    return tools[0] if tools and asked.get("tool_choice") != "none" and last.get("role") == "user" else None


_RESPONSE_FIELDS = """
background conversation context_management include input instructions max_output_tokens max_tool_calls metadata model
parallel_tool_calls previous_response_id prompt prompt_cache_key prompt_cache_retention reasoning safety_identifier
service_tier store stream stream_options temperature text tool_choice tools top_logprobs top_p truncation user
"""


def _check_responses(asked: Mapping[str, Any]) -> None:
    for name, place in _MOVED.items():
        moved = f"In the Responses API, this parameter has moved to '{place}'."
        require(name not in asked, f"Unsupported parameter: '{name}'. {moved}")
    require_known(asked, _RESPONSE_FIELDS, "Unknown parameter: '%s'.")
    require("input" in asked, "Missing required parameter: 'input'.")
    usage_wanted = "include_usage" in (asked.get("stream_options") or {})
    require(not usage_wanted, "Unknown parameter: 'stream_options.include_usage'.")
    for index, tool in enumerate(_of_type(asked.get("tools") or [], "function")):
        require("name" in tool, f"Missing required parameter: 'tools[{index}].name'.")
    items = [] if isinstance(asked["input"], str) else asked["input"]
    for index, item in enumerate(items):
        _check_message_item(f"input[{index}]", item)
    if not asked.get("previous_response_id"):
        _check_calls(items)
    _check_reasoning(items)


def _check_message_item(where: str, item: Mapping[str, Any]) -> None:
    if item.get("type", "message") != "message":
        return
    roles = ("assistant", "system", "developer", "user")
    require(item.get("role") in roles, f"Invalid value: '{item.get('role')}'. Supported values are: {roles}.")
    for name in ("tool_calls", "tool_call_id", "vendor"):
        require(name not in item, f"Unknown parameter: '{where}.{name}'.")
    content = item.get("content")
    if not isinstance(content, (str, list)):
        raise Refusal(f"Invalid type for '{where}.content'.")
    ours = ("output_text", "refusal") if item["role"] == "assistant" else ("input_text", "input_image", "input_file")
    allowed = isinstance(content, str) or len(_of_type(content, *ours)) == len(content)
    require(allowed, f"Invalid value in '{where}.content'. Supported values are: {ours}.")


def _check_calls(items: Sequence[Mapping[str, Any]]) -> None:
    called = {item["call_id"] for item in _of_type(items, "function_call")}
    answered = {item["call_id"] for item in _of_type(items, "function_call_output")}
    require("" not in called | answered, "Invalid 'call_id': empty string. Expected a string with minimum length 1.")
    for call_id in answered - called:
        raise Refusal(f"No tool call found for function call output with call_id {call_id}.")
    for call_id in called - answered:
        raise Refusal(f"No tool output found for function call {call_id}.")


def _check_reasoning(items: Sequence[Mapping[str, Any]]) -> None:
    for before, item in zip([{}, *items], items):
        reasoned = item.get("type") == "function_call" and item["call_id"] == REASONED_CALL_ID
        missing = "was provided without its required 'reasoning' item: 'rs_local'."
        whole = not reasoned or before.get("type") == "reasoning"
        require(whole, f"Item '{item.get('id')}' of type 'function_call' {missing}")
    for item in _of_type(items, "reasoning"):
        whole = item.get("encrypted_content") == signature(item["summary"])
        require(whole, f"The encrypted content for item {item.get('id')} could not be verified.")


# ---------------------------------------------------------------------------
# The Anthropic dialect
# A message is made whole; its stream is made from it.
# ---------------------------------------------------------------------------

_ANTHROPIC_ERRORS: Mapping[int, tuple[str, str]] = {
    400: ("invalid_request_error", "The request body is not valid JSON"),
    401: ("authentication_error", "invalid x-api-key"),
    402: ("billing_error", "Your credit balance is too low to access the API"),
    403: ("permission_error", "Your API key does not have permission to use the resource"),
    404: ("not_found_error", f"model: {MODEL}"),
    413: ("request_too_large", "Request exceeds the maximum size"),
    429: ("rate_limit_error", "This request would exceed the rate limit of your organization"),
    500: ("api_error", "Internal server error"),
    504: ("timeout_error", "Request timed out"),
    529: ("overloaded_error", "Overloaded"),
}


def anthropic_error(status: int, message: str | None = None) -> bytes:
    """An error as Anthropic words it."""
    other = ("invalid_request_error" if status < 500 else "api_error", _phrase(status))
    type, usual = _ANTHROPIC_ERRORS.get(status, other)
    error = {"type": type, "message": usual if message is None else message}
    return dumps({"type": "error", "error": error, "request_id": "req_local"})


def _anthropic_unauthorized(key: str | None) -> Answer:
    body = anthropic_error(401, "x-api-key header is required" if key is None else None)
    return Answer(status=401, body=body, framing="length")


ANTHROPIC = Dialect("", anthropic_error, _anthropic_unauthorized)


def text_block(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def thinking_block(text: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": text, "signature": signature(text)}


def tool_use_block(call: Call, id: str = "toolu_local") -> dict[str, Any]:
    return {"type": "tool_use", "id": id, "name": call.name, "input": call.arguments}


def anthropic_message(
    *blocks: Mapping[str, Any],
    model: str = MODEL,
    id: str = "msg_local",
    stop_reason: str | None = None,
    input_tokens: int = 0,
    usage: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A message with these blocks; its stop reason, if not given, is theirs. `usage` adds to it or replaces some."""
    counts = {
        "input_tokens": input_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": sum(map(_block_tokens, blocks)),
        "output_tokens_details": {"thinking_tokens": sum(map(_block_tokens, _of_type(blocks, "thinking")))},
    }
    stop = stop_reason or ("tool_use" if _of_type(blocks, "tool_use") else "end_turn")
    message = {"id": id, "type": "message", "role": "assistant", "model": model, "content": list(blocks)}
    return {**message, "stop_reason": stop, "stop_sequence": None, "usage": {**counts, **(usage or {})}}


def anthropic_events(message: Mapping[str, Any]) -> list[bytes]:
    """The message as a stream: its start, a ping, each block, how it ends, and its stop."""
    usage = {name: count for name, count in message["usage"].items() if name != "output_tokens_details"}
    begun = {**message, "content": [], "stop_reason": None, "usage": {**usage, "output_tokens": 1}}
    payloads: list[dict[str, Any]] = [{"type": "message_start", "message": begun}]
    for index, block in enumerate(message["content"]):
        payloads += _block_payloads(index, block)
    # Nothing says where a ping comes; Anthropic's first follows the start of the first block.
    payloads.insert(2, {"type": "ping"})
    stop = {name: message[name] for name in ("stop_reason", "stop_sequence")}
    payloads += [{"type": "message_delta", "delta": stop, "usage": message["usage"]}, {"type": "message_stop"}]
    return [data_event(payload, payload["type"]) for payload in payloads]


def anthropic_content(answer: Answer, request: Request) -> Content:
    """What POST .../v1/messages says: the answer's text, or a call of the first tool; thinking first, if asked for."""
    require(request.headers.get("anthropic-version"), "anthropic-version: header is required")
    asked = request.json
    _check_anthropic(asked)
    tool, answer = _anthropic_tool(asked), _anthropic_resumed(answer, asked["messages"])
    blocks = [thinking_block(answer.thinking)] if _thinks(asked, "enabled", "adaptive") else []
    said = [text_block(answer.text)] if answer.text else []
    blocks += [tool_use_block(sample_call(tool, "input_schema"))] if tool else said
    prompt = token_count([asked.get("system"), asked["messages"]])
    id = f"msg_{answer.generation}"
    message = anthropic_message(*blocks, model=asked["model"], id=id, input_tokens=prompt)
    if asked.get("stream") is True:
        return Content(answer.status, EVENT_STREAM, anthropic_events(message))
    return Content(answer.status, JSON, [dumps(message)])


def _anthropic_resumed(answer: Answer, messages: Sequence[Mapping[str, Any]]) -> Answer:
    """The answer as it goes on: any last message of the assistant's is its beginning."""
    if messages[-1]["role"] == "user":
        return anchored(answer, messages)
    text = plain_text(messages[-1])
    require(text == text.rstrip(), "messages: final assistant content cannot end with trailing whitespace")
    return prefilled(answer, messages[-1])


def _block_payloads(index: int, block: Mapping[str, Any]) -> list[dict[str, Any]]:
    empty: Mapping[str, Any] = {
        "text": {"text": ""},
        "thinking": {"thinking": "", "signature": ""},
        "tool_use": {"input": {}},
    }
    begun = {**block, **empty.get(block["type"], {})}
    return [
        {"type": "content_block_start", "index": index, "content_block": begun},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in _deltas(block)),
        {"type": "content_block_stop", "index": index},
    ]


def _deltas(block: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is streamed of a block; nothing of one that is whole at its start."""
    if block["type"] == "text":
        return [{"type": "text_delta", "text": word} for word in split_words(block["text"])]
    if block["type"] == "thinking":
        words = [{"type": "thinking_delta", "thinking": word} for word in split_words(block["thinking"])]
        return [*words, {"type": "signature_delta", "signature": block["signature"]}]
    if block["type"] == "tool_use":
        # The first fragment is empty, and with no arguments it is the only one.
        arguments = json.dumps(block["input"], ensure_ascii=False) if block["input"] else ""
        return [{"type": "input_json_delta", "partial_json": part} for part in ["", *fragments(arguments)]]
    return []


def _block_tokens(block: Mapping[str, Any]) -> int:
    return sum(delta["type"] != "signature_delta" for delta in _deltas(block))


def _blocks(message: Mapping[str, Any], *types: str) -> list[Any]:
    return _of_type(message.get("content", ""), *types)


def _thinks(asked: Mapping[str, Any], *types: str) -> bool:
    return (asked.get("thinking") or {}).get("type") in types


def _anthropic_tool(asked: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The first tool of the client's own, if it may be called and the user spoke last, not only tools."""
    tools = [tool for tool in asked.get("tools") or [] if "input_schema" in tool]
    last, choice = asked["messages"][-1], asked.get("tool_choice") or {"type": "auto"}
    spoke = last["role"] == "user" and len(_blocks(last, "tool_result")) < len(last["content"])
    return tools[0] if tools and choice["type"] != "none" and spoke else None


_MESSAGES_FIELDS = """
cache_control container context_management inference_geo max_tokens mcp_servers messages metadata model output_config
output_format service_tier stop_sequences stream system temperature thinking tool_choice tools top_k top_p
"""


def _check_anthropic(asked: Mapping[str, Any]) -> None:
    for name in ("model", "messages", "max_tokens"):
        require(name in asked, f"{name}: Field required")
    require_known(asked, _MESSAGES_FIELDS, "%s: Extra inputs are not permitted")
    for index, tool in enumerate(asked.get("tools") or []):
        require("name" in tool, f"tools.{index}.custom.name: Field required")
    budget = (asked.get("thinking") or {}).get("budget_tokens") or 0
    require(asked["max_tokens"] > budget, "`max_tokens` must be greater than `thinking.budget_tokens`.")
    messages = asked["messages"]
    require(messages, "messages: at least one message is required")
    for index, message in enumerate(messages):
        _check_anthropic_message(f"messages.{index}", message)
    for before, message in zip([{}, *messages], messages):
        _check_tool_results(before, message)
    _check_thinking(asked)


def _check_anthropic_message(where: str, message: Mapping[str, Any]) -> None:
    system = 'The Messages API accepts a top-level `system` parameter, not "system" as an input message role.'
    require(message["role"] != "system", f'messages: Unexpected role "system". {system}')
    require(message["role"] in ("user", "assistant"), f"{where}.role: Input should be 'user' or 'assistant'")
    extra = sorted(set(message) - {"role", "content"})
    require(not extra, f"{where}.{', '.join(extra)}: Extra inputs are not permitted")
    require(isinstance(message["content"], (str, list)), f"{where}.content: Input should be a valid list")
    require(message["content"], f"{where}: all messages must have non-empty content")
    for block in _blocks(message, "image_url", "input_text", "input_image", "output_text", "refusal"):
        raise Refusal(f"{where}.content: Input tag '{block['type']}' does not match any of the expected tags")
    for block in _blocks(message, "text"):
        require(block["text"], "messages: text content blocks must be non-empty")
    for block in _blocks(message, "tool_use"):
        usable = re.fullmatch("[a-zA-Z0-9_-]+", block["id"])
        require(usable, f"{where}.tool_use.id: String should match pattern '^[a-zA-Z0-9_-]+$'")
        require(isinstance(block["input"], dict), f"{where}.tool_use.input: Input should be a valid dictionary")


def _check_tool_results(before: Mapping[str, Any], message: Mapping[str, Any]) -> None:
    used = {block["id"] for block in _blocks(before, "tool_use")}
    answered = {block["tool_use_id"] for block in _blocks(message, "tool_result")}
    missing, unexpected = ", ".join(sorted(used - answered)), ", ".join(sorted(answered - used))
    require(not missing, f"`tool_use` ids were found without `tool_result` blocks immediately after: {missing}.")
    require(not unexpected, f"unexpected `tool_use_id` found in `tool_result` blocks: {unexpected}.")


def _check_thinking(asked: Mapping[str, Any]) -> None:
    """What was thought before a tool was used is to come back with its result, and all thinking as it was."""
    messages = asked["messages"]
    for message in messages:
        for block in _blocks(message, "thinking"):
            require(block.get("signature") == signature(block["thinking"]), "Invalid `signature` in `thinking` block")
    if _thinks(asked, "enabled") and len(messages) > 1 and _blocks(messages[-1], "tool_result"):
        first = messages[-2]["content"][0]["type"]
        message = f"Expected `thinking` or `redacted_thinking`, but found `{first}`."
        require(first in ("thinking", "redacted_thinking"), message)


# ---------------------------------------------------------------------------
# The Gemini dialect
# A response is made whole; the chunks of a stream are made from it, as events or as the elements of one array.
# ---------------------------------------------------------------------------

_GEMINI_ERRORS: Mapping[int, tuple[str, str]] = {
    400: ("INVALID_ARGUMENT", "Invalid JSON payload received."),
    401: ("UNAUTHENTICATED", "Request had invalid authentication credentials."),
    403: ("PERMISSION_DENIED", "The caller does not have permission"),
    404: ("NOT_FOUND", f"models/{MODEL} is not found for API version v1beta"),
    429: ("RESOURCE_EXHAUSTED", "You exceeded your current quota, please check your plan and billing details."),
    500: ("INTERNAL", "An internal error has occurred."),
    503: ("UNAVAILABLE", "The model is overloaded. Please try again later."),
    504: ("DEADLINE_EXCEEDED", "The request timed out. Please try again."),
}

#: What Gemini knows in a request, by place. It takes snake_case for each of these as well.
_GEMINI_NAMES: Mapping[str, frozenset[str]] = {
    place: frozenset(names.split())
    for place, names in {
        "": """contents systemInstruction generationConfig tools toolConfig safetySettings cachedContent labels
            serviceTier store""",
        "generation_config": """candidateCount maxOutputTokens temperature topP topK seed stopSequences responseMimeType
            responseSchema responseJsonSchema presencePenalty frequencyPenalty responseLogprobs logprobs thinkingConfig
            responseModalities speechConfig mediaResolution imageConfig enableEnhancedCivicAnswers""",
        "contents": "role parts",
        "contents.parts": """text inlineData fileData functionCall functionResponse executableCode codeExecutionResult
            toolCall toolResponse thought thoughtSignature videoMetadata mediaResolution partMetadata""",
        "contents.parts.function_call": "id name args",
        "contents.parts.function_response": "id name response parts willContinue scheduling",
        "tools": """functionDeclarations googleSearch googleSearchRetrieval codeExecution urlContext computerUse
            fileSearch googleMaps mcpServers""",
        "tools.function_declarations": """name description parameters parametersJsonSchema response responseJsonSchema
            behavior""",
    }.items()
}

#: Gemini's own ways to say that a call comes from elsewhere, where nothing signed it.
_UNSIGNED = ("skip_thought_signature_validator", "context_engineering_is_the_way_to_go")


def gemini_error(status: int, message: str | None = None, details: Sequence[Mapping[str, Any]] = ()) -> bytes:
    """An error as Gemini words it."""
    name, usual = _GEMINI_ERRORS.get(status, ("UNKNOWN", _phrase(status)))
    error = {"code": status, "message": usual if message is None else message, "status": name}
    return _pretty({"error": {**error, "details": list(details)} if details else error})


def _gemini_unauthorized(key: str | None) -> Answer:
    if key is None:
        message = (
            "Method doesn't allow unregistered callers. Please use API Key or other form of API consumer identity."
        )
        return Answer(status=403, body=gemini_error(403, message), framing="length")
    details = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}
    body = gemini_error(400, "API key not valid. Please pass a valid API key.", [details])
    return Answer(status=400, body=body, framing="length")


GEMINI = Dialect("", gemini_error, _gemini_unauthorized)


def call_part(call: Call) -> dict[str, Any]:
    """A call, signed and without an id, as Gemini makes it."""
    said = {"name": call.name, "args": call.arguments}
    return {"functionCall": said, "thoughtSignature": signature(said)}


def gemini_response(
    *parts: Mapping[str, Any],
    model: str = MODEL,
    id: str = "local",
    finish_reason: str = "STOP",
    prompt_tokens: int = 0,
) -> dict[str, Any]:
    """A response with one candidate, which has these parts."""
    pieces = _pieces(parts)
    thoughts = sum(map(_is_thought, pieces))
    content = {"parts": list(parts), "role": "model"}
    candidate = {"content": content, "finishReason": finish_reason, "index": 0}
    usage = _gemini_usage(prompt_tokens, len(pieces) - thoughts, thoughts)
    return {"candidates": [candidate], "usageMetadata": usage, "modelVersion": model, "responseId": id}


def gemini_chunks(response: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The response word by word, each chunk with the usage up to there and the last with the reason to finish."""
    [candidate] = response["candidates"]
    pieces = _pieces(candidate["content"]["parts"]) or [{"text": ""}]
    prompt, chunks = response["usageMetadata"]["promptTokenCount"], []
    for count, thoughts in enumerate(itertools.accumulate(map(_is_thought, pieces)), 1):
        said = {"content": {"parts": [pieces[count - 1]], "role": "model"}, "index": 0}
        usage = _gemini_usage(prompt, count - thoughts, thoughts)
        chunks.append({**response, "candidates": [said], "usageMetadata": usage})
    # The last one says of the candidate all that the response does.
    chunks[-1]["candidates"] = [{**candidate, **said}]
    return chunks


def gemini_events(chunks: Iterable[Mapping[str, Any]]) -> list[bytes]:
    """The chunks as an event stream, with the line ends that Gemini has."""
    return [b"data: %s\r\n\r\n" % json.dumps(chunk, ensure_ascii=False).encode() for chunk in chunks]


def gemini_array(chunks: Iterable[Mapping[str, Any]]) -> list[bytes]:
    """The chunks as the elements of one array, each a piece."""
    heads = itertools.chain([b"["], itertools.repeat(b",\r\n"))
    return [*(head + _pretty(chunk) + b"\n" for head, chunk in zip(heads, chunks)), b"]"]


def gemini_content(answer: Answer, request: Request) -> Content:
    """What POST .../models/{model}:generateContent says: the answer's text, or a call of the first tool."""
    return Content(answer.status, JSON, [_pretty(_gemini_said(answer, request))])


def gemini_stream_content(answer: Answer, request: Request) -> Content:
    """What POST .../models/{model}:streamGenerateContent says, as `alt` wants it."""
    chunks = gemini_chunks(_gemini_said(answer, request))
    if "alt=sse" in request.path.partition("?")[2].split("&"):
        return Content(answer.status, EVENT_STREAM, gemini_events(chunks))
    return Content(answer.status, JSON, gemini_array(chunks))


def gemini_models_content(answer: Answer, request: Request) -> Content:
    """What GET .../v1beta/models says."""
    model = {"name": f"models/{MODEL}", "displayName": MODEL, "supportedGenerationMethods": ["generateContent"]}
    return Content(answer.status, JSON, [_pretty({"models": [model]})])


def _gemini_said(answer: Answer, request: Request) -> dict[str, Any]:
    asked = _camel_case(request.json)
    _check_gemini(request.json)
    answer = anchored(answer, asked["contents"])
    config = _camel_case(_camel_case(asked.get("generationConfig")).get("thinkingConfig"))
    tool, signed = _gemini_tool(asked), {"thoughtSignature": signature(answer.text)}
    parts: list[dict[str, Any]] = [{"text": answer.thinking, "thought": True}] if config.get("includeThoughts") else []
    if tool:
        schema = "parametersJsonSchema" if "parametersJsonSchema" in tool else "parameters"
        parts.append(call_part(sample_call(tool, schema)))
    else:
        parts.append({"text": answer.text, **(signed if parts else {})})
    model = request.path.partition("?")[0].rpartition("/")[2].partition(":")[0]
    return gemini_response(*parts, model=model, id=answer.generation, prompt_tokens=token_count(asked["contents"]))


def _pieces(parts: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [piece for part in parts for piece in _part_pieces(part)]


def _part_pieces(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The part in words, if it is text; a signature goes with the first."""
    if "text" not in part:
        return [dict(part)]
    first, *rest = split_words(part["text"]) or [""]
    thought = {"thought": True} if _is_thought(part) else {}
    return [{**part, "text": first}, *({"text": word, **thought} for word in rest)]


def _is_thought(part: Mapping[str, Any]) -> bool:
    return part.get("thought") is True


def _gemini_usage(prompt: int, said: int, thoughts: int) -> dict[str, Any]:
    """What was used so far; a count of nothing is left out."""
    counts = {"promptTokenCount": prompt, "candidatesTokenCount": said, "totalTokenCount": prompt + said + thoughts}
    details = {"promptTokensDetails": [{"modality": "TEXT", "tokenCount": prompt}], "thoughtsTokenCount": thoughts}
    always = ("promptTokenCount", "totalTokenCount")
    return {name: count for name, count in {**counts, **details}.items() if count or name in always}


def _pretty(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=2).encode()


def _camel_case(fields: Mapping[str, Any] | None) -> dict[str, Any]:
    """The fields by the names that Gemini's JSON has."""
    given = (fields or {}).items()
    return {re.sub("_([a-z])", lambda match: match[1].upper(), name): value for name, value in given}


def _gemini_tool(asked: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The first function declared, if it may be called and the user spoke last, not only tools."""
    mode = ((asked.get("toolConfig") or {}).get("functionCallingConfig") or {}).get("mode")
    tools = _declared(asked)
    return _camel_case(tools[0]) if tools and mode != "NONE" and _spoke(asked["contents"][-1]) else None


def _declared(asked: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = map(_camel_case, asked.get("tools") or ())
    return [function for group in groups for function in group.get("functionDeclarations", ())]


def _spoke(content: Mapping[str, Any]) -> bool:
    """Whether the user says something here that is no tool's result."""
    return content.get("role") != "model" and len(_parts(content, "functionResponse")) < len(content["parts"])


def _parts(content: Mapping[str, Any], name: str) -> list[Any]:
    return [part for part in map(_camel_case, content.get("parts", ())) if name in part]


def _check_gemini(given: Mapping[str, Any]) -> None:
    asked = _camel_case(given)
    contents = asked.get("contents") or []
    _check_names("", [given])
    _check_names("generation_config", [asked.get("generationConfig") or {}])
    _check_names("tools", asked.get("tools") or [])
    _check_names("tools.function_declarations", _declared(asked))
    require(contents, "* GenerateContentRequest.contents: contents is not specified")
    for before, content in zip([{}, *contents], contents):
        _check_gemini_content(content)
        equal = len(_parts(before, "functionCall")) == len(_parts(content, "functionResponse"))
        parts = "the number of function response parts is equal to the number of function call parts"
        require(equal, f"Please ensure that {parts} of the function call turn.")
    _check_signatures(contents)


def _check_names(place: str, values: Iterable[Mapping[str, Any]]) -> None:
    where = f" at '{place}'" if place else ""
    for name in (name for value in values for name in value):
        known = set(_camel_case({name: None})) <= _GEMINI_NAMES[place]
        require(known, f'Invalid JSON payload received. Unknown name "{name}"{where}: Cannot find field.')


def _check_gemini_content(content: Mapping[str, Any]) -> None:
    _check_names("contents", [content])
    require(content.get("role", "user") in ("user", "model"), "Please use a valid role: user, model.")
    require(content.get("parts"), "* GenerateContentRequest.contents: contents.parts must not be empty.")
    _check_names("contents.parts", content["parts"])
    for part in _parts(content, "functionCall"):
        _check_names("contents.parts.function_call", [part["functionCall"]])
        require(isinstance(part["functionCall"].get("args", {}), dict), "Invalid value at 'function_call.args'")
    for part in _parts(content, "functionResponse"):
        _check_names("contents.parts.function_response", [part["functionResponse"]])
        require(isinstance(part["functionResponse"]["response"], dict), "Invalid value at 'function_response.response'")


def _check_signatures(contents: Sequence[Mapping[str, Any]]) -> None:
    """The first call of each step is to be signed, in the turn that the user began last."""
    begun = max((index for index, content in enumerate(contents) if _spoke(content)), default=0)
    for content in contents[begun:]:
        for part in _parts(content, "functionCall")[:1]:
            call, signed = part["functionCall"], part.get("thoughtSignature")
            require(signed, f"Function call `{call['name']}` is missing a thought_signature in functionCall parts.")
            said = {"name": call["name"], "args": call.get("args", {})}
            require(signed in (signature(said), *_UNSIGNED), "Thought signature is not valid.")


# ---------------------------------------------------------------------------
# The Ollama dialect
# An answer is made whole; its lines are made from it.
# ---------------------------------------------------------------------------


def ollama_error(status: int, message: str | None = None) -> bytes:
    """An error as Ollama words it."""
    usual = f"model '{MODEL}' not found" if status == 404 else _phrase(status).lower()
    return dumps({"error": usual if message is None else message})


def _ollama_unauthorized(key: str | None) -> Answer:
    return Answer(status=401, body=ollama_error(401), framing="length")


OLLAMA = Dialect("", ollama_error, _ollama_unauthorized)


def ollama_answer(
    text: str,
    *calls: Call,
    thinking: str = "",
    model: str = MODEL,
    done_reason: str = "stop",
    prompt_tokens: int = 0,
    generate: bool = False,
) -> dict[str, Any]:
    """An answer of /api/chat, or of /api/generate, which says the same in other places."""
    thought = {"thinking": thinking} if thinking else {}
    functions = [{"index": at, "name": call.name, "arguments": call.arguments} for at, call in enumerate(calls)]
    called = [{"id": f"call_local_{at}", "function": function} for at, function in enumerate(functions)]
    message = {"role": "assistant", "content": text, **thought, **({"tool_calls": called} if called else {})}
    counts = {
        "total_duration": 4000000,
        "load_duration": 1000000,
        "prompt_eval_count": prompt_tokens,
        "prompt_eval_duration": 1000000,
        "eval_count": len(split_words(thinking)) + len(split_words(text)) + len(calls),
        "eval_duration": 2000000,
    }
    said = {"response": text, **thought} if generate else {"message": message}
    return {"model": model, "created_at": CREATED_AT, **said, "done": True, "done_reason": done_reason, **counts}


def ollama_lines(answer: Mapping[str, Any]) -> list[bytes]:
    """The answer as a stream of lines, the last of which says nothing more and has the counts."""
    message = answer.get("message") or {"content": answer.get("response"), **answer}
    said: list[dict[str, Any]] = [
        {"content": "", "thinking": word} for word in split_words(message.get("thinking", ""))
    ]
    said += [{"content": word} for word in split_words(message["content"])]
    said += [{"content": "", "tool_calls": [call]} for call in message.get("tool_calls", ())]
    head = {name: answer[name] for name in ("model", "created_at")}
    lines = [{**head, **_ollama_piece(answer, piece), "done": False} for piece in said]
    last = {name: value for name, value in answer.items() if name != "thinking"}
    lines.append({**last, **_ollama_piece(answer, {"content": ""})})
    return [dumps(line) + b"\n" for line in lines]


def ollama_chat_content(answer: Answer, request: Request) -> Content:
    """What POST .../api/chat says: the answer's text, or a call of the first tool; thinking first, if asked for."""
    asked = request.json
    _check_ollama(asked)
    tool, answer = _tool_wanted(asked), anchored(answer, asked["messages"])
    calls = [sample_call(tool)] if tool else []
    return _ollama_content(answer, asked, "" if tool else answer.text, *calls)


def ollama_generate_content(answer: Answer, request: Request) -> Content:
    """What POST .../api/generate says."""
    return _ollama_content(answer, request.json, answer.text, generate=True)


def ollama_models_content(answer: Answer, request: Request) -> Content:
    """What GET .../api/tags says."""
    model = {"name": MODEL, "model": MODEL, "modified_at": CREATED_AT, "size": 0, "digest": "local", "details": {}}
    return Content(answer.status, JSON, [dumps({"models": [model]})])


def _ollama_content(
    answer: Answer, asked: Mapping[str, Any], text: str, *calls: Call, generate: bool = False
) -> Content:
    thinking = answer.thinking if asked.get("think") else ""
    prompt = token_count(asked["prompt" if generate else "messages"])
    whole = ollama_answer(
        text, *calls, thinking=thinking, model=asked["model"], prompt_tokens=prompt, generate=generate
    )
    if asked.get("stream", True):
        return Content(answer.status, NDJSON, ollama_lines(whole))
    return Content(answer.status, JSON, [dumps(whole)])


def _ollama_piece(answer: Mapping[str, Any], piece: Mapping[str, Any]) -> dict[str, Any]:
    """A piece of a message, in the place that the answer has for it."""
    if "message" in answer:
        return {"message": {"role": "assistant", **piece}}
    return {"response" if name == "content" else name: value for name, value in piece.items()}


def _check_ollama(asked: Mapping[str, Any]) -> None:
    stop = (asked.get("options") or {}).get("stop", [])
    require(isinstance(stop, list), 'option "stop" must be of type array')
    for message in asked["messages"]:
        content = message.get("content", "")
        wrong = "json: cannot unmarshal array into Go struct field ChatRequest.messages.content of type string"
        # Go takes null for an empty string.
        require(content is None or isinstance(content, str), wrong)
        for image in message.get("images") or ():
            base64.b64decode(image, validate=True)
        for call in message.get("tool_calls") or ():
            wrong = (
                "json: cannot unmarshal string into Go struct field .arguments of type api.ToolCallFunctionArguments"
            )
            require(isinstance(call["function"]["arguments"], dict), wrong)


# ---------------------------------------------------------------------------
# The paths
# All that the server knows of the dialects above.
# ---------------------------------------------------------------------------

#: What to put after `LocalProvider.origin` for the base URL of a client, by dialect.
DIALECT_BASES: Mapping[str, str] = {
    "openai": OPENAI.base,
    "openai-responses": OPENAI.base,
    "anthropic": ANTHROPIC.base,
    "gemini": GEMINI.base,
    "ollama": OLLAMA.base,
}

#: The first that fits says what is said. The model list of OpenAI also serves Anthropic.
ROUTES: list[Route] = [
    Route("POST", "/chat/completions", chat_content, OPENAI),
    Route("POST", "/responses", responses_content, OPENAI),
    Route("GET", "/responses/[^/]+", unknown_response_content, OPENAI),
    Route("POST", "/responses/[^/]+/cancel", unknown_response_content, OPENAI),
    Route("POST", "/messages", anthropic_content, ANTHROPIC),
    Route("POST", ":streamGenerateContent", gemini_stream_content, GEMINI),
    Route("POST", ":generateContent", gemini_content, GEMINI),
    Route("POST", "/api/chat", ollama_chat_content, OLLAMA),
    Route("POST", "/api/generate", ollama_generate_content, OLLAMA),
    Route("GET", "/v1alpha/models", gemini_models_content, GEMINI),
    Route("GET", "/v1beta/models", gemini_models_content, GEMINI),
    Route("GET", "/models", models_content, OPENAI),
    Route("GET", "/api/tags", ollama_models_content, OLLAMA),
]


# ---------------------------------------------------------------------------
# Memory
# What was said and may be asked for again: streams with ids, and background responses, by what their events say.
# ---------------------------------------------------------------------------

IDS = ("none", "numbers", "unique", "sparse")
REPLAYS = ("after", "inclusive", "whole", "forget")
JOBS = ("completed", "running", "queued")

_REMEMBERED = 256
_JOB_PATH = re.compile("/responses/([^/?]+)(/cancel)?(?:[?]|$)")
_TOO_OLD = "This response can no longer be streamed because it is more than 5 minutes old"


class Remembered(NamedTuple):
    """A stream that had ids; an event without one has an empty one here."""

    method: str
    path: str
    body: bytes
    events: Sequence[bytes]
    ids: Sequence[str]


class Job(NamedTuple):
    """A background response and its events."""

    response: Mapping[str, Any]
    events: Sequence[bytes]
    cancelled: bool = False


class Memory:
    """What the server said and may be asked for again; the oldest is forgotten first."""

    def __init__(self) -> None:
        self.cancelled: list[str] = []
        self._streams: deque[Remembered] = deque(maxlen=_REMEMBERED)
        self._jobs: dict[str, Job] = {}

    def content_of(self, answer: Answer, request: Request) -> Content:
        """What this answer says to this request: again what was said, if that is asked for, or something new."""
        if answer.drop or answer.status != 200:
            return content_of(answer, request)
        if answer.replay != "forget":
            return self._again(answer, request) or self._anew(answer, request)
        return self._anew(another(answer) if "Last-Event-ID" in request.headers else answer, request)

    def _again(self, answer: Answer, request: Request) -> Content | None:
        match = _JOB_PATH.search(request.path)
        if match and match[1] in self._jobs and request.method == ("POST" if match[2] else "GET"):
            return self._of_job(answer, request, match[1])
        last = request.headers.get("Last-Event-ID")
        return self._replayed(answer, request, last) if last else None

    def _replayed(self, answer: Answer, request: Request, last: str) -> Content | None:
        """The latest stream of this request that had this id, from there on."""
        for stream in self._streams:
            if stream[:3] == (request.method, request.path, request.body) and last in stream.ids:
                at = stream.ids.index(last)
                start = {"after": at + 1, "inclusive": at, "whole": 0}[answer.replay]
                return Content(200, EVENT_STREAM, stream.events[start:], new=False)
        return None

    def _of_job(self, answer: Answer, request: Request, id: str) -> Content:
        if request.method == "GET" and re.search("[?&]stream=true(&|$)", request.path):
            return _job_stream(answer, request, self._jobs[id])
        if request.method == "POST":
            self.cancelled.append(id)
            self._jobs[id] = self._jobs[id]._replace(cancelled=True)
        response, _, cancelled = self._jobs[id]
        if cancelled or answer.job == "running":
            response = unfinished(response, "cancelled" if cancelled else "in_progress")
        elif answer.job == "queued":
            response = {**response, "status": "queued", "output": [], "usage": None}
        return Content(200, JSON, [dumps(response)], new=False)

    def _anew(self, answer: Answer, request: Request) -> Content:
        content = content_of(answer, request)
        if answer.events is not None or not content.content_type.startswith("text/event-stream"):
            return content
        events = list(content.pieces)
        self._keep_job(request, events)
        if answer.ids != "none":
            ids = _event_ids(answer.ids, events)
            events = [_with_id(event, id) for event, id in zip(events, ids)]
            self._streams.appendleft(Remembered(request.method, request.path, request.body, events, ids))
        return content._replace(pieces=events)

    def _keep_job(self, request: Request, events: Sequence[bytes]) -> None:
        """Remember what these events say, if it is a response in the background."""
        if not request.path.partition("?")[0].endswith("/responses") or b'"background"' not in request.body:
            return
        said = [payload["response"] for payload in map(_payload, events) if "response" in payload]
        if said and said[0].get("background") is True:
            self._jobs[said[0]["id"]] = Job(said[-1], events)
        while len(self._jobs) > _REMEMBERED:
            del self._jobs[next(iter(self._jobs))]


def _job_stream(answer: Answer, request: Request, job: Job) -> Content:
    """The events after the one whose number the request has; all of them, if it has none."""
    if answer.expired:
        return Content(400, JSON, [OPENAI.error(400, _TOO_OLD)])
    match = re.search("[?&]starting_after=([0-9]+)(&|$)", request.path)
    # OpenAI's is never inclusive: a client is to look at the numbers all the same.
    start = -1 if match is None or answer.replay == "whole" else int(match[1]) - (answer.replay == "inclusive")
    events = [event for event in job.events if _payload(event).get("sequence_number", -1) > start]
    return Content(200, EVENT_STREAM, events, new=False)


def _event_ids(kind: str, events: Iterable[bytes]) -> list[str]:
    """The ids of these events; what has no data is no event, and has none."""
    numbers = itertools.count(1)
    return [_event_id(kind, next(numbers)) if re.search(rb"(^|[\r\n])data", event) else "" for event in events]


def _event_id(kind: str, number: int) -> str:
    if kind == "unique":
        return secrets.token_hex(8)
    return "" if kind == "sparse" and number % 3 != 1 else str(number)


def _with_id(event: bytes, id: str) -> bytes:
    """The event with an id after its first line, and with the line end that this has; as it is, if the id is empty."""
    line = b"id: " + id.encode()
    return re.sub(rb"\r\n|\n|\r", lambda end: end[0] + line + end[0], event, count=1) if id else event


def _payload(event: bytes) -> Mapping[str, Any]:
    """The JSON object that an event has as its data, of one line; an empty one if it has none."""
    match = re.search(rb"(?:^|[\r\n])data: ?({[^\r\n]*})", event)
    payload: Mapping[str, Any] = json.loads(match[1]) if match else {}
    return payload


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

#: The words that a field of an Answer may have.
WORDS: Mapping[str, Iterable[str]] = {
    "framing": FRAMINGS,
    "cut": CUTS,
    "connection": CONNECTIONS,
    "ids": IDS,
    "replay": REPLAYS,
    "continuation": CONTINUATIONS,
    "anchor": ANCHORS,
    "job": JOBS,
}

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
    #: A further one that means nothing.
    comment: bytes = COMMENT


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
    requests without it are refused, by their dialect with a 401 or by Gemini with a 400 or 403, and use up no answer.
    """

    def __init__(
        self, *answers: Answer, port: int = 0, ssl_context: ssl.SSLContext | None = None, key: str | None = None
    ) -> None:
        #: How a request is answered when no answer is queued; or a function that says how, which must not wait.
        self.default: Answer | Callable[[Request], Answer] = Answer()
        #: Every request, in order of arrival, also those refused; as a list it may be cleared.
        self.requests: list[Request] = []
        #: When each write of a body began, by `time.perf_counter()`; as a list it may be cleared.
        self.sent_at: list[float] = []
        #: How many TCP connections were accepted.
        self.connections = 0
        #: How many generations were started: a POST that is answered with a 200, whether or not anyone reads it. To say
        #: again what was said before starts none, nor does a cancel.
        self.billed = 0
        self._memory = Memory()
        #: The ids of the background responses that were cancelled, in that order; as a list it may be cleared.
        self.cancelled = self._memory.cancelled
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
        self.base_url = self.origin + DIALECT_BASES["openai"]
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
    def queued(self) -> Sequence[Answer]:
        """The answers that wait for their requests."""
        return tuple(self._queue)

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
        key = _key_of(request)
        if self._key is not None and key != self._key:
            return route_of(request).dialect.unauthorized(key)
        answer = self._queue.popleft() if self._queue else self.default
        if not isinstance(answer, Answer):
            answer = answer(request)
        try:
            return overridden(answer, request.headers.get("X-Local-Answer"))
        except (TypeError, ValueError) as error:
            return error_answer(400, str(error))

    async def _respond(self, connection: Connection, request: Request, answer: Answer) -> bool:
        # The gate of now: a release that comes before the stall itself is then not missed.
        gate, content = self._gate, self._memory.content_of(answer, request)
        if request.version == "HTTP/1.0":
            answer = _close(answer._replace(framing=_WITHOUT_CHUNKS.get(answer.framing, answer.framing)))
        self.billed += request.method == "POST" and content.status == 200 and content.new and not answer.drop
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
            await connection.send(body.piece(body.comment))


def _key_of(request: Request) -> str | None:
    """The key that came with a request, in the header of any dialect."""
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    own = request.headers.get("x-api-key") or request.headers.get("x-goog-api-key")
    return own or (key if scheme == "Bearer" else None)


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
    if content.content_type.startswith((JSON, NDJSON)):
        body = body._replace(comment=b"\n")
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
            server.cancelled.clear()


def _recorded(file: Path | None) -> dict[str, Any]:
    """The fields of an answer that sends this file."""
    if file is None:
        return {}
    return {"body": file.read_bytes(), "content_type": NDJSON if file.suffix in (".jsonl", ".ndjson") else None}


if __name__ == "__main__":
    main()
