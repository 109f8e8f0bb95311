"""The adapter that a run starts from (method.init_from): where its folder is, and its tensors, read one by one."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dsft.headed import scores_sequences

NATIVE, PEFT, TENSORS = "dsft_adapter.json", "adapter_config.json", "adapter_model.safetensors"
"""Files of an adapter: its description in dsft's own format, or in PEFT's, and what it learned."""

FORMATS = {NATIVE: "dsft's own format", PEFT: "PEFT's format"}


def place(path: str, config: str) -> Path:
    """The folder with the file config (NATIVE or PEFT) that path means: itself, or the result of the run whose it is.

    Raises ValueError, one line, if there is none.
    """
    given = Path(path).expanduser()
    folder = given / "adapter" if (given / "config.yaml").is_file() else given
    if not (folder / config).is_file():
        other = next((name for name in FORMATS if (folder / name).is_file()), None)
        if other is not None:
            raise ValueError(
                f"method.init_from must hold an adapter in {FORMATS[config]}, got {FORMATS[other]} in {folder}; take "
                "the method that it was trained with"
            )
        if (folder / "config.json").is_file():
            raise ValueError(
                f"method.init_from must hold an adapter, got a whole model in {folder}; take model=custom "
                f"model.path={folder}"
            )
        if folder != given:
            raise ValueError(
                f"method.init_from must be a run with a result, got {path} without one; start its command again with "
                f"run_dir={path} to finish it"
            )
        raise ValueError(
            f"method.init_from must be a folder with {config}, got {path}; give RUN/adapter, or RUN that has it"
        )
    if scores_sequences(folder):
        raise ValueError(
            f"method.init_from must hold an adapter of answers, got one with a head for sequences in {folder}; take "
            "the run that it was started from"
        )
    if not (folder / TENSORS).is_file():
        raise ValueError(
            f"method.init_from must be a folder with {TENSORS}, got {path}; let PEFT save it again with "
            "safe_serialization"
        )
    return folder


def shapes(file: Path, given: str = "method.init_from") -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a safetensors file; its header is read. Raises ValueError if it is damaged.

    given: what the user set that led to it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # no dict
    except SafetensorError as error:
        raise ValueError(f"{given} must hold whole files, got {file} damaged ({error}); copy it again") from None


def as_it_is(tensor: Tensor) -> Tensor:
    """The tensor."""
    return tensor


@dataclass(frozen=True)
class Stored(Mapping[str, Tensor]):
    """Tensors of a safetensors file by their names in a model, fp32 on CPU, each read when it is asked for.

    parts: name in the model -> its name in the file, and what makes the one of the other.
    """

    file: Path
    parts: Mapping[str, tuple[str, Callable[[Tensor], Tensor]]]

    def __getitem__(self, name: str) -> Tensor:
        """One tensor."""
        from safetensors import safe_open

        there, cut = self.parts[name]
        with safe_open(self.file, "pt") as opened:
            value: Tensor = opened.get_tensor(there).float()
        return cut(value).contiguous()

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self.parts)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.parts)
