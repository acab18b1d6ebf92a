"""Training of the appearance branch with aggressive contrast augmentation (SAM; UAE-M0)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from uae.bench.data import find_data
from uae.device import resolve_device
from uae.errors import InputError
from uae.network import NetworkConfig, PyramidHead, UAENet
from uae.preprocess import NETWORK_SPACING_MM, InputMap
from uae.progress import Cancel, Progress
from uae.training.config import check_config
from uae.training.data import load_subjects
from uae.training.loop import Trainer
from uae.training.losses import PairFeatures, appearance_loss
from uae.training.sampling import Pair, draw_pair, sample_at

logger = logging.getLogger(__name__)


def head_at_cells(head: PyramidHead, pyramid: Tensor, views: Tensor, cells: Tensor) -> Tensor:
    """The head's 3x3x3 output convolution at some cells only; equal to the dense one, a fraction of its work.

    Args:
        head: the head whose `output` convolution is meant.
        pyramid: (B, C, z, y, x) summed pyramid of all views.
        views: (K,) int, the view of each cell.
        cells: (K, 3) int z, y, x.

    Returns:
        (K, C), not normalised.
    """
    channels = pyramid.shape[1]
    depth, height, width = (n + 2 for n in pyramid.shape[2:])
    rows = F.pad(pyramid, (1, 1, 1, 1, 1, 1)).movedim(1, -1).reshape(-1, channels)
    steps = torch.arange(3, device=pyramid.device)
    offsets = (steps[:, None, None] * height + steps[:, None]) * width + steps
    start = ((views * depth + cells[:, 0]) * height + cells[:, 1]) * width + cells[:, 2]
    patches = rows.index_select(0, (start[:, None] + offsets.reshape(-1)).reshape(-1)).reshape(len(cells), -1)
    weight = head.output.weight.permute(0, 2, 3, 4, 1).reshape(channels, -1)
    return patches @ weight.T + head.output.bias


def cell_corners(positions: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The 8 fine cells around each position and their trilinear weights.

    Args:
        positions: (K, 3) float voxels z, y, x of a view; fine cell k lies at voxel 2 k + 0.5.
        shape: (z, y, x) of the fine grid.

    Returns:
        (K, 8, 3) int cells and (K, 8) weights.
    """
    limit = torch.tensor(shape, dtype=torch.float32) - 1
    place = torch.minimum(((positions - 0.5) / 2).clamp(min=0), limit)
    low = torch.minimum(place.floor(), limit - 1).clamp(min=0)
    fraction = (place - low)[:, None]
    corners = torch.stack(torch.meshgrid(*[torch.arange(2)] * 3, indexing="ij"), -1).reshape(8, 3)
    weight = torch.where(corners.bool(), fraction, 1 - fraction).prod(-1)
    return torch.minimum(low.long()[:, None] + corners, limit.long()), weight


