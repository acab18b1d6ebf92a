"""`uae bench all`: its plan, rows, summary and page on records made by hand, and the pairs' truth."""

import itertools
import json
import math
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest

from uae.bench import all_rows, all_run
from uae.bench.all_plan import (
    ALL_PEERS,
    DEFORMABLE,
    HEADS,
    OWN,
    R3_ORDERS,
    RIGID_PEERS,
    SEMANTIC,
    SHARED,
    STARTED,
    VARIANTS,
    Row,
    cases,
    plan,
    select,
)
from uae.bench.all_report import losses, text_of, write_report
from uae.bench.all_rows import RunOptions, measure
from uae.bench.all_summary import reliability, summarise
from uae.bench.pairs import UNRELATED, BenchPair, Pairs, _turned_pair
from uae.bench.resources import run_child
from uae.errors import CancelledError, InputError, ResourceError
from uae.geometry import Geometry
from uae.models import load_model, save_model
from uae.network import UAENet
from uae.preprocess import InputMap
from uae.transform import Rigid
from uae.volume import Volume

META = {
    "date": "2026-01-01", "quick": False, "jobs": 1, "threads": 1, "device": "cpu", "model": "uae-m",
    "model_version": "1", "model_sha256": "0", "semantic": ["0", {}], "code_sha256": "0", "model_round": 0,
    "processor": "p", "processors": 2, "platform": "l", "python": "3", "thresholds": {}, "versions": {"numpy": "2"},
    "peers": list(ALL_PEERS), "skipped": {"ants": "not installed"},
    "settings": {"simpleitk": {"metric": "x"}}, "cached_embeddings": False, "left_out": [],
}  # fmt: skip


def row(scenario="R1", part="hard", case="a.0", system="uae", tre=2.0, floor=0.0, status=None, **more):
    status = status or ("accepted" if system.startswith("uae") else "done")
    return {
        "name": f"{scenario}/{part}/{case}/{system}", "scenario": scenario, "part": part, "case": case,
        "system": system, "status": status, "reason": "", "tre_mm": tre, "floor_mm": floor, "seconds": 1.0,
        "process_seconds": 2.0, "cpu_seconds": 1.5, "peak_mb": 100.0, "fixed_to_moving": np.eye(4).tolist(),
        "command": "uae bench all --only x", "meta": {"share": 0.1, "rotation_deg": 5.0}, **more,
    }  # fmt: skip


# ---- the plan


def test_plan_has_every_scenario_once():
    rows = plan(False, ALL_PEERS)
    names = [r.name for r in rows]
    assert len(set(names)) == len(names)
    assert {r.scenario for r in rows} == {"R1", "R2", "R3", "R4", "R5", "L1", "L2", "S1"}
    hard = [r for r in rows if (r.scenario, r.part) == ("R1", "hard")]
    assert {r.system for r in hard} == {OWN, *ALL_PEERS, *(p + STARTED for p in ALL_PEERS), *VARIANTS}
    assert sum(r.system == OWN for r in hard) == 50
    for part in ("standard15", "standard30"):
        assert sum((r.scenario, r.part, r.system) == ("R1", part, OWN) for r in rows) == 40
    assert sum(r.scenario == "R3" and r.system == OWN for r in rows) == 2 * len(UNRELATED)
    # every scenario comes with every peer of its kind before any has its last cases
    shared = rows[: rows.index(next(r for r in rows if r.system.endswith(STARTED)))]
    for scenario, kinds in (("R1", ALL_PEERS), ("R2", DEFORMABLE[1:]), ("R3", RIGID_PEERS), ("R4", RIGID_PEERS)):
        assert {r.system for r in shared if r.scenario == scenario} >= set(kinds)
    # in it rows on one pair follow each other, so that it is made once, ours first
    for pair, own in itertools.groupby(shared, key=lambda r: r.pair):
        systems = [r.system for r in own]
        assert systems[0].startswith(OWN), pair


def test_quick_plan_has_twenty_hard_cases_of_ours_first():
    rows = plan(True, ["simpleitk"])
    assert [r.system for r in rows[:20]] == [OWN] * 20
    assert len({r.case for r in rows[:20]}) == 20
    assert {r.part for r in rows[:20]} == {"hard"}
    assert {r.system for r in rows} == {OWN, "simpleitk"}
    # what it measures are rows of the full run, so that a single one repeats by the same name
    assert {r.name for r in rows} <= {r.name for r in plan(False, ["simpleitk"])}


