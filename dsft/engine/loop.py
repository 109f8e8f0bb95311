"""The training loop: evaluate, step, record, decide together, evaluate."""

import math
from collections.abc import Callable

from dsft_launchers.verdict import WAY_OUT, DivergedError

from dsft.data.batch import build_batch
from dsft.data.open import Dataset
from dsft.data.order import batch_rows
from dsft.data.packing import plan_step
from dsft.engine.assemble import Session
from dsft.engine.examine import Examiner
from dsft.engine.keep import Keeper
from dsft.engine.optimizers import rate
from dsft.engine.parts import Part, mark
from dsft.engine.patience import Patience
from dsft.engine.profile import profiled
from dsft.engine.progress import STOPPED, Progress, Watch
from dsft.engine.step import StepResult, train_step
from dsft.engine.stop import StopFlag, in_vain
from dsft.objective import Batch


def fit(
    session: Session, data: Dataset, watch: Watch, stop: StopFlag, keeper: Keeper, at: Progress,
    *, patience: Patience | None = None,
) -> Progress:  # fmt: skip
    """Train from where at is to its last step, or until a stop is agreed. Collective. patience: None sets no limits."""
    patience = patience or Patience(math.inf)
    uneven = session.compiler is not None or session.run.train.profile > 0
    at.owed = at.owed or (at.step == 0 and not at.evaluations)
    patience.expect(session.run.strategy.data_ranks(session.world), uneven=uneven)
    with profiled(session, watch, done=at.step, total=at.total) as watched:
        return _steps(session, data, watched, stop, keeper, at, patience=patience)


def _steps(
    session: Session, data: Dataset, watch: Watch, stop: StopFlag, keeper: Keeper, at: Progress, *, patience: Patience
) -> Progress:
    begun = at.step

    def asked() -> bool:
        return session.world.max(stop.reason is not None)[0] > 0

    settle = patience.apart(keeper.settle, "save", lambda: keeper.work_s(patience.limits.state_s))
    session.roles.settle = settle
    examiner = Examiner(session, data, watch, asked, patience)
    while True:
        with patience.limit(at.step):
            stopping, busy = session.world.max(stop.reason is not None, keeper.busy)
        ends = not at.owed and (at.over or at.step >= at.total)
        if stopping and not ends:
            at.state, at.reason = STOPPED, _reason(session, stop, made=at.step > begun)
            watch.event("stopping", at.step, {"reason": at.reason})
        if stopping or not at.owed:  # a checkpoint knows the evaluation after its step
            last = ends or stopping > 0
            with patience.phase("save", keeper.work_s(patience.limits.state_s)):
                keeper.tend(at, watch, busy=busy > 0, last=last)
            if last:
                return at
        if at.owed:
            examiner.look(at)
            continue
        at.step += 1
        _step(session, data, watch, settle, at, patience=patience)
        every = session.run.train.eval_every
        at.owed = at.step == at.total or (every > 0 and at.step % every == 0)


def _step(
    session: Session, data: Dataset, watch: Watch, settle: Callable[[], None], at: Progress, *, patience: Patience
) -> None:
    """Make one optimizer step, and record it."""
    watch.begin_step()
    scale = rate(session.run.optim, at.step, at.total)
    with mark(Part.DATA):
        rows, batches = step_batches(session, data, at.step)
    with patience.limit(at.step, tokens=int(data.train.lengths[rows].sum()) * session.run.objective.passes):
        result = train_step(session, batches, at.step, scale, settle=settle)
    with patience.limit(at.step):
        watch.step(at.step, _values(session, result, scale), [data.train.id(row) for row in rows])
    if session.compiler and (news := session.compiler.news()):
        watch.event("compiled", at.step, news)
    if session.guided and (told := session.guided.course.news()):
        watch.event(told[0], at.step, told[1])
    if not result.moved:
        _survive(session, at, result, watch)


def _reason(session: Session, stop: StopFlag, *, made: bool) -> str:
    """Return why the first rank that wants to stop does; made: this start has made a step. Collective."""
    reason = next(filter(None, session.world.gather(stop.reason)))
    return reason if made else in_vain(reason)


def step_batches(session: Session, data: Dataset, step: int) -> tuple[list[int], list[Batch]]:
    """The rows of this step in global order, and this rank's micro-batches of them."""
    run, world = session.run, session.world
    train = run.train
    rows = batch_rows(
        step, seed=train.seed, num_rows=len(data.train), batch_size=train.global_batch_size, shuffle=run.data.shuffle
    )
    ranks = run.strategy.data_ranks(world)
    plan = plan_step(session.lengths(data.train, rows), ranks, session.tokens_at_once)
    mine = plan[world.rank % ranks]
    return rows, [
        build_batch(
            data.train,
            [rows[i] for i in micro.examples],
            silent=micro.silent,
            places=micro.examples,
            mismatched=run.objective.mismatched,
        )
        for micro in mine
    ]


def _values(session: Session, result: StepResult, scale: float) -> dict[str, float]:
    penalty = {} if math.isnan(result.penalty) else {"penalty": result.penalty}
    return {
        **result.named,
        **penalty,
        "grad_norm": result.grad_norm,
        "lr": session.run.optim.lr * scale,
        "tokens": result.tokens,
        "supervised_tokens": result.supervised,
    }


def _survive(session: Session, at: Progress, result: StepResult, watch: Watch) -> None:
    """A NaN or Inf: nothing moved on any rank (but in backward). Go on within the budget, or end the run."""
    train = session.run.train
    at.skipped += 1
    what = f"step {at.step}: loss {result.loss}, gradient norm {result.grad_norm}"
    watch.event("nonfinite", at.step, {"loss": result.loss, "grad_norm": result.grad_norm, "skipped": at.skipped})
    if session.run.optim.in_backward:
        raise DivergedError(f"{what}; parameters have moved by it, as optim.in_backward=true does not look first")
    what += "; nothing was updated"
    if train.on_nonfinite == "stop":
        raise DivergedError(f"{what}; {WAY_OUT}, or take train.on_nonfinite=skip")
    if at.skipped > train.max_nonfinite:
        raise DivergedError(f"{what}, and train.max_nonfinite={train.max_nonfinite} steps were skipped before")
