"""train.profile=N: so many steps under torch.profiler, as a table by part and a Chrome trace per rank.

What says whose operations are whose (marks.py) is put on for the profiled steps and taken off after them: a run with
train.profile=0 has none of it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from dsft.engine.assemble import Session
from dsft.engine.evaluate import Evaluation
from dsft.engine.marks import marked
from dsft.engine.parts import STEP, Part, links_of, seconds_by_part
from dsft.engine.precision import DTYPES
from dsft.engine.progress import Watch
from dsft.models.work import matmul_ceiling, widest, work

FOLDER = "profile"
"""Where in the run folder table and traces go."""


@dataclass(frozen=True)
class Found:
    """What one rank found. ceiling: FLOP per second of a plain product; error: why its trace was not written."""

    seconds: dict[Part, float]
    ceiling: float
    error: str | None


def profiled(session: Session, watch: Watch, *, done: int, total: int) -> AbstractContextManager[Watch]:
    """A watch that profiles the steps which train.profile asks for and passes all on; watch itself if it asks for none.

    done: steps before this attempt, whose first step warms up and is not profiled. Collective where it is left.
    """
    wanted = session.run.train.profile
    if wanted == 0:
        return nullcontext(watch)
    steps = range(done + 2, min(done + 2 + wanted, total + 1))
    if len(steps) < wanted:
        watch.event("profile_short", done, {"wanted": wanted, "steps": len(steps)})
    return Profile(session, watch, steps, done=done)


class Profile:
    """A Watch that profiles steps, and writes what it saw after the last of them or where the loop is left before."""

    def __init__(self, session: Session, watch: Watch, steps: range, *, done: int) -> None:
        self.session, self.watch, self.steps, self.at = session, watch, steps, done
        self.seen: list[int] = []
        self.tokens = self.supervised = 0.0
        self.running, self.span = ExitStack(), ExitStack()
        self.profiler: torch.profiler.profile | None = None

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.span.close()
        self.running.close()
        if kind is None:
            self._finish()

    def begin_step(self) -> None:
        """A step begins."""
        self.at += 1
        if self.at in self.steps and self.profiler is None:
            self.running.enter_context(marked(self.session.model, self.session.anatomy))
            self.profiler = self.running.enter_context(torch.profiler.profile(acc_events=True))
        self.watch.begin_step()
        if self.at in self.steps:
            self.span.enter_context(torch.profiler.record_function(STEP))

    def step(self, step: int, values: Mapping[str, float], ids: list[str]) -> None:
        """A step is over."""
        if step in self.steps:
            if self.session.world.device.type != "cpu":
                torch.accelerator.synchronize()  # what it started belongs to it
            self.span.close()
            self.seen.append(step)
            self.tokens += values["tokens"]
            self.supervised += values["supervised_tokens"]
        self.watch.step(step, values, ids)
        if self.seen and step == self.steps[-1]:
            self._finish()

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Pass on."""
        self.watch.evaluation(step, evaluation)

    def event(self, event: str, step: int, details: Mapping[str, object]) -> None:
        """Pass on."""
        self.watch.event(event, step, details)

    def _finish(self) -> None:
        """Stop, look, write; once. Collective."""
        if not self.seen:
            return
        assert self.profiler is not None
        self.running.close()
        world, folder, profiler = self.session.world, Path(self.session.run.run_dir) / FOLDER, self.profiler

        def export() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(folder / f"trace-rank{world.rank}.json.gz"))

        error = _tried(export)
        assert profiler.profiler is not None
        seconds = seconds_by_part(profiler.events(), links_of(profiler.profiler.kineto_results))
        world.barrier()  # a ceiling for all ranks is what they reach side by side
        ranks = world.gather(Found(seconds, self._ceiling(), error))
        text = "\n".join(self._text(ranks)) + "\n"
        errors = [found.error for found in ranks if found.error]
        if world.rank == 0:
            errors += filter(None, [_tried(lambda: (folder / "table.md").write_text(text))])
        what = f"not written to {folder}: {'; '.join(errors)}" if errors else f"written to {folder}"
        self.watch.event("profile", self.seen[-1], {"what": what, "table": text})
        self.seen, self.profiler = [], None

    def _product(self) -> tuple[int, int, int]:
        """Tokens of a micro-batch, in and out of the widest linear: what the ceiling is measured with."""
        run, world = self.session.run, self.session.world
        per_rank = int(self.tokens) // len(self.seen) // run.strategy.data_ranks(world)
        tokens = max(1, min(per_rank, run.train.micro_batch_tokens))
        return tokens, *widest(self.session.model, self.session.anatomy)

    def _ceiling(self) -> float:
        tokens, *shape = self._product()
        dtype = DTYPES[self.session.run.train.precision]
        return matmul_ceiling(tokens, (shape[0], shape[1]), dtype, self.session.world.device)

    def _text(self, ranks: Sequence[Found]) -> Iterator[str]:
        """The lines of table.md."""
        yield f"# Where the time of {len(self.seen)} steps went: {self.seen[0]} to {self.seen[-1]}"
        yield ""
        yield from table([found.seconds for found in ranks])
        yield ""
        yield from (f"- {line}" for line in self._notes(ranks))

    def _notes(self, ranks: Sequence[Found]) -> Iterator[str]:
        session = self.session
        if session.world.device.type == "cpu":
            yield (
                "Seconds of the thread that drives the steps, each operation without those inside it. "
                f"`{Part.IDLE}`: Python and autograd between them, and waiting; a wait for other ranks is "
                f"`{Part.COMMUNICATION}`."
            )
        else:
            yield (
                "Seconds of the accelerator; where it computes and communicates at once, the computing counts. "
                f"`{Part.IDLE}`: it had nothing to do."
            )
        seconds = sum(sum(found.seconds.values()) for found in ranks) / len(ranks)
        flop, ceiling = work(session.model, session.anatomy), sum(found.ceiling for found in ranks)
        needed = flop.of(self.tokens, self.supervised)
        shape = " x ".join(map(str, self._product()))
        yield (
            f"Tokens per second: {self.tokens / seconds:,.0f} ({self.tokens:,.0f} real tokens, {self.supervised:,.0f} "
            "of them supervised); profiling itself takes some of the time."
        )
        yield (
            f"Work: {needed / 1e9:,.1f} GFLOP = {flop.per_token / 1e6:,.3f} MFLOP per real token (linears and experts "
            f"of the blocks) + {flop.per_supervised / 1e6:,.3f} per supervised one (head). Not counted: attention's "
            "own products, an adapter's, what is recomputed."
        )
        yield (
            f"Ceiling: {ceiling / 1e9:,.1f} GFLOP/s by a plain product of {shape} in {session.run.train.precision}"
            f"{f' on {len(ranks)} ranks at once' if len(ranks) > 1 else ''}; "
            f"the work in the profiled time is {needed / seconds / ceiling:.1%} of it."
        )


def table(ranks: Sequence[Mapping[Part, float]]) -> Iterator[str]:
    """Markdown: the mean seconds of each part, their share of the whole, and the least and the most of a rank."""
    several = len(ranks) > 1
    yield f"| part | seconds | share |{' of a rank |' if several else ''}"
    yield f"|---|---:|---:|{'---:|' if several else ''}"
    whole = sum(sum(seconds.values()) for seconds in ranks) / len(ranks)
    for part in Part:
        each = [seconds[part] for seconds in ranks]
        mean = sum(each) / len(ranks)
        spread = f" {min(each):.3f} to {max(each):.3f} |" if several else ""
        yield f"| {part} | {mean:.3f} | {mean / whole:.1%} |{spread}"
    yield f"| all | {whole:.3f} | 100.0% |{' |' if several else ''}"


def _tried(write: Callable[[], object]) -> str | None:
    """None, or why the disk did not take it: the run goes on without."""
    try:
        write()
    except OSError as error:
        return str(error)
    return None
