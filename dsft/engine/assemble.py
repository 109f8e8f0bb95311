"""The order of construction: meta model -> quantize -> method -> recompute -> shard -> read weights -> optimizer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dsft.comm.world import World
from dsft.config import Run
from dsft.data.tokens import TokenSet
from dsft.engine.apart import require_apart
from dsft.engine.compiling import Compiler, compiler_for
from dsft.engine.determinism import choose
from dsft.engine.dropout import Draws, keyed, silence
from dsft.engine.guided import Guided, guided
from dsft.engine.masks import stream
from dsft.engine.optimizers import factory
from dsft.engine.precision import DTYPES, cast
from dsft.engine.recompute import recompute
from dsft.engine.roles import Roles
from dsft.models import calling, scoring, sequence
from dsft.models.anatomy import dissect
from dsft.models.build import build_meta
from dsft.models.family import PACKS, Family
from dsft.models.files import ModelFiles
from dsft.models.heads import head_tensors
from dsft.models.lineage import Lineage
from dsft.models.materialize import materialize
from dsft.models.scorer import Scorer
from dsft.models.values import Values, open_values
from dsft.protocols import Anatomy, PackedLinear


@dataclass(frozen=True)
class Skeleton:
    """A model on meta with its method in it.

    origins: tensor name -> its name in the base, see Lineage; stored: what an earlier adapter gives, and the base not;
    family: how the model is computed; draws: by what its dropout is drawn; silenced: probabilities to drop that
    were set to 0, as the objective compares forward passes.
    """

    model: nn.Module
    anatomy: Anatomy
    origins: dict[str, str]
    stored: Mapping[str, Tensor]
    family: Family
    draws: Draws
    silenced: tuple[str, ...]


@dataclass(frozen=True)
class Session:
    """All that a step needs. model: the transformers model; module: what to call forward on."""

    run: Run
    files: ModelFiles
    world: World
    tokenizer: Any
    model: Any
    module: nn.Module
    anatomy: Anatomy
    compiler: Compiler | None
    guided: Guided | None
    draws: Draws
    family: Family
    roles: Roles

    @property
    def scorer(self) -> Scorer:
        """Calls the model on a batch."""
        return Scorer(self.module, packs=self.family.packs)

    @property
    def tokens_at_once(self) -> int:
        """Tokens of a micro-batch, at most; 1 where each example is a micro-batch of its own."""
        return self.run.train.micro_batch_tokens if self.family.packs else 1

    def lengths(self, tokens: TokenSet, rows: Sequence[int]) -> list[int]:
        """Tokens of each example, with those that the method puts before each of its segments."""
        more = self.run.method.positions
        return [int(tokens.lengths[row] + more * tokens.members[row]) for row in rows]


def skeleton(run: Run, files: ModelFiles, family: Family = PACKS) -> Skeleton:
    """Build the model on meta, pack its frozen linears, attach the method; what learns is fp32. Reads no weights.

    family: the verdict on the model, see models/family.py. Raises ValueError for what it does not allow.
    """
    model: nn.Module = build_meta(files, DTYPES[run.train.precision], family.attention)
    anatomy = dissect(model)
    head = model.get_submodule(anatomy.head)
    model = run.quantization.convert(model, anatomy)
    lineage = Lineage(model)
    model = run.method.attach(model, anatomy)
    stored = run.method.stored(model)
    origins = {name: origin for name, origin in lineage.origins(model).items() if name not in stored}
    _check_family(run, model, family)
    _check_blocks(run, model, anatomy)
    if files.labels:
        _check_head(model, anatomy, head)
        sequence.install(model, anatomy.head, family)
        model.get_submodule(anatomy.head).requires_grad_(True)
    else:
        calling.fit(model, family)
        scoring.install(model, model.get_submodule(anatomy.head))
    for param in model.parameters():
        if param.requires_grad:
            param.data = param.data.float()
    silenced = tuple(silence(model)) if run.objective.compares else ()
    draws = keyed(model, anatomy, run.train.seed, run.method.positions)
    if draws.functional and run.train.compile is True:
        raise ValueError(
            f"train.compile must be false or auto where a model may drop without a module ({draws.functional} of its "
            "configuration), got true; set train.compile=false"
        )
    return Skeleton(model, anatomy, origins, stored, family, draws, silenced)


def _check_family(run: Run, model: nn.Module, family: Family) -> None:
    """Refuse what needs more of a model than it can give."""
    name = type(model).__name__
    if not family.recomputes and run.train.gradient_checkpointing != "none":
        raise ValueError(
            f"train.gradient_checkpointing must be none for {name}, whose blocks do not give the same when they are "
            f"computed again, got {run.train.gradient_checkpointing}; take train.gradient_checkpointing=none"
        )
    if not family.whole and run.method.whole:
        raise ValueError(
            f"method must leave the base as it is for {name}, which transformers would not load again as it was "
            "trained; take a method that trains an adapter"
        )
    if not family.ragged and run.train.compile is True:
        raise ValueError(f"train.compile must be false for {name}, which computes attention in its own way, got true")


def _check_head(model: nn.Module, anatomy: Anatomy, head: nn.Module) -> None:
    """Refuse a method that has put something in the place of a head that learns itself."""
    if model.get_submodule(anatomy.head) is not head:
        raise ValueError(
            f"method.target_modules must not name {anatomy.head}, the head of this objective, which learns itself; "
            "leave it out"
        )


def _check_blocks(run: Run, model: nn.Module, anatomy: Anatomy) -> None:
    """Refuse a strategy that shards each block by itself where blocks share parameters, as Zamba's do."""
    owner: dict[nn.Parameter, str] = {}
    for block in anatomy.blocks if run.strategy.shards_blocks else ():
        for param in model.get_submodule(block).parameters():
            if owner.setdefault(param, block) != block:
                raise ValueError(
                    f"strategy must leave blocks whole for {type(model).__name__}, as {owner[param]} and {block} share "
                    "parameters, got one that shards each by itself; take strategy=ddp, zero1 or zero2"
                )


