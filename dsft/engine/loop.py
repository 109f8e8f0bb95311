"""The training loop: evaluate, step, record, decide together, evaluate."""

import math

from dsft.data.batch import build_batch
from dsft.data.open import Dataset
from dsft.data.order import batch_rows
from dsft.data.packing import plan_step
from dsft.engine.assemble import Session
from dsft.engine.evaluate import evaluate
from dsft.engine.keep import Keeper
from dsft.engine.optimizers import rate
from dsft.engine.parts import Part, mark
from dsft.engine.patience import UNEVEN_S, Patience
from dsft.engine.profile import profiled
from dsft.engine.progress import STOPPED, Progress, Watch
from dsft.engine.step import StepResult, train_step
from dsft.engine.stop import StopFlag
from dsft.protocols import Batch


def fit(session: Session, data: Dataset, watch: Watch, stop: StopFlag, keeper: Keeper, at: Progress) -> Progress:
    """Train from where at is to its last step, or until a stop is agreed. Collective."""
    if at.step == 0:
        _evaluate(session, data, at, watch)
    with (
        profiled(session, watch, done=at.step, total=at.total) as watched,
        _patience_for(session) as patience,
    ):
        return _steps(session, data, watched, stop, keeper, at, patience=patience)


def _patience_for(session: Session) -> Patience:
    """Of one process none: it waits for nobody."""
    train = session.run.train
    uneven = session.compiler is not None or train.profile > 0
    return Patience(math.inf if session.world.size == 1 else train.hang_after + uneven * UNEVEN_S)


def _steps(
    session: Session, data: Dataset, watch: Watch, stop: StopFlag, keeper: Keeper, at: Progress, *, patience: Patience
) -> Progress:
    while True:
        with patience.limit(at.step):
            asked, busy = session.world.max(stop.reason is not None, keeper.busy)
        ends = at.over or at.step >= at.total
        keeper.tend(at, watch, busy=busy > 0, last=ends or asked > 0)
        if ends:
            return at
        if asked:
            at.state, at.reason = STOPPED, next(filter(None, session.world.gather(stop.reason)))
            return at
        at.step += 1
        watch.begin_step()
        scale = rate(session.run.optim, at.step, at.total)
        with mark(Part.DATA):
            rows, batches = step_batches(session, data, at.step)
        with patience.limit(at.step, tokens=sum(int(data.train.lengths[row]) for row in rows)):
            result = train_step(session, batches, at.step, scale, settle=patience.apart(keeper.settle))
        with patience.limit(at.step):
            watch.step(at.step, _values(session, result, scale), [data.train.id(row) for row in rows])
        if session.compiler and (news := session.compiler.news()):
            watch.event("compiled", at.step, news)
        if session.guided and (told := session.guided.course.news()):
            watch.event(told[0], at.step, told[1])
        if not result.moved:
            _survive(session, at, result, watch)
        _look(session, data, at, watch, last=at.step == at.total)


def step_batches(session: Session, data: Dataset, step: int) -> tuple[list[int], list[Batch]]:
    """The rows of this step in global order, and this rank's micro-batches of them."""
    run, world = session.run, session.world
    train = run.train
    rows = batch_rows(
        step, seed=train.seed, num_rows=len(data.train), batch_size=train.global_batch_size, shuffle=run.data.shuffle
    )
    ranks = run.strategy.data_ranks(world)
    lengths = [int(data.train.lengths[row]) + run.method.positions for row in rows]
    plan = plan_step(lengths, ranks, train.micro_batch_tokens)
    mine = plan[world.rank % ranks]
    return rows, [build_batch(data.train, [rows[i] for i in micro.examples], silent=micro.silent) for micro in mine]


def _values(session: Session, result: StepResult, scale: float) -> dict[str, float]:
    penalty = {} if math.isnan(result.penalty) else {"penalty": result.penalty}
    return {
        "loss": result.loss,
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
        raise RuntimeError(f"{what}; parameters have moved by it, as optim.in_backward=true does not look first")
    what += "; nothing was updated"
    if train.on_nonfinite == "stop":
        raise RuntimeError(f"{what}; train.on_nonfinite=skip goes on without such steps")
    if at.skipped > train.max_nonfinite:
        raise RuntimeError(f"{what}, and train.max_nonfinite={train.max_nonfinite} steps were skipped before")


def _look(session: Session, data: Dataset, at: Progress, watch: Watch, *, last: bool) -> None:
    """Evaluate where it is due, and see whether that ends the run."""
    every = session.run.train.eval_every
    due = every > 0 and at.step % every == 0
    if due or last:
        _evaluate(session, data, at, watch)
    if due and _no_better(session, at):
        at.over = True
        if not last:
            watch.event("early_stop", at.step, {"metric": session.run.train.early_stop_metric, "best": abs(at.best)})


def _evaluate(session: Session, data: Dataset, at: Progress, watch: Watch) -> None:
    if data.eval is None:
        return
    evaluation = evaluate(session, data)
    at.evaluations.append((at.step, evaluation))
    watch.evaluation(at.step, evaluation)


def _no_better(session: Session, at: Progress) -> bool:
    """True once the metric has not improved for early_stop_patience evaluations (accuracy up, all else down)."""
    name = session.run.train.early_stop_metric
    if name is None or not at.evaluations:
        return False
    values = at.evaluations[-1][1].values
    if name not in values:
        raise RuntimeError(f"train.early_stop_metric={name} was not measured; there are: {', '.join(values)}")
    value = -values[name] if "accuracy" in name else values[name]
    at.worse = 0 if value < at.best else at.worse + 1
    at.best = min(at.best, value)
    return at.worse >= session.run.train.early_stop_patience
