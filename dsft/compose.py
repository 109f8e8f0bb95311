"""From what was typed to a frozen Run: the only importer of Hydra and OmegaConf."""

import importlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from dsft_launchers.cluster import gpus_of
from dsft_launchers.join import count_devices, resolve

from dsft import config, rules
from dsft.options import Choice, choices, keys
from dsft.wording import OWN_CONF, one_line, own_keys, suggest

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


def compose(overrides: Sequence[str]) -> Composed:
    """Compose what was typed. Raises ValueError with one line for every mistake of the user's."""
    if typed := [word for word in overrides if word.lstrip("+").startswith("method.lr=")]:
        raise ValueError(f"method.lr must stay the YAML's, got {typed[0]}; set optim.lr, whose default it is")
    tree, chosen = _compose_tree(list(overrides))
    start = _start(tree["launcher"])
    size = start.size
    repairs = [f"launcher={tree['launcher']['name']}: {start.kind}, {start.why}"]
    if tree["strategy"]["_target_"] == "auto":
        option = "single" if size == 1 else "fsdp"
        tree, chosen = _compose_tree([o for o in overrides if o != "strategy=auto"] + [f"strategy={option}"])
        repairs.append(f"strategy=auto: {option}, for {size} process{'es' if size > 1 else ''}")
    tree, more = rules.repair(tree, start.place)
    run = build(tree)
    names = {choice.group: choice.option for choice in chosen}
    rules.refuse(run, names, start.place)
    return Composed(run, start, tree, tuple(overrides), tuple(chosen), tuple(repairs) + more)


def build(tree: Mapping[str, Any]) -> config.Run:
    """The Run that a resolved tree describes; every key is checked against its dataclass."""
    parts = {
        name: _build_dataclass(_plain_class(name, value), value, name) if name in _PLAIN else _build(value, name)
        for name, value in tree.items()
    }
    run: config.Run = _build_dataclass(config.Run, parts, "")
    return run


def read(run_dir: Path) -> config.Run:
    """Return the Run that a run folder's config.yaml describes, which stores nothing that acts for one start alone."""
    from omegaconf import OmegaConf

    tree = plain(OmegaConf.load(run_dir / "config.yaml"))
    return build({**tree, "resume": {**tree["resume"], "anew": False, "takeover": False}})


def plain(node: Any) -> Any:
    """An OmegaConf node as plain dicts and lists, resolved."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)


def load_yaml(path: Path) -> Any:
    """A YAML file as plain dicts and lists."""
    from omegaconf import OmegaConf

    return _raw(OmegaConf.load(path))


def _raw(node: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(node, resolve=False)


def dump_yaml(tree: Any) -> str:
    """A plain tree as YAML."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(tree))


def _compose_tree(overrides: list[str]) -> tuple[dict[str, Any], list[Choice]]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    GlobalHydra.instance().clear()
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
        tree: dict[str, Any] = {"tracker": {}, **plain(cfg)}
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        said = one_line(error, lambda group: {name: _raw(tree) for name, tree in keys(group, sources).items()})
        raise ValueError(said) from error
    for group in CLASSES:
        if not isinstance(tree.get(group), dict) or "_target_" not in tree[group]:
            raise ValueError(f"{group} must be an option whose YAML names its class with _target_; choose one")
    return tree, found


def _start(tree: Mapping[str, Any]) -> Started:
    launcher: config.Launcher = _build_dataclass(_plain_class("launcher", tree), tree, "launcher")
    dry_run = isinstance(launcher, config.Slurm) and launcher.dry_run
    found = resolve(launcher.name, os.environ, devices=launcher.devices, nodes=launcher.nodes, dry_run=dry_run)
    gpus = gpus_of(getattr(launcher, "partition", None)) if found.kind == "slurm" else count_devices(os.environ)
    devices = max(1, gpus) if launcher.devices == "auto" else launcher.devices
    size = int(found.variables.get("WORLD_SIZE", devices * launcher.nodes))
    return Started(found.kind, found.why, rules.Place(size, gpus, found.kind != "slurm"), devices, found.variables)


def _plain_class(group: str, tree: Mapping[str, Any]) -> type:
    return config.Slurm if group == "launcher" and "partition" in tree else _PLAIN[group]


def _build(value: Any, path: str) -> Any:
    """Turn each mapping with a _target_ into an instance of that dataclass, from the inside out."""
    if isinstance(value, Mapping):
        parts = {key: _build(item, f"{path}.{key}") for key, item in value.items() if key != "_target_"}
        if "_target_" not in value:
            return parts
        return _build_dataclass(_locate(str(value["_target_"]), path), parts, path)
    if isinstance(value, list):
        return [_build(item, f"{path}[{index}]") for index, item in enumerate(value)]
    return value


