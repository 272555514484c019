"""Section 6: usage turned into money"""

import json
import logging
import re
import sys
from decimal import Decimal

import pytest

import sheepsse
from conftest import asking, read
from local_provider import Answer
from sheepsse import Price, Usage, compare_costs, cost
from test_dialects import events_of, recorded_type

USAGE = Usage(input_tokens=1000, output_tokens=500, total_tokens=1500, cache_read_tokens=600, cache_write_tokens=100)


@pytest.mark.parametrize(
    ("price", "expected"),
    [
        (Price("3", "15"), "0.0105"),
        (Price("3", "15", "0.30"), "0.00888"),
        (Price("3", "15", "0.30", "3.75"), "0.008955"),
        (Price(3, 15, 0.3, 3.75), "0.008955"),
        (Price(Decimal("3"), Decimal("15"), Decimal("0.3"), Decimal("3.75")), "0.008955"),
        (Price("0", "0"), "0"),
        (Price("0.000001", "0.1234567890123"), "0.00006172939450615"),
    ],
)
def test_a_cost_is_exact_to_the_last_digit(price, expected):
    assert cost(USAGE, price) == Decimal(expected)


def test_reasoning_is_output_and_is_not_paid_twice():
    usage = Usage(input_tokens=10, output_tokens=1000, reasoning_tokens=900)
    assert cost(usage, Price("0", "10")) == Decimal("0.01")


#: the usage of each dialect on the wire, and what it costs at 3 and 15, 0.30 from the cache and 3.75 into it
WIRES = {
    "openai": (
        {
            "choices": [],
            "usage": {
                "prompt_tokens": 1000,
                "completion_tokens": 500,
                "prompt_tokens_details": {"cached_tokens": 600},
                "completion_tokens_details": {"reasoning_tokens": 300},
            },
        },
        (400, 600, 0, 500),
    ),
    "openai-responses": (
        {
            "type": "response.completed",
            "response": {
                "status": "completed",
                "output": [],
                "usage": {
                    "input_tokens": 1000,
                    "output_tokens": 500,
                    "input_tokens_details": {"cached_tokens": 600},
                    "output_tokens_details": {"reasoning_tokens": 300},
                },
            },
        },
        (400, 600, 0, 500),
    ),
    "anthropic": (
        {
            "type": "message_start",
            "message": {
                "usage": {
                    "input_tokens": 300,
                    "cache_read_input_tokens": 600,
                    "cache_creation_input_tokens": 100,
                    "output_tokens": 500,
                }
            },
        },
        (300, 600, 100, 500),
    ),
    "gemini": (
        {
            "candidates": [],
            "usageMetadata": {
                "promptTokenCount": 1000,
                "cachedContentTokenCount": 600,
                "candidatesTokenCount": 200,
                "thoughtsTokenCount": 300,
            },
        },
        (400, 600, 0, 500),
    ),
    "ollama": ({"done": True, "prompt_eval_count": 1000, "eval_count": 500}, (1000, 0, 0, 500)),
}


@pytest.mark.parametrize("dialect", sheepsse.DIALECTS)
def test_the_usage_of_every_dialect_costs_what_it_says(dialect):
    wire, (fresh, read_tokens, written, output) = WIRES[dialect]
    chunks = sheepsse.DIALECTS[dialect]().chunks(sheepsse.ServerSentEvent(data=json.dumps(wire)))
    usage = [chunk.usage for chunk in chunks if chunk.usage is not None][-1]
    expected = fresh * Decimal("3") + read_tokens * Decimal("0.30") + written * Decimal("3.75") + output * Decimal("15")
    assert cost(usage, Price("3", "15", "0.30", "3.75")) == expected / 1_000_000


def test_what_the_provider_charged_counts_over_every_price():
    assert cost(USAGE._replace(cost=Decimal("0.0042")), Price("3", "15")) == Decimal("0.0042")
    assert cost(USAGE._replace(cost=Decimal(0)), Price("3", "15")) == 0


@pytest.mark.parametrize(
    ("model", "provider"),
    [
        (None, None),
        ("gpt-4o", None),
        ("gpt-4o", "holysheep"),
        ("gpt-4o", "ollama"),
        ("no-such-model-1b", "openai"),
        (None, "openai"),
    ],
)
def test_an_unknown_price_is_none_and_the_log_says_so(caplog, model, provider):
    with caplog.at_level(logging.INFO, "sheepsse"):
        assert cost(USAGE, model=model, provider=provider) is None
    assert "no price is known" in caplog.text
    assert (model or "no model") in caplog.text


def test_an_estimate_has_no_cost():
    assert cost(USAGE._replace(source="estimate"), Price("3", "15")) is None
    assert cost(USAGE._replace(source="local"), Price("3", "15")) is not None


def test_no_usage_has_no_cost():
    assert cost(None, Price("3", "15")) is None