def coarse_at_positions(coarse: Tensor, positions: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """Trilinear reading of the coarse map (C, z, y, x) at (K, 3) voxel positions; cell k lies at s k + (s - 1) / 2."""
    step = torch.tensor(stride, dtype=torch.float32, device=coarse.device)
    return sample_at(coarse[None], (positions - (step - 1) / 2) / step, padding="border").T


def step_features(
    network: UAENet, pyramid: Tensor, coarse: Tensor, pairs: list[Pair], negatives: list[list[Tensor]]
) -> list[PairFeatures]:
    """Features of all pairs of a step; the fine head is evaluated once, at the cells that are needed.

    Args:
        network: whose heads are read.
        pyramid: (2 P, C, z, y, x) summed fine pyramids, both views of a pair side by side.
        coarse: (2 P, C, z, y, x) coarse maps.
        pairs: P pairs.
        negatives: per pair and view (N, 3) random fine cells.
    """
    device = pyramid.device
    cells, weights, owners = [], [], []
    for index, pair in enumerate(pairs):
        for view in (0, 1):
            corners, weight = cell_corners(pair.partners[view], pyramid.shape[2:])
            own = torch.cat([pair.cells[view], negatives[index][view]])
            cells += [own, corners.reshape(-1, 3)]
            owners += [torch.full((len(own),), 2 * index + view), torch.full((8 * len(corners),), 2 * index + 1 - view)]
            weights.append(weight.to(device))
    fine = head_at_cells(network.fine, pyramid, torch.cat(owners).to(device), torch.cat(cells).to(device))
    parts = iter(fine.split([len(part) for part in cells]))
    maps = coarse.unbind(0)
    result = []
    for index, pair in enumerate(pairs):
        views = []
        for view in (0, 1):
            own, corners = next(parts), next(parts)
            weight = weights[2 * index + view]
            partner = (corners.reshape(*weight.shape, -1) * weight[..., None]).sum(1)
            own_coarse, partner_coarse = maps[2 * index + view], maps[2 * index + 1 - view]
            random_cells = negatives[index][view]
            views.append(
                _view_features(network, pair, view, random_cells, own, partner, own_coarse, partner_coarse)
            )
        merged = [
            {level: F.normalize(torch.cat([v[part][level] for v in views]), dim=-1) for level in ("fine", "coarse")}
            for part in range(3)
        ]
        places = [torch.cat([v[part] for v in views]).to(device) for part in range(3, 6)]
        result.append(PairFeatures(*merged, *places, subject=pair.subject_index))
    return result


def _view_features(
    network: UAENet,
    pair: Pair,
    view: int,
    negatives: Tensor,
    fine: Tensor,
    partner_fine: Tensor,
    coarse: Tensor,
    partner_coarse: Tensor,
) -> tuple[Any, ...]:
    stride, device = network.config.coarse_stride, fine.device
    count = len(pair.cells[view])
    positions = torch.cat([pair.cells[view], negatives]) * 2 + 0.5
    rough = coarse_at_positions(coarse, positions.to(device), stride)
    partner_rough = coarse_at_positions(partner_coarse, pair.partners[view].to(device), stride)
    places = pair.views[view].map.to_subject(positions) * NETWORK_SPACING_MM
    partner_places = pair.views[1 - view].map.to_subject(pair.partners[view]) * NETWORK_SPACING_MM
    return (
        {"fine": fine[:count], "coarse": rough[:count]},
        {"fine": partner_fine, "coarse": partner_rough},
        {"fine": fine[count:], "coarse": rough[count:]},
        places[:count],
        partner_places,
        places[count:],
    )


class AppearanceTask:
    """What the loop needs of the appearance branch: a network and the loss of one seeded step."""

    def __init__(
        self, config: dict[str, Any], root: Path, progress: Progress | None = None, cancel: Cancel | None = None
    ) -> None:
        self.settings = config["views"]
        self.loss_settings = config["loss"]
        self.input_map = InputMap(config["network"].get("input_map", "soft-tissue"))
        self.device = resolve_device(config.get("device", "auto"))
        kind = config["network"]["kind"]
        kinds = {"light": NetworkConfig.light, "paper": NetworkConfig.paper}
        if kind not in kinds:
            raise InputError(f"network.kind = {kind!r}: unknown; use light or paper")
        self.network_config = kinds[kind](semantic=False)
        self.network = UAENet(self.network_config).to(self.device, memory_format=torch.channels_last_3d)
        self.subjects = load_subjects(config["data"], root, progress, cancel)

    def step(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        """Draw the pairs of one step, run the network and return its loss and figures."""
        pairs = [
            draw_pair(rng, self.subjects, self.settings, self.input_map) for _ in range(self.settings["pairs_per_step"])
        ]
        images = torch.stack([view.image for pair in pairs for view in pair.views])[:, None]
        images = images.to(self.device, memory_format=torch.channels_last_3d)
        maps = self.network.stages(self.network.early(images))
        pyramid, coarse = self.network.fine.pyramid(maps[:3]), self.network.coarse(maps[3:])
        count = self.settings["negatives_per_view"]
        negatives = [[_random_cells(rng, view.valid, count) for view in pair.views] for pair in pairs]
        features = step_features(self.network, pyramid, coarse, pairs, negatives)
        return appearance_loss(
            features,
            self.loss_settings["temperature"],
            self.loss_settings["fine_exclusion_mm"],
            self.loss_settings["coarse_exclusion_mm"],
            tuple(self.loss_settings["weights"]),
        )


def _random_cells(rng: np.random.Generator, valid: Tensor, count: int) -> Tensor:
    candidates = valid[::2, ::2, ::2].nonzero()
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
    return candidates[torch.randint(len(candidates), (count,), generator=generator)]


def train(
    config: dict[str, Any],
    output: str | Path,
    root: str | Path | None = None,
    resume: bool = False,
    budget_minutes: float | None = None,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> Path:
    """Train the appearance branch.

    Args:
        config: see `configs/small.toml`; `device` and `threads` may stand at its top.
        output: folder of checkpoints, `log.jsonl` and the exported model.
        root: folder of the training data; default the one that UAE_DATA names.
        resume: go on from the last checkpoint in `output`.
        budget_minutes: stop (resumable) after this much time; the schedule counts steps, not minutes.
        progress: called after every step.
        cancel: asked before every step.

    Returns:
        The exported model file (EMA weights).

    Raises:
        InputError: a bad configuration or data.
        ResourceError: the disk is full.
        CancelledError: stopped by the user; the last checkpoint stays.
    """
    check_config(config)
    if "threads" in config:
        torch.set_num_threads(int(config["threads"]))
    folder = find_data(root).root
    torch.manual_seed(int(config["optimiser"]["seed"]))
    task = AppearanceTask(config, folder, progress, cancel)
    trainer = Trainer(task, config, Path(output))
    return trainer.run(resume, budget_minutes, progress, cancel)
