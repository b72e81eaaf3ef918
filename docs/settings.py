"""Write docs/settings.md, every setting with default and meaning, from its declaration: ``python docs/settings.py``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from ladir.config.loader import Setting, declared_settings, show_value

PAGE = Path(__file__).with_suffix(".md")

#: what the paper (arXiv:2510.04573) says for an LM of 8 billion parameters, by setting
PAPER = {
    "data.sentences_per_block": "1",
    "vae.latent_dim": "512",
    "vae.latents_per_block": "4",
    "vae.beta": "1e-5",
    "vae.latent_noise": "3",
    "vae.token_substitution": "0.3",
    "vae.decoder": "frozen",
    "vae.train.lr": "2e-5",
    "vae.train.global_batch": "128",
    "vae.train.max_epochs": "2",
    "denoiser.objective": "velocity",
    "denoiser.timesteps": "uniform",
    "denoiser.flow_weight": "5",
    "denoiser.answer_weight": "1",
    "denoiser.stop_weight": "1",
    "denoiser.condition_dropout": "0.1",
    "denoiser.train.lr": "1e-5",
    "denoiser.train.global_batch": "64",
    "denoiser.train.max_epochs": "20",
    "rollout.num_steps": "about 10",
    "rollout.train.lr": "1e-5",
    "rollout.train.global_batch": "12",
    "rollout.train.max_epochs": "20",
    "sample.num_steps": "5 to 30",
    "sample.initial_noise": "2",
    "sample.guidance_scale": "4",
    "sample.diversity_scale": "0.3 to 0.8",
    "sample.answer_temperature": "0.7",
    "evaluate.num_trajectories": "100",
}

_TRAIN = ".train."
_HEAD = """# Settings

Every setting: `section.key=value` behind a command, or in a YAML file `section:` and below it `key: value`. `null` is "not set".
The last column is the paper's value for an LM of 8 billion parameters, where it states one. A wrong name or value is refused
before anything is loaded. Where to begin: [README.md](../README.md), [training.md](training.md).

*This page is written by `python docs/settings.py` from `ladir/config/`; a test refuses a stale one.*
"""


def page() -> str:
    """The whole page."""
    settings = list(declared_settings())
    training = [entry for entry in settings if _TRAIN in entry.name]
    parts = [_HEAD]
    for section, entries in groupby((entry for entry in settings if _TRAIN not in entry.name), key=_section):
        listed = list(entries)
        parts += [f"## {section or 'Top level'}\n", _table(listed, listed[0].section_help if section else "")]
    phases = ", ".join(dict.fromkeys(f"`{_section(entry)}`" for entry in training))
    shared = f"How long and how a phase is trained; the same settings in each of {phases}.\n"
    parts += ["## Training\n", shared, _training(training)]
    return "\n".join(parts)


def _section(entry: Setting) -> str:
    return entry.name.rpartition(".")[0]


def _table(entries: Iterable[Setting], meaning: str) -> str:
    rows = [_row(entry.name, f"`{show_value(entry.default)}`", entry, PAPER.get(entry.name, "")) for entry in entries]
    words = [f"{_plain(meaning[0].upper() + meaning[1:])}.\n"] if meaning else []
    return "\n".join([*words, *_header(), *rows, ""])


def _training(entries: Iterable[Setting]) -> str:
    """One row for each setting that the phases share, with the defaults that differ."""
    rows = []
    for leaf, same in _by_leaf(entries).items():
        defaults = _by_value((_phase(entry), show_value(entry.default)) for entry in same)
        paper = _by_value((_phase(entry), PAPER[entry.name]) for entry in same if entry.name in PAPER)
        first, *others = defaults
        shown = "; ".join([f"`{first}`", *(f"{', '.join(defaults[value])}: `{value}`" for value in others)])
        stated = "; ".join(f"{', '.join(phases)}: {value}" for value, phases in paper.items())
        rows.append(_row(f"<phase>.train.{leaf}", shown, same[0], stated))
    return "\n".join([*_header(), *rows, ""])


def _by_leaf(entries: Iterable[Setting]) -> dict[str, list[Setting]]:
    found: dict[str, list[Setting]] = {}
    for entry in entries:
        found.setdefault(entry.name.rpartition(".")[2], []).append(entry)
    return found


def _by_value(pairs: Iterator[tuple[str, str]]) -> dict[str, list[str]]:
    """The phases that have each value, the commonest first."""
    found: dict[str, list[str]] = {}
    for phase, value in pairs:
        found.setdefault(value, []).append(phase)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _phase(entry: Setting) -> str:
    return entry.name.partition(_TRAIN)[0]


def _header() -> list[str]:
    return ["| setting | default | meaning | paper |", "|---|---|---|---|"]


def _row(name: str, default: str, entry: Setting, paper: str) -> str:
    meaning = entry.help + (f" (one of {', '.join(f'`{choice}`' for choice in entry.choices)})" if entry.choices else "")
    cells = [f"`{name}`", default, _plain(meaning), paper]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _plain(text: str) -> str:
    """Words in which Markdown finds no tag and no emphasis."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("*", "\\*").replace("\n", " ")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
