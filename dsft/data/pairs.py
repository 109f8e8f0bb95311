"""Pairs as tokens: both answers encoded as rows of their own, and held to one prompt."""

from collections.abc import Sequence

import numpy as np

from dsft.data.encoded import Encoded
from dsft.data.encoding import Encoder
from dsft.data.length import OverLong
from dsft.data.marks import CannotRenderError
from dsft.data.source import BadRow, Sample

_WAY = "correct the row or the template, or drop the row"


def encode(encoder: Encoder, samples: Sequence[Sample]) -> list[Encoded | OverLong | BadRow]:
    """A result per sample, in their order; of a pair one for both sides together. Raises ValueError as Encoder does."""
    found = iter(encoder.encode([side for sample in samples for side in sample.sides]))
    results: list[Encoded | OverLong | BadRow] = []
    for sample in samples:
        first = next(found)
        results.append(first if sample.rejected is None else _joined(encoder, sample, first, next(found)))
    return results


def _joined(
    encoder: Encoder, sample: Sample, chosen: Encoded | OverLong | BadRow, rejected: Encoded | OverLong | BadRow
) -> Encoded | OverLong | BadRow:
    """Both sides as one example of two segments; what is wrong with one of them is wrong with the pair."""
    for side in (chosen, rejected):
        if isinstance(side, BadRow):
            return side
    if isinstance(chosen, OverLong) or isinstance(rejected, OverLong):
        return max((side for side in (chosen, rejected) if isinstance(side, OverLong)), key=lambda side: side.tokens)
    assert isinstance(chosen, Encoded)
    assert isinstance(rejected, Encoded)
    prompt = 0
    if chosen.mask.any() and rejected.mask.any():
        try:
            prompt = _parting(encoder, sample, chosen, rejected)
        except CannotRenderError as error:
            why = f"{sample.place} must have one prompt before both answers, token for token, got {error}; {_WAY}"
            return BadRow(sample.source, sample.row, sample.place, why)
    return Encoded(
        tokens=np.concatenate([chosen.tokens, rejected.tokens]),
        mask=np.concatenate([chosen.mask, rejected.mask]),
        prompt=prompt,
        empty_turns=chosen.empty_turns + rejected.empty_turns,
        segments=(len(chosen.tokens), len(rejected.tokens)),
    )


def _parting(encoder: Encoder, sample: Sample, chosen: Encoded, rejected: Encoded) -> int:
    """The number of tokens before the answers, which both sides share, and whose text begins what a model is given.

    The text, because a tokenizer may cut the last characters of a prompt otherwise where nothing follows them. Raises
    CannotRenderError with what is there instead.
    """
    given, sides = _given(encoder, sample), (chosen.tokens.tolist(), rejected.tokens.tolist())
    first, other = (int(side.mask.argmax()) for side in (chosen, rejected))
    if not all(_answers_first(side) for side in sample.sides):
        first = other = len(given)  # the mask does not show where the first turn begins
    if first != other:
        raise CannotRenderError(
            f"{first} tokens before the chosen answer and {other} before the rejected one: one alone has thoughts, or "
            "begins with white space that makes one token with the prompt's end, or the chat template rewrites it"
        )
    if sides[0][:first] != sides[1][:first]:
        raise CannotRenderError("others before the rejected answer: the chat template rewrites it")
    if sides[0][:first] != given[:first] and not _begins(encoder, given, sides[0][:first]):
        raise CannotRenderError(
            "others than a model is given to write the answer: the chat template rewrites it once it is answered"
        )
    return first


def _begins(encoder: Encoder, given: list[int], prompt: list[int]) -> bool:
    """True if the text of given begins with that of prompt."""
    return str(encoder.tokenizer.decode(given)).startswith(str(encoder.tokenizer.decode(prompt)))


def _answers_first(side: Sample) -> bool:
    """True if the first turn behind the prompt is supervised, so that the mask shows where it begins."""
    return side.learned is None or not side.messages or side.learned[side.prompt]


def _given(encoder: Encoder, sample: Sample) -> list[int]:
    """The tokens that a model is given to write an answer. Raises CannotRenderError."""
    template = encoder.template_of(sample)
    if template is None:
        (pair,) = encoder.tokenize([encoder.plain(sample)[0]], special=True)
    else:
        text = template.text(sample.messages[: sample.prompt], sample.tools, prompt=True)
        (pair,) = encoder.tokenize([text], special=False)
    if isinstance(pair, str):
        raise CannotRenderError(pair)
    found: list[int] = (pair if template is not None else encoder.opened(pair))[0].tolist()
    return found
