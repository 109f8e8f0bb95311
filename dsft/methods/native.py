"""dsft's own adapter format, for methods that PEFT has not: the tensors that learn, and how to make places for them.

A folder holds adapter_model.safetensors (name in the model after attach -> fp32 tensor), dsft_adapter.json (class and
fields of the method, the base, dsft's version) and a README.md that tells how to load it.
"""

import json
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsft import __version__
from dsft.locate import Allowed, ForeignNameError, locate
from dsft.methods.stored import NATIVE as CONFIG
from dsft.methods.stored import TENSORS, Stored, as_it_is, place, shapes
from dsft.protocols import Anatomy, Method

FREE = ("dropout", "start", "init_from")
"""Fields of methods that change nothing in what an adapter's numbers mean."""

README = """# A {name} adapter by dsft {version}

Load it with `pip install dsft`{also}: `from dsft.methods.native import load; from dsft.models.anatomy import dissect;
base = AutoModelForCausalLM.from_pretrained({base!r}, dtype=torch.float32); model = load(base, dissect(base), FOLDER)`.
What learned is fp32: run a base in bf16 under torch.autocast, as in training.
"""


@dataclass(frozen=True, kw_only=True)
class Native(Method):
    """A method that freezes the base, then adds or frees parameters under names of their own.

    init_from: the folder of a run or of its result, whose adapter this run starts from.
    """

    init_from: str | None

    @abstractmethod
    def add(self, model: nn.Module, anatomy: Anatomy) -> None:
        """Add what is added and set requires_grad of what learns; the base is frozen already, and may be on meta."""

    def attach(self, model: nn.Module, anatomy: Anatomy) -> nn.Module:
        """Freeze the base and add this method; off meta, what is new gets its first values here."""
        base = {id(param) for param in model.parameters()}
        model.requires_grad_(False)
        self.add(model, anatomy)
        for name, param in list(model.named_parameters()):
            if id(param) not in base and not param.is_meta:
                param.data.copy_(self.initial(model, name, param, lambda linear: _weight(model, linear)))
        return model

    def stored(self, model: nn.Module) -> Mapping[str, Tensor]:
        """All that init_from holds; its method must be this one, and its tensors those that learn here."""
        if self.init_from is None:
            return {}
        folder = place(self.init_from, CONFIG)
        try:
            before = read(folder)
        except ForeignNameError as error:
            raise ValueError(f"method.init_from: {error}") from None
        except (ValueError, RecursionError, TypeError, ImportError, AttributeError, KeyError) as error:
            raise ValueError(f"method.init_from must hold a method of ours, got {folder / CONFIG}: {error}") from None
        if type(before) is not type(self):
            raise ValueError(
                f"method.init_from must hold an adapter of {type(self).__name__}, got one of {type(before).__name__}; "
                "take the method that it was trained with"
            )
        for field in fields(self):
            mine, other = getattr(self, field.name), getattr(before, field.name)
            if field.name not in FREE and mine != other:
                raise ValueError(
                    f"method.init_from must agree in {field.name}, {mine}, got {other}; set method.{field.name} to it"
                )
        learning = _learning(model)
        if said := _misfit(learning, folder):
            raise ValueError(f"method.init_from must hold what learns in this model, {said}; take its own base")
        return Stored(folder / TENSORS, {name: (name, as_it_is) for name in learning})

    def save(self, model: nn.Module, weights: Mapping[str, Tensor], folder: Path, base: str) -> Mapping[str, Tensor]:
        """Write the three files."""
        from safetensors.torch import save_file

        kind = type(self)
        method = {"_target_": f"{kind.__module__}.{kind.__qualname__}", **asdict(self)}
        del method["init_from"]  # the folder stands for itself
        said = {"method": method, "base_model": base, "dsft": __version__}
        (folder / CONFIG).write_text(json.dumps(said, indent=1) + "\n")
        owner = kind.__module__.partition(".")[0]
        also = "" if owner == "dsft" else f" and the package of `{owner}`"
        text = README.format(name=kind.__name__, version=__version__, base=base, also=also)
        (folder / "README.md").write_text(text)
        tensors = {name: value.contiguous() for name, value in weights.items()}
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
        return tensors

    def restore(self, model: nn.Module, anatomy: Anatomy, folder: Path) -> nn.Module:
        """Attach to model, which holds its weights, and read every learned tensor from folder, kept in fp32.

        Raises ValueError if folder and model do not have the same learned tensors, in name and shape.
        """
        from safetensors.torch import load_file

        model = self.attach(model, anatomy)
        learning = _learning(model)
        if said := _misfit(learning, folder):
            raise ValueError(
                f"{folder} must hold what {type(self).__name__} learns of this base, {said}; load it on its own base, "
                f"see {CONFIG}"
            )
        stored = load_file(folder / TENSORS)
        for name, param in learning.items():
            param.data = stored[name].to(param.device)
        return model


