"""Section 6: tokens counted, and held against what the provider counted"""

import logging
import random
import sys
import types

import pytest

import sheepsse
from conftest import asking, read
from local_provider import TEXT, Answer
from sheepsse import MissingExtraError, TokenAlignment, TokenMismatchError, count_tokens
from test_dialects import events_of, recorded_type

SENTENCE = "Xin chào, tôi là trợ lý. Hello 世界 🌤️ def f(x): return x+1"


@pytest.fixture
def reference():
    return pytest.importorskip("bpe_openai", reason="needs bpe-openai")


@pytest.fixture
def without_tokenizers(monkeypatch):
    monkeypatch.setitem(sys.modules, "bpe_openai", None)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    sheepsse._tokenizer.cache_clear()
    yield
    sheepsse._tokenizer.cache_clear()


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize(
    ("model", "count"),
    [
        (None, 22),
        ("gpt-4o", 22),
        ("gpt-4o-mini-2024-07-18", 22),
        ("openai/gpt-4.1", 22),
        ("ft:gpt-4o:mine::1", 22),
        ("gpt-5-mini", 22),
        ("o3", 22),
        ("gpt-4", 32),
        ("gpt-4-turbo", 32),
        ("gpt-3.5-turbo", 32),
    ],
)
def test_a_models_own_tokenizer_counts(model, count):
    assert count_tokens(SENTENCE, model) == count


SCRIPTS = [
    "abcdefgh ",
    "ABC.,;:!?()[]{}",
    "àáạảãâầấđ ",
    "世界你好中文字",
    "0123456789",
    "\n\t  ",
    "🌤️🐑é",
    "привет ",
    "\ud83d",
]


def test_strict_is_the_reference_for_any_text(reference):
    choose = random.Random(6)
    for name in ("o200k_base", "cl100k_base"):
        encoding, model = reference.get_encoding(name), {"o200k_base": "gpt-4o", "cl100k_base": "gpt-4"}[name]
        for _ in range(500):
            text = "".join(choose.choice(choose.choice(SCRIPTS)) for _ in range(choose.randrange(200)))
            plain = text.replace("\ud83d", "\ufffd")
            assert count_tokens(text, model) == len(encoding.encode_ordinary(plain))


@pytest.mark.parametrize("model", ["claude-sonnet-4-5", "gemini-2.5-flash", "deepseek-chat", "llama3", ""])
def test_no_other_models_count_is_called_exact(model):
    with pytest.raises(MissingExtraError, match="mode='relaxed' estimates"):
        count_tokens("Good day", model)


@pytest.mark.usefixtures("without_tokenizers")
def test_without_a_tokenizer_strict_is_an_error_and_no_guess():
    with pytest.raises(MissingExtraError, match="pip install 'sheepsse\\[tokens\\]'"):
        count_tokens("Good day", "gpt-4o")
    assert count_tokens("Good day", "gpt-4o", mode="relaxed") == 2


@pytest.mark.usefixtures("without_tokenizers")
def test_tiktoken_counts_where_the_other_is_missing(monkeypatch):
    class Encoding:
        def encode(self, text, disallowed_special):
            return text.split()

    fake = types.ModuleType("tiktoken")
    fake.get_encoding = lambda name: Encoding()
    monkeypatch.setitem(sys.modules, "tiktoken", fake)
    assert count_tokens("one two three", "gpt-4o") == 3


@pytest.mark.usefixtures("without_tokenizers")
def test_a_tokenizer_that_cannot_fetch_its_file_is_as_none(monkeypatch):
    fake = types.ModuleType("tiktoken")

    def get_encoding(name):
        raise ConnectionError("no network")

    fake.get_encoding = get_encoding
    monkeypatch.setitem(sys.modules, "tiktoken", fake)
    with pytest.raises(MissingExtraError):
        count_tokens("one two three", "gpt-4o")


def test_none_counts_nothing():
    assert count_tokens("Good day", mode="none") is None


@pytest.mark.usefixtures("reference")
def test_messages_are_counted_with_their_roles():
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    plain = sum(count_tokens(text) for text in ("system", "Be short.", "user", "Hi"))
    assert count_tokens(messages) == plain + 2 * 3 + 3
    named = [{"role": "user", "content": "Hi", "name": "ann"}]
    assert count_tokens(named) == count_tokens([{"role": "user", "content": "Hi"}]) + count_tokens("ann") + 1


def test_an_estimate_may_be_by_letters_or_by_words():
    assert count_tokens("a" * 10, mode="relaxed", chars_per_token=4) == 3
    assert count_tokens("one two three", mode="relaxed", method="words") == 4
    assert count_tokens("", mode="relaxed") == 0


