"""The commands and options of `uae`: one module a group of commands, each adding its own parser."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NoReturn

from uae import __version__
from uae.errors import InputError

EXIT_CODES = """\
exit codes:
  0    done (a registration may say: for review; matches may be flagged as not confident)
  2    bad input: the message says what to change
  3    no confident result: a registration was refused, or no match is confident
  4    out of memory or disk
  130  cancelled (Ctrl-C or SIGTERM); nothing half-written is left
"""


class Parser(argparse.ArgumentParser):
    """An argparse parser whose mistakes are InputError, so that they end like every other bad input.

    Attributes:
        more: makes the end of the help, called only where the help is shown.
    """

    more: Callable[[], str] | None = None

    def format_help(self) -> str:
        """The help, with `more` at its end."""
        return super().format_help() + (f"\n{self.more()}" if self.more is not None else "")

    def error(self, message: str) -> NoReturn:
        """Raise InputError with argparse's message and the way to the help."""
        raise InputError(f"{message}; see {self.prog} --help")


def add_command(commands: argparse._SubParsersAction, name: str, summary: str, example: str) -> Parser:
    """Add one command with its help, its example and the options that every command has.

    Args:
        commands: what `add_subparsers` returned.
        name: the command's word.
        summary: one sentence or two on what it does.
        example: command lines that work as they stand, given the files they name.

    Returns:
        The command's parser, to which its own arguments are added.
    """
    parser = commands.add_parser(
        name,
        help=summary.split(". ")[0].rstrip("."),
        description=summary,
        epilog=f"example:\n{example}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = parser.add_argument_group("options of every command")
    common.add_argument(
        "--progress",
        choices=("auto", "json", "none"),
        default="auto",
        help="auto: a bar where stderr is a terminal; json: lines {stage, percent, eta_s} on stdout",
    )
    common.add_argument("--threads", type=_positive_int, metavar="N", help="processor threads to use (default: all)")
    common.add_argument("-v", "--verbose", action="store_true", help="log what is done, and a traceback where it fails")
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add --device, --model and the bounds of the embedding."""
    group = parser.add_argument_group("model and device")
    group.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:n]", help="where the network runs")
    group.add_argument(
        "--model", metavar="NAME|FILE", help="model of the registry (see: uae models list) or file; default by modality"
    )
    group.add_argument(
        "--memory-mb", type=_positive_int, default=2000, metavar="MB", help="bound on the network's working memory"
    )
    group.add_argument("--no-cache", action="store_true", help="neither read nor write the cache of embeddings")


def add_modality_options(parser: argparse.ArgumentParser, *roles: str) -> None:
    """Add --ROLE-modality for each role (or --modality), and --series for DICOM folders."""
    for role in roles:
        option = f"--{role}-modality" if role else "--modality"
        parser.add_argument(
            option, choices=("auto", "ct", "mr"), default="auto", help="CT or MR (default: decided from the image)"
        )
    parser.add_argument(
        "--series",
        action="append",
        default=[],
        metavar="UID",
        help="which series of a DICOM folder with several (once for each such folder)",
    )


def build_parser() -> Parser:
    """The whole command line."""
    from uae.cli import apply, embed, info, match, models, phantom, register, train, worker

    parser = Parser(
        prog="uae",
        description="Anatomical embedding of CT and MR: landmarks matched by example, and registration that refuses "
        "to guess. Research software, not a medical device.",
        epilog="Each command explains itself: uae COMMAND --help\n\n" + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"uae {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for module in (register, match, apply, embed, train, models, phantom, info, worker):
        module.add_commands(commands)
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments; InputError on a mistake."""
    return build_parser().parse_args(argv)


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return value
