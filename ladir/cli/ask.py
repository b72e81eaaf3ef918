"""python -m ladir ask "question" --model DIR (or without ask): a trained model answers and shows its thoughts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from ladir.arguments import LineParser
from ladir.cli.controls import add_controls, canonical_of, controls_of
from ladir.cli.loading import add_model, be_quiet, load_reasoner
from ladir.report.text import printable
from ladir.tokens import encode_text

if TYPE_CHECKING:
    from ladir.reasoner import Reasoner, TraceHook, Trajectory


def build_parser() -> argparse.ArgumentParser:
    """The command line's options; controls that are not given come from the model folder."""
    parser = LineParser(prog="python -m ladir ask", description=__doc__)
    parser.add_argument("question", nargs="+", help="one or more questions")
    add_model(parser)
    parser.add_argument("--trace", action="store_true", help="show each block becoming text, step by step")
    parser.add_argument("--trajectories", type=int, default=1, metavar="N", help="answers per question")
    add_controls(parser)
    return parser


def run(argv: Sequence[str]) -> int:
    """Answer the questions on the command line."""
    arguments = build_parser().parse_args(argv)
    from ladir.reasoner import check_questions

    be_quiet()
    if arguments.trajectories < 1:
        raise ValueError(f"--trajectories {arguments.trajectories}: must be at least 1")
    check_questions(arguments.question)
    reasoner = load_reasoner(arguments)
    _warn_of_unknown_words(reasoner, arguments.question)
    with _shown_live(arguments, reasoner) if arguments.trace else nullcontext() as on_step:
        answers = _generate(reasoner, arguments, on_step)
    for question, trajectories in zip(arguments.question, answers, strict=True):
        sys.stdout.write(f"question: {printable(question)}\n")
        for number, trajectory in enumerate(trajectories, start=1):
            sys.stdout.write(f"trajectory {number}:\n{render(trajectory)}")
    return 0


def _generate(reasoner: Reasoner, arguments: argparse.Namespace, on_step: TraceHook | None) -> list[list[Trajectory]]:
    return reasoner.generate(
        arguments.question,
        num_trajectories=arguments.trajectories,
        seed=arguments.seed,
        on_step=on_step,
        batch_size="auto",
        choose=arguments.choose,
        canonical=canonical_of(arguments),
        **controls_of(arguments),
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
    settings = reasoner.settings_with(**controls_of(arguments))
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
    if trajectory.score is not None:
        lines.append(f"  score: {trajectory.score:.2f} (the verifier's probability that the answer is right)")
    if not trajectory.stopped:
        lines.append("  (did not stop by itself: the limit on blocks forced the answer)")
    return "\n".join([*lines, f"answer: {printable(trajectory.answer)}", ""])


def _one_line(text: str) -> str:
    return printable(text).replace("\n", " | ")
