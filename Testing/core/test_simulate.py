"""Simulated MR scans: the truth must be true, the sets must be what the benchmark says they are."""

import ast
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

import uae.simulate
from uae.errors import InputError
from uae.simulate import SETS, simulate_mr, simulate_scan
from uae.volume import Geometry, Volume


def _ellipsoid(points, center, radii):
    return (((points - center) / radii) ** 2).sum(axis=-1) < 1


@pytest.fixture(scope="module")
def ct() -> Volume:
    """A body of 300 x 220 x 250 mm with lungs, a liver, vertebrae, fat and texture, on an odd grid."""
    geometry = Geometry((63, 84, 110), [3.1, 3.2, 4.0], [-40.0, 30.0, -900.0], np.diag([-1.0, -1.0, 1.0]))
    points = geometry.grid_points_mm().reshape(*geometry.shape, 3) - geometry.center_mm()
    x, y, z = np.moveaxis(points, -1, 0)
    hu = np.full(geometry.shape, -1000.0)
    radius = (x / 150) ** 2 + (y / 110) ** 2
    hu[radius < 1] = -100
    hu[radius < 0.8] = 45
    for side in (-1, 1):
        hu[_ellipsoid(points, [70 * side, -10, 60], [45, 65, 75])] = -820
    hu[_ellipsoid(points, [60, -15, -60], [65, 60, 50])] = 75
    spine = (x / 20) ** 2 + ((y - 70) / 20) ** 2 < 1
    hu[spine] = np.where(np.mod(z[spine], 32) < 26, 210, 80)
    hu[spine & ((x / 17) ** 2 + ((y - 70) / 17) ** 2 > 1)] = 600
    texture = ndimage.gaussian_filter(np.random.default_rng(3).standard_normal(geometry.shape), 2.0)
    hu[radius < 0.8] += (40 * texture / texture.std())[radius < 0.8]
    hu += np.random.default_rng(4).normal(0, 8, geometry.shape)
    return Volume(hu.astype(np.float32), geometry, modality="ct")


@pytest.fixture(scope="module")
def pairs(ct) -> dict:
    return {name: [simulate_mr(ct, seed, name) for seed in (1, 2)] for name in SETS}


@pytest.mark.parametrize("name", list(SETS))
def test_truth_inverts(pairs, name):
    for pair in pairs[name]:
        points = pair.moving.geometry.grid_points_mm()[::97]
        forth = pair.moving_to_fixed.apply(points)
        assert np.abs(pair.fixed_to_moving.apply(forth) - points).max() < 0.05
        body = pair.moving_body_points
        assert np.abs(pair.fixed_to_moving.apply(pair.fixed_body_points) - body).max() < 0.05


@pytest.mark.parametrize("name", list(SETS))
def test_tissue_lies_where_the_truth_says(pairs, ct, name):
    for pair in pairs[name]:
        hu = ct.sample(pair.fixed_body_points)
        signal = pair.moving.sample(pair.moving_body_points)
        lung, soft = hu < -700, (hu > 20) & (hu < 130)
        if lung.sum() > 200:
            # Lung is dark and flesh is not in every sequence; a wrong truth would mix them.
            assert np.median(signal[lung]) < 0.45 * np.median(signal[soft])
        # HU at the true places must explain the signal better than HU a centimetre beside them.
        at_truth = _explained(hu, signal)
        for shift in np.concatenate([np.eye(3), -np.eye(3)]) * 10.0:
            assert at_truth > _explained(ct.sample(pair.fixed_body_points + shift), signal)
        outside = ~np.isin(np.arange(pair.moving.array.size), _body_index(pair))
        assert np.median(pair.moving.array.ravel()[outside & _sure_air(pair, ct)]) < 0.25 * np.median(signal[soft])


def _explained(hu, signal):
    """Correlation ratio: share of the signal's variance that bins of HU explain, whatever the contrast."""
    bins = np.digitize(hu, [-900, -500, -150, -60, 0, 30, 60, 100, 200, 400])
    means = np.bincount(bins, signal, 11) / np.maximum(np.bincount(bins, minlength=11), 1)
    return 1.0 - np.square(signal - means[bins]).mean() / signal.var()


