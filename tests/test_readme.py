"""The README's examples do what it says"""

import json
import re
import runpy
import subprocess
import sys

import pytest

import local_provider
import sheepsse
from conftest import ROOT
from transcripts import sse

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def block_with(words):
    (block,) = [block for block in BLOCKS if words in block]
    return block


def test_every_example_is_python():
    assert len(BLOCKS) > 5
    for number, block in enumerate(BLOCKS):
        compile(block, f"README.md, example {number}", "exec")


def test_a_dialect_of_ones_own_takes_a_screenful_and_works(server, monkeypatch):
    monkeypatch.setattr(sheepsse, "DIALECTS", dict(sheepsse.DIALECTS))
    code = block_with("class Words").replace("https://words.example", server.origin)
    assert code.count("\n") < 25
    names = {"sheepsse": sheepsse}
    exec(code, names)
    server.answer(
        local_provider.Answer(body=sse({"word": "Good"}, {"word": " day"}, {"end": "enough"})),
        local_provider.Answer(body=sse({"word": "Good"}, {"error": "out of words"})),
    )
    with names["client"] as client:
        stream = client.stream("Good day?", model="deep", pitch=3)
        assert list(stream) == ["Good", " day"]
        assert (stream.finish_reason, stream.completion.complete) == ("enough", True)
        with pytest.raises(sheepsse.StreamError, match="out of words") as caught:
            list(client.stream("Good day?", model="deep"))
        assert caught.value.partial.text == "Good"
    assert server.requests[0].path == "/say"
    assert server.requests[0].json == {"say": "Good day?", "voice": "deep", "pitch": 3}
    assert server.requests[0].headers["Authorization"] == "Bearer k-12345"


def test_the_example_of_a_dialect_uses_public_names_alone_and_works(monkeypatch):
    script = ROOT / "examples" / "own_dialect.py"
    assert not re.search(r"sheepsse\._|self\._|cls\._", script.read_text(encoding="utf-8"))
    done = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, cwd=str(ROOT), timeout=60)
    assert done.stdout.decode() == "You said: Good day, how are you? \nCOMPLETE, 7 tokens\n"
    monkeypatch.setattr(sheepsse, "DIALECTS", dict(sheepsse.DIALECTS))
    names = runpy.run_path(str(script))
    events = [
        ("message-start", {"id": "answer-1"}),
        ("message-start", {"delta": {"message": {"tool_plan": "I will look it up"}}}),
        ("tool-call-start", call("call-1", "weather", "")),
        ("tool-call-delta", {"delta": {"message": {"tool_calls": {"function": {"arguments": '{"city": '}}}}}),
        ("tool-call-delta", {"delta": {"message": {"tool_calls": {"function": {"arguments": '"Hanoi"}'}}}}}),
        ("message-end", {"delta": {"finish_reason": "TOOL_CALL"}}),
    ]
    read = [sheepsse.ServerSentEvent(kind, json.dumps({"type": kind, "index": 0, **fields})) for kind, fields in events]
    chunks = list(sheepsse.iter_chunks(read, names["Cohere"]))
    answer = sheepsse.collect(chunks)
    assert (answer.id, answer.reasoning, chunks[-1].finish) == ("answer-1", "I will look it up", "tool_calls")
    assert [(made.id, made.name, made.parsed) for made in answer.tool_calls] == [
        ("call-1", "weather", {"city": "Hanoi"})
    ]
    read[-1] = sheepsse.ServerSentEvent(
        "message-end", json.dumps({"type": "message-end", "delta": {"finish_reason": "ERROR"}})
    )
    with pytest.raises(sheepsse.StreamError, match="error") as caught:
        list(sheepsse.iter_chunks(read, names["Cohere"]))
    assert caught.value.partial.tool_calls


def call(id, name, arguments):
    return {"delta": {"message": {"tool_calls": {"id": id, "function": {"name": name, "arguments": arguments}}}}}


@pytest.mark.parametrize("dialect", sheepsse.DIALECTS)
def test_the_example_with_tools_goes_on_in_every_dialect(server, dialect, monkeypatch, capsys):
    base_url = server.origin + local_provider.DIALECT_BASES[dialect]
    client = sheepsse.Client(base_url=base_url, dialect=dialect, api_key=False)
    monkeypatch.setattr(sheepsse, "stream", client.stream)
    cities = []

    def weather(city):
        cities.append(city)
        return "Rain"

    with client:
        exec(block_with("weather(**"), {"sheepsse": sheepsse, "weather": weather})
    assert cities == ["Hà Nội"]
    assert capsys.readouterr().out == local_provider.TEXT