def assemble(run: Run, files: ModelFiles, world: World, total: int = 0, *, family: Family = PACKS) -> Session:
    """Build this process's part of a run of total steps. Collective: every rank of world calls it with the same run.

    family: the verdict on the model.
    """
    choose(run.train.deterministic)
    bones, tokenizer = skeleton(run, files, family), files.tokenizer()
    model, anatomy = bones.model, bones.anatomy
    run.method.tokenize(model, tokenizer)
    plain = family.ragged and not bones.draws.functional
    compiler = compiler_for(run.train, total, model, anatomy) if plain else None
    course = run.method.course(model, total or run.train.steps or 0, world.device)
    reentrant = run.strategy.reentrant_recompute
    recompute(model, anatomy, run.train.gradient_checkpointing, reentrant=reentrant, run=compiler, draws=bones.draws)
    first = _first_packed(model)
    model = run.strategy.shard(model, anatomy, world, run.train.precision)
    _fill(run, bones, model, files, world, first=first)
    module = run.strategy.prepare(model, _groups(run, model), factory(run.optim))
    roles = Roles(run, module, Scorer(module, packs=family.packs), world)
    roles.keep()
    session = Session(
        run=run,
        files=files,
        world=world,
        tokenizer=tokenizer,
        model=model,
        module=module,
        anatomy=anatomy,
        compiler=compiler,
        guided=guided(course, run.strategy, model),
        family=family,
        draws=bones.draws,
        roles=roles,
    )
    require_apart(session, autocast(session))
    return session


