"""Section 12: many requests, results as they come"""

import contextlib
import itertools
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
import types
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor

import pytest

import local_provider
import sheepsse
from conftest import HANG, PATIENT, ROOT, asking, in_another_thread, until
from local_provider import Answer, error_answer
from sheepsse import Price, batch


def said(request):
    """What the local provider is asked"""
    return request.json["messages"][-1]["content"]


@pytest.fixture
def echo(server):
    """A server that says back what it is asked"""
    server.default = lambda request: Answer(text=f"You said: {said(request)}")
    return server


def texts(results):
    return {result.id: result.text for result in results}


PROMPTS = [f"number {number}" for number in range(30)]
ECHOES = {number: f"You said: {prompt}" for number, prompt in enumerate(PROMPTS)}


def test_each_request_has_one_result(echo):
    with asking(echo) as client:
        results = list(batch(PROMPTS, client=client))
    assert len(results) == len(PROMPTS)
    assert texts(results) == ECHOES
    assert all(result.error is None and result.attempts == 1 and not result.cached for result in results)
    assert all(0 < result.ttft <= result.elapsed for result in results)
    assert all(result.completion.text == result.text and result.usage.output_tokens for result in results)


def test_with_ordered_results_come_in_the_order_of_the_requests(echo):
    echo.default = lambda request: Answer(text=said(request), delay=random.random() / 20)
    with asking(echo) as client:
        assert [result.id for result in batch(PROMPTS, client=client, ordered=True)] == list(range(30))


def test_without_it_they_come_as_they_are_completed(echo):
    echo.default = lambda request: Answer(text=said(request), stall_after=1 if said(request) == "number 0" else None)
    with asking(echo) as client:
        results = batch(PROMPTS[:4], client=client)
        assert {next(results).id for _ in range(3)} == {1, 2, 3}
        assert until(lambda: len(echo.requests) == 4)
        echo.release()
        assert [result.id for result in results] == [0]


def test_a_request_may_be_a_text_a_list_or_a_dict_with_params_of_its_own(echo):
    requests = [
        "one",
        [{"role": "system", "content": "Short."}, {"role": "user", "content": "two"}],
        {"id": "c", "messages": "three", "temperature": 0.5, "model": "other"},
    ]
    with asking(echo) as client:
        results = batch(requests, client=client, temperature=1, top_p=0.1)
        assert texts(results) == {0: "You said: one", 1: "You said: two", "c": "You said: three"}
    sent = {said(request): request.json for request in echo.requests}
    assert (sent["one"]["temperature"], sent["three"]["temperature"], sent["three"]["top_p"]) == (1, 0.5, 0.1)
    assert (sent["three"]["model"], len(sent["two"]["messages"])) == ("other", 2)


def test_one_that_fails_does_not_stop_the_rest(server):
    faults = {3: error_answer(400), 7: error_answer(500), 11: Answer(cut_after=3), 15: Answer(drop=True)}

    def answer(request):
        number = int(said(request).split()[1])
        return faults.get(number, Answer(text=said(request)))

    server.default = answer
    with asking(server) as client:
        results = {result.id: result for result in batch(PROMPTS, client=client, resume="never")}
    assert len(results) == 30
    kinds = {number: type(results[number].error).__name__ for number in faults}
    assert kinds == {3: "InvalidRequestError", 7: "ServerError", 11: "StreamInterrupted", 15: "ConnectError"}
    assert results[11].text == results[11].error.partial.text != ""
    assert all(results[number].text == prompt for number, prompt in enumerate(PROMPTS) if number not in faults)


@pytest.mark.parametrize("request_", [{}, {"id": 1}, None, 7, [], {"messages": "x", "client": 1}])
def test_a_request_that_is_none_is_an_error_of_its_own(echo, request_):
    with asking(echo) as client:
        results = list(batch(["one", request_, "two"], client=client, ordered=True))
    assert [bool(result.error) for result in results] == [False, True, False]


def test_two_requests_with_one_id_are_an_error_before_anything_is_sent(echo):
    jobs = [{"id": "a", "messages": "one"}, {"id": "b", "messages": "two"}, {"id": "a", "messages": "three"}]
    with asking(echo) as client:
        with pytest.raises(ValueError, match="two requests have the id 'a'"):
            batch(jobs, client=client)
        assert echo.requests == []
        with pytest.raises(ValueError, match="two requests have the id 'a'"):
            list(batch(iter(jobs), client=client))


