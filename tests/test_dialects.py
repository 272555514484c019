"""Section 5, the openai dialect: what streams say, over real sockets and cut into blocks of any size"""

import pytest

import local_provider
import sheepsse
from conftest import folder_of, read
from transcripts import DONE, STOP, TRANSCRIPTS, chunk, says, sse

BLOCKS = (1, 7, 4096)


def names(transcript):
    return transcript.name


def served(server, client, body, block):
    """A stream of this body, written in blocks of so many bytes"""
    server.answer(local_provider.Answer(body=body, block=block))
    return client.stream("Good day?", resume="never")


def triples(tool_calls):
    return tuple((call.id, call.name, call.arguments) for call in tool_calls)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=names)
def test_a_stream_says_over_a_socket_what_its_transcript_says(server, client, transcript, block):
    stream = served(server, client, transcript.body, block)
    pieces, error = read(stream)
    answer = stream.completion
    assert "".join(pieces) == answer.text == stream.text == transcript.text
    assert answer.reasoning == stream.reasoning == transcript.reasoning
    assert answer.refusal == transcript.refusal
    assert triples(answer.tool_calls) == triples(stream.tool_calls) == transcript.tool_calls
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


def chunks_before_error(chunks):
    """The chunks, and the error that ended them or None"""
    given = []
    try:
        for piece in chunks:
            given.append(piece)
    except sheepsse.SheepError as error:
        return given, error
    return given, None


@pytest.mark.parametrize("transcript", TRANSCRIPTS[:-1], ids=names)
def test_the_plain_generators_say_the_same_as_a_stream(transcript):
    events = sheepsse.iter_events([transcript.body])
    given, error = chunks_before_error(sheepsse.iter_chunks(events))
    answer = sheepsse.collect(given)
    assert "".join(sheepsse.iter_text(given)) == answer.text == transcript.text
    assert (answer.reasoning, answer.refusal) == (transcript.reasoning, transcript.refusal)
    assert triples(answer.tool_calls) == transcript.tool_calls
    assert answer.usage == transcript.usage
    finishes = [piece.finish for piece in given if piece.finish and piece.index == 0]
    assert finishes[-1:] == ([transcript.finish] if transcript.finish else [])
    assert (error is None) == (transcript.error is None)
    if error is not None:
        assert type(error).__name__ == transcript.error[0]
        assert error.partial == answer._replace(complete=False)


@pytest.mark.parametrize("transcript", [one for one in TRANSCRIPTS if one.texts], ids=names)
def test_each_choice_is_told_apart_by_its_index(transcript):
    given = list(sheepsse.iter_chunks(sheepsse.iter_events([transcript.body])))
    for index, text in enumerate(transcript.texts):
        assert sheepsse.collect(given, index).text == text


# Real recordings, where there are any


def recorded(index, dialect="openai_chat"):
    return [row for row in index if row["dialect"] == dialect]


@pytest.mark.parametrize("block", BLOCKS)
def test_every_recording_says_what_its_index_says(server, client, recordings, block):
    folder, index = recordings
    rows = recorded(index)
    assert rows
    for row in rows:
        stream = served(server, client, (folder / row["file"]).read_bytes(), block)
        pieces, error = read(stream)
        check_recording(row, "".join(pieces), stream, error)


def check_recording(row, text, stream, error):
    name, expected = row["file"], row["expected"]
    answer = stream.completion
    assert text == answer.text == row["expected_text"], name
    assert answer.reasoning == expected["reasoning"], name
    assert answer.refusal == expected["refusal"], name
    calls = [{"id": call.id, "name": call.name, "arguments": call.arguments} for call in answer.tool_calls]
    assert calls == expected["tool_calls"], name
    assert answer.finish_reason == row["expected_finish"], name
    assert (answer.id, answer.model) == (expected["id"], expected["model"]), name
    assert answer.complete is expected["complete"], name
    check_usage(name, answer.usage, row["expected_usage"])
    assert (error is None) == expected["complete"], name
    if expected["error"]:
        assert isinstance(error, sheepsse.StreamError), name
        assert expected["error"]["message"] in str(error), name
        assert error.vendor_code == (expected["error"]["code"] or expected["error"]["type"]), name
    elif error is not None:
        assert isinstance(error, sheepsse.StreamInterrupted), name
    if error is not None:
        assert error.partial == answer, name


def check_usage(name, usage, wire):
    if wire is None:
        assert usage is None, name
        return
    prompt, output = wire.get("prompt_tokens_details") or {}, wire.get("completion_tokens_details") or {}
    assert usage.source == "provider", name
    assert usage.input_tokens == wire["prompt_tokens"], name
    assert usage.output_tokens == wire["completion_tokens"], name
    assert usage.total_tokens == wire["total_tokens"], name
    assert usage.cache_read_tokens == prompt.get("cached_tokens", wire.get("prompt_cache_hit_tokens", 0)), name
    assert usage.reasoning_tokens == output.get("reasoning_tokens", 0), name
    assert (None if usage.cost is None else float(usage.cost)) == wire.get("cost"), name


def test_the_texts_of_all_choices_of_a_recording_are_told_apart(recordings):
    folder, index = recordings
    rows = [row for row in recorded(index) if "texts" in row["expected"]]
    assert rows
    for row in rows:
        given = list(sheepsse.iter_chunks(sheepsse.iter_events([(folder / row["file"]).read_bytes()])))
        answers = [sheepsse.collect(given, choice) for choice in range(len(row["expected"]["texts"]))]
        assert [answer.text for answer in answers] == row["expected"]["texts"]
        assert [answer.finish_reason for answer in answers] == row["expected"]["finishes"]


def test_a_missing_folder_of_recordings_is_a_skip_with_a_plain_message(monkeypatch):
    monkeypatch.delenv("SHEEPSSE_RECORDINGS", raising=False)
    with pytest.raises(pytest.skip.Exception, match="SHEEPSSE_RECORDINGS is not set"):
        folder_of("SHEEPSSE_RECORDINGS")


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


def test_a_deep_json_is_no_crash():
    with pytest.raises(sheepsse.InvalidStreamError):
        list(sheepsse.iter_chunks([sheepsse.ServerSentEvent(data="[" * 200_000)]))


def test_a_stream_in_a_file_can_be_read_as_it_is():
    body = sse(*says("Good day"), STOP, DONE)
    blocks = [body[start : start + 10] for start in range(0, len(body), 10)]
    assert "".join(sheepsse.iter_text(sheepsse.iter_chunks(sheepsse.iter_events(blocks)))) == "Good day"
