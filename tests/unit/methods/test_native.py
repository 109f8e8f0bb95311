"""dsft's own adapter format: what it holds, what reads it back, what merges into the base and what cannot."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from dsft.comm.world import World
from dsft.compose import compose
from dsft.data.open import open_data
from dsft.engine.assemble import Session, assemble
from dsft.engine.loop import step_batches
from dsft.engine.result import write_result
from dsft.engine.step import train_step
from dsft.export import merged
from dsft.loaded import load as verify_load
from dsft.methods.native import CONFIG, load, read
from dsft.models.anatomy import dissect

METHODS = ("bitfit", "ssf", "houlsby", "pfeiffer", "parallel_adapter", "compacter")
TOKENS = torch.randint(0, 250, (1, 40), generator=torch.Generator().manual_seed(1))


def _trained(*words: str) -> Session:
    """Three steps in this process, at a rate that moves what learns well away from its start."""
    run = compose([
        "model=tiny", "data=reasoning_gym", "data.size=48", "data.eval_size=0", "train.precision=fp32", "train.steps=3",
        "train.global_batch_size=4", "launcher=local", "optim.lr=2e-2", "optim.schedule=constant", *words,
    ]).run  # fmt: skip
    files = run.model.resolve()
    data = open_data(run.data, files.tokenizer(), max_length=512, seed=0)
    session = assemble(run, files, World(0, 1, 0, torch.device("cpu")))
    for step in (1, 2, 3):
        train_step(session, step_batches(session, data, step)[1], step, 1.0)
    session.model.eval()
    return session


@torch.no_grad()
def _live(session: Session) -> Tensor:
    positions = torch.arange(TOKENS.shape[1])[None]
    logits: Tensor = session.module(
        input_ids=TOKENS, position_ids=positions, segment_lengths=(TOKENS.shape[1],), use_cache=False
    ).logits
    return logits


@torch.no_grad()
def _off(model: Any, live: Tensor) -> float:
    """Largest difference of the logits, relative to the largest."""
    return float((model(input_ids=TOKENS).logits.float() - live).abs().max() / live.abs().max())


FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
from dsft.methods.native import load
from dsft.models.anatomy import dissect
tokens = torch.load(sys.argv[1] + "/tokens.pt")
for folder in sys.argv[3:]:
    base = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32)
    model = load(base, dissect(base), folder).eval()
    with torch.no_grad():
        torch.save(model(input_ids=tokens).logits, folder + "/logits.pt")
"""


def test_every_method_gives_the_trained_logits_in_a_fresh_process(tmp_path: Path) -> None:
    live, base = {}, ""
    for method in METHODS:
        session = _trained(f"method={method}")
        write_result(session, tmp_path / method)
        live[method], base = _live(session), session.files.name_or_path
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        assert _off(plain, live[method]) > 1e-2, method
    torch.save(TOKENS, tmp_path / "tokens.pt")
    words = [sys.executable, "-c", FRESH, tmp_path, base, *(tmp_path / method for method in METHODS)]
    subprocess.run([str(word) for word in words], check=True, capture_output=True)
    for method in METHODS:
        loaded = torch.load(tmp_path / method / "logits.pt")
        off = float((loaded - live[method]).abs().max() / live[method].abs().max())
        assert off < 1e-6, (method, off)


def test_the_folder_says_what_made_it_and_how_to_load_it(tmp_path: Path) -> None:
    session = _trained("method=houlsby", "method.reduction_factor=8")
    write_result(session, tmp_path / "adapter")
    said = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert said["method"]["_target_"] == "dsft.methods.houlsby.Houlsby"
    assert said["method"]["reduction_factor"] == 8
    assert said["base_model"] == session.files.name_or_path
    assert "from dsft.methods.native import load" in (tmp_path / "adapter" / "README.md").read_text()
    assert read(tmp_path / "adapter") == session.run.method
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert stored.keys() == {name for name, param in session.model.named_parameters() if param.requires_grad}
    assert all(value.dtype is torch.float32 for value in stored.values())


@pytest.mark.parametrize("words", [
    ("method=bitfit",), ("method=bitfit", "method.exclude=['*.mlp.*']"), ("method=bitfit", "quantization=nf4"),
    ("method=ssf", "method.norms=false"),
], ids=" ".join)  # fmt: skip
def test_a_merged_llama_is_a_plain_folder_with_the_trained_logits(words: tuple[str, ...], tmp_path: Path) -> None:
    session = _trained(*words)
    write_result(session, tmp_path / "adapter")
    live = _live(session)
    assert _off(verify_load(session.run, tmp_path / "adapter"), live) < 1e-6
    merged(session.run, tmp_path / "adapter").save_pretrained(tmp_path / "merged")
    plain, said = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert plain.config.attention_bias is True
    assert _off(plain, live) < 1e-6


def test_a_family_with_biases_everywhere_takes_all_of_ssf(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 260, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", intermediate_size=96, **sizes)).eval()
    method = compose(["model=tiny", "method=ssf"]).run.method
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn_like(param))  # biases would be 0
    method.attach(model, dissect(model))
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(0.3 * torch.randn_like(param))
        live = model(input_ids=TOKENS).logits
    method.merge(model).save_pretrained(tmp_path)
    assert not any("ssf" in name for name, _ in model.named_parameters())
    assert _off(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), live) < 1e-6


