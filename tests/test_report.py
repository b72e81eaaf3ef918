"""The report: what it draws of a run and what it says is missing, hostile texts, and the page in a real browser."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from matplotlib.text import Text

from ladir.__main__ import main
from ladir.cli.report import _traced
from ladir.config.loader import load_config, setting_names
from ladir.evaluation.metrics import summarise
from ladir.evaluation.results import MethodResult, QuestionResult, Trajectory, write_questions, write_results
from ladir.inference.decode import decode_thoughts
from ladir.inference.sampler import TrajectoryNoise
from ladir.reasoner import Reasoner
from ladir.report import traces
from ladir.report.algorithms import settings_grid
from ladir.report.charts import _by_control, _by_cost, _by_training, chart_sections
from ladir.report.figures import denoising_figure, line_figure, pixels, png
from ladir.report.page import page
from ladir.report.runs import read_curves, read_run, read_runs
from ladir.report.text import escaped, one_line
from ladir.report.traces import trace_questions
from tests.browser import Browser, browser
from tests.test_reasoner import QUESTIONS, tiny_reasoner

HOSTILE = [
    '</td></table><script>document.title = "owned"; fetch("http://127.0.0.1:9/x")</script>',
    '"><img src="http://127.0.0.1:9/y.png" onerror="console.error(1)">',
    "</style></title><!-- &lt; $\\frac{1}{0$ \x00\x1b[31m \u202egnp.exe \ud800",
    "word " * 60,
    "x" * 400,
]


#: file, steps, diversity guidance, classifier-free guidance, snapshot
EVALUATIONS = [
    ("results.json", 10, 0.0, 1.0, None),
    ("results-num_steps-2.json", 2, 0.0, 1.0, None),
    ("results-num_steps-5.json", 5, 0.0, 1.0, None),
    ("results-diversity_scale-0.8.json", 10, 0.8, 1.0, None),
    ("results-guidance_scale-2.0.json", 10, 0.0, 2.0, None),
    ("results-both.json", 5, 0.8, 1.0, None),
    ("results-3.json", 10, 0.0, 1.0, 3),
]


def questions() -> list[QuestionResult]:
    """One per question of the tiny reasoner, with hostile answers and thoughts."""
    return [
        QuestionResult(question, tuple(Trajectory(text, i == 0, text, (text,)) for i, text in enumerate(HOSTILE)))
        for question in QUESTIONS
    ]


def make_run(folder: Path, export: bool = True, **data: Any) -> Path:
    """A run that has everything, with hostile texts wherever a text can come from outside."""
    folder.mkdir(parents=True)
    config = {"run": {"name": folder.name, "seed": 3}, "data": {"sentences_per_block": 1, **data}, "sample": {"num_steps": 10}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(json.dumps({"commit": "0123456789abcdef", "device": HOSTILE[0]}))
    rows = [
        {"phase": phase, "kind": kind, "step": step, "loss": 3.0 / step, "flow": 2.0 / step, "stop_accuracy": 1 - 0.5 / step}
        for phase in ("vae", "ar")
        for kind, steps in (("train", range(1, 30)), ("validation", [15, 29]))
        for step in steps
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for phase, start in (("latents", ""), ("denoiser", "vae_")):
        figures = {"exact": 0.9754, "noisy_exact": 0.97, "active_units": 61.0, "probe_flow_explained": None, "probe_exact": 0.5}
        metrics = {"loss": 1.0, **{f"{start}{name}": value for name, value in figures.items()}}
        (folder / f"outcome-{phase}.json").write_text(json.dumps({"status": "finished", "metrics": metrics}))
    write_questions(folder / "generations.jsonl", {"ladir": sanitised(questions())})
    for name, steps, diversity, guidance, snapshot in EVALUATIONS:
        summary = summarise(questions(), ks=(1, 2))
        minutes = 10 if snapshot is None else snapshot
        names = ("ar", "ladir", "ladir-zero-noise", HOSTILE[1])
        methods = [MethodResult(method, summary, 0.01 * (steps + diversity), 60.0 * minutes) for method in names]
        sample = {"num_steps": steps, "diversity_scale": diversity, "guidance_scale": guidance}
        facts = {"num_questions": 3, "num_trajectories": 5, "seed": 3, "snapshot": snapshot, "sample": sample}
        facts |= {"left_out": {"number": 2, "counted": True}, "ar": {"temperature": 0.7, "top_p": 0.9}}
        write_results(folder / name, methods, task=HOSTILE[0], **facts)
    if export:
        tiny_reasoner().save_pretrained(folder / "export")
    return folder


def sanitised(results: list[QuestionResult]) -> list[QuestionResult]:
    """Without the lone surrogate, which no file in UTF-8 can hold."""

    def clean(trajectory: Trajectory) -> Trajectory:
        return replace(trajectory, answer=trajectory.answer.replace("\ud800", ""), thoughts=("t",), canonical="c")

    return [replace(result, trajectories=tuple(map(clean, result.trajectories))) for result in results]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page about two runs, of which the second has a granularity of its own and no export."""
    folder = tmp_path_factory.mktemp("report")
    first = make_run(folder / "one")
    second = make_run(folder / "two <b>", export=False, sentences_per_block=0)
    assert main(["report", str(first), str(second), "--out", str(folder / "out"), "--trajectories", "2", "--device", "cpu"]) == 0
    return folder / "out" / "report.html"


