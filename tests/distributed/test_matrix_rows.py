"""Every method has its rows in dsft/matrix.json; not among what `make check` runs, since a new method has none yet."""

from benchmarks.matrix import rows
from benchmarks.matrix_text import DATA, read


def test_every_method_has_been_measured() -> None:
    missing = [name for name in rows() if name not in read(DATA)["rows"]]
    methods = ",".join(sorted({name.split()[1].partition("+")[0] for name in missing}))
    assert not missing, f"run make matrix ARGS='--methods {methods}'"
