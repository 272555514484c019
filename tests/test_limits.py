"""Section 7 and its use: buckets, limiters and breakers; who is asked when one cannot be"""

import gc
import random
import sys
import threading
import time
from collections import Counter

import pytest
import requests

import local_provider
import sheepsse
from conftest import HANG, PATIENT, Clock, asking, in_another_thread, read, until
from local_provider import TEXT, Answer, error_answer
from sheepsse import (
    CircuitBreaker,
    CircuitOpenError,
    Limiter,
    QueueFullError,
    QueueTimeoutError,
    StreamCancelled,
    TokenBucket,
)

#: seconds that no test waits for
FOREVER = 1_000_000


# TokenBucket


def bucket_of(clock, rate, capacity):
    return TokenBucket(rate, capacity, clock=clock, sleep=clock.sleep)


def test_a_bucket_lets_its_capacity_through_at_once_and_then_its_rate(clock):
    bucket = bucket_of(clock, 2, 4)
    passed = []
    for _ in range(8):
        assert bucket.acquire()
        passed.append(clock.now)
    assert passed == pytest.approx([0, 0, 0, 0, 0.5, 1, 1.5, 2], abs=1e-5)


def test_no_window_lets_more_through_than_rate_times_time_and_capacity(clock):
    choose = random.Random(6)
    rate, capacity = 3.0, 10.0
    bucket = bucket_of(clock, rate, capacity)
    lowest = 0.0  # of "passed - rate * time", over all moments before an acquisition
    passed = 0.0
    while clock.now < 1_000_000:
        clock.now += choose.choice([0.0, 0.01, choose.expovariate(1), choose.expovariate(0.05), 30.0])
        n = choose.choice([1, 1, choose.uniform(0.1, capacity), capacity])
        if bucket.acquire(n) if choose.random() < 0.7 else bucket.try_acquire(n):
            lowest = min(lowest, passed - rate * clock.now)
            passed += n
            # the window that began where "passed - rate * time" was the lowest is the worst of all that end now
            assert passed - rate * clock.now - lowest <= capacity + 1e-3
    assert passed > 300_000


def test_more_than_the_capacity_or_nothing_is_refused_at_once(clock):
    bucket = bucket_of(clock, 1, 5)
    for n in (5.1, 0, -1, float("nan")):
        with pytest.raises(ValueError, match="capacity 5"):
            bucket.acquire(n)
        with pytest.raises(ValueError, match="capacity 5"):
            bucket.try_acquire(n)
    for rate, capacity in ((0, 1), (1, 0), (-1, 1), (float("nan"), 1)):
        with pytest.raises(ValueError, match="above 0"):
            TokenBucket(rate, capacity)
    assert bucket.try_acquire(5)


def test_a_time_out_that_is_too_short_takes_nothing_and_does_not_wait(clock):
    bucket = bucket_of(clock, 1, 5)
    assert bucket.acquire(5)
    assert not bucket.acquire(3, timeout=2.9)
    assert not bucket.acquire(1, timeout=0)
    assert clock.slept == []
    assert bucket.acquire(3, timeout=3.1)
    assert clock.now == pytest.approx(3)


def watched_bucket(clock, rate, capacity):
    """A bucket whose waiters look again and again at a clock that others move"""
    return TokenBucket(rate, capacity, clock=clock, sleep=lambda seconds: time.sleep(0.001))


def test_who_tries_does_not_overtake_who_waits(clock):
    bucket = watched_bucket(clock, 1, 5)
    assert bucket.acquire(5)
    with in_another_thread(bucket.acquire, 5) as results:
        assert until(lambda: bucket._tokens == -5)  # taken, and waited for
        clock.now = 3
        assert not bucket.try_acquire(1)
        clock.now = 5
    assert results == [True]


def test_who_waits_is_served_in_order_of_arrival(clock):
    bucket, order = watched_bucket(clock, 1, 20), []
    assert bucket.acquire(20)

    def work(n):
        bucket.acquire(n)
        order.append(n)

    threads = []
    for n, waited_for in ((20, 20), (1, 21), (10, 31)):
        threads.append(threading.Thread(target=work, args=(n,), daemon=True))
        threads[-1].start()
        assert until(lambda waited_for=waited_for: bucket._tokens == -waited_for)
    clock.now = 19  # enough for the others
    time.sleep(0.05)
    assert order == []
    for moment, served in ((20, [20]), (21, [20, 1]), (31, [20, 1, 10])):
        clock.now = moment
        assert until(lambda served=served: order == served)
    for thread in threads:
        thread.join(HANG)


def test_a_wait_that_is_interrupted_leaves_the_queue():
    def interrupted(seconds):
        raise KeyboardInterrupt

    clock = Clock()
    bucket = TokenBucket(1, 1, clock=clock, sleep=interrupted)
    assert bucket.acquire()
    with pytest.raises(KeyboardInterrupt):
        bucket.acquire()
    clock.now = 1
    assert bucket.try_acquire()


# Limiter


