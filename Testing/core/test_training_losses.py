"""The papers' losses by hand: hard and diverse negatives, the coarse cells, alike directions, pools of other pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from uae.training import losses
from uae.training.losses import PairFeatures, appearance_loss, coarse_cells_loss, hard_and_diverse

CELLS = {
    "temperature": 0.5, "coarse_positive_mm": 25.0, "coarse_dz_mm": 8.0, "coarse_exclusion_mm": 10.0,
    "coarse_hardest": 250, "coarse_diverse": 200, "coarse_global": 1000,
}  # fmt: skip


def unit(count: int, seed: int, channels: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, channels, generator=generator), dim=1)


def test_hard_negatives_are_the_hardest_and_excluded_ones_never_come_back():
    hardness = torch.arange(400.0)[None].repeat(3, 1)
    hardness[1] = hardness[1].flip(0)
    excluded = torch.zeros(3, 400, dtype=torch.bool)
    excluded[:, 100:390] = True
    generator = torch.Generator().manual_seed(1)
    kept = hard_and_diverse(hardness, excluded, 80, 50, generator)
    assert kept.shape == (3, 50) and all(len(set(row.tolist())) == 50 for row in kept)
    allowed = np.flatnonzero(~excluded[0].numpy())
    for row, order in ((0, allowed[::-1]), (1, allowed), (2, allowed[::-1])):
        assert set(kept[row].tolist()) <= set(order[:80].tolist())
    # fewer eligible than asked for: the rest is excluded ones, which the loss removes (they are never weighted down)
    few = hard_and_diverse(hardness, excluded | (hardness < 395), 80, 60, generator)
    positive = torch.full((3,), 0.5)
    similar = torch.full((3, 400), 0.9)
    near = (excluded | (hardness < 395)).gather(1, few)
    used = (~near).sum(1)
    loss = losses.info_nce(positive, similar.gather(1, few), near, 0.5)
    assert float(loss) == pytest.approx(float(torch.log(1 + used * math.exp(0.4 / 0.5)).mean()), rel=1e-5)


def test_coarse_loss_by_hand_with_the_same_dz_limit_in_both_directions():
    features = (unit(3, 1), unit(3, 2))
    # the third cells are 9 mm apart along z: partners neither way; the others within 7 mm
    places = (
        torch.tensor([[0.0, 0, 0], [0, 60, 0], [100, 0, 0]]),
        torch.tensor([[7.0, 3, 0], [0, 60, 4], [109, 0, 0]]),
    )
    valid = (torch.ones(3, dtype=torch.bool), torch.tensor([True, True, True]))
    elsewhere = unit(4, 3)
    found = coarse_cells_loss(features, places, valid, elsewhere, CELLS, torch.Generator())
    terms = []
    both, both_mm = torch.cat(features), torch.cat(places)
    for view in (0, 1):
        rows = []
        for k in (0, 1):
            query, place = features[view][k], places[view][k]
            partner = 3 * (1 - view) + k
            total = math.exp(float(query @ both[partner]) / 0.5)
            positive = total
            for j in range(6):
                if j != partner and float((place - both_mm[j]).norm()) >= 10.0:
                    total += math.exp(float(query @ both[j]) / 0.5)
            total += sum(math.exp(float(query @ e) / 0.5) for e in elsewhere)
            rows.append(-math.log(positive / total))
        terms.append(np.mean(rows))
    assert float(found) == pytest.approx(np.mean(terms), rel=1e-5)
    swapped = coarse_cells_loss(features[::-1], places[::-1], valid, elsewhere, CELLS, torch.Generator())
    assert float(swapped) == pytest.approx(float(found), rel=1e-6)


def test_coarse_cells_outside_the_scan_are_neither_queries_nor_partners_nor_negatives():
    features, places = (unit(2, 4), unit(2, 5)), (torch.tensor([[0.0, 0, 0], [0, 90, 0]]),) * 2
    nobody = unit(0, 6)
    all_valid = (torch.ones(2, dtype=torch.bool),) * 2
    one_less = (torch.ones(2, dtype=torch.bool), torch.tensor([True, False]))
    whole = coarse_cells_loss(features, places, all_valid, nobody, CELLS, torch.Generator())
    part = coarse_cells_loss(features, places, one_less, nobody, CELLS, torch.Generator())
    moved = (features[0], torch.stack([features[1][0], -features[1][1]]))
    same = coarse_cells_loss(moved, places, one_less, nobody, CELLS, torch.Generator())
    assert float(part) == pytest.approx(float(same)) and float(part) != pytest.approx(float(whole))
    none = (torch.zeros(2, dtype=torch.bool),) * 2
    assert coarse_cells_loss(features, places, none, nobody, CELLS, torch.Generator()) is None


def pair(seed: int, subject: int = 0, count: int = 5) -> PairFeatures:
    generator = torch.Generator().manual_seed(seed)
    parts = [dict(zip(losses.LEVELS, (unit(n, 10 * seed + k), unit(n, 10 * seed + k + 5))))
             for k, n in enumerate((count, count, 8))]  # fmt: skip
    places = torch.rand(count, 3, generator=generator) * 300
    return PairFeatures(*parts, places, places, torch.rand(8, 3, generator=generator) * 300, subject, seed=seed)


def swapped(p: PairFeatures) -> PairFeatures:
    """The same pair with its two views (first and second half of the queries) exchanged."""
    order = [3, 4, 0, 1, 2]
    turned = [{level: v[order] for level, v in part.items()} for part in (p.query, p.partner)]
    return PairFeatures(*turned, p.negative, p.query_mm[order], p.partner_mm[order], p.negative_mm, p.subject)


def test_loss_does_not_depend_on_which_view_comes_first():
    one_way, other_way = (float(appearance_loss([p])[0]) for p in (pair(1), swapped(pair(1))))
    assert other_way == pytest.approx(one_way, rel=1e-6)


def test_cells_of_other_pairs_are_negatives_unless_switched_off_or_too_near():
    first, second = pair(1), pair(2, subject=1)
    alone = float(appearance_loss([first])[0] + appearance_loss([second])[0]) / 2
    off = float(appearance_loss([first, second], {"other_pairs": False})[0])
    together = float(appearance_loss([first, second])[0])
    assert off == pytest.approx(alone, rel=1e-6) and together > alone + 0.01
    second.subject = 0  # the same subject, and all of the second pair's cells near every query of the first
    second.negative_mm = first.query_mm[:1].repeat(8, 1)
    first.query_mm = first.partner_mm = first.query_mm[:1].repeat(5, 1)
    pool = losses.GlobalPool.of([first, second])
    both = losses._similarities(first, pool, 0, losses.DEFAULT_LOSS)
    assert both[2].shape == (5, 18 + 8) and bool(both[2][:, 18:].all())
