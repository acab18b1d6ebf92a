"""Registration over an MRML scene: scans out as files, `uae register` in a child process, the result back as nodes.

Plain Python: no Qt, no widget, no parameter node. From the console:

    logic = UAERegistrationLogic()
    outcome = logic.register(planningCT, mr)
    print(outcome.status, outcome.reason)
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from uae.errors import CancelledError, InputError, UAEError
from UAECommonLib import result_nodes
from UAECommonLib.compare_views import checkerboard
from UAECommonLib.errors import SceneChangedError, UnsuitableNodeError
from UAECommonLib.modality import guess_modality
from UAECommonLib.mrml import array_of, fingerprint, ijk_to_world_lps, parent_chain, same_fingerprint
from UAECommonLib.process import Runner, make_runner
from UAECommonLib.worker_client import error_of
from UAERegistrationLib.job import MODALITIES, PRESETS, Job, Outcome, RegistrationOptions, write_job

__all__ = ["MODALITIES", "PRESETS", "Outcome", "RegistrationOptions", "UAERegistrationLogic"]

logger = logging.getLogger(__name__)

GPU_PROBLEMS = ("is not here", "out of memory")
"""Words of the core's errors after which the CPU is tried."""


class UAERegistrationLogic:
    """Registers volume nodes of one scene; one job at a time.

    Args:
        scene: vtkMRMLScene; the application's where None.
        runner: process interface; made for where we are if not given.
    """

    def __init__(self, scene: Any = None, runner: Runner | None = None) -> None:
        import slicer

        self.scene = slicer.mrmlScene if scene is None else scene
        self.runner = runner or make_runner()
        self._job: Job | None = None
        self._observed: list[tuple[Any, int]] = []

    @property
    def running(self) -> bool:
        """Whether a registration runs."""
        return self._job is not None

    def register(self, fixed: Any, moving: Any, preset: str = "rigid", **choices: Any) -> Outcome:
        """Register and wait for the end; for scripts and tests, the widget uses `start`.

        Args:
            fixed: volume node that stays.
            moving: volume node that is brought to it.
            preset: rigid, affine or deformable.
            choices: further fields of RegistrationOptions, and onProgress, onLog as in `start`.

        Returns:
            The outcome; a refusal is one, and leaves the scene as it was.

        Raises:
            UAEError: bad input, out of memory, cancelled, or the scene was changed meanwhile.
        """
        listeners = {name: choices.pop(name) for name in ("onProgress", "onLog") if name in choices}
        ended: list[Outcome] = []
        self.start(fixed, moving, RegistrationOptions(preset=preset, **choices), ended.append, **listeners)
        try:
            self.runner.wait(lambda: bool(ended))
        finally:
            self._abort()
        outcome = ended[0]
        if outcome.error is not None:
            raise outcome.error
        return outcome

    def start(
        self,
        fixed: Any,
        moving: Any,
        options: RegistrationOptions | None = None,
        onFinished: Callable[[Outcome], None] | None = None,
        onProgress: Callable[[str, float, float | None], None] | None = None,
        onLog: Callable[[str], None] | None = None,
    ) -> None:
        """Begin a registration in a child process and return.

        Args:
            fixed: volume node that stays.
            moving: volume node that is brought to it.
            options: see RegistrationOptions.
            onFinished: told the outcome, once.
            onProgress: told the stage, the percentage in it and the seconds left in it (None: unknown).
            onLog: told each line of the log.

        Raises:
            InputError: a choice or a scan cannot be used, or a registration runs already.
        """
        options = options or RegistrationOptions()
        if self._job is not None:
            raise InputError("a registration runs already; wait for it or cancel it first")
        self._check(fixed, moving, options)
        job = write_job(fixed, moving, options)
        job.onProgress, job.onFinished, job.onLog = onProgress, onFinished, onLog
        try:
            self._job = job
            self._run()
        except BaseException:
            self._job = None
            job.folder.cleanup()
            raise

    def cancel(self) -> None:
        """Ask the running registration to stop; `onFinished` is told when it has."""
        self.runner.cancel()

    def close(self) -> None:
        """End a running registration now, remove its files and stop observing; nothing enters the scene."""
        self._abort()
        self.stopObserving()

    def _abort(self) -> None:
        if self._job is not None:
            self.runner.kill()
        if self._job is not None:
            self._job.folder.cleanup()
            self._job = None

    def guessModality(self, volume: Any) -> tuple[str, str]:
        """CT or MR as the registration would decide, and why.

        Args:
            volume: volume node.

        Returns:
            ("ct", "mr" or "" where it is doubtful, reason).
        """
        return guess_modality(volume)

    def show(self, linear: Any, withLinear: bool = True, withDeformable: bool = True) -> None:
        """Switch the parts of a result on and off (before / after); see result_nodes.show."""
        result_nodes.show(linear, withLinear, withDeformable)

    def undo(self, linear: Any) -> None:
        """Give the moving scan its old parent back and remove what the registration added."""
        self.stopObserving()
        result_nodes.undo(self.scene, linear)

    def outdated(self, linear: Any) -> str:
        """What changed in the inputs since a result was made; empty where nothing did."""
        return result_nodes.outdated_reason(linear)

    def observe(self, linear: Any, onOutdated: Callable[[str], None] | None = None) -> None:
        """Mark a result as outdated as soon as one of its scans or its region changes.

        Args:
            linear: the result's linear node.
            onOutdated: told what changed.
        """
        import slicer
        import vtk

        self.stopObserving()
        fixed, moving, roi = (
            linear.GetNodeReference(role) for role in (result_nodes.FIXED, result_nodes.MOVING, result_nodes.ROI)
        )

        def changed(reason: str) -> None:
            if reason and self.scene.IsNodePresent(linear):
                result_nodes.mark_outdated(linear, reason)
                if onOutdated is not None:
                    onOutdated(reason)

        transformed = slicer.vtkMRMLTransformableNode.TransformModifiedEvent
        for node in filter(None, (fixed, moving)):
            what = f"the voxels of {node.GetName()} were changed"
            listeners = {node.ImageDataModifiedEvent: lambda *_, what=what: changed(what)}
            listeners |= dict.fromkeys(
                (transformed, vtk.vtkCommand.ModifiedEvent), lambda *_: changed(self.outdated(linear))
            )
            self._observed += [(node, node.AddObserver(event, listener)) for event, listener in listeners.items()]
        self._observed += [(linear, linear.AddObserver(transformed, lambda *_: changed(self.outdated(linear))))]
        if roi is not None:
            events = (transformed, vtk.vtkCommand.ModifiedEvent, slicer.vtkMRMLMarkupsNode.PointModifiedEvent)
            self._observed += [
                (roi, roi.AddObserver(event, lambda *_: changed(self.outdated(linear)))) for event in events
            ]

    def stopObserving(self) -> None:
        """Remove all observers."""
        for node, tag in self._observed:
            node.RemoveObserver(tag)
        self._observed = []

    def checkerboard(self, linear: Any) -> Any:
        """Show the fixed scan and the resampled moving one in turn, field by field.

        Args:
            linear: the result's linear node.

        Returns:
            Volume node, 0 to 255; it takes the place of the result's earlier one, and goes with `undo`.

        Raises:
            UnsuitableNodeError: the result has no resampled volume, or that does not lie on the fixed scan's grid.
        """
        image, earlier = linear.GetNodeReference(result_nodes.IMAGE), linear.GetNodeReference(result_nodes.BOARD)
        fixed = linear.GetNodeReference(result_nodes.FIXED)
        if image is None or fixed is None:
            raise UnsuitableNodeError("there is no resampled volume to show; align again with a resampled volume")
        board = checkerboard(self.scene, fixed, image)
        if earlier is not None:
            result_nodes.remove(self.scene, earlier)
        board.SetAttribute(result_nodes.KIND, "checkerboard")
        linear.SetNodeReferenceID(result_nodes.BOARD, board.GetID())
        return board

    def afterSceneLoaded(self) -> None:
        """Set what files do not keep: the linear interpolation of our grid transforms."""
        result_nodes.use_linear_interpolation(self.scene)

    def _check(self, fixed: Any, moving: Any, options: RegistrationOptions) -> None:
        for role, node in (("fixed", fixed), ("moving", moving)):
            if node is None or not self.scene.IsNodePresent(node):
                raise InputError(f"choose the {role} scan")
            if node.IsA("vtkMRMLLabelMapVolumeNode"):
                raise UnsuitableNodeError(f"{node.GetName()} is a label map; choose a CT or MR")
            array_of(node)
        if fixed is moving:
            raise InputError("fixed and moving are the same scan; choose two")
        if fixed.GetParentTransformNode() is not None and _shares_result(fixed, moving):
            raise InputError("the fixed scan lies under the moving scan's registration; undo that first")
        for name, value, allowed in (
            ("preset", options.preset, tuple(PRESETS)),
            ("modality", options.fixedModality, MODALITIES),
            ("modality", options.movingModality, MODALITIES),
        ):
            if value not in allowed:
                raise InputError(f"unknown {name} {value!r}; use {', '.join(allowed)}")

    def _run(self) -> None:
        job = self._job
        self.runner.start(
            [*job.arguments, "--device", job.device],
            self._onLine,
            self._onProcessEnded,
            job.onLog or logger.debug,
            job.folder.name,
        )

    def _onLine(self, record: dict[str, Any]) -> None:
        job = self._job
        if job is None:
            return
        if record.get("stage") == "finished":
            job.message = str(record.get("message", ""))
        elif job.onProgress is not None:
            job.onProgress(str(record.get("stage")), float(record.get("percent") or 0.0), record.get("eta_s"))

    def _onProcessEnded(self, exitCode: int) -> None:
        job = self._job
        if job is None:
            return
        try:
            if exitCode in (2, 4) and job.device != "cpu" and any(words in job.message for words in GPU_PROBLEMS):
                self._announce(job, f"{job.message}. Now on the CPU: expect {_cpu_time(job)}")
                job.device, job.message = "cpu", ""
                self._run()
                return
            outcome = self._outcome(job, exitCode)
        except UAEError as error:
            status = "cancelled" if isinstance(error, CancelledError) else "failed"
            outcome = Outcome(status, str(error), error=error)
        except Exception as error:  # whoever waits must be told, whatever happened
            logger.exception("the result could not be taken into the scene")
            outcome = Outcome("failed", str(error), error=UAEError(f"the result could not be used ({error})"))
        outcome.scans = (job.fixed, job.moving)
        self._job = None
        job.folder.cleanup()
        if job.onFinished is not None:
            job.onFinished(outcome)

    def _announce(self, job: Job, text: str) -> None:
        logger.warning(text)
        if job.onLog is not None:
            job.onLog(text)

    def _outcome(self, job: Job, exitCode: int) -> Outcome:
        """Read the files and, where there is a result, add it to the scene.

        Raises:
            UAEError: the child failed, or the scene was changed meanwhile.
        """
        folder = Path(job.folder.name) / "result"
        if exitCode not in (0, 3):
            last = "".join(self.runner.log.strip().splitlines()[-1:])
            text = job.message or f"the helper process ended unexpectedly (code {exitCode}: {last}); try again"
            raise error_of(exitCode, "cancelled; the scene is as it was" if exitCode == 130 else text)
        files = result_nodes.read_result(folder, job.options.resample)
        for role, node in (("fixed", job.fixed), ("moving", job.moving)):
            files.report["inputs"][role]["file"] = node.GetName()
        report = files.report
        if report["status"] == "refused":
            return Outcome("refused", report["reason"], report)
        self._checkUnchanged(job)
        nodes = result_nodes.place(self.scene, files, job.fixed, job.moving)
        if job.options.roi is not None and self.scene.IsNodePresent(job.options.roi):
            result_nodes.note_region(nodes.linear, job.options.roi, job.roiPrint)
        return Outcome(report["status"], report["reason"], report, nodes)

    def _checkUnchanged(self, job: Job) -> None:
        """SceneChangedError where the scans are gone or are no longer what was registered."""
        for role, node, before in (("fixed", job.fixed, job.prints[0]), ("moving", job.moving, job.prints[1])):
            if not self.scene.IsNodePresent(node):
                raise SceneChangedError(f"the {role} scan was removed while it was registered; the result is dropped")
            top = result_nodes.top_of(node) if node is job.moving else None
            try:
                same = same_fingerprint(fingerprint(node, top), before)
            except UnsuitableNodeError:
                same = False
            if not same:
                raise SceneChangedError(
                    f"{node.GetName()} was changed while it was registered, so the result is dropped; align again"
                )


def _shares_result(fixed: Any, moving: Any) -> bool:
    """Whether the fixed scan hangs below the result that carries the moving one."""
    own = [node for node in parent_chain(moving) if node.GetAttribute(result_nodes.KIND) in ("linear", "grid")]
    return any(node in own for node in parent_chain(fixed))


def _cpu_time(job: Job) -> str:
    """How long the CPU will need for both scans, in words."""
    from uae.device import expected_cpu_time

    boxes = [
        array_of(node).size * abs(np.linalg.det(ijk_to_world_lps(node)[:3, :3])) for node in (job.fixed, job.moving)
    ]
    return expected_cpu_time(sum(boxes) / 8e6, register=True)