def test_every_section_has_its_picture_as_png_too(report: Path) -> None:
    text, files = report.read_text(encoding="utf-8"), {path.name for path in report.parent.glob("*.png")}
    expected = ["pass-at-k-one", "accuracy-by-steps-one", "accuracy-by-seconds"]
    expected += ["solved-by-training-one", "distinct-by-training-one"]
    expected += [f"{what}-by-{scale}_scale-one" for what in ("solved", "distinct") for scale in ("diversity", "guidance")]
    expected += ["block-granularity", "training-one-vae-losses", "denoising-one-1-1"]
    assert {f"{name}.png" for name in expected} <= files
    assert 'alt="pass@k against classifier-free guidance in run one"' in text
    assert all((report.parent / name).read_bytes().startswith(b"\x89PNG") for name in files)
    assert text.count("<img ") == text.count('src="data:image/png;base64,') == len(files)
    assert "trajectory 2:" in text and "trajectory 3:" not in text
    assert "nothing to show without export/: python training/export.py" in text
    assert not re.search(r'(?:src|href)="(?!data:)', text) and "url(" not in text and "@import" not in text


def test_every_table_is_there_as_markdown_too(report: Path) -> None:
    text = (report.parent / "tables.md").read_text(encoding="utf-8")
    tables = re.findall(r"^(.+), (results.*\.json):\n\n((?:\|.*\|\n)+)", text, re.M)
    runs = ("one", "two <b>")
    assert text.count("2 of 5 questions were not asked (see data.on_bad_record); they count as not solved") == len(tables)
    assert "ar temperature 0.7, ar top p 0.9" in report.read_text(encoding="utf-8")
    assert sorted((run, file) for run, file, _ in tables) == sorted((run, name) for run in runs for name, *_ in EVALUATIONS)
    for *_, table in tables:
        head, rule, *rows = table.splitlines()
        assert len({line.count("|") for line in (head, rule, *rows)}) == 1 and len(rows) == 4
        assert head.startswith("| method | pass@1 (%) |") and rows[1].startswith("| ladir | 20.0 ± 0.0 |")


