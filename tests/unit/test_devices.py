"""Each rank gets an accelerator of its own, however a site has bound them; else it is said who shares which."""

from collections.abc import Sequence

import pytest
import torch
from dsft_launchers.verdict import CannotBeginError

from dsft.comm.devices import Seat, devices, require_taken, seat, take

ALL = tuple(f"GPU-{letter}" for letter in "hgfedcba")
LEFT, RIGHT = ALL[:4], ALL[4:]


def seats(visible: Sequence[tuple[str, ...]], hosts: int = 1) -> list[Seat]:
    """So many ranks on each host, block after block."""
    each = len(visible) // hosts
    return [Seat(rank, rank % each, f"n{1 + rank // each}", mine) for rank, mine in enumerate(visible)]


def taken(given: Sequence[Seat]) -> list[str]:
    """The UUID that each rank gets."""
    return [mine.visible[device.index] for mine, device in zip(given, devices(given), strict=True)]


@pytest.mark.parametrize(
    ("visible", "wanted"),
    [
        ([ALL] * 8, list(ALL)),
        ([(name,) for name in ALL], list(ALL)),
        ([LEFT, RIGHT] * 4, [name for pair in zip(LEFT, RIGHT, strict=True) for name in pair]),
        ([ALL, ALL[::-1]], list(ALL[:2])),
        ([ALL[:2]], [ALL[0]]),
    ],
    ids=["all see all", "each sees one", "bound by socket, dealt in turn", "in another order", "alone"],
)
def test_each_rank_has_a_gpu_of_its_own(visible: list[tuple[str, ...]], wanted: list[str]) -> None:
    assert taken(seats(visible)) == wanted


def test_hosts_do_not_meet() -> None:
    assert taken(seats([ALL[:2]] * 4, hosts=2)) == [*ALL[:2], *ALL[:2]]


def test_without_gpus_all_take_the_cpu() -> None:
    assert devices(seats([()] * 2)) == [torch.device("cpu")] * 2


@pytest.mark.parametrize(
    "visible", [[ALL[:1]] * 2, [ALL[:1], ALL[:2]]], ids=["two ranks see one", "their sets overlap"]
)
def test_two_ranks_on_one_gpu_are_refused_with_both_names(visible: list[tuple[str, ...]]) -> None:
    with pytest.raises(CannotBeginError) as refusal:
        devices(seats([*visible, *visible], hosts=2))
    assert str(refusal.value) == (
        "rank 0 and rank 1 on n1 would both use GPU GPU-h; start as many ranks on a host as it has GPUs, and bind each "
        "to one of its own (srun --gpus-per-task=1) or to none"
    )


def test_a_rank_that_sees_no_gpu_among_others_is_named() -> None:
    with pytest.raises(CannotBeginError, match=r"^rank 1 on n1 sees no GPU, rank 0 on n1 sees 8; .* nvidia-smi there$"):
        devices(seats([ALL, ()]))


def test_a_gpu_that_gives_no_context_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(device: torch.device) -> None:
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported ...")

    monkeypatch.setattr(torch.cuda, "set_device", full)
    said = take(torch.device("cuda", 1))
    assert (said, take(torch.device("cpu"))) == ("CUDA error: out of memory", None)
    given = seats([ALL[:2]] * 2)
    require_taken(given, devices(given), [None, None])
    with pytest.raises(CannotBeginError) as refusal:
        require_taken(given, devices(given), [None, said])
    assert str(refusal.value) == (
        "rank 1 on n1 cannot use GPU GPU-g: CUDA error: out of memory; nvidia-smi on n1 shows who has it (all of its "
        "memory, or the GPU alone by its compute mode)"
    )


def test_a_gpu_that_does_not_answer_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(index: int) -> None:
        raise RuntimeError("CUDA error: device is lost\nCUDA kernel errors might be asynchronously reported ...")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lost)
    monkeypatch.setenv("NCCL_HOSTID", "n1")
    with pytest.raises(CannotBeginError) as refusal:
        devices([seat(0, 0)])
    assert str(refusal.value) == (
        "rank 0 on n1: its 2 GPUs must answer, got: CUDA error: device is lost; look at nvidia-smi there"
    )