@pytest.mark.parametrize(
    "options",
    [{"mode": "exact"}, {"mode": "relaxed", "method": "guess"}, {"mode": "relaxed", "chars_per_token": 0}],
)
def test_options_that_are_none_are_errors(options):
    with pytest.raises(ValueError, match="is one of|is above 0"):
        count_tokens("Good day", **options)


# TokenAlignment


def usage_of(server, alignment, answer=None, model="gpt-4o", **options):
    server.answer(answer or Answer())
    with asking(server, model=model) as client:
        stream = client.stream("Good day?", alignment=alignment, **options)
        came, error = read(stream)
    return stream.usage, error, came


def counting(output_tokens, text="Hello there, how are you today?", reasoning_tokens=0, **more):
    """An answer whose provider counts so many tokens"""
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": output_tokens,
        "total_tokens": 9 + output_tokens,
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
    }
    delta = {"content": text, **more}
    payload = {"choices": [{"index": 0, "delta": delta, "finish_reason": "stop"}], "usage": usage}
    return Answer(body=f"data: {sheepsse._to_json(payload)}\n\ndata: [DONE]\n\n".encode())


SAID = 8  # tokens of that text in o200k_base


@pytest.mark.usefixtures("reference")
def test_a_count_that_is_the_providers_is_verified(server, caplog):
    usage, error, _ = usage_of(server, TokenAlignment(), counting(SAID))
    assert error is None
    assert (usage.alignment, usage.source, usage.output_tokens) == ("verified", "provider", SAID)
    assert (usage.provider, usage.local[1]) == ((9, SAID), SAID)
    assert usage.local[0] == count_tokens([{"role": "user", "content": "Good day?"}])
    assert usage.aligned_at > 1.7e9
    assert "counted" not in caplog.text


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize(("on_mismatch", "level"), [("log", "WARNING"), ("adjust", "INFO")])
def test_a_count_that_is_another_is_a_mismatch_and_the_providers_wins(server, caplog, on_mismatch, level):
    with caplog.at_level(logging.INFO, "sheepsse"):
        usage, error, _ = usage_of(server, TokenAlignment(on_mismatch=on_mismatch), counting(50))
    assert error is None
    assert (usage.alignment, usage.source, usage.output_tokens) == ("mismatch", "provider", 50)
    assert (usage.provider[1], usage.local[1]) == (50, SAID)
    (record,) = (record for record in caplog.records if "counted 8 tokens" in record.getMessage())
    assert record.levelname == level
    assert ("which is taken" in record.getMessage()) == (on_mismatch == "adjust")


@pytest.mark.usefixtures("reference")
def test_a_mismatch_may_be_an_error_that_keeps_the_text(server):
    _, error, came = usage_of(server, TokenAlignment(on_mismatch="raise"), counting(50))
    assert type(error) is TokenMismatchError
    assert error.code == "TOKEN_MISMATCH_ERROR"
    assert error.partial.text == "".join(came) == "Hello there, how are you today?"


@pytest.mark.usefixtures("reference")
def test_a_mismatch_may_be_kept_quiet(server, caplog):
    with caplog.at_level(logging.INFO, "sheepsse"):
        usage, _, _ = usage_of(server, TokenAlignment(log=False), counting(50))
    assert usage.alignment == "mismatch"
    assert "counted" not in caplog.text


@pytest.mark.usefixtures("reference")
def test_tolerance_is_a_share_of_the_providers_count(server):
    assert usage_of(server, TokenAlignment(tolerance=0.3), counting(11))[0].alignment == "verified"
    assert usage_of(server, TokenAlignment(tolerance=0.2), counting(11))[0].alignment == "mismatch"


@pytest.mark.usefixtures("reference")
def test_hidden_reasoning_is_no_mismatch_and_shown_reasoning_is_counted(server):
    assert usage_of(server, TokenAlignment(), counting(SAID + 500, reasoning_tokens=500))[0].alignment == "verified"
    shown = counting(SAID + 2, reasoning_content="Let us")
    assert usage_of(server, TokenAlignment(), shown)[0].alignment == "verified"


