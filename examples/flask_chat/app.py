"""A page to chat on, with Flask 1.1 and later: a relay that loses nothing, in a few lines.

    $ python -m pip install 'sheepsse[flask]'
    $ python examples/flask_chat/app.py

Or on a server with several workers, which end politely:

    $ python -m pip install gunicorn && gunicorn -c examples/flask_chat/gunicorn_conf.py

The key is read from your provider's variable, the model from MODEL. Without a key, a provider on this machine answers.
"""

from __future__ import annotations

import os
import pathlib
import sys
from typing import Any

import flask

import sheepsse

# shared by all workers, so that any of them can go on with what another began; by nobody else
JOURNAL = os.environ.get("JOURNAL", str(pathlib.Path(__file__).resolve().parent / "streams"))


def who_asks(request: Any) -> str | None:
    """Whoever may spend your money: here anybody who was given the page. An app with a login says who that is."""
    user: str | None = flask.session.get("user")
    return user


def model_client() -> sheepsse.Client:
    """A client of the provider whose key is set; else of one on this machine."""
    client = sheepsse.Client(model=os.environ.get("MODEL", "deepseek-chat"))
    try:
        client.stream("Is there a key?").close()  # asks nobody
        return client
    except sheepsse.AuthenticationError as error:
        print(f"{error}\nUntil then a provider on this machine answers, always the same.", file=sys.stderr)
    sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))
    from local_provider import Answer, LocalProvider

    provider = LocalProvider()
    provider.default = Answer(pace=0.05)
    return sheepsse.Client(base_url=provider.base_url, model="local-model", api_key=False)


app = flask.Flask(__name__)
# the same for all workers: gunicorn_conf.py makes one where the environment has none
app.secret_key = os.environ.get("SECRET_KEY") or os.urandom(16).hex()
app.config.update(SESSION_COOKIE_SAMESITE="Lax", SESSION_COOKIE_HTTPONLY=True)
app.register_blueprint(
    sheepsse.flask_blueprint(
        model_client(),
        authorize=who_asks,
        journal=JOURNAL,
        limiter=sheepsse.Limiter(max_concurrent=32, max_queue=100, max_per_user=2),
        max_tokens=2000,
    )
)


@app.route("/")
def page() -> str:
    flask.session.setdefault("user", os.urandom(8).hex())
    return sheepsse.CHAT_PAGE


if __name__ == "__main__":
    app.run(port=int(os.environ.get("PORT", "8000")), threaded=True)
