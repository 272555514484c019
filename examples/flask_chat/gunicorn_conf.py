"""gunicorn -c examples/flask_chat/gunicorn_conf.py: several processes, and a thread for each page that reads along."""

from __future__ import annotations

import os
import pathlib
import signal
import types

chdir = str(pathlib.Path(__file__).resolve().parent)
wsgi_app = "app:app"
bind = "127.0.0.1:" + os.environ.get("PORT", "8000")
workers = 3
# the sync worker answers one request at a time, and is killed by its time-out amid a stream
worker_class = "gthread"
threads = 64
# seconds for the last words of a worker that ends
graceful_timeout = 10

# made before the workers are, who all read the same cookies
os.environ.setdefault("SECRET_KEY", os.urandom(16).hex())


def post_worker_init(worker: object) -> None:
    """A worker that is told to end would wait for its streams: it tells their pages to go on elsewhere."""
    import sheepsse

    end = signal.getsignal(signal.SIGTERM)

    def drain_and_end(number: int, frame: types.FrameType | None) -> None:
        sheepsse.drain(0)
        if callable(end):
            end(number, frame)

    signal.signal(signal.SIGTERM, drain_and_end)
