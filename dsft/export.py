"""python -m dsft.export RUN --to adapter|merged OUT: a folder that PEFT, transformers or dsft loads."""

import argparse
import json
import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from dsft_launchers.files import mode_as_usual
from dsft_launchers.shown import in_a_line

from dsft import basis, owners
from dsft.config import Run
from dsft.entry import collect_again, enter, lose_lines
from dsft.folder import provenance, state
from dsft.headed import labels_of
from dsft.imports import uncompiled
from dsft.learned import FLAG, Learned, learned
from dsft.loaded import unpacked_base
from dsft.methods import native
from dsft.methods.patterns import check_config
from dsft.origin import called
from dsft.published import describe, names, require
from dsft.wording import refuse


def main(argv: Sequence[str] | None = None) -> int:
    """Write OUT; 2 if RUN or OUT cannot be used."""
    parser = argparse.ArgumentParser(prog="dsft export", description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder that is done")
    parser.add_argument("--to", choices=("adapter", "merged"), required=True)
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--with-base-path", action="store_true", help="name a base that is a folder here by its path")
    parser.add_argument(owners.TRUST, action="store_true", help="read a folder that other users may have written")
    parser.add_argument(FLAG, action="store_true", help="let the code of the base model run, which it brings itself")
    parser.error = _raise  # type: ignore[method-assign]
    try:
        args = parser.parse_args(argv)
        export(
            args.run, args.to, args.out, base_path=args.with_base_path, trust=args.trust,
            trust_remote_code=args.trust_remote_code,
        )  # fmt: skip
    except ValueError as error:
        return refuse(error)
    print(in_a_line(f"{args.to} written to {args.out}"))
    return 0


def _raise(message: str) -> NoReturn:
    usage = f"dsft export RUN --to adapter|merged OUT [--with-base-path] [{owners.TRUST}] [{FLAG}]"
    raise ValueError(f"{message}; usage: {usage}")


def export(
    run_dir: Path, what: str, out: Path, *, base_path: bool = False, trust: bool = False,
    trust_remote_code: bool = False,
) -> None:  # fmt: skip
    """Copy the result (adapter), or the base with the adapter merged into the weights that training saw (merged).

    base_path: a base that is a folder of this machine is named by its path; else by the folder's name and its digest.
    trust: RUN may be a folder that others write; trust_remote_code: the base model's own code may run.
    """
    owners.check(run_dir, "RUN", trust=trust)
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(f"RUN must be a run folder, got {run_dir} without config.yaml; give the run_dir of a run")
    if state(run_dir).get("state") != "done":
        raise ValueError(
            f"RUN must be done, {run_dir} is {state(run_dir).get('state', 'not started')}; finish it first"
        )
    _check_out(out)
    lose_lines()
    run = learned(run_dir, trust_remote_code=trust_remote_code)
    require(run_dir / "adapter", "RUN")
    if what == "adapter" or run.method.whole:
        _copy(run_dir / "adapter", out)
        if not base_path:
            _name_by_digest(run_dir, out)
        mode_as_usual(out)
        return
    basis.require_code(run.model, provenance(run_dir))
    basis.require(run_dir, run.model.resolve())
    from dsft.engine.result import write_beside
    from dsft.models.progress import no_progress_bars

    collect_again()
    with no_progress_bars(), warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 by a name that it gives up in version 6
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model, beside = merged_and_beside(run, run_dir / "adapter")
        model.save_pretrained(out)
        write_beside(run.method, beside, out, 1)
        run.model.resolve().tokenizer().save_pretrained(out)
    mode_as_usual(out)


def _copy(result: Path, out: Path) -> None:
    """Copy the files of a result that dsft has listed, or writes. Raises ValueError for one that is no plain file.

    What else lies there stays there, and is named: a link may lead to any file of the one who exports.
    """
    written = names(result)
    for name in written:
        place = result / name
        if place.resolve() != result.resolve() / name or not place.is_file():
            raise ValueError(
                f"RUN must hold its whole result in files of its own, got {place} that is none; put it back"
            )
    for name in written:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        with open(result / name, "rb", opener=_no_link) as source, (out / name).open("xb") as target:
            shutil.copyfileobj(source, target)
    if others := sorted(
        path.name for path in result.iterdir() if not any(Path(name).parts[0] == path.name for name in written)
    ):
        print(in_a_line(f"note         not of the result, and left out: {', '.join(others)}"))


def _name_by_digest(run_dir: Path, out: Path) -> None:
    """Write the base's name and digest in the place of its path, which tells others how this machine is laid out."""
    base = str(json.loads((run_dir / "plan.json").read_text(encoding="utf-8")).get("model"))
    if not os.path.isdir(base):
        return
    known = provenance(run_dir)
    name, changed = called(base, known.get("base_digest", known.get("base_fingerprint", ""))), False
    for path in (*out.glob("*.json"), *out.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        old, new = (json.dumps(each)[1:-1] if path.suffix == ".json" else each for each in (base, name))
        other = text.replace(old, new)
        if other != text:
            path.write_text(other, encoding="utf-8")
            changed = True
    if changed:
        describe(out)
        print(in_a_line(f"note         the base is called {name} there; --with-base-path gives its path"))


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)


def _check_out(out: Path) -> None:
    """Refuse what is there, and where no folder can be made: tried, as permission bits do not tell all."""
    if os.path.lexists(out):
        raise ValueError(f"OUT must not exist, got {out}; choose another folder")
    first = [place for place in (out, *out.parents) if not os.path.lexists(place)][-1]
    try:
        first.mkdir()
        first.rmdir()
    except OSError as error:
        raise ValueError(
            f"OUT must be where a folder can be made, got {out}, where {first} cannot ({error.strerror}); choose "
            "another folder"
        ) from error


def _refuse_unmergeable(run: Learned | Run, adapter: Path) -> None:
    """What cannot be merged is refused before a weight is read: our own formats by merging on meta, and prefixes, for
    which PEFT has no merge.
    """
    import torch

    if not native.holds(adapter):
        with uncompiled():
            from peft import PeftConfig
        if PeftConfig.from_pretrained(str(adapter)).is_prompt_learning:
            run.method.merge(torch.nn.Module())  # its own refusal
        return

    from dsft.models.anatomy import dissect
    from dsft.models.build import build_meta

    model = build_meta(replace(run.model.resolve(), labels=labels_of(adapter)), torch.float32, "eager")
    method = native.read(adapter)
    method.merge(method.attach(model, dissect(model)))


def merged(run: Learned | Run, adapter: Path) -> Any:
    """The base as training saw it (packed linears unpacked) with the adapter's update added, on CPU in one process.

    The weights are computed in fp32 and kept in the dtype of train.precision, which rounds them once; what the base has
    in another (a buffer in fp32) keeps that.
    """
    return merged_and_beside(run, adapter)[0]


def merged_and_beside(run: Learned | Run, adapter: Path) -> tuple[Any, dict[str, Any]]:
    """As merged, and what the method keeps beside such a model."""
    _refuse_unmergeable(run, adapter)
    import torch

    from dsft.methods import peft_bridge
    from dsft.models.anatomy import dissect

    base = unpacked_base(run, labels=labels_of(adapter))
    dtype, anatomy = base.dtype, dissect(base)
    dtypes = {name: tensor.dtype for name, tensor in (*base.named_parameters(), *base.named_buffers())}
    base.to(torch.float32)
    if native.holds(adapter):
        method = native.read(adapter)
        whole: Any = method.merge(native.load(base, anatomy, adapter))
    else:
        check_config(json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")), adapter)
        whole = run.method.merge(peft_bridge.load(base, adapter))
    beside: dict[str, Any] = {}
    for name, param in whole.named_parameters():
        param.data, more = run.method.finished(whole, anatomy, name, param.data, dtype)
        beside |= more
    for name, tensor in (*whole.named_parameters(), *whole.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtypes[name] if name in dtypes else dtype)
    return whole, beside


if __name__ == "__main__":
    enter(main)
