"""Section 5, what servers and proxies send that no manual has: each is read for what it says, or is an error"""

import pytest

import sheepsse
from conftest import cpu_seconds
from sheepsse import InvalidRequestError, InvalidStreamError, StreamError, ToolCall
from transcripts import chunk, sse
from transcripts_vendors import (
    COMPLETED,
    OPENING,
    array,
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
    thinking_block,
    tokens,
    tool_block,
    tool_done,
)

CALLS = [("t-1", "look", '{"at": 1}'), ("t-2", "listen", '{"to": 2}')]


def collected(dialect, body):
    """The answer that a stream is, and the error that ended it or None"""
    json_lines = body[:1] in (b"[", b"{")
    events = sheepsse.iter_json_lines([body]) if json_lines else sheepsse.iter_events([body])
    given = []
    try:
        given.extend(sheepsse.iter_chunks(events, dialect))
    except sheepsse.SheepError as error:
        return error.partial, error
    return sheepsse.collect(given), None


def answer_of(dialect, body):
    answer, error = collected(dialect, body)
    assert error is None
    return answer


def triples(answer):
    return [(call.id, call.name, call.arguments) for call in answer.tool_calls]


# OpenAI Responses


def without(payload, *names):
    """A terminal event whose response lacks some fields"""
    kept = {name: value for name, value in payload["response"].items() if name not in names}
    return {**payload, "response": kept}


@pytest.mark.parametrize("lacks", [(), ("status",), ("status", "error")])
def test_a_response_that_failed_is_an_error_whatever_it_says_of_its_status(lacks):
    failed = without(response("failed", error={"code": "server_error", "message": "It broke"}), *lacks)
    answer, error = collected("openai-responses", numbered(*OPENING, delta("output_text", "Good"), failed))
    assert isinstance(error, StreamError)
    assert ("It broke" in str(error)) == ("error" not in lacks)
    assert (answer.text, answer.complete) == ("Good", False)


def test_a_response_that_failed_without_a_word_is_an_error():
    _, error = collected("openai-responses", numbered(*OPENING, {"type": "response.failed"}))
    assert isinstance(error, StreamError)


def test_the_name_of_the_last_event_says_how_a_response_ended():
    cut = without(response("incomplete", incomplete_details={"reason": "max_output_tokens"}), "status")
    body = numbered(*OPENING, *spoken("Good"), cut)
    assert answer_of("openai-responses", body).finish_reason == "incomplete"
    body = numbered(*OPENING, *spoken("Good"), response("completed", status="in_progress"))
    assert answer_of("openai-responses", body).finish_reason == "completed"


MESSAGE = {"type": "message", "content": [{"type": "output_text", "text": "Good day"}]}


@pytest.mark.parametrize("pieces", [(), ("Good",), ("Good", " day")])
def test_what_only_the_whole_response_has_is_given_out_with_it(pieces):
    deltas = [delta("output_text", piece) for piece in pieces]
    body = numbered(*OPENING, *deltas, response("completed", output=[MESSAGE]))
    assert answer_of("openai-responses", body).text == "Good day"


def test_a_response_whose_whole_is_not_its_pieces_is_an_error():
    body = numbered(*OPENING, delta("output_text", "Bad"), response("completed", output=[MESSAGE]))
    answer, error = collected("openai-responses", body)
    assert isinstance(error, InvalidStreamError)
    assert not answer.complete


@pytest.mark.parametrize("arguments", ["", '{"at": 1}'])
def test_a_call_that_only_the_whole_response_has_is_given_out_with_it(arguments):
    call = {"type": "function_call", "call_id": "t-1", "name": "look", "arguments": arguments}
    body = numbered(*OPENING, response("completed", output=[call]))
    assert triples(answer_of("openai-responses", body)) == [("t-1", "look", arguments)]


def test_a_call_that_the_whole_response_repeats_is_given_out_once():
    call = {"type": "function_call", "call_id": "t-1", "name": "look", "arguments": '{"at": 1}'}
    body = numbered(*OPENING, *tool_done(0, *CALLS[0]), response("completed", output=[call]))
    assert triples(answer_of("openai-responses", body)) == CALLS[:1]


def test_items_without_a_position_are_told_apart_by_their_ids():
    added = [item("added", id=f"i-{id}", type="function_call", call_id=id, name=name) for id, name, _ in CALLS]
    pieces = [
        {"type": "response.function_call_arguments.delta", "item_id": f"i-{id}", "delta": arguments}
        for id, _, arguments in CALLS
    ]
    for payload in added:
        del payload["output_index"]
    assert triples(answer_of("openai-responses", numbered(*OPENING, *added, *pieces, COMPLETED))) == CALLS


@pytest.mark.parametrize("index", [None, [], {}, "0"])
def test_a_position_that_is_no_number_is_none(index):
    payloads = [{**payload, "output_index": index} for payload in spoken("Good day")]
    assert answer_of("openai-responses", numbered(*OPENING, *payloads, COMPLETED)).text == "Good day"


def test_an_error_that_is_null_is_none():
    body = numbered(*OPENING, {**delta("output_text", "Good day"), "error": None}, COMPLETED)
    assert answer_of("openai-responses", body).text == "Good day"


def test_the_free_text_for_a_custom_tool_is_its_arguments():
    added = item("added", id="i-0", type="custom_tool_call", call_id="t-1", name="run", input="")
    piece = {"type": "response.custom_tool_call_input.delta", "output_index": 0, "delta": "ls -l"}
    done = item("done", id="i-0", type="custom_tool_call", call_id="t-1", name="run", input="ls -l")
    body = numbered(*OPENING, added, piece, done, COMPLETED)
    assert triples(answer_of("openai-responses", body)) == [("t-1", "run", "ls -l")]
    call = {"index": 0, "id": "t-1", "type": "custom", "custom": {"name": "run", "input": "ls -l"}}
    body = sse(chunk({"tool_calls": [call]}, "tool_calls"), "[DONE]")
    assert triples(answer_of("openai", body)) == [("t-1", "run", "ls -l")]


def test_a_response_that_is_not_done_is_not_whole():
    document = sse({"object": "response", "id": "c-1", "status": "in_progress", "output": [MESSAGE]})
    answer, error = collected("openai-responses", document)
    assert isinstance(error, sheepsse.StreamInterrupted)
    assert (answer.text, answer.complete) == ("Good day", False)


# Anthropic


def test_blocks_that_all_have_one_index_are_told_apart_by_their_starts():
    blocks = [thinking_block(0, "Hm"), *(tool_block(0, *call) for call in CALLS)]
    body = named(message_start(), *(payload for payloads in blocks for payload in payloads), *message_end("tool_use"))
    answer = answer_of("anthropic", body)
    assert triples(answer) == CALLS
    assert [part["type"] for part in answer.vendor["anthropic"]] == ["thinking", "tool_use", "tool_use"]


def test_a_message_that_begins_again_after_it_said_something_is_an_error():
    body = named(message_start(), *text_block(0, "x"), message_start(), *text_block(0, "x"), *message_end())
    answer, error = collected("anthropic", body)
    assert isinstance(error, InvalidStreamError)
    assert (answer.text, answer.complete) == ("x", False)


@pytest.mark.parametrize("fragments", [(), ("",), ('{"at":', " 1}")])
def test_the_input_that_a_call_begins_with_counts_where_no_other_comes(fragments):
    begun = {"type": "tool_use", "id": "t-1", "name": "look", "input": {"at": 1}}
    deltas = [{"type": "input_json_delta", "partial_json": fragment} for fragment in fragments]
    answer = answer_of("anthropic", named(message_start(), *block(0, begun, *deltas), *message_end("tool_use")))
    assert triples(answer) == CALLS[:1]
    assert answer.vendor["anthropic"] == [begun]


# Gemini, Ollama


def test_arguments_that_are_text_are_taken_as_they_are():
    body = array(said(called("look", '{"at": 1}'), finish="STOP", **tokens()))
    assert answer_of("gemini", body).tool_calls[0].parsed == {"at": 1}
    body = lines(line(tool_calls=[ollama_call("look", '{"at": 1}')]), last())
    assert answer_of("ollama", body).tool_calls[0].parsed == {"at": 1}


@pytest.mark.parametrize("parts", [{"willContinue": True}, {"partialArgs": [{"jsonPath": "$.at", "stringValue": "s"}]}])
def test_arguments_of_gemini_that_come_in_parts_are_an_error_and_no_call_without_them(parts):
    body = array(said({"functionCall": {"name": "look", **parts}}))
    _, error = collected("gemini", body)
    assert isinstance(error, InvalidStreamError)


def test_a_finish_reason_on_every_chunk_costs_time_linear_in_their_number():
    def reading(count):
        body = array(*[said({"text": "word ", "thought": at == 0}, finish="STOP") for at in range(count)])
        return cpu_seconds(lambda: answer_of("gemini", body))

    assert reading(1600) < 3 * 8 * reading(200)


# An answer that is sent back


def test_an_answer_without_a_word_is_a_message_with_an_empty_content():
    assert sheepsse.Completion().message == {"role": "assistant", "content": ""}


def test_a_refusal_is_part_of_the_message():
    assert sheepsse.Completion(refusal="No.").message == {"role": "assistant", "content": "", "refusal": "No."}


def test_a_call_without_arguments_is_sent_back_with_none():
    message = sheepsse.Completion(tool_calls=(ToolCall(0, "t-1", "look"),)).message
    assert message["tool_calls"][0]["function"] == {"name": "look", "arguments": "{}"}


@pytest.mark.parametrize("dialect", ["anthropic", "gemini", "ollama"])
def test_arguments_that_are_no_object_cannot_be_sent_where_one_is_wanted(dialect):
    message = sheepsse.Completion(tool_calls=(ToolCall(0, "t-1", "look", "[1]"),)).message
    with pytest.raises(InvalidRequestError, match="are no object"):
        sheepsse.DIALECTS[dialect].body([message], "m", {}, True)


def test_reasoning_that_responses_has_neither_stored_nor_sent_is_left_out():
    items = [{"type": "reasoning", "id": "r-1"}, {"type": "reasoning", "id": "r-2", "encrypted_content": "e"}]
    message = {"role": "assistant", "content": "", "vendor": {"openai-responses": items}}
    body = sheepsse.DIALECTS["openai-responses"].body
    assert body([message], "m", {}, True)["input"] == items
    assert body([message], "m", {"store": False}, True)["input"] == items[1:]


def test_a_part_that_ollama_knows_nothing_of_is_an_error_and_not_left_out():
    content = [{"type": "text", "text": "Hear"}, {"type": "input_audio", "input_audio": {"data": "e"}}]
    with pytest.raises(InvalidRequestError, match="Ollama takes text, and images"):
        sheepsse.DIALECTS["ollama"].body([{"role": "user", "content": content}], "m", {}, True)


# What says nothing


SAYS = {
    "openai": sse(chunk({"content": "Good day"}), chunk(finish="stop"), "[DONE]"),
    "openai-responses": numbered(*OPENING, *spoken("Good day"), COMPLETED),
    "anthropic": named(message_start(), *text_block(0, "Good day"), *message_end()),
    "gemini": sse(said("Good day", finish="STOP")),
    "ollama": sse(line("Good day"), last()),
}


@pytest.mark.parametrize("dialect", SAYS)
@pytest.mark.parametrize("nothing", ["null", "  "])
def test_an_event_without_anything_in_it_says_nothing(dialect, nothing):
    body = b"data: %s\n\n" % nothing.encode() + SAYS[dialect]
    assert answer_of(dialect, body).text == answer_of("auto", body).text == "Good day"


def test_events_that_no_dialect_knows_are_an_answer_that_was_cut():
    _, error = collected("auto", sse({"unknown": 1}, {"type": "response"}))
    assert isinstance(error, sheepsse.StreamInterrupted)
    assert sheepsse.Dialect.recognises({"choices": []}) is False


def test_an_anthropic_message_need_not_count_nor_say_why_in_its_first_delta():
    start = message_start()
    del start["message"]["usage"]
    early = {"type": "message_delta", "delta": {"stop_reason": None}}
    body = named(start, early, *text_block(0, "Good day"), {**message_end()[0], "usage": None}, message_end()[1])
    answer = answer_of("anthropic", body)
    assert (answer.text, answer.usage, answer.finish_reason) == ("Good day", None, "end_turn")


