"""Numbers of model.config: those that transformers cannot build or run are one line."""

from typing import Any

import pytest
import yaml

from dsft.models.numbers import config_of
from dsft.wording import OWN_CONF

SHAPES = {path.stem: yaml.safe_load(path.read_text())["config"] for path in (OWN_CONF / "model").glob("*.yaml")
          if "config:" in path.read_text() and path.stem != "custom"}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_of_ours_is_taken(name: str) -> None:
    assert config_of(SHAPES[name]).model_type == SHAPES[name]["model_type"]


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ({"hidden_size": 63}, "not a multiple"),
        ({"hidden_size": "abc"}, "abc"),
        ({"num_attention_heads": 3}, "not a multiple"),
        ({"num_key_value_heads": 3}, "must match the size"),
        ({"vocab_size": 10}, "Padding_idx"),
        ({"model_type": "gpt3"}, "got 'gpt3'; did you mean gptj?"),
        ({"model_type": ""}, "got ''; such as llama"),
        ({"model_type": "t5"}, "got 't5'; such as llama"),
    ],
)
def test_numbers_of_which_there_is_no_model_are_one_line(
    numbers: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        config_of({**SHAPES["tiny"], **numbers})
    assert str(caught.value).startswith("model.config")
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().err == ""
