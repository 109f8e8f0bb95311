"""Machines without a network, as a cluster's nodes: nothing is asked of a hub there, everything is staged before."""

import os

HUB = "HF_HUB_OFFLINE"
"""huggingface_hub's own variable, which transformers and datasets follow where they are told nothing else."""
OTHERS = ("HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")

STAGE = (
    "stage it first, where there is a network: python -m dsft.stage with the same overrides; or set "
    f"{HUB}=0 if the run's machines reach the hub"
)
"""The way out of what is not in a cache."""


class AbsentError(ValueError):
    """What a run needs and this machine has not, though the machine that it runs on may: a model, data."""


def unplug() -> None:
    """From here on this process takes what the caches have, unless the user set otherwise; before the hub's import."""
    os.environ.setdefault(HUB, "1")


def unplugged() -> bool:
    """Whether this process is to ask no hub."""
    from huggingface_hub import is_offline_mode

    return is_offline_mode()


def exports() -> list[str]:
    """Lines of shell that do to a job what unplug does to a process; what was set before stays."""
    return [f'export {HUB}="${{{HUB}-1}}"', *(f'export {name}="${{{name}-${HUB}}}"' for name in OTHERS)]