def test_select_by_name_beginning_or_star():
    rows = plan(False, ["simpleitk"])
    assert [r.name for r in select(rows, ["R1/hard/ct_lidc0001_chest.0/uae"])] == ["R1/hard/ct_lidc0001_chest.0/uae"]
    assert {r.scenario for r in select(rows, ["R3"])} == {"R3"}
    assert {r.system for r in select(rows, ["R1/*/*/simpleitk"])} == {"simpleitk"}
    assert select(rows, []) == rows
    with pytest.raises(InputError, match="no such row"):
        select(rows, ["R9"])


# ---- the summary


def test_keys_are_those_of_the_contract():
    rows = [
        row(tre=2.0, before_refinement_mm=4.0), row(case="a.1", tre=30.0, before_refinement_mm=30.0),
        row(system="simpleitk", tre=40.0), row(case="a.1", system="simpleitk", tre=None, status="failed"),
        row(system="simpleitk@uae", tre=1.0), row(system="uae-deformable", tre=1.5), row(system="uae-affine", tre=4.0),
        row("R3", "neck-lumbar", "forward", "uae", None, status="refused"),
        row("R3", "neck-lumbar", "backward", "uae", None, status="review"),
        row("R3", "neck-lumbar", "forward", "simpleitk", None), row("R3", "neck-lumbar", "backward", "simpleitk", None),
    ]  # fmt: skip
    result = summarise(rows, META)
    json.dumps(result, allow_nan=False)
    assert set(result["R1"]["hard"]) == {"uae", "simpleitk"}
    assert result["R1"]["hard"]["uae"]["success_rate"] == pytest.approx(0.5)
    assert result["R1"]["hard"]["uae"]["median_tre_mm"] == pytest.approx(16.0)
    assert result["R1"]["hard"]["uae"]["confident_failure_rate"] == pytest.approx(0.5)
    assert result["R1"]["hard"]["simpleitk"]["success_rate"] == 0.0
    assert result["R1"]["hard"]["simpleitk"]["no_estimate_rate"] == pytest.approx(0.5)
    assert result["R1_started_from_uae"] == {"hard": {"simpleitk": result["R1_started_from_uae"]["hard"]["simpleitk"]}}
    assert result["R1_started_from_uae"]["hard"]["simpleitk"]["success_rate"] == 1.0
    assert set(result["R1_variants"]["hard"]) == {"deformable", "affine", "unrefined"}
    # the variants were measured on a.0 alone, so ours beside them is, too
    assert result["R1_variants"]["hard"]["unrefined"]["median_tre_mm"] == pytest.approx(4.0)
    assert result["R3"]["uae"]["confident_wrong"] == 1
    assert result["R3"]["simpleitk"]["confident_wrong"] == 2
    assert result["A1"]["M0"] == pytest.approx({"rigid": 4.0, "refined": 2.0, "deformable": 1.5, "cases": 1})
    bare = summarise([one for one in rows if one["system"] not in VARIANTS], META)["A1"]["M0"]
    assert (bare["rigid"], bare["refined"], bare["deformable"], bare["cases"]) == (17.0, 16.0, None, 2)
    assert [r["name"] for r in result["meta"]["rows"]] == [r["name"] for r in rows]
    assert result["meta"]["sets"]["hard"]["cases"] == 2


