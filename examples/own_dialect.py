"""A dialect of your own: Cohere's chat API, which sheepsse does not speak, by public names alone

    python examples/own_dialect.py

asks a server on your own machine, which answers as https://docs.cohere.com/docs/streaming describes. With a key, the
same class asks Cohere:

    sheepsse.Client(base_url="https://api.cohere.com/v2", api_key="...", dialect="cohere", model="command-a-03-2025")
"""

from __future__ import annotations

import http.server
import json
import threading
from typing import Any, Iterator, Mapping, Sequence

import sheepsse


class Cohere(sheepsse.Dialect):
    name = "cohere"
    path = "/chat"
    #: events with other names may be anything; the data of these is JSON
    event_names = frozenset({"message-start", "content-delta", "tool-call-start", "tool-call-delta", "message-end"})
    #: finish reasons that are not among the common words
    REASONS = {"COMPLETE": "stop", "TOOL_CALL": "tool_calls"}

    @classmethod
    def body(cls, messages: Sequence[Any], model: str, params: Mapping[str, Any], stream: bool) -> dict[str, Any]:
        return {"model": model, "messages": list(messages), "stream": stream, **params}

    def chunks(self, event: sheepsse.ServerSentEvent) -> Iterator[sheepsse.Chunk]:
        payload = self.load(event)
        if payload is None:  # a ping, or the like
            return
        index, delta = payload.get("index", 0), payload.get("delta") or {}
        message = delta.get("message") or {}
        calls: tuple[sheepsse.ToolCall, ...] = ()
        usage = finish = reason = None
        if payload.get("type") in ("tool-call-start", "tool-call-delta"):
            call = message["tool_calls"]
            function = call["function"]
            calls = (sheepsse.ToolCall(index, call.get("id", ""), function.get("name", ""), function["arguments"]),)
        elif payload.get("type") == "message-end":
            self.whole = self.done = True
            reason = delta["finish_reason"]
            finish = self.finish(self.REASONS.get(reason, reason))  # raises for ERROR, once the chunk is read
            usage = self.usage((delta.get("usage") or {}).get("tokens"))
        text = message["content"]["text"] if payload.get("type") == "content-delta" else ""
        yield sheepsse.Chunk(
            text=text,
            reasoning=message.get("tool_plan", ""),
            tool_calls=calls,
            finish_reason=reason,
            finish=finish,
            usage=usage,
            event_id=event.id,
            raw=payload,
            id=payload.get("id", ""),
        )


sheepsse.DIALECTS[Cohere.name] = Cohere


class Server(http.server.BaseHTTPRequestHandler):
    """Answers each request with its last message, word by word"""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        words = f"You said: {request['messages'][-1]['content']}".split(" ")
        self.write("message-start", id="answer-1", delta={"message": {"role": "assistant"}})
        for word in words:
            self.write("content-delta", index=0, delta={"message": {"content": {"text": word + " "}}})
        tokens = {"input_tokens": 3, "output_tokens": len(words)}
        self.write("message-end", delta={"finish_reason": "COMPLETE", "usage": {"tokens": tokens}})

    def write(self, kind: str, **fields: Any) -> None:
        event = sheepsse.ServerSentEvent(kind, json.dumps({"type": kind, **fields}))
        self.wfile.write(sheepsse.encode_event(event))

    def log_message(self, format: str, *args: Any) -> None:
        pass


def main() -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client = sheepsse.Client(base_url=f"http://127.0.0.1:{server.server_port}", api_key=False, dialect="cohere")
    stream = client.stream("Good day, how are you?", model="command-a-03-2025")
    for text in stream:
        print(text, end="", flush=True)
    print(f"\n{stream.finish_reason}, {stream.usage.output_tokens if stream.usage else 0} tokens")
    server.shutdown()


if __name__ == "__main__":
    main()
