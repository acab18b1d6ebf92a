"""Registration jobs with a real child process: refusal, cancel, kill, a changed scene, the shipped model."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from scenes import add_linear, rigid_ras, transform_matrices, world_positions

from uae.errors import CancelledError, InputError, UAEError
from UAECommonLib import result_nodes
from UAECommonLib.mrml import add_volume, vtk_matrix, world_matrix
from UAERegistrationLib.job import FOLDER_PREFIX
from UAERegistrationLib.logic import RegistrationOptions, UAERegistrationLogic

KILLS = 20


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Temporary folders of the jobs lie here, below a name with spaces and letters beyond ASCII."""
    folder = tmp_path / "tmp äß 文"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def pair(scene):
    """Two small scans that cannot be matched, the moving one under a parent."""
    fixed, moving = (add_volume(scene, torso(seed), name) for seed, name in ((0, "CT ä"), (1, "CT 2")))
    moving.SetAndObserveTransformNodeID(add_linear(scene, "parent", rigid_ras(20, (5, 6, 7))).GetID())
    return fixed, moving


def torso(seed):
    import SimpleITK as sitk

    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in (30, 40, 44)), indexing="ij")
    hu = np.where((x / 0.85) ** 2 + (y / 0.75) ** 2 + 0 * z < 1, 40.0, -1000.0) + rng.normal(0, 12, x.shape)
    image = sitk.GetImageFromArray(hu.astype(np.int16))
    image.SetSpacing((5, 5, 6))
    return image


def state(scene):
    nodes = [scene.GetNthNode(index).GetID() for index in range(scene.GetNumberOfNodes())]
    return nodes, world_positions(scene), transform_matrices(scene)


def left_over(temporary):
    return [path for path in Path(temporary).iterdir() if path.name.startswith(FOLDER_PREFIX)]


def options(tiny_model, **choices):
    return RegistrationOptions(
        model=str(tiny_model), fixedModality="ct", movingModality="ct", device="cpu", extra=("--no-cache",), **choices
    )


def test_a_refusal_leaves_the_scene_as_it_was(scene, pair, tiny_model, temporary):
    logic, before = UAERegistrationLogic(scene), state(scene)
    stages = []
    outcome = logic.register(
        *pair, model=str(tiny_model), fixedModality="ct", movingModality="ct", device="cpu",
        onProgress=lambda stage, percent, left: stages.append(stage),
    )  # fmt: skip
    assert outcome.status == "refused" and outcome.reason and outcome.nodes is None
    assert outcome.report["inputs"]["fixed"]["file"] == "CT ä"
    assert any(stage.startswith("embed") for stage in stages), stages
    assert state(scene) == before and not left_over(temporary)


@pytest.mark.parametrize(
    ("choices", "words"),
    [({"preset": "magic"}, "preset"), ({"fixedModality": "pet"}, "modality"), ({"device": "tpu"}, "device")],
)
def test_bad_choices_are_explained(scene, pair, tiny_model, temporary, choices, words):
    before = state(scene)
    with pytest.raises(UAEError, match=words):
        UAERegistrationLogic(scene).register(*pair, model=str(tiny_model), **{"movingModality": "ct", **choices})
    assert state(scene) == before and not left_over(temporary)


def test_wrong_scans_are_explained(scene, pair):
    logic = UAERegistrationLogic(scene)
    for arguments, words in (((pair[0], pair[0]), "same scan"), ((pair[0], None), "choose the moving")):
        with pytest.raises(InputError, match=words):
            logic.register(*arguments)
    scene.RemoveNode(pair[1])
    with pytest.raises(InputError, match="choose the moving"):
        logic.register(*pair)


def test_a_missing_gpu_falls_back_to_the_cpu(scene, pair, tiny_model):
    log = []
    outcome = UAERegistrationLogic(scene).register(
        *pair, model=str(tiny_model), fixedModality="ct", movingModality="ct", device="cuda:97", onLog=log.append
    )
    assert outcome.status == "refused" and outcome.report["device"].startswith("cpu")
    assert any("Now on the CPU: expect about " in line for line in log)


def test_cancel(scene, pair, tiny_model, temporary):
    logic, before, ended, stages = UAERegistrationLogic(scene), state(scene), [], []
    logic.start(*pair, options(tiny_model), ended.append, lambda *progress: stages.append(progress))
    with pytest.raises(InputError, match="already"):
        logic.start(*pair, options(tiny_model))
    logic.runner.wait(lambda: bool(stages), timeout=120)
    logic.cancel()
    assert logic.runner.wait(lambda: bool(ended), timeout=30)
    assert ended[0].status == "cancelled" and isinstance(ended[0].error, CancelledError)
    assert not logic.running and state(scene) == before and not left_over(temporary)


def test_kill_the_child_at_random_moments(scene, pair, tiny_model, temporary):
    logic, before = UAERegistrationLogic(scene), state(scene)
    rng = np.random.default_rng(7)
    for _ in range(KILLS):
        ended = []
        logic.start(*pair, options(tiny_model), ended.append)
        end = time.monotonic() + rng.uniform(0.0, 6.0)
        logic.runner.wait(lambda ended=ended, end=end: bool(ended) or time.monotonic() > end)
        if not ended:
            os.kill(logic.runner._process.pid, signal.SIGKILL)
        assert logic.runner.wait(lambda ended=ended: bool(ended), timeout=30)
        assert ended[0].status in ("failed", "refused")
        assert ended[0].status == "refused" or "ended unexpectedly" in ended[0].reason
        assert not logic.running and state(scene) == before and not left_over(temporary)
    assert logic.register(*pair, model=str(tiny_model), fixedModality="ct", movingModality="ct").status == "refused"


