"""Those that are compared, each behind the same two steps: `open` a scenario, then ask for its text as often as needed.

An adapter is what the peer's own documentation tells a caller to write, and no more. Modules are imported when a peer
is made, so that each process has those of its own peer alone.
"""

from __future__ import annotations

import http.client
import json
import socket
import sys
import zlib
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable, ClassVar, Iterator

from streams import IS_LAST, TEXT_OF, Scenario

#: asks once, and gives the pieces of text as they come
Ask = Callable[[], Iterator[str]]

EVENT_STREAMS = frozenset({"openai", "anthropic", "responses", "gemini"})
ALL = EVENT_STREAMS | {"ollama"}
BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "stream": True}


class Peer:
    """One that is compared"""

    name: ClassVar[str]
    #: what is imported for it; a peer whose modules are not there is left out
    modules: ClassVar[tuple[str, ...]]
    dialects: ClassVar[frozenset[str]] = EVENT_STREAMS
    #: whether it can go on with a stream whose connection was lost
    reconnects: ClassVar[bool] = False
    #: takes so long for a chunk that a quick run gives it a tenth of them
    slow: ClassVar[bool] = False
    #: whether it is there for the CPU of a chunk alone
    for_chunks: ClassVar[bool] = False

    def __init__(self, origin: str) -> None:
        self.origin = origin

    def open(self, scenario: Scenario) -> Ask:
        """A client for what a scenario sends, which keeps its connection where the peer can"""
        raise NotImplementedError

    def texts_of(self, scenario: Scenario, datas: Iterator[str]) -> Iterator[str]:
        """The pieces of text in the data of events, up to the last event, for a peer that knows no model's API"""
        text_of, is_last = TEXT_OF[scenario.dialect], IS_LAST[scenario.dialect]
        for data in datas:
            if data == "[DONE]":
                return
            payload = json.loads(data)
            text = text_of(payload)
            if text:
                yield text
            if is_last(payload):
                return

    def whole_texts_of(self, scenario: Scenario, datas: Iterator[str]) -> Iterator[str]:
        """The same, and then on to the end of the body, without which there is no warm connection"""
        yield from self.texts_of(scenario, datas)
        for _ in datas:
            pass


class Bare(Peer):
    """A socket, `split` and `json.loads`: what nothing that reads JSON in Python can do without"""

    name = "bare"
    modules = ()
    dialects = ALL

    def connected(self, scenario: Scenario, sock: socket.socket | None = None) -> socket.socket:
        """A socket on which a scenario was asked for"""
        host, port = self.origin.rpartition("/")[2].split(":")
        sock = sock or socket.create_connection((host, int(port)))
        sock.sendall(f"POST {scenario.path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n\r\n".encode())
        return sock

    def open(self, scenario: Scenario) -> Ask:
        idle: list[socket.socket] = []
        return lambda: self.texts(scenario.dialect, self.blocks(scenario, idle))

    def blocks(self, scenario: Scenario, idle: list[socket.socket]) -> Iterator[bytes]:
        """The blocks of a body, from a connection that is idle or a new one"""
        try:
            sock = self.connected(scenario, idle.pop())
        except IndexError:
            sock = self.connected(scenario)
        block = sock.recv(65536)
        while b"\r\n\r\n" not in block:
            block += sock.recv(65536)
        block = block.partition(b"\r\n\r\n")[2]
        unpack = zlib.decompressobj(wbits=31).decompress if scenario.framing == "gzip" else bytes
        ends_itself = scenario.framing in ("chunked", "one-chunk")
        end = b""
        while True:
            yield unpack(block)
            end = (end + block)[-5:]
            if ends_itself and end == b"0\r\n\r\n":
                idle.append(sock)
                return
            block = sock.recv(65536)
            if not block:
                sock.close()
                return

    @staticmethod
    def texts(dialect: str, blocks: Iterator[bytes]) -> Iterator[str]:
        """The sizes of chunks are lines of their own, and like all that is no event they are passed over"""
        text_of, rest = TEXT_OF[dialect], b""
        start, skipped = (b"{", 0) if dialect == "ollama" else (b"data: {", 6)
        length = len(start)
        for block in blocks:
            lines = (rest + block).split(b"\n")
            rest = lines.pop()
            for line in lines:
                if line[:length] == start:
                    text = text_of(json.loads(line[skipped:]))
                    if text:
                        yield text


class Read1(Bare):
    """http.client's read1 with a time-out, `split` and `json.loads`: the same with what a stream over HTTP needs"""

    name = "read1"
    for_chunks = True

    def open(self, scenario: Scenario) -> Ask:
        connection = http.client.HTTPConnection(self.origin.rpartition("/")[2], timeout=300)
        return lambda: self.texts(scenario.dialect, self.read(scenario, connection))

    @staticmethod
    def read(scenario: Scenario, connection: http.client.HTTPConnection) -> Iterator[bytes]:
        connection.request("POST", scenario.path)
        response = connection.getresponse()
        while True:
            block = response.read1(65536)
            if not block:
                return
            yield block


class Sheepsse(Peer):
    name = "sheepsse"
    modules = ("requests", "sheepsse")
    dialects = ALL
    reconnects = True

    def client(self, scenario: Scenario) -> Any:
        import sheepsse

        dialect = {"responses": "openai-responses"}.get(scenario.dialect, scenario.dialect)
        base = self.origin + scenario.path + ("/v1" if scenario.dialect in ("openai", "responses") else "")
        limits = {"max_answer_size": 2**30}  # the longest text has 100 MB
        return sheepsse.Client(base_url=base, dialect=dialect, api_key="sk-benchmark", model="m", **limits)

    def open(self, scenario: Scenario) -> Ask:
        client = self.client(scenario)
        return lambda: client.stream("Hi")


