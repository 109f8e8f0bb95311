"""What auto means: torchrun's environment, an srun step's, an sbatch script's, none."""

import pytest
from dsft_launchers.join import count_devices, expand_hosts, node_of, resolve

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "h"}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "n[1-2]"}
TASK = {
    **BATCH,
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}


@pytest.mark.parametrize(
    ("hostlist", "hosts"),
    [
        ("n1", ["n1"]),
        ("n[1-3,7]", ["n1", "n2", "n3", "n7"]),
        ("gpu[08-10]-ib,login", ["gpu08-ib", "gpu09-ib", "gpu10-ib", "login"]),
        ("r[1-2]n[1,3]", ["r1n1", "r1n3", "r2n1", "r2n3"]),
    ],
)
def test_host_lists_are_expanded(hostlist: str, hosts: list[str]) -> None:
    assert expand_hosts(hostlist) == hosts


def test_auto_joins_torchrun_also_inside_srun() -> None:
    start = resolve("auto", {**TASK, **TORCHRUN, "MASTER_PORT": "99"}, devices="auto", nodes=1)
    assert start.kind == "torchrun"
    assert start.variables == {**TORCHRUN, "MASTER_PORT": "99"}
    assert "torchrun" in start.why
    assert "rank 1 of 4" in start.why


def test_auto_joins_a_step_of_srun() -> None:
    start = resolve("auto", TASK, devices=2, nodes=2)
    assert start.kind == "slurm task"
    port = start.variables.pop("MASTER_PORT")
    assert 20000 <= int(port) < 26000
    assert start.variables == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "n1",
    }


def test_a_rank_of_a_step_has_a_node_whichever_way_they_are_dealt() -> None:
    task = {**TASK, **resolve("auto", TASK, devices=2, nodes=2).variables}
    uneven = {**task, "SLURM_STEP_TASKS_PER_NODE": "3,1"}
    assert [node_of(rank, task) for rank in range(4)] == ["n1", "n1", "n2", "n2"]
    assert [node_of(rank, uneven) for rank in range(4)] == ["n1", "n1", "n1", "n2"]
    assert node_of(2, {**task, "SLURM_DISTRIBUTION": "block:cyclic"}) == "n2"
    cyclic = {**uneven, "SLURM_DISTRIBUTION": "cyclic"}
    assert [node_of(rank, cyclic) for rank in range(4)] == ["n1", "n2", "n1", "n1"]
    assert node_of(2, {**task, "SLURM_DISTRIBUTION": "plane"}) is None
    assert node_of(2, TORCHRUN) is None
    assert node_of(7, {**TASK, **TORCHRUN, "WORLD_SIZE": "8"}) is None


def test_every_task_of_a_step_meets_at_the_same_port_and_another_step_does_not() -> None:
    ports = {
        resolve("auto", {**TASK, **other}, devices="auto", nodes=1).variables["MASTER_PORT"]
        for other in ({}, {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}, {"SLURM_STEP_ID": "1"})
    }
    assert len(ports) == 2


@pytest.mark.parametrize(
    "env",
    [
        {},
        BATCH,
        {**TASK, "SLURM_STEP_ID": "4294967291"},  # the batch script itself
        {**TASK, "SLURM_STEP_ID": "4294967290"},  # salloc's interactive step
        {**TASK, "SLURM_STEP_NUM_TASKS": "1"},
        {"WORLD_SIZE": "4"},
    ],
)
def test_auto_is_local_elsewhere(env: dict[str, str]) -> None:
    start = resolve("auto", env, devices="auto", nodes=1)
    assert (start.kind, start.variables) == ("local", {})
    assert start.why


@pytest.mark.parametrize("name", ["local", "slurm"])
@pytest.mark.parametrize("env", [TORCHRUN, TASK])
def test_other_launchers_are_refused_where_others_start_the_processes(env: dict[str, str], name: str) -> None:
    with pytest.raises(ValueError, match="launcher must be auto"):
        resolve(name, env, devices="auto", nodes=1)


def test_slurm_is_refused_without_sbatch_but_for_a_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"launcher=slurm needs sbatch .* take launcher=local"):
        resolve("slurm", {}, devices=2, nodes=2)
    assert resolve("slurm", {}, devices=2, nodes=2, dry_run=True).kind == "slurm"


@pytest.mark.parametrize(("devices", "nodes"), [(4, 1), (2, 3)])
def test_counts_that_contradict_the_processes_are_refused(devices: int, nodes: int) -> None:
    with pytest.raises(ValueError, match="must match the processes"):
        resolve("auto", TASK, devices=devices, nodes=nodes)


def test_several_nodes_cannot_be_started_from_here() -> None:
    with pytest.raises(ValueError, match=r"launcher\.nodes must be 1"):
        resolve("local", {}, devices=2, nodes=2)


@pytest.mark.parametrize(("visible", "count"), [("0,1,3", 3), ("", 0), ("-1", 0), ("GPU-aa,GPU-bb", 2)])
def test_visible_devices_are_counted(visible: str, count: int) -> None:
    assert count_devices({"CUDA_VISIBLE_DEVICES": visible}) == count