def test_each_algorithm_of_stage_3_stands_beside_its_settings(tmp_path: Path) -> None:
    def rows(*changes: str) -> dict[str, tuple[str, ...]]:
        config = dataclasses.asdict(load_config(None, list(changes)))
        return {row[1]: tuple(row) for row in settings_grid("t", config).rows}

    nft = rows("rl.beta=0.5", "rl.group=8")
    assert nft["rl.beta"] == ("thoughts: DiffusionNFT (arXiv:2509.16117)", "rl.beta", "0.5", "1", "DiffusionNFT: 1")
    assert nft["rl.group"][2:4] == ("8", "16") and not {"rl.kl_weight", "rl.token_clip"} & nft.keys()
    steps = rows("rl.algorithm=flow_grpo", "rl.policy=both", "rl.kl_weight=0.04")
    assert steps["rl.kl_weight"][2:4] == ("0.04", "0") and steps["sample.answer_temperature"][0].startswith("answers: ")
    assert "rl.beta" not in steps and steps["rl.step_clip"][3] == "0.0001"
    text = rows("rl.policy=text")
    assert text["evaluate.ar_temperature"][0].startswith("completions: ") and not {"rl.beta", "sample.num_steps"} & text.keys()
    assert {*nft, *steps, *text} >= {name for name in setting_names() if re.fullmatch(r"rl\.\w+(_weight|_clip)", name)}

    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("run: {name: run}\n")
    (run / "config-rl.yaml").write_text("rl: {policy: latents, reward: '<b>:f|g'}\n")  # of an older version
    assert main(["report", str(run)]) == 0
    page, tables = ((run / "report" / name).read_text() for name in ("report.html", "tables.md"))
    assert "<td>&lt;b&gt;:f|g</td><td>answer</td>" in page and "run, rl:" in tables
    assert "| rl.reward | <b>:f¦g | answer |" in tables
    assert "| rl.beta | – | 1 |" in tables


