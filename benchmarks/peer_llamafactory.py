"""LLaMA-Factory as a peer, in an environment of its own; setting `packed`: neat packing without checkpointing.

Imports nothing of dsft: its environment has another transformers and another PEFT.
"""

import importlib.machinery
import json
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

from benchmarks.job import BATCH, LENGTH, RANK, RATE, Clock, Job, Step, serve

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
PACKED = {
    "packing": True, "neat_packing": True, "per_device_train_batch_size": BATCH // 2,
    "disable_gradient_checkpointing": True,
}  # fmt: skip
"""Half as many rows of LENGTH tokens are as many tokens of GSM8K as BATCH examples."""
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""As the model's own chat template has it; LLaMA-Factory's ends with a full stop."""


def run(job: Job) -> list[Step]:
    """Its defaults but for what all peers share. Raises RuntimeError if it computes in another precision."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"HF_DATASETS_CACHE": folder, "HF_HUB_OFFLINE": "1"}
        tuner = _instrumented(clock, DTYPES[job.precision])
        tuner.run_exp(_settings(job, Path(folder)) | (PACKED if job.setting == "packed" else {}))
    return clock.steps


def _instrumented(clock: Clock, dtype: str) -> Any:
    """LLaMA-Factory with its steps on a clock, and its model watched for the dtype that it computes in."""
    # torchaudio is imported for speech that is not there, and the one that pip finds fits another torch
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    from llamafactory.train import tuner
    from llamafactory.train.sft import workflow

    from benchmarks.timed import timed

    load = workflow.load_model

    def check(_: Any, __: Any, output: Any) -> None:
        if str(output.dtype) != f"torch.{dtype}":
            raise RuntimeError(f"LLaMA-Factory must compute in {dtype}, got {output.dtype}")

    def watched(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        for name, module in model.named_modules():
            if name.endswith("q_proj"):
                module.register_forward_hook(check)
        return model

    workflow.load_model = watched
    workflow.CustomSeq2SeqTrainer = timed(workflow.CustomSeq2SeqTrainer, clock)
    return tuner


def _settings(job: Job, folder: Path) -> dict[str, Any]:
    columns = {"prompt": "question", "response": "answer"}
    known = {"gsm8k": {"file_name": str(Path(job.rows).resolve()), "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(known))
    return {
        "model_name_or_path": str(_model(job, folder / "model")), "stage": "sft", "do_train": True,
        "finetuning_type": "lora", "lora_rank": RANK, "lora_alpha": 2 * RANK, "lora_target": "all",
        "dataset_dir": str(folder), "dataset": "gsm8k", "template": "smollm2", "default_system": SYSTEM,
        "cutoff_len": LENGTH, "max_samples": 256, "overwrite_cache": True, "disable_shuffling": True,
        "output_dir": str(folder / "out"), "save_strategy": "no", "report_to": "none", "logging_steps": 1000,
        "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1, "learning_rate": RATE,
        "max_steps": job.steps, "lr_scheduler_type": "constant", "bf16": job.precision == "bf16", "use_cpu": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip


def _model(job: Job, folder: Path) -> Path:
    """The model as one of job.precision: LLaMA-Factory loads weights as what their configuration says they are."""
    folder.mkdir()
    for file in Path(job.model).iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((Path(job.model) / "config.json").read_text())
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": DTYPES[job.precision]}))
    return folder


if __name__ == "__main__":
    serve(run)
