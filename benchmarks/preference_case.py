"""One small case of preference training that dsft and TRL are both given: model, rows, the adapter to start from."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

MODELS = ("tiny", "smollm2_135m")
OBJECTIVES = ("dpo", "hinge", "ipo", "orpo", "simpo", "kto", "reward")
STEPS, BATCH, RATE, RANK, ALPHA = 5, 4, 2e-4, 8, 16
TARGETS = ["q_proj", "v_proj", "down_proj"]
BETA, GAMMA, CENTER = 0.1, 0.7, 0.01

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML without the line break behind a turn, which TRL supervises and dsft does not."""

LENGTH = 512
GOLDENS = Path(__file__).parent / "results" / "trl-preferences.json"
"""What TRL's trainers gave."""


def rows() -> list[dict[str, Any]]:
    """As many pairs as the steps take: a sum that is worked out, and one that is guessed; sides of many lengths."""
    made = []
    for number in range(STEPS * BATCH):
        a, b = 17 * number % 90 + 5, 29 * number % 80 + 7
        steps = " Then the tens follow, and both are put together." * (number % 3)
        chosen = f"First the ones of {a} and {b} are added.{steps} The sum is {a + b}."
        rejected = f"It is {a + b + 1 + number % 4}." + " I am sure of it, as it looks right." * (number % 4)
        made.append({"prompt": f"What is {a} plus {b}?", "chosen": chosen, "rejected": rejected})
    return made


def turns(row: dict[str, Any], answer: str) -> dict[str, Any]:
    """Prompt and completion of a row as turns."""
    asked = [{"role": "user", "content": row["prompt"]}]
    return {"prompt": asked, "completion": [{"role": "assistant", "content": answer}]}


def pairs() -> list[dict[str, Any]]:
    """Preference rows as turns."""
    return [
        {
            "prompt": turns(row, "")["prompt"],
            "chosen": turns(row, row["chosen"])["completion"],
            "rejected": turns(row, row["rejected"])["completion"],
        }
        for row in rows()
    ]


def rated() -> list[dict[str, Any]]:
    """One step's answers with a verdict, which all steps take: TRL cycles mismatched answers within a batch."""
    some = rows()[:BATCH]
    return [
        {**turns(row, row["chosen" if n % 2 == 0 else "rejected"]), "label": n % 2 == 0} for n, row in enumerate(some)
    ]


def prepare(folder: Path, base: Path) -> dict[str, Path]:
    """Write the model with TEMPLATE, the rows and the adapter below folder; returns where they are."""
    places = {name: folder / name for name in ("model", "pairs.jsonl", "rated.jsonl", "adapter")}
    shutil.copytree(base, places["model"])
    (places["model"] / "chat_template.jinja").write_text(TEMPLATE)
    for name, made in (("pairs.jsonl", pairs()), ("rated.jsonl", rated())):
        places[name].write_text("".join(f"{json.dumps(row)}\n" for row in made))
    _adapter(places["adapter"], places["model"])
    return places


def _adapter(folder: Path, model: Path) -> None:
    """A LoRA whose B is not 0, so that a reference without it would show."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    made = get_peft_model(
        base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM", lora_dropout=0.0)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, param in sorted(made.named_parameters()):
            if "lora_" in name:
                scale = param.shape[1] ** -0.5 if "lora_A" in name else 0.02
                param.copy_(torch.randn(param.shape, generator=generator) * scale)
    made.save_pretrained(folder)
