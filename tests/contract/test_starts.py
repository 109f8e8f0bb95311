"""method.init_from, of every method that has it: a run starts where the adapter's run ended, or is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dsft.compose import OWN_CONF
from dsft.engine.assemble import Session, skeleton
from dsft.engine.loop import step_batches
from dsft.engine.step import train_step
from tests.contract.sessions import METHODS, composed_of, left_by, session_of, train

FROM_LORA = "/method/lora@"
OF_THEIR_OWN = ("p_tuning", "diff_pruning")
"""An encoder is folded away in the result, whose rows method=prompt takes; a difference is to a base."""
STARTING = [
    method
    for method in METHODS
    if method not in OF_THEIR_OWN
    and ("init_from:" in (text := (OWN_CONF / "method" / f"{method}.yaml").read_text()) or FROM_LORA in text)
]
FOLDED = {"prefix": ["method.projection=null"]}
"""What starts without a network that the result does not hold."""


def test_every_method_whose_result_is_an_adapter_has_the_key() -> None:
    assert [method for method in METHODS if method not in STARTING] == [
        method for method in METHODS if method in OF_THEIR_OWN or composed_of(method).run.method.whole
    ]


@pytest.mark.parametrize("method", STARTING)
def test_a_run_starts_with_the_loss_that_the_adapters_run_ended_with(method: str, tmp_path: Path) -> None:
    ended, data = left_by(tmp_path / "run", method)
    started, _ = session_of(method, *FOLDED.get(method, []), f"method.init_from={tmp_path / 'run'}")
    fresh, _ = session_of(method)
    losses = [_next_loss(session, data) for session in (ended, started, fresh)]
    # the same numbers in the same operations; a folded network is computed once more, in fp32
    assert losses[1] == (pytest.approx(losses[0], rel=1e-6) if method in FOLDED else losses[0])
    assert abs(losses[2] - losses[0]) > 1e-4 * losses[0], "it is told apart from a fresh start"
    named = {name: value for name, value in started.model.named_parameters() if value.requires_grad}
    assert all(value.dtype is torch.float32 for value in named.values())
    train(started, data, 1, 2)  # and learns


def _next_loss(session: Session, data: Any) -> float:
    """Of step 3, before its update."""
    return train_step(session, step_batches(session, data, 3)[1], 3, 1.0).loss


@pytest.mark.parametrize("method", ["houlsby", "bitfit", "vera", "p_tuning_v2"])
def test_the_result_of_a_run_that_started_from_an_adapter_needs_that_adapter_no_more(
    method: str, tmp_path: Path
) -> None:
    from dsft.loaded import load

    left_by(tmp_path / "first", method)
    session, _ = left_by(tmp_path / "second", method, f"method.init_from={tmp_path / 'first' / 'adapter'}")
    shutil.rmtree(tmp_path / "first")
    tokens = torch.arange(40)[None] + 60
    session.model.eval()
    with torch.no_grad():
        live = session.module(
            input_ids=tokens, position_ids=torch.arange(40)[None], segment_lengths=(40,), use_cache=False
        ).logits
        read = load(session.run, tmp_path / "second" / "adapter")(input_ids=tokens).logits
    assert float((read - live).abs().max() / live.abs().max()) < 1e-5


def _built(method: str, *words: str) -> None:
    run = composed_of(method, *words).run
    skeleton(run, run.model.resolve())


REFUSED = [
    ("houlsby", (), "houlsby", ("method.reduction_factor=8",), "must agree in reduction_factor, 8, got 16; set"),
    ("houlsby", (), "houlsby", ("method.train_norms=false",), "must agree in train_norms, False, got True"),
    ("houlsby", (), "pfeiffer", (), "must hold an adapter of Pfeiffer, got one of Houlsby; take the method"),
    ("compacter", (), "compacter", ("method.after=[mlp]",), "must agree in after"),
    ("bitfit", (), "bitfit", ("model=tiny_moe",), "must hold what learns in this model, got "),
    ("ssf", (), "lora", (), "must hold an adapter in PEFT's format, got dsft's own format in"),
    ("lora", (), "ssf", (), "must hold an adapter in dsft's own format, got PEFT's format in"),
    ("lora", (), "vera", ("method.rank=16",), "must agree in peft_type, VERA, got LORA; take the method"),
    ("vera", ("method.rank=16",), "vera", ("method.rank=8",), "must agree in r, 8, got 16; set method.rank to it"),
    ("vera", ("method.rank=16",), "vera", ("method.rank=16", "method.projection_seed=1"), "prng_key, 1, got 0"),
    ("ia3", (), "ia3", ("method.feedforward_modules=[]",), "must agree in target_modules, base_model.model."),
    ("adalora", (), "adalora", ("method.alpha=16",), "must agree in lora_alpha, 16.0, got 32"),
    ("peft", (), "peft", ("+method.options.r=4",), "must agree in r, 4, got 8; set method.options.r to it"),
    ("peft", (), "peft", ("method.type=peft.LoKrConfig",), "must agree in peft_type, LOKR, got LOHA"),
    ("pissa", (), "pissa", ("method.rank=8",), "LoRA of twice method.rank=8, got r=32; set method.rank to half of it"),
    ("p_tuning_v2", (), "p_tuning_v2", ("method.num_virtual_tokens=5",), "must agree in num_virtual_tokens, 5, got 20"),
    ("p_tuning_v2", (), "p_tuning_v2", ("model.config.num_hidden_layers=2",), "[20, 384] there and [20, 256] here"),
    ("prefix", (), "prefix", (), "method.projection must be null with method.init_from, got 512"),
    ("freeze", (), "lora", (), "must hold an adapter, got a whole model in"),
]  # fmt: skip


@pytest.mark.parametrize(("left", "there", "method", "words", "line"), REFUSED, ids=lambda v: str(v)[:40])
def test_an_adapter_that_does_not_fit_is_refused_before_weights_load(
    left: str, there: tuple[str, ...], method: str, words: tuple[str, ...], line: str, tmp_path: Path
) -> None:
    left_by(tmp_path / "run", left, *there)
    with pytest.raises(ValueError, match=r"^method\.") as caught:
        _built(method, f"method.init_from={tmp_path / 'run'}", *words)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_holds_nothing_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    for path, line in ((tmp_path, "must be a run with a result"), (tmp_path / "no", "give RUN/adapter")):
        for method in ("houlsby", "lora"):
            with pytest.raises(ValueError, match=line):
                _built(method, f"method.init_from={path}")


PLAIN = {
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "vera": peft.VeraConfig(r=16, target_modules=["q_proj"], init_weights=False),
    "peft": peft.LoHaConfig(r=8, target_modules=["q_proj"], init_weights=False),
    "p_tuning_v2": peft.PrefixTuningConfig(
        num_virtual_tokens=20, task_type="CAUSAL_LM", num_layers=3, num_attention_heads=2, token_dim=64
    ),
}
WORDS = {
    "vera": ["method.rank=16", "method.target_modules=q_proj"],
    "peft": ["method.target_modules=q_proj", "+method.options.init_weights=false"],
}


@pytest.mark.parametrize("method", PLAIN)
def test_a_run_starts_from_a_folder_that_peft_alone_has_written(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    files = composed_of(method).run.model.resolve()
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.float32), PLAIN[method])
    model.eval().save_pretrained(tmp_path)
    session, _ = session_of(method, *WORDS.get(method, []), f"method.init_from={tmp_path}")
    tokens = torch.arange(40)[None] + 60
    session.model.eval()
    with torch.no_grad():
        theirs = model(input_ids=tokens).logits
        ours = session.module(
            input_ids=tokens, position_ids=torch.arange(40)[None], segment_lengths=(40,), use_cache=False
        ).logits
        with model.disable_adapter():
            base = model(input_ids=tokens).logits
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5
    assert float((base - theirs).abs().max() / theirs.abs().max()) > 1e-4, "the adapter does something"


def test_triplets_that_peft_has_cut_are_refused(tmp_path: Path) -> None:
    left_by(tmp_path / "run", "adalora")
    file = tmp_path / "run" / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rank_pattern": {"q_proj": [True, False]}}))
    with pytest.raises(ValueError, match="must hold every triplet"):
        _built("adalora", f"method.init_from={tmp_path / 'run'}")


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    left_by(tmp_path / "run", "houlsby")
    file = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    first = min(tensors)
    save_file({**tensors, first: tensors[first][:-1].contiguous()}, file)
    with pytest.raises(ValueError, match=f"got 1 other tensor.s., first {first}: "):
        _built("houlsby", f"method.init_from={tmp_path / 'run'}")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"must hold whole files, got .* damaged"):
        _built("houlsby", f"method.init_from={tmp_path / 'run'}")
