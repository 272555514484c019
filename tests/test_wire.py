"""Section 5, what model servers really send: each is a whole answer, or an error that keeps what came

The cases are of kinds that users have reported; bytes and words are ours. Each states one behaviour in its name.
"""

import json
from decimal import Decimal
from typing import Any, NamedTuple, Optional, Tuple

import pytest

import local_provider
import sheepsse
from conftest import asking, read
from local_provider import Answer
from sheepsse import (
    AuthenticationError,
    InvalidRequestError,
    InvalidStreamError,
    QuotaError,
    StreamError,
    StreamInterrupted,
    Usage,
)
from transcripts import DONE, ROLE, STOP, call, calls, chunk, says, sse, usage_chunk
from transcripts_vendors import (
    COMPLETED,
    OPENING,
    arguments,
    block,
    called,
    delta,
    item,
    last,
    line,
    lines,
    message_end,
    message_start,
    named,
    numbered,
    ollama_call,
    response,
    said,
    spoken,
    text_block,
    tokens,
    tool_added,
    tool_block,
    tool_done,
)

GOOD = says("Good")
LOOK = ("t-1", "look", '{"at": 1}')
HEAR = ("t-2", "hear", '{"in": 2}')
FAILED = {"finish_reason": None, "finish": None}


class Case(NamedTuple):
    name: str
    dialect: str
    body: bytes
    text: str = "Good"
    reasoning: str = ""
    refusal: str = ""
    tool_calls: Tuple[Tuple[str, str, str], ...] = ()
    finish: Optional[str] = "stop"
    #: the class of the error, words of its message, and whether it may be retried
    error: Optional[Tuple[type, str, bool]] = None
    usage: Any = "any"


def read_answer(dialect, body, **options):
    """The chunks of a body where one choice was requested, and the error that ended them or None"""
    blocks = [body] if isinstance(body, bytes) else body
    events = sheepsse.iter_json_lines(blocks) if blocks[0][:1] in (b"{", b"[") else stream_events(blocks)
    return read(sheepsse.iter_chunks(events, dialect, **{"choices": 1, **options}))


def stream_events(blocks):
    """The events as the client reads them, which finds errors that are no events"""
    decoder = sheepsse._AnswerDecoder()
    for data in blocks:
        yield from decoder.feed(data)
    yield from decoder.flush()


def check(case, chunks, error):
    answer = sheepsse.collect(chunks)
    assert (answer.text, answer.reasoning, answer.refusal) == (case.text, case.reasoning, case.refusal)
    assert tuple((made.id, made.name, made.arguments) for made in answer.tool_calls) == case.tool_calls
    assert [made.index for made in answer.tool_calls] == list(range(len(case.tool_calls)))
    finishes = [piece.finish for piece in chunks if piece.finish and piece.index == 0]
    if case.error is None:
        assert error is None
        assert finishes[-1:] == ([case.finish] if case.finish else [])
    else:
        kind, words, retryable = case.error
        assert type(error) is kind
        assert words in str(error)
        assert error.retryable is retryable
        assert error.partial.text == case.text
        assert not error.partial.complete
    if case.usage != "any":
        assert answer.usage == case.usage


def failing(name, dialect, body, words, retryable=False, kind=StreamError, **fields):
    return Case(name, dialect, body, error=(kind, words, retryable), **fields)


def chat(name, *payloads, done=True, **fields):
    """A case of the openai dialect, with its end"""
    return Case(name, "openai", sse(*payloads, *([DONE] if done else [])), **fields)


def oops(**fields):
    return {"message": "It broke", **fields}


# 1. A failure is a failure wherever the server puts it

