"""Shared by all tests: a token and model cache of their own, so that they neither use nor fill the user's."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
CACHE = Path(os.environ.get("DSFT_TEST_CACHE", REPOSITORY / ".test-cache"))
os.environ["DSFT_CACHE"] = str(CACHE)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("WANDB_API_KEY", None)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY
