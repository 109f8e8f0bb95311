from collections.abc import Callable

import pytest
import torch

from benchmarks.family_models import config_of, shape_of
from dsft.models.anatomy import dissect
from dsft.models.build import build_meta
from dsft.models.census import census
from dsft.protocols import ROLES

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


@pytest.mark.parametrize(("model_type", "shared", "router", "mlp"), [
    ("qwen3_next", ["mlp.shared_expert.down_proj", "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"], [], 0),
    ("deepseek_v3", ["mlp.shared_experts.down_proj", "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"], [],
     9),  # its first three layers are dense
    ("zaya", [], ["mlp.gate.down_proj", *(f"mlp.gate.router_mlp.{name}" for name in ("fc1", "fc2", "out_proj"))], 0),
    ("recurrent_gemma", [], [], 78),
    ("longcat_flash", [], ["mlp.router.classifier"], 168), ("mixtral", [], [], 0),
])  # fmt: skip
def test_linears_beside_fused_experts_have_roles_of_their_own(
    model_type: str, shared: list[str], router: list[str], mlp: int
) -> None:
    """Of the models' own sizes: in qwen3_next a shared expert is as wide as there are experts."""
    model = build_meta(shape_of(model_type, config_of(model_type)), torch.bfloat16, None)
    anatomy = dissect(model)
    found = {role: [name for name, its in anatomy.linears.items() if its == role] for role in ROLES}
    assert sorted({name.split(".", 3)[3] for name in found["shared_experts"]}) == shared
    assert sorted({name.split(".", 3)[3] for name in found["router"]}) == router
    assert len(found["mlp"]) == mlp
    assert ("router" in census(model, anatomy)["by_role"]) is (model_type != "recurrent_gemma")  # which has no experts
