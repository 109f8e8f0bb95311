"""python -m dsft.plan [overrides] [--gpu N] [--json]: what a run would be, in seconds and without weights."""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsft_launchers.join import ON_CPUS, promised_devices
from dsft_launchers.shown import shown

from dsft.basis import require_code
from dsft.compose import Composed, compose
from dsft.config import Run
from dsft.entry import enter
from dsft.examined import family_of
from dsft.flags import hydra_flags
from dsft.folder import provenance
from dsft.idle import refuse_without_experts
from dsft.imports import unlogged
from dsft.models.reach import reach
from dsft.proven import proven
from dsft.searched import own_folder_last
from dsft.wording import refuse

if TYPE_CHECKING:
    from dsft.models.files import ModelFiles


USAGE = """usage: python -m dsft.plan [KEY=VALUE ...] [--gpu N] [--json] [--config-dir DIR]

Shows what python -m dsft.run with the same overrides would be: parameters by role, memory of a rank part by part, what
is chosen or refused, whether the combination was tested. Loads no weights, reads no data, starts nothing. Works for
GPUs and SLURM jobs that are elsewhere, and without a network for models whose shape is under conf/model.

  --gpu N           the run is for GPUs of N GiB each: held against them, with each train.gradient_checkpointing
  --json            one JSON object instead of text; memory in bytes per rank, memory.available null if it is unknown
  --config-dir DIR  a folder with options of your own
  --help            this

example: python -m dsft.plan method=qlora model=llama70b launcher.nodes=4 launcher.devices=8 --gpu 80
exit codes: 0 the plan is printed, also of what does not fit; 2 the run would be refused: one line on stderr says why
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; 2 if the run is refused."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"--help", "-h"} & set(words):
        print(USAGE, end="")
        return 0
    try:
        words, gpu = _take_gpu(words)
        flags, overrides = hydra_flags([word for word in words if word != "--json"])
        if flags:
            raise ValueError(f"dsft.plan plans one run and takes no {_foreign(flags)}; see python -m dsft.plan --help")
        composed = compose(overrides, planning=True, gpus=gpu is not None)
        composed.run.model.check(planning=True)
        check_gpus_here(composed)
        if composed.run.resume.allow == () and not composed.run.resume.anew:
            require_code(composed.run.model, provenance(Path(composed.run.run_dir)))
        with unlogged():
            plan = make_plan(composed, composed.run.files(planning=True), device_bytes=gpu)
    except ValueError as error:
        return refuse(error)
    place = composed.start.place
    if not place.here and not place.gpus:
        plan["notes"].append("counted as on CPUs, bf16 or not as on this machine; --gpu N, GiB of each, plans for GPUs")
    print(json.dumps(plan, indent=1) if "--json" in words else shown(as_text(plan)))
    return 0


def check_gpus_here(composed: Composed) -> None:
    """Raise ValueError where the run is this machine's and torch can use none of the GPUs that it is to have here."""
    start, wanted = composed.start, composed.run.launcher.gpus
    if start.place.here and wanted != ON_CPUS and promised_devices(os.environ):
        from dsft.comm.sight import refuse_unusable

        refuse_unusable(os.environ)


def _take_gpu(words: Sequence[str]) -> tuple[list[str], int | None]:
    """The words without --gpu N, and bytes for its GiB. Raises ValueError unless N is a number above 0."""
    for index, word in enumerate(words):
        if word != "--gpu" and not word.startswith("--gpu="):
            continue
        own = 1 if "=" in word else 2
        given = [word.partition("=")[2]] if own == 1 else words[index + 1 : index + 2]
        rest, other = _take_gpu([*words[:index], *words[index + own :]])
        try:
            gib = float(given[0]) if given and other is None else math.nan
        except ValueError:
            gib = math.nan
        if not 0 < gib < math.inf:
            got = "two" if other is not None else given[0] if given else "none"
            raise ValueError(f"--gpu must be the GiB of one GPU, a number above 0, got {got}; such as --gpu 80")
        return rest, round(gib * 2**30)
    return list(words), None


