"""Sections 2 and 3: what errors are, and what chunks make together"""

import copy
import itertools
import json
import pickle
from decimal import Decimal

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

import sheepsse
from sheepsse import Chunk, Completion, ResumePoint, ServerSentEvent, ToolCall, Usage

# Values

DEFAULTS = {
    ServerSentEvent: {"event": "message", "data": "", "id": "", "retry": None},
    ToolCall: {"index": 0, "id": "", "name": "", "arguments": ""},
    Usage: {
        "input_tokens": 0,
        "output_tokens": 0,
        "total_tokens": 0,
        "cache_read_tokens": 0,
        "cache_write_tokens": 0,
        "reasoning_tokens": 0,
        "cost": None,
        "source": "provider",
    },
    Chunk: {
        "text": "",
        "reasoning": "",
        "refusal": "",
        "tool_calls": (),
        "finish_reason": None,
        "finish": None,
        "usage": None,
        "index": 0,
        "event_id": "",
        "raw": None,
        "id": "",
        "model": "",
    },
    Completion: {
        "text": "",
        "reasoning": "",
        "refusal": "",
        "tool_calls": (),
        "finish_reason": None,
        "usage": None,
        "model": "",
        "id": "",
        "complete": False,
    },
    ResumePoint: {"event_id": "", "tokens_received": None, "chars_received": 0},
}


def kind_name(kind):
    return kind.__name__


@pytest.mark.parametrize("kind", DEFAULTS, ids=kind_name)
def test_every_field_of_a_value_has_a_default(kind):
    assert kind()._asdict().items() >= DEFAULTS[kind].items()


@pytest.mark.parametrize("kind", DEFAULTS, ids=kind_name)
def test_a_value_cannot_be_changed(kind):
    value = kind()
    for name in (*kind._fields, "anything_else"):
        with pytest.raises(AttributeError):
            setattr(value, name, "changed")
    assert value == kind()
    assert hash(value) == hash(kind())


