"""How many tokens a text has at least, by its characters: a row that is far too long is not tokenised to be counted."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMPOSED = 4
"""Characters that NFC makes one of, at most."""
LOSSLESS = ("ByteLevel", "Metaspace", "Digits", "UnicodeScripts")
"""Ways to cut a text up that leave every character in it."""


TOGETHER = 2**21
"""Characters that are tokenised together, or one text: what a tokenizer holds meanwhile is some 300 bytes for each."""


def portions(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield texts in their order, so many at a time as are tokenised together."""
    part, size = list[str](), 0
    for text in texts:
        if part and size + len(text) > TOGETHER:
            yield part
            part, size = [], 0
        part.append(text)
        size += len(text)
    if part:
        yield part


@dataclass(frozen=True, slots=True)
class OverLong:
    """A row that was not tokenised. tokens: what it has at least, more than max_length; characters: of its text."""

    tokens: int
    characters: int


class LengthBound:
    """characters: the most, white space aside, that one token of this tokenizer stands for; None where nobody knows.

    White space may vanish, into a token that strips its neighbours. Other characters do not where the tokenizer is BPE
    over all bytes, and nothing before it removes or joins them but NFC.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        described = json.loads(tokenizer.backend_tokenizer.to_str())
        shrinks = _shrinks(described["normalizer"])
        keeps = shrinks is not None and _keeps(described["pre_tokenizer"]) and _all_bytes(described)
        vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)
        self.characters = max(map(len, vocabulary)) * (shrinks or 1) if keeps and vocabulary else None

    def over(self, text: str, max_length: int) -> OverLong | None:
        """Return what is known of a text that certainly has more than max_length tokens, else None."""
        if self.characters is None or len(text) <= max_length * self.characters:
            return None
        tokens = -(-sum(map(len, text.split())) // self.characters)
        return OverLong(tokens, len(text)) if tokens > max_length else None


def _shrinks(normalizer: dict[str, Any] | None) -> int | None:
    """How many characters become one at most; None where more may."""
    if normalizer is None:
        return 1
    if normalizer["type"] == "Sequence":
        found = [_shrinks(each) for each in normalizer["normalizers"]]
        return None if None in found else max([1, *(each for each in found if each is not None)])
    if normalizer["type"] == "Replace":
        pattern = normalizer["pattern"].get("String")
        return 1 if pattern is not None and 0 < len(pattern) <= len(normalizer["content"]) else None
    return {"NFC": COMPOSED, "Prepend": 1, "ByteLevel": 1}.get(normalizer["type"])


def _keeps(pre_tokenizer: dict[str, Any] | None) -> bool:
    """True if every character goes on to the model."""
    if pre_tokenizer is None:
        return True
    if pre_tokenizer["type"] == "Sequence":
        return all(map(_keeps, pre_tokenizer["pretokenizers"]))
    if pre_tokenizer["type"] in ("Split", "Punctuation"):
        return bool(pre_tokenizer["behavior"] != "Removed")
    return pre_tokenizer["type"] in LOSSLESS


def _all_bytes(described: dict[str, Any]) -> bool:
    """True if the model is BPE whose vocabulary has all bytes, so that no character is dropped or stands for many."""
    from tokenizers import pre_tokenizers

    model = described["model"]
    if model["type"] != "BPE":
        return False
    if model.get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
    steps = json.dumps([described["pre_tokenizer"], described["normalizer"]])
    return '"ByteLevel"' in steps and all(letter in model["vocab"] for letter in pre_tokenizers.ByteLevel.alphabet())
