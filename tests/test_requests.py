"""Section 5, what is sent in each dialect: the address, the headers and the body"""

import copy
import json

import pytest

import local_provider
import sheepsse
import transcripts
from transcripts_vendors import (
    ANTHROPIC,
    GEMINI,
    OLLAMA,
    RESPONSES,
    anthropic,
    block,
    called,
    crlf,
    gemini,
    item,
    last,
    line,
    lines,
    media_type,
    message_end,
    message_start,
    named,
    numbered,
    ollama,
    ollama_call,
    response,
    responses,
    said,
    text_block,
    thinking_block,
    tool_block,
)

KEY = "k-12345"
SHORT = {
    "openai": transcripts.TRANSCRIPTS[0],
    "openai-responses": RESPONSES[0],
    "anthropic": ANTHROPIC[0],
    "gemini": GEMINI[0],
    "ollama": OLLAMA[0],
}
VENDORS = [name for name in SHORT if name != "openai"]

SCHEMA = {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]}
LOOK = {"type": "function", "function": {"name": "look", "description": "Looks there", "parameters": SCHEMA}}
NOW = {"type": "function", "function": {"name": "now"}}
PIXEL = "iVBORw0KGgo="
DATA_URL = f"data:image/png;base64,{PIXEL}"
HTTP_URL = "https://example.com/a/sheep.jpg?size=2"


def text(words):
    return {"type": "text", "text": words}


def image(url, **fields):
    return {"type": "image_url", "image_url": {"url": url, **fields}}


def call(id, name, arguments):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(id, content, **fields):
    return {"role": "tool", "tool_call_id": id, "content": content, **fields}


USER = {"role": "user", "content": "Good day?"}
TWO_CALLS = [
    {"role": "user", "content": "Where?"},
    {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [call("call-a", "look", '{"at": "Hà Nội"}'), call("call-b", "now", "")],
    },
    result("call-b", "noon"),
    result("call-a", '{"seen": ["sheep"]}'),
]


def asked(server, dialect, messages="Good day?", base=None, transcript=None, **params):
    """The request that such a question sends"""
    answer(server, dialect, messages, base, transcript, **params)
    return server.requests[-1]


def answer(server, dialect, messages="Good day?", base=None, transcript=None, **params):
    """What comes of a question that is answered so"""
    given = transcript or SHORT[dialect]
    server.answer(local_provider.Answer(body=given.body, content_type=media_type(given)))
    base_url = server.origin + (local_provider.DIALECT_BASES[dialect] if base is None else base)
    with sheepsse.Client(base_url=base_url, api_key=KEY, dialect=dialect, model="m-1", retry=0) as client:
        stream = client.stream(messages, **params)
        assert "".join(stream) == given.text
    return stream.completion


def sent(server, dialect, messages="Good day?", **params):
    return asked(server, dialect, messages, **params).json


# The address and the headers


@pytest.mark.parametrize(
    ("dialect", "base", "path"),
    [
        ("anthropic", "", "/v1/messages"),
        ("anthropic", "/", "/v1/messages"),
        ("anthropic", "/v1", "/v1/messages"),
        ("anthropic", "/v1/", "/v1/messages"),
        ("anthropic", "/proxy", "/proxy/v1/messages"),
        ("anthropic", "/proxy/v1?team=7", "/proxy/v1/messages?team=7"),
        ("gemini", "", "/v1beta/models/m-1:streamGenerateContent?alt=sse"),
        ("gemini", "/v1beta", "/v1beta/models/m-1:streamGenerateContent?alt=sse"),
        ("gemini", "/v1alpha/", "/v1alpha/models/m-1:streamGenerateContent?alt=sse"),
        ("gemini", "/v1", "/v1/models/m-1:streamGenerateContent?alt=sse"),
        ("gemini", "/proxy?team=7", "/proxy/v1beta/models/m-1:streamGenerateContent?team=7&alt=sse"),
        ("openai-responses", "/v1", "/v1/responses"),
        ("openai-responses", "/openai/v1?api-version=preview", "/openai/v1/responses?api-version=preview"),
        ("ollama", "", "/api/chat"),
        ("ollama", "/api", "/api/chat"),
        ("ollama", "/api/", "/api/chat"),
        ("ollama", "/v1", "/api/chat"),
        ("ollama", "/v1/", "/api/chat"),
        ("ollama", "/proxy", "/proxy/api/chat"),
    ],
)
def test_the_path_follows_whichever_end_a_base_url_has(server, dialect, base, path):
    assert asked(server, dialect, base=base).path == path


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ("models/m-2", "/v1beta/models/m-2:streamGenerateContent?alt=sse"),
        ("tunedModels/m-2", "/v1beta/tunedModels/m-2:streamGenerateContent?alt=sse"),
        ("m 2", "/v1beta/models/m%202:streamGenerateContent?alt=sse"),
    ],
)
def test_geminis_model_is_in_the_path(server, model, path):
    request = asked(server, "gemini", model=model)
    assert request.path == path
    assert "model" not in request.json