@pytest.mark.parametrize(("words", "line"), [
    (("model=tiny", "method=houlsby"), "can hold what Houlsby adds, got merged; take --to adapter"),
    (("model=tiny", "method=pfeiffer"), "what Pfeiffer adds"),
    (("model=tiny", "method=parallel_adapter"), "what ParallelAdapter adds"),
    (("model=tiny", "method=compacter"), "what Compacter adds"),
    (("model=tiny", "method=ssf"), "a norm without a bias; take --to adapter, or train with method.norms=false"),
    (("model=tiny_moe", "method=bitfit"), "q_proj.bias, which MixtralForCausalLM cannot be built with"),
], ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")  # fmt: skip
def test_what_cannot_be_merged_is_refused_in_one_line_on_meta(words: tuple[str, ...], line: str) -> None:
    from dsft.models.build import build_meta

    run = compose(list(words)).run
    model = build_meta(run.model.resolve(), torch.float32, "sdpa")
    model = run.method.attach(model, dissect(model))
    with pytest.raises(ValueError, match=r"^--to ") as caught:
        run.method.merge(model)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@contextmanager
def _refused(line: str) -> Iterator[None]:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is what is tested
        yield
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("words", "line"), [
    (("method=houlsby", "method.reduction_factor=0"), "method.reduction_factor must be 1 or more, got 0"),
    (("method=houlsby", "method.reduction_factor=3"), "must divide the model's width, 128, got 3; e.g. 2"),
    (("method=houlsby", "method.activation=relo"), "method.activation must be one of relu, gelu, gelu_new"),
    (("method=pfeiffer", "method.dropout=1.0"), "method.dropout must be in [0, 1), got 1.0"),
    (("method=parallel_adapter", "method.scale=0.0"), "method.scale must be above 0, got 0.0"),
    (("method=compacter", "method.phm_dim=3"), "method.phm_dim must divide the model's width, 128, got 3"),
    (("method=compacter", "method.phm_dim=16"), "must divide the bottleneck, width / method.reduction_factor, 8"),
    (("method=compacter", "method.phm_dim=0"), "method.phm_dim must be 1 or more, got 0"),
    (("method=compacter", "method.after=[]"), "method.after must be [attention, mlp], or one of them, got []"),
    (("method=compacter", "method.after=[ffn]"), "got ['ffn']; [mlp] is Compacter++"),
    (("method=bitfit", "method.add_biases=false"), "got none in LlamaForCausalLM; set method.add_biases=true"),
    (("method=bitfit", "method.exclude=['*.mpl.*']"), "method.exclude must match biases, got *.mpl.*; their names are"),
    (("method=bitfit", "method.exclude=['*']"), "must find a bias to train, got none"),
    (("method=ssf", "method.start=zero"), "method.start must be"),
], ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")  # fmt: skip
def test_a_value_that_cannot_work_is_refused_before_weights_are_read(words: tuple[str, ...], line: str) -> None:
    from dsft.engine.assemble import skeleton

    with _refused(line):
        run = compose(["model=tiny", *words]).run
        skeleton(run, run.model.resolve())


def _base(model: str) -> tuple[nn.Module, Any]:
    files = compose([f"model={model}"]).run.model.resolve()
    base = AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.float32)
    return base, dissect(base)


def test_an_adapter_of_another_base_or_of_no_method_of_ours_is_refused(tmp_path: Path) -> None:
    session = _trained("method=pfeiffer")
    write_result(session, tmp_path)
    with _refused("other tensor(s), first model.layers.0.mlp"):
        load(*_base("tiny_moe"), tmp_path)
    smaller = replace(session.run.method, reduction_factor=32)  # type: ignore[type-var]
    with _refused("adapter.down.bias: (8,) in place of (4,)"):
        smaller.restore(*_base("tiny"), tmp_path)
    said = json.loads((tmp_path / CONFIG).read_text())
    said["method"] = {"_target_": "subprocess.Popen", "args": ["true"]}
    (tmp_path / CONFIG).write_text(json.dumps(said))
    with _refused("got subprocess.Popen named in"):
        load(*_base("tiny"), tmp_path)
    said["method"] = {"_target_": "dsft.methods.native.Native2"}
    (tmp_path / CONFIG).write_text(json.dumps(said))
    with _refused("must name a class that can be imported, got dsft.methods.native.Native2 (module"):
        load(*_base("tiny"), tmp_path)
    said["method"] = {"_target_": "dsft.methods.full.Full"}
    (tmp_path / CONFIG).write_text(json.dumps(said))
    with _refused("must name a method of dsft's own format, got dsft.methods.full.Full"):
        load(*_base("tiny"), tmp_path)
    said["method"] = {"_target_": "their_package.Method"}
    (tmp_path / CONFIG).write_text(json.dumps(said))
    with _refused("; install the package that has it with an entry point in dsft.configs or, if you trust its code"):
        load(*_base("tiny"), tmp_path)
