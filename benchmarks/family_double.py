"""Cells of the table of families in float64, which tells rounding that grows from a fault.

Where a model makes much of the last bit of its numbers (a recurrence, many layers), dsft and plain transformers part in
fp32 although both compute the same: then they agree in float64 to some 1e-13. Classes of transformers cast to fp32 by
name, so float64 takes that name here, in a process of its own, before any of them is imported.
"""

import sys

import safetensors.torch  # keeps the names of both
import torch
import torch._inductor.kernel.mm_grouped  # names the product that is taken away below; DeepSpeed imports it
import torch.distributed.fsdp

PROGRAM = "benchmarks.family_double"
ELSEWHERE = "elsewhere"
"""The argument with which the program is the process without dsft."""


def widen() -> None:
    """Let float32 mean float64 in what is imported and made from here on."""
    torch.float32 = torch.float = torch.float64  # type: ignore[misc]
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign,assignment]
    torch.set_default_dtype(torch.float64)
    for holder, name in ((torch.nn.functional, "grouped_mm"), (torch, "_grouped_mm")):
        if hasattr(holder, name):
            delattr(holder, name)  # knows no float64; transformers has a loop for a torch without it


def main() -> None:
    """family_double.py JOB, or family_double.py elsewhere."""
    assert safetensors.torch.load_file
    widen()
    if sys.argv[1:] == [ELSEWHERE]:
        from benchmarks.family_elsewhere import main as answer

        answer()
        return
    from benchmarks.family_cells import main as run
    from benchmarks.family_plain import Plain

    run(Plain(PROGRAM, ELSEWHERE))


if __name__ == "__main__":
    main()
