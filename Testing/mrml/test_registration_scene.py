"""Results as nodes: transforms equal SimpleITK's, nothing but the moving scan moves, undo, outdated, .mrb."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import slicer
import vtk
from scenes import (
    FLIPPED,
    add_linear,
    add_scan,
    itk_transform,
    known_transforms,
    oblique,
    rigid_ras,
    transform_matrices,
    world_positions,
    write_result_folder,
)

from UAECommonLib import result_nodes
from UAECommonLib.errors import UnsuitableNodeError
from UAECommonLib.mrml import flip_points, ijk_to_world_lps, roi_fingerprint, write_volume
from UAERegistrationLib.logic import UAERegistrationLogic


@pytest.fixture
def pair(scene):
    """Fixed (oblique) and moving (flipped) scans without parents."""
    return add_scan(scene, "CT", oblique(10, -20, 5)), add_scan(scene, "MR", FLIPPED, (1.5, 1.5, 5.0), (24, 26, 12))


def placed(scene, pair, folder):
    return result_nodes.place(scene, result_nodes.read_result(folder), *pair)


def from_world(result, points_lps):
    """World fixed points (LPS) through the nodes to where the moving scan stood before."""
    top = result.grid or result.linear
    chain = vtk.vtkGeneralTransform()
    result.linear.GetTransformFromWorld(chain)
    assert top.GetParentTransformNode() is None
    return flip_points([chain.TransformPoint(p) for p in flip_points(points_lps)])


def grid_points(count=400):
    _, field = known_transforms()
    rng = np.random.default_rng(3)
    index = rng.uniform(0, 1, (count, 3)) * (field.geometry.size - 1)
    return field.geometry.index_to_mm(index)


def index_points(volume, matrix):
    corners = np.array([[0, 0, 0, 1], [10, 5, 3, 1], [2, 9, 8, 1]], dtype=float)
    return (corners @ matrix.T)[:, :3]


def test_transform_nodes_equal_simpleitk(scene, pair, tmp_path):
    folder = write_result_folder(tmp_path / "result")
    result = placed(scene, pair, folder)
    reference = itk_transform(folder)
    points = grid_points()
    expected = np.array([reference.TransformPoint(p) for p in points.tolist()])
    assert np.abs(from_world(result, points) - expected).max() < 0.01
    # and back: where the moving scan's points are shown
    to_world = vtk.vtkGeneralTransform()
    result.linear.GetTransformToWorld(to_world)
    back = flip_points([to_world.TransformPoint(p) for p in flip_points(expected)])
    assert np.abs(back - points).max() < 0.01


def test_grid_node_is_continuous_at_its_border(scene, pair, tmp_path):
    result = placed(scene, pair, write_result_folder(tmp_path / "result"))
    _, field = known_transforms()
    size = field.geometry.size
    rng = np.random.default_rng(5)
    for axis in range(3):
        for end in (0, size[axis] - 1):
            index = rng.uniform(0, 1, (40, 3)) * (size - 1)
            steps = []
            for beyond in (-0.01, 0.01, 0.49, 0.51, 3.0):
                index[:, axis] = end + (beyond if end else -beyond)
                points = field.geometry.index_to_mm(index)
                rigid = known_transforms()[0].apply(points)
                steps.append(np.abs(from_world(result, points) - rigid).max())
            assert max(steps) < 0.05, (axis, end, steps)


@pytest.mark.parametrize("endings", [(".h5", ".h5"), (".tfm", ".tfm"), (".tfm", ".nrrd")])
def test_saved_transform_nodes_are_read_by_simpleitk(headless, scene, pair, tmp_path, endings):
    folder = write_result_folder(tmp_path / "result")
    result = placed(scene, pair, folder)
    chain = sitk.CompositeTransform(3)
    chain.AddTransform(sitk.ReadTransform(str(headless.save(result.linear, tmp_path / f"linear{endings[0]}"))))
    saved = str(headless.save(result.grid, tmp_path / f"grid{endings[1]}"))
    if endings[1] == ".nrrd":
        chain.AddTransform(sitk.DisplacementFieldTransform(sitk.ReadImage(saved, sitk.sitkVectorFloat64)))
    else:
        chain.AddTransform(sitk.ReadTransform(saved))
    reference = itk_transform(folder)
    points = grid_points(100).tolist()
    difference = [np.subtract(chain.TransformPoint(p), reference.TransformPoint(p)) for p in points]
    assert np.abs(difference).max() < 1e-3


@pytest.mark.parametrize("parents", ["none", "own", "own chain", "shared", "shared with fixed", "inner shared"])
@pytest.mark.parametrize("deformable", [False, True])
def test_only_the_moving_scan_moves(scene, pair, tmp_path, parents, deformable):
    fixed, moving = pair
    outer = add_linear(scene, "outer", rigid_ras(20, (5, 6, 7)))
    inner = add_linear(scene, "inner", rigid_ras(-35, (50, -10, 30)))
    points = scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "points")
    points.AddControlPoint(1, 2, 3)
    fixed.SetAndObserveTransformNodeID(add_linear(scene, "of fixed", rigid_ras(12, (1, 2, 3))).GetID())
    if parents == "own":
        moving.SetAndObserveTransformNodeID(outer.GetID())
    elif parents != "none":
        inner.SetAndObserveTransformNodeID(outer.GetID())
        moving.SetAndObserveTransformNodeID(inner.GetID())
    other = {"shared": points, "shared with fixed": fixed, "inner shared": points}.get(parents)
    if other is not None:
        other.SetAndObserveTransformNodeID((inner if parents == "inner shared" else outer).GetID())
    positions, matrices = world_positions(scene), transform_matrices(scene)
    before = ijk_to_world_lps(moving)
    parent = moving.GetParentTransformNode()
    count = scene.GetNumberOfNodes()

    folder = write_result_folder(tmp_path / "result", deformable)
    result = placed(scene, pair, folder)
    shared = parents.endswith(("shared", "fixed"))
    assert (result.copy is not None) == shared
    after, kept = world_positions(scene), transform_matrices(scene)
    for node_id, place in positions.items():
        if node_id != moving.GetID():
            np.testing.assert_allclose(after[node_id], place, atol=1e-9)
    assert {key: kept[key] for key in matrices} == matrices
    # the moving scan stands where the transform says: x_fixed with R(x + u) = its old place
    old = index_points(moving, before)
    ijk = vtk.vtkMatrix4x4()
    moving.GetIJKToRASMatrix(ijk)
    own = np.array([ijk.MultiplyPoint((*p, 1.0))[:3] for p in ([0, 0, 0], [10, 5, 3], [2, 9, 8])])
    to_world = vtk.vtkGeneralTransform()
    moving.GetParentTransformNode().GetTransformToWorld(to_world)
    shown = flip_points([to_world.TransformPoint(p) for p in own])
    reference = itk_transform(folder)
    assert np.abs(np.array([reference.TransformPoint(p) for p in shown.tolist()]) - old).max() < 0.01

    logic = UAERegistrationLogic(scene)
    logic.show(result.linear, withLinear=False, withDeformable=False)
    np.testing.assert_allclose(ijk_to_world_lps(moving), before, atol=1e-9)
    logic.show(result.linear, withDeformable=False)
    rigid_only = flip_points([_world(moving, p) for p in own])
    np.testing.assert_allclose(known_transforms()[0].apply(rigid_only), old, atol=1e-6)
    logic.show(result.linear)
    logic.undo(result.linear)
    assert moving.GetParentTransformNode() is parent
    np.testing.assert_allclose(ijk_to_world_lps(moving), before, atol=1e-12)
    assert transform_matrices(scene) == matrices
    assert scene.GetNumberOfNodes() == count


def _world(node, point):
    to_world = vtk.vtkGeneralTransform()
    node.GetParentTransformNode().GetTransformToWorld(to_world)
    return to_world.TransformPoint(*point)


def test_a_second_result_takes_the_place_of_the_first(scene, pair, tmp_path):
    fixed, moving = pair
    parent = add_linear(scene, "shared", rigid_ras(20, (5, 6, 7)))
    for node in (fixed, moving):
        node.SetAndObserveTransformNodeID(parent.GetID())
    before = ijk_to_world_lps(moving)
    first = placed(scene, pair, write_result_folder(tmp_path / "first"))
    second = placed(scene, pair, write_result_folder(tmp_path / "second", deformable=False))
    assert moving.GetParentTransformNode() is first.copy
    assert first.copy.GetParentTransformNode() is second.linear
    assert "replaced" in result_nodes.outdated_reason(first.linear)
    assert result_nodes.outdated_reason(second.linear) == ""
    result_nodes.undo(scene, second.linear)
    assert moving.GetParentTransformNode() is parent
    np.testing.assert_allclose(ijk_to_world_lps(moving), before, atol=1e-12)


@pytest.mark.parametrize("change", ["move fixed", "move fixed's parent", "voxels", "new parent", "harden", "remove"])
def test_a_changed_input_marks_the_result_as_outdated(scene, pair, tmp_path, change):
    fixed, moving = pair
    parent = add_linear(scene, "of fixed", np.eye(4))
    own = add_linear(scene, "of moving", rigid_ras(10, (1, 1, 1)))
    fixed.SetAndObserveTransformNodeID(parent.GetID())
    moving.SetAndObserveTransformNodeID(own.GetID())
    result = placed(scene, pair, write_result_folder(tmp_path / "result"))
    logic, told = UAERegistrationLogic(scene), []
    logic.observe(result.linear, told.append)
    logic.show(result.linear, withLinear=False, withDeformable=False)
    logic.show(result.linear)
    assert logic.outdated(result.linear) == "" and not told
    if change == "move fixed":
        fixed.SetAndObserveTransformNodeID(None)
        fixed.SetOrigin(1, 2, 3)
    elif change == "move fixed's parent":
        parent.SetMatrixTransformToParent(_shift(5))
    elif change == "voxels":
        slicer.util.arrayFromVolume(moving)[5, 5, 5] += 1  # one voxel in thousands: its event tells
        slicer.util.arrayFromVolumeModified(moving)
    elif change == "new parent":
        own.SetMatrixTransformToParent(_shift(7))
    elif change == "harden":
        moving.HardenTransform()
    else:
        scene.RemoveNode(fixed)
    assert logic.outdated(result.linear)
    assert told or change == "remove"
    logic.close()


@pytest.mark.parametrize("change", ["size", "place", "parent", "remove"])
def test_a_changed_region_marks_the_result_as_outdated(scene, pair, tmp_path, change):
    roi = scene.AddNewNodeByClass("vtkMRMLMarkupsROINode", "region")
    roi.SetCenter(10, 20, 30)
    roi.SetSize(40, 25, 60)
    parent = add_linear(scene, "of region", np.eye(4))
    roi.SetAndObserveTransformNodeID(parent.GetID())
    result = placed(scene, pair, write_result_folder(tmp_path / "result"))
    result_nodes.note_region(result.linear, roi, roi_fingerprint(roi))
    logic, told = UAERegistrationLogic(scene), []
    logic.observe(result.linear, told.append)
    roi.SetName("renamed")
    assert logic.outdated(result.linear) == "" and not told
    if change == "size":
        roi.SetSize(40, 25, 61)
    elif change == "place":
        roi.SetCenter(11, 20, 30)
    elif change == "parent":
        parent.SetMatrixTransformToParent(_shift(5))
    else:
        scene.RemoveNode(roi)
    assert "region" in logic.outdated(result.linear)
    assert told or change == "remove"
    logic.close()


def _shift(mm):
    matrix = vtk.vtkMatrix4x4()
    matrix.SetElement(0, 3, mm)
    return matrix


def test_the_checkerboard_is_one_volume_that_goes_with_undo(scene, pair, tmp_path):
    fixed, moving = pair
    files = result_nodes.read_result(write_result_folder(tmp_path / "result"))
    write_volume(fixed, tmp_path / "fixed.nrrd")
    files.image = sitk.ReadImage(str(tmp_path / "fixed.nrrd"))
    result = result_nodes.place(scene, files, fixed, moving)
    logic, count = UAERegistrationLogic(scene), scene.GetNumberOfNodesByClass("vtkMRMLScalarVolumeNode")
    first = logic.checkerboard(result.linear)
    second = logic.checkerboard(result.linear)
    assert first.GetScene() is None and second.GetScene() is scene
    assert scene.GetNumberOfNodesByClass("vtkMRMLScalarVolumeNode") == count + 1
    logic.undo(result.linear)
    assert scene.GetNumberOfNodesByClass("vtkMRMLScalarVolumeNode") == 2
    plain = placed(scene, pair, write_result_folder(tmp_path / "plain"))
    with pytest.raises(UnsuitableNodeError, match="resampled"):
        logic.checkerboard(plain.linear)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
@pytest.mark.parametrize("parents", ["none", "own", "shared"])
def test_undo_in_any_order_leaves_nothing(scene, pair, tmp_path, order, parents):
    moving = pair[1]
    parent = add_linear(scene, "P", rigid_ras(20, (5, 6, 7)))
    for node in {"none": (), "own": (moving,), "shared": pair}[parents]:
        node.SetAndObserveTransformNodeID(parent.GetID())
    before = (node_ids(scene), world_positions(scene), transform_matrices(scene))
    results = [placed(scene, pair, write_result_folder(tmp_path / str(number), number != 1)) for number in range(3)]
    for number in order:
        result_nodes.undo(scene, results[number].linear)
    assert (node_ids(scene), world_positions(scene), transform_matrices(scene)) == before


def node_ids(scene):
    return sorted(scene.GetNthNode(index).GetID() for index in range(scene.GetNumberOfNodes()))


def test_undo_keeps_a_transform_that_carries_others_but_no_result(scene, pair, tmp_path):
    result = placed(scene, pair, write_result_folder(tmp_path / "result", deformable=False))
    other = add_scan(scene, "other", np.eye(3))
    other.SetAndObserveTransformNodeID(result.linear.GetID())
    before = world_positions(scene)[other.GetID()]
    result_nodes.undo(scene, result.linear)
    assert world_positions(scene)[other.GetID()] == before and not result_nodes.find_results(scene)


@pytest.mark.parametrize("change", ["matrix", "above", "above the scan", "below"])
def test_a_result_that_was_changed_by_hand_is_outdated(scene, pair, tmp_path, change):
    moving = pair[1]
    result = placed(scene, pair, write_result_folder(tmp_path / "result"))
    logic, told = UAERegistrationLogic(scene), []
    logic.observe(result.linear, told.append)
    foreign = add_linear(scene, "foreign", rigid_ras(3, (1, 2, 3)))
    if change == "matrix":
        result.linear.SetMatrixTransformToParent(_shift(2))
    elif change == "above":
        result.grid.SetAndObserveTransformNodeID(foreign.GetID())
    elif change == "above the scan":
        moving.SetAndObserveTransformNodeID(foreign.GetID())
    else:
        foreign.SetAndObserveTransformNodeID(result.linear.GetID())
        moving.SetAndObserveTransformNodeID(foreign.GetID())
    assert logic.outdated(result.linear) and told
    logic.close()


def test_align_again_with_only_the_deformable_part_on(scene, pair, tmp_path):
    moving = pair[1]
    first = placed(scene, pair, write_result_folder(tmp_path / "1"))
    result_nodes.show(first.linear, with_linear=False)
    assert result_nodes.top_of(moving) is moving
    second = placed(scene, pair, write_result_folder(tmp_path / "2", deformable=False))
    assert moving.GetParentTransformNode() is second.linear and second.linear.GetParentTransformNode() is None
    assert "replaced" in result_nodes.outdated_reason(first.linear)


def test_a_parent_that_others_joined_later_stays_in_its_place(scene, pair, tmp_path):
    moving = pair[1]
    parent = add_linear(scene, "P", rigid_ras(20, (5, 6, 7)))
    moving.SetAndObserveTransformNodeID(parent.GetID())
    placed(scene, pair, write_result_folder(tmp_path / "1", deformable=False))
    other = add_scan(scene, "other", np.eye(3))
    other.SetAndObserveTransformNodeID(parent.GetID())
    before = world_positions(scene)[other.GetID()]
    aligned = world_positions(scene)[moving.GetID()]
    second = placed(scene, pair, write_result_folder(tmp_path / "2", deformable=False))
    after = world_positions(scene)
    assert after[other.GetID()] == before and second.copy is not None
    np.testing.assert_allclose(after[moving.GetID()], aligned, atol=1e-9)
    result_nodes.undo(scene, second.linear)
    assert moving.GetParentTransformNode() is parent


def test_there_and_back_undone_in_order(scene, pair, tmp_path):
    parent = add_linear(scene, "P", rigid_ras(20, (5, 6, 7)))
    for node in pair:
        node.SetAndObserveTransformNodeID(parent.GetID())
    before = world_positions(scene)
    first = placed(scene, pair, write_result_folder(tmp_path / "1", deformable=False))
    second = placed(scene, pair[::-1], write_result_folder(tmp_path / "2", deformable=False))
    result_nodes.undo(scene, first.linear)
    assert world_positions(scene)[pair[1].GetID()] == before[pair[1].GetID()]
    result_nodes.undo(scene, second.linear)
    assert world_positions(scene) == before and not result_nodes.find_results(scene)


def test_a_foreign_non_linear_parent_is_refused(scene, pair, tmp_path):
    moving = pair[1]
    first = placed(scene, pair, write_result_folder(tmp_path / "result"))
    first.linear.SetAttribute(result_nodes.KIND, "")  # now it is anybody's
    with pytest.raises(UnsuitableNodeError, match="harden"):
        placed(scene, pair, tmp_path / "result")
    assert moving.GetParentTransformNode() is first.linear


def test_a_refused_folder_adds_nothing(scene, pair, tmp_path):
    count = scene.GetNumberOfNodes()
    with pytest.raises(UnsuitableNodeError, match="refused"):
        placed(scene, pair, write_result_folder(tmp_path / "result", status="refused"))
    assert scene.GetNumberOfNodes() == count


def test_saved_scene_comes_back(headless, scene, pair, tmp_path):
    fixed, moving = pair
    shared = add_linear(scene, "shared", rigid_ras(20, (5, 6, 7)))
    for node in (fixed, moving):
        node.SetAndObserveTransformNodeID(shared.GetID())
    folder = write_result_folder(tmp_path / "result")
    result = placed(scene, pair, folder)
    before = world_positions(scene)[moving.GetID()]
    headless.load_scene(headless.save_scene(tmp_path / "scene.mrb"))

    (linear,) = result_nodes.find_results(scene)
    logic = UAERegistrationLogic(scene)
    logic.afterSceneLoaded()
    back = result_nodes.nodes_of(linear)
    fixed, moving = headless.node("CT"), headless.node("MR")
    assert linear.GetNodeReference(result_nodes.MOVING) is moving
    assert linear.GetNodeReference(result_nodes.FIXED) is fixed
    assert moving.GetParentTransformNode() is back.copy and linear.GetParentTransformNode() is back.grid
    assert back.figures["status"] == "accepted"
    assert logic.outdated(linear) == ""
    np.testing.assert_allclose(world_positions(scene)[moving.GetID()], before, atol=1e-3)
    points = grid_points(100)
    reference = itk_transform(folder)
    expected = np.array([reference.TransformPoint(p) for p in points.tolist()])
    assert np.abs(from_world(back, points) - expected).max() < 0.01
    logic.undo(linear)
    assert moving.GetParentTransformNode() is headless.node("shared")
    assert not result_nodes.find_results(scene)
    del result
