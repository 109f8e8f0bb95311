import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsft.data.batch import build_batch
from dsft.data.cache import digest_of, find_or_build
from dsft.data.open import open_data
from dsft.objective import IGNORE

GSM8K = Path(__file__).parents[4] / "shared" / "data" / "gsm8k"
ROWS = [{"question": f"q{i}", "answer": f"answer {i}"} for i in range(40)]


@pytest.fixture
def opened(chatml: Any, tmp_path: Path) -> Any:
    def door(source: Any, *, max_length: int = 200, seed: int = 0, tokenizer: Any = chatml) -> Any:
        return open_data(source, tokenizer, max_length=max_length, seed=seed, cache_dir=tmp_path / "cache")

    return door


def test_missing_file_is_refused_before_the_tokenizer_is_needed(source: Any) -> None:
    with pytest.raises(ValueError, match=r"data.path must be a file that exists"):
        open_data(source("local", path="nowhere.jsonl"), None, max_length=8, seed=0)  # type: ignore[arg-type]


def test_dropped_rows_are_counted_and_ids_keep_the_row(opened: Any, source: Any, jsonl: Any) -> None:
    rows = [ROWS[0], ROWS[0], {"question": "q", "answer": "long " * 50}, ROWS[1]]
    data = opened(source("local", path=jsonl(rows)))
    counts = data.audit.train
    assert (counts.rows, counts.kept, counts.duplicates, counts.over_long) == (4, 2, 1, 1)
    assert [data.train.id(i) for i in range(len(data.train))] == ["rows:0", "rows:3"]
    assert counts.tokens == int(data.train.lengths.sum())
    assert counts.supervised == int(data.train.supervised.sum()) == 2 * len("answer 0") + 2
    assert counts.share == counts.supervised / counts.tokens
    assert counts.truncated == 0


def test_conversations_without_an_answer_are_dropped_and_counted(opened: Any, source: Any, jsonl: Any) -> None:
    question = {"messages": [{"role": "user", "content": "?"}]}
    answered = {"messages": [*question["messages"], {"role": "assistant", "content": "!"}]}
    assert opened(source("local", path=jsonl([question, answered]))).audit.train.zero_mask == 1
    with pytest.raises(ValueError, match="must supervise at least one token, got a loss mask of zeros in all 1 rows"):
        opened(source("local", path=jsonl([question])))


def test_empty_answers_are_dropped_and_counted(opened: Any, source: Any, jsonl: Any) -> None:
    empty = {"question": "what?", "answer": ""}
    assert opened(source("local", path=jsonl([ROWS[0], empty]))).audit.train.zero_mask == 1
    with pytest.raises(ValueError, match="must supervise at least one token"):
        opened(source("local", path=jsonl([empty])))


def test_max_length_below_every_row_is_refused_with_the_shortest(opened: Any, source: Any, jsonl: Any) -> None:
    local = source("local", path=jsonl(ROWS))
    shortest = int(opened(local).train.lengths.min())
    with pytest.raises(ValueError, match=rf"train.max_length must be at least {shortest} .* got 10; all 40 rows"):
        opened(local, max_length=10)
    assert len(opened(local, max_length=shortest).train) == 10


def test_overlap_of_train_and_eval_is_counted(opened: Any, source: Any, jsonl: Any) -> None:
    data = opened(source("local", path=jsonl(ROWS[:5]), eval_path=jsonl(ROWS[3:8], "held.jsonl")))
    assert data.audit.overlap == 2
    assert data.audit.eval.kept == 5
    assert "2 also in train" in data.audit.lines()[1]


def test_eval_fraction_holds_rows_out_of_training(opened: Any, source: Any, jsonl: Any) -> None:
    local = source("local", path=jsonl(ROWS), eval_fraction=0.3)
    data, other = opened(local), opened(local, seed=1)
    train, held = ({part.id(i) for i in range(len(part))} for part in (data.train, data.eval))
    assert train | held == {f"rows:{i}" for i in range(40)}
    assert not train & held
    assert held != {other.eval.id(i) for i in range(len(other.eval))}


def test_eval_fraction_that_leaves_no_row_is_refused(opened: Any, source: Any, jsonl: Any) -> None:
    with pytest.raises(
        ValueError, match=r"the held-out data must hold at least one row, got none; change data.eval_frac"
    ):
        opened(source("local", path=jsonl(ROWS[:3]), eval_fraction=0.001))


def test_max_eval_uses_the_first_held_out_rows(opened: Any, source: Any, jsonl: Any) -> None:
    data = opened(source("local", path=jsonl(ROWS[:5]), eval_path=jsonl(ROWS, "held.jsonl"), max_eval=7))
    assert [data.eval.id(i) for i in range(len(data.eval))] == [f"held:{i}" for i in range(7)]


