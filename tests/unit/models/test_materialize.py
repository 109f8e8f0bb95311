import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import start_processes

from dsft.comm.world import World
from dsft.models.build import build_meta
from dsft.models.files import ModelFiles
from dsft.models.lineage import Lineage
from dsft.models.materialize import materialize
from dsft.models.values import open_values
from dsft.packed import Codec, packed_weights
from dsft.quantizers.packed import ByteLinear
from dsft.strategies.fsdp import bytes_that_do_not_learn

MEASURE = Path(__file__).with_name("measure_peak.py")


def on_ranks(
    axes: tuple[int, ...], files: ModelFiles, folder: Path, change: Callable[[nn.Module], None]
) -> list[dict[str, Tensor]]:
    """Each rank's local tensors of files' model under FSDP2 over gloo, after change(model) on meta.

    What change added is filled with 0, 1, 2, ...; "logits" is the forward of one short example.
    """
    size = math.prod(axes)
    start_processes(share, (axes, files, folder, change), nprocs=size, start_method="fork")
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def share(rank: int, axes: tuple[int, ...], files: ModelFiles, folder: Path, change: Callable) -> None:
    torch.set_num_threads(1)  # a forked process must not use its parent's thread pool
    size = math.prod(axes)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    world = World(rank=rank, size=size, local_rank=rank, device=torch.device("cpu"))
    model = build_meta(files, torch.float32)
    lineage = Lineage(model)
    change(model)
    lineage = Lineage(model) if any(packed_weights(m) for m in model.modules()) else lineage
    origins = lineage.origins(model)
    mesh = init_device_mesh("cpu", axes, mesh_dim_names=("replicate", "shard")[-len(axes) :])
    with bytes_that_do_not_learn():
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    values = open_values(files, torch.float32, 0)
    materialize(model, values, world, origins=origins, initial=counted, place=lambda module: None)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == files.config.tie_word_embeddings
    local = {name: param.to_local().detach().clone() for name, param in model.named_parameters()}
    torch.save({**local, "logits": logits(model)}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    ids = torch.arange(40)[None]
    return model(input_ids=ids, position_ids=ids, segment_lengths=(40,)).logits.clone()


def counted(name: str, param: Tensor) -> Tensor:
    return torch.arange(param.numel(), dtype=param.dtype).view(param.shape)


def assert_shards_add_up(whole: dict[str, Tensor], parts: list[dict[str, Tensor]]) -> None:
    for name, tensor in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), tensor), name


def unchanged(model: nn.Module) -> None:
    pass


@pytest.mark.parametrize(
    ("name", "init", "size"), [("tiny", "pretrained", 2), ("tiny", "random", 3), ("tiny_moe", "pretrained", 3)]
)
def test_shards_are_the_rows_of_the_whole(
    name: str, init: str, size: int, source: Callable, load: Callable, tmp_path: Path
) -> None:
    files = source(name, init=init).resolve()
    parts, whole = on_ranks((size,), files, tmp_path, unchanged), load(files)
    assert_shards_add_up(dict(whole.named_parameters()), parts)
    for part in parts:  # one thread or several may round differently
        torch.testing.assert_close(part["logits"], logits(whole), rtol=0, atol=1e-5)


def test_tied_embeddings_stay_one_tensor_when_sharded(shape: Callable, load: Callable, tmp_path: Path) -> None:
    files = shape("llama_tied")
    parts = on_ranks((2,), files, tmp_path, unchanged)
    assert_shards_add_up(dict(load(files).named_parameters()), parts)


def test_replicas_hold_the_same_shards(source: Callable, load: Callable, tmp_path: Path) -> None:
    files = source("tiny").resolve()
    parts = on_ranks((2, 2), files, tmp_path, unchanged)
    whole = dict(load(files).named_parameters())
    assert_shards_add_up(whole, parts[:2])
    assert_shards_add_up(whole, parts[2:])


