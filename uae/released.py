"""Import of the authors' released checkpoints (SAM, UAE-S, UAE-M) into our model format.

Layout read from the authors' code (MIT licence); the files themselves are the authors' and are neither shipped nor
downloaded by this program. Tensors are copied unchanged in fp32, so the numbers are those of the released network.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uae.errors import ModelError
from uae.files import sha256
from uae.model_files import INTENDED_USE, check_state, is_tensor_dict, read_archive, register_model, save_model
from uae.paths import user_model_folder

if TYPE_CHECKING:
    import torch

    from uae.models import Model

KINDS = ("sam", "uae-s", "uae-m")
MODALITIES = {"sam": ["ct"], "uae-s": ["ct"], "uae-m": ["ct", "mr"]}
RESERVED_NAMES = ("uae-m", "uae-s")
WIDTHS = (64, 128, 256, 512)
HEAD_CHANNELS = 128
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
HEADS = {"neck": ("fine", 3), "read_out_head": ("coarse", 1), "semantic_head": ("semantic", 3)}
THRESHOLDS = {
    "match": {"score": 0.8, "cycle_mm": 8.0},
    "adareg_score": 0.75,
    "origin": "score 0.8: authors' demo; 0.75: authors' registration script (1.5 as a sum of two cosines); "
    "cycle distance: two fine cells, our measurement",
}
# Words by which the authors' file names and configuration texts tell the systems apart.
_HINTS = (
    ("uae-m", re.compile(r"cross[-_]?sam|dual_head_mri_ct|ct_mri|uae[-_]?m\b|inter_1", re.IGNORECASE)),
    ("uae-s", re.compile(r"sam[-_]?v2|dual_head_mean_vector|semantic[-_]?sam|uae[-_]?s\b", re.IGNORECASE)),
)

logger = logging.getLogger(__name__)


def released_shapes(semantic: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a released checkpoint, without the `module.` prefix."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv_norm(name: str, outputs: int, inputs: int, *kernel: int) -> None:
        shapes[f"{name}.conv.weight"] = (outputs, inputs, *kernel)
        shapes.update({f"{name}.bn.{part}": (outputs,) for part in BATCH_NORM})
        shapes[f"{name}.bn.num_batches_tracked"] = ()

    conv_norm("backbone.conv1", WIDTHS[0], 1, 3, 7, 7)
    inputs = WIDTHS[0]
    for stage, width in enumerate(WIDTHS, start=1):
        z = 1 if stage <= 2 else 3
        for block in (0, 1):
            conv_norm(f"backbone.layer{stage}.{block}.conv1", width, inputs if block == 0 else width, z, 3, 3)
            conv_norm(f"backbone.layer{stage}.{block}.conv2", width, width, z, 3, 3)
        conv_norm(f"backbone.layer{stage}.0.downsample", width, inputs, 1, 1, 1)
        inputs = width
    heads = {"neck": WIDTHS[:3], "read_out_head": WIDTHS[3:]} | ({"semantic_head": WIDTHS[:3]} if semantic else {})
    for head, widths in heads.items():
        for level, width in enumerate(widths):
            shapes[f"{head}.lateral_convs.{level}.conv.weight"] = (HEAD_CHANNELS, width, 1, 1, 1)
            shapes[f"{head}.lateral_convs.{level}.conv.bias"] = (HEAD_CHANNELS,)
        shapes[f"{head}.fpn_convs.0.conv.weight"] = (HEAD_CHANNELS, HEAD_CHANNELS, 3, 3, 3)
        shapes[f"{head}.fpn_convs.0.conv.bias"] = (HEAD_CHANNELS,)
    return shapes


def our_name(name: str) -> str:
    """Name of a released tensor in our network; the backbone's names agree."""
    head, _, rest = name.partition(".")
    if head not in HEADS:
        return name
    rest = re.sub(r"^lateral_convs\.(\d+)\.conv\.", r"lateral.\1.", rest)
    return f"{HEADS[head][0]}.{re.sub(r'^fpn_convs[.]0[.]conv[.]', 'output.', rest)}"


