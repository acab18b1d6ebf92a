"""3D Slicer module UAERegistration: a CT and an MR brought together by anatomical embeddings, with a verdict."""

from __future__ import annotations

import sys
from pathlib import Path

import slicer
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.ScriptedLoadableModule import ScriptedLoadableModule, ScriptedLoadableModuleTest

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent):  # installed, `uae` lies beside this file; in a checkout, beside its folder
    if (folder / "uae").is_dir() and str(folder) not in sys.path:
        sys.path.append(str(folder))

from UAERegistrationLib.widget import UAERegistrationWidget  # noqa: E402

__all__ = ["UAERegistration", "UAERegistrationTest", "UAERegistrationWidget"]


class UAERegistration(ScriptedLoadableModule):
    """What the application shows of the module before it is opened."""

    def __init__(self, parent: object) -> None:
        ScriptedLoadableModule.__init__(self, parent)
        self.parent.title = _("UAE Registration")
        self.parent.categories = [translate("qSlicerAbstractCoreModule", "Registration")]
        self.parent.dependencies = []
        self.parent.contributors = ["AnatomicalEmbedding contributors"]
        self.parent.helpText = _(
            "Brings a moving CT or MR to a fixed one, such as an MR to the planning CT, whatever their fields of view: "
            "anatomical embeddings find the same places in both, matches that no fit has seen judge the result, and a "
            "result that cannot be trusted is refused. Choose both scans and press Align. Rigid is the default; the "
            "deformable part is contour support, not dose. Research software, not a medical device."
        )
        self.parent.acknowledgementText = _(
            "Methods: Bai et al., UAE: Universal Anatomical Embedding on Multi-modality Medical Images (2023), and "
            "Heinrich et al., MRF-based Deformable Registration and Ventilation Estimation of Lung CT (2013). Please "
            "cite the papers named in CITATION.cff of this extension."
        )
        slicer.app.connect("startupCompleted()", register_samples)
        slicer.app.connect("startupCompleted()", watch_scenes)


def watch_scenes() -> None:
    """Let grid transforms of opened scenes interpolate as they were computed, whether the panel was opened or not."""

    def opened(*_arguments: object) -> None:
        if slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLGridTransformNode") is not None:
            from UAECommonLib.result_nodes import use_linear_interpolation

            use_linear_interpolation(slicer.mrmlScene)

    slicer.mrmlScene.AddObserver(slicer.mrmlScene.EndImportEvent, opened)


def register_samples() -> None:
    """Offer the phantom pair in the module Sample Data."""
    from UAECommonLib.sample_data import register_samples as register

    register(str(HERE / "Resources" / "Icons" / "UAERegistration.png"))


class UAERegistrationTest(ScriptedLoadableModuleTest):
    """A real job on the phantom pair: align, switch, undo."""

    def setUp(self) -> None:
        """Begin with an empty scene."""
        slicer.mrmlScene.Clear()

    def runTest(self) -> None:
        """Run all tests of the module."""
        self.setUp()
        self.test_align_phantom()

    def test_align_phantom(self) -> None:
        """The phantom pair is aligned, its result can be switched off, and undo leaves nothing behind."""
        from UAECommonLib.sample_data import load_sample
        from UAECommonLib.torch_offer import torch_is_here
        from UAERegistrationLib.logic import UAERegistrationLogic

        if not torch_is_here():
            self.skipTest("PyTorch is not installed")
        fixed, moving = load_sample(slicer.mrmlScene)
        logic = UAERegistrationLogic()
        outcome = logic.register(fixed, moving)
        self.assertIn(outcome.status, ("accepted", "review"), outcome.reason)
        self.assertIs(moving.GetParentTransformNode(), outcome.nodes.linear)
        logic.show(outcome.nodes.linear, withLinear=False)
        self.assertIsNone(moving.GetParentTransformNode())
        logic.undo(outcome.nodes.linear)
        self.assertIsNone(moving.GetParentTransformNode())
        self.delayDisplay("Test passed")
