"""Rows of each kind for the equality matrix, and which objective takes which."""

import importlib
import json
from pathlib import Path
from typing import Any

import yaml

from dsft.objective import Objective
from dsft.wording import OWN_CONF

KINDS = {"text": "rows", "pair": "pairs", "rated": "rated", "labelled": "labelled"}
"""What an objective wants -> the name of the file of such rows that stands beside rows.jsonl."""
LABELS = ("low", "middle", "high")
"""Labels of labelled rows."""
TEXT = "the quick brown fox jumps over the lazy dog and runs away from a very large bear; " * 8


def write_rows(path: Path, batches: int) -> None:
    """Rows in batches of eight, each 14 bytes shorter than the one before; of every four the first and the last are
    nearly all supervised, the others hardly. Beside them pairs.jsonl, rated.jsonl, labelled.jsonl, of the same texts.

    Of four rows, two ranks get 0, 3 and 1, 2, four ranks one each; of eight, two ranks get 0, 3, 4, 7 and the others,
    four ranks 0, 7 and 1, 6 and so on: their label counts differ by more than 2.
    """
    made: dict[str, list[dict[str, Any]]] = {name: [] for name in KINDS.values()}
    for batch in range(batches):
        for place, loud in enumerate((True, False, False, True) * 2):
            start, length = 7 * batch + 3 * place, 240 - 14 * place
            ask, answer = (20, length - 20) if loud else (length - 6, 6)
            asked, told = TEXT[start : start + ask], TEXT[start + ask : start + ask + answer]
            made["rows"].append({"question": asked, "answer": told})
            other = told[::-1][: max(4, answer * (3 + place) // 10)]
            made["pairs"].append({"prompt": asked, "chosen": told, "rejected": other})
            good = place in (0, 3, 5, 7)
            made["rated"].append({"prompt": asked, "completion": told if good else other, "label": good})
            made["labelled"].append({"text": asked + told, "label": LABELS[place // 3]})
    for name, rows in made.items():
        file = path if name == "rows" else path.with_name(f"{name}.jsonl")
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def chosen(wants: str, folder: Path) -> list[str]:
    """Overrides that choose the rows in folder of the kind that an objective wants."""
    labels = [f"data.labels=[{','.join(LABELS)}]"] if wants == "labelled" else []
    return ["data=local", f"data.path={folder / KINDS[wants]}.jsonl", *labels]


def _class_of(path: Path) -> type[Objective]:
    """The class that a YAML of conf/objective names."""
    module, _, name = yaml.safe_load(path.read_text())["_target_"].rpartition(".")
    found: type[Objective] = getattr(importlib.import_module(module), name)
    return found


OBJECTIVES = {
    path.stem: found.wants
    for path in sorted((OWN_CONF / "objective").glob("*.yaml"))
    if (found := _class_of(path)).wants in KINDS and path.stem != "sft"
}
"""Objective -> the kind of rows that it wants; all methods are run with supervised fine-tuning."""
