"""Activations that waited elsewhere are the same bits: the hooks themselves, on CPU tensors, which they copy too."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsft.comm.world import World
from dsft.compose import compose
from dsft.data.open import open_data
from dsft.engine import offload
from dsft.engine.assemble import assemble, autocast
from dsft.engine.loop import step_batches


def gradients(words: list[str], around: Any) -> dict[str, Tensor]:
    """Loss and gradients of one forward and backward pass."""
    run = compose([
        "model=tiny", "data=reasoning_gym", "data.size=16", "data.eval_size=0", "launcher=local", "tracker=[]",
        "train.global_batch_size=4", "train.steps=1", *words,
    ]).run  # fmt: skip
    files = run.model.resolve()
    data = open_data(run.data, files.tokenizer(), max_length=512, seed=0)
    session = assemble(run, files, World(0, 1, 0, torch.device("cpu")))
    session.model.train()
    (batch,) = step_batches(session, data, 1)[1]
    session.draws.begin(1, batch, session.world.device)
    with autocast(session), around:
        terms, _ = run.objective.losses(session.scorer, batch)
    run.strategy.backward(terms.sum(), last=True)
    learning = {name: param.grad for name, param in session.model.named_parameters() if param.requires_grad}
    return {"loss": terms.detach(), **{name: grad for name, grad in learning.items() if grad is not None}}


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(
    "words", [["method=full"], ["method=lora", "method.dropout=0.1"], ["method=qlora"]], ids=" ".join
)
def test_the_numbers_are_the_same_bits(words: list[str], recompute: str) -> None:
    words = [*words, "train.precision=fp32", f"train.gradient_checkpointing={recompute}"]
    plain, there = gradients(words, offload.offloaded(compose(words).run.train, torch.device("cpu"))), Copies()
    away = gradients(words, there.hooks())
    assert there.bytes > 2**20
    assert plain.keys() == away.keys()
    assert len(plain) > 20
    assert all(torch.equal(plain[name], away[name]) for name in plain)


class Copies:
    """Bytes that the hooks moved."""

    def __init__(self) -> None:
        self.bytes = 0

    def hooks(self) -> Any:
        real = offload.to_host()

        def pack(tensor: Tensor) -> Any:
            kept = real.pack_hook(tensor)
            if kept is not tensor:
                assert kept[1].data_ptr() != tensor.data_ptr()
                self.bytes += tensor.nbytes
            return kept

        return torch.autograd.graph.saved_tensors_hooks(pack, real.unpack_hook)


def test_parameters_their_views_and_small_tensors_stay() -> None:
    pack = offload.to_host().pack_hook
    weight = nn.Parameter(torch.zeros(512, 512))
    for stays in (weight, weight.t(), torch.zeros(8)):
        assert pack(stays) is stays
    large = torch.zeros(512, 512)
    assert pack(large) is not large


def test_it_is_for_accelerators_that_were_asked_to() -> None:
    train = compose(["train.offload_activations=true"]).run.train
    assert isinstance(offload.offloaded(train, torch.device("cuda")), torch.autograd.graph.saved_tensors_hooks)
    assert not isinstance(offload.offloaded(train, torch.device("cpu")), torch.autograd.graph.saved_tensors_hooks)
    asked_for_nothing = compose([]).run.train
    assert not isinstance(
        offload.offloaded(asked_for_nothing, torch.device("cuda")), torch.autograd.graph.saved_tensors_hooks
    )