def test_closing_the_module_ends_the_child(scene, pair, tiny_model, temporary):
    logic, before = UAERegistrationLogic(scene), state(scene)
    logic.start(*pair, options(tiny_model))
    process = logic.runner._process
    logic.close()
    assert process.poll() is not None
    assert not logic.running and state(scene) == before and not left_over(temporary)


SCANS = (("fixed", "CT"), ("moving", "MR"))


@pytest.fixture(scope="module")
def phantom():
    """A CT and an MR of one body with a known map."""
    from uae.phantom import phantom_pair

    return phantom_pair(200_003, fixed_spacing=3.0, moving_spacing=(2.5, 2.5, 5.0))


def scans(scene, phantom):
    """The phantom in the scene: both scans under a shared parent, the moving one also under one of its own."""
    fixed, moving = add_volume(scene, phantom.fixed.to_sitk(), "CT"), add_volume(scene, phantom.moving.to_sitk(), "MR")
    shared, own = (
        add_linear(scene, "shared", rigid_ras(10, (9, 8, 7))),
        add_linear(scene, "own", rigid_ras(5, (1, 2, 3))),
    )
    for node, parent in ((fixed, shared), (own, shared), (moving, own)):
        node.SetAndObserveTransformNodeID(parent.GetID())
    return fixed, moving


def documented_example():
    """The code of Docs/user/registration-console.md."""
    text = (Path(__file__).resolve().parents[2] / "Docs" / "user" / "registration-console.md").read_text("utf-8")
    return text.split("```python\n")[1].split("```")[0]


def landmark_errors(phantom, fixed_to_world, moving):
    """Distances (N,) mm in the world between where the moving scan's landmarks are shown and the fixed scan's."""
    marks = [(phantom.fixed_landmarks[name], place) for name, place in phantom.moving_landmarks.items()]
    fixed, shown = (np.array(places) * (-1, -1, 1) for places in zip(*marks))
    markups = moving.GetScene().AddNewNodeByClass("vtkMRMLMarkupsFiducialNode")
    for place in shown:
        markups.AddControlPoint(*place)
    markups.SetAndObserveTransformNodeID(moving.GetTransformNodeID())
    shown = np.array([markups.GetNthControlPointPositionWorld(index) for index in range(len(shown))])
    moving.GetScene().RemoveNode(markups)
    return np.linalg.norm(shown - (np.c_[fixed, np.ones(len(fixed))] @ fixed_to_world.T)[:, :3], axis=1)


def test_the_deformable_preset_follows_the_body_and_can_be_switched_off(scene, phantom, temporary):
    fixed, moving = scans(scene, phantom)
    frame, positions = world_matrix(fixed), world_positions(scene)
    logic = UAERegistrationLogic(scene)
    outcome = logic.register(fixed, moving, preset="deformable")
    assert outcome.status in ("accepted", "review"), outcome.reason
    linear, grid = outcome.nodes.linear, outcome.nodes.grid
    assert linear.GetParentTransformNode() is grid and not left_over(temporary)
    logic.show(linear, withDeformable=False)
    rigid = landmark_errors(phantom, frame, moving)
    logic.show(linear)
    deformable = landmark_errors(phantom, frame, moving)
    assert np.median(deformable) < np.median(rigid) and np.median(deformable) < phantom.rigid_floor_mm
    assert outcome.report["deformable"]["folding"] == 0.0
    logic.undo(linear)
    assert world_positions(scene) == positions


def test_phantom_pair_with_the_shipped_model_as_documented(scene, phantom, temporary):
    fixed, moving = scans(scene, phantom)
    frame = world_matrix(fixed)
    positions, matrices = world_positions(scene), transform_matrices(scene)
    names = {"planningCT": fixed, "mr": moving}
    exec(documented_example(), names)
    outcome = names["outcome"]
    assert outcome.status in ("accepted", "review"), outcome.reason
    assert not left_over(temporary)
    after, kept = world_positions(scene), transform_matrices(scene)
    assert all(np.allclose(after[key], positions[key]) for key in positions if key != moving.GetID())
    assert {key: kept[key] for key in matrices} == matrices
    errors = landmark_errors(phantom, frame, moving)
    assert np.median(errors) < phantom.rigid_floor_mm + 3.0, errors
    assert outcome.nodes.image.GetImageData().GetDimensions() == fixed.GetImageData().GetDimensions()
    assert result_nodes.outdated_reason(outcome.nodes.linear) == ""
    assert outcome.nodes.figures["device"]


@pytest.mark.parametrize("edit", ["remove", "move", "close"])
def test_a_scene_edited_meanwhile_keeps_its_edit(scene, phantom, temporary, edit):
    fixed, moving = scans(scene, phantom)
    logic, ended, stages = UAERegistrationLogic(scene), [], []
    quick = RegistrationOptions(extra=("--no-refine",))
    logic.start(fixed, moving, quick, ended.append, lambda *progress: stages.append(progress))
    logic.runner.wait(lambda: bool(stages), timeout=120)
    if edit == "remove":
        scene.RemoveNode(moving)
    elif edit == "move":
        moving.GetParentTransformNode().SetMatrixTransformToParent(vtk_matrix(rigid_ras(8, (1, 2, 3))))
    else:
        scene.Clear(False)
    before = state(scene)
    assert logic.runner.wait(lambda: bool(ended), timeout=600)
    assert ended[0].status == "failed" and "dropped" in ended[0].reason
    assert state(scene) == before and not left_over(temporary)
