"""The panel's wiring on stand-ins of Qt: choices, Align and Cancel, results, before and after, a closed scene."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import slicer
from scenes import add_scan, write_result_folder

from UAECommonLib import result_nodes
from UAECommonLib.mrml import add_volume


@pytest.fixture
def widget(application, monkeypatch):
    """The panel of an opened module."""
    from UAECommonLib import panel as shared
    from UAERegistrationLib import widget as module

    monkeypatch.setattr(shared, "list_devices", lambda found: found({"cpu": "cpu (test)", "cuda:0": "cuda:0 (test)"}))
    panel = module.UAERegistrationWidget()
    panel.setup()
    yield panel
    panel.cleanup()


def torso(name, seed=0):
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in (30, 40, 44)), indexing="ij")
    hu = np.where((x / 0.85) ** 2 + (y / 0.75) ** 2 + 0 * z < 1, 40.0, -1000.0) + rng.normal(0, 12, x.shape)
    image = sitk.GetImageFromArray(hu.astype(np.int16))
    image.SetSpacing((5, 5, 6))
    return add_volume(slicer.mrmlScene, image, name)


def choose(widget):
    fixed, moving = torso("CT"), torso("MR", 1)
    widget.ui.fixedSelector.setCurrentNode(fixed)
    widget.ui.movingSelector.setCurrentNode(moving)
    return fixed, moving


def finish(widget, folder, fixed, moving):
    """What a job tells the panel when it ends with a result folder."""
    from UAERegistrationLib.logic import Outcome

    files = result_nodes.read_result(folder)
    nodes = result_nodes.place(slicer.mrmlScene, files, fixed, moving)
    widget.onFinished(Outcome("accepted", "made by a test", files.report, nodes, scans=(fixed, moving)))
    return nodes


def test_align_says_what_is_missing(widget):
    assert not widget.ui.alignButton.enabled and "Choose" in widget.ui.alignButton.toolTip
    scan = torso("CT")
    widget.ui.fixedSelector.setCurrentNode(scan)
    widget.ui.movingSelector.setCurrentNode(scan)
    assert not widget.ui.alignButton.enabled and "same" in widget.ui.alignButton.toolTip
    widget.ui.movingSelector.setCurrentNode(torso("MR", 1))
    assert widget.ui.alignButton.enabled
    assert widget.ui.fixedModalityComboBox.itemText(0) == "Automatic: CT"
    assert "Hounsfield" in widget.ui.fixedModalityComboBox.toolTip


def test_choices_are_kept_in_the_scene(widget, headless, tmp_path):
    fixed, _ = choose(widget)
    widget.ui.presetComboBox.setCurrentIndex(2)
    widget.ui.deviceComboBox.setCurrentIndex(widget.ui.deviceComboBox.findData("cuda:0"))
    widget.ui.resampleCheckBox.checked = True
    widget.ui.movingModalityComboBox.setCurrentIndex(2)
    parameters = widget.parameters
    assert (parameters.preset.value, parameters.device, parameters.resample) == ("deformable", "cuda:0", True)
    assert parameters.fixedVolume is fixed and parameters.movingModality.value == "mr"
    headless.load_scene(headless.save_scene(tmp_path / "scene.mrb"))
    assert widget.parameters.preset.value == "deformable" and widget.parameters.fixedVolume is headless.node("CT")
    assert widget.ui.fixedSelector.currentNode() is headless.node("CT")
    assert widget.ui.deviceComboBox.currentData == "cuda:0" and widget.ui.resampleCheckBox.checked


def test_align_turns_into_cancel(widget, tiny_model, application, monkeypatch):
    choose(widget)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    widget.ui.deviceComboBox.setCurrentIndex(widget.ui.deviceComboBox.findData("cpu"))
    widget.ui.alignButton.click()
    assert not application.errors
    assert widget.logic.running and widget.ui.alignButton.text == "Cancel" and widget.ui.progressBar.visible
    widget.ui.alignButton.click()
    assert widget.logic.runner.wait(timeout=60)
    assert not widget.logic.running and widget.ui.alignButton.text == "Align" and not widget.ui.progressBar.visible
    assert "cancelled" in widget.ui.stageLabel.text and not application.errors


def test_torch_is_asked_for_and_not_forced(widget, application, monkeypatch):
    choose(widget)
    monkeypatch.setattr("UAECommonLib.torch_offer.torch_is_here", lambda: False)
    application.answers = [False]
    widget.ui.alignButton.click()
    assert not widget.logic.running and "PyTorch" in application.errors[0]
    assert widget.ui.alignButton.text == "Align" and widget.ui.alignButton.enabled


def test_result_is_shown_switched_and_undone(widget, tmp_path):
    fixed, moving = choose(widget)
    nodes = finish(widget, write_result_folder(tmp_path / "result"), fixed, moving)
    assert widget.ui.verdictLabel.text.startswith("ACCEPTED")
    assert "Held-out" in widget.ui.qualityTextBrowser.html and widget.ui.gridCheckBox.enabled
    assert widget.ui.linearCheckBox.checked and widget.ui.gridCheckBox.checked
    widget.ui.gridCheckBox.click()
    assert nodes.linear.GetParentTransformNode() is None and moving.GetParentTransformNode() is nodes.linear
    widget.ui.linearCheckBox.click()
    assert moving.GetParentTransformNode() is None
    widget.ui.linearCheckBox.click()
    widget.ui.gridCheckBox.click()
    assert nodes.linear.GetParentTransformNode() is nodes.grid
    slicer.util.arrayFromVolume(moving)[3, 3, 3] += 1
    slicer.util.arrayFromVolumeModified(moving)
    assert "OUTDATED" in widget.ui.qualityTextBrowser.html
    widget.ui.undoButton.click()
    assert moving.GetParentTransformNode() is None and not result_nodes.find_results(slicer.mrmlScene)
    assert not widget.ui.resultCollapsibleButton.enabled


def test_refusal_is_shown_with_its_reason(widget):
    from UAERegistrationLib.logic import Outcome

    scans = choose(widget)
    report = {"status": "refused", "reason": "too few matches agree", "matches": {"mutual": 12, "inliers": 3}}
    widget.onFinished(Outcome("refused", report["reason"], report, scans=scans))
    assert widget.ui.verdictLabel.text == "REFUSED: too few matches agree"
    assert widget.parameters.result is None and "12" in widget.ui.qualityTextBrowser.html
    widget.ui.resampleCheckBox.click()
    assert widget.ui.verdictLabel.text.startswith("REFUSED") and widget.ui.resultCollapsibleButton.enabled
    assert not widget.ui.undoButton.enabled and not widget.ui.linearCheckBox.enabled
    widget.updateGui()
    assert widget.ui.verdictLabel.text.startswith("REFUSED")
    widget.ui.movingSelector.setCurrentNode(torso("another MR", 2))
    assert "REFUSED" not in widget.ui.verdictLabel.text


def test_a_doubtful_scan_is_named_before_anything_runs(widget, application):
    fixed, _ = choose(widget)
    slicer.util.arrayFromVolume(fixed)[:] = 7
    slicer.util.arrayFromVolumeModified(fixed)
    widget.ui.alignButton.click()
    assert not widget.logic.running and len(application.errors) == 1
    assert "whether CT is CT or MR is doubtful" in application.errors[0] and "/" not in application.errors[0]


def test_compare_views_follow_the_panel(widget, headless):
    fixed, moving = choose(widget)
    logic = slicer.vtkMRMLSliceLogic()
    logic.SetMRMLApplicationLogic(headless.application)
    logic.SetMRMLScene(headless.scene)
    logic.AddSliceNode("Red")
    composite = logic.GetSliceCompositeNode()
    widget.ui.showPairButton.click()
    assert composite.GetBackgroundVolumeID() == fixed.GetID() and composite.GetForegroundVolumeID() == moving.GetID()
    widget.ui.blendSlider.value = 0.25
    assert composite.GetForegroundOpacity() == 0.25
    widget.ui.linkCheckBox.click()
    assert composite.GetLinkedControl()
    widget.ui.flickerCheckBox.click()
    shown = []
    for _ in range(4):
        widget._flickerTimer.emit("timeout()")
        shown.append(composite.GetForegroundOpacity())
    assert sorted(set(shown)) == [0.0, 1.0]
    widget.exit()
    assert not widget._flickerTimer.active and composite.GetForegroundOpacity() == 0.25


def test_closing_the_scene_clears_the_panel(widget, tmp_path):
    fixed, moving = choose(widget)
    finish(widget, write_result_folder(tmp_path / "result"), fixed, moving)
    slicer.mrmlScene.Clear(False)
    assert widget.parameters.fixedVolume is None and widget.parameters.result is None
    assert not widget.ui.alignButton.enabled and widget.ui.verdictLabel.text == "No registration yet"


def test_checkerboard_needs_one_grid(scene):
    from UAECommonLib.compare_views import checkerboard
    from UAECommonLib.errors import UnsuitableNodeError

    fixed, other = add_scan(scene, "CT", np.eye(3)), add_scan(scene, "other", np.eye(3), spacing=(3, 3, 3))
    same = add_scan(scene, "moving in CT", np.eye(3))
    slicer.util.arrayFromVolume(fixed)[:] = 0
    slicer.util.arrayFromVolume(same)[:] = 100
    for node in (fixed, same):
        node.GetDisplayNode().SetAutoWindowLevel(False)
        node.GetDisplayNode().SetWindowLevel(200, 50)
    board = slicer.util.arrayFromVolume(checkerboard(scene, fixed, same, tile_mm=20.0))
    assert len(np.unique(board)) == 2 and 0.4 < np.mean(board == board.max()) < 0.6
    with pytest.raises(UnsuitableNodeError, match="grid"):
        checkerboard(scene, fixed, other)


def test_devices_are_read_from_the_environments_report():
    from UAECommonLib.devices import parse_devices

    text = 'warning\n{"uae": "0", "devices": ["cpu (A, 2 threads)", "cuda:0 (B)"]}\n'
    assert parse_devices(text) == {"cpu": "cpu (A, 2 threads)", "cuda:0": "cuda:0 (B)"}
    assert parse_devices("nothing") == {"cpu": "cpu"}
