"""docs/objectives/NAME.md for each objective, from the text at the top of its YAML, its module and its class.

python -m benchmarks.objective_pages   (make pages)
"""

import inspect
import sys

from benchmarks.method_pages import ROOT, described
from dsft.compose import compose
from dsft.data.kinds import KINDS
from dsft.wording import OWN_CONF

PAGES = ROOT / "docs" / "objectives"


def objectives() -> list[str]:
    """Names of all objectives."""
    return sorted(path.stem for path in (OWN_CONF / "objective").glob("*.yaml"))


def page(name: str) -> str:
    """The page."""
    kind = type(compose([f"objective={name}", "launcher=local", "tracker=[]"]).run.objective)
    source = inspect.cleandoc(inspect.getmodule(kind).__doc__ or "")  # type: ignore[union-attr]  # it has a module
    labels = "one for each of `data.labels`" if kind.head is None else ", ".join(kind.head) or "none"
    measures = [f"`{measure}` ({'higher' if way == 'max' else 'lower'})" for measure, way in kind.measures.items()]
    facts = {
        "rows": f"{KINDS[kind.wants].rows}: {KINDS[kind.wants].columns}",
        "terms of the loss": ", ".join(f"`{term}`" for term in kind.terms),
        "measures, and which values are better": ", ".join(measures) or "none",
        "reference": "yes" if kind.roles else "no",
        "outputs of a head of its own": labels,
        "forward passes over each row": str(kind.passes),
        "dropout": "set to 0" if kind.compares else "as set",
    }
    table = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items())]
    more = "What all of them share: [objectives.md](../objectives.md)."
    return "\n".join([*described("objective", name, kind), source, "", *table, "", more]) + "\n"


def main() -> int:
    """Write all pages; those of objectives that are no more go."""
    PAGES.mkdir(exist_ok=True)
    for old in PAGES.glob("*.md"):
        old.unlink()
    for name in objectives():
        (PAGES / f"{name}.md").write_text(page(name))
        print(name, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
