"""Losses and gradient norms of TRL's trainers on benchmarks/preference_case.py, which the tests hold dsft to.

`make trl-goldens` installs TRL beside what dsft needs, for this script alone. It writes GOLDENS, with the versions that
gave it.
"""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.preference_case import (
    BATCH,
    BETA,
    CENTER,
    GAMMA,
    GOLDENS,
    LENGTH,
    MODELS,
    OBJECTIVES,
    RATE,
    STEPS,
    pairs,
    prepare,
    rated,
)  # fmt: skip
from dsft.compose import compose

COMMON: dict[str, Any] = {
    "max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": RATE, "lr_scheduler_type": "constant",
    "weight_decay": 0.0, "max_grad_norm": 1.0, "logging_steps": 1, "report_to": "none", "save_strategy": "no",
    "bf16": False, "use_cpu": True, "max_length": LENGTH, "gradient_checkpointing": False, "seed": 0,
    "train_sampling_strategy": "sequential", "remove_unused_columns": False, "beta": BETA, "optim": "adamw_torch",
}  # fmt: skip


KEPT = ("loss", "grad_norm", "log_odds_ratio")
"""What is kept of what a trainer logs."""


def trainer(objective: str, model: Any, tokenizer: Any, folder: str) -> Any:
    """TRL's trainer of an objective, not started."""
    from datasets import Dataset

    rows = Dataset.from_list(rated() if objective == "kto" else pairs())
    more = {"model": model, "train_dataset": rows, "processing_class": tokenizer}
    config = {**COMMON, "output_dir": folder}
    if objective == "kto":
        from trl import KTOConfig, KTOTrainer

        return KTOTrainer(args=KTOConfig(**config, desirable_weight=1.3, undesirable_weight=0.8), **more)
    if objective == "reward":
        from trl import RewardConfig, RewardTrainer

        del config["beta"]
        return RewardTrainer(args=RewardConfig(**config, center_rewards_coefficient=CENTER), **more)
    if objective == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return ORPOTrainer(args=ORPOConfig(**config), **more)
    if objective == "simpo":
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        loss = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": GAMMA}
        return CPOTrainer(args=CPOConfig(**config, **loss), **more)
    from trl import DPOConfig, DPOTrainer

    kind = {"dpo": "sigmoid"}.get(objective, objective)
    return DPOTrainer(args=DPOConfig(**config, loss_type=[kind]), **more)


def measure(objective: str, places: dict[str, Path], folder: str) -> list[dict[str, float]]:
    """Loss and gradient norm of each step."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(places["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if objective == "reward":
        base: Any = AutoModelForSequenceClassification.from_pretrained(
            places["model"], dtype=torch.float32, num_labels=1
        )
        torch.nn.init.zeros_(base.score.weight)  # as dsft's head begins
        base.prepare_inputs_for_generation = None  # PEFT's wrapper for models that answer keeps it
        tokenizer.pad_token = "<|im_start|>"  # no row ends with it: a last token that is padding would be passed over
    else:
        base = AutoModelForCausalLM.from_pretrained(places["model"], dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, places["adapter"], is_trainable=True)
    if objective == "reward":  # PEFT's class for it wants a head in the file
        model.base_model.model.score.requires_grad_(True)
        model = model.base_model.model
    tokenizer.bos_token = None  # CPOTrainer and ORPOTrainer put it before what the template has written
    made = trainer(objective, model, tokenizer, folder)
    made.train()
    return [
        {name: float(entry[name]) for name in KEPT if name in entry}
        for entry in made.state.log_history
        if "loss" in entry
    ]


def main() -> None:
    """Measure the objectives on the models that are named, or each of them; others stay as they are."""
    found: dict[str, Any] = json.loads(GOLDENS.read_text()) if GOLDENS.is_file() else {}
    packages = ("trl", "transformers", "peft", "torch", "accelerate")
    only = {word for word in sys.argv[1:] if word in OBJECTIVES} or set(OBJECTIVES)
    for name in [word for word in sys.argv[1:] if word not in OBJECTIVES] or MODELS:
        base = compose([f"model={name}"]).run.model.resolve().folder
        with tempfile.TemporaryDirectory() as place:
            places = prepare(Path(place) / "case", base)
            steps = {one: measure(one, places, f"{place}/{one}") for one in OBJECTIVES if one in only}
            steps = {**found.get(name, {}).get("steps", {}), **steps}
        found[name] = {"versions": {package: version(package) for package in packages}, "steps": steps}
        GOLDENS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
