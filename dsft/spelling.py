"""What was typed, word by word, before it is composed: values that have to be quoted, and values in a group's place."""

import os
import re
from collections.abc import Mapping, Sequence

from dsft.paths import PATHS
from dsft.wording import as_value, groups, own_keys, shell_word, suggest

INSTEAD = {
    "resume": "a run resumes by itself: the same run_dir, the same command; resume.anew=true begins again",
    "train": "set a key: train.steps=N or train.epochs=N",
    "checkpoint": "set a key: checkpoint.every=STEPS, or take checkpoint=none",
    "launcher": "set a key: launcher.devices=N, or take launcher=local or slurm",
    "optim": "set a key: optim.lr=RATE, optim.name=adamw",
    "tracker": "take tracker=none, wandb or tensorboard",
    "quantization": "take quantization=none, nf4 or int8",
    "data": "take data=local data.path=FILE, or data=hf data.path=HUB_ID",
    "model": "take model=custom model.path=FOLDER_OR_HUB_ID, or a model of ours",
}
"""Group -> the way out where it was given a value."""


def unreadable(word: str) -> str:
    """Return what is said of a word that Hydra's grammar cannot read."""
    key, equals, value = word.partition("=")
    if not equals or not re.fullmatch(r"[+~]{0,2}[\w@./:-]+", key):
        return f"{word} must read KEY=VALUE; type a key, = and its value without spaces around it, e.g. train.steps=10"
    if value.startswith("="):
        return f"{key} must have one = before its value, got {word}; type {key}={value.lstrip('=')}"
    bare = value.strip("'\"") if value[:1] in ("'", '"') else value
    if key in PATHS and value.startswith("~"):
        bare = os.path.expanduser(value)
    typed = shell_word(f"{key}={as_value(bare)}")
    if value.startswith("[") and value.endswith("]"):
        items = ",".join(as_value(item.strip().strip("'\"")) for item in value[1:-1].split(","))
        return f"{key} must have quotes around each text with such letters, got {value}; type " + shell_word(
            f"{key}=[{items}]"
        )
    if key in ("model", "data"):
        typed = f"{key}={'custom' if key == 'model' else 'local'} " + shell_word(f"{key}.path={as_value(bare)}")
    return f"{key} must have quotes of its own around such a value, inside the shell's, got {value}; type {typed}"


def check_value(key: str, value: object) -> None:
    """Refuse a number, true, false or null in the place of an option. Raises ValueError."""
    if not key:
        raise ValueError(f"a key must stand before =, got ={value}; type KEY=VALUE")
    is_option = isinstance(value, str | list | dict) and not (key == "resume" and not isinstance(value, dict))
    if key in groups() - {"tracker"} and isinstance(value, list | dict):
        raise ValueError(f"{key} must be one option, got {_inner(value)}; {_instead_of_several(key, value)}")
    if key == "tracker" and isinstance(value, list):
        _check_trackers(value)
    if key not in groups() | {"resume"} or is_option:
        return
    shown = str(value).lower() if isinstance(value, bool) else "null" if value is None else value
    way = INSTEAD.get(key, f"take one of its options: {key}=NAME")
    raise ValueError(f"{key} must be {'keys' if key == 'resume' else 'an option'}, got {shown}; {way}")


def _check_trackers(names: Sequence[object]) -> None:
    """Refuse one tracker beside none, and one that is named twice. Raises ValueError."""
    got = _inner(list(names))
    if "none" in names and set(names) != {"none"}:
        raise ValueError(f"tracker must be none or others, got {got}; leave none out, or take tracker=none")
    if len(set(names)) < len(names):
        raise ValueError(f"tracker must name each once, got {got}; leave one out")


def with_whose(said: str, typed: Mapping[str, object], experiment: str) -> str:
    """Return the refusal of a key, with the experiment that has set it where it was not typed."""
    key, is_none, _ = said.partition(" is not a key of ")
    if not is_none or key in typed or experiment == "none":
        return said
    return f"{said}; experiment={experiment} sets it, leave that out"


def _inner(value: object) -> str:
    """Return a list or keys as they are typed."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_inner(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_inner, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _instead_of_several(key: str, value: list[object] | dict[str, object]) -> str:
    """Return the way out for a list of options, or for keys, in the place of one option."""
    if isinstance(value, list):
        return f"to run one after another: -m {key}={','.join(map(_inner, value))}"
    typed = " ".join(
        shell_word(f"{key}.{name}={as_value(each) if isinstance(each, str) else _inner(each)}")
        for name, each in value.items()
    )
    option = {"data": "data=local ", "model": "model=custom "}.get(key, "")
    return f"set keys one by one: {option}{typed}"


def no_tracker(name: str, keys: object) -> str:
    """Return what is said of a key of the group tracker that no option has brought."""
    if name not in own_keys("tracker"):
        return f"tracker.{name} is not a key{suggest(name, [*own_keys('tracker')])}"
    key = f"tracker.{name}.{next(iter(keys))}" if isinstance(keys, dict) and keys else f"tracker.{name}"
    return f"{key} is not a key without tracker={name}; add that"
