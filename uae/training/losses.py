"""InfoNCE between corresponding positions of two views, at the fine level, the coarse level and both joined."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class PairFeatures:
    """Unit features of one pair; Q queries, N negatives.

    Attributes:
        query: {"fine", "coarse"} -> (Q, C) at the queries of both views.
        partner: {"fine", "coarse"} -> (Q, C) at their partners in the other view.
        negative: {"fine", "coarse"} -> (N, C) at random cells of both views.
        subject: which subject; places of one subject compare across pairs.
        query_mm, partner_mm, negative_mm: (.., 3) float32 places in the subject (fp16 maps lose up to 1 mm).
    """

    query: dict[str, Tensor]
    partner: dict[str, Tensor]
    negative: dict[str, Tensor]
    query_mm: Tensor
    partner_mm: Tensor
    negative_mm: Tensor
    subject: int = 0


def info_nce(positive: Tensor, negative: Tensor, excluded: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy of the positive among itself and its negatives (equation 1 of the papers).

    Args:
        positive: (Q,) similarities.
        negative: (Q, N) similarities.
        excluded: bool (Q, N); these are removed (minus infinity), not weighted down.
        temperature: divisor of all similarities.
    """
    negative = negative.masked_fill(excluded, float("-inf"))
    logits = torch.cat([positive[:, None], negative], dim=1) / temperature
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


def appearance_loss(
    pairs: list[PairFeatures],
    temperature: float = 0.1,
    fine_exclusion_mm: float = 8.0,
    coarse_exclusion_mm: float = 24.0,
    weights: tuple[float, float, float] = (1.0, 0.5, 0.5),
) -> tuple[Tensor, dict[str, float]]:
    """Joint, fine and coarse InfoNCE over all pairs of a step.

    Negatives of a query: random cells and the other partners of its own pair, farther than the exclusion radius, and
    the random cells of the other pairs; of the same subject only those farther than the radius.

    Args:
        pairs: features of each pair.
        temperature: 0.1 beat the papers' 0.5 in our pilots.
        fine_exclusion_mm: radius without negatives for the fine and the joint term.
        coarse_exclusion_mm: the same for the coarse term.
        weights: of the joint, fine and coarse term.

    Returns:
        Loss, and its parts with the share of queries whose joint positive beats all negatives.
    """
    device = pairs[0].query_mm.device
    totals = torch.zeros(3, device=device)
    hits = 0.0
    for index, pair in enumerate(pairs):
        others = [p for j, p in enumerate(pairs) if j != index]
        own_mm = torch.cat([pair.negative_mm, pair.partner_mm, pair.query_mm])
        distance = torch.cdist(pair.query_mm, own_mm, compute_mode="donot_use_mm_for_euclid_dist")
        near_fine, near_coarse = distance < fine_exclusion_mm, distance < coarse_exclusion_mm
        positive, negative = {}, {}
        for level in ("fine", "coarse"):
            pool = [pair.negative[level], pair.partner[level], pair.query[level]]
            pool += [other.negative[level] for other in others]
            positive[level] = (pair.query[level] * pair.partner[level]).sum(-1)
            negative[level] = pair.query[level] @ torch.cat(pool).T
        for other in others:
            apart = torch.cdist(pair.query_mm, other.negative_mm, compute_mode="donot_use_mm_for_euclid_dist")
            if other.subject != pair.subject:
                apart = torch.full_like(apart, float("inf"))
            near_fine = torch.cat([near_fine, apart < fine_exclusion_mm], 1)
            near_coarse = torch.cat([near_coarse, apart < coarse_exclusion_mm], 1)
        joint_positive = (positive["fine"] + positive["coarse"]) / 2
        joint_negative = (negative["fine"] + negative["coarse"]) / 2
        totals = totals + torch.stack(
            [
                info_nce(joint_positive, joint_negative, near_fine, temperature),
                info_nce(positive["fine"], negative["fine"], near_fine, temperature),
                info_nce(positive["coarse"], negative["coarse"], near_coarse, temperature),
            ]
        )
        best = joint_negative.detach().masked_fill(near_fine, -2.0).amax(1)
        hits += float((joint_positive.detach() > best).float().mean())
    totals = totals / len(pairs)
    loss = (totals * torch.tensor(weights, device=device)).sum()
    joint, fine, coarse = totals.detach().tolist()
    return loss, {"joint": joint, "fine": fine, "coarse": coarse, "hits": hits / len(pairs)}
