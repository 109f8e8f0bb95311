"""From what was typed to a frozen Run: the only importer of Hydra and OmegaConf."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dsft_launchers.gpus import of_run
from dsft_launchers.join import ON_CPUS, resolve

from dsft import config, repairs, rules, spelling
from dsft.building import build_dataclass, build_value
from dsft.flags import without_config_dir
from dsft.idle import refuse_idle
from dsft.locate import READ, TYPED, Allowed, ask_for
from dsft.options import Choice, choices, keys
from dsft.paths import check_run_dir, expand
from dsft.privacy import SecretError
from dsft.wording import OWN_CONF, Offered, as_value, one_line, own_keys
from dsft.yaml_files import dump_yaml as dump_yaml
from dsft.yaml_files import guard_environment
from dsft.yaml_files import load_yaml as load_yaml

CLASSES = ("model", "method", "quantization", "strategy", "objective", "data")
"""Groups whose option is a class that its YAML names."""

_PLAIN = {
    "optim": config.Optim,
    "train": config.Train,
    "checkpoint": config.Checkpoint,
    "resume": config.Resume,
    "launcher": config.Launcher,
}


@dataclass(frozen=True)
class Started:
    """How this run gets its processes. devices: on each node; variables: the rank's, where others started it."""

    kind: str
    why: str
    place: rules.Place
    devices: int
    variables: dict[str, str]

    @property
    def size(self) -> int:
        """Processes in all."""
        return self.place.size


@dataclass(frozen=True)
class Composed:
    """A run and where it came from. resolved: the plain tree that build(resolved) turns into run."""

    run: config.Run
    start: Started
    resolved: dict[str, Any]
    overrides: tuple[str, ...]
    choices: tuple[Choice, ...]
    repairs: tuple[str, ...]


def compose(
    overrides: Sequence[str], *, planning: bool = False, gpus: bool = False, allowed: Allowed = TYPED
) -> Composed:
    """Compose what was typed. Raises ValueError with one line for every mistake of the user's.

    planning: nothing will be started, so that its processes may be elsewhere; gpus: each of them has a GPU there;
    allowed: whose classes may be named, where it is a file that says what was typed. What is named here may be named by
    the run's folder too, for this process and those that it starts.
    """
    if typed := [word for word in overrides if word.lstrip("+").startswith("method.lr=")]:
        raise ValueError(f"method.lr must stay the YAML's, got {typed[0]}; set optim.lr, whose default it is")
    values = _check_typed(overrides)
    tree, chosen = _compose_tree(list(overrides))
    names = {choice.group: choice.option for choice in chosen}
    with _whose(values, names["experiment"]):
        start = _start(tree["launcher"], planning=planning, on_gpus=gpus)
    size = start.size
    said = [f"launcher={tree['launcher']['name']}: {start.kind}, {start.why}"]
    if tree["strategy"]["_target_"] == "auto":
        option = "single" if size == 1 else "fsdp"
        tree, chosen = _compose_tree([o for o in overrides if o != "strategy=auto"] + [f"strategy={option}"])
        said.append(f"strategy=auto: {option}, for {size} process{'es' if size > 1 else ''}")
    tree, more = repairs.repair(tree, start.place, values)
    check_run_dir(tree["run_dir"])
    names = {choice.group: choice.option for choice in chosen}
    with _whose(values, names["experiment"]):
        run = build(tree, allowed)
        if run.objective.compares and (dropped := repairs.undropped(tree)):
            run, more = build(tree, allowed), more + dropped
    ask_for(tree)
    rules.refuse(run, names, start.place)
    refuse_idle(run, start.kind, values)
    return Composed(run, start, tree, tuple(overrides), tuple(chosen), tuple(said) + more)


@contextlib.contextmanager
def _whose(typed: Mapping[str, object], experiment: str) -> Iterator[None]:
    """Name the experiment in the refusal of a key that it sets."""
    try:
        yield
    except ValueError as error:
        raise ValueError(spelling.with_whose(str(error), typed, experiment)) from error


def build(tree: Mapping[str, Any], allowed: Allowed = READ) -> config.Run:
    """The Run that a resolved tree describes; every key is checked against its dataclass.

    allowed: whose classes it may name.
    """
    run: config.Run = build_dataclass(config.Run, {name: part(name, tree[name], allowed) for name in tree}, "")
    return run


def part(name: str, value: Any, allowed: Allowed) -> Any:
    """One group of a run. Raises ValueError for what is none."""
    if name not in _PLAIN:
        return build_value(value, name, allowed)
    return build_dataclass(_plain_class(name, value), value, name)


def read(run_dir: Path) -> config.Run:
    """Return the Run that a run folder's config.yaml describes, which stores nothing that acts for one start alone.

    It names classes of dsft, of installed plugins and of DSFT_PLUGINS; no other is imported.
    """
    file = run_dir / "config.yaml"
    tree = load_yaml(file)
    return build({**tree, "resume": {**tree["resume"], "anew": False, "takeover": False}}, Allowed(file))


def plain(node: Any) -> Any:
    """An OmegaConf node as plain dicts and lists, resolved."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)


def _raw(node: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(node, resolve=False)


def _check_typed(overrides: Sequence[str]) -> dict[str, Any]:
    """Return key -> value of what was typed.

    Raises ValueError for a word that Hydra cannot read, and for a value in the place of a group's option.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, values = OverridesParser.create(), dict[str, Any]()
    for word in overrides:
        try:
            typed = parser.parse_override(word)
        except HydraException as error:
            raise ValueError(spelling.unreadable(word)) from error
        if not typed.is_delete() and not typed.is_sweep_override():
            values[typed.key_or_group] = typed.value()
            spelling.check_value(typed.key_or_group, typed.value())
    return values


