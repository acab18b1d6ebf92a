"""The landmark panel's wiring on stand-ins of Qt: prepare and cancel, points and results, batch, a reopened scene."""

from __future__ import annotations

import csv

import pytest
import qt_widgets
import slicer
from landmark_cases import HILUM, LIVER, SPINE, add_scan, click, labels_of

from uae.errors import CancelledError
from UAECommonLib.mrml import flip_points

TIMEOUT_S = 240.0


@pytest.fixture
def widget(application, monkeypatch, tiny_model):
    """The panel of an opened module, with a random network."""
    from UAECommonLib import panel
    from UAELandmarkLib import widget as module

    monkeypatch.setattr(panel, "list_devices", lambda found: found({"cpu": "cpu (test)", "cuda:0": "cuda:0 (test)"}))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shown = module.UAELandmarkWidget()
    shown.setup()
    shown.parameters.model = str(tiny_model)
    shown.parameters.device = "cpu"
    yield shown
    shown.cleanup()


@pytest.fixture
def chosen(widget):
    """Two scans, chosen, and said to be CT."""
    template, query = add_scan(slicer.mrmlScene, "CT"), add_scan(slicer.mrmlScene, "CT 2", seed=3)
    widget.ui.templateSelector.setCurrentNode(template)
    widget.ui.querySelector.setCurrentNode(query)
    for box in (widget.ui.templateModalityComboBox, widget.ui.queryModalityComboBox):
        box.setCurrentIndex(1)
    return template, query


def prepare(widget):
    widget.ui.prepareButton.click()
    assert widget.logic.waitForAnswers(TIMEOUT_S)


def texts(widget):
    table = widget.ui.resultsTable
    return [[table.item(row, column).text() for column in range(table.columnCount)] for row in range(table.rowCount)]


def test_prepare_then_every_click_is_answered(widget, chosen, application):
    assert widget.parameters.templateModality.value == "ct"
    prepare(widget)
    assert not application.errors and widget.ui.statusLabel.text.startswith("Prior alignment: ")
    assert "cpu" in widget.ui.statusLabel.text and not widget.ui.progressBar.visible
    points = widget.parameters.templatePoints
    assert widget.ui.placeWidget.currentNode() is points and points.GetName() == "Targets"
    for number, place in enumerate((SPINE, LIVER), 1):
        click(points, flip_points(place)[0], f"P{number}")
        assert widget.logic.waitForAnswers(TIMEOUT_S)
    found = widget.parameters.queryPoints
    assert labels_of(found) == ["P1", "P2"] and [row[0] for row in texts(widget)] == ["P1", "P2"]
    assert all(row[1] and row[3] and row[4] for row in texts(widget))
    points.RemoveNthControlPoint(0)
    points.SetNthControlPointLabel(0, "liver")
    assert labels_of(found) == ["liver"] and [row[0] for row in texts(widget)] == ["liver"]
    widget.ui.liveCheckBox.click()
    click(points, flip_points(HILUM)[0], "late")
    assert widget.logic.waitForAnswers(TIMEOUT_S) and labels_of(found) == ["liver"]
    widget.ui.liveCheckBox.click()
    assert widget.logic.waitForAnswers(TIMEOUT_S) and labels_of(found) == ["liver", "late"]


def test_the_users_clicks_never_go_into_the_found_points(widget, chosen):
    prepare(widget)
    selection = slicer.mrmlScene.GetNodeByID("vtkMRMLSelectionNodeSingleton")
    assert widget.parameters.queryPoints is not None
    assert selection.GetActivePlaceNodeID() == widget.parameters.templatePoints.GetID()


def test_one_list_at_a_time_follows(widget, chosen, application):
    prepare(widget)
    first = widget.parameters.queryPoints
    widget.ui.queryPointsSelector.setCurrentNode(None)
    second = widget.parameters.queryPoints
    assert second is not None and second is not first
    assert widget.logic.isLive(second) and not widget.logic.isLive(first)
    widget.ui.queryPointsSelector.setCurrentNode(widget.parameters.templatePoints)
    assert "list of their own" in widget.ui.statusLabel.text and not application.errors
    widget.ui.queryPointsSelector.setCurrentNode(first)
    assert widget.logic.isLive(first) and not widget.logic.isLive(second)


def test_prepare_says_what_is_missing_and_turns_into_cancel(widget, application):
    assert not widget.ui.prepareButton.enabled and "Choose" in widget.ui.prepareButton.toolTip
    scan = add_scan(slicer.mrmlScene, "CT")
    widget.ui.templateSelector.setCurrentNode(scan)
    widget.ui.querySelector.setCurrentNode(scan)
    assert not widget.ui.prepareButton.enabled and "same" in widget.ui.prepareButton.toolTip
    widget.ui.querySelector.setCurrentNode(add_scan(slicer.mrmlScene, "CT 2", seed=5))
    widget.ui.prepareButton.click()
    assert widget.ui.prepareButton.text == "Cancel" and widget.ui.progressBar.visible
    widget.ui.prepareButton.click()
    assert widget.logic.waitForAnswers(TIMEOUT_S)
    assert widget.ui.prepareButton.text == "Prepare" and not widget.ui.progressBar.visible
    assert "cancel" in widget.ui.statusLabel.text.lower() and not application.errors


