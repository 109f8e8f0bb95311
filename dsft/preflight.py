"""Before a run: all that can be refused is refused here, without weights; and what its user is told."""

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsft_launchers import cluster
from dsft_launchers.shown import in_a_line, say, shown
from rich.console import Console

from dsft import basis, folder, offline, origin, published
from dsft.compose import Composed
from dsft.config import Run, Slurm
from dsft.door import at_the_door
from dsft.imports import unlogged
from dsft.models.reach import reach
from dsft.offline import AbsentError

if TYPE_CHECKING:
    from dsft.data.open import Dataset
    from dsft.models.files import ModelFiles


@unlogged()
def preflight(composed: Composed) -> dict[str, Any] | None:
    """All that can be known without weights, cheapest first: plan, digests, audit. None if the run is done already.

    Raises ValueError for what cannot work. Writes nothing but caches.
    """
    run, run_dir = composed.run, Path(composed.run.run_dir)
    if composed.start.kind == "slurm":
        offline.unplug()  # what the nodes would lack is missed here
    folder.check(run_dir, composed.resolved)
    anew = folder.anew(run_dir, composed.resolved)
    done = not anew and folder.check_length(run_dir, composed.resolved)
    run.model.check()
    for tracker in run.tracker.values():
        tracker.check()
    run.data.check(run.objective.wants)
    if not done:
        _check_torch(composed)
    provenance = {} if anew else folder.provenance(run_dir)
    if "model" not in run.resume.allow:
        basis.require_code(run.model, provenance)
    starting = not folder.goes_on(run_dir) or anew
    start_from = origin.known(composed.resolved["method"].get("init_from")) if starting else {}
    basis.require_code(run.model, start_from)
    files = run.files()
    day = provenance.get("template_date")
    data = _open(run, files, files.tokenizer(), day)
    before = {} if anew else folder.known(run_dir)
    digests = {**basis.digests_of(files, before, start_from), **data.digests}
    folder.check_digests(run_dir, digests, composed.resolved)
    if done:
        published.check(run_dir)
        return None
    from dsft.data.order import total_steps

    if not anew:
        folder.check_steps(run_dir, total_steps(run.train, len(data.train)), "train.epochs")
    from dsft.plan import make_plan

    plan = make_plan(composed, files)
    _check_weights(run, files)
    if not anew:
        folder.check_parameters(run_dir, plan)
    started = _origin(composed, digests, files) if starting else []
    return {
        "plan": plan,
        "digests": digests,
        "audit": data.audit,
        "tokens": data.train.folder.parent,
        "notes": [*data.notes, *_unevaluated(run, data), *_unused(run, data), *started],
    }


def _check_weights(run: Run, files: "ModelFiles") -> None:
    """Refuse a folder whose weights are not those of the model that its config.json describes; reads headers."""
    from dsft.engine.precision import DTYPES
    from dsft.models.values import open_values

    open_values(files, DTYPES[run.train.precision], run.train.seed)


def _check_torch(composed: Composed) -> None:
    """Refuse a run on GPUs whose torch can use none: here, or on the nodes of a job, which have this Python."""
    from dsft.plan import check_gpus_here

    check_gpus_here(composed)
    start, launcher = composed.start, composed.run.launcher
    if start.kind != "slurm" or not start.place.gpus or not isinstance(launcher, Slurm) or launcher.prefix:
        return
    import torch

    from dsft.comm.sight import without_cuda

    if without_cuda():
        raise ValueError(
            f"torch must be a build for CUDA on nodes with GPUs, got {torch.__version__}, which has none; install one "
            "into this environment, or take launcher.gpus=none to compute on CPUs"
        )


def _unevaluated(run: Run, data: "Dataset") -> Iterator[str]:
    """What is said where evaluations are asked for and there is nothing to evaluate on."""
    if run.train.eval_every and data.eval is None:
        yield f"train.eval_every={run.train.eval_every} evaluates nothing: no rows are held out"


def _unused(run: Run, data: "Dataset") -> Iterator[str]:
    """What is said of a column that is read and not used."""
    if "margin" in data.train.columns and not run.objective.margins:
        yield "the column margin changes nothing for this objective; objective=reward asks for it"


def _origin(composed: Composed, digests: Mapping[str, str], files: "ModelFiles") -> list[str]:
    """What a person should know of the adapter that this run starts from. Raises ValueError for one that is wrong."""
    started = composed.resolved["method"]
    found = origin.check(started["init_from"], digests, files.name_or_path) if "init_from" in started else None
    other = origin.check_reference(composed.run.objective.reference, digests, files.name_or_path)
    return [said for said in (found, other) if said is not None]


