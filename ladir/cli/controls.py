"""How a model is asked, as options that the commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ladir.evaluation.choosing import CHOICES

#: options that :meth:`ladir.reasoner.Reasoner.generate` takes under the same names
CONTROLS = (
    "num_steps",
    "lag",
    "sampler",
    "spacing",
    "spacing_power",
    "initial_noise",
    "guidance_scale",
    "guidance_interval",
    "guidance_rescale",
    "diversity_scale",
    "verifier_scale",
    "renoise_time",
    "renoise_steps",
    "restarts",
    "restart_time",
    "restart_steps",
    "restart_keeps_state",
    "reencode",
    "token_head_weight",
    "lm_weight",
    "thought_temperature",
    "max_blocks",
    "max_answer_tokens",
    "answer_temperature",
)
#: tasks by whose measure answers may be the same
TASKS = ("countdown", "maths", "code")


def add_controls(parser: argparse.ArgumentParser) -> None:
    """The options; controls that are not given come from the model folder."""
    parser.add_argument(
        "--choose",
        choices=CHOICES,
        help="give one of the trajectories; majority: of the most frequent answer; best: with the verifier's highest score; "
        "weighted: of the answer with most score in all; stable: whose thoughts move least when noised again; first",
    )
    parser.add_argument(
        "--task", choices=TASKS, help="which answers are the same (--choose): as the task compares them, not as text"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    parser.add_argument("--num-steps", type=int, help="Euler steps per block")
    parser.add_argument("--lag", type=int, help="steps by which a block starts after the one before it, where they form together")
    parser.add_argument("--sampler", choices=("ode", "sde"), help="deterministic, or fresh noise at every step")
    parser.add_argument("--spacing", choices=("uniform", "cosine", "power"), help="times of the steps (cosine: short near noise)")
    parser.add_argument("--spacing-power", type=float, help="exponent of --spacing power; above 1: short near the finished block")
    parser.add_argument("--initial-noise", type=float, help="scale of the noise a block starts from")
    parser.add_argument("--guidance-scale", type=float, help="classifier-free guidance; 1: off")
    parser.add_argument(
        "--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="times (1: noise) between which it guides"
    )
    parser.add_argument("--guidance-rescale", type=float, help="share of the spread without guidance that a guided block keeps")
    parser.add_argument("--diversity-scale", type=float, help="diversity guidance among three or more trajectories; 0: off")
    parser.add_argument("--verifier-scale", type=float, help="draw blocks to where the verifier thinks the answer right; 0: off")
    parser.add_argument("--renoise-time", type=float, help="time to which --choose stable noises finished thoughts again")
    parser.add_argument("--renoise-steps", type=int, help="Euler steps in which it denoises them")
    parser.add_argument("--restarts", type=int, help="times that a finished block is noised again and denoised anew")
    parser.add_argument("--restart-time", type=float, help="time back to which a restart goes; 1: nothing is left of the block")
    parser.add_argument("--restart-steps", type=int, help="Euler steps of a restart")
    parser.add_argument(
        "--restart-keeps-state", action=argparse.BooleanOptionalAction, default=None, help="restarts go on with the carried state"
    )
    parser.add_argument(
        "--reencode", action=argparse.BooleanOptionalAction, default=None, help="encode every block's text again before the next"
    )
    parser.add_argument(
        "--token-head-weight", type=float, help="say of the denoiser's token head in that reading; 0: the VAE's decoder alone"
    )
    parser.add_argument("--lm-weight", type=float, help="say of what the LM expects to be written next in that reading; 0: none")
    parser.add_argument("--thought-temperature", type=float, help="temperature of that reading's tokens; 0: the likeliest")
    parser.add_argument("--max-blocks", type=int, help="blocks after which the answer is forced")
    parser.add_argument("--max-answer-tokens", type=int, help="longest answer, in tokens")
    parser.add_argument("--answer-temperature", type=float, help="temperature of the answer's tokens; 0: greedy")


def controls_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The controls by the names that :meth:`ladir.reasoner.Reasoner.generate` has for them; None where one was not given."""
    return {name: getattr(arguments, name) for name in CONTROLS}


def canonical_of(arguments: argparse.Namespace) -> Callable[[str], str]:
    """Which answers are the same."""
    from ladir.reasoner import plain_answer
    from ladir.tasks import get_task

    return get_task(arguments.task).canonical if arguments.task else plain_answer
