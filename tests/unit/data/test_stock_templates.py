"""Masks under the chat templates that models are published with, as trl ships them, against trl's marked twins of them.

A twin marks what a model writes ({% generation %}) in a text that is, for many conversations, the stock template's.
"""

import copy
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AddedToken

from dsft.data.encoding import Encoded, Encoder
from dsft.data.spans import Conversation
from dsft.data.store import runs
from tests.unit.data.test_data_turns import sample
from tests.unit.data.turns import CHATS, TOOL, judge

pytestmark = pytest.mark.slow

SPEC = find_spec("trl")
FOLDER = Path(SPEC.origin).parent / "chat_templates" if SPEC is not None and SPEC.origin is not None else None
IMAGES = ("llava_next", "idefics3", "smolvlm")
"""Templates that take content as a list of parts, and refuse or mangle text."""
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja")) if FOLDER is not None else []
STOCK = [name for name in NAMES if not name.endswith("_training") and name not in IMAGES]
THEIR_OWN = r"roles must alternate|System role not supported|can only concatenate str \(not \"dict\"\)"
"""What some of these templates say to some of the conversations."""


def tokenizer_of(smollm: Any, template: str) -> Any:
    """A tokenizer that knows the control tokens which the template writes."""
    tokenizer = copy.deepcopy(smollm)
    form = r"<[|\uff5c][^<>\n]{1,40}?[|\uff5c]>|</?think>|<(?:start|end)_of_turn>|<\|turn>|<turn\|>"
    tags = set(re.findall(form, template))
    plain = {tag for tag in tags if "think" in tag}
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in sorted(plain)])
    tokens = [AddedToken(tag, normalized=False, special=True) for tag in sorted(tags - plain)]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.skipif(FOLDER is None, reason="trl is not installed (pip install 'dsft[bench]'): its templates are read")
@pytest.mark.parametrize("name", STOCK or ["any"])
def test_masks_under_a_stock_template(name: str, smollm: Any) -> None:
    assert FOLDER is not None
    tokenizer = tokenizer_of(smollm, (FOLDER / f"{name}.jinja").read_text())
    encoder = Encoder(tokenizer)
    twin = FOLDER / f"{name}_training.jinja"
    accepted = compared = 0
    for chat, turns in CHATS.items():
        tools = (TOOL,) if chat == "tool call" and encoder.renders_tools else None
        (encoded,) = encoder.encode([sample(turns, tools=tools)])
        if not isinstance(encoded, Encoded):
            assert re.search(THEIR_OWN, encoded.reason), (chat, encoded.reason)
            continue
        accepted += 1
        told = encoder.plain_template.apply(turns, tools, tokenize=True, return_dict=True)  # type: ignore[union-attr]
        assert encoded.tokens.tolist() == told["input_ids"], chat
        pieces = [tokenizer.decode(encoded.tokens[a:b].tolist()) for a, b, on in runs(encoded.mask) if on]
        judge(tokenizer.decode(encoded.tokens.tolist()), pieces, turns)
        both_ways(encoder, turns, tools)
        if twin.is_file():
            compared += like_the_twin(tokenizer, twin.read_text(), encoded, turns, tools)
    assert accepted >= 7, name
    print(f"{name}: {accepted} of {len(CHATS)} conversations, {compared} compared with the twin's")


def both_ways(encoder: Encoder, turns: list[dict[str, Any]], tools: Any) -> None:
    """Where the template only adds to what it wrote, the marks show the same characters."""
    template = encoder.plain_template
    assert template is not None
    if template.marks_itself:
        return
    talk = Conversation(template, turns, tools)
    for index, turn in enumerate(turns):
        if turn["role"] == "assistant" and (span := talk.added(index)) is not None and not turn.get("tool_calls"):
            assert talk.looked_up(index) == span


def like_the_twin(tokenizer: Any, twin: str, encoded: Encoded, turns: list[dict[str, Any]], tools: Any) -> bool:
    """True if the twin's tokens are the same; then ours are supervised there too, and what it has more is no answer."""
    given = {"tools": list(tools) if tools else None, "chat_template": twin}
    row = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True, **given)
    if row["input_ids"] != encoded.tokens.tolist():
        return False
    theirs = np.array(row["assistant_masks"], dtype=bool)
    for first, end in _pieces(encoded.mask & ~theirs):
        assert not re.search(r"[QT]\d", tokenizer.decode(encoded.tokens[first:end].tolist()))
    for first, end in _pieces(theirs & ~encoded.mask):
        more = tokenizer.decode(encoded.tokens[first:end].tolist())
        assert not re.search(r"[QART]\d", more), more  # a header, or white space behind the end of the turn
    return True


def _pieces(mask: Any) -> list[tuple[int, int]]:
    return [(first, end) for first, end, on in runs(mask) if on]
