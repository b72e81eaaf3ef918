"""python -m ladir gym SET: write records of a set of reasoning-gym as JSONL, and a tokenizer for them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from ladir.arguments import LineParser
from ladir.config import GymSettings
from ladir.config.loader import load_config
from ladir.tasks import gym


def run(argv: Sequence[str]) -> int:
    """Generate the records that ``gym.*`` and ``run.seed`` describe into ``--out``."""
    parser = LineParser(prog="python -m ladir gym", description=__doc__)
    parser.add_argument("words", nargs="*", default=[], metavar="SET", help="e.g. gsm_symbolic; section.key=value may follow")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--config", metavar="FILE", help="settings as YAML (see configs/)")
    parser.add_argument("--seed", dest="run.seed", metavar="N", help="run.seed")
    settings = {field.name: field for field in dataclasses.fields(GymSettings) if field.name != "dataset"}
    for name, field in settings.items():
        nargs = "+" if name == "templates" else None
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, dest=f"gym.{name}", nargs=nargs, metavar="N", help=f"gym.{name}: {field.metadata['help']}")
    arguments = parser.parse_intermixed_args(argv)
    given = {name: value for name, value in vars(arguments).items() if "." in name and value is not None}
    overrides = [f"{name}={_written(value)}" for name, value in given.items()]
    named = [f"gym.dataset={word}" if "=" not in word else word for word in arguments.words]
    config = load_config(arguments.config, [*named, *overrides])
    for file, lines in gym.write(config.gym, config.run.seed, arguments.out).items():
        sys.stdout.write(f"{arguments.out}/{file}: {lines} {'tokens' if file == gym.TOKENIZER else 'lines'}\n")
    return 0


def _written(value: str | list[str]) -> str:
    """An option's value as an override has it."""
    return value if isinstance(value, str) else f"[{','.join(value)}]"
