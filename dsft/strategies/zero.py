"""ZeRO 1, 2 and 3 by DeepSpeed: Rajbhandari et al. 2020, arXiv:1910.02054. With zero_start.py and
zero_state.py the only files that know DeepSpeed.

What trains is kept in fp32 (values, gradients, moments), what is frozen in the dtype that was loaded; in bf16 the
forward pass runs under torch.autocast, as under every other strategy. DeepSpeed's own bf16 mode is not used: it rounds
what trains to bf16 before the first step. The price, at stage 3: what trains is gathered in fp32, and autocast's bf16
copies of it live until backward, unless activations are recomputed (with autocast's cache off).
"""

import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dsft.comm.world import World
from dsft.course import not_kept
from dsft.protocols import Anatomy
from dsft.strategies import zero_whole
from dsft.strategies.zero_start import Started, deepspeed, start
from dsft.strategies.zero_state import ZeroState
from dsft.strategy import OptimizerFactory, Shape, Shares, Strategy

OFFLOADS = {1: ("none", "optimizer"), 2: ("none", "optimizer"), 3: ("none", "optimizer", "parameters")}
"""Stage -> what may live in host memory; with parameters there, DeepSpeed wants the optimizer there too."""

BUCKET = 50_000_000
"""Elements that are reduced or prefetched together: 200 MB in fp32."""

LIVE = 2 * 10**9
"""Bytes that stage 3 leaves gathered: DeepSpeed's stage3_max_live_parameters, 10^9 elements, in bf16."""


