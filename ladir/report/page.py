"""One HTML page that needs nothing beside itself: pictures inside, no script, nothing fetched."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ladir.evaluation.report import remarks
from ladir.evaluation.results import QuestionResult
from ladir.report.runs import RunData
from ladir.report.sections import Section
from ladir.report.tables import html_table
from ladir.report.text import escaped
from ladir.report.traces import BlockTrace, TrajectoryTrace

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .4rem; padding-top: .6rem; border-top: 1px solid #ddd; }
h3 { font-size: 1.05rem; margin: 1.4rem 0 .4rem; }
p, li, summary, h1, h2, h3, .steps td + td { overflow-wrap: anywhere; }
.muted { color: #555; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 23rem), 1fr)); gap: 1rem; }
figure { margin: 0; max-width: 30rem; }
img { display: block; width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #e4e4e4; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
td, th { white-space: nowrap; }
thead th { border-bottom: 2px solid #999; vertical-align: bottom; }
td small { color: #555; white-space: nowrap; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .7rem; background: #f3f4f6; font-size: .85rem; }
.steps td, .steps th, .words td, .words th { text-align: left; }
.steps td:first-child { white-space: nowrap; color: #555; }
.texts td + td { white-space: pre-wrap; overflow-wrap: anywhere; }
.steps { width: 100%; }
.steps th:first-child, .steps td:first-child { width: 8rem; }
.steps td + td { font-family: ui-monospace, monospace; white-space: pre-wrap; }
.steps tr:last-child td { font-weight: 600; }
.question { font-weight: 600; white-space: pre-wrap; }
.right { color: #00663d; } .wrong { color: #a02020; }
details { margin: .5rem 0; padding: .4rem .8rem; border: 1px solid #ddd; border-radius: .3rem; }
summary { cursor: pointer; }
.answer { font-family: ui-monospace, monospace; white-space: pre-wrap; }
"""

#: forbids everything but the page's own style and pictures, so that no text can make it fetch or run anything
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class TracedQuestion:
    """A question, its trajectories with all steps, what the evaluation found, and pictures of the first one's blocks (PNG)."""

    run: str
    question: str
    reference: str
    trajectories: Sequence[TrajectoryTrace]
    judged: QuestionResult | None
    pictures: Sequence[bytes]