def test_deformable_scaling_and_landmark_tables():
    ways = {
        "nearest": {
            "seconds": 2.0, "offset_mm": [[3.0, 4.0, 0.0], [0.0, 0.0, 20.0]],
            "matches": [{"score": 0.9, "confident": True}, {"score": 0.2, "confident": False}],
        }
    }  # fmt: skip
    rows = [
        row("R2", "smooth", "a.0", "uae-deeds", 2.0, initial_tre_mm=6.0, folding=0.0),
        row("R2", "smooth", "a.1", "uae-deeds", 4.0, initial_tre_mm=8.0, folding=0.01),
        row("R2", "smooth", "a.1", "ants", None, status="failed"),
        row("L1", "ct-mr", "pair0", tre=None, ways=ways),
        row("L1", "ct-mr", "pair1", tre=None, ways={}, status="failed"),
        *(row("S1", "embed", f"x{s}.t1", tre=None, voxels=1e6 * s, threads=1, status="done") | {"seconds": 2.0 * s}
          for s in (1, 2, 4)),
    ]  # fmt: skip
    result = summarise(rows, META)
    assert not any("fails less often" in text for text in losses(result))
    lost = [row("R2", "smooth", "a.0", "uae-deeds", None, status="failed"),
            row("R2", "smooth", "a.0", "ants", 1.0, initial_tre_mm=6.0, folding=0.0)]  # fmt: skip
    assert losses(summarise(lost, META)) == ["R2: ants fails less often than we, in 100 % of our cases"]
    deeds = result["R2"]["uae-deeds"]
    assert (deeds["tre_mm"], deeds["initial_tre_mm"], deeds["folding"]) == pytest.approx((3.0, 7.0, 0.01))
    assert result["R2"]["ants"] == {"cases": 1, "failed": 1}
    rows.append(row("R2", "smooth", "a.1", "convexadam", 3.0, initial_tre_mm=8.0, folding=0.2))
    shared = summarise(rows, META)["R2"]
    # case a.0 was measured by us alone
    assert [(shared[name]["shared"], shared[name]["tre_mm"]) for name in ("uae-deeds", "convexadam")] == [
        (1, pytest.approx(4.0)), (1, pytest.approx(3.0)),
    ]  # fmt: skip
    both = [*rows, row("L1", "ct-mr", "pair0", SEMANTIC, tre=None, ways={"SEA nearest": ways["nearest"]})]
    table = summarise(both, META)["L1"]["ct-mr"]
    assert table["nearest"] == result["L1"]["ct-mr"]["nearest"]
    assert (table["SEA nearest"]["cases"], table["SEA nearest"]["failed"]) == (1, 0)
    assert "SAM, SEA and UAE-S: the appearance" in text_of(summarise(both, META), {})
    nearest = result["L1"]["ct-mr"]["nearest"]
    assert nearest["med_mm"] == pytest.approx(12.5)
    assert (nearest["cases"], nearest["failed"]) == (1, 1)
    assert nearest["confident_share"] == pytest.approx(0.5)
    assert nearest["confident_over_10mm"] == 0.0
    assert [b["within_10mm"] for b in nearest["reliability"]] == [0.0, 1.0]
    assert result["S1"]["embed"]["threads1"]["seconds_slope"] == pytest.approx(1.0)
    assert result["S1"]["embed"]["threads1"]["memory_slope"] == pytest.approx(0.0)


def test_ours_is_compared_on_the_cases_a_peer_was_measured_on():
    rows = [row(case=f"a.{k}", tre=tre, status="review") for k, tre in enumerate((3.0, 90.0, 90.0))]
    rows += [row(case="a.0", system="simpleitk", tre=2.9), row(case="a.0", system="elastix", tre=50.0)]
    result = summarise(rows, META)
    assert result["R1"]["hard"]["uae"]["cases"] == 3
    assert result["R1"]["hard"][SHARED]["median_tre_mm"] == pytest.approx(3.0)
    assert losses(result) == []
    assert SHARED not in summarise(rows[:1] + rows[3:], META)["R1"]["hard"]


def test_reliability_by_hand():
    scores = np.array([0.1, 0.9, 0.2, 0.8])
    curve = reliability(scores, np.array([50.0, 1.0, 5.0, 12.0]), bins=2)
    assert curve[0] == pytest.approx({"score": 0.15, "within_10mm": 0.5, "median_mm": 27.5, "points": 2})
    assert curve[1]["within_10mm"] == pytest.approx(0.5)


def test_page_says_first_where_we_lose(tmp_path):
    rows = [row(tre=2.0), row(system="simpleitk", tre=1.0), row(system="elastix", tre=90.0)]
    rows += [row("R3", "neck-lumbar", "forward", "uae", None, status="accepted")]
    rows += [row("L1", "ct-mr", "pair0", tre=None, ways={"nearest": {
        "seconds": 2.0, "offset_mm": [[3.0, 4.0, 0.0]], "matches": [{"score": 0.9, "confident": True}]}})]  # fmt: skip
    rows += [row("S1", "embed", f"x{s}.t1", tre=None, voxels=s, threads=1) for s in (1, 2)]
    result = summarise(rows, META | {"note": "Beside other work.", "planned": 700})
    found = losses(result)
    assert any("median TRE 1.00 mm of simpleitk, 2.00 mm of ours" in text for text in found)
    assert any("1 of our results" in text for text in found)
    assert not any("elastix" in text for text in found)
    files = write_report(result, tmp_path)
    assert {file.name for file in files} == {
        "all.md", "all_rows.md", "all_errors.png", "all_field_of_view.png", "all_reliability.png", "all_scaling.png",
    }  # fmt: skip
    text = files[0].read_text(encoding="utf-8")
    assert text.split("\n")[2].startswith("**Where we lose:** R1 hard: median TRE 1.00 mm of simpleitk")
    assert "Skipped: ants, not installed." in text
    assert "\n\nBeside other work.\n\n" in text
    assert f"**{len(rows)} of the 700 rows of the run are in.**" in text
    assert "| simpleitk | 1 | 1 | 1 |" in text
    assert "`uae bench all --only x`" in files[1].read_text(encoding="utf-8")
    assert all(file.stat().st_size > 1000 for file in files if file.suffix == ".png")
    assert "not known, no peer was measured" in text_of(summarise([], META), {})
    assert "nowhere in the rows below" in text_of(summarise([row(tre=1.0), row(system="ants", tre=9.0)], META), {})


