"""`uae apply` against SimpleITK: hand-made R and u, read back by SimpleITK from the same files, in both directions."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from uae.apply import apply_files, apply_to_points, apply_to_volume, load_chain
from uae.errors import CancelledError, InputError
from uae.points import read_points, write_points
from uae.transform import DisplacementField, Rigid, write_transform
from uae.volume import Geometry, Volume

FIXED = Geometry((14, 16, 18), (3, 4, 5), (-50, 30, 200), Rigid.from_euler_deg(12, -20, 8).rotation)
LINEAR = Rigid.from_euler_deg(8, -6, 14, (25, -10, 40), FIXED.center_mm())


def field(amplitude=4.0):
    """A field that vanishes at the border of its grid, as results do."""
    points = FIXED.grid_points_mm()
    index = FIXED.mm_to_index(points)
    window = np.prod(np.sin(np.pi * index / (FIXED.size - 1)), axis=1) ** 2
    u = amplitude * window[:, None] * np.sin((points - FIXED.center_mm())[:, [1, 2, 0]] / 14 + [0.4, 1.2, 2.2])
    return DisplacementField(u.reshape(*FIXED.shape, 3), FIXED)


@pytest.fixture
def result(tmp_path):
    """A result folder with rigid.tfm and displacement.nii.gz."""
    folder = tmp_path / "result"
    write_transform(folder / "rigid.tfm", LINEAR)
    write_transform(folder / "displacement.nii.gz", field())
    return folder


def by_sitk(folder):
    """x_moving = R(x + u(x)) from the files, by SimpleITK alone."""
    u = sitk.DisplacementFieldTransform(sitk.ReadImage(str(folder / "displacement.nii.gz"), sitk.sitkVectorFloat64))
    linear = sitk.ReadTransform(str(folder / "rigid.tfm"))
    return sitk.CompositeTransform([linear, u])


def fixed_points(count=60):
    index = np.random.default_rng(4).uniform(1, FIXED.size - 2, (count, 3))
    return FIXED.index_to_mm(index)


def truth(folder, points):
    transform = by_sitk(folder)
    return np.array([transform.TransformPoint(p) for p in points.tolist()])


@pytest.mark.parametrize("suffix", [".mrk.json", ".fcsv", ".csv"])
def test_points_go_both_ways_as_in_sitk(tmp_path, result, suffix):
    fixed = fixed_points()
    moving = truth(result, fixed)
    labels = [f"p{i}" for i in range(len(fixed))]
    assert np.linalg.norm(moving - LINEAR.apply(fixed), axis=1).max() > 1, "the field must matter"
    # Points lie in moving space by default, and go through the INVERSE of the file's transform.
    write_points(tmp_path / f"m{suffix}", labels, moving)
    apply_files([result], tmp_path / f"m{suffix}", tmp_path / f"f{suffix}")
    carried = read_points(tmp_path / f"f{suffix}")
    assert carried.labels == labels
    np.testing.assert_allclose(carried.points, fixed, atol=0.01)
    # --inverse: from fixed space, exactly TransformPoint.
    write_points(tmp_path / f"f2{suffix}", labels, fixed)
    apply_files([result], tmp_path / f"f2{suffix}", tmp_path / f"m2{suffix}", inverse=True)
    np.testing.assert_allclose(read_points(tmp_path / f"m2{suffix}").points, moving, atol=1e-3)


def test_listed_transforms_stand_as_a_fixed_point_meets_them(result):
    fixed = fixed_points()
    moving = truth(result, fixed)
    listed = load_chain([result / "displacement.nii.gz", result / "rigid.tfm"])
    np.testing.assert_allclose(apply_to_points(listed, fixed, inverse=True), moving, atol=1e-3)
    swapped = load_chain([result / "rigid.tfm", result / "displacement.nii.gz"])
    assert np.abs(apply_to_points(swapped, fixed, inverse=True) - moving).max() > 1
    single = load_chain([result / "rigid.tfm"])
    np.testing.assert_allclose(apply_to_points(single, LINEAR.apply(fixed)), fixed, atol=1e-6)


def moving_scan():
    geometry = Geometry((20, 22, 24), (4, 4, 4), LINEAR.apply(FIXED.center_mm())[0] - 44, np.eye(3))
    array = np.random.default_rng(7).normal(40, 200, geometry.shape)
    return Volume(array, geometry)


def test_image_onto_the_reference_as_in_sitk(tmp_path, result):
    scan = moving_scan()
    scan.write(tmp_path / "moving.nii.gz")
    Volume(np.random.default_rng(1).normal(size=FIXED.shape), FIXED).write(tmp_path / "fixed.nii.gz")
    apply_files([result], tmp_path / "moving.nii.gz", tmp_path / "out.nii.gz", reference=tmp_path / "fixed.nii.gz")
    out = Volume.read(tmp_path / "out.nii.gz")
    moving = sitk.ReadImage(str(tmp_path / "moving.nii.gz"))
    fixed = sitk.ReadImage(str(tmp_path / "fixed.nii.gz"))
    expected = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, by_sitk(result), sitk.sitkLinear, -9999.0))
    seen = expected != -9999
    assert seen.mean() > 0.3
    assert out.geometry.same_as(FIXED)
    np.testing.assert_allclose(out.array[seen], expected[seen], atol=0.05)
    assert len(np.unique(out.array[~seen])) <= 1


def test_image_the_other_way_meets_every_point_at_its_place(result):
    geometry = Geometry(FIXED.shape, FIXED.spacing, FIXED.origin, FIXED.direction)
    ramp = Volume((geometry.grid_points_mm() @ [2.0, -1.0, 0.5]).reshape(geometry.shape), geometry)
    target = moving_scan().geometry
    out = apply_to_volume(load_chain([result]), ramp, target, inverse=True, fill=np.nan)
    fixed = fixed_points()
    moving = truth(result, fixed)
    inside = target.contains(moving, margin_voxels=-1)
    assert inside.sum() > 20
    # Linear ramps are resampled without loss but for the bending of u within a voxel.
    np.testing.assert_allclose(out.sample(moving[inside]), fixed[inside] @ [2.0, -1.0, 0.5], atol=0.6)


def test_labels_are_nearest_and_zero_outside(tmp_path, result):
    scan = moving_scan()
    labels = np.random.default_rng(2).integers(1, 200, scan.geometry.shape).astype(np.uint8)
    Volume(labels, scan.geometry).write(tmp_path / "labels.nii.gz")
    # A mask lends its grid as well as an image does.
    Volume(np.ones(FIXED.shape, np.uint8), FIXED).write(tmp_path / "fixed_mask.nii.gz")
    out_path = tmp_path / "out.nii.gz"
    apply_files([result], tmp_path / "labels.nii.gz", out_path, tmp_path / "fixed_mask.nii.gz", label=True)
    out = Volume.read(out_path, label=True)
    expected = sitk.GetArrayFromImage(
        sitk.Resample(
            sitk.ReadImage(str(tmp_path / "labels.nii.gz")),
            sitk.ReadImage(str(tmp_path / "fixed_mask.nii.gz")),
            by_sitk(result),
            sitk.sitkNearestNeighbor,
            0.0,
        )
    )
    assert out.array.dtype == np.uint8
    assert (expected == 0).any()
    assert (out.array == expected).mean() > 0.999


def test_apply_refuses_what_it_cannot_use(tmp_path, result):
    scan = moving_scan()
    scan.write(tmp_path / "m.nii.gz")
    out = tmp_path / "o.nii.gz"
    with pytest.raises(InputError, match="--reference"):
        apply_files([result], tmp_path / "m.nii.gz", out)
    with pytest.raises(InputError, match="no transform"):
        apply_files([], tmp_path / "m.nii.gz", out)
    with pytest.raises(InputError, match="no such transform"):
        apply_files([tmp_path / "missing.tfm"], tmp_path / "m.nii.gz", out)
    refused = tmp_path / "refused"
    refused.mkdir()
    (refused / "report.json").write_text("{}")
    with pytest.raises(InputError, match=r"report\.json"):
        apply_files([refused], tmp_path / "m.nii.gz", out)
    write_transform(result / "affine.tfm", LINEAR)
    with pytest.raises(InputError, match="both"):
        load_chain([result])
    assert not out.exists()


def test_cancel_leaves_nothing(tmp_path, result):
    moving_scan().write(tmp_path / "m.nii.gz")
    with pytest.raises(CancelledError):
        apply_files(
            [result], tmp_path / "m.nii.gz", tmp_path / "o.nii.gz", tmp_path / "m.nii.gz", cancel=lambda: True
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.nii.gz", "result"]
