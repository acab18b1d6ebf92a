"""DEEDS: dense displacement sampling with MIND-SSC descriptors and a minimum spanning tree, in patient millimetres.

Heinrich et al., "MRF-based deformable registration and ventilation estimation of lung CT", TMI 32(7), 2013; "Towards
realtime multimodal fusion for image-guided interventions using self-similarities", MICCAI 2013 (MIND-SSC); authors'
code deedsBCV.
"""

from uae.deeds.presets import PRESETS, Level, Preset, make_levels
from uae.deeds.solver import DeedsResult, register

__all__ = ["PRESETS", "DeedsResult", "Level", "Preset", "make_levels", "register"]
