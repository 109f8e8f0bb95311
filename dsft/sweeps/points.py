"""The points of a sweep, from what was typed to their exit codes: checked first, then run here or as SLURM arrays."""

import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dsft_launchers import cluster, submit
from dsft_launchers.codes import DONE, STOPPED, USER_ERROR
from dsft_launchers.follow import POLL_S, follow_points
from dsft_launchers.shown import in_a_line, say, shown

from dsft import dispatch, folder, owners
from dsft.compose import Composed, build, compose
from dsft.entry import lose_lines
from dsft.locate import TYPED, Allowed
from dsft.preflight import announce, preflight, rehearse, tell_unchecked
from dsft.sweeps import arrays, ledger
from dsft.sweeps.here import Ended, run_here, shares
from dsft.sweeps.ledger import Entry, Ledger
from dsft.sweeps.standing import ALIVE, Standing, look
from dsft.sweeps.table import as_text, metric_of
from dsft.wording import as_value


@dataclass(frozen=True)
class Typed:
    """What a command line says beside the points' words.

    more: overrides behind those of each point, for this time; trust: other users may write the sweep's folder; allowed:
    whose classes the words, and the YAMLs that they choose, may name; words: where those of the points were read, None:
    they were typed now.
    """

    more: Sequence[str] = ()
    trust: bool = False
    allowed: Allowed = TYPED
    words: Path | None = None


AS_TYPED = Typed()


@dataclass
class Checked:
    """Points by what can be done with them: run here, submitted, nothing since they are done or refused (with why).

    words: what is put on record for each that is not refused.
    """

    here: dict[int, Composed] = field(default_factory=dict)
    ready: dict[int, arrays.Ready] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    refused: dict[int, str] = field(default_factory=dict)
    words: dict[int, list[str]] = field(default_factory=dict)

    @property
    def composed(self) -> list[Composed]:
        """All that are not refused and not done."""
        return [*self.here.values(), *(each.composed for each in self.ready.values())]

    def refuse(self, index: int, why: str) -> None:
        """Leave a point out, and say why in one line."""
        say(f"dsft: point {index}: {' '.join(why.split())}")
        self.refused[index] = why


def run_points(points: Sequence[Sequence[str]], sweep: Path, *, first: int, book: Ledger, trust: bool = False) -> Ended:
    """Run a sweep's points, or go on with them. A point that is refused ends no other.

    book: the ledger until there is a file; it keeps the points of batches that were refused as a whole. Raises
    ValueError for a sweep without points, and for what concerns all of them.
    """
    if not points:
        raise ValueError("a sweep must have one point or more, got none; give each key that is swept a value")
    sweep = sweep.absolute()
    words = {first + i: [word for word in point if not word.startswith("run_dir=")] for i, point in enumerate(points)}
    return bring(sweep, ledger.read(sweep) or book, words, Typed(trust=trust))


def bring(sweep: Path, book: Ledger, words: Mapping[int, list[str]], typed: Typed = AS_TYPED) -> Ended:
    """Bring points to their ends: those that are not done, and that nothing works on, are started.

    A point that has no folder yet is made with the words in typed.more.
    """
    checked = check(sweep, words, typed)
    if any(arrays.slurm(each.composed).dry_run for each in checked.ready.values()):
        arrays.show(sweep, checked.ready)
        return Ended({index: USER_ERROR if index in checked.refused else DONE for index in words})
    fresh = not (sweep / ledger.NAME).is_file()
    if fresh and len(checked.refused) == len(words):
        _enter(sweep, book, words, checked)
        return Ended(dict.fromkeys(words, USER_ERROR))
    try:
        codes, left = _start(sweep, book, words, checked, fresh=fresh, trust=typed.trust)
        if any(arrays.slurm(each.composed).wait for each in checked.ready.values()):
            followed = _follow(sweep, [point for point in look(sweep, book) if point.index in checked.ready])
            codes, left = codes | followed.codes, followed.left if left is None else left
        elif checked.ready:
            print(in_a_line(f"the points' jobs go on; see them: python -m dsft.sweep status {sweep}"), flush=True)
            codes = {index: USER_ERROR if index in checked.refused else codes.get(index, DONE) for index in words}
            return Ended(codes, left)
        points = look(sweep, book) if (sweep / ledger.NAME).is_file() else []
    except cluster.ClusterError as error:
        raise ValueError(f"SLURM does not answer: {error}; python -m dsft.sweep resume {sweep} goes on") from error
    if points:
        by, said = metric_of(book, points)
        print(shown(f"{said}\n{as_text(book, points, by)}"), flush=True)
    if left == STOPPED:
        print(in_a_line(f"stopped; this goes on: python -m dsft.sweep resume {shlex.quote(str(sweep))}"), flush=True)
    found = {point.index: codes.get(point.index, point.code) for point in points if point.index in words}
    return Ended(found or codes, left)