@pytest.mark.usefixtures("reference")
def test_tool_calls_cannot_be_compared(server):
    calls = [{"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}}]
    usage, _, _ = usage_of(server, TokenAlignment(), counting(50, tool_calls=calls))
    assert (usage.alignment, usage.source) == ("unverified", "provider")


@pytest.mark.usefixtures("reference")
def test_another_vendors_model_is_held_against_an_estimate(server):
    usage, _, _ = usage_of(server, TokenAlignment(), counting(9), model="claude-sonnet-4-5")
    assert (usage.alignment, usage.local[1]) == ("verified", SAID)
    assert usage_of(server, TokenAlignment(), counting(20), model="claude-sonnet-4-5")[0].alignment == "mismatch"


@pytest.mark.parametrize(
    ("alignment", "source"), [(TokenAlignment("relaxed"), "estimate"), (TokenAlignment(), "local")]
)
def test_a_stream_that_was_cut_has_a_usage_that_was_counted_here(server, alignment, source):
    if source == "local":
        pytest.importorskip("bpe_openai", reason="needs bpe-openai")
    usage, error, came = usage_of(server, alignment, Answer(cut_after=4), resume="never")
    assert type(error) is sheepsse.StreamInterrupted
    assert (usage.source, usage.alignment) == (source, "unverified")
    assert usage.output_tokens == usage.local[1] == error.partial.usage.output_tokens > 0
    assert usage.provider is None
    assert usage.input_tokens > 0


def test_what_was_counted_before_a_cut_is_no_count_of_what_came():
    answer = sheepsse._Answer()
    answer.add(sheepsse.Chunk(usage=sheepsse.Usage(25, 1, 26)))  # as Anthropic begins
    answer.add(sheepsse.Chunk(text="one two three four five six"))
    usage = sheepsse._Alignment(TokenAlignment("relaxed"), "Hi", "m").aligned(answer, cut=True)
    assert (usage.source, usage.alignment, usage.output_tokens) == ("estimate", "unverified", 6)


def test_several_choices_and_our_own_estimates_cannot_be_compared():
    answer = sheepsse._Answer()
    answer.add(sheepsse.Chunk(text="one two three", usage=sheepsse.Usage(25, 600, 625)))
    alignment = sheepsse._Alignment(TokenAlignment("relaxed", on_mismatch="raise"), "Hi", "m")
    assert alignment.aligned(answer, choices=2).alignment == "unverified"
    answer.usage = answer.usage._replace(source="estimate")
    usage = alignment.aligned(answer)
    assert (usage.alignment, usage.provider) == ("unverified", None)


def test_what_was_not_counted_has_no_price(server):
    alignment = TokenAlignment("relaxed", count_input=False)
    usage, _, _ = usage_of(server, alignment, Answer(cut_after=4), resume="never")
    assert usage.source == "estimate"
    assert sheepsse.cost(usage, sheepsse.Price(1, 1)) is None


def test_what_is_not_to_be_counted_is_none(server):
    usage, _, _ = usage_of(server, TokenAlignment("relaxed", count_input=False, count_output=False), counting(50))
    assert (usage.alignment, usage.local) == ("unverified", (None, None))


@pytest.mark.parametrize("alignment", [None, TokenAlignment("none")])
def test_without_alignment_usage_is_as_it_was_sent(server, alignment):
    usage, _, _ = usage_of(server, alignment, counting(50))
    assert (usage.alignment, usage.provider, usage.local, usage.aligned_at) == (None,) * 4
    assert usage.source == "provider"


def test_batch_reports_while_the_stream_runs(server):
    reports = []
    alignment = TokenAlignment("batch", batch_size=10, on_report=reports.append, report_interval=0)
    text = "Count with me, please: " + " ".join(map(str, range(200)))
    usage, error, came = usage_of(server, alignment, Answer(text=text))
    assert error is None
    assert "".join(came) == text
    assert len(reports) >= 5
    assert [report.chunks for report in reports] == sorted({report.chunks for report in reports})
    assert all(later.output_tokens > earlier.output_tokens for earlier, later in zip(reports, reports[1:]))
    assert reports[-1].output_tokens == pytest.approx(usage.local[1], rel=0.25)
    assert reports[0].input_tokens == usage.local[0]
    reports.clear()
    slow = TokenAlignment("batch", batch_size=10, on_report=reports.append, report_interval=60)
    usage_of(server, slow, Answer(text=text))
    assert reports == []


@pytest.mark.usefixtures("without_tokenizers")
def test_without_a_tokenizer_batch_estimates_and_strict_is_an_error_before_anything_is_sent(server):
    usage, _, _ = usage_of(server, TokenAlignment("batch"), counting(SAID))
    assert (usage.alignment, usage.source) == ("verified", "provider")
    server.requests.clear()
    with asking(server, model="gpt-4o") as client, pytest.raises(MissingExtraError):
        client.stream("Good day?", alignment=TokenAlignment())
    assert server.requests == []


def test_complete_aligns_too(server):
    with asking(server) as client:
        answer = client.complete("Good day?", alignment=TokenAlignment("relaxed", tolerance=9))
    assert (answer.text, answer.usage.alignment) == (TEXT, "verified")


@pytest.mark.parametrize("options", [{"mode": "exact"}, {"on_mismatch": "ignore"}, {"batch_size": 0}, {"method": "x"}])
def test_an_alignment_that_is_none_is_an_error(options):
    with pytest.raises(ValueError, match="is one of|1 or more"):
        TokenAlignment(**options)


# How good the estimate is, over texts that it was not made by

TEXTS = {
    "english": [
        "The ferry left an hour late, so we drank bad coffee and watched the gulls argue over a paper bag. Nobody minded.",
        "To repot an orchid, soak the roots first; then cut away whatever is brown and soft, and leave the green ones alone.",
        "In 1854 a doctor drew a map of the deaths around one pump, and so found out how cholera travels through a city.",
        "Our refund policy covers items returned within thirty days, provided that the packaging has not been damaged.",
        "She wrote the letter twice, once in anger and once in earnest, and in the end she posted neither of the two.",
    ],
    "vietnamese": [
        "Sáng nay trời mưa rất to nên chúng tôi ở nhà nấu phở và nghe bà kể chuyện ngày xưa.",
        "Muốn trồng rau sạch trên ban công, bạn cần đất tơi xốp, nhiều nắng và tưới nước đều mỗi ngày.",
        "Con đường từ Hà Nội lên Sa Pa quanh co, nhưng phong cảnh hai bên thì đẹp đến nao lòng.",
        "Cửa hàng mở cửa từ tám giờ sáng đến chín giờ tối, kể cả thứ bảy và chủ nhật.",
        "Anh ấy đã học tiếng Nhật được ba năm và đang chuẩn bị cho kỳ thi vào tháng mười hai.",
    ],
    "chinese": [
        "昨天晚上下了一场大雨，院子里的桂花落了一地，早上起来满屋子都是香味。",
        "学习一门新的语言最重要的是坚持，每天哪怕只读一页书，一年以后也会有很大的进步。",
        "这家小店的老板是一位退休的老师，他做的牛肉面远近闻名，中午常常要排队。",
        "火车慢慢地开出了车站，窗外的田野、河流和村庄一个接一个地向后退去。",
        "如果您对我们的产品有任何问题，请随时拨打客服电话，我们会尽快为您处理。",
    ],
    "code": [
        "def merge(left, right):\n    result = []\n    while left and right:\n        source = left if left[0] <= right[0] else right\n"
        "        result.append(source.pop(0))\n    return result + left + right\n",
        "class Account:\n    def __init__(self, owner, balance=0):\n        self.owner = owner\n        self.balance = balance\n\n"
        "    def withdraw(self, amount):\n        if amount > self.balance:\n            raise ValueError('not enough')\n",
        "import csv\n\nwith open('prices.csv', newline='') as file:\n    for row in csv.DictReader(file):\n"
        "        if float(row['price']) > 9.99:\n            print(row['name'], row['price'])\n",
        "@app.route('/users/<int:user_id>', methods=['GET'])\ndef get_user(user_id):\n    user = db.session.get(User, user_id)\n"
        "    return jsonify(user.to_dict()) if user else abort(404)\n",
    ],
    "json": [
        '{"order": {"id": 48213, "lines": [{"sku": "AB-1009", "qty": 2, "price": 19.9}, {"sku": "ZX-7", "qty": 1, "price": 4}]}}',
        '{\n  "name": "Ann Example",\n  "email": "ann@example.org",\n  "roles": ["admin", "editor"],\n  "active": true\n}',
        '[{"lat": 52.52, "lon": 13.405, "city": "Berlin"}, {"lat": 48.8566, "lon": 2.3522, "city": "Paris"}]',
        '{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "required": ["city"]}}}',
    ],
}


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("kind", TEXTS)
def test_an_estimate_is_within_15_per_cent_on_average(kind):
    errors = [abs(count_tokens(text, mode="relaxed") / count_tokens(text) - 1) for text in TEXTS[kind]]
    print(f"{kind}: {sum(errors) / len(errors):.3f} on average, {max(errors):.3f} at most")
    assert sum(errors) / len(errors) <= 0.15


@pytest.mark.usefixtures("reference")
def test_recordings_with_usage_are_verified_or_labelled(recordings):
    folder, index = recordings
    found = dict.fromkeys(("verified", "mismatch", "unverified"), 0)
    for row in index:
        given = sheepsse.iter_chunks(events_of([(folder / row["file"]).read_bytes()], recorded_type(row)))
        answer = sheepsse._Answer()
        for chunk in read(given)[0]:
            answer.add(chunk)
        if answer.usage is None or not answer.text:
            continue
        usage = sheepsse._Alignment(TokenAlignment(log=False), [], answer.model).aligned(answer)
        assert usage[:6] == answer.usage[:6]
        found[usage.alignment] += 1
        text_alone = not (answer.tool_calls or answer.refusal)
        if (
            row["dialect"] == "openai"
            and sheepsse._encoding_of(answer.model)
            and text_alone
            and "/" not in answer.model
        ):
            sent = usage.output_tokens - usage.reasoning_tokens
            assert abs(usage.local[1] - sent) <= 0.001 * sent, row["file"]
            assert usage.alignment == "verified", row["file"]
    print(found)
    assert found["verified"] >= 3
