"""Training configurations: TOML files, single values overridden by name."""

from __future__ import annotations

import copy
import functools
import sys
from pathlib import Path
from typing import Any

from uae.errors import InputError
from uae.training.setting_values import check_values
from uae.training.settings import SETTINGS

CONFIG_FOLDER = Path(__file__).parent / "configs"
SHIPPED = ("small", "paper", "released")
HOW_BY_BRANCH = (
    'the training configuration: write [branch.semantic] and below it "table.key" = value, with the quotes'
)
TABLES = tuple(dict.fromkeys(name.split(".")[0] for name in SETTINGS))
TOP = ("device", "threads")
BRANCH = "branch"
"""Table of settings by branch: [branch.semantic] "views.rotation_deg" = 0.0."""
BRANCHES = ("appearance", "semantic", "crossmodal")


def _toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


@functools.cache
def shipped(name: str) -> dict[str, Any]:
    """A configuration that ships, by name; not to be changed."""
    return _toml((CONFIG_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))


def read_config(path: str | Path, settings: list[str] | None = None, branch: str = "appearance") -> dict[str, Any]:
    """Read a training configuration and override single values.

    Args:
        path: a TOML file, or the name of one that ships ("small", "paper", "released").
        settings: "table.key=value"; the value is TOML (number, true, [list], "text") or a bare word.
        branch: what the recipe holds for this branch alone takes the place of what it holds for all.

    Raises:
        InputError: the file is missing, is not TOML, or a setting does not exist.
    """
    path = Path(path)
    by_name = CONFIG_FOLDER / f"{path.stem}.toml"
    if not path.exists() and by_name.exists():
        path = by_name
    try:
        config = _toml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"--config {path}: {error.strerror}; give a TOML file or one of: {', '.join(SHIPPED)}"
        ) from error
    except ValueError as error:
        raise InputError(f"--config {path}: not a valid TOML file ({error})") from error
    config = complete(config, branch)
    for setting in settings or []:
        _override(config, setting)
    check_values(config)
    return config


def setting_names(settings: list[str] | None) -> frozenset[str]:
    """Names of the settings in a list of "name=value"."""
    return frozenset(setting.partition("=")[0].strip() for setting in settings or [])


def _override(config: dict[str, Any], setting: str) -> None:
    key, separator, text = setting.partition("=")
    key = key.strip()
    if not separator or key not in SETTINGS:
        raise InputError(f"--set {setting}: no such setting; write TABLE.KEY=VALUE, see uae train --help")
    try:
        value = _toml(f"value = {text}")["value"]
    except ValueError:
        value = text.strip()
    _put(config, key, value)


def _put(config: dict[str, Any], key: str, value: Any) -> None:
    table, name = key.split(".")
    _check_kind(key, value)
    config[table][name] = _as_meant(key, value)


def _as_meant(key: str, value: Any) -> Any:
    """2e4 is the number 20000 where a whole number is meant."""
    table, name = key.split(".")
    whole = isinstance(shipped("small")[table][name], int) and isinstance(value, float) and value.is_integer()
    return int(value) if whole else value


def _of_branch(tables: Any, branch: str) -> dict[str, Any]:
    """Settings {full name: value} of a branch; all branches' names are checked."""
    if not isinstance(tables, dict) or not all(isinstance(own, dict) for own in tables.values()):
        raise InputError(HOW_BY_BRANCH)
    wrong = [name for name in tables if name not in BRANCHES]
    if wrong:
        raise InputError(f"the training configuration: no branch {wrong[0]!r}; choose from {', '.join(BRANCHES)}")
    unknown = [key for own in tables.values() for key in own if key not in SETTINGS]
    if unknown and unknown[0] in TABLES:
        raise InputError(HOW_BY_BRANCH)
    if unknown:
        raise InputError(f"the training configuration holds the unknown setting {unknown[0]}; see uae train --help")
    return tables.get(branch, {})


def _check_kind(key: str, value: Any) -> None:
    """Refuse a text where a number is meant and the like: the mistake would show up hours later."""
    table, name = key.split(".")
    expected = shipped("small")[table][name]
    numbers = (int, float)
    fits = isinstance(value, type(expected)) or (
        isinstance(value, numbers) and isinstance(expected, numbers) and not isinstance(expected, bool)
    )
    if not fits or isinstance(value, bool) != isinstance(expected, bool):
        raise InputError(f"{key} = {value!r}: a {type(expected).__name__} is needed, such as {expected!r}")


def complete(config: dict[str, Any], branch: str = "appearance") -> dict[str, Any]:
    """A configuration with every setting; what it leaves out is taken from small.toml.

    What its table [branch.<branch>] holds takes the place of what it holds for all branches.

    Raises:
        InputError: a setting is unknown, of another kind or has a value that means nothing.
    """
    result = copy.deepcopy(shipped("small"))
    for table, values in config.items():
        if table == BRANCH:
            continue
        if table in TOP:
            result[table] = values
            continue
        if not isinstance(values, dict):
            raise InputError(f"the training configuration holds the unknown setting {table}; see uae train --help")
        for name, value in values.items():
            key = f"{table}.{name}"
            if key not in SETTINGS:
                raise InputError(f"the training configuration holds the unknown setting {key}; see uae train --help")
            _check_kind(key, value)
            result[table][name] = _as_meant(key, value)
    for key, value in _of_branch(config.get(BRANCH, {}), branch).items():
        _put(result, key, value)
    check_values(result)
    return result


def explain() -> str:
    """Every setting with its value in the configurations that ship and its meaning and source, for --help."""
    configs = {name: shipped(name) for name in SHIPPED}
    lines = [f"settings (for --set; values of {' | '.join(SHIPPED)}):"]
    for key, text in SETTINGS.items():
        table, name = key.split(".")
        values = [_shown(config[table][name]) for config in configs.values()]
        value = values[0] if len(set(values)) == 1 else " | ".join(values)
        lines += [f"  {key} = {value}", f"      {text}"]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, list) and len(value) > 4:
        return f"{len(value)} entries"
    return str(value).lower() if isinstance(value, bool) else repr(value)
