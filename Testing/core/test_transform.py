"""Transforms against SimpleITK's TransformPoint, in memory and through the written files."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from uae.errors import InputError
from uae.transform import Affine, Composite, DisplacementField, Rigid, read_transform, write_transform
from uae.volume import Geometry

OBLIQUE = Geometry((12, 14, 16), (3, 4, 5), (-30, 20, 100), Rigid.from_euler_deg(20, -15, 30).rotation)


def field_on(geometry=OBLIQUE, amplitude=5.0, dtype=np.float64):
    """A smooth field that reaches the border of its grid (so that the rule outside is seen)."""
    points = geometry.grid_points_mm() - geometry.center_mm()
    u = amplitude * np.sin(points[:, [1, 2, 0]] / 15.0 + [0.3, 1.1, 2.0])
    return DisplacementField(u.reshape(*geometry.shape, 3).astype(dtype), geometry)


def random_points(count=400, margin_voxels=2.0, seed=0):
    """Points inside and around the oblique grid."""
    size = np.array(OBLIQUE.shape[::-1])
    index = np.random.default_rng(seed).uniform(-margin_voxels, size - 1 + margin_voxels, (count, 3))
    return OBLIQUE.index_to_mm(index)


def inner_points(count=400, seed=1):
    index = np.random.default_rng(seed).uniform(2, np.array(OBLIQUE.shape[::-1]) - 3, (count, 3))
    return OBLIQUE.index_to_mm(index)


def itk_points(transform, points):
    return np.array([transform.TransformPoint(p) for p in np.asarray(points).tolist()])


def rigid():
    return Rigid.from_euler_deg(10, 5, -40, (100, 2, 3), OBLIQUE.center_mm())


def affine():
    matrix = rigid().matrix.copy()
    matrix[:3, :3] = matrix[:3, :3] @ np.array([[1.1, 0.05, 0], [0, 0.9, 0.02], [0, 0, 1.0]])
    return Affine(matrix)


def test_rigid_from_euler_is_itks_euler():
    center = OBLIQUE.center_mm()
    itk = sitk.Euler3DTransform(center.tolist(), *np.radians([10, 5, -40]).tolist(), (100.0, 2.0, 3.0))
    points = random_points()
    np.testing.assert_allclose(rigid().apply(points), itk_points(itk, points), atol=1e-9)


@pytest.mark.parametrize("angle", [0.0, 1e-6, 0.5, 90.0, 179.5, 180.0])
def test_rigid_rotation_angle(angle):
    axis = np.array([1.0, 2.0, -2.0]) / 3
    itk = sitk.VersorTransform(axis.tolist(), float(np.radians(angle)))
    turn = Rigid.from_rotation(np.reshape(itk.GetMatrix(), (3, 3)), (1, 2, 3))
    assert turn.rotation_angle_deg() == pytest.approx(angle, rel=1e-6, abs=1e-9)


def test_rigid_refuses_what_is_not_a_rotation():
    for bad in (np.diag([1.0, 1, 1.01, 1]), np.diag([-1.0, 1, 1, 1])):
        with pytest.raises(ValueError, match="rotation"):
            Rigid(bad)


@pytest.mark.parametrize("make", [rigid, affine])
@pytest.mark.parametrize("suffix", [".tfm", ".txt", ".h5", ".mat"])
def test_linear_file_is_read_by_sitk_as_written(tmp_path, make, suffix):
    transform = make()
    path = tmp_path / f"t{suffix}"
    write_transform(path, transform)
    points = random_points()
    np.testing.assert_allclose(itk_points(sitk.ReadTransform(str(path)), points), transform.apply(points), atol=1e-6)
    again = read_transform(path)
    assert type(again) is type(transform)
    np.testing.assert_allclose(again.matrix, transform.matrix, atol=1e-9)
    np.testing.assert_allclose(transform.inverse().apply(transform.apply(points)), points, atol=1e-9)
    assert type(transform.inverse()) is type(transform)


def test_itk_transforms_with_centre_are_read(tmp_path):
    points = random_points()
    versor = sitk.VersorRigid3DTransform((0.3, -0.2, 0.1), 0.7, (5.0, 6.0, 7.0), (10.0, 20.0, 30.0))
    euler = sitk.Euler3DTransform((1.0, 2.0, 3.0), 0.1, 0.2, 0.3, (4.0, 5.0, 6.0))
    scaled = sitk.AffineTransform(3)
    scaled.SetCenter((7.0, 8.0, 9.0))
    scaled.Scale((1.1, 0.9, 1.05))
    scaled.SetTranslation((1.0, -2.0, 3.0))
    chain = sitk.CompositeTransform([versor, scaled])
    kinds = {"versor": versor, "euler": euler, "scaled": scaled, "chain": chain}
    for name, itk in kinds.items():
        sitk.WriteTransform(itk, str(tmp_path / f"{name}.tfm"))
        ours = read_transform(tmp_path / f"{name}.tfm")
        np.testing.assert_allclose(ours.apply(points), itk_points(itk, points), atol=1e-6)
        assert isinstance(ours, Rigid) == (name in ("versor", "euler"))


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_field_image_is_read_by_sitk_as_written(tmp_path, suffix, dtype):
    field = field_on(dtype=dtype)
    path = tmp_path / f"u{suffix}"
    write_transform(path, field)
    itk = sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))
    points = random_points()
    truth = itk_points(itk, points)
    moved = np.linalg.norm(truth - points, axis=1)
    assert 0.2 < (moved > 1).mean() < 0.95, "points inside and outside the grid are needed"
    # Points within a micrometre of the grid's edge may fall on either side after the file's rounding.
    index = OBLIQUE.mm_to_index(points)
    edge = np.minimum(np.abs(index + 0.5), np.abs(index - OBLIQUE.size + 0.5)).min(axis=1) < 1e-4
    np.testing.assert_allclose(field.apply(points)[~edge], truth[~edge], atol=1e-3)
    np.testing.assert_allclose(read_transform(path).apply(points)[~edge], truth[~edge], atol=1e-3)


@pytest.mark.parametrize("suffix", [".h5", ".tfm"])
def test_field_and_composite_transform_files_are_read_by_sitk(tmp_path, suffix):
    field, linear = field_on(), rigid()
    points = random_points()
    for name, transform in {"field": field, "chain": Composite([field, linear])}.items():
        path = tmp_path / f"{name}{suffix}"
        write_transform(path, transform)
        truth = itk_points(sitk.ReadTransform(str(path)), points)
        np.testing.assert_allclose(transform.apply(points), truth, atol=1e-3)
        np.testing.assert_allclose(read_transform(path).apply(points), truth, atol=1e-3)


def test_composite_order_is_the_contracts(tmp_path):
    """x_moving = R(x + u(x)), put together by hand from files that SimpleITK reads."""
    field, linear = field_on(), rigid()
    write_transform(tmp_path / "displacement.nii.gz", field)
    write_transform(tmp_path / "rigid.tfm", linear)
    u = sitk.DisplacementFieldTransform(sitk.ReadImage(str(tmp_path / "displacement.nii.gz"), sitk.sitkVectorFloat64))
    r = sitk.ReadTransform(str(tmp_path / "rigid.tfm"))
    points = inner_points()
    truth = itk_points(r, itk_points(u, points))
    chain = Composite([field, linear])
    np.testing.assert_allclose(chain.apply(points), truth, atol=1e-3)
    assert np.abs(Composite([linear, field]).apply(points) - truth).max() > 1
    np.testing.assert_allclose(chain.inverse().apply(truth), points, atol=0.01)


def test_composite_of_linear_parts_is_one_matrix():
    points = random_points()
    chain = Composite([rigid(), Composite([rigid().inverse(), rigid()])])
    assert isinstance(chain.as_linear(), Rigid)
    np.testing.assert_allclose(chain.as_linear().apply(points), chain.apply(points), atol=1e-9)
    assert not isinstance(Composite([rigid(), affine()]).as_linear(), Rigid)
    with pytest.raises(ValueError, match="matrix"):
        Composite([rigid(), field_on()]).as_linear()


def test_field_inverse_brings_points_back():
    field, points = field_on(), inner_points()
    np.testing.assert_allclose(field.inverse().apply(field.apply(points)), points, atol=0.01)
    found = field.inverse().apply(points)
    np.testing.assert_allclose(field.apply(found), points, atol=0.01)


def test_field_inverse_where_fixed_points_diverge():
    """A stretch by 2.5 along one axis: the fixed-point iteration needs a slope below 1, Newton's steps do not."""
    geometry = Geometry((20, 20, 40), (2, 2, 2), (-40, -20, -20), np.eye(3))
    points = geometry.grid_points_mm()
    u = np.zeros((*geometry.shape, 3))
    u[..., 0] = (1.5 * points[:, 0]).reshape(geometry.shape)
    field = DisplacementField(u, geometry)
    inside = np.random.default_rng(0).uniform([-12, -15, -15], [12, 15, 15], (200, 3))
    truth = inside * [2.5, 1, 1]
    np.testing.assert_allclose(field.inverse().apply(truth), inside, atol=0.01)


