"""Which node an attempt failed on, from what srun prints (SLURM 22.05) and what the ranks say."""

import pytest
from dsft_launchers.attempt import failed_on
from dsft_launchers.verdict import CANNOT_BEGIN, CRASH, WAITED

KILLED = """\
srun: error: n4: task 2: Killed
srun: launch/slurm: _step_signal: Terminating StepId=1.0
slurmstepd-n3: error: *** STEP 1.0 ON n3 CANCELLED AT 2026-11-23T02:11:14 ***
srun: error: n4: task 3: Terminated
srun: error: n3: task 0: Exited with exit code 76
srun: error: n3: task 1: Killed
srun: Force Terminated StepId=1.0
"""
LEFT = """\
srun: error: n3: tasks 0-1: Exited with exit code 76
srun: launch/slurm: _step_signal: Terminating StepId=4.0
srun: error: n4: tasks 2-3: Killed
srun: Force Terminated StepId=4.0
"""
OWN, PEER = f"{CRASH}RuntimeError: CUDA error\n", f"{CRASH}RuntimeError: Connection closed by peer\n"


@pytest.mark.parametrize(
    ("said", "texts", "node"),
    [
        (KILLED, ["", "", "", ""], "n4"),
        (KILLED, [PEER, "", "", ""], "n4"),
        (KILLED.replace("Killed", "Segmentation fault (core dumped)", 1), ["", "", "", ""], "n4"),
        (KILLED.replace("Killed", "Out Of Memory", 1), ["", "", "", ""], None),
        (KILLED, [OWN, "", "", ""], "n3"),
        (LEFT, [OWN, "", "", ""], "n3"),
        (LEFT, [OWN, OWN, "", ""], "n3"),
        (LEFT, [OWN, "", OWN, ""], None),
        (LEFT, [WAITED, WAITED, "", ""], "n4"),
        (LEFT, [WAITED, "", "", ""], None),
        (LEFT, [WAITED, WAITED, WAITED, WAITED], None),
        (LEFT, [CANNOT_BEGIN, CANNOT_BEGIN, "", ""], "n4"),
        (LEFT, [CANNOT_BEGIN] * 4, None),
        (LEFT, ["", "", "", ""], None),
        ("srun: error: Node failure on n2\n", [WAITED, ""], None),
        ("", [OWN, ""], None),
    ],
)
def test_the_node_that_an_attempt_failed_on(said: str, texts: list[str], node: str | None) -> None:
    assert failed_on(said, texts, alone=False) == node


@pytest.mark.parametrize(("text", "node"), [
    (f"{CRASH}ZeroDivisionError: division by zero\n", None),
    (f"{CRASH}RuntimeError: CUDA error: uncorrectable ECC error encountered\n", "n1"),
    ("", "n1"),
])  # fmt: skip
def test_on_a_node_alone_a_programs_error_is_not_the_nodes(text: str, node: str | None) -> None:
    how = "Exited with exit code 76" if text else "Killed"
    assert failed_on(f"srun: error: n1: task 0: {how}\n", [text], alone=True) == node
