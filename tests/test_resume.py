"""Streams whose connections are lost, at any byte: over real sockets, and with the provider's own account

The provider counts the requests and the generations that it would have billed. By default a sample of the bytes and
runs is tried, drawn anew from a fixed seed; all of them with SHEEPSSE_EVERY_BYTE=1, which takes hours.
"""

import collections
import gc
import itertools
import json
import os
import pickle
import random
from typing import Any, Mapping, NamedTuple

import pytest

import local_provider
import sheepsse
from conftest import HANG, PATIENT, asking, in_another_thread, read, until
from local_provider import DIALECT_BASES, Answer, LocalProvider, error_answer

EVERY_BYTE = bool(os.environ.get("SHEEPSSE_EVERY_BYTE"))
#: so many words, each an event of its own
WORDS = 60
ANSWER = "".join(f"{word} {at:x} " for at, word in enumerate(["từ", "🐑", "Wort"] * 10))[:-1]
CRLF = b"".join(
    local_provider.chat_events(
        local_provider.split_words(ANSWER), usage={"prompt_tokens": 4, "completion_tokens": 60, "total_tokens": 64}
    )
).replace(b"\n", b"\r\n")
FIELDS = [f"field_{letter}" for letter in "abcdefghijklmno"]
TOOL = {
    "type": "function",
    "function": {
        "name": "fill_in",
        "parameters": {"type": "object", "properties": {name: {"type": "string"} for name in FIELDS}},
    },
}
THINKING = {"thinking": {"type": "enabled", "budget_tokens": 1024}}


class Case(NamedTuple):
    """A stream that is lost, and how it is made whole"""

    name: str
    continuity: str
    resume: Any = "auto"
    dialect: str = "openai"
    answer: Answer = Answer()
    #: how the requests after the first are answered, where otherwise
    again: Mapping[str, Any] = {}
    provider: Any = None
    params: Mapping[str, Any] = {}

    @property
    def first(self):
        return self.answer._replace(text=ANSWER)

    @property
    def later(self):
        return self.first._replace(**self.again)


def replayed(name, **fields):
    return Case(f"replay {name}", "replayed", **fields)


def continued(provider, model, name="", **fields):
    dialect = "anthropic" if provider == "anthropic" else "openai"
    params = {"model": model}
    return Case(
        f"continue {name or provider}", "continued", "auto", dialect, provider=provider, params=params, **fields
    )


CHAT_CASES = [
    *(
        replayed(f"{ids} {replay}", answer=Answer(ids=ids), again={"replay": replay})
        for ids in ("numbers", "unique")
        for replay in ("after", "inclusive", "whole")
    ),
    replayed("gzip", answer=Answer(ids="numbers", framing="gzip")),
    replayed("length", answer=Answer(ids="numbers", framing="length")),
    replayed("CRLF", answer=Answer(ids="numbers", body=CRLF)),
    replayed("tool call", answer=Answer(ids="unique"), params={"tools": [TOOL]}),
    replayed("anthropic", dialect="anthropic", answer=Answer(ids="numbers"), params=THINKING),
    replayed("anthropic tool", dialect="anthropic", answer=Answer(ids="numbers"), params={**THINKING, "tools": [TOOL]}),
    replayed("gemini", dialect="gemini", answer=Answer(ids="numbers")),
    *(
        replayed(
            f"anthropic tool {replay}",
            dialect="anthropic",
            answer=Answer(ids="numbers"),
            again={"replay": replay},
            params={**THINKING, "tools": [TOOL]},
        )
        for replay in ("inclusive", "whole")
    ),
    *(
        replayed(f"two choices {replay}", answer=Answer(ids="numbers"), again={"replay": replay}, params={"n": 2})
        for replay in ("after", "inclusive", "whole")
    ),
    replayed("background", dialect="openai-responses", params={"background": True}),
    replayed(
        "background inclusive",
        dialect="openai-responses",
        again={"replay": "inclusive"},
        params={"background": True, "reasoning": {"summary": "auto"}, "tools": [TOOL]},
    ),
    replayed("background expired", dialect="openai-responses", again={"expired": True}, params={"background": True}),
]
ANEW_CASES = [
    *(Case(f"verify {dialect}", "verified", "verify", dialect) for dialect in DIALECT_BASES),
    Case("verify tool call", "verified", "verify", params={"tools": [TOOL]}),
    Case("verify anthropic tool", "verified", "verify", "anthropic", params={**THINKING, "tools": [TOOL]}),
    Case("verify gzip", "verified", "verify", answer=Answer(framing="gzip")),
    Case("verify CRLF", "verified", "verify", answer=Answer(body=CRLF)),
]
CONTINUED_CASES = [
    continued("deepseek", "deepseek-chat"),
    continued("mistral", "mistral-small", again={"continuation": "echo"}),
    continued("mistral", "mistral-small", "mistral silent"),
    continued("mistral", "mistral-small", "mistral stripped", again={"continuation": "echo-stripped"}),
    continued("vllm", "llama"),
    continued("anthropic", "claude-sonnet-4-5"),
    *(Case(f"anchor {dialect}", "continued", ("restart", "anchor"), dialect) for dialect in DIALECT_BASES),
]
CASES = CHAT_CASES + ANEW_CASES + CONTINUED_CASES
BY_EVENT = ("replay gzip", "verify gzip", "verify CRLF", "continue deepseek")
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    """A server of vLLM, as its user adds it"""
    row = sheepsse.Provider("http://vllm.test/v1", "", "openai", continuation="vllm")
    monkeypatch.setitem(sheepsse.PROVIDERS, "vllm", row)


def asking_for(case, server, **options):
    where = {"base_url": server.origin + DIALECT_BASES[case.dialect], "dialect": case.dialect}
    retry = sheepsse.Retry(options.pop("total", 5), base_delay=0, rate_limit_delay=0, **options.pop("hooks", {}))
    return asking(server, provider=case.provider, retry=retry, **where, **options)


def size_of(case, server, client):
    """How many bytes the body of the answer has as it travels, and what the uncut stream gives"""
    server.requests.clear()
    server.answer(case.first)
    whole = outcome(client.stream("Hi", resume="never", **case.params))
    memory, request = local_provider.Memory(), server.requests[0]
    body = local_provider.framed(case.first.framing, memory.content_of(case.first, request).pieces)
    return sum(map(len, body.writes)) + len(body.ending()), whole


class Outcome(NamedTuple):
    text: str
    reasoning: str
    calls: Any
    finish_reasons: Any
    usage: Any


def outcome(stream):
    """What the caller received, from the pieces alone"""
    text, reasoning, usage, finishes = "", "", None, []
    calls = collections.OrderedDict()
    for chunk in stream.chunks():
        text, reasoning = text + chunk.text, reasoning + chunk.reasoning
        usage = chunk.usage or usage
        finishes += [chunk.finish_reason] if chunk.finish_reason else []
        for part in chunk.tool_calls:
            name, arguments = calls.get(part.index, ("", ""))
            calls[part.index] = (name + part.name, arguments + part.arguments)
    return Outcome(text, reasoning, list(calls.values()), finishes, usage)


def made_whole(case, stream):
    """What came; None where too little was given for an anchor to prove anything, which the error has then"""
    try:
        return outcome(stream)
    except sheepsse.StreamInterrupted as error:
        if "anchor" not in case.name or len("".join(error.partial.text.split())) >= 8:
            raise
        return None


class Loss:
    """Whether the caller had been given anything when a stream was first lost: what a retry hook can see"""

    def __init__(self):
        self.stream = None
        self.given = None

    def watch(self, stream):
        self.stream, self.given = stream, None
        return stream

    def __call__(self, error, attempt, delay):
        if self.given is None and not isinstance(error, sheepsse.ConnectError):  # of a connection kept open too long
            answer = self.stream.completion
            self.given = bool(answer.text or answer.reasoning or answer.tool_calls)


def assert_exact(case, stream, got, whole, loss):
    """The answer of the uncut stream, its usage or an estimate, and the word for how it was made whole"""
    assert got._replace(usage=None) == whole._replace(usage=None)
    if got.usage is None:  # what was whole is not continued for its usage
        assert case.continuity == "continued"
    elif stream.continuity == "continued":
        assert got.usage.source == "estimate"
        assert got.usage.cost is None
    else:
        assert got.usage == whole.usage
    expected = {None: "single", False: "restarted", True: case.continuity}[loss.given]
    assert stream.continuity in (expected, case.continuity if loss.given is False else expected)


def billed(continuity):
    return {"single": 1, "replayed": 1}.get(continuity, 2)


def offsets(case, size, cut):
    if EVERY_BYTE:
        return range(size + 1)
    # a reset waits until all before it was received, which takes its time
    return sorted(random.Random(case.name + cut).sample(range(size + 1), 6 if cut == "fin" else 2))


@each_case
@pytest.mark.timeout(7200 if EVERY_BYTE else 5 * HANG)
@pytest.mark.parametrize("cut", local_provider.CUTS)
def test_a_stream_cut_at_any_byte_is_made_whole_and_billed_as_its_strategy_says(server, case, cut):
    loss, seen = Loss(), collections.Counter()
    if EVERY_BYTE and case.name not in BY_EVENT:  # in larger writes an hour's run is one of half an hour
        case = case._replace(answer=case.answer._replace(block=1024))
    server.default = case.later
    with asking_for(case, server, hooks={"on_retry": loss}) as client:
        size, whole = size_of(case, server, client)
        assert len(local_provider.split_words(ANSWER)) == WORDS
        assert whole.text == ANSWER or len(whole.calls[0][1]) > 300
        for at in offsets(case, size, cut):
            server.requests.clear()
            server.billed = 0
            server.answer(case.first._replace(cut_at=at, cut=cut))
            stream = loss.watch(client.stream("Hi", resume=case.resume, **case.params))
            got = made_whole(case, stream)
            if got is None:
                assert len(server.requests) == 1
                continue
            assert_exact(case, stream, got, whole, loss)
            assert server.billed == billed(stream.continuity) == len(stream.stats.usage_by_attempt)
            posts = [request for request in server.requests if request.method == "POST"]
            assert len(server.requests) <= stream.stats.attempts
            assert len(posts) == (
                1 if loss.given is None or case.dialect == "openai-responses" and server.billed == 1 else 2
            )
            seen[stream.continuity] += 1
    assert seen[case.continuity] >= seen["single"]


