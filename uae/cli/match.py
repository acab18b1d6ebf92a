"""`uae match`: points of a template found again in one query scan, or in a whole cohort."""

from __future__ import annotations

import argparse
import csv
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uae.cli.common import Session, check_writable, embed_scan, load_model_for, read_scan, whole_folder
from uae.cli.parser import add_command, add_modality_options, add_model_options
from uae.errors import InputError, NoConfidentResultError, UAEError

if TYPE_CHECKING:
    from uae.embedding import Embedding
    from uae.matching import Match
    from uae.models import Model

logger = logging.getLogger(__name__)

POINT_FILES = (".mrk.json", ".csv")
TABLE = "table.csv"
TABLE_COLUMNS = (
    "query",
    "file",
    "label",
    "x_lps_mm",
    "y_lps_mm",
    "z_lps_mm",
    "score",
    "cycle_mm",
    "method",
    "confident",
    "reason",
)
EXAMPLE = """\
  uae match ct.nii.gz mr.nii.gz --points targets.mrk.json --output found.mrk.json
  uae match ct.nii.gz --query-list cohort.csv --points targets.csv --output found/
    (cohort.csv: a header with `query` and, if wished, `name` and `modality`; one scan a row, paths relative to it)"""


@dataclass(frozen=True)
class Query:
    """One scan of a cohort."""

    name: str
    path: str
    modality: str


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add `match`."""
    parser = add_command(
        commands,
        "match",
        "Find the points of a template scan in a query scan. Each match says how far it can be trusted; where no point "
        "is confident the output is still written, all flagged, and the exit code is 3. In a cohort a scan that cannot "
        "be used is named in the table and the others go on.",
        EXAMPLE,
    )
    parser.set_defaults(run=run)
    parser.add_argument("template", metavar="TEMPLATE", help="scan in which the points are known")
    parser.add_argument("query", metavar="QUERY", nargs="?", help="scan in which they are looked for")
    parser.add_argument("--query-list", metavar="COHORT.csv", help="a table of scans instead of QUERY")
    parser.add_argument("--points", required=True, metavar="P", help=".mrk.json, .fcsv or .csv in the template's space")
    parser.add_argument(
        "--output", required=True, metavar="OUT", help=".mrk.json or .csv; a folder with one table for a cohort"
    )
    parser.add_argument(
        "--method",
        choices=("auto", "fixed-point", "nearest", "guided"),
        default="auto",
        help="auto: guided by the pair's own rigid alignment where that is trusted, else fixed-point",
    )
    parser.add_argument(
        "--side", type=int, default=5, metavar="CELLS", help="side of the cube of fixed-point seeds (odd, default 5)"
    )
    parser.add_argument("--similarity-map", metavar="DIR", help="also write one similarity volume for each point here")
    add_modality_options(parser, "template", "query")
    add_model_options(parser)


def run(arguments: argparse.Namespace, session: Session) -> int:
    """Match the points in one query or in a cohort."""
    from uae.points import read_points

    queries = _queries(arguments)
    cohort = arguments.query_list is not None
    output = check_writable(arguments.output, folder=cohort, suffixes=() if cohort else POINT_FILES)
    if arguments.similarity_map:
        check_writable(arguments.similarity_map, folder=True)
    if arguments.side < 1 or arguments.side % 2 == 0:
        raise InputError(f"--side {arguments.side}: give an odd number of 1 or more (5 is the paper's)")
    points = read_points(arguments.points)
    matcher = _Matcher(arguments, session, points)
    if cohort:
        return _run_cohort(matcher, queries, output, session)
    matches = matcher.match(queries[0], Path(arguments.similarity_map) if arguments.similarity_map else None)
    _write_matches(output, matches)
    _say_matches(session, matches)
    session.say(f"written: {output}")
    confident = sum(match.confident for match in matches)
    if not confident:
        raise NoConfidentResultError(
            f"none of the {len(matches)} matches is confident; they are written to {output}, all flagged: "
            "check that both scans show the same region, or look at the reasons"
        )
    return 0


class _Matcher:
    """Holds the template, its embedding for each model in use, and the points."""

    def __init__(self, arguments: argparse.Namespace, session: Session, points: Any) -> None:
        self._arguments, self._session, self._points = arguments, session, points
        self._template = read_scan(
            arguments.template, arguments.template_modality, "--template-modality", arguments.series
        )
        outside = [
            label for label, inside in zip(points.labels, self._template.geometry.contains(points.points)) if not inside
        ]
        if outside:
            raise InputError(
                f"{arguments.points}: {len(outside)} of {len(points.labels)} points lie outside {arguments.template} "
                f"(first: {outside[0]}); check that the points belong to this scan and whether they are LPS or RAS"
            )
        self._embedded: dict[str, Embedding] = {}

    def match(self, query: Query, maps: Path | None) -> list[Match]:
        """Matches of all points in one scan, in the order of the points."""
        from uae.matching import match_points

        arguments, progress = self._arguments, self._session.progress
        scan = read_scan(query.path, query.modality, "--query-modality", arguments.series)
        model = load_model_for(arguments.model, self._template, scan)
        template = self._embedding(model)
        embedded = embed_scan(scan, model, arguments, self._session, "query")
        prior, verdict, seen = None, None, (template, embedded)
        if arguments.method in ("auto", "guided"):
            from uae.registration.relate import relate

            pair = relate(
                self._template,
                scan,
                template,
                embedded,
                model,
                device=arguments.device,
                memory_mb=arguments.memory_mb,
                cache=not arguments.no_cache,
                progress=progress,
            )
            prior, verdict = pair.found.transform, pair.found.verdict
            logger.info("prior of the pair: %s (%s)", verdict, pair.found.reason)
            seen = pair.seen
        matches = match_points(
            *seen,
            self._points.points,
            self._points.labels,
            method=arguments.method,
            side=arguments.side,
            prior=prior,
            prior_verdict=verdict,
            limits=model.thresholds.get("match"),
            progress=progress,
        )
        if maps is not None:
            self._write_maps(*seen, maps)
        return matches

    def _embedding(self, model: Model) -> Embedding:
        if model.sha256 not in self._embedded:
            self._embedded[model.sha256] = embed_scan(self._template, model, self._arguments, self._session, "template")
        return self._embedded[model.sha256]

    def _write_maps(self, template: Embedding, query: Embedding, folder: Path) -> None:
        from uae.matching import similarity_map

        with whole_folder(folder) as temporary:
            for number, (label, point) in enumerate(zip(self._points.labels, self._points.points), 1):
                similarity_map(template, query, point).write(temporary / f"{number:03d}_{_file_name(label)}.nii.gz")


def _run_cohort(matcher: _Matcher, queries: list[Query], output: Path, session: Session) -> int:
    from uae.files import atomic_path

    maps = matcher._arguments.similarity_map
    rows: list[dict[str, Any]] = []
    confident = 0
    failed: list[str] = []
    for number, query in enumerate(queries, 1):
        session.say(f"[{number}/{len(queries)}] {query.name}")
        file = output / f"{query.name}.mrk.json"
        try:
            matches = matcher.match(query, Path(maps) / query.name if maps else None)
        except InputError as error:
            failed.append(query.name)
            logger.warning("%s: %s", query.name, error)
            rows.append({"query": query.name, "file": query.path, "confident": False, "reason": str(error)})
            continue
        _write_matches(file, matches)
        confident += sum(match.confident for match in matches)
        rows += [{"query": query.name, "file": query.path, **_row(match)} for match in matches]
    with atomic_path(output / TABLE) as temporary, temporary.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, TABLE_COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    session.say(f"written: {output / TABLE}, {len(queries) - len(failed)} of {len(queries)} scans matched")
    if len(failed) == len(queries):
        raise InputError(f"no scan of the list could be used; the reasons stand in {output / TABLE}")
    if not confident:
        raise NoConfidentResultError(f"no match in any scan is confident; all are written and flagged in {output}")
    if failed:
        raise UAEError(f"{len(failed)} of {len(queries)} scans could not be used ({', '.join(failed)}); see {TABLE}")
    return 0


def _queries(arguments: argparse.Namespace) -> list[Query]:
    if (arguments.query is None) == (arguments.query_list is None):
        raise InputError("give either QUERY or --query-list cohort.csv, and not both")
    if arguments.query_list is not None:
        return read_cohort(Path(arguments.query_list), arguments.query_modality)
    return [Query(Path(arguments.query).name, arguments.query, arguments.query_modality)]


def read_cohort(table: Path, modality: str) -> list[Query]:
    """The scans of a cohort.

    Args:
        table: csv with the column `query` and, if wished, `name` and `modality`; paths are relative to the table.
        modality: for rows that name none.

    Returns:
        The scans in the table's order, each with a name of its own that is fit for a file.

    Raises:
        InputError: the table cannot be read, has no such column, no row, or an unknown modality.
    """
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True)
            columns = reader.fieldnames or []
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--query-list {table}: cannot be read ({error}); give a .csv table") from error
    if "query" not in columns:
        raise InputError(f"--query-list {table}: no column `query`; give the header query,name,modality")
    queries: list[Query] = []
    for row in rows:
        file = (row["query"] or "").strip()
        if not file:
            continue
        path = table.parent / file
        decided = (row.get("modality") or modality).strip().lower()
        if decided not in ("auto", "ct", "mr"):
            raise InputError(f"--query-list {table}: modality `{decided}` of {file}; use auto, ct or mr")
        queries.append(Query(_unique(row.get("name") or _stem(path), queries), str(path), decided))
    if not queries:
        raise InputError(f"--query-list {table}: no scan in the list; add a row for each")
    return queries


def _unique(name: str, queries: list[Query]) -> str:
    name = _file_name(name)
    taken = {query.name for query in queries}
    number, candidate = 1, name
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def _stem(path: Path) -> str:
    return re.sub(r"\.(nii\.gz|nii|nrrd|mha|mhd|dcm)$", "", path.name, flags=re.IGNORECASE)


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text.strip()).strip("._") or "unnamed"


def _row(match: Match) -> dict[str, Any]:
    x, y, z = (round(float(value), 4) for value in match.point_mm)
    return {"label": match.label, "x_lps_mm": x, "y_lps_mm": y, "z_lps_mm": z, **_columns(match)}


def _columns(match: Match) -> dict[str, Any]:
    return {
        "score": round(float(match.score), 4),
        "cycle_mm": round(float(match.cycle_mm), 2),
        "method": match.method,
        "confident": bool(match.confident),
        "reason": match.reason,
    }


def _write_matches(path: Path, matches: list[Match]) -> None:
    import numpy as np

    from uae.points import write_points

    points = np.array([match.point_mm for match in matches], dtype=np.float64).reshape(-1, 3)
    write_points(path, [match.label for match in matches], points, [_columns(match) for match in matches])


def _say_matches(session: Session, matches: list[Match]) -> None:
    width = max([len(match.label) for match in matches] + [5])
    session.say(f"{'label':<{width}}  {'x, y, z (LPS mm)':>26}  score  cycle mm  confident")
    for match in matches:
        x, y, z = match.point_mm
        verdict = "yes" if match.confident else f"no: {match.reason}"
        session.say(
            f"{match.label:<{width}}  {x:8.1f} {y:8.1f} {z:8.1f}  {match.score:5.2f}  {match.cycle_mm:8.1f}  {verdict}"
        )
