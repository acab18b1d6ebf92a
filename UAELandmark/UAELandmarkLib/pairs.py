"""Prepared pairs of volume nodes: their files for the worker, and whether they still are what was embedded."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from UAECommonLib.mrml import write_volume
from UAECommonLib.temporary import temporary_directory
from UAELandmarkLib.places import state_of

__all__ = ["Pair", "Pairs"]


@dataclass
class Pair:
    """A template and a query volume as the worker knows them.

    Attributes:
        name: in the worker's protocol.
        template_id: node ID; query_id: the other's.
        options: model, device and modalities it was asked for with.
        states: of both volumes when their files were written.
        request: number of the open `prepare`, or None.
        answer: the worker's answer (verdict, reason, template_to_query, ...), None before; "origin" tells what all
            matches of the pair rest on: model, modalities, voxels.
        listeners: whom to tell about the open `prepare`: on_progress, on_done, on_error.
    """

    name: str
    template_id: str
    query_id: str
    options: dict[str, Any]
    states: tuple[Any, Any]
    request: int | None = None
    answer: dict[str, Any] | None = None
    listeners: list[tuple[Any, Any, Any]] = field(default_factory=list)


@dataclass
class Pairs:
    """All pairs of a scene, and a folder of their own with the volumes' files; it goes with this object."""

    scene: Any
    _pairs: dict[tuple[str, str], Pair] = field(default_factory=dict)
    _files: dict[str, tuple[Any, Path]] = field(default_factory=dict)
    _numbers: Any = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        directory = temporary_directory("uae-landmark-")
        self.folder, self.remove_folder = Path(directory.name), directory.cleanup

    def find(self, template: Any, query: Any) -> Pair | None:
        """The pair of two nodes, None where it was never prepared or a volume was changed since."""
        pair = self._pairs.get((template.GetID(), query.GetID()))
        return pair if pair is not None and pair.states == (state_of(template), state_of(query)) else None

    def make(self, template: Any, query: Any, options: dict[str, Any]) -> Pair:
        """A new pair of two nodes; it takes the place of an earlier one."""
        states = (state_of(template), state_of(query))
        name = f"{template.GetID()}|{query.GetID()}|{next(self._numbers)}"
        pair = Pair(name, template.GetID(), query.GetID(), dict(options), states)
        self._pairs[template.GetID(), query.GetID()] = pair
        return pair

    def file_of(self, volume: Any) -> Path:
        """The volume in its own frame (no parents) as a file; written once for each state of it."""
        state, path = self._files.get(volume.GetID(), (None, None))
        if path is not None and state == state_of(volume):
            return path
        if path is not None:
            path.unlink(missing_ok=True)
        path = self.folder / f"volume-{next(self._numbers)}.nrrd"
        write_volume(volume, path, top=volume)
        self._files[volume.GetID()] = (state_of(volume), path)
        return path

    def new_file(self, suffix: str) -> Path:
        """A name in the folder that nothing uses yet."""
        return self.folder / f"file-{next(self._numbers)}{suffix}"

    def current(self, pair: Pair) -> bool:
        """Whether a pair is still the one of its nodes, and these are as they were."""
        template, query = self.scene.GetNodeByID(pair.template_id), self.scene.GetNodeByID(pair.query_id)
        return template is not None and query is not None and self.find(template, query) is pair

    def take(self, template: Any, query: Any) -> Pair | None:
        """Take out and return the pair of two nodes; their files stay for the next."""
        return self._pairs.pop((template.GetID(), query.GetID()), None)

    def take_out(self, pair: Pair) -> None:
        """Take out one pair, if it is still there."""
        if self._pairs.get((pair.template_id, pair.query_id)) is pair:
            del self._pairs[pair.template_id, pair.query_id]

    def take_gone(self) -> list[Pair]:
        """Take out and return the pairs of which a volume is no longer in the scene, and remove such volumes' files."""
        for node_id in [node_id for node_id in self._files if self.scene.GetNodeByID(node_id) is None]:
            self._files.pop(node_id)[1].unlink(missing_ok=True)
        gone = [key for key in self._pairs if any(self.scene.GetNodeByID(node_id) is None for node_id in key)]
        return [self._pairs.pop(key) for key in gone]

    def take_all(self) -> list[Pair]:
        """Take out and return all pairs, and remove all files: the scene is being closed."""
        pairs, self._pairs = list(self._pairs.values()), {}
        for _state, path in self._files.values():
            path.unlink(missing_ok=True)
        self._files.clear()
        return pairs
