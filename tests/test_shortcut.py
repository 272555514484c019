"""Section 4, texts taken out of events without reading these whole: always what reading them whole gives"""

import itertools
import json
import sys
import threading
from functools import partial

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import local_provider
import sheepsse
from conftest import asking, read, timed
from test_dialects import RECORDED_AS, names
from transcripts import TRANSCRIPTS
from transcripts_vendors import VENDORS, media_type

LIMIT = 1 << 20
BARE = sheepsse.Chunk(raw=None)


class Eager(sheepsse._Shortcut):
    """Learns from every event that can be learned from"""

    _PATIENCE = 1


def chunks_of(blocks, kind, content_type, shortcut=None):
    """The chunks of a body, those of texts alone made from them; how many those were; and what ended it"""
    dialect, came, taken = kind(), [], 0
    try:
        events = sheepsse._framed(iter(blocks), content_type, None, LIMIT, shortcut)
        for chunk in sheepsse._parsed(events, dialect, False, shortcut):
            if isinstance(chunk, sheepsse._Run):
                made = chunk.chunks()
                assert [each.text for each in made] == chunk.texts
                assert chunk.usage == made[-1].usage
                assert {each._replace(text="", raw=None, usage=None, id="", model="") for each in made} == {BARE}
                taken += len(made)
                came += made
            else:
                came.append(chunk)
    except sheepsse.SheepError as error:
        return came, taken, (type(error), str(error)[:25])  # then an excerpt, which ends with the block
    return came, taken, None


def assert_same(blocks, dialect, content_type):
    """How many texts were taken"""
    kind = sheepsse.DIALECTS[dialect]
    plain, _, error = chunks_of(blocks, kind, content_type)
    shortcut = Eager(kind._varying, LIMIT)
    quick, taken, quick_error = chunks_of(blocks, kind, content_type, shortcut)
    assert quick == plain
    assert quick_error == error
    return taken


def cut(body, size):
    return [body[at : at + size] for at in range(0, len(body), size)]


@pytest.mark.parametrize("size", [1, 7, 100, 4096])
@pytest.mark.parametrize("transcript", TRANSCRIPTS + VENDORS, ids=names)
def test_a_transcript_says_the_same(transcript, size):
    assert_same(cut(transcript.body, size), transcript.dialect, media_type(transcript))


@pytest.mark.parametrize("dialect", sorted(RECORDED_AS))
def test_recordings_say_the_same(dialect, recordings):
    folder, index = recordings
    taken = 0
    entries = [entry for entry in index if entry["dialect"] == dialect]
    assert entries
    for entry in entries:
        body = (folder / entry["file"]).read_bytes()
        content_type = "application/json" if body[:1] in (b"{", b"[") else "text/event-stream"
        for size in (7, 4096, 1 << 16):
            taken += assert_same(cut(body, size), RECORDED_AS[dialect], content_type)
    assert taken


# One event of text alone in each dialect, as its service writes it; text and number are JSON


def openai(text, number):
    choice = f'{{"index":0,"delta":{{"content":{text}}},"logprobs":null,"finish_reason":null}}'
    return f'data: {{"id":"c-1","created":{number},"model":"m","choices":[{choice}],"usage":null}}\n\n'


def anthropic(text, number):
    padding = " " * (number % 5)
    return (
        'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta",'
        f'"text":{text}}}{padding}}}\n\n'
    )


def responses(text, number):
    return (
        'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","content_index":0,'
        f'"delta":{text},"item_id":"i-1","obfuscation":"{"x" * (number % 7)}","output_index":0,'
        f'"sequence_number":{number}}}\n\n'
    )


def gemini(text, number):
    return (
        f'data: {{"candidates": [{{"content": {{"parts": [{{"text": {text}}}],"role": "model"}},"index": 0}}],'
        f'"usageMetadata": {{"promptTokenCount": 9,"candidatesTokenCount": {number},"totalTokenCount": {number + 9}}},'
        '"modelVersion": "m","responseId": "r-1"}\r\n\r\n'
    )


