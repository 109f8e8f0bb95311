"""Files of somebody else's folder that would leave it, fill the memory, never end, or run in a spreadsheet."""

import io
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dsft import export, folder, origin, published, results
from dsft.compose import dump_yaml, load_yaml
from dsft.methods import peft_targets
from dsft.methods.patterns import check_config, check_pattern
from dsft.models.anatomy import dissect
from dsft.models.files import check_folder
from dsft.sweeps import ledger
from dsft.sweeps.ledger import Entry
from dsft.sweeps.standing import Standing
from dsft.sweeps.table import write_csv
from dsft.telemetry.record import read_lines, read_status

ROOT = Path(__file__).parents[2]
NOBODY = 65534


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that is done, by what its folder says."""
    place = tmp_path / "run"
    (place / "adapter" / "below").mkdir(parents=True)
    (place / "config.yaml").write_text("a: 1\n")
    (place / "status.json").write_text(json.dumps({"state": "done", "step": 1}))
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md", "below/more.json"):
        (place / "adapter" / name).write_text("ours")
    published.describe(place / "adapter")
    (tmp_path / "key").write_text("private")
    return place


def copied(run_dir: Path, out: Path) -> set[str]:
    export._copy(run_dir / "adapter", out)
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}


def test_what_is_not_of_the_result_stays_behind_and_is_named(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = {"adapter_model.safetensors", "adapter_config.json", "README.md", "below/more.json", published.FOUND}
    (run_dir / "adapter" / "notes.txt").symlink_to(tmp_path / "key")
    (run_dir / "adapter" / "other.safetensors").write_text("of somebody")
    (run_dir / "adapter" / "folder").symlink_to(tmp_path)
    assert copied(run_dir, tmp_path / "out") == written
    assert capsys.readouterr().out == (
        "note         not of the result, and left out: folder, notes.txt, other.safetensors\n"
    )


@pytest.mark.parametrize("name", ["README.md", "below/more.json", "below"])
def test_a_file_of_the_result_that_is_a_link_is_refused(name: str, run_dir: Path, tmp_path: Path) -> None:
    place = run_dir / "adapter" / name
    place.rename(tmp_path / "moved")
    place.symlink_to(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"RUN must hold its whole result in files of its own, got .* that is none"):
        copied(run_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_list_that_names_files_elsewhere_exports_none_of_them(run_dir: Path, tmp_path: Path) -> None:
    found = json.loads((run_dir / "adapter" / published.FOUND).read_text())
    found["files"] |= {"../../key": {"size": 7, "sha256": "0"}, str(tmp_path / "key"): {"size": 7, "sha256": "0"}}
    (run_dir / "adapter" / published.FOUND).write_text(json.dumps(found))
    assert "key" not in {Path(name).name for name in copied(run_dir, tmp_path / "out")}


def test_an_older_result_without_a_list_gives_its_plain_files(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "adapter" / published.FOUND).unlink()
    (run_dir / "adapter" / "evil.py").write_text("")
    assert copied(run_dir, tmp_path / "out") == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    (run_dir / "adapter" / "notes.txt").symlink_to(tmp_path / "key")
    with pytest.raises(ValueError, match="that is none"):
        copied(run_dir, tmp_path / "again")


def test_the_path_of_a_local_base_does_not_travel(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / 'my "base'
    base.mkdir()
    adapter, out = run_dir / "adapter", tmp_path / "out"
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base), "r": 8}))
    (adapter / "README.md").write_text(f"from_pretrained({base})")
    save_file({"a": torch.zeros(2)}, adapter / "adapter_model.safetensors")
    published.describe(adapter)
    (run_dir / "plan.json").write_text(json.dumps({"model": str(base)}))
    known = {"base_fingerprint": "f" * 64, "base_digest": "0123456789abcdef" * 4}
    (run_dir / "provenance.json").write_text(json.dumps(known))
    export._copy(adapter, out)
    export._name_by_digest(run_dir, out)
    name = 'my "base@0123456789abcdef'
    assert json.loads((out / "adapter_config.json").read_text()) == {"base_model_name_or_path": name, "r": 8}
    assert (out / "README.md").read_text() == f"from_pretrained({name})"
    assert capsys.readouterr().out == f"note         the base is called {name} there; --with-base-path gives its path\n"
    assert list(published.damages(out, contents=True)) == []
    assert origin.same_name(name, str(base)), "method.init_from takes it on that base, by its name"
    assert not origin.same_name(name, "/elsewhere/another")
    with pytest.raises(ValueError, match=r"RUN must name a base that can be found, got my .base@0123456789abcdef"):
        results.find([out])


@pytest.mark.parametrize("aliases", [True, False])
def test_anchors_in_a_yaml_of_a_folder_are_refused_at_once(aliases: bool, tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)] if aliases else []
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"config\.yaml must be without anchors and aliases .* got one in line 1"):
        load_yaml(tmp_path / "config.yaml")


def test_stars_and_ampersands_in_texts_are_no_anchors(tmp_path: Path) -> None:
    tree = {"a": ["*.q_proj.*", "&b", "a & b * c", "*"], "*": 1}
    (tmp_path / "config.yaml").write_text(dump_yaml(tree))
    assert load_yaml(tmp_path / "config.yaml") == tree


ENDLESS = [
    r"([\w.]+)+X", r"(a|a)*X", r"(a*)*X", r"(\w+\.?)+X", r"((a?){9}){9}X", "a?" * 30 + "a" * 30, r".*.*.*.*.*.*X",
    r"(.)\1", "(" * 300 + ")" * 300 + "*" * 2, "x" * 2000, r"(?:ab|a)+X", r"(?=(\w+)+X)", r"(?>(\w|ab)+)X",
    "(a|aa)" * 30 + "X",
]  # fmt: skip


@pytest.mark.parametrize("pattern", ENDLESS, ids=range(len(ENDLESS)))
def test_an_expression_that_may_not_end_is_refused_wherever_it_comes_from(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"that ends soon|at most 1000 characters|no regular expression") as refusal:
        check_pattern("method.target_modules", pattern)
    assert len(str(refusal.value)) < 400
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        with pytest.raises(ValueError, match=f"^{key} in theirs"):
            check_config({key: pattern}, "theirs")
    for key in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(ValueError, match=f"^{key} in theirs"):
            check_config({key: {pattern: 8}}, "theirs")


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q_proj|v_proj)$", r"(.*\.)?layers\.(0|1|2)\.self_attn\.\w+", r"^(?!.*lora).*q_proj$",
        r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj", r".*layers\.([0-9]|1[0-5])\..*_proj",
        r"(?i).*(attn|attention).*", r"(ab){2}c{1,3}", "q_proj",
        r"(.*\.)?layers\.(\d+)\.(self_attn|cross_attn)\.(q|k)_proj.*",
    ],
)  # fmt: skip
def test_expressions_of_honest_people_stay(pattern: str) -> None:
    check_pattern("method.target_modules", pattern)
    check_config({"target_modules": [pattern, "q_proj"], "rank_pattern": {pattern: 1}, "exclude_modules": None}, "x")


def test_the_worst_that_is_taken_ends() -> None:
    """Without a limit: hours."""
    for pattern in (r"\w*[\w.]*.*q?q?q?X", "q?" * 21 + "X"):
        check_pattern("k", pattern)
        assert re.fullmatch(pattern, "model.layers.10.self_attn." + "q" * 60) is None


def test_a_target_is_refused_before_it_is_matched(tiny: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"method\.target_modules must be an expression that ends soon"):
        peft_targets.resolve_targets(r"([\w.]+)+X", tiny, dissect(tiny))


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1, num_key_value_heads=1))


def test_a_table_holds_no_formula(tmp_path: Path) -> None:
    book = ledger.begin("loss")
    for index, word in enumerate(["+launcher.extra.comment==cmd|'/c calc'!A0", "optim.lr=-1e-4", "a=@SUM(1)"]):
        book.put(index, Entry([word, f"b={index}"], None), keep=False)
    points = [Standing(index, tmp_path, "failed", 1, "=HYPERLINK(1)", None) for index in range(3)]
    write_csv(book, points, "loss", out := io.StringIO())
    cells = [cell for line in out.getvalue().splitlines() for cell in line.split(",")]
    assert "'+launcher.extra.comment" in cells
    assert "'=cmd|'/c calc'!A0" in cells
    assert "'=HYPERLINK(1)" in cells
    assert "'@SUM(1)" in cells
    assert "-1e-4" in cells
    assert not [cell for cell in cells if cell.startswith(("=", "+", "@"))]


DEEP = "[" * 200_000
LONG = json.dumps({"a": 0}).replace("0", "9" * 5000)


@pytest.mark.parametrize("text", [DEEP, LONG], ids=["deep", "long"])
def test_files_of_numbers_without_end_and_of_200_000_brackets_are_named(text: str, tmp_path: Path) -> None:
    for name in ("status.json", "sweep.json", "config.json", "verified.json", "metrics.jsonl"):
        (tmp_path / name).write_text(f"{text}\n")
    for read in (
        lambda: folder.state(tmp_path), lambda: read_status(tmp_path), lambda: ledger.read(tmp_path),
        lambda: check_folder(tmp_path, weights=False), lambda: results._json(tmp_path / "config.json"),
        lambda: read_lines(tmp_path / "metrics.jsonl"),
    ):  # fmt: skip
        with pytest.raises((ValueError, RuntimeError), match=str(tmp_path)) as refusal:
            read()
        assert not isinstance(refusal.value, RecursionError)
        assert len(str(refusal.value)) < 600
    assert list(published.damages(tmp_path, contents=False)) == [("verified.json", "damaged")]


SPOILT = {
    "the folder is another's": (lambda place: os.chown(place, NOBODY, NOBODY), "must be root's"),
    "so is a part": (lambda place: os.chown(place / "etc", NOBODY, NOBODY), "must be root's"),
    "so are the settings": (lambda place: os.chown(place / "etc/settings", NOBODY, NOBODY), "must be root's"),
    "all may write": (lambda place: place.chmod(0o777), "must not be writable by others"),
    "a group may": (lambda place: (place / "etc/settings").chmod(0o664), "must not be writable by others"),
    "a link": (
        lambda place: (place / "etc").rename(place / "x").parent.joinpath("etc").symlink_to("x"),
        "must not be a",
    ),
    "a command": (lambda place: (place / "etc/settings").write_text("touch PWNED\n"), "must hold settings alone"),
    "a value that is one": (
        lambda place: (place / "etc/settings").write_text("NODES=$(touch PWNED)\n"),
        "hold numbers",
    ),
    "another name": (lambda place: (place / "etc/settings").write_text("PATH=/evil\n"), "must hold settings alone"),
    "nothing": (lambda place: None, "munged: not running"),
}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, as the testbed does")
@pytest.mark.parametrize("what", SPOILT)
def test_the_testbed_obeys_no_folder_of_others(what: str) -> None:
    spoil, says = SPOILT[what]
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        (place / "etc").mkdir(mode=0o755)
        settings = "NODES=1\nCPUS=1\nMEM=1\nGPUS=0\nPORT=17900\nSACCT=0\nISOLATION=none\n"
        (place / "etc" / "settings").write_text(settings)
        (place / "etc" / "settings").chmod(0o644)
        spoil(place)
        command, env = [ROOT / "slurm" / "testbed", "status"], {**os.environ, "SLURM_TESTBED_DIR": made}
        done = subprocess.run(command, env=env, cwd=made, capture_output=True, text=True, check=False)
        assert says in done.stdout + done.stderr
        assert done.returncode == (3 if what == "nothing" else 1)
        assert not (place / "PWNED").exists()
