"""A real CT turned into another scan, MR-like or CT, with its own field of view, pose and deformation, all known."""

from uae.simulate.pose import SETS, SetDefinition
from uae.simulate.scan import SimulatedPair, simulate_mr, simulate_scan

__all__ = ["SETS", "SetDefinition", "SimulatedPair", "simulate_mr", "simulate_scan"]
