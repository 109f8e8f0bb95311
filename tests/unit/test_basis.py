"""The base of a run is known by all its bytes: before its first step, or read beside its steps."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dsft_launchers.verdict import RefusedError

from dsft.basis import Basis, digests_of, require
from dsft.comm.world import World
from dsft.models.files import ModelFiles

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


@pytest.fixture
def base(big: Callable[..., ModelFiles]) -> ModelFiles:
    return big("gpt2")


@pytest.fixture
def run_dir(tmp_path: Path, base: ModelFiles) -> Path:
    """Of a run that knows the fingerprint of its base."""
    (tmp_path / "run").mkdir()
    return knows(tmp_path / "run", base_fingerprint=base.fingerprint())


def knows(run_dir: Path, **digests: str) -> Path:
    (run_dir / "provenance.json").write_text(json.dumps(digests))
    return run_dir


def flip(files: ModelFiles) -> None:
    assert files.folder is not None
    with (files.folder / "model.safetensors").open("r+b") as stream:
        stream.seek(2**25 + 5000)
        stream.write(b"x")


def test_a_base_that_was_never_read_is_read_beside_the_steps(base: ModelFiles, run_dir: Path) -> None:
    told: list[str] = []
    basis = Basis(base, run_dir, ALONE)
    assert basis.digest is None
    basis.read(told.append)
    digest = basis.settle()
    assert (told, basis.digest) == ([digest], base.digest())
    again = Basis(base, run_dir, ALONE)
    assert again.digest == digest, "it is remembered"
    again.read(told.append)
    assert told == [digest, digest], "a run that did not know it is told"
    knows(run_dir, base_fingerprint=base.fingerprint(), base_digest=digest)
    later = Basis(base, run_dir, ALONE)
    later.read(told.append)
    assert (len(told), later.settle()) == (2, digest)


def test_a_base_that_changes_while_it_is_loaded_and_read_gives_no_result(base: ModelFiles, run_dir: Path) -> None:
    told: list[str] = []
    basis = Basis(base, run_dir, ALONE)
    flip(base)
    basis.read(told.append)
    with pytest.raises(RuntimeError, match=r"was changed while the run loaded and read it; .* no result is published"):
        basis.settle()
    assert told == []


def test_a_base_that_changes_behind_the_reading_gives_no_result(base: ModelFiles, run_dir: Path) -> None:
    base.digest()
    basis = Basis(base, run_dir, ALONE)
    assert base.folder is not None
    (base.folder / "model.safetensors").chmod(0o600)  # another identity of the same bytes
    assert basis.settle() == basis.digest
    flip(base)
    with pytest.raises(RuntimeError, match="was changed while the run trained on it"):
        basis.settle()


def test_a_base_that_goes_away_before_it_is_read_gives_no_result(base: ModelFiles, run_dir: Path) -> None:
    basis = Basis(base, run_dir, ALONE)
    assert base.folder is not None
    (base.folder / "model.safetensors").rename(base.folder / "gone")
    basis.read(None)
    with pytest.raises(RuntimeError, match="could not be read: "):
        basis.settle()


def test_a_run_that_knows_all_bytes_of_its_base_takes_no_other(base: ModelFiles, run_dir: Path) -> None:
    fingerprint, digest = base.fingerprint(), base.digest()
    knows(run_dir, base_fingerprint=fingerprint, base_digest=digest)
    require(run_dir, base)
    flip(base)
    assert base.fingerprint() == fingerprint
    other = base.digest()
    with pytest.raises(RefusedError, match=f"rank 0 has another base model .* {other[:12]} in place of {digest[:12]}"):
        Basis(base, run_dir, ALONE)
    with pytest.raises(ValueError, match=rf"^RUN must .* was {digest[:12]} and is {other[:12]} by its content; put"):
        require(run_dir, base)


def test_a_run_that_knows_a_fingerprint_alone_is_held_to_it(base: ModelFiles, run_dir: Path) -> None:
    """As one of commit 8cfa692, which called it base_digest."""
    knows(run_dir, base_digest=base.fingerprint())
    require(run_dir, base)
    flip(base)
    require(run_dir, base)
    assert base.folder is not None
    (base.folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 3}))
    with pytest.raises(ValueError, match="by its content; put the model back"):
        require(run_dir, base)


def test_a_large_base_is_read_for_a_run_that_is_to_be_of_it(base: ModelFiles) -> None:
    quick = {"base_fingerprint": base.fingerprint()}
    assert digests_of(base) == digests_of(base, quick) == quick
    assert digests_of(base, {"base_fingerprint": "of another", "base_digest": "b"}) == quick
    assert digests_of(base, {**quick, "base_digest": "b"}) == {**quick, "base_digest": base.digest()}
    assert digests_of(base) == {**quick, "base_digest": base.digest()}, "it is remembered from then on"
