"""LoRA+ of linears and fused experts, packed, on three gloo processes: two groups of parameters, whose saved state goes
on in the same bits when it is read.

In the same processes: a whole result, of a base with buffers that no rank has a part of alone, and a base with four
experts, of whose stacks three ranks divide no dimension.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dsft_launchers.local import launch
from safetensors.torch import load, load_file, save
from torch import Tensor
from torch.distributed.tensor import distribute_tensor

from dsft.comm.world import World, join, leave
from dsft.compose import compose
from dsft.config import Run
from dsft.data.open import open_data
from dsft.engine.assemble import Session, assemble, skeleton
from dsft.engine.loop import step_batches
from dsft.engine.result import write_result
from dsft.engine.step import train_step
from dsft.moved import moved
from tests.families import write_family

MODULE = "tests.distributed.test_two_rates"
"""This one, as it is started on each rank."""
STRATEGIES = ("ddp", "fsdp", "zero2", "zero3")
SHARDED = ("fsdp", "zero3")
WHOLE = ("ddp", "fsdp", "zero2", "zero3")
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
Steps = list[tuple[float, float]]
ADAPTED = (
    "model=tiny_moe", "method=lora_plus", "method.target_modules=[all-linear,experts]", "method.expert_rank=3",
    "train.precision=fp32", "quantization=nf4",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks find the base of the whole results, and leave all that they make."""
    place = tmp_path_factory.mktemp("ran")
    write_family(place / "base", "deepseek_v3")
    write_family(place / "four", "deepseek_v3", n_routed_experts=4, n_group=1, moe_intermediate_size=20)
    return place


@pytest.fixture(scope="module")
def ran(folder: Path) -> dict[str, tuple[Steps, Steps]]:
    """Strategy -> (losses and norms of steps 3 and 4 of an unbroken run, the same of one that was restored)."""
    out = folder / "out.json"
    code = launch([sys.executable, "-m", MODULE, str(out)], num_processes=3, log_dir=folder / "logs", env={})
    assert code == 0, "\n".join(path.read_text()[-1500:] for path in (folder / "logs").iterdir())
    found: dict[str, tuple[Steps, Steps]] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("strategy", SHARDED)
@pytest.mark.usefixtures("ran")
def test_a_whole_result_of_several_ranks_holds_every_tensor_of_its_base(strategy: str, folder: Path) -> None:
    base = load_file(folder / "base" / "model.safetensors")
    (result,) = map(load_file, (folder / strategy).glob("model-*.safetensors"))
    assert result.keys() == base.keys()
    assert torch.equal(result[BIAS], base[BIAS])
    assert {name for name, value in result.items() if value.dtype == torch.float32} == {BIAS}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_restored_state_goes_on_as_the_unbroken_one(strategy: str, ran: dict[str, tuple[Steps, Steps]]) -> None:
    unbroken, restored = ran[strategy]
    assert unbroken == restored


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_both_rates_are_the_same_under_every_strategy(strategy: str, ran: dict[str, tuple[Steps, Steps]]) -> None:
    for mine, theirs in zip(ran[strategy][0], ran["ddp"][0], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)  # the house's bound: fp32, AdamW


@pytest.mark.parametrize("strategy", WHOLE)
def test_a_whole_model_goes_on_as_unbroken_although_ranks_do_not_divide_its_experts(
    strategy: str, ran: dict[str, tuple[Steps, Steps]]
) -> None:
    unbroken, restored = ran[f"four {strategy}"]
    assert unbroken == restored
    for mine, theirs in zip(unbroken, ran["four ddp"][0], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def _session(strategy: str, world: World, *words: str) -> Session:
    run = compose([
        *(words or ADAPTED),
        "data=reasoning_gym", "data.size=32", "data.eval_size=0", "train.steps=4",
        "train.global_batch_size=4", "optim.lr=1e-3", "optim.schedule=constant",
        f"strategy={strategy}", "launcher.devices=3",
    ]).run  # fmt: skip
    return assemble(run, run.model.resolve(), world)


def _steps(session: Session, *numbers: int) -> Steps:
    data = open_data(session.run.data, session.files.tokenizer(), max_length=512, seed=0)
    results = [train_step(session, step_batches(session, data, n)[1], n, 1.0) for n in numbers]
    return [(result.loss, result.grad_norm) for result in results]


def _unbroken_and_restored(strategy: str, world: World, *words: str) -> tuple[Steps, Steps]:
    session = _session(strategy, world, *words)
    kept = [dim for module in session.model.modules() for dim in moved(module).values()]
    assert bool(kept) == (strategy == "fsdp" and bool(words))
    _steps(session, 1, 2)
    state: dict[str, Tensor] = {}
    for part in world.gather(save({key: _whole(value) for key, value in session.run.strategy.export_state().items()})):
        state |= load(part)
    assert all(state[f"param/{name}"].shape == shape for name, shape in _shapes(session.run).items())
    unbroken = _steps(session, 3, 4)
    session.run.strategy.close()
    session = _session(strategy, world, *words)
    template = session.run.strategy.state_template({key: (v.shape, v.dtype) for key, v in state.items()})
    for key, value in template.items():
        _fill(value, state[key])
    session.run.strategy.import_state(template)
    restored = _steps(session, 3, 4)
    if words:
        restored, unbroken = restored + _shown(session), unbroken + _shown(session)
    session.run.strategy.close()
    return unbroken, restored


def _shapes(run: Run) -> dict[str, torch.Size]:
    """Of what learns, as the classes have it."""
    model = skeleton(run, run.model.resolve()).model
    return {name: param.shape for name, param in model.named_parameters() if param.requires_grad}


@torch.no_grad()
def _shown(session: Session) -> list[tuple[float, float]]:
    """Of each stack of experts two numbers that depend on its order, as a result and as a method's course have it."""
    found = []
    for name, shape in _shapes(session.run).items():
        if "experts." in name and len(shape) == 3:
            param = session.model.get_parameter(name)
            one, other = session.run.strategy.full(param), session.run.strategy.values([param])[0].cpu()
            assert one.shape == other.shape == shape
            found.append(tuple(float((each.double() * _ramp(each)).sum()) for each in (one, other)))
            session.run.strategy.write([param], [other.to(param.device)])
            assert torch.equal(session.run.strategy.full(param), one), name
    return found


def _ramp(value: Tensor) -> Tensor:
    return torch.linspace(0, 1, value.numel(), dtype=torch.float64).view(value.shape)


def _whole(value: Any) -> Tensor:
    whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole.detach().to("cpu", copy=True)


def _fill(value: Any, whole: Tensor) -> None:
    mesh = getattr(value, "device_mesh", None)
    with torch.no_grad():
        value.copy_(whole if mesh is None else distribute_tensor(whole, mesh, value.placements))


def main() -> None:
    """One rank: every strategy, one after the other, in one group."""
    torch.set_num_threads(1)
    world = join()
    found = {}
    for strategy in STRATEGIES:
        found[strategy] = _unbroken_and_restored(strategy, world)
        gc.collect()
    folder = Path(sys.argv[1]).parent
    for strategy in WHOLE:
        words = ("model=custom", f"model.path={folder / 'four'}", "method=full", "train.precision=fp32")
        found[f"four {strategy}"] = _unbroken_and_restored(strategy, world, *words)
        gc.collect()
    for strategy in SHARDED:
        words = ("model=custom", f"model.path={folder / 'base'}", "method=full", "train.precision=bf16")
        session = _session(strategy, world, *words)
        write_result(session, folder / strategy)
        session.run.strategy.close()
        gc.collect()
    if world.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main()