def _locate(target: str, path: str) -> type:
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path}._target_ must name an importable class, got {target} ({error}); install the package that has it, "
            "or put it on PYTHONPATH"
        ) from error
    if not (isinstance(found, type) and is_dataclass(found)):
        raise ValueError(f"{path}._target_ must name a dataclass, got {target}")
    return found


def _build_dataclass(cls: type, values: Mapping[str, Any], path: str) -> Any:
    """An instance of cls from values, each checked against its field's type; unknown and absent keys are refused.

    A field with a default may be absent: it came later than YAMLs of users, and runs that go on.
    """
    known = {field.name for field in fields(cls) if field.init}
    later = {field.name for field in fields(cls) if not (field.default is field.default_factory is MISSING)}
    dotted = f"{path}." if path else ""
    for key in values:
        if key not in known:
            raise ValueError(f"{dotted}{key} is not a key of {path or 'a run'}{suggest(str(key), known)}")
    absent = sorted(known - later - set(values))
    if absent:
        raise ValueError(f"{dotted}{absent[0]} must be given; add it to the YAML of {path or 'the run'}")
    hints = get_type_hints(cls)
    return cls(**{key: _checked(value, hints[key], f"{dotted}{key}") for key, value in values.items()})


def _checked(value: Any, hint: Any, path: str) -> Any:
    from pydantic import TypeAdapter, ValidationError

    if isinstance(value, float) and not math.isfinite(value) and not (value > 0 and path == "train.max_grad_norm"):
        raise ValueError(f"{path} must be a finite number, got {value}")
    try:
        text = json.dumps(value)
    except TypeError:  # already an instance that _build made
        return value
    try:
        return TypeAdapter(hint).validate_json(text, strict=True)
    except ValidationError as error:
        rule = error.errors()[0]["msg"].removeprefix("Input should be ").replace("valid ", "")
        rule = rule.replace("a integer", "an integer").replace("a array", "a list in [ ]")
        rule = "complete" if rule == "Field required" else rule
        raise ValueError(f"{path} must be {rule}, got {value!r}") from error


def hydra_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split argv into (flags that Hydra answers itself, overrides); --config-dir is noted for the search path."""
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    args, unknown = parser.parse_known_args(list(argv))
    options = [word for word in unknown if word.startswith("-")]
    if options:
        raise ValueError(f"{options[0]} is not an option; overrides are KEY=VALUE, see --help")
    overrides = [*args.overrides, *unknown]  # argparse leaves what stands behind an option
    if args.config_dir is not None:
        folder = Path(args.config_dir).absolute()
        if not folder.is_dir():
            raise ValueError(f"--config-dir must be a folder, got {args.config_dir}; give one that exists")
        os.environ["DSFT_CONFIG_DIR"] = str(folder)
    asks = args.help or args.hydra_help or args.cfg or args.info is not None or args.multirun or args.shell_completion
    flags = [word for word in argv if word not in overrides]
    return ([*flags, *overrides] if asks else []), overrides


def hand_to_hydra(argv: Sequence[str]) -> int:
    """Let Hydra answer --cfg, --info, --help, --shell-completion and -m; returns the exit code."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    os.environ["HYDRA_FULL_ERROR"] = "1"
    words = _without_config_dir(argv)
    if any(word.startswith("hydra/launcher=") and word != "hydra/launcher=dsft" for word in words):
        _never(None)
    sys.argv = ["dsft", *words]
    os.environ.setdefault("HYDRA_MAIN_MODULE", "dsft.run")
    try:
        main = hydra.main(config_path=str(OWN_CONF), config_name="config", version_base="1.3")(_never)
        main()
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(one_line(error, own_keys)) from error
    finally:
        from hydra_plugins.dsft import DsftLauncher

        DsftLauncher.unwrite()
    return max(DsftLauncher.codes, default=0)


def _never(cfg: Any) -> None:
    """Hydra's task function: a plain run never comes here, and a sweep's points are processes of their own."""
    raise ValueError("hydra/launcher must be dsft, which starts points here and on SLURM; leave it out")


def _without_config_dir(argv: Sequence[str]) -> list[str]:
    """Argv without --config-dir DIR, which the search path already knows (Hydra's own cannot shadow)."""
    words, skip = [], False
    for word in argv:
        if skip:
            skip = False
        elif word in ("--config-dir", "-cd"):
            skip = True
        elif not word.startswith("--config-dir="):
            words.append(word)
    return words
