# SPDX-License-Identifier: MIT
"""
Stream the words of a language model: at once, exactly once, and whole.

    import sheepsse

    for text in sheepsse.stream("Explain SSE in three sentences", model="deepseek-chat"):
        print(text, end="", flush=True)

Blocking, one file, on ``requests``. Install it, or copy this file next to a script.

The way of the data; each arrow is a function that a script can call on what it already has::

    requests.Response --iter_bytes--> blocks --iter_events--> ServerSentEvent --iter_chunks--> Chunk --iter_text--> str

The file is read from top to bottom; a section uses only those above it:

    1  Compatibility   what differs between the versions of urllib3
    2  Errors          what failed, whether to try again, what was received
    3  Values          immutable data and the one fold over it
    4  Framing         a response's bytes as they arrive; bytes to events and back
    5  Dialects        what each API's requests, events and errors look like
    6  Tokens and cost usage checked, and turned into money
    7  Policies        when to wait, when to refuse, when to give up
    8  Transport       sockets that know their limits; the Retry-backed session; a plain EventSource client
    9  Resume          the same chunks across lost connections
    10 Checkpoints     an append-only journal of chunks, which survives a kill
    11 Client          the sections above put together; the only one that opens sockets to a model
    12 Batch           many requests, results as they come, on threads or any executor
    13 Relay           chunks to browser-facing SSE, on any WSGI server, over lost connections
    14 Command line    ``python -m sheepsse "prompt"``
"""

from __future__ import annotations

import atexit
import base64
import bisect
import codecs
import collections
import contextlib
import copy
import email.utils
import errno
import functools
import io
import itertools
import json
import logging
import math
import os
import random
import re
import socket
import sys
import threading
import time
import typing
import weakref
import zlib
from http.client import HTTPConnection as _HTTPConnection
from http.client import HTTPException, parse_headers
from http.client import HTTPResponse as _HTTPResponse
from http.client import IncompleteRead as _IncompleteRead
from http.cookiejar import DefaultCookiePolicy
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Container,
    ContextManager,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    TypeVar,
)
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.util.retry import RequestHistory
from urllib3.util.retry import Retry as _Urllib3Retry

if TYPE_CHECKING:
    from decimal import Decimal

    from typing_extensions import Unpack

__version__ = "0.1.0"

__all__ = [
    "CHAT_PAGE", "DIALECTS", "PROVIDERS", "RETRYABLE_STATUS", "SSE_HEADERS", "AlignmentReport",
    "AuthenticationError", "Batch", "BatchSummary", "CheckpointError", "Checkpoints", "Chunk",
    "CircuitBreaker", "CircuitOpenError", "Client", "Completion", "ConnectError", "CostMix",
    "Dialect", "Health", "InvalidRequestError", "InvalidStreamError", "Limiter", "LimiterStats",
    "MissingExtraError", "ModelNotFoundError", "Options", "Price", "Provider", "QueueFullError",
    "QueueTimeoutError", "QuotaError", "RateLimitError", "Relay", "Result", "ResumePoint", "Retry",
    "SSEClient", "SSEDecoder", "ServerError", "ServerSentEvent", "SheepError", "Slot", "Stream",
    "StreamCancelled", "StreamError", "StreamInterrupted", "StreamStats", "StreamTimeout",
    "TokenAlignment", "TokenBucket", "TokenMismatchError", "ToolCall", "Usage", "batch", "collect",
    "compare_costs", "complete", "cost", "count_tokens", "drain", "encode_event", "flask_blueprint",
    "iter_bytes", "iter_chunks", "iter_events", "iter_json_lines", "iter_sse", "iter_text", "main",
    "parse_line", "record", "relay", "replay", "session", "stream", "wsgi_app",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


_log = logging.getLogger("sheepsse")
_log.addHandler(logging.NullHandler())

_T = TypeVar("_T")
_Run = TypeVar("_Run", bound="Callable[[Any, Any], int]")


# ============================================================================================================
# 1. Compatibility: one name per thing that differs between urllib3 1.26 and 2.x. May know nothing of the rest
# ============================================================================================================

_BLOCK = 16384
_HAS_READ1 = hasattr(urllib3.HTTPResponse, "read1")  # since urllib3 2.2


def _reader(response: requests.Response) -> Callable[[], bytes]:
    """A function that returns the next bytes of the body as soon as they arrive, and b"" at its end"""
    raw = response.raw
    if getattr(response, "_content_consumed", False):  # read already, by requests.get() without stream=True
        return _next_of(response.iter_content(_BLOCK))
    if not (isinstance(raw, urllib3.HTTPResponse) and hasattr(raw._fp, "read1")):
        # another library, or a file: single bytes are slow, but never late
        return _next_of(response.iter_content(1))
    if _HAS_READ1:
        return lambda: raw.read1(_BLOCK, decode_content=True)
    return _OldReader(raw)


def _next_of(blocks: Iterator[bytes]) -> Callable[[], bytes]:
    return lambda: next(blocks, b"")


class _OldReader:
    """The read1 of urllib3 2.2, for the versions before

    Their read(n) and stream(n) wait for n bytes, or for the end of a body that is not chunked. So this class calls
    http.client's read1, and adds the errors and the decoding of urllib3, and the return of the connection to the pool.
    Content-Length is counted here, because 1.26 accepts a short body.
    """

    def __init__(self, raw: Any) -> None:
        raw._init_decoder()
        self._raw = raw
        self._left: int | None = None if raw.chunked else raw.length_remaining
        self._block = 1024 if raw._decoder else _BLOCK  # a block may expand a thousandfold, all at once
        self._read = 0

    def __call__(self) -> bytes:
        data = self._read1()
        decoded: bytes = self._raw._decode(data, True, not data)
        while data and not decoded:  # a part of a compressed block may decode to nothing
            data = self._read1()
            decoded = self._raw._decode(data, True, not data)
        return decoded

    def _read1(self) -> bytes:
        raw = self._raw
        if raw._fp is None or getattr(raw._fp, "closed", False):
            return b""
        with raw._error_catcher():
            data: bytes = raw._fp.read1(self._block if self._left is None else min(self._block, self._left))
            self._read += len(data)
            if self._left is not None:
                self._left -= len(data)
                if not data and self._left:
                    raise _IncompleteRead(b"", self._left)
            if not data or self._left == 0:  # http.client itself closes only at the read after the last
                raw._fp.close()
        return data


def _undecodable(response: requests.Response) -> str:
    """The encodings of a body that this urllib3 cannot decode; "" where it decodes all"""
    names = (response.headers.get("Content-Encoding") or "").lower().split(",")
    known = getattr(response.raw, "CONTENT_DECODERS", None)  # another library may know more
    return ", ".join(name.strip() for name in names if known and name.strip() not in ("", "identity", *known))


def _has_known_end(response: requests.Response) -> bool:
    """Whether a body that was read to its end without an error is known to be whole"""
    return bool(response.headers.get("Content-Length") or getattr(response.raw, "chunked", False))


def _shut_down(sock: Any) -> None:
    """Shuts a connection down, which ends the recv of another thread

    This uses a copy of the socket: SSLSocket.shutdown() would let the reader take ciphertext for text, and gevent and
    eventlet have sockets of their own. Objects that are no sockets (of vcrpy) are left alone.
    """
    with contextlib.suppress(OSError):  # not connected any more; a closed one of gevent raises it for any attribute
        sock = getattr(sock, "socket", sock)  # TLS inside TLS, pyOpenSSL
        if hasattr(sock, "shutdown"):
            with contextlib.closing(socket.socket(fileno=socket.dup(sock.fileno()))) as copied:
                copied.shutdown(socket.SHUT_RDWR)


def _socket_of(response: requests.Response) -> socket.socket | None:
    """The socket of a response of a session that was passed; None where it cannot be found"""
    raw = response.raw
    found = getattr(getattr(raw, "_connection", None), "sock", None)
    if found is None:  # with "Connection: close" only the response still holds it
        buffered = getattr(getattr(raw, "_fp", None), "fp", None)
        found = getattr(getattr(buffered, "raw", None), "_sock", None)
    return found


# ============================================================================================================
# 2. Errors: what failed, whether to try again, what was received. May use: Compatibility
# ============================================================================================================

#: HTTP statuses after which the same request may be sent again; the excluded ones never pass
RETRYABLE_STATUS: frozenset[int] = frozenset({408, 409, 429, *range(500, 600)} - {501, 505, 511, 525, 526})


class SheepError(requests.RequestException):
    """The base of all errors of this module; ``except requests.RequestException`` catches it too

    An error keeps its type and attributes when it is pickled, except ``request`` and ``response``. It holds no key:
    keys are replaced in the headers of ``request`` and ``response.request``.
    """

    #: a short fixed name for programs, such as ``RATE_LIMIT``
    code: str = "ERROR"
    #: whether the same request may succeed when it is sent again
    retryable: bool = False
    #: seconds to wait before the next attempt, as the server asks, or None
    retry_after: float | None = None
    #: the request id from the vendor, else the X-Request-ID that was sent
    request_id: str | None = None
    #: the HTTP status, or None
    status: int | None = None
    #: the vendor's code for the error, unchanged, or None
    vendor_code: str | int | None = None
    #: the answer received before the error; an empty Completion if nothing was received
    partial: Completion
    #: the point where the stream was lost, for ``resume_from=``
    resume_point: ResumePoint
    #: the server's own word on retrying (x-should-retry), or None
    _server_allows: bool | None = None
    #: what the next request must send back after a pause by the vendor, or None
    _pause: Mapping[str, Any] | None = None

    def __init__(
        self,
        message: str = "",
        *,
        code: str | None = None,
        retryable: bool | None = None,
        retry_after: float | None = None,
        request_id: str | None = None,
        status: int | None = None,
        vendor_code: str | int | None = None,
        partial: Completion | None = None,
        request: Any = None,
        response: Any = None,
    ) -> None:
        super().__init__(message, request=request, response=response)
        given = {
            "code": code,
            "retryable": retryable,
            "retry_after": retry_after,
            "request_id": request_id,
            "status": status,
            "vendor_code": vendor_code,
            "partial": partial,
        }
        self.__dict__.update({name: value for name, value in given.items() if value is not None})

    def __reduce__(self) -> tuple[Any, ...]:
        # RequestException would pickle the request, and with it the key
        kept = {name: value for name, value in self.__dict__.items() if name not in ("request", "response")}
        return type(self), self.args, kept


class AuthenticationError(SheepError):
    """The key is missing, is a placeholder, or was refused (401, 403)"""

    code = "AUTH_ERROR"


class QuotaError(SheepError):
    """The money or quota of the account is used up (402, or a 429 that says so); never retried"""

    code = "QUOTA_EXCEEDED"


class RateLimitError(SheepError):
    """Too many requests or tokens at the moment (429)"""

    code = "RATE_LIMIT"
    retryable = True


class ModelNotFoundError(SheepError):
    """The provider does not have the model, or does not offer it to this key"""

    code = "MODEL_NOT_FOUND"


class InvalidRequestError(SheepError):
    """The request is invalid: any other 4xx, any 3xx, or refused before it was sent"""

    code = "INVALID_REQUEST"


class ServerError(SheepError):
    """The provider failed or is overloaded (408, 409, 5xx)"""

    code = "SERVER_ERROR"
    retryable = True


class ConnectError(SheepError, requests.ConnectionError):
    """No connection: no address for the name, TLS failed, or the server closed it before the answer began"""

    code = "NETWORK_ERROR"
    retryable = True


class StreamTimeout(SheepError, requests.Timeout):
    """No byte within the read time-out, no chunk within ``first_timeout`` or ``idle_timeout``, or a deadline passed"""

    code = "TIMEOUT"
    retryable = True


class InvalidStreamError(SheepError):
    """The answer is no stream of this dialect: HTML, other JSON, an event over the size limit, or broken data"""

    code = "INVALID_SSE_FORMAT"


class StreamError(SheepError):
    """The provider reported an error inside the stream; ``code`` is the vendor's code if it sent one"""

    code = "STREAM_ERROR"


class StreamInterrupted(SheepError):
    """The stream ended before its end marker; ``partial`` holds the answer received so far"""

    code = "CONNECTION_LOST"
    retryable = True


class StreamCancelled(SheepError):
    """``cancel()`` was called; ``partial`` holds the answer received so far"""

    code = "CANCELLED"


class CircuitOpenError(SheepError):
    """A CircuitBreaker is open and nothing was sent; ``retry_after`` is the seconds until it lets a request through"""

    code = "CIRCUIT_OPEN"


class QueueFullError(SheepError):
    """The queue of a Limiter is full and nothing was sent; ``retry_after`` is an estimate"""

    code = "QUEUE_FULL"


class QueueTimeoutError(SheepError):
    """The wait in the queue of a Limiter was too long and nothing was sent; ``retry_after`` is an estimate"""

    code = "QUEUE_TIMEOUT"


class MissingExtraError(SheepError):
    """A feature needs a package that is not installed; the message names the package"""

    code = "MISSING_EXTRA_ERROR"


class TokenMismatchError(SheepError):
    """The provider and sheepsse count different tokens; ``partial`` is the whole answer"""

    code = "TOKEN_MISMATCH_ERROR"


class CheckpointError(SheepError):
    """A checkpoint cannot be read or written

    It is damaged, in use, or of another request; or the disk is full, or access is denied.
    """

    code = "CHECKPOINT_ERROR"


_HIDDEN = "[hidden]"
#: names of headers that carry keys, of vendors and of gateways (``Helicone-Auth``, ``X-Auth-Token``)
_KEY_HEADER = "(?i)auth|cookie|credential|key$|password|secret|token"
#: names of URL parameters that carry keys
_KEY_PARAMETER = "(?i)access|auth|code|credential|key|pass|secret|sig|token"


class _Key(str):
    """A key with a repr that hides it: crash reporters print the local variables of each function"""

    def __repr__(self) -> str:
        return _HIDDEN

    @classmethod
    def of(cls, key: str | bytes) -> _Key:
        return cls(key if isinstance(key, str) else key.decode("latin-1"))


class _Hidden(Dict[str, Any]):
    """Headers with a key, and a repr that hides their values"""

    def __repr__(self) -> str:
        return f"{{{', '.join(map(repr, self))}: {_HIDDEN}}}"


def _key_headers(headers: Mapping[str, Any]) -> dict[str, Any]:
    """The headers that carry a key"""
    return {name: value for name, value in headers.items() if re.search(_KEY_HEADER, name) and value is not None}


class _Secrets:
    """The keys and passwords of a request; hides them in texts and errors

    Servers repeat keys in their messages. Libraries put header values and URLs into their messages.
    """

    def __init__(self, headers: Mapping[str, Any], url: str = "", proxies: Mapping[str, str] | None = None) -> None:
        words: set[str] = set()
        for value in _key_headers(headers).values():
            text = value.decode("latin-1") if isinstance(value, bytes) else str(value or "")
            # only printable runs after the scheme: a message may show the rest of the value escaped
            runs = re.findall(r"[!-~]+", text)
            words.update(runs[1:] or runs)
        parts = _split_url(url)
        pairs = (pair.partition("=") for pair in parts.query.split("&"))
        found = [value for name, _, value in pairs if re.search(_KEY_PARAMETER, name)]
        found.append(parts.netloc.rpartition("@")[0].partition(":")[2])
        for proxy in (proxies or {}).values():
            # urlsplit fails for a password with special characters, and the library shows a part of the password
            password = re.sub("^[^@:/]*://", "", str(proxy)).rpartition("@")[0].partition(":")[2]
            found += [password, *re.split(r"[#/?\[\]@:]", password)]
        words.update(form for value in found for form in (value, unquote(value)))
        # shorter ones are common words, which messages need
        kept = (word for word in words if len(word) >= 8 or (len(word) >= 4 and not word.isalpha()))
        self.words = sorted(kept, key=len, reverse=True)
        # pieces that detect an echo that was cut, encoded in Base64, or changed in case
        self._pieces = {
            form[at : at + size].lower()
            for word in self.words
            for size, forms in ((12, (word,)), (16, _base64_forms(word)))
            for form in forms
            for at in range(len(form) - size + 1)
        }

    def hide(self, text: str) -> str:
        """The text without secrets, even if a secret is cut off after eight characters or is encoded"""
        for word in self.words:
            text = text.replace(word, _HIDDEN)
            if word[:8] in text and len(word) > 8:
                for length in range(len(word) - 1, 7, -1):
                    text = text.replace(word[:length], _HIDDEN)
        return self._without_echoes(text) if self._pieces else text

    def _without_echoes(self, text: str) -> str:
        shown, folded = list(text), text.lower() if text.isascii() else "".join(each.lower()[:1] for each in text)
        for size in (12, 16):
            for at in range(len(folded) - size + 1):
                if folded[at : at + size] in self._pieces:
                    shown[at : at + size] = ["\0"] * size
        return re.sub("\0+", _HIDDEN, "".join(shown)) if "\0" in shown else text

    def hide_bytes(self, data: bytes) -> bytes:
        return self.hide(data.decode("latin-1")).encode("latin-1")

    def hide_request(self, request: Any) -> Any:
        """A copy of a prepared request without secrets; None stays None"""
        if not hasattr(request, "headers"):
            return request
        copied = request.copy()
        for name in _key_headers(copied.headers or {}):
            copied.headers[name] = _HIDDEN
        copied.url = self.hide(copied.url or "")
        return copied

    def hide_response(self, response: requests.Response) -> None:
        """Removes the secrets from a response"""
        response.request = self.hide_request(response.request)
        response.url = self.hide(getattr(response, "url", None) or "")
        response._next = None  # the request for a redirect holds the key
        for name, value in response.headers.items():
            response.headers[name] = self.hide(value)

    def hide_error(self, error: SheepError) -> None:
        """Removes the secrets from an error, and drops the errors that caused it if they show a secret"""
        error.args = tuple(map(self.hide, error.args))
        error.request = self.hide_request(error.request)
        for name in ("code", "vendor_code", "request_id"):
            value = getattr(error, name)
            if isinstance(value, str) and value != self.hide(value):
                setattr(error, name, self.hide(value))
        for behind in _chain(error)[1:]:
            behind.__traceback__ = None  # frames of requests and urllib3 hold the headers
            if isinstance(behind, requests.RequestException):
                behind.request = self.hide_request(behind.request)
            shown = f"{behind!r} {vars(behind)!r}"
            if shown != self.hide(shown):
                error.__cause__ = error.__context__ = None
                return


@functools.lru_cache(16)  # a long key has many pieces
def _secrets_of(headers: tuple[tuple[str, Any], ...], url: str, proxies: tuple[tuple[str, str], ...]) -> _Secrets:
    return _Secrets(dict(headers), url, dict(proxies))


def _base64_forms(word: str) -> list[str]:
    """The Base64 forms of a word at each position in an encoded text"""
    encoded = (base64.b64encode(b"\0" * before + word.encode())[2 * before : -4].decode() for before in range(3))
    return [form.replace("+", plus).replace("/", slash) for form in encoded for plus, slash in ("+/", "-_")]


def _environment_proxies() -> dict[str, str]:
    names = ("http_proxy", "https_proxy", "all_proxy")
    return {name: os.environ[name] for each in names for name in (each, each.upper()) if os.environ.get(name)}


def _split_url(url: str) -> SplitResult:
    """The parts of a URL; empty parts if the URL is invalid"""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def _chain(error: BaseException, end: BaseException | None = None) -> list[BaseException]:
    """An error and its causes, the first cause last, up to ``end``"""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link is not end and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain


def _raise_callers_own(error: BaseException, end: BaseException | None = None) -> None:
    """Raises the exception of a signal handler that a library took for its own failure

    A function is a signal handler if one of its variables is the frame that it interrupted.
    """
    for link in reversed(_chain(error, end)):  # later errors hold its traceback too
        trace = link.__traceback__
        while trace is not None and trace.tb_next is not None:
            interrupted, trace = trace.tb_frame, trace.tb_next
            if any(_holds(value, interrupted) for value in trace.tb_frame.f_locals.values()):
                raise link from link.__cause__


def _holds(value: Any, frame: Any) -> bool:
    """Whether a value is the frame, or a tuple with the frame (``*args``)"""
    return value is frame or (type(value) is tuple and any(item is frame for item in value))


#: the result of _json for invalid JSON; no valid JSON gives this object
_NO_JSON = object()


#: accepts raw control characters in strings, which some servers send; json.loads would build a decoder for each call
_JSON = json.JSONDecoder(strict=False)


def _json(text: str | bytes | bytearray) -> Any:
    """The value of a JSON text, or _NO_JSON; an error of the parser would keep the whole text"""
    try:
        return _JSON.decode(text) if isinstance(text, str) else json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return _NO_JSON


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait by the headers of a response, or None if there is no valid one

    ``retry-after-ms`` comes first (OpenAI, Azure), except 0: Azure sends 0 beside a valid ``Retry-After``.
    Then ``Retry-After``, RFC 9110 section 10.2.3: a date, or seconds, here also fractional.
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds:
        return milliseconds / 1000
    value = headers.get("retry-after")
    seconds = _number(value)
    if seconds is None and value:
        date = _http_date(value)
        seconds = None if date is None else max(0.0, date - time.time())
    return seconds


def _number(text: str | None) -> float | None:
    match = re.match(r"\s*([0-9]{1,999}(?:\.[0-9]{0,9})?)\s*$", text or "", re.ASCII)
    return min(float(match.group(1)), threading.TIMEOUT_MAX) if match else None


def _http_date(text: str) -> float | None:
    try:  # email.utils gives None before Python 3.10 and raises from then on
        date = email.utils.parsedate_tz(text)
        return None if date is None else float(email.utils.mktime_tz(date))
    except (ValueError, OverflowError, IndexError, UnboundLocalError):  # its own defects before 3.10 raise the last two
        return None


# ============================================================================================================
# 3. Values: immutable data and the one fold over it. May use: Errors
# ============================================================================================================


class _TupleType(type):
    """The type of the NamedTuple of this file, which makes typing's named tuples in less time and documents fields

    The doc of a field is its annotation and its line, if any, in the docstring of the class.
    """

    def __new__(cls, name: str, bases: tuple[Any, ...], namespace: dict[str, Any]) -> Any:
        types: dict[str, str] = namespace["__annotations__"]  # typing would compile each of them
        defaults = [namespace.pop(field) for field in types if field in namespace]
        made: Any = collections.namedtuple(name, types, defaults=defaults)  # type: ignore[misc]
        members = {"__orig_bases__": bases[0].__orig_bases__, **namespace}
        if "__iter__" in namespace:  # the usual methods of a named tuple would call it
            members["_asdict"] = lambda self: dict(zip(types, tuple.__iter__(self)))
            members["_replace"] = lambda self, **changes: made(**{**self._asdict(), **changes})
            members["__reduce__"] = lambda self: (made, tuple(self._asdict().values()))
        for key, value in members.items():
            setattr(made, key, value)
        docs = dict(types)
        for line in (made.__doc__ or "").splitlines():  # python -OO drops docstrings
            fields, _, text = line.strip().partition(": ")
            docs.update((field, f"{types[field]}: {text}") for field in fields.split(", ") if field in types)
        for field, doc in docs.items():
            getattr(made, field).__doc__ = doc
        return made


if TYPE_CHECKING:
    from typing import NamedTuple, TypedDict
else:

    class TypedDict:  # typing's compiles each annotation, which takes milliseconds
        def __init_subclass__(cls, total=True):
            pass

    NamedTuple = type.__new__(_TupleType, "NamedTuple", (), {"__orig_bases__": (typing.NamedTuple,)})


class ServerSentEvent(NamedTuple):
    """One event of a stream, as in the WHATWG event stream interpretation

    event: its type
    id: the last event id in force, also where this event did not set one
    retry: the reconnection time in milliseconds that the block of this event set, or None
    """

    event: str = "message"
    data: str = ""
    id: str = ""
    retry: int | None = None


class ToolCall(NamedTuple):
    """A tool call: the part in one Chunk, or the whole call in a Completion

    index: the position among the calls of an answer; parts with the same index belong together
    arguments: the arguments as text, unchanged
    """

    index: int = 0  # type: ignore[assignment]  # the field's own term; tuple.index is not of use here
    id: str = ""
    name: str = ""
    arguments: str = ""

    @property
    def parsed(self) -> Any:
        """The arguments as JSON, ``{}`` for none; InvalidStreamError where they are not whole JSON"""
        if not self.arguments.strip():
            return {}
        parsed = _json(self.arguments)
        if parsed is _NO_JSON:
            raise InvalidStreamError(
                f"the arguments of tool call {self.name!r} are not whole JSON: {_excerpt(self.arguments)}"
            )
        return parsed


class Usage(NamedTuple):
    """The tokens of a request; counts are inclusive, and 0 where the provider gives none

    input_tokens: all input, cached or not
    output_tokens: all output, reasoning included
    cost: the charge on the wire, in the currency of the provider (US dollars so far), or None
    source: who counted: provider; without its count, and with an alignment, the tokenizer (local), or an estimate
    alignment: the result of a TokenAlignment, if any: verified, mismatch, or unverified where nothing can be compared
    provider, local: the input and output tokens by the provider, and by sheepsse; None is not counted
    aligned_at: when they were compared, in seconds since 1970, or None
    """

    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0
    cost: Decimal | None = None
    source: str = "provider"
    alignment: str | None = None
    provider: tuple[int | None, int | None] | None = None
    local: tuple[int | None, int | None] | None = None
    aligned_at: float | None = None


class Chunk(NamedTuple):
    """One step of an answer

    finish_reason: why this choice ended, in the vendor's word; None before the end
    finish: the finish reason in a common word: stop, length, tool_calls, refusal or other
    index: the index of the choice or candidate
    event_id: the id of its event, "" where the event has none
    raw: the data of its event, parsed
    id, model: the id and the model of the answer, where the event names them
    vendor: with the finish reason, by the name of the dialect: what the next request must send back to the vendor
    """

    text: str = ""
    reasoning: str = ""
    refusal: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str | None = None
    finish: str | None = None
    usage: Usage | None = None
    index: int = 0  # type: ignore[assignment]
    event_id: str = ""
    raw: Any = None
    id: str = ""
    model: str = ""
    vendor: Mapping[str, Any] | None = None


class Completion(NamedTuple):
    """An answer, or the part that was received

    finish_reason: why it ended, in the vendor's word; None before the end
    complete: False after an error, a cancel or an early end of reading
    vendor: by the name of the dialect: what the next request must send back to the vendor
    cost: of the usage, by the provider's own count or the client's prices; else None, see ``Stream.cost``
    """

    text: str = ""
    reasoning: str = ""
    refusal: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str | None = None
    usage: Usage | None = None
    model: str = ""
    id: str = ""
    complete: bool = False
    vendor: Mapping[str, Any] | None = None
    cost: Decimal | None = None

    def __str__(self) -> str:
        return self.text

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("a Completion is one whole answer: its text is completion.text; stream() gives the pieces")

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message, to be appended to the conversation

            messages.append(stream.completion.message)
            for call in stream.tool_calls:
                messages.append({"role": "tool", "tool_call_id": call.id, "content": answers[call.name](**call.parsed)})

        The message has OpenAI's shape, which every dialect translates. Signatures and hidden reasoning, which only
        their own vendor understands, are under ``vendor``: only the dialect of that vendor sends them.
        """
        message: dict[str, Any] = {"role": "assistant", "content": self.text or (None if self.tool_calls else "")}
        if self.refusal:
            message["refusal"] = self.refusal
        if self.tool_calls:
            functions = [{"name": call.name, "arguments": call.arguments or "{}"} for call in self.tool_calls]
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": function}
                for call, function in zip(self.tool_calls, functions)
            ]
        if self.vendor:
            message["vendor"] = self.vendor
        return message


class ResumePoint(NamedTuple):
    """The point where a stream was lost, for ``resume_from=``, also in another process; plain data for JSON

    event_id: the id of the last event that was received, "" where the server sends none
    tokens_received: tokens received, by the provider's count, or None
    chars_received: characters of text received
    text: the text received
    cursor: all else that is needed to resume, as JSON
    pause: to send back after a vendor's pause: Gemini's continuationToken; Anthropic's container and content (blocks)
    """

    event_id: str = ""
    tokens_received: int | None = None
    chars_received: int = 0
    text: str = ""
    cursor: str = ""
    pause: Mapping[str, Any] | None = None


SheepError.partial = Completion()
SheepError.resume_point = ResumePoint()


def _has_content(chunk: Chunk) -> bool:
    """Whether a chunk holds a piece of the answer itself"""
    return bool(chunk.text or chunk.reasoning or chunk.refusal or chunk.tool_calls)


def _chunk_with(chunk: Chunk, field: str, text: str) -> Chunk:
    """The chunk with a text, reasoning or refusal"""
    changes: dict[str, Any] = {field: text}
    return chunk._replace(**changes)


class _Text(bytearray):
    """A text that grows: one buffer takes a byte a letter, where a str for each piece would take 50 more"""

    def add(self, piece: str) -> None:
        self += piece.encode("utf-8", "surrogatepass")

    def __str__(self) -> str:
        return self.decode("utf-8", "surrogatepass")


class _Answer:
    """The fold: the chunks of one choice so far, merged"""

    def __init__(self, index: int = 0) -> None:
        self.index = index
        self.text, self.reasoning, self.refusal = _Text(), _Text(), _Text()
        #: bytes of text, reasoning, refusal and arguments, of all choices
        self.size = 0
        self.tool_calls: dict[int, tuple[str, str, list[str]]] = {}
        self.finish_reason: str | None = None
        self.finish: str | None = None
        self.vendor: Mapping[str, Any] | None = None
        self.usage: Usage | None = None
        self.model = ""
        self.id = ""
        self.event_id = ""
        self.complete = False
        #: whether the finish reason is final: some servers send one with every piece
        self.settled = False
        self._was_open = False  # whether a piece was received without a finish reason
        #: whether a piece of text, reasoning, refusal or tool call was received, of any choice
        self.given = False

    def add(self, chunk: Chunk) -> bool:
        """Folds a chunk in; True where the chunk holds a piece of the answer"""
        text, reasoning, refusal, calls, reason = chunk[:5]
        has_content = bool(text or reasoning or refusal or calls)
        self.given = self.given or has_content
        if chunk.usage is not None:  # cumulative where it is repeated: the last one counts
            self.usage = chunk.usage
        self.id = self.id or chunk.id
        self.model = self.model or chunk.model
        self.event_id = chunk.event_id or self.event_id
        is_mine = chunk.index == self.index
        for received, piece in ((self.text, text), (self.reasoning, reasoning), (self.refusal, refusal)):
            if piece:
                encoded = piece.encode("utf-8", "surrogatepass")
                self.size += len(encoded)
                if is_mine:
                    received += encoded
        for call in calls:
            self.size += len(call.arguments.encode("utf-8", "surrogatepass"))
            if is_mine:
                # id and name come once; later parts carry none, or empty ones (Qwen)
                id, name, arguments = self.tool_calls.get(call.index, ("", "", []))
                arguments.append(call.arguments)
                self.tool_calls[call.index] = (id or call.id, name or call.name, arguments)
        if not is_mine:
            return has_content
        if reason:  # with text: perhaps of a server that sends a finish reason with every piece
            self.settled = self._was_open or not has_content
            self.finish_reason, self.finish = reason, chunk.finish
        elif has_content:
            self.settled, self._was_open = False, True
        self.vendor = chunk.vendor or self.vendor
        return has_content

    def without_failure(self) -> _Answer:
        """The answer, without a finish reason that says that the server failed"""
        if self.finish != "other":
            return self
        answer = copy.copy(self)
        answer.finish_reason = answer.finish = answer.vendor = None
        return answer

    def calls(self) -> tuple[ToolCall, ...]:
        return tuple(
            ToolCall(index, id, name, "".join(arguments))
            for index, (id, name, arguments) in sorted(self.tool_calls.items())
        )

    def completion(self) -> Completion:
        return Completion(
            text=str(self.text),
            reasoning=str(self.reasoning),
            refusal=str(self.refusal),
            tool_calls=self.calls(),
            finish_reason=self.finish_reason,
            usage=self.usage,
            model=self.model,
            id=self.id,
            complete=self.complete,
            vendor=self.vendor,
        )

    def resume_point(self, events: Sequence[Sequence[Any]] = ()) -> ResumePoint:
        """The point that was reached; ``events`` are the marks of the last events"""
        end = [self.finish_reason, self.finish, self.given, self.settled]
        rest = [str(self.reasoning), str(self.refusal), self.calls(), self.id, end, events]
        return ResumePoint(
            event_id=self.event_id,
            tokens_received=None if self.usage is None else self.usage.output_tokens,
            chars_received=len(str(self.text)),
            text=str(self.text),
            cursor=json.dumps(rest),
        )

    @classmethod
    def at(cls, point: ResumePoint) -> tuple[_Answer, list[Any]]:
        """The answer up to a point, and the marks of the last events"""
        try:
            rest: Any = json.loads(point.cursor) if point.cursor else ["", "", [], "", [None, None, False], []]
            reasoning, refusal, calls, id, (finish_reason, finish, given, *settled), events = rest
            texts = {
                "text": point.text,
                "reasoning": reasoning,
                "refusal": refusal,
                "id": id,
                "event_id": point.event_id,
            }
            if finish_reason is not None:
                texts.update(finish_reason=finish_reason, finish=finish)
            _check_types(texts, _CHUNK_TYPES)
            parts = tuple(ToolCall(*call) for call in calls)
            for part in parts:
                _check_types(part._asdict(), _CALL_TYPES)
            marks = [(str(event_id), checksum) for event_id, checksum in events]
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"resume_from takes a resume_point as it was given: {error}") from error
        answer = cls()
        answer.add(Chunk(**texts, tool_calls=parts))
        answer.given = answer.given or given is True  # of another choice
        answer.settled = settled == [True]
        return answer, marks


#: the types of the fields of a chunk, a call and a usage in a file or from another process
_CALL_TYPES = {"index": int, "id": str, "name": str, "arguments": str}
_CHUNK_TYPES = {
    **dict.fromkeys(("text", "reasoning", "refusal", "finish_reason", "finish", "event_id", "id", "model"), str),
    **{"tool_calls": list, "usage": dict, "index": int, "vendor": dict},
}
_USAGE_TYPES = {
    **dict.fromkeys((name for name in Usage._fields if name.endswith("_tokens")), int),
    **{"cost": str, "source": str, "alignment": str, "provider": list, "local": list, "aligned_at": float},
}


def _check_types(fields: Any, types: Mapping[str, type]) -> None:
    """Raises TypeError for a field that ``types`` does not name, or a value of another type"""
    for name, value in fields.items():
        if name not in types or not isinstance(value, types[name]) or isinstance(value, bool):
            raise TypeError(f"{str(name)[:50]!r} is a {type(value).__name__}")


def collect(chunks: Iterable[Chunk], index: int = 0) -> Completion:
    """The answer of the choice ``index``, from all chunks

    The answer is ``complete`` if ``chunks`` ends without an error, as ``iter_chunks`` does only for a whole stream.
    """
    answer = _Answer(index)
    for chunk in chunks:
        answer.add(chunk)
    answer.complete = True
    return answer.completion()


def iter_text(chunks: Iterable[Chunk]) -> Iterator[str]:
    """The pieces of text of choice 0, without empty ones"""
    for chunk in chunks:
        if chunk.text and chunk.index == 0:
            yield chunk.text


def _plain_usage(usage: Usage | None) -> dict[str, Any] | None:
    """A usage as plain data for JSON"""
    return None if usage is None else {**usage._asdict(), "cost": None if usage.cost is None else str(usage.cost)}


_SURROGATE = re.compile("[\ud800-\udfff]")


def _without_surrogates(text: str) -> str:
    """The text with pairs of surrogates joined, and U+FFFD for lone surrogates"""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _excerpt(text: str | bytes, limit: int = 200) -> str:
    """The beginning of a text, on one line, for a message"""
    if isinstance(text, bytes):
        text = text[: 4 * limit].decode("utf-8", "replace")
    short = " ".join(text[: 2 * limit].split())
    return repr(short if len(short) <= limit else short[:limit] + "...")


# ============================================================================================================
# 4. Framing: a response's bytes as they arrive; bytes to events and back. May use: Values and above
# ============================================================================================================

#: bytes of the largest event, by default
_MAX_EVENT_SIZE = 8 * 1024 * 1024
#: bytes of the text, reasoning and arguments of an answer, by default
_MAX_ANSWER_SIZE = 64 * 1024 * 1024
#: bytes of the longest id of an event
_MAX_ID_SIZE = 16 * 1024


def iter_bytes(response: requests.Response) -> Iterator[bytes]:
    """The body of a response, decompressed, each block as soon as it arrives

    For chunked, Content-Length, close-delimited and gzip bodies alike; the response must come from a request
    with ``stream=True``. Bytes received before a failure are returned before the failure is raised:
    StreamInterrupted for a connection lost or a body shorter than its Content-Length, StreamTimeout for a
    read time-out, InvalidStreamError for a body that cannot be decompressed.
    """
    read = _reader(response)
    while True:
        try:
            block = read()
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, OverflowError) as error:
            raise _body_error(error) from error
        if not block:
            return
        yield block


def _body_error(error: Exception) -> SheepError:
    """The error for a failure to read a body, of requests or urllib3"""
    if isinstance(error, SheepError):
        return error
    _raise_callers_own(error)
    if isinstance(error, (urllib3.exceptions.DecodeError, requests.exceptions.ContentDecodingError)):
        return InvalidStreamError(f"the body cannot be decompressed as its Content-Encoding says: {error}")
    if _is_time_out(error):
        return StreamTimeout("no byte came for the read time-out")
    return StreamInterrupted(f"the connection was lost in the middle of the answer ({error})")


def _is_time_out(error: BaseException, end: BaseException | None = None) -> bool:
    """Whether a socket timed out; a TimeoutError may also mean that the system gave up the connection"""
    chain = _chain(error, end)
    if any(getattr(link, "errno", None) == errno.ETIMEDOUT for link in chain):
        return False
    kinds = (socket.timeout, requests.Timeout, urllib3.exceptions.ReadTimeoutError)
    # requests wraps a time-out inside the body as ConnectionError(ReadTimeoutError)
    return any(isinstance(each, kinds) for link in chain for each in (link, *link.args[:1]))


def _until_failure(blocks: Iterable[_T], failure: list[SheepError]) -> Iterator[_T]:
    """The same blocks; a failure ends them, and is appended to ``failure``"""
    try:
        for block in blocks:  # noqa: UP028  # "yield from" would close blocks when this generator is closed
            yield block
    except SheepError as error:
        failure.append(error)


def parse_line(line: str | bytes) -> tuple[str, str] | None:
    """The field and value of one line of an event stream; None for a blank line or a comment

    Takes a line in any state, with or without its line end, and never raises: invalid UTF-8 is replaced, a line
    without a colon is a field with an empty value, one leading space of a value is removed.
    WHATWG HTML, section 9.2.6 "Interpreting an event stream".
    """
    encoded = line.encode("utf-8", "surrogatepass") if isinstance(line, str) else bytes(line)
    field, value = _split_line(encoded.rstrip(b"\r\n"))
    return (_decode(field), _decode(value)) if field else None


def _split_line(line: bytes) -> tuple[bytes, bytes]:
    """The field, empty for a comment, and its value"""
    field, _, value = line.partition(b":")
    return field, value[1:] if value[:1] == b" " else value


def _decode(value: bytes | bytearray) -> str:
    return value.decode("utf-8", "replace")


class SSEDecoder:
    """Bytes in, events out: the WHATWG event stream algorithm, over blocks cut anywhere

    The cost is linear in the input, however it is cut. An event is returned as soon as the first byte of its blank
    line has arrived. An event, or a line, of more than ``max_event_size`` bytes is an InvalidStreamError, which is
    raised after the events before it were returned; that size bounds the memory. Belongs to one thread.
    """

    _max_id_size: int | None = None

    def __init__(self, max_event_size: int = _MAX_EVENT_SIZE, last_event_id: str = "") -> None:
        #: the id to reconnect with, as of the last blank line
        self.last_event_id = last_event_id
        #: the last reconnection time of the server in milliseconds, or None
        self.retry: int | None = None
        self._max_event_size = max_event_size
        self._failure: InvalidStreamError | None = None
        self._first_line = True
        self._after_cr = False
        self._open = bytearray()  # a line without its end
        self._data: bytes | bytearray | None = None  # of the open event; None where it has no data
        self._size = 0  # bytes of its data lines, with the names of the fields
        self._event = b""
        self._id, self._decoded_id = last_event_id.encode("utf-8"), last_event_id
        self._event_retry: int | None = None
        self._events: list[ServerSentEvent] = []  # of the current block

    def feed(self, block: bytes) -> list[ServerSentEvent]:
        """The events that this block completes"""
        if self._failure:
            raise self._failure
        if self._after_cr and block:
            self._after_cr = False
            if block[:1] == b"\n":
                block = block[1:]
        if not block:
            return []
        lines = block.splitlines()  # on bytes: at CR, LF and CRLF, and nowhere else
        self._after_cr = block[-1:] == b"\r"
        rest = b"" if block[-1:] in b"\r\n" else lines.pop()
        if lines and self._open:
            lines[0] = bytes(self._open + lines[0])
            self._open = bytearray()
        events = self._events = []
        try:
            for line in lines:
                if self._size + len(line) > self._max_event_size:
                    raise _too_large("an event", self._max_event_size)
                if line[:6] == b"data: " and self._data is None and not self._first_line:  # most lines are this one
                    self._size, self._data = len(line), line[6:]
                elif line:
                    self._line(line)
                else:
                    self._blank_line()
            if rest:
                self._open += rest
                if self._size + len(self._open) > self._max_event_size:
                    raise _too_large("an event", self._max_event_size)
        except InvalidStreamError as error:
            self._failure = error
            self._open, self._data = bytearray(), None
            if not events:  # otherwise the next call raises: the events before come first
                raise
        return events

    def _line(self, line: bytes) -> None:
        line = self._without_bom(line) if self._first_line else line
        field, _, value = line.partition(b":")
        if value[:1] == b" ":
            value = value[1:]
        if field == b"data":
            self._size += len(line)
            if self._data is None:
                self._data = value
            else:  # one buffer: a list of lines would take more memory than their text
                self._data = self._data if isinstance(self._data, bytearray) else bytearray(self._data)
                self._data += b"\n" + value
        elif field == b"event":
            self._event = value
        elif field == b"id":
            if value != self._id and b"\0" not in value:
                if self._max_id_size is not None and len(value) > self._max_id_size:
                    raise InvalidStreamError(f"the id of an event is longer than {self._max_id_size} bytes")
                self._id, self._decoded_id = value, value.decode("utf-8", "replace")  # once, for all its events
        elif field == b"retry" and value.isdigit():  # bytes.isdigit knows ASCII digits only
            self.retry = self._event_retry = int(value.lstrip(b"0")[:16] or b"0")  # more digits mean for ever, too
        else:
            self._unknown(line)

    def _without_bom(self, line: bytes) -> bytes:
        first, self._first_line = self._first_line, False
        return line[3:] if first and line[:3] == b"\xef\xbb\xbf" else line

    def _unknown(self, line: bytes) -> None:
        """Handles a line that is no field; here the line is ignored"""

    def _blank_line(self) -> None:
        self._first_line = False
        # an id is in force also if its block has no data
        self.last_event_id = self._decoded_id
        if self._data is not None:
            event = self._event.decode("utf-8", "replace") or "message"
            data = self._data.decode("utf-8", "replace")
            self._events.append(ServerSentEvent(event, data, self.last_event_id, self._event_retry))
        self._data, self._size, self._event, self._event_retry = None, 0, b"", None

    def flush(self) -> list[ServerSentEvent]:
        """At the end of the input: the last event, where it lacks only its blank line

        The specification drops an unterminated event. So does this decoder, unless the data is ``[DONE]`` or a whole
        JSON object or array, which cannot be the beginning of longer data.
        """
        if self._failure:
            raise self._failure
        line = self._without_bom(bytes(self._open))
        self._open = bytearray()
        if line and line[:1] != b":":  # a comment changes nothing
            if _split_line(line)[0] == b"data":
                self._line(line)
            else:
                self._data = None  # an event name or an id may be cut short
        self._events = []
        if self._data is not None and _is_whole(_decode(self._data)):
            self._blank_line()
        self._data = None
        return self._events


def _too_large(part: str, limit: int) -> InvalidStreamError:
    return InvalidStreamError(
        f"{part} of the stream is larger than {limit} bytes; raise max_event_size if that is meant"
    )


def _is_whole(data: str) -> bool:
    """Whether the data is ``[DONE]``, or a whole JSON object or array"""
    data = data.strip()
    if data == "[DONE]":
        return True
    return data[-1:] in ("}", "]") and isinstance(_json(data), (dict, list))


def _blocks_of(source: requests.Response | Iterable[bytes]) -> Iterable[bytes]:
    # a response of requests, or of a library like it, has iter_content; plain blocks do not
    return iter_bytes(source) if hasattr(source, "iter_content") else source  # type: ignore[arg-type]


def _decoded(blocks: Iterable[bytes], decoder: SSEDecoder | _JSONDecoder) -> Iterator[ServerSentEvent]:
    failure: list[SheepError] = []
    for block in _until_failure(blocks, failure):
        yield from decoder.feed(block)
    yield from decoder.flush()
    if failure:
        raise failure[0]


def iter_events(
    source: requests.Response | Iterable[bytes], *, max_event_size: int = _MAX_EVENT_SIZE
) -> Iterator[ServerSentEvent]:
    """The events of a ``text/event-stream`` body, from a response or from any blocks of bytes

    An unterminated last event is dropped (see SSEDecoder.flush). Raises the errors of iter_bytes and SSEDecoder,
    after the events before.
    """
    return _decoded(_blocks_of(source), SSEDecoder(max_event_size))


def iter_json_lines(
    source: requests.Response | Iterable[bytes], *, max_event_size: int = _MAX_EVENT_SIZE
) -> Iterator[ServerSentEvent]:
    """The objects of an NDJSON body, or of a JSON array, as events: each as soon as its last byte has arrived

    Other input than JSON objects is an InvalidStreamError, after the events before it; an object that is cut off is
    dropped. Raises the errors of iter_bytes, after the events before.
    """
    return _decoded(_blocks_of(source), _JSONDecoder(max_event_size))


class _JSONDecoder:
    """Bytes in, JSON objects out: the outermost ones, one after another or in one array"""

    #: the rest of a string and its end, or a backslash that is the last byte of a block
    _IN_STRING = rb'(?s)[^"\\]*(?:\\.[^"\\]*)*(["\\]?)'
    #: whole strings and other bytes, up to a brace or to the quote of a string that is not whole
    _OUTSIDE = rb'(?s)[^"{}]*(?:"[^"\\]*(?:\\.[^"\\]*)*"[^"{}]*)*(["{}]?)'
    #: bytes that may stand between two objects
    _BETWEEN = rb"[\s,\[\]]*"

    def __init__(self, max_event_size: int = _MAX_EVENT_SIZE) -> None:
        self._max_event_size = max_event_size
        self._failure: InvalidStreamError | None = None
        # not compiled with the class, which would slow down the import for all who never read JSON
        patterns = self._IN_STRING, self._OUTSIDE, self._BETWEEN
        self._in_string_match, self._outside_match, self._between_match = (re.compile(each).match for each in patterns)
        self._object = bytearray()  # the object that is not whole yet
        #: whether no object has been returned yet
        self.is_first = True
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._bom = b"\xef\xbb\xbf"

    @property
    def is_inside(self) -> bool:
        """Whether an object is open"""
        return self._depth > 0

    def feed(self, block: bytes) -> list[ServerSentEvent]:
        if self._failure:
            raise self._failure
        events: list[ServerSentEvent] = []
        position = 0
        try:
            while position < len(block):
                position = self._inside(block, position, events) if self._depth else self._between(block, position)
        except InvalidStreamError as error:
            self._failure = error
            self._object = bytearray()
            if not events:
                raise
        return events

    def _between(self, block: bytes, position: int) -> int:
        """Skips to the next object, and returns its position in the block"""
        while self._bom and block[position : position + 1] == self._bom[:1]:
            position, self._bom = position + 1, self._bom[1:]
        match = self._between_match(block, position)
        position = match.end() if match else position
        if position < len(block):
            self._bom = b""
            if block[position : position + 1] != b"{":
                raise InvalidStreamError(f"expected JSON objects, got {_excerpt(block[position:])}")
            self._depth, position = 1, position + 1
            self._object = bytearray(b"{")
        return position

    def _inside(self, block: bytes, start: int, events: list[ServerSentEvent]) -> int:
        """Reads to the end of the object or of the block, and returns the position"""
        position = start
        while self._depth and position < len(block):
            if self._escaped:  # a backslash before this byte takes its meaning
                self._escaped, position = False, position + 1
                continue
            match = (self._in_string_match if self._in_string else self._outside_match)(block, position)
            assert match is not None  # for an empty match is one
            position, mark = match.end(), match.group(1)
            if mark == b'"':
                self._in_string = not self._in_string
            elif mark == b"\\":
                self._escaped = True
            elif mark:
                self._depth += 1 if mark == b"{" else -1
        self._object += block[start:position]
        if len(self._object) > self._max_event_size:
            raise _too_large("a JSON object", self._max_event_size)
        if not self._depth:
            events.append(ServerSentEvent(data=_decode(self._object)))
            self._object, self.is_first = bytearray(), False
        return position

    def flush(self) -> list[ServerSentEvent]:
        if self._failure:
            raise self._failure
        return []


class _AnswerDecoder(SSEDecoder):
    """Reads also errors that are no events: in a field ``error`` (llama.cpp), or as JSON without ``data:``"""

    _max_id_size = _MAX_ID_SIZE  # each event would carry it, and each reconnect send it

    def __init__(self, max_event_size: int = _MAX_EVENT_SIZE) -> None:
        super().__init__(max_event_size)
        self._bare: _JSONDecoder | None = None  # an object that began without a field

    def _unknown(self, line: bytes) -> None:
        field, value = _split_line(line)
        if field == b"error" and value.strip() not in (b"", b"null"):
            self._add(ServerSentEvent("error", _decode(value)))
        elif line.strip() == b"[DONE]":
            self._add(ServerSentEvent(data="[DONE]"))
        else:
            self._bare_line(line)

    def _bare_line(self, line: bytes) -> None:
        """A line that may be JSON, or a part of it"""
        starts = (b"{", b"[")
        if line[:1] in starts or (self._bare is None and line.lstrip()[:1] in starts):
            self._bare = _JSONDecoder(self._max_event_size)
        events: list[ServerSentEvent] = []
        if self._bare is not None:
            try:
                events = self._bare.feed(line + b"\n")
            except InvalidStreamError:  # no JSON: the line is ignored, as any line that is no field
                self._bare = None
        for event in events:
            self._bare = None
            if _is_whole(event.data):
                self._add(event)

    def _add(self, event: ServerSentEvent) -> None:
        self._blank_line()  # the event before comes first
        self._events.append(event)

    def flush(self) -> list[ServerSentEvent]:
        line, bare = self._without_bom(bytes(self._open)), []
        if line and _split_line(line)[0] not in (b"", b"data", b"event", b"id", b"retry"):
            bare = self._events = []
            self._open = bytearray()
            self._unknown(line)
        before, events = self.last_event_id, super().flush()
        if before:  # the line with the id of the event, by which the server would resume, may be missing
            events = [event for event in events if event.id != before or event.data == "[DONE]"]
        return bare + events


class _BodyDecoder:
    """Bytes of an answer in, events out; detects the framing, and raises InvalidStreamError for an unknown one

    ``is_bounded`` says that the body is one document with a known end.
    """

    def __init__(self, content_type: str, format: str | None, max_event_size: int, is_bounded: bool = False) -> None:
        self._content_type, self._format, self._max_event_size = content_type, format, max_event_size
        self._is_bounded = is_bounded
        self._start, self._blank = bytearray(), True
        #: the decoder; None until the framing is known
        self.decoder: SSEDecoder | _JSONDecoder | None = None

    def feed(self, block: bytes) -> list[ServerSentEvent]:
        """The events that this block completes"""
        if self.decoder is not None:
            return self.decoder.feed(block)
        # blank lines before the first event are ignored in any framing; spaces belong to its line
        self._blank = self._blank and block.isspace()
        line = 1 + max(block.rfind(b"\r"), block.rfind(b"\n")) if self._blank else 0
        if line:
            self._start.clear()
        self._start += block[line:]
        is_all = len(self._start) > self._max_event_size
        return self._begin(is_all) if is_all or not self._blank else []

    def _begin(self, is_all: bool) -> list[ServerSentEvent]:
        """Begins to decode, if the framing is known; ``is_all`` says that no more bytes can help"""
        kind = self._format or _framing(self._content_type, bytes(self._start.lstrip()[:1000]), is_all)
        if not kind:
            return []
        self.decoder = (_AnswerDecoder if kind == "sse" else _JSONDecoder)(self._max_event_size)
        return self.decoder.feed(bytes(self._start))

    def flush(self) -> list[ServerSentEvent]:
        """The last events, at the end of the body"""
        events = self._begin(True) if self.decoder is None else []
        return events if self.decoder is None else events + self.decoder.flush()

    def check_end(self) -> None:
        """Raises an error where the body ended inside its JSON"""
        if isinstance(self.decoder, _JSONDecoder) and self.decoder.is_inside:
            if self._is_bounded and self.decoder.is_first:
                raise InvalidStreamError(
                    f"expected JSON, got a whole body that is none: {_excerpt(bytes(self._start.lstrip()))}"
                )
            raise StreamInterrupted("the answer ended in the middle of its JSON")


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


_JSON_TYPES = frozenset({"application/json", "application/x-ndjson", "application/jsonl"})
#: how the first line of an event stream begins, a BOM aside
_FIRST_LINE = rb"(?:\xef\xbb\xbf)?(?:data|event|id|retry|error)?[:\r\n]|(?:data|id)$"


def _framing(content_type: str, start: bytes, is_all: bool) -> str:
    """Detects the framing, sse or json, by the Content-Type, and by the first line where that is wrong or missing

    "" means that more bytes are needed, unless ``is_all``. No field of an event stream begins with a brace or a
    bracket, and no JSON begins with the name of a field.
    """
    media_type = _media_type(content_type)
    is_json_type = media_type in _JSON_TYPES
    if start[:1] in (b"{", b"[") or (is_json_type and start[:4] in (b"\xef\xbb\xbf{", b"\xef\xbb\xbf[")):
        return "json"
    if not start or (media_type == "text/event-stream" and start[:1] != b"<"):
        return "sse" if start or is_all else ""
    if not (is_all or start[:1] == b"<" or len(start) >= 16 or b"\n" in start or b"\r" in start):
        return ""
    if media_type != "text/html" and re.match(_FIRST_LINE, start):
        return "sse"
    raise InvalidStreamError(
        f"expected Content-Type text/event-stream, got {content_type or 'none'!r} with {_excerpt(start)}; "
        "is the base URL that of the API?"
    )


def encode_event(event: ServerSentEvent) -> bytes:
    """The bytes of an event: the inverse of SSEDecoder

    No value can forge a second field or event: line ends in ``data`` become several data lines (the format knows
    one line end, so CR and CRLF come back as LF), and an ``event`` or ``id`` that holds a line end, or an ``id``
    with a NUL, is a ValueError because the format cannot carry it.
    """
    if event.retry is not None and not (isinstance(event.retry, int) and event.retry >= 0):
        raise ValueError(f"the reconnection time of an event is a whole number of milliseconds, got {event.retry!r}")
    for name, value, unfit in (("event", event.event, "\r\n"), ("id", event.id, "\r\n\0")):
        if any(character in value for character in unfit):
            raise ValueError(f"the {name} of an event cannot hold a line end or NUL, got {value!r}")
    lines = []
    if event.event not in ("", "message"):
        lines.append(f"event: {event.event}")
    if event.id:
        lines.append(f"id: {event.id}")
    if event.retry is not None:
        lines.append(f"retry: {event.retry:d}")
    lines.extend(f"data: {line}" for line in re.split("\r\n|\r|\n", event.data))
    return "\n".join([*lines, "", ""]).encode("utf-8", "replace")


class SSEClient:
    """The class of sseclient-py, for scripts that have ``sseclient.SSEClient(source).events()``

    The source is an iterable of bytes with ``close()``, or a requests.Response, whose events come as soon as they
    arrive. Where sseclient-py departs from the specification, this class follows the specification: a cut-off last
    event is dropped, ids persist and are "" where there is none.
    """

    def __init__(self, event_source: Any, char_enc: str = "utf-8") -> None:
        if char_enc.lower().replace("_", "-") not in ("utf-8", "utf8"):
            raise ValueError(f"an event stream is always UTF-8, got char_enc={char_enc!r}")
        self._source = event_source

    def events(self) -> Iterator[ServerSentEvent]:
        """The events, each as soon as it is whole"""
        return _decoded(_blocks_of(self._source), _StrictDecoder())

    def close(self) -> None:
        """Closes the source"""
        self._source.close()


class _StrictDecoder(SSEDecoder):
    """Drops every unterminated event, as in the specification"""

    def flush(self) -> list[ServerSentEvent]:
        if self._failure:
            raise self._failure
        return []


# ============================================================================================================
# 5. Dialects: what each API's requests, events and errors look like. May use: Framing and above
# ============================================================================================================


class Dialect:
    """The requests and events of one family of APIs; an instance reads one stream

    A subclass writes requests (``path``, ``key_headers``, ``body``) and parses events (``chunks``). It is put into
    ``DIALECTS`` under its name.
    """

    name = ""
    #: appended to the base URL and to the first of ``roots``, unless the base URL ends in a root already
    path = ""
    roots: tuple[str, ...] = ()
    #: the path of the list of models
    models_path = "/models"
    #: headers of every request
    headers: Mapping[str, str] = {}
    #: False for servers that never send an end marker: the end of the body is then the end of the answer
    require_end = True
    #: whether the end of the body ends an answer that has its finish reason
    ends_with_body = False
    #: options by the names that the vendor has for them in another place than the body, or under another name
    options: Mapping[str, str] = {}
    #: counts of a usage, by the names of _COUNTS, that their whole does not include
    excluded: frozenset[str] = frozenset()
    #: whether the end of a stream repeats the answer, to be compared with the pieces before
    compares = False
    #: names of events whose data must be JSON; other events without JSON are skipped
    event_names: frozenset[str] = frozenset({"message", "error"})

    def __init__(self, choices: int = 1) -> None:
        #: how many choices were requested
        self.choices = choices
        #: whether the answer is whole: nothing of it is lost where the stream ends now
        self.whole = False
        #: whether all choices have a finish reason: the answer is whole where the end marker follows
        self.finished = False
        #: whether nothing more can follow
        self.done = False
        #: whether the service is still making the answer, and it can be requested again
        self.pending = False
        #: whether the connection was lost after the answer was whole: the usage may be missing
        self.lost = False
        self._failure: SheepError | None = None  # by the finish reason of this event
        self._counts: dict[str, Any] = {}  # of the usage so far
        self._halves: dict[tuple[int, str | int], str] = {}  # halves of characters, by choice and field or tool call

    @classmethod
    def url(cls, base_url: str, model: str, stream: bool) -> str:
        """The URL of a request"""
        return cls.endpoint(base_url, cls.path)

    @classmethod
    def endpoint(cls, base_url: str, path: str) -> str:
        """A base URL with the path, before its query if it has one (Azure's api-version)"""
        parts = urlsplit(base_url)
        base = parts.path.rstrip("/")
        if cls.path and base.endswith(cls.path):  # the whole endpoint
            base = base[: -len(cls.path)]
        if cls.roots and not base.endswith(cls.roots):
            base += cls.roots[0]
        return urlunsplit(parts._replace(path=base + path))

    @classmethod
    def key_headers(cls, key: str) -> dict[str, str]:
        """The headers that carry the key"""
        return {"Authorization": f"Bearer {key}"}

    @classmethod
    def body(cls, messages: Sequence[Any], model: str, params: Mapping[str, Any], stream: bool) -> dict[str, Any]:
        """The body of a request, from messages and tools in OpenAI's shape; the arguments are not changed"""
        raise NotImplementedError

    @classmethod
    def optional(cls, stream: bool) -> dict[str, Any]:
        """Members that are added to the body, unless the caller sets them or the server refuses them"""
        return {}

    @classmethod
    def choices_asked(cls, body: Mapping[str, Any]) -> int:
        """How many choices a body requests"""
        return _count(body.get("n"), 1)

    @classmethod
    def recognises(cls, payload: Mapping[str, Any]) -> bool:
        """Whether the JSON of an event can only belong to this dialect"""
        return False

    @classmethod
    def job_url(cls, url: str, body: Mapping[str, Any], id: str, action: str = "") -> str:
        """The URL of the stored answer with this id, while the service makes it and after; "" where there is none

        With the ``action`` cancel, the URL to cancel it.
        """
        return ""

    @classmethod
    def replay_url(cls, url: str, body: Mapping[str, Any], id: str, reader: Dialect | None) -> str:
        """The URL to stream a stored answer again, from where ``reader`` stopped; "" where there is none"""
        return ""

    def chunks(self, event: ServerSentEvent) -> Iterable[Chunk]:
        """The chunks of an event; sets ``whole`` and ``done``, raises StreamError for an event that is an error"""
        raise NotImplementedError

    def read(self, event: ServerSentEvent) -> Iterable[Chunk]:
        """The chunks of an event, without halves of characters; raises for a finish reason that means a failure"""
        chunks, data = self.chunks(event), event.data
        may_have_halves = self._halves or "\\u" in data or not data.isascii()
        if isinstance(chunks, list) and not may_have_halves and self._failure is None:
            return chunks
        return self._checked(chunks)

    def _checked(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        for chunk in chunks:
            yield self._without_halves(chunk)
        failure, self._failure = self._failure, None  # another connection may be read
        if failure is not None:
            self.whole = self.done = self.finished = False
            raise failure

    def last(self, is_end: bool) -> Iterator[Chunk]:
        """The last chunks of the answer; ``is_end`` says that its body has ended"""
        self.whole = self.whole or (is_end and self.finished and self.ends_with_body)
        yield from self.end()

    def require_whole(self) -> None:
        """Raises StreamInterrupted where the answer has ended and is not whole"""
        if self.require_end and not self.whole:
            raise StreamInterrupted("the stream ended without its end marker")

    def end(self) -> Iterator[Chunk]:
        """The last chunks of the answer: halves of characters whose other half never came"""
        for index, field in self._halves:
            call = (ToolCall(field, arguments="\ufffd"),) if isinstance(field, int) else ()
            yield Chunk(index=index, tool_calls=call) if call else _chunk_with(Chunk(index=index), str(field), "\ufffd")

    def load(self, event: ServerSentEvent) -> dict[str, Any] | None:
        """The JSON object in the data of an event, or None where there is none; handles ``[DONE]``"""
        data = event.data.strip()
        if data == "[DONE]":
            self.done, self.whole = True, self.whole or self.finished
        if not data or self.done or data[0] == ":":  # the last is a comment in place of data
            return None
        try:
            payload, end = _JSON.raw_decode(data)
        except (ValueError, RecursionError):
            payload, end = _NO_JSON, len(data)
        if end < len(data):
            payload = _NO_JSON
        if isinstance(payload, list) and len(payload) == 1:
            payload = payload[0]
        if isinstance(payload, dict):
            return payload
        if event.event == "error":  # in plain words
            return {"error": _text(payload) or data}
        if payload is None or event.event not in self.event_names or self.whole:
            return None
        expected = "JSON" if payload is _NO_JSON else "a JSON object"
        raise InvalidStreamError(f"expected {expected} in the data of an event, got {_excerpt(event.data)}")

    def finish(self, reason: str, calls: object = (), native: str = "", pause: Mapping[str, Any] | None = None) -> str:
        """The common word for a finish reason; for one that means a failure or a pause, ``read`` will raise

        ``calls`` is true where there are tool calls. ``native`` is the finish reason of the provider behind a gateway.
        ``pause`` is what the next request must send back.
        """
        for word in (reason.lower().replace("-", "_"), native.lower().replace("-", "_")):
            if word in _PAUSES:
                how = (
                    "resume_point.pause holds what the next request must send back" if pause else "nothing continues it"
                )
                self._failure = StreamInterrupted(f"the vendor paused the answer ({word}): {how}", retryable=False)
                self._failure._pause = pause or {}
            elif word in _FAILURES and self._failure is None:
                self._failure = _finish_error(word)
        finish = _FINISH.get(reason.lower(), "other")
        return "tool_calls" if calls and finish == "stop" else finish

    def usage(self, wire: Any) -> Usage | None:
        """The usage so far, with the counts of ``wire``; None without counts. A 0 at the end is no count"""
        counts = _counts_in(_dict(wire), self.excluded)
        for name, count in counts.items():
            # a part may be 0 at the end, where its whole is counted in the same usage
            if count or name not in self._counts or counts.get(_PART_OF.get(name, "")):
                self._counts[name] = count
        if not counts:
            return None
        known = {**dict.fromkeys(_COUNTS, 0), **self._counts}
        reasoning, total = known["reasoning"], known["total"]
        rest = total - known["input"] - known["output"]  # shows what the output includes
        for part in self.excluded:
            if part != "reasoning" or rest:
                known[_PART_OF[part]] += known[part]
        output = known["output"]
        if (
            reasoning and rest == reasoning and "reasoning" not in self.excluded
        ):  # reasoning is not part of the output (xAI)
            output += reasoning
        total = max(total, known["input"] + output)
        read, written = known["cache_read"], known["cache_write"]
        return Usage(known["input"], output, total, read, written, reasoning, known.get("cost"))

    @property
    def holds_half(self) -> bool:
        """Whether the half of a character is held back"""
        return bool(self._halves)

    def _without_halves(self, chunk: Chunk) -> Chunk:
        """The chunk without lone surrogates: the first half of a pair is held back until the second comes"""
        texts = chunk.text + chunk.reasoning + chunk.refusal + "".join([call.arguments for call in chunk.tool_calls])
        if not self._halves and (texts.isascii() or not _SURROGATE.search(texts)):
            return chunk
        calls = (call._replace(arguments=self._joined(chunk, call.index, call.arguments)) for call in chunk.tool_calls)
        chunk = chunk._replace(
            text=self._joined(chunk, "text", chunk.text),
            reasoning=self._joined(chunk, "reasoning", chunk.reasoning),
            refusal=self._joined(chunk, "refusal", chunk.refusal),
            tool_calls=tuple(calls),
        )
        # without the id, no other process resumes after this event and loses the half
        return chunk._replace(event_id="") if self._halves else chunk

    def _joined(self, chunk: Chunk, field: str | int, piece: str) -> str:
        if not piece:
            return ""
        piece = self._halves.pop((chunk.index, field), "") + piece
        if "\ud800" <= piece[-1] <= "\udbff":
            self._halves[chunk.index, field] = piece[-1]
            piece = piece[:-1]
        return _without_surrogates(piece)


#: the common words for the finish reasons of vendors, in lower case
_FINISH = {
    **dict.fromkeys(("stop", "end_turn", "stop_sequence", "eos_token", "completed"), "stop"),
    **dict.fromkeys(("length", "max_tokens", "max_output_tokens", "model_length"), "length"),
    **dict.fromkeys(("model_context_window_exceeded",), "length"),
    **dict.fromkeys(("tool_calls", "function_call", "tool_use"), "tool_calls"),
    **dict.fromkeys(("content_filter", "refusal", "sensitive", "safety", "recitation", "blocklist"), "refusal"),
    **dict.fromkeys(("prohibited_content", "spii", "model_armor", "image_safety", "image_recitation"), "refusal"),
    **dict.fromkeys(("image_prohibited_content",), "refusal"),
}
#: finish reasons that mean a failure, and whether another attempt may help
_FAILURES = {
    **dict.fromkeys(("error", "failed", "model_error", "cancelled", "canceled"), False),
    **dict.fromkeys(("network_error", "abort", "aborted", "insufficient_system_resource", "overloaded"), True),
}
#: finish reasons that mean a pause: Gemini's (long decode), and Anthropic's
_PAUSES = frozenset({"continuation", "pause_turn", "compaction"})


def _finish_error(word: str) -> SheepError:
    """The error for a finish reason that means a failure"""
    if _FAILURES[word]:
        return StreamInterrupted(f"the server gave up before the answer was whole (finish reason {word})")
    return StreamError(
        f"the provider reported an error in the stream: finish reason {word}", code=word, vendor_code=word
    )


class _OpenAI(Dialect):
    """OpenAI Chat Completions, and all that copy it

    https://platform.openai.com/docs/api-reference/chat-streaming
    """

    name = "openai"
    path = "/chat/completions"
    ends_with_body = True

    def __init__(self, choices: int = 1) -> None:
        super().__init__(choices)
        self._choices = _Choices(choices)
        self._begun: set[int] = set()  # indexes, as sent, that have begun
        self._calls: dict[int, _ToolCalls] = {}  # of each choice
        self._thoughts: dict[int, _Thoughts] = {}  # of each choice

    @classmethod
    def body(cls, messages: Sequence[Any], model: str, params: Mapping[str, Any], stream: bool) -> dict[str, Any]:
        sent = list(map(cls._message, _turns(messages, cls.name)))
        return {"model": model, "messages": sent, "stream": stream, **params}

    @staticmethod
    def _message(turn: _Turn) -> dict[str, Any]:
        message = {name: value for name, value in turn.message.items() if name != "vendor"}
        if turn.calls:
            pairs = zip(message["tool_calls"], turn.calls)
            message["tool_calls"] = [{**call, "id": identified.id} for call, identified in pairs]
        if turn.answered is not None:
            message["tool_call_id"] = turn.answered.id
        return {**message, **(turn.kept or {})}

    @classmethod
    def optional(cls, stream: bool) -> dict[str, Any]:
        # obfuscation pads chunks against observers of the connection, and costs bytes
        return {"stream_options": {"include_usage": True, "include_obfuscation": False}} if stream else {}

    @classmethod
    def recognises(cls, payload: Mapping[str, Any]) -> bool:
        return "choices" in payload or str(payload.get("object")).startswith("chat.completion")

    def chunks(self, event: ServerSentEvent) -> list[Chunk]:
        payload = self.load(event)
        if payload is None:
            self.whole = self.whole or self.done  # Snowflake sends no finish reason
            return []
        error, groq = None, _dict(payload["x_groq"]) if "x_groq" in payload else {}
        may_fail = event.event == "error" or "type" in payload or "choices" not in payload
        if may_fail or not _ERROR_MEMBERS.isdisjoint(payload):
            error = _reported_error(payload, event.event == "error")
        if groq:
            error = error or _reported_error({"error": groq.get("error")})
        choices = payload.get("choices")
        choices = [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []
        wire = payload.get("usage") or groq.get("usage")
        read = []
        for position, choice in enumerate(choices):
            sent, delta = choice.get("index"), choice.get("delta")
            if type(sent) is not int or sent < 0:
                sent = _count(sent, position)
            if not isinstance(delta, dict):
                # one completion instead of a stream; at the end of a stream, a repetition of the answer
                delta = _dict(choice.get("message")) if sent not in self._begun else {}
            if delta:
                self._begun.add(sent)
            if not _ERROR_MEMBERS.isdisjoint(choice) or "error" in delta:
                error = error or _reported_error(choice) or _reported_error({"error": delta.get("error")})
            wire = wire or choice.get("usage")
            content = delta.get("content")
            content = (content, "", "") if isinstance(content, str) else _content(content)
            read.append((sent, choice, delta, content))
        if len(read) != 1 or read[0][0] != self._choices.settled:
            self._choices.note([(sent, content[0]) for sent, _, _, content in read])
        id, model = payload.get("id"), payload.get("model")
        id, model = id if isinstance(id, str) else "", model if isinstance(model, str) else ""
        usage, event_id = self.usage(wire) if wire else None, event.id or ""
        chunks = [
            self._choice(sent, choice, delta, content, usage, event_id, payload, id, model)
            for sent, choice, delta, content in read
        ]
        if not choices and ((error is None and "choices" in payload) or usage):  # else a ping, or the like
            chunks.append(Chunk(usage=usage, event_id=event_id, raw=payload, id=id, model=model))
        self.finished, self.whole = self._choices.finished, self._choices.whole
        if error is not None:
            self._failure = _stream_error(error)
        return chunks

    def _choice(
        self,
        sent: int,
        choice: dict[str, Any],
        delta: dict[str, Any],
        content: tuple[str, str, str],
        usage: Usage | None,
        event_id: str,
        raw: dict[str, Any],
        id: str,
        model: str,
    ) -> Chunk:
        index, reason = sent if self._choices.are_apart else 0, choice.get("finish_reason")
        text, reasoning, refusal = content
        if reasoning or not _REASONING_MEMBERS.isdisjoint(delta):
            reasoning = _reasoning(delta) or reasoning
            self._thoughts.setdefault(index, _Thoughts()).add(delta)
        calls: tuple[ToolCall, ...] = ()
        if "tool_calls" in delta or "function_call" in delta:
            calls = tuple(self._calls_in(index, sent, delta))
        if "refusal" in delta:
            refusal = _text(delta["refusal"]) or refusal
        vendor, finish = None, None
        reason = reason if isinstance(reason, str) and reason else None
        if reason:
            made = self._calls.get(index)
            calls = (*calls, *(made.end() if made else ()))
            finish = self.finish(reason, made, _text(choice.get("native_finish_reason")))
        if reason or index not in self._choices.open:
            self._choices.end(index, reason, bool(text or reasoning or refusal or calls))
        if reason:
            vendor = self._vendor(index)
        return Chunk(text, reasoning, refusal, calls, reason, finish, usage, index, event_id, raw, id, model, vendor)

    def _calls_in(self, index: int, sent: int, delta: dict[str, Any]) -> Iterator[ToolCall]:
        calls, parts = self._calls.setdefault(index, _ToolCalls()), delta.get("tool_calls")
        parts = [parts] if isinstance(parts, dict) else _list(parts)  # one object (TGI)
        if isinstance(delta.get("function_call"), dict):  # the old name of tool_calls
            parts = [*parts, {"function": delta["function_call"]}]
        for position, part in enumerate(parts):
            yield from calls.add(_dict(part), sent, position)

    def end(self) -> Iterator[Chunk]:
        yield from super().end()
        for index, calls in self._calls.items():
            held = tuple(calls.end())
            if held:
                yield Chunk(index=index, tool_calls=held)

    def _vendor(self, index: int) -> dict[str, Any] | None:
        """The reasoning that a conversation with tools must send back (DeepSeek, OpenRouter, Copilot)"""
        is_needed = index in self._thoughts and self._calls.get(index) and not self._choices.is_provisional
        kept = self._thoughts[index].message() if is_needed else None
        return {self.name: kept} if kept else None


class _Choices:
    """The choices of a stream, and whether they have ended

    Where one choice was requested, all are parts of it: an index may count tokens (TGI), a tool call may have a choice
    of its own (Copilot). But two choices with text at the same time are two answers, and choice 0 is the one.
    """

    def __init__(self, requested: int, may_count: bool = True) -> None:
        self.are_apart = requested != 1
        self._counts = may_count  # whether the indexes may count tokens: each is larger than the one before
        #: choices without a finish reason, in our numbers
        self.open = set(range(requested))
        self._ended: set[int] = set()
        self._last = -1  # the last index
        self._speaking: set[int] = set()  # the indexes with text
        #: an index that may come again without any change here
        self.settled: int | None = None
        #: whether pieces followed a finish reason: then only the end marker counts
        self.is_provisional = False
        #: whether all choices have a finish reason, and whether that is final
        self.finished = self.whole = False

    def note(self, texts: Sequence[tuple[int, str]]) -> None:
        """Counts the choices of one event: their indexes, as sent, and their texts"""
        indexes = [sent for sent, _ in texts]
        speaking = {sent for sent, text in texts if text}
        is_next = len(indexes) == 1 and indexes[0] > self._last and not self._ended
        self._counts = self._counts and is_next
        is_another = bool(self._speaking and speaking - self._speaking)
        self.are_apart = self.are_apart or len(speaking) > 1 or (is_another and not self._counts)
        self._speaking |= speaking
        self._last = max(indexes, default=-1)
        self.settled = self._last if self._last in self._speaking and not self._counts else None

    def index(self, sent: int) -> int:
        """The index of a choice in our numbers"""
        return sent if self.are_apart else 0

    def end(self, index: int, reason: str | None, says: bool) -> None:
        """Counts a piece, which may end its choice or come after its end"""
        self.is_provisional = self.is_provisional or (says and index in self._ended)
        if reason:
            self._ended.add(index)
            self.open.discard(index)
        elif index not in self._ended:
            self.open.add(index)
        self.finished = not self.open
        self.whole = self.finished and not self.is_provisional


class _OpenCall:
    """A tool call that is being received"""

    #: how often arguments are tested for being whole: a text may hold many braces
    _TRIES = 16

    def __init__(self, index: int, id: str = "", name: str = "") -> None:
        self.index, self.id, self.name = index, id, name
        #: an empty object, held back: it is all the arguments, or a placeholder before them (Bedrock)
        self.held = ""
        self._arguments: list[str] = []
        self._tries = 0

    def take(self, arguments: str, name: str = "", is_text: bool = False) -> str | None:
        """The new part of arguments; None where they begin another call

        ``is_text`` says that the arguments are free text, not JSON.
        """
        is_renamed = bool(name and self.name and name != self.name)
        if arguments.lstrip()[:1] == "{" and not (is_renamed or is_text):
            if not self._arguments and arguments.strip() == "{}":
                self.held = arguments
                return ""
            whole = self._whole()
            if whole is not None:  # a repetition, or a call without id and index
                return "" if _json(arguments) == whole else None
        if is_renamed:
            return None
        if arguments.strip():
            self.held = ""
            self._arguments.append(arguments)
        return arguments

    def _whole(self) -> Any:
        """The arguments as JSON, if they are a whole object; else None"""
        if not self._arguments or self._arguments[-1].rstrip()[-1:] != "}" or self._tries >= self._TRIES:
            return None
        self._tries += 1
        whole = _json("".join(self._arguments))
        return whole if isinstance(whole, dict) else None

    def end(self) -> str:
        """The arguments that were held back"""
        held, self.held = self.held, ""
        return held


class _ToolCalls:
    """The tool calls of one answer, from parts as servers send them"""

    def __init__(self) -> None:
        self._count = 0
        self._by_id: dict[str, _OpenCall] = {}
        self._at: dict[tuple[int, int], _OpenCall] = {}  # by choice and index, as sent
        self._last: dict[int, _OpenCall] = {}  # of each choice
        self._held: dict[int, _OpenCall] = {}  # calls that may hold back arguments

    def __len__(self) -> int:
        return self._count

    def add(self, part: dict[str, Any], choice: int, position: int) -> Iterator[ToolCall]:
        """The new part of a call: its beginning, more of it, or nothing"""
        function = _dict(part.get("function")) or _dict(part.get("custom"))  # a custom tool takes free text
        id, name = _text(part.get("id")), _text(function.get("name"))
        arguments = _arguments_text(function.get("arguments") or function.get("input"))
        if not (id or name or arguments):
            return
        place, is_text = (choice, _count(part.get("index"), position)), "custom" in part
        call = self._found(place, id, name)
        new = None if call is None else call.take(arguments, name, is_text)
        if call is None or new is None:
            if call is not None:  # the new call may share id and name with the one before
                id, name = id or ("" if name else call.id), name or call.name
            call = _OpenCall(self._count)
            self._count += 1
            new = call.take(arguments, is_text=is_text) or ""
        self._at[place] = call
        if call.held:
            self._held[call.index] = call
        if new or (id and not call.id) or (name and not call.name):
            call.id, call.name = call.id or id, call.name or name
            self._by_id[call.id] = self._last[choice] = call
            yield ToolCall(call.index, id, name, new)

    def _found(self, place: tuple[int, int], id: str, name: str) -> _OpenCall | None:
        """The call that a part may belong to"""
        call = self._at.get(place)
        if id:  # another id means another call: some servers send index 0 for all
            return self._by_id.get(id) or (call if call is not None and not call.id else None)
        return call if call is not None or name else self._last.get(place[0])  # some count the parts

    def end(self) -> Iterator[ToolCall]:
        """The arguments that were held back"""
        for call in self._held.values():
            held = call.end()
            if held:
                yield ToolCall(call.index, arguments=held)


#: the members of a usage that may hold each count
_COUNTS = {
    "input": ("prompt_tokens", "input_tokens", "promptTokenCount", "prompt_eval_count"),
    "output": ("completion_tokens", "output_tokens", "candidatesTokenCount", "eval_count"),
    "total": ("total_tokens", "totalTokenCount"),
    "cache_read": (
        "prompt_tokens_details.cached_tokens",
        "input_tokens_details.cached_tokens",
        "prompt_cache_hit_tokens",  # DeepSeek
        "cached_tokens",  # Together, Moonshot
        "cache_read_input_tokens",  # Anthropic
        "prompt_tokens_details.cache_read_input_tokens",
        "cachedContentTokenCount",
    ),
    "cache_write": (
        "prompt_tokens_details.cache_write_tokens",
        "input_tokens_details.cache_write_tokens",
        "cache_creation_input_tokens",  # Anthropic
        "prompt_tokens_details.cache_creation_tokens",  # LiteLLM
        "prompt_tokens_details.cache_creation_input_tokens",
        "cache_write_tokens",
        "cache_creation_tokens",
    ),
    "reasoning": (
        "completion_tokens_details.reasoning_tokens",
        "output_tokens_details.reasoning_tokens",
        "output_tokens_details.thinking_tokens",  # Anthropic
        "reasoning_tokens",  # SGLang
        "thoughtsTokenCount",
    ),
}


_COUNT_AT = {place: name for name, places in _COUNTS.items() for place in places}
#: the whole that a count is part of
_PART_OF = {"cache_read": "input", "cache_write": "input", "reasoning": "output"}


def _counts_in(wire: dict[str, Any], excluded: frozenset[str]) -> dict[str, Any]:
    """The counts of a usage, by the names of _COUNTS, and its cost; invalid counts are left out"""
    counts: dict[str, Any] = {}
    wholes = {_PART_OF[part] for part in excluded}
    places = list(wire.items())
    for name, value in wire.items():
        if isinstance(value, dict):
            places += [(f"{name}.{part}", each) for part, each in value.items()]
    for place, value in places:
        name = _COUNT_AT.get(place, "")
        count = _count(value, -1) if name else -1
        if count >= 0:
            if name in counts:  # the larger of two includes more
                count = (min if name in wholes else max)(counts[name], count)
            counts[name] = count
    extra = _count(wire.get("toolUsePromptTokenCount"))  # Gemini counts these beside the input
    if extra:
        counts["input"] = counts.get("input", 0) + extra
    if "cache_creation" in wire and "cache_write" not in counts:  # Anthropic, by time of storage
        kept = sum(map(_count, _dict(wire["cache_creation"]).values()))
        counts.update({"cache_write": kept} if kept else {})
    money = _money(wire["cost"]) if "cost" in wire else None  # OpenRouter; Perplexity's is an object
    return counts if money is None else {**counts, "cost": money}


class _Part:
    """A part of an answer in the shape of the vendor, put together from its pieces"""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = dict(fields)
        self._texts: dict[str, _Text] = {}
        self._items: dict[str, list[Any]] = {}

    def append(self, name: str, piece: str) -> None:
        """More text of a field"""
        if name not in self._texts:
            self._texts[name] = _Text()
        self._texts[name].add(piece)

    def gather(self, name: str, item: Any) -> None:
        """One more item of a list"""
        self._items.setdefault(name, []).append(item)

    def has_more(self, name: str) -> bool:
        """Whether text came for a field after its beginning"""
        return bool(self._texts.get(name))

    def update(self, fields: Mapping[str, Any]) -> None:
        self._fields.update(fields)

    def get(self, name: str) -> Any:
        """The first value of a field"""
        return self._fields.get(name)

    def whole(self) -> dict[str, Any]:
        texts = {name: f"{_text(self._fields.get(name))}{more}" for name, more in self._texts.items()}
        lists = {name: [*_list(self._fields.get(name)), *items] for name, items in self._items.items()}
        return {**self._fields, **texts, **lists}


class _Content(NamedTuple):
    """The text of a content, by kind"""

    text: str = ""
    reasoning: str = ""
    refusal: str = ""


#: kinds of content parts that are not text of the answer
_PART_KINDS = {
    **dict.fromkeys(("reasoning", "thinking", "reasoning_text", "reasoning_content", "summary_text"), "reasoning"),
    "refusal": "refusal",
}


def _content(content: Any) -> _Content:
    """A content by kind: a str, or parts (Mistral, Databricks)"""
    if not isinstance(content, (list, dict)):
        return _Content(_text(content))
    texts: dict[str, str] = {}
    for part in content if isinstance(content, list) else [content]:
        kind = _PART_KINDS.get(_text(_dict(part).get("type")), "text")
        text = _text(part) or _text(_dict(part).get("text")) if kind == "text" else _part_text(part)
        texts[kind] = texts.get(kind, "") + text
    return _Content(**texts)


def _part_text(part: Any, depth: int = 3) -> str:
    """The text of a part, in any of its members"""
    if isinstance(part, list) and depth:
        return "".join([_part_text(each, depth - 1) for each in part])
    if not isinstance(part, dict) or not depth:
        return _text(part)
    texts = (_part_text(part.get(name), depth - 1) for name in ("text", "thinking", "summary", "content", "refusal"))
    return next(filter(None, texts), "")


def _texts(parts: Iterable[Any]) -> str:
    return "".join(_text(_dict(part).get("text")) for part in parts)


def _utf_16(text: str) -> bytes:
    return text.encode("utf-16-le", "surrogatepass")


def _rest(whole: str, came: str) -> str | None:
    """The rest of a text after the beginning that came, perhaps half a character; None for another beginning"""
    begin = _utf_16(came)
    rest = _utf_16(whole)
    return rest[len(begin) :].decode("utf-16-le", "surrogatepass") if rest.startswith(begin) else None


#: members of a delta with reasoning, or with reasoning to be sent back
_REASONING_MEMBERS = frozenset(
    ("reasoning_content", "reasoning", "reasoning_text", "reasoning_details", "reasoning_opaque")
)


def _reasoning(delta: dict[str, Any]) -> str:
    """The reasoning of a delta, once: some servers send it under two names"""
    for name in ("reasoning_content", "reasoning", "reasoning_text", "reasoning_details"):
        if delta.get(name):
            reasoning = _part_text(delta[name])
            if reasoning:
                return reasoning
    return ""


class _Thoughts:
    """The reasoning of one choice, in the shape in which it is sent back"""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._copilot: list[str] = []
        self._opaque = ""
        self._details: list[_Part] = []

    def add(self, delta: dict[str, Any]) -> None:
        self._content.append(_part_text(delta.get("reasoning_content")))
        self._copilot.append(_text(delta.get("reasoning_text")))
        self._opaque = _text(delta.get("reasoning_opaque")) or self._opaque
        for detail in map(_dict, _list(delta.get("reasoning_details"))):
            texts = {name: detail[name] for name in ("text", "summary", "data") if _text(detail.get(name))}
            rest = {name: value for name, value in detail.items() if name not in texts and value is not None}
            last = self._details[-1] if self._details else None
            if last is None or any(last.get(name) != detail.get(name) for name in ("type", "index")):
                last = _Part({})
                self._details.append(last)
            last.update(rest)
            for name, text in texts.items():
                last.append(name, text)

    def message(self) -> dict[str, Any]:
        if self._details:
            return {"reasoning_details": [detail.whole() for detail in self._details]}
        if self._opaque:  # Copilot's signature
            return {"reasoning_text": "".join(self._copilot), "reasoning_opaque": self._opaque}
        content = "".join(self._content)
        return {"reasoning_content": content} if content else {}


def _new_call(id: str, name: str, arguments: str, calls: dict[Any, ToolCall]) -> Iterator[ToolCall]:
    """A whole call, unless a call with its id came before"""
    key = (id, name, arguments) if id else len(calls)
    if key not in calls:
        calls[key] = ToolCall(len(calls), id, name, arguments)
        yield calls[key]


def _arguments_text(value: Any) -> str:
    """Arguments as text; some servers send an object"""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else _text(value)


# Coerce untrusted JSON: return the value if it has the type, else an empty one


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any, default: int = 0) -> int:
    if type(value) is int and value >= 0:
        return value
    if isinstance(value, float) and value.is_integer() and value < 2**53:
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else default


def _money(value: Any) -> Decimal | None:
    if isinstance(value, dict):
        value = value.get("total_cost")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        return None
    from decimal import Decimal  # heavy, and few answers carry a cost

    return Decimal(repr(value))


# Requests in the shape of other vendors, from OpenAI's messages, tools and options


def _calls_of(message: Mapping[str, Any]) -> list[ToolCall]:
    """The tool calls in a message of OpenAI's shape"""
    calls = []
    for index, call in enumerate(_list(message.get("tool_calls"))):
        if not isinstance(call, Mapping):
            raise InvalidRequestError(f"a tool call is a dict with an id and a function, got {type(call).__name__}")
        function = _function_of(call) or {}
        arguments = _arguments_text(function.get("arguments"))
        calls.append(ToolCall(index, _text(call.get("id")), _text(function.get("name")), arguments))
    return calls


class _Turn:
    """A message in the normal form, which each dialect renders"""

    def __init__(self, message: Any, dialect: str, calls_of: Callable[[Mapping[str, Any]], list[ToolCall]]) -> None:
        if not isinstance(message, Mapping):
            raise InvalidRequestError(f"a message is a dict with a role and a content, got {type(message).__name__}")
        if not {"role", "type", "parts"}.intersection(message):  # the last two are of Responses and Gemini
            raise InvalidRequestError(f"a message is a dict with a role and a content, got one with {list(message)}")
        #: as passed by the caller
        self.message = message
        self.role = message.get("role")
        self.content = message.get("content")
        #: the tool calls of an answer
        self.calls = calls_of(message)
        #: what an answer of the same dialect kept to be sent back, or None
        self.kept = _dict(message.get("vendor")).get(dialect)
        #: the tool call that this result answers; None for a message that is no result
        self.answered: ToolCall | None = None

    @property
    def is_system(self) -> bool:
        return self.role in ("system", "developer")

    @property
    def is_result(self) -> bool:
        return self.role == "tool"

    @property
    def parts(self) -> list[Any]:
        return _content_parts(self.content)

    @property
    def is_empty(self) -> bool:
        """Whether this is an answer with nothing in it, which vendors refuse"""
        members = map(self.message.get, ("content", "parts", "tool_calls", "vendor"))
        return self.role == "assistant" and not any(members)


def _turns(
    messages: Sequence[Any],
    dialect: str,
    calls_of: Callable[[Mapping[str, Any]], list[ToolCall]] = _calls_of,
    needs_ids: bool = True,
) -> list[_Turn]:
    """A conversation in the normal form

    A result answers the open call with its id, else with its name, else the first one. With ``needs_ids`` each call has
    an id: Gemini gives none, and other vendors need one.
    """
    turns = [_Turn(message, dialect, calls_of) for message in messages]
    open_calls: list[ToolCall] = []
    for position, turn in enumerate(turns):
        if needs_ids:
            turn.calls = [call._replace(id=call.id or f"call_{position}_{call.index}") for call in turn.calls]
        open_calls += turn.calls
        if turn.is_result:
            id, name = _text(turn.message.get("tool_call_id")), _text(turn.message.get("name"))
            fitting = (call for call in open_calls if (call.id == id if id else not name or call.name == name))
            turn.answered = next(fitting, ToolCall(id=id, name=name))
            open_calls = [call for call in open_calls if call is not turn.answered]
    return turns


def _with_results_together(
    turns: Iterable[_Turn], member: str, message: Callable[[_Turn], Any], result: Callable[[_Turn], Any]
) -> list[Any]:
    """The messages for these turns; all results for one answer belong into one message, as its ``member``"""
    messages: list[Any] = []
    rest = (turn for turn in turns if not turn.is_system)
    for are_results, group in itertools.groupby(rest, lambda turn: turn.is_result):
        if are_results:
            messages.append({"role": "user", member: list(map(result, group))})
        else:
            messages += [message(turn) for turn in group if not turn.is_empty]
    return messages


def _content_parts(content: Any) -> list[Any]:
    """A content as the list of its parts"""
    if isinstance(content, list):
        return [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return [{"type": "text", "text": content}] if content else []


def _plain_text(content: Any) -> str:
    """A content that can only be text"""
    return _text(content) or _texts(_content_parts(content))


def _result_text(content: Any) -> str:
    """The content of a tool result, where the vendor takes only text"""
    if any(_dict(part).get("type") != "text" for part in _content_parts(content)):
        raise InvalidRequestError(
            "the result of a tool call can only be text here: put images into a message of the user"
        )
    return _plain_text(content)


class _Image(NamedTuple):
    """A part ``{"type": "image_url", "image_url": {"url": ...}}``, taken apart"""

    url: str
    #: of a data: URL, else ""
    data: str
    media_type: str
    detail: str


def _image(part: Any) -> _Image | None:
    """The image of a content part, or None where it is none in OpenAI's shape"""
    if not isinstance(part, Mapping) or part.get("type") != "image_url":
        return None
    given = part.get("image_url")
    url, detail = _text(given) or _text(_dict(given).get("url")), _text(_dict(given).get("detail"))
    match = re.match(r"data:([^;,]*)(?:;[^;,]*)*;base64,", url, re.IGNORECASE)
    if match:
        return _Image(url, url[match.end() :], match.group(1) or "image/png", detail)
    import mimetypes  # reads the system's table

    return _Image(url, "", mimetypes.guess_type(urlsplit(url).path)[0] or "image/png", detail)


def _function_of(tool: Any) -> dict[str, Any] | None:
    """The function of a tool or a tool choice in OpenAI's shape; None for another shape"""
    function = (
        tool.get("function") if isinstance(tool, Mapping) and tool.get("type", "function") == "function" else None
    )
    return dict(function) if isinstance(function, Mapping) else None


def _arguments_of(call: ToolCall) -> Any:
    """The arguments of a call that is sent back, as an object"""
    try:
        arguments = call.parsed
    except InvalidStreamError as error:
        raise InvalidRequestError(str(error)) from None
    if not isinstance(arguments, dict):
        raise InvalidRequestError(f"the arguments of tool call {call.name!r} are no object: {_excerpt(call.arguments)}")
    return arguments


def _moved(params: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Takes options out of ``params`` and returns them by the names of the vendor; None counts as not passed"""
    given = {other: (name, params.pop(name)) for name, other in names.items() if name in params}
    return {
        other: _as_list(value) if name in ("stop", "stopSequences") else value
        for other, (name, value) in given.items()
        if value is not None
    }


def _same(names: str) -> dict[str, str]:
    """Options with the same name at the vendor"""
    return {name: name for name in names.split()}


def _either(params: dict[str, Any], *names: str) -> Any:
    """Takes an option out of ``params`` that has several names, None where it has none of them"""
    return next((value for value in [params.pop(name, None) for name in names] if value is not None), None)


def _tool_choice(choice: Any, word: Callable[[str], Any], name: Callable[[Any], Any]) -> Any:
    """A tool choice as ``word`` writes "auto", "none" and "required", and ``name`` a function; others as they are"""
    if isinstance(choice, str):
        return word(choice)
    function = _function_of(choice)
    return choice if function is None else name(function.get("name"))


def _as_list(value: Any, single: type | tuple[type, ...] = str) -> Any:
    """A list, of a value that may be passed alone"""
    return [value] if isinstance(value, single) else value or []


#: makes a Chunk of an event, with the id and the JSON of the event
_MakeChunk = Callable[..., Chunk]


class _Anthropic(Dialect):
    """Anthropic Messages

    https://docs.anthropic.com/en/api/messages-streaming
    """

    name = "anthropic"
    path = "/messages"
    roots = ("/v1",)
    headers: Mapping[str, str] = {"anthropic-version": "2023-06-01"}
    excluded = frozenset({"cache_read", "cache_write"})

    #: the fields that the kinds of delta add to
    _DELTAS = {
        "text_delta": "text",
        "thinking_delta": "thinking",
        "signature_delta": "signature",
        "input_json_delta": "partial_json",
        "compaction_delta": "content",
    }
    #: max_tokens is required; this default suits all models since 3.5
    _MAX_TOKENS = 8192
    options: Mapping[str, str] = {
        "max_completion_tokens": "max_tokens",
        "max_tokens": "max_tokens",
        "stop": "stop_sequences",
    }

    def __init__(self, choices: int = 1) -> None:
        super().__init__(choices)
        self._id: str | None = None  # of the open message
        self._blocks: list[_Part] = []
        self._open: dict[int, _Part] = {}  # the last block of each index; without an index it is 0
        self._calls: dict[int, _OpenCall] = {}  # tool calls, by index of their block
        self._call_count = 0
        self._container = ""
        self._event_kinds: dict[str, Callable[[dict[str, Any], _MakeChunk], list[Chunk]]] = {
            "message_start": self._message_start,
            "content_block_start": self._block_start,
            "content_block_delta": self._block_delta,
            "content_block_stop": self._block_stop,
            "message_delta": self._message_delta,
            "message_stop": self._message_stop,
            "message": self._message,
        }
        self.event_names = self.event_names.union(self._event_kinds)

    @classmethod
    def key_headers(cls, key: str) -> dict[str, str]:
        return {"x-api-key": key}

    # Requests

    @classmethod
    def body(cls, messages: Sequence[Any], model: str, params: Mapping[str, Any], stream: bool) -> dict[str, Any]:
        params = dict(params)
        turns = _turns(messages, cls.name)
        system = [params.pop("system", None), *(turn.content for turn in turns if turn.is_system)]
        options = _moved(params, cls.options)
        thinking = _count(_dict(params.get("thinking")).get("budget_tokens"))
        body = {
            "model": model,
            "max_tokens": options.pop("max_tokens", cls._MAX_TOKENS + thinking),
            "messages": _with_results_together(turns, "content", cls._message_of, cls._result),
            "stream": stream,
            **options,
        }
        if any(system):
            body["system"] = cls._system([content for content in system if content])
        tools, choice = params.pop("tools", None), params.pop("tool_choice", None)
        if tools:
            body["tools"] = list(map(cls._tool, tools))
        if tools and choice is not None:
            words = {"required": "any"}
            body["tool_choice"] = _tool_choice(
                choice,
                word=lambda word: {"type": words.get(word, word)},
                name=lambda name: {"type": "tool", "name": name},
            )
        return {**body, **params}

    @staticmethod
    def _system(contents: list[Any]) -> Any:
        if all(isinstance(content, str) for content in contents):
            return "\n\n".join(contents)
        return [part for content in contents for part in _content_parts(content)]

    @classmethod
    def _result(cls, turn: _Turn) -> dict[str, Any]:
        content = [cls._part(part) for part in turn.content] if isinstance(turn.content, list) else turn.content or ""
        return {"type": "tool_result", "tool_use_id": turn.answered and turn.answered.id, "content": content}

    @classmethod
    def _message_of(cls, turn: _Turn) -> dict[str, Any]:
        content = turn.content if turn.kept is None else turn.kept
        if turn.kept is None and (turn.calls or not isinstance(content, str)):
            content = [cls._part(part) for part in turn.parts] + [
                {"type": "tool_use", "id": call.id, "name": call.name, "input": _arguments_of(call)}
                for call in turn.calls
            ]
        return {"role": turn.role, "content": content}

    @staticmethod
    def _part(part: Any) -> Any:
        image = _image(part)
        if image is None:
            return part
        if image.data:
            return {"type": "image", "source": {"type": "base64", "media_type": image.media_type, "data": image.data}}
        return {"type": "image", "source": {"type": "url", "url": image.url}}

    @staticmethod
    def _tool(tool: Any) -> Any:
        function = _function_of(tool)
        if function is None:
            return tool
        schema = function.pop("parameters", None) or {"type": "object", "properties": {}}
        return {**function, "input_schema": schema}

    # Answers

    @classmethod
    def recognises(cls, payload: Mapping[str, Any]) -> bool:
        kind = _text(payload.get("type"))
        return (
            kind == "ping"
            or kind.startswith(("message_", "content_block_"))
            or (kind == "message" and "role" in payload)
        )

    def chunks(self, event: ServerSentEvent) -> list[Chunk]:
        payload = self.load(event)
        if payload is None:  # also for [DONE], which some proxies send instead of message_stop
            return []
        # "message" is also the name of events without a name
        kind = _text(payload.get("type")) or (event.event if event.event != "message" else "")
        read = self._event_kinds.get(kind)
        if read is None or event.event == "error" or not _ERROR_MEMBERS.isdisjoint(payload):
            error = _reported_error(payload, "error" in (kind, event.event))
            if error is not None:
                raise _stream_error(error)
        return [] if read is None else read(payload, functools.partial(Chunk, event_id=event.id or "", raw=payload))

    def _message_start(self, payload: dict[str, Any], made: _MakeChunk) -> list[Chunk]:
        message = _dict(payload.get("message"))
        id = _text(message.get("id"))
        if self._id is not None and (id != self._id or self._blocks):
            raise InvalidStreamError(
                f"expected the end of message {self._id!r}, got the start of message {id!r}: "
                "two answers in one stream, as from a proxy that sent the request twice"
            )
        self._id = id
        self._read_container(message)
        return [made(id=id, model=_text(message.get("model")), usage=self.usage(message.get("usage")))]

    def _read_container(self, place: dict[str, Any]) -> None:
        container = place.get("container")
        self._container = _text(container) or _text(_dict(container).get("id")) or self._container

    def _block_start(self, payload: dict[str, Any], made: _MakeChunk) -> list[Chunk]:
        index, block = _count(payload.get("index")), _dict(payload.get("content_block"))
        self._open[index] = _Part(block)
        self._blocks.append(self._open[index])
        self._calls.pop(index, None)
        # the input of a call counts at its end, and only where no more follows
        return self._block(index, {**block, "input": None}, made)

    def _block(self, index: int, block: dict[str, Any], made: _MakeChunk) -> list[Chunk]:
        """The chunk of a block, at its beginning or whole"""
        kind = block.get("type")
        if kind == "tool_use":
            self._calls[index] = _OpenCall(self._call_count)
            self._call_count += 1
            arguments = _arguments_text(block.get("input") or "")
            call = ToolCall(self._calls[index].index, _text(block.get("id")), _text(block.get("name")), arguments)
            return [made(tool_calls=(call,))]
        if kind == "text" and _text(block.get("text")):
            return [made(text=block["text"])]
        if kind == "thinking" and _text(block.get("thinking")):
            return [made(reasoning=block["thinking"])]
        return []

    def _block_delta(self, payload: dict[str, Any], made: _MakeChunk) -> list[Chunk]:
        index, delta = _count(payload.get("index")), _dict(payload.get("delta"))
        kind = _text(delta.get("type"))
        field = self._DELTAS.get(kind)
        piece = _text(delta.get(field)) if field else ""
        if index not in self._open:
            self._open[index] = _Part({})
        if field:
            self._open[index].append(field, piece)
        elif kind == "citations_delta":
            self._open[index].gather("citations", delta.get("citation"))
        if kind == "text_delta" and piece:
            return [made(text=piece)]
        if kind == "thinking_delta" and piece:
            return [made(reasoning=piece)]
        if kind == "input_json_delta" and index in self._calls:
            return self._arguments(self._calls[index], self._calls[index].take(piece), made)
        return []

    @staticmethod
    def _arguments(call: _OpenCall, arguments: str | None, made: _MakeChunk) -> list[Chunk]:
        return [made(tool_calls=(ToolCall(call.index, arguments=arguments),))] if arguments else []

    def _block_stop(self, payload: dict[str, Any], made: _MakeChunk) -> list[Chunk]:
        index = _count(payload.get("index"))
        block, call = self._open.get(index, _Part({})), self._calls.get(index)
        if call is None:
            return []
        given = "" if block.has_more("partial_json") else _arguments_text(block.get("input") or "")
        return self._arguments(call, call.end() or given, made)

    def _message_delta(self, payload: dict[str, Any], made: _MakeChunk) -> list[Chunk]:
        delta = _dict(payload.get("delta"))
        self._read_container(delta)
        made = functools.partial(made, usage=self.usage(payload.get("usage")))
        return [self._stopped(delta.get("stop_reason"), made, self._whole_blocks())]

    def _message_stop(self, payload: dict[str, Any], made: _MakeChunk) -> list[Chunk]:
        self.whole = self.done = True
        return []

    def _message(self, payload: dict[str, Any], made: _MakeChunk) -> list[Chunk]:
        """One message instead of a stream"""
        blocks = [block for block in _list(payload.get("content")) if isinstance(block, dict)]
        usage = self.usage(payload.get("usage"))
        chunks = [made(id=_text(payload.get("id")), model=_text(payload.get("model")), usage=usage)]
        for index, block in enumerate(blocks):
            chunks += self._block(index, block, made)
        self.whole = self.done = True
        self._read_container(payload)
        return [*chunks, self._stopped(payload.get("stop_reason"), made, blocks)]

    def _stopped(self, reason: Any, made: _MakeChunk, blocks: list[dict[str, Any]] | None) -> Chunk:
        reason = _text(reason)
        if not reason:
            return made()
        self.finished = True
        pause = {"content": blocks, **({"container": self._container} if self._container else {})} if blocks else None
        # text alone needs no blocks
        kept = blocks if blocks and any(block.get("type") != "text" for block in blocks) else None
        return made(
            finish_reason=reason,
            finish=self.finish(reason, self._call_count, pause=pause),
            vendor={self.name: kept} if kept else None,
        )

    def _whole_blocks(self) -> list[dict[str, Any]] | None:
        """The blocks as they can be sent back, None where one cannot"""
        blocks = []
        for part in self._blocks:
            block = part.whole()
            text = _text(block.pop("partial_json", ""))
            if text.strip():
                block["input"] = _json(text)
            if block.get("input") is _NO_JSON:
                return None
            if "type" in block and (block["type"] != "text" or block.get("text")):  # Anthropic refuses an empty text
                blocks.append(block)
        return blocks


class _CandidateParts:
    """The parts of a candidate as received, with pieces of text joined"""

    def __init__(self) -> None:
        self._whole: list[_Part] = []
        self._beside: dict[str, Any] | None = None  # the other members of the last part, which is a text
        #: whether the parts hold more than text
        self.are_special = False

    def extend(self, parts: Iterable[dict[str, Any]]) -> None:
        for part in parts:
            beside = {name: value for name, value in part.items() if name != "text"}
            self.are_special = self.are_special or bool(beside)
            if "text" not in part or "thoughtSignature" in part:  # a signed part must be sent back unchanged
                self._whole.append(_Part(part))
                self._beside = None
            elif part["text"]:
                if beside != self._beside:
                    self._whole.append(_Part(beside))
                    self._beside = beside
                self._whole[-1].append("text", _text(part["text"]))

    def parts(self) -> list[dict[str, Any]]:
        return [part.whole() for part in self._whole]


class _Gemini(Dialect):
    """Google's Gemini API, generateContent

    https://ai.google.dev/api/generate-content
    """

    name = "gemini"
    ends_with_body = True
    excluded = frozenset({"reasoning"})
    roots = ("/v1beta", "/v1alpha", "/v1")

    #: Gemini 3 wants its signature at the first call of an answer; this marks a call of another model
    _FOREIGN = "skip_thought_signature_validator"
    #: the names in generationConfig for options of OpenAI and Ollama
    options: Mapping[str, str] = {
        "max_tokens": "maxOutputTokens",
        "max_completion_tokens": "maxOutputTokens",
        "top_p": "topP",
        "top_k": "topK",
        "stop": "stopSequences",
        "n": "candidateCount",
        "presence_penalty": "presencePenalty",
        "frequency_penalty": "frequencyPenalty",
        **_same(
            "candidateCount frequencyPenalty imageConfig logprobs maxOutputTokens mediaResolution presencePenalty "
            "responseJsonSchema responseLogprobs responseMimeType responseModalities responseSchema seed "
            "speechConfig stopSequences temperature thinkingConfig topK topP"
        ),
    }

    def __init__(self, choices: int = 1) -> None:
        super().__init__(choices)
        self._choices = _Choices(choices, may_count=False)
        self._whole: dict[int, _CandidateParts] = {}  # of each candidate
        self._calls: dict[int, dict[Any, ToolCall]] = {}  # of each candidate
        self._token: Any = None  # the last continuationToken

    @classmethod
    def url(cls, base_url: str, model: str, stream: bool) -> str:
        path = model if "/" in model else f"models/{model}"
        method = "streamGenerateContent" if stream else "generateContent"
        parts = urlsplit(cls.endpoint(base_url, f"/{quote(path)}:{method}"))
        query = [parts.query, "alt=sse" if stream else ""]
        return urlunsplit(parts._replace(query="&".join(filter(None, query))))

    @classmethod
    def key_headers(cls, key: str) -> dict[str, str]:
        return {"x-goog-api-key": key}

    # Requests

    @classmethod
    def body(cls, messages: Sequence[Any], model: str, params: Mapping[str, Any], stream: bool) -> dict[str, Any]:
        params = dict(params)
        turns = _turns(messages, cls.name, cls._calls_of, needs_ids=False)
        config = _moved(params, cls.options)
        config.update(_dict(_either(params, "generationConfig", "generation_config")))
        system = [cls._part(part) for turn in turns if turn.is_system for part in turn.parts]
        own = _either(params, "systemInstruction", "system_instruction")
        own = own.get("parts") if isinstance(own, Mapping) else own
        system = [
            *({"text": part} if isinstance(part, str) else part for part in _as_list(own, (str, Mapping)))
        ] + system
        body: dict[str, Any] = {"contents": _with_results_together(turns, "parts", cls._content, cls._result)}
        if system:
            body["systemInstruction"] = {"parts": system}
        if config:
            body["generationConfig"] = config
        tools, choice = params.pop("tools", None), params.pop("tool_choice", None)
        if tools:
            body["tools"] = cls._tools(tools)
        if tools and choice is not None:
            modes = {"auto": "AUTO", "none": "NONE", "required": "ANY"}
            config = _tool_choice(
                choice,
                word=lambda word: {"mode": modes.get(word, word)},
                name=lambda name: {"mode": "ANY", "allowedFunctionNames": [name]},
            )
            body["toolConfig"] = {"functionCallingConfig": config}
        return {**body, **params}

    @classmethod
    def choices_asked(cls, body: Mapping[str, Any]) -> int:
        return _count(_dict(body.get("generationConfig")).get("candidateCount"), 1)

    @classmethod
    def _content(cls, turn: _Turn) -> Any:
        if "parts" in turn.message:  # in Gemini's own shape
            return turn.message
        parts = turn.kept
        if parts is None:
            calls = list(map(cls._call, turn.calls))
            if calls:
                calls[0]["thoughtSignature"] = cls._FOREIGN
            parts = [*map(cls._part, turn.parts), *calls]
        return {"role": "model" if turn.role == "assistant" else turn.role, "parts": parts}

    @staticmethod
    def _calls_of(message: Mapping[str, Any]) -> list[ToolCall]:
        """The calls in a message of OpenAI's shape, or in a content of Gemini's own"""
        own = [_dict(_dict(part).get("functionCall")) for part in _list(message.get("parts"))]
        return _calls_of(message) or [
            ToolCall(id=_text(call.get("id")), name=_text(call.get("name"))) for call in own if call
        ]

    @staticmethod
    def _call(call: ToolCall) -> dict[str, Any]:
        id = {"id": call.id} if call.id else {}
        return {"functionCall": {**id, "name": call.name, "args": _arguments_of(call)}}

    @staticmethod
    def _result(turn: _Turn) -> dict[str, Any]:
        content, call = _result_text(turn.content), turn.answered or ToolCall()
        parsed = _json(content)
        response = {"name": call.name, "response": parsed if isinstance(parsed, dict) else {"result": content}}
        return {"functionResponse": {**({"id": call.id} if call.id else {}), **response}}

    @staticmethod
    def _part(part: Any) -> Any:
        image = _image(part)
        if image is not None and image.data:
            return {"inlineData": {"mimeType": image.media_type, "data": image.data}}
        if image is not None:
            return {"fileData": {"fileUri": image.url, "mimeType": image.media_type}}
        return {"text": part.get("text")} if isinstance(part, Mapping) and part.get("type") == "text" else part

    @staticmethod
    def _tools(tools: Iterable[Any]) -> list[Any]:
        declared, others = [], []
        for tool in tools:
            function = _function_of(tool)
            if function is None:
                others.append(tool)
                continue
            schema = function.pop("parameters", None)
            function.pop("strict", None)
            declared.append({**function, "parametersJsonSchema": schema} if schema else function)
        return ([{"functionDeclarations": declared}] if declared else []) + others

    # Answers

    @classmethod
    def recognises(cls, payload: Mapping[str, Any]) -> bool:
        return bool({"candidates", "promptFeedback", "usageMetadata"}.intersection(payload))

    def chunks(self, event: ServerSentEvent) -> list[Chunk]:
        payload = self.load(event)
        if payload is None:
            return []
        error = _reported_error(payload, event.event == "error")
        if error is not None:
            raise _stream_error(error)
        candidates = [candidate for candidate in _list(payload.get("candidates")) if isinstance(candidate, dict)]
        named = Chunk(
            usage=self.usage(payload.get("usageMetadata")),
            event_id=event.id or "",
            raw=payload,
            id=_text(payload.get("responseId")),
            model=_text(payload.get("modelVersion")),
        )
        if not candidates:
            blocked = _text(_dict(payload.get("promptFeedback")).get("blockReason"))
            self.whole = self.whole or bool(blocked)
            refused = named._replace(finish_reason=blocked, finish="refusal")
            return [refused] if blocked else [named] if named.usage else []
        read = []
        for position, candidate in enumerate(candidates):
            error = None if _ERROR_MEMBERS.isdisjoint(candidate) else _reported_error(candidate)
            if error is not None and self._failure is None:
                self._failure = _stream_error(error)
            parts = [_dict(part) for part in _list(_dict(candidate.get("content")).get("parts"))]
            text = "".join([_text(part.get("text")) for part in parts if not part.get("thought")])
            read.append((_count(candidate.get("index"), position), candidate, parts, text))
        self._choices.note([(sent, text) for sent, _, _, text in read])
        chunks = [
            self._candidate(candidate, parts, self._choices.index(sent), text, named)
            for sent, candidate, parts, text in read
        ]
        self.finished, self.whole = self._choices.finished, self._choices.whole
        return chunks

    def _candidate(
        self, candidate: dict[str, Any], parts: list[dict[str, Any]], index: int, text: str, named: Chunk
    ) -> Chunk:
        whole = self._whole.setdefault(index, _CandidateParts())
        whole.extend(parts)
        reason, known = _text(candidate.get("finishReason")), self._calls.setdefault(index, {})
        reasoning = ""
        calls: tuple[ToolCall, ...] = ()
        if any("functionCall" in part or "thought" in part for part in parts):
            reasoning = "".join([_text(part.get("text")) for part in parts if part.get("thought")])
            calls = tuple(self._tool_calls(parts, known))
        chunk = named._replace(text=text, reasoning=reasoning, tool_calls=calls, index=index)
        self._choices.end(index, reason, _has_content(chunk))
        self._token = candidate.get("continuationToken") or self._token
        if not reason:
            return chunk
        pause = {"continuationToken": self._token} if self._token else None
        finish = self.finish(reason, self._calls[index], pause=pause)
        is_last = not self._choices.is_provisional  # else each chunk would hold all parts
        kept = {self.name: whole.parts()} if whole.are_special and is_last else None
        return chunk._replace(finish_reason=reason, finish=finish, vendor=kept)

    def end(self) -> Iterator[Chunk]:
        yield from super().end()
        if self._choices.is_provisional:
            for index, whole in self._whole.items():
                if whole.are_special:
                    yield Chunk(index=index, vendor={self.name: whole.parts()})

    @staticmethod
    def _tool_calls(parts: list[dict[str, Any]], calls: dict[Any, ToolCall]) -> Iterator[ToolCall]:
        for call in (_dict(part.get("functionCall")) for part in parts):
            if call:
                if "partialArgs" in call or call.get("willContinue"):
                    raise InvalidStreamError(
                        "arguments of tool calls in parts (streamFunctionCallArguments) are not read"
                    )
                arguments = _arguments_text(call.get("args") or {})
                yield from _new_call(_text(call.get("id")), _text(call.get("name")), arguments, calls)


class _Responses(Dialect):
    """OpenAI Responses

    https://platform.openai.com/docs/api-reference/responses-streaming
    """

    name = "openai-responses"
    path = "/responses"
    compares = True

    _TERMINAL = frozenset({f"response.{status}" for status in ("completed", "incomplete", "failed", "cancelled")})
    #: kinds of events with text, as ``.delta`` and, whole, as ``.done``: the field of the Chunk, and the member of the
    #: whole text
    _TEXTS = {
        "response.output_text": ("text", "text"),
        "response.refusal": ("refusal", "refusal"),
        "response.reasoning_text": ("reasoning", "text"),
        "response.reasoning_summary_text": ("reasoning", "text"),
        "response.function_call_arguments": ("arguments", "arguments"),
        "response.custom_tool_call_input": ("arguments", "input"),
    }

    def __init__(self, choices: int = 1) -> None:
        super().__init__(choices)
        self._number: int | None = None  # of the last event
        self._last: dict[str, Any] = {}
        self._named = False
        # by output_index, else by the id of the item
        self._calls: dict[Any, _OpenCall] = {}
        self._thoughts: dict[Any, tuple[str, int]] = {}  # the kind of reasoning that is returned, and its part
        self._items: dict[Any, dict[str, Any]] = {}
        self._open: Any = ""  # the item of the last event
        self._received: dict[tuple[str, Any, int], _Text] = {}  # texts received, by kind, output_index and part
        self.event_names = self.event_names.union(self._TERMINAL, (f"{kind}.delta" for kind in self._TEXTS))

    # Requests

    @classmethod
    def body(cls, messages: Sequence[Any], model: str, params: Mapping[str, Any], stream: bool) -> dict[str, Any]:
        params, is_stored = dict(params), params.get("store") is not False
        limit = _moved(params, {"max_tokens": "max_output_tokens", "max_completion_tokens": "max_output_tokens"})
        body = {
            "model": model,
            # the service cannot find reasoning that is neither stored nor sent along
            "input": [
                item
                for turn in _turns(messages, cls.name)
                for item in cls._items_of(turn)
                if is_stored or item.get("type") != "reasoning" or item.get("encrypted_content")
            ],
            "stream": stream,
            **limit,
        }
        tools, choice = params.pop("tools", None), params.pop("tool_choice", None)
        if tools:
            body["tools"] = list(map(cls._tool, tools))
        if tools and choice is not None:
            body["tool_choice"] = _tool_choice(
                choice, word=lambda word: word, name=lambda name: {"type": "function", "name": name}
            )
        return {**body, **params}

    @classmethod
    def _items_of(cls, turn: _Turn) -> list[Any]:
        content = turn.content
        if "type" in turn.message:  # an item already
            return [turn.message]
        if turn.answered is not None:
            output = content if isinstance(content, str) else list(map(cls._part, turn.parts))
            return [{"type": "function_call_output", "call_id": turn.answered.id, "output": output}]
        if turn.kept is not None:
            return list(turn.kept)
        text = "output_text" if turn.role == "assistant" else "input_text"
        content = [cls._part(part, text) for part in content] if isinstance(content, list) else content
        items: list[Any] = [{"role": turn.role, "content": content}] if content else []
        return items + [
            {"type": "function_call", "call_id": call.id, "name": call.name, "arguments": call.arguments}
            for call in turn.calls
        ]

    @staticmethod
    def _part(part: Any, text: str = "input_text") -> Any:
        if isinstance(part, str):
            return {"type": text, "text": part}
        if isinstance(part, Mapping) and part.get("type") == "text":
            return {**part, "type": text}
        image = _image(part)
        if image is None:
            return part
        detail = {"detail": image.detail} if image.detail else {}
        return {"type": "input_image", "image_url": image.url, **detail}

    @staticmethod
    def _tool(tool: Any) -> Any:
        function = _function_of(tool)
        # strict is the default here, unlike in Chat Completions
        return tool if function is None else {"type": "function", "strict": False, **function}

    # Answers

    @classmethod
    def recognises(cls, payload: Mapping[str, Any]) -> bool:
        kind = _text(payload.get("type"))
        return (
            kind.startswith("response.")
            or (kind == "error" and "sequence_number" in payload)
            or payload.get("object") == "response"
        )

    def chunks(self, event: ServerSentEvent) -> Iterable[Chunk]:
        payload = self.load(event)
        if payload is None:
            return []
        kind = _text(payload.get("type")) or event.event
        is_known = kind.startswith("response.") or payload.get("object") == "response"
        if is_known:
            error = _reported_error({"error": payload["error"]}) if payload.get("error") else None
        else:
            error = _reported_error(payload, "error" in (kind, event.event))
        if error is not None and kind not in self._TERMINAL and payload.get("object") != "response":
            self._failure = _stream_error(error)
            return [Chunk(event_id=event.id or "", raw=payload, finish_reason="failed", finish="other")]
        if self._is_repeated(payload):
            return []
        response = payload if payload.get("object") == "response" else _dict(payload.get("response"))
        named = Chunk(event_id=event.id or "", raw=payload)
        if response and not self._named:
            self._named = True
            named = named._replace(id=_text(response.get("id")), model=_text(response.get("model")))
        if response is payload:
            return self._document(response, named)
        if kind in self._TERMINAL:
            return self._ended(kind.rpartition(".")[2], {"error": payload.get("error"), **response}, named)
        return self._part_of_answer(kind, payload, named) if named.id or not response else []

    @classmethod
    def job_url(cls, url: str, body: Mapping[str, Any], id: str, action: str = "") -> str:
        if not (body.get("background") and id):
            return ""
        parts = urlsplit(url)
        path = "/".join(filter(None, [parts.path, quote(id, safe=""), action]))
        return urlunsplit(parts._replace(path=path))

    @classmethod
    def replay_url(cls, url: str, body: Mapping[str, Any], id: str, reader: Dialect | None) -> str:
        job = cls.job_url(url, body, id)
        if not job:
            return ""
        parts = urlsplit(job)
        number = reader._number if isinstance(reader, _Responses) else None
        query = [parts.query, "stream=true", "" if number is None else f"starting_after={number}"]
        return urlunsplit(parts._replace(query="&".join(filter(None, query))))

    def _is_repeated(self, payload: dict[str, Any]) -> bool:
        """Whether an event came before; StreamInterrupted where events between are missing"""
        number, last = payload.get("sequence_number"), self._last
        if not isinstance(number, int):
            return False
        if self._number is not None and number > self._number + 1:
            raise StreamInterrupted(f"expected event {self._number + 1}, got {number}: what is between is lost")
        if self._number is None or number > self._number:
            self._number, self._last = number, payload
            return False
        # a server that does not count sends one number for different events
        is_another = number == self._number and self._without_padding(payload) != self._without_padding(last)
        self._last = payload if is_another else last
        return not is_another

    @staticmethod
    def _without_padding(payload: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in payload.items() if name != "obfuscation"}

    def _part_of_answer(self, kind: str, payload: dict[str, Any], named: Chunk) -> list[Chunk]:
        item, part = _dict(payload.get("item")), _dict(payload.get("part"))
        index = payload.get("output_index")
        if not isinstance(index, int):
            index = _text(payload.get("item_id")) or _text(item.get("id")) or self._open
        self._open = index
        number = _count(payload.get("summary_index"), _count(payload.get("content_index")))
        base, _, ending = kind.rpartition(".")
        if base in self._TEXTS and ending in ("delta", "done"):
            member = "delta" if ending == "delta" else self._TEXTS[base][1]
            return self._piece(base, index, number, _text(payload.get(member)), ending == "done", named)
        if kind in ("response.content_part.done", "response.reasoning_summary_part.done"):
            return list(self._parts(index, [part], number, named))
        if kind in ("response.output_item.added", "response.output_item.done"):
            if ending == "done":
                self._items[index] = item
            return list(self._item(index, item, ending == "done", named))
        return [named] if named.id else []

    def _piece(self, base: str, index: Any, number: int, text: str, is_whole: bool, named: Chunk) -> list[Chunk]:
        """A piece of text, or the rest of a whole text after its pieces"""
        field, call = self._TEXTS[base][0], self._calls.get(index)
        if field == "arguments" and call is None:
            return []  # the item has them too
        place = (field if field == "arguments" else base, index, number)
        received = self._received.setdefault(place, _Text())
        if is_whole:
            text = _rest(text, str(received)) or ""
        if not text:
            return []
        if field == "arguments" and call is not None:
            text = call.take(text, is_text=base == "response.custom_tool_call_input") or ""
        if not text:
            return []
        received.add(text)
        if field == "arguments" and call is not None:
            return [named._replace(tool_calls=(ToolCall(call.index, arguments=text),))]
        if field == "reasoning":
            # either the summary of an item or its whole text; its parts are paragraphs
            first, before = self._thoughts.setdefault(index, (base, number))
            if first != base:
                return []
            self._thoughts[index] = (base, number)
            text = text if number == before else "\n\n" + text
        return [_chunk_with(named, field, text)]

    def _parts(self, index: Any, parts: Iterable[Any], first: int, named: Chunk) -> Iterator[Chunk]:
        """The new text in whole parts of an item"""
        for number, part in enumerate(map(_dict, parts), first):
            kind = _text(part.get("type"))
            base = "response.reasoning_summary_text" if kind == "summary_text" else f"response.{kind}"
            if base in self._TEXTS:
                yield from self._piece(base, index, number, _text(part.get(self._TEXTS[base][1])), True, named)

    def _item(self, index: Any, item: dict[str, Any], is_whole: bool, named: Chunk) -> Iterator[Chunk]:
        """A tool call at its beginning, or the new text of an item at its end"""
        kind = _text(item.get("type"))
        if kind in ("function_call", "custom_tool_call"):
            if index not in self._calls:
                call = ToolCall(len(self._calls), _text(item.get("call_id")), _text(item.get("name")))
                self._calls[index] = _OpenCall(call.index, call.id, call.name)
                yield named._replace(tool_calls=(call,))
            if not is_whole:
                return
            base = "function_call_arguments" if kind == "function_call" else "custom_tool_call_input"
            text = _text(item.get("arguments") or item.get("input"))
            yield from self._piece(f"response.{base}", index, 0, text, True, named)
            held = self._calls[index].end()
            if held:
                self._received["arguments", index, 0].add(held)
                yield named._replace(tool_calls=(ToolCall(self._calls[index].index, arguments=held),))
        else:
            content = list(map(_dict, _list(item.get("content"))))
            if kind == "reasoning":
                content = [{**part, "type": "reasoning_text"} for part in content]  # "text" with some servers
            summary = [{"type": "summary_text", **_dict(part)} for part in _list(item.get("summary"))]
            yield from self._parts(index, summary, 0, named)
            yield from self._parts(index, content, 0, named)

    def _ended(self, kind: str, response: dict[str, Any], named: Chunk) -> Iterator[Chunk]:
        """The last chunks of an answer; raises the error of a failed one"""
        inner = _text(response.get("status"))
        status = inner if inner in ("failed", "incomplete", "cancelled") else kind
        if status == "cancelled":
            raise StreamInterrupted("the response was cancelled before it was whole", retryable=False)
        error = _reported_error({"error": response.get("error")})
        status = "failed" if error else status
        items = [item for item in _list(response.get("output")) if isinstance(item, dict)]
        yield from self._missing(items, named)
        items = items or list(self._items.values())
        kept = any(item.get("type") != "message" for item in items)
        self.whole = self.done = status != "failed"
        reason = _text(_dict(response.get("incomplete_details")).get("reason")) if status == "incomplete" else status
        yield named._replace(
            usage=self.usage(response.get("usage")),
            finish_reason=status,
            finish="other" if status == "failed" else self.finish(reason, self._calls),
            vendor={self.name: items} if kept and self.whole else None,
        )
        if status == "failed":
            raise _stream_error(error or _Reported("it failed, without a reason"))

    def _missing(self, items: list[dict[str, Any]], named: Chunk) -> Iterator[Chunk]:
        """The parts of the whole answer that its pieces lacked"""
        received = {field: self._received_text(field) for field in ("text", "refusal", "reasoning")}
        indexes = {call.id: index for index, call in self._calls.items()}  # the whole may count them differently
        for position, item in enumerate(items):
            kind, id = item.get("type"), _text(item.get("call_id"))
            if kind in ("function_call", "custom_tool_call"):
                yield from self._item(indexes.get(id, ("whole", position)), item, True, named)
            elif kind == "reasoning" and not received["reasoning"]:
                yield from self._item(("whole", position), item, True, named)
        contents = [_list(item.get("content")) for item in items if item.get("type") == "message"]
        for field in ("text", "refusal"):
            whole = "".join(_text(_dict(part).get(field)) for content in contents for part in content)
            rest = _rest(whole, received[field])
            if rest is None and not _utf_16(received[field]).endswith(_utf_16(whole)):
                raise InvalidStreamError(
                    f"the pieces of the {field} are not what its whole is, which ends {_excerpt(whole[-50:])}"
                )
            if rest:
                yield _chunk_with(named, field, rest)

    def _received_text(self, field: str) -> str:
        """All pieces of a kind, joined in the order of their items"""
        places = [place for place in self._received if self._TEXTS.get(place[0], ("", ""))[0] == field]
        if all(isinstance(index, int) for _, index, _ in places):
            places.sort(key=lambda place: place[1:])
        return "".join([str(self._received[place]) for place in places])

    def _document(self, response: dict[str, Any], named: Chunk) -> Iterator[Chunk]:
        """One response instead of a stream"""
        status = _text(response.get("status"))
        if named.id:
            yield named
        if f"response.{status}" in self._TERMINAL:
            yield from self._ended(status, response, named)
            return
        yield from self._missing([_dict(item) for item in _list(response.get("output"))], named)
        if status in ("queued", "in_progress"):
            self.pending = True
            raise StreamInterrupted(f"the response is not whole yet, it is {status}")


class _Ollama(Dialect):
    """Ollama's own API

    https://docs.ollama.com/api
    """

    name = "ollama"
    path = "/chat"
    roots = ("/api",)
    models_path = "/tags"

    options: Mapping[str, str] = {
        "max_tokens": "num_predict",
        "max_completion_tokens": "num_predict",
        **_same(
            "frequency_penalty min_p mirostat mirostat_eta mirostat_tau num_batch num_ctx num_gpu num_keep "
            "num_predict num_thread presence_penalty repeat_last_n repeat_penalty seed stop temperature top_k "
            "top_p typical_p"
        ),
    }

    def __init__(self, choices: int = 1) -> None:
        super().__init__(choices)
        self._thoughts: list[str] = []
        self._calls: dict[Any, ToolCall] = {}

    @classmethod
    def endpoint(cls, base_url: str, path: str) -> str:
        # many users write /v1, where Ollama has the API of OpenAI
        parts = urlsplit(base_url)
        base = re.sub(r"/v1/*$", "", parts.path)
        return super().endpoint(urlunsplit(parts._replace(path=base)), path)

    # Requests

    @classmethod
    def body(cls, messages: Sequence[Any], model: str, params: Mapping[str, Any], stream: bool) -> dict[str, Any]:
        params = dict(params)
        options = {**_moved(params, cls.options), **_dict(params.pop("options", None))}
        body = {
            "model": model,
            "messages": [cls._message(turn) for turn in _turns(messages, cls.name, needs_ids=False)],
            "stream": stream,
        }
        if options:
            body["options"] = options
        return {**body, **params}

    @classmethod
    def _message(cls, turn: _Turn) -> Any:
        message, role = turn.message, "system" if turn.is_system else turn.role
        if turn.answered is not None and "tool_name" not in message:
            return {"role": role, "content": _result_text(turn.content), "tool_name": turn.answered.name}
        if isinstance(turn.content, str) and not turn.calls and "vendor" not in message and role == turn.role:
            return message  # Ollama's own shape is the same, and may have more in it
        others = {name: message[name] for name in message if name not in ("role", "content", "tool_calls", "vendor")}
        rendered: dict[str, Any] = {"role": role, "content": _plain_text(turn.content), **others, **(turn.kept or {})}
        images = [cls._image(part) for part in turn.parts if _dict(part).get("type") != "text"]
        if images:
            rendered["images"] = images
        if turn.calls:
            rendered["tool_calls"] = [
                {
                    "function": {"name": call.name, "arguments": _arguments_of(call)},
                    **({"id": call.id} if call.id else {}),
                }
                for call in turn.calls
            ]
        return rendered

    @staticmethod
    def _image(part: Any) -> str:
        image = _image(part)
        if image is None or not image.data:
            raise InvalidRequestError("Ollama takes text, and images as data: URLs: it fetches none")
        return image.data

    # Answers

    @classmethod
    def recognises(cls, payload: Mapping[str, Any]) -> bool:
        return "done" in payload

    def chunks(self, event: ServerSentEvent) -> list[Chunk]:
        payload = self.load(event)
        if payload is None:
            return []
        error = _reported_error(payload, event.event == "error")
        if error is not None:
            raise _stream_error(error)
        message = _dict(payload.get("message"))
        # /api/generate has no message
        reasoning = _text(message.get("thinking")) or _text(payload.get("thinking"))
        if reasoning:
            self._thoughts.append(reasoning)
        calls = tuple(self._tool_calls(message)) if "tool_calls" in message else ()
        chunk = Chunk(
            text=_text(message.get("content")) or _text(payload.get("response")),
            reasoning=reasoning,
            tool_calls=calls,
            event_id=event.id or "",
            raw=payload,
            model=_text(payload.get("model")),
        )
        if payload.get("done") is not True:
            return [chunk]
        self.whole = self.done = True
        return [self._finished(payload, chunk)]

    def _tool_calls(self, message: dict[str, Any]) -> Iterator[ToolCall]:
        for call in map(_dict, _list(message.get("tool_calls"))):
            function = _dict(call.get("function"))
            arguments = _arguments_text(function.get("arguments") or {})
            yield from _new_call(_text(call.get("id")), _text(function.get("name")), arguments, self._calls)

    def _finished(self, payload: dict[str, Any], chunk: Chunk) -> Chunk:
        reason = _text(payload.get("done_reason")) or "stop"  # older servers give none
        kept = {"thinking": "".join(self._thoughts)} if self._thoughts and self._calls else None
        return chunk._replace(
            finish_reason=reason,
            finish=self.finish(reason, self._calls),
            usage=self.usage(payload),
            vendor={self.name: kept} if kept else None,
        )


DIALECTS: dict[str, type[Dialect]] = {kind.name: kind for kind in (_OpenAI, _Responses, _Anthropic, _Gemini, _Ollama)}


def iter_chunks(
    events: Iterable[ServerSentEvent], dialect: str | type[Dialect] = "auto", *, choices: int | None = None
) -> Iterator[Chunk]:
    """The Chunks of a stream of events, by a dialect

    Events may be ours or those of sseclient-py. Raises StreamError for an error event, InvalidStreamError for invalid
    data, and StreamInterrupted where the events end without the end marker; ``partial`` holds all Chunks before.
    ``"auto"`` detects the dialect by the first events. ``choices`` is how many were requested (``n``): each must have
    its end. With 1, all choices of the stream are parts of one answer; None, for unknown, keeps choices with different
    indexes apart.
    """
    kind = None if dialect == "auto" else _dialect(dialect)
    return _folded(_parsed_as_detected(iter(events), kind, choices), _Answer())


def _parsed_as_detected(
    events: Iterator[ServerSentEvent], kind: type[Dialect] | None, choices: int | None
) -> Iterator[Chunk]:
    for event in events if kind is None else ():
        kind = _detect_dialect(event)
        if kind is not None:
            events = itertools.chain((event,), events)
            break
    reader = (kind or _OpenAI)(choices or 1)
    if choices is None and isinstance(reader, (_OpenAI, _Gemini)):
        reader._choices.are_apart = True
    yield from _parsed(events, reader)


def _detect_dialect(event: ServerSentEvent) -> type[Dialect] | None:
    """The dialect of an event; openai for an error or other data than JSON, None for an event without meaning"""
    payload = _json(event.data)
    if isinstance(payload, dict):
        for kind in DIALECTS.values():
            if kind.recognises(payload):
                return kind
    says = event.data.strip() == "[DONE]" or (payload is _NO_JSON and event.data.strip())
    return _OpenAI if says or _reported_error(payload, event.event == "error") else None


def _dialect(dialect: str | type[Dialect]) -> type[Dialect]:
    if isinstance(dialect, str) and dialect not in DIALECTS:
        raise InvalidRequestError(f"no dialect {dialect!r}; there are {', '.join(DIALECTS)}")
    return DIALECTS[dialect] if isinstance(dialect, str) else dialect


def _parsed(events: Iterable[ServerSentEvent], dialect: Dialect) -> Iterator[Chunk]:
    """The chunks of events, up to the end of the answer"""
    try:
        for event in events:
            yield from dialect.read(event)
            if dialect.done:
                break
        yield from dialect.last(not dialect.done)
        dialect.require_whole()
    except (InvalidStreamError, StreamInterrupted, StreamTimeout):
        if not dialect.whole:  # else only the usage or the end of the connection is lost
            raise


def _folded(chunks: Iterable[Chunk], answer: _Answer) -> Iterator[Chunk]:
    """The same chunks, each folded into ``answer`` before it is returned"""
    try:
        for chunk in chunks:
            answer.add(chunk)
            yield chunk
    except SheepError as error:
        _set_partial(error, answer)
        raise
    answer.complete = True


def _set_partial(error: SheepError, answer: _Answer, events: Sequence[Sequence[Any]] = ()) -> None:
    error.partial = answer.completion()
    error.resume_point = answer.resume_point(events)._replace(pause=error._pause)


class _Reported(NamedTuple):
    """An error object of any vendor"""

    message: str
    code: str | int | None = None
    type: str = ""
    #: further parts, beside the message, of Gemini and Anthropic
    details: Any = None
    request_id: str = ""
    #: HTTP statuses in any of its members
    statuses: frozenset[int] = frozenset()

    @property
    def may_pass(self) -> bool:
        """Whether another attempt may help"""
        if _is_quota(429, self):
            return False
        if self.statuses:
            return not self.statuses.isdisjoint(RETRYABLE_STATUS)
        words = f"{self.code or ''} {self.type}"
        if re.search(_PASSING, words):
            return True
        return not re.search(_LASTING, words) and re.search(_BUSY, f"{words} {self.message}") is not None


#: members of an event that reports an error, where neither its name nor its type says so
_ERROR_MEMBERS = frozenset(
    ("error", "errors", "error_message", "error_msg", "errorMessage", "detail", "base_resp")
    + ("code", "error_code", "errorCode", "status_code", "status", "statusCode")
    + ("http_code", "http_status", "raw_status_code")
)
#: members with the message of an error, its code, and its HTTP status
_MESSAGES = ("message", "detail", "msg", "error_message", "error_msg", "errorMessage", "status_msg", "error", "errors")
_CODES = ("code", "error_code", "errorCode", "status_code")
_STATUSES = (*_CODES, "status", "statusCode", "http_code", "http_status", "raw_status_code")
#: codes and words of success
_GOOD = r"(?i)(0|2\d\d|20000|ok|success|none|null|false)?$"
#: MiniMax's codes of failures that may pass, as HTTP statuses
_MINIMAX = {"1000": 500, "1001": 408, "1002": 429}


def _reported_error(payload: Any, certain: bool = False) -> _Reported | None:
    """The error in an answer or an event, or None; ``certain`` says that any shape is an error"""
    if isinstance(payload, list):  # Gemini sends an array of one
        payload = payload[0] if payload else None
    if not isinstance(payload, dict):
        return _Reported(_text(payload)) if certain else None
    is_other = _ERROR_MEMBERS.isdisjoint(payload) and len(payload) > 2 and payload.get("object") != "error"
    if is_other and not certain and "error" not in _text(payload.get("type")):
        return None  # as almost all are
    may_be = any(map(payload.get, _ERROR_MEMBERS.intersection(payload))) or "error" in _text(payload.get("type"))
    if not (certain or may_be or payload.get("object") == "error" or payload.keys() <= {"message", "request_id"}):
        return None
    error = _error_object(payload, certain)
    if error is None:
        return None
    places = (error, payload, _dict(error.get("metadata")))
    statuses = {_status_in(place.get(name)) for place in places for name in _STATUSES}
    if error is _dict(payload.get("base_resp")):
        statuses = {_MINIMAX.get(str(error.get("status_code")), 0)}
    codes = [_code(place.get(name)) for place in places[:2] for name in _CODES]
    codes.append(_code(_dict(error.get("details")).get("error_code")))
    types = [_text(error.get("type")), _text(error.get("status"))]
    types += [_text(place.get("error_type")) for place in places]
    return _Reported(
        message=_error_message(error),
        code=next((code for code in codes if code is not None), None),
        type=next((type for type in types if type not in ("", "error")), ""),
        details=error.get("details"),
        request_id=_text(payload.get("request_id")),
        statuses=frozenset(statuses - {0}),
    )


def _error_object(payload: dict[str, Any], certain: bool) -> dict[str, Any] | None:
    """The part of a payload that describes an error, or None"""
    named = payload.get("error") or payload.get("errors")
    if isinstance(named, list) and named:
        named = named[0]
    if isinstance(named, str) and named:  # Ollama, xAI, TGI
        named = {"message": named}
    error = _dict(named)
    if error and not _is_success(error):
        return error
    minimax = _dict(payload.get("base_resp"))
    if _is_bad(minimax.get("status_code")):
        return minimax
    if certain or (named and not error) or payload.get("object") == "error":
        return payload
    message = _error_message(payload)
    is_answer = payload.get("choices") or payload.get("candidates")
    is_error = (
        any(_text(payload.get(name)) for name in ("error_message", "error_msg", "errorMessage"))  # DeepInfra
        or any(_is_bad(payload.get(name)) for name in _CODES)
        or any(_status_in(payload.get(name)) for name in _STATUSES)
        or "error" in _text(payload.get("type"))
        or (payload.get("detail") and not is_answer)
        or payload.keys() <= {"message", "request_id"}
    )
    return payload if payload.get("type") == "error" or (is_error and not re.match(_GOOD, message)) else None


def _is_success(error: dict[str, Any]) -> bool:
    """Whether a code means success, and no message means an error"""
    codes = [error[name] for name in _CODES if name in error]
    return bool(codes) and not any(map(_is_bad, codes)) and re.match(_GOOD, _error_message(error)) is not None


def _is_bad(code: Any) -> bool:
    """Whether a value is a code, and means an error"""
    return _code(code) is not None and not re.match(_GOOD, str(code))


def _status_in(value: Any) -> int:
    """A number that is an HTTP status of an error, else 0"""
    return int(value) if isinstance(value, (int, str)) and re.fullmatch("[45][0-9][0-9]", str(value)) else 0


def _error_message(error: dict[str, Any]) -> str:
    for name in _MESSAGES:
        value = error.get(name)
        if isinstance(value, dict):
            value = _error_message(value)
        if isinstance(value, str) and value:
            return value
        if isinstance(value, list) and value:  # FastAPI: [{"msg": ...}]
            return "; ".join(_text(item) or _text(_dict(item).get("msg")) for item in value)
    return ""


def _code(value: Any) -> str | int | None:
    return value if isinstance(value, (str, int)) and not isinstance(value, bool) and value != "" else None


#: codes and types of errors that may pass
_PASSING = (
    r"(?i)server_error|internal|overloaded|unavailable|timeout|timed_out|rate_limit|too_many_requests|api_error"
    r"|exhausted|network_error|abort|insufficient_system_resource"
)
#: messages of errors that may pass
_BUSY = r"(?i)throttl|overload|rate.?limit|too.?many.?requests|\b(at|over) capacity"
#: codes and types of errors that another attempt does not mend, whatever their message
_LASTING = r"(?i)invalid|not_?found|bad_?request|unsupported|permission|auth|forbidden|denied"


def _stream_error(reported: _Reported) -> StreamError:
    code = reported.code
    return StreamError(
        f"the provider reported an error in the stream: {reported.message or code or 'no message'}",
        code=code if isinstance(code, str) else None,
        vendor_code=code if code is not None else reported.type or None,
        retryable=reported.may_pass,
        request_id=reported.request_id or None,
    )


#: codes and types that mean a spent quota or balance, which no waiting mends
_QUOTA_CODES = {
    *("insufficient_quota", "insufficient_user_quota", "billing_hard_limit_reached", "billing_not_active"),
    *("billing_error", "contract_spend_limit_reached", "enforced_spend_limit_reached"),
    *("insufficient_balance_error", "Arrearage"),  # MiniMax, DashScope
}
#: messages that mean the same
_QUOTA_MESSAGE = r"(?i)\binsufficient (account )?(balance|credits?|funds)\b"
_MODEL_CODES = frozenset({"model_not_found", "DeploymentNotFound", "not_found_error", "invalid_model"})
#: messages that mean a missing model (Gemini, Vertex, Ollama, DeepSeek)
_MODEL_MESSAGE = r"(?is)\bmodels?\b.*\b(not found|does not exist|not exist)\b|\bnot a valid model\b"
#: messages that mean a refused key, with another status than 401 (Gemini, xAI)
_KEY_MESSAGE = r"(?i)\bAPI_KEY_INVALID\b|\b(incorrect|invalid) api key\b"
#: messages that mean a country that the provider does not serve (OpenAI, Gemini, Anthropic)
_COUNTRY_MESSAGE = (
    r"(?i)\b(country|region|territory|location)\b[^.;]{0,40}\b(not |un)(supported|available|allowed)\b"
    r"|\b(not |un)(supported|available|allowed)\b[^.;]{0,40}\b(country|region|territory|location)\b"
    r"|\brequest not allowed\b|\bcheck your network settings\b"
)
#: the beginning of a page, or Cloudflare's words instead of one
_PAGE = rb"(?i)\s*(<|error code: 1\d\d\d)"


def _is_quota(status: int, reported: _Reported) -> bool:
    if status == 402 or {str(reported.code), reported.type} & _QUOTA_CODES:
        return True
    if re.search(_QUOTA_MESSAGE, reported.message):
        return True
    # Gemini: QuotaFailure.violations[].quotaId ends in PerDay..., RetryInfo notwithstanding
    return status == 429 and "PerDay" in json.dumps(reported.details)


def _error_class(status: int, reported: _Reported, is_page: bool) -> type[SheepError]:
    if _is_quota(status, reported):
        return QuotaError
    if status == 403 and (is_page or _is_of_country(reported)):
        return InvalidRequestError
    if status in (401, 403):
        return AuthenticationError
    if status == 429:
        return RateLimitError
    if status in (408, 409) or status >= 500:
        return ServerError
    if status == 400 and re.search(_KEY_MESSAGE, f"{reported.message} {json.dumps(reported.details)}"):
        return AuthenticationError
    if status in (400, 404) and (
        reported.code in _MODEL_CODES or reported.type in _MODEL_CODES or re.search(_MODEL_MESSAGE, reported.message)
    ):
        return ModelNotFoundError
    return InvalidRequestError


def _is_of_country(reported: _Reported) -> bool:
    words = f"{reported.code or ''} {reported.message}".replace("_", " ")
    return re.search(_COUNTRY_MESSAGE, words) is not None


_ADVICE: dict[type[SheepError], str] = {
    AuthenticationError: "check the API key",
    QuotaError: "the account's quota or credit is used up: check its plan and billing",
    RateLimitError: "wait, or send fewer requests at a time",
    ModelNotFoundError: "check the model's name, and that the key may use it",
    ServerError: "the provider is failing or overloaded; try again later",
}


def _status_error(status: int, headers: Mapping[str, str], body: bytes = b"", where: str = "") -> SheepError:
    """The error for the status, headers and body of a response, of any vendor"""
    payload = _json(body)
    if payload is _NO_JSON:
        payload = _payload_in_events(body)
    reported = _reported_error(payload, certain=payload is not _NO_JSON) or _Reported("")
    is_html = _media_type(headers.get("content-type") or "") == "text/html" or re.match(_PAGE, body) is not None
    kind = _error_class(status, reported, payload is _NO_JSON and is_html)
    says = {"true": True, "false": False}.get((headers.get("x-should-retry") or "").strip().lower())
    request_id = headers.get("x-request-id") or headers.get("request-id") or reported.request_id or None
    error = kind(
        _status_message(status, headers, body, reported, kind, where),
        status=status,
        retryable=status in RETRYABLE_STATUS if kind is ServerError else None,
        retry_after=_retry_after(headers) or _retry_info(reported.details),
        vendor_code=reported.code if reported.code is not None else reported.type or None,
        request_id=request_id,
    )
    if says is not None and kind not in (AuthenticationError, QuotaError):
        error.retryable = error._server_allows = says
    return error


def _payload_in_events(body: bytes) -> Any:
    """The error in a body that is an event stream, or _NO_JSON"""
    with contextlib.suppress(InvalidStreamError):
        for event in _decoded([body], _AnswerDecoder()):
            payload = _json(event.data)
            if payload is _NO_JSON and event.event == "error":
                payload = {"error": event.data}
            if _reported_error(payload, event.event == "error") is not None:
                return payload
    return _NO_JSON


def _retry_info(details: Any) -> float | None:
    """Gemini's RetryInfo: ``{"@type": ".../google.rpc.RetryInfo", "retryDelay": "48s"}``"""
    for detail in _list(details):
        delay = _text(_dict(detail).get("retryDelay"))
        if delay.endswith("s"):
            return _number(delay[:-1])
    return None


def _status_message(
    status: int, headers: Mapping[str, str], body: bytes, reported: _Reported, kind: type[SheepError], where: str
) -> str:
    message = reported.message
    if 300 <= status < 400:
        message = f"a redirect to {_public_url(headers.get('location') or '')}, which is not followed"
    elif not message:
        content_type = headers.get("content-type") or "no Content-Type"
        message = f"{content_type} with {_excerpt(body)}" if body.strip() else "no message"
    advice = _ADVICE.get(kind) if kind is not ServerError or status in RETRYABLE_STATUS else ""
    if status == 403 and kind is InvalidRequestError:
        country = "the provider does not serve this country or region"
        firewall = "a firewall before the provider refused the request, not the key"
        advice = country if _is_of_country(reported) else firewall
    elif not advice and (status == 404 or not reported.message):
        advice = f"is {where or 'the base URL'} the right address? Pass the base_url that the provider documents"
    return f"{status} from {where or 'the server'}: {message.strip()}" + (f" ({advice})" if advice else "")


def _public_url(url: str) -> str:
    """A URL without its secrets: user, password, query and fragment"""
    parts = _split_url(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")) or "?"


def _url_without_keys(url: str) -> str:
    """A URL that distinguishes servers, without its secrets: user, password and keys in the query"""
    query = [field for field in _split_url(url).query.split("&") if not re.search(_KEY_HEADER, field.partition("=")[0])]
    return "?".join(filter(None, (_public_url(url), "&".join(query))))


# ============================================================================================================
# 6. Tokens and cost: usage checked, and turned into money. May use: Dialects and above
# ============================================================================================================


#: the tokenizers of OpenAI's models by prefixes of their names; the first match counts
_ENCODINGS = (
    *((name, "o200k_base") for name in ("gpt-4o", "gpt-4.1", "gpt-4.5", "gpt-5", "chatgpt-4o", "o1", "o3", "o4")),
    *((name, "cl100k_base") for name in ("gpt-4", "gpt-3.5")),
)
#: the tokenizer that estimates for all other models
_USUAL_ENCODING = "o200k_base"


def count_tokens(
    content: str | Sequence[Mapping[str, Any]],
    model: str | None = None,
    mode: str = "strict",
    *,
    chars_per_token: float | None = None,
    method: str = "script",
) -> int | None:
    """The number of tokens of a text, or of a list of messages

    ``strict`` counts by the tokenizer of OpenAI's ``model``, by default o200k_base; MissingExtraError where none is
    installed (the extra ``tokens``), or none is known for the model: no other vendor publishes one. ``relaxed``
    estimates without any package: by scripts, within 15 % of o200k_base on average for English, Vietnamese, Chinese
    and code; by ``method="words"``; or by ``chars_per_token``. ``none`` returns None. For messages, roles count as with
    OpenAI, and of their content only the text.
    """
    _check_choice("mode", mode, ("strict", "relaxed", "none"))
    _check_choice("method", method, ("script", "words"))
    if mode == "none":
        return None
    if mode == "strict":
        encoding = _USUAL_ENCODING if model is None else _encoding_of(model)
        if encoding is None:
            raise MissingExtraError(f"no tokenizer is known for {model}: mode='relaxed' estimates its tokens")
        count = _tokenizer(encoding)
    else:
        count = functools.partial(_estimate, chars_per_token=chars_per_token, method=method)
    return _counted(content, count)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is one of {', '.join(choices)}, got {value!r}")


def _counted(content: str | Sequence[Mapping[str, Any]], count: Callable[[str], int]) -> int:
    if isinstance(content, str):
        return count(content)
    # https://github.com/openai/openai-cookbook/blob/main/examples/How_to_count_tokens_with_tiktoken.ipynb
    total = 3
    for message in content:
        texts = [_text(message.get("role")), _content(message.get("content"))[0], _text(message.get("name"))]
        total += 3 + sum(map(count, texts)) + bool(texts[2])
    return total


def _encoding_of(model: str) -> str | None:
    name = re.sub("^ft:", "", model.rpartition("/")[2])
    return next((encoding for start, encoding in _ENCODINGS if name.startswith(start)), None)


@functools.lru_cache(None)
def _tokenizer(encoding: str) -> Callable[[str], int]:
    """A function that counts tokens exactly; MissingExtraError where no tokenizer is installed"""
    try:
        import bpe_openai  # type: ignore[import-not-found,unused-ignore]  # an extra
    except ImportError:
        pass
    else:
        ids = bpe_openai.get_encoding(encoding).encode_ordinary
        return lambda text: len(ids(_without_surrogates(text)))
    try:
        import tiktoken  # type: ignore[import-not-found,unused-ignore]

        encode = tiktoken.get_encoding(encoding).encode  # downloaded at its first use
    except (ImportError, OSError) as error:
        raise MissingExtraError(
            "no tokenizer is installed: pip install 'sheepsse[tokens]', or mode='relaxed' estimates"
        ) from error
    return lambda text: len(encode(_without_surrogates(text), disallowed_special=()))


def _estimate(text: str, chars_per_token: float | None = None, method: str = "script") -> int:
    """An estimate of tokens without a tokenizer, rounded up"""
    if chars_per_token is not None:
        if not chars_per_token > 0:
            raise ValueError(f"chars_per_token is above 0, got {chars_per_token!r}")
        return math.ceil(len(text) / chars_per_token)
    if method == "words":
        return math.ceil(len(text.split()) * 4 / 3)
    return round(sum(_weight(match) for match in re.finditer(_RUNS, text)))


#: runs of characters that tokenizers do not cut, or cut evenly; words with accents are cut into more tokens
_RUNS = (
    "(?P<word>(?:[A-Z]?[a-z]+|[A-Z]+)(?![a-z\u00c0-\u024f\u1e00-\u1eff]))"
    "|(?P<accented>[A-Za-z\u00c0-\u024f\u1e00-\u1eff]+)"
    "|(?P<ideograph>[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff])"
    r"|(?P<letter>[^\W\d_])|(?P<digits>\d{1,3})|(?P<space>\s{2,}|\n)|(?P<sign>[^\w\s]+|_+)"
)
#: tokens of such a run: of the run itself, and of each character beyond a number of them; fitted by least squares to
#: o200k_base, over texts and translations of Python and Django
_WEIGHTS = {
    "word": (1.0, 0.1, 6),
    "accented": (0.23, 0.33, 0),
    "ideograph": (0.75, 0.0, 0),
    "letter": (0.35, 0.0, 0),
    "digits": (1.4, 0.0, 0),
    "space": (1.2, 0.0, 0),
    "sign": (0.67, 0.25, 1),
}


def _weight(run: re.Match[str]) -> float:
    each, more, beyond = _WEIGHTS[run.lastgroup or ""]
    return each + more * max(0, run.end() - run.start() - beyond)


class AlignmentReport(NamedTuple):
    """The counts of a TokenAlignment for a stream so far

    input_tokens, output_tokens: None where they are not counted
    elapsed: seconds since the stream began
    source: local or estimate, as Usage.source
    """

    input_tokens: int | None
    output_tokens: int | None
    chunks: int
    elapsed: float
    source: str


class TokenAlignment:
    """Compares the tokens that sheepsse counts with those of the provider, for ``alignment=`` of a stream

    ``strict`` counts by the tokenizer of the model, as count_tokens does, or estimates by o200k_base where that is not
    public. ``relaxed`` estimates. ``batch`` is strict, or relaxed without a tokenizer; it counts every
    ``batch_size`` chunks while the stream runs, and calls ``on_report`` with an AlignmentReport at most every
    ``report_interval`` seconds. ``none`` counts nothing. The output is the text, and the reasoning where the provider
    does not count that apart; with tool calls, a refusal or several choices the counts cannot be compared. The input
    is counted but not compared: how a vendor renders messages, tools and images is not public.

    ``usage`` then holds the result, ``alignment``, and both counts. Its counts are those of the provider, if any; a
    stream that was cut before its usage gets those of sheepsse. A difference above ``tolerance``, a share (by default
    0.001, and 0.15 for an estimate), is logged as a warning. ``on_mismatch="adjust"`` uses the count of the provider
    and logs that; ``"raise"`` raises TokenMismatchError at the end. ``log=False`` logs nothing. May be shared between
    threads and streams.
    """

    def __init__(
        self,
        mode: str = "strict",
        count_input: bool = True,
        count_output: bool = True,
        on_mismatch: str = "log",
        tolerance: float | None = None,
        batch_size: int = 100,
        on_report: Callable[[AlignmentReport], object] | None = None,
        report_interval: float = 1.0,
        *,
        chars_per_token: float | None = None,
        method: str = "script",
        log: bool = True,
    ) -> None:
        _check_choice("mode", mode, ("strict", "relaxed", "batch", "none"))
        _check_choice("on_mismatch", on_mismatch, ("log", "adjust", "raise"))
        _check_choice("method", method, ("script", "words"))
        if batch_size < 1:
            raise ValueError(f"batch_size is 1 or more, got {batch_size!r}")
        self.mode, self.count_input, self.count_output = mode, count_input, count_output
        self.on_mismatch, self.tolerance, self.batch_size = on_mismatch, tolerance, batch_size
        self.on_report, self.report_interval = on_report, report_interval
        self.chars_per_token, self.method, self.log = chars_per_token, method, log

    def _counter(self, model: str) -> tuple[Callable[[str], int], str]:
        """The function that counts, and ``local`` for an exact count or ``estimate``"""
        estimate = functools.partial(_estimate, chars_per_token=self.chars_per_token, method=self.method)
        if self.mode == "relaxed":
            return estimate, "estimate"
        own = _encoding_of(model)
        try:
            return _tokenizer(own or _USUAL_ENCODING), "local" if own else "estimate"
        except MissingExtraError:
            if self.mode == "strict":
                raise
            return estimate, "estimate"


class _Alignment:
    """The state of a TokenAlignment for one stream"""

    def __init__(self, terms: TokenAlignment, messages: Sequence[Any], model: str) -> None:
        self._terms, self._messages = terms, messages
        self._count, self.source = terms._counter(model)
        self._input: int | None = None
        self._chunks = self._chars = self._output = 0
        self._reported_at = self._began_at = time.monotonic()

    def note(self, answer: _Answer, chunks: int) -> None:
        """Counts new text in mode batch, and reports it; a token across two batches counts as two"""
        terms = self._terms
        if terms.mode != "batch" or chunks < self._chunks + terms.batch_size:
            return
        text = _all_text(answer)
        self._output += self._count(text[self._chars :]) if terms.count_output else 0
        self._chunks, self._chars = chunks, len(text)
        now = time.monotonic()
        if terms.on_report is not None and now - self._reported_at >= terms.report_interval:
            self._reported_at = now
            output = self._output if terms.count_output else None
            terms.on_report(AlignmentReport(self._counted_input(), output, chunks, now - self._began_at, self.source))

    def _counted_input(self) -> int | None:
        if self._terms.count_input and self._input is None:
            self._input = _counted(self._messages, self._count)
        return self._input

    def aligned(self, answer: _Answer, choices: int = 1, cut: bool = False) -> Usage:
        """The usage of an answer with the result; TokenMismatchError for a mismatch with ``on_mismatch="raise"``

        ``cut`` says that the stream was cut: the usage of the provider does not count the text that was received then.
        """
        terms, provided = self._terms, None if cut else answer.usage
        # reasoning that the provider counts apart may be hidden, or a summary
        reasoning = 0 if provided is None else provided.reasoning_tokens
        text = str(answer.text) if reasoning else _all_text(answer)
        local = self._counted_input(), self._count(text) if terms.count_output else None
        if provided is None:
            usage = Usage(local[0] or 0, local[1] or 0, (local[0] or 0) + (local[1] or 0))
            source = "estimate" if None in local else self.source  # without a count there is no price
            return usage._replace(source=source, alignment="unverified", local=local, aligned_at=time.time())
        usage = provided._replace(local=local, aligned_at=time.time(), alignment="unverified")
        if provided.source == "provider":
            usage = usage._replace(provider=(provided.input_tokens, provided.output_tokens))
        counted = local[1]
        if counted is None or usage.provider is None or choices != 1 or answer.tool_calls or answer.refusal:
            return usage
        expected = provided.output_tokens - reasoning
        tolerance = terms.tolerance
        if tolerance is None:
            tolerance = 0.001 if self.source == "local" else 0.15
        if abs(counted - expected) <= max(1, tolerance * expected):
            return usage._replace(alignment="verified")
        message = f"counted {counted} tokens of output ({self.source}) where the provider says {expected}"
        if terms.on_mismatch == "raise":
            raise TokenMismatchError(message)
        if terms.log:
            adjusted = terms.on_mismatch == "adjust"
            _log.log(logging.INFO if adjusted else logging.WARNING, "%s%s", message, ", which is taken" * adjusted)
        return usage._replace(alignment="mismatch")


def _all_text(answer: _Answer) -> str:
    return f"{answer.reasoning}{answer.text}"


class Price(NamedTuple):
    """The prices of a model for a million tokens, in one currency: numbers, or str for exact decimals

    cache_read, cache_write: of input read from the cache, or written to it; None means the price of other input
    """

    input: Decimal | float | str
    output: Decimal | float | str
    cache_read: Decimal | float | str | None = None
    cache_write: Decimal | float | str | None = None


def cost(
    usage: Usage | None, price: Price | None = None, *, model: str | None = None, provider: str | None = None
) -> Decimal | None:
    """The exact cost of a request; None where it is unknown, which is logged

    The cost on the wire counts first, where ``usage`` has one, then ``price``. Without a price, the cost is in US
    dollars, by the list prices of the package genai-prices (the extra ``prices``) for ``model`` at ``provider``, a name
    in PROVIDERS; HolySheep and Ollama have none. Nothing is ever guessed: estimated tokens have the cost None.
    """
    if usage is None or usage.cost is not None:
        return None if usage is None else usage.cost
    if usage.source == "estimate":
        _log.info("the tokens are an estimate, which has no price")
        return None
    if price is None:
        try:
            return _list_price(usage, model, provider)
        except (LookupError, ValueError) as error:
            _log.info("no price is known for %s at %s: %s", model or "no model", provider or "its provider", error)
            return None
    cached = usage.cache_read_tokens, usage.cache_write_tokens
    counted = (
        (usage.input_tokens - sum(cached), price.input),
        (cached[0], price.input if price.cache_read is None else price.cache_read),
        (cached[1], price.input if price.cache_write is None else price.cache_write),
        (usage.output_tokens, price.output),
    )
    return _spent(*counted)


def _exact(number: Decimal | float | str) -> Decimal:
    from decimal import Decimal

    try:
        exact = Decimal(str(number))
    except ArithmeticError:
        exact = Decimal("nan")
    if not exact.is_finite():
        raise ValueError(f"expected a number, got {number!r}")
    return exact


def _spent(*counted: tuple[int | Decimal, Decimal | float | str]) -> Decimal:
    """The exact cost of tokens at a price for a million"""
    from decimal import localcontext

    with localcontext() as context:
        context.prec = 60
        return sum((count * _exact(price) for count, price in counted), _exact(0)).scaleb(-6)


#: the names in genai-prices of providers that set prices; all others are resellers, or free
_PRICED_BY = {
    "openai": "openai",
    "openai-responses": "openai",
    "deepseek": "deepseek",
    "anthropic": "anthropic",
    "gemini": "google",
    "openrouter": "openrouter",
    "mistral": "mistral",
}


def _list_price(usage: Usage, model: str | None, provider: str | None) -> Decimal:
    """The cost by the list prices; LookupError where there are none"""
    seller = _PRICED_BY.get(provider or "")
    if not model or not seller:
        raise LookupError("pass a price, or prices= to the Client")
    try:
        import genai_prices  # type: ignore[import-not-found,unused-ignore]  # an extra
    except ImportError as error:
        raise LookupError("pip install 'sheepsse[prices]' brings list prices") from error
    counts = genai_prices.Usage(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cache_read_tokens=usage.cache_read_tokens or None,
        cache_write_tokens=usage.cache_write_tokens or None,
    )
    total: Decimal = genai_prices.calc_price(counts, model_ref=model, provider_id=seller).total_price
    return total


class CostMix(NamedTuple):
    """The cost of a number of tokens by one mix of models; all amounts are None where a price is unknown

    parts: the cost by model
    saving, percent, yearly_saving: compared with the first mix: in money, in per cent, and in a year of twelve months
    """

    name: str
    parts: Mapping[str, Decimal | None]
    total: Decimal | None
    saving: Decimal | None
    percent: Decimal | None
    yearly_saving: Decimal | None


def compare_costs(
    input_tokens: int,
    output_tokens: int,
    mixes: Mapping[str, str | Mapping[str, float]],
    prices: Mapping[str, Price],
) -> list[CostMix]:
    """The cost of the tokens of a month by each mix, and the saving of each compared with the first

        compare_costs(10_000_000, 50_000_000, {"now": "large", "mixed": {"small": 0.6, "large": 0.4}}, prices)

    A mix is a model, or the shares of several models, which apply to input and output alike; ValueError unless the
    shares add up to 1. The amounts of a mix with an unknown price are None, not 0.
    """
    results: list[CostMix] = []
    for name, mix in mixes.items():
        shares = {model: _exact(share) for model, share in ({mix: 1} if isinstance(mix, str) else mix).items()}
        if abs(float(sum(shares.values())) - 1) > 1e-6 or any(share < 0 for share in shares.values()):
            raise ValueError(
                f"the shares of the mix {name!r} are not parts of 1: {', '.join(map(str, shares.values()))}"
            )
        parts = {
            model: _share_cost(share, input_tokens, output_tokens, prices.get(model)) for model, share in shares.items()
        }
        total = None if None in parts.values() else sum(filter(None, parts.values()), _exact(0))
        first = results[0].total if results else total
        saving = None if total is None or first is None else first - total
        percent = None if saving is None or not first else saving / first * 100
        results.append(CostMix(name, parts, total, saving, percent, None if saving is None else saving * 12))
    return results


def _share_cost(share: Decimal, input_tokens: int, output_tokens: int, price: Price | None) -> Decimal | None:
    if price is None:
        return None
    return _spent((share * input_tokens, price.input), (share * output_tokens, price.output))


# ============================================================================================================
# 7. Policies: when to wait, when to refuse, when to give up. May use: Errors and above
# ============================================================================================================


#: objects with state that a forked process must not share: locks, connections, slots
_of_process: weakref.WeakSet[Any] = weakref.WeakSet()


def _forget_parent() -> None:
    """In a forked process: a shared connection would mix answers, and nobody would release a lock or a slot"""
    for each in list(_of_process):
        each._begin_process()


with contextlib.suppress(AttributeError):  # Windows has no forks
    os.register_at_fork(after_in_child=_forget_parent)


def _is_hopeless(error: object) -> bool:
    """Whether a connection will fail again: a bad certificate, or a missing file of certificates"""
    return re.search("certificate|hostname .* doesn't match", str(error), re.IGNORECASE) is not None


#: bytes of an error body that are read
_ERROR_BODY = 64 * 1024


def _read_out(response: Any) -> None:
    """Frees the connection of a failed response: reads a short body, or closes the connection

    urllib3 would read the whole body before the next request, whatever its size.
    """
    with contextlib.suppress(urllib3.exceptions.HTTPError, OSError):
        body = response.read(_ERROR_BODY, decode_content=False) or b""  # None of urllib3 1.26, where all is read
        if len(body) < _ERROR_BODY:
            return
    response.close()


class Retry(_Urllib3Retry):
    """When a failed request is sent again, and after how long; a ``urllib3.util.Retry``, immutable as that is

    At most ``1 + total`` requests are sent, POST included; each may be billed. A request is sent again after a failed
    connection, a read time-out, and after ``statuses``; ``x-should-retry`` of a response overrides its status. After
    quota, authentication and request errors no request is sent again. The server sets the wait, in seconds, by
    ``retry-after-ms`` or ``Retry-After``. A wait longer than ``max_retry_after`` is not slept: the error is raised at
    once, with its ``retry_after``. Otherwise the wait is ``base_delay * multiplier**n`` up to ``max_delay``, times a
    random 0.5 to 1 with ``jitter``. A 429 that names no wait waits at least ``rate_limit_delay`` times the attempt.

    ``should_retry(error, attempt)`` is called for each failure that may be retried, and returns False, True, or the
    seconds to wait. ``on_retry(error, attempt, delay)`` is called before a wait, ``on_give_up(error, attempt)`` when a
    failure is final, ``on_reconnect(attempt, latency)`` when a lost stream is connected again. Attempts count from 1.
    ``session()`` waits by ``sleep`` (``time.sleep`` by default); a Stream waits in a way that ``cancel()`` can end,
    unless ``sleep`` is passed. May be shared between threads.
    """

    def __init__(
        self,
        total: int = 5,
        *,
        base_delay: float = 0.5,
        multiplier: float = 2,
        max_delay: float = 30,
        jitter: bool = True,
        rate_limit_delay: float = 5,
        max_retry_after: float = 120,
        statuses: Iterable[int] = RETRYABLE_STATUS,
        should_retry: Callable[[SheepError, int], bool | float] | None = None,
        on_retry: Callable[[SheepError, int, float], object] | None = None,
        on_reconnect: Callable[[int, float], object] | None = None,
        on_give_up: Callable[[SheepError, int], object] | None = None,
        sleep: Callable[[float], object] | None = None,
        history: Sequence[RequestHistory] = (),
        delay: float = 0.0,
    ) -> None:
        if total < 0 or min(base_delay, multiplier, max_delay, rate_limit_delay, max_retry_after) < 0:
            raise ValueError("Retry takes no negative numbers; total=0 switches it off")
        super().__init__(
            total=int(total),
            allowed_methods=None,
            status_forcelist=frozenset(statuses),
            raise_on_status=False,
            history=tuple(history),
        )
        self.total: int = int(total)
        self.base_delay = base_delay
        self.multiplier = multiplier
        self.max_delay = max_delay
        self.jitter = jitter
        self.rate_limit_delay = rate_limit_delay
        self.max_retry_after = max_retry_after
        self.statuses = frozenset(statuses)
        self.should_retry = should_retry
        self.on_retry = on_retry
        self.on_reconnect = on_reconnect
        self.on_give_up = on_give_up
        self.sleep_function = sleep
        #: seconds to wait before the next request, set by increment()
        self.delay = delay

    def new(self, **changes: Any) -> Retry:
        """The same policy with ``changes``"""
        names = (
            "total base_delay multiplier max_delay jitter rate_limit_delay max_retry_after statuses should_retry "
            "on_retry on_reconnect on_give_up history delay"
        )
        options = {name: getattr(self, name) for name in names.split()}
        return type(self)(**{**options, "sleep": self.sleep_function, **changes})

    def wait(self, error: SheepError, attempt: int) -> float | None:
        """Seconds to wait after attempt number ``attempt`` failed with ``error``, or None to give up

        Does not send, sleep or change anything.
        """
        if attempt > self.total + len(self.history) or not self._may_retry(error):
            return None
        verdict: bool | float | None = self.should_retry(error, attempt) if self.should_retry else True
        if verdict is None or verdict is False:
            return None
        if verdict is not True:
            return max(0.0, float(verdict))
        if error.retry_after:
            return error.retry_after if error.retry_after <= self.max_retry_after else None
        delay = self.backoff(attempt)
        if isinstance(error, RateLimitError):
            delay = max(delay, self.rate_limit_delay * attempt)
        return delay

    def _may_retry(self, error: SheepError) -> bool:
        if isinstance(error, (QuotaError, AuthenticationError)):
            return False
        if error._server_allows is not None:
            return error._server_allows
        return error.retryable if error.status is None else error.status in self.statuses

    def backoff(self, attempt: int) -> float:
        """Seconds to wait after attempt number ``attempt`` where the server names no wait"""
        try:
            delay = min(self.base_delay * self.multiplier ** (attempt - 1), self.max_delay)
        except OverflowError:
            delay = self.max_delay
        return delay * random.uniform(0.5, 1.0) if self.jitter else delay

    # What urllib3 calls, for session()

    @classmethod
    def from_int(cls, retries: Any, redirect: Any = True, default: Any = None) -> Any:
        """A policy from a number of retries"""
        retries = default if retries is None else retries
        return retries if isinstance(retries, _Urllib3Retry) else cls(5 if retries is None else int(retries))

    def is_retry(self, method: str, status_code: int, has_retry_after: bool = False) -> bool:
        return status_code >= 400  # increment() decides: it sees the headers

    def increment(
        self,
        method: str | None = None,
        url: str | None = None,
        response: Any = None,
        error: Exception | None = None,
        _pool: Any = None,
        _stacktrace: Any = None,
    ) -> Retry:
        """The policy for the next request, for urllib3; MaxRetryError where no request may follow"""
        attempt = len(self.history) + 1
        status = response.status if response is not None else None
        failure = _status_error(status, response.headers) if status else ConnectError(str(error))
        if error is not None:
            failure.retryable = not _is_hopeless(error)
        if response is not None and response.get_redirect_location():
            delay = 0.0 if self.total else None  # a PoolManager follows redirects this way
        else:
            delay = self._after(failure, attempt)
        if delay is None:
            reason = error or urllib3.exceptions.ResponseError(f"{status} is not tried again")
            raise urllib3.exceptions.MaxRetryError(_pool, url or "", reason) from error
        if response is not None:
            _read_out(response)
        history = (*self.history, RequestHistory(method, url, error, status, None))
        return self.new(total=self.total - 1, history=history, delay=delay)

    def _after(self, failure: SheepError, attempt: int) -> float | None:
        """The wait after a failure, which is reported to the callbacks"""
        delay = self.wait(failure, attempt)
        if delay is None and self.on_give_up:
            self.on_give_up(failure, attempt)
        if delay is not None and self.on_retry:
            self.on_retry(failure, attempt, delay)
        return delay

    def sleep(self, response: Any = None) -> None:
        if self.delay > 0:
            (self.sleep_function or time.sleep)(self.delay)


class TokenBucket:
    """Lets ``rate`` tokens a second through, and at most ``capacity`` at once; may be shared between threads

    In any t seconds, at most ``rate * t + capacity`` tokens pass. Waiting callers are served first come, first served.
    ``clock`` returns seconds and must never go back; ``sleep`` takes seconds.
    """

    #: the shortest sleep in seconds: a shorter one might not move the clock
    _LEAST = 1e-6

    def __init__(
        self,
        rate: float,
        capacity: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        if not (rate > 0 and capacity > 0):
            raise ValueError(f"a TokenBucket has a rate and a capacity above 0, got {rate!r} and {capacity!r}")
        self.rate, self.capacity = rate, capacity
        self._clock, self._sleep = clock, sleep
        #: the tokens that are there; below 0, callers wait for as many
        self._tokens: float = capacity
        self._filled_at = clock()
        self._begin_process()
        _of_process.add(self)

    def _begin_process(self) -> None:
        self._lock = threading.Lock()
        self._tokens = max(self._tokens, 0.0)  # the callers that wait are the parent's

    def try_acquire(self, n: float = 1) -> bool:
        """Takes ``n`` tokens if there are as many and no caller waits; ValueError for ``n`` above the capacity"""
        return self._reserve(n, 0) is not None

    def acquire(self, n: float = 1, timeout: float | None = None) -> bool:
        """Takes ``n`` tokens, and waits for them; ValueError for ``n`` above the capacity

        Returns False, and takes none, as soon as it is clear that ``timeout`` seconds do not suffice.
        """
        delay = self._reserve(n, timeout)
        if delay is None:
            return False
        ready = self._clock() + delay
        try:
            while delay > 0:
                self._sleep(max(delay, self._LEAST))
                delay = ready - self._clock()
        except BaseException:
            with self._lock:
                self._tokens += n
            raise
        return True

    def _reserve(self, n: float, timeout: float | None) -> float | None:
        """Takes tokens that are there in so many seconds; None, and takes none, where ``timeout`` is shorter"""
        if not 0 < n <= self.capacity:
            raise ValueError(f"a TokenBucket of capacity {self.capacity} gives more than 0 and up to that, not {n!r}")
        with self._lock:
            now = self._clock()
            self._tokens = min(self.capacity, self._tokens + (now - self._filled_at) * self.rate)
            self._filled_at = now
            delay = max(0.0, (n - self._tokens) / self.rate)
            if timeout is not None and delay > timeout:
                return None
            self._tokens -= n
            return delay


#: the longest time in seconds that a response may hold requests back, without a Retry
_LONGEST_HOLD = 120.0


class LimiterStats(NamedTuple):
    """The callers of a Limiter by what became of them: each counts once

    active: callers that hold a slot
    queued: callers that wait for one
    served: callers that held one and gave it back
    rejected: callers that found the queue full
    timed_out: callers whose wait was too long
    cancelled: callers that went away while waiting
    position: the place of a user's first waiter in the queue, which begins with 1; None where none waits
    """

    active: int
    queued: int
    served: int
    rejected: int
    timed_out: int
    cancelled: int
    position: int | None = None


class Slot:
    """A slot of a Limiter, given back exactly once: by ``release()``, on leaving ``with``, or when it is collected"""

    def __init__(self, limiter: Limiter, user: Any, since: float) -> None:
        self._held = [(user, since)]
        self._limiter = limiter
        self._process = os.getpid()

    def release(self) -> None:
        """Gives it back; from any thread, and again"""
        try:
            held = self._held.pop()  # one alone gets it
        except IndexError:
            return
        if self._process == os.getpid():  # a fork holds none of its parent's
            self._limiter._release(*held)

    def __enter__(self) -> Slot:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


class _Bell:
    """Wakes the thread that waits for it; may be rung by a destructor or a signal handler during that wait

    An Event could lock its own thread there.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def ring(self) -> None:
        """Ends the wait, or the next one"""
        with contextlib.suppress(RuntimeError):  # it rings already
            self._lock.release()

    def wait(self, seconds: float | None = None) -> None:
        """Waits until it rings, for ``seconds`` at most"""
        self._lock.acquire(timeout=-1 if seconds is None else min(max(seconds, 0.0), threading.TIMEOUT_MAX))

    def silence(self) -> None:
        """Forgets a ring"""
        self._lock.acquire(blocking=False)


class _Waiter:
    """A caller that waits for a slot; waiters are sorted by priority, then by arrival"""

    def __init__(self, order: tuple[float, int], user: Any, origin: str, bell: _Bell, is_reported: bool) -> None:
        self.order, self.user, self.origin, self.bell = order, user, origin, bell
        #: whether its position is reported
        self.is_reported = is_reported
        #: whether its thread reports the position: it takes no slot meanwhile, and others may
        self.is_away = False

    def __lt__(self, other: _Waiter) -> bool:
        return self.order < other.order


class Limiter:
    """At most ``max_concurrent`` streams at once, of one user ``max_per_user``; may be shared between threads

        with limiter.acquire(priority=1, user="ann"):
            ...

    Up to ``max_queue`` others wait: the highest priority first, equals in order of arrival. They wait ``queue_timeout``
    seconds at most; None is no limit, and "auto" is 30, or two periods where there is a ``rate`` and these are longer.
    A batch waits without limit, unless a number is passed. No more than ``rate`` begin in any ``period`` seconds, and
    of these no more than ``burst`` at once: 1 spaces them evenly, None is ``rate``. As ``limiter=`` of a Client or a
    call it gives each stream a slot, from before the first request until the stream is at its end, whatever that is;
    the rate limit headers of a provider make the requests to it wait. ``clock`` gives seconds and must never go back;
    ``sleep`` waits for some, if it is given; else those who wait are woken.
    """

    def __init__(
        self,
        max_concurrent: int = 10,
        max_queue: int = 100,
        rate: int | None = None,
        period: float = 60,
        queue_timeout: float | str | None = "auto",
        max_per_user: int | None = None,
        *,
        burst: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        if isinstance(queue_timeout, str) and queue_timeout != "auto":
            raise TypeError(f"queue_timeout is a number of seconds, None or 'auto', got {queue_timeout!r}")
        if max_concurrent < 1 or max_queue < 0 or period <= 0:
            raise ValueError("a Limiter has max_concurrent of 1 or more, max_queue of 0 or more, period above 0")
        if any(limit is not None and limit < 1 for limit in (rate, burst, max_per_user)):
            raise ValueError("rate, burst and max_per_user of a Limiter are 1 or more, or None")
        self.max_concurrent, self.max_queue, self.max_per_user = max_concurrent, max_queue, max_per_user
        self.rate, self.period, self.burst = rate, period, burst
        self._is_patient = queue_timeout == "auto"  # whether a batch waits without limit
        self.queue_timeout: float | None = (
            max(30.0, 2 * period if rate else 0.0) if isinstance(queue_timeout, str) else queue_timeout
        )
        self._clock, self._sleep = clock, sleep
        self._starts: collections.deque[float] = collections.deque(maxlen=rate)
        self._held_until: dict[str, float] = {}  # for each provider, by its rate limit headers
        self._number = self._served = self._rejected = self._timed_out = self._cancelled = 0
        self._holding = 0.0  # seconds for which a slot is held, of late
        self._begin_process()
        _of_process.add(self)

    def _begin_process(self) -> None:
        self._lock = threading.Lock()
        self._queue: list[_Waiter] = []  # the next one first
        # slots given back, also during a garbage collection: the user, and the seconds for which each was held
        self._returned: collections.deque[tuple[Any, float]] = collections.deque()
        self._active = 0
        self._users: dict[Any, int] = {}  # how many slots each holds

    def acquire(
        self, priority: float = 0, user: Any = None, *, on_position: Callable[[int], object] | None = None
    ) -> Slot:
        """A slot, waited for if it must be; QueueFullError or QueueTimeoutError where there is none

        ``on_position`` is called with the place in the queue, 1 for the next one, at first and when the place changes.
        ``max_per_user`` counts the slots of a ``user``; None is nobody in particular.
        """
        return self._acquire(priority, user, on_position)

    def bind(
        self, priority: float = 0, user: Any = None, on_position: Callable[[int], object] | None = None
    ) -> _BoundLimiter:
        """This limiter with a priority and a user, for ``limiter=`` of one stream; ``on_position`` gets its position"""
        return _BoundLimiter(self, priority, user, on_position)

    def stats(self, user: Any = None) -> LimiterStats:
        """The counts so far; with a ``user``, ``active``, ``queued`` and ``position`` are those of the user"""
        with self._settled():
            places = [place for place, waiter in enumerate(self._queue, 1) if user is None or waiter.user == user]
            return LimiterStats(
                active=self._active if user is None else self._users.get(user, 0),
                queued=len(places),
                served=self._served,
                rejected=self._rejected,
                timed_out=self._timed_out,
                cancelled=self._cancelled,
                position=None if user is None or not places else places[0],
            )

    def apply_headers(
        self, headers: Mapping[str, str], status: int = 200, *, origin: str = "", longest: float = _LONGEST_HOLD
    ) -> None:
        """Holds requests to ``origin`` back as long as its response demands, at most ``longest`` seconds

        The response demands this by ``Retry-After`` and ``retry-after-ms`` with a 429 or 503, and by the reset time of
        ``x-ratelimit-*`` and ``anthropic-ratelimit-*`` where nothing remains:
        https://platform.openai.com/docs/guides/rate-limits, https://docs.anthropic.com/en/api/rate-limits
        """
        headers = requests.structures.CaseInsensitiveDict(headers)
        delay = max(_until_reset(headers), (_retry_after(headers) or 0.0) if status in (429, 503) else 0.0)
        with self._settled():
            now = self._clock()
            held = {each: until for each, until in self._held_until.items() if until > now}
            if delay:
                held[origin] = max(held.get(origin, now), now + min(delay, longest))
            self._held_until = held
            self._ring()  # a waiter for another provider may be the next one now

    def _acquire(
        self,
        priority: float,
        user: Any,
        on_position: Callable[[int], object] | None = None,
        timeout: float | None = None,
        bell: _Bell | None = None,
        check: Callable[[], object] = bool,
        origin: str = "",
        is_batch: bool = False,
    ) -> Slot:
        """``bell`` wakes the waiting caller; then ``check()`` raises if the wait is to end"""
        hash(user)  # an unhashable user is refused here, not while others wait
        own_limit = None if is_batch and self._is_patient else self.queue_timeout
        limits = [limit for limit in (timeout, own_limit) if limit is not None]
        until = self._clock() + min(limits) if limits else None
        bell = _Bell() if bell is None else bell
        with self._settled():
            self._number += 1
            waiter = _Waiter((-priority, self._number), user, origin, bell, on_position is not None)
            bisect.insort(self._queue, waiter)
        slot, place = None, 0
        try:
            while slot is None:
                with self._settled():
                    slot, before = self._taken(waiter), place
                    if slot is None:
                        place = 1 + self._queue.index(waiter)
                        pause = self._pause(waiter, place, until, is_new=before == 0)
                        waiter.is_away = on_position is not None and place != before
                        if waiter.is_away:
                            self._ring()
                if slot is None and on_position is not None and waiter.is_away:
                    on_position(place)
                    waiter.is_away = False
                elif slot is None:
                    self._wait(bell, pause)
                check()
            return slot
        except BaseException:
            if slot is not None:
                slot.release()
            self._leave(waiter)
            raise
        finally:
            bell.silence()  # it may serve for more than this wait

    def _taken(self, waiter: _Waiter) -> Slot | None:
        """A slot, if one is free and this waiter is the next"""
        now = self._clock()
        if self._active >= self.max_concurrent or waiter is not self._next() or self._delay(now):
            return None
        self._queue.remove(waiter)
        self._active += 1
        if waiter.user is not None:
            self._users[waiter.user] = self._users.get(waiter.user, 0) + 1
        if self.rate is not None:
            self._starts.append(now)
        self._ring()
        return Slot(self, waiter.user, now)

    def _pause(self, waiter: _Waiter, place: int, until: float | None, is_new: bool) -> float | None:
        """Seconds to wait at most; QueueFullError for a new waiter without room, QueueTimeoutError after the limit"""
        now, next_one = self._clock(), self._next()
        is_ready = next_one is not None and not self._delay(now)
        free = self.max_concurrent - self._active if is_ready else 0  # slots that woken waiters are about to take
        if is_new and len(self._queue) - free > self.max_queue:
            self._queue.remove(waiter)
            self._rejected += 1
            raise QueueFullError(
                f"the queue is full: {self._active} streams are active and {len(self._queue)} wait",
                retry_after=self._guess(waiter, len(self._queue) + 1),
            )
        if until is not None and until <= now:
            self._queue.remove(waiter)
            self._timed_out += 1
            self._ring()
            if self._delay(now):
                cause = f"the rate={self.rate} in period={self.period:g} s lets no more begin: raise rate="
            else:
                cause = f"{self._active} of max_concurrent={self.max_concurrent} are active: raise max_concurrent="
            raise QueueTimeoutError(
                f"waited too long for a slot, at place {place} of the queue; {cause} or queue_timeout=, "
                "which is None for no limit",
                retry_after=self._guess(waiter, place),
            )
        if is_new:
            self._ring()
        pauses = [] if until is None else [until - now]
        held = self._hold(waiter, now)
        if held or (self._active < self.max_concurrent and waiter is next_one):
            pauses.append(max(held or self._delay(now), TokenBucket._LEAST))
        return min(pauses, default=None)

    def _wait(self, bell: _Bell, pause: float | None) -> None:
        if self._sleep is not None and pause is not None:
            self._sleep(pause)
        else:
            bell.wait(pause)

    def _leave(self, waiter: _Waiter) -> None:
        """Removes a waiter that gives up"""
        with self._settled():
            if waiter in self._queue:
                self._queue.remove(waiter)
                self._cancelled += 1
                self._ring()

    def _release(self, user: Any, since: float) -> None:
        """Releases a slot; where a thread, perhaps this one, holds the lock, that thread finishes the release"""
        self._returned.append((user, self._clock() - since))
        self._settle()

    def _settle(self) -> None:
        while self._returned and self._lock.acquire(blocking=False):
            try:
                self._count_returned()
            finally:
                self._lock.release()

    @contextlib.contextmanager
    def _settled(self) -> Iterator[None]:
        """Holds the lock, with all released slots counted"""
        try:
            with self._lock:
                self._count_returned()
                yield
        finally:
            self._settle()

    def _count_returned(self) -> None:
        if not self._returned:
            return
        while self._returned:
            user, held = self._returned.popleft()
            self._active -= 1
            self._served += 1
            self._holding += ((held - self._holding) / 4) if self._served > 1 else held
            if user is not None:
                self._users[user] -= 1
                if not self._users[user]:
                    del self._users[user]
        self._ring()

    def _next(self) -> _Waiter | None:
        """The next waiter: the first one whose user is below the limit, and whose provider is not held back"""
        limit, now = self.max_per_user, self._clock()
        for waiter in self._queue:
            is_below = limit is None or self._users.get(waiter.user, 0) < limit
            if is_below and not waiter.is_away and not self._hold(waiter, now):
                return waiter
        return None

    def _hold(self, waiter: _Waiter, now: float) -> float:
        """Seconds for which its provider is still held back"""
        return max(0.0, self._held_until.get(waiter.origin, now) - now)

    def _delay(self, now: float) -> float:
        """Seconds until the rate allows one more"""
        moments = [now]
        if self.rate is not None:
            for count in {self.rate, min(self.burst or self.rate, self.rate)}:  # which may begin at once
                if len(self._starts) >= count:
                    moments.append(self._starts[-count] + self.period * count / self.rate)
        return max(moments) - now

    def _guess(self, waiter: _Waiter, place: int) -> float:
        """Seconds until the waiter at this position may get a slot, by how long recent slots were held"""
        held, now = self._holding if self._served else 1.0, self._clock()
        return max(self._hold(waiter, now), self._delay(now), held * place / self.max_concurrent)

    def _ring(self) -> None:
        """Wakes the next waiter, and those that want their position"""
        first = self._next()
        for waiter in self._queue:
            if waiter is first or waiter.is_reported:
                waiter.bell.ring()


class _BoundLimiter(NamedTuple):
    """A Limiter with the priority and the user of one stream"""

    limiter: Limiter
    priority: float
    user: Any
    on_position: Callable[[int], object] | None = None

    def acquire(
        self, priority: float | None = None, user: Any = None, *, on_position: Callable[[int], object] | None = None
    ) -> Slot:
        """``Limiter.acquire`` with this priority and user by default"""
        priority = self.priority if priority is None else priority
        user = self.user if user is None else user
        return self.limiter.acquire(priority, user, on_position=on_position or self.on_position)

    def apply_headers(
        self, headers: Mapping[str, str], status: int = 200, *, origin: str = "", longest: float = _LONGEST_HOLD
    ) -> None:
        """``Limiter.apply_headers``"""
        self.limiter.apply_headers(headers, status, origin=origin, longest=longest)

    def stats(self) -> LimiterStats:
        """``Limiter.stats`` of this user"""
        return self.limiter.stats(self.user)


#: the names of limits in rate limit headers
_LIMITED = ("requests", "tokens", "input-tokens", "output-tokens")


def _until_reset(headers: Mapping[str, str]) -> float:
    """Seconds until the exhausted limits in these headers reset"""
    pairs = [("x-ratelimit-remaining", "x-ratelimit-reset")]
    for name in _LIMITED:
        pairs.append((f"x-ratelimit-remaining-{name}", f"x-ratelimit-reset-{name}"))
        pairs.append((f"anthropic-ratelimit-{name}-remaining", f"anthropic-ratelimit-{name}-reset"))
    spent = [reset for remaining, reset in pairs if _number(headers.get(remaining)) == 0]
    return max((_seconds_to(headers.get(reset) or "") for reset in spent), default=0.0)


def _seconds_to(moment: str) -> float:
    """Seconds until a time of a provider: 6m0s, 120ms, RFC 3339, or a Unix time in seconds or milliseconds"""
    span = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:([\d.]+)s)?(?:([\d.]+)ms)?", moment.strip())
    if moment.strip() and span:
        hours, minutes, seconds, milliseconds = (_number(part) or 0.0 for part in span.groups())
        return hours * 3600 + minutes * 60 + seconds + milliseconds / 1000
    if re.fullmatch(r"\d{1,15}(\.\d*)?", moment.strip(), re.ASCII):
        number = float(moment)  # a Unix time is far above any span
        return number if number < 1e8 else max(0.0, number / (1000 if number > 1e11 else 1) - time.time())
    from datetime import datetime

    try:
        return max(0.0, datetime.fromisoformat(moment.strip().replace("Z", "+00:00")).timestamp() - time.time())
    except ValueError:
        return 0.0


def _unbound(limiter: Any) -> Any:
    return limiter.limiter if isinstance(limiter, _BoundLimiter) else limiter


class CircuitBreaker:
    """Refuses requests to a provider that has failed; may be shared between threads

    A closed breaker lets all streams through. After ``failure_threshold`` failures in a row the breaker opens, and
    refuses with CircuitOpenError for ``recovery_timeout`` seconds. Then it is half-open: one stream is let through,
    and closes the breaker or opens it again. A stream counts once, whatever the number of its requests. A failed
    connection, a time-out, a 5xx and a loss in mid-stream are failures; errors of the caller and a cancel count as
    neither failure nor success. ``clock`` returns seconds and must never go back.
    """

    def __init__(
        self,
        failure_threshold: int = 5,
        recovery_timeout: float = 60,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if failure_threshold < 1 or recovery_timeout < 0:
            raise ValueError("a CircuitBreaker opens after 1 failure or more, for 0 seconds or more")
        self.failure_threshold, self.recovery_timeout = failure_threshold, recovery_timeout
        self._clock = clock
        self._failures = 0
        self._opened_at: float | None = None
        self._round = 0  # a stream of an earlier round does not count
        self._begin_process()
        _of_process.add(self)

    def _begin_process(self) -> None:
        self._lock = threading.RLock()  # garbage collection may end a passage at any moment
        self._trying = False
        self._round += 1

    @property
    def state(self) -> str:
        """``closed``, ``open`` or ``half-open``"""
        with self._lock:
            if self._opened_at is None:
                return "closed"
            return "open" if self._seconds_left(self._opened_at) > 0 else "half-open"

    def enter(self) -> _Admission:
        """Lets one stream through, or raises CircuitOpenError

            with breaker.enter():
                ...

        An exception inside counts as above, for errors of requests as for those of sheepsse.
        """
        with self._lock:
            self.check()
            self._trying = self._opened_at is not None
            return _Admission(self, self._round)

    def check(self) -> None:
        """Raises CircuitOpenError where no stream is let through now"""
        with self._lock:
            if self._opened_at is None:
                return
            left = self._seconds_left(self._opened_at)
            if left > 0 or self._trying:
                raise CircuitOpenError(
                    f"nothing was sent: {self._failures} streams in a row failed, "
                    + (f"and the next may be tried in {left:.1f} s" if left > 0 else "and one is being tried now"),
                    retry_after=max(left, 0.0),
                )

    def _seconds_left(self, opened_at: float) -> float:
        return opened_at + self.recovery_timeout - self._clock()

    def _ended(self, round: int, success: bool | None) -> None:
        with self._lock:
            if round != self._round:
                return
            was_tried, self._trying = self._trying, False
            if success is None:
                return
            if success:
                self._failures = 0
            else:
                self._failures += 1
            if was_tried or self._failures >= self.failure_threshold:
                self._opened_at = None if success else self._clock()
                self._round += 1


class _Admission:
    """A stream that a CircuitBreaker has let through; only the first report of its end counts"""

    def __init__(self, breaker: CircuitBreaker, round: int) -> None:
        self._breaker = breaker
        self._rounds = [round]

    def end(self, success: bool | None) -> None:
        """``success`` is None for neither success nor failure"""
        try:
            round = self._rounds.pop()
        except IndexError:
            return
        self._breaker._ended(round, success)

    def __enter__(self) -> _Admission:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.end(_was_success(error))

    def __del__(self) -> None:
        self.end(None)


def _was_success(error: BaseException | None) -> bool | None:
    """Whether an error is a failure of the provider (False); None where it is not; True without an error"""
    if error is None:
        return True
    down = (requests.ConnectionError, requests.Timeout, ServerError, StreamInterrupted)
    return False if isinstance(error, down) or (isinstance(error, StreamError) and error.retryable) else None


# ============================================================================================================
# 8. Transport: sockets that know their limits; the Retry-backed session. May use: Policies and above
# ============================================================================================================


class _Wire:
    """The wait of one thread, which any thread may end: on a socket, or between two attempts

    The time-out of a socket applies to each recv alone, so bytes that trickle never reach it. The limits here are
    checked before each recv, whether the bytes are status line, headers, chunk sizes or body.
    """

    #: the shortest time limit in seconds: 0 would mean not to wait at all
    _LEAST = 0.001

    def __init__(self, read_timeout: float | None = None, deadline: float | None = None) -> None:
        #: why the call was ended from outside: "cancelled", "closed", or None
        self.ended: str | None = None
        self.read_timeout = read_timeout
        self.connect_timeout: float | None = None
        #: the moments (time.monotonic) by which the call, and the next chunk, must come to their end
        self.deadline = None if deadline is None else time.monotonic() + deadline
        self.due: float | None = None
        self._due_seconds: float | None = None
        self._due_reason = ""
        self._lock = threading.RLock()  # a signal handler may cancel, in the thread that holds it
        #: the process that opened it
        self.process = os.getpid()
        self._socket: socket.socket | None = None
        self.wake = _Bell()  # rings when the call is ended

    def expect(self, seconds: float | None, reason: str) -> None:
        """Sets the time limit for the next chunk, from now on"""
        self.due = None if seconds is None else time.monotonic() + seconds
        self._due_seconds, self._due_reason = seconds, reason

    @contextlib.contextmanager
    def connecting(self) -> Iterator[None]:
        """While a connection is made, reads (from a proxy) have the connect time-out"""
        read_timeout, self.read_timeout = self.read_timeout, self.connect_timeout
        try:
            yield
        finally:
            self.read_timeout = read_timeout

    def attach(self, sock: socket.socket | None) -> None:
        """Sets the socket that the reader is about to wait on"""
        with self._lock:
            self._socket = sock
        self.check()

    def detach(self, sock: socket.socket | None = None) -> None:
        """Forgets a socket before another call can have it; by default any"""
        with self._lock:
            if sock is None or self._socket is sock:
                self._socket = None

    def end(self, why: str) -> None:
        """Ends the wait of the reader, from any thread

        close() would wait for the recv of the reader; shutdown() ends that recv, and the reader closes the socket.
        """
        with self._lock:  # a socket in the pool may belong to another call already
            self.ended = self.ended or why
            if self._socket is not None and self.is_own:
                _shut_down(self._socket)
        self.wake.ring()

    def begin_process(self) -> None:
        """Takes the wire over for this process"""
        self.process = os.getpid()

    @property
    def is_own(self) -> bool:
        """Whether this process opened the socket, and is no fork, which shares it"""
        return self.process == os.getpid()

    def check(self) -> None:
        """Raises an error for http.client and urllib3 where the call was ended or a limit has passed"""
        if self.ended:
            raise ConnectionAbortedError(self.ended)
        if self.overdue():
            raise socket.timeout(self.overdue())

    def before_recv(self, sock: socket.socket) -> None:
        """Checks the limits, and sets the time-out of the next recv"""
        left, now = self.read_timeout, time.monotonic()
        if self.deadline is not None and (left is None or self.deadline - now < left):
            left = self.deadline - now
        if self.due is not None and (left is None or self.due - now < left):
            left = self.due - now
        if self.ended or (left is not None and left <= self._LEAST):
            self.check()
            left = self._LEAST
        sock.settimeout(left)

    def before_send(self, sock: socket.socket) -> None:
        """Like before_recv, but the time limit of the first chunk does not count"""
        due, self.due = self.due, None
        try:
            self.before_recv(sock)
        finally:
            self.due = due

    def sent(self) -> None:
        """The request is sent: the time for the first chunk begins"""
        self.expect(self._due_seconds, self._due_reason)

    def seconds_to_connect(self) -> float | None:
        limits = [self.connect_timeout, None if self.deadline is None else self.deadline - time.monotonic()]
        return min((max(limit, self._LEAST) for limit in limits if limit is not None), default=None)

    def seconds_left(self) -> float | None:
        """The time left for a request"""
        now = time.monotonic()
        limits = [moment - now for moment in (self.deadline, self.due) if moment is not None]
        limits += [] if self.read_timeout is None else [self.read_timeout]
        return max(min(limits), self._LEAST) if limits else None

    def overdue(self) -> str:
        """Names the limit that has passed; empty where none has"""
        now = time.monotonic() + self._LEAST  # a time-out of the system may come this much early
        if self.deadline is not None and now >= self.deadline:
            return "the deadline of the call has passed"
        if self.due is not None and now >= self.due:
            return self._due_reason
        return ""

    def pause(self, seconds: float) -> None:
        """Waits, until the call is ended"""
        if not self.ended:
            self.wake.wait(seconds)


#: the wire of the call that this thread is sending; urllib3 offers no other way to pass it to a connection
_sending = threading.local()


def _wire_of_thread() -> _Wire | None:
    return getattr(_sending, "wire", None)


class _WireReader(io.RawIOBase):
    """Reads a socket, each recv within the limits of a wire"""

    def __init__(self, sock: Any, raw: Any, wire: _Wire) -> None:
        self._socket, self._wire = sock, wire
        self._raw = raw  # keeps the socket open when its connection is closed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._wire.before_recv(self._socket)
        count: int | None = self._socket.recv_into(buffer)
        return count

    def close(self) -> None:
        if not self.closed:
            self._wire.detach(self._socket)  # http.client closes this before urllib3 gives the connection back
            self._raw.close()
        super().close()


#: bytes of the buffer of a response, for headers, chunk sizes and small chunks
_BUFFER = 4096


class _WireSocket:
    """The part of a socket that http.client needs to read a response"""

    def __init__(self, sock: Any, wire: _Wire) -> None:
        self._socket, self._wire = sock, wire

    def makefile(self, mode: str) -> io.BufferedReader:
        # made here, for a call less on the stack: a page of memory less for each thread
        raw = self._socket.makefile(mode, buffering=0)
        return io.BufferedReader(_WireReader(self._socket, raw, self._wire), _BUFFER)


class _WireResponse(_HTTPResponse):
    """http.client's response, read within the limits of the wire whose request it answers"""

    def __init__(self, sock: Any, *args: Any, **options: Any) -> None:
        wire = _wire_of_thread()
        source: Any = sock if wire is None else _WireSocket(sock, wire)
        super().__init__(source, *args, **options)

    def _read_status(self) -> tuple[str, int, str]:
        """The final status: http.client takes the interim 102 and 103 for the response itself"""
        version, status, reason = super()._read_status()  # type: ignore[misc]  # left out by its stubs
        while 101 < status < 200:
            parse_headers(self.fp)
            version, status, reason = super()._read_status()  # type: ignore[misc]
        return version, status, reason


class _WireConnection:
    """A connection that is made, written and read within the limits of the wire whose request it sends"""

    response_class = _WireResponse
    sock: Any

    def connect(self) -> None:
        wire = _wire_of_thread()
        with contextlib.nullcontext() if wire is None else wire.connecting():
            super().connect()  # type: ignore[misc]
        self._attach()  # not before: urllib3 before 2.3 loses a socket that is shut down before its TLS handshake

    def _new_conn(self) -> socket.socket:
        wire = _wire_of_thread()
        if wire is None:
            made: socket.socket = super()._new_conn()  # type: ignore[misc]
            return made
        try:
            return _connected(self, wire)
        except socket.timeout as error:
            raise urllib3.exceptions.ConnectTimeoutError(self, f"no connection in time ({error})") from error
        except OSError as error:
            raise urllib3.exceptions.NewConnectionError(self, str(error)) from error  # type: ignore[arg-type]

    def putrequest(self, *args: Any, **options: Any) -> Any:
        self._attach()
        return super().putrequest(*args, **options)  # type: ignore[misc]

    def send(self, data: Any) -> None:
        """Sends in pieces: sendall() would have one time-out for all"""
        wire = _wire_of_thread()
        if wire is None or not hasattr(self.sock, "send") or not isinstance(data, bytes):
            super().send(data)  # type: ignore[misc]
            return
        left = memoryview(data)
        while left:
            wire.before_send(self.sock)
            left = left[self.sock.send(left[:_SEND_BYTES]) :]

    def getresponse(self, *args: Any, **options: Any) -> Any:
        wire = _wire_of_thread()
        if wire is not None:
            wire.sent()
        return super().getresponse(*args, **options)  # type: ignore[misc]

    def _attach(self) -> None:
        wire = _wire_of_thread()
        if wire is not None and self.sock is not None:
            wire.attach(self.sock)


#: bytes of one send
_SEND_BYTES = 16384
#: detects within minutes that the other side has gone; the values of Anthropic's SDK
_KEEP_ALIVE = (("SO_KEEPALIVE", 1), ("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 60), ("TCP_KEEPCNT", 5))
_SOCKET_OPTIONS = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),  # as urllib3 has it
    *(
        (socket.SOL_SOCKET if name == "SO_KEEPALIVE" else socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in _KEEP_ALIVE
        if hasattr(socket, name)
    ),
]


def _connected(connection: Any, wire: _Wire) -> socket.socket:
    """A socket to the first address of a host that accepts, within one time limit for all addresses"""
    host, port = connection._dns_host, connection.port
    until = time.monotonic() + (wire.seconds_to_connect() or threading.TIMEOUT_MAX)
    failure: OSError = OSError(f"no address for {host}")
    addresses = socket.getaddrinfo(host.strip("[]"), port, 0, socket.SOCK_STREAM)
    for position, (family, kind, protocol, _, address) in enumerate(addresses):
        # an address that drops packets leaves time for the others
        left = (until - time.monotonic()) / (len(addresses) - position)
        sock = socket.socket(family, kind, protocol)
        try:
            for option in _SOCKET_OPTIONS:
                sock.setsockopt(*option)
            sock.settimeout(max(left, wire._LEAST))
            sock.connect(address)
            return sock
        except BaseException as error:
            sock.close()
            if not isinstance(error, OSError):
                raise
            _raise_callers_own(error)
            wire.check()
            failure = error
    raise failure


class _Pool(HTTPConnectionPool):
    """Makes our connections, unless a tool that intercepts requests (vcrpy) has set its own class"""

    @property
    def ConnectionCls(self) -> Any:  # type: ignore[override]
        usual = HTTPConnectionPool.ConnectionCls
        return _WireHTTPConnection if usual is HTTPConnection else usual


class _TLSPool(HTTPSConnectionPool):
    @property
    def ConnectionCls(self) -> Any:  # type: ignore[override]
        usual = HTTPSConnectionPool.ConnectionCls
        return _WireHTTPSConnection if usual is HTTPSConnection else usual


class _WireHTTPConnection(_WireConnection, HTTPConnection):  # type: ignore[misc]  # typed for urllib3's own only
    pass


class _WireHTTPSConnection(_WireConnection, HTTPSConnection):  # type: ignore[misc]
    pass


#: False where urllib3-future, which niquests brings, has taken urllib3's place: a wire reaches its reads alone
_IS_URLLIB3 = issubclass(HTTPConnection, _HTTPConnection)


class _WireAdapter(HTTPAdapter):
    """Never retries, and makes connections that a wire can end"""

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        if _IS_URLLIB3:
            self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}

    def close(self) -> None:
        """Closes the idle connections: urllib3 2 would wait for the last response that refers to their pool"""
        for manager in (self.poolmanager, *self.proxy_manager.values()) if _IS_URLLIB3 else ():
            keys = manager.pools.keys()  # the container itself cannot be iterated
            for key in keys:
                pool = manager.pools.get(key)
                if pool is not None:
                    pool.close()
        super().close()

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **options)
        if _IS_URLLIB3 and not proxy.lower().startswith("socks"):  # PySocks needs the pools of its own
            manager.pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}
        return manager


class _Session(requests.Session):
    """A session whose redirects to another origin carry no key, whichever header holds it"""

    def rebuild_auth(self, prepared_request: Any, response: Any) -> None:
        if self.should_strip_auth(response.request.url, prepared_request.url):
            # except cookies, which requests itself has chosen for the new origin
            for name in _key_headers(prepared_request.headers):
                if name.lower() != "cookie":
                    del prepared_request.headers[name]
        super().rebuild_auth(prepared_request, response)


class _StayingSession(_Session):
    """A session that follows no redirect; requests would read the whole body of one

    It works less for each request: it merges headers and cookies only, and looks up the proxies and certificates of a
    host again only where the environment has changed.
    """

    #: the environment variables of requests and urllib.request
    _VARIABLES = tuple(
        form for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy") for form in (name, name.upper())
    ) + ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "REQUEST_METHOD")

    def __init__(self, given: Mapping[str, Any]) -> None:
        """``given`` replaces the environment: ``proxies``, ``verify``, ``cert``"""
        super().__init__()
        self._given = given
        self._found: dict[tuple[str, str], tuple[list[str | None], Any]] = {}
        self.cookies.set_policy(DefaultCookiePolicy(allowed_domains=()))  # cookies of one call are not for the next

    def merge_environment_settings(self, url: Any, *settings: Any) -> Any:
        host, environment = urlsplit(url)[:2], list(map(os.environ.get, self._VARIABLES))
        found = self._found.get(host)
        if found is None or found[0] != environment:
            found = self._found[host] = environment, super().merge_environment_settings(url, *settings)
        return {**found[1], **self._given}

    def prepare_request(self, request: Any) -> requests.PreparedRequest:
        headers = requests.structures.CaseInsensitiveDict(self.headers)
        headers.update(request.headers)
        prepared = requests.PreparedRequest()
        prepared.prepare(
            method=request.method,
            url=request.url,
            headers={name: value for name, value in headers.items() if value is not None},  # None means: leave it out
            data=request.data,
            auth=request.auth or requests.utils.get_netrc_auth(request.url),
            cookies=self.cookies,
        )
        return prepared

    def get_redirect_target(self, resp: requests.Response) -> None:
        return None


def _mounted(adapter: HTTPAdapter, made: requests.Session) -> requests.Session:
    made.mount("https://", adapter)
    made.mount("http://", adapter)
    return made


def session(retry: Retry | None = None, pool_size: int = 10) -> requests.Session:
    """A requests.Session that retries by ``retry`` (``Retry()`` by default), for requests of your own

    The session acts by status and headers, before the body is read. The last response is returned as it is, and a
    failed connection raises the errors of requests. Keeps up to ``pool_size`` connections to a host. Accepts an event
    stream, unless a request sets another ``Accept``.
    """
    policy = Retry() if retry is None else retry
    adapter = HTTPAdapter(max_retries=policy, pool_connections=pool_size, pool_maxsize=pool_size)
    made = _mounted(adapter, _Session())
    made.headers["Accept"] = "text/event-stream"
    return made


class _KeyAuth(AuthBase):
    """Sets the headers that carry the key, so that no .netrc entry and no user in the URL replaces them"""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._headers = dict(headers)

    def __call__(self, request: Any) -> Any:
        request.headers.update(self._headers)
        return request


def _send(
    via: requests.Session, wire: _Wire, method: str, url: str, connect_timeout: float | None, **options: Any
) -> requests.Response:
    """Sends one request, within the limits of the wire; SheepError where no response comes"""
    where = _public_url(url)
    if not isinstance(_sending, threading.local):  # requests of several greenlets would be taken for one another
        raise RuntimeError("gevent or eventlet patched threads after sheepsse was imported: patch first, then import")
    handled = sys.exc_info()[1]  # an exception that the caller is handling is no cause of a failure here
    limits = [limit for limit in (connect_timeout, wire.seconds_left()) if limit is not None]
    timeout = (min(limits, default=None), wire.seconds_left())
    former = _wire_of_thread()  # a Stream that is collected while this thread connects may cancel its job
    _sending.wire, wire.connect_timeout = wire, connect_timeout
    try:
        wire.check()
        response = via.request(method, url, stream=True, timeout=timeout, **options)
        if not (hasattr(response, "iter_content") and hasattr(response, "raw")):
            raise TypeError(f"a response without iter_content and raw: {type(response).__name__}")
        return response
    except TypeError as error:
        _raise_callers_own(error, handled)
        if isinstance(via, requests.Session):
            raise
        raise TypeError(
            f"session= is not shaped like a requests.Session, whose request() takes stream, timeout, headers, auth and "
            f"allow_redirects, and whose responses have iter_content and raw: {type(via).__module__}: {error}"
        ) from error
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        raise _connect_error(error, where, _proxy_of(via, url, options), handled) from error
    finally:
        _sending.wire = former


def _as_pair(timeout: float | tuple[float | None, float | None] | None) -> tuple[float | None, float | None]:
    """The time-outs in seconds, to connect and without a byte, as in requests"""
    connect, read = timeout if isinstance(timeout, (tuple, list)) and len(timeout) == 2 else (timeout, timeout)
    return _limit("timeout", connect), _limit("timeout", read)


def _limit(name: str, value: Any) -> float | None:
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return value
    also = ", or two of them, (connect, read)" if name == "timeout" else ""
    raise TypeError(f"{name} is a number of seconds, or None for no limit{also}; got {value!r}")


#: the errors of requests for a request that cannot be sent
_UNSENDABLE = (
    requests.exceptions.InvalidHeader,
    requests.exceptions.InvalidSchema,
    getattr(requests.exceptions, "InvalidJSONError", ValueError),  # since requests 2.26
    requests.exceptions.InvalidURL,
    requests.exceptions.MissingSchema,
    requests.exceptions.TooManyRedirects,
    urllib3.exceptions.LocationValueError,
    ValueError,  # http.client's for a header, a codec's, urlsplit's for a redirect that nobody follows
)


def _proxy_of(via: Any, url: str, options: Mapping[str, Any]) -> str:
    """The proxy of a request, without password; "" where there is none, or none is known"""
    try:
        given = [options.get(name) for name in ("proxies", "stream", "verify", "cert")]
        proxies = via.merge_environment_settings(url, given[0] or {}, *given[1:])["proxies"]
        proxy = requests.utils.select_proxy(url, proxies) or ""
    except (AttributeError, ValueError):  # another library's session; an address that is none
        return ""
    scheme, _, rest = proxy.rpartition("://")
    return f"{scheme or 'http'}://{rest.rpartition('@')[2]}" if proxy else ""


def _connect_error(error: Exception, where: str, proxy: str, handled: BaseException | None) -> SheepError:
    """The error for a request without a response"""
    _raise_callers_own(error, handled)
    where += proxy and f" through the proxy {proxy}"
    if isinstance(error, _UNSENDABLE):
        return InvalidRequestError(f"the request to {where} cannot be sent: {error}")
    if _is_time_out(error, handled) and not isinstance(error, requests.ConnectTimeout):
        return StreamTimeout(f"no answer from {where} for the read time-out")
    # the errors that requests and urllib3 wrap around the cause only repeat the URL
    wrappers = (requests.RequestException, urllib3.exceptions.MaxRetryError)
    causes = [link for link in _chain(error, handled) if not isinstance(link, wrappers)] or [error]
    named = [cause for cause in causes if isinstance(cause, (OSError, HTTPException))] or causes
    refused = re.search("Tunnel connection failed: (4[0-9]{2})", str(named[-1]))
    if refused:
        return InvalidRequestError(f"no connection to {where}: {named[-1]}", status=int(refused.group(1)))
    failure = ConnectError(f"no connection to {where}: {named[-1]}")
    failure.retryable = not any(map(_is_hopeless, causes))
    return failure


#: seconds to read the body of an error
_ERROR_BODY_TIME = 5.0


def _plain_blocks(raw: Any, answer: _HTTPResponse) -> Iterator[bytes]:
    """The blocks of a body that is not compressed, by http.client alone, which takes half the time"""
    came = 0
    while True:
        try:
            block = answer.read1(_BLOCK)
            came += len(block)
            if not block and answer.length:
                raise urllib3.exceptions.IncompleteRead(came, answer.length)
        except (HTTPException, OSError, OverflowError, ValueError) as error:
            raise _body_error(error) from error
        if not block or answer.length == 0:  # the connection is free, also where nobody reads on
            answer.close()
            raw.release_conn()
        if not block:
            return
        yield block


def _limited_blocks(response: requests.Response, wire: _Wire) -> Iterator[bytes]:
    """The blocks of a body, within the limits of the wire; InvalidStreamError for an unknown encoding"""
    answer, encoding = getattr(response.raw, "_original_response", None), _undecodable(response)
    if not isinstance(answer, _WireResponse):  # which reads through a _WireReader
        blocks = _foreign_blocks(response, wire)
    elif response.headers.get("Content-Encoding") or getattr(response, "_content_consumed", False):
        blocks = iter_bytes(response)
    else:
        blocks = _plain_blocks(response.raw, answer)
    return _readable(blocks, response, encoding) if encoding else blocks


def _readable(blocks: Iterable[bytes], response: requests.Response, encoding: str) -> Iterator[bytes]:
    """The same blocks, while they are text: some servers send an encoding that is none ("utf-8", "none")"""
    undecoded = InvalidStreamError(
        f"the answer from {_public_url(response.url)} has the Content-Encoding {encoding}, which nothing here decodes: "
        "install the package that does (brotli, zstandard), or have the server or proxy not use it"
    )
    if "," in response.headers["Content-Encoding"]:  # urllib3 takes each of several for one that it knows
        raise undecoded
    decoder = codecs.getincrementaldecoder("utf-8")()
    for block in blocks:
        try:
            is_text = not re.search("[\0-\10]", decoder.decode(block))
        except UnicodeDecodeError:
            is_text = False
        if not is_text:
            raise undecoded
        yield block


def _foreign_blocks(response: requests.Response, wire: _Wire) -> Iterator[bytes]:
    """The blocks of a body of a session that was passed, within the limits of the wire"""
    blocks = iter_bytes(response)
    while True:
        sock = _socket_of(response)  # None once all was read, and the socket may belong to another call
        try:
            wire.attach(sock)
            if sock is not None:
                wire.before_recv(sock)
        except OSError as error:
            raise _body_error(error) from error
        block = next(blocks, b"")
        wire.detach()
        if not block:
            return
        yield block


def _error_body(response: requests.Response, wire: _Wire) -> bytes:
    """The beginning of the body of an error"""
    wire.expect(_ERROR_BODY_TIME, "the body of an error did not come")
    return _read_some(_limited_blocks(response, wire), _ERROR_BODY, [])


def _read_some(blocks: Iterable[bytes], limit: int, failure: list[SheepError]) -> bytes:
    """The beginning of a body; a failure to read it is appended to ``failure``"""
    body: list[bytes] = []
    size = 0
    for block in _until_failure(blocks, failure):
        body.append(block)
        size += len(block)
        if size >= limit:
            break
    return b"".join(body)[:limit]


def iter_sse(
    url: str,
    *,
    method: str = "GET",
    session: requests.Session | None = None,
    last_event_id: str = "",
    reconnect: bool = True,
    retry: Retry | None = None,
    timeout: float | tuple[float | None, float | None] | None = (10, 300),
    headers: Mapping[str, Any] | None = None,
    max_event_size: int = _MAX_EVENT_SIZE,
    **options: Any,
) -> Iterator[ServerSentEvent]:
    """The events of any server, as in a browser's EventSource (WHATWG HTML, section 9.2)

    Reconnects with ``Last-Event-ID`` when the connection ends or is lost, after the time that the server set by
    ``retry:`` (3 seconds at first), until the generator is closed, the server answers 204, or ``retry.total``
    attempts in a row bring no event. A response other than 200 with ``text/event-stream`` is an error; one that
    ``retry`` allows is tried again. ``reconnect=False`` reads one connection. ``options`` go to
    ``session.request``; ``timeout`` is (connect, seconds without a byte).
    """
    source = _EventSource(method, url, last_event_id, max_event_size)
    policy = Retry() if retry is None else retry
    via = _mounted(_WireAdapter(max_retries=0), _Session()) if session is None else session
    secrets = _Secrets(headers or {}, url)
    failures = 0
    try:
        while True:
            failure: SheepError = StreamInterrupted(f"{_public_url(url)} gave no event before it closed")
            failures += 1
            try:
                for event in source.events(via, timeout=_as_pair(timeout), headers=headers, **options):
                    failures = 0
                    yield event
                if source.finished or not reconnect:
                    return
            except SheepError as error:
                secrets.hide_error(error)
                failure = error
                if not reconnect:
                    raise
            _reconnection_pause(policy, failure, failures, source.reconnection_time)
    finally:
        if session is None:
            via.close()


def _reconnection_pause(policy: Retry, failure: SheepError, failures: int, seconds: float) -> None:
    """Waits before the next connection, or raises the failure after too many"""
    if failures or not failure.retryable:
        delay = policy.wait(failure, max(failures, 1))
        if delay is None:
            if policy.on_give_up:
                policy.on_give_up(failure, max(failures, 1))
            raise failure
        if policy.on_retry:
            policy.on_retry(failure, failures, max(delay, seconds))
        seconds = max(delay, seconds)
    (policy.sleep_function or time.sleep)(seconds)


#: seconds; time.sleep cannot sleep as long as a server may demand
_LONGEST_RECONNECTION = 86400.0


class _EventSource:
    """The state of an EventSource between two connections"""

    def __init__(self, method: str, url: str, last_event_id: str, max_event_size: int) -> None:
        self._method, self._url = method, url
        self._decoder = _StrictDecoder(max_event_size, last_event_id)
        self._max_event_size = max_event_size
        self.reconnection_time = 3.0
        self.finished = False

    def events(
        self, via: requests.Session, headers: Mapping[str, Any] | None, timeout: Any, **options: Any
    ) -> Iterator[ServerSentEvent]:
        """The events of one connection"""
        last_event_id = self._decoder.last_event_id
        sent: dict[str, Any] = {"Accept": "text/event-stream", "Cache-Control": "no-cache", **(headers or {})}
        if last_event_id:
            # a str would go out as latin-1, and requests refuses blanks at the ends, which HTTP does not keep
            sent["Last-Event-ID"] = last_event_id.strip(" \t").encode("utf-8")
        wire = _Wire(timeout[1])
        response = _send(via, wire, self._method, self._url, timeout[0], headers=sent, **options)
        try:
            if response.status_code == 204:
                self.finished = True
                return
            _require_event_stream(response, wire)
            # a fresh decoder: an open event is dropped with its connection
            self._decoder = _StrictDecoder(self._max_event_size, last_event_id)
            yield from _decoded(_limited_blocks(response, wire), self._decoder)
        finally:
            response.close()
            if self._decoder.retry is not None:
                self.reconnection_time = min(self._decoder.retry / 1000, _LONGEST_RECONNECTION)


def _require_event_stream(response: requests.Response, wire: _Wire) -> None:
    """Raises for a response that an EventSource would not read"""
    where = _public_url(response.url)
    if response.status_code != 200:
        body = _error_body(response, wire)
        raise _status_error(response.status_code, response.headers, body, where)
    content_type = response.headers.get("Content-Type") or ""
    if _media_type(content_type) != "text/event-stream":
        raise InvalidStreamError(f"expected Content-Type text/event-stream from {where}, got {content_type!r}")


# ============================================================================================================
# 9. Resume: the same chunks across lost connections. May use: Transport and above
# ============================================================================================================
# Read here when text comes twice, or is missing, after a connection was lost.
#
# Two values know what was returned to the caller: _Answer holds the text, and _Marks the ids of the first event and of
# the last few. From both, a strategy makes plans. A _Plan is the next request, the reader of its answer, and a check
# of each chunk:
#
#   _replay     receive the same generation again: after the id of the last event (_ByIds), after a number in the URL
#               (_Repeated), or all of it where its stream is gone (_Poll). It is billed once
#   _restart    send the same request again, where nothing was returned (_Restart)
#   _continue   the provider continues the text that was received (_Continued)
#   _verify     send the same request again; its answer must begin as this one did (_Verified)
#   _anchor     the model repeats its last words, and continues (_Anchored)
#
# _Reading turns one connection into chunks. place() of the plan decides whether an event is new, before the event is
# read. check() drops the part of a chunk that was returned before, and end() gives what was held back. Any difference
# raises StreamInterrupted: no text is returned twice.


class _HTTPRequest(NamedTuple):
    """One HTTP request"""

    method: str
    url: str
    body: Mapping[str, Any] | None
    headers: Mapping[str, Any] = {}


class _Request(NamedTuple):
    """The request of a call, in the caller's words"""

    base_url: str
    dialect: type[Dialect]
    messages: tuple[Any, ...]
    model: str
    params: Mapping[str, Any]
    stream: bool

    def ask(self) -> _HTTPRequest:
        """The HTTP request for it"""
        body = self.dialect.body(self.messages, self.model, self.params, self.stream)
        return _HTTPRequest("POST", self.dialect.url(self.base_url, self.model, self.stream), body)

    def and_then(self, *messages: Mapping[str, Any], **params: Any) -> _Request:
        """The same request with more messages and options"""
        return self._replace(messages=(*self.messages, *messages), params={**self.params, **params})


def _messages(messages: Any, system: Any = None) -> list[Any]:
    """The messages as a list, after the system message that was passed beside them"""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if isinstance(messages, (bytes, Mapping)) or not isinstance(messages, Iterable):
        raise TypeError(f"messages is a str or a list of {{'role', 'content'}}, got {type(messages).__name__}")
    listed = list(messages)
    if not system:
        return listed
    if any(isinstance(message, Mapping) and message.get("role") in ("system", "developer") for message in listed):
        raise ValueError("system= and a system message among the messages: pass one of the two")
    return [{"role": "system", "content": system}, *listed]


class _Mark(NamedTuple):
    """An event that another process received"""

    id: str
    #: of its kind and data; None where the checksum is not known
    checksum: int | None


class _Marks:
    """The position in a stream: the first event and the last few events that were returned

    Pings do not count: a server sends them at other places the next time.
    """

    _KEPT = 8

    def __init__(self, marks: Iterable[Sequence[Any]] = ()) -> None:
        self._former = tuple(_Mark(*mark) for mark in marks)
        self.first: ServerSentEvent | _Mark | None = self._former[0] if self._former else None
        self.recent: collections.deque[ServerSentEvent | _Mark] = collections.deque(self._former, self._KEPT)
        #: whether events between the first and the last few are missing
        self.is_partial = bool(self._former)
        self._given: _Given | None = None

    @property
    def cursor(self) -> str:
        """The id to resume after; "" where the last event has no id of its own"""
        last = self.recent[-1].id if self.recent else ""
        before = self.recent[-2].id if len(self.recent) > 1 else ""
        return last if last != before else ""

    @property
    def known(self) -> tuple[_Mark, ...]:
        """The first event and the last ones, for another process; empty where there is no cursor"""
        if self._given is not None and not self._given.is_behind:  # the events so far repeat older ones
            return self._former
        if not self.cursor or self.first is None:
            return ()
        first, recent = _mark_of(self.first), tuple(map(_mark_of, self.recent))
        return recent if first == recent[0] else (first, *recent[-2:])

    def begin_again(self, given: _Given) -> None:
        """The server repeats all events from the first one on; ``given`` knows where the new events begin"""
        self._former, self._given, self.is_partial = self.known, given, False
        self.recent.clear()


def _mark_of(event: ServerSentEvent | _Mark) -> _Mark:
    if isinstance(event, _Mark):
        return event
    return _Mark(event.id, zlib.crc32(f"{event.event}\n{event.data}".encode("utf-8", "surrogatepass")))


def _marks_of(ids: Sequence[str]) -> list[tuple[str, int | None]]:
    """The marks of a saved answer, from the ids of its chunks; empty where the ids do not suffice"""
    if not ids or not ids[0] or not ids[-1] or ids[-1] in ids[-2:-1]:  # the event may have had another chunk
        return []
    known = ids if len(ids) < 3 else [ids[0], ids[-2] or ids[0], ids[-1]]
    return [(id, None) for id in known]


def _is_before(id: str, other: str) -> bool:
    """Whether both ids end in a number, and the first is not after the other"""
    numbers = [re.fullmatch(r"(.*?)([0-9]{1,20})", each, re.DOTALL) for each in (id, other)]
    if None in numbers:
        return False
    (prefix, number), (other_prefix, other_number) = (match.groups() for match in numbers if match)
    return prefix == other_prefix and int(number) <= int(other_number)


def _another_answer() -> StreamInterrupted:
    """The error where a server begins another answer instead of resuming this one"""
    return StreamInterrupted(
        "the connection was lost, and the server began another answer instead of resuming this one",
        retryable=False,
    )


class _Lost(NamedTuple):
    """All that is known of a stream whose connection was lost"""

    request: _Request
    #: the first HTTP request
    ask: _HTTPRequest
    #: what was returned
    answer: _Answer
    #: the reader, in the state of the loss; None where another process read
    dialect: Dialect | None
    marks: _Marks
    #: a name in _CONTINUATIONS, or "" where the provider cannot continue an answer
    continuation: str = ""
    #: what the reader still compares with what was returned; None where all it read was new
    given: _Given | None = None


class _Plan:
    """The next request, the reader of its answer, and the check of its chunks; this one takes all as new"""

    strategy = ""
    #: the word in Stream.continuity
    continuity = "single"
    #: whether the provider bills the request as a new one
    is_billed = False
    #: whether nothing that was received before is used
    is_fresh = False
    #: whether the reader may continue after another loss
    keeps_reader = True
    #: whether progress before the loss resets the count of failures
    resets_budget = False
    #: whether the request is for the events after an id; a difference shows that the id is of another answer
    uses_ids = False
    #: whether all events and chunks are new
    is_plain = True
    #: what was returned, as far as the server has still to repeat it
    given: _Given | None = None

    def __init__(self, ask: _HTTPRequest, dialect: Dialect) -> None:
        self.ask, self.dialect = ask, dialect

    def place(self, event: ServerSentEvent) -> bool:
        """Whether an event is new; StreamInterrupted for one of another answer"""
        return True

    def check(self, chunk: Chunk) -> Iterable[Chunk]:
        """The new part of a chunk; StreamInterrupted where the chunk is of another answer"""
        return (chunk,)

    def end(self) -> Iterable[Chunk]:
        """The chunks that were held back; StreamInterrupted where less came than was returned before"""
        return ()


def _new_dialect(request: _Request, ask: _HTTPRequest) -> Dialect:
    return request.dialect(request.dialect.choices_asked(ask.body or {}))


def _replay(lost: _Lost) -> list[_Plan]:
    """Receive the same generation again, from the loss on, or all of it where its stream is gone; it is billed once"""
    plans = [_streamed_again(lost) if lost.request.stream else None, _poll(lost)]
    return [plan for plan in plans if plan is not None]


def _streamed_again(lost: _Lost) -> _Plan | None:
    ask = lost.ask
    reader = lost.dialect or _new_dialect(lost.request, ask)
    given = lost.given if lost.dialect else _Given(lost.answer)
    url = lost.request.dialect.replay_url(ask.url, ask.body or {}, lost.answer.id, lost.dialect)
    if url:
        return _Repeated(_HTTPRequest("GET", url, None), reader, lost.answer, given)
    if not lost.marks.cursor or not (lost.dialect or _joins(reader, lost.answer)):
        return None
    # a str would go out as latin-1, and requests refuses blanks at the ends, which HTTP does not keep
    cursor = lost.marks.cursor.strip(" \t").encode("utf-8")
    return _ByIds(lost, ask._replace(headers={"Last-Event-ID": cursor}), reader, given)


def _joins(reader: Dialect, answer: _Answer) -> bool:
    """Whether a new reader may begin in mid-stream: it does not know which calls and choices are open"""
    return not (reader.compares or answer.tool_calls or reader.choices > 1)


class _Repeated(_Plan):
    """The same generation, compared with what was returned unless its reader continues"""

    strategy, continuity, is_plain, resets_budget = "replay", "replayed", False, True

    def __init__(self, ask: _HTTPRequest, dialect: Dialect, answer: _Answer, given: _Given | None) -> None:
        super().__init__(ask, dialect)
        self._answer, self.given = answer, given
        #: whether the reader has read the whole answer: else the parts kept for the vendor are not whole
        self._has_all = True

    def check(self, chunk: Chunk) -> Iterable[Chunk]:
        if chunk.id and self._answer.id and chunk.id != self._answer.id:
            raise _another_answer()
        chunk = chunk if self._has_all else chunk._replace(vendor=None)
        return (chunk,) if self.given is None else self.given.beyond(chunk)

    def end(self) -> Iterable[Chunk]:
        if self.given is not None:
            self.given.require_all()
        return ()


class _Poll(_Repeated):
    """All of the same generation, where its stream is gone"""

    keeps_reader = resets_budget = False


class _ByIds(_Repeated):
    """The events of the same generation after the cursor; the server may begin there, before it, or at the first one"""

    uses_ids = True

    def __init__(self, lost: _Lost, ask: _HTTPRequest, reader: Dialect, given: _Given | None) -> None:
        super().__init__(ask, reader, lost.answer, given)
        self._lost = lost
        self._has_all = lost.dialect is not None
        self._left: list[_Mark] | None = None  # of the last few events, those that may be repeated

    def place(self, event: ServerSentEvent) -> bool:
        if event.event == "ping":
            return False
        if self._left is None:
            self._left = self._begin(event)
        known = [id for id, _ in self._left]
        if event.id not in known:
            if any(checksum is not None for _, checksum in self._left):
                raise _another_answer()
            return not self._left
        checksum = self._left[known.index(event.id)][1]
        if checksum not in (None, _mark_of(event)[1]):
            raise _another_answer()
        del self._left[: known.index(event.id) + 1]
        return False

    def _begin(self, event: ServerSentEvent) -> list[_Mark]:
        """Decides by the first event which of the last few events will be repeated"""
        marks = self._lost.marks
        recent = list(map(_mark_of, marks.recent))
        ids = [id for id, _ in recent]
        assert marks.first is not None
        first, checksum = _mark_of(marks.first)
        is_first = event.id == first if first else checksum == _mark_of(event)[1]
        is_kept = event.id != "" and event.id in ids
        if (is_first and not (is_kept and not marks.is_partial)) or (marks.is_partial and _is_before(event.id, first)):
            self.dialect = _new_dialect(self._lost.request, self._lost.ask)
            self.given, self._has_all = _Given(self._answer), True
            marks.begin_again(self.given)
            return []
        if not event.id or not (is_kept or not _is_before(event.id, marks.cursor)):
            raise _another_answer()
        if self._lost.dialect is None and self.given is not None:
            self.given.passed = True
        return recent[ids.index(event.id) :] if is_kept else []


def _poll(lost: _Lost) -> _Plan | None:
    ask = lost.ask
    url = lost.request.dialect.job_url(ask.url, ask.body or {}, lost.answer.id)
    if not url:
        return None
    return _Poll(_HTTPRequest("GET", url, None), _new_dialect(lost.request, ask), lost.answer, _Given(lost.answer))


class _Restart(_Plan):
    strategy, continuity, is_billed, is_fresh = "restart", "restarted", True, True


def _restart(lost: _Lost) -> list[_Plan]:
    """Send the same request again, where nothing was returned"""
    if lost.answer.given or (lost.dialect is not None and lost.dialect.whole):
        return []
    return [_Restart(lost.ask, _new_dialect(lost.request, lost.ask))]


def _verify(lost: _Lost) -> list[_Plan]:
    """Send the same request again; its answer must begin as this one did"""
    again = _new_dialect(lost.request, lost.ask)
    return [] if again.choices > 1 else [_Verified(lost.ask, again, lost.answer)]


class _Verified(_Plan):
    """Another generation that begins with what was returned"""

    strategy, continuity, is_plain, is_billed, keeps_reader = "verify", "verified", False, True, False

    def __init__(self, ask: _HTTPRequest, dialect: Dialect, answer: _Answer) -> None:
        super().__init__(ask, dialect)
        self._before, self._has_calls = _Given(answer), bool(answer.tool_calls)

    def check(self, chunk: Chunk) -> Iterable[Chunk]:
        # the ids of calls differ from those returned, and the ids of events belong to another stream
        vendor = None if self._has_calls else chunk.vendor
        return [new._replace(event_id="", vendor=vendor) for new in self._before.beyond(chunk)]

    def end(self) -> Iterable[Chunk]:
        self._before.require_all()
        return ()


class _Given:
    """What was returned, by kind of piece, to be compared with a repetition"""

    def __init__(self, answer: _Answer) -> None:
        self._names = {call.index: call.name for call in answer.calls()}
        #: by kind and index of the tool call
        self._texts = {(kind, 0): str(getattr(answer, kind)) for kind in ("text", "reasoning", "refusal")}
        self._texts.update((("tool_calls", call.index), call.arguments) for call in answer.calls())
        #: how much of each was repeated
        self._at = dict.fromkeys(self._texts, 0)
        self._finish_reason = answer.finish_reason
        #: whether all that comes is new
        self.passed = False

    def beyond(self, chunk: Chunk) -> Iterable[Chunk]:
        """The new part of a chunk; StreamInterrupted at a difference"""
        if self.passed:
            return (chunk,)
        missing = chunk._replace(
            text=self._beyond(("text", 0), chunk.text),
            reasoning=self._beyond(("reasoning", 0), chunk.reasoning),
            refusal=self._beyond(("refusal", 0), chunk.refusal),
            tool_calls=tuple(self._calls_beyond(chunk.tool_calls)),
        )
        if chunk.finish_reason:
            self.require_all()
        if chunk.finish_reason and self._finish_reason:
            missing = missing._replace(finish_reason=None, finish=None, vendor=None)
            if chunk.finish_reason != self._finish_reason:
                raise self._difference(("finish_reason", 0), 0, self._finish_reason, chunk.finish_reason)
        if not self.is_behind:
            # the event cannot be a cursor: what was returned ends behind it
            missing = missing._replace(event_id="", usage=None)
        return (missing,) if _has_content(missing) or missing.finish_reason or missing.usage else ()

    def _beyond(self, key: tuple[str, int], piece: str) -> str:
        given, at = self._texts[key], self._at[key]
        expected = given[at : at + len(piece)]
        if not piece.startswith(expected):
            common = _common(expected, piece)
            raise self._difference(key, at + common, given[at + common :], piece[common:])
        self._at[key] = at + len(expected)
        return piece[len(expected) :]

    def _calls_beyond(self, calls: Iterable[ToolCall]) -> Iterator[ToolCall]:
        for call in calls:
            key = "tool_calls", call.index
            if key not in self._texts:
                yield call
                continue
            if call.name and not self._names[call.index].startswith(call.name):
                raise self._difference(key, 0, self._names[call.index], call.name)
            arguments = self._beyond(key, call.arguments)
            if arguments:
                yield ToolCall(call.index, arguments=arguments)

    @property
    def is_behind(self) -> bool:
        """Whether all of it was repeated, or the server does not repeat it"""
        return self.passed or all(self._at[key] == len(text) for key, text in self._texts.items())

    def require_all(self) -> None:
        """Raises StreamInterrupted where it was not repeated to its end"""
        for key, text in self._texts.items():
            if not self.passed and self._at[key] < len(text):
                raise self._difference(key, self._at[key], text[self._at[key] :], "")

    def _difference(self, key: tuple[str, int], at: int, given: str, repeated: str) -> StreamInterrupted:
        kind, position = key if key[0] == "tool_calls" else (key[0], at)
        return StreamInterrupted(
            f"the connection was lost, and the repeated answer differs from what was given at {kind} {position}: "
            f"{_excerpt(given[:100], 40)} was given, and now there is {_excerpt(repeated[:100], 40)}",
            retryable=False,
        )


def _common(first: str, second: str) -> int:
    """The length of the common prefix of two texts"""
    return next((at for at, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))


# Continue: the request holds the partial answer, and the model continues it


def _is_text_alone(lost: _Lost) -> bool:
    """Whether only text was returned, of one choice that is still open"""
    answer = lost.answer
    return (
        bool(answer.text)
        and not (answer.reasoning or answer.refusal or answer.tool_calls or answer.finish_reason)
        and lost.request.dialect.choices_asked(lost.ask.body or {}) == 1
    )


class _Continuation(NamedTuple):
    """How a provider is made to continue an answer"""

    request: Callable[[_Request, str], _Request | None]
    #: whether the provider repeats the text before it continues
    echoes: bool = False
    #: whether the text must not end in white space
    strips: bool = False


def _deepseek_prefix(request: _Request, text: str) -> _Request | None:
    # https://api-docs.deepseek.com/guides/chat_prefix_completion
    parts = urlsplit(request.base_url)
    base = re.sub(r"/(v1|beta)/*$", "", parts.path.rstrip("/"))
    prefixed = request.and_then({"role": "assistant", "content": text, "prefix": True})
    return prefixed._replace(base_url=urlunsplit(parts._replace(path=base + "/beta")))


def _mistral_prefix(request: _Request, text: str) -> _Request | None:
    return request.and_then({"role": "assistant", "content": text, "prefix": True})


def _vllm_prefix(request: _Request, text: str) -> _Request | None:
    message = {"role": "assistant", "content": text}
    return request.and_then(message, continue_final_message=True, add_generation_prompt=False)


def _anthropic_prefill(request: _Request, text: str) -> _Request | None:
    if not _takes_prefill(request.model) or request.params.get("thinking") or not text:
        return None
    return request.and_then({"role": "assistant", "content": text})


def _takes_prefill(model: str) -> bool:
    """Whether a model of Anthropic continues a partial answer: those up to 4.5 do"""
    version = re.search(r"claude-(?:[a-z]+-)*(\d+)(?:[-.](\d{1,2}))?(?:\D|$)", model)
    return version is not None and (int(version.group(1)), int(version.group(2) or 0)) <= (4, 5)


_CONTINUATIONS = {
    "deepseek": _Continuation(_deepseek_prefix),
    "mistral": _Continuation(_mistral_prefix, echoes=True),
    "vllm": _Continuation(_vllm_prefix),
    "anthropic": _Continuation(_anthropic_prefill, strips=True),
}


def _continue(lost: _Lost) -> list[_Plan]:
    """The provider continues the text that was received"""
    rule = _CONTINUATIONS.get(lost.continuation)
    if rule is None or not _is_text_alone(lost):
        return []
    text = str(lost.answer.text)
    kept = text.rstrip() if rule.strips else text
    request = rule.request(_lowered(lost), kept)
    return [] if request is None else [_Continued(request, lost.answer, text[len(kept) :], rule.echoes)]


def _lowered(lost: _Lost) -> _Request:
    """The request with its limit of tokens lowered by those received"""
    received = _tokens_received(lost.answer)
    names = ("max_tokens", "max_completion_tokens", "max_output_tokens")
    limits = {name: _count(lost.request.params.get(name)) for name in names}
    return lost.request.and_then(**{name: max(1, limit - received) for name, limit in limits.items() if limit})


def _tokens_received(answer: _Answer) -> int:
    """The provider's count, or an estimate of four characters a token"""
    counted = answer.usage.output_tokens if answer.usage is not None else 0
    return max(counted, len(str(answer.text)) // 4)


#: characters, white space aside, by which a repetition of the answer is known: where the provider echoes or all of the
#: answer is repeated; and where a provider that does not echo repeats a part
_ECHO, _UNEXPECTED_ECHO = 4, 12


class _GoingOn(_Plan):
    """Another generation that continues what was returned; its usage counts both"""

    strategy, continuity, is_plain, is_billed, keeps_reader = "continue", "continued", False, True, False

    def __init__(self, request: _Request, answer: _Answer) -> None:
        ask = request.ask()
        super().__init__(ask, _new_dialect(request, ask))
        self._received = _tokens_received(answer)

    def _counted(self, chunk: Chunk) -> Chunk:
        usage = chunk.usage
        if usage is not None:
            output_tokens = usage.output_tokens + self._received
            total_tokens = usage.input_tokens + output_tokens
            usage = usage._replace(output_tokens=output_tokens, total_tokens=total_tokens, cost=None, source="estimate")
        # the events belong to another stream, and the parts kept for the vendor would not be whole
        return chunk._replace(usage=usage, event_id="", vendor=None)


class _Continued(_GoingOn):
    """Chunks that continue a text; where the provider ``echoes``, without the text that they repeat first

    Chunks are held back until it is known whether they repeat the text. StreamInterrupted where they repeat a part of
    it, or repeat it with other white space, or where a provider that does not echo repeats all of it. White space at
    the end of the text does not count: ``space`` is the part that was not sent, which is not returned twice.
    """

    def __init__(self, request: _Request, answer: _Answer, space: str, echoes: bool) -> None:
        super().__init__(request, answer)
        text = str(answer.text)
        self._text, self._space, self._echoes = text, space, echoes
        self._kept, self._begun = text.rstrip(), _squeezed(text)
        self._held: list[Chunk] | None = []  # None once it is known
        self._written, self._repeated = "", 0

    def check(self, chunk: Chunk) -> Iterable[Chunk]:
        if self._held is None:
            return self._spaced([chunk])
        self._held.append(chunk)
        self._written += chunk.text
        piece = _squeezed(chunk.text)
        common = _common(self._begun[self._repeated : self._repeated + len(piece)], piece)
        self._repeated += common
        is_behind = len(self._written) > len(self._text) and self._written.startswith(self._kept)
        return self.end() if common < len(piece) or is_behind else ()

    def end(self) -> Iterable[Chunk]:
        held, self._held = self._held or [], None
        if self._echoes and self._written.startswith(self._kept):
            # white space at the end of the echo may be missing
            end = len(self._kept)
            held = _from_position(held, end + _common(self._text[end:], self._written[end:]))
        elif self._repeated >= (_ECHO if self._echoes or self._repeated == len(self._begun) else _UNEXPECTED_ECHO):
            raise StreamInterrupted("the continuation repeats the answer, or a part of it", retryable=False)
        return self._spaced(held)

    def _spaced(self, chunks: Iterable[Chunk]) -> Iterable[Chunk]:
        """The chunks without the white space that was returned before"""
        spaced = []
        for chunk in chunks:
            common = _common(self._space, chunk.text) if self._space and chunk.text else 0
            if chunk.text:
                self._space = self._space[common:] if common == len(chunk.text) else ""
            if common < len(chunk.text) or not common:
                spaced.append(self._counted(chunk._replace(text=chunk.text[common:])))
        return spaced


def _squeezed(text: str) -> str:
    """The text without white space"""
    return "".join(text.split())


def _from_position(chunks: Iterable[Chunk], position: int) -> list[Chunk]:
    """The chunks without the first characters of their text"""
    rest = []
    for chunk in chunks:
        skipped = min(position, len(chunk.text))
        position -= skipped
        if skipped < len(chunk.text) or not skipped or chunk.finish_reason:
            rest.append(chunk._replace(text=chunk.text[skipped:]))
    return rest


#: characters that the model must repeat at least, and the fewest, white space aside, that prove anything
_ANCHOR, _PROOF = 40, 8


def _anchor(lost: _Lost) -> list[_Plan]:
    """The model must repeat its last words before it continues"""
    if not _is_text_alone(lost):
        return []
    tail = str(lost.answer.text)[-2 * _ANCHOR :]
    tail = tail[tail.rfind(" ", 0, max(0, len(tail) - _ANCHOR)) + 1 :]  # from the beginning of a word
    if len(_squeezed(tail)) < _PROOF:
        return []
    received = {"role": "assistant", "content": str(lost.answer.text)}
    order = {
        "role": "user",
        "content": (
            "Your answer was cut off by a lost connection. Go on with it. Begin by repeating, letter for letter and "
            f"without anything before it, these last words of it:\n```\n{tail}\n```\nThen continue right behind them, "
            "and repeat nothing else."
        ),
    }
    return [_Anchored(_lowered(lost).and_then(received, order), lost.answer, tail)]


class _Anchored(_GoingOn):
    """What follows the repeated words; StreamInterrupted, with nothing returned, where they are not repeated"""

    strategy = "anchor"

    def __init__(self, request: _Request, answer: _Answer, tail: str) -> None:
        super().__init__(request, answer)
        self._tail = tail
        self._held: list[Chunk] | None = []  # None once they were repeated
        self._written = ""

    def check(self, chunk: Chunk) -> Iterable[Chunk]:
        if self._held is None:
            return (self._counted(chunk),)
        if chunk.text:
            self._held.append(chunk)
            self._written += chunk.text
        length = len(self._tail)
        if not self._tail.startswith(self._written[:length]) or (chunk.finish_reason and len(self._written) < length):
            raise StreamInterrupted(
                "the model did not repeat its last words as it should, but wrote something else", retryable=False
            )
        if len(self._written) < length:
            return ()
        held, self._held = self._held or [chunk], None
        return map(self._counted, _from_position(held, length))

    def end(self) -> Iterable[Chunk]:
        if self._held is not None:
            raise StreamInterrupted(
                "the model did not repeat its last words as it should, but wrote nothing", retryable=False
            )
        return ()


#: each gives plans to try, in order
_STRATEGIES: dict[str, Callable[[_Lost], list[_Plan]]] = {
    "replay": _replay,
    "restart": _restart,
    "continue": _continue,
    "verify": _verify,
    "anchor": _anchor,
}
_AUTOMATIC = ("replay", "restart", "continue")


def _strategies(resume: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names of the strategies that ``resume=`` allows, in order"""
    if resume is None or resume == "auto":
        return _AUTOMATIC
    if resume == "never":
        return ()
    names = (resume,) if isinstance(resume, str) else tuple(resume)
    unknown = [name for name in names if name not in _STRATEGIES]
    if unknown or not names:
        raise ValueError(f"resume is 'auto', 'never', or of {', '.join(_STRATEGIES)}; got {resume!r}")
    return names


def _point(resume_from: Any) -> ResumePoint | None:
    """The point that ``resume_from=`` names, as it is or as JSON gave it back"""
    if resume_from is None or isinstance(resume_from, ResumePoint):
        return resume_from
    if isinstance(resume_from, SheepError):
        return resume_from.resume_point
    try:
        if isinstance(resume_from, Mapping):
            return ResumePoint(**resume_from)
        if isinstance(resume_from, (list, tuple)):
            return ResumePoint(*resume_from)
    except TypeError as error:
        raise ValueError(f"resume_from takes a resume_point as it was given: {error}") from error
    raise TypeError(f"resume_from takes an error or its resume_point, got {type(resume_from).__name__}")


#: what is returned next: a chunk, the events that end with it, and the usage of its generation so far
_Came = Tuple[Chunk, List[ServerSentEvent], Optional[Usage]]


class _Reading:
    """The answer of one connection: each turn parses a block into events, and these into chunks, for a queue"""

    def __init__(
        self,
        plan: _Plan,
        marks: _Marks,
        response: requests.Response,
        blocks: Iterator[bytes],
        format: str | None,
        max_event_size: int,
    ) -> None:
        content_type = response.headers.get("Content-Type") or ""
        self.plan, self.response = plan, response
        #: whether the answer is one JSON document
        self.is_document = _media_type(content_type) == "application/json"
        is_bounded = self.is_document and _has_known_end(response)
        self._body = _BodyDecoder(content_type, format, max_event_size, is_bounded)
        self._marks, self._blocks = marks, blocks
        #: of this generation, by the provider's count
        self.usage: Usage | None = None
        #: whether a piece of the answer was received, where it is one document
        self.has_content = False
        self.ended = False
        self._is_plain = plan.is_plain and not self.is_document
        self._is_checked = True  # whether the last chunk was found to belong to this answer

    def turn(self, queue: collections.deque[_Came]) -> None:
        """Reads a block, and queues its chunks"""
        plan = self.plan
        try:
            block = next(self._blocks, b"")
            events = (self._body.decoder or self._body).feed(block) if block else self._body.flush()
            for event in events:
                if not (plan.is_plain or plan.place(event)):
                    continue
                before = len(queue)
                try:
                    for chunk in plan.dialect.read(event):
                        self.usage = chunk.usage or self.usage
                        if self._is_plain:
                            queue.append((chunk, [], self.usage))
                        else:
                            self._take(chunk, queue)
                except SheepError:
                    if len(queue) > before:  # a part of the event is returned: the server must not repeat it
                        queue[-1][1].append(event)
                    raise
                if event.event == "ping":  # a server sends them at other places the next time
                    continue
                if queue:
                    queue[-1][1].append(event)
                else:
                    self._marks.first = self._marks.first or event
                    self._marks.recent.append(event)
                if plan.dialect.done:
                    break
            if not block or plan.dialect.done:
                self._end(queue)
        except (InvalidStreamError, StreamInterrupted, StreamTimeout) as error:
            if not (plan.dialect.whole and self._is_checked):
                raise
            # only the usage is lost, or the end of the connection
            plan.dialect.lost = isinstance(error, StreamInterrupted)
            self.ended = True

    def _take(self, chunk: Chunk, queue: collections.deque[_Came]) -> None:
        """Queues the new part of a chunk"""
        self.has_content = self.has_content or _has_content(chunk)
        self._is_checked = False
        queue.extend([(new, [], self.usage) for new in self.plan.check(chunk)])
        self._is_checked = True

    def _end(self, queue: collections.deque[_Came]) -> None:
        """The end of the answer, or of its body"""
        dialect = self.plan.dialect
        if not dialect.done:
            self._body.check_end()
        for chunk in dialect.last(not dialect.done):  # halves of characters, chunks held back
            self._take(chunk, queue)
        if self.is_document and not (self.has_content or dialect.whole):
            raise InvalidStreamError("expected an answer, got JSON that holds none; is the base URL that of the API?")
        dialect.require_whole()
        self.ended = True

    def end(self, queue: collections.deque[_Came]) -> None:
        """Queues the chunks that were held back"""
        queue.extend([(chunk, [], self.usage) for chunk in self.plan.end()])

    def read_out(self) -> None:
        """Reads the body to its end, which frees the connection; what follows the end marker means nothing"""
        for _ in _until_failure(self._blocks, []):
            pass


# ============================================================================================================
# 10. Checkpoints: an append-only journal of chunks that survives a kill. May use: Values and above
# ============================================================================================================
# Read here when a checkpoint is refused, or holds other than what was returned.
#
# A Stream holds a _Journal: the open file of one request, and its lock. A line holds a Chunk, and the CRC-32 of itself
# and of all lines before. The Stream writes a chunk, by one write, before it returns the chunk; so after a kill at any
# moment the file holds at least what was returned, and at most a torn last line, which the next writer cuts off.
#
# _Checkpoint names the file by the hash of the request. Opening it takes the lock (_locked), reads what was saved
# (_saved_in), and compares the header with the request; the Stream resumes from there. A journal that ends with
# _JOURNAL_END is complete: it is read without a lock, and nothing is requested. Any other damage than a torn last line
# is a CheckpointError, and so is what the operating system refuses (_file_errors); the file is left as it is.
#
# The relay keeps its events in files of the same lines (_Lines).

#: the words of Stream.continuity, the weakest last
_CONTINUITIES = ("single", "replayed", "verified", "restarted", "continued")
#: of the format; a journal of another version is left alone
_JOURNAL_VERSION = 1
#: the first bytes of each journal; the version follows
_JOURNAL_MAGIC = b'{"sheepsse":'
_JOURNAL_END = {"complete": True}
# not ASCII: two escaped lone surrogates would be read as one character
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
#: Windows cannot remove or replace an open file
_CAN_REPLACE_OPEN = os.name == "posix"
#: the byte that is locked on Windows: far behind the end, for nobody else can read a locked byte
_LOCKED_BYTE = (1 << 31) - 2
#: the ending of a new file while it is written
_NEW = ".new"


def _journal_lines(contents: Iterable[Any], checksum: int = 0) -> tuple[bytes, int]:
    """Lines of JSON, each with the CRC-32 of itself and of all lines before; and the last CRC-32"""
    lines = []
    try:
        for content in contents:
            data = _to_json(content).encode("utf-8", "surrogatepass")
            checksum = zlib.crc32(data, checksum)
            lines.append(b"%b %08x\n" % (data, checksum))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"a chunk cannot be kept, for it cannot be written as JSON: {error}") from error
    return b"".join(lines), checksum


def _chunk_fields(chunk: Chunk) -> dict[str, Any]:
    """The fields of a chunk for a line, without ``raw`` and without defaults"""
    defaults = chunk._field_defaults
    fields = {name: part for name, part in zip(chunk._fields, chunk) if name != "raw" and part != defaults[name]}
    if chunk.tool_calls:
        fields["tool_calls"] = [_changed_fields(call) for call in chunk.tool_calls]
    if chunk.usage is not None:
        fields["usage"] = _changed_fields(chunk.usage)
        if chunk.usage.cost is not None:
            fields["usage"]["cost"] = str(chunk.usage.cost)  # exact, unlike a number in JSON
    return fields


def _changed_fields(value: Any) -> dict[str, Any]:
    defaults = value._field_defaults
    return {name: part for name, part in zip(value._fields, value) if part != defaults[name]}


def _chunk_of_fields(fields: dict[str, Any]) -> Chunk:
    """The chunk of a line; an error for any other content"""
    _check_types(fields, _CHUNK_TYPES)
    for call in fields.get("tool_calls", ()):
        _check_types(call, _CALL_TYPES)
    fields["tool_calls"] = tuple(ToolCall(**call) for call in fields.get("tool_calls", ()))
    if "usage" in fields:
        usage = fields["usage"]
        _check_types(usage, _USAGE_TYPES)
        if "cost" in usage:
            from decimal import Decimal  # heavy, and few answers carry a cost

            usage["cost"] = Decimal(usage["cost"])
        fields["usage"] = Usage(**usage)
    return Chunk(**fields)


class _Saved(NamedTuple):
    """The content of a journal"""

    #: ``name`` and ``request``, where it was opened with them; empty without a line
    header: Mapping[str, Any] = {}
    chunks: Sequence[Chunk] = ()
    #: as Stream.continuity
    continuity: str = "single"
    complete: bool = False
    #: bytes of good lines; a torn line may follow
    size: int = 0
    #: of the last good line
    checksum: int = 0


def _is_journal(data: bytes) -> bool:
    """Whether a file is a journal, perhaps cut off in its first bytes"""
    return data.startswith(_JOURNAL_MAGIC) or _JOURNAL_MAGIC.startswith(data)


def _saved_in(data: bytes, path: str) -> _Saved:
    """The content of a journal without a torn last line; CheckpointError for any other damage"""
    if not _is_journal(data):
        raise CheckpointError(f"{path} is no checkpoint and was left as it is: choose another place, or move it away")
    lines = data.split(b"\n")
    torn = lines.pop()
    if not lines:  # killed while it wrote the first one
        return _Saved()
    version = re.match(rb"[0-9]{1,9}(?=[,}])", lines[0][len(_JOURNAL_MAGIC) :])
    if version and int(version.group()) != _JOURNAL_VERSION:
        raise CheckpointError(
            f"{path} is of version {version.group().decode()} of the format, and sheepsse {__version__} reads version "
            f"{_JOURNAL_VERSION}: use the sheepsse that wrote it, or remove it, and the request is sent again"
        )
    contents, size, checksum = _good_lines(lines, path)
    if len(contents) < len(lines) - (not torn) or not contents:
        raise _damaged(path, f"line {len(contents) + 1} is not as it was written")
    complete = contents[-1] == _JOURNAL_END
    lines_between = contents[1 : -1 if complete else None]
    notes = [fields["continuity"] for fields in lines_between if isinstance(fields, dict) and "continuity" in fields]
    try:
        chunks = [_chunk_of_fields(fields) for fields in lines_between if "continuity" not in fields]
        if not (isinstance(contents[0], dict) and set(notes) <= set(_CONTINUITIES)):
            raise ValueError("it was not written by sheepsse")
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise _damaged(path, f"a line is no chunk: {error}") from error
    return _Saved(contents[0], chunks, notes[-1] if notes else "single", complete, size, checksum)


def _good_lines(lines: Sequence[bytes], path: str, checksum: int = 0) -> tuple[list[Any], int, int]:
    """The content of the lines before the first bad line, their size in bytes, and the last checksum

    ``checksum`` is that of the line before them.
    """
    contents: list[Any] = []
    size = 0
    for line in lines:
        data = line[:-9]
        found = zlib.crc32(data, checksum)
        if line[-9:] != b" %08x" % found:
            break
        try:
            contents.append(json.loads(data.decode("utf-8", "surrogatepass")))
        except (ValueError, RecursionError) as error:
            raise _damaged(path, f"line {len(contents) + 1} is no JSON: {error}") from error
        size += len(line) + 1
        checksum = found
    return contents, size, checksum


def _damaged(path: str, how: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged, and was left as it is: {how}; bring back a whole copy, or "
        "remove it, and the request is sent again"
    )


def _failed(path: str, what: str, error: Exception) -> CheckpointError:
    """The error for a refusal of the operating system, in its words"""
    _raise_callers_own(error)
    reason = getattr(error, "strerror", None) or error
    return CheckpointError(f"{path} cannot be {what}: {reason}; mend that and try again, for what it holds is kept")


@contextlib.contextmanager
def _file_errors(path: str, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise _failed(path, what, error) from error


def _open(path: str, flags: int, shared: bool) -> io.FileIO:
    """The regular file at a path; FileNotFoundError where there is none"""
    import stat

    # a link could lead to any file of the user, and a pipe would block
    more = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    not_regular = CheckpointError(f"{path} is a link or no regular file, and was left as it is: choose another place")
    try:
        descriptor = os.open(path, flags | more, 0o600)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and os.path.islink(path):
            raise not_regular from error
        raise _failed(path, "opened", error) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise not_regular
        _check_owner(status, path, shared)
    except CheckpointError:
        os.close(descriptor)
        raise
    return io.FileIO(descriptor, "r" if flags == os.O_RDONLY else "r+")


def _opened(path: str, flags: int, shared: bool = False) -> io.FileIO | None:
    """The regular file at a path; None where there is none"""
    try:
        return _open(path, flags, shared)
    except FileNotFoundError:
        return None


def _created(path: str, flags: int = os.O_APPEND, shared: bool = False) -> io.FileIO:
    """The regular file at a path, for writing; made for its owner alone where there is none"""
    with _file_errors(path, "made"):
        return _open(path, flags | os.O_RDWR | os.O_CREAT, shared)


def _check_owner(status: os.stat_result, path: str, shared: bool) -> None:
    """CheckpointError for a file or folder that another user may write: the text would pass as an answer"""
    if not hasattr(os, "geteuid"):  # Windows has other rights
        return
    if status.st_uid not in (0, os.geteuid()):
        raise CheckpointError(f"{path} belongs to another user, and was left as it is: choose another place")
    if status.st_mode & (0o002 if shared else 0o022):
        who = "anybody" if status.st_mode & 0o002 else "its group"
        advice = "" if status.st_mode & 0o002 else ", or pass Checkpoints(dir, shared=True) if the group is trusted"
        raise CheckpointError(f"{path} may be written by {who}, and was left as it is: chmod go-w{advice}")


def _lock(file: io.FileIO) -> None:
    """Locks an open file, or raises OSError at once"""
    _change_lock(file, True)


def _unlock(file: io.FileIO) -> None:
    """Unlocks an open file, also where a forked process has it open"""
    _change_lock(file, False)


def _change_lock(file: io.FileIO, is_taken: bool) -> None:
    try:
        import fcntl
    except ImportError:
        import msvcrt

        file.seek(_LOCKED_BYTE)
        change = msvcrt.LK_NBLCK if is_taken else msvcrt.LK_UNLCK  # type: ignore[attr-defined]  # Windows alone has them
        msvcrt.locking(file.fileno(), change, 1)  # type: ignore[attr-defined]
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB if is_taken else fcntl.LOCK_UN)


def _is_locked(file: io.FileIO, path: str) -> bool:
    """Locks a file, or closes it where it was removed meanwhile; CheckpointError where another has the lock"""
    try:
        _lock(file)
        if os.path.samestat(os.fstat(file.fileno()), os.lstat(path)):
            return True
    except FileNotFoundError:
        pass
    except OSError as error:
        file.close()
        if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            raise CheckpointError(
                f"{path} is in use by another process or thread: wait for its end, or choose another name",
                retryable=True,
            ) from error
        raise _failed(path, "locked", error) from error
    file.close()
    return False


def _locked(path: str, flags: int, shared: bool = False) -> io.FileIO | None:
    """The file at a path, opened and locked; None where there is none"""
    while True:
        file = _opened(path, flags, shared)
        if file is None or _is_locked(file, path):
            return file


def _created_and_locked(path: str, shared: bool = False) -> io.FileIO:
    while True:
        file = _created(path, shared=shared)
        if _is_locked(file, path):
            return file


def _read_whole(file: io.FileIO, path: str) -> bytes:
    with _file_errors(path, "read"):
        file.seek(0)
        return file.readall()


def _saved_at(path: str, shared: bool = False) -> _Saved:
    """The content of the journal at a path, read without a lock; empty where there is no file"""
    file = _opened(path, os.O_RDONLY, shared)
    if file is None:
        return _Saved()
    with file:
        return _saved_in(_read_whole(file, path), path)


def _make_folder(path: str) -> None:
    folder = os.path.dirname(path) or "."
    with _file_errors(folder, "made"):
        os.makedirs(folder, 0o700, exist_ok=True)


def _checked_folder(folder: str, shared: bool = False) -> str:
    """The same folder; CheckpointError where others may write to it"""
    try:
        status = os.stat(folder or ".")
    except (OSError, ValueError):  # its first use raises
        return folder
    _check_owner(status, folder, shared)
    return folder


def _write_all(file: io.FileIO, data: bytes) -> None:
    left = memoryview(data)
    while left:  # a full disk takes a part, and refuses the rest
        left = left[os.write(file.fileno(), left) :]


def _remove(file: io.FileIO, path: str) -> None:
    """Removes a locked file, and a new file that a kill left behind"""
    if not _CAN_REPLACE_OPEN:
        file.close()
    for name in (path + _NEW, path):
        with _file_errors(name, "removed"), contextlib.suppress(FileNotFoundError):
            os.unlink(name)


class _Lines:
    """A file of JSON lines, a header first, that only grows; its writer holds the lock

    A torn last line is cut off before more is appended. Belongs to the process that opened it, not to a fork.
    """

    def __init__(self, path: str, header: Mapping[str, Any], file: io.FileIO | None, end: tuple[int, int]) -> None:
        self._path = path
        self._header = {"sheepsse": _JOURNAL_VERSION, **header}
        self._file = file
        self._end = end  # size and checksum of the good lines
        self._torn = True  # bytes may follow the good lines
        self._process = os.getpid()
        #: whether nothing may follow
        self.complete = False

    def write(self, contents: Sequence[Any]) -> None:
        """Appends lines, by one write; where the write fails with CheckpointError, all lines before are still there"""
        if self._file is None or self.complete:
            raise CheckpointError(f"{self._path} is complete or closed: open it with refresh=True to write it anew")
        size, checksum = self._end
        if not size:  # the header comes with the first line: a file without a chunk is an empty one
            contents, checksum = (self._header, *contents), 0
        lines, checksum = _journal_lines(contents, checksum)
        if self._torn:
            self.cut()
        self._torn = True  # until all is written, also after Ctrl-C
        try:
            _write_all(self._file, lines)
        except OSError as error:
            raise _failed(self._path, "written", error) from error
        self._end = size + len(lines), checksum
        self._torn = False

    def cut(self) -> None:
        """Cuts off all behind the last good line"""
        assert self._file is not None
        with _file_errors(self._path, "written"):
            os.ftruncate(self._file.fileno(), self._end[0])
        self._torn = False

    def sync(self) -> None:
        """Returns when all is on the disk"""
        assert self._file is not None
        with _file_errors(self._path, "written"):
            os.fsync(self._file.fileno())

    def remove(self) -> None:
        assert self._file is not None
        _remove(self._file, self._path)

    def close(self) -> None:
        """Releases the lock; may be called again"""
        file, self._file = self._file, None
        if file is not None:
            with file:
                if self._process == os.getpid():  # a fork that closes its copy does not release our lock
                    _unlock(file)


class _Journal(_Lines):
    """A file of chunks, which holds all that was appended after a kill at any moment

    It has a header, a line for each chunk, and a last line once it is complete. Belongs to one thread.
    """

    def __init__(self, path: str, header: Mapping[str, Any], saved: _Saved, file: io.FileIO | None) -> None:
        super().__init__(path, header, file, (saved.size, saved.checksum))
        #: saved before it was opened
        self.chunks = list(saved.chunks)
        self.continuity = saved.continuity
        self.complete = saved.complete

    @classmethod
    def open(
        cls,
        path: str,
        refresh: bool = False,
        *,
        name: str | None = None,
        request: str | None = None,
        shared: bool = False,
    ) -> _Journal:
        """Opens a journal to append to it; CheckpointError at once where another has it open

        ``refresh`` ignores the saved chunks, which the first append replaces. ``name`` and ``request`` must be those of
        the journal.
        """
        header = {key: value for key, value in (("name", name), ("request", request)) if value is not None}
        _make_folder(path)
        if not refresh:
            saved = _saved_if_complete(path, shared)
            if saved is not None:
                _check_header(saved, header, path)
                return cls(path, header, saved, None)
        file = _created_and_locked(path, shared)
        try:
            data = _read_whole(file, path)
            saved = _Saved() if refresh and _is_journal(data) else _saved_in(data, path)
            _check_header(saved, header, path)
        except BaseException:
            file.close()
            raise
        journal = cls(path, header, saved, file)
        if saved.complete:  # completed by another process meanwhile
            journal.close()
        return journal

    def __enter__(self) -> _Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def note(self, continuity: str) -> None:
        """Saves the continuity"""
        if continuity != self.continuity:
            self.write([{"continuity": continuity}])
            self.continuity = continuity

    def finish(self) -> None:
        """Marks the journal as complete; it is on the disk when this returns"""
        self.write([_JOURNAL_END])
        self.complete = True
        self.sync()

    def restart(self) -> None:
        """Ignores the saved chunks, which the next append replaces"""
        self.chunks, self.continuity, self.complete = [], "single", False
        self._end, self._torn = (0, 0), True

    def replace(self, chunks: Iterable[Chunk]) -> None:
        """Replaces the file by a complete one with these chunks, at once or not at all; closes it"""
        new = self._path + _NEW
        with contextlib.closing(_Lines(new, self._header, _created(new, os.O_TRUNC), (0, 0))) as lines:
            lines.write([*map(_chunk_fields, chunks), _JOURNAL_END])
            lines.sync()
        if not _CAN_REPLACE_OPEN:
            self.close()
        try:
            with _file_errors(self._path, "replaced"):
                os.replace(new, self._path)
        finally:
            self.close()


def _saved_if_complete(path: str, shared: bool = False) -> _Saved | None:
    """The content of a complete journal, read without a lock (many may read, also in a read-only folder); else None"""
    try:
        saved = _saved_at(path, shared)
    except CheckpointError:  # damaged, or just being cut: its opening under the lock decides
        return None
    return saved if saved.complete else None


def _check_header(saved: _Saved, header: Mapping[str, Any], path: str) -> None:
    """CheckpointError where a journal belongs to another name or request"""
    if not saved.size:
        return
    if "name" in header and saved.header.get("name") != header["name"]:
        raise CheckpointError(f"{path} holds the checkpoint {saved.header.get('name')!r}, not {header['name']!r}")
    if "request" in header and saved.header.get("request") != header["request"]:
        raise CheckpointError(
            f"the checkpoint {saved.header.get('name')!r} holds the answer to another request ({path}): give this one "
            f"another name, clear() that one, or pass refresh=True to have it replaced"
        )


def _request_key(request: Any) -> str:
    """The hash of a request, for any order of its keys"""
    import hashlib

    try:
        canonical = json.dumps(request, sort_keys=True, separators=(",", ":")).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the request cannot be written as JSON: {error}") from error
    return hashlib.sha256(canonical).hexdigest()


#: options that do not change the answer, or may hold a key: no part of the hash of a request
_NOT_HASHED = {
    *("alignment", "api_key", "breaker", "checkpoint", "client", "deadline", "fallback", "first_timeout", "headers"),
    *("idle_timeout", "limiter", "max_answer_size", "max_event_size", "on_retry", "prices", "refresh", "resume"),
    *("resume_from", "retry", "session", "timeout"),
}


class Checkpoints:
    """A folder of answers, whole or not: one file each, for the eyes of the user only

    ``expire()`` removes a checkpoint ``max_age`` seconds after its last change; nothing else removes checkpoints by
    age. A name may be any str: the file holds the name, and is called by its hash. A folder or file that another user
    (except root) owns, or that others may write, is a CheckpointError; with ``shared`` the group may write. Iteration
    gives the names. May be shared between threads; each checkpoint has one writer at a time. CheckpointError where the
    operating system refuses, or a file is damaged.
    """

    def __init__(self, dir: str | os.PathLike[str], max_age: float | None = None, shared: bool = False) -> None:
        self._folder = os.fsdecode(dir)
        self._max_age = max_age
        self._shared = shared

    def __repr__(self) -> str:
        return f"Checkpoints({self._folder!r}, max_age={self._max_age!r})"

    def key(self, messages: str | Iterable[Mapping[str, Any]], **params: Any) -> str:
        """A name for a request: the hash of its messages and of all options that change the answer

        The order of keys, the API key, headers, time-outs and the like do not matter.
        """
        hashed = {name: value for name, value in params.items() if name not in _NOT_HASHED}
        hashed.update(hashed.pop("extra_body", None) or {})
        return _request_key({"messages": _messages(messages), "params": hashed})

    def save(self, name: str, text: str) -> None:
        """Saves a text as a complete answer, in place of the one before; after a kill, either of the two is there"""
        with _Journal.open(self._path(name), refresh=True, name=name, shared=self._shared) as journal:
            journal.replace([Chunk(text=text)])

    def load(self, name: str) -> Completion | None:
        """The saved answer, ``complete`` or not; None where there is no checkpoint"""
        path = self._path(name)
        saved = _saved_at(path, self._shared)
        _check_header(saved, {"name": name}, path)
        if not saved.size:
            return None
        answer = _Answer()
        for chunk in saved.chunks:
            answer.add(chunk)
        answer.complete = saved.complete
        return answer.completion()

    def clear(self, name: str) -> None:
        """Removes a checkpoint, if there is one; CheckpointError where it is being written"""
        path = self._path(name)
        file = _locked(path, os.O_RDONLY, self._shared)
        if file is not None:
            with file:
                _remove(file, path)

    def expire(self) -> list[str]:
        """Removes checkpoints older than ``max_age`` that are not in use, and returns their names"""
        removed: list[str] = []
        if self._max_age is None:
            return removed
        for path in self._paths():
            try:
                file = _locked(path, os.O_RDONLY, self._shared)
            except CheckpointError as error:
                if error.retryable:  # in use
                    continue
                raise
            if file is not None:
                with file:
                    is_due = time.time() - os.fstat(file.fileno()).st_mtime > self._max_age
                    name, is_empty = _name_in(file, path), not os.fstat(file.fileno()).st_size
                    if is_due and (is_empty or name is not None):
                        _remove(file, path)
                        removed += [] if name is None else [name]
        return removed

    def __iter__(self) -> Iterator[str]:
        for path in self._paths():
            file = _opened(path, os.O_RDONLY, self._shared)
            if file is not None:
                with file:
                    name = _name_in(file, path)
                if name is not None:
                    yield name

    def named(self, name: str) -> _Checkpoint:
        """This checkpoint, for ``checkpoint=``; each name belongs to one request"""
        return _Checkpoint(self._folder, _checked_name(name), shared=self._shared)

    def _path(self, name: str) -> str:
        return os.path.join(_checked_folder(self._folder, self._shared), _file_name(_checked_name(name)))

    def _paths(self) -> list[str]:
        """The paths that may be checkpoints, sorted"""
        _checked_folder(self._folder, self._shared)
        names: list[str] = []
        with _file_errors(self._folder, "read"), contextlib.suppress(FileNotFoundError):
            names = sorted(os.listdir(self._folder))
        return [os.path.join(self._folder, name) for name in names if re.fullmatch(_FILE_NAME, name)]


class _Checkpoint(NamedTuple):
    """The place of the checkpoint of one call"""

    folder: str
    #: None means the hash of the request
    name: str | None = None
    #: distinguishes equal requests
    copy: str = ""
    shared: bool = False

    def open(self, request: str, refresh: bool = False) -> _Journal:
        """Opens the journal of a request, by its hash; CheckpointError where it belongs to another request"""
        request = self._key(request)
        name = request if self.name is None else self.name
        return _Journal.open(self._path(request), refresh, name=name, request=request, shared=self.shared)

    def is_complete(self, request: str) -> bool:
        """Whether the journal of a request, by its hash, is complete"""
        saved = _saved_if_complete(self._path(self._key(request)), self.shared)
        return saved is not None and saved.header.get("request") == self._key(request)

    def _key(self, request: str) -> str:
        return _request_key([request, self.copy]) if self.copy else request

    def _path(self, request: str) -> str:
        folder = _checked_folder(self.folder, self.shared)
        return os.path.join(folder, _file_name(request if self.name is None else self.name))


def _as_checkpoint(place: Any) -> _Checkpoint:
    """The place that ``checkpoint=`` names: a folder, Checkpoints, or one of them by name"""
    if isinstance(place, _Checkpoint):
        return place
    if isinstance(place, Checkpoints):
        return _Checkpoint(place._folder, shared=place._shared)
    if isinstance(place, (str, os.PathLike)):
        if not os.fspath(place):
            raise ValueError("checkpoint is the name of a folder, and this one is empty")
        return _Checkpoint(os.fsdecode(place))
    raise TypeError(f"checkpoint is a folder, Checkpoints(...) or Checkpoints(...).named(...), got {place!r}")


#: the form of _file_name
_FILE_NAME = r"(?a)(?:[\w-]+-)?[0-9a-f]{32}\.jsonl|[0-9a-f]{64}\.jsonl"


def _file_name(name: str) -> str:
    """The file of a name: a readable part of the name, and its hash, which differs wherever names do

    So no file leads out of the folder, has too long a name or the name of a device, or meets another where case does
    not count. The hash of a request stands for itself.
    """
    import hashlib

    if re.fullmatch("[0-9a-f]{64}", name):
        return f"{name}.jsonl"
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    shown = re.sub(r"[^\w-]+", "_", name[:40], flags=re.ASCII).strip("_-")
    return f"{shown}-{digest}.jsonl" if shown else f"{digest}.jsonl"


def _checked_name(name: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"the name of a checkpoint is a str, got {name!r}")
    return name


def _name_in(file: io.FileIO, path: str) -> str | None:
    """The name in the header of a file; None where there is none, or the file is no journal"""
    blocks = [b""]
    with _file_errors(path, "read"):
        while b"\n" not in blocks[-1]:
            blocks.append(file.read(_BLOCK))
            if not blocks[-1] or not _is_journal(blocks[1]):
                return None
    contents, _, _ = _good_lines(b"".join(blocks).split(b"\n", 1)[:1], path)
    name = contents[0].get("name") if contents else None
    return name if isinstance(name, str) and _file_name(name) == os.path.basename(path) else None


def record(chunks: Iterable[Chunk], path: str | os.PathLike[str]) -> Iterator[Chunk]:
    """The same chunks; each is saved in the file at ``path``, without its ``raw``, before it is returned

    The first ``next()`` makes the file anew, for the eyes of its owner only. The file is complete when ``chunks`` ends
    without an error. CheckpointError where the file cannot be written, or another process writes it.
    """
    with _Journal.open(os.fsdecode(path), refresh=True) as journal:
        journal.cut()
        for chunk in chunks:
            journal.write([_chunk_fields(chunk)])
            yield chunk
        journal.finish()


def replay(path: str | os.PathLike[str]) -> Iterator[Chunk]:
    """The chunks that ``record`` saved in a file

    StreamInterrupted, with ``partial``, at the end of a file that is not complete; CheckpointError where there is no
    such file, or the file is damaged.
    """
    path = os.fsdecode(path)
    saved = _saved_at(path)
    if not saved.size and not os.path.exists(path):
        raise CheckpointError(f"there is no checkpoint at {path}: record(chunks, path) makes one")
    answer = _Answer()
    for chunk in saved.chunks:
        answer.add(chunk)
        yield chunk
    if not saved.complete:
        error = StreamInterrupted(f"what is kept in {path} is not all: its writer was cut off, or is still writing")
        _set_partial(error, answer)
        raise error


# ============================================================================================================
# 11. Client: the sections above put together; the only one that opens sockets to a model. May use: all above
# ============================================================================================================
# Read here to see in what order things happen in a call.
#
# A Client checks its options once, and makes a Stream with a _Sender. Other senders stand by until something was
# returned: those of other clients, and one that requests the answer in one piece. The first next() opens the Stream
# (_open): a complete checkpoint answers without a request; else the Stream waits for a slot of the limiter and for the
# breaker (_admit), and the _Sender sends the request, again where the policy allows it, until a response has a status
# of success (send).
#
# Then _next takes one chunk from the queue, adds it to the answer, notes its event, writes it to the journal, and
# returns it. Where the queue is empty, _fill turns the loop until there is a chunk: each turn reads a block
# (_Reading.turn). _fill is the one place that handles a loss. Chunks that came before the loss are returned first; then
# _resume connects with the first plan that works (_try_strategies), or raises. A _Sender knows nothing of answers.
#
# All connections of a Stream use the same _Wire. cancel() and close() end it, which wakes the thread that waits.


class Provider(NamedTuple):
    """A row of PROVIDERS: the address of a provider, and its dialect

    key_variable: the environment variable of the key; "" where the provider takes no key
    key_page: the page where users get a key
    models: prefixes of the names of its models; empty where the provider serves any model
    check_path: the path that ``check`` requests where the list of models needs no key; else ""
    continuation: how the provider continues a partial answer: deepseek, mistral, vllm, anthropic, or "" where it cannot
    base_variable: the environment variable that replaces ``base_url``, as for the vendor's own SDK, or ""
    """

    base_url: str
    key_variable: str
    dialect: str
    key_page: str = ""
    models: tuple[str, ...] = ()
    check_path: str = ""
    continuation: str = ""
    base_variable: str = ""


PROVIDERS: dict[str, Provider] = {
    "holysheep": Provider(
        "https://api.holysheep.ai/v1", "HOLYSHEEP_API_KEY", "openai", "https://www.holysheep.ai/register"
    ),
    "openai": Provider(
        "https://api.openai.com/v1",
        "OPENAI_API_KEY",
        "openai",
        "https://platform.openai.com/api-keys",
        ("gpt-", "chatgpt-", "o1", "o3", "o4"),
        base_variable="OPENAI_BASE_URL",
    ),
    "openai-responses": Provider(
        "https://api.openai.com/v1",
        "OPENAI_API_KEY",
        "openai-responses",
        "https://platform.openai.com/api-keys",
        ("gpt-", "chatgpt-", "o1", "o3", "o4"),
        base_variable="OPENAI_BASE_URL",
    ),
    "deepseek": Provider(
        "https://api.deepseek.com",
        "DEEPSEEK_API_KEY",
        "openai",
        "https://platform.deepseek.com/api_keys",
        ("deepseek-",),
        continuation="deepseek",
    ),
    "anthropic": Provider(
        "https://api.anthropic.com",
        "ANTHROPIC_API_KEY",
        "anthropic",
        "https://console.anthropic.com/settings/keys",
        ("claude-",),
        continuation="anthropic",
        base_variable="ANTHROPIC_BASE_URL",
    ),
    "gemini": Provider(
        "https://generativelanguage.googleapis.com",
        "GEMINI_API_KEY",
        "gemini",
        "https://aistudio.google.com/apikey",
        ("gemini-", "gemma-", "learnlm-", "models/"),
        base_variable="GOOGLE_GEMINI_BASE_URL",
    ),
    "openrouter": Provider(
        "https://openrouter.ai/api/v1",
        "OPENROUTER_API_KEY",
        "openai",
        "https://openrouter.ai/settings/keys",
        check_path="/key",
    ),
    "mistral": Provider(
        "https://api.mistral.ai/v1",
        "MISTRAL_API_KEY",
        "openai",
        "https://console.mistral.ai/api-keys",
        ("mistral-", "ministral-", "magistral-", "codestral-", "devstral-", "pixtral-", "open-mi"),
        continuation="mistral",
    ),
    "ollama": Provider("http://localhost:11434", "", "ollama"),
}

#: headers in which a caller sends a key instead of api_key; gateways want a key of their own beside it
_KEY_STAND_INS = frozenset({"authorization", "x-api-key", "api-key", "x-goog-api-key"})

_PLACEHOLDER = r"(?is)\s*|your[_-].*|<.*>|changeme"


class _Target(NamedTuple):
    """Where requests go: the result of all that names a provider"""

    #: its name in PROVIDERS, or None
    provider: str | None
    base_url: str
    dialect: type[Dialect]
    #: the headers that carry the key
    key_headers: Mapping[str, str]
    #: the URL that ``check`` requests
    check_url: str
    #: how the provider continues a partial answer, or ""
    continuation: str


@functools.lru_cache(256)  # called twice for each call of a model
def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _provider_of_origin(base_url: str) -> str | None:
    return next((name for name, row in PROVIDERS.items() if _origin(row.base_url) == _origin(base_url)), None)


def _provider_of_environment(model: str | None) -> str:
    """The first provider with a key that serves the model; else the first provider with a key

    AuthenticationError where the model is one of another provider.
    """
    ready = [name for name, row in PROVIDERS.items() if not _is_placeholder(_key_of_environment(row))]
    serving = [name for name in ready if not PROVIDERS[name].models or (model or "").startswith(PROVIDERS[name].models)]
    owners = [row for row in PROVIDERS.values() if row.models and (model or "").startswith(row.models)]
    if ready and owners and not serving:
        raise AuthenticationError(
            f"no API key for {model}: set {owners[0].key_variable}, or pass provider=... and api_key=... "
            f"({', '.join(ready)}, which has a key, does not serve the model)"
        )
    return next(iter(serving or ready or PROVIDERS))


def _dialect_of_url(base_url: str) -> type[Dialect] | None:
    """The dialect of a base URL that is a whole endpoint; Google has one for OpenAI's API"""
    path = urlsplit(base_url).path.rstrip("/")
    if path.endswith("/v1beta/openai"):
        return DIALECTS["openai"]
    endpoints = (each for each in DIALECTS.values() if each.path and path.endswith("".join(each.roots[:1]) + each.path))
    return next(endpoints, None)


def _key_of_environment(row: Provider) -> str | None:
    return os.environ.get(row.key_variable) if row.key_variable else None


def _key_variables() -> str:
    """The environment variables of all keys, as a text"""
    return ", ".join(dict.fromkeys(row.key_variable for row in PROVIDERS.values() if row.key_variable))


def _is_placeholder(key: str | None) -> bool:
    return re.fullmatch(_PLACEHOLDER, key or "") is not None


def _checked_key(key: str | None, source: str, row: Provider | None) -> str:
    """A key that may be sent, or an AuthenticationError that says where to set one"""
    where = f"set {row.key_variable} to a key from {row.key_page}, or pass" if row and row.key_variable else "pass"
    advice = f"{where} api_key=...; api_key=False is for servers that take none"
    if not key:
        raise AuthenticationError(f"no API key in {source}: {advice}")
    key = _Key(key.strip())
    if key.lower().startswith("bearer "):
        raise AuthenticationError(f"{source} is the key alone, without the word Bearer before it")
    if _is_placeholder(key):
        raise AuthenticationError(f"{source} is a placeholder, not an API key: {advice}")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise AuthenticationError(f"{source} is no API key: it holds blanks, control characters or other than ASCII")
    return key


def _ascii_host(host: str) -> str:
    """A host name as requests sends it"""
    if host.isascii():
        return host
    import idna  # which requests brings

    return idna.encode(host, uts46=True).decode()


def _checked_url(base_url: str) -> str:
    try:
        parts = urlsplit(base_url)
        # urllib3 connects by a parser of its own: it must see the host by which the key was chosen
        host = (urllib3.util.parse_url(base_url).host or "").strip("[]").lower()
        same = host == _ascii_host(parts.hostname or "")
        clean = not re.search(r"[\x00-\x20\\]", base_url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and same and clean
    except (ValueError, urllib3.exceptions.LocationParseError):
        usable = False
    if not usable:
        raise InvalidRequestError(
            f"expected a base_url like https://api.example.com/v1, got {_public_url(base_url.rpartition('@')[2])!r}"
        )
    return base_url


class Health(NamedTuple):
    """The result of ``Client.check``

    status: ok, no_key, bad_key, http_error or unreachable
    latency: seconds from the request to the response; None where no response came
    models: the models that the provider lists for this key
    error: what is wrong, and what to do; None where nothing is
    """

    ok: bool
    status: str
    latency: float | None = None
    models: tuple[str, ...] = ()
    error: str | None = None


class StreamStats(NamedTuple):
    """Measurements of a stream so far; times in seconds

    ttfb, ttft: from the start to the headers of the first response, and to the first text that is not empty
    elapsed: from the start to the end, or to now
    longest_gap: the longest wait for a chunk after the first one
    chars: characters of text
    tokens_per_second: output tokens by the provider, from the first piece of the answer to the end; None where unknown
    attempts: requests sent
    reconnects: connections after a loss
    cached: whether the answer was read from a checkpoint
    usage_by_attempt: the usage of each generation that was requested; None where the provider has not counted
    """

    ttfb: float | None = None
    ttft: float | None = None
    elapsed: float = 0.0
    longest_gap: float = 0.0
    chunks: int = 0
    chars: int = 0
    tokens_per_second: float | None = None
    attempts: int = 0
    reconnects: int = 0
    cached: bool = False
    usage_by_attempt: tuple[Usage | None, ...] = ()


class _Clock:
    """The moments of one call, for its stats"""

    def __init__(self) -> None:
        self.start: float | None = None
        self.answered: float | None = None
        self.first_text: float | None = None
        self.first_piece: float | None = None  # also of reasoning and tool calls
        self.pieces = 0
        self.end: float | None = None
        self.longest_gap = 0.0
        self.chunks = 0
        self.chars = 0

    def note(self, chunk: Chunk, says: bool, came: float, waited: float = 0.0) -> None:
        """Counts a chunk; ``says`` is whether it holds a piece of the answer"""
        if self.chunks and waited > self.longest_gap:
            self.longest_gap = waited
        self.chunks += 1
        if says:
            self.pieces += 1
            if self.first_piece is None:
                self.first_piece = came
        if chunk.text and chunk.index == 0:
            self.chars += len(chunk.text)
            if self.first_text is None:
                self.first_text = came

    def since_start(self, moment: float | None) -> float | None:
        return None if moment is None or self.start is None else moment - self.start

    def stats(
        self, usages: Sequence[Usage | None], attempts: int, reconnects: int, cached: bool = False
    ) -> StreamStats:
        usage = usages[-1] if usages else None
        end = self.end if self.end is not None else time.monotonic()
        rate = None
        if usage is not None and usage.output_tokens and self.pieces > 1 and self.first_piece is not None:
            rate = usage.output_tokens / max(end - self.first_piece, 1e-6)
        return StreamStats(
            ttfb=self.since_start(self.answered),
            ttft=self.since_start(self.first_text),
            elapsed=self.since_start(end) or 0.0,
            longest_gap=self.longest_gap,
            chunks=self.chunks,
            chars=self.chars,
            tokens_per_second=rate,
            attempts=attempts,
            reconnects=reconnects,
            cached=cached,
            usage_by_attempt=tuple(usages),
        )


class _StreamClosed(SheepError):
    """close() was called while the reader waited: the stream ends without an error"""


#: the options for which None means no limit
_LIMITS = ("timeout", "first_timeout", "idle_timeout")


class _CallOptions(NamedTuple):
    """The options of a Client that a single call may replace"""

    retry: Retry
    timeout: tuple[float | None, float | None]
    first_timeout: float | None
    idle_timeout: float | None
    headers: Mapping[str, str]
    format: str | None
    max_event_size: int
    max_answer_size: int
    #: a Limiter, bound or not, or any object with its acquire()
    limiter: Any = None
    breaker: CircuitBreaker | None = None
    prices: Mapping[str, Price] | None = None

    def but(self, **changes: Any) -> _CallOptions:
        """The options with ``changes``; None is no change, or no limit; headers are merged"""
        given = {name: value for name, value in changes.items() if value is not None or name in _LIMITS}
        if "retry" in given:
            given["retry"] = _as_retry(given["retry"])
        if "timeout" in given:
            given["timeout"] = _as_pair(given["timeout"])
        if "headers" in given:
            given["headers"] = _Hidden({**self.headers, **given["headers"]})
        for name in ("first_timeout", "idle_timeout"):
            _limit(name, given.get(name))
        if "format" in given:
            formats = {"auto": None, "sse": "sse", "json": "json", "jsonl": "json"}
            if given["format"] not in formats:
                raise ValueError(f"format is one of {', '.join(formats)}, got {given['format']!r}")
            given["format"] = formats[given["format"]]
        for model, price in (given.get("prices") or {}).items():
            if not isinstance(price, Price):
                raise TypeError(f"prices are sheepsse.Price(input, output) by model, got {price!r} for {model!r}")
            for number in price:
                if number is not None:
                    _exact(number)
        return self._replace(**given)


def _as_retry(retry: Retry | int) -> Retry:
    if isinstance(retry, int):
        return Retry(retry)
    if isinstance(retry, Retry):
        return retry
    raise TypeError(f"retry takes a sheepsse.Retry or a number of retries, got {type(retry).__name__}")


class _Terms(NamedTuple):
    """The options of a single call that a Client has not"""

    deadline: float | None = None
    on_retry: Callable[[SheepError, int, float], object] | None = None
    checkpoint: Any = None
    refresh: bool = False
    resume: str | Sequence[str] = "auto"
    resume_from: Any = None
    alignment: TokenAlignment | None = None

    def checked(self) -> _Terms:
        """Coerce the options to the types that a Stream takes; errors for all others"""
        if self.checkpoint is not None and self.resume_from is not None:
            raise ValueError("a checkpoint knows where it was lost: pass it, or resume_from, not both")
        _limit("deadline", self.deadline)
        return self._replace(
            checkpoint=None if self.checkpoint is None else _as_checkpoint(self.checkpoint),
            resume=_strategies(self.resume),
            resume_from=_point(self.resume_from),
        )


#: seconds for the request to cancel a job
_GIVE_UP_TIME = 2.0
#: seconds to wait for the usage once the text is whole
_USAGE_WAIT = 5.0
#: seconds to read a body to its end after the end marker, so that the connection can be used again
_DRAIN_TIME = 0.05


def _is_late(wire: _Wire, after: float = 0.0) -> bool:
    """Whether the deadline of a call has passed, or will have passed ``after`` seconds from now"""
    return wire.deadline is not None and time.monotonic() + after >= wire.deadline


class _Sender:
    """Sends the requests of one client for one Stream, with retries; knows nothing of answers, nor of the Stream"""

    def __init__(
        self, client: Client, target: _Target, request: _Request, options: _CallOptions, terms: _Terms, is_owned: bool
    ) -> None:
        self.client, self.target, self.request, self.options = client, target, request, options
        #: whether the client closes with the Stream
        self.is_owned = is_owned
        #: whether the answer is requested in one piece, where no stream could be had
        self.is_fallback = False
        #: the first request
        self.ask = request.ask()
        self.alignment: _Alignment | None = None
        if terms.alignment is not None and terms.alignment.mode != "none":
            self.alignment = _Alignment(terms.alignment, request.messages, request.model)
        self.where = _public_url(self.ask.url)
        self.origin = _split_url(self.ask.url).netloc.rpartition("@")[2]
        self.response: requests.Response | None = None
        self._shown: requests.Response | None = None  # the last response that was freed of the key
        given_id = next((value for name, value in options.headers.items() if name.lower() == "x-request-id"), None)
        #: the X-Request-ID that is sent; the provider's id, where there is one
        self.own_request_id = self.request_id = given_id or _new_request_id()
        #: requests sent
        self.attempts = 0
        #: failures without progress
        self.failures = 0
        #: whether a piece of the answer was returned since the last failure
        self.has_progress = False
        self._secrets = client._secrets(target)

    def stands_in_for(self, other: _Sender, error: SheepError) -> bool:
        """Whether this sender may succeed where another one failed with the error"""
        if isinstance(error, (QueueFullError, QueueTimeoutError)) and self.has_limiter_of(other):
            return False
        if isinstance(error, CheckpointError):  # of this machine, not of a provider
            return False
        if not self.is_fallback:
            refusals = CircuitOpenError, QueueFullError, QueueTimeoutError, QuotaError
            return error.retryable or isinstance(error, refusals)
        if isinstance(error, InvalidRequestError):  # of a server that does not stream
            reported = _reported_error(_json(getattr(error.response, "content", b"") or b""), certain=True)
            return reported is not None and re.search(r"(?i)\bstream(ed|ing|s)?\b", reported.message) is not None
        return isinstance(error, (InvalidStreamError, StreamError, StreamInterrupted, StreamTimeout))

    def has_limiter_of(self, other: _Sender) -> bool:
        return _unbound(self.options.limiter) is _unbound(other.options.limiter)

    @property
    def checkpoint_key(self) -> str:
        """The hash of the request, which names its checkpoint"""
        request = self.request
        body = {name: value for name, value in (self.ask.body or {}).items() if name != "stream"}
        return _request_key([request.dialect.name, _url_without_keys(request.base_url), request.model, body])

    def send(
        self, ask: _HTTPRequest, wire: _Wire, lost: SheepError | None = None, retries_time_outs: bool = True
    ) -> requests.Response:
        """Returns a response with a status of success, after as many requests as the policy allows

        ``lost`` is the failure of a connection before: the wait for it comes first.
        """
        optional = self._optional(ask)
        is_refused, error = False, lost
        while True:
            if error is not None:
                if isinstance(error, StreamTimeout) and not retries_time_outs:
                    raise error
                self._back_off(error, wire)
            try:
                response = self._accepted(ask, self._sent(ask, {} if is_refused else optional, wire), wire)
            except SheepError as failure:
                error = self.judged(failure, wire)
                # a server may refuse what sheepsse added: the request is sent once more without it, which is no retry
                if not is_refused and error.status in (400, 422) and any(name in str(error) for name in optional):
                    is_refused, error = True, None
            else:
                if is_refused:
                    self.client._refusing.add(self.target.base_url)
                return response

    def _optional(self, ask: _HTTPRequest) -> dict[str, Any]:
        """What the dialect adds to the caller's body, unless this server refused it before"""
        if ask.body is None or self.target.base_url in self.client._refusing:
            return {}
        optional = self.target.dialect.optional(self.request.stream)
        return {name: value for name, value in optional.items() if name not in ask.body}

    def _sent(self, ask: _HTTPRequest, optional: Mapping[str, Any], wire: _Wire) -> requests.Response:
        """The response to one request, whatever its status"""
        if wire.ended:
            raise StreamInterrupted("ended before it was sent")
        data = None if ask.body is None else _json_body({**ask.body, **optional})
        self.attempts += 1
        where = _public_url(ask.url)
        _log.debug("request %s: %s %s, attempt %d", self.own_request_id, ask.method, where, self.attempts)
        first = self.options.first_timeout
        wire.expect(first, f"no chunk came for the first_timeout of {first} seconds")
        headers: dict[str, Any] = {
            "Accept": "text/event-stream" if self.request.stream else "application/json",
            "Cache-Control": "no-cache",
            "Content-Type": "application/json",
            "User-Agent": f"sheepsse/{__version__} {requests.utils.default_user_agent()}",
            "X-Request-ID": self.own_request_id,
            **self.options.headers,
            **ask.headers,
        }
        return self.client._send(self.target, wire, ask.method, ask.url, self.options.timeout[0], headers, data)

    def _accepted(self, ask: _HTTPRequest, response: requests.Response, wire: _Wire) -> requests.Response:
        """Returns the response where its status is a success, else raises its error"""
        self.response = response
        headers, status = response.headers, response.status_code
        given_id = headers.get("x-request-id") or headers.get("request-id")
        self.request_id = self._secrets.hide(given_id) if given_id else self.own_request_id
        _log.debug("request %s: status %d", self.own_request_id, status)
        if isinstance(self.options.limiter, (Limiter, _BoundLimiter)):
            longest = self.options.retry.max_retry_after
            self.options.limiter.apply_headers(headers, status, origin=self.origin, longest=longest)
        if status == 204:
            raise InvalidStreamError(
                f"expected an answer from {self.where}, got status 204, which has none", status=204
            )
        if 200 <= status < 300:
            return response
        try:
            body = _error_body(response, wire)
        finally:
            response.close()
        self.shown_response()
        # so that .text and .json() of the response of the error work, though the response is closed
        response._content = self._secrets.hide_bytes(body)
        response._content_consumed = True
        proxy = _proxy_of(self.client._via(), ask.url, self.client._request_options())
        error = _status_error(status, headers, body, self.where + (proxy and f" through the proxy {proxy}"))
        error.response, error.request = response, response.request
        raise error

    def _back_off(self, error: SheepError, wire: _Wire) -> None:
        """Waits before the next request, or raises the error where no request may follow"""
        retry = self.options.retry
        delay = retry.wait(error, self.failures + 1)
        if delay is not None and self.has_progress and error.retry_after is None and retry.should_retry is None:
            delay = 0.0  # the first reconnect after progress is immediate
        if delay is None or _is_late(wire, delay):
            raise error
        self.failures += 1
        self.has_progress = False
        self.pause(error, self.failures, delay, wire)

    def pause(self, error: SheepError, attempt: int, delay: float, wire: _Wire) -> None:
        """Reports the retry, and waits; raises where the call is ended meanwhile"""
        retry = self.options.retry
        if retry.on_retry:
            retry.on_retry(error, attempt, delay)
        _log.debug("request %s: %s; trying again in %.3f s", self.own_request_id, error.code, delay)
        (retry.sleep_function or wire.pause)(delay)
        if wire.ended:
            raise self.judged(error, wire)

    def judged(self, error: SheepError, wire: _Wire) -> SheepError:
        """The error for a failure, without the key; passed limits and ends from outside look like lost connections"""
        self._secrets.hide_error(error)
        if wire.ended == "cancelled":
            return StreamCancelled("the stream was cancelled")
        if wire.ended:
            return _StreamClosed()
        overdue = wire.overdue()
        if overdue and isinstance(error, (StreamTimeout, StreamInterrupted, ConnectError)):
            return StreamTimeout(f"{overdue}, asking {self.where}")
        return error

    def completed(self, error: SheepError) -> SheepError:
        """The error with request id, request and response, without the key"""
        error.request_id = error.request_id or self.request_id
        shown = self.shown_response()
        if error.response is None and shown is not None:
            error.response, error.request = shown, shown.request
        self._secrets.hide_error(error)
        return error

    def shown_response(self) -> requests.Response | None:
        """The response in use, from now on without the key; nobody else sees a response"""
        if self.response is not None and self.response is not self._shown:
            self._secrets.hide_response(self.response)
            self._shown = self.response
        return self.response

    def cancel_job(self, id: str) -> None:
        """Requests that the service cancel a job; a failure is only logged"""
        url = self.target.dialect.job_url(self.ask.url, self.ask.body or {}, id, "cancel")
        if not url:
            return
        wire = _Wire(_GIVE_UP_TIME, deadline=_GIVE_UP_TIME)
        headers = {"X-Request-ID": self.own_request_id, **self.options.headers}
        try:
            self.client._send(self.target, wire, "POST", url, _GIVE_UP_TIME, headers).close()
        except SheepError as error:
            self._secrets.hide_error(error)
            _log.debug("request %s: the job could not be cancelled: %s", self.own_request_id, error)


def _new_request_id() -> str:
    import uuid  # which imports subprocess, before Python 3.9

    return str(uuid.uuid4())


def _json_body(body: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(body, allow_nan=False).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the request cannot be written as JSON: {error}") from error


def _refused_with_200(error: StreamError) -> InvalidStreamError:
    """The error for a JSON document with status 200 that holds an error: no stream began"""
    message = str(error).partition(": ")[2]
    return InvalidStreamError(
        f"expected an answer, got status 200 with an error: {message}",
        vendor_code=error.vendor_code,
        request_id=error.request_id,
        retryable=error.retryable,
    )


def _both(first: Callable[[int], object], second: Callable[[int], object] | None) -> Callable[[int], object]:
    return first if second is None else lambda place: (first(place), second(place))


class Stream:
    """The answer to one request, as it is written: an iterator of str, each a piece of text that is not empty

    Iterable once; a context manager. The connection is opened at the first ``next()`` or on entering ``with``,
    so that making a Stream costs and sends nothing. It is released at the end, on an error, on leaving ``with``, by
    ``close()``, and when the Stream is collected. Iterating raises a SheepError where the answer cannot be received
    or made whole; its ``partial`` holds all that was received. Belongs to one thread, except ``cancel`` and ``close``.
    """

    # Nothing that a Stream owns refers to the Stream: a Stream that is dropped is freed at once

    def __init__(self, senders: Sequence[_Sender], terms: _Terms, answer: _Answer, marks: _Marks) -> None:
        self._spares = list(senders[1:])
        self._terms = terms
        self._wire = _Wire()  # one for all connections
        self._lock = threading.Lock()  # held by the thread that reads
        self._is_open = False
        self._is_of_batch = False  # which waits for its slots without limit
        self._is_over = False
        self._is_released = False  # whether nothing is held any more
        self._attempts_before = 0  # by senders before this one
        self._slot: ContextManager[object] | None = None  # of the limiter, while it is held
        self._admission: _Admission | None = None  # through the breaker
        self._use(senders[0], answer, marks)

    def _use(self, sender: _Sender, answer: _Answer, marks: _Marks) -> None:
        """Begins with a sender that has sent nothing yet"""
        self._sender = sender
        self._answer = answer
        self._marks = marks
        self._plan = self._first_plan()
        self._alignment = sender.alignment
        self._wire.read_timeout = sender.options.timeout[1]
        self._clock = _Clock()
        self._reconnects = 0
        self._continuity = "single"
        #: of each generation that was requested; None where the provider has not counted
        self._usages: list[Usage | None] = []
        self._journal: _Journal | None = None
        self._is_cached = False  # whether the answer is read from a checkpoint
        self._saved: Iterator[Chunk] | None = None  # the chunks of a checkpoint, to be returned first
        self._has_unreturned = False  # whether a checkpoint holds chunks, and none was returned yet
        self._queue: collections.deque[_Came] = collections.deque()
        self._failure: SheepError | None = None  # of the connection, behind what is in the queue
        self._reading: _Reading | None = None  # None where there is no more to read
        self._is_whole = False  # whether only the usage, or the end marker, may still come
        self._is_event_whole = False  # whether the last chunk was the last of its event
        self._is_awaited = False  # whether the time limit for the next chunk begins anew
        self._is_idle_awaited = False  # whether that limit is idle_timeout
        self._answered_at = 0.0
        self._received_at = time.monotonic()  # the last chunk, or the beginning
        self._waited = 0.0  # for the chunk that is returned next

    def _first_plan(self) -> _Plan:
        ask = self._sender.ask
        return _Plan(ask, _new_dialect(self._sender.request, ask))

    def __iter__(self) -> Stream:
        if self._is_over and self._answer.complete:
            raise RuntimeError("this stream has been read: its text is stream.text; stream() makes another request")
        return self

    def __await__(self) -> Any:
        raise TypeError("a Stream is read by for, in a thread: await asyncio.to_thread(list, stream)")

    __aiter__ = __await__

    def __repr__(self) -> str:
        if not self._is_open and not self._is_over:
            state = "not started, iterate it"
        else:
            state = f"{len(self.text)} characters, {'read to its end' if self._is_over else 'not at its end'}"
        return f"<Stream {self.model}: {state}>"

    def __next__(self) -> str:
        while True:
            chunk = self._read()
            if chunk is None:
                raise StopIteration
            if chunk.text and chunk.index == 0:
                return chunk.text

    def chunks(self) -> Iterator[Chunk]:
        """The same stream, as Chunks: with reasoning, refusals, tool calls, usage and every choice"""
        while True:
            chunk = self._read()
            if chunk is None:
                return
            yield chunk

    def _read(self, is_to_open: bool = False) -> Chunk | None:
        """The next chunk, None at the end; whatever ends the stream releases the connection"""
        if not self._lock.acquire(blocking=False):
            if self._wire.ended:  # and the thread that ended it holds the lock
                return None
            raise RuntimeError("a Stream belongs to one thread; only cancel() and close() may come from others")
        try:
            if self._is_open and self._wire.process != os.getpid():
                raise RuntimeError("this Stream was opened before a fork: the process that opened it reads it")
            while not self._is_over:
                try:
                    if not self._is_open:
                        self._open()
                    if is_to_open:
                        return None
                    chunk = self._next()
                except SheepError as error:
                    if not self._moved_to_spare(error):
                        raise
                    continue
                self._is_over = chunk is None
                return chunk
            return None
        except _StreamClosed:
            self._give_up()
            return None
        except SheepError as error:
            self._end_admission(self._outcome(error))
            if isinstance(error, StreamCancelled) or _is_late(self._wire):
                self._give_up()
            else:
                self._finish()
            self._report(error)
            raise error.with_traceback(None)  # noqa: B904  # our functions on the way may hold a URL with a key
        except BaseException:
            self._give_up()
            raise
        finally:
            self._lock.release()
            if self._wire.ended == "closed" and not self._is_over:  # close() found the lock held
                self.close()

    # Opening: a checkpoint, a slot, the first response

    def _open(self) -> None:
        """Opens the first connection, or a complete checkpoint"""
        terms = self._terms
        if self._spares and terms.checkpoint is not None and not terms.refresh:
            # a complete checkpoint answers, whichever client it is of
            senders = [self._sender, *self._spares]
            saved = (each for each in senders if terms.checkpoint.is_complete(each.checkpoint_key))
            sender = next(saved, self._sender)
            if sender is not self._sender:
                self._use(sender, _Answer(), _Marks())
        self._wire.begin_process()
        self._received_at = time.monotonic()
        if self._clock.start is None:
            self._clock.start = self._received_at
        if terms.deadline is not None:
            self._wire.deadline = self._clock.start + terms.deadline
        is_begun = terms.resume_from is not None
        self._is_whole = is_begun and self._lacks_only_its_end
        if terms.checkpoint is not None:
            self._journal = terms.checkpoint.open(self._sender.checkpoint_key, terms.refresh)
        if self._journal is None or not self._journal.complete:
            self._admit()
        if self._journal is not None:
            self._load(self._journal)
            is_begun = self._has_unreturned
        if not (self._is_whole or (is_begun and self._resume_elsewhere(terms.resume))):
            self._begin()
        self._is_open = True

    def _admit(self) -> None:
        """Waits for a slot of the limiter, and for the breaker, before anything is sent"""
        limiter, breaker = self._sender.options.limiter, self._sender.options.breaker
        if breaker is not None and self._admission is None:
            breaker.check()  # an open breaker makes the wait useless
        if limiter is not None and self._slot is None:
            slot = self._acquired(limiter)
            slot.__enter__()
            self._slot = slot
        if breaker is not None and self._admission is None:
            self._admission = breaker.enter()

    def _acquired(self, limiter: Any) -> ContextManager[object]:
        if isinstance(limiter, Limiter):
            limiter = limiter.bind()
        if not isinstance(limiter, _BoundLimiter):
            slot: ContextManager[object] = limiter.acquire()
            return slot
        deadline = self._wire.deadline
        try:
            return limiter.limiter._acquire(
                limiter.priority,
                limiter.user,
                limiter.on_position,
                timeout=None if deadline is None else deadline - time.monotonic(),
                bell=self._wire.wake,
                check=self._check_not_ended,
                origin=self._sender.origin,
                is_batch=self._is_of_batch,
            )
        except QueueTimeoutError as error:
            if not _is_late(self._wire):
                raise
            raise StreamTimeout("the deadline of the call has passed, waiting for a slot of the limiter") from error

    def _release_slot(self) -> None:
        slot, self._slot = self._slot, None
        if slot is not None:
            slot.__exit__(None, None, None)

    def _check_not_ended(self) -> None:
        if self._wire.ended:
            raise self._sender.judged(StreamInterrupted("ended before it was sent"), self._wire)

    def _report_position(self, report: Callable[[int], object]) -> None:
        """Reports the position in the queue of the Limiter to ``report``, in the thread that reads"""
        for sender in (self._sender, *self._spares):
            limiter = sender.options.limiter
            if isinstance(limiter, Limiter):
                limiter = limiter.bind()
            if isinstance(limiter, _BoundLimiter):
                limiter = limiter._replace(on_position=_both(report, limiter.on_position))
                sender.options = sender.options._replace(limiter=limiter)

    def _load(self, journal: _Journal) -> None:
        """Takes the chunks of a checkpoint as received"""
        for chunk in journal.chunks:
            self._answer.add(chunk)
        marks = _marks_of([chunk.event_id for chunk in journal.chunks])
        if marks:
            self._marks = _Marks(marks)
        self._continuity = journal.continuity
        self._has_unreturned = bool(journal.chunks)
        self._is_whole = journal.complete or self._lacks_only_its_end
        if self._is_whole and not journal.complete and not self._resume_for_usage():
            journal.finish()
        self._is_cached = journal.complete

    @property
    def _lacks_only_its_end(self) -> bool:
        """Whether an answer lacks only its end marker, and perhaps its usage"""
        return self._plan.dialect.choices == 1 and self._answer.settled and self._answer.finish not in (None, "other")

    def _resume_for_usage(self) -> bool:
        """Connects for the usage that a checkpoint lacks, where that is not billed; False where it cannot"""
        try:
            is_allowed = self._answer.usage is None and "replay" in self._terms.resume
            return is_allowed and self._resume_elsewhere(("replay",))
        except SheepError as error:
            judged = self._sender.judged(error, self._wire)
            _log.debug("request %s: the usage is lost: %s", self._sender.own_request_id, judged)
            return False

    def _begin(self) -> None:
        """Connects for a fresh answer; nothing that was received before is used"""
        if self._answer.given and self._journal is None:
            raise StreamInterrupted("no strategy can resume from what was received before", retryable=False)
        plan = self._first_plan()
        self._connect(plan)
        self._usages.append(None)
        if self._has_unreturned and self._journal is not None:
            own_id = self._sender.own_request_id
            _log.info("request %s: nothing can be resumed from the checkpoint; the request is sent again", own_id)
            self._journal.restart()
            self._continuity = "restarted"
        self._has_unreturned = False
        self._answer, self._marks = _Answer(), _Marks()

    def _connect(self, plan: _Plan, lost: SheepError | None = None) -> None:
        """Connects by a plan; the wait for the failure before comes first"""
        retries_time_outs = not self._spares or self._answer.given  # else another client would wait as long again
        self._sender.send(plan.ask, self._wire, lost, retries_time_outs)
        self._answered_at = time.monotonic()
        if self._clock.answered is None:
            self._clock.answered = self._answered_at
        self._plan = plan

    def _moved_to_spare(self, error: SheepError) -> bool:
        """Takes another sender in place of one by which nothing was returned; False where there is none"""
        failed = self._sender
        is_ended = self._wire.ended or _is_late(self._wire)
        if is_ended or self._clock.pieces or self._terms.resume_from is not None:
            return False
        spare = None
        while self._spares and spare is None:
            sender = self._spares.pop(0)
            spare = sender if sender.stands_in_for(failed, error) else None
        if spare is None:
            return False
        _log.info("request %s: %s; the next client is tried: %s", failed.own_request_id, error.code, error)
        if not spare.has_limiter_of(failed):
            self._release_slot()
        if spare.options.breaker is not failed.options.breaker:
            self._end_admission(self._outcome(error))
            self._admission = None
        self._release()
        self._attempts_before += failed.attempts
        spare.own_request_id = spare.request_id = failed.own_request_id
        start = self._clock.start
        self._use(spare, _Answer(), _Marks())
        self._clock.start = start
        self._is_open = False
        return True

    # Reading

    def _next(self) -> Chunk | None:
        """The next chunk, None at the end of the answer"""
        if self._wire.ended or (self._wire.deadline is not None and _is_late(self._wire) and not self._has_all):
            raise self._sender.judged(StreamTimeout("the deadline of the call has passed"), self._wire)
        if self._saved is None:
            self._saved = self._confirmed_chunks()
        saved = next(self._saved, None)
        if saved is not None:
            self._is_event_whole = True
            self._clock.note(saved, _has_content(saved), time.monotonic())
            return saved
        if not self._queue and not self._fill():
            self._complete()
            return None
        chunk, events, usage = self._queue.popleft()
        says = self._answer.add(chunk)
        self._clock.note(chunk, says, self._received_at, self._waited)
        self._waited, self._is_event_whole = 0.0, bool(events)
        if events:
            self._marks.first = self._marks.first or events[0]
            self._marks.recent.extend(events)
        if usage is not None:
            self._usages[-1:] = [usage]
        if says:
            self._sender.has_progress = True
        if says or chunk.finish_reason or self._plan.dialect.whole:  # else the chunk is like a ping
            self._is_awaited = True
        if self._answer.size > self._sender.options.max_answer_size:
            raise StreamError(
                f"the answer is larger than {self._sender.options.max_answer_size} bytes: raise max_answer_size if so "
                "much is meant",
                retryable=False,
            )
        if self._journal is not None:
            if self._journal.continuity != self._continuity:
                self._journal.note(self._continuity)
            # after a kill, a stream resumes only after an event with an id of its own
            is_known = not chunk.event_id or self._has_own_id
            self._journal.write([_chunk_fields(chunk if is_known else chunk._replace(event_id=""))])
        if self._alignment is not None:
            self._alignment.note(self._answer, self._clock.chunks)
        return chunk

    @property
    def _has_own_id(self) -> bool:
        """Whether the last chunk ends an event that has an id of its own"""
        return self._is_event_whole and bool(self._marks.cursor)

    @property
    def _has_all(self) -> bool:
        """Whether the answer is whole, and no piece of it is in the queue"""
        is_whole = self._is_whole or self._plan.dialect.whole
        return self._is_cached or (is_whole and not any(_has_content(chunk) for chunk, _, _ in self._queue))

    def _confirmed_chunks(self) -> Iterator[Chunk]:
        """The chunks of a checkpoint, which are returned once the new connection has given its first chunk"""
        if self._sender.response is not None and not self._is_cached:
            self._begin_reading()
        if self._has_unreturned:
            self._fill()
            self._has_unreturned = False
        return iter(self._journal.chunks if self._journal is not None else ())

    def _begin_reading(self) -> None:
        """Begins to read the connection that was opened"""
        response, options = self._sender.response, self._sender.options
        assert response is not None
        blocks = _limited_blocks(response, self._wire)
        self._reading = _Reading(self._plan, self._marks, response, blocks, options.format, options.max_event_size)
        self._is_idle_awaited = False
        if self._wire.due is not None:  # the caller's own time does not count
            self._wire.due += time.monotonic() - self._answered_at

    def _fill(self) -> bool:
        """Reads until the queue has a chunk; False at the end. The one place that handles a loss"""
        began = time.monotonic()
        while not self._queue:
            reading, failure = self._reading, self._failure
            if failure is None and reading is None:
                return False
            try:
                if failure is not None:
                    self._failure = None
                    raise failure
                assert reading is not None
                if self._is_awaited:
                    self._is_awaited = False
                    if reading.plan.dialect.whole or not self._is_idle_awaited:
                        self._expect(reading.plan.dialect.whole)
                    elif self._sender.options.idle_timeout is not None:
                        self._wire.due = began + self._sender.options.idle_timeout
                reading.turn(self._queue)
                if reading.ended:
                    self._end_answer(reading)
            except SheepError as error:
                if failure is None and reading is not None:
                    error = self._lost(error, reading)
                if not self._queue:
                    self._reconnect(error)
                    continue
                # what came before the loss is returned first
                self._failure = error
                for link in _chain(error):
                    link.__traceback__ = None  # whose frames hold the Stream, which would hold itself
            except BaseException:
                self._close_reading()
                raise
        self._received_at = time.monotonic()
        self._waited = self._received_at - began
        return True

    def _expect(self, is_whole: bool) -> None:
        """Sets the time limit for the next chunk, or for the usage where the answer is whole"""
        idle = self._sender.options.idle_timeout
        self._is_idle_awaited = not is_whole
        if is_whole:
            self._wire.expect(min(_USAGE_WAIT, _USAGE_WAIT if idle is None else idle), "no usage came")
        else:
            self._wire.expect(idle, f"no chunk came for the idle_timeout of {idle} seconds")

    def _end_answer(self, reading: _Reading) -> None:
        """Handles the end of the answer on this connection"""
        if self._wire.ended:
            raise StreamInterrupted("ended from outside")
        if reading.plan.dialect.done:
            self._wire.expect(_DRAIN_TIME, "the body did not end after its end marker")
            reading.read_out()
        elif reading.plan.dialect.lost and reading.usage is None and self._answer.usage is None:
            self._is_whole = True
            raise StreamInterrupted("the connection was lost between the answer and its usage")
        if reading.usage is not None and not self._queue:
            self._usages[-1:] = [reading.usage]
        self._close_reading()
        reading.end(self._queue)

    def _close_reading(self) -> None:
        """Gives the connection back, or closes it"""
        reading, self._reading = self._reading, None
        self._wire.detach()
        if reading is not None:
            reading.response.close()

    def _complete(self) -> None:
        """Ends a whole answer that was returned to its end"""
        if self._journal is not None and not self._is_cached:
            self._journal.note(self._continuity)
            self._journal.finish()
        if self._alignment is not None:
            self._align(self._alignment)
        self._answer.complete = True
        self._end_admission(True if self._sender.attempts else None)
        self._finish()

    def _align(self, alignment: _Alignment, cut: bool = False) -> None:
        self._alignment = None
        self._answer.usage = alignment.aligned(self._answer, self._plan.dialect.choices, cut)
        self._usages[-1:] = [self._answer.usage]

    # Resuming: a loss, the next plan

    def _lost(self, error: SheepError, reading: _Reading) -> SheepError:
        """Closes a connection that failed, and gives the error for it"""
        if reading.is_document and isinstance(error, StreamError) and not (self._answer.given or reading.has_content):
            error = _refused_with_200(error)
        self._close_reading()
        if reading.plan.uses_ids and isinstance(error, StreamInterrupted) and not error.retryable:
            self._forget_ids()
        judged = self._sender.judged(error, self._wire)
        judged.__cause__ = error.__cause__
        return judged

    def _forget_ids(self) -> None:
        """The server has given another answer, whose events may have the ids of this one: none resumes from them"""
        self._marks = _Marks()
        if self._journal is not None:
            self._journal.write([_chunk_fields(Chunk())])  # a chunk without an id, which cannot be resumed after

    def _reconnect(self, lost: SheepError) -> None:
        """Reads on by another connection; raises the error where there is none"""
        try:
            self._resume(lost)
        except SheepError as error:
            if not self._is_whole or self._wire.ended:
                raise
            own_id = self._sender.own_request_id
            _log.debug("request %s: the answer is whole, what follows it is lost: %s", own_id, error)
        else:
            self._begin_reading()

    def _resume(self, lost: SheepError) -> None:
        """Connects again after a loss; raises the error where no plan works"""
        if self._wire.ended:
            raise lost
        if self._plan.dialect.pending:
            self._poll_again(lost)
            return
        is_last_try = self._sender.failures + 1 >= self._sender.options.retry.total
        try:
            if is_last_try and self._has_unreturned and isinstance(lost, StreamInterrupted) and lost.__cause__ is None:
                raise lost  # the server ends the stream each time: the last request is for a fresh answer
            if lost.retryable:
                if self._try_strategies(self._terms.resume, self._lost_state(), lost):
                    return
                self._is_whole = self._is_whole or (self._lacks_only_its_end and bool(self._terms.resume))
                if self._terms.resume == _AUTOMATIC and self._answer.given and not self._is_whole:
                    self._advise(lost)
            raise lost
        except StreamInterrupted as error:
            if error is not lost or not self._has_unreturned or self._is_whole or _is_late(self._wire):
                raise
            self._resume_otherwise(lost)

    def _advise(self, lost: SheepError) -> None:
        """Adds to the message of a loss what the caller has, and can do"""
        server, count = self._sender.target.provider or "this server", len(str(self._answer.text))
        lost.args = (
            f"{lost}. {server} cannot continue an answer: error.partial has the {count} characters that came. Use them "
            "as they are, or pass resume='verify': the request is then sent and billed again, and only what is missing "
            "is returned",
        )

    def _resume_otherwise(self, failed: SheepError) -> None:
        """Resumes a checkpoint by the strategies after one that failed, and at last afresh"""
        self._sender.failures += 1
        if self._sender.failures > self._sender.options.retry.total:
            raise failed
        _log.info("request %s: %s", self._sender.own_request_id, failed)
        names = self._terms.resume
        if not self._resume_elsewhere(names[names.index(self._plan.strategy) + 1 :]):
            self._begin()

    def _resume_elsewhere(self, names: Sequence[str]) -> bool:
        """Connects to resume an answer of another call or process; False where no strategy works"""
        return self._try_strategies(names, self._lost_state()._replace(dialect=None, given=None), None)

    def _lost_state(self) -> _Lost:
        is_kept = self._plan.keeps_reader
        return _Lost(
            self._sender.request,
            self._sender.ask,
            self._answer.without_failure(),
            self._plan.dialect if is_kept else None,
            self._marks if is_kept else _Marks(),
            self._sender.target.continuation,
            self._plan.given if is_kept else None,
        )

    def _try_strategies(self, names: Sequence[str], state: _Lost, lost: SheepError | None) -> bool:
        """Connects with the first strategy that works; False where none does"""
        since = time.monotonic()
        is_spent = (
            len(self._usages) > self._sender.options.retry.total
        )  # a limit for all requests that are billed again
        has_ended = isinstance(lost, StreamError) and bool(self._answer.finish_reason)  # nothing more follows
        for name in names:
            wait_for = lost
            for plan in _STRATEGIES[name](state):
                if (has_ended and not plan.is_billed) or (plan.is_fresh and lost is None):
                    continue
                if plan.is_billed and (is_spent or self._refusal(plan) in self._sender.client._refusing):
                    continue
                if self._is_accepted(plan, lost, wait_for):
                    self._adopt(plan, since)
                    return True
                wait_for = None
        return False

    def _is_accepted(self, plan: _Plan, lost: SheepError | None, wait_for: SheepError | None) -> bool:
        """Connects by a plan; False where the server refuses it, errors that no other plan can mend are raised"""
        if plan.resets_budget and self._sender.has_progress:
            self._sender.failures = 0
        try:
            self._connect(plan, wait_for)
        except (InvalidRequestError, ModelNotFoundError) as refused:
            _log.debug("request %s: %s refused: %s", self._sender.own_request_id, plan.strategy, refused)
            if plan.is_fresh:
                raise
            if plan.is_billed:
                self._sender.client._refusing.add(self._refusal(plan))
            return False
        except (ConnectError, RateLimitError, ServerError, StreamTimeout) as failure:
            if (
                lost is None
                or failure is lost
                or not self._answer.given
                or self._has_unreturned
                or _is_late(self._wire)
            ):
                raise
            raise lost from failure
        return True

    def _refusal(self, plan: _Plan) -> str:
        """Key under which a refused plan is remembered"""
        return f"{plan.strategy} {self._sender.request.model} at {self._sender.target.base_url}"

    def _adopt(self, plan: _Plan, since: float) -> None:
        """Adopts a plan that the server accepted"""
        if plan.is_billed:
            self._usages.append(None)
            self._marks = _Marks()
        if plan.is_fresh:
            self._answer = _Answer()
            if self._journal is not None:
                self._journal.restart()
        self._reconnects += 1
        self._continuity = max(self._continuity, plan.continuity, key=_CONTINUITIES.index)
        own_id, on_reconnect = self._sender.own_request_id, self._sender.options.retry.on_reconnect
        _log.info("request %s: the stream was lost, and is resumed (%s)", own_id, plan.continuity)
        if on_reconnect:
            on_reconnect(self._attempts, time.monotonic() - since)

    def _poll_again(self, lost: SheepError) -> None:
        """Requests an unfinished job again, within the time limits; polling is not billed"""
        options = self._sender.options
        delay = options.retry.backoff(self._attempts)
        limit = options.idle_timeout if self._answer.given else options.first_timeout
        if limit is not None and time.monotonic() + delay - self._received_at > limit:
            raise StreamTimeout(f"the response is not whole yet, and no chunk came for {limit} seconds") from lost
        if _is_late(self._wire, delay):
            raise lost
        self._sender.pause(lost, self._attempts, delay, self._wire)
        plan = _poll(self._lost_state())
        if plan is None or not self._is_accepted(plan, lost, None):
            raise lost

    # Ending

    def _end_admission(self, success: bool | None) -> None:
        """Reports to the breaker how the call ended; only the first report counts"""
        if self._admission is not None:
            self._admission.end(success)

    def _outcome(self, error: SheepError) -> bool | None:
        """What an error means for the breaker; None where nothing was sent, or the caller's own deadline has passed"""
        return None if not self._sender.attempts or _is_late(self._wire) else _was_success(error)

    def _report(self, error: SheepError) -> None:
        """Completes an error that goes to the caller, and logs it"""
        self._answer.complete = False
        marks = self._marks.known if not self._plan.dialect.holds_half else ()  # another process would lose the half
        _set_partial(error, self._answer, marks)
        error.partial = self.completion
        self._sender.completed(error)
        if isinstance(error, StreamCancelled):
            return
        level = logging.WARNING if self._answer.given else logging.DEBUG
        _log.log(level, "request %s: %s: %s", self._sender.own_request_id, error.code, error)
        on_give_up = self._sender.options.retry.on_give_up
        if on_give_up:
            on_give_up(error, self._attempts)

    def _give_up(self) -> None:
        """Cancels the job of an answer that nobody waits for, and releases all that is held"""
        try:
            if not self._answer.complete and self._wire.is_own:
                self._sender.cancel_job(self._answer.id)
        finally:  # the job's server, or a second Ctrl-C, may raise anything
            self._finish()

    def _release(self) -> None:
        """Releases the connection and the journal; may be called again"""
        self._wire.detach()
        try:
            if self._sender.response is not None:
                self._sender.response.close()
        finally:
            if self._journal is not None:
                self._journal.close()

    def _finish(self) -> None:
        """Releases all that is held; may be called again"""
        self._is_over = True
        if self._clock.end is None and self._clock.start is not None:
            self._clock.end = time.monotonic()
        with contextlib.ExitStack() as held:  # released in reverse order, and all where one cannot be
            held.callback(self._end_admission, None)
            if self._sender.is_owned:
                held.callback(self._sender.client.close)
            if self._alignment is not None and self._answer.given:
                held.callback(self._align, self._alignment, cut=True)
            held.callback(self._release_slot)
            held.callback(self._release)
        self._is_released = True

    def __enter__(self) -> Stream:
        self._read(is_to_open=True)
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Ends the stream without an error, and releases its connection; from any thread, any number of times"""
        self._wire.end("closed")
        if self._lock.acquire(blocking=False):  # else the reader's thread wakes, and closes
            try:
                if not self._is_over:
                    self._give_up()
                elif not self._is_released:
                    self._finish()
            finally:
                self._lock.release()

    def cancel(self) -> None:
        """Ends the stream, from any thread and at any time: its reader gets StreamCancelled

        At once while it waits for headers or for bytes, or between two tries; while it connects, within the
        connect time-out. With a ``session=`` of your own a wait for headers ends only with the headers.
        """
        self._wire.end("cancelled")

    # What came so far

    @property
    def text(self) -> str:
        """The text so far"""
        return str(self._answer.text)

    @property
    def reasoning(self) -> str:
        """The reasoning so far"""
        return str(self._answer.reasoning)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The tool calls so far"""
        return self._answer.calls()

    @property
    def finish_reason(self) -> str | None:
        """Why the answer ended, in the vendor's word; None before the end"""
        return self._answer.finish_reason

    @property
    def usage(self) -> Usage | None:
        """The provider's count of tokens, None where there is none"""
        return self._answer.usage

    @property
    def cost(self) -> Decimal | None:
        """The cost of the usage, as by the function ``cost`` with the client's prices; None where it is unknown"""
        return cost(self.usage, self._price, model=self.model, provider=self._sender.target.provider)

    @property
    def _price(self) -> Price | None:
        prices = self._sender.options.prices or {}
        return prices.get(self.model) or prices.get(self._sender.request.model)

    @property
    def model(self) -> str:
        """The model that answers; before the answer names it, the model that was requested"""
        return self._answer.model or self._sender.request.model

    @property
    def id(self) -> str:
        """The id of the answer, "" before it is known"""
        return self._answer.id

    @property
    def request_id(self) -> str:
        """The provider's id of the request, else the X-Request-ID that every attempt sends"""
        return self._sender.request_id

    @property
    def completion(self) -> Completion:
        """All of the answer so far"""
        made = self._answer.completion()
        is_listed = self._price is None and (made.usage is None or made.usage.cost is None)
        return made if is_listed else made._replace(cost=self.cost)  # a list of prices takes long to import

    @property
    def _attempts(self) -> int:
        return self._attempts_before + self._sender.attempts

    @property
    def stats(self) -> StreamStats:
        """Measurements so far"""
        return self._clock.stats(self._usages, self._attempts, self._reconnects, self._is_cached)

    @property
    def continuity(self) -> str:
        """The weakest strategy used so far: "single", "replayed", "verified", "restarted" or, weakest, "continued\""""
        return self._continuity

    @property
    def response(self) -> requests.Response | None:
        """The response in use, None before there is one; its request shows no key"""
        return self._sender.shown_response()


class Client:
    """A provider: its address, key, dialect and policies, and the connections to it

    The provider is found in this order: ``provider``, a name in PROVIDERS; the host of ``base_url``; the first
    provider whose key is set in the environment, in the order of PROVIDERS, that serves the model's name. A key
    from the environment goes to its own provider's hosts only; ``api_key=False`` is for servers without keys.

    ``timeout`` is (connect, without a byte), ``first_timeout`` and ``idle_timeout`` are for the first Chunk and
    between two Chunks (keep-alive comments are none); all in seconds, None for no limit. ``retry`` is a
    Retry or a number of retries. ``limiter``, a Limiter, what its ``bind()`` gives or any object whose ``acquire()``
    gives a context manager, holds a slot for each stream; ``breaker`` is a CircuitBreaker; ``prices`` are Prices by
    model, for ``Stream.cost``. ``headers`` are sent with each request. ``session`` may be any object shaped
    like a requests.Session: it keeps its adapters, and their retries come on top of ``retry``; ``cancel()`` and
    the limits then reach a read, but not a wait for headers, nor bytes that trickle inside a chunk's size.
    ``verify``, ``proxies`` and ``cert`` are as in requests, and replace those of the environment: ``proxies={}`` is no
    proxy.
    ``continuation`` says that the server continues a partial answer, and how: as deepseek, mistral, vllm or anthropic.
    ``format`` ("sse" or "json") overrides what the answer's Content-Type says; ``max_event_size`` and
    ``max_answer_size`` are in bytes: a larger event is an InvalidStreamError, more text, reasoning and arguments a
    StreamError.
    No error and no log line of sheepsse shows the key. urllib3 logs the URL at DEBUG, with any secret in ``base_url``.

    May be shared between threads. A forked process opens connections of its own, unless ``session`` was passed. A
    context manager with ``close()``.
    """

    provider: str | None = None  # for __repr__, also of one that could not be made
    base_url: str | None = None

    def __init__(
        self,
        provider: str | None = None,
        *,
        base_url: str | None = None,
        api_key: str | bytes | bool | None = None,
        dialect: str | type[Dialect] | None = None,
        model: str | None = None,
        retry: Retry | int | None = None,
        timeout: float | tuple[float | None, float | None] | None = (10, 300),
        first_timeout: float | None = 600,
        idle_timeout: float | None = 300,
        limiter: Limiter | _BoundLimiter | Any = None,
        breaker: CircuitBreaker | None = None,
        prices: Mapping[str, Price] | None = None,
        continuation: str | None = None,
        session: requests.Session | None = None,
        headers: Mapping[str, str] | None = None,
        verify: bool | str = True,
        proxies: Mapping[str, str] | None = None,
        cert: str | tuple[str, str] | None = None,
        format: str | None = None,
        max_event_size: int = _MAX_EVENT_SIZE,
        max_answer_size: int = _MAX_ANSWER_SIZE,
    ) -> None:
        provider = None if provider == "auto" else provider
        if provider is not None and "://" in str(provider):
            raise InvalidRequestError(f"provider is a name; for an address pass base_url={_public_url(provider)!r}")
        if provider is not None and provider not in PROVIDERS:
            shown = repr(provider) if len(provider) < 20 else "of that name"  # a key, put into its place
            raise InvalidRequestError(f"no provider {shown}; there are {', '.join(PROVIDERS)}")
        if api_key is True or not isinstance(api_key, (str, bytes, bool, type(None))):
            raise TypeError(f"api_key is a str, or False for a server that takes none, got {type(api_key).__name__}")
        if isinstance(api_key, (str, bytes)):
            api_key = _Key.of(api_key)
        self.provider = provider
        self.base_url = None if base_url is None else _checked_url(base_url)
        self.model = model
        self._api_key = api_key
        given = {"verify": None if verify is True else verify, "proxies": proxies, "cert": cert}
        #: what replaces the settings of the environment; it may hold the password of a proxy
        self._connection = _Hidden({name: value for name, value in given.items() if value is not None})
        self._dialect = None if dialect is None else _dialect(dialect)
        if continuation is not None and continuation not in _CONTINUATIONS:
            raise ValueError(f"continuation is one of {', '.join(_CONTINUATIONS)}, got {continuation!r}")
        self._continuation = continuation
        limits = _as_pair(timeout), first_timeout, idle_timeout
        self._options = _CallOptions(Retry(), *limits, _Hidden(), None, 0, 0).but(
            retry=retry,
            headers=headers,
            format=format,
            max_event_size=max_event_size,
            max_answer_size=max_answer_size,
            limiter=limiter,
            breaker=breaker,
            prices=prices,
        )
        self._session = session
        self._refusing: set[str] = set()  # base URLs that refuse what the dialect adds, and refused plans
        self._begin_process()
        _of_process.add(self)

    def _begin_process(self) -> None:
        self._own_session: requests.Session | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        where = self.provider or (self.base_url and _public_url(self.base_url)) or "of the environment"
        return f"<sheepsse.Client {where}>"

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """For other processes: all but key, limiter and breaker; TypeError for a Client with a key"""
        secret = _Secrets(self._options.headers, self.base_url or "", self._connection.get("proxies"))
        if isinstance(self._api_key, str) or self._session is not None or secret.words:
            raise TypeError(
                "a Client with a key or a session of its own is not sent to other processes, which would take the key "
                "along: leave api_key= out, and set the provider's variable where they run"
            )
        options = self._options._replace(limiter=None, breaker=None)
        target = self.provider, self.base_url, self._api_key, self._dialect, self.model
        return _client_of, (*target, {**self._connection, "continuation": self._continuation}, options)

    def close(self) -> None:
        """Closes the idle connections, unless the session is the caller's own"""
        with self._lock:
            if self._own_session is not None:
                self._own_session.close()

    def stream(self, messages: str | Sequence[Mapping[str, Any]], **options: Unpack[_StreamOptions]) -> Stream:
        """The answer to ``messages`` as a Stream; takes what ``sheepsse.stream`` takes"""
        return _own_stream(messages, client=self, **options)

    def complete(self, messages: str | Sequence[Mapping[str, Any]], **options: Unpack[_CompleteOptions]) -> Completion:
        """The answer to ``messages``, whole; takes what ``sheepsse.complete`` takes"""
        return _own_complete(messages, client=self, **options)

    def _sender(
        self,
        messages: Sequence[Any],
        model: str | None,
        params: dict[str, Any],
        terms: _Terms,
        is_streamed: bool,
        is_owned: bool,
    ) -> _Sender:
        options = self._options.but(**{name: params.pop(name) for name in _CallOptions._fields if name in params})
        if terms.on_retry is not None:
            options = options.but(retry=options.retry.new(on_retry=terms.on_retry))
        model = model or self.model
        if not model:
            raise InvalidRequestError("no model: pass model=..., as the provider names it")
        target = self._target(model, options.headers)
        params.update(params.pop("extra_body", None) or {})
        request = _Request(target.base_url, target.dialect, tuple(messages), model, params, is_streamed)
        return _Sender(self, target, request, options, terms, is_owned)

    def _send(
        self,
        target: _Target,
        wire: _Wire,
        method: str,
        url: str,
        connect_timeout: float | None,
        headers: Mapping[str, Any],
        data: bytes | None = None,
    ) -> requests.Response:
        """Sends one request, with the key"""
        return _send(
            self._via(),
            wire,
            method,
            url,
            connect_timeout,
            data=data,
            headers={**target.dialect.headers, **headers},
            auth=_KeyAuth(target.key_headers) if target.key_headers else None,
            allow_redirects=False,
            **self._request_options(),
        )

    def _via(self) -> requests.Session:
        if self._session is not None:
            return self._session
        with self._lock:
            if self._own_session is None:
                adapter = _WireAdapter(max_retries=0, pool_maxsize=100)
                self._own_session = _mounted(adapter, _StayingSession(self._connection))
            return self._own_session

    def _secrets(self, target: _Target) -> _Secrets:
        """The secrets of a call: the key, headers of a session that was passed, passwords of proxies"""
        headers = {**(getattr(self._session, "headers", None) or {}), **target.key_headers}
        proxies = {**_environment_proxies(), **self._connection.get("proxies", {})}
        return _secrets_of(tuple(headers.items()), target.base_url, tuple(proxies.items()))

    def _request_options(self) -> Mapping[str, Any]:
        """Options that a session which was passed gets with each request; our own session has them"""
        return {} if self._session is None else self._connection

    def _target(self, model: str | None, headers: Mapping[str, str]) -> _Target:
        """The provider, the address and the key for a model"""
        name = self.provider
        if name is None:
            name = _provider_of_origin(self.base_url) if self.base_url else _provider_of_environment(model)
        row = None if name is None else PROVIDERS[name]
        if row and self.base_url is None:
            row = row._replace(base_url=os.environ.get(row.base_variable) or row.base_url)
        base_url = self.base_url or (row.base_url if row else "")
        if row and not urlsplit(base_url).path.strip("/"):  # the host alone
            base_url = urlunsplit(urlsplit(base_url)._replace(path=urlsplit(row.base_url).path))
        dialect = self._dialect or _dialect_of_url(base_url) or DIALECTS[row.dialect if row else "openai"]
        key = None if self._needs_no_key(row, headers) else _checked_key(*self._key(row, base_url))
        key_headers = _Hidden({**(dialect.key_headers(key) if key else {}), **_key_headers(headers)})
        check_url = dialect.endpoint(base_url, (row and row.check_path) or dialect.models_path)
        continuation = self._continuation or (row.continuation if row else "")
        return _Target(name, base_url, dialect, key_headers, check_url, continuation)

    def _needs_no_key(self, row: Provider | None, headers: Mapping[str, str]) -> bool:
        if self._api_key is False or any(name.lower() in _KEY_STAND_INS for name in headers):
            return True
        return self._api_key is None and row is not None and not row.key_variable

    def _key(self, row: Provider | None, base_url: str) -> tuple[str | None, str, Provider | None]:
        """The key, where it is from, and the provider that it is for"""
        if isinstance(self._api_key, str):
            return self._api_key, "api_key", row
        # a key from the environment goes to its own provider only
        if row is None or _origin(base_url) != _origin(row.base_url):
            return None, f"the call to {_public_url(base_url)}", None
        source = row.key_variable
        if self.provider is None and self.base_url is None and _is_placeholder(_key_of_environment(row)):
            source = f"the environment ({_key_variables()})"
        return _key_of_environment(row), source, row

    def check(self, timeout: float = 10) -> Health:
        """Whether the provider can be reached and accepts the key; sends one small request that is not billed

        Never raises for what it finds, never retries. ``timeout`` is in seconds, for the whole check.
        """
        try:
            target = self._target(self.model, self._options.headers)
        except AuthenticationError as error:
            return Health(False, "no_key", error=str(error))
        secrets = self._secrets(target)
        started = time.monotonic()
        try:
            body = self._fetched(target, timeout)
        except SheepError as error:
            secrets.hide_error(error)
            unreachable = error.status is None and isinstance(error, (ConnectError, StreamTimeout, StreamInterrupted))
            status = "bad_key" if isinstance(error, AuthenticationError) else "http_error"
            latency = None if unreachable else time.monotonic() - started
            return Health(False, "unreachable" if unreachable else status, latency, error=str(error))
        latency = time.monotonic() - started
        return Health(True, "ok", latency, tuple(_model_names(body)))

    def _fetched(self, target: _Target, timeout: float) -> Any:
        """The JSON answer to a GET of the check URL"""
        url = target.check_url
        failure: list[SheepError] = []
        wire = _Wire(timeout, deadline=timeout)
        headers = {"Accept": "application/json", **self._options.headers}
        response = self._send(target, wire, "GET", url, timeout, headers)
        try:
            body = _read_some(_limited_blocks(response, wire), _MAX_EVENT_SIZE, failure)
        finally:
            response.close()
        if failure and response.status_code == 200:
            raise failure[0]
        if response.status_code != 200:
            raise _status_error(response.status_code, response.headers, body, _public_url(url))
        answer = _json(body)
        if answer is _NO_JSON:
            raise InvalidStreamError(
                f"expected JSON from {_public_url(url)}, got {_excerpt(body)}; is the base URL that of the API?"
            )
        return answer


def _client_of(
    provider: str | None,
    base_url: str | None,
    api_key: bool | None,
    dialect: type[Dialect] | None,
    model: str | None,
    connection: Mapping[str, Any],
    options: _CallOptions,
) -> Client:
    made = Client(provider, base_url=base_url, api_key=api_key, dialect=dialect, model=model, **connection)
    made._options = options
    return made


def _model_names(answer: Any) -> Iterator[str]:
    """The names in a list of models, in any vendor's shape"""
    answer = _dict(answer)
    names = [_dict(row).get("id") for row in _list(answer.get("data"))]
    names += [_dict(row).get("name") for row in _list(answer.get("models"))]  # Gemini, Ollama
    for name in filter(None, map(_text, names)):
        yield name[len("models/") :] if name.startswith("models/") else name


#: keywords of stream() and complete() that make a Client
_CLIENT_OPTIONS = ("provider", "base_url", "api_key", "dialect", "session", "verify", "proxies", "cert")


class Options(TypedDict, total=False):
    """The options of ``stream``, ``complete`` and ``batch`` that are not in their signatures, for editors and checkers

    At run time any other name goes into the request too, unless it is nearly one of these or belongs to another
    library; ``extra_body`` takes any name at all. Options of a Client that are passed beside ``client`` replace its
    own for this call; ``provider`` to ``cert`` make a Client, and need a call without ``client``.
    """

    # These make a Client; the docstring of Client has them all
    provider: str | None
    base_url: str | None
    api_key: str | bytes | bool | None
    dialect: str | type[Dialect] | None
    session: Any
    verify: bool | str
    proxies: Mapping[str, str] | None
    cert: str | tuple[str, str] | None
    # These replace the options of a Client
    retry: Retry | int | None
    timeout: float | tuple[float | None, float | None] | None
    first_timeout: float | None
    idle_timeout: float | None
    limiter: Any
    breaker: CircuitBreaker | None
    prices: Mapping[str, Price] | None
    headers: Mapping[str, str] | None
    format: str | None
    max_event_size: int
    max_answer_size: int
    # These go into the request, in the shape of its dialect
    #: the system message, before the others
    system: str | Sequence[Mapping[str, Any]] | None
    temperature: float | None
    max_tokens: int | None
    max_completion_tokens: int | None
    top_p: float | None
    top_k: int | None
    stop: str | Sequence[str] | None
    seed: int | None
    #: the number of choices
    n: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: Any
    #: members that are added to the request as they are
    extra_body: Mapping[str, Any] | None
    # These go into the request as they are: options of OpenAI and of those that copy it
    background: bool
    include: Sequence[str]
    instructions: str
    logit_bias: Mapping[str, float]
    logprobs: bool
    max_output_tokens: int
    metadata: Mapping[str, Any]
    modalities: Sequence[str]
    models: Sequence[str]
    parallel_tool_calls: bool
    prediction: Mapping[str, Any]
    previous_response_id: str
    prompt: Any
    reasoning: Mapping[str, Any]
    reasoning_effort: str
    repetition_penalty: float
    response_format: Mapping[str, Any]
    service_tier: str
    store: bool
    stream_options: Mapping[str, Any]
    text: Mapping[str, Any]
    top_logprobs: int
    truncation: str
    user: str
    verbosity: str
    # Anthropic
    container: Any
    context_management: Mapping[str, Any]
    mcp_servers: Sequence[Mapping[str, Any]]
    stop_sequences: Sequence[str]
    thinking: Mapping[str, Any]
    # Gemini
    cachedContent: str
    cached_content: str
    generationConfig: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    safetySettings: Sequence[Mapping[str, Any]]
    safety_settings: Sequence[Mapping[str, Any]]
    systemInstruction: Any
    system_instruction: Any
    thinkingConfig: Mapping[str, Any]
    thinking_config: Mapping[str, Any]
    toolConfig: Mapping[str, Any]
    tool_config: Mapping[str, Any]
    # Ollama
    keep_alive: Any
    min_p: float
    num_ctx: int
    options: Mapping[str, Any]
    think: bool | str


if TYPE_CHECKING:

    class _SharedOptions(Options, total=False):
        model: str | None
        refresh: bool
        alignment: TokenAlignment | None
        deadline: float | None
        on_retry: Callable[[SheepError, int, float], object] | None

    class _BatchOptions(_SharedOptions, total=False):
        resume: str | Sequence[str]
        fallback: bool

    class _CompleteOptions(_SharedOptions, total=False):
        checkpoint: str | os.PathLike[str] | Checkpoints | _Checkpoint | None

    class _StreamOptions(_BatchOptions, _CompleteOptions, total=False):
        resume_from: SheepError | ResumePoint | Mapping[str, Any] | Sequence[Any] | None


#: options of requests and of the vendors' SDKs that are none of ours, and what to do instead
_FOREIGN_OPTIONS = {
    "stream": "stream() streams, complete() returns the whole answer",
    **dict.fromkeys(("auth", "auth_token", "azure_ad_token", "key", "token"), "pass api_key= or headers="),
    **dict.fromkeys(("organization", "project", "cookies", "extra_headers", "default_headers"), "pass headers="),
    **dict.fromkeys(("params", "extra_query", "default_query", "api_version"), "put the query into base_url="),
    **dict.fromkeys(("url", "endpoint", "api_base", "azure_endpoint", "azure_deployment"), "pass base_url="),
    **dict.fromkeys(("json", "data", "files"), "the messages are the first argument"),
    **dict.fromkeys(("max_retries", "retries"), "pass retry="),
    **dict.fromkeys(("http_client", "http_options", "hooks", "allow_redirects"), "pass session="),
    **dict.fromkeys(("proxy", "http_proxy", "https_proxy"), "pass proxies="),
    **dict.fromkeys(("callback", "callbacks", "on_token"), "iterate over the stream"),
    **dict.fromkeys(("fallback", "resume", "resume_from"), "complete() cannot resume, stream() can"),
    **dict.fromkeys(("alignment", "client", "checkpoint"), "it is not for this function"),
}


def _check_options(params: dict[str, Any], own: Iterable[str] = ()) -> None:
    """TypeError for options that cannot be meant to go into the request; no value is shown: it may be a secret

    ``own`` are further options of the function.
    """
    vendors = (name for dialect in DIALECTS.values() for name in dialect.options)
    real = {*Options.__annotations__, *vendors, *own}
    for name in [name for name in params if name not in real]:
        if name in _FOREIGN_OPTIONS and (params[name] is None or (name, params[name]) == ("fallback", False)):
            del params[name]  # as if not passed
            continue
        advice = _FOREIGN_OPTIONS.get(name, "")
        if not advice:
            import difflib  # heavy, and few calls have an option of an unknown name

            known = {*real, *(stream.__kwdefaults__ or ())}
            squeezed = {each.replace("_", "").lower(): each for each in sorted(known, reverse=True)}
            near = difflib.get_close_matches(name.replace("_", "").lower(), squeezed, 1, 0.8)
            advice = f"did you mean {squeezed[near[0]]}=?" if near else ""
        if advice:
            raise TypeError(f"{name}= is no option here: {advice} (extra_body={{{name!r}: ...}} sends it as it is)")


@functools.lru_cache(None)
def _default_client() -> Client:
    """The Client of the environment, one for each process"""
    return Client()


def stream(
    messages: str | Sequence[Mapping[str, Any]],
    *,
    model: str | None = None,
    client: Client | Sequence[Client] | None = None,
    checkpoint: str | os.PathLike[str] | Checkpoints | _Checkpoint | None = None,
    refresh: bool = False,
    resume: str | Sequence[str] = "auto",
    resume_from: SheepError | ResumePoint | Mapping[str, Any] | Sequence[Any] | None = None,
    fallback: bool = False,
    alignment: TokenAlignment | None = None,
    deadline: float | None = None,
    on_retry: Callable[[SheepError, int, float], object] | None = None,
    **options: Unpack[Options],
) -> Stream:
    """The answer to a prompt or a list of messages, as a Stream of text

        for text in sheepsse.stream("Explain SSE", model="deepseek-chat"):
            print(text, end="", flush=True)

    ``params`` go into the body of the request unchanged (``temperature``, ``max_tokens``, ``tools``, ...), and so does
    ``extra_body``. Keywords of Client make a Client that closes with the stream. Beside a ``client``, these keywords
    apply to this call: ``retry``, ``timeout``, ``first_timeout``, ``idle_timeout``, ``limiter``, ``breaker``,
    ``prices``, ``headers``, ``format``, ``max_event_size`` and ``max_answer_size``. Without a ``client``, the
    environment names the provider.

    ``client`` may be a list: the next client is tried, with its own model, where one is down, rate limited, out of
    quota or behind an open breaker, and has returned nothing yet. With ``fallback``, the last attempt is without
    streaming, where no stream could be had: the text then comes in one piece. ``alignment`` is a TokenAlignment.

    ``deadline`` is in seconds for the whole call; only the system's look-up of a host name may take longer.
    ``on_retry(error, attempt, delay)`` replaces that of the policy.

    A stream whose connection is lost is resumed, if that can neither repeat nor lose text; else StreamInterrupted is
    raised. ``resume`` names the strategies that may be tried, one or several in order: ``replay`` (the server gives
    ids, or keeps the answer: OpenAI Responses with ``background=True``), ``restart`` (nothing was returned yet),
    ``continue`` (the provider continues a partial answer: DeepSeek, Mistral, vLLM, Anthropic up to 4.5), ``verify``
    (the request is sent again, and its text dropped while equal; also where only the usage was lost), ``anchor`` (the
    model must repeat its last words and continue). ``"auto"`` is the first three, ``"never"`` is none. All but
    ``replay`` are billed again, at most ``retry.total`` times. ``resume_from`` takes an error or its
    ``resume_point``, also of another process, for the same request; the stream then gives only what is missing.

    ``checkpoint`` is a folder, or a checkpoint of Checkpoints: each piece is saved before it is returned. After a kill,
    the same request gives the saved text, then the rest; where no strategy can resume, the request is sent anew. A
    finished request is answered from its file, also tomorrow, unless ``refresh`` requests it anew.

    AuthenticationError for a missing or placeholder key and InvalidRequestError for a missing model are raised
    here, all other errors when the Stream is read; CheckpointError where a checkpoint cannot be used.
    """
    terms = _Terms(deadline, on_retry, checkpoint, refresh, resume, resume_from, alignment)
    # the same dict, not a copy: secrets are hidden in it, for whoever prints the variables of this frame
    return _stream_of(client, messages, model, typing.cast("dict[str, Any]", options), terms, fallback=fallback)


def complete(
    messages: str | Sequence[Mapping[str, Any]],
    *,
    model: str | None = None,
    client: Client | Sequence[Client] | None = None,
    checkpoint: str | os.PathLike[str] | Checkpoints | _Checkpoint | None = None,
    refresh: bool = False,
    alignment: TokenAlignment | None = None,
    deadline: float | None = None,
    on_retry: Callable[[SheepError, int, float], object] | None = None,
    **options: Unpack[Options],
) -> Completion:
    """The same request, not streamed: the whole answer, or the error that ``stream`` would raise"""
    terms = _Terms(deadline, on_retry, checkpoint, refresh, alignment=alignment)
    params = typing.cast("dict[str, Any]", options)
    return _completed(_stream_of(client, messages, model, params, terms, is_streamed=False))


def _clients_of(client: Client | Sequence[Client] | None, params: dict[str, Any]) -> tuple[list[Client], bool]:
    """The clients passed, one made of keywords, or that of the environment; and whether it closes with its stream"""
    own = {name: params.pop(name) for name in _CLIENT_OPTIONS if name in params}
    if client is None:
        return [Client(**own) if own else _default_client()], bool(own) and "session" not in own
    for name, value in own.items():
        if value is not None:
            raise TypeError(f"{name}= belongs to the Client: pass it there, or leave client= out")
    clients = [client] if isinstance(client, Client) else client
    if isinstance(clients, str) or not all(isinstance(each, Client) for each in clients):
        raise TypeError(f"client= is a sheepsse.Client, or a list of one or more, got {client!r:.80}")
    if not clients:
        raise ValueError("client= is a Client, or a list of one or more")
    return list(clients), False


#: for the methods of a Client, which tests put in place of the functions
_own_stream, _own_complete = stream, complete


def _stream_of(
    client: Client | Sequence[Client] | None,
    messages: Any,
    model: str | None,
    params: dict[str, Any],
    terms: _Terms,
    *,
    is_streamed: bool = True,
    fallback: bool = False,
) -> Stream:
    """A Stream by the first client that can: those passed, one made of keywords, or that of the environment"""
    if isinstance(params.get("api_key"), (str, bytes)):
        params["api_key"] = _Key.of(params["api_key"])
    for name in ("headers", "proxies"):
        if isinstance(params.get(name), Mapping):
            params[name] = _Hidden(params[name])
    _check_options(params)
    clients, is_owned = _clients_of(client, params)
    messages, terms = _messages(messages, params.pop("system", None)), terms.checked()
    ways = [(each, is_streamed) for each in clients] + [(each, False) for each in clients[-1:] if fallback]
    senders = []
    for each, streams in ways:
        named = (len(clients) > 1 and each.model) or model
        senders.append(each._sender(messages, named, {**params}, terms, streams, is_owned))
    senders[-1].is_fallback = fallback
    point = terms.resume_from
    answer, events = (_Answer(), []) if point is None else _Answer.at(point)
    return Stream(senders, terms, answer, _Marks(events))


def _completed(answer: Stream) -> Completion:
    for _ in answer.chunks():
        pass
    return answer.completion


# ============================================================================================================
# 12. Batch: many requests, results as they come. May use: Client and above
# ============================================================================================================


class Result(NamedTuple):
    """The result of one request of a batch

    id: the id of the request, else its index, from 0
    text: the answer, whole where there is no error
    elapsed, ttft: seconds from the start of the request to its end, and to its first text
    cached: whether the answer was read from its checkpoint
    """

    id: Any
    index: int  # type: ignore[assignment]
    text: str = ""
    completion: Completion = Completion()
    usage: Usage | None = None
    cost: Decimal | None = None
    elapsed: float = 0.0
    ttft: float | None = None
    attempts: int = 0
    error: Exception | None = None
    cached: bool = False


class BatchSummary(NamedTuple):
    """The counts and times of a batch so far; None, shown as a dash, if nothing was measured

    elapsed, rate: seconds since the first request was drawn, and requests a second
    input_tokens, output_tokens, cost: of requests with a known usage or cost
    ttft, duration: p50, p90 and p99 of the seconds to the first text, and to the end, of requests that succeeded
    """

    total: int
    succeeded: int
    failed: int
    cached: int
    elapsed: float
    rate: float | None
    input_tokens: int
    output_tokens: int
    cost: Decimal | None
    ttft: tuple[float, float, float] | None
    duration: tuple[float, float, float] | None

    def __str__(self) -> str:
        rate = "-" if self.rate is None else f"{self.rate:.2f}"
        spent = "-" if self.cost is None else f"{self.cost:f}"
        lines = [
            f"requests   {self.total}: {self.succeeded} succeeded ({self.cached} were kept), {self.failed} failed",
            f"time       {self.elapsed:.1f} s, {rate} requests a second",
            f"tokens     {self.input_tokens} in, {self.output_tokens} out, cost {spent}",
        ]
        for name, values in (("first text", self.ttft), ("whole", self.duration)):
            shown = ["-"] * 3 if values is None else [f"{value:.2f} s" for value in values]
            lines.append(f"{name:<10} p50 {shown[0]}, p90 {shown[1]}, p99 {shown[2]}")
        return "\n".join(lines)


class _Sample:
    """The percentiles of any number of values, by a random sample of bounded size"""

    _MOST = 10_000

    def __init__(self) -> None:
        self._kept: list[float] = []
        self._count = 0
        self._random = random.Random(0)

    def add(self, value: float) -> None:
        self._count += 1
        if len(self._kept) < self._MOST:
            self._kept.append(value)
        else:
            place = self._random.randrange(self._count)
            if place < self._MOST:
                self._kept[place] = value

    def percentiles(self) -> tuple[float, float, float] | None:
        """p50, p90 and p99"""
        values = sorted(self._kept)
        if not values:
            return None
        p50, p90, p99 = (values[max(0, math.ceil(len(values) * part) - 1)] for part in (0.5, 0.9, 0.99))
        return p50, p90, p99


class _Job(NamedTuple):
    """One request of a batch, as plain data"""

    id: Any
    index: int  # type: ignore[assignment]
    messages: Any
    params: dict[str, Any]
    checkpoint: Any = None


def _job(request: Any, index: int, params: Mapping[str, Any], folder: str | None) -> _Job:
    """A str, a list of messages, or a dict with ``messages``, any params and perhaps an ``id``"""
    own = dict(request) if isinstance(request, Mapping) else {"messages": request}
    messages, id = own.pop("messages", None), own.pop("id", None)
    id = index if id is None else id
    checkpoint = None if folder is None else _Checkpoint(folder, copy=repr(id))
    return _Job(id, index, messages, {**params, **own}, checkpoint)


def _result(job: _Job, open_stream: Callable[..., Stream]) -> Result:
    """Reads one answer; an error becomes part of the result"""
    start, answer, error = time.monotonic(), None, None
    try:
        if job.messages is None:
            raise TypeError("a request of a batch is a str, a list of messages, or a dict with 'messages'")
        if {"checkpoint", "client"} & set(job.params):
            raise TypeError("checkpoint= and client= are the batch's, and no options of a single request")
        answer = open_stream(job.messages, checkpoint=job.checkpoint, **job.params)
        for _ in answer.chunks():
            pass
    except Exception as failure:
        error = failure
    elapsed = time.monotonic() - start
    if answer is None:
        return Result(job.id, job.index, elapsed=elapsed, error=error)
    completion, stats = answer.completion, answer.stats
    return Result(
        job.id,
        job.index,
        completion.text,
        completion,
        completion.usage,
        answer.cost,
        elapsed,
        stats.ttft,
        stats.attempts,
        error,
        stats.cached,
    )


@functools.lru_cache(8)  # so that a worker process keeps its connections
def _unpickled(clients: bytes) -> list[Client]:
    import pickle

    made: list[Client] = pickle.loads(clients)
    return made


def _work(clients: bytes, job: _Job) -> Result:
    """Reads one answer in another process; the key is read there"""
    return _result(job, functools.partial(stream, client=_unpickled(clients)))


#: seconds for which a batch draws requests while a result is ready
_DRAW_SECONDS = 0.01


class Batch:
    """The results of many requests: an iterator of Result, as completed or in the order of the requests

    Iterable once; a context manager. ``close()`` cancels what runs; finished results stay. Belongs to one thread,
    except ``close()``.
    """

    def __init__(
        self,
        jobs: Iterator[_Job],
        run: _Threads | _Processes,
        in_flight: int,
        ordered: bool,
        progress: Callable[[Result], object],
        owned: Sequence[Client],
        stop_on: tuple[type[Exception], ...],
    ) -> None:
        self._reading = threading.Lock()  # held by the thread that reads
        self._closed = False
        self._end: float | None = None
        self._failure: Exception | None = None  # of the iterator of requests, or one of stop_on
        self._stop_on = stop_on
        self._jobs: Iterator[_Job] | None = jobs
        self._run = run
        self._in_flight = in_flight
        self._ordered = ordered
        self._progress = progress
        self._owned = owned  # clients that close with the batch
        self._running: dict[Any, _Job] = {}
        self._ready: dict[int, Result] = {}  # by index: results not returned yet
        self._next = 0  # the next index, in order
        self._start: float | None = None
        self._counts = dict.fromkeys(("total", "succeeded", "failed", "cached", "input_tokens", "output_tokens"), 0)
        self._cost: Decimal | None = None
        self._ttft, self._duration = _Sample(), _Sample()

    def __iter__(self) -> Batch:
        return self

    def __next__(self) -> Result:
        if not self._reading.acquire(blocking=False):
            raise RuntimeError("a Batch belongs to one thread; only close() may come from others")
        try:
            return self._step()
        except BaseException:
            self._finish()
            raise
        finally:
            self._reading.release()

    def _step(self) -> Result:
        began = time.monotonic()
        while True:
            self._collect(wait=False)
            index: Any = self._next if self._ordered else next(iter(self._ready), None)
            is_ready = index in self._ready
            # a ready result does not wait for slow requests
            if self._has_room and not (is_ready and time.monotonic() - began > _DRAW_SECONDS):
                self._draw()
            elif is_ready:
                self._next += 1
                return self._ready.pop(index)
            elif self._running:
                self._collect(wait=True)
            else:
                if self._failure is not None:
                    raise self._failure
                raise StopIteration

    @property
    def _has_room(self) -> bool:
        return self._jobs is not None and not self._closed and len(self._running) + len(self._ready) < self._in_flight

    def _draw(self) -> None:
        """Draws one more request"""
        assert self._jobs is not None
        if self._start is None:
            self._start = time.monotonic()
        try:
            job = next(self._jobs, None)
        except Exception as error:  # raised after all finished results were returned
            self._failure, job = error, None
        if job is None:
            self._jobs = None
        elif not self._closed:
            self._running[self._run.submit(job)] = job

    def _collect(self, wait: bool) -> None:
        """Takes the finished results; with ``wait``, waits for at least one"""
        import concurrent.futures

        timeout = None if wait else 0
        done, _ = concurrent.futures.wait(self._running, timeout, return_when=concurrent.futures.FIRST_COMPLETED)
        for future in done:
            self._take(future)

    def _take(self, future: Any) -> None:
        job = self._running.pop(future)
        if future.cancelled() and self._closed:  # before it began
            return
        try:
            result: Result = future.result()
        except Exception as error:  # of the executor: a dead worker, a cancel by others
            result = Result(job.id, job.index, error=error)
        if self._closed and isinstance(result.error, StreamCancelled):
            return
        self._ready[result.index] = result
        if isinstance(result.error, self._stop_on):  # the requests after it would fail too
            self._failure, self._jobs = self._failure or result.error, None
        self._count(result)
        self._progress(result)

    def _count(self, result: Result) -> None:
        counts = self._counts
        counts["total"] += 1
        counts["failed" if result.error else "succeeded"] += 1
        counts["cached"] += result.cached
        if result.usage is not None:
            counts["input_tokens"] += result.usage.input_tokens
            counts["output_tokens"] += result.usage.output_tokens
        if result.cost is not None:
            self._cost = result.cost if self._cost is None else self._cost + result.cost
        if result.error is None and not result.cached:
            self._duration.add(result.elapsed)
            if result.ttft is not None:
                self._ttft.add(result.ttft)

    @property
    def summary(self) -> BatchSummary:
        """The summary of all results so far"""
        elapsed = 0.0 if self._start is None else (self._end or time.monotonic()) - self._start
        return BatchSummary(
            elapsed=elapsed,
            rate=self._counts["total"] / elapsed if elapsed and self._counts["total"] else None,
            cost=self._cost,
            ttft=self._ttft.percentiles(),
            duration=self._duration.percentiles(),
            **self._counts,
        )

    def close(self) -> None:
        """Draws no more requests and cancels those that run; finished results may still be read. May be called again"""
        self._closed = True
        for future in list(self._running):
            future.cancel()
        self._run.cancel()
        if self._reading.acquire(blocking=False):  # else the thread that reads does it
            try:
                self._finish()
            finally:
                self._reading.release()

    def _finish(self) -> None:
        if self._end is None:
            self._closed, self._jobs, self._end = True, None, time.monotonic()
            for future in list(self._running):
                future.cancel()
            self._run.close()
            for client in self._owned:
                client.close()

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class _Threads:
    """Runs the requests of a batch on threads of this process, its own or those of an executor"""

    def __init__(self, open_stream: Callable[..., Stream], workers: int, executor: Any) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._open_stream = open_stream
        self._own = None if executor is not None else ThreadPoolExecutor(workers, "sheepsse-batch")
        self._executor: Any = self._own if executor is None else executor
        self._lock = threading.Lock()
        self._open: set[Stream] = set()
        self._closed = False

    def submit(self, job: _Job) -> Any:
        """A future of its Result"""
        try:
            return self._executor.submit(self._result, job)
        except RuntimeError as error:  # the executor was shut down
            return _failed_future(job, error)

    def _result(self, job: _Job) -> Result:
        opened: list[Stream] = []

        def open_stream(*args: Any, **params: Any) -> Stream:
            answer = self._open_stream(*args, **params)
            answer._is_of_batch = True
            opened.append(answer)
            with self._lock:
                self._open.add(answer)
                if self._closed:
                    answer.cancel()
            return answer

        try:
            return _result(job, open_stream)
        finally:
            with self._lock:
                self._open.difference_update(opened)

    def cancel(self) -> None:
        """Cancels all running streams"""
        with self._lock:
            self._closed = True
            for answer in self._open:
                answer.cancel()

    def close(self) -> None:
        self.cancel()
        if self._own is not None:
            self._own.shutdown()


class _Processes:
    """Runs the requests by any other executor, whose workers may be processes: they get plain data, and no key

    The limiter and the breaker act in this process: each worker would count only its own requests.
    """

    def __init__(self, clients: Sequence[Client], executor: Any, limiter: Any, breaker: CircuitBreaker | None) -> None:
        import pickle

        self._clients = pickle.dumps(list(clients))
        self._executor, self._limiter, self._breaker = executor, limiter, breaker

    def submit(self, job: _Job) -> Any:
        slot = contextlib.ExitStack()
        try:
            _check_keyless(job.params)
            if self._limiter is not None:
                slot.enter_context(self._acquired())
            admission = None if self._breaker is None else self._breaker.enter()
            future = self._executor.submit(_work, self._clients, job)
        except Exception as error:
            slot.close()
            return _failed_future(job, error)

        def done(future: Any) -> None:
            slot.close()
            if admission is not None:
                failure = None if future.cancelled() else future.exception() or future.result().error
                admission.end(None if future.cancelled() else _was_success(failure))

        future.add_done_callback(done)
        return future

    def _acquired(self) -> Any:
        limiter = self._limiter.bind() if isinstance(self._limiter, Limiter) else self._limiter
        if isinstance(limiter, _BoundLimiter):
            return limiter.limiter._acquire(limiter.priority, limiter.user, limiter.on_position, is_batch=True)
        return limiter.acquire()

    def cancel(self) -> None:
        """Does nothing: a request in another process runs to its end"""

    def close(self) -> None:
        pass


def _failed_future(job: _Job, error: Exception) -> Any:
    from concurrent.futures import Future

    failed: Future[Result] = Future()
    failed.set_result(Result(job.id, job.index, error=error))
    return failed


def batch(
    requests: Iterable[Any],
    *,
    client: Client | Sequence[Client] | None = None,
    workers: int = 5,
    executor: Any = None,
    ordered: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | Callable[[Result], object] | None = None,
    stop_on: type[Exception] | Sequence[type[Exception]] = (AuthenticationError, QuotaError),
    **params: Unpack[_BatchOptions],
) -> Batch:
    """The answers to many requests, as Results: as completed, or in the order of requests with ``ordered``

        for result in sheepsse.batch(["Hello", "Good day"], model="deepseek-chat", workers=16):
            print(result.id, result.error or result.text)

    A request is a str, a list of messages, or a dict with ``messages``, perhaps an ``id``, and any options of
    ``stream``; ``params`` apply to all requests. Requests are drawn as workers become free, so ``requests`` may be an
    endless generator. A failed request gives a Result with its ``error``, and the others go on. After an error of
    ``stop_on`` no more requests are drawn: those that run end, and the error is raised behind their results; ``()`` is
    never. Two requests with the same id are a ValueError.

    Requests are made on ``workers`` threads, or by an ``executor`` of concurrent.futures: threads, processes, loky, or
    a Dask cluster by its ``get_executor(pure=False)``. Workers of other processes get plain data and no key: they read
    the key from their own environment. A client with a key or a session of its own is then a TypeError, before
    anything is sent. The limiter and the breaker act in this process.

    ``checkpoint`` is a folder that holds each answer, by the request and its id, else its index; a rerun requests only
    the missing answers. ``progress`` is called with each Result; True shows a bar of tqdm. The iterator has ``summary``
    and ``close()``. Ctrl-C closes it, too: running requests are cancelled, except in other processes, and finished
    ones stay finished.
    """
    if isinstance(requests, (str, bytes, Mapping)):
        raise TypeError("batch takes many requests: a list of them, or any other iterable")
    if workers < 1:
        raise ValueError(f"a batch has 1 worker or more, not {workers}")
    options = typing.cast("dict[str, Any]", params)
    _check_options(options, {*(stream.__kwdefaults__ or ()), *(batch.__kwdefaults__ or ())})
    total = None
    if isinstance(requests, Sequence):
        collections.deque(_with_new_ids(requests), 0)
        total = len(requests)
    report = _progress(progress, total)
    clients, owned = _clients_of(client, options)
    run = _runner(clients, workers, executor, options)
    folder = None if checkpoint is None else os.fsdecode(checkpoint)
    in_flight = 2 * (workers if executor is None else getattr(executor, "_max_workers", None) or 4 * workers)
    to_close, stop = clients if owned else (), (stop_on,) if isinstance(stop_on, type) else tuple(stop_on)
    return Batch(_jobs(requests, options, folder), run, in_flight, ordered, report, to_close, stop)


def _runner(clients: Sequence[Client], workers: int, executor: Any, params: dict[str, Any]) -> _Threads | _Processes:
    from concurrent.futures import ThreadPoolExecutor

    if executor is None or isinstance(executor, ThreadPoolExecutor):
        return _Threads(functools.partial(stream, client=clients), workers, executor)
    _check_keyless(params)
    options = clients[0]._options
    if len(clients) > 1 and any(client._options.limiter or client._options.breaker for client in clients):
        raise TypeError("several clients in other processes take no limiter and no breaker of their own")
    limiter, breaker = params.pop("limiter", options.limiter), params.pop("breaker", options.breaker)
    return _Processes(clients, executor, limiter, breaker)


def _check_keyless(params: Mapping[str, Any]) -> None:
    """Raises TypeError if the options of a request hold a key: a key must not go to other processes"""
    if any(params.get(name) is not None for name in _CLIENT_OPTIONS) or _key_headers(params.get("headers") or {}):
        raise TypeError(
            "a key, or another option of a Client, is not sent to other processes: set the provider's variable"
        )


def _jobs(requests: Iterable[Any], params: Mapping[str, Any], folder: str | None) -> Iterator[_Job]:
    for index, request in enumerate(_with_new_ids(requests)):
        yield _job(request, index, params, folder)


def _with_new_ids(requests: Iterable[Any]) -> Iterator[Any]:
    """The same requests; ValueError for a second request with the same id"""
    seen: set[Any] = set()  # explicit ids only: an endless generator has no bound on indexes
    for index, request in enumerate(requests):
        id = request.get("id") if isinstance(request, Mapping) else None
        try:
            known = (index if id is None else id) in seen
        except TypeError:
            raise ValueError(
                f"the id of a request is a number or a str, or anything else that is hashable: {id!r}"
            ) from None
        if known:
            raise ValueError(f"two requests have the id {index if id is None else id!r}")
        if id is not None:
            seen.add(id)
        yield request


def _progress(progress: bool | Callable[[Result], object] | None, total: int | None) -> Callable[[Result], object]:
    if callable(progress):
        return progress
    if not progress:
        return bool
    try:
        from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]  # an extra
    except ImportError as error:
        raise MissingExtraError("progress=True draws a bar by tqdm: pip install tqdm, or pass a function") from error
    bar = tqdm(total=total, unit="request")
    return lambda result: bar.update()


# ============================================================================================================
# 13. Relay: chunks to browser-facing SSE, on any WSGI server, over lost connections. May use: Batch and above
# ============================================================================================================

# Read here when a browser misses events, or gets them twice.
#
# A Relay is the iterator that a WSGI server sends. The producer is a _Production: one thread that reads a Stream and
# writes its events to a sink. Without a journal, the sink is a _Pipe to the one client. With a journal, it is a log in
# a store, a _Folder or a _Redis, that any process may follow: a follower reads it by a _Tail, after the number in
# Last-Event-ID. Events are numbered without gaps, and only the holder of the lock (or of the lease in Redis) writes.
#
# One watcher thread (_Relaying) looks for clients that left, stop marks, and lines of other processes. A client that
# leaves ends its stream, at once without a journal, else after ``grace`` seconds. A producer that dies loses its lock:
# followers notice, and get "interrupted" without an id. A POST with Last-Event-ID then takes the stream over: this
# process reads the journal (_journaled), and resumes upstream by the strategies of section 9.
#
# _Routes holds the routes: origin, user, fields of the request, then a stream, a follower or a takeover.

#: the headers of an event stream that no cache and no proxy holds back; WSGI forbids hop-by-hop headers
SSE_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",  # without it, nginx holds an answer back to its end
}

#: by the code of an error the status it has for a browser, and what that is told: an error's own words may hold
#: what is between the server and the provider
_PUBLIC = {
    "AUTH_ERROR": (502, "this service cannot ask the model: it is not set up for it"),
    "QUOTA_EXCEEDED": (503, "this service has used up its quota of the model"),
    "RATE_LIMIT": (429, "the model is asked too often at the moment: try again later"),
    "MODEL_NOT_FOUND": (502, "the model is not to be had"),
    "INVALID_REQUEST": (400, "the model cannot answer this request: perhaps it is too long"),
    "SERVER_ERROR": (502, "the model has failed, or is overloaded: try again later"),
    "NETWORK_ERROR": (502, "the model cannot be reached: try again later"),
    "TIMEOUT": (504, "the model took too long"),
    "INVALID_SSE_FORMAT": (502, "the model gave an answer that cannot be read"),
    "STREAM_ERROR": (502, "the model reported an error in the midst of its answer"),
    "CONNECTION_LOST": (502, "the connection to the model was lost, and the answer could not be made whole"),
    "CANCELLED": (499, "the answer was stopped"),
    "CIRCUIT_OPEN": (503, "the model has failed often of late, and is not asked at the moment"),
    "QUEUE_FULL": (503, "too many are waiting for an answer: try again later"),
    "QUEUE_TIMEOUT": (503, "the wait for a turn was too long: try again later"),
    "SHUTTING_DOWN": (503, "this server is going down: ask again"),
    "ABANDONED": (503, "nobody waited for this answer any more, and it was ended"),
    "PRODUCER_LOST": (503, "the process that wrote this answer has died"),
    "INTERNAL_ERROR": (500, "this service has failed"),
}


def _public(code: str, retry_after: float | None = None) -> dict[str, Any]:
    """The code and message of an error for a browser"""
    told: dict[str, Any] = {"code": code, "message": _PUBLIC[code][1]}
    if retry_after is not None:
        told["retry_after"] = round(retry_after, 3)
    return told


def _public_code(error: Exception) -> str:
    """The code of an error, if it is one of sheepsse: the code of a vendor may hold anything"""
    code = getattr(type(error), "code", "")
    return code if code in _PUBLIC else "INTERNAL_ERROR"


class _Event(NamedTuple):
    """An event for the browser"""

    name: str
    data: str
    #: its number in the stream, from 1; None for an event that is not kept
    number: int | None = None

    @property
    def is_final(self) -> bool:
        """Whether no event can follow"""
        return self.number is not None and self.name in ("done", "failed", "interrupted")

    def encoded(self, stream_id: str) -> bytes:
        id = f"{stream_id}:{self.number}" if stream_id and self.number is not None else ""
        return encode_event(ServerSentEvent(self.name, self.data, id))


#: events without a number: names, and data for JSON or JSON itself
_Named = Sequence["tuple[str, Any]"]


# made once: json.dumps makes an encoder for each event
_to_ascii_json = json.JSONEncoder(separators=(",", ":")).encode


def _data(content: Any) -> str:
    """The data of an event as JSON in ASCII, without line ends"""
    return content if isinstance(content, str) else _to_ascii_json(content)


class _NamedEvents:
    """The events for a page: the name of an event says what its data is"""

    def chunk(self, chunk: Chunk) -> _Named:
        which = {"index": chunk.index} if chunk.index else {}
        texts = (("reasoning", chunk.reasoning), ("message", chunk.text), ("refusal", chunk.refusal))
        events: list[tuple[str, Any]] = [(name, {"content": text, **which}) for name, text in texts if text]
        if chunk.tool_calls:
            events.append(("tool_calls", {"tool_calls": [call._asdict() for call in chunk.tool_calls], **which}))
        return events

    def queued(self, place: int) -> _Named:
        return [("queued", {"position": place})]

    def end(self, name: str, facts: Mapping[str, Any], usage: Usage | None) -> _Named:
        return [(name, facts)]


def _chunk_of_event(name: str, data: Any) -> Chunk:
    """The Chunk that a named event was made of"""
    data = json.loads(data)
    if name == "tool_calls":
        return Chunk(tool_calls=tuple(ToolCall(**call) for call in data["tool_calls"]))
    field = {"message": "text", "reasoning": "reasoning", "refusal": "refusal"}.get(name)
    return Chunk(**{field: data["content"]}) if field else Chunk()


class _CompletionEvents:
    """The chunks for a client of OpenAI's Chat Completions

    https://platform.openai.com/docs/api-reference/chat-streaming
    """

    #: typed clients accept no other words
    _FINISH = {"stop": "stop", "length": "length", "tool_calls": "tool_calls", "refusal": "content_filter"}

    def __init__(self, usage: bool = False) -> None:
        self._common: dict[str, Any] = {"id": f"chatcmpl-{os.urandom(12).hex()}", "object": "chat.completion.chunk"}
        self._common.update(created=int(time.time()), model="")
        if usage:  # then all chunks have it, null before the last
            self._common["usage"] = None
        self._begun: set[int] = set()

    def chunk(self, chunk: Chunk) -> _Named:
        self._common["model"] = self._common["model"] or chunk.model
        delta: dict[str, Any] = {"reasoning_content": chunk.reasoning, "content": chunk.text, "refusal": chunk.refusal}
        delta = {name: text for name, text in delta.items() if text}
        if chunk.tool_calls:
            delta["tool_calls"] = list(map(self._tool_call, chunk.tool_calls))
        finish = None if chunk.finish is None else self._FINISH.get(chunk.finish, "stop")
        if not delta and finish is None:
            return ()
        if chunk.index not in self._begun:
            self._begun.add(chunk.index)
            delta = {"role": "assistant", **delta}
        return [self._said(choices=[{"index": chunk.index, "delta": delta, "finish_reason": finish}])]

    def _said(self, **fields: Any) -> tuple[str, Any]:
        return "message", {**self._common, **fields}

    @staticmethod
    def _tool_call(call: ToolCall) -> dict[str, Any]:
        if not (call.id or call.name):  # more of its arguments
            return {"index": call.index, "function": {"arguments": call.arguments}}
        id = call.id or f"call_{os.urandom(8).hex()}"  # Gemini and Ollama may send none, and a result must name one
        function = {"name": call.name, "arguments": call.arguments}
        return {"index": call.index, "id": id, "type": "function", "function": function}

    def queued(self, place: int) -> _Named:
        return ()

    def end(self, name: str, facts: Mapping[str, Any], usage: Usage | None) -> _Named:
        if name != "done":
            told = {name: facts.get(name) for name in ("code", "message")}
            return [("message", {"error": {**told, "type": name, "param": None}})]
        is_told = usage is not None and "usage" in self._common
        events = [self._said(choices=[], usage=self._counts(usage))] if usage is not None and is_told else []
        return [*events, ("message", "[DONE]")]

    @staticmethod
    def _counts(usage: Usage) -> dict[str, Any]:
        return {
            "prompt_tokens": usage.input_tokens,
            "completion_tokens": usage.output_tokens,
            "total_tokens": usage.total_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cache_read_tokens},
            "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        }


#: seconds between two looks of the watcher
_LOOK_EVERY = 0.025
#: seconds between two costly looks, and between two marks that a stream of another process is followed
_LOOK_CLOSER_EVERY = 0.25


class _Relaying:
    """The streams this process serves, and the thread that watches them"""

    def __init__(self) -> None:
        self.reset()

    def forget(self) -> None:
        """In a forked process: the streams belong to the parent, and a lock that was held would stay held"""
        productions = list(self.productions.values())
        self.reset()
        for production in productions:
            production.sink.forget()

    def reset(self) -> None:
        self.lock = threading.RLock()  # adding a stream may start the watcher
        #: a signal handler may set this, and must not take a lock: the watcher does the rest
        self.draining = False
        self.productions: dict[str, _Production] = {}
        self.relays: weakref.WeakSet[Relay] = weakref.WeakSet()  # a dropped relay ends its stream
        #: of relays that were collected, at any moment, when no lock may be taken
        self.dropped: collections.deque[tuple[_Pipe | _FileTail | _RedisTail, _Production | None]] = collections.deque()
        self._tails: dict[str, list[_FileTail]] = {}
        self._watcher: threading.Thread | None = None

    def add(self, charge: Relay | _Production) -> None:
        """Watches an object: ``look()`` is called until it is removed"""
        with self.lock:
            if isinstance(charge, Relay):
                self.relays.add(charge)
            else:
                self.productions[charge.id] = charge
            if self._watcher is None:
                _register_at_exit()
                self._watcher = threading.Thread(target=self._watch, name="sheepsse relays", daemon=True)
                self._watcher.start()

    def remove(self, charge: Relay | _Production) -> None:
        with self.lock:
            if isinstance(charge, Relay):
                self.relays.discard(charge)
            elif self.productions.get(charge.id) is charge:  # its stream may have another production already
                del self.productions[charge.id]

    def follow(self, id: str, tail: _FileTail) -> None:
        """Rings a tail for each event that a producer of this process writes"""
        with self.lock:
            self._tails.setdefault(id, []).append(tail)

    def unfollow(self, id: str, tail: _FileTail) -> None:
        with self.lock, contextlib.suppress(KeyError, ValueError):  # after a fork, the tail belongs to the parent
            self._tails[id].remove(tail)
            if not self._tails[id]:
                del self._tails[id]

    def ring(self, id: str) -> None:
        for tail in tuple(self._tails.get(id, ())):
            tail.bell.set()

    def is_followed(self, id: str) -> bool:
        return id in self._tails

    def _watch(self) -> None:
        while True:
            while self.dropped:
                _leave(*self.dropped.popleft())
            with self.lock:
                charges: list[Relay | _Production] = [*self.productions.values(), *self.relays]
                if not charges:
                    self._watcher = None
                    return
            if not threading.main_thread().is_alive():
                self.draining = True  # the process waits for serving threads, and they wait for their streams
            for charge in charges:
                try:
                    if self.draining:
                        charge.interrupt("SHUTTING_DOWN")
                    charge.look()
                except Exception:  # an error of one must not stop the others
                    _log.exception("stream %s cannot be looked after any more", charge.id)
                    self.remove(charge)
                    if isinstance(charge, _Production):
                        charge.stop("INTERNAL_ERROR")
            del charges[:], charge  # references here would keep a relay alive
            time.sleep(_LOOK_EVERY)


def drain(timeout: float = 5) -> bool:
    """Ends all streams that this process relays with a terminal event, and refuses new ones; for a server that stops

    Another process can take over a stream with a journal: its page gets ``interrupted``. Waits up to ``timeout``
    seconds, and returns whether all streams have ended. This happens at exit, too. But on SIGTERM a server may wait for
    its streams first: call drain() then, with 0 in a signal handler, which may block the serving thread.
    """
    _relaying.draining = True
    # a relay is gone once its server has sent the last event and closed the relay
    return _ended(lambda: not _relaying.productions and not len(_relaying.relays), timeout)


def _ended(is_over: Callable[[], bool], timeout: float) -> bool:
    until = time.monotonic() + timeout
    while not is_over():
        if time.monotonic() >= until:
            return False
        time.sleep(_LOOK_EVERY)
    return True


def _end_at_exit() -> None:
    """Writes the end of each stream into its journal; the serving threads have ended already"""
    _relaying.draining = True
    _ended(lambda: not _relaying.productions, 2)


@functools.lru_cache(None)
def _register_at_exit() -> None:
    atexit.register(_end_at_exit)


class _Production:
    """The producer: reads a stream in a thread of its own, and writes its events to a sink"""

    def __init__(self, id: str, sink: _Pipe | _FileLog | _RedisLog, speaker: _NamedEvents | _CompletionEvents) -> None:
        self.id = id
        self.sink = sink
        self.request_id = ""
        self.owner = ""
        #: seconds that it runs without a follower; None until it has one
        self._grace: float | None = None
        self.traffic: _Traffic | None = None
        #: whether start() may raise an error before the first event, instead of an event
        self.may_refuse = True
        self.refusal: SheepError | None = None
        self.begun = threading.Event()  # set with the first event, or at the end
        self._speaker = speaker
        self._stream: Stream | None = None
        self._lock = threading.Lock()
        self._stopped = ""  # the code of the reason
        self._has_said = False  # whether a piece of the answer was written
        self._bytes = 0
        self._heard_at = 0.0  # the last moment with a follower

    def start(self, stream: Stream) -> None:
        """Begins to read, in a daemon thread: a process that exits does not wait for a model"""
        self._stream = stream
        stream._report_position(self.queued)
        self.request_id = self.request_id or stream.request_id
        _relaying.add(self)
        if _relaying.draining:
            self.stop("SHUTTING_DOWN")
        if self.traffic is not None:
            self.traffic.began()
        try:
            threading.Thread(target=self._read, args=(stream,), name="sheepsse relay", daemon=True).start()
        except RuntimeError as error:
            self.refusal = ServerError("the system gives no more threads")
            self._let_go(stream, "failed")
            raise self.refusal from error

    def give_up(self, name: str, code: str) -> None:
        """Ends a stream that was not started"""
        self._put(self._speaker.end(name, {**_public(code), "request_id": self.request_id}, None))
        self._end_sink()

    def await_first(self, seconds: float) -> None:
        """Waits for the first event; raises the error that came instead"""
        self.begun.wait(seconds)
        with self._lock:
            self.may_refuse = False
        if self.refusal is not None:
            raise self.refusal

    def interrupt(self, code: str) -> None:
        self.stop(code)

    def stop(self, code: str) -> None:
        """Ends the stream from outside; the first reason counts"""
        with self._lock:
            self._stopped = self._stopped or code
        if self._stream is not None:
            self._stream.cancel()

    def attended(self, grace: float) -> None:
        """From now on, the stream must have a follower, except for this many seconds"""
        # followers of other processes mark this often that they follow, and must not count as gone between
        self._heard_at, self._grace = time.monotonic(), max(grace, 2 * _LOOK_CLOSER_EVERY)

    def queued(self, place: int) -> None:
        """Writes the position in the queue of the limiter"""
        self._put(self._speaker.queued(place))

    def _read(self, stream: Stream) -> None:
        ending = "failed"
        try:
            for chunk in stream.chunks():
                self._put(self._speaker.chunk(chunk), chunk, stream)
            ending = "done"
            self._end(stream, "done", {})
        except SheepError as error:
            ending = self._fail(stream, error)
        except Exception as error:
            _log.exception("request %s: the relay has failed", self.request_id)
            ending = self._fail(stream, error)
        finally:
            self._let_go(stream, ending)

    def _let_go(self, stream: Stream, ending: str) -> None:
        try:
            stream.close()
            self._end_sink()
        finally:
            _relaying.remove(self)
            _relaying.ring(self.id)
            self.begun.set()
            if self.traffic is not None:
                self.traffic.ended(ending, stream.stats.ttft)

    def _end_sink(self) -> None:
        is_void = self.refusal is not None and self.sink.resumed is None
        for end in (self.sink.discard, self.sink.end) if is_void else (self.sink.end,):
            try:
                end()
            except (CheckpointError, OSError) as error:
                _log.warning("request %s: %s", self.request_id, error)

    def _put(self, events: _Named, chunk: Chunk | None = None, stream: Stream | None = None) -> None:
        source = None if chunk is None or stream is None else _own_event_id(chunk, stream)
        texts = [(name, _data(content)) for name, content in events]
        self._bytes += sum(len(text) for _, text in texts)
        self.sink.put(texts, chunk, source)
        if events:
            self._has_said = self._has_said or chunk is not None
            self.begun.set()

    def _end(self, stream: Stream, name: str, told: Mapping[str, Any]) -> None:
        """Writes the last event"""
        facts = {**told, "request_id": self.request_id, **_facts(stream, self._bytes)}
        self._put(self._speaker.end(name, facts, stream.usage))

    def _fail(self, stream: Stream, error: Exception) -> str:
        """Writes why the stream failed, and returns its outcome for the statistics"""
        told = _public(_public_code(error), getattr(error, "retry_after", None))
        with self._lock:
            if self.may_refuse and not (self.begun.is_set() or self._stopped) and isinstance(error, SheepError):
                self.refusal = error
                return "failed"
        try:
            if self._stopped not in ("", "CANCELLED"):
                self._interrupt(_public(self._stopped))
            elif isinstance(error, StreamCancelled):
                self._end(stream, "interrupted", _public("CANCELLED"))
            elif self.sink.resumed is not None and not self._has_said:  # the journal stays open to another attempt
                self._interrupt(told, tried=True)
            else:
                self._end(stream, "failed", told)
        except (CheckpointError, StreamCancelled) as failure:
            _log.warning("request %s: its end cannot be told: %s", self.request_id, failure)
        return "aborted" if self._stopped else "failed"

    def _interrupt(self, told: Mapping[str, Any], tried: bool = False) -> None:
        """Writes that the stream ended here and may be taken over; ``tried`` for a takeover that failed"""
        events = self._speaker.end("interrupted", {**told, "request_id": self.request_id}, None)
        self.sink.interrupt([(name, _data(content)) for name, content in events], tried)

    def look(self) -> None:
        """Stops the stream where that was requested, or where it has no follower any more"""
        now = time.monotonic()
        if _relaying.is_followed(self.id):
            self._heard_at = now
        try:
            asked_to_stop, is_followed = self.sink.look()
        except CheckpointError as error:
            _log.warning("request %s: %s", self.request_id, error)
            self.stop("PRODUCER_LOST")
            return
        if asked_to_stop:
            self.stop("CANCELLED")
        if is_followed:
            self._heard_at = now
        if self._grace is not None and now - self._heard_at > self._grace:
            _log.debug("request %s: nobody came back for %s s", self.request_id, self._grace)
            self.stop("ABANDONED")


def _own_event_id(chunk: Chunk, stream: Stream) -> str:
    """The id of the upstream event of a chunk, "" where the event has none of its own"""
    return chunk.event_id if stream._has_own_id else ""


def _facts(stream: Stream, size: int) -> dict[str, Any]:
    """The data of the last event; seconds, and bytes of the events"""
    stats, cost = stream.stats, stream.cost
    return {
        "model": stream.model,
        "finish_reason": stream.finish_reason,
        "continuity": stream.continuity,
        "duration": round(stats.elapsed, 4),
        "ttft": None if stats.ttft is None else round(stats.ttft, 4),
        "chunks": stats.chunks,
        "bytes": size,
        "bytes_per_second": round(size / stats.elapsed) if stats.elapsed else None,
        "tokens_per_second": None if stats.tokens_per_second is None else round(stats.tokens_per_second, 1),
        "usage": _plain_usage(stream.usage),
        "cost": None if cost is None else str(cost),
    }


class _Pipe:
    """The events for a single client: a number of them are buffered, then the production waits"""

    #: events in the buffer at most
    _MOST = 256
    resumed = None  # nothing is kept to resume from

    def __init__(self, patience: float) -> None:
        self._events: collections.deque[_Event] = collections.deque()
        self._changed = threading.Condition()
        self._patience = patience
        self._number = 0
        self._ended = self._left = False

    # For the production

    def put(self, events: Sequence[tuple[str, str]], chunk: Chunk | None = None, source: str | None = None) -> None:
        for name, data in events:
            self._number += 1
            self._add(_Event(name, data, self._number))

    def interrupt(self, events: Sequence[tuple[str, str]], tried: bool = False) -> None:
        for name, data in events:
            self._add(_Event(name, data))

    def _add(self, event: _Event) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._left or len(self._events) < self._MOST, self._patience):
                self._left = True  # the client has not gone, but reads nothing
                raise StreamCancelled(f"the client has taken nothing for {self._patience} seconds")
            if not self._left:
                self._events.append(event)
                self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def discard(self) -> None:
        """Nothing to remove"""

    def forget(self) -> None:
        """Nothing to release"""

    def look(self) -> tuple[bool, bool]:
        return False, True

    # For the relay

    def read(self, timeout: float) -> list[_Event] | None:
        """The next events, none after the time limit; None at the end"""
        with self._changed:
            self._changed.wait_for(lambda: self._left or self._ended or self._events, timeout)
            events = [] if self._left else list(self._events)
            self._events.clear()
            self._changed.notify_all()
            return events or (None if self._left or self._ended else [])

    def cut(self, told: str) -> None:
        """The production writes why it ends"""

    def look_on(self) -> None:
        """Nothing to look for: the production rings"""

    def leave(self) -> None:
        """The reader has gone: the buffer is dropped, and the production does not wait"""
        with self._changed:
            self._left = True
            self._changed.notify_all()

    def close(self) -> None:
        self.leave()


# The journal as a folder


class _Journaled(NamedTuple):
    """The journal of a stream whose producer has gone"""

    header: Mapping[str, Any]
    #: the number of events
    number: int
    is_final: bool
    #: where to resume; None without a chunk
    point: ResumePoint | None
    #: takeovers since the last event, all in vain
    tries: int


def _journaled(contents: Sequence[Mapping[str, Any]]) -> _Journaled:
    """Reads the lines of a journal: a header, then events and other parts of the answer"""
    answer, ids, number, is_final, tries = _Answer(), [], 0, False, 0
    for line in contents[1:]:
        if "interrupted" in line:
            tries += line.get("tried", False)
            continue
        chunk = _chunk_of_fields(dict(line["chunk"])) if "chunk" in line else Chunk()
        if "event" in line:
            number, tries = number + 1, 0
            is_final = _Event(line["event"], "", number).is_final
            chunk = _chunk_of_event(line["event"], line["data"])
        answer.add(chunk._replace(event_id=line.get("from", "")))
        ids.append(line.get("from"))  # only the last line of an upstream event has its id
    known = [id for id in ids if id is not None]
    marks = _marks_of(known) if ids and ids[-1] is not None else []
    return _Journaled(contents[0], number, is_final, answer.resume_point(marks) if answer.given else None, tries)


def _interruption(events: Sequence[tuple[str, str]], tried: bool) -> dict[str, Any]:
    """The line for an interruption; it is no event, for the stream may be taken over"""
    ((_, told),) = events
    return {"interrupted": told, **({"tried": True} if tried else {})}


def _lines_of(
    events: Sequence[tuple[str, str]], chunk: Chunk | None, source: str | None, known: set[str]
) -> list[dict[str, Any]]:
    """The lines for the events of a chunk, and for its other parts; ``known`` holds the parts that were written"""
    lines: list[dict[str, Any]] = []
    if chunk is not None:
        said = {name: getattr(chunk, name) for name in ("id", "model") if name not in known and getattr(chunk, name)}
        known.update(said)
        if said or chunk.finish_reason or chunk.usage or chunk.vendor:
            rest = Chunk(finish_reason=chunk.finish_reason, finish=chunk.finish, usage=chunk.usage, **said)
            lines.append({"chunk": _chunk_fields(rest._replace(vendor=chunk.vendor))})
    lines += [{"event": name, "data": data} for name, data in events]
    if source and not lines:
        lines.append({"chunk": {}})
    if source is not None and lines:
        lines[-1]["from"] = source
    return lines


class _Log:
    """The events of a production, where any process may follow them"""

    def __init__(self, resumed: _Journaled | None) -> None:
        #: the journal that this log continues, or None
        self.resumed = resumed
        self._known: set[str] = set()

    def put(self, events: Sequence[tuple[str, str]], chunk: Chunk | None = None, source: str | None = None) -> None:
        self.write(_lines_of(events, chunk, source, self._known))

    def interrupt(self, events: Sequence[tuple[str, str]], tried: bool = False) -> None:
        self.write([_interruption(events, tried)])

    def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Appends lines; CheckpointError where it cannot"""


class _Tail:
    """The events of a log, as any process writes them"""

    def __init__(self) -> None:
        self._number = 0
        self._events: list[_Event] = []  # read, and not returned yet
        self._interrupted = ""  # by the log, after the last event
        self._cut = ""  # by this process
        self._left = False
        #: whether no event follows
        self.is_over = False

    def _note(self, line: Mapping[str, Any]) -> None:
        """Takes the next line of the log"""
        if "event" in line:
            self._number += 1
            self._events.append(_Event(line["event"], line["data"], self._number))
            self._interrupted = ""
        self._interrupted = line.get("interrupted", self._interrupted)

    def _given(self) -> list[_Event]:
        """Returns the events that were read"""
        events, self._events = self._events, []
        self.is_over = events[-1].is_final
        return events

    def _interruption(self) -> list[_Event]:
        """The event for an end without a last event"""
        self.is_over = True
        return [_Event("interrupted", self._cut or self._interrupted or _data(_public("PRODUCER_LOST")))]

    def cut(self, told: str) -> None:
        """This process stops"""
        self._cut = told

    def leave(self) -> None:
        """The reader has gone"""
        self._left = True


class _FileLog(_Log):
    """The events of a production, in a file"""

    def __init__(self, id: str, lines: _Lines, mark: str, resumed: _Journaled | None = None) -> None:
        super().__init__(resumed)
        self._id = id
        self._lines = lines
        self._mark = mark
        self._seen: int | None = None

    def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        for line in lines:  # one write each: nothing of a failed write may have been read
            self._lines.write([line])
            _relaying.ring(self._id)

    def forget(self) -> None:
        """Closes the copy of a fork, which would keep the lock"""
        self._lines.close()

    def end(self) -> None:
        self._lines.close()

    def discard(self) -> None:
        """Removes a log that nobody knows of"""
        self._lines.remove()
        os.unlink(self._mark)

    def look(self) -> tuple[bool, bool]:
        """Whether a stop was requested, and whether a process has marked of late that it follows"""
        try:
            mark = os.stat(self._mark, follow_symlinks=False)
        except FileNotFoundError:
            return False, False
        before, self._seen = self._seen, mark.st_mtime_ns
        return mark.st_size > 0, before not in (None, mark.st_mtime_ns)


class _FileTail(_Tail):
    """The events of a file, as they are written"""

    def __init__(self, id: str, file: io.FileIO, path: str, mark: str) -> None:
        super().__init__()
        self.bell = threading.Event()
        self._id = id
        self._file = file
        self._path = path
        self._mark = mark
        self._size = self._checksum = 0  # of the lines that were read
        self._looked_at = 0.0
        headers = self._read_lines()
        self.header: Mapping[str, Any] = headers[0] if headers else {}
        for line in headers[1:]:
            self._note(line)
        _relaying.follow(id, self)

    def _read_lines(self) -> list[Any]:
        """The whole lines of the next block; a torn line may be cut off and written anew"""
        size = _BLOCK
        block = os.pread(self._file.fileno(), size, self._size)
        while len(block) == size and b"\n" not in block:
            size *= 2
            block = os.pread(self._file.fileno(), size, self._size)
        lines = block.split(b"\n")[:-1]
        contents, size, self._checksum = _good_lines(lines, self._path, self._checksum)
        self._size += size
        if len(contents) < len(lines):
            raise _damaged(self._path, "a line is not as it was written")
        return contents

    def skip(self, after: int) -> bool:
        """Skips the events up to a number; False where that event is missing"""
        while self._number < after:
            self._events.clear()
            self._fill()
            if not self._events:
                return False
        skipped = len(self._events) - (self._number - after)
        if skipped > 0:
            self.is_over = self._events[skipped - 1].is_final
            del self._events[:skipped]
        return True

    def read(self, timeout: float) -> list[_Event] | None:
        """The next events, none after the time limit; None at the end"""
        until = time.monotonic() + timeout
        while not (self._left or self.is_over):
            self.bell.clear()
            is_dead = self._cut or self._is_dead()  # before reading: then its last lines are read, too
            self._fill()
            if self._events:
                return self._given()
            if is_dead:
                return self._interruption()
            if not self.bell.wait(until - time.monotonic()):
                return []
        return None

    def has_ended(self) -> bool:
        """Whether nothing follows, unless the stream is taken over"""
        is_dead = self._is_dead()
        self._fill()
        return self.is_over or (is_dead and not self._events)

    def _fill(self) -> None:
        """Reads the next events, where none is left"""
        size = -1
        while not self._events and size != self._size:
            size = self._size
            for line in self._read_lines():
                self._note(line)

    def _is_dead(self) -> bool:
        """Whether the producer is dead: it holds a lock, which ends with its process"""
        return self._id not in _relaying.productions and _is_free(self._file)

    def cut(self, told: str) -> None:
        super().cut(told)
        self.bell.set()

    def look_on(self) -> None:
        """Rings for lines of another process, and marks for its producer that the stream is followed"""
        if self._id in _relaying.productions or self._left:
            return
        if os.fstat(self._file.fileno()).st_size > self._size:
            self.bell.set()
        now = time.monotonic()
        if now - self._looked_at >= _LOOK_CLOSER_EVERY:
            self._looked_at = now
            with contextlib.suppress(FileNotFoundError):
                os.utime(self._mark, follow_symlinks=False)
            if _is_free(self._file):
                self.bell.set()

    def leave(self) -> None:
        super().leave()
        self.bell.set()

    def close(self) -> None:
        self.leave()
        _relaying.unfollow(self._id, self)
        self._file.close()


def _is_free(file: io.FileIO) -> bool:
    """Whether a file has no writer"""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(file, fcntl.LOCK_UN)
    return True


def _make_mark(mark: str) -> None:
    """Makes the file in which other processes request a stop, and mark that they follow"""
    _created(mark).close()


class _Folder:
    """A store of streams: files in a folder, for all processes of a machine"""

    def __init__(self, folder: str | os.PathLike[str], max_age: float) -> None:
        try:
            import fcntl  # noqa: F401
        except ImportError as error:
            raise ValueError("journal= needs the file locks of POSIX: redis= works on any system") from error
        self._folder = os.fsdecode(folder)
        self._max_age = max_age
        self._expired_at = 0.0

    def _paths(self, id: str) -> tuple[str, str]:
        folder = _checked_folder(self._folder)
        return os.path.join(folder, f"{id}.relay"), os.path.join(folder, f"{id}.mark")

    def begin(self, id: str, header: Mapping[str, Any]) -> _FileLog:
        path, mark = self._paths(id)
        _make_folder(path)
        self._expire()
        lines = _Lines(path, header, _created_and_locked(path), (0, 0))
        try:
            _make_mark(mark)
            lines.write([])
        except BaseException:
            lines.close()
            raise
        return _FileLog(id, lines, mark)

    def take_over(self, id: str) -> _FileLog | None:
        """The log of a stream whose producer has gone; None where another process has it, or it is complete"""
        path, mark = self._paths(id)
        file = self._locked(path)
        if file is None:
            return None
        try:
            *lines, _ = _read_whole(file, path).split(b"\n")
            contents, size, checksum = _good_lines(lines, path)
            if len(contents) < len(lines):
                raise _damaged(path, f"line {len(contents) + 1} is not as it was written")
            kept = _journaled(contents)
            if not kept.is_final:
                _make_mark(mark)
                return _FileLog(id, _Lines(path, kept.header, file, (size, checksum)), mark, kept)
        except BaseException:
            file.close()
            raise
        file.close()
        return None

    def _locked(self, path: str) -> io.FileIO | None:
        """The file for a writer; None where there is another writer"""
        while True:
            try:
                return _locked(path, os.O_RDWR | os.O_APPEND)
            except CheckpointError as error:
                if not error.retryable:
                    raise
                file = _opened(path, os.O_RDONLY)
                if file is not None:
                    with file:  # perhaps a follower was just testing the lock
                        if not _is_free(file):
                            return None

    def open(self, id: str) -> _FileTail | None:
        path, mark = self._paths(id)
        file = _opened(path, os.O_RDONLY)
        if file is None:
            return None
        try:
            return _FileTail(id, file, path, mark)
        except BaseException:
            file.close()
            raise

    def stop(self, id: str) -> None:
        """Requests that the producer stop, in any process"""
        mark = _opened(self._paths(id)[1], os.O_RDWR | os.O_APPEND)
        if mark is not None:
            with mark:
                mark.write(b"stop")

    def _expire(self) -> None:
        """Removes old streams that have no writer"""
        now = time.time()
        if now - self._expired_at < 60:
            return
        self._expired_at = now
        for name in os.listdir(self._folder):
            id, _, kind = name.partition(".")
            path, mark = self._paths(id)
            file = self._expired(path, now) if kind == "relay" else None
            if file is not None:
                with file:
                    _remove(file, path)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(mark)

    def _expired(self, path: str, now: float) -> io.FileIO | None:
        """The file of an old stream, locked; None where it is to stay"""
        try:
            is_old = now - os.stat(path).st_mtime >= self._max_age
            return _locked(path, os.O_RDWR | os.O_APPEND) if is_old else None
        except (FileNotFoundError, CheckpointError):  # removed meanwhile, or in use
            return None


# The journal in Redis


class _RedisLog(_Log):
    """The events of a production, in a Redis stream

    A production writes while it is the owner, which it renews again and again. A production that was taken for dead,
    and whose stream another process took over, is refused. The id of an entry is the number of its event, and other
    lines come after it (https://redis.io/docs/latest/commands/xadd/): a line whose reply was lost can be written again.
    """

    #: seconds for which a producer counts as alive after it renewed its lease
    LEASE = 1.0
    _WRITE = """
        local owner = redis.call('get', KEYS[2])
        if owner and owner ~= ARGV[1] then return 0 end
        redis.call('set', KEYS[2], ARGV[1], 'px', ARGV[2])
        for i = 4, #ARGV, 2 do
            local added = redis.pcall('xadd', KEYS[1], ARGV[i], 'line', ARGV[i + 1])
            if type(added) == 'table' and added.err and not string.find(added.err, 'equal or smaller', 1, true) then
                return added
            end
        end
        redis.call('expire', KEYS[1], ARGV[3])
        return 1"""
    _END = """
        redis.call('expire', KEYS[1], ARGV[2])
        if redis.call('get', KEYS[2]) == ARGV[1] then redis.call('del', KEYS[2]) end"""

    def __init__(
        self, store: _Redis, id: str, token: str, resumed: _Journaled | None = None, last: str = "0-0"
    ) -> None:
        super().__init__(resumed)
        self.key = _redis_key(id)
        self.seen: Any = None
        #: the result of the last look of the store: owner or not, stop or not, followed or not
        self.found: tuple[Any, Any, Any] = 1, None, None
        self._store = store
        self._token = token
        self._number, self._part = map(int, last.split("-"))

    def arguments(self, *lines: str) -> tuple[Any, ...]:
        """The arguments of the script that renews the lease and writes lines"""
        lease = math.ceil(self.LEASE * 1000)
        return self._WRITE, 2, self.key, f"{self.key}:owner", self._token, lease, self._store.max_age, *lines

    def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        number, part, entries = self._number, self._part, []
        for line in lines:
            number, part = (number + 1, 0) if "event" in line else (number, part + 1)
            entries += [f"{number}-{part}", _to_json(line)]
        if entries and not _asked_again(lambda: self._store.redis.eval(*self.arguments(*entries))):
            raise CheckpointError("another process goes on with the stream")
        self._number, self._part = number, part

    def end(self) -> None:
        self._store.discard(self)
        with _redis_errors():
            self._store.redis.eval(self._END, 2, self.key, f"{self.key}:owner", self._token, self._store.max_age)

    def discard(self) -> None:
        with _redis_errors():
            self._store.redis.delete(self.key)

    def forget(self) -> None:
        """Nothing to close: Redis knows only the owner"""

    def look(self) -> tuple[bool, bool]:
        """Whether a stop was requested, and whether a process has marked of late that it follows"""
        self._store.look()
        is_owner, stop, seen = self.found
        if not is_owner:
            raise CheckpointError("another process goes on with the stream")
        before, self.seen = self.seen, seen
        return stop is not None, seen not in (None, before)


class _RedisTail(_Tail):
    """The events of a Redis stream, as they are written"""

    _WAIT = 0.1

    def __init__(self, store: _Redis, id: str, header: Mapping[str, Any]) -> None:
        super().__init__()
        self.header = header
        self._store, self._redis = store, store.redis
        self._key = _redis_key(id)
        self._last = "0-1"
        self._was_alive = True
        self._seen_at = 0.0

    def skip(self, after: int) -> bool:
        """Skips the events up to a number; False where that event is missing"""
        if not after:
            return True
        found = _asked_again(lambda: self._redis.xrange(self._key, f"{after}-0", f"{after}-0"))
        if found:
            line = _line_of(found[0][1])
            self.is_over = _Event(line["event"], "", after).is_final
            self._number, self._last = after, f"{after}-0"
        return bool(found)

    def has_ended(self) -> bool:
        """Whether nothing follows, unless the stream is taken over"""
        is_alive = _asked_again(lambda: self._redis.exists(f"{self._key}:owner"))
        _asked_again(self._take)
        return self.is_over or not (is_alive or self._events)

    def read(self, timeout: float) -> list[_Event] | None:
        """The next events, none after the time limit; None at the end"""
        until = time.monotonic() + timeout
        while not (self._left or self.is_over):
            _asked_again(self._await)
            if self._events:
                return self._given()
            if self._cut or not self._was_alive:
                return self._interruption()
            if time.monotonic() >= until:
                return []
        return None

    def _await(self) -> None:
        """Waits for events a while; without any, tests whether the producer is alive"""
        self._say_that_it_follows()
        came = self._events or self._redis.xread({self._key: self._last}, count=1, block=math.ceil(self._WAIT * 1000))
        if not came:
            self._was_alive = bool(self._redis.exists(f"{self._key}:owner"))
        if came or not self._was_alive:
            self._take()

    def _take(self) -> None:
        for id, fields in self._redis.xrange(self._key, f"({self._last}", count=100):
            line, last = _line_of(fields), _text_of(id)
            if "event" in line and not last.startswith(f"{self._number + 1}-"):
                if self._events:  # events before it come first
                    return
                raise CheckpointError(f"Redis has lost event {self._number + 1} of a stream")
            self._note(line)
            self._last = last

    def _say_that_it_follows(self) -> None:
        now = time.monotonic()
        if now - self._seen_at >= _LOOK_CLOSER_EVERY:
            self._seen_at = now
            with self._redis.pipeline() as pipe:
                pipe.incr(f"{self._key}:seen")
                pipe.expire(f"{self._key}:seen", self._store.max_age)
                pipe.execute()

    def look_on(self) -> None:
        """Nothing to look for: the tail waits for Redis"""

    def close(self) -> None:
        self.leave()


def _redis_key(id: str) -> str:
    """The common prefix of the keys of a stream; the braces keep them in one slot of a cluster"""
    return f"sheepsse:{{{id}}}"


def _text_of(value: Any) -> str:
    """A reply of Redis as text, whether its client decodes or not"""
    return value.decode() if isinstance(value, bytes) else str(value)


def _line_of(fields: Mapping[Any, Any]) -> Any:
    (line,) = fields.values()
    return json.loads(line)


@contextlib.contextmanager
def _redis_errors() -> Iterator[None]:
    """Raises CheckpointError for errors of Redis"""
    import redis  # type: ignore[import-not-found,unused-ignore]  # an extra

    try:
        yield
    except redis.RedisError as error:
        raise CheckpointError(f"the journal in Redis cannot be used: {type(error).__name__}") from error


def _asked_again(ask: Callable[[], _T]) -> _T:
    """The reply of Redis; where a reply is lost, the command is sent once more, which changes nothing"""
    try:
        with _redis_errors():
            return ask()
    except CheckpointError as error:
        if not error.__cause__:  # not an error of Redis
            raise
        _log.debug("%s: it is asked once more", error)
    with _redis_errors():
        return ask()


class _Redis:
    """A store of streams in Redis, from 6.2 on, for all machines that share it"""

    def __init__(self, redis: Any, max_age: float) -> None:
        try:
            from redis import Redis  # type: ignore[import-not-found,unused-ignore]  # an extra
        except ImportError as error:
            raise MissingExtraError("redis= needs the package redis: pip install 'sheepsse[redis]'") from error
        self.redis = redis
        if isinstance(redis, str):
            self.redis = Redis.from_url(redis, socket_timeout=5, socket_connect_timeout=5)
            weakref.finalize(self, self.redis.close)
        self.max_age = math.ceil(max_age)
        #: the logs that this process writes; any thread may add one while the watcher looks
        self._logs: set[_RedisLog] = set()
        self._lock = threading.Lock()
        self._looked_at = 0.0

    def begin(self, id: str, header: Mapping[str, Any]) -> _RedisLog:
        log = _RedisLog(self, id, os.urandom(8).hex())
        log.write([{"sheepsse": _JOURNAL_VERSION, **header}])
        self.add(log)
        return log

    def add(self, log: _RedisLog) -> None:
        with self._lock:
            self._logs.add(log)

    def discard(self, log: _RedisLog) -> None:
        with self._lock:
            self._logs.discard(log)

    def take_over(self, id: str) -> _RedisLog | None:
        """The log of a stream whose producer has gone; None where another process has it, or it is complete"""
        token, lease, key = os.urandom(8).hex(), math.ceil(_RedisLog.LEASE * 1000), _redis_key(id)
        owner = f"{key}:owner"
        if not _asked_again(
            lambda: self.redis.set(owner, token, nx=True, px=lease) or _text_of(self.redis.get(owner)) == token
        ):
            return None
        entries = _asked_again(lambda: self.redis.xrange(key))
        kept = _journaled([_line_of(fields) for _, fields in entries])
        log = _RedisLog(self, id, token, kept, _text_of(entries[-1][0]))
        if kept.is_final:
            log.end()
            return None
        self.add(log)
        return log

    def open(self, id: str) -> _RedisTail | None:
        first = _asked_again(lambda: self.redis.xrange(_redis_key(id), count=1))
        return _RedisTail(self, id, _line_of(first[0][1])) if first else None

    def stop(self, id: str) -> None:
        """Requests that the producer stop, on any machine"""
        _asked_again(lambda: self.redis.set(f"{_redis_key(id)}:stop", 1, ex=self.max_age))

    def look(self) -> None:
        """Renews the leases of all logs of this process, and reads their marks, in one round trip"""
        now = time.monotonic()
        if now - self._looked_at < _LOOK_CLOSER_EVERY / 2:
            return
        with self._lock:
            logs = list(self._logs)
        found: list[Any] = [0, (None, None)] * len(logs)  # so that a lost Redis is waited for only once
        try:
            found = _asked_again(lambda: self._found(logs))
        finally:
            self._looked_at = time.monotonic()
            for log, is_owner, marks in zip(logs, found[::2], found[1::2]):
                log.found = is_owner, *marks

    def _found(self, logs: Sequence[_RedisLog]) -> list[Any]:
        with self.redis.pipeline(transaction=False) as pipe:
            for log in logs:
                pipe.eval(*log.arguments())
                pipe.mget(f"{log.key}:stop", f"{log.key}:seen")
            found: list[Any] = pipe.execute()
        return found


# What a WSGI server iterates


class Relay:
    """A stream for a WSGI server: an iterator of bytes, each block whole events, with ``close()``

    Made by ``relay()``. Belongs to one thread.
    """

    def __init__(
        self,
        source: _Pipe | _FileTail | _RedisTail,
        id: str,
        heartbeat: float,
        retry: int | None = None,
        production: _Production | None = None,
        stream: Stream | None = None,
    ) -> None:
        #: the id of the stream, a prefix of the ids of its events, which nobody can guess
        self.id = id
        self._ids = id
        self._source = source
        self._heartbeat = heartbeat
        self.first = b"" if retry is None else b"retry: %d\n\n" % retry  # sent before all events
        self._production, self._stream = production, stream
        self._started = self._closed = False
        self._has_gone: Callable[[], bool] | None = None
        self._lock = threading.Lock()  # held by the watcher, or by close()
        self._traffic: _Traffic | None = None

    def start(self, environ: Mapping[str, Any] | None = None) -> Relay:
        """Opens the stream, waits for its first event, at most ``heartbeat`` seconds, and returns itself

        Raises an error that comes instead, so that the response can have its status. After this method, or without it,
        an error is the event ``failed``. With the WSGI ``environ`` of the request, a client that leaves is noticed at
        once where the server shows its socket (gunicorn, Werkzeug from 2.0 on), else by a failed write. A client that
        reads nothing for two heartbeats is given up (Linux).
        """
        if self._closed or self._started:
            return self
        self._attend(environ or {})
        try:
            self._begin(may_refuse=True)
            if self._production is not None:
                self._production.await_first(self._heartbeat)
        except BaseException:
            self.close()
            raise
        return self

    def _begin(self, may_refuse: bool) -> None:
        self._started = True
        _relaying.add(self)
        if self._production is not None and self._stream is not None:
            self._production.may_refuse = may_refuse
            self._production.start(self._stream)

    def _attend(self, environ: Mapping[str, Any]) -> None:
        """Watches the socket of the client"""
        sock = next((environ[name] for name in _SOCKETS if environ.get(name) is not None), None)
        self._has_gone = environ.get("waitress.client_disconnected")
        if sock is None:
            return
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            with contextlib.suppress(OSError):  # not TCP
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(self._heartbeat * 2000))
        if not hasattr(sock, "pending"):  # a TLS socket cannot be tested
            self._has_gone = functools.partial(_is_closed, sock)

    def __iter__(self) -> Relay:
        return self

    def __next__(self) -> bytes:
        if self._closed:
            raise StopIteration
        if not self._started:
            self._begin(may_refuse=False)
        try:
            events = self._source.read(self._heartbeat)
        except CheckpointError as error:
            _log.warning("stream %s: %s", self.id, error)
            self._source.leave()
            events = [_Event("interrupted", _data(_public("PRODUCER_LOST")))]
        if events is None:
            self.close()
            raise StopIteration
        block = b"".join(event.encoded(self._ids) for event in events) or b": heartbeat\n\n"
        block, self.first = self.first + block, b""
        if self._traffic is not None:
            self._traffic.sent(len(block))
        return block

    def look(self) -> None:
        """Whether the client has left; called by the watcher"""
        with self._lock:
            if self._closed:
                return
            self._source.look_on()
            has_gone = self._has_gone is not None and self._has_gone()
        if has_gone:
            _log.debug("stream %s: its client has gone", self.id)
            _relaying.remove(self)
            self._source.leave()
            if self._production is not None:
                self._production.stop("ABANDONED")

    def interrupt(self, code: str) -> None:
        """Ends it for its client, which may reconnect elsewhere"""
        self._source.cut(_data(_public(code)))

    def close(self) -> None:
        """Releases all that is held; ends the stream, too, unless it has a journal; may be called again"""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        _relaying.remove(self)
        _leave(self._source, self._production)

    def __del__(self) -> None:
        if not self._closed and self._started:
            _relaying.dropped.append((self._source, self._production))


def _leave(source: _Pipe | _FileTail | _RedisTail, production: _Production | None) -> None:
    """The reader has gone; only a stream with a journal continues"""
    source.close()
    if production is not None:
        production.stop("ABANDONED")


#: keys of the WSGI environ with the socket of the client
_SOCKETS = ("gunicorn.socket", "werkzeug.socket", "sheepsse.socket")


def _is_closed(sock: socket.socket) -> bool:
    """Whether the other side has closed a connection, of which nothing will be read"""
    from urllib3.util.wait import wait_for_read

    try:
        return wait_for_read(sock, timeout=0) and sock.recv(1, socket.MSG_PEEK) == b""
    except (OSError, ValueError):  # reset, or closed here
        return True


def relay(
    stream: Stream,
    *,
    heartbeat: float = 15,
    retry: int | None = None,
    ids: bool = True,
    events: str = "named",
    usage: bool = False,
) -> Relay:
    """A Stream as Server-Sent Events for a browser: what a view or a WSGI application returns, with SSE_HEADERS

        def application(environ, start_response):
            answer = sheepsse.relay(client.stream("Explain SSE")).start(environ)
            start_response("200 OK", list(sheepsse.SSE_HEADERS.items()))
            return answer

    A thread reads the stream, at most 256 events ahead of the client. After ``heartbeat`` seconds without an event, a
    comment is sent, which also detects a client that has left; its stream then ends. The events are ``message``,
    ``reasoning`` and ``refusal`` with ``{"content": ...}``, ``tool_calls``, ``queued`` with the position in the queue
    of the Limiter, and always at last ``done`` (with usage and times), ``failed`` or ``interrupted`` (with ``code`` and
    ``message``, which hold nothing from upstream). With ``events="openai"``, they are the chunks of OpenAI's Chat
    Completions up to ``[DONE]``; ``usage`` adds the usage before that. ``retry`` is the reconnection time of an
    EventSource in milliseconds. With ``ids``, each event has an id, ``<id>:<n>``. OpenAI's SDK takes a ``retry``, or a
    comment after an id, for an event and fails: ``"openai"`` has neither.
    """
    if not isinstance(stream, Stream):
        raise TypeError(f"relay takes a Stream, as client.stream(...) gives, got {type(stream).__name__}")
    if events not in ("named", "openai"):
        raise ValueError(f"events is 'named' or 'openai', got {events!r}")
    if (retry is not None and events == "openai") or (usage and events == "named"):
        raise ValueError("retry is for events='named', whose end has the usage; usage is for events='openai'")
    speaker = _NamedEvents() if events == "named" else _CompletionEvents(usage)
    if retry is not None and not (isinstance(retry, int) and retry >= 0):
        raise ValueError(f"retry is a whole number of milliseconds, got {retry!r}")
    _checked_seconds("heartbeat", heartbeat)
    id = os.urandom(16).hex()
    pipe = _Pipe(2 * heartbeat)
    made = Relay(pipe, id, heartbeat, retry, _Production(id, pipe, speaker), stream)
    made._ids = id if ids and events == "named" else ""
    return made


def _checked_seconds(name: str, seconds: float, least: float = 0.001) -> float:
    if not least <= seconds <= threading.TIMEOUT_MAX:
        raise ValueError(f"{name} is a number of seconds, from {least:g} on, got {seconds!r}")
    return seconds


_relaying = _Relaying()
with contextlib.suppress(AttributeError):  # Windows does not fork
    os.register_at_fork(after_in_child=_relaying.forget)


# The routes


class _Traffic:
    """The statistics of the streams of one application in this process"""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since = time.monotonic()
        self._began: collections.deque[float] = collections.deque()
        self._active = self._bytes = 0
        self._ended = {"done": 0, "failed": 0, "aborted": 0}
        self._ttft = _Sample()

    def began(self) -> None:
        with self._lock:
            self._active += 1
            self._began.append(time.monotonic())
            self._forget()

    def _forget(self) -> None:
        while self._began and time.monotonic() - self._began[0] > 60:
            self._began.popleft()

    def sent(self, size: int) -> None:
        with self._lock:
            self._bytes += size

    def ended(self, how: str, ttft: float | None) -> None:
        with self._lock:
            self._active -= 1
            self._ended[how] += 1
            if ttft is not None:
                self._ttft.add(ttft)

    def uptime(self) -> float:
        return round(time.monotonic() - self._since, 3)

    def stats(self) -> dict[str, Any]:
        with self._lock:
            self._forget()
            ttft = self._ttft.percentiles()
            return {
                "active": self._active,
                "served": self._ended["done"],
                "failed": self._ended["failed"],
                "aborted": self._ended["aborted"],
                "bytes": self._bytes,
                "requests_this_minute": len(self._began),
                "ttft": None if ttft is None else dict(zip(("p50", "p90", "p99"), ttft)),
            }


#: takeovers in vain until a stream is given up: each may be billed
_MOST_TRIES = 3


#: seconds until an EventSource reconnects to a stream whose producer has gone
_LONG_WAIT = 15.0


class _Refused(Exception):
    """A request that gets an error in JSON"""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class _Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: Iterable[bytes]


def _json_reply(status: int, content: Any, headers: Mapping[str, str] | None = None) -> _Reply:
    body = json.dumps(content).encode("ascii") + b"\n"
    more = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Cache-Control": "no-store"}
    return _Reply(status, {**more, **(headers or {})}, [body])


#: bytes of a body that are read and dropped, so that a client that still sends reads the refusal
_MOST_DRAINED = 8 * 1024 * 1024


class _WebRequest:
    """A request, from its WSGI environ"""

    def __init__(self, environ: Mapping[str, Any], who: Callable[[], Any], framework: Any = None) -> None:
        self.environ = environ
        self.method: str = environ["REQUEST_METHOD"]
        self.who = who
        # the framework may have read the body already, and the socket would wait for more
        self._framework = framework
        self._unread = self._length() or 0
        self.request_id = self.header("X-Request-ID")
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", self.request_id):
            self.request_id = _new_request_id()

    def header(self, name: str) -> str:
        return str(self.environ.get("HTTP_" + name.upper().replace("-", "_"), ""))

    def _length(self) -> int | None:
        """The length of the body; None where only its end shows it"""
        length = self.environ.get("CONTENT_LENGTH") or ""
        if re.fullmatch("[0-9]{1,18}", length, re.ASCII):
            return int(length)
        return None if self.header("Transfer-Encoding") or self.environ.get("wsgi.input_terminated") else 0

    def body(self, most: int) -> bytes:
        length = self._length()
        if length is not None and length <= most and self._framework is not None:
            self._unread = 0
            data: bytes = _within_limit(self._framework.get_data)
            return data
        if length is None and not self.environ.get("wsgi.input_terminated"):
            raise _Refused(411, "LENGTH_REQUIRED", "a Content-Length is needed")
        body = b"" if length is not None and length > most else self._read(most + 1 if length is None else length)
        if len(body) > most or (length or 0) > most:
            raise _Refused(413, "TOO_LARGE", f"the body is larger than the {most} bytes that are allowed")
        return body

    def _read(self, count: int) -> bytes:
        blocks = []
        source = self.environ["wsgi.input"]
        if self._framework is not None:
            source = _within_limit(lambda: self._framework.stream)
        while count > 0:
            block = source.read(min(count, _BLOCK))
            if not block:
                break
            blocks.append(block)
            count -= len(block)
            self._unread -= len(block)
        return b"".join(blocks)

    def drain(self) -> None:
        """Reads the rest of the body, up to a limit"""
        left = _MOST_DRAINED
        with contextlib.suppress(_Refused):
            while min(left, self._unread) > 0:
                left -= len(self._read(min(self._unread, _BLOCK))) or left

    def query(self) -> dict[str, str]:
        from urllib.parse import parse_qsl

        text = self.environ.get("QUERY_STRING", "").encode("latin-1").decode("utf-8", "replace")
        return dict(parse_qsl(text, keep_blank_values=True, errors="strict"))

    def fields(self, most: int) -> dict[str, Any]:
        """The fields of the request, from its query or JSON"""
        if self.method == "GET":
            if len(self.environ.get("QUERY_STRING", "")) > most:
                raise _Refused(414, "TOO_LARGE", f"the query is longer than the {most} bytes that are allowed")
            try:
                return {name: _number_or_text(name, value) for name, value in self.query().items()}
            except ValueError as error:
                raise _Refused(400, "INVALID_REQUEST", "the query is no UTF-8, or has too many fields") from error
        fields = _json(self.body(most))
        if _media_type(self.environ.get("CONTENT_TYPE", "")) != "application/json":  # pages of any site may send others
            raise _Refused(415, "INVALID_REQUEST", "expected the Content-Type application/json")
        if not isinstance(fields, dict):
            raise _Refused(400, "INVALID_REQUEST", "expected a JSON object with messages, or a prompt")
        return fields

    def last_event(self) -> tuple[str, int] | None:
        """The stream id and the number in Last-Event-ID, or None"""
        text = self.header("Last-Event-ID")
        found = re.fullmatch(r"([0-9a-f]{32}):([0-9]{1,12})", text, re.ASCII)
        if text and not found:
            raise _Refused(400, "INVALID_REQUEST", "Last-Event-ID is none of the ids that were given")
        return (found.group(1), int(found.group(2))) if found else None


def _within_limit(read: Callable[[], Any]) -> Any:
    """The body from a framework, unless it is above the limit of the framework (MAX_CONTENT_LENGTH)"""
    try:
        return read()
    except Exception as error:
        if getattr(error, "code", None) != 413:
            raise
        raise _Refused(413, "TOO_LARGE", "the body is larger than this application allows") from error


def _number_or_text(name: str, value: str) -> Any:
    """A field of a query; two fields are numbers"""
    if name in ("temperature", "max_tokens"):
        number = _number(value)
        whole = number is not None and name == "max_tokens" and number.is_integer()
        return value if number is None else int(number) if whole else number
    return value


class _Question(NamedTuple):
    """A request of a browser to a model"""

    messages: Sequence[Mapping[str, str]]
    model: str
    params: Mapping[str, Any]

    @property
    def key(self) -> str:
        return _request_key([self.messages, self.model, self.params])


class _Routes:
    """The routes: who may request what, and where streams are kept"""

    def __init__(
        self,
        client: Client | Sequence[Client],
        *,
        authorize: Callable[[Any], Any],
        allowed_origins: Iterable[str] = (),
        limiter: Any = None,
        journal: str | os.PathLike[str] | None = None,
        redis: Any = None,
        heartbeat: float = 15,
        grace: float = 30,
        max_body: int = 256 * 1024,
        max_tokens: int | None = None,
        max_duration: float = 3600,
        max_age: float = 3600,
        models: Iterable[str] | None = None,
        system: str | None = None,
        allow_prefill: bool = False,
    ) -> None:
        if not callable(authorize):
            raise TypeError("authorize is a function that gives who is asking, or None for nobody")
        if isinstance(allowed_origins, str) or isinstance(models, str):
            raise TypeError("allowed_origins and models are lists of str")
        for name, limit in (("max_body", max_body), ("max_tokens", 1 if max_tokens is None else max_tokens)):
            if not (_is_integer(limit) and limit >= 1):
                raise ValueError(f"{name} is a whole number, from 1 on, got {limit!r}")
        if system is not None and not isinstance(system, str):
            raise TypeError(f"system is a str, got {type(system).__name__}")
        if journal is not None and redis is not None:
            raise ValueError("a stream is kept in one place: journal= or redis=, not both")
        self._client = client
        self.authorize = authorize
        self._origins = set(map(_checked_origin, allowed_origins))
        first = client if isinstance(client, Client) else list(client)[0]
        # each of several clients has its own model
        self._limiter = first._options.limiter if limiter is None and isinstance(client, Client) else limiter
        self._heartbeat = _checked_seconds("heartbeat", heartbeat)
        self._grace = _checked_seconds("grace", grace, 0)
        self._max_duration = _checked_seconds("max_duration", max_duration)
        self._max_body, self._max_tokens, self._may_prefill = max_body, max_tokens, allow_prefill
        self._models = [first.model] if models is None else list(models)
        self._model = first.model if first.model in self._models else next(iter(self._models), None)
        self._system = [] if system is None else [{"role": "system", "content": system}]
        max_age = _checked_seconds("max_age", max_age)
        self._store: _Folder | _Redis | None = None
        if journal is not None:
            self._store = _Folder(journal, max_age)
        elif redis is not None:
            self._store = _Redis(redis, max_age)
        self._traffic = _Traffic()
        self._has_warned = False

    def reply(self, asked: _WebRequest, route: str, id: str = "") -> _Reply:
        """The response to a request for one of the routes"""
        try:
            self._check_origin(asked, route)
            if asked.method == "OPTIONS":
                reply = _Reply(204, {"Access-Control-Max-Age": "600"}, [])
            else:
                reply = self._handler(asked, route)(asked, id)
        except _Refused as refusal:
            error = {"code": refusal.code, "message": refusal.message, "request_id": asked.request_id}
            reply = _json_reply(refusal.status, {"error": error}, refusal.headers)
        except SheepError as error:
            reply = self._failed(error, asked)
        if not isinstance(reply.body, Relay):
            asked.drain()
        return reply._replace(headers={**reply.headers, **self._common_headers(asked)})

    def _handler(self, asked: _WebRequest, route: str) -> Callable[[_WebRequest, str], _Reply]:
        routes = {
            "stream": {"POST": self._ask, "GET": self._ask_by_query},
            "follow": {"GET": self._follow},
            "stop": {"POST": self._stop},
            "health": {"GET": self._health, "HEAD": self._health},
            "stats": {"GET": self._stats},
        }
        methods = routes[route]
        if asked.method not in methods:
            allowed = ", ".join([*methods, "OPTIONS"])
            raise _Refused(405, "METHOD_NOT_ALLOWED", f"this takes {allowed}", Allow=allowed)
        return methods[asked.method]

    # Users and origins

    def _check_origin(self, asked: _WebRequest, route: str) -> None:
        """Refuses a page of another origin, before anything else: its browser sends cookies"""
        is_foreign = (
            not self._is_allowed(asked)
            if asked.header("Origin")
            else (asked.method == "POST" and asked.header("Sec-Fetch-Site") == "cross-site")
        )
        if is_foreign and route != "health":
            raise _Refused(403, "FORBIDDEN_ORIGIN", "pages of this origin may not ask here")

    def _is_allowed(self, asked: _WebRequest) -> bool:
        """Whether the page has an allowed origin, or that of this host"""
        # behind a proxy with https, the scheme here is http
        schemes = ("https",) if asked.environ.get("wsgi.url_scheme") == "https" else ("http", "https")
        own = {_without_usual_port(f"{scheme}://{asked.header('Host').lower()}") for scheme in schemes}
        return _without_usual_port(asked.header("Origin").lower()) in self._origins | own

    def _common_headers(self, asked: _WebRequest) -> dict[str, str]:
        headers = {"X-Request-ID": asked.request_id, "Vary": "Origin"}
        if asked.header("Origin") and self._is_allowed(asked):
            headers["Access-Control-Allow-Origin"] = asked.header("Origin")
            headers["Access-Control-Allow-Credentials"] = "true"
            headers["Access-Control-Allow-Methods"] = "GET, POST, OPTIONS"
            headers["Access-Control-Allow-Headers"] = "Content-Type, Authorization, X-Request-ID, Last-Event-ID"
            headers["Access-Control-Expose-Headers"] = "X-Request-ID, X-Stream-Id, Retry-After"
        return headers

    def _owner(self, asked: _WebRequest) -> str:
        """The user, as a hash: names need not be on the disk"""
        who = asked.who()
        if not who:
            raise _Refused(401, "UNAUTHORIZED", "it is not known who is asking")
        if not isinstance(who, (str, int, bytes)) or isinstance(who, bool):  # else all users would be one
            raise TypeError(f"authorize gives who is asking, a name or number as str, int or bytes, got {type(who)!r}")
        return _request_key(repr(who))

    # The fields of a request

    def _question(self, asked: _WebRequest) -> _Question:
        fields = asked.fields(self._max_body)
        unknown = sorted(set(fields) - {"messages", "prompt", "model", "temperature", "max_tokens", "stream"})
        if unknown:
            raise _invalid(f"unknown fields: {_excerpt(', '.join(unknown))}")
        if fields.get("stream", True) is not True:
            raise _invalid("stream is true: there is no other answer here")
        if ("messages" in fields) == ("prompt" in fields):
            raise _invalid("expected messages or a prompt, one of them")
        messages = fields.get("messages", [{"role": "user", "content": fields.get("prompt")}])
        if not isinstance(messages, list) or not messages:
            raise _invalid("messages is a list of {role, content}")
        messages = list(map(_said_message, messages))
        if messages[-1]["role"] != "user" and not self._may_prefill:
            raise _invalid("the last message is the user's")
        params = {"temperature": self._temperature(fields), "max_tokens": self._most_tokens(fields)}
        return _Question(
            messages,
            self._model_of(fields),
            {name: value for name, value in params.items() if value is not None},
        )

    def _model_of(self, fields: Mapping[str, Any]) -> str:
        model = fields.get("model", self._model)
        if model is None and "model" not in fields:
            raise _Refused(502, "MODEL_NOT_FOUND", _PUBLIC["MODEL_NOT_FOUND"][1])
        if not isinstance(model, str) or model not in self._models:
            raise _invalid("this model is not one of those that may be asked")
        return model

    @staticmethod
    def _temperature(fields: Mapping[str, Any]) -> float | None:
        value = fields.get("temperature")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 <= value <= 2):
            raise _invalid("temperature is a number from 0 to 2")
        return value

    def _most_tokens(self, fields: Mapping[str, Any]) -> int | None:
        value: int | None = fields.get("max_tokens")
        if value is None:
            return self._max_tokens
        if not _is_integer(value) or value < 1:
            raise _invalid("max_tokens is a whole number, from 1 on")
        if self._max_tokens is not None and value > self._max_tokens:
            raise _invalid(f"max_tokens is at most {self._max_tokens}")
        return value

    # The routes

    def _ask_by_query(self, asked: _WebRequest, id: str) -> _Reply:
        """A GET that starts a stream, which costs: only from our pages, for any page can send a GET"""
        if asked.header("Sec-Fetch-Site") not in ("same-origin", "none") and not asked.header("Origin"):
            raise _Refused(403, "FORBIDDEN_ORIGIN", "a GET is taken from pages of this host, and of allowed origins")
        return self._ask(asked, id)

    def _ask(self, asked: _WebRequest, id: str) -> _Reply:
        owner = self._owner(asked)
        question = self._question(asked)
        after = asked.last_event()
        if after is not None:
            return self._go_on(asked, owner, question, *after)
        if _relaying.draining:
            raise _Refused(503, "SHUTTING_DOWN", _PUBLIC["SHUTTING_DOWN"][1], Retry_After="1")
        self._warn(asked)
        id = os.urandom(16).hex()
        stream = self._stream(asked, owner, question)
        if self._store is None:
            pipe = _Pipe(2 * self._heartbeat)
            made = Relay(pipe, id, self._heartbeat, _wait_of_page(), self._production(asked, owner, id, pipe), stream)
            return self._relayed(made, asked, 0)
        header = {"relay": id, "owner": owner, "body": question.key}
        production = self._production(asked, owner, id, self._store.begin(id, header))
        production.attended(self._heartbeat + self._grace)
        production.start(stream)
        production.await_first(self._heartbeat)
        return self._followed(asked, self._tail(id, owner), id)

    def _stream(
        self, asked: _WebRequest, owner: str, question: _Question, resume_from: ResumePoint | None = None
    ) -> Stream:
        limiter = self._limiter.bind(user=owner) if isinstance(self._limiter, Limiter) else self._limiter
        return stream(
            [*self._system, *question.messages],
            model=question.model,
            client=self._client,
            headers={"X-Request-ID": asked.request_id},
            deadline=self._max_duration,
            resume_from=resume_from,
            limiter=limiter,
            **question.params,
        )

    def _production(self, asked: _WebRequest, owner: str, id: str, sink: Any) -> _Production:
        made = _Production(id, sink, _NamedEvents())
        made.request_id, made.owner, made.traffic = asked.request_id, owner, self._traffic
        return made

    def _relayed(self, made: Relay, asked: _WebRequest, after: int) -> _Reply:
        made._traffic = self._traffic
        if not after:  # an EventSource that is cut off before the first event sends this id, instead of a new request
            made.first += b"id: %s:0\n\n" % made.id.encode("ascii")
        return _Reply(200, {**SSE_HEADERS, "X-Stream-Id": made.id}, made.start(asked.environ))

    def _tail(self, id: str, owner: str, after: int = 0) -> _FileTail | _RedisTail:
        """The events of a stream after a number; for other users than the owner there is none"""
        tail = self._store.open(id) if self._store is not None and re.fullmatch("[0-9a-f]{32}", id) else None
        if tail is None:
            raise _Refused(404, "NOT_FOUND", "there is no such answer, or not any more")
        try:
            if tail.header.get("owner") != owner:
                raise _Refused(404, "NOT_FOUND", "there is no such answer, or not any more")
            if not tail.skip(after):
                raise _Refused(409, "CONFLICT", "Last-Event-ID is of an event that the answer does not have")
        except BaseException:
            tail.close()
            raise
        return tail

    def _followed(self, asked: _WebRequest, tail: _FileTail | _RedisTail, id: str, after: int = 0) -> _Reply:
        if tail.is_over:  # 204 tells an EventSource not to reconnect
            tail.close()
            return _Reply(204, {"X-Stream-Id": id}, [])
        # an EventSource reconnects after "interrupted": not at once, and its GET takes nothing over
        wait = _wait_of_page(_LONG_WAIT if _has_ended(tail) else 1)
        production = _relaying.productions.get(id)
        if production is not None:
            production.attended(self._grace)
        return self._relayed(Relay(tail, id, self._heartbeat, wait), asked, after)

    def _follow(self, asked: _WebRequest, id: str) -> _Reply:
        owner = self._owner(asked)
        stream_id, number = asked.last_event() or (id, 0)
        after = number if stream_id == id else 0
        return self._followed(asked, self._tail(id, owner, after), id, after)

    def _go_on(self, asked: _WebRequest, owner: str, question: _Question, id: str, after: int) -> _Reply:
        """A client that reconnects follows the producer; with a POST, this process may become the producer"""
        tail = self._tail(id, owner, after)
        try:
            if tail.header.get("body") != question.key:
                raise _Refused(409, "CONFLICT", "the answer is one to another question")
            if asked.method == "POST" and not _relaying.draining:
                self._take_over(asked, owner, question, id)
        except BaseException:
            tail.close()
            raise
        return self._followed(asked, tail, id, after)

    def _take_over(self, asked: _WebRequest, owner: str, question: _Question, id: str) -> None:
        """Takes over a stream whose producer has gone"""
        log = None if self._store is None else self._store.take_over(id)
        if log is None or log.resumed is None:
            return
        try:
            production = self._production(asked, owner, id, log)
            production.may_refuse = False
            is_stopped, _ = log.look()  # perhaps requested before the producer died
            if is_stopped or log.resumed.tries >= _MOST_TRIES:
                production.give_up(*(("interrupted", "CANCELLED") if is_stopped else ("failed", "CONNECTION_LOST")))
                return
            stream = self._stream(asked, owner, question, log.resumed.point)
        except BaseException:
            log.end()
            raise
        production.attended(self._heartbeat + self._grace)
        production.start(stream)

    def _stop(self, asked: _WebRequest, id: str) -> _Reply:
        owner = self._owner(asked)
        production = _relaying.productions.get(id)
        if self._store is not None:
            self._tail(id, owner).close()
            self._store.stop(id)
            log = self._store.take_over(id)
            if log is not None:  # the producer has gone: no takeover
                self._production(asked, owner, id, log).give_up("interrupted", "CANCELLED")
        elif production is None or production.owner != owner:
            raise _Refused(404, "NOT_FOUND", "there is no such answer in this process")
        if production is not None:
            production.stop("CANCELLED")
        return _json_reply(200, {"stopped": True})

    def _health(self, asked: _WebRequest, id: str) -> _Reply:
        """Whether this process takes requests; nothing is sent upstream"""
        status = "draining" if _relaying.draining else "ok"
        content = {"status": status, "timestamp": round(time.time(), 3), "uptime": self._traffic.uptime()}
        return _json_reply(503 if _relaying.draining else 200, content)

    def _stats(self, asked: _WebRequest, id: str) -> _Reply:
        self._owner(asked)
        limits, queued = None, 0
        limiter = _unbound(self._limiter)
        if isinstance(limiter, Limiter):
            names = ("max_concurrent", "max_queue", "max_per_user", "rate", "period", "queue_timeout")
            limits, queued = {name: getattr(limiter, name) for name in names}, limiter.stats().queued
        content = {"process": os.getpid(), "uptime": self._traffic.uptime(), "queued": queued, "limits": limits}
        return _json_reply(200, {**content, **self._traffic.stats()})

    # Errors

    def _failed(self, error: SheepError, asked: _WebRequest) -> _Reply:
        """The response for an error before the stream, which holds nothing from upstream"""
        _log.warning("request %s: %s: %s", asked.request_id, error.code, error)
        told = _public(_public_code(error), error.retry_after)
        seconds = math.ceil(min(max(error.retry_after or 0, 1), 86400))
        is_full = isinstance(error, (QueueFullError, QueueTimeoutError))
        if is_full and asked.method == "GET":  # an EventSource gives up after any other status than 200
            retry = b"retry: %d\n\n" % _wait_of_page(seconds)
            queued = _data({"position": None, "retry_after": seconds})
            return _Reply(200, dict(SSE_HEADERS), [retry + _Event("queued", queued).encoded("")])
        headers = {"Retry-After": str(seconds)} if error.retry_after is not None or is_full else {}
        status, _ = _PUBLIC[told["code"]]
        return _json_reply(status, {"error": {**told, "request_id": asked.request_id}}, headers)

    def _warn(self, asked: _WebRequest) -> None:
        if not asked.environ.get("wsgi.multithread") and not self._has_warned:
            self._has_warned = True
            _log.warning(
                "this server answers one request at a time in a process (wsgi.multithread is false): a stream holds up "
                "all others, and gunicorn's sync worker is killed amid it; use threads, as gunicorn -k gthread does"
            )


def _has_ended(tail: _FileTail | _RedisTail) -> bool:
    try:
        return tail.has_ended()
    except CheckpointError:  # its reading raises this again, after the events before
        return True


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _invalid(message: str) -> _Refused:
    return _Refused(400, "INVALID_REQUEST", message)


def _said_message(message: Any) -> dict[str, str]:
    """A message from a browser: text of the user or the assistant, never a system message"""
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        raise _invalid("a message is {role, content}")
    role, content = message["role"], message["content"]
    if role not in ("user", "assistant"):
        raise _invalid("the role of a message is user or assistant")
    if not isinstance(content, str) or not content.strip():
        raise _invalid("the content of a message, or a prompt, is text that is not empty")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _invalid("a text holds half of a surrogate pair") from error
    return {"role": role, "content": content}


def _checked_origin(origin: str) -> str:
    """An origin in the form of browsers, for comparison"""
    found = re.fullmatch(r"([a-z][a-z0-9+.-]*://[^/*\s]+)/?", origin.lower())
    if not found:
        raise ValueError(f"an allowed origin is a scheme and a host, as https://app.example, got {origin!r}")
    return _without_usual_port(found.group(1))


def _without_usual_port(origin: str) -> str:
    """An origin without the port that its scheme has anyway"""
    return re.sub("(?<=^http):(.*):80$|(?<=^https):(.*):443$", r":\1\2", origin)


def _wait_of_page(seconds: float = 1) -> int:
    """Milliseconds until a page reconnects: after a restart of the server, not all pages at once"""
    return round(1000 * seconds * random.uniform(1, 2))


#: the routes, for a framework and for a bare WSGI server; any id matches, so that the 404 is ours
_ROUTES = {
    "/chat/stream": "stream",
    "/chat/stream/<path:id>": "follow",
    "/chat/stop/<path:id>": "stop",
    "/health": "health",
    "/stats": "stats",
}


def flask_blueprint(
    client: Client | Sequence[Client],
    *,
    authorize: Callable[[Any], Any],
    allowed_origins: Iterable[str] = (),
    limiter: Limiter | _BoundLimiter | Any = None,
    journal: str | os.PathLike[str] | None = None,
    redis: Any = None,
    heartbeat: float = 15,
    grace: float = 30,
    max_body: int = 256 * 1024,
    max_tokens: int | None = None,
    max_duration: float = 3600,
    max_age: float = 3600,
    models: Iterable[str] | None = None,
    system: str | None = None,
    allow_prefill: bool = False,
) -> Any:
    """A Flask blueprint that streams the answers of ``client`` to browsers, and loses nothing

        def user(request):                  # whoever may spend your money, or None
            return session.get("user")

        app.register_blueprint(sheepsse.flask_blueprint(client, authorize=user, journal="streams"))

    ``POST /chat/stream`` with ``{"messages": [...]}`` or ``{"prompt": ...}`` in JSON, and ``GET /chat/stream?prompt=``
    for an EventSource, return the events of ``relay()``. Their ids are ``<stream id>:<n>``; the stream id is also in
    ``X-Stream-Id``. ``POST /chat/stop/<id>`` stops a stream. ``GET /health`` is open to all, ``GET /stats`` to users
    whom ``authorize`` accepts; both are about one process.

    ``journal`` is a folder that all worker processes share, ``redis`` a Redis client or URL that all machines share.
    With one of them, a stream outlives its connection: ``GET /chat/stream/<id>``, or the same request again, with
    ``Last-Event-ID``, returns the events after that one, from any process, each event once. Where the producing
    process has died, the page gets ``interrupted``; the same request again then resumes the stream by the strategies
    of ``stream(resume="auto")``. A client that left has ``grace`` seconds to reconnect before the model is stopped;
    without a journal, the model is stopped at once.

    ``authorize(request)`` returns the user as a str or int, and None for nobody; only its owner can follow a stream.
    Pages of other origins are refused, except those in ``allowed_origins``. ``max_body`` is in bytes, ``max_tokens`` is
    the upper limit of that option, ``max_duration`` the seconds of a stream at most, ``max_age`` the seconds that a
    finished stream is kept. ``models`` are the models that may be requested, by default that of the client; ``system``
    is a system message, which no browser can set. The last message must be the user's, unless ``allow_prefill``: the
    model continues a last message of its own. ``limiter`` is a Limiter, which counts by owner, in this process.
    MissingExtraError without Flask.
    """
    asking = _Routes(
        client,
        authorize=authorize,
        allowed_origins=allowed_origins,
        limiter=limiter,
        journal=journal,
        redis=redis,
        heartbeat=heartbeat,
        grace=grace,
        max_body=max_body,
        max_tokens=max_tokens,
        max_duration=max_duration,
        max_age=max_age,
        models=models,
        system=system,
        allow_prefill=allow_prefill,
    )
    return _blueprint(asking)


def _blueprint(asking: _Routes) -> Any:
    try:
        import flask  # type: ignore[import-not-found,unused-ignore]  # an extra
    except ImportError as error:
        raise MissingExtraError("flask_blueprint needs Flask: pip install 'sheepsse[flask]'") from error
    blueprint = flask.Blueprint("sheepsse", __name__)

    def view(route: str, id: str = "") -> Any:
        request = flask.request
        asked = _WebRequest(request.environ, lambda: asking.authorize(request), request)
        reply = asking.reply(asked, route, id)
        response = flask.current_app.response_class(reply.body, status=reply.status, headers=reply.headers)
        if reply.status == 204:  # WSGI forbids a type without a body
            del response.headers["Content-Type"]
        return response

    methods = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
    for rule, route in _ROUTES.items():
        defaults = {"route": route}
        blueprint.add_url_rule(rule, route, view, provide_automatic_options=False, methods=methods, defaults=defaults)
    return blueprint


def wsgi_app(client: Client | Sequence[Client], *, authorize: Callable[[Any], Any], **options: Any) -> Any:
    """The routes of ``flask_blueprint`` as a WSGI application; ``authorize`` gets the environ

    Any other path is a 404, so that the application can be mounted, or tried first.
    """
    asking = _Routes(client, authorize=authorize, **options)

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        route, id = _routed(environ.get("PATH_INFO", ""))
        if not route:  # perhaps a path of another application: the body is left unread
            reply = _json_reply(404, {"error": {"code": "NOT_FOUND", "message": "there is nothing here"}})
            start_response("404 Not Found", list(reply.headers.items()))
            return reply.body
        reply = asking.reply(_WebRequest(environ, lambda: authorize(environ)), route, id)
        start_response(f"{reply.status} {_phrase(reply.status)}", list(reply.headers.items()))
        return [] if environ["REQUEST_METHOD"] == "HEAD" else reply.body

    return application


def _routed(path: str) -> tuple[str, str]:
    for rule, route in _ROUTES.items():
        found = re.fullmatch(rule.replace("<path:id>", "(.+)"), path, re.DOTALL)
        if found:
            return route, "".join(found.groups())
    return "", ""


def _phrase(status: int) -> str:
    from http import HTTPStatus

    return HTTPStatus(status).phrase


#: a chat page for the routes, in plain HTML that loads nothing else; a start for a page of your own
CHAT_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>sheepsse chat</title>
<link rel="icon" href="data:,">
<style>
:root { --paper: #fbfaf8; --ink: #211f1c; --soft: #625d55; --tint: #f0ede7; --line: #8a8378; --hair: #e0dbd2;
  --accent: #2a5a86; --on-accent: #fff; --alarm: #9a2a1f; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #181715; --ink: #e9e5de; --soft: #aaa398; --tint: #24221f; --line: #7d776c; --hair: #35322d;
    --accent: #8fbce3; --on-accent: #10202e; --alarm: #f09a8c; } }
* { box-sizing: border-box; } [hidden] { display: none !important; }
html { scroll-padding-bottom: 11rem; } /* the form stays at the bottom, and is not to cover what has the focus */
body { margin: 0; min-height: 100vh; min-height: 100dvh; display: flex; flex-direction: column; color: var(--ink);
  background: var(--paper); font: 1.0625rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
header, main, form { width: 100%; max-width: 46rem; margin: 0 auto; padding: 1.25rem; }
header { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; justify-content: space-between; }
h1 { margin: 0; font-size: 1.125rem; font-weight: 600; }
main { flex: 1; padding-top: 0; padding-bottom: 2rem; }
#log:empty::before { content: "Ask something to begin."; color: var(--soft); }
.question { margin: 2.5rem 0 1.25rem; padding: .75rem 1rem; border-radius: .75rem; background: var(--tint); }
.answer { margin: 1.25rem 0 2.5rem; } #log > :first-child { margin-top: 0; }
.question, .text, .reasoning div, .tools pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.question, .block { display: block; unicode-bidi: plaintext; } /* each line finds its own direction */
.label, .reasoning, .tools, .facts, #status { color: var(--soft); font-size: .9375rem; line-height: 1.5; }
.label { margin: 0 0 .5rem; }
.reasoning { margin: 0 0 1rem; } .reasoning summary { width: fit-content; cursor: pointer; }
.reasoning div { margin-top: .5rem; padding-left: 1rem; border-left: 2px solid var(--hair); }
.tools { margin: 1rem 0; padding: 0; list-style: none; }
.tools li { margin: .5rem 0; padding: .5rem .75rem; border: 1px solid var(--hair); border-radius: .5rem; }
.tools b, .tools pre { margin: 0; font: .875rem/1.5 ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace; }
.tools b { color: var(--ink); font-weight: 600; }
.facts { display: flex; flex-wrap: wrap; gap: .125rem 1rem; margin: 1rem 0 0; padding: .625rem 0 0; list-style: none;
  border-top: 1px solid var(--hair); font-size: .875rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.note { margin: .75rem 0 0; color: var(--soft); overflow-wrap: anywhere; } .note.bad { color: var(--alarm); }
.actions { margin-top: .75rem; }
.answer[aria-busy] .text:empty::after, .answer[aria-busy] .text .block:last-child::after { content: "";
  display: inline-block; width: .5rem; height: 1rem; margin-left: .125rem; border-radius: .125rem;
  background: var(--line); vertical-align: -.125rem; animation: breathe 1.4s ease-in-out infinite; }
@media (prefers-reduced-motion: no-preference) { @keyframes breathe { 50% { opacity: .2; } } }
form { position: sticky; bottom: 0; padding-top: .75rem; background: var(--paper); }
label { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
textarea { display: block; width: 100%; max-height: 12rem; padding: .75rem 1rem; resize: none; border-radius: .75rem;
  border: 1px solid var(--line); background: transparent; color: inherit; font: inherit; }
textarea::placeholder { color: var(--soft); opacity: 1; }
.row { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; margin-top: .75rem; }
#status { flex: 1 1 8rem; margin: 0; min-height: 1.5em; }
button { min-height: 2.5rem; padding: .375rem 1rem; border: 1px solid var(--line); border-radius: .625rem;
  background: transparent; color: inherit; font: inherit; font-size: .9375rem; cursor: pointer; }
button:hover:enabled { border-color: currentColor; }
button:disabled { color: var(--soft); border-color: var(--hair); cursor: default; }
#send:enabled { background: var(--accent); border-color: var(--accent); color: var(--on-accent); }
#clear { min-height: 2.25rem; padding: .25rem .75rem; font-size: .875rem; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
textarea:focus-visible { outline-offset: -1px; }
@media (max-width: 30rem) { header, main, form { padding-left: 1rem; padding-right: 1rem; } }
/* On a flat screen (a phone on its side, 400 % zoom) a form that stays would leave no room to read. */
@media (max-height: 26rem) { form { position: static; } html { scroll-padding-bottom: 0; } }
</style>
</head>
<body>
<header><h1>sheepsse chat</h1><button id="clear" type="button">New conversation</button></header>
<main><div id="log" role="log" aria-live="polite" aria-label="Conversation"></div>
<noscript>This page needs JavaScript.</noscript></main>
<form>
<label for="prompt">Your message</label>
<textarea id="prompt" rows="2" placeholder="Your message" aria-describedby="status" autofocus></textarea>
<div class="row"><p id="status" role="status"></p>
<button id="stop" type="button" hidden>Stop</button><button id="send" type="submit">Send</button></div>
</form>
<script>
(() => {
'use strict';
const byId = id => document.getElementById(id);
const input = byId('prompt'), send = byId('send'), stop = byId('stop'), log = byId('log'), status = byId('status');
// By number, as this page is kept in a Python string, where an escape would mean something else.
const LF = String.fromCharCode(10), CR = String.fromCharCode(13);
const STORE = 'sheepsse.chat:' + location.pathname;
const ATTEMPTS = 8, LONGEST_PAUSE = 15000, STOP_PATIENCE = 1000, BLOCK = 4000;
// A network that was changed, or slept, ends no connection: but the server says something every 15 seconds.
const SILENCE = 60000;
const blank = () => ({ role: 'assistant', text: '', reasoning: '', tools: [], id: null, n: 0, first: null,
  reconnects: 0, carried: -1, facts: null, running: true });

let items = [];       // the conversation, as it is stored: {role: 'user', text} and what blank() makes
let current = null;   // the run of the answer that is running
let wanted = null;    // id of a stream to follow when nothing else runs

// ---- What outlives a reload. The storage may be full or denied: then the page works all the same. ----

function load() {
  try { return JSON.parse(sessionStorage.getItem(STORE)) ?? []; } catch { return []; }
}

function save() {
  // When all does not fit, the last question and its answer; when they don't either, rather nothing than old things.
  for (const part of [items, items.slice(-2)]) {
    try { return sessionStorage.setItem(STORE, JSON.stringify(part)); } catch { /* the next, smaller part */ }
  }
  try { sessionStorage.removeItem(STORE); } catch { /* denied */ }
}

function setHash(id) {
  const hash = id ? '#' + id : '';
  if (location.hash !== hash) history.replaceState(history.state, '', location.pathname + location.search + hash);
}

// Roles take turns (some models insist): a question that got no answer is sent along with the next.
function messages() {
  const list = [];
  for (const { role, text, followed } of items) {
    const last = list[list.length - 1];
    if (!text || followed) continue;
    if (last && last.role === role) last.content += LF + LF + text;
    else list.push({ role, content: text });
  }
  return list;
}

// ---- Showing ----

function make(tag, name, parent, text = '') {
  const element = Object.assign(document.createElement(tag), { className: name, textContent: text });
  parent.append(element);
  return element;
}

function say(text) { if (status.textContent !== text) status.textContent = text; }
function showQuestion(item) { make('article', 'question', log, item.text).setAttribute('aria-label', 'You'); }
function showRunning(running) { stop.hidden = !(send.disabled = running); }
function focusPrompt() { input.focus({ preventScroll: true }); }

let stuck = true, lastTop = 0;   // stuck to the end, until the reader scrolls up
addEventListener('scroll', () => {
  const page = document.scrollingElement, room = page.scrollHeight - innerHeight - page.scrollTop;
  // A growing text moves nothing, so a move up is the reader's doing, however small it is.
  if (page.scrollTop < lastTop) stuck = room < 2;
  else if (room < 40) stuck = true;
  lastTop = page.scrollTop;
}, { passive: true });
function keepDown() { if (stuck) scrollTo(0, document.scrollingElement.scrollHeight); }

// Text that grows. It is cut into blocks at line ends, so that the browser lays out the last block only, and the
// time for a long answer stays linear. Only text nodes: what a model says is never read as HTML.
class Growing {
  constructor(element) { this.element = element; this.node = null; this.waiting = ''; }
  add(text) { this.waiting += text; }
  flush() {
    let text = this.waiting;
    this.waiting = '';
    while (text) {
      this.node ??= make('span', 'block', this.element).appendChild(new Text());
      const end = text.indexOf(LF, Math.max(0, BLOCK - this.node.length)) + 1;
      this.node.appendData(text.slice(0, end || text.length));
      if (end) this.node = null;
      text = end ? text.slice(end) : '';
    }
  }
}

class View {
  constructor(item) {
    this.item = item;
    this.root = make('article', 'answer', log);
    this.root.setAttribute('aria-label', 'Answer');
    this.build();
  }
  build() {
    const { item, root } = this;
    root.replaceChildren();
    if (item.followed) make('p', 'label', root, 'An answer you follow');
    this.text = new Growing(make('div', 'text', root));
    this.reasoning = this.tools = null;
    this.calls = new Map();
    this.text.add(item.text);
    if (item.reasoning) this.reason(item.reasoning);
    for (const call of item.tools) this.call(call, call.arguments);
    this.flush();
    if (!item.running) this.ending();
  }
  reason(text) {
    if (!this.reasoning) {
      const details = make('details', 'reasoning', this.root);
      this.text.element.before(details);
      make('summary', '', details, 'Reasoning');
      this.reasoning = new Growing(make('div', '', details));
    }
    this.reasoning.add(text);
  }
  call(call, more) {
    this.tools ??= make('ul', 'tools', this.root);
    if (!this.calls.has(call.index)) {
      const row = make('li', '', this.tools);
      this.calls.set(call.index, { name: make('b', '', row), rest: new Growing(make('pre', '', row)) });
    }
    const { name, rest } = this.calls.get(call.index);
    name.textContent = call.name || 'tool';
    rest.add(more);
  }
  flush() {
    this.text.flush();
    this.reasoning?.flush();
    for (const { rest } of this.calls.values()) rest.flush();
  }
  ending() {
    const { item, root } = this, list = facts(item);
    if (item.note) make('p', item.bad ? 'note bad' : 'note', root, item.note);
    if (item.button) this.button();
    const place = list.length && make('ul', 'facts', root);
    for (const fact of list) make('li', '', place, fact);
  }
  button() {
    const { item } = this, place = make('div', 'actions', this.root);
    place.setAttribute('aria-live', 'off');   // a count-down is not to be read out every second
    const button = make('button', '', place);
    button.addEventListener('click', () => {
      if (current) return;
      if (item.fresh) Object.assign(item, blank());
      focusPrompt();   // this button goes now
      run(item, this);
    });
    const tick = () => {
      const seconds = Math.ceil(((item.notBefore ?? 0) - Date.now()) / 1000);
      button.disabled = seconds > 0;
      button.textContent = seconds > 0 ? item.button + ' in ' + seconds + ' s' : item.button;
      if (seconds > 0 && this.root.isConnected) setTimeout(tick, 250);
    };
    tick();
  }
}

function facts(item) {
  const told = item.facts ?? {}, usage = told.usage ?? {}, list = [];
  const number = value => value.toLocaleString('en', { maximumFractionDigits: 1 });
  const add = (value, text) => { if (value != null) list.push(text(value)); };
  add(usage.input_tokens, v => number(v) + ' tokens in');
  add(usage.output_tokens, v => number(v) + ' tokens out');
  // As seen from here; the server's own time stands in where an answer was begun by a page before this one.
  add(item.first ?? told.ttft, v => 'first word after ' + v.toFixed(2) + ' s');
  add(told.tokens_per_second, v => number(v) + ' tokens/s');
  add(told.cost ?? usage.cost, v => '$' + v);
  add(told.model, v => v);
  add(item.reconnects || null, v => 'reconnected ' + v + (v > 1 ? ' times' : ' time'));
  return list;
}

let frame = 0;   // words are shown once for each picture the screen draws, however many come
function paint() {
  frame ||= requestAnimationFrame(() => { frame = 0; current?.view.flush(); keepDown(); });
}

// ---- Reading ----

// Lines end in LF, CR or CRLF, and anything may be split over reads. An event has an id only where one was sent.
class Parser {
  rest = ''; afterCR = false; data = []; name = ''; id = null; retry = null;
  feed(chunk) {
    if (!chunk) return [];
    if (this.afterCR && chunk[0] === LF) chunk = chunk.slice(1);
    this.afterCR = chunk.endsWith(CR);
    const lines = (this.rest + chunk).replaceAll(CR + LF, LF).replaceAll(CR, LF).split(LF);
    this.rest = lines.pop();
    return lines.map(line => this.line(line)).filter(Boolean);
  }
  line(line) {
    if (!line) {
      const event = this.data.length && { name: this.name || 'message', data: this.data.join(LF), id: this.id };
      Object.assign(this, { data: [], name: '', id: null });
      return event;
    }
    const colon = line.indexOf(':'), field = colon < 0 ? line : line.slice(0, colon);
    let value = colon < 0 ? '' : line.slice(colon + 1);
    if (value[0] === ' ') value = value.slice(1);
    if (field === 'data') this.data.push(value);
    else if (field === 'event') this.name = value;
    else if (field === 'id') this.id = value;
    else if (field === 'retry' && /^[0-9]+$/.test(value)) this.retry = Number(value);
  }
}

// Takes one event; gives back how the run ended, if it did.
function take(me, { name, data, id }) {
  const { item, view } = me, body = JSON.parse(data), text = body.content ?? '';
  if (id) {
    const n = Number(id.slice(id.lastIndexOf(':') + 1));
    if (!(n > item.n)) return;   // seen before a reconnect
    if (!item.n && (item.text || item.reasoning || item.tools.length)) {
      // All comes anew after a reload: what the page had kept, in case the server had not, gives way to it.
      Object.assign(item, { text: '', reasoning: '', tools: [] });
      view.build();
    }
    item.id ??= id.slice(0, id.lastIndexOf(':'));
    item.n = n;
    me.attempts = 0;
  }
  switch (name) {
    case 'message': case 'refusal':
      if (!text) break;
      if (me.began) item.first ??= (performance.now() - me.began) / 1000;
      item.text += text;
      view.text.add(text);
      me.tell('Answering');
      break;
    case 'reasoning':
      item.reasoning += text;
      view.reason(text);
      if (!item.text) me.tell('Reasoning');
      break;
    case 'tool_calls':
      for (const { index = 0, name: tool, arguments: more } of body.tool_calls) {
        let call = item.tools.find(one => one.index === index);
        if (!call) item.tools.push(call = { index, name: '', arguments: '' });
        call.name ||= tool ?? '';
        call.arguments += more ?? '';
        view.call(call, more ?? '');
      }
      break;
    case 'queued':
      me.tell('You are number ' + body.position + ' in the queue');
      break;
    case 'done':
      item.facts = body;
      return { final: true, state: 'Done', note: { length: 'Cut off at the greatest length allowed',
        content_filter: 'Ended by the content filter' }[body.finish_reason] };
    case 'failed':
      return { final: true, state: 'Failed', bad: true, note: body.message || body.code || 'The answer failed',
        button: item.followed ? null : 'Try again', fresh: true };
    case 'interrupted': {
      if (body.code === 'CANCELLED') item.facts = body;
      if (body.code === 'CANCELLED' || me.stopping) return { final: true, state: 'Stopped', note: 'Stopped' };
      // Carried on by itself once, and again only if that brought something.
      const before = item.carried;
      item.carried = item.text.length + item.reasoning.length;
      return item.carried > before ? { lost: true }
        : { state: 'Interrupted', bad: true, note: 'The answer was interrupted', button: 'Carry on' };
    }
  }
}

// ---- Asking, and asking again ----

// One connection, from the request to its end. Gives back how it ended: {lost} when there may be more.
async function connect(me) {
  const { item, view } = me, first = !item.id;
  const headers = { Accept: 'text/event-stream' };
  if (item.id && (item.n || !item.followed)) headers['Last-Event-ID'] = item.id + ':' + item.n;
  if (!item.followed) headers['Content-Type'] = 'application/json';
  me.controller = new AbortController();
  // A request that was never answered is not repeated without being told to: it may have been billed.
  const failure = note => first && !item.id
    ? { state: 'Not answered', bad: true, note, button: 'Try again', fresh: true } : { lost: true };
  let response;
  try {
    response = await fetch(item.followed ? 'chat/stream/' + item.id : 'chat/stream', { headers,
      method: item.followed ? 'GET' : 'POST', body: item.followed ? undefined : item.body,
      credentials: 'same-origin', cache: 'no-store', signal: me.controller.signal });
  } catch { return failure('The server could not be reached'); }
  if (me.dropped) return {};
  if (response.status === 204) return { final: true, state: 'Done' };
  const type = response.headers.get('Content-Type') ?? '';
  if (!response.ok || !type.startsWith('text/event-stream')) return refused(me, response);
  item.id ??= response.headers.get('X-Stream-Id');
  if (first && me.stopping) tellStop(item.id);   // not known when Stop was pressed
  if (me.attempts) item.reconnects += 1;
  setHash(item.id);
  save();
  me.tell(item.text ? 'Answering' : 'Waiting for the first word');
  const parser = new Parser(), decoder = new TextDecoder(), reader = response.body.getReader();
  let watchdog;
  try {
    for (;;) {
      clearTimeout(watchdog);
      watchdog = setTimeout(() => me.controller.abort(), SILENCE);
      const { done, value } = await reader.read();
      if (done) break;
      for (const event of parser.feed(decoder.decode(value, { stream: true }))) {
        const end = take(me, event);
        if (!end) continue;
        reader.cancel().catch(() => {});
        return end;
      }
      me.retry = Math.max(100, parser.retry ?? me.retry);
      paint();
    }
  } catch { /* cut off: the same as an end without a last event */ } finally { clearTimeout(watchdog); }
  return failure('The connection was lost');
}

// An answer with another status, or one that is no stream (a login page, say).
async function refused({ item }, response) {
  let message = null, wait = 0;
  try { message = (await response.json()).error.message; } catch { /* not ours */ }
  const { status: code } = response, after = response.headers.get('Retry-After');
  if (after) wait = (Number(after) * 1000 || Date.parse(after) - Date.now()) || 0;
  if (item.id && (code === 404 || code === 409)) {
    return { state: 'Incomplete', bad: true, note: 'The rest of this answer is gone' };
  }
  if (item.id && wait <= 60000 && (code >= 500 || [408, 425, 429].includes(code))) return { lost: true, wait };
  if (code === 401) message = 'You are not signed in';
  return { state: 'Not answered', bad: true, button: 'Try again', fresh: !item.id, notBefore: Date.now() + wait,
    note: message || (response.ok ? 'The server sent something else than an answer' : 'Error ' + code) };
}

async function run(item, view) {
  const me = current = { item, view, attempts: 0, retry: 1000, began: item.id ? 0 : performance.now(),
    tell(text) { if (!me.stopping) say(text); } };
  Object.assign(item, { running: true, note: null, button: null });
  view.build();
  view.root.setAttribute('aria-busy', 'true');   // said once, when it is whole, not word by word
  showRunning(true);
  setHash(item.id);
  say('Waiting for the first word');
  save();
  keepDown();
  for (;;) {
    let end = await connect(me);
    if (end.lost && !me.stopping && !me.dropped) {
      me.attempts += 1;
      if (me.attempts <= ATTEMPTS) {
        view.flush();
        say('Connection lost, reconnecting (' + me.attempts + ')');
        // Twice as long each time, but never all the pages of a restarted server at once.
        const longest = Math.max(me.retry, Math.min(LONGEST_PAUSE, me.retry * 2 ** (me.attempts - 1)));
        await new Promise(resolve => {
          me.wake = resolve;
          setTimeout(resolve, Math.max(end.wait ?? 0, longest * (0.5 + Math.random() / 2)));
        });
        if (!me.stopping && !me.dropped) continue;
      }
      end = { state: 'Connection lost', bad: true, note: 'The connection was lost', button: 'Try again' };
    }
    if (me.dropped) return;
    if (me.stopping && !end.final) end = { state: 'Stopped', note: 'Stopped' };
    return finish(me, end);
  }
}

function finish({ item, view }, { state, note = null, bad = false, button = null, fresh = false, notBefore = 0 }) {
  current = null;
  Object.assign(item, { running: false, note, bad, button, fresh, notBefore });
  if (!button) delete item.body;
  view.flush();
  view.root.removeAttribute('aria-busy');
  view.ending();
  showRunning(false);
  setHash(null);
  say(state);
  save();
  keepDown();
  // Back to the prompt, but not out of something the reader does elsewhere.
  if ([document.body, send, stop, null].includes(document.activeElement) && getSelection().isCollapsed) focusPrompt();
  follow();
}

function tellStop(id) {
  if (id) fetch('chat/stop/' + id, { method: 'POST', credentials: 'same-origin', keepalive: true }).catch(() => {});
}

function halt() {
  const me = current;
  if (!me || me.stopping) return;
  me.stopping = true;
  say('Stopping');
  tellStop(me.item.id);
  // The last event tells what the answer cost, so it is waited for, though not for long.
  setTimeout(() => me.controller.abort(), STOP_PATIENCE);
  me.wake?.();
}

function follow() {
  const id = wanted;
  if (!id || current) return;
  wanted = null;
  if (items.some(item => item.id === id)) return setHash(null);   // this one is here already
  const item = { ...blank(), id, followed: true };
  items.push(item);
  run(item, new View(item));
}

function hashId() { return /^#[0-9a-f]{32}$/.test(location.hash) ? location.hash.slice(1) : null; }

// ---- What the reader does ----

function grow() {
  input.style.height = 'auto';
  input.style.height = input.scrollHeight + 2 + 'px';   // 2 for the border
}

input.form.addEventListener('submit', event => {
  event.preventDefault();
  if (current || !input.value.trim()) return;
  for (const place of log.querySelectorAll('.actions')) place.remove();   // too late to try the last one again
  for (const item of items) item.button = item.body = undefined;
  const question = { role: 'user', text: input.value };
  items.push(question);
  showQuestion(question);
  const item = { ...blank(), body: JSON.stringify({ messages: messages() }) };
  items.push(item);
  input.value = '';
  grow();
  focusPrompt();
  stuck = true;
  run(item, new View(item));
});
input.addEventListener('keydown', event => {
  // Enter may end a word in Japanese or Chinese; Safari then says so by the number 229 only.
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  input.form.requestSubmit();
});
input.addEventListener('input', grow);
stop.addEventListener('click', halt);
addEventListener('keydown', event => { if (event.key === 'Escape' && !event.isComposing) halt(); });
byId('clear').addEventListener('click', () => {
  if (current) {
    if (!current.item.followed) tellStop(current.item.id);
    current.dropped = true;
    current.controller.abort();
    current.wake?.();
  }
  current = wanted = null;
  items = [];
  log.replaceChildren();
  showRunning(false);
  setHash(null);
  save();
  say('New conversation');
  focusPrompt();
});
addEventListener('online', () => current?.wake?.());
addEventListener('resize', keepDown);
addEventListener('pagehide', save);
addEventListener('hashchange', () => {
  const id = hashId();
  if (current && id === current.item.id) return;
  wanted = id;
  if (current) setHash(current.item.id);
  follow();
});

// ---- Begin ----

history.scrollRestoration = 'manual';
showRunning(false);   // Firefox keeps over a reload that a button was disabled
grow();               // and what was written
items = load();
const halfway = items.find(item => item.running);
if (halfway && !halfway.id) {
  Object.assign(halfway, { running: false, bad: true, note: 'The page was left before the answer began',
    button: 'Try again', fresh: true });
}
const views = items.map(item => item.role === 'user' ? showQuestion(item) : new View(item));
wanted = hashId();
keepDown();
if (halfway?.running) {
  if (wanted === halfway.id) wanted = null;
  halfway.n = 0;
  run(halfway, views[items.indexOf(halfway)]);
}
follow();
})();
</script>
</body>
</html>
"""


# ============================================================================================================
# 14. Command line: python -m sheepsse, python sheepsse.py, sheepsse. May use: all above
# ============================================================================================================


def main(argv: Sequence[str] | None = None) -> int:
    """The shell command: prints the answer to a prompt, or runs the command that the first word names

    Returns the exit status: 0 the answer is whole, 1 it failed, 2 wrong usage, 3 interrupted with partial text on
    stdout, 130 Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words and words[0] in _COMMANDS else ""
    if not _has_stdout():
        _complain("standard output is closed")
        return 1
    parser = _parser(name)
    options = parser.parse_intermixed_args(words[1:] if name else words)
    if hasattr(sys.stdout, "reconfigure"):  # a console that lacks a character must not end the answer
        sys.stdout.reconfigure(errors="replace")
    run = _COMMANDS[name][0]
    try:
        return run(parser, options)
    except SheepError as error:
        _complain(error)
        return 1
    except BrokenPipeError:
        # the reader, such as head(1), has read enough; Python would complain when it flushes stdout at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # stdout cannot be written: a full disk, or no file
        _complain(f"the text cannot be written: {error}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except KeyboardInterrupt:
        _tell("interrupted")
        return 130


def _has_stdout() -> bool:
    """Whether there is a standard output; cron and pythonw may close any of the three standard streams

    A connection must not get the number of a closed stream. print() writes to stdout if stderr is None.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the system gives it the lowest free number, this one
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # stays open until the process ends
    return sys.stdout is not None


def _without_controls(text: str) -> str:
    """The text without control characters, which could control the terminal"""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


def _tell(text: str) -> None:
    """Prints to standard error"""
    print(_without_controls(text), file=sys.stderr, flush=True)


#: options of the library, and what they are in the shell
_SHELL_NAMES = {"api_key=False": "--no-key", "api_key=...": "--key-variable NAME", "model=...": "-m MODEL"}


def _complain(error: object) -> None:
    """Prints an error to standard error, with the options of the shell"""
    text = str(error)
    for name, shell_name in _SHELL_NAMES.items():
        text = text.replace(name, shell_name)
    _tell(f"sheepsse: {text}")


#: the commands by their first word, "" for a prompt: the function, the description, and what adds options to a parser
_COMMANDS: dict[str, tuple[Callable[[Any, Any], int], str, Sequence[Callable[[Any], object]]]] = {}


def _command(name: str, description: str, *options: Callable[[Any], object]) -> Callable[[_Run], _Run]:
    """Enters a function in the table of commands"""

    def enter(run: _Run) -> _Run:
        _COMMANDS[name] = run, description, options
        return run

    return enter


def _parser(name: str) -> Any:
    import argparse

    _, description, options = _COMMANDS[name]
    parser = argparse.ArgumentParser(prog=f"sheepsse {name}".rstrip(), description=description)
    if not name:
        parser.epilog = (
            f"Commands: {', '.join(filter(None, sorted(_COMMANDS)))}; see sheepsse batch --help. The key is "
            f"read from the provider's variable: {_key_variables()}"
            ". Exit status: 0 whole, 1 failed, 2 wrong usage, 3 interrupted after partial text, 130 Ctrl-C."
        )
    for add_to in options:
        add_to(parser)
    return parser


def _option(*names: str, **settings: Any) -> Callable[[Any], object]:
    """A function that adds an option to a parser"""
    return lambda parser: parser.add_argument(*names, **settings)


def _provider_options(parser: Any) -> None:
    parser.add_argument("--provider", choices=sorted(PROVIDERS), help="default: the one whose key is set")
    parser.add_argument("--base-url", metavar="URL", help="the URL of any other OpenAI-compatible server")
    key = parser.add_mutually_exclusive_group()
    key.add_argument("--key-variable", metavar="NAME", help="the environment variable that holds the key of --base-url")
    key.add_argument("--no-key", action="store_true", help="for a server that needs no key")


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise ValueError(text)
    return seconds


def _count_argument(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


_SYSTEM = _option("-s", "--system", metavar="TEXT", help="the system message")
_OPTION = _option(
    "-o",
    "--option",
    dest="params",
    nargs=2,
    action="append",
    default=[],
    metavar=("NAME", "VALUE"),
    help="an option of the request, such as -o temperature 0.2; the value is JSON, or else a text",
)
_MAX_TOKENS = _option("--max-tokens", type=_count_argument, metavar="N", help="the most tokens of an answer")


def _model_option(parser: Any, required: bool = True) -> None:
    default = os.environ.get("SHEEPSSE_MODEL")
    text = "the model, as the provider names it (default: $SHEEPSSE_MODEL)"
    parser.add_argument("-m", "--model", default=default, required=required and not default, help=text)


_ANY_MODEL = functools.partial(_model_option, required=False)


def _params_of(parser: Any, options: Any) -> dict[str, Any]:
    """The options of a request that a command line has"""
    params: dict[str, Any] = {"system": options.system, "max_tokens": options.max_tokens}
    for name, value in options.params:
        parsed = _json(value)
        params[name] = value if parsed is _NO_JSON else parsed
    wrong = {"messages", *_CLIENT_OPTIONS, *_CallOptions._fields, *(stream.__kwdefaults__ or ())} & set(params)
    if wrong:
        parser.error(f"-o takes options of the request, not {', '.join(sorted(wrong))}")
    try:
        _check_options(params)
    except TypeError as error:
        parser.error(f"-o {error}")
    return {name: value for name, value in params.items() if value is not None}


def _tell_retry(error: SheepError, attempt: int, delay: float) -> None:
    _tell(f"sheepsse: {error.status or error}, trying again in {delay:.0f} s")


def _client_of_options(options: Any, **more: Any) -> Client:
    """The client of a command line; AuthenticationError if the variable that it names is empty"""
    api_key = os.environ.get(options.key_variable) if options.key_variable else None
    if options.key_variable and not api_key:
        raise AuthenticationError(f"no API key in {options.key_variable}")
    more.setdefault("retry", Retry(on_retry=_tell_retry))
    return Client(options.provider, base_url=options.base_url, api_key=False if options.no_key else api_key, **more)


@_command(
    "",
    "Stream the answer of a language model to the terminal.",
    _option("prompt", nargs="*", help="the prompt; what standard input holds goes before it"),
    _ANY_MODEL,
    _provider_options,
    _SYSTEM,
    _MAX_TOKENS,
    _OPTION,
    _option("--json", action="store_true", help="print one JSON object a line, with type and time"),
    _option("--stats", action="store_true", help="print times and counts to standard error at the end"),
    _option("--checkpoint", metavar="DIR", help="save the answer there, and resume it when run again"),
    _option(
        "--resume",
        metavar="STRATEGIES",
        default="auto",
        help=f"how to resume a lost connection: auto, never, or some of {', '.join(_STRATEGIES)}, with commas",
    ),
    _option("--timeout", type=_seconds, metavar="SECONDS", help="the time limit for the whole call"),
    _option("--version", action="version", version=f"sheepsse {__version__}"),
)
def _answer_prompt(parser: Any, options: Any) -> int:
    try:
        names = [name.strip() for name in options.resume.split(",")]
        options.resume = names if len(names) > 1 else options.resume
        _strategies(options.resume)
    except ValueError as error:
        parser.error(str(error))
    prompt, params = _prompt(parser, options.prompt), _params_of(parser, options)
    if not options.model:
        parser.error("there is no model: pass -m MODEL, or set SHEEPSSE_MODEL")
    show = _JSONLines() if options.json else _PlainText()
    answer: Stream | None = None
    try:
        with _client_of_options(options) as client:
            answer = client.stream(
                prompt,
                model=options.model,
                deadline=options.timeout,
                checkpoint=options.checkpoint,
                resume=options.resume,
                **params,
            )
            with answer:
                for chunk in answer.chunks():
                    show.chunk(chunk)
            show.done(answer)
        return 0
    except SheepError as error:
        show.error(error)
        return 3 if answer is not None and answer.stats.chars else 1
    finally:
        if options.stats and answer is not None:
            show.end_line()
            _tell(_stats_line(answer))


def _prompt(parser: Any, words: Sequence[str]) -> str:
    """What standard input holds, where it is a file or a pipe, and then the words of the command line"""
    if len(words) == 1:
        _confirm_word(parser, words[0])
    prompt, given = "" if words == ["-"] else " ".join(words), ""
    if sys.stdin is None and not prompt:
        parser.error("there is no prompt, and standard input is closed")
    if sys.stdin is not None and not (sys.stdin.isatty() and prompt):
        try:
            given = sys.stdin.read()
        except UnicodeDecodeError as error:
            parser.error(f"standard input is not {error.encoding}: {error}")
    if given.strip():
        prompt = f"{given.rstrip()}\n\n{prompt}" if prompt else given
    if not prompt.strip():
        parser.error("the prompt is empty")
    return prompt


def _confirm_word(parser: Any, word: str) -> None:
    """Makes sure that a word which is nearly a command is meant as a prompt: an answer is billed"""
    import difflib

    near = difflib.get_close_matches(word, filter(None, _COMMANDS), 1, 0.75)
    if near and sys.stdin is not None and sys.stdin.isatty():
        _tell(f"{word!r} is no command; did you mean {near[0]!r}? Enter y to send it as a prompt:")
        near = [] if sys.stdin.readline().strip().lower() == "y" else near
    if near:
        parser.error(f"did you mean the command {near[0]!r}? To send {word!r} as a prompt, write more than one word")


class _PlainText:
    """The text of an answer on stdout, and nothing else there"""

    def __init__(self) -> None:
        self._is_in_line = False

    def chunk(self, chunk: Chunk) -> None:
        if chunk.index == 0 and chunk.text:
            self._is_in_line = not chunk.text.endswith("\n")
            print(_without_controls(chunk.text) if sys.stdout.isatty() else chunk.text, end="", flush=True)

    def done(self, answer: Stream) -> None:
        self.end_line(before_message=bool(answer.completion.refusal))
        if answer.completion.refusal:
            _tell(f"refused: {answer.completion.refusal}")

    def error(self, error: SheepError) -> None:
        self.end_line()
        _complain(error)

    def end_line(self, before_message: bool = True) -> None:
        """Ends the line on a terminal, also where only a message follows there; a file gets the text alone"""
        if self._is_in_line and (sys.stdout.isatty() or (before_message and sys.stderr.isatty())):
            print(flush=True)
            self._is_in_line = False


class _JSONLines:
    """An answer as JSON lines: {"type": content, reasoning, tool_call, finish, done or error, "t": seconds}"""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def _print(self, type: str, **fields: Any) -> None:
        line = {"type": type, "t": round(time.monotonic() - self._start, 4), **fields}
        print(json.dumps(line), flush=True)

    def chunk(self, chunk: Chunk) -> None:
        if chunk.reasoning:
            self._print("reasoning", text=chunk.reasoning, index=chunk.index)
        if chunk.text:
            self._print("content", text=chunk.text, index=chunk.index)
        if chunk.refusal:
            self._print("refusal", text=chunk.refusal, index=chunk.index)
        for call in chunk.tool_calls:
            self._print("tool_call", **call._asdict())
        if chunk.finish_reason:
            self._print("finish", reason=chunk.finish_reason, finish=chunk.finish, index=chunk.index)

    def done(self, answer: Stream) -> None:
        stats = answer.stats._asdict()
        stats["usage_by_attempt"] = list(map(_plain_usage, answer.stats.usage_by_attempt))
        shown = {"id": answer.id, "model": answer.model, "continuity": answer.continuity}
        self._print("done", **shown, usage=_plain_usage(answer.usage), stats=stats)

    def end_line(self) -> None:
        """Each line is whole"""

    def error(self, error: SheepError) -> None:
        self._print("error", code=error.code, message=str(error), status=error.status, request_id=error.request_id)


def _stats_line(answer: Stream) -> str:
    stats, usage = answer.stats, answer.usage
    shown = [f"{stats.chars} characters in {stats.chunks} chunks", f"{stats.elapsed:.2f} s"]
    if stats.ttft is not None:
        shown.append(f"first text after {stats.ttft:.2f} s")
    if usage is not None:
        shown.append(f"tokens: {usage.input_tokens} in, {usage.output_tokens} out")
    if stats.tokens_per_second is not None:
        shown.append(f"{stats.tokens_per_second:.0f} tokens a second")
    shown.append(f"{stats.attempts} request{'s' if stats.attempts != 1 else ''}")
    if answer.continuity != "single":
        shown.append(answer.continuity)
    return ", ".join(shown)


@_command(
    "chat",
    "Talk with a model. Ctrl-C stops an answer and keeps the conversation; Ctrl-D, or an empty line, ends it.",
    _model_option,
    _provider_options,
    _SYSTEM,
    _MAX_TOKENS,
    _OPTION,
)
def _chat(parser: Any, options: Any) -> int:
    with contextlib.suppress(ImportError):  # not on Windows
        import readline  # noqa: F401  # input() then has a history and editing

    params, messages = _params_of(parser, options), []
    with _client_of_options(options, model=options.model) as client:
        while True:
            try:
                prompt = input("> ")
            except EOFError:
                prompt = ""
            if not prompt.strip():
                return 0
            messages.append({"role": "user", "content": prompt})
            show, answer = _PlainText(), client.stream(messages, **params)
            try:
                with answer:
                    for chunk in answer.chunks():
                        show.chunk(chunk)
            except SheepError as error:
                show.error(error)
            except KeyboardInterrupt:
                show.end_line()
                _tell("stopped")
            else:
                show.done(answer)
            if answer.text:
                messages.append(answer.completion.message)
            else:
                messages.pop()  # nothing was answered: the same prompt can be entered again


@_command(
    "batch",
    "Answer many requests, and append the answers to a file as JSON lines. A second run requests only the missing "
    "and failed answers; of two lines with the same id, the later one counts. Each line of the input is a JSON "
    "string, or an object with messages or prompt, perhaps an id (default: the number of the line, from 0), and "
    "any options of the request. Exit status: 0 all are answered, 1 some failed, 130 Ctrl-C.",
    _option("input", metavar="IN.jsonl", help="the requests; - is standard input"),
    _option("-o", "--output", metavar="OUT.jsonl", required=True, help="the file for the answers"),
    _ANY_MODEL,
    _option("-w", "--workers", type=_count_argument, default=5, help="requests at once (default: 5)"),
    _option("--checkpoint", metavar="DIR", help="also save partial answers there, and resume them"),
    _provider_options,
)
def _batch(parser: Any, options: Any) -> int:
    try:
        with contextlib.ExitStack() as stack:
            if options.input == "-" and sys.stdin is None:
                raise ValueError("standard input is closed")
            source = stack.enter_context(open(options.input, "rb")) if options.input != "-" else sys.stdin.buffer
            output = stack.enter_context(_Answers(options.output))
            client = stack.enter_context(_client_of_options(options, model=options.model))
            requests = _requests_in(source, output.done)
            progress = _shown_progress()
            results = stack.enter_context(
                batch(
                    requests, client=client, workers=options.workers, checkpoint=options.checkpoint, progress=progress
                )
            )
            kept = len(output.done)
            try:
                for result in results:
                    output.append(result)
            finally:
                results.close()
                for result in results:  # results that were ready at the end
                    output.append(result)
                _tell(f"{results.summary}\nkept       {kept} answers from before")
            return 1 if results.summary.failed else 0
    except (SheepError, OSError, ValueError) as error:
        _complain(error)
        return 1


def _shown_progress() -> bool:
    """Whether tqdm is installed and stderr is a terminal"""
    import importlib.util

    return sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None


def _requests_in(source: Iterable[bytes], done: Container[Any]) -> Iterator[Any]:
    """The requests in lines of JSON, without those whose ids are done"""
    seen: set[Any] = set()
    for number, line in enumerate(source):
        if not line.strip():
            continue
        request = _json(line)
        if isinstance(request, str):
            request = {"messages": request}
        if not isinstance(request, dict):
            raise ValueError(f"line {number + 1} of the input is no request: {_excerpt(line)}")
        if "prompt" in request:
            request["messages"] = request.pop("prompt")
        id = number if request.get("id") is None else request["id"]
        if not isinstance(id, (int, str)) or id in seen:
            raise ValueError(
                f"line {number + 1} of the input has an id that another has, or that is no number or str: {id!r}"
            )
        seen.add(id)
        if id not in done:
            yield {**request, "id": id}


#: how a line of an answer begins
_ANSWER = b'{"id":'


class _Answers:
    """A file of answers, one line of JSON each; one process at a time appends to the file"""

    def __init__(self, path: str) -> None:
        file = _created_and_locked(path, shared=True)
        self._file, self._path = file, path
        #: the ids of the requests that are answered
        self.done: set[Any] = set()
        try:
            file.truncate(self._read())
        except BaseException:
            file.close()
            raise

    def _read(self) -> int:
        """Reads the ids that are done, and returns the size of the whole lines: a kill may have torn the last one"""
        size = 0
        with open(self._path, "rb") as lines:
            for line in lines:
                answer = _json(line)
                is_torn = not line.endswith(b"\n")
                is_answer = isinstance(answer, dict) and {"id", "text"} <= set(answer)
                if not (_ANSWER.startswith(line[: len(_ANSWER)]) if is_torn else is_answer):
                    raise ValueError(f"{self._path} holds other things than answers: choose another file")
                if not is_torn:
                    (self.done.discard if answer.get("error") else self.done.add)(answer["id"])
                    size += len(line)
        return size

    def append(self, result: Result) -> None:
        came, error = result.completion, result.error
        line = {
            "id": result.id,
            "text": result.text,
            "reasoning": came.reasoning or None,
            "tool_calls": [call._asdict() for call in came.tool_calls] or None,
            "finish_reason": came.finish_reason,
            "model": came.model,
            "usage": _plain_usage(result.usage),
            "cost": None if result.cost is None else str(result.cost),
            "elapsed": round(result.elapsed, 3),
            "attempts": result.attempts,
            "error": None
            if error is None
            else {"type": type(error).__name__, "code": getattr(error, "code", None), "message": str(error)},
        }
        shown = {name: value for name, value in line.items() if value is not None}
        _write_all(self._file, _to_json(shown).encode("utf-8", "replace") + b"\n")

    def __enter__(self) -> _Answers:
        return self

    def __exit__(self, *error: object) -> None:
        with self._file:
            _unlock(self._file)


@_command(
    "check",
    "Check that a provider can be reached and accepts the key. Costs nothing.",
    _option("--timeout", type=_seconds, default=10, metavar="SECONDS", help="the time limit (default: 10)"),
    _provider_options,
)
def _check(parser: Any, options: Any) -> int:
    with _client_of_options(options) as client:
        health = client.check(options.timeout)
    print(health.status, end="")
    print("" if health.latency is None else f", answered in {health.latency:.2f} s", end="")
    print(f", {len(health.models)} models" if health.models else "")
    for model in health.models:
        print(_without_controls(model))
    if health.error:
        _complain(health.error)
    return 0 if health.ok else 1


@_command("models", "Print the names of the models that the provider lists, one a line.", _provider_options)
def _models(parser: Any, options: Any) -> int:
    with _client_of_options(options) as client:
        health = client.check()
    if health.error:
        raise SheepError(health.error)
    for model in health.models:
        print(_without_controls(model))
    return 0


@_command(
    "cost",
    "Print the cost of a number of tokens: by --price, else in US dollars by the prices of genai-prices. With --mix, "
    "the cost of each mix of models, and its saving a month and a year compared with the first.",
    _option("-m", "--model", help="the model, as the provider names it"),
    _option("--provider", choices=sorted(PROVIDERS), help="the provider that sets the price"),
    _option("--input", type=int, default=0, metavar="N", help="input tokens, including cached ones"),
    _option("--output", type=int, default=0, metavar="N", help="output tokens, including reasoning"),
    _option("--cached", type=int, default=0, metavar="N", help="input tokens read from the cache"),
    _option("--price", nargs=2, metavar=("IN", "OUT"), help="prices of a million input and output tokens"),
    _option("--cached-price", metavar="PRICE", help="the price of a million cached tokens"),
    _option(
        "--mix",
        nargs="+",
        action="append",
        metavar="SHARE:IN:OUT",
        help="the parts of a mix: the share of a model, and its prices of a million tokens; can be repeated, as in "
        "--mix 1:2.50:10 --mix 0.6:0.14:0.28 0.4:2.50:10",
    ),
)
def _cost(parser: Any, options: Any) -> int:
    usage = Usage(options.input, options.output, options.input + options.output, options.cached)
    try:
        if options.mix:
            print(_mixes_table(options))
            return 0
        price = Price(options.price[0], options.price[1], options.cached_price) if options.price else None
        spent = cost(usage, price, model=options.model, provider=options.provider)
    except ValueError as error:
        parser.error(f"a price is a number, and the shares of a mix are parts of 1: {error}")
    if spent is None:
        known = "no price is known" + (f" for {options.model}" if options.model else "")
        raise SheepError(
            f"{known}: pass --price, or a --model and --provider that genai-prices knows "
            "(pip install 'sheepsse[prices]', Python 3.11 and later)"
        )
    print(f"{spent.normalize():f}")
    return 0


def _mixes_table(options: Any) -> str:
    """The cost of each mix, and its saving"""
    prices: dict[str, Price] = {}
    mixes: dict[str, dict[str, float]] = {}
    for parts in options.mix:
        shares = mixes.setdefault(" ".join(parts), {})
        for part in parts:
            share, *price = part.split(":")
            if len(price) != 2:
                raise ValueError(f"expected SHARE:IN:OUT, got {part}")
            prices[part], shares[part] = Price(*price), float(share)
    rows = [("cost", "saving", "a year", "mix")]
    for mix in compare_costs(options.input, options.output, mixes, prices):
        rows.append((f"{mix.total:.2f}", f"{mix.saving:.2f}", f"{mix.yearly_saving:.2f}", mix.name))
    return "\n".join("".join(f"{cell:>12}" for cell in row[:3]) + f"  {row[3]}" for row in rows)


@_command(
    "bench",
    "Measure a provider: send one prompt many times, and print the time to the first text, the time to the end, "
    "and tokens a second. Each request is billed.",
    _option("prompt", nargs="?", default="Count from 1 to 50.", help="(default: Count from 1 to 50.)"),
    _model_option,
    _option("-n", "--requests", type=_count_argument, default=10, help="the number of requests (default: 10)"),
    _option("-c", "--concurrency", type=_count_argument, default=2, help="requests at once (default: 2)"),
    _provider_options,
)
def _bench(parser: Any, options: Any) -> int:
    with _client_of_options(options, model=options.model, retry=0) as client:
        prompts = [options.prompt] * options.requests
        answers = batch(prompts, client=client, workers=options.concurrency, progress=_shown_progress())
        results = list(answers)
    good = [result for result in results if result.error is None]
    for error_text, count in collections.Counter(str(result.error) for result in results if result.error).items():
        _complain(f"{count} failed: {error_text}")
    print(_bench_table(good, answers.summary))
    return 1 if len(good) < len(results) else 0


def _bench_table(good: Sequence[Result], summary: BatchSummary) -> str:
    columns: dict[str, list[float]] = {
        "first text, s": [],
        "whole, s": [],
        "tokens a second": [],
        "characters a second": [],
    }
    tokens = 0
    for result in good:
        count = 0 if result.usage is None else result.usage.output_tokens
        tokens += count
        columns["whole, s"].append(result.elapsed)
        if result.ttft is not None:
            columns["first text, s"].append(result.ttft)
            seconds = result.elapsed - result.ttft
            if seconds > 0:
                columns["characters a second"].append(len(result.text) / seconds)
                columns["tokens a second"] += [count / seconds] if count else []
    lines = [f"{'':<20}{'mean':>9}{'p50':>9}{'p90':>9}{'p99':>9}"]
    for name, values in columns.items():
        sample = _Sample()
        for value in values:
            sample.add(value)
        figures = [sum(values) / len(values), *(sample.percentiles() or ())] if values else []
        lines.append(
            f"{name:<20}" + "".join(f"{value:>9.2f}" for value in figures) if values else f"{name:<20}{'-':>9}"
        )
    rate = "-" if summary.rate is None else f"{summary.rate:.2f}"
    speed = f"{tokens / summary.elapsed:.0f}" if tokens and summary.elapsed else "-"
    lines.append(f"{summary.succeeded} of {summary.total} answered, {rate} a second, {speed} tokens a second in all")
    return "\n".join(lines)


@_command(
    "serve",
    "Serve a chat page, which loses nothing when its connection is lost.",
    _ANY_MODEL,
    _provider_options,
    _SYSTEM,
    _option("--journal", metavar="DIR", help="the folder for answers (default: a temporary one)"),
    _option("--host", default="127.0.0.1", help="the address to listen on (default: %(default)s, only this machine)"),
    _option(
        "--allow-host", action="append", default=[], metavar="NAME", help="a name of this server, needed with --host"
    ),
    _option("--port", type=int, default=8000, help="the port; 0 for any free one (default: %(default)s)"),
)
def _serve(parser: Any, options: Any) -> int:
    import tempfile

    names = {"localhost", "127.0.0.1", "::1", *map(str.lower, options.allow_host)}
    if options.host not in names and not options.allow_host:
        parser.error("--host needs --allow-host NAME: the name of this server in the addresses of its pages")
    with contextlib.ExitStack() as stack:
        try:
            client = stack.enter_context(_serving_client(parser, options, stack))
            folder = options.journal or stack.enter_context(tempfile.TemporaryDirectory())
            app = wsgi_app(
                client,
                authorize=lambda environ: _user_of_page(environ, names),
                journal=folder,
                system=options.system,
            )
            server = stack.enter_context(_page_server(options.host, options.port, app))
        except SheepError:
            raise
        except (OSError, OverflowError) as error:
            raise SheepError(f"{options.host}:{options.port} cannot be served: {error}") from error
        print(f"http://{options.host}:{server.server_address[1]}/ (Ctrl-C ends it)", flush=True)
        with _ended_by_sigterm(server):
            server.serve_forever()
        drain()
    return 0


def _serving_client(parser: Any, options: Any, stack: contextlib.ExitStack) -> Client:
    """The client of the options; without a key, a client of the local provider beside this file"""
    client = _client_of_options(options, model=options.model)
    try:
        client._target(options.model, {})
    except AuthenticationError as error:
        path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "examples", "local_provider.py")
        if options.provider or options.base_url or not os.path.exists(path):
            raise
        _complain(f"{error}; until then a provider on this machine answers, always the same")
        provider = stack.enter_context(_local_provider(path))
        return Client(base_url=provider.base_url, api_key=False, model=options.model or "local-model")
    if not options.model:
        parser.error("-m is needed: the model, as the provider names it")
    return client


def _local_provider(path: str) -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("local_provider", path)
    assert spec is not None  # for the file is there
    assert spec.loader is not None
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    made = module.LocalProvider()
    made.default = module.Answer(pace=0.05)
    return made


def _user_of_page(environ: Mapping[str, Any], names: Container[str]) -> str | None:
    """One user for all requests to one of the server's names; else None

    Other names may be of pages anywhere, which lead here (DNS rebinding).
    """
    name = re.sub(r":[0-9]*$", "", environ.get("HTTP_HOST", "")).strip("[]").lower()  # without the port
    return "anybody" if name in names else None


def _page_server(host: str, port: int, app: Callable[..., Iterable[bytes]]) -> Any:
    """A server of the standard library, with a thread for each request"""
    from socketserver import ThreadingMixIn
    from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

    class Handler(WSGIRequestHandler):
        def get_environ(self) -> dict[str, Any]:
            return {**super().get_environ(), "sheepsse.socket": self.connection}

        def log_message(self, *args: Any) -> None:
            _log.debug(*args)

    class Server(ThreadingMixIn, WSGIServer):
        daemon_threads = True
        request_queue_size = 128
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        def handle_error(self, *args: Any) -> None:
            _log.debug("a request has failed", exc_info=True)

    server = Server((host, port), Handler)
    server.set_app(functools.partial(_page_or, app))
    return server


def _page_or(
    app: Callable[..., Iterable[bytes]], environ: dict[str, Any], start_response: Callable[..., Any]
) -> Iterable[bytes]:
    """The page for GET /; the application for all other requests"""
    environ["wsgi.multithread"] = True  # wsgiref does not set this
    if environ["PATH_INFO"] != "/" or environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
        return app(environ, start_response)
    page = CHAT_PAGE.encode("ascii")
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    )
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Length": str(len(page)),
        "Content-Security-Policy": policy + "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    }
    start_response("200 OK", list(headers.items()))
    return [page] if environ["REQUEST_METHOD"] == "GET" else []


@contextlib.contextmanager
def _ended_by_sigterm(server: Any) -> Iterator[None]:
    """Within it, SIGTERM ends the server, as Ctrl-C does"""
    import signal

    def end(*args: Any) -> None:
        threading.Thread(target=server.shutdown, daemon=True).start()  # shutdown() waits for the loop of this thread

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