def _body_index(pair):
    index = np.rint(pair.moving.geometry.mm_to_index(pair.moving_body_points)).astype(int)
    return np.ravel_multi_index(index[:, ::-1].T, pair.moving.geometry.shape)


def _sure_air(pair, ct):
    hu = ct.sample(pair.moving_to_fixed.apply(pair.moving.geometry.grid_points_mm()), fill=-1024.0)
    return hu < -900


@pytest.mark.parametrize("name", list(SETS))
def test_sets_are_as_defined(pairs, ct, name):
    body = ndimage.binary_fill_holes(ct.array > -500)
    low, high = (np.array(f(np.argwhere(ndimage.binary_opening(body, iterations=2)), axis=0)) for f in (np.min, np.max))
    body_box = ((high - low + 1) * ct.geometry.spacing[::-1]).prod()
    definition = {"standard15": (0.25, 0.6, 15), "standard30": (0.25, 0.6, 30), "hard": (0.08, 0.2, 15)}[name]
    for pair in pairs[name]:
        grid = pair.moving.geometry
        share = grid.extent_mm.prod() / body_box
        assert definition[0] - 0.02 <= share <= definition[1] + 0.02
        assert grid.extent_mm.min() >= 80.0
        assert 3.0 <= grid.spacing[2] <= 6.0 and grid.spacing[:2].max() < 2.0
        assert pair.moving.modality == "mr" and pair.fixed is ct
        corners = grid.corners_mm()
        # Independent rigid through the true corners' neighbourhood: the anatomy itself is turned in the world.
        turn, _ = Rotation.align_vectors(
            pair.fixed_body_points - pair.fixed_body_points.mean(axis=0),
            pair.moving_body_points - pair.moving_body_points.mean(axis=0),
        )
        slack = 12.0 if name == "hard" else 0.05
        assert 3.0 - slack <= np.degrees(turn.magnitude()) <= definition[2] + slack
        assert 3.0 <= pair.meta["rotation_deg"] <= definition[2]
        assert np.linalg.norm(pair.moving_to_fixed.apply(grid.center_mm()[None])[0] - grid.center_mm()) < 230.0
        assert len(pair.moving_body_points) <= 20000
        inside = ct.geometry.contains(pair.moving_to_fixed.apply(corners), 12.0 if name == "hard" else 0.5)
        assert inside.all()
        points = pair.moving_to_fixed.apply(grid.grid_points_mm()[::13])
        index = np.rint(ct.geometry.mm_to_index(points)).astype(int)
        index = np.clip(index, 0, np.array(ct.geometry.shape)[::-1] - 1)
        assert body[tuple(index[:, ::-1].T)].mean() > 0.68


def test_floor_and_displacement(pairs):
    for name, found in pairs.items():
        for pair in found:
            a, b = pair.moving_body_points, pair.fixed_body_points
            turn, _ = Rotation.align_vectors(b - b.mean(axis=0), a - a.mean(axis=0))
            residual = np.linalg.norm(turn.apply(a - a.mean(axis=0)) + b.mean(axis=0) - b, axis=1)
            assert pair.rigid_floor_mm == pytest.approx(residual.mean(), abs=1e-3)
            if name == "hard":
                displacement = pair.moving_to_fixed.apply(a) - _pose_of(pair).apply(a)
                rms = np.sqrt((displacement**2).sum(axis=1).mean())
                assert 4.8 <= rms <= 10.2
                assert rms == pytest.approx(pair.meta["rms_mm"], rel=0.05)
                assert 0.5 < pair.rigid_floor_mm < rms
            else:
                assert pair.rigid_floor_mm < 1e-6


def _pose_of(pair):
    return pair.moving_to_fixed.transforms[0]


