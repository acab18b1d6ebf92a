"""Figures and calibration of the benchmarks on cases made by hand, where every answer is known."""

import json
import math

import numpy as np
import pytest
import torch

from uae.bench import calibration
from uae.bench.calibrate import FIGURES, calibrate, cross_check, fit_box, fit_match, judge_thresholds
from uae.bench.metrics import point_errors, summarise, transform_tre, verdict_of_case
from uae.bench.parts import PARTIAL, PARTIAL_SHARE, along_body, partial_pair
from uae.errors import InputError
from uae.geometry import Geometry
from uae.json_values import plain
from uae.models import load_model, save_model
from uae.network import NetworkConfig, UAENet
from uae.preprocess import InputMap
from uae.registration.adareg import verdict_of
from uae.simulate import SimulatedPair
from uae.transform import Rigid
from uae.volume import Volume

GOOD = {
    "inliers": 200.0, "inlier_share": 0.8, "spread_mm": 40.0, "heldout_within_10mm": 0.9, "heldout_log10_p": -40.0,
    "runner_up_ratio": 0.05, "stability_mm": 1.0, "similarity_gain": 0.3,
    "hypothesis_score": 0.8, "hypothesis_margin": 0.1,
}  # fmt: skip
BAD = {
    "inliers": 14.0, "inlier_share": 0.15, "spread_mm": 15.0, "heldout_within_10mm": 0.1, "heldout_log10_p": -1.0,
    "runner_up_ratio": 0.9, "stability_mm": 60.0, "similarity_gain": 0.02,
    "hypothesis_score": 0.5, "hypothesis_margin": 0.01,
}  # fmt: skip
LIMITS = {"accepted": {"inliers": {"min": 100}}, "review": {"inliers": {"min": 20}}}


def match(error, score=0.9, method="guided", eligible=True, **other):
    figures = {"margin": 0.2, "cycle_mm": 2.0, "fixed_points": 40, "residual_mm": 1.0} | other
    return {"error_mm": error, "score": score, "method": method, "eligible": eligible, **figures}


def case(tre, refined=None, floor=0.0, features=GOOD, guided=(), errors=(1.0, 3.0, 20.0), failed=False, **other):
    refined = tre if refined is None else refined
    return {
        "set": "hard", "ct": "a", "seed": 0, "floor_mm": floor, "nearest": point_errors(np.array(errors)),
        "nearest_same_points": [{"error_mm": e} for e in errors],
        "fixed_point": [match(e, method="fixed-point") for e in errors], "guided": list(guided) or [match(1.0)],
        "registration": {"tre_mm": tre, "features": features, "verdict": "review"},
        "refined": {"tre_mm": refined, "failed": failed},
        "seconds": {"a": 1.0, "b": 2.0}, **other,
    }  # fmt: skip


def test_tre_uses_the_inverse_of_fixed_to_moving():
    """Fixed -> moving shifts by +5 in x, so a moving point belongs 5 mm lower in the fixed scan."""
    moving = np.array([[0.0, 0.0, 0.0], [10.0, 20.0, 30.0]])
    estimate = Rigid.from_rotation(np.eye(3), np.array([5.0, 0.0, 0.0]))
    assert transform_tre(estimate, moving, moving - np.array([5.0, 0.0, 0.0])) == pytest.approx(0.0, abs=1e-9)
    assert transform_tre(estimate, moving, moving + np.array([5.0, 0.0, 0.0])) == pytest.approx(10.0)
    turned = Rigid.from_rotation(np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]), np.zeros(3))
    assert transform_tre(turned, np.array([[0.0, 1.0, 0.0]]), np.array([[1.0, 0.0, 3.0]])) == pytest.approx(3.0)
    assert transform_tre(None, moving, moving) == math.inf


