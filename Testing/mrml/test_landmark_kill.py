"""The worker killed at random moments: no node lost, no file left, and the next request works (random network)."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("slicer")

from landmark_cases import (
    CELL_MM,
    HILUM,
    LIVER,
    SPINE,
    add_points,
    add_scan,
    click,
    labels_of,
    tiny_client,
    world_of,
)

from uae.errors import CancelledError, UAEError
from UAECommonLib.mrml import flip_points
from UAECommonLib.process import SubprocessRunner
from UAECommonLib.worker_client import WorkerClient
from UAELandmarkLib.logic import UAELandmarkLogic

TIMEOUT_S = 240.0
KILLS = 20


def kill_worker(client: WorkerClient) -> None:
    """As a crash: nobody on our side knows."""
    os.killpg(client.runner._process.pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(os.name == "nt", reason="process groups are killed by their number")
def test_kill_the_worker_at_random_moments(scene, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    client, messages = tiny_client(tiny_model), []
    logic = UAELandmarkLogic(scene, client, onMessage=messages.append)
    template, query = add_scan(scene, "CT"), add_scan(scene, "MR")
    points = add_points(scene, "Targets", (SPINE, LIVER))
    logic.prepareAndWait(template, query)
    found = logic.startLive(template, query, points, method="fixed-point")
    assert logic.waitForAnswers(TIMEOUT_S)
    nodes = scene.GetNumberOfNodes()
    rng = random.Random(1)
    for number in range(KILLS):
        place = np.array(SPINE if number % 2 else HILUM) + rng.uniform(-3, 3)
        points.SetNthControlPointPositionWorld(0, flip_points(place)[0].tolist())
        end = time.monotonic() + rng.uniform(0.0, 0.4)
        while time.monotonic() < end:
            logic.pump(0.01)
        if client.runner.running:
            kill_worker(client)
        assert logic.waitForAnswers(TIMEOUT_S)
        assert scene.GetNumberOfNodes() == nodes
        assert labels_of(points) == labels_of(found) == ["P1", "P2"]
    points.SetNthControlPointPositionWorld(0, flip_points(HILUM)[0].tolist())
    assert logic.waitForAnswers(TIMEOUT_S)
    assert np.linalg.norm(world_of(found, 0) - flip_points(HILUM)[0]) < CELL_MM
    assert client.starts > 1
    pid = client.runner._process.pid
    logic.close()
    client.close()
    assert not alive(pid)
    assert list(tmp_path.iterdir()) == []


def test_kill_while_preparing_is_an_error_and_the_next_try_works(scene, tiny_model):
    client = tiny_client(tiny_model)
    logic = UAELandmarkLogic(scene, client)
    template, query = add_scan(scene, "CT"), add_scan(scene, "MR", seed=3)
    errors: list[UAEError] = []
    number = logic.prepare(template, query, onError=errors.append)
    logic.pump(0.2)
    kill_worker(client)
    client.wait(number, TIMEOUT_S)
    assert len(errors) == 1 and "ended unexpectedly" in str(errors[0]) and logic.prepared(template, query) is None
    assert logic.prepareAndWait(template, query)["verdict"]
    logic.close()
    client.close()


def test_cancel_of_prepare_is_told_and_the_next_try_works(scene, tiny_model):
    client = tiny_client(tiny_model)
    logic = UAELandmarkLogic(scene, client)
    template, query = add_scan(scene, "CT"), add_scan(scene, "MR", seed=4)
    errors: list[UAEError] = []
    number = logic.prepare(template, query, onError=errors.append)
    logic.cancel(number)
    client.wait(number, TIMEOUT_S)
    assert len(errors) == 1 and isinstance(errors[0], CancelledError)
    assert logic.prepareAndWait(template, query)["verdict"]
    logic.close()
    client.close()


def test_closing_the_logic_ends_its_own_worker_and_removes_its_files(scene, monkeypatch, tmp_path):
    logic = UAELandmarkLogic(scene)
    assert isinstance(logic.client.runner, SubprocessRunner)
    template, query = add_scan(scene, "CT"), add_scan(scene, "MR")
    points = add_points(scene, "Targets", (SPINE,))
    folder = logic._preparation.pairs.folder
    logic.prepare(template, query, device="cpu")
    logic.startLive(template, query, points)
    assert len(list(folder.iterdir())) == 2
    pid = logic.client.runner._process.pid
    logic.close()
    assert not alive(pid) and not folder.exists()
    click(points, flip_points(LIVER)[0], "after")
    assert not logic.client.runner.running
