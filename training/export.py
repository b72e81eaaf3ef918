"""Assemble runs/<name>/export: a Hugging Face folder that Reasoner.from_pretrained and `python -m ladir` read.

The denoiser is that of the last stage that was trained: 3, 2 or 1, and its verifier goes with it.  Files are copied, no model
is loaded: it runs on any CPU node.  Settings: export.merge_lora, export.copy_base (of models with LoRA adapters).
"""

from __future__ import annotations

if not __package__:  # started as a program
    import preflight  # noqa: F401

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ladir.config import Config
from ladir.models.assembling import assemble_export
from ladir.models.card import CARD_FILE
from ladir.models.folders import vae_folder
from ladir.models.pairing import adapter_base, base_fingerprint
from ladir.models.store import folder_fingerprint
from ladir.models.verifier import belongs_to
from ladir.tokens import load_tokenizer
from training.runtime.cards import card_facts
from training.runtime.distributed import run_as_program
from training.runtime.ending import ask_command, tell_end
from training.runtime.files import read_json, write_json
from training.runtime.job import job
from training.runtime.run import Run, RunFolder, environment
from training.runtime.stages import last_denoiser

logger = logging.getLogger(__name__)


def last_verifier(folder: RunFolder, denoiser: Path) -> Path | None:
    """The run's verifier; None where there is none, or it is one of another denoiser, which is said."""
    found = folder.model("verifier")
    if not found.is_dir():
        return None
    if not belongs_to(found, denoiser):
        logger.warning("%s is left out: it was trained on another denoiser than %s (verifier.stage)", found, denoiser)
        return None
    return found


def parts(config: Config, folder: RunFolder, denoiser: Path) -> dict[str, Any]:
    """What the export is made of."""
    tokenizer = config.backbone.tokenizer or config.backbone.name_or_path
    return {
        "code": environment()["commit"],
        "denoiser": [str(denoiser), folder_fingerprint(denoiser, "denoiser")],
        "verifier": None if (verifier := last_verifier(folder, denoiser)) is None else folder_fingerprint(verifier, "verifier"),
        "vae": folder_fingerprint(vae_folder(denoiser, folder.model("vae"))),
        "base": base_fingerprint(adapter_base(denoiser)),
        "tokenizer": tokenizer,
        "sample": asdict(config.sample),
        "export": asdict(config.export),
    }


def is_current(folder: RunFolder, made_of: dict[str, Any]) -> bool:
    """Whether the export is there, whole and made of just that: a new one would cost an evaluation under way its answers."""
    return read_json(folder.inputs("export")) == {**made_of, "files": _sizes(folder.export)}


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file, by name: what a copy that was cut off has not.  The card gets the results later."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != CARD_FILE)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def export(run: Run) -> None:
    """Write the export, unless it is there as it would be."""
    folder = run.folder
    denoiser = last_denoiser(folder)
    vae = vae_folder(denoiser, folder.model("vae"))
    made_of = parts(run.config, folder, denoiser)
    if not is_current(folder, made_of):
        tokenizer = load_tokenizer(run.config.backbone)
        facts, verifier, config = card_facts(run.config, folder), last_verifier(folder, denoiser), run.config
        assemble_export(denoiser, vae, tokenizer, folder.export, config.sample, config.export, facts, verifier)
        write_json(folder.inputs("export"), {**made_of, "files": _sizes(folder.export)})
    tell_end(run, f"{denoiser} and {vae}; ask it: {ask_command(folder.export)}", folder.export)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    with job(argv, __doc__ or "", lambda config: "export") as run:
        if run.world.is_main:
            export(run)
        run.world.barrier()


if __name__ == "__main__":
    run_as_program(main)
