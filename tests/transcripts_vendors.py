"""Streams of the other dialects, written by hand after what the services send, with what each must give

Each stands for a behaviour that some service has; the words are ours.
"""

import json
from decimal import Decimal
from typing import Any, Optional

from sheepsse import Usage
from transcripts import DONE, Transcript, sse


def media_type(transcript: Transcript) -> str:
    """The Content-Type that the service itself would send this with"""
    if transcript.dialect == "ollama":
        return "application/x-ndjson"
    return "application/json" if transcript.body[:1] in (b"{", b"[") else "text/event-stream"


def named(*payloads: Any, padding: str = "") -> bytes:
    """An event stream in which each event has the name that its payload has as type"""
    events = []
    for payload in payloads:
        if isinstance(payload, bytes):
            events.append(payload)
        else:
            data = json.dumps(payload, ensure_ascii=False)
            events.append(f"event: {payload['type']}\ndata: {data[:-1]}{padding}{'}'}\n\n".encode())
    return b"".join(events)


CUT = {
    "finish_reason": None,
    "finish": None,
    "error": ("StreamInterrupted", "end marker"),
    "complete": False,
}


# Anthropic


def message_start(id: str = "c-1", usage: Any = None) -> dict:
    counted = {"input_tokens": 9, "output_tokens": 1} if usage is None else usage
    message = {"id": id, "type": "message", "role": "assistant", "model": "m-1", "content": [], "usage": counted}
    return {"type": "message_start", "message": message}


