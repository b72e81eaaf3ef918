"""Rows of the table: which samples, which model and which training stand behind each."""

from __future__ import annotations

from ladir.config import EvaluateSettings
from ladir.evaluation.voting import RULES
from training.runtime.chain import LANES

#: phases behind a model's row besides the base LM
PHASES = {
    "ar": ("ar",),
    "ar-rl": ("ar", "ar-rl"),
    "ladir": ("vae", "latents", "denoiser"),
    "rollout": ("vae", "latents", "denoiser", "rollout"),
    "rl": ("vae", "latents", "denoiser", "rollout", "rl"),
}

#: of these the phases that train the model itself which answers
TRAINED = ("denoiser", "rollout", "rl", "ar", "ar-rl")

#: rules of choice that go by a verifier's scores
SCORED = ("best", "weighted")


#: samplings of one answer per question, without randomness
GREEDY = ("ar-greedy", "ladir-zero-noise")


#: asks nothing: writes what the lanes have kept
TABLE = "table"


def lane_of(sampling: str) -> str:
    """The lane that asks it."""
    return "ar" if model_of(sampling).startswith("ar") else "ladir"


def is_asked(settings: EvaluateSettings, method: str) -> bool:
    """Whether a row of the table is the present job's to fill."""
    return settings.lane not in LANES or settings.lane == lane_of(sampling_of(method)[0])


def questions_at_a_time(settings: EvaluateSettings, greedy: bool) -> int:
    """Questions of a batch, by whether each gets one answer or many."""
    return settings.greedy_questions_per_batch if greedy else settings.questions_per_batch


def sampling_of(method: str) -> tuple[str, str | None]:
    """The samples behind a row of the table, and the rule by which one of them is elected (None: all are shown)."""
    rule = next((rule for rule in RULES if method.endswith(f"-{rule}")), None)
    return (method.removesuffix(f"-{rule}"), rule) if rule else (method, None)


def model_of(sampling: str) -> str:
    """The model that samples: ``ar``, ``ar-rl``, ``ladir``, ``rollout`` or ``rl``."""
    if sampling.startswith("ar"):
        return "ar-rl" if sampling == "ar-rl" else "ar"
    return sampling.removeprefix("ladir-") if sampling in ("ladir-rollout", "ladir-rl") else "ladir"


def stage_of(model: str) -> str:
    """The phase that trained a model."""
    return PHASES[model][-1]
