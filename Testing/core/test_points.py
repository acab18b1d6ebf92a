"""Point files: both coordinate systems, what Slicer writes, and clear refusals."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from uae.errors import InputError
from uae.points import is_point_file, read_points, write_points

LPS = np.array([[10.5, -20.25, 300.125], [-1.0, 2.0, -3.0]])
RAS = LPS * [-1, -1, 1]


def markups(path, system, points, **changes):
    """A file as 3D Slicer writes it, reduced to what it needs."""
    controls = [{"id": str(i), "label": f"F-{i}", "position": list(p), **changes} for i, p in enumerate(points, 1)]
    markup = {"type": "Fiducial", "coordinateSystem": system, "coordinateUnits": "mm", "controlPoints": controls}
    if system is None:
        del markup["coordinateSystem"]
    path.write_text(json.dumps({"@schema": "x#", "markups": [markup]}))
    return path


def fcsv(path, system, points):
    lines = ["# Markups fiducial file version = 4.11"]
    lines += [f"# CoordinateSystem = {system}"] if system is not None else []
    lines += ["# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID"]
    for i, p in enumerate(points, 1):
        position = ",".join(str(v) for v in p)
        lines.append(f'vtkMRMLMarkupsFiducialNode_{i},{position},0,0,0,1,1,1,0,F-{i},"a, b",')
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(("system", "stored"), [("LPS", LPS), ("RAS", RAS)])
def test_markups_obey_their_coordinate_system(tmp_path, system, stored):
    result = read_points(markups(tmp_path / "p.mrk.json", system, stored))
    assert result.labels == ["F-1", "F-2"]
    assert result.points.dtype == np.float64
    np.testing.assert_array_equal(result.points, LPS)


@pytest.mark.parametrize(("system", "stored"), [("LPS", LPS), ("RAS", RAS), ("0", RAS), ("1", LPS)])
def test_fcsv_obeys_its_coordinate_system(tmp_path, system, stored):
    result = read_points(fcsv(tmp_path / "p.fcsv", system, stored))
    assert result.labels == ["F-1", "F-2"]
    np.testing.assert_array_equal(result.points, LPS)


def test_csv_in_lps_with_further_columns_in_any_order(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text('\ufeffnote,label,z_lps_mm,x_lps_mm,y_lps_mm\nn,"left, upper",300.125,10.5,-20.25\n', "utf-8")
    result = read_points(path)
    assert result.labels == ["left, upper"]
    np.testing.assert_array_equal(result.points, LPS[:1])


@pytest.mark.parametrize("suffix", [".mrk.json", ".fcsv", ".csv"])
def test_points_survive_the_file_with_labels_and_order(tmp_path, suffix):
    labels = ['Leber, "rechts"', "Niere ä"]
    table = [{"score": 0.91234567, "confident": True, "reason": "ok, fine"}, {"score": 0.2, "confident": False}]
    path = tmp_path / f"p{suffix}"
    write_points(path, labels, LPS, table)
    again = read_points(path)
    assert again.labels == labels
    np.testing.assert_allclose(again.points, LPS, atol=1e-6)
    assert is_point_file(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_table_becomes_csv_columns_and_markup_descriptions(tmp_path):
    table = [
        {"score": 0.91, "cycle_mm": 1.5, "confident": np.bool_(True), "reason": "", "where": (1.0, 2)},
        {"score": 0.2, "cycle_mm": None, "confident": False, "reason": "far", "where": None},
    ]
    write_points(tmp_path / "p.csv", ["a", "b"], LPS, table)
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert list(rows[0])[:4] == ["label", "x_lps_mm", "y_lps_mm", "z_lps_mm"]
    assert [r["confident"] for r in rows] == ["true", "false"]
    assert (rows[0]["where"], rows[1]["cycle_mm"], rows[1]["reason"]) == ("1 2", "", "far")
    write_points(tmp_path / "p.mrk.json", ["a", "b"], LPS, table)
    markup = json.loads((tmp_path / "p.mrk.json").read_text())["markups"][0]
    assert markup["type"] == "Fiducial"
    assert markup["coordinateSystem"] == "LPS"
    first, second = markup["controlPoints"]
    assert "score=0.91" in first["description"]
    assert "confident=false" in second["description"]
    assert first["visibility"] is True
    assert first["positionStatus"] == "defined"
    # Slicer's unrotated control point: its axes are RAS, the file is in LPS.
    assert first["orientation"] == [-1, 0, 0, 0, -1, 0, 0, 0, 1]


def test_points_that_were_never_placed_are_left_out_and_told(tmp_path, caplog):
    path = markups(tmp_path / "p.mrk.json", "LPS", LPS)
    content = json.loads(path.read_text())
    content["markups"][0]["controlPoints"][0]["positionStatus"] = "undefined"
    path.write_text(json.dumps(content))
    assert read_points(path).labels == ["F-2"]
    assert "never placed" in caplog.text
    write_points(tmp_path / "n.mrk.json", ["a", "b"], np.array([[np.nan] * 3, LPS[1]]))
    assert read_points(tmp_path / "n.mrk.json").labels == ["b"]


def refused(path, match):
    with pytest.raises(InputError, match=match) as caught:
        read_points(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_point_files_are_refused(tmp_path):
    def text(name, content):
        (tmp_path / name).write_text(content)
        return tmp_path / name

    refused(tmp_path / "none.csv", "no such")
    refused(text("a.csv", "label,x,y,z\na,1,2,3\n"), "label,x_lps_mm,y_lps_mm,z_lps_mm")
    refused(text("empty.csv", ""), "header")
    refused(text("b.csv", "label,x_lps_mm,y_lps_mm,z_lps_mm\n"), "no placed points")
    refused(text("c.csv", "label,x_lps_mm,y_lps_mm,z_lps_mm\na,1,2\n"), "damaged")
    refused(text("d.csv", "label,x_lps_mm,y_lps_mm,z_lps_mm\nliver,1,nan,3\n"), "'liver'")
    refused(text("a.mrk.json", "{"), "damaged")
    refused(text("b.mrk.json", "[]"), "damaged")
    refused(text("c.mrk.json", '{"markups": [{"coordinateSystem": "LPS"}]}'), "no placed points")
    refused(text("a.txt", "1 2 3"), "mrk.json")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x81")
    refused(tmp_path / "binary.csv", "damaged")
    refused(markups(tmp_path / "s.mrk.json", None, LPS), "coordinate system")
    refused(markups(tmp_path / "i.mrk.json", "IJK", LPS), "coordinate system")
    refused(markups(tmp_path / "n.mrk.json", "LPS", LPS, position=[1, 2]), "damaged")
    refused(markups(tmp_path / "one.mrk.json", "RAS", LPS, position=[1]), "three numbers")
    refused(fcsv(tmp_path / "s.fcsv", None, LPS), "coordinate system")
    refused(fcsv(tmp_path / "i.fcsv", "2", LPS), "coordinate system")


def test_units_other_than_millimetres_are_refused(tmp_path):
    path = markups(tmp_path / "p.mrk.json", "LPS", LPS)
    path.write_text(path.read_text().replace('"mm"', '"um"'))
    refused(path, "millimetres")


def test_unknown_output_ending_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"\.mrk\.json"):
        write_points(tmp_path / "p.xyz", ["a"], LPS[:1])
    assert list(tmp_path.iterdir()) == []
