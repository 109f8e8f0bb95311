"""Prompt tuning: the rows before the embedded tokens are the parameters; they start as embeddings of real tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsft.methods.peft_folder import Folder
from dsft.methods.soft_prompt import EMBEDDINGS, NAME, Rows, SoftPrompt
from dsft.methods.stored import Stored, as_it_is, shapes


@dataclass(frozen=True, kw_only=True)
class Prompt(SoftPrompt):
    """l = num_virtual_tokens rows before the embedded tokens of every example. Parameters: l d, d = embedding's width.

    init_text: its tokens' embeddings are the first values, repeated or cut to l; None: those of random tokens.
    Source: Lester, Al-Rfou, Constant 2021, arXiv:2104.08691; first values and file format: PEFT's tuners/prompt_tuning
    (TEXT, SAMPLE_VOCAB). The start is not the base, since every token attends to the rows.
    """

    init_text: str | None
    init_from: str | None

    def __post_init__(self) -> None:
        """Refuse a text without a word."""
        super().__post_init__()
        if self.init_text is not None and not self.init_text.strip():
            raise ValueError(
                f"method.init_text must hold a text, got {self.init_text!r}; null starts from random tokens"
            )

    def rows(self, width: int) -> Rows:
        """A table."""
        return _Table(self.num_virtual_tokens, width)

    def folded(self, weights: Mapping[str, Tensor]) -> Tensor:
        """What was learned, as it is."""
        return weights["table"]

    def tokenize(self, model: nn.Module, tokenizer: Any) -> None:
        """Note init_text's tokens, as PEFT takes them: with the tokenizer's special ones, repeated or cut to l."""
        if self.init_text is None:
            return
        tokens = tokenizer(self.init_text)["input_ids"]
        if not tokens:
            raise ValueError(
                f"method.init_text must hold a token of the model's tokenizer, got {self.init_text!r} with none; give "
                "another text, or null to start from random tokens"
            )
        repeated = tokens * -(-self.num_virtual_tokens // len(tokens))
        for name, module in model.named_modules():
            if name.rpartition(".")[2] == NAME:
                module.tokens = tuple(repeated[: self.num_virtual_tokens])

    def stored(self, model: nn.Module) -> Mapping[str, Tensor]:
        """The rows of a run's folder or of PEFT's, p_tuning's too: its encoder is folded away there."""
        if self.init_from is None:
            return {}
        folder = Folder(self.init_from)
        folder.check_type("PROMPT_TUNING", folder.config())
        ((name, param),) = [pair for pair in model.named_parameters() if pair[1].requires_grad]
        found = shapes(folder.tensors).get(EMBEDDINGS, ())
        if found != tuple(param.shape):
            raise ValueError(
                f"method.init_from must hold {EMBEDDINGS} {list(param.shape)}, got {list(found)}; set "
                "method.num_virtual_tokens to its rows, or take the model that it was trained on"
            )
        return Stored(folder.tensors, {name: (EMBEDDINGS, as_it_is)})

    def initial(self, model: nn.Module, name: str, param: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """Embeddings of init_text, or of tokens drawn from the whole vocabulary, as the model's own embedding gives
        them: a family may scale them there.
        """
        table: Any = model.get_submodule(name.rpartition(".")[0])
        embedding: Any = model.get_submodule(table.embedding_name)
        assert self.init_text is None or table.tokens, "tokenize comes first"
        tokens = torch.randint(embedding.num_embeddings, (self.num_virtual_tokens,))
        if table.tokens:
            tokens = torch.tensor(table.tokens)
        held = {key: buffer.cpu() for key, buffer in embedding.named_buffers()}
        with torch.no_grad():
            rows: Tensor = torch.func.functional_call(
                embedding, {**held, "weight": read(table.embedding_name).cpu()}, (tokens,)
            )
        return rows.detach().float()


class _Table(Rows):
    """The rows themselves. tokens: the l that they start as, empty where no text gave them."""

    tokens: tuple[int, ...] = ()

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(length, width, device="meta"))

    def rows(self) -> Tensor:
        return self.table