def _foreign(flags: Sequence[str]) -> str:
    """The first of Hydra's flags that is not --config-dir, which the plan takes too."""
    return next(word for word in flags if word.startswith("-") and word.split("=")[0] not in ("--config-dir", "-cd"))


def make_plan(composed: Composed, files: "ModelFiles", *, device_bytes: int | None = None) -> dict[str, Any]:
    """One JSON object: parameters (total, trainable, by role), memory of a rank in bytes, choices, repairs.

    device_bytes: of a rank's device, where it is not this machine's.
    """
    from dsft.engine.assemble import skeleton
    from dsft.engine.budget import estimates
    from dsft.models.census import census
    from dsft.models.randomness import refuse as refuse_unkeyed
    from dsft.models.randomness import told

    run = composed.run
    refuse_unkeyed(vars(run.model).get("config"))
    check_positions(run, files)
    family = family_of(files)
    bones = skeleton(run, files, family)
    refuse_without_experts(composed.overrides, there=bool(bones.anatomy.experts))
    counts = census(bones.model, bones.anatomy)
    accelerator = composed.start.place.gpus > 0
    budgets = estimates(run, bones, composed.start.size, accelerator=accelerator)
    memory = budgets[run.train.gradient_checkpointing].as_dict()
    here = device_bytes is None
    memory["available"] = _available(composed, accelerator=accelerator) if here else device_bytes
    names = {choice.group: choice.option for choice in composed.choices}
    providers = {choice.group: choice.provider for choice in composed.choices if choice.provider != "dsft"}
    notes = [*told(files.config), *_notes(run, memory, device_bytes, accelerator=accelerator)]
    notes += run.method.notes(bones.model, bones.anatomy)
    if bones.silenced:
        notes.append(
            f"dropout of the model is set to 0 ({_few(bones.silenced)}): the objective compares forward passes"
        )
    unproven = _unproven(composed, files, counts, memory)
    return {
        "model": files.name_or_path,
        "family": {**family.as_dict(), "verdict": family.verdict},
        "choices": names,
        "providers": providers,
        "repaired": list(composed.repairs),
        "parameters": counts,
        "quantization": run.quantization.report(bones.model),
        "memory": memory,
        "total_by_gradient_checkpointing": {name: budget.as_dict()["total"] for name, budget in budgets.items()},
        "gpu_bytes": device_bytes,
        "proven": proven(run, names, providers, experts=bool(bones.anatomy.experts)),
        "notes": [*notes, *unproven],
        "global_batch_size": run.train.global_batch_size,
    }


def _few(names: Sequence[str]) -> str:
    """The first two names, and how many there are besides."""
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more


def check_positions(run: Run, files: "ModelFiles") -> None:
    """Raise ValueError where the method leaves no position for a token."""
    known, before = reach(files.config), run.method.positions
    if known is not None and before >= known:
        raise ValueError(
            f"method.num_virtual_tokens must be below {known}, the positions of the model, got {before}; lower it"
        )


