"""python -m benchmarks.rounded MODULE JOB: a peer whose bf16 products are made as the hardware makes them.

Sums in fp32 and one rounding to bf16. A processor without bf16 instructions does so too, 10 to 200 times slower than it
multiplies in fp32, which is what is done here.
"""

import runpy
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ops = torch.ops.aten
PRODUCTS = (
    ops.mm.default, ops.bmm.default, ops.addmm.default, ops.baddbmm.default,
    ops._scaled_dot_product_flash_attention_for_cpu.default,
    ops._scaled_dot_product_flash_attention_for_cpu_backward.default,
)  # fmt: skip
IN_PLACE = {ops.addmm_.default: ops.addmm.default, ops.baddbmm_.default: ops.baddbmm.default}


class Rounded(TorchDispatchMode):
    """Within: products of bf16 tensors in fp32, rounded once."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What func gives."""
        kwargs = kwargs or {}
        narrow = any(isinstance(arg, Tensor) and arg.dtype is torch.bfloat16 for arg in args)
        if narrow and func in IN_PLACE:
            return args[0].copy_(IN_PLACE[func](*map(_wide, args), **kwargs))
        if narrow and func is ops.mm.out:
            return kwargs["out"].copy_(ops.mm.default(*map(_wide, args)))
        if narrow and func in PRODUCTS:
            found = func(*map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})
            if isinstance(found, Tensor):
                return found.to(torch.bfloat16)
            logsumexp = func is ops._scaled_dot_product_flash_attention_for_cpu.default
            return tuple(one if logsumexp and index == 1 else one.to(torch.bfloat16) for index, one in enumerate(found))
        return func(*args, **kwargs)


def _wide(arg: Any) -> Any:
    return arg.float() if isinstance(arg, Tensor) and arg.dtype is torch.bfloat16 else arg


if __name__ == "__main__":
    module = sys.argv.pop(1)
    with Rounded():
        runpy.run_module(module, run_name="__main__", alter_sys=True)