def _in_a_line(error: Exception, offered: Callable[[str], Offered]) -> ValueError:
    """The refusal of what Hydra or OmegaConf refuse. offered: as one_line has it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, SecretError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        found = re.search(r"full_key: (\S+)", str(error))
        return ValueError(f"{found[1] if found else 'a value'} {cause}")
    return ValueError(one_line(error, offered))


def _compose_tree(overrides: list[str]) -> tuple[dict[str, Any], list[Choice]]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    GlobalHydra.instance().clear()
    guard_environment()
    try:
        with initialize_config_dir(str(OWN_CONF), job_name="dsft", version_base="1.3"):
            sources = GlobalHydra.instance().config_loader().get_sources()  # type: ignore[attr-defined]
            cfg = hydra_compose("config", overrides=overrides, return_hydra_config=True)
            found = choices(dict(cfg.hydra.runtime.choices), sources)
        with open_dict(cfg):
            del cfg["hydra"]
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise ValueError(f"{missing[0]} must be given; add {missing[0]}=VALUE")
        tree: dict[str, Any] = expand({"tracker": {}, **plain(cfg)})
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise _in_a_line(
            error, lambda group: {name: _raw(tree) for name, tree in keys(group, sources).items()}
        ) from error
    for group in CLASSES:
        if not isinstance(tree.get(group), dict) or "_target_" not in tree[group]:
            raise ValueError(f"{group} must be an option whose YAML names its class with _target_; choose one")
    for name, each in tree["tracker"].items():
        if not isinstance(each, dict) or "_target_" not in each:
            raise ValueError(spelling.no_tracker(str(name), each))
    return tree, found


def _start(tree: Mapping[str, Any], *, planning: bool, on_gpus: bool) -> Started:
    launcher: config.Launcher = build_dataclass(_plain_class("launcher", tree), tree, "launcher")
    dry_run = isinstance(launcher, config.Slurm) and launcher.dry_run
    found = resolve(
        launcher.name, os.environ, devices=launcher.devices, nodes=launcher.nodes, dry_run=dry_run, planning=planning
    )
    partition = getattr(launcher, "partition", None)
    partition = None if partition is None else str(partition)
    if on_gpus and launcher.gpus == ON_CPUS:
        raise ValueError("launcher.gpus=none computes on CPUs, and --gpu plans for GPUs; leave one of them out")
    elsewhere = planning and launcher.name == "auto"
    gpus = of_run(str(launcher.gpus), found.kind, partition, launcher.devices, os.environ, elsewhere=elsewhere)
    devices = max(1, gpus) if launcher.devices == "auto" else launcher.devices
    size = int(found.variables.get("WORLD_SIZE", devices * launcher.nodes))
    unnamed = planning and launcher.name == "auto" and not found.variables  # nobody said: on this machine
    here = found.kind != "slurm" and not on_gpus and not (unnamed and devices > max(1, gpus))
    why = found.why if here or found.kind == "slurm" else f"planned for {size} processes that may be elsewhere"
    place = rules.Place(size, devices if on_gpus else gpus, here)
    return Started(found.kind, why, place, devices, found.variables)


def _plain_class(group: str, tree: Mapping[str, Any]) -> type:
    of_a_job = group == "launcher" and "partition" in tree and not _is_local(tree)
    return config.Slurm if of_a_job else _PLAIN[group]


def _is_local(tree: Mapping[str, Any]) -> bool:
    """Return True for the keys of launcher=local, to which others of a SLURM job may have been added."""
    return tree.get("name") == "local" and not {field.name for field in fields(config.Slurm)} <= set(tree)


def hand_to_hydra(argv: Sequence[str], *, trust: bool = False) -> int:
    """Let Hydra answer --cfg, --info, --help, --shell-completion and -m; returns the exit code. trust: as typed."""
    import hydra
    from hydra.errors import HydraException
    from hydra_plugins.dsft import DsftLauncher
    from omegaconf.errors import OmegaConfBaseException

    os.environ["HYDRA_FULL_ERROR"] = "1"
    guard_environment()
    words = without_config_dir(argv)
    sweeps = bool({"-m", "--multirun"} & set(words))
    typed = _check_typed([word for word in words if "=" in word and not word.startswith("-")])
    if "run_dir" in typed:
        check_run_dir(typed["run_dir"])
        place = f"run_dir={as_value(expand(typed)['run_dir'])}"  # Hydra's sweeper makes the folder, which keeps a ~
        words = [place if word.startswith("run_dir=~") or re.match("run_dir=['\"]~", word) else word for word in words]
    if any(word.startswith("hydra/launcher=") and word != "hydra/launcher=dsft" for word in words):
        _never(None)
    sys.argv = ["dsft", *words, *(["hydra.launcher.trust=true"] if trust and sweeps else [])]
    os.environ.setdefault("HYDRA_MAIN_MODULE", "dsft.run")
    try:
        main = hydra.main(config_path=str(OWN_CONF), config_name="config", version_base="1.3")(_never)
        main()
    except (HydraException, OmegaConfBaseException) as error:
        raise _in_a_line(error, own_keys) from error
    finally:
        from hydra_plugins.dsft import DsftLauncher  # not before Hydra, which loads its plugins anew

        DsftLauncher.unwrite()
    return max(DsftLauncher.codes, default=0)


def _never(cfg: Any) -> None:
    """Hydra's task function: a plain run never comes here, and a sweep's points are processes of their own."""
    raise ValueError("hydra/launcher must be dsft, which starts points here and on SLURM; leave it out")
