"""python -m ladir harness ...: the command line of lm-evaluation-harness, in which the model ladir is known."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def run(argv: Sequence[str]) -> int:
    """What ``lm-eval ARGV...`` does, with LaDiR among its models."""
    from lm_eval.__main__ import cli_evaluate

    import ladir.evaluation.harness  # noqa: F401  # registers the model

    given, sys.argv = sys.argv, ["lm-eval", *argv]  # which is all that its parser reads
    try:
        cli_evaluate()
    finally:
        sys.argv = given
    return 0
