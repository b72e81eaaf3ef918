"""What belongs together: a denoiser, the VAE whose latents it was trained on, the tokenizer, the LM under its adapters."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, PreTrainedTokenizerBase

from ladir.errors import UnusableError
from ladir.models.weights import ADAPTER_CONFIG_NAME, sampled_fingerprint, weight_files
from ladir.tokens import check_vocabulary, tokenizer_fingerprint

logger = logging.getLogger(__name__)

_BASE_KEY = "base_model_name_or_path"


@dataclass(frozen=True)
class TrainedOn:
    """What a denoiser was trained on, kept in its ``ladir.json``; None: not known (an older model, or one made by hand).

    ``vae``, ``tokenizer``: fingerprints; ``base``: that of the folder of the LM under its adapters; ``longest_question``: tokens
    of the longest question; ``frame``: what stood around every one (:meth:`ladir.data.prompts.Frame.to_save`), None: <bos>.
    """

    vae: str | None = None
    tokenizer: str | None = None
    base: str | None = None
    longest_question: int | None = None
    frame: dict[str, Any] | None = None

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> TrainedOn:
        """Out of the settings of a model folder; what a later version adds is not missed."""
        known = saved.get("trained_on") or {}
        return cls(**{name: known[name] for name in asdict(cls()) if name in known})


def check_vae(trained: TrainedOn, vae: str | None, denoiser: Path, folder: Path) -> None:
    """UnusableError where the denoiser was trained on latents of another VAE than the one with fingerprint ``vae``.

    Warns where either is not known.
    """
    if trained.vae is None or vae is None:
        logger.warning(
            "%s does not say on which VAE's latents its denoiser was trained (an older version wrote it): that %s is the one is "
            "not checked",
            denoiser if trained.vae is None else folder,
            folder,
        )
    elif trained.vae != vae:
        raise UnusableError(
            f"{denoiser} was trained on the latents of another VAE ({trained.vae}) than {folder} ({vae}), which would read its "
            "thoughts wrongly: give back that VAE, or run training/encode_latents.py and train the denoiser anew"
        )


def check_tokenizer(trained: TrainedOn, tokenizer: PreTrainedTokenizerBase, lm: str | Path, where: str | Path) -> None:
    """UnusableError where the tokenizer numbers tokens otherwise than in training, or has more than ``lm`` has embeddings."""
    if trained.tokenizer is not None and trained.tokenizer != tokenizer_fingerprint(tokenizer):
        raise UnusableError(
            f"{where}: the model was trained with another tokenizer than this, whose numbers stand for other tokens; give "
            "that one back"
        )
    try:
        embeddings = int(AutoConfig.from_pretrained(str(lm)).get_text_config().vocab_size)
    except (OSError, ValueError):
        return  # loading it says what is wrong
    check_vocabulary(tokenizer, embeddings, str(where), padding=False)


def base_fingerprint(name: str | None) -> str | None:
    """What tells the LM in a local folder from another; None for an id of the Hub, which is as good as its name.

    UnusableError for weights that are not whole.
    """
    if name is None or not Path(name).is_dir() or not weight_files(Path(name)):
        return None
    return sampled_fingerprint(Path(name))


def noted_fingerprint(name: str | None) -> str | None:
    """The same, to be kept with a model that was trained on it: None, too, where it cannot be read by now."""
    try:
        return base_fingerprint(name)
    except (OSError, UnusableError):
        return None


def adapter_base(folder: str | Path) -> str | None:
    """The LM that the adapters in ``folder`` stand on, as they name it; None where it has none.

    UnusableError for a file that cannot be read.
    """
    path = Path(folder) / ADAPTER_CONFIG_NAME
    if not path.is_file():
        return None
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))[_BASE_KEY])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnusableError(f"{path} cannot be read ({error}); copy it again, or train or export it anew") from error


def name_base(export: Path, final: Path, copied: Path | None = None) -> str | None:
    """Write into the adapters of an ``export``, which will lie at ``final``, where the LM under them lies: by its full path.

    Returns the same as it is seen from the export, for our own settings, so that both may move together; None where there is
    none or it is one of the Hub, which keeps its name.  ``copied``: a copy inside the export, to be named instead.
    """
    place = None
    for path in export.rglob(ADAPTER_CONFIG_NAME):
        named = adapter_base(path.parent)
        if copied is not None or (named is not None and Path(named).is_dir()):
            place = os.path.relpath(copied, export) if copied else os.path.relpath(Path(str(named)).resolve(), final)
            settings = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps({**settings, _BASE_KEY: os.path.normpath(final / place)}, indent=2), encoding="utf-8")
    return place


def find_base(
    folder: Path, named: str, place: str | None = None, expected: str | None = None, given: str | Path | None = None
) -> str:
    """The folder or Hub id of the LM that the model in ``folder`` stands on: under its adapters, or as its frozen decoder.

    That is ``given``, else what lies where the export says (``place``), else what it was ``named`` in training.  UnusableError,
    with the remedy, where it is not there, or another LM lies there than the one with the fingerprint ``expected``.
    """
    if given is not None and not Path(given).is_dir():
        raise UnusableError(f"base {given}: no such folder; name the one that holds the LM under the adapters of {folder}")
    beside = folder / place if place else None
    if given is None and beside is not None and beside.is_dir():
        given = beside.resolve()
    found = str(given or named)
    if not Path(found).is_dir() and not is_hub_id(found):
        looked = f"{beside} and {found}" if beside else found
        raise UnusableError(
            f"{folder} stands on another LM, which is not where it was ({looked}): give it back, or, asking, name the folder "
            "where it lies now with --base DIR (base=DIR in Python)"
        )
    if expected is not None and base_fingerprint(found) not in (None, expected):
        raise UnusableError(
            f"{folder}: the LM in {found} is not the one that it was trained on: give that one back, or, asking, name its folder "
            "with --base DIR (base=DIR in Python)"
        )
    return found


def is_hub_id(name: str) -> bool:
    """Whether this may be an id of the Hub (``owner/name``), and is not merely a path."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
