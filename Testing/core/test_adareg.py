"""AdaReg on made-up embeddings: a smooth random feature function of the anatomy, so that the truth is known exactly."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage
from scipy.stats import binom

from uae.embedding import Embedding
from uae.errors import CancelledError, InputError, NoConfidentResultError
from uae.geometry import Geometry
from uae.registration import adareg, evidence
from uae.registration.adareg import ACCEPTED, REFUSED, REVIEW, body_points, estimate, spread_sample, verdict_of
from uae.transform import Rigid
from uae.volume import Volume

CHANNELS = 16


class Anatomy:
    """Unit feature vectors as a smooth function of the place in a body of 160 x 120 x 200 mm around the origin."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.grid = Geometry((44, 32, 38), (7.0, 7.0, 7.0), (-130.0, -110.0, -150.0), np.eye(3))
        noise = rng.normal(size=(2 * CHANNELS, *self.grid.shape))
        self.noise = np.stack([ndimage.gaussian_filter(n, 1.5) for n in noise])

    def features(self, points, part, spread):
        rows = self.noise[:CHANNELS] if part == "fine" else self.noise[CHANNELS:]
        index = self.grid.mm_to_index(points)[:, ::-1].T
        values = np.stack([ndimage.map_coordinates(row, index, order=1, mode="nearest") for row in rows])
        values += np.random.default_rng(len(points)).normal(0.0, spread, values.shape) * self.noise.std()
        return values / np.linalg.norm(values, axis=0)

    @staticmethod
    def inside(points):
        return np.square(points / (80.0, 60.0, 100.0)).sum(axis=1) < 1.0