def ollama(text, number):
    moment = f"2026-01-01T00:00:{number % 60:02d}Z"
    return f'{{"model":"m","created_at":"{moment}","message":{{"role":"assistant","content":{text}}},"done":false}}\n'


#: an event's writer, and what closes a stream
EVENTS = {
    "openai": (openai, 'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'),
    "anthropic": (
        anthropic,
        'data: {"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":4}}\n\n'
        'data: {"type":"message_stop"}\n\n',
    ),
    "openai-responses": (
        responses,
        'data: {"type":"response.completed","response":{"status":"completed","output":[]}}\n\n',
    ),
    "gemini": (
        gemini,
        'data: {"candidates": [{"content": {"parts": [{"text": ""}]},"finishReason": "STOP","index": 0}]}\r\n\r\n',
    ),
    "ollama": (ollama, '{"model":"m","message":{"content":""},"done":true,"done_reason":"stop"}\n'),
}
CONTENT_TYPES = {"ollama": "application/x-ndjson"}


def written(dialect, texts, start=1):
    """The events of some texts, each a str in JSON"""
    write, _ = EVENTS[dialect]
    return [write(text, number).encode() for number, text in enumerate(texts, start)]


#: what is put into an event, at some place or in another's place
STRANGE = [
    b'"', b"\\", b"\\\\", b"\n", b"\r", b"\r\n", b"\n\n", b"\\u", b"\\ud83d", b"\\udc11", b"\\u0000", b"\xff", b"\xc3",
    b"}", b"{", b"]", b" ", b"\t", b"\x00", b"1", b",", b'","x":"', b',"x":1', b'"stop"', b"null", b"data: ", b": c\n",
    b"id: 7\n", b"retry: 5\n", b'"index":1', b'{"error":{"message":"no"}}', b"event: x\n", b"[DONE]", b"\xef\xbb\xbf",
]  # fmt: skip
#: one thing in an event for another
CHANGES = [
    (b'"index":0', b'"index":1'), (b'"finish_reason":null', b'"finish_reason":"stop"'), (b'"usage":null', b'"usage":1'),
    (b'"content":', b'"reasoning_content":"why","content":'), (b'"text_delta"', b'"thinking_delta"'), (b'"', b"'"),
    (b'"text": ', b'"thought": true,"text": '), (b"\n\n", b"\r\n\r\n"), (b"\r\n", b"\n"), (b"data: ", b"data:"),
    (b'"model":"m"', b'"model":"n"'), (b'"sequence_number":', b'"sequence_number":1'), (b"false", b"true"),
    (b'"role": "model"', b'"role": "user"'), (b"_number", b"_nummer"), (b'"text"', b'"text" '), (b"\n\n", b"\n"),
    (b'"delta":', b'"delta": '), (b"TokenCount", b"TokenCounter"), (b'"created"', b'"created_"'), (b"null", b"[]"),
]  # fmt: skip

texts = st.one_of(
    st.sampled_from(
        [" a", "the", ",", '"', "\\", "\n", "", "\ud83d", "🐑", "é", "\x7f", "\u2028", "assistant", "text"]
    ),
    st.text(max_size=8),
)
forms = st.tuples(texts, st.booleans()).map(
    lambda made: json.dumps(made[0], ensure_ascii=made[1] or "\ud83d" in made[0])
)
mutations = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 30), st.floats(0, 1), st.sampled_from(STRANGE)),
        st.tuples(st.just("drop"), st.integers(0, 30), st.floats(0, 1), st.integers(1, 5)),
        st.tuples(st.just("change"), st.integers(0, 30), st.just(0.0), st.sampled_from(CHANGES)),
        st.tuples(st.just("change all"), st.integers(0, 30), st.just(0.0), st.sampled_from(CHANGES)),
        st.tuples(st.just("again"), st.integers(0, 30), st.just(0.0), st.integers(0, 30)),
    ),
    max_size=4,
)


def mutated(events, changes):
    for way, at, where, what in changes:
        index = at % len(events)
        event = events[index]
        position = int(where * len(event))
        if way == "put":
            events[index] = event[:position] + what + event[position:]
        elif way == "drop":
            events[index] = event[:position] + event[position + what :]
        elif way == "change":
            events[index] = event.replace(*what)
        elif way == "change all":
            events = [each.replace(*what) for each in events]
        else:
            events[index] = event + events[what % len(events)]
    return events


