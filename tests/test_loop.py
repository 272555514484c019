"""One loop from the socket to the caller: what follows what was given out, what a chunk costs, what is left behind"""

import gc
import json
import sys
import tracemalloc
import weakref

import pytest
import requests

import local_provider
import sheepsse
from conftest import asking, read
from local_provider import Answer, LocalProvider, chat_events
from sheepsse import Chunk

WORDS = [f"w{number} " for number in range(8)]


def with_ids(events):
    return [b"id: %d\n" % number + event for number, event in enumerate(events, 1)]


def in_one_block(events):
    return Answer(events=[b"".join(with_ids(events))])


# What follows what was given out


def test_the_resume_point_follows_what_was_given_out_amid_a_block(server, client):
    server.answer(in_one_block(chat_events(WORDS)))
    stream = client.stream("Go", resume="never")
    came = [next(stream) for _ in range(3)]
    stream.cancel()
    _, error = read(stream)
    assert error.partial.text == error.resume_point.text == "".join(came)
    assert error.resume_point.event_id == "4"  # the first one says the role alone


def test_a_stream_left_amid_a_block_is_gone_on_with_behind_what_was_given_out(server, client):
    server.default = Answer(events=with_ids(chat_events(WORDS)), ids="none")
    server.answer(in_one_block(chat_events(WORDS)))
    stream = client.stream("Go", resume="never")
    came = [next(stream) for _ in range(3)]
    stream.cancel()
    _, error = read(stream)
    rest, failure = read(client.stream("Go", resume_from=error))
    assert failure is None
    assert "".join(came + rest) == "".join(WORDS)


def test_a_checkpoint_holds_what_was_given_out_amid_a_block(server, client, tmp_path):
    server.answer(in_one_block(chat_events(WORDS)))
    with client.stream("Go", checkpoint=tmp_path) as stream:
        came = [next(stream) for _ in range(3)]
    (path,) = tmp_path.iterdir()
    kept, _ = read(sheepsse.replay(path))
    assert "".join(chunk.text for chunk in kept) == "".join(came)


def test_between_two_choices_of_one_event_the_event_is_not_given_out_yet(server):
    def both(number):
        choices = [{"index": index, "delta": {"content": f"{index}{number} "}} for index in (0, 1)]
        return b"id: %d\ndata: %s\n\n" % (number, json.dumps({"choices": choices}).encode())

    server.answer(Answer(events=[b"".join(map(both, range(1, 6)))]))
    with asking(server) as client:
        stream = client.stream("Go", n=2, resume="never")
        chunks = stream.chunks()
        came = [next(chunks) for _ in range(3)]  # both of the first event, one of the second
        assert [(chunk.index, chunk.text) for chunk in came] == [(0, "01 "), (1, "11 "), (0, "02 ")]
        stream.cancel()
        _, error = read(chunks)
    *_, marks = json.loads(error.resume_point.cursor)
    assert marks[-1][0] == "1"


def test_a_cancel_after_two_of_five_events_gives_no_third(server, client):
    server.answer(in_one_block(chat_events(WORDS[:5])))
    stream = client.stream("Go", resume="never")
    came = [next(stream), next(stream)]
    stream.cancel()
    rest, error = read(stream)
    assert (came, rest, type(error)) == (WORDS[:2], [], sheepsse.StreamCancelled)


def test_a_failure_waits_behind_what_came_before_it(server, client):
    broken = b'data: {"error": {"message": "No more", "code": 400}}\n\n'
    server.answer(Answer(events=[b"".join(chat_events(WORDS, finish=None, done=False)) + broken]))
    came, error = read(client.stream("Go", resume="never"))
    assert came == WORDS
    assert type(error) is sheepsse.StreamError
    assert error.partial.text == "".join(WORDS)


def test_a_dialect_may_give_a_chunk_and_then_raise(server, monkeypatch):
    class Odd(sheepsse.Dialect):
        name = "odd"

        @classmethod
        def body(cls, messages, model, params, stream):
            return {}

        def chunks(self, event):
            yield Chunk(text="before ", id="1")
            raise sheepsse.StreamError("odd")

    monkeypatch.setitem(sheepsse.DIALECTS, "odd", Odd)
    server.answer(Answer(events=[b"data: {}\n\n"]))
    with asking(server, dialect="odd") as client:
        came, error = read(client.stream("Go", resume="never"))
    assert (came, type(error), error.partial.text) == (["before "], sheepsse.StreamError, "before ")


def test_another_client_is_asked_after_a_200_until_a_piece_was_given_out(server):
    server.answer(Answer(events=[b": hello\n\n"], cut_after=1))
    with LocalProvider() as other, asking(server, retry=0) as first, asking(other) as second:
        assert "".join(sheepsse.stream("Go", client=[first, second])) == local_provider.TEXT
        assert (len(server.requests), len(other.requests)) == (1, 1)
        server.answer(Answer(cut_after=3))
        came, error = read(sheepsse.stream("Go", client=[first, second], resume="never"))
        assert came
        assert type(error) is sheepsse.StreamInterrupted
        assert len(other.requests) == 1


def test_half_a_character_at_the_end_is_given_out_as_a_replacement(server, client):
    half = b'data: {"choices": [{"index": 0, "delta": {"content": "a\\ud83d"}, "finish_reason": "stop"}]}\n\n'
    server.answer(Answer(events=[half, b"data: [DONE]\n\n"]))
    assert "".join(client.stream("Go")) == "a\ufffd"