#: an error as a payload of its own, in each shape; with the words that must be seen, and whether it may be retried
ERRORS = {
    "an object": ({"error": oops(type="invalid_request_error")}, "It broke", False),
    "an object with a status": ({"error": oops(code=503)}, "It broke", True),
    "a status that is text": ({"error": oops(code="429")}, "It broke", True),
    "a status under another name": ({"error": oops(http_code="500")}, "It broke", True),
    "a status beside the error": ({"error": oops(), "status_code": 409}, "It broke", True),
    "a status in the metadata": ({"error": oops(metadata={"code": 502})}, "It broke", True),
    "a status that will never do": ({"error": oops(code=501)}, "It broke", False),
    "a text": ({"error": "It broke"}, "It broke", False),
    "a text, and its type beside it (TGI)": ({"error": "It broke", "error_type": "overloaded"}, "It broke", True),
    "a list": ({"errors": [oops(code=7003)]}, "It broke", False),
    "a flag, and the words beside it": ({"error": True, **oops()}, "It broke", False),
    "error_message (DeepInfra)": (
        {"choices": None, "error_type": "BadRequestError", "error_message": "It broke", "error_code": 400},
        "It broke",
        False,
    ),
    "error_msg (Baidu)": ({"error_code": 336100, "error_msg": "It broke"}, "It broke", False),
    "code and message": ({"code": "InvalidParameter", "message": "It broke"}, "It broke", False),
    "code and message beside no choices": ({"choices": [], "code": 1234, "message": "It broke"}, "It broke", False),
    "code and msg": ({"code": 500, "msg": "It broke"}, "It broke", True),
    "throttling words (DashScope)": ({"code": "Throttling.RateQuota", "message": "Wait"}, "Wait", True),
    "detail (FastAPI)": ({"detail": "It broke"}, "It broke", False),
    "a list of details": ({"detail": [{"loc": ["body"], "msg": "It broke"}]}, "It broke", False),
    "an object in the details": ({"detail": {"error": {"message": "It broke"}}}, "It broke", False),
    "object error (vLLM)": ({"object": "error", **oops(code=400)}, "It broke", False),
    "base_resp (MiniMax)": ({"base_resp": {"status_code": 1004, "status_msg": "It broke"}}, "It broke", False),
    "a limit in base_resp": ({"base_resp": {"status_code": 1002, "status_msg": "Too fast"}}, "Too fast", True),
    "a balance in base_resp": (
        {"base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}},
        "insufficient balance",
        False,
    ),
    "a quota with a status that may pass": (
        {"error": oops(http_code="429", type="insufficient_balance_error")},
        "It broke",
        False,
    ),
    "overload in words alone": ({"error": "Model is overloaded"}, "overloaded", True),
    "a type that names an error": ({"type": "server_error", **oops()}, "It broke", True),
    "words alone": ({**oops(), "request_id": "r-1"}, "It broke", False),
    "a code in the details": ({"error": oops(details={"error_code": "rate_limit_reached"})}, "It broke", True),
    **{
        f"{name} and message": ({name: 502, **oops()}, "It broke", True)
        for name in ("status", "statusCode", "status_code", "http_code", "http_status", "error_code", "errorCode")
    },
    **{
        f"base_resp with {code!r}": ({"base_resp": {"status_code": code, "status_msg": "It broke"}}, "It broke", True)
        for code in (1000, 1001, "1002")
    },
    **{
        f"the words in {name}": ({"error": {"code": 502, name: "It broke"}}, "It broke", True)
        for name in ("msg", "detail", "error_message", "error_msg", "errorMessage", "error")
    },
    **{
        f"type {word}": ({"error": oops(type=word)}, "It broke", True)
        for word in (
            "api_error",
            "internal_error",
            "overloaded_error",
            "service_unavailable",
            "timeout",
            "timed_out",
            "rate_limit_error",
            "too_many_requests",
            "RESOURCE_EXHAUSTED",
            "network_error",
            "abort",
            "insufficient_system_resource",
        )
    },
    **{
        f"in words alone: {words}": ({"error": oops(message=f"It broke: {words}")}, "It broke", True)
        for words in ("Request was throttled", "Rate limit reached", "Too many requests", "the model is at capacity")
    },
    "busy words about what was requested": (
        {"error": {"type": "invalid_request_error", "message": "no overload of tool 'throttle' takes this"}},
        "no overload",
        False,
    ),
}
BEGUN = {
    "openai": GOOD,
    "anthropic": [message_start(), *text_block(0, "Good")],
    "gemini": [said("Good")],
    "openai-responses": [*OPENING, delta("output_text", "Good")],
    "ollama": [line("Good")],
}


@pytest.mark.parametrize("end", [[], [DONE]], ids=["", "then [DONE]"])
@pytest.mark.parametrize("dialect", BEGUN)
@pytest.mark.parametrize("shape", ERRORS)
def test_an_error_is_one_in_each_shape_and_dialect(shape, dialect, end):
    payload, words, retryable = ERRORS[shape]
    body = sse(*BEGUN[dialect], payload, *end)
    check(failing(shape, dialect, body, words, retryable), *read_answer(dialect, body))


#: where an error may stand, with nothing or words of the answer before it
PLACES = {
    "in a field named error (llama.cpp)": b'error: {"code":400,"message":"It broke"}\n\n',
    "in a field named error, as text": b"error: It broke\n\n",
    "bare": b'{"error":{"message":"It broke"}}\n\n',
    "bare, on a line of its own": b'{"error":{"message":"It broke"}}\n',
    "bare, on several lines": b'{\n  "error": {\n    "message": "It broke"\n  }\n}\n',
    "as an event of this name": b'event: error\ndata: {"message":"It broke"}\n\n',
    "as text in an event of this name": b"event: error\ndata: It broke\n\n",
    "in a list of one": b'data: [{"error":{"message":"It broke"}}]\n\n',
    "bare, in a list": b'[{"error":{"message":"It broke"}}]\n\n',
    "bare, in a list on several lines": b'[{\n  "error": {\n    "message": "It broke"\n  }\n}\n]\n',
    "bare, indented": b'  {"error":{"message":"It broke"}}\n\n',
    "bare, after a line that only looks like JSON": b'{oops\n[1] done\n{"error":{"message":"It broke"}}\n\n',
    "in a field, before another name": b'error: {"message":"It broke"}\nevent: message\n\n',
    "in a field, amid an event": b'error: {"message":"It broke"}\ndata: [DONE]\n\n',
}


@pytest.mark.parametrize("block", [1, 7, 4096])
@pytest.mark.parametrize("end", [b"", b"data: [DONE]\n\n"], ids=["", "then [DONE]"])
@pytest.mark.parametrize("dialect", ["openai", "anthropic", "gemini", "openai-responses"])
@pytest.mark.parametrize("place", PLACES)
def test_an_error_is_one_wherever_it_stands(place, dialect, end, block):
    body = sse(*BEGUN[dialect], PLACES[place]) + end
    blocks = [body[at : at + block] for at in range(0, len(body), block)]
    check(failing(place, dialect, body, "It broke"), *read_answer(dialect, blocks))


@pytest.mark.parametrize("place", [place for place in PLACES if "only looks" not in place])
def test_an_error_before_the_first_word_is_one_over_a_socket(server, client, place):
    body = PLACES[place].lstrip() if place.startswith("bare") else PLACES[place]
    server.answer(Answer(body=body + b"data: [DONE]\n\n", content_type="text/event-stream"))
    came, error = read(client.stream("Go", resume="never"))
    assert came == []
    assert isinstance(error, StreamError)
    assert "It broke" in str(error)


def test_a_bare_object_without_its_line_end_is_read_at_the_end():
    body = sse(*GOOD) + b'{"error":{"message":"It broke"}}'
    check(failing("", "openai", body, "It broke"), *read_answer("openai", body))


@pytest.mark.parametrize("end", ["", "\n"])
def test_an_error_in_a_field_at_the_end_is_read_without_its_blank_line(end):
    body = sse(*GOOD) + f"error: It broke{end}".encode()
    check(failing("", "openai", body, "It broke"), *read_answer("openai", body))


def test_a_bare_error_after_a_mark_of_the_byte_order_is_read():
    body = b'\xef\xbb\xbf{"error":{"message":"It broke"}}\n\n' + sse(DONE)
    assert "It broke" in str(read(sheepsse.iter_chunks(stream_events([body]), "openai", choices=1))[1])


def test_lines_that_are_no_fields_and_no_json_mean_nothing_still():
    lines = [b"{oops}\n", b"errors: none\n\n", b"warning: {}\n\n", b"[INFO] on\n\n", b"[\n\n", b"error:\n\n"]
    body = sse(*GOOD, *lines, b"error: null\n\n", STOP, DONE)
    check(Case("", "openai", body), *read_answer("openai", body))


def test_a_bare_end_marker_is_one():
    body = sse(*GOOD, b"[DONE]\n\n", *says(" more"))
    check(Case("", "openai", body, finish=None), *read_answer("openai", body))


BESIDE = {
    "code": ({"code": 502, **oops()}, True),
    "a code as text": ({"code": "InvalidParameter", **oops()}, False),
    "status": ({"status_code": 429, **oops()}, True),
    "error": ({"error": oops()}, False),
    "error_message": ({"error_message": "It broke"}, False),
    "x_groq": ({"x_groq": {"error": "It broke"}}, False),
}


@pytest.mark.parametrize("name", BESIDE)
def test_an_error_beside_choices_is_one(name):
    fields, retryable = BESIDE[name]
    body = sse(*GOOD, {**chunk({"content": "!"}), **fields}, STOP, DONE)
    check(failing(name, "openai", body, "It broke", retryable, text="Good!"), *read_answer("openai", body))


def test_a_detail_beside_choices_or_candidates_is_no_error():
    for dialect, end in (("openai", STOP), ("gemini", said("", finish="STOP"))):
        body = sse(*BEGUN[dialect], {**end, "detail": "low"})
        check(Case("", dialect, body), *read_answer(dialect, body))


@pytest.mark.parametrize(
    "error", [{"code": 0, "message": ""}, {"code": None, "message": None}, {"code": "", "message": "success"}, {}]
)
def test_an_error_object_that_says_that_all_is_well_is_none(error):
    body = sse(*says("Good", error=error), {**STOP, "error": error}, DONE)
    check(Case("", "openai", body), *read_answer("openai", body))


@pytest.mark.parametrize("fields", [{"error_code": 0, "error_msg": "success"}, {"code": 10000, "msg": "SUCCESS"}])
def test_a_message_that_says_that_all_is_well_is_no_error(fields):
    body = sse(*says("Good", **fields), {**STOP, **fields}, DONE)
    check(Case("", "openai", body), *read_answer("openai", body))


@pytest.mark.parametrize("code", [0, "0", 200, 20000, "", "success", "OK", "None", "false"])
def test_a_code_that_says_that_all_is_well_is_no_error(code):
    fields = {"code": code, "message": "Success", "error": None, "errors": [], "detail": None}
    well = {**fields, "base_resp": {"status_code": 0, "status_msg": "success"}}
    body = sse(*says("Good", **well), {"choices": [], **well}, {**STOP, **well}, DONE)
    check(Case("", "openai", body), *read_answer("openai", body))


def test_an_error_inside_a_choice_is_one():
    choice = {"index": 0, "delta": {"content": "!"}, "finish_reason": "error", "error": oops(code=502)}
    body = sse(*GOOD, {"choices": [{**choice, "native_finish_reason": "error"}]}, DONE)
    check(failing("", "openai", body, "It broke", True, text="Good!"), *read_answer("openai", body))
    body = sse(*GOOD, chunk({"content": "!", "error": oops()}), STOP, DONE)
    check(failing("", "openai", body, "It broke", text="Good!"), *read_answer("openai", body))
    candidate = {**said("!")["candidates"][0], "error": oops(code=502)}
    body = sse(*BEGUN["gemini"], {"candidates": [candidate]})
    check(failing("", "gemini", body, "It broke", True, text="Good!"), *read_answer("gemini", body))


@pytest.mark.parametrize("field", ["message", "status"])
def test_what_came_in_another_dialect_is_an_error_of_the_answer(field):
    """A proxy that speaks OpenAI's words for its own failures, whatever it relays"""
    for dialect in BEGUN:
        body = sse(*BEGUN[dialect], {field: 503 if field == "status" else "It broke", "message": "It broke"})
        assert "It broke" in str(read_answer(dialect, body)[1])


#: finish reasons that mean a failure, and whether it may be retried
FAILURES = {
    "error": False,
    "model_error": False,
    "cancelled": False,
    "network_error": True,
    "abort": True,
    "insufficient_system_resource": True,
    "failed": False,
    "canceled": False,
    "aborted": True,
    "overloaded": True,
}


def ended_by(dialect, reason):
    return {
        "openai": sse(*GOOD, chunk(finish=reason), DONE),
        "anthropic": named(*BEGUN["anthropic"], *message_end(reason)),
        "gemini": sse(*BEGUN["gemini"], said("", finish=reason.upper())),
        "ollama": lines(line("Good"), last(reason)),
    }[dialect]


@pytest.mark.parametrize("dialect", ["openai", "anthropic", "gemini", "ollama"])
@pytest.mark.parametrize("reason", FAILURES)
def test_a_finish_reason_that_names_a_failure_is_one(reason, dialect):
    kind = StreamInterrupted if FAILURES[reason] else StreamError
    case = failing("", dialect, ended_by(dialect, reason), reason, FAILURES[reason], kind)
    check(case, *read_answer(dialect, case.body))


@pytest.mark.parametrize("reason", ["stop", "error"])
def test_a_failure_that_only_the_native_finish_reason_names_is_one(reason):
    choice = {"index": 0, "delta": {}, "finish_reason": reason, "native_finish_reason": "network_error"}
    body = sse(*GOOD, {"choices": [choice]}, DONE)
    chunks, error = read_answer("openai", body)
    assert sheepsse.collect(chunks).text == "Good"
    assert isinstance(error, (StreamError, StreamInterrupted))


@pytest.mark.parametrize("dialect", ["openai", "anthropic", "gemini", "ollama"])
@pytest.mark.parametrize(
    ("reason", "finish"),
    [("sensitive", "refusal"), ("model_context_window_exceeded", "length"), ("whatever", "other")],
)
def test_a_finish_reason_is_the_same_in_each_dialect(reason, finish, dialect):
    case = Case("", dialect, ended_by(dialect, reason), finish=finish)
    check(case, *read_answer(dialect, case.body))


def test_a_failure_that_may_pass_is_resumed(server, client):
    server.answer(
        Answer(body=sse(ROLE, chunk(finish="network_error"), DONE)),
        Answer(body=sse({"error": "Model is overloaded"}, DONE)),
        Answer(text="Good day"),
    )
    stream = client.stream("Go", retry=sheepsse.Retry(3, base_delay=0))
    assert "".join(stream) == "Good day"
    assert (stream.continuity, len(server.requests)) == ("restarted", 3)


def test_a_failure_that_will_never_pass_is_requested_once(server, client):
    server.answer(Answer(body=sse(*GOOD, chunk(finish="model_error"), DONE)))
    came, error = read(client.stream("Go", retry=sheepsse.Retry(3, base_delay=0)))
    assert (came, type(error), len(server.requests)) == (["Good"], StreamError, 1)


# 2. A vendor's pause is not an end

SEARCH = {"type": "server_tool_use", "id": "s-1", "name": "find", "input": {}}
PAUSED_BLOCKS = [*text_block(0, "Good"), *block(1, SEARCH)]
CONTAINER = {"id": "container-1", "expires_at": "2026-12-01T00:00:00Z"}


def anthropic_pause(reason="pause_turn", is_late=True):
    start, (delta, stop) = message_start(), message_end(reason)
    (delta["delta"] if is_late else start["message"])["container"] = CONTAINER
    return named(start, *PAUSED_BLOCKS, delta, stop)


def gemini_pause(**fields):
    paused = said("Good", finish="CONTINUATION", **tokens())
    paused["candidates"][0].update(fields)
    return sse(paused)


PAUSED = [
    (
        "anthropic",
        anthropic_pause(),
        {
            "content": [
                {"type": "text", "text": "Good"},
                SEARCH,
            ],
            "container": "container-1",
        },
    ),
    (
        "anthropic",
        anthropic_pause(is_late=False),
        {"content": [{"type": "text", "text": "Good"}, SEARCH], "container": "container-1"},
    ),
    ("anthropic", anthropic_pause("compaction"), None),
    (
        "gemini",
        sse(
            {**said("Go"), "candidates": [{**said("Go")["candidates"][0], "continuationToken": "QUJD"}]},
            said("od", finish="CONTINUATION"),
        ),
        {"continuationToken": "QUJD"},
    ),
    ("gemini", gemini_pause(continuationToken="QUJD"), {"continuationToken": "QUJD"}),
    ("gemini", gemini_pause(), {}),
    ("openai", sse(*GOOD, chunk(finish="pause_turn"), DONE), {}),
]


@pytest.mark.parametrize(("dialect", "body", "pause"), PAUSED)
def test_a_pause_is_no_end_and_says_what_continues_it(dialect, body, pause):
    chunks, error = read_answer(dialect, body)
    check(failing("", dialect, body, "paused", kind=StreamInterrupted), chunks, error)
    assert error.partial.finish_reason == chunks[-1].finish_reason
    if pause is not None:
        assert error.resume_point.pause == pause
    assert json.loads(json.dumps(error.resume_point))[-1] == error.resume_point.pause


def test_a_pause_of_one_message_is_one_too(server):
    message = {
        **message_start()["message"],
        "content": [{"type": "text", "text": "Good"}],
        "stop_reason": "pause_turn",
        "container": CONTAINER,
    }
    server.answer(Answer(body=json.dumps(message).encode(), content_type="application/json"))
    with asking(server, dialect="anthropic", base_url=server.origin) as client:
        with pytest.raises(StreamInterrupted, match="paused") as caught:
            client.complete("Go")
    assert caught.value.partial.text == "Good"
    assert caught.value.resume_point.pause == {"content": message["content"], "container": "container-1"}


def test_a_pause_is_not_requested_again(server):
    server.answer(Answer(body=anthropic_pause()))
    with asking(server, dialect="anthropic", base_url=server.origin, retry=3) as client:
        _, error = read(client.stream("Go"))
    assert (type(error), len(server.requests)) == (StreamInterrupted, 1)
    assert error.partial.usage.output_tokens == 4


# 3. A finish reason is provisional

EACH_STOPS = {
    "openai": [chunk({"content": word}, "stop") for word in ("Good", " day", "!")],
    "gemini": [said(word, finish="STOP") for word in ("Good", " day", "!")],
}


@pytest.mark.parametrize("framing", ["chunked", "length"])
@pytest.mark.parametrize("dialect", EACH_STOPS)
def test_a_connection_lost_after_text_that_followed_a_finish_reason_is_a_loss(server, clients, dialect, framing):
    body = sse(*EACH_STOPS[dialect])
    server.answer(Answer(body=body + b": more\n\n" * 9, framing=framing, cut_at=len(body) + 30))
    came, error = read(clients[dialect].stream("Go", resume="never"))
    assert "".join(came) == "Good day!"
    assert isinstance(error, StreamInterrupted)


@pytest.mark.parametrize("framing", local_provider.FRAMINGS)
@pytest.mark.parametrize("dialect", EACH_STOPS)
def test_the_end_of_the_body_ends_an_answer_whose_every_chunk_has_a_finish_reason(server, clients, dialect, framing):
    server.answer(Answer(body=sse(*EACH_STOPS[dialect]), framing=framing))
    stream = clients[dialect].stream("Go", resume="never")
    assert "".join(stream) == "Good day!"
    assert stream.completion.complete


def test_an_answer_whose_chunks_have_finish_reasons_is_waited_for_as_long_as_others_are(server, client, monkeypatch):
    monkeypatch.setattr(sheepsse, "_USAGE_WAIT", 0.05)
    first, second = EACH_STOPS["openai"][:2], EACH_STOPS["openai"][2:]
    more = chunk({"content": " And more."}, "stop")
    server.answer(Answer(events=[sse(*first, *second), sse(more), sse(DONE)], pace=0.4))
    assert "".join(client.stream("Go", resume="never")) == "Good day! And more."


def test_an_answer_killed_between_chunks_that_have_finish_reasons_is_not_taken_for_whole(server, client, tmp_path):
    server.answer(Answer(body=sse(*EACH_STOPS["openai"]), stall_after=2), Answer(text="Good day!"))
    stream = client.stream("Go", checkpoint=tmp_path, resume="never")
    assert [next(stream), next(stream)] == ["Good", " day"]
    del stream  # as a kill leaves it: what was returned is kept, and no more
    again = client.stream("Go", checkpoint=tmp_path)
    assert "".join(again) == "Good day!"
    assert again.completion.complete
    assert len(server.requests) == 2


def test_a_point_amid_chunks_that_have_finish_reasons_is_not_the_end(server, client):
    body = sse(*EACH_STOPS["openai"])
    server.answer(Answer(body=body + b": more\n\n" * 9, cut_at=len(body) + 30))
    _, error = read(client.stream("Go", resume="never"))
    _, again = read(client.stream("Go", resume_from=json.loads(json.dumps(error.resume_point._asdict()))))
    assert isinstance(again, StreamInterrupted)


# 4. Whole answers

ENDS = {
    "openai": [STOP],
    "anthropic": [message_end()[0]],
    "gemini": [said("", finish="STOP", **tokens())],
    "openai-responses": [COMPLETED],
    "ollama": [last()],
}


@pytest.mark.parametrize("after", [[DONE], [DONE, "{broken", "x"]], ids=["", "and what is broken after it"])
@pytest.mark.parametrize("dialect", ENDS)
def test_done_ends_every_dialect(dialect, after):
    body = sse(*BEGUN[dialect], *ENDS[dialect], *after)
    check(Case("", dialect, body), *read_answer(dialect, body))


@pytest.mark.parametrize("dialect", ["anthropic", "gemini", "openai-responses", "ollama"])
def test_done_without_a_finish_reason_is_the_end_of_a_stream_that_is_not_whole(dialect):
    body = sse(*BEGUN[dialect], DONE)
    check(failing("", dialect, body, "end marker", True, StreamInterrupted), *read_answer(dialect, body))


@pytest.mark.parametrize("broken", ["{broken", "17", '"text"', "{" * 50], ids=str)
@pytest.mark.parametrize("dialect", ["openai", "gemini"])
def test_what_is_broken_after_the_finish_reason_is_ignored(dialect, broken):
    body = sse(*BEGUN[dialect], *ENDS[dialect], broken)
    check(Case("", dialect, body), *read_answer(dialect, body))
    body = sse(*BEGUN[dialect], broken, *ENDS[dialect])
    chunks, error = read_answer(dialect, body)
    assert isinstance(error, InvalidStreamError)


def test_an_error_after_the_finish_reason_is_one_still():
    body = sse(*GOOD, STOP, {"error": oops()}, DONE)
    check(failing("", "openai", body, "It broke"), *read_answer("openai", body))


@pytest.mark.parametrize("dialect", BEGUN)
@pytest.mark.parametrize("comment", [": keepalive", ":", " : ping"])
def test_data_that_is_only_a_comment_is_skipped(dialect, comment):
    start, end = BEGUN[dialect], ENDS[dialect]
    body = sse(comment, *start, comment, *end, *message_end()[1:] if dialect == "anthropic" else [])
    check(Case("", dialect, body), *read_answer(dialect, body))


@pytest.mark.parametrize("dialect", BEGUN)
def test_a_raw_control_character_in_a_string_is_read(dialect):
    end = [*ENDS[dialect], *(message_end()[1:] if dialect == "anthropic" else [])]
    body = sse(*BEGUN[dialect], *end).replace(b"Good", b"Go\tod\x01")
    check(Case("", dialect, body, text="Go\tod\x01"), *read_answer(dialect, body))


def whole(*parts):
    message = {"type": "message", "content": [{"type": "output_text", "text": part} for part in parts]}
    return response("completed", output=[message])


@pytest.mark.parametrize("parts", [["Good day"], ["Good ", "day"], [" day"], [""], []])
def test_a_response_whose_whole_is_its_text_or_the_end_of_it_is_accepted(parts):
    body = numbered(*OPENING, delta("output_text", "Good"), delta("output_text", " day"), whole(*parts))
    check(Case("", "openai-responses", body, text="Good day"), *read_answer("openai-responses", body))


@pytest.mark.parametrize("part", ["Good night", "day Good", "x"])
def test_a_response_whose_whole_contradicts_its_text_is_an_error(part):
    body = numbered(*OPENING, delta("output_text", "Good"), delta("output_text", " day"), whole(part))
    case = failing("", "openai-responses", body, "its whole", kind=InvalidStreamError, text="Good day")
    check(case, *read_answer("openai-responses", body))


# 5. Choices, and halves of characters


def indexed(*pairs, finish="stop"):
    """Words, each with the index of its choice, and a finish reason with the last"""
    *first, (index, word) = pairs
    return [*(chunk({"content": each}, index=at) for at, each in first), chunk({"content": word}, finish, index)]


CHOICES = [
    chat("an index that counts tokens", *indexed((1, "Go"), (2, "o"), (3, "d"))),
    chat("an index that is always 1", *indexed((1, "Go"), (1, "od"))),
    chat(
        "a tool call in a second choice",
        *GOOD,
        chunk({"tool_calls": [call(0, *LOOK)]}, "tool_calls", 1),
        tool_calls=(LOOK,),
        finish="tool_calls",
    ),
    chat(
        "two choices in one event: choice 0 is the answer",
        {
            "choices": [
                {"index": 0, "delta": {"content": "Good"}, "finish_reason": "stop"},
                {"index": 1, "delta": {"content": "Bad"}, "finish_reason": "stop"},
            ]
        },
    ),
    chat(
        "two choices in turns: choice 0 is the answer",
        ROLE,
        *indexed((0, "Go"), (1, "B"), (1, "ad")),
        *indexed((0, "od")),
    ),
    chat("an index that counts tokens from 0", *indexed((0, "Go"), (1, "o"), (2, "d"))),
    chat("two choices in turns, of which choice 1 is first", *indexed((1, ""), (0, "Go"), (1, "B"), (0, "od"))),
    chat(
        "two choices in one event, of which choice 1 is first",
        {"choices": [{"index": 1, "delta": {"content": "Bad"}}, {"index": 0, "delta": {"content": "Good"}}]},
        STOP,
    ),
    Case("two candidates", "gemini", sse(said("Go"), said("Bad", index=1, finish="STOP"), said("od", finish="STOP"))),
    Case(
        "a call in a second candidate",
        "gemini",
        sse(said("Good"), said(called("look", {"at": 1}), index=1, finish="STOP")),
        tool_calls=(("", "look", '{"at": 1}'),),
        finish="tool_calls",
    ),
]


@pytest.mark.parametrize("case", CHOICES, ids=lambda case: case.name)
def test_of_one_choice_all_are_parts_but_for_two_texts_at_a_time(case):
    check(case, *read_answer(case.dialect, case.body))


def test_choices_are_kept_apart_where_several_or_nobody_knows_how_many_were_requested():
    body = sse(*indexed((0, "Go"), (1, "Bad")), *indexed((0, "od")), DONE)
    for choices in (2, None):
        chunks, _ = read_answer("openai", body, choices=choices)
        assert [sheepsse.collect(chunks, index).text for index in (0, 1)] == ["Good", "Bad"]


def test_calls_of_several_choices_are_kept_apart():
    events = [chunk({"tool_calls": [call(0, *made)]}, index=index) for index, made in enumerate((LOOK, HEAR))]
    body = sse(*events, chunk(finish="tool_calls"), chunk(finish="tool_calls", index=1), DONE)
    chunks, _ = read_answer("openai", body, choices=2)
    made = [sheepsse.collect(chunks, index).tool_calls for index in (0, 1)]
    assert [[(each.index, each.id, each.arguments) for each in calls] for calls in made] == [
        [(0, "t-1", LOOK[2])],
        [(0, "t-2", HEAR[2])],
    ]


HIGH, LOW, LONE = "\ud83d", "\udc11", "\ufffd"
HALVES = {
    (f"A {HIGH}", f"{LOW}!"): "A 🐑!",
    (HIGH, LOW): "🐑",
    (f"A {HIGH}", "!"): f"A {LONE}!",
    (f"A {HIGH}", f"{HIGH}{LOW}"): f"A {LONE}🐑",
    ("A", f"{LOW}!"): f"A{LONE}!",
    ("A", f"!{HIGH}"): f"A!{LONE}",
    (f"A{HIGH}", "", f"{LOW}"): "A🐑",
    (f"{LOW}{HIGH}", f"{LOW}"): f"{LONE}🐑",
}


def in_field(field, pieces):
    """A stream whose pieces are in this field"""
    made = {
        "text": lambda piece: chunk({"content": piece}),
        "reasoning": lambda piece: chunk({"reasoning_content": piece}),
        "refusal": lambda piece: chunk({"refusal": piece}),
        "arguments": lambda piece: calls(call(0, None, None, piece)),
    }[field]
    first = [calls(call(0, "t-1", "look", ""))] if field == "arguments" else []
    # one event after another escapes what is no character, as servers do
    return b"".join(f"data: {json.dumps(payload)}\n\n".encode() for payload in [*first, *map(made, pieces), STOP])


@pytest.mark.parametrize("field", ["text", "reasoning", "refusal", "arguments"])
@pytest.mark.parametrize("pieces", HALVES, ids=ascii)
def test_halves_of_a_character_are_joined_and_a_lone_half_is_replaced(pieces, field):
    chunks, error = read_answer("openai", in_field(field, pieces) + sse(DONE))
    answer = sheepsse.collect(chunks)
    said = answer.tool_calls[0].arguments if field == "arguments" else getattr(answer, field)
    assert (said, error) == (HALVES[pieces], None)
    said.encode()


def test_halves_are_of_their_own_field_and_choice():
    first = {"content": HIGH, "reasoning_content": f"H{HIGH}"}
    other = {"content": f"B{HIGH}"}
    events = [chunk(first), chunk(other, index=1), chunk({"content": LOW}), chunk({"content": "!"}, "stop", 1)]
    body = b"".join(f"data: {json.dumps(payload)}\n\n".encode() for payload in [*events, STOP])
    chunks, _ = read_answer("openai", body + sse(DONE), choices=2)
    assert sheepsse.collect(chunks)[:2] == ("🐑", f"H{LONE}")
    assert sheepsse.collect(chunks, 1).text == f"B{LONE}!"


@pytest.mark.parametrize("rest", [f"{LOW}!", "", None])
def test_halves_of_a_response_are_joined_with_what_its_whole_has(rest):
    pieces = [delta("output_text", f"A {HIGH}"), *([] if rest is None else [delta("output_text", rest)])]
    events = [*OPENING, *pieces, done("output_text", "text", "A 🐑!"), whole("A 🐑!")]
    body = b"".join(f"data: {json.dumps(payload)}\n\n".encode() for payload in events)
    check(Case("", "openai-responses", body, text="A 🐑!"), *read_answer("openai-responses", body))


def test_half_a_character_before_a_loss_is_no_text(server, client):
    server.answer(Answer(body=in_field("text", ["A", HIGH]), cut_after=2))
    came, error = read(client.stream("Go", resume="never"))
    assert (came, error.partial.text) == (["A"], "A")


@pytest.mark.parametrize("by", ["checkpoint", "resume_from"])
def test_no_other_call_resumes_after_half_a_character(server, client, tmp_path, by):
    pieces = in_field("text", ["A", "B", HIGH, LOW]).split(b"data: ")[1:]
    body = b"".join(b"id: %d\ndata: %b" % (number, piece) for number, piece in enumerate(pieces, 1))
    for cut_after in (2, 3):
        options = {"checkpoint": tmp_path / str(cut_after)} if by == "checkpoint" else {}
        server.answer(Answer(body=body, cut_after=cut_after))
        came, error = read(client.stream("Go", resume="never", **options))
        assert came == ["A", "B"]
        server.requests.clear()
        server.answer(Answer(body=body))
        read(client.stream("Go", resume="replay", **(options or {"resume_from": error})))
        ids = [request.headers["Last-Event-ID"] for request in server.requests]
        assert ids == (["2"] if cut_after == 2 else [None] if by == "checkpoint" else [])


# 6. What a Responses stream has only in .done events and items


def done(kind, member, text, **fields):
    return {"type": f"response.{kind}.done", "output_index": 0, "item_id": "i-0", member: text, **fields}


def message(text, kind="output_text", member="text"):
    return item("done", id="i-0", type="message", content=[{"type": kind, member: text}])


REASONING = item("done", id="i-0", type="reasoning", summary=[{"text": "Hm"}, {"text": "Ah"}], content=[])
DONE_ONLY = [
    ("text in output_text.done", [done("output_text", "text", "Good")], {}),
    ("the rest of a text", [delta("output_text", "Go"), done("output_text", "text", "Good")], {}),
    ("text in an item", [message("Good")], {}),
    ("text in an item after its pieces", [*spoken("Go", "od")], {}),
    ("text three times", [done("output_text", "text", "Good"), message("Good"), whole("Good")], {}),
    (
        "text under numbers that change (Copilot)",
        [
            {**delta("output_text", "Good"), "item_id": "a"},
            {**done("output_text", "text", "Good"), "item_id": "b"},
            message("Good"),
        ],
        {},
    ),
    ("a refusal", [done("refusal", "refusal", "No.")], {"text": "", "refusal": "No."}),
    ("a refusal in an item", [message("No.", "refusal", "refusal")], {"text": "", "refusal": "No."}),
    (
        "a refusal in the whole",
        [response("completed", output=[message("No.", "refusal", "refusal")["item"]])],
        {"text": "", "refusal": "No."},
    ),
    (
        "a summary",
        [done("reasoning_summary_text", "text", "Hm", summary_index=0), *spoken("Good", index=1)],
        {"reasoning": "Hm"},
    ),
    ("a summary in an item", [REASONING, *spoken("Good", index=1)], {"reasoning": "Hm\n\nAh"}),
    (
        "the rest of a summary",
        [delta("reasoning_summary_text", "Hm", summary_index=0), REASONING, *spoken("Good", index=1)],
        {"reasoning": "Hm\n\nAh"},
    ),
    ("a summary in the whole", [response("completed", output=[REASONING["item"], message("Good")["item"]])],
     {"reasoning": "Hm\n\nAh"}),
    (
        "arguments",
        [tool_added(0, "t-1", "look"), *tool_done(0, *LOOK)[:1]],
        {"text": "", "tool_calls": (LOOK,), "finish": "tool_calls"},
    ),
    (
        "the rest of arguments",
        [tool_added(0, "t-1", "look"), arguments(0, '{"at"'), *tool_done(0, *LOOK)],
        {"text": "", "tool_calls": (LOOK,), "finish": "tool_calls"},
    ),
    (
        "arguments of two calls, mixed",
        [
            tool_added(0, "t-1", "look"),
            tool_added(1, "t-2", "hear"),
            arguments(0, '{"at"'),
            arguments(1, '{"in"'),
            *tool_done(0, *LOOK),
            *tool_done(1, *HEAR),
        ],
        {"text": "", "tool_calls": (LOOK, HEAR), "finish": "tool_calls"},
    ),
    (
        "a summary, and again in the whole",
        [
            delta("reasoning_summary_text", "Hm", summary_index=0),
            delta("output_text", "Good", 1),
            response(
                "completed",
                output=[
                    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm"}]},
                    message("Good")["item"],
                ],
            ),
        ],
        {"reasoning": "Hm"},
    ),
    (
        "two texts that are equal",
        [done("output_text", "text", "Go"), done("output_text", "text", "Go", content_index=1), whole("Go", "Go")],
        {"text": "GoGo"},
    ),
    ("a part", [{"type": "response.content_part.done", "output_index": 0, "content_index": 0,
                 "part": {"type": "output_text", "text": "Good"}}], {}),
    ("a part of a summary", [{"type": "response.reasoning_summary_part.done", "output_index": 0, "summary_index": 0,
                              "part": {"type": "summary_text", "text": "Hm"}}, *spoken("Good", index=1)],
     {"reasoning": "Hm"}),
    ("reasoning as text", [item("done", id="i-0", type="reasoning", content=[{"type": "text", "text": "Hm"}]),
                           *spoken("Good", index=1)], {"reasoning": "Hm"}),
    (
        "parts that nothing in an answer has",
        [item("done", id="i-0", type="message", content=[{"type": "audio", "data": "="}, 4, {"text": "no type"}]),
         *spoken("Good", index=1)],
        {},
    ),
    (
        "two calls with equal arguments",
        [tool_added(0, "t-1", "look"), tool_added(1, "t-2", "look"), *tool_done(0, *LOOK),
         *tool_done(1, "t-2", "look", LOOK[2])],
        {"text": "", "tool_calls": (LOOK, ("t-2", *LOOK[1:])), "finish": "tool_calls"},
    ),
    (
        "arguments that the call began with",
        [item("added", id="i-0", type="function_call", call_id="t-1", name="look", arguments=LOOK[2]),
         arguments(0, '{"at"'), arguments(0, ": 1}"), *tool_done(0, *LOOK)],
        {"text": "", "tool_calls": (LOOK,), "finish": "tool_calls"},
    ),
    (
        "an empty object before the arguments",
        [tool_added(0, "t-1", "look"), arguments(0, "{}"), arguments(0, LOOK[2]), *tool_done(0, *LOOK)],
        {"text": "", "tool_calls": (LOOK,), "finish": "tool_calls"},
    ),
    (
        "calls without ids in the whole alone",
        [response("completed", output=[
            {"type": "function_call", "name": name, "arguments": text} for _, name, text in (LOOK, HEAR)
        ])],
        {"text": "", "tool_calls": (("", *LOOK[1:]), ("", *HEAR[1:])), "finish": "tool_calls"},
    ),
    (
        "arguments before their call",
        [*tool_done(0, *LOOK)],
        {"text": "", "tool_calls": (LOOK,), "finish": "tool_calls"},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "payloads", "fields"), DONE_ONLY, ids=[name for name, _, _ in DONE_ONLY])
def test_what_only_the_done_events_of_a_response_have_is_returned_once(name, payloads, fields):
    end = [] if payloads[-1]["type"] == "response.completed" else [response("completed")]
    body = numbered(*OPENING, *payloads, *end)
    check(Case(name, "openai-responses", body, **fields), *read_answer("openai-responses", body))


#: how a response ends that is not whole, whatever the name of its last event says
UNFINISHED = [
    (response("failed", error={"code": "server_error", "message": "It broke"}), StreamError, True, "It broke"),
    (response("failed"), StreamError, False, "without a reason"),
    (response("completed", error={"message": "It broke"}), StreamError, False, "It broke"),
    (response("completed", status="failed", error={"message": "It broke"}), StreamError, False, "It broke"),
    ({**response("failed"), "error": {"code": 503, "message": "It broke"}}, StreamError, True, "It broke"),
    (response("cancelled"), StreamInterrupted, False, "cancelled"),
    (response("completed", status="cancelled"), StreamInterrupted, False, "cancelled"),
    ({"type": "response.error", "error": {"code": 503, "message": "It broke"}}, StreamError, True, "It broke"),
    ({"type": "error", "code": "server_error", "message": "It broke"}, StreamError, True, "It broke"),
    ({**delta("output_text", "!"), "error": {"message": "It broke"}}, StreamError, False, "It broke"),
]


@pytest.mark.parametrize(("end", "kind", "retryable", "words"), UNFINISHED)
def test_a_response_that_failed_is_no_answer(end, kind, retryable, words):
    body = numbered(*BEGUN["openai-responses"], end)
    check(failing("", "openai-responses", body, words, retryable, kind), *read_answer("openai-responses", body))


@pytest.mark.parametrize("kind", ["incomplete", "completed"])
def test_a_response_that_is_cut_short_says_so(kind):
    end = response(kind, status="incomplete", incomplete_details={"reason": "max_output_tokens"})
    body = numbered(*BEGUN["openai-responses"], end)
    check(Case("", "openai-responses", body, finish="length"), *read_answer("openai-responses", body))


# 7. Reasoning

REASONINGS = {
    "a str": {"reasoning_content": "Hm"},
    "a str of another name": {"reasoning": "Hm"},
    "reasoning_text (Copilot)": {"reasoning_text": "Hm"},
    "an object": {"reasoning_content": {"text": "Hm"}},
    "an object of another name": {"reasoning": {"content": "Hm"}},
    "a list": {"reasoning_content": [{"type": "text", "text": "H"}, {"text": "m"}]},
    "details": {"reasoning_details": [{"type": "reasoning.summary", "summary": "Hm"}]},
    "twice": {"reasoning_content": "Hm", "reasoning": "Hm", "reasoning_details": [{"text": "Hm"}]},
    "an empty one and another": {"reasoning_content": "", "reasoning": "Hm"},
    "a part with a summary": {"content": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm"}]}]},
    "a part with a text": {"content": [{"type": "reasoning", "text": "Hm"}]},
    "a part with thinking": {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm"}]}]},
    "a part with thinking as text": {"content": [{"type": "thinking", "thinking": "Hm", "signature": "s"}]},
    "one part and no list": {"content": {"type": "reasoning", "text": "Hm"}},
    **{
        f"a part of type {kind}": {"content": [{"type": kind, "text": "Hm"}]}
        for kind in ("reasoning_text", "reasoning_content", "summary_text")
    },
    "lists in lists": {"reasoning_content": [[{"text": "H"}], [{"text": "m"}]]},
}


@pytest.mark.parametrize("shape", REASONINGS)
def test_reasoning_is_read_in_each_shape(shape):
    body = sse(chunk(REASONINGS[shape]), *GOOD, STOP, DONE)
    check(Case(shape, "openai", body, reasoning="Hm"), *read_answer("openai", body))


def test_the_text_of_a_part_goes_where_its_type_says():
    parts = [
        {"type": "output_text", "text": "Go"},
        {"type": "reference", "reference_ids": [0]},
        {"type": "reasoning", "text": "Hm"},
        {"type": "refusal", "refusal": "No."},
        {"type": "text", "text": "od"},
        {"type": "text", "text": {"deep": [[[[["x"]]]]]}},
    ]
    body = sse(chunk({"content": parts}), STOP, DONE)
    check(Case("", "openai", body, reasoning="Hm", refusal="No."), *read_answer("openai", body))


def test_opaque_reasoning_goes_back_with_the_answer():
    deltas = [{"reasoning_text": "H"}, {"reasoning_opaque": "s-1"}, {"reasoning_text": "m"}]
    chunks, _ = read_answer("openai", sse(*map(chunk, deltas), calls(call(0, *LOOK), finish="tool_calls"), DONE))
    (sent,) = sheepsse.DIALECTS["openai"].body([sheepsse.collect(chunks).message], "m", {}, True)["messages"]
    assert (sent["reasoning_text"], sent["reasoning_opaque"]) == ("Hm", "s-1")


def test_reasoning_that_is_an_object_goes_back_with_the_answer():
    deltas = [{"reasoning_content": {"text": "Hm"}}, {"tool_calls": [call(0, *LOOK)]}]
    chunks, _ = read_answer("openai", sse(*map(chunk, deltas), chunk(finish="tool_calls"), DONE))
    (sent,) = sheepsse.DIALECTS["openai"].body([sheepsse.collect(chunks).message], "m", {}, True)["messages"]
    assert sent["reasoning_content"] == "Hm"


# 8. Tool calls

WHOLE = call(0, *LOOK)
NO_ID = (("", "look", '{"at": 1}'),)
CALLS = {
    "one object and no list": ([{"tool_calls": WHOLE}], (LOOK,)),
    "an empty object before the arguments": (
        [call(0, "t-1", "look", "{}"), call(0, arguments='{"at":'), call(0, arguments=" 1}")],
        (LOOK,),
    ),
    "an empty object that is all": ([call(0, "t-1", "look", "{}")], (("t-1", "look", "{}"),)),
    "an empty object before another call": (
        [call(0, "t-1", "look", "{}"), call(1, *HEAR)],
        (("t-1", "look", "{}"), HEAR),
    ),
    "an empty object in the arguments": (
        [call(0, "t-1", "look", '{"at": '), call(0, arguments="{}"), call(0, arguments="}")],
        (("t-1", "look", '{"at": {}}'),),
    ),
    "arguments that are an object": (
        [{"index": 0, "id": "t-1", "function": {"name": "look", "arguments": {"at": 1}}}],
        (LOOK,),
    ),
    "the whole again at the end": (
        [call(0, "t-1", "look", '{"at":'), call(0, arguments=" 1}"), call(0, *LOOK)],
        (LOOK,),
    ),
    "the whole again, spaced otherwise": ([WHOLE, call(0, arguments='{ "at" : 1 }')], (LOOK,)),
    "the whole again at the next index": (
        [call(0, "t-1", "look", '{"at":'), call(0, arguments=" 1}"), call(1, *LOOK)],
        (LOOK,),
    ),
    "pieces under an id and a growing index": (
        [call(0, "t-1", "look", '{"at"'), call(1, "t-1", arguments=": 1"), call(2, "t-1", arguments="}")],
        (LOOK,),
    ),
    "pieces with neither id nor name on the next index": (
        [call(0, "t-1", "look", '{"at"'), call(1, arguments=": 1}")],
        (LOOK,),
    ),
    "an id that comes later": ([call(0, name="look", arguments=""), call(0, "t-1", arguments='{"at": 1}')], (LOOK,)),
    "an id that is empty later (Qwen)": (
        [call(0, "t-1", "look", '{"at"'), call(0, "", "", ": 1}")],
        (LOOK,),
    ),
    "the whole again, after many pieces that could be whole": (
        [
            call(0, "t-1", "look", '{"at": "{}'),
            *(call(0, arguments="{}") for _ in range(5)),
            call(0, arguments='"}'),
            call(0, arguments='{"at": "' + "{}" * 6 + '"}'),
        ],
        (("t-1", "look", '{"at": "' + "{}" * 6 + '"}'),),
    ),
    "blanks before the arguments": (
        [call(0, "t-1", "look", " "), call(0, arguments=LOOK[2])],
        (("t-1", "look", f" {LOOK[2]}"),),
    ),
    "a part that says nothing": ([WHOLE, {"index": 1}, {"index": 0, "function": {}}], (LOOK,)),
    "the whole again with blanks before it": ([WHOLE, call(0, arguments=f" {LOOK[2]}")], (LOOK,)),
    "the whole again, then more of another call": (
        [WHOLE, call(1, *HEAR[:2], ""), call(0, *LOOK), call(1, arguments=HEAR[2])],
        (LOOK, HEAR),
    ),
    "two calls without arguments or ids at index 0": (
        [call(0, None, "look", ""), call(0, None, "hear", "")],
        (("", "look", ""), ("", "hear", "")),
    ),
    "an empty object after the call began": (
        [call(0, "t-1", "look", ""), call(0, arguments="{}")],
        (("t-1", "look", "{}"),),
    ),
    "free text, repeated": (
        [
            {"index": 0, "id": "t-1", "custom": {"name": "run", "input": '{"a":1}\n'}},
            {"index": 0, "custom": {"input": '{"a":1}\n'}},
        ],
        (("t-1", "run", '{"a":1}\n' * 2),),
    ),
    "two whole calls at index 0, with ids": ([call(0, *LOOK), call(0, *HEAR)], (LOOK, HEAR)),
    "two whole calls at index 0, without ids": (
        [call(0, None, *LOOK[1:]), call(0, None, *HEAR[1:])],
        (*NO_ID, ("", "hear", '{"in": 2}')),
    ),
    "two calls of one tool at index 0, without ids": (
        [call(0, None, *LOOK[1:]), call(0, None, "look", '{"at": 2}')],
        (*NO_ID, ("", "look", '{"at": 2}')),
    ),
    "two calls without arguments at index 0, without ids": (
        [call(0, None, "look", "{}"), call(0, None, "hear", "{}")],
        (("", "look", "{}"), ("", "hear", "{}")),
    ),
    "two calls under one id": (
        [call(0, "x", *LOOK[1:]), call(1, "x", "look", ""), call(1, arguments='{"at"'), call(1, arguments=": 2}")],
        (("x", "look", '{"at": 1}'), ("x", "look", '{"at": 2}')),
    ),
    "parts without an index": (
        [{"id": "t-1", "function": {"name": "look", "arguments": ""}}, {"function": {"arguments": '{"at": 1}'}}],
        (LOOK,),
    ),
    "free text that looks like a whole object and goes on": (
        [
            {"index": 0, "id": "t-1", "custom": {"name": "run", "input": "{}}"}},
            {"index": 0, "custom": {"input": "{x}"}},
            {"index": 0, "custom": {"input": "{y}"}},
        ],
        (("t-1", "run", "{}}{x}{y}"),),
    ),
    "braces amid a string": (
        [call(0, "t-1", "look", '{"at": "}'), call(0, arguments="{"), call(0, arguments='{}"}')],
        (("t-1", "look", '{"at": "}{{}"}'),),
    ),
}


@pytest.mark.parametrize("reason", ["tool_calls", "stop", None])
@pytest.mark.parametrize("shape", CALLS)
def test_calls_are_the_right_ones_once_whatever_their_parts(shape, reason):
    parts, expected = CALLS[shape]
    payloads = [chunk(part) if "tool_calls" in part else calls(part) for part in parts]
    body = sse(*payloads, *([chunk(finish=reason)] if reason else []), DONE)
    case = Case(shape, "openai", body, text="", tool_calls=expected, finish="tool_calls" if reason else None)
    check(case, *read_answer("openai", body))


REPEATED = {
    "gemini": sse(*[said(called("look", {"at": 1}, id="t-1"))] * 2, said("", finish="STOP")),
    "ollama": lines(*[line(tool_calls=[ollama_call("look", {"at": 1}, id="t-1")])] * 2, last("stop")),
}


@pytest.mark.parametrize("dialect", REPEATED)
def test_a_whole_call_that_is_repeated_under_its_id_is_one(dialect):
    case = Case("", dialect, REPEATED[dialect], text="", tool_calls=(LOOK,), finish="tool_calls")
    check(case, *read_answer(dialect, case.body))


@pytest.mark.parametrize("pieces", [["{}", '{"at"', ": 1}"], ['{"at"', ": 1}", LOOK[2]]])
def test_arguments_are_the_right_ones_once_in_anthropics_words(pieces):
    begun = {"type": "tool_use", "id": "t-1", "name": "look", "input": {}}
    deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in pieces]
    body = named(message_start(), *block(0, begun, *deltas), *message_end("tool_use"))
    case = Case("", "anthropic", body, text="", tool_calls=(LOOK,), finish="tool_calls")
    check(case, *read_answer("anthropic", body))


def test_many_braces_cost_time_linear_in_their_number():
    pieces = [call(0, "t-1", "look", '{"at": "'), *(call(0, arguments="{}}") for _ in range(20_000))]
    looked, parse = [], sheepsse._json
    open_call = sheepsse._OpenCall(0, "t-1", "look")
    try:
        sheepsse._json = lambda text: (looked.append(len(text)), parse(text))[1]
        for piece in pieces:
            open_call.take("", piece["function"]["arguments"])
    finally:
        sheepsse._json = parse
    assert sum(looked) < 100_000


@pytest.mark.parametrize(
    ("dialect", "body"),
    [
        ("anthropic", named(message_start(), *tool_block(0, "t-1", "look", '{"at": 1}'), *message_end("end_turn"))),
        ("gemini", sse(said(called("look", {"at": 1}, id="t-1"), finish="STOP"))),
        ("ollama", lines(line(tool_calls=[ollama_call("look", {"at": 1}, id="t-1")]), last("stop"))),
        ("openai-responses", numbered(*OPENING, *tool_done(0, *LOOK), COMPLETED)),
    ],
)
def test_an_answer_with_calls_finishes_with_calls_in_each_dialect(dialect, body):
    case = Case("", dialect, body, text="", tool_calls=(LOOK,), finish="tool_calls")
    check(case, *read_answer(dialect, body))


# 9. Counts


def counted(**usage):
    return sse(*GOOD, STOP, {"choices": [], "usage": usage}, DONE)


def thought(count):
    return {"completion_tokens_details": {"reasoning_tokens": count}}


TEN = {"prompt_tokens": 10, "completion_tokens": 5}
WRITES = {
    "cache_creation_input_tokens": 7,
    "cache_creation": {"ephemeral_5m_input_tokens": 3, "ephemeral_1h_input_tokens": 4},
    "cache_write_tokens": 7,
    "prompt_tokens_details": {"cache_write_tokens": 7},
}
USAGES = [
    ("reasoning beside the output (xAI)", {**TEN, "total_tokens": 23, **thought(8)},
     Usage(10, 13, 23, reasoning_tokens=8)),
    ("reasoning in the output", {**TEN, "total_tokens": 15, **thought(3)}, Usage(10, 5, 15, reasoning_tokens=3)),
    ("reasoning at the top (SGLang)", {**TEN, "total_tokens": 15, "reasoning_tokens": 3},
     Usage(10, 5, 15, reasoning_tokens=3)),
    ("a cost that is an object (Perplexity)", {**TEN, "cost": {"request_cost": 0.005, "total_cost": 0.0051}},
     Usage(10, 5, 15, cost=Decimal("0.0051"))),
    ("a cost that is an object without a total", {**TEN, "cost": {"request_cost": 0.005}}, Usage(10, 5, 15)),
    ("counts that are whole numbers with a point", {"prompt_tokens": 10.0, "completion_tokens": 5.0}, Usage(10, 5, 15)),
    ("Anthropic's names for reads (LiteLLM)", {**TEN, "cache_read_input_tokens": 4}, Usage(10, 5, 15, 4)),
    ("Responses' names", {"input_tokens": 10, "output_tokens": 5}, Usage(10, 5, 15)),
    ("a total that is too small", {**TEN, "total_tokens": 11}, Usage(10, 5, 15)),
    ("a count that no computer can have", {**TEN, "prompt_tokens": 1e22}, Usage(0, 5, 5)),
    ("reads in the details", {**TEN, "prompt_tokens_details": {"cached_tokens": 4}}, Usage(10, 5, 15, 4)),
    *((f"cache writes as {name}", {**TEN, name: value}, Usage(10, 5, 15, 0, 7)) for name, value in WRITES.items()),
]  # fmt: skip


@pytest.mark.parametrize(("name", "wire", "usage"), USAGES, ids=[name for name, _, _ in USAGES])
def test_a_usage_is_read_in_every_vendors_words(name, wire, usage):
    body = counted(**wire)
    check(Case(name, "openai", body, usage=usage), *read_answer("openai", body))


USAGES_OF_OTHERS = [
    ("anthropic", {"input_tokens": 9, "prompt_tokens": 13, "cache_read_input_tokens": 4, "output_tokens": 4},
     Usage(13, 4, 17, 4)),
    ("gemini", tokens(thoughtsTokenCount=8)["usageMetadata"], Usage(9, 12, 21, reasoning_tokens=8)),
    ("gemini", {**tokens(thoughtsTokenCount=3)["usageMetadata"], "totalTokenCount": 13},
     Usage(9, 4, 13, reasoning_tokens=3)),
    ("gemini", {**tokens()["usageMetadata"], "toolUsePromptTokenCount": 5}, Usage(14, 4, 18)),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "wire", "usage"), USAGES_OF_OTHERS)
def test_a_part_of_a_whole_is_added_where_the_whole_leaves_it_out(dialect, wire, usage):
    reader = sheepsse.DIALECTS[dialect]()
    assert reader.usage(wire) == usage


NO_COUNTS = ["NaN", "1e400", "-1e400", "-3", "true", '"7"', "1.5", "null", "[]", "{}"]


@pytest.mark.parametrize("value", NO_COUNTS)
def test_what_is_no_count_is_missing(value):
    body = counted(prompt_tokens=10, completion_tokens="X", total_tokens="X", cached_tokens="X")
    body = body.replace(b'"X"', value.encode())
    check(Case("", "openai", body, usage=Usage(10, 0, 10)), *read_answer("openai", body))
    body = counted(prompt_tokens="X", completion_tokens="X").replace(b'"X"', value.encode())
    check(Case("", "openai", body, usage=None), *read_answer("openai", body))


@pytest.mark.parametrize("value", ["NaN", "1e400", "-1e400", "-0.5", "true", '"7"', "null", "[]", "{}"])
def test_what_is_no_cost_is_missing(value):
    for cost in (value, f'{{"total_cost": {value}}}'):
        body = counted(**TEN, cost="X").replace(b'"X"', cost.encode())
        check(Case("", "openai", body, usage=Usage(10, 5, 15)), *read_answer("openai", body))


@pytest.mark.parametrize("value", NO_COUNTS)
def test_a_position_that_is_no_number_is_none_in_each_dialect(value):
    events = [
        ("openai", chunk({"content": "Good"}, "stop", "X")),
        ("gemini", said("Good", index="X", finish="STOP")),
    ]
    for dialect, payload in events:
        body = sse(payload).replace(b'"X"', value.encode())
        check(Case("", dialect, body), *read_answer(dialect, body))


ALL_ZERO = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}


