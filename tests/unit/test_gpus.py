"""What launcher.gpus means, here and on SLURM's nodes, and how sbatch is asked for them."""

from pathlib import Path

import pytest
from dsft_launchers import gpus, submit
from dsft_launchers.gpus import check, fewest, kinds, of_partition, of_run
from dsft_launchers.join import count_devices

from dsft import dispatch
from dsft.compose import compose

GRES = ["gpu:h100:8(S:0-1)", "gpu:a100:4,gpu:h100:2", "(null)"]


@pytest.mark.parametrize(
    ("gres", "wanted", "expected"),
    [(GRES, "auto", 0), (GRES[:2], "auto", 6), (GRES, "any", 6), (GRES, "h100", 2), (GRES, "a100", 4), (GRES, "t4", 0),
     ([], "any", 0), (["gpu:3090:4"], "3090", 4), (["gpu:4"], "h100", 0)],
)  # fmt: skip
def test_gpus_of_the_node_that_has_fewest(gres: list[str], wanted: str, expected: int) -> None:
    assert fewest(gres, wanted) == expected


def test_kinds_are_slurms_names() -> None:
    assert [kinds(each) for each in (*GRES, "gpu:4")] == [["h100"], ["a100", "h100"], [], []]


def test_partitions_are_looked_up_by_name_several_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["cpu|cpu*|4|(null)|5000|1:00", "big|big|2|gpu:h100:8|5000|1:00", "mix|mix|2|gpu:a100:4|5000|1:00",
             "mix|mix|1|(null)|5000|1:00"]  # fmt: skip
    (tmp_path / "sinfo").write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    asked = [(None, "auto"), ("big", "auto"), ("big,mix", "auto"), ("big,mix", "any"), ("big,mix", "h100")]
    assert [of_partition(*each) for each in asked] == [0, 8, 0, 4, 8]


@pytest.mark.parametrize(
    ("asked", "kind", "refusal"),
    [
        (4, "t4", "launcher.gpus must be one of auto, none, any, a100, h100 in partition big, got t4"),
        (9, None, "launcher.devices must be at most 8, the GPUs of a node of partition big, got 9"),
        (5, "a100", "launcher.devices must be at most 4, the GPUs of a node of partition big, got 5"),
    ],
)
def test_gpus_that_no_node_has_are_refused(asked: int, kind: str | None, refusal: str) -> None:
    with pytest.raises(ValueError, match=refusal):
        check(asked, kind, "big", GRES)
    check(8, None, "big", GRES)
    check(8, "h100", "big", GRES)
    with pytest.raises(ValueError, match=r"launcher\.partition must have GPUs for launcher\.gpus=any, got big"):
        check(1, None, "big", ["(null)"])


@pytest.mark.parametrize(("wanted", "visible", "expected"), [("auto", "0,1", 2), ("none", "0,1", 0), ("any", "3", 1)])
def test_gpus_of_this_machine(wanted: str, visible: str, expected: int) -> None:
    assert of_run(wanted, "local", None, "auto", {"CUDA_VISIBLE_DEVICES": visible}, elsewhere=False) == expected


@pytest.mark.parametrize(
    ("wanted", "refusal"),
    [("any", "launcher.gpus=any needs a GPU of this machine, got none: CUDA_VISIBLE_DEVICES='' hides them; take none"),
     ("h100", "launcher.gpus=h100 is a kind that SLURM is asked for, and this run is no SLURM job .local.; take any")],
)  # fmt: skip
def test_gpus_that_this_machine_has_not_are_refused(wanted: str, refusal: str) -> None:
    with pytest.raises(ValueError, match=refusal):
        of_run(wanted, "local", None, "auto", {"CUDA_VISIBLE_DEVICES": ""}, elsewhere=False)


@pytest.mark.parametrize(("visible", "count"), [("0,-1,1", 1), ("NoDevFiles", 0), ("MIG-a/b, GPU-c", 2), ("x,0", 0)])
def test_cuda_looks_no_further_than_the_first_name_that_is_none(visible: str, count: int) -> None:
    assert count_devices({"CUDA_VISIBLE_DEVICES": visible}) == count


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], []),  # no cluster answers here, so none is known to have GPUs
        (["launcher.gpus=any"], ["--gpus-per-node=4"]),
        (["launcher.gpus=h100"], ["--gpus-per-node=h100:4"]),
        (["launcher.gpus=h100", "launcher.bind_gpus=true"], ["--gpus-per-task=h100:1"]),
        (["launcher.gpus=none"], []),
        (["+launcher.extra.gres='gpu:h100:4'"], ["--gres=gpu:h100:4"]),
    ],
    ids=str,
)
def test_a_batch_script_asks_for_one_gpu_for_each_process(
    words: list[str], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    composed = compose(["model=tiny", "launcher=slurm", "launcher.dry_run=true", "launcher.devices=4", *words])
    text = submit.script(dispatch.request(composed, None, tmp_path), ["true"], tmp_path / "slurm")
    assert [word for word in text.split() if "gpu" in word] == expected


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (["launcher.gpus=4"], "launcher.gpus must be auto, none, any, or a kind of GPU .* got 4; launcher.devices is"),
        (["launcher.gpus=true"], "launcher.gpus must be"),
        (["launcher.gpus='h100:4'"], "launcher.gpus must be auto, none, any, or a kind of GPU .* got 'h100:4'"),
        (["launcher.gpus=h100", "+launcher.extra.gpus=4"], "launcher.extra.gpus asks for GPUs .* launcher.gpus=h100"),
        (["launcher.gpus=none", "launcher.bind_gpus=true"], "launcher.bind_gpus=true gives each process a GPU"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused(words: list[str], refusal: str) -> None:
    with pytest.raises(ValueError, match=refusal):
        compose(["model=tiny", "launcher=slurm", "launcher.dry_run=true", *words])


def test_a_plan_for_gpus_is_none_on_cpus() -> None:
    with pytest.raises(ValueError, match=r"^launcher\.gpus=none computes on CPUs, and --gpu plans for GPUs; leave one"):
        compose(["model=tiny", "launcher.gpus=none"], planning=True, gpus=True)


def test_what_asks_sbatch_for_gpus() -> None:
    assert gpus.asks_for_gpus("gpus-per-node", 4)
    assert gpus.asks_for_gpus("gres", "tmp:1,gpu:2")
    assert not gpus.asks_for_gpus("gres", "tmp:1")
