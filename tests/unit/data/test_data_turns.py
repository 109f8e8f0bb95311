"""Assistant turns are found under templates that render earlier turns otherwise than the last one."""

from typing import Any

import pytest

from dsft.data.encoding import Encoded, Encoder
from dsft.data.marks import CannotRenderError
from dsft.data.source import BadRow, Sample
from dsft.data.spans import Conversation
from dsft.data.store import runs
from tests.unit.data.turns import (
    CALLS,
    CHATS,
    EMPTY_THOUGHTS_LAST,
    END_OF_TEXT_LAST,
    HEADER_IN_THE_QUESTION,
    SYSTEM_IN_THE_LAST_QUESTION,
    TEMPLATES,
    THOUGHTS_DROPPED,
    TOOL,
    asked,
    judge,
    told,
)


def sample(chat: Any, **more: Any) -> Sample:
    return Sample("s", 0, "chats.jsonl:1", tuple(chat), None, "", None, **more)


def pieces_of(tokenizer: Any, encoded: Encoded) -> list[str]:
    return [tokenizer.decode(encoded.tokens[a:b].tolist()) for a, b, on in runs(encoded.mask) if on]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_supervised_are_the_answers_and_nothing_else(name: str, chat: str, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(TEMPLATES[name])
    (encoded,) = Encoder(tokenizer).encode([sample(CHATS[chat])])
    assert isinstance(encoded, Encoded), encoded
    assert encoded.tokens.tolist() == tokenizer.apply_chat_template(CHATS[chat])["input_ids"]
    text = tokenizer.apply_chat_template(CHATS[chat], tokenize=False)
    judge(text, pieces_of(tokenizer, encoded), CHATS[chat])


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "marks of its own"])
def test_both_ways_to_a_turn_agree(name: str, chat: str, make_tokenizer: Any) -> None:
    template = Encoder(make_tokenizer(TEMPLATES[name])).plain_template
    assert template is not None
    talk = Conversation(template, CHATS[chat], None)
    turns = [index for index, message in enumerate(CHATS[chat]) if message["role"] == "assistant"]
    added = {index: span for index in turns if (span := talk.added(index)) is not None}
    assert {index: talk.looked_up(index) for index in added} == added


@pytest.mark.parametrize(
    ("template", "chat", "expected"),
    [
        (EMPTY_THOUGHTS_LAST, "several", ["A1<|im_end|>", "A2<|im_end|>", "<think>\n\n</think>\n\nA3<|im_end|>"]),
        (EMPTY_THOUGHTS_LAST, "thoughts", ["A1<|im_end|>", "<think>\nR2\n</think>\n\nA2<|im_end|>"]),
        (END_OF_TEXT_LAST, "several", ["A1<|im_start|>", "A2<|im_start|>", "A3<|im_start|>\n<|im_end|>"]),
        (END_OF_TEXT_LAST, "ends with a question", ["A1<|im_start|>", "A2<|im_start|>"]),
        (SYSTEM_IN_THE_LAST_QUESTION, "system", [" A1<|im_end|>", " A2<|im_end|>"]),
        (THOUGHTS_DROPPED, "thoughts", ["A1<|im_end|>", "A2<|im_end|>"]),
        (THOUGHTS_DROPPED, "unicode", ["\u4f60\u597d A1<|im_end|>", "na\u00efve A2<|im_end|>"]),
        (THOUGHTS_DROPPED, "repeats", ["A1<|im_end|>", "A1<|im_end|>", "<b>A1</b><|im_end|>", "assistant<|im_end|>"]),
        (HEADER_IN_THE_QUESTION, "several", [" A1<|im_end|>", " A2<|im_end|>", " A3<|im_end|>"]),
    ],
)
def test_a_turn_reaches_from_its_header_to_its_end(
    template: str, chat: str, expected: list[str], make_tokenizer: Any
) -> None:
    tokenizer = make_tokenizer(template)
    (encoded,) = Encoder(tokenizer).encode([sample(CHATS[chat])])
    assert isinstance(encoded, Encoded)
    assert pieces_of(tokenizer, encoded) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_the_turns_that_are_to_be_learned_are_supervised(name: str, make_tokenizer: Any) -> None:
    tokenizer, chat = make_tokenizer(TEMPLATES[name]), CHATS["several"]
    every, second = Encoder(tokenizer).encode(
        [sample(chat), sample(chat, learned=tuple(turn["content"] in ("A2", "Q3") for turn in chat))]
    )
    assert isinstance(every, Encoded)
    assert isinstance(second, Encoded)
    assert pieces_of(tokenizer, second) == pieces_of(tokenizer, every)[1:2]
    assert (second.tokens.tolist(), second.prompt) == (every.tokens.tolist(), every.prompt)


