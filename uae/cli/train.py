"""`uae train` and `uae bench`: without a screen, resumable, with every figure in a file."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from uae.cli import bench as bench_public
from uae.cli.common import Session, check_writable, names_of
from uae.cli.parser import add_command, add_model_options
from uae.errors import InputError

TRAIN_EXAMPLE = """\
  uae train appearance --config small --set optimiser.learning_rate=5e-4 --output runs/first --budget-minutes 45
  uae train appearance --config small --output runs/first --resume
  uae train semantic --config small --set network.init=uae-m --output runs/semantic
  uae train crossmodal --config small --set crossmodal.pairs=pairs.csv --output runs/round1
  torchrun --nproc-per-node 4 -m uae.training appearance --config paper --output runs/paper"""
BENCH_EXAMPLE = """\
  UAE_DATA=/data/uae uae bench embedding --quick --json build/bench/embedding.json
  UAE_DATA=/data/uae uae bench embedding --only sides --sides 0,3,5,7 --json build/bench/sides.json
  UAE_DATA=/data/uae uae bench calibrate --model runs/m0/model.pt --json calibration.json --calibrated runs/m0/own.pt
  uae bench match --json build/bench/match.json
  UAE_DATA=/data/uae uae bench deeds --json build/bench/deeds.json"""


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add `train` and `bench`."""
    train = add_command(
        commands,
        "train",
        "Train a branch of the network. Checkpoints, log and the finished model go to --output; --resume goes on from "
        "the last checkpoint with the same random numbers.",
        TRAIN_EXAMPLE,
    )
    train.set_defaults(run=run_train)
    train.more = _settings
    train.add_argument(
        "branch",
        choices=("appearance", "semantic", "crossmodal"),
        help="appearance: SAM, UAE-M0; semantic: SEA (UAE-S); crossmodal: UAE-M k, from registrations by model k-1",
    )
    train.add_argument(
        "--config",
        required=True,
        metavar="F.toml",
        help="the recipe, or the name of one that ships: small, paper, released",
    )
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one entry (a.b=value)")
    train.add_argument("--output", required=True, metavar="DIR", help="folder of the run")
    train.add_argument("--resume", action="store_true", help="continue the run in --output")
    train.add_argument("--budget-minutes", type=float, metavar="N", help="stop after this time; --resume goes on")
    train.add_argument("--data", metavar="DIR", help="the training volumes (default: UAE_DATA)")
    train.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:n]", help="where the network runs")

    bench = add_command(
        commands,
        "bench",
        "Measure on data with known truth and write the figures as JSON. embedding: accuracy on real volumes, found "
        "through UAE_DATA or --data, and on phantoms of other people; test subjects are only reported where "
        "--report-test asks for it; a reliability picture is written beside the JSON. calibrate: measure "
        "your own model and store the limits of its verdicts and of `confident` in a copy of it. match: seconds "
        "from a click to its answers, through the worker, on a phantom pair of whole torsos. deeds: accuracy, time and "
        f"memory of the deformable solver on pairs with known deformations. {bench_public.HELP}",
        f"{BENCH_EXAMPLE}\n{bench_public.EXAMPLE}",
    )
    bench.set_defaults(run=run_bench)
    names = ("embedding", "calibrate", "match", "deeds", *bench_public.NAMES)
    bench.add_argument("name", choices=names, metavar="NAME", help=", ".join(names))
    bench.add_argument("--quick", action="store_true", help="fewer cases")
    bench.add_argument("--report-test", action="store_true", help="also report the test subjects")
    bench.add_argument("--data", metavar="DIR", help="the volumes (default: UAE_DATA)")
    bench.add_argument("--json", "--output", dest="json", required=True, metavar="FILE", help="where the figures go")
    add_model_options(bench)
    bench.add_argument(
        "--only",
        type=names_of,
        default=[],
        metavar="A,B",
        help="embedding: only these studies: simulated, inter_subject, real_inter_subject, sides, validation_organs, "
        "and with --report-test organs, real_mr (default: the first three, sides where --sides is given, the last two "
        "where --report-test is); all: only these rows, by name or its beginning, or with *",
    )
    embedding = bench.add_argument_group("embedding, calibrate")
    embedding.add_argument(
        "--sides",
        type=_sides,
        metavar="L,L",
        help="edges of the seed cube in cells for matching between subjects, 0: nearest neighbour; compares them "
        "on the simulated sets as well (default of the studies: 0,3,5,7, as in the papers)",
    )
    embedding.add_argument(
        "--moving", choices=("mr", "ct"), default="mr", help="what the simulated scans are (default: mr)"
    )
    embedding.add_argument("--calibrated", metavar="F.pt", help="calibrate: where the copy with the limits goes")
    solver = bench.add_argument_group("deeds only")
    solver.add_argument("--deedsbcv", metavar="DIR", help="also run the original: the folder of a built deedsBCV")
    solver.add_argument("--pairs", type=names_of, default=[], metavar="A,B", help="only these pairs")
    solver.add_argument(
        "--presets", type=names_of, default=["faithful", "default"], metavar="A,B", help="which presets"
    )
    solver.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each; the median time counts")
    solver.add_argument("--scaling", action="store_true", help="also time synthetic pairs up to a whole torso")
    bench.add_argument("--report", metavar="DIR", help="deeds, all: also write the page and its pictures there")
    bench_public.add_arguments(bench)


def _settings() -> str:
    from uae.training.config import explain

    return explain()


