"""A conversation with tools through the local provider, in each dialect: ask, get calls, send results, get text

The provider refuses, as the services do, a second request that lost a signature or what was thought, leaves a call
without its result, or has the names of another dialect.
"""

import json

import pytest

import sheepsse
from conftest import asking
from local_provider import DIALECT_BASES, TEXT, THINKING

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What the weather is at a place",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
NOW = {"type": "function", "function": {"name": "now", "description": "What time it is"}}
#: what makes a model think, and show it
THINK = {
    "openai-responses": {"reasoning": {"effort": "low", "summary": "auto"}, "include": ["reasoning.encrypted_content"]},
    "anthropic": {"thinking": {"type": "enabled", "budget_tokens": 1024}},
    "gemini": {"generationConfig": {"thinkingConfig": {"includeThoughts": True}}},
    "ollama": {"think": True},
}
CASES = [(dialect, {}) for dialect in DIALECT_BASES] + list(THINK.items())


def case_id(value):
    return value if isinstance(value, str) else "thinking" if value else "plain"


def streamed(client, messages, **options):
    stream = client.stream(messages, **options)
    assert "".join(stream) == stream.text == stream.completion.text
    assert stream.tool_calls == stream.completion.tool_calls
    return stream.completion


def completed(client, messages, **options):
    return client.complete(messages, **options)


def speaking(server, dialect):
    return asking(server, base_url=server.origin + DIALECT_BASES[dialect], dialect=dialect)


def results(answer, content="It rains 🌧️"):
    return [{"role": "tool", "tool_call_id": call.id, "content": content} for call in answer.tool_calls]


@pytest.mark.parametrize("way", [streamed, completed])
@pytest.mark.parametrize(("dialect", "thinking"), CASES, ids=case_id)
def test_a_tool_is_called_and_its_result_answered(server, dialect, thinking, way):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Does it rain?"}]
    with speaking(server, dialect) as client:
        asked = way(client, messages, tools=[WEATHER], **thinking)
        assert [(call.name, call.parsed) for call in asked.tool_calls] == [("weather", {"city": "Hà Nội", "days": 3})]
        assert (asked.text, asked.complete) == ("", True)
        assert asked.reasoning == (THINKING if thinking else "")
        messages += [asked.message, *results(asked)]
        told = way(client, messages, tools=[WEATHER], **thinking)
    assert (told.text, told.tool_calls, told.complete) == (TEXT, (), True)
    assert told.reasoning == (THINKING if thinking else "")
    assert len(server.requests) == 2


@pytest.mark.parametrize(("dialect", "thinking"), CASES, ids=case_id)
def test_the_conversation_goes_on_for_more_questions(server, dialect, thinking):
    messages = []
    with speaking(server, dialect) as client:
        for question in ("Does it rain?", "And now?"):
            messages.append({"role": "user", "content": question})
            for _ in range(2):
                answer = streamed(client, messages, tools=[WEATHER, NOW], **thinking)
                messages += [answer.message, *results(answer, '{"rain": true}')]
            assert (answer.text, answer.tool_calls) == (TEXT, ())
    assert [message["role"] for message in messages] == 2 * ["user", "assistant", "tool", "assistant"]
    assert len(server.requests) == 4


@pytest.mark.parametrize("way", [streamed, completed])
@pytest.mark.parametrize("dialect", DIALECT_BASES)
def test_a_tool_without_arguments_is_called_with_none(server, dialect, way):
    messages = [{"role": "user", "content": "What time is it?"}]
    with speaking(server, dialect) as client:
        asked = way(client, messages, tools=[NOW])
        assert [(call.name, call.parsed) for call in asked.tool_calls] == [("now", {})]
        told = way(client, [*messages, asked.message, *results(asked)], tools=[NOW])
    assert told.text == TEXT


@pytest.mark.parametrize("dialect", DIALECT_BASES)
def test_no_tool_is_called_where_none_may_be(server, dialect):
    with speaking(server, dialect) as client:
        answer = streamed(client, "Does it rain?", tools=[WEATHER], tool_choice="none")
    assert (answer.text, answer.tool_calls) == (TEXT, ())


@pytest.mark.parametrize(("dialect", "thinking"), CASES, ids=case_id)
def test_the_calls_of_a_stream_come_in_parts_that_fold_to_the_whole(server, dialect, thinking):
    with speaking(server, dialect) as client:
        stream = client.stream("Does it rain?", tools=[WEATHER], **thinking)
        parts = [call for chunk in stream.chunks() for call in chunk.tool_calls]
    (whole,) = stream.tool_calls
    assert {part.index for part in parts} == {whole.index} == {0}
    assert "".join(part.arguments for part in parts) == whole.arguments
    assert [part.name for part in parts if part.name] == [whole.name]
    assert json.loads(whole.arguments) == whole.parsed


@pytest.mark.parametrize("source", THINK)
@pytest.mark.parametrize("target", DIALECT_BASES)
def test_a_conversation_with_tools_goes_on_with_another_vendor(server, source, target):
    messages = [{"role": "user", "content": "Does it rain?"}]
    with speaking(server, source) as client:
        asked = streamed(client, messages, tools=[WEATHER], **THINK[source])
    assert asked.reasoning == THINKING
    with speaking(server, target) as client:
        told = streamed(client, [*messages, asked.message, *results(asked)], tools=[WEATHER])
    assert told.text == TEXT


@pytest.mark.parametrize("dialect", ["anthropic", "gemini", "openai-responses"])
def test_the_provider_refuses_an_answer_that_lost_what_was_thought(server, dialect):
    messages = [{"role": "user", "content": "Does it rain?"}]
    with speaking(server, dialect) as client:
        asked = streamed(client, messages, tools=[WEATHER], **THINK[dialect])
        spoiled = json.loads(json.dumps(asked.message))
        for kept in spoiled["vendor"][dialect]:
            for name in ("signature", "thoughtSignature", "encrypted_content"):
                if name in kept:
                    kept[name] = "c3BvaWxlZA=="
        with pytest.raises(sheepsse.InvalidRequestError):
            streamed(client, [*messages, spoiled, *results(asked)], tools=[WEATHER], **THINK[dialect])
