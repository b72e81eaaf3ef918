"""python -m ladir ask "question" --model DIR (or without ask): a trained model answers and shows its thoughts."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from ladir.arguments import LineParser
from ladir.report.text import printable
from ladir.tokens import encode_text

if TYPE_CHECKING:
    from ladir.reasoner import Reasoner, TraceHook, Trajectory

#: options that :meth:`ladir.reasoner.Reasoner.generate` takes under the same names
_CONTROLS = (
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
    "restarts",
    "restart_time",
    "restart_steps",
    "restart_keeps_state",
    "reencode",
    "max_blocks",
    "max_answer_tokens",
    "answer_temperature",
)


def build_parser() -> argparse.ArgumentParser:
    """The command line's options; controls that are not given come from the model folder."""
    parser = LineParser(prog="python -m ladir ask", description=__doc__)
    parser.add_argument("question", nargs="+", help="one or more questions")
    parser.add_argument("--model", required=True, metavar="DIR", help="a folder written by training/export.py")
    parser.add_argument("--base", metavar="DIR", help="the LM under the model's LoRA adapters, where it has moved")
    parser.add_argument("--trace", action="store_true", help="show each block becoming text, step by step")
    parser.add_argument("--trajectories", type=int, default=1, metavar="N", help="answers per question")
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
    parser.add_argument("--restarts", type=int, help="times that a finished block is noised again and denoised anew")
    parser.add_argument("--restart-time", type=float, help="time back to which a restart goes; 1: nothing is left of the block")
    parser.add_argument("--restart-steps", type=int, help="Euler steps of a restart")
    parser.add_argument(
        "--restart-keeps-state", action=argparse.BooleanOptionalAction, default=None, help="restarts go on with the carried state"
    )
    parser.add_argument(
        "--reencode", action=argparse.BooleanOptionalAction, default=None, help="encode every block's text again before the next"
    )
    parser.add_argument("--max-blocks", type=int, help="blocks after which the answer is forced")
    parser.add_argument("--max-answer-tokens", type=int, help="longest answer, in tokens")
    parser.add_argument("--answer-temperature", type=float, help="temperature of the answer's tokens; 0: greedy")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; not set: CUDA where there is one")
    return parser


def run(argv: Sequence[str]) -> int:
    """Answer the questions on the command line."""
    arguments = build_parser().parse_args(argv)
    from transformers.utils.logging import disable_progress_bar

    from ladir.reasoner import Reasoner, check_questions

    disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # of libraries about one another: nothing a user could act on
    logging.basicConfig(level=logging.WARNING, format="ladir: %(message)s", stream=sys.stderr)
    if arguments.trajectories < 1:
        raise ValueError(f"--trajectories {arguments.trajectories}: must be at least 1")
    check_questions(arguments.question)
    reasoner = Reasoner.from_pretrained(arguments.model, device=arguments.device, base=arguments.base)
    _warn_of_unknown_words(reasoner, arguments.question)
    with _shown_live(arguments, reasoner) if arguments.trace else nullcontext() as on_step:
        answers = _generate(reasoner, arguments, on_step)
    for question, trajectories in zip(arguments.question, answers, strict=True):
        sys.stdout.write(f"question: {printable(question)}\n")
        for number, trajectory in enumerate(trajectories, start=1):
            sys.stdout.write(f"trajectory {number}:\n{render(trajectory)}")
    return 0


def _generate(reasoner: Reasoner, arguments: argparse.Namespace, on_step: TraceHook | None) -> list[list[Trajectory]]:
    controls = {name: getattr(arguments, name) for name in _CONTROLS}
    return reasoner.generate(
        arguments.question,
        num_trajectories=arguments.trajectories,
        seed=arguments.seed,
        on_step=on_step,
        batch_size="auto",
        **controls,
    )


@contextmanager
def _shown_live(arguments: argparse.Namespace, reasoner: Reasoner) -> Iterator[TraceHook]:
    """A hook that shows every trajectory's block as it forms, on a terminal; all steps are written at the end in any case."""
    if not sys.stderr.isatty():
        yield lambda trajectory, block, step, text: None
        return
    from ladir.cli.live import LiveTrace
    from ladir.inference.sampler import steps_per_block

    names = [f"{number}" for _ in arguments.question for number in range(1, arguments.trajectories + 1)]
    settings = reasoner.settings_with(**{name: getattr(arguments, name) for name in _CONTROLS})
    with LiveTrace(names, steps_per_block(settings)) as live:
        yield live.step


def _warn_of_unknown_words(reasoner: Reasoner, questions: Sequence[str]) -> None:
    unknown = reasoner.tokenizer.unk_token_id
    for question in questions:
        if unknown is not None and unknown in encode_text(reasoner.tokenizer, question):
            sys.stderr.write(f"ladir: the model's tokenizer does not know all of {question!r}; the answer may suffer\n")


def render(trajectory: Trajectory) -> str:
    """A trajectory as text: its thoughts (each with its steps, if traced) and its answer."""
    lines = []
    for number, thought in enumerate(trajectory.thoughts, start=1):
        steps = trajectory.trace[number - 1] if number <= len(trajectory.trace) else []
        lines += [f"  block {number}, step {step:>2}: {_one_line(text)}" for step, text in enumerate(steps, start=1)]
        lines.append(f"  thought {number}: {_one_line(thought)}")
    if not trajectory.stopped:
        lines.append("  (did not stop by itself: the limit on blocks forced the answer)")
    return "\n".join([*lines, f"answer: {printable(trajectory.answer)}", ""])


def _one_line(text: str) -> str:
    return printable(text).replace("\n", " | ")