def test_a_block_of_anthropic_may_begin_with_anything():
    blocks = [block(0, {"type": "thinking", "partial_json": 5}), block(1, {"type": [], "text": {}}), text_block(2, "x")]
    body = named(message_start(), *(payload for payloads in blocks for payload in payloads), *message_end())
    assert answer_of("anthropic", body).text == "x"


def test_what_an_anthropic_message_keeps_has_no_empty_text_and_no_block_without_a_type():
    blocks = [thinking_block(0, "Hm"), text_block(1), block(2, {})]
    body = named(message_start(), *(payload for payloads in blocks for payload in payloads), *message_end())
    assert [part["type"] for part in answer_of("anthropic", body).vendor["anthropic"]] == ["thinking"]


def test_reasoning_that_responses_sends_twice_is_given_out_once():
    body = numbered(
        *OPENING, delta("reasoning_text", "Hm."), delta("reasoning_summary_text", "Hm."), *spoken("Yes"), COMPLETED
    )
    assert answer_of("openai-responses", body).reasoning == "Hm."


def test_arguments_of_a_call_that_never_began_are_not_taken_for_another_ones():
    piece = {"type": "response.function_call_arguments.delta", "output_index": 7, "delta": '{"at": 1}'}
    assert answer_of("openai-responses", numbered(*OPENING, piece, *spoken("Yes"), COMPLETED)).tool_calls == ()


def test_arguments_that_come_only_as_a_call_ends_are_its_arguments():
    begun = item("added", id="i-0", type="function_call", call_id="t-1", name="look", arguments="")
    body = numbered(*OPENING, begun, *tool_done(0, *CALLS[0])[1:], COMPLETED)
    assert triples(answer_of("openai-responses", body)) == CALLS[:1]


def test_an_event_that_came_before_is_skipped():
    word = {**delta("output_text", "Good day"), "sequence_number": 2}
    again = {**delta("output_text", "Again"), "sequence_number": 1}
    body = numbered(*OPENING) + named(word, again) + numbered(COMPLETED, start=3)
    assert answer_of("openai-responses", body).text == "Good day"


# Requests that are odd


def test_a_result_without_a_call_before_it_is_named_by_itself():
    messages = [{"role": "tool", "tool_call_id": "t-9", "name": "look", "content": "3"}]
    body = sheepsse.DIALECTS["gemini"].body(messages, "m", {}, True)
    assert body["contents"][0]["parts"][0]["functionResponse"]["name"] == "look"


def test_a_part_that_is_a_text_is_one():
    body = sheepsse.DIALECTS["openai-responses"].body([{"role": "user", "content": ["Good day?"]}], "m", {}, True)
    assert body["input"][0]["content"] == [{"type": "input_text", "text": "Good day?"}]


def test_the_details_of_reasoning_go_back_put_together():
    details = [
        {"type": "reasoning.text", "index": 0, "text": "H", "signature": None},
        {"type": "reasoning.text", "index": 0, "text": "m", "signature": "s-1"},
        {"type": "reasoning.encrypted", "index": 1, "data": "e"},
    ]
    call = {"index": 0, "id": "t-1", "function": {"name": "look", "arguments": "{}"}}
    deltas = [*({"reasoning_details": [detail]} for detail in details), {"tool_calls": [call]}]
    answer = answer_of("openai", sse(*map(chunk, deltas), chunk(finish="tool_calls"), "[DONE]"))
    (sent,) = sheepsse.DIALECTS["openai"].body([answer.message], "m", {}, True)["messages"]
    assert sent["reasoning_details"] == [
        {"type": "reasoning.text", "index": 0, "text": "Hm", "signature": "s-1"},
        {"type": "reasoning.encrypted", "index": 1, "data": "e"},
    ]


def test_done_is_no_end_of_a_response_that_did_not_end():
    answer, error = collected("openai-responses", numbered(*OPENING, *spoken("Good day"), end=sse("[DONE]")))
    assert isinstance(error, sheepsse.StreamInterrupted)
    assert (answer.text, answer.complete) == ("Good day", False)
