"""Section 14: the command line, in processes of its own

Where the way it is started matters, a process is started as a shell does it; else one is forked from a process that
has imported sheepsse already, which takes a tenth of the time.
"""

import contextlib
import io
import json
import os
import pathlib
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future

import pytest

import sheepsse
from conftest import HANG, until
from local_provider import Answer, chat_events, error_answer

MODULE = pathlib.Path(sheepsse.__file__)
TEXT = "Grüße 🐑, chào bạn"


def environment(**extra):
    """The environment of a command: nothing of this machine's keys, sheepsse where the tests found it"""
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
    paths = [str(MODULE.parent), *filter(None, [kept.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "error", **extra}


SHELL = (sys.executable, "-m", "sheepsse")
#: Forks a process for each line of its input, a job, and says how that ended
FORKS = """
import json, os, sys
import sheepsse

try:  # for what is imported at the first request alone
    list(sheepsse.stream("Hi", model="m", base_url="http://127.0.0.1:1/v1", api_key=False, retry=0))
except sheepsse.SheepError:
    pass
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(job["cwd"])
        os.environ.clear()
        os.environ.update(job["environment"])
        for number, name in enumerate(job["files"]):
            os.dup2(os.open(name, os.O_WRONLY if number else os.O_RDONLY), number)
        sys.stdin = open(0, closefd=False)
        sys.argv[1:] = job["arguments"]
        sys.exit(sheepsse.main())
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Forks:
    """Runs commands in forked processes"""

    def __init__(self, folder):
        self._files = [folder / name for name in ("stdin", "stdout", "stderr")]
        self._process = subprocess.Popen(
            [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
        )

    def close(self):
        with self._process:
            self._process.stdin.close()

    def run(self, arguments, env, cwd=".", input=b""):
        for file, content in zip(self._files, (input, b"", b"")):
            file.write_bytes(content)
        job = {"arguments": arguments, "environment": environment(**env), "cwd": os.path.abspath(cwd)}
        job["files"] = list(map(str, self._files))
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        assert select.select([self._process.stdout], [], [], HANG)[0]
        status = int(self._process.stdout.readline())
        assert os.WIFEXITED(status)
        output = [file.read_bytes() for file in self._files[1:]]
        return subprocess.CompletedProcess(arguments, os.WEXITSTATUS(status), *output)


@pytest.fixture(scope="module", autouse=True)
def forks(tmp_path_factory):
    """Where there are forks, the process that makes them"""
    if not hasattr(os, "fork"):
        yield None
        return
    with contextlib.closing(Forks(tmp_path_factory.mktemp("forks"))) as made:
        command.forks = made
        yield made
        command.forks = None


def command(*arguments, start=None, env=None, **options):
    """Runs the command to its end; with `start` as a shell does it"""
    if start is None and command.forks is not None:
        return command.forks.run(arguments, env or {}, **options)
    return subprocess.run(
        [*(start or SHELL), *arguments],
        capture_output=True,
        env=environment(**(env or {})),
        timeout=HANG,
        check=False,
        **options,
    )


command.forks = None


def ask(server, *arguments, **options):
    return command("Good day?", "-m", "local-model", "--base-url", server.base_url, "--no-key", *arguments, **options)


@pytest.mark.parametrize(
    "start", [SHELL, (sys.executable, str(MODULE))], ids=["python -m sheepsse", "python sheepsse.py"]
)
def test_the_text_goes_to_stdout_and_nothing_else(server, start):
    server.answer(Answer(text=TEXT))
    done = ask(server, start=start)
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, TEXT, b"")


def test_the_installed_script_is_the_same_command():
    script = shutil.which("sheepsse", path=os.path.dirname(sys.executable))
    if script is None:
        pytest.skip("needs sheepsse installed, for its script")
    done = command("--version", start=(script,))
    assert (done.returncode, done.stdout.decode().strip()) == (0, f"sheepsse {sheepsse.__version__}")


def test_the_prompt_may_come_from_standard_input(server):
    assert command("-m", "m", "--base-url", server.base_url, "--no-key", input=b"From a file").returncode == 0
    assert command("-", "-m", "m", "--base-url", server.base_url, "--no-key", input=b"From a pipe").returncode == 0
    prompts = [request.json["messages"] for request in server.requests]
    assert prompts == [[{"role": "user", "content": "From a file"}], [{"role": "user", "content": "From a pipe"}]]


def test_a_system_message_goes_before_the_prompt(server):
    assert ask(server, "--system", "Be brief").returncode == 0
    assert [message["role"] for message in server.requests[0].json["messages"]] == ["system", "user"]


def test_standard_input_goes_before_the_prompt(server):
    where = ("-m", "m", "--base-url", server.base_url, "--no-key")
    assert command("Summarise:", *where, input=b"A report.\n").returncode == 0
    assert server.requests[0].json["messages"] == [{"role": "user", "content": "A report.\n\nSummarise:"}]


def test_words_without_quotes_are_one_prompt(server):
    assert command("Explain", "SSE", "-m", "m", "--base-url", server.base_url, "--no-key", "now").returncode == 0
    assert server.requests[0].json["messages"][0]["content"] == "Explain SSE now"


def test_options_of_the_request_are_json_or_text(server):
    options = ("-o", "temperature", "0.2", "-o", "user", "ann", "-o", "tools", "[]", "--max-tokens", "5", "-s", "Brief")
    assert ask(server, *options).returncode == 0
    body = server.requests[0].json
    assert (body["temperature"], body["user"], body["tools"], body["max_tokens"]) == (0.2, "ann", [], 5)
    assert body["messages"][0] == {"role": "system", "content": "Brief"}


@pytest.mark.parametrize("name", ["model", "checkpoint", "deadline", "client", "messages"])
def test_an_option_of_ours_is_none_of_the_request(server, name):
    done = ask(server, "-o", name, "5")
    assert (done.returncode, server.requests) == (2, [])
    assert f"-o takes options of the request, not {name}".encode() in done.stderr


def test_a_misspelt_option_of_the_request_is_an_error_and_not_sent(server):
    done = ask(server, "-o", "temprature", "5")
    assert (done.returncode, server.requests) == (2, [])
    assert b"did you mean temperature" in done.stderr
    assert b"Traceback" not in done.stderr


def test_the_model_may_come_from_the_environment(server):
    where = ("--base-url", server.base_url, "--no-key")
    assert command("Good day?", *where, env={"SHEEPSSE_MODEL": "m-env"}).returncode == 0
    assert command("Good day?", *where, "-m", "m-own", env={"SHEEPSSE_MODEL": "m-env"}).returncode == 0
    assert [request.json["model"] for request in server.requests] == ["m-env", "m-own"]
    done = command("Good day?", *where)
    assert done.returncode == 2
    assert b"there is no model: pass -m MODEL, or set SHEEPSSE_MODEL" in done.stderr


@pytest.mark.parametrize(("word", "near"), [("bathc", "batch"), ("model", "models"), ("chek", "check")])
def test_a_lone_word_that_is_nearly_a_command_is_not_sent(server, word, near):
    where = ("-m", "m", "--base-url", server.base_url, "--no-key")
    done = command(word, *where)
    assert (done.returncode, server.requests) == (2, [])
    assert f"did you mean the command '{near}'".encode() in done.stderr
    done = command(word)  # also without a model
    assert f"did you mean the command '{near}'".encode() in done.stderr
    assert command("hello", *where).returncode == command(word, "it", *where).returncode == 0


@pytest.mark.parametrize(("entered", "status"), [("y\n", 0), ("n\n", 2), ("", 2)])
def test_on_a_terminal_such_a_word_is_sent_after_a_yes(server, monkeypatch, entered, status):
    monkeypatch.setattr(sys, "stdin", Terminal(entered))
    with pytest.raises(SystemExit) as ended:
        sys.exit(sheepsse.main(["bathc", "-m", "m", "--base-url", server.base_url, "--no-key"]))
    assert ended.value.code == status
    assert len(server.requests) == (1 if status == 0 else 0)


def test_a_retry_is_told_on_stderr(server):
    server.answer(error_answer(429, headers={"retry-after-ms": "10"}))
    done = ask(server)
    assert done.returncode == 0
    assert done.stderr == b"sheepsse: 429, trying again in 0 s\n"


def test_an_error_speaks_of_the_options_of_the_shell(server):
    done = command("Good day?", "-m", "m", "--base-url", server.base_url)
    assert done.returncode == 1
    assert b"pass --key-variable NAME; --no-key is for servers that take none" in done.stderr


@pytest.mark.parametrize("options", [["--stats"], []], ids=["stats", "error"])
def test_a_message_on_a_terminal_begins_on_a_line_of_its_own(server, monkeypatch, options):
    both = Terminal()
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys.stdout, "write", both.write)
    monkeypatch.setattr(sys, "stderr", both)
    done = {} if options else {"finish": None, "done": False}
    server.answer(Answer(events=chat_events(["Good day"], **done)))
    sheepsse.main(["x", "-m", "m", "--base-url", server.base_url, "--no-key", *options])
    assert both.getvalue().startswith("Good day\n")
    assert len(both.getvalue().splitlines()) == 2


def test_models_are_the_names_alone(server):
    done = command("models", "--base-url", server.base_url, "--no-key")
    assert (done.returncode, done.stderr) == (0, b"")
    assert "local-model" in done.stdout.decode().splitlines()
    done = command("models", "--base-url", "http://127.0.0.1:1/v1", "--no-key")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"no connection" in done.stderr


def test_chat_keeps_the_conversation(server):
    server.answer(Answer(text="Fine."), error_answer(400, "Too odd"), Answer(text="Well."))
    where = ("-m", "m", "--base-url", server.base_url, "--no-key", "-s", "Brief")
    done = command("chat", *where, input=b"How?\nWhat?\nWhy?\n")
    assert done.returncode == 0
    assert b"Too odd" in done.stderr
    assert b"Fine." in done.stdout
    assert b"Well." in done.stdout
    assert [(message["role"], message["content"]) for message in server.requests[-1].json["messages"]] == [
        ("system", "Brief"),
        ("user", "How?"),
        ("assistant", "Fine."),
        ("user", "Why?"),
    ]


def test_ctrl_c_in_a_chat_stops_the_answer_and_keeps_the_conversation(server):
    server.answer(Answer(text="One two three", stall_after=2), Answer(text="Well."))
    start = [*SHELL, "chat", "-m", "m", "--base-url", server.base_url, "--no-key"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(start, env=environment(), **pipes) as process:
        process.stdin.write(b"Count\n")
        process.stdin.flush()
        shown = b""
        while b"One" not in shown:
            shown += os.read(process.stdout.fileno(), 100)
        process.send_signal(signal.SIGINT)
        rest, told = process.communicate(b"Why?\n", timeout=HANG)
    assert (process.returncode, b"stopped" in told, b"Well." in rest) == (0, True, True)
    messages = server.requests[-1].json["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"].startswith("One")


def test_cost_compares_mixes(server):
    tokens = ("--input", "10000000", "--output", "50000000")
    done = command("cost", *tokens, "--mix", "1:2.50:10", "--mix", "0.6:0.14:0.28", "0.4:2.50:10")
    assert done.returncode == 0
    rows = [line.split() for line in done.stdout.decode().splitlines()]
    assert rows == [
        ["cost", "saving", "a", "year", "mix"],
        ["525.00", "0.00", "0.00", "1:2.50:10"],
        ["219.24", "305.76", "3669.12", "0.6:0.14:0.28", "0.4:2.50:10"],
    ]
    for wrong in ("1:2.50", "0.5:1:1", "x:1:1"):
        assert command("cost", *tokens, "--mix", wrong).returncode == 2


def test_stats_go_to_stderr(server):
    done = ask(server, "--stats")
    assert b"characters in" in done.stderr
    assert b"first text after" in done.stderr
    assert b"tokens:" in done.stderr
    assert b"1 request" in done.stderr
    assert b"characters" not in done.stdout


def test_stats_of_an_answer_without_text_name_what_there_is(server):
    server.answer(error_answer(400))
    done = ask(server, "--stats")
    assert b"0 characters in 0 chunks" in done.stderr
    assert b"tokens" not in done.stderr


def test_json_gives_a_line_of_each_kind(server):
    tool = {"tool_calls": [{"index": 0, "id": "c", "function": {"name": "look", "arguments": '{"at": 1}'}}]}
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3, "cost": 0.25}
    server.answer(Answer(events=chat_events(["Good", tool, {"refusal": "No"}], reasoning=["Hm"], usage=usage)))
    lines = [json.loads(line) for line in ask(server, "--json").stdout.splitlines()]
    assert [line["type"] for line in lines] == ["reasoning", "content", "tool_call", "refusal", "finish", "done"]
    assert all(line["t"] >= 0 for line in lines)
    assert lines[1]["text"] == "Good"
    assert lines[2]["name"] == "look"
    assert lines[4]["finish"] == "tool_calls"
    assert lines[5]["usage"]["total_tokens"] == 3
    assert lines[5]["usage"]["cost"] == "0.25"


def test_json_ends_with_the_error(server):
    server.answer(error_answer(401, "Wrong key"))
    done = ask(server, "--json")
    (line,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert (line["type"], line["code"], line["status"]) == ("error", "AUTH_ERROR", 401)
    assert done.returncode == 1


def test_json_of_an_answer_without_usage_says_null(server):
    server.answer(Answer(events=chat_events(["Good"])))
    lines = [json.loads(line) for line in ask(server, "--json").stdout.splitlines()]
    assert lines[-1]["usage"] is None


def test_a_failure_is_status_1_and_a_message_that_says_what_to_do(server):
    server.answer(error_answer(401, "Wrong key"))
    done = ask(server)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"401" in done.stderr
    assert b"Wrong key (check the API key)" in done.stderr


def test_a_missing_key_is_status_1_and_names_the_variable_to_set():
    done = command("Good day?", "-m", "m", "--provider", "deepseek")
    assert done.returncode == 1
    assert b"DEEPSEEK_API_KEY" in done.stderr


def test_the_key_of_any_address_is_read_from_the_variable_named(server):
    arguments = ("Good day?", "-m", "m", "--base-url", server.base_url, "--key-variable", "MY_KEY")
    assert command(*arguments, env={"MY_KEY": "k-1234567"}).returncode == 0
    assert server.requests[0].headers["Authorization"] == "Bearer k-1234567"
    done = command(*arguments)
    assert done.returncode == 1
    assert b"no API key" in done.stderr
    assert len(server.requests) == 1


@pytest.mark.parametrize("arguments", [[], ["Good day?"], ["--no-such-option"], ["x", "-m", "m", "--provider", "y"]])
def test_wrong_usage_is_status_2(arguments):
    done = command(*arguments, input=b"")
    assert done.returncode == 2
    assert b"usage: sheepsse" in done.stderr


def test_an_interruption_is_status_3_with_the_partial_text_on_stdout(server):
    server.answer(Answer(events=chat_events(["Good", " day"], finish=None, done=False)))
    done = ask(server)
    assert (done.returncode, done.stdout) == (3, b"Good day")
    assert b"end marker" in done.stderr


def test_a_refusal_is_told_on_stderr(server):
    server.answer(Answer(events=chat_events([{"refusal": "I will not"}])))
    done = ask(server)
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"refused: I will not" in done.stderr


def test_the_time_out_holds_for_the_whole_call(server):
    server.answer(Answer(stall_after=3, keepalive=0.02))
    done = ask(server, "--timeout", "0.3")
    assert done.returncode == 3
    assert b"deadline" in done.stderr


def test_half_an_emoji_does_not_end_an_answer(server):
    server.answer(Answer(body=b'data: {"choices": [{"delta": {"content": "a\\ud83d!"}, "finish_reason": "stop"}]}\n\n'))
    done = ask(server)
    assert (done.returncode, done.stdout.decode()) == (0, "a\ufffd!")


def start(server, *arguments):
    return subprocess.Popen(
        [*SHELL, "x", "-m", "m", "--base-url", server.base_url, "--no-key", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )


def test_ctrl_c_is_status_130_and_keeps_what_came(server):
    server.answer(Answer(text="Good day", stall_after=2))
    process = start(server)
    assert process.stdout.read(4) == b"Good"
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=HANG)
    assert process.returncode == 130
    assert stderr.strip() == b"interrupted"
    assert server.wait_closed(HANG)


def test_a_reader_that_has_enough_ends_the_command_quietly(server):
    server.default = Answer(text="many words " * 50, pace=0.005)
    process = start(server)
    assert process.stdout.read(4) == b"many"
    process.stdout.close()
    assert process.wait(timeout=HANG) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


# In this process, for what a subprocess cannot show


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_the_text_ends_with_a_line_end(server, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys, "stdout", terminal)
    server.answer(Answer(text=TEXT))
    assert sheepsse.main(["x", "-m", "m", "--base-url", server.base_url, "--no-key"]) == 0
    assert terminal.getvalue() == TEXT + "\n"


# Standard streams that are closed, of another encoding, or a terminal


def with_closed(numbers, *arguments, server, **options):
    """The command as cron or a shell starts it with standard streams closed"""
    closed = " ".join(f"{number}>&-" for number in numbers)
    start = ("sh", "-c", f'exec "$@" {closed}', "sh", *SHELL)
    asked = ("-m", "m", "--base-url", server.base_url, "--no-key")
    return command(*arguments, *asked, start=start, **options)


needs_sh = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")


@needs_sh
@pytest.mark.parametrize("numbers", [(1,), (0, 1), (1, 2), (0, 1, 2)])
def test_without_standard_output_nothing_is_asked(server, numbers):
    done = with_closed(numbers, "Good day?", server=server)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == (b"" if 2 in numbers else b"sheepsse: standard output is closed\n")
    assert server.requests == []


@needs_sh
@pytest.mark.parametrize("numbers", [(0,), (2,), (0, 2)])
def test_the_answer_needs_standard_output_alone(server, numbers):
    server.answer(Answer(text=TEXT))
    done = with_closed(numbers, "Good day?", server=server)
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, TEXT, b"")


@needs_sh
@pytest.mark.parametrize("arguments", [("Good day?",), ("batch", "-", "-o", "OUT")], ids=["ask", "batch"])
def test_an_error_that_cannot_be_told_is_not_told_on_standard_output(server, tmp_path, arguments):
    server.default = error_answer(400, "No such thing")
    arguments = [str(tmp_path / "out") if argument == "OUT" else argument for argument in arguments]
    line = b'{"custom_id": "1", "body": {"messages": [{"role": "user", "content": "Hi"}]}}\n'
    done = with_closed((2,), *arguments, server=server, input=line)
    assert (done.returncode, done.stderr) == (1, b"")
    assert b"No such thing" not in done.stdout


@needs_sh
@pytest.mark.parametrize("prompt", [(), ("-",)])
def test_without_standard_input_a_missing_prompt_is_wrong_usage(server, prompt):
    done = with_closed((0,), *prompt, server=server)
    assert done.returncode == 2
    assert b"standard input is closed" in done.stderr
    assert b"Traceback" not in done.stderr


@needs_sh
def test_batch_without_standard_input_says_so(server, tmp_path):
    done = with_closed((0,), "batch", "-", "-o", str(tmp_path / "out"), server=server)
    assert (done.returncode, done.stderr) == (1, b"sheepsse: standard input is closed\n")


@pytest.mark.parametrize(("words", "status"), [([], 2), (["batch", "-", "-o", "OUT"], 1)], ids=["ask", "batch"])
def test_streams_that_are_none_end_a_command_with_a_message(monkeypatch, capsys, words, status):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SystemExit) as ended:
        sys.exit(sheepsse.main([*words, "-m", "m", "--no-key"]))
    assert ended.value.code == status
    assert "standard input is closed" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdout", None)
    assert sheepsse.main(["Good day?", "-m", "m"]) == 1
    assert capsys.readouterr().err == "sheepsse: standard output is closed\n"
    monkeypatch.setattr(sys, "stderr", None)
    assert sheepsse.main(["Good day?", "-m", "m"]) == 1
    sys.stderr.close()  # the one that was opened in its place


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_an_encoding_that_lacks_a_character_loses_that_one_alone(server, encoding):
    server.answer(Answer(text="dé 羊!"))
    done = ask(server, env={"PYTHONIOENCODING": encoding}, start=SHELL)
    assert (done.returncode, done.stdout, done.stderr) == (0, "dé 羊!".encode(encoding, "replace"), b"")


@pytest.mark.parametrize(("encoding", "given"), [("utf-8", b"d\xe9"), ("ascii", "dé".encode())])
def test_a_prompt_in_another_encoding_is_wrong_usage(server, encoding, given):
    asked = ("-m", "m", "--base-url", server.base_url, "--no-key")
    done = command(*asked, env={"PYTHONIOENCODING": encoding + ":strict"}, start=SHELL, input=given)
    assert done.returncode == 2
    assert f"standard input is not {encoding}".encode() in done.stderr
    assert b"Traceback" not in done.stderr
    assert server.requests == []


#: clears the screen, changes the title, writes into the clipboard, goes back and over the line; the last in one byte
CONTROLS = "Good\x1b[2J\x1b]0;title\x07\x1b]52;c;eA==\x1b\\ day\r\b\x9b31m\x7f\x00"
#: what a terminal shows of it: harmless letters
HARMLESS = "Good[2J]0;title]52;c;eA==\\ day31m"


def test_a_terminal_gets_text_without_control_sequences_and_a_pipe_as_it_is(server, monkeypatch):
    server.default = Answer(text=CONTROLS + "\n\tend")
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert sheepsse.main(["x", "-m", "m", "--base-url", server.base_url, "--no-key"]) == 0
    assert sys.stdout.getvalue() == HARMLESS + "\n\tend\n"
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert sheepsse.main(["x", "-m", "m", "--base-url", server.base_url, "--no-key"]) == 0
    assert sys.stdout.getvalue() == CONTROLS + "\n\tend"


@pytest.mark.parametrize("name", ["ask", "check", "bench", "batch", "refusal"])
def test_what_a_server_says_of_an_error_never_controls_a_terminal(server, tmp_path, monkeypatch, name):
    server.default = error_answer(400, CONTROLS)
    if name == "refusal":
        server.default = Answer(events=chat_events([{"refusal": CONTROLS}]))
    (tmp_path / "in").write_text('{"custom_id": "1", "body": {"messages": [{"role": "user", "content": "Hi"}]}}\n')
    batch = ["batch", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "-m", "m"]
    commands = {"check": ["check"], "bench": ["bench", "-m", "m"], "batch": batch}
    for stream in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, stream, Terminal())
    status = sheepsse.main([*commands.get(name, ["x", "-m", "m"]), "--base-url", server.base_url, "--no-key"])
    shown = sys.stdout.getvalue() + sys.stderr.getvalue()
    assert status == (0 if name == "refusal" else 1)
    assert not set(shown) & set(CONTROLS) - set(HARMLESS), repr(shown)


def test_help_names_the_variables_of_the_keys_and_the_exit_statuses():
    done = command("--help")
    assert done.returncode == 0
    assert b"HOLYSHEEP_API_KEY" in done.stdout
    assert b"130 Ctrl-C" in b" ".join(done.stdout.split())


@pytest.mark.parametrize("seconds", ["nan", "0", "-1", "inf", "soon"])
def test_a_time_out_that_is_none_is_wrong_usage(server, seconds):
    assert ask(server, "--timeout", seconds).returncode == 2
    assert server.requests == []


def test_an_empty_prompt_is_wrong_usage_and_not_sent(server):
    done = command("-m", "m", "--base-url", server.base_url, "--no-key", input=b" \n")
    assert done.returncode == 2
    assert b"the prompt is empty" in done.stderr
    assert server.requests == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_a_message_and_no_traceback(server):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*SHELL, "x", "-m", "m", "--base-url", server.base_url, "--no-key"],
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(),
            timeout=HANG,
            check=False,
        )
    assert done.returncode == 1
    assert b"cannot be written" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_key_in_the_place_of_a_provider_is_not_shown():
    with pytest.raises(sheepsse.InvalidRequestError, match="no provider of that name"):
        sheepsse.Client("sk-sheep-7f3a9c51d2e8b604")


@pytest.mark.parametrize("ways", ["never", "auto", "verify", "replay, verify"])
def test_resume_takes_the_ways_that_the_call_takes(server, ways):
    server.answer(Answer(text=TEXT))
    done = ask(server, "--resume", ways, "--stats")
    assert (done.returncode, done.stdout.decode()) == (0, TEXT)


@pytest.mark.parametrize("ways", ["always", "", "replay,magic"])
def test_an_unknown_way_to_resume_is_wrong_usage(server, ways):
    done = ask(server, "--resume", ways)
    assert (done.returncode, done.stdout, server.requests) == (2, b"", [])
    assert b"resume is" in done.stderr


def test_a_checkpoint_that_cannot_be_gone_on_with_now_shows_nothing_and_keeps_it(server, tmp_path):
    server.answer(Answer(text=TEXT, cut_after=3), error_answer(401), Answer(text=TEXT))
    runs = [ask(server, "--checkpoint", str(tmp_path), "--stats") for _ in range(4)]
    assert [done.returncode for done in runs] == [3, 1, 0, 0]
    assert [done.stdout.decode() for done in runs[1:]] == ["", TEXT, TEXT]
    assert b"restarted" in runs[2].stderr
    assert len(server.requests) == 3


# batch


def said(request):
    return request.json["messages"][-1]["content"]


def run_batch(server, folder, lines, *arguments):
    (folder / "in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    where = ("--base-url", server.base_url, "--no-key", "-m", "local-model")
    done = command("batch", str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl"), *where, *arguments)
    answers = (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()
    return done, list(map(json.loads, answers))


def test_batch_answers_each_line_and_says_how_it_went(server, tmp_path):
    server.default = lambda request: Answer(text=f"You said: {said(request)}")
    lines = ["one", {"prompt": "two"}, {"id": "c", "messages": [{"role": "user", "content": "three 🐑"}], "top_p": 0.5}]
    done, answers = run_batch(server, tmp_path, lines)
    assert (done.returncode, done.stdout) == (0, b"")
    assert {answer["id"]: answer["text"] for answer in answers} == {
        0: "You said: one",
        1: "You said: two",
        "c": "You said: three 🐑",
    }
    assert b"3: 3 succeeded" in done.stderr
    assert b"Traceback" not in done.stderr
    assert [request.json["top_p"] for request in server.requests if said(request) == "three 🐑"] == [0.5]


def test_batch_run_again_asks_only_for_what_failed_or_is_missing(server, tmp_path):
    server.default = lambda request: error_answer(400) if said(request) == "two" else Answer(text=said(request))
    done, answers = run_batch(server, tmp_path, ["one", "two", "three"])
    assert done.returncode == 1
    assert b"1 failed" in done.stderr
    (failed,) = (answer for answer in answers if "error" in answer)
    assert (failed["id"], failed["error"]["code"]) == (1, "INVALID_REQUEST")
    with open(tmp_path / "out.jsonl", "ab") as torn:  # as a kill leaves it
        torn.write(b'{"id":3,"te')
    server.default = lambda request: Answer(text=said(request))
    server.requests.clear()
    done, answers = run_batch(server, tmp_path, ["one", "two", "three", "four"])
    assert done.returncode == 0
    assert sorted(map(said, server.requests)) == ["four", "two"]
    assert {answer["id"]: answer["text"] for answer in answers} == {0: "one", 1: "two", 2: "three", 3: "four"}
    done, _ = run_batch(server, tmp_path, ["one", "two", "three", "four"])
    assert (done.returncode, len(server.requests)) == (0, 2)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [("[1, 2]\n", b"line 1 of the input is no request"), ('"one"\nnot JSON\n', b"line 2 of the input is no request")],
)
def test_batch_refuses_a_line_that_is_no_request(server, tmp_path, text, wrong):
    (tmp_path / "in.jsonl").write_text(text)
    where = ("--base-url", server.base_url, "--no-key", "-m", "local-model")
    done = command("batch", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), *where)
    assert done.returncode == 1
    assert wrong in done.stderr
    assert b"Traceback" not in done.stderr


def test_batch_refuses_two_lines_with_one_id_each_time(server, tmp_path):
    for _ in range(2):
        done, _ = run_batch(server, tmp_path, [{"id": 1, "prompt": "one"}, {"id": 1, "prompt": "two"}])
        assert done.returncode == 1
        assert b"line 2 of the input has an id that another has" in done.stderr


def test_batch_keeps_what_was_answered_before_a_bad_line(server, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(f'"number {number}"\n' for number in range(20)) + "not JSON\n")
    where = ("--base-url", server.base_url, "--no-key", "-m", "local-model")
    done = command("batch", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), *where)
    assert done.returncode == 1
    assert b"line 21 of the input is no request" in done.stderr
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == len(server.requests) == 20


def test_batch_keeps_what_is_ready_where_one_cannot_be_written(server, tmp_path, monkeypatch, capsys):
    plain, failed = sheepsse._Answers.append, []
    set_result, ready = Future.set_result, []

    def answer(request):  # none before all are asked for
        if len(server.requests) == 3:
            server.release()
        return Answer(stall_after=0)

    def noted(future, result):
        set_result(future, result)
        ready.append(result)

    def append(self, result):
        if not failed:
            assert until(lambda: len(ready) == 3)
            failed.append(result.id)
            raise OSError(28, "No space left on device")
        plain(self, result)

    monkeypatch.setattr(sheepsse._Answers, "append", append)
    monkeypatch.setattr(Future, "set_result", noted)
    server.default = answer
    (tmp_path / "in.jsonl").write_text('"one"\n"two"\n"three"\n')
    where = ("--base-url", server.base_url, "--no-key", "-m", "local-model")
    assert sheepsse.main(["batch", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), *where]) == 1
    assert "No space left" in capsys.readouterr().err
    answered = {json.loads(line)["id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()}
    assert answered == {0, 1, 2} - set(failed)


@pytest.mark.parametrize(
    "content", ["my diary\n", "my diary", '{"id": 1, "prompt": "one"}\n{"id": 2, "prompt": "two"}']
)
def test_batch_leaves_a_file_of_others_alone(server, tmp_path, content):
    (tmp_path / "out.jsonl").write_text(content)
    (tmp_path / "in.jsonl").write_text('"one"\n')
    where = ("--base-url", server.base_url, "--no-key", "-m", "local-model")
    done = command("batch", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), *where)
    assert done.returncode == 1
    assert b"choose another file" in done.stderr
    assert (tmp_path / "out.jsonl").read_text() == content
    assert server.requests == []


def test_batch_without_its_input_says_so(tmp_path):
    done = command("batch", str(tmp_path / "none.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--no-key", "-m", "m")
    assert done.returncode == 1
    assert b"none.jsonl" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_batch_ends_at_ctrl_c_with_a_summary_though_the_server_is_silent(server, tmp_path):
    server.default = lambda request: Answer(text="x") if said(request) == "one" else Answer(stall_after=3)
    (tmp_path / "in.jsonl").write_text('"one"\n"two"\n"three"\n')
    arguments = ["batch", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--no-key", "-m", "m"]
    process = subprocess.Popen(
        [*SHELL, *arguments, "--base-url", server.base_url],
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert until(lambda: len(server.requests) == 3)
    assert until((tmp_path / "out.jsonl").read_bytes)
    time.sleep(0.1)  # the others wait for more
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=HANG)
    assert process.returncode == 130
    assert b"1: 1 succeeded" in error
    assert b"Traceback" not in error
    assert json.loads((tmp_path / "out.jsonl").read_text())["text"] == "x"


# check, cost, bench


def test_check_says_whether_the_provider_is_there(server):
    done = command("check", "--base-url", server.base_url, "--no-key")
    assert done.returncode == 0
    assert re.match(rb"ok, answered in \d+\.\d", done.stdout)
    assert b"local-model" in done.stdout
    done = command("check", "--base-url", "http://127.0.0.1:1/v1", "--no-key")
    assert (done.returncode, done.stdout) == (1, b"unreachable\n")
    assert b"no connection" in done.stderr
    done = command("check", "--provider", "deepseek")
    assert (done.returncode, done.stdout) == (1, b"no_key\n")
    assert b"DEEPSEEK_API_KEY" in done.stderr


def test_cost_is_exact_or_says_that_nobody_knows():
    done = command(
        "cost", "--input", "1000", "--output", "500", "--cached", "600", "--price", "3", "15", "--cached-price", "0.30"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"0.00888\n", b"")
    done = command("cost", "--input", "1000", "-m", "no-such-model")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"no price is known for no-such-model" in done.stderr
    assert b"pip install 'sheepsse[prices]'" in done.stderr
    for price in ("dear", "nan"):
        assert command("cost", "--input", "1", "--price", price, "1").returncode == 2


def test_bench_measures_each_request(server):
    where = ("--base-url", server.base_url, "--no-key", "-m", "local-model")
    done = command("bench", *where, "-n", "6", "-c", "3")
    assert (done.returncode, done.stderr) == (0, b"")
    lines = done.stdout.decode().splitlines()
    assert lines[0].split() == ["mean", "p50", "p90", "p99"]
    names = [line[:20].strip() for line in lines[1:5]]
    assert names == ["first text, s", "whole, s", "tokens a second", "characters a second"]
    assert all(float(value) >= 0 for line in lines[1:5] for value in line[20:].split())
    assert lines[-1].startswith("6 of 6 answered")
    assert len(server.requests) == 6
    server.default = Answer(text="")
    assert b"tokens a second             -" in command("bench", *where, "-n", "1").stdout
    assert command("bench", *where, "-n", "0").returncode == 2
    server.default = error_answer(500)
    done = command("bench", *where, "-n", "2")
    assert done.returncode == 1
    assert b"2 failed" in done.stderr
    assert b"- " in done.stdout


@pytest.mark.parametrize("name", ["batch", "chat", "check", "cost", "bench", "models", "serve"])
def test_each_command_says_what_it_does(name):
    done = command(name, "--help")
    assert done.returncode == 0
    assert f"usage: sheepsse {name}".encode() in done.stdout
    assert name in command("--help").stdout.decode()


@pytest.mark.parametrize("arguments", [["check"], ["bench", "-m", "m"], ["batch", "IN", "-o", "OUT", "-m", "m"]])
def test_a_variable_without_a_key_is_an_error_of_each_command(tmp_path, arguments):
    (tmp_path / "IN").write_text('"one"')
    done = command(*arguments, "--base-url", "http://127.0.0.1:1/v1", "--key-variable", "MY_KEY", cwd=tmp_path)
    assert done.returncode == 1
    assert b"no API key in MY_KEY" in done.stderr


def test_batch_reads_standard_input_and_skips_blank_lines(server, tmp_path):
    where = ("--base-url", server.base_url, "--no-key", "-m", "local-model")
    done = command("batch", "-", "-o", str(tmp_path / "out.jsonl"), *where, input=b'"one"\n\n"two"')
    assert done.returncode == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