def test_turns_that_are_rendered_to_nothing_are_counted(make_tokenizer: Any) -> None:
    rows = [sample([asked("Q1"), told("", tool_calls=CALLS), asked("Q2"), told("A2")]), sample(CHATS["several"])]
    for name, empty in (("tool calls", [0, 0]), ("thoughts dropped", [1, 0]), ("marks of its own", [1, 0])):
        encoded = Encoder(make_tokenizer(TEMPLATES[name])).encode(rows)
        assert [row.empty_turns for row in encoded if isinstance(row, Encoded)] == empty, name


def test_tools_are_rendered_or_refused(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(TEMPLATES["tool calls"])
    chat = CHATS["tool call"]
    (encoded,) = Encoder(tokenizer).encode([sample(chat, tools=(TOOL,))])
    assert isinstance(encoded, Encoded)
    assert encoded.tokens.tolist() == tokenizer.apply_chat_template(chat, tools=[TOOL])["input_ids"]
    assert '"description": "Adds."' in tokenizer.decode(encoded.tokens.tolist())
    deaf = Encoder(make_tokenizer(THOUGHTS_DROPPED))
    (refused,) = deaf.encode([sample(chat, tools=(TOOL,))])
    assert not deaf.renders_tools
    assert isinstance(refused, BadRow)
    assert refused.reason.startswith("chats.jsonl:1 must offer no tools to a chat template that does not read them")
    assert "data.ignore=[tools]" in refused.reason


OTHER_HEADER = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{{ m.content if loop.last else 'cut' }}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\\n' }}{% endif %}"
)
AMONG_OTHERS = (
    "{% for i in range(messages | length) %}{{ messages[i].content }}{% if loop.last %}{{ '.' }}{% endif %}{% endfor %}"
)
TWICE = (
    "{% for m in messages %}{{ m.content + '|' }}{% endfor %}{% for m in messages %}{{ m.content + '|' }}{% endfor %}"
)
TOOL_WITHIN = (
    "{% for m in messages %}{% if m.role != 'tool' %}{{ m.role + ':' + m.content }}"
    "{% if loop.last %}{{ '.' }}{% endif %}"
    "{% set after = loop.index %}{% if after < messages | length and messages[after].role == 'tool' %}"
    "{{ messages[after].content }}{% endif %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (OTHER_HEADER, r"turn 2: it begins otherwise than with the generation prompt"),
        (AMONG_OTHERS, r"turn 2: it does not write it in a loop over the messages"),
        (TWICE, r"turn 2: it writes turns twice"),
        (TOOL_WITHIN, r"turn 2: it writes another turn among it"),
    ],
)
def test_what_cannot_be_told_is_refused(template: str, why: str, make_tokenizer: Any) -> None:
    (refused,) = Encoder(make_tokenizer(template)).encode([sample(CHATS["tool call"])])
    assert isinstance(refused, BadRow)
    assert f"({why}); mark the assistant's part in the template with {{% generation %}}" in refused.reason.replace(
        ", inside each other, or in another order", ""
    )


def test_the_marked_text_is_not_trusted_where_it_differs(make_tokenizer: Any) -> None:
    counting = "{% set all %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}{{ all }}{{ all | length }}"
    template = Encoder(make_tokenizer(counting)).plain_template
    assert template is not None
    with pytest.raises(CannotRenderError, match="something else where its loops are watched"):
        template.trace(CHATS["single"], None)
