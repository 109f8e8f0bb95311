"""train.deterministic: whether a step adds its numbers in the same order each time, on this device and these ranks.

CUDA has kernels that add with atomics, in any order: the backward pass of attention and of indexing among them. torch
has others for most of them, a little slower. NCCL sums in the same order as long as nodes and their links are the same.
"""

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from dsft_launchers.verdict import RefusedError

Wanted = bool | Literal["auto"]
"""True: an operator without a deterministic kernel ends the run; auto: it is named, and runs; False: the fastest."""

WITHOUT = re.compile(r"^(\S+) does not have a deterministic implementation")
"""How torch's warning and error begin of an operator that has no such kernel."""
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""Variable that cuBLAS needs for the same result each time; torch refuses its products without it."""


def choose(wanted: Wanted) -> None:
    """Let torch take deterministic kernels in this process, or not. Called before the first product on a GPU."""
    if wanted is not False:
        os.environ.setdefault(WORKSPACE, ":4096:8")
        # A safeguard of torch's for memory that is read before it is written: it would fill each new tensor.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(wanted is not False, warn_only=wanted == "auto")


@contextmanager
def told(tell: Callable[[str], None]) -> Iterator[None]:
    """Within it tell gets the name of each operator that has no deterministic kernel, where it runs nevertheless.

    Raises RefusedError where train.deterministic=true and there is one.
    """
    show, names = warnings.showwarning, set[str]()

    def note(message: Warning | str, *args: Any, **more: Any) -> None:
        if (found := WITHOUT.match(str(message))) is None:
            show(message, *args, **more)
        elif found[1] not in names:
            names.add(found[1])
            tell(found[1])

    warnings.showwarning = note
    try:
        yield
    except RuntimeError as error:
        if (found := WITHOUT.match(str(error))) is None:
            raise
        raise RefusedError(
            f"train.deterministic=true, and {found[1]} has no kernel that adds in the same order each time; set "
            "train.deterministic=auto, which runs and names it"
        ) from error
    finally:
        warnings.showwarning = show
