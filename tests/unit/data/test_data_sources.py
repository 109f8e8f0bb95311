from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsft.data.source import held_out

SMALL = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


@pytest.fixture
def gym(source: Any) -> Any:
    pytest.importorskip("reasoning_gym")
    return lambda **keys: source("reasoning_gym", **{"config": SMALL, "size": 60, "eval_size": 40, **keys})


def test_no_held_out_prompt_is_among_the_training_prompts(gym: Any) -> None:
    task = gym()
    train = [sample.messages[0]["content"] for sample in task.rows()]
    held = {sample.messages[0]["content"] for sample in task.eval_rows()}
    unfiltered = {sample.messages[0]["content"] for sample in gym(eval_size=0).rows()}
    assert len(train) == 60
    assert not held & set(train)
    assert held & unfiltered  # without the filter there would be a leak


def test_generated_rows_are_told_by_the_seed(gym: Any) -> None:
    assert list(gym().rows()) == list(gym().rows())
    assert [s.reference for s in gym().rows()] != [s.reference for s in gym(seed=1).rows()]


def test_own_verifier_judges_answers(gym: Any) -> None:
    task = gym()
    for sample in task.eval_rows():
        assert task.score(sample.entry, sample.reference, f" {sample.reference}\n") == 1.0
        assert task.score(sample.entry, sample.reference, sample.reference + "1") == 0.0


def test_held_out_share_of_a_task_is_judged_too(gym: Any) -> None:
    task = gym(eval_size=0, eval_fraction=0.5)
    sample = next(task.rows())
    assert task.score(sample.entry, sample.reference, sample.reference) == 1.0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"task": "chain_sums"}, r"data.task must be a task of reasoning_gym \(.*chain_sum .*got chain_sums"),
        ({"config": {"terms": 2}}, "data.config must hold options of chain_sum.*terms"),
        ({"config": {"min_terms": 0}}, "data.config must hold options of chain_sum"),
    ],
)
def test_unknown_task_or_option_is_refused_by_check(keys: Any, message: str, gym: Any) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        gym(**keys).check()
    assert "\n" not in str(caught.value)


def test_task_without_enough_items_is_refused(gym: Any) -> None:
    with pytest.raises(ValueError, match=r"data.size must be a number of items that chain_sum has besides"):
        list(gym(size=20, eval_size=5000).rows())


def test_hf_folder_gives_the_rows_of_its_splits(source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tiny"
    folder.mkdir()
    for split, count in (("train", 4), ("test", 2)):
        rows = [{"question": f"{split}{i}", "answer": str(i)} for i in range(count)]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
    loaded = source("hf", path=str(folder), eval_split="test")
    loaded.check()
    assert [f"{sample.source}:{sample.row}" for sample in loaded.rows()] == [f"tiny:{i}" for i in range(4)]
    assert [sample.messages[0]["content"] for sample in loaded.eval_rows()] == ["test0", "test1"]
    assert loaded.identity() == source("hf", path=str(folder), eval_split="test").identity()
    with pytest.raises(ValueError, match=r"data.path must be a dataset that loads, got .*split validation"):
        list(source("hf", path=str(folder), split="validation").rows())


def test_hf_folder_that_is_missing_is_refused_by_check(source: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.path must be a dataset id or a folder that exists"):
        source("hf", path=str(tmp_path / "nowhere")).check()


@pytest.fixture
def mixture(source: Any, jsonl: Any) -> Any:
    parts = {
        "one": source("local", path=jsonl([{"text": f"one {i}"} for i in range(30)], "x.jsonl")),
        "two": source("local", path=jsonl([{"text": f"two {i}"} for i in range(90)], "y.jsonl")),
    }
    return lambda **keys: source("mixture", **{"sources": parts, "weights": {"one": 1.0, "two": 2.0}, **keys})


def test_mixture_holds_the_weights_and_repeats_nothing(mixture: Any) -> None:
    samples = list(mixture().rows())
    assert Counter(sample.source for sample in samples) == {"one/x": 30, "two/y": 60}
    assert len({(sample.source, sample.row) for sample in samples}) == 90
    first = Counter(sample.source for sample in samples[:45])
    assert 5 <= first["one/x"] <= 25  # interleaved: 15 expected, hypergeometric deviation 2.2


def test_mixture_is_a_function_of_its_seed(mixture: Any) -> None:
    assert list(mixture().rows()) == list(mixture().rows())
    assert list(mixture().rows()) != list(mixture(seed=1).rows())
    assert mixture().identity() != mixture(weights={"one": 1.0, "two": 1.0}).identity()


def test_mixture_takes_held_out_rows_and_verdicts_from_its_sources(source: Any, jsonl: Any) -> None:
    rows = [{"question": "q", "answer": "a"}]
    judged = source("local", path=jsonl(rows), eval_path=jsonl(rows, "held.jsonl"), verify="exact")
    mixed = source("mixture", sources={"qa": judged}, weights={"qa": 1})
    (sample,) = mixed.eval_rows()
    assert sample.source == "qa/held"
    assert mixed.score(sample.entry, sample.reference, " a ") == 1.0
    assert mixed.score(sample.entry, sample.reference, "b") == 0.0


def test_mixture_refuses_what_it_would_have_to_ignore(mixture: Any, source: Any) -> None:
    with pytest.raises(ValueError, match=r"data.weights must name the sources one two, got one"):
        mixture(weights={"one": 1.0})
    with pytest.raises(ValueError, match=r"data.weights.one must be above 0, got 0"):
        mixture(weights={"one": 0, "two": 1})
    with pytest.raises(ValueError, match=r"data.sources.a.shuffle must be True, got False; set data.shuffle"):
        source("mixture", sources={"a": source("local", path="a.jsonl", shuffle=False)}, weights={"a": 1})


def test_split_by_hash_is_told_by_seed_and_id_alone(source: Any, jsonl: Any) -> None:
    samples = list(source("local", path=jsonl([{"text": str(i)} for i in range(2000)])).rows())
    apart = [held_out(sample, seed=0, fraction=0.1) for sample in samples]
    assert 150 <= sum(apart) <= 250  # 200 expected, binomial deviation 13
    assert apart != [held_out(sample, seed=1, fraction=0.1) for sample in samples]
    wider = [held_out(sample, seed=0, fraction=0.2) for sample in samples]
    assert all(wide for wide, narrow in zip(wider, apart, strict=True) if narrow)
