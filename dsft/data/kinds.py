"""The kinds of rows that objectives take: what each is called, which columns it has, and which objective takes it."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from dsft.objective import Wants


class Kind(NamedTuple):
    """rows: what they are called; columns: what they have, in words; way: how they can be used."""

    rows: str
    columns: str
    way: str


KINDS: dict["Wants", Kind] = {
    "text": Kind("examples of one answer", "messages, or prompt and completion, or text", "set objective=sft"),
    "pair": Kind(
        "preference pairs (chosen, rejected)",
        "prompt, chosen and rejected",
        "set objective=dpo or objective=reward",
    ),
    "rated": Kind(
        "answers with a verdict (label)", "prompt, completion and label, or messages and label", "set objective=kto"
    ),
    "labelled": Kind(
        "texts with a label", "text or messages, and label", "set objective=classification and data.labels"
    ),
}


def other_kind(wants: "Wants", found: "Wants", where: str, way: str = "") -> ValueError:
    """The refusal of rows of a kind that the objective does not take. way: how they can be read all the same."""
    more = f", or {way}" if way else ""
    return ValueError(
        f"data must be {KINDS[wants].rows} for this objective, with the columns {KINDS[wants].columns}, got "
        f"{KINDS[found].rows} {where}; {KINDS[found].way}{more}"
    )
