"""Least-squares and robust linear fits against transforms known by construction."""

import numpy as np
import pytest

from uae.errors import InputError, NoConfidentResultError
from uae.registration.rigid import arun, fit_affine, ransac, spread_mm, trimmed_rigid
from uae.transform import Rigid


def known(angle=(8.0, -5.0, 20.0), shift=(60.0, -35.0, 140.0)):
    return Rigid.from_euler_deg(*angle, translation=shift, center=(10.0, -200.0, 900.0))


def cloud(count, seed=0, size=150.0, center=(10.0, -200.0, 900.0)):
    return np.random.default_rng(seed).uniform(-size, size, (count, 3)) + np.array(center)


def test_rigid_arun_is_exact_for_exact_matches():
    points = cloud(50)
    found = arun(points, known().apply(points))
    np.testing.assert_allclose(found.matrix, known().matrix, atol=1e-9)


def test_rigid_arun_weights_silence_a_wrong_match():
    points = cloud(20)
    target = known().apply(points)
    target[3] += 80.0
    weights = np.ones(20)
    weights[3] = 0.0
    np.testing.assert_allclose(arun(points, target, weights).matrix, known().matrix, atol=1e-9)
    assert np.abs(arun(points, target).apply(points) - known().apply(points)).max() > 1.0


def test_rigid_arun_never_returns_a_reflection():
    points = cloud(30)
    mirrored = points * np.array([-1.0, 1.0, 1.0])
    assert np.linalg.det(arun(points, mirrored).rotation) == pytest.approx(1.0)
    flat = points * np.array([1.0, 1.0, 0.0])  # in a plane the mirrored and the proper optimum are equally good
    found = arun(flat, known().apply(flat))
    np.testing.assert_allclose(found.matrix, known().matrix, atol=1e-8)


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_rigid_ransac_survives_outliers(share):
    rng = np.random.default_rng(1)
    points = cloud(200)
    target = known().apply(points) + rng.normal(0.0, 2.0, points.shape)
    wrong = rng.permutation(200)[: int(200 * share)]
    target[wrong] = cloud(len(wrong), seed=2, center=known().apply(points).mean(axis=0))
    result = ransac(points, target, seed=3)
    found, inliers = result.transform, result.inliers
    assert np.linalg.norm(found.apply(points) - known().apply(points), axis=1).max() < 2.0
    right = np.ones(200, dtype=bool)
    right[wrong] = False
    assert (inliers & right).sum() >= 0.95 * right.sum()
    assert (inliers & ~right).sum() <= 0.05 * len(wrong)


def test_rigid_ransac_is_reproducible():
    points = cloud(60)
    target = known().apply(points) + np.random.default_rng(4).normal(0.0, 3.0, points.shape)
    first, second = (ransac(points, target, seed=5).transform.matrix for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_rigid_ransac_names_the_second_best_place():
    """A column of equal vertebrae: half of the matches sit one level (30 mm) too low."""
    points = cloud(100)
    target = points.copy()
    target[:40, 2] -= 30.0
    result = ransac(points, target)
    assert result.inliers.sum() == 60
    assert result.runner_up == 40


def test_refuse_rotation_beyond_the_limit_for_rigid():
    points = cloud(80)
    turned = Rigid.from_euler_deg(0.0, 0.0, 90.0, center=points.mean(axis=0))
    try:
        found = ransac(points, turned.apply(points)).transform
    except NoConfidentResultError:
        return
    assert np.linalg.norm(found.apply(points) - turned.apply(points), axis=1).mean() > 50.0


@pytest.mark.parametrize(
    "points",
    [np.zeros((0, 3)), np.zeros((2, 3)), np.ones((10, 3)), np.arange(10.0)[:, None] * np.array([1.0, 2.0, 3.0])],
    ids=["none", "two", "coincident", "line"],
)
def test_refuse_degenerate_matches_for_rigid(points):
    with pytest.raises(NoConfidentResultError):
        arun(points, points)
    with pytest.raises(NoConfidentResultError):
        ransac(points, points)


def test_refuse_matches_that_never_agree_on_a_rigid():
    points = cloud(12)
    with pytest.raises(NoConfidentResultError):
        ransac(points, points * 5.0)


def test_rigid_bad_input_is_named():
    points = cloud(5)
    with pytest.raises(InputError, match="one length"):
        arun(points, points[:4])
    with pytest.raises(InputError, match="NaN"):
        arun(points, points * np.nan)
    with pytest.raises(InputError, match="weights"):
        arun(points, points, np.zeros(5))


def test_rigid_trimmed_fit_ignores_matches_beyond_the_tolerance():
    points = cloud(60)
    target = known().apply(points)
    target[:20] += 40.0
    found = trimmed_rigid(points, target, known(angle=(8.5, -5.0, 20.0)), tolerance_mm=10.0)
    np.testing.assert_allclose(found.matrix, known().matrix, atol=1e-6)


def test_rigid_affine_is_robust_and_exact():
    matrix = known().matrix.copy()
    matrix[:3, :3] = matrix[:3, :3] @ np.diag([1.05, 0.93, 1.1])
    points = cloud(100)
    target = points @ matrix[:3, :3].T + matrix[:3, 3]
    np.testing.assert_allclose(fit_affine(points, target, huber_mm=None).matrix, matrix, atol=1e-8)
    target[:10] += 60.0
    robust, plain = (fit_affine(points, target, huber_mm=h).apply(points)[10:] - target[10:] for h in (4.0, None))
    assert np.linalg.norm(robust, axis=1).max() < 1.5 < np.linalg.norm(plain, axis=1).max()


def test_refuse_affine_from_a_plane_but_not_rigid():
    flat = cloud(30) * np.array([1.0, 1.0, 0.0])
    with pytest.raises(NoConfidentResultError, match="plane"):
        fit_affine(flat, flat)


def test_rigid_spread_is_the_principal_deviation():
    points = np.array([[-3.0, 0, 0], [3.0, 0, 0], [0, -2.0, 0], [0, 2.0, 0], [0, 0, -1.0], [0, 0, 1.0]])
    np.testing.assert_allclose(spread_mm(points), np.sqrt([18 / 5, 8 / 5, 2 / 5]))
