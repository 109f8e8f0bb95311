"""Plain transformers and PEFT in a process of their own: trains one by one, and loads what dsft has exported.

python -m benchmarks.family_elsewhere   reads a request per line, JSON, and answers each with a line; nothing of dsft is
imported. A request: {"do": "train" | "score", "base": folder, "adapter": folder or null, "attention": of transformers,
"stilled": settings of the configuration that become 0, ...}; train: "steps": [[[ids, learned], ...], ...], "rate",
"eps" of AdamW or null for SGD; score: "ids". The answer: {"losses", "norms"}, {"logits": file} or {"error": line}.
"""

import contextlib
import json
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F


def load(asked: dict[str, Any], *, learning: bool) -> Any:
    """The model that is asked for, all of it learning or its adapter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(asked["base"])
    for holder in (config, config.get_text_config()):
        for key in set(asked["stilled"]) & set(vars(holder)):
            setattr(holder, key, type(vars(holder)[key])(0))
    model = AutoModelForCausalLM.from_pretrained(
        asked["base"], config=config, dtype=torch.float32, attn_implementation=asked["attention"]
    )
    if asked["adapter"] is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, asked["adapter"], is_trainable=learning)
    return model.train() if learning else model.eval()


def train(asked: dict[str, Any]) -> dict[str, Any]:
    """Losses per supervised token and gradient norms of the steps, each example in a forward pass of its own."""
    model = load(asked, learning=True)
    params = [param for param in model.parameters() if param.requires_grad]
    sgd = asked["eps"] is None
    adam = partial(torch.optim.AdamW, eps=asked["eps"], weight_decay=0.0)
    optimizer = (torch.optim.SGD if sgd else adam)(params, lr=asked["rate"])
    losses, norms = [], []
    for examples in asked["steps"]:
        total, loss = sum(sum(learned[1:]) for _, learned in examples), 0.0
        for ids, learned in examples:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
            each = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
            part = each[torch.tensor(learned[1:], dtype=torch.bool)].sum() / total
            part.backward()
            loss += float(part.detach())
        norms.append(float(torch.nn.utils.clip_grad_norm_(params, 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return {"losses": losses, "norms": norms}


@torch.no_grad()
def score(asked: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A file with the logits (T, V) of one row of ids (T,)."""
    from safetensors.torch import save_file

    logits = load(asked, learning=False)(input_ids=torch.tensor([asked["ids"]]), use_cache=False).logits[0].float()
    save_file({"logits": logits.contiguous()}, folder / "logits.safetensors")
    return {"logits": str(folder / "logits.safetensors")}


def answer(line: str, folder: Path) -> dict[str, Any]:
    """What one request gives; what a library raises is the answer's error."""
    asked = json.loads(line)
    try:
        found = train(asked) if asked["do"] == "train" else score(asked, folder)
    except Exception as error:  # of any class of transformers
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    if foreign := [name for name in sys.modules if name.partition(".")[0] == "dsft"]:
        return {"error": f"{foreign[0]} was imported"}
    return found


def main() -> None:
    """Answer until the other side closes; what libraries print goes to stderr."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    out = sys.stdout
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        for line in sys.stdin:
            print(json.dumps(answer(line, Path(folder))), file=out, flush=True)


if __name__ == "__main__":
    main()