def test_never_more_than_the_limit_hold_a_slot_and_none_is_lost():
    limiter = Limiter(4, max_queue=1000, queue_timeout=0.01)
    lock, holding, most, ended = threading.Lock(), [0], [0], Counter()

    def leave():
        raise StreamCancelled

    def work(seed):
        choose = random.Random(seed)
        for _ in range(34):
            going = choose.random() < 0.1
            try:
                slot = limiter._acquire(choose.randrange(3), choose.randrange(5), check=leave if going else bool)
            except QueueTimeoutError:
                with lock:
                    ended["timed out"] += 1
                continue
            except StreamCancelled:
                continue
            with lock:
                holding[0] += 1
                most[0] = max(most[0], holding[0])
            if choose.random() < 0.2:
                time.sleep(0.001)
            with lock:
                holding[0] -= 1
            how = choose.choice(["with", "error", "twice", "collected"])
            if how == "with":
                with slot:
                    pass
            elif how == "error":
                with pytest.raises(ZeroDivisionError), slot:
                    raise ZeroDivisionError
            elif how == "twice":
                slot.release()
                slot.release()
            del slot

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(300)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert most[0] <= 4
    stats = limiter.stats()
    assert stats.active == stats.queued == 0
    assert stats.timed_out == ended["timed out"]
    assert min(stats.served, stats.timed_out, stats.cancelled) > 50
    assert stats.served + stats.timed_out + stats.rejected + stats.cancelled == 300 * 34
    assert [limiter.acquire() for _ in range(4)]


def queued(limiter, jobs, slot):
    """The order in which these (name, priority) get a slot, when the one held is given back"""
    order, threads = [], []

    def work(name, priority):
        with limiter.acquire(priority):
            order.append(name)

    for name, priority in jobs:
        thread = threading.Thread(target=work, args=(name, priority))
        thread.start()
        threads.append(thread)
        assert until(lambda: limiter.stats().queued == len(threads))
    slot.release()
    for thread in threads:
        thread.join(HANG)
    return order


def test_the_highest_priority_goes_first_and_equals_in_order_of_arrival():
    limiter = Limiter(1)
    jobs = [("a", 0), ("b", 5), ("c", 0), ("d", 5), ("e", -1), ("f", 9)]
    assert queued(limiter, jobs, limiter.acquire()) == ["f", "b", "d", "a", "c", "e"]


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(clock):
    limiter = Limiter(1, max_queue=0, clock=clock, sleep=clock.sleep)
    with limiter.acquire():
        clock.now += 3
    with limiter.acquire():
        error = pytest.raises(QueueFullError, limiter.acquire)
    assert clock.slept == []
    assert error.value.code == "QUEUE_FULL"
    assert error.value.retry_after == 3
    assert limiter.stats() == (0, 0, 2, 1, 0, 0, None)


def test_a_waiter_that_timed_out_waits_no_more_and_takes_no_turn(clock):
    limiter = Limiter(1, queue_timeout=5, clock=clock, sleep=clock.sleep)
    with limiter.acquire():
        error = pytest.raises(QueueTimeoutError, limiter.acquire)
        assert error.value.code == "QUEUE_TIMEOUT"
        assert limiter.stats() == (1, 0, 0, 0, 1, 0, None)
    limiter.acquire()
    assert clock.slept == [5]


def test_a_waiter_times_out_by_the_real_clock_too():
    limiter = Limiter(1, queue_timeout=0.05)
    with limiter.acquire(), pytest.raises(QueueTimeoutError):
        limiter.acquire()


def test_a_slot_that_came_too_late_is_given_back():
    limiter = Limiter(1)

    def check():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        limiter._acquire(0, None, check=check)
    assert limiter.stats() == (0, 0, 1, 0, 0, 0, None)


def test_a_caller_that_gives_up_as_a_slot_comes_free_takes_none():
    slots = []
    limiter = Limiter(1, sleep=lambda seconds: slots.pop().release())
    slots.append(limiter.acquire())

    def check():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        limiter._acquire(0, None, check=check)
    assert limiter.stats() == (0, 0, 1, 0, 0, 1, None)
    with limiter.acquire():
        assert limiter.stats().active == 1


def test_a_bound_limiter_may_be_asked_for_slots_itself(clock):
    limiter = Limiter(2, clock=clock, queue_timeout=None)
    bound = limiter.bind(3, "ann")
    with bound.acquire(), bound.acquire(user="bob"):
        assert (limiter.stats("ann").active, limiter.stats("bob").active) == (1, 1)
        bound.apply_headers({"Retry-After": "50"}, 429)
    limiter._sleep = clock.sleep
    limiter.acquire()
    assert clock.now == 50


def calls_made(function):
    """How many functions are called meanwhile, by this thread and by those that it starts"""
    calls = []

    def note(frame, event, argument):
        if event.endswith("call"):
            calls.append(event)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return len(calls)


