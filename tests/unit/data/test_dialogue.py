"""A conversation that waits for its answer is written as the data of a run are."""

from dsft.compose import compose
from dsft.data.dialogue import ends_of, prompt_of
from dsft.data.encoding import Encoder
from dsft.data.source import Sample


def _sample(*messages: dict[str, str], plain: tuple[str, str] | None = None) -> Sample:
    return Sample("test", 0, "test", messages, plain, "", None)


def test_the_prompt_is_what_training_put_before_the_answer() -> None:
    tokenizer = compose(["model=tiny"]).run.model.resolve().tokenizer()
    turns = [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "2 + 2 = ?"},
        {"role": "assistant", "content": "4"}, {"role": "user", "content": "3 + 3 = ?"},
    ]  # fmt: skip
    (encoded,) = Encoder(tokenizer).encode([_sample(*turns, {"role": "assistant", "content": "6"})])
    assert prompt_of(tokenizer, turns, "\n") == encoded.tokens[: encoded.prompt].tolist()
    assert int(encoded.tokens[encoded.mask][-1]) in ends_of(tokenizer)


def test_the_token_that_ends_a_turn_ends_an_answer_even_where_it_is_not_the_end_of_text() -> None:
    tokenizer = compose(["model=tiny"]).run.model.resolve().tokenizer()
    end = tokenizer.eos_token_id
    tokenizer.eos_token = "<|begin|>"
    assert ends_of(tokenizer) == {end, tokenizer.eos_token_id}


def test_without_a_chat_template_the_text_stands_for_itself() -> None:
    tokenizer = compose(["model=tiny"]).run.model.resolve().tokenizer()
    tokenizer.chat_template = None
    question = {"role": "user", "content": "2 + 2 = ?"}
    (encoded,) = Encoder(tokenizer).encode([_sample(plain=("2 + 2 = ?\n", "4"))])
    assert prompt_of(tokenizer, [question], "\n") == encoded.tokens[: encoded.prompt].tolist()
    assert ends_of(tokenizer) == {tokenizer.eos_token_id}
