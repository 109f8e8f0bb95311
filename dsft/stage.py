"""python -m dsft.stage [overrides]: what a run needs of the network, fetched once into the caches; and its tokens."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dsft_launchers.codes import STOPPED
from dsft_launchers.shown import in_a_line, say

from dsft.compose import compose
from dsft.config import Run
from dsft.entry import enter, lose_lines
from dsft.flags import hydra_flags
from dsft.searched import own_folder_last
from dsft.wording import refuse

USAGE = """usage: python -m dsft.stage [KEY=VALUE ...] [--config-dir DIR]

Fetches model, tokenizer and data of python -m dsft.run with the same overrides into the caches that the run reads,
$HF_HOME and $DSFT_CACHE, tokenises, and reads the model once for its digest. To be started where there is a network,
before a SLURM job: its nodes often have none. Says what is new; a second call finds all of it.

example: python -m dsft.stage method=qlora model=llama70b data=hf data.path=openai/gsm8k data.name=main
exit codes: 0 all is there; 2 refused, or something cannot be had: one line on stderr; 75 stopped: run it again
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch, and say what; 2 if the run is refused or something cannot be had."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"--help", "-h"} & set(words):
        print(USAGE, end="")
        return 0
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        flags, overrides = hydra_flags(words)
        if flags:
            raise ValueError(f"dsft.stage takes overrides only, got {flags[0]}; stage the points of a sweep one by one")
        run = compose(overrides, planning=True).run
        lose_lines()
        stage(run)
    except ValueError as error:
        return refuse(error)
    except KeyboardInterrupt:
        say("dsft: stopped; the same command goes on")
        return STOPPED
    return 0


def stage(run: Run) -> None:
    """Model and tokenizer, then data and their tokens, each to where a run looks for it; a line on stdout for each.

    Raises ValueError for what cannot be had or read.
    """
    run.model.check()
    run.data.check(run.objective.wants)
    from dsft.data.cache import cache_root
    from dsft.data.open import open_for
    from dsft.examined import family_of

    hub, datasets = _hugging_face()
    stock = Stock([cache_root() / "models", cache_root() / "tokens", hub, datasets])
    files = run.model.resolve()
    tokenizer = files.tokenizer()
    stock.tell("model", [files.folder or hub / f"models--{files.name_or_path.replace('/', '--')}"])
    family_of(files)  # remembered, so that a job's nodes need not examine the model
    data = open_for(run, tokenizer)
    stock.tell("data", [*hub.glob("datasets--*"), *datasets.glob("*")])
    stock.tell("tokens", [data.train.folder.parent])
    if files.folder is not None:
        print(
            f"digest       {files.digest()[:12]} of the model, {files.nbytes:,} bytes read once and remembered",
            flush=True,
        )
    for note in data.notes:
        print(in_a_line(f"note         {note.replace('this run', 'runs of that day')}"))
    print(
        f"staged       {stock.fetched:,} bytes" if stock.fetched else "staged       nothing was fetched, all was there"
    )


class Stock:
    """What the caches held before, and the bytes that have come since."""

    def __init__(self, caches: Sequence[Path]) -> None:
        self.caches = [cache.resolve() for cache in caches]
        self.before = {file for cache in self.caches for file in _held(cache)}
        self.fetched = 0

    def tell(self, what: str, places: Sequence[Path]) -> None:
        """Say what is new below places, or that nothing is; a folder of the user's own is none of the caches."""
        fetched = 0
        for place in places:
            new = [size for file, size in _held(place).items() if file not in self.before and self._caches(file)]
            if new:
                print(in_a_line(f"{what:<12} new: {sum(new):,} bytes in {len(new)} files, {place}"), flush=True)
                fetched += sum(new)
        if not fetched:
            there = f": {sum(_held(places[0]).values()):,} bytes in {places[0]}" if len(places) == 1 else ""
            print(in_a_line(f"{what:<12} nothing new{there}"), flush=True)
        self.fetched += fetched

    def _caches(self, file: Path) -> bool:
        return any(file.is_relative_to(cache) for cache in self.caches)


def _hugging_face() -> tuple[Path, Path]:
    """The caches of huggingface_hub and of datasets."""
    from huggingface_hub import constants

    own = os.environ.get("HF_DATASETS_CACHE")
    return Path(constants.HF_HUB_CACHE), Path(own).expanduser() if own else Path(constants.HF_HOME) / "datasets"


def _held(place: Path) -> dict[Path, int]:
    """Files below place, links followed, with their bytes."""
    found = (file for file in place.rglob("*") if file.suffix != ".lock" and file.is_file())
    return {file.resolve(): file.stat().st_size for file in found}


if __name__ == "__main__":
    own_folder_last()
    enter(main)
