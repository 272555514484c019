"""Section 14: the command line, in processes of its own as a shell starts it"""

import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

import sheepsse
from local_provider import Answer, chat_events, error_answer

MODULE = pathlib.Path(sheepsse.__file__)
TEXT = "Grüße 🐑, chào bạn"


def environment(**extra):
    """The environment of a command: nothing of this machine's keys, sheepsse where the tests found it"""
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
    paths = [str(MODULE.parent), *filter(None, [kept.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "error", **extra}


def command(*arguments, start=(sys.executable, "-m", "sheepsse"), **options):
    return subprocess.run(
        [*start, *arguments],
        capture_output=True,
        env=environment(**options.pop("env", {})),
        timeout=30,
        check=False,
        **options,
    )


def ask(server, *arguments, **options):
    return command("Good day?", "-m", "local-model", "--base-url", server.base_url, "--no-key", *arguments, **options)


@pytest.mark.parametrize(
    "start",
    [(sys.executable, "-m", "sheepsse"), (sys.executable, str(MODULE))],
    ids=["python -m sheepsse", "python sheepsse.py"],
)
def test_the_text_goes_to_stdout_and_nothing_else(server, start):
    server.answer(Answer(text=TEXT))
    done = ask(server, start=start)
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, TEXT, b"")


def test_the_installed_script_is_the_same_command():
    script = shutil.which("sheepsse", path=os.path.dirname(sys.executable))
    if script is None:
        pytest.skip("sheepsse is not installed here, so there is no script")
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
    tool = {"tool_calls": [{"index": 0, "id": "c", "function": {"name": "look", "arguments": "{}"}}]}
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3, "cost": 0.25}
    server.answer(Answer(events=chat_events(["Good", tool, {"refusal": "No"}], reasoning=["Hm"], usage=usage)))
    lines = [json.loads(line) for line in ask(server, "--json").stdout.splitlines()]
    assert [line["type"] for line in lines] == ["reasoning", "content", "tool_call", "refusal", "finish", "done"]
    assert all(line["t"] >= 0 for line in lines)
    assert lines[1]["text"] == "Good"
    assert lines[2]["name"] == "look"
    assert lines[4]["finish"] == "stop"
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
    assert (done.returncode, done.stdout) == (0, b"a?!")


def start(server, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "sheepsse", "x", "-m", "m", "--base-url", server.base_url, "--no-key", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )


def test_ctrl_c_is_status_130_and_keeps_what_came(server):
    server.answer(Answer(text="Good day", stall_after=2))
    process = start(server)
    assert process.stdout.read(4) == b"Good"
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=10)
    assert process.returncode == 130
    assert stderr.strip() == b"interrupted"
    assert server.wait_closed(2)


def test_a_reader_that_has_enough_ends_the_command_quietly(server):
    server.default = Answer(text="many words " * 50, pace=0.005)
    process = start(server)
    assert process.stdout.read(4) == b"many"
    process.stdout.close()
    assert process.wait(timeout=20) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


# In this process, for what a subprocess cannot show


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_the_text_ends_with_a_line_end(server, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    server.answer(Answer(text=TEXT))
    assert sheepsse.main(["x", "-m", "m", "--base-url", server.base_url, "--no-key"]) == 0
    assert terminal.getvalue() == TEXT + "\n"


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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full, which is a disk without room")
def test_a_full_disk_is_a_message_and_no_traceback(server):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "sheepsse", "x", "-m", "m", "--base-url", server.base_url, "--no-key"],
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(),
            timeout=30,
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
