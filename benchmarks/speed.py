"""Speed and memory against the plain loop and TRL: the same examples, interleaved, medians, as ratios.

python -m benchmarks.speed [--mode lora|qlora|full] [--peers plain,dsft,trl,trl-best] [--steps 4] [--rounds 3]
writes benchmarks/results/speed-MODE.md. 8 examples of GSM8K a step, SmolLM2-135M; the first step is not timed.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.load_memory import peak_mib
from benchmarks.machine import here

BATCH, RATE = 8, 2e-4
GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"
PEERS = {
    "plain": "transformers + PEFT, padded batches",
    "dsft": "this project",
    "trl": "TRL, its defaults",
    "trl-best": "TRL, grouped by length (other examples in each step)",
}

KEYS = ("tok_s", "tok_cpu_s", "padding", "peak_mib")


@dataclass
class Step:
    """tokens: real ones; positions: with padding; CPU seconds: of all threads; loss in nats per supervised token."""

    tokens: int
    supervised: int
    positions: int
    seconds: float
    cpu_seconds: float
    loss: float


class Clock:
    """Collects steps; one begins where the last ended."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.begin()

    def begin(self) -> None:
        """The next step begins now."""
        self.wall, self.cpu = time.perf_counter(), _cpu()

    def end(self, tokens: int, supervised: int, positions: int, loss: float) -> None:
        """A step is over."""
        seconds, cpu = time.perf_counter() - self.wall, _cpu() - self.cpu
        self.steps.append(Step(tokens, supervised, positions, seconds, cpu, loss))
        self.begin()


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def words(mode: str, rows: Path) -> list[str]:
    """Overrides of the run that all peers make."""
    return [
        "model=smollm2_135m", f"method={mode}", "data=local", f"data.path={rows}", "data.shuffle=false",
        f"train.global_batch_size={BATCH}", "train.max_length=512", "train.max_grad_norm=inf", "launcher=local",
        f"optim.lr={RATE}", "optim.weight_decay=0", "tracker=[]", f"train.precision={os.environ['PRECISION']}",
    ]  # fmt: skip


def run_dsft(mode: str, rows: Path, steps: int) -> list[Step]:
    """The engine's own assembly and step."""
    import torch

    from dsft.comm.world import World
    from dsft.compose import compose
    from dsft.data.open import open_data
    from dsft.engine.assemble import assemble
    from dsft.engine.loop import step_batches
    from dsft.engine.step import train_step

    run = compose(words(mode, rows)).run
    files = run.model.resolve()
    data = open_data(run.data, files.tokenizer(), max_length=512, seed=0)
    session = assemble(run, files, World(0, 1, 0, torch.device("cpu")))
    clock = Clock()
    for step in range(1, steps + 1):
        result = train_step(session, step_batches(session, data, step)[1], step, 1.0)
        clock.end(result.tokens, result.supervised, result.tokens, result.loss)
    return clock.steps


def _base(mode: str) -> tuple[Any, Any, Any]:
    """Model, PEFT configuration and tokenizer as a user of transformers makes them."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from benchmarks.plain import LINEARS
    from dsft.compose import compose

    folder = compose(["model=smollm2_135m"]).run.model.resolve().name_or_path
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[os.environ["PRECISION"]]
    packed = {}
    if mode == "qlora":
        packed["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **packed)
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS, task_type="CAUSAL_LM")
    return model, None if mode == "full" else adapter, AutoTokenizer.from_pretrained(folder)


def run_plain(mode: str, rows: Path, steps: int) -> list[Step]:
    """What is written by hand: pad to the longest, the model's own loss, AdamW."""
    import torch
    from peft import get_peft_model

    from benchmarks.plain import encode, padded

    model, adapter, tokenizer = _base(mode)
    model = model if adapter is None else get_peft_model(model, adapter)
    model.train()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    encoded = [encode(tokenizer, row) for row in _read(rows)[: steps * BATCH]]
    clock = Clock()
    for step in range(steps):
        examples = encoded[step * BATCH : (step + 1) * BATCH]
        batch = padded(examples)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        supervised = int((batch["labels"][:, 1:] != -100).sum())
        clock.end(sum(len(tokens) for tokens, _ in examples), supervised, batch["labels"].numel(), float(loss))
    return clock.steps