@pytest.mark.parametrize(
    ("jobs", "words"),
    [
        ([{"id": 1, "messages": "one"}, "two"], "two requests have the id 1"),
        ([{"id": [1], "messages": "one"}], "hashable"),
    ],
)
def test_ids_that_clash_or_are_none_are_errors(echo, jobs, words):
    with asking(echo) as client, pytest.raises(ValueError, match=words):
        batch(jobs, client=client)


def test_a_result_does_not_wait_for_requests_that_are_long_in_coming(echo, clock):
    drawn = []

    def slow():
        for number in range(4):
            drawn.append(number)
            clock.now += 1  # so long takes each of them
            yield f"number {number}"

    with asking(echo) as client, batch(slow(), client=client, executor=Here()) as results:
        next(results)
        assert drawn == [0]
        assert len(list(results)) == 3


def test_close_from_another_thread_ends_it_quietly_and_loses_nothing(echo):
    came = []

    def endless():
        for number in itertools.count():
            time.sleep(0.001)
            yield f"number {number}"

    with asking(echo) as client:
        results = batch(endless(), client=client, workers=2)
        with in_another_thread(lambda: (until(lambda: len(came) > 5), results.close())):
            for result in results:
                came.append(result)
        assert list(results) == []
    assert 5 < len(came) <= len(echo.requests)
    assert len([result for result in came if result.error is None]) >= len(echo.requests) - 2


def test_a_batch_belongs_to_one_thread(server):
    server.default = Answer(stall_after=2)
    with asking(server) as client, batch(PROMPTS[:1], client=client) as results:
        with in_another_thread(list, results):
            assert until(lambda: server.requests)
            with pytest.raises(RuntimeError, match="belongs to one thread"):
                next(results)
            results.close()


@pytest.mark.parametrize("price", [Price("a", 1), Price(1, "nan"), Price(1, 2, "inf")])
def test_a_price_that_is_no_number_is_an_error_before_anything_is_sent(echo, price):
    with pytest.raises(ValueError, match="expected a number, got"), asking(echo, prices={local_provider.MODEL: price}):
        pass
    assert echo.requests == []


def test_no_requests_make_no_results_and_no_figures(echo):
    with asking(echo) as client:
        results = batch([], client=client)
        assert list(results) == []
    summary = results.summary
    assert summary[:4] == (0, 0, 0, 0)
    assert (summary.rate, summary.cost, summary.ttft, summary.duration) == (None,) * 4
    assert "- requests a second" in str(summary)
    assert "p50 -, p90 -, p99 -" in str(summary)


@pytest.mark.parametrize("wrong", ["one prompt", b"bytes", {"messages": "one"}])
def test_one_request_is_no_batch(wrong):
    with pytest.raises(TypeError, match="many requests"):
        batch(wrong, base_url="http://127.0.0.1:1/v1", api_key=False)


def test_a_batch_without_workers_or_clients_is_an_error():
    with pytest.raises(ValueError, match="1 worker"):
        batch(["one"], workers=0)
    with pytest.raises(ValueError, match="one or more"):
        batch(["one"], client=[])


def test_requests_are_drawn_as_they_can_be_made(echo):
    drawn = []

    def endless():
        for number in itertools.count():
            drawn.append(number)
            yield f"number {number}"

    with asking(echo) as client, batch(endless(), client=client, workers=3) as results:
        assert len({next(results).id for _ in range(50)}) == 50
        assert len(drawn) <= 50 + 2 * 3
    assert len(echo.requests) <= len(drawn)


def test_no_more_than_the_workers_are_asked_at_once(server):
    lock, now, most = threading.Lock(), [0], [0]

    def answer(request):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        if len(server.requests) == 3:
            server.release()
        return Answer(text="x", stall_after=0 if len(server.requests) <= 3 else None)

    server.default = answer
    with asking(server) as client:
        for _ in batch(PROMPTS, client=client, workers=3):
            with lock:
                now[0] -= 1
    assert 3 <= most[0] <= 2 * 3