def wait_for_a_slot(seconds):
    limiter = Limiter(1, queue_timeout=seconds)
    with limiter.acquire():
        threads = [
            threading.Thread(target=lambda: pytest.raises(QueueTimeoutError, limiter.acquire, on_position=bool))
            for _ in range(5)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def wait_for_the_rate(seconds):
    limiter = Limiter(5, rate=1, period=seconds)
    limiter.acquire()
    limiter.acquire()


@pytest.mark.parametrize("wait", [wait_for_a_slot, wait_for_the_rate])
def test_a_long_wait_takes_no_more_of_the_processor_than_a_short_one(wait):
    assert calls_made(lambda: wait(0.5)) < 3 * calls_made(lambda: wait(0.02))


def test_a_user_who_can_be_none_is_refused_at_once():
    limiter = Limiter(1)
    with pytest.raises(TypeError, match="unhashable"):
        limiter.acquire(user=["ann"])
    assert limiter.stats() == (0, 0, 0, 0, 0, 0, None)


def test_a_newcomer_does_not_overtake_the_queue():
    limiter = Limiter(1)
    slot = limiter.acquire()
    order = []

    def work():
        with limiter.acquire():
            order.append("first")

    thread = threading.Thread(target=work)
    thread.start()
    assert until(lambda: limiter.stats().queued)
    slot.release()
    with limiter.acquire():
        order.append("newcomer")
    thread.join(HANG)
    assert order == ["first", "newcomer"]


def test_no_more_than_the_rate_begin_in_any_period():
    clock = Clock()
    limiter = Limiter(100, rate=5, period=60, queue_timeout=None, clock=clock, sleep=clock.sleep)
    starts = []
    choose = random.Random(1)
    for _ in range(500):
        earliest = max(clock.now, starts[-5] + 60) if len(starts) >= 5 else clock.now
        limiter.acquire().release()
        assert clock.now >= earliest
        assert clock.now == pytest.approx(earliest, abs=1e-4)
        starts.append(clock.now)
        clock.now += choose.choice([0, 0, 1, 20, 61])


def test_the_rate_is_waited_for_as_a_slot_is(clock):
    limiter = Limiter(10, rate=1, period=20, clock=clock, sleep=clock.sleep)
    for _ in range(3):
        limiter.acquire().release()
    assert clock.now == pytest.approx(40, abs=1e-3)
    limiter = Limiter(10, rate=1, period=60, queue_timeout=5, clock=clock, sleep=clock.sleep)
    limiter.acquire()
    error = pytest.raises(QueueTimeoutError, limiter.acquire).value
    assert error.retry_after == pytest.approx(55)


def test_a_user_has_no_more_than_his_share_and_others_go_before_him():
    limiter = Limiter(3, max_per_user=1)
    ann = limiter.acquire(user="ann")
    got = []
    thread = threading.Thread(target=lambda: got.append(limiter.acquire(9, "ann")))
    thread.start()
    assert until(lambda: limiter.stats().queued)
    assert limiter.stats("ann") == (1, 1, 0, 0, 0, 0, 1)
    bob, nobody = limiter.acquire(user="bob"), limiter.acquire()
    assert not got
    assert limiter.stats().active == 3
    bob.release()
    nobody.release()
    assert not got
    ann.release()
    thread.join(HANG)
    assert len(got) == 1
    assert limiter.stats("bob")[:2] == (0, 0)


def test_a_waiter_is_told_its_place():
    limiter = Limiter(1)
    slot, places = limiter.acquire(), []
    turns = threading.Semaphore(0)

    def work(number):
        with limiter.acquire(on_position=lambda place: places.append((number, place))):
            turns.acquire(timeout=HANG)

    threads = []
    for number in range(3):
        threads.append(threading.Thread(target=work, args=(number,)))
        threads[-1].start()
        assert until(lambda: len(places) == len(threads))
    slot.release()
    for place in (2, 1, 0):
        assert until(lambda place=place: not place or (2, place) in places)
        turns.release()
    for thread in threads:
        thread.join(HANG)
    assert places[:3] == [(0, 1), (1, 2), (2, 3)]
    assert [place for number, place in places if number == 2] == [3, 2, 1]


def test_who_is_slow_to_hear_its_place_keeps_no_slot_from_those_behind():
    limiter, told, served = Limiter(2, queue_timeout=None), threading.Event(), []
    slots = [limiter.acquire(), limiter.acquire()]
    hearing, heard = threading.Event(), threading.Event()

    def slow(place):
        hearing.set()
        heard.wait(HANG)

    def work(name, on_position=None):
        with limiter.acquire(on_position=on_position):
            served.append(name)
            told.wait(HANG)

    threads = [threading.Thread(target=work, args=("slow", slow))]
    threads += [threading.Thread(target=work, args=(name,)) for name in ("second", "third")]
    for thread in threads:
        thread.start()
        assert until(lambda: limiter.stats().queued == len([each for each in threads if each.ident]))
    assert hearing.wait(HANG)
    for slot in slots:
        slot.release()
    assert until(lambda: len(served) == 2)
    assert sorted(served) == ["second", "third"]
    heard.set()
    told.set()
    for thread in threads:
        thread.join(HANG)
    assert sorted(served) == ["second", "slow", "third"]


def test_who_is_slow_to_hear_its_place_does_not_stop_the_rate():
    limiter, heard = Limiter(9, rate=1, period=0.5, queue_timeout=None), threading.Event()
    limiter.acquire()
    slow = {"on_position": lambda place: place == 1 and heard.wait(HANG)}
    waiting = [{}, slow, {}]  # the second is told of its first place while the third waits
    threads = [threading.Thread(target=limiter.acquire, kwargs=options) for options in waiting]
    for number, thread in enumerate(threads, 1):
        thread.start()
        assert until(lambda number=number: limiter.stats().queued == number)
    assert until(lambda: limiter.stats().queued == 1)
    assert threads[1].is_alive()
    heard.set()
    for thread in threads:
        thread.join(HANG)
    assert limiter.stats().queued == 0


@pytest.mark.parametrize("moment", range(1, 8))
def test_a_bell_may_be_rung_at_any_moment_of_a_wait_by_the_thread_that_waits(moment):
    bell, calls = sheepsse._Bell(), []

    def ring(frame, event, argument):
        calls.append(event)
        if len(calls) == moment:
            sys.setprofile(None)
            bell.ring()

    sys.setprofile(ring)
    try:
        bell.wait(0.01)
    finally:
        sys.setprofile(None)
    bell.ring()
    bell.ring()
    bell.wait()
    bell.ring()
    bell.wait(1e30)
    bell.ring()
    bell.silence()
    bell.wait(0)
    bell.wait(-1)


def test_a_ring_that_comes_as_the_wait_for_a_slot_fails_ends_no_later_wait(clock):
    limiter, bell = Limiter(1, queue_timeout=5, clock=clock), sheepsse._Bell()
    limiter._sleep = lambda seconds: (clock.sleep(seconds), bell.ring())
    with limiter.acquire(), pytest.raises(QueueTimeoutError):
        limiter._acquire(0, None, bell=bell)
    assert not bell._lock.acquire(blocking=False)


def test_a_slot_given_back_in_the_midst_of_a_collection_does_no_harm(monkeypatch):
    limiter = Limiter(2)
    kept = limiter.acquire()
    plain = Limiter._next

    def next_one(self):  # with the lock held
        nonlocal kept
        kept = None
        gc.collect()
        return plain(self)

    monkeypatch.setattr(Limiter, "_next", next_one)
    with limiter.acquire():
        assert limiter.stats()[:3] == (1, 0, 1)
    assert limiter.stats()[:3] == (0, 0, 2)


@pytest.mark.parametrize(
    ("headers", "status", "delay"),
    [
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s"}, 200, 360),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "120ms"}, 200, 0.12),
        ({"x-ratelimit-remaining-tokens": "7", "x-ratelimit-reset-tokens": "120s"}, 200, 0),
        ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "2.5"}, 200, 2.5),
        ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "in an hour"}, 200, 3600),
        (
            {"anthropic-ratelimit-tokens-remaining": "0", "anthropic-ratelimit-tokens-reset": "2999-01-01T00:00:00Z"},
            200,
            100_000,
        ),
        ({"anthropic-ratelimit-tokens-remaining": "0", "anthropic-ratelimit-tokens-reset": "soon"}, 200, 0),
        ({"anthropic-ratelimit-requests-remaining": "0"}, 200, 0),
        ({"Retry-After": "7"}, 429, 7),
        ({"Retry-After": "7"}, 200, 0),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1s", "Retry-After": "7"}, 503, 7),
    ],
)
def test_what_an_answer_says_of_limits_holds_all_back(clock, headers, status, delay):
    limiter = Limiter(clock=clock, sleep=clock.sleep, queue_timeout=None)
    in_an_hour = str(int((time.time() + 3600) * 1000))
    headers = {name: in_an_hour if value == "in an hour" else value for name, value in headers.items()}
    limiter.apply_headers(headers, status, longest=100_000)
    limiter.acquire()
    assert clock.now == pytest.approx(min(delay, 100_000), rel=0.02)


