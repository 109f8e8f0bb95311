"""What was typed, word by word, before it is composed: values that have to be quoted, and values in a group's place."""

import re
import shlex
from collections.abc import Mapping

from dsft.wording import as_value, groups

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
    bare = value.strip("'\"") if value[:1] in ("'", '"') else value
    typed = shell_word(f"{key}={as_value(bare)}")
    if key in ("model", "data"):
        typed = f"{key}={'custom' if key == 'model' else 'local'} " + shell_word(f"{key}.path={as_value(bare)}")
    return f"{key} must have quotes of its own around such a value, inside the shell's, got {value}; type {typed}"


def shell_word(word: str) -> str:
    """Return a word as it is typed in a shell, in the quotes that need no others inside."""
    if "'" not in word or "!" in word:
        return shlex.quote(word)
    return '"' + re.sub(r'([\\"$`])', r"\\\1", word) + '"'


def check_value(key: str, value: object) -> None:
    """Refuse a number, true, false or null in the place of an option. Raises ValueError."""
    if not key:
        raise ValueError(f"a key must stand before =, got ={value}; type KEY=VALUE")
    is_option = isinstance(value, str | list | dict) and not (key == "resume" and not isinstance(value, dict))
    if key not in groups() | {"resume"} or is_option:
        return
    shown = str(value).lower() if isinstance(value, bool) else "null" if value is None else value
    way = INSTEAD.get(key, f"take one of its options: {key}=NAME")
    raise ValueError(f"{key} must be {'keys' if key == 'resume' else 'an option'}, got {shown}; {way}")


def with_whose(said: str, typed: Mapping[str, object], experiment: str) -> str:
    """Return the refusal of a key, with the experiment that has set it where it was not typed."""
    key, is_none, _ = said.partition(" is not a key of ")
    if not is_none or key in typed or experiment == "none":
        return said
    return f"{said}; experiment={experiment} sets it, leave that out"