@pytest.mark.parametrize("dialect", sorted(EVENTS))
@settings(max_examples=400, deadline=None)
@given(
    forms=st.lists(forms, min_size=3, max_size=25),
    changes=mutations,
    cuts=st.lists(st.floats(0, 1), max_size=6),
)
@example(forms=['" a"', '" b"', '"\\ud83d"', '"\\udc11"', '" c"'], changes=[], cuts=[])
@example(forms=['" a"', '"\\x"', '" b"', '"\\u12"', '"c"'], changes=[], cuts=[])
@example(forms=['" a"', '" b"', '""', '"c"', '"d"'], changes=[], cuts=[0.5])
def test_what_is_changed_in_a_stream_says_the_same(dialect, forms, changes, cuts):
    _, end = EVENTS[dialect]
    body = b"".join(mutated(written(dialect, forms), changes)) + end.encode()
    places = [0, *sorted(int(place * len(body)) for place in cuts), len(body)]
    blocks = [body[start:stop] for start, stop in zip(places, places[1:])]
    assert_same([block for block in blocks if block], dialect, CONTENT_TYPES.get(dialect, "text/event-stream"))


@pytest.mark.parametrize("dialect", sorted(EVENTS))
def test_all_but_the_first_of_events_that_differ_in_their_text_are_taken(dialect):
    _, end = EVENTS[dialect]
    said = [json.dumps(f" word{number}") for number in range(500)]
    body = b"".join(written(dialect, said)) + end.encode()
    for size in (300, 4096, len(body)):
        taken = assert_same(cut(body, size), dialect, CONTENT_TYPES.get(dialect, "text/event-stream"))
        assert taken >= (470 if size > 300 else 200)  # few of those that are cut


@pytest.mark.parametrize("dialect", sorted(EVENTS))
def test_an_event_that_is_not_whole_yet_is_given_out_with_its_last_byte(dialect):
    kind = sheepsse.DIALECTS[dialect]
    shortcut = Eager(kind._varying, LIMIT)
    events = written(dialect, ['" a"', '" b"', '" c"'])
    fed = []

    def blocks():
        for byte in b"".join(events):
            fed.append(byte)
            yield bytes([byte])

    framed = sheepsse._framed(blocks(), CONTENT_TYPES.get(dialect, "text/event-stream"), None, LIMIT, shortcut)
    ends = list(itertools.accumulate(map(len, events)))
    for end, _ in zip(ends, sheepsse._parsed(framed, kind(), False, shortcut)):
        assert len(fed) <= end


def test_a_string_that_is_the_same_as_the_text_is_not_taken_for_it():
    parts = '[{"type":"text","text":"a"},{"type":"text","text":"b"}]'
    events = [
        f'data: {{"x":{word},"choices":[{{"index":0,"delta":{{"content":{parts}}}}}]}}\n\n'.encode()
        for word in ('"ab"', '"cd"', '"ef"')
    ]
    assert assert_same([b"".join(events)], "openai", "text/event-stream") == 0


@pytest.mark.parametrize(
    ("dialect", "change"),
    [
        ("gemini", (b'"text": ', b'"thoughtSignature": "s-1","text": ')),
        ("openai", (b'"content":', b'"reasoning_details":[{"type":"reasoning.encrypted","data":"d"}],"content":')),
    ],
)
def test_events_that_bring_what_is_to_be_kept_for_the_vendor_are_read_whole(dialect, change):
    events = [event.replace(*change) for event in written(dialect, ['" a"', '" b"', '" c"', '" d"'])]
    assert assert_same([b"".join(events)], dialect, "text/event-stream") == 0


