"""Rows as people have them: what each is read as, written by hand.

Messages are written as ROLE MARK CONTENT: the role's first letter, + for a supervised turn and - for another one.
"""

import json
from typing import Any

import pytest

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
PLAIN_TOOL = {"name": "f", "description": "d", "parameters": {"x": {"type": "int"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def _chat(*turns: str, **keys: Any) -> dict[str, Any]:
    """messages from "s Hi", "u ?", "a !"; keys are further columns. a:0 is an assistant turn of weight 0."""
    roles = {"s": "system", "d": "developer", "u": "user", "a": "assistant", "t": "tool"}
    messages = []
    for turn in turns:
        mark, _, content = turn.partition(" ")
        who, _, weight = mark.partition(":")
        messages.append({"role": roles[who], "content": content, **({"weight": json.loads(weight)} if weight else {})})
    return {"messages": messages, **keys}


def _flag(**keys: Any) -> dict[str, Any]:
    """Two exchanges, the first answer with these keys."""
    rows = _chat("u 1", "a 2", "u 3", "a 4")
    rows["messages"][1].update(keys)
    return rows


def _share(*turns: str, **keys: Any) -> dict[str, Any]:
    """conversations from "human ?", "gpt !"."""
    pairs = [turn.partition(" ") for turn in turns]
    return {"conversations": [{"from": who, "value": value} for who, _, value in pairs], **keys}


def _alpaca(**keys: Any) -> dict[str, Any]:
    return {"instruction": "i", "output": "o", **keys}


def _parts(*texts: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": text} for text in texts]}, ANSWER]}


ASK, ANSWER = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}

WEIGHTS = [
    (_flag(), "u-1 a+2 u-3 a+4"),
    (_flag(weight=0), "u-1 a-2 u-3 a+4"),
    (_flag(weight=1), "u-1 a+2 u-3 a+4"),
    (_flag(weight=0.0), "u-1 a-2 u-3 a+4"),
    (_flag(weight=1.0), "u-1 a+2 u-3 a+4"),
    (_flag(weight=None), "u-1 a+2 u-3 a+4"),
    (_flag(weight=False), "u-1 a-2 u-3 a+4"),
    (_flag(weight=True), "u-1 a+2 u-3 a+4"),
    (_flag(train=False), "u-1 a-2 u-3 a+4"),
    (_flag(train=True), "u-1 a+2 u-3 a+4"),
    (_flag(train=0), "u-1 a-2 u-3 a+4"),
    (_flag(train=None, train_detail=None), "u-1 a+2 u-3 a+4"),
    (_flag(loss=False), "u-1 a-2 u-3 a+4"),
    (_flag(loss=True), "u-1 a+2 u-3 a+4"),
    (_flag(weight=0, train=False), "u-1 a-2 u-3 a+4"),
    (_flag(weight=1, train=True, loss=1), "u-1 a+2 u-3 a+4"),
    (_chat("s:0 x", "u:0 1", "a:1 2"), "s-x u-1 a+2"),
    (_chat("u 1", "a:0 2", "u 3", "a:0 4"), "u-1 a-2 u-3 a-4"),
    (_chat("u 1", "a:0 2", "a 3"), "u-1 a-2 a+3"),
    (_chat("u 1", "a:1 2", weight=1, loss_weight=None), "u-1 a+2"),
    ({"conversations": [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2", "weight": 0}]}, "u-1 a-2"),
    ({"conversations": [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2", "train": True}]}, "u-1 a+2"),
]

SYSTEMS = [
    (_chat("u 1", "a 2", system="x"), "s-x u-1 a+2"),
    (_chat("u 1", "a 2", system=""), "u-1 a+2"),
    (_chat("u 1", "a 2", system=None), "u-1 a+2"),
    (_chat("s x", "u 1", "a 2", system="x"), "s-x u-1 a+2"),
    (_chat("s x", "u 1", "a 2", system=""), "s-x u-1 a+2"),
    (_chat("d x", "u 1", "a 2", system="x"), "d-x u-1 a+2"),
    (_chat("u 1", "a:0 2", "a 3", system="x"), "s-x u-1 a-2 a+3"),
    (_share("human 1", "gpt 2", system="x"), "s-x u-1 a+2"),
    (_share("human 1", "gpt 2", system=""), "u-1 a+2"),
    (_share("system x", "human 1", "gpt 2", system=None), "s-x u-1 a+2"),
    (_share("system x", "human 1", "gpt 2", system="x"), "s-x u-1 a+2"),
    (_alpaca(system="x"), "s-x u-i a+o"),
    (_alpaca(system="x", input="n"), "s-x u-i\n\nn a+o"),
    (_alpaca(system=None, input=None), "u-i a+o"),
    (_alpaca(history=[]), "u-i a+o"),
    (_alpaca(history=None), "u-i a+o"),
    (_alpaca(history=[["1", "2"]]), "u-1 a+2 u-i a+o"),
    (_alpaca(history=[["1", "2"], ["3", "4"]], system="x", input=""), "s-x u-1 a+2 u-3 a+4 u-i a+o"),
    (_alpaca(history='[["1", "2"]]'), "u-1 a+2 u-i a+o"),
    ({"prompt": "1", "completion": "2", "system": "x"}, "s-x u-1 a+2"),
    ({"question": "1", "answer": "2", "system": "x"}, "s-x u-1 a+2"),
]

SPEAKERS = [
    (_share("human 1", "gpt 2"), "u-1 a+2"),
    (_share("user 1", "assistant 2"), "u-1 a+2"),
    (_share("user 1", "chatgpt 2"), "u-1 a+2"),
    (_share("human 1", "bing 2"), "u-1 a+2"),
    (_share("human 1", "bard 2"), "u-1 a+2"),
    (_share("user 1", "model 2"), "u-1 a+2"),
    (_share("Human 1", "GPT 2"), "u-1 a+2"),
    (_share("system x", "human 1", "gpt 2"), "s-x u-1 a+2"),
    (_share("developer x", "human 1", "gpt 2"), "d-x u-1 a+2"),
    (_share("human 1", "gpt 2", "tool 3", "gpt 4"), "u-1 a+2 t-3 a+4"),
    (_share("human 1", "gpt 2", "observation 3", "gpt 4"), "u-1 a+2 t-3 a+4"),
    (_share("human 1", "gpt 2", "function_response 3", "gpt 4"), "u-1 a+2 t-3 a+4"),
    (_share("human 1", "gpt 2", "tool_response 3", "gpt 4"), "u-1 a+2 t-3 a+4"),
    (_share("human 1", "function_call f(1)", "observation 3", "gpt 4"), "u-1 a+f(1) t-3 a+4"),
    (_share("human 1", 'function_call {"city": "x"}', "observation 3"), 'u-1 a+{"city": "x"} t-3'),
    (_share("human 1", "gpt 2", "human 3"), "u-1 a+2 u-3"),
    (_share("human 1", "gpt 2", "gpt 3"), "u-1 a+2 a+3"),
    ({"conversations": [ASK, ANSWER]}, "u-? a+!"),
    ({"conversations": [{**ASK, "name": None}, {**ANSWER, "weight": 0}]}, "u-? a-!"),
    ({"messages": [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}]}, "u-1 a+2"),
    ({"messages": [{"role": "human", "content": "1"}, {"role": "gpt", "content": "2"}]}, "u-1 a+2"),
    ({"messages": [ASK, {**ANSWER, "tool_calls": None}, {"role": "function", "content": "3"}]}, "u-? a+! t-3"),
]  # fmt: skip

CONTENTS = [
    (_parts("?"), "u-? a+!"),
    (_parts("a", "b"), "u-ab a+!"),
    (_parts("a\n", "b"), "u-a\nb a+!"),
    (_parts(), "u- a+!"),
    ({"messages": [{"role": "user", "content": [{"text": "a"}]}, ANSWER]}, "u-a a+!"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "url": None}]}, ANSWER]}, "u-a a+!"),
    ({"messages": [ASK, {"role": "assistant", "content": [{"type": "text", "text": "!"}], "weight": 0}]}, "u-? a-!"),
    ({"messages": [ASK, {"role": "assistant", "content": ""}]}, "u-? a+"),
    ({"messages": [{**ASK, "images": [], "audio": None}, {**ANSWER, "refusal": None, "annotations": []}]}, "u-? a+!"),
    ({"messages": json.dumps([ASK, ANSWER])}, "u-? a+!"),
    (_chat("u 1", "a 2", images=[], chosen=None, label=None), "u-1 a+2"),
    ({"prompt": [ASK], "completion": [ANSWER]}, "u-? a+!"),
    ({"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER]}, "u-? a-! u-? a+!"),
    ({"prompt": [ASK], "completion": [ANSWER, ASK, ANSWER]}, "u-? a+! u-? a+!"),
    ({"prompt": [ASK], "completion": [{**ANSWER, "weight": 0}, ASK, ANSWER]}, "u-? a-! u-? a+!"),
    ({"prompt": [{**ANSWER, "weight": 1}, ASK], "completion": [ANSWER]}, "a-! u-? a+!"),
    ({"prompt": [ASK], "completion": [ANSWER], "system": "x"}, "s-x u-? a+!"),
    ({"prompt": [{"role": "system", "content": "x"}, ASK], "completion": [ANSWER]}, "s-x u-? a+!"),
    ({"prompt": "[1, 2]", "completion": "{}"}, "u-[1, 2] a+{}"),
    ({"prompt": "1", "completion": "2", "label": None}, "u-1 a+2"),
]  # fmt: skip

KINDS = {"weights": WEIGHTS, "systems": SYSTEMS, "speakers": SPEAKERS, "contents": CONTENTS}


def _said(sample: Any) -> str:
    learned = sample.learned or [message["role"] == "assistant" for message in sample.messages]
    pairs = zip(sample.messages, learned, strict=True)
    return " ".join(f"{message['role'][0]}{'+' if on else '-'}{message['content']}" for message, on in pairs)


@pytest.mark.parametrize("rows", KINDS.values(), ids=KINDS)
def test_rows_are_read_as_written_by_hand(rows: Any, source: Any, jsonl: Any) -> None:
    for row, expected in rows:
        (sample,) = source("local", path=jsonl([row])).rows()
        assert _said(sample) == expected
        assert not any({"weight", "train", "loss", "tool_calls"} & set(message) for message in sample.messages)
        assert sample.plain is None or len(sample.messages) == 2


RENAMED = [
    ({"q": "1", "a": "2"}, {"question": "q", "answer": "a"}, "u-1 a+2"),
    ({"prompt": "1", "chosen": "2", "rejected": "3"}, {"completion": "chosen"}, "u-1 a+2"),
    ({"prompt": [ASK], "chosen": [ANSWER], "rejected": [ANSWER]}, {"completion": "chosen"}, "u-? a+!"),
    ({"instruction": "1", "context": "c", "response": "2"}, {"output": "response", "input": "context"}, "u-1\n\nc a+2"),
    (_chat("u 1", "a 2", system_prompt="x"), {"system": "system_prompt"}, "s-x u-1 a+2"),
    ({"dialogue": [ASK, ANSWER]}, {"messages": "dialogue"}, "u-? a+!"),
    ({"dialogue": [ASK, ANSWER]}, {"conversations": "dialogue"}, "u-? a+!"),
    (_alpaca(past=[["1", "2"]]), {"history": "past"}, "u-1 a+2 u-i a+o"),
]


def test_renamed_columns_are_read_as_ours(source: Any, jsonl: Any) -> None:
    for row, fields, expected in RENAMED:
        form = "prompt_completion" if "completion" in fields else "auto"
        (sample,) = source("local", path=jsonl([row]), fields=fields, format=form).rows()
        assert _said(sample) == expected
        assert sample.unread == (("rejected",) if "rejected" in row else ())


LAST = [
    (_chat("u 1", "a 2"), "u-1 a+2"),
    (_chat("u 1", "a 2", "u 3", "a 4"), "u-1 a-2 u-3 a+4"),
    (_chat("u 1", "a 2", "u 3", "a 4", "u 5"), "u-1 a-2 u-3 a+4 u-5"),
    (_chat("u 1", "a 2", "u 3", "a:0 4"), "u-1 a-2 u-3 a-4"),
    (_chat("u 1", "a:0 2", "u 3", "a:1 4"), "u-1 a-2 u-3 a+4"),
    (_chat("u 1"), "u-1"),
    (_alpaca(history=[["1", "2"]]), "u-1 a-2 u-i a+o"),
    (_share("system x", "human 1", "gpt 2", "human 3", "gpt 4"), "s-x u-1 a-2 u-3 a+4"),
    ({"prompt": [ASK], "completion": [ANSWER, ASK, ANSWER]}, "u-? a-! u-? a+!"),
    ({"question": "1", "answer": "2"}, "u-1 a+2"),
]


def test_train_on_last_leaves_the_last_answer_alone(source: Any, jsonl: Any) -> None:
    for row, expected in LAST:
        (sample,) = source("local", path=jsonl([row]), train_on="last").rows()
        assert _said(sample) == expected


CALLS = [
    ({"role": "assistant", "content": None, "tool_calls": [CALL]}, "", [CALL]),
    ({"role": "assistant", "tool_calls": [CALL]}, "", [CALL]),
    ({"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}, "", [CALL, CALL]),
    ({"role": "assistant", "content": "x", "tool_calls": [CALL]}, "x", [CALL]),
    ({"role": "assistant", "tool_calls": json.dumps([CALL])}, "", [CALL]),
    ({"role": "assistant", "content": "x", "tool_calls": []}, "x", None),
    ({"role": "assistant", "content": "x", "tool_calls": None, "function_call": None}, "x", None),
    (
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        "",
        [{"type": "function", "function": {"name": "f", "arguments": "{}"}}],
    ),
    (
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        "",
        [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
    ),
    (
        {"from": "tool_call", "value": '[{"name": "f"}, {"name": "g"}]'},
        "",
        [{"type": "function", "function": {"name": name}} for name in "fg"],
    ),
    ({"from": "function_call", "value": "f(1)"}, "f(1)", None),
    ({"from": "gpt", "value": '{"name": "f"}'}, '{"name": "f"}', None),
]


def test_calls_of_tools_are_tool_calls_of_assistant_turns(source: Any, jsonl: Any) -> None:
    for turn, content, calls in CALLS:
        first = ASK if "role" in turn else {"from": "human", "value": "?"}
        (sample,) = source("local", path=jsonl([{"messages": [first, turn]}])).rows()
        assert sample.messages[1] == {
            "role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})
        }  # fmt: skip


TOOLS = [
    ([TOOL], (TOOL,)),
    ([PLAIN_TOOL, TOOL], (PLAIN_TOOL, TOOL)),
    (json.dumps([TOOL]), (TOOL,)),
    ([json.dumps(PLAIN_TOOL)], (PLAIN_TOOL,)),
    (json.dumps(TOOL), (TOOL,)),
    (TOOL, (TOOL,)),
    ([], None),
    ("[]", None),
    ("", None),
    (" ", None),
    (None, None),
]


def test_tools_are_those_of_the_column(source: Any, jsonl: Any) -> None:
    bases = (_chat("u 1", "a 2"), _share("human 1", "gpt 2"), _alpaca(), {"question": "1", "answer": "2"})
    for base in bases:
        for tools, expected in TOOLS:
            (sample,) = source("local", path=jsonl([{**base, "tools": tools}])).rows()
            assert sample.tools == expected
            assert sample.plain is None or expected is None
            (renamed,) = source("local", path=jsonl([{**base, "fs": tools}]), fields={"tools": "fs"}).rows()
            assert renamed.tools == expected
