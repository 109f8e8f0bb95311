"""A row that is far too long costs no memory; every row that fits is what it was before rows were told by length."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dsft.data import length
from dsft.data.encoding import Encoder
from dsft.data.length import LengthBound, OverLong, portions
from dsft.data.open import open_data
from dsft.data.source import Sample

LONG = 512
Make = Callable[..., Any]


def plain(text: str, row: int = 0) -> Sample:
    return Sample(
        source="s", row=row, place=f"s:{row}", messages=(), plain=("", text), reference=None, entry=None, learned=None,
        tools=(), unread=(),
    )  # fmt: skip


def byte_fallback(normalizer: Any) -> PreTrainedTokenizerFast:
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"\u2581": 256, "ab": 257, "a": 258, "b": 259}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b")], byte_fallback=True, unk_token=None))
    backend.normalizer = normalizer
    backend.add_special_tokens([AddedToken("<e>", lstrip=True, rstrip=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")


def tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


TEXTS = (
    "ab" * 3000, "\u1f82" * 999, "\u03b1\u0313\u0300\u0345" * 999, " " * 9000, "\n \t" * 3000, "<e>" * 999,
    "  <e>  " * 999, "\U0001f600" * 700, "a b " * 1500, "\u0958" * 800, "x" * 600,
)  # fmt: skip


@pytest.mark.parametrize("make", ["bytes", "fallback", "nfc"])
def test_the_bound_is_never_more_than_the_tokens(make: str, make_tokenizer: Make) -> None:
    """Decomposed letters become one, white space goes into a token that strips it."""
    told = 0
    tokenizer = {
        "bytes": lambda: make_tokenizer(None),
        "fallback": lambda: byte_fallback(normalizers.Replace(" ", "\u2581")),
        "nfc": lambda: byte_fallback(normalizers.Sequence([normalizers.NFC(), normalizers.Prepend("\u2581")])),
    }[make]()
    bound = LengthBound(tokenizer)
    assert bound.characters is not None
    for text in TEXTS:
        over = bound.over(text, 3)
        assert over is None or 3 < over.tokens <= tokens(tokenizer, text), text[:9]
        told += over is not None
    assert told > 5


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", normalizers.Lowercase()), ("normalizer", normalizers.NFKC()),
        ("normalizer", normalizers.Strip()),
        ("normalizer", normalizers.Replace("aaaa", "a")), ("pre_tokenizer", pre_tokenizers.Whitespace()),
        ("pre_tokenizer", pre_tokenizers.Split(" ", "removed")),
        ("model", models.WordLevel({"<e>": 0}, unk_token="<e>")),
        ("model", models.BPE({"a": 0, "<u>": 1}, [], unk_token="<u>", fuse_unk=True)),
    ],
    ids=str,
)  # fmt: skip
def test_of_a_tokenizer_that_may_drop_or_join_characters_nothing_is_told(part: str, value: Any) -> None:
    tokenizer = byte_fallback(None)
    setattr(tokenizer.backend_tokenizer, part, value)
    assert LengthBound(tokenizer).over("a" * 10**6, 1) is None


def test_a_row_of_four_million_characters_is_counted_and_not_tokenised(
    make_tokenizer: Make, source: Make, jsonl: Make, tmp_path: Any
) -> None:
    tokenizer = make_tokenizer()
    (over,) = Encoder(tokenizer, None, LONG).encode([plain("x" * 4_000_000)])
    longest = LengthBound(tokenizer).characters
    assert longest is not None
    assert over == OverLong(-(-4_000_000 // longest), 4_000_000)
    rows = [{"question": f"{n}", "answer": "x" * (4_000_000 if n == 1 else 600 if n == 2 else 9)} for n in range(5)]
    opened = [
        open_data(source("local", path=jsonl(each)), tokenizer, max_length=LONG, seed=0, cache_dir=tmp_path / str(n))
        for n, each in enumerate([rows, [row for row in rows if len(row["answer"]) < 10**6]])
    ]
    assert [data.audit.train.over_long for data in opened] == [2, 1]
    assert opened[0].audit.train.kept == opened[1].audit.train.kept == 3
    assert (opened[0].train.example(2)[0] == opened[1].train.example(2)[0]).all()
    first, second = (opened[0].train.folder.parent / "skipped_rows.jsonl").read_text().splitlines()
    assert re.search(r"4,000,0\d\d characters are 33333\d tokens or more, more than train.max_length=512", first)
    assert re.search(r"6\d\d tokens, more than train.max_length=512", second)


def test_where_no_row_fits_the_length_that_is_asked_for_is_a_true_bound(
    make_tokenizer: Make, source: Make, jsonl: Make, tmp_path: Any
) -> None:
    rows = jsonl([{"question": "q", "answer": "x" * 10**6}])
    with pytest.raises(ValueError, match=r"train\.max_length must be at least (\d+) for a row") as refusal:
        open_data(source("local", path=rows), make_tokenizer(), max_length=LONG, seed=0, cache_dir=tmp_path)
    assert 10**4 < int(str(refusal.value).split()[5]) <= 10**6 + 60


def test_long_texts_are_not_tokenised_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(length, "TOGETHER", 10)
    texts = ["a" * 6, "b" * 4, "c", "", "d" * 30, "e"]
    assert list(portions(texts)) == [["a" * 6, "b" * 4], ["c", ""], ["d" * 30], ["e"]]
    assert list(portions([])) == []