def block(index: int, begun: dict, *deltas: dict) -> list:
    """A content block from its start to its stop"""
    return [
        {"type": "content_block_start", "index": index, "content_block": begun},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


def text_block(index: int, *words: str) -> list:
    return block(index, {"type": "text", "text": ""}, *({"type": "text_delta", "text": word} for word in words))


def thinking_block(index: int, *words: str, signature: str = "c2ln") -> list:
    deltas = [{"type": "thinking_delta", "thinking": word} for word in words]
    begun = {"type": "thinking", "thinking": "", "signature": ""}
    return block(index, begun, *deltas, {"type": "signature_delta", "signature": signature})


def tool_block(index: int, id: str, name: str, *fragments: str) -> list:
    deltas = [{"type": "input_json_delta", "partial_json": fragment} for fragment in fragments]
    return block(index, {"type": "tool_use", "id": id, "name": name, "input": {}}, *deltas)


def message_end(reason: str = "end_turn", **usage: Any) -> list:
    delta = {"stop_reason": reason, "stop_sequence": None}
    return [
        {"type": "message_delta", "delta": delta, "usage": {"output_tokens": 4, **usage}},
        {"type": "message_stop"},
    ]


PING = {"type": "ping"}
COUNTED = Usage(9, 4, 13)
BEGUN = Usage(9, 1, 10)


def anthropic(name: str, body: bytes, text: str = "", **fields: Any) -> Transcript:
    usual = {"finish_reason": "end_turn", "usage": COUNTED, "dialect": "anthropic"}
    return Transcript(name, body, text, **{**usual, **fields})


ANTHROPIC = [
    anthropic(
        "text with pings, and padding before the brace that closes",
        named(message_start(), PING, *text_block(0, "Good", " day 🐑"), PING, *message_end(), padding="    "),
        "Good day 🐑",
    ),
    anthropic(
        "events that have no name but a type",
        sse(message_start(), *text_block(0, "Good", " day"), *message_end()),
        "Good day",
    ),
    anthropic(
        "text that is there as its block begins",
        named(
            message_start(),
            *block(0, {"type": "text", "text": "Good"}, {"type": "text_delta", "text": " day"}),
            *message_end(),
        ),
        "Good day",
    ),
    anthropic(
        "thinking with its signature",
        named(
            message_start(),
            *thinking_block(0, "Hm", "m."),
            *text_block(1, "Yes"),
            *message_end(output_tokens_details={"thinking_tokens": 2}),
        ),
        "Yes",
        reasoning="Hmm.",
        usage=Usage(9, 4, 13, reasoning_tokens=2),
    ),
    anthropic(
        "thinking that is redacted",
        named(
            message_start(),
            *block(0, {"type": "redacted_thinking", "data": "b3BhcXVl"}),
            *block(1, {"type": "redacted_thinking", "data": "bW9yZQ=="}),
            *text_block(2, "Yes"),
            *message_end(),
        ),
        "Yes",
    ),
    anthropic(
        "thinking of which only the signature is sent",
        named(message_start(), *thinking_block(0), *text_block(1, "Yes"), *message_end()),
        "Yes",
    ),
    anthropic(
        "a tool call in fragments",
        named(message_start(), *tool_block(0, "t-1", "look", "", '{"at":', ' "sea"}'), *message_end("tool_use")),
        tool_calls=(("t-1", "look", '{"at": "sea"}'),),
        finish_reason="tool_use",
        finish="tool_calls",
    ),
    anthropic(
        "a tool call without arguments",
        named(message_start(), *tool_block(0, "t-1", "look", ""), *message_end("tool_use")),
        tool_calls=(("t-1", "look", ""),),
        finish_reason="tool_use",
        finish="tool_calls",
    ),
    anthropic(
        "two tool calls after text, counted from nought",
        named(
            message_start(),
            *text_block(0, "I look."),
            *tool_block(1, "t-1", "look", '{"at": 1}'),
            *tool_block(2, "t-2", "hear", '{"at"', ": 2}"),
            *message_end("tool_use"),
        ),
        "I look.",
        tool_calls=(("t-1", "look", '{"at": 1}'), ("t-2", "hear", '{"at": 2}')),
        finish_reason="tool_use",
        finish="tool_calls",
    ),
    anthropic(
        "tools of the server, their results and a compaction are neither text nor calls",
        named(
            message_start(),
            *block(0, {"type": "compaction", "content": None}, {"type": "compaction_delta", "content": "All said."}),
            *text_block(1, "I count."),
            *block(
                2,
                {"type": "server_tool_use", "id": "s-1", "name": "bash", "input": {}},
                {"type": "input_json_delta", "partial_json": '{"command": "wc"}'},
            ),
            *block(3, {"type": "bash_tool_result", "tool_use_id": "s-1", "content": {"stdout": "7"}}),
            *text_block(4, " It is 7."),
            *message_end(),
        ),
        "I count. It is 7.",
    ),
    anthropic(
        "citations beside the text",
        named(
            message_start(),
            *block(
                0,
                {"type": "text", "text": "", "citations": []},
                {"type": "citations_delta", "citation": {"cited_text": "Good day"}},
                {"type": "text_delta", "text": "Good day"},
            ),
            *message_end(),
        ),
        "Good day",
    ),
    anthropic(
        "the limit of tokens",
        named(message_start(), *text_block(0, "Good"), *message_end("max_tokens")),
        "Good",
        finish_reason="max_tokens",
        finish="length",
    ),
    anthropic(
        "the end of the context window",
        named(message_start(), *text_block(0, "Good"), *message_end("model_context_window_exceeded")),
        "Good",
        finish_reason="model_context_window_exceeded",
        finish="length",
    ),
    anthropic(
        "a stop sequence",
        named(message_start(), *text_block(0, "Good"), *message_end("stop_sequence")),
        "Good",
        finish_reason="stop_sequence",
    ),
    anthropic(
        "a turn that is paused",
        named(message_start(), *text_block(0, "Good"), *message_end("pause_turn")),
        "Good",
        finish_reason="pause_turn",
        finish="other",
        error=("StreamInterrupted", "the vendor paused the answer (pause_turn)"),
        complete=False,
    ),
    anthropic(
        "a refusal in the middle",
        named(message_start(), *text_block(0, "First you"), *message_end("refusal")),
        "First you",
        finish_reason="refusal",
        finish="refusal",
    ),
    anthropic(
        "a message that starts twice, with one id",
        named(message_start(), message_start(), *text_block(0, "Good day"), *message_end()),
        "Good day",
    ),
    anthropic(
        "a second message in the same stream (a proxy that asked again): the first is what came",
        named(message_start(), *text_block(0, "Good"), message_start("c-2"), *text_block(0, "Another"), *message_end()),
        "Good",
        usage=BEGUN,
        finish_reason=None,
        finish=None,
        error=("InvalidStreamError", "c-2"),
        complete=False,
    ),
    anthropic(
        "an overload in the middle",
        named(
            message_start(),
            *text_block(0, "Good")[:2],
            {"type": "error", "error": {"type": "overloaded_error", "message": "Too much to do"}, "request_id": "r-1"},
        ),
        "Good",
        usage=BEGUN,
        finish_reason=None,
        finish=None,
        error=("StreamError", "Too much to do"),
        complete=False,
    ),
    anthropic(
        "an end without message_stop", named(message_start(), *text_block(0, "Good")), "Good", usage=BEGUN, **CUT
    ),
    anthropic(
        "an end after the stop reason, before message_stop",
        named(message_start(), *text_block(0, "Good"), message_end()[0]),
        "Good",
        **{**CUT, "finish_reason": "end_turn", "finish": "stop"},
    ),
    anthropic(
        "a tool call cut in its arguments",
        named(message_start(), *tool_block(0, "t-1", "look", '{"at": "s')[:2]),
        tool_calls=(("t-1", "look", '{"at": "s'),),
        usage=BEGUN,
        **CUT,
    ),
    anthropic(
        "events, blocks and deltas that nobody knows",
        named(
            message_start(),
            {"type": "weather_report", "text": "Rain"},
            b"event: mood\ndata: not JSON\n\n",
            *block(0, {"type": "hologram", "text": "?"}, {"type": "hologram_delta", "text": "?"}),
            *block(
                1,
                {"type": "text", "text": ""},
                {"type": "smell_delta", "smell": "hay"},
                {"type": "text_delta", "text": "Good day"},
            ),
            *message_end(),
        ),
        "Good day",
    ),
    anthropic(
        "usage that the end adds to, where it is not null",
        named(
            message_start(
                usage={
                    "input_tokens": 9,
                    "cache_creation_input_tokens": 20,
                    "cache_read_input_tokens": 300,
                    "output_tokens": 1,
                    "service_tier": "standard",
                }
            ),
            *text_block(0, "Good day"),
            *message_end(input_tokens=None, cache_creation_input_tokens=None, cache_read_input_tokens=301),
        ),
        "Good day",
        usage=Usage(330, 4, 334, 301, 20),
    ),
]


# Gemini


def said(*parts: Any, finish: Optional[str] = None, index: int = 0, **fields: Any) -> dict:
    """A chunk of one candidate; a str is a part of text, ``fields`` are put beside the candidates"""
    content = {"role": "model", "parts": [{"text": part} if isinstance(part, str) else part for part in parts]}
    candidate = {"content": content, "index": index, **({"finishReason": finish} if finish else {})}
    return {"candidates": [candidate], "modelVersion": "m-1", "responseId": "c-1", **fields}


def tokens(**counts: int) -> dict:
    total = 13 + counts.get("thoughtsTokenCount", 0)
    return {"usageMetadata": {"promptTokenCount": 9, "candidatesTokenCount": 4, "totalTokenCount": total, **counts}}


def called(name: str, args: Any, id: Optional[str] = None, **fields: Any) -> dict:
    return {"functionCall": {"name": name, "args": args, **({} if id is None else {"id": id})}, **fields}


def crlf(*payloads: Any) -> bytes:
    return sse(*payloads, end="\r\n")


def array(*payloads: dict) -> bytes:
    """The chunks as the one JSON array that Gemini sends without alt=sse"""
    pretty = [json.dumps(payload, indent=2, ensure_ascii=False) for payload in payloads]
    return ("[" + "\n,\r\n".join(pretty) + "\n]").encode()


def gemini(name: str, body: bytes, text: str = "", **fields: Any) -> Transcript:
    return Transcript(name, body, text, **{"finish_reason": "STOP", "dialect": "gemini", **fields})


SPOKEN = (said("Good", **tokens(candidatesTokenCount=1)), said(" day 🐑", finish="STOP", **tokens()))

GEMINI = [
    gemini("text, with CRLF; the last usage counts", crlf(*SPOKEN), "Good day 🐑", usage=COUNTED),
    gemini("one JSON array, in pieces", array(*SPOKEN), "Good day 🐑", usage=COUNTED),
    gemini("one JSON array, all on one line", json.dumps(SPOKEN).encode(), "Good day 🐑", usage=COUNTED),
    gemini(
        "thoughts before the text, which the count of candidates leaves out",
        crlf(
            said({"text": "Hm", "thought": True}),
            said({"text": "m.", "thought": True}),
            said({"text": "Yes", "thoughtSignature": "c2ln"}, finish="STOP", **tokens(thoughtsTokenCount=7)),
        ),
        "Yes",
        reasoning="Hmm.",
        usage=Usage(9, 11, 20, reasoning_tokens=7),
    ),
    gemini(
        "thoughts and text as parts of one chunk",
        crlf(said({"text": "Hmm.", "thought": True}, "Yes", finish="STOP")),
        "Yes",
        reasoning="Hmm.",
    ),
    gemini(
        "a call without id, signed",
        crlf(said(called("look", {"at": "Hà Nội"}, thoughtSignature="c2ln")), said("", finish="STOP")),
        tool_calls=(("", "look", '{"at": "Hà Nội"}'),),
        finish="tool_calls",
    ),
    gemini(
        "a call with an id and without arguments",
        crlf(said({"functionCall": {"id": "g-1", "name": "look"}}, finish="STOP")),
        tool_calls=(("g-1", "look", "{}"),),
        finish="tool_calls",
    ),
    gemini(
        "two calls after text, in two chunks",
        crlf(said("I look."), said(called("look", {"at": 1})), said(called("hear", {"at": 2}), finish="STOP")),
        "I look.",
        tool_calls=(("", "look", '{"at": 1}'), ("", "hear", '{"at": 2}')),
        finish="tool_calls",
    ),
    gemini(
        "two calls in one chunk of an array",
        array(said(called("look", {"at": 1}), called("look", {"at": 2}), finish="STOP", **tokens())),
        tool_calls=(("", "look", '{"at": 1}'), ("", "look", '{"at": 2}')),
        finish="tool_calls",
        usage=COUNTED,
    ),
    gemini(
        "the limit of tokens",
        crlf(said("Good", finish="MAX_TOKENS")),
        "Good",
        finish_reason="MAX_TOKENS",
        finish="length",
    ),
    *(
        gemini(
            f"an end for {reason}", crlf(said("Good"), said(finish=reason)), "Good", finish_reason=reason, finish=finish
        )
        for reason, finish in (
            ("SAFETY", "refusal"),
            ("RECITATION", "refusal"),
            ("IMAGE_SAFETY", "refusal"),
            ("SPII", "refusal"),
            ("BLOCKLIST", "refusal"),
            ("PROHIBITED_CONTENT", "refusal"),
            ("MALFORMED_FUNCTION_CALL", "other"),
            ("OTHER", "other"),
        )
    ),
    gemini(
        "a candidate that ends without content",
        crlf({"candidates": [{"finishReason": "SAFETY", "index": 0}], "responseId": "c-1", "modelVersion": "m-1"}),
        finish_reason="SAFETY",
        finish="refusal",
    ),
    gemini(
        "a prompt that is blocked",
        crlf(
            {
                "promptFeedback": {"blockReason": "SAFETY"},
                "usageMetadata": {"promptTokenCount": 9, "totalTokenCount": 9},
                "modelVersion": "m-1",
            }
        ),
        finish_reason="SAFETY",
        finish="refusal",
        usage=Usage(9, 0, 9),
        id="",
    ),
    gemini(
        "an error in the middle, as data",
        crlf(said("Good"), {"error": {"code": 503, "message": "Too much to do", "status": "UNAVAILABLE"}}),
        "Good",
        finish_reason=None,
        finish=None,
        error=("StreamError", "Too much to do"),
        complete=False,
    ),
    gemini(
        "an error in an array",
        array(said("Good"), {"error": {"code": 503, "message": "Too much to do", "status": "UNAVAILABLE"}}),
        "Good",
        finish_reason=None,
        finish=None,
        error=("StreamError", "Too much to do"),
        complete=False,
    ),
    gemini(
        "searches, code and its result are neither text nor calls",
        crlf(
            said(
                "I count. ",
                {"executableCode": {"language": "PYTHON", "code": "print(7)"}},
                {"codeExecutionResult": {"outcome": "OUTCOME_OK", "output": "7\n"}},
                "It is 7.",
            ),
            {
                "candidates": [{"finishReason": "STOP", "groundingMetadata": {"webSearchQueries": ["count"]}}],
                "modelVersion": "m-1",
                "responseId": "c-1",
            },
        ),
        "I count. It is 7.",
    ),
    gemini(
        "parts that nobody knows",
        crlf(said({"hologram": {"text": "?"}}, "Good day"), said({"inlineData": {"data": "AA=="}}, finish="STOP")),
        "Good day",
    ),
    gemini(
        "two candidates, mixed",
        crlf(
            said("a"),
            said("b", index=1),
            said("B", finish="MAX_TOKENS", index=1),
            said("A", finish="STOP", **tokens()),
        ),
        "aA",
        texts=("aA", "bB"),
        usage=COUNTED,
    ),
    gemini("an end without a reason", crlf(SPOKEN[0]), "Good", usage=Usage(9, 1, 13), **CUT),
    gemini(
        "usage with tools and a cache",
        crlf(
            said(
                "Good day",
                finish="STOP",
                **tokens(toolUsePromptTokenCount=100, cachedContentTokenCount=5, totalTokenCount=113),
            )
        ),
        "Good day",
        usage=Usage(109, 4, 113, 5),
    ),
    gemini("usage after the reason", crlf(said("Good day", finish="STOP"), tokens()), "Good day", usage=COUNTED),
]

#: what only an answer's decoder finds, not one of plain event streams
GEMINI_BARE = [
    gemini(
        "an error in the middle, as bare JSON",
        crlf(said("Good")) + b'{\n  "error": {"code": 503, "message": "Too much to do", "status": "UNAVAILABLE"}\n}\n',
        "Good",
        finish_reason=None,
        finish=None,
        error=("StreamError", "Too much to do"),
        complete=False,
    ),
    gemini(
        "an array cut inside an element",
        array(*SPOKEN)[:-40],
        "Good",
        usage=Usage(9, 1, 13),
        **{**CUT, "error": ("StreamInterrupted", "ended")},
    ),
]


# OpenAI Responses


def numbered(*payloads: Any, start: int = 0, end: bytes = b"") -> bytes:
    """An event stream in which each event has the next number"""
    return named(*({**payload, "sequence_number": start + at} for at, payload in enumerate(payloads))) + end


def response(kind: str, **fields: Any) -> dict:
    status = kind if kind in ("completed", "incomplete", "failed") else "in_progress"
    whole = {"id": "c-1", "object": "response", "status": status, "model": "m-1", "output": [], **fields}
    return {"type": f"response.{kind}", "response": whole}


def item(kind: str, index: int = 0, **fields: Any) -> dict:
    """An output item as it is added or done"""
    return {"type": f"response.output_item.{kind}", "output_index": index, "item": fields}


def delta(kind: str, piece: str, index: int = 0, **fields: Any) -> dict:
    return {"type": f"response.{kind}.delta", "output_index": index, "item_id": f"i-{index}", "delta": piece, **fields}


def spoken(*words: str, index: int = 0) -> list:
    text = "".join(words)
    part = {"type": "output_text", "text": text, "annotations": []}
    return [
        item("added", index, id=f"i-{index}", type="message", role="assistant", content=[]),
        {
            "type": "response.content_part.added",
            "output_index": index,
            "content_index": 0,
            "part": {**part, "text": ""},
        },
        *(delta("output_text", word, index, content_index=0) for word in words),
        {"type": "response.output_text.done", "output_index": index, "content_index": 0, "text": text},
        {"type": "response.content_part.done", "output_index": index, "content_index": 0, "part": part},
        item("done", index, id=f"i-{index}", type="message", role="assistant", content=[part]),
    ]


def tool_added(index: int, id: str, name: str) -> dict:
    return item("added", index, id=f"i-{index}", type="function_call", call_id=id, name=name, arguments="")


def tool_done(index: int, id: str, name: str, arguments: str) -> list:
    return [
        {"type": "response.function_call_arguments.done", "output_index": index, "arguments": arguments},
        item("done", index, id=f"i-{index}", type="function_call", call_id=id, name=name, arguments=arguments),
    ]


def arguments(index: int, piece: str) -> dict:
    return delta("function_call_arguments", piece, index)


WIRE_USAGE = {
    "input_tokens": 9,
    "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 2},
    "output_tokens": 4,
    "output_tokens_details": {"reasoning_tokens": 1},
    "total_tokens": 13,
}
OPENING = (response("created"), response("in_progress"))
COMPLETED = response("completed", usage=WIRE_USAGE)
TOLD = Usage(9, 4, 13, 3, 2, 1)


def responses(name: str, body: bytes, text: str = "", **fields: Any) -> Transcript:
    usual = {"finish_reason": "completed", "usage": TOLD, "dialect": "openai-responses"}
    return Transcript(name, body, text, **{**usual, **fields})


FAILED = {"finish_reason": "failed", "finish": "other", "usage": None, "complete": False}

RESPONSES = [
    responses(
        "text, with all that says it again", numbered(*OPENING, *spoken("Good", " day 🐑"), COMPLETED), "Good day 🐑"
    ),
    responses(
        "[DONE] at the end, and comments (OpenRouter)",
        b": PROCESSING\n\n" + numbered(*OPENING, *spoken("Good", " day"), COMPLETED, end=sse(DONE)),
        "Good day",
    ),
    responses(
        "a cost (OpenRouter)",
        numbered(*OPENING, *spoken("Good day"), response("completed", usage={**WIRE_USAGE, "cost": 0.0000086})),
        "Good day",
        usage=TOLD._replace(cost=Decimal("0.0000086")),
    ),
    responses(
        "an event that is repeated at once, with other padding",
        named(
            *({**payload, "sequence_number": at} for at, payload in enumerate(OPENING)),
            {**delta("output_text", "Good day"), "sequence_number": 2, "obfuscation": "ab"},
            {**delta("output_text", "Good day"), "sequence_number": 2, "obfuscation": "cde"},
            {**COMPLETED, "sequence_number": 3},
        ),
        "Good day",
    ),
    responses(
        "one number for all events, of a server that does not count",
        named(*({**payload, "sequence_number": 0} for payload in (*OPENING, *spoken("Good", " day"), COMPLETED))),
        "Good day",
    ),
    responses("no usage", numbered(*OPENING, *spoken("Good day"), response("completed")), "Good day", usage=None),
    responses(
        "a summary of the reasoning, in two parts",
        numbered(
            *OPENING,
            item("added", id="i-0", type="reasoning", summary=[]),
            delta("reasoning_summary_text", "Hm", summary_index=0),
            delta("reasoning_summary_text", "m.", summary_index=0),
            {"type": "response.reasoning_summary_text.done", "output_index": 0, "summary_index": 0, "text": "Hmm."},
            delta("reasoning_summary_text", "Well.", summary_index=1),
            item("done", id="i-0", type="reasoning", summary=[{"type": "summary_text", "text": "Hmm."}]),
            *spoken("Yes", index=1),
            COMPLETED,
        ),
        "Yes",
        reasoning="Hmm.\n\nWell.",
    ),
    responses(
        "the reasoning itself (DeepSeek)",
        numbered(
            *OPENING,
            item("added", id="i-0", type="reasoning", summary=[]),
            delta("reasoning_text", "Hm", content_index=0),
            delta("reasoning_text", "m.", content_index=0),
            {"type": "response.reasoning_text.done", "output_index": 0, "content_index": 0, "text": "Hmm."},
            *spoken("Yes", index=1),
            COMPLETED,
        ),
        "Yes",
        reasoning="Hmm.",
    ),
    responses(
        "a refusal",
        numbered(
            *OPENING,
            delta("refusal", "I will", content_index=0),
            delta("refusal", " not.", content_index=0),
            {"type": "response.refusal.done", "output_index": 0, "content_index": 0, "refusal": "I will not."},
            COMPLETED,
        ),
        refusal="I will not.",
    ),
    responses(
        "a tool call",
        numbered(
            *OPENING,
            tool_added(0, "call-a", "look"),
            arguments(0, '{"at":'),
            arguments(0, ' "sea"}'),
            *tool_done(0, "call-a", "look", '{"at": "sea"}'),
            COMPLETED,
        ),
        tool_calls=(("call-a", "look", '{"at": "sea"}'),),
        finish="tool_calls",
    ),
    responses(
        "two tool calls at once, after text",
        numbered(
            *OPENING,
            *spoken("I look."),
            tool_added(1, "call-a", "look"),
            tool_added(2, "call-b", "hear"),
            arguments(1, '{"at":'),
            arguments(2, '{"in'),
            arguments(1, " 1}"),
            *tool_done(1, "call-a", "look", '{"at": 1}'),
            arguments(2, '": 2}'),
            *tool_done(2, "call-b", "hear", '{"in": 2}'),
            COMPLETED,
        ),
        "I look.",
        tool_calls=(("call-a", "look", '{"at": 1}'), ("call-b", "hear", '{"in": 2}')),
        finish="tool_calls",
    ),
    responses(
        "a tool call that is only there when it is done",
        numbered(*OPENING, tool_done(0, "call-a", "look", '{"at": 1}')[1], COMPLETED),
        tool_calls=(("call-a", "look", '{"at": 1}'),),
        finish="tool_calls",
    ),
    responses(
        "tools of the server are no calls",
        numbered(
            *OPENING,
            item("added", id="i-0", type="web_search_call", status="in_progress"),
            {"type": "response.web_search_call.searching", "output_index": 0, "item_id": "i-0"},
            item("done", id="i-0", type="web_search_call", status="completed"),
            *spoken("Good day", index=1),
            COMPLETED,
        ),
        "Good day",
    ),
    *(
        responses(
            f"an answer that is incomplete for {reason}",
            numbered(
                *OPENING,
                *spoken("Good"),
                response("incomplete", incomplete_details={"reason": reason}, usage=WIRE_USAGE),
            ),
            "Good",
            finish_reason="incomplete",
            finish=finish,
        )
        for reason, finish in (("max_output_tokens", "length"), ("content_filter", "refusal"), ("tired", "other"))
    ),
    responses(
        "an error, and then that the response failed",
        numbered(
            *OPENING,
            delta("output_text", "Good"),
            {
                "type": "error",
                "error": {"type": "insufficient_quota", "code": "insufficient_quota", "message": "Spent"},
            },
            response("failed", error={"code": "insufficient_quota", "message": "Spent"}),
        ),
        "Good",
        error=("StreamError", "Spent"),
        **FAILED,
    ),
    responses(
        "a flat error",
        numbered(*OPENING, {"type": "error", "code": "server_error", "message": "We broke", "param": None}),
        error=("StreamError", "We broke"),
        **FAILED,
    ),
    responses(
        "a response that failed",
        numbered(
            *OPENING,
            delta("output_text", "Good"),
            response("failed", error={"code": "server_error", "message": "We broke"}),
        ),
        "Good",
        error=("StreamError", "We broke"),
        **FAILED,
    ),
    responses(
        "a number that jumps: what is between is lost",
        numbered(*OPENING, delta("output_text", "Good")) + numbered(delta("output_text", " day"), COMPLETED, start=4),
        "Good",
        finish_reason=None,
        finish=None,
        usage=None,
        error=("StreamInterrupted", "lost"),
        complete=False,
    ),
    responses(
        "events that come twice count once",
        numbered(*OPENING, delta("output_text", "Good"))
        + numbered(delta("output_text", "Good"), delta("output_text", " day"), start=2)
        + numbered(response("in_progress"), start=1)
        + numbered(COMPLETED, start=4),
        "Good day",
    ),
    responses(
        "no numbers", named(*OPENING, delta("output_text", "Good"), delta("output_text", " day"), COMPLETED), "Good day"
    ),
    responses(
        "a stream taken up in its middle, without its beginning",
        numbered(response("in_progress"), *spoken("Good", " day"), COMPLETED, start=7),
        "Good day",
    ),
    responses(
        "events that nobody knows",
        numbered(
            *OPENING,
            {"type": "response.hologram.delta", "delta": "?"},
            {"type": "keepalive"},
            delta("output_text", "Good day"),
            {"type": "response.output_text.annotation.added", "output_index": 0, "annotation": {}},
            COMPLETED,
        ),
        "Good day",
    ),
    responses(
        "an end without a terminal event",
        numbered(*OPENING, *spoken("Good day")),
        "Good day",
        usage=None,
        **CUT,
    ),
]


# Ollama


def lines(*payloads: dict) -> bytes:
    return b"".join(json.dumps(payload, ensure_ascii=False).encode() + b"\n" for payload in payloads)


def line(content: str = "", **message: Any) -> dict:
    said = {"role": "assistant", "content": content, **message}
    return {"model": "m-1", "created_at": "2026-01-02T03:04:05Z", "message": said, "done": False}


def last(reason: str = "stop", content: str = "", **counts: Any) -> dict:
    usual = {"total_duration": 7, "prompt_eval_count": 9, "eval_count": 4}
    return {**line(content), "done": True, "done_reason": reason, **usual, **counts}


def ollama_call(name: str, given: Any, **fields: Any) -> dict:
    return {"function": {"name": name, "arguments": given}, **fields}


def ollama(name: str, body: bytes, text: str = "", **fields: Any) -> Transcript:
    return Transcript(name, body, text, **{"usage": COUNTED, "id": "", "dialect": "ollama", **fields})


OLLAMA = [
    ollama("chat", lines(line("Good"), line(" day 🐑"), last()), "Good day 🐑"),
    ollama(
        "generate",
        lines(
            {"model": "m-1", "response": "Good", "done": False},
            {"model": "m-1", "response": " day", "done": False},
            {
                "model": "m-1",
                "response": "",
                "done": True,
                "done_reason": "stop",
                "context": [1, 2],
                "prompt_eval_count": 9,
                "eval_count": 4,
            },
        ),
        "Good day",
    ),
    ollama(
        "thinking",
        lines(line(thinking="Hm"), line(thinking="m."), line("Yes"), last()),
        "Yes",
        reasoning="Hmm.",
    ),
    ollama(
        "thinking of generate",
        lines(
            {"model": "m-1", "response": "", "thinking": "Hmm.", "done": False},
            {"model": "m-1", "response": "Yes", "done": False},
            {"model": "m-1", "response": "", "done": True, "done_reason": "stop", "eval_count": 4},
        ),
        "Yes",
        reasoning="Hmm.",
        usage=Usage(0, 4, 4),
    ),
    ollama(
        "tool calls without ids, one line for each",
        lines(
            line(tool_calls=[ollama_call("look", {"at": "Hà Nội"})]),
            line(tool_calls=[ollama_call("look", {"at": "sea"})]),
            last(),
        ),
        tool_calls=(("", "look", '{"at": "Hà Nội"}'), ("", "look", '{"at": "sea"}')),
        finish="tool_calls",
    ),
    ollama(
        "tool calls with ids, on one line",
        lines(line(tool_calls=[ollama_call("look", {"at": 1}, id="o-1"), ollama_call("hear", {}, id="o-2")]), last()),
        tool_calls=(("o-1", "look", '{"at": 1}'), ("o-2", "hear", "{}")),
        finish="tool_calls",
    ),
    ollama("text on the last line", lines(line("Good"), last(content=" day")), "Good day"),
    ollama("no newline at the end", lines(line("Good"), last(content=" day"))[:-1], "Good day"),
    ollama("CRLF and empty lines", lines(line("Good day"), last()).replace(b"\n", b"\r\n\r\n"), "Good day"),
    ollama(
        "an error on a line of its own",
        lines(line("Good"), {"error": "the model fell over"}),
        "Good",
        usage=None,
        finish_reason=None,
        finish=None,
        error=("StreamError", "the model fell over"),
        complete=False,
    ),
    ollama("an end without done", lines(line("Good"), line(" day")), "Good day", usage=None, **CUT),
    ollama("the limit of tokens", lines(line("Good"), last("length")), "Good", finish_reason="length", finish="length"),
    ollama("a model that is only loaded", lines(last("load")), finish_reason="load", finish="other", usage=COUNTED),
    ollama(
        "a prompt that was cached and is not counted",
        lines(line("Good day"), {name: value for name, value in last().items() if name != "prompt_eval_count"}),
        "Good day",
        usage=Usage(0, 4, 4),
    ),
    ollama(
        "no counts at all",
        lines(line("Good day"), {**line(), "done": True, "done_reason": "stop"}),
        "Good day",
        usage=None,
    ),
]

#: what only an answer's decoder calls a cut, not one of plain JSON lines
OLLAMA_CUT = [
    ollama(
        "a cut inside a line",
        lines(line("Good"), line(" day"))[:-30],
        "Good",
        usage=None,
        **{**CUT, "error": ("StreamInterrupted", "ended")},
    ),
]

#: those that the plain generators read as a Stream does
PLAIN = [*ANTHROPIC, *GEMINI, *RESPONSES, *OLLAMA]
VENDORS = [*PLAIN, *GEMINI_BARE, *OLLAMA_CUT]


# One JSON answer instead of a stream


def document(payload: dict) -> bytes:
    return json.dumps(payload, ensure_ascii=False).encode()


DOCUMENTS = [
    anthropic(
        "an Anthropic message",
        document(
            {
                "id": "c-1",
                "type": "message",
                "role": "assistant",
                "model": "m-1",
                "content": [
                    {"type": "thinking", "thinking": "Hmm.", "signature": "c2ln"},
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "t-1", "name": "look", "input": {"at": "Hà Nội"}},
                    {"type": "tool_use", "id": "t-2", "name": "hear", "input": {}},
                ],
                "stop_reason": "tool_use",
                "usage": {"input_tokens": 9, "output_tokens": 4, "cache_read_input_tokens": None},
            }
        ),
        "I look.",
        reasoning="Hmm.",
        tool_calls=(("t-1", "look", '{"at": "Hà Nội"}'), ("t-2", "hear", "")),
        finish_reason="tool_use",
        finish="tool_calls",
    ),
    gemini(
        "a Gemini response",
        document(
            said(
                {"text": "Hmm.", "thought": True},
                "I look.",
                called("look", {"at": "Hà Nội"}),
                finish="STOP",
                **tokens(thoughtsTokenCount=2),
            )
        ),
        "I look.",
        reasoning="Hmm.",
        tool_calls=(("", "look", '{"at": "Hà Nội"}'),),
        finish="tool_calls",
        usage=Usage(9, 6, 15, reasoning_tokens=2),
    ),
    responses(
        "a Responses object",
        document(
            response(
                "completed",
                usage=WIRE_USAGE,
                error=None,
                output=[
                    {"id": "i-0", "type": "reasoning", "summary": [{"type": "summary_text", "text": "Hmm."}]},
                    {
                        "id": "i-1",
                        "type": "message",
                        "role": "assistant",
                        "content": [
                            {"type": "output_text", "text": "I look.", "annotations": []},
                            {"type": "refusal", "refusal": "No."},
                        ],
                    },
                    {
                        "id": "i-2",
                        "type": "function_call",
                        "call_id": "call-a",
                        "name": "look",
                        "arguments": '{"at": "Hà Nội"}',
                    },
                ],
            )["response"]
        ),
        "I look.",
        reasoning="Hmm.",
        refusal="No.",
        tool_calls=(("call-a", "look", '{"at": "Hà Nội"}'),),
        finish="tool_calls",
    ),
    ollama(
        "an Ollama line",
        document(
            {
                **last(),
                **{
                    "message": {
                        "role": "assistant",
                        "content": "I look.",
                        "thinking": "Hmm.",
                        "tool_calls": [ollama_call("look", {"at": "Hà Nội"}, id="o-1")],
                    }
                },
            }
        ),
        "I look.",
        reasoning="Hmm.",
        tool_calls=(("o-1", "look", '{"at": "Hà Nội"}'),),
        finish="tool_calls",
    ),
]
