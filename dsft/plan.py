"""python -m dsft.plan [overrides] [--json]: what a run would be, in seconds and without weights."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dsft.compose import Composed, compose, hydra_flags
from dsft.config import Run
from dsft.entry import enter
from dsft.proven import proven

if TYPE_CHECKING:
    from dsft.models.files import ModelFiles


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; 2 if the run is refused."""
    words = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in words
    try:
        _, overrides = hydra_flags([word for word in words if word != "--json"])
        composed = compose(overrides)
        composed.run.model.check(planning=True)
        plan = make_plan(composed, composed.run.model.resolve(planning=True))
    except ValueError as error:
        print(f"dsft: {error}", file=sys.stderr)
        return 2
    print(json.dumps(plan, indent=1) if as_json else as_text(plan))
    return 0


def make_plan(composed: Composed, files: "ModelFiles") -> dict[str, Any]:
    """One JSON object: parameters (total, trainable, by role), memory of a rank in bytes, choices, repairs."""
    from dsft.engine.assemble import skeleton
    from dsft.engine.budget import estimate
    from dsft.models.census import census

    run = composed.run
    check_positions(run, files)
    bones = skeleton(run, files)
    counts = census(bones.model, bones.anatomy)
    accelerator = composed.start.place.gpus > 0
    memory = estimate(run, bones, composed.start.size, accelerator=accelerator).as_dict()
    memory["available"] = _available(composed, accelerator=accelerator)
    names = {choice.group: choice.option for choice in composed.choices}
    providers = {choice.group: choice.provider for choice in composed.choices if choice.provider != "dsft"}
    return {
        "model": files.name_or_path,
        "choices": names,
        "providers": providers,
        "repaired": list(composed.repairs),
        "parameters": counts,
        "quantization": run.quantization.report(bones.model),
        "memory": memory,
        "proven": proven(run, names, providers, experts=bool(bones.anatomy.experts)),
        "notes": list(_notes(run, memory, accelerator=accelerator)),
        "global_batch_size": run.train.global_batch_size,
    }


def check_positions(run: Run, files: "ModelFiles") -> None:
    """Raise ValueError where the method leaves no position for a token."""
    shape, before = files.config, run.method.positions
    reach = getattr(shape, "max_position_embeddings", None)
    if reach is not None and before >= reach:
        raise ValueError(
            f"method.num_virtual_tokens must be below {reach}, the positions of the model, got {before}; lower it"
        )


def _available(composed: Composed, *, accelerator: bool) -> int | None:
    """Bytes that this machine has for one rank, of its accelerator or of the host; None for a job's nodes."""
    if not composed.start.place.here:
        return None
    from dsft.telemetry.meter import device_memory_bytes, host_memory_bytes

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


def _notes(run: Run, memory: Mapping[str, int | None], *, accelerator: bool) -> Iterator[str]:
    """What a person should know of the plan, and no reason to refuse it."""
    total, available = memory["total"], memory["available"]
    if total is not None and available is not None and total > available:
        yield (
            "this machine's memory will not do: lower train.micro_batch_tokens, set train.gradient_checkpointing=full, "
            "take method=qlora or strategy=fsdp on more devices"
        )
    if run.train.offload_activations and not accelerator:
        yield "train.offload_activations does nothing here: without an accelerator they are in host memory as it is"


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
    lines += [f"quantization {plan['quantization']}"] if plan["quantization"] else []
    lines += _memory(plan["memory"])
    lines += [f"proven       {plan['proven']}"] if plan["proven"] else []
    lines += [f"provided by  {group}: {provider}" for group, provider in plan["providers"].items()]
    lines += [f"repaired     {line}" for line in plan["repaired"]]
    lines += [f"note         {line}" for line in plan["notes"]]
    return "\n".join(lines)


if __name__ == "__main__":
    enter(main)
