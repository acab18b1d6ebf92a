"""What this installation is: versions, models, folders. Imports no torch unless asked for devices."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

from uae import __version__
from uae.errors import ModelError
from uae.models import list_models
from uae.paths import cache_folder, user_model_folder

LIBRARIES = ("torch", "numpy", "scipy", "SimpleITK", "matplotlib", "numba")


def versions() -> dict[str, str | None]:
    """Version of each library of LIBRARIES, None where it is not installed; nothing is imported."""
    return {name: _version(name) for name in LIBRARIES}


def collect(devices: bool = False) -> dict[str, Any]:
    """Everything `uae info` says, as plain values.

    Args:
        devices: also ask torch for its devices, which imports it.
    """
    try:
        models = [f"{entry['name']} {entry.get('version', '?')}" for entry in list_models() if entry["present"]]
    except ModelError as error:
        models = [str(error)]
    facts: dict[str, Any] = {
        "uae": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "libraries": versions(),
        "models": models,
        "model_folder": str(user_model_folder()),
        "cache_folder": str(cache_folder()),
        "data_folder": os.environ.get("UAE_DATA"),
        "intended_use": "research; not a medical device",
    }
    if devices:
        facts["devices"] = _devices()
    return facts


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import torch

    from uae.device import describe_device

    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return [describe_device(torch.device(name)) for name in names]
