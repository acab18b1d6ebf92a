"""The parts of the desktop application that a module's panel talks to, over a real MRML scene, without Qt."""

from __future__ import annotations

import contextlib
import enum
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import slicer
import slicer.util
import vtk
from qt_widgets import QT, FileDialog, TableItem, Timer, load_ui


class Application:
    """Installs the stand-ins for one test.

    Attributes:
        errors: texts of the error messages shown.
        answers: what confirmation dialogs return, True where empty.
        layers: what `setSliceViewerLayers` was told last.
    """

    def __init__(self, patch: Any, headless: Any) -> None:
        self.errors: list[str] = []
        self.answers: list[bool] = []
        self.layers: dict[str, Any] = {}
        self.scene = headless.scene
        _modules(patch)
        quit_slots: list[Any] = []
        app = SimpleNamespace(
            connect=lambda _signal, slot: quit_slots.append(slot),
            disconnect=lambda *_: None,
            processEvents=lambda: None,
        )
        patch.setattr(slicer, "app", app, raising=False)
        patch.setattr(slicer, "modules", SimpleNamespace(), raising=False)
        place = SimpleNamespace(ForcePlaceMultipleMarkups=2)
        patch.setattr(slicer, "qSlicerMarkupsPlaceWidget", place, raising=False)
        for name, function in {
            "mainWindow": lambda: None,
            "loadUI": lambda path: Panel(path),
            "childWidgetVariables": lambda panel: panel.widgets,
            "tryWithErrorDisplay": self._try,
            "errorDisplay": lambda text, **_: self.errors.append(text),
            "confirmOkCancelDisplay": lambda *_, **__: self.answers.pop(0) if self.answers else True,
            "resetSliceViews": lambda: self.layers.update(reset=True),
            "setSliceViewerLayers": lambda **layers: self.layers.update(layers),
        }.items():
            patch.setattr(slicer.util, name, function)

    @contextlib.contextmanager
    def _try(self, message: str | None = None, **_: Any) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.errors.append(f"{message}\n{error}")
            raise


class Panel:
    """What loadUI returns."""

    def __init__(self, path: str) -> None:
        self.widgets = load_ui(path)

    def setMRMLScene(self, scene: Any) -> None:
        assert scene is slicer.mrmlScene
        for widget in vars(self.widgets).values():
            if widget._kind == "qMRMLNodeComboBox":
                scene.AddObserver(scene.EndImportEvent, lambda *_, widget=widget: _fill_again(widget))


def _fill_again(selector: Any) -> None:
    """As the application's node model does after an import: emptied and filled row by row.

    The first node then is taken by itself where the selector has neither a row for none nor one for an action.
    """
    selector.setCurrentNode(None)
    if not (selector.noneEnabled or selector.addEnabled or selector.removeEnabled or selector.renameEnabled):
        selector.setCurrentNode(slicer.mrmlScene.GetFirstNodeByClass(selector.nodeTypes[0]))


class ModuleWidget:
    """ScriptedLoadableModuleWidget: layout, parent and the paths of the module's resources."""

    def __init__(self, parent: Any = None) -> None:
        self.parent = parent or SimpleNamespace(isEntered=True)
        self.moduleName = type(self).__name__.removesuffix("Widget")
        self.layout = SimpleNamespace(addWidget=lambda _widget: None)

    def setup(self) -> None:
        """Nothing: the developer's part of the panel is not there."""

    def resourcePath(self, name: str) -> str:
        return str(Path(__file__).resolve().parents[2] / self.moduleName / "Resources" / name)


class ModuleLogic:
    """ScriptedLoadableModuleLogic: the module's singleton parameter node."""

    def __init__(self) -> None:
        self.moduleName = type(self).__name__.removesuffix("Logic")

    def getParameterNode(self) -> Any:
        found = slicer.mrmlScene.GetSingletonNode(self.moduleName, "vtkMRMLScriptedModuleNode")
        if found is None:
            found = slicer.mrmlScene.CreateNodeByClass("vtkMRMLScriptedModuleNode")
            found.SetSingletonTag(self.moduleName)
            found.SetModuleName(self.moduleName)
            found.SetName(self.moduleName)
            found = slicer.mrmlScene.AddNode(found)
        return found


