"""The semantic branch: loss against hand-computed values, label sources, partial classes, the exported head."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch
from training_parts import small_config, small_task, tissue_block

from uae.errors import InputError
from uae.geometry import Geometry
from uae.training import case_cache, loop
from uae.training.data import load_subjects
from uae.training.labels import ClassTable, phantom_classes, totalsegmentator_case, totalsegmentator_cases
from uae.training.prototypes import LabelledCells, prototype_loss
from uae.training.semantic import SemanticTask, cell_classes
from uae.training.subjects import nearest_labels, subject_from_volume
from uae.volume import Volume


def cells(vectors: list, classes: list, annotated: tuple[int, ...]) -> LabelledCells:
    return LabelledCells(torch.tensor(vectors), torch.tensor(classes), frozenset(annotated))


def by_hand(volumes: list[LabelledCells], temperature: float, background: bool) -> dict[int, float]:
    """Equation 2 of the paper in plain loops."""
    everything = [(v, x, int(c)) for v in volumes for x, c in zip(v.vectors.tolist(), v.classes.tolist()) if c >= 0]
    found = {}
    for p in sorted({c for _, _, c in everything if c > 0}):
        members = [x for _, x, c in everything if c == p]
        prototype = [sum(x[k] for x in members) / len(members) for k in range(len(members[0]))]

        def weight(x, prototype=prototype):
            return math.exp(sum(a * b for a, b in zip(prototype, x)) / temperature)

        total = sum(weight(x) for v, x, c in everything if c > 0 or (background and p in v.annotated))
        found[p] = sum(-math.log(weight(x) / total) for x in members) / len(members)
    return found


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_prototype_loss_is_equation_2(background, temperature):
    first = cells([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]], [1, 1, 2, 0], (1, 2))
    second = cells([[0.6, 0.8], [0.0, -1.0], [0.6, -0.8]], [2, 0, -1], (2,))
    settings = {"temperature": temperature, "background": background}
    expected = by_hand([first, second], temperature, background)
    for reduction, total in (("mean", np.mean(list(expected.values()))), ("sum", sum(expected.values()))):
        loss, excess = prototype_loss([first, second], settings | {"reduction": reduction})
        assert float(loss) == pytest.approx(total, rel=1e-5)
    assert excess == pytest.approx({1: expected[1] - math.log(2), 2: expected[2] - math.log(2)}, rel=1e-4)


def test_unlabelled_cells_of_a_volume_without_a_class_are_no_negatives_of_it():
    labelled = cells([[1.0, 0.0], [0.0, 1.0]], [1, 2], (1, 2))
    background = [[1.0, 0.0], [1.0, 0.0]]
    partial = cells(background, [0, 0], (2,))
    complete = cells(background, [0, 0], (1, 2))
    apart = prototype_loss([labelled, partial])[1]
    together = prototype_loss([labelled, complete])[1]
    assert apart[1] == pytest.approx(math.log(1 + math.exp(-10)), abs=1e-5)
    assert together[1] == pytest.approx(math.log(3 + math.exp(-10)), abs=1e-5)
    assert apart[2] == pytest.approx(together[2])


def test_loss_without_any_class_is_zero_and_has_a_gradient():
    vectors = torch.randn(4, 3, requires_grad=True)
    loss, excess = prototype_loss([LabelledCells(vectors, torch.zeros(4, dtype=torch.long), frozenset({1}))])
    loss.backward()
    assert float(loss) == 0.0 and excess == {} and vectors.grad is not None
    with pytest.raises(InputError, match="reduction"):
        prototype_loss([cells([[1.0]], [1], (1,))], {"reduction": "median"})


@pytest.fixture(scope="module")
def totalsegmentator(tmp_path_factory):
    """Two cases in the public layout; the second lacks a class file, and its liver mask is empty."""
    root = tmp_path_factory.mktemp("ts")
    (root / "meta.csv").write_text("image_id;age;split\ns0000;50;train\ns0001;60;train\ns0002;60;test\n")
    for number in range(3):
        ct = tissue_block(number)
        folder = root / f"s{number:04d}"
        ct.write(folder / "ct.nii.gz") if folder.mkdir() is None else None
        (folder / "segmentations").mkdir()
        left = np.zeros(ct.geometry.shape, np.uint8)
        left[10:30, 10:30, 10:28] = 1
        overlapping = np.zeros_like(left)
        overlapping[10:30, 10:30, 24:40] = 1
        names = {"liver": left if number == 0 else 0 * left, "spleen": overlapping}
        if number == 0:
            names["aorta"] = np.roll(left, 20, axis=2)
        for name, mask in names.items():
            Volume(mask, ct.geometry).write(folder / "segmentations" / f"{name}.nii.gz")
    return root


def test_totalsegmentator_layout_is_read_by_name_and_split(totalsegmentator):
    table = ClassTable()
    cases = totalsegmentator_cases(totalsegmentator)
    assert [case.name for case in cases] == ["s0000", "s0001"]
    _, labels, annotated = totalsegmentator_case(cases[0], table)
    assert {table.names[n] for n in annotated} == {"aorta", "liver", "spleen"}
    assert labels.array[15, 15, 12] == table.number("liver")
    assert labels.array[15, 15, 26] == table.number("spleen")  # where masks overlap the later name wins
    _, labels, annotated = totalsegmentator_case(cases[1], table)
    assert {table.names[n] for n in annotated} == {"liver", "spleen"}  # looked for and not found is known, too
    assert set(np.unique(labels.array)) == {0, table.number("spleen")}


def test_totalsegmentator_cases_are_read_once(totalsegmentator, tmp_path, monkeypatch):
    case = tmp_path / "s0000"
    shutil.copytree(totalsegmentator / "s0000", case)
    monkeypatch.setenv("UAE_CACHE", str(tmp_path / "cache" / "embeddings"))
    read = []

    def counted(folder, table):
        read.append(folder)
        return totalsegmentator_case(folder, table)

    monkeypatch.setattr(case_cache, "totalsegmentator_case", counted)
    table, other = ClassTable(), ClassTable()
    other.number("sternum")
    first, second = case_cache.load_case(case, table), case_cache.load_case(case, other)
    assert len(read) == 1
    ct, classes, annotated = totalsegmentator_case(case, ClassTable())
    truth = subject_from_volume("s0000", ct, classes=classes, annotated=annotated)
    assert float((first.image - truth.image).abs().max()) <= 0.5 and torch.equal(first.image, second.image)
    assert (first.mask == truth.mask).all() and (first.body_cells == truth.body_cells).all()
    for subject, names in ((first, table.names), (second, other.names)):
        assert {names[number] for number in subject.annotated} == {"aorta", "liver", "spleen"}
        for number, name in enumerate(("aorta", "liver", "spleen"), start=1):
            assert {names[n] for n in np.unique(subject.classes[truth.classes == number])} == {name}
        assert ((subject.classes > 0) == (truth.classes > 0)).all()
    (case / "segmentations" / "aorta.nii.gz").unlink()
    assert len(case_cache.load_case(case, ClassTable()).annotated) == 2 and len(read) == 2
    for spoil in (lambda data: data[:1000], lambda data: data[:900] + bytes(400) + data[1300:]):
        for file in case_cache.case_folder().glob("*.npz"):
            file.write_bytes(spoil(file.read_bytes()))
        before = len(read)
        assert len(case_cache.load_case(case, ClassTable()).annotated) == 2 and len(read) == before + 1


def test_totalsegmentator_mask_of_another_size_is_refused(totalsegmentator, tmp_path):
    case = tmp_path / "s0000"
    shutil.copytree(totalsegmentator / "s0000", case)
    small = Volume(np.ones((4, 4, 4), np.uint8), Geometry((4, 4, 4), np.ones(3), np.zeros(3), np.eye(3)))
    small.write(case / "segmentations" / "liver.nii.gz")
    with pytest.raises(InputError, match="another size"):
        totalsegmentator_case(case, ClassTable())
    with pytest.raises(InputError, match="no case"):
        totalsegmentator_cases(tmp_path / "s0000")
    with pytest.raises(InputError, match="no such folder"):
        totalsegmentator_cases(tmp_path / "nowhere")


def test_labels_are_carried_by_place_and_labels_of_another_size_are_refused():
    scan = tissue_block()
    array = np.zeros(scan.geometry.shape, np.uint8)
    array[10:20, 15:30, 20:40] = 5
    direction = np.diag([1.0, -1.0, 1.0])
    origin = scan.geometry.origin + np.array([0, 2.0 * (scan.geometry.shape[1] - 1), 0])
    flipped = Volume(array[:, ::-1].copy(), Geometry(array.shape, np.full(3, 2.0), origin, direction))
    valid = np.ones(array.shape, bool)
    assert np.array_equal(nearest_labels("x", flipped, scan.geometry, valid), array)
    moved = Volume(array, Geometry(array.shape, np.full(3, 2.0), scan.geometry.origin + 40.0, np.eye(3)))
    with pytest.raises(InputError, match="another size"):
        nearest_labels("x", moved, scan.geometry, valid)
    larger = Volume(array, Geometry(array.shape, np.full(3, 4.0), scan.geometry.origin, np.eye(3)))
    with pytest.raises(InputError, match="another size"):
        nearest_labels("x", larger, scan.geometry, valid)


def test_phantom_and_totalsegmentator_share_classes_by_name():
    table = ClassTable()
    numbers = phantom_classes(table)
    shared = {"liver", "kidney_left", "vertebrae_T12", "inferior_vena_cava", "esophagus", "hip_right", "rib_left_7"}
    assert shared <= set(table.numbers) and "skin" not in table.numbers
    assert len(set(numbers.values())) == len(table.numbers)


@pytest.fixture(scope="module")
def labelled_subjects():
    subjects = []
    for seed in (3, 4):
        scan = tissue_block(seed)
        classes = np.where(scan.array > 60, 1, np.where((scan.array > -200) & (scan.array < 0), 2, 0)).astype(np.int16)
        labels = Volume(classes, scan.geometry)
        subjects.append(subject_from_volume(f"block{seed}", scan, classes=labels, annotated=frozenset({1, 2})))
    return subjects


@pytest.mark.parametrize("most", [0, 20])
def test_cells_of_a_step_carry_the_class_of_the_anatomy_shown(labelled_subjects, most):
    config = small_config("semantic.probability=1.0", f"semantic.cells_per_class={most}")
    task = small_task(SemanticTask, config, labelled_subjects, table=None)
    batch = task.prepare(np.random.default_rng(2))
    assert len({id(v.subject) for v in batch.views}) == 2
    for view, cells_zyx, classes, counts in zip(batch.views, batch.cells, batch.classes, batch.counts, strict=True):
        voxels = view.map.to_subject(cells_zyx * 2 + 0.5).numpy()
        assert np.array_equal(view.subject.classes[tuple(np.rint(voxels).astype(int).T)], classes.numpy())
        everywhere = cell_classes(view).numpy()
        for number in np.unique(everywhere[everywhere >= 0]):
            own = (classes == number).numpy()
            assert counts.numpy()[own].sum() == pytest.approx((everywhere == number).sum())
            assert not most or number == 0 or own.sum() <= most
        assert len(np.unique(cells_zyx.numpy(), axis=0)) == len(cells_zyx)


def test_drawn_cells_count_as_often_as_those_they_stand_for():
    rng = np.random.default_rng(0)
    vectors = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(6, 4)).astype(np.float32)), dim=1)
    classes = torch.tensor([1, 1, 2, 2, 0, 0])
    times = torch.tensor([3, 1, 2, 5, 4, 2])
    drawn = LabelledCells(vectors, classes, frozenset({1, 2}), times.float())
    each = LabelledCells(vectors.repeat_interleave(times, 0), classes.repeat_interleave(times), frozenset({1, 2}))
    (loss, excess), (expected, wanted) = prototype_loss([drawn]), prototype_loss([each])
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert excess == pytest.approx(wanted, abs=1e-5)


def test_semantic_training_lowers_the_excess_and_exports_its_head(labelled_subjects, tmp_path):
    from uae.embedding import embed
    from uae.models import load_model

    config = small_config(
        "semantic.probability=1.0", "optimiser.steps=25", "optimiser.learning_rate=0.02", "optimiser.ema_decay=0.0",
        "views.table_removed=0.0", "views.field_of_view_probability=0.0",
    )  # fmt: skip
    task = small_task(SemanticTask, config, labelled_subjects, table=None)
    trainer = loop.Trainer(task, config, tmp_path, "semantic")
    excess = []
    one_step = trainer.one_step

    def recorded():
        figures = one_step()
        excess.append(figures["excess"])
        assert {"excess/1", "excess/2"} <= set(figures)
        return figures

    trainer.one_step = recorded
    path = trainer.run()
    assert np.mean(excess[-5:]) < np.mean(excess[:5]) - 0.3
    model = load_model(path)
    assert model.config.semantic and model.meta["trained_heads"] == ["fine", "coarse", "semantic"]
    found = embed(tissue_block(), model, device="cpu", cache=False)
    assert found.heads == ("fine", "coarse", "semantic") and found.dimension == 24
    points = found.fine_geometry.index_to_mm(np.argwhere(found.body)[:3, ::-1].astype(float))
    similarity = found.descriptors(points) @ found.descriptors(points).T
    heads = [getattr(found, h).astype(np.float64) for h in ("fine", "semantic")]
    at = [tuple(c) for c in np.argwhere(found.body)[:2]]
    cosines = [float((h[(slice(None), *at[0])] * h[(slice(None), *at[1])]).sum()) for h in heads]
    coarse = 3 * similarity[0, 1] - sum(cosines)  # the mean of the three heads' cosines (authors' code)
    assert -1.001 <= coarse <= 1.001


def test_semantic_branch_without_labels_says_what_to_give():
    with pytest.raises(InputError, match="needs labels"):
        small_task(SemanticTask, small_config(), [subject_from_volume("block", tissue_block())], table=None)


def test_label_map_entry_needs_a_name_table(tmp_path):
    scan = tissue_block()
    scan.write(tmp_path / "ct.nii.gz")
    Volume((scan.array > 60).astype(np.uint8), scan.geometry).write(tmp_path / "labels.nii.gz")
    entry = {"file": "ct.nii.gz", "modality": "ct", "labels": "labels.nii.gz"}
    with pytest.raises(InputError, match="name table"):
        load_subjects({"volumes": [entry]}, tmp_path, table=ClassTable())
    table = ClassTable()
    subjects = load_subjects({"volumes": [entry | {"names": {"1": "liver"}}]}, tmp_path, table=table)
    assert subjects[0].annotated == {table.number("liver")}
    held = entry | {"labels": "ct_ts_dicomslab/labels_ts.nii.gz", "names": {"5": "liver"}}
    with pytest.raises(InputError, match="kept for validation or testing"):
        load_subjects({"volumes": [held]}, tmp_path, table=ClassTable())


