"""The vendors' own SDKs and ours read the same from the same bytes; where they differ it is said which is right

Needs the extra ``peers``; without it these tests are skipped.
"""

import contextlib
import json

import pytest

import local_provider
from conftest import asking, read
from transcripts import TRANSCRIPTS
from transcripts_vendors import PLAIN, media_type

PEERS = "needs the extra 'peers' (the vendors' SDKs)"
openai = pytest.importorskip("openai", reason=PEERS)
anthropic = pytest.importorskip("anthropic", reason=PEERS)
genai = pytest.importorskip("google.genai", reason=PEERS)

#: what the recordings and transcripts call a dialect that an SDK reads
SDK_DIALECTS = {
    "openai_chat": "openai",
    "openai_responses": "openai-responses",
    "anthropic": "anthropic",
    "gemini": "gemini",
    "openai": "openai",
    "openai-responses": "openai-responses",
}
ASKED = [{"role": "user", "content": "Good day?"}]


class Reading:
    """What somebody reads from a stream: text, tool calls as (id, name, arguments), usage, and what ended it"""

    def __init__(self):
        self.text = ""
        self.calls = {}
        self.usage = None
        self.failure = None

    def call(self, key, id, name, arguments):
        """A part of a call: ids and names count once, arguments add up"""
        known = self.calls.setdefault(key, ["", "", ""])
        self.calls[key] = [known[0] or id or "", known[1] or name or "", known[2] + (arguments or "")]

    def as_dict(self):
        calls = [(id, name, parsed(arguments)) for id, name, arguments in self.calls.values()]
        return {"text": self.text, "calls": calls, "usage": self.usage, "failed": self.failure is not None}


def parsed(arguments):
    """Arguments as what they say, so that their white space does not count; as they are where they are not whole"""
    try:
        return json.loads(arguments or "{}")
    except ValueError:
        return arguments


def counted(details, name):
    return getattr(details, name, None) or 0


# How each SDK is asked and read


def by_openai(origin, reading):
    with openai.OpenAI(base_url=origin + "/v1", api_key="k", max_retries=0) as client:
        with client.chat.completions.create(model="m", messages=ASKED, stream=True) as stream:
            for chunk in stream:
                if chunk.usage:
                    usage = chunk.usage
                    cached = counted(usage.prompt_tokens_details, "cached_tokens")
                    reasoned = counted(usage.completion_tokens_details, "reasoning_tokens")
                    reading.usage = (usage.prompt_tokens, usage.completion_tokens, cached, reasoned)
                for choice in chunk.choices or ():
                    if choice.index == 0 and choice.delta is not None:
                        of_choice(reading, choice.delta)


def of_choice(reading, delta):
    reading.text += delta.content if isinstance(delta.content, str) else ""
    for call in delta.tool_calls or ():
        reading.call(call.index, call.id, call.function.name, call.function.arguments)


def by_responses(origin, reading):
    with openai.OpenAI(base_url=origin + "/v1", api_key="k", max_retries=0) as client:
        with client.responses.create(model="m", input="Good day?", stream=True) as stream:
            for event in stream:
                if event.type == "response.output_text.delta":
                    reading.text += event.delta
                elif event.type == "response.output_item.done" and event.item.type == "function_call":
                    reading.call(event.output_index, event.item.call_id, event.item.name, event.item.arguments)
                elif event.type == "error":
                    reading.failure = event
                elif event.type in ("response.completed", "response.incomplete", "response.failed"):
                    usage = event.response.usage
                    if usage:
                        cached = counted(usage.input_tokens_details, "cached_tokens")
                        reasoned = counted(usage.output_tokens_details, "reasoning_tokens")
                        reading.usage = (usage.input_tokens, usage.output_tokens, cached, reasoned)


def by_anthropic(origin, reading):
    with anthropic.Anthropic(base_url=origin, api_key="k", max_retries=0) as client:
        with client.messages.stream(model="m", max_tokens=100, messages=ASKED) as stream:
            try:
                for _ in stream:
                    pass
            finally:
                with contextlib.suppress(AssertionError):  # nothing came at all
                    of_message(reading, stream.current_message_snapshot)


