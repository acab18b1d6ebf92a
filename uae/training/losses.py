"""InfoNCE between corresponding positions of two views, at the fine level, the coarse level and both joined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = ("fine", "coarse")
REMOVED = float("-inf")


@dataclass
class PairFeatures:
    """Unit features of one pair; Q queries, N negatives.

    Attributes:
        query: {"fine", "coarse"} -> (Q, C) at the queries of both views.
        partner: {"fine", "coarse"} -> (Q, C) at their partners in the other view.
        negative: {"fine", "coarse"} -> (N, C) at random cells of both views.
        query_mm, partner_mm, negative_mm: (.., 3) float32 places in the subject (fp16 maps lose up to 1 mm).
        subject: which subject; places of one subject compare across pairs.
        beyond: {"fine", "coarse"} -> (F, C) of the fixed scan outside the dilated overlap: negatives of every query.
        beyond_mm: (F, 3) float32 their places in the subject.
        seed: of the random choice among hard negatives.
    """

    query: dict[str, Tensor]
    partner: dict[str, Tensor]
    negative: dict[str, Tensor]
    query_mm: Tensor
    partner_mm: Tensor
    negative_mm: Tensor
    subject: int = 0
    beyond: dict[str, Tensor] | None = None
    beyond_mm: Tensor | None = None
    seed: int = 0


@dataclass
class GlobalPool:
    """Random cells of all pairs of the global batch: P pairs, N cells each, those of this process among them.

    Attributes:
        features: {"fine", "coarse"} -> (P, N, C).
        places: (P, N, 3) mm.
        subjects: (P,) subject numbers.
        first: number of this process's first pair.
    """

    features: dict[str, Tensor]
    places: Tensor
    subjects: Tensor
    first: int = 0

    @classmethod
    def of(cls, pairs: list[PairFeatures]) -> GlobalPool:
        """The pool of one process alone."""
        return cls(
            {level: torch.stack([pair.negative[level] for pair in pairs]) for level in LEVELS},
            torch.stack([pair.negative_mm for pair in pairs]),
            torch.tensor([pair.subject for pair in pairs], device=pairs[0].query_mm.device),
        )

    def others(self, index: int) -> Tensor:
        """Numbers of the pairs other than this process's pair `index`."""
        own = self.first + index
        return torch.tensor([i for i in range(len(self.places)) if i != own], device=self.places.device)


