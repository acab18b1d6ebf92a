"""Preparing pairs in the worker, and what all requests share: telling, failing, waiting."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

from uae.errors import CancelledError, InputError, UAEError
from UAECommonLib.errors import UnsuitableNodeError
from UAECommonLib.i18n import _
from UAECommonLib.modality import settle_modality
from UAECommonLib.mrml import fingerprint
from UAECommonLib.worker_client import WorkerClient
from UAELandmarkLib.pairs import Pair, Pairs

__all__ = ["OnDone", "OnError", "OnProgress", "Preparation"]

logger = logging.getLogger(__name__)

OnDone = Callable[[Any], None]
OnError = Callable[[UAEError], None]
OnProgress = Callable[[str, float, "float | None"], None]


class Preparation:
    """Pairs of volume nodes on their way into the worker.

    Attributes:
        client: of the worker.
        pairs: what is prepared.
        say: told what the user should know.
        on_ready: told each pair that became ready.
        in_use: says whether somebody follows a pair.
    """

    def __init__(self, scene: Any, client: WorkerClient, say: Callable[[str], None]) -> None:
        self.scene, self.client, self.say = scene, client, say
        self.pairs = Pairs(scene)
        client.folder = self.pairs.folder
        self.on_ready: Callable[[Pair], None] | None = None
        self.in_use: Callable[[Pair], bool] = lambda _pair: False

    def start(
        self,
        template: Any,
        query: Any,
        options: dict[str, Any],
        on_progress: OnProgress | None = None,
        on_done: OnDone | None = None,
        on_error: OnError | None = None,
    ) -> int | None:
        """Prepare a pair; see `UAELandmarkLogic.prepare`."""
        check_volumes(template, query)
        pair = self.pairs.find(template, query)
        if pair is not None and pair.options == options and pair.answer is not None:
            self.tell(on_done, pair.answer)
            return None
        listener = (on_progress, on_done, on_error)
        if pair is not None and pair.request is not None:
            if pair.options == options:
                pair.listeners.append(listener)
                return pair.request
            self.client.cancel(pair.request)
        self.forget(self.pairs.take(template, query))
        scans = (("template", template), ("query", query))
        modalities = {role: settle_modality(volume, options[f"{role}_modality"]) for role, volume in scans}
        files = {
            role: {"path": str(self.pairs.file_of(volume)), "modality": modalities[role]} for role, volume in scans
        }
        pair = self.pairs.make(template, query, options)
        pair.listeners.append(listener)

        def done(answer: dict[str, Any]) -> None:
            pair.request = None
            if not self.pairs.current(pair):
                changed = InputError(_("the scans were changed or removed meanwhile; prepare them again"))
                for _progress, _done, failed in pair.listeners:
                    self.fail(failed, changed)
                return
            pair.answer = {**answer, "origin": _origin(answer, template, query)}
            for _progress, told, _failed in pair.listeners:
                self.tell(told, pair.answer)
            self.tell(self.on_ready, pair)

        def failed(error: UAEError) -> None:
            pair.request = None
            self.pairs.take_out(pair)
            for _progress, _done, told in pair.listeners:
                self.fail(told, error)

        def progress(record: dict[str, Any]) -> None:
            for told, _done, _failed in pair.listeners:
                if told is not None:
                    told(record["stage"], record["percent"], record["eta_s"])

        pair.request = self.client.prepare(
            pair.name,
            **files,
            model=options["model"],
            device=options["device"],
            on_result=done,
            on_error=failed,
            on_progress=progress,
        )
        return pair.request

    def ready(self, template: Any, query: Any) -> Pair | None:
        """The prepared pair of two nodes as they are now, or None."""
        if template is None or query is None:
            return None
        pair = self.pairs.find(template, query)
        return pair if pair is not None and pair.answer is not None else None

    def forget(self, *pairs: Pair | None) -> None:
        """Let the worker drop pairs."""
        for pair in filter(None, pairs):
            self.client.forget(pair.name)

    def forget_gone(self) -> None:
        """Drop the pairs of removed volumes; what is on its way for them is stopped."""
        self._drop(self.pairs.take_gone())

    def forget_all(self) -> None:
        """Drop all pairs: the scene is being closed."""
        self._drop(self.pairs.take_all())

    def _drop(self, pairs: list[Pair]) -> None:
        for pair in pairs:
            if pair.request is not None:
                self.client.cancel(pair.request)
            self.client.forget(pair.name)

    def outcome(self, number: int | None, outcome: dict[str, Any]) -> dict[str, Any]:
        """Wait for a request whose callbacks fill `outcome` with "answer" or "error".

        Raises:
            UAEError: the error.
        """
        if number is not None:
            self.client.wait(number)
        if "error" in outcome:
            raise outcome["error"]
        if "answer" not in outcome:
            raise CancelledError(_("the work was stopped before it ended"))
        return outcome

    def fail(self, on_error: OnError | None, error: UAEError) -> None:
        """Tell an error to who asked, or to the user."""
        if on_error is not None:
            on_error(error)
        elif not isinstance(error, CancelledError):
            self.say(str(error))

    @staticmethod
    def tell(listener: OnDone | None, value: Any) -> None:
        """Tell a result where somebody listens."""
        if listener is not None:
            listener(value)


def _origin(answer: dict[str, Any], template: Any, query: Any) -> str:
    """What matches of a pair rest on, the same in another session."""
    modalities = [answer[f"{role}_modality"]["modality"] for role in ("template", "query")]
    voxels = [fingerprint(volume, top=volume) for volume in (template, query)]
    return json.dumps([answer["model"]["sha256"], *modalities, *voxels])


def check_volumes(template: Any, query: Any) -> None:
    """Refuse a missing volume, one in both roles, or a label map.

    Raises:
        InputError: with what to choose.
    """
    if template is None or query is None:
        raise InputError(_("choose a template volume and a query volume"))
    if template is query:
        raise InputError(_("the template and the query are the same volume; choose another query"))
    for volume in (template, query):
        if volume.IsA("vtkMRMLLabelMapVolumeNode"):
            raise UnsuitableNodeError(_("{name} is a label map; choose a CT or MR").format(name=volume.GetName()))
