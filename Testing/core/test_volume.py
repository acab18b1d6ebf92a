"""Volume and Geometry against SimpleITK's own answers: any axis order, any obliqueness, one resampling."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import SimpleITK as sitk

from uae.transform import Affine, Composite, DisplacementField, Rigid, Transform
from uae.volume import Geometry, Volume, resample, resample_with_mask

OBLIQUE = Rigid.from_euler_deg(17, -25, 40).rotation


def smooth_volume(shape=(11, 13, 15), spacing=(3.0, 4.0, 5.0), direction=OBLIQUE, origin=(-40.0, 25.0, 310.0)):
    """A volume whose value is a smooth function of the place in the patient, so that any grid shows the same body."""
    geometry = Geometry(shape, spacing, origin, direction)
    return Volume(patient_value(geometry.grid_points_mm()).reshape(shape), geometry)


def patient_value(points):
    x, y, z = points.T
    return 100 + 3 * x - 2 * y + 0.5 * z


AXIS_ORDERS = [(p, f) for p in itertools.permutations(range(3)) for f in itertools.product((False, True), repeat=3)]


def reordered(volume, permutation, flips):
    """The same voxels stored in another axis order, with SimpleITK's PermuteAxes and Flip (which keep the places)."""
    image = sitk.PermuteAxes(volume.to_sitk(), list(permutation))
    return Volume.from_sitk(sitk.Flip(image, list(flips), False))


@pytest.mark.parametrize(("permutation", "flips"), AXIS_ORDERS)
def test_geometry_of_48_axis_orders_keeps_every_point(permutation, flips):
    volume = smooth_volume()
    other = reordered(volume, permutation, flips)
    rng = np.random.default_rng(0)
    index = rng.uniform(0.5, np.array(volume.geometry.shape[::-1]) - 1.5, (50, 3))
    points = volume.geometry.index_to_mm(index)
    np.testing.assert_allclose(other.geometry.index_to_mm(other.geometry.mm_to_index(points)), points, atol=1e-9)
    np.testing.assert_allclose(other.sample(points), volume.sample(points), atol=2e-3)
    np.testing.assert_allclose(other.sample(points), patient_value(points), atol=2e-3)
    np.testing.assert_allclose(other.geometry.bounds_mm(), volume.geometry.bounds_mm(), atol=1e-9)
    np.testing.assert_allclose(other.geometry.center_mm(), volume.geometry.center_mm(), atol=1e-9)
    image = other.to_sitk()
    truth = [image.TransformPhysicalPointToContinuousIndex(p) for p in points.tolist()]
    np.testing.assert_allclose(other.geometry.mm_to_index(points), truth, atol=1e-9)
    back = resample(other, volume.geometry)
    np.testing.assert_allclose(back.array, volume.array, atol=2e-3)


def test_geometry_corners_bounds_and_contains_are_those_of_voxel_edges():
    geometry = Geometry((2, 3, 4), (1.0, 2.0, 5.0), (10.0, 20.0, 30.0), np.eye(3))
    np.testing.assert_allclose(geometry.bounds_mm(), [[9.5, 19, 27.5], [13.5, 25, 37.5]])
    np.testing.assert_allclose(geometry.extent_mm, [4, 6, 10])
    assert geometry.voxel_volume_mm3 == pytest.approx(10)
    assert len(np.unique(geometry.corners_mm().round(9), axis=0)) == 8
    points = np.array([[9.5, 19, 27.5], [9.49, 20, 30], [13.5, 25, 37.5], [13.51, 25, 37]])
    assert geometry.contains(points).tolist() == [True, False, True, False]
    assert geometry.contains(points, margin_voxels=0).tolist() == [False] * 4


def test_geometry_grid_points_follow_the_array():
    volume = smooth_volume(shape=(3, 4, 5))
    points = volume.geometry.grid_points_mm().reshape(3, 4, 5, 3)
    truth = volume.to_sitk().TransformIndexToPhysicalPoint((4, 1, 2))
    np.testing.assert_allclose(points[2, 1, 4], truth, atol=1e-9)


def test_geometry_cannot_be_changed_behind_its_back():
    origin = np.zeros(3)
    geometry = Geometry((4, 4, 4), np.ones(3), origin, np.eye(3))
    origin[0] = 5
    assert geometry.origin[0] == 0
    with pytest.raises(ValueError, match="read-only"):
        geometry.origin[0] = 1


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_volume_geometry_survives_the_file(tmp_path, suffix):
    volume = smooth_volume()
    volume.write(tmp_path / f"v{suffix}")
    again = Volume.read(tmp_path / f"v{suffix}")
    assert again.array.dtype == np.float32
    np.testing.assert_array_equal(again.array, volume.array)
    # NIfTI stores the geometry in single precision.
    assert again.geometry.same_as(volume.geometry, 1e-4)
    assert [p.name for p in tmp_path.iterdir()] == [f"v{suffix}"]


