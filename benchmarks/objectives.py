"""What objectives learn on real rows, and what they cost: GSM8K's pairs and lines, SmolLM2-135M, LoRA.

python -m benchmarks.objectives pairs     dpo on 600 pairs of a right and a wrong solution, held-out accuracy on 131
python -m benchmarks.objectives reward    a reward model on the same pairs
python -m benchmarks.objectives classes   which operator a line of a solution is about: F1 on held-out lines
python -m benchmarks.objectives cost      memory and speed of dpo against sft over the same tokens

Each writes benchmarks/results/objective-NAME.md. --steps N shortens the runs, for a try.
"""

import argparse
import json
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import here
from benchmarks.measure import GSM8K

ROOT = Path(__file__).parents[1]
RESULTS, RUNS = ROOT / "benchmarks" / "results", ROOT / "runs" / "objectives"
TRAINED, HELD = 600, 131
SEEDS = (0, 1, 2)
WORDS = [
    "model=smollm2_135m", "method=lora", "data=local", "strategy=single", "launcher=local", "launcher.devices=1",
    "tracker=[]", "checkpoint=none", "optim.schedule=constant", "train.max_length=1024",
]  # fmt: skip
OPERATORS = {"+": "plus", "-": "minus", "*": "times"}
LINE = re.compile(r"<<(\d+(?:\.\d+)?)([-+*])(\d+(?:\.\d+)?)=[^>]*>>")


