"""Model files and the registries (models.json) that list them: safe reading, checking and writing.

A model file is a torch archive of one plain dictionary, so that it loads with `weights_only=True`, which executes no
pickled code: {"format", "config", "input_map", "thresholds", "meta", "state_dict"}. Listing models imports no torch.
"""

from __future__ import annotations

import json
import logging
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uae
from uae.errors import InputError, ModelError
from uae.files import as_user_error, atomic_path, sha256
from uae.paths import user_model_folder

if TYPE_CHECKING:
    import torch

    from uae.network import NetworkConfig
    from uae.preprocess import InputMap

FORMAT = "uae-model-1"
REGISTRY = "models.json"
INTENDED_USE = "research; not a medical device"
ENTRY_META = ("version", "round", "training", "validation", "licence", "modalities")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One line of a registry.

    Attributes:
        name: what --model takes.
        path: the model file.
        values: the entry of models.json.
        shipped: True for models that come with the program, False for the user's own folder.
    """

    name: str
    path: Path
    values: dict[str, Any]
    shipped: bool


def shipped_folders() -> list[Path]:
    """Folders of the models that come with the program: of a source checkout, then of an installed package."""
    package = Path(uae.__path__[0])
    return [package.parent / "Resources" / "Models", package / "_models"]


def read_registry(folder: Path, shipped: bool = False) -> list[Entry]:
    """Entries of `folder`/models.json, none where there is no such file.

    Raises:
        ModelError: models.json is damaged.
    """
    path = folder / REGISTRY
    if not path.is_file():
        return []
    try:
        models = json.loads(path.read_text(encoding="utf-8"))["models"]
        return [Entry(str(v["name"]), folder / Path(str(v["file"])).name, dict(v), shipped) for v in models]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: damaged model registry ({error!r}); restore or delete this file") from error


def registered() -> list[Entry]:
    """All models by name: the user's folder first, so that an entry there takes the place of a shipped one."""
    entries: dict[str, Entry] = {}
    for entry in read_registry(user_model_folder()):
        entries.setdefault(entry.name, entry)
    for folder in shipped_folders():
        for entry in read_registry(folder, shipped=True):
            entries.setdefault(entry.name, entry)
    return list(entries.values())


def read_archive(path: Path) -> Any:
    """Read a torch file without executing pickled code.

    Returns:
        The plain Python object in the file, tensors on the CPU.

    Raises:
        ModelError: there is no such file, it is damaged, no torch file, or holds pickled code (which is not executed).
    """
    import torch

    if not path.is_file():
        raise ModelError(f"{path}: no such model file; check the path, or run `uae models list`")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise ModelError(
                f"{path}: the file holds pickled code, which was not executed; ask its source for a file that holds "
                "only tensors and plain values"
            ) from error
        raise ModelError(f"{path}: not a model file; check the path or fetch the file again") from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{path}: damaged or not a model file; fetch it again") from error