def check(sweep: Path, words: Mapping[int, list[str]], typed: Typed = AS_TYPED) -> Checked:
    """Everything that can be known of the points before one is started; writes nothing but caches.

    Raises ValueError for what concerns all of them.
    """
    checked, answers, unchecked = Checked(), dict[str, str | None](), dict[str, None]()
    for index, own in words.items():
        now = [*(word for word in own if _key(word) not in map(_key, typed.more)), *typed.more]
        checked.words[index] = own if (sweep / str(index) / "config.yaml").is_file() else now
        try:
            owners.check(sweep / str(index), "a point of SWEEP", trust=typed.trust, note=False)
            composed = _composed(sweep, index, now, typed)
            if composed.start.variables:  # one rank of several, which meet before they read the data
                folder.check(Path(composed.run.run_dir), composed.resolved)
                checked.here[index] = composed
                continue
            if composed.start.kind == "slurm":
                _check_cluster(sweep, composed, answers)
            if dispatch.is_dry(composed):
                unchecked |= dict.fromkeys(rehearse(composed))
                checked.ready[index] = arrays.Ready(composed, {})
            elif (prepared := preflight(composed)) is None:
                checked.done.add(index)
            elif composed.start.kind != "slurm":
                checked.here[index] = composed
            else:
                checked.ready[index] = arrays.Ready(composed, prepared)
        except ValueError as error:
            checked.refuse(index, str(error))
    tell_unchecked(list(unchecked))
    limits = {composed.run.launcher.max_parallel for composed in checked.composed}
    if len(limits) > 1:
        raise ValueError(
            f"launcher.max_parallel must be one for the whole sweep, got {', '.join(map(str, limits))}; set it once"
        )
    if checked.here:
        shares(*_limits(checked.here.values()))
    return checked


def _composed(sweep: Path, index: int, words: Sequence[str], typed: Typed) -> Composed:
    """A point as a run of its own; in W&B the points are a group, unless the user named one."""
    composed = compose([*words, f"run_dir={as_value(str(sweep / str(index)))}"], allowed=typed.allowed)
    _refuse_code(composed, typed)
    trackers = composed.resolved["tracker"]
    grouped = [name for name, each in trackers.items() if "group" in each and each["group"] is None]
    tree: dict[str, Any] = {
        **composed.resolved,
        "tracker": {**trackers, **{name: {**trackers[name], "group": sweep.name} for name in grouped}},
    }
    more = tuple(f"tracker.{name}.group={as_value(sweep.name)}" for name in grouped)
    return replace(composed, run=build(tree, typed.allowed), resolved=tree, overrides=composed.overrides + more)


def _refuse_code(composed: Composed, typed: Typed) -> None:
    """Refuse a model whose own code would run because the sweep's folder says so. Raises ValueError."""
    key = "model.trust_remote_code"
    if typed.trust or typed.words is None or key in map(_key, typed.more):
        return
    if composed.resolved["model"].get("trust_remote_code", False) is not False:
        raise ValueError(
            f"{key} must be typed for each start of a sweep that goes on, got it from {typed.words}; add "
            f"{key}=true if you trust that code"
        )


def _key(word: str) -> str:
    return word.partition("=")[0]


