"""Diff pruning as a run: what it trains, its difference as a file, and what it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsft.compose import compose
from dsft.engine.assemble import Session, skeleton
from dsft.engine.budget import estimate
from dsft.engine.loop import step_batches
from dsft.engine.result import write_result
from dsft.engine.step import train_step
from dsft.export import merged
from dsft.loaded import unpacked_base
from dsft.methods.hard_concrete import DIFF, FIXED, GATE, GROUP, fold
from dsft.methods.native import load
from dsft.methods.stored import NATIVE as CONFIG
from dsft.methods.stored import TENSORS
from dsft.models.anatomy import dissect
from tests.contract.sessions import session_of
from tests.unit.methods.test_counts import KV, LAYERS, D, F

INTERVAL = (-1.5, 1.5)
TENSORS_IN_BLOCKS = LAYERS * 9
IN_BLOCKS = LAYERS * (2 * D * D + 2 * D * KV + 3 * D * F + 2 * D)
"""Of tiny: q, o, k, v, gate, up, down and two norms."""
KEPT = int(0.005 * IN_BLOCKS)


def train(session: Session, data: Any, *steps: int) -> None:
    for step in steps:
        assert train_step(session, step_batches(session, data, step)[1], step, 1.0).moved


def learned(session: Session, ending: str) -> dict[str, Tensor]:
    named = session.model.named_parameters()
    return {name: param.detach().clone() for name, param in named if name.endswith(ending)}


def test_it_trains_two_numbers_per_number_and_one_per_tensor() -> None:
    session, _ = session_of("diff_pruning")
    counted = sum(param.numel() for param in session.model.parameters() if param.requires_grad)
    assert counted == 2 * IN_BLOCKS + TENSORS_IN_BLOCKS
    plain, _ = session_of("diff_pruning", "method.structured=false", "method.target=all")
    base = [param.numel() for param in plain.model.parameters() if not param.requires_grad]
    assert sum(param.numel() for param in plain.model.parameters() if param.requires_grad) == 2 * sum(base)


def test_the_first_penalty_is_the_weight_times_the_expected_open_gates() -> None:
    session, data = session_of("diff_pruning", "method.penalty=1e-6")
    result = train_step(session, step_batches(session, data, 1)[1], 1, 1.0)
    expected = 1e-6 * (IN_BLOCKS + TENSORS_IN_BLOCKS) / (1 + math.exp(-5))
    assert result.penalty == pytest.approx(expected, rel=1e-5)


def test_each_step_draws_its_own_gates_and_evaluation_none() -> None:
    session, _ = session_of("diff_pruning", "method.gate_start=0")
    module = session.model.get_submodule(next(iter(session.anatomy.linears)))
    with torch.no_grad():
        module.get_parameter(f"weight{DIFF}").fill_(1.0)
    course = session.guided.course
    thetas = []
    for step in (1, 1, 2):
        course.begin_step(step)
        thetas.append(module.train().weight.detach())
    assert torch.equal(thetas[0], thetas[1])
    assert not torch.equal(thetas[0], thetas[2])
    assert torch.equal(module.eval().weight, module._parameters["weight"])  # alpha 0 without noise: z = 0


def test_gates_have_their_own_rate_and_no_weight_decay() -> None:
    words = ("optim.weight_decay=0.5", "optim.lr=1e-5", "method.penalty=0", "method.gate_lr=0.2")
    session, data = session_of("diff_pruning", *words)
    train(session, data, 1)  # w is 0, so that gates have no gradient yet
    assert all((alpha == 5.0).all() for ending in (GATE, GROUP) for alpha in learned(session, ending).values())
    groups = session.run.strategy.update.optimizer.param_groups
    assert sorted((group["lr"], group["weight_decay"]) for group in groups) == [
        (1e-5, 0.5),
        (pytest.approx(0.2), 0.0),
    ]


@pytest.mark.parametrize("words", [(), ("method.structured=false",), ("method.target=all", "method.density=0.01")])
def test_exactly_so_many_differ_and_all_others_are_the_bases_bits(words: tuple[str, ...], tmp_path: Path) -> None:
    session, data = session_of("diff_pruning", "optim.lr=1e-2", "train.steps=6", *words)
    train(session, data, 1, 2, 3, 4, 5, 6)
    write_result(session, tmp_path / "adapter")
    result, base = merged(session.run, tmp_path / "adapter"), dict(unpacked_base(session.run).named_parameters())
    differing = {name: int((value != base[name]).sum()) for name, value in result.named_parameters()}
    targeted = sum(value.numel() for value in learned(session, DIFF).values())
    assert 0.98 * session.run.method.density * targeted < sum(differing.values())  # a sum may round to theta0
    assert sum(differing.values()) <= int(session.run.method.density * targeted)
    stored = load_file(tmp_path / "adapter" / TENSORS)
    kept = sum(len(value) for name, value in stored.items() if name.endswith(".indices"))
    assert kept == int(session.run.method.density * targeted)
    for name, value in result.named_parameters():
        untouched = torch.ones(value.numel(), dtype=torch.bool)
        untouched[stored.get(f"{name}.indices", torch.empty(0)).long()] = False
        ours, theirs = (tensor.flatten()[untouched].view(torch.int32) for tensor in (value, base[name]))
        assert torch.equal(ours, theirs)
        live = session.model.get_parameter(name) if f"{name}{DIFF}" not in learned(session, DIFF) else None
        assert live is None or torch.equal(live, value)
    fold(session.model)
    for name, value in session.model.named_parameters():
        assert torch.equal(value, result.get_parameter(name)), name


def test_what_is_kept_stays_and_goes_on_after_the_pruning() -> None:
    session, data = session_of("diff_pruning", "optim.lr=1e-2", "train.steps=6", "method.final=3")
    train(session, data, 1, 2)
    assert not any((alpha.abs() == FIXED).any() for alpha in learned(session, GATE).values())
    train(session, data, 3)
    masks = {name: value > 0 for name, value in learned(session, GATE).items()}
    assert sum(int(mask.sum()) for mask in masks.values()) == KEPT
    before = learned(session, DIFF)
    result = train_step(session, step_batches(session, data, 4)[1], 4, 1.0)
    assert math.isnan(result.penalty)
    train(session, data, 5, 6)
    assert all(torch.equal(value > 0, masks[name]) for name, value in learned(session, GATE).items())
    moved = [value[masks[name.replace(DIFF, GATE)]] != before[name][masks[name.replace(DIFF, GATE)]]
             for name, value in learned(session, DIFF).items()]  # fmt: skip
    assert torch.cat(moved).float().mean() > 0.99


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5])
def test_a_run_resumed_before_at_or_after_the_pruning_ends_in_the_same_bits(cut: int) -> None:
    words = ("optim.lr=1e-2", "train.steps=6", "method.final=3", "method.gate_start=1", "method.penalty=1e-4")
    unbroken, data = session_of("diff_pruning", *words)
    train(unbroken, data, 1, 2, 3, 4, 5, 6)
    first, _ = session_of("diff_pruning", *words)
    train(first, data, *range(1, cut + 1))
    state = {name: value.clone() for name, value in first.run.strategy.export_state().items()}
    second, _ = session_of("diff_pruning", *words)
    template = second.run.strategy.state_template({name: (value.shape, value.dtype) for name, value in state.items()})
    for name, value in template.items():
        value.copy_(state[name])
    second.run.strategy.import_state(template)
    train(second, data, *range(cut + 1, 7))
    resumed = dict(second.model.named_parameters())
    assert all(torch.equal(value, resumed[name]) for name, value in unbroken.model.named_parameters())


@pytest.mark.parametrize("model", ["tiny", "tiny_moe"])
def test_tied_and_stacked_tensors_change_as_one(model: str, tmp_path: Path) -> None:
    words = (f"model={model}", "method.target=all", "optim.lr=1e-2", "method.density=0.02")
    session, data = session_of("diff_pruning", *words)
    train(session, data, 1, 2, 3)
    write_result(session, tmp_path / "adapter")
    tokens = torch.arange(40)[None] + 60
    session.model.eval()
    with torch.no_grad():
        live = session.module(
            input_ids=tokens, position_ids=torch.arange(40)[None], segment_lengths=(40,), use_cache=False
        ).logits
        read = merged(session.run, tmp_path / "adapter")(input_ids=tokens).logits
    assert float((read - live).abs().max() / live.abs().max()) < 1e-5  # another attention and order of sums
    stored = load_file(tmp_path / "adapter" / TENSORS)
    assert f"{session.anatomy.embedding}.weight.indices" in stored
    assert session.anatomy.tied == (f"{session.anatomy.head}.weight.indices" not in stored)


def test_a_difference_that_was_never_pruned_is_not_written(tmp_path: Path) -> None:
    session, data = session_of("diff_pruning", "train.steps=6")
    train(session, data, 1)
    with pytest.raises(RuntimeError, match=r"more than method\.density=0\.005: every step after"):
        write_result(session, tmp_path)


def test_a_difference_to_another_base_is_refused_and_the_file_says_how_it_is_read(tmp_path: Path) -> None:
    session, data = session_of("diff_pruning")
    train(session, data, 1, 2, 3)
    write_result(session, tmp_path)
    said = json.loads((tmp_path / CONFIG).read_text())
    assert "NAME.indices: positions in the base's tensor NAME" in said["tensors"]
    assert said["method"]["density"] == 0.005
    stored = load_file(tmp_path / TENSORS)
    name = next(name for name in stored if name.endswith("proj.weight.shape"))
    save_file({**stored, name: torch.tensor([3, 4])}, tmp_path / TENSORS)
    base = unpacked_base(session.run)
    with pytest.raises(ValueError, match=r"must hold differences to this base, got .* of \(3, 4\) in place of \("):
        load(base, dissect(base), tmp_path)


def test_the_plan_counts_w_gates_and_the_moments_of_both() -> None:
    words = ["model=tiny", "method=diff_pruning", "launcher=local", "tracker=[]", "train.precision=fp32"]
    run = compose(words).run
    bones = skeleton(run, run.model.resolve())
    budget = estimate(run, bones, 1, accelerator=False)
    learns = 2 * IN_BLOCKS + TENSORS_IN_BLOCKS
    assert (budget.values, budget.moments) == (4 * learns, 8 * learns + 1)
    assert budget.weights >= 4 * IN_BLOCKS
    short = compose([*words, "train.max_length=2", "train.micro_batch_tokens=2"]).run
    kept = estimate(short, bones, 1, accelerator=False).activations or 0
    assert kept > 4 * (IN_BLOCKS - LAYERS * 2 * D), "theta of each linear, for backward"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method.density=0"], "method.density must be in (0, 1], got 0"),
        (["method.final=1.5"], "method.final must be a number of steps, or a share of the run's in (0, 1), got 1.5"),
        (["method.final=0"], "method.final must be a number of steps"),
        (["method.penalty=-1"], "method.penalty must be 0 or more, got -1"),
        (["method.target=head"], "method.target must be"),
        (["method.lower=0.1"], "method.lower must be below 0"),
        (["method.upper=1.0"], "method.upper must be above 1"),
        (["method.gate_lr=0"], "method.gate_lr must be above 0"),
        (["quantization=nf4"], "quantization=nf4 packs them as bytes"),
        (["quantization=int8"], "take quantization=none or method=qlora"),
        (["train.early_stop_metric=eval/loss", "train.eval_every=5"], "before method=diff_pruning has chosen"),
        (["optim.in_backward=true", "train.max_grad_norm=inf"], "method=diff_pruning looks at all of them"),
        (["strategy=zero2", "strategy.offload=optimizer"], "method=diff_pruning gathers them at each step"),
    ],
)
def test_what_it_cannot_do_is_refused_when_the_run_is_composed(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as refusal:
        compose(["model=tiny", "method=diff_pruning", *words])
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("steps", "words"), [(1, []), (5, ["method.final=5"]), (3, ["method.final=0.3"])])
def test_a_run_without_steps_on_both_sides_of_the_pruning_is_refused(steps: int, words: list[str]) -> None:
    method = compose(["model=tiny", "method=diff_pruning", *words]).run.method
    with pytest.raises(ValueError, match=f"train.steps must leave steps before method.final .* got {steps}; raise"):
        method.check(steps)
    method.check(steps + 1)
