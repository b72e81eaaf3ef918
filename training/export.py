"""Assemble runs/<name>/export: a Hugging Face folder that Reasoner.from_pretrained and `python -m ladir` read.

Files are copied, no model is loaded: it runs on any CPU node.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ladir.models.folders import assemble_export
from ladir.tokens import load_tokenizer
from training.runtime.job import job

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    with job(argv, __doc__ or "", lambda config: "export") as run:
        if run.world.is_main:
            tokenizer = load_tokenizer(run.config.backbone)
            folder = run.folder
            assemble_export(folder.model("denoiser"), folder.model("vae"), tokenizer, folder.export, run.config.sample)
            logger.info('exported to %s; ask it: python -m ladir "question" --model %s', folder.export, folder.export)
        run.world.barrier()


if __name__ == "__main__":
    main()
