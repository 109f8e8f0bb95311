"""A pretended device: torch.cuda without a GPU, on the host's memory and its operators (sham_cuda.cpp).

What it sees: an operator whose tensors lie on two devices, a generator of another device, memory that is used after it
was freed (as FSDP2 frees gathered parameters), a thread that works on device 0 where its rank has another, and any call
that a device's tensors refuse, as numpy(). What it does not see: kernels, their numerics, their speed and their memory,
and the order of streams: every call is over when it returns.
"""

import ctypes
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cpp")
DEVICES = 2
"""As many as sham_cuda.cpp has."""

_library: Any = None
_kernels = torch.library.Library("aten", "IMPL")


def begin(cache: Path) -> None:
    """From now on this process has a device called cuda. cache: where the library is kept, built at first use (6 s).

    Once for all: what asked before whether there is one may have kept the answer. Raises RuntimeError on a machine that
    has a real one, and where g++ cannot build the library.
    """
    global _library
    if torch.version.cuda is not None or torch.cuda.is_available():
        raise RuntimeError(f"a pretended cuda needs a torch without one, got {torch.__version__}")
    _library = ctypes.CDLL(str(built(cache)))
    if _library.sham_cuda_begin() < 0:
        raise RuntimeError("this process has a pretended cuda already")
    for name, answer in _answers().items():
        setattr(torch.cuda, name, answer)
    _kernels.impl("_thnn_fused_lstm_cell", _lstm_cell, "CUDA")
    _kernels.impl("_thnn_fused_lstm_cell_backward_impl", _lstm_cell_backward, "CUDA")
    _kernels.impl("histc", _histc, "CUDA")
    torch.cuda.nvtx._nvtx = SimpleNamespace(rangePushA=lambda name: 0, rangePop=lambda: 0, markA=lambda name: None)
    torch.UntypedStorage.resize_ = _resize  # type: ignore[method-assign, assignment]


def built(cache: Path) -> Path:
    """The library of this source and this torch."""
    root = Path(torch.__file__).parent
    key = hashlib.sha256(
        SOURCE.with_suffix(".h").read_bytes() + SOURCE.read_bytes() + torch.__version__.encode()
    ).hexdigest()[:16]
    made = cache / f"sham_cuda-{key}.so"
    if made.is_file():
        return made
    cache.mkdir(parents=True, exist_ok=True)
    beside = made.with_suffix(f".{os.getpid()}")
    command = [
        os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-fPIC", "-shared", f"-I{root / 'include'}",
        f"-I{root / 'include/torch/csrc/api/include'}", str(SOURCE), "-o", str(beside), f"-L{root / 'lib'}", "-lc10",
        "-ltorch_cpu",
    ]  # fmt: skip
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        raise RuntimeError(f"{command[0]} could not build {SOURCE.name}:\n{found.stderr[-2000:]}")
    beside.replace(made)
    return made


class Stream(torch.Stream):
    """torch.cuda's, by torch's own for any accelerator."""

    def __new__(cls, device: Any = None, priority: int = 0, **ids: Any) -> Any:
        """A new one on device (the current one if None), or the one of ids."""
        return super().__new__(cls, **ids) if ids else super().__new__(cls, _device(device), priority=priority)

    @property
    def cuda_stream(self) -> int:
        """Its number."""
        return self.stream_id


class Event(torch.Event):
    """torch.cuda's, by torch's own for any accelerator."""

    def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> Any:
        """One that was not recorded yet."""
        return super().__new__(cls, "cuda", enable_timing=enable_timing)


def _device(device: Any = None) -> torch.device:
    if device is None or isinstance(device, int):
        return torch.device("cuda", _library.sham_cuda_device() if device is None else device)
    found = torch.device(device)
    return found if found.index is not None else _device()


def _set_device(device: Any) -> None:
    _library.sham_cuda_set_device(_device(device).index)


def _exchange_device(index: int) -> int:
    before: int = _library.sham_cuda_device()
    if index >= 0:
        _library.sham_cuda_set_device(index)
    return before


def _current_stream(device: Any = None) -> Stream:
    now = torch._C._accelerator_getStream(_device(device).index)
    return Stream(stream_id=now.stream_id, device_index=now.device_index, device_type=now.device_type)


def _set_stream(stream: torch.Stream) -> None:
    _set_device(stream.device)  # as torch.cuda's does
    torch._C._accelerator_setStream(stream)


