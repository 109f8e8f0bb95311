"""Hydra plugins of dsft: where configurations are found, and how the points of a sweep are started.

Imported by every Hydra program of the environment: no torch here, and nothing happens in programs that are not dsft.
"""

import os
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
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
    found = []
    chosen = os.environ.get("DSFT_CONFIG_DIR")
    if chosen:
        found.append(("--config-dir", f"file://{chosen}"))
    beside = Path.cwd() / "conf"
    if beside.is_dir() and beside.resolve() != own.resolve():
        found.append(("./conf", f"file://{beside}"))
    for point in sorted(entry_points(group="dsft.configs"), key=lambda point: point.name):
        found.append((f"plugin {point.name}", f"pkg://{point.value}"))
    return found


class DsftLauncher(Launcher):
    """Starts each point of a sweep as a run of its own, one after another, in SWEEP/<index>.

    codes: exit codes of all points so far in this process; Hydra gives no value of a sweep back to its caller.
    """

    codes: ClassVar[list[int]] = []

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what launch needs."""
        self.sweep = str(config.run_dir)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the points; a point's return value is its exit code."""
        from dsft.sweep import run_points

        points = [list(overrides) for overrides in job_overrides]
        try:
            codes = run_points(points, Path(self.sweep), first=initial_job_idx)
        except ValueError:
            _unwrite(Path(self.sweep))
            raise
        self.codes.extend(codes)
        return [_returned(point, code) for point, code in zip(points, codes, strict=True)]


def _unwrite(sweep: Path) -> None:
    """Take back what Hydra's sweeper wrote before the points were checked."""
    (sweep / "multirun.yaml").unlink(missing_ok=True)
    if sweep.is_dir() and not any(sweep.iterdir()):
        sweep.rmdir()


def _returned(overrides: list[str], code: int) -> JobReturn:
    returned = JobReturn(overrides=overrides, cfg=OmegaConf.create({}), status=JobStatus.COMPLETED)
    returned.return_value = code
    return returned


def _launcher_node() -> dict[str, Any]:
    return {"_target_": "hydra_plugins.dsft.DsftLauncher"}


ConfigStore.instance().store(group="hydra/launcher", name="dsft", node=_launcher_node(), provider="dsft")
