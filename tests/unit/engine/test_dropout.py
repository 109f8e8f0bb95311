"""Dropout is an example's own: micro-batches, recomputation and what else is in the batch change no loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
from dsft_launchers.verdict import RefusedError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig

from dsft.engine.assemble import Session, skeleton
from dsft.engine.dropout import Draws, Keyed, keyed
from dsft.engine.loop import step_batches
from dsft.engine.step import train_step
from dsft.models.bytes_tokenizer import byte_tokenizer
from dsft.models.randomness import as_published, refuse, still, told, unkeyed
from dsft.objective import Batch
from dsft.plan import make_plan
from tests.contract.sessions import batch_of, composed_of, session_of

CPU = torch.device("cpu")
APART = ["train.micro_batch_tokens=1", "train.gradient_checkpointing=full"]
BOUND = 1e-5
SMALL: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512},
    "opt": {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 512},
}  # fmt: skip
"""GPT-2 drops by modules, OPT by calls of torch's function, each 0.1 by default."""


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of models that drop by default, to be started from random weights."""
    found = tmp_path_factory.mktemp("families")
    for family, numbers in SMALL.items():
        config = AutoConfig.for_model(family, vocab_size=264, bos_token_id=1, eos_token_id=2, pad_token_id=0, **numbers)
        config.save_pretrained(found / family)
        byte_tokenizer().save_pretrained(found / family)
    return found


def of(families: Path, family: str) -> list[str]:
    return ["model=custom", f"model.path={families / family}", "model.init=random"]


def losses(session: Session, data: Any) -> list[float]:
    found: list[float] = []
    for step in (1, 2):
        result = train_step(session, step_batches(session, data, step)[1], step, 1.0)
        found += [result.loss, result.grad_norm]
    return found


CASES = {
    "lora": ("tiny", "lora", "method.dropout=0.2"),
    "houlsby": ("tiny", "houlsby", "method.dropout=0.2", "optim.lr=1e-2"),
    "modules": ("gpt2", "full"),
    "functions": ("opt", "full"),
    "behind a prompt": ("gpt2", "prompt"),
}


@pytest.mark.parametrize("case", CASES)
def test_micro_batches_and_recomputation_change_no_loss(case: str, families: Path) -> None:
    model, method, *words = CASES[case]
    words += [] if model == "tiny" else of(families, model)
    together = losses(*session_of(method, *words))
    assert losses(*session_of(method, *words, *APART)) == pytest.approx(together, rel=BOUND)


@pytest.mark.parametrize("case", ["lora", "modules"])
def test_masks_of_a_micro_batch_would_be_seen(case: str, families: Path) -> None:
    model, method, *changed = CASES[case]
    changed += [] if model == "tiny" else of(families, model)
    found = []
    for words in ([], APART):
        session, data = session_of(method, *changed, *words)
        for module in session.model.modules():
            if isinstance(module, Keyed):
                module.__class__ = _OfMicroBatch
        session.draws.watched = True  # it would be refused as a chance of the model's own
        session.module.register_forward_pre_hook(_seeded)
        found.append(losses(session, data))
    assert found[0] != pytest.approx(found[1], rel=100 * BOUND)


class _OfMicroBatch(nn.Dropout):
    """Masks that go by the row of a micro-batch; not by torch's function, whose calls get keyed masks all the same."""

    def forward(self, input: Tensor) -> Tensor:
        return input * (torch.rand(input.shape) >= self.p) / (1 - self.p)


def _seeded(module: nn.Module, args: Any) -> None:
    """Torch draws the same masks for each micro-batch: what is seen is how the examples lie, not the seed."""
    torch.manual_seed(0)


def draws_of(more: int = 0, seed: int = 0) -> Draws:
    return Draws(seed, more, modules=True, functional=None)


def dropped(batch: Batch, *, step: int = 1, name: str = "m", seed: int = 0) -> Tensor:
    draws = draws_of(seed=seed)
    draws.begin(step, batch, CPU)
    return draws.drop(torch.ones(1, sum(batch.lengths), 64), 0.5, name)