@pytest.mark.parametrize(
    ("dialect", "block"),
    [
        ("ollama", b"\n".join(event.rstrip() for event in written("ollama", ['" a"', '" b"', '" c"']))),
        ("openai", b"".join(written("openai", ['" a"', '" b"', '" c"'])).replace(b"\n\n", b"\r\n\r\n") + b": comment"),
        ("openai", b"".join(written("openai", ['" a"', '" b"', '" c"'])).replace(b"\n\n", b"\r\r") + b"data: {"),
    ],
    ids=["a line end before each", "another line end, and a comment", "a third line end, and more"],
)
def test_no_event_waits_for_what_follows_it(dialect, block):
    shortcut = Eager(sheepsse.DIALECTS[dialect]._varying, LIMIT)
    learned = b"".join(written(dialect, ['" x"', '" y"']))
    waiting = []

    def blocks():
        yield learned
        yield block
        waiting.append(True)

    framed = sheepsse._framed(blocks(), CONTENT_TYPES.get(dialect, "text/event-stream"), None, LIMIT, shortcut)
    said = []
    for chunk in sheepsse._parsed(framed, sheepsse.DIALECTS[dialect](), False, shortcut):
        said += chunk.texts if isinstance(chunk, sheepsse._Run) else [chunk.text]
        if len(said) == 5:
            break
    assert said == [" x", " y", " a", " b", " c"]
    assert not waiting


@pytest.mark.parametrize("dialect", sorted(EVENTS))
@pytest.mark.parametrize("other", ['""', '"\\u12"'])
def test_events_that_differ_among_many_are_looked_at_once(dialect, other):
    block = b"".join(written(dialect, ['" a"', other] * 3000))
    content_type = CONTENT_TYPES.get(dialect, "text/event-stream")
    kind = sheepsse.DIALECTS[dialect]
    quick, plain = (
        timed(partial(chunks_of, [block], kind, content_type, shortcut))[1]
        for shortcut in (sheepsse._Shortcut(kind._varying, LIMIT), None)
    )
    assert quick < 4 * plain + 0.2  # it was 35 times, and more the larger the block


def test_an_event_that_is_an_error_too_is_read_whole():
    events = written("openai", ['" a"', '" b"'])
    failing = [event.replace(b'"usage":null', b'"error":{"message":"no"}') for event in written("openai", ['" c"'])]
    for body in (events + failing, failing):
        assert_same([b"".join(body)], "openai", "text/event-stream")


def test_messages_again_and_again_say_their_text_once():
    body = b"".join(written("openai", ['" a"', '" b"', '" c"'])).replace(b'"delta"', b'"message"')
    assert assert_same([body], "openai", "text/event-stream") == 0


def test_the_beginnings_of_blocks_are_read_whole():
    start = 'data: {{"type":"content_block_start","index":0,"content_block":{{"type":"text","text":{}}}}}\n\n'
    body = b"".join(start.format(text).encode() for text in ('" a"', '" b"', '" c"'))
    assert assert_same([body], "anthropic", "text/event-stream") == 0


# Over real sockets


def long(dialect, count=300, **options):
    """An answer in this many pieces, written in large blocks"""
    _, end = EVENTS[dialect]
    body = b"".join(written(dialect, [json.dumps(f" w{number}") for number in range(count)])) + end.encode()
    return local_provider.Answer(
        body=body, content_type=CONTENT_TYPES.get(dialect, "text/event-stream"), block=1 << 16, **options
    )


def words(count=300):
    return [f" w{number}" for number in range(count)]


def counted(monkeypatch, dialect):
    """The events that are read whole, as they are"""
    kind, seen = sheepsse.DIALECTS[dialect], []
    plain = kind.chunks
    monkeypatch.setattr(kind, "chunks", lambda self, event: (seen.append(event), plain(self, event))[1])
    return seen


@pytest.mark.parametrize("dialect", sorted(EVENTS))
def test_a_long_stream_is_read_by_its_texts(server, clients, monkeypatch, dialect):
    server.answer(long(dialect))
    seen = counted(monkeypatch, dialect)
    stream = clients[dialect].stream("Good day?", resume="never")
    for number, text in enumerate(stream, 1):
        assert text == words()[number - 1]
        assert stream.text == "".join(words()[:number])
        assert stream.stats.chars == len(stream.text)
        assert stream.completion.text == stream.text
    assert stream.text == "".join(words())
    assert stream.stats.chunks >= 300
    assert stream.completion.complete
    assert len(seen) < 100 or dialect == "gemini"  # whose usage after each text is looked up where it is asked for


