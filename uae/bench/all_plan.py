"""What `uae bench all` runs: a list of rows, each one system on one pair, with a name that repeats it alone."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from uae.bench.data import VALIDATION_CTS
from uae.bench.pairs import R4_PAIRS, R5_PAIRS, UNRELATED
from uae.errors import InputError
from uae.simulate import SETS

OWN = "uae"
RIGID_PEERS = ("simpleitk", "elastix", "ants")
ALL_PEERS = (*RIGID_PEERS, "convexadam")
STARTED = "@uae"
"""Ending of a system that starts from our result of the same pair."""
VARIANTS = {"uae-deformable": {"deformable": True}, "uae-affine": {"affine": True}}
"""Our own system with other options. Its result before refinement needs no run of its own."""
DEFORMABLE = ("uae-deeds", "convexadam", "ants", "elastix")

CASES_PER_CT, HARD_PER_CT, QUICK_HARD_PER_CT = 20, 25, 10
"""Cases a CT of the standard sets; of the hard one (50 together); of the quick run (20 together)."""
R2_CASES, R4_CASES, R5_CASES, L1_CASES, L2_CASES = 3, 8, 4, 6, 4
R3_ORDERS = ("forward", "backward")
SCALES = (1, 2, 4, 8)
SCALE_TASKS = ("embed", "match", "register")


@dataclass(frozen=True)
class Row:
    """One measurement: a system on one pair.

    `case` names the pair within `scenario` and `part`; `system` is a peer, "uae", a variant, or one of them with
    STARTED.
    """

    scenario: str
    part: str
    case: str
    system: str

    @property
    def name(self) -> str:
        """Unique name, as --only takes it."""
        return "/".join((self.scenario, self.part, self.case, self.system))

    @property
    def pair(self) -> tuple[str, str, str]:
        """What rows on the same pair have in common."""
        return self.scenario, self.part, self.case


def cases(count: int) -> list[str]:
    """Names of the first `count` cases of each validation CT, the CTs in turn."""
    return [f"{subject}.{index}" for index in range(count) for subject in VALIDATION_CTS]


def plan(quick: bool, systems: Sequence[str], threads: int = 1) -> list[Row]:
    """All rows, the most telling first, so that a run that is stopped by its budget has them.

    Args:
        quick: twenty hard cases and no overlap for us and the peer that every installation has, and what else the
            budget leaves room for.
        systems: peers that are installed.
        threads: of the run, which S1 varies around.

    Returns:
        Rows in the order in which they run.
    """
    return _quick(systems) if quick else _full(systems, threads)


def _quick(systems: Sequence[str]) -> list[Row]:
    rigid = [name for name in RIGID_PEERS if name in systems]
    hard = cases(QUICK_HARD_PER_CT)
    rows = [Row("R1", "hard", case, OWN) for case in hard]
    # All of ours come first: the contract wants them even if the peers leave no time.
    rows += [Row("R3", part, order, OWN) for part in UNRELATED for order in R3_ORDERS]
    rows += [Row("R1", "hard", case, "simpleitk") for case in hard if "simpleitk" in systems]
    rows += [Row("R1", "hard", case, name) for case in hard for name in rigid if name != "simpleitk"]
    rows += [Row("R3", part, "forward", name) for part in UNRELATED for name in rigid]
    return rows


def _full(systems: Sequence[str], threads: int) -> list[Row]:
    peers = [name for name in ALL_PEERS if name in systems]
    rigid = [name for name in RIGID_PEERS if name in systems]
    rows: list[Row] = []
    for part in ("hard", *(name for name in SETS if name != "hard")):
        names = cases(HARD_PER_CT if part == "hard" else CASES_PER_CT)
        with_variants = VARIANTS if part == "hard" else ()
        for case in names:
            rows += [Row("R1", part, case, system) for system in (OWN, *peers)]
            rows += [Row("R1", part, case, name + STARTED) for name in peers]
            rows += [Row("R1", part, case, name) for name in with_variants]
    rows += [Row("R3", part, order, name) for part in UNRELATED for order in R3_ORDERS for name in (OWN, *rigid)]
    deformable = [name for name in DEFORMABLE if name.startswith(OWN) or name in systems]
    rows += [Row("R2", "smooth", case, name) for case in cases(R2_CASES) for name in deformable]
    for scenario, parts, count in (("R4", R4_PAIRS, R4_CASES), ("R5", R5_PAIRS, R5_CASES)):
        for part in parts:
            for number in range(count):
                rows += [Row(scenario, part, f"move{number}", name) for name in (OWN, *rigid)]
    rows += [Row("L1", kind, f"pair{number}", OWN) for kind in ("ct-ct", "ct-mr") for number in range(L1_CASES)]
    rows += [Row("L2", part, case, OWN) for part in ("standard15", "hard") for case in cases(L2_CASES)]
    for number in sorted({1, threads, 2 * threads}):
        rows += [Row("S1", task, f"x{scale}.t{number}", OWN) for task in SCALE_TASKS for scale in SCALES]
    return rows


def select(rows: Iterable[Row], only: Sequence[str]) -> list[Row]:
    """The rows whose names match one of the patterns (`*` stands for anything; a beginning up to a `/` is enough).

    Raises:
        InputError: a pattern matches no row.
    """
    rows = list(rows)
    if not only:
        return rows
    found = []
    for pattern in only:
        own = [
            row for row in rows
            if fnmatch.fnmatchcase(row.name, pattern) or row.name.startswith(pattern.rstrip("/") + "/")
        ]  # fmt: skip
        if not own:
            raise InputError(
                f"--only {pattern}: no such row; names look like {rows[0].name if rows else 'R1/hard/...'}"
            )
        found += [row for row in own if row not in found]
    return found