@pytest.mark.parametrize("zeros", [{"completion_tokens": 0}, ALL_ZERO])
def test_a_final_0_does_not_replace_a_real_count(zeros):
    cached = {"prompt_tokens_details": {"cached_tokens": 4}}
    body = sse(
        *says("Good", usage={**TEN, **cached}), STOP, {"choices": [], "usage": {**zeros, "cached_tokens": 0}}, DONE
    )
    check(Case("", "openai", body, usage=Usage(10, 5, 15, 4)), *read_answer("openai", body))


def test_a_final_0_does_not_replace_a_real_count_of_anthropic():
    delta, stop = message_end()
    body = named(message_start(), *text_block(0, "Good"), delta, {**delta, "usage": {"output_tokens": 0}}, stop)
    check(Case("", "anthropic", body, usage=Usage(9, 4, 13)), *read_answer("anthropic", body))


def test_a_final_0_does_not_replace_a_cost():
    usages = [{**TEN, "cost": 0.5}, {**TEN, "cost": 0}]
    body = sse(*GOOD, STOP, *(usage_chunk(**usage) for usage in usages), DONE)
    assert read_answer("openai", body)[0][-1].usage.cost == Decimal("0.5")


def test_what_is_cached_no_more_is_0():
    usages = [{**TEN, "cached_tokens": 4}, {**TEN, "cached_tokens": 0}]
    body = sse(*GOOD, STOP, *(usage_chunk(**usage) for usage in usages), DONE)
    assert read_answer("openai", body)[0][-1].usage.cache_read_tokens == 0