@pytest.mark.parametrize(
    ("dialect", "header", "value"),
    [
        ("anthropic", "x-api-key", KEY),
        ("gemini", "x-goog-api-key", KEY),
        ("openai-responses", "Authorization", f"Bearer {KEY}"),
        ("ollama", "Authorization", f"Bearer {KEY}"),
    ],
)
def test_the_key_is_in_the_header_of_its_dialect_and_nowhere_else(server, dialect, header, value):
    request = asked(server, dialect)
    assert request.headers[header] == value
    assert [name for name, given in request.headers.items() if KEY in given] == [header]
    assert KEY not in request.path
    assert KEY.encode() not in request.body


def test_anthropic_is_told_the_version_which_a_caller_may_set(server):
    assert asked(server, "anthropic").headers["anthropic-version"] == "2023-06-01"
    headers = {"anthropic-version": "2026-10-21", "anthropic-beta": "some-beta"}
    request = asked(server, "anthropic", headers=headers)
    assert request.headers.get_all("anthropic-version") == ["2026-10-21"]
    assert request.headers["anthropic-beta"] == "some-beta"


def test_azure_is_a_base_url_and_a_header(server):
    server.answer(local_provider.Answer(body=SHORT["openai"].body))
    base_url = f"{server.origin}/openai/deployments/dep?api-version=2024-10-21"
    with sheepsse.Client(base_url=base_url, dialect="openai", headers={"api-key": KEY}) as client:
        assert "".join(client.stream("Good day?", model="m-1")) == SHORT["openai"].text
    request = server.requests[0]
    assert request.path == "/openai/deployments/dep/chat/completions?api-version=2024-10-21"
    assert request.headers["api-key"] == KEY
    assert "Authorization" not in request.headers


@pytest.mark.parametrize(
    ("dialect", "path", "body"),
    [
        (
            "anthropic",
            "/v1/messages",
            {"model": "m-1", "max_tokens": 8192, "messages": [USER], "stream": False},
        ),
        (
            "gemini",
            "/v1beta/models/m-1:generateContent",
            {"contents": [{"role": "user", "parts": [{"text": "Good day?"}]}]},
        ),
        ("openai-responses", "/v1/responses", {"model": "m-1", "input": [USER], "stream": False}),
        ("ollama", "/api/chat", {"model": "m-1", "messages": [USER], "stream": False}),
    ],
)
def test_a_plain_question_is_sent_as_little_more_than_itself(server, dialect, path, body):
    base_url = server.origin + local_provider.DIALECT_BASES[dialect]
    with sheepsse.Client(base_url=base_url, api_key=KEY, dialect=dialect, model="m-1", retry=0) as client:
        assert client.complete("Good day?").text == local_provider.TEXT
    assert (server.requests[0].path, server.requests[0].json) == (path, body)
    streamed = {**body, "stream": True} if "stream" in body else body
    assert sent(server, dialect) == streamed


# Messages

SYSTEM = [{"role": "system", "content": "Be brief."}, USER, {"role": "developer", "content": "Be kind."}]


def test_system_messages_are_put_where_the_vendor_has_them(server):
    body = sent(server, "anthropic", SYSTEM)
    assert (body["system"], body["messages"]) == ("Be brief.\n\nBe kind.", [USER])
    body = sent(server, "gemini", SYSTEM)
    assert body["systemInstruction"] == {"parts": [{"text": "Be brief."}, {"text": "Be kind."}]}
    assert body["contents"] == [{"role": "user", "parts": [{"text": "Good day?"}]}]
    assert sent(server, "openai-responses", SYSTEM)["input"] == SYSTEM
    roles = [message["role"] for message in sent(server, "ollama", SYSTEM)["messages"]]
    assert roles == ["system", "user", "system"]


def test_a_callers_own_system_comes_before_the_messages(server):
    cached = {"type": "text", "text": "First.", "cache_control": {"type": "ephemeral"}}
    assert sent(server, "anthropic", [USER], system=[cached])["system"] == [cached]
    listed = [{"role": "system", "content": [cached]}, USER]
    assert sent(server, "anthropic", listed)["system"] == [cached]
    body = sent(server, "gemini", SYSTEM[:2], systemInstruction={"parts": [{"text": "First."}]})
    assert body["systemInstruction"] == {"parts": [{"text": "First."}, {"text": "Be brief."}]}


@pytest.mark.parametrize("name", ["systemInstruction", "system_instruction"])
@pytest.mark.parametrize("given", ["First.", {"parts": "First."}, {"parts": {"text": "First."}}, {"parts": ["First."]}])
def test_geminis_system_instruction_may_be_written_in_any_way(server, name, given):
    body = sent(server, "gemini", SYSTEM[:2], **{name: given})
    assert body["systemInstruction"] == {"parts": [{"text": "First."}, {"text": "Be brief."}]}
    assert "system_instruction" not in body


def test_geminis_config_may_be_written_with_an_underscore(server):
    body = sent(server, "gemini", max_tokens=5, generation_config={"topK": 3})
    assert body["generationConfig"] == {"maxOutputTokens": 5, "topK": 3}
    assert "generation_config" not in body


