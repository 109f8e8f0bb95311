"""Rows with a verdict, a label or a weight: what is read, what is refused, and what reaches the batch."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dsft.data.batch import build_batch
from dsft.data.open import open_data
from tests.unit.data.turns import asked, told

RATED = {"prompt": "Q1", "completion": "A1", "label": True}
CHAT = {"messages": [asked("Q1"), told("A1")], "label": 1}
TEXT = {"text": "T1", "label": 0}


@pytest.fixture
def opened(chatml: Any, source: Any, jsonl: Any, tmp_path: Path) -> Any:
    def door(wants: str, rows: Any, *, tokenizer: Any = chatml, **keys: Any) -> Any:
        if isinstance(rows, str):
            (tmp_path / "rows.csv").write_text(rows)
            keys["path"] = str(tmp_path / "rows.csv")
        local = source("local", **{"path": None if isinstance(rows, str) else jsonl(rows), **keys})
        return open_data(local, tokenizer, max_length=200, seed=0, wants=wants, cache_dir=tmp_path / "cache")

    return door


def test_a_rated_row_is_an_answer_with_a_verdict(opened: Any, chatml: Any, supervised: Any) -> None:
    rows = [RATED, {"prompt": [asked("Q1")], "completion": [told("A2")], "label": 0}, {**RATED, "label": "False "}]
    data = opened("rated", rows)
    assert [supervised(chatml, data.train, at) for at in range(3)] == [[f"A{n}<|im_end|>"] for n in (1, 2, 1)]
    assert data.train.columns["label"].tolist() == [1.0, 0.0, 0.0]
    turns = [asked("Q1"), told("A1"), asked("Q2"), told("A2")]
    chats = opened("rated", [{"messages": turns, "label": label} for label in (True, False)]).train
    assert [supervised(chatml, chats, at) for at in range(2)] == [["A2<|im_end|>"]] * 2
    batch = build_batch(data.train, [2, 0])
    assert (batch.columns["label"].tolist(), batch.columns["label"].dtype) == ([0, 1], torch.int64)
    assert batch.members == (1, 1)
    assert "labels: false 66.7 %, true 33.3 %" in data.audit.lines()
    assert opened("rated", "prompt,completion,label\nQ,A,true\nQ,A,0\n").train.columns["label"].tolist() == [1.0, 0.0]


LABELS = [
    ([TEXT, {**TEXT, "label": 2}], {}, [0, 2], 3),
    ([TEXT, {**TEXT, "label": "1"}, {**TEXT, "label": 2.0}, {**TEXT, "label": True}], {}, [0, 1, 2], 3),
    ([{**TEXT, "label": "good"}, {**TEXT, "label": "bad "}], {"labels": ["bad", "good"]}, [1, 0], 2),
    ([{**TEXT, "label": 1}, {**TEXT, "label": "bad"}], {"labels": ["bad", "good"]}, [1, 0], 2),
    ([{**TEXT, "label": 1}, {**TEXT, "label": "3"}], {"labels": ["1", "2", "3"]}, [0, 2], 3),
    ("text,label\na,spam\nb,ham\n", {"labels": ["ham", "spam", "eggs"]}, [1, 0], 3),
    ([{"sentence": "a", "stars": 4}, {"sentence": "b", "stars": 0}], {"fields": {"text": "sentence", "label": "stars"}},
     [4, 0], 5),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "keys", "labels", "classes"), LABELS)
def test_labels_are_numbers_or_places_in_the_list(
    rows: Any, keys: Any, labels: list[int], classes: int, opened: Any
) -> None:
    data = opened("labelled", rows, **keys)
    assert (data.train.columns["label"].tolist(), data.classes) == (labels, classes)


def test_no_token_of_a_labelled_row_is_supervised(opened: Any, chatml: Any, make_tokenizer: Any) -> None:
    data = opened("labelled", [CHAT, TEXT, {"messages": [told("A1"), asked("Q2")], "label": 0}, CHAT], system=None)
    train = data.train
    assert [chatml.decode(train.example(at)[0].tolist()) for at in (0, 1)] == [
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n", "T1<|im_end|>",
    ]  # fmt: skip
    assert (len(train), data.audit.train.duplicates, data.audit.train.zero_mask) == (3, 1, 0)
    assert train.supervised.tolist() == [0, 0, 0]
    assert build_batch(train, [0, 2]).answers == (0, 0)
    tokens = sum(map(int, train.lengths))
    lines = [f"train: 4 rows, 3 kept (1 duplicate dropped), {tokens} tokens", "labels: 0 66.7 %, 1 33.3 %"]
    assert data.audit.lines() == lines
    assert data.audit.heading == "an example:"
    plain = make_tokenizer(None)
    named = opened("labelled", [TEXT, {**TEXT, "label": "b"}], tokenizer=plain, labels=["0", "b"])
    assert named.train.supervised.tolist() == [0, 0]
    assert "labels: 0 0 50.0 %, 1 b 50.0 %" in named.audit.lines()
    assert "warning: 1 row has the text of an earlier row and another label" in named.audit.lines()
    third = opened("labelled", [TEXT, {**TEXT, "label": "b"}], tokenizer=plain, labels=["0", "b", "c"]).audit.lines()
    assert any(
        line.startswith("warning: no row that is kept has the label c, which data.labels lists") for line in third
    )


BAD = [
    ("rated", RATED, {"label": "maybe"}, "true or false .* in the field label, got 'maybe'"),
    ("rated", RATED, {"label": 2}, "true or false .* got 2"),
    ("rated", RATED, {"label": None}, "true or false .* got null"),
    ("rated", CHAT, {"messages": [asked("Q1")]}, "end with the assistant turn .*, got a turn of the role user"),
    ("rated", RATED, {"prompt": None}, "text both, or as lists of turns both, got null and str"),
    ("labelled", TEXT, {"label": -1}, "a whole number of 0 or more in the field label, got -1"),
    ("labelled", TEXT, {"label": 0.5}, "a whole number .* got 0.5"),
    ("labelled", TEXT, {"label": [1]}, "a whole number .* got list"),
    ("labelled", TEXT, {"text": 7}, "text in the field text, or a list in messages, got int"),
    ("labelled", CHAT, {"messages": []}, "at least one turn"),
    ("text", {"text": "a"}, {"weight": -1}, "a number of 0 or more in the field weight, got -1"),
    ("text", {"text": "a"}, {"weight": "x"}, "a finite number in the field weight, got 'x'"),
    ("text", {"text": "a"}, {"weight": [1]}, "a finite number in the field weight, got list"),
]


@pytest.mark.parametrize(("wants", "good", "change", "message"), BAD)
def test_a_bad_row_is_refused_with_its_line(
    wants: str, good: Any, change: Any, message: str, source: Any, jsonl: Any
) -> None:
    _, found, _ = source("local", path=jsonl([good, {**good, **change}, good])).rows(wants)
    assert re.search(rf"rows\.jsonl:2 must .*{message}.*; .*data\.on_bad_row=skip$", found.reason), found.reason


def test_a_label_outside_of_the_list_is_a_bad_row(source: Any, jsonl: Any) -> None:
    rows = [{**TEXT, "label": label} for label in ("bad", "ugly", 2, -1)]
    good, *bad = source("local", path=jsonl(rows), labels=["bad", "good"]).rows("labelled")
    assert good.columns == {"label": 0.0}
    assert all("must have one of data.labels (bad good) in the field label, got " in row.reason for row in bad)


PAIR = {"prompt": "Q1", "chosen": "A1", "rejected": "A2"}
QA = {"question": "Q1", "answer": "A1"}
REFUSED: list[tuple[str, Any, dict[str, Any], str]] = [
    ("text", [PAIR], {},
     "got preference pairs .* at .*:1; set objective=dpo or objective=reward, or to learn the chosen answers alone"),
    ("text", [RATED], {}, "column label, got True: a label is not learned; set objective="),
    ("pair", [QA], {}, "preference pairs .*prompt, chosen and rejected, got examples of one answer .*objective=sft$"),
    ("pair", [TEXT], {}, r"got texts with a label at .*; set objective=classification and data.labels$"),
    ("pair", [QA], {"format": "question_answer"}, "got examples of one answer .*; set objective=sft$"),
    ("rated", [QA], {}, "must be answers with a verdict .* or messages and label, got examples of one answer"),
    ("labelled", [RATED], {}, "must be texts with a label .*, got answers with a verdict .*; set objective=kto$"),
    ("rated", [{"a": 1}], {}, r"known format \(prompt, completion and label, or mess.*\), got the fields a; set"),
    ("rated", [RATED, RATED], {"dedup": False}, "rows of two labels or more, got true in all 2 rows; there is nothing"),
    ("labelled", [CHAT], {}, "rows of two labels or more, got 1 in all 1 rows"),
    ("labelled", [{**TEXT, "label": f"n{i}"} for i in range(12)], {},
     r"labels=\[n0,n1,n10,n11,n2,n3,n4,n5,n6,n7,\.\.\.\]$"),
    ("labelled", [TEXT], {"labels": ["a", "a"]}, "must list two labels or more, each once, got a a"),
    ("labelled", [CHAT], {"train_on": "last"}, "data.train_on must be all for texts with a label, .* is, got last"),
    ("labelled", [CHAT], {"verify": "exact"}, "data.verify must be none for texts with a label"),
    ("rated", [RATED], {"labels": ["a", "b"]}, "data.labels must be null for answers with a verdict .*, got a b"),
    ("rated", [{**RATED, "weight": 2}], {}, "weight, got 2: rows are weighted by the column weight alone, where"),
    ("text", [{"text": "a", "loss_weight": 2}], {}, "column loss_weight, .*set data.fields.weight=loss_weight"),
]  # fmt: skip


@pytest.mark.parametrize(("wants", "rows", "keys", "message"), REFUSED)
def test_rows_of_another_kind_and_idle_keys_are_refused(
    wants: str, rows: Any, keys: Any, message: str, opened: Any
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        opened(wants, rows, on_bad_row="skip" if "known format" not in message else "stop", **keys)
    assert "\n" not in str(caught.value)


def test_a_weight_reaches_the_batch_and_0_leaves_the_row_out(opened: Any) -> None:
    rows = [QA, {**QA, "weight": 0.5}, {**QA, "weight": 0}, {**QA, "weight": 1}, {**QA, "weight": None}]
    data = opened("text", rows)
    assert data.train.columns["weight"].tolist() == [1.0, 0.5]
    assert build_batch(data.train, [1, 1, 0]).columns["weight"].tolist() == [0.5, 0.5, 1.0]
    assert (data.audit.train.zero_weight, data.audit.train.duplicates) == (1, 2)
    assert "(1 of weight 0, 2 duplicates dropped)" in data.audit.lines()[0]
    assert "weights of rows: from 0.5 to 1, 0.75 on average" in data.audit.lines()
    assert '"reason": "its weight is 0"' in (data.train.folder.parent / "skipped_rows.jsonl").read_text()
    named = opened("text", [{**QA, "w": 2}, {**QA, "w": 3}], fields={"weight": "w"}).train
    assert named.columns["weight"].tolist() == [2.0, 3.0]


def test_weights_that_are_all_1_leave_the_tokens_as_they_are(opened: Any) -> None:
    plain, ones = opened("text", [QA]), opened("text", [{**QA, "weight": 1}])
    assert ones.digest == plain.digest
    assert not ones.train.columns
    assert opened("text", [{**QA, "weight": 2}]).digest != plain.digest


def test_a_mixture_is_of_one_kind_and_of_the_same_labels(opened: Any, source: Any, jsonl: Any, tmp_path: Path) -> None:
    paths = {name: jsonl(rows, f"{name}.jsonl") for name, rows in {"a": [PAIR], "b": [QA], "c": [TEXT, CHAT]}.items()}
    pairs, texts = (source("local", path=paths[name]) for name in "ab")
    mixed = source("mixture", sources={"a": pairs, "b": pairs}, weights={"a": 1, "b": 1}, dedup=False)
    chosen, _ = mixed.rows("pair")
    assert {chosen.source, chosen.rejected.source} <= {"a/a", "b/a"}
    with pytest.raises(ValueError, match=r"got examples of one answer at .*b\.jsonl:1; set objective=sft"):
        source("mixture", sources={"a": pairs, "b": texts}, weights={"a": 1, "b": 1}).check("pair")
    named = [source("local", path=paths["c"], labels=labels) for labels in (["a", "b"], ["b", "a"])]
    with pytest.raises(ValueError, match=r"data\.sources must all have the same labels"):
        source("mixture", sources=dict(zip("ab", named, strict=True)), weights={"a": 1, "b": 1})
    assert source("mixture", sources={"a": named[0]}, weights={"a": 1}).labels == ["a", "b"]
    with pytest.raises(ValueError, match=r"must be preference pairs .* got examples .* from data=reasoning_gym"):
        source("reasoning_gym").check("pair")


def test_a_held_out_share_of_pairs_is_pairs(opened: Any) -> None:
    rows = [{**PAIR, "prompt": f"Q{i}"} for i in range(20)]
    data = opened("pair", rows, eval_fraction=0.5, max_eval=3)
    assert (len(data.eval), data.eval.members.tolist(), data.verifiable) == (3, [2, 2, 2], ())
    assert opened("pair", rows[:1]).audit.overlap == 0


def test_the_audit_shows_a_pair_in_two_colours(opened: Any) -> None:
    audit = opened("pair", [{**PAIR, "chosen": "A11"}, {**PAIR, "prompt": "Q2"}]).audit
    assert "the chosen answer is the longer one in 50 % of the pairs" in audit.lines()
    for width in (None, 60):
        text = audit.coloured(width)
        styles = {str(span.style): text.plain[span.start : span.end] for span in text.spans if span.style != "dim"}
        assert styles == {"green": "A11<|im_end|>", "red": "A2<|im_end|>"}
        assert text.plain.count("Q1") == 1
        heads = [line for line in text.plain.split("\n") if not line.startswith("| ")]
        assert [head.split(",")[0] for head in heads] == ["chosen", "rejected"]
    assert "the rejected one in red" in audit.heading


@pytest.mark.parametrize(
    ("labels", "given"),
    [([7, 3], (3, 7, 7)), (["true", "false"], (False, True, True)), ([True, False], (False, True, True))],
)
def test_labels_that_are_numbers_or_truths_are_names(labels: list[Any], given: Any, opened: Any) -> None:
    rows = [{"text": f"text {number}", "label": label} for number, label in enumerate(given)]
    data = opened("labelled", rows, labels=labels, dedup=False)
    assert data.train.columns["label"].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(("change", "said"), [({"label": True}, "one of data.labels"), ({"text": " "}, "an empty one")])
def test_a_truth_that_is_no_label_and_an_empty_text_are_bad_rows(
    change: dict[str, Any], said: str, source: Any, jsonl: Any
) -> None:
    rows = [{**TEXT, "label": "no"}, {**TEXT, "label": "no", **change}]
    _, found = source("local", path=jsonl(rows), labels=["no", "yes"]).rows("labelled")
    assert said in found.reason
