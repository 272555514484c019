"""Section 11, Client and the functions on it: who is asked, with which key, what is sent, over whose session"""

import itertools
import json
import logging
import pickle
import re
import socket
import ssl
import threading
import time
import traceback
import uuid

import pytest
import requests
import responses
import trustme

import sheepsse
from conftest import HANG, PATIENT, asking, in_another_thread, read
from local_provider import (
    COMMENT,
    FRAMINGS,
    JSON,
    MODEL,
    TEXT,
    Answer,
    LocalProvider,
    chat_events,
    chunk_event,
    error_answer,
    json_completion,
    split_words,
)

every_framing = pytest.mark.parametrize("framing", FRAMINGS)
WORDS = split_words(TEXT)
KEY = "sk-not-a-real-key-0123456789"
#: seconds that no test waits for
FOREVER = 1_000_000


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# What is sent

MESSAGES = [{"role": "user", "content": "Go"}]
OPTIONS = {"include_usage": True, "include_obfuscation": False}


def test_the_body_is_the_question_and_nothing_that_was_not_asked_for(server, client):
    list(client.stream("Go"))
    client.complete("Go")
    streamed, whole = server.requests
    assert streamed.json == {"model": MODEL, "messages": MESSAGES, "stream": True, "stream_options": OPTIONS}
    assert whole.json == {"model": MODEL, "messages": MESSAGES, "stream": False}
    assert (streamed.method, streamed.path) == (whole.method, whole.path) == ("POST", "/v1/chat/completions")


def test_parameters_go_into_the_body_as_they_are(server, client):
    params = {"temperature": 0, "max_tokens": 5, "tools": [], "stop": None, "metadata": {"ý": ["🐑", 1.5, True]}}
    list(client.stream("Go", **params))
    asked = {"model": MODEL, "messages": MESSAGES, "stream": True, "stream_options": OPTIONS}
    assert server.requests[0].json == {**asked, **params}


def test_extra_body_carries_what_collides_with_an_option_of_ours(server, client):
    extra = {"provider": {"order": ["a"]}, "temperature": 0.5, "model": "another"}
    list(client.stream("Go", extra_body=extra, top_p=1))
    sent = server.requests[0].json
    assert {name: sent[name] for name in extra} == extra
    assert sent["top_p"] == 1
    assert "extra_body" not in sent


def test_no_option_of_ours_is_in_the_body(server, client):
    options = {
        "retry": 1,
        "timeout": 5,
        "first_timeout": 5,
        "idle_timeout": 5,
        "headers": {"X-Mine": "1"},
        "format": "sse",
        "max_event_size": 10_000,
        "deadline": 5,
        "on_retry": print,
    }
    list(client.stream("Go", resume="never", **options))
    client.complete("Go", **{**options, "format": "json"})
    names = {"model", "messages", "stream"}
    assert set(server.requests[0].json) == names | {"stream_options"}
    assert set(server.requests[1].json) == names


@pytest.mark.parametrize("option", ["provider", "base_url", "api_key", "dialect", "session"])
def test_an_option_of_a_client_beside_a_client_is_an_error(server, client, option):
    for ask in (client.stream, client.complete):
        with pytest.raises(TypeError, match=f"{option}= belongs to the Client"):
            ask("Go", **{option: "x"})
    for function in (sheepsse.stream, sheepsse.complete):
        with pytest.raises(TypeError, match=f"{option}= belongs to the Client"):
            function("Go", client=client, **{option: "x"})
    assert server.requests == []


def test_api_key_false_beside_a_client_is_not_dropped_in_silence(server):
    with asking(server, api_key=KEY) as client:
        with pytest.raises(TypeError, match="api_key"):
            list(client.stream("Go", api_key=False))


@pytest.mark.parametrize("option", ["checkpoint", "limiter", "session", "base_url", "resume", "resume_from"])
def test_an_option_that_is_none_is_no_option_and_not_sent(server, client, option):
    client.complete("Go", **{option: None})
    assert set(server.requests[0].json) == {"model", "messages", "stream"}


def test_complete_takes_no_resume_and_a_client_no_client(server, client):
    for call in (
        lambda: client.complete("Go", resume="never"),
        lambda: sheepsse.complete("Go", client=client, resume="never"),
        lambda: client.stream("Go", client=client),
    ):
        with pytest.raises(TypeError):
            call()
    assert server.requests == []


@pytest.mark.parametrize("messages", [b"Go", {"role": "user", "content": "Go"}, None, 5])
def test_other_than_a_str_or_a_list_is_no_question(server, client, messages):
    with pytest.raises(TypeError, match="messages is a str or a list"):
        client.stream(messages)
    assert server.requests == []


def test_messages_are_sent_as_they_are(server, client):
    messages = [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": [{"type": "text", "text": "Gò"}]},
    ]
    list(client.stream(messages))
    list(client.stream(iter(messages)))
    assert [request.json["messages"] for request in server.requests] == [messages, messages]


@pytest.mark.parametrize("value", [object(), float("nan"), {1, 2}, float("inf")])
def test_what_json_cannot_carry_is_an_error_and_sends_nothing(server, client, value):
    _, error = read(client.stream("Go", temperature=value))
    assert type(error) is sheepsse.InvalidRequestError
    assert "JSON" in str(error)
    assert (server.connections, server.requests) == (0, [])


def test_the_headers_say_what_is_wanted_and_by_whom(server):
    with asking(server, api_key=KEY) as client:
        list(client.stream("Go"))
        client.complete("Go")
    streamed, whole = (request.headers for request in server.requests)
    assert (streamed["Accept"], whole["Accept"]) == ("text/event-stream", "application/json")
    for headers in (streamed, whole):
        assert headers["Cache-Control"] == "no-cache"
        assert headers["Content-Type"] == "application/json"
        assert headers["Authorization"] == f"Bearer {KEY}"
        assert headers["User-Agent"].startswith(f"sheepsse/{sheepsse.__version__} ")
        assert uuid.UUID(headers["X-Request-ID"]).version == 4
    assert streamed["X-Request-ID"] != whole["X-Request-ID"]