def of_message(reading, message):
    reading.text = "".join(block.text for block in message.content if block.type == "text")
    for block in message.content:
        if block.type == "tool_use":
            reading.call(block.id, block.id, block.name, json.dumps(block.input))
    usage = message.usage
    cached = usage.cache_read_input_tokens or 0
    total = usage.input_tokens + (usage.cache_creation_input_tokens or 0) + cached
    reading.usage = (total, usage.output_tokens, cached, None)


def by_genai(origin, reading):
    options = genai.types.HttpOptions(base_url=origin)
    client = genai.Client(api_key="k", http_options=options)
    try:
        for chunk in client.models.generate_content_stream(model="m", contents="Good day?"):
            usage = chunk.usage_metadata
            if usage:
                thoughts, cached = usage.thoughts_token_count or 0, usage.cached_content_token_count or 0
                prompt = (usage.prompt_token_count or 0) + (usage.tool_use_prompt_token_count or 0)
                reading.usage = (prompt, (usage.candidates_token_count or 0) + thoughts, cached, thoughts)
            for part in parts_of(chunk):
                if part.text and not part.thought:
                    reading.text += part.text
                if part.function_call:
                    call = part.function_call
                    reading.call(len(reading.calls), call.id, call.name, json.dumps(call.args))
    finally:
        client.close()


def parts_of(chunk):
    first = [candidate for candidate in chunk.candidates or () if not candidate.index]
    return [part for candidate in first if candidate.content for part in candidate.content.parts or ()]


SDKS = {"openai": by_openai, "openai-responses": by_responses, "anthropic": by_anthropic, "gemini": by_genai}


def by_sdk(server, dialect):
    reading = Reading()
    try:
        SDKS[dialect](server.origin, reading)
    except Exception as error:  # each SDK has errors of its own, and leaks others'
        reading.failure = error
    return reading.as_dict()


def by_us(server, dialect, **params):
    reading = Reading()
    base_url = server.origin + local_provider.DIALECT_BASES[dialect]
    with asking(server, base_url=base_url, dialect=dialect) as client:
        stream = client.stream("Good day?", resume="never", **params)
        pieces, reading.failure = read(stream)
    reading.text = "".join(pieces)
    for call in stream.tool_calls:
        reading.call(call.index, call.id, call.name, call.arguments)
    usage = stream.usage
    if usage is not None:
        reasoned = None if dialect == "anthropic" else usage.reasoning_tokens  # its SDK does not count them apart
        reading.usage = (usage.input_tokens, usage.output_tokens, usage.cache_read_tokens, reasoned)
    return reading.as_dict()


def differences(server, dialect, body, content_type, **params):
    """In which of text, calls, usage and failure an SDK and we differ, with both readings; params are for us alone"""
    answer = local_provider.Answer(body=body, content_type=content_type)
    server.answer(answer, answer)
    theirs, ours = by_sdk(server, dialect), by_us(server, dialect, **params)
    return {name: (theirs[name], ours[name]) for name in ours if theirs[name] != ours[name]}


#: why it is right that we differ, and where, in what
DIFFERENCES = [
    (
        "the usage on the chunk that has the error is what was billed; the SDK raises before it gives the chunk",
        {"openai_chat/openrouter_midstream_error_token_limit.sse": "usage"},
    ),
    (
        "a content may be a list of parts, whose text is text; the SDK gives the list",
        {"openai_chat/mistral_thinking_content_parts.sse": "text"},
    ),
    (
        "an array in pieces is what Gemini answers without alt=sse; the SDK, which asks for events, cannot read it",
        {
            "gemini/json_array_text.json": "text usage failed",
            "gemini/json_array_tools.json": "calls usage failed",
            "gemini/json_array_text_after_tool.json": "text usage failed",
        },
    ),
    (
        "two generations in one stream are no answer; the SDK mixes them into one",
        {"anthropic/spliced_second_message_start.sse": "calls usage failed"},
    ),
    (
        "an error without an 'error' key (old vLLM) is one; the SDK takes it for a chunk without choices",
        {"openai_chat/derived_vllm_error_object.sse": "failed"},
    ),
    (
        "a stream without its end marker is not whole; the SDK does not look for one",
        {"anthropic/derived_truncated_no_message_stop.sse": "failed"},
    ),
]


def expected(reasons):
    return {name: fields.split() for _, where in reasons for name, fields in where.items()}


