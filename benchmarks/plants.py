"""The planting tool: at the n-th call of a function on a rank a fault happens there.

In a process that is started: `environment` gives its variables, and planting/sitecustomize.py plants while the
interpreter starts. In the running process: the context manager `planted`. The standard library alone, since this file
is loaded before anything else is.
"""

import builtins
import ctypes
import functools
import importlib
import importlib.machinery
import inspect
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "planting"
"""What PYTHONPATH must begin with."""

PLANTS, FIRED = "DSFT_PLANTS", "DSFT_PLANTS_FIRED"
"""Variables of a process: its plants as JSON, and a file to which each plant that happens adds a line."""


@dataclass(frozen=True)
class Plant:
    """A fault. place: MODULE:FUNCTION or MODULE:CLASS.FUNCTION; it happens before the call.

    what: kill (-9), stop (SIGSTOP), raise (value: an expression of args), sleep (value: seconds), run (value: a shell
    command, which finds the process in PLANT_PID and its parent in PLANT_PARENT), hold_gil (value: seconds). nth: of
    the calls that fit, from 1; 0: all of them. rank: by the variable RANK, else 0; None: every rank. when: an
    expression of args and keys that says whether a call fits. after: seconds by which kill and stop come later, from a
    thread.
    """

    place: str
    what: str
    value: str = ""
    nth: int = 1
    rank: int | None = None
    when: str = ""
    after: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what would never happen."""
        if self.what not in DEEDS:
            raise ValueError(f"what must be one of {', '.join(DEEDS)}, got {self.what}")
        if ":" not in self.place:
            raise ValueError(f"place must be MODULE:FUNCTION, got {self.place}")

    @property
    def module(self) -> str:
        """The module that holds the function."""
        return self.place.partition(":")[0]

    def fits(self, args: Sequence[Any], keys: Mapping[str, Any]) -> bool:
        """Whether a call counts in this process."""
        if self.rank is not None and int(os.environ.get("RANK", "0")) != self.rank:
            return False
        return not self.when or bool(eval(self.when, {**vars(builtins), "os": os, "args": args, "keys": keys}))


def kill(plant: Plant, args: Sequence[Any]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop(plant: Plant, args: Sequence[Any]) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def throw(plant: Plant, args: Sequence[Any]) -> None:
    raise eval(plant.value, {**vars(builtins), "os": os, "args": args})


def sleep(plant: Plant, args: Sequence[Any]) -> None:
    time.sleep(float(plant.value))


def run(plant: Plant, args: Sequence[Any]) -> None:
    who = {"PLANT_PID": str(os.getpid()), "PLANT_PARENT": str(os.getppid())}
    subprocess.run(plant.value, shell=True, check=False, env={**os.environ, **who, PLANTS: "[]"})


def hold_gil(plant: Plant, args: Sequence[Any]) -> None:
    """Spend the time in C with the interpreter's lock held: no other thread of this process runs meanwhile."""
    ctypes.PyDLL(None).usleep(int(float(plant.value) * 1e6))


DEEDS: dict[str, Callable[[Plant, Sequence[Any]], None]] = {
    "kill": kill, "stop": stop, "raise": throw, "sleep": sleep, "run": run, "hold_gil": hold_gil,
}  # fmt: skip


def environment(plants: Sequence[Plant], fired: Path | None = None) -> dict[str, str]:
    """Variables of a process in which plants happen, to be added to its own; fired gets a line for each that does."""
    path = os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH", "")]))
    told = {FIRED: str(fired)} if fired else {}
    return {"PYTHONPATH": path, PLANTS: json.dumps([asdict(plant) for plant in plants]), **told}


def happened(fired: Path) -> list[dict[str, Any]]:
    """Lines of that file: place, what, rank, pid and time."""
    return [json.loads(line) for line in fired.read_text().splitlines()] if fired.is_file() else []


def arm() -> None:
    """Plant what the variables say: at once in modules that are there, else when they are imported."""
    plants = [Plant(**each) for each in json.loads(os.environ.get(PLANTS, "[]"))]
    for plant in plants:
        if plant.module in sys.modules:
            _put(plant)
    if later := [plant for plant in plants if plant.module not in sys.modules]:
        sys.meta_path.insert(0, _Finder(later))


@contextmanager
def planted(*plants: Plant) -> Iterator[None]:
    """Within, plants happen in this process, also where a function was imported by name."""
    undone = [_put(plant) for plant in plants]
    try:
        yield
    finally:
        for undo in reversed(undone):
            undo()


class _Finder:
    """Finds the modules of plants as Python does, and plants once they have been run."""

    def __init__(self, plants: Sequence[Plant]) -> None:
        self.plants = plants

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        mine = [plant for plant in self.plants if plant.module == name]
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if mine else None
        if spec is None or spec.loader is None:
            return None
        whole = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            whole(module)
            for plant in mine:
                _put(plant, module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _put(plant: Plant, module: Any = None) -> Callable[[], None]:
    """Put the plant before its function; what undoes it. module: of the plant, where it is not in sys.modules yet."""
    module = importlib.import_module(plant.module) if module is None else module
    *path, name = plant.place.partition(":")[2].split(".")
    owner = functools.reduce(getattr, path, module)
    kept = inspect.getattr_static(owner, name)
    real = getattr(owner, name)
    before = _before(plant, kept.__func__ if isinstance(kept, staticmethod | classmethod) else real)
    put = type(kept)(before) if isinstance(kept, staticmethod | classmethod) else before
    places = [(owner, name)]
    if not path:
        places += [
            (each, key)
            for each in list(sys.modules.values()) if each is not owner and each.__class__ is type(sys)
            for key, value in list(vars(each).items()) if value is real
        ]  # fmt: skip
    for place, key in places:
        setattr(place, key, put)

    def undo() -> None:
        for place, key in places:
            setattr(place, key, kept)

    return undo


def _before(plant: Plant, real: Callable[..., Any]) -> Callable[..., Any]:
    calls, within = itertools.count(1), threading.local()

    @functools.wraps(real)
    def function(*args: Any, **keys: Any) -> Any:
        if not getattr(within, "busy", False):  # what the plant itself calls is no call
            within.busy = True
            try:
                if plant.fits(args, keys) and plant.nth in (0, next(calls)):
                    _happen(plant, args)
            finally:
                within.busy = False
        return real(*args, **keys)

    return function


def _happen(plant: Plant, args: Sequence[Any]) -> None:
    if plant.after:
        threading.Timer(plant.after, _do, [plant, args]).start()
    else:
        _do(plant, args)


def _do(plant: Plant, args: Sequence[Any]) -> None:
    if told := os.environ.get(FIRED):
        who = {"rank": int(os.environ.get("RANK", "0")), "pid": os.getpid(), "time": time.time()}
        line = json.dumps({"place": plant.place, "what": plant.what, **who}) + "\n"
        descriptor = os.open(told, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
        os.write(descriptor, line.encode())
        os.close(descriptor)
    DEEDS[plant.what](plant, args)