# 10. Status and body


@pytest.mark.parametrize("encoding", ["br", "zstd, br", "gzip, made-up", "X-Made-Up"])
def test_a_body_that_nothing_here_decodes_is_one_error_that_names_the_encoding(server, client, monkeypatch, encoding):
    monkeypatch.setattr("urllib3.response.HTTPResponse.CONTENT_DECODERS", ["gzip", "x-gzip", "deflate"])
    server.default = Answer(body=b"\x8b\x02\x80Good", headers={"Content-Encoding": encoding})
    _, error = read(client.stream("Go", retry=sheepsse.Retry(5, base_delay=0)))
    assert isinstance(error, InvalidStreamError)
    assert encoding.split(", ")[-1].lower() in str(error)
    assert len(server.requests) == 1


def test_an_error_in_an_encoding_that_nothing_here_decodes_keeps_its_status(server, client):
    server.answer(Answer(status=401, body=b"\x8b\x02\x80", headers={"Content-Encoding": "made-up"}, framing="length"))
    _, error = read(client.stream("Go"))
    assert (type(error), error.status) == (AuthenticationError, 401)


@pytest.mark.parametrize("encoding", ["none", "utf-8", "UTF-8", "chunked", "text/event-stream"])
def test_an_encoding_that_is_none_of_its_text_is_ignored(server, client, encoding):
    server.answer(
        Answer(text="Good day 🐑", headers={"Content-Encoding": encoding}),
        Answer(status=401, body=b'{"error":"Not this key"}', headers={"Content-Encoding": encoding}, framing="length"),
    )
    assert client.complete("Go").text == "Good day 🐑"
    assert "Not this key" in str(read(client.stream("Go"))[1])