def test_the_sdks_read_from_every_recording_what_we_read(server, recordings):
    folder, index = recordings
    rows = [row for row in index if row["dialect"] in SDK_DIALECTS]
    assert len(rows) > 60
    found = {}
    for row in rows:
        body = (folder / row["file"]).read_bytes()
        content_type = "application/json" if row["file"].endswith(".json") else "text/event-stream"
        differing = differences(server, SDK_DIALECTS[row["dialect"]], body, content_type)
        if differing:
            found[row["file"]] = differing
    assert {file: list(differing) for file, differing in found.items()} == expected(DIFFERENCES), found


OWN = [transcript for transcript in (*TRANSCRIPTS, *PLAIN) if transcript.dialect in SDKS]
OWN_DIFFERENCES = [
    (
        "a stream without its end marker, with something missing inside, or paused is not whole; the SDKs do not look",
        {
            "openai: two choices, of which one is cut off": "failed",
            "openai: an end without a marker": "failed",
            "openai: a prefix of [DONE]": "failed",
            "openai: a cut inside an emoji: no replacement character": "failed",
            "openai: a server that gives up for lack of resources (DeepSeek)": "failed",
            "anthropic: an end without message_stop": "failed",
            "anthropic: an end after the stop reason, before message_stop": "failed",
            "anthropic: a turn that is paused": "failed",
            "anthropic: a tool call cut in its arguments": "calls failed",
            "gemini: an end without a reason": "failed",
            "openai-responses: an end without a terminal event": "failed",
            "openai-responses: a number that jumps: what is between is lost": "text usage failed",
        },
    ),
    (
        "what comes twice is given out once; the SDK gives it twice",
        {
            "openai-responses: an event that is repeated at once, with other padding": "text",
            "openai-responses: events that come twice count once": "text",
        },
    ),
    (
        "two generations in one stream are no answer; the SDK mixes them into one",
        {
            "anthropic: a second message in the same stream (a proxy that asked again): the first is what came": (
                "text usage failed"
            )
        },
    ),
    (
        "an error is one in whatever shape; the SDK leaves it to its caller to look",
        {
            "openai: an error object without error key (old vLLM)": "failed",
            "openai-responses: a response that failed": "failed",
        },
    ),
    (
        "what other vendors of the dialect send counts too; the SDK knows OpenAI's own names and types only",
        {
            "openai: usage under x_groq (Groq)": "usage",
            "openai: usage inside the choice (Moonshot)": "usage",
            "openai: cached tokens in DeepSeek's words, no total": "usage",
            "openai: cached tokens beside the others (Together)": "usage",
            "openai: content as a list of parts, thinking among them (Mistral)": "text",
            "openai: a whole tool call in one delta, arguments as an object": "calls failed",
            "openai: calls that all have index 0 but ids of their own": "calls",
            "openai: calls without index: by their place in the list": "calls failed",
            "openai: function_call, as tool calls were before": "calls",
            "openai: an error beside choices and usage on one chunk, after a finish reason (OpenRouter)": "usage",
            "openai: one JSON completion instead of a stream": "text usage",
        },
    ),
    (
        "what is null, of another type, unknown or without a name is no reason to lose the text",
        {
            "openai: null where an object or text may be: choices, delta, content, message": "text failed",
            "openai: types that nothing in an answer has": "text failed",
            "openai: events of other names, and empty data": "text failed",
            "anthropic: events that have no name but a type": "text usage",
            "anthropic: events, blocks and deltas that nobody knows": "text usage failed",
        },
    ),
    (
        "an array in pieces is what Gemini answers without alt=sse; the SDK, which asks for events, cannot read it",
        {
            "gemini: one JSON array, in pieces": "text usage failed",
            "gemini: one JSON array, all on one line": "text usage",
            "gemini: two calls in one chunk of an array": "calls usage failed",
            "gemini: an error in an array": "text",
        },
    ),
    (
        "a call without arguments has none: ToolCall.parsed is {} where the SDK says None",
        {"gemini: a call with an id and without arguments": "calls"},
    ),
]


def test_the_sdks_read_from_our_transcripts_what_we_read(server):
    found = {}
    for transcript in OWN:
        params = {"n": len(transcript.texts)} if transcript.texts else {}
        differing = differences(server, transcript.dialect, transcript.body, media_type(transcript), **params)
        if differing:
            found[f"{transcript.dialect}: {transcript.name}"] = differing
    assert {name: list(differing) for name, differing in found.items()} == expected(OWN_DIFFERENCES), found
