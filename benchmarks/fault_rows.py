"""The promises that real starts try: what is typed, what is planted, and what must come of it."""

import os
from collections.abc import Iterator
from pathlib import Path

from benchmarks.damages import NEWEST, flip_a_bit, one_more_key
from benchmarks.fault_looks import (
    all_in_place,
    all_steps_once,
    begun_anew,
    late_save_told,
    milestones,
    one_line,
    one_result,
    resumed_from,
    unpublished,
    verified,
)
from benchmarks.fault_starts import Row, Start
from benchmarks.plants import Plant

LAST = -1
"""The highest rank."""

STEP, LOSS = "dsft.engine.step:train_step", "dsft.objectives.sft:SFT.losses"
WRITTEN = "dsft.checkpoint.files:_Writer.write_data"
READER, ASSEMBLED = "dsft.verify:_in_a_fresh_process", "dsft.engine.assemble:assemble"
DIGESTS, IN_READER = "dsft.checkpoint.digests:of_all", "__import__('sys').argv[0].endswith('verify.py')"
VERIFIES = ("checkpoint.verify_result=true", "train.steps=4")
WEIGHTS = "{run}/adapter.tmp-*/adapter_model.safetensors"
OTHER_BYTE = f"printf '\\377' | dd of=$(echo {WEIGHTS}) bs=1 seek=19003 conv=notrunc status=none"
IN_RESULT = "args and '/adapter' in str(args[0])"
FULL_DISK = "OSError(28, 'No space left on device')"

AGAIN = Start()
FRESH = Start(words=("train.steps=6",))
LONGER = ("train.steps=8",)


STOPS = {
    "loading": (ASSEMBLED, 1), "the first step": (STEP, 1), "a later step": (STEP, 6),
    "evaluation": ("dsft.engine.evaluate:_measured", 1), "generation": ("dsft.engine.evaluate:_generate", 1),
    "a save": (WRITTEN, 2), "the result": ("dsft.engine.result:write_result", 1),
    "the verification": ("dsft.engine.probe:write_probe", 1),
}  # fmt: skip
"""Phase of a run -> function and call at which a rank stops."""


def kills() -> Iterator[Row]:
    """An interrupted run goes on to the same bits."""

    def killed(place: str, nth: int, rank: int) -> Start:
        return Start(plants=(Plant(place, "kill", nth=nth, rank=rank),), code=76, alone=-9, state="failed")

    starts = (killed(LOSS, 9, LAST), killed(WRITTEN, 1, LAST), killed(ASSEMBLED, 1, 0), AGAIN)
    promise, nine = "The same command goes on to the same bits", ("train.steps=9",)
    yield Row("kills: in a step, in a save, in loading", "", promise, starts, nine)
    qlora = ("method=qlora", "strategy=fsdp", *nine)
    yield Row("kills: the same under qlora and fsdp", "", promise, starts, qlora, ranks=(2,))


def results() -> Iterator[Row]:
    """What could not be shown to be right is not done."""
    promise = "The result is read back; what could not be shown to be right is not published"
    for name, shell in (
        ("its weights torn", f"truncate -s 20000 {WEIGHTS}"),
        ("its weights gone", f"rm {WEIGHTS}"),
        ("its configuration empty", "truncate -s 0 {run}/adapter.tmp-*/adapter_config.json"),
        ("one byte of its weights", OTHER_BYTE),
    ):
        torn = Start(plants=(Plant(READER, "run", shell, rank=0),), code=76, state="failed", look=unpublished)
        yield Row(f"result: {name}", "1", promise, (torn, AGAIN), VERIFIES)
    once = "test -e {run}/../once || { touch {run}/../once; kill -9 $PLANT_PID; }"
    killed_once = Start(plants=(Plant(DIGESTS, "run", once, when=IN_READER),), look=verified)
    yield Row("result: its reader killed once", "1", promise, (killed_once,), VERIFIES)
    always = Start(plants=(Plant(DIGESTS, "kill", when=IN_READER),), code=76, state="failed", look=unpublished)
    yield Row("result: its reader killed each time", "1", promise, (always, AGAIN), VERIFIES)
    for name, shell in (("gone", "rm -r {run}/adapter"), ("torn", "truncate -s 20000 {run}/adapter/*.safetensors")):
        look_again = Start(shell=shell, code=2, says="run_dir", look=one_line)
        yield Row(
            f"result: {name} after the run was done", "12", "Done means that the result is there, and whole",
            (FRESH, look_again), equal=False,
        )  # fmt: skip


