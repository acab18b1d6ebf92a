"""Local maps of fixed points: exact where the truth is known, degenerate sets, outliers; and the confidence rule."""

import numpy as np
import pytest

from uae.errors import InputError
from uae.matching import FixedPointOptions, judge, limits_for
from uae.matching.fit import local_map, rank
from uae.matching.fixed_point import place

RNG = np.random.default_rng(0)
LINEAR = np.array([[1.1, 0.2, 0.0], [-0.1, 0.9, 0.05], [0.0, 0.1, 1.05]])
ANGLE = np.deg2rad(20)
TURN = np.array([[np.cos(ANGLE), -np.sin(ANGLE), 0], [np.sin(ANGLE), np.cos(ANGLE), 0], [0, 0, 1.0]])
SHIFT = np.array([30.0, -12.0, 200.0])
EDGE = np.arange(-8.0, 9.0, 4.0)
PLACE = np.array([500.0, 10.0, -900.0])
CUBE = np.stack(np.meshgrid(EDGE, EDGE, EDGE, indexing="ij"), axis=-1).reshape(-1, 3) + PLACE


@pytest.mark.parametrize(
    "points, expected",
    [
        (CUBE[:1], 0),
        (np.repeat(CUBE[:1], 5, axis=0), 0),
        (CUBE[:5], 1),
        (CUBE[:25], 2),
        (CUBE[:50], 3),
        (CUBE[[0, 4, 20, 100]], 3),
        (np.vstack([CUBE[:25], CUBE[:25] + np.array([0.2, 0, 0])]), 2),
    ],
)
def test_matching_rank_by_condition_number(points, expected):
    assert rank(points) == expected


def test_matching_affine_is_exact_and_survives_outliers():
    target = CUBE @ LINEAR.T + SHIFT
    at = CUBE[62] + [1.0, 2.0, -1.5]
    truth = at @ LINEAR.T + SHIFT
    fitted = local_map(CUBE, target, at)
    assert fitted.kind == "affine" and fitted.residual_mm < 1e-6
    np.testing.assert_allclose(fitted.apply(at[None])[0], truth, atol=1e-6)
    bad = RNG.choice(len(CUBE), 25, replace=False)
    target[bad] += [60.0, 40.0, 0.0]
    robust = local_map(CUBE, target, at).apply(at[None])[0]
    plain = np.linalg.lstsq(np.c_[CUBE - at, np.ones(125)], target, rcond=None)[0][3]
    assert np.linalg.norm(robust - truth) < 1.5 < 5 < np.linalg.norm(plain - truth)


def test_matching_coplanar_points_give_the_rigid_map():
    flat = CUBE[:25]
    at = flat[12] + [6.0, 1.0, 1.0]
    fitted = local_map(flat, flat @ TURN.T + SHIFT, at)
    assert fitted.kind == "rigid"
    np.testing.assert_allclose(fitted.apply(at[None])[0], TURN @ at + SHIFT, atol=1e-6)
    assert np.linalg.det(fitted.linear) == pytest.approx(1.0)


def test_matching_flat_images_give_the_rigid_map():
    target = CUBE * [1.0, 1.0, 0.0] + [0.0, 0.0, 55.0]
    assert local_map(CUBE, target, CUBE[62]).kind == "rigid"


def test_matching_few_points():
    at = CUBE[62]
    corner = CUBE[[0, 4, 20]]
    fitted = local_map(corner, corner @ TURN.T + SHIFT, at)
    assert fitted.kind == "rigid"
    np.testing.assert_allclose(fitted.apply(at[None])[0], TURN @ at + SHIFT, atol=1e-6)
    line = CUBE[:3]
    fitted = local_map(line, line + SHIFT, at)
    assert fitted.kind == "translation"
    np.testing.assert_allclose(fitted.apply(at[None])[0], at + SHIFT, atol=1e-9)
    for count in range(3):
        assert place(CUBE[:count], CUBE[:count], at, FixedPointOptions()) is None
        with pytest.raises(ValueError, match="3 pairs"):
            local_map(CUBE[:count], CUBE[:count], at)


def test_matching_affine_does_not_extrapolate():
    corner = CUBE[[0, 1, 5, 25, 26]]
    noisy = corner + RNG.normal(0, 2.0, corner.shape)
    assert local_map(corner, noisy, corner.mean(0)).kind == "affine"
    assert local_map(corner, noisy, corner.mean(0) + 60.0).kind == "rigid"


def test_matching_released_mode_returns_the_mean_of_votes():
    target = CUBE @ LINEAR.T + SHIFT
    target[:10] += 50.0
    options = FixedPointOptions.authors_code()
    point, fitted = place(CUBE, target, CUBE[62], options)
    votes = target - (CUBE - CUBE[62]) @ fitted.linear.T
    np.testing.assert_allclose(point, votes.mean(0))
    assert np.linalg.norm(point - (CUBE[62] @ LINEAR.T + SHIFT)) > 5.0


@pytest.mark.parametrize("settings", [{"side": 4}, {"side": 0}, {"max_round_trips": 0}, {"tau_dis_mm": 0.0}])
def test_matching_options_are_checked(settings):
    with pytest.raises(InputError):
        FixedPointOptions(**settings)


GOOD = {"score": 0.9, "margin": 0.1, "cycle_mm": 3.0, "fixed_points": 60, "residual_mm": 2.0}
LIMITS = {"score": 0.7, "margin": 0.02, "cycle_mm": 8.0, "fixed_points": 20, "residual_mm": 6.0}


def test_matching_confidence_needs_every_limit():
    assert judge(GOOD, LIMITS) == (True, "")
    for key, worse in {"score": 0.69, "margin": 0.01, "cycle_mm": 9.0, "fixed_points": 19, "residual_mm": 7.0}.items():
        confident, reason = judge({**GOOD, key: worse}, LIMITS)
        assert not confident and reason
        assert judge({**GOOD, key: worse}, {k: v for k, v in LIMITS.items() if k != key})[0]
        assert not judge({**GOOD, key: None}, LIMITS)[0]
        assert not judge({**GOOD, key: float("nan")}, LIMITS)[0]


@pytest.mark.parametrize("limits", [{}, {"pair_score": 0.5}, {"score": None}])
def test_matching_without_calibration_is_never_confident(limits):
    assert judge(GOOD, limits) == (False, "model is not calibrated")


def test_matching_limits_of_one_method():
    limits = {**LIMITS, "guided": {"margin": -0.2}}
    assert limits_for(limits, "guided") == {**LIMITS, "margin": -0.2}
    assert limits_for(limits, "fixed-point") == LIMITS
    assert limits_for(None, "guided") == {}
