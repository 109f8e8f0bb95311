"""A mask is right or the row is refused: templates that write turns from lists of their own, and tokens at a border."""

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

from dsft.data.encoding import Encoded, Encoder
from dsft.data.open import open_data
from dsft.data.source import BadRow
from tests.unit.data.conftest import CHATML
from tests.unit.data.test_data_turns import pieces_of, sample
from tests.unit.data.turns import CALLS, CHATS, asked, told

PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
HEAD, BODY = "{{ '<|im_start|>' + m.role + '\\n' }}", "{{ m.content + '<|im_end|>' }}"
MARKED_BODY = "{% if m.role == 'assistant' %}{% generation %}" + BODY + "{% endgeneration %}{% else %}" + BODY
MARKED_BODY += "{% endif %}{{ '\\n' }}"
COPIED = (
    "{% set ns = namespace(items=[]) %}{% for m in messages %}"
    "{% set ns.items = ns.items + [{'role': m.role, 'content': m.content | trim}] %}{% endfor %}"
)
MERGED = (
    "{% set ns = namespace(items=[]) %}{% for m in messages %}{% if ns.items and ns.items[-1].role == m.role %}"
    "{% set said = ns.items[-1].content + ' ' + m.content %}{% set ns.items = ns.items[:-1] %}"
    "{% else %}{% set said = m.content %}{% endif %}"
    "{% set ns.items = ns.items + [{'role': m.role, 'content': said}] %}{% endfor %}"
)
FROM_THE_LIST = "{% for m in ns.items %}" + HEAD
THOUGHTS_LAST = "{{ '<think></think>' if loop.last and m.role == 'assistant' }}"
BY_INDEX = "{% for i in range(messages | length) %}{% set m = messages[i] %}" + HEAD + MARKED_BODY + "{% endfor %}"
COPIED_PLAIN = COPIED + FROM_THE_LIST + BODY + "{{ '\\n' }}{% endfor %}" + PROMPT
COPIED_MARKED = COPIED + FROM_THE_LIST + MARKED_BODY + "{% endfor %}" + PROMPT
ROLES_FIRST = COPIED_MARKED.replace("{% endfor %}", "{{ m.role }}{% endfor %}", 1)
COPIED_THOUGHTS = COPIED + FROM_THE_LIST + THOUGHTS_LAST + BODY + "{% endfor %}" + PROMPT
MERGED_PLAIN = MERGED + FROM_THE_LIST + BODY + "{% endfor %}" + PROMPT
MERGED_MARKED = MERGED + FROM_THE_LIST + MARKED_BODY + "{% endfor %}" + PROMPT
AS_STRING = (
    "{% set ns = namespace(all='') %}{% for m in messages %}{% set ns.all = ns.all + '<|im_start|>' + m.role + '\\n'"
    " + ('<think></think>' if loop.last else '') + m.content + '<|im_end|>' %}{% endfor %}{{ ns.all }}" + PROMPT
)
QUOTING = "{% for m in messages %}" + HEAD + "{{ messages[loop.index0 - 1].content + '>' if m.role == 'assistant' }}"
QUOTING += BODY + "{% endfor %}" + PROMPT
IN_A_COMMENT = "{#{% generation %}#}" + CHATML
DEAF = "{% for m in messages %}" + HEAD + BODY + "{% endfor %}"


def encode(tokenizer: Any, chat: Any, *learned: str) -> Encoded | BadRow:
    given = tuple(turn["content"] in learned for turn in chat) if learned else None
    (encoded,) = Encoder(tokenizer).encode([sample(chat, learned=given)])
    return encoded


@pytest.mark.parametrize("template", [COPIED_MARKED, BY_INDEX + PROMPT, COPIED_PLAIN])
@pytest.mark.parametrize("learned", [("A1", "A2", "A3"), ("A2",), ("A1", "A3")])
def test_turns_are_left_out_of_the_mask_however_the_template_writes_them(
    template: str, learned: tuple[str, ...], make_tokenizer: Any
) -> None:
    tokenizer = make_tokenizer(template)
    encoded = encode(tokenizer, CHATS["several"], *learned)
    assert isinstance(encoded, Encoded), encoded
    assert pieces_of(tokenizer, encoded) == [f"{answer}<|im_end|>" for answer in learned]


@pytest.mark.parametrize(
    ("template", "chat", "learned", "why"),
    [
        (COPIED_THOUGHTS, CHATS["several"], (), "turn 2: it writes nothing for it in its loops"),
        (AS_STRING, CHATS["several"], (), "turn 2: it writes nothing for it in its loops"),
        (MERGED_PLAIN, CHATS["two answers"], (), "turn 2: it writes nothing for it in its loops"),
        (MERGED_PLAIN, CHATS["two answers"], ("A2",), "turn 3: it writes nothing for it in its loops"),
        (MERGED_MARKED, CHATS["two answers"], ("A2", "A3"), "not to be learned: the template marks it together"),
        (COPIED_MARKED, CHATS["empty answer"], ("A2",), "not to be learned: what it says is not in the text"),
        (ROLES_FIRST, CHATS["empty answer"], ("A2",), "not to be learned: what it says is not in the text"),
        (QUOTING, CHATS["several"], (), "turn 2: it writes another turn among it"),
        (DEAF, [asked("Q1"), told("", tool_calls=CALLS)], (), "turn 2: it begins with '<|im_start|>assistant"),
        (DEAF, CHATS["several"], (), r"turn 2: it begins with '<|im_start|>assistant\n', which the template"),
    ],
)
def test_a_row_is_refused_whose_mask_would_be_a_guess(
    template: str, chat: Any, learned: tuple[str, ...], why: str, make_tokenizer: Any
) -> None:
    refused = encode(make_tokenizer(template), chat, *learned)
    assert isinstance(refused, BadRow), refused
    assert why in refused.reason
    way_out = "write each message in the template's loop" if "{% generation" in template else "with {% generation %}"
    assert way_out in refused.reason


