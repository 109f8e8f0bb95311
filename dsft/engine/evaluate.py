"""Evaluation: loss on held-out rows, and exact match by greedy generation where the data can be verified."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from dsft.comm.devices import sent
from dsft.data.batch import build_batch
from dsft.data.open import Dataset
from dsft.data.packing import plan_step
from dsft.engine.assemble import Session, autocast
from dsft.engine.tally import Measured, Tally, counted
from dsft.models.attention import CACHED
from dsft.models.attention import NAME as RAGGED
from dsft.models.generation import generate
from dsft.objective import Batch

ANSWERS_AT_ONCE = 64
"""Prompts generated side by side on one rank."""


@dataclass(frozen=True)
class Answer:
    """One generated answer. row: index into the evaluation set."""

    row: int
    text: str
    correct: bool


@dataclass(frozen=True)
class Evaluation:
    """values: eval/loss per unit of the objective, eval/MEASURE, eval/accuracy in [0, 1] if answers can be verified."""

    values: dict[str, float]
    answers: list[Answer]


Asked = Callable[[], bool]
"""Tells whether all ranks agree to stop. Collective: every rank asks at the same places."""

Parts = Callable[[str], AbstractContextManager[object]]
"""Gives the context in which a part of an evaluation is made."""


class StoppedError(Exception):
    """A stop was agreed on in the middle of an evaluation, of which nothing counts."""


def evaluate(session: Session, data: Dataset, *, asked: Asked = lambda: False, part: Parts = nullcontext) -> Evaluation:
    """Measure the model on data.eval. Collective; the same result on every rank. Raises StoppedError if asked says so.

    part: a context for each of the two parts, called with its name.
    """
    session.model.eval()
    with part("evaluation"):
        found = _measured(session, data, asked)
    values = {f"eval/{name}": value for name, value in found.named.items()}
    with torch.no_grad(), autocast(session), part("generation"):
        answers = _answers(session, data, asked)
    if answers:
        values["eval/accuracy"] = sum(answer.correct for answer in answers) / len(answers)
    return Evaluation(values, answers)


def _measured(session: Session, data: Dataset, asked: Asked) -> Measured:
    """Return loss and measures on data.eval. Raises StoppedError between two micro-batches."""
    assert data.eval is not None
    run, world = session.run, session.world
    ranks = run.strategy.data_ranks(world)
    rows = list(range(len(data.eval)))
    rows += [0] * (ranks - len(rows))  # every rank needs a row; what is repeated stays silent
    plan = plan_step(session.lengths(data.eval, rows), ranks, session.tokens_at_once)

    def stop() -> None:
        if asked():
            raise StoppedError

    batches: Sequence[Batch] = [
        build_batch(
            data.eval,
            [rows[i] for i in micro.examples],
            silent=micro.silent or micro.examples[0] >= len(data.eval),
            mismatched=run.objective.mismatched,
        )
        for micro in plan[world.rank % ranks]
    ]
    tally = Tally(run.objective, world.device)
    with session.roles.interrupted(stop), torch.no_grad(), autocast(session):
        batches = run.objective.prepare(session.roles, batches)
        for batch in batches:
            stop()
            terms, metrics = run.objective.losses(session.scorer, batch.to(world.device))
            tally.add(terms if batch.counts else terms * 0, metrics, counts=batch.counts)
    return tally.measured(world, world.sum(sent(counted(run.objective, batches), world.device)))


def _answers(session: Session, data: Dataset, asked: Asked) -> list[Answer]:
    """Return greedy answers to all that can be verified, by row. Raises StoppedError between two groups of prompts.

    Rows are dealt to ranks in turn, each as often as the others.
    """
    rows, world = list(data.verifiable), session.world
    ranks = session.run.strategy.data_ranks(world)
    mine = rows[world.rank % ranks :: ranks]
    turns = -(-len(rows) // ranks)
    padded = mine + rows[:1] * (turns - len(mine))
    texts: list[str] = []
    at_once = ANSWERS_AT_ONCE if session.family.packs else 1  # beside others a prompt is padded
    with _cached(session):
        for start in range(0, turns, at_once):
            if asked():
                raise StoppedError
            texts += _generate(session, data, padded[start : start + at_once])
    answers = [Answer(row, text, data.verify(row, text) >= 1) for row, text in zip(mine, texts, strict=False)]
    return sorted((a for part in world.gather(answers) for a in part), key=lambda answer: answer.row)


@contextmanager
def _cached(session: Session) -> Iterator[None]:
    """Inside, attention reads a cache of keys, which needs padding; dsft's ragged one has none of it."""
    if not session.family.ragged:  # the model's own does so already
        yield
        return
    session.model.set_attn_implementation(CACHED)
    try:
        yield
    finally:
        session.model.set_attn_implementation(RAGGED)


def _generate(session: Session, data: Dataset, rows: list[int]) -> list[str]:
    assert data.eval is not None
    return generate(
        session.model,
        session.tokenizer,
        [torch.tensor(data.eval.prompt(row).tolist()) for row in rows],
        max_new_tokens=int(data.eval.supervised.max()) + 2,
        device=session.world.device,
        eos_token_id=_ends(session),
        synced_gpus=session.world.size > 1,
    )


def _ends(session: Session) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and the model's own."""
    own = session.model.generation_config.eos_token_id
    ends = [session.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return sorted({end for end in ends if end is not None})
