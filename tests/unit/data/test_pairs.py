"""Preference rows as data sets write them: two segments, one prompt, and exactly the answers supervised."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from dsft.data.batch import build_batch
from dsft.data.open import open_data
from dsft.objective import IGNORE
from tests.unit.data.conftest import CHATML
from tests.unit.data.turns import TOOL, asked, told

HEAD = "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n"
SYSTEM = "<|im_start|>system\nS0<|im_end|>\n"
HH = "\n\nHuman: Q1\n\nAssistant: A1\n\nHuman: Q2\n\nAssistant:"
TWO = [asked("Q1"), told("A1"), asked("Q2")]


def shared(said: str) -> dict[str, str]:
    return {"from": "gpt", "value": said}


SHAPES: dict[str, tuple[dict[str, Any], str]] = {
    "text": ({"prompt": "Q1", "chosen": "A1", "rejected": "A2", "chosen_model": "m", "subset": "s"}, HEAD),
    "ultrafeedback_binarized": (
        {
            "prompt": "Q1", "chosen": [asked("Q1"), told("A1")], "rejected": [asked("Q1"), told("A2")], "prompt_id": 1,
            "messages": [asked("Q1"), told("A1")], "score_chosen": 8.0, "score_rejected": 2.0,
        },
        HEAD,
    ),
    "argilla": (
        {
            "source": "s", "prompt": "Q1 ", "chosen": [asked("Q1"), told("A1")], "chosen-rating": 5.0,
            "rejected": [asked("Q1"), told("A2")], "rejected-rating": 2.0,
        },
        HEAD,
    ),
    "trl implicit": ({"chosen": [asked("Q1"), told("A1")], "rejected": [asked("Q1"), told("A2")]}, HEAD),
    "trl explicit": ({"prompt": [asked("Q1")], "chosen": [told("A1")], "rejected": [told("A2")]}, HEAD),
    "turns of the prompt and text": ({"prompt": [asked("Q1")], "chosen": "A1", "rejected": "A2"}, HEAD),
    "orca": ({"system": "S0", "question": "Q1", "chosen": "A1", "rejected": "A2"}, SYSTEM + HEAD),
    "truthy": ({"id": "1", "source": "s", "system": "", "prompt": "Q1", "chosen": "A1", "rejected": "A2"}, HEAD),
    "LLaMA-Factory sharegpt": (
        {
            "conversations": [{"from": "human", "value": "Q1"}], "chosen": shared("A1"), "rejected": shared("A2"),
            "system": "S0",
        },
        SYSTEM + HEAD,
    ),
    "LLaMA-Factory alpaca": (
        {"instruction": "Q1", "input": "Q2", "chosen": "A1", "rejected": "A2"},
        HEAD.replace("Q1", "Q1\n\nQ2"),
    ),
    "JSON in csv": (
        {
            "chosen": json.dumps([asked("Q1"), told("A1")]), "rejected": json.dumps([asked("Q1"), told("A2")]),
            "margin": "0.5",
        },
        HEAD,
    ),
    "several turns": (
        {"chosen": [*TWO, told("A1")], "rejected": [*TWO, told("A2")]},
        f"{HEAD}A1<|im_end|>\n{HEAD.replace('Q1', 'Q2')}",
    ),
}  # fmt: skip


@pytest.fixture
def opened(chatml: Any, source: Any, jsonl: Any, tmp_path: Path) -> Any:
    def door(rows: list[Any], *, tokenizer: Any = chatml, max_length: int = 400, **keys: Any) -> Any:
        local = source("local", path=jsonl(rows), **keys)
        return open_data(local, tokenizer, max_length=max_length, seed=0, wants="pair", cache_dir=tmp_path / "cache")

    return door


def said(tokenizer: Any, tokens: Any, index: int = 0) -> list[tuple[str, str]]:
    """Per segment the text before what is supervised, and what is."""
    found = []
    for ids, mask in tokens.segments(index):
        first = int(mask.argmax())
        last = int(mask.nonzero()[0][-1]) + 1
        assert mask[first:last].all()
        found.append((tokenizer.decode(ids[:first].tolist()), tokenizer.decode(ids[first:last].tolist())))
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_each_shape_of_a_pair_has_one_prompt_and_two_answers(name: str, opened: Any, chatml: Any) -> None:
    row, prompt = SHAPES[name]
    train = opened([row]).train
    assert said(chatml, train) == [(prompt, "A1<|im_end|>"), (prompt, "A2<|im_end|>")]
    assert chatml.decode(train.prompt(0).tolist()) == prompt
    assert train.supervised.tolist() == [2 * len("A1.")]
    assert train.lengths.tolist() == [sum(len(ids) for ids, _ in train.segments(0))]


WHOLE = [
    (f"{HH} A3 is it.", f"{HH} A4.", (HH, " A3 is it.", " A4.")),
    (f"{HH} No, A3", f"{HH} No, A4", (HH, " No, A3", " No, A4")),
    ("Once upon a time there was a king.", "Once upon a time there were none.",
     ("Once upon a time there", " was a king.", " were none.")),
    ("Q: 1+1\nA: 2", "Q: 1+1\nB: 3", ("Q: 1+1\n", "A: 2", "B: 3")),
    ("Say hi: hi", "Say hi: hi there", ("Say hi:", " hi", " hi there")),
]  # fmt: skip


@pytest.mark.parametrize(("chosen", "rejected", "parts"), WHOLE)
def test_whole_texts_part_where_they_part(chosen: str, rejected: str, parts: Any, opened: Any, chatml: Any) -> None:
    train = opened([{"chosen": chosen, "rejected": rejected}]).train
    given, *answers = parts
    assert said(chatml, train) == [(given, f"{answer}<|im_end|>") for answer in answers]


def test_text_pairs_need_no_chat_template(opened: Any, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(None)
    rows = [{"prompt": "Q1 ", "chosen": "A1", "rejected": "A2"}, {"question": "Q1", "chosen": "A1", "rejected": "A2"}]
    found = [opened([row], tokenizer=tokenizer).train for row in rows]
    assert [said(tokenizer, train) for train in found] == [
        [(prompt, "A1<|im_end|>"), (prompt, "A2<|im_end|>")] for prompt in ("Q1 ", "Q1\n")
    ]


USER, BOT = asked("Q1"), told("A1")
BAD: list[tuple[Any, str]] = [
    ({"chosen": "A1"}, "the field rejected, got the fields chosen"),
    ({"prompt": "Q1", "chosen": "A1", "rejected": None}, "text in the field rejected, got null"),
    ({"prompt": "Q1", "chosen": "A1", "rejected": [told("A2")]}, "as text both, or as turns both, got str and list"),
    ({"prompt": "Q1", "chosen": [USER, BOT], "rejected": [told("A2")]}, "both begin with the prompt, or neither"),
    ({"prompt": "Q9", "chosen": [USER, BOT], "rejected": [USER, told("A2")]}, "that begin with the prompt, or go on"),
    ({"prompt": [asked("Q9")], "chosen": [USER, BOT], "rejected": [USER, told("A2")]}, "that begin with the prompt"),
    ({"chosen": [USER, BOT], "rejected": [asked("Q2"), BOT]}, "a common beginning, which is the prompt, got none"),
    ({"chosen": [USER, BOT], "rejected": [USER]}, "an assistant turn in rejected .*, got no turn"),
    ({"chosen": [USER, BOT], "rejected": [USER, asked("Q2")]}, "assistant turn in rejected .*, got user turn there"),
    ({"chosen": [USER, BOT, asked("Q2"), BOT], "rejected": [USER, BOT, asked("Q3"), BOT]}, "in chosen .*user turn"),
    ({"chosen": "Yes.", "rejected": "No."}, "two texts that begin with it, got two that begin otherwise"),
    ({"chosen": f"{HH} A\n\nHuman: B\n\nAssistant: C", "rejected": f"{HH} D"}, "differ in the last answer alone"),
    ({"prompt": "What is it all about?", "chosen": "What is it all about? A", "rejected": "What is it all about? B"},
     "go on from the prompt, got two that begin with it"),
    ({"prompt": "Q1", "chosen": "A1", "rejected": "A2", "margin": "much"}, "finite number in the field margin, got 'm"),
    ({"prompt": "Q1", "chosen": "A1", "rejected": "A2", "margin": True}, "finite number in the field margin, got True"),
    ({"prompt": "Q1", "chosen": "A1", "rejected": "A2", "system": 7}, "text in the field system, got int"),
    ({"chosen": "Say A1", "rejected": "Say A2", "system": "S0"}, "a system message to stand before, got text alone"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_bad_pair_is_refused_with_its_line(row: Any, message: str, source: Any, jsonl: Any) -> None:
    good = SHAPES["text"][0]
    _, found, _ = source("local", path=jsonl([good, row, good])).rows("pair")
    assert re.search(rf"rows\.jsonl:2 must .*{message}.*; .*data\.on_bad_row=skip$", found.reason), found.reason


REWRITING = "{% set n = messages | length %}" + CHATML.replace(
    "m['content']", "(m['content'] if m['role'] == 'assistant' or n == 1 else m['content'] | upper)"
)
BY_ANSWER = "{{ 'S' if messages[-1]['content'] | length > 2 else 'T' }}" + CHATML


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (REWRITING, "got others than a model is given to write the answer: the chat template rewrites"),
        (BY_ANSWER, "one prompt before both answers, token for token, got others before the rejected answer"),
    ],
)
def test_a_template_that_rewrites_the_prompt_is_refused(
    template: str, message: str, opened: Any, make_tokenizer: Any
) -> None:
    pair = {"prompt": "q1", "chosen": "A1", "rejected": "A22"}
    with pytest.raises(ValueError, match=rf"rows\.jsonl:1 must .*{message}.*data\.on_bad_row=skip$"):
        opened([pair], tokenizer=make_tokenizer(template))


def test_a_prompt_that_is_cut_otherwise_where_nothing_follows_is_no_other(opened: Any, make_tokenizer: Any) -> None:
    """GPT-2's rule gives two line breaks one token at a text's end, and two before a word."""
    template = CHATML.replace("assistant\n", "assistant\n\n").replace("m['role'] + '\n'", "m['role'] + '\n\n'")
    described = json.loads(make_tokenizer().backend_tokenizer.to_str())
    described["model"]["vocab"]["\u010a\u010a"] = 256
    described |= {"added_tokens": [], "model": {**described["model"], "merges": [["\u010a", "\u010a"]]}}
    backend = Tokenizer.from_str(json.dumps(described))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = template
    given = tokenizer.apply_chat_template([asked("Q1")], add_generation_prompt=True)["input_ids"]
    train = opened([SHAPES["text"][0]], tokenizer=tokenizer).train
    assert train.prompt(0).tolist() != given
    assert [before for before, _ in said(tokenizer, train)] == [tokenizer.decode(given)] * 2


def test_an_answer_that_shares_a_token_with_the_prompt_is_refused(opened: Any, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["\n\n"])
    good = {"prompt": "Q1", "chosen": "A1", "rejected": "A2"}
    counts = opened([good, {**good, "chosen": "\nA1"}], tokenizer=tokenizer, on_bad_row="skip").audit.train
    assert (counts.kept, counts.bad) == (1, 1)


def test_pairs_that_teach_nothing_are_dropped_whole_and_counted(opened: Any) -> None:
    good, long = SHAPES["text"][0], "x" * 60
    rows = [good, good, {**good, "rejected": "A1"}, {**good, "chosen": ""}, {**good, "rejected": long}]
    data = opened([*rows, {**good, "chosen": long, "rejected": "A3"}], max_length=70)
    counts = data.audit.train
    assert (counts.rows, counts.kept, counts.duplicates) == (6, 1, 1)
    assert (counts.equal_sides, counts.empty_sides, counts.over_long, counts.zero_mask) == (1, 1, 2, 0)
    line = data.audit.lines()[0]
    assert "1 kept (2 over-long, 1 with two equal answers, 1 with an empty answer, 1 duplicate dropped)" in line
    skipped = (data.train.folder.parent / "skipped_rows.jsonl").read_text().splitlines()
    assert [json.loads(each)["id"] for each in skipped] == ["rows:2", "rows:3", "rows:4", "rows:5"]
    assert "tokens of its longer side, more than train.max_length=70" in skipped[2]
    assert len(opened([good, {**good, "chosen": "x" * 24}], max_length=70).train) == 2, "each side fits by itself"
    with pytest.raises(
        ValueError, match=r"must hold a pair of two different answers, got 1 pairs with two equal and 0"
    ):
        opened([{**good, "rejected": "A1"}])
    longest = opened([good]).train.longest
    with pytest.raises(ValueError, match=rf"train.max_length must be at least {longest} for a row"):
        opened([good], max_length=longest - 1)


def test_a_batch_of_pairs_has_two_segments_an_example(opened: Any) -> None:
    rows = [{"prompt": "Q1", "chosen": f"A{i}", "rejected": "A" * (3 + i), "margin": i} for i in range(3)]
    train = opened(rows).train
    assert (train.members.tolist(), list(train.columns)) == ([2, 2, 2], ["margin"])
    batch = build_batch(train, [2, 0, 2])
    assert (batch.members, batch.ids, batch.counts) == ((2, 2, 2), ("rows:2", "rows:0", "rows:2"), True)
    assert batch.columns["margin"].tolist() == [2.0, 0.0, 2.0]
    segments = [part for row in (2, 0, 2) for part in train.segments(row)]
    assert batch.lengths == tuple(len(ids) for ids, _ in segments)
    for (ids, mask), tokens, targets, positions in zip(
        segments, *(each.split(batch.lengths) for each in (batch.tokens, batch.targets, batch.positions)), strict=True
    ):
        assert tokens.tolist() == ids.tolist()
        assert positions.tolist() == list(range(len(ids)))
        assert targets.tolist() == [
            *(int(t) if on else IGNORE for t, on in zip(ids[1:], mask[1:], strict=True)),
            IGNORE,
        ]
    assert batch.answers == (3, 6, 3, 4, 3, 6)
    silent = build_batch(train, [1], silent=True)
    assert (silent.answers, silent.members, silent.counts, silent.columns["margin"].tolist()) == (
        (3, 5), (2,), False, [1.0],
    )  # fmt: skip


def test_keys_of_data_work_on_pairs(opened: Any, chatml: Any, make_tokenizer: Any) -> None:
    row = {"q": "Q1", "good": [told("A1"), asked("Q2"), told("A2")], "bad": [told("A3")], "weight": 2}
    fields = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    keys = {"fields": fields, "system": "S0", "train_on": "last", "ignore": ["weight"]}
    data = opened([row], **keys)
    (before, first), (other, second) = said(chatml, data.train)
    assert before.startswith(SYSTEM + HEAD)
    assert (first, second, other) == ("A2<|im_end|>", "A3<|im_end|>", SYSTEM + HEAD)
    tools = make_tokenizer("{% for tool in tools or [] %}{{ tool['function']['name'] }}{% endfor %}" + CHATML)
    pair = {**SHAPES["text"][0], "tools": [TOOL]}
    assert said(tools, opened([pair], tokenizer=tools).train)[1] == (f"add{HEAD}", "A2<|im_end|>")
    with pytest.raises(ValueError, match=r"data.verify must be none for preference pairs"):
        opened([pair], verify="exact")
