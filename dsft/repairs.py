"""What can only mean one thing, and was left open, is settled before a run is built: each change is printed."""

import contextlib
from collections import defaultdict
from collections.abc import Container, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from dsft.rules import Place, RuleError, missing_compiler

EXPERTS = "quantization.experts"

LEAST_BATCH = 16
"""Examples of an optimizer step where nobody chose; more data ranks than that get one each."""


def repair(tree: Mapping[str, Any], at: Place, typed: Container[str] = ()) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The tree with what can only mean one thing filled in, and a sentence for each change. typed: keys that were."""
    fixed = deepcopy(dict(tree))
    train, said = fixed["train"], _rated(fixed["method"], fixed["optim"])
    said += _sized(fixed, at.size)
    if EXPERTS not in typed:
        said += _left_unpacked(fixed)
    if train["steps"] is None and train["epochs"] is None:
        train["epochs"] = 1.0
        said.append("train.epochs=1: neither train.steps nor train.epochs was given")
    if train["precision"] == "auto":
        train["precision"] = "bf16" if computes_bf16(at.gpus) else "fp32"
        where = "this machine computes" if at.here else f"nodes with {at.gpus or 'no'} GPUs compute"
        said.append(f"train.precision=auto: {train['precision']}, as {where}")
    if train["compile"] == "auto" and (why := _uncompiled(train, at.gpus)):
        train["compile"] = False
        said.append(f"train.compile=auto: false, {why}")
    if isinstance(train["epochs"], int):
        train["epochs"] = float(train["epochs"])
    return fixed, tuple(said)


def undropped(tree: dict[str, Any]) -> tuple[str, ...]:
    """Set method.dropout to 0 in place, for an objective that sets forward passes beside each other; say so."""
    dropout = tree["method"].get("dropout")
    if not dropout:
        return ()
    tree["method"]["dropout"] = 0.0
    return (f"method.dropout=0: it was {dropout:g}, and the objective compares forward passes, which must be alike",)


def _rated(method: dict[str, Any], optim: dict[str, Any]) -> list[str]:
    """Take the method's own rate out of its keys, where it is no field of a class; the optimizer's, if nobody chose."""
    own = method.pop("lr", None)
    if optim["lr"] != "auto":
        return []
    if not isinstance(own, int | float):
        raise ValueError(
            f"optim.lr must be given, as the YAML of {method['_target_']} names no rate; add optim.lr=RATE, or lr: "
            "RATE to that YAML"
        )
    optim["lr"] = float(own)
    return [f"optim.lr=auto: {own:g}, as the YAML of the method has it"]


def _sized(fixed: dict[str, Any], ranks: int) -> list[str]:
    """Settle train.global_batch_size=auto: what run_dir was made with, else at least one example for each data rank."""
    train, run_dir = fixed["train"], str(fixed["run_dir"])
    asked = train["global_batch_size"]
    if asked != "auto":
        if isinstance(asked, bool) or not isinstance(asked, int):
            raise ValueError(f"train.global_batch_size must be auto or an integer, got {asked!r}")
        return []
    kept = _kept(fixed)["train"].get("global_batch_size")
    kept = kept if isinstance(kept, int) else None
    if kept is not None and kept < ranks:
        way = f"lower launcher.devices, or add 'resume.allow=[train.global_batch_size]' train.global_batch_size={ranks}"
        said = f"train.global_batch_size must be at least the number of data ranks, {ranks}, got {kept}"
        raise RuleError("batch-below-ranks", f"{said}, which {run_dir} was made with; {way}")
    train["global_batch_size"] = max(LEAST_BATCH, ranks) if kept is None else kept
    why = (
        f"for up to {LEAST_BATCH} data ranks" if ranks <= LEAST_BATCH else f"one example for each of {ranks} data ranks"
    )
    if kept is not None:
        why = f"which {run_dir} was made with"
    return [f"train.global_batch_size=auto: {train['global_batch_size']}, {why}"]


def _left_unpacked(fixed: dict[str, Any]) -> list[str]:
    """Leave experts unpacked where run_dir was made so, perhaps before a quantization packed them."""
    quantization, kept = fixed["quantization"], _kept(fixed)["quantization"]
    if quantization.get("experts") is not True or not kept or kept.get("experts") is True:
        return []
    quantization["experts"] = False
    return [f"{EXPERTS}=false, which {fixed['run_dir']} was made with"]


def _kept(fixed: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Groups of the config.yaml that run_dir was made with, empty ones where there is none that can be read.

    One that cannot be read is refused by the run itself; a run that begins anew keeps nothing.
    """
    found: Any = None
    if fixed["resume"]["anew"] is not True:
        with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
            found = yaml.safe_load((Path(str(fixed["run_dir"])) / "config.yaml").read_text())
    tree = found if isinstance(found, dict) else {}
    return defaultdict(dict, {name: keys for name, keys in tree.items() if isinstance(keys, dict)})


def computes_bf16(gpus: int) -> bool:
    """True with an accelerator, or a CPU whose instructions include bf16; other CPUs emulate it many times slower."""
    if gpus:
        return True
    info = Path("/proc/cpuinfo")
    words = set(info.read_text().split()) if info.is_file() else set()
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def _uncompiled(train: Mapping[str, Any], gpus: int) -> str | None:
    if train["profile"]:
        return "train.profile tells the parts of a block apart"
    compiler = missing_compiler(gpus)
    return compiler and f"{compiler} is not there"
