"""A run's data are known by their tokens; by what went into them where an older dsft began the run."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

from dsft.cache import sealed
from dsft.data.cache import CONTENTS, content_digests, digest_of, tokenizer_identity
from dsft.data.open import open_data
from tests.unit.data.conftest import CHATML
from tests.unit.data.turns import CHATS

ROWS = [{"question": f"q{i}", "answer": f"answer {i}"} for i in range(20)]
DATED = "{{ strftime_now('%Y-%m-%d') }}" + CHATML


@pytest.fixture
def opened(chatml: Any, tmp_path: Path) -> Any:
    def door(source: Any, *, tokenizer: Any = chatml, cache: str = "cache", seed: int = 0, **keys: Any) -> Any:
        keys = {"max_length": 200, **keys}
        return open_data(source, tokenizer, seed=seed, cache_dir=tmp_path / cache, **keys)

    return door


def test_inputs_are_told_apart_by_all_that_decides_the_tokens(
    opened: Any, source: Any, jsonl: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    local = source("local", path=jsonl(ROWS))
    other_template = make_tokenizer(CHATML.replace("'\n' }}{% endfor", "'\n\n' }}{% endfor"))
    different = [
        opened(local),
        opened(local, tokenizer=other_template),
        opened(source("local", path=local.path, system="Hi")),
        opened(source("local", path=local.path, eval_fraction=0.3)),
        opened(source("local", path=local.path, eval_fraction=0.3), seed=1),
        opened(source("local", path=jsonl(ROWS[:-1]))),
    ]
    jsonl(ROWS)
    for digests in ([data.inputs for data in different], [data.digest for data in different]):
        assert len(set(digests)) == len(digests)
    shorter = opened(local, max_length=199)
    assert shorter.inputs != different[0].inputs
    assert shorter.digest == different[0].digest, "the same tokens"
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (moved / "rows.jsonl").write_bytes(Path(local.path).read_bytes())
    again = opened(source("local", path=str(moved / "rows.jsonl")), seed=9, cache="another")
    assert (again.inputs, again.digest) == (different[0].inputs, different[0].digest)


def test_the_digest_of_inputs_is_what_older_run_folders_hold(opened: Any, source: Any, jsonl: Any, chatml: Any) -> None:
    local = source("local", path=jsonl(ROWS))
    parts = {"version": 2, "source": local.identity(), "eval": [None, 0.0, None], "max_length": 200}
    assert opened(local).inputs == digest_of({**parts, "tokenizer": tokenizer_identity(chatml)})


GOLDEN = {
    "messages": (
        [{"messages": CHATS[name]} for name in ("single", "several", "system")],
        "ad947c91b757c8ea614aeec6d2d91992b22f63290e606547b05fe4b1afc88dc7",
    ),
    "text": (
        [{"text": f"word {i}"} for i in range(5)],
        "4a3f08daa4ece8c360af20e7d63e9d8628fdd6c350cb2be5d26676394452e7e8",
    ),
}
"""Rows, and the digest that a run folder made before pairs, labels and weights holds of their tokens."""


@pytest.mark.parametrize("kind", GOLDEN)
def test_tokens_of_single_texts_are_those_of_older_run_folders(kind: str, opened: Any, source: Any, jsonl: Any) -> None:
    rows, digest = GOLDEN[kind]
    data = opened(source("local", path=jsonl(rows), eval_fraction=0.4 if kind == "text" else 0.0))
    assert data.digest == digest
    assert "equal_sides" not in (data.train.folder / "set.json").read_text()
    assert set(json.loads((data.train.folder.parent / "audit.json").read_text())) == {
        "overlap", "example", "unread", "top_token",
    }  # fmt: skip


def test_one_changed_byte_of_any_file_is_named_and_the_tokens_are_made_anew(
    opened: Any, source: Any, jsonl: Any, capsys: Any
) -> None:
    held = jsonl([{"question": "q", "answer": "a"}], "held.jsonl")
    local = source("local", path=jsonl(ROWS), eval_path=held, verify="exact")
    data = opened(local)
    folder = data.train.folder.parent
    written = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    parts = {"tokens", "mask", "offsets", "prompts", "supervised", "sources", "rows", "names"}
    digests = content_digests(folder)
    assert set(digests) == {f"{part}/{name}" for part in ("train", "eval") for name in parts} | {"eval/answers"}
    assert data.digest == digest_of(digests)
    assert capsys.readouterr().err == ""
    for path, whole in written.items():
        for at in {len(whole) - 1, 9} if path.stem == "tokens" else {len(whole) - 1}:  # 9: of its header
            path.write_bytes(whole[: max(at, 0)] + bytes([whole[at] ^ 1]) + whole[at + 1 :] if whole else b"x")
            assert opened(local).digest == data.digest
            told = capsys.readouterr().err
            assert told.startswith(f"dsft: the token cache {folder} is made anew: "), path
            assert told.count("\n") == 1
            assert path.stem in told or path.name == sealed.FILE, told
            assert {each: each.read_bytes() for each in written} == written
    (folder / "train" / "more.npy").touch()
    opened(local)
    assert "train/more.npy is not as it was written" in capsys.readouterr().err


def test_the_digest_of_tokens_is_of_the_bytes_that_are_there(opened: Any, source: Any, jsonl: Any) -> None:
    """Whoever writes digests that fit beside other tokens has a run that names those tokens."""
    local = source("local", path=jsonl(ROWS))
    data = opened(local)
    folder = data.train.folder.parent
    (folder / "train" / "mask.npy").write_bytes(_last_bit((folder / "train" / "mask.npy").read_bytes()))
    sealed.seal(folder, CONTENTS)
    other = opened(local)
    assert other.inputs == data.inputs
    assert other.digest == digest_of(content_digests(folder)) != data.digest


def test_who_comes_after_another_reads_no_more_than_it_needs(opened: Any, source: Any, jsonl: Any) -> None:
    local, turns = source("local", path=jsonl(ROWS)), list[str]()
    first = opened(local)
    mask = first.train.folder / "mask.npy"
    mask.write_bytes(_last_bit(mask.read_bytes()))
    later = opened(local, after=lambda: turns.append("waited"))
    assert (turns, later.digest) == (["waited"], first.digest)
    assert opened(local).train.arrays["mask"].tobytes() != later.train.arrays["mask"].tobytes()


def _last_bit(content: bytes) -> bytes:
    at = len(content.rstrip(b"\n")) - 3 if content.endswith(b"\n") else len(content) - 1
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def test_the_date_is_fixed_by_the_first_start_and_decides_the_tokens(
    opened: Any, source: Any, jsonl: Any, make_tokenizer: Any
) -> None:
    local, tokenizer = source("local", path=jsonl([{"messages": CHATS["single"]}])), make_tokenizer(DATED)
    first = opened(local, tokenizer=tokenizer, day="2026-11-29")
    later = opened(local, tokenizer=tokenizer, day="2026-11-30")
    again = opened(local, tokenizer=tokenizer, day="2026-11-29", cache="another machine")
    assert first.inputs == later.inputs == again.inputs
    assert first.digest == again.digest != later.digest
    assert first.digests["template_date"] == "2026-11-29"
    assert first.notes == ["the chat template reads the date; it is fixed to 2026-11-29 for this run"]
    today = opened(local, tokenizer=tokenizer)
    assert today.day not in (None, "2026-11-29") or today.digest == first.digest
    undated = opened(local, day="2026-11-29")
    assert (undated.day, undated.notes, set(undated.digests)) == (None, [], {"data_digest", "tokens_digest"})


@pytest.mark.parametrize("answer", ["four", "\n\nfour", " 4"])
def test_a_model_is_asked_with_what_the_template_gives_it(
    answer: str, source: Any, jsonl: Any, smollm: Any, tmp_path: Path
) -> None:
    """The newline of the header and one that begins the answer are one token in training, and not in generation."""
    held = jsonl([{"question": "2+2", "answer": answer}], "held.jsonl")
    local = source("local", path=jsonl(ROWS), eval_path=held, verify="exact")
    data = open_data(local, smollm, max_length=200, seed=0, cache_dir=tmp_path)
    turns = [{"role": "user", "content": "2+2"}]
    given = smollm.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert data.eval.prompt(0).tolist() == given
    first = int(data.eval.arrays["prompts"][0])
    assert (data.eval.example(0)[0][:first].tolist() == given) == (not answer.startswith("\n"))


@pytest.mark.parametrize("package", ["jinja2", "tokenizers", "transformers"])
def test_another_version_of_what_renders_does_not_read_the_old_tokens(
    package: str, monkeypatch: Any, opened: Any, source: Any, jsonl: Any, tmp_path: Path
) -> None:
    local = source("local", path=jsonl(ROWS))
    old = opened(local)
    installed = importlib.metadata.version
    monkeypatch.setattr("dsft.data.cache.version", lambda name: "99" if name == package else installed(name))
    new = opened(local)
    assert len([path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()]) == 2
    assert (new.inputs, new.digest) == (old.inputs, old.digest)