def holds(folder: Path) -> bool:
    """True if folder holds an adapter in this format."""
    return (folder / CONFIG).is_file()


def read(folder: Path) -> Native:
    """The method of the adapter in folder, as it was trained. Raises ValueError if its class is not to be had.

    Only a class of dsft, of an installed plugin or of DSFT_PLUGINS is imported.
    """
    file = folder / CONFIG
    values = dict(json.loads(file.read_text())["method"])
    target = str(values.pop("_target_"))
    try:
        kind = locate(target, Allowed(file))
    except ForeignNameError as error:
        raise ForeignNameError(f"an adapter must name a class that can be imported, got {target} {error}") from error
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{file} must name a class that can be imported, got {target} ({error}); install the package that has it"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, Native)):
        raise ValueError(f"{file} must name a method of dsft's own format, got {target}")
    try:
        method: Native = kind(**{key: _frozen(value) for key, value in values.items()}, init_from=None)
    except TypeError as error:
        raise ValueError(f"{file} must hold the fields of {target}, got others ({error}); copy it again") from error
    return method


def load(base: nn.Module, anatomy: Anatomy, folder: Path | str) -> nn.Module:
    """Put the adapter in folder on base, a transformers model with its weights; base is changed and returned.

    anatomy: of base, as dsft.models.anatomy.dissect gives it.
    """
    folder = Path(folder)
    return with_head(read(folder).restore(base, anatomy, folder), folder)


@torch.no_grad()
def with_head(model: nn.Module, folder: Path) -> nn.Module:
    """The model with the values that the adapter in folder has for its head for sequences, if it has one."""
    from safetensors import safe_open

    if head := _head(folder):
        with safe_open(folder / TENSORS, "pt") as stored:
            for name, param in model.get_submodule(head[:-1]).named_parameters(prefix=head[:-1]):
                param.data = stored.get_tensor(name).to(param.device)
    return model


def _head(folder: Path) -> str:
    """How the names of the tensors of the head begin that the adapter in folder has; empty if it has none."""
    name = json.loads((folder / CONFIG).read_text()).get("head")
    return f"{name}." if name else ""


def _learning(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def _misfit(learning: Mapping[str, nn.Parameter], folder: Path) -> str | None:
    """What of folder's tensors is not what learns, in name or shape: how many, and the first of them; None if none."""
    wanted, head = {name: tuple(param.shape) for name, param in learning.items()}, _head(folder)
    found = {name: shape for name, shape in shapes(folder / TENSORS).items() if not (head and name.startswith(head))}
    off = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
    if not off:
        return None
    there, here = found.get(off[0], "none"), wanted.get(off[0], "none")
    return f"got {len(off)} other tensor(s), first {off[0]}: {there} in place of {here}"


def _frozen(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _weight(model: nn.Module, linear: str) -> Tensor:
    weight: Tensor = model.get_submodule(linear).weight.detach()  # type: ignore[operator, assignment]
    return weight
