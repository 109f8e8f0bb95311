"""slurm/*.sh: shell that reads, documented variables, a reason for each, no names of places, no user overruled."""

import os
import re
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "slurm"
FILES = sorted(FOLDER.glob("*.sh"))
DOCUMENTED = {
    # https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html, of NCCL 2.30
    "NCCL_DEBUG", "NCCL_DEBUG_SUBSYS", "NCCL_IB_ADDR_FAMILY", "NCCL_IB_DISABLE", "NCCL_IB_HCA", "NCCL_IB_TC",
    "NCCL_IB_TIMEOUT", "NCCL_NET", "NCCL_NVLS_ENABLE", "NCCL_P2P_DISABLE", "NCCL_SOCKET_IFNAME", "NCCL_TOPO_DUMP_FILE",
    # https://docs.pytorch.org/docs/stable/distributed.html
    "GLOO_SOCKET_IFNAME", "TORCH_CPP_LOG_LEVEL", "TORCH_DISTRIBUTED_DEBUG",
    # https://github.com/aws/aws-ofi-nccl/blob/master/doc/efa-env-var.md
    "FI_EFA_USE_DEVICE_RDMA", "FI_EFA_USE_HUGE_PAGE",
}  # fmt: skip
SET = re.compile(r"^(?:# )?export (\w+)=", re.MULTILINE)
"""A line that sets a variable, or that a user may uncomment."""
KEPT = re.compile(r'^(?:# )?export (\w+)="\$\{\1:-[^"]+\}"$')
PLACE = re.compile(r"\b[\w-]+\.(?:edu|org|gov|net|local|lan|internal|ac\.\w+)\b|\b\d{1,3}(?:\.\d{1,3}){3}\b")


def wrong(text: str) -> list[str]:
    """What a file of settings may not have."""
    lines = text.splitlines()
    code = [line for line in lines if line and (not line.startswith("#") or SET.match(line))]
    found = [line for line in code if not KEPT.match(line)]
    found += [name for name in SET.findall(text) if name not in DOCUMENTED]
    found += PLACE.findall(re.sub(r"https://\S+", "", text))
    found += [line for before, line in zip(["", *lines], lines, strict=False) if line in code and not before]
    return found + ([] if "https://" in text else ["no source"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_settings_have_a_reason_and_leave_the_users(path: Path) -> None:
    text = path.read_text()
    names = SET.findall(text)
    assert wrong(text) == []
    assert len(text.splitlines()) <= 30
    assert names
    said = "".join(line.removeprefix("# ") if SET.match(line) else line for line in text.splitlines(keepends=True))
    env = {**dict.fromkeys(names, "mine"), "PATH": os.environ["PATH"]}
    for before, expected in ((env, {"mine"}), ({"PATH": env["PATH"]}, None)):
        done = subprocess.run(
            ["bash", "-euc", f"{said}\nenv"], env=before, capture_output=True, text=True, check=True
        ).stdout
        after = {name: value for name, _, value in (line.partition("=") for line in done.splitlines())}
        assert set(names) <= set(after)
        assert expected is None or {after[name] for name in names} == expected


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ("# why\nexport NCCL_NET=IB", ["export NCCL_NET=IB"]),
        ('# why\nexport NCCL_SPEED="${NCCL_SPEED:-1}"', ["NCCL_SPEED"]),
        ("# why\nmodule load cuda", ["module load cuda"]),
        ('# on login.cluster.edu\nexport NCCL_NET="${NCCL_NET:-IB}"', ["cluster.edu"]),
        ('# why\nexport NCCL_NET="${NCCL_NET:-10.0.0.1}"', ["10.0.0.1"]),
        ('# of https://x\n\nexport NCCL_NET="${NCCL_NET:-IB}"', ['export NCCL_NET="${NCCL_NET:-IB}"']),
    ],
)  # fmt: skip
def test_what_a_file_of_settings_may_not_have_is_found(planted: str, found: list[str]) -> None:
    assert [each for each in wrong(planted) if each != "no source"] == found


def test_there_is_a_file_for_each_kind_of_network() -> None:
    assert {path.stem for path in FILES} >= {"infiniband", "roce", "efa", "one-node", "debug"}