# More than one loss, and obstacles on the way


def obstacles(draw):
    """What the server says to some of those who come back: nothing, that there are too many, that it is busy"""
    kinds = [Answer(drop=True), Answer(drop=True, cut="reset"), error_answer(429), error_answer(503)]
    return draw.choices(kinds, k=draw.choice([0, 0, 1, 2]))


@pytest.mark.timeout(7200 if EVERY_BYTE else 5 * HANG)
def test_two_or_three_losses_with_obstacles_between_give_each_piece_once():
    draw, wholes, seen = random.Random(20), {}, collections.Counter()
    for _ in range(2000 if EVERY_BYTE else 60):
        case, loss = draw.choice(CASES), Loss()
        with LocalProvider() as server, asking_for(case, server, total=20, hooks={"on_retry": loss}) as client:
            if case.name not in wholes:
                wholes[case.name] = size_of(case, server, client)
                server.requests.clear()
                server.billed = 0
            size, whole = wholes[case.name]
            server.default = case.later
            server.answer(case.first._replace(cut_at=draw.randrange(size), cut=draw.choice(local_provider.CUTS)))
            for _ in range(draw.choice([1, 2])):
                cut = case.later._replace(cut_at=draw.randrange(size), cut=draw.choice(local_provider.CUTS))
                server.answer(*obstacles(draw), cut)
            stream = loss.watch(client.stream("Hi", resume=case.resume, **case.params))
            got = made_whole(case, stream)
            if got is None:
                continue
            assert_exact(case, stream, got, whole, loss)
            assert len(server.requests) == stream.stats.attempts
            # one that was cut before its first byte was billed all the same, though nobody knows of it
            assert server.billed >= len(stream.stats.usage_by_attempt)
            if stream.continuity == "replayed":
                assert server.billed == 1
            seen[stream.continuity] += 1
    assert min(seen[word] for word in ("replayed", "verified", "continued")) > 5


@pytest.mark.parametrize("case", [CASES[-1], ANEW_CASES[0]], ids=lambda case: case.name)
def test_a_server_that_refuses_connections_for_a_while_is_waited_for(case):
    first = LocalProvider(case.first._replace(cut_after=20))
    port, servers = int(first.origin.rpartition(":")[2]), [first]

    def next_server(error, attempt, delay):
        if len(servers) == 1:
            servers[0].close()
            servers.append(None)
        elif servers[-1] is None and attempt == 3:
            servers[-1] = LocalProvider(case.first, port=port)

    with first, asking_for(case, first, hooks={"on_retry": next_server}) as client:
        stream = client.stream("Hi", resume=case.resume)
        text = "".join(stream)
    with servers[-1]:
        assert (text, stream.continuity, stream.stats.reconnects) == (ANSWER, case.continuity, 1)
        assert (stream.stats.attempts, first.billed, servers[-1].billed) == (4, 1, 1)


# Where nothing is valid


def reasoned(text=ANSWER):
    return Answer(events=local_provider.chat_events(text.split(), reasoning=["Hm", "m"]))


def two_choices(**fields):
    """The words of both choices, in turns"""
    events = []
    for word in ANSWER.split():
        events += [local_provider.chunk_event(index=index, content=word + " ") for index in (0, 1)]
    events += [local_provider.chunk_event(index=index, finish_reason="stop") for index in (0, 1)]
    body = b"".join([*events, local_provider.data_event("[DONE]")])
    return Answer(body=body, **fields)


def refusing_to_say(text=ANSWER):
    return Answer(events=local_provider.chat_events([{"refusal": word} for word in text.split()]))


DEEPSEEK = {"provider": "deepseek"}
HOPELESS = {
    "no ids, no continuation": ({}, {}, Answer(text=ANSWER)),
    "gemini": ({"dialect": "gemini"}, {}, Answer(text=ANSWER)),
    "ollama": ({"dialect": "ollama"}, {}, Answer(text=ANSWER)),
    "responses in the foreground": ({"dialect": "openai-responses"}, {}, Answer(text=ANSWER)),
    "a model of anthropic that refuses": (
        {"dialect": "anthropic", "provider": "anthropic"},
        {"model": "claude-sonnet-4-6"},
        Answer(text=ANSWER),
    ),
    "anthropic while it thinks": (
        {"dialect": "anthropic", "provider": "anthropic"},
        {"model": "claude-sonnet-4-5", **THINKING},
        Answer(text=ANSWER, thinking=ANSWER),
    ),
    "a call of a tool": (DEEPSEEK, {"tools": [TOOL]}, Answer(text=ANSWER)),
    "reasoning": (DEEPSEEK, {}, reasoned()),
    "a refusal": (DEEPSEEK, {}, refusing_to_say()),
    "two choices": (DEEPSEEK, {"n": 2}, two_choices()),
    "two choices, to be verified": ({}, {"n": 2, "resume": "verify"}, two_choices()),
    "ids, but never": ({}, {"resume": "never"}, Answer(text=ANSWER, ids="numbers")),
    "ids, but only restart": ({}, {"resume": "restart"}, Answer(text=ANSWER, ids="numbers")),
}


