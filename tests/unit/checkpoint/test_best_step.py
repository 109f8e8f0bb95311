"""Going back to the step with the best evaluation: its checkpoint is loaded, or the run says that it cannot be."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dsft_launchers.verdict import RefusedError

from dsft import folder
from dsft.checkpoint import manifest
from dsft.compose import load_yaml
from dsft.engine.assemble import Session
from dsft.engine.progress import Progress
from dsft.engine.resume import back_to_best
from tests.unit.checkpoint.resuming import STEPS, Told
from tests.unit.checkpoint.test_restore import flip_a_bit


@pytest.mark.parametrize("spoil", [None, flip_a_bit, Path.unlink, "gone"])
def test_going_back_to_the_best_step_loads_it_or_is_refused(spoil: Any, session: Session, run_dir: Path) -> None:
    """STEPS[0] has the best evaluation; a later one is the last."""
    session = replace(
        session, run=replace(session.run, checkpoint=replace(session.run.checkpoint, keep_best="eval/loss"))
    )
    best, last = STEPS[0], max(STEPS)
    place = run_dir / "checkpoints" / manifest.folder_name(best)
    if spoil == "gone":
        shutil.rmtree(place)
    elif spoil is not None:
        spoil(place / "__0_0.distcp")
    told, at = Told(), Progress(total=last, step=last, bests=[(best, 0.5)])
    who = folder.identity(run_dir, load_yaml(run_dir / "config.yaml"))
    if spoil is None:
        back_to_best(session, run_dir, who, None, at, told)  # type: ignore[arg-type]
        assert [(event, step) for event, step, _ in told.events] == [("back_to_best", best)]
        return
    with pytest.raises(RefusedError, match=f"the result must be of step {best}, .* cannot be read .*; put it back, or"):
        back_to_best(session, run_dir, who, None, at, told)  # type: ignore[arg-type]
