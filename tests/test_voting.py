"""Choosing without a label: majority, self-consistency, and what the tasks mean by thoughts that lead to an answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ladir.config import CountdownSettings
from ladir.evaluation.metrics import elected_correct, summarise
from ladir.evaluation.results import QuestionResult, Trajectory
from ladir.evaluation.voting import elect, elections
from ladir.tasks import get_task
from ladir.tasks.arithmetic import steps_agree
from ladir.tasks.countdown import generate


def votes(*answers: tuple[str, bool], consistent: tuple[int, ...] = ()) -> QuestionResult:
    """Trajectories (answer, right); those at the places in ``consistent`` agree with their thoughts."""
    entries = (Trajectory(text, right, text.strip(), consistent=i in consistent) for i, (text, right) in enumerate(answers))
    return QuestionResult("q", tuple(entries), "gold")


def test_the_most_frequent_answer_wins_and_the_first_of_a_tie() -> None:
    assert elected_correct(votes(("a", False), ("b", True), ("b", True))) == 1
    assert elected_correct(votes(("b", True), ("a", False), ("a", False))) == 0
    assert elected_correct(votes(("a", False), ("b", True))) == 0
    assert elected_correct(votes(("b", True), ("a", False))) == 1
    with pytest.raises(ValueError, match="unknown rule 'loudest'; valid: first, majority, consistent, best"):
        elect(votes(("a", True)).trajectories, "loudest")


def test_no_answer_has_no_vote_while_there_are_others() -> None:
    assert elect(votes(("", False), (" ", False), ("a", True)).trajectories).answer == "a"
    assert elect(votes(("", False), (" ", False)).trajectories).answer == ""


def test_self_consistency_hears_only_those_whose_thoughts_lead_to_their_answer() -> None:
    question = votes(("a", False), ("a", False), ("b", True), ("c", False), consistent=(2, 3))
    assert elect(question.trajectories).answer == "a"
    assert elect(question.trajectories, "consistent").answer == "b"
    nobody = votes(("a", False), ("b", True), ("b", True))
    assert elect(nobody.trajectories, "consistent").answer == "b"


def test_fewer_voters_hold_several_elections() -> None:
    question = votes(("a", False), ("b", True), ("b", True), ("b", True), ("a", False), ("a", False), ("b", True))
    assert [entry.answer for entry in elections(question, "majority").trajectories] == ["b"]
    assert [entry.answer for entry in elections(question, "majority", 3).trajectories] == ["b", "a"]  # the seventh is left over
    assert [entry.answer for entry in elections(question, "majority", 1).trajectories] == list("abbbaab")
    assert elections(question, "majority", 100) == elections(question, "majority")
    assert elections(question, "majority").reference == "gold"
    summary = summarise([elections(question, "majority", 3)] * 12, samples=1)
    assert summary["pass@1"] == 0.5
    assert summary["pass@10"] is None
    assert summary["pass_curve"] == {"1": 0.5}


@given(st.lists(st.tuples(st.sampled_from(["", "a", "b", "c"]), st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_the_elected_is_one_of_the_most_frequent(entries: list[tuple[str, bool, bool]]) -> None:
    trajectories = [Trajectory(text, right, text, consistent=agrees) for text, right, agrees in entries]
    winner = elect(trajectories)
    answers = [entry.canonical for entry in trajectories if entry.canonical]
    assert winner in trajectories
    if answers:
        assert answers.count(winner.canonical) == max(map(answers.count, answers))
    agreeing = [entry for entry in trajectories if entry.consistent and entry.canonical]
    assert not agreeing or elect(trajectories, "consistent").consistent


@pytest.mark.parametrize(
    ("thoughts", "answer", "agrees"),
    [
        (["12 + 7 = 19", "19 + 3 = 22"], "12 + 7 + 3", True),
        (["12 + 7 = 19", "19 + 3 = 22"], "( 3 + 12 ) + 7", True),  # the same sum
        (["12 + 7 = 19\n19 + 3 = 22"], "3 + ( 7 + 12 )", True),  # two steps in one block
        (["12 + 7 = 19", "19 - 3 = 16"], "12 + 7 + 3", False),
        (["12 + 7 = 18", "18 + 3 = 21"], "12 + 7 + 3", False),  # inexact
        (["12 + 7 = 19"], "12 + 7 + 3", False),
        (["12 + 7 = 19", "3 + 2 = 5"], "12 + 7", False),  # a step that leads nowhere
        (["7 / 2 = 3.5", "3.5 * 2 = 7"], "( 7 / 2 ) * 2", True),
        (["7 / 0 = 7"], "7 / 0", False),
        (["nonsense"], "nonsense", False),
        ([], "", False),
        (["4 + 4 = 8", "2 * 4 = 8", "8 - 8 = 0"], "( 4 + 4 ) - 2 * 4", True),  # either 8 may be meant
        (["4 + 4 = 8", "4 * 2 = 8", "8 - 8 = 0"], "2 * 4 - ( 4 + 4 )", True),
        (["5 + 5 = 10", "10 / 10 = 1", "8 - 1 = 7"], "8 - ( 10 / ( 5 + 5 ) )", True),
        (["1 - 1 = 0"], "1 - ( 1", False),
        (["1 - 1 = 0"], "1 / 0", False),
    ],
)
def test_countdown_thoughts_lead_to_the_expression_they_compute(thoughts: list[str], answer: str, agrees: bool) -> None:
    assert get_task("countdown").agrees(thoughts, answer) is agrees


def test_every_gold_chain_leads_to_its_gold_answer() -> None:
    splits = generate(CountdownSettings(numbers=4, max_number=10, train=60, validation=1, test=1), seed=3)
    for record in splits.train:
        *steps, answer = record["output"].split("\n")
        assert get_task("countdown").agrees(steps, answer.removeprefix("#### "))


def test_hostile_steps_stay_cheap() -> None:
    assert not steps_agree(["1 + 1 = 2"] * 3000, "1 + 1")
    assert not steps_agree([f"{i} + 1 = {i + 1}" for i in range(1000)], "+".join(["1"] * 900))
    assert steps_agree([f"{2**i} + {2**i} = {2 ** (i + 1)}" for i in range(30)], "+".join(["1", *(str(2**i) for i in range(30))]))
    assert not steps_agree(["9 * 9 = 81"], "*".join(["9" * 18] * 100))


@pytest.mark.parametrize(
    ("thoughts", "answer", "agrees"),
    [
        (["3 * 12 = 36 eggs.", "36 - 5 = 31 are left."], "31", True),
        (["36 - 5 = 31 are left."], "31 eggs", True),
        (["36 - 5 = 31 are left."], "30", False),
        (["31 + 5 = 36 eggs."], "31", False),
        (["She thinks."], "31", False),
        ([], "31", False),
    ],
)
def test_maths_thoughts_lead_to_the_number_they_end_in(thoughts: list[str], answer: str, agrees: bool) -> None:
    assert get_task("maths").agrees(thoughts, answer) is agrees
