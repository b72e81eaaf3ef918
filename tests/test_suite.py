"""Several benchmarks in one command and one table; the queue from which ranks take their questions."""

from __future__ import annotations

import io
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from ladir.config import SampleSettings
from ladir.config.loader import ConfigError, load_config, with_settings
from ladir.config.suites import SUITES, entries
from ladir.errors import UnusableError
from ladir.evaluation.suite import set_lines, suite_columns, suite_markdown, suite_table, summarise_suite
from ladir.report.fitting import print_whole
from tests.distributed import ProcessGroup
from tests.test_evaluate import ALONE, Death, configure, evaluate_in, second_dies
from tests.test_evaluate import models as models  # a fixture
from training.evaluation.benchmarks import data_sets
from training.runtime.distributed import World
from training.runtime.run import Run
from training.runtime.tickets import Tickets

METHODS = "evaluate.methods=[ar-greedy,ladir,ladir-majority]"
SIZES = ("evaluate.num_trajectories=2", "evaluate.check_seconds=60")


def suite_in(models: Path, folder: Path) -> tuple[str, ...]:
    """Puzzles by their name, and sums with fields and limits of their own, of which one line is no question."""
    benchmarks = folder / "benchmarks"
    benchmarks.mkdir(exist_ok=True)
    puzzles = (models / "data" / "test.jsonl").read_text().splitlines()
    (benchmarks / "Countdown4.jsonl").write_text("\n".join(puzzles[:5]) + "\n")
    sums = [{"ask": f"{n} + 1", "gold": str(n + 1)} for n in range(4)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*sums, {"ask": ""}]))
    own = f"name: sums, data.test: {folder / 'sums.jsonl'}, data.input_field: ask, data.answer_field: gold, evaluate.task: maths"
    own += ", data.on_bad_record: skip, evaluate.num_questions: 3, sample.max_blocks: 1"
    return f"evaluate.suite=[countdown-4, {{{own}}}]", f"evaluate.suite_folder={benchmarks}", METHODS, *SIZES


def tables(folder: Path) -> tuple[dict[str, Any], str]:
    suite = json.loads((folder / "tiny" / "suite.json").read_text())
    for row in suite["rows"]:
        spent = row.pop("seconds_by_process")
        assert row.pop("wall_seconds") == max(spent.values()) > 0 and row.pop("seconds_per_question")["average"] > 0
    assert all(0 <= share <= 1 for share in suite.pop("busy")["ranks"])
    return suite, (folder / "tiny" / "suite.md").read_text()


