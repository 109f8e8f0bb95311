"""What refuses a run before its weights are loaded, and whose word that is: a rule's, or the maths of a part."""

import traceback
from collections.abc import Sequence
from pathlib import Path

from dsft.compose import compose
from dsft.engine.assemble import skeleton
from dsft.rules import RuleError

ROOT = Path(__file__).parents[1]


def refusal(words: Sequence[str]) -> dict[str, str] | None:
    """{"refused": its line, "by": the rule or the file that said so}; None if nothing refuses this run."""
    try:
        run = compose(words).run
        run.method.check(run.train.steps or 0)
        skeleton(run, run.model.resolve())
    except ValueError as error:
        return refused(error)
    return None


def refused(error: ValueError) -> dict[str, str]:
    """The same, of what was raised on the way."""
    return {"refused": str(error), "by": _by(error)}


def _by(error: ValueError) -> str:
    if isinstance(error, RuleError):
        return f"rule {error.rule}"
    places = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    return [str(place.relative_to(ROOT)) for place in places if place.is_relative_to(ROOT / "dsft")][-1]
