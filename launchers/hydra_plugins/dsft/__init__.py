"""Hydra plugins of dsft: where configurations are found, and how the points of a sweep are started.

Imported by every Hydra program of the environment: no torch here, and nothing happens in programs that are not dsft.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class DsftSearchPath(SearchPathPlugin):
    """Puts a user's folders and installed plugins before dsft's own configurations, so that they can shadow them."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Order, first wins: --config-dir, ./conf, packages with an entry point in dsft.configs, dsft."""
        main = next((entry for entry in search_path.get_path() if entry.provider == "main"), None)
        if main is None or not (Path(main.path.removeprefix("file://")) / "experiment" / "demo.yaml").is_file():
            return
        anchor = "main"
        for provider, path in reversed(_providers(Path(main.path.removeprefix("file://")))):
            search_path.prepend(provider=provider, path=path, anchor=anchor)
            anchor = provider


def _providers(own: Path) -> list[tuple[str, str]]:
    from dsft.locate import providers

    found = []
    chosen = os.environ.get("DSFT_CONFIG_DIR")
    if chosen:
        found.append(("--config-dir", f"file://{chosen}"))
    beside = Path.cwd() / "conf"
    if beside.is_dir() and beside.resolve() not in (own.resolve(), chosen and Path(chosen).resolve()):
        _check_own(beside)
        found.append(("./conf", f"file://{beside}"))
    for name, package in sorted(providers().items()):
        found.append((f"plugin {name}", f"pkg://{package}"))
    return found


def _check_own(conf: Path) -> None:
    """Refuse ./conf of another user, and one that came with a run or an adapter. Raises ValueError."""
    from dsft import owners
    from dsft.searched import why_not

    reasons = ((folder, why_not(folder)) for folder in (conf, conf.parent))
    for place, why in (*reasons, *owners.doubts(conf)):
        if why is not None:
            raise ValueError(
                f"./conf must be your own, got {conf}, and {place} {why}; start dsft in another folder or, if you "
                f"trust it, name it: --config-dir {conf}"
            )


class DsftLauncher(Launcher):
    """Starts each point of a sweep as a run of its own in SWEEP/<index>, here or in SLURM job arrays.

    metric: the value that a sweeper gets of a point, and that the table is sorted by. codes: exit codes of all points
    so far in this process; Hydra gives no value of a sweep back to its caller.
    trust: the command line has --trust.
    """

    codes: ClassVar[list[int]] = []
    sweep: ClassVar[Path | None] = None
    before: ClassVar[str | None] = None

    def __init__(self, metric: str, trust: bool) -> None:
        self.metric, self.trust = metric, trust

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what launch needs, and what Hydra's sweeper will write over."""
        from dsft import folder, owners, paths
        from dsft.sweeps import ledger

        for typed in OverridesParser.create().parse_overrides(list(config.hydra.overrides.task)):
            if typed.key_or_group == "run_dir" and typed.is_sweep_override():
                raise ValueError(f"run_dir must be one for the whole sweep, got {typed.input_line}; give one folder")
        self.book = ledger.begin(self.metric)
        paths.check_run_dir(config.run_dir)
        owners.check(Path(config.run_dir), "run_dir", trust=self.trust, depth=1)
        folder.check_place(Path(config.run_dir))
        file = Path(config.run_dir) / MULTIRUN
        DsftLauncher.sweep, DsftLauncher.before = file.parent, file.read_text() if file.is_file() else None

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the points; a point's return value is the last value of the metric, NaN if it is not done.

        A request to stop ends the sweep: a sweeper that comes in batches gets no further one.
        """
        from dsft import folder
        from dsft.sweeps.points import run_points
        from dsft.sweeps.table import last_values

        assert self.sweep is not None
        if (self.sweep / MULTIRUN).is_file():
            (self.sweep / MULTIRUN).chmod(0o600)  # it holds launcher.setup, from wherever it came
        points = [list(overrides) for overrides in job_overrides]
        codes, left = run_points(points, self.sweep, first=initial_job_idx, book=self.book, trust=self.trust)
        self.codes.extend(codes.values())
        if left is not None:
            raise SystemExit(max(left, *self.codes))
        returns = []
        for index, point in enumerate(points, start=initial_job_idx):
            returned = JobReturn(overrides=point, cfg=OmegaConf.create({}), status=JobStatus.COMPLETED)
            run_dir = self.sweep / str(index)
            values = last_values(run_dir) if folder.state(run_dir).get("state") == "done" else {}
            returned.return_value = values.get(self.metric, math.nan)
            returns.append(returned)
        return returns

    @classmethod
    def unwrite(cls) -> None:
        """If no point was started, take back what Hydra's sweeper wrote before they were checked."""
        if cls.sweep is None or not cls.sweep.is_dir() or (cls.sweep / "sweep.json").exists():
            return
        if cls.before is not None:
            (cls.sweep / MULTIRUN).write_text(cls.before)
            return
        (cls.sweep / MULTIRUN).unlink(missing_ok=True)
        if not any(cls.sweep.iterdir()):
            cls.sweep.rmdir()


MULTIRUN = "multirun.yaml"
"""What Hydra's sweeper writes."""


def _launcher_node() -> dict[str, Any]:
    return {"_target_": "hydra_plugins.dsft.DsftLauncher", "metric": "loss", "trust": False}


ConfigStore.instance().store(group="hydra/launcher", name="dsft", node=_launcher_node(), provider="dsft")
