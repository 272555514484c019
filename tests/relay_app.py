"""What the servers of relay_servers.py load: the relay with Flask (`app`) and without (`bare`), as RELAY_APP says

RELAY_APP is a JSON object, all of it optional: `client`, the options of the Client; `relay`, those of the blueprint;
`limiter`, those of a Limiter; `pages`, further pages by path; `cut_every`, how many events a connection lives for, and
`abruptly`, whether it ends without an end; `retry`, the milliseconds after which clients are told to come back.
"""

import json
import os
import re
import socket

import sheepsse

try:
    import flask
except ImportError:
    flask = None

SETTINGS = json.loads(os.environ.get("RELAY_APP", "{}"))


def client_of(options):
    return sheepsse.Client(**{"api_key": False, "model": "local-model", "retry": 0, **options})


def options_of(settings):
    """The relay's options: as they are, with a Limiter where one is described"""
    limiter = settings.get("limiter")
    return {**settings.get("relay", {}), **({} if limiter is None else {"limiter": sheepsse.Limiter(**limiter)})}


def pages_of(settings):
    """The HTML of each path"""
    return {"/": sheepsse.CHAT_PAGE, **settings.get("pages", {})}


def user_of(header, cookies):
    """Who asks: as X-User says or, for browsers, the cookie; "nobody" is nobody"""
    named = dict(part.strip().partition("=")[::2] for part in cookies.split(";"))
    user = header or named.get("user") or "ann"
    return None if user == "nobody" else user


def user_of_environ(environ):
    return user_of(environ.get("HTTP_X_USER"), environ.get("HTTP_COOKIE", ""))


# Middleware


def with_pid(app):
    """Says in a header which process answers"""

    def named(environ, start_response):
        def start(status, headers, *error):
            return start_response(status, [*headers, ("X-Pid", str(os.getpid()))], *error)

        return app(environ, start)

    return named


class Pieces:
    """The blocks of an event stream, one by one, as `pass_on` gives them; closes what they come from"""

    def __init__(self, pieces, pass_on):
        self.pieces, self.blocks = pieces, pass_on(self.split())

    def split(self):
        rest = b""
        for piece in self.pieces:
            *whole, rest = (rest + piece).split(b"\n\n")
            yield from (block + b"\n\n" for block in whole)
        yield rest

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.blocks)

    def close(self):
        self.blocks.close()
        if hasattr(self.pieces, "close"):
            self.pieces.close()


def with_streams(app, pass_on):
    """The app with each stream's blocks as this gives them, who is told the request's environ too"""

    def changed(environ, start_response):
        pieces = app(environ, start_response)
        if not environ["PATH_INFO"].startswith("/chat/stream"):
            return pieces
        return Pieces(pieces, lambda blocks: pass_on(blocks, environ))

    return changed


def cut(blocks, environ, count, abruptly):
    """The blocks up to the `count`-th event; `abruptly` not even the answer's framing comes to an end"""
    for block in blocks:
        yield block
        count -= b"data:" in block
        if count == 0:
            break
    if count == 0 and abruptly:
        environ["gunicorn.socket"].shutdown(socket.SHUT_RDWR)


def hurried(blocks, environ, retry):
    """The blocks, with another time after which to come back"""
    return (re.sub(rb"^retry: \d+", b"retry: %d" % retry, block, flags=re.MULTILINE) for block in blocks)


def wrapped(app):
    if "retry" in SETTINGS:
        app = with_streams(app, lambda *stream: hurried(*stream, SETTINGS["retry"]))
    if "cut_every" in SETTINGS:
        app = with_streams(app, lambda *stream: cut(*stream, SETTINGS["cut_every"], SETTINGS.get("abruptly")))
    return with_pid(app)


# The apps


def flask_app():
    app = flask.Flask(__name__)
    client = client_of(SETTINGS.get("client", {}))

    def authorize(request):
        return user_of(request.headers.get("X-User"), request.headers.get("Cookie", ""))

    def page():
        return flask.Response(pages_of(SETTINGS)[flask.request.path], content_type="text/html; charset=utf-8")

    def completions():
        """What a client of OpenAI's own asks"""
        asked = flask.request.get_json()
        asked.pop("stream", None)
        usage = bool(asked.pop("stream_options", {}).get("include_usage"))
        relay = sheepsse.relay(client.stream(asked.pop("messages"), **asked), events="openai", usage=usage)
        return flask.Response(relay.start(flask.request.environ), headers=sheepsse.SSE_HEADERS)

    app.register_blueprint(sheepsse.flask_blueprint(client, authorize=authorize, **options_of(SETTINGS)))
    for number, path in enumerate(pages_of(SETTINGS)):
        app.add_url_rule(path, f"page{number}", page)
    app.add_url_rule("/v1/chat/completions", "completions", completions, methods=["POST"])
    return app


def bare_app():
    pages = pages_of(SETTINGS)
    client = client_of(SETTINGS.get("client", {}))
    relay = sheepsse.wsgi_app(client, authorize=user_of_environ, **options_of(SETTINGS))

    def app(environ, start_response):
        if environ["PATH_INFO"] not in pages:
            return relay(environ, start_response)
        start_response("200 OK", [("Content-Type", "text/html; charset=utf-8")])
        return [pages[environ["PATH_INFO"]].encode()]

    return app


app = flask and wrapped(flask_app())
bare = wrapped(bare_app())
