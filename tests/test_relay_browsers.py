"""The relay and its page in real browsers: what the user sees is the answer, once, whatever becomes of connections

Screenshots go to the folder that SHEEPSSE_SCREENSHOTS names. Chromium is driven by Playwright, Firefox by its own
Marionette, which needs no driver.
"""

import base64
import contextlib
import json
import os
import pathlib
import re
import shutil
import socket
import sys
import time

import pytest

from local_provider import Answer
from relay_servers import HANG, can_connect, free_port, process, require, running, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux (/proc)")

CHROMIUM = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
FIREFOX = """
user_pref("marionette.port", {port});
user_pref("datareporting.policy.dataSubmissionEnabled", false);
user_pref("app.update.disabledForTesting", true);
"""
WHOLE = " ".join(f"word{number}" for number in range(200))
#: an answer that says some words and no more
SILENT = Answer(text=WHOLE, stall_after=30)

#: An EventSource as anyone would write it; it shows what it has seen
SOURCE = """<!DOCTYPE html><title>source</title><pre></pre><script>
const seen = {text: "", ids: [], opened: 0, ended: []};
const show = () => { document.querySelector("pre").textContent = JSON.stringify(seen); };
const source = new EventSource("/chat/stream?prompt=Good%20day%3F");
source.onopen = () => { seen.opened += 1; show(); };
source.onmessage = (event) => {
  seen.text += JSON.parse(event.data).content;
  seen.ids.push(event.lastEventId);
  show();
};
for (const name of ["done", "failed", "interrupted"]) {
  source.addEventListener(name, () => { seen.ended.push(name); source.close(); show(); });
}
</script>"""


# ---------------------------------------------------------------------------------------------------------------------
# Browsers: each has tabs, which open a URL, run JavaScript, draw a screenshot, reload and close
# ---------------------------------------------------------------------------------------------------------------------


class ChromiumTab:
    def __init__(self, context, url):
        self.page = context.new_page()
        self.page.goto(url)

    def run(self, expression):
        return self.page.evaluate(expression)

    def reload(self):
        self.page.reload()

    def close(self):
        self.page.close()

    def screenshot(self, path):
        self.page.screenshot(path=path)


@contextlib.contextmanager
def chromium(folder):
    require("playwright", programs=["chromium"])
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM)
        with contextlib.closing(browser), contextlib.closing(browser.new_context(locale="en")) as context:
            context.set_default_timeout(HANG * 1000)
            yield lambda url: ChromiumTab(context, url)


class Marionette:
    """Firefox's own remote control: each message is its length, a colon, and JSON"""

    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port), HANG)
        self.file = self.socket.makefile("rb")
        self.number = 0
        self._receive()  # it introduces itself
        self.call("NewSession", capabilities={})
        self.home = self.call("GetWindowHandle")["value"]  # stays open, as a Firefox without a window is at its end

    def close(self):
        self.file.close()
        self.socket.close()

    def _receive(self):
        size = b""
        while not size.endswith(b":"):
            size += self.file.read(1)
        return json.loads(self.file.read(int(size[:-1])))

    def call(self, command, **parameters):
        self.number += 1
        message = json.dumps([0, self.number, f"WebDriver:{command}", parameters]).encode()
        self.socket.sendall(b"%d:%s" % (len(message), message))
        _, _, error, result = self._receive()
        assert error is None, error
        return result


class FirefoxTab:
    def __init__(self, marionette, url):
        self.marionette = marionette
        marionette.call("SwitchToWindow", handle=marionette.home)
        self.handle = marionette.call("NewWindow", type="tab")["handle"]
        self._call("Navigate", url=url)

    def _call(self, command, **parameters):
        self.marionette.call("SwitchToWindow", handle=self.handle, focus=True)
        return self.marionette.call(command, **parameters)

    def run(self, expression):
        return self._call("ExecuteScript", script=f"return ({expression})", args=[], sandbox=None)["value"]

    def reload(self):
        self._call("Refresh")

    def close(self):
        self._call("CloseWindow")

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self._call("TakeScreenshot", full=False)["value"]))