@pytest.mark.parametrize(("options", "delay"), [({}, 120), ({"longest": 30}, 30)])
def test_no_answer_holds_a_limiter_longer_than_it_may(clock, options, delay):
    limiter = Limiter(clock=clock, sleep=clock.sleep, queue_timeout=None)
    limiter.apply_headers({"Retry-After": "9999999"}, 429, **options)
    limiter.acquire()
    assert clock.now == delay


def test_an_answer_holds_back_requests_to_its_own_provider_alone(clock):
    limiter = Limiter(2, clock=clock, sleep=clock.sleep, queue_timeout=None)
    limiter.apply_headers({"Retry-After": "50"}, 429, origin="a.example")
    limiter._acquire(0, None, origin="b.example").release()
    assert clock.now == 0
    limiter._acquire(0, None, origin="a.example").release()
    assert clock.now == 50


@pytest.mark.parametrize(
    "options",
    [{"max_concurrent": 0}, {"max_queue": -1}, {"period": 0}, {"rate": 0}, {"max_per_user": 0}],
)
def test_limits_that_nothing_could_pass_are_refused(options):
    with pytest.raises(ValueError, match="Limiter"):
        Limiter(**options)


# Limiter and streams


def test_a_stream_holds_its_slot_until_it_is_at_its_end(server):
    limiter = Limiter(1, max_queue=0)
    with asking(server, limiter=limiter) as client:
        stream = client.stream("Good day?")
        assert limiter.stats().active == 0
        next(stream)
        assert limiter.stats().active == 1
        with pytest.raises(QueueFullError):
            list(client.stream("Good day?"))
        assert "".join(stream)
        assert limiter.stats().active == 0
    assert len(server.requests) == 1


ENDS = {
    "an error": (error_answer(500), lambda stream: read(stream)),
    "a loss": (Answer(cut_after=2), lambda stream: read(stream)),
    "close": (Answer(), lambda stream: (next(stream), stream.close())),
    "cancel": (Answer(), lambda stream: (next(stream), stream.cancel(), read(stream))),
    "collection": (Answer(), lambda stream: next(stream)),
    "the callers error": (Answer(), lambda stream: pytest.raises(ZeroDivisionError, divide, stream)),
}


def divide(stream):
    with stream:
        for _ in stream:
            1 / 0  # noqa: B018


@pytest.mark.parametrize("how", ENDS)
def test_a_slot_is_given_back_however_a_stream_ends(server, how):
    limiter = Limiter(1, max_queue=0)
    answer, end = ENDS[how]
    with asking(server, limiter=limiter) as client:
        for _ in range(3):
            server.answer(answer)
            stream = client.stream("Good day?", resume="never")
            end(stream)
            del stream
            gc.collect()
            assert limiter.stats().active == 0
    assert limiter.stats().served == 3


def test_a_stream_waits_for_its_slot_and_a_deadline_holds_there(server):
    limiter = Limiter(1)
    with asking(server, limiter=limiter) as client, limiter.acquire():
        pieces, error = read(client.stream("Good day?", deadline=0.1))
    assert (pieces, type(error)) == ([], sheepsse.StreamTimeout)
    assert server.requests == []
    assert limiter.stats()[:2] == (0, 0)


def test_a_wait_between_two_tries_is_not_cut_short_by_the_wait_for_a_slot(server):
    limiter, waiting = Limiter(1), threading.Event()
    server.answer(error_answer(500))
    slot = limiter.acquire()
    retry = sheepsse.Retry(1, base_delay=FOREVER, max_delay=FOREVER, jitter=False, on_retry=lambda *_: waiting.set())
    with asking(server, limiter=limiter, retry=retry) as client:
        stream = client.stream("Good day?")
        with in_another_thread(read, stream) as results:
            assert until(lambda: limiter.stats().queued)
            slot.release()
            assert waiting.wait(HANG)
            time.sleep(0.2)  # a wait that was cut short would be over by now, and the next request sent
            assert len(server.requests) == 1
            stream.cancel()
    (_, error), *_ = results
    assert type(error) is StreamCancelled


