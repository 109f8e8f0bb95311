import warnings
from collections.abc import Iterator

import pytest
import torch
from dsft_launchers.verdict import RefusedError

from dsft.comm.world import World
from dsft.compose import compose
from dsft.engine.assemble import assemble
from dsft.engine.determinism import Wanted, choose, told


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    choose("auto")


def _without_a_deterministic_kernel() -> None:
    torch.zeros(3).put_(torch.tensor([1]), torch.tensor([2.0]))


@pytest.mark.parametrize(
    ("word", "expected"), [(None, (True, True)), ("true", (True, False)), ("false", (False, False))]
)
def test_what_is_asked_for_holds_from_the_first_product_on(word: str | None, expected: tuple[bool, bool]) -> None:
    words = [] if word is None else [f"train.deterministic={word}"]
    run = compose(["model=tiny", "method=bitfit", "data=reasoning_gym", "launcher=local", *words]).run
    assemble(run, run.model.resolve(), World(0, 1, 0, torch.device("cpu")))
    found = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    assert found == expected


def test_what_has_no_deterministic_kernel_runs_and_is_named_once() -> None:
    names: list[str] = []
    choose("auto")
    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("always")
        show = warnings.showwarning
        with told(names.append):
            _without_a_deterministic_kernel()
            _without_a_deterministic_kernel()
            warnings.warn("of another kind", stacklevel=1)
        assert warnings.showwarning is show
    assert names == ["put_"]
    assert [str(other.message) for other in others] == ["of another kind"]


def test_where_the_user_asks_for_it_such_an_operator_ends_the_run_in_one_line() -> None:
    choose(True)
    with pytest.raises(RefusedError, match=r"train\.deterministic=true, and put_ has no kernel"), told(print):
        _without_a_deterministic_kernel()
    with pytest.raises(RuntimeError, match="other"), told(print):
        raise RuntimeError("other")


@pytest.mark.parametrize("wanted", [False, "auto"])
def test_nothing_is_said_of_what_is_not_asked_for(wanted: Wanted) -> None:
    choose(wanted)
    with warnings.catch_warnings(), told(lambda name: pytest.fail(name)):
        warnings.simplefilter("error" if wanted is False else "default")
        torch.ones(3, requires_grad=True).sum().backward()
        if wanted is False:
            _without_a_deterministic_kernel()