@pytest.mark.timeout(7200 if EVERY_BYTE else 5 * HANG)
@pytest.mark.parametrize("name", HOPELESS)
def test_where_no_strategy_is_valid_all_that_came_is_in_partial_and_nothing_is_sent_twice(server, name):
    options, params, answer = HOPELESS[name]
    case = Case(name, "single", answer=answer, **options)
    lost = 0
    with asking_for(case, server) as client:
        server.answer(answer)
        whole = outcome(client.stream("Hi", **params))
        body = local_provider.framed("chunked", local_provider.content_of(answer, server.requests[0]).pieces)
        size = sum(map(len, body.writes)) + len(body.ending())
        for at in range(size + 1) if EVERY_BYTE else sorted(random.Random(name).sample(range(size), 12)):
            server.requests.clear()
            server.billed = 0
            server.default = answer
            server.answer(answer._replace(cut_at=at))
            stream = client.stream("Hi", **params)
            came, error = read(stream.chunks())
            given = any(chunk.text or chunk.reasoning or chunk.refusal or chunk.tool_calls for chunk in came)
            if error is None:
                assert stream.continuity == "single" or not given or stream.stats.reconnects == 1
                continue
            lost += 1
            assert type(error) is sheepsse.StreamInterrupted and given or params.get("resume") in ("never", "verify")
            assert (len(server.requests), server.billed) == (1, 1)
            assert error.partial.text == "".join(chunk.text for chunk in came if chunk.index == 0)
            assert whole.text.startswith(error.partial.text) or "n" in params
            assert error.resume_point.text == error.partial.text
            assert not error.partial.complete
    assert lost > (size // 2 if EVERY_BYTE else 5)


# Budgets


def one_new_chunk_a_connection(times, first=2, step=1):
    return [Answer(text=ANSWER, cut_after=first + step * at) for at in range(times)]


@pytest.mark.parametrize(
    ("dialect", "params", "total"),
    [("openai", {}, 1), ("openai-responses", {"background": True}, 5)],  # of whose events some are no chunk
)
def test_replay_follows_to_the_end_a_server_that_gives_one_new_chunk_a_connection(server, dialect, params, total):
    case = Case("", "replayed", dialect=dialect)
    answer = Answer(text=ANSWER, ids="numbers", cut_after=1)
    server.answer(answer._replace(cut_after=5))
    server.default = answer
    with asking_for(case, server, total=total) as client:
        stream = client.stream("Hi", **params)
        assert "".join(stream) == ANSWER
    assert (server.billed, stream.continuity) == (1, "replayed")
    assert stream.stats.reconnects == len(server.requests) - 1 > 50


@pytest.mark.parametrize("total", [1, 3])
@pytest.mark.parametrize(
    ("case", "step"),
    [(ANEW_CASES[0], 1), (CONTINUED_CASES[0], 0), (CONTINUED_CASES[1], 1), (CONTINUED_CASES[5], 0), (CASES[-1], 1)],
    ids=lambda value: getattr(value, "name", None),
)
def test_other_strategies_leave_a_server_after_as_many_billed_requests_as_the_policy_allows(server, case, step, total):
    server.default = case.later._replace(cut_after=6)
    with asking_for(case, server, total=total) as client:
        stream = client.stream("Hi", resume=case.resume, **case.params)
        pieces, error = read(stream)
    assert type(error) is sheepsse.StreamInterrupted
    assert (len(server.requests), server.billed) == (1 + total, 1 + total)
    assert ANSWER.startswith("".join(pieces))
    assert error.partial.text == "".join(pieces)


@pytest.mark.parametrize(
    "answer", [Answer(drop=True), Answer(cut_at=0), Answer(cut_after=1), Answer(cut_at=9, ids="numbers")]
)
@pytest.mark.parametrize("total", [0, 2])
def test_a_server_that_drops_before_any_piece_is_asked_once_and_total_times_more(server, answer, total):
    server.default = answer
    with asking_for(Case("", ""), server, total=total) as client:
        pieces, error = read(client.stream("Hi"))
    assert (pieces, error.retryable, len(server.requests)) == ([], True, 1 + total)


def test_a_policy_without_retries_never_reconnects(server):
    server.default = Answer(text=ANSWER, ids="numbers", cut_after=9)
    for resume in ("auto", "replay", "verify", ("restart", "anchor")):
        with asking_for(Case("", ""), server, total=0) as client:
            pieces, error = read(client.stream("Hi", resume=resume))
        assert type(error) is sheepsse.StreamInterrupted
        assert ANSWER.startswith("".join(pieces))
    assert len(server.requests) == 4


def test_the_first_reconnect_is_immediate_and_the_hooks_tell_of_each(server):
    told, slept = [], []
    retry = sheepsse.Retry(
        5,
        base_delay=8,
        jitter=False,
        sleep=slept.append,
        on_retry=lambda error, attempt, delay: told.append(("retry", error.code, attempt, delay)),
        on_reconnect=lambda attempt, latency: told.append(("reconnect", attempt, latency >= 0)),
        on_give_up=lambda error, attempt: told.append(("give up", attempt)),
    )
    cut = Answer(text=ANSWER, ids="numbers", cut_after=9)
    server.default = cut._replace(cut_after=None)
    server.answer(cut, Answer(drop=True), error_answer(503), cut)
    with asking(server, retry=retry) as client:
        assert "".join(client.stream("Hi")) == ANSWER
    assert told == [
        ("retry", "CONNECTION_LOST", 1, 0.0),
        ("retry", "NETWORK_ERROR", 2, 16),
        ("retry", "SERVER_ERROR", 3, 32 if retry.max_delay >= 32 else retry.max_delay),
        ("reconnect", 4, True),
        ("retry", "CONNECTION_LOST", 1, 0.0),
        ("reconnect", 5, True),
    ]
    assert slept == [told[0][3], told[1][3], told[2][3], 0.0]


def test_what_the_server_asks_to_wait_is_waited_also_before_a_reconnect(server):
    slept = []
    server.answer(Answer(text=ANSWER, ids="numbers", cut_after=9), error_answer(429, retry_after=7))
    server.default = Answer(text=ANSWER)
    with asking(server, retry=sheepsse.Retry(3, sleep=slept.append)) as client:
        assert "".join(client.stream("Hi")) == ANSWER
    assert slept == [0.0, 7]


def test_the_hook_that_gives_up_is_called_once_with_the_loss(server):
    told = []
    server.default = Answer(text=ANSWER, cut_after=9)
    retry = sheepsse.Retry(2, base_delay=0, on_give_up=lambda error, attempt: told.append((error, attempt)))
    with asking(server, retry=retry) as client:
        _, error = read(client.stream("Hi", resume="verify"))
    assert told == [(error, 3)]


def test_a_reconnect_that_fails_for_good_raises_the_loss_with_its_reason(server):
    server.answer(Answer(text=ANSWER, ids="numbers", cut_after=9))
    server.default = error_answer(503)
    with asking_for(Case("", ""), server, total=2) as client:
        pieces, error = read(client.stream("Hi"))
    assert type(error) is sheepsse.StreamInterrupted
    assert type(error.__cause__) is sheepsse.ServerError
    assert error.partial.text == "".join(pieces) != ""
    assert len(server.requests) == 3


def taking(clock, seconds, answer):
    """The answer to each request; so many seconds pass with it"""

    def answered(request):
        clock.now += seconds
        return answer

    return answered


def test_the_deadline_holds_over_all_connections(server, clock):
    server.default = taking(clock, 1, Answer(text=ANSWER, ids="numbers", cut_after=3))
    with asking_for(Case("", ""), server) as client:
        pieces, error = read(client.stream("Hi", deadline=10))
    assert clock.now == len(server.requests) == 10
    assert isinstance(error, (sheepsse.StreamTimeout, sheepsse.StreamInterrupted))
    assert 0 < len(pieces) < 60
    assert error.partial.text == "".join(pieces)
    assert server.billed == 1


def test_no_wait_is_begun_that_the_deadline_would_end(server):
    slept = []
    server.answer(Answer(text=ANSWER, ids="numbers", cut_after=9), error_answer(429, retry_after=50))
    with asking_for(Case("", ""), server, hooks={"sleep": slept.append}) as client:
        pieces, error = read(client.stream("Hi", deadline=30))
    assert slept == [0]
    assert error.partial.text == "".join(pieces) != ""


@pytest.mark.parametrize("end", ["cancel", "close"])
@pytest.mark.parametrize("moment", ["waiting", "asking"])
def test_a_stream_that_reconnects_ends_at_once_when_it_is_told_to(server, end, moment):
    for_ever, delays = 1_000_000, []
    server.answer(Answer(text=ANSWER, ids="numbers", cut_after=9))
    server.default = error_answer(503) if moment == "waiting" else Answer(delay=for_ever)
    retry = sheepsse.Retry(
        9,
        base_delay=for_ever,
        max_delay=for_ever,
        jitter=False,
        on_retry=lambda error, attempt, delay: delays.append(delay),
    )

    def end_it():
        assert until(lambda: for_ever in delays if moment == "waiting" else len(server.requests) == 2)
        getattr(stream, end)()

    with asking(server, retry=retry, **PATIENT) as client:
        stream = client.stream("Hi")
        with in_another_thread(end_it):
            pieces, error = read(stream)
    assert ANSWER.startswith("".join(pieces))
    assert pieces
    assert type(error) is (sheepsse.StreamCancelled if end == "cancel" else type(None))
    assert len(server.requests) == 2


# Servers that do otherwise than they say


@pytest.mark.parametrize("dialect", ["openai", "anthropic", "gemini"])
def test_of_a_new_generation_in_place_of_a_replay_nothing_is_given_out(server, dialect):
    case = Case("", "", dialect=dialect, answer=Answer(ids="numbers"), again={"replay": "forget"})
    server.answer(case.first._replace(cut_after=9))
    server.default = case.later
    with asking_for(case, server) as client:
        pieces, error = read(client.stream("Hi"))
    assert type(error) is sheepsse.StreamInterrupted
    assert not error.retryable
    assert "another answer" in str(error)
    assert ANSWER.startswith("".join(pieces))
    assert error.partial.text == "".join(pieces) != ""
    assert len(server.requests) == 2


def test_a_new_generation_under_the_same_id_is_found_out_by_its_words(server):
    server.answer(Answer(text=ANSWER, ids="numbers", cut_after=9))
    server.default = Answer(replay="forget", events=local_provider.chat_events(["Quite", " another", " one"]))
    with asking_for(Case("", ""), server) as client:
        pieces, error = read(client.stream("Hi"))
    assert "another answer" in str(error)
    assert ANSWER.startswith("".join(pieces))


@pytest.mark.parametrize("by", ["checkpoint", "resume_from"])
@pytest.mark.parametrize("dialect", ["openai", "anthropic", "gemini"])
def test_once_another_answer_was_seen_the_ids_of_this_one_are_used_no_more(server, tmp_path, dialect, by):
    case = Case("", "", dialect=dialect, answer=Answer(ids="numbers"), again={"replay": "forget"})
    server.answer(case.first._replace(cut_after=9))
    server.default = case.later
    options = {"checkpoint": tmp_path} if by == "checkpoint" else {}
    with asking_for(case, server) as client:
        pieces, error = read(client.stream("Hi", resume="replay", **options))
        assert "another answer" in str(error)
        server.default = Answer(text=ANSWER, ids="numbers")  # which has events of the newer answer under the same ids
        server.requests.clear()
        options = options or {"resume_from": error}
        again = client.stream("Hi", resume="replay", **options)
        more, error = read(again)
    assert not any(request.headers["Last-Event-ID"] for request in server.requests)
    if by == "checkpoint":
        assert ("".join(more), error, again.continuity) == (ANSWER, None, "restarted")
    else:
        assert (more, type(error), server.requests) == ([], sheepsse.StreamInterrupted, [])


def test_a_continuation_that_is_refused_is_remembered_and_the_next_strategy_taken(server):
    case = continued("deepseek", "deepseek-chat")
    server.default = Answer(text=ANSWER, cut_after=9)
    with asking_for(case, server) as client:
        for expected in (2, 1):
            server.requests.clear()
            server.answer(server.default, Answer(continuation="refuse"))
            _, error = read(client.stream("Hi", **case.params))
            assert type(error) is sheepsse.StreamInterrupted
            assert len(server.requests) == expected
            server._queue.clear()
        server.answer(server.default, Answer(text=ANSWER))
        stream = client.stream("Hi", resume=("continue", "verify"), **case.params)
        assert ("".join(stream), stream.continuity) == (ANSWER, "verified")


def lost_once(server, case, cut_after=20, **params):
    """The request that goes on, and the stream that it belongs to"""
    server.answer(case.first._replace(cut_after=cut_after))
    server.default = case.later
    with asking_for(case, server) as client:
        stream = client.stream("Hi", resume=case.resume, **case.params, **params)
        assert "".join(stream) == ANSWER
    return server.requests[1], stream


def test_deepseek_goes_on_at_its_beta_address_with_fewer_tokens(server):
    request, _ = lost_once(server, CONTINUED_CASES[0], max_tokens=1000)
    assert request.path == "/v1/beta/chat/completions" or request.path == "/beta/chat/completions"
    said = request.json["messages"][-1]
    assert said["prefix"] is True
    assert ANSWER.startswith(said["content"])
    assert said["role"] == "assistant"
    assert 1000 - len(said["content"]) < request.json["max_tokens"] < 1000


def test_anthropic_goes_on_from_text_without_white_space_at_its_end(server):
    text = "One  two\n\n three"
    for cut_after in range(4, 8):
        server.answer(Answer(text=text, cut_after=cut_after))
        server.default = Answer(text=text)
        with asking_for(CONTINUED_CASES[5], server) as client:
            assert "".join(client.stream("Hi", model="claude-sonnet-4-5", max_tokens=99)) == text
        said = server.requests[-1].json["messages"][-1]
        assert said["role"] == "user" or said["content"] == said["content"].rstrip() != ""


# Continuations, repetitions and anchors


@pytest.mark.parametrize("provider", ["mistral", "deepseek", "vllm"])
@pytest.mark.parametrize("cut_after", [10, 40])
def test_an_answer_is_never_silently_repeated_by_its_continuation(server, provider, cut_after):
    case = continued(provider, {"deepseek": "deepseek-chat"}.get(provider, "m"))
    begun = ANSWER.split(" ")[: cut_after - 1]
    text = " ".join(begun)
    ways = {
        "whole": text + " and more",
        "without its white space": text.strip() + "and more",
        "a part": text[: len(text) // 2 + 3] + "and more",
        "with other white space": text.replace(" ", "  ") + " and more",
        "behind white space": "\n" + text + " and more",
        "in capitals": text.upper() + " and more",
    }
    for way, said in ways.items():
        server.answer(Answer(text=text + " and more", cut_after=cut_after))
        server.default = Answer(events=local_provider.chat_events(local_provider.split_words(said)))
        with asking_for(case, server) as client:
            stream = client.stream("Hi", **case.params)
            pieces, error = read(stream)
        came = "".join(pieces)
        if error is None:
            assert stream.continuity == "continued"
            assert came.count(text[:20]) == 1 or way == "in capitals", way
        else:
            assert type(error) is sheepsse.StreamInterrupted
            assert "repeats" in str(error)
            assert (text + " and more").startswith(came)
            assert error.partial.text == came


def test_a_continuation_that_ignores_the_beginning_is_labelled(server):
    case = continued("mistral", "mistral-small", again={"continuation": "ignore"})
    server.answer(case.first._replace(cut_after=9))
    server.default = case.later
    with asking_for(case, server) as client:
        stream = client.stream("Hi", **case.params)
        text = "".join(stream)
    assert stream.continuity == "continued"
    assert "On second thoughts" in text
    assert (stream.usage.source, stream.cost) == ("estimate", None)


def test_verify_raises_at_the_first_difference_and_says_where(server):
    other = ANSWER[:100] + "x" + ANSWER[101:]
    case = ANEW_CASES[0]
    server.answer(case.first._replace(cut_after=60))
    server.default = Answer(text=other)
    with asking_for(case, server) as client:
        pieces, error = read(client.stream("Hi", resume="verify"))
    assert type(error) is sheepsse.StreamInterrupted
    assert "at text 100" in str(error)
    assert ANSWER.startswith("".join(pieces))
    assert error.partial.text == "".join(pieces)
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("first", "second", "where"),
    [
        (["a", "b"], ["a"], "text 1"),
        ([{"reasoning_content": "why"}], [{"reasoning_content": "who"}], "reasoning 2"),
        ([{"refusal": "No."}], ["Yes."], "refusal 0"),
        (
            [{"tool_calls": [{"index": 0, "id": "1", "function": {"name": "a", "arguments": "{"}}]}],
            [{"tool_calls": [{"index": 0, "id": "1", "function": {"name": "b", "arguments": "{"}}]}],
            "tool_calls 0",
        ),
        (
            [{"tool_calls": [{"index": 0, "id": "1", "function": {"name": "a", "arguments": "{"}}]}],
            [{"tool_calls": [{"index": 0, "id": "1", "function": {"name": "a", "arguments": "["}}]}],
            "tool_calls 0",
        ),
        (
            [{"tool_calls": [{"index": 0, "id": "1", "function": {"name": "a", "arguments": "[]"}}]}],
            [{"tool_calls": [{"index": 0, "id": "1", "function": {"name": "a", "arguments": "["}}]}],
            "tool_calls 0",
        ),
    ],
)
def test_verify_holds_every_kind_of_piece_against_what_was_given(server, first, second, where):
    server.answer(Answer(events=local_provider.chat_events(first, finish=None, done=False), cut_after=1 + len(first)))
    server.default = Answer(events=local_provider.chat_events(second))
    with asking_for(Case("", ""), server) as client:
        came, error = read(client.stream("Hi", resume="verify").chunks())
    assert f"at {where}" in str(error)
    assert not any(chunk.finish_reason for chunk in came)


def test_verify_begins_a_call_that_was_not_open_yet(server):
    def call(index, arguments, **fields):
        return {"tool_calls": [{"index": index, **fields, "function": {"name": "f", "arguments": arguments}}]}

    deltas = [call(0, '{"a":', id="1"), call(0, "1}"), call(1, "{}", id="2")]
    server.answer(Answer(events=local_provider.chat_events(deltas), cut_after=2))
    server.default = Answer(events=local_provider.chat_events(deltas, finish="tool_calls"))
    with asking_for(Case("", ""), server) as client:
        stream = client.stream("Hi", resume="verify")
        got = outcome(stream)
    assert [arguments for _, arguments in got.calls] == ['{"a":1}', "{}"]
    assert stream.continuity == "verified"


@pytest.mark.parametrize("dialect", DIALECT_BASES)
@pytest.mark.parametrize("anchor", ["none", "partial", "changed", "preamble"])
def test_of_an_answer_that_does_not_repeat_its_last_words_nothing_is_given_out(server, dialect, anchor):
    case = Case("", "", "anchor", dialect, again={"anchor": anchor})
    server.answer(case.first._replace(cut_after=40))
    server.default = case.later
    with asking_for(case, server) as client:
        pieces, error = read(client.stream("Hi", resume="anchor"))
    assert type(error) is sheepsse.StreamInterrupted
    assert "last words" in str(error)
    assert ANSWER.startswith("".join(pieces))
    assert error.partial.text == "".join(pieces) != ""


def test_an_anchor_of_which_only_a_part_comes_is_none(server):
    said = ANSWER[:30]
    for rest in (["Hết"], []):
        server.answer(Answer(text=ANSWER, cut_after=9))
        server.default = Answer(events=local_provider.chat_events(rest))
        with asking_for(Case("", ""), server) as client:
            pieces, error = read(client.stream("Hi", resume="anchor"))
        assert "last words" in str(error)
        assert said.startswith("".join(pieces)[:20])


def test_the_model_is_told_to_repeat_forty_to_eighty_of_its_last_characters(server):
    request, stream = lost_once(server, CASES[-4]._replace(dialect="openai"), cut_after=50)
    assert stream.continuity == "continued"
    said, told = request.json["messages"][-2:]
    quoted = told["content"].split("```")[1].strip("\n")
    assert said["content"].endswith(quoted)
    assert 40 <= len(quoted) <= 80


# What it cost


def test_each_generation_has_its_own_usage(server):
    _, stream = lost_once(server, ANEW_CASES[0])
    assert stream.stats.usage_by_attempt == (None, stream.usage)
    server.requests.clear()
    _, stream = lost_once(server, CONTINUED_CASES[0])
    first, second = stream.stats.usage_by_attempt
    assert (first, stream.usage.source, stream.cost) == (None, "estimate", None)
    assert second.source == "provider"
    assert stream.usage.output_tokens > second.output_tokens


@pytest.mark.parametrize("ids", ["none", "numbers"])
@pytest.mark.parametrize("resume", ["auto", "verify", "never"])
def test_a_loss_between_the_answer_and_its_usage_is_no_error_and_costs_only_who_asked_for_it(server, ids, resume):
    whole = Answer(text=ANSWER, ids=ids)
    words = len(ANSWER.split())
    server.answer(whole._replace(cut_after=words + 2))  # role, words, finish
    server.default = whole
    with asking_for(Case("", ""), server) as client:
        stream = client.stream("Hi", resume=resume)
        got = outcome(stream)
    expected = {"verify": ("verified", 2), "never": ("single", 1)}.get(resume)
    expected = expected or (("replayed", 1) if ids == "numbers" else ("single", 1))
    assert (got.text, got.finish_reasons) == (ANSWER, ["stop"])
    assert (stream.continuity, server.billed) == expected
    assert (stream.usage is not None) == (expected[0] != "single")
    assert stream.completion.complete


@pytest.mark.parametrize(
    "failure", [error_answer(503), error_answer(400), Answer(text="Another answer"), Answer(drop=True)]
)
def test_a_usage_that_cannot_be_had_again_is_no_error(server, failure):
    server.answer(Answer(text=ANSWER, cut_after=len(ANSWER.split()) + 2))
    server.default = failure
    with asking_for(Case("", ""), server, total=2) as client:
        stream = client.stream("Hi", resume="verify")
        assert "".join(stream) == ANSWER
    assert (stream.usage, stream.completion.complete, stream.finish_reason) == (None, True, "stop")


# In another process


RESUMED = [CHAT_CASES[0], CHAT_CASES[3], *CONTINUED_CASES[:2], CONTINUED_CASES[5], *ANEW_CASES[:5], CASES[-1]]
FORMS = {
    "the error": lambda error: error,
    "a pickled error": lambda error: pickle.loads(pickle.dumps(error)),
    "its point": lambda error: error.resume_point,
    "a JSON list": lambda error: json.loads(json.dumps(error.resume_point)),
    "a JSON object": lambda error: json.loads(json.dumps(error.resume_point._asdict())),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", RESUMED, ids=lambda case: case.name)
def test_only_what_is_missing_is_given_to_who_resumes_from_elsewhere(server, case, form):
    server.answer(case.first._replace(cut_after=20))
    server.default = case.later
    with asking_for(case, server) as client:
        given, error = read(client.stream("Hi", resume="never", **case.params))
    server.requests.clear()
    with asking_for(case, server) as client:
        stream = client.stream("Hi", resume=case.resume, resume_from=FORMS[form](error), **case.params)
        rest = "".join(stream)
    assert given
    assert "".join(given) + rest == ANSWER == stream.text
    assert (stream.continuity, len(server.requests)) == (case.continuity, 1)


def test_a_background_job_is_gone_on_with_from_elsewhere(server):
    case = replayed("", dialect="openai-responses", params={"background": True})
    server.answer(case.first._replace(cut_after=20))
    with asking_for(case, server) as client:
        given, error = read(client.stream("Hi", resume="never", **case.params))
    server.default = case.later
    with asking_for(case, server) as client:
        stream = client.stream("Hi", resume_from=error, **case.params)
        assert "".join(given) + "".join(stream) == ANSWER
    assert server.billed == 1
    assert stream.usage is not None


def test_a_stream_resumed_from_elsewhere_may_be_lost_again(server):
    answer = Answer(text=ANSWER, ids="unique")
    server.answer(answer._replace(cut_after=20), answer._replace(cut_after=3), answer._replace(cut_after=5))
    server.default = answer
    with asking_for(Case("", ""), server) as client:
        given, error = read(client.stream("Hi", resume="never"))
        more, error = read(client.stream("Hi", resume_from=error, retry=0))
        rest = "".join(client.stream("Hi", resume_from=error))
    assert "".join(given) + "".join(more) + rest == ANSWER
    assert server.billed == 1


def test_where_nothing_goes_on_from_a_point_nothing_is_sent(server):
    server.answer(Answer(text=ANSWER, cut_after=20))
    with asking_for(Case("", ""), server) as client:
        given, error = read(client.stream("Hi"))
        pieces, again = read(client.stream("Hi", resume_from=error))
    assert pieces == []
    assert type(again) is sheepsse.StreamInterrupted
    assert "no strategy" in str(again)
    assert again.partial.text == "".join(given) == again.resume_point.text
    assert len(server.requests) == 1


def test_a_point_of_an_answer_that_had_not_begun_begins_it(server):
    server.answer(Answer(drop=True))
    with asking_for(Case("", ""), server) as client:
        stream = client.stream("Hi", resume_from=sheepsse.ResumePoint())
        assert read(stream)[0] == local_provider.split_words(local_provider.TEXT)


@pytest.mark.parametrize("value", [7, "text", b"text", object()])
def test_what_is_no_point_is_a_type_error(client, value):
    with pytest.raises(TypeError, match="resume_from"):
        client.stream("Hi", resume_from=value)


def test_a_point_that_was_changed_is_a_value_error(client):
    odd = [sheepsse.ResumePoint(cursor=cursor) for cursor in ("[]", "{", '"x"', '[1,"",[],"",[null,null],[]]')]
    for point in (*odd, sheepsse.ResumePoint(text=5), {"place": 1}, [1] * 9):
        with pytest.raises(ValueError, match="resume_point"):
            client.stream("Hi", resume_from=point)


def test_a_point_and_a_checkpoint_are_not_taken_together(client, tmp_path):
    with pytest.raises(ValueError, match="not both"):
        client.stream("Hi", resume_from=sheepsse.ResumePoint(), checkpoint=tmp_path)


@pytest.mark.parametrize("value", ["always", "", (), ("replay", "magic"), []])
def test_an_unknown_strategy_is_a_value_error(client, value):
    with pytest.raises(ValueError, match="resume is"):
        client.stream("Hi", resume=value)


# Jobs in the background


BACKGROUND = replayed("", dialect="openai-responses", params={"background": True})


def test_a_job_that_still_runs_is_asked_for_until_it_is_done(server):
    slept = []
    running = Answer(text=ANSWER, job="running")
    server.answer(BACKGROUND.first._replace(cut_after=20), Answer(expired=True), running, running)
    server.default = BACKGROUND.first
    with asking_for(BACKGROUND, server, total=1, hooks={"sleep": slept.append}) as client:
        stream = client.stream("Hi", **BACKGROUND.params)
        assert "".join(stream) == ANSWER
    assert (server.billed, stream.continuity, stream.usage is not None) == (1, "replayed", True)
    assert len(server.requests) == 5
    assert len(slept) >= 3


def test_a_job_is_waited_for_no_longer_than_the_deadline(server, clock):
    server.answer(BACKGROUND.first._replace(cut_after=20), Answer(expired=True))
    server.default = taking(clock, 1, Answer(text=ANSWER, job="running"))
    with asking_for(BACKGROUND, server) as client:
        pieces, error = read(client.stream("Hi", deadline=10, **BACKGROUND.params))
    assert clock.now == 11  # it is cancelled when the deadline has passed
    assert isinstance(error, sheepsse.SheepError)
    assert error.partial.text == "".join(pieces) != ""


def test_a_job_that_is_dropped_while_another_call_connects_leaves_its_limits_alone(server, monkeypatch):
    plain = sheepsse._connected
    server.answer(BACKGROUND.first)
    with asking_for(BACKGROUND, server) as client:
        dropped = [client.stream("Hi", **BACKGROUND.params)]
        next(dropped[0])

        def connected(*arguments):
            monkeypatch.setattr(sheepsse, "_connected", plain)
            dropped.clear()  # which sends the request to cancel its job
            return plain(*arguments)

        monkeypatch.setattr(sheepsse, "_connected", connected)
        server.default = Answer(stall_after=1, keepalive=0.05)
        with asking(server, retry=0, timeout=None, first_timeout=0.3, idle_timeout=0.3) as other:
            _, error = read(other.stream("Hi"))
    assert (type(error), len(server.cancelled)) == (sheepsse.StreamTimeout, 1)


def test_a_whole_answer_in_the_background_is_waited_for(server):
    server.answer(Answer(text=ANSWER))
    with asking_for(BACKGROUND, server) as client:
        assert client.complete("Hi", **BACKGROUND.params).text == ANSWER
    assert server.billed == 1


def test_a_job_whose_text_is_not_what_was_given_is_an_error(server):
    first = BACKGROUND.first
    server.answer(first._replace(cut_after=20), Answer(expired=True))
    with asking_for(BACKGROUND, server) as client:
        stream = client.stream("Hi", **BACKGROUND.params)
        given = [next(stream) for _ in range(5)]
        job = next(iter(server._memory._jobs))
        other = local_provider.response_object(local_provider.message_item("Another answer"), id=job, background=True)
        server.answer(Answer(replay="forget", body=local_provider.dumps(other)))
        pieces, error = read(stream)
    assert type(error) is sheepsse.StreamInterrupted
    assert "differs" in str(error)
    assert ANSWER.startswith("".join(given + pieces))


def test_a_job_that_is_given_up_is_cancelled_once(server):
    ends = {
        "close": lambda stream: stream.close(),
        "leave": lambda stream: stream.__exit__(None, None, None),
        "collect": lambda stream: None,
        "cancel": lambda stream: (stream.cancel(), read(stream)),
    }
    with asking_for(BACKGROUND, server) as client:
        for name, end in ends.items():
            server.cancelled.clear()
            stream = client.stream("Hi", **BACKGROUND.params)
            next(stream)
            end(stream)
            del stream
            gc.collect()
            assert len(server.cancelled) == 1, name
        server.cancelled.clear()
        client.stream("Hi", **BACKGROUND.params).close()
        with client.stream("Hi", **BACKGROUND.params) as stream:
            "".join(stream)
    assert server.cancelled == []


def test_a_cancel_that_fails_is_only_logged(server, caplog):
    caplog.set_level("DEBUG", "sheepsse")
    server.answer(BACKGROUND.first)
    server.default = Answer(drop=True)
    with asking_for(BACKGROUND, server) as client:
        stream = client.stream("Hi", **BACKGROUND.params)
        next(stream)
        stream.close()
    assert "could not be cancelled" in caplog.text


def test_a_job_that_is_gone_raises_the_loss(server):
    server.answer(BACKGROUND.first._replace(cut_after=20), Answer(expired=True), Answer(job="running"))
    server.default = error_answer(404)
    with asking_for(BACKGROUND, server) as client:
        pieces, error = read(client.stream("Hi", **BACKGROUND.params))
    assert type(error) is sheepsse.StreamInterrupted
    assert ANSWER.startswith("".join(pieces))


# What a checkpoint holds, to a caller who was given nothing of it


KEPT = [
    *CHAT_CASES[:3],
    *(case for case in CHAT_CASES if case.name in ("replay anthropic", "replay gemini", "replay background")),
    *ANEW_CASES[:2],
    *CONTINUED_CASES[:2],
    CASES[-1],
]


def begun(client, case, pieces, folder, **params):
    """What was given out of a stream that keeps a checkpoint, and was left when it had given so many chunks"""
    with client.stream("Hi", checkpoint=folder, **{**case.params, **params}) as stream:
        return list(itertools.islice(stream.chunks(), pieces))


@pytest.mark.parametrize("case", KEPT, ids=lambda case: case.name)
def test_the_same_request_again_gives_what_was_kept_and_then_the_rest(server, tmp_path, case):
    server.default = case.first
    with asking_for(case, server) as client:
        whole = outcome(client.stream("Hi", **case.params))
    for taken in (1, 2, 3, 20, 21, 22, WORDS + 1):
        folder = tmp_path / str(taken)
        with asking_for(case, server) as client:
            server.default = case.first
            begun(client, case, taken, folder)
            server.default = case.later
            server.requests.clear()
            server.billed = 0
            stream = client.stream("Hi", checkpoint=folder, resume=case.resume, **case.params)
            got = outcome(stream)
            assert got._replace(usage=None) == whole._replace(usage=None)
            if stream.continuity == "replayed":
                assert (server.billed, got.usage) == (0, whole.usage)
            assert stream.continuity in (case.continuity, "restarted", "single")
            few = 3 if "anchor" not in case.name else 20
            assert stream.continuity == case.continuity or taken < few or taken > WORDS
            server.requests.clear()
            again = client.stream("Hi", checkpoint=folder, **case.params)
            assert (outcome(again), server.requests, again.stats.cached) == (got, [], True)


@pytest.mark.parametrize(
    ("case", "again"),
    [
        (CHAT_CASES[0], {"replay": "forget"}),
        (CONTINUED_CASES[0], {"continuation": "refuse"}),
        (continued("mistral", "m"), {"continuation": "echo-part"}),
        (ANEW_CASES[0], {"text": "Other words"}),
        (CASES[-1]._replace(resume="anchor"), {"anchor": "none"}),
        (BACKGROUND, {"job": "running", "expired": True}),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_cannot_be_gone_on_with_is_asked_anew_and_none_of_it_given_out(server, tmp_path, case, again):
    server.default = case.first
    with asking_for(case, server) as client:
        begun(client, case, 20, tmp_path)
        if case is BACKGROUND:
            assert len(server.cancelled) == 1  # so it will never be whole
        server.default = case.later._replace(**again)
        server.requests.clear()
        stream = client.stream("Hi", checkpoint=tmp_path, resume=case.resume, **case.params)
        text = "".join(stream)
    said = again.get("text", ANSWER)
    assert text in (said, f"On second thoughts: {said}")
    assert (stream.continuity, stream.text) == ("restarted", text)
    assert stream.stats.attempts == len(server.requests) > 1


def test_where_a_replay_is_another_answer_the_next_strategy_goes_on(server, tmp_path):
    case = CONTINUED_CASES[0]._replace(answer=Answer(ids="numbers"), again={"replay": "forget"})
    server.default = case.first
    with asking_for(case, server) as client:
        begun(client, case, 20, tmp_path)
        server.default = case.later
        stream = client.stream("Hi", checkpoint=tmp_path, **case.params)
        assert ("".join(stream), stream.continuity) == (ANSWER, "continued")


def test_a_server_that_has_nothing_more_to_say_is_asked_anew_at_last(server, tmp_path):
    case = CHAT_CASES[0]
    server.default = case.first
    with asking_for(case, server, total=2) as client:
        begun(client, case, 20, tmp_path)
        server.requests.clear()
        server.answer(*[Answer(body=b": nothing\n\n", replay="forget")] * 2)
        stream = client.stream("Hi", checkpoint=tmp_path)
        assert ("".join(stream), stream.continuity) == (ANSWER, "restarted")
    assert len(server.requests) == 3


@pytest.mark.parametrize("failure", [error_answer(503), error_answer(400), error_answer(401), Answer(drop=True)])
@pytest.mark.parametrize("ids", ["none", "numbers"])
def test_what_was_kept_outlasts_a_run_that_gets_no_answer(server, tmp_path, failure, ids):
    case = Case("", "", answer=Answer(ids=ids))
    server.default = case.first
    with asking_for(case, server, total=1) as client:
        begun(client, case, 20, tmp_path)
        server.default = failure
        pieces, error = read(client.stream("Hi", checkpoint=tmp_path))
        assert (pieces, ANSWER.startswith(error.partial.text)) == ([], True)
        assert len(error.partial.text) > 30
        server.default = case.first
        stream = client.stream("Hi", checkpoint=tmp_path)
        assert "".join(stream) == ANSWER
        assert stream.continuity == ("replayed" if ids == "numbers" else "restarted")


@pytest.mark.parametrize("ids", ["none", "numbers"])
@pytest.mark.parametrize("failure", [None, error_answer(503), Answer(drop=True)])
def test_an_answer_that_was_kept_to_its_finish_reason_is_not_asked_for_again(server, tmp_path, ids, failure):
    case = Case("", "", answer=Answer(ids=ids))
    server.default = case.first
    with asking_for(case, server, total=1) as client:
        begun(client, case, WORDS + 2, tmp_path)
        server.billed = 0
        server.default = failure or case.first
        stream = client.stream("Hi", checkpoint=tmp_path)
        assert "".join(stream) == ANSWER
        assert (stream.completion.complete, stream.finish_reason, server.billed) == (True, "stop", 0)
        assert (stream.usage is None) == (ids == "none" or failure is not None)
        server.requests.clear()
        assert "".join(client.stream("Hi", checkpoint=tmp_path)) == ANSWER
        assert server.requests == []


def test_a_stream_lost_before_its_first_piece_begins_its_checkpoint_again(server, tmp_path):
    server.answer(Answer(text=ANSWER, generation="first", cut_after=1))
    server.default = Answer(text=ANSWER)
    with asking_for(Case("", ""), server) as client:
        stream = client.stream("Hi", checkpoint=tmp_path)
        assert ("".join(stream), stream.continuity) == (ANSWER, "restarted")
    store = sheepsse.Checkpoints(tmp_path)
    assert store.load(next(iter(store))).text == ANSWER


# Corners


def test_a_restart_that_is_refused_raises_the_refusal(server):
    server.answer(Answer(cut_at=0))
    server.default = error_answer(400)
    with asking_for(Case("", ""), server) as client:
        _, error = read(client.stream("Hi"))
    assert type(error) is sheepsse.InvalidRequestError
    assert len(server.requests) == 2


def test_verify_holds_the_finish_reason_against_what_was_given(server):
    server.answer(Answer(events=local_provider.chat_events(["a"], usage={}), cut_after=3))
    server.default = Answer(events=local_provider.chat_events(["a"], finish="length"))
    with asking_for(Case("", ""), server) as client:
        stream = client.stream("Hi", resume="verify")
        assert outcome(stream).finish_reasons == ["stop"]
    assert (stream.completion.complete, stream.usage) == (True, None)


def test_a_call_of_a_tool_is_not_anchored(server):
    server.answer(Answer(cut_after=9))
    with asking_for(Case("", ""), server) as client:
        _, error = read(client.stream("Hi", resume="anchor", tools=[TOOL]))
    assert type(error) is sheepsse.StreamInterrupted
    assert len(server.requests) == 1


def test_an_answer_of_nothing_is_no_anchor(server):
    server.answer(Answer(text=ANSWER, cut_after=9))
    server.default = Answer(body=local_provider.data_event("[DONE]"))
    with asking_for(Case("", ""), server) as client:
        _, error = read(client.stream("Hi", resume="anchor"))
    assert "wrote nothing" in str(error)


def anthropic_answer(pieces, **fields):
    deltas = [{"type": "text_delta", "text": piece} for piece in pieces]
    events = [
        {"type": "message_start", "message": {"id": "msg", "usage": {"input_tokens": 1}}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        *({"type": "content_block_delta", "index": 0, "delta": delta} for delta in deltas),
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 3}},
        {"type": "message_stop"},
    ]
    return Answer(events=[local_provider.data_event(event, event["type"]) for event in events], **fields)


@pytest.mark.parametrize("again", [["\n", "\n", "two"], ["\n\ntwo"], ["two"], ["\n", "two"]])
def test_white_space_that_anthropic_may_not_be_given_back_is_given_out_once(server, again):
    server.answer(anthropic_answer(["One", "\n\n"], cut_after=4))
    server.default = anthropic_answer(again)
    case = CONTINUED_CASES[5]
    with asking_for(case, server) as client:
        assert "".join(client.stream("Hi", **case.params)) == "One\n\ntwo"
    assert server.requests[1].json["messages"][-1] == {"role": "assistant", "content": "One"}


@pytest.mark.parametrize("ids", ["numbers", "unique"])
def test_a_server_that_says_all_again_to_who_resumes_from_elsewhere_repeats_nothing(server, ids):
    case = replayed("", answer=Answer(ids=ids), again={"replay": "whole"})
    for cut_after in (2, 3, 20):
        server.answer(case.first._replace(cut_after=cut_after))
        server.default = case.later
        with asking_for(case, server) as client:
            given, error = read(client.stream("Hi", resume="never"))
            rest, error = read(client.stream("Hi", resume_from=error))
        assert error is None
        assert "".join(given + rest) == ANSWER


def test_a_response_that_was_cancelled_is_not_waited_for(server):
    server.answer(BACKGROUND.first._replace(cut_after=20), Answer(expired=True))
    with asking_for(BACKGROUND, server) as client:
        stream = client.stream("Hi", **BACKGROUND.params)
        given = [next(stream) for _ in range(3)]
        job = next(iter(server._memory._jobs))
        server._memory._jobs[job] = server._memory._jobs[job]._replace(cancelled=True)
        pieces, error = read(stream)
    assert "cancelled" in str(error)
    assert ANSWER.startswith("".join(given + pieces))


def ha(ids, **fields):
    """Pieces that say the same, with these ids"""
    said = [local_provider.chunk_event(content="ha") for _ in ids[:-1]] + [
        local_provider.chunk_event(finish_reason="stop")
    ]
    events = [(f"id: {id}\n".encode() if id else b"") + event for id, event in zip(ids, said)]
    return Answer(events=[*events, local_provider.data_event("[DONE]")], **fields)


@pytest.mark.parametrize("again", ["after", "inclusive", "whole"])
@pytest.mark.parametrize("cut", range(1, 6))
def test_pieces_that_say_the_same_are_told_apart_by_their_ids(server, cut, again):
    ids = ["a", "b", "c", "d", "e", "f"]
    server.answer(ha(ids, cut_after=cut))
    left = {"after": cut, "inclusive": cut - 1, "whole": 0}[again]
    rest = ha(ids)
    server.default = rest._replace(events=rest.events[left:])
    with asking_for(Case("", ""), server) as client:
        pieces, error = read(client.stream("Hi"))
    assert (error, "".join(pieces)) == (None, "hahahahaha")


@pytest.mark.parametrize("again", ["after", "inclusive", "whole"])
@pytest.mark.parametrize("cut", range(1, 6))
def test_where_only_some_events_have_ids_nothing_comes_twice(server, cut, again):
    ids = [1, None, 3, None, 5, None]
    cursor = max(at for at in range(cut) if ids[at])
    server.answer(ha(ids, cut_after=cut))
    rest = ha(ids)
    server.default = rest._replace(events=rest.events[{"after": cursor + 1, "inclusive": cursor, "whole": 0}[again] :])
    with asking_for(Case("", ""), server) as client:
        pieces, error = read(client.stream("Hi"))
    if ids[cut - 1] is None:  # nobody can say what is new
        assert (len(server.requests), "".join(pieces)) == (1, "ha" * cut)
    assert (error is None and "".join(pieces) == "ha" * 5) or (error is not None and "".join(pieces) == "ha" * cut)


@pytest.mark.parametrize("framing", ["chunked", "close"])
def test_an_event_whose_id_was_cut_off_is_known_again(server, framing):
    events = [event.replace(b"\n\n", b"\nid: %d\n\n" % id) for id, event in enumerate(numbered(range(1, 6)), 1)]
    events = [event.partition(b"\n")[2] for event in events]  # the data first, then the id
    size = len(b"".join(events[:2])) + len(events[2]) - len(b"id: 3\n\n")
    server.answer(Answer(body=b"".join(events)[:size], framing=framing, cut_after=3))
    server.default = Answer(events=[*events[2:], local_provider.data_event("[DONE]")])
    with asking_for(Case("", ""), server) as client:
        stream = client.stream("Hi")
        assert "".join(stream) == "w1 w2 w3 w4 w5 "
    assert server.requests[1].headers["Last-Event-ID"] == "2"


def test_a_second_stream_without_ids_is_another_answer_where_all_events_had_one(server):
    body = b"".join(local_provider.chat_events(local_provider.split_words(ANSWER)))
    server.answer(Answer(body=body, ids="numbers", cut_after=20))
    server.default = Answer(body=body, replay="forget")
    with asking_for(Case("", ""), server) as client:
        pieces, error = read(client.stream("Hi"))
    assert "another answer" in str(error)
    assert ANSWER.startswith("".join(pieces))


def numbered(ids, words=None):
    """A word an event, each with the id given; a word of "" is an event that says nothing"""
    words = words or [f"w{id} " for id in ids]
    said = [{"content": word} if word else {} for word in words]
    return [b"id: %d\n" % id + local_provider.chunk_event(**fields) for id, fields in zip(ids, said)]


@pytest.mark.parametrize("way", ["checkpoint", "resume_from"])
@pytest.mark.parametrize(("first", "again"), [(1, 1), (1, 4), (0, 0), (1, 8), (1, 7)])
def test_a_server_that_repeats_from_anywhere_makes_nothing_come_twice(server, tmp_path, way, first, again):
    done = [local_provider.chunk_event(finish_reason="stop"), local_provider.data_event("[DONE]")]
    silent = [b'id: 0\ndata: {"choices": [], "metadata": 1}\n\n'] if first == 0 else []
    whole = silent + numbered(range(1, 12))
    server.answer(Answer(events=whole[: 7 + len(silent)], cut_after=7 + len(silent)))
    server.default = Answer(events=(silent if again == 0 else []) + numbered(range(max(again, 1), 12)) + done)
    with asking_for(Case("", ""), server) as client:
        if way == "checkpoint":
            read(client.stream("Hi", checkpoint=tmp_path, resume="never"))
            pieces, error = read(client.stream("Hi", checkpoint=tmp_path))
        else:
            given, error = read(client.stream("Hi", resume="never"))
            rest, error = read(client.stream("Hi", resume_from=error))
            pieces = given + rest
    text = "".join(f"w{id} " for id in range(1, 12))
    if again == 4 and way == "checkpoint":  # which has kept the last two; asked anew the server says what it will
        assert "".join(pieces) == "".join(f"w{id} " for id in range(4, 12))
    else:
        assert (error, "".join(pieces)) == (None, text)


@pytest.mark.parametrize("name", ["{}", "stream:{}", "0195-{}"])
@pytest.mark.parametrize("again", [2, 5, 20])
def test_an_event_far_before_the_last_one_is_another_answer(server, again, name):
    def events(numbers):
        said = [local_provider.chunk_event(content=f"w{number} ") for number in numbers]
        return [f"id: {name.format(number)}\n".encode() + event for number, event in zip(numbers, said)]

    server.answer(Answer(events=events(range(1, 31)), cut_after=30))
    server.default = Answer(events=[*events(range(again, 41)), local_provider.data_event("[DONE]")])
    with asking_for(Case("", ""), server) as client:
        pieces, error = read(client.stream("Hi"))
    assert "another answer" in str(error)
    assert "".join(pieces) == "".join(f"w{number} " for number in range(1, 31))


def test_a_kill_after_a_piece_without_an_id_of_its_own_repeats_nothing(server, tmp_path):
    hello = local_provider.chunk_event(content="Hello")
    rest = [local_provider.chunk_event(content=" world"), local_provider.chunk_event(finish_reason="stop")]
    server.answer(Answer(events=[b"id: 1\ndata: {}\n\n", hello], cut_after=2))
    server.default = Answer(events=[hello, *rest, local_provider.data_event("[DONE]")])
    with asking_for(Case("", ""), server) as client:
        read(client.stream("Hi", checkpoint=tmp_path, resume="never"))
        assert "".join(client.stream("Hi", checkpoint=tmp_path)) == "Hello world"


def test_resuming_from_elsewhere_again_and_again_gives_each_piece_once(server):
    answer = Answer(text=ANSWER, ids="numbers", replay="whole")
    for cuts in ((20, 4, 30), (20, 1, 2), (20, 19, 21)):
        server.answer(answer._replace(cut_after=cuts[0]))
        server.default = answer
        with asking_for(Case("", ""), server, total=0) as client:
            pieces, error = read(client.stream("Hi"))
            for cut in cuts[1:]:
                server.answer(answer._replace(cut_after=cut))
                more, error = read(client.stream("Hi", resume_from=error))
                pieces += more
            server.default = answer._replace(replay="after")
            more, error = read(client.stream("Hi", resume_from=error))
        assert (error, "".join(pieces + more)) == (None, ANSWER)


def test_an_error_event_that_may_be_retried_is_a_lost_stream(server):
    overloaded = local_provider.data_event({"error": {"type": "overloaded_error", "message": "Overloaded"}})
    server.answer(Answer(events=[*numbered(range(1, 5)), overloaded]))
    server.default = Answer(events=[*numbered(range(5, 8)), local_provider.data_event("[DONE]")])
    with asking_for(Case("", ""), server) as client:
        stream = client.stream("Hi")
        assert "".join(stream) == "".join(f"w{id} " for id in range(1, 8))
        assert stream.continuity == "replayed"


def test_pings_are_no_part_of_what_is_repeated(server):
    ping = local_provider.data_event({"type": "ping"}, "ping")
    whole = anthropic_answer(["a", "b", "c"]).events
    ids = [b"id: %d\n" % at + event for at, event in enumerate(whole, 1)]
    for cut in range(2, 6):
        server.answer(Answer(events=[*ids[:cut], ping], cut_after=cut + 1))
        server.default = Answer(events=[ping, *ids[cut - 1 : cut], ping, *ids[cut:]])
        with asking_for(Case("", "", dialect="anthropic"), server) as client:
            assert "".join(client.stream("Hi")) == "abc"


@pytest.mark.parametrize("job", ["queued", "running"])
def test_a_whole_answer_that_is_not_ready_is_asked_for_again(server, job):
    waiting = local_provider.dumps(local_provider.response_object(id="resp_job", status="queued", background=True))
    ready = local_provider.response_object(local_provider.message_item(ANSWER), id="resp_job", background=True)
    server.answer(*[Answer(body=waiting)] * 3)
    server.default = Answer(body=local_provider.dumps(ready))
    with asking_for(BACKGROUND, server, total=0) as client:
        assert client.complete("Hi", background=True).text == ANSWER
        server.answer(BACKGROUND.first._replace(cut_after=20), Answer(expired=True), *[Answer(job=job)] * 3)
    server.default = BACKGROUND.first
    with asking_for(BACKGROUND, server, total=1) as client:
        assert "".join(client.stream("Hi", background=True)) == ANSWER


@pytest.mark.parametrize("total", [0, 1, 5])
def test_a_job_that_still_runs_after_a_kill_is_waited_for_and_not_begun_again(server, tmp_path, total):
    server.default = BACKGROUND.first
    with asking_for(BACKGROUND, server, total=total) as client:
        server.answer(BACKGROUND.first._replace(cut_after=20))
        read(client.stream("Hi", checkpoint=tmp_path, resume="never", background=True))
        server.answer(Answer(expired=True), *[Answer(job="queued")] * 3)
        stream = client.stream("Hi", checkpoint=tmp_path, background=True)
        assert ("".join(stream), stream.continuity, server.billed) == (ANSWER, "replayed", 1)


def test_a_job_is_waited_for_no_longer_than_the_limit_between_two_chunks(server, clock):
    server.answer(BACKGROUND.first._replace(cut_after=20), Answer(expired=True))
    server.default = taking(clock, 1, Answer(job="queued"))
    with asking_for(BACKGROUND, server, **{**PATIENT, "idle_timeout": 10}) as client:
        _, error = read(client.stream("Hi", background=True))
    assert type(error) is sheepsse.StreamTimeout
    assert 10 <= clock.now <= 12  # it is cancelled then


def test_a_job_is_not_waited_for_where_the_deadline_would_pass(server, clock):
    server.answer(BACKGROUND.first._replace(cut_after=20), Answer(expired=True))
    server.default = Answer(job="queued")
    waits = []
    retry = sheepsse.Retry(base_delay=20, jitter=False, sleep=waits.append)
    with asking_for(BACKGROUND, server, **{**PATIENT, "idle_timeout": None}) as client:
        pieces, error = read(client.stream("Hi", background=True, deadline=10, retry=retry))
    assert type(error) is sheepsse.StreamInterrupted
    assert "".join(pieces) == error.partial.text != ANSWER
    assert waits == [0]  # before the first time that it is asked for


def test_a_job_whose_answer_is_always_cut_is_left_within_the_budget(server):
    server.answer(BACKGROUND.first._replace(cut_after=20))
    server.default = Answer(expired=True, text=ANSWER)

    def cut(error, attempt, delay):
        server.answer(Answer(expired=True), Answer(text=ANSWER, cut_at=50))

    with asking_for(BACKGROUND, server, total=2, hooks={"on_retry": cut}) as client:
        _, error = read(client.stream("Hi", background=True))
    assert type(error) is sheepsse.StreamInterrupted
    assert len(server.requests) < 8


@pytest.mark.parametrize("total", [0, 2])
@pytest.mark.parametrize("resume", ["auto", ("continue", "verify", "anchor")])
def test_a_run_that_goes_on_from_a_checkpoint_keeps_to_its_budget(server, tmp_path, resume, total):
    case = CONTINUED_CASES[0]._replace(answer=Answer(ids="numbers"))
    server.default = case.first
    with asking_for(case, server, total=total) as client:
        begun(client, case, 20, tmp_path)
        server.default = case.first._replace(cut_at=3, replay="forget")
        server.requests.clear()
        _, error = read(client.stream("Hi", checkpoint=tmp_path, resume=resume, **case.params))
    assert isinstance(error, sheepsse.StreamInterrupted)
    assert len(server.requests) <= 1 + total


def test_verify_takes_a_last_piece_that_has_text_and_the_finish_reason(server):
    def pieces(*texts):
        ends = [None] * (len(texts) - 1) + ["STOP"]
        candidates = [
            {"index": 0, "content": {"parts": [{"text": text}]}, **({"finishReason": end} if end else {})}
            for text, end in zip(texts, ends)
        ]
        return [local_provider.data_event({"candidates": [candidate]}) for candidate in candidates]

    case = Case("", "", "verify", "gemini")
    server.answer(Answer(events=pieces("Hello wor", "ld, how", " are you?"), cut_after=2))
    server.default = Answer(events=pieces("Hello ", "world, how are you?"))
    with asking_for(case, server) as client:
        stream = client.stream("Hi", resume="verify")
        assert ("".join(stream), stream.continuity) == ("Hello world, how are you?", "verified")


def test_a_checkpoint_knows_two_servers_by_their_queries_but_no_key_in_them(server, tmp_path):
    for query in ("deployment=A", "deployment=B", "deployment=A&api_key=1", "deployment=A&api_key=2"):
        with asking(server, base_url=f"{server.base_url}?{query}") as client:
            "".join(client.stream("Hi", checkpoint=tmp_path))
    assert len(server.requests) == 2


def test_an_answer_with_its_finish_reason_is_not_gone_on_with_from_elsewhere(server):
    server.answer(anthropic_answer(["It", " is", " done."], cut_after=6))
    case = CONTINUED_CASES[5]
    with asking_for(case, server) as client:
        given, error = read(client.stream("Hi", resume="never", **case.params))
        assert error.partial.finish_reason == "end_turn"
        stream = client.stream("Hi", resume_from=error, **case.params)
        assert list(stream) == []
    assert (stream.text, stream.completion.complete, len(server.requests)) == ("It is done.", True, 1)


@pytest.mark.parametrize("given", ["I", "\n\n", "So, er"])
def test_a_few_characters_are_no_anchor(server, given):
    server.answer(Answer(events=local_provider.chat_events([given, "more"]), cut_after=2))
    server.default = Answer(text=given + " am sorry, what do you mean?")
    with asking_for(Case("", ""), server) as client:
        pieces, error = read(client.stream("Hi", resume="anchor"))
    assert (pieces, type(error)) == ([given], sheepsse.StreamInterrupted)


def test_a_server_that_lacks_resources_is_a_lost_stream(server):
    case = CONTINUED_CASES[0]
    words = local_provider.split_words(ANSWER)
    server.answer(Answer(events=local_provider.chat_events(words[:9], finish="insufficient_system_resource")))
    server.default = Answer(text=ANSWER)
    with asking_for(case, server) as client:
        stream = client.stream("Hi", **case.params)
        got = outcome(stream)
    assert (got.text, got.finish_reasons[-1], stream.continuity) == (ANSWER, "stop", "continued")
    assert stream.completion.finish_reason == "stop"


def test_a_refused_way_takes_one_try_of_the_budget(server):
    case = CONTINUED_CASES[0]._replace(answer=Answer(ids="numbers"))
    told = []
    server.answer(case.first._replace(cut_after=9), error_answer(400))
    server.default = error_answer(503)
    hooks = {"on_retry": lambda error, attempt, delay: told.append(attempt)}
    with asking_for(case, server, total=3, hooks=hooks) as client:
        read(client.stream("Hi", **case.params))
    assert (len(server.requests), told) == (4, [1, 2, 3])


def test_every_error_in_the_middle_of_an_answer_can_be_resumed_from(server, hurry):
    answer = Answer(text=ANSWER, ids="numbers")
    overloaded = local_provider.data_event({"error": {"type": "overloaded_error", "message": "Overloaded"}})
    for first in (answer._replace(stall_after=9), Answer(events=[*numbered(range(1, 5)), overloaded])):
        server.answer(first)
        server.default = answer._replace(replay="after")
        with asking_for(Case("", ""), server, total=0, timeout=HANG) as client:
            stream = client.stream("Hi")
            given = [next(stream) for _ in range(4)]
            hurry.begin()
            more, error = read(stream)
            given += more
            hurry.end()
            server.release()
            assert isinstance(error, (sheepsse.StreamTimeout, sheepsse.StreamError))
            assert error.resume_point.text == "".join(given) != ""
            read(client.stream("Hi", resume_from=error))


def test_the_immediate_reconnect_fits_into_any_deadline(server, clock):
    server.answer(Answer(text=ANSWER, ids="numbers", cut_after=9))
    server.default = Answer(text=ANSWER)
    with asking(server, retry=5) as client:
        assert "".join(client.stream("Hi", deadline=0.4)) == ANSWER


def test_a_policy_that_names_a_wait_is_obeyed_also_after_progress(server):
    slept = []
    server.answer(Answer(text=ANSWER, ids="numbers", cut_after=9))
    server.default = Answer(text=ANSWER)
    retry = sheepsse.Retry(3, should_retry=lambda error, attempt: 0.25, sleep=slept.append)
    with asking(server, retry=retry) as client:
        assert "".join(client.stream("Hi")) == ANSWER
    assert slept == [0.25]


@pytest.mark.parametrize("silent", [Answer(delay=1_000_000), Answer(stall_after=0)])
def test_a_deadline_that_passes_while_reconnecting_is_a_time_out(server, silent, running_clock):
    def let_time_pass(*_):
        running_clock.now += HANG - 0.1

    server.answer(Answer(text=ANSWER, ids="numbers", cut_after=9))
    server.default = silent
    with asking(server, retry=sheepsse.Retry(5, on_retry=let_time_pass), **PATIENT) as client:
        _, error = read(client.stream("Hi", deadline=HANG))
    assert type(error) is sheepsse.StreamTimeout
    assert error.partial.text == error.resume_point.text != ""


def test_a_response_without_an_id_is_read_as_a_whole_one(server):
    response = {**local_provider.response_object(local_provider.message_item(ANSWER)), "id": None}
    server.default = Answer(body=local_provider.dumps(response))
    with asking_for(BACKGROUND, server) as client:
        answer = client.complete("Hi")
    assert (answer.text, answer.id, answer.complete) == (ANSWER, "", True)


@pytest.mark.parametrize("ids", ["none", "numbers"])
def test_of_several_choices_none_is_given_again_from_elsewhere(server, ids):
    second = [
        local_provider.chunk_event(index=1, content="B1 "),
        local_provider.chunk_event(index=0, content="A1 "),
        *(local_provider.chunk_event(index=index, finish_reason="stop") for index in (0, 1)),
    ]
    body = b"".join([*second, local_provider.data_event("[DONE]")])
    server.answer(Answer(body=body, ids=ids, cut_after=1))
    server.default = Answer(body=body, ids=ids)
    with asking_for(Case("", ""), server, total=0) as client:
        given, error = read(client.stream("Hi", n=2).chunks())
        assert [chunk.text for chunk in given] == ["B1 "]
        again, error = read(client.stream("Hi", n=2, resume_from=error).chunks())
    assert (again, type(error)) == ([], sheepsse.StreamInterrupted)
    assert len(server.requests) == 1


@pytest.mark.parametrize("given", ["Hello", "So it is"])
def test_a_short_answer_that_comes_again_whole_is_not_given_twice(server, given):
    server.answer(Answer(events=local_provider.chat_events([given, " there"]), cut_after=2))
    server.default = Answer(events=local_provider.chat_events([given + " world"]))
    with asking_for(CONTINUED_CASES[0], server) as client:
        pieces, error = read(client.stream("Hi", **CONTINUED_CASES[0].params))
    assert (pieces, "repeats" in str(error)) == ([given], True)


def test_a_replay_that_costs_nothing_is_tried_though_the_budget_is_spent(server):
    answer = Answer(text=ANSWER, ids="numbers")
    server.answer(*[Answer(cut_at=0)] * 3, answer._replace(cut_after=5))
    server.default = answer
    with asking_for(Case("", ""), server, total=3) as client:
        stream = client.stream("Hi")
        assert ("".join(stream), stream.continuity) == (ANSWER, "restarted")
    assert (server.billed, len(server.requests)) == (4, 5)


def test_what_is_billed_again_is_limited_in_all_though_replays_come_between(server):
    case = CONTINUED_CASES[0]
    server.answer(Answer(cut_at=0))
    server.default = case.first._replace(cut_after=6)
    with asking_for(case, server, total=3) as client:
        _, error = read(client.stream("Hi", **case.params))
    assert type(error) is sheepsse.StreamInterrupted
    assert (server.billed, len(server.requests)) == (4, 4)


@pytest.mark.parametrize("resume", ["continue", "verify", "anchor"])
def test_an_answer_that_ends_with_an_error_to_be_retried_is_gone_on_with(server, resume):
    words = local_provider.split_words(ANSWER)
    choice = {"index": 0, "delta": {"content": ""}, "finish_reason": "error"}
    failed = local_provider.data_event({"choices": [choice], "error": {"code": 502, "message": "Bad gateway"}})
    server.answer(Answer(events=[*local_provider.chat_events(words[:20], finish=None, done=False), failed]))
    server.default = Answer(text=ANSWER)
    case = CONTINUED_CASES[0]
    with asking_for(case, server) as client:
        stream = client.stream("Hi", resume=resume, **case.params)
        assert "".join(stream) == ANSWER
    assert (stream.finish_reason, len(server.requests)) == ("stop", 2)


def test_a_job_that_failed_is_not_asked_for_again(server):
    failed = local_provider.response_object(
        local_provider.message_item(ANSWER),
        status="failed",
        background=True,
        error={"code": "server_error", "message": "The server had an error"},
    )
    server.answer(Answer(events=local_provider.response_events(failed)))
    with asking_for(BACKGROUND, server) as client:
        pieces, error = read(client.stream("Hi", background=True))
    assert (type(error), error.vendor_code) == (sheepsse.StreamError, "server_error")
    assert ("".join(pieces), len(server.requests)) == (ANSWER, 1)


def test_text_that_came_with_an_error_is_not_given_again(server):
    choice = {"index": 0, "delta": {"content": "w4 "}, "finish_reason": None}
    overloaded = {"error": {"type": "overloaded_error", "message": "Overloaded"}, "choices": [choice]}
    rest = [*numbered([4, 5]), local_provider.data_event("[DONE]")]
    server.answer(Answer(events=[*numbered(range(1, 4)), b"id: 4\n" + local_provider.data_event(overloaded)]))
    server.default = Answer(events=rest[1:])
    with asking_for(Case("", ""), server) as client:
        pieces, _ = read(client.stream("Hi"))
    assert "".join(pieces) == "w1 w2 w3 w4 w5 "
    assert server.requests[1].headers["Last-Event-ID"] == "4"


def test_the_budget_for_what_is_billed_again_outlasts_a_replay(server):
    case = CONTINUED_CASES[0]._replace(answer=Answer(ids="numbers"))
    first = case.first
    server.answer(*[Answer(cut_at=0)] * 2, first._replace(cut_after=9), first._replace(cut_after=3), error_answer(400))
    server.default = first
    with asking_for(case, server, total=2) as client:
        _, error = read(client.stream("Hi", **case.params))
    assert type(error) is sheepsse.StreamInterrupted
    assert (server.billed, len(server.requests)) == (3, 5)


def test_nothing_is_given_out_while_what_was_given_is_repeated(server):
    server.answer(anthropic_answer(["a", "b", "c"], cut_after=4))
    server.default = anthropic_answer(["a", "b", "c"])
    with asking_for(Case("", "", dialect="anthropic"), server) as client:
        came = list(client.stream("Hi", resume="verify").chunks())
    assert [(chunk.text, chunk.usage is not None) for chunk in came] == [
        ("", True),
        ("a", False),
        ("b", False),
        ("c", False),
        ("", True),
    ]


def test_a_response_whose_status_says_nothing_is_no_whole_answer(server):
    response = local_provider.response_object(local_provider.message_item(ANSWER), status="odd")
    server.default = Answer(body=local_provider.dumps(response))
    with asking_for(Case("", "", dialect="openai-responses"), server, total=0) as client:
        came, error = read(client.stream("Hi").chunks())
    assert type(error) is sheepsse.StreamInterrupted
    assert error.partial.text == "".join(chunk.text for chunk in came) == ANSWER
