"""All studies of `uae bench embedding` in one JSON: the simulated sets first, then what was asked for besides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uae.bench.embedding import BenchOptions, read_result, run_embedding_bench, write_json
from uae.bench.inter_subject import INTER_SUBJECT
from uae.bench.organs import ORGANS, VALIDATION_ORGANS
from uae.bench.real_inter_subject import REAL_INTER_SUBJECT
from uae.bench.real_mr import REAL_MR
from uae.bench.reliability import plot_reliability, reliability
from uae.bench.sides import SIDES_STUDY
from uae.bench.study import SIDES, Setup, Study, check_sides, run_study
from uae.errors import InputError
from uae.json_values import plain
from uae.progress import Cancel, Progress

if TYPE_CHECKING:
    from uae.models import Model

SIMULATED = "simulated"
STUDIES: dict[str, Study] = {
    study.name: study
    for study in (INTER_SUBJECT, REAL_INTER_SUBJECT, SIDES_STUDY, VALIDATION_ORGANS, ORGANS, REAL_MR)
}
VALIDATION = (SIMULATED, INTER_SUBJECT.name, REAL_INTER_SUBJECT.name)
"""What is measured where nothing is asked for."""
TEST = tuple(study.name for study in STUDIES.values() if study.test)
NAMES = (SIMULATED, *STUDIES)
WITHOUT_SCANS = (INTER_SUBJECT.name, VALIDATION_ORGANS.name)
"""Studies of phantoms alone."""
NEGATIVES = "negatives"
OF_CTS = (SIMULATED, INTER_SUBJECT.name, VALIDATION_ORGANS.name)
"""Studies that may stand beside simulated CTs: the others are of simulated MR or choose nothing."""
KEEP = (*(name for name, study in STUDIES.items() if not study.test), "test", "reliability", NEGATIVES)


def choose_studies(only: Sequence[str] = (), sides: bool = False, report_test: bool = False) -> tuple[str, ...]:
    """The studies to run.

    Args:
        only: their names; where empty the validation studies, the comparison of sides where `sides` asks for it, and
            those on test subjects where `report_test` does.
        sides: whether sides were given.
        report_test: whether test subjects may be reported.

    Raises:
        InputError: unknown name, or a study on test subjects that was not asked for by --report-test.
    """
    unknown = [name for name in only if name not in NAMES]
    if unknown:
        raise InputError(f"--only {unknown[0]}: unknown study; choose from {', '.join(NAMES)}")
    closed = [name for name in only if name in TEST and not report_test]
    if closed:
        raise InputError(f"--only {closed[0]} measures test subjects, never for choosing; add --report-test")
    if only:
        return tuple(name for name in NAMES if name in only)
    asked = VALIDATION + ((SIDES_STUDY.name,) if sides else ()) + (TEST if report_test else ())
    return tuple(name for name in NAMES if name in asked)


def run_suite(
    model: Model,
    studies: Sequence[str] = VALIDATION,
    data_dir: str | Path | None = None,
    quick: bool = False,
    sides: Sequence[int] = SIDES,
    json_path: str | Path | None = None,
    options: BenchOptions | None = None,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> dict[str, Any]:
    """Measure a model.

    Args:
        model: the weights with their thresholds.
        studies: names of NAMES, see `choose_studies`.
        data_dir: folder of the real volumes; UAE_DATA or the default where None.
        quick: fewer cases of everything.
        sides: of the seed cube, for matching between subjects and the comparison of sides.
        json_path: written after every case; a run of the same model goes on there, and what other runs of it have
            measured is kept. Where there are match records the reliability picture is written beside it.
        options: of the simulated sets.
        progress: told the share of each study done, stage: its name ("bench" for the simulated sets).
        cancel: asked between and within cases.

    Returns:
        The simulated sets as in `uae.bench.embedding.run_embedding_bench`; each study under its name, those on test
        subjects under `test`; `reliability`.

    Raises:
        InputError: unknown study, wrong side, no data, or a result file that cannot be used.
        CancelledError: the user stopped; finished cases stay in the file.
    """
    unknown = [name for name in studies if name not in NAMES]
    if unknown:
        raise InputError(f"unknown study {unknown[0]!r}; choose from {', '.join(NAMES)}")
    options = options or BenchOptions()
    if options.moving != "mr" and any(name not in OF_CTS for name in studies):
        raise InputError(f"simulated CTs go with {', '.join(OF_CTS)}; add --only, and another --json")
    path = None if json_path is None else Path(json_path)
    earlier = read_result(path)
    if earlier.get("meta", {}).get("model_sha256") != model.sha256:
        earlier = {}
    kept = {key: earlier[key] for key in KEEP if key in earlier}
    if SIMULATED in studies:
        result = run_embedding_bench(
            model, data_dir, quick, json_path=path, options=options, keep=kept, progress=progress, cancel=cancel
        )
    else:
        meta = {"model": model.name, "model_version": model.version, "model_sha256": model.sha256}
        result = earlier or {"meta": {**meta, "thresholds": plain(model.thresholds)}, "cases": []}
    setup = Setup(model, data_dir, options.device, quick, check_sides(sides), cancel)
    for name in (name for name in STUDIES if name in studies):
        study = STUDIES[name]
        place = result.setdefault("test", {}) if study.test else result
        place[name] = run_study(study, setup, place.get(name), _saver(result, place, name, path), progress)
    return _finish(result, model, path)


def _saver(result: dict[str, Any], place: dict[str, Any], name: str, path: Path | None) -> Callable[[dict], None]:
    def save(found: dict[str, Any]) -> None:
        place[name] = found
        if path is not None:
            write_json(path, result)

    return save


def _finish(result: dict[str, Any], model: Model, path: Path | None) -> dict[str, Any]:
    found = plain(reliability(result, model.thresholds))
    if found:
        result["reliability"] = found
    if path is not None:
        write_json(path, result)
        if found:
            plot_reliability(found, path.with_name(f"{path.stem}-reliability.png"))
    return result
