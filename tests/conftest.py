"""What all tests share: a real server on loopback, and an environment that holds no key and no proxy"""

import contextlib
import gc
import json
import os
import pathlib
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import local_provider  # noqa: E402  # found by the line above
import sheepsse  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _what_is_loaded_is_no_garbage():
    """To look through all that after each test, as _nothing_leaks does, would cost more than the tests"""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch, tmp_path):
    for row in sheepsse.PROVIDERS.values():
        monkeypatch.delenv(row.key_variable, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.fixture(autouse=True)
def _nothing_leaks():
    """A socket left open warns when it is collected, and warnings are errors: so collect while the test's name is up"""
    yield
    gc.collect()


@pytest.fixture
def no_collection():
    """For what recurses to the limit: a callback of the collector there, such as hypothesis has, aborts Python 3.8"""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def server():
    with local_provider.LocalProvider() as provider:
        yield provider


@pytest.fixture
def client(server):
    """A client of the server that asks once"""
    with sheepsse.Client(base_url=server.base_url, api_key=False, model="local-model", retry=0) as made:
        yield made


@contextlib.contextmanager
def asking(server, **options):
    """A client of the server that asks once, unless it is told otherwise"""
    defaults = {"base_url": server.base_url, "api_key": False, "model": local_provider.MODEL, "retry": 0}
    with sheepsse.Client(**{**defaults, **options}) as made:
        yield made


@pytest.fixture
def clients(server):
    """A client of the server in each dialect, by its name"""
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(asking(server, base_url=server.origin + base, dialect=name))
            for name, base in local_provider.DIALECT_BASES.items()
        }


def read(pieces):
    """What comes of an iterator, and the SheepError that ended it or None; any other error is a failure"""
    came = []
    try:
        for piece in pieces:
            came.append(piece)
    except sheepsse.SheepError as error:
        return came, error
    return came, None


def timed(function):
    """What a function gives, and the seconds it takes"""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def folder_of(variable):
    """The folder that an environment variable names, or a skip that says which is missing"""
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} is not set: it names a folder of files that are not part of this repository")
    return pathlib.Path(folder)


@pytest.fixture(scope="session")
def recordings():
    """Real recorded streams: the folder and its index"""
    folder = folder_of("SHEEPSSE_RECORDINGS")
    return folder, json.loads((folder / "INDEX.json").read_text(encoding="utf-8"))
