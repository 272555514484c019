"""The server that is measured against, a process of its own: whatever a request's path names, as fast as it can.

The bytes of a stream are made before the first of them is sent, and kept. A thread a connection; no HTTP beyond what a
benchmark needs. `GET /stamps` tells when each write of the last paced or cut stream began, by time.perf_counter(),
which on one machine is the same clock for all processes.
"""

from __future__ import annotations

import functools
import itertools
import json
import socket
import sys
import threading
import time
import zlib
from typing import Callable, Iterable, Iterator

from streams import Scenario

#: bytes in a write where there is no pace
BLOCK = 65536
#: streams of more chunks than these are made while they are sent: all of it would not fit
KEPT = 200_000

stamps: list[float] = []


class Request:
    """The path, and the id of the last event that the client has"""

    def __init__(self, head: bytes) -> None:
        line, *fields = head.decode("latin-1").split("\r\n")
        headers = dict(field.lower().split(": ", 1) for field in fields if ": " in field)
        self.path = line.split(" ")[1]
        self.length = int(headers.get("content-length", 0))
        self.last_event_id: str | None = headers.get("last-event-id")


def requests_of(client: socket.socket) -> Iterator[Request]:
    """The requests of a connection, each when all of it is in"""
    rest = b""
    while True:
        while b"\r\n\r\n" not in rest:
            block = client.recv(BLOCK)
            if not block:
                return
            rest += block
        head, _, rest = rest.partition(b"\r\n\r\n")
        request = Request(head)
        while len(rest) < request.length:
            rest += client.recv(BLOCK)
        rest = rest[request.length :]
        yield request


def head_of(scenario: Scenario, length: int = 0) -> bytes:
    """Status line and headers; a connection stays open where the body says itself that it is over"""
    framing = {
        "chunked": "Transfer-Encoding: chunked",
        "one-chunk": "Transfer-Encoding: chunked",
        "length": f"Content-Length: {length}\r\nConnection: close",
        "close": "Connection: close",
        "gzip": "Content-Encoding: gzip\r\nConnection: close",
    }[scenario.framing]
    return f"HTTP/1.1 200 OK\r\nContent-Type: {scenario.content_type}\r\n{framing}\r\n\r\n".encode()


def identified(events: Iterator[bytes]) -> Iterator[bytes]:
    """The same events, each piece of text with a number as its id"""
    yield next(events)
    number = itertools.count(1)
    event = next(events)
    for following in events:
        yield b"id: %d\n" % next(number) + event
        event = following
    yield event


def blocks(events: Iterator[bytes]) -> Iterator[bytes]:
    """As many events in a block as there is room for"""
    block = bytearray()
    for event in events:
        block += event
        if len(block) >= BLOCK:
            yield bytes(block)
            block.clear()
    yield bytes(block)


def framed(scenario: Scenario) -> Iterator[bytes]:
    """The writes of an answer: head and all before the first text in one, and the end of the body in the last"""
    events = identified(scenario.events()) if scenario.cut else scenario.events()
    pieces: Iterator[bytes] = events if scenario.pace or scenario.hold or scenario.cut else blocks(events)
    length = 0
    if scenario.framing in ("length", "one-chunk"):
        body = list(pieces)
        pieces, length = iter(body), sum(map(len, body))
    frame, end = frames(scenario.framing)
    first = head_of(scenario, length) + (b"%x\r\n" % length if scenario.framing == "one-chunk" else b"")
    piece = next(pieces)
    for following in pieces:
        yield first + frame(piece)
        first, piece = b"", following
    yield first + frame(piece) + end()


def frames(framing: str) -> tuple[Callable[[bytes], bytes], Callable[[], bytes]]:
    """How a piece of a body travels, and what ends the body"""
    if framing == "chunked":
        return lambda piece: b"%x\r\n%b\r\n" % (len(piece), piece) if piece else b"", lambda: b"0\r\n\r\n"
    if framing == "one-chunk":
        return lambda piece: piece, lambda: b"\r\n0\r\n\r\n"
    if framing == "gzip":
        packer = zlib.compressobj(wbits=31)
        return lambda piece: packer.compress(piece) + packer.flush(zlib.Z_SYNC_FLUSH), packer.flush
    return lambda piece: piece, lambda: b""


@functools.lru_cache(maxsize=4)
def kept(scenario: Scenario) -> list[bytes]:
    return list(framed(scenario))


def answer(client: socket.socket, request: Request) -> bool:
    """Sends what a request asks for; whether the connection may take another"""
    if request.path == "/stamps":
        body = json.dumps(stamps).encode()
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        return True
    scenario = Scenario.of(request.path)
    writes = framed(scenario) if scenario.chunks > KEPT else kept(scenario)
    if scenario.hold:
        client.sendall(b"".join(itertools.islice(writes, 2)))
        client.recv(1)  # nothing comes: the client goes
        return False
    if scenario.cut and request.last_event_id is None:
        client.sendall(b"".join(itertools.islice(writes, 1 + scenario.cut)))
        stamps[:] = [time.perf_counter()]
        return False
    if scenario.cut:
        seen = int(request.last_event_id or 0)
        client.sendall(head_of(scenario) + b"".join(itertools.islice(writes, 1 + seen, None)))
    elif scenario.pace:
        send_paced(client, writes, scenario.pace)
    else:
        for write in writes:
            client.sendall(write)
    return scenario.framing in ("chunked", "one-chunk")


def send_paced(client: socket.socket, writes: Iterable[bytes], pace: float) -> None:
    stamps.clear()
    for write in writes:
        stamps.append(time.perf_counter())
        client.sendall(write)
        time.sleep(pace)


def serve(client: socket.socket) -> None:
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with client:
        try:
            for request in requests_of(client):
                if not answer(client, request):
                    return
        except OSError:
            pass  # the client went


def main() -> None:
    """Listens on a free port of 127.0.0.1, which is printed, until the standard input ends"""
    threading.stack_size(256 * 1024)  # a thousand streams are held open
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    print(listener.getsockname()[1], flush=True)
    threading.Thread(target=accept, args=(listener,), daemon=True).start()
    sys.stdin.read()


def accept(listener: socket.socket) -> None:
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


if __name__ == "__main__":
    main()
