"""How a family of models is computed: what an examination of a small copy of the model has found (engine/trial.py)."""

from dataclasses import asdict, dataclass
from typing import Any

from dsft.models.attention import NAME


@dataclass(frozen=True, kw_only=True)
class Family:
    """One verdict.

    packs: examples may share a row of tokens; otherwise each is a micro-batch of its own. attention: dsft's ragged one,
    or the name of the family's own ("sdpa", "eager"). library: which of those two the model is right with elsewhere,
    to generate and to be compared. reason: why it does not pack, or not with dsft's attention; "" if it does.
    recomputes: False if a block that is computed again in backward gives other values. whole: False if the model's
    tensors, written as a whole result and loaded by transformers, are not the model. graded: False if some calls of a
    block are made without a gradient inside of a forward pass that has one. bf16, bf16_whole: False if the class fails
    under autocast to bf16 where its weights are frozen, in bf16, or learn, in fp32.
    """

    model_type: str
    packs: bool = True
    attention: str = NAME
    library: str = "sdpa"
    reason: str = ""
    recomputes: bool = True
    whole: bool = True
    graded: bool = True
    bf16: bool = True
    bf16_whole: bool = True

    @property
    def ragged(self) -> bool:
        """True if dsft's attention computes it: what needs keys of its own before an example's has a place there."""
        return self.attention == NAME

    @property
    def verdict(self) -> str:
        """Word for a plan: packs or alone."""
        return "packs" if self.packs else "alone"

    def as_dict(self) -> dict[str, Any]:
        """What JSON keeps of it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Family":
        """Read what as_dict gave."""
        return cls(**values)


PACKS = Family(model_type="")
"""Of a model that was not examined: a Llama-shaped one, as the tests' own are."""
