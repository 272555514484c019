"""Section 11, what may be passed: options by name, keys, addresses, and values of the wrong type"""

import contextlib
import re
import traceback

import pytest

import sheepsse
from local_provider import DIALECT_BASES, Answer, json_completion

SECRET = "http://bob:s3cret@proxy"
KEYS = [row.key_variable for row in sheepsse.PROVIDERS.values() if row.key_variable]


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in {*KEYS, *(row.base_variable for row in sheepsse.PROVIDERS.values() if row.base_variable)}:
        monkeypatch.delenv(name, raising=False)


def sent(server, **options):
    """The body of a request with these options, to a server that takes any"""
    server.default = Answer(body=json_completion("Good day"))
    if "dialect" in options:
        server.default = Answer()
    options.setdefault("base_url", server.base_url)
    sheepsse.complete("Good day?", model="m-1", api_key=False, **options)
    return server.requests[-1].json


# Names


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("temprature", "temperature"),
        ("apikey", "api_key"),
        ("apiKey", "api_key"),
        ("baseUrl", "base_url"),
        ("chekpoint", "checkpoint"),
        ("idle_timout", "idle_timeout"),
        ("max_token", "max_tokens"),
        ("modle", "model"),
        ("tool", "tools"),
        ("fall_back", "fallback"),
    ],
)
@pytest.mark.parametrize("function", [sheepsse.stream, sheepsse.complete])
def test_a_misspelt_option_is_an_error_that_names_the_right_one(server, function, wrong, right):
    with pytest.raises(TypeError, match=f"^{wrong}= is no option here: did you mean {right}=") as caught:
        function("Good day?", model="m", base_url=server.base_url, **{"api_key": "k-12345", wrong: SECRET})
    assert "s3cret" not in str(caught.value)
    assert server.requests == []


#: arguments of requests and of the SDKs of OpenAI, Anthropic and Google that are none of ours
FOREIGN = [
    *("url", "params", "data", "json", "cookies", "files", "auth", "hooks", "allow_redirects", "stream"),
    *("organization", "project", "max_retries", "default_headers", "default_query", "http_client", "auth_token"),
    *("extra_headers", "extra_query", "azure_endpoint", "azure_deployment", "azure_ad_token", "api_version"),
    *("http_options", "callbacks", "proxy", "resume"),
]


@pytest.mark.parametrize("name", FOREIGN)
def test_an_option_of_requests_or_of_an_sdk_is_an_error_that_says_what_to_do(server, name):
    with pytest.raises(TypeError, match=f"^{name}= is no option here: [a-z]"):
        sheepsse.complete("Good day?", model="m", base_url=server.base_url, api_key=False, **{name: SECRET})
    assert server.requests == []


def test_stream_as_an_option_says_which_function_to_call(server):
    with pytest.raises(TypeError, match=r"stream\(\) streams, complete\(\) returns the whole answer"):
        sheepsse.stream("Good day?", stream=False, model="m", base_url=server.base_url, api_key=False)


@pytest.mark.parametrize(
    "name", ["min_p", "top_k", "models", "seed", "think", "user", "store", "safety_settings", "topK"]
)
def test_an_option_that_some_vendor_has_goes_into_the_request(server, name):
    assert sent(server, **{name: 5})[name] == 5


@pytest.mark.parametrize("name", ["guided_json", "chat_template_kwargs", "best_of", "x"])
def test_an_option_that_is_like_no_other_goes_into_the_request(server, name):
    assert sent(server, **{name: 5})[name] == 5


def test_extra_body_takes_any_name(server):
    body = sent(server, extra_body={"temprature": 1, "auth": 2, "provider": {"order": ["a"]}})
    assert (body["temprature"], body["auth"], body["provider"]) == (1, 2, {"order": ["a"]})


def test_options_of_a_client_never_enter_the_body(server):
    body = sent(server, proxies={}, verify=True, cert=None, timeout=5, headers={"X-Own": "1"})
    assert set(body) == {"model", "messages", "stream"}


def test_a_misspelt_option_of_a_batch_is_an_error_before_anything_is_sent(server):
    for wrong, right in (("temprature", "temperature"), ("wokers", "workers"), ("stop_onn", "stop_on")):
        with pytest.raises(TypeError, match=f"did you mean {right}="):
            sheepsse.batch(["one"], model="m", base_url=server.base_url, api_key=False, **{wrong: 3})
    assert server.requests == []


def test_dir_shows_the_public_names_alone():
    assert dir(sheepsse) == sorted([*sheepsse.__all__, "__version__"])


# The system message


