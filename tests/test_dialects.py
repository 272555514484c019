"""Section 5, what streams of each dialect say, over real sockets and cut into blocks of any size"""

import os
import subprocess
import sys
from decimal import Decimal

import pytest

import local_provider
import sheepsse
from conftest import FOLDERS, HANG, ROOT, read
from transcripts import DONE, STOP, TRANSCRIPTS, chunk, says, sse
from transcripts_vendors import (
    DOCUMENTS,
    OPENING,
    PLAIN,
    VENDORS,
    arguments,
    media_type,
    message_end,
    message_start,
    named,
    numbered,
    response,
    tool_added,
    tool_block,
)

BLOCKS = (1, 7, 4096)
#: the names that the index of the recordings has
RECORDED_AS = {
    "openai_chat": "openai",
    "openai_responses": "openai-responses",
    "anthropic": "anthropic",
    "gemini": "gemini",
    "ollama": "ollama",
}


def names(transcript):
    return transcript.name if transcript.dialect == "openai" else f"{transcript.dialect}: {transcript.name}"


def served(server, client, body, content_type=None, choices=1):
    """A stream of this body"""
    server.answer(local_provider.Answer(body=body, block=4096, content_type=content_type))
    requested = {"n": choices} if choices > 1 else {}
    return client.stream("Good day?", resume="never", **requested)


@pytest.fixture
def received(monkeypatch, block):
    """The blocks of the last answer as they came from the socket, cut into blocks of so many bytes"""
    blocks, read_blocks = [], sheepsse._limited_blocks

    def kept(*args):
        blocks.clear()
        for piece in read_blocks(*args):
            for start in range(0, len(piece), block):
                blocks.append(piece[start : start + block])
                yield blocks[-1]

    monkeypatch.setattr(sheepsse, "_limited_blocks", kept)
    return blocks


def triples(tool_calls):
    return tuple((call.id, call.name, call.arguments) for call in tool_calls)


def events_of(blocks, content_type):
    """What the plain generators make of a body of this type"""
    is_json = content_type in ("application/json", "application/x-ndjson")
    return sheepsse.iter_json_lines(blocks) if is_json else sheepsse.iter_events(blocks)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("transcript", TRANSCRIPTS + VENDORS, ids=names)
@pytest.mark.usefixtures("received")
def test_a_stream_says_over_a_socket_what_its_transcript_says(server, clients, transcript):
    client, choices = clients[transcript.dialect], max(1, len(transcript.texts))
    stream = served(server, client, transcript.body, media_type(transcript), choices)
    pieces, error = read(stream)
    answer = stream.completion
    assert "".join(pieces) == answer.text == stream.text == transcript.text
    assert answer.reasoning == stream.reasoning == transcript.reasoning
    assert answer.refusal == transcript.refusal
    assert triples(answer.tool_calls) == triples(stream.tool_calls) == transcript.tool_calls
    assert [call.index for call in answer.tool_calls] == list(range(len(transcript.tool_calls)))
    assert answer.finish_reason == stream.finish_reason == transcript.finish_reason
    assert answer.usage == stream.usage == transcript.usage
    assert answer.complete is transcript.complete
    assert (answer.id, answer.model) == (transcript.id, transcript.model)
    if transcript.error is None:
        assert error is None
    else:
        kind, words = transcript.error
        assert type(error).__name__ == kind
        assert words in str(error)
        assert error.partial == answer


@pytest.mark.parametrize("dialect", ["named", "auto"])
@pytest.mark.parametrize("transcript", TRANSCRIPTS[:-1] + PLAIN, ids=names)
def test_the_plain_generators_say_the_same_as_a_stream(transcript, dialect):
    events = events_of([transcript.body], media_type(transcript))
    given, error = read(sheepsse.iter_chunks(events, "auto" if dialect == "auto" else transcript.dialect))
    answer = sheepsse.collect(given)
    assert "".join(sheepsse.iter_text(given)) == answer.text == transcript.text
    assert (answer.reasoning, answer.refusal) == (transcript.reasoning, transcript.refusal)
    assert triples(answer.tool_calls) == transcript.tool_calls
    assert (answer.id, answer.model) == (transcript.id, transcript.model)
    assert answer.usage == transcript.usage
    finishes = [piece.finish for piece in given if piece.finish and piece.index == 0]
    assert finishes[-1:] == ([transcript.finish] if transcript.finish else [])
    assert (error is None) == (transcript.error is None)
    if error is not None:
        assert type(error).__name__ == transcript.error[0]
        assert error.partial == answer._replace(complete=False)


@pytest.mark.parametrize("transcript", [one for one in TRANSCRIPTS + VENDORS if one.texts], ids=names)
def test_each_choice_is_told_apart_by_its_index(transcript):
    given = list(sheepsse.iter_chunks(sheepsse.iter_events([transcript.body]), transcript.dialect))
    for index, text in enumerate(transcript.texts):
        assert sheepsse.collect(given, index).text == text