class SheepsseChunks(Sheepsse):
    """The same as Chunks, as tools, reasoning and the relay need them"""

    name = "chunks()"
    for_chunks = True

    def open(self, scenario: Scenario) -> Ask:
        client = self.client(scenario)
        return lambda: (chunk.text for chunk in client.stream("Hi").chunks() if chunk.text)


class OnRequests(Peer):
    """One that reads a response of requests"""

    def open(self, scenario: Scenario) -> Ask:
        import requests

        session, url = requests.Session(), self.origin + scenario.path

        def ask() -> Iterator[str]:
            with session.post(url, json=BODY, stream=True) as response:
                yield from self.whole_texts_of(scenario, self.datas(response, scenario))

        return ask

    def datas(self, response: Any, scenario: Scenario) -> Iterator[str]:
        """The data of its events"""
        raise NotImplementedError


class IterLines(OnRequests):
    name = "requests"
    modules = ("requests",)
    dialects = ALL

    def datas(self, response: Any, scenario: Scenario) -> Iterator[str]:
        if scenario.dialect == "ollama":
            return filter(None, response.iter_lines())
        return (line[6:].decode() for line in response.iter_lines() if line.startswith(b"data: "))


class SSEClientPy(OnRequests):
    name = "sseclient-py"
    modules = ("requests", "sseclient")

    def datas(self, response: Any, scenario: Scenario) -> Iterator[str]:
        import sseclient

        return (event.data for event in sseclient.SSEClient(response).events())


class HttpxSSE(Peer):
    name = "httpx-sse"
    modules = ("httpx", "httpx_sse")

    def open(self, scenario: Scenario) -> Ask:
        import httpx
        import httpx_sse

        client = httpx.Client(timeout=None, limits=httpx.Limits(max_connections=None))
        url = self.origin + scenario.path

        def ask() -> Iterator[str]:
            with httpx_sse.connect_sse(client, "POST", url, json=BODY) as source:
                yield from self.whole_texts_of(scenario, (event.data for event in source.iter_sse()))

        return ask


class RequestsSSE(Peer):
    name = "requests-sse"
    modules = ("requests", "requests_sse")
    reconnects = True

    def open(self, scenario: Scenario) -> Ask:
        import requests
        import requests_sse

        session, url = requests.Session(), self.origin + scenario.path

        def ask() -> Iterator[str]:
            # it reconnects where a stream ends, so it is left at the last event, and its connection is not kept
            source = requests_sse.EventSource(
                url, method="POST", session=session, json=BODY, reconnection_time=timedelta(0)
            )
            with source:
                yield from self.texts_of(scenario, (event.data for event in source))

        return ask


class LaunchDarkly(Peer):
    name = "launchdarkly"
    modules = ("urllib3", "ld_eventsource")
    reconnects = True

    def open(self, scenario: Scenario) -> Ask:
        import urllib3
        from ld_eventsource import SSEClient
        from ld_eventsource.config import ConnectStrategy, ErrorStrategy

        connect = ConnectStrategy.http(self.origin + scenario.path, pool=urllib3.PoolManager())
        errors = ErrorStrategy.always_continue() if scenario.cut else ErrorStrategy.always_fail()

        def ask() -> Iterator[str]:
            with SSEClient(connect, initial_retry_delay=0, error_strategy=errors) as client:
                yield from self.texts_of(scenario, (event.data for event in client.events))

        return ask


class OpenAI(Peer):
    name = "openai"
    modules = ("openai",)
    dialects = frozenset({"openai", "responses"})
    slow = True

    def open(self, scenario: Scenario) -> Ask:
        import openai

        client = openai.OpenAI(base_url=self.origin + scenario.path, api_key="none", max_retries=0)

        def chat() -> Iterator[str]:
            for chunk in client.chat.completions.create(model="m", messages=BODY["messages"], stream=True):
                if chunk.choices and chunk.choices[0].delta.content:
                    yield chunk.choices[0].delta.content

        def responses() -> Iterator[str]:
            for event in client.responses.create(model="m", input="Hi", stream=True):
                if event.type == "response.output_text.delta":
                    yield event.delta

        return responses if scenario.dialect == "responses" else chat


class Anthropic(Peer):
    """Its helper for text, which also gathers the answer, as sheepsse does"""

    name = "anthropic"
    modules = ("anthropic",)
    dialects = frozenset({"anthropic"})
    slow = True

    def open(self, scenario: Scenario) -> Ask:
        import anthropic

        client = anthropic.Anthropic(base_url=self.origin + scenario.path, api_key="none", max_retries=0)
        return lambda: self.texts(client, {"model": "m", "max_tokens": 9, "messages": BODY["messages"]})

    def texts(self, client: Any, request: dict[str, Any]) -> Iterator[str]:
        with client.messages.stream(**request) as stream:
            yield from stream.text_stream


class AnthropicEvents(Anthropic):
    """The same SDK, for its events alone"""

    name = "anthropic events"

    def texts(self, client: Any, request: dict[str, Any]) -> Iterator[str]:
        for event in client.messages.create(stream=True, **request):
            if event.type == "content_block_delta" and event.delta.type == "text_delta":
                yield event.delta.text


PEERS: dict[str, type[Peer]] = {
    peer.name: peer
    for peer in (
        Sheepsse, SheepsseChunks, Bare, Read1, IterLines, SSEClientPy, HttpxSSE, RequestsSSE, LaunchDarkly, OpenAI,
        Anthropic, AnthropicEvents,
    )
}  # fmt: skip

# The file beside this folder is measured, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
