"""A result is read back by a real process: it is the same, or known beforehand not to be comparable, or refused."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dsft_launchers.verdict import DivergedError

from dsft import folder, published, verify
from dsft.basis import digests_of
from dsft.data.open import Dataset
from dsft.engine.assemble import Session
from dsft.engine.result import write_result
from tests.contract.sessions import composed_of, session_of, train
from tests.warm import fresh

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PLAN = {"parameters": {"total": 525_184, "trainable": 89_088}, "memory": {"total": 10_000_000}}


class Told:
    """A watch that keeps the events, and a phase that keeps its names."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.phases: list[tuple[str, float]] = []

    def event(self, event: str, step: int, details: Any) -> None:
        self.events.append(f"{event} {details.get('reason', '')}".strip())

    @contextmanager
    def phase(self, name: str, seconds: float) -> Iterator[None]:
        self.phases.append((name, seconds))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Session, Dataset, Path]:
    """A session after a step, its data, and the folder of its run."""
    run_dir = tmp_path_factory.mktemp("run")
    session, data = session_of("lora", "optim.lr=1e-2")
    train(session, data, 1)
    folder.create(run_dir, composed_of("lora"), PLAN, {**digests_of(session.files), **data.digests})
    return session, data, run_dir


def proved(
    trained: tuple[Session, Dataset, Path], place: Path, damage: Callable[[Path], object], told: Told
) -> dict[str, Any]:
    """Write a result to place, damage it, have it proved, and describe it; what is known of it then."""
    session, data, run_dir = trained
    why_not = verify.foreseen(session, run_dir, told)  # type: ignore[arg-type]
    digest = write_result(session, place)
    damage(place)
    watch: Any = told
    verify.prove(session, data, run_dir, place, digest, watch, phase=told.phase, why_not=why_not)
    published.describe(place)
    found: dict[str, Any] = json.loads((place / published.FOUND).read_text())
    return found


def _nothing(place: Path) -> None:
    pass


def _torn(place: Path) -> None:
    os.truncate(place / WEIGHTS, 20_000)


def _removed(place: Path) -> None:
    (place / WEIGHTS).unlink()


def _without_a_description(place: Path) -> None:
    os.truncate(place / CONFIG, 0)


def _one_flipped_bit(place: Path) -> None:
    content = bytearray((place / WEIGHTS).read_bytes())
    content[-7] ^= 4
    (place / WEIGHTS).write_bytes(content)


def test_what_is_the_model_that_was_trained_is_the_same(trained, tmp_path: Path) -> None:
    told = Told()
    found = proved(trained, tmp_path / "adapter.tmp-1", _nothing, told)
    assert (found["same"], found["why"], found["on"]) == (True, None, "cpu")
    assert found["files"].keys() >= {WEIGHTS, CONFIG}
    assert told.events == ["verified"]
    assert told.phases == [("verification", 45.0 + 4 * 525_184 / 20e6 + 2 * 525_184 * 64 / 5e9)] * 2


DAMAGES: dict[Callable[[Path], None], str] = {
    _torn: r"the process that read it back ended with 1: \S*SafetensorError: .*",
    _without_a_description: r"the process that read it back ended with 1: \S*JSONDecodeError: .*",
    _one_flipped_bit: "it is not the model that was trained: other tensors: digest .*",
    _removed: "it is not the model that was trained: other tensors: digest .* of 0, .*",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda each: each.__name__)
def test_what_could_not_be_shown_to_be_right_is_refused(damage, trained, tmp_path: Path) -> None:
    told, place = Told(), tmp_path / "adapter.tmp-1"
    pattern = f"{re.escape(str(place))} is not published .*{DAMAGES[damage]}; start .*checkpoint.verify_result=false"
    with pytest.raises(RuntimeError, match=pattern) as refused:
        proved(trained, place, damage, told)
    assert "\n" not in str(refused.value)
    assert told.events == []
    assert not (place / published.PROBE).exists()


KILLED = """
import os, sys
if "dsft.verify" in sys.orig_argv and len(os.listdir({place!r})) < {times}:
    open(os.path.join({place!r}, str(os.getpid())), "w").close()
    os.kill(os.getpid(), {signal})
"""


@pytest.fixture
def killing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], Path]]:
    """Have a signal sent to the next readers, so many times; the folder in which each leaves a file."""

    def plant(times: int, signal: int) -> Path:
        readers, hook = tmp_path / "readers", tmp_path / "hook"
        readers.mkdir()
        hook.mkdir()
        (hook / "sitecustomize.py").write_text(KILLED.format(place=str(readers), times=times, signal=signal))
        monkeypatch.setenv("PYTHONPATH", f"{hook}:{os.environ.get('PYTHONPATH', '')}".rstrip(":"))
        return readers

    with fresh():  # the hook is read when an interpreter begins
        yield plant


def test_a_reader_that_was_killed_is_started_once_more(trained, killing, tmp_path: Path) -> None:
    told, readers = Told(), killing(1, 9)
    assert proved(trained, tmp_path / "adapter.tmp-1", _nothing, told)["same"] is True
    assert len(list(readers.iterdir())) == 1
    assert len(told.phases) == 3


