"""dsft as a peer: the engine's own assembly and step, on one process or several."""

from benchmarks.job import BATCH, LENGTH, RATE, Clock, Job, Step, serve
from dsft.comm.world import World, join, leave
from dsft.compose import compose
from dsft.config import Run
from dsft.data.open import open_data
from dsft.engine.assemble import assemble
from dsft.engine.loop import step_batches
from dsft.engine.step import train_step


def words(job: Job) -> list[str]:
    """Overrides of the run that all peers make, and the setting's own; ranks find each other by what launched them."""
    strategy, *own = job.setting.split()
    launcher = "local" if strategy == "single" else "auto"
    return [
        "model=smollm2_135m", f"model.path={job.model}", f"method={job.mode}", "data=local", f"data.path={job.rows}",
        "data.shuffle=false",
        f"train.global_batch_size={BATCH}", f"train.max_length={LENGTH}", "train.max_grad_norm=inf",
        f"optim.lr={RATE}", "optim.weight_decay=0", "tracker=[]", f"train.precision={job.precision}",
        f"strategy={strategy}", f"launcher={launcher}", *own,
    ]  # fmt: skip


def run(job: Job) -> list[Step]:
    """The job through the engine, by whatever launched this process."""
    world = join()
    settings = compose(words(job)).run
    steps = train(settings, world, job.steps)
    settings.strategy.close()
    leave()
    return steps


def train(run: Run, world: World, num_steps: int) -> list[Step]:
    """The engine's steps; a silent micro-batch, which repeats an example, counts as padding."""
    files = run.model.resolve()
    data = open_data(run.data, files.tokenizer(), max_length=run.train.max_length, seed=run.train.seed)
    session = assemble(run, files, world)
    clock = Clock()
    for step in range(1, num_steps + 1):
        batches = step_batches(session, data, step)[1]
        result = train_step(session, batches, step, 1.0)
        supervised = [sum(batch.answers) if batch.counts else 0 for batch in batches]
        sizes = [batch.tokens.numel() for batch in batches]
        real = sum(size for size, carries in zip(sizes, supervised, strict=True) if carries)
        clock.end(real, sum(supervised), sum(sizes), result.loss)
    return clock.steps


if __name__ == "__main__":
    serve(run)
