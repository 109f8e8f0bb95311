"""Folders that datasets' save_to_disk has written, and what of a dataset is left as it is stored."""

from pathlib import Path
from typing import Any

_DATASET, _DICT = "state.json", "dataset_dict.json"
"""Names that save_to_disk gives a file beside one split's data, and beside the folders of several splits."""


def is_saved(folder: Path) -> bool:
    """True if save_to_disk wrote folder, which load_dataset does not read."""
    return (folder / _DICT).is_file() or (folder / _DATASET).is_file()


def load(folder: Path, split: str, *, name: str | None) -> Any:
    """Load one split of a folder that save_to_disk wrote. Raises ValueError if it has none of that name."""
    import datasets

    if name is not None:
        raise ValueError(f"data.name must be null for a folder of save_to_disk, got {name}; unset it")
    try:
        found = datasets.load_from_disk(str(folder))
    except (ValueError, OSError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"data.path must be a whole folder of save_to_disk, got {folder}; {reason}") from None
    splits = dict(found) if isinstance(found, dict) else {str(found.split or "train"): found}
    if split not in splits:
        raise ValueError(
            f"data.split and data.eval_split must be splits of {folder} ({' '.join(splits)}), got {split}; name one"
            + ("; parts of a split are not read from a folder of save_to_disk" if "[" in split else "")
        )
    return splits[split]


def undecoded(dataset: Any) -> Any:
    """The dataset with its images, sounds and videos as they are stored, which needs no library for them."""
    for column, feature in dataset.features.items():
        if getattr(feature, "decode", False):
            dataset = dataset.cast_column(column, type(feature)(decode=False))
    return dataset
