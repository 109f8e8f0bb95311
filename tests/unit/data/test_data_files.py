import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsft.data.source import refuse_bad

ROWS = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(3)]


def _ids(source: Any) -> list[tuple[str, str]]:
    return [(f"{sample.source}:{sample.row}", sample.reference) for sample in source.rows()]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_suffix_gives_the_same_samples(suffix: str, source: Any, tmp_path: Path) -> None:
    path = tmp_path / f"train.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif suffix == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif suffix == "csv":
        path.write_text("question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in ROWS))
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    assert _ids(source("local", path=str(path))) == [(f"train:{i}", f"a{i}") for i in range(3)]


def test_row_numbers_are_line_indices_before_any_filtering(source: Any, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n\n{"text": "a"}\n{"text": "b"}')
    samples = list(source("local", path=str(tmp_path / "t.jsonl")).rows())
    assert [sample.row for sample in samples] == [0, 2, 3]


BAD = [
    ("t.txt", b"x", r"data.path must end with one of \.jsonl \.json \.csv \.parquet, got .*t\.txt"),
    ("t.jsonl", b"", r"data.path must hold rows, got the empty file .*t\.jsonl"),
    ("t.jsonl", b"\n\n", r"at least one row, got none in .*t\.jsonl"),
    ("t.json", b"[]", r"at least one row, got none in .*t\.json"),
    ("t.csv", b"text\n", r"at least one row, got none in .*t\.csv"),
    ("t.jsonl", b'{"text": "a"}\n{"text": "b', r"t\.jsonl:2 must be one JSON object a line: Unterminated"),
    ("t.jsonl", b'{"text": "a"}\n[1]\n', r"t\.jsonl:2 must be a JSON object, got list"),
    ("t.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"t\.jsonl:2 must be UTF-8"),
    (
        "t.jsonl",
        b'{"text": "a"}\n{"txt": "b", "n": 1}\n',
        r"t\.jsonl:2 must have the field text, got the fields txt, n",
    ),
    ("t.jsonl", b'{"text": "a"}\n{"text": 7}\n', r"t\.jsonl:2 must have text in the field text, got int"),
    ("t.jsonl", b'{"question": "a", "answer": null}\n', r"t\.jsonl:1 must have text in the field answer, got null"),
    ("t.jsonl", b'{"messages": "a"}\n', r"t\.jsonl:1 must have a list in the field messages, got str"),
    (
        "t.jsonl",
        b'{"messages": [{"role": "bot", "content": ""}]}\n',
        r"t\.jsonl:1 must have messages of the roles .* bot",
    ),
    ("t.jsonl", b'{"messages": [{"from": "gpt"}]}\n', r"t\.jsonl:1 must have text in each turn's value, got null"),
    ("t.jsonl", b'{"messages": []}\n', r"t\.jsonl:1 must hold at least one turn"),
    (
        "t.jsonl",
        b'{"q": "a"}\n',
        r"t\.jsonl:1 must have the fields of a known format .* got the fields q; set data.fields",
    ),
    ("t.jsonl", b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n', r"got preference pairs .* at .*t\.jsonl:1"),
    ("t.json", b'[{"text": "a"},\n{"text"', r"t\.json:2 must be valid JSON"),
    ("t.json", b'"text"', r"t\.json must hold a JSON array of objects or one object a line, got str"),
    ("t.csv", b"text,n\na,1\nb\n", r"t\.csv:3 must have 2 values like the header"),
    ("t.csv", b'text\na\n"b\n', r"t\.csv:3 must be valid CSV"),
    ("t.csv", b"text\na\n\xff\n", r"t\.csv:\d must be UTF-8"),
    ("t.parquet", b"PAR1 not really", r"t\.parquet must be a whole parquet file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_file_is_refused_in_one_line(name: str, content: bytes, message: str, source: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    local = source("local", path=str(tmp_path / name))
    with pytest.raises(ValueError, match=message) as caught:
        (local.check(), list(refuse_bad(local.rows(), local.skips)))
    assert "\n" not in str(caught.value)


def test_check_refuses_missing_file_and_folder(source: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.path must be a file that exists, got .*nowhere\.jsonl"):
        source("local", path=str(tmp_path / "nowhere.jsonl")).check()
    with pytest.raises(ValueError, match=r"data.path must be a file, got the folder"):
        source("local", path=str(tmp_path)).check()


def test_check_covers_the_eval_file(source: Any, jsonl: Any) -> None:
    good, bad = jsonl(ROWS), jsonl([{"x": 1}], "held.jsonl")
    with pytest.raises(ValueError, match=r"held\.jsonl:1 must have the fields"):
        source("local", path=good, eval_path=bad).check()


def test_check_reads_no_further_than_the_first_row(source: Any, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\nbroken\n')
    source("local", path=str(tmp_path / "t.jsonl")).check()


def test_fields_rename_columns(source: Any, jsonl: Any) -> None:
    path = jsonl([{"q": "x", "a": "y", "text": "z"}])
    local = source("local", path=path, format="question_answer", fields={"question": "q", "answer": "a"})
    assert _ids(local) == [("rows:0", "y")]
    with pytest.raises(
        ValueError, match=r"rows\.jsonl:1 must have the field b \(data.fields.answer\), got the fields q"
    ):
        source("local", path=path, fields={"question": "q", "answer": "b"}).check()
    with pytest.raises(ValueError, match=r"data.fields must rename some of"):
        source("local", path=path, fields={"qestion": "q"})


def test_a_renamed_field_decides_the_format(source: Any, jsonl: Any) -> None:
    path = jsonl([{"messages": [{"role": "user", "content": "m"}], "q": "x", "answer": "y"}])
    renamed = source("local", path=path, fields={"question": "q"})
    assert _ids(renamed) == [("rows:0", "y")]
    assert renamed.identity() == source("local", path=path, fields={"question": "q", "text": None}).identity()
    with pytest.raises(ValueError, match=r"data.fields must rename fields of the format messages, got question"):
        list(source("local", path=path, fields={"question": "q"}, format="messages").rows())


def test_sharegpt_speakers_become_roles(source: Any, jsonl: Any) -> None:
    turns = [{"from": who, "value": who} for who in ("system", "human", "gpt")]
    sample = next(source("local", path=jsonl([{"conversations": turns}])).rows())
    assert [message["role"] for message in sample.messages] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"eval_fraction": 1.0}, r"data.eval_fraction must be in \[0, 1\), got 1.0"),
        ({"max_eval": 0}, "data.max_eval must be 1 or more, got 0"),
        ({"eval_path": "b.jsonl", "eval_fraction": 0.1}, "data.eval_fraction must be 0 where data.eval_path"),
        ({"eval_path": "a.jsonl"}, "data.eval_path must differ from data.path"),
        ({"format": "chatty"}, "data.format must be one of"),
        ({"verify": "regex"}, "data.verify must be none or exact"),
    ],
)
def test_values_out_of_range_are_refused(keys: Any, message: str, source: Any) -> None:
    with pytest.raises(ValueError, match=message):
        source("local", path="a.jsonl", **keys)