def parameter_node_wrapper(described: type) -> type:
    """Typed access to a parameter node: text, numbers, truth values, enumerations, node references."""
    types_of = typing.get_type_hints(described)
    defaults = {name: getattr(described, name, None) for name in types_of}
    namespace: dict[str, Any] = {name: _property(name, kind, defaults[name]) for name, kind in types_of.items()}

    def begin(self: Any, node: Any) -> None:
        self.parameterNode, self._guis = node, {}

    def connect_gui(self: Any, ui: Any) -> int:
        tag = len(self._guis) + 1
        links = {}
        for widget in vars(ui).values():
            name = widget.property("SlicerParameterName")
            if name:
                assert name in types_of, f"{widget.objectName}: no parameter {name}"
                links[name] = _connect(
                    widget, types_of[name], lambda value, name=name: _from_gui(self, tag, name, value)
                )
        self._guis[tag] = links
        for name, write in links.items():
            write(getattr(self, name))
        update = lambda *_: [write(getattr(self, name)) for name, write in self._guis.get(tag, {}).items()]  # noqa: E731
        self.parameterNode.AddObserver(vtk.vtkCommand.ModifiedEvent, update)
        return tag

    def disconnect_gui(self: Any, tag: int) -> None:
        self._guis.pop(tag, None)

    namespace |= {"__init__": begin, "connectGui": connect_gui, "disconnectGui": disconnect_gui}
    return type(described.__name__, (), namespace)


def _from_gui(parameters: Any, tag: int, name: str, value: Any) -> None:
    if tag in parameters._guis and getattr(parameters, name) != value:
        setattr(parameters, name, value)


def _property(name: str, kind: Any, default: Any) -> property:
    is_list = typing.get_origin(kind) is list
    is_node = not is_list and issubclass(kind, slicer.vtkMRMLNode)

    def get(self: Any) -> Any:
        node = self.parameterNode
        if is_node:
            return node.GetNodeReference(name)
        if is_list:
            return [node.GetNthNodeReference(name, index) for index in range(node.GetNumberOfNodeReferences(name))]
        text = node.GetParameter(name)
        if text == "":
            return default
        if issubclass(kind, enum.Enum):
            return kind[text]
        return text == "True" if kind is bool else kind(text)

    def put(self: Any, value: Any) -> None:
        if is_node:
            assert value is None or isinstance(value, kind), f"{name} takes a {kind.__name__}, not {value}"
            self.parameterNode.SetNodeReferenceID(name, value.GetID() if value is not None else None)
        elif is_list:
            self.parameterNode.RemoveNodeReferenceIDs(name)
            for one in value:
                self.parameterNode.AddNodeReferenceID(name, one.GetID())
        else:
            assert isinstance(value, kind), f"{name} takes a {kind.__name__}, not {value!r}"
            self.parameterNode.SetParameter(name, value.name if isinstance(value, enum.Enum) else str(value))

    return property(get, put)


def _connect(widget: Any, kind: Any, changed: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wire a widget as the application's connectors do; AssertionError where it has none for this pair."""
    if widget._kind == "qMRMLNodeComboBox" and issubclass(kind, slicer.vtkMRMLNode):
        widget.connect("currentNodeChanged(vtkMRMLNode*)", changed)
        return widget.setCurrentNode
    if widget._kind == "QComboBox" and issubclass(kind, enum.Enum):
        members = list(kind)
        widget.clear()
        for member in members:
            widget.addItem(member.label() if hasattr(member, "label") else member.name)
        widget.connect("currentIndexChanged(int)", lambda index: changed(members[index]) if index >= 0 else None)
        return lambda value: widget.setCurrentIndex(members.index(value))
    simple = {
        ("QCheckBox", bool): ("toggled(bool)", "checked"),
        ("ctkSliderWidget", float): ("valueChanged(double)", "value"),
    }
    simple |= {("QLineEdit", str): ("textChanged(QString)", "text")}
    simple |= {("QPushButton", bool): ("toggled(bool)", "checked")}
    assert (widget._kind, kind) in simple, f"the application has no connector from {widget._kind} to {kind}"
    signal, name = simple[widget._kind, kind]
    widget.connect(signal, changed)
    return lambda value: setattr(widget, name, value)


def _modules(patch: Any) -> None:
    """The importable modules of the application; what imported them before is forgotten."""
    parts = {
        "qt": {"QTimer": Timer, "QWidget": object, "QTableWidgetItem": TableItem, "Qt": QT, "QFileDialog": FileDialog},
        "ctk": {},
        "slicer.i18n": {"tr": lambda text: text, "translate": lambda _context, text: text},
        "slicer.parameterNodeWrapper": {"parameterNodeWrapper": parameter_node_wrapper},
        "slicer.ScriptedLoadableModule": {
            "ScriptedLoadableModule": object,
            "ScriptedLoadableModuleLogic": ModuleLogic,
            "ScriptedLoadableModuleTest": object,
            "ScriptedLoadableModuleWidget": ModuleWidget,
        },
    }
    for name, content in parts.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        patch.setitem(sys.modules, name, module)
    ours = ("Lib.widget", "Lib.parameters", "CommonLib.panel")
    for name in [n for n in sys.modules if n.endswith(ours) and n.startswith("UAE")]:
        patch.delitem(sys.modules, name)
