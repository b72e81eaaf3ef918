"""Settings that were changed and do nothing, because another one that they belong to is off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase

from ladir.config import Config
from ladir.config.checks import CHECKED_REWARDS, reads_blocks, values

#: policies of stage 3 that learn tokens alone
_TOKENS = ("answer", "text")
#: a setting (pattern), what it needs, and whether it has that; the first pattern that matches counts
_NEEDS: tuple[tuple[str, str, Callable[[Config], bool]], ...] = (
    ("denoiser.carry_*", "denoiser.carry=hidden", lambda c: c.denoiser.carry != "none"),
    ("rollout.carry_gradient", "denoiser.carry=hidden", lambda c: c.denoiser.carry != "none"),
    ("sample.restart_keeps_state", "denoiser.carry=hidden", lambda c: c.denoiser.carry != "none"),
    ("sample.restart_*", "sample.restarts above 0", lambda c: c.sample.restarts > 0),
    ("sample.token_head_weight", "sample.reencode=true or denoiser.context=text", lambda c: bool(reads_blocks(c))),
    ("sample.thought_temperature", "sample.reencode=true or denoiser.context=text", lambda c: bool(reads_blocks(c))),
    ("sample.spacing_power", "sample.spacing=power", lambda c: c.sample.spacing == "power"),
    ("sample.lag", "denoiser.span above 1", lambda c: c.denoiser.span > 1),
    ("rollout.lag", "denoiser.span above 1", lambda c: c.denoiser.span > 1),
    ("rollout.candidates", "rollout.gold=nearest", lambda c: c.rollout.gold == "nearest"),
    ("denoiser.independent_levels", "denoiser.span above 1", lambda c: c.denoiser.span > 1),
    ("denoiser.timestep_mean", "denoiser.timesteps=logit_normal", lambda c: c.denoiser.timesteps == "logit_normal"),
    ("denoiser.timestep_std", "denoiser.timesteps=logit_normal", lambda c: c.denoiser.timesteps == "logit_normal"),
    ("denoiser.token_*", "denoiser.token_weight above 0", lambda c: c.denoiser.token_weight > 0),
    ("vae.grounded_*", "vae.objective=grounded", lambda c: c.vae.objective == "grounded"),
    ("latents.probe_steps", "latents.report_sentences above 0", lambda c: c.latents.report_sentences > 0),
    ("sample.guidance_interval", "sample.guidance_scale other than 1", lambda c: c.sample.guidance_scale != 1),
    ("sample.guidance_rescale", "sample.guidance_scale other than 1", lambda c: c.sample.guidance_scale != 1),
    ("rl.checker_weight", "a function of your own in rl.reward", lambda c: c.rl.reward not in CHECKED_REWARDS),
    ("rl.token_clip", "rl.policy=answer, both or text", lambda c: c.rl.policy != "latents"),
    ("rl.beta", "rl.algorithm=nft and thoughts in rl.policy", lambda c: c.rl.algorithm == "nft" and c.rl.policy not in _TOKENS),
    ("rl.random_steps", "rl.algorithm=flow_grpo", lambda c: c.rl.algorithm == "flow_grpo"),
    ("rl.kl_weight", "rl.algorithm=flow_grpo", lambda c: c.rl.algorithm == "flow_grpo"),
    ("rl.step_*", "rl.algorithm=flow_grpo", lambda c: c.rl.algorithm == "flow_grpo"),
    ("rl.advantage_clip", "rl.policy=latents or both", lambda c: c.rl.policy not in _TOKENS),
    ("rl.train.global_batch", "rl.anchor_weight above 0", lambda c: c.rl.anchor_weight > 0),
    ("evaluate.ar_top_p", "evaluate.ar_temperature above 0", lambda c: c.evaluate.ar_temperature > 0),
)


def idle_settings(config: Config) -> Iterator[str]:
    """A sentence for every setting that is not at its default and has no effect, with what would give it one."""
    usual = dict(values(Config()))
    for name, value in values(config):
        need, met = next(((need, met) for pattern, need, met in _NEEDS if fnmatchcase(name, pattern)), ("", None))
        if met is not None and value != usual[name] and not met(config):
            yield f"{name}={value} has no effect; it needs {need}"
