from pathlib import Path
from typing import Any

import pytest

from dsft.data.open import open_data

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BARE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Uno."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": " Dos \n "},
]


def _open(source: Any, tokenizer: Any, cache: Path, **keys: Any) -> Any:
    return open_data(source, tokenizer, max_length=keys.pop("max_length", 512), seed=0, cache_dir=cache, **keys)


def test_only_assistant_turns_and_their_end_are_supervised(
    chatml: Any, source: Any, jsonl: Any, supervised: Any, tmp_path: Path
) -> None:
    path = jsonl([{"messages": TALK}])
    train = _open(source("local", path=path), chatml, tmp_path).train
    assert supervised(chatml, train, 0) == ["Uno.<|im_end|>", " Dos \n <|im_end|>"]
    assert chatml.decode(train.example(0)[0].tolist()) == chatml.apply_chat_template(TALK, tokenize=False)


def test_tokens_are_those_of_the_template(
    smollm: Any, source: Any, jsonl: Any, supervised: Any, tmp_path: Path
) -> None:
    path = jsonl([{"messages": TALK}, {"question": "x", "messages": TALK[1:3]}])
    train = _open(source("local", path=path), smollm, tmp_path).train
    for row, talk in enumerate((TALK, TALK[1:3])):
        assert train.example(row)[0].tolist() == smollm.apply_chat_template(talk)["input_ids"]
    assert supervised(smollm, train, 0) == ["Uno.<|im_end|>", " Dos \n <|im_end|>"]
    assert train.prompt(0).tolist() == smollm.apply_chat_template(TALK[:-1], add_generation_prompt=True)["input_ids"]
    assert train.prompt(1).tolist() == smollm.apply_chat_template(TALK[1:2], add_generation_prompt=True)["input_ids"]


def test_marked_template_decides_itself_and_agrees(
    make_tokenizer: Any, chatml: Any, source: Any, jsonl: Any, tmp_path: Path
) -> None:
    local = source("local", path=jsonl([{"messages": TALK}]))
    found, marked = (_open(local, tokenizer, tmp_path).train for tokenizer in (chatml, make_tokenizer(MARKED)))
    assert found.example(0)[0].tolist() == marked.example(0)[0].tolist()
    assert found.example(0)[1].tolist() == marked.example(0)[1].tolist()
    assert found.prompt(0).tolist() == marked.prompt(0).tolist()


def test_template_without_end_token_keeps_its_closing_newline(
    make_tokenizer: Any, source: Any, jsonl: Any, supervised: Any, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(BARE)
    data = _open(source("local", path=jsonl([{"messages": TALK[1:]}])), tokenizer, tmp_path)
    assert supervised(tokenizer, data.train, 0) == ["Uno.\n", " Dos \n \n"]
    assert data.audit.train.truncated == 1


def test_text_is_supervised_but_for_its_first_token(
    chatml: Any, source: Any, jsonl: Any, supervised: Any, tmp_path: Path
) -> None:
    train = _open(source("local", path=jsonl([{"text": "abc"}])), chatml, tmp_path).train
    assert supervised(chatml, train, 0) == ["bc<|im_end|>"]
    assert len(train.prompt(0)) == 0


@pytest.mark.parametrize(
    ("row", "whole", "learned"),
    [
        ({"prompt": "2+2=", "completion": " 4"}, "2+2= 4<|im_end|>", " 4<|im_end|>"),
        ({"question": "Why?", "answer": "So."}, "Why?\nSo.<|im_end|>", "So.<|im_end|>"),
        ({"instruction": "Add", "input": "1 1", "output": "2"}, "Add\n\n1 1\n2<|im_end|>", "2<|im_end|>"),
    ],
)
def test_without_template_prompt_and_answer_are_plain_text(
    row: Any, whole: str, learned: str, make_tokenizer: Any, source: Any, jsonl: Any, supervised: Any, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(None)
    train = _open(source("local", path=jsonl([row])), tokenizer, tmp_path).train
    assert tokenizer.decode(train.example(0)[0].tolist()) == whole
    assert supervised(tokenizer, train, 0) == [learned]


def test_with_template_prompt_and_answer_are_turns(
    chatml: Any, source: Any, jsonl: Any, supervised: Any, tmp_path: Path
) -> None:
    path = jsonl([{"instruction": "Add", "input": "", "output": "2"}])
    train = _open(source("local", path=path, system="Hi"), chatml, tmp_path).train
    text = "<|im_start|>system\nHi<|im_end|>\n<|im_start|>user\nAdd<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
    assert chatml.decode(train.example(0)[0].tolist()) == text
    assert supervised(chatml, train, 0) == ["2<|im_end|>"]


def test_conversations_without_template_are_refused(
    make_tokenizer: Any, source: Any, jsonl: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"must have a chat template for conversations, as .*rows\.jsonl:1"):
        _open(source("local", path=jsonl([{"messages": TALK}])), make_tokenizer(None), tmp_path)


def test_conversation_that_starts_with_the_assistant_is_refused(
    chatml: Any, source: Any, jsonl: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"rows\.jsonl:2 must start with a user or system turn"):
        _open(source("local", path=jsonl([{"messages": TALK}, {"messages": TALK[2:]}])), chatml, tmp_path)


def test_truncation_left_on_in_the_tokenizer_cuts_nothing(
    make_tokenizer: Any, source: Any, jsonl: Any, tmp_path: Path
) -> None:
    cut = make_tokenizer()
    cut.backend_tokenizer.enable_truncation(4)
    cut.backend_tokenizer.enable_padding(length=700)
    data = _open(source("local", path=jsonl([{"text": "abcdefghij"}])), cut, tmp_path)
    assert data.train.lengths.tolist() == [11]


def test_multibyte_text_is_supervised_whole(
    smollm: Any, source: Any, jsonl: Any, supervised: Any, tmp_path: Path
) -> None:
    answer = "na\u00efve \U0001f642 \u4f60\u597d  end"
    path = jsonl([{"question": "\u00bfqu\u00e9?  ", "answer": answer}])
    train = _open(source("local", path=path), smollm, tmp_path).train
    assert supervised(smollm, train, 0) == [answer + "<|im_end|>"]
