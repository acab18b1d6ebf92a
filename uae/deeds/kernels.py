"""Compiled kernels of DEEDS (numba). Each has an exact numpy twin beside its caller, which is tested against it.

Every kernel releases the interpreter lock and works on a chunk, so that two directions run in two threads and a
registration can be cancelled between chunks.
"""

from __future__ import annotations

from uae.deeds.kernels_cost import hamming_planes, unfold
from uae.deeds.kernels_fields import (
    consistency,
    invert_planes,
    jacobian_planes,
    laplacian,
    sample,
    spread,
    warp_planes,
)
from uae.deeds.kernels_mind import mind_words, ssd_planes
from uae.deeds.kernels_tree import block_differences, choose_labels, depths, send_messages
from uae.deeds.vector import NODES

__all__ = [
    "NODES", "block_differences", "choose_labels", "consistency", "depths", "hamming_planes", "invert_planes",
    "jacobian_planes", "laplacian", "mind_words", "sample", "send_messages", "spread", "ssd_planes", "unfold",
    "warp_planes",
]  # fmt: skip
