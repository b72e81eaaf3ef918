"""Which algorithms a run's reinforcement learning used, each paired with its settings: used, usual, and where a value is from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ladir.config import Config
from ladir.config.checks import values
from ladir.report.tables import Grid

#: settings of every algorithm, and where their usual values are from
_ASKING = {
    "rl.reward": "the task's checker, or a function of the user's",
    "rl.checker_weight": "own",
    "rl.format_weight": "own",
    "rl.length_weight": "own",
    "rl.unstopped_weight": "own",
    "rl.prompts": "DiffusionNFT: 48",
    "rl.group": "own; DiffusionNFT and Flow-GRPO: 24",
    "rl.answers": "own",
    "rl.updates": "DiffusionNFT: 2",
    "rl.old_decay": "own; DiffusionNFT: an average that follows more slowly as training goes on",
    "rl.train.lr": "stage 1's",
}
_SAMPLING = {
    "sample.num_steps": "Flow-GRPO: 10 while training",
    "sample.initial_noise": "own; LaDiR: 2",
    "sample.guidance_scale": "own; LaDiR: 4",
}
_NFT = {"rl.beta": "DiffusionNFT: 1", "rl.advantage_clip": "DiffusionNFT's code: 5"}
_STEPS = {
    "rl.random_steps": "MixGRPO (arXiv:2507.21802): few of a sample's steps are enough",
    "rl.step_randomness": "own, marginals stay exact; Flow-GRPO: 0.7 sqrt(t / (1 - t))",
    "rl.step_clip": "Flow-GRPO: 1e-4",
    "rl.kl_weight": "own, for the anchor holds the model; Flow-GRPO: .01 to .04",
    "rl.advantage_clip": "DiffusionNFT's code: 5",
}
_TOKENS = {"rl.token_clip": "PPO (arXiv:1707.06347): 0.2"}
_ANCHOR = {"rl.anchor_weight": "own", "rl.train.global_batch": "stage 1's"}


@dataclass(frozen=True)
class Algorithm:
    """What learns and how, and the settings that say so, each with where its usual value is from."""

    title: str
    settings: Mapping[str, str]


def algorithms(config: Mapping[str, Any]) -> Iterator[Algorithm]:
    """Those of a run's settings, as its ``config-rl.yaml`` or ``config-ar-rl.yaml`` has them."""
    rl = config.get("rl", {})
    policy, text = rl.get("policy"), rl.get("policy") == "text"
    yield Algorithm("questions, rewards and steps", _ASKING if text else {**_ASKING, **_SAMPLING})
    if policy in ("latents", "both"):
        by_steps = rl.get("algorithm") == "flow_grpo"
        yield (
            Algorithm("thoughts: Flow-GRPO (arXiv:2505.05470)", _STEPS)
            if by_steps
            else Algorithm("thoughts: DiffusionNFT (arXiv:2509.16117)", _NFT)
        )
    if policy in ("answer", "both", "text"):
        heat = {"evaluate.ar_temperature": "LaDiR's answers: 0.7"} if text else {"sample.answer_temperature": "LaDiR: 0.7"}
        what = "completions" if text else "answers"
        yield Algorithm(f"{what}: a clipped ratio of tokens, relative to the group (arXiv:2402.03300)", {**_TOKENS, **heat})
    yield Algorithm("anchor: the losses of supervised training, on gold records", _ANCHOR)


def settings_grid(title: str, config: Mapping[str, Any]) -> Grid:
    """A row for every setting of every algorithm: used here, the default, and where that is from; "–": the run is older."""
    usual = dict(values(Config()))
    rows = [
        (algorithm.title, name, _shown(_used(config, name)), _shown(usual[name]), source)
        for algorithm in algorithms(config)
        for name, source in algorithm.settings.items()
    ]
    return Grid(title, ("algorithm", "setting", "used", "default", "where the default is from"), rows)


def _used(config: Mapping[str, Any], name: str) -> Any:
    found: Any = config
    for part in name.split("."):
        found = found.get(part, "–") if isinstance(found, Mapping) else "–"
    return found


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