@pytest.mark.parametrize("kind", DEFAULTS, ids=kind_name)
def test_a_value_survives_copying_and_pickling(kind):
    value = kind()._replace(**{kind._fields[0]: "7"})
    for twin in (copy.copy(value), copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
        assert twin == value
        assert type(twin) is kind


def test_a_resume_point_comes_back_from_json_as_it_was():
    point = ResumePoint("số 7", 12, 34)
    assert ResumePoint(**json.loads(json.dumps(point._asdict()))) == point


# What the arguments of a tool call say


@pytest.mark.parametrize(
    ("arguments", "parsed"),
    [
        ("", {}),
        (" \n", {}),
        ("{}", {}),
        ('{"city": "Hà Nội", "days": [1, 2]}', {"city": "Hà Nội", "days": [1, 2]}),
        (' {"a": null}\n', {"a": None}),
        ("[1]", [1]),
        ("null", None),
        ("0", 0),
    ],
)
def test_the_arguments_of_a_tool_call_say_what_their_json_says_and_none_say_nothing(arguments, parsed):
    assert ToolCall(arguments=arguments).parsed == parsed


@pytest.mark.parametrize("arguments", ['{"city": "Hà N', '{"city"', "{", '{"a": 1}}', "city=Hanoi", "{'a': 1}"])
def test_arguments_that_are_not_whole_json_are_an_error_that_names_the_tool_and_shows_them(arguments):
    with pytest.raises(sheepsse.InvalidStreamError) as caught:
        _ = ToolCall(name="weather", arguments=arguments).parsed
    assert "'weather'" in str(caught.value)
    assert arguments in str(caught.value)


def test_the_error_of_long_arguments_shows_only_their_beginning():
    with pytest.raises(sheepsse.InvalidStreamError) as caught:
        _ = ToolCall(arguments='{"text": "' + "word " * 100_000).parsed
    assert "word word" in str(caught.value)
    assert str(caught.value).endswith("...'")
    assert len(str(caught.value)) < 400


def test_arguments_too_deep_to_read_are_an_error_of_ours(no_collection):
    with pytest.raises(sheepsse.InvalidStreamError):
        _ = ToolCall(arguments="[" * 100_000 + "]" * 100_000).parsed


# What chunks make together


def test_no_chunks_make_an_empty_answer():
    assert sheepsse.collect([]) == Completion(complete=True)


def test_the_pieces_of_each_kind_of_text_are_joined_in_their_order():
    chunks = [
        Chunk(reasoning="Let "),
        Chunk(reasoning="me see", text="Good"),
        Chunk(refusal="I can"),
        Chunk(text=" day", refusal="not"),
        Chunk(),
        Chunk(text="."),
    ]
    answer = sheepsse.collect(chunks)
    assert (answer.text, answer.reasoning, answer.refusal) == ("Good day.", "Let me see", "I cannot")


def test_chunks_may_come_from_a_generator_and_are_read_once():
    chunks = (Chunk(text=text) for text in "abc")
    assert sheepsse.collect(chunks).text == "abc"
    assert list(chunks) == []


def test_an_answer_whose_chunks_end_without_an_error_is_complete():
    assert sheepsse.collect([Chunk(text="a")]).complete is True


def test_an_error_among_the_chunks_goes_through_as_it_is():
    failure = sheepsse.StreamInterrupted(partial=Completion(text="a"))

    def chunks():
        yield Chunk(text="a")
        raise failure

    with pytest.raises(sheepsse.StreamInterrupted) as caught:
        sheepsse.collect(chunks())
    assert caught.value is failure
    assert caught.value.partial == Completion(text="a")


def test_the_first_id_and_model_count_and_the_last_finish_reason():
    chunks = [
        Chunk(),
        Chunk(id="c-1", model="m-1", finish_reason="length", finish="length"),
        Chunk(id="c-2", model="m-2", finish_reason="stop", finish="stop"),
        Chunk(),
    ]
    answer = sheepsse.collect(chunks)
    assert (answer.id, answer.model, answer.finish_reason) == ("c-1", "m-1", "stop")


def test_the_last_usage_counts_and_is_never_summed():
    chunks = [Chunk(usage=Usage(9, 1, 10)), Chunk(usage=Usage(9, 4, 13)), Chunk(text="a")]
    assert sheepsse.collect(chunks).usage == Usage(9, 4, 13)
    assert sheepsse.collect([*chunks, Chunk(usage=Usage())]).usage == Usage()


def test_no_usage_is_none_and_not_zero():
    assert sheepsse.collect([Chunk(text="a")]).usage is None


def test_usage_counts_for_every_choice_whichever_chunk_brought_it():
    chunks = [Chunk(text="a"), Chunk(text="b", index=1, usage=Usage(9, 4, 13))]
    assert sheepsse.collect(chunks, 0).usage == sheepsse.collect(chunks, 1).usage == Usage(9, 4, 13)


def test_each_choice_is_collected_by_its_index():
    chunks = [
        Chunk(text="a", index=0, id="c-1"),
        Chunk(text="b", index=1, reasoning="r", refusal="f"),
        Chunk(text="c", index=1, finish_reason="length", tool_calls=(ToolCall(0, "t-1", "now"),)),
        Chunk(text="d", index=0, finish_reason="stop"),
    ]
    assert sheepsse.collect(chunks) == Completion("ad", finish_reason="stop", id="c-1", complete=True)
    assert sheepsse.collect(chunks, index=1) == Completion(
        "bc", "r", "f", (ToolCall(0, "t-1", "now"),), "length", id="c-1", complete=True
    )
    assert sheepsse.collect(chunks, 2) == Completion(id="c-1", complete=True)


def calls_of(*parts):
    return sheepsse.collect(Chunk(tool_calls=(part,)) for part in parts).tool_calls


def test_the_parts_of_a_tool_call_are_joined():
    parts = [ToolCall(0, "t-1", "weather"), ToolCall(0, arguments='{"city": '), ToolCall(0, arguments='"Hà Nội"}')]
    (call,) = calls_of(*parts)
    assert call == ToolCall(0, "t-1", "weather", '{"city": "Hà Nội"}')
    assert call.parsed == {"city": "Hà Nội"}


def test_a_tool_call_keeps_its_first_id_and_name_where_later_parts_bring_none_or_others():
    parts = [ToolCall(0, "t-1", "weather", "{"), ToolCall(0, "", "", "}"), ToolCall(0, "t-2", "other", " ")]
    assert calls_of(*parts) == (ToolCall(0, "t-1", "weather", "{} "),)


def test_a_tool_call_takes_an_id_and_a_name_that_come_late():
    assert calls_of(ToolCall(0, arguments="{"), ToolCall(0, "t-1"), ToolCall(0, name="weather", arguments="}")) == (
        ToolCall(0, "t-1", "weather", "{}"),
    )


def test_tool_calls_are_told_apart_by_index_and_stand_in_its_order():
    parts = [ToolCall(2, "t-2", "c"), ToolCall(0, "t-0", "a", "{"), ToolCall(2, "", "", "{}"), ToolCall(0, "", "", "}")]
    assert calls_of(*parts) == (ToolCall(0, "t-0", "a", "{}"), ToolCall(2, "t-2", "c", "{}"))


def test_one_chunk_may_bring_parts_of_several_tool_calls():
    chunks = [
        Chunk(tool_calls=(ToolCall(1, "t-1", "b", "["), ToolCall(0, "t-0", "a", "{"))),
        Chunk(tool_calls=(ToolCall(0, arguments="}"), ToolCall(1, arguments="]"))),
    ]
    assert sheepsse.collect(chunks).tool_calls == (ToolCall(0, "t-0", "a", "{}"), ToolCall(1, "t-1", "b", "[]"))


def test_a_tool_call_without_arguments_is_a_call():
    assert calls_of(ToolCall(0, "t-1", "now")) == (ToolCall(0, "t-1", "now", ""),)


PIECES = st.builds(lambda text, index: Chunk(text, "r", index=index), st.text(max_size=3), st.integers(0, 1))


@given(st.lists(PIECES, max_size=10))
def test_the_text_of_an_answer_is_its_pieces_joined(chunks):
    pieces = list(sheepsse.iter_text(chunks))
    assert all(pieces)
    assert "".join(pieces) == sheepsse.collect(chunks).text == "".join(c.text for c in chunks if c.index == 0)


def test_text_is_that_of_choice_0_piece_by_piece_without_empty_ones():
    chunks = [Chunk(), Chunk("a"), Chunk("b", index=1), Chunk(reasoning="r"), Chunk(" "), Chunk("c")]
    assert list(sheepsse.iter_text(chunks)) == ["a", " ", "c"]


def test_text_is_given_out_as_its_chunks_come():
    chunks = itertools.cycle([Chunk(text="a"), Chunk(text="b")])
    assert list(itertools.islice(sheepsse.iter_text(chunks), 3)) == ["a", "b", "a"]


# Errors

KINDS = {
    sheepsse.SheepError: ("ERROR", False),
    sheepsse.AuthenticationError: ("AUTH_ERROR", False),
    sheepsse.QuotaError: ("QUOTA_EXCEEDED", False),
    sheepsse.RateLimitError: ("RATE_LIMIT", True),
    sheepsse.ModelNotFoundError: ("MODEL_NOT_FOUND", False),
    sheepsse.InvalidRequestError: ("INVALID_REQUEST", False),
    sheepsse.ServerError: ("SERVER_ERROR", True),
    sheepsse.ConnectError: ("NETWORK_ERROR", True),
    sheepsse.StreamTimeout: ("TIMEOUT", True),
    sheepsse.InvalidStreamError: ("INVALID_SSE_FORMAT", False),
    sheepsse.StreamError: ("STREAM_ERROR", False),
    sheepsse.StreamInterrupted: ("CONNECTION_LOST", True),
    sheepsse.StreamCancelled: ("CANCELLED", False),
    sheepsse.CheckpointError: ("CHECKPOINT_ERROR", False),
    sheepsse.CircuitOpenError: ("CIRCUIT_OPEN", False),
    sheepsse.QueueFullError: ("QUEUE_FULL", False),
    sheepsse.QueueTimeoutError: ("QUEUE_TIMEOUT", False),
    sheepsse.TokenMismatchError: ("TOKEN_MISMATCH_ERROR", False),
    sheepsse.MissingExtraError: ("MISSING_EXTRA_ERROR", False),
}
#: a value for everything that an error can be given
GIVEN = {
    "code": "overloaded",
    "retryable": True,
    "retry_after": 1.5,
    "request_id": "req-1",
    "status": 529,
    "vendor_code": "overloaded_error",
    "partial": Completion("Good", "r", "f", (ToolCall(0, "t-1"),), "stop", Usage(9, 4, cost=Decimal("0.02")), "m-1"),
}


def test_every_public_error_is_in_the_table_of_this_test():
    public = {value for name, value in vars(sheepsse).items() if name in sheepsse.__all__ and isinstance(value, type)}
    assert {kind for kind in public if issubclass(kind, Exception)} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=kind_name)
