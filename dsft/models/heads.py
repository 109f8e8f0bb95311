"""The head for sequences of transformers' *ForSequenceClassification: its name and labels, and if there is one."""

from typing import TYPE_CHECKING, Any

from dsft.headed import KIND

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PretrainedConfig

    from dsft.models.files import ModelFiles


def is_classifier(model: object) -> bool:
    """Return True for a model with a head for sequences."""
    return type(model).__name__.endswith(KIND)


def head_name(model: Any) -> str:
    """Name of the head: the first child beside the model's body that holds parameters. Raises ValueError if none."""
    body = model.base_model
    name: str
    for name, child in model.named_children():  # what a method adds beside it comes later
        if child is not body and any(True for _ in child.parameters()):
            return name
    raise ValueError(
        f"model must have a head on the states of its last block, got {type(model).__name__} without; take an "
        "objective of answers (sft, dpo), or another model"
    )


def head_tensors(model: Any) -> frozenset[str]:
    """Names of the head's parameters."""
    name = head_name(model)
    return frozenset(f"{name}.{inner}" for inner, _ in model.get_submodule(name).named_parameters())


def name_labels(config: "PretrainedConfig", labels: "Sequence[str]") -> None:
    """Let config say that there are these labels, in place."""
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    config.problem_type = None


def require_class(files: "ModelFiles") -> None:
    """Raise ValueError if transformers has no class with such a head for this type of model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as KNOWN

    kind = str(files.config.model_type)
    if kind not in KNOWN and not files.trust_remote_code:
        raise ValueError(
            f"model {files.name_or_path} must be of a type for which transformers has a class with a head for "
            f"sequences ({kind} has none); take an objective of answers (sft, dpo), or another model"
        )