def test_deformation_does_not_fold(pairs):
    for pair in pairs["hard"]:
        points, step = pair.moving_body_points[::5], 1.0
        columns = [
            (pair.moving_to_fixed.apply(points + step * e) - pair.moving_to_fixed.apply(points - step * e)) / (2 * step)
            for e in np.eye(3)
        ]
        assert np.linalg.det(np.stack(columns, axis=-1)).min() > 0.0


def test_same_seed_same_scan(ct, pairs):
    again = simulate_mr(ct, 1, "hard")
    first = pairs["hard"][0]
    assert np.array_equal(again.moving.array, first.moving.array)
    assert np.array_equal(again.fixed_body_points, first.fixed_body_points)
    assert not np.array_equal(first.moving.geometry.origin, pairs["hard"][1].moving.geometry.origin)


@pytest.mark.parametrize("name", list(SETS))
def test_other_ct_lies_where_the_mr_would_and_keeps_the_hounsfield_units(ct, pairs, name):
    pair = simulate_scan(ct, 1, name, "ct")
    mr = pairs[name][0]
    assert pair.moving.modality == "ct"
    assert np.array_equal(pair.moving_body_points, mr.moving_body_points)
    assert np.array_equal(pair.fixed_body_points, mr.fixed_body_points)
    assert pair.rigid_floor_mm == mr.rigid_floor_mm
    inside = pair.fixed.geometry.contains(pair.fixed_body_points)
    there, here = (
        volume.sample(points[inside])
        for volume, points in ((ct, pair.fixed_body_points), (pair.moving, pair.moving_body_points))
    )
    # away from edges, which thick slices blur, values differ by noise alone
    assert np.corrcoef(there, here)[0, 1] > 0.7
    assert abs(np.median(here - there)) < 15.0
    assert pair.moving.array.min() >= -1024.0


def test_grid_cuts_the_anatomy_obliquely(pairs):
    """The rotation must be in the voxels: the map between the two headers' own index axes is no plain axis order."""
    for pair in pairs["standard15"]:
        grid, fixed = pair.moving.geometry, pair.fixed.geometry
        origin = pair.moving_to_fixed.apply(grid.origin[None])[0]
        ends = pair.moving_to_fixed.apply(grid.origin + 50.0 * grid.direction.T)
        axes = np.abs((ends - origin) / 50.0 @ fixed.direction)
        assert axes.max(axis=1).min() < 0.9999


def test_bad_input(ct):
    with pytest.raises(InputError, match="set"):
        simulate_mr(ct, 0, "easy")
    with pytest.raises(InputError, match="CT"):
        simulate_mr(Volume(ct.array, ct.geometry, modality="mr"), 0, "hard")
    with pytest.raises(InputError, match="choose mr or ct"):
        simulate_scan(ct, 0, "hard", "pet")
    slab = Volume(ct.array[:10], Geometry((10, *ct.array.shape[1:]), *_rest(ct.geometry)), modality="ct")
    with pytest.raises(InputError, match="larger CT"):
        simulate_mr(slab, 0, "standard15")


def _rest(geometry):
    return geometry.spacing, geometry.origin, geometry.direction


def test_nothing_of_training_is_used_and_training_uses_nothing_of_it():
    root = Path(uae.simulate.__file__).parents[1]
    for folder, forbidden in (("simulate", "uae.training"), ("training", "uae.simulate")):
        for path in (root / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not any(name.startswith(forbidden) for name in names), path


@pytest.mark.parametrize("subject", ["ct_mij_abdpelvis", "ct_lidc0001_chest"])
def test_real_ct(real_data, subject):
    (path,) = real_data(f"{subject}/ct.nii.gz")
    ct = Volume.read(path)
    ct.modality = "ct"
    pair = simulate_mr(ct, 3, "standard15")
    hu = ct.sample(pair.fixed_body_points)
    signal = pair.moving.sample(pair.moving_body_points)
    # Body stays body: what the scan calls body is no air outside the patient (lungs and gas aside).
    tissue = hu > -500
    assert tissue.mean() > 0.35
    assert np.median(signal[tissue]) > 1.5 * np.median(signal[hu < -850])