@pytest.mark.parametrize("transcript", DOCUMENTS, ids=names)
def test_one_json_answer_says_the_same_as_a_stream_would(server, clients, transcript):
    client = clients[transcript.dialect]
    server.answer(local_provider.Answer(body=transcript.body, content_type="application/json"))
    answer = client.complete("Good day?")
    assert (answer.text, answer.reasoning, answer.refusal) == (
        transcript.text,
        transcript.reasoning,
        transcript.refusal,
    )
    assert triples(answer.tool_calls) == transcript.tool_calls
    assert (answer.id, answer.model, answer.usage) == (transcript.id, transcript.model, transcript.usage)
    assert (answer.finish_reason, answer.complete) == (transcript.finish_reason, True)
    chunks = list(sheepsse.iter_chunks(sheepsse.iter_json_lines([transcript.body])))
    assert sheepsse.collect(chunks) == answer
    assert chunks[-1].finish == transcript.finish


# Real recordings, where there are any


def recorded(index, dialect="openai_chat"):
    return [row for row in index if row["dialect"] == dialect]


def recorded_type(row):
    endings = {"sse": "text/event-stream", "json": "application/json", "jsonl": "application/x-ndjson"}
    return endings[row["file"].rpartition(".")[2]]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dialect", RECORDED_AS)
def test_every_recording_says_what_its_index_says(server, clients, recordings, received, dialect):
    folder, index = recordings
    rows = recorded(index, dialect)
    assert rows
    for row in rows:
        body, content_type = (folder / row["file"]).read_bytes(), recorded_type(row)
        stream = served(server, clients[RECORDED_AS[dialect]], body, content_type)
        pieces, error = read(stream)
        check_recording(row, stream.completion, error)
        assert "".join(pieces) == stream.text, row["file"]
        # the same blocks, by the plain generators, which are not told the dialect
        given, error = read(sheepsse.iter_chunks(events_of(received, content_type)))
        check_recording(row, sheepsse.collect(given)._replace(complete=error is None), error)


def check_recording(row, answer, error):
    name, expected = row["file"], row["expected"]
    if error is not None:
        assert error.partial == answer, name
    if "must_raise" in expected:
        assert type(error) is sheepsse.InvalidStreamError, name
        assert answer.id == expected["spliced_message_ids"][0], name
        return
    assert answer.text == row["expected_text"], name
    assert answer.reasoning == expected["reasoning"], name
    assert answer.refusal == expected["refusal"], name
    calls = [{"id": call["id"] or "", **call_as_sent(call)} for call in expected["tool_calls"]]
    assert [{"id": call.id, **call_as_told(call, row)} for call in answer.tool_calls] == calls, name
    assert answer.finish_reason == row["expected_finish"], name
    assert (answer.id, answer.model) == (expected["id"] or "", expected["model"]), name
    assert answer.complete is expected["complete"], name
    check_usage(name, answer.usage, USAGE_OF[row["dialect"]], row["expected_usage"])
    assert (error is None) == expected["complete"], name
    if expected["error"]:
        wire = expected["error"] if isinstance(expected["error"], dict) else {"message": expected["error"]}
        assert type(error) is sheepsse.StreamError, name
        assert wire["message"] in str(error), name
        assert error.vendor_code == (wire.get("code") or wire.get("type")), name
    elif error is not None:
        assert type(error) is sheepsse.StreamInterrupted, name


def call_as_sent(call):
    return {"name": call["name"], "arguments": call["arguments"]}


def call_as_told(call, row):
    """The arguments are an object where the wire has one"""
    objects = row["dialect"] in ("gemini", "ollama")
    return {"name": call.name, "arguments": call.parsed if objects else call.arguments}


def openai_usage(wire):
    prompt, output = wire.get("prompt_tokens_details") or {}, wire.get("completion_tokens_details") or {}
    return sheepsse.Usage(
        wire["prompt_tokens"],
        wire["completion_tokens"],
        wire["total_tokens"],
        prompt.get("cached_tokens", wire.get("prompt_cache_hit_tokens", 0)),
        prompt.get("cache_write_tokens", 0),
        output.get("reasoning_tokens", 0),
        wire.get("cost"),
    )


def responses_usage(wire):
    return sheepsse.Usage(
        wire["input_tokens"],
        wire["output_tokens"],
        wire["total_tokens"],
        wire["input_tokens_details"]["cached_tokens"],
        wire["input_tokens_details"].get("cache_write_tokens", 0),
        wire["output_tokens_details"]["reasoning_tokens"],
        wire.get("cost"),
    )