def test_cancel_ends_the_wait_for_a_slot_that_nobody_gives_back(server):
    limiter = Limiter(1, queue_timeout=None)
    with asking(server, limiter=limiter, **PATIENT) as client, limiter.acquire():
        stream = client.stream("Good day?")
        with in_another_thread(lambda: (until(lambda: limiter.stats().queued), stream.cancel())):
            _, error = read(stream)
    assert type(error) is StreamCancelled
    assert limiter.stats() == (0, 0, 1, 0, 0, 1, None)


def test_a_call_may_have_a_limiter_priority_and_user_of_its_own(server):
    limiter = Limiter(1, max_per_user=1)
    with asking(server) as client:
        stream = client.stream("Good day?", limiter=limiter.bind(3, "ann"))
        next(stream)
        assert limiter.stats("ann").active == 1
        assert limiter.bind(user="ann").stats().active == 1
        list(stream)


def test_a_stream_that_waits_tells_its_place_to_whom_its_limiter_was_bound(server):
    limiter = Limiter(max_concurrent=1)
    places = []
    with asking(server) as client:
        slot = limiter.acquire()
        stream = client.stream("Good day?", limiter=limiter.bind(on_position=places.append))
        with in_another_thread(lambda: (until(lambda: places), slot.release())):
            assert "".join(stream) == TEXT
    assert places == [1]
    with limiter.bind(user="ann", on_position=places.append).acquire():
        assert places == [1]  # nobody waited


def test_anything_with_an_acquire_may_be_the_limiter(server):
    held = []

    class Own:
        def acquire(self):
            held.append("acquired")
            return self

        def __enter__(self):
            held.append("entered")

        def __exit__(self, *error):
            held.append("left")

    with asking(server, limiter=Own()) as client:
        assert "".join(client.stream("Good day?")) == TEXT
    assert held == ["acquired", "entered", "left"]


def test_all_is_released_where_a_slot_of_the_callers_own_cannot_be(server, tmp_path):
    class Own:
        def acquire(self):
            return self

        def __enter__(self):
            pass

        def __exit__(self, *error):
            raise ZeroDivisionError

    breaker = CircuitBreaker(1)
    server.default = Answer(stall_after=4)
    with asking(server, limiter=Own(), breaker=breaker) as client:
        stream = client.stream("Good day?", checkpoint=tmp_path)
        next(stream)
        with pytest.raises(ZeroDivisionError):
            stream.close()
        assert server.wait_closed(HANG)
        server.default = Answer()
        with pytest.raises(ZeroDivisionError):  # its checkpoint is in use no more
            "".join(client.stream("Good day?", checkpoint=tmp_path))
    assert breaker.state == "closed"
    assert sheepsse.Checkpoints(tmp_path).load(next(iter(sheepsse.Checkpoints(tmp_path)))).text == TEXT


def test_what_the_provider_says_of_its_limits_slows_the_next_stream_down(server, clock):
    limits = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "300ms"}
    server.answer(Answer(headers=limits), Answer())
    with asking(server, limiter=Limiter(clock=clock, sleep=clock.sleep)) as client:
        for _ in range(2):
            list(client.stream("Good day?"))
    assert clock.now == pytest.approx(0.3, abs=1e-3)


def test_an_answer_from_a_file_needs_no_slot(server, tmp_path):
    limiter = Limiter(1, max_queue=0)
    with asking(server, limiter=limiter) as client:
        list(client.stream("Good day?", checkpoint=tmp_path))
        with limiter.acquire():
            assert "".join(client.stream("Good day?", checkpoint=tmp_path)) == TEXT


# CircuitBreaker


def fail(breaker, times=1, error=sheepsse.ServerError):
    for _ in range(times):
        with pytest.raises(error), breaker.enter():
            raise error


def test_a_breaker_opens_after_the_threshold_and_says_until_when(clock):
    breaker = CircuitBreaker(3, 60, clock=clock)
    fail(breaker, 2)
    assert breaker.state == "closed"
    fail(breaker)
    assert breaker.state == "open"
    clock.now = 20
    error = pytest.raises(CircuitOpenError, breaker.enter).value
    assert (error.code, error.retry_after) == ("CIRCUIT_OPEN", 40)


def test_a_success_starts_the_count_again(clock):
    breaker = CircuitBreaker(2, clock=clock)
    for _ in range(5):
        fail(breaker)
        with breaker.enter():
            pass
    assert breaker.state == "closed"


@pytest.mark.parametrize("error", [sheepsse.InvalidRequestError, StreamCancelled, KeyError, sheepsse.RateLimitError])
def test_errors_of_the_callers_own_do_not_count(clock, error):
    breaker = CircuitBreaker(1, 60, clock=clock)
    fail(breaker, 3, error)
    assert breaker.state == "closed"
    fail(breaker)
    clock.now = 60
    fail(breaker, 3, error)  # nor do they close it
    assert breaker.state == "half-open"


@pytest.mark.parametrize("error", [requests.ConnectionError, requests.Timeout, sheepsse.StreamInterrupted])
def test_what_says_that_a_provider_is_down_counts(error):
    breaker = CircuitBreaker(1)
    fail(breaker, 1, error)
    assert breaker.state == "open"


