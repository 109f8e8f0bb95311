"""Results of families that tiny and tiny_moe do not resemble: whole, as their own class reads them, and shown to be."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dsft.compared import compare, digest_of
from dsft.compose import compose
from dsft.data.open import Dataset, open_data
from dsft.engine.assemble import Session, assemble
from dsft.engine.probe import probe_row, write_probe
from dsft.engine.result import write_result
from dsft.export import merged
from dsft.published import PROBE
from tests.contract.sessions import ALONE, train
from tests.families import write_family

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("families")
    return {name: write_family(place / name, name) for name in ("deepseek_v3", "glm4_moe", "afmoe")}


def session_on(folder: Path, *words: str) -> tuple[Session, Dataset]:
    run = compose([
        "model=custom", f"model.path={folder}", "data=reasoning_gym", "data.size=32", "data.eval_size=0",
        "train.precision=fp32", "train.steps=2", "train.global_batch_size=4", "launcher=local", "strategy=single",
        "optim.lr=1e-3", "optim.schedule=constant", *words,
    ]).run  # fmt: skip
    files = run.model.resolve()
    data = open_data(run.data, files.tokenizer(), max_length=512, seed=0)
    return assemble(run, files, ALONE), data


def _written(session: Session, data: Dataset, place: Path) -> None:
    """The result, and what the live model leaves for its comparison."""
    digest = write_result(session, place)
    write_probe(session, probe_row(session.model.config, data.train, 512, 0), place / PROBE, digest)


def _zero_the_bias(place: Path, *, unnoticed: bool) -> None:
    """Plant a router without its correction bias in the files; unnoticed: with a digest that says so."""
    (file,) = place.glob("model-*.safetensors")
    tensors = load_file(file)
    tensors[BIAS] = torch.zeros_like(tensors[BIAS])
    save_file(tensors, file, metadata={"format": "pt"})
    if unnoticed:
        save_file(load_file(place / PROBE), place / PROBE, metadata={"digest": digest_of(place)[0]})


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("deepseek_v3", ("method=full", "train.precision=bf16")),
        ("deepseek_v3", ("method=full",)),
        ("glm4_moe", ("method=freeze", "method.trainable=[1,norms]", "train.precision=bf16")),
        ("deepseek_v3", ("method=qat", "method.scheme=int8")),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_whole_result_holds_the_buffers_of_its_base(
    family: str, words: tuple[str, ...], folders: dict[str, Path], tmp_path: Path
) -> None:
    session, data = session_on(folders[family], *words)
    train(session, data, 1)
    place = tmp_path / "result"
    _written(session, data, place)
    base = load_file(folders[family] / "model.safetensors")[BIAS]
    with safe_open(place / "model-00001.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor(BIAS), base)
        assert file.get_tensor(BIAS).dtype == base.dtype == torch.float32
    found = compare(session.run, place)
    assert (found["same"], found["different"], found["bound"]) == (True, None, 5e-2 if "bf16" in words[-1] else 1e-4)
    _zero_the_bias(place, unnoticed=False)
    found = compare(session.run, place)
    assert found["same"] is False
    assert found["different"].startswith("other tensors: digest ")
    _zero_the_bias(place, unnoticed=True)
    found = compare(session.run, place)
    assert found["same"] is False
    assert found["different"].startswith("other scores of experts: scores_off 0.")


def test_a_merged_export_keeps_the_type_of_a_buffer(folders: dict[str, Path], tmp_path: Path) -> None:
    session, data = session_on(folders["deepseek_v3"], "method=lora", "train.precision=bf16")
    train(session, data, 1)
    write_result(session, tmp_path)
    found = merged(session.run, tmp_path).state_dict()
    assert torch.equal(found[BIAS], load_file(folders["deepseek_v3"] / "model.safetensors")[BIAS])
    assert {value.dtype for name, value in found.items() if name != BIAS} == {torch.bfloat16}


def test_a_result_without_a_tensor_of_its_model_is_not_given(folders: dict[str, Path], tmp_path: Path) -> None:
    session, _ = session_on(folders["deepseek_v3"], "method=full")
    gate = session.model.get_submodule(BIAS.rpartition(".")[0])
    gate._non_persistent_buffers_set.add(BIAS.rpartition(".")[2])  # so that nobody writes it
    with pytest.raises(RuntimeError, match=f"does not hold the model that was trained: .*got none for {BIAS}"):
        write_result(session, tmp_path)
    gate._buffers["more"] = torch.zeros(3)
    gate._non_persistent_buffers_set.clear()
    with pytest.raises(RuntimeError, match=r"holds model\.layers\.1\.mlp\.gate\.more, for which the model"):
        write_result(session, tmp_path)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("deepseek_v3", ("method=lora",)),
        ("deepseek_v3", ("method=lora", "method.target_modules=mlp", "method.dropout=0.1")),
        ("glm4_moe", ("method=pissa", "method.rank=4")),
        ("glm4_moe", ("method=vera",)),
        ("afmoe", ("method=lora", "method.target_modules=attention")),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_an_adapter_lands_on_the_linears_that_were_chosen_here_and_elsewhere(
    family: str, words: tuple[str, ...], folders: dict[str, Path], tmp_path: Path
) -> None:
    session, data = session_on(folders[family], *words)
    role = words[1].partition("target_modules=")[2] if len(words) > 1 else ""
    chosen = {name for name, of in session.anatomy.linears.items() if role in ("", of)}
    assert {name.partition(".lora_")[0].partition(".vera_")[0] for name in _learning(session)} == chosen
    train(session, data, 1)
    _written(session, data, tmp_path)
    elsewhere = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders[family]), tmp_path)
    adapted = {
        name for name, module in elsewhere.base_model.model.named_modules() if isinstance(module, BaseTunerLayer)
    }
    assert adapted == chosen
    assert compare(session.run, tmp_path)["different"] is None


def test_what_no_loader_would_read_of_such_linears_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(
        ValueError, match=r"^method.target_modules must not name down_proj with this method .*deepseek_v3"
    ):
        session_on(folders["deepseek_v3"], "method=dora")
    session_on(folders["deepseek_v3"], "method=dora", "method.target_modules=attention")


def _learning(session: Session) -> list[str]:
    return [name for name, param in session.model.named_parameters() if param.requires_grad]
