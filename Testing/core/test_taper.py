"""The exported displacement: untouched where it matters, zero on its border, never folding, the same for SimpleITK."""

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial import cKDTree

from uae.errors import NoConfidentResultError, ResourceError
from uae.geometry import Geometry
from uae.registration.taper import minimum_determinant, taper
from uae.transform import Composite, DisplacementField, Rigid, write_transform
from uae.volume import Volume


def turned(angles=(10.0, -20.0, 30.0)):
    return Rigid.from_euler_deg(*angles).rotation


def wavy(geometry, amplitude=8.0, period=120.0, offset=(6.0, -4.0, 3.0)):
    """A smooth field that does not fold: slopes up to 2 pi amplitude / period in one direction only."""
    points = geometry.grid_points_mm()
    phase = 2 * np.pi * points / period
    waves = amplitude * np.stack([np.sin(phase[:, 1]), np.sin(phase[:, 2]), np.sin(phase[:, 0])], axis=1)
    return DisplacementField((waves + np.array(offset)).reshape(*geometry.shape, 3).astype(np.float32), geometry)


@pytest.fixture(scope="module")
def case():
    """An oblique, anisotropic crop, a moving scan that covers its middle only, and the tapered field."""
    crop = Geometry((18, 22, 24), (5.0, 5.5, 6.5), (-60.0, 20.0, 400.0), turned())
    linear = Rigid.from_euler_deg(5.0, 8.0, -12.0, (40.0, -90.0, 30.0), crop.center_mm())
    center = linear.apply(crop.center_mm()[None])[0]
    moving = Geometry((20, 30, 35), (2.0, 2.0, 3.0), center - np.array([52.0, 30.0, 20.0]), np.eye(3))
    fixed = Geometry((60, 80, 80), (2.0, 2.0, 2.0), crop.origin - 10.0, crop.direction)
    field = wavy(crop)
    return field, linear, moving, fixed, taper(field, linear, moving, fixed)


def test_geometry_taper_is_zero_on_the_border(case):
    vectors = case[-1].field.vectors
    for axis in range(3):
        for end in (0, -1):
            assert not np.take(vectors, end, axis=axis).any()
    assert vectors.any()


def test_geometry_taper_leaves_the_overlap_unchanged(case):
    field, linear, moving, fixed, result = case
    points = np.random.default_rng(0).uniform(0, 1, (20000, 3)) * (field.geometry.size - 1)
    points = field.geometry.index_to_mm(points)
    inside = moving.contains(linear.apply(field.apply(points)), -0.5) & fixed.contains(points, -0.5)
    assert inside.sum() > 1000
    np.testing.assert_allclose(result.field.displacement(points[inside]), field.displacement(points[inside]), atol=1e-4)
    assert not result.overlap.all()


def test_geometry_taper_does_not_fold(case):
    field, *_, result = case
    assert minimum_determinant(field.vectors, field.geometry).min() > 0  # or the test would ask for the impossible
    assert result.folding_outside == 0
    assert minimum_determinant(result.field.vectors, result.field.geometry).min() > 0
    assert result.field.jacobian_determinant().min() > 0


def test_geometry_taper_reaches_zero_within_its_width(case):
    result = case[-1]
    assert result.width_mm >= max(20.0, 4.0 * 6.0)
    nodes = result.field.geometry.grid_points_mm()
    kept = nodes[result.overlap.ravel()]
    far = cKDTree(kept).query(nodes)[0] > result.width_mm
    assert far.any()
    assert not result.field.vectors.reshape(-1, 3)[far].any()


