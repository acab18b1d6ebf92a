"""Folders: of the running package, and of the user on this platform (each can be moved by an environment variable)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])
"""Folder of the running `uae`."""


def _platform_folder(unix_variable: str, unix_default: str, mac: str) -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / mac
    return Path(os.environ.get(unix_variable) or Path.home() / unix_default)


def cache_folder() -> Path:
    """Folder of cached embeddings: UAE_CACHE, else the platform's cache folder. It need not exist yet."""
    if os.environ.get("UAE_CACHE"):
        return Path(os.environ["UAE_CACHE"])
    return _platform_folder("XDG_CACHE_HOME", ".cache", "Caches") / "uae" / "embeddings"


def user_model_folder() -> Path:
    """Folder of the user's own and imported models: UAE_MODELS, else the platform's data folder."""
    if os.environ.get("UAE_MODELS"):
        return Path(os.environ["UAE_MODELS"])
    return _platform_folder("XDG_DATA_HOME", ".local/share", "Application Support") / "uae" / "models"


def child_environment() -> dict[str, str]:
    """Variables that a child needs beyond the inherited ones: the running `uae` on its path, and UTF-8."""
    paths = [ROOT, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "PYTHONSAFEPATH": "1",  # a folder `uae` where the application was started must not come before it
        "PYTHONUTF8": "1",
        "PYTHONUNBUFFERED": "1",
    }
