"""docs/methods/NAME.md for each method, from the text at the top of its YAML, its class and counts on meta.

python -m benchmarks.method_pages   (make pages)
"""

import inspect
import re
import sys
from pathlib import Path
from typing import Any

from dsft.compose import compose
from dsft.wording import OWN_CONF

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "methods"
MODELS = {"smollm2_135m": "SmolLM2-135M", "llama8b": "Llama 3.1 8B"}
COUNTS = "| model | parameters | trainable | share |"
"""The line of a page from which on it is measured, and not copied."""


def methods() -> list[str]:
    """Names of all methods."""
    return sorted(path.stem for path in (OWN_CONF / "method").glob("*.yaml"))


def described(group: str, name: str, kind: type) -> list[str]:
    """What the YAML of an option says of it, its keys, and what its class says."""
    text = (OWN_CONF / group / f"{name}.yaml").read_text()
    top, body = re.match(r"((?:#[^\n]*\n)*)(.*)", text, re.S).groups()  # type: ignore[union-attr]  # it always matches
    prose = [line.removeprefix("#").strip() for line in top.splitlines() if "@package" not in line]
    file = Path(inspect.getfile(kind)).relative_to(ROOT)
    yaml = f"conf/{group}/{name}.yaml"
    return [
        f"# `{group}={name}`", "", *prose, "", f"[{yaml}](../../{yaml}):", "", "```yaml", body.strip(), "```", "",
        f"[{kind.__name__}](../../{file}): {inspect.cleandoc(kind.__doc__ or '')}", "",
    ]  # fmt: skip


def page(name: str) -> str:
    """The page up to its counts."""
    return "\n".join([*described("method", name, type(_run(name, "smollm2_135m").method)), COUNTS])


def counts(name: str) -> list[str]:
    """A row per model."""
    from dsft.engine.assemble import skeleton
    from dsft.models.census import census

    rows = ["|---|---|---|---|"]
    for model, title in MODELS.items():
        run = _run(name, model)
        bones = skeleton(run, run.model.resolve(planning=True))
        found = census(bones.model, bones.anatomy)
        share = 100 * found["trainable"] / found["total"]
        rows.append(f"| {title} | {found['total']:,} | {found['trainable']:,} | {share:.3g} % |")
    return rows


def _run(name: str, model: str) -> Any:
    return compose([f"model={model}", f"method={name}", "launcher=local", "tracker=[]"]).run


def main() -> int:
    """Write all pages; those of methods that are no more go."""
    PAGES.mkdir(exist_ok=True)
    for old in PAGES.glob("*.md"):
        old.unlink()
    for name in methods():
        (PAGES / f"{name}.md").write_text("\n".join([page(name), *counts(name)]) + "\n")
        print(name, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
