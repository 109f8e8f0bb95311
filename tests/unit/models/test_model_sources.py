import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
import torch

from dsft.models.anatomy import dissect
from dsft.models.build import build_meta, persistent_buffers
from dsft.models.cache import written_once
from dsft.models.files import ModelFiles
from dsft.models.headers import read_headers
from dsft.models.source import Pretrained
from dsft.models.values import open_values

PUBLISHED = {
    "llama8b": 8_030_261_248,
    "llama70b": 70_553_706_496,
    "qwen3_8b": 8_190_735_360,
    "qwen3_32b": 32_762_123_264,
    "mixtral8x7b": 46_702_792_704,
    "qwen3_30b_a3b": 30_532_122_624,
    "gpt_oss_20b": 20_914_757_184,
    "deepseek_v2_lite": 15_706_484_224,
}
"""Parameters as the model cards give them."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers_give_the_published_size_without_the_hub(name: str, source: Callable) -> None:
    files = source(name).resolve(planning=True)
    model = build_meta(files, torch.bfloat16)
    assert sum(param.numel() for param in model.parameters()) == PUBLISHED[name]
    assert files.folder is None
    assert files.name_or_path == source(name).path


def test_the_tiny_deepseek_has_what_a_mixtral_has_not(source: Callable) -> None:
    model = build_meta(source("tiny_moe_v3").resolve(), torch.float32)
    anatomy = dissect(model)
    assert len(anatomy.experts) == len(anatomy.blocks) - 1
    assert {"mlp", "shared_experts", "attention"} == set(anatomy.linears.values())
    (name, *_) = persistent_buffers(model)
    values = open_values(source("tiny_moe_v3").resolve(), torch.float32, 0).full(name)
    assert values.unique().numel() == len(values)


@pytest.mark.parametrize("name", ["llama8b", "tiny", "smollm2_135m", "custom"])
def test_path_may_be_a_local_folder_for_every_option(name: str, source: Callable) -> None:
    tiny = source("tiny_moe").resolve()
    files = source(name, path=str(tiny.folder)).resolve()
    assert files.folder == tiny.folder
    assert files.name_or_path == str(tiny.folder)
    assert files.config.model_type == "mixtral"


def test_config_json_alone_is_enough_to_plan_and_for_random_weights(tmp_path: Path, source: Callable) -> None:
    shutil.copy(source("tiny").resolve().folder / "config.json", tmp_path)
    assert source("custom", path=str(tmp_path)).resolve(planning=True).config.hidden_size == 128
    random = source("custom", path=str(tmp_path), init="random")
    random.check()
    assert open_values(random.resolve(), torch.float32, 0).full("lm_head.weight").shape == (260, 128)
    with pytest.raises(ValueError, match=r"no \*\.safetensors"):
        source("custom", path=str(tmp_path)).check()
    with pytest.raises(ValueError, match="must have a tokenizer"):
        random.resolve().tokenizer()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: shutil.rmtree(folder), "does not exist"),
        (lambda folder: (folder / "config.json").unlink(), "without one"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a model's configuration"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no \\*.safetensors"),
    ],
)
def test_a_spoilt_folder_is_refused_in_one_line(
    tmp_path: Path, source: Callable, spoil: Callable[[Path], None], reason: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(source("tiny").resolve().folder, folder)
    spoil(folder)
    with pytest.raises(ValueError, match=reason) as caught:
        source("custom", path=str(folder)).check()
    assert str(caught.value).startswith("model.path")
    assert "\n" not in str(caught.value)


def test_a_quantized_folder_is_refused(tmp_path: Path, source: Callable) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantized with gptq"):
        source("custom", path=str(tmp_path)).check()


def test_checking_a_folder_loads_no_torch(source: Callable) -> None:
    code = (
        "import sys; from dsft.models.source import Pretrained; "
        "Pretrained(path=sys.argv[1], init='pretrained', revision=None, trust_remote_code=False, "
        "config_of=None, config=None).check(); print('torch' in sys.modules)"
    )
    folder = source("tiny").resolve().folder
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_an_unreachable_hub_is_one_line_with_the_way_out(source: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="must be a local folder or whole in the hub's cache, got dsft-no") as caught:
        source("custom", path="dsft-no-such-name/no-such-model").resolve()
    assert "\n" not in str(caught.value)
    assert "stage it first" in str(caught.value)


def test_weights_that_are_not_there_are_refused(source: Callable) -> None:
    files = source("llama8b").resolve(planning=True)
    with pytest.raises(ValueError, match="got only its shape"):
        open_values(files, torch.bfloat16, 0)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) - 100] ^= 1
    file.write_bytes(content)


def test_digest_and_fingerprint_follow_the_bytes_and_not_the_place(tmp_path: Path, source: Callable) -> None:
    tiny = source("tiny").resolve()
    shutil.copytree(tiny.folder, tmp_path / "copy")
    copied = source("custom", path=str(tmp_path / "copy"))
    others = [source("tiny", init="random").resolve(), source("tiny_moe").resolve()]
    for of in (ModelFiles.digest, ModelFiles.fingerprint):
        assert of(copied.resolve()) == of(tiny)
        assert of(tiny) not in [of(other) for other in others]
    (tmp_path / "copy" / "modeling.py").write_text("pass")
    assert copied.resolve().fingerprint() == tiny.fingerprint()
    with_code = copied.resolve().digest()
    (tmp_path / "copy" / "modeling.py").write_text("quit")
    assert len({with_code, copied.resolve().digest(), tiny.digest()}) == 3
    (tmp_path / "copy" / "modeling.py").unlink()
    _flip(tmp_path / "copy" / "model.safetensors")
    for of in (ModelFiles.digest, ModelFiles.fingerprint):
        assert of(copied.resolve()) != of(tiny)


def test_a_byte_between_the_samples_of_a_fingerprint_is_in_the_digest(big: Callable) -> None:
    base = big("gpt2")
    quick, whole = base.fingerprint(), base.digest()
    assert base.unread < 2**20
    _flip(base.folder / "model.safetensors")
    assert base.unread > 2**26
    assert base.fingerprint() == quick
    assert base.digest_at_once() == base.digest() != whole, "it is another file than the one that was known"


def test_a_large_base_that_nobody_knows_is_not_read_at_once(big: Callable) -> None:
    base = big("gpt2")
    assert base.digest_at_once() is None
    assert base.digest() == base.digest_at_once()


@pytest.mark.parametrize("model", ["tiny", "tiny_moe"])
def test_one_changed_byte_of_an_unpacked_model_makes_it_anew(
    model: str, source: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("DSFT_CACHE", str(tmp_path))
    files = source(model).resolve()
    written = {path: path.read_bytes() for path in files.folder.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "config.json", "sealed.json"} <= {path.name for path in written}
    for path in written:
        capsys.readouterr()
        assert source(model).resolve() == files
        assert capsys.readouterr().err == ""
        _flip(path)
        source(model).resolve()
        told = capsys.readouterr().err
        assert f"{files.folder} is made anew: " in told
        assert path.name in told or path.name == "sealed.json", told
        assert {each: each.read_bytes() for each in files.folder.iterdir()} == written


def test_many_that_start_together_write_the_cache_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSFT_CACHE", str(tmp_path))
    calls: list[Path] = []

    def write(folder: Path) -> None:
        calls.append(folder)
        (folder / "file").write_text("whole")

    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: written_once("name", write), range(8)))
    assert len(calls) == 1
    assert {(folder / "file").read_text() for folder in folders} == {"whole"}


def test_any_rank_that_comes_first_writes_the_whole_model(
    source: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    monkeypatch.setenv("DSFT_CACHE", str(tmp_path))
    torch.distributed.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        files = source("tiny_moe").resolve()
    finally:
        torch.distributed.destroy_process_group()
    assert set(read_headers(files.folder)) >= {"lm_head.weight", "model.embed_tokens.weight"}


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSFT_CACHE", str(tmp_path))

    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        written_once("name", fail)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".name.lock"]


def test_code_that_is_no_tokenizer_is_refused(source: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(source("tiny").resolve().folder, folder)
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}')
    (folder / "own.py").write_text(
        "class Own:\n    @classmethod\n    def from_pretrained(cls, *a, **k):\n        return cls()\n"
        "    @classmethod\n    def register_for_auto_class(cls):\n        pass\n"
    )
    model = Pretrained(
        path=str(folder), init="pretrained", revision=None, trust_remote_code=True, config_of=None, config=None
    )
    with pytest.raises(ValueError, match=r"must have a tokenizer, got none .*Own"):
        model.resolve().tokenizer()


def test_the_byte_tokenizer_gives_any_text_back(source: Callable) -> None:
    tokenizer = source("tiny").resolve().tokenizer()
    text = "".join(map(chr, range(300))) + " \u4e2d\U0001f600\n\t  x"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("A\n")["input_ids"] == [65, 10]
    assert len(tokenizer) == 260
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(chat)["input_ids"][0] == 258