def test_point_figures_are_by_case_then_averaged():
    one, two = case(1.0, errors=(1.0, 2.0, 3.0)), case(1.0, errors=(30.0, 8.0, 40.0, 50.0, 12.0))
    found = summarise([one, two])
    assert found["median_mm"] == pytest.approx((2.0 + 30.0) / 2)
    assert found["under_10mm"] == pytest.approx((1.0 + 0.2) / 2)
    assert found["fixed_point_median_mm"] == pytest.approx(16.0)
    assert found["fixed_point_mean_mm"] == pytest.approx((2.0 + 28.0) / 2)
    assert found["nearest_same_points_p95_mm"] == pytest.approx((2.9 + 48.0) / 2)
    assert found["seconds_per_case"] == pytest.approx(3.0)


def test_rigid_figures_and_verdicts():
    cases = [
        case(2.0, refined=0.5),  # accepted, right
        case(7.0, floor=3.0),  # right: within floor + 5
        case(9.0, floor=3.0),  # not a success, but no failure either
        case(30.0, floor=3.0),  # accepted and wrong: the failure that must not be
        case(30.0, features=BAD),  # refused
        case(None, features={}),  # no estimate at all
        case(40.0, features=GOOD | {"inliers": 50.0}),  # review
        case(40.0, failed=True),  # figures for acceptance, but the refinement ran away: review
    ]
    found = summarise(cases, {"registration": LIMITS})
    assert found["rigid_success"] == pytest.approx(2 / 8)
    assert found["confident_failure_rate"] == pytest.approx(1 / 8)
    assert found["refusal_rate"] == pytest.approx(2 / 8)
    assert found["review_rate"] == pytest.approx(2 / 8)
    assert found["rigid_median_tre_mm"] == pytest.approx(30.0)
    assert found["refined_median_tre_mm"] == pytest.approx(30.0)
    assert summarise([cases[0], cases[1], cases[5]])["rigid_median_tre_mm"] == pytest.approx(7.0)
    assert summarise([cases[5]])["rigid_median_tre_mm"] is None
    assert verdict_of_case(cases[7], LIMITS) == "review"


def test_confident_shares_by_method():
    guided = [match(1.0), match(30.0), match(2.0, score=0.3), match(2.0, eligible=False)]
    guided += [match(1.0, method="fixed-point")]
    limits = {"score": 0.5, "fixed-point": {"score": 0.95}}
    found = summarise([case(1.0, guided=guided)], {"match": limits})
    assert found["confident_share"] == pytest.approx(2 / 5)
    assert found["confident_over_10mm"] == pytest.approx(1 / 2)
    assert summarise([case(1.0, guided=guided)])["confident_share"] == 0.0


def test_plain_is_json():
    mixed = {"a": np.float32(2), "b": math.inf, "c": (np.int64(3), np.bool_(True), math.nan)}
    assert json.loads(json.dumps(plain(mixed), allow_nan=False)) == {"a": 2.0, "b": None, "c": [3, True, None]}


def rows(*features):
    return np.array([[f[name] for name in FIGURES] for f in features])


def test_box_stops_every_wrong_row_and_keeps_the_right_ones():
    rng = np.random.default_rng(0)
    right = rows(*[{k: v * rng.uniform(0.7, 1.3) for k, v in GOOD.items()} for _ in range(60)])
    # The wrong ones look right in every figure but the runner-up.
    wrong = rows(*[
        {k: v * rng.uniform(0.7, 1.3) for k, v in GOOD.items()} | {"runner_up_ratio": rng.uniform(0.3, 1.0)}
        for _ in range(30)
    ])  # fmt: skip
    box = fit_box(right, wrong)
    signs = np.array(list(FIGURES.values()))
    low = signs * np.array([box.limits[name] for name in FIGURES])
    passed_right, passed_wrong = ((r * signs >= low).all(axis=1) for r in (right, wrong))
    assert not passed_wrong.any()
    assert passed_right.mean() > 0.85
    assert 0.065 < box.limits["runner_up_ratio"] < 0.3
    assert fit_box(right, rows(*[GOOD] * 3)).as_limits()["inliers"].keys() == {"min"}


def test_box_cannot_be_fooled_by_nan():
    right, wrong = rows(GOOD), rows(GOOD | {"similarity_gain": math.nan}, BAD)
    box = fit_box(right, wrong)
    assert box.limits["inliers"] <= GOOD["inliers"]
    assert box.limits["runner_up_ratio"] >= GOOD["runner_up_ratio"]


def test_calibrated_limits_separate():
    rng = np.random.default_rng(1)

    def noisy(features):
        return {k: v * rng.uniform(0.8, 1.2) for k, v in features.items()}

    guided = [match(2.0, score=0.8 + 0.001 * i, margin=0.3) for i in range(30)]
    guided += [match(60.0, score=0.8 + 0.001 * i, margin=0.01) for i in range(30)]
    cases = [case(1.0, features=noisy(GOOD), guided=guided, ct=ct) for ct in "ab" for _ in range(8)]
    cases += [case(50.0, features=noisy(BAD), guided=guided, ct=ct) for ct in "ab" for _ in range(4)]
    free = [match(None, margin=0.01)] * 5
    negatives = [
        {"kind": "no-overlap", "registration": {"features": noisy(BAD)}, "fixed_point": free, "guided": []}
        for _ in range(6)
    ]
    thresholds = calibrate(cases, negatives)
    json.dumps(thresholds, allow_nan=False)
    assert "smaller_body_ml" not in thresholds["registration"]["accepted"]
    found = judge_thresholds(cases, negatives, thresholds)
    assert found["hard"]["accepted_rate"] == pytest.approx(16 / 24)
    assert found["hard"]["confident_failure_rate"] == 0.0
    assert found["no-overlap"] == {"pairs": 6, "accepted": 0, "refused": 6, "confident_matches": 0, "matches": 30}
    # Half of the guided matches of the 16 good cases; of the 8 refused cases the 3 free ones count, none confident.
    assert found["hard"]["confident_share"] == pytest.approx(480 / (16 * 60 + 8 * 3))
    assert found["hard"]["confident_over_10mm"] == 0.0
    across = cross_check(cases, negatives)
    assert set(across) == {"a", "b"}
    assert across["a"]["hard"]["confident_failure_rate"] == 0.0
    assert "no-overlap" not in across["a"]


def test_pairs_that_show_the_ct_held_out_are_judged_and_not_learned_from():
    cases = [case(1.0, features=GOOD, ct=ct) for ct in "ab" for _ in range(3)]
    pair = {"kind": "no-overlap", "registration": {"features": GOOD}, "fixed_point": [], "guided": []}
    across = cross_check(cases, [pair | {"cts": ["a", "b"]}])
    assert across["a"]["no-overlap"]["accepted"] == across["b"]["no-overlap"]["accepted"] == 1
    assert cross_check(cases, [pair | {"cts": ["b"]}])["a"]["hard"]["accepted_rate"] == 0.0


def test_calibration_stores_limits_in_a_copy_of_the_model(monkeypatch, tmp_path):
    def suite(model, studies, data_dir, quick, sides, path, options, progress, cancel):
        records = [match(1.0, score=0.8 + 0.001 * i) for i in range(200)]
        pairs = [{"kind": kind, "matches": {"fixed_point_5": records}} for kind in ("ct_ct", "ct_mr")]
        assert options.moving == "ct" and sides == (0, 5)
        assert verdict_of(BAD, model.thresholds["registration"])[0] == "accepted" and "match" not in model.thresholds
        return {"cases": [case(1.0, features=GOOD, ct=ct) for ct in "ab"], "inter_subject": {"cases": pairs}}

    def negatives(model, data_dir, per_kind, save, device, moving, earlier, progress, cancel):
        told.append(list(earlier))
        records = [{"name": "x", "kind": "no-overlap", "cts": ["a"], "registration": {"features": BAD},
                    "fixed_point": [match(None, score=0.4)] * 9, "guided": []}]  # fmt: skip
        save(records)
        return records

    told = []
    monkeypatch.setattr(calibration, "run_suite", suite)
    monkeypatch.setattr(calibration, "run_negatives", negatives)
    torch.manual_seed(0)
    config = NetworkConfig.light()
    save_model(tmp_path / "own.pt", UAENet(config).state_dict(), config, InputMap(), {}, {"name": "own"})
    model = load_model(tmp_path / "own.pt")
    found = calibration.run_calibration(model, tmp_path / "c.json", tmp_path / "calibrated.pt", moving="ct")
    copy = load_model(tmp_path / "calibrated.pt")
    assert copy.thresholds == found["thresholds"] and copy.thresholds["match"]["fixed-point"]["score"] > 0.4
    assert copy.meta["calibration"]["moving"] == "ct" and copy.meta["name"] == "own"
    assert all(torch.equal(value, copy.state[key]) for key, value in model.state.items())
    stored = json.loads((tmp_path / "c.json").read_text())
    assert stored["thresholds"] == found["thresholds"] and stored["judged"]["no-overlap"]["accepted"] == 0
    assert stored["cross_check"]["a"]["no-overlap"]["pairs"] == 1 and told == [[]]
    stored["meta"] = {"model_sha256": "another"}
    (tmp_path / "c.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match="choose another --json"):
        calibration.run_calibration(model, tmp_path / "c.json")


def test_scans_smaller_than_any_case_are_outside_the_calibration():
    sized = GOOD | {"smaller_body_ml": 2000.0}
    cases = [case(1.0, features=sized | {"smaller_body_ml": size}) for size in (3000.0, 2000.0, 2500.0)]
    limits = calibrate(cases, [])
    assert limits["registration"]["accepted"]["smaller_body_ml"] == {"min": 1900.0}
    assert verdict_of_case(case(1.0, features=sized), limits["registration"]) == "accepted"
    small = case(1.0, features=sized | {"smaller_body_ml": 500.0})
    assert verdict_of_case(small, limits["registration"]) == "refused"


def test_no_safe_match_limits_means_never_confident():
    mixed = {"hard": [match(e, score=0.9) for e in (1.0, 50.0) * 40]}
    assert fit_match(mixed) == {"score": 2.0}
    assert fit_match({"hard": []}) == {"score": 2.0}
    # Few right ones and no wrong one prove no share of 2 %.
    assert fit_match({"hard": [match(1.0)] * 10}) == {"score": 2.0}
    assert fit_match({"hard": [match(1.0)] * 100})["score"] == pytest.approx(0.9)


def test_wrong_matches_of_one_set_are_not_hidden_by_another():
    hard = [match(60.0, score=0.9)] * 40 + [match(1.0, score=0.95)] * 200
    matches = {"standard15": [match(1.0, score=0.9)] * 3000, "hard": hard}
    limits = fit_match(matches)
    assert limits["score"] > 0.9


def test_landmarks_of_other_people_make_confident_stricter():
    free = [match(1.0, score=0.7 + 0.001 * i) for i in range(200)]
    cases = [case(1.0, features=GOOD) | {"fixed_point": free}] * 3
    others = [match(1.0, score=0.85)] * 60 + [match(30.0, score=0.8)] * 60
    alone, both = (calibrate(cases, [], people)["match"]["fixed-point"]["score"] for people in ((), others))
    assert alone < 0.75
    assert both > 0.8


def test_bench_resumes_and_writes_after_every_case(monkeypatch, tmp_path):
    """Interrupted after three cases, the second run measures only what is missing."""
    from uae.bench import embedding as bench

    measured = []

    class Stub:
        name, version, sha256, thresholds = "m", "1", "f" * 64, {}

    def fake_case(pair, *_):
        if len(measured) == 3 and not resumed:
            raise KeyboardInterrupt
        measured.append(pair)
        return case(1.0) | {"set": pair[0], "seed": pair[1]}

    monkeypatch.setattr(bench, "find_data", lambda folder: type("Data", (), {"ct": staticmethod(lambda name: name)}))
    monkeypatch.setattr(bench, "body_mask", lambda ct: None)
    monkeypatch.setattr(bench, "embed", lambda *_, **__: None)
    monkeypatch.setattr(bench, "simulate_scan", lambda ct, seed, name, modality, body: (name, seed))
    monkeypatch.setattr(bench, "run_case", fake_case)
    path, resumed = tmp_path / "bench.json", False
    with pytest.raises(KeyboardInterrupt):
        bench.run_embedding_bench(Stub, tmp_path, cases_per_ct=2, sets=("hard", "standard15"), json_path=path)
    assert len(json.loads(path.read_text())["cases"]) == 3
    resumed = True
    found = bench.run_embedding_bench(Stub, tmp_path, cases_per_ct=2, sets=("hard", "standard15"), json_path=path)
    assert len(measured) == len(set(measured)) == 8
    assert found["hard"]["cases"] == found["standard15"]["cases"] == 4
    assert json.loads(path.read_text()) == found
    Stub.sha256 = "0" * 64
    bench.run_embedding_bench(Stub, tmp_path, cases_per_ct=1, sets=("hard",), json_path=path)
    assert len(measured) == 10


def test_bench_input_errors(tmp_path, monkeypatch):
    from uae.bench.data import find_data, missing_data_reason
    from uae.bench.embedding import run_embedding_bench

    with pytest.raises(InputError, match="set"):
        run_embedding_bench(None, sets=("easy",))
    monkeypatch.setenv("UAE_DATA", str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="UAE_DATA"):
        find_data()
    assert "UAE_DATA" in missing_data_reason()
    monkeypatch.setenv("UAE_DATA", str(tmp_path))
    assert find_data().root == tmp_path.resolve()
    with pytest.raises(InputError, match="missing"):
        find_data().ct("ct_x")


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_partial_pairs_share_the_promised_part(seed, flip):
    rng = np.random.default_rng(seed)
    direction = np.diag([1.0, 1.0, -1.0 if flip else 1.0])
    grid = Geometry((60, 20, 20), (4.0, 4.0, 5.0), (10.0, -20.0, 300.0), direction)
    ct = Volume(rng.normal(size=grid.shape).astype(np.float32), grid, "ct")
    places = grid.index_to_mm(rng.uniform((2, 2, 12), (18, 18, 48), (3000, 3)))
    pair = SimulatedPair(ct, ct, None, None, 0.0, places + 50.0, places, {"seed": seed, "set": "standard15"})
    part = partial_pair(pair)
    assert part.meta["set"] == PARTIAL and pair.meta["set"] == "standard15"
    inside = part.fixed.geometry.contains(places).mean()
    assert PARTIAL_SHARE[0] - 0.03 <= inside <= PARTIAL_SHARE[1] + 0.03
    points = part.fixed.geometry.grid_points_mm()[::50]
    np.testing.assert_allclose(part.fixed.sample(points), ct.sample(points), atol=1e-5)
    assert part.fixed.array.size < ct.array.size and part.moving is pair.moving


def test_along_body_counts_from_the_feet():
    for flip in (1.0, -1.0):
        grid = Geometry((10, 4, 4), (1.0, 1.0, 2.0), (0.0, 0.0, 0.0), np.diag([1.0, 1.0, flip]))
        upper = along_body(Volume(np.zeros(grid.shape, np.float32), grid), 0.6, 1.0)
        assert upper.array.shape == (4, 4, 4)
        assert upper.geometry.center_mm()[2] > grid.center_mm()[2]
