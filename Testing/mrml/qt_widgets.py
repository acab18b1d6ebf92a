"""Widgets without Qt, built from a .ui file, that behave as PythonQt's do where a panel's wiring can go wrong.

Calibrated against the application: an unknown attribute raises AttributeError, Qt properties are attributes, an unknown
signal is an error here (PythonQt only returns False), setting a property tells its signal once and only on a change.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

COMMON = {"enabled": True, "visible": True, "toolTip": "", "styleSheet": "", "SlicerParameterName": None}
PROPERTIES: dict[str, dict[str, Any]] = {
    "QWidget": {},
    "qMRMLWidget": {},
    "QFrame": {},
    "QGroupBox": {"title": "", "checkable": False, "checked": True},
    "QTabWidget": {"currentIndex": 0},
    "QLabel": {"text": "", "wordWrap": False},
    "QPushButton": {"text": "", "checkable": False, "checked": False},
    "QToolButton": {"text": "", "checkable": False, "checked": False},
    "QCheckBox": {"text": "", "checked": False},
    "QComboBox": {"currentIndex": -1},
    "QLineEdit": {"text": "", "placeholderText": "", "readOnly": False},
    "QProgressBar": {"value": 0, "minimum": 0, "maximum": 100, "format": "%p%"},
    "QPlainTextEdit": {"plainText": "", "readOnly": False},
    "QTextBrowser": {"html": "", "plainText": "", "openExternalLinks": False},
    "QTableWidget": {"rowCount": 0, "columnCount": 0},
    "qSlicerMarkupsPlaceWidget": {"placeModeEnabled": False, "placeMultipleMarkups": 0},
    "qMRMLCheckableNodeComboBox": {"nodeTypes": (), "noneEnabled": False, "showChildNodeTypes": True},
    "ctkCollapsibleButton": {"text": "", "collapsed": False},
    "ctkPathLineEdit": {"currentPath": "", "filters": "", "nameFilters": (), "settingKey": ""},
    "ctkSliderWidget": {"value": 0.0, "minimum": 0.0, "maximum": 99.0, "singleStep": 1.0, "decimals": 2, "suffix": ""},
    "qMRMLNodeComboBox": {
        "nodeTypes": (), "noneEnabled": False, "addEnabled": False, "removeEnabled": False, "renameEnabled": False,
        "editEnabled": False, "showChildNodeTypes": True, "baseName": "", "noneDisplay": "",
        "selectNodeUponCreation": True,
    },
}  # fmt: skip
SIGNALS: dict[str, dict[str, str]] = {
    "QPushButton": {"clicked(bool)": "", "clicked()": "", "toggled(bool)": "checked"},
    "QToolButton": {"clicked(bool)": "", "clicked()": "", "toggled(bool)": "checked"},
    "QCheckBox": {"toggled(bool)": "checked", "clicked(bool)": ""},
    "QComboBox": {"currentIndexChanged(int)": "currentIndex"},
    "QLineEdit": {"textChanged(QString)": "text", "editingFinished()": ""},
    "ctkSliderWidget": {"valueChanged(double)": "value"},
    "ctkPathLineEdit": {"currentPathChanged(QString)": "currentPath"},
    "ctkCollapsibleButton": {"contentsCollapsed(bool)": "collapsed"},
    "qMRMLNodeComboBox": {"currentNodeChanged(vtkMRMLNode*)": "", "currentNodeChanged(bool)": ""},
    "qMRMLCheckableNodeComboBox": {"checkedNodesChanged()": ""},
    "QTableWidget": {"cellClicked(int,int)": ""},
    "QTimer": {"timeout()": ""},
}
"""Signals by class, with the property whose change each tells."""


class Emitter:
    """Signals of one object; `connect` as PythonQt's, strict about names."""

    def __init__(self, kind: str) -> None:
        object.__setattr__(self, "_kind", kind)
        object.__setattr__(self, "_slots", {})

    def connect(self, signal: str, slot: Callable[..., Any]) -> bool:
        assert signal in SIGNALS.get(self._kind, {}), f"{self._kind} has no signal {signal}"
        self._slots.setdefault(signal, []).append(slot)
        return True

    def emit(self, signal: str, *values: Any) -> None:
        for slot in list(self._slots.get(signal, [])):
            slot(*values)


