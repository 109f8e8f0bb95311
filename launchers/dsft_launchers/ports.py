"""A TCP port for the ranks of one launch to meet on, without the usual race."""

import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager

PORTS = range(26000, 32000)
"""Below Linux' default ephemeral range (32768 and up), so that no outgoing connection is given one of these."""


@contextmanager
def reserved_port() -> Iterator[int]:
    """Yield a free port that no other launch on this machine gets while this one runs.

    The reservation is an abstract unix socket: it has the scope of a port (the network namespace) and goes with the
    process, so nothing is left to clean up. Raises RuntimeError if every port is taken.
    """
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket(socket.AF_UNIX) as claim:
            try:
                claim.bind(f"\0dsft-port-{port}")
            except OSError:
                continue
            if _is_free(port):
                yield port
                return
    raise RuntimeError(f"no free TCP port in {PORTS.start}-{PORTS.stop - 1}; close some programs that listen there")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
