"""What the turns of a row say besides role and content, and a chat template does not write."""

import re
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dsft.data.source import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CALLS = "tool_calls"


class Written:
    """The words of a tokenizer's chat templates: a key of a turn that is none of them is written by none."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.templates: Any = tokenizer.chat_template
        self.known: dict[tuple[str, ...], tuple[str, ...]] = {}

    @cached_property
    def words(self) -> frozenset[str]:
        """All words of all templates, names and texts alike."""
        templates = self.templates.values() if isinstance(self.templates, dict) else [self.templates or ""]
        return frozenset(word for template in templates for word in re.findall(r"\w+", template))

    def unwritten(self, sample: Sample) -> tuple[str, ...]:
        """Keys of the sample's turns that are not written, each once.

        Raises ValueError for calls of tools that are not written: the model would learn the words around them alone.
        """
        keys: dict[str, None] = {}
        for message in (message for side in sample.sides for message in side.messages):
            if len(message) > 2:
                keys |= dict.fromkeys(message)
        names = tuple(keys)
        if names not in self.known:
            self.known[names] = tuple(
                name for name in names if name not in ("role", "content") and name not in self.words
            )
        if _CALLS in self.known[names] and self.templates:
            raise ValueError(
                f"{sample.place} must call no tools where the chat template does not write calls, got {_CALLS}; set "
                f"data.ignore=[{_CALLS}], or use a model whose chat template writes them"
            )
        return self.known[names]
