"""PyTorch inside Slicer: asked for first, with the reason, and installed by the extension made for that."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

from uae.errors import InputError

__all__ = ["REASON", "ensure_torch", "torch_is_here"]

logger = logging.getLogger(__name__)

REASON = (
    "The neural network needs PyTorch, which is not installed in this 3D Slicer. Install it now through the extension "
    "PyTorch? It is downloaded once (some hundred MB, more with GPU support) and nothing else is changed."
)
EXTENSION = "PyTorch"
KEPT = ("numpy", "SimpleITK", "vtk", "scipy")
"""Packages that come with Slicer and must stay as they are."""

Ask = Callable[[str], bool]


def torch_is_here() -> bool:
    """Whether torch can be imported; imports nothing."""
    return importlib.util.find_spec("torch") is not None


def ensure_torch(ask: Ask, ask_text: str = REASON) -> None:
    """Make sure that torch is there, asking before anything is installed.

    Args:
        ask: shows a question and tells whether the user agreed.
        ask_text: the question, translated.

    Raises:
        InputError: torch is missing and the user declined, or it could not be installed; says what to do.
    """
    if torch_is_here():
        return
    if not ask(ask_text):
        raise InputError(
            "PyTorch is needed; install it with the extension PyTorch (Extensions Manager), then try again"
        )
    before = _versions()
    try:
        _torch_utils().PyTorchUtilsLogic().installTorch(askConfirmation=False)
    except InputError:
        raise
    except Exception as error:  # pip's failures have no class of their own
        raise InputError(
            f"PyTorch could not be installed ({error}); see the log, check the network, and try again"
        ) from error
    importlib.invalidate_caches()
    changed = [f"{name} {old} -> {new}" for (name, old), new in zip(before.items(), _versions().values()) if old != new]
    if changed:
        raise InputError(f"the installation changed packages of 3D Slicer ({', '.join(changed)}); install Slicer again")
    if not torch_is_here():
        raise InputError("PyTorch was installed but is not found yet; restart 3D Slicer")


def _torch_utils() -> Any:
    """The module of the extension PyTorch.

    Raises:
        InputError: that extension is not installed.
    """
    try:
        return importlib.import_module("PyTorchUtils")
    except ImportError as error:
        raise InputError(
            f"the extension {EXTENSION} is missing: install it in the Extensions Manager, restart 3D Slicer "
            "and try again"
        ) from error


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in KEPT:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
