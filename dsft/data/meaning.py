"""Columns and keys of turns that are known to change what a row means, and are refused where nothing reads them."""

from collections.abc import Iterable, Mapping, Set
from typing import Any, NamedTuple

from dsft.data.records import RowError


class Known(NamedTuple):
    """why: what training without it would get wrong; way: how it can be read, if it can; one: values of 1 are fine.

    alone: the row that has it can be left out by itself. Of the others, a value speaks of all rows: leaving out those
    that have it would train on the rest, which are the rows that somebody weighted down.
    """

    why: str
    way: str = ""
    one: bool = False
    alone: bool = False


_WEIGHT = Known("rows are weighted by the column weight alone, where an example is one answer", one=True)
_SCORE = Known("rows are weighted by the column weight alone")
_MEDIA = Known("only text is read", alone=True)
_MASK = Known("the mask is told from the turns", "mark turns with weight, 0 or 1")
_TOKENS = Known("tokens are made from the text, not read")
_PAIR = Known(
    "a row is learned from one answer",
    "for both set objective=dpo, for the chosen answers alone see data.fields.completion",
)

COLUMNS: dict[str, Known] = {
    **dict.fromkeys(("weight", "train", "loss"), _WEIGHT),
    **{
        name: _WEIGHT._replace(way=f"set data.fields.weight={name}")
        for name in ("weights", "loss_weight", "sample_weight")
    },
    **dict.fromkeys(("score", "reward"), _SCORE),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _MEDIA),
    **dict.fromkeys(("loss_mask", "completion_mask", "assistant_masks", "masks", "segments"), _MASK),
    **dict.fromkeys(("input_ids", "labels", "token_ids"), _TOKENS),
    **dict.fromkeys(("chosen", "rejected"), _PAIR),
    "label": Known(
        "a label is not learned",
        "set objective=kto for verdicts, or write it as the answer",
    ),
    "system": Known("this format has no system turn", "use a format of conversations"),
    "system_prompt": Known("it is not in the conversation", "set data.fields.system=system_prompt"),
    "system_message": Known("it is not in the conversation", "set data.fields.system=system_message"),
    "history": Known("earlier turns are read in the format alpaca alone", "write them as messages"),
    "tools": Known("plain text offers no tools", "use a format of conversations"),
    "functions": Known("the functions are not offered to the model", "set data.fields.tools=functions"),
    "context": Known("the prompt lacks it", "in the format alpaca set data.fields.input=context"),
    "documents": Known("documents are not given to the chat template", "write them into a turn"),
    "chat_template_kwargs": Known("a row has no say in how the chat template is rendered"),
}
"""Columns that no format reads by that name, or not every format."""

_ASKED = Known("the prompt lacks it", "write it into the prompt")
_THOUGHT = Known("the answer lacks it", "write it into the answer")

BESIDE_ONE_PROMPT: dict[str, Known] = {
    **dict.fromkeys(("input", "query", "choices", "options", "passage", "document", "instructions"), _ASKED),
    **dict.fromkeys(("reasoning", "thinking", "rationale", "Complex_CoT"), _THOUGHT),
    "function": Known("the function is not offered to the model", "set data.fields.tools=function"),
}
"""Columns that are part of the question or of the answer where a row is one exchange; beside turns they repeat them."""

TURN_KEYS: dict[str, Known] = {
    **dict.fromkeys(("image", "images", "image_url", "video", "videos", "audio", "audios"), _MEDIA),
    **dict.fromkeys(("train_detail", "loss_mask", "masked", "mask"), _MASK),
    **dict.fromkeys(("loss_weight", "loss_scale"), Known("turns are not weighted by fractions yet", one=True)),
    "refusal": Known("the answer is in it and not in the content", "write it as the content"),
    **dict.fromkeys(("tools", "functions"), Known("a turn offers no tools", "write them as the row's column tools")),
    "function_calls": Known("calls are read from tool_calls", "write them as tool_calls"),
    "chosen": _PAIR,
    "rejected": _PAIR,
}
"""Keys of a turn that nothing reads."""


def refuse_unread(
    values: Mapping[str, Any], known: Mapping[str, Known], place: str, *, read: Set[str], what: str
) -> None:
    """Refuse the first name of values that is among the known ones, not in read, and says something.

    Raises RowError where the row alone is meant, else ValueError: no row may be skipped for it.
    """
    for name in _first(values, known, read):
        value, about = values[name], known[name]
        way = f"{about.way}, or " if about.way else ""
        shown = value if isinstance(value, bool | int | float) else type(value).__name__
        refusal = RowError if about.alone else ValueError
        raise refusal(
            f"{place} must not have the {what} {name}, got {shown}: {about.why}; {way}read the rows without it by "
            f"data.ignore=[{name}]"
        )


def _first(values: Mapping[str, Any], known: Mapping[str, Known], read: Set[str]) -> Iterable[str]:
    """Names that are to be refused, in the order of the row."""
    for name, value in values.items():
        if name not in known or name in read or value is None or value == "" or value in ([], {}):
            continue
        if not (known[name].one and str(value).strip().lower() in ("1", "1.0", "true")):
            yield name