def test_a_header_that_is_none_is_left_out(server):
    with asking(server, headers={"X-One": "1", "Accept-Encoding": None}) as client:
        client.complete("Good day?", headers={"X-One": None, "x-request-id": None})
    sent = {name.lower(): value for name, value in server.requests[0].headers.items()}
    assert not {"x-one", "x-request-id"} & set(sent)
    assert sent["accept-encoding"] == "identity"


def test_headers_of_the_client_and_of_the_call_are_added(server):
    with asking(server, headers={"X-Mine": "client", "X-Both": "client", "accept": "text/plain"}) as client:
        list(client.stream("Go", headers={"X-Both": "call", "User-Agent": "me"}))
        list(client.stream("Go"))
    first, second = (request.headers for request in server.requests)
    assert (first["X-Mine"], first["X-Both"], first["User-Agent"]) == ("client", "call", "me")
    assert (second["X-Mine"], second["X-Both"]) == ("client", "client")
    assert first.get_all("Accept") == second.get_all("Accept") == ["text/plain"]


def test_no_key_means_no_authorization(server, client):
    list(client.stream("Go"))
    assert server.requests[0].headers["Authorization"] is None


# Where it goes


@pytest.mark.parametrize(
    ("after", "path"),
    [
        ("/v1", "/v1/chat/completions"),
        ("/v1/", "/v1/chat/completions"),
        ("/v1//", "/v1/chat/completions"),
        ("", "/chat/completions"),
        ("/", "/chat/completions"),
        (
            "/openai/deployments/x?api-version=2024-10-21",
            "/openai/deployments/x/chat/completions?api-version=2024-10-21",
        ),
        ("/v1/?a=b&c=d", "/v1/chat/completions?a=b&c=d"),
    ],
)
def test_the_path_is_put_after_the_base_url_and_before_its_query(server, after, path):
    with asking(server, base_url=server.origin + after) as client:
        assert list(client.stream("Go")) == WORDS
    assert server.requests[0].path == path


@pytest.mark.parametrize(
    "base_url",
    [
        "",
        "api.example.com/v1",
        "ftp://example.com",
        "http://",
        "https:///v1",
        "http://h:0",
        "http://h:70000",
        "http://[::1",
    ],
)
def test_an_address_that_is_none_is_an_error_at_once(base_url):
    with pytest.raises(sheepsse.InvalidRequestError, match="expected a base_url like https://"):
        sheepsse.Client(base_url=base_url)


def test_the_error_for_an_address_hides_what_is_secret_in_it():
    for base_url in (f"ftp://me:{KEY}@example.com", f"api.example.com/v1?key={KEY}"):
        with pytest.raises(sheepsse.InvalidRequestError) as caught:
            sheepsse.Client(base_url=base_url)
        assert KEY not in str(caught.value)


@pytest.mark.parametrize("base_url", ["http://a..b/v1", "http://%zz/v1"])
def test_an_address_that_cannot_be_asked_is_a_sheep_error(base_url):
    with pytest.raises(sheepsse.InvalidRequestError):
        with sheepsse.Client(base_url=base_url, api_key=False, model=MODEL, retry=0) as client:
            list(client.stream("Go"))


def test_options_that_make_no_sense_are_errors_at_once():
    with pytest.raises(sheepsse.InvalidRequestError, match="no provider 'nobody'; there are holysheep, openai"):
        sheepsse.Client("nobody")
    with pytest.raises(sheepsse.InvalidRequestError, match="no dialect 'klingon'; there are openai"):
        sheepsse.Client(dialect="klingon")
    with pytest.raises(TypeError, match="api_key is a str"):
        sheepsse.Client(api_key=True)
    with pytest.raises(TypeError, match="retry takes a sheepsse.Retry"):
        sheepsse.Client(retry="3")
    with pytest.raises(ValueError, match="format is one of auto, sse, json, jsonl"):
        sheepsse.Client(format="xml")
    client = sheepsse.Client(base_url="http://127.0.0.1:1", api_key=False, model=MODEL)
    with pytest.raises(ValueError, match="resume is 'auto', 'never', or of replay"):
        client.stream("Go", resume="always")
    with pytest.raises(ValueError, match="format is"):
        client.stream("Go", format="xml")
    with pytest.raises(TypeError, match="retry takes"):
        client.complete("Go", retry=1.5)


def test_a_missing_model_is_an_error_before_any_request(server):
    with asking(server, model=None) as client:
        for ask in (client.stream, client.complete):
            with pytest.raises(sheepsse.InvalidRequestError, match="pass model="):
                ask("Go")
        assert client.complete("Go", model="named").model == "named"
    assert len(server.requests) == 1
    with pytest.raises(sheepsse.InvalidRequestError, match="pass model="):
        sheepsse.stream("Go", base_url=server.base_url, api_key=False)


def test_the_model_of_the_call_counts_over_the_clients(server, client):
    list(client.stream("Go", model="mine"))
    list(client.stream("Go"))
    assert [request.json["model"] for request in server.requests] == ["mine", MODEL]


# Who is asked

VARIABLES = {name: row.key_variable for name, row in sheepsse.PROVIDERS.items() if row.key_variable}


@pytest.fixture
def providers(server, monkeypatch):
    """All providers are at the server, each under its name; gives who was asked, with which key"""
    for name, row in sheepsse.PROVIDERS.items():
        monkeypatch.setitem(sheepsse.PROVIDERS, name, row._replace(base_url=f"{server.origin}/{name}/v1"))
    sheepsse._default_client.cache_clear()
    yield lambda: [(sent.path.split("/")[1], sent.headers["Authorization"]) for sent in server.requests]
    sheepsse._default_client().close()
    sheepsse._default_client.cache_clear()


@pytest.mark.parametrize(
    ("keys", "model", "asked"),
    [
        (["holysheep"], "gpt-4o", "holysheep"),
        (["openai", "holysheep"], "gpt-4o", "holysheep"),
        (["mistral", "openai"], "some-model", "openai"),
        (["openai", "deepseek"], "deepseek-chat", "deepseek"),
        (["openai", "deepseek", "mistral"], "mistral-small", "mistral"),
        (["deepseek", "openai"], "gpt-4o", "openai"),
        (["deepseek"], "some-model", "deepseek"),
        (["deepseek", "openrouter"], "gpt-4o", "openrouter"),
        (["openrouter", "mistral"], "mistral-small", "openrouter"),
    ],
)
def test_the_environment_says_who_is_asked(providers, monkeypatch, keys, model, asked):
    for name in keys:
        monkeypatch.setenv(VARIABLES[name], f"{KEY}-{name}")
    assert "".join(sheepsse.stream("Go", model=model)) == TEXT
    assert providers() == [(asked, f"Bearer {KEY}-{asked}")]


def test_a_placeholder_in_the_environment_is_no_key(providers, monkeypatch):
    monkeypatch.setenv("HOLYSHEEP_API_KEY", "YOUR_HOLYSHEEP_API_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    list(sheepsse.stream("Go", model="any"))
    assert providers() == [("openai", f"Bearer {KEY}")]


def test_a_provider_that_is_named_counts_over_the_environment(providers, monkeypatch):
    for name, variable in VARIABLES.items():
        monkeypatch.setenv(variable, f"{KEY}-{name}")
    list(sheepsse.stream("Go", model="gpt-4o", provider="mistral"))
    with sheepsse.Client("deepseek", model="gpt-4o") as client:
        client.complete("Go")
    assert providers() == [("mistral", f"Bearer {KEY}-mistral"), ("deepseek", f"Bearer {KEY}-deepseek")]


def test_the_host_of_a_base_url_names_its_provider(providers, server, monkeypatch):
    row, origin = sheepsse.PROVIDERS["mistral"], server.origin.replace("127.0.0.1", "localhost")
    monkeypatch.setitem(sheepsse.PROVIDERS, "mistral", row._replace(base_url=origin.replace("localhost", "LOCALHOST")))
    monkeypatch.setenv("MISTRAL_API_KEY", KEY)
    monkeypatch.setenv("HOLYSHEEP_API_KEY", f"{KEY}-2")
    list(sheepsse.stream("Go", model="gpt-4o", base_url=origin + "/other/v1"))
    assert providers() == [("other", f"Bearer {KEY}")]


@pytest.mark.parametrize("base_url", ["http://api.mistral.ai/v1", "https://api.mistral.ai:8443/v1"])
def test_a_key_of_the_environment_goes_neither_to_another_port_nor_unencrypted(base_url, monkeypatch):
    monkeypatch.setenv("MISTRAL_API_KEY", KEY)
    with pytest.raises(sheepsse.AuthenticationError, match="no API key in the call to"):
        sheepsse.stream("Go", model="mistral-small", base_url=base_url)
    with pytest.raises(sheepsse.AuthenticationError):
        sheepsse.stream("Go", model="mistral-small", provider="mistral", base_url=base_url)


def test_a_port_that_is_the_usual_one_is_the_providers_own(monkeypatch):
    monkeypatch.setenv("MISTRAL_API_KEY", KEY)
    sheepsse.stream("Go", model="mistral-small", base_url="https://api.mistral.ai:443/v1").close()


def test_the_client_of_the_environment_is_kept_for_the_process(providers, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for _ in range(3):
        assert "".join(sheepsse.stream("Go", model="m")) == TEXT
    assert sheepsse.complete("Go", model="m").text == TEXT
    assert server.connections == 1
    monkeypatch.setenv("HOLYSHEEP_API_KEY", KEY)
    list(sheepsse.stream("Go", model="m"))
    assert [name for name, _ in providers()] == ["openai"] * 4 + ["holysheep"], "its variables are read for each call"


def test_options_of_a_call_alone_leave_the_client_of_the_environment(providers, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    list(sheepsse.stream("Go", model="m", timeout=5, headers={"X-Mine": "1"}, retry=0))
    list(sheepsse.stream("Go", model="m"))
    assert [request.headers["X-Mine"] for request in server.requests] == ["1", None]
    assert server.connections == 1


def test_the_rows_of_providers_are_whole():
    for name, row in sheepsse.PROVIDERS.items():
        if name == "ollama":
            assert row[:3] == ("http://localhost:11434", "", "ollama")
            continue
        assert row.base_url.startswith("https://"), name
        assert row.key_variable.endswith("_API_KEY"), name
        assert row.dialect in sheepsse.DIALECTS, name
        assert row.key_page.startswith("https://"), name
    assert " ".join(sheepsse.PROVIDERS) == (
        "holysheep openai openai-responses deepseek anthropic gemini openrouter mistral ollama"
    )
    assert sheepsse.PROVIDERS["holysheep"].base_url == "https://api.holysheep.ai/v1"


# Keys

PLACEHOLDERS = [
    "",
    "  ",
    "\n",
    "YOUR_KEY",
    "your-api-key",
    "Your_OpenAI_Key",
    "<key>",
    "<your key here>",
    "changeme",
    "CHANGEME",
]


@pytest.mark.parametrize("key", PLACEHOLDERS)
def test_a_placeholder_is_an_error_that_sends_nothing(server, monkeypatch, key):
    with asking(server, api_key=key) as client:
        for ask in (client.stream, client.complete):
            with pytest.raises(sheepsse.AuthenticationError, match="api_key") as caught:
                ask("Go")
    assert (caught.value.code, caught.value.retryable) == ("AUTH_ERROR", False)
    monkeypatch.setenv("MISTRAL_API_KEY", key)
    with pytest.raises(sheepsse.AuthenticationError, match="set MISTRAL_API_KEY to a key from https://console.mistral"):
        sheepsse.stream("Go", model="m", provider="mistral")
    assert (server.connections, server.requests) == (0, [])


def test_a_missing_key_is_an_error_that_says_where_one_is_looked_for():
    with pytest.raises(sheepsse.AuthenticationError) as caught:
        sheepsse.stream("Go", model="m")
    for variable in VARIABLES.values():
        assert variable in str(caught.value)
    assert "https://www.holysheep.ai/register" in str(caught.value)
    with pytest.raises(sheepsse.AuthenticationError, match="set OPENAI_API_KEY"):
        sheepsse.stream("Go", model="m", provider="openai")


@pytest.mark.parametrize("key", ["sk-a\nb", "sk-a\r\nX-Evil: 1", "sk a", "sk-ключ", "sk-\x00", "sk-a\tb", "sk-a\x7f"])
def test_a_key_that_no_header_can_carry_is_an_error_that_does_not_show_it(server, key):
    with asking(server, api_key=key) as client:
        with pytest.raises(sheepsse.AuthenticationError) as caught:
            client.stream("Go")
    assert key not in str(caught.value)
    assert server.requests == []


def test_blanks_around_a_key_are_not_part_of_it(server):
    with asking(server, api_key=f" {KEY}\n") as client:
        list(client.stream("Go"))
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"


def test_a_key_from_the_environment_goes_to_its_own_providers_host_only(server, monkeypatch):
    for variable in VARIABLES.values():
        monkeypatch.setenv(variable, KEY)
    for options in ({}, {"provider": "openai"}):
        with pytest.raises(sheepsse.AuthenticationError, match="127.0.0.1.*api_key=False"):
            sheepsse.stream("Go", model="gpt-4o", base_url=server.base_url, **options)
    assert list(sheepsse.stream("Go", model="gpt-4o", base_url=server.base_url, api_key=False)) == WORDS
    assert server.requests[0].headers["Authorization"] is None


def test_a_key_that_is_given_goes_where_it_is_said(server):
    with asking(server, provider="openai", api_key=KEY) as client:
        list(client.stream("Go"))
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"


def test_a_key_in_a_header_is_a_key_too(server):
    list(sheepsse.stream("Go", model="m", base_url=server.base_url, headers={"api-key": KEY}, retry=0))
    with sheepsse.Client(base_url=server.base_url, headers={"Authorization": f"Token {KEY}"}, model="m") as client:
        list(client.stream("Go"))
        list(client.stream("Go", headers={"authorization": "Token of-the-call"}))
    assert [(request.headers["api-key"], request.headers.get_all("Authorization")) for request in server.requests] == [
        (KEY, None),
        (None, [f"Token {KEY}"]),
        (None, ["Token of-the-call"]),
    ]


@pytest.fixture
def netrc(tmp_path, monkeypatch):
    """A file that has a user and a password for every host of the tests"""
    file = tmp_path / "netrc"
    file.write_text("machine 127.0.0.1\nlogin user\npassword secret\n")
    file.chmod(0o600)
    monkeypatch.setenv("NETRC", str(file))


def test_a_netrc_entry_does_not_replace_the_key(server, netrc):
    requests.get(f"{server.base_url}/models", timeout=5)
    assert server.requests.pop().headers["Authorization"].startswith("Basic"), "the entry is in force"
    with requests.Session() as session:
        for options in ({"api_key": KEY}, {"api_key": KEY, "session": session}, {"api_key": None, "headers": BEARER}):
            with asking(server, **options) as client:
                list(client.stream("Go"))
                client.complete("Go")
    assert {request.headers["Authorization"] for request in server.requests} == {f"Bearer {KEY}"}
    assert len(server.requests) == 6


BEARER = {"Authorization": f"Bearer {KEY}"}


@pytest.mark.parametrize(
    "options", [{"api_key": KEY}, {"api_key": None, "headers": BEARER}], ids=["api_key", "headers"]
)
def test_a_netrc_entry_does_not_replace_the_key_of_a_check(server, netrc, options):
    with asking(server, **options) as client:
        assert client.check().ok
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"


def test_a_user_in_the_address_does_not_replace_the_key(server):
    with asking(server, base_url=server.base_url.replace("//", "//me:secret@"), api_key=KEY) as client:
        list(client.stream("Go"))
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_an_error_and_is_not_followed(server, status):
    with LocalProvider() as other:
        server.default = Answer(status=status, headers={"Location": f"{other.base_url}/x?secret=1"}, framing="length")
        with asking(server, api_key=KEY, retry=3) as client:
            _, error = read(client.stream("Go"))
            assert not client.check().ok
        assert other.connections == 0
    assert type(error) is sheepsse.InvalidRequestError
    assert error.status == status
    assert f"a redirect to {other.base_url}/x, which is not followed" in str(error)
    assert [request.method for request in server.requests] == ["POST", "GET"]


@pytest.mark.parametrize(
    "location", ["http://[bad", "http://127.0.0.1:99999/", "http://127.0.0.1:x/", "//", "", "\x01", "foo:bar"]
)
def test_a_redirect_to_no_address_is_the_same_error(server, location):
    server.default = Answer(status=307, headers={"Location": location}, framing="length")
    with asking(server) as client:
        _, error = read(client.stream("Go"))
        assert type(error) is sheepsse.InvalidRequestError
        assert client.check().status == "http_error"


def test_the_body_of_a_redirect_is_read_no_further_than_any_errors(server):
    endless = itertools.repeat(b"x" * 1_000_000)
    server.answer(Answer(status=307, headers={"Location": "/x"}, events=endless, framing="close"))
    with asking(server, **PATIENT) as client:
        _, error = read(client.stream("Go"))
    assert type(error) is sheepsse.InvalidRequestError


def test_a_redirect_whose_body_stalls_is_a_redirect_still(server, monkeypatch):
    monkeypatch.setattr(sheepsse, "_ERROR_BODY_TIME", 0.1)
    server.default = Answer(status=307, headers={"Location": "/x"}, body=b"x" * 100, framing="length", stall_at=10)
    with asking(server, retry=sheepsse.Retry(2, base_delay=0), **PATIENT) as client:
        _, error = read(client.stream("Go"))
    assert len(server.requests) == 1
    assert type(error) is sheepsse.InvalidRequestError


def test_no_error_and_no_log_line_shows_the_key(server, caplog):
    caplog.set_level(logging.DEBUG)
    with LocalProvider(key="another") as strict, asking(strict, api_key=KEY) as client:
        _, error = read(client.stream("Go"))
        health = client.check()
        assert KEY not in repr(client)
    assert type(error) is sheepsse.AuthenticationError
    shown = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    for text in (
        shown,
        repr(error),
        error.response.text,
        str(error.request.headers),
        str(error.response.request.headers),
    ):
        assert KEY not in text
    assert health.status == "bad_key"
    assert KEY not in health.error
    assert "[hidden]" in str(error)
    assert KEY not in caplog.text


def test_a_check_does_not_show_a_key_that_is_in_a_header():
    with LocalProvider(key="another") as strict, asking(strict, api_key=None, headers=BEARER) as client:
        assert KEY not in str(read(client.stream("Go"))[1])
        assert KEY not in client.check().error


@pytest.mark.parametrize("value", [f"Bearer {KEY}\nX-Evil: 1", f" Bearer {KEY}", f"Bearer {KEY}🐑"])
def test_an_unfit_header_with_a_key_is_an_error_that_does_not_show_it(server, value):
    with asking(server, api_key=None, headers={"Authorization": value}) as client:
        _, error = read(client.stream("Go"))
        health = client.check()
    assert type(error) is sheepsse.InvalidRequestError
    shown = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    assert KEY not in shown
    assert health.status == "http_error"
    assert KEY not in health.error
    assert server.requests == []


# complete()


def test_complete_gives_the_whole_answer(server, client):
    answer = client.complete("Go")
    assert answer == sheepsse.Completion(
        text=TEXT,
        finish_reason="stop",
        usage=sheepsse.Usage(4, len(WORDS), 4 + len(WORDS)),
        model=MODEL,
        id="chatcmpl-local",
        complete=True,
    )
    assert sheepsse.complete("Go", client=client).text == TEXT
    assert server.connections == 1


def test_complete_gives_reasoning_and_tool_calls(server, client):
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    body = json_completion(None, finish="tool_calls", reasoning="Hm", tool_calls=[call])
    server.answer(Answer(body=body, content_type=JSON))
    answer = client.complete("Go")
    assert (answer.text, answer.reasoning, answer.finish_reason) == ("", "Hm", "tool_calls")
    assert answer.tool_calls == (sheepsse.ToolCall(0, "c1", "f", '{"a": 1}'),)
    assert answer.complete


@every_framing
def test_complete_takes_a_stream_where_the_server_sends_one(server, client, framing):
    server.answer(Answer(events=chat_events(WORDS), framing=framing))
    answer = client.complete("Go")
    assert (answer.text, answer.complete) == (TEXT, True)
    server.answer(Answer(events=chat_events(WORDS), framing=framing, cut_after=3))
    with pytest.raises(sheepsse.StreamInterrupted) as caught:
        client.complete("Go")
    assert caught.value.partial.text == "".join(WORDS[:2])


def test_complete_raises_what_a_stream_would(server, client):
    for answer, kind in (
        (error_answer(401), sheepsse.AuthenticationError),
        (error_answer(429), sheepsse.RateLimitError),
        (Answer(drop=True), sheepsse.ConnectError),
        (Answer(body=b"<html>", content_type="text/html"), sheepsse.InvalidStreamError),
        (Answer(body=b"", content_type=JSON), sheepsse.SheepError),
        (Answer(body=b"{}"), sheepsse.InvalidStreamError),
    ):
        server.answer(answer)
        with pytest.raises(kind):
            client.complete("Go")


def test_complete_tries_again_by_the_policy(server):
    waits = []
    server.answer(error_answer(503), Answer(cut_at=100), Answer(drop=True))
    with asking(server, retry=sheepsse.Retry(3, sleep=waits.append)) as client:
        assert client.complete("Go").text == TEXT
    assert (len(server.requests), len(waits)) == (4, 3)


@pytest.mark.parametrize("framing", ["close", "gzip-close"])
def test_a_completion_cut_in_a_body_without_a_length_is_a_lost_one(server, framing):
    server.answer(Answer(framing=framing, cut_at=100))
    with asking(server, retry=sheepsse.Retry(1, base_delay=0)) as client:
        assert client.complete("Go").text == TEXT


def test_complete_has_a_deadline(server):
    server.answer(Answer(delay=FOREVER))
    with asking(server, **PATIENT) as client:
        with pytest.raises(sheepsse.StreamTimeout, match="deadline"):
            client.complete("Go", deadline=0.1)


def test_complete_is_limited_against_a_body_that_trickles(server):
    server.answer(Answer(block=1, pace=0.1))
    with asking(server, **{**PATIENT, "first_timeout": 0.1}) as client:
        with pytest.raises(sheepsse.StreamTimeout, match="first_timeout"):
            client.complete("Go")


# check()


def test_check_says_that_all_is_well(server, clock):
    def answer(request):
        clock.now += 2
        return Answer()

    server.default = answer
    with asking(server, api_key=KEY, headers={"X-Mine": "1"}, model=None) as client:
        health = client.check()
    assert health == sheepsse.Health(True, "ok", 2, (MODEL,), None)
    (request,) = server.requests
    assert (request.method, request.path) == ("GET", "/v1/models")
    assert request.headers["Authorization"] == f"Bearer {KEY}"
    assert (request.headers["Accept"], request.headers["X-Mine"]) == ("application/json", "1")
    assert server.billed == 0


def test_check_without_a_key_says_where_one_is_had_and_sends_nothing(server, monkeypatch):
    health = sheepsse.Client().check()
    assert (health.ok, health.status, health.latency, health.models) == (False, "no_key", None, ())
    assert "HOLYSHEEP_API_KEY" in health.error
    assert "https://www.holysheep.ai/register" in health.error
    monkeypatch.setenv("OPENAI_API_KEY", "<your key>")
    assert sheepsse.Client("openai").check().status == "no_key"
    assert sheepsse.Client(base_url=server.base_url).check().status == "no_key"
    assert (server.connections, server.requests) == (0, [])


def test_check_without_a_need_for_a_key(server, client):
    assert client.check().ok
    assert server.requests[0].headers["Authorization"] is None


def test_check_asks_an_address_that_needs_the_key_where_the_model_list_does_not(providers, server, monkeypatch):
    monkeypatch.setenv("OPENROUTER_API_KEY", KEY)
    server.answer(Answer(body=b'{"data": {"label": "x"}}', content_type=JSON))
    with sheepsse.Client("openrouter") as client:
        health = client.check()
    assert health == sheepsse.Health(True, "ok", health.latency)
    assert server.requests[0].path == "/openrouter/v1/key"


def test_check_keeps_the_query_of_an_address(server):
    with asking(server, base_url=f"{server.base_url}/?v=1") as client:
        assert client.check().ok
    assert server.requests[0].path == "/v1/models?v=1"


@pytest.mark.parametrize("status", [401, 403])
def test_check_knows_a_refused_key(server, status):
    server.answer(error_answer(status, "Not this key", code=""))
    with asking(server, api_key=KEY) as client:
        health = client.check()
    assert (health.ok, health.status, health.models) == (False, "bad_key", ())
    assert "Not this key" in health.error
    assert health.latency > 0


NOT_WELL = {
    "a failing server": error_answer(500, "Oh no"),
    "a busy server": error_answer(503),
    "an address that is not there": error_answer(404),
    "a page": Answer(body=b"<html>Welcome", content_type="text/html"),
    "nothing": Answer(body=b"", content_type=JSON),
    "half a list": Answer(body=b'{"data": [', content_type=JSON, framing="length"),
    "no UTF-8": Answer(body=b"\xff\xfe{}", content_type=JSON),
    "a redirect": Answer(status=302, headers={"Location": "/x"}, framing="length"),
}


@pytest.mark.parametrize("answer", NOT_WELL.values(), ids=NOT_WELL)
def test_check_says_what_is_wrong_and_asks_once(server, answer):
    server.default = answer
    with asking(server, retry=5) as client:
        health = client.check()
    assert (health.ok, health.status, health.models) == (False, "http_error", ())
    assert health.latency > 0
    assert "/v1/models" in health.error
    assert len(server.requests) == 1


def test_check_does_not_raise_for_json_that_is_too_deep(server, client, no_collection):
    server.answer(Answer(body=b"[" * 200_000, content_type=JSON))
    assert client.check().status == "http_error"


@pytest.mark.parametrize("body", [b"[]", b"null", b'{"data": null}', b'{"data": [null, {"id": 5}]}', b'"models"'])
def test_check_takes_any_json_for_an_answer(server, client, body):
    server.answer(Answer(body=body, content_type=JSON))
    assert client.check().ok


def test_check_lists_no_model_without_a_name(server, client):
    server.answer(Answer(body=b'{"data": [null, {"id": "a"}, {"id": 5}, {"name": "b"}]}', content_type=JSON))
    assert client.check().models == ("a",)


UNREACHABLE = {
    "dropped": Answer(drop=True),
    "reset": Answer(drop=True, cut="reset"),
    "silent": Answer(delay=FOREVER),
    "a header byte by byte": Answer(header_pace=0.1),
}


@pytest.mark.parametrize("answer", UNREACHABLE.values(), ids=UNREACHABLE)
def test_check_knows_an_unreachable_server_in_time(server, answer):
    server.default = answer
    with asking(server, retry=5, **PATIENT) as client:
        health = client.check(timeout=HANG if answer.drop else 0.1)
    assert (health.ok, health.status, health.latency) == (False, "unreachable", None)
    assert server.origin in health.error
    assert server.wait_closed(HANG)
    assert len(server.requests) <= 1  # on a busy machine the time is over before it is sent


HALF = {
    "byte by byte": {"block": 1, "pace": 0.1},
    "compressed, byte by byte": {"block": 1, "pace": 0.1, "framing": "gzip"},
    "byte by byte to the connection's end": {"block": 1, "pace": 0.1, "framing": "close"},
    "silent in its middle": {"stall_at": 20, "framing": "length"},
    "cut": {"cut_at": 20, "framing": "length"},
    "cut in a chunk": {"cut_at": 20},
    "reset": {"cut_at": 20, "cut": "reset", "framing": "close"},
}


@pytest.mark.parametrize("how", HALF.values(), ids=HALF)
def test_check_of_a_list_that_does_not_come_whole_says_so_in_time(server, how):
    server.answer(Answer(**how))
    with asking(server, **PATIENT) as client:
        health = client.check(timeout=HANG if "cut_at" in how else 0.1)
    assert (health.ok, health.status) == (False, "unreachable")
    assert re.search("lost" if "cut_at" in how else "time|deadline", health.error)
    assert "base URL" not in health.error


def test_check_knows_that_nobody_listens():
    with sheepsse.Client(base_url=f"http://127.0.0.1:{closed_port()}", api_key=False) as client:
        health = client.check()
    assert (health.ok, health.status, health.latency) == (False, "unreachable", None)
    assert "no connection to" in health.error


def test_check_of_an_address_that_cannot_be_asked(server):
    with sheepsse.Client(base_url="http://a..b/v1", api_key=False) as client:
        assert client.check().status in ("http_error", "unreachable")


def test_check_in_time_over_a_session_of_the_callers_own(server):
    server.answer(Answer(block=1, pace=0.1))
    with requests.Session() as session, asking(server, session=session, **PATIENT) as client:
        health = client.check(timeout=0.1)
    assert health.ok is False


def test_check_gives_its_connection_back(server, client):
    for _ in range(3):
        assert client.check().ok
    assert list(client.stream("Go")) == WORDS
    assert server.connections == 1


# One client


def test_a_client_is_shown_without_its_secrets():
    assert repr(sheepsse.Client()) == "<sheepsse.Client of the environment>"
    assert repr(sheepsse.Client("openai", api_key=KEY)) == "<sheepsse.Client openai>"
    shown = repr(sheepsse.Client(base_url=f"https://me:pass@h/v1?key={KEY}", api_key=KEY))
    assert shown == "<sheepsse.Client https://h/v1>"


def test_closing_a_client_closes_its_connections_and_not_the_client(server):
    client = sheepsse.Client(base_url=server.base_url, api_key=False, model=MODEL)
    client.close()
    assert list(client.stream("Go")) == WORDS
    assert server.open_connections == 1
    client.close()
    assert server.wait_closed(HANG)
    client.close()
    assert list(client.stream("Go")) == WORDS
    client.close()


def test_threads_share_a_client(server, client):
    server.default = Answer(pace=0.001)
    results = {}

    def ask(number):
        texts = [f"thread {number} says {turn}" for turn in range(5)]
        headers = [{"X-Local-Answer": json.dumps({"text": text})} for text in texts]
        results[number] = ["".join(client.stream("Go", headers=header)) for header in headers] == texts

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert results == dict.fromkeys(range(8), True)
    assert server.connections <= 8
    assert len(server.requests) == 40


def test_streams_of_one_client_may_be_read_by_turns(server, client):
    server.default = Answer(pace=0.001)
    streams = [client.stream("Go") for _ in range(3)]
    assert list(itertools.zip_longest(*streams)) == [(word,) * 3 for word in WORDS]
    assert server.connections == 3


# A session of the caller's own


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture
def tls_server(authority, monkeypatch, tmp_path):
    """A server that speaks TLS, by a certificate that this process trusts"""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    bundle = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(bundle))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(bundle))
    with LocalProvider(ssl_context=context) as provider:
        yield provider


@pytest.fixture(params=["plain", "tls"])
def either_server(request):
    """The server over plain TCP, then over TLS"""
    return request.getfixturevalue("server" if request.param == "plain" else "tls_server")


@pytest.fixture
def session():
    """A plain session, as anybody makes one"""
    with requests.Session() as made:
        yield made


@every_framing
def test_a_session_of_the_callers_own_is_used(either_server, session, framing):
    session.headers["X-Session"] = "mine"
    either_server.default = Answer(framing=framing)
    with asking(either_server, session=session) as client:
        for _ in range(3):
            assert list(client.stream("Go")) == WORDS
        assert client.complete("Go").text == TEXT
        assert client.check().ok
    assert {request.headers["X-Session"] for request in either_server.requests} == {"mine"}
    assert either_server.connections == (5 if "close" in framing else 1)


class Counting(requests.Session):
    """A session that counts its closing"""

    closed = 0

    def close(self):
        self.closed += 1
        super().close()


def test_closing_a_client_leaves_a_session_of_the_callers_own_open(server):
    with Counting() as session:
        with asking(server, session=session) as client:
            list(client.stream("Go"))
        assert session.closed == 0
        assert server.open_connections == 1


def test_a_stream_made_from_keywords_leaves_a_session_of_the_callers_own_open(server):
    with Counting() as session:
        for _ in range(2):
            list(sheepsse.stream("Go", model=MODEL, base_url=server.base_url, api_key=False, session=session))
        assert session.closed == 0
        assert server.connections == 1


@every_framing
def test_cancel_ends_a_read_over_a_session_of_the_callers_own(either_server, session, framing):
    either_server.default = Answer(framing=framing, stall_after=3)
    with asking(either_server, session=session, **PATIENT) as client:
        for number in range(10):
            stream = client.stream("Go")
            came = [next(stream), next(stream)]
            pause = number / 4000
            with in_another_thread(lambda stream=stream, pause=pause: (time.sleep(pause), stream.cancel())):
                more, error = read(stream)  # which nothing else ends
            assert type(error) is sheepsse.StreamCancelled, number
            assert (came, more) == (WORDS[:2], [])
            assert error.partial.text == "".join(came)
            error.__traceback__ = None
    assert either_server.wait_closed(HANG)


def test_a_late_cancel_never_hurts_another_stream_on_the_callers_session(either_server, session):
    with asking(either_server, session=session) as client:
        first = client.stream("Go")
        assert list(first) == WORDS
        either_server.answer(Answer(stall_after=3))
        second = client.stream("Go")
        came = [next(second)]
        first.cancel()
        either_server.release()
        more, error = read(second)
    assert (came + more, error) == (WORDS, None)


def test_cancel_between_the_words_of_one_block_never_hurts_another_stream(either_server, session):
    either_server.answer(Answer(events=[b"".join(chat_events(["one", "two"]))], framing="length"))
    with asking(either_server, session=session) as client:
        first = client.stream("Go")
        assert next(first) == "one"
        either_server.answer(Answer(stall_after=3))
        second = client.stream("Go")
        came = [next(second)]
        first.cancel()
        either_server.release()
        more, error = read(second)

    assert (came + more, error) == (WORDS, None)


def test_leaving_with_keeps_the_connection_of_the_callers_session(server, session):
    with asking(server, session=session) as client:
        for _ in range(3):
            with client.stream("Go") as stream:
                assert list(stream) == WORDS
    assert server.connections == 1


def test_leaving_early_lets_go_of_a_connection_of_the_callers_session(server, session):
    server.default = Answer(stall_after=3)
    with asking(server, session=session) as client:
        for _ in client.stream("Go"):
            break
        assert server.wait_closed(HANG)
        with client.stream("Go") as stream:
            next(stream)
        assert server.wait_closed(HANG)


#: in one write, as nothing is said of what comes between the role and the word
FIRST = [b"".join(chat_events(WORDS[:1], finish=None, done=False))]


@pytest.mark.parametrize(
    ("limit", "answer"),
    [
        ("idle_timeout", Answer(events=[*FIRST, b":"], stall_after=1, keepalive=0.01)),
        ("idle_timeout", Answer(events=[*FIRST, b":"], stall_after=1, keepalive=0.01, framing="gzip-close")),
        ("idle_timeout", Answer(events=[*FIRST, *[b"x"] * 5000], pace=0.01, framing="length")),
        ("first_timeout", Answer(stall_after=0, keepalive=0.01)),
        ("first_timeout", Answer(events=itertools.repeat(COMMENT), pace=0.01, framing="close")),
        ("first_timeout", Answer(delay=FOREVER)),
        ("deadline", Answer(events=itertools.repeat(chunk_event(content="x")), pace=0.01)),
        ("deadline", Answer(stall_after=2)),
    ],
)
def test_limits_hold_over_a_session_of_the_callers_own(either_server, session, limit, answer):
    either_server.answer(answer)
    options = {} if limit == "deadline" else {limit: 0.1}
    with asking(either_server, session=session, **{**PATIENT, **options}) as client:
        _, error = read(client.stream("Go", deadline=0.1 if limit == "deadline" else None))
    assert type(error) is sheepsse.StreamTimeout
    assert limit in str(error)
    assert either_server.wait_closed(HANG)


@every_framing
def test_a_cut_over_a_session_of_the_callers_own_is_never_taken_for_whole(server, session, framing):
    server.answer(Answer(framing=framing, cut_after=3))
    with asking(server, session=session) as client:
        came, error = read(client.stream("Go"))
    assert came == WORDS[:2]
    assert type(error) is sheepsse.StreamInterrupted
    assert error.partial.text == "".join(came)


def test_the_retries_of_the_callers_session_come_on_top(server):
    server.answer(error_answer(503), error_answer(503), error_answer(503))
    waits = []
    with sheepsse.session(sheepsse.Retry(1, sleep=waits.append)) as session:
        with asking(server, session=session, retry=sheepsse.Retry(1, sleep=waits.append)) as client:
            assert list(client.stream("Go")) == WORDS
    assert (len(server.requests), len(waits)) == (4, 3)


def test_sheepsse_session_can_be_the_callers_own(server):
    with sheepsse.session() as session, asking(server, session=session) as client:
        assert list(client.stream("Go")) == WORDS
        assert list(client.stream("Go")) == WORDS
    assert server.connections == 1


URL = "https://api.example.com/v1"


def mocked(mock, events, status=200, **options):
    body = b"".join(events)
    mock.add(responses.POST, f"{URL}/chat/completions", body=body, status=status, **options)


@pytest.mark.parametrize("given", [True, False])
def test_responses_can_stand_in_for_the_network(given):
    with requests.Session() as session, responses.RequestsMock() as mock:
        mocked(mock, chat_events(WORDS), content_type="text/event-stream")
        mocked(mock, [b'{"error": {"message": "No"}}'], status=400, content_type=JSON)
        mocked(mock, chat_events(WORDS)[:3], content_type="text/event-stream")
        options = {"session": session} if given else {}
        with sheepsse.Client(base_url=URL, api_key=KEY, model=MODEL, retry=0, **options) as client:
            assert list(client.stream("Go")) == WORDS
            assert type(read(client.stream("Go"))[1]) is sheepsse.InvalidRequestError
            stream = client.stream("Go")
            came, error = read(stream)
            assert came == WORDS[:2]
            assert type(error) is sheepsse.StreamInterrupted
            stream.cancel()
        assert mock.calls[0].request.headers["Authorization"] == f"Bearer {KEY}"


class OtherSession:
    """Shaped like a session, as another library's is"""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    def request(self, method, url, **options):
        self.asked.append((method, url, options))
        return self.answers.pop(0)

    def close(self):
        pytest.fail("it is not ours to close")


class OtherResponse:
    """Shaped like a response: its bytes, and nothing of urllib3 below"""

    raw = None
    status_code = 200
    request = None

    def __init__(self, body, **attributes):
        self.headers = {"Content-Type": "text/event-stream"}
        self.closed = False
        self._body = body
        self.__dict__.update(attributes)

    def iter_content(self, size):
        return (self._body[at : at + size] for at in range(0, len(self._body), size))

    def close(self):
        self.closed = True


def test_a_session_of_another_library_will_do():
    whole, cut = OtherResponse(b"".join(chat_events(WORDS))), OtherResponse(b"".join(chat_events(WORDS)[:3]))
    refused = OtherResponse(b'{"error": {"message": "No"}}', status_code=400)
    session = OtherSession(whole, cut, refused)
    with sheepsse.Client(base_url=URL, api_key=KEY, model=MODEL, retry=0, session=session) as client:
        assert list(client.stream("Go")) == WORDS
        came, error = read(client.stream("Go"))
        assert (came, type(error)) == (WORDS[:2], sheepsse.StreamInterrupted)
        _, error = read(client.stream("Go"))
        assert type(error) is sheepsse.InvalidRequestError
        assert "No" in str(error)
    assert whole.closed
    assert cut.closed
    assert refused.closed
    method, url, options = session.asked[0]
    assert (method, url, options["stream"]) == ("POST", f"{URL}/chat/completions", True)


def test_a_stream_of_another_library_can_be_cancelled_between_two_words():
    session = OtherSession(OtherResponse(b"".join(chat_events(WORDS))))
    with sheepsse.Client(base_url=URL, api_key=KEY, model=MODEL, retry=0, session=session) as client:
        stream = client.stream("Go")
        came = [next(stream)]
        stream.cancel()
        more, error = read(stream)
    assert (came, more, type(error)) == (WORDS[:1], [], sheepsse.StreamCancelled)


# Errors and their bodies


def test_the_body_of_an_error_is_read_for_a_limited_time(server, monkeypatch):
    monkeypatch.setattr(sheepsse, "_ERROR_BODY_TIME", 0.1)
    server.answer(Answer(status=503, events=itertools.repeat(b"x"), pace=0.02))
    with asking(server, **PATIENT) as client:
        _, error = read(client.stream("Go"))
    assert type(error) is sheepsse.ServerError
    assert server.wait_closed(HANG)


def test_no_more_of_an_errors_body_is_read_than_is_of_use(server, client):
    server.answer(Answer(status=400, events=itertools.repeat(b"x" * 65536), framing="close"))
    _, error = read(client.stream("Go"))
    assert type(error) is sheepsse.InvalidRequestError
    assert len(error.response.content) <= 65536
    assert len(str(error)) < 1000
    assert server.wait_closed(HANG)


def test_an_error_whose_body_is_lost_is_the_same_error(server, client):
    for how in ({"cut_at": 5}, {"cut_at": 5, "cut": "reset"}, {"cut_at": 0}):
        server.answer(error_answer(429, headers={"Retry-After": "3"})._replace(**how))
        _, error = read(client.stream("Go"))
        assert type(error) is sheepsse.RateLimitError
        assert error.retry_after == 3


def test_an_option_that_is_not_there_may_be_switched_off(server, client):
    assert list(client.stream("Go", checkpoint=None, fallback=False)) == WORDS
    assert not {"checkpoint", "fallback"} & set(server.requests[0].json)


def test_an_answer_without_content_is_no_stream_and_not_asked_for_again(server):
    server.default = Answer(status=204)
    with asking(server, retry=3) as client:
        _, error = read(client.stream("Go"))
    assert type(error) is sheepsse.InvalidStreamError
    assert error.status == 204
    assert len(server.requests) == 1


def test_a_client_may_say_how_its_server_continues_a_partial_answer(server):
    server.answer(Answer(text="One two three four", cut_after=3), Answer(text=" three four"))
    with sheepsse.Client(base_url=server.base_url, api_key=False, continuation="vllm") as client:
        stream = client.stream("Count", model="m")
        assert "".join(stream).startswith("One")
        assert stream.continuity == "continued"
        assert server.requests[1].json["continue_final_message"] is True
        assert pickle.loads(pickle.dumps(client))._continuation == "vllm"
    with pytest.raises(ValueError, match="continuation is one of deepseek, mistral, vllm, anthropic"):
        sheepsse.Client(base_url=server.base_url, continuation="magic")
