"""A real CT turned into an MR-like scan with its own field of view, pose and deformation, all known."""

from uae.simulate.pose import SETS, SetDefinition
from uae.simulate.scan import SimulatedPair, simulate_mr

__all__ = ["SETS", "SetDefinition", "SimulatedPair", "simulate_mr"]