def anthropic_usage(wire):
    cached, written = wire.get("cache_read_input_tokens", 0), wire.get("cache_creation_input_tokens", 0)
    input_tokens, output_tokens = wire["input_tokens"] + cached + written, wire["output_tokens"]
    thought = wire.get("output_tokens_details", {}).get("thinking_tokens", 0)
    return sheepsse.Usage(input_tokens, output_tokens, input_tokens + output_tokens, cached, written, thought)


def gemini_usage(wire):
    thought = wire.get("thoughtsTokenCount", 0)
    return sheepsse.Usage(
        wire["promptTokenCount"] + wire.get("toolUsePromptTokenCount", 0),
        wire.get("candidatesTokenCount", 0) + thought,
        wire["totalTokenCount"],
        wire.get("cachedContentTokenCount", 0),
        reasoning_tokens=thought,
    )


def ollama_usage(wire):
    input_tokens, output_tokens = wire["prompt_eval_count"], wire["eval_count"]
    return sheepsse.Usage(input_tokens, output_tokens, input_tokens + output_tokens)


#: what the wire's usage is in ours
USAGE_OF = {
    "openai_chat": openai_usage,
    "openai_responses": responses_usage,
    "anthropic": anthropic_usage,
    "gemini": gemini_usage,
    "ollama": ollama_usage,
}


def check_usage(name, usage, expected_of, wire):
    if wire is None:
        assert usage is None, name
        return
    expected = expected_of(wire)
    cost = None if expected.cost is None else Decimal(str(expected.cost))
    assert usage == expected._replace(cost=cost), name


def test_the_texts_of_all_choices_of_a_recording_are_told_apart(recordings):
    folder, index = recordings
    rows = [row for row in recorded(index) if "texts" in row["expected"]]
    assert rows
    for row in rows:
        given = list(sheepsse.iter_chunks(sheepsse.iter_events([(folder / row["file"]).read_bytes()])))
        answers = [sheepsse.collect(given, choice) for choice in range(len(row["expected"]["texts"]))]
        assert [answer.text for answer in answers] == row["expected"]["texts"]
        assert [answer.finish_reason for answer in answers] == row["expected"]["finishes"]


def test_without_the_folder_of_recordings_their_tests_are_left_out_and_not_skipped():
    environ = {name: value for name, value in os.environ.items() if name not in FOLDERS.values()}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, timeout=HANG, check=True)
    assert b"::test_every_recording_says_what_its_index_says" not in done.stdout
    last = done.stdout.splitlines()[-1]
    assert b"deselected" in last
    assert b"skipped" not in last


# Errors inside a stream: whether they may pass


@pytest.mark.parametrize(
    ("error", "retryable", "code"),
    [
        ({"message": "x", "type": "server_error"}, True, "STREAM_ERROR"),
        ({"message": "x", "type": "InternalServerError", "code": 500}, True, "STREAM_ERROR"),
        ({"message": "x", "code": 503}, True, "STREAM_ERROR"),
        ({"message": "x", "code": "429"}, True, "429"),
        ({"message": "x", "code": "rate_limit_exceeded"}, True, "rate_limit_exceeded"),
        ({"message": "x", "type": "overloaded_error"}, True, "STREAM_ERROR"),
        ({"message": "x", "code": 400}, False, "STREAM_ERROR"),
        ({"message": "x", "code": "tool_use_failed"}, False, "tool_use_failed"),
        ({"message": "x", "type": "insufficient_quota", "code": "insufficient_quota"}, False, "insufficient_quota"),
        ({"code": "context_length_exceeded"}, False, "context_length_exceeded"),
    ],
)
def test_an_error_in_the_stream_may_be_retried_where_it_may_pass(error, retryable, code):
    with pytest.raises(sheepsse.StreamError) as caught:
        list(sheepsse.iter_chunks(sheepsse.iter_events([sse({"error": error})])))
    assert caught.value.retryable is retryable
    assert caught.value.code == code
    assert caught.value.vendor_code in (error.get("code"), error.get("type"))


def test_an_error_event_is_an_error_whatever_it_holds():
    for data in ('{"message": "It broke"}', '{"detail": "It broke"}', '{"error": {"message": "It broke"}}'):
        with pytest.raises(sheepsse.StreamError, match="It broke"):
            list(sheepsse.iter_chunks(sheepsse.iter_events([f"event: error\ndata: {data}\n\n".encode()])))


def test_an_error_that_may_pass_is_a_lost_stream_before_the_first_word(server, client):
    failing = sse({"error": {"message": "overloaded", "type": "server_error"}})
    server.answer(local_provider.Answer(body=failing), local_provider.Answer(text="Good day"))
    stream = client.stream("Good day?", retry=sheepsse.Retry(1, base_delay=0))
    assert "".join(stream) == "Good day"
    assert stream.continuity == "restarted"


# Dialects as such