@pytest.mark.parametrize(("dialect", "where"), [("anthropic", "messages"), ("gemini", "contents")])
@pytest.mark.parametrize("content", [None, "", []])
def test_an_answer_that_said_nothing_is_left_out_where_it_would_be_refused(server, dialect, where, content):
    talk = [USER, {"role": "assistant", "content": content}, USER]
    assert len(sent(server, dialect, talk)[where]) == 2


@pytest.mark.parametrize("dialect", ["anthropic", "gemini", "openai-responses"])
@pytest.mark.parametrize("none", [[], None])
def test_no_tools_are_none_whichever_way_that_is_said(server, dialect, none):
    body = sent(server, dialect, tools=none, tool_choice="auto")
    assert not {"tools", "tool_choice", "toolConfig"}.intersection(body)


@pytest.mark.parametrize("dialect", ["gemini", "ollama"])
def test_an_image_in_a_result_is_an_error_where_it_would_be_lost(server, dialect):
    talk = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call("c-1", "look", "{}")]},
        {"role": "tool", "tool_call_id": "c-1", "content": [text("See"), image(DATA_URL)]},
    ]
    with pytest.raises(sheepsse.InvalidRequestError, match="can only be text"):
        sent(server, dialect, talk)
    assert server.requests == []


@pytest.mark.parametrize("dialect", ["anthropic", "openai-responses"])
def test_an_image_in_a_result_is_translated_where_it_can_be(server, dialect):
    talk = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call("c-1", "look", "{}")]},
        {"role": "tool", "tool_call_id": "c-1", "content": [text("See"), image(DATA_URL)]},
    ]
    assert PIXEL in json.dumps(sent(server, dialect, talk))


@pytest.mark.parametrize("dialect", sheepsse.DIALECTS)
def test_what_is_no_message_is_an_error_that_sends_nothing(server, dialect):
    with pytest.raises(sheepsse.InvalidRequestError, match="a message is a dict with"):
        sent(server, dialect, ["Good day?"])
    assert server.requests == []


@pytest.mark.parametrize("dialect", sheepsse.DIALECTS)
def test_what_is_no_tool_call_is_an_error_that_sends_nothing(server, dialect):
    with pytest.raises(sheepsse.InvalidRequestError, match="a tool call is a dict with"):
        sent(server, dialect, [USER, {"role": "assistant", "tool_calls": ["look"]}])
    assert server.requests == []


def test_roles_are_the_vendors(server):
    talk = [USER, {"role": "assistant", "content": "Good."}, {"role": "user", "content": "Why?"}]
    assert sent(server, "anthropic", talk)["messages"] == talk
    assert sent(server, "openai-responses", talk)["input"] == talk
    assert sent(server, "ollama", talk)["messages"] == talk
    assert [content["role"] for content in sent(server, "gemini", talk)["contents"]] == ["user", "model", "user"]


def test_images_are_translated(server):
    messages = [{"role": "user", "content": [text("What is it?"), image(DATA_URL), image(HTTP_URL, detail="low")]}]
    assert sent(server, "anthropic", messages)["messages"][0]["content"] == [
        text("What is it?"),
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}},
        {"type": "image", "source": {"type": "url", "url": HTTP_URL}},
    ]
    assert sent(server, "gemini", messages)["contents"][0]["parts"] == [
        {"text": "What is it?"},
        {"inlineData": {"mimeType": "image/png", "data": PIXEL}},
        {"fileData": {"fileUri": HTTP_URL, "mimeType": "image/jpeg"}},
    ]
    assert sent(server, "openai-responses", messages)["input"][0]["content"] == [
        {"type": "input_text", "text": "What is it?"},
        {"type": "input_image", "image_url": DATA_URL},
        {"type": "input_image", "image_url": HTTP_URL, "detail": "low"},
    ]
    assert sent(server, "ollama", [{"role": "user", "content": messages[0]["content"][:2]}])["messages"] == [
        {"role": "user", "content": "What is it?", "images": [PIXEL]}
    ]


def test_the_detail_of_an_image_in_a_data_url_is_kept(server):
    messages = [{"role": "user", "content": [image(DATA_URL, detail="low")]}]
    assert sent(server, "openai-responses", messages)["input"][0]["content"] == [
        {"type": "input_image", "image_url": DATA_URL, "detail": "low"}
    ]


def test_ollama_fetches_no_images(server):
    with pytest.raises(sheepsse.InvalidRequestError, match="data: URL"):
        sent(server, "ollama", [{"role": "user", "content": [image(HTTP_URL)]}])
    assert server.requests == []


def test_the_texts_of_an_assistant_are_output_for_responses(server):
    messages = [USER, {"role": "assistant", "content": [text("Good.")]}, USER]
    assert sent(server, "openai-responses", messages)["input"][1] == {
        "role": "assistant",
        "content": [{"type": "output_text", "text": "Good."}],
    }


# Tools


