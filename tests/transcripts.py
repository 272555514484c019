"""Streams of the openai dialect, written by hand after what the services send, with what each must give

Each stands for a behaviour that some service has; the words are ours.
"""

import json
from decimal import Decimal
from typing import Any, NamedTuple, Optional, Tuple

from sheepsse import Usage


class Transcript(NamedTuple):
    name: str
    body: bytes
    text: str = ""
    reasoning: str = ""
    refusal: str = ""
    #: (id, name, arguments) of each
    tool_calls: Tuple[Tuple[str, str, str], ...] = ()
    finish_reason: Optional[str] = "stop"
    finish: Optional[str] = "stop"
    usage: Optional[Usage] = None
    #: the class of the error and words of its message, or None
    error: Optional[Tuple[str, str]] = None
    complete: bool = True
    #: the text of each choice, where there are several
    texts: Tuple[str, ...] = ()
    id: str = "c-1"
    model: str = "m-1"
    dialect: str = "openai"


DONE = "[DONE]"


def chunk(delta: Any = None, finish: Optional[str] = None, index: int = 0, **fields: Any) -> dict:
    """A chunk of one choice; ``fields`` are put beside the choices"""
    choice = {"index": index, "delta": {} if delta is None else delta, "finish_reason": finish}
    return {"id": "c-1", "object": "chat.completion.chunk", "model": "m-1", "choices": [choice], **fields}


def says(*words: str, **fields: Any) -> list:
    return [chunk({"content": word}, **fields) for word in words]


def sse(*payloads: Any, end: str = "\n", space: str = " ", between: str = "") -> bytes:
    """An event stream of payloads: a str goes out as it is, bytes without framing, the rest as JSON"""
    out = []
    for payload in payloads:
        if isinstance(payload, bytes):
            out.append(payload)
            continue
        data = payload if isinstance(payload, str) else json.dumps(payload, ensure_ascii=False)
        out.append(f"{between}data:{space}{data}{end}{end}".encode())
    return b"".join(out)


ROLE = chunk({"role": "assistant", "content": ""})
STOP = chunk(finish="stop")
COUNTED = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}
USAGE = Usage(9, 4, 13)


def usage_chunk(**usage: Any) -> dict:
    return {"id": "c-1", "model": "m-1", "choices": [], "usage": {**COUNTED, **usage}}


def call(index: int, id: Optional[str] = None, name: Optional[str] = None, arguments: Optional[str] = None) -> dict:
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    part = {"index": index, "type": "function", "function": function}
    return part if id is None else {**part, "id": id}


def calls(*parts: dict, finish: Optional[str] = None) -> dict:
    return chunk({"tool_calls": list(parts)}, finish)


