"""Parametric torso: CT and MR of one body with labels, landmarks and the true transforms (the embedded default)."""

from uae.phantom.pair import PhantomPair, phantom_pair, truth_field, write_sample
from uae.phantom.subject import (
    FIRST_TEST_SEED,
    TRAINING_SEEDS,
    VALIDATION_SEEDS,
    Phantom,
    correspondence,
    labels_at,
    make_phantom,
)

__all__ = [
    "FIRST_TEST_SEED",
    "TRAINING_SEEDS",
    "VALIDATION_SEEDS",
    "Phantom",
    "PhantomPair",
    "correspondence",
    "labels_at",
    "make_phantom",
    "phantom_pair",
    "truth_field",
    "write_sample",
]