@pytest.mark.parametrize("framing", ["chunked", "length", "gzip"])
@pytest.mark.parametrize("body", ['{"choices": [', '{"choices": [{"message": {"content": "Good'])
def test_a_complete_body_of_broken_json_is_no_loss(server, client, body, framing):
    server.default = Answer(body=body.encode(), content_type="application/json", framing=framing)
    with pytest.raises(InvalidStreamError, match="expected JSON"):
        client.complete("Go", retry=sheepsse.Retry(5, base_delay=0))
    assert len(server.requests) == 1


@pytest.mark.parametrize(("framing", "cut_at"), [("close", None), ("length", 20), ("chunked", 30)])
def test_broken_json_of_a_body_that_may_have_been_cut_is_a_loss(server, client, framing, cut_at):
    body = json.dumps({"choices": [{"message": {"content": "Good"}}]}).encode()
    body = body[:30] if cut_at is None else body
    server.answer(Answer(body=body, content_type="application/json", framing=framing, cut_at=cut_at))
    with pytest.raises(StreamInterrupted):
        client.complete("Go", retry=0)


FRAMED_ERRORS = {
    "an event": b'event: error\ndata: {"error":{"message":"Not this key","code":"bad_key"}}\n\n',
    "an event without a name": b'data: {"error":{"message":"Not this key","code":"bad_key"}}\n\ndata: [DONE]\n\n',
    "after a comment": b': hello\n\ndata: {"message":"Not this key","code":"bad_key"}\n\n',
    "a field": b'error: {"message":"Not this key","code":"bad_key"}\n\n',
    "lines of JSON": b'{"error":{"message":"Not this key","code":"bad_key"}}\n{"done":true}\n',
    "after another event": b'data: {"type":"ping"}\n\ndata: {"message":"Not this key","code":"bad_key"}\n\n',
    "JSON, and what is none": b'{"error":{"message":"Not this key","code":"bad_key"}} and more',
}