def publishing() -> Iterator[Row]:
    """Publishing survives a kill at every system call."""
    promise = "An interrupted run never leaves half of a result, and the same command goes on"
    killed = {
        "before the old one is renamed": Plant("os:rename", "kill", rank=0, when=IN_RESULT),
        "before the new one is renamed": Plant("os:rename", "kill", rank=0, when=IN_RESULT, nth=2),
        "while the old one is removed": Plant("shutil:rmtree", "kill", rank=0, when=IN_RESULT),
    }
    for name, plant in killed.items():
        longer = Start(LONGER, (plant,), code=76, alone=-9, state="")
        yield Row(
            f"publish: killed {name}", "2", promise,
            (FRESH, longer, Start(LONGER), Start(LONGER, says="is done already", look=one_result)),
        )  # fmt: skip
    busy = Plant("shutil:rmtree", "raise", "OSError(39, 'Directory not empty')", nth=0, rank=0, when=IN_RESULT)
    yield Row(
        "publish: the old one cannot be removed", "2", promise,
        (FRESH, Start(LONGER, (busy,)), Start(("train.steps=9",), look=one_result)),
    )  # fmt: skip


def _flip_newest(run: Path) -> None:
    flip_a_bit(max((run / "checkpoints" / NEWEST).glob("__*_0.distcp")))


def _truncate_all(run: Path) -> None:
    for path in (run / "checkpoints").glob("step-*/__0_0.distcp"):
        os.truncate(path, 99)


def checkpoints() -> Iterator[Row]:
    """What is damaged, condemned or from a later time."""
    named = Start(
        LONGER, do=_flip_newest, says="CHECKPOINT SET ASIDE: step-00000006: __{last}_0.distcp", look=resumed_from(3)
    )
    yield Row("damage: one bit of the newest", "3", "The older one is taken, the bad file named", (FRESH, named))
    error = Plant(LOSS, "raise", "ValueError('planted by the user')", rank=LAST)
    crash = Start(LONGER, (error,), code=76, state="failed", reason="planted by the user")
    yield Row(
        "crashes: an error of the user's own in five starts", "4",
        "A checkpoint is judged by evidence against the checkpoint",
        (FRESH, *[crash] * 4, Start(LONGER, (error,), code=76, state="failed", look=all_in_place), Start(LONGER)),
    )  # fmt: skip
    stays = Start(LONGER, says="CHECKPOINT SET ASIDE: step-00000006", look=resumed_from(6, 6, 3))
    yield Row(
        "crashes: two from the newest, none from the older", "4",
        "A checkpoint is judged by evidence against the checkpoint", (FRESH, crash, crash, stays),
    )  # fmt: skip
    refused = Start(
        LONGER, do=_truncate_all, code=2, state="", says=r"__0_0\.distcp.*resume\.anew=true", look=all_in_place
    )
    yield Row(
        "damage: of all checkpoints", "4", "Nothing begins at step 1 by itself, and nothing is emptied",
        (FRESH, refused, Start((*LONGER, "resume.anew=true"), look=begun_anew), Start(LONGER, says="is done already")),
    )  # fmt: skip
    later = Start(LONGER, do=one_more_key, code=2, state="", says="later dsft", never="Traceback", look=all_in_place)
    yield Row(
        "damage: none, but made by a later dsft", "10", "A newer manifest is no damage", (FRESH, later), equal=False
    )
    stale = Plant(
        "pathlib:Path.open", "raise", "OSError(5, 'Input/output error')", nth=0, rank=LAST,
        when="getattr(args[0], 'name', '') == '__{last}_0.distcp' and 'step-00000006' in str(args[0])",
    )  # fmt: skip
    node = Start(LONGER, (stale,), code=76, state="", says=r"rank {last}\b", look=all_in_place)
    yield Row(
        "damage: none, but one node's disk is stale", "9", "A node's own trouble condemns no checkpoint",
        (FRESH, node, Start(LONGER)), ranks=(2,),
    )  # fmt: skip