class Widget(Emitter):
    """One widget of a .ui file."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(kind)
        assert kind in PROPERTIES, f"{name}: the stand-in does not know the class {kind}"
        object.__setattr__(self, "_values", {**COMMON, **PROPERTIES[kind]})
        object.__setattr__(self, "_items", [])
        object.__setattr__(self, "_node", None)
        object.__setattr__(self, "_cells", {})
        object.__setattr__(self, "objectName", name)

    def __getattr__(self, name: str) -> Any:
        values = object.__getattribute__(self, "_values")
        if name in values:
            return values[name]
        if self._kind == "QComboBox" and name in ("currentText", "currentData", "count"):
            if name == "count":
                return len(self._items)
            inside = 0 <= self.currentIndex < len(self._items)
            return self._items[self.currentIndex][name == "currentData"] if inside else None
        raise AttributeError(f"{self._kind} has no attribute {name}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._values:
            raise AttributeError(f"{self._kind} has no property {name}")
        if self._values[name] == value:
            return
        self._values[name] = value
        for signal, told in SIGNALS.get(self._kind, {}).items():
            if told == name:
                self.emit(signal, value)

    def _only(self, *kinds: str) -> None:
        assert self._kind in kinds, f"{self._kind} has no such method"

    def property(self, name: str) -> Any:
        return self._values.get(name)

    def click(self) -> None:
        """What a user's click does; a disabled button does nothing."""
        self._only("QPushButton", "QToolButton", "QCheckBox")
        if self.enabled:
            if self._kind == "QCheckBox" or self.checkable:
                self.checked = not self.checked
            self.emit("clicked(bool)", self.checked)
            self.emit("clicked()")

    def addItem(self, text: str, data: Any = None) -> None:
        self._only("QComboBox")
        self._items.append([text, data])
        if len(self._items) == 1:
            self.currentIndex = 0

    def clear(self) -> None:
        self._only("QComboBox", "QPlainTextEdit", "QTextBrowser", "QLineEdit")
        self._items.clear()
        if self._kind == "QComboBox":
            self.currentIndex = -1
        for name in {"plainText", "html", "text"} & set(self._values):
            setattr(self, name, "")

    def itemData(self, index: int) -> Any:
        self._only("QComboBox")
        return self._items[index][1] if 0 <= index < len(self._items) else None

    def itemText(self, index: int) -> str:
        self._only("QComboBox")
        return self._items[index][0] if 0 <= index < len(self._items) else ""

    def setItemText(self, index: int, text: str) -> None:
        self._only("QComboBox")
        if 0 <= index < len(self._items):
            self._items[index][0] = text

    def findData(self, data: Any) -> int:
        self._only("QComboBox")
        return next((i for i, item in enumerate(self._items) if item[1] == data), -1)

    def setCurrentIndex(self, index: int) -> None:
        self._only("QComboBox", "QTabWidget")
        self.currentIndex = index

    def appendPlainText(self, text: str) -> None:
        self._only("QPlainTextEdit")
        self.plainText = f"{self.plainText}\n{text}".lstrip("\n")

    def setMRMLScene(self, _scene: Any) -> None:
        self._only("qMRMLWidget", "qMRMLNodeComboBox")

    def setRowCount(self, count: int) -> None:
        self._only("QTableWidget")
        self._values["rowCount"] = count
        object.__setattr__(self, "_cells", {place: item for place, item in self._cells.items() if place[0] < count})

    def setColumnCount(self, count: int) -> None:
        self._only("QTableWidget")
        self._values["columnCount"] = count

    def setHorizontalHeaderLabels(self, labels: list[str]) -> None:
        self._only("QTableWidget")
        assert len(labels) == self.columnCount

    def setItem(self, row: int, column: int, item: TableItem) -> None:
        self._only("QTableWidget")
        assert row < self.rowCount and column < self.columnCount
        self._cells[row, column] = item

    def item(self, row: int, column: int) -> TableItem | None:
        self._only("QTableWidget")
        return self._cells.get((row, column))

    def currentRow(self) -> int:
        self._only("QTableWidget")
        return -1

    def setPlaceModeEnabled(self, enabled: bool) -> None:
        self._only("qSlicerMarkupsPlaceWidget")
        self._values["placeModeEnabled"] = enabled

    def setCheckState(self, node: Any, state: int) -> None:
        self._only("qMRMLCheckableNodeComboBox")
        others = [one for one in self._items if one is not node]
        object.__setattr__(self, "_items", [*others, node] if state == QT.Checked else others)
        self.emit("checkedNodesChanged()")

    def checkedNodes(self) -> list[Any]:
        self._only("qMRMLCheckableNodeComboBox")
        return [node for node in self._items if node.GetScene() is not None]

    def currentNode(self) -> Any:
        self._only("qMRMLNodeComboBox", "qSlicerMarkupsPlaceWidget")
        return self._node

    def setCurrentNode(self, node: Any) -> None:
        self._only("qMRMLNodeComboBox", "qSlicerMarkupsPlaceWidget")
        if node is not self._node:
            object.__setattr__(self, "_node", node)
            self.emit("currentNodeChanged(vtkMRMLNode*)", node)
            self.emit("currentNodeChanged(bool)", node is not None)