def test_labels_keep_integers_and_may_be_constant(tmp_path):
    geometry = Geometry((5, 5, 5), (1, 1, 1), (0, 0, 0), np.eye(3))
    Volume(np.full((5, 5, 5), 3, np.int16), geometry).write(tmp_path / "l.nii.gz")
    label = Volume.read(tmp_path / "l.nii.gz", label=True)
    assert label.is_label
    assert label.array.min() == label.array.max() == 3
    sitk.WriteImage(sitk.Cast(label.to_sitk(), sitk.sitkFloat32), tmp_path / "f.nii.gz")
    assert Volume.read(tmp_path / "f.nii.gz", label=True).array.dtype == np.int32


def smooth_field(geometry, amplitude=4.0):
    points = geometry.grid_points_mm() - geometry.center_mm()
    u = amplitude * np.sin(points[:, [1, 2, 0]] / 23.0)
    return DisplacementField(u.reshape(*geometry.shape, 3), geometry)


class WithoutItk(Transform):
    """Forces the route by points, as an inverse field does."""

    def __init__(self, inner):
        self.inner = inner

    def apply(self, points):
        return self.inner.apply(points)


@pytest.mark.parametrize("order", [0, 1])
def test_resample_by_itk_and_by_points_agree_with_sitk(order):
    volume = smooth_volume()
    volume.array += np.random.default_rng(1).normal(0, 30, volume.array.shape).astype(np.float32)
    target = Geometry((9, 12, 10), (4.1, 3.3, 6.2), volume.geometry.center_mm() - 20, np.eye(3))
    rigid = Rigid.from_euler_deg(5, -8, 12, (3, -2, 4), volume.geometry.center_mm())
    field = smooth_field(volume.geometry)
    chain = Composite([field, rigid])
    ours = resample(volume, target, chain, fill=-7, order=order)

    # The truth, built without this package's chain: ITK applies the transform added last first.
    affine = sitk.AffineTransform(rigid.rotation.ravel().tolist(), rigid.translation.tolist())
    vectors = sitk.GetImageFromArray(field.vectors, isVector=True)
    vectors.CopyInformation(volume.to_sitk())
    composite = sitk.CompositeTransform([affine, sitk.DisplacementFieldTransform(vectors)])
    grid = sitk.Image([10, 12, 9], sitk.sitkFloat32)
    target.apply_to_sitk(grid)
    interpolator = [sitk.sitkNearestNeighbor, sitk.sitkLinear][order]
    truth = sitk.GetArrayFromImage(sitk.Resample(volume.to_sitk(), grid, composite, interpolator, -7.0))
    assert 0.2 < (truth != -7).mean() < 1
    np.testing.assert_allclose(ours.array, truth, atol=1e-3)

    by_points = resample(volume, target, WithoutItk(chain), fill=-7, order=order)
    # A nearest neighbour may tip the other way where a point lies half-way between voxels.
    assert (np.abs(by_points.array - truth) > 1e-2).mean() < 2e-3


def test_resample_keeps_a_hand_computed_shift():
    array = np.zeros((6, 6, 6), np.float32)
    array[2, 3, 4] = 100
    volume = Volume(array, Geometry((6, 6, 6), (1, 1, 1), (0, 0, 0), np.eye(3)))
    # Output point p shows the input at p + (1, 2, -1): the voxel (4, 3, 2) is seen from (3, 1, 3).
    shifted = resample(volume, volume.geometry, Rigid.from_rotation(np.eye(3), (1, 2, -1)))
    assert np.argwhere(shifted.array == 100).tolist() == [[3, 1, 3]]


def test_fill_is_air_for_ct_minimum_for_mr_and_zero_for_labels():
    volume = smooth_volume()
    far = Geometry((4, 4, 4), (1, 1, 1), (9000, 0, 0), np.eye(3))
    assert resample(volume, far).array.max() == pytest.approx(volume.minimum)
    volume.modality = "ct"
    assert resample(volume, far).array.max() == -1024
    label = Volume(np.full((4, 4, 4), 5, np.uint8), Geometry((4, 4, 4), (1, 1, 1), (0, 0, 0), np.eye(3)))
    carried = resample(label, far, order=0)
    assert carried.array.dtype == np.uint8
    assert carried.array.max() == 0


def test_mask_is_the_source_extent_and_its_edge_is_not_darkened():
    volume = Volume(np.full((4, 4, 4), 50.0), Geometry((4, 4, 4), (2, 2, 2), (0, 0, 0), np.eye(3)))
    fine = Geometry((4, 4, 20), (0.5, 2, 2), (-2, 0, 0), np.eye(3))
    for transform in (None, WithoutItk(Rigid.identity())):
        carried, mask = resample_with_mask(volume, fine, transform, fill=-1000)
        x = fine.origin[0] + 0.5 * np.arange(20)
        # Voxel edges lie at -1 and 7 mm; a centre exactly on the far edge may fall either way.
        sure = np.abs(x - 7) > 1e-6
        np.testing.assert_array_equal(mask.array[2, 2, sure], ((x >= -1) & (x <= 7))[sure])
        assert mask.array.dtype == np.uint8
        np.testing.assert_allclose(carried.array[mask.array > 0], 50)
        np.testing.assert_allclose(carried.array[mask.array == 0], -1000)


def test_antialias_smooths_only_where_the_source_is_finer():
    rng = np.random.default_rng(3)
    noise = Volume(rng.normal(0, 1, (40, 40, 40)), Geometry((40, 40, 40), (1, 1, 1), (0, 0, 0), np.eye(3)))
    coarse_x = Geometry((36, 36, 8), (5, 1, 1), (2, 2, 2), np.eye(3))
    plain, smooth = (resample(noise, coarse_x, antialias=a).array for a in (False, True))
    # White noise through a Gaussian of sigma s voxels along one axis keeps a variance of 1 / (2 sqrt(pi) s).
    sigma = np.sqrt((5.0**2 - 1) / (8 * np.log(2)))
    assert smooth.std() == pytest.approx(np.sqrt(1 / (2 * np.sqrt(np.pi) * sigma)), rel=0.05)
    assert plain.std() == pytest.approx(1, rel=0.05)
    finer = Geometry((36, 36, 36), (1, 1, 1), (2, 2, 2), np.eye(3))
    np.testing.assert_allclose(resample(noise, finer, antialias=True).array, noise.array[2:38, 2:38, 2:38], atol=1e-5)


CYCLE = np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])
"""Index axes x, y, z along P, S, L: unlike a flip or a single swap, its inverse is another matrix."""


@pytest.mark.parametrize("source_direction", [np.eye(3), CYCLE])
@pytest.mark.parametrize("along", [0, 1, 2])
def test_antialias_follows_the_rotation_between_the_grids(source_direction, along):
    array = np.zeros((21, 21, 21), np.float32)
    array[10, 10, 10] = 1
    spike = Volume(array, Geometry((21, 21, 21), (1, 1, 1), source_direction @ [-10.0, -10, -10], source_direction))
    # The target is coarse along its first axis, which looks along the patient's axis `along`.
    turned = np.roll(np.eye(3), along, axis=0)

    def value(offset):
        grid = Geometry((1, 1, 1), (6, 1, 1), offset, turned)
        return resample(spike, grid, antialias=True).array[0, 0, 0]

    sigma = np.sqrt((6.0**2 - 1) / (8 * np.log(2)))
    assert value(np.zeros(3)) == pytest.approx(1 / (np.sqrt(2 * np.pi) * sigma), rel=0.02)
    for axis in range(3):
        beside = value(np.eye(3)[axis])
        assert beside > 0.1 if axis == along else beside == pytest.approx(0, abs=1e-6)


def test_antialias_sees_the_scale_of_the_transform():
    """A map that stretches threefold along y makes the target's voxels 3 mm long there."""
    array = np.zeros((21, 21, 21), np.float32)
    array[10, 10, 10] = 1
    spike = Volume(array, Geometry((21, 21, 21), (1, 1, 1), (-10, -10, -10), np.eye(3)))
    grid = Geometry((1, 1, 1), (1, 1, 1), (0, 0, 0), np.eye(3))
    seen = resample(spike, grid, Affine(np.diag([1.0, 3, 1, 1])), antialias=True).array[0, 0, 0]
    sigma = np.sqrt((3.0**2 - 1) / (8 * np.log(2)))
    assert seen == pytest.approx(1 / (np.sqrt(2 * np.pi) * sigma), rel=0.03)


def test_sample_outside_is_fill_and_inside_the_edge_is_the_edge_value():
    volume = smooth_volume()
    index = np.array([[-0.4, 5, 5], [0, 5, 5], [-0.6, 5, 5]])
    edge, first, outside = volume.sample(volume.geometry.index_to_mm(index), fill=-5)
    assert edge == pytest.approx(first, abs=1e-3)
    assert outside == -5