def test_held_out_answers_are_verified(opened: Any, source: Any, jsonl: Any) -> None:
    path, held = jsonl(ROWS[:5]), jsonl(ROWS[5:8], "held.jsonl")
    data = opened(source("local", path=path, eval_path=held, verify="exact"))
    assert data.verifiable == (0, 1, 2)
    assert (data.eval.reference(1), data.verify(1, "answer 6 "), data.verify(1, "answer 5")) == ("answer 6", 1.0, 0.0)
    assert opened(source("local", path=path, eval_path=held)).verifiable == ()


def test_prompt_and_reference_of_a_generated_task(opened: Any, source: Any, chatml: Any) -> None:
    pytest.importorskip("reasoning_gym")
    data = opened(source("reasoning_gym", size=8, eval_size=4))
    for index in range(len(data.eval)):
        tokens = data.eval.example(index)[0].tolist()
        prompt = data.eval.prompt(index).tolist()
        assert chatml.decode(prompt).endswith("<|im_start|>assistant\n")
        assert chatml.decode(tokens[len(prompt) :]) == data.eval.reference(index) + "<|im_end|>\n"
        assert data.verify(index, data.eval.reference(index)) == 1.0
    assert data.eval.id(0) == "chain_sum.eval:0"


def test_cache_is_read_and_gives_the_same(opened: Any, source: Any, jsonl: Any, tmp_path: Path) -> None:
    local = source("local", path=jsonl(ROWS), eval_fraction=0.2)
    first = opened(local)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")}
    again = opened(local)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")}
    assert (again.digest, again.audit) == (first.digest, first.audit)
    assert isinstance(again.train.arrays["tokens"], np.memmap)


def test_failed_build_leaves_no_cache(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        find_or_build(tmp_path / "tokens" / "d", fail)
    assert not (tmp_path / "tokens" / "d").exists()
    built = find_or_build(tmp_path / "tokens" / "d", lambda folder: (folder / "whole").touch())
    assert sorted(path.name for path in built.iterdir()) == ["sealed.json", "whole"]


def test_processes_that_start_together_build_once(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from dsft.data.cache import find_or_build\n"
        "def build(folder):\n"
        "    (folder / 'by').write_text(str(os.getpid())); time.sleep(0.5)\n"
        f"print((find_or_build(Path({str(tmp_path / 'd')!r}), build) / 'by').read_text())"
    )
    starts = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    builders = {process.communicate(timeout=60)[0] for process in starts}
    assert len(builders) == 1
    assert all(process.returncode == 0 for process in starts)


def test_unwritable_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="DSFT_CACHE must be a folder that can be written"):
        find_or_build(tmp_path / "file" / "tokens" / "d", lambda folder: None)


def test_identity_that_is_not_plain_data_is_an_error() -> None:
    with pytest.raises(TypeError):
        digest_of({"a": object()})


def test_coloured_example_shows_the_mask(opened: Any, source: Any, jsonl: Any) -> None:
    text = opened(source("local", path=jsonl(ROWS))).audit.coloured()
    green = [text.plain[span.start : span.end] for span in text.spans if span.style == "green"]
    assert green == ["answer 0<|im_end|>"]


def test_batch_targets_are_the_next_supervised_token(opened: Any, source: Any, jsonl: Any) -> None:
    train = opened(source("local", path=jsonl(ROWS))).train
    batch = build_batch(train, [3, 0, 3])
    assert batch.ids == ("rows:3", "rows:0", "rows:3")
    start = 0
    for row, length in zip([3, 0, 3], batch.lengths, strict=True):
        tokens, mask = train.example(row)
        expected = [int(tokens[t + 1]) if mask[t + 1] else IGNORE for t in range(length - 1)] + [IGNORE]
        assert batch.targets[start : start + length].tolist() == expected
        assert batch.tokens[start : start + length].tolist() == tokens.tolist()
        assert batch.positions[start : start + length].tolist() == list(range(length))
        start += length
    assert int((batch.targets != IGNORE).sum()) == int(train.supervised[[3, 0, 3]].sum())
    silent = build_batch(train, [3], silent=True)
    assert silent.tokens.tolist() == train.example(3)[0].tolist()
    assert not silent.counts
    assert torch.equal(silent.targets, build_batch(train, [3]).targets)


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not beside the checkout")
def test_gsm8k_opens_in_seconds_and_again_at_once(smollm: Any, source: Any, tmp_path: Path) -> None:
    local = source("local", path=str(GSM8K / "test.jsonl"))
    data = open_data(local, smollm, max_length=1024, seed=0, cache_dir=tmp_path)
    assert data.audit.train.kept == 1319
    start = time.process_time()
    open_data(local, smollm, max_length=1024, seed=0, cache_dir=tmp_path)
    assert time.process_time() - start < 2  # seconds; hashing and mapping take 0.1
    with pytest.raises(ValueError, match=r"got preference pairs .*preferences\.jsonl:1"):
        source("local", path=str(GSM8K / "preferences.jsonl")).check()