def test_closing_cancels_what_runs_and_leaves_nothing_open(server):
    server.default = Answer(stall_after=3)
    with asking(server, **PATIENT) as client:
        results = batch(PROMPTS, client=client, workers=4)

        def close():
            assert until(lambda: len(server.sent_at) == 4 * 3)
            time.sleep(0.1)  # all wait for more
            results.close()

        with in_another_thread(close):
            left = list(results)
    assert all(isinstance(result.error, sheepsse.StreamCancelled) for result in left)
    assert server.wait_closed(HANG)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sheepsse-batch")]


def test_an_error_of_the_requests_generator_is_raised_and_ends_it(server):
    def broken():
        yield "one"
        yield "two"
        raise ZeroDivisionError

    came = []
    with asking(server) as client, pytest.raises(ZeroDivisionError):
        for result in batch(broken(), client=client):
            came.append(result)
    assert len(came) == 2


def test_the_summary_adds_up(server):
    server.default = lambda request: error_answer(400) if said(request).endswith("3") else Answer(text=said(request))
    with asking(server, prices={local_provider.MODEL: Price("1", "2")}) as client:
        results = batch(PROMPTS, client=client)
        came = list(results)
    summary = results.summary
    assert (summary.total, summary.succeeded, summary.failed, summary.cached) == (30, 27, 3, 0)
    assert summary.input_tokens == sum(result.usage.input_tokens for result in came if result.usage)
    assert summary.cost == sum(result.cost for result in came if result.cost is not None) > 0
    assert summary.rate == pytest.approx(30 / summary.elapsed)
    assert 0 < summary.ttft[0] <= summary.ttft[1] <= summary.ttft[2] <= summary.duration[2]
    assert "30: 27 succeeded (0 were kept), 3 failed" in str(summary)


def test_percentiles_of_many_values_take_bounded_memory_and_are_near():
    sample = sheepsse._Sample()
    for number in range(100_000):
        sample.add(number)
    assert len(sample._kept) == 10_000
    assert sample.percentiles() == pytest.approx((50_000, 90_000, 99_000), rel=0.05)


def test_progress_is_told_of_each_result(echo):
    seen = []
    with asking(echo) as client:
        list(batch(PROMPTS, client=client, progress=seen.append))
    assert texts(seen) == ECHOES


def test_the_bar_is_that_of_tqdm(echo, monkeypatch):
    told = []

    class Bar:
        def __init__(self, **options):
            told.append(options)

        def update(self):
            told.append("one more")

    fake = types.ModuleType("tqdm")
    fake.tqdm = Bar
    monkeypatch.setitem(sys.modules, "tqdm", fake)
    with asking(echo) as client:
        list(batch(PROMPTS, client=client, progress=True))
        list(batch(iter(PROMPTS[:1]), client=client, progress=True))
    assert told == [
        {"total": 30, "unit": "request"},
        *["one more"] * 30,
        {"total": None, "unit": "request"},
        "one more",
    ]


def test_a_client_may_be_made_of_the_options(echo):
    results = list(batch(["one"], base_url=echo.base_url, api_key=False, model="m"))
    assert [result.text for result in results] == ["You said: one"]


def test_an_answer_without_text_has_no_time_to_its_first_text(server):
    server.default = Answer(text="")
    with asking(server) as client:
        results = batch(["one"], client=client)
        (result,) = results
    assert (result.text, result.error, result.ttft) == ("", None, None)
    assert results.summary.ttft is None
    assert results.summary.duration is not None