def test_merged_questions_and_marks_in_a_comment_are_no_trouble(make_tokenizer: Any) -> None:
    chat = [asked("Q1"), asked("Q2"), told("A1"), asked("Q3"), told("A2")]
    for template in (MERGED_PLAIN, MERGED_MARKED, IN_A_COMMENT):
        encoded = encode(tokenizer := make_tokenizer(template), chat)
        assert isinstance(encoded, Encoded), encoded
        assert pieces_of(tokenizer, encoded) == ["A1<|im_end|>", "A2<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "pieces"),
    [
        (
            "{{ 'USER: ' }}{% for m in messages %}{{ m.content }}"
            "{{ ' ASSISTANT:' if m.role == 'user' else '<|im_end|>USER: ' }}{% endfor %}",
            ["A1<|im_end|>", "A2<|im_end|>", "A3<|im_end|>"],
        ),
        (
            "{{ '<|im_start|>' }}{% for m in messages %}{{ m.content }}"
            "{{ '<|im_end|>:' if m.role == 'user' else '<|im_end|><|im_start|>' }}{% endfor %}",
            ["A1<|im_end|>", "A2<|im_end|>", "A3<|im_end|>"],
        ),
        (
            CHATML.split("{% if add", maxsplit=1)[0] + "{{ '<|im_start|>assistant\\n' }}",
            ["A1<|im_end|>", "A2<|im_end|>", "A3<|im_end|>"],
        ),
        (
            CHATML.replace("{% endif %}", "{% else %}{{ 'THE END' }}{% endif %}"),
            ["A1<|im_end|>", "A2<|im_end|>", "A3<|im_end|>"],
        ),
    ],
    ids=["words of a header", "token of a header", "a prompt always", "a footer"],
)
def test_nothing_behind_the_end_of_a_turn_is_supervised(template: str, pieces: list[str], make_tokenizer: Any) -> None:
    encoded = encode(tokenizer := make_tokenizer(template), CHATS["several"])
    assert isinstance(encoded, Encoded), encoded
    assert pieces_of(tokenizer, encoded) == pieces


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
@pytest.mark.parametrize("said", ["A1", " A1 ", "\n\nA1\n"])
def test_special_tokens_that_take_white_space_along_stay_on_their_side(
    side: str, said: str, make_tokenizer: Any
) -> None:
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    names = ("<|end|>", "<|assistant|>", "<|user|>")
    added = [AddedToken(name, special=True, normalized=False, **{side: True}) for name in names]  # type: ignore[arg-type]
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    encoded = encode(tokenizer, [asked("Q1"), told(said), asked("Q2"), told("A2")])
    assert isinstance(encoded, Encoded)
    kept = said.rstrip() if side == "lstrip" else said.lstrip()
    assert pieces_of(tokenizer, encoded) == [f"{kept}<|end|>", "A2<|end|>"]


@pytest.mark.parametrize("kind", [models.WordLevel, models.WordPiece])
def test_a_word_for_which_the_vocabulary_has_no_token_is_the_rows_fault(kind: Any) -> None:
    backend = Tokenizer(kind({word: i for i, word in enumerate(["user", "assistant", "Q1", "A1"])}, unk_token="none"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    good, bad = Encoder(tokenizer).encode([sample(CHATS["single"]), sample([asked("Q1"), told("new")])])
    assert isinstance(good, Encoded)
    assert isinstance(bad, BadRow)
    assert "must hold text that the model's tokenizer can read, got Exception: " in bad.reason


def test_a_refusal_is_whole_and_says_how_such_rows_are_left_out(
    make_tokenizer: Any, source: Any, jsonl: Any, tmp_path: Any
) -> None:
    tokenizer = make_tokenizer("{{ raise_exception('user/assistant/...') }}")
    local = source("local", path=jsonl([{"messages": CHATS["single"]}]))
    end = "refusal: user/assistant/...; drop the row, or leave such rows out with "
    with pytest.raises(ValueError, match=f"{end}data.on_bad_row=skip$"):
        open_data(local, tokenizer, max_length=99, seed=0, cache_dir=tmp_path)
    mixed = source("mixture", sources={"a": local}, weights={"a": 1.0})
    with pytest.raises(ValueError, match=end + r"\+\+data.sources.a.on_bad_row=skip$"):
        open_data(mixed, tokenizer, max_length=99, seed=0, cache_dir=tmp_path)


def test_a_turn_without_words_is_left_out_where_its_block_is_certain(make_tokenizer: Any) -> None:
    chat = [asked("Q1"), told("", tool_calls=CALLS), asked("Q2"), told("A2")]
    template = "{% for m in messages %}" + HEAD + MARKED_BODY + "{% endfor %}" + PROMPT
    encoded = encode(tokenizer := make_tokenizer(template), chat, "A2")
    assert isinstance(encoded, Encoded)
    assert pieces_of(tokenizer, encoded) == ["A2<|im_end|>"]
