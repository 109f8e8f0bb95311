"""The allocator of torch for CUDA grows its segments, where a GPU can and the user has said nothing.

Batches are ragged, so that blocks of many sizes are asked for; segments of fixed size would be left in pieces.
"""

import ctypes
from collections.abc import MutableMapping

from dsft_launchers.join import count_devices

NAME, VALUE = "PYTORCH_ALLOC_CONF", "expandable_segments:True"
OLDER = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Older names, which torch 2.11 to 2.13 read too. The first of them wins over NAME."""
REGISTERED = "TORCH_NCCL_USE_TENSOR_REGISTER_ALLOCATOR_HOOK"
"""Has torch register segments with NCCL, which refuses those that grow."""
MAPS_MEMORY = 102  # CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
PART_OF_A_GPU = " MIG "
"""In the name of an instance of a GPU that is partitioned: there torch's allocator fails where it asks NVML."""


def prefer_expandable(env: MutableMapping[str, str], driver: str = "libcuda.so.1") -> None:
    """Set NAME in env unless the user has set what says it, or one of the GPUs cannot (a vGPU, a Jetson, MIG).

    To be called before the first tensor on a GPU, which is when torch reads it. driver: NVIDIA's library.
    """
    if any(name in env for name in (NAME, *OLDER)) or env.get(REGISTERED, "0") not in ("", "0", "false", "False"):
        return
    if count_devices(env) and _all_can(driver):
        env[NAME] = VALUE


def _all_can(driver: str) -> bool:
    """Whether the driver maps memory on each GPU that is visible, of which none is a part."""
    try:
        cuda = ctypes.CDLL(driver)
    except OSError:
        return False
    count, gpu, can, name = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return False
    for index in range(count.value):
        failed = (
            cuda.cuDeviceGet(ctypes.byref(gpu), index)
            or cuda.cuDeviceGetAttribute(ctypes.byref(can), MAPS_MEMORY, gpu)
            or cuda.cuDeviceGetName(name, len(name), gpu)
        )
        if failed or not can.value or PART_OF_A_GPU in name.value.decode(errors="replace"):
            return False
    return count.value > 0
