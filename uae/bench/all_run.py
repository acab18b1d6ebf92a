"""`uae bench all`: run the rows of the plan, keep each as soon as it is there, go on where an earlier run stopped."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import shlex
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import uae
from uae.bench.all_plan import ALL_PEERS, OWN, SEMANTIC, STARTED, Row, plan, select
from uae.bench.all_rows import RunOptions, measure
from uae.bench.all_summary import summarise
from uae.bench.data import find_data
from uae.bench.embedding import earlier_run, write_json
from uae.bench.pairs import Pairs
from uae.bench.peers.run import missing_reason, settings, versions
from uae.bench.resources import end_children
from uae.device import cpu_name
from uae.errors import InputError
from uae.info import collect
from uae.json_values import plain
from uae.models import list_models, load_model
from uae.progress import Cancel, Progress, check_cancel, report

logger = logging.getLogger(__name__)

QUICK_MINUTES = 9.7
"""No row is begun that would probably end later, so that the quick run ends in ten minutes."""
FIRST_GUESS_S = 60.0
"""How long a row takes of whose system none is known yet (our measurement: 15 to 45 s of one core)."""
STOP_POLL_S = 0.2
SETTLED = ("settings", "threads", "jobs", "device", "peers", "versions", "processor", "processors")
"""What must be the same for an earlier run's rows to count: accuracy and times."""
OF_OURS = ("model_sha256", "thresholds", "cached_embeddings", "code_sha256")
"""What must be the same besides for rows that ours has a part in; a peer that starts by itself needs none of it."""
OF_SEMANTIC = "semantic"
"""What rows of SEMANTIC need instead of our model's weights and limits: its own."""