def test_half_open_it_lets_exactly_one_through_of_many_threads(clock):
    breaker = CircuitBreaker(1, 60, clock=clock)
    fail(breaker)
    clock.now = 60
    passed, ready, refused = [], threading.Barrier(50), []

    def work():
        ready.wait()
        try:
            passed.append(breaker.enter())
        except CircuitOpenError as error:
            refused.append(error)

    threads = [threading.Thread(target=work) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(passed), len(refused), breaker.state) == (1, 49, "half-open")
    passed.pop().end(True)
    assert breaker.state == "closed"


def test_a_trial_that_fails_opens_it_again(clock):
    breaker = CircuitBreaker(3, 60, clock=clock)
    fail(breaker, 3)
    clock.now = 60
    fail(breaker)
    assert breaker.state == "open"
    clock.now = 119
    pytest.raises(CircuitOpenError, breaker.enter)


def test_a_trial_that_is_collected_makes_room_for_another(clock):
    breaker = CircuitBreaker(1, 60, clock=clock)
    fail(breaker)
    clock.now = 60
    trial = breaker.enter()
    pytest.raises(CircuitOpenError, breaker.enter)
    del trial
    gc.collect()
    assert breaker.enter()


def test_who_began_before_it_opened_says_nothing_about_what_is_now(clock):
    breaker = CircuitBreaker(1, 60, clock=clock)
    old = [breaker.enter() for _ in range(3)]
    fail(breaker)
    old[0].end(True)
    old[1].end(False)
    assert breaker.state == "open"
    clock.now = 60
    trial = breaker.enter()
    old[2].end(True)
    assert breaker.state == "half-open"
    trial.end(True)
    assert breaker.state == "closed"


def test_a_breaker_that_nothing_could_open_is_refused():
    for options in ({"failure_threshold": 0}, {"recovery_timeout": -1}):
        with pytest.raises(ValueError, match="CircuitBreaker"):
            CircuitBreaker(**options)


# CircuitBreaker and streams


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        (error_answer(500), "open"),
        (Answer(cut_after=3), "open"),
        (Answer(drop=True), "open"),
        (Answer(delay=FOREVER), "open"),
        (error_answer(400), "closed"),
        (error_answer(429), "closed"),
        (Answer(), "closed"),
    ],
    ids=["500", "loss", "drop", "time-out", "400", "429", "whole"],
)
def test_a_stream_counts_once_and_by_how_it_ended(server, answer, state):
    breaker = CircuitBreaker(2)
    server.default = answer
    retry, timeout = sheepsse.Retry(1, base_delay=0, rate_limit_delay=0), 0.1 if answer.delay else HANG
    with asking(server, breaker=breaker, retry=retry, timeout=(HANG, timeout)) as client:
        read(client.stream("Good day?", resume="never"))
        assert breaker.state == "closed"
        read(client.stream("Good day?", resume="never"))
    assert breaker.state == state


def test_what_no_provider_was_asked_for_counts_for_nothing(server, clock):
    breaker = CircuitBreaker(1)
    with asking(server, breaker=breaker) as client:
        server.answer(Answer(cut_after=3))
        _, error = read(client.stream("Good day?", resume="never", breaker=CircuitBreaker(9)))
        read(client.stream("Good day?", resume="never", resume_from=error))
        assert breaker.state == "closed"
        stream = client.stream("Good day?", deadline=5)
        next(stream)
        clock.now += 5
        assert type(read(stream)[1]) is sheepsse.StreamTimeout
        assert breaker.state == "closed"
    assert len(server.requests) == 2


def test_a_cancelled_or_closed_stream_counts_for_nothing(server):
    breaker = CircuitBreaker(1)
    with asking(server, breaker=breaker) as client:
        stream = client.stream("Good day?")
        next(stream)
        stream.close()
        stream = client.stream("Good day?")
        next(stream)
        stream.cancel()
        read(stream)
    assert breaker.state == "closed"


def test_an_open_breaker_sends_nothing_and_takes_no_slot(server):
    breaker, limiter = CircuitBreaker(1), Limiter(1, queue_timeout=None)
    server.answer(error_answer(500))
    with asking(server, breaker=breaker, limiter=limiter) as client:
        read(client.stream("Good day?"))
        with limiter.acquire():
            _, error = read(client.stream("Good day?"))
    assert type(error) is CircuitOpenError
    assert len(server.requests) == 1


# Failover


@pytest.fixture
def other():
    with local_provider.LocalProvider() as provider:
        provider.default = Answer(text="The other says so.")
        yield provider


@pytest.fixture
def two(server, other):
    with asking(server, model="first") as one, asking(other, model="second") as another:
        yield [one, another]


DOWN = {
    "a 500": error_answer(500),
    "no connection": Answer(drop=True),
    "a rate limit": error_answer(429),
    "a quota": error_answer(402),
    "a stream that ends before a word": Answer(cut_after=1),
    "an error in the stream": Answer(body=b'data: {"error":{"message":"overloaded","type":"server_error"}}\n\n'),
}


@pytest.mark.parametrize("how", DOWN)
def test_the_next_client_is_asked_where_one_is_down(server, other, two, how):
    server.default = DOWN[how]
    stream = sheepsse.stream("Good day?", client=two, resume="never")
    assert "".join(stream) == stream.text == "The other says so."
    assert (stream.stats.attempts, stream.model) == (2, "second")
    assert [len(server.requests), len(other.requests)] == [1, 1]
    assert other.requests[0].json["model"] == "second"


def test_complete_asks_the_next_client_too(server, two):
    server.default = error_answer(503)
    assert sheepsse.complete("Good day?", client=two).text == "The other says so."


@pytest.mark.parametrize("status", [400, 401, 404])
def test_the_callers_own_errors_are_not_taken_elsewhere(server, other, two, status):
    server.default = error_answer(status)
    pieces, error = read(sheepsse.stream("Good day?", client=two))
    assert (pieces, error.status) == ([], status)
    assert other.requests == []


