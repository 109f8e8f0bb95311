"""The cache is its owner's alone; the digest of a large file is remembered as long as it is the same file."""

import os
import stat
import time
from pathlib import Path

import pytest

from dsft.cache import remembered
from dsft.cache.root import open_folder, own_root

OTHER = 65534
"""The uid of somebody else."""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DSFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "cache"


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_a_cache_is_born_for_its_owner_alone(umask: int, cache: Path) -> None:
    before = os.umask(umask)
    try:
        open_folder(cache, "tokens")
    finally:
        os.umask(before)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
@pytest.mark.parametrize("inside", [".", "tokens"])
def test_a_cache_that_others_may_write_is_refused_until_they_are_trusted(
    mode: int, inside: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_folder(cache, "tokens")
    (cache / inside).chmod(mode)
    with pytest.raises(ValueError, match=r"DSFT_CACHE must .* you alone may write, got .* too; .*chmod go-w .*=1$"):
        open_folder(cache, "tokens")
    monkeypatch.setenv("DSFT_CACHE_SHARED", "1")
    open_folder(cache, "tokens")
    monkeypatch.setenv("DSFT_CACHE_SHARED", "yes")
    with pytest.raises(ValueError, match="DSFT_CACHE_SHARED must be 0 or 1, got yes"):
        open_folder(cache, "tokens")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a folder away")
def test_a_cache_of_another_user_is_refused_by_name(cache: Path) -> None:
    open_folder(cache, "tokens")
    os.chown(cache, OTHER, -1)
    with pytest.raises(ValueError, match=r"which (nobody|user 65534) may write too; set DSFT_CACHE, or"):
        open_folder(cache, "tokens")


def test_what_is_believed_without_a_look_is_never_shared(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_root() == cache
    monkeypatch.setenv("DSFT_CACHE_SHARED", "1")
    assert own_root() == Path.home() / ".cache" / "dsft" != cache


@pytest.fixture
def large(cache: Path, tmp_path: Path) -> Path:
    """A file that is remembered, and its digest with it."""
    file = tmp_path / "large"
    file.write_bytes(bytes(remembered.LEAST_BYTES))
    time.sleep(2 * remembered.FINE_NS / 1e9)
    assert remembered.recall(file) is None
    assert remembered.sha256(file) == remembered.recall(file)
    return file


def _write(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.write(b"x")


def _write_and_put_its_time_back(file: Path) -> None:
    before = file.stat()
    _write(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def _put_another_in_its_place(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(b"x" * remembered.LEAST_BYTES)
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.rename(file)


@pytest.mark.parametrize("change", [_write, _write_and_put_its_time_back, _put_another_in_its_place])
def test_a_file_that_is_another_one_is_read_again(change: object, large: Path) -> None:
    digest = remembered.sha256(large)
    assert (remembered.unread([large]), remembered.replaced([large])) == (0, False)
    change(large)  # type: ignore[operator]
    assert remembered.recall(large) is None
    assert (remembered.unread([large]), remembered.replaced([large])) == (remembered.LEAST_BYTES, True)
    assert remembered.sha256(large) != digest


def test_a_file_that_has_just_changed_may_change_again_within_a_tick_and_is_not_remembered(large: Path) -> None:
    _write(large)
    remembered.sha256(large)
    assert remembered.recall(large) is None


def test_a_memory_that_others_may_write_or_that_is_damaged_is_not_asked(large: Path, cache: Path) -> None:
    digest = remembered.sha256(large)
    (cache / "digests").chmod(0o777)
    assert remembered.recall(large) is None
    assert remembered.sha256(large) == digest
    (cache / "digests").chmod(0o700)
    assert remembered.recall(large) == digest
    for note in (cache / "digests").glob("*.json"):
        note.write_text("{}")
    assert remembered.recall(large) is None
    assert remembered.sha256(large) == digest
