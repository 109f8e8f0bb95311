"""Rows and files that users of this field meet: each is refused in one line with its place and a way out."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsft.data.open import open_data
from dsft.data.source import refuse_bad

USER, BOT = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
CHAT = {"messages": [USER, BOT]}
SHARE = {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}
ALPACA = {"instruction": "a", "input": "", "output": "b"}
PAIR = {"prompt": "a", "completion": "b"}
TEXT = {"text": "a"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def _say(**keys: Any) -> dict[str, Any]:
    """A conversation whose answer has these keys beside its role."""
    return {"messages": [USER, {"role": "assistant", **keys}]}


def _ask(**keys: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", **keys}, BOT]}


def _share(speaker: str) -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": "?"}, *SHARE["conversations"]]}


ROWS: list[tuple[Any, Any, str]] = [
    (CHAT, _say(content=None), "text in each turn's content, got null"),
    (CHAT, _say(), "text in each turn's content, got null"),
    (CHAT, _say(content={"text": "!"}), "text in each turn's content, got dict"),
    (CHAT, _say(content=4.5), "text in each turn's content, got float"),
    (CHAT, _ask(content=[{"type": "image_url", "image_url": {"url": "a.png"}}]), "got image_url: only text is read"),
    (CHAT, _ask(content=[{"type": "input_audio", "input_audio": {}}]), "got input_audio: only text is read"),
    (CHAT, _ask(content=["a", "b"]), "parts of the type text in a turn's content, got str"),
    (CHAT, _ask(content="?", images=["a.png"]), "the key of a turn images, got list: only text is read"),
    (CHAT, _say(content="!", audio={"id": "x"}), "the key of a turn audio, got dict: only text is read"),
    (CHAT, _say(content="!", weight=0.5), "0 or 1 .* as a turn's weight, got 0.5"),
    (CHAT, _say(content="!", weight=2), "0 or 1 .* as a turn's weight, got 2"),
    (CHAT, _say(content="!", weight="1"), "0 or 1 .* as a turn's weight, got '1'"),
    (CHAT, _say(content="!", train="false"), "0 or 1 .* as a turn's train, got 'false'"),
    (CHAT, _say(content="!", loss=[1]), "0 or 1 .* as a turn's loss, got list"),
    (CHAT, _say(content="!", weight=1, train=False), "got weight and train that differ"),
    (CHAT, _ask(content="?", train=True), "supervise assistant turns alone, got train=True in a user turn"),
    (CHAT, _ask(content="?", weight=1), "supervise assistant turns alone, got weight=1 in a user turn"),
    (CHAT, _say(tool_calls=CALL), "a list of objects in tool_calls, got dict"),
    (CHAT, _say(tool_calls="f()"), "a list of objects in tool_calls, got str"),
    (CHAT, _ask(content="?", tool_calls=[CALL]), "tool_calls in assistant turns, got them in a user turn"),
    (CHAT, _say(function_call="f()"), "a function_call with a name, in a turn, got str"),
    (CHAT, _say(tool_calls=[CALL], function_call={"name": "f"}), "tool_calls, or a function_call with a name"),
    (CHAT, {"messages": [USER, {"role": "bot", "content": "!"}]}, "messages of the roles .*, got bot"),
    (CHAT, {"messages": [USER, {"content": "!"}]}, "turns with role and content, got the fields content"),
    (CHAT, {"messages": [USER, {"role": None, "content": "!"}]}, "text in each turn's role, got null"),
    (CHAT, {"messages": [USER, {"from": "gpt", "value": "!"}]}, "turns with role and content, got the fields from"),
    (CHAT, {"messages": [[USER, BOT]]}, "turns with role and content, got list"),
    (CHAT, {"messages": [USER, "!"]}, "turns with role and content, got str"),
    (CHAT, {"messages": []}, "at least one turn, got an empty conversation"),
    (CHAT, {"messages": None}, "a list in the field messages, got null"),
    (CHAT, {"messages": USER}, "a list in the field messages, got dict"),
    (CHAT, {"messages": "[{'role': 'user'}]"}, "JSON in the field messages, got text that is none"),
    (CHAT, {**CHAT, "tools": "get_weather(city)"}, "JSON in the field tools, got text that is none"),
    (CHAT, {**CHAT, "tools": [1]}, "a list of objects in the field tools, got a list of other things"),
    (CHAT, {**CHAT, "tools": 7}, "a list of objects in the field tools, got int"),
    (CHAT, {"messages": [{"role": "system", "content": "a"}, USER, BOT], "system": "b"}, "one system turn"),
    (CHAT, {**CHAT, "system": ["a"]}, "text in the field system, got list"),
    (CHAT, {**CHAT, "images": ["a.png"]}, "the column images, got list: only text is read"),
    (CHAT, _say(content=[{"type": "text", "text": "!", "train": False}]), "no train in a part of a turn's content"),
    (SHARE, _share("hummany"), "conversations from .*, got hummany"),
    (SHARE, _share("gpt4"), "conversations from .*, got gpt4"),
    (SHARE, {"conversations": [{"value": "?"}]}, "turns with from and value, got the fields value"),
    (ALPACA, {**ALPACA, "history": ["a", "b"]}, r"pairs of texts \[question, answer\] in the field history, got str"),
    (ALPACA, {**ALPACA, "history": [["a", "b", "c"]]}, "in the field history, got a list of 3"),
    (ALPACA, {**ALPACA, "history": {"a": "b"}}, "a list of pairs in the field history, got dict"),
    (ALPACA, {**ALPACA, "input": 7}, "text in the field input, got int"),
    (ALPACA, {**ALPACA, "output": float("nan")}, "text in the field output, got float"),
    (ALPACA, {"instruction": "a", "response": "b"}, "the field output, got the fields instruction, response"),
    (PAIR, {"prompt": [USER], "completion": "b"}, "text both, or as lists of turns both, got list and str"),
    (PAIR, {"prompt": [USER], "completion": [USER, BOT]}, "a completion that goes on from the prompt"),
    (PAIR, {"prompt": [BOT], "completion": [USER]}, "an assistant turn in the completion, got none"),
    (PAIR, {"prompt": "a", "completion": ["b"]}, "text both, or as lists of turns both, got str and list"),
    (TEXT, {"text": ["a"]}, "text in the field text, got list"),
    (TEXT, {"text": "\ud83d"}, r"whole characters, got half of one \(\\ud83d\)"),
]  # fmt: skip


MEANT: list[tuple[Any, Any, str]] = [
    (CHAT, _say(content="!", train_detail=[{"begin_offset": 0}]), "the key of a turn train_detail, got list"),
    (CHAT, _say(content="!", loss_scale=0.1), "the key of a turn loss_scale, got 0.1"),
    (CHAT, _say(content="", refusal="No."), "the key of a turn refusal, got str: the answer is in it"),
    (CHAT, {**CHAT, "functions": [{"name": "f"}]}, r"the column functions, .*set data.fields.tools=functions"),
    (CHAT, {**CHAT, "system_prompt": "Hi"}, r"the column system_prompt, .*set data.fields.system=system_prompt"),
    (CHAT, {**CHAT, "loss_weight": 0.5}, "the column loss_weight, got 0.5: rows .*set data.fields.weight=loss_weight"),
    (CHAT, {**CHAT, "score": 4.5}, "the column score, got 4.5"),
    (CHAT, {**CHAT, "chosen": [BOT], "rejected": [BOT]}, "the column (chosen|rejected), got list: a row is learned"),
    (CHAT, {**CHAT, "documents": [{"title": "a"}]}, "the column documents, got list"),
    (CHAT, {**CHAT, "chat_template_kwargs": {"enable_thinking": False}}, "the column chat_template_kwargs, got dict"),
    (SHARE, {**SHARE, "history": [["a", "b"]]}, "the column history, got list"),
    (PAIR, {**PAIR, "label": True}, "the column label, got True: a label is not learned"),
    ({"question": "a", "answer": "b"}, {"question": "a", "context": "c", "answer": "b"}, "the column context, got str"),
    (TEXT, {**TEXT, "label": 1}, "the column label, got 1"),
    (TEXT, {**TEXT, "input_ids": [1, 2]}, "the column input_ids, got list: tokens are made from the text"),
    (TEXT, {**TEXT, "system": "Hi"}, "the column system, got str: this format has no system turn"),
    (CHAT, {**CHAT, "score": 1}, "the column score, got 1"),
    (CHAT, {**CHAT, "train": False}, "the column train, got False"),
    (CHAT, _say(content="!", loss_mask=False), "the key of a turn loss_mask, got False"),
    (CHAT, _say(content="!", function_calls="f()"), "the key of a turn function_calls, got str.*tool_calls"),
    (CHAT, {"messages": [{"role": "system", "content": "", "tools": [1]}, USER, BOT]}, "the key of a turn tools, got"),
    (PAIR, {**PAIR, "label": False}, "the column label, got False: a label is not learned"),
    (PAIR, {**PAIR, "input": "a"}, "the column input, got str: the prompt lacks it"),
    (PAIR, {**PAIR, "reasoning": "a"}, "the column reasoning, got str: the answer lacks it"),
]  # fmt: skip
"""Values that speak of all rows: leaving out those that have them would train on what somebody weighted down."""


@pytest.mark.parametrize(("good", "bad", "message"), MEANT)
@pytest.mark.parametrize("on_bad_row", ["stop", "skip"])
def test_what_would_change_the_meaning_is_refused_and_never_skipped(
    on_bad_row: str, good: Any, bad: Any, message: str, source: Any, jsonl: Any
) -> None:
    local = source("local", path=jsonl([good, bad, good]), on_bad_row=on_bad_row)
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2 must .*{message}.*data\.ignore=\[\w+\]$"):
        list(refuse_bad(local.rows(), local.skips))


@pytest.mark.parametrize(("good", "bad", "message"), ROWS)
def test_bad_row_is_refused_with_its_line_or_skipped(
    good: Any, bad: Any, message: str, source: Any, jsonl: Any
) -> None:
    path = jsonl([good, bad, good])
    stopping, skipping = source("local", path=path), source("local", path=path, on_bad_row="skip")
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2 must .*{message}.*data.on_bad_row=skip$") as caught:
        list(refuse_bad(stopping.rows(), stopping.skips))
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)
    kept = list(refuse_bad(skipping.rows(), skipping.skips))
    assert [sample.row for sample in kept] == [0, 2]


DEEP = "[" * 100_000 + "]" * 100_000
FILES: list[tuple[str, bytes | str, str]] = [
    ("t.jsonl", '{"text": "a"}\n{"text": "b"} {"text": "c"}\n', r"t\.jsonl:2 must be one JSON object a line: Extra"),
    ("t.jsonl", '{"text": "a"}\n{"text": "b"},\n', r"t\.jsonl:2 must be one JSON object a line: Extra data"),
    ("t.jsonl", '{"text": "a"}\n{\'text\': \'b\'}\n', r"t\.jsonl:2 must be one JSON object a line: Expecting property"),
    ("t.jsonl", '// rows\n{"text": "a"}\n', r"t\.jsonl:1 must be one JSON object a line: Expecting value"),
    ("t.jsonl", '{"text": "a"}\n{"text": "b', r"t\.jsonl:2 must be one JSON object a line: Unterminated string"),
    ("t.jsonl", '{"text": "a"}\nnull\n', r"t\.jsonl:2 must be a JSON object, got null"),
    ("t.jsonl", '{"text": "a"}\n{"text": "b", "n": ' + DEEP + "}\n", r"t\.jsonl:2 must not be nested so deep"),
    ("t.jsonl", '{"text": "a"}\n{"text": "b", "n": ' + "9" * 5000 + "}\n", r"t\.jsonl:2 must not hold a number"),
    ("t.jsonl", '{"text": "a", "text": "b"}\n', r"t\.jsonl:1 must name each field once, got text twice"),
    ("t.jsonl", '{"text": "a"}\n'.encode("utf-16"), r"t\.jsonl:1 must be UTF-8, got UTF-16"),
    ("t.jsonl", '{"data": [{"text": "a"}]}\n', r"t\.jsonl:1 .* got the fields data; if data holds the rows, write"),
    ("t.jsonl", '{"text": {"0": "a", "1": "b"}}\n', r"t\.jsonl:1 .* got dict; .*to_json\(orient='records'"),
    ("t.json", '{"data": [\n{"text": "a"}]}', r"t\.json must hold .* rows below 'data'; .*jq '\.data' t\.json"),
    ("t.json", '{\n"text": "a"\n}', r"t\.json must hold .* one object over several lines; .*jq -c"),
    ("t.json", '{\n"text": "a"\n}\n{\n"text": "b"\n}', r"t\.json:1 must be one JSON object a line"),
    ("t.json", '[{"text": "a"},\n]', r"t\.json:2 must be valid JSON: a comma stands before the end"),
    ("t.json", '[{"text": "a"}\n{"text": "b"}]', r"t\.json:1 must be valid JSON: Expecting ','"),
    ("t.json", '[{"text": "a"}]\n[]', r"t\.json:2 must be valid JSON: something stands after"),
    ("t.json", '[{"text": "a"},\n["b"]]', r"t\.json row 1 must be a JSON object, got list"),
    ("t.json", '[{"text": "a"},\n{"text": "b", "n": ' + DEEP + "}]", r"t\.json:2 must not be nested so deep"),
    ("t.json", '[{"text": "a"},\n{"text": "b", "n": ' + "9" * 5000 + "}]", r"t\.json:2 must not hold a number of more"),
    ("t.json", '[{"text": "a", "text": "b"}]', r"t\.json:1 must name each field once, got text twice"),
    ("t.json", b'[{"text": "a"},\n{"text": "\xff"}]', r"t\.json:2 must be UTF-8"),
    ("t.json", "text", r"t\.json:1 must be valid JSON: Expecting value"),
    ("t.csv", "instruction;output\na;b\n", r"t\.csv:1 must separate values by commas, .* separated by semicolons"),
    ("t.csv", "instruction\toutput\na\tb\n", r"t\.csv:1 must separate values by commas, .* separated by tabs"),
    ("t.csv", "text,n,text\na,1,b\n", r"t\.csv:1 must name each column once, got text twice"),
    ("t.csv", 'text\n"a" b\n', r"t\.csv:2 must be valid CSV"),
    ("t.csv", "text,label\na,spam\n", r"t\.csv:2 must not have the column label"),
    ("t.csv", 'text\n"a,\nb",c\nd\n', r"t\.csv:2 must have 1 values like the header, got 2"),
    ("t.csv", "text\na\n".encode("utf-16"), r"t\.csv:1 must be UTF-8"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), FILES, ids=[message[:40] for *_, message in FILES])
def test_bad_file_is_refused_with_its_line(
    name: str, content: bytes | str, message: str, source: Any, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    local = source("local", path=str(tmp_path / name))
    with pytest.raises(ValueError, match=message) as caught:
        (local.check(), list(refuse_bad(local.rows(), local.skips)))
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)


def test_bad_tables_are_refused_with_their_row(source: Any, tmp_path: Path) -> None:
    broken = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff"))
    tables = {
        "twice": (pa.Table.from_arrays([broken, broken], ["text", "text"]), "must name each column once"),
        "bytes": (pa.table({"text": [b"a"]}), "row 0 must have text in the field text, got bytes"),
        "null": (pa.table({"text": ["a", None]}), "row 1 must have text in the field text, got null"),
        "broken": (pa.Table.from_arrays([broken], ["text"]), "row 1 must hold values that can be read, got .*utf-8"),
    }  # fmt: skip
    for name, (table, message) in tables.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
        local = source("local", path=str(tmp_path / f"{name}.parquet"))
        with pytest.raises(ValueError, match=rf"{name}\.parquet.* {message}.*; "):
            list(refuse_bad(local.rows(), local.skips))


@pytest.mark.parametrize(
    ("row", "keys", "message"),
    [
        (CHAT, {"ignore": ["wieght"]}, "data.ignore must name columns that some row has, got wieght"),
        (
            CHAT,
            {"ignore": ["a"], "fields": {"messages": "a"}},
            "data.ignore must name columns that are not read, got a",
        ),
        (CHAT, {"train_on": "first"}, "data.train_on must be all or last, got first"),
        (CHAT, {"on_bad_row": "drop"}, "data.on_bad_row must be stop or skip, got drop"),
        (TEXT, {"train_on": "last"}, "data.train_on must be all for plain text, as .*:1 is, got last"),
        (TEXT, {"system": "Hi"}, "data.system must be null for plain text, as .*:1 is, got Hi"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"on_bad_row": "skip"}, "got preference pairs"),
    ],
)
def test_keys_that_do_not_go_with_the_rows_are_refused(
    row: Any, keys: Any, message: str, source: Any, jsonl: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        list(source("local", path=jsonl([row]), **keys).rows())


def test_skipped_rows_are_counted_and_listed_and_the_list_is_cached(
    chatml: Any, source: Any, jsonl: Any, tmp_path: Path
) -> None:
    path = Path(jsonl([{"text": "abc"}, {"text": 7}, {"text": "long " * 20}, {"text": "abc"}, {"text": "def"}]))
    path.write_text(path.read_text() + "{broken\n")
    keys = {"max_length": 50, "seed": 0, "cache_dir": tmp_path}
    local = source("local", path=str(path), on_bad_row="skip")
    for data in (open_data(local, chatml, **keys), open_data(local, chatml, **keys)):
        counts = data.audit.train
        assert (counts.rows, counts.kept, counts.bad, counts.over_long, counts.duplicates) == (6, 2, 2, 1, 1)
        listed = [
            json.loads(line) for line in (data.train.folder.parent / "skipped_rows.jsonl").read_text().splitlines()
        ]
        assert [row["id"] for row in listed] == ["rows:1", "rows:2", "rows:5"]
        assert listed[0]["place"] == f"{path}:2"
        assert "got int" in listed[0]["reason"]
        assert listed[1]["reason"] == "101 tokens, more than train.max_length=50"
        assert data.audit.lines()[0].startswith("train: 6 rows, 2 kept (2 bad, 1 over-long, 1 duplicate dropped), ")
        assert "skipped_rows.jsonl in the run folder" in data.audit.lines()[1]
    with pytest.raises(ValueError, match=r"rows\.jsonl:2 must have text in the field text, got int"):
        open_data(source("local", path=str(path)), chatml, **keys)


def test_rows_that_are_all_bad_are_refused_with_the_first_reason(
    chatml: Any, source: Any, jsonl: Any, tmp_path: Path
) -> None:
    local = source("local", path=jsonl([{"q": 1}, {"q": 2}]), on_bad_row="skip")
    local.check()
    with pytest.raises(
        ValueError, match=r"must hold a row that can be used, got 2 bad ones, the first: .*rows\.jsonl:1"
    ):
        open_data(local, chatml, max_length=50, seed=0, cache_dir=tmp_path)
