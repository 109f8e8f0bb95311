"""A result keeps or gets its name, whatever kills the process that publishes it; what is done is looked at again."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dsft import published

KILLED = """
import sys
from pathlib import Path
from dsft import published
from tests.unit.killing import kill_at_each_call

def publish(run):
    published.publish(run / "adapter.tmp-2", run / "adapter")

calls = ("open", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir")
kill_at_each_call(Path(sys.argv[1]), Path(sys.argv[2]), calls, publish)
"""


def result(folder: Path, value: float) -> Path:
    """A result in folder, whose tensors hold value."""
    (folder / "additional").mkdir(parents=True)
    (folder / "additional" / "template.jinja").write_text(f"{value}")
    (folder / "adapter_config.json").write_text(json.dumps({"value": value}))
    save_file({"w": torch.full((64,), value)}, folder / "adapter_model.safetensors")
    published.note(folder, {"same": True})
    published.describe(folder)
    return folder


def value(run_dir: Path) -> float:
    """What the published result holds, which is whole."""
    assert list(published.damages(run_dir / "adapter", contents=True)) == []
    return float(json.loads((run_dir / "adapter" / "adapter_config.json").read_text())["value"])


def results(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.glob("adapter*"))


@pytest.mark.parametrize("earlier", [True, False], ids=["over an earlier result", "the first"])
def test_a_kill_at_any_system_call_of_publish_leaves_a_whole_result_and_two_starts_publish(
    earlier: bool, tmp_path: Path
) -> None:
    base, cases = tmp_path / "base", tmp_path / "cases"
    result(base / "adapter.tmp-2", 2.0)
    if earlier:
        result(base / "adapter", 1.0)
    cases.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(base), str(cases)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = set()
    for run_dir in sorted(cases.iterdir()):
        if (run_dir / "adapter").exists():
            seen.add(value(run_dir))
        for start in (3, 4):
            published.clear_leftovers(run_dir)
            assert results(run_dir) in (["adapter"], [] if not earlier else ["adapter"]), run_dir.name
            if earlier:
                assert value(run_dir) >= 1.0
            published.publish(result(run_dir / f"adapter.tmp-{start}", start), run_dir / "adapter")
            assert value(run_dir) == start
            assert results(run_dir) == ["adapter"], run_dir.name
    assert seen == ({1.0, 2.0} if earlier else {2.0})
    assert len(list(cases.iterdir())) > 20


def test_a_folder_that_cannot_be_removed_stays_and_no_later_start_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(path: object, *_: object, **__: object) -> None:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        for start in range(1, 4):
            published.clear_leftovers(tmp_path)
            published.publish(result(tmp_path / f"adapter.tmp-{start}", start), tmp_path / "adapter")
            assert value(tmp_path) == start
    assert len(results(tmp_path)) == 3
    published.clear_leftovers(tmp_path)
    assert results(tmp_path) == ["adapter"]


def test_what_an_older_dsft_left_under_the_old_ones_name_is_no_obstacle(tmp_path: Path) -> None:
    result(tmp_path / "adapter", 1.0)
    result(tmp_path / "adapter.tmp-old", 0.0)
    published.publish(result(tmp_path / "adapter.tmp-2", 2.0), tmp_path / "adapter")
    assert value(tmp_path) == 2.0
    published.clear_leftovers(tmp_path)
    assert results(tmp_path) == ["adapter"]


def test_a_half_removed_result_never_gets_the_name_back(tmp_path: Path) -> None:
    result(tmp_path / "adapter.old-1", 1.0)
    result(tmp_path / "adapter", 2.0)
    half = tmp_path / "adapter.tmp-3"
    result(half, 3.0)
    (half / "adapter_model.safetensors").unlink()
    shutil.rmtree(tmp_path / "adapter")
    published.clear_leftovers(tmp_path)
    assert value(tmp_path) == 1.0
    assert results(tmp_path) == ["adapter"]


def test_a_result_that_a_newer_writer_cleared_away_leaves_the_earlier_one_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result(tmp_path / "adapter", 1.0)
    place = result(tmp_path / "adapter.tmp-2", 2.0)
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path == place:
            shutil.rmtree(place)
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(FileNotFoundError):
        published.publish(place, tmp_path / "adapter")
    assert not place.exists()
    assert value(tmp_path) == 1.0


def test_the_probe_is_never_published_nor_listed(tmp_path: Path) -> None:
    place = tmp_path / "adapter.tmp-1"
    result(place, 1.0)
    (place / published.PROBE).write_bytes(b"logits")
    published.describe(place)
    published.publish(place, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / published.PROBE).exists()
    assert published.PROBE not in json.loads((tmp_path / "adapter" / published.FOUND).read_text())["files"]


def test_a_result_that_nobody_verified_says_why_and_lists_its_files(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3)}, tmp_path / "adapter_model.safetensors")
    published.describe(tmp_path)
    found = json.loads((tmp_path / published.FOUND).read_text())
    assert (found["same"], found["why"]) == (None, "checkpoint.verify_result=false")
    assert found["files"].keys() == {"adapter_model.safetensors"}


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def folder_in_its_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [remove, cut, flip, empty, folder_in_its_place], ids=lambda each: each.__name__)
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "additional/template.jinja"])
def test_a_result_that_is_not_whole_is_refused_in_one_line_with_the_way_out(name: str, damage, tmp_path: Path) -> None:
    result(tmp_path / "adapter", 1.0)
    published.check(tmp_path)
    damage(tmp_path / "adapter" / name)
    with pytest.raises(ValueError, match=name) as refused:
        published.check(tmp_path)
    assert "\n" not in str(refused.value)
    assert "resume.anew=true" in str(refused.value)
    (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"remove .*/status\.json and start again"):
        published.check(tmp_path)


def test_sizes_are_looked_at_without_reading_what_is_in_the_files(tmp_path: Path) -> None:
    result(tmp_path / "adapter", 1.0)
    flip(tmp_path / "adapter" / "adapter_model.safetensors")
    published.check(tmp_path, contents=False)
    with pytest.raises(ValueError, match="changed"):
        published.check(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"files": {"a": {}}}', '{"files": 3}', '{"files": {"a": null}}'])
def test_a_damaged_list_is_refused(text: str, tmp_path: Path) -> None:
    result(tmp_path / "adapter", 1.0)
    (tmp_path / "adapter" / published.FOUND).write_text(text)
    with pytest.raises(ValueError, match=r"verified\.json damaged"):
        published.check(tmp_path)


def test_a_result_that_is_gone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing"):
        published.check(tmp_path)


def test_of_an_older_runs_result_the_weights_must_be_there_and_as_long_as_their_headers_say(tmp_path: Path) -> None:
    place = tmp_path / "adapter"
    place.mkdir()
    save_file({"w": torch.zeros(300)}, place / "model-00001.safetensors")
    published.check(tmp_path)
    index = place / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "model-00001.safetensors", "v": "model-00002.safetensors"}}))
    with pytest.raises(ValueError, match=r"model-00002\.safetensors missing"):
        published.check(tmp_path)
    index.unlink()
    cut(place / "model-00001.safetensors")
    with pytest.raises(ValueError, match=r"model-00001\.safetensors damaged"):
        published.check(tmp_path)
