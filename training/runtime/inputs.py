"""What a phase reads besides its settings, told apart by content: work begun on it is not continued on anything else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ladir.config import Config
from ladir.data.rows import data_files
from ladir.models.store import Digest, weights_fingerprint
from training.runtime.alone import GiveWay
from training.runtime.files import known_sha256, read_json

if TYPE_CHECKING:
    from training.runtime.run import RunFolder


def input_digests(config: Config, phase: str, folder: RunFolder, give_way: GiveWay = lambda: None) -> dict[str, str]:
    """A hash by name of everything ``phase`` is trained on that is there: files of records, latents, models of this run.

    Data sets and models by other names (on the Hub, in other folders) are as good as their names, which are settings.
    ``give_way`` is called between two pieces of a file.
    """
    data, base, name = config.data, folder.model("base"), config.backbone.name_or_path
    reads_base = name is not None and Path(name) == base and phase in {"vae", "denoiser", config.ar.phase} - {"base"}
    files = {
        "vae": {"data.train": data.train, "data.sentences": data.sentences},
        config.ar.phase: {"data.train": data.train},
        "rl": {"rl.questions": config.rl.questions or data.train},
        "ar-rl": {"data.train": data.train, "rl.questions": config.rl.questions},
        "verifier": {"verifier.questions": config.verifier.questions or data.train},
    }.get(phase, {})
    digest = partial(known_sha256, give_way=give_way)
    found = {
        **{name: _files(data_files(named), digest) for name, named in files.items()},
        "models/base": _weights(base, digest) if reads_base else None,
        "latents/train": _latents(folder) if phase in ("denoiser", "rollout", "rl") else None,
        "models/denoiser": _weights(folder.model("denoiser"), digest) if phase in ("rollout", "rl", "verifier") else None,
        "models/ar": _weights(folder.model("ar"), digest) if phase == "ar-rl" else None,
        "models/rl": _weights(folder.model("rl"), digest) if phase == "verifier" else None,
        "models/rollout": _weights(folder.model("rollout"), digest) if phase in ("rl", "verifier") else None,
    }
    return {name: digest for name, digest in found.items() if digest is not None}


def _files(paths: Sequence[str], digest: Digest) -> str | None:
    """Of one file its own, of several those of all; None where none is there."""
    found = [digest(Path(path)) for path in paths if Path(path).is_file()]
    whole = found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()
    return whole[:16] if found else None


def _weights(folder: Path, digest: Digest) -> str | None:
    return weights_fingerprint(folder, digest) if any(folder.rglob("*.safetensors")) else None


def _latents(folder: RunFolder) -> str | None:
    """Of the VAE and the records that the latents are of: the same, encoded again by other batches, differ by rounding only."""
    stats = folder.latents / "train" / "stats.json"
    if not stats.is_file():
        return None
    facts = [read_json(stats)["fingerprint"], read_json(folder.sources).get("train")]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
