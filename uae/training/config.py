"""Training configurations: TOML files, single values overridden by name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from uae.errors import InputError

CONFIG_FOLDER = Path(__file__).parent / "configs"
TABLES = ("network", "data", "views", "loss", "optimiser")


def _toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


def read_config(path: str | Path, settings: list[str] | None = None) -> dict[str, Any]:
    """Read a training configuration and override single values.

    Args:
        path: a TOML file, or the name of one that ships ("small").
        settings: "table.key=value"; the value is TOML (number, true, [list], "text") or a bare word.

    Raises:
        InputError: the file is missing, is not TOML, or a setting does not exist in it.
    """
    path = Path(path)
    shipped = CONFIG_FOLDER / f"{path.stem}.toml"
    if not path.exists() and shipped.exists():
        path = shipped
    try:
        config = _toml(path.read_text(encoding="utf-8"))
    except OSError as error:
        names = ", ".join(sorted(p.stem for p in CONFIG_FOLDER.glob("*.toml")))
        raise InputError(f"--config {path}: {error.strerror}; give a TOML file or one of: {names}") from error
    except ValueError as error:
        raise InputError(f"--config {path}: not a valid TOML file ({error})") from error
    for setting in settings or []:
        _override(config, setting, path.name)
    check_config(config)
    return config


def _override(config: dict[str, Any], setting: str, name: str) -> None:
    key, separator, text = setting.partition("=")
    *tables, last = key.strip().split(".")
    table: Any = config
    for part in tables:
        table = table.get(part) if isinstance(table, dict) else None
    if not separator or not isinstance(table, dict) or last not in table:
        raise InputError(f"--set {setting}: no such setting; write TABLE.KEY=VALUE with a key of {name}")
    try:
        table[last] = _toml(f"value = {text}")["value"]
    except ValueError:
        table[last] = text.strip()


def check_config(config: dict[str, Any]) -> None:
    """Check that the tables are there and hold what the shipped configuration holds.

    Raises:
        InputError: a table or a key is missing.
    """
    reference = _toml((CONFIG_FOLDER / "small.toml").read_text(encoding="utf-8"))
    for table in TABLES:
        missing = sorted(set(reference[table]) - set(config.get(table, {})) - {"phantom_seeds", "phantom_weight"})
        if missing:
            raise InputError(f"the training configuration lacks {table}.{missing[0]}; start from small.toml")
