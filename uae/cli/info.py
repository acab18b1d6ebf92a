"""`uae info`: the environment, for a person or for a report."""

from __future__ import annotations

import argparse
import json

from uae.cli.common import Session
from uae.cli.parser import add_command

EXAMPLE = """\
  uae info
  uae info --json --devices"""


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add `info`."""
    parser = add_command(
        commands, "info", "Show versions, models and folders. Imports no torch unless --devices asks for it.", EXAMPLE
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--devices", action="store_true", help="also ask torch for its devices (slower)")


def run(arguments: argparse.Namespace, session: Session) -> int:
    """Print the environment."""
    from uae.info import collect

    facts = collect(devices=arguments.devices)
    if arguments.json:
        session.say(json.dumps(facts, indent=2))
        return 0
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {item or '-'}" for key, item in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value)) or "-"
        session.say(f"{name:<14} {value}")
    return 0