def test_data_that_goes_on_behind_its_json_is_no_answer(server, client):
    server.answer(Answer(events=[*chat_events(["Good"], finish=None, done=False), b'data: {"choices": []} {}\n\n']))
    came, error = read(client.stream("Go", resume="never"))
    assert (came, type(error)) == (["Good"], sheepsse.InvalidStreamError)


def test_what_ends_events_after_the_answer_is_whole_loses_nothing():
    def events():
        yield sheepsse.ServerSentEvent(data='{"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]}')
        raise sheepsse.StreamInterrupted("the connection was lost")

    assert sheepsse.collect(sheepsse.iter_chunks(events(), "openai", choices=1)).complete


def test_a_read_time_out_below_all_measure_is_one(server, client):
    server.answer(Answer(stall_after=1))
    _, error = read(client.stream("Go", timeout=(30, 0.0001)))
    assert type(error) is sheepsse.StreamTimeout
    server.release()


def test_an_event_that_is_new_amid_those_that_are_repeated_is_of_another_answer(server):
    events = with_ids(chat_events(WORDS, finish=None, done=False))
    server.answer(Answer(events=events, cut_after=len(events)))
    server.default = Answer(events=[events[-3], events[-2].replace(b"id: ", b"id: x"), *events[-1:]])
    with asking(server, retry=3) as client:
        came, error = read(client.stream("Go", resume="replay"))
    assert came == WORDS
    assert "another answer" in str(error)


# What a chunk costs


def calls_for(chunks):
    """The functions of ours, and how many others in Python, that each of the next chunks goes through"""
    counted = []

    def count(frame, event, argument):
        if event == "call":
            file = frame.f_code.co_filename
            (own if file == sheepsse.__file__ else others).append(frame.f_code.co_name)

    for _ in range(20):
        own, others = [], []
        sys.setprofile(count)
        try:
            next(chunks)
        finally:
            sys.setprofile(None)
        counted.append((len(own), own, others))
    return sorted(counted, key=lambda each: each[0])[10]


#: comprehensions were calls before
MORE = 3 if sys.version_info < (3, 12) else 0


@pytest.mark.parametrize(("ids", "most"), [("none", 16), ("numbers", 18)])
@pytest.mark.parametrize(("way", "more"), [("text", 0), ("chunks()", 0), ("checkpoint", 4)])
def test_a_chunk_that_arrives_alone_takes_few_calls(server, client, tmp_path, way, more, ids, most):
    server.answer(Answer(text=" ".join(map(str, range(100))), pace=0.002, ids=ids))
    stream = client.stream("Go", checkpoint=tmp_path if way == "checkpoint" else None)
    chunks = stream.chunks() if way == "chunks()" else stream
    most += more + (2 if more and ids == "numbers" else 0)  # whether the id is the chunk's own
    for _ in range(70):
        next(chunks)
    number, own, others = calls_for(chunks)
    assert number <= most + MORE, own
    assert len(others) <= 12 + MORE, others
    stream.close()


# What is left behind


@pytest.mark.parametrize("count", [1, 3])
def test_a_stream_that_is_dropped_with_a_failure_waiting_is_gone_at_once(server, count):
    server.answer(Answer(events=[b"".join(chat_events(WORDS, finish=None, done=False))], cut_at=800, cut="reset"))
    limiter = sheepsse.Limiter(1)
    with asking(server, limiter=limiter) as client:
        gc.disable()
        try:
            stream = client.stream("Go", resume="never")
            for _ in range(count):
                next(stream)
            gone = weakref.ref(stream)
            del stream
            assert gone() is None
            assert limiter.stats().active == 0
            assert server.wait_closed(60)
        finally:
            gc.enable()


def test_nothing_but_the_text_grows_with_a_stream(monkeypatch):
    event = (
        b"id: %d\ndata: " + json.dumps({"choices": [{"index": 0, "delta": {"content": "word "}}]}).encode() + b"\n\n"
    )

    def grown(count):
        body = Answer(events=[b"".join(event % number for number in range(count))] + chat_events([""]))
        with LocalProvider() as server, asking(server) as client:
            server.default = body
            stream = client.stream("Go")
            next(stream)
            tracemalloc.start()
            try:
                before = tracemalloc.get_traced_memory()[0]
                for _ in range(count - 2):
                    next(stream)
                return tracemalloc.get_traced_memory()[0] - before - 5 * count
            finally:
                tracemalloc.stop()
                stream.close()

    assert grown(20_000) < 5 * 20_000 + 500_000


def test_an_error_while_a_job_is_cancelled_leaves_no_slot_behind_and_no_torn_answer_that_looks_whole(server, tmp_path):
    class Unwilling(requests.Session):
        def request(self, method, url, **options):
            if url.endswith("/cancel"):
                raise RuntimeError("unwilling")
            return super().request(method, url, **options)

    limiter, url = sheepsse.Limiter(max_concurrent=1), server.origin + local_provider.DIALECT_BASES["openai-responses"]
    server.answer(Answer(stall_after=8))
    with asking(server, base_url=url, dialect="openai-responses", limiter=limiter, session=Unwilling()) as client:
        stream = client.stream("Go", background=True, checkpoint=tmp_path)
        came = [next(stream)]
        with pytest.raises(RuntimeError, match="unwilling"):
            stream.close()
        assert limiter.stats().active == 0
        assert (list(stream), stream.completion.complete, stream.text) == ([], False, "".join(came))
    (path,) = tmp_path.iterdir()
    assert b'"complete"' not in path.read_bytes()
