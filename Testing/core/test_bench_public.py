"""`uae bench landmarks | lesions | registration` from the command line, on tiny data and a model of random weights."""

import json

import numpy as np
import pytest
import SimpleITK as sitk
from small_scans import torso_ct

from uae.bench.dataset_runs import image_pairs, point_pairs
from uae.cli import main
from uae.errors import InputError


def scans(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        sitk.WriteImage(torso_ct(seed=seed), str(folder / name))


def point(*index):
    return ",".join(f"{v:.3f}" for v in torso_ct().TransformContinuousIndexToPhysicalPoint([float(i) for i in index]))


def test_landmarks_from_the_command_line(tmp_path, tiny_model, capsys):
    data = tmp_path / "chest"
    scans(data / "images", ["a.nii.gz", "b.nii.gz"])
    rows = [f"{name},{phase},{label},{point(*where)}" for name, phase in (("a", "CE"), ("b", "NC"))
            for label, where in (("spine", (24, 33, 18)), ("lung", (15, 22, 24)), ("off", (900, 0, 0)))]  # fmt: skip
    (data / "landmarks.csv").write_text("image,phase,label,x_lps_mm,y_lps_mm,z_lps_mm\n" + "\n".join(rows) + "\n")
    out = tmp_path / "landmarks.json"
    command = ["bench", "landmarks", "--dataset", str(data), "--model", str(tiny_model), "--json", str(out)]
    assert main([*command, "--device", "cpu", "--threads", "1"]) == 0
    result = json.loads(out.read_text())
    assert set(result) == {"CE-NC", "NC-CE", "meta"}
    row = result["CE-NC"]["nearest"]
    assert (row["points"], row["missed"]) == (2, 1)
    assert row["med_mm"] >= 0 and "within_10mm" in row
    assert "| nearest | 2 |" in out.with_suffix(".md").read_text()
    assert "med_mm" in capsys.readouterr().out


def test_lesions_from_the_command_line(tmp_path, tiny_model):
    data = tmp_path / "dls"
    scans(data / "images", ["s.nii.gz", "t.nii.gz"])
    entry = {
        "source": "s.nii.gz", "target": "t.nii.gz", "source center": [24.0, 33.0, 18.0],
        "target center": [24.0, 33.0, 18.0], "target box": [20.0, 30.0, 15.0, 8.0, 8.0, 6.0],
        "target recist diameter": [6.0, 4.0],
    }  # fmt: skip
    (data / "test.json").write_text(json.dumps({"0001": entry, "0002": entry}))
    out = tmp_path / "lesions.json"
    command = ["bench", "lesions", "--dataset", str(data), "--model", str(tiny_model), "--json", str(out)]
    assert main([*command, "--device", "cpu", "--threads", "1", "--limit", "1"]) == 0
    row = json.loads(out.read_text())["test"]["fixed-point"]
    assert row["points"] == 1
    assert {"cpm_10mm_dlt", "cpm_radius_tlt", "in_box"} <= row.keys()


def test_registration_from_the_command_line(tmp_path, tiny_model):
    """Two copies of a scan, the second's header moved by (8, 0, 4) mm: before any step the points are that far off."""
    data = tmp_path / "l2r"
    scans(data / "imagesTr", ["T_0001_0000.nii.gz"])
    moved = torso_ct()
    moved.SetOrigin(tuple(np.array(moved.GetOrigin()) + np.array([8.0, 0.0, 4.0])))
    sitk.WriteImage(moved, str(data / "imagesTr" / "T_0001_0001.nii.gz"))
    (data / "keypointsTr").mkdir()
    (data / "labelsTr").mkdir()
    for number, image in (("0000", torso_ct()), ("0001", moved)):
        (data / "keypointsTr" / f"T_0001_{number}.csv").write_text("24,33,18\n15,22,24\n")
        labels = sitk.Cast(image > 200, sitk.sitkUInt8)
        sitk.WriteImage(labels, str(data / "labelsTr" / f"T_0001_{number}.nii.gz"))
    pair = {"fixed": "./imagesTr/T_0001_0000.nii.gz", "moving": "./imagesTr/T_0001_0001.nii.gz"}
    (data / "T_dataset.json").write_text(json.dumps({"registration_val": [pair], "modality": {"0": "CT", "1": "CT"}}))
    out = tmp_path / "registration.json"
    command = ["bench", "registration", "--dataset", str(data), "--model", str(tiny_model), "--json", str(out)]
    assert main([*command, "--device", "cpu", "--threads", "1", "--no-deformable"]) == 0
    steps = json.loads(out.read_text())["steps"]
    assert steps["initial"]["med_mm"] == pytest.approx(np.sqrt(80.0), abs=1e-2)
    assert steps["initial"]["med_voxels"] == pytest.approx(np.sqrt(80.0) / 2, abs=1e-2)
    assert 0.3 < steps["initial"]["dice"] < 1.0
    assert steps["initial"]["hd95_mm"] > 0


def test_unknown_layouts_are_refused(tmp_path, capsys):
    with pytest.raises(InputError, match="no known layout"):
        image_pairs(tmp_path)
    with pytest.raises(InputError, match="no known layout"):
        point_pairs("landmarks", tmp_path)
    assert main(["bench", "lesions", "--json", str(tmp_path / "x.json")]) == 2
    assert "needs --dataset" in capsys.readouterr().err
    assert main(["bench", "all", "--only", "R9", "--json", str(tmp_path / "x.json"), "--data", str(tmp_path)]) == 2
    assert "no such row" in capsys.readouterr().err