def test_what_cannot_be_prepared_is_said_once_and_leaves_no_progress(widget, chosen, application):
    empty = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "empty")
    widget.ui.querySelector.setCurrentNode(empty)
    widget.ui.prepareButton.click()
    assert len(application.errors) == 1 and "holds no voxels" in application.errors[0]
    assert widget.ui.prepareButton.text == "Prepare" and not widget.ui.progressBar.visible
    widget.ui.mapButton.click()
    assert not widget.ui.mapButton.checked


def test_a_crashed_worker_is_one_dialog_and_the_next_try_works(widget, chosen, application):
    widget.ui.prepareButton.click()
    widget.logic.client.runner.kill()
    assert widget.logic.waitForAnswers(TIMEOUT_S) and widget.ui.prepareButton.text == "Prepare"
    prepare(widget)
    assert widget.ui.statusLabel.text.startswith("Prior alignment: ")
    widget.onFailed(CancelledError("cancelled"))
    assert not application.errors


def test_a_saved_scene_brings_choices_and_live_link_back(widget, chosen, headless, tmp_path):
    prepare(widget)
    click(widget.parameters.templatePoints, flip_points(SPINE)[0], "spine")
    assert widget.logic.waitForAnswers(TIMEOUT_S)
    widget.ui.jumpCheckBox.click()
    widget.ui.batchSelector.setCheckState(chosen[1], qt_widgets.QT.Checked)
    file = headless.save_scene(tmp_path / "scene.mrb")
    headless.load_scene(file)
    parameters = widget.parameters
    assert parameters.templateVolume is headless.node("CT") and parameters.queryVolume is headless.node("CT 2")
    assert widget.ui.templateSelector.currentNode() is headless.node("CT")
    assert widget.ui.querySelector.currentNode() is headless.node("CT 2")
    assert not parameters.jump and parameters.batchVolumes == [headless.node("CT 2")]
    assert widget.ui.batchSelector.checkedNodes() == [headless.node("CT 2")]
    assert labels_of(parameters.queryPoints) == ["spine"] and texts(widget)[0][0] == "spine"
    prepare(widget)
    click(parameters.templatePoints, flip_points(LIVER)[0], "liver")
    assert widget.logic.waitForAnswers(TIMEOUT_S)
    assert labels_of(parameters.queryPoints) == ["spine", "liver"]


def test_batch_and_its_table(widget, chosen, application, monkeypatch, tmp_path):
    other = add_scan(slicer.mrmlScene, "CT ä", seed=8)
    prepare(widget)
    click(widget.parameters.templatePoints, flip_points(SPINE)[0], "spine")
    assert not widget.ui.batchButton.enabled
    for node in (chosen[1], other):
        widget.ui.batchSelector.setCheckState(node, qt_widgets.QT.Checked)
    assert widget.ui.batchButton.enabled and not widget.ui.exportButton.enabled
    removed = add_scan(slicer.mrmlScene, "removed")
    widget.ui.batchSelector.setCheckState(removed, qt_widgets.QT.Checked)
    slicer.mrmlScene.RemoveNode(removed)
    widget.ui.batchButton.click()
    assert widget.ui.batchButton.text == "Cancel"
    assert widget.logic.waitForAnswers(TIMEOUT_S)
    assert widget.ui.statusLabel.text == "2 scans matched, 0 failed" and not application.errors
    monkeypatch.setattr(qt_widgets.FileDialog, "answer", str(tmp_path / "Tabelle ä.csv"))
    widget.ui.exportButton.click()
    with (tmp_path / "Tabelle ä.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream))
    assert len(rows) == 3 and any("CT ä" in cell for row in rows for cell in row)


def test_points_are_loaded_and_saved(widget, chosen, monkeypatch, tmp_path, application):
    prepare(widget)
    click(widget.parameters.templatePoints, flip_points(SPINE)[0], "spine")
    assert widget.logic.waitForAnswers(TIMEOUT_S)
    monkeypatch.setattr(qt_widgets.FileDialog, "answer", str(tmp_path / "found ä.mrk.json"))
    widget.ui.saveButton.click()
    widget.ui.loadButton.click()
    assert not application.errors and labels_of(widget.parameters.templatePoints) == ["spine"]
    monkeypatch.setattr(qt_widgets.FileDialog, "answer", str(tmp_path / "none.mrk.json"))
    widget.ui.loadButton.click()
    assert len(application.errors) == 1
