"""What an attempt failed of and on which node, from what srun prints (SLURM 22.05) and what the ranks say."""

import pytest
from dsft_launchers.attempt import cause_of, failed_on
from dsft_launchers.verdict import (
    CANNOT_BEGIN,
    CRASH,
    DIVERGES,
    HANGS,
    LOST_PEER,
    REFUSED,
    WAITED,
    WENT_ON,
    hung,
    last_word,
)

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
ABORTED = """\
srun: error: n3: task 0: Exited with exit code 76
srun: error: n4: task 2: Aborted (core dumped)
srun: launch/slurm: _step_signal: Terminating StepId=4.0
srun: error: n3: task 1: Killed
srun: error: n4: task 3: Killed
"""
LATE = """\
srun: error: n1: task 0: Exited with exit code 76
srun: launch/slurm: _step_signal: Terminating StepId=7.0
srun: error: n2: task 1: Killed
"""
LOST = """\
srun: error: Node failure on n4
srun: Job step aborted: Waiting up to 7 seconds for job step to finish.
slurmstepd-n3: error: *** STEP 6.0 ON n3 CANCELLED AT 2026-11-23T02:11:14 DUE TO NODE FAILURE, SEE SLURMCTLD LOG ***
srun: error: n3: tasks 0-1: Killed
"""
OWN, PEER = f"{CRASH}RuntimeError: CUDA error\n", f"{LOST_PEER}RuntimeError: Connection closed by peer\n"
DUMP = "terminate called without an active exception\nFatal Python error: Aborted\n"


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
        (LEFT, [WAITED, "", "", ""], "n4"),  # rank 1 left by itself: it did not hang
        (LEFT, [PEER, PEER, f"{HANGS}step 7\n", ""], "n4"),
        (ABORTED, [PEER, "", "", ""], "n4"),
        (ABORTED, [PEER, "", f"{PEER}{DUMP}", ""], None),
        (ABORTED, [PEER, "", f"{OWN}{DUMP}", ""], "n4"),
        (ABORTED, [OWN, "", f"{PEER}{DUMP}", ""], "n3"),
        (LATE, [PEER, ""], "n2"),
        (LATE, [PEER, PEER], None),
        (LOST, [PEER, PEER, "", ""], None),
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
    (f"{CRASH}ZeroDivisionError: division by zero\n{DUMP}", None),
    (f"{CRASH}RuntimeError: CUDA error: uncorrectable ECC error encountered\n", "n1"),
    ("", "n1"),
])  # fmt: skip
def test_on_a_node_alone_a_programs_error_is_not_the_nodes(text: str, node: str | None) -> None:
    how = "Exited with exit code 76" if text else "Killed"
    assert failed_on(f"srun: error: n1: task 0: {how}\n", [text], alone=True) == node


def test_an_aborted_end_of_a_rank_alone_does_not_speak_against_its_node() -> None:
    text = f"{CRASH}ZeroDivisionError: division by zero\n{DUMP}"
    assert failed_on("srun: error: n1: task 0: Aborted\n", [text], alone=True) is None
    assert cause_of("srun: error: n1: task 0: Aborted\n", [text]) == (
        "raised", 0, "rank 0: ZeroDivisionError: division by zero",
    )  # fmt: skip


KILLED_BY = "was killed by SIGKILL (kill -9, or the machine ran out of memory)"


