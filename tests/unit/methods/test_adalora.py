"""AdaLoRA: its budget, its allocation against PEFT's own, its penalty, its layer, and what it refuses."""

import copy
import math
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, inject_adapter_in_model
from peft.tuners.adalora.layer import RankAllocator
from torch import Tensor, nn

from dsft.compose import compose
from dsft.engine.loop import step_batches
from dsft.engine.step import train_step
from dsft.methods.allocator import Allocator, Schedule, Triplets
from dsft.methods.svd_linear import adopt
from dsft.quantizers.int8 import Int8Codec
from dsft.quantizers.nf4 import NF4Codec
from dsft.quantizers.packed import ByteLinear, fill
from tests.contract.sessions import session_of

PARTS = ("lora_A", "lora_B", "lora_E")
CPU = torch.device("cpu")
BASES: dict[str, Any] = {
    "dense": lambda linear: linear,
    "nf4": lambda linear: ByteLinear(linear, NF4Codec(double_quant=True), None),
    "int8": lambda linear: ByteLinear(linear, Int8Codec(), None),
}


@pytest.mark.parametrize(
    ("step", "budget"), [(0, 96), (10, 96), (11, 94), (20, 84), (45, 68), (79, 64), (80, 64), (100, 64)]
)
def test_the_budget_falls_as_the_cube(step: int, budget: int) -> None:
    schedule = Schedule(total=100, warmup=10, settled=80, interval=1)
    assert schedule.budget(step, 96, 64) == budget
    assert schedule.allocates(step) == (step > 10)


def allocator(layers: int, schedule: Schedule, *, rank: int = 2, first: int = 4, weight: float = 0.1) -> Allocator:
    triplets = [Triplets(f"{i}", *(f"{i}.{part}.default" for part in PARTS)) for i in range(layers)]
    sizes = [(first, 12), (10, first), (first, 1)]
    shapes = {
        f"{i}.{part}.default": torch.Size(size) for i in range(layers) for part, size in zip(PARTS, sizes, strict=True)
    }
    return Allocator(rank, weight, (0.85, 0.85), schedule, (triplets, shapes, CPU))


def values_of(course: Allocator) -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in zip(course.names, course.shapes, strict=True)}


def apply(values: dict[str, Tensor], changed: dict[str, Tensor]) -> None:
    for name, value in changed.items():
        values[name] = value


def test_it_keeps_the_triplets_that_pefts_allocator_keeps_at_every_step() -> None:
    torch.manual_seed(0)
    total = 30
    config = AdaLoraConfig(
        init_r=4, target_r=2, tinit=3, tfinal=6, deltaT=4, total_step=total, target_modules=["0", "1", "2"]
    )
    plain = inject_adapter_in_model(config, nn.Sequential(*(nn.Linear(12, 10) for _ in range(3))))
    theirs = RankAllocator(plain, config, "default")
    course = allocator(3, Schedule(total=total, warmup=3, settled=24, interval=4))
    params = {name: param for name, param in plain.named_parameters() if name in course.names}
    pattern: Any = None
    masked = 0
    for step in range(1, total + 1):
        for param in params.values():
            param.data.add_(torch.randn_like(param), alpha=0.3)  # a move that brings pruned lambdas back
            param.grad = torch.randn_like(param)
        values = {name: param.detach().clone() for name, param in params.items()}
        gradients = {name: param.grad for name, param in params.items() if param.grad is not None}
        apply(values, course.after_step(step, values, gradients if course.wants_gradients(step) else {}))
        if step <= 24:
            _, found = theirs.update_and_allocate(plain, step, force_mask=step == 24)
            pattern = found or pattern
        else:
            theirs.mask_using_rank_pattern(plain, pattern)
        for name, param in params.items():
            torch.testing.assert_close(values[name], param.detach(), rtol=0, atol=0)
        masked += sum(int((param == 0).sum()) for param in params.values())
    assert masked > 7 * 6
    assert course.news() is not None
    assert course.news() is None
    assert int(course.state["kept"].sum()) == 6


def test_equal_scores_still_leave_the_budget_to_the_one() -> None:
    course = allocator(3, Schedule(total=10, warmup=0, settled=8, interval=3))
    values = {name: torch.ones_like(value) for name, value in values_of(course).items()}
    left = []
    for step in range(1, 11):
        changed = course.after_step(step, values, values if course.wants_gradients(step) else {})
        if course.schedule.allocates(step):
            whole = {**values, **changed}
            left.append(sum(int((value != 0).sum()) for name, value in whole.items() if "lora_E" in name))
    assert left == [course.schedule.budget(step, 12, 6) for step in (3, 6, 8, 9, 10)] == [7, 6, 6, 6, 6]


def test_an_allocation_that_fell_on_a_skipped_step_is_made_up_for() -> None:
    course = allocator(3, Schedule(total=10, warmup=0, settled=6, interval=100))
    for step in (1, 2, 3, 4, 5, 7):  # 6 did not move
        values = values_of(course)
        changed = course.after_step(step, values, values if course.wants_gradients(step) else {})
    assert int(course.state["kept"].sum()) == 6
    assert changed


