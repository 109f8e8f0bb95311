"""What method.target_modules means on one model: words for linears, and the names by which PEFT finds them again."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

from torch import nn

from dsft.methods.expert_lora import WORD
from dsft.methods.patterns import check_pattern
from dsft.protocols import ROLES, Anatomy

TAKEN_BY = "taken by method=lora, lora_plus and rslora"


def resolve_targets(wanted: str | tuple[str, ...], model: nn.Module, anatomy: Anatomy) -> list[str]:
    """Module names for PEFT: short suffixes where they mean the same modules, else full names.

    wanted: all-linear, roles, names, or one regular expression. Raises ValueError for a word that matches nothing and
    for an adapter on a tied head.
    """
    return shortest(chosen_linears(wanted, anatomy), model)


def chosen_linears(wanted: str | tuple[str, ...], anatomy: Anatomy, key: str = "method.target_modules") -> set[str]:
    """Full names of the linears that wanted means; raises as resolve_targets does, and names the key."""
    words = (wanted,) if isinstance(wanted, str) else wanted
    modules = {*anatomy.linears, anatomy.head}
    chosen: set[str] = set()
    for word in words:
        if word == "router":
            raise ValueError(
                f"{key} must not name router, which is no linear in most models, and a part of all-linear where it is "
                "one; leave it out, or take method=freeze with method.trainable set to the names of its parameters"
            )
        found = _matching(word, modules, anatomy, key)
        _check_experts(word, anatomy, key)
        if not found:
            leaves = sorted({name.rpartition(".")[2] for name in modules})
            known = ("all-linear", *(role for role in ROLES if role != "router"), *leaves)
            choice = [each for each in known if _matching(each, modules, anatomy, key)]
            more = f"; fused experts are {WORD}, {TAKEN_BY}" if anatomy.experts else ""
            raise ValueError(
                f"{key}: {word} matches no linear{nearest(word, choice)}; there are: {', '.join(choice)}{more}"
            )
        chosen |= found
    if not chosen:
        raise ValueError(f"{key} must name something, got []; e.g. {key}=all-linear")
    if anatomy.tied and anatomy.head in chosen:
        raise ValueError(
            f"{key} must not name {anatomy.head}: it shares its weight with the embedding, which the "
            "adapter would split; leave it out, or take method=freeze with method.trainable=[head]"
        )
    return chosen


def _check_experts(word: str, anatomy: Anatomy, key: str) -> None:
    """Refuse a word that means fused experts, of which a method for linears would adapt nothing without a word."""
    if word == WORD and anatomy.experts:
        raise ValueError(f"{key} must not name {WORD} with this method, which adapts linears; it is {TAKEN_BY}")
    if word in ROLES or word in anatomy.linears or not _is_pattern(word):
        return
    if meant := [name for name in anatomy.experts if re.fullmatch(word, name)]:
        raise ValueError(
            f"{key}: {word} matches {meant[0]}, fused experts, which no regular expression names; take a list with "
            f"{WORD} in it, {TAKEN_BY}"
        )


def _is_pattern(word: str) -> bool:
    """True for a regular expression and no plain name."""
    return re.fullmatch(r"[\w.\-]+", word) is None


def shortest(chosen: Iterable[str], model: nn.Module) -> list[str]:
    """Suffixes where they mean the modules chosen and no other, else their full names."""
    chosen = set(chosen)
    suffixes = {name.rpartition(".")[2] for name in chosen}
    every = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in suffixes}
    return sorted(suffixes) if every == chosen else sorted(chosen)


def nearest(word: str, choice: Iterable[str]) -> str:
    """The end of a sentence: what of choice looks like word; empty if nothing does."""
    found = get_close_matches(word, list(choice), n=3)
    return f", nearest: {', '.join(found)}" if found else ""


def _matching(word: str, modules: set[str], anatomy: Anatomy, key: str) -> set[str]:
    if word == "all-linear":
        return set(anatomy.linears)
    if word in ROLES:
        return {name for name, role in anatomy.linears.items() if role == word}
    exact = {name for name in modules if name == word or name.endswith(f".{word}")}
    if exact:
        return exact
    check_pattern(key, word)
    return {name for name in modules if re.fullmatch(word, name)}