class Halves(Codec):
    """A float32 weight's own bytes, in two halves."""

    def shapes(self, out: int, inside: int) -> dict[str, tuple[int, ...]]:
        return {"upper": (out // 2, inside * 4), "lower": (out // 2, inside * 4)}

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        return dict(zip(("upper", "lower"), weight.contiguous().view(torch.uint8).chunk(2), strict=True))

    def decode(self, parts: Sequence[Tensor], sides: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return torch.cat([*parts]).view(torch.float32).to(dtype)


def pack_up(model: nn.Module) -> None:
    for layer in model.model.layers:
        layer.mlp.up_proj = ByteLinear(layer.mlp.up_proj, Halves(), None)


def test_packed_linears_are_packed_whole_and_sharded_as_bytes(source: Callable, load: Callable, tmp_path: Path) -> None:
    files = source("tiny").resolve()
    parts = on_ranks((3,), files, tmp_path, pack_up)
    whole = load(files)
    upper, lower = whole.model.layers[1].mlp.up_proj.weight.detach().view(torch.uint8).chunk(2)
    name = "model.layers.1.mlp.up_proj"
    assert_shards_add_up({f"{name}.upper": upper, f"{name}.lower": lower}, parts)
    torch.testing.assert_close(parts[0]["logits"], logits(whole), rtol=0, atol=1e-5)


def add(model: nn.Module) -> None:
    model.model.layers[0].mlp.extra = nn.Parameter(torch.empty(7, 3, device="meta"))


def test_new_parameters_are_made_whole_and_then_sliced(source: Callable, tmp_path: Path) -> None:
    parts = on_ranks((3,), source("tiny").resolve(), tmp_path, add)
    assert_shards_add_up({"model.layers.0.mlp.extra": torch.arange(21.0).view(7, 3)}, parts)


def test_a_module_is_placed_once_its_own_tensors_are_whole(source: Callable) -> None:
    model = build_meta(source("tiny").resolve(), torch.float32)
    before = dict(model.named_parameters())
    placed: list[nn.Module] = []

    def place(module: nn.Module) -> None:
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        assert not any(tensor.is_meta for tensor in own)
        placed.append(module)

    values = open_values(source("tiny").resolve(), torch.float32, 0)
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    materialize(model, values, world, origins=Lineage(model).origins(model), initial=counted, place=place)
    assert placed == list(model.modules())
    assert all(param is before[name] for name, param in model.named_parameters())


def test_a_buffer_that_nobody_can_compute_is_refused(source: Callable) -> None:
    model = build_meta(source("tiny").resolve(), torch.float32)
    model.model.register_buffer("mystery", torch.empty(2, device="meta"), persistent=False)
    values = open_values(source("tiny").resolve(), torch.float32, 0)
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    with pytest.raises(RuntimeError, match="mystery"):
        materialize(
            model, values, world, origins=Lineage(model).origins(model), initial=counted, place=lambda module: None
        )


def test_what_the_class_makes_off_meta_is_put_there_and_read_like_the_rest(shape: Callable, load: Callable) -> None:
    files = shape("diffllama")  # whose lambdas are torch.normal's
    names = [name for name, tensor in build_meta(files, torch.bfloat16).state_dict().items() if not tensor.is_meta]
    assert names == []
    first, second = (load(files).state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_what_has_a_value_before_the_weights_are_read_is_refused(kind: str, source: Callable) -> None:
    files = source("tiny").resolve()
    model = build_meta(files, torch.float32)
    norm, values = model.model.norm, open_values(files, torch.float32, 0)
    if kind == "parameter":
        norm.weight = nn.Parameter(torch.ones(norm.weight.shape))
    else:
        del norm.weight
        norm.register_buffer("weight", torch.ones(model.config.hidden_size))
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"^model\.norm\.weight has a value before the weights are read"):
        materialize(
            model, values, world, origins=Lineage(model).origins(model), initial=counted, place=lambda module: None
        )


@pytest.mark.slow
def test_a_rank_never_holds_more_than_its_shard_and_two_tensors(tmp_path: Path) -> None:
    """Two processes on gloo load a 600 MB checkpoint; each peak is read from VmHWM."""
    subprocess.run([sys.executable, str(MEASURE), "write", str(tmp_path)], check=True)
    ranks = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        env = {**os.environ, **place, "MASTER_PORT": "29617"}
        command = [sys.executable, str(MEASURE), "load", str(tmp_path)]
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    for process in ranks:
        above_mib, shard_mib, largest_mib = map(float, process.communicate()[0].split()[-3:])
        assert process.returncode == 0
        assert shard_mib > 250  # a rank that loaded everything would be 250 MiB over, more than the bound allows
        assert above_mib < shard_mib + 2 * largest_mib + 100