def test_scores_do_not_know_signs() -> None:
    scores = []
    for sign in (1, -1):
        torch.manual_seed(0)
        course = allocator(2, Schedule(total=9, warmup=1, settled=8, interval=9))
        for step in (1, 2, 3):
            values = values_of(course)
            course.after_step(step, {name: sign * value for name, value in values.items()}, values_of(course))
        scores.append(course.scores())
    assert torch.equal(*scores)
    assert (scores[0] > 0).all()


def test_the_penalty_is_the_mean_distance_from_orthonormal() -> None:
    torch.manual_seed(0)
    course = allocator(3, Schedule(total=9, warmup=1, settled=8, interval=9), weight=0.3)
    values = values_of(course)
    rows = [value if "lora_A" in name else value.T for name, value in values.items() if "lora_E" not in name]
    expected = 0.3 * sum(torch.linalg.matrix_norm(row @ row.T - torch.eye(4)) for row in rows) / 6
    found = course.penalty(values)
    assert found is not None
    torch.testing.assert_close(found, torch.as_tensor(expected))
    for name, value in values.items():
        if "lora_E" not in name:
            values[name] = torch.linalg.qr(value if "lora_B" in name else value.T)[0]
            values[name] = (values[name] if "lora_B" in name else values[name].T).requires_grad_()
    orthonormal = course.penalty(values)
    assert orthonormal is not None
    assert orthonormal.item() < 1e-6
    orthonormal.backward()  # type: ignore[no-untyped-call]
    assert all(value.grad.isfinite().all() for value in values.values() if value.grad is not None)


def test_the_penalty_is_beside_the_loss_and_in_the_gradient() -> None:
    found = []
    for weight in (0.0, 0.1, 0.2):
        session, data = session_of("adalora", f"method.penalty={weight}")
        found.append(train_step(session, step_batches(session, data, 1)[1], 1, 1.0))
    none, some, more = found
    assert none.loss == some.loss == more.loss
    assert math.isnan(none.penalty)
    assert more.penalty == pytest.approx(2 * some.penalty, rel=1e-6)
    parts = [result.grad_norm**2 - none.grad_norm**2 for result in (some, more)]  # lambda = 0: P and Q have no other
    assert parts[1] == pytest.approx(4 * parts[0], rel=1e-4)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_its_layer_gives_what_pefts_gives(base: str, precision: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=base == "dense")
    packed = BASES[base](linear)
    if packed is not linear:
        fill(packed, "weight", [linear.weight.detach()])
    config = AdaLoraConfig(init_r=6, target_r=4, lora_alpha=32, target_modules=["0"], total_step=9)
    plain = inject_adapter_in_model(config, nn.Sequential(packed))
    for name, param in plain.named_parameters():
        if "lora" in name:
            nn.init.normal_(param)
    ours = copy.deepcopy(plain)
    assert len(list(adopt(ours))) == 1
    x = torch.randn(2, 7, 64)
    expected, found = _outcome(plain, x, precision), _outcome(ours, x, precision)
    assert len(expected) == len(found) == 4
    bound = 1e-5 if precision is torch.float32 else 3e-2  # of the largest: other orders of rounding
    for one, other in zip(expected, found, strict=True):
        assert float((one - other).abs().max() / one.abs().max()) < bound


def _outcome(model: nn.Module, x: Tensor, precision: torch.dtype) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
        y = model(x)
    (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    params = [param for name, param in model.named_parameters() if "lora" in name]
    return [y.detach().float(), *(param.grad for param in params if param.grad is not None)]


def test_it_trains_what_the_paper_counts() -> None:
    session, _ = session_of("adalora")
    linears = [session.model.get_submodule(name) for name in session.anatomy.linears]
    counted = sum(param.numel() for param in session.model.parameters() if param.requires_grad)
    assert counted == sum(12 * (linear.in_features + linear.out_features + 1) for linear in linears)
    assert not [name for name, _ in session.model.named_parameters() if "ranknum" in name]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method.rank=13"], "method.initial_rank must be at least method.rank=13"),
        (["method.warmup=1.0"], "method.warmup must be a number of steps, or a share"),
        (["method.final=-1"], "method.final must be a number of steps, or a share"),
        (["method.interval=0"], "method.interval must be 1 step or more, got 0"),
        (["method.beta2=1.0"], "method.beta2 must be in (0, 1), got 1.0"),
        (["method.penalty=-0.1"], "method.penalty must be 0 or more, got -0.1"),
        (["optim.in_backward=true", "train.max_grad_norm=inf"], "method=adalora looks at all of them before the step"),
        (["strategy=zero2", "strategy.offload=optimizer"], "method=adalora gathers them at each step"),
    ],
)
def test_what_it_cannot_do_is_refused_when_the_run_is_composed(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as refusal:
        compose(["model=tiny", "method=adalora", *words])
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("steps", "words"),
    [(1, []), (12, ["method.warmup=5", "method.final=7"]), (20, ["method.warmup=0", "method.final=19"])],
)
def test_a_run_with_fewer_steps_than_its_schedule_is_refused(steps: int, words: list[str]) -> None:
    method = compose(["model=tiny", "method=adalora", *words]).run.method
    with pytest.raises(ValueError, match=f"train.steps must leave steps .* got {steps}; raise train.steps"):
        method.check(steps)
    method.check(steps + 1 if words else 3)


def test_a_rank_above_the_smaller_side_is_refused() -> None:
    with pytest.raises(ValueError, match=r"method.initial_rank must be at most \d+, the smaller side of "):
        session_of("adalora", "method.initial_rank=100000")