def test_an_error_says_its_code_and_whether_to_try_again(kind):
    error = kind("no luck")
    assert (error.code, error.retryable) == KINDS[kind]
    assert str(error) == "no luck"
    assert error.args == ("no luck",)


@pytest.mark.parametrize("kind", KINDS, ids=kind_name)
def test_an_old_script_that_catches_what_requests_raises_catches_it(kind):
    assert issubclass(kind, sheepsse.SheepError)
    with pytest.raises(requests.RequestException):
        raise kind("no luck")
    assert issubclass(kind, requests.ConnectionError) == (kind is sheepsse.ConnectError)
    assert issubclass(kind, requests.Timeout) == (kind is sheepsse.StreamTimeout)


@pytest.mark.parametrize("kind", KINDS, ids=kind_name)
def test_an_error_made_of_nothing_has_every_attribute_and_an_empty_partial(kind):
    error = kind()
    assert error.partial == Completion()
    assert error.partial.complete is False
    for name in ("retry_after", "request_id", "status", "vendor_code", "request", "response"):
        assert getattr(error, name) is None, name
    assert str(error) == ""


def test_a_partial_of_none_is_an_empty_one():
    assert sheepsse.SheepError(partial=None).partial == Completion()


def test_a_lost_stream_has_a_point_to_resume_from():
    assert sheepsse.StreamInterrupted().resume_point == ResumePoint()


