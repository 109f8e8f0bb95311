"""python -m dsft.plan [overrides] [--json]: what a run would be, in seconds and without weights."""

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dsft.compose import Composed, compose, hydra_flags
from dsft.entry import enter

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
    """One JSON object: parameters (total, trainable, by role), bytes of the base, choices, repairs."""
    from dsft.engine.assemble import skeleton
    from dsft.models.census import census

    run = composed.run
    bones = skeleton(run, files)
    counts = census(bones.model, bones.anatomy)
    return {
        "model": files.name_or_path,
        "choices": {choice.group: choice.option for choice in composed.choices},
        "providers": {choice.group: choice.provider for choice in composed.choices if choice.provider != "dsft"},
        "repaired": list(composed.repairs),
        "parameters": counts,
        "quantization": run.quantization.report(bones.model),
        "global_batch_size": run.train.global_batch_size,
    }


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
    lines += [f"provided by  {group}: {provider}" for group, provider in plan["providers"].items()]
    lines += [f"repaired     {line}" for line in plan["repaired"]]
    return "\n".join(lines)


if __name__ == "__main__":
    enter(main)
