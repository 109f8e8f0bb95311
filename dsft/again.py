"""The command that goes on with a run, as a person can paste it into a shell."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from dsft.compose import load_yaml
from dsft.folder import provenance
from dsft.idle import OF_A_SWEEP
from dsft.wording import as_value

BEFORE = {"torchrun": "torchrun ... -m", "slurm task": "srun ... python -m"}
"""How a start of that kind begins, where it is not dsft that starts the processes; dsft cannot know the dots."""


def command_of(run_dir: Path) -> str:
    """Return the command line that goes on with the run in run_dir, as its last start was typed."""
    try:
        words, started = load_yaml(run_dir / "overrides.yaml"), provenance(run_dir).get("started", "local")
    except Exception:  # YAML's, OmegaConf's: what was typed is lost, and no reason to end a run for; dots say so
        words, started = ["..."], "local"
    return command_line(words, run_dir, started=started)


def command_line(overrides: Sequence[str], run_dir: Path, *, started: str) -> str:
    """Return the command that starts these overrides in run_dir, quoted for a shell. started: a kind of Started.

    run_dir stands in the place of the word that was typed, which may name a new folder for each start (${now:...}), as
    its default does. What only a sweep takes is left out: the command is of one run.
    """
    words = [word for word in overrides if word.lstrip("+").partition("=")[0] not in ("run_dir", OF_A_SWEEP)]
    words.append(f"run_dir={as_value(str(run_dir))}")
    folder = os.environ.get("DSFT_CONFIG_DIR")
    chosen = [] if folder is None else ["--config-dir", folder]
    return f"{BEFORE.get(started, 'python -m')} dsft.run {shlex.join([*chosen, *words])}"