def test_stage_3_has_a_panel_of_its_own(tmp_path: Path) -> None:
    """Curves of what was logged, first and last figures, and the last validation's good and bad attempt, hostile as any text."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("run: {name: run}\n")
    (run / "config-rl.yaml").write_text("rl: {policy: latents, group: 4, answers: 2}\n")
    rows = [
        {"phase": "rl", "kind": "train", "step": step, "loss": 1.0, "reward": 3 * step, "reward_spread": 0.5, "signal": 0.25,
         "pass@1": 0.1, "pass@8": 0.5, "answer_tokens": 7, "distinct_correct": 1.5, "nft_distance": 0.1 / step,
         "step_ratio": 1.0, "step_clipped": 0.5, "sampling_seconds": 4, "judging_seconds": 0.1, "learning_seconds": 3}
        for step in range(1, 11)
    ]  # fmt: skip
    rows.append({"phase": "rl", "kind": "validation", "step": 10, "start_distance": 0.2})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    attempts = {
        "best": {"thoughts": ["so"], "answer": HOSTILE[0], "reward": 1.5},
        "worst": {"thoughts": [], "answer": "no", "reward": 0},
    }
    (run / "attempts-rl.json").write_text(json.dumps({"step": 10, "question": "why?", **attempts}))
    assert main(["report", str(run)]) == 0
    page, tables = ((run / "report" / name).read_text() for name in ("report.html", "tables.md"))
    drawn = {path.stem.removeprefix("reinforcement-run-rl-") for path in (run / "report").glob("reinforcement-*.png")}
    assert drawn == {"rewards", "attempts", "distinct-answers", "length", "distance", "ratio-to-the-old-model", "clipped", "time"}
    assert "| rewards: mean | 4.5 | 28.5 |" in tables and "| attempts: pass@8 | 50.0 % | 50.0 % |" in tables
    assert "| distance: from the start | 0.2 | 0.2 |" in tables
    assert "a good and a bad attempt, step 10" in page and "good: reward 1.5" in page and "bad: reward 0" in page
    assert "so\n&lt;/td&gt;" in page and "<script" not in page
    assert not {"reward", "signal"} & read_run(run).rates.keys()  # a reward is no share of anything

    (run / "attempts-rl.json").write_text('{"step": 1}')
    with pytest.raises(ValueError, match=r"attempts-rl\.json: not what training/train_rl\.py writes"):
        read_run(run)


def test_scores_are_drawn_beside_what_came_of_them(tmp_path: Path) -> None:
    """Of each method the share of right answers in every bin of scores, with its standard error; methods without scores are
    left out."""
    scored = [(0.05, False), (0.05, True), (0.35, False), (0.35, False), (0.92, True), (0.98, True)]
    tried = tuple(Trajectory("x", right, "x", score=score) for score, right in scored)
    (tmp_path / "config.yaml").write_text("run: {name: run}\n")
    plain = [QuestionResult("q", (Trajectory("x", True, "x"),))]
    write_questions(tmp_path / "generations.jsonl", {"ladir": [QuestionResult("q", tried)], "ar": plain})
    (section,) = (section for section in chart_sections([read_run(tmp_path)]) if section.title == "Verifier")
    (picture,) = section.pictures
    diagonal, drawn = picture.figure.axes[0].containers
    np.testing.assert_allclose(diagonal.lines[0].get_xydata(), [[0, 0], [100, 100]])
    np.testing.assert_allclose(drawn.lines[0].get_xydata(), [[5, 50], [35, 0], [95, 100]])
    bars = [100 * (rate * (1 - rate) / 2) ** 0.5 for rate in (0.5, 0.0, 1.0)]
    ends = [segment[:, 1] for segment in drawn.lines[2][0].get_segments()]
    np.testing.assert_allclose([end[1] - end[0] for end in ends], [2 * bar for bar in bars], atol=1e-9)
    assert picture.description.endswith("their score: ladir")


def steps_on_the_page(text: str, question: str) -> list[list[list[str]]]:
    """The text of every step of every block of every trajectory of a question, as the page shows it."""
    part = text.split(f'<span class="question">{question}</span>')[1].split("<h3>")[0]
    found = []
    for trajectory in part.split("<details")[1:]:
        found.append(list[list[str]]())
        for table in re.findall(r'<table class="steps">.*?<tbody>(.*?)</tbody>', trajectory):
            rows = re.findall(r"<tr><td>(\d+)(?:–(\d+))?</td><td>(.*?)</td></tr>", table)
            assert [int(first) for first, *_ in rows[1:]] == [int(last or first) + 1 for first, last, _ in rows[:-1]]
            found[-1].append([shown for first, last, shown in rows for _ in range(int(first), int(last or first) + 1)])
    return found


def test_the_text_of_every_step_is_on_the_page(report: Path) -> None:
    reasoner = Reasoner.from_pretrained(report.parent.parent / "one" / "export", device="cpu")
    steps, seed = 10, 3  # of the evaluation
    answers = reasoner.generate(QUESTIONS, 2, num_steps=steps, seed=seed, on_step=lambda *call: None)
    text = report.read_text(encoding="utf-8")
    for question, group in zip(QUESTIONS, answers, strict=True):
        shown = steps_on_the_page(text, question)
        assert shown == [[[line or "(nothing)" for line in block] for block in trajectory.trace] for trajectory in group]
        assert {len(block) for trajectory in shown for block in trajectory} == {steps}
    assert any(len(set(block)) > 2 for group in answers for trajectory in group for block in trajectory.trace)


def test_hostile_text_stays_text(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert "<script" not in text and "onerror=&quot;" in text and '<img src="http' not in text
    assert not set(text) & {"\x00", "\x1b", "\u202e"}
    assert "default-src &#x27;none&#x27;" in text


def test_the_page_opens_in_a_browser_wide_and_narrow(report: Path, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as tab:
        for width in (1280, 400):
            tab.open(report, width)
            assert_readable(tab, width)
        tab.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
        assert_readable(tab, 400)
        tab.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 10_000
        assert tab.evaluate("document.title").startswith("LaDiR: one, two <b>")
        assert tab.errors == []


def assert_readable(tab: Browser, width: int) -> None:
    """No scrolling sideways, all pictures there and not shrunk to nothing, text of a readable size."""
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    sizes = tab.evaluate("[...document.images].map(image => [image.naturalWidth, image.clientWidth])")
    assert sizes and all(natural > 100 and shown >= min(300, width - 50) for natural, shown in sizes if shown)
    assert sum(shown > 0 for _, shown in sizes) >= 10
    assert tab.evaluate("parseFloat(getComputedStyle(document.body).fontSize)") >= 14
    texts = "[...document.querySelectorAll('p, li, h1, h2, h3, summary, pre')]"
    assert tab.evaluate(f"Math.max(...{texts}.map(text => text.scrollWidth - text.clientWidth))") <= 1


def test_figures_of_latents_stand_in_a_table_for_every_vae(report: Path) -> None:
    text = (report.parent / "tables.md").read_text(encoding="utf-8")
    for run in ("one", "two <b>"):
        _, _, table = text.partition(f"{run}, latents:\n\n")
        rows = [line.strip("| ").split(" | ") for line in table.partition("\n\n")[0].splitlines()]
        assert rows[0][:5] == ["trained", "exact (%)", "exact with noise (%)", "tokens (%)", "active units"]
        figures = ["97.5", "97.0", "–", "61", "–", "50.0", "–"]
        assert rows[2:] == [["VAE alone", *figures], ["jointly with the denoiser", *figures]]
    assert "<td>jointly with the denoiser</td><td>97.5</td>" in report.read_text(encoding="utf-8")


def test_a_run_that_has_just_begun_says_what_fills_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "young"
    folder.mkdir()
    (folder / "config.yaml").write_text("run: {name: young}\n")
    assert main(["report", str(folder)]) == 0
    text = (folder / "report" / "report.html").read_text()
    assert str(folder / "report" / "report.html") in capsys.readouterr().out
    for command in ("training/evaluate.py", "sample.num_steps=30", "sample.diversity_scale=30.0", "sentences_per_block=0",
                    "training/train_vae.py", "training/export.py"):  # fmt: skip
        assert command in text, command
    assert "<img" not in text


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("results.json", "{", "results.json: not a results.json"),
        ("config.yaml", "a: [", "config.yaml: not YAML"),
        ("environment.json", "{", "environment.json: not JSON"),
        ("generations.jsonl", '{"method": "ladir"}\n', "generations.jsonl: not what"),
    ],
)
def test_broken_files_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, content: str, message: str
) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / file).write_text(content)
    assert main(["report", str(tmp_path), "--questions", "0"]) == 1
    assert message in capsys.readouterr().err


def test_what_is_no_run_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 1 and main(["report", str(tmp_path)]) == 1
    errors = capsys.readouterr().err
    assert "no such run folder" in errors and "it has none of config.yaml" in errors
    assert main(["report", str(tmp_path), "--trajectories", "0"]) == 1


def test_curves_are_read_by_phase_and_kind(tmp_path: Path) -> None:
    rows = [{"phase": "vae", "kind": "train", "step": step, "loss": 10.0 - step, "lr": 1.0} for step in (1, 2, 3)]
    rows += [{"phase": "vae", "kind": "validation", "step": 3, "loss": 5.0}, {"phase": "ar", "step": 1, "loss": 3.0}]
    rows += [{"phase": "vae", "kind": "train", "step": 4, "loss": None}]
    torn = '{"phase": "vae", "st'
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([*map(json.dumps, rows), torn]))
    curves = read_curves(path, {"vae": ["loss", "absent"], "denoiser": ["loss"]})
    assert curves == {"vae": {"loss": ([1, 2, 3], [9, 8, 7]), "loss (validation)": ([3], [5])}}

    path.write_text("\n".join([torn, json.dumps(rows[0])]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1"):
        read_curves(path, {"vae": ["loss"]})


def test_traces_are_the_trajectories_of_the_same_seed() -> None:
    reasoner = tiny_reasoner()
    traced = trace_questions(reasoner, QUESTIONS, 2, seed=5)
    expected = reasoner.generate(QUESTIONS, num_trajectories=2, seed=5, on_step=lambda *step: None)
    mean, std = reasoner.denoiser.latent_mean, reasoner.denoiser.latent_std
    for ours, theirs in zip(itertools.chain(*traced), itertools.chain(*expected), strict=True):
        assert (ours.thoughts, ours.answer, ours.stopped) == (theirs.thoughts, theirs.answer, theirs.stopped)
        assert [block.texts for block in ours.blocks] == theirs.trace
        for block, latents in zip(ours.blocks, theirs.latents, strict=True):
            assert block.latents.shape == (reasoner.settings.num_steps, latents.numel())
            np.testing.assert_allclose(block.latents[-1], ((latents - mean) / std).flatten(), atol=1e-5)


def test_a_picture_starts_at_the_noise_a_block_is_made_of() -> None:
    """The first block's is what the trajectory's own random numbers begin with."""
    reasoner = tiny_reasoner()
    reasoner.settings = replace(reasoner.settings, initial_noise=2.0)
    traced = trace_questions(reasoner, QUESTIONS, 2, seed=5)
    d = reasoner.denoiser
    for question, group in zip(QUESTIONS, traced, strict=True):
        for index, trajectory in enumerate(group):
            drawn = TrajectoryNoise(5, [(question, index)]).normal([0], (1, d.latents_per_block, d.latent_dim))
            np.testing.assert_allclose(trajectory.blocks[0].noise, 2 * drawn.flatten(), atol=1e-5)
            latents, texts, names = trajectory.blocks[0].picture()
            assert names == ["noise", *map(str, range(1, reasoner.settings.num_steps + 1))]
            np.testing.assert_array_equal(latents[0], trajectory.blocks[0].noise)
            assert len(latents) == len(texts) == len(names) and texts[1:] == trajectory.blocks[0].texts
    noises = [block.noise for group in traced for trajectory in group for block in trajectory.blocks]
    assert len({noise.tobytes() for noise in noises}) == len(noises)  # each block's own


def test_a_picture_says_what_its_colours_mean() -> None:
    figure = denoising_figure(np.zeros((3, 4)), ["a", "b", "b"], ["noise", "1", "2"], "block 1")
    axes, bar, beside = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["noise", "1", "2"]
    assert [label.get_text() for label in beside.get_yticklabels()] == ["a", "b", "b"]
    assert bar.get_xlabel() == "value (standardised)"


def test_steps_are_decoded_a_few_at_a_time_and_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = trace_questions(tiny_reasoner(), QUESTIONS, 2, seed=5)
    rows: list[int] = []

    def counted(decoder: Any, tokenizer: Any, z: Any, *limits: Any) -> list[str]:
        rows.append(len(z))
        return decode_thoughts(decoder, tokenizer, z, *limits)

    monkeypatch.setattr(traces, "_ROWS", 4)
    monkeypatch.setattr(traces, "decode_thoughts", counted)
    in_parts = trace_questions(tiny_reasoner(), QUESTIONS, 2, seed=5)
    blocks = [block for one in at_once for trajectory in one for block in trajectory.blocks]
    assert max(rows) == 4 and sum(rows) == sum(len(block.texts) + 1 for block in blocks)  # each step once, and the noise
    for ours, theirs in zip(itertools.chain(*in_parts), itertools.chain(*at_once), strict=True):
        assert [block.texts for block in ours.blocks] == [block.texts for block in theirs.blocks]
        assert all(np.array_equal(a.latents, b.latents) for a, b in zip(ours.blocks, theirs.blocks, strict=True))


def test_pictures_of_anything_can_be_drawn() -> None:
    for latents in (np.zeros((1, 1)), np.full((3, 2), np.nan), np.random.default_rng(0).standard_normal((30, 2048))):
        figure = denoising_figure(latents, (HOSTILE * 6)[: len(latents)], list(map(str, range(len(latents)))), HOSTILE[2])
        assert pixels(figure).shape[2] == 3 and png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "values",
    [
        (12.0, 44.0),
        (2, 5, 10, 30),
        (59, 60, 61),
        (19.9776, 37.2131, 45.9035, 52.7046, 59.5088, 60.5068),
        (11.7, 12.1, 19.7, 22.7, 29.5, 35.2, 45.5),
        (0.038, 0.046, 0.098, 0.134, 0.179),
        (0.6, 0.9, 1.7),
        (0.031, 0.12),
        tuple(range(1, 200)),
    ],
)
def test_a_logarithmic_axis_is_readable(values: tuple[float, ...]) -> None:
    figure = line_figure("t", "x", "y", {"a": (values, values, None)}, logarithmic="x")
    pixels(figure)
    axis, (low, high) = figure.axes[0].xaxis, figure.axes[0].get_xlim()
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    labels = [tick.label1 for tick in ticks if tick.label1.get_text() and low <= tick.get_loc() <= high]
    assert len(labels) >= 2
    boxes = sorted(label.get_window_extent().intervalx.tolist() for label in labels)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(boxes))


#: what a page of 400 pixels leaves for a picture, and the smallest text that is read on it without effort
NARROW, SMALLEST = 368, 11


def many_curves(labels: int) -> Figure:
    curves = {f"{HOSTILE[4]} {number}": ([1.0, 2.0, 30.0], [0.1, 0.5, 0.9], [0.1] * 3) for number in range(labels)}
    return line_figure("a title " * 20, "samples", "solved (%)", curves, "x", rates=True)


def held_out_curve() -> Figure:
    return line_figure("t", "x", "y", {"ar": ([1, 2], [1e-3, 9], None), "ar (validation)": ([2], [1], None)}, "xy")


def long_texts(steps: int) -> Figure:
    return denoising_figure(np.zeros((steps, 64)), [HOSTILE[3]] * steps, ["noise", *map(str, range(1, steps))], HOSTILE[3])


@pytest.mark.parametrize(
    "draw",
    [
        held_out_curve,
        *(partial(many_curves, labels) for labels in (1, 4, 5, 20)),
        *(partial(long_texts, steps) for steps in (1, 10, 50)),
    ],
)
def test_text_in_pictures_is_readable_on_a_narrow_page_and_lies_within(draw: Callable[[], Figure]) -> None:
    figure = draw()
    height, width, _ = pixels(figure).shape
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    assert min(text.get_fontsize() for text in texts) * figure.dpi / 72 * NARROW / width >= SMALLEST
    drawn = figure.get_tightbbox()
    assert drawn.x0 >= 0 and drawn.y0 >= 0 and drawn.x1 <= width / figure.dpi and drawn.y1 <= height / figure.dpi


@pytest.mark.parametrize("labels", [1, 5, 20])
def test_long_labels_stand_below_the_curves(labels: int) -> None:
    figure = many_curves(labels)
    pixels(figure)
    (legend,), (axes,) = figure.legends, figure.axes
    assert len(legend.get_texts()) == labels and legend.get_window_extent().y1 < axes.get_window_extent().y0
    assert axes.get_window_extent().height > 1.8 * figure.dpi  # they do not press them flat


@pytest.mark.parametrize(("rates", "lowest"), [([0.826, 0.98], 70), ([0.5], 40), ([0.499, 1.0], 0), ([0.0], 0), ([], 0)])
def test_rates_in_the_upper_half_have_their_axis_there(rates: list[float], lowest: float) -> None:
    figure = line_figure("t", "k", "solved (%)", {"ladir": (range(len(rates)), rates, None)}, rates=True)
    assert figure.axes[0].get_ylim() == (lowest, 103)


def test_text_is_shortened_to_a_printable_line() -> None:
    assert one_line("a\n\n  b\tc ", 20) == "a ⏎ b c"
    assert one_line("x" * 50, 10) == "x" * 9 + "…"
    assert one_line("\x00\u202e\ud800", 10) == "\N{REPLACEMENT CHARACTER}" * 3
    assert escaped("<a href='\u00a0'>&\"") == "&lt;a href=&#x27; &#x27;&gt;&amp;&quot;"


def test_the_page_is_one_text_without_runs_it_was_not_given(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / "alone", export=False))]
    sections = chart_sections(runs)
    images = {picture.name: b"" for section in sections for picture in section.pictures}
    assert page(runs, sections, images, [], "").startswith("<!doctype html>")


def test_runs_whose_folders_share_a_name_keep_their_own_pictures(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / parent / "demo", export=False) for parent in ("one", "two")]
    runs = read_runs([*folders, make_run(tmp_path / "alone", export=False)])
    assert [run.name for run in runs] == ["one/demo", "two/demo", "alone"]
    assert [{results.run for results in run.results} for run in runs] == [{"one/demo"}, {"two/demo"}, {"alone"}]
    names = [picture.name for section in chart_sections(runs) for picture in section.pictures]
    assert len(set(names)) == len(names)
    assert [run.name for run in read_runs([folders[0], folders[0]])] == ["demo", "demo"]  # one and the same


def test_a_run_is_reported_from_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert main(["report", "."]) == 0
    assert f"{tmp_path}-whole-chain" in (tmp_path / "report" / "report.html").read_text()


def test_curves_over_a_control_hold_the_others_and_leave_snapshots_out(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "one", export=False))
    steps, diversity = _by_control(run, "num_steps", ["pass@1"]), _by_control(run, "diversity_scale", ["pass@1"])
    assert steps["ladir pass@1"][0] == [2.0, 5.0, 10.0] and diversity["ladir pass@1"][0] == [0.0, 0.8]
    assert _by_control(run, "guidance_scale", ["pass@1"])["ladir pass@1"][0] == [1.0, 2.0]
    assert _by_cost([run])["ladir"][0] == pytest.approx([0.02, 0.05, 0.1])
    assert _by_training(run, ["pass@1"])["ar pass@1"][0] == [3.0, 10.0]
    strange = {"split": "validation", "num_trajectories": 7, "seed": 9, "num_questions": 2, "task": "code"}
    for name, value in strange.items():  # none of these can be joined with the others
        content = json.loads((run.path / "results-num_steps-5.json").read_text())
        content["sample"]["num_steps"] = 20
        (run.path / f"results-{name}.json").write_text(json.dumps({**content, name: value}))
    assert _by_control(read_run(run.path), "num_steps", ["pass@1"]) == steps


def test_what_is_shown_of_a_run_with_a_second_stage_is_the_second_stages(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "one")
    settings = json.loads((folder / "export" / "ladir.json").read_text())
    (folder / "export" / "ladir.json").write_text(json.dumps({**settings, "origin": "0123", "stage": "rollout"}))
    first, second = sanitised(questions()), sanitised(questions())
    second = [replace(result, trajectories=result.trajectories[1:]) for result in second]  # none is right
    write_questions(folder / "generations.jsonl", {"ladir": first, "ladir-rollout": second})
    run = read_run(folder)
    entries, note = _traced(run, 2, 1, "cpu", tmp_path)
    assert not note
    assert [entry.judged for entry in entries] == run.questions["ladir-rollout"][:2]
    seed, steps = run.results[0].content["seed"], run.results[0].sample["num_steps"]
    assert (run.seed, run.sample["num_steps"]) == (seed, steps)
    assert {len(block.texts) for entry in entries for trace in entry.trajectories for block in trace.blocks} == {steps}
