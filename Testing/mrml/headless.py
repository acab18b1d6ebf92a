"""Real MRML without the desktop application: what Slicer's start-up does, for a scene, its logics and its files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import slicer
import vtk

LOGICS = {
    "volumes": "vtkSlicerVolumesLogic",
    "markups": "vtkSlicerMarkupsLogic",
    "transforms": "vtkSlicerTransformLogic",
    "colors": "vtkMRMLColorLogic",
    "texts": "vtkSlicerTextsLogic",
    "tables": "vtkSlicerTablesLogic",
    "models": "vtkSlicerModelsLogic",
    "units": "vtkSlicerUnitsLogic",
}
STORAGE = {
    ".nrrd": ("vtkMRMLScalarVolumeNode", "vtkMRMLVolumeArchetypeStorageNode"),
    ".nii.gz": ("vtkMRMLScalarVolumeNode", "vtkMRMLVolumeArchetypeStorageNode"),
    ".mha": ("vtkMRMLScalarVolumeNode", "vtkMRMLVolumeArchetypeStorageNode"),
    ".fcsv": ("vtkMRMLMarkupsFiducialNode", "vtkMRMLMarkupsFiducialStorageNode"),
    ".h5": ("vtkMRMLTransformNode", "vtkMRMLTransformStorageNode"),
    ".tfm": ("vtkMRMLTransformNode", "vtkMRMLTransformStorageNode"),
}
"""Node and storage classes by file ending; .mrk.json and transforms say their own class."""


class Headless:
    """A scene with application logic, module logics and file access; one a test.

    Attributes:
        scene: vtkMRMLScene, also `slicer.mrmlScene`.
        application: vtkSlicerApplicationLogic.
        logics: module logics by the keys of LOGICS.
    """

    def __init__(self) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="mrml-")
        self.scene = slicer.vtkMRMLScene()
        slicer.mrmlScene = self.scene
        cache = slicer.vtkCacheManager()
        cache.SetRemoteCacheDirectory(self._folder("cache"))
        cache.SetMRMLScene(self.scene)
        self.scene.SetCacheManager(cache)
        self.application = slicer.vtkSlicerApplicationLogic()
        self.application.SetTemporaryPath(self._folder("temporary"))
        self.application.SetMRMLScene(self.scene)
        self.application.SetSliceLogics(vtk.vtkCollection())
        self._remote = slicer.vtkMRMLRemoteIOLogic()
        self._remote.GetCacheManager().SetRemoteCacheDirectory(self._folder("remote"))
        self._remote.SetMRMLScene(self.scene)
        self._remote.AddDataIOToScene()
        self.logics: dict[str, Any] = {}
        for name, class_name in LOGICS.items():
            logic = getattr(slicer, class_name)()
            logic.SetMRMLApplicationLogic(self.application)
            logic.SetMRMLScene(self.scene)
            self.application.SetModuleLogic(name.capitalize(), logic)
            self.logics[name] = logic
        self.logics["colors"].AddDefaultColorNodes()

    def _folder(self, name: str) -> str:
        folder = Path(self._temporary.name) / name
        folder.mkdir()
        return str(folder)

    def close(self) -> None:
        """Empty the scene and remove the temporary folder."""
        self.scene.Clear(True)
        for logic in (*self.logics.values(), self._remote, self.application):
            logic.SetMRMLScene(None)
        self._temporary.cleanup()

    def load(self, path: str | Path, label: bool = False) -> Any:
        """Load a volume, markups or transform file into the scene.

        Returns:
            The node.
        """
        path = Path(path)
        ending = _ending(path)
        if ending == ".mrk.json":
            node_id = self.logics["markups"].LoadMarkups(str(path), path.name.removesuffix(ending))
            return self.scene.GetNodeByID(node_id)
        if ending in (".h5", ".tfm"):
            node = self.logics["transforms"].AddTransform(str(path), self.scene)
            assert node is not None, path
            return node
        class_name, storage_class = STORAGE[ending]
        if label:
            class_name = "vtkMRMLLabelMapVolumeNode"
        node = self.scene.AddNewNodeByClass(class_name, path.name.removesuffix(ending))
        storage = self.scene.AddNewNodeByClass(storage_class)
        storage.SetFileName(str(path))
        assert storage.ReadData(node), path
        node.SetAndObserveStorageNodeID(storage.GetID())
        node.CreateDefaultDisplayNodes()
        return node

    def save(self, node: Any, path: str | Path) -> Path:
        """Write one storable node to a file.

        Returns:
            The file.
        """
        path = Path(path)
        if _ending(path) == ".fcsv":
            storage = self.scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialStorageNode")
            node.SetAndObserveStorageNodeID(storage.GetID())
        elif node.GetStorageNode() is None:
            node.AddDefaultStorageNode()
        storage = node.GetStorageNode()
        storage.SetFileName(str(path))
        assert storage.WriteData(node), path
        return path

    def save_scene(self, path: str | Path) -> Path:
        """Write the whole scene as .mrb.

        Returns:
            The file.
        """
        self.scene.SetRootDirectory(self._temporary.name)
        assert self.scene.WriteToMRB(str(path)), path
        return Path(path)

    def load_scene(self, path: str | Path) -> None:
        """Close the scene and read a .mrb file into it."""
        self.scene.Clear(False)
        assert self.scene.ReadFromMRB(str(path), True), path

    def node(self, name: str) -> Any:
        """The first node of a name."""
        node = self.scene.GetFirstNodeByName(name)
        assert node is not None, name
        return node


def _ending(path: Path) -> str:
    name = path.name.lower()
    return next(ending for ending in (".mrk.json", ".nii.gz", path.suffix.lower()) if name.endswith(ending))