@contextlib.contextmanager
def firefox(folder):
    require(programs=["firefox-esr"])
    port = free_port()
    (folder / "user.js").write_text(FIREFOX.format(port=port))
    command = ["firefox-esr", "--headless", "--marionette", "--no-remote", "--profile", folder]
    with process(command, folder / "firefox.log"):
        wait_until(lambda: can_connect(port), 0.1)
        with contextlib.closing(Marionette(port)) as marionette:
            yield lambda url: FirefoxTab(marionette, url)


# ---------------------------------------------------------------------------------------------------------------------
# Fixtures
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[chromium, firefox], ids=["chromium", "firefox"])
def browser(request, tmp_path_factory):
    require("flask", "gunicorn")  # without a relay there is nothing to look at
    with request.param(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def tab(browser):
    """Opens tabs; those that are still open are closed with the test"""
    with contextlib.ExitStack() as stack:

        def opened(url):
            tab = browser(url)
            stack.callback(closed, tab)
            return tab

        yield opened


def closed(tab):
    with contextlib.suppress(Exception):  # the test has closed it itself
        tab.close()


@pytest.fixture
def serve(server, tmp_path):
    """Starts a relay to the provider, with three workers; it ends with the test"""
    with contextlib.ExitStack() as stack:

        def start(**settings):
            settings = {"client": {"base_url": server.base_url}, **settings}
            return stack.enter_context(running("gunicorn-gthread", tmp_path, settings, workers=3))

        yield start


@pytest.fixture
def journal(tmp_path):
    # a browser on a busy machine may need a second and more to come back
    return {"journal": str(tmp_path / "journal"), "grace": 1000}


@pytest.fixture
def picture(request, tmp_path):
    """Keeps what a tab shows, by the test's name"""
    folder = pathlib.Path(os.environ.get("SHEEPSSE_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "-", request.node.name).strip("-")

    def take(tab, moment):
        tab.screenshot(folder / f"{name}-{moment}.png")

    return take


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def send(tab, prompt="Good day?"):
    tab.run(
        f"""(() => {{
            const box = document.querySelector("#prompt");
            box.value = {json.dumps(prompt)};
            box.dispatchEvent(new Event("input", {{bubbles: true}}));
            document.querySelector("#send").click();
        }})()"""
    )


def text_of(tab):
    """The text of the last answer on the page"""
    return tab.run('(Array.from(document.querySelectorAll(".answer .text")).pop() || {}).textContent || ""')


def is_done(tab):
    return tab.run('Boolean(document.querySelector(".answer .facts"))')


def words(tab):
    return len(text_of(tab).split())


def wait_for_words(tab, count):
    wait_until(lambda: words(tab) >= count)


def wait_for_end(tab):
    try:
        return wait_until(lambda: is_done(tab), 0.02)
    except AssertionError as error:
        raise AssertionError(tab.run("document.body.innerText")) from error


def test_an_answer_whose_connection_is_cut_every_seven_events_arrives_once(serve, server, journal, tab, picture):
    server.default = Answer(text=WHOLE, pace=0.01)
    page = tab(serve(relay=journal, cut_every=7, retry=50).origin)
    send(page)
    took = wait_for_end(page)
    picture(page, "done")
    print(f"200 words over 29 connections: {took:.1f} s")
    assert text_of(page) == WHOLE
    assert server.billed == 1


def test_an_answer_whose_page_is_reloaded_twice_arrives_once(serve, server, journal, tab, picture):
    server.default = Answer(text=WHOLE, pace=0.015)
    page = tab(serve(relay=journal).origin)
    send(page)
    for count in (30, 90):
        wait_for_words(page, count)
        page.reload()
    picture(page, "reloaded")
    wait_for_end(page)
    picture(page, "done")
    assert text_of(page) == WHOLE
    assert server.billed == 1


def test_an_answer_that_two_pages_follow_arrives_once_in_each(serve, server, journal, tab, picture):
    server.default = Answer(text=WHOLE, pace=0.005, stall_after=80)
    relay = serve(relay=journal, cut_every=50, abruptly=True, retry=50)
    first = tab(relay.origin)
    send(first)
    wait_for_words(first, 30)
    stream = first.run("location.hash")
    assert re.fullmatch("#[0-9a-f]{32}", stream)
    second = tab(relay.origin + "/" + stream)
    wait_for_words(second, 30)
    server.release()
    for page in (first, second):
        wait_for_end(page)
        assert text_of(page) == WHOLE
    picture(second, "done")
    assert server.billed == 1


#: A minute passes in less than a second, but not shorter times
HURRY = """(() => {
    const before = window.setTimeout;
    window.setTimeout = (call, delay) => before(call, delay > 30000 ? delay / 100 : delay);
})()"""


def test_a_connection_of_which_nothing_is_heard_for_a_minute_is_given_up_for_another(serve, server, journal, tab):
    server.default = Answer(text=WHOLE, pace=0.005, stall_after=60)
    page = tab(serve(relay={**journal, "heartbeat": 1000}, retry=50).origin)
    page.run(HURRY)
    send(page)
    wait_for_words(page, 50)
    wait_until(lambda: "reconnecting" in page.run('document.querySelector("#status").textContent'), 0.005)
    server.release()
    wait_for_end(page)
    assert text_of(page) == WHOLE
    assert "reconnected" in page.run('document.querySelector(".answer .facts").textContent')
    assert server.billed == 1


def test_stop_ends_the_upstream_at_once(serve, server, journal, tab, picture):
    server.default = SILENT
    page = tab(serve(relay={**journal, "heartbeat": 1000}).origin)
    send(page)
    wait_for_words(page, 10)
    at = time.perf_counter()
    page.run('document.querySelector("#stop").click()')
    assert server.wait_closed(HANG)
    print(f"from the click to upstream's end: {(time.perf_counter() - at) * 1000:.0f} ms")
    time.sleep(0.3)
    picture(page, "stopped")
    assert WHOLE.startswith(text_of(page))


def test_closing_the_tab_ends_the_upstream(serve, server, tab):
    server.default = SILENT
    page = tab(serve(relay={"heartbeat": 1000}).origin)
    send(page)
    wait_for_words(page, 10)
    at = time.perf_counter()
    page.close()
    assert server.wait_closed(HANG)
    print(f"from the close to upstream's end: {(time.perf_counter() - at) * 1000:.0f} ms")


def test_with_a_journal_closing_the_tab_ends_the_upstream_after_the_grace(serve, server, journal, tab):
    server.default = SILENT
    page = tab(serve(relay={**journal, "heartbeat": 1000, "grace": 1}).origin)
    send(page)
    wait_for_words(page, 10)
    page.close()
    assert server.wait_closed(HANG)


def test_a_plain_event_source_gets_everything_once_over_cuts(serve, server, journal, tab, picture):
    text = " ".join(f"word{number}" for number in range(40))
    server.default = Answer(text=text, pace=0.02)
    relay = serve(relay=journal, cut_every=15, retry=50, pages={"/source": SOURCE})
    page = tab(relay.origin + "/source")

    def seen():
        return json.loads(page.run('document.querySelector("pre").textContent') or '{"ended": []}')

    wait_until(lambda: seen()["ended"], 0.02)
    picture(page, "done")
    came = seen()
    assert came["text"] == text
    assert [int(id.partition(":")[2]) for id in came["ids"]] == list(range(1, 41))
    assert (came["opened"], came["ended"]) == (3, ["done"])
    assert server.billed == 1
    opened = len(server.requests)
    time.sleep(0.5)
    assert len(server.requests) == opened


def test_the_page_of_the_readme_shows_the_answer_once_over_lost_connections(serve, server, journal, tab):
    readme = (pathlib.Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (page,) = re.findall(r"^```html\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    server.default = Answer(text=WHOLE, pace=0.005)
    relay = serve(relay=journal, cut_every=50, retry=50, pages={"/page": "<!DOCTYPE html>" + page})
    shown = tab(relay.origin + "/page")
    wait_until(lambda: shown.run('document.querySelector("#status").textContent') == "done")
    assert shown.run('document.querySelector("#answer").textContent') == WHOLE
    assert len(server.requests) == 1
