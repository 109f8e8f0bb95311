"""Where the ranks meet: each one answers, and who does not is named instead of waited for."""

import faulthandler
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Timer

import torch.distributed as dist
from dsft_launchers.codes import CRASHED
from dsft_launchers.join import node_of
from dsft_launchers.verdict import WAITED, CannotBeginError
from torch.distributed.distributed_c10d import PrefixStore, Store

LIMIT_S = 120.0
"""From rank 0's arrival to when all must have answered.

Imports from a cold file system are minutes apart at worst; a start that was given up finds warm caches the next time.
"""
NOTICE_S = 30.0
"""After this rank 0 says for whom it still waits."""
PARTING_S = 3.0
"""From a rank's last word to its leaving: time for the others to have theirs."""
POLL_S, KNOCK_S = 0.02, 0.25
"""Rank 0 looks at its own store; the others, who may be a thousand, knock at its door."""
NAMED = 16
"""Ranks that one line names."""


def meet(rank: int, size: int) -> Store:
    """The store at MASTER_ADDR:MASTER_PORT, once all ranks have answered there.

    Raises CannotBeginError, on every rank that has, naming those that have not after LIMIT_S.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # torchrun's agent else
    if not serves:
        _knock(address, port)
    with within("meeting", extra_s=2 * PARTING_S):  # a server that stops keeps torch waiting for ever
        limit = timedelta(seconds=2 * LIMIT_S)
        server = dist.TCPStore(  # type: ignore[attr-defined]
            address, port, is_master=serves, timeout=limit, wait_for_workers=False
        )
        store = PrefixStore(f"dsft/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", server)
        store.set(f"here/{rank}", "")
        if rank == 0:
            store.set("absent", _call(store, size))
        store.wait(["absent"], limit)
        absent = store.get("absent").decode()
    if absent:
        if rank == 0:
            time.sleep(PARTING_S)  # the store may go with this process
        raise CannotBeginError(absent)
    return store


def _call(store: Store, size: int) -> str:
    """Who did not answer, in words; empty once all have."""
    absent = _absent(store, size, NOTICE_S)
    if absent:
        say(f"dsft: waiting for {_named(absent)}: no answer for {NOTICE_S:g} s")
        absent = _absent(store, size, LIMIT_S - NOTICE_S)
    return f"{_named(absent)} did not answer within {LIMIT_S:g} s" if absent else ""


def _knock(address: str, port: int) -> None:
    """Wait until somebody listens: torch's own waiting takes twice its limit and fills the log with its stacks."""
    until = time.monotonic() + LIMIT_S
    while True:
        try:
            return socket.create_connection((address, port), timeout=max(1.0, until - time.monotonic())).close()
        except OSError as error:
            if time.monotonic() > until:
                text = f"{_named([0])} did not answer within {LIMIT_S:g} s at {address}:{port} ({error})"
                raise CannotBeginError(text) from error
        time.sleep(KNOCK_S)


def _absent(store: Store, size: int, wait_s: float) -> list[int]:
    """Ranks that have not answered after wait_s."""
    keys = [f"here/{rank}" for rank in range(size)]
    until = time.monotonic() + wait_s
    while not store.check(keys):
        if time.monotonic() > until:
            return [rank for rank, key in enumerate(keys) if not store.check([key])]
        time.sleep(POLL_S)
    return []


def _named(ranks: Sequence[int]) -> str:
    nodes = {rank: node_of(rank, os.environ) for rank in ranks[:NAMED]}
    names = [f"rank {rank} ({node})" if node else f"rank {rank}" for rank, node in nodes.items()]
    return ", ".join(names) + (f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else "")


@contextmanager
def within(what: str, *, extra_s: float = 0.0) -> Iterator[None]:
    """Within: what all ranks do at once and in a moment. One that waits for LIMIT_S + extra_s gives up and leaves."""
    limit_s = LIMIT_S + extra_s

    def give_up() -> None:
        last_word(f"{what}: {limit_s:g} s")
        os._exit(CRASHED)  # the main thread waits in a collective: nothing else ends it

    timer = Timer(limit_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def last_word(why: str, word: str = WAITED) -> None:
    """Say what this rank waited for, with its stacks; the launcher names the ranks that said nothing.

    word: HANGS for a rank that did not wait for another.
    """
    say(f"{word}{why}")
    with suppress(OSError):
        faulthandler.dump_traceback(sys.__stderr__)  # type: ignore[arg-type]
    time.sleep(PARTING_S)


def leave_cause(cause: str) -> None:
    """Leave at the meeting place why this rank ends, for whoever only sees that it is gone. The first cause stays."""
    if dist.is_initialized():
        with suppress(RuntimeError):  # the store went with rank 0
            store = PrefixStore("cause", dist.distributed_c10d._get_default_store())
            store.set_timeout(timedelta(seconds=PARTING_S))
            store.compare_set("first", "", cause)


def cause_left() -> str | None:
    """Return what the first rank that ended by itself left as its cause; None if none did."""
    if dist.is_initialized():
        with suppress(RuntimeError):
            store = PrefixStore("cause", dist.distributed_c10d._get_default_store())
            store.set_timeout(timedelta(seconds=PARTING_S))
            if store.check(["first"]):
                return str(store.get("first").decode())
    return None


def say(text: str) -> None:
    """One line, past whatever holds sys.stderr; a log on a full disk loses it."""
    with suppress(OSError):
        os.write(sys.__stderr__.fileno(), f"{text}\n".encode())  # type: ignore[union-attr]
