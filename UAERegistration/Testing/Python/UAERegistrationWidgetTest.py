"""The panel inside 3D Slicer: what is chosen reaches the parameter node, and Align says what is missing."""

import unittest

import numpy as np
import slicer


class UAERegistrationWidgetTest(unittest.TestCase):
    """Opens the module with an empty scene."""

    def setUp(self) -> None:
        """Open the module."""
        slicer.mrmlScene.Clear()
        slicer.util.selectModule("UAERegistration")
        self.widget = slicer.modules.UAERegistrationWidget

    def scan(self, name: str) -> object:
        """A volume node with Hounsfield-like voxels."""
        voxels = np.full((12, 14, 16), -1000, dtype=np.int16)
        voxels[3:9, 3:11, 3:12] = 40
        node = slicer.util.addVolumeFromArray(voxels)
        node.SetName(name)
        return node

    def test_align_needs_two_scans(self) -> None:
        """Align is enabled once two different scans are chosen."""
        self.assertFalse(self.widget.ui.alignButton.enabled)
        self.assertTrue(self.widget.ui.alignButton.toolTip)
        fixed, moving = self.scan("CT"), self.scan("MR")
        self.widget.ui.fixedSelector.setCurrentNode(fixed)
        self.widget.ui.movingSelector.setCurrentNode(fixed)
        self.assertFalse(self.widget.ui.alignButton.enabled)
        self.widget.ui.movingSelector.setCurrentNode(moving)
        self.assertTrue(self.widget.ui.alignButton.enabled)
        self.assertIs(self.widget.parameters.movingVolume, moving)
        self.assertIn("CT", self.widget.ui.fixedModalityComboBox.currentText)

    def test_choices_are_kept_in_the_scene(self) -> None:
        """Preset and device are in the parameter node."""
        self.widget.ui.presetComboBox.setCurrentIndex(2)
        self.assertEqual(self.widget.parameters.preset.value, "deformable")
        self.widget.ui.deviceComboBox.setCurrentIndex(self.widget.ui.deviceComboBox.findData("cpu"))
        self.assertEqual(self.widget.parameters.device, "cpu")

    def test_closing_the_scene_clears_the_panel(self) -> None:
        """Nothing of the old scene stays."""
        self.widget.ui.fixedSelector.setCurrentNode(self.scan("CT"))
        slicer.mrmlScene.Clear()
        self.assertIsNone(self.widget.parameters.fixedVolume)
        self.assertFalse(self.widget.ui.alignButton.enabled)


if __name__ == "__main__":
    unittest.main()
