"""Links in the documentation lead somewhere: to a file of the project, and to a heading in it."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)[^)]*\)")


def pages(root: Path) -> list[Path]:
    return sorted([*root.glob("*.md"), *(root / "docs").rglob("*.md"), *(root / "benchmarks").rglob("*.md")])


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of the headings."""
    headings = re.findall(r"^#+ +(.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def dead_links(root: Path) -> list[str]:
    found = []
    for page in pages(root):
        for link in LINK.findall(prose(page)):
            target, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link):
                continue  # another site: not asked, tests need no network
            goal = (page.parent / target).resolve() if target else page
            if not goal.exists():
                found.append(f"{page.relative_to(root)}: {link} does not exist")
            elif anchor and goal.suffix == ".md" and anchor not in anchors(goal):
                found.append(f"{page.relative_to(root)}: {link} has no such heading")
    return found


def test_links_lead_somewhere() -> None:
    assert dead_links(ROOT) == []


def test_a_planted_dead_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/page.md").write_text("# Good place\n[a](../README.md#the-way) [b](gone.md) [c](#good-place)\n")
    (tmp_path / "README.md").write_text("[a](docs/page.md#bad-place) [b](https://example.org/x)\n```\n[c](no)\n```\n")
    assert dead_links(tmp_path) == [
        "README.md: docs/page.md#bad-place has no such heading",
        "docs/page.md: ../README.md#the-way has no such heading",
        "docs/page.md: gone.md does not exist",
    ]
