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
SEMANTIC = "uae-s"
"""Ours with the model of that name, whatever the run's own, in L1 and L2."""
HEADS: dict[str, tuple[str, ...]] = {
    "SAM": ("fine", "coarse"), "SEA": ("semantic",), "UAE-S": ("fine", "coarse", "semantic"),
}  # fmt: skip
"""Heads of SEMANTIC by the papers' names for what they make alone and together."""
SHARED = "uae-shared"
"""Table row: ours on those cases alone that every peer in the table was measured on."""
VARIANTS = {"uae-deformable": {"deformable": True}, "uae-affine": {"affine": True}}
"""Our own system with other options. Its result before refinement needs no run of its own."""
DEFORMABLE = ("uae-deeds", "convexadam", "ants", "elastix")

QUICK_HARD_PER_CT = 10
"""Cases a CT of the quick run (20 together)."""
SHARED_PER_CT = {"hard": 5, "standard30": 3, "standard15": 3}
"""Cases a CT on which every system runs, in this order: a peer takes about a minute of a core for each."""
OWN_PER_CT = {"hard": 25, "standard30": 20, "standard15": 20}
"""Cases a CT of ours: 50 hard ones and 40 of each standard set."""
MORE_PER_CT = {"hard": 10, "standard30": 5, "standard15": 5}
"""Cases a CT of the peers where there is time, their own start and ours."""
R2_CASES, R4_CASES, R5_CASES, L1_CASES, L2_CASES = 3, 8, 4, 6, 4
FIRST_R2, FIRST_MOVES = 1, 2
"""Of R2 (a CT) and of R4 and R5, what runs before the long rest."""
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
    """Every scenario with a few cases for all systems first, then more cases, the slowest kinds of rows last."""
    peers = [name for name in ALL_PEERS if name in systems]
    rigid = [name for name in RIGID_PEERS if name in systems]
    deformable = [name for name in DEFORMABLE if name.startswith(OWN) or name in systems]
    rows: list[Row] = []

    def add(scenario: str, part: str, names: Iterable[str], runs: Iterable[str]) -> None:
        runs = list(runs)
        rows.extend(Row(scenario, part, case, name) for case in names for name in runs)

    add("R1", "hard", cases(SHARED_PER_CT["hard"]), (OWN, *peers))
    for part in UNRELATED:
        add("R3", part, R3_ORDERS[:1], (OWN, *rigid))
        add("R3", part, R3_ORDERS[1:], (OWN,))
    add("R1", "standard30", cases(SHARED_PER_CT["standard30"]), (OWN, *peers))
    add("R2", "smooth", cases(FIRST_R2), deformable)
    for scenario, parts in (("R4", R4_PAIRS), ("R5", R5_PAIRS)):
        for part in parts:
            add(scenario, part, _moves(0, FIRST_MOVES), (OWN, *rigid))
    add("R1", "hard", cases(OWN_PER_CT["hard"]), (OWN,))
    for kind in ("ct-ct", "ct-mr"):
        add("L1", kind, [f"pair{number}" for number in range(L1_CASES)], (OWN, SEMANTIC))
    for part in ("standard15", "hard"):
        add("L2", part, cases(L2_CASES), (OWN, SEMANTIC))
    add("R1", "standard15", cases(SHARED_PER_CT["standard15"]), (OWN, *peers))
    sizes = [f"x{scale}.t{number}" for number in sorted({1, threads, 2 * threads}) for scale in SCALES]
    for task in SCALE_TASKS:
        add("S1", task, sizes, (OWN,))
    add("R1", "hard", cases(SHARED_PER_CT["hard"]), (OWN, *VARIANTS, *(name + STARTED for name in peers)))
    add("R2", "smooth", cases(R2_CASES), deformable)
    for scenario, parts, count in (("R4", R4_PAIRS, R4_CASES), ("R5", R5_PAIRS, R5_CASES)):
        for part in parts:
            add(scenario, part, _moves(FIRST_MOVES, count), (OWN, *rigid))
    for part in SETS:
        add("R1", part, cases(MORE_PER_CT[part]), (OWN, *peers, *(name + STARTED for name in peers)))
        add("R1", part, cases(OWN_PER_CT[part]), (OWN,))
    for part in UNRELATED:
        add("R3", part, R3_ORDERS[1:], rigid)
    return list(dict.fromkeys(rows))


def _moves(first: int, count: int) -> list[str]:
    return [f"move{number}" for number in range(first, count)]


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
