"""Features of one step: the network's maps read at the cells and positions that the loss needs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from uae.network import PyramidHead, UAENet
from uae.preprocess import NETWORK_SPACING_MM
from uae.training.losses import LEVELS, PairFeatures
from uae.training.sampling import Pair, fine_positions, sample_at

DENSE_FROM = 0.3
"""Share of the fine cells from which one dense convolution is cheaper than gathered neighbourhoods (our timing)."""


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
    if len(cells) > DENSE_FROM * pyramid[:, 0].numel():
        dense = head.output(pyramid).movedim(1, -1)
        return dense[views, cells[:, 0], cells[:, 1], cells[:, 2]]
    channels = pyramid.shape[1]
    depth, height, width = (n + 2 for n in pyramid.shape[2:])
    rows = F.pad(pyramid, (1, 1, 1, 1, 1, 1)).movedim(1, -1).reshape(-1, channels)
    steps = torch.arange(3, device=pyramid.device)
    offsets = (steps[:, None, None] * height + steps[:, None]) * width + steps
    start = ((views * depth + cells[:, 0]) * height + cells[:, 1]) * width + cells[:, 2]
    patches = rows.index_select(0, (start[:, None] + offsets.reshape(-1)).reshape(-1)).reshape(len(cells), -1)
    weight = head.output.weight.permute(0, 2, 3, 4, 1).reshape(channels, -1)
    return patches @ weight.T.to(patches.dtype) + head.output.bias.to(patches.dtype)


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


class _Requests:
    """Cells of the fine head asked for by all pairs of a step, answered by one evaluation."""

    def __init__(self) -> None:
        self.cells: list[Tensor] = []
        self.views: list[Tensor] = []

    def ask(self, view: int, cells: Tensor) -> int:
        """Ask for cells (K, 3) of a view; returns the number of the request."""
        self.cells.append(cells)
        self.views.append(torch.full((len(cells),), view))
        return len(self.cells) - 1

    def answer(self, head: PyramidHead, pyramid: Tensor) -> list[Tensor]:
        """(K, C) float32 features of each request."""
        device = pyramid.device
        found = head_at_cells(head, pyramid, torch.cat(self.views).to(device), torch.cat(self.cells).to(device))
        return list(found.float().split([len(cells) for cells in self.cells]))


def step_features(network: UAENet, pyramid: Tensor, coarse: Tensor, pairs: list[Pair]) -> list[PairFeatures]:
    """Features of all pairs of a step; the fine head is evaluated once, at the cells that are needed.

    Args:
        network: whose heads are read.
        pyramid: (V, C, z, y, x) summed fine pyramids of all views, pair by pair in the order of `Pair.all_views`.
        coarse: (V, C, z, y, x) coarse maps.
        pairs: the pairs.
    """
    device, shape = pyramid.device, tuple(pyramid.shape[2:])
    coarse = coarse.float()
    requests, plans, first = _Requests(), [], 0
    for pair in pairs:
        plan = []
        for view in (0, 1):
            corners, weight = cell_corners(pair.partners[view], shape)
            own = requests.ask(first + view, torch.cat([pair.cells[view], pair.negatives[view]]))
            plan.append((own, requests.ask(first + 1 - view, corners.reshape(-1, 3)), weight.to(device)))
        beyond = requests.ask(first + 2, pair.beyond[1]) if pair.beyond else None
        plans.append((first, plan, beyond))
        first += len(pair.all_views)
    answers = requests.answer(network.fine, pyramid)
    result = []
    for pair, (start, plan, beyond) in zip(pairs, plans, strict=True):
        rough = _CoarseReader(network.config.coarse_stride, coarse[start : start + len(pair.all_views)])
        parts: dict[str, dict[str, list[Tensor]]] = {
            name: {level: [] for level in LEVELS} for name in ("query", "partner", "negative")
        }
        for view, (own, corners, weight) in enumerate(plan):
            count = len(pair.cells[view])
            partner = (answers[corners].reshape(*weight.shape, -1) * weight[..., None]).sum(1)
            for name, fine in (
                ("query", answers[own][:count]), ("partner", partner), ("negative", answers[own][count:])
            ):  # fmt: skip
                parts[name]["fine"].append(fine)
            parts["query"]["coarse"].append(rough(view, fine_positions(pair.cells[view])))
            parts["partner"]["coarse"].append(rough(1 - view, pair.partners[view]))
            parts["negative"]["coarse"].append(rough(view, fine_positions(pair.negatives[view])))
        unit = {name: {level: _unit(torch.cat(found)) for level, found in own.items()} for name, own in parts.items()}
        features = PairFeatures(**unit, **_places(pair, device), subject=pair.subject_index, seed=pair.seed)
        if pair.beyond is not None:
            far = rough(2, fine_positions(pair.beyond[1]))
            features.beyond = {"fine": _unit(answers[beyond]), "coarse": _unit(far)}
            view, cells = pair.beyond
            features.beyond_mm = (view.common(fine_positions(cells)) * NETWORK_SPACING_MM).to(device)
        result.append(features)
    return result


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors, dim=-1)


def _places(pair: Pair, device: torch.device) -> dict[str, Tensor]:
    """Places (.., 3) mm, float32, of queries, partners and negatives in the frame of the pair."""
    views = pair.views
    places = {
        "query_mm": [view.common(fine_positions(cells)) for view, cells in zip(views, pair.cells, strict=True)],
        "partner_mm": [views[1 - k].common(pair.partners[k]) for k in (0, 1)],
        "negative_mm": [view.common(fine_positions(cells)) for view, cells in zip(views, pair.negatives, strict=True)],
    }
    return {name: (torch.cat(found) * NETWORK_SPACING_MM).to(device) for name, found in places.items()}


class _CoarseReader:
    """Reads the coarse maps (V, C, z, y, x) of a pair's views at voxel positions."""

    def __init__(self, stride: tuple[int, int, int], maps: Tensor) -> None:
        self.stride, self.maps = stride, maps

    def __call__(self, view: int, positions: Tensor) -> Tensor:
        return coarse_at_positions(self.maps[view], positions.to(self.maps.device), self.stride)


def coarse_cells(pair: Pair, coarse: Tensor, stride: tuple[int, int, int]) -> tuple[tuple[Tensor, ...], ...]:
    """All coarse cells of a pair's two views.

    Args:
        pair: the pair.
        coarse: (2, C, z, y, x) coarse maps of its views.
        stride: (z, y, x) of the coarse head.

    Returns:
        Unit vectors, places (mm, frame of the pair, z first) and validity, each a tuple over the two views.
    """
    shape = tuple(coarse.shape[2:])
    index = torch.stack(torch.meshgrid(*[torch.arange(n) for n in shape], indexing="ij"), -1).reshape(-1, 3)
    step = torch.tensor(stride)
    positions = index * step + (step - 1) / 2
    vectors, places, valid = [], [], []
    for view, maps in zip(pair.views, coarse.float(), strict=True):
        vectors.append(_unit(maps.reshape(len(maps), -1).T))
        places.append((view.common(positions) * NETWORK_SPACING_MM).to(coarse.device))
        valid.append(torch.from_numpy(view.mask_at(positions) > 0).to(coarse.device))
    return tuple(vectors), tuple(places), tuple(valid)
