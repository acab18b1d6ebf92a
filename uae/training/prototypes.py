"""Prototypical supervised contrastive loss of the semantic branch (equation 2 of the UAE papers)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from uae.errors import InputError

BACKGROUND, OUTSIDE = 0, -1
DEFAULTS = {"temperature": 0.1, "reduction": "mean", "background": True, "normalise": False}
"""What the released model was trained with (authors' code); the papers: temperature 0.5, sum, labelled cells only."""


@dataclass
class LabelledCells:
    """Cells of one volume.

    Attributes:
        vectors: (N, C) unit vectors.
        classes: (N,) int; 0 no class, -1 not to be used.
        annotated: class numbers that this volume's labels carry; in it, class 0 is "none of these", and says nothing
            about classes that were never drawn.
        counts: (N,) float, how many cells of its volume each of these stands for; None where these are all of them.
    """

    vectors: Tensor
    classes: Tensor
    annotated: frozenset[int]
    counts: Tensor | None = None


def prototype_loss(
    volumes: Sequence[LabelledCells], settings: Mapping[str, Any] | None = None
) -> tuple[Tensor, dict[int, float]]:
    """For each class p: mean over its cells x of -log( exp(c_p.x / t) / sum over cells x' of exp(c_p.x' / t) ).

    The prototype c_p is the mean of the class's vectors over all volumes, with gradients. The sum runs over all
    labelled cells and, with `background`, over the cells without a class of those volumes in which p was annotated. As
    the n_p cells of a class share one softmax, the loss of a class cannot go below log(n_p). Cells drawn at random
    count in every sum as often as those they stand for, so that the loss estimates that of all cells.

    Args:
        volumes: cells of each volume, pooled.
        settings: `temperature`, `reduction` ("mean" or "sum" over the classes present), `background`, `normalise`
            (prototypes to unit length); the table [semantic].

    Returns:
        The loss (0 with gradient where no class is present), and per class its excess over log(n_p).

    Raises:
        InputError: unknown reduction.
    """
    settings = {**DEFAULTS, **(settings or {})}
    if settings["reduction"] not in ("mean", "sum"):
        raise InputError(f"semantic.reduction = {settings['reduction']!r}: unknown; use mean or sum")
    vectors = torch.cat([volume.vectors for volume in volumes])
    classes = torch.cat([volume.classes for volume in volumes])
    owner = torch.cat([torch.full_like(v.classes, k) for k, v in enumerate(volumes)])
    weights = torch.cat([torch.ones_like(v.vectors[:, 0]) if v.counts is None else v.counts for v in volumes])
    kept = classes != OUTSIDE if settings["background"] else classes > BACKGROUND
    vectors, classes, owner, weights = vectors[kept], classes[kept], owner[kept], weights[kept]
    present = [int(p) for p in torch.unique(classes) if p > BACKGROUND]
    if not present:
        return vectors.sum() * 0.0, {}
    members = torch.stack([classes == p for p in present])
    shares = members * weights
    counts = shares.sum(1)
    shares = shares / counts[:, None]
    prototypes = shares @ vectors
    if settings["normalise"]:
        prototypes = F.normalize(prototypes, dim=1)
    logits = prototypes @ vectors.T / settings["temperature"]
    drawn = torch.tensor([[p in v.annotated for v in volumes] for p in present], device=vectors.device)
    unknown = (classes == BACKGROUND)[None] & ~drawn[:, owner]
    log_total = (logits.masked_fill(unknown, float("-inf")) + weights.log()).logsumexp(1, keepdim=True)
    by_class = -((logits - log_total) * shares).sum(1)
    excess = by_class.detach() - counts.log()
    loss = by_class.mean() if settings["reduction"] == "mean" else by_class.sum()
    return loss, dict(zip(present, excess.tolist(), strict=True))
