"""The memory estimate against what torch really keeps, and what the plan says of it."""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.family_models import make
from dsft.comm.world import World
from dsft.compose import compose
from dsft.data.batch import build_batch
from dsft.data.open import open_data
from dsft.engine.assemble import assemble, autocast, skeleton
from dsft.engine.budget import NCCL, Budget, estimate
from dsft.engine.optimizers import factory, state_bytes
from dsft.engine.saved import count_saved
from dsft.plan import as_text, make_plan
from dsft.telemetry.meter import host_memory_bytes

TOKENS = 512


def run_of(*words: str) -> Any:
    return compose(["model=tiny", "launcher=local", "train.precision=fp32", "tracker=[]", *words])


def budget_of(*words: str, ranks: int = 1) -> Budget:
    run = run_of(*words).run
    return estimate(run, skeleton(run, run.model.resolve(planning=True)), ranks, accelerator=False)


def test_several_gpus_share_buffers_of_nccl() -> None:
    run = run_of("method=bitfit").run
    bones = skeleton(run, run.model.resolve(planning=True))
    alone, two = (estimate(run, bones, ranks, accelerator=True).process for ranks in (1, 2))
    assert two - alone == NCCL


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """One row of TOKENS tokens, all but the first supervised."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "x" * (TOKENS - 1)}) + "\n")
    return path


def really_kept(words: list[str], rows: Path) -> int:
    """Bytes of all storages that autograd holds after a real forward pass, without parameters and buffers."""
    run = run_of(*words, "data=local", f"data.path={rows}", "train.global_batch_size=1").run
    files = run.model.resolve()
    data = open_data(run.data, files.tokenizer(), max_length=TOKENS, seed=0)
    session = assemble(run, files, World(0, 1, 0, torch.device("cpu")))
    session.model.train()
    held = {t.untyped_storage().data_ptr() for t in (*session.model.parameters(), *session.model.buffers())}
    seen: list[weakref.ref[list[torch.Tensor]]] = []

    class Kept(list[torch.Tensor]): ...  # a list that can be weakly referred to

    def keep(tensor: torch.Tensor) -> Kept:
        kept = Kept([tensor])
        seen.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept[0]), autocast(session):
        terms, _ = run.objective.losses(session.scorer, build_batch(data.train, [0], silent=False))
    storages = [kept[0].untyped_storage() for kept in (ref() for ref in seen) if kept is not None]
    assert terms.requires_grad  # it holds them until here
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in held}.values())


@pytest.mark.parametrize(
    "words",
    [
        ["method=full"],
        ["method=lora"],
        ["method=dora"],
        ["method=qlora"],
        ["method=lora", "quantization=int8"],
        ["method=freeze", "method.trainable=[1,head]"],
        ["method=diff_pruning", "train.steps=4"],
        ["method=full", "train.precision=bf16"],
        ["method=lora", "train.precision=bf16"],
        ["method=diff_pruning", "train.steps=4", "train.precision=bf16"],
        ["model=tiny_moe", "method=full"],
        ["model=tiny_moe", "method=lora", "train.precision=bf16"],
        ["model=tiny_moe", "method=qlora", "quantization.unpack_mib=0"],
    ],
    ids=" ".join,
)
def test_what_autograd_keeps_is_counted_without_computing_it(words: list[str], rows: Path) -> None:
    run = run_of(*words).run
    bones = skeleton(run, run.model.resolve(planning=True))
    saved = count_saved(bones.model, bones.anatomy, (TOKENS,), bf16=run.train.precision == "bf16")
    assert saved is not None
    assert sum(saved.blocks) + saved.rest == pytest.approx(really_kept(words, rows), rel=0.05)
    assert all(param.is_meta for param in bones.model.parameters())
    assert not any("forward" in vars(bones.model.get_submodule(name)) for name in bones.anatomy.blocks)


def test_what_is_unpacked_at_a_time_is_counted() -> None:
    one, four = (budget_of("model=tiny_moe", "method=qlora", f"quantization.unpack_mib={mib}") for mib in (0, 16))
    assert four.working - one.working == 3 * (256 * 64 * 4)  # of four experts, gate and up, fp32
    assert four.weights == one.weights


def test_recomputed_blocks_keep_their_input_alone() -> None:
    kept = {
        what: budget_of("method=full", f"train.gradient_checkpointing={what}") for what in ("none", "selective", "full")
    }
    none, selective, full = (budget.activations or 0 for budget in kept.values())
    assert none > selective > full > 0


def test_experts_of_a_class_without_an_interface_are_not_counted_and_the_plan_says_so(tmp_path: Path) -> None:
    make("dbrx", tmp_path / "dbrx")
    composed = run_of("model=custom", f"model.path={tmp_path / 'dbrx'}", "method.rank=4")
    plan = make_plan(composed, composed.run.model.resolve(planning=True))
    assert plan["memory"]["activations"] is None
    assert "memory       at least" in as_text(plan)
    assert "activations unknown" in as_text(plan)


@pytest.mark.parametrize(
    ("words", "ranks", "values", "moments", "gathers"),
    [
        (["strategy=single"], 1, 1, 1, False),
        (["strategy=ddp", "launcher.devices=4"], 4, 1, 1, False),
        (["strategy=fsdp", "launcher.devices=4"], 4, 1 / 4, 1 / 4, True),
        (["strategy=hsdp", "strategy.shard_size=2", "launcher.devices=4"], 4, 1 / 2, 1 / 2, True),
        (["strategy=zero1", "launcher.devices=4"], 4, 5 / 4, 1 / 4, False),
        (["strategy=zero3", "launcher.devices=4"], 4, 1 / 2, 1 / 4, True),
    ],
)  # fmt: skip
def test_a_rank_keeps_what_its_strategy_says(
    words: list[str], ranks: int, values: float, moments: float, gathers: bool
) -> None:
    whole, part = budget_of("method=full"), budget_of("method=full", *words, ranks=ranks)
    assert part.values == pytest.approx(values * whole.values, rel=1e-6)
    assert part.moments == pytest.approx(moments * whole.moments, rel=1e-6)
    assert (part.gathered > 0) is gathers
    assert part.activations == whole.activations


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "paged_adamw8bit"])
@pytest.mark.parametrize("shape", [(96, 64), (300,)])
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_an_optimizer_keeps_what_is_said_of_it(name: str, shape: tuple[int, ...]) -> None:
    words = [f"optim.name={name}", *(["optim.momentum=0.9"] if name == "sgd" else [])]
    optim = compose(words).run.optim
    param = torch.nn.Parameter(torch.randn(shape))
    made = factory(optim)([{"params": [param]}])
    param.sum().backward()
    made.step()
    state = [value for value in made.state[param].values() if isinstance(value, torch.Tensor) and value.dim() > 0]
    shared = 2048 if any(value.dtype is torch.uint8 for value in state) else 0  # the two tables of 256 levels
    assert state_bytes(optim, param.shape) + shared == sum(value.nbytes for value in state)


def test_what_will_not_fit_is_said_and_not_refused() -> None:
    composed = run_of("model=llama70b", "method=full")
    plan = make_plan(composed, composed.run.model.resolve(planning=True))
    assert plan["memory"]["total"] > 800 * 2**30
    assert "this machine's memory will not do" in as_text(plan)
    fits = run_of("method=full")
    assert "will not do" not in as_text(make_plan(fits, fits.run.model.resolve(planning=True)))


def test_gradients_count_beside_activations_unless_they_take_their_place() -> None:
    words = ["method=full", "train.max_grad_norm=inf", "train.max_length=64"]
    one = [*words, "train.global_batch_size=1", "train.micro_batch_tokens=64", "train.gradient_checkpointing=full"]
    several, plain, moving = (
        budget_of(*words, "train.global_batch_size=64"),
        budget_of(*one),
        budget_of(*one, "optim.in_backward=true"),
    )
    assert several.gradients == several.values
    assert plain.gradients == plain.values - (plain.activations or 0)
    assert moving.gradients < plain.gradients / 4


def test_offloading_to_where_activations_are_is_said_to_do_nothing() -> None:
    composed = run_of("train.offload_activations=true")
    text = as_text(make_plan(composed, composed.run.model.resolve(planning=True)))
    assert "note         train.offload_activations does nothing here" in text


def test_this_machines_memory_is_known() -> None:
    whole = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 2**28 < (host_memory_bytes() or 0) <= whole


def test_a_job_is_not_held_against_this_machine() -> None:
    composed = run_of("model=llama70b", "method=full", "launcher=slurm", "launcher.dry_run=true")
    plan = make_plan(composed, composed.run.model.resolve(planning=True))
    assert plan["memory"]["available"] is None
    assert "this machine's memory" not in as_text(plan)