@dataclass(frozen=True, kw_only=True)
class Zero(Strategy):
    """Optimizer state (stage 1), also gradients (2), also parameters (3) are divided among the ranks."""

    stage: int
    offload: str
    _run: "_Run" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse what DeepSpeed has not."""
        if self.stage not in OFFLOADS:
            raise ValueError(f"strategy.stage must be 1, 2 or 3, got {self.stage}")
        if self.offload not in OFFLOADS[self.stage]:
            raise ValueError(
                f"strategy.offload must be one of {', '.join(OFFLOADS[self.stage])} at stage {self.stage}, "
                f"got {self.offload}; use strategy=zero3 to offload parameters"
            )
        # Frozen parameters are released between forward and recomputation, where non-reentrant checkpointing may
        # compare shapes and raise CheckpointError: huggingface/transformers#47254. Small models did not show it.
        object.__setattr__(self, "reentrant_recompute", self.stage == 3)
        # Stage 3 crashes in backward where a block was called without a gradient first, as in transformers' hrm_text;
        # a block that is called several times with a gradient (Zamba's) is right.
        object.__setattr__(self, "grades_each_call", self.stage == 3)

    def data_ranks(self, world: World) -> int:
        """Number of ranks that see different examples: all."""
        return world.size

    def shares(self, size: int) -> Shares:
        """DeepSpeed keeps an fp32 master of this rank's part beside the values that forward uses."""
        part, whole = 1 / size, 1.0
        hosts = {"none": (), "optimizer": ("moments",), "parameters": ("weights", "values", "gradients", "moments")}
        weights, values = (part, part) if self.stage == 3 else (whole, whole)
        return Shares(
            weights=weights,
            values=values + part,
            gradients=whole if self.stage == 1 else part,
            moments=part,
            shown=values,
            on_host=hosts[self.offload],
        )

    def gathered(self, blocks: Sequence[int], rest: int) -> int:
        """At stage 3, as much as DeepSpeed lets live."""
        return min(rest + sum(blocks), LIVE) if self.stage == 3 else 0

    def shard(self, model: nn.Module, anatomy: Anatomy, world: World, precision: str) -> nn.Module:
        """Start DeepSpeed; nothing moves before place."""
        started = start(world)
        trainable = sum(param.numel() for param in model.parameters() if param.requires_grad)
        run = _Run(world=world, config=self._config(world, precision, trainable), started=started)
        if self.stage == 3:
            # A block is gathered as one: DeepSpeed looks through its whole trace for each module it knows, quadratic in
            # their number. Routing inside a block then cannot change the order in which ranks gather.
            deepspeed().utils.set_z3_leaf_modules_by_name(model, list(anatomy.blocks))
            for block in anatomy.blocks:
                model.get_submodule(block).register_forward_hook(_as_tuple)
            model.get_submodule(anatomy.embedding).register_forward_hook(_needs_grad)
            run.converter = deepspeed().zero.Init(config_dict_or_path=run.config)
        object.__setattr__(self, "_run", run)
        return model

    def place(self, module: nn.Module) -> None:
        """Keep this rank's part of the module's own parameters; one that is shared is divided at its first module."""
        if self._run.converter is not None:
            self._run.converter._convert_to_zero_parameters(list(module.parameters(recurse=False)))

    def prepare(
        self, model: nn.Module, groups: Sequence[dict[str, Any]], make_optimizer: OptimizerFactory
    ) -> nn.Module:
        """Build the engine around model; call forward on what is returned."""
        run = self._run
        run.named = {name: param for group in groups for name, param in group["params"]}
        run.trained = {id(param) for param in run.named.values()}
        run.make_optimizer = make_optimizer
        run.engine, *_ = deepspeed().initialize(
            model=model, optimizer=make_optimizer(groups), config=run.config, dist_init_required=False
        )
        run.rates = [group["lr"] for group in run.optimizer.param_groups]
        return run.engine  # type: ignore[no-any-return]

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients of loss; DeepSpeed averages over the ranks, we sum."""
        self._run.engine.set_gradient_accumulation_boundary(last)
        self._run.engine.backward(loss * self._run.world.size, scale_wrt_gas=False)

    def step(self, max_norm: float, lr_scale: float) -> float:
        """Clip, move, return the norm before clipping: inf if it was not finite, and then nothing moved."""
        run = self._run
        for group, rate in zip(run.optimizer.param_groups, run.rates, strict=True):
            group["lr"] = rate * lr_scale
        run.optimizer.clip_grad = max_norm if math.isfinite(max_norm) else 0.0
        run.engine.set_gradient_accumulation_boundary(True)
        run.engine.step()
        norm = float(run.engine.get_global_grad_norm())
        self._forget_unused()
        return norm

    def drop(self) -> None:
        """Forget the accumulated gradients, wherever DeepSpeed keeps them."""
        optimizer = self._run.optimizer
        if self.stage == 3:
            optimizer._pre_step()
            optimizer._partition_all_parameters()
            optimizer._overflow_clean_up(1.0)
        else:
            optimizer.zero_grad()
            optimizer._release_ipg_buffers()
            optimizer.reset_cpu_buffers()
            optimizer.averaged_gradients.clear()
            optimizer.all_grad_tensors.clear()
            optimizer.micro_step_id = -1
        self._forget_unused()

    def full(self, param: nn.Parameter) -> Tensor:
        """The whole parameter on CPU: the fp32 master of one that trains, the very bytes of one that is frozen."""
        if id(param) in self._run.trained:
            return _on_cpu(deepspeed().utils.safe_get_full_fp32_param(param))
        if self._run.converter is None:
            return _on_cpu(param)
        with deepspeed().zero.GatheredParameters([param]):
            return _on_cpu(param)

    def export_state(self) -> dict[str, Tensor]:
        """Tensors are gathered one by one; each is kept, whole, by one rank."""
        return {**self._state().export(), **self.kept}

    def state_template(self, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
        """Tensors on CPU for what this rank is to read for all."""
        return self._state().template(not_kept(shapes)) | self.keepsakes(shapes)

    def import_state(self, state: dict[str, Tensor]) -> None:
        """Each tensor goes from the rank that read it to all, and each keeps its part."""
        self._state().restore(not_kept(state))
        self.take_keepsakes(state)

    def parts(self) -> list[Tensor]:
        """Whole values, the fp32 masters being apart; at stage 3 this rank's part of them."""
        return [param.ds_tensor if self.stage == 3 else param.data for param in self._run.named.values()]  # type: ignore[attr-defined]

    values = staticmethod(zero_whole.values)
    gradients = staticmethod(zero_whole.gradients)
    add_gradients = staticmethod(zero_whole.add_gradients)
    write = staticmethod(zero_whole.write)

    def _state(self) -> ZeroState:
        run = self._run
        assert run.make_optimizer is not None
        return ZeroState(run.world, run.optimizer, run.named, run.make_optimizer)

    def close(self) -> None:
        """Free the engine, its state and, at stage 3, this rank's parts of the parameters."""
        run = self._run
        object.__delattr__(self, "_run")
        if run.engine is not None:
            run.engine.destroy()
            deepspeed().runtime.zero.parameter_offload.FWD_MODULE_STACK.clear()
            # Nodes of autograd may keep engine and model alive where gc cannot see it: empty what is large.
            for param in run.engine.module.parameters():
                vars(param).clear()
            run.optimizer.optimizer.state.clear()
            run.optimizer.optimizer.param_groups.clear()
            vars(run.optimizer).clear()
        run.started.end()
        del run
        gc.collect()

    def _forget_unused(self) -> None:
        """Zero the gradient buffers that DeepSpeed reuses, else a parameter without a gradient moves by an old one."""
        optimizer = self._run.optimizer
        flat = optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups
        if self.stage == 3:
            optimizer.grad_partitions_flat_buffer.zero_()
        for partition in flat:
            if partition.grad is not None:
                partition.grad.zero_()

    def _config(self, world: World, precision: str, trainable: int) -> dict[str, Any]:
        """Configuration of the engine. No accumulation and no clipping here: backward and step do both."""
        host = {"device": "cpu", "pin_memory": world.device.type == "cuda"}
        bucket = max(2, min(BUCKET, trainable + trainable % 2))  # DeepSpeed asserts that it is even
        zero: dict[str, Any] = {
            "stage": self.stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": BUCKET,
            # A parameter below the threshold stays whole on every rank; and DeepSpeed gathers them after each step in
            # one call, which must not mix dtypes: deepspeedai/DeepSpeed#8072.
            "stage3_param_persistence_threshold": 0,
            # true would replace torch.nn.functional.linear for the rest of the process.
            "memory_efficient_linear": False,
        }
        if self.offload != "none":
            zero["offload_optimizer"] = host
        if self.offload == "parameters":
            zero["offload_param"] = host
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero,
            # Without this the engine switches autocast off. No module is named safe: gradients are reduced in fp32.
            "torch_autocast": {
                "enabled": precision == "bf16",
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            },
        }


@dataclass
class _Run:
    """What lives from shard to close."""

    world: World
    config: dict[str, Any]
    started: Started
    converter: Any = None
    engine: Any = None
    rates: list[float] = field(default_factory=list)
    trained: set[int] = field(default_factory=set)
    named: dict[str, nn.Parameter] = field(default_factory=dict)
    make_optimizer: OptimizerFactory | None = None

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's optimizer around ours."""
        return self.engine.optimizer


def _as_tuple(block: nn.Module, args: Any, output: Any) -> Any:
    """Give a block's list as a tuple: of a list torch runs no full backward hook, by which DeepSpeed reduces the
    gradients of a block, and they would be dropped. Raises RuntimeError for an output by names, as it has none either.
    """
    if isinstance(output, Mapping):
        raise RuntimeError(f"{type(block).__name__} gives its output by names, which ZeRO-3 does not train; take fsdp")
    return tuple(output) if isinstance(output, list) else output


def _needs_grad(module: nn.Module, args: object, output: Tensor) -> Tensor:
    """The first block's input needs a gradient: without one its gradients are reduced before they are all there."""
    return output if output.requires_grad else output.requires_grad_(True)


def _on_cpu(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)