TRANSCRIPTS = [
    Transcript("plain text and [DONE]", sse(ROLE, *says("Good", " day"), STOP, DONE), "Good day"),
    Transcript(
        "usage in a chunk of its own without choices",
        sse(ROLE, *says("Good", " day"), STOP, usage_chunk(), DONE),
        "Good day",
        usage=USAGE,
    ),
    Transcript(
        "usage on the chunk that finishes (DeepSeek, Mistral)",
        sse(ROLE, *says("Good"), chunk({"content": " day"}, "stop", usage=COUNTED), DONE),
        "Good day",
        usage=USAGE,
    ),
    Transcript(
        "usage on every chunk, cumulative (Perplexity): the last counts, never the sum",
        sse(
            *says("Good", usage={**COUNTED, "completion_tokens": 1}), chunk({"content": " day"}, "stop", usage=COUNTED)
        ),
        "Good day",
        usage=USAGE,
    ),
    Transcript(
        "a chunk after the usage, with usage null (moderation)",
        sse(*says("Good day"), STOP, usage_chunk(), {"choices": [], "usage": None, "moderation": {}}, DONE),
        "Good day",
        usage=USAGE,
    ),
    Transcript(
        "usage under x_groq (Groq)",
        sse(*says("Good day"), {**STOP, "x_groq": {"usage": COUNTED}}, DONE),
        "Good day",
        usage=USAGE,
    ),
    Transcript(
        "usage inside the choice (Moonshot)",
        sse(
            *says("Good day"),
            {"id": "c-1", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "usage": COUNTED}]},
            DONE,
        ),
        "Good day",
        usage=USAGE,
    ),
    Transcript(
        "usage with details and a cost (OpenRouter)",
        sse(
            *says("Good day"),
            STOP,
            usage_chunk(
                cost=0.000837,
                prompt_tokens_details={"cached_tokens": 3, "cache_write_tokens": 2},
                completion_tokens_details={"reasoning_tokens": 1},
            ),
            DONE,
        ),
        "Good day",
        usage=Usage(9, 4, 13, 3, 2, 1, Decimal("0.000837")),
    ),
    Transcript(
        "cached tokens in DeepSeek's words, no total",
        sse(
            *says("Good day"),
            STOP,
            {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4, "prompt_cache_hit_tokens": 8}},
            DONE,
        ),
        "Good day",
        usage=Usage(9, 4, 13, 8),
    ),
    Transcript(
        "cached tokens beside the others (Together)",
        sse(*says("Good day"), STOP, usage_chunk(cached_tokens=5), DONE),
        "Good day",
        usage=Usage(9, 4, 13, 5),
    ),
    Transcript(
        "comments before, between and inside events (OpenRouter, DeepSeek)",
        sse(b": PROCESSING\n\n", ROLE, b": keep-alive\n\n", *says("Good day"), STOP, DONE, between=": keep-alive\n"),
        "Good day",
    ),
    Transcript("CRLF line ends (Perplexity)", sse(ROLE, *says("Good day"), STOP, DONE, end="\r\n"), "Good day"),
    Transcript(
        "a byte order mark, CR line ends, no space after the colon",
        b"\xef\xbb\xbf" + sse(ROLE, *says("Good day"), STOP, DONE, end="\r", space=""),
        "Good day",
    ),
    Transcript(
        "characters that other splitters take for line ends",
        sse(*says("Chào 🌤️", " một\u2028hai\x85ba\x0b\x0c\x1c."), STOP, DONE),
        "Chào 🌤️ một\u2028hai\x85ba\x0b\x0c\x1c.",
    ),
    Transcript(
        "a first chunk without choices, id and model (Azure), then padding",
        sse(
            {"id": "", "model": "", "choices": [], "prompt_filter_results": [{"prompt_index": 0}]},
            *says("Good day", obfuscation="xyz", p="abc"),
            STOP,
            DONE,
        ),
        "Good day",
    ),
    Transcript(
        "null where an object or text may be: choices, delta, content, message",
        sse(
            {"id": "c-1", "model": "m-1", "choices": None},
            {"id": "c-1", "choices": [{"index": 0, "delta": None, "finish_reason": None}]},
            {"id": "c-1", "choices": [None, 5, {"delta": {"content": None, "tool_calls": None}}]},
            *says("Good day"),
            {"choices": [{"index": 0, "message": None, "finish_reason": "stop"}]},
            DONE,
        ),
        "Good day",
    ),
    Transcript(
        "types that nothing in an answer has",
        sse(
            {"id": 7, "model": [], "choices": [{"index": "0", "delta": {"content": 5, "tool_calls": [4, {}]}}]},
            {"choices": {"0": {}}, "usage": [1]},
            *says("Good day"),
            {**STOP, "usage": {"prompt_tokens": "9", "completion_tokens": True, "cost": "much"}},
            DONE,
        ),
        "Good day",
    ),
    Transcript(
        "text on the chunk that finishes", sse(*says("Good"), chunk({"content": " day"}, "stop"), DONE), "Good day"
    ),
    Transcript(
        "a finish reason that is repeated, and then null",
        sse(*says("Good day"), chunk(finish="length"), chunk(finish="length"), chunk(), DONE),
        "Good day",
        finish_reason="length",
        finish="length",
    ),
    Transcript(
        "a snapshot of the whole message at the end",
        sse(
            *says("Good", " day"),
            {"choices": [{"index": 0, "message": {"content": "Good day"}, "finish_reason": "stop"}]},
            DONE,
        ),
        "Good day",
    ),
    Transcript(
        "no finish reason at all, but [DONE] (Snowflake)",
        sse(*says("Good day"), usage_chunk(), DONE),
        "Good day",
        finish_reason=None,
        finish=None,
        usage=USAGE,
    ),
    Transcript("a finish reason, but no [DONE]", sse(ROLE, *says("Good day"), STOP), "Good day"),
    Transcript(
        "[DONE] without a blank line after it",
        sse(*says("Good day")) + b"data: [DONE]",
        "Good day",
        finish_reason=None,
        finish=None,
    ),
    Transcript("nothing after [DONE] counts", sse(*says("Good day"), STOP, DONE, *says("!"), "junk"), "Good day"),
    Transcript(
        "events of other names, and empty data",
        sse(
            b"event: ping\ndata: hello\n\n",
            b"event: ping\ndata: [1]\n\n",
            b"data:\n\n",
            b"data: null\n\n",
            b"id: 7\n\n",
            *says("Good day"),
            STOP,
            DONE,
        ),
        "Good day",
    ),
    Transcript(
        "reasoning_content (DeepSeek)",
        sse(*[chunk({"content": None, "reasoning_content": word}) for word in ("Hm", "m.")], *says("Yes"), STOP, DONE),
        "Yes",
        "Hmm.",
    ),
    Transcript(
        "reasoning, and the same again in reasoning_details (OpenRouter)",
        sse(
            chunk({"reasoning": "Hmm.", "reasoning_details": [{"type": "reasoning.text", "text": "Hmm."}]}),
            *says("Yes"),
            STOP,
            DONE,
        ),
        "Yes",
        "Hmm.",
    ),
    Transcript(
        "reasoning in reasoning_details alone, as text and as summary",
        sse(
            chunk({"reasoning_details": [{"type": "reasoning.text", "text": "Hm"}, {"summary": "m."}, 5]}),
            *says("Yes"),
            STOP,
            DONE,
        ),
        "Yes",
        "Hmm.",
    ),
    Transcript(
        "content as a list of parts, thinking among them (Mistral)",
        sse(
            chunk({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Hmm."}]}]}),
            chunk({"content": [{"type": "thinking", "thinking": []}, {"type": "text", "text": "Y"}]}),
            chunk({"content": "es"}, "stop"),
            DONE,
        ),
        "Yes",
        "Hmm.",
    ),
    Transcript(
        "a refusal in its own field",
        sse(chunk({"refusal": ""}), chunk({"refusal": "I will"}), chunk({"refusal": " not."}), STOP, DONE),
        refusal="I will not.",
    ),
    Transcript(
        "a content filter",
        sse(*says("Good"), chunk(finish="content_filter"), DONE),
        "Good",
        finish_reason="content_filter",
        finish="refusal",
    ),
    Transcript(
        "a finish reason that nobody knows",
        sse(*says("Good"), chunk(finish="tired"), DONE),
        "Good",
        finish_reason="tired",
        finish="other",
    ),
    Transcript(
        "tool calls in parts, two at a time",
        sse(
            calls(call(0, "call-a", "look", "")),
            calls(call(0, arguments='{"at":')),
            calls(call(1, "call-b", "hear", "{}"), call(0, arguments=' "sea"}')),
            calls(finish="tool_calls"),
            DONE,
        ),
        tool_calls=(("call-a", "look", '{"at": "sea"}'), ("call-b", "hear", "{}")),
        finish_reason="tool_calls",
        finish="tool_calls",
    ),
    Transcript(
        "a whole tool call in one delta, arguments as an object",
        sse(
            chunk(
                {"tool_calls": [{"id": "call-a", "function": {"name": "look", "arguments": {"at": 1}}}]}, "tool_calls"
            ),
            DONE,
        ),
        tool_calls=(("call-a", "look", '{"at": 1}'),),
        finish_reason="tool_calls",
        finish="tool_calls",
    ),
    Transcript(
        "later parts that repeat the id, or carry an empty one and an empty name (Qwen, Hunyuan)",
        sse(
            calls(call(0, "call-a", "look", "")),
            calls(call(0, "", "", '{"a"')),
            calls(call(0, "call-a", "", ": 1}")),
            calls(finish="tool_calls"),
            DONE,
        ),
        tool_calls=(("call-a", "look", '{"a": 1}'),),
        finish_reason="tool_calls",
        finish="tool_calls",
    ),
    Transcript(
        "calls that all have index 0 but ids of their own",
        sse(
            calls(call(0, "call-a", "look", "{}")),
            calls(call(0, "call-b", "hear", '{"b"')),
            calls(call(0, arguments=": 2}")),
            calls(finish="tool_calls"),
            DONE,
        ),
        tool_calls=(("call-a", "look", "{}"), ("call-b", "hear", '{"b": 2}')),
        finish_reason="tool_calls",
        finish="tool_calls",
    ),
    Transcript(
        "calls without index: by their place in the list",
        sse(
            chunk({"tool_calls": [{"id": "a", "function": {"name": "look"}}, {"id": "b", "function": None}]}),
            calls(finish="tool_calls"),
            DONE,
        ),
        tool_calls=(("a", "look", ""), ("b", "", "")),
        finish_reason="tool_calls",
        finish="tool_calls",
    ),
    Transcript(
        "function_call, as tool calls were before",
        sse(
            chunk({"function_call": {"name": "look", "arguments": ""}}),
            chunk({"function_call": {"arguments": "{}"}}),
            chunk(finish="function_call"),
            DONE,
        ),
        tool_calls=(("", "look", "{}"),),
        finish_reason="function_call",
        finish="tool_calls",
    ),
    Transcript(
        "three choices, mixed",
        sse(
            chunk({"content": "a"}, index=0),
            chunk({"content": "b"}, index=1),
            chunk({"content": "c"}, index=2),
            chunk({"content": "B"}, "stop", index=1),
            chunk({"content": "A"}, "stop", index=0),
            chunk({"content": "C"}, "length", index=2),
            usage_chunk(),
            DONE,
        ),
        "aA",
        usage=USAGE,
        texts=("aA", "bB", "cC"),
    ),
    Transcript(
        "two choices, of which one is cut off",
        sse(
            ROLE,
            chunk({"content": "a"}, index=0),
            chunk({"content": "b"}, index=1),
            chunk({"content": "A"}, "stop", index=0),
        ),
        "aA",
        error=("StreamInterrupted", "end marker"),
        complete=False,
    ),
    Transcript(
        "an end without a marker",
        sse(ROLE, *says("Good", " day")),
        "Good day",
        finish_reason=None,
        finish=None,
        error=("StreamInterrupted", "end marker"),
        complete=False,
    ),
    Transcript(
        "a prefix of [DONE]",
        sse(*says("Good day")) + b"data: [DON",
        "Good day",
        finish_reason=None,
        finish=None,
        error=("StreamInterrupted", "end marker"),
        complete=False,
    ),
    Transcript(
        "a cut inside an emoji: no replacement character",
        sse(*says("Good"), *says(" day 🐑"))[:-50],
        "Good",
        finish_reason=None,
        finish=None,
        error=("StreamInterrupted", "end marker"),
        complete=False,
    ),
    Transcript(
        "an error object in the stream",
        sse(*says("Good"), {"error": {"message": "We broke", "type": "server_error", "code": None}}),
        "Good",
        finish_reason=None,
        finish=None,
        error=("StreamError", "We broke"),
        complete=False,
    ),
    Transcript(
        "an error event of its own name (Groq)",
        sse(*says("Good"), b'event: error\ndata: {"error": {"message": "Bad tool", "code": "tool_use_failed"}}\n\n'),
        "Good",
        finish_reason=None,
        finish=None,
        error=("StreamError", "Bad tool"),
        complete=False,
    ),
    Transcript(
        "an error beside choices and usage on one chunk, after a finish reason (OpenRouter)",
        sse(
            *says("Good"),
            chunk(finish="length"),
            chunk({"content": ""}, usage=COUNTED, error={"code": 400, "message": "Too long"}),
            DONE,
        ),
        "Good",
        finish_reason="length",
        finish="length",
        usage=USAGE,
        error=("StreamError", "Too long"),
        complete=False,
    ),
    Transcript(
        "an error object without error key (old vLLM)",
        sse(
            *says("Good"), {"object": "error", "message": "Internal", "type": "InternalServerError", "code": 500}, DONE
        ),
        "Good",
        finish_reason=None,
        finish=None,
        error=("StreamError", "Internal"),
        complete=False,
    ),
    Transcript(
        "an error that is plain text",
        sse(*says("Good"), {"error": "out of memory"}),
        "Good",
        finish_reason=None,
        finish=None,
        error=("StreamError", "out of memory"),
        complete=False,
    ),
    Transcript(
        "a server that gives up for lack of resources (DeepSeek)",
        sse(*says("Good"), chunk(finish="insufficient_system_resource"), DONE),
        "Good",
        finish_reason="insufficient_system_resource",
        finish="other",
        error=("StreamInterrupted", "insufficient_system_resource"),
        complete=False,
    ),
    Transcript(
        "data that is no JSON",
        sse(*says("Good"), '{"choices": [', *says(" day"), STOP, DONE),
        "Good",
        finish_reason=None,
        finish=None,
        error=("InvalidStreamError", "expected JSON"),
        complete=False,
    ),
    Transcript(
        "data that is no JSON object",
        sse(*says("Good"), "[1, 2]", *says(" day"), STOP, DONE),
        "Good",
        finish_reason=None,
        finish=None,
        error=("InvalidStreamError", "expected a JSON object"),
        complete=False,
    ),
    Transcript(
        "one JSON completion instead of a stream",
        json.dumps(
            {
                "id": "c-1",
                "model": "m-1",
                "object": "chat.completion",
                "choices": [
                    {"index": 0, "message": {"role": "assistant", "content": "Good day"}, "finish_reason": "stop"}
                ],
                "usage": COUNTED,
            },
            indent=2,
        ).encode(),
        "Good day",
        usage=USAGE,
    ),
]
