"""Shared by all tests: a token and model cache of their own, so that they neither use nor fill the user's."""

import os
from pathlib import Path

import pytest

from tests import warm

REPOSITORY = Path(__file__).parents[1]
CACHE = Path(os.environ.get("DSFT_TEST_CACHE", REPOSITORY / ".test-cache"))
os.environ["DSFT_CACHE"] = str(CACHE)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Workers and the processes that tests start share the cores: threads of torch that wait for each other there, spinning,
# take four times the CPU time of one. It is set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("WANDB_API_KEY", None)
warm.install()


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY
