"""A block that is computed again sends each token to the experts of the first pass, however close their scores are."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.matrix_rows import write_rows
from dsft.comm.world import World
from dsft.compose import compose
from dsft.data.open import open_data
from dsft.engine import recompute as recomputing
from dsft.engine.assemble import assemble
from dsft.engine.dropout import keyed
from dsft.engine.recompute import recompute
from dsft.models.anatomy import dissect
from dsft.models.routing import decided_once, routes

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16, "num_local_experts": 6, "num_experts": 6,
    "n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 2, "first_k_dense_replace": 0,
    "pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 0,
}  # fmt: skip
DENSE = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 64}
FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "granitemoe")


def tied(family: str) -> Any:
    """A small model whose experts have equal scores, in threes."""
    known = AutoConfig.for_model(family).to_dict()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **{key: value for key, value in SIZES.items() if key in known}),
        attn_implementation="eager",
    )
    for name, param in model.named_parameters():
        if param.shape == (6, 32):  # a router's
            with torch.no_grad():
                param.copy_(param[:2].repeat_interleave(3, 0))
                assert "gate" in name or "router" in name
    return model.train()


def shake(model: Any) -> None:
    """Let routers score by up to 1e-6 otherwise in a pass that is computed again, as another kernel may."""
    for module in model.modules():
        weight = next((param for param in module.parameters(recurse=False) if param.shape == (6, 32)), None)
        if weight is not None:
            kept, noise = weight.detach().clone(), 1e-6 * torch.linspace(-1, 1, 6)[:, None]
            module.register_forward_pre_hook(partial(_shaken, weight, kept + noise))
            module.register_forward_hook(partial(_still, weight, kept), always_call=True)


def _shaken(weight: nn.Parameter, otherwise: Tensor, module: Any, args: Any) -> None:
    if torch._C._current_graph_task_id() != -1:  # inside of backward
        weight.data.copy_(otherwise)


def _still(weight: nn.Parameter, kept: Tensor, module: Any, args: Any, output: Any) -> None:
    weight.data.copy_(kept)


def gradient(model: Any) -> Tensor:
    model.zero_grad()
    tokens = torch.randint(3, 60, (1, 40), generator=torch.Generator().manual_seed(1))
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    return torch.cat([param.grad.flatten() for param in model.parameters() if param.grad is not None])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_that_is_computed_again_takes_the_choices_of_the_first(
    family: str, reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = gradient(tied(family))
    for decided, close in ((True, True), (False, False)):
        model = tied(family)
        anatomy = dissect(model)
        if not decided:
            monkeypatch.setattr(recomputing, "decided_once", lambda forward: forward)
        recompute(model, anatomy, "full", reentrant=reentrant, draws=keyed(model, anatomy, 0, 0))
        if reentrant:
            model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
        shake(model)
        found = gradient(model)
        assert ((found - truth).norm() / truth.norm() < 1e-5) == close


def test_a_dense_model_chooses_nothing() -> None:
    """What decides whether blocks that are computed again may be compiled."""
    assert routes(dissect(tied("mixtral")))
    assert not routes(dissect(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **DENSE))))


@pytest.mark.parametrize(
    "choose",
    [
        lambda x: x.topk(2), lambda x: torch.topk(x, 2, 1), lambda x: torch.topk(input=x, k=2, dim=-1, sorted=False),
        lambda x: x.max(1), lambda x: torch.max(x, dim=0, keepdim=True), lambda x: x.topk(3, dim=0),
    ],
)  # fmt: skip
def test_whatever_chooses_chooses_once(choose: Any) -> None:
    first, second = torch.rand(4, 5), torch.rand(4, 5, requires_grad=True)
    again = decided_once(lambda x: (choose(x), x.argmax(-1), torch.max(x), torch.maximum(x, x)))
    (values, indices), best, _, _ = again(first)
    assert torch.equal(values, choose(first).values)
    assert torch.equal(best, first.argmax(-1))
    (others, same), still, largest, _ = again(second)
    assert torch.equal(same, indices)
    assert torch.equal(still, best)
    assert largest == second.max()
    others.sum().backward()
    assert int((second.grad != 0).sum()) == indices.numel()


def test_some_experts_of_the_matrix_model_get_no_token(tmp_path: Path) -> None:
    """So each row of tiny_moe_v3 in the matrix has starved experts."""
    write_rows(tmp_path / "rows.jsonl", 1)
    run = compose([
        "model=tiny_moe_v3", "method=lora", "data=local", f"data.path={tmp_path / 'rows.jsonl'}", "tracker=[]",
        "train.precision=fp32", "train.global_batch_size=4", "launcher=local", "data.shuffle=false",
    ]).run  # fmt: skip
    session = assemble(run, run.model.resolve(), World(0, 1, 0, torch.device("cpu")))
    data = open_data(run.data, session.files.tokenizer(), max_length=512, seed=0)
    used: dict[str, list[set[int]]] = {name: [] for name in session.anatomy.experts}
    for name, seen in used.items():
        module = session.model.get_submodule(name)
        module.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(set(args[1].flatten().tolist())))
    for row in range(4):
        tokens = torch.tensor([int(token) for token in data.train.example(row)[0]])
        session.model(input_ids=tokens[None], position_ids=torch.arange(len(tokens))[None],
                      segment_lengths=(len(tokens),), use_cache=False)  # fmt: skip
    assert all(1 < len(set.union(*seen)) < 8 for seen in used.values())
