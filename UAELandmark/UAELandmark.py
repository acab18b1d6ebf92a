"""3D Slicer module UAELandmark: points of one scan found in others, live, each with how far it can be trusted."""

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

from UAELandmarkLib.widget import UAELandmarkWidget  # noqa: E402

__all__ = ["UAELandmark", "UAELandmarkTest", "UAELandmarkWidget"]


class UAELandmark(ScriptedLoadableModule):
    """What the application shows of the module before it is opened."""

    def __init__(self, parent: object) -> None:
        ScriptedLoadableModule.__init__(self, parent)
        self.parent.title = _("UAE Landmark")
        self.parent.categories = [translate("qSlicerAbstractCoreModule", "Registration")]
        self.parent.dependencies = ["Markups"]
        self.parent.contributors = ["AnatomicalEmbedding contributors"]
        self.parent.helpText = _(
            "Finds the points that you place in a template scan again in a query scan, CT or MR: each click or drag "
            "moves the matched point at once, and the point says how far it can be trusted. Choose both scans, press "
            "Prepare, and place points on the template. A point list can be carried to many scans. Research software, "
            "not a medical device."
        )
        self.parent.acknowledgementText = _(
            "Methods: Yan et al., SAM: Self-supervised Learning of Pixel-wise Anatomical Embeddings in Radiological "
            "Images (2022), and Bai et al., UAE: Universal Anatomical Embedding on Multi-modality Medical Images "
            "(2023). Please cite the papers named in CITATION.cff of this extension."
        )
        slicer.app.connect("startupCompleted()", register_samples)


def register_samples() -> None:
    """Offer the phantom pair in the module Sample Data."""
    from UAECommonLib.sample_data import register_samples as register

    register(str(HERE / "Resources" / "Icons" / "UAELandmark.png"))


class UAELandmarkTest(ScriptedLoadableModuleTest):
    """A real job on the phantom pair: prepare, match, follow a moved point."""

    def setUp(self) -> None:
        """Begin with an empty scene."""
        slicer.mrmlScene.Clear()

    def runTest(self) -> None:
        """Run all tests of the module."""
        self.setUp()
        self.test_match_phantom()

    def test_match_phantom(self) -> None:
        """Points of the CT are found in the MR, and follow when they are moved, renamed and deleted."""
        from UAECommonLib.sample_data import load_sample, sample_folder
        from UAECommonLib.torch_offer import torch_is_here
        from UAELandmarkLib.logic import UAELandmarkLogic

        if not torch_is_here():
            self.skipTest("PyTorch is not installed")
        template, query = load_sample(slicer.mrmlScene)
        logic = UAELandmarkLogic()
        try:
            points = logic.loadPoints(sample_folder() / "landmarks_ct.csv")
            found = logic.match(template, query, points)
            self.assertEqual(found.GetNumberOfControlPoints(), points.GetNumberOfControlPoints())
            self.assertTrue(found.GetNthControlPointDescription(0).startswith("score"))
            logic.startLive(template, query, points, found)
            points.SetNthControlPointLabel(0, "renamed")
            self.assertEqual(found.GetNthControlPointLabel(0), "renamed")
            count = points.GetNumberOfControlPoints()
            points.RemoveNthControlPoint(0)
            self.assertEqual(found.GetNumberOfControlPoints(), count - 1)
        finally:
            logic.close()
        self.delayDisplay("Test passed")
