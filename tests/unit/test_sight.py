"""GPUs that are there and that torch cannot use: said in one line, where a run is started and by each rank."""

import warnings
from collections.abc import Mapping

import pytest
import torch
from dsft_launchers.verdict import CannotBeginError

from dsft.comm.devices import Seat, devices
from dsft.comm.room import Room, check_room, kept, require_room
from dsft.comm.sight import unusable, without_cuda
from dsft.comm.world import World, join

DRIVER = (
    "The NVIDIA driver on your system is too old (found version 12080). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx Alternatively, go to: "
    "https://pytorch.org to install a PyTorch version that has been compiled with your version of the CUDA driver."
)
"""What torch 2.11.0+cu130 says where libcuda.so.1 has version 12.8."""
NO_CUDA = "it was built without CUDA; install a build for CUDA"
OLD = (
    "The NVIDIA driver on your system is too old (found version 12080); update the driver, or install a torch for an "
    "older CUDA than 13.0"
)
CONTAINER = "look at nvidia-smi (a container needs its option for GPUs, as apptainer exec --nv)"
cpu_build = pytest.mark.skipif(not without_cuda(), reason="this torch is a build for CUDA")


@cpu_build
@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({"CUDA_VISIBLE_DEVICES": "1"}, "the GPU of CUDA_VISIBLE_DEVICES=1"),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "4"}, "the 2 GPUs of CUDA_VISIBLE_DEVICES=0,1"),
        ({"SLURM_GPUS_ON_NODE": "4"}, "the 4 GPUs of the SLURM job"),
    ],
)
def test_a_torch_without_cuda_is_named_where_gpus_are_promised(env: Mapping[str, str], place: str) -> None:
    assert unusable(env) == (
        f"{place} must be usable by torch {torch.__version__}, got: {NO_CUDA}, or take launcher.gpus=none to train on "
        "the CPU"
    )


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles"])
def test_who_hides_the_gpus_is_asked_nothing(visible: str) -> None:
    assert unusable({"CUDA_VISIBLE_DEVICES": visible, "SLURM_GPUS_ON_NODE": "4"}) is None


@cpu_build
@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (DRIVER, OLD),
        ("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver.",
         f"Found no NVIDIA driver on your system; {CONTAINER}"),
        ("No CUDA GPUs are available", f"No CUDA GPUs are available; {CONTAINER}"),
    ],
)  # fmt: skip
def test_what_torch_says_of_the_driver_is_one_line(said: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError(said)

    def is_available() -> bool:
        warnings.warn(f"CUDA initialization: {said}", stacklevel=1)
        return False

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    why = unusable({"CUDA_VISIBLE_DEVICES": "0"})
    assert why is not None
    assert f"got: {expected}, or take launcher.gpus=none" in why


@cpu_build
def test_a_rank_that_cannot_use_its_gpus_does_not_begin_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("NCCL_HOSTID", "n1")
    with pytest.raises(CannotBeginError, match=rf"^rank 0 on n1: the GPU of CUDA_VISIBLE_DEVICES=0 .* {NO_CUDA}"):
        join()


def test_the_first_rank_that_cannot_use_its_gpus_is_named() -> None:
    seats = [Seat(0, 0, "n1", ("GPU-a",)), Seat(1, 0, "n2", (), "no driver"), Seat(2, 1, "n2", (), "no driver")]
    with pytest.raises(CannotBeginError, match=r"^rank 1 on n2 \(and 1 more\): no driver$"):
        devices(seats)


MEMORY = {"weights": 10 * 2**30, "values": 2**30, "gradients": 2**30, "moments": 2 * 2**30, "activations": None}


def test_what_other_programs_leave_of_a_gpu_must_hold_what_the_run_keeps() -> None:
    free = Room(rank=0, host="n1", gpu="GPU 0 (H100)", free=13 * 2**30, total=80 * 2**30)
    taken = Room(rank=3, host="n2", gpu="GPU 1 (H100)", free=2**30, total=80 * 2**30)
    small = Room(rank=1, host="n1", gpu="GPU 1 (T4)", free=11 * 2**30, total=12 * 2**30)
    needed = kept(MEMORY, paged=False)
    assert (needed, kept(MEMORY, paged=True)) == (13 * 2**30, 11 * 2**30)
    check_room([free, free], needed)
    with pytest.raises(CannotBeginError) as refusal:
        check_room([free, taken], needed)
    assert str(refusal.value) == (
        "rank 3 on n2: GPU 1 (H100) must have 13.0 GiB free for weights, trained values and moments, got 1.0 of 80.0 "
        "GiB: other programs have the rest; nvidia-smi on n2 lists them: end them, or hide this GPU "
        "(CUDA_VISIBLE_DEVICES)"
    )
    with pytest.raises(CannotBeginError, match=r"got 11\.0 of 12\.0 GiB; take more or larger GPUs"):
        check_room([free, small], needed)


def test_gpus_that_were_asked_for_are_not_replaced_by_the_cpu() -> None:
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    for wanted in ("auto", "none"):
        require_room(world, {}, wanted=wanted, paged=False)
    with pytest.raises(CannotBeginError, match=r"^launcher\.gpus=h100 asks for a GPU for each process, and rank 0 on "):
        require_room(world, {}, wanted="h100", paged=False)