def check_state(state: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Check names, shapes and values of weights.

    Args:
        state: tensors by name.
        expected: shape by name.
        what: the file, for the message.

    Raises:
        ModelError: a tensor is missing, too many, of another shape, or not finite.
    """
    missing = sorted(set(expected) - set(state))
    extra = sorted(set(state) - set(expected))
    if missing or extra:
        parts = [
            f"{len(names)} {word} ({names[0]} ...)"
            for names, word in ((missing, "missing"), (extra, "unknown"))
            if names
        ]
        raise ModelError(f"{what}: the weights are of another network: tensors {', '.join(parts)}; check the file")
    for name, shape in expected.items():
        if tuple(state[name].shape) != tuple(shape):
            raise ModelError(
                f"{what}: tensor {name} has shape {tuple(state[name].shape)}, the network needs {tuple(shape)}; "
                "check the file"
            )
        if not bool(state[name].isfinite().all()):
            raise ModelError(f"{what}: tensor {name} holds values that are not finite; fetch the file again")


def is_tensor_dict(value: Any) -> bool:
    """Whether `value` is a non-empty dictionary of tensors by name."""
    import torch

    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items())
    )


def save_model(
    path: str | Path,
    state_dict: Mapping[str, torch.Tensor],
    config: NetworkConfig,
    input_map: InputMap,
    thresholds: Mapping[str, Any],
    meta: Mapping[str, Any],
    half: bool = True,
) -> str:
    """Write a model file.

    Convolution weights are stored in fp16 (half the size; their rounding is far below the noise of an embedding);
    norms and biases stay fp32 because a running variance can leave the range of fp16.

    Args:
        path: the file, `.pt`.
        state_dict: weights of a UAENet with `config`.
        config: the network's shapes.
        input_map: how intensities become network units.
        thresholds: limits calibrated for this model.
        meta: plain values; `name` and those of ENTRY_META go to models.json.
        half: store convolutions in fp16.

    Returns:
        SHA-256 of the file.

    Raises:
        ModelError: `meta` or `thresholds` are not plain values.
        InputError, ResourceError: the file cannot be written.
    """
    import torch

    try:
        plain = json.loads(json.dumps({"thresholds": dict(thresholds), "meta": dict(meta)}, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path}: thresholds and meta must be plain values ({error}); convert them first") from error
    tensors = {}
    for name, value in state_dict.items():
        value = value.detach().cpu()
        floating = torch.float16 if half and value.ndim > 1 else torch.float32
        tensors[name] = value.to(floating).contiguous() if value.is_floating_point() else value.clone()
    payload = {
        "format": FORMAT,
        "config": config.to_dict(),
        "input_map": input_map.to_dict(),
        **plain,
        "state_dict": tensors,
    }
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        torch.save(payload, stream)  # a stream, not a name: the name would enter the archive and change its hash
    return sha256(path)


def register_model(path: str | Path) -> dict[str, Any]:
    """Put a model file into the models.json of its folder, in place of an older entry of the same name.

    Returns:
        The new entry.

    Raises:
        ModelError: the file is not one of ours.
    """
    path = Path(path)
    payload = read_payload(path)
    meta = payload["meta"]
    entry: dict[str, Any] = {"name": meta.get("name", path.stem), "file": path.name}
    entry |= {key: meta[key] for key in ENTRY_META if key in meta}
    entry |= {"sha256": sha256(path), "bytes": path.stat().st_size}
    entry |= {key: payload[key] for key in ("config", "input_map", "thresholds")}
    entry["intended_use"] = meta.get("intended_use", INTENDED_USE)
    others = [other.values for other in read_registry(path.parent) if other.name != entry["name"]]
    _write_registry(path.parent, [*others, entry])
    return entry


def update_thresholds(folder: str | Path, name: str, thresholds: Mapping[str, Any]) -> None:
    """Store newly calibrated limits of model `name` in `folder`/models.json; the model file is untouched.

    Raises:
        ModelError: no such model there.
    """
    entries = [entry.values for entry in read_registry(Path(folder))]
    chosen = [entry for entry in entries if entry["name"] == name]
    if not chosen:
        raise ModelError(f"{folder}: no model {name!r} in {REGISTRY}; register it first")
    chosen[0]["thresholds"] = dict(thresholds)
    _write_registry(Path(folder), entries)


def _write_registry(folder: Path, models: Iterable[dict[str, Any]]) -> None:
    ordered = sorted(models, key=lambda entry: entry["name"])
    with atomic_path(folder / REGISTRY) as temporary:
        temporary.write_text(json.dumps({"models": ordered}, indent=2) + "\n", encoding="utf-8")


def read_payload(path: Path) -> dict[str, Any]:
    """Read one of our model files.

    Returns:
        {"config", "input_map", "thresholds", "meta", "state_dict"}.

    Raises:
        ModelError: not one of our files.
    """
    payload = read_archive(path)
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise ModelError(
            f"{path}: not a model of this program; for the authors' released checkpoints run `uae models import {path}`"
        )
    parts = ("config", "input_map", "thresholds", "meta")
    if not all(isinstance(payload.get(part), dict) for part in parts) or not is_tensor_dict(payload.get("state_dict")):
        raise ModelError(f"{path}: the model file is incomplete; fetch it again")
    return payload


def checked_sha256(path: Path, expected: str | None) -> str:
    """SHA-256 of `path`, compared with the registered one where there is one.

    Raises:
        ModelError: the file is missing or is not the registered one.
    """
    try:
        found = sha256(path)
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such model file; install it again or run `uae models list`") from error
    except OSError as error:
        raise InputError(str(as_user_error(error, path))) from error
    if expected is not None and found != expected:
        raise ModelError(
            f"{path}: wrong hash (SHA-256 {found[:12]}..., registered {str(expected)[:12]}...): the file was changed "
            "or damaged; fetch it again"
        )
    return found