@pytest.mark.parametrize("frame", FRAMED_ERRORS)
def test_an_error_body_that_is_framed_as_a_stream_has_the_vendors_words(server, client, frame):
    server.answer(Answer(status=401, body=FRAMED_ERRORS[frame], content_type="text/event-stream", framing="length"))
    _, error = read(client.stream("Go"))
    assert (type(error), error.vendor_code) == (AuthenticationError, "bad_key")
    assert "Not this key" in str(error)


def test_words_in_an_error_event_are_the_vendors():
    error = sheepsse._status_error(500, {}, b"event: error\ndata: Out of memory\n\n")
    assert "Out of memory" in str(error)


@pytest.mark.parametrize("status", [*range(400, 418), 421, 422, 425, 426, 428, 429, 431, 451, *range(500, 531), 599])
def test_retryable_and_the_policy_agree_for_each_status(server, client, status):
    server.default = Answer(status=status, body=b"{}", framing="length")
    _, error = read(client.stream("Go", retry=sheepsse.Retry(1, base_delay=0, rate_limit_delay=0)))
    final = {501, 505, 511, 525, 526}
    expected = status in (408, 409, 429) or (status >= 500 and status not in final)
    assert (error.status, error.retryable, len(server.requests)) == (status, expected, 2 if expected else 1)
    assert expected == (status in sheepsse.RETRYABLE_STATUS)
    assert ("try again later" in str(error)) == (expected and status != 429)