def test_an_example_brings_its_masks_along() -> None:
    whole = dropped(batch_of(5, 9, 3))
    nothing = torch.zeros(9, dtype=torch.int64)
    alone = Batch(nothing, nothing, nothing, lengths=(9,), ids=("1",), places=(1,), members=(1,))
    assert torch.equal(dropped(alone), whole[:, 5:14])
    assert set(whole.unique().tolist()) == {0.0, 2.0}
    draws = draws_of()
    draws.begin(1, alone, CPU)
    flat = [draws.drop(torch.ones(9, 64), 0.5, "m") for _ in range(2)]
    assert torch.equal(flat[0], whole[0, 5:14])
    others = [
        flat[1][None],  # the module's second call
        dropped(alone, step=2),
        dropped(alone, name="n"),
        dropped(alone, seed=1),
        dropped(Batch(nothing, nothing, nothing, (9,), ("1",), (2,), (1,))),  # the same example again in the step
        dropped(Batch(nothing, nothing, nothing, (9,), ("2",), (1,), (1,))),
    ]
    for other in others:
        assert 0.35 < float((other == dropped(alone)).double().mean()) < 0.65


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_block_that_runs_twice_is_recomputed_with_each_of_its_masks(reentrant: bool) -> None:
    draws, weight = draws_of(), torch.ones(64, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return draws.drop(x * weight, 0.5, "shared") + x

    def gradient(recomputed: bool) -> Tensor:
        draws.begin(1, batch_of(4, 2), CPU)
        x = torch.ones(1, 6, 64, requires_grad=True)
        for _ in range(2):
            x = checkpoint(draws.held(block), x, use_reentrant=reentrant) if recomputed else block(x)
        return torch.autograd.grad(x.sum(), weight)[0] if not reentrant else _left_in(weight, x.sum())

    assert torch.equal(gradient(recomputed=True), gradient(recomputed=False))


def _left_in(weight: Tensor, loss: Tensor) -> Tensor:
    weight.grad = None
    loss.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    return weight.grad


def test_what_is_no_row_of_all_tokens_is_refused() -> None:
    draws = draws_of(more=3)
    with pytest.raises(RuntimeError, match="m drops entries outside of a step"):
        draws.drop(torch.ones(1, 6, 8), 0.1, "m")
    draws.begin(1, batch_of(4, 2), CPU)
    draws.drop(torch.ones(1, 12, 8), 0.1, "m")  # each example behind three rows
    for shape in ((1, 7, 8), (2, 6, 8), (1, 2, 6, 8), (6,)):
        with pytest.raises(RefusedError, match=r"model must drop entries of all tokens in their order, \(1, T, H\)"):
            draws.drop(torch.ones(shape), 0.1, "m")


def test_modules_that_cannot_be_keyed_are_refused_before_weights() -> None:
    run = composed_of("lora").run
    for odd, said in (
        (nn.ModuleList([nn.Dropout(0.1)]), "dropout must be 0 where a module sees some tokens alone, got 0.1 in "),
        (nn.AlphaDropout(0.1), "model must drop single entries .* got AlphaDropout in "),
    ):
        bones = skeleton(run, run.model.resolve())
        bones.model.get_submodule(bones.anatomy.blocks[0]).odd = odd
        with pytest.raises(ValueError, match=said):
            keyed(bones.model, bones.anatomy, 0, 0)


@pytest.mark.parametrize("used", [True, False])
def test_other_random_numbers_are_refused_if_they_change_the_loss(used: bool) -> None:
    session, data = session_of("lora")

    def noise(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * (1 + torch.rand(output.shape) * used)

    session.model.get_submodule(session.anatomy.embedding).register_forward_hook(noise)
    if not used:
        losses(session, data)
        return
    with pytest.raises(RefusedError, match="model must draw no random numbers in training but those of dropout"):
        losses(session, data)


def test_dropout_inside_attention_is_set_to_0_and_said(families: Path) -> None:
    composed = composed_of("full", *of(families, "gpt2"))
    files = composed.run.model.resolve()
    said = "attn_pdrop=0.1 of the model is set to 0: dropout inside attention would depend on how examples are packed"
    assert said in make_plan(composed, files)["notes"]
    assert files.config.attn_pdrop == 0.1
    asked = composed_of("lora", "+model.config.attention_dropout=0.1")
    with pytest.raises(ValueError, match=r"^model\.config\.attention_dropout must be 0, got 0\.1: dropout inside att"):
        make_plan(asked, asked.run.model.resolve())


def test_inner_configurations_and_noise_of_routers_are_found_and_given_back() -> None:
    def published() -> Any:
        return AutoConfig.for_model(
            "dbrx", attn_config={"attn_pdrop": 0.1}, resid_pdrop=0.2, ffn_config={"moe_jitter_eps": 0.3}
        )

    config = published()
    assert {name: value for name, (value, _) in unkeyed(config).items()} == {
        "attn_config.attn_pdrop": 0.1, "ffn_config.moe_jitter_eps": 0.3,
    }  # fmt: skip
    assert len(list(told(config))) == 2
    still(config)
    assert not unkeyed(config)
    assert config.resid_pdrop == 0.2
    as_published(config, published())
    assert unkeyed(config) == unkeyed(published())
    refuse(None)
    with pytest.raises(
        ValueError, match=r"model\.config\.decoder\.layerdrop must be 0, got 0\.1: layers that are left"
    ):
        refuse({"decoder": {"layerdrop": 0.1}})
