"""What a run knows of its model, for the model card of its export."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ladir.config import Config
from ladir.evaluation.report import remarks
from ladir.evaluation.suite import suite_markdown
from ladir.models.card import CardFacts, write_card
from ladir.models.folders import denoiser_stage
from ladir.report.tables import markdown_table
from training.runtime.run import RunFolder

#: what a reader asks first, beside what the export says itself
_TOLD = ("data.sentences_per_block", "vae.beta", "vae.latent_noise", "vae.token_substitution", "vae.decoder", "run.seed")


def card_facts(config: Config, folder: RunFolder, results: str = "") -> CardFacts:
    """Base, data, settings and trainings of a run; ``results``: as the card shows them."""
    splits = {split: getattr(config.data, split) for split in ("train", "validation", "test")}
    sections = dataclasses.asdict(config)
    told = {name: sections[name.partition(".")[0]][name.partition(".")[2]] for name in _TOLD}
    if config.backbone.lora.rank:
        told["backbone.lora.rank"] = config.backbone.lora.rank
    return CardFacts(
        name=config.run.name,
        base=config.backbone.name_or_path,
        data={split: name for split, name in splits.items() if name},
        settings=told,
        training=_trainings(config, folder),
        results=results,
        license=config.export.license,
    )


def write_results_card(config: Config, folder: RunFolder, results: dict[str, Any]) -> None:
    """Put the results of an evaluation (its results.json) into the card of the run's export, where there is one."""
    if folder.export.is_dir():
        write_card(folder.export, card_facts(config, folder, _results(folder, results)))


def write_suite_card(config: Config, folder: RunFolder, suite: dict[str, Any], results: Mapping[str, dict[str, Any]]) -> None:
    """The same with those of a suite (its suite.json), and of every benchmark (its results.json) by name."""
    if folder.export.is_dir():
        write_card(folder.export, card_facts(config, folder, _suite(folder, suite, results)))


def _trainings(config: Config, folder: RunFolder) -> dict[str, str]:
    """Steps, batch and time of every phase that is finished."""
    names = {"vae": "VAE", "denoiser": "denoiser, stage 1", "rollout": "denoiser, stage 2", "rl": "denoiser, stage 3"}
    outcomes = {phase: folder.outcome(phase) for phase in names}
    return {
        names[phase]: f"{outcome.steps} steps of {getattr(config, phase).train.global_batch} samples, {outcome.seconds:.0f} s"
        for phase, outcome in outcomes.items()
        if outcome is not None
    }


def _results(folder: RunFolder, results: dict[str, Any]) -> str:
    """The table of an evaluation, which of its rows the export is, and what the figures leave unsaid."""
    asked = f"{results['num_questions']} {results['split']} questions, {results['num_trajectories']} trajectories each"
    told = f"Task {results['task']}: {asked}, seed {results['seed']}; ± standard error by question."
    return "\n\n".join([told, *_own_row(folder), markdown_table(results["rows"]), *remarks(results)])


def _suite(folder: RunFolder, suite: dict[str, Any], results: Mapping[str, dict[str, Any]]) -> str:
    """The table of a suite, and what the figures of its benchmarks leave unsaid."""
    told = f"Percent, seed {suite['seed']}; ± standard error by question; in the average every benchmark counts the same."
    unsaid = [f"- {name}: {remark}" for name, content in results.items() for remark in remarks(content)]
    return "\n\n".join([told, *_own_row(folder), "\n".join([suite_markdown(suite).rstrip(), *unsaid])])


def _own_row(folder: RunFolder) -> list[str]:
    """Which of the rows the export is, where that is not plain."""
    stage = denoiser_stage(folder.export)
    return [] if stage == "denoiser" else [f"This model is the row `ladir-{stage}`; `ladir` is the one before its later stages."]
