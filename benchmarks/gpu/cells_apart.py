"""A rank that shares its GPU with another: cells.py where NCCL takes the ranks of one GPU for two hosts."""

import os


def apart() -> None:
    """Before the process group: NCCL compares host and bus, and what two hosts cannot share must not be tried."""
    os.environ |= {
        "NCCL_HOSTID": f"rank-{os.environ['RANK']}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_P2P_DISABLE": "1",
        "NCCL_SHM_DISABLE": "1", "NCCL_IB_DISABLE": "1",
    }  # fmt: skip


if __name__ == "__main__":
    apart()
    from benchmarks.cells import main

    main()
