"""The long-lived helper process: a real child, its protocol, and answers equal to the core's own."""

from __future__ import annotations

import json
import os
import queue
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from uae.embedding import embed
from uae.errors import InputError
from uae.matching import match_points, similarity_map
from uae.models import load_model
from uae.registration.relate import relate
from uae.volume import Volume
from uae.worker import Worker

SPINE, LIVER = [4.0, 36.0, 60.0], [-40.0, 0.0, 50.0]
OUTSIDE = [4000.0, 0.0, 0.0]


class Child:
    """`uae worker` as a child process; its lines are collected by a thread."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, "-m", "uae", "worker", "--device", "cpu", "--threads", "1", *options]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.errors: list[str] = []
        threading.Thread(target=self._collect, daemon=True).start()
        threading.Thread(target=self._drain, daemon=True).start()
        self.last = 0

    def _collect(self) -> None:
        for line in self.process.stdout:
            self._lines.put(json.loads(line.decode("utf-8")))
        self._lines.put(None)

    def _drain(self) -> None:
        for line in self.process.stderr:
            self.errors.append(line.decode("utf-8"))

    def send(self, command: str, **values: Any) -> int:
        self.last += 1
        self.raw(json.dumps({"id": self.last, "command": command, **values}, ensure_ascii=False))
        return self.last

    def raw(self, line: str) -> None:
        self.process.stdin.write(line.encode("utf-8") + b"\n")
        self.process.stdin.flush()

    def line(self, timeout: float = 120.0) -> dict[str, Any] | None:
        return self._lines.get(timeout=timeout)

    def until_end_of(self, number: Any) -> list[dict[str, Any]]:
        """All lines up to the result or the error of a request."""
        seen = []
        while (record := self.line()) is not None:
            seen.append(record)
            if record["id"] == number and record["event"] in ("result", "error"):
                return seen
        raise AssertionError(f"the worker ended: {self.errors}, {seen}")

    def ask(self, command: str, **values: Any) -> dict[str, Any]:
        return self.until_end_of(self.send(command, **values))[-1]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def scans(small_ct, tmp_path_factory) -> tuple[Path, Path]:
    """The small CT under names that programs stumble over."""
    folder = tmp_path_factory.mktemp("scans") / "Zoë's Übung 患者"
    folder.mkdir()
    files = folder / "Vorlage (ä).nii.gz", folder / "Zweite Sitzung ß.nii.gz"
    for file in files:
        shutil.copy(small_ct, file)
    return files


def both(scans: tuple[Path, Path]) -> dict[str, Any]:
    return {
        "template": {"path": str(scans[0]), "modality": "auto"},
        "query": {"path": str(scans[1]), "modality": "ct"},
    }


@pytest.fixture(scope="module")
def child(tiny_model) -> Iterator[Child]:
    child = Child("--model", str(tiny_model))
    assert child.line() == {
        "id": None,
        "event": "ready",
        "protocol": 1,
        "version": pytest.importorskip("uae").__version__,
    }
    yield child
    child.close()


@pytest.fixture(scope="module")
def prepared(child, scans) -> list[dict[str, Any]]:
    return child.until_end_of(child.send("prepare", pair="p", **both(scans)))


@pytest.fixture(scope="module")
def direct(scans, tiny_model):
    """What the core says when it is called without the worker."""
    model = load_model(str(tiny_model))
    volumes = [Volume.read(scan) for scan in scans]
    for volume in volumes:
        volume.modality = "ct"
    own = [embed(volume, model, device="cpu") for volume in volumes]
    return model, own, relate(*volumes, *own, model, device="cpu")


def test_prepare_reports_stages_and_ends_with_the_verdict(prepared, direct, tiny_model):
    progress = [record for record in prepared if record["event"] == "progress"]
    assert {"read", "embedding: template", "embedding: query", "match"} <= {record["stage"] for record in progress}
    assert all(0 <= record["percent"] <= 100 and "eta_s" in record for record in progress)
    result = prepared[-1]
    assert result["event"] == "result"
    model, _, relation = direct
    assert result["verdict"] == relation.found.verdict and result["reason"] == relation.found.reason
    if relation.found.transform is None:
        assert result["template_to_query"] is None
    else:
        np.testing.assert_allclose(result["template_to_query"], relation.found.transform.matrix, atol=1e-9)
    assert result["query_modality"] == {"modality": "ct", "reason": "given by the user"}
    assert "Hounsfield" in result["template_modality"]["reason"]
    assert result["model"] == {"name": "tiny", "version": "0", "sha256": model.sha256}
    assert result["device"].startswith("cpu")
    assert {"read", "embed", "relate", "total"} <= set(result["seconds"])


def test_a_pair_prepared_again_is_not_embedded_again(child, prepared, scans):
    again = child.until_end_of(child.send("prepare", pair="p", **both(scans)))
    assert [record["event"] for record in again] == ["result"]
    turned = {"template": both(scans)["query"], "query": both(scans)["template"]}
    other = child.until_end_of(child.send("prepare", pair="turned", **turned))
    stages = {record["stage"] for record in other if record["event"] == "progress"}
    assert not {stage for stage in stages if stage.startswith("embedding: ")}
    assert child.ask("forget", pair="turned")["known"] is True


@pytest.mark.parametrize("method", ["auto", "guided", "fixed-point", "nearest"])
def test_matching_through_the_worker_equals_the_core(child, prepared, direct, method):
    model, own, relation = direct
    lines = child.until_end_of(
        child.send("match", pair="p", points=[SPINE, LIVER], labels=["spine", "Leber ü"], method=method)
    )
    events = [record["event"] for record in lines if record["event"] != "progress"]
    assert events == (["result"] if method == "nearest" else ["partial", "result"])
    found, guided = relation.found, method in ("auto", "guided")
    seen = (relation.fixed, relation.moving) if guided and found.verdict != "refused" else own
    options = {"prior": found.transform, "prior_verdict": found.verdict} if guided else {}
    points = np.array([SPINE, LIVER])
    limits = model.thresholds.get("match")
    answers = [record["matches"] for record in lines if record["event"] != "progress"]
    methods = ["guided-nearest" if guided else "nearest", method][-len(answers) :]
    for matches, how in zip(answers, methods, strict=True):
        expected = match_points(*seen, points, ["spine", "Leber ü"], method=how, limits=limits, **options)
        assert [match["label"] for match in matches] == ["spine", "Leber ü"]
        for match, core in zip(matches, expected):
            np.testing.assert_allclose(match["point_mm"], core.point_mm, atol=1e-9)
            assert match["score"] == pytest.approx(core.score) and match["cycle_mm"] == pytest.approx(core.cycle_mm)
            assert (match["method"], match["confident"]) == (core.method, core.confident)
            assert (match["reason"], match["fixed_points"]) == (core.reason, core.fixed_points)


def test_a_guided_prior_is_used_where_the_pair_is_not_refused(scans, small_ct, tiny_model):
    """With the verdict forced to accepted the worker's answer is the guided one on the relation's own embeddings."""
    worker = Worker(str(tiny_model), "cpu")
    worker.answer({"command": "prepare", "pair": "p", **both(scans)})
    pair = worker._pairs["p"]
    if pair.relation.found.transform is None:
        pytest.skip("the random network finds no candidate here")
    pair.relation.found.verdict = "accepted"
    request = {"command": "match", "pair": "p", "points": [SPINE], "method": "auto"}
    partial: list[dict[str, Any]] = []
    (match,) = worker.answer(request, partial=partial.append)["matches"]
    (expected,) = match_points(
        pair.relation.fixed, pair.relation.moving, np.array([SPINE]), method="auto",
        prior=pair.relation.found.transform, prior_verdict="accepted",
    )  # fmt: skip
    assert match["method"].startswith("guided") and partial[0]["matches"][0]["method"] == "guided-nearest"
    np.testing.assert_allclose(match["point_mm"], expected.point_mm, atol=1e-9)


def test_a_point_outside_the_template_does_not_spoil_the_others(child, prepared):
    result = child.ask("match", pair="p", points=[SPINE, OUTSIDE], method="nearest")
    inside, outside = result["matches"]
    assert inside["point_mm"] is not None and inside["label"] == "F-1"
    assert outside["point_mm"] is None and not outside["confident"] and "outside" in outside["reason"]


def test_a_newer_live_match_makes_the_older_ones_stale_at_once(child, prepared):
    points = [SPINE, LIVER] * 12
    numbers = [child.send("match", pair="p", points=points, live=True) for _ in range(4)]
    kept = child.send("match", pair="p", points=[SPINE])
    seen = child.until_end_of(kept)
    ends = {record["id"]: record for record in seen if record["event"] == "result"}
    assert set(numbers) <= set(ends)
    assert [ends[number].get("stale", False) for number in numbers] == [True, True, True, False]
    assert len(ends[numbers[-1]]["matches"]) == len(points)
    assert not [record for record in seen if record["id"] == numbers[0] and record["event"] == "error"]


def test_cancel_ends_a_waiting_and_a_running_request(child, prepared, scans, tmp_path):
    other = tmp_path / "other.nii.gz"
    shutil.copy(scans[0], other)
    running = child.send("match", pair="p", points=[SPINE, LIVER] * 200)
    waiting = child.send("match", pair="p", points=[LIVER])
    assert child.until_end_of(child.send("cancel", target=waiting))[-1]["cancelled"] is True
    child.send("cancel", target=running)
    ended = child.until_end_of(running)[-1]
    assert ended["event"] == "error" and ended["exit_code"] == 130
    assert child.ask("cancel", target=12345)["cancelled"] is False


def test_similarity_map_is_written_where_it_was_asked_for(child, prepared, direct, tmp_path):
    output = tmp_path / "Ähnlichkeit 1.nrrd"
    assert child.ask("similarity_map", pair="p", point=SPINE, output=str(output))["output"] == str(output)
    written, expected = Volume.read(output), similarity_map(*direct[2].seen, np.array([SPINE]))
    np.testing.assert_allclose(written.array, expected.array, atol=1e-6)
    assert written.geometry.same_as(expected.geometry)


@pytest.mark.parametrize(
    ("command", "values", "word"),
    [
        ("match", {"pair": "none", "points": [SPINE]}, "not prepared"),
        ("match", {"pair": "p", "points": []}, "at least one"),
        ("match", {"pair": "p", "points": [[1, 2]]}, "millimetres"),
        ("match", {"pair": "p", "points": [[1, 2, None]]}, "millimetres"),
        ("match", {"pair": "p", "points": [SPINE], "labels": ["a", "b"]}, "labels"),
        ("match", {"pair": "p", "points": [SPINE], "method": "magic"}, "magic"),
        ("match", {"pair": "p", "points": [SPINE], "side": 4}, "odd"),
        ("prepare", {"pair": "q", "template": {"path": "/none.nii.gz"}, "query": {"path": "/none.nii.gz"}}, "none.nii"),
        ("prepare", {"pair": "q"}, "template"),
        ("similarity_map", {"pair": "p", "point": SPINE}, "output"),
        ("load", {"model": "no-such-model"}, "no-such-model"),
        ("load", {"device": "toaster"}, "toaster"),
        ("dance", {}, "dance"),
    ],
)
def test_bad_requests_are_answered_and_the_worker_lives_on(child, prepared, command, values, word):
    answer = child.ask(command, **values)
    assert (answer["event"], answer["exit_code"]) == ("error", 2)
    assert word in answer["message"] and "\n" not in answer["message"]
    assert child.ask("match", pair="p", points=[SPINE], method="nearest")["event"] == "result"


@pytest.mark.parametrize("line", ["not json", "[1]", '{"command": "match"}', '{"id": null}', "\udcff"])
def test_lines_that_are_no_requests_are_answered_without_an_id(child, prepared, line):
    child.process.stdin.write(line.encode("utf-8", "surrogateescape") + b"\n")
    child.process.stdin.flush()
    answer = child.until_end_of(None)[-1]
    assert answer["event"] == "error" and answer["exit_code"] == 2
    assert child.ask("match", pair="p", points=[SPINE], method="nearest")["event"] == "result"


def test_an_unforeseen_error_is_an_event_and_the_worker_lives_on(child, prepared):
    answer = child.ask("match", pair={"a": 1}, points=[SPINE])
    assert answer["event"] == "error" and answer["exit_code"] in (1, 2)
    assert child.ask("match", pair="p", points=[SPINE], method="nearest")["event"] == "result"


def test_a_gpu_that_is_not_here_is_replaced_by_the_cpu_with_a_message(child, prepared, tiny_model):
    import torch

    if torch.cuda.device_count() > 7:
        pytest.skip("this machine has that GPU")
    lines = child.until_end_of(child.send("load", model=str(tiny_model), device="cuda:7"))
    assert [record["event"] for record in lines] == ["message", "result"]
    assert "CPU" in lines[0]["text"] and lines[1]["device"].startswith("cpu")


def test_the_end_of_stdin_ends_the_process_also_in_the_middle_of_work(tiny_model, scans):
    for busy in (False, True):
        child = Child("--model", str(tiny_model), "--no-cache")
        assert child.line()["event"] == "ready"
        if busy:
            child.send("prepare", pair="p", **both(scans))
            assert child.line()["event"] == "progress"
        child.process.stdin.close()
        assert child.process.wait(timeout=20) == 0
        assert not [line for line in child.errors if "Traceback" in line or "Fatal" in line]


def test_shutdown_is_answered_and_ends_the_process():
    child = Child()
    assert child.line()["event"] == "ready"
    assert child.ask("shutdown")["event"] == "result"
    assert child.process.wait(timeout=20) == 0
    child.process.stdin.close()


def test_starting_the_worker_imports_no_torch():
    code = "import io, sys, uae.worker, uae.cli.worker\nsys.exit('torch' in sys.modules or 'numpy' in sys.modules)\n"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_kill_at_random_moments_leaves_nothing_behind(tiny_model, scans, tmp_path):
    """20 kills during prepare, matching and writing: no half-written file, and the next worker works."""
    rng = random.Random(0)
    cache, maps = tmp_path / "cache", tmp_path / "maps"
    maps.mkdir()
    environment = {**os.environ, "UAE_CACHE": str(cache)}
    for _ in range(20):
        process = subprocess.Popen(
            [sys.executable, "-m", "uae", "worker", "--device", "cpu", "--threads", "1", "--model", str(tiny_model)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
        requests = [
            {"id": 1, "command": "prepare", "pair": "p", **both(scans)},
            {"id": 2, "command": "match", "pair": "p", "points": [SPINE, LIVER] * 20},
            {"id": 3, "command": "similarity_map", "pair": "p", "point": SPINE, "output": str(maps / "m.nrrd")},
        ]
        process.stdin.write("".join(json.dumps(request) + "\n" for request in requests).encode())
        process.stdin.flush()
        time.sleep(rng.uniform(0.2, 4.0))
        process.kill()
        process.wait()
        process.stdin.close()
        for file in maps.glob("m.nrrd"):
            Volume.read(file)
            file.unlink()
    worker = Worker(str(tiny_model), "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UAE_CACHE", str(cache))
        worker.answer({"command": "prepare", "pair": "p", **both(scans)})
    assert worker.answer({"command": "match", "pair": "p", "points": [SPINE]})["matches"]


def test_only_what_pairs_use_and_a_little_more_is_kept_in_memory(small_ct, tiny_model, tmp_path):
    worker = Worker(str(tiny_model), "cpu")
    files = [tmp_path / f"{number}.nii.gz" for number in range(5)]
    for file in files:
        shutil.copy(small_ct, file)
    for file in files[1:]:
        scans = {"template": {"path": str(files[0])}, "query": {"path": str(file)}}
        worker.answer({"command": "prepare", "pair": "p", **scans})
    assert len(worker._embeddings) == 4  # the pair's two and two more
    worker.answer({"command": "forget", "pair": "p"})
    assert len(worker._embeddings) == 2
    with pytest.raises(InputError, match="not prepared"):
        worker.answer({"command": "match", "pair": "p", "points": [SPINE]})


def test_a_changed_file_is_read_again(small_ct, tiny_model, tmp_path):
    scan = tmp_path / "scan.nii.gz"
    shutil.copy(small_ct, scan)
    worker = Worker(str(tiny_model), "cpu")
    scans = {"template": {"path": str(scan)}, "query": {"path": str(small_ct)}}
    worker.answer({"command": "prepare", "pair": "p", **scans})
    first = worker._pairs["p"]
    worker.answer({"command": "prepare", "pair": "p", **scans})
    assert worker._pairs["p"] is first
    volume = Volume.read(scan)
    volume.replace(volume.array + 10).write(scan)
    worker.answer({"command": "prepare", "pair": "p", **scans})
    assert worker._pairs["p"] is not first
    assert not np.array_equal(worker._pairs["p"].relation.own[0].fine, first.relation.own[0].fine)
