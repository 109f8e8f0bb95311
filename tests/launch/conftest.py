"""Rows that the tests of whole runs train on."""

from pathlib import Path

import pytest

from benchmarks.matrix_rows import write_rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(path, 60)
    return path
