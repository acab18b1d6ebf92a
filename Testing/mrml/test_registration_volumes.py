"""Volume nodes and regions as files in the world frame, whatever their orientation and parents."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import slicer.util
from scenes import FLIPPED, add_linear, add_scan, oblique, rigid_ras

from uae.volume import Volume
from UAECommonLib.errors import UnsuitableNodeError
from UAECommonLib.mrml import array_of, flip_points, ijk_to_world_lps, write_roi_mask, write_volume

DIRECTIONS = {"axial": np.eye(3), "flipped": FLIPPED, "oblique": oblique(25, -15, 40), "swapped": np.eye(3)[[2, 0, 1]]}
MIRROR = np.diag([-1.0, 1.0, 1.0, 1.0])
SCALE = np.diag([1.1, 1.1, 1.1, 1.0])


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    "parents", [(), (rigid_ras(30, (5, 6, 7)),), (rigid_ras(30, (5, 6, 7)), MIRROR), (SCALE, rigid_ras(9, (1, 2, 3)))]
)
def test_file_geometry_is_the_world(scene, tmp_path, direction, parents):
    node = add_scan(scene, "scan", DIRECTIONS[direction], (0.7, 1.3, 4.0))
    below = node
    for number, matrix in enumerate(parents):
        parent = add_linear(scene, f"parent {number}", matrix)
        below.SetAndObserveTransformNodeID(parent.GetID())
        below = parent
    path = tmp_path / "a name with spaces äß.nrrd"
    write_volume(node, path)
    volume = Volume.read(path)
    assert np.array_equal(volume.array, slicer.util.arrayFromVolume(node))
    index = np.random.default_rng(1).uniform(0, 20, (50, 3))
    expected = index @ ijk_to_world_lps(node)[:3, :3].T + ijk_to_world_lps(node)[:3, 3]
    np.testing.assert_allclose(volume.geometry.index_to_mm(index), expected, atol=1e-5)
    # the same as hardening the parents would give
    node.HardenTransform()
    np.testing.assert_allclose(volume.geometry.matrix(), ijk_to_world_lps(node), atol=1e-5)


def test_a_shear_is_refused(scene, tmp_path):
    node = add_scan(scene, "scan", np.eye(3))
    shear = np.eye(4)
    shear[0, 1] = 0.2
    node.SetAndObserveTransformNodeID(add_linear(scene, "shear", shear).GetID())
    with pytest.raises(UnsuitableNodeError, match=r"not perpendicular.*resample"):
        write_volume(node, tmp_path / "scan.nrrd")
    assert not list(tmp_path.iterdir())


def test_an_empty_node_and_colours_are_refused(scene, tmp_path):
    empty = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "empty")
    with pytest.raises(UnsuitableNodeError, match="no voxels"):
        write_volume(empty, tmp_path / "scan.nrrd")
    colours = add_scan(scene, "colours", np.eye(3))
    colours.GetImageData().AllocateScalars(3, 3)
    with pytest.raises(UnsuitableNodeError, match="3 values"):
        array_of(colours)


def test_region_covers_exactly_its_box(scene, tmp_path):
    roi = scene.AddNewNodeByClass("vtkMRMLMarkupsROINode", "region")
    roi.SetCenter(10, 20, 30)
    roi.SetSize(40, 25, 60)
    roi.SetAndObserveTransformNodeID(add_linear(scene, "parent", rigid_ras(25, (5, -6, 7))).GetID())
    write_roi_mask(roi, tmp_path / "roi.nrrd")
    mask = Volume.read(tmp_path / "roi.nrrd", label=True)
    rng = np.random.default_rng(2)
    local = rng.uniform(-1, 1, (500, 3)) * (30, 22, 45)
    inside = np.all(np.abs(local) < (20, 12.5, 30), axis=1)
    world = local + np.array([10, 20, 30])
    world = world @ rigid_ras(25, (5, -6, 7))[:3, :3].T + rigid_ras(25, (5, -6, 7))[:3, 3]
    assert np.array_equal(mask.sample(flip_points(world), fill=0, order=0) > 0, inside)


def test_written_file_keeps_integers(scene, tmp_path):
    node = add_scan(scene, "scan", np.eye(3))
    write_volume(node, tmp_path / "scan.nrrd")
    assert sitk.ReadImage(str(tmp_path / "scan.nrrd")).GetPixelID() == sitk.sitkInt16
