"""Studies of the embedding benchmark on cases made by hand, where every answer is known."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from matching_fields import make
from study_parts import MARKS, SHIFT, box_labels, model, setup, shuffled, two_scans

from uae.bench import inter_subject, organs, real_inter_subject, real_mr, suite
from uae.bench.inter_subject import landmark_figures, landmark_matches, level_of
from uae.bench.organs import class_points
from uae.bench.real_inter_subject import cycle_figures, kidney_figures, kidney_matches, label_distances
from uae.bench.reliability import plot_reliability, reliability, reliability_curve
from uae.bench.sides import summarise_sides
from uae.bench.study import Setup, Study, check_sides, error_figures, method_name, run_study
from uae.bench.suite import choose_studies, run_suite
from uae.cli import main
from uae.errors import CancelledError, InputError
from uae.volume import Volume

LIMITS = {"match": {"score": 0.5}}


def record(error, score=0.9, method="fixed-point", eligible=True, **other):
    figures = {"margin": 0.2, "cycle_mm": 2.0, "fixed_points": 40, "residual_mm": 1.0} | other
    return {"error_mm": error, "score": score, "method": method, "eligible": eligible, **figures}


@pytest.fixture(scope="module")
def pair():
    return two_scans()


def test_perfect_embedding_finds_every_landmark_and_a_shuffled_one_none(pair):
    truth = {name: place + SHIFT for name, place in MARKS.items() if name != "only_here"}
    found = landmark_matches(setup(0, 3, 5), *pair, MARKS, truth)
    assert list(found) == ["nearest", "fixed_point_3", "fixed_point_5"]
    for records in found.values():
        assert [r["label"] for r in records] == list(truth)
        figures = landmark_figures(records, None)
        assert figures["mean_mm"] < 1.0 and figures["under_10mm"] == 1.0 and figures["level_right"] == 1.0
        assert figures["vertebrae"] == 3
    wrong = landmark_matches(setup(0, 5), pair[0], shuffled(pair[1]), MARKS, truth)
    for records in wrong.values():
        assert landmark_figures(records, None)["median_mm"] > 10.0


def test_methods_are_recorded_under_the_names_of_their_limits(pair):
    truth = {"carina": MARKS["carina"] + SHIFT}
    found = landmark_matches(setup(0, 5), *pair, MARKS, truth)
    assert [found[name][0]["method"] for name in ("nearest", "fixed_point_5")] == ["nearest", "fixed-point"]
    assert found["nearest"][0]["fixed_points"] == 0 and found["fixed_point_5"][0]["fixed_points"] > 4
    assert "level_right" not in found["nearest"][0]


def test_level_is_the_nearest_vertebra_and_a_flag_excuses_a_wrong_one():
    assert level_of(np.array([45.0, 45.0, 60.0]), MARKS) == "vertebra_T12"
    assert level_of(np.array([45.0, 45.0, 62.0]), MARKS) == "vertebra_T11"
    assert level_of(np.array([45.0, 49.0, 30.0]), MARKS) == "vertebra_L1"
    records = [
        record(2.0, level_right=True),
        record(28.0, level_right=False),  # confident and wrong
        record(28.0, score=0.2, level_right=False),  # wrong, but flagged
        record(2.0, score=0.2, level_right=True),
        record(50.0),  # no vertebra
    ]
    found = landmark_figures(records, LIMITS["match"])
    assert found["vertebrae"] == 4
    assert found["level_right"] == pytest.approx(2 / 4)
    assert found["level_right_or_flagged"] == pytest.approx(3 / 4)
    assert landmark_figures(records, None)["level_right_or_flagged"] == 1.0  # nothing is confident without limits


def test_error_figures():
    found = error_figures([record(1.0), record(9.0), record(21.0), record(19.0, score=0.1)], LIMITS["match"])
    assert found["matches"] == 4
    assert found["mean_mm"] == pytest.approx(12.5)
    assert found["median_mm"] == pytest.approx(14.0)
    assert found["under_10mm"] == pytest.approx(0.5)
    assert found["over_20mm"] == pytest.approx(0.25)
    assert found["confident_share"] == pytest.approx(0.75)
    assert found["confident_over_10mm"] == pytest.approx(1 / 3)
    assert error_figures([record(50.0)], None)["confident_over_10mm"] == 0.0


def test_sides_are_compared_by_case_then_averaged():
    cases = [
        {"set": "hard", "matches": {"nearest": [record(2.0), record(30.0)], "fixed_point_5": [record(1.0)] * 2}},
        {"set": "hard", "matches": {"nearest": [record(4.0)], "fixed_point_5": [record(25.0)]}},
        {"set": "standard15", "matches": {"nearest": [record(8.0)], "fixed_point_5": [record(8.0)]}},
    ]
    found = summarise_sides(cases)
    assert found["hard"]["cases"] == 2
    assert found["hard"]["nearest"]["median_mm"] == pytest.approx((16.0 + 4.0) / 2)
    assert found["hard"]["nearest"]["failures"] == pytest.approx((0.5 + 0.0) / 2)
    assert found["hard"]["nearest"]["p95_mm"] == pytest.approx((28.6 + 4.0) / 2)
    assert found["hard"]["fixed_point_5"]["failures"] == pytest.approx(0.5)
    assert found["standard15"]["nearest"]["under_10mm"] == 1.0
    assert method_name(0) == "nearest" and method_name(7) == "fixed_point_7"


@pytest.mark.parametrize("sides", [(4,), (-1,), (0, 2), ()])
def test_even_sides_are_refused(sides):
    with pytest.raises(InputError, match="side"):
        check_sides(sides)
    assert check_sides((5, 0, 5)) == (5, 0)


def test_distance_to_a_label_counts_millimetres_and_sides():
    labels = box_labels(flip=True)
    places = np.array([[64.0, 16.0, 40.0], [24.0, 16.0, 40.0], [76.0 + 6.0, 16.0, 40.0], [64.0, 32.0 + 10.0, 40.0]])
    np.testing.assert_allclose(label_distances(places, labels, 1), [0.0, 32.0, 6.0, 10.0])
    np.testing.assert_allclose(label_distances(places[:2], labels, 2), [28.0, 0.0])


def test_kidneys_are_found_by_a_perfect_embedding_and_swapped_by_a_mirrored_one(pair):
    points = {"left_centre": np.array([65.0, 21.0, 45.0]), "right_lateral": np.array([25.0, 21.0, 45.0])}
    labels = box_labels(SHIFT, flip=True)
    for records in kidney_matches(setup(0, 5), *pair, points, labels).values():
        found = kidney_figures(records, None)
        assert found["inside"] == 1.0 and found["mean_mm"] == 0.0 and found["other_kidney"] == 0.0
        # The left box runs over 56..76, 8..32, 32..60 mm: its centroid is 66, 20, 46.
        assert found["centre_median_mm"] == pytest.approx(np.sqrt(3.0), abs=0.3)
    mirrored = make(origin=SHIFT, to_anatomy=lambda p: np.array([92.0, 0, 0]) + (p - SHIFT) * [-1.0, 1.0, 1.0])
    for records in kidney_matches(setup(0), pair[0], mirrored, points, labels).values():
        found = kidney_figures(records, None)
        assert found["inside"] == 0.0 and found["other_kidney"] == 1.0 and found["median_mm"] > 10.0


def test_cycle_figures():
    found = cycle_figures(
        [record(None, cycle_mm=c, score=s) for c, s in ((1, 0.9), (5, 0.1), (40, 0.9))], {"score": 0.5}
    )
    assert (found["cycle_median_mm"], found["matches"]) == (5.0, 3)
    assert found["cycle_mean_mm"] == pytest.approx(46 / 3)
    assert found["cycle_under_10mm"] == pytest.approx(2 / 3)
    assert found["confident_share"] == pytest.approx(2 / 3)


def test_seeds_and_subjects_keep_to_the_split():
    from uae.bench import negatives
    from uae.bench.data import VALIDATION_CTS
    from uae.phantom import FIRST_TEST_SEED, TRAINING_SEEDS, VALIDATION_SEEDS
    from uae.training.data import check_training_file

    seeds = {int(seed) for case in inter_subject.phantom_pairs(setup()) for seed in case.split()[1:]}
    validation = seeds | set(real_inter_subject.PHANTOM_SEEDS)
    assert validation <= set(VALIDATION_SEEDS)
    assert len(validation) == len(seeds) + len(real_inter_subject.PHANTOM_SEEDS)
    assert negatives.VALIDATION_SEEDS[0] + 20 < min(validation)
    assert set(organs.PROTOTYPE_SEEDS) <= set(TRAINING_SEEDS)
    assert min(organs.TEST_SEEDS) >= FIRST_TEST_SEED
    assert set(real_inter_subject.PARTNERS) == set(VALIDATION_CTS)
    for others in real_inter_subject.PARTNERS.values():
        for other in others:
            check_training_file(f"{other}/ct.nii.gz")  # raises for what is held back
    assert [study.name for study in suite.STUDIES.values() if study.test] == ["organs", "real_mr"]


def test_reliability_rises_with_the_score_and_is_drawn(tmp_path):
    records = [record(5.0 if k >= 50 else 30.0, score=k / 100) for k in range(100)] + [record(None, score=2.0)]
    curve = reliability_curve(records, bins=4)
    assert [b["matches"] for b in curve] == [25] * 4
    assert [b["under_10mm"] for b in curve] == [0.0, 0.0, 1.0, 1.0]
    assert (curve[0]["low"], curve[3]["high"]) == (0.0, 0.99)
    assert curve[1]["score"] == pytest.approx(np.arange(25, 50).mean() / 100)
    pairs = [{"kind": "ct_mr", "matches": {"fixed_point_5": records[:100]}}]
    found = reliability({"inter_subject": {"cases": pairs}}, {"match": {"score": 0.4}})
    own = found["inter_subject_ct_mr"]
    assert (own["confident_matches"], own["not_confident_matches"]) == (60, 40)
    assert own["confident_under_10mm"] == pytest.approx(50 / 60) and own["not_confident_under_10mm"] == 0.0
    picture = plot_reliability(found, tmp_path / "curve.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert reliability({"cases": []}, {}) == {}


def counting_study(measured, size=4, settings=0, test=False):
    def measure(setup, name):
        if setup.cancel is not None and len(measured) == 2:
            raise CancelledError("stop")
        measured.append(name)
        return {"value": int(name)}

    return Study(
        "counting", lambda setup: [str(k) for k in range(size)], measure,
        lambda records, thresholds: {"sum": sum(r["value"] for r in records)}, lambda setup: {"n": settings}, test,
    )  # fmt: skip


def test_study_resumes_and_measures_again_under_other_settings():
    measured, saved, told = [], [], []
    stopped = setup()
    stopped.cancel = lambda: False
    with pytest.raises(CancelledError):
        run_study(counting_study(measured), stopped, None, saved.append)
    assert [len(s["cases"]) for s in saved] == [1, 2] and saved[-1]["sum"] == 1
    found = run_study(counting_study(measured), setup(), saved[-1], saved.append, lambda *step: told.append(step))
    assert measured == ["0", "1", "2", "3"] and found["sum"] == 6
    assert told[-1] == ("counting", 1.0) and told[0] == ("counting", 0.0)
    again = run_study(counting_study(measured, settings=1), setup(), found)
    assert len(measured) == 8 and again["sum"] == 6
    smaller = run_study(counting_study(measured, size=2), setup(), found)
    assert len(measured) == 8 and smaller["sum"] == 6  # a smaller run throws nothing away
    assert [r["case"] for r in smaller["cases"]] == ["0", "1", "2", "3"]


def test_suite_keeps_what_other_runs_have_measured(monkeypatch, tmp_path):
    measured, path = [], tmp_path / "e.json"
    studies = {
        "inter_subject": replace(counting_study(measured), name="inter_subject"),
        "organs": replace(counting_study(measured, test=True), name="organs"),
    }
    monkeypatch.setattr(suite, "STUDIES", studies)
    monkeypatch.setattr(suite, "reliability", lambda result, thresholds: {})
    monkeypatch.setattr(
        suite, "run_embedding_bench",
        lambda m, *_, keep, json_path, **__: {"hard": {"cases": 1}, "meta": {"model_sha256": m.sha256}, **keep},
    )  # fmt: skip
    run_suite(model(), ("inter_subject", "organs"), json_path=path)
    first = json.loads(path.read_text())
    assert first["inter_subject"]["sum"] == first["test"]["organs"]["sum"] == 6 and len(measured) == 8
    run_suite(model(), ("simulated", "inter_subject"), json_path=path)
    second = json.loads(path.read_text())
    assert second["hard"] == {"cases": 1} and second["test"] == first["test"] and len(measured) == 8
    other = model()
    other.sha256 = "0" * 64
    run_suite(other, ("inter_subject",), json_path=path)
    assert len(measured) == 12 and "test" not in json.loads(path.read_text())


def test_test_subjects_only_where_asked_for():
    assert choose_studies() == ("simulated", "inter_subject", "real_inter_subject")
    assert choose_studies(sides=True) == ("simulated", "inter_subject", "real_inter_subject", "sides")
    assert choose_studies(report_test=True)[-2:] == ("organs", "real_mr")
    assert choose_studies(("real_mr",), report_test=True) == ("real_mr",)
    with pytest.raises(InputError, match="report-test"):
        choose_studies(("organs",))
    with pytest.raises(InputError, match="unknown study"):
        choose_studies(("simulate",))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("embedding", "--only", "organs"), "--report-test"),
        (("embedding", "--only", "nothing"), "unknown study"),
        (("embedding", "--sides", "0,4"), "side 4"),
        (("embedding", "--sides", "five"), "whole numbers"),
        (("deeds", "--report-test"), "no test subjects"),
    ],
)
def test_bad_options_end_with_a_reason(options, word, tmp_path, capsys):
    assert main(["bench", *options, "--json", str(tmp_path / "e.json")]) == 2
    assert word in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_phantom_pairs_run_end_to_end(monkeypatch, tiny_model):
    """Small phantoms and random weights: the figures mean nothing, but they are all there."""
    from uae.models import load_model
    from uae.phantom import make_phantom

    monkeypatch.setattr(inter_subject, "make_phantom", partial(make_phantom, spacing=10.0, part=(60.0, 160.0)))
    whole = Setup(load_model(tiny_model), device="cpu", quick=True, sides=(0, 3))
    first = f"{inter_subject.FIRST_SEED} {inter_subject.FIRST_SEED + 1}"
    study = replace(inter_subject.INTER_SUBJECT, cases=lambda setup: [f"ct_ct {first}", f"ct_mr {first}"])
    found = run_study(study, whole)
    json.dumps(found, allow_nan=False)
    for kind in ("ct_ct", "ct_mr"):
        assert found[kind]["pairs"] == 1
        assert found[kind]["nearest"]["vertebrae"] >= 3
        assert found[kind]["fixed_point_3"]["mean_mm"] > 5.0


def test_real_kidney_points_and_labels_lie_where_they_should(real_data):
    """Kidney points in enhanced parenchyma; labels of the flipped slab on bone and liver; head templates in HU."""
    from uae.bench.data import find_data

    slab = real_data("ct_ts_dicomslab/labels_ts.nii.gz", "ct_mij_abdpelvis/ct.nii.gz", "head_mni_ctmr")[0]
    data = find_data()
    ct = data.ct(real_inter_subject.ABDOMEN)
    solid = [p for name, p in real_inter_subject.KIDNEY_POINTS.items() if not name.endswith("_centre")]
    assert (ct.sample(np.array(solid)) > 100.0).all()
    points = class_points(Volume.read(slab, label=True), organs.SLAB_CLASSES)
    scan = data.ct(organs.SLAB)
    hu = {name: float(np.median(scan.sample(points[name][0]))) for name in ("liver", "vertebrae_T12", "rib_left_9")}
    assert 20.0 < hu["liver"] < 160.0 and hu["vertebrae_T12"] > 120.0 and hu["rib_left_9"] > 120.0
    shared = set(points) & set(organs.phantom_names().values())
    assert len(shared) >= 28 and "portal_vein_and_splenic_vein" not in shared
    brain = np.array([[-25.0, 20.0, 30.0], [25.0, 20.0, 30.0], [-25.0, 40.0, 30.0], [25.0, 40.0, 30.0]])
    for name in ("head ct/t1", "brain ct/t1"):
        head = real_mr.load_scan(data, real_mr.PAIRS[name][0])
        assert head.modality == "ct" and head.minimum < -900.0
        assert 10.0 < np.median(head.sample(brain)) < 70.0
