"""The README's examples do what it says, and so do the guide's"""

import builtins
import contextlib
import io
import json
import re
import runpy
import shlex
import subprocess
import sys

import pytest

import local_provider
import sheepsse
from conftest import ROOT
from transcripts import sse

README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")


def blocks(text, language="python"):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def block_with(words):
    return next(block for block in blocks(README) + blocks(GUIDE) if words in block)


def test_every_example_of_the_guide_is_python():
    assert len(blocks(GUIDE)) > 5
    for number, block in enumerate(blocks(GUIDE)):
        compile(block, f"docs/guide.md, example {number}", "exec")


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert README.count("\n") <= 250
    pages = [(ROOT, README), (ROOT / "docs", GUIDE)]
    for name in ("internals", "benchmarks"):
        pages.append((ROOT / "docs", (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")))
    for folder, text in pages:
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            # the module may be installed, or copied elsewhere
            assert (folder / link).exists() or link == "sheepsse.py", link


@pytest.fixture
def newcomer(server, monkeypatch, tmp_path):
    """Somebody with a key for each provider, in an empty folder; this machine's provider answers for all"""
    for name, row in sheepsse.PROVIDERS.items():
        base_url = server.origin + local_provider.DIALECT_BASES[row.dialect]
        monkeypatch.setitem(sheepsse.PROVIDERS, name, row._replace(base_url=base_url, base_variable=""))
        monkeypatch.setenv(row.key_variable or "NO_KEY", "k-12345")
    monkeypatch.chdir(tmp_path)
    lines = iter(["Good day?", "Why?", ""])
    monkeypatch.setattr(builtins, "input", lambda prompt="": next(lines))
    sheepsse._default_client.cache_clear()
    yield server
    sheepsse._default_client().close()
    sheepsse._default_client.cache_clear()


@pytest.mark.filterwarnings("ignore")  # an old Flask
def test_every_example_of_the_readme_runs_one_after_another(newcomer, capsys, monkeypatch):
    pytest.importorskip("flask")
    names = {"__name__": "__main__", "weather": lambda city: f"Rain in {city}"}
    examples = blocks(README)
    assert len(examples) >= 8
    for number, block in enumerate(examples):
        code = block.replace("http://localhost:8000/v1", newcomer.base_url)
        exec(compile(code, f"README.md, example {number}", "exec"), names)
        if "import flask" not in block:
            assert capsys.readouterr().out, block
    names["client"].close()
    assert "/chat/stream" in {rule.rule for rule in names["app"].url_map.iter_rules()}


def test_every_command_of_the_readme_runs(newcomer, capsys, monkeypatch, tmp_path):
    (tmp_path / "in.jsonl").write_text('"Hello"\n"Good day"\n')
    (shell,) = [block for block in blocks(README, "sh") if "sheepsse batch" in block]
    commands = [line for line in shell.splitlines() if " serve " not in line]  # which runs until Ctrl-C
    assert len(commands) >= 8
    for line in commands:
        given, _, command = line.rpartition("| ")
        monkeypatch.setattr(sys, "stdin", io.StringIO("A report." if given else ""))
        words = shlex.split(command or line)
        assert words[:3] == ["python", "-m", "sheepsse"]
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            assert sheepsse.main(words[3:]) == 0, line
        assert shown.getvalue() or "batch" in line
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


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
