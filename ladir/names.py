"""Names of models and tokenizers: folders here, or ids of the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from ladir.errors import UnusableError

#: what the Hub takes for an id: a name, or an owner's
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check_name(name: str, what: str, setting: str) -> None:
    """UnusableError for the name of a ``what`` that is no folder here and can be no id of the Hub either."""
    if Path(name).exists() or (HUB_ID.fullmatch(name) and not name.startswith(".")):
        return
    raise UnusableError(
        f"the {what} {name!r}: no such folder (looked in {Path.cwd()}); correct {setting}, or make it first: a phase's model is "
        "written to runs/<name>/models/<phase> when it is finished (training/train_ar.py makes an LM)"
    )
