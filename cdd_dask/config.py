"""Config files: the options of the verbs, in YAML, under their API names."""

from __future__ import annotations

import reprlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from cdd_dask.errors import InputError

PER_AXIS = ("block", "axes", "spacing")
"""Options that may be lists."""
DEEPEST = 2
"""A mapping of options, and a list in it."""


def load_config(path: str | Path, known: Collection[str]) -> dict[str, Any]:
    """The options in a config file.

    Parameters
    ----------
    path
        A YAML file that maps option names (``max_scale``) to values; ``null`` is the default.
    known
        Names that mean something.

    Raises
    ------
    InputError
        If the file cannot be read, is no such mapping, or names an unknown option.
    """
    import yaml

    try:
        text = Path(path).read_text()
        _check_plain(text)
        options = yaml.safe_load(text)
    except Exception as error:  # odd tags make YAML fail in any way
        raise InputError(f"config {path} cannot be read: {error}") from error
    if options is None:
        return {}
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        raise InputError(f"config {path} must map option names to values, for example max_scale: 8")
    names = {key: key.replace("-", "_") for key in options}
    unknown = [key for key, name in names.items() if name not in known]
    if unknown:
        raise InputError(
            f"config {path} has the unknown option {reprlib.repr(unknown[0])}: choose from "
            f"{', '.join(sorted(known))}"
        )
    for key, value in options.items():
        sides = value if isinstance(value, list) and names[key] in PER_AXIS else [value]
        if not all(side is None or isinstance(side, str | bool | int | float) for side in sides):
            raise InputError(
                f"config {path}: {key}={reprlib.repr(value)} is no value of that option"
            )
    # as the command line would have them, which checks and converts both alike
    return {
        names[key]: ",".join(map(str, value)) if isinstance(value, list) else str(value)
        for key, value in options.items()
        if value is not None
    }


def _check_plain(text: str) -> None:
    """Refuse what no option needs, and with which a few lines can take all memory there is."""
    import yaml

    depth = 0
    for event in yaml.parse(text):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST or isinstance(event, yaml.AliasEvent):
            raise ValueError("options are numbers, texts or lists of them, without aliases (*name)")
    root = yaml.compose(text, yaml.SafeLoader)
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    keys = [str(key.value).replace("-", "_") for key, _ in pairs]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f"{min(twice)} stands there twice")