def test_a_dialect_may_be_a_class_or_a_name():
    body = sse(*says("Good day"), STOP, DONE)
    for dialect in ("auto", "openai", sheepsse.DIALECTS["openai"]):
        assert list(sheepsse.iter_text(sheepsse.iter_chunks(sheepsse.iter_events([body]), dialect))) == ["Good day"]


def test_a_dialect_that_requires_no_end_takes_the_end_of_the_body_for_it():
    class Endless(sheepsse.DIALECTS["openai"]):
        require_end = False

    events = sheepsse.iter_events([sse(*says("Good day"))])
    assert sheepsse.collect(sheepsse.iter_chunks(events, Endless)).text == "Good day"


def test_a_dialect_of_ones_own_needs_a_path_a_body_and_what_an_event_means(server, monkeypatch):
    class Words(sheepsse.Dialect):
        name, path = "words", "/say"

        @classmethod
        def body(cls, messages, model, params, stream):
            return {"say": messages[-1]["content"], "voice": model, **params}

        def chunks(self, event):
            payload = self.load(event)
            self.whole = self.done = "word" not in payload
            if not self.done:
                yield sheepsse.Chunk(text=payload["word"], raw=payload)

    monkeypatch.setitem(sheepsse.DIALECTS, "words", Words)
    server.answer(local_provider.Answer(body=sse({"word": "Good"}, {"word": " day"}, {})))
    with sheepsse.Client(base_url=server.origin, api_key="k-12345", dialect="words") as client:
        assert list(client.stream("Good day?", model="deep", pitch=3)) == ["Good", " day"]
    request = server.requests[0]
    assert request.path == "/say"
    assert request.json == {"say": "Good day?", "voice": "deep", "pitch": 3}
    assert request.headers["Authorization"] == "Bearer k-12345"


def test_the_base_class_has_no_body_and_no_chunks():
    with pytest.raises(NotImplementedError):
        sheepsse.Dialect.body([], "m", {}, True)
    with pytest.raises(NotImplementedError):
        next(sheepsse.Dialect().chunks(sheepsse.ServerSentEvent()))
    assert sheepsse.Dialect.optional(True) == {}


def test_a_chunk_keeps_what_it_was_made_from():
    payload = chunk({"content": "Good day"}, service_tier="default")
    (given,) = list(sheepsse.iter_chunks([sheepsse.ServerSentEvent(data=_json(payload), id="7"), done_event()]))
    assert given.raw == payload
    assert given.event_id == "7"


def done_event():
    return sheepsse.ServerSentEvent(data=DONE)


def _json(payload):
    return sse(payload).decode()[len("data: ") :].strip()


@pytest.mark.parametrize("choices", [1, 2, 3])
def test_a_stream_is_whole_when_every_choice_asked_for_has_ended(server, client, choices):
    body = sse(*[chunk({"content": str(index)}, "stop", index=index) for index in range(2)])
    server.answer(local_provider.Answer(body=body))
    stream = client.stream("Good day?", n=choices, resume="never")
    _, error = read(stream)
    assert (error is None) == (choices <= 2)
    assert stream.completion.complete == (choices <= 2)


def test_a_deep_json_is_no_crash(no_collection):
    with pytest.raises(sheepsse.InvalidStreamError):
        list(sheepsse.iter_chunks([sheepsse.ServerSentEvent(data="[" * 200_000)]))


def test_a_stream_in_a_file_can_be_read_as_it_is():
    body = sse(*says("Good day"), STOP, DONE)
    blocks = [body[start : start + 10] for start in range(0, len(body), 10)]
    assert "".join(sheepsse.iter_text(sheepsse.iter_chunks(sheepsse.iter_events(blocks)))) == "Good day"


HALF = '{"at": "s'
HALF_ARGUED = {
    "openai": sse(
        chunk({"tool_calls": [{"index": 0, "id": "t-1", "function": {"name": "look", "arguments": HALF}}]}),
        chunk(finish="length"),
        DONE,
    ),
    "anthropic": named(message_start(), *tool_block(0, "t-1", "look", HALF), *message_end("max_tokens")),
    "openai-responses": numbered(
        *OPENING,
        tool_added(0, "t-1", "look"),
        arguments(0, HALF),
        response("incomplete", incomplete_details={"reason": "max_output_tokens"}),
    ),
}


@pytest.mark.parametrize("dialect", HALF_ARGUED)
def test_arguments_that_stop_half_way_are_kept_and_are_an_error_where_they_are_parsed(server, clients, dialect):
    stream = served(server, clients[dialect], HALF_ARGUED[dialect])
    assert list(stream) == []
    (call,) = stream.tool_calls
    assert (call.id, call.name, call.arguments) == ("t-1", "look", HALF)
    with pytest.raises(sheepsse.InvalidStreamError, match="look"):
        _ = call.parsed
    assert stream.completion.complete
    assert not (stream.completion.vendor or {}).get("anthropic")