def test_once_a_word_is_given_nobody_else_is_asked(server, other, two):
    server.default = Answer(cut_after=3)
    pieces, error = read(sheepsse.stream("Good day?", client=two))
    assert pieces
    assert type(error) is sheepsse.StreamInterrupted
    assert other.requests == []


def test_the_next_client_is_asked_inside_with_too(server, two):
    server.default = error_answer(503)
    with sheepsse.stream("Good day?", client=two) as stream:
        assert "".join(stream) == "The other says so."


def test_one_limiter_for_several_clients_gives_one_slot_for_one_stream(server, other, clock):
    server.default = error_answer(429, headers={"Retry-After": "30"})
    limiter = Limiter(1, queue_timeout=5, clock=clock, sleep=clock.sleep)
    with asking(server, limiter=limiter) as one, asking(other, limiter=limiter) as another:
        text = "".join(sheepsse.stream("Good day?", client=[one, another]))
        assert (text, clock.slept) == ("The other says so.", [])
        assert limiter.stats()[:4] == (0, 0, 1, 0)
        with pytest.raises(QueueTimeoutError):
            list(sheepsse.stream("Good day?", client=[one, another]))
        assert clock.now == 5
    assert limiter.stats().timed_out == 1
    assert len(other.requests) == 1


def test_a_queue_that_is_full_is_gone_round_by_another_limiter(server, other):
    full = Limiter(1, max_queue=0)
    with asking(server, limiter=full) as one, asking(other, limiter=Limiter(1)) as another, full.acquire():
        assert "".join(sheepsse.stream("Good day?", client=[one, another])) == "The other says so."
    assert server.requests == []


def test_an_answer_that_is_kept_is_not_asked_for_again_whoever_gave_it(server, other, two, tmp_path):
    server.answer(error_answer(503))
    for _ in range(2):
        text = "".join(sheepsse.stream("Good day?", client=two, checkpoint=tmp_path))
        assert text == "The other says so."
    assert (len(server.requests), len(other.requests)) == (1, 1)


def test_what_was_saved_and_not_given_is_no_reason_to_ask_nobody_else(server, other, two, tmp_path):
    server.answer(Answer(cut_after=3))
    read(sheepsse.stream("Good day?", client=two, checkpoint=tmp_path, resume="never"))
    server.default = error_answer(503)
    text = "".join(sheepsse.stream("Good day?", client=two, checkpoint=tmp_path, resume="never"))
    assert text == "The other says so."


def test_a_checkpoint_in_use_is_no_reason_to_ask_another_client(server, other, two, tmp_path):
    with sheepsse.stream("Good day?", client=two, checkpoint=tmp_path) as first:
        next(first)
        pieces, error = read(sheepsse.stream("Good day?", client=two, checkpoint=tmp_path))
    assert (pieces, type(error), error.retryable) == ([], sheepsse.CheckpointError, True)
    assert (len(server.requests), other.requests) == (1, [])


def test_a_cancel_between_two_clients_is_not_lost(server, two, monkeypatch):
    server.default = error_answer(503)
    stream = sheepsse.stream("Good day?", client=two)
    plain = sheepsse.Stream._use

    def use(self, *begun):
        plain(self, *begun)
        stream.cancel()

    monkeypatch.setattr(sheepsse.Stream, "_use", use)
    pieces, error = read(stream)
    assert (pieces, type(error)) == ([], StreamCancelled)


def test_the_last_error_is_raised_where_all_are_down(server, other, two):
    server.default, other.default = error_answer(500), error_answer(503)
    pieces, error = read(sheepsse.stream("Good day?", client=two))
    assert (pieces, error.status) == ([], 503)


def test_cancel_reaches_the_one_that_is_asked_now(server, other):
    server.default, other.default = error_answer(500), Answer(stall_after=2)
    with asking(server, **PATIENT) as one, asking(other, **PATIENT) as another:
        stream = sheepsse.stream("Good day?", client=[one, another])
        with in_another_thread(lambda: (until(lambda: stream.text), stream.cancel())):
            _, error = read(stream)
    assert type(error) is StreamCancelled


def test_a_dead_client_is_asked_a_bounded_number_of_times(server, other):
    server.default = error_answer(500)
    breaker = CircuitBreaker(5, recovery_timeout=60)
    with asking(server, breaker=breaker) as dead, asking(other) as living:
        lock, served, numbers = threading.Lock(), [], iter(range(200))

        def work():
            while True:
                with lock:
                    if next(numbers, None) is None:
                        return
                text = "".join(sheepsse.stream("Good day?", client=[dead, living]))
                with lock:
                    served.append(text)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG)
    assert served == ["The other says so."] * 200
    assert 5 <= len(server.requests) <= 5 + 8


def test_no_client_at_all_is_an_error():
    with pytest.raises(ValueError, match="one or more"):
        sheepsse.stream("Good day?", client=[])


# Fallback


NO_STREAM = {
    "a page": Answer(body=b"<html>Welcome</html>", content_type="text/html"),
    "nothing": Answer(cut_after=1),
}


@pytest.mark.parametrize("how", NO_STREAM)
def test_with_fallback_the_text_comes_in_one_piece_where_there_is_no_stream(server, client, how):
    server.answer(NO_STREAM[how])
    stream = client.stream("Good day?", fallback=True, resume="never")
    assert list(stream) == [TEXT]
    assert stream.completion.complete
    assert [request.json["stream"] for request in server.requests] == [True, False]


def test_with_fallback_a_refusal_to_stream_is_taken_for_that(server, client):
    refusal = b'{"error":{"message":"stream is not supported by this model"}}'
    server.answer(Answer(status=400, body=refusal, content_type="application/json"))
    assert list(client.stream("Good day?", fallback=True)) == [TEXT]


