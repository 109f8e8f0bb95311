"""Weights & Biases; files under RUN/wandb, offline without a key or a way to the server."""

import importlib.util
import os
import re
import signal
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from threading import Thread
from typing import Any, Literal
from urllib.parse import urlsplit

INSTALL = "pip install 'dsft[wandb]'"

MODES = ("online", "offline", "disabled")
"""Values of WANDB_MODE that tracker.wandb.mode=auto follows."""

PATIENCE_S = 10.0
"""How long the server may take to answer at all; wandb itself would try for 90 s and then leave the run without it."""


@dataclass(kw_only=True)
class WandbTracker:
    """One W&B run for all attempts of a run; silent in the terminal. notice: what a person should know of open."""

    mode: Literal["auto", "online", "offline"]
    project: str
    entity: str | None
    name: str | None
    group: str | None
    notice: str | None = field(init=False, default=None, repr=False, compare=False)
    _run: Any = field(init=False, default=None, repr=False, compare=False)

    def check(self) -> None:
        """Raise ValueError if the package or, for mode=online, the key is missing, or WANDB_MODE is unknown."""
        if not installed():
            raise ValueError(f"tracker=wandb needs the package wandb, which is missing; {INSTALL}")
        if self.resolved_mode() == "online" and not has_key():
            raise ValueError(
                "tracker.wandb.mode=online needs a key, got none; set WANDB_API_KEY or run `wandb login`, "
                "or choose tracker.wandb.mode=offline"
            )

    def resolved_mode(self) -> str:
        """The mode that auto stands for here: WANDB_MODE, else online with a key, else offline."""
        if self.mode != "auto":
            return self.mode
        wish = os.environ.get("WANDB_MODE", "")
        if not wish:
            return "online" if has_key() else "offline"
        if wish not in MODES:
            raise ValueError(f"WANDB_MODE must be one of {', '.join(MODES)}, got {wish}; set it or unset it")
        return wish

    def open(self, run_dir: Path, config: Mapping[str, Any], run_id: str | None) -> str | None:
        """Start the run, or go on with run_id; return its id.

        Where mode=auto means online and the server cannot be reached it is offline, and notice says so. Else raises
        wandb's errors if the server does not answer.
        """
        import wandb

        run_dir.mkdir(parents=True, exist_ok=True)
        mode = self.resolved_mode()
        chosen = self.mode != "auto" or os.environ.get("WANDB_MODE")
        if mode == "online" and not chosen and not reachable(server()):
            mode = "offline"
            self.notice = f"{server()} cannot be reached, wandb is offline; wandb sync {run_dir}/wandb/offline-run-*"
        with _signals_held():
            self._run = wandb.init(
                project=self.project,
                entity=self.entity,
                name=self.name or run_dir.absolute().name,
                group=self.group,
                id=run_id,
                resume="allow",
                allow_val_change=True,  # a resumed run may change its strategy or launcher
                mode=mode,  # type: ignore[arg-type]
                dir=run_dir,
                config=dict(config),
                save_code=False,
                # the metadata are the command line, paths and the host; git's address may hold a password
                settings=wandb.Settings(silent=True, console="off", x_disable_meta=True, disable_git=True),
            )
        return str(self._run.id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record values of one step; more of the same step are merged.

        Raises ConnectionError if wandb's service died.
        """
        assert self._run is not None, "open comes first"
        with self._parting():
            self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Send or write what is left. Without an open run: nothing. Raises as log does."""
        if self._run is not None:
            with self._parting():
                self._run.finish()
            self._run = None

    @contextmanager
    def _parting(self) -> Iterator[None]:
        """If wandb's service is gone, part from it now: else wandb speaks to it at exit and prints a traceback."""
        try:
            yield
        except ConnectionError:
            import wandb

            self._run = None
            with suppress(ConnectionError):  # the one being raised, met again
                wandb.teardown()
            raise


def installed() -> bool:
    """True if the package wandb can be imported."""
    return importlib.util.find_spec("wandb") is not None


def has_key() -> bool:
    """True if WANDB_API_KEY is set or the netrc file names W&B's host."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(server()).hostname or ""
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return netrc.is_file() and re.search(rf"machine\s+{re.escape(host)}\s", netrc.read_text()) is not None


def server() -> str:
    """The address of W&B's server."""
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def reachable(url: str) -> bool:
    """Whether anything answers there, through the proxies that the environment names, within PATIENCE_S."""
    answers: list[bool] = []
    # a thread: looking up a name takes as long as it takes
    asking = Thread(target=lambda: answers.append(_answers(url)), daemon=True)
    asking.start()
    asking.join(PATIENCE_S)
    return any(answers)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=PATIENCE_S).close()
    except (urllib.error.HTTPError, HTTPException, ValueError):  # an answer, or no address: wandb will tell
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # whom wandb trusts is its own affair
    except OSError:
        return False
    return True


@contextmanager
def _signals_held() -> Iterator[None]:
    """Processes started inside never see SIGUSR1 and SIGUSR2, which SLURM sends to every process of a step.

    Those of wandb that have no handler would die while the run still saves; they inherit the blocked mask instead.
    (SIGINT and SIGTERM end wandb's service whatever the mask is.) Signals to us wait until the end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
