"""Which process of how many this one is, as any launcher says: each takes its share of what there is to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ladir.errors import UnusableError

#: names by launcher: torchrun and deepspeed; srun, whose batch step alone has no step id
_NAMES = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))


@dataclass(frozen=True)
class Process:
    """Process ``number`` of ``count``; ``local``: its number on its machine."""

    number: int = 0
    count: int = 1
    local: int = 0

    def share(self, items: int) -> range:
        """The places of its share of that many items."""
        return range(self.number, items, self.count)


def this_process(environment: Mapping[str, str]) -> Process:
    """This process; one alone where no launcher started it.  UnusableError for numbers that cannot be."""
    names = _NAMES[0] if "RANK" in environment else _NAMES[1]
    if names[0] not in environment or (names is _NAMES[1] and "SLURM_STEP_ID" not in environment):
        return Process()
    try:
        found = Process(*(int(environment[name]) for name in names))
    except (KeyError, ValueError) as error:
        raise UnusableError(f"{', '.join(names)} must be set to numbers together, as launchers do ({error})") from error
    if not 0 <= found.number < found.count or found.local < 0:
        raise UnusableError(f"{names[0]}={found.number} is not one of {names[1]}={found.count} processes")
    return found