@pytest.mark.parametrize(
    ("said", "texts", "kind", "reason"),
    [
        (KILLED, ["", "", "", ""], "died", f"rank 2 {KILLED_BY}"),
        (KILLED.replace("Killed", "Out Of Memory", 1), [PEER, "", "", ""], "died", f"rank 2 {KILLED_BY}"),
        (LEFT, [PEER, OWN, PEER, ""], "raised", "rank 1: RuntimeError: CUDA error"),
        (LEFT, [PEER, f"{CRASH}Timeout: Read timed out.\n", "", ""], "raised", "rank 1: Timeout: Read timed out."),
        (LEFT, [f"{PEER}", f"{PEER}", "", ""], "lost",
         "rank 0 left first, for it lost a peer: RuntimeError: Connection closed by peer"),
        (LATE, [PEER, ""], "died", f"rank 1 {KILLED_BY}"),
        (LATE, [OWN, ""], "raised", "rank 0: RuntimeError: CUDA error"),
        (LATE, [PEER, PEER], "lost", "rank 0 left first, for it lost a peer: RuntimeError: Connection closed by peer"),
        (LEFT, [f"{WAITED}evaluation: 60 s\n", PEER, "", ""], "hangs", "ranks 2, 3 hang in evaluation"),
        (LEFT, [PEER, f"{HANGS}evaluation: 60 s\n", "", ""], "hangs", "rank 1 hangs in evaluation: 60 s"),
        (LEFT, [f"{WAITED}step 4: 9 s\n"] * 4, "stuck", "all ranks waited for each other in step 4"),
        (LEFT, [f"{HANGS}step 4: 9 s\n"] * 2, "stuck", "ranks 0, 1 hang in step 4: 9 s"),
        (LEFT, [f"{CANNOT_BEGIN}rank 2 (n4) did not answer within 120 s\n"] * 2 + ["", ""], "cannot begin",
         "cannot begin: rank 2 (n4) did not answer within 120 s"),
        (LEFT, [PEER, f"{REFUSED}no checkpoint verifies\n", "", ""], "refused", "no checkpoint verifies"),
        (LEFT, [f"{DIVERGES}step 2: loss nan\n", PEER, "", ""], "diverged", "step 2: loss nan"),
        (LEFT, ["dsft: RUN was taken over by process 7 on n1; this process writes no more\n", PEER, "", ""], "gave up",
         "RUN was taken over by process 7 on n1; this process writes no more"),
        (LOST, [PEER, PEER, "", ""], "node lost", "node n4 was lost"),
        (LOST, ["", "", "", ""], "node lost", "node n4 was lost"),
        (LOST, [OWN, PEER, "", ""], "raised", "rank 0: RuntimeError: CUDA error"),
        (ABORTED, [PEER, "", "", ""], "died", "rank 2 was killed by SIGABRT"),
        (ABORTED, [PEER, "", f"{PEER}{DUMP}", ""], "lost",
         "rank 0 left first, for it lost a peer: RuntimeError: Connection closed by peer"),
    ],
)  # fmt: skip
def test_what_an_attempt_failed_of(said: str, texts: list[str], kind: str, reason: str) -> None:
    found = cause_of(said, texts)
    assert found is not None
    assert (found.kind, found.reason) == (kind, reason)


def test_an_attempt_of_which_nothing_is_known_has_no_cause() -> None:
    assert cause_of("", ["", ""]) is None


def test_a_rank_has_one_last_word_and_what_follows_is_no_part_of_it() -> None:
    assert last_word("step 1\n") is None
    assert last_word(f"step 1\n{OWN}{DUMP}") == (CRASH, "RuntimeError: CUDA error", "step 1\n")
    assert last_word(f"{WAITED}step 7\n{WENT_ON}\nstep 8\n") is None
    assert last_word(f"{WAITED}step 7\nstacks\n{PEER}") == (WAITED, "step 7", "")
    assert last_word(f"{WAITED}step 7\n{WENT_ON}\n{PEER}") == (
        LOST_PEER, "RuntimeError: Connection closed by peer", f"{WAITED}step 7\n{WENT_ON}\n",
    )  # fmt: skip


def test_ranks_that_say_that_they_hang_are_those_that_do() -> None:
    waited, hangs = f"{WAITED}step 7\n", f"{HANGS}step 7\n"
    assert hung([waited, hangs, ""]) == [1]
    assert hung([waited, f"{hangs}{WENT_ON}\n", ""]) == [1, 2]
    assert hung([waited, "", PEER]) == [1]
    assert hung([waited, PEER, waited]) == [1]
    assert hung(["", PEER]) is None
