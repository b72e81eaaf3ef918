"""Metrics against enumeration and simulation, results files round trip, tables and plots."""

from __future__ import annotations

import io
import itertools
import json
import math
import random
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from ladir.data.records import Record
from ladir.evaluation.metrics import confidence_interval, distinct_correct, pass_at_k, standard_error, summarise
from ladir.evaluation.report import examples, results_table
from ladir.evaluation.results import (
    MethodResult,
    QuestionResult,
    Trajectory,
    judge,
    read_questions,
    read_results,
    write_questions,
    write_results,
)
from ladir.report.fitting import print_text
from ladir.report.tables import html_table, markdown_table
from ladir.tasks import get_task


def question(*answers: tuple[str, bool], chain: bool | None = None) -> QuestionResult:
    return QuestionResult("q", tuple(Trajectory(text, right, text, chain_correct=chain) for text, right in answers))


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_equals_the_share_of_subsets_with_a_right_sample(n: int) -> None:
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_is_exact_for_large_samples_and_refuses_impossible_ones() -> None:
    assert pass_at_k(100, 37, 1) == pytest.approx(0.37)
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)
    assert math.copysign(1, pass_at_k(10, 0, 3)) == 1
    for n, c, k in [(10, 11, 1), (10, -1, 1), (10, 5, 0), (10, 5, 11)]:
        with pytest.raises(ValueError):
            pass_at_k(n, c, k)


def test_distinct_correct_counts_normal_forms_of_right_answers_only() -> None:
    assert distinct_correct(question(("a", True), ("a", True), ("b", True), ("c", False))) == 2
    assert distinct_correct(question(("c", False), ("d", False))) == 0


def test_summary_means_and_standard_errors_are_by_question() -> None:
    questions = [
        question(("a", True), ("b", False), chain=True),
        question(("a", False), ("b", False), chain=False),
        question(("a", True), ("b", True), chain=True),
    ]
    summary = summarise(questions, ks=(1, 2, 10))
    assert summary["pass@1"] == pytest.approx(0.5)
    assert summary["pass@2"] == pytest.approx(2 / 3)
    assert summary["pass@10"] is None
    assert summary["chain"] == pytest.approx(2 / 3)
    assert summary["distinct_correct"] == pytest.approx(1.0)
    assert summary["standard_errors"]["pass@1"] == pytest.approx(0.5 / math.sqrt(3))
    assert summary["standard_errors"]["pass@10"] is None
    assert summary["pass_curve"] == {"1": pytest.approx(0.5), "2": pytest.approx(2 / 3)}


def test_questions_that_were_not_asked_count_as_not_solved() -> None:
    asked = [question(("a", True), ("b", False), chain=True), question(("a", True), ("b", True), chain=True)]
    nothing = QuestionResult("q", (Trajectory("", False, "", chain_correct=False),) * 2)
    found, expected = summarise(asked, ks=(1, 2), unasked=2), summarise([*asked, nothing, nothing], ks=(1, 2))
    assert found["pass@1"] == pytest.approx(0.375) and found["pass@2"] == pytest.approx(0.5)
    for name in ("pass@1", "pass@2", "chain", "distinct_correct", "majority", "pass_curve", "undecided"):
        assert found[name] == expected[name]
        assert found["standard_errors"].get(name) == expected["standard_errors"].get(name)
    assert found["stopped"] == 1 and summarise(asked) == summarise(asked, unasked=0)


def test_summary_without_chain_verdicts_and_of_nothing() -> None:
    summary = summarise([question(("a", True), chain=None)])
    assert summary["chain"] is None and summary["lenient"] is None
    assert summary["standard_errors"]["pass@1"] is None
    with pytest.raises(ValueError, match="no questions"):
        summarise([])
    with pytest.raises(ValueError, match="no trajectories"):
        QuestionResult("q", ())


def test_standard_error_matches_the_spread_of_repeated_means() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    variance_of_mean = sum((v - 0.6) ** 2 for v in values) / 4 / 5
    assert standard_error(values) == pytest.approx(math.sqrt(variance_of_mean))


def wilson(k: int, n: int) -> tuple[float, float]:
    """The two rates at which k of n would lie 1.96 standard errors off, by bisection."""

    def distance(rate: float) -> float:
        return abs(k / n - rate) - 1.959964 * math.sqrt(rate * (1 - rate) / n)

    ends = []
    for inside, outside in ((k / n, -1e-12), (k / n, 1 + 1e-12)):
        for _ in range(100):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if 0 <= middle <= 1 and distance(middle) <= 0 else (inside, middle)
        ends.append(inside)
    return ends[0], ends[1]


