"""The learning table as a page, benchmarks/results/methods-smollm2.md, and as a chart, docs/methods.svg."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "benchmarks" / "results" / "methods-smollm2.md"
CHART = ROOT / "docs" / "methods.svg"

HEAD = """\
# What each method learns in {steps} steps

SmolLM2-135M-Instruct, sums of two numbers of one and two digits (reasoning_gym's basic_arithmetic), {steps} steps of
16 examples, {precision}, AdamW, a twelfth of the steps of warm-up, then linear decay; every method as its YAML has it,
with the rate that it names (`optim.lr=auto`). Papers' rates are for models tens of times larger and runs tens of times
longer: the table says what a default does in a short run, not which method is best. Loss: of 48 held-out sums, in nats
per supervised token; exact match: greedy answers to the same. State: the optimizer's. Tokens/s and peak: of the steps
alone, the first left out for speed. Seconds: of all, from the base's file to the last answer.

Made by `python -m benchmarks.learns` {where}.
"""

OTHER = "The same run with one thing changed, the largest gain first; what was tried and did worse stands too."

COLUMNS = ("method", "rate", "trainable", "share", "loss before", "after", "lowered by", "exact match before", "after",
           "state MiB", "tokens/s", "peak MiB", "seconds", "code")  # fmt: skip


def newest(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per method and change, the last, with the speed timed last; by the loss at the end, the refused last."""
    last = {(line["method"], line.get("changed", "")): line for line in lines if not line.get("timed")}
    for line in lines:
        key = (line["method"], line.get("changed", ""))
        if line.get("timed") and key in last:
            last[key] = {**last[key], "tokens_per_s": line["tokens_per_s"]}
    return sorted(last.values(), key=lambda line: ("refused" in line, line.get("loss_after", 0.0), line["method"]))


def lowered(line: dict[str, Any]) -> float:
    """Share by which the held-out loss is lower afterwards; below 0 where it is higher."""
    share: float = 1 - line["loss_after"] / line["loss_before"]
    return share


def page(lines: list[dict[str, Any]], steps: int) -> str:
    """The page. A method that does not lower the loss is red."""
    best, changed = own(lines), [line for line in newest(lines) if line.get("changed") and "refused" not in line]
    measured = [line for line in best if "refused" not in line]
    if not measured:
        return f"# What each method learns in {steps} steps\n\nNothing is measured yet; `make learns` does.\n"
    red = [line["method"] for line in measured if not lowered(line) > 0]
    where = "; ".join(sorted({f"on {line['machine'].rpartition(', commit')[0]}" for line in best}))
    precision = ", ".join(sorted({line["precision"] for line in measured}))
    said = f"Red, as it does not lower the loss: {', '.join(red)}." if red else "Every method below lowers the loss."
    rows = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *map(_row, measured)]
    refused = [f"\n{line['method']} is refused: {line['refused']}" for line in best if "refused" in line]
    head = HEAD.format(steps=steps, precision=precision, where=where)
    told = [head, f"Methods: {len(measured)}. {said}", "", *rows, *refused, *_other(changed, measured)]
    return "\n".join(told) + "\n"


def own(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of methods at their own settings."""
    return [line for line in newest(lines) if not line.get("changed")]


def _other(changed: list[dict[str, Any]], measured: list[dict[str, Any]]) -> Iterator[str]:
    """Settings that differ from the methods' own, beside what those give; the largest gain first."""
    if not changed:
        return
    defaults = {line["method"]: line for line in measured}
    gains = [
        (lowered(line) - lowered(defaults[line["method"]]), line) for line in changed if line["method"] in defaults
    ]
    yield from ["", "## Other settings", "", OTHER, ""]
    yield from [
        "| method | changed | loss after, its own settings | so | exact match | so | more is lowered by |",
        "|---" * 7 + "|",
    ]
    for gain, line in sorted(gains, key=lambda one: -one[0]):
        default = defaults[line["method"]]
        cells = [
            line["method"], f"`{line['changed']}`", f"{default['loss_after']:.3f}", f"{line['loss_after']:.3f}",
            f"{default['accuracy_after']:.0%}", f"{line['accuracy_after']:.0%}", f"{100 * gain:+.1f} points",
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def _row(line: dict[str, Any]) -> str:
    share = lowered(line)
    name = line["method"]
    cells = [
        f"[{name}](../../docs/methods/{name}.md)", f"{line['lr']:g}", f"{line['trainable']:,}",
        f"{line['trainable'] / line['total']:.3%}", f"{line['loss_before']:.3f}", f"{line['loss_after']:.3f}",
        f"{share:.1%}" if share > 0 else f"**RED** {share:.1%}", f"{line['accuracy_before']:.0%}",
        f"{line['accuracy_after']:.0%}", f"{line['state_bytes'] / 2**20:,.2f}", f"{line['tokens_per_s']:,.0f}",
        f"{line['peak_memory_bytes'] / 2**20:,.0f}", f"{line['seconds']:.0f}", line["commit"],
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


LEFT, WIDE, HIGH, RIGHT = 150, 380, 22, 210
"""Pixels: names; a bar of 100 %; a row; figures."""


def chart(lines: list[dict[str, Any]]) -> str:
    """A bar per method: by how much the held-out loss is lower, best first; red where it is not."""
    measured = sorted((line for line in own(lines) if "refused" not in line), key=lowered, reverse=True)
    width, height = LEFT + WIDE + RIGHT, HIGH * (len(measured) + 2)
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12" fill="#222">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="{LEFT}" y="15">held-out loss lowered by (exact match afterwards, parameters that learn)</text>',
    ]
    for index, line in enumerate(measured, start=1):
        share, top = lowered(line), HIGH * index + 4
        length, color = max(1.0, min(1.0, abs(share)) * WIDE), "#2a6f97" if share > 0 else "#c1121f"
        told = f"{share:.0%} ({line['accuracy_after']:.0%}, {line['trainable']:,})"
        drawn += [
            f'<text x="{LEFT - 8}" y="{top + 12}" text-anchor="end">{escape(line["method"])}</text>',
            f'<rect x="{LEFT}" y="{top}" width="{length:.1f}" height="{HIGH - 6}" fill="{color}"/>',
            f'<text x="{LEFT + length + 6:.1f}" y="{top + 12}">{told}</text>',
        ]
    return "\n".join([*drawn, "</svg>"]) + "\n"