def rehearse(composed: Composed) -> list[str]:
    """Refuse what preflight refuses of a job that is printed and not submitted, as far as this machine can tell.

    Returns what could not be checked, as it is on other machines. Raises ValueError for what cannot work.
    """
    from dsft.plan import make_plan

    run, unchecked, files = composed.run, list[str](), None
    offline.unplug()
    _rehearse_folder(composed, unchecked)
    for tracker in run.tracker.values():
        tracker.check()
    with _noted(unchecked, "the data"):
        run.data.check(run.objective.wants)
    with _noted(unchecked, "the model's weights and tokenizer"):
        run.model.check()
        files = run.files()
        tokenizer = files.tokenizer()
        if "the data" not in unchecked:
            with _noted(unchecked, "the data"):
                _open(run, files, tokenizer)
    if "the data" not in unchecked and "the model's weights and tokenizer" in unchecked:
        unchecked.append("the data's tokens")
    with _noted(unchecked, "the model's shape"):
        make_plan(composed, files or run.files(planning=True))
    if not cluster.answers():
        blind = "" if composed.start.place.gpus else " (the script asks for no GPUs)"
        unchecked.append(f"the cluster{blind}")
    return unchecked


def tell_unchecked(unchecked: Sequence[str]) -> None:
    """Say on stderr what rehearse could not check."""
    if unchecked:
        *most, last = unchecked
        named = f"{', '.join(most)} and {last}" if most else last
        say(f"dsft: not checked, as it is not on this machine: {named}")


def _rehearse_folder(composed: Composed, unchecked: list[str]) -> None:
    """Check the run folder; one that this machine may not make is another machine's."""
    run_dir = Path(composed.run.run_dir)
    try:
        folder.check(run_dir, composed.resolved)
    except ValueError as error:
        forbidden = getattr(error.__cause__, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS)
        if not forbidden or os.path.lexists(run_dir):
            raise
        unchecked.append("the run folder")


@contextlib.contextmanager
def _noted(unchecked: list[str], what: str) -> Iterator[None]:
    """Note what is not on this machine, and go on behind the block."""
    try:
        yield
    except AbsentError:
        unchecked.append(what)


def _open(run: Run, files: "ModelFiles", tokenizer: Any, day: str | None = None) -> "Dataset":
    """The data, tokenised and found to fit model, metric and method."""
    from dsft.data.open import open_for
    from dsft.data.order import total_steps

    data = open_for(run, tokenizer, day=day)
    _check_fit(run, files, data)
    run.method.check(total_steps(run.train, len(data.train)))
    return data


def _check_fit(run: Run, files: "ModelFiles", data: "Dataset") -> None:
    """Refuse rows and tokens beyond the model's reach, and a metric that these data do not give."""
    from dsft.plan import check_positions

    check_positions(run, files)
    _check_vocabulary(files, data)
    longest = data.train.longest
    known, before = reach(files.config), run.method.positions
    if known is not None and longest + before > known:
        taken = f" less {before} that the method takes" if before else ""
        raise ValueError(
            f"train.max_length must be at most {known - before}, the positions that the model knows{taken}, got rows "
            f"of {longest} tokens with train.max_length={run.train.max_length}; lower it"
        )
    asked = {"train.early_stop_metric": run.train.early_stop_metric, "checkpoint.keep_best": run.checkpoint.keep_best}
    generated = set() if data.verifiable else {"eval/accuracy"} - {f"eval/{name}" for name in run.objective.measures}
    for key, metric in asked.items():
        if metric is not None and (data.eval is None or metric in generated):
            raise ValueError(f"{key}={metric} needs held-out rows that give it; hold some out or unset it")


def _check_vocabulary(files: "ModelFiles", data: "Dataset") -> None:
    """Refuse tokens for which the embedding has no row: some were added to the tokenizer, and not to the model."""
    text = files.config.get_text_config()
    rows = getattr(text, "vocab_size", None)
    if rows is None or data.top_token < rows:
        return
    token = files.tokenizer().convert_ids_to_tokens(data.top_token)
    raise ValueError(
        f"model must have an embedding row for each token of the data, got token {token!r} (number {data.top_token}) "
        f"and {rows} rows; resize the model's embedding and save it (resize_token_embeddings), or use the tokenizer "
        "that it was trained with"
    )


def announce(composed: Composed, prepared: Mapping[str, Any]) -> None:
    """Print the plan, and what a person should see before the run begins."""
    from dsft.plan import as_text

    print(shown(as_text(prepared["plan"])))
    for note in [*folder.notes(Path(composed.run.run_dir), composed.resolved), *prepared["notes"]]:
        print(in_a_line(f"note         {note}"))
    if composed.run.checkpoint.every == 0:
        print("note         no checkpoints (checkpoint.every=0): a run that is stopped begins again at step 1")
    for tracker in composed.run.tracker.values():
        if hasattr(tracker, "why"):
            print(in_a_line(f"tracker      {tracker.why().removeprefix('tracker=')}"))
    for line in prepared["audit"].lines():
        print(in_a_line(line))
    console = Console(highlight=False, soft_wrap=True)
    console.print(prepared["audit"].heading, style="bold")
    console.print(prepared["audit"].coloured(console.width if console.is_terminal else None))
    print(in_a_line(f"run folder   {composed.run.run_dir}"), flush=True)


def create(run_dir: Path, composed: Composed, prepared: Mapping[str, Any]) -> None:
    """Make the run folder, with the list of the rows that are not learned from."""
    from dsft.data.skipped import copy_skipped

    folder.create(run_dir, composed, prepared["plan"], prepared["digests"])
    with at_the_door(run_dir):
        copy_skipped(prepared["tokens"], run_dir)
