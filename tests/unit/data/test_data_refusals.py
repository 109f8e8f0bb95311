"""What a chat template or a tokenizer refuses is one line: of the template itself once, of a row with its place."""

from datetime import date
from typing import Any

import pytest

from dsft.data.encoding import Encoded, Encoder
from dsft.data.open import open_data
from dsft.data.source import BadRow, Sample
from tests.unit.data.conftest import CHATML
from tests.unit.data.turns import CHATS, SYSTEM, asked, told


def sample(chat: Any, **more: Any) -> Sample:
    return Sample("s", 0, "chats.jsonl:1", tuple(chat), None, "", None, **more)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}\n{{ m.content }}\n{% endif %}", r"line 3: Encountered unknown tag 'endif'"),
        ("{{ messages | nothing }}", r"line 1: No filter named 'nothing'"),
        ("\n{{ messages[0 }}", r"line 2: unexpected '}', expected '\]'"),
    ],
)
def test_a_broken_template_is_refused_before_any_row(template: str, reason: str, make_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=rf"must have a chat template that jinja can read, got .* {reason}.*; correct"):
        Encoder(make_tokenizer(template))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system turns') }}", "no system turns"),
        ("{{ messages[0].content + 1 }}", "TypeError: can only concatenate str"),
        ("{{ messages[9].content }}", "has no element 9"),
        ("{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}", "RecursionError: maximum recursion depth"),
        ("{{ 1 // (messages | length - 3) }}", "ZeroDivisionError"),
        ("{{ messages[0].content.nothing.more }}", "has no attribute 'nothing'"),
    ],
)
def test_whatever_a_template_raises_on_a_row_names_the_row(template: str, reason: str, make_tokenizer: Any) -> None:
    chat = [SYSTEM, *CHATS["single"]]
    (refused,) = Encoder(make_tokenizer(template)).encode([sample(chat)])
    assert isinstance(refused, BadRow)
    assert refused.reason.startswith("chats.jsonl:1 must fit the model's chat template, got its refusal: ")
    assert reason in refused.reason
    assert refused.reason.endswith("; drop the row")
    assert "\n" not in refused.reason


def test_text_that_is_none_is_refused_and_its_neighbours_are_not(chatml: Any, make_tokenizer: Any) -> None:
    broken = sample([asked("Q1"), told("A\ud800")])
    first, second, third = Encoder(chatml).encode([sample(CHATS["single"]), broken, sample(CHATS["several"])])
    assert isinstance(first, Encoded)
    assert isinstance(third, Encoded)
    assert isinstance(second, BadRow)
    assert "must hold text that the model's tokenizer can read, got '\\ud800', half of a character" in second.reason
    plain = Sample("s", 0, "rows.jsonl:7", (), ("Q", "\udc00"), "", None)
    (refused,) = Encoder(make_tokenizer(None)).encode([plain])
    assert isinstance(refused, BadRow)
    assert refused.reason.startswith("rows.jsonl:7 must hold text")


def test_a_row_that_is_refused_stops_the_opening(chatml: Any, source: Any, jsonl: Any, tmp_path: Any) -> None:
    local = source("local", path=jsonl([{"messages": CHATS["single"]}, {"messages": [told("A1"), asked("Q1")]}]))
    with pytest.raises(ValueError, match=r"rows\.jsonl:2 must start with a user or system turn, got assistant"):
        open_data(local, chatml, max_length=99, seed=0, cache_dir=tmp_path)


def test_named_templates_without_a_default_are_refused_and_with_tools_their_own_is_taken(make_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="must have a chat template called default"):
        Encoder(make_tokenizer({"rag": CHATML}))
    both = Encoder(make_tokenizer({"default": CHATML, "tool_use": "{{ tools | tojson }}" + CHATML}))
    plain, with_tools = both.encode([sample(CHATS["single"]), sample(CHATS["single"], tools=({"name": "add"},))])
    assert both.renders_tools
    assert isinstance(plain, Encoded)
    assert isinstance(with_tools, Encoded)
    assert both.tokenizer.decode(with_tools.tokens.tolist()).startswith('[{"name": "add"}]<|im_start|>user')
    assert both.tokenizer.decode(plain.tokens.tolist()).startswith("<|im_start|>user")


DATED = "{{ 'Today: ' + strftime_now('%d %b %Y') }}{% if strftime_now is defined %}{{ '!' }}{% endif %}" + CHATML


def test_a_template_that_asks_for_the_date_is_told_the_given_one(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(DATED)
    (encoded,) = Encoder(tokenizer, date(2021, 3, 4)).encode([sample(CHATS["single"])])
    assert isinstance(encoded, Encoded)
    assert tokenizer.decode(encoded.tokens.tolist()).startswith("Today: 04 Mar 2021!<|im_start|>user")
    named = make_tokenizer(DATED.replace("strftime_now('", "strftime_now(format='"))
    (the_same,) = Encoder(named, date(2021, 3, 4)).encode([sample(CHATS["single"])])
    assert isinstance(the_same, Encoded)
    assert the_same.tokens.tolist() == encoded.tokens.tolist()
    assert not Encoder(make_tokenizer()).reads_date
    before = date.today()
    (now,) = Encoder(tokenizer).encode([sample(CHATS["single"])])
    told_today = tokenizer.apply_chat_template(CHATS["single"])["input_ids"]
    assert isinstance(now, Encoded)
    assert now.tokens.tolist() == told_today or before != date.today()


def test_a_date_in_a_form_that_the_template_makes_up_is_refused(make_tokenizer: Any) -> None:
    made_up = "{{ strftime_now('%' ~ messages[0].content) }}" + CHATML
    (refused,) = Encoder(make_tokenizer(made_up)).encode([sample([asked("d"), told("A1")])])
    assert isinstance(refused, BadRow)
    assert "asks for the date in a form that is not in its text" in refused.reason