def page(
    runs: Sequence[RunData], sections: Sequence[Section], images: Mapping[str, bytes], traced: Sequence[TracedQuestion], note: str
) -> str:
    """The page.  ``images``: the sections' pictures as PNG, by name; ``note``: why there are no traced questions."""
    title = f"LaDiR: {', '.join(run.name for run in runs)}"
    parts = [f"<h1>{escaped(title)}</h1>", *_runs(runs), *_tables(runs)]
    for section in sections:
        parts += _section(section, images)
    parts += _questions(traced, note)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escaped(_POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escaped(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def _runs(runs: Sequence[RunData]) -> Iterator[str]:
    yield "<ul>"
    for run in runs:
        facts = [str(run.path), f"seed {run.seed}"]
        commit, device = run.environment.get("commit"), run.environment.get("device")
        facts += [f"commit {str(commit)[:10]}"] if commit else []
        facts += [str(device)] if device else []
        yield f'<li><b>{escaped(run.name)}</b> <span class="muted">{escaped(", ".join(facts))}</span></li>'
    yield "</ul>"


def _tables(runs: Sequence[RunData]) -> Iterator[str]:
    yield "<h2>Results</h2>"
    found = [results for run in runs for results in run.results]
    if not found:
        yield "<p>There are none yet: the commands below make them.</p>"
        return
    for results in found:
        first = results.file == "results.json"
        title = f"{escaped(results.run)}, {escaped(results.file)}"
        yield f"<h3>{title}</h3>" if first else f"<details><summary>{title}</summary>"
        content = results.content
        facts = [
            f"{content.get('task')}: {content.get('num_questions')} {content.get('split', '')} questions",
            f"{content.get('num_trajectories')} trajectories each",
            f"seed {content.get('seed')}",
            *(f"{name.replace('_', ' ')} {value}" for name, value in results.sample.items() if name in _SHOWN_CONTROLS),
            *(f"ar {name.replace('_', ' ')} {value}" for name, value in results.ar.items()),
        ]
        yield f'<p class="muted">{escaped(", ".join(facts))}; ± is the standard error by question.</p>'
        yield f'<div class="wide">{html_table(results.rows)}</div>'
        yield from (f'<p class="muted">{escaped(remark)}</p>' for remark in remarks(content))
        if not first:
            yield "</details>"


_SHOWN_CONTROLS = (
    "num_steps", "sampler", "initial_noise", "guidance_scale", "diversity_scale", "restarts", "reencode", "token_head_weight",
    "lm_weight", "thought_temperature",
)  # fmt: skip


def _section(section: Section, images: Mapping[str, bytes]) -> Iterator[str]:
    yield f"<h2>{escaped(section.title)}</h2>\n<p>{escaped(section.text)}</p>"
    if section.pictures:
        figures = "\n".join(_image(images[picture.name], picture.description) for picture in section.pictures)
        yield f'<div class="pictures">\n{figures}\n</div>'
    for grid in section.tables:
        yield f'<h3>{escaped(grid.title)}</h3>\n<div class="wide">{grid.html()}</div>'
    if section.missing is not None:
        why, command = section.missing
        yield f'<p class="muted">{escaped(why)} This fills it:</p>\n<pre>{escaped(command)}</pre>'


def _image(data: bytes, description: str) -> str:
    source = base64.b64encode(data).decode("ascii")
    return f'<figure><img alt="{escaped(description)}" src="data:image/png;base64,{source}"></figure>'


def _questions(traced: Sequence[TracedQuestion], note: str) -> Iterator[str]:
    yield "<h2>Thoughts forming out of noise</h2>"
    yield (
        "<p>Each block of a trajectory is denoised step by step; at every step the present estimate is decoded to text. "
        "In the pictures a row is a step and a column an element of the block's latents.</p>"
    )
    if note:
        yield f'<p class="muted">{escaped(note)}</p>'
    for entry in traced:
        yield f'<h3>{escaped(entry.run)}: <span class="question">{escaped(entry.question)}</span></h3>'
        yield f'<p class="muted">{escaped(_facts(entry))}</p>'
        names = [f"block {number} of the first trajectory at every step" for number in range(1, len(entry.pictures) + 1)]
        figures = "\n".join(_image(data, name) for data, name in zip(entry.pictures, names, strict=True))
        yield f'<div class="pictures">\n{figures}\n</div>'
        for number, trajectory in enumerate(entry.trajectories, start=1):
            yield _trajectory(number, trajectory, entry.judged)


def _facts(entry: TracedQuestion) -> str:
    facts = [f"reference: {entry.reference}"] if entry.reference else []
    if entry.judged is not None:
        facts.append(f"{entry.judged.num_correct} of {len(entry.judged.trajectories)} trajectories right in the evaluation")
    return "; ".join(facts)


def _trajectory(number: int, trajectory: TrajectoryTrace, judged: QuestionResult | None) -> str:
    verdict = _verdict(number, trajectory.answer, judged)
    answer = f'<span class="answer">{escaped(trajectory.answer)}</span>'
    end = "" if trajectory.stopped else " <small>(the limit on blocks ended it)</small>"
    blocks = "".join(_block(place, block) for place, block in enumerate(trajectory.blocks, start=1))
    opened = " open" if number == 1 else ""
    return f"<details{opened}><summary>trajectory {number}: {answer}{verdict}{end}</summary>{blocks}</details>"


def _verdict(number: int, answer: str, judged: QuestionResult | None) -> str:
    """Right or wrong, where the evaluation saw this very trajectory."""
    if judged is None or number > len(judged.trajectories) or judged.trajectories[number - 1].answer != answer:
        return ""
    correct = judged.trajectories[number - 1].correct
    return ' <b class="right">right</b>' if correct else ' <b class="wrong">wrong</b>'


def _block(number: int, block: BlockTrace) -> str:
    rows = "".join(f"<tr><td>{steps}</td><td>{escaped(text) or '(nothing)'}</td></tr>" for steps, text in _stretches(block.texts))
    head = f"<thead><tr><th>block {number}, step</th><th>text</th></tr></thead>"
    return f'<div class="wide"><table class="steps">{head}<tbody>{rows}</tbody></table></div>'


def _stretches(texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Steps with the same text together: ("3–5", text)."""
    first = 0
    for step, text in enumerate(texts):
        if step + 1 == len(texts) or texts[step + 1] != text:
            yield (f"{first + 1}–{step + 1}" if step > first else f"{step + 1}"), text
            first = step + 1