@pytest.mark.parametrize("kind", KINDS, ids=kind_name)
def test_what_an_error_is_given_it_has_and_the_class_keeps_its_own(kind):
    error = kind("no luck", **GIVEN)
    assert {name: getattr(error, name) for name in GIVEN} == GIVEN
    assert (kind("other").code, kind("other").retryable) == KINDS[kind]


def test_what_is_false_or_zero_is_given_too():
    error = sheepsse.ServerError(retryable=False, retry_after=0.0, status=0, vendor_code=0, code="")
    assert (error.retryable, error.retry_after, error.status, error.vendor_code, error.code) == (False, 0.0, 0, 0, "")


def test_an_error_keeps_its_request_and_response():
    request = requests.Request("GET", "http://example.com/").prepare()
    response = requests.Response()
    response.request = request
    assert sheepsse.SheepError(request=request).request is request
    assert sheepsse.SheepError(response=response).response is response
    assert sheepsse.SheepError(response=response).request is request


def keyed_response():
    response, headers = requests.Response(), {"Authorization": "Bearer sk-1"}
    response.request = requests.Request("GET", "http://example.com/", headers=headers).prepare()
    return response


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", KINDS, ids=kind_name)
def test_an_error_survives_pickling_as_itself_without_request_and_response(kind, protocol):
    error = kind("no luck", response=keyed_response(), **GIVEN)
    pickled = pickle.dumps(error, protocol)
    twin = pickle.loads(pickled)
    assert type(twin) is kind
    assert twin.args == error.args
    assert str(twin) == "no luck"
    assert {name: getattr(twin, name) for name in GIVEN} == GIVEN
    assert twin.request is None
    assert twin.response is None
    assert b"sk-1" not in pickled


@pytest.mark.parametrize("kind", KINDS, ids=kind_name)
def test_an_error_that_was_given_nothing_is_after_pickling_what_its_class_says(kind):
    twin = pickle.loads(pickle.dumps(kind("no luck")))
    assert (type(twin), twin.code, twin.retryable, twin.partial) == (kind, *KINDS[kind], Completion())


def test_what_was_set_on_an_error_later_survives_pickling():
    error = sheepsse.StreamInterrupted("no luck")
    error.partial = Completion("Good")
    error.resume_point = ResumePoint("7", 2, 4)
    twin = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(error))))
    assert twin.partial == Completion("Good")
    assert twin.resume_point == ResumePoint("7", 2, 4)


def test_a_pickled_error_is_not_changed_by_it():
    error = sheepsse.SheepError("no luck", response=keyed_response())
    pickle.dumps(error)
    assert error.response is not None
    assert error.request.headers["Authorization"] == "Bearer sk-1"


def test_the_statuses_after_which_a_request_may_be_sent_again_are_these():
    final = {501, 505, 511, 525, 526}
    assert {408, 409, 429} | set(range(500, 600)) - final == sheepsse.RETRYABLE_STATUS
    with pytest.raises(AttributeError):
        sheepsse.RETRYABLE_STATUS.add(400)


@pytest.mark.parametrize("length", [1, 63, 64, 5000])
@pytest.mark.parametrize("count", [0, 1, 999, 1000, 1001, 3500])
def test_an_answer_of_many_pieces_is_whole(length, count):
    pieces = [f"{number:05}"[-length:].ljust(length) for number in range(count)]
    assert sheepsse.collect([Chunk(text=piece) for piece in pieces]).text == "".join(pieces)


def test_short_pieces_do_not_take_many_times_their_text():
    import tracemalloc

    text = "".join(f" {number:06}" for number in range(100_000))
    tracemalloc.start()
    try:
        answer = sheepsse._Answer()
        for start in range(0, len(text), 7):
            answer.add(Chunk(text=text[start : start + 7]))
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert str(answer.text) == text
    assert taken < 2 * len(text)


def test_a_completion_is_no_iterator_and_a_value_all_the_same():
    answer = sheepsse.Completion("Good day", usage=Usage(1, 2, 3), complete=True)
    for wrong in (iter, list, tuple):
        with pytest.raises(TypeError, match=r"its text is completion\.text"):
            wrong(answer)
    assert answer._asdict()["text"] == "Good day"
    assert answer._replace(text="Why?") == sheepsse.Completion("Why?", usage=Usage(1, 2, 3), complete=True)
    with pytest.raises(TypeError, match="txt"):
        answer._replace(txt="Why?")
    assert pickle.loads(pickle.dumps(answer)) == copy.copy(answer) == copy.deepcopy(answer) == answer
    assert hash(answer) == hash(copy.copy(answer))
    assert repr(answer).startswith("Completion(text='Good day', reasoning=''")
    assert answer[0] == answer.text
