"""Trained models by name: list, verify, load; which one to use for which modalities.

A name is looked up in the user's model folder (UAE_MODELS), then in the models that come with the program.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uae.errors import InputError, ModelError
from uae.model_files import (
    Entry,
    check_state,
    checked_sha256,
    read_payload,
    read_registry,
    register_model,
    registered,
    save_model,
    update_thresholds,
)
from uae.released import import_released

if TYPE_CHECKING:
    import torch

    from uae.network import NetworkConfig, UAENet
    from uae.preprocess import InputMap

__all__ = [
    "Model",
    "default_model",
    "import_released",
    "list_models",
    "load_model",
    "register_model",
    "save_model",
    "update_thresholds",
    "verify_models",
]

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Model:
    """A network with everything that belongs to its weights.

    Attributes:
        name: registry name, or the file's stem.
        version: version text.
        sha256: hash of the model file; identifies the weights in reports and cache keys.
        config: shapes of the network.
        input_map: how intensities become network units.
        thresholds: limits calibrated for these weights.
        meta: training, validation, licence, credits; `trained_heads` where the file says so.
        path: the model file.
        state: weights by name, as stored.
    """

    name: str
    version: str
    sha256: str
    config: NetworkConfig
    input_map: InputMap
    thresholds: dict[str, Any]
    meta: dict[str, Any]
    path: Path
    state: dict[str, torch.Tensor] = field(repr=False)
    _networks: dict[str, UAENet] = field(default_factory=dict, repr=False)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copy of the weights in fp32, to continue training from."""
        return {key: value.float() if value.is_floating_point() else value.clone() for key, value in self.state.items()}

    def network(self, device: torch.device | str = "cpu") -> UAENet:
        """The network on `device`, fp32 weights, for inference only; built once per device.

        BatchNorm is folded into the convolutions: the same function with fewer passes over memory.
        """
        import torch
        from torch.nn.utils.fusion import fuse_conv_bn_eval

        from uae.network import ConvNorm

        key = str(torch.device(device))
        if key not in self._networks:
            network = _skeleton(self.config)
            network.load_state_dict(self.state_dict(), assign=True)
            network.eval().requires_grad_(False)
            for module in network.modules():
                if isinstance(module, ConvNorm):
                    module.conv = fuse_conv_bn_eval(module.conv, module.bn)
                    module.bn = torch.nn.Identity()
            self._networks[key] = network.to(device)
        return self._networks[key]


def _skeleton(config: NetworkConfig) -> UAENet:
    """The network with arbitrary weights; leaves the state of the random numbers as it was."""
    import torch

    from uae.network import UAENet

    with torch.random.fork_rng(devices=[]):
        return UAENet(config)


def list_models() -> list[dict[str, Any]]:
    """Entries of the registries, each with `path`, `shipped` and `present`; imports no torch."""
    return [
        {**entry.values, "path": str(entry.path), "shipped": entry.shipped, "present": entry.path.is_file()}
        for entry in registered()
    ]


def verify_models() -> list[dict[str, Any]]:
    """Check the hash and the tensors of every listed model.

    Returns:
        For each model {"name", "path", "ok", "reason"}; reason is empty where all is well.
    """
    results = []
    for entry in registered():
        reason = ""
        try:
            _load(entry.path, entry)
        except ModelError as error:
            reason = str(error)
        results.append({"name": entry.name, "path": str(entry.path), "ok": not reason, "reason": reason})
    return results


def default_model(modality_a: str | None, modality_b: str | None) -> str:
    """Name of the model for a pair of modalities: `uae-s` for CT with CT where it is there, else `uae-m`."""
    if modality_a == modality_b == "ct" and any(e.name == "uae-s" and e.path.is_file() for e in registered()):
        return "uae-s"
    return "uae-m"


def load_model(name_or_path: str | Path = "uae-m") -> Model:
    """Load a model by registry name or by file.

    Args:
        name_or_path: name as in `uae models list`, or a model file. A file that its folder's models.json lists is
            checked against the hash there.

    Raises:
        ModelError: unknown name (the message lists the known ones), missing or damaged file, wrong hash, pickled code,
            weights of another network.
    """
    text = str(name_or_path)
    entries = registered()
    for entry in entries:
        if entry.name == text:
            return _load(entry.path, entry)
    path = Path(name_or_path)
    if not path.is_file():
        names = ", ".join(sorted(entry.name for entry in entries)) or "none"
        raise ModelError(f"no model {text!r}; known models: {names}; give one of them or a model file to --model")
    listed = [entry for entry in read_registry(path.parent) if entry.path.name == path.name]
    return _load(path, listed[0] if listed else None)


def _load(path: Path, entry: Entry | None) -> Model:
    from uae.network import NetworkConfig
    from uae.preprocess import InputMap

    digest = checked_sha256(path, str(entry.values.get("sha256")) if entry else None)
    payload = read_payload(path)
    try:
        config = NetworkConfig.from_dict(payload["config"])
        input_map = InputMap.from_dict(payload["input_map"])
        expected = {name: tuple(value.shape) for name, value in _skeleton(config).state_dict().items()}
    except (InputError, TypeError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise ModelError(f"{path}: the model's settings cannot be used ({error}); fetch the file again") from error
    check_state(payload["state_dict"], expected, str(path))
    meta = payload["meta"]
    thresholds = payload["thresholds"]
    if entry is not None:
        # Limits are calibrated after training: the registry holds the newest ones, the hash of the weights stays.
        meta = {**meta, **{key: value for key, value in entry.values.items() if key not in ("config", "input_map")}}
        thresholds = entry.values.get("thresholds", thresholds)
    model = Model(
        name=entry.name if entry else str(meta.get("name", path.stem)),
        version=str(meta.get("version", "0")),
        sha256=digest,
        config=config,
        input_map=input_map,
        thresholds=dict(thresholds),
        meta=meta,
        path=path,
        state=payload["state_dict"],
    )
    logger.info("model %s version %s (%s...)", model.name, model.version, digest[:12])
    return model
