"""Where the ranks meet: each one answers, and who does not is named instead of waited for."""

import errno
import faulthandler
import ipaddress
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from threading import Timer
from typing import NamedTuple

import torch.distributed as dist
from dsft_launchers.codes import CRASHED
from dsft_launchers.join import node_of
from dsft_launchers.place import MEETING, is_private
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
LOOPBACK = "127.0.0.1"
NAMED = 16
"""Ranks that one line names."""


def meet(rank: int, size: int) -> Store:
    """The store of this run, once all ranks have answered there.

    A file in the launcher's private folder where one machine has all ranks; else at MASTER_ADDR:MASTER_PORT, where
    rank 0 listens, or torchrun's agent. Raises CannotBeginError, on every rank that has answered, naming those that
    have not after LIMIT_S.
    """
    place = os.environ.get(MEETING)
    door = None if place else _door(rank, size)
    with within("meeting", extra_s=2 * PARTING_S):  # a server that stops keeps torch waiting for ever
        limit = timedelta(seconds=2 * LIMIT_S)
        server = _of_folder(Path(place or ""), size) if door is None else _of_door(door, limit)
        store = PrefixStore(f"dsft/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", server)
        store.set(f"here/{rank}", "")
        if rank == 0:
            store.set("absent", _call(store, size))
        elif place and _absent(store, 1, LIMIT_S):
            raise CannotBeginError(f"{_named([0])} did not answer within {LIMIT_S:g} s")
        store.wait(["absent"], limit)
        absent = store.get("absent").decode()
    if absent:
        if rank == 0:
            time.sleep(PARTING_S)  # the store may go with this process
        raise CannotBeginError(absent)
    return store


def _of_folder(folder: Path, size: int) -> Store:
    """The store that is a file in a folder which must be this user's alone, else CannotBeginError."""
    if not is_private(folder):
        raise CannotBeginError(
            f"{MEETING} must name a folder of this user alone, got {folder}; start by python -m dsft.run"
        )
    return dist.FileStore(str(folder / "store"), size)  # type: ignore[attr-defined]


class Door(NamedTuple):
    """Where the store listens, and the socket that it listens on, if this process is to serve it."""

    address: str
    port: int
    server: socket.socket | None


def _door(rank: int, size: int) -> Door:
    """The door of this run, once somebody listens there."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's, which listens where it likes
    together = os.environ.get("LOCAL_WORLD_SIZE") == str(size) and not agents
    if together:
        address = LOOPBACK
    if rank == 0 and not agents:
        return Door(address, port, _listening(address, port, elsewhere=not together))
    _knock(address, port)
    return Door(address, port, None)


def _listening(address: str, port: int, *, elsewhere: bool) -> socket.socket:
    """A socket bound to the address at which the others look for rank 0, and to no other.

    elsewhere: some ranks may be on other machines. A name that means another thing here than there, as one that
    /etc/hosts gives to the loopback or a router translates, leaves all interfaces, and that is said.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise CannotBeginError(f"rank 0 finds no address for MASTER_ADDR={address} ({error.strerror})") from error
    inward = ipaddress.ip_address(place[0]).is_loopback and address not in (LOOPBACK, "localhost", "::1")
    server = socket.socket(family, kind, protocol)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        if inward and elsewhere:
            raise OSError(errno.EADDRNOTAVAIL, "it is the loopback here")
        server.bind(place)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            server.close()
            raise CannotBeginError(f"rank 0 cannot listen at {address}:{port} ({error.strerror})") from error
        say(
            f"dsft: the ranks' store listens on all interfaces: MASTER_ADDR={address} is no address of this machine "
            f"({error.strerror}); let it be the one by which the job's nodes reach this one"
        )
        server.bind(("", port))
    return server


def _of_door(door: Door, limit: timedelta) -> Store:
    """The store at a door, served by this process if it has the socket to do so."""
    fd = None if door.server is None else door.server.detach()
    return dist.TCPStore(  # type: ignore[attr-defined]
        door.address, door.port, is_master=fd is not None, timeout=limit, wait_for_workers=False, master_listen_fd=fd
    )


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
