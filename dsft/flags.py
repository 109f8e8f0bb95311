"""The flags before and between the overrides: those that Hydra answers, and --config-dir."""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
"""What --info shows."""

OWN_YAML = (
    "options are KEY=VALUE; a YAML of your own is conf/experiment/NAME.yaml, here or below --config-dir, chosen by "
    "experiment=NAME"
)


class _Parser(argparse.ArgumentParser):
    """Raises ValueError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        named, _, why = message.removeprefix("argument ").partition(": ")
        flag = named.split("/")[-1]
        if choice := re.search(r"invalid choice: (.*?) \(choose from (.*)\)", why):
            raise ValueError(f"{flag} must be one of {choice[2]}, got {choice[1]}; see --help")
        if given := re.search(r"ignored explicit argument (.*)", why):
            raise ValueError(f"{flag} must be without a value, got {given[1]}; type {flag} alone")
        raise ValueError(f"{flag} must have a value, got none; see --help")


def _parser() -> argparse.ArgumentParser:
    """Return a parser of Hydra's flags; no abbreviations, so that --config is not taken for one of three."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    for names in (
        ("-h", "--help"), ("--hydra-help",), ("--version",), ("--resolve",), ("-r", "--run"), ("-m", "--multirun"),
        ("-sc", "--shell-completion"),
    ):  # fmt: skip
        parser.add_argument(*names, action="store_true")
    for names in (("-p", "--package"), ("-cp", "--config-path"), ("-cn", "--config-name"), ("-cd", "--config-dir")):
        parser.add_argument(*names)
    parser.add_argument("--experimental-rerun")
    parser.add_argument("-c", "--cfg", choices=("job", "hydra", "all"))
    parser.add_argument("-i", "--info", const="all", nargs="?", choices=INFO)
    return parser


def hydra_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split argv into (flags that Hydra answers itself, overrides); --config-dir is noted for the search path.

    Raises ValueError for a flag that is none, or has no effect.
    """
    _refuse_yaml(argv)
    args, unknown = _parser().parse_known_args(list(argv))
    options = [word for word in unknown if word.startswith("-")]
    if options:
        raise ValueError(f"{options[0]} is not an option; overrides are KEY=VALUE, see --help")
    if args.config_name is not None or args.config_path is not None:
        raise ValueError(
            f"--config-name and --config-path must be left out, got {args.config_name or args.config_path}; put your "
            "settings into conf/experiment/NAME.yaml and take experiment=NAME, or name a folder with --config-dir"
        )
    if args.experimental_rerun is not None:
        raise ValueError("--experimental-rerun must be left out; a run goes on by its run_dir")
    if (args.resolve or args.package is not None) and not args.cfg:
        raise ValueError("--resolve and --package belong to --cfg; add --cfg job, or leave them out")
    overrides = [*args.overrides, *unknown]  # argparse leaves what stands behind an option
    if args.config_dir is not None:
        folder = Path(args.config_dir).expanduser().absolute()
        if not folder.is_dir():
            raise ValueError(f"--config-dir must be a folder, got {args.config_dir}; give one that exists")
        os.environ["DSFT_CONFIG_DIR"] = str(folder)
    asks = (
        args.help or args.hydra_help or args.version or args.cfg or args.info is not None or args.multirun
        or args.shell_completion
    )  # fmt: skip
    flags = [word for word in argv if word not in overrides]
    return ([*flags, *overrides] if asks else []), overrides


def _refuse_yaml(argv: Sequence[str]) -> None:
    """Refuse a file's name behind --config or -c, as other tools take it."""
    for index, word in enumerate(argv):
        name, _, value = word.partition("=")
        given = value or "".join(argv[index + 1 : index + 2])
        if name == "--config" or (name in ("-c", "--cfg") and given.endswith((".yaml", ".yml"))):
            raise ValueError(f"{name} must be left out, got {given or 'no value'}; {OWN_YAML}")


def without_config_dir(argv: Sequence[str]) -> list[str]:
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