def causes() -> Iterator[Row]:
    """status.json and terminal name the cause, not the consequence."""
    promise = "Terminal and status.json name the rank and its error"
    for name, words in (("ValueError", "planted on a rank"), ("TimeoutError", "the verifier timed out")):
        error = Plant(LOSS, "raise", f"{name}('{words}')", nth=4, rank=LAST)
        raised = Start(plants=(error,), code=76, state="failed", says=words, reason=words)
        yield Row(f"cause: {name} on the last rank", "7" if name == "ValueError" else "11", promise, (raised, AGAIN))
    for rank in (0, 1):
        plant = Plant(LOSS, "kill", nth=4, rank=rank)
        killed = Start(plants=(plant,), code=76, state="failed", says=f"rank {rank}", reason=f"rank {rank}.*SIGKILL")
        yield Row(f"cause: kill -9 of rank {rank}", "7", promise, (killed, AGAIN), ranks=(2,))
    nan = Start(
        ("optim.lr=1e30", "train.steps=3"), code=78, state="diverged", never="SIGABRT", reason="loss|gradient norm"
    )
    yield Row("cause: a loss that is not a number on all ranks", "19", promise, (nan,), equal=False)


def disks() -> Iterator[Row]:
    """Slow and full disks, and folders that go away."""
    slow, steady = Plant(WRITTEN, "sleep", "40", nth=2, rank=LAST), Plant(LOSS, "sleep", "0.5", nth=0, rank=LAST)
    yield Row(
        "disk: a save that hangs for 40 s", "6", "A save beyond its due date is said",
        (Start(plants=(slow, steady), look=late_save_told),), ("train.steps=40",),
    )  # fmt: skip
    often = Plant(WRITTEN, "sleep", "0.7", nth=0, rank=LAST)
    yield Row(
        "disk: saves slower than keep_every", "8", "Milestones are kept by arithmetic",
        (Start(plants=(often,), look=milestones),),
        ("train.steps=40", "checkpoint.every=4", "checkpoint.keep_every=4", "checkpoint.keep=1"),
    )  # fmt: skip
    full = Plant(WRITTEN, "raise", FULL_DISK, nth=2, rank=LAST)
    yield Row(
        "disk: full in one save", "", "A failed save costs a line and no step",
        (Start(plants=(full,), says="SAVE FAILED: .*No space left", look=all_steps_once),), ("train.steps=9",),
    )  # fmt: skip
    last = Plant(WRITTEN, "raise", FULL_DISK, nth=3, rank=LAST)
    yield Row(
        "disk: full in the last save", "18", "Words are true: after the last save nothing goes on",
        (Start(plants=(last,), says="SAVE FAILED", never="training goes on", look=all_steps_once),), equal=False,
    )  # fmt: skip
    gone = Plant(LOSS, "run", "rm -rf {run}", nth=4, rank=0)
    yield Row(
        "disk: the run folder is removed", "20", "A run whose folder is gone ends, and says so",
        (Start(plants=(gone,), code=76, state="", says="is gone", never="Traceback|FileNotFoundError", ends_s=60),),
        ("train.steps=40",), equal=False,
    )  # fmt: skip
    less = Plant(LOSS, "run", "rm -rf {run}/checkpoints", nth=4, rank=0)
    yield Row(
        "disk: the checkpoints are removed", "21", "They are made again, and the result is given",
        (Start(plants=(less,), look=one_result),), ("train.steps=12",),
    )  # fmt: skip
    long = "run_dir={run}/" + "n" * 300
    yield Row(
        "door: a name that is too long", "13", "Bad input costs one line",
        (Start((long,), code=2, state="", says="run_dir", never="Traceback", look=one_line),), ranks=(1,), equal=False,
    )  # fmt: skip


