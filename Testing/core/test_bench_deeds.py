"""`uae bench deeds`: its figures on a pair whose answer is known, with a stand-in for the original program."""

import json
import os
import stat
import sys

import numpy as np
import pytest
from scipy import ndimage

from uae.bench import deeds as bench
from uae.bench.deeds_pairs import DeedsPair
from uae.errors import InputError, ResourceError
from uae.transform import DisplacementField
from uae.volume import Geometry, Volume

SHIFT_MM = np.array([4.0, -2.0, 6.0])


@pytest.fixture
def pair():
    """Texture moved by whole voxels: a point x of the fixed image lies at x + SHIFT_MM in the moving one."""
    noise = np.random.default_rng(0).standard_normal((40, 40, 40))
    whole = (ndimage.gaussian_filter(noise, 2) * 2000).astype(np.float32)
    geometry = Geometry((28, 29, 30), np.full(3, 2.0), np.array([10.0, -30.0, 50.0]), np.eye(3))
    fixed = whole[6:34, 4:33, 5:35]
    moving = whole[3:31, 5:34, 3:33]
    points = geometry.index_to_mm(np.random.default_rng(1).uniform(9, 19, (200, 3)))
    body = np.zeros(geometry.shape, bool)
    body[8:20, 8:20, 8:20] = True
    return DeedsPair(Volume(fixed, geometry, "mr"), Volume(moving, geometry, "mr"), points + SHIFT_MM, points, body)


def stand_in(folder, values):
    """A program that takes the original's arguments and writes one constant displacement a control point."""
    folder.mkdir()
    program = folder / "deedsBCV"
    program.write_text(
        f"#!{sys.executable}\nimport sys, numpy as np\n"
        "out = sys.argv[sys.argv.index('-O') + 1]\n"
        f"np.repeat(np.array({values!r}, np.float32), 7 * 7 * 7).tofile(out + '_displacements.dat')\n"
        "print('Finished. Total time: 123.5 sec. (0 sec. for the rest)')\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return folder


@pytest.mark.skipif(os.name != "posix", reason="needs a script with an interpreter line")
def test_deeds_bench_measures_both_in_turn_and_goes_on(pair, tmp_path, monkeypatch):
    # the original writes voxels along y, then x, then z
    original = stand_in(tmp_path / "original", [-1.0, 2.0, 3.0])
    monkeypatch.setattr(bench, "PAIRS", {"one": None, "two": None})
    monkeypatch.setattr(bench, "make_pair", lambda name, data: pair)
    file = tmp_path / "deeds.json"
    options = {"data_dir": tmp_path, "presets": ["default"], "original": original, "repeats": 1, "json_path": file}
    result = bench.run_deeds_bench(pairs=["one"], **options)
    assert result["initial_tre_mm"] == pytest.approx(np.linalg.norm(SHIFT_MM))
    assert result["deedsbcv"]["tre_mm"] == pytest.approx(0.0, abs=1e-3)
    assert result["deedsbcv"]["seconds"] == 123.5
    ours = result["default"]
    assert ours["tre_mm"] < 0.5
    assert ours["folding"] == 0.0
    assert ours["peak_mb"] > 50
    assert ours["ratio"] == pytest.approx(123.5 / ours["seconds"])
    monkeypatch.setattr(bench, "measure_pair", lambda *args: pytest.fail("measured again"))
    assert bench.run_deeds_bench(pairs=["one"], **options)["pairs"] == json.loads(file.read_text())["pairs"]


def test_deeds_bench_reads_the_original_with_its_axes(pair, tmp_path):
    values = np.repeat(np.array([1.0, 2.0, 3.0], np.float32), 7 * 7 * 7)
    values.tofile(tmp_path / "out.dat")
    field = bench.read_original(tmp_path / "out.dat", pair)
    np.testing.assert_allclose(field.vectors[5, 6, 7], [4.0, 2.0, 6.0])
    values[:-3].tofile(tmp_path / "short.dat")
    with pytest.raises(ResourceError, match="last level"):
        bench.read_original(tmp_path / "short.dat", pair)


def test_deeds_bench_accuracy_counts_folds_in_the_body_only(pair):
    vectors = np.zeros((*pair.fixed.geometry.shape, 3), np.float32)
    vectors[0:6:2, :, :, 2] = 9.0
    assert bench.accuracy(DisplacementField(vectors, pair.fixed.geometry), pair)["folding"] == 0.0
    vectors[10:16:2, :, :, 2] = 9.0
    assert bench.accuracy(DisplacementField(vectors, pair.fixed.geometry), pair)["folding"] > 0.0


def test_deeds_bench_summary_and_slope():
    keys = ("tre_mm", "p95_mm", "seconds", "folding", "peak_mb", "ratio")
    rows = {
        "a": {"initial_tre_mm": 4.0, "default": dict(zip(keys, (1, 2, 3, 0, 9, 2)))},
        "b": {"initial_tre_mm": 6.0, "default": dict(zip(keys, (3, 4, 5, 0.1, 7, 8)))},
    }
    sizes = {"s": {"voxels": 1e6, "seconds": 2.0, "peak_mb": 1}, "l": {"voxels": 8e6, "seconds": 16.0, "peak_mb": 2}}
    result = bench.summarise(rows, sizes, {"systems": ["default"]})
    assert result["initial_tre_mm"] == 5.0
    assert result["default"] == {
        "tre_mm": 2.0, "p95_mm": 3.0, "seconds": 4.0, "folding": 0.1, "peak_mb": 9.0, "ratio": pytest.approx(4.0),
    }  # fmt: skip
    assert result["scaling_slope"] == pytest.approx(1.0)


def test_deeds_bench_refuses_what_it_does_not_know(tmp_path):
    with pytest.raises(InputError, match="unknown 'knee'"):
        bench.run_deeds_bench(pairs=["knee"])
    with pytest.raises(InputError, match="no program deedsBCV"):
        bench.run_deeds_bench(original=tmp_path)


def test_deeds_bench_report_holds_the_figures_and_a_picture(tmp_path):
    from uae.bench.deeds_report import write_report

    figures = {"tre_mm": 1.25, "p95_mm": 2.5, "seconds": 3.5, "folding": 0, "peak_mb": 900.4}
    rows = {"lung": {"initial_tre_mm": 4.0, "shape": [4, 5, 6], "default": figures}}
    sizes = {"s": {"voxels": 1e6, "seconds": 2.0, "peak_mb": 1}, "l": {"voxels": 8e6, "seconds": 16.0, "peak_mb": 2}}
    meta = {"systems": ["default"], "processors": 2, "processor": "test", "threads": 2, "repeats": 1}
    files = write_report(bench.summarise(rows, sizes, meta), tmp_path)
    assert [file.name for file in files] == ["deeds.md", "deeds_scaling.png"]
    text = files[0].read_text()
    assert "| `default` | 1.25 | 2.5 | 0 | 3.5 | - | 900 |" in text
    assert "6x5x4 voxels" in text
    assert "log voxels: 1.00" in text
    assert files[1].stat().st_size > 1000
