"""Before a run: all that can be refused is refused here, without weights; and what its user is told."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from dsft import folder, offline, published
from dsft.compose import Composed
from dsft.config import Run

if TYPE_CHECKING:
    from dsft.data.open import Dataset
    from dsft.models.files import ModelFiles


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
    run.data.check()
    files = run.model.resolve()
    from dsft.data.open import open_data
    from dsft.data.order import total_steps

    day = None if anew else folder.provenance(run_dir).get("template_date")
    data = open_data(run.data, files.tokenizer(), max_length=run.train.max_length, seed=run.train.seed, day=day)
    _check_fit(run, files, data)
    run.method.check(total_steps(run.train, len(data.train)))
    digests = {"base_digest": files.digest(), **data.digests}
    folder.check_digests(run_dir, digests, composed.resolved)
    if done:
        published.check(run_dir)
        return None
    from dsft.plan import make_plan

    plan = make_plan(composed, files)
    if not anew:
        folder.check_parameters(run_dir, plan)
    return {"plan": plan, "digests": digests, "audit": data.audit, "notes": data.notes}


def _check_fit(run: Run, files: "ModelFiles", data: "Dataset") -> None:
    """Refuse rows and tokens beyond the model's reach, and a metric that these data do not give."""
    from dsft.plan import check_positions

    check_positions(run, files)
    _check_vocabulary(files, data)
    shape, longest = files.config, int(data.train.lengths.max())
    reach, before = getattr(shape, "max_position_embeddings", None), run.method.positions
    if reach is not None and longest + before > reach:
        taken = f" less {before} that the method takes" if before else ""
        raise ValueError(
            f"train.max_length must be at most {reach - before}, the positions that the model knows{taken}, got rows "
            f"of {longest} tokens with train.max_length={run.train.max_length}; lower it"
        )
    metric = run.train.early_stop_metric
    if metric is not None and (data.eval is None or (metric == "eval/accuracy" and not data.verifiable)):
        raise ValueError(
            f"train.early_stop_metric={metric} needs held-out rows that give it; hold some out or unset it"
        )


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

    print(as_text(prepared["plan"]))
    for note in folder.notes(Path(composed.run.run_dir), composed.resolved):
        print(f"note         {note}")
    if composed.run.checkpoint.every == 0:
        print("note         no checkpoints (checkpoint.every=0): a run that is stopped begins again at step 1")
    for tracker in composed.run.tracker.values():
        if hasattr(tracker, "why"):
            print(f"tracker      {tracker.why().removeprefix('tracker=')}")
    for line in [*prepared["audit"].lines(), *prepared["notes"]]:
        print(line)
    console = Console(highlight=False, soft_wrap=True)
    console.print("an example, what is supervised in green:", style="bold")
    console.print(prepared["audit"].coloured())
    print(f"run folder   {composed.run.run_dir}", flush=True)