def run(name: str, *words: str) -> list[dict[str, Any]]:
    """Make a run anew; the lines of its metrics."""
    place = RUNS / name
    subprocess.run(["rm", "-rf", str(place)], check=True)
    command = [sys.executable, "-m", "dsft.run", *WORDS, *words, f"run_dir={place}"]
    print(shlex.join(command[1:]), flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    return [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]


def written(name: str, rows: Sequence[dict[str, Any]]) -> Path:
    """A file of rows."""
    RUNS.mkdir(parents=True, exist_ok=True)
    path = RUNS / f"{name}.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def preferences() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The first pairs, and the last."""
    rows = [json.loads(line) for line in GSM8K.with_name("preferences.jsonl").read_text().splitlines()]
    return rows[:TRAINED], rows[-HELD:]


def longer_wins(rows: Sequence[dict[str, Any]]) -> float:
    """The share of pairs whose chosen side has more tokens."""
    from dsft.compose import compose

    tokenizer: Any = compose(["model=smollm2_135m"]).run.model.resolve().tokenizer()
    sizes = [[len(tokenizer(row[side]).input_ids) for side in ("chosen", "rejected")] for row in rows]
    return sum(chosen > rejected for chosen, rejected in sizes) / len(sizes)


def of_pairs(objective: str, steps: int | None, *words: str, seeds: Sequence[int] = SEEDS) -> Iterator[str]:
    """Held-out accuracy of each seed beside the rule of length and the ranking of the base."""
    train, held = preferences()
    data = [f"data.path={written('pairs', train)}", f"data.eval_path={written('held', held)}"]
    length = f"train.steps={steps}" if steps else "train.epochs=1"
    found = []
    for seed in seeds:
        lines = run(f"{objective}-{seed}", f"objective={objective}", *data, length, f"train.seed={seed}", *words)
        last = [line["eval/reward_accuracy"] for line in lines if "eval/reward_accuracy" in line][-1]
        print(f"{objective}, seed {seed}: {last:.4f}", flush=True)
        found.append(last)
    ranked = run("ranking", "objective=simpo", "objective.gamma=0", *data, "train.steps=1")
    mean, rule = statistics.mean(found), longer_wins(held)
    of_rows = (mean * (1 - mean) / HELD) ** 0.5
    of_seeds = f"{statistics.stdev(found) / len(found) ** 0.5:.1%} over seeds, " if len(found) > 1 else ""
    yield "| what ranks the held-out pairs | right |"
    yield "|---|---:|"
    yield f"| the longer side | {rule:.1%} |"
    yield f"| the base's mean log-probability | {ranked[0]['eval/reward_accuracy']:.1%} |"
    yield f"| {objective}, seeds {', '.join(map(str, seeds))} | {', '.join(f'{each:.1%}' for each in found)} |"
    yield f"| {objective}, mean | {mean:.1%}, standard error {of_seeds}{of_rows:.1%} over rows |"
    yield ""
    above = "at least" if mean - rule >= of_rows else "NOT"
    yield f"The mean is {above} one standard error of the rows above the rule of length ({(mean - rule):+.1%})."


def pairs(steps: int | None) -> Iterator[str]:
    """Direct preference optimization."""
    return of_pairs("dpo", steps, "optim.lr=1e-4", "train.global_batch_size=8")


def reward(steps: int | None) -> Iterator[str]:
    """A reward model, one seed."""
    return of_pairs("reward", steps, "optim.lr=2e-4", "train.global_batch_size=8", seeds=SEEDS[:1])


def lines_of_solutions() -> list[dict[str, str]]:
    """Lines of GSM8K's solutions with one calculation, its operators hidden; the label is the operator."""
    made: dict[str, list[dict[str, str]]] = {label: [] for label in OPERATORS.values()}
    for row in GSM8K.read_text().splitlines():
        for line in json.loads(row)["answer"].splitlines():
            if len(found := LINE.findall(line)) == 1 and len(re.findall("<<", line)) == 1:
                shown = re.sub(r"<<[^>]*>>", "", line)
                text = re.sub(r"\s*[-+*/x]\s*(?=\$?\d)", " ? ", shown)
                made[OPERATORS[found[0][1]]].append({"text": text, "label": OPERATORS[found[0][1]]})
    least = min(map(len, made.values()))
    return [rows[index] for index in range(least) for rows in made.values()]


def classes(steps: int | None) -> Iterator[str]:
    """Classification of sequences."""
    rows = lines_of_solutions()
    train, held = rows[300:], rows[:300]
    lines = run(
        "classes", "objective=classification", f"data.labels=[{','.join(OPERATORS.values())}]",
        f"data.path={written('lines', train)}", f"data.eval_path={written('held-lines', held)}",
        f"train.steps={steps or 150}", "train.global_batch_size=32", "optim.lr=1e-3",
    )  # fmt: skip
    found = [line for line in lines if "eval/f1_macro" in line]
    yield f"{len(train)} lines to learn from, {len(held)} held out, {steps or 150} steps of 32."
    yield ""
    yield "| | accuracy | F1, macro | F1, micro |"
    yield "|---|---:|---:|---:|"
    for name, line in (("before", found[0]), ("after", found[-1])):
        yield (
            f"| {name} | "
            + " | ".join(f"{line[f'eval/{key}']:.3f}" for key in ("accuracy", "f1_macro", "f1_micro"))
            + " |"
        )


def cost(steps: int | None) -> Iterator[str]:
    """Memory and speed, in turns."""
    train, _ = preferences()
    both = [{"prompt": row["prompt"], "completion": row[side]} for row in train for side in ("chosen", "rejected")]
    data = {"dpo": written("pairs", train), "sft": written("both", both)}
    size = {"dpo": 4, "sft": 8}
    found: dict[str, list[tuple[float, float]]] = {"sft": [], "dpo": []}
    for turn in range(3):
        for name in found:
            lines = run(
                f"cost-{name}-{turn}", f"objective={name}", f"data.path={data[name]}", "data.shuffle=false",
                f"train.steps={steps or 6}", f"train.global_batch_size={size[name]}", "checkpoint.verify_result=false",
            )  # fmt: skip
            told = [line for line in lines if "tokens_per_s" in line][1:]
            found[name].append(
                (statistics.median(line["tokens_per_s"] for line in told), told[-1]["peak_memory_bytes"])
            )
    speed = [dpo[0] / sft[0] for dpo, sft in zip(found["dpo"], found["sft"], strict=True)]
    memory = [dpo[1] / sft[1] for dpo, sft in zip(found["dpo"], found["sft"], strict=True)]
    yield "| | tokens/s | peak memory, GiB |"
    yield "|---|---:|---:|"
    for name, each in found.items():
        rate, peak = (statistics.median(values) for values in zip(*each, strict=True))
        yield f"| {name} | {rate:.0f} | {peak / 2**30:.2f} |"
    yield f"| dpo / sft | {statistics.median(speed):.2f} | {statistics.median(memory):.2f} |"


def main() -> None:
    """Measure one, and write its page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pairs", "reward", "classes", "cost"))
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    if not GSM8K.is_file():
        parser.error(f"GSM8K must lie beside the checkout, {GSM8K} is not there")
    made: dict[str, Any] = {"pairs": pairs, "reward": reward, "classes": classes, "cost": cost}
    told = list(made[args.what](args.steps))
    typed = shlex.join(["python", "-m", "benchmarks.objectives", *sys.argv[1:]])
    page = [f"# {made[args.what].__doc__.rstrip('.')}, on GSM8K", "", f"`{typed}`, {here()}.", "", *told]
    (RESULTS / f"objective-{args.what}.md").write_text("\n".join(page) + "\n")
    print("\n".join(told))


if __name__ == "__main__":
    main()