def test_geometry_taper_bridges_a_gap_whose_sides_move_against_each_other():
    """The nearest value jumps by 45 mm in the middle of the gap; only smoothing can bridge it without folding."""
    grid = Geometry((8, 9, 30), (6.0, 6.0, 6.0), (0, 0, 0), np.eye(3))
    vectors = np.zeros((*grid.shape, 3), np.float32)
    x = grid.grid_points_mm()[:, 0].reshape(grid.shape)
    vectors[..., 0] = np.interp(x, (50.0, 130.0), (25.0, -20.0))
    mask = np.ones(grid.shape, np.uint8)
    mask[:, :, 11:19] = 0
    moving = Geometry((60, 60, 100), (3.0, 3.0, 3.0), (-60, -60, -60), np.eye(3))
    result = taper(DisplacementField(vectors, grid), Rigid.identity(), moving, fixed_mask=Volume(mask, grid))
    assert result.folding_outside == 0
    assert minimum_determinant(result.field.vectors, result.field.geometry).min() > 0


def test_refuse_taper_without_overlap(case):
    field, linear, moving, *_ = case
    away = Geometry(moving.shape, moving.spacing, moving.origin + 2000.0, moving.direction)
    with pytest.raises(NoConfidentResultError, match="overlap"):
        taper(field, linear, away)


def test_geometry_minimum_determinant_sees_what_central_differences_miss():
    grid = Geometry((4, 4, 8), (1.0, 1.0, 1.0), (0, 0, 0), np.eye(3))
    vectors = np.zeros((*grid.shape, 3), np.float32)
    vectors[:, :, ::2, 0] = 1.5  # jumps back and forth along x: every second cell is turned over
    assert DisplacementField(vectors, grid).jacobian_determinant()[:, :, 1:-1].min() == pytest.approx(1.0)
    assert minimum_determinant(vectors, grid).min() == pytest.approx(-0.5)


def test_geometry_minimum_determinant_on_an_oblique_grid():
    grid = Geometry((5, 6, 7), (1.0, 2.0, 3.0), (5, 6, 7), turned())
    matrix = np.array([[0.2, 0.1, 0.0], [-0.3, 0.1, 0.05], [0.0, 0.2, -0.4]])
    vectors = (grid.grid_points_mm() @ matrix.T).reshape(*grid.shape, 3)
    expected = np.linalg.det(np.eye(3) + matrix)
    np.testing.assert_allclose(minimum_determinant(vectors, grid), expected, atol=1e-5)


def test_geometry_taper_file_carries_points_in_simpleitk(case, tmp_path):
    field, linear, *_, result = case
    write_transform(tmp_path / "displacement.nii.gz", result.field)
    write_transform(tmp_path / "rigid.tfm", linear)
    image = sitk.ReadImage(str(tmp_path / "displacement.nii.gz"))
    grid = sitk.DisplacementFieldTransform(sitk.Cast(image, sitk.sitkVectorFloat64))
    chain = sitk.CompositeTransform([sitk.ReadTransform(str(tmp_path / "rigid.tfm")), grid])
    points = np.random.default_rng(1).normal(field.geometry.center_mm(), 80.0, (500, 3))
    expected = Composite([result.field, linear]).apply(points)
    seen = np.array([chain.TransformPoint(p.tolist()) for p in points])
    np.testing.assert_allclose(seen, expected, atol=0.01)


def test_geometry_taper_is_shortened_where_its_grid_would_be_too_large(case, monkeypatch, caplog):
    field, linear, moving, fixed, result = case
    monkeypatch.setattr("uae.registration.taper.MAX_NODES", int(0.7 * np.prod(result.field.geometry.shape)))
    shorter = taper(field, linear, moving, fixed)
    assert 20.0 <= shorter.width_mm < result.width_mm
    assert np.prod(shorter.field.geometry.shape) <= 0.7 * np.prod(result.field.geometry.shape)
    assert "too much memory" in caplog.text
    for axis in range(3):
        assert not np.take(shorter.field.vectors, [0, -1], axis=axis).any()


def test_geometry_taper_refuses_a_grid_that_cannot_be_held(case, monkeypatch):
    field, linear, moving, fixed, _ = case
    monkeypatch.setattr("uae.registration.taper.MAX_NODES", 10)
    with pytest.raises(ResourceError, match="smaller margin"):
        taper(field, linear, moving, fixed)