def run_train(arguments: argparse.Namespace, session: Session) -> int:
    """Train one branch."""
    from uae.training.config import read_config, setting_names

    if int(os.environ.get("RANK", "0")) > 0:
        session.mute()
    config = read_config(arguments.config, arguments.set, arguments.branch)
    output = check_writable(arguments.output, folder=True)
    if arguments.device != "auto":
        config["device"] = arguments.device
    if arguments.threads:
        config["threads"] = arguments.threads
    from uae.training.appearance import train

    model = train(
        config,
        output,
        root=arguments.data,
        resume=arguments.resume,
        budget_minutes=arguments.budget_minutes,
        progress=session.progress,
        branch=arguments.branch,
        explicit=setting_names(arguments.set),
        validate=_validation(arguments, config) if config["validation"]["every"] else None,
    )
    session.say(f"written: {model}")
    return 0


def _validation(arguments: argparse.Namespace, config: dict[str, Any]) -> Callable[[Path], dict[str, float]]:
    """Measures a model file on the validation subjects; `score` decides which checkpoint is the best."""
    from uae.bench.data import find_data
    from uae.bench.validation import check_validation, quick_validation

    settings = config["validation"]
    check_validation(find_data(arguments.data), settings["sets"])
    return lambda path: quick_validation(
        path, arguments.data, settings["sets"], settings["cases"], config.get("device", "auto")
    )


def run_bench(arguments: argparse.Namespace, session: Session) -> int:
    """Run one benchmark."""
    output = check_writable(arguments.json, suffixes=(".json",))
    if arguments.name != "embedding" and arguments.report_test:
        raise InputError(f"`bench {arguments.name}` has no test subjects to report; leave out --report-test")
    if arguments.calibrated and arguments.name != "calibrate":
        raise InputError(f"`bench {arguments.name}` calibrates nothing; leave out --calibrated")
    if arguments.name == "calibrate" and (arguments.only or arguments.sides is not None):
        raise InputError("`bench calibrate` measures what it needs; leave out --only and --sides")
    runs = {"match": _bench_match, "calibrate": _bench_calibrate, "deeds": _bench_deeds, "all": bench_public.run_all}
    runs |= dict.fromkeys(("landmarks", "lesions", "registration"), bench_public.run_dataset)
    run = runs.get(arguments.name, _bench_embedding)
    result = run(arguments, session, output)
    for name, figures in result.items():
        if name in ("meta", "cases", "pairs", "reliability", "negatives", "thresholds"):
            continue
        if not isinstance(figures, dict):
            _say_figures(session, {name: figures}, "")
            continue
        session.say(name)
        _say_figures(session, figures, "  ")
    session.say(f"written: {output}")
    return 0


def _say_figures(session: Session, figures: dict[str, Any], indent: str) -> None:
    for key, value in figures.items():
        if key == "meta":
            continue
        if isinstance(value, dict):
            session.say(f"{indent}{key}")
            _say_figures(session, value, indent + "  ")
        elif isinstance(value, (int, float)):
            session.say(f"{indent}{key:<28} {value:.3g}")


def _bench_match(arguments: argparse.Namespace, session: Session, output: Path) -> dict[str, Any]:
    from uae.bench.match import run_match_bench

    options = ["--device", arguments.device]
    for option, value in (("--model", arguments.model), ("--threads", arguments.threads)):
        options += [option, str(value)] if value else []
    options += ["--no-cache"] if arguments.no_cache else []
    return run_match_bench(options, arguments.quick, output, session.progress)


def _bench_calibrate(arguments: argparse.Namespace, session: Session, output: Path) -> dict[str, Any]:
    from uae.bench.calibration import run_calibration
    from uae.bench.data import find_data
    from uae.models import load_model

    target = check_writable(arguments.calibrated, suffixes=(".pt",)) if arguments.calibrated else None
    find_data(arguments.data)
    result = run_calibration(
        load_model(arguments.model or "uae-m"),
        output,
        target,
        data_dir=arguments.data,
        quick=arguments.quick,
        moving=arguments.moving,
        device=arguments.device,
        progress=session.progress,
    )
    if target is not None:
        session.say(f"written: {target}")
    return result


def _sides(text: str) -> list[int]:
    try:
        return [int(side) for side in names_of(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers; write 0,3,5,7") from None


def _bench_deeds(arguments: argparse.Namespace, session: Session, output: Path) -> dict[str, Any]:
    from uae.bench.deeds import run_deeds_bench

    result = run_deeds_bench(
        data_dir=arguments.data,
        quick=arguments.quick,
        json_path=output,
        pairs=arguments.pairs,
        presets=arguments.presets,
        original=arguments.deedsbcv,
        threads=arguments.threads or 2,
        repeats=max(1, arguments.repeats),
        scaling=arguments.scaling,
        progress=session.progress,
    )
    if arguments.report:
        from uae.bench.deeds_report import write_report

        for file in write_report(result, arguments.report):
            session.say(f"written: {file}")
    return result


def _bench_embedding(arguments: argparse.Namespace, session: Session, output: Path) -> dict[str, Any]:
    from uae.bench.data import find_data
    from uae.bench.embedding import FIXED_POINTS, BenchOptions
    from uae.bench.study import SIDES, check_sides
    from uae.bench.suite import WITHOUT_SCANS, choose_studies, run_suite
    from uae.models import load_model

    studies = choose_studies(arguments.only, arguments.sides is not None, arguments.report_test)
    sides = check_sides(SIDES if arguments.sides is None else arguments.sides)
    if not set(studies) <= set(WITHOUT_SCANS):
        find_data(arguments.data)  # before the model is loaded: this is what is missing most often
    points = FIXED_POINTS // 3 if arguments.quick else FIXED_POINTS
    return run_suite(
        load_model(arguments.model or "uae-m"),
        studies,
        data_dir=arguments.data,
        quick=arguments.quick,
        sides=sides,
        json_path=output,
        options=BenchOptions(fixed_points=points, device=arguments.device, moving=arguments.moving),
        progress=session.progress,
    )
