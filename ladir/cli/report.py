"""python -m ladir report RUN...: one HTML page about runs, needing nothing beside itself; pictures as PNG, tables as Markdown."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ladir.arguments import LineParser
from ladir.errors import UnusableError
from ladir.evaluation.report import remarks
from ladir.evaluation.results import QuestionResult
from ladir.report.charts import chart_sections
from ladir.report.figures import denoising_figure, png
from ladir.report.page import TracedQuestion, page
from ladir.report.runs import Results, RunData, read_runs
from ladir.report.tables import markdown_table
from ladir.report.text import printable


def run(argv: Sequence[str]) -> int:
    """Write the page and its pictures."""
    parser = LineParser(prog="python -m ladir report", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders; several are compared")
    parser.add_argument("--out", metavar="DIR", help="folder to write to (not set: report/ in the first run's folder)")
    parser.add_argument(
        "--questions", type=int, default=3, metavar="N", help="questions of each run shown step by step (3); 0: none"
    )
    parser.add_argument("--trajectories", type=int, default=3, metavar="N", help="trajectories of each of them (3)")
    parser.add_argument("--device", help="where the models think: cpu, cuda, ...; not set: CUDA where there is one")
    arguments = parser.parse_args(argv)
    for name in ("questions", "trajectories"):
        if getattr(arguments, name) < (name == "trajectories"):
            raise ValueError(f"--{name} {getattr(arguments, name)}: too few")
    if arguments.device is not None:
        from ladir.reasoner import usable_device

        usable_device(arguments.device)
    runs = read_runs(arguments.runs)
    out = Path(arguments.out) if arguments.out else runs[0].path / "report"
    out.mkdir(parents=True, exist_ok=True)
    sections = chart_sections(runs)
    images = {picture.name: png(picture.figure) for section in sections for picture in section.pictures}
    for name, data in images.items():
        (out / f"{_file_name(name)}.png").write_bytes(data)
    tables = [_table(results) for run in runs for results in run.results]
    tables += [f"{printable(grid.title)}:\n\n{grid.markdown()}\n" for section in sections for grid in section.tables]
    (out / "tables.md").write_text("\n".join(tables), encoding="utf-8")
    traced, notes = [], []
    for run_data in runs:
        questions, note = _traced(run_data, arguments.questions, arguments.trajectories, arguments.device, out)
        traced += questions
        notes += [note] if note else []
    target = out / "report.html"
    target.write_text(page(runs, sections, images, traced, " ".join(notes)), encoding="utf-8")
    beside = f"{len(images)} pictures as PNG, {len(tables)} tables as Markdown (tables.md)"
    sys.stdout.write(f"{target}: {target.stat().st_size / 2**20:.1f} MiB; beside it {beside}\n")
    return 0


def _table(results: Results) -> str:
    """Results as Markdown: the table, and what it does not say by itself."""
    lines = [
        f"{printable(f'{results.run}, {results.file}')}:",
        markdown_table(results.rows),
        *map(printable, remarks(results.content)),
    ]
    return "".join(f"{line}\n\n" for line in lines).removesuffix("\n")


def _traced(run: RunData, count: int, trajectories: int, device: str | None, out: Path) -> tuple[list[TracedQuestion], str]:
    """Questions of a run, answered anew by its exported model with all steps kept; or why there are none."""
    if count == 0:
        return [], ""
    export = run.path / "export"
    if not _asked(run) or not export.is_dir():
        lacking = "generations.jsonl: python training/evaluate.py" if export.is_dir() else "export/: python training/export.py"
        config = shlex.quote(str(run.path / "config.yaml"))
        return [], f"{run.name}: nothing to show without {lacking} --config {config} makes it."
    from transformers.utils.logging import disable_progress_bar

    from ladir.models.folders import denoiser_stage
    from ladir.reasoner import Reasoner
    from ladir.report.traces import trace_questions

    disable_progress_bar()
    try:
        # An export holds the last stage's denoiser: a row of its own, from which the verdicts must come.
        stage = denoiser_stage(export)
        chosen = _chosen(run, "ladir" if stage == "denoiser" else f"ladir-{stage}", count)
        reasoner = Reasoner.from_pretrained(export, device=device)
        known = {name: value for name, value in run.sample.items() if hasattr(reasoner.settings, name)}  # of any version
        reasoner.settings = reasoner.settings_with(**known)
    except UnusableError as error:
        return [], f"{run.name}: its export cannot be read ({error})."
    except ValueError as error:  # it was exported for other controls
        return [], f"{run.name}: its export cannot think as in the evaluation ({error})."
    found = trace_questions(reasoner, [question.question for question in chosen], trajectories, run.seed)
    entries = []
    for number, (question, traces) in enumerate(zip(chosen, found, strict=True), start=1):
        pictures = []
        for place, block in enumerate(traces[0].blocks, start=1):
            figure = denoising_figure(*block.picture(), f"block {place}: {block.texts[-1]}")
            pictures.append(png(figure))
            (out / f"{_file_name(f'denoising-{run.name}-{number}-{place}')}.png").write_bytes(pictures[-1])
        reference = getattr(question, "reference", "")
        entries.append(TracedQuestion(run.name, question.question, reference, traces, question, pictures))
    return entries, ""


def _asked(run: RunData) -> dict[str, list[QuestionResult]]:
    """What LaDiR was asked, by method."""
    return {method: questions for method, questions in run.questions.items() if method.startswith("ladir") and questions}


def _chosen(run: RunData, method: str, count: int) -> list[QuestionResult]:
    """Questions that LaDiR was asked, by ``method`` if at all: one that it solves at once, one that it does not, then in their
    order."""
    asked = _asked(run)
    questions = asked.get(method) or next(iter(asked.values()))
    solved = next((question for question in questions if question.trajectories[0].correct), None)
    missed = next((question for question in questions if not question.trajectories[0].correct), None)
    first = [question for question in (solved, missed) if question is not None]
    return [*first, *(question for question in questions if question not in first)][:count]


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)
