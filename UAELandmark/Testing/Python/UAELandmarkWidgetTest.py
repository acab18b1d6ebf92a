"""The panel inside 3D Slicer: what is chosen reaches the parameter node, and Prepare says what is missing."""

import unittest

import numpy as np
import slicer


class UAELandmarkWidgetTest(unittest.TestCase):
    """Opens the module with an empty scene."""

    def setUp(self) -> None:
        """Open the module."""
        slicer.mrmlScene.Clear()
        slicer.util.selectModule("UAELandmark")
        self.widget = slicer.modules.UAELandmarkWidget

    def scan(self, name: str) -> object:
        """A volume node with Hounsfield-like voxels."""
        voxels = np.full((12, 14, 16), -1000, dtype=np.int16)
        voxels[3:9, 3:11, 3:12] = 40
        node = slicer.util.addVolumeFromArray(voxels)
        node.SetName(name)
        return node

    def test_prepare_needs_two_scans(self) -> None:
        """Prepare is enabled once two different scans are chosen."""
        self.assertFalse(self.widget.ui.prepareButton.enabled)
        self.assertTrue(self.widget.ui.prepareButton.toolTip)
        template, query = self.scan("CT"), self.scan("MR")
        self.widget.ui.templateSelector.setCurrentNode(template)
        self.widget.ui.querySelector.setCurrentNode(template)
        self.assertFalse(self.widget.ui.prepareButton.enabled)
        self.widget.ui.querySelector.setCurrentNode(query)
        self.assertTrue(self.widget.ui.prepareButton.enabled)
        self.assertIs(self.widget.parameters.queryVolume, query)

    def test_each_query_has_a_list_of_its_own(self) -> None:
        """Choosing another query scan chooses its list of found points."""
        template, first, second = self.scan("CT"), self.scan("MR 1"), self.scan("MR 2")
        chosen = self.widget.parameters
        chosen.templateVolume, chosen.queryVolume = template, first
        chosen.templatePoints = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "Targets")
        of_first = chosen.queryPoints
        self.assertIsNotNone(of_first)
        self.assertTrue(self.widget.logic.isLive(of_first))
        chosen.queryVolume = second
        self.assertIsNot(chosen.queryPoints, of_first)
        self.assertFalse(self.widget.logic.isLive(of_first))
        chosen.queryVolume = first
        self.assertIs(chosen.queryPoints, of_first)

    def test_closing_the_scene_clears_the_panel(self) -> None:
        """Nothing of the old scene stays."""
        self.widget.ui.templateSelector.setCurrentNode(self.scan("CT"))
        slicer.mrmlScene.Clear()
        self.assertIsNone(self.widget.parameters.templateVolume)
        self.assertFalse(self.widget.ui.prepareButton.enabled)


if __name__ == "__main__":
    unittest.main()