def _check_cluster(sweep: Path, composed: Composed, answers: dict[str, str | None]) -> None:
    """Refuse what this cluster would. answers: its refusals so far, by request."""
    if arrays.slurm(composed).dry_run:
        return
    asked = dispatch.request(composed, None, sweep)
    if repr(asked) not in answers:
        try:
            submit.check(asked, sweep)
            answers[repr(asked)] = None
        except ValueError as error:
            answers[repr(asked)] = str(error)
    if (why := answers[repr(asked)]) is not None:
        raise ValueError(why)


def _limits(composed: Iterable[Composed]) -> tuple[int, int]:
    """How many points at once on this machine, and accelerators of the largest."""
    all_of = list(composed)
    return all_of[0].run.launcher.max_parallel or 1, max(
        each.start.devices if each.start.place.gpus else 0 for each in all_of
    )


def _start(
    sweep: Path, book: Ledger, words: Mapping[int, list[str]], checked: Checked, *, fresh: bool, trust: bool
) -> Ended:
    """Put the points on record, submit those for SLURM and run the others; what of those ended."""
    lose_lines()
    joined = any(composed.start.variables for composed in checked.here.values())
    sweep.mkdir(parents=True, exist_ok=True)
    with nullcontext() if joined else ledger.alone(sweep):
        _enter(sweep, book, words, checked)
        book.write(sweep)
        points = _settled(sweep, book, words)
        idle = {point.index for point in points if point.state not in ALIVE}
        jobs = [point.job for point in points if point.index not in idle and point.job]
        ready = {
            index: each for index, each in checked.ready.items() if index in idle and not _done(points, index, each)
        }
        if ready:
            _announce(ready, len(words) - len(idle.intersection(words)))
        for index, why in arrays.submit_points(sweep, ready, jobs) if ready else ():
            if why is not None:
                checked.refuse(index, why)
                del checked.ready[index]
        if fresh and len(checked.refused) == len(words):
            (sweep / ledger.NAME).unlink()
            (sweep / ledger.LOCK).unlink()
            return Ended(dict.fromkeys(words, USER_ERROR))
        _enter(sweep, book, words, checked)
        book.write(sweep)
        mine = {index: list(each.overrides) for index, each in checked.here.items() if index in idle}
        refused = dict.fromkeys(checked.refused, USER_ERROR)
        if not mine:
            return Ended(refused)
        at_once, devices = _limits(checked.here.values())
        codes, left = run_here(sweep, mine, at_once=at_once, devices=devices, trust=trust)
        return Ended(refused | codes, left)


def _enter(sweep: Path, book: Ledger, words: Mapping[int, list[str]], checked: Checked) -> None:
    """Put the points into the ledger. A refused one does not replace what its folder was made with."""
    for index, typed in words.items():
        refused = checked.refused.get(index)
        entry = Entry(checked.words[index] if refused is None else typed, refused)
        book.put(index, entry, keep=refused is not None and (sweep / str(index)).is_dir())


def _settled(sweep: Path, book: Ledger, words: Mapping[int, list[str]]) -> list[Standing]:
    """Where the points stand, once none is just ending and what a killed submission left is brought to an end."""
    if (sweep / "slurm").is_dir():
        arrays.tidy(sweep, len(book.points))
    points = look(sweep, book)
    while any(point.state == "ending" for point in points if point.index in words):
        time.sleep(POLL_S)
        points = look(sweep, book)
    return points


def _done(points: Sequence[Standing], index: int, ready: arrays.Ready) -> bool:
    """Whether a point has come to its end since it was checked; one that was done before is to be longer."""
    return points[index].state == "done" and preflight(ready.composed) is None


def _announce(ready: Mapping[int, arrays.Ready], alive: int) -> None:
    first = min(ready)
    announce(ready[first].composed, ready[first].prepared)
    print(f"sweep        {len(ready)} points to submit, {alive} at work already; shown is point {first}", flush=True)


def _follow(sweep: Path, points: Sequence[Standing]) -> Ended:
    """What became of the points that SLURM works on, once they have ended; Ctrl-C leaves the jobs alone."""
    try:
        return Ended(follow_points({point.index: (point.job, point.run_dir) for point in points if point.job}))
    except KeyboardInterrupt:
        say(f"dsft: the jobs go on by themselves; python -m dsft.sweep cancel {sweep} ends them")
        return Ended({}, DONE)