QT = SimpleNamespace(Checked=2, Unchecked=0, ItemIsSelectable=1, ItemIsEnabled=32)


class TableItem:
    """A QTableWidgetItem."""

    def __init__(self, text: str) -> None:
        self._text, self._tip, self.flags = text, "", 0

    def text(self) -> str:
        return self._text

    def setToolTip(self, text: str) -> None:
        self._tip = text

    def setFlags(self, flags: int) -> None:
        self.flags = flags


class FileDialog:
    """A QFileDialog whose answer a test sets."""

    answer = ""

    @classmethod
    def getOpenFileName(cls, _parent: Any, _title: str, _folder: str, _filter: str) -> str:
        return cls.answer

    @classmethod
    def getSaveFileName(cls, _parent: Any, _title: str, _folder: str, _filter: str) -> str:
        return cls.answer


class Timer(Emitter):
    """A QTimer that a test fires by `emit("timeout()")`."""

    def __init__(self) -> None:
        super().__init__("QTimer")
        self.active, self.interval, self.singleShot = False, 0, False

    def setInterval(self, milliseconds: int) -> None:
        self.interval = milliseconds

    def setSingleShot(self, single: bool) -> None:
        self.singleShot = single

    @staticmethod
    def singleShot(_milliseconds: int, call: Callable[[], None]) -> None:
        call()

    def start(self, *_milliseconds: int) -> None:
        self.active = True

    def stop(self) -> None:
        self.active = False


def load_ui(path: str | Path) -> SimpleNamespace:
    """All widgets of a .ui file by name, with the values that stand there."""
    widgets: dict[str, Widget] = {}
    for element in ElementTree.parse(str(path)).getroot().iter("widget"):
        widget = Widget(element.get("class", ""), element.get("name", ""))
        for item in element.findall("property"):
            value = _value(item)
            if item.get("name") in widget._values:
                widget._values[item.get("name")] = value
        widgets[element.get("name", "")] = widget
    return SimpleNamespace(**widgets)


def _value(item: ElementTree.Element) -> Any:
    kind = item[0].tag
    text = item[0].text or ""
    if kind == "bool":
        return text == "true"
    if kind in ("number", "double"):
        return int(text) if kind == "number" else float(text)
    return tuple(one.text for one in item[0]) if kind == "stringlist" else text