def _pin(data: int, nbytes: int, flags: int) -> int:
    _library.sham_cuda_pin(ctypes.c_void_p(data), ctypes.c_size_t(nbytes))
    return 0


def _unpin(data: int) -> int:
    _library.sham_cuda_unpin(ctypes.c_void_p(data))
    return 0


def _resize(storage: torch.UntypedStorage, nbytes: int) -> torch.UntypedStorage:
    if storage.device.type != "cuda":
        return torch._C.StorageBase.resize_(storage, nbytes)  # type: ignore[no-any-return]
    over = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]
    torch.ops.sham_cuda.resize(over, nbytes)
    return storage


def _histc(value: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    """torch's histogram on CUDA, which takes integers as well."""
    return torch.histc(value.cpu().double(), bins, min, max).to(value.device, value.dtype)


def _lstm_cell(
    inputs: Tensor, hidden: Tensor, cx: Tensor, bias: Tensor | None = None, more: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's cell of an LSTM on CUDA, which has none on a CPU: gates (B, 4 D) of both, cx (B, D) -> hy, cy, what
    backward needs.
    """
    gates = inputs + hidden
    for part in (bias, more):
        gates = gates if part is None else gates + part
    into, forget, cell, out = gates.chunk(4, 1)
    into, forget, cell, out = into.sigmoid(), forget.sigmoid(), cell.tanh(), out.sigmoid()
    cy = forget * cx + into * cell
    return out * cy.tanh(), cy, torch.cat([into, forget, cell, out], 1)


def _lstm_cell_backward(
    grad_hy: Tensor | None, grad_cy: Tensor | None, cx: Tensor, cy: Tensor, workspace: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the gates (B, 4 D), of cx (B, D), of a bias (4 D,) where there is one."""
    into, forget, cell, out = workspace.chunk(4, 1)
    tanh = cy.tanh()
    through = torch.zeros_like(cy) if grad_cy is None else grad_cy
    of_out = torch.zeros_like(cy) if grad_hy is None else grad_hy * tanh
    if grad_hy is not None:
        through = through + grad_hy * out * (1 - tanh * tanh)
    parts = (
        through * cell * into * (1 - into), through * cx * forget * (1 - forget), through * into * (1 - cell * cell),
        of_out * out * (1 - out),
    )  # fmt: skip
    gates = torch.cat(parts, 1)
    return gates, through * forget, gates.sum(0) if has_bias else None


def _answers() -> dict[str, Any]:
    """Name in torch.cuda -> what it is now."""

    def properties(device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(
            name="pretended", major=9, minor=0, total_memory=2**36, multi_processor_count=132, warp_size=32,
            uuid=f"pretended-{_device(device).index}",
        )  # fmt: skip

    draws = tuple(torch.Generator(torch.device("cuda", index)) for index in range(DEVICES))
    nothing = dict.fromkeys(("_lazy_init", "init", "empty_cache", "ipc_collect"), lambda: None)
    on_device = dict.fromkeys(("synchronize", "reset_peak_memory_stats"), lambda device=None: None)
    bytes_of = dict.fromkeys(
        ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), lambda device=None: 0
    )
    return nothing | on_device | bytes_of | {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: DEVICES,
        "current_device": lambda: _library.sham_cuda_device(),
        "set_device": _set_device,
        "_exchange_device": _exchange_device,
        "_maybe_exchange_device": _exchange_device,
        "get_device_properties": properties,
        "get_device_name": lambda device=None: "pretended",
        "get_device_capability": lambda device=None: (9, 0),
        "mem_get_info": lambda device=None: (2**36, 2**36),
        "memory_stats": lambda device=None: {},
        "cudart": lambda: SimpleNamespace(cudaHostRegister=_pin, cudaHostUnregister=_unpin),
        "Stream": Stream,
        "Event": Event,
        "current_stream": _current_stream,
        "default_stream": lambda device=None: Stream(stream_id=0, device_index=_device(device).index, device_type=1),
        "set_stream": _set_stream,
        "default_generators": draws,
        "get_rng_state": lambda device="cuda": draws[_device(device).index].get_state(),
        "set_rng_state": lambda state, device="cuda": draws[_device(device).index].set_state(state),
        "manual_seed": lambda seed: draws[_device().index].manual_seed(seed) and None,
        "manual_seed_all": lambda seed: [each.manual_seed(seed) for each in draws] and None,
    }  # fmt: skip


if __name__ == "__main__":
    print(built(Path(sys.argv[1])))
