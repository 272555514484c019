"""Section 4: bytes to events and back, whole and cut anywhere; the bodies of responses over real sockets"""

import base64
import contextlib
import gc
import io
import itertools
import json
import re
import socket
import tracemalloc
import zlib
from typing import Any, NamedTuple, Optional

import pytest
import requests
import responses
import sseclient
import urllib3
from hypothesis import example, given, settings
from hypothesis import strategies as st

import sheepsse
from conftest import HANG, cpu_seconds
from local_provider import Answer
from sheepsse import ServerSentEvent

BOM = b"\xef\xbb\xbf"
LIMIT = 20_000
MIB = 1024 * 1024

property_of = settings(max_examples=300)


def says(data="", event="message", id="", retry=None):
    return ServerSentEvent(event, data, id, retry)


class Reading(NamedTuple):
    """What a decoder made of an input"""

    events: list
    retry: Optional[int] = None
    last_event_id: str = ""


def read(blocks, decoder=None):
    decoder = decoder or sheepsse.SSEDecoder()
    events = [event for block in blocks for event in decoder.feed(block)]
    events += decoder.flush()
    return Reading(events, decoder.retry, decoder.last_event_id)


def blocks_of(data, size):
    return [data[at : at + size] for at in range(0, len(data), size)]


def cuttings(data):
    """The input whole, byte by byte, in blocks of two bytes, and in two at every position"""
    yield [data]
    yield blocks_of(data, 1)
    yield blocks_of(data, 2)
    for position in range(len(data) + 1):
        yield [data[:position], data[position:]]


def cut(data, positions):
    """The input cut at these positions, whatever its length"""
    ends = sorted({position % (len(data) + 1) for position in positions} | {0, len(data)})
    return [data[start:end] for start, end in zip(ends, ends[1:])]


def until_error(items):
    """The items given out, and the error of ours that ended them or None"""
    given_out = []
    try:
        for item in items:
            given_out.append(item)
    except sheepsse.SheepError as error:
        return given_out, error
    return given_out, None


# The event stream format


class Case(NamedTuple):
    name: str
    input: bytes
    events: Any = ()
    retry: Optional[int] = None
    last_event_id: str = ""