def test_it_can_be_switched_off(server, client, monkeypatch):
    monkeypatch.setattr(sheepsse, "_SHORTCUTS", False)
    server.answer(long("openai"))
    seen = counted(monkeypatch, "openai")
    assert list(client.stream("Good day?")) == words()
    assert len(seen) >= 300


@pytest.mark.parametrize("dialect", sorted(EVENTS))
def test_one_who_reads_chunks_gets_them_whole(server, clients, monkeypatch, dialect):
    server.answer(long(dialect), long(dialect))
    seen = counted(monkeypatch, dialect)
    chunks = list(clients[dialect].stream("Good day?", resume="never").chunks())
    assert [chunk.text for chunk in chunks if chunk.text] == words()
    assert all(chunk.raw for chunk in chunks)
    assert len(seen) >= 300
    mixed = clients[dialect].stream("Good day?", resume="never")
    again = []
    for number in range(250):
        again.append(next(mixed) if number % 5 else next(mixed.chunks()))
    again += mixed.chunks()
    assert [piece for piece in (getattr(each, "text", each) for each in again) if piece] == words()
    by_text = {chunk.text: chunk for chunk in chunks}
    assert all(by_text[each.text] == each for each in again if isinstance(each, sheepsse.Chunk) and each.text)
    assert mixed.text == "".join(words())


def until(stream, count):
    return [next(stream) for _ in range(count)]


def test_cancel_ends_it_also_among_texts_that_are_there(server, client):
    server.answer(long("openai"))
    stream = client.stream("Good day?", resume="never")
    came = until(stream, 200)
    stream.cancel()
    rest, error = read(stream)
    assert rest == []
    assert type(error) is sheepsse.StreamCancelled
    assert error.partial.text == stream.text == "".join(came)


def test_a_deadline_ends_it_also_among_texts_that_are_there(server, client, monkeypatch):
    server.answer(long("openai"))
    stream = client.stream("Good day?", resume="never", deadline=100)
    came = until(stream, 200)
    stream._call.wire.deadline = sheepsse.time.monotonic() - 1
    rest, error = read(stream)
    assert rest == []
    assert type(error) is sheepsse.StreamTimeout
    assert error.partial.text == stream.text == "".join(came)


def test_closing_it_among_texts_that_are_there_ends_it_quietly(server, client):
    server.answer(long("openai"))
    stream = client.stream("Good day?", resume="never")
    came = until(stream, 200)
    stream.close()
    assert list(stream) == []
    assert stream.text == "".join(came)
    assert stream.stats.chars == len(stream.text)


