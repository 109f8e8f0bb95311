"""A conversation that waits for its answer, as tokens: written as the data of a training run are."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt_of(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[dict[str, str]], joint: str) -> list[int]:
    """The tokens after which the answer begins.

    messages: {"role", "content"}, ...; without a chat template the last one stands for itself, with joint behind it.
    Raises ValueError if the template refuses them. However many they are, transformers says nothing about it.
    """
    if tokenizer.chat_template is None:
        given: list[int] = tokenizer(messages[-1]["content"] + joint, verbose=False)["input_ids"]
        return given[:-1] if given and given[-1] == tokenizer.eos_token_id else given
    text = _rendered(tokenizer, messages, add_generation_prompt=True)
    tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokens


def ends_of(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Tokens that end an answer: end of text, and the special one with which the chat template ends a turn."""
    ends = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    if tokenizer.chat_template is None:
        return ends
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    tokens = tokenizer(_rendered(tokenizer, turns), add_special_tokens=False)["input_ids"]
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    while tokens and tokens[-1] not in special and not str(tokenizer.decode([tokens[-1]])).strip():
        tokens.pop()
    return ends | ({int(tokens[-1])} & special if tokens else set())


def _rendered(tokenizer: Any, messages: Sequence[dict[str, str]], **options: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
    except TemplateError as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"the conversation must fit the model's chat template, got its refusal: {reason}") from None