# ---- running


class Stub:
    def __init__(self, root):
        self.root = root


@pytest.fixture
def stubbed(monkeypatch, tmp_path):
    """The runner with rows that cost nothing; which were measured is kept in a list."""
    measured = []

    def fake(one, pair, options, ours):
        measured.append((one.name, ours is not None))
        return row(*one.pair, one.system)

    monkeypatch.setattr(all_run, "measure", fake)
    monkeypatch.setattr(all_run, "find_data", lambda folder: Stub(tmp_path))
    monkeypatch.setattr(all_run, "_meta", lambda *args: META | {"quick": args[3]})
    monkeypatch.setattr(Pairs, "make", lambda self, *names: BenchPair(None, None))
    return measured


@pytest.mark.parametrize("jobs", [1, 3])
def test_run_resumes_after_every_row(stubbed, tmp_path, monkeypatch, jobs):
    file = tmp_path / "all.json"
    options = {"json_path": file, "peers": ["simpleitk"], "jobs": jobs}
    all_run.run_all(only=["R1/standard15"], **options)
    first = len(stubbed)
    assert first == 40 + 10 + 10
    saved = json.loads(file.read_text())
    assert len(saved["meta"]["rows"]) == first
    command = saved["meta"]["rows"][0]["command"]
    assert command.startswith("UAE_DATA=... uae bench all --only R1/standard15/")
    result = all_run.run_all(only=["R1/standard15", "R3/neck-lumbar"], **options)
    assert len(stubbed) == first + 2 * len(R3_ORDERS)
    assert set(result) == {"R1", "R1_started_from_uae", "R1_variants", "R3", "meta"}
    monkeypatch.setattr(all_run, "_meta", lambda *args: META | {"model_sha256": "other"})
    all_run.run_all(only=["R3/neck-lumbar"], **options)
    # ours are measured again, the peer's rows stay
    again = sorted(name for name, _ in stubbed[first + 2 * len(R3_ORDERS) :])
    assert again == sorted(f"R3/neck-lumbar/{order}/uae" for order in R3_ORDERS)
    monkeypatch.setattr(all_run, "_meta", lambda *args: META | {"model_sha256": "other", "semantic": ["0", {"new": 1}]})
    all_run.run_all(only=["R3/neck-lumbar"], **options)
    # another uae-s changes its own rows alone
    assert len(stubbed) == first + 3 * len(R3_ORDERS)
    monkeypatch.setattr(all_run, "_meta", lambda *args: META | {"threads": 7})
    all_run.run_all(only=["R3/neck-lumbar"], **options)
    assert len(stubbed) == first + 5 * len(R3_ORDERS)


def test_rows_cut_short_by_a_stop_are_not_kept_as_failures(stubbed, tmp_path, monkeypatch):
    begun = threading.Event()

    def measure(one, pair, options, ours):
        if one.case.endswith(".0"):
            begun.wait(10)
            raise CancelledError("stopped")
        begun.set()
        stopped.wait(10)  # a child that the stop has ended comes back as a failed row
        return row(*one.pair, one.system) | {"status": "failed"}

    stopped = threading.Event()
    monkeypatch.setattr(all_run, "measure", measure)
    monkeypatch.setattr(all_run, "end_children", stopped.set)
    file = tmp_path / "all.json"
    with pytest.raises(CancelledError):
        all_run.run_all(only=["R1/hard/ct_lidc0001_chest.0", "R1/hard/ct_lidc0001_chest.1"], peers=[], jobs=2,
                        json_path=file)  # fmt: skip
    assert not file.exists()