def read_released(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read and check a released checkpoint without executing pickled code.

    Returns:
        Tensors by their released names without `module.`, and the file's `meta`.

    Raises:
        ModelError: not a released checkpoint, damaged, or holding pickled code.
    """
    payload = read_archive(path)
    state = payload.get("state_dict") if isinstance(payload, dict) else None
    if not is_tensor_dict(state):
        raise ModelError(f"{path}: no `state_dict` of tensors in it, so not a released checkpoint; check the file")
    state = {name.removeprefix("module."): value for name, value in state.items()}
    semantic = any(name.startswith("semantic_head.") for name in state)
    check_state(state, released_shapes(semantic), str(path))
    meta = payload.get("meta")
    return state, meta if isinstance(meta, dict) else {}


def released_kind(state: Mapping[str, torch.Tensor], meta: Mapping[str, Any], file_name: str) -> str:
    """Which of the three released systems a checkpoint is.

    SAM has no semantic head. UAE-M has one that was never trained: its biases still have their initial value, exactly
    zero. Where that says nothing, the configuration text in `meta` and the file name do.

    Returns:
        "sam", "uae-s" or "uae-m".
    """
    biases = [value for name, value in state.items() if name.startswith("semantic_head.") and name.endswith(".bias")]
    text = " ".join([file_name, *(value for value in meta.values() if isinstance(value, str))])
    hint = next((kind for kind, pattern in _HINTS if pattern.search(text)), None)
    if not biases:
        return "uae-m" if hint == "uae-m" else "sam"
    if all(not bool(bias.any()) for bias in biases):
        return "uae-m"
    return hint or "uae-s"


def import_released(
    file: str | Path, name: str | None = None, model_dir: str | Path | None = None, kind: str | None = None
) -> Model:
    """Convert a released checkpoint and register it in the user's model folder.

    The untrained semantic head of UAE-M is left out: it is neither used by the authors nor meaningful.

    Args:
        file: the authors' file.
        name: registry name, default `released-<kind>`.
        model_dir: folder, default the user's model folder.
        kind: "sam", "uae-s" or "uae-m"; found out where None.

    Returns:
        The imported model; `meta["trained_heads"]` and `meta["untrained_heads"]` say which heads are trained.

    Raises:
        ModelError: the file is not such a checkpoint, or does not fit `kind`; or the name is reserved.
    """
    from uae.models import load_model
    from uae.network import NetworkConfig
    from uae.preprocess import InputMap

    file = Path(file)
    if kind is not None and kind not in KINDS:
        raise ModelError(f"unknown kind {kind!r}; use one of {', '.join(KINDS)}")
    state, file_meta = read_released(file)
    has_semantic = "semantic_head.fpn_convs.0.conv.weight" in state
    decided = "given by the user" if kind else "found out from the file"
    kind = kind or released_kind(state, file_meta, file.name)
    if (kind == "sam" and has_semantic) or (kind == "uae-s" and not has_semantic):
        word = "has" if has_semantic else "has no"
        raise ModelError(f"{file}: the file {word} semantic head, so it is not {kind!r}; leave out --kind")
    name = name or f"released-{kind}"
    if name in RESERVED_NAMES or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ModelError(f"the name {name!r} cannot be used for an imported model; use for example released-{kind}")
    semantic = kind == "uae-s"
    kept = {
        our_name(key): value.float() if value.is_floating_point() else value
        for key, value in state.items()
        if semantic or not key.startswith("semantic_head.")
    }
    meta = {
        "name": name,
        "version": "released",
        "kind": kind,
        "kind_decided": decided,
        "trained_heads": ["fine", "coarse", "semantic"] if semantic else ["fine", "coarse"],
        "untrained_heads": ["semantic"] if has_semantic and not semantic else [],
        "training": {"by": "the authors of UAE", "source_file": file.name, "source_sha256": sha256(file)},
        "licence": "stated by the publisher of the checkpoint",
        "modalities": MODALITIES[kind],
        "intended_use": INTENDED_USE,
    }
    path = Path(model_dir or user_model_folder()) / f"{name}.pt"
    config = NetworkConfig.paper(semantic=semantic)
    save_model(path, kept, config, InputMap(name="released"), THRESHOLDS, meta, half=False)
    register_model(path)
    model = load_model(path)
    logger.info(
        "imported %s as %s (%s, %s); trained heads: %s; untrained and left out: %s",
        file,
        name,
        kind,
        decided,
        ", ".join(meta["trained_heads"]),
        ", ".join(meta["untrained_heads"]) or "none",
    )
    return model
