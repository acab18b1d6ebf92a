"""`uae models`: what is there, whether it is intact, and how the authors' released files come in."""

from __future__ import annotations

import argparse

from uae.cli.common import Session
from uae.cli.parser import add_command
from uae.errors import InputError, ModelError

EXAMPLE = """\
  uae models list
  uae models verify
  uae models import CrossSAM_inter_1.pth --kind uae-m"""


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add `models`."""
    parser = add_command(
        commands,
        "models",
        "List the trained models, verify their files against the registry, or import a checkpoint that the authors of "
        "UAE released (read without executing code; used only where --model names it).",
        EXAMPLE,
    )
    parser.set_defaults(run=run)
    parser.add_argument("action", choices=("list", "verify", "import"), help="what to do")
    parser.add_argument("file", nargs="?", metavar="FILE", help="the checkpoint to import")
    parser.add_argument("--name", metavar="NAME", help="name in the registry (default: released-KIND)")
    parser.add_argument("--output", metavar="DIR", help="the model folder to import into (default: the user's own)")
    parser.add_argument(
        "--kind", choices=("sam", "uae-s", "uae-m"), help="which of the authors' models FILE is; found out else"
    )


def run(arguments: argparse.Namespace, session: Session) -> int:
    """List, verify or import."""
    if (arguments.file is None) == (arguments.action == "import"):
        raise InputError("`uae models import` takes one FILE; list and verify take none")
    return {"list": _list, "verify": _verify, "import": _import}[arguments.action](arguments, session)


def _list(_arguments: argparse.Namespace, session: Session) -> int:
    from uae.models import list_models

    models = list_models()
    for entry in models:
        place = "comes with the program" if entry["shipped"] else entry["path"]
        missing = "" if entry["present"] else "  FILE IS MISSING"
        session.say(
            f"{entry['name']:<16} version {entry.get('version', '?')}  {'+'.join(entry.get('modalities', []))}  "
            f"{place}{missing}"
        )
        session.say(f"  {entry.get('intended_use', '')}; SHA-256 {entry.get('sha256', '?')}")
    if not models:
        session.say("no models; import one or set UAE_MODELS to a folder of models")
    return 0


def _verify(_arguments: argparse.Namespace, session: Session) -> int:
    from uae.models import verify_models

    results = verify_models()
    for result in results:
        session.say(f"{result['name']:<16} {'ok' if result['ok'] else 'BAD: ' + result['reason']}")
    bad = [result["name"] for result in results if not result["ok"]]
    if bad:
        raise ModelError(f"{len(bad)} of {len(results)} models cannot be used ({', '.join(bad)}); fetch them again")
    return 0


def _import(arguments: argparse.Namespace, session: Session) -> int:
    from uae.models import import_released

    model = import_released(arguments.file, arguments.name, model_dir=arguments.output, kind=arguments.kind)
    session.say(f"imported: {model.name} ({model.path})")
    session.say(f"trained heads: {', '.join(model.meta['trained_heads'])}")
    if model.meta["untrained_heads"]:
        session.say(f"untrained, left out: {', '.join(model.meta['untrained_heads'])}")
    session.say(f"use it with --model {model.name if arguments.output is None else model.path}")
    return 0
