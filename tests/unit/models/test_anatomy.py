from collections.abc import Callable

import pytest
import torch

from dsft.models.anatomy import dissect
from dsft.models.build import build_meta

EXPECTED = {
    "llama": ("model.layers", 7, 0, False),
    "llama_tied": ("model.layers", 7, 0, True),
    "qwen3": ("model.layers", 7, 0, False),
    "mixtral": ("model.layers", 4, 1, False),
    "gpt2": ("transformer.h", 0, 0, True),  # its projections are Conv1D, not nn.Linear
}


@pytest.mark.parametrize("family", EXPECTED)
def test_parts_are_found_by_structure(family: str, shape: Callable) -> None:
    stack, linears, experts, tied = EXPECTED[family]
    model = build_meta(shape(family), torch.float32)
    anatomy = dissect(model)
    assert anatomy.blocks == (f"{stack}.0", f"{stack}.1")
    assert len(anatomy.linears) == 2 * linears
    assert len(anatomy.experts) == 2 * experts
    assert anatomy.tied is tied
    assert model.get_submodule(anatomy.head) is model.lm_head
    assert model.get_submodule(anatomy.embedding) is model.get_input_embeddings()
    assert all(role == ("attention" if "self_attn" in name else "mlp") for name, role in anatomy.linears.items())


class Grouped(torch.nn.Linear):
    """A linear that takes and gives groups, as DeepSeek-V4's output projection."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, self.weight.view(x.shape[0], -1, x.shape[-1]).transpose(1, 2))


class Spelled(torch.nn.Linear):
    """A linear that says itself what a linear does, as Falcon's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


@pytest.mark.parametrize(("kind", "is_one"), [(Grouped, False), (Spelled, True)])
def test_a_linear_with_a_forward_of_its_own_gives_rows_or_is_none(kind: type, is_one: bool, shape: Callable) -> None:
    model = build_meta(shape("llama"), torch.float32)
    before = dissect(model).linears
    name = "model.layers.1.self_attn.o_proj"
    model.get_submodule(name).__class__ = kind
    assert dissect(model).linears == {other: role for other, role in before.items() if is_one or other != name}