def test_a_reader_that_was_killed_twice_shows_nothing(trained, killing, tmp_path: Path) -> None:
    told, readers = Told(), killing(3, 9)
    with pytest.raises(RuntimeError, match="was killed by SIGKILL 2 times"):
        proved(trained, tmp_path / "adapter.tmp-1", _nothing, told)
    assert len(list(readers.iterdir())) == 2
    assert not (tmp_path / "adapter.tmp-1" / published.PROBE).exists()


def test_a_reader_that_stands_still_is_ended_in_time(
    trained, killing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, readers = Told(), killing(1, 19)
    monkeypatch.setattr(verify, "START_S", 2.0)
    with pytest.raises(RuntimeError, match="was not done after 2 s"):
        proved(trained, tmp_path / "adapter.tmp-1", _nothing, told)
    (reader,) = readers.iterdir()
    assert not Path(f"/proc/{reader.name}").exists()


def test_a_random_base_is_known_beforehand_and_the_tensors_are_compared_all_the_same(trained, tmp_path: Path) -> None:
    session, data, run_dir = trained
    random = replace(session, files=replace(session.files, init="random"))
    told = Told()
    found = proved((random, data, run_dir), tmp_path / "adapter.tmp-1", _nothing, told)
    assert found["same"] is None
    assert found["why"] == "the base is random, so there is nothing to load it from"
    assert found["files"].keys() >= {WEIGHTS, CONFIG}
    assert told.events == [f"unverifiable {found['why']}", f"unverified {found['why']}"], "said before the first step"


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda each: each.__name__)
def test_known_beforehand_is_no_excuse_for_files_that_are_not_what_was_written(damage, trained, tmp_path: Path) -> None:
    session, data, run_dir = trained
    random, told = replace(session, files=replace(session.files, init="random")), Told()
    with pytest.raises(RuntimeError, match="is not published as the run's result: its files") as refused:
        proved((random, data, run_dir), tmp_path / "adapter.tmp-1", damage, told)
    assert "\n" not in str(refused.value)
    assert told.events == ["unverifiable the base is random, so there is nothing to load it from"]


def test_a_base_that_is_too_large_is_known_before_the_first_step_and_no_excuse_after_it(
    trained: tuple[Session, Dataset, Path], tmp_path: Path
) -> None:
    session, data, run_dir = trained
    large = tmp_path / "run"
    shutil.copytree(run_dir, large)
    (large / "plan.json").write_text(json.dumps({**PLAN, "parameters": {"total": 10**15}}))
    told, place = Told(), tmp_path / "adapter.tmp-1"
    watch: Any = told
    found = proved((session, data, large), place, _nothing, told)
    assert found["same"] is None
    assert re.fullmatch(r"the base takes \S+ GiB, and this machine has \S+, of which the run takes 0\.0", found["why"])
    assert told.events == [f"unverifiable {found['why']}", f"unverified {found['why']}"]
    with pytest.raises(RuntimeError, match=r"is not published .* takes \S+ GiB, \S+ are free, and before the"):
        verify.prove(session, data, large, place, "", watch, why_not=None)


def test_the_reader_takes_the_gpu_of_rank_0_where_the_base_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    needed, asked = 16 * 2**30, list[torch.device]()

    def free(gib: int) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda of: (asked.append(of), (gib * 2**30, 80 * 2**30))[1])

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    free(30)
    assert verify._card(torch.device("cpu"), needed) == ""
    assert asked == []
    assert verify._card(torch.device("cuda", 2), needed) == "2"
    assert asked == [torch.device("cuda", 2)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-aaaa,MIG-b")
    assert verify._card(torch.device("cuda", 1), needed) == "GPU-aaaa"
    free(20)
    assert verify._card(torch.device("cuda", 1), needed) == ""


ONLY_ON_A_CPU = """
import os, sys
if "dsft.verify" in sys.orig_argv and os.environ["CUDA_VISIBLE_DEVICES"]:
    os._exit(1)
"""


def test_a_reader_that_fails_on_a_gpu_is_followed_by_one_on_the_cpu(
    trained: tuple[Session, Dataset, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(ONLY_ON_A_CPU)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}".rstrip(":"))
    monkeypatch.setattr(verify, "_card", lambda device, needed: "7")
    told = Told()
    with fresh():
        assert proved(trained, tmp_path / "adapter.tmp-1", _nothing, told)["same"] is True
    assert [name for name, _ in told.phases] == ["verification"] * 3
    assert told.events == ["verified"]


@pytest.mark.parametrize(
    ("value", "why"), [(1e10, "all its logits are equal"), (math.nan, "its logits are not finite")]
)
def test_a_model_that_says_nothing_has_diverged(value: float, why: str, tmp_path: Path) -> None:
    session, data = session_of("lora", "optim.lr=1e-2")
    run_dir = tmp_path / "run"
    folder.create(run_dir, composed_of("lora"), PLAN, {**digests_of(session.files), **data.digests})
    with torch.no_grad():
        for name, param in session.model.named_parameters():
            if "down_proj.lora_" in name:  # 1e10: the square of a hidden state overflows, and the norm makes it 0
                param.fill_(value)
    with pytest.raises(DivergedError, match=f"after the last step, {why}; lower optim"):
        proved((session, data, run_dir), tmp_path / "adapter.tmp-1", _nothing, Told())
