"""Matching of points between two embeddings: nearest neighbour, fixed-point and guided search, with confidence."""

from uae.matching.confidence import judge, limits_for
from uae.matching.fixed_point import FixedPointOptions
from uae.matching.match import (
    PRIOR_MOST,
    PRIOR_WEIGHT,
    Match,
    inside_scan,
    match_points,
    mutual_matches,
    nearest,
    similarity_map,
)
from uae.matching.search import SearchIndex, search_index

__all__ = [
    "PRIOR_MOST",
    "PRIOR_WEIGHT",
    "FixedPointOptions",
    "Match",
    "SearchIndex",
    "inside_scan",
    "judge",
    "limits_for",
    "match_points",
    "mutual_matches",
    "nearest",
    "search_index",
    "similarity_map",
]
