"""Keys of data that say what is read, kept and supervised, through the door: tokens, masks, counts and lines."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsft.compose import build
from dsft.data.audit import Audit
from dsft.data.open import open_data
from dsft.data.skipped import NAME, copy_skipped
from dsft.data.source import BadRow

CHAT = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
QA = {"question": "1", "answer": "2"}


@pytest.fixture
def opened(chatml: Any, tmp_path: Path) -> Any:
    return lambda source: open_data(source, chatml, max_length=200, seed=0, cache_dir=tmp_path / "cache")


def _turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


WHOLE = [
    (
        {"conversations": [{"from": "human", "value": "1"}, {"from": "bing", "value": "2"}], "system": "x"},
        [("system", "x"), ("user", "1"), ("assistant", "2")],
    ),
    (
        {"instruction": "i", "output": "o", "history": [["1", "2"]], "system": "x"},
        [("system", "x"), ("user", "1"), ("assistant", "2"), ("user", "i"), ("assistant", "o")],
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "1"}]}, {"role": "gpt", "content": "2"}]},
        [("user", "1"), ("assistant", "2")],
    ),
    (
        {"prompt": [{"role": "user", "content": "1"}], "completion": [{"role": "assistant", "content": "2"}]},
        [("user", "1"), ("assistant", "2")],
    ),
    ({**QA, "system": "x"}, [("system", "x"), ("user", "1"), ("assistant", "2")]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "turns"), WHOLE)
def test_tokens_and_mask_are_those_written_by_hand(
    row: Any, turns: Any, opened: Any, source: Any, jsonl: Any, chatml: Any, supervised: Any
) -> None:
    train = opened(source("local", path=jsonl([row]))).train
    assert chatml.decode(train.example(0)[0].tolist()) == "".join(_turn(*turn) for turn in turns)
    assert supervised(chatml, train, 0) == [f"{said}<|im_end|>" for role, said in turns if role == "assistant"]


TWICE = [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")]
MARKED = [
    ({1: {"weight": 0}}, "all", ["4"]),
    ({1: {"train": False}, 3: {"train": True}}, "all", ["4"]),
    ({3: {"weight": 0}}, "all", ["2"]),
    ({}, "last", ["4"]),
    ({1: {"weight": 1}}, "last", ["4"]),
]


@pytest.mark.parametrize(("marks", "train_on", "learned"), MARKED)
def test_marks_and_train_on_say_which_turns_are_supervised(
    marks: Any, train_on: str, learned: list[str], opened: Any, source: Any, jsonl: Any, chatml: Any, supervised: Any
) -> None:
    turns = [{"role": role, "content": said, **marks.get(at, {})} for at, (role, said) in enumerate(TWICE)]
    train = opened(source("local", path=jsonl([{"messages": turns}]), train_on=train_on)).train
    assert chatml.decode(train.example(0)[0].tolist()) == "".join(_turn(*turn) for turn in TWICE)
    assert supervised(chatml, train, 0) == [f"{said}<|im_end|>" for said in learned]


TOOLS = [{"type": "function", "function": {"name": "sum", "parameters": {"type": "object", "properties": {}}}}]


def test_tools_stand_in_the_prompt_as_the_template_writes_them(
    make_tokenizer: Any, source: Any, jsonl: Any, tmp_path: Path
) -> None:
    template = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    tokenizer = make_tokenizer(template + make_tokenizer().chat_template)
    rows = jsonl([{**CHAT, "tools": json.dumps(TOOLS)}])
    data = open_data(source("local", path=rows), tokenizer, max_length=400, seed=0, cache_dir=tmp_path / "cache")
    whole = tokenizer.apply_chat_template(CHAT["messages"], tools=TOOLS, tokenize=False)
    assert tokenizer.decode(data.train.example(0)[0].tolist()) == whole
    assert '"sum"' in whole


def test_tools_that_a_template_does_not_read_are_refused_unless_ignored(opened: Any, source: Any, jsonl: Any) -> None:
    rows = jsonl([{**CHAT, "tools": TOOLS}])
    with pytest.raises(ValueError, match=r"rows\.jsonl:1 must offer no tools .* data\.ignore=\[tools\]"):
        opened(source("local", path=rows))
    assert len(opened(source("local", path=rows, ignore=["tools"])).train) == 1


def test_columns_that_are_not_read_are_named_once(opened: Any, source: Any, jsonl: Any) -> None:
    rows = [{"id": 1, **CHAT, "weight": 0.5}, {**CHAT, "source": "web", "id": 2}]
    lines = opened(source("local", path=jsonl(rows), ignore=["weight"])).audit.lines()
    assert lines[1:] == ["columns not read: id, weight, source"]


def test_ignored_marks_of_turns_leave_every_assistant_turn_supervised(source: Any, jsonl: Any) -> None:
    row = {"messages": [{**CHAT["messages"][0], "train": True}, {**CHAT["messages"][1], "train": False}]}
    (sample,) = source("local", path=jsonl([row]), ignore=["train"]).rows()
    assert sample.learned is None
    assert sample.messages == tuple(CHAT["messages"])


def test_ignored_columns_may_stand_in_the_held_out_file_alone(source: Any, jsonl: Any) -> None:
    paths = {"path": jsonl([CHAT]), "eval_path": jsonl([{**CHAT, "score": 3}], "held.jsonl")}
    local = source("local", **paths, ignore=["score"])
    assert len(list(local.rows())) == len(list(local.eval_rows())) == 1
    with pytest.raises(ValueError, match=r"held\.jsonl:1 must not have the column score"):
        source("local", **paths).check()


def test_repeated_rows_are_kept_where_dedup_is_off(opened: Any, source: Any, jsonl: Any) -> None:
    path = jsonl([QA, QA, QA])
    kept, once = opened(source("local", path=path, dedup=False)), opened(source("local", path=path))
    assert (kept.audit.train.kept, once.audit.train.kept, once.audit.train.duplicates) == (3, 1, 2)
    assert [kept.train.id(row) for row in range(3)] == ["rows:0", "rows:1", "rows:2"]
    assert kept.audit.lines()[0].startswith("train: 3 rows, all kept, ")
    mixed = {"sources": {"a": source("local", path=path)}, "weights": {"a": 1}}
    assert opened(source("mixture", **mixed, dedup=False)).audit.train.kept == 3
    with pytest.raises(ValueError, match=r"data\.sources\.a\.dedup must be True, got False; set data\.dedup"):
        source("mixture", sources={"a": source("local", path=path, dedup=False)}, weights={"a": 1})


def test_keys_enter_the_identity_only_where_they_are_set(source: Any, jsonl: Any) -> None:
    local = source("local", path=jsonl([CHAT]))
    columns = {"format": "auto", "fields": {}, "system": None, "verify": "none"}
    assert local.identity() == {**local.identity(), "columns": columns}
    assert set(local.identity()) == {"source", "files", "columns"}
    changed = [{"train_on": "last"}, {"on_bad_row": "skip"}, {"dedup": False}, {"ignore": ["a"]}]
    found = [json.dumps(dataclasses.replace(local, **keys).identity()) for keys in [{}, *changed]]
    assert len(set(found)) == 5


def test_sources_that_are_older_than_a_key_are_built_as_before(source: Any, jsonl: Any) -> None:
    local = source("local", path=jsonl([CHAT]))
    later = ("train_on", "on_bad_row", "dedup", "ignore")
    old = {key: value for key, value in dataclasses.asdict(local).items() if key not in later}
    target = {"_target_": "dsft.data.local.Local"}
    mixed = {"_target_": "dsft.data.mixture.Mixture", "sources": {"a": {**target, **old}}, "weights": {"a": 1.0}}
    mixed |= {"seed": 0, "eval_fraction": 0.0, "shuffle": True, "max_eval": None}
    tree = {"data": mixed}
    with pytest.raises(ValueError, match="checkpoint must be given"):
        build(tree)  # the whole of a run is asked for after its parts are built
    with pytest.raises(ValueError, match=r"data\.sources\.a\.path must be given"):
        build({"data": {**mixed, "sources": {"a": {**target, **{k: v for k, v in old.items() if k != "path"}}}}})
    with pytest.raises(ValueError, match=r"data\.sources\.a\.ignore must be"):
        build({"data": {**mixed, "sources": {"a": {**target, **old, "ignore": "weight"}}}})


def test_a_mixture_skips_the_bad_rows_of_the_sources_that_say_so(opened: Any, source: Any, jsonl: Any) -> None:
    bad = [QA, {"question": 1}, {"question": "3", "answer": "4"}]
    parts = {
        name: source("local", path=jsonl(bad, f"{name}.jsonl"), on_bad_row=key)
        for name, key in (("a", "skip"), ("b", "stop"))
    }
    mixed = source("mixture", sources={"a": parts["a"]}, weights={"a": 1})
    data = opened(mixed)
    assert (data.audit.train.rows, data.audit.train.bad, data.audit.train.kept) == (3, 1, 2)
    both = source("mixture", sources=parts, weights={"a": 1, "b": 1})
    first = [row for row in both.rows() if isinstance(row, BadRow)]
    assert [(row.source, both.skips(row)) for row in first] == [("a/a", True), ("b/b", False)]
    with pytest.raises(ValueError, match=r"b\.jsonl:2 must have"):
        opened(both)


def test_csv_fields_of_any_length_and_bad_lines_between_good_ones(source: Any, tmp_path: Path) -> None:
    path, long = tmp_path / "t.csv", "x" * 200_000
    path.write_bytes(f'text,id\n"{long}",1\na\n\nb\xff,2\n"c\nd",3\n'.encode("latin-1"))
    rows = list(source("local", path=str(path), on_bad_row="skip").rows())
    assert [isinstance(row, BadRow) for row in rows] == [False, True, True, False]
    assert [row.place.rpartition(":")[2] for row in rows] == ["2", "3", "5", "6"]
    assert (rows[0].plain[1], rows[3].plain[1], rows[3].row) == (long, "c\nd", 3)


def test_null_fields_that_a_table_adds_are_as_absent(source: Any, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    other = {"type": "function", "function": {"name": "g", "arguments": {"y": 2}}}
    rows = [
        {
            "messages": [CHAT["messages"][0], {"role": "assistant", "tool_calls": [one], "weight": weight}],
            "tools": [one],
        }
        for one, weight in ((call, None), (other, 0))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    first, second = source("local", path=str(tmp_path / "t.parquet")).rows()
    assert first.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert (first.learned, first.tools, second.learned, second.tools) == (None, (call,), (False, False), (other,))
    assert first.messages[0] == CHAT["messages"][0]


def test_folders_of_save_to_disk_are_read(source: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list([{**QA, "n": index} for index in range(3)])
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "test": one.select([0])}).save_to_disk(str(tmp_path / "many"))
    whole, many = source("hf", path=str(tmp_path / "one")), source("hf", path=str(tmp_path / "many"), eval_split="test")
    assert [(row.source, row.row, row.unread) for row in whole.rows()] == [("one", index, ("n",)) for index in range(3)]
    assert [row.source for row in many.eval_rows()] == ["many.test"]
    assert whole.identity()["splits"][0][1] == many.identity()["splits"][0][1]
    seen = one.add_column("look", [None] * 3).cast_column("look", datasets.Image())
    seen.save_to_disk(str(tmp_path / "seen"))
    assert [row.unread for row in source("hf", path=str(tmp_path / "seen")).rows()] == [("n", "look")] * 3
    for keys, message in (
        ({"split": "dev"}, r"splits of .*one \(train\), got dev"),
        ({"name": "x"}, "data.name must be"),
    ):
        with pytest.raises(ValueError, match=message):
            list(source("hf", path=str(tmp_path / "one"), **keys).rows())


def test_turns_that_render_to_nothing_are_warned_about(opened: Any, source: Any, jsonl: Any) -> None:
    audit: Audit = opened(source("local", path=jsonl([CHAT]))).audit
    assert len(audit.lines()) == 1
    silent = dataclasses.replace(audit, train=dataclasses.replace(audit.train, empty_turns=2))
    assert silent.lines()[1].startswith("warning: 2 supervised turns render to nothing but an end of turn: ")


def test_endings_are_said_only_where_some_lack_their_token(opened: Any, source: Any, jsonl: Any) -> None:
    counts = opened(source("local", path=jsonl([CHAT]))).audit.train
    assert counts.line().endswith(", all answers end with an end-of-turn token")
    assert dataclasses.replace(counts, truncated=1).line().endswith(", 1 answer ends without an end-of-turn token")
    assert "dropped" not in counts.line()


def test_the_run_folder_gets_the_list_only_if_a_row_is_in_it(tmp_path: Path) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    for folder in (cache, run):
        folder.mkdir()
    for content in ('{"id": "rows:1"}\n', ""):
        (cache / NAME).write_text(content)
        copy_skipped(cache, run)
        assert (run / NAME).is_file() == bool(content)


def test_a_mixture_names_the_keys_of_the_source(source: Any, jsonl: Any) -> None:
    local = source("local", path=jsonl([{**CHAT, "score": 3}]))
    mixture = source("mixture", sources={"web": local}, weights={"web": 1.0})
    with pytest.raises(ValueError, match=r"by \+\+data\.sources\.web\.ignore=\[score\]$"):
        mixture.check()
    broken = source("local", path=jsonl([CHAT, {"messages": []}], "broken.jsonl"))
    bad = next(row for row in source("mixture", sources={"web": broken}, weights={"web": 1.0}).rows())
    assert isinstance(bad, BadRow)
    assert bad.source == "web/broken"
    assert bad.reason.endswith("with ++data.sources.web.on_bad_row=skip")


def test_an_optional_column_may_be_missing_from_a_row_but_not_from_all(source: Any, jsonl: Any) -> None:
    row = {"instruction": "i", "output": "o"}
    renamed = {"fields": {"input": "context"}}
    rows = list(source("local", path=jsonl([row, {**row, "context": "c"}]), **renamed).rows())
    assert [sample.messages[0]["content"] for sample in rows] == ["i", "i\n\nc"]
    with pytest.raises(ValueError, match=r"data\.fields must name columns that some row has, got context"):
        list(source("local", path=jsonl([row], "none.jsonl"), **renamed).rows())


CALLS = {
    "role": "assistant", "content": "Let me see.", "tool_calls": [{"type": "function", "function": {"name": "f"}}],
}  # fmt: skip


def test_calls_that_a_template_does_not_write_are_refused_unless_ignored(opened: Any, source: Any, jsonl: Any) -> None:
    rows = jsonl([{"messages": [CHAT["messages"][0], CALLS]}])
    with pytest.raises(ValueError, match=r"rows\.jsonl:1 must call no tools .* data\.ignore=\[tool_calls\]"):
        opened(source("local", path=rows))
    assert len(opened(source("local", path=rows, ignore=["tool_calls"])).train) == 1


def test_keys_of_turns_that_a_template_does_not_write_are_named(opened: Any, source: Any, jsonl: Any) -> None:
    turns = [{**CHAT["messages"][0], "name": "Ann"}, {**CHAT["messages"][1], "reasoning_content": "Hm."}]
    lines = opened(source("local", path=jsonl([{"messages": turns}]))).audit.lines()
    assert lines[1:] == ["columns not read: name of turns, reasoning_content of turns"]