def test_stop_ends_a_child_that_starts_after_it(stubbed, tmp_path, monkeypatch):
    begun, ended, told = threading.Event(), threading.Event(), threading.Event()
    end_children = all_run.end_children

    def measure(one, pair, options, ours):
        if one.case.endswith(".0"):
            begun.wait(10)
            raise CancelledError("stopped")
        begun.set()
        told.wait(10)
        try:
            run_child([sys.executable, "-c", "import time; time.sleep(300)"], {}, "late child")
        except ResourceError:
            ended.set()
        return row(*one.pair, one.system)

    monkeypatch.setattr(all_run, "measure", measure)
    monkeypatch.setattr(all_run, "end_children", lambda: (end_children(), told.set()))
    with pytest.raises(CancelledError):
        all_run.run_all(only=["R1/hard/ct_lidc0001_chest.0", "R1/hard/ct_lidc0001_chest.1"], peers=[], jobs=2)
    assert ended.is_set()


def test_started_row_alone_runs_ours_first(stubbed, tmp_path):
    name = "R1/hard/ct_lidc0001_chest.0/simpleitk@uae"
    result = all_run.run_all(only=[name], peers=["simpleitk"], json_path=tmp_path / "row.json")
    assert stubbed == [("R1/hard/ct_lidc0001_chest.0/uae", False), (name, True)]
    assert set(result["R1_started_from_uae"]["hard"]) == {"simpleitk"}


def test_budget_leaves_rows_out_and_says_so(stubbed, tmp_path):
    """The twenty hard cases of ours run whatever the budget; the rest goes on at the next call."""
    options = {"quick": True, "peers": ["simpleitk"], "json_path": tmp_path / "q.json"}
    result = all_run.run_all(budget_minutes=0.0, **options)
    assert [name for name, _ in stubbed] == [f"R1/hard/{case}/uae" for case in cases(10)]
    assert len(result["meta"]["left_out"]) == len(plan(True, ["simpleitk"])) - 20
    again = all_run.run_all(budget_minutes=5.0, **options)
    assert again["meta"]["left_out"] == []
    assert again["R1"]["hard"]["uae"]["cases"] == again["R1"]["hard"]["simpleitk"]["cases"] == 20
    assert len(stubbed) == len(plan(True, ["simpleitk"]))


def test_a_failing_row_ends_the_run_and_keeps_the_others(stubbed, tmp_path, monkeypatch):
    def fails(one, pair, options, ours):
        if one.case.endswith(".1"):
            raise InputError("no such thing")
        return row(*one.pair, one.system)

    monkeypatch.setattr(all_run, "measure", fails)
    with pytest.raises(InputError, match="no such thing"):
        all_run.run_all(only=["R1/hard/*/uae"], peers=[], jobs=2, json_path=tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text())["meta"]["rows"]
    with pytest.raises(InputError, match="unknown peer"):
        all_run.run_all(peers=["nobody"])
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(InputError, match="not a JSON file"):
        all_run.run_all(only=["R3"], peers=[], json_path=tmp_path / "x.json")


# ---- pairs and rows


def texture(shape=(30, 32, 34), seed=0):
    from scipy import ndimage

    array = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2).astype(np.float32) * 1000 + 500
    direction = Rigid.from_euler_deg(3, 5, 10).rotation
    return Volume(array, Geometry(shape, np.array([1.5, 1.5, 2.0]), np.array([5.0, -8.0, 30.0]), direction), "mr")


def test_turned_pair_knows_its_truth():
    """The moving scan's value at a point is the source's at the point's true place, on an oblique grid."""
    source, fixed = texture(), texture(seed=1)
    pair = _turned_pair(fixed, source, np.random.default_rng(3), (5.0, 9.0), 25.0, (0.7, 0.9), 400.0)
    assert pair.fixed is fixed
    assert 5.0 <= pair.meta["rotation_deg"] <= 9.0
    deep = source.geometry.contains(pair.fixed_points, -2.0) & pair.moving.geometry.contains(pair.moving_points, -0.6)
    assert deep.sum() > 500
    read = source.sample(pair.fixed_points[deep], order=1)
    np.testing.assert_allclose(pair.moving.sample(pair.moving_points[deep], order=1), read, atol=0.5)
    assert np.linalg.norm(pair.moving_points - pair.fixed_points, axis=1).mean() > 1.0
    # voxels are turned, the header is not: the grid keeps the source's axes
    np.testing.assert_allclose(pair.moving.geometry.direction, source.geometry.direction)


