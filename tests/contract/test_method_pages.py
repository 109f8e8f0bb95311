"""Every method and objective has its page, and it says what YAML and class say."""

import pytest

from benchmarks import objective_pages
from benchmarks.method_pages import COUNTS, PAGES, methods, page


def test_every_method_has_a_page_and_no_page_is_of_another() -> None:
    assert sorted(path.stem for path in PAGES.glob("*.md")) == methods()


@pytest.mark.parametrize("name", methods())
def test_a_page_is_what_make_pages_writes(name: str) -> None:
    text = (PAGES / f"{name}.md").read_text()
    assert text.partition(COUNTS)[0] + COUNTS == page(name)
    prose, _, rest = text.partition("[conf/method")
    assert "Choose it" in prose
    assert "```yaml\n```" not in rest


def test_every_objective_has_the_page_that_make_pages_writes() -> None:
    found = {path.stem: path.read_text() for path in objective_pages.PAGES.glob("*.md")}
    assert found == {name: objective_pages.page(name) for name in objective_pages.objectives()}
    assert all("Choose it" in text for text in found.values())
