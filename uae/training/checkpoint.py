"""Checkpoints that appear whole or not at all, and say what they belong to."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from uae.errors import InputError, ModelError, ResourceError
from uae.files import atomic_path
from uae.network import NetworkConfig

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"
FREE_SETTINGS = ("device", "threads", "network.init", "crossmodal.jobs", "optimiser.checkpoint_every",
                 "validation.")  # fmt: skip
"""Settings (or beginnings of their names) that may differ on resume: they do not change what is learned, or have done
their work at the start."""


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint; the last one stays where that fails.

    Raises:
        ResourceError: the disk is full, or a quota or a limit on the size of files is reached.
        InputError: the folder cannot be written.
    """
    try:
        with atomic_path(path) as temporary:
            try:
                with temporary.open("wb") as stream:
                    torch.save(dict(state), stream)
            except RuntimeError as error:  # torch's own writer does not say what the system said
                raise ResourceError(f"{path}: the checkpoint could not be written; is the disk full?") from error
            except OSError as error:
                if error.errno in (errno.EFBIG, errno.EIO):
                    raise ResourceError(f"{path}: the checkpoint could not be written ({error.strerror})") from error
                raise
    except ResourceError as error:
        raise ResourceError(f"{error}; the last checkpoint is intact: free some space and --resume") from error


def read_checkpoint(path: Path, network_config: NetworkConfig) -> dict[str, Any]:
    """Read a checkpoint of this or the earlier format (which knows no settings).

    Raises:
        InputError: there is none.
        ModelError: it is damaged or of another architecture.
    """
    if not path.exists():
        raise InputError(f"{path}: no checkpoint to resume from; start without --resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = NetworkConfig.from_dict(state["network_config"])
        for name in ("step", "network", "optimiser", "ema", "active_seconds"):
            state[name]
    except Exception as error:
        raise ModelError(f"{path}: damaged checkpoint ({error}); start again in another folder") from error
    if found != network_config:
        raise ModelError(f"{path}: checkpoint of another network; use the configuration it was started with")
    return state


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their full names, lists and tuples alike."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = json.loads(json.dumps(value))
    return found


def check_settings(
    path: Path, before: Mapping[str, Any] | None, now: Mapping[str, Any], explicit: frozenset[str]
) -> None:
    """Refuse to resume a run under other settings, unless they were asked for one by one.

    Args:
        path: the checkpoint, for the message.
        before: settings of the checkpoint, None for the earlier format.
        now: settings of this call.
        explicit: names given by --set.

    Raises:
        InputError: a setting differs.
    """
    if before is None:
        logger.warning("%s: written by an earlier version, which kept no settings; they are not compared", path)
        return
    old, new = flat(before), flat(now)
    differing = [
        name
        for name in sorted(set(old) | set(new))
        if old.get(name) != new.get(name) and name not in explicit and not name.startswith(FREE_SETTINGS)
    ]
    if differing:
        name = differing[0]
        more = f" and {len(differing) - 1} more ({', '.join(differing[1:4])})" if len(differing) > 1 else ""
        raise InputError(
            f"{path}: the run was started with {name} = {_short(old.get(name))}, now it is {_short(new.get(name))}"
            f"{more}; use the same configuration, or ask for the change with --set {name}=..."
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."
