"""The order of construction: meta model -> quantize -> method -> recompute -> shard -> read weights -> optimizer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from dsft.engine.first_values import First, fill, first_packed
from dsft.engine.guided import Guided, guided
from dsft.engine.optimizers import factory
from dsft.engine.precision import DTYPES, cast
from dsft.engine.recompute import recompute
from dsft.engine.reference import reference_of
from dsft.engine.roles import Roles
from dsft.models import calling, scoring, sequence
from dsft.models.anatomy import dissect
from dsft.models.build import build_meta
from dsft.models.family import PACKS, Family
from dsft.models.files import ModelFiles
from dsft.models.heads import head_tensors
from dsft.models.lineage import Lineage
from dsft.models.routing import routes
from dsft.models.scorer import Scorer
from dsft.protocols import Anatomy


@dataclass(frozen=True)
class Skeleton:
    """A model on meta with its method in it.

    of_base: tensor name -> its name in the base, see Lineage; stored: what an earlier adapter gives in its place;
    reference: the same of an objective's reference, None if that is the policy as it was at the start;
    family: how the model is computed; draws: by what its dropout is drawn; silenced: probabilities to drop that
    were set to 0, as the objective compares forward passes.
    """

    model: nn.Module
    anatomy: Anatomy
    of_base: dict[str, str]
    stored: Mapping[str, Tensor]
    reference: Mapping[str, Tensor] | None
    family: Family
    draws: Draws
    silenced: tuple[str, ...]

    @property
    def origins(self) -> dict[str, str]:
        """Tensor name -> its name in the base, of what comes from there."""
        return {name: origin for name, origin in self.of_base.items() if name not in self.stored}


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
    """Build the model on meta, pack its frozen weights, attach the method; what learns is fp32. Reads no weights.

    family: the verdict on the model, see models/family.py. Raises ValueError for what it does not allow.
    """
    model: nn.Module = build_meta(files, DTYPES[run.train.precision], family.attention)
    anatomy = dissect(model)
    head = model.get_submodule(anatomy.head)
    model = run.quantization.convert(model, anatomy)
    run.quantization.require(model, anatomy)
    lineage = Lineage(model)
    model = run.method.attach(model, anatomy)
    stored, reference = run.method.stored(model), reference_of(run, files, model)
    of_base = lineage.origins(model)
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
    if run.train.compile is True:
        _check_compiled(run, model, anatomy, draws)
    return Skeleton(model, anatomy, of_base, stored, reference, family, draws, silenced)


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
    if not family.graded and run.strategy.grades_each_call:
        raise ValueError(
            f"strategy must let blocks be called without a gradient for {name}, whose forward pass does so before it "
            "calls them with one, got stage 3 of DeepSpeed, which does not; take strategy=fsdp, ddp, zero1 or zero2"
        )
    fits = family.bf16_whole if run.method.whole else family.bf16
    if run.train.precision == "bf16" and not fits:
        raise ValueError(
            f"train.precision must be fp32 for {name}, which fails in bf16 where its weights "
            f"{'learn' if run.method.whole else 'are frozen'}, got bf16; take train.precision=fp32"
        )
    if not family.ragged and run.train.compile is True:
        raise ValueError(f"train.compile must be false for {name}, which computes attention in its own way, got true")


def _check_compiled(run: Run, model: nn.Module, anatomy: Anatomy, draws: Draws) -> None:
    """Refuse train.compile=true where a compiled block would draw or choose in its own way."""
    if draws.functional:
        raise ValueError(
            f"train.compile must be false or auto where a model may drop without a module ({draws.functional} of its "
            "configuration), got true; set train.compile=false"
        )
    if routes(anatomy) and run.train.gradient_checkpointing != "none":
        raise ValueError(
            "train.compile must be false or auto where blocks with experts are computed again "
            f"(train.gradient_checkpointing={run.train.gradient_checkpointing} on {type(model).__name__}), got true: a "
            "program would choose experts anew; set train.compile=false, or train.gradient_checkpointing=none"
        )


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
                    "parameters, got one that shards each by itself; take strategy=ddp, zero1, zero2 or zero3"
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
    first = first_packed(model)
    model = run.strategy.shard(model, anatomy, world, run.train.precision)
    home = replace(world, device=run.strategy.home(world))
    fill(run, First(run, bones, files, home), model, world, first=first)
    module = run.strategy.prepare(model, _groups(run, model), factory(run.optim))
    roles = Roles(run, module, Scorer(module, packs=family.packs), world)
    if bones.reference is None:
        roles.keep()
    else:
        begin = First(run, skeleton(run, files, family), files, home)
        begin.write(model, bones.reference)
        roles.keep()
        begin.write(model, bones.stored)
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