def test_pairs_of_the_real_data(real_data):
    real_data("head_mni_ctmr/ct_scct_2mm_smooth_cormack.nii.gz", "spine_tptbox/ct_L3.nii.gz")
    from uae.bench.data import find_data

    pairs = Pairs(find_data())
    forward, backward = (pairs.make("R3", "neck-lumbar", order) for order in R3_ORDERS)
    assert (forward.fixed.modality, forward.moving.modality) == ("ct", "mr")
    assert (backward.fixed.modality, backward.moving.modality) == ("mr", "ct")
    assert len(forward.moving_points) == 0
    again = [pairs.make("R4", "heads", "move0") for _ in range(2)]
    np.testing.assert_array_equal(again[0].moving.array, again[1].moving.array)
    assert again[0].fixed.array.min() < -900
    with pytest.raises(InputError, match="scenario"):
        pairs.make("R9", "a", "b")
    with pytest.raises(InputError, match=r"SUBJECT\.NUMBER"):
        pairs.make("R1", "hard", "nothing")


def test_rows_of_a_real_peer():
    """A peer's row end to end on a small pair: the record of a finished and of a started run."""
    source = texture((24, 28, 30))
    pair = _turned_pair(source, source, np.random.default_rng(5), (3.0, 5.0), 10.0, (1.0, 1.0), 400.0)
    options = RunOptions(timeout_s=300.0)
    found = measure(Row("R5", "x", "move0", "simpleitk"), pair, options, None)
    assert found["status"] == "done"
    assert found["tre_mm"] < 1.0
    assert found["peak_mb"] > 50 and found["cpu_seconds"] > 0
    assert measure(Row("R5", "x", "move0", "simpleitk"), pair, options, None)["tre_mm"] == found["tre_mm"]
    started = measure(Row("R5", "x", "move0", "simpleitk@uae"), pair, options, found)
    assert started["tre_mm"] < 1.0 and started["start"] == 0
    nothing = measure(Row("R5", "x", "move0", "simpleitk@uae"), pair, options, {"fixed_to_moving": None})
    assert (nothing["status"], nothing["tre_mm"]) == ("failed", None)
    with pytest.raises(InputError, match="unknown system"):
        measure(Row("R5", "x", "move0", "nobody"), pair, options, None)
    assert cases(1) == ["ct_mij_abdpelvis.0", "ct_lidc0001_chest.0"]
    assert not math.isnan(found["floor_mm"])


def _with_semantic_head(model, path):
    config = replace(load_model(model).config, semantic=True)
    save_model(path, UAENet(config).state_dict(), config, InputMap(), {}, {"name": "semantic", "version": "0"})
    return path


def test_rows_of_our_own_system(tiny_model, small_ct, tmp_path, monkeypatch):
    """Our child process end to end with random weights: what it finds is worthless, that it is told is not."""
    ct = Volume.read(small_ct)
    ct.modality = "ct"
    points = ct.geometry.index_to_mm(np.array([[24.0, 33.0, 18.0], [15.0, 22.0, 24.0]]))
    pair = BenchPair(ct, ct, points, points, meta={"seed": 1})
    options = RunOptions(str(tiny_model), device="cpu", cache_folder=tmp_path, timeout_s=600.0)
    found = measure(Row("R5", "x", "move0", "uae"), pair, options, None)
    assert found["status"] in ("accepted", "review", "refused"), found["reason"]
    assert found["reason"] and "embed_fixed" in found["stages"]
    assert found["peak_mb"] > 100
    assert found["before_refinement_mm"] is None or found["before_refinement_mm"] >= 0.0
    matched = measure(Row("L2", "x", "a.0", "uae"), pair, options, None)
    assert set(matched["ways"]) == {"nearest", "fixed-point-L3", "fixed-point-L5", "fixed-point-L7"}
    # a scan against itself: every point finds itself
    assert np.abs(matched["ways"]["nearest"]["offset_mm"]).max() < 8.0
    semantic = str(_with_semantic_head(tiny_model, tmp_path / "semantic.pt"))
    monkeypatch.setattr(all_rows, "SEMANTIC", semantic)
    by_head = measure(Row("L1", "x", "pair0", semantic), pair, options, None)
    assert set(by_head["ways"]) == {f"{h} {w}" for h in HEADS for w in ("nearest", "fixed-point-L5")}, by_head["reason"]
    for name in HEADS:
        assert np.abs(by_head["ways"][f"{name} nearest"]["offset_mm"]).max() < 8.0
    broken = measure(Row("R5", "x", "move0", "uae"), pair, RunOptions("no-such-model"), None)
    assert (broken["status"], broken["tre_mm"]) == ("failed", None)
    assert "no-such-model" in broken["reason"]
