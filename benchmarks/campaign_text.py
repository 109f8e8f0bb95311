"""The report of a campaign of faults."""

import statistics
from collections.abc import Mapping, Sequence

from benchmarks.campaign import KINDS, STEPS, Campaign, Over
from benchmarks.machine import here
from benchmarks.run_folders import events

HEAD = """\
# The campaign of faults: runs through faults at random moments

Tiny models, fp32, {steps} steps, a save every 3, an evaluation with generation every 9, `train.hang_after=5`. Each run
goes through its faults one after the other, each in a new start of the same command, and then ends. It is compared bit
by bit with a run of the same layout that had none: result, optimizer state, samples.jsonl, losses of every step.

Faults are drawn from the seed: the kind, the phase (step, save, evaluation, loading, result), the rank, the moment. A
full disk (ENOSPC in one save of one rank) ends no attempt: the run goes on by itself. After some of the kills, a file
of the newest checkpoint is damaged before the next start. Seconds are those from the fault to the next step on record:
the fault is noticed, all ranks end, the same command is typed again at once, and it loads. A fault after the last step
has none.
"""


def report(found: Mapping[str, tuple[Campaign, Sequence[str]]], typed: str, minutes: float) -> str:
    """The page: configurations, then kinds."""
    everything = [over for one, _ in found.values() for over in one.over]
    made = sum(over.happened for over in everything)
    lines = [
        HEAD.format(steps=STEPS),
        f"`{typed}`: {made} faults happened of {len(everything)} that were planted ({len(everything) - made} attempts "
        f"were over before their moment); {minutes:.0f} minutes in its last sitting, on {here()}.",
        "",
        "| configuration | " + " | ".join(KINDS) + " | resumed from | different |",
        "|---|" + "---|" * (len(KINDS) + 2),
    ]
    for name, (one, different) in found.items():
        counts = [str(sum(over.happened and over.kind == kind for over in one.over)) for kind in KINDS]
        steps = [str(event["step"]) for event in events(one.run, "resume")]
        said = "; ".join(different[:3]) or "nothing"
        lines.append(f"| {name} | {' | '.join(counts)} | {', '.join(steps)} | {said} |")
    lines += ["", "| kind | faults | median seconds to the next step | worst |", "|---|---|---|---|"]
    for kind in KINDS:
        lines.append(f"| {kind} | {_times([over for over in everything if over.happened and over.kind == kind])} |")
    lines += ["", "| phase | faults | median seconds to the next step | worst |", "|---|---|---|---|"]
    for phase in dict.fromkeys(over.phase for over in everything):
        lines.append(f"| {phase} | {_times([over for over in everything if over.happened and over.phase == phase])} |")
    return "\n".join(lines) + "\n"


def _times(overs: Sequence[Over]) -> str:
    seconds = [over.after_s for over in overs if over.after_s is not None]
    if not seconds:
        return f"{len(overs)} | - | -"
    return f"{len(overs)} | {statistics.median(seconds):.1f} | {max(seconds):.1f}"
