"""Where results come from: versions and machine, without names or paths of either."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from mkor import native

PACKAGES = ("mkor", "torch", "numpy", "pytorch-optimizer", "scikit-learn")


def package_version(name: str) -> str | None:
    """The version of an installed package.

    Args:
        name: The package's name on the index.

    Returns:
        Its version, None if it is not installed.
    """
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cpu_model() -> str:
    """What the processor calls itself.

    Returns:
        Its name, as far as the system tells it.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def environment() -> dict[str, object]:
    """What a result was made with.

    Returns:
        Versions, machine and date.
    """
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": native.version(),
    }