def run_all(
    data_dir: str | Path | None = None, quick: bool = False, json_path: str | Path | None = None,
    options: RunOptions | None = None, peers: Sequence[str] | None = None, only: Sequence[str] = (), jobs: int = 1,
    budget_minutes: float | None = None, note: str = "", progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run the benchmark.

    Args:
        data_dir: the real volumes; UAE_DATA or the default where None.
        quick: twenty hard cases, and as much as QUICK_MINUTES leave room for of the pairs without overlap and peers.
        json_path: written after every row; a run with the same settings goes on there.
        options: model, threads, device.
        peers: names of peers; all installed ones where None.
        only: names of rows or beginnings of them (see `all_plan.select`).
        jobs: pairs at once, each system with `options.threads` threads; times are fair only with 1.
        budget_minutes: rows that would probably end later are left out, but never a quick run's twenty hard cases of
            ours; QUICK_MINUTES for a quick run where None.
        note: a sentence for the page, such as what else the machine did.
        progress: told the share of rows done, stage "bench".
        cancel: asked between rows.

    Returns:
        The JSON of the contract, see `all_summary.summarise`.

    Raises:
        InputError: no data, an unknown peer, or a result file that cannot be used.
        CancelledError: the user stopped; finished rows stay in the file.
    """
    options = options or RunOptions()
    data = find_data(data_dir)
    chosen, skipped = _peers(peers)
    wanted = select(plan(quick, chosen, options.threads), only)
    path = None if json_path is None else Path(json_path)
    if quick and options.cache_folder is None and path is not None:
        # The CT of twenty cases is embedded once; what the cache holds is bit by bit what would be computed again.
        options = replace(options, cache_folder=path.parent.resolve() / "embeddings")
    meta = _meta(options, chosen, skipped, quick, jobs) | {"note": note}
    meta["planned"] = len(plan(quick, chosen, options.threads))
    records = _earlier_rows(path, meta)
    budget = QUICK_MINUTES if quick and budget_minutes is None and not only else budget_minutes
    run = _Run(records, meta, options, Pairs(data), path, budget, progress, cancel)
    run.go(wanted, max(1, jobs))
    return run.result()


class _Run:
    """Rows in progress; `records` by row name."""

    def __init__(
        self, records: dict[str, dict[str, Any]], meta: dict[str, Any], options: RunOptions, pairs: Pairs,
        path: Path | None, budget_minutes: float | None, progress: Progress | None, cancel: Cancel | None,
    ) -> None:  # fmt: skip
        self.records, self.meta, self.options, self.pairs, self.path = records, meta, options, pairs, path
        self.progress, self.cancel = progress, cancel
        self.longest: dict[tuple[str, str], float] = {}
        self.end = None if budget_minutes is None else time.monotonic() + 60.0 * budget_minutes
        self.left_out: list[str] = []
        self.lock, self.total, self.done = threading.Lock(), 1, 0
        self.stopped = threading.Event()

    def go(self, wanted: Sequence[Row], jobs: int) -> None:
        """Run what is missing; `jobs` groups of rows on one pair at a time."""
        missing = [row for row in wanted if row.name not in self.records]
        if not missing:
            logger.warning("all rows are in %s already; remove it to measure them again", self.path)
        self.total = max(len(missing), 1)
        groups = [list(rows) for _, rows in itertools.groupby(missing, key=lambda row: row.pair)]
        if jobs == 1:
            for rows in groups:
                self.group(rows)
        else:
            self._together(groups, jobs)
        report(self.progress, "bench", 1.0)

    def _together(self, groups: Iterable[list[Row]], jobs: int) -> None:
        pool = ThreadPoolExecutor(jobs)
        running: set[Future] = set()
        try:
            for rows in groups:
                if len(running) >= jobs:
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in finished:
                        future.result()
                running.add(pool.submit(self.group, rows))
            for future in wait(running, return_when=FIRST_EXCEPTION)[0]:
                future.result()
        except BaseException:
            # Whoever is writing the file ends first; nobody writes it after this run has told its error.
            with self.lock:
                self.stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            # Again and again: a group that had not heard yet may just be starting a child.
            while any(not future.cancelled() for future in wait(running, timeout=STOP_POLL_S).not_done):
                end_children()
            raise
        pool.shutdown()

    def group(self, rows: list[Row]) -> None:
        """Rows on one pair, the pair made once."""
        scenario, part, case = rows[0].pair
        pair = None
        for row in rows:
            check_cancel(self.cancel)
            if self.stopped.is_set():
                return
            if self.too_late(row):
                with self.lock:
                    self.left_out.append(row.name)
                continue
            if pair is None and scenario != "S1":
                pair = self.pairs.make(scenario, part, case)
            ours = None
            if row.system.endswith(STARTED):
                own = Row(scenario, part, case, OWN)
                if own.name not in self.records:
                    self.keep(measure(own, pair, self.options, None))
                ours = self.records[own.name]
            start = time.monotonic()
            self.keep(measure(row, pair, self.options, ours))
            with self.lock:
                kind = (row.scenario, row.system)
                self.longest[kind] = max(self.longest.get(kind, 0.0), time.monotonic() - start)
                self.done += 1
                report(self.progress, "bench", self.done / self.total)

    def too_late(self, row: Row) -> bool:
        """Whether the time is up for a row, by the longest that its system has taken so far."""
        if self.end is None or (self.meta["quick"] and (row.scenario, row.part, row.system) == ("R1", "hard", OWN)):
            return False
        return time.monotonic() + self.longest.get((row.scenario, row.system), FIRST_GUESS_S) > self.end

    def keep(self, record: dict[str, Any]) -> None:
        """Store a finished row with the command that repeats it; what was stopped half-way is none."""
        record["command"] = self.command(record["name"])
        with self.lock:
            if self.stopped.is_set():
                return
            self.records[record["name"]] = record
            logger.info("%s: %s, TRE %s mm", record["name"], record["status"], record.get("tre_mm"))
            if self.path is not None:
                write_json(self.path, self.result())

    def command(self, name: str) -> str:
        """The command line that measures a row alone, with the same figures."""
        given = ["uae", "bench", "all", "--only", name, "--threads", str(self.options.threads)]
        if self.options.model != "uae-m":
            given += ["--model", Path(self.options.model).name]
        if self.options.device != "auto":
            given += ["--device", self.options.device]
        return "UAE_DATA=... " + shlex.join([*given, "--json", "build/bench/row.json"])

    def result(self) -> dict[str, Any]:
        """The JSON so far."""
        return summarise(list(self.records.values()), {**self.meta, "left_out": sorted(self.left_out)})


def _earlier_rows(path: Path | None, meta: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of an earlier run that count for this one, by name."""
    before = earlier_run(path, meta, SETTLED).get("meta", {})
    changed = {key for key in (*OF_OURS, OF_SEMANTIC) if before.get(key) != meta[key]}

    def counts(system: str) -> bool:
        unneeded = {"model_sha256", "thresholds"} if system == SEMANTIC else {OF_SEMANTIC}
        return system in ALL_PEERS or not changed - unneeded

    return {row["name"]: row for row in before.get("rows", []) if counts(row["system"])}


def code_sha256() -> str:
    """Hash of what decides our results: the package without benchmarks, command line and training."""
    root, found = Path(uae.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        if path.relative_to(root).parts[0] not in ("bench", "cli", "training"):
            found.update(path.read_bytes())
    return found.hexdigest()


def _weights_and_limits(name: str) -> list[Any] | None:
    """Hash and limits of a registered model, None where there is none of that name."""
    return next(([e["sha256"], plain(e.get("thresholds"))] for e in list_models() if e["name"] == name), None)


def _peers(names: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    """Peers to run, and for the others why not."""
    chosen, skipped = [], {}
    for name in ALL_PEERS:
        reason = "not asked for" if names is not None and name not in names else missing_reason(name)
        if reason is None:
            chosen.append(name)
        else:
            skipped[name] = reason
            if names is None:
                logger.info("%s is skipped: %s", name, reason)
    unknown = [name for name in names or () if name not in ALL_PEERS]
    if unknown:
        raise InputError(f"unknown peer {unknown[0]!r}; choose from {', '.join(ALL_PEERS)}")
    return chosen, skipped


def _meta(
    options: RunOptions, chosen: Sequence[str], skipped: Mapping[str, str], quick: bool, jobs: int
) -> dict[str, Any]:
    model = load_model(options.model)
    facts = collect()
    return {
        "date": date.today().isoformat(), "quick": quick, "jobs": jobs, "threads": options.threads,
        "device": options.device, "model": model.name, "model_version": model.version, "model_sha256": model.sha256,
        "model_round": model.meta.get("round", 0), "thresholds": plain(model.thresholds),
        "code_sha256": code_sha256(), OF_SEMANTIC: _weights_and_limits(SEMANTIC),
        "processor": cpu_name(), "processors": os.cpu_count(), "platform": facts["platform"], "python": facts["python"],
        "versions": {"uae": facts["uae"], **facts["libraries"], **versions()}, "peers": list(chosen),
        "skipped": dict(skipped), "settings": settings(), "cached_embeddings": options.cache_folder is not None,
    }  # fmt: skip