@pytest.mark.parametrize(
    ("body", "content_type", "words"),
    [
        (b"<!DOCTYPE html><title>Attention Required!</title>", "text/html; charset=UTF-8", "firewall"),
        (b"<html>Just a moment...", "", "firewall"),
        (b"Just a moment...", "text/html", "firewall"),
        (b"error code: 1020", "text/plain", "firewall"),
        (b'{"error":{"code":"unsupported_country_region_territory"}}', "application/json", "country"),
        (b'{"error":{"message":"Country,\\nregion, or territory\\nnot supported"}}', "application/json", "country"),
        (b'{"error":{"message":"The model is not available in your region"}}', "application/json", "country"),
        (b'{"error":{"message":"Access denied. Please check your network settings."}}', "application/json", "country"),
        (b'{"error":{"code":"unsupported_country_region_territory","message":"x"}}', "application/json", "country"),
        (b'{"error":{"message":"User location is not supported for the API use."}}', "application/json", "country"),
        (b'{"error":{"type":"forbidden","message":"Request not allowed"}}', "application/json", "country"),
    ],
)
def test_a_403_of_a_firewall_or_for_a_country_is_not_about_the_key(server, body, content_type, words):
    server.default = Answer(status=403, body=body, content_type=content_type, framing="length")
    with asking(server, api_key="sk-local-0123456789") as client:
        _, error = read(client.stream("Go"))
        health = client.check()
    assert type(error) is InvalidRequestError
    assert words in str(error)
    assert (health.ok, health.status) == (False, "http_error")
    assert words in health.error


