"""Rows whose label counts differ much between ranks: twenty batches of eight."""

from pathlib import Path

import pytest

from benchmarks.matrix_rows import write_rows


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(path, 20)
    return path