@pytest.mark.parametrize("dialect", sheepsse.DIALECTS)
def test_system_is_the_vendors_system_message_before_the_others(server, dialect):
    body = sent(server, base_url=server.origin + DIALECT_BASES[dialect], dialect=dialect, system="Be brief.")
    turn = {"role": "system", "content": "Be brief."}
    found = {
        "openai": lambda: body["messages"][0] == turn and "system" not in body,
        "openai-responses": lambda: body["input"][0] == turn,
        "anthropic": lambda: body["system"] == "Be brief.",
        "gemini": lambda: body["systemInstruction"] == {"parts": [{"text": "Be brief."}]},
        "ollama": lambda: body["messages"][0] == turn and "system" not in body,
    }
    assert found[dialect]()


@pytest.mark.parametrize("role", ["system", "developer"])
def test_system_beside_a_system_message_is_an_error(role):
    messages = [{"role": role, "content": "Be kind."}, {"role": "user", "content": "Good day?"}]
    with pytest.raises(ValueError, match="pass one of the two"):
        sheepsse.stream(messages, system="Be brief.", model="m", api_key="k-12345")


# Values of the wrong type


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"timeout": "5"}, "timeout is a number of seconds"),
        ({"timeout": (1, "5")}, "timeout is a number of seconds"),
        ({"timeout": (1, 2, 3)}, r"two of them, \(connect, read\)"),
        ({"first_timeout": "5"}, "first_timeout is a number of seconds"),
        ({"idle_timeout": [5]}, "idle_timeout is a number of seconds"),
        ({"deadline": "5"}, "deadline is a number of seconds"),
        ({"retry": "5"}, "retry takes a sheepsse.Retry"),
        ({"prices": {"m": (1, 2)}}, r"prices are sheepsse.Price\(input, output\) by model"),
        ({"format": "xml"}, "format is one of auto, sse, json, jsonl"),
        ({"client": "openai"}, "client= is a sheepsse.Client"),
        ({"client": ["openai"]}, "client= is a sheepsse.Client"),
        (
            {"provider": "http://bob:s3cret@host/v1"},
            "provider is a name; for an address pass base_url='http://host/v1'",
        ),
        ({"api_key": "Bearer sk-12345"}, "is the key alone, without the word Bearer"),
        ({"base_url": "localhost:8000"}, "expected a base_url like"),
    ],
)
def test_a_value_of_the_wrong_type_is_one_sentence(options, expected):
    settings = {"api_key": "k-12345", **options} if "client" not in options else options
    with pytest.raises((TypeError, ValueError, sheepsse.SheepError), match=expected) as caught:
        sheepsse.stream("Good day?", model="m", **settings)
    assert "s3cret" not in str(caught.value)
    assert "sk-12345" not in str(caught.value)


def test_a_message_without_a_role_is_an_error_that_sends_nothing(server):
    with pytest.raises(sheepsse.InvalidRequestError, match="a role and a content, got one with"):
        sheepsse.complete([{"content": "Hi"}], model="m", base_url=server.base_url, api_key=False)
    assert server.requests == []


# Providers and addresses


def chosen(model, **options):
    """The provider, the URL and the dialect of a request"""
    client = sheepsse.Client(**options)
    target = client._target(model, {})
    return target.provider, target.dialect.url(target.base_url, model, True), target.dialect.name


@pytest.mark.parametrize("provider", [None, "auto"])
def test_auto_is_the_choice_by_the_environment(monkeypatch, provider):
    monkeypatch.setenv("DEEPSEEK_API_KEY", "k-12345")
    assert chosen("deepseek-chat", provider=provider)[0] == "deepseek"


def test_a_model_goes_to_a_provider_that_serves_it_or_to_none(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k-12345")
    assert chosen("gpt-4o")[0] == chosen("ft:own")[0] == "openai"
    with pytest.raises(sheepsse.AuthenticationError, match="no API key for claude-x: set ANTHROPIC_API_KEY"):
        sheepsse.stream("Good day?", model="claude-x")
    monkeypatch.setenv("HOLYSHEEP_API_KEY", "k-12345")
    assert chosen("claude-x")[0] == "holysheep"


@pytest.mark.parametrize(
    ("base_url", "url", "dialect"),
    [
        ("https://host/v1/chat/completions", "https://host/v1/chat/completions", "openai"),
        ("https://host/v1/chat/completions/", "https://host/v1/chat/completions", "openai"),
        ("https://host/v1/responses", "https://host/v1/responses", "openai-responses"),
        ("https://host/v1/messages?beta=true", "https://host/v1/messages?beta=true", "anthropic"),
        ("http://host:11434/api/chat", "http://host:11434/api/chat", "ollama"),
        ("https://api.openai.com", "https://api.openai.com/v1/chat/completions", "openai"),
        ("https://openrouter.ai/", "https://openrouter.ai/api/v1/chat/completions", "openai"),
        ("https://api.mistral.ai", "https://api.mistral.ai/v1/chat/completions", "openai"),
        ("https://api.anthropic.com", "https://api.anthropic.com/v1/messages", "anthropic"),
        (
            "https://generativelanguage.googleapis.com/v1beta/openai/",
            "https://generativelanguage.googleapis.com/v1beta/openai/chat/completions",
            "openai",
        ),
    ],
)
def test_a_base_url_may_be_a_whole_endpoint_or_a_known_host(base_url, url, dialect):
    assert chosen("m", base_url=base_url, api_key="k-12345")[1:] == (url, dialect)


@pytest.mark.parametrize(
    ("provider", "variable", "value", "url"),
    [
        ("openai", "OPENAI_BASE_URL", "http://gate/v1", "http://gate/v1/chat/completions"),
        ("openai-responses", "OPENAI_BASE_URL", "http://gate/v1", "http://gate/v1/responses"),
        ("anthropic", "ANTHROPIC_BASE_URL", "http://gate", "http://gate/v1/messages"),
        (
            "gemini",
            "GOOGLE_GEMINI_BASE_URL",
            "http://gate",
            "http://gate/v1beta/models/m:streamGenerateContent?alt=sse",
        ),
    ],
)
def test_a_vendors_own_variable_replaces_its_address_and_gets_its_key(monkeypatch, provider, variable, value, url):
    row = sheepsse.PROVIDERS[provider]
    monkeypatch.setenv(row.key_variable, "k-12345")
    monkeypatch.setenv(variable, value)
    assert chosen("m", provider=provider)[1] == url
    others = [name for name, other in sheepsse.PROVIDERS.items() if other.base_variable != variable]
    for name in others:
        monkeypatch.setenv(sheepsse.PROVIDERS[name].key_variable or "NO_KEY", "k-12345")
        assert "//gate" not in chosen("m", provider=name)[1]
    # an address that is passed is not replaced
    assert chosen("m", base_url=row.base_url)[1].startswith(row.base_url)


def test_check_says_that_no_key_serves_the_model(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k-12345")
    with contextlib.closing(sheepsse.Client(model="claude-x")) as client:
        assert client.check().status == "no_key"


# What a first error shows


@pytest.mark.parametrize("method", ["stream", "complete"])
@pytest.mark.parametrize("failing", ["key", "connection", "option"])
def test_a_traceback_has_few_frames_of_ours(server, method, failing):
    settings = {"provider": "deepseek"} if failing == "key" else {"base_url": "http://127.0.0.1:1/v1", "api_key": False}
    with contextlib.closing(sheepsse.Client(retry=0, **settings)) as client:
        try:
            "".join(
                getattr(client, method)("Good day?", model="m", **({"temprature": 1} if failing == "option" else {}))
            )
        except (sheepsse.SheepError, TypeError) as error:
            frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [frame for frame in frames if frame.f_code.co_filename == sheepsse.__file__]
    assert 1 <= len(ours) <= 6


def test_a_cut_that_cannot_be_resumed_says_what_came_and_what_to_do(server):
    server.answer(Answer(text="Một hai ba", cut_after=3))
    with pytest.raises(sheepsse.StreamInterrupted) as caught:
        list(sheepsse.stream("Good day?", model="m", base_url=server.base_url, api_key=False))
    count = len(caught.value.partial.text)
    assert count
    said = str(caught.value)
    assert said.startswith("the connection was lost in the middle of the answer")
    assert f"this server cannot continue an answer: error.partial has the {count} characters that came." in said
    assert "pass resume='verify'" in said
    server.answer(Answer(text="One two three", cut_after=3), Answer(text="One two three"))
    again = sheepsse.stream("Good day?", model="m", base_url=server.base_url, api_key=False, resume="verify")
    assert "".join(again) == "One two three"


@pytest.mark.parametrize(
    ("dialect", "refused"),
    [
        ("openai", "Unrecognized request argument supplied: wrong_one"),
        ("openai-responses", "Unknown parameter: 'wrong_one'."),
        ("anthropic", "wrong_one: Extra inputs are not permitted"),
        ("gemini", 'Unknown name "wrong_one"'),
    ],
)
def test_the_local_provider_refuses_what_the_services_refuse(server, dialect, refused):
    base_url = server.origin + DIALECT_BASES[dialect]
    with sheepsse.Client(base_url=base_url, dialect=dialect, api_key=False) as client:
        with pytest.raises(sheepsse.InvalidRequestError, match=re.escape(refused)):
            client.complete("Good day?", model="m", extra_body={"wrong_one": 1})


def test_a_wrong_path_names_the_url_and_what_to_try(server):
    server.answer(Answer(status=404, body=b'{"error": {"message": "Not Found"}}'))
    with pytest.raises(sheepsse.SheepError, match=r"/v9/chat/completions.* the right address\? Pass the base_url"):
        sheepsse.complete("Good day?", model="m", base_url=server.origin + "/v9", api_key=False)
