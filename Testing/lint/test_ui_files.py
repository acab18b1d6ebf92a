"""The .ui files and what depends on their names: classes, scene connections, parameters, names in the code."""

from __future__ import annotations

import ast
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = [path.parent.name for path in sorted(ROOT.glob("UAE*/CMakeLists.txt"))]
QT = {
    "QCheckBox", "QComboBox", "QDoubleSpinBox", "QFrame", "QGroupBox", "QLabel", "QLineEdit", "QPlainTextEdit",
    "QProgressBar", "QPushButton", "QRadioButton", "QSpinBox", "QTabWidget", "QTableWidget", "QTextBrowser",
    "QTextEdit", "QToolButton", "QWidget",
}  # fmt: skip
CTK = {"ctkCollapsibleButton", "ctkCollapsibleGroupBox", "ctkPathLineEdit", "ctkSliderWidget", "ctkComboBox"}
MRML = {
    "qMRMLCheckableNodeComboBox", "qMRMLNodeComboBox", "qMRMLWidget", "qSlicerMarkupsPlaceWidget",
    "qSlicerSimpleMarkupsWidget",
}  # fmt: skip


def ui(module: str) -> ElementTree.Element:
    return ElementTree.parse(ROOT / module / "Resources" / "UI" / f"{module}.ui").getroot()


def widgets(module: str) -> dict[str, ElementTree.Element]:
    found = ui(module).iter("widget")
    return {widget.get("name", ""): widget for widget in found}


def classes_of(module: str) -> dict[str, str]:
    return {name: widget.get("class", "") for name, widget in widgets(module).items()}


def parameter_names(module: str) -> set[str]:
    """Annotated attributes of the class under @parameterNodeWrapper."""
    tree = ast.parse((ROOT / module / f"{module}Lib" / "parameters.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any("parameterNodeWrapper" in ast.dump(d) for d in node.decorator_list):
            return {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
    raise AssertionError(f"{module}: no class under @parameterNodeWrapper")


def python_files(module: str) -> list[Path]:
    return [ROOT / module / f"{module}.py", *sorted((ROOT / module / f"{module}Lib").glob("*.py"))]


@pytest.mark.parametrize("module", MODULES)
def test_widget_classes_are_known_and_declared(module: str) -> None:
    used = set(classes_of(module).values())
    assert used <= QT | CTK | MRML, used - QT - CTK - MRML
    declared = {item.findtext("class") for item in ui(module).iter("customwidget")}
    assert used & (CTK | MRML) <= declared


@pytest.mark.parametrize("module", MODULES)
def test_names_are_unique_and_the_root_is_a_scene_widget(module: str) -> None:
    names = [widget.get("name") for widget in ui(module).iter("widget")]
    assert len(names) == len(set(names))
    assert classes_of(module)[names[0]] == "qMRMLWidget"


@pytest.mark.parametrize("module", MODULES)
def test_every_mrml_widget_gets_the_scene(module: str) -> None:
    connected = {
        connection.findtext("receiver")
        for connection in ui(module).iter("connection")
        if connection.findtext("signal") == "mrmlSceneChanged(vtkMRMLScene*)"
        and connection.findtext("slot") == "setMRMLScene(vtkMRMLScene*)"
    }
    needed = {name for name, kind in classes_of(module).items() if kind in MRML - {"qMRMLWidget"}}
    assert needed <= connected, needed - connected
    assert connected <= set(classes_of(module))


@pytest.mark.parametrize("module", MODULES)
def test_parameter_names_exist(module: str) -> None:
    named = {
        item.findtext("string")
        for widget in widgets(module).values()
        for item in widget.findall("property")
        if item.get("name") == "SlicerParameterName"
    }
    assert named and named <= parameter_names(module), named - parameter_names(module)


@pytest.mark.parametrize("module", MODULES)
def test_widgets_that_the_code_uses_are_in_the_file(module: str) -> None:
    names = set(classes_of(module))
    for path in python_files(module):
        used = set(re.findall(r"\.ui\.(\w+)", path.read_text(encoding="utf-8")))
        assert used <= names, (path.name, used - names)


@pytest.mark.parametrize("module", MODULES)
def test_everything_that_can_be_used_has_a_tool_tip(module: str) -> None:
    for name, widget in widgets(module).items():
        if widget.get("class") in {"QPushButton", "QCheckBox", "QComboBox", "qMRMLNodeComboBox", "ctkSliderWidget"}:
            assert any(item.get("name") == "toolTip" for item in widget.findall("property")), name


@pytest.mark.parametrize("module", MODULES)
def test_node_selectors_name_their_types(module: str) -> None:
    for name, widget in widgets(module).items():
        if widget.get("class") == "qMRMLNodeComboBox":
            types = [
                s.text for p in widget.findall("property") if p.get("name") == "nodeTypes" for s in p.iter("string")
            ]
            assert types and all(text.startswith("vtkMRML") for text in types), name


@pytest.mark.parametrize("module", MODULES)
def test_entry_is_short_and_imports_nothing_heavy(module: str) -> None:
    entry = ROOT / module / f"{module}.py"
    assert len(entry.read_text(encoding="utf-8").splitlines()) <= 150
    for path in [*python_files(module), *sorted((ROOT / "UAECommonLib").glob("*.py"))]:
        assert not file_scope_imports(path) & {"torch", "pip", "scipy.ndimage", "matplotlib", "numba", "SimpleITK"}, (
            path
        )
        heavy = {name for name in file_scope_imports(path) if name.startswith("uae.")}
        assert heavy <= LIGHT, (path, heavy - LIGHT)


LIGHT = {"uae.errors", "uae.paths", "uae.progress", "uae.geometry", "uae.files"}
"""Modules of the core that import no scipy and no torch."""


def file_scope_imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names if node.module == "uae")}
    return names


@pytest.mark.parametrize("module", MODULES)
def test_logic_knows_no_qt_and_no_parameter_node(module: str) -> None:
    library = ROOT / module / f"{module}Lib"
    for path in sorted(library.glob("*.py")):
        if path.stem in {"widget", "parameters", "__init__"}:
            continue
        text = path.read_text(encoding="utf-8")
        for word in ("import qt", "import ctk", "parameterNodeWrapper", "ScriptedLoadableModuleLogic"):
            assert word not in text, (path.name, word)


@pytest.mark.parametrize("module", MODULES)
def test_texts_of_the_panel_are_translated(module: str) -> None:
    """Texts given to a widget's text, tool tip or a dialog go through _()."""
    tree = ast.parse((ROOT / module / f"{module}Lib" / "widget.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for target in node.targets:
                if isinstance(target, ast.Attribute) and target.attr in {"text", "toolTip", "title", "windowTitle"}:
                    assert not node.value.value.strip(), ast.unparse(node)