def _available(composed: Composed, *, accelerator: bool) -> int | None:
    """Bytes that this machine has for one rank, of its accelerator or of the host; None for a job's nodes."""
    if not composed.start.place.here:
        return None
    from dsft.telemetry.cards import device_memory_bytes
    from dsft.telemetry.meter import host_memory_bytes

    if accelerator:
        return device_memory_bytes()
    start, memory = composed.start, host_memory_bytes()
    here = int(start.variables.get("LOCAL_WORLD_SIZE", start.size // composed.run.launcher.nodes))
    return None if memory is None else memory // here


def _memory(memory: Mapping[str, int | None]) -> Iterator[str]:
    """The sum and each part."""

    def gib(name: str) -> str:
        value = memory[name]
        return "unknown" if value is None else f"{value / 2**30:.2f}"

    parts = [name for name in memory if name not in ("total", "available") and memory[name] != 0]
    least = "at least " if memory["activations"] is None else "about "
    of = "" if memory["available"] is None else f" of {gib('available')}"
    yield f"memory       {least}{gib('total')}{of} GiB per rank: " + ", ".join(f"{name} {gib(name)}" for name in parts)


def _recomputed(plan: Mapping[str, Any]) -> Iterator[str]:
    """What each way to recompute comes to, against a GPU that was named."""
    if plan["gpu_bytes"] is None:
        return
    least = "at least " if plan["memory"]["activations"] is None else ""
    for name, total in plan["total_by_gradient_checkpointing"].items():
        fits = "does not fit" if total > plan["gpu_bytes"] else "unknown whether it fits" if least else "fits"
        yield f"  train.gradient_checkpointing={name:<10} {least}{total / 2**30:8.2f} GiB  {fits}"


def _notes(run: Run, memory: Mapping[str, int | None], device_bytes: int | None, *, accelerator: bool) -> Iterator[str]:
    """What a person should know of the plan, and no reason to refuse it."""
    total, available = memory["total"], memory["available"]
    if total is not None and available is not None and total > available:
        whose = "this machine's memory" if device_bytes is None else f"a GPU of {device_bytes / 2**30:g} GiB"
        yield (
            f"{whose} will not do: lower train.micro_batch_tokens, set train.gradient_checkpointing=full, take "
            "method=qlora or strategy=fsdp on more devices"
        )
    if run.train.offload_activations and not accelerator:
        yield "train.offload_activations does nothing here: without an accelerator they are in host memory as it is"


def _told(family: Mapping[str, Any]) -> str:
    """How examples of a model are computed that cannot share a row, and why."""
    whose = "" if family["attention"].startswith("dsft") else f", by the model's own attention ({family['attention']})"
    return f"{family['model_type']}: each example is a micro-batch of its own{whose}: {family['reason']}"


def _unproven(
    composed: Composed, files: "ModelFiles", counts: Mapping[str, Any], memory: Mapping[str, int | None]
) -> Iterator[str]:
    """What is said where the result will not be compared with the model that was trained; see verify.foreseen."""
    from dsft import verify
    from dsft.telemetry.meter import host_memory_bytes

    run, start = composed.run, composed.start
    machine, needed = host_memory_bytes() if start.place.here else None, verify.base_bytes(run, counts["total"])
    ranks = 0 if start.place.gpus else int(start.variables.get("LOCAL_WORLD_SIZE", start.size // run.launcher.nodes))
    why_not = verify.unproven(files.init, needed, machine, ranks * (memory["total"] or 0))
    if why_not is not None and run.checkpoint.verify_result:
        yield f"the result will not be compared with the model, its tensors alone will: {why_not}"


def as_text(plan: dict[str, Any]) -> str:
    """The plan for a reader."""
    counts = plan["parameters"]
    share = 100 * counts["trainable"] / counts["total"]
    lines = [
        f"model        {plan['model']}",
        "choices      " + " ".join(f"{group}={option}" for group, option in plan["choices"].items()),
        f"parameters   {counts['total']:,} total, {counts['trainable']:,} trainable ({share:.3f} %)",
    ]
    lines += [
        f"  {role:<10} {part['total']:>16,} total {part['trainable']:>14,} trainable"
        for role, part in counts["by_role"].items()
    ]
    if plan["family"]["reason"]:
        lines.append(f"family       {_told(plan['family'])}")
    lines += [f"quantization {plan['quantization']}"] if plan["quantization"] else []
    lines += [*_memory(plan["memory"]), *_recomputed(plan)]
    lines += [f"proven       {plan['proven']}"] if plan["proven"] else []
    lines += [f"provided by  {group}: {provider}" for group, provider in plan["providers"].items()]
    lines += [f"repaired     {line}" for line in plan["repaired"]]
    lines += [f"note         {line}" for line in plan["notes"]]
    return "\n".join(lines)


if __name__ == "__main__":
    own_folder_last()
    enter(main)
