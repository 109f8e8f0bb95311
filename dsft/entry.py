"""How a process of ours begins and ends: the garbage collector stays out of its imports and of its end."""

import contextlib
import errno
import gc
import io
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from dsft_launchers.codes import CRASHED, USER_ERROR
from dsft_launchers.files import write_for_nobody_else
from dsft_launchers.shown import say, shown

UNREAD = 128 + signal.SIGPIPE
"""Exit code where the reader of the output has gone before there was any work."""

BEGUN = "DSFT_BEGUN"
"""Variable of a process of work that has begun, of a point of a sweep: it starts whether or not anybody reads it."""


def enter(main: Callable[[], int]) -> NoReturn:
    """Exit with main's code. What imports make stays, and what is left at the end goes with the process.

    Looking through it is a quarter of the seconds that a refusal takes.
    """
    gc.disable()
    _open_closed_streams()
    write_for_nobody_else()
    write_out_foreign_text()
    code = _ended(main)
    gc.freeze()
    if code and _waits_at_its_end():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        # An interpreter that ends while threads of gloo or NCCL wait for a peer is aborted, and one that ends while
        # kernels of a GPU wait or spin may never end: either hides the code.
        os._exit(code)
    sys.exit(code)


def _ended(main: Callable[[], int]) -> int:
    """Return main's code; CRASHED after an error that main lets through, where this process must not wait."""
    try:
        return _read_by_somebody(main)
    except BaseException as error:
        if not _waits_at_its_end() or isinstance(error, SystemExit):
            raise
        sys.excepthook(type(error), error, error.__traceback__)
        return CRASHED


def _open_closed_streams() -> None:
    """Put the null device where standard input, output or error is closed, as in a daemon that was started carelessly.

    Else the first file that is opened would take the number, and a library that writes to it would write there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it has the lowest number that is free
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)


def write_out_foreign_text() -> None:
    """Have control characters written out in what Python shows of an error or a warning, and in what libraries log."""
    plain = warnings.formatwarning

    class Record(logging.LogRecord):
        def getMessage(self) -> str:  # noqa: N802
            return shown(super().getMessage())

    def show_error(*error: Any) -> None:
        sys.stderr.write(shown("".join(traceback.format_exception(*error))))

    sys.excepthook = show_error
    warnings.formatwarning = lambda *said, **more: shown(plain(*said, **more))
    logging.setLogRecordFactory(Record)


def _read_by_somebody(main: Callable[[], int]) -> int:
    """Return main's code; where nobody reads the output any more (`| head -1`), that of a process that SIGPIPE ends.

    A verb whose work is more than its output has called lose_lines.
    """
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")
        return UNREAD
    except OSError as error:
        if _takes_lines():
            raise
        sys.stdout = open(os.devnull, "w")
        say(f"dsft: the output must go where it can be written, got: {error.strerror}; free space")
        return USER_ERROR


def _takes_lines() -> bool:
    """Return False if stdout does not take one more line: then it was stdout that raised, and no file of a run."""
    try:
        print(flush=True)
    except OSError:
        return False
    return True


def lose_lines() -> None:
    """From here on a line that stdout or stderr does not take is lost, and ends nothing."""
    if not isinstance(sys.stdout, LossyStream):
        sys.stdout = LossyStream(sys.stdout)
    if not isinstance(sys.stderr, LossyStream):
        sys.stderr = LossyStream(sys.stderr)


def _kept_apart(line: str) -> str:
    """The line, or the beginning of one, with a margin if it is the beginning of ours or can become it."""
    return f"| {line}" if line and (line.startswith(OURS) or OURS.startswith(line)) else line


def _waits_at_its_end() -> bool:
    """Return True if this process is in a process group of torch, or has used a GPU; torch is not imported for it."""
    group, cuda = sys.modules.get("torch.distributed"), sys.modules.get("torch.cuda")
    in_a_group = group is not None and group.is_available() and group.is_initialized()
    return in_a_group or (cuda is not None and cuda.is_initialized())


def collect_again() -> None:
    """Collect what the start left, and garbage from here on; what is alive by now is not looked through again."""
    gc.collect()
    gc.freeze()
    gc.enable()


OURS = "dsft: "
"""How lines begin that launchers and supervisors read in a rank's log; nothing but shown.say writes one."""


class LossyStream(io.TextIOBase):
    """Wraps stdout or stderr, and ignores that its disk is full or its terminal gone: lines are lost, no run ends.

    What is written, by libraries too, has its control characters written out unless it goes to a terminal (which
    progress bars move about in), and a line that begins as ours do gets a margin: a log says only what we said.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.at_start = True

    def write(self, text: str) -> int:
        """Pass on, with a margin before what looks like a line of ours."""
        lines = (text if self.isatty() else shown(text)).split("\n")
        first, *others = lines
        whole = [_kept_apart(first) if self.at_start else first, *map(_kept_apart, others)]
        self._pass_on("\n".join(whole))
        return len(text)

    def write_ours(self, text: str) -> int:
        """Pass on a whole line of ours, after the end of any other that is not ended."""
        self._pass_on(text if self.at_start else f"\n{text}")
        return len(text)

    def _pass_on(self, text: str) -> None:
        if text:
            self.at_start = text.endswith("\n")
        with self._forgiven():
            self.stream.write(text)

    def flush(self) -> None:
        """Pass on."""
        with self._forgiven():
            self.stream.flush()

    def fileno(self) -> int:
        """The stream's."""
        return int(self.stream.fileno())

    def isatty(self) -> bool:
        """The stream's."""
        return bool(self.stream.isatty())

    @contextlib.contextmanager
    def _forgiven(self) -> Any:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EPIPE, errno.EIO):
                raise