def test_a_bar_needs_tqdm_and_says_so(echo, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with asking(echo) as client, pytest.raises(sheepsse.MissingExtraError, match="pip install tqdm"):
        batch(["one"], client=client, progress=True)


# Checkpoints


def test_run_again_a_batch_asks_only_for_what_is_missing(server, tmp_path):
    server.default = lambda request: (
        error_answer(400) if said(request).endswith("3") else Answer(text=f"You said: {said(request)}")
    )
    with asking(server) as client:
        first = list(batch(PROMPTS, client=client, checkpoint=tmp_path))
        assert len(server.requests) == 30
        server.default = lambda request: Answer(text=f"You said: {said(request)}")
        results = batch(PROMPTS, client=client, checkpoint=tmp_path)
        second = list(results)
    assert len([result for result in first if result.error]) == 3
    assert len(server.requests) == 33
    assert texts(second) == ECHOES
    assert results.summary.cached == sum(result.cached for result in second) == 27


def test_options_that_no_answer_depends_on_are_no_part_of_the_key(server, tmp_path):
    options = [
        {"deadline": 10},
        {"deadline": 20},
        {"on_retry": print},
        {"alignment": sheepsse.TokenAlignment("relaxed")},
    ]
    with asking(server) as client:
        for option in options:
            (result,) = batch(["Good day?"], client=client, checkpoint=tmp_path, **option)
            assert result.error is None
    assert len(server.requests) == 1


def test_a_request_that_cannot_be_written_ends_no_batch(server, tmp_path):
    with asking(server) as client:
        requests = [{"messages": "one", "seed": {1}}, "two"]
        results = list(batch(requests, client=client, checkpoint=tmp_path, ordered=True))
    assert [bool(result.error) for result in results] == [True, False]


def test_a_batch_with_several_clients_may_be_run_again(server, tmp_path):
    other = local_provider.LocalProvider()
    server.default = error_answer(503)
    with other, asking(server, model="a") as one, asking(other, model="b") as two:
        for _ in range(2):
            results = list(batch(PROMPTS[:5], client=[one, two], checkpoint=tmp_path))
            assert [result.error for result in results] == [None] * 5
        assert len(other.requests) == 5
        assert all(result.cached for result in results)
        (result,) = batch(PROMPTS[:1], client=two, checkpoint=tmp_path, model="c")
        assert (result.error, result.cached) == (None, False)


def test_ids_of_other_types_are_other_requests(server, tmp_path):
    requests = [{"id": 1, "messages": "Good day?"}, {"id": "1", "messages": "Good day?"}]
    with asking(server) as client:
        results = list(batch(requests, client=client, checkpoint=tmp_path, workers=1))
    assert [result.cached for result in results] == [False, False]
    assert len(server.requests) == 2


def test_equal_requests_are_each_asked_once(server, tmp_path):
    with asking(server) as client:
        for _ in range(2):
            assert len(list(batch(["Good day?"] * 5, client=client, checkpoint=tmp_path))) == 5
    assert len(server.requests) == 5


KILLED = """
    import sys
    sys.path[:0] = [{root!r}]
    import sheepsse
    prompts = [f"number {{number}}" for number in range(200)]
    limits = dict(timeout=None, first_timeout=None, idle_timeout=None)
    client = sheepsse.Client(base_url={url!r}, api_key=False, model="m", retry=0, **limits)
    for result in sheepsse.batch(prompts, client=client, checkpoint={folder!r}, workers=8):
        print(result.id, flush=True)
"""


def test_killed_and_run_again_it_asks_for_none_of_the_finished_ones(server, tmp_path):
    server.default = lambda request: Answer(text=said(request), stall_after=1 if len(server.requests) > 100 else None)
    program = textwrap.dedent(KILLED.format(root=str(ROOT), url=server.base_url, folder=str(tmp_path)))
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    finished = [int(process.stdout.readline()) for _ in range(60)]
    process.kill()
    finished += [int(line) for line in process.stdout.read().split(b"\n")[:-1]]
    process.stdout.close()
    process.wait()
    asked = len(server.requests)
    server.default = lambda request: Answer(text=said(request))
    with asking(server, model="m") as client:
        prompts = [f"number {number}" for number in range(200)]
        results = list(batch(prompts, client=client, checkpoint=tmp_path, workers=8))
    again = {said(request) for request in server.requests[asked:]}
    assert {result.id: result.text for result in results} == dict(enumerate(prompts))
    assert not again & {f"number {number}" for number in finished}
    assert len(finished) < 200


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_ctrl_c_ends_it_though_every_server_is_silent(server, tmp_path):
    server.default = Answer(stall_after=3)
    program = textwrap.dedent(KILLED.format(root=str(ROOT), url=server.base_url, folder=str(tmp_path)))
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)
    assert until(lambda: len(server.sent_at) == 8 * 3)
    time.sleep(0.2)  # all wait for more
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=HANG)
    assert b"KeyboardInterrupt" in error
    assert server.wait_closed(HANG)


# Executors


def test_threads_of_ones_own_executor_do_the_work_and_stay(echo):
    with ThreadPoolExecutor(3) as executor, asking(echo) as client:
        assert texts(batch(PROMPTS, client=client, executor=executor)) == ECHOES
        assert executor.submit(int, "7").result() == 7


