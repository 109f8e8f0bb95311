"""Against the ecosystem: the losses of a plain transformers + PEFT loop, and results that its loaders read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.plain import LINEARS, encode, padded
from dsft.comm.world import World
from dsft.compose import compose
from dsft.data.open import open_data
from dsft.engine.assemble import Session, assemble
from dsft.engine.loop import step_batches
from dsft.engine.masks import stream
from dsft.engine.result import write_result
from dsft.engine.step import train_step

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"
STEPS, BATCH, RATE = 20, 2, 2e-4


def _rows(folder: Path) -> Path:
    """GSM8K where it lies beside the project, else as many generated word problems."""
    if GSM8K.is_file():
        return GSM8K
    import reasoning_gym

    path = folder / "rows.jsonl"
    items = reasoning_gym.create_dataset("gsm_symbolic", size=STEPS * BATCH, seed=1)
    path.write_text("".join(json.dumps({"question": i["question"], "answer": i["answer"]}) + "\n" for i in items))
    return path


def _plain_loop(base: str, rows: list[dict[str, str]]) -> list[tuple[float, float]]:
    """What the field writes by hand: padded batches, PEFT, AdamW; loss (mean over supervised tokens), gradient norm."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS, task_type="CAUSAL_LM"))
    for name, param in model.named_parameters():
        if "lora_A" in name:  # dsft's starting point: PEFT's distribution, from a seed that names the parameter
            torch.manual_seed(stream(0, name.removeprefix("base_model.model.")))
            nn.init.kaiming_uniform_(param, a=5**0.5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    steps = []
    for start in range(0, len(rows), BATCH):
        batch = padded([encode(tokenizer, row) for row in rows[start : start + BATCH]])
        labels = batch.pop("labels")
        logits = model(**batch).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps.append((loss.item(), norm.item()))
    return steps


@pytest.mark.parametrize("num_steps", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_losses_equal_a_plain_transformers_and_peft_loop(num_steps: int, tmp_path: Path) -> None:
    path, run_dir = _rows(tmp_path), tmp_path / "run"
    words = [
        "model=smollm2_135m", "method=lora", "data=local", f"data.path={path}", "train.precision=fp32",
        f"train.steps={num_steps}", f"train.global_batch_size={BATCH}", f"optim.lr={RATE}", "optim.schedule=constant",
        "train.log_samples=true", "launcher=local", "tracker=[none]", "checkpoint.verify_result=false",
        f"run_dir={run_dir}",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "dsft.run", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    ours = [(line["loss"], line["grad_norm"]) for line in metrics]
    order = [i for line in (run_dir / "samples.jsonl").read_text().splitlines() for i in json.loads(line)["ids"]]
    source = [json.loads(line) for line in path.read_text().splitlines()]
    chosen = [source[int(sample.rpartition(":")[2])] for sample in order]
    base = json.loads((run_dir / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    theirs = _plain_loop(base, chosen)
    pairs = zip(ours, theirs, strict=True)
    worst = max(abs(a - b) / b for step in pairs for a, b in zip(*step, strict=True))
    print(f"largest relative difference over {num_steps} steps: {worst:.1e}")
    assert len(ours) == num_steps
    assert worst < 1e-4


@pytest.mark.parametrize(("model", "attention"), [("tiny", "eager"), ("tiny_moe", "sdpa")])
def test_a_packed_step_equals_a_padded_batch_in_plain_transformers(model: str, attention: str) -> None:
    run = compose([
        f"model={model}", "method=full", "data=reasoning_gym", "data.size=32", "data.eval_size=0", "launcher=local",
        "train.precision=fp32", "train.global_batch_size=8", "train.micro_batch_tokens=8192",
    ]).run  # fmt: skip
    files = run.model.resolve()
    data = open_data(run.data, files.tokenizer(), max_length=512, seed=0)
    session = assemble(run, files, World(0, 1, 0, torch.device("cpu")))
    rows, batches = step_batches(session, data, 1)
    assert [len(batch.lengths) for batch in batches] == [8]
    examples = [data.train.example(row) for row in rows]
    batch = padded([(ids.tolist(), [int(i) if m else -100 for i, m in zip(ids, mask, strict=True)])
                    for ids, mask in examples])  # fmt: skip
    assert not batch["attention_mask"].all()
    labels = batch.pop("labels")
    plain = AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.float32, attn_implementation=attention)
    logits = plain(**batch).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), float("inf"))
    ours = train_step(session, batches, 1, 1.0)
    assert (ours.loss, ours.grad_norm) == pytest.approx((loss.item(), norm.item()), rel=1e-5)


def _trained(words: list[str]) -> Session:
    """Three steps in this process, at a rate that moves the adapter well away from its start."""
    composed = compose([
        "data=reasoning_gym", "data.size=48", "data.eval_size=0", "train.precision=fp32", "train.steps=3",
        "train.global_batch_size=4", "launcher=local", "optim.lr=5e-3", "optim.schedule=constant", *words,
    ])  # fmt: skip
    files = composed.run.model.resolve()
    data = open_data(composed.run.data, files.tokenizer(), max_length=512, seed=0)
    session = assemble(composed.run, files, World(0, 1, 0, torch.device("cpu")))
    for step in (1, 2, 3):
        train_step(session, step_batches(session, data, step)[1], step, 1.0)
    session.model.eval()
    return session


def _logits(session: Session, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        positions = torch.arange(tokens.shape[1])[None]
        out: torch.Tensor = session.module(
            input_ids=tokens, position_ids=positions, segment_lengths=(tokens.shape[1],), use_cache=False
        ).logits
        return out


FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
tokens = torch.load(sys.argv[1])
if sys.argv[2] == "adapter":
    from peft import AutoPeftModelForCausalLM
    model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[3], dtype=torch.float32)
else:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[3], dtype=torch.float32)
model.eval()
with torch.no_grad():
    torch.save(model(input_ids=tokens).logits, sys.argv[4])
"""


def _in_a_fresh_process(kind: str, folder: Path, tokens: torch.Tensor, scratch: Path) -> torch.Tensor:
    torch.save(tokens, scratch / "tokens.pt")
    words = [sys.executable, "-c", FRESH, scratch / "tokens.pt", kind, folder, scratch / "logits.pt"]
    subprocess.run([str(word) for word in words], check=True, capture_output=True)
    logits: torch.Tensor = torch.load(scratch / "logits.pt")
    return logits


@pytest.mark.parametrize("words", [
    ["model=smollm2_135m", "method=lora"], ["model=tiny", "method=dora"], ["model=tiny_moe", "method=lora"],
    ["model=tiny", "method=lora", "method.target_modules=[lm_head,attention]"],
], ids=" ".join)  # fmt: skip
def test_the_adapter_gives_the_trained_logits_in_a_fresh_process(words: list[str], tmp_path: Path) -> None:
    session = _trained(words)
    write_result(session, tmp_path / "adapter")
    tokens = torch.randint(0, 250, (1, 40), generator=torch.Generator().manual_seed(1))
    live = _logits(session, tokens)
    loaded = _in_a_fresh_process("adapter", tmp_path / "adapter", tokens, tmp_path)
    off = float((live - loaded).abs().max() / live.abs().max())
    print(f"{' '.join(words)}: {off:.1e} of the largest logit")
    assert off < 1e-5
    learned = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(value.abs().max() > 1e-3 for name, value in learned.items() if "lora_B" in name)


@pytest.mark.parametrize("words", [["model=tiny", "method=full"], ["model=tiny_moe", "method=freeze"]], ids=" ".join)
def test_a_whole_model_gives_the_trained_logits_in_a_fresh_process(words: list[str], tmp_path: Path) -> None:
    session = _trained(words)
    write_result(session, tmp_path / "model")
    tokens = torch.randint(0, 250, (1, 40), generator=torch.Generator().manual_seed(1))
    live = _logits(session, tokens)
    loaded = _in_a_fresh_process("model", tmp_path / "model", tokens, tmp_path)
    assert float((live - loaded).abs().max() / live.abs().max()) < 1e-5


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_merged_export_gives_the_trained_logits_in_a_fresh_process(method: str, tmp_path: Path) -> None:
    session = _trained(["model=tiny", f"method={method}"])
    write_result(session, tmp_path / "run" / "adapter")
    tokens = torch.randint(0, 250, (1, 40), generator=torch.Generator().manual_seed(1))
    live = _logits(session, tokens)
    from dsft.export import merged

    merged(session.run, tmp_path / "run" / "adapter").save_pretrained(tmp_path / "merged")
    loaded = _in_a_fresh_process("merged", tmp_path / "merged", tokens, tmp_path)
    off = float((live - loaded).abs().max() / live.abs().max())
    print(f"{method}: {off:.1e} of the largest logit")
    assert off < 1e-4