def _fill(run: Run, bones: Skeleton, model: nn.Module, files: ModelFiles, world: World, *, first: str | None) -> None:
    """Give every tensor of model its value. first: the first packed linear, which is compared. Collective."""
    values = open_values(files, DTYPES[run.train.precision], run.train.seed)
    home = replace(world, device=run.strategy.home(world))

    new = head_tensors(bones.model) if files.labels else frozenset()

    def initial(name: str, param: Tensor) -> Tensor:
        if name in bones.stored:
            return bones.stored[name]
        if name in new:  # no output is better than another before the first step
            return torch.zeros(param.shape)
        with seeded(run.train.seed, name):
            read = partial(_trained_weight, bones, values, home.device)
            value: Tensor = run.method.initial(model, name, param, read)
            return value

    materialize(model, values, home, origins=bones.origins, initial=initial, place=run.strategy.place)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(world.device)
    if first is not None:
        _check_bytes(run, bones, first, values, home.device)


def _groups(run: Run, model: nn.Module) -> list[dict[str, Any]]:
    """What learns, one group per rate and weight decay, in the order of the model."""
    alike: dict[tuple[float, bool], list[tuple[str, nn.Parameter]]] = {}
    head = head_tensors(model) if run.labels else frozenset()  # no method knows of it
    for name, param in model.named_parameters():
        if param.requires_grad:
            known = (
                (run.optim.lr, True) if name in head else (run.method.rate(name, run.optim.lr), run.method.decays(name))
            )
            alike.setdefault(known, []).append((name, param))
    return [
        {"params": params, "lr": rate, "weight_decay": run.optim.weight_decay if decays else 0.0}
        for (rate, decays), params in alike.items()
    ]


def autocast(session: Session) -> torch.autocast:
    """The precision of a forward pass."""
    return cast(session.run.train.precision, session.world.device)


class seeded:  # noqa: N801  # a context, used like a function
    """Draw from torch's default CPU stream as if newly seeded by words; the stream goes on afterwards as before."""

    def __init__(self, *words: object) -> None:
        self.seed = stream(*words)

    def __enter__(self) -> None:
        self.state = torch.get_rng_state()
        torch.manual_seed(self.seed)

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self.state)


def _trained_weight(bones: Skeleton, values: Values, device: torch.device, name: str) -> Tensor:
    """Weight (out, in), on CPU, of the linear called name as training sees it: packed and unpacked where it is packed.

    device: where the model's own are packed. Another one sums in another order, and so packs other bytes.
    """
    module = bones.model.get_submodule(name)
    origin = bones.origins[f"{name}.weight"]
    if isinstance(module, PackedLinear):
        weight = values.full(origin, device)
        return module.decode(tuple(module.pack(weight).values()), weight.dtype).cpu()
    return values.full(origin)


def _first_packed(model: nn.Module) -> str | None:
    return next((name for name, module in model.named_modules() if isinstance(module, PackedLinear)), None)


def _check_bytes(run: Run, bones: Skeleton, name: str, values: Values, device: torch.device) -> None:
    """The start-up self-test: a packed weight as its forward pass gets it is the weight packed here, byte for byte.

    A mixed-precision cast of packed bytes is silent otherwise (bitsandbytes#1945). device: where the model's own were
    packed; on another one the mean of the scales may differ in its last bit. Collective.
    """
    module = bones.model.get_submodule(name)
    assert isinstance(module, PackedLinear)
    expected = module.pack(values.full(bones.origins[f"{name}.weight"], device))
    got = run.strategy.used(bones.model, name, module.packed)
    for part in module.packed:
        mine, theirs = got[part], expected[part].cpu()
        if mine.dtype != theirs.dtype or not torch.equal(mine, theirs):
            raise RuntimeError(
                f"{name}.{part}: the packed weight that training would see is not the one that was packed: "
                f"{type(run.strategy).__name__} does not carry its bytes with torch {torch.__version__} here "
                f"({theirs.dtype} became {mine.dtype}); do not train on it, take quantization=none or another strategy"
            )
