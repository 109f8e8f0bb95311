"""python -m dsft.sweep status|resume|retry|cancel|table SWEEP: the state of a sweep, and what is to be done with it."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from dsft_launchers import cluster
from dsft_launchers.codes import DONE, STOPPED
from dsft_launchers.shown import in_a_line, say, shown

from dsft import folder, owners
from dsft.entry import enter
from dsft.locate import TYPED, Allowed
from dsft.searched import own_folder, own_folder_last, take
from dsft.sweeps import ledger
from dsft.sweeps.ledger import Ledger
from dsft.sweeps.points import Typed, bring
from dsft.sweeps.standing import ALIVE, Standing, look
from dsft.sweeps.table import as_text, check_metric, metric_of, write_csv
from dsft.telemetry.record import read_status, write_status
from dsft.wording import refuse

USAGE = "dsft sweep status|resume|retry|cancel|table SWEEP [--by METRIC] [--csv FILE] [--trust] [overrides]"


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the verb says; 2 for a folder that is no sweep. resume and retry give the worst point's code."""
    parser = argparse.ArgumentParser(prog="dsft sweep", description=__doc__)
    parser.add_argument("what", choices=("status", "resume", "retry", "cancel", "table"))
    parser.add_argument("sweep", type=Path, help="the run_dir of a run with -m")
    parser.add_argument("--by", help="table: the metric to sort by, e.g. eval/loss")
    parser.add_argument("--csv", type=Path, help="table: write it to this file")
    parser.add_argument(owners.TRUST, action="store_true", help="go on in folders that other users may have written")
    parser.add_argument("overrides", nargs="*", help="resume, retry: keys that may change, e.g. launcher.memory=64G")
    parser.error = _raise  # type: ignore[method-assign]
    try:
        given = sys.argv[1:] if argv is None else argv
        args = parser.parse_args(sorted(given, key=lambda word: word != owners.TRUST))  # argparse takes overrides last
        if (args.by or args.csv) and args.what != "table":
            raise ValueError(f"--by and --csv belong to table, got {args.what}; leave them out")
        if args.overrides and args.what not in ("resume", "retry"):
            raise ValueError(f"{args.what} takes no {args.overrides[0]}; usage: {USAGE}")
        sweep = args.sweep.absolute()
        book = ledger.read(sweep)
        if book is None:
            raise ValueError(f"SWEEP must be the run_dir of a run with -m, got {args.sweep} without {ledger.NAME}")
        looks = args.what in ("status", "table")  # which start nothing, end nothing and import nothing
        owners.check(sweep, "SWEEP", trust=args.trust or looks, depth=1)
        points = look(sweep, book)
        if args.what in ("resume", "retry"):
            return _go_on(sweep, book, points, args)
        if args.what == "cancel":
            return _cancel(sweep, book, points)
        return _status(book, points) if args.what == "status" else _table(book, points, args)
    except ValueError as error:
        return refuse(error)
    except cluster.ClusterError as error:
        return refuse(
            ValueError(f"SLURM must answer for jobs that are not done, and it says: {error}; try again later")
        )
    except KeyboardInterrupt:
        say("dsft: stopped before it was through; the same command goes on")
        return STOPPED


def _raise(message: str) -> NoReturn:
    raise ValueError(f"{message}; usage: {USAGE}")


def _status(book: Ledger, points: Sequence[Standing]) -> int:
    for point in points:
        changed = " ".join(book.changed(point.index))
        print(in_a_line(f"{point.index:<6} {point.shown:<10} {point.step:>7}  {changed}  {point.why}".rstrip()))
    states = dict.fromkeys(point.state for point in points)
    print(in_a_line("  ".join(f"{sum(point.state == state for point in points)} {state}" for state in states)))
    return DONE


def _table(book: Ledger, points: Sequence[Standing], args: argparse.Namespace) -> int:
    by, said = (args.by, f"best first by {args.by}") if args.by else metric_of(book, points)
    check_metric(points, by)
    if args.csv is None:
        print(shown(f"{said}\n{as_text(book, points, by)}"))
        return DONE
    try:
        with args.csv.open("w", newline="") as out:
            write_csv(book, points, by, out)
    except OSError as error:
        raise ValueError(f"--csv must be a file that can be written, got {args.csv}: {error.strerror}") from error
    print(in_a_line(f"{len(points)} points written to {args.csv}"))
    return DONE


def _go_on(sweep: Path, book: Ledger, points: Sequence[Standing], args: argparse.Namespace) -> int:
    """Start what is missing, or what failed, where and as the sweep was typed."""
    if args.what == "retry":
        chosen = [point for point in points if point.state == "failed"]
    else:
        chosen = [point for point in points if point.state != "done"]
    if not chosen:
        print(
            f"nothing to {args.what}: {len(points)} points, none {'failed' if args.what == 'retry' else 'is missing'}"
        )
        return max((point.code for point in points), default=DONE)
    allowed = _enter(sweep, book, args)
    folder.check_place(sweep)
    words = {point.index: book.points[point.index].words for point in chosen}
    codes, left = bring(sweep, book, words, Typed(args.overrides, args.trust, allowed, sweep / ledger.NAME))
    return max([left or DONE, *codes.values(), *(point.code for point in points if point.index not in codes)])


def _enter(sweep: Path, book: Ledger, args: argparse.Namespace) -> Allowed:
    """Go where the sweep was typed; returns whose classes its words and YAMLs may name.

    The sweep's folder says where that was. Modules of the user's own are imported as at the start if this command is
    typed there too, or with --trust; else those that a folder may name.
    """
    for place, what in ((book.cwd, "the folder in which the sweep was typed"), (book.config_dir, "--config-dir")):
        if place is not None:
            owners.check(Path(place), f"{what}, by {sweep / ledger.NAME},", trust=args.trust, depth=0)
    here, config_dir = os.path.realpath(os.getcwd()), os.environ.get("DSFT_CONFIG_DIR")
    same = here == os.path.realpath(book.cwd) and book.config_dir in (None, config_dir)
    named = any("_target_" in word or word.startswith("method.type=") for each in book.points for word in each.words)
    try:
        os.chdir(book.cwd)
    except OSError as error:
        raise ValueError(
            f"the folder in which the sweep was typed must be there, got {book.cwd}: {error.strerror}; make it again, "
            f"or set cwd in {sweep / ledger.NAME}"
        ) from error
    if book.config_dir is not None:
        os.environ["DSFT_CONFIG_DIR"] = book.config_dir
    take(own_folder() if same or args.trust else "")
    return TYPED if args.trust or (same and not named) else Allowed(sweep / ledger.NAME, pythonpath=same)


def _cancel(sweep: Path, book: Ledger, points: Sequence[Standing]) -> int:
    """Have SLURM end the points' jobs; those that did not begin are stopped by our word, since SLURM forgets them."""
    alive = tuple(state for state in ALIVE if state != "ending")
    jobs = {point.index: point.job for point in points if point.job and point.state in alive}
    if not jobs:
        print("nothing to cancel: no point is a job that waits or runs")
        return DONE
    with ledger.alone(sweep):
        cluster.ask("scancel", *jobs.values(), *cluster.held(sweep / "slurm"))
        for point in look(sweep, book):
            status = read_status(point.run_dir)
            if point.index in jobs and point.state in ("lost", "stopped") and status and status.state == "queued":
                write_status(point.run_dir, replace(status, state="stopped", reason="cancelled before it began"))
    print(f"cancelled    {len(jobs)} points: those that ran save and leave; dsft.sweep resume goes on with them")
    return DONE


if __name__ == "__main__":
    own_folder_last()
    enter(main)