def test_processes_do_the_work(echo):
    echo.default = lambda request: (
        error_answer(429, headers={"Retry-After": "7"}) if said(request).endswith("3") else Answer(text=said(request))
    )
    limiter, breaker = sheepsse.Limiter(2), sheepsse.CircuitBreaker(50)
    with ProcessPoolExecutor(2) as executor, asking(echo, limiter=limiter, breaker=breaker) as client:
        results = {result.id: result for result in batch(PROMPTS, client=client, executor=executor)}
    assert len(results) == 30
    assert [id for id, result in sorted(results.items()) if result.error] == [3, 13, 23]
    assert (type(results[3].error), results[3].error.retry_after) == (sheepsse.RateLimitError, 7)
    assert all(results[number].text == PROMPTS[number] for number in results if number % 10 != 3)
    assert limiter.stats()[:3] == (0, 0, 30)


@pytest.mark.parametrize(
    "options",
    [
        {"api_key": "sk-a-key-of-its-own"},
        {"api_key": False, "headers": {"Authorization": "Bearer a-key-of-its-own"}},
        {"api_key": False, "base_url": "http://user:a-key-of-its-own@127.0.0.1:1/v1"},
        {"api_key": False, "session": sheepsse.session()},
    ],
)
def test_a_key_of_ones_own_is_not_sent_to_other_processes(echo, options):
    client = sheepsse.Client(**{"base_url": echo.base_url, "model": "m", **options})
    with ProcessPoolExecutor(1) as executor, pytest.raises(TypeError, match="set the provider's variable"):
        batch(PROMPTS, client=client, executor=executor)
    assert echo.requests == []


def test_what_is_pickled_holds_no_key(monkeypatch):
    monkeypatch.setenv("DEEPSEEK_API_KEY", "sk-of-the-environment")
    client = sheepsse.Client("deepseek", model="m", limiter=sheepsse.Limiter(), retry=2, timeout=7)
    data = pickle.dumps(client)
    assert b"sk-of-the-environment" not in data
    again = pickle.loads(data)
    assert (again.provider, again.model) == ("deepseek", "m")
    assert again._options == client._options._replace(limiter=None, retry=again._options.retry)
    assert again._options.retry.total == 2


class Here(Executor):
    """Does the work at once, as one that is pickled for another process"""

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(pickle.loads(pickle.dumps(function(*pickle.loads(pickle.dumps(arguments))))))
        return future


def test_what_a_worker_of_another_process_does(echo):
    sheepsse._unpickled.cache_clear()
    with asking(echo) as client:
        assert texts(batch(PROMPTS, client=client, executor=Here())) == ECHOES
        assert texts(batch(PROMPTS, client=[client], executor=Here(), limiter=sheepsse.Limiter(1))) == ECHOES
        assert sheepsse._unpickled.cache_info().misses == 1
        (made,) = sheepsse._unpickled(pickle.dumps([client]))
        made.close()


KEYS = {"headers": {"Authorization": "Bearer a-key-of-its-own"}}


def test_a_key_among_the_options_is_not_sent_either(echo):
    with asking(echo) as client:
        for options in (KEYS, {"api_key": "a-key-of-its-own"}):
            with pytest.raises(TypeError, match="not sent to other processes|api_key= belongs to the Client"):
                batch(PROMPTS, client=client, executor=Here(), **options)
        (result,) = batch([{"messages": "one", **KEYS}], client=client, executor=Here())
    assert "not sent to other processes" in str(result.error)
    assert echo.requests == []


def test_several_clients_in_other_processes_have_no_limits_of_their_own(echo):
    with asking(echo) as one, asking(echo, limiter=sheepsse.Limiter()) as two:
        with pytest.raises(TypeError, match="no limiter and no breaker"):
            batch(PROMPTS, client=[one, two], executor=Here())


def test_threads_that_are_gone_are_an_error_of_the_request(echo):
    with ThreadPoolExecutor(1) as executor:
        pass
    with asking(echo) as client:
        (result,) = batch(["one"], client=client, executor=executor)
    assert "shutdown" in str(result.error)


def test_a_request_that_another_cancels_has_a_result(echo):
    class Cancelled(Executor):
        def submit(self, function, *arguments):
            future = Waiting()
            future.cancel()
            return future

    with asking(echo) as client:
        results = list(batch(["one", "two"], client=client, executor=Cancelled(), ordered=True))
    assert [type(result.error).__name__ for result in results] == ["CancelledError"] * 2