def test_tools_are_declared_in_the_vendors_shape(server):
    tools = [LOOK, NOW]
    assert sent(server, "anthropic", tools=tools)["tools"] == [
        {"name": "look", "description": "Looks there", "input_schema": SCHEMA},
        {"name": "now", "input_schema": {"type": "object", "properties": {}}},
    ]
    assert sent(server, "gemini", tools=tools)["tools"] == [
        {
            "functionDeclarations": [
                {"name": "look", "description": "Looks there", "parametersJsonSchema": SCHEMA},
                {"name": "now"},
            ]
        }
    ]
    assert sent(server, "openai-responses", tools=tools)["tools"] == [
        {"type": "function", "name": "look", "description": "Looks there", "parameters": SCHEMA, "strict": False},
        {"type": "function", "name": "now", "strict": False},
    ]
    assert sent(server, "ollama", tools=tools)["tools"] == tools


def test_a_strict_tool_stays_strict_for_responses(server):
    strict = {"type": "function", "function": {**LOOK["function"], "strict": True}}
    assert sent(server, "openai-responses", tools=[strict])["tools"][0]["strict"] is True


CHOICES = {
    "auto": ({"type": "auto"}, {"mode": "AUTO"}, "auto"),
    "none": ({"type": "none"}, {"mode": "NONE"}, "none"),
    "required": ({"type": "any"}, {"mode": "ANY"}, "required"),
    "look": (
        {"type": "tool", "name": "look"},
        {"mode": "ANY", "allowedFunctionNames": ["look"]},
        {"type": "function", "name": "look"},
    ),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_the_choice_of_a_tool_is_in_the_vendors_words(server, choice):
    given = {"type": "function", "function": {"name": "look"}} if choice == "look" else choice
    options = {"tools": [LOOK], "tool_choice": given}
    of_anthropic, of_gemini, of_responses = CHOICES[choice]
    assert sent(server, "anthropic", **options)["tool_choice"] == of_anthropic
    body = sent(server, "gemini", **options)
    assert body["toolConfig"] == {"functionCallingConfig": of_gemini}
    assert "tool_choice" not in body
    assert sent(server, "openai-responses", **options)["tool_choice"] == of_responses
    assert sent(server, "ollama", **options)["tool_choice"] == given


def test_calls_and_results_go_to_anthropic_as_blocks_results_in_one_message(server):
    assert sent(server, "anthropic", TWO_CALLS)["messages"] == [
        TWO_CALLS[0],
        {
            "role": "assistant",
            "content": [
                text("I look."),
                {"type": "tool_use", "id": "call-a", "name": "look", "input": {"at": "Hà Nội"}},
                {"type": "tool_use", "id": "call-b", "name": "now", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "call-b", "content": "noon"},
                {"type": "tool_result", "tool_use_id": "call-a", "content": '{"seen": ["sheep"]}'},
            ],
        },
    ]


def test_calls_and_results_go_to_gemini_as_parts_results_in_one_content(server):
    contents = sent(server, "gemini", TWO_CALLS)["contents"]
    parts = contents[1]["parts"]
    assert [{name: part[name] for name in part if name != "thoughtSignature"} for part in parts] == [
        {"text": "I look."},
        {"functionCall": {"id": "call-a", "name": "look", "args": {"at": "Hà Nội"}}},
        {"functionCall": {"id": "call-b", "name": "now", "args": {}}},
    ]
    assert contents[1]["role"] == "model"
    assert contents[2:] == [
        {
            "role": "user",
            "parts": [
                {"functionResponse": {"id": "call-b", "name": "now", "response": {"result": "noon"}}},
                {"functionResponse": {"id": "call-a", "name": "look", "response": {"seen": ["sheep"]}}},
            ],
        }
    ]


def test_calls_and_results_go_to_responses_as_items(server):
    assert sent(server, "openai-responses", TWO_CALLS)["input"] == [
        TWO_CALLS[0],
        {"role": "assistant", "content": "I look."},
        {"type": "function_call", "call_id": "call-a", "name": "look", "arguments": '{"at": "Hà Nội"}'},
        {"type": "function_call", "call_id": "call-b", "name": "now", "arguments": ""},
        {"type": "function_call_output", "call_id": "call-b", "output": "noon"},
        {"type": "function_call_output", "call_id": "call-a", "output": '{"seen": ["sheep"]}'},
    ]


def test_calls_and_results_go_to_ollama_with_objects_and_names(server):
    messages = sent(server, "ollama", TWO_CALLS)["messages"]
    assert messages[1]["content"] == "I look."
    assert [made["function"] for made in messages[1]["tool_calls"]] == [
        {"name": "look", "arguments": {"at": "Hà Nội"}},
        {"name": "now", "arguments": {}},
    ]
    assert messages[2:] == [
        {"role": "tool", "content": "noon", "tool_name": "now"},
        {"role": "tool", "content": '{"seen": ["sheep"]}', "tool_name": "look"},
    ]


NO_IDS = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [call("", "look", '{"at": "a"}'), call("", "now", "{}")]},
    result("", "first"),
    result("", "second"),
]


def test_results_without_ids_belong_to_the_calls_in_order(server):
    results = sent(server, "gemini", NO_IDS)["contents"][2]["parts"]
    assert [part["functionResponse"]["name"] for part in results] == ["look", "now"]
    assert not any("id" in part["functionResponse"] for part in results)
    assert [message["tool_name"] for message in sent(server, "ollama", NO_IDS)["messages"][2:]] == ["look", "now"]


