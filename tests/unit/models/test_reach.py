"""Positions that a model knows: a configuration that sets no end of them has a place for every token."""

import pytest
from transformers import AutoConfig

from dsft.compose import compose
from dsft.models.files import ModelFiles
from dsft.models.reach import reach
from dsft.plan import check_positions


@pytest.mark.parametrize(("model_type", "known"), [("xlnet", None), ("mamba", None), ("llama", 2048)])
def test_positions_have_an_end_where_the_configuration_sets_one(model_type: str, known: int | None) -> None:
    config = AutoConfig.for_model(model_type)
    files = ModelFiles(
        config=config, folder=None, name_or_path="m", init="random", revision=None, trust_remote_code=False
    )
    check_positions(compose(["method=lora", "run_dir=none"]).run, files)
    assert reach(config) == known
