"""Names of models and tokenizers: folders here, or ids of the Hub."""

from __future__ import annotations

import difflib
import logging
import re
from pathlib import Path

from ladir.errors import UnusableError

logger = logging.getLogger(__name__)

#: what the Hub takes for an id: a name, or an owner's
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check_name(name: str, what: str, setting: str) -> None:
    """UnusableError for the name of a ``what`` that is no folder here and can be no id of the Hub either.

    Warns of one that may be an id, and stands for a folder beside others of this place.
    """
    path = Path(name)
    if path.exists():
        return
    beside = [entry.name for entry in path.parent.iterdir()] if "/" in name and path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=1)
    meant = f"; did you mean {path.parent / close[0]}?" if close else ""
    if HUB_ID.fullmatch(name) and not name.startswith("."):
        if beside:
            logger.warning("the %s %r is no folder here, and is looked for on the Hub%s", what, name, meant)
        return
    raise UnusableError(
        f"the {what} {name!r}: no such folder (looked in {Path.cwd()}){meant or ';'} correct {setting}, or make it first: a "
        "phase's model is written to runs/<name>/models/<phase> when it is finished (training/train_ar.py makes an LM)"
    )