def test_results_without_ids_belong_to_the_call_that_they_name(server):
    swapped = [*NO_IDS[:2], result("", "first", name="now"), result("", "second", name="look")]
    results = sent(server, "gemini", swapped)["contents"][2]["parts"]
    assert [part["functionResponse"]["name"] for part in results] == ["now", "look"]
    assert [message["tool_name"] for message in sent(server, "ollama", swapped)["messages"][2:]] == ["now", "look"]


def test_calls_without_ids_have_some_where_the_vendor_wants_them(server):
    messages = sent(server, "anthropic", NO_IDS)["messages"]
    ids = [part["id"] for part in messages[1]["content"]]
    assert len(set(filter(None, ids))) == 2
    assert [part["tool_use_id"] for part in messages[2]["content"]] == ids
    items = sent(server, "openai-responses", NO_IDS)["input"][1:]
    ids = [made["call_id"] for made in items[:2]]
    assert len(set(filter(None, ids))) == 2
    assert [made["call_id"] for made in items[2:]] == ids


@pytest.mark.parametrize("dialect", ["anthropic", "gemini", "ollama"])
def test_arguments_that_are_no_whole_json_are_an_error_that_sends_nothing(server, dialect):
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call("call-a", "look", '{"at": "s')]}]
    with pytest.raises(sheepsse.InvalidRequestError, match="look"):
        sent(server, dialect, [*messages, result("call-a", "nothing")])
    assert server.requests == []


# What has the vendor's own shape already

OWN = {
    "anthropic": (
        "messages",
        [
            {"role": "user", "content": [{"type": "text", "text": "Read.", "cache_control": {"type": "ephemeral"}}]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t-1", "name": "look", "input": {"at": 1}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t-1", "content": "sea"}]},
            {"role": "user", "content": [{"type": "document", "source": {"type": "url", "url": HTTP_URL}}]},
        ],
        [{"type": "web_search_20250305", "name": "web_search"}, {"name": "look", "input_schema": SCHEMA}],
    ),
    "gemini": (
        "contents",
        [
            {"role": "user", "parts": [{"text": "Read."}, {"fileData": {"fileUri": HTTP_URL}}]},
            {"role": "model", "parts": [{"functionCall": {"name": "look", "args": {"at": 1}}}]},
            {"role": "user", "parts": [{"functionResponse": {"name": "look", "response": {"result": 1}}}]},
        ],
        [{"functionDeclarations": [{"name": "look", "parameters": SCHEMA}]}, {"googleSearch": {}}],
    ),
    "openai-responses": (
        "input",
        [
            {"role": "user", "content": [{"type": "input_text", "text": "Read."}]},
            {"type": "reasoning", "id": "i-0", "summary": [], "encrypted_content": "b3BhcXVl"},
            {"type": "function_call", "call_id": "call-a", "name": "look", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "call-a", "output": "sea"},
        ],
        [{"type": "web_search"}, {"type": "function", "name": "look", "parameters": SCHEMA}],
    ),
    "ollama": (
        "messages",
        [
            {"role": "user", "content": "Read.", "images": [PIXEL]},
            {"role": "assistant", "content": "", "tool_calls": [ollama_call("look", {"at": 1})]},
            {"role": "tool", "content": "sea", "tool_name": "look"},
        ],
        [LOOK],
    ),
}


@pytest.mark.parametrize("dialect", VENDORS)
def test_what_has_the_vendors_own_shape_passes_untouched(server, dialect):
    place, messages, tools = OWN[dialect]
    body = sent(server, dialect, messages, tools=tools)
    assert body[place] == messages
    assert body["tools"] == tools


def test_a_vendors_own_tools_stand_beside_ours(server):
    search = {"type": "web_search_20250305", "name": "web_search"}
    assert [tool["name"] for tool in sent(server, "anthropic", tools=[LOOK, search])["tools"]] == ["look", "web_search"]
    tools = sent(server, "gemini", tools=[{"googleSearch": {}}, LOOK])["tools"]
    assert {"googleSearch": {}} in tools
    assert [tool["functionDeclarations"][0]["name"] for tool in tools if "functionDeclarations" in tool] == ["look"]
    assert len(tools) == 2


@pytest.mark.parametrize("dialect", ["openai", *VENDORS])
@pytest.mark.parametrize("messages", [SYSTEM, TWO_CALLS, NO_IDS], ids=["system", "calls", "no ids"])
def test_what_the_caller_gives_is_never_changed(server, dialect, messages):
    own = {"generationConfig": {"temperature": 1}} if dialect == "gemini" else {"options": {"temperature": 1}}
    options = {"tools": [LOOK, NOW], "stop": ["End"], "extra_body": own, "metadata": {"a": [1]}}
    given = copy.deepcopy((messages, options))
    sent(server, dialect, given[0], **given[1])
    assert given == (messages, options)


