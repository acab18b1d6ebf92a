"""Contrast curves and filters, synthetic anatomy, phantoms of different shape matched through the canonical body."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from training_parts import small_config, tissue_block

from uae.geometry import Geometry
from uae.phantom import correspond
from uae.preprocess import SOFT_TISSUE_KNOTS, InputMap
from uae.training import augment, curves, sampling
from uae.training import frames as frames_module
from uae.training.frames import CanonicalFrame
from uae.training.regions import superpixels
from uae.training.subjects import subject_from_volume
from uae.training.views import render_views
from uae.volume import Volume

OFF = dict.fromkeys(
    ("tissue_curve", "histogram_shift", "bezier", "invert", "regions", "region_blend", "texture", "smooth", "blur",
     "bias", "shading", "thick", "noise", "window", "ct_smooth", "ct_noise", "ct_thick"), 0.0,
)  # fmt: skip


def settings(**changes) -> dict:
    return small_config()["contrast"] | OFF | changes


def render(kind: str, image: np.ndarray, seed: int = 1, **changes) -> np.ndarray:
    drawn = augment.draw_contrast(np.random.default_rng(seed), kind, settings(**changes), image.shape)
    return augment.apply_contrasts(torch.from_numpy(image.astype(np.float32))[None], [drawn])[0].numpy()


@pytest.fixture(scope="module")
def hu() -> np.ndarray:
    return tissue_block().array[:16, :24, :24] + 1024.0


def test_without_any_option_an_mr_like_view_is_the_soft_tissue_window(hu):
    assert np.abs(render("mr-like", hu) - np.interp(hu - 1024, *np.transpose(SOFT_TISSUE_KNOTS))).max() < 0.005


@pytest.mark.parametrize(
    "option", ["tissue_curve", "histogram_shift", "bezier", "region_blend", "texture", "smooth", "blur", "bias",
               "shading", "thick", "noise", "window"],
)  # fmt: skip
def test_every_option_of_the_contrast_changes_the_view_when_switched_on(option, hu):
    base = settings(tissue_curve=1.0) if option == "region_blend" else settings()
    drawn = [
        augment.draw_contrast(np.random.default_rng(5), "mr-like", base | {option: value}, hu.shape)
        for value in (0.0, 1.0)
    ]
    image = torch.from_numpy(hu.astype(np.float32))[None]
    off, on = (augment.apply_contrasts(image, [d])[0] for d in drawn)
    assert float((off - on).abs().mean()) > 3e-4


@pytest.mark.parametrize("curve", [curves.histogram_shift, curves.bezier])
def test_curves_of_the_papers_keep_the_range_and_histogram_shift_is_monotone(curve):
    level = np.linspace(0, 1, 500)
    for seed in range(20):
        value = curve(np.random.default_rng(seed), level)
        assert value[0] == pytest.approx(0, abs=1e-6) and value[-1] == pytest.approx(1, abs=1e-6)
        assert value.min() >= -1e-9 and value.max() <= 1 + 1e-9
        if curve is curves.histogram_shift:
            assert np.diff(value).min() >= -1e-12


def test_inversion_keeps_open_air_dark():
    for seed in range(10):
        curve = curves.drawn_curve(np.random.default_rng(seed), settings(histogram_shift=1.0, invert=1.0))
        values = -1024 + 1.5 * np.arange(curves.LEVELS)
        assert curve[values < -760].max() == 0 and curve[(values > 0) & (values < 100)].min() >= 0
        assert np.diff(curve[values > -740]).max() <= 1e-9


def test_filters_are_those_of_scipy(hu):
    image = torch.from_numpy(hu.astype(np.float32))[None]
    gauss = [augment.gauss_matrix(n, 1.3) for n in hu.shape]
    found = augment.filtered(image.clone(), [gauss])[0].numpy()
    expected = ndimage.gaussian_filter(hu, 1.3, truncate=20, mode="constant", cval=0)
    expected /= ndimage.gaussian_filter(np.ones_like(hu), 1.3, truncate=20, mode="constant", cval=0)
    assert np.abs(found - expected).max() < 0.05
    box = augment.filtered(image.clone(), [[augment.box_matrix(n) for n in hu.shape]])[0].numpy()
    assert np.abs(box - ndimage.uniform_filter(hu, 3))[1:-1, 1:-1, 1:-1].max() < 0.05


def test_thick_slices_average_and_keep_constants():
    matrix = augment.thick_matrix(12, 3.0)
    assert np.allclose(matrix.sum(1), 1)
    signal = np.zeros(12)
    signal[3:6] = 3.0
    thick = matrix @ signal
    assert thick[4] == pytest.approx(3.0) and thick[3] == pytest.approx(2.0) and thick[1] == pytest.approx(0.0)


def test_each_patch_of_a_batch_gets_its_own_contrast(hu):
    image = torch.from_numpy(np.stack([hu, hu]).astype(np.float32))
    drawn = [augment.draw_contrast(np.random.default_rng(k), "mr-like", small_config()["contrast"], hu.shape)
             for k in (1, 2)]  # fmt: skip
    together = augment.apply_contrasts(image, drawn)
    alone = torch.cat([augment.apply_contrasts(image[:1], [d]) for d in drawn])
    assert torch.allclose(together, alone, atol=1e-5)
    assert float((together[0] - together[1]).abs().mean()) > 0.02


def test_superpixels_get_a_curve_each(hu):
    pytest.importorskip("skimage")
    subject = subject_from_volume("block", tissue_block())
    subject.regions = superpixels(subject, 60, 0.05)
    numbers = subject.regions[0, 0].numpy()
    assert numbers.shape == subject.mask.shape and len(np.unique(numbers[subject.mask == 2])) > 3
    config = small_config("contrast.regions=1.0", "views.ct_mr_probability=0.0", "views.mr_mr_probability=1.0")
    values = config["views"] | config["synthetic"] | settings(regions=1.0, tissue_curve=1.0)
    values |= {"deform_probability": 0.0, "field_of_view_probability": 0.0, "table_removed": 0.0}
    pair = sampling.draw_pair(np.random.default_rng(3), [subject], values, InputMap())
    view = pair.views[0]
    image = render_views([view], InputMap())[0].numpy() * 0.25 + 0.5
    positions = torch.from_numpy(np.argwhere(np.ones(view.map.shape, bool))[::37]).float()
    positions = positions[torch.from_numpy(view.mask_at(positions) == 2)]
    voxels = np.rint(view.map.to_subject(positions).numpy()).astype(int)
    assert len(positions) > 50
    table = view.contrast.region_curves
    values = sampling.sample_at(subject.image, view.map.to_subject(positions))[0].tolist()
    expected = [table[int(numbers[tuple(voxel)]), round(v / curves.HU_STEP)] for voxel, v in zip(voxels, values)]
    wrong = np.abs(image[tuple(positions.long().numpy().T)] - expected) > 0.02
    assert wrong.mean() < 0.02


def test_canonical_frames_match_phantoms_of_different_shape(monkeypatch):
    monkeypatch.setattr(frames_module, "CANONICAL_BOX_MM", ((-210.0, -150.0, -40.0), (210.0, 170.0, 160.0)))
    geometry = Geometry((150, 158, 219), np.full(3, 2.0), np.array([-219.0, -140, -90]), np.eye(3))
    maps = [correspond.subject_map(seed) for seed in (0, 1)]
    frames = [CanonicalFrame(geometry, m) for m in maps]
    points = correspond.body_lattice(31.0)
    inside = (np.abs(points[:, 0]) < 150) & (np.abs(points[:, 1]) < 90) & (points[:, 2] > -10) & (points[:, 2] < 130)
    a, b = (m.inverse().apply(points[inside]) for m in maps)
    voxels = torch.from_numpy(np.ascontiguousarray(geometry.mm_to_index(a)[:, ::-1])).float()
    found = frames[1].from_common(frames[0].to_common(voxels)).numpy()
    errors = np.linalg.norm(found - geometry.mm_to_index(b)[:, ::-1], axis=1) * 2
    assert np.linalg.norm(a - b, axis=1).mean() > 8.0
    assert errors.max() < 0.25 and np.median(errors) < 0.05


class Shifted:
    """A stand-in for a canonical frame: the canonical body is the subject moved by whole voxels."""

    def __init__(self, offset: tuple[int, int, int]) -> None:
        self.offset = torch.tensor(offset, dtype=torch.float32)

    def to_common(self, voxels: torch.Tensor) -> torch.Tensor:
        return voxels + self.offset

    def from_common(self, voxels: torch.Tensor) -> torch.Tensor:
        return voxels - self.offset


def test_pairs_of_two_subjects_correspond_through_the_canonical_body():
    scan = tissue_block()
    moved = Volume(np.roll(scan.array, (2, 3, 4), (0, 1, 2)), scan.geometry, "ct")
    subjects = [subject_from_volume(n, v) for n, v in (("a", scan), ("b", moved))]
    subjects[0].frame, subjects[1].frame = Shifted((0, 0, 0)), Shifted((-2, -3, -4))
    config = small_config("synthetic.cross_subject=1.0")
    pair = sampling.draw_pair(
        np.random.default_rng(2), subjects, config["views"] | config["contrast"] | config["synthetic"], InputMap()
    )
    assert {id(v.subject) for v in pair.views} == {id(s) for s in subjects} and pair.subject_index == sampling.CANONICAL
    for k in (0, 1):
        here = pair.views[k].map.to_subject(sampling.fine_positions(pair.cells[k]))
        there = pair.views[1 - k].map.to_subject(pair.partners[k])
        values = [
            sampling.sample_at(v.subject.image, p)[0] for v, p in zip((pair.views[k], pair.views[1 - k]), (here, there))
        ]
        assert float((values[0] - values[1]).abs().max()) < 2.0


def test_label_driven_contrast_depends_on_labels_only():
    scan = tissue_block()
    labels = np.where(scan.array > 60, 7, np.where(scan.array > -500, 9, 0)).astype(np.uint8)
    subject = subject_from_volume("block", scan, tissues=Volume(labels, scan.geometry))
    config = small_config("synthetic.label_contrast=1.0", "views.mr_mr_probability=1.0", "views.ct_mr_probability=0.0")
    values = config["views"] | settings() | config["synthetic"] | {"field_of_view_probability": 0.0}
    pair = sampling.draw_pair(np.random.default_rng(4), [subject], values, InputMap())
    assert pair.kinds == ("synthetic", "synthetic")
    view = pair.views[0]
    view.contrast.texture = None
    image = render_views([view], InputMap())[0].numpy() * 0.25 + 0.5
    grid = torch.from_numpy(np.argwhere(np.ones(view.map.shape, bool))).float()
    voxels = np.rint(view.map.to_subject(grid).numpy()).astype(int)
    body = view.mask_at(grid) == 2
    seen = subject.tissues[0, 0].numpy()[tuple(voxels[body].T)]
    values_of = {n: image.reshape(-1)[body][seen == n] for n in (7, 9)}
    assert all(len(v) > 100 for v in values_of.values())
    for number, found in values_of.items():
        assert np.allclose(np.median(found), view.contrast.curve[number], atol=1e-3)
        assert (np.abs(found - np.median(found)) < 1e-3).mean() > 0.98