@pytest.fixture(scope="module")
def whole(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    evaluate_in(models, folder, *suite_in(models, folder))
    return folder


def test_one_table_of_all_benchmarks(whole: Path) -> None:
    suite, text = tables(whole)
    puzzles, sums = suite["sets"]
    facts = ("name", "task", "in_file", "asked", "left_out", "gold_judged", "gold_accepted")
    assert [puzzles[fact] for fact in facts] == ["countdown-4", "countdown", 5, 5, 0, 5, 5]
    assert [sums[fact] for fact in facts] == ["sums", "maths", 5, 3, 0, 3, 3]
    assert [row["method"] for row in suite["rows"]] == ["ar-greedy", "ladir", "ladir-majority"]
    for name in ("countdown-4", "sums"):
        content = json.loads((whole / "tiny" / f"results-{name}.json").read_text())
        assert (content["benchmark"], content["sample"]["max_blocks"]) == (name, 1 if name == "sums" else 3)
        for row, ours in zip(content["rows"], suite["rows"], strict=True):
            assert all(
                ours[figure][name] == row[figure] for figure in ("pass@1", "forward_passes_per_question", "flops_per_question")
            )
    for row in suite["rows"]:
        assert row["pass@1"]["average"] == pytest.approx((row["pass@1"]["countdown-4"] + row["pass@1"]["sums"]) / 2)
    lines = [json.loads(line) for line in (whole / "tiny" / "generations-sums.jsonl").read_text().splitlines()]
    assert all(len(entry["thoughts"]) == 1 for line in lines if line["method"] == "ladir" for entry in line["trajectories"])
    assert "sums (maths): 5 questions in the file, 3 asked, none left out, 2 not asked for; own answers accepted 3 of 3" in text
    status = json.loads((whole / "tiny" / "status.json").read_text())
    assert (status["state"], status["fraction"]) == ("finished", 1.0)
    card = (whole / "tiny" / "export" / "README.md").read_text()
    assert text.rstrip() in card and "in the average every benchmark counts the same" in card and "not been evaluated" not in card
    assert not (whole / "tiny" / "evaluation").exists() and not (whole / "tiny" / "results.json").exists()


def evaluate_suite(world: World, models: Path, folder: Path, death: Death | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        second_dies(death, world, folder, patch)
        evaluate_in(models, folder, *suite_in(models, folder), world=world)


def test_killed_and_resumed_on_two_ranks_it_is_the_same_table(
    models: Path, whole: Path, tmp_path: Path, two_processes: ProcessGroup
) -> None:
    assert all(error for _, error in two_processes.outcomes(evaluate_suite, models, tmp_path, ("write", 2)))
    assert not (tmp_path / "tiny" / "suite.json").exists()
    two_processes.run(evaluate_suite, models, tmp_path, None)
    assert tables(tmp_path) == tables(whole)
    for name in ("countdown-4", "sums"):
        file = f"tiny/generations-{name}.jsonl"
        assert (tmp_path / file).read_text() == (whole / file).read_text()


def test_files_that_are_missing_are_named_before_anything_is_read(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.evaluation.asking.load_answerers", lambda *_: pytest.fail("loaded a model"))
    monkeypatch.setattr("training.evaluation.questions.read_split", lambda *_: pytest.fail("read questions"))
    with pytest.raises(FileNotFoundError) as told:
        evaluate_in(models, tmp_path, "evaluate.suite=code4", f"evaluate.suite_folder={tmp_path}", "evaluate.methods=[ladir]")
    lines = str(told.value).splitlines()
    for name, line in zip(SUITES["code4"], lines, strict=True):
        assert line.startswith(f"evaluate.suite: {name}: data.test={tmp_path}/{name}.jsonl: no such file")
        assert f"put the file there (evaluate.suite_folder={tmp_path})" in line


@pytest.mark.parametrize(
    ("suite", "told"),
    [
        ("maths8", "'maths8' is no suite or data set known by name; valid: code4,"),
        ("[gsm8k,GSM8K]", "evaluate.suite: two data sets are named 'gsm8k'; give one another name"),
        ("[{data.test: a.jsonl}]", "name='': a data set's name must be"),
        ("[{name: a, run.seed: 3}]", "a: run.seed cannot be a data set's own"),
    ],
)
def test_a_suite_that_is_none_is_refused_with_the_settings(suite: str, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [f"evaluate.suite={suite}"])
    assert str(error.value).count(told) == len(error.value.errors) == 1


def test_settings_of_a_set_are_checked_like_all_others(models: Path, tmp_path: Path) -> None:
    suite = "evaluate.suite=[{name: a, data.tset: x.jsonl, sample.max_blocks: 0}]"
    with pytest.raises(UnusableError) as told:
        data_sets(Run(configure(models, tmp_path, suite), "evaluate", ALONE))
    assert "a: there: unknown setting data.tset; did you mean data.test?" in str(told.value)
    assert "a: sample.max_blocks=0: must be at least 1" in str(told.value)


def test_sets_by_name_have_a_task_and_a_file_whatever_its_spelling(models: Path, tmp_path: Path) -> None:
    (tmp_path / "college_math").mkdir()
    for file in ("HumanEval.jsonl.gz", "MbppPlus.jsonl", "humaneval-notes.txt", "college_math/test.jsonl"):
        (tmp_path / file).write_text("")
    suite = "evaluate.suite=[code4,college-math]", f"evaluate.suite_folder={tmp_path}"
    found = {entry.name: entry.run.config for entry in data_sets(Run(configure(models, tmp_path, *suite), "evaluate", ALONE))}
    names = {name: str(Path(config.data.test or "").relative_to(tmp_path)) for name, config in found.items()}
    assert names["humaneval"] == "HumanEval.jsonl.gz" and names["mbpp+"] == "MbppPlus.jsonl"
    assert names["humaneval+"] == "humaneval+.jsonl" and names["college-math"] == "college_math/test.jsonl"
    assert [config.evaluate.task for config in found.values()] == ["code"] * 4 + ["maths"]
    assert entries(["GSM8K", "Code4"]) == entries(["gsm8k", "code4"])
    tolerances = {entry.name: entry.settings.get("evaluate.tolerance", 0.0) for entry in entries(["maths7"])}
    assert tolerances.pop("theoremqa") == 0.04 and set(tolerances.values()) == {0.0}  # its authors' rule, and nobody else's
    assert entries(["TheoremQA"])[0].settings["evaluate.tolerance"] == 0.04
    assert len(entries(["maths7"])) == 7 and len(entries(["countdown", "gsm8k"])) == 3 and entries([]) == []


def test_other_values_of_some_settings_leave_the_first_as_they_were() -> None:
    config = load_config(None, ["evaluate.suite=[gsm8k]"])
    changed = with_settings(config, {"sample.max_blocks": 7, "evaluate.suite": []})
    assert (changed.sample.max_blocks, changed.evaluate.suite) == (7, [])
    assert (config.sample.max_blocks, config.evaluate.suite) == (SampleSettings().max_blocks, ["gsm8k"])


def results_of(rates: dict[str, float | None], passes: float = 1.0, **ranks: float) -> dict[str, Any]:
    rows = [
        {
            "method": method,
            "pass@1": rate,
            "standard_errors": {"pass@1": 0.03 if rate is not None else None},
            "forward_passes_per_question": passes,
            "seconds_by_process": ranks,
        }
        for method, rate in rates.items()
    ]
    left_out, gold = {"number": 1, "counted": True}, {"judged": 4, "refused": 1, "unread": 2}
    facts = {"task": "maths", "in_file": 5, "num_questions": 4, "num_trajectories": 2, "left_out": left_out, "gold": gold}
    return {**facts, "rows": rows}


def test_the_average_counts_every_benchmark_alike() -> None:
    suite = summarise_suite({"a": results_of({"ar": 0.5, "ladir": 0.25}), "b": results_of({"ar": 0.7, "ladir": None})})
    (ar, ladir), lines = suite["rows"], list(set_lines(suite))
    assert ar["pass@1"] == {"a": 0.5, "b": 0.7, "average": 0.6} and ladir["pass@1"]["average"] is None
    assert ar["standard_errors"]["pass@1"]["average"] == pytest.approx(0.03 / 2**0.5)
    assert ar["seconds_per_question"] == {"a": None, "b": None, "average": None}
    assert "| ar | pass@1 | 50.0 ± 3.0 | 70.0 ± 3.0 | 60.0 ± 2.1 |" in suite_markdown(suite)
    assert lines[0].endswith(
        "4 asked, 1 left out, counted as not solved; own answers accepted 3 of 4, 2 of them without being read"
    )
    assert [column.header for column in suite_table(suite, suite_columns(suite)).columns][2:] == ["a", "b", "average"]


def test_a_row_takes_as_long_as_the_process_that_has_most_of_all_benchmarks() -> None:
    one, two = results_of({"ar": 0.5}, passes=2.0, first=5.0, second=1.0), results_of({"ar": 0.5}, passes=4.0, second=5.0)
    (row,) = summarise_suite({"a": one, "b": two})["rows"]
    assert (row["seconds_by_process"], row["wall_seconds"]) == ({"first": 5.0, "second": 6.0}, 6.0)
    assert row["forward_passes_per_question"] == {"a": 2.0, "b": 4.0, "average": 3.0}


def wide_table(columns: Any) -> Table:
    table = Table(title="a title that is longer than its table", title_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    table.add_row("row", *("communication" for _ in columns))
    return table


def test_a_column_that_is_not_to_be_wrapped_is_folded_where_it_is_wider_than_the_terminal() -> None:
    name = "name-of-a-benchmark-" * 3 + "end"
    table, text = Table(padding=0), io.StringIO()
    table.add_column("method", no_wrap=True)
    table.add_column(name, no_wrap=True)
    table.add_row("ladir-tournament", "50.0 ± 3.0")
    print_whole(Console(file=text, width=40, force_terminal=True, color_system=None), lambda _: table, [name])
    cells = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in text.getvalue().splitlines()]
    method, shown = ("".join(words) for words in zip(*filter(None, cells), strict=True))
    assert (method, shown) == ("methodladir-tournament", f"{name}50.0 ± 3.0")


@pytest.mark.parametrize(("width", "terminal"), [(80, False), (80, True), (40, True), (10, True)])
def test_a_table_loses_no_word_wherever_it_is_printed(width: int, terminal: bool) -> None:
    names = [f"checkpoint{number}" for number in range(8)]
    text = io.StringIO()
    print_whole(Console(file=text, width=width, force_terminal=terminal, color_system=None), wide_table, names)
    shown = text.getvalue()
    assert "…" not in shown and (not terminal or max(map(len, shown.splitlines())) <= width)
    if width > 10:  # narrower than a column, where words are folded
        assert all(name in shown for name in names) and shown.count("communication") == 8
    assert (max(map(len, shown.splitlines())) > 80) == (not terminal)


def take_all(world: World) -> list[int]:
    """The second rank is slow."""
    tickets, taken = Tickets(world), []
    while (number := tickets.take()) < 12:
        taken.append(number)
        time.sleep(0.2 * world.rank)
    world.barrier()
    return taken


def test_who_is_done_takes_the_next_and_each_goes_to_one(two_processes: ProcessGroup) -> None:
    first, second = two_processes.run(take_all)
    assert sorted(first + second) == list(range(12)) and len(first) > len(second)