def test_a_limiter_that_refuses_is_an_error_of_the_request(echo):
    limiter = sheepsse.Limiter(1, max_queue=0)
    with asking(echo, limiter=limiter) as client, limiter.acquire():
        (result,) = batch(["one"], client=client, executor=Here())
    assert type(result.error) is sheepsse.QueueFullError


class Broken(Executor):
    """Whose results cannot be had"""

    def submit(self, function, *arguments):
        future = Future()
        future.set_exception(OSError("no such worker"))
        return future


def test_an_executor_that_fails_is_an_error_of_the_request(echo):
    breaker = sheepsse.CircuitBreaker(1)
    with asking(echo, breaker=breaker) as client:
        (result,) = batch(["one"], client=client, executor=Broken())
    assert str(result.error) == "no such worker"
    assert breaker.state == "closed"


class Waiting(Future):
    """What is cancelled before it began"""

    def cancel(self):
        return super().cancel() and self.set_running_or_notify_cancel() is False


class Never(Executor):
    """Which never begins"""

    def submit(self, function, *arguments):
        return Waiting()


def test_what_never_began_is_cancelled_and_gives_its_slot_back(echo):
    limiter, breaker = sheepsse.Limiter(20), sheepsse.CircuitBreaker(1)
    with asking(echo, limiter=limiter, breaker=breaker) as client:
        results = batch(PROMPTS[:3], client=client, executor=Never())
        with in_another_thread(lambda: (until(lambda: limiter.stats().active == 3), results.close())):
            assert list(results) == []
    assert limiter.stats()[:3] == (0, 0, 3)
    assert results.summary.total == 0


def test_a_stream_that_begins_when_all_is_closed_is_cancelled(echo):
    with asking(echo) as client:
        threads = sheepsse._Threads(client.stream, 1, None)
        threads.close()
        result = threads._result(sheepsse._Job(0, 0, "one", {}))
    assert type(result.error) is sheepsse.StreamCancelled
    assert echo.requests == []


@pytest.mark.skipif(sys.version_info < (3, 10), reason="needs Python 3.10 (Dask)")
def test_a_dask_cluster_does_the_work(echo):
    distributed = pytest.importorskip("distributed", reason="needs the extra 'peers' (Dask)")
    echo.default = lambda request: error_answer(400) if said(request) == "number 3" else Answer(text=said(request))
    program = textwrap.dedent(
        f"""
        import sys
        sys.path[:0] = [{str(ROOT)!r}]
        import distributed, sheepsse
        if __name__ == "__main__":
            options = dict(n_workers=2, threads_per_worker=1, dashboard_address=None)
            with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as dask:
                client = sheepsse.Client(base_url={echo.base_url!r}, api_key=False, model="m", retry=0)
                executor = dask.get_executor(pure=False)
                prompts = ["number 1"] * 5 + ["number 3", "number 4"]
                for result in sheepsse.batch(prompts, client=client, executor=executor, ordered=True):
                    print(result.id, result.text or type(result.error).__name__)
        """
    )
    assert distributed.__version__
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, timeout=3 * HANG, check=True)
    lines = done.stdout.decode().splitlines()
    assert lines == [*(f"{n} number 1" for n in range(5)), "5 InvalidRequestError", "6 number 4"]
    assert len(echo.requests) == 7


def test_a_worker_that_dies_is_an_error_of_its_requests(echo):
    with ProcessPoolExecutor(1) as executor, asking(echo) as client:
        assert type(executor.submit(os._exit, 1).exception(HANG)).__name__ == "BrokenProcessPool"
        results = list(batch(PROMPTS[:3], client=client, executor=executor))
    assert len(results) == 3
    assert all(type(result.error).__name__ == "BrokenProcessPool" for result in results)


# Large ones

#: all of it where SHEEPSSE_LARGE_BATCH is set
COUNT = 2000 if os.environ.get("SHEEPSSE_LARGE_BATCH") else 300
FAULTS = {
    "InvalidRequestError": error_answer(400),
    "AuthenticationError": error_answer(401),
    "QuotaError": error_answer(402),
    "ModelNotFoundError": error_answer(404, code="model_not_found"),
    "RateLimitError": error_answer(429),
    "ServerError": error_answer(500),
    "ConnectError": Answer(drop=True),
    "StreamInterrupted": Answer(cut_after=3),
    "StreamInterrupted by a reset": Answer(cut_after=3, cut="reset"),
    "StreamTimeout": Answer(stall_after=3),
    "InvalidStreamError": Answer(body=b"<html>Welcome</html>", content_type="text/html"),
    "StreamError": Answer(body=b'data: {"error":{"message":"no more"}}\n\n'),
}