def test_field_inverse_of_a_turn_by_120_degrees():
    """No step along the residual shrinks it here: only Newton's steps find the point."""
    geometry = Geometry((20, 40, 40), (2, 2, 2), (-39, -39, -19), np.eye(3))
    turn = Rigid.from_euler_deg(0, 0, 120)
    points = geometry.grid_points_mm()
    field = DisplacementField((turn.apply(points) - points).reshape(*geometry.shape, 3), geometry)
    inside = np.random.default_rng(0).uniform(-15, 15, (200, 3))
    np.testing.assert_allclose(field.inverse().apply(turn.apply(inside)), inside, atol=0.01)


def test_field_that_folds_is_told(caplog):
    geometry = Geometry((6, 6, 40), (2, 2, 2), (-40, -6, -6), np.eye(3))
    x = geometry.grid_points_mm()[:, 0].reshape(geometry.shape)
    u = np.zeros((*geometry.shape, 3))
    u[..., 0] = 30 * np.sign(x + 0.1)
    field = DisplacementField(u, geometry)
    result = field.inverse().apply(np.array([[0.0, 0.0, 0.0]]))
    assert np.all(np.isfinite(result))
    assert field.jacobian_determinant().max() > 5


def test_field_inverted_to_a_grid():
    geometry = Geometry((30, 30, 30), (2, 2, 2), (0, 0, 0), Rigid.from_euler_deg(5, 10, 15).rotation)
    points = geometry.grid_points_mm() - geometry.center_mm()
    bell = np.exp(-(points**2).sum(axis=1) / (2 * 12.0**2))
    field = DisplacementField((bell[:, None] * [4.0, -3.0, 2.0]).reshape(*geometry.shape, 3), geometry)
    inverse = field.invert_to_grid()
    probe = geometry.index_to_mm(np.random.default_rng(0).uniform(8, 21, (300, 3)))
    # On the grid the inverse is exact; between its voxels the curvature of u limits it.
    np.testing.assert_allclose(inverse.apply(field.apply(probe)), probe, atol=0.1)
    centre = geometry.index_to_mm(np.array([[15.0, 15, 15], [12, 17, 14]]))
    np.testing.assert_allclose(field.apply(inverse.apply(centre)), centre, atol=0.01)


def test_jacobian_of_a_linear_map_on_an_oblique_grid():
    matrix = affine().matrix[:3, :3]
    points = OBLIQUE.grid_points_mm()
    u = points @ (matrix - np.eye(3)).T
    field = DisplacementField(u.reshape(*OBLIQUE.shape, 3), OBLIQUE)
    np.testing.assert_allclose(field.jacobian_determinant(), np.linalg.det(matrix), atol=1e-9)


def test_jacobian_agrees_with_itk(monkeypatch):
    field = field_on(Geometry(OBLIQUE.shape, OBLIQUE.spacing, OBLIQUE.origin, np.eye(3)))
    truth = sitk.GetArrayFromImage(sitk.DisplacementFieldJacobianDeterminant(field.to_sitk_image()))
    inner = (slice(1, -1),) * 3
    np.testing.assert_allclose(field.jacobian_determinant()[inner], truth[inner], atol=1e-9)
    # In thin slabs, as for a large grid, nothing changes.
    monkeypatch.setattr("uae.transform.CHUNK", 14 * 16)
    np.testing.assert_allclose(field.jacobian_determinant()[inner], truth[inner], atol=1e-9)


def test_unusable_transform_files_are_refused(tmp_path):
    (tmp_path / "t.tfm").write_text("no transform")
    (tmp_path / "t.nii.gz").write_text("no image")
    sitk.WriteImage(sitk.Image([5, 5, 5], sitk.sitkFloat32), str(tmp_path / "scalar.nii.gz"))
    sitk.WriteTransform(sitk.Euler2DTransform(), str(tmp_path / "flat.tfm"))
    sitk.WriteTransform(sitk.BSplineTransform(3, 3), str(tmp_path / "spline.tfm"))
    bad = field_on().to_sitk_image()
    bad[2, 2, 2] = (float("nan"), 0.0, 0.0)
    sitk.WriteImage(bad, str(tmp_path / "nan.mha"))
    words = {
        "missing.tfm": "no such",
        "t.tfm": "not a readable",
        "t.nii.gz": "not a readable",
        "scalar.nii.gz": "vectors",
        "flat.tfm": "3-D",
        "spline.tfm": "displacement field",
        "nan.mha": "NaN",
    }
    for name, word in words.items():
        with pytest.raises(InputError, match=word):
            read_transform(tmp_path / name)


def test_unusable_suffix_leaves_nothing(tmp_path):
    for name, transform in {"a.nii.gz": rigid(), "a.json": field_on(), "a.nrrd": field_on().inverse()}.items():
        with pytest.raises(InputError):
            write_transform(tmp_path / name, transform)
    assert list(tmp_path.iterdir()) == []
