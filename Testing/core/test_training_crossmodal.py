"""Registered pairs: table of registrations, refused and failed pairs left out, FOV negatives outside the overlap."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from training_parts import NARROW, small_config, small_task, tissue_block

from uae.errors import InputError
from uae.geometry import Geometry
from uae.models import save_model
from uae.network import UAENet
from uae.preprocess import InputMap
from uae.training import losses, registrations, sampling
from uae.training.crossmodal import CrossModalTask
from uae.training.registrations import Row, read_pairs, registered_arrays, registered_subject
from uae.training.subjects import subject_from_volume
from uae.training.unregistered import make_pairs
from uae.transform import Rigid
from uae.volume import Volume

MOVE = Rigid.from_euler_deg(4.0, -3.0, 5.0, center=(0, 60, 340)).matrix @ np.block(
    [[np.eye(3), np.array([[12.0], [-7.0], [20.0]])], [np.zeros((1, 3)), 1.0]]
)
MARGIN = 5


def moved_mr(ct: Volume) -> tuple[Volume, Rigid]:
    """The lower middle of a CT as an inverted MR with a moved header, and CT mm -> MR mm."""
    transform = Rigid(MOVE)
    part = ct.array[2:16, 10:46, 10:50]
    origin = ct.geometry.index_to_mm(np.array([[10.0, 10, 2]]))[0]
    geometry = Geometry(part.shape, ct.geometry.spacing, transform.apply(origin[None])[0], MOVE[:3, :3])
    return Volume((600 - np.clip(part, -500, 500)).astype(np.float32), geometry, "mr"), transform


@pytest.fixture(scope="module")
def arrays():
    ct = tissue_block()
    mr, transform = moved_mr(ct)
    return ct, registered_arrays(ct, mr, transform, MARGIN)


def test_registered_pair_lies_on_one_grid_and_knows_its_overlap(arrays):
    ct, found = arrays
    overlap = found["partner_mask"] > 0
    truth = np.zeros_like(overlap)
    truth[2:16, 10:46, 10:50] = True
    assert (overlap != truth).mean() < 0.02
    signal = found["partner"][4:14, 12:44, 12:48].astype(float)
    assert np.corrcoef(signal.ravel(), -np.clip(ct.array[4:14, 12:44, 12:48], -500, 500).ravel())[0, 1] > 0.999
    z, y, x = np.nonzero(found["beyond"])
    outside = [np.maximum(np.maximum(low - index, index - (high - 1)), 0)
               for index, low, high in ((z, 2, 16), (y, 10, 46), (x, 10, 50))]  # fmt: skip
    assert len(z) > 1000 and np.sqrt(sum(o.astype(float) ** 2 for o in outside)).min() > MARGIN - 1.5
    assert (found["mask"][found["beyond"] > 0] == 2).all()


@pytest.fixture(scope="module")
def task(arrays):
    config = small_config(
        "views.pairs_per_step=3", "crossmodal.inter_pairs=1", "crossmodal.fov_negatives=20", "views.positions=40",
        "views.seed_offset=0.3", "views.field_of_view_probability=0.0", "views.body_share=0.0",
    )  # fmt: skip
    subjects = [subject_from_volume("block", arrays[0])]
    return small_task(CrossModalTask, config, subjects, registered=[registered_subject("pair", arrays[1])])


def test_every_mini_batch_has_intra_and_inter_pairs(task):
    for seed in range(3):
        kinds = [set(pair.kinds) for pair in task.prepare(np.random.default_rng(seed))]
        assert "partner" not in kinds[0] | kinds[1] and kinds[2] == {"ct", "partner"}


def test_fov_negatives_are_outside_the_dilated_overlap_and_positives_inside_the_overlap(task, arrays):
    pair = task.prepare(np.random.default_rng(1))[-1]
    view, cells = pair.beyond
    voxels = np.rint(view.map.to_subject(sampling.fine_positions(cells)).numpy()).astype(int)
    assert view.kind == "ct" and 0 < len(cells) <= 20
    low, high = np.array([2, 10, 10]), np.array([16, 46, 50]) - 1
    apart = np.linalg.norm(np.maximum(np.maximum(low - voxels, voxels - high), 0), axis=1)
    assert apart.min() > MARGIN - 1.5
    for k in (0, 1):
        here = pair.views[k].map.to_subject(sampling.fine_positions(pair.cells[k])).numpy()
        there = pair.views[1 - k].map.to_subject(pair.partners[k]).numpy()
        assert np.abs(here - there).max() < 0.05
        assert (here > low - 1).all() and (here < high + 1).all()


def test_fov_negatives_enter_the_loss_of_every_query():
    def unit(*rows):
        return dict.fromkeys(losses.LEVELS, torch.nn.functional.normalize(torch.tensor(rows), dim=1))

    query, far = unit([1.0, 0.0], [0.0, 1.0]), unit([-1.0, -1.0])
    places = torch.tensor([[0.0, 0, 0], [50.0, 0, 0]])
    pair = losses.PairFeatures(query, query, far, places, places, torch.tensor([[500.0, 0, 0]]))
    weights = {"weights": (0.0, 1.0, 0.0)}
    without = float(losses.appearance_loss([pair], weights)[0])
    pair.beyond, pair.beyond_mm = unit([1.0, 0.0]), torch.tensor([[-500.0, 0, 0]])
    with_them = float(losses.appearance_loss([pair], weights)[0])
    rest = 2 * 1.0 + math.exp(-math.sqrt(0.5) / 0.1)  # other query, its partner, the random cell; positive e^10
    first = math.log((math.exp(10) + rest) / math.exp(10))
    assert without == pytest.approx(first, abs=1e-6)
    near = math.log((2 * math.exp(10) + rest) / math.exp(10))  # the new one looks like the first query
    expected = (near + math.log((math.exp(10) + rest + 1) / math.exp(10))) / 2
    assert with_them == pytest.approx(expected, abs=1e-6)
    chosen = {**weights, "hardest": 2, "diverse": 1}
    least = math.log((2 * math.exp(10) + 1) / math.exp(10)) / 2  # on top of the hard negatives, not among them
    assert float(losses.appearance_loss([pair], chosen)[0]) > least
    pair.beyond_mm = torch.tensor([[3.0, 0, 0]])  # as near to the first query as a negative must not be
    spared = (first + math.log((math.exp(10) + rest + 1) / math.exp(10))) / 2
    assert float(losses.appearance_loss([pair], weights)[0]) == pytest.approx(spared, abs=1e-6)


def test_one_step_of_a_mixed_mini_batch_trains(task):
    loss, figures = task.step(task.prepare(np.random.default_rng(5)))
    loss.backward()
    assert math.isfinite(figures["joint"]) and task.network.backbone.conv1.conv.weight.grad.abs().sum() > 0


def write_pairs(folder: Path, rows: list[tuple[str, str, str, str]]) -> Path:
    path = folder / "pairs.csv"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([*registrations.COLUMNS, "truth"])
        writer.writerows([*row, "secret"] for row in rows)
    return path


def test_pairs_table_names_what_is_wrong(tmp_path):
    ct = tissue_block()
    ct.write(tmp_path / "a.nii.gz")
    ct.write(tmp_path / "b.nii.gz")
    good = write_pairs(tmp_path, [("a.nii.gz", "b.nii.gz", "mr", "ct")])
    assert read_pairs(good) == [(tmp_path / "b.nii.gz", tmp_path / "a.nii.gz")]
    for rows, words in (
        ([("a.nii.gz", "b.nii.gz", "ct", "ct")], "one ct and one mr"),
        ([("a.nii.gz", "c.nii.gz", "ct", "mr")], "is missing"),
        ([("ct_mij_abdpelvis/ct.nii.gz", "b.nii.gz", "ct", "mr")], "kept for validation"),
        ([], "no pair"),
    ):
        with pytest.raises(InputError, match=words):
            read_pairs(write_pairs(tmp_path, rows))
    (tmp_path / "pairs.csv").write_text("fixed,moving\n")
    with pytest.raises(InputError, match="no column fixed_modality"):
        read_pairs(tmp_path / "pairs.csv")
    with pytest.raises(InputError, match="give a table"):
        read_pairs(tmp_path / "none.csv")


@pytest.fixture
def registering(monkeypatch, tmp_path):
    """Registrations without a network: what becomes of a pair is written in its name."""
    from uae.registration import pipeline

    ct = tissue_block()
    mr, transform = moved_mr(ct)
    asked = []

    def register(fixed, moving, model, options):
        asked.append(Path(moving.path).name)
        verdict = Path(moving.path).name.split("-")[0]
        if verdict == "broken":
            raise RuntimeError("no convergence")
        linear = None if verdict == "refused" else transform
        return pipeline.RegistrationResult(verdict, f"because {verdict}", fixed, moving, linear)

    monkeypatch.setattr(pipeline, "register", register)
    names = ["accepted-1", "refused-1", "broken-1", "review-1", "accepted-2"]
    ct.write(tmp_path / "ct.nii.gz")
    for name in names:
        mr.write(tmp_path / f"{name}.nii.gz")
    holes = mr.array.copy()
    holes[3, 3, 3] = np.nan
    torch.manual_seed(0)
    save_model(tmp_path / "m.pt", UAENet(NARROW).state_dict(), NARROW, InputMap(), {}, {})
    settings = small_config(f"crossmodal.model={tmp_path / 'm.pt'}", "crossmodal.deformable=false")["crossmodal"]
    pairs = [(tmp_path / "ct.nii.gz", tmp_path / f"{name}.nii.gz") for name in names]
    return pairs, settings, tmp_path / "out", asked


def test_refused_and_failed_pairs_are_in_the_table_but_not_trained_on(registering):
    pairs, settings, folder, asked = registering
    rows = registrations.register_pairs(pairs, settings, folder)
    assert [row.status for row in rows] == ["accepted", "refused", "failed", "review", "accepted"]
    assert [bool(row.file) for row in rows] == [True, False, False, False, True]
    assert "no convergence" in rows[2].reason and rows[0].overlap_percent > 5
    assert registrations.read_table(folder / registrations.TABLE) == rows
    subjects = registrations.load_registered(folder, rows)
    assert len(subjects) == 2 and all(s.registered for s in subjects)
    again = registrations.register_pairs(pairs, settings, folder)
    assert asked == [p[1].name for p in pairs] + ["broken-1.nii.gz"]  # only what failed is tried again
    assert [row.status for row in again] == [row.status for row in rows]
    other_round = registrations.register_pairs(pairs[:1], settings | {"round": 2}, folder)
    assert asked[-1] == "accepted-1.nii.gz" and other_round[0].key != rows[0].key


def test_pairs_that_are_added_later_leave_the_stored_ones_alone(registering):
    pairs, settings, folder, asked = registering
    first, second = pairs[0], pairs[4]
    (row,) = registrations.register_pairs([first], settings, folder)
    stored = (folder / row.file).read_bytes()
    rows = registrations.register_pairs([second, first], settings, folder)
    assert len(asked) == 2 and rows[1] == row and rows[0].file != row.file
    assert (folder / row.file).read_bytes() == stored


def test_a_restart_takes_up_what_several_processes_had_finished(registering):
    pairs, settings, folder, asked = registering
    registrations.register_pairs(pairs[:2], settings, folder)
    (folder / registrations.TABLE).rename(folder / f".1.{registrations.TABLE}")
    registrations.register_pairs(pairs[:2], settings, folder)
    assert len(asked) == 2 and not list(folder.glob(f".*{registrations.TABLE}"))


def test_pairs_registered_in_parallel_give_the_same_table(tmp_path):
    ct = tissue_block()
    mr, _ = moved_mr(ct)
    ct.write(tmp_path / "ct.nii.gz")
    mr.write(tmp_path / "mr.nii.gz")
    mr.array[:] = 7
    mr.write(tmp_path / "flat.nii.gz")
    torch.manual_seed(0)
    save_model(tmp_path / "m.pt", UAENet(NARROW).state_dict(), NARROW, InputMap(), {}, {})
    settings = small_config(f"crossmodal.model={tmp_path / 'm.pt'}", "crossmodal.deformable=false")["crossmodal"]
    pairs = [(tmp_path / "ct.nii.gz", tmp_path / f"{name}.nii.gz") for name in ("mr", "flat", "mr")]
    alone, together = (
        registrations.register_pairs(pairs, settings | {"jobs": jobs}, tmp_path / str(jobs)) for jobs in (1, 2)
    )
    assert [(r.status, r.reason, r.key) for r in together] == [(r.status, r.reason, r.key) for r in alone]
    assert {r.status for r in alone} <= {"refused", "failed"} and all(r.reason for r in alone)


def test_margins_belong_to_rounds():
    settings = small_config()["crossmodal"]
    assert [registrations.margin_of(settings | {"round": k}) for k in (1, 2, 3)] == [10, 5, 1]
    with pytest.raises(InputError, match="round = 4"):
        registrations.margin_of(settings | {"round": 4})


def test_all_pairs_refused_says_so(tmp_path, monkeypatch):
    from uae.training import crossmodal

    ct = tissue_block()
    ct.write(tmp_path / "a.nii.gz")
    ct.write(tmp_path / "b.nii.gz")
    table = write_pairs(tmp_path, [("a.nii.gz", "b.nii.gz", "ct", "mr")])
    rows = [Row("a", "b", "refused", "nothing agrees")]
    monkeypatch.setattr(crossmodal, "register_pairs", lambda *_: rows)
    config = small_config(f"crossmodal.pairs={table}")
    with pytest.raises(InputError, match=r"none of 1 pairs.*nothing agrees"):
        CrossModalTask(config, tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match="no pairs to register"):
        CrossModalTask(small_config(), tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match="inter_pairs"):
        CrossModalTask(small_config("crossmodal.inter_pairs=9"), tmp_path, tmp_path / "out")


def test_simulated_pairs_show_their_ct_where_the_truth_says(tmp_path):
    ct = tissue_block(shape=(70, 80, 80))
    (tmp_path / "x").mkdir()
    ct.write(tmp_path / "x" / "ct.nii.gz")
    config = small_config("crossmodal.simulated_pairs=1", "data.phantom_seeds=[0, 0]")
    config["data"]["volumes"] = [{"file": "x/ct.nii.gz", "modality": "ct"}]
    table = tmp_path / "out" / "pairs.csv"
    make_pairs(config, tmp_path, table)
    (ct_file, mr_file), = read_pairs(table)
    assert ct_file == (tmp_path / "x" / "ct.nii.gz").resolve()
    (truth_file,) = (tmp_path / "out").glob("x-*-0-truth.json")
    truth = Rigid(np.array(json.loads(truth_file.read_text())["fixed_to_moving_rigid"]))
    mr = Volume.read(mr_file)

    points = ct.geometry.index_to_mm(np.argwhere(ct.array > -500)[::7, ::-1].astype(float))

    def shared_information(offset: float) -> tuple[float, float]:
        there = mr.sample(truth.apply(points + np.array([offset, 0, 0])), fill=np.nan)
        inside = np.isfinite(there)
        joint = np.histogram2d(ct.sample(points)[inside], there[inside], bins=16)[0] / inside.sum()
        apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
        used = joint > 0
        return float((joint[used] * np.log(joint[used] / apart[used])).sum()), float(inside.mean())

    right, share = shared_information(0.0)
    assert 0.05 < share < 0.95
    assert right > 2 * max(shared_information(offset)[0] for offset in (-25.0, 25.0))


def test_simulated_pairs_of_cts_that_share_a_folder_are_different_people(tmp_path):
    files = ["cts/a.nii.gz", "cts/b.nii.gz"]
    (tmp_path / "cts").mkdir()
    for shape, file in zip(((70, 80, 80), (70, 90, 70)), files, strict=True):
        tissue_block(shape=shape).write(tmp_path / file)
    config = small_config("crossmodal.simulated_pairs=1", "data.phantom_seeds=[0, 0]")
    config["data"]["volumes"] = [{"file": file, "modality": "ct"} for file in files]
    table = tmp_path / "out" / "pairs.csv"
    make_pairs(config, tmp_path, table)
    pairs = read_pairs(table)
    assert len({mr for _, mr in pairs}) == len({ct for ct, _ in pairs}) == 2
    kept = [mr.read_bytes() for _, mr in pairs]
    for file in table.parent.iterdir():
        file.unlink()
    config["data"]["volumes"].reverse()
    make_pairs(config, tmp_path, table)
    assert [mr.read_bytes() for _, mr in reversed(read_pairs(table))] == kept