@pytest.mark.parametrize(
    ("message", "content_type"),
    [("Not this key", "text/html"), ("API key not valid for region us-east-1; it is not allowed", "application/json")],
)
def test_a_403_about_the_key_is(server, message, content_type):
    body = json.dumps({"error": {"message": message}}).encode()
    server.default = Answer(status=403, body=body, content_type=content_type, framing="length")
    with asking(server, api_key="sk-local-0123456789") as client:
        assert client.check().status == "bad_key"


@pytest.mark.parametrize(
    "body",
    [
        b'{"error":{"http_code":"429","type":"x","message":"insufficient balance (1008)"}}',
        b'{"code":"Arrearage","message":"Access denied"}',
    ],
)
def test_money_that_is_spent_is_so_in_any_words(server, client, body):
    server.default = Answer(status=500, body=body, framing="length")
    _, error = read(client.stream("Go", retry=sheepsse.Retry(2, base_delay=0)))
    assert (type(error), len(server.requests)) == (QuotaError, 1)


def test_an_error_that_may_pass_is_tried_again_also_with_status_200(server, client):
    busy = Answer(body=b'{"error":{"code":503,"message":"Overloaded"}}', content_type="application/json")
    server.answer(busy, Answer(text="Good day"))
    assert client.complete("Go", retry=sheepsse.Retry(1, base_delay=0)).text == "Good day"


# Cases from outside


def test_what_other_people_reported_comes_out_right(server, clients, cases):
    wrong = []
    for case in json.loads((cases / "wire_cases.json").read_text(encoding="utf-8"))["cases"]:
        body = case["body"].encode()
        cut_after = body.count(b"\n\n") + body.count(b"\r\n\r\n") if case.get("cut") else None
        answer = Answer(case["status"], case["headers"], body, content_type=case["content_type"], cut_after=cut_after)
        server.answer(answer)
        chunks, error = read(clients[case["dialect"]].stream("Go", resume="never", retry=0).chunks())
        wrong += [f"{case['name']}: {what}" for what in differences(case["expect"], chunks, error)]
    assert wrong == []


def differences(expected, chunks, error):
    answer = sheepsse.collect(chunks)
    found = {
        "text": answer.text,
        "reasoning": answer.reasoning,
        "tool_calls": [[made.id, made.name, made.arguments] for made in answer.tool_calls],
        "finish": next((piece.finish for piece in reversed(chunks) if piece.finish), None),
        "complete": error is None,
        "error": type(error).__name__ if error else None,
        "retryable": getattr(error, "retryable", None),
    }
    for name, value in expected.items():
        if name == "usage":
            counts = {count: getattr(answer.usage, count) for count in value}
            if {count: str(number) for count, number in counts.items()} != {
                count: str(n) for count, n in value.items()
            }:
                yield f"usage is {counts}"
        elif name == "says":
            if value not in str(error):
                yield f"the error says {error}"
        elif name != "also" and found[name] != value and found[name] not in expected.get("also", ()):
            yield f"{name} is {found[name]!r}"