def test_a_large_batch_with_every_fault_has_each_result_once(server):
    choose = random.Random(7)
    faults = {number: choose.choice(sorted(FAULTS)) for number in choose.sample(range(COUNT), COUNT // 10)}

    def answer(request):
        number = int(said(request))
        return FAULTS[faults[number]] if number in faults else Answer(text=f"Answer {number}, and no other")

    server.default = answer

    def request(number):  # nobody waits for those alone who will not be answered
        limit = {"timeout": (HANG, 0.2)} if faults.get(number) == "StreamTimeout" else {}
        return {"id": f"r{number}", "messages": str(number), **limit}

    with asking(server, timeout=HANG) as client:
        requests = map(request, range(COUNT))
        results = list(batch(requests, client=client, workers=16, resume="never", stop_on=()))
    assert len(results) == len({result.id for result in results}) == COUNT
    for result in results:
        number = int(result.id[1:])
        assert result.index == number
        if number in faults:
            assert type(result.error).__name__ == faults[number].partition(" ")[0]
            assert result.text == result.error.partial.text
        else:
            assert (result.text, result.error) == (f"Answer {number}, and no other", None)
    assert server.wait_closed(HANG)


def test_memory_does_not_grow_with_the_number_of_requests(monkeypatch):
    text = "x" * 1000
    monkeypatch.setattr(sheepsse, "_result", lambda job, ask: sheepsse.Result(job.id, job.index, text * 1, elapsed=0.1))
    peaks = []
    for count in (200, 200, 2_000):
        tracemalloc.start()
        prompts = (f"number {number}" for number in range(count))
        for _ in batch(prompts, base_url="http://127.0.0.1:1/v1", api_key=False, workers=2):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] + 300_000  # the values for percentiles, of which 10,000 are kept at most


# Errors that all requests would have


@pytest.mark.parametrize(("status", "expected"), [(401, sheepsse.AuthenticationError), (402, sheepsse.QuotaError)])
def test_a_wrong_key_or_a_spent_quota_stops_the_batch_after_what_runs(echo, status, expected):
    drawn = []

    def endless():
        for number in itertools.count():
            drawn.append(number)
            yield f"prompt {number}"

    echo.answer(Answer(text="done before"), error_answer(status))
    echo.default = error_answer(status)
    with asking(echo) as client:
        results = batch(endless(), client=client, model="m", workers=1)
        finished = []
        with pytest.raises(expected):
            for result in results:
                finished.append(result)
    assert finished[0].text == "done before"
    assert isinstance(finished[1].error, expected)
    assert len(drawn) <= 4
    assert results.summary.succeeded == 1


def test_a_batch_that_stops_on_nothing_returns_each_error(echo):
    echo.default = error_answer(401)
    with asking(echo) as client:
        results = list(batch(PROMPTS, client=client, model="m", stop_on=()))
    assert len(results) == len(PROMPTS)
    assert all(isinstance(result.error, sheepsse.AuthenticationError) for result in results)


def test_a_batch_may_stop_on_any_error(echo):
    echo.default = error_answer(400)
    with asking(echo) as client, pytest.raises(sheepsse.InvalidRequestError):
        list(batch(PROMPTS, client=client, model="m", workers=1, stop_on=sheepsse.InvalidRequestError))
    assert len(echo.requests) < len(PROMPTS) + 1


def test_a_limiter_of_the_callers_own_holds_requests_to_other_processes_too(echo):
    held = []

    class Own:
        @contextlib.contextmanager
        def acquire(self):
            held.append("slot")
            yield

    with asking(echo) as client:
        assert texts(batch(PROMPTS, client=client, executor=Here(), limiter=Own())) == ECHOES
        bound = sheepsse.Limiter(1).bind(priority=1, user="ann")
        assert texts(batch(PROMPTS, client=client, executor=Here(), limiter=bound)) == ECHOES
    assert held == ["slot"] * len(PROMPTS)
