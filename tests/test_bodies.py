"""Section 5: the bodies of many conversations, byte for byte what they were

The other tests say what a body must be. These say that no body changes unnoticed: a server that caches a prompt bills a
changed one anew, and a checkpoint's name is made of the body. After a change on purpose, ``python tests/test_bodies.py
FOLDER`` writes all bodies to a folder, before and after, and prints the digests.
"""

import hashlib
import json
import pathlib
import random
import sys

import pytest

import sheepsse

CONVERSATIONS = 3000
DIGESTS = {
    "openai": "81e539104435feda",
    "openai-responses": "fdec0c02c56d78ad",
    "anthropic": "0e93778d210a4ffc",
    "gemini": "5de02373639666c5",
    "ollama": "fc7c3b818221420f",
}

PIXEL = "data:image/png;base64,iVBORw0KGgo="
PAGE = "https://example.com/a/sheep.jpg?size=2"
SCHEMA = {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]}
KEPT = {
    "openai": {"reasoning_content": "Hm", "reasoning_details": [{"type": "reasoning.text", "text": "H"}]},
    "openai-responses": [{"type": "reasoning", "id": "r-1"}, {"type": "message", "content": []}],
    "anthropic": [{"type": "thinking", "thinking": "Hm", "signature": "s"}, {"type": "text", "text": "Yes"}],
    "gemini": [{"text": "Yes", "thoughtSignature": "s"}],
    "ollama": {"thinking": "Hm"},
}
TOOLS = [
    {"type": "function", "function": {"name": "look", "description": "Looks", "parameters": SCHEMA, "strict": True}},
    {"type": "function", "function": {"name": "now"}},
    {"function": {"name": "go", "parameters": {}}},
    {"type": "web_search", "max_uses": 2},
    {"googleSearch": {}},
    {"type": "function", "name": "flat", "parameters": SCHEMA},
]
CHOICES = [
    *("auto", "none", "required", "validated"),
    {"type": "function", "function": {"name": "look"}},
    {"type": "tool", "name": "look"},
    {"type": "function", "name": "look"},
]
PARAMS = {
    "max_tokens": [5, None],
    "max_completion_tokens": [6],
    "temperature": [0.5, 0, None],
    "top_p": [0.9],
    "top_k": [3],
    "stop": ["END", ["a", "b"], []],
    "n": [2],
    "seed": [7],
    "system": ["First.", [{"type": "text", "text": "First.", "cache_control": {"type": "ephemeral"}}], ""],
    "thinking": [{"type": "enabled", "budget_tokens": 1024}],
    "generationConfig": [{"topK": 4}, {}],
    "systemInstruction": ["First.", {"parts": [{"text": "First."}]}, {"parts": "First."}],
    "options": [{"num_ctx": 4096}],
    "store": [False, True],
    "tools": [TOOLS[:1], TOOLS[1:3], TOOLS[3:], TOOLS, [], None],
    "tool_choice": [*CHOICES, None],
    "response_format": [{"type": "json_object"}],
}


class Conversations:
    """Conversations in OpenAI's shape and beside it, the same for each number"""

    def __init__(self, number):
        self.random = random.Random(number)
        self.calls = 0

    def pick(self, values):
        values = list(values)
        return values[int(self.random.random() * len(values))]

    def messages(self):
        return [self.pick(self.KINDS)(self) for _ in range(1 + int(self.random.random() * 6))]

    def params(self):
        names = [name for name in PARAMS if self.random.random() < 0.2]
        return {name: self.pick(PARAMS[name]) for name in names}

    def part(self):
        return self.pick(
            [
                {"type": "text", "text": "Good day"},
                {"type": "text", "text": "đâu?", "cache_control": {"type": "ephemeral"}},
                {"type": "image_url", "image_url": {"url": PIXEL}},
                {"type": "image_url", "image_url": {"url": PAGE, "detail": "low"}},
                {"type": "image_url", "image_url": PIXEL},
                {"type": "input_audio", "input_audio": {"data": "e"}},
                "a text alone",
            ]
        )

    def content(self):
        texts = ["Good day?", "Hà Nội", '{"seen": 3}', "", None, []]
        return self.pick([*texts, *([self.part() for _ in range(n)] for n in (1, 2, 3))])

    def system(self):
        return {"role": self.pick(["system", "developer"]), "content": self.content()}

    def user(self):
        return {"role": "user", "content": self.content(), **self.pick([{}, {}, {"name": "An"}])}

    def assistant(self):
        kept = {"vendor": {name: KEPT[name] for name in [self.pick(KEPT)]}}
        return {"role": "assistant", "content": self.content(), **self.pick([{}, {}, kept, {"refusal": "No."}])}

    def calling(self):
        made = []
        for _ in range(self.pick([1, 1, 2, 3])):
            self.calls += 1
            function = {
                "name": self.pick(["look", "now"]),
                "arguments": self.pick(['{"at": "x"}', "", "{}", {"at": 1}]),
            }
            id = self.pick([f"c-{self.calls}", f"c-{self.calls}", None])
            made.append({**({"id": id} if id else {}), "type": "function", "function": function})
        return {**self.assistant(), "tool_calls": made}

    def result(self):
        id = {"tool_call_id": f"c-{self.pick(range(1, self.calls + 2))}"}
        return {"role": "tool", "content": self.content(), **self.pick([id, id, {}, {"name": "look"}])}

    def native(self):
        call = {"functionCall": {"id": "g-1", "name": "look", "args": {}}}
        return self.pick(
            [
                {"role": "model", "parts": [{"text": "I look"}, call]},
                {"role": "user", "parts": [{"text": "Good day?"}]},
                {"type": "reasoning", "id": "r-2", "encrypted_content": "e"},
                {"type": "function_call_output", "call_id": "c-1", "output": "3"},
                {"role": "tool", "tool_name": "look", "content": "3"},
                {"role": "user", "content": "See", "images": ["iVBORw0KGgo="]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c-1", "content": "3"}]},
            ]
        )

    KINDS = [system, user, user, assistant, calling, calling, result, result, native]


def bodies(dialect):
    """The bodies, as JSON; where there is none, the error's class"""
    for number in range(CONVERSATIONS):
        made = Conversations(number)
        messages, params = made.messages(), made.params()
        before = json.dumps([messages, params])
        try:
            yield json.dumps(sheepsse.DIALECTS[dialect].body(messages, "m-1", params, True), ensure_ascii=False)
        except sheepsse.InvalidRequestError as error:
            yield type(error).__name__
        assert json.dumps([messages, params]) == before  # the arguments are the caller's


def digest_of(lines):
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@pytest.mark.parametrize("dialect", DIGESTS)
def test_the_bodies_of_many_conversations_are_byte_for_byte_what_they_were(dialect):
    lines = list(bodies(dialect))
    refused = lines.count("InvalidRequestError")
    assert refused < CONVERSATIONS / 2
    assert digest_of(lines) == DIGESTS[dialect]


if __name__ == "__main__":
    for name in sheepsse.DIALECTS:
        lines = list(bodies(name))
        (pathlib.Path(sys.argv[1]) / name).write_text("\n".join(lines), encoding="utf-8")
        print(f'    "{name}": "{digest_of(lines)}",  # {lines.count("InvalidRequestError")} refused')