def test_with_fallback_errors_that_only_sound_like_streams_are_raised(server, client):
    for message in ("upstream rejected the prompt", "temperature is too high"):
        body = sheepsse._to_json({"error": {"message": message}}).encode()
        server.answer(Answer(status=400, body=body, content_type="application/json"))
        _, error = read(client.stream("Good day?", fallback=True))
        assert error.status == 400
    assert len(server.requests) == 2


def test_with_fallback_a_breaker_counts_the_two_as_one(server):
    breaker = CircuitBreaker(1)
    server.answer(Answer(cut_after=1))
    with asking(server, breaker=breaker) as client:
        assert list(client.stream("Good day?", fallback=True, resume="never")) == [TEXT]
        assert breaker.state == "closed"
        server.answer(Answer(cut_after=1), error_answer(500))
        read(client.stream("Good day?", fallback=True, resume="never"))
    assert breaker.state == "open"


def test_with_fallback_a_stream_is_a_stream(server, client):
    assert len(list(client.stream("Good day?", fallback=True))) > 1
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [401, 404, 402])
def test_with_fallback_errors_that_are_none_of_the_streams_are_raised(server, client, status):
    server.default = error_answer(status)
    pieces, error = read(client.stream("Good day?", fallback=True))
    assert (pieces, error.status) == ([], status)
    assert len(server.requests) == 1


def test_without_fallback_nothing_is_asked_again(server, client):
    server.answer(NO_STREAM["a page"])
    _, error = read(client.stream("Good day?"))
    assert type(error) is sheepsse.InvalidStreamError
    assert len(server.requests) == 1


def test_after_a_word_there_is_no_fallback(server, client):
    server.answer(Answer(cut_after=3))
    pieces, error = read(client.stream("Good day?", fallback=True, resume="never"))
    assert pieces
    assert type(error) is sheepsse.StreamInterrupted
    assert len(server.requests) == 1


def test_a_waiter_for_another_provider_takes_the_turn_of_one_that_is_held_back():
    limiter = sheepsse.Limiter(max_concurrent=5, rate=1, period=0.5, queue_timeout=None)
    bells, got, ended = {"a": sheepsse._Bell(), "b": sheepsse._Bell()}, threading.Event(), threading.Event()
    limiter.acquire()

    def check():
        if ended.is_set():
            raise sheepsse.StreamCancelled

    def wait_for(origin):
        try:
            limiter._acquire(0, None, bell=bells[origin], check=check, origin=origin)
            got.set()
        except sheepsse.StreamCancelled:
            pass

    threads = [threading.Thread(target=wait_for, args=(origin,), daemon=True) for origin in bells]
    for place, thread in enumerate(threads, 1):
        thread.start()
        until(lambda place=place: limiter.stats().queued == place)
    limiter.apply_headers({"Retry-After": "100"}, 429, origin="a")
    assert got.wait(HANG)
    ended.set()
    for origin, thread in zip(bells, threads):
        bells[origin].ring()
        thread.join(HANG)
        assert not thread.is_alive()


# The rate, and those who wait for it


def test_a_rate_makes_wait_two_periods_by_default_and_a_batch_without_limit():
    assert Limiter(rate=60, period=60).queue_timeout == 120
    assert Limiter(rate=60, period=1).queue_timeout == Limiter().queue_timeout == 30
    assert Limiter(rate=60, queue_timeout=None).queue_timeout is None
    with pytest.raises(TypeError, match="'auto'"):
        Limiter(queue_timeout="5")


def test_a_batch_over_the_rate_waits_and_fails_none(server):
    limiter = Limiter(4, rate=2, period=0.2)
    limiter.queue_timeout = 0.01  # as if the default were too short
    with asking(server, limiter=limiter) as client:
        results = list(sheepsse.batch(["Hi"] * 7, client=client, model="m", workers=4))
    assert [result.error for result in results] == [None] * 7
    limiter = Limiter(4, rate=1, period=60, queue_timeout=0.01)  # a number of the caller's own holds
    with asking(server, limiter=limiter) as client:
        results = list(sheepsse.batch(["Hi"] * 3, client=client, model="m", workers=4))
    assert sorted(type(result.error).__name__ for result in results) == ["NoneType", *["QueueTimeoutError"] * 2]


@pytest.mark.parametrize(
    ("rate", "burst", "begun"),
    [(4, 1, [0, 15, 30, 45, 60]), (4, 2, [0, 0, 30, 30, 60]), (4, None, [0, 0, 0, 0, 60]), (4, 9, [0, 0, 0, 0, 60])],
)
def test_a_burst_says_how_many_of_the_rate_may_begin_at_once(rate, burst, begun):
    clock = Clock()
    limiter = Limiter(100, rate=rate, period=60, burst=burst, clock=clock, sleep=clock.sleep)
    start = clock()
    moments = []
    for _ in range(5):
        limiter.acquire()
        moments.append(round(clock() - start))
    assert moments == begun


def test_the_error_of_a_long_wait_says_whether_it_was_the_rate_and_what_to_change():
    clock = Clock()
    limiter = Limiter(9, rate=1, period=60, queue_timeout=5, clock=clock, sleep=clock.sleep)
    held = [limiter.acquire()]
    with pytest.raises(sheepsse.QueueTimeoutError, match=r"the rate=1 in period=60 s lets no more begin: raise rate="):
        limiter.acquire()
    limiter = Limiter(1, queue_timeout=0.01)
    held.append(limiter.acquire())
    with pytest.raises(sheepsse.QueueTimeoutError, match="1 of max_concurrent=1 are active: raise max_concurrent="):
        limiter.acquire()