# Options


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_limit_of_tokens_has_the_vendors_name(server, name):
    assert sent(server, "anthropic", **{name: 50})["max_tokens"] == 50
    assert sent(server, "gemini", **{name: 50})["generationConfig"] == {"maxOutputTokens": 50}
    assert sent(server, "openai-responses", **{name: 50})["max_output_tokens"] == 50
    assert sent(server, "ollama", **{name: 50})["options"] == {"num_predict": 50}
    bodies = [request.json for request in server.requests]
    assert len(bodies) == 4
    assert [name in body for body in bodies for name in ("max_tokens", "max_completion_tokens")] == [True] + 7 * [False]


def test_anthropic_has_room_for_what_it_thinks_where_no_limit_is_given(server):
    thinking = {"type": "enabled", "budget_tokens": 2000}
    body = sent(server, "anthropic", thinking=thinking)
    assert (body["max_tokens"], body["thinking"]) == (8192 + 2000, thinking)
    assert sent(server, "anthropic", thinking=thinking, max_tokens=3000)["max_tokens"] == 3000


@pytest.mark.parametrize("stop", ["End", ["End"]])
def test_stop_is_a_list_under_the_vendors_name(server, stop):
    body = sent(server, "anthropic", stop=stop)
    assert body["stop_sequences"] == ["End"]
    assert "stop" not in body
    assert sent(server, "gemini", stop=stop)["generationConfig"] == {"stopSequences": ["End"]}
    assert sent(server, "ollama", stop=stop)["options"] == {"stop": ["End"]}


def test_how_to_choose_words_is_put_where_the_vendor_has_it(server):
    options = {"temperature": 0.5, "top_p": 0.9, "seed": 7}
    for dialect in ("anthropic", "openai-responses"):
        body = sent(server, dialect, **options)
        assert {name: body[name] for name in options} == options
    assert sent(server, "ollama", **options, top_k=3, num_ctx=4096)["options"] == {
        **options,
        "top_k": 3,
        "num_ctx": 4096,
    }
    config = sent(server, "gemini", **options, top_k=3, n=1, responseMimeType="text/plain")["generationConfig"]
    assert config == {
        "temperature": 0.5,
        "topP": 0.9,
        "seed": 7,
        "topK": 3,
        "candidateCount": 1,
        "responseMimeType": "text/plain",
    }


def test_a_callers_own_config_is_added_to_and_wins(server):
    config = {"temperature": 1, "thinkingConfig": {"includeThoughts": True}}
    body = sent(server, "gemini", temperature=0.5, max_tokens=50, generationConfig=config)
    assert body["generationConfig"] == {**config, "maxOutputTokens": 50}
    body = sent(server, "ollama", temperature=0.5, max_tokens=50, options={"temperature": 1, "num_ctx": 4096})
    assert body["options"] == {"temperature": 1, "num_ctx": 4096, "num_predict": 50}


@pytest.mark.parametrize(
    ("dialect", "options"),
    [
        ("anthropic", {"thinking": {"type": "adaptive"}, "metadata": {"user_id": "u"}, "service_tier": "auto"}),
        ("gemini", {"safetySettings": [{"category": "X"}], "cachedContent": "cachedContents/1"}),
        (
            "openai-responses",
            {"reasoning": {"effort": "low"}, "store": False, "include": ["reasoning.encrypted_content"]},
        ),
        ("ollama", {"think": True, "keep_alive": "5m"}),
    ],
)
def test_the_vendors_other_options_go_into_the_body_as_they_are(server, dialect, options):
    body = sent(server, dialect, **options)
    assert {name: body[name] for name in options} == options


def test_the_body_is_what_ollama_takes_for_a_format_too(server):
    assert sent(server, "ollama", extra_body={"format": "json"})["format"] == "json"


# An answer that is sent back


def answered(server, dialect, transcript):
    """What is sent when the answer is put after the question and its calls are answered"""
    completion = answer(server, dialect, transcript=transcript)
    message = completion.message
    assert json.loads(json.dumps(message)) == message
    results = [result(made.id, "sea") for made in completion.tool_calls]
    return message, [USER, message, *results, {"role": "user", "content": "And?"}]