def run_trl(mode: str, rows: Path, steps: int, *, grouped: bool = False) -> list[Step]:
    """TRL's SFTTrainer; grouped: examples of like length together, its fastest setting here."""
    import torch
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl import SFTConfig, SFTTrainer

    model, adapter, tokenizer = _base(mode)
    clock = Clock()

    class Timed(SFTTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *args: Any) -> Any:
            return super()._get_train_sampler(*args) if grouped else SequentialSampler(self.train_dataset)

        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == len(clock.steps):
                self.seen = (inputs["attention_mask"].sum(), (inputs["labels"][:, 1:] != -100).sum())
                self.width = inputs["attention_mask"].numel()
            self.last = super().training_step(model, inputs, *args, **kwargs)
            return self.last

        def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step > len(clock.steps):  # it is called once more at the end
                clock.end(int(self.seen[0]), int(self.seen[1]), self.width, float(self.last))
            return super()._maybe_log_save_evaluate(*args, **kwargs)

    bf16 = os.environ["PRECISION"] == "bf16"
    data = [
        {"prompt": [{"role": "user", "content": row["question"]}],
         "completion": [{"role": "assistant", "content": row["answer"]}]}
        for row in _read(rows)[:256]
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder, per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=RATE, bf16=bf16,
            lr_scheduler_type="constant", weight_decay=0.0, save_strategy="no", report_to=[], use_cpu=True,
            gradient_checkpointing=False, max_length=512, dataloader_pin_memory=False, logging_strategy="no",
            **({"train_sampling_strategy": "group_by_length"} if grouped else {}),
        )  # fmt: skip
        trainer = Timed(
            model, args=config, train_dataset=Dataset.from_list(data), processing_class=tokenizer, peft_config=adapter
        )
        torch.manual_seed(0)
        clock.begin()
        trainer.train()
    return clock.steps


def _read(rows: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in rows.read_text().splitlines()]


def child(peer: str, mode: str, rows: Path, steps: int) -> int:
    """Run one peer in this process and print what it took."""
    if peer.startswith("trl"):
        done = run_trl(mode, rows, steps, grouped=peer == "trl-best")
    else:
        done = {"plain": run_plain, "dsft": run_dsft}[peer](mode, rows, steps)
    print(json.dumps({"steps": [asdict(step) for step in done], "peak_mib": peak_mib()}))
    return 0


def measure(peer: str, mode: str, rows: Path, steps: int) -> dict[str, Any]:
    """Run a peer in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.speed", "--child", peer, "--mode", mode, "--data", str(rows)]
    done = subprocess.run([*command, "--steps", str(steps)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{peer}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    timed = found["steps"][1:]
    tokens = sum(step["tokens"] for step in timed)
    found["tok_s"] = tokens / sum(step["seconds"] for step in timed)
    found["tok_cpu_s"] = tokens / sum(step["cpu_seconds"] for step in timed)
    found["padding"] = 1 - tokens / sum(step["positions"] for step in timed)
    return found


def _table(found: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    yield "| | real tokens/s | x plain | tokens/CPU-s | padding | peak MiB | x plain | losses at steps 1, 2, last |"
    yield "|---|---|---|---|---|---|---|---|"
    middle = {peer: {key: statistics.median(run[key] for run in runs) for key in KEYS} for peer, runs in found.items()}
    base = middle["plain"]
    for peer, values in middle.items():
        losses = [found[peer][0]["steps"][index]["loss"] for index in (0, 1, -1)]
        speed, memory = values["tok_s"] / base["tok_s"], values["peak_mib"] / base["peak_mib"]
        yield (
            f"| {PEERS[peer]} | {values['tok_s']:.0f} | {speed:.2f} | {values['tok_cpu_s']:.0f} | "
            f"{values['padding']:.0%} | {values['peak_mib']:,.0f} | {memory:.2f} | "
            f"{', '.join(f'{loss:.4f}' for loss in losses)} |"
        )


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=("lora", "qlora", "full"), default="lora")
    parser.add_argument("--peers", default="plain,dsft,trl,trl-best")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=GSM8K, help="rows with question and answer")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default=None)
    parser.add_argument("--child", choices=tuple(PEERS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.mode, args.data, args.steps)
    if not args.data.is_file():
        print(f"benchmarks.speed: --data must be a .jsonl of GSM8K, {args.data} is not there", file=sys.stderr)
        return 2
    from dsft.compose import compose

    precision = args.precision or compose(["model=tiny"]).run.train.precision
    os.environ |= {"PRECISION": precision, "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}
    found: dict[str, list[dict[str, Any]]] = {peer: [] for peer in args.peers.split(",")}
    for turn in range(args.rounds):
        for peer, runs in found.items():
            runs.append(measure(peer, args.mode, args.data, args.steps))
            print(
                f"round {turn + 1} {peer}: {runs[-1]['tok_s']:.0f} tokens/s, {runs[-1]['peak_mib']:.0f} MiB", flush=True
            )
    head = [
        f"# Speed: {args.mode}",
        "",
        f"SmolLM2-135M, GSM8K, {BATCH} examples a step, {precision}, rank 16 on all linears; medians of {args.rounds} "
        f"interleaved rounds of {args.steps - 1} timed steps.",
        f"`python -m benchmarks.speed --mode {args.mode} --steps {args.steps} --rounds {args.rounds}` on {here()}.",
        "",
    ]
    out = args.out or Path(f"benchmarks/results/speed-{args.mode}.md")
    out.write_text("\n".join([*head, *_table(found)]) + "\n")
    print(out.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
