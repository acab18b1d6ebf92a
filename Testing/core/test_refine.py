"""Refinement inside the overlap: small known offsets are found, runaways and empty overlaps are not believed."""

import numpy as np
import pytest
from scipy import ndimage

from uae.errors import CancelledError
from uae.geometry import Geometry
from uae.registration import refine
from uae.registration.refine import overlap_points, refine_rigid
from uae.transform import Rigid
from uae.volume import Volume, resample

TISSUES = {0: -1000.0, 1: -90.0, 2: 50.0, 3: 110.0, 4: 500.0, 5: -750.0}  # HU of air, fat, muscle, organ, bone, lung
SIGNALS = {0: 2.0, 1: 90.0, 2: 35.0, 3: 60.0, 4: 12.0, 5: 6.0}


def tissue_map(seed=0, shape=(60, 90, 110), spacing=2.0):
    """Ellipsoids of tissue in an elliptic body, as label volume; irregular enough to fix all six degrees of freedom."""
    rng = np.random.default_rng(seed)
    geometry = Geometry(shape, (spacing,) * 3, (-110.0, -90.0, 700.0), np.eye(3))
    points = geometry.grid_points_mm() - geometry.center_mm()
    labels = np.zeros(len(points), dtype=np.uint8)
    inner = np.square(points[:, :2] / (95.0, 70.0)).sum(axis=1)
    labels[inner < 1.0] = 1
    labels[inner < 0.8] = 2
    for tissue in (3, 5, 4, 3, 5, 4, 3, 4, 3, 1, 4, 3):
        center = rng.uniform((-60, -40, -45), (60, 40, 45))
        turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        inside = np.square((points - center) @ turn / rng.uniform(8, 24, 3)).sum(axis=1) < 1.0
        labels[inside & (inner < 0.7)] = tissue
    return Volume(labels.reshape(shape), geometry)


def render(labels, values, noise, seed, modality):
    table = np.array([values[k] for k in sorted(values)], dtype=np.float32)
    array = ndimage.gaussian_filter(table[labels.array], 0.6)
    array = array + np.random.default_rng(seed).normal(0.0, noise, array.shape)
    return Volume(array.astype(np.float32), labels.geometry, modality=modality)


@pytest.fixture(scope="module")
def pair():
    """CT (fixed), MR of its middle part in another pose with thick slices (moving), bodies, and the true fixed ->
    moving transform."""
    labels = tissue_map()
    ct = render(labels, TISSUES, 15.0, 1, "ct")
    truth = Rigid.from_euler_deg(4.0, -3.0, 6.0, translation=(30.0, -12.0, 55.0), center=labels.geometry.center_mm())
    center = truth.apply(labels.geometry.center_mm()[None])[0]
    size, spacing = np.array([95, 75, 20]), np.array([2.0, 2.0, 4.0])
    grid = Geometry(tuple(size[::-1]), spacing, center - (size - 1) / 2 * spacing, np.eye(3))
    warped = resample(labels, grid, truth.inverse(), fill=0, order=0)
    mr = render(warped, SIGNALS, 2.0, 2, "mr")
    bodies = [Volume((v.array > 0).astype(np.uint8), v.geometry) for v in (labels, warped)]
    return ct, mr, bodies, truth


def errors(found, truth, points):
    return np.linalg.norm(found.apply(points) - truth.apply(points), axis=1)


def test_refine_recovers_3_mm_and_2_degrees_across_contrast(pair):
    ct, mr, bodies, truth = pair
    points = overlap_points(ct.geometry, mr.geometry, truth, 8.0)
    offset = Rigid.from_euler_deg(2.0 / 3**0.5, -2.0 / 3**0.5, 2.0 / 3**0.5, (1.8, -1.7, 1.7), ct.geometry.center_mm())
    initial = Rigid(truth.matrix @ offset.matrix)
    assert errors(initial, truth, points).mean() > 3.0
    result = refine_rigid(ct, mr, initial, *bodies)
    assert result.used and not result.failed, result.reason
    assert isinstance(result.transform, Rigid)
    assert errors(result.transform, truth, points).mean() < 1.0
    assert errors(result.transform, truth, points).max() < 1.5
    assert result.metric_after > result.metric_before
    again = refine_rigid(ct, mr, initial, *bodies)
    np.testing.assert_array_equal(again.transform.matrix, result.transform.matrix)


def test_refine_discards_a_runaway(pair):
    ct, mr, bodies, truth = pair
    offset = Rigid.from_euler_deg(0.0, 0.0, 7.0, (9.0, 9.0, 0.0), ct.geometry.center_mm())
    initial = Rigid(truth.matrix @ offset.matrix)
    result = refine_rigid(ct, mr, initial, *bodies)
    assert result.failed and not result.used
    assert result.moved_mm > refine.MAX_MOVED_MM or result.moved_deg > refine.MAX_TURNED_DEG
    assert "discarded" in result.reason
    np.testing.assert_array_equal(result.transform.matrix, initial.matrix)


def test_refine_without_overlap_keeps_the_initial_transform(pair):
    ct, mr, bodies, _ = pair
    apart = Rigid.from_euler_deg(0, 0, 0, translation=(1000.0, 0.0, 0.0))
    result = refine_rigid(ct, mr, apart, *bodies)
    assert result.failed and not result.used and "overlap" in result.reason
    assert result.transform is apart


def test_refine_can_be_cancelled(pair):
    ct, mr, bodies, truth = pair
    with pytest.raises(CancelledError):
        refine_rigid(ct, mr, truth, *bodies, cancel=lambda: True)


def test_refine_overlap_points_lie_in_both(pair):
    ct, mr, _, truth = pair
    points = overlap_points(ct.geometry, mr.geometry, truth)
    assert ct.geometry.contains(points).all() and mr.geometry.contains(truth.apply(points)).all()
    lattice = ct.geometry.grid_points_mm()
    shared = mr.geometry.contains(truth.apply(lattice)).sum() * ct.geometry.voxel_volume_mm3
    assert len(points) * 64.0 == pytest.approx(shared, rel=0.15)


@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, -1), (1, 1, -1)])
def test_refine_of_a_thin_oblique_slab_uses_what_it_shows(pair, flips):
    ct, _, bodies, _ = pair
    turn = Rigid.from_euler_deg(35.0, 40.0, 20.0).rotation @ np.diag(flips)
    shape, spacing = (6, 60, 60), np.array([2.0, 2.0, 3.0])
    center = ct.geometry.center_mm()
    grid = Geometry(shape, spacing, center - turn @ ((np.array(shape[::-1]) - 1) / 2 * spacing), turn)
    labels = resample(tissue_map(), grid, fill=0, order=0)
    slab = render(labels, SIGNALS, 2.0, 2, "mr")
    body = Volume((labels.array > 0).astype(np.uint8), grid)
    result = refine_rigid(ct, slab, Rigid.identity(), bodies[0], body)
    assert not result.failed, result.reason
    assert np.linalg.norm(result.transform.apply(grid.corners_mm()) - grid.corners_mm(), axis=1).max() < 2.0