THOUGHT = {
    "anthropic": anthropic(
        "thoughts, and calls",
        named(
            message_start(),
            *thinking_block(0, "Hm", "m.", signature="c2ln"),
            *block(1, {"type": "redacted_thinking", "data": "b3BhcXVl"}),
            *text_block(2, "I", " look."),
            *tool_block(3, "t-1", "look", '{"at":', ' "sea"}'),
            *tool_block(4, "t-2", "now", ""),
            *message_end("tool_use"),
        ),
        "I look.",
    ),
    "gemini": gemini(
        "thoughts, and calls",
        crlf(
            said({"text": "Hm", "thought": True}),
            said({"text": "m.", "thought": True}),
            said("I", called("look", {"at": "sea"}, thoughtSignature="c2ln")),
            said(called("now", {}), finish="STOP"),
        ),
        "I",
    ),
    "openai-responses": responses(
        "thoughts, and calls",
        numbered(
            response("created"),
            item("added", 0, id="i-0", type="reasoning", summary=[], encrypted_content="b3"),
            item("done", 0, id="i-0", type="reasoning", summary=[], encrypted_content="b3BhcXVl"),
            item("done", 1, id="i-1", type="function_call", call_id="call-a", name="look", arguments='{"at": "sea"}'),
            response(
                "completed",
                output=[
                    {"id": "i-0", "type": "reasoning", "summary": [], "encrypted_content": "b3BhcXVl"},
                    {
                        "id": "i-1",
                        "type": "function_call",
                        "call_id": "call-a",
                        "name": "look",
                        "arguments": '{"at": "sea"}',
                    },
                ],
            ),
        ),
    ),
    "ollama": ollama(
        "thoughts, and calls",
        lines(line(thinking="Hm"), line(thinking="m."), line(tool_calls=[ollama_call("look", {"at": "sea"})]), last()),
    ),
}
#: what the vendor is sent of it, in its own shape
KEPT = {
    "anthropic": (
        "messages",
        [
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hmm.", "signature": "c2ln"},
                    {"type": "redacted_thinking", "data": "b3BhcXVl"},
                    text("I look."),
                    {"type": "tool_use", "id": "t-1", "name": "look", "input": {"at": "sea"}},
                    {"type": "tool_use", "id": "t-2", "name": "now", "input": {}},
                ],
            }
        ],
    ),
    "gemini": (
        "contents",
        [
            {
                "role": "model",
                "parts": [
                    {"text": "Hmm.", "thought": True},
                    {"text": "I"},
                    {"functionCall": {"name": "look", "args": {"at": "sea"}}, "thoughtSignature": "c2ln"},
                    {"functionCall": {"name": "now", "args": {}}},
                ],
            }
        ],
    ),
    "openai-responses": (
        "input",
        [
            {"id": "i-0", "type": "reasoning", "summary": [], "encrypted_content": "b3BhcXVl"},
            {"id": "i-1", "type": "function_call", "call_id": "call-a", "name": "look", "arguments": '{"at": "sea"}'},
        ],
    ),
    "ollama": (
        "messages",
        [
            {
                "role": "assistant",
                "content": "",
                "thinking": "Hmm.",
                "tool_calls": [{"function": {"name": "look", "arguments": {"at": "sea"}}}],
            }
        ],
    ),
}


@pytest.mark.parametrize("dialect", VENDORS)
def test_what_was_thought_goes_back_to_its_own_vendor_as_it_was(server, dialect):
    _, messages = answered(server, dialect, THOUGHT[dialect])
    place, kept = KEPT[dialect]
    body = sent(server, dialect, messages)
    assert body[place][1 : 1 + len(kept)] == kept


def test_a_signature_of_gemini_beside_an_empty_text_goes_back_too(server):
    signed = {"text": "", "thoughtSignature": "c2ln"}
    spoken = gemini("signed", crlf(said("Good"), said(" day"), said(signed, finish="STOP")), "Good day")
    _, messages = answered(server, "gemini", spoken)
    assert sent(server, "gemini", messages)["contents"][1] == {"role": "model", "parts": [{"text": "Good day"}, signed]}


@pytest.mark.parametrize("dialect", ["openai", *VENDORS])
@pytest.mark.parametrize("source", VENDORS)
def test_what_only_another_vendor_understands_is_never_sent(server, source, dialect):
    _, messages = answered(server, source, THOUGHT[source])
    request = asked(server, dialect, messages)
    assert b'"vendor"' not in request.body
    if source != dialect:
        for secret in (b"c2ln", b"b3BhcXVl", b"Hmm.", b"encrypted_content"):
            assert secret not in request.body
        assert b"look" in request.body
        assert b"sea" in request.body


@pytest.mark.parametrize("dialect", VENDORS)
def test_the_answer_as_a_message_is_in_openais_shape(server, dialect):
    message, _ = answered(server, dialect, THOUGHT[dialect])
    assert set(message) == {"role", "content", "tool_calls", "vendor"}
    assert (message["role"], message["content"]) == ("assistant", THOUGHT[dialect].text or None)
    assert message["tool_calls"][0]["type"] == "function"
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"at": "sea"}
    assert list(message["vendor"]) == [dialect]


@pytest.mark.parametrize("dialect", ["openai", *VENDORS])
def test_an_answer_of_text_alone_is_a_plain_message(server, dialect):
    completion = answer(server, dialect)
    assert completion.message == {"role": "assistant", "content": SHORT[dialect].text}


def test_a_message_that_keeps_another_vendors_thoughts_is_translated(server):
    message = {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [call("call-a", "look", '{"at": "sea"}')],
        "vendor": {"gemini": [{"text": "?", "thoughtSignature": "c2ln"}]},
    }
    body = sent(server, "anthropic", [USER, message, result("call-a", "sheep")])
    assert body["messages"][1]["content"] == [
        text("I look."),
        {"type": "tool_use", "id": "call-a", "name": "look", "input": {"at": "sea"}},
    ]


