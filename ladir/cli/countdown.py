"""python -m ladir countdown: write Countdown puzzles as JSONL, and a tokenizer for them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ladir.arguments import LineParser
from ladir.config.loader import load_config
from ladir.tasks import countdown


def run(argv: Sequence[str]) -> int:
    """Generate the puzzles that ``countdown.*`` and ``run.seed`` describe into ``--out``."""
    parser = LineParser(prog="python -m ladir countdown", description=__doc__)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--config", metavar="FILE", help="settings as YAML (see configs/)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="e.g. countdown.numbers=4")
    arguments = parser.parse_intermixed_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    for name, lines in countdown.write(config.countdown, config.run.seed, arguments.out).items():
        sys.stdout.write(f"{arguments.out}/{name}: {lines} lines\n")
    sys.stdout.write(f"{arguments.out}/tokenizer: {len(countdown.vocabulary(config.countdown)) + 3} tokens\n")
    return 0