@pytest.mark.parametrize(("k", "n"), [(3, 10), (0, 10), (10, 10), (213, 300), (1, 2)])
def test_intervals_of_rights_and_wrongs_are_wilsons(k: int, n: int) -> None:
    assert confidence_interval([1.0] * k + [0.0] * (n - k)) == pytest.approx(wilson(k, n), abs=1e-6)


def test_intervals_of_shares_are_narrower_than_of_single_answers_and_counts_are_symmetric() -> None:
    low, high = confidence_interval([0.4, 0.5, 0.6, 0.5]) or [0, 0]
    assert 0.4 < low < 0.5 < high < 0.6
    assert confidence_interval([0.3] * 10) == confidence_interval([0.3] * 10)
    low, high = confidence_interval([0.3] * 10) or [0, 0]
    assert low < 0.3 < high  # equal shares are no certainty
    counts = [0.0, 1.0, 3.0, 2.0]
    error = standard_error(counts) or 0
    assert confidence_interval(counts) == pytest.approx([1.5 - 1.959964 * error, 1.5 + 1.959964 * error])
    assert confidence_interval([1.0]) is None


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = random.Random(0)
    hits = 0
    for _ in range(400):
        values = [sum(rng.random() < rate for _ in range(5)) / 5 for rate in (rng.betavariate(2, 1) for _ in range(60))]
        low, high = confidence_interval(values) or [0, 0]
        hits += low <= 2 / 3 <= high
    assert 0.92 <= hits / 400 <= 0.98


def test_judge_asks_the_task() -> None:
    record = Record("3 7 12 -> 22", ("12 + 7 = 19",), "12 + 7 + 3", "f:1", {"numbers": [3, 7, 12], "target": 22})
    task = get_task("countdown")
    right = judge(task, record, "12 + 7 + 3", ["12 + 7 = 19", "19 + 3 = 22"])
    assert right.correct
    assert right.chain_correct and right.lenient
    assert right.canonical == task.canonical("3 + ( 7 + 12 )")
    wrong = judge(task, record, "( 12 + 3 ) + 3 + 4", ["12 + 7 = 19", "19 + 3 = 23"], stopped=False)
    assert not wrong.correct and wrong.reason and not right.reason
    assert judge(task, record, " ").reason == "no answer"
    assert not wrong.chain_correct
    assert not wrong.stopped


def rendered(item: RenderableType) -> str:
    file = io.StringIO()
    Console(width=80, file=file).print(item)
    return file.getvalue()


def results(folder: Path) -> Path:
    many = [question(*[("a", i % 2 == 0) for i in range(20)], chain=True) for _ in range(3)]
    one = [question(("a", True))] * 3
    methods = [
        MethodResult(
            "ladir",
            summarise(many),
            seconds_per_question=0.25,
            training_seconds=480.0,
            wall_seconds=12.5,
            forward_passes_per_question=1234.4,
            flops_per_question=1e12,
            training_steps=3102,
        ),
        MethodResult("ar-greedy", summarise(one), seconds_per_question=0.01, training_seconds=480.5),
    ]
    write_results(folder / "results.json", methods, task="countdown", num_questions=3, num_trajectories=20, seed=1, split="test")
    return folder / "results.json"


def test_results_file_holds_what_readers_expect(tmp_path: Path) -> None:
    content = json.loads(results(tmp_path).read_text())
    assert [row["undecided"] for row in content["rows"]] == [0, 0]
    assert {"task", "num_questions", "num_trajectories", "seed", "rows"} <= content.keys()
    expected = {"method", "pass@1", "pass@10", "pass@100", "chain", "distinct_correct"}
    for row in content["rows"]:
        assert expected | {"seconds_per_question", "training_seconds"} <= row.keys()
        assert {"wall_seconds", "forward_passes_per_question", "flops_per_question"} <= row.keys()
        assert row["standard_errors"].keys() == row["confidence_intervals"].keys()
    assert content["rows"][0]["pass@1"] == 0.5
    assert [row["training_steps"] for row in content["rows"]] == [3102, None]
    assert content["rows"][1]["pass@10"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]  # nothing left aside


def test_reading_something_else_as_results_says_so(tmp_path: Path) -> None:
    for text in ["{", "[]", '{"rows": 3}']:
        path = tmp_path / "results.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"results\.json.*evaluate"):
            read_results(path)


def test_results_of_earlier_versions_are_read_as_those_of_now(tmp_path: Path) -> None:
    path = results(tmp_path)
    now = read_results(path)
    path.write_text(path.read_text().replace('"seconds_by_process"', '"seconds_by_rank"'))
    assert "seconds_by_rank" in path.read_text() and read_results(path) == now


