"""What a phase reads besides its settings, told apart by content: work begun on it is not continued on anything else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ladir.config import Config
from training.runtime.files import sha256

if TYPE_CHECKING:
    from training.runtime.run import RunFolder


def input_digests(config: Config, phase: str, folder: RunFolder) -> dict[str, str]:
    """A hash by name of everything ``phase`` is trained on that is there: files of records, latents, models of this run.

    Data sets and models by other names (on the Hub, in other folders) are as good as their names, which are settings.
    """
    data, base = config.data, folder.model("base")
    reads_base = phase != "base" and config.backbone.name_or_path is not None and Path(config.backbone.name_or_path) == base
    files = {
        "vae": {"data.train": data.train, "data.sentences": data.sentences},
        config.ar.phase: {"data.train": data.train},
    }.get(phase, {})
    found = {
        **{name: _file(Path(path)) for name, path in files.items() if path is not None},
        "models/base": _weights(base) if reads_base and phase in ("vae", "denoiser", config.ar.phase) else None,
        "latents/train": _latents(folder) if phase in ("denoiser", "rollout") else None,
        "models/denoiser": _weights(folder.model("denoiser")) if phase == "rollout" else None,
    }
    return {name: digest for name, digest in found.items() if digest is not None}


def _file(path: Path) -> str | None:
    return sha256(path)[:16] if path.is_file() else None


def _weights(folder: Path) -> str | None:
    files = sorted(folder.rglob("*.safetensors"))
    digests = [[str(file.relative_to(folder)), sha256(file)] for file in files]
    return _short(digests) if files else None


def _latents(folder: RunFolder) -> str | None:
    """Of the VAE and the records that the latents are of: the same, encoded again by other batches, differ by rounding only."""
    stats = folder.latents / "train" / "stats.json"
    if not stats.is_file():
        return None
    sources = json.loads(folder.sources.read_text(encoding="utf-8")) if folder.sources.is_file() else {}
    return _short([json.loads(stats.read_text(encoding="utf-8"))["fingerprint"], sources.get("train")])


def _short(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