def test_reasoning_goes_back_in_the_openai_dialect_where_there_are_calls(server):
    calls = {"tool_calls": [{"index": 0, **call("call-a", "look", "{}")}]}
    thinking = transcripts.chunk({"reasoning_content": "Hmm."})
    with_call = transcripts.Transcript(
        "calls", transcripts.sse(thinking, transcripts.chunk(calls, "tool_calls"), transcripts.DONE)
    )
    _, messages = answered(server, "openai", with_call)
    body = sent(server, "openai", messages)
    assert body["messages"][1]["reasoning_content"] == "Hmm."
    assert "vendor" not in body["messages"][1]
    plain = transcripts.Transcript(
        "text", transcripts.sse(thinking, *transcripts.says("Yes"), transcripts.STOP, transcripts.DONE), "Yes"
    )
    message, messages = answered(server, "openai", plain)
    assert message == {"role": "assistant", "content": "Yes"}


# Providers


def test_the_providers_are_in_the_order_in_which_they_are_looked_for():
    rows = {
        name: (row.base_url, row.key_variable, row.dialect)
        for name, row in sheepsse.PROVIDERS.items()
        if row.dialect != "openai"
    }
    assert rows == {
        "openai-responses": ("https://api.openai.com/v1", "OPENAI_API_KEY", "openai-responses"),
        "anthropic": ("https://api.anthropic.com", "ANTHROPIC_API_KEY", "anthropic"),
        "gemini": ("https://generativelanguage.googleapis.com", "GEMINI_API_KEY", "gemini"),
        "ollama": ("http://localhost:11434", "", "ollama"),
    }
    order = "holysheep openai openai-responses deepseek anthropic gemini openrouter mistral ollama"
    assert list(sheepsse.PROVIDERS) == order.split()


@pytest.fixture
def providers(server, monkeypatch):
    """All providers are at the server; gives the paths that were asked, each after its provider's name"""
    for name, row in sheepsse.PROVIDERS.items():
        base_url = f"{server.origin}/{name}{local_provider.DIALECT_BASES[row.dialect]}"
        monkeypatch.setitem(sheepsse.PROVIDERS, name, row._replace(base_url=base_url))
    return lambda: [request.path.partition("?")[0] for request in server.requests]


@pytest.mark.parametrize(
    ("keys", "model", "path"),
    [
        (["ANTHROPIC_API_KEY"], "claude-1", "/anthropic/v1/messages"),
        (["GEMINI_API_KEY"], "gemini-1", "/gemini/v1beta/models/gemini-1:streamGenerateContent"),
        (["ANTHROPIC_API_KEY", "GEMINI_API_KEY"], "gemini-1", "/gemini/v1beta/models/gemini-1:streamGenerateContent"),
        (["ANTHROPIC_API_KEY", "GEMINI_API_KEY"], "claude-1", "/anthropic/v1/messages"),
        (["OPENAI_API_KEY", "ANTHROPIC_API_KEY"], "claude-1", "/anthropic/v1/messages"),
        (["OPENAI_API_KEY", "ANTHROPIC_API_KEY"], "gpt-1", "/openai/v1/chat/completions"),
        (["MISTRAL_API_KEY", "GEMINI_API_KEY"], "mistral-1", "/mistral/v1/chat/completions"),
    ],
)
def test_the_environment_and_the_model_choose_the_dialect(providers, monkeypatch, keys, model, path):
    for name in keys:
        monkeypatch.setenv(name, KEY)
    with sheepsse.Client() as client:
        assert "".join(client.stream("Good day?", model=model)) == local_provider.TEXT
    assert providers() == [path]


def test_responses_has_openais_key_and_is_only_taken_by_name(server, providers, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with sheepsse.Client("openai-responses", model="gpt-1") as client:
        assert client.complete("Good day?").text == local_provider.TEXT
    assert providers() == ["/openai-responses/v1/responses"]
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"


def test_ollama_takes_no_key(server, providers):
    with sheepsse.Client("ollama", model="m-1") as client:
        assert "".join(client.stream("Good day?")) == local_provider.TEXT
    assert providers() == ["/ollama/api/chat"]
    assert not {"authorization", "x-api-key"}.intersection(map(str.lower, server.requests[0].headers))


@pytest.mark.parametrize("dialect", VENDORS)
def test_the_host_of_a_base_url_chooses_the_dialect(server, monkeypatch, dialect):
    row = sheepsse.PROVIDERS[dialect]
    origin = server.origin.replace("127.0.0.1", "localhost")
    for name in ("openai", "openai-responses"):
        monkeypatch.setitem(sheepsse.PROVIDERS, name, sheepsse.PROVIDERS[name]._replace(base_url="https://x.invalid"))
    monkeypatch.setitem(sheepsse.PROVIDERS, dialect, row._replace(base_url=origin))
    base_url = origin + local_provider.DIALECT_BASES[dialect]
    with sheepsse.Client(base_url=base_url, api_key=KEY, model="m-1") as client:
        assert client.complete("Good day?").text == local_provider.TEXT


@pytest.mark.parametrize("dialect", ["openai", *VENDORS])
def test_check_lists_the_models_of_each_dialect(server, dialect):
    base_url = server.origin + local_provider.DIALECT_BASES[dialect]
    with sheepsse.Client(base_url=base_url, api_key=KEY, dialect=dialect) as client:
        health = client.check()
    assert (health.ok, health.status, health.models) == (True, "ok", (local_provider.MODEL,))
