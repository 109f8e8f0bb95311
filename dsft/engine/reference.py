"""The reference of an objective may be the base, or the result of another run: this module finds its values."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from dsft.config import Run
from dsft.engine.precision import DTYPES
from dsft.models.files import ModelFiles
from dsft.models.source import read_shape
from dsft.models.values import Values, open_values
from dsft.objective import BASE, START


@dataclass(frozen=True)
class Whole(Mapping[str, Tensor]):
    """Tensors that learn, of the whole model that a run has left; fp32 on CPU, each read when it is asked for."""

    there: Values
    names: tuple[str, ...]

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor."""
        return self.there.full(name).float()

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the tensors."""
        return iter(self.names)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.names)


def reference_of(run: Run, files: ModelFiles, model: nn.Module) -> Mapping[str, Tensor] | None:
    """Return the tensors, by name, in which the reference differs from the base; None if it is the policy at the start.

    model: with its method in it, on meta. Raises ValueError, one line, for a reference that this run cannot have.
    """
    where = run.objective.reference
    if not run.objective.roles or where == START:
        return None
    if where == BASE:
        if not run.method.starts_as_base:
            raise ValueError(
                "objective.reference must be start for a method whose first values change the model, got base"
            )
        return {}
    try:
        return _whole(run, files, model, where) if run.method.whole else run.method.started_from(where).stored(model)
    except ValueError as error:
        said = str(error)
        for key in ("method.init_from", "model.path"):
            said = said.replace(key, "objective.reference")
        said = said if "objective.reference" in said else f"objective.reference={where}: {said}"
        raise ValueError(f"{said}, or take objective.reference=start or base") from None


def _whole(run: Run, files: ModelFiles, model: nn.Module, where: str) -> Whole:
    given = Path(where).expanduser()
    folder = given / "adapter" if (given / "config.yaml").is_file() else given
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"objective.reference must be start, base, or the folder of a run whose result is a whole model, got "
            f"{where} without config.json; take a run of a method that trains whole models"
        )
    config = read_shape(folder, files.trust_remote_code)
    there = replace(files, config=config, folder=folder, name_or_path=str(folder), init="pretrained")
    if (config.model_type, config.vocab_size) != (files.config.model_type, files.config.vocab_size):
        raise ValueError(
            f"objective.reference must be of this model, {files.config.model_type} with {files.config.vocab_size} "
            f"tokens, got {config.model_type} with {config.vocab_size} in {folder}"
        )
    learning = tuple(name for name, param in model.named_parameters() if param.requires_grad)
    return Whole(open_values(replace(there, config=files.config), DTYPES[run.train.precision], 0), learning)
