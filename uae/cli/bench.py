"""`uae bench all | landmarks | lesions | registration`: arguments, and what they start."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from uae.cli.common import Session, names_of
from uae.errors import InputError

EXAMPLE = """\
  UAE_DATA=/data/uae uae bench all --quick --json build/bench/all_quick.json
  UAE_DATA=/data/uae uae bench all --json build/bench/all.json --report Docs/benchmarks
  UAE_DATA=/data/uae uae bench all --only R1/hard/ct_lidc0001_chest.0/uae --json build/bench/row.json
  uae bench lesions --dataset /data/DLS --json build/bench/lesions.json
  uae bench landmarks --dataset /data/ChestCT --json build/bench/landmarks.json
  uae bench registration --dataset /data/L2R/AbdomenMRCT --json build/bench/registration.json"""
HELP = (
    "all: us and what a user would take instead, on the same scans, in one run. landmarks, lesions, registration: the "
    "papers' tables on public data, found by --dataset."
)
NAMES = ("all", "landmarks", "lesions", "registration")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of these benchmarks."""
    group = parser.add_argument_group("all only")
    group.add_argument("--peers", type=names_of, metavar="A,B", help="of simpleitk, elastix, ants, convexadam")
    group.add_argument("--jobs", type=int, metavar="N", help="pairs at once (--quick: as many as fit; else 1)")
    group.add_argument("--budget-minutes", type=float, metavar="N", help="begin no pair after this time (--quick: 9.7)")
    group.add_argument("--note", default="", metavar="TEXT", help="what readers of the page should know of this run")
    public = parser.add_argument_group("landmarks, lesions, registration only")
    public.add_argument("--dataset", metavar="DIR", help="the data, in their published layout")
    public.add_argument("--split", metavar="NAME", help="train, val(id) or test (default: the one the papers report)")
    public.add_argument("--template", metavar="NAME", help="landmarks: the template image (default: the first)")
    public.add_argument("--reversed-slices", action="store_true", help="lesions: slices run against the annotation's z")
    public.add_argument("--limit", type=int, metavar="N", help="only the first N pairs")
    public.add_argument("--no-deformable", action="store_true", help="registration: without DEEDS")


def run_all(arguments: argparse.Namespace, session: Session, output: Path) -> dict[str, Any]:
    """Run `bench all` and write its report where --report asks for it."""
    from uae.bench.all_report import write_report
    from uae.bench.all_rows import RunOptions
    from uae.bench.all_run import run_all as run

    threads = arguments.threads or 1  # one thread makes every system repeatable to the last digit
    jobs = arguments.jobs or (max(1, (os.cpu_count() or 1) // threads) if arguments.quick else 1)
    if jobs < 1:
        raise InputError(f"--jobs {jobs}: give 1 or more")
    result = run(
        data_dir=arguments.data,
        quick=arguments.quick,
        json_path=output,
        options=RunOptions(arguments.model or "uae-m", threads, arguments.device),
        peers=arguments.peers,
        only=arguments.only,
        jobs=min(jobs, 8) if arguments.quick else jobs,
        budget_minutes=arguments.budget_minutes,
        note=arguments.note,
        progress=session.progress,
    )
    folder = arguments.report or output.parent
    name = "all.md" if arguments.report else output.with_suffix(".md").name
    for file in write_report(result, folder, name):
        session.say(f"written: {file}")
    for row in result["meta"]["rows"][:200] if arguments.only else []:
        session.say(f"{row['name']}: {row['status']}, TRE {row['tre_mm']} mm; repeat: {row['command']}")
    return result


def run_dataset(arguments: argparse.Namespace, session: Session, output: Path) -> dict[str, Any]:
    """Run one of the benchmarks on public data."""
    if not arguments.dataset:
        raise InputError(f"`bench {arguments.name}` needs --dataset, the folder of the data in their published layout")
    from uae.bench import dataset_runs
    from uae.models import default_model, load_model

    if arguments.name == "registration":
        pairs = dataset_runs.image_pairs(arguments.dataset, arguments.split)
        model = load_model(arguments.model or default_model(*pairs[0].modalities))
        return dataset_runs.run_registrations(
            pairs, model, not arguments.no_deformable, arguments.device, arguments.threads or 2, arguments.limit,
            output, session.progress,
        )  # fmt: skip
    points = dataset_runs.point_pairs(
        arguments.name, arguments.dataset, arguments.split, arguments.template, arguments.reversed_slices
    )
    model = load_model(arguments.model or default_model(*points[0].modalities))
    return dataset_runs.run_points(
        points, model, arguments.name, arguments.device, arguments.limit, output, session.progress
    )