def embedding(anatomy, pose, low, high, noise=0.1, modality="ct"):
    """Embedding of a scan of the anatomy's box low..high mm, stored in the scanner space into which `pose` carries the
    anatomy."""
    corners = pose.apply(
        np.array([[x, y, z] for x in (low[0], high[0]) for y in (low[1], high[1]) for z in (low[2], high[2])], float)
    )
    shape = np.ceil(np.ptp(corners, axis=0)[::-1] / 32.0).astype(int) * 16
    geometry = Geometry(tuple(shape), (2.0, 2.0, 2.0), corners.min(axis=0) + 1.0, np.eye(3))
    fields = {}
    for part, stride in (("fine", 2), ("coarse", 16)):
        size = tuple(n // stride for n in shape)
        grid = Geometry(size, (2.0 * stride,) * 3, geometry.origin + (stride - 1), np.eye(3))
        places = pose.inverse().apply(grid.grid_points_mm())
        fields[part] = anatomy.features(places, part, noise).reshape(CHANNELS, *size).astype(np.float16)
        if part == "fine":
            valid = np.logical_and(places >= low, places <= high).all(axis=1)
            body = valid & anatomy.inside(places)
    size = tuple(n // 2 for n in shape)
    return Embedding(
        fine=fields["fine"], coarse=fields["coarse"], semantic=None, geometry=geometry, valid=valid.reshape(size),
        body=body.reshape(size), model_sha256="0", modality=modality,
    )  # fmt: skip


WHOLE = ((-85, -65, -105), (85, 65, 105))
PART = ((-60, -55, -25), (65, 40, 50))
BEYOND = ((-60, -55, 25), (65, 40, 125))  # half of this scan lies outside the large one's body


@pytest.fixture(scope="module")
def scans():
    one, other = Anatomy(1), Anatomy(2)
    pose = Rigid.from_euler_deg(6.0, -9.0, 14.0, translation=(120.0, -60.0, 310.0))
    return {
        "whole": embedding(one, Rigid.identity(), *WHOLE),
        "part": embedding(one, pose, *PART, noise=0.6, modality="mr"),
        "beyond": embedding(one, pose, *BEYOND, noise=0.6, modality="mr"),
        "other": embedding(other, pose, *PART, noise=0.6, modality="mr"),
        "pose": pose,
    }


def error(found, truth, points):
    return np.linalg.norm(found.apply(points) - truth.apply(points), axis=1).max()


@pytest.mark.parametrize("small", ["part", "beyond"])
def test_rigid_is_found_in_both_directions(scans, small):
    points = body_points(scans[small])
    forward = estimate(scans["whole"], scans[small], n_points=300)
    assert forward.verdict == ACCEPTED, forward.reason
    assert error(forward.transform, scans["pose"], scans["pose"].inverse().apply(points)) < 3.0
    backward = estimate(scans[small], scans["whole"], n_points=300)
    assert error(backward.transform, scans["pose"].inverse(), points) < 3.0
    assert isinstance(forward.transform, Rigid) and isinstance(backward.transform, Rigid)


def test_rigid_points_belong_to_their_scans_in_both_directions(scans):
    for fixed, moving in (("whole", "part"), ("part", "whole")):
        found = estimate(scans[fixed], scans[moving], n_points=200)
        assert len(found.fixed_points) == len(found.moving_points) == found.mutual == len(found.scores)
        residual = np.linalg.norm(found.transform.apply(found.fixed_points) - found.moving_points, axis=1)
        assert residual[found.inlier_mask].max() <= evidence.TOLERANCE_MM + 1e-6
        assert not (found.inlier_mask & found.heldout_mask).any()
        assert 0.1 <= found.heldout / found.mutual <= 0.35
        held = residual[found.heldout_mask]
        assert found.heldout_within_10mm == pytest.approx((held <= 10.0).mean())
        assert found.heldout_residual_median_mm == pytest.approx(np.median(held), abs=1e-6)


@pytest.mark.parametrize("order", [("whole", "other"), ("other", "whole")])
def test_refuse_unrelated_scans_in_both_orders(scans, order):
    found = estimate(scans[order[0]], scans[order[1]], n_points=300)
    assert found.verdict == REFUSED
    assert "Check that both show a common region" in found.reason


def test_refuse_two_parts_without_common_anatomy(scans):
    one = Anatomy(1)
    upper = embedding(one, Rigid.identity(), (-85, -65, 35), (85, 65, 105))
    lower = embedding(one, scans["pose"], (-85, -65, -105), (85, 65, -15), noise=0.3)
    for pair in ((upper, lower), (lower, upper)):
        assert estimate(*pair, n_points=300).verdict == REFUSED


def test_rigid_affine_follows_a_stretched_body(scans):
    stretched = Anatomy(1)
    scale = np.array([1.08, 0.94, 1.05])
    stretched.grid = Geometry(
        stretched.grid.shape, stretched.grid.spacing * scale, stretched.grid.origin * scale, np.eye(3)
    )
    moving = embedding(stretched, Rigid.identity(), *PART, noise=0.2)
    found = estimate(scans["whole"], moving, n_points=300, affine=True)
    assert not isinstance(found.transform, Rigid)
    points = body_points(moving) / scale
    assert np.linalg.norm(found.transform.apply(points) - points * scale, axis=1).mean() < 2.0


def test_rigid_holds_out_whole_cubes_and_always_the_same():
    points = np.random.default_rng(0).uniform(-150, 150, (20000, 3))
    held = evidence.held_out(points)
    assert held.mean() == pytest.approx(0.2, abs=0.02)
    np.testing.assert_array_equal(evidence.held_out(points[::7]), held[::7])
    neighbours = np.clip(points + 0.01, -150, 150)
    same_cube = (np.floor(points / 16) == np.floor(neighbours / 16)).all(axis=1)
    np.testing.assert_array_equal(evidence.held_out(neighbours)[same_cube], held[same_cube])
    assert (evidence.held_out(points, seed=1) != held).any()


@pytest.mark.parametrize(
    ("hits", "count", "chance"), [(0, 9, 0.1), (1, 9, 0.1), (9, 9, 0.3), (40, 90, 0.02), (80, 90, 1e-5)]
)
def test_rigid_heldout_probability_is_the_binomial_one(hits, count, chance):
    expected = max(binom.logsf(hits - 1, count, chance) / np.log(10.0), -300.0)
    assert evidence._log10_at_least(hits, count, chance) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_rigid_second_pass_starts_from_the_first_and_searches_the_same_scan(scans):
    first = estimate(scans["part"], scans["whole"], n_points=300)
    assert first.searched == "fixed"
    wrong = Rigid.from_euler_deg(0, 0, 90, translation=(40.0, 0.0, 0.0))
    second = estimate(scans["part"], scans["whole"], n_points=300, first=first)
    misled = estimate(scans["part"], scans["whole"], n_points=300, first=replace(first, rigid=wrong))
    points = body_points(scans["part"])
    for found in (second, misled):
        assert error(found.transform, scans["pose"].inverse(), points) < 3.0
    swapped = estimate(scans["part"], scans["whole"], n_points=300, first=replace(first, searched="moving"))
    assert swapped.searched == "moving"


def test_rigid_masks_restrict_matches(scans):
    grid = scans["whole"].fine_geometry
    points = grid.grid_points_mm()
    mask = Volume((points[:, 2] < 15.0).astype(np.uint8).reshape(grid.shape), grid)
    found = estimate(scans["whole"], scans["part"], n_points=300, fixed_mask=mask)
    assert len(found.fixed_points) and found.fixed_points[:, 2].max() < 19.0
    whole = estimate(scans["whole"], scans["part"], n_points=300)
    # What a mask hides counts as unknown, not as air.
    assert found.features["hypothesis_score"] > 0.8 * whole.features["hypothesis_score"]
    with pytest.raises(InputError, match="no body"):
        empty = Volume(np.zeros(grid.shape, np.uint8), grid)
        estimate(scans["whole"], scans["part"], fixed_mask=empty)


def test_rigid_is_reproducible_and_cancellable(scans):
    first, second = (estimate(scans["whole"], scans["part"], n_points=150, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.transform.matrix, second.transform.matrix)
    assert first.features == second.features
    with pytest.raises(CancelledError):
        estimate(scans["whole"], scans["part"], cancel=lambda: True)


def test_refuse_instead_of_raising_when_the_fit_is_degenerate(scans, monkeypatch):
    def none_agree(*_, **__):
        raise NoConfidentResultError("no three matches agree")

    monkeypatch.setattr(adareg, "ransac", none_agree)
    found = estimate(scans["whole"], scans["part"], n_points=100)
    assert found.verdict == REFUSED and found.transform is None and "no three matches" in found.reason


def test_refuse_by_limits_names_what_is_missing():
    limits = {"accepted": {"inliers": {"min": 40}}, "review": {"inliers": {"min": 10}, "stability_mm": {"max": 5.0}}}
    assert verdict_of({"inliers": 40, "stability_mm": 1.0}, limits)[0] == ACCEPTED
    verdict, reason = verdict_of({"inliers": 39, "stability_mm": 1.0}, limits)
    assert verdict == REVIEW and "agreeing matches 39 (at least 40" in reason
    assert verdict_of({"inliers": 39, "stability_mm": 6.0}, limits)[0] == REFUSED
    assert verdict_of({"inliers": float("nan"), "stability_mm": 1.0}, limits)[0] == REFUSED
    with pytest.raises(InputError, match="unknown figure"):
        verdict_of({"inliers": 3}, limits)


def test_rigid_queries_are_even_over_the_body():
    points = np.random.default_rng(0).uniform(0, 100, (20000, 3))
    points = np.vstack(
        [points, np.random.default_rng(1).uniform(0, 20, (20000, 3))]
    )  # one corner is sampled far denser
    chosen = spread_sample(points, 500, np.random.default_rng(2))
    assert 400 <= len(chosen) <= 500
    assert (chosen < 20).all(axis=1).mean() < 0.03
    np.testing.assert_array_equal(spread_sample(points[:50], 500, np.random.default_rng(2)), points[:50])