@pytest.mark.parametrize(
    ("model", "provider"),
    [
        ("gpt-4o", "openai"),
        ("deepseek-chat", "deepseek"),
        ("claude-sonnet-4-5", "anthropic"),
        ("gemini-2.5-flash", "gemini"),
    ],
)
def test_list_prices_are_those_of_genai_prices(model, provider):
    prices = pytest.importorskip("genai_prices", reason="needs genai-prices")
    vendor = {"gemini": "google"}.get(provider, provider)
    plain = Usage(input_tokens=1000, output_tokens=500, cache_read_tokens=600)
    counts = prices.Usage(input_tokens=1000, output_tokens=500, cache_read_tokens=600)
    expected = prices.calc_price(counts, model_ref=model, provider_id=vendor).total_price
    assert cost(plain, model=model, provider=provider) == expected > 0


def test_without_genai_prices_there_is_no_list_price(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "genai_prices", None)
    with caplog.at_level(logging.INFO, "sheepsse"):
        assert cost(USAGE, model="gpt-4o", provider="openai") is None
    assert "pip install 'sheepsse[prices]'" in caplog.text


def test_a_stream_costs_by_the_prices_of_its_client(server):
    with asking(server, model="mine", prices={"mine": Price("1", "2")}) as client:
        stream = client.stream("Good day?")
        assert stream.cost is None
        list(stream)
        usage = stream.usage
        assert stream.cost == cost(usage, Price("1", "2"))
        assert stream.cost == (usage.input_tokens + 2 * usage.output_tokens) * Decimal("0.000001") > 0
        other = client.stream("Good day?", prices={"mine": Price("10", "20")})
        list(other)
        assert other.cost == 10 * stream.cost
        assert "prices" not in json.dumps(server.requests[0].json)


def test_a_stream_costs_what_its_provider_says(server):
    usage = b'{"prompt_tokens":10,"completion_tokens":5,"total_tokens":15,"cost":0.00095}'
    choice = b'{"index":0,"delta":{"content":"Hi"},"finish_reason":"stop"}'
    server.answer(Answer(body=b'data: {"choices":[%b],"usage":%b}\n\ndata: [DONE]\n\n' % (choice, usage)))
    with asking(server, prices={"local-model": Price("1", "2")}) as client:
        stream = client.stream("Good day?")
        list(stream)
    assert stream.cost == Decimal("0.00095")


def test_every_recording_that_carries_a_cost_costs_that(recordings):
    folder, index = recordings
    found = 0
    for row in index:
        given = sheepsse.iter_chunks(events_of([(folder / row["file"]).read_bytes()], recorded_type(row)))
        usage = sheepsse.collect(read(given)[0]).usage
        if usage is not None and usage.cost is not None:
            found += 1
            wire = re.findall(rb'"cost":\s*([0-9.e-]+)', (folder / row["file"]).read_bytes())
            assert cost(usage, Price("1000", "1000")) == Decimal(wire[-1].decode())
    assert found


# The figures of a published example of a mix that forgot the output

PRICES = {
    "large": Price("8.00", "8.00"),
    "small": Price("0.42", "0.42"),
    "middle": Price("1.25", "5.00"),
    "good": Price("3.00", "15.00"),
}
MIXES = {"now": "large", "mixed": {"small": 0.6, "middle": 0.3, "good": 0.1}}


def test_a_mix_counts_its_output_too():
    now, mixed = compare_costs(10_000_000, 50_000_000, MIXES, PRICES)
    assert now.total == Decimal("480.00")
    assert mixed.total == Decimal("171.87")
    assert mixed.saving == Decimal("308.13")
    assert round(mixed.percent, 1) == Decimal("64.2")
    assert mixed.yearly_saving == Decimal("3697.56")
    assert sum(mixed.parts.values()) == mixed.total
    assert (now.saving, now.percent) == (0, 0)


def test_no_volume_saves_nothing_and_divides_by_nothing():
    _, mixed = compare_costs(0, 0, MIXES, PRICES)
    assert (mixed.total, mixed.saving, mixed.percent) == (0, 0, None)


def test_a_model_without_a_price_makes_its_mix_none():
    now, mixed = compare_costs(10, 10, MIXES, {"large": Price("8", "8"), "small": Price("1", "1")})
    assert now.total is not None
    assert (mixed.total, mixed.saving, mixed.percent, mixed.yearly_saving) == (None,) * 4
    assert mixed.parts["middle"] is None


@pytest.mark.parametrize("shares", [{"small": 0.5}, {"small": 60, "middle": 40}, {"small": 1.5, "middle": -0.5}, {}])
def test_shares_that_are_no_parts_of_one_are_an_error(shares):
    with pytest.raises(ValueError, match="parts of 1"):
        compare_costs(1, 1, {"mixed": shares}, PRICES)