CASES = [
    Case("nothing at all", b""),
    Case("one event", b"data: a\n\n", [says("a")]),
    Case("two events", b"data: a\n\ndata: b\n\n", [says("a"), says("b")]),
    # the byte order mark
    Case("one BOM at the start is stripped", BOM + b"data: a\n\n", [says("a")]),
    Case("a second BOM belongs to the field's name", BOM * 2 + b"data: a\n\ndata: b\n\n", [says("b")]),
    Case("a BOM on the second line belongs to the field's name", b"data: a\n" + BOM + b"data: b\n\n", [says("a")]),
    Case("a BOM after a blank line belongs to the field's name", b"\n" + BOM + b"data: a\n\n"),
    Case("a BOM after a comment belongs to the field's name", b":\n" + BOM + b"data: a\n\n"),
    Case("a BOM in a value is data", "data: \ufeffa\ufeff\n\n".encode(), [says("\ufeffa\ufeff")]),
    Case("a BOM alone on its line says nothing", BOM + b"\ndata: a\n\n", [says("a")]),
    Case("a BOM before a comment", BOM + b": hello\ndata: a\n\n", [says("a")]),
    Case("a BOM and nothing else", BOM),
    Case("part of a BOM belongs to the field's name", BOM[:2] + b"data: a\n\n"),
    # line ends
    Case("lines end with LF", b"data: a\ndata: b\n\n", [says("a\nb")]),
    Case("lines end with CR", b"data: a\rdata: b\r\r", [says("a\nb")]),
    Case("lines end with CRLF", b"data: a\r\ndata: b\r\n\r\n", [says("a\nb")]),
    Case("a line of CRLF, a blank line of LF", b"data: a\r\n\ndata: b\n\n", [says("a"), says("b")]),
    Case("a line of LF, a blank line of CRLF", b"data: a\n\r\ndata: b\n\n", [says("a"), says("b")]),
    Case("a line of LF, a blank line of CR", b"data: a\n\rdata: b\n\n", [says("a"), says("b")]),
    Case("a line of CR, a blank line of CRLF", b"data: a\r\r\ndata: b\n\n", [says("a"), says("b")]),
    Case("a line of CR, a blank line of CR", b"data: a\r\rdata: b\r\n\n", [says("a"), says("b")]),
    Case("one CRLF is one line end", b"data: a\r\ndata: b\r\n\r\n\r\n", [says("a\nb")]),
    Case("all line ends in one event", b"data: a\rdata: b\ndata: c\r\ndata: d\r\n\r", [says("a\nb\nc\nd")]),
    Case("many blank lines make no event", b"\n\r\r\n\n\n\rdata: a\n\n\n\n\n\r\n", [says("a")]),
    Case(
        "what only other formats take for a line end is data",
        "data: a\x0bb\x0cc\x1cd\x1ee\x85f\u2028g\u2029h\n\n".encode(),
        [says("a\x0bb\x0cc\x1cd\x1ee\x85f\u2028g\u2029h")],
    ),
    # comments
    Case("comments say nothing", b":\n: hello\n:data: b\ndata: a\n\n", [says("a")]),
    Case("a comment does not part the lines of an event", b"data: a\n: hello\ndata: b\n\n", [says("a\nb")]),
    Case("a block of comments is no event", b": keep-alive\n\n: keep-alive\n\ndata: a\n\n", [says("a")]),
    Case("a comment may hold anything", b": \xff\0data: b\ndata: a\n\n", [says("a")]),
    # fields
    Case("a value without the space", b"data:a\n\n", [says("a")]),
    Case("one space is removed, not two", b"data:  a \n\n", [says(" a ")]),
    Case("a tab is not removed", b"data:\ta\n\n", [says("\ta")]),
    Case("a value may hold colons", b"data: a: b:c\n\ndata::\n\n", [says("a: b:c"), says(":")]),
    Case("a value that is one space is empty", b"data: \n\n", [says("")]),
    Case("a field without a colon has an empty value", b"data\n\n", [says("")]),
    Case("empty data lines are joined like others", b"data\ndata:\ndata: \n\n", [says("\n\n")]),
    Case("trailing empty data lines are kept", b"data: a\ndata:\n\n", [says("a\n")]),
    Case("names are told apart by case", b"Data: b\nDATA: c\ndata: a\n\n", [says("a")]),
    Case("names are not stripped", b" data: b\ndata : c\n\tdata: d\ndata: a\n\n", [says("a")]),
    Case("names are matched as a whole", b"dat: b\ndata2: c\nxdata: d\ndata\0: e\ndata: a\n\n", [says("a")]),
    Case("unknown fields say nothing", b"foo: b\nfoo\nname: c\ndata: a\n\n", [says("a")]),
    Case("an event's name", b"event: ping\ndata: a\n\n", [says("a", "ping")]),
    Case("an event's name may follow its data", b"data: a\nevent: ping\n\n", [says("a", "ping")]),
    Case("the last of two names counts", b"event: ping\nevent: pong\ndata: a\n\n", [says("a", "pong")]),
    Case("an empty name is message", b"event: ping\nevent:\ndata: a\n\n", [says("a")]),
    Case("a name holds for one event", b"event: ping\ndata: a\n\ndata: b\n\n", [says("a", "ping"), says("b")]),
    Case("a name without data is no event, and is gone", b"event: ping\n\ndata: a\n\n", [says("a")]),
    Case("a name keeps its inner spaces", b"event:  a b \ndata: a\n\n", [says("a", " a b ")]),
    # ids
    Case("an id", b"id: 7\ndata: a\n\n", [says("a", id="7")], last_event_id="7"),
    Case("an id may follow the data", b"data: a\nid: 7\n\n", [says("a", id="7")], last_event_id="7"),
    Case("an id persists", b"id: 7\ndata: a\n\ndata: b\n\n", [says("a", id="7"), says("b", id="7")], None, "7"),
    Case("the last of two ids counts", b"id: 7\nid: 8\ndata: a\n\n", [says("a", id="8")], last_event_id="8"),
    Case("an empty id resets", b"id: 7\ndata: a\n\nid:\ndata: b\n\n", [says("a", id="7"), says("b")]),
    Case("an id without a colon resets", b"id: 7\ndata: a\n\nid\ndata: b\n\n", [says("a", id="7"), says("b")]),
    Case("an id of one space resets", b"id: 7\ndata: a\n\nid: \ndata: b\n\n", [says("a", id="7"), says("b")]),
    Case("an id with NUL is ignored", b"id: 7\nid: 8\0\ndata: a\n\n", [says("a", id="7")], last_event_id="7"),
    Case("a NUL alone is no id", b"id: 7\n\nid: \0\ndata: a\n\n", [says("a", id="7")], last_event_id="7"),
    Case("a block without data commits its id", b"id: 7\n\n", last_event_id="7"),
    Case("an id outlives a block without data", b"id: 7\n\ndata: a\n\n", [says("a", id="7")], last_event_id="7"),
    Case("a block without data resets by its id", b"id: 7\n\nid:\n\ndata: a\n\n", [says("a")]),
    Case("an id that no blank line follows is not committed", b"id: 7\n\nid: 8\n", last_event_id="7"),
    Case("an id is UTF-8", "id: số 7\ndata: a\n\n".encode(), [says("a", id="số 7")], last_event_id="số 7"),
    Case("an id is text, not a number", b"id: 007 \ndata: a\n\n", [says("a", id="007 ")], last_event_id="007 "),
    # the reconnection time
    Case("a reconnection time", b"retry: 1500\ndata: a\n\n", [says("a", retry=1500)], 1500),
    Case("a reconnection time needs no data", b"retry: 1500\n\ndata: a\n\n", [says("a")], 1500),
    Case("a reconnection time needs no blank line", b"retry: 1500\n", retry=1500),
    Case("an event has its own time", b"retry: 5\ndata: a\n\ndata: b\n\n", [says("a", retry=5), says("b")], 5),
    Case("the last reconnection time counts", b"retry: 5\nretry: 6\ndata: a\n\n", [says("a", retry=6)], 6),
    Case("a reconnection time of zero", b"retry: 0\ndata: a\n\n", [says("a", retry=0)], 0),
    Case("leading zeros are not octal", b"retry: 0010\ndata: a\n\n", [says("a", retry=10)], 10),
    *(
        Case(f"a reconnection time of {value!r} is ignored", b"retry: 5\nretry:%s\n\n" % value.encode(), retry=5)
        for value in ("+5", "-5", "1_000", "1.5", "1e3", "0x10", "5s", "²", "٣", "５", "5\0", "", " ", " 7 ", "\t7")
    ),
    # what is no text
    Case("invalid UTF-8 is replaced", b"data: a\xffb\xc3\n\n", [says("a\ufffdb\ufffd")]),
    Case("a cut character is replaced once", b"data: \xf0\x9f\x90\n\n", [says("\ufffd")]),
    Case("a character does not reach over a line end", b"data: \xc3\ndata: \xa9\n\n", [says("\ufffd\n\ufffd")]),
    Case("overlong UTF-8 is replaced byte by byte", b"data: \xc0\xaf\n\n", [says("\ufffd\ufffd")]),
    Case("a surrogate in UTF-8 is replaced byte by byte", b"data: \xed\xa0\x80\n\n", [says("\ufffd" * 3)]),
    Case("invalid UTF-8 in a name", b"event: \xff\ndata: a\n\n", [says("a", "\ufffd")]),
    Case("invalid UTF-8 in an id", b"id: \xff\ndata: a\n\n", [says("a", id="\ufffd")], last_event_id="\ufffd"),
    Case("invalid UTF-8 in a field's name", b"d\xffata: b\n\xff\ndata: a\n\n", [says("a")]),
    Case("NUL is data", b"data: \0a\0\n\n", [says("\0a\0")]),
    Case("NUL is part of a name", b"event: \0\ndata: a\n\n", [says("a", "\0")]),
    Case("characters of two to four bytes", "data: é – 🐑\n\n".encode(), [says("é – 🐑")]),
    # the end of the input
    Case("an event without its blank line is dropped", b"data: a\n\ndata: b\n", [says("a")]),
    Case("an event without its line end is dropped", b"data: a\n\ndata: b", [says("a")]),
    Case("an event cut in its field's name is dropped", b"data: a\n\nda", [says("a")]),
    Case("[DONE] without its blank line is given out", b"data: a\n\ndata: [DONE]\n", [says("a"), says("[DONE]")]),
    Case("[DONE] without its line end is given out", b"data: [DONE]", [says("[DONE]")]),
    Case("[DONE] after CR is given out", b"data: [DONE]\r", [says("[DONE]")]),
    Case("a part of [DONE] is dropped", b"data: [DONE"),
    Case("more than [DONE] is dropped", b"data: [DONE]."),
    Case("a whole JSON object is given out", b'data: {"a": "}"}', [says('{"a": "}"}')]),
    Case("a whole JSON array is given out", b"data: [1, [2]]\n", [says("[1, [2]]")]),
    Case("a whole JSON object in two lines is given out", b'data: {"a":\ndata: 1}\n', [says('{"a":\n1}')]),
    Case("a JSON object after a BOM is given out", BOM + b"data: {}\n", [says("{}")]),
    Case("a whole JSON object is given out with its name", b"event: x\ndata: {}\n", [says("{}", "x")]),
    Case("a whole JSON object is given out with its id", b"id: 7\ndata: {}\n", [says("{}", id="7")], None, "7"),
    Case("a whole JSON object is given out with its time", b"retry: 7\ndata: {}\n", [says("{}", retry=7)], 7),
    Case("a comment after a whole JSON object", b"data: {}\n: keep-al", [says("{}")]),
    Case("the line after a whole JSON object is cut", b"data: {}\nid: 7"),
    Case("the name of the line after a whole JSON object is cut", b"data: {}\nda"),
    Case("a BOM on the last line belongs to the field's name", b"data: a\n\n" + BOM + b"data: {}", [says("a")]),
    Case("a cut JSON object is dropped", b'data: {"a": 1'),
    Case("a JSON object cut after an inner one is dropped", b'data: {"a": {"b": 1}'),
    Case("what only ends like JSON is dropped", b"data: a}\n"),
    Case("a number is dropped, it may go on", b"data: 12\n"),
    Case("a string is dropped", b'data: "a"\n'),
    Case("a word of JSON is dropped", b"data: null\n"),
    Case("JSON and more is dropped", b"data: {}\ndata: a\n"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_format_is_read_as_it_is_specified_however_it_is_cut(case):
    for blocks in cuttings(case.input):
        assert read(blocks) == Reading(list(case.events), case.retry, case.last_event_id), blocks


@pytest.mark.parametrize("data", ["[DONE]", "{}"])
def test_a_whole_last_line_is_given_out_also_where_it_is_the_first_after_a_bom(data):
    for blocks in cuttings(BOM + b"data: " + data.encode()):
        assert read(blocks).events == [says(data)], blocks


def test_the_cases_of_the_conformance_file_hold_however_they_are_cut(cases):
    rows = json.loads((cases / "sse_format_cases.json").read_text(encoding="utf-8"))
    assert rows
    for case in rows:
        data = base64.b64decode(case["input_b64"])
        expected = [(event["event"], event["data"], event["id"]) for event in case["events"]]
        for blocks in cuttings(data):
            reading = read(blocks)
            assert [event[:3] for event in reading.events] == expected, (case["name"], blocks)
            assert reading[1:] == (case["retry"], case["last_event_id"]), (case["name"], blocks)


@pytest.mark.parametrize("line_end", [b"\n", b"\r", b"\r\n"])
def test_an_event_is_given_out_at_the_first_byte_of_its_blank_line(line_end):
    decoder = sheepsse.SSEDecoder()
    for number in "123":
        assert decoder.feed(b"data: " + number.encode() + line_end) == []
        assert decoder.feed(line_end[:1]) == [says(number)]
        assert decoder.feed(line_end[1:]) == []


def test_an_id_takes_effect_at_its_blank_line():
    decoder = sheepsse.SSEDecoder()
    decoder.feed(b"id: 7\ndata: a\n")
    assert decoder.last_event_id == ""
    decoder.feed(b"\n")
    assert decoder.last_event_id == "7"


def test_a_reconnection_time_takes_effect_at_its_line_end():
    decoder = sheepsse.SSEDecoder()
    decoder.feed(b"retry: 150")
    assert decoder.retry is None
    decoder.feed(b"0\n")
    assert decoder.retry == 1500


def test_a_decoder_goes_on_from_the_id_it_is_given():
    decoder = sheepsse.SSEDecoder(last_event_id="số 7")
    assert decoder.last_event_id == "số 7"
    assert decoder.feed(b"data: a\n\nid\ndata: b\n\n") == [says("a", id="số 7"), says("b")]


def test_an_empty_block_says_nothing_also_between_cr_and_lf():
    blocks = [b"", b"data: a\r", b"", b"\ndata: b", b"", b"\r", b"", b"\n", b"", b"\r", b"", b"\n", b""]
    assert read(blocks).events == [says("a\nb")]


def test_a_reconnection_time_of_thousands_of_digits_is_a_long_time_and_no_error():
    reading = read([b"retry: " + b"9" * 5000 + b"\ndata: a\n\n"])
    assert reading.events == [says("a", retry=reading.retry)]
    assert reading.retry >= 10**15
    assert read([b"retry: " + b"0" * 5000 + b"7\n"]).retry == 7


def test_the_last_event_is_dropped_where_its_json_is_too_deep_to_read(no_collection):
    assert read([b"data: a\n\ndata: " + b"[" * 100_000 + b"]" * 100_000 + b"\n"]).events == [says("a")]


def by_the_letter(data):
    """The events of an input as the specification puts it: decoded as a whole, line by line, the rest thrown away"""
    text = data.decode("utf-8", "replace")
    lines = re.split("\r\n|\r|\n", text[1:] if text[:1] == "\ufeff" else text)[:-1]
    events, buffer, name, last_id, retry, reconnection_time = [], "", "", "", None, None
    committed = ""
    for line in lines:
        if line == "":
            committed = last_id
            if buffer:
                events.append(says(buffer[:-1], name or "message", last_id, retry))
            buffer, name, retry = "", "", None
        elif not line.startswith(":"):
            field, _, value = line.partition(":")
            value = value[1:] if value.startswith(" ") else value
            if field == "event":
                name = value
            elif field == "data":
                buffer += value + "\n"
            elif field == "id" and "\0" not in value:
                last_id = value
            elif field == "retry" and re.fullmatch("[0-9]+", value):
                reconnection_time = retry = int(value)
    return Reading(events, reconnection_time, committed)


FRAGMENTS = [
    *(b"data", b"data:", b"data: ", b"data: a\n\n", b"event", b"event: x", b"id", b"id: 7", b"retry: 5", b"retry:"),
    *(b":", b": c", b"\n", b"\r", b"\r\n", b"\n\n", b"\r\r", b"\r\n\r\n", b" ", b"\t", b"\0", BOM, BOM[:2]),
    *(b"[DONE]", b"{", b"}", b'{"a": 1}', "🐑".encode(), "🐑".encode()[:3], b"\xff", b"\x85", "\u2028".encode()),
]
STREAMS = st.lists(st.sampled_from(FRAGMENTS) | st.binary(max_size=3), max_size=30).map(b"".join)
POSITIONS = st.lists(st.integers(0, 300), max_size=20)


@property_of
@given(STREAMS, POSITIONS)
def test_any_cutting_of_any_input_gives_the_same_events(data, positions):
    assert read(cut(data, positions)) == read([data])


@property_of
@given(STREAMS, POSITIONS)
def test_any_input_means_what_the_specification_read_by_the_letter_says(data, positions):
    decoder = sheepsse.SSEDecoder()
    events = [event for block in cut(data, positions) for event in decoder.feed(block)]
    assert Reading(events, decoder.retry, decoder.last_event_id) == by_the_letter(data)


@property_of
@given(STREAMS, POSITIONS)
def test_iter_events_gives_what_a_decoder_does(data, positions):
    assert list(sheepsse.iter_events(cut(data, positions))) == read([data]).events


# Size limits


def fits(decoder, data, positions=()):
    """Whether a decoder takes an event, cut at these positions"""
    try:
        return bool([event for block in cut(data, positions) for event in decoder.feed(block)] or decoder.flush())
    except sheepsse.InvalidStreamError:
        return False


@pytest.mark.parametrize(
    "event",
    [
        b"data: 1234567890\n\n",
        b"data\ndata\ndata\ndata\n\n",
        b"data: 1234\ndata:5\n\n",
        b"data: 1234\r\ndata:5\r\n\r\n",
        b": 12345678901234\rdata: a\r\r",
    ],
)
def test_sixteen_bytes_of_lines_pass_a_limit_of_sixteen_and_not_one_of_fifteen(event):
    for position in range(len(event)):
        assert fits(sheepsse.SSEDecoder(max_event_size=16), event, [position])
        assert not fits(sheepsse.SSEDecoder(max_event_size=15), event, [position])


def test_the_limit_is_one_events_and_not_the_streams():
    events = [says("x" * 90, id=str(number)) for number in range(1000)]
    data = b"".join(map(sheepsse.encode_event, events))
    assert list(sheepsse.iter_events(blocks_of(data, 1000), max_event_size=100)) == events


def test_comments_may_go_on_for_ever_inside_an_event():
    data = b"data: a\n" + b": keep-alive\n" * 10_000 + b"data: b\n\n"
    assert list(sheepsse.iter_events(blocks_of(data, 1000), max_event_size=100)) == [says("a\nb")]


@pytest.mark.parametrize("size", [1, 7, 40, 1000])
def test_events_before_one_too_large_are_given_out_first_however_it_is_cut(size):
    data = b"data: a\n\nid: 7\ndata: b\n\ndata: " + b"x" * 200 + b"\n\ndata: c\n\n"
    events, error = until_error(sheepsse.iter_events(blocks_of(data, size), max_event_size=100))
    assert events == [says("a"), says("b", id="7")]
    assert isinstance(error, sheepsse.InvalidStreamError)
    assert "100 bytes" in str(error)
    assert "max_event_size" in str(error)
    assert not error.retryable


def test_a_decoder_that_failed_stays_failed():
    decoder = sheepsse.SSEDecoder(max_event_size=10)
    assert decoder.feed(b"data: a\n\ndata: 1234567890\n\ndata: b\n\n") == [says("a")]
    for call in (lambda: decoder.feed(b"data: c\n\n"), lambda: decoder.feed(b""), decoder.flush, decoder.flush):
        with pytest.raises(sheepsse.InvalidStreamError, match="larger than 10 bytes"):
            call()


def test_larger_events_than_the_usual_limit_pass_where_it_is_raised():
    text = "x" * (9 * MIB)
    blocks = blocks_of(b"data: " + text.encode() + b"\n\n", 65536)
    with pytest.raises(sheepsse.InvalidStreamError):
        list(sheepsse.iter_events(blocks))
    with pytest.raises(sheepsse.InvalidStreamError):
        read(blocks)
    assert list(sheepsse.iter_events(blocks, max_event_size=10 * MIB)) == [says(text)]
    assert read(blocks, sheepsse.SSEDecoder(max_event_size=10 * MIB)).events == [says(text)]


FIRST = b"data: first\n\n"
#: how an input begins, and what it then repeats for ever
ENDLESS = {
    "a line of data": (FIRST + b"data: ", b"x"),
    "a comment": (FIRST + b": ", b"x"),
    "a name": (FIRST + b"event: ", b"x"),
    "an id": (FIRST + b"id: ", b"x"),
    "a field that is none": (FIRST, b"x"),
    "a reconnection time": (FIRST + b"retry: ", b"7"),
    "data lines": (FIRST, b"data: some words of a model, and some more of them\n"),
    "data lines with CRLF": (FIRST, b"data: some words of a model, and some more of them\r\n"),
    "empty data lines": (FIRST, b"data\n"),
    "small data lines": (FIRST, b"data:abc\n"),
}


class Consumed:
    """Blocks without end that count what was taken of them, and that end after too much of it"""

    def __init__(self, start, line, block):
        self.size = 0
        whole = line * (block + 1)
        self._blocks = itertools.chain([start], self._repeated(whole, len(line), block))

    @staticmethod
    def _repeated(whole, period, block):
        for number in itertools.count():
            at = number * block % period
            yield whole[at : at + block]

    def __iter__(self):
        for block in self._blocks:
            self.size += len(block)
            assert self.size < 10 * LIMIT, "the limit was not noticed"
            yield block


def peak_memory(run):
    """What the run returns, and how many bytes it held at most"""
    gc.collect()
    tracemalloc.start()
    try:
        result = run()
        return result, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("block", [1, 100, 4096])
@pytest.mark.parametrize("kind", ENDLESS)
def test_what_never_ends_stops_at_the_limit(kind, block):
    source = Consumed(*ENDLESS[kind], block)
    events, error = until_error(sheepsse.iter_events(source, max_event_size=LIMIT))
    assert events == [says("first")]
    assert isinstance(error, sheepsse.InvalidStreamError)
    assert source.size <= 1.3 * LIMIT + block


@pytest.mark.parametrize("block", [1, 2, 1000])
@pytest.mark.parametrize("kind", ENDLESS)
def test_memory_is_bounded_by_the_limit_also_for_small_blocks_and_lines(kind, block):
    source = Consumed(*ENDLESS[kind], block)  # its one large block is made before the count begins
    (_, error), peak = peak_memory(lambda: until_error(sheepsse.iter_events(source, max_event_size=LIMIT)))
    assert isinstance(error, sheepsse.InvalidStreamError)
    assert peak < 4 * LIMIT


# Cost


def assert_linear(run, size):
    """Sixteen times the input costs some 16 times as much; a quadratic cost would be 256 times as much"""
    small = cpu_seconds(lambda: run(size // 16))
    large = cpu_seconds(lambda: run(size))
    assert large < 96 * small  # fresh memory makes a linear cost up to four times as much as it should be


def read_all(events):
    """Reads events as they come and keeps none; returns how many characters they had"""
    return sum(len(event.data) for event in events)


@pytest.mark.parametrize("block", [64 * 1024, 1024])
def test_one_line_costs_time_linear_in_its_length(block):
    def run(size):
        blocks = itertools.chain([b"data:"], itertools.repeat(b"x" * block, size // block), [b"\n\n"])
        assert read_all(sheepsse.iter_events(blocks, max_event_size=2 * size)) == size

    assert_linear(run, 16 * MIB)


@pytest.mark.parametrize("block", [64 * 1024, 1024])
def test_data_lines_cost_time_linear_in_their_number(block):
    def run(lines):
        blocks = blocks_of(b"data: x\n" * lines + b"\n", block)
        assert read_all(sheepsse.iter_events(blocks)) == 2 * lines - 1

    assert_linear(run, 200_000)


@pytest.mark.parametrize("line", [b"\n", b": keep-alive\n", b"id: 7\n", b"event: ping\n\n"])
def test_lines_cost_time_linear_in_their_number(line):
    def run(lines):
        assert read_all(sheepsse.iter_events(blocks_of(line * lines, 16 * 1024))) == 0

    assert_linear(run, 40_000)


def events_of(size, block=64 * 1024):
    """Blocks of events of 1 kB, made when they are drawn, that have so many bytes together"""
    event = b"data: " + b"x" * (1024 - 8) + b"\n\n"
    return itertools.repeat(event * (block // 1024), size // block)


def test_a_long_stream_costs_time_linear_in_its_length():
    def run(size):
        assert read_all(sheepsse.iter_events(events_of(size))) == size // 1024 * (1024 - 8)

    assert_linear(run, 32 * MIB)


def test_a_long_stream_is_never_held_in_memory():
    count, peak = peak_memory(lambda: read_all(sheepsse.iter_events(events_of(20 * MIB))))
    assert count == 20 * 1024 * (1024 - 8)
    assert peak < MIB


@pytest.mark.parametrize("block", [64 * 1024, 1024])
def test_one_json_object_costs_time_linear_in_its_length(block):
    def run(size):
        blocks = itertools.chain([b'{"a": "'], itertools.repeat(b"x" * block, size // block), [b'"}'])
        assert read_all(sheepsse.iter_json_lines(blocks, max_event_size=2 * size)) == size + 9

    assert_linear(run, 16 * MIB)


@pytest.mark.parametrize("block", [64 * 1024, 1024])
def test_braces_quotes_and_escapes_cost_time_linear_in_their_number(block):
    def run(marks):
        text = b'{"a": "\\"{}\\\\", "b": {}}' * (marks // 12)
        assert read_all(sheepsse.iter_json_lines(blocks_of(b"[" + text + b"]", block))) == len(text)

    assert_linear(run, 48_000)


# parse_line


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("data: a", ("data", "a")),
        ("data:a", ("data", "a")),
        ("data:  a ", ("data", " a ")),
        ("data:\ta", ("data", "\ta")),
        ("data: a: b:c", ("data", "a: b:c")),
        ("data: [DONE]\r", ("data", "[DONE]")),
        ("data: [DONE]\r\n", ("data", "[DONE]")),
        ("data: [DONE]\n", ("data", "[DONE]")),
        ("data", ("data", "")),
        ("data:", ("data", "")),
        ("data: ", ("data", "")),
        ("event: ping", ("event", "ping")),
        ("id: 7", ("id", "7")),
        ("retry: abc", ("retry", "abc")),
        ("anything else", ("anything else", "")),
        (" data: a", (" data", "a")),
        ("data: a\u2028b\x0bc\x85d", ("data", "a\u2028b\x0bc\x85d")),
        ("data: 🐑", ("data", "🐑")),
        ("data: \0", ("data", "\0")),
        ("", None),
        ("\n", None),
        ("\r\n", None),
        ("\r", None),
        (":", None),
        (": hello", None),
        (":data: a", None),
    ],
)
def test_a_line_is_a_field_and_its_value_or_nothing_as_str_and_as_bytes(line, expected):
    assert sheepsse.parse_line(line) == expected
    assert sheepsse.parse_line(line.encode()) == expected
    assert sheepsse.parse_line(bytearray(line.encode())) == expected


def test_what_is_no_utf_8_in_a_line_is_replaced():
    assert sheepsse.parse_line(b"da\xffta: a\xf0\x9f") == ("da\ufffdta", "a\ufffd")
    assert sheepsse.parse_line("data: \ud800") == ("data", "\ufffd" * 3)


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=50)


@property_of
@given(st.binary(max_size=50) | ANY_TEXT)
@example("\ud800")
@example(b"\xff")
@example(b"\xf0\x9f\x90:\xf0\x9f\x90")
def test_a_line_in_any_state_is_text_or_nothing_and_never_an_exception(line):
    found = sheepsse.parse_line(line)
    if found is not None:
        field, value = found
        assert field
        assert ":" not in field
        (field + value).encode("utf-8")  # no half of a surrogate pair is left


@property_of
@given(st.text(max_size=50))
def test_a_line_means_the_same_as_text_and_as_bytes(line):
    assert sheepsse.parse_line(line) == sheepsse.parse_line(line.encode("utf-8"))


@property_of
@given(st.sampled_from([b"data", b"data:", b"data: ", b":", b""]), st.binary(max_size=20))
def test_a_line_means_the_same_to_a_decoder(start, rest):
    line = re.sub(rb"[\r\n]", b"", start + rest)
    events = sheepsse.SSEDecoder().feed(b"\n" + line + b"\n\n")
    found = sheepsse.parse_line(line)
    assert [event.data for event in events] == ([found[1]] if found and found[0] == "data" else [])


# Events to bytes


def decoded(data):
    return list(sheepsse.iter_events([data]))


@pytest.mark.parametrize(
    ("event", "encoded"),
    [
        (says(), b"data: \n\n"),
        (says("a"), b"data: a\n\n"),
        (says("a", ""), b"data: a\n\n"),
        (says("a", "ping", "7", 1500), b"event: ping\nid: 7\nretry: 1500\ndata: a\n\n"),
        (says("a\nb\n"), b"data: a\ndata: b\ndata: \n\n"),
        (says(" a"), b"data:  a\n\n"),
        (says("a", retry=0), b"retry: 0\ndata: a\n\n"),
        (says("é", "é", "é"), "event: é\nid: é\ndata: é\n\n".encode()),
    ],
)
def test_an_event_is_encoded_as_one_would_write_it(event, encoded):
    assert sheepsse.encode_event(event) == encoded


def test_every_line_end_in_data_comes_back_as_the_one_the_format_knows():
    encoded = sheepsse.encode_event(says("a\r\nb\rc\nd\n\re\r"))
    assert b"\r" not in encoded
    assert decoded(encoded) == [says("a\nb\nc\nd\n\ne\n")]


def test_what_only_other_formats_take_for_a_line_end_stays_in_its_line():
    event = says("a\x0bb\x0c\x1c\x1d\x1e\x85\u2028\u2029", "a\x0bb\u2028", "\x85")
    assert decoded(sheepsse.encode_event(event)) == [event]


LINE = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\r\n"), max_size=20)
CARRIED = st.builds(
    ServerSentEvent,
    event=LINE.filter(bool),
    data=st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\r"), max_size=50),
    id=LINE.map(lambda line: line.replace("\0", "")),
    retry=st.none() | st.integers(0, 10**16 - 1),
)


@property_of
@given(CARRIED, POSITIONS)
@example(says("", "message"), [])
@example(says("\n", ":", ":"), [])
@example(says("\ufeff", "\ufeff", "\ufeff"), [])
@example(says(" \n ", " ", " "), [])
def test_an_event_that_the_format_can_carry_comes_back_as_it_was(event, positions):
    assert read(cut(sheepsse.encode_event(event), positions)).events == [event]


@property_of
@given(st.lists(CARRIED.filter(lambda event: event.id), max_size=5), POSITIONS)
def test_events_sent_one_after_another_come_back_as_they_were(events, positions):
    data = b"".join(map(sheepsse.encode_event, events))
    assert list(sheepsse.iter_events(cut(data, positions))) == events


def test_an_event_without_an_id_leaves_the_one_in_force():
    data = sheepsse.encode_event(says("a", id="7")) + sheepsse.encode_event(says("b"))
    assert decoded(data) == [says("a", id="7"), says("b", id="7")]


HOSTILE = st.lists(
    st.sampled_from(["\n", "\r", "\r\n", "\n\n", "\0", "data: forged", "event: forged", "id: forged", ":", "\ufeff"])
    | st.text(st.characters(exclude_categories=()), max_size=5),
    max_size=8,
).map("".join)


@property_of
@given(st.builds(ServerSentEvent, event=HOSTILE, data=HOSTILE, id=HOSTILE, retry=st.none() | st.integers(0, 9)))
@example(says("a\n\ndata: forged\n\n"))
@example(says("a\r\revent: forged"))
@example(says("a", "ping\ndata: forged"))
@example(says("a", "ping\rid: forged"))
@example(says("a", id="7\n\ndata: forged"))
@example(says("a", id="7\0"))
@example(says("\ud800", "\ud800", "\ud800"))
def test_no_value_can_forge_a_field_or_an_event(event):
    try:
        encoded = sheepsse.encode_event(event)
    except ValueError:
        assert re.search("[\r\n]", event.event) or re.search("[\r\n\0]", event.id)
        return

    def carried(value):  # half of a surrogate pair cannot be sent
        return re.sub("[\ud800-\udfff]", "?", value)

    expected = says(
        carried(re.sub("\r\n|\r", "\n", event.data)), carried(event.event) or "message", carried(event.id), event.retry
    )
    assert read([sheepsse.encode_event(says("before")), encoded, b"data: after\n\n"]).events == [
        says("before"),
        expected,
        says("after", id=expected.id),
    ]


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (says("a", "ping\n"), "the event of an event cannot hold a line end"),
        (says("a", "\rping"), "the event of an event"),
        (says("a", id="7\n8"), "the id of an event"),
        (says("a", id="7\r"), "the id of an event"),
        (says("a", id="\0"), "the id of an event cannot hold a line end or NUL"),
    ],
)
def test_a_name_or_id_that_the_format_cannot_carry_is_refused_by_name(event, words):
    with pytest.raises(ValueError, match=words):
        sheepsse.encode_event(event)


@pytest.mark.parametrize("retry", ["5\ndata: forged", "5", 1.5])
def test_a_reconnection_time_that_is_no_whole_number_is_refused(retry):
    with pytest.raises(ValueError):
        sheepsse.encode_event(says("a", retry=retry))


def test_a_reconnection_time_that_the_format_cannot_carry_is_refused():
    with pytest.raises(ValueError):
        sheepsse.encode_event(says("a", retry=-1))


# The bodies of responses, over real sockets

FRAMINGS = ("chunked", "one-chunk", "length", "close", "gzip", "gzip-length", "gzip-close")
#: framings that say where the body ends, so that an end before it can be told
BOUNDED = ("chunked", "one-chunk", "length", "gzip", "gzip-length")
PIECES = [b"data: 1\n\n", b"data: " + bytes(range(256)) * 80 + b"\n\n", b"data: 3\n\n"]


@contextlib.contextmanager
def answered(server, answer, **options):
    """A response of the server, its body not yet read"""
    server.answer(answer)
    with requests.get(server.origin, stream=True, timeout=HANG, **options) as response:
        yield response


def take(blocks, size):
    """Blocks until they have so many bytes together"""
    taken = b""
    while len(taken) < size:
        taken += next(blocks)
    return taken


@pytest.mark.parametrize("block", [0, 1000])
@pytest.mark.parametrize("framing", FRAMINGS)
def test_a_body_is_given_out_whole_in_every_framing(server, framing, block):
    body = b"".join(PIECES) * 20
    with answered(server, Answer(body=body, framing=framing, block=block)) as response:
        assert b"".join(sheepsse.iter_bytes(response)) == body


@pytest.mark.parametrize("framing", FRAMINGS)
def test_a_body_of_nothing_gives_no_blocks(server, framing):
    with answered(server, Answer(body=b"", framing=framing)) as response:
        assert list(sheepsse.iter_bytes(response)) == []


@pytest.mark.parametrize("size", [20, 20_000])
@pytest.mark.parametrize("framing", FRAMINGS)
def test_bytes_are_given_out_while_the_server_is_silent(server, framing, size):
    piece = b"data: " + b"x" * (size - 8) + b"\n\n"
    with answered(server, Answer(events=[piece, piece], framing=framing, stall_after=1)) as response:
        blocks = sheepsse.iter_bytes(response)
        assert take(blocks, size) == piece
        server.release()
        assert b"".join(blocks) == piece


@pytest.mark.parametrize("framing", FRAMINGS)
def test_an_event_is_given_out_while_the_server_is_silent(server, framing):
    answer = Answer(events=[b"data: 1\n\n", b"data: 2\n\n"], framing=framing, stall_after=1)
    with answered(server, answer) as response:
        events = sheepsse.iter_events(response)
        assert next(events) == says("1")
        server.release()
        assert list(events) == [says("2")]


def test_a_small_gzip_body_may_be_a_large_text(server):
    body = b"data: " + b"x" * MIB + b"\n\n"
    with answered(server, Answer(events=[body, b"data: 2\n\n"], framing="gzip")) as response:
        assert b"".join(sheepsse.iter_bytes(response)) == body + b"data: 2\n\n"


@pytest.mark.parametrize("framing", BOUNDED)
def test_a_body_that_ends_early_is_an_error_after_all_its_bytes(server, framing):
    with answered(server, Answer(events=PIECES, framing=framing, cut_after=2)) as response:
        blocks, error = until_error(sheepsse.iter_bytes(response))
    assert b"".join(blocks) == b"".join(PIECES[:2])
    assert type(error) is sheepsse.StreamInterrupted
    assert error.retryable
    assert isinstance(error.__cause__, urllib3.exceptions.ProtocolError)


@pytest.mark.parametrize("framing", FRAMINGS)
def test_a_connection_that_is_reset_is_an_error_after_all_bytes(server, framing):
    with answered(server, Answer(events=PIECES, framing=framing, cut_after=2, cut="reset")) as response:
        blocks, error = until_error(sheepsse.iter_bytes(response))
    assert b"".join(blocks) == b"".join(PIECES[:2])
    assert type(error) is sheepsse.StreamInterrupted


@pytest.mark.parametrize("framing", ["chunked", "gzip", "one-chunk"])
def test_a_body_without_its_last_chunk_is_an_error_after_all_its_bytes(server, framing):
    with answered(server, Answer(events=PIECES, framing=framing, cut_after=len(PIECES))) as response:
        blocks, error = until_error(sheepsse.iter_bytes(response))
    assert b"".join(blocks) == b"".join(PIECES)
    assert type(error) is sheepsse.StreamInterrupted


def test_a_body_of_no_bytes_where_some_were_promised_is_an_error(server):
    with answered(server, Answer(events=PIECES, framing="length", cut_at=0)) as response:
        blocks, error = until_error(sheepsse.iter_bytes(response))
    assert blocks == []
    assert type(error) is sheepsse.StreamInterrupted


#: what goes over the wire for two events, and which of it is the body's
WIRES = {
    "length": [(b"data: 1\n\n", True), (b"data: 2\n\n", True)],
    "chunked": [
        *((b"9\r\n", False), (b"data: 1\n\n", True), (b"\r\n", False)),
        *((b"9\r\n", False), (b"data: 2\n\n", True), (b"\r\n", False)),
    ],
}


@pytest.mark.parametrize("framing", WIRES)
def test_wherever_a_body_is_cut_what_came_is_given_out_and_then_the_error(server, framing):
    is_body = [body for part, body in WIRES[framing] for _ in part]
    for position in range(len(is_body)):
        answer = Answer(body=b"data: 1\n\ndata: 2\n\n", framing=framing, cut_at=position)
        with answered(server, answer) as response:
            blocks, error = until_error(sheepsse.iter_bytes(response))
        assert b"".join(blocks) == b"data: 1\n\ndata: 2\n\n"[: sum(is_body[:position])], position
        assert type(error) is sheepsse.StreamInterrupted, position


def test_a_close_delimited_body_that_is_cut_just_ends(server):
    with answered(server, Answer(events=PIECES, framing="close", cut_after=2)) as response:
        assert b"".join(sheepsse.iter_bytes(response)) == b"".join(PIECES[:2])


@pytest.mark.parametrize("framing", FRAMINGS)
def test_silence_for_the_read_timeout_is_a_timeout_after_all_bytes(server, framing):
    came = b"".join(PIECES[:2])
    with answered(server, Answer(events=PIECES, framing=framing, stall_after=2)) as response:
        blocks = sheepsse.iter_bytes(response)
        assert take(blocks, len(came)) == came
        sheepsse._socket_of(response).settimeout(0.05)
        rest, error = until_error(blocks)
    assert rest == []
    assert type(error) is sheepsse.StreamTimeout
    assert isinstance(error, requests.Timeout)
    assert error.retryable


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
def test_a_body_that_is_no_gzip_as_its_header_says_is_an_error_that_says_so(server, framing):
    answer = Answer(body=b"data: 1\n\n", framing=framing, headers={"Content-Encoding": "gzip"})
    with answered(server, answer) as response:
        blocks, error = until_error(sheepsse.iter_bytes(response))
    assert blocks == []
    assert type(error) is sheepsse.InvalidStreamError
    assert "Content-Encoding" in str(error)


def test_what_came_before_the_damage_in_a_gzip_body_is_given_out_first(server):
    compressor = zlib.compressobj(wbits=31)
    good = compressor.compress(b"data: 1\n\n") + compressor.flush(zlib.Z_SYNC_FLUSH)
    answer = Answer(events=[good, b"\xff" * 50], headers={"Content-Encoding": "gzip"}, stall_after=1)
    with answered(server, answer) as response:
        blocks = sheepsse.iter_bytes(response)
        assert next(blocks) == b"data: 1\n\n"
        server.release()
        with pytest.raises(sheepsse.InvalidStreamError):
            next(blocks)


def test_chunks_that_are_none_are_an_error_of_ours(server):
    answer = Answer(body=b"data: 1\n\n", framing="close", headers={"Transfer-Encoding": "chunked"})
    with answered(server, answer) as response:
        blocks, error = until_error(sheepsse.iter_bytes(response))
    assert blocks == []
    assert type(error) is sheepsse.StreamInterrupted


def test_nothing_is_read_before_the_first_block_is_asked_for(server):
    with answered(server, Answer(body=b"data: 1\n\n", framing="length")) as response:
        for function in (sheepsse.iter_bytes, sheepsse.iter_events, sheepsse.iter_json_lines):
            function(response)
        assert response.content == b"data: 1\n\n"


# Responses of another making


@pytest.mark.parametrize("framing", FRAMINGS)
def test_a_response_that_requests_has_read_still_gives_its_body(server, framing):
    server.answer(Answer(events=[b"data: 1\n\n" * 20_000], framing=framing))
    response = requests.get(server.origin, timeout=HANG)
    assert len(list(sheepsse.iter_events(response))) == 20_000
    assert b"".join(sheepsse.iter_bytes(response)) == response.content


def test_a_response_whose_body_another_loop_has_used_up_is_refused_in_requests_words(server):
    with answered(server, Answer(body=b"data: 1\n\n")) as response:
        assert b"".join(response.iter_content(100)) == b"data: 1\n\n"
        with pytest.raises(requests.exceptions.StreamConsumedError):
            list(sheepsse.iter_bytes(response))


@responses.activate
def test_a_response_that_a_test_library_made_gives_its_body():
    responses.add(responses.GET, "http://example.com/", body=b"data: 1\n\ndata: 2\n\n")
    with requests.get("http://example.com/", stream=True, timeout=HANG) as response:
        assert list(sheepsse.iter_events(response)) == [says("1"), says("2")]


def test_a_response_over_any_file_gives_its_body():
    response = requests.Response()
    response.raw = io.BytesIO(b"data: 1\n\ndata: 2\n\n")
    assert list(sheepsse.iter_events(response)) == [says("1"), says("2")]


class Unbuffered:
    """A file that can read() and close(), no more, as recording libraries put it under a response"""

    closed = False

    def __init__(self, data):
        self.read = io.BytesIO(data).read

    def close(self):
        self.closed = True


def test_a_response_over_a_file_that_can_only_read_gives_its_body():
    response = requests.Response()
    response.raw = urllib3.HTTPResponse(body=Unbuffered(b"data: 1\n\n"), preload_content=False)
    assert list(sheepsse.iter_events(response)) == [says("1")]


class OtherResponse:
    """What another library's response has in common with that of requests"""

    def __init__(self, body, error=None):
        self.raw = None
        self.asked = []
        self._body = body
        self._error = error

    def iter_content(self, size):
        self.asked.append(size)
        yield from blocks_of(self._body, size)
        if self._error:
            raise self._error


def test_a_response_of_another_library_is_asked_for_single_bytes_as_larger_blocks_may_come_late():
    response = OtherResponse(b"data: 1\n\n")
    assert list(sheepsse.iter_events(response)) == [says("1")]
    assert response.asked == [1]


READ_TIMEOUT = urllib3.exceptions.ReadTimeoutError(None, "/", "Read timed out.")


@pytest.mark.parametrize(
    ("foreign", "kind"),
    [
        (requests.ConnectionError(READ_TIMEOUT), sheepsse.StreamTimeout),
        (READ_TIMEOUT, sheepsse.StreamTimeout),
        (socket.timeout("timed out"), sheepsse.StreamTimeout),
        (requests.ConnectionError(), sheepsse.StreamInterrupted),
        (requests.ConnectionError("reset"), sheepsse.StreamInterrupted),
        (requests.exceptions.ChunkedEncodingError("short"), sheepsse.StreamInterrupted),
        (urllib3.exceptions.ProtocolError("short"), sheepsse.StreamInterrupted),
        (ConnectionResetError("reset"), sheepsse.StreamInterrupted),
        (requests.exceptions.ContentDecodingError("no gzip"), sheepsse.InvalidStreamError),
        (urllib3.exceptions.DecodeError("no gzip"), sheepsse.InvalidStreamError),
    ],
    ids=repr,
)
def test_each_librarys_failure_is_the_same_error_of_ours_after_what_came(foreign, kind):
    blocks, error = until_error(sheepsse.iter_bytes(OtherResponse(b"data", foreign)))
    assert b"".join(blocks) == b"data"
    assert type(error) is kind
    assert error.__cause__ is foreign


def test_an_error_of_ours_goes_through_as_it_is():
    mine = sheepsse.StreamCancelled("enough")
    assert until_error(sheepsse.iter_bytes(OtherResponse(b"data", mine)))[1] is mine


def test_a_mistake_in_a_foreign_library_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        list(sheepsse.iter_events(OtherResponse(b"data: 1\n\n", ZeroDivisionError())))


# Events from a source


def test_events_come_from_any_blocks_of_bytes(tmp_path):
    data = b"data: 1\n\ndata: 2\n\n"
    path = tmp_path / "recorded"
    path.write_bytes(data)
    expected = [says("1"), says("2")]
    assert list(sheepsse.iter_events([data])) == expected
    assert list(sheepsse.iter_events(iter(blocks_of(data, 3)))) == expected
    assert list(sheepsse.iter_events(part for part in blocks_of(data, 1))) == expected
    with path.open("rb") as file:
        assert list(sheepsse.iter_events(file)) == expected


def test_events_are_drawn_one_at_a_time():
    source = iter([b"data: 1\n\n", b"data: 2\n\n", b"data: 3\n\n"])
    events = sheepsse.iter_events(source)
    assert next(events) == says("1")
    assert next(source) == b"data: 2\n\n"
    assert list(events) == [says("3")]


def test_an_error_of_the_callers_own_blocks_goes_through_after_the_events_before_it():
    def blocks():
        yield b"data: 1\n\ndata: {}\n"
        raise ZeroDivisionError

    events = sheepsse.iter_events(blocks())
    assert next(events) == says("1")
    with pytest.raises(ZeroDivisionError):
        next(events)


@pytest.mark.parametrize("framing", FRAMINGS)
def test_events_before_a_lost_connection_are_given_out_and_then_the_error(server, framing):
    answer = Answer(events=[b"data: 1\n\n", b"data: 2\n\nda", b"ta: 3\n\n"], framing=framing, cut_after=2, cut="reset")
    with answered(server, answer) as response:
        events, error = until_error(sheepsse.iter_events(response))
    assert events == [says("1"), says("2")]
    assert type(error) is sheepsse.StreamInterrupted
    assert error.partial == sheepsse.Completion()


@pytest.mark.parametrize("last", ['{"a": 1}', "[DONE]"])
def test_a_whole_last_event_that_lacks_its_blank_line_is_given_out_before_a_reset(server, last):
    answer = Answer(events=[b"data: 1\n\ndata: " + last.encode(), b"\n\n"], cut_after=1, cut="reset")
    with answered(server, answer) as response:
        events, error = until_error(sheepsse.iter_events(response))
    assert events == [says("1"), says(last)]
    assert type(error) is sheepsse.StreamInterrupted


def test_a_last_event_cut_inside_a_character_is_dropped_without_an_error_of_text(server):
    body = "data: 1\n\ndata: 🐑".encode()[:-2]
    with answered(server, Answer(body=body, framing="close")) as response:
        assert list(sheepsse.iter_events(response)) == [says("1")]


def test_events_before_a_timeout_are_given_out_and_then_the_error(server):
    answer = Answer(events=[b"data: 1\n\n", b"data: 2\n\n"], stall_after=1)
    with answered(server, answer) as response:
        events = sheepsse.iter_events(response)
        assert next(events) == says("1")
        sheepsse._socket_of(response).settimeout(0.05)
        more, error = until_error(events)
    assert more == []
    assert type(error) is sheepsse.StreamTimeout


def test_an_event_too_large_stops_an_answer_without_end(server):
    answer = Answer(events=itertools.chain([b"data: 1\n\ndata: "], itertools.repeat(b"x" * 1000)))
    with answered(server, answer) as response:
        events, error = until_error(sheepsse.iter_events(response, max_event_size=LIMIT))
    assert events == [says("1")]
    assert type(error) is sheepsse.InvalidStreamError


# JSON instead of events


def objects(blocks, **options):
    """The JSON objects of the blocks, and the error that ended them or None"""
    events, error = until_error(sheepsse.iter_json_lines(blocks, **options))
    assert all(event == says(event.data) for event in events)
    return [json.loads(event.data) for event in events], error


JSON_BODIES = [
    ("nothing", b"", []),
    ("one object", b'{"a": 1}', [{"a": 1}]),
    ("one object and a line end", b'{"a": 1}\n', [{"a": 1}]),
    ("lines", b'{"a": 1}\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
    ("lines that end with CRLF", b'{"a": 1}\r\n{"a": 2}\r\n', [{"a": 1}, {"a": 2}]),
    ("blank lines", b'\n\r\n{"a": 1}\n\n \t\r\n{"a": 2}', [{"a": 1}, {"a": 2}]),
    ("no line ends", b'{"a": 1}{"a": 2}', [{"a": 1}, {"a": 2}]),
    ("an array", b'[{"a": 1}, {"a": 2}]', [{"a": 1}, {"a": 2}]),
    ("an empty array", b"[]", []),
    ("an array of empty objects", b"[{},{}]", [{}, {}]),
    (
        "a pretty array",
        b'[{\r\n  "a": 1,\r\n  "b": [\r\n    {}\r\n  ]\r\n}\r\n,\r\n{\r\n  "a": 2\r\n}\r\n]\r\n',
        [{"a": 1, "b": [{}]}, {"a": 2}],
    ),
    ("an array that is not closed", b'[{"a": 1},\n{"a": 2}', [{"a": 1}, {"a": 2}]),
    ("objects in objects", b'{"a": {"b": {}}, "c": [{}, {}]}{}', [{"a": {"b": {}}, "c": [{}, {}]}, {}]),
    ("braces in strings", rb'{"}": "{{"}{"a": "}\"}"}', [{"}": "{{"}, {"a": '}"}'}]),
    ("escapes at the end of strings", rb'{"a": "\\"}{"a": "\\\""}{"\\": ""}', [{"a": "\\"}, {"a": '\\"'}, {"\\": ""}]),
    ("an escaped character", rb'{"a": "\u007b\ud83d\udc11"}', [{"a": "{🐑"}]),
    ("characters of several bytes", '{"é": "🐑"}\n'.encode(), [{"é": "🐑"}]),
    ("a BOM", BOM + b'{"a": 1}\n', [{"a": 1}]),
    ("a BOM before an array", BOM + b'[{"a": 1}]\n', [{"a": 1}]),
    ("an object cut off at the end", b'{"a": 1}\n{"a": 2', [{"a": 1}]),
    ("an object cut off in a string", b'{"a": 1}\n{"a": "}', [{"a": 1}]),
    ("an object cut off after a backslash", b'{"a": 1}\n{"a": "\\', [{"a": 1}]),
    ("an object cut off at its first brace", b'{"a": 1}\n{', [{"a": 1}]),
]


@pytest.mark.parametrize(("body", "expected"), [row[1:] for row in JSON_BODIES], ids=[row[0] for row in JSON_BODIES])
def test_json_objects_are_told_apart_however_they_are_cut(body, expected):
    for blocks in cuttings(body):
        assert objects(blocks) == (expected, None), blocks


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": 1}\nnonsense',
        b'{"a": 1}\n"a"',
        b'{"a": 1}\n7',
        b'{"a": 1}\nnull',
        b'{"a": 1}}',
        b'[{"a": 1}: {"a": 2}]',
        b'{"a": 1}\ndata: {"a": 2}',
        b'{"a": 1}\n' + BOM + b'{"a": 2}',
        b'{"a": 1}\n\xff',
    ],
)
def test_what_is_no_json_object_is_an_error_after_the_objects_before_it(body):
    for blocks in cuttings(body):
        found, error = objects(blocks)
        assert found == [{"a": 1}], blocks
        assert type(error) is sheepsse.InvalidStreamError
        assert "expected JSON objects, got" in str(error)


def test_an_object_is_given_out_at_its_last_brace():
    source = iter([b'[{"a": {', b"}", b"}", b"]"])
    events = sheepsse.iter_json_lines(source)
    assert next(events) == says('{"a": {}}')
    assert next(source) == b"]"


def test_the_text_of_an_object_is_as_it_was_sent():
    (event,) = sheepsse.iter_json_lines([b' [ { "a" :\r\n 1.0 } ] '])
    assert event == says('{ "a" :\r\n 1.0 }')


def test_what_is_no_utf_8_in_an_object_is_replaced():
    assert objects([b'{"a": "\xff"}']) == ([{"a": "\ufffd"}], None)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_objects_before_one_too_large_are_given_out_first_however_they_are_cut(size):
    fitting = b'{"a": "%s"}' % (b"x" * 91)  # 100 bytes
    for body in (fitting * 2 + fitting[:-2] + b'xy"}', b"[" + fitting + b",\n" + fitting + b"," + b"{" * 1000):
        found, error = objects(blocks_of(body, size), max_event_size=100)
        assert len(found) == 2
        assert type(error) is sheepsse.InvalidStreamError
        assert "100 bytes" in str(error)


def test_larger_objects_than_the_usual_limit_pass_where_it_is_raised():
    body = b'{"a": "' + b"x" * (9 * MIB) + b'"}'
    assert objects([body])[1].code == "INVALID_SSE_FORMAT"
    assert objects([body], max_event_size=10 * MIB) == ([{"a": "x" * (9 * MIB)}], None)


def test_white_space_and_commas_between_objects_may_go_on_for_ever():
    assert objects([b"[ \n,"] * 10_000 + [b"{}"], max_event_size=10) == ([{}], None)


ENDLESS_OBJECTS = {
    "a string": (b'{"a": "', b"x"),
    "numbers": (b'{"a": [', b"12345, "),
    "braces": (b"", b'{"a":'),
}


@pytest.mark.parametrize("kind", ENDLESS_OBJECTS)
def test_an_object_without_end_stops_at_the_limit_with_memory_bounded_by_it(kind):
    source = Consumed(*ENDLESS_OBJECTS[kind], 1000)
    (found, error), peak = peak_memory(lambda: until_error(sheepsse.iter_json_lines(source, max_event_size=LIMIT)))
    assert found == []
    assert type(error) is sheepsse.InvalidStreamError
    assert source.size < 1.3 * LIMIT
    assert peak < 4 * LIMIT


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
TRICKY = st.dictionaries(st.text('\\"{}[],: \na', max_size=6), st.text('\\"{}[],: \na', max_size=6), max_size=3)
OBJECTS = st.lists(st.dictionaries(st.text(max_size=5), JSON_VALUES, max_size=3) | TRICKY, max_size=5)


@property_of
@given(OBJECTS, st.sampled_from([None, 1]), st.booleans(), st.sampled_from(["\n", "\r\n", "", "\n\n"]), POSITIONS)
def test_any_json_objects_come_back_from_lines_however_they_are_cut(expected, indent, ascii_only, end, positions):
    text = "".join(json.dumps(value, indent=indent, ensure_ascii=ascii_only) + end for value in expected)
    assert objects(cut(text.encode("utf-8"), positions)) == (expected, None)


@property_of
@given(OBJECTS, st.sampled_from([None, 1, "\t"]), st.booleans(), st.sampled_from(["\n", "\r\n"]), POSITIONS)
def test_any_json_objects_come_back_from_an_array_however_it_is_cut(expected, indent, ascii_only, end, positions):
    text = json.dumps(expected, indent=indent, ensure_ascii=ascii_only).replace("\n", end)
    assert objects(cut(text.encode("utf-8"), positions)) == (expected, None)


@property_of
@given(st.binary(max_size=40) | st.text('{}[]",:\\ \na1', max_size=40).map(str.encode), POSITIONS)
def test_any_bytes_as_json_give_the_same_however_they_are_cut(data, positions):
    def outcome(blocks):
        events, error = until_error(sheepsse.iter_json_lines(blocks))
        return events, type(error)

    assert outcome(cut(data, positions)) == outcome([data])


def test_objects_come_over_a_socket_while_the_server_is_silent(server):
    pieces = [b'[{"a": 1}\n,\r\n{"a"', b": 2}]"]
    for framing in FRAMINGS:
        with answered(server, Answer(events=pieces, framing=framing, stall_after=1)) as response:
            events = sheepsse.iter_json_lines(response)
            assert next(events) == says('{"a": 1}')
            server.release()
            assert list(events) == [says('{"a": 2}')]


def test_objects_before_a_lost_connection_are_given_out_and_then_the_error(server):
    answer = Answer(events=[b'{"a": 1}\n{"a"', b": 2}\n"], cut_after=1, cut="reset")
    with answered(server, answer) as response:
        found, error = objects(response)
    assert found == [{"a": 1}]
    assert type(error) is sheepsse.StreamInterrupted


# The framing of an answer, told by its Content-Type and its first byte

CHUNKS = [
    {"id": "c-1", "model": "m-1", "choices": [{"index": 0, "delta": {"content": "Good"}}]},
    {"id": "c-1", "model": "m-1", "choices": [{"index": 0, "delta": {"content": " day"}, "finish_reason": "stop"}]},
]
COMPLETION = {"id": "c-1", "choices": [{"index": 0, "message": {"content": "Good day"}, "finish_reason": "stop"}]}
EVENTS = b"".join(b"data: %s\n\n" % json.dumps(chunk).encode() for chunk in CHUNKS) + b"data: [DONE]\n\n"
LINES = b"".join(b"%s\n" % json.dumps(chunk).encode() for chunk in CHUNKS)
ARRAY = json.dumps(CHUNKS, indent=2).replace("\n", "\r\n").encode()
PAGE = b"<!DOCTYPE html>\n<html><body>data: Sign in, please</body></html>\n"


def text_of(server, client, body, content_type, block=0, **options):
    answer = Answer(body=body, block=block, headers={"Content-Type": content_type})
    server.answer(answer)
    return "".join(client.stream("Good day?", **options))


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (EVENTS, "text/event-stream"),
        (EVENTS, "text/event-stream; charset=utf-8"),
        (b"x-field: 7\n" + EVENTS, "Text/Event-Stream ;charset=latin-1"),
        (EVENTS, None),
        (EVENTS, "text/plain"),
        (EVENTS, "application/octet-stream"),
        (EVENTS, "application/json"),
        (BOM + EVENTS, "text/event-stream"),
        (BOM + EVENTS, None),
        (b": keep-alive\n\n" + EVENTS, "text/plain"),
        (b"id: 7\n" + EVENTS, "text/plain"),
        (b"event: message\n" + EVENTS, "text/plain"),
        (b"retry: 7\n" + EVENTS, "text/plain"),
        (b"x-field: 7\n" + EVENTS, "text/event-stream"),
        (LINES, "application/x-ndjson"),
        (LINES, "application/json; charset=utf-8"),
        (LINES, "text/event-stream"),
        (LINES, None),
        (ARRAY, "application/json"),
        (ARRAY, "text/event-stream"),
        (ARRAY, None),
        (json.dumps(COMPLETION).encode(), "application/json"),
        (json.dumps(COMPLETION).encode(), "text/event-stream"),
        (json.dumps(COMPLETION).encode(), None),
        (b"\n\r\n \n" + json.dumps(COMPLETION).encode(), "application/json"),
        (b"\n\n\r\n\r\r\n" + EVENTS, "text/event-stream"),
        (b"\n\n\r\n\r\r\n" + EVENTS, None),
    ],
)
def test_an_answer_is_read_in_the_framing_it_has(server, client, body, content_type, block):
    assert text_of(server, client, body, content_type, block) == "Good day"


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (PAGE, "text/html; charset=utf-8"),
        (PAGE, "text/event-stream"),
        (PAGE, "application/json"),
        (PAGE, None),
        (b"\r\n\r\n" + PAGE, "text/html"),
        (EVENTS, "text/html"),
        (b"Good day", "text/plain"),
        (b"Good day", None),
        (b'"Good day"', "application/json"),
        (b"null", "application/json"),
    ],
)
def test_an_answer_in_no_framing_of_ours_is_an_error_that_says_what_came(server, client, body, content_type, block):
    with pytest.raises(sheepsse.InvalidStreamError) as caught:
        text_of(server, client, body, content_type, block)
    message = str(caught.value)
    assert "expected Content-Type text/event-stream, got" in message
    assert repr(content_type or "none") in message
    assert (body.split()[0][:1].decode() if block else body.split()[0].decode()) in message


@pytest.mark.parametrize("content_type", ["application/json", "application/x-ndjson"])
def test_json_may_begin_with_a_bom(server, client, content_type):
    assert text_of(server, client, BOM + LINES, content_type) == "Good day"


def events_in(blocks, content_type, limit=LIMIT):
    body = sheepsse._BodyDecoder(content_type, None, limit)
    for block in blocks:
        yield from body.feed(block)
    yield from body.flush()
    body.check_end()


def framed(blocks, content_type, limit=LIMIT):
    return until_error(events_in(blocks, content_type, limit))


@pytest.mark.parametrize(
    ("data", "content_type", "expected"),
    [
        (b" data: a\n\ndata: b\n\n", "text/event-stream", [says("b")]),
        (b"\r\n\n \t data: a\n\ndata: b\n\n", "text/event-stream", [says("b")]),
        (b"  \ndata: a\n\n", "text/event-stream", [says("a")]),
        (b" \r\n\t {}", "application/json", [says("{}")]),
        (b" {}", "text/event-stream", [says("{}")]),
    ],
)
def test_spaces_before_the_first_line_mean_the_same_however_they_are_cut(data, content_type, expected):
    for blocks in cuttings(data):
        assert framed(blocks, content_type) == (expected, None), blocks


@property_of
@given(STREAMS, POSITIONS, st.sampled_from(["text/event-stream", "application/json", "text/html", ""]))
def test_any_answer_means_the_same_however_it_is_cut(data, positions, content_type):
    whole, failure = framed(cut(data, []), content_type)
    events, error = framed(cut(data, positions), content_type)
    assert (events, type(error)) == (whole, type(failure))


@pytest.mark.parametrize(
    ("start", "content_type"),
    [
        (b"data: a\n\n", "text/event-stream"),
        (b"data: a\n\n", ""),
        (b"\r\n \n: padding" + b" " * 2048 + b"\ndata: a\n\n", "text/plain"),
        (b'{"a": 1}', "application/x-ndjson"),
        (b'[ {"a": 1}', ""),
    ],
    ids=["an event", "an event of no type", "padding", "a line of JSON", "an array"],
)
@pytest.mark.parametrize("block", [1, 1000])
def test_the_first_event_of_an_answer_is_given_out_before_more_is_asked_for(start, content_type, block):
    source = iter([*blocks_of(start, block), b"\n\n"])
    next(events_in(source, content_type))
    assert list(source) == [b"\n\n"]


@pytest.mark.parametrize(
    "start",
    [b" " * 2048 + b"\ndata: a\n\n", b"\n" * 200 + b"data: a\n\n", b" " * 200 + b"{}"],
    ids=["a line of spaces", "line ends", "spaces before JSON"],
)
def test_blank_padding_does_not_hold_the_first_event_back(start):
    source = iter([start, b"\n\n"])
    next(events_in(source, "text/event-stream"))
    assert list(source) == [b"\n\n"]


@pytest.mark.parametrize("content_type", ["text/event-stream", "application/json", ""])
def test_spaces_without_end_before_an_answer_stop_at_the_limit(content_type):
    source = Consumed(b"", b" ", 1000)
    events, error = framed(source, content_type)
    assert events == []
    assert type(error) is sheepsse.InvalidStreamError
    assert source.size < 1.3 * LIMIT


def test_line_ends_before_an_answer_may_go_on_for_ever():
    for line_end in (b"\n", b"\r", b"\r\n"):
        blocks = itertools.chain(itertools.repeat(line_end * 100, LIMIT // 10), [b"data: a\n\n"])
        assert framed(blocks, "text/event-stream") == ([says("a")], None)


def test_spaces_before_an_answer_cost_time_linear_in_their_number():
    def run(size):
        blocks = itertools.chain(itertools.repeat(b" " * 1024, size // 1024), [b"\ndata: a\n\n"])
        assert framed(blocks, "text/event-stream", 2 * size) == ([says("a")], None)

    assert_linear(run, MIB)


@pytest.mark.parametrize(("body", "framing"), [(EVENTS, "sse"), (LINES, "json"), (ARRAY, "json")])
def test_the_format_option_overrides_what_the_content_type_says(server, client, body, framing):
    assert text_of(server, client, body, "text/html", format=framing) == "Good day"


def test_a_format_that_the_answer_does_not_have_is_an_error(server, client):
    with pytest.raises(sheepsse.InvalidStreamError, match="expected JSON objects, got"):
        text_of(server, client, EVENTS, "text/event-stream", format="json")


@pytest.mark.parametrize("body", [b"", b"\n\r\n\n"])
@pytest.mark.parametrize("content_type", ["text/event-stream", None])
def test_an_answer_of_nothing_is_no_framings_error_but_a_lost_stream(server, client, body, content_type):
    with pytest.raises(sheepsse.StreamInterrupted):
        text_of(server, client, body, content_type, resume="never")


@pytest.mark.parametrize(("body", "content_type"), [(EVENTS, "text/event-stream"), (LINES, "application/json")])
def test_the_size_limit_holds_in_either_framing(server, client, body, content_type):
    with pytest.raises(sheepsse.InvalidStreamError, match="larger than 50 bytes"):
        text_of(server, client, body, content_type, max_event_size=50)


# The class of sseclient-py


class Source(list):
    """Blocks of bytes with a close(), as both classes take them"""

    closed = False

    def close(self):
        self.closed = True


def theirs(blocks):
    """The events that sseclient-py gives; it says None where there is no id, and keeps a time as text"""
    return [
        says(event.data, event.event, event.id or "", None if event.retry is None else int(event.retry))
        for event in sseclient.SSEClient(Source(blocks)).events()
    ]


def ours(blocks):
    return list(sheepsse.SSEClient(Source(blocks)).events())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"data: a\n\n",
        b"data: a\n\ndata: b\n\n",
        b"data: a\r\n\r\ndata: b\r\n\r\n",
        b"data: a\r\rdata: b\r\r",
        b"data: a\ndata:b\ndata:  c\ndata\n\n",
        b"event: ping\ndata: a\n\ndata: b\n\n",
        b"event:\ndata: a\n\n",
        b"event: ping\n\ndata: a\n\n",
        b"id: 7\ndata: a\n\nid: 8\ndata: b\n\n",
        b"retry: 1500\ndata: a\n\n",
        b": hello\n\n:\ndata: a\n: hello\ndata: b\n\n",
        b"unknown: 1\nunknown\ndata: a: b\n\n",
        b"data\n\ndata:\n\ndata: \n\n",
        "data: é – 🐑\u2028\x85\n\n".encode(),
        b"\n\n\ndata: a\n\n\n\n",
    ],
)
def test_its_events_are_those_of_sseclient_py_where_that_is_right(data):
    for blocks in cuttings(data):
        assert ours(blocks) == theirs(blocks), blocks


@property_of
@given(st.lists(CARRIED.filter(lambda event: event.id), max_size=5), POSITIONS)
def test_its_events_are_those_of_sseclient_py_for_any_well_formed_stream(events, positions):
    blocks = cut(b"".join(map(sheepsse.encode_event, events)), positions)
    assert ours(blocks) == theirs(blocks) == events


def test_its_only_difference_in_a_plain_event_is_an_id_that_is_never_none():
    data = b"data: a\n\n"
    (their_event,) = sseclient.SSEClient(Source([data])).events()
    (event,) = sheepsse.SSEClient(Source([data])).events()
    assert (event.event, event.data, event.retry) == (their_event.event, their_event.data, their_event.retry)
    assert event.id == ""
    assert their_event.id is None


@pytest.mark.parametrize("data", [b"data: a\n\ndata: b", b"data: a\n\ndata: b\n", b"data: a\n\ndata: [DONE]\n"])
def test_its_cut_off_last_event_is_dropped_where_sseclient_py_gives_it_out_as_whole(data):
    assert ours([data]) == [says("a")]
    assert theirs([data]) in ([says("a"), says(data.split()[-1].decode())], [says("a")])


def test_it_replaces_invalid_utf_8_where_sseclient_py_dies_of_it():
    data = b"data: a\xff\n\n"
    assert ours([data]) == [says("a\ufffd")]
    try:
        assert theirs([data]) == [says("a\ufffd")]
    except UnicodeDecodeError:
        pass  # as of 1.9.0


def test_it_parts_events_by_mixed_line_ends_where_sseclient_py_merges_them():
    data = b"data: a\n\r\ndata: b\n\n"
    assert ours([data]) == [says("a"), says("b")]
    assert theirs([data]) in ([says("a\nb")], [says("a"), says("b")])


def test_it_gives_the_first_event_after_a_bom_where_sseclient_py_loses_it():
    data = BOM + b"data: a\n\ndata: b\n\n"
    assert ours([data]) == [says("a"), says("b")]
    assert theirs([data]) in ([says("b")], [says("a"), says("b")])


def test_its_ids_persist_where_those_of_sseclient_py_are_forgotten():
    data = b"id: 7\ndata: a\n\ndata: b\n\n"
    assert ours([data]) == [says("a", id="7"), says("b", id="7")]
    assert theirs([data]) in ([says("a", id="7"), says("b")], ours([data]))


def test_its_time_is_a_number_of_digits_where_sseclient_py_takes_anything():
    data = b"retry: +5\ndata: a\n\n"
    assert ours([data]) == [says("a")]
    (event,) = sseclient.SSEClient(Source([data])).events()
    assert event.retry in ("+5", None)


def test_it_stops_at_an_event_too_large_where_sseclient_py_goes_on_for_ever():
    blocks = itertools.chain([b"data: a\n\ndata: "], itertools.repeat(b"x" * MIB))
    events, error = until_error(sheepsse.SSEClient(blocks).events())
    assert events == [says("a")]
    assert type(error) is sheepsse.InvalidStreamError


def test_an_event_too_large_is_an_error_also_where_it_is_the_last_thing_in_the_stream():
    events, error = until_error(sheepsse.SSEClient([b"data: a\n\ndata: " + b"x" * (9 * MIB)]).events())
    assert events == [says("a")]
    assert type(error) is sheepsse.InvalidStreamError


@pytest.mark.parametrize("kind", [sseclient.SSEClient, sheepsse.SSEClient])
def test_it_reads_and_closes_a_response_as_sseclient_py_does(server, kind):
    server.answer(Answer(events=[b"data: a\n\n", b"data: b\n\n"], stall_after=1))
    client = kind(requests.get(server.origin, stream=True, timeout=HANG))
    assert next(client.events()).data == "a"
    client.close()
    assert server.wait_closed(HANG)


def test_its_close_closes_the_source():
    source = Source()
    sheepsse.SSEClient(source).close()
    assert source.closed


def test_it_gives_an_event_out_at_once_where_sseclient_py_waits_for_the_end_of_the_body(server):
    answer = Answer(events=[b"data: a\n\n", b"data: b\n\n"], framing="length", stall_after=1)
    with answered(server, answer) as response:
        events = sheepsse.SSEClient(response).events()
        assert next(events) == says("a")
        server.release()
        assert list(events) == [says("b")]


@pytest.mark.parametrize("encoding", ["utf-8", "UTF-8", "utf8", "utf_8"])
def test_it_takes_the_name_of_the_one_encoding_there_is(encoding):
    assert list(sheepsse.SSEClient([b"data: a\n\n"], encoding).events()) == [says("a")]


def test_it_refuses_another_encoding():
    with pytest.raises(ValueError, match="always UTF-8, got char_enc='latin-1'"):
        sheepsse.SSEClient([], char_enc="latin-1")


@pytest.mark.parametrize("ids", [False, True])
def test_the_events_of_sseclient_py_go_through_iter_chunks_unchanged(ids):
    source = Source(re.sub(rb"(?m)^(?=data: )", b"id: 7\n", EVENTS) if ids else EVENTS for _ in "1")
    chunks = list(sheepsse.iter_chunks(sseclient.SSEClient(source).events()))
    assert chunks == list(sheepsse.iter_chunks(sheepsse.iter_events(source)))
    assert "".join(sheepsse.iter_text(chunks)) == "Good day"
    assert {chunk.event_id for chunk in chunks} == {"7" if ids else ""}