def requests() -> Iterator[Row]:
    """Requests to stop, and clocks."""
    early = Plant("dsft.preflight:preflight", "run", "kill -TERM $PLANT_PID; sleep 0.2", rank=0)
    yield Row(
        "stop: SIGTERM before the run begins", "14", "75 is stopped on request",
        (Start(plants=(early,), code=75, state="", says="dsft: ", never="Traceback"), AGAIN),
    )  # fmt: skip
    evaluates = ("data.eval_path={folder}/eval.jsonl", "data.verify=exact")
    for name, place in (("loading", ASSEMBLED), ("the first evaluation", "dsft.engine.evaluate:_measured")):
        plant = Plant(place, "run", "kill -TERM $(test ${WORLD_SIZE:-1} = 1 && echo $PLANT_PID || echo $PLANT_PARENT)"
                      "; sleep 1", rank=0)  # fmt: skip
        yield Row(
            f"stop: SIGTERM in {name}", "15", "The flag is looked at between loading, evaluation and steps",
            (Start(plants=(plant,), code=75, state="stopped", says="not saved", ends_s=30), AGAIN), evaluates,
        )  # fmt: skip
    clock = Start(("train.max_minutes=0.0001",), code=75, state="stopped", says="(?i)loading|max_minutes")
    yield Row("stop: a clock shorter than loading", "16", "A start that makes no step says why", (clock, AGAIN))
    patience = ("train.eval_every=1", "train.early_stop_metric=eval/accuracy", "train.early_stop_patience=1")
    yield Row(
        "stop: early, then more steps", "17", "It is said that the early stop still holds",
        (Start(("train.steps=12",)), Start(("train.steps=20",), says="(?i)stopped early|early stop|early_stop")),
        (*evaluates, *patience), equal=False,
    )  # fmt: skip


def hangs() -> Iterator[Row]:
    """A rank that stops: it is named, all end within the phase's limit, the same command goes on.

    The limit is at most three times what the phase usually takes and a minute. The verification takes longest, 15 s on
    two busy cores, as it starts a process that imports torch.
    """
    evaluates = ("data.eval_path={folder}/eval.jsonl", "data.verify=exact", *VERIFIES, "train.steps=8")
    for name, (place, nth) in STOPS.items():
        for rank in (0, 1):
            stopped = Start(
                plants=(Plant(place, "stop", nth=nth, rank=rank),), code=76, state="failed",
                says=rf"rank {rank} hangs", reason=rf"rank {rank} hangs", ends_s=90,
            )  # fmt: skip
            yield Row(f"hang: SIGSTOP of rank {rank} in {name}", "5", "The stopped rank is named, in time",
                      (stopped, AGAIN), evaluates, ranks=(2,))  # fmt: skip
    held = Start(
        plants=(Plant(LOSS, "hold_gil", "900", nth=9, rank=1),), code=76, state="failed", says="rank 1 hangs",
        reason="rank 1 hangs", ends_s=90,
    )  # fmt: skip
    yield Row("hang: rank 1 holds the interpreter's lock in C", "5", "Who cannot be asked is ended from outside",
              (held, AGAIN), ("train.steps=12",), ranks=(2,))  # fmt: skip


def rows() -> list[Row]:
    """All of them."""
    parts = (kills, results, publishing, checkpoints, causes, disks, requests, hangs)
    return [row for part in parts for row in part()]