def info_nce(positive: Tensor, negative: Tensor, excluded: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy of the positive among itself and its negatives (equation 1 of the papers).

    Args:
        positive: (Q,) similarities.
        negative: (Q, N) similarities.
        excluded: bool (Q, N); these are removed (minus infinity), not weighted down.
        temperature: divisor of all similarities.
    """
    negative = negative.masked_fill(excluded, REMOVED)
    logits = torch.cat([positive[:, None], negative], dim=1) / temperature
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


def hard_and_diverse(
    hardness: Tensor, excluded: Tensor, hardest: int, count: int, generator: torch.Generator
) -> Tensor:
    """Random `count` of the `hardest` negatives of each query; excluded ones come last and stay excluded.

    Args:
        hardness: (Q, N) similarities that rank the negatives.
        excluded: bool (Q, N).
        hardest: how many of the most similar are eligible (papers' code: 2000 fine, 250 coarse).
        count: how many of those are used (papers' code: 500 fine, 200 coarse).
        generator: of the random choice, on the CPU.

    Returns:
        (Q, min(count, N)) int column numbers.
    """
    ranked = hardness.detach().masked_fill(excluded, REMOVED).topk(min(hardest, hardness.shape[1]), dim=1).indices
    chosen = torch.rand(ranked.shape, generator=generator).topk(min(count, ranked.shape[1]), dim=1).indices
    return ranked.gather(1, chosen.to(ranked.device))


def distances(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) distances of places in mm, without the rounding of the product form."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _similarities(
    pair: PairFeatures, pool: GlobalPool, index: int, settings: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
    """Similarities of the queries to partners (Q,) and negatives (Q, N), and which negatives are too near (Q, N)."""
    own_mm = torch.cat([pair.negative_mm, pair.partner_mm, pair.query_mm])
    apart = [distances(pair.query_mm, own_mm)]
    others = pool.others(index) if settings["other_pairs"] else torch.zeros(0, dtype=torch.long)
    if len(others):
        far = distances(pair.query_mm, pool.places[others].reshape(-1, 3))
        same = (pool.subjects[others] == pair.subject).repeat_interleave(pool.places.shape[1])
        apart.append(far.masked_fill(~same, float("inf")))
    positive, negative = {}, {}
    for level in LEVELS:
        parts = [pair.negative[level], pair.partner[level], pair.query[level]]
        if len(others):
            parts.append(pool.features[level][others].flatten(0, 1))
        positive[level] = (pair.query[level] * pair.partner[level]).sum(-1)
        negative[level] = pair.query[level] @ torch.cat(parts).T
    distance = torch.cat(apart, 1)
    return (
        positive,
        negative,
        distance < settings["fine_exclusion_mm"],
        distance < settings["coarse_exclusion_mm"],
    )


def _append_beyond(
    pair: PairFeatures, settings: Mapping[str, Any], negative: dict[str, Tensor], near: dict[str, Tensor]
) -> None:
    """Add the cells outside the overlap to the chosen negatives: N_neg + N_fov (equation 8 of the paper)."""
    extra = {level: pair.query[level] @ pair.beyond[level].T for level in LEVELS}
    extra["joint"] = (extra["fine"] + extra["coarse"]) / 2
    apart = distances(pair.query_mm, pair.beyond_mm)
    for name in negative:
        radius = settings["coarse_exclusion_mm" if name == "coarse" else "fine_exclusion_mm"]
        negative[name] = torch.cat([negative[name], extra[name]], 1)
        near[name] = torch.cat([near[name], apart < radius], 1)


DEFAULT_LOSS = {
    "temperature": 0.1, "fine_exclusion_mm": 8.0, "coarse_exclusion_mm": 24.0, "weights": (1.0, 0.5, 0.5),
    "other_pairs": True, "hardest": 0, "diverse": 500,
}  # fmt: skip
"""Our recipe (`configs/small.toml`), for callers that give nothing else."""


def appearance_loss(
    pairs: list[PairFeatures], settings: Mapping[str, Any] | None = None, pool: GlobalPool | None = None
) -> tuple[Tensor, dict[str, float]]:
    """Joint, fine and coarse InfoNCE, averaged over the pairs of this process.

    Negatives of a query: random cells and the other partners of its own pair, farther than the exclusion radius, the
    random cells of the other pairs (of the same subject only those farther than the radius). Queries come from both
    views and share one pool, so the two directions are treated alike. With `hardest` above 0 each query keeps a random
    `diverse` of its `hardest` negatives. For registered pairs the cells outside the dilated overlap come on top.

    Args:
        pairs: features of each pair.
        settings: the table [loss].
        pool: random cells of the global batch; that of `pairs` where None.

    Returns:
        Loss, and its parts with the share of queries whose joint positive beats all negatives.
    """
    settings = {**DEFAULT_LOSS, **(settings or {})}
    pool = GlobalPool.of(pairs) if pool is None else pool
    device = pairs[0].query_mm.device
    totals = torch.zeros(3, device=device)
    hits = torch.zeros((), device=device)
    for index, pair in enumerate(pairs):
        positive, negative, near_fine, near_coarse = _similarities(pair, pool, index, settings)
        positive["joint"] = (positive["fine"] + positive["coarse"]) / 2
        negative["joint"] = (negative["fine"] + negative["coarse"]) / 2
        near = {"joint": near_fine, "fine": near_fine, "coarse": near_coarse}
        best = negative["joint"].detach().masked_fill(near_fine, -2.0).amax(1)
        hits += (positive["joint"].detach() > best).float().mean()
        if settings["hardest"]:
            generator = torch.Generator().manual_seed(pair.seed)
            kept = hard_and_diverse(
                negative["joint"], near_fine, settings["hardest"], settings["diverse"], generator
            )
            negative = {level: value.gather(1, kept) for level, value in negative.items()}
            near = {level: value.gather(1, kept) for level, value in near.items()}
        if pair.beyond is not None:
            _append_beyond(pair, settings, negative, near)
        parts = [info_nce(positive[n], negative[n], near[n], settings["temperature"]) for n in near]
        totals = totals + torch.stack(parts)
    totals = totals / len(pairs)
    loss = (totals * totals.new_tensor(settings["weights"])).sum()
    joint, fine, coarse = totals.detach().tolist()
    return loss, {"joint": joint, "fine": fine, "coarse": coarse, "hits": float(hits) / len(pairs)}


def coarse_cells_loss(
    features: tuple[Tensor, Tensor],
    places: tuple[Tensor, Tensor],
    valid: tuple[Tensor, Tensor],
    elsewhere: Tensor,
    settings: Mapping[str, Any],
    generator: torch.Generator,
) -> Tensor | None:
    """The coarse loss of the papers: every coarse cell that has a partner cell in the other view is a query.

    The partner is the nearest cell within `coarse_positive_mm` in space and `coarse_dz_mm` along z, in both directions
    alike. Negatives: a random `coarse_diverse` of the `coarse_hardest` cells of both views farther than
    `coarse_exclusion_mm`, and `coarse_global` random cells of other pairs.

    Args:
        features: per view (N, C) unit vectors of its coarse cells.
        places: per view (N, 3) mm, z first.
        valid: per view bool (N,), inside the scan.
        elsewhere: (M, C) unit vectors of other pairs' cells, M may be 0.
        settings: the table [loss].
        generator: of the random choices, on the CPU.

    Returns:
        The loss over both directions, None where no cell has a partner.
    """
    both, both_mm = torch.cat(features), torch.cat(places)
    unusable = ~torch.cat(valid)
    count = settings["coarse_global"]
    if len(elsewhere) > count:
        elsewhere = elsewhere[torch.randperm(len(elsewhere), generator=generator)[:count].to(elsewhere.device)]
    losses = []
    for view in (0, 1):
        query, query_mm = features[view], places[view]
        offset = query_mm[:, None] - places[1 - view][None]
        apart = offset.norm(dim=-1).masked_fill(~valid[1 - view][None] | ~valid[view][:, None], float("inf"))
        apart = apart.masked_fill(offset[..., 0].abs() >= settings["coarse_dz_mm"], float("inf"))
        nearest, partner = apart.min(dim=1)
        rows = (nearest < settings["coarse_positive_mm"]).nonzero()[:, 0]
        if not len(rows):
            continue
        positive = (query[rows] * features[1 - view][partner[rows]]).sum(-1)
        similarity = query[rows] @ both.T
        near = (distances(query_mm[rows], both_mm) < settings["coarse_exclusion_mm"]) | unusable[None]
        near[torch.arange(len(rows)), (1 - view) * len(features[0]) + partner[rows]] = True
        kept = hard_and_diverse(similarity, near, settings["coarse_hardest"], settings["coarse_diverse"], generator)
        negative = torch.cat([similarity.gather(1, kept), query[rows] @ elsewhere.T], 1)
        excluded = torch.cat([near.gather(1, kept), near.new_zeros(len(rows), len(elsewhere))], 1)
        losses.append(info_nce(positive, negative, excluded, settings["temperature"]))
    return torch.stack(losses).mean() if losses else None