def test_texts_that_came_before_the_connection_was_lost_are_given_out_first(server, client):
    answer = long("openai")
    server.answer(local_provider.Answer(body=answer.body, block=1 << 16, cut_at=len(answer.body) // 2))
    came, error = read(client.stream("Good day?", resume="never"))
    assert type(error) is sheepsse.StreamInterrupted
    assert came == words()[: len(came)]
    assert len(came) > 100
    assert error.partial.text == "".join(came)


def test_a_dialect_made_from_another_reads_every_event_itself(server, monkeypatch):
    class Loud(sheepsse.DIALECTS["openai"]):
        name = "loud"

        def chunks(self, event):
            for chunk in super().chunks(event):
                yield chunk._replace(text=chunk.text.upper())

    monkeypatch.setitem(sheepsse.DIALECTS, "loud", Loud)
    server.answer(long("openai"))
    with asking(server, dialect="loud") as client:
        assert list(client.stream("Good day?", resume="never")) == [word.upper() for word in words()]


def test_events_with_ids_are_read_whole(server, client, monkeypatch):
    plain = written("openai", [json.dumps(word) for word in words()])
    body = b"".join(b"id: %d\n" % number + event for number, event in enumerate(plain)) + EVENTS["openai"][1].encode()
    server.answer(local_provider.Answer(body=body, block=1 << 16))
    seen = counted(monkeypatch, "openai")
    assert list(client.stream("Good day?")) == words()
    assert len(seen) >= 300


@pytest.mark.parametrize("dialect", sorted(EVENTS))
def test_a_checkpoint_keeps_what_reading_events_whole_keeps(server, clients, monkeypatch, tmp_path, dialect):
    server.answer(long(dialect, 3000), long(dialect, 3000))
    seen = counted(monkeypatch, dialect)
    kept = []
    for name in ("quick", "plain"):
        stream = clients[dialect].stream("Good day?", checkpoint=tmp_path / name)
        assert list(stream) == words(3000)
        (path,) = (tmp_path / name).iterdir()
        chunks = list(sheepsse.replay(path))
        whole = sheepsse.collect(chunks)
        assert whole == stream.completion
        kept.append(([chunk._replace(usage=None) for chunk in chunks if chunk.text], whole))
        if name == "quick":
            assert len(seen) < 700 or dialect == "gemini"  # each of whose chunks has a usage of its own
        monkeypatch.setattr(sheepsse, "_SHORTCUTS", False)
    assert kept[0] == kept[1]


def test_texts_fit_that_fill_the_largest_event(server, client):
    answer = long("openai")
    server.answer(answer)
    largest = max(map(len, answer.body.split(b"\n\n")))
    assert list(client.stream("Good day?", max_event_size=largest)) == words()


@pytest.mark.parametrize("shortcuts", [True, False])
def test_usage_that_counts_on_is_that_of_the_last_text_given(server, clients, monkeypatch, shortcuts):
    monkeypatch.setattr(sheepsse, "_SHORTCUTS", shortcuts)
    server.default = long("gemini")
    stream = clients["gemini"].stream("Good day?", resume="never")
    until(stream, 200)
    assert stream.usage.output_tokens == stream.completion.usage.output_tokens == 200
    assert [usage.output_tokens for usage in stream.stats.usage_by_attempt] == [200]
    assert next(stream.chunks()).usage == stream.usage
    assert stream.usage.output_tokens == 201
    stream.cancel()
    _, error = read(stream)
    assert error.partial.usage.output_tokens == error.resume_point.tokens_received == 201
    stream = clients["gemini"].stream("Good day?", resume="never")
    until(stream, 300)
    stream.close()
    assert stream.usage.output_tokens == 300


@pytest.mark.parametrize("shortcuts", [True, False])
def test_usage_that_is_the_same_in_each_event_counts_again_after_another(server, client, monkeypatch, shortcuts):
    monkeypatch.setattr(sheepsse, "_SHORTCUTS", shortcuts)

    def counting(count):
        usage = f'"usage":{{"prompt_tokens":9,"completion_tokens":{count}}}'.encode()
        return [event.replace(b'"usage":null', usage) for event in written("openai", ['" a"'] * 200)]

    server.answer(local_provider.Answer(body=b"".join(counting(1) + counting(500)[:1] + counting(1)), block=1 << 16))
    stream = client.stream("Good day?", resume="never")
    came, error = read(stream)
    assert len(came) == 401
    assert stream.usage.output_tokens == error.resume_point.tokens_received == 1


def test_the_text_only_grows_for_those_who_look_from_another_thread(server, client):
    whole, seen = "".join(words(20000)), []
    server.answer(long("openai", 20000))
    stream = client.stream("Good day?")
    ended = threading.Event()

    def look():
        while not ended.is_set():
            text = stream.text
            seen.append(len(text) if whole.startswith(text) else -1)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        thread = threading.Thread(target=look)
        thread.start()
        assert "".join(stream) == whole
    finally:
        ended.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert seen == sorted(seen)
    assert seen[0] >= 0


def test_what_cannot_be_kept_is_in_the_error(server, client, monkeypatch, tmp_path):
    server.answer(long("openai", 3000))
    stream = client.stream("Good day?", checkpoint=tmp_path)
    came = until(stream, 100)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sheepsse, "_write_all", full)
    rest, error = read(stream)
    assert type(error) is sheepsse.CheckpointError
    assert error.partial.text.startswith("".join(came + rest))
    assert len(error.partial.text) > len("".join(came + rest))
