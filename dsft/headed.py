"""A head for sequences in the folder of a result: its labels, and its values beside those of an adapter.

PEFT calls such a head a module to save: its loader puts the values in place of those that transformers drew for a base
without one. dsft's own format names it in the same way. A whole model has its labels in config.json.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

KIND = "ForSequenceClassification"
"""How the names of transformers' classes with such a head end."""

LABELS = "labels.json"
"""File beside an adapter with the names of its head's outputs, in order: neither format has a place for them."""

PEFT, NATIVE, TENSORS, README = "adapter_config.json", "dsft_adapter.json", "adapter_model.safetensors", "README.md"


PROMPTS = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING")
"""PEFT's types that put nothing into the base, and so one module less around it."""


def add_head(
    folder: Path, saved: Mapping[str, "Tensor"], head: Mapping[str, "Tensor"], labels: Sequence[str]
) -> Mapping[str, "Tensor"]:
    """Put a head into an adapter's folder. saved: what is in its file; head: name in the model -> value, whole, on CPU.

    Returns what is in the file then, by the names that it has there.
    """
    from safetensors.torch import save_file

    module = next(iter(head)).rpartition(".")[0]
    peft = (folder / PEFT).is_file()
    file = folder / (PEFT if peft else NATIVE)
    said: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    around = "base_model." if said.get("peft_type") in PROMPTS else "base_model.model." if peft else ""
    tensors = {**saved, **{f"{around}{name}": value for name, value in head.items()}}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / TENSORS, {"format": "pt"})
    said |= {"task_type": "SEQ_CLS", "modules_to_save": [module]} if peft else {"head": module}
    file.write_text(json.dumps(said, indent=2, sort_keys=peft) + "\n", encoding="utf-8")
    (folder / LABELS).write_text(json.dumps(list(labels)) + "\n", encoding="utf-8")
    if not peft:
        text = (folder / README).read_text(encoding="utf-8").replace("AutoModelForCausalLM", f"AutoModel{KIND}")
        first = f"num_labels={len(labels)}, dtype="
        (folder / README).write_text(text.replace("dtype=", first), encoding="utf-8")
    return tensors


def labels_of(folder: Path) -> tuple[str, ...]:
    """Names of what the head of the result in folder gives of a sequence; empty for a language model's result."""
    if (folder / LABELS).is_file():
        return tuple(map(str, json.loads((folder / LABELS).read_text(encoding="utf-8"))))
    if not (folder / "config.json").is_file():
        return ()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not any(str(kind).endswith(KIND) for kind in config.get("architectures") or ()):
        return ()
    named = config.get("id2label") or {"0": "0"}
    return tuple(named[key] for key in sorted(named, key=int))


def scores_sequences(folder: Path) -> bool:
    """Return True if what is in folder, an adapter of anybody's or a whole model, has a head for sequences."""
    if (folder / PEFT).is_file():
        return bool(json.loads((folder / PEFT).read_text(encoding="utf-8")).get("task_type") == "SEQ_CLS")
    return bool(labels_of(folder))