def test_the_table_s_foot_says_who_was_trained_for_how_many_steps(tmp_path: Path) -> None:
    path = results(tmp_path)
    content = read_results(path)
    first, second = content["rows"]
    assert "training steps: 3,102 ladir\n" in str(results_table(content).caption) + "\n"
    rows = [first, {**second, "training_steps": 4660}, {**first, "method": "ladir-sde"}]
    assert "training steps: 3,102 ladir, ladir-sde; 4,660 ar-greedy" in str(results_table({**content, "rows": rows}).caption)
    head, _, *lines = markdown_table(rows[:2]).splitlines()
    assert head.endswith("| training seconds | training steps |")
    assert [line.split(" | ")[-1] for line in lines] == ["3102 |", "4660 |"]
    for row in content["rows"]:  # as earlier versions wrote it
        del row["training_steps"]
    path.write_text(json.dumps(content))
    earlier = read_results(path)
    assert "training steps" not in rendered(results_table(earlier)) + html_table(earlier["rows"])


def test_questions_round_trip(tmp_path: Path) -> None:
    written = {
        "ladir": [QuestionResult("q é", (Trajectory("a", True, "A", ("1 + 1 = 2",), True, False, True, "why", True),), "gold")],
        "ar": [question(("x", False), ("y", True))],
    }
    write_questions(tmp_path / "questions.jsonl", written)
    assert read_questions(tmp_path / "questions.jsonl") == written


def test_table_shows_every_method_with_errors_and_dashes(tmp_path: Path) -> None:
    content = read_results(results(tmp_path))
    text = rendered(results_table(content))
    assert "ladir" in text
    alone = [{**row, "chain": None} for row in content["rows"]]
    assert "the thoughts alone" in text and "the thoughts alone" not in rendered(results_table({**content, "rows": alone}))
    assert "50.0 ± 0.0" in text
    wide = {**content["rows"][0], "method": "ladir-consistent", "pass@10": 1.0, "pass@100": 1.0, "training_seconds": 1234567.0}
    long = rendered(results_table({**content, "rows": [wide]}))
    assert "…" not in long and max(map(len, long.splitlines())) <= 80
    assert "1234" in text
    assert "…" not in text  # fits a narrow terminal


def test_results_on_what_is_held_out_stand_in_a_column(tmp_path: Path) -> None:
    content = read_results(results(tmp_path))
    (first, *_) = content["rows"]
    other = {**content, "rows": [{**first, "pass@1": 0.125}]}
    text = rendered(results_table(content, other))
    assert "held" in text and "held out: pass@1 on questions of kinds that no training record has" in text
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert lines[first["method"]][-3:-2] == ["12.5"] and lines[content["rows"][1]["method"]][-1] == "-"


def test_the_table_s_foot_says_what_the_figures_do_not(tmp_path: Path) -> None:
    content = read_results(results(tmp_path))
    assert rendered(results_table(content)).count("\n") == rendered(results_table({**content, "left_out": {"number": 0}})).count(
        "\n"
    )
    gold = {"judged": 3, "refused": 1, "on_bad_gold": "ignore"}
    told = {**content, "left_out": {"number": 2, "counted": True}, "gold": gold}
    told["rows"] = [{**content["rows"][0], "undecided": 7}, content["rows"][1]]
    text = " ".join(rendered(results_table(told)).split())
    assert "2 of 5 questions were not asked (see data.on_bad_record); they count as not solved" in text
    assert "1 of 3 own answers are refused by the task's checker: asked all the same" in text
    assert "answers that could not be judged, counted as wrong: ladir 7" in text
    told |= {"left_out": {"number": 2, "counted": False}, "gold": {**gold, "on_bad_gold": "skip", "unread": 2}}
    text = " ".join(rendered(results_table(told)).split())
    assert "2 of 3 own answers cannot be read: the same text is right there, the rest undecided" in text
    assert "; no figure counts them" in text and "left out of all figures" in text


def test_examples_show_thoughts_and_verdict() -> None:
    shown = QuestionResult("3 7 -> 10", (Trajectory("3 + 7", True, "3+7", ("3 + 7 = 10",)),) * 2)
    text = rendered(examples([shown] * 5, 1))
    assert text.count("3 7 -> 10") == 1
    assert "3 + 7 = 10" in text
    assert "2 of 2" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_examples_lose_no_word(terminal: bool) -> None:
    """A line of a log is as long as its thought; a terminal's are wrapped."""
    words = [[f"{part}{number}" for number in range(40)] for part in ("asked", "thought", "answered")]
    asked, thought, answer = map(" ".join, words)
    text = io.StringIO()
    console = Console(file=text, width=80, force_terminal=terminal, color_system=None)
    print_text(console, examples([QuestionResult(asked, (Trajectory(answer, True, answer, (thought,)),))], 1))
    shown = text.getvalue()
    assert {word for part in words for word in part} <= set(shown.split())
    assert (max(map(len, shown.splitlines())) <= 80) == terminal and (thought in shown) == (not terminal)
