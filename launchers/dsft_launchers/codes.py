"""Exit codes of a run, of its launcher and of its SLURM job."""

DONE = 0
USER_ERROR = 2
"""The user's input is wrong; one line says what, and nothing was started."""
STOPPED = 75
"""Stopped on request, state saved: run it again."""
CRASHED = 76
"""This attempt failed; it can be resumed."""
HOPELESS = 77
"""Several attempts failed without a new checkpoint between them."""
DIVERGED = 78
"""What is learned gives no numbers any more; the same command would end so again."""
