"""Maths problems (GSM8K, MATH and the like): an answer is right if it equals the gold one as mathematics.

Quantities, times, choices and words are compared here.  Everything else (formulas, equations, inequalities, lists, sets,
intervals, matrices) is compared by SymPy in a process of its own, which is killed where a text makes it compute or allocate
without end.  An answer that cannot be read or compared is undecided, which counts as wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

from ladir.data.records import Record
from ladir.errors import UnusableError
from ladir.tasks.mathematics.forms import Form
from ladir.tasks.mathematics.prose import Reading, answer_of, loosely, read_answer
from ladir.tasks.mathematics.quantities import last_number, same, same_time
from ladir.tasks.mathematics.spelling import folded_words, spelled
from ladir.tasks.mathematics.tolerance import gold_numbers, within
from ladir.tasks.mathematics.units import stem
from ladir.tasks.verdict import Verdict
from ladir.tasks.worker import Worker

_SCRIPT = Path(__file__).with_name("isolated") / "maths_worker.py"
_ENDLESS = "took too long or too much memory to compare"
_PLAIN_WORDS = tuple((stem(word),) for word in ("yes", "no", "true", "false"))
_CHOICES = re.compile(r"(?:\([A-H]\)|[A-H])(?:(?:\s*[,;&]\s*|\s*\band\b\s*|\s*,\s*and\b\s*)?(?:\([A-H]\)|[A-H])){1,7}\.?")
_RIGHT, _WRONG = Verdict(True), Verdict(False, "not equal")


def plain_number(text: str) -> Fraction | None:
    """The number of a text that states just one, maybe with a currency, unit or words, or behind ``=``, exactly; else None."""
    quantity = read_answer(answer_of(text)).quantity
    return None if quantity is None else quantity.value


def plain_text(text: str) -> str:
    """The text without case, white space, a final full stop, and what only changes its looks."""
    text = spelled(text)
    text = " ".join(folded_words(text).split()).rstrip(".")
    text = re.sub(r"(?<!\w) | (?!\w)", "", text)  # between two words or numbers it counts
    choice = re.fullmatch(r"\(?([A-Za-z])\)?", text)
    return choice[1] if choice else text


class MathsTask:
    """Judges answers as mathematics; obvious cases are decided without computer algebra."""

    name = "maths"

    def __init__(self, seconds: float = 5.0, memory: int = 1 << 30, tolerance: float = 0.0) -> None:
        """``seconds`` of processor time and ``memory`` (bytes) that judging one answer may take.

        ``tolerance``: decimal gold numbers accept what is within such a share of them (:mod:`ladir.tasks.mathematics.tolerance`);
        0: what equals them.
        """
        self.tolerance = tolerance
        # The process ends itself at its own limit; a wall time above it is for one that waits for other work.
        worker = Worker(_SCRIPT, [str(seconds), str(memory)], seconds=10 * seconds)
        deadly: set[str] = set()  # answers that had to be killed: each costs its time once

        def ask(request: dict[str, Any], answer: str) -> dict[str, Any]:
            reply = None if answer in deadly else worker.ask(request)
            if reply is None:
                deadly.add(answer)
            return reply or {"undecided": _ENDLESS}

        # Trajectories of one question often agree: each pair of forms is compared once.
        @lru_cache(maxsize=8192)
        def compare(gold: str, answer: str) -> Verdict:
            reply = ask({"gold": json.loads(gold), "answer": json.loads(answer)}, answer)
            if "undecided" in reply:
                return Verdict(False, reply["undecided"], undecided=True)
            return _RIGHT if reply["equal"] else _WRONG

        @lru_cache(maxsize=8192)
        def canonical(form: str) -> str | None:
            return ask({"form": json.loads(form)}, form).get("canonical")

        @lru_cache(maxsize=8192)
        def values(form: str) -> tuple[float, ...]:
            return tuple(ask({"numbers": json.loads(form)}, form).get("values", ()))

        self._compare, self._canonical, self._values = compare, canonical, values

    def check(self, record: Record) -> None:
        """Raise UnusableError where the record has no answer to compare with."""
        if not record.answer:
            raise UnusableError(
                f'{record.source}: it has no final answer to compare with; give it a field "answer", name the one that has '
                "it (data.answer_field), or mark it in the text (data.answer_prefixes, \\boxed)"
            )

    def verdict(self, answer: str, record: Record) -> Verdict:
        """Whether the answer equals the record's; one that cannot be read or compared is undecided."""
        gold, given = answer_of(record.answer), answer_of(answer)
        if not plain_text(given):
            return Verdict(False, "no answer")
        found = _RIGHT if _same_text(gold, given) else self._judge(gold, given)
        return found if found.right or not self._tolerated(record.answer, given) else _RIGHT

    def unread(self, record: Record) -> bool:
        """Whether the record's own answer is mathematics that cannot be read; words are compared as words."""
        gold_text = answer_of(record.answer)
        gold = read_answer(gold_text, gold=True)
        if gold.label or gold.time or gold.based or gold.ratio or gold.quantity or _several_choices(gold_text):
            return False
        if gold.form is None:
            return gold.mathematical
        form = json.dumps(gold.form)
        return self._compare(form, form).undecided

    def _tolerated(self, gold: str, given: str) -> bool:
        """Whether an answer that is not equal is near enough."""
        if not (self.tolerance and (numbers := gold_numbers(gold))):
            return False
        reading = read_answer(given)
        if reading.quantity is not None:
            return within(numbers, _as_float(reading.quantity.value), self.tolerance)
        return reading.form is not None and within(numbers, self._values(json.dumps(reading.form)), self.tolerance)

    def _judge(self, gold_text: str, given_text: str) -> Verdict:
        if _several_choices(gold_text) and _several_choices(gold_text) == _several_choices(given_text):
            return _RIGHT
        gold, given = read_answer(gold_text, gold=True), read_answer(given_text)
        if gold.label and given.label:
            return Verdict(gold.label == given.label, "" if gold.label == given.label else "another choice")
        if (gold.label and gold.rest) or (given.label and given.rest and not gold.label):
            return self._judge(gold.rest or gold_text, given.rest or given_text)
        if (decided := _decided(gold, given)) is not None:
            return decided
        if gold.quantity and not gold.quantity.unit and given.quantity is None and (loose := loosely(given.form)):
            return _verdict(same(gold.quantity, loose))
        if gold.form is None or given.form is None:
            return _words_differ(gold, given)
        return self._compare(json.dumps(gold.form), json.dumps(given.form))

    def chain_correct(self, thoughts: Sequence[str], record: Record) -> bool | None:
        """None: free-form steps are not judged."""
        return None

    def lenient(self, thoughts: Sequence[str], record: Record) -> bool | None:
        """None: published figures are of answers."""
        return None

    def agrees(self, thoughts: Sequence[str], answer: str) -> bool | None:
        """Whether the last thought ends in the answer: in its number or, where it is none, in its text."""
        last, given = answer_of(thoughts[-1]) if thoughts else "", answer_of(answer)
        number = plain_number(given)
        if number is None:
            return bool(plain_text(given)) and plain_text(last).endswith(plain_text(given))
        return number in (plain_number(last), last_number(spelled(last)))

    def canonical(self, answer: str) -> str:
        """A number as a reduced fraction, a form in the computer algebra's spelling, else :func:`plain_text`."""
        given = answer_of(answer)
        reading = read_answer(given)
        if reading.label:
            return reading.label
        if reading.quantity is not None:
            return str(reading.quantity.value)
        form: Form | None = reading.form if reading.mathematical else None
        return (self._canonical(json.dumps(form)) if form else None) or plain_text(given)


def _as_float(value: Fraction) -> tuple[float, ...]:
    """The number; nothing where it is more than a float holds."""
    try:
        return (float(value),)
    except OverflowError:
        return ()


def _same_text(gold: str, given: str) -> bool:
    return plain_text(gold) == plain_text(given)


def _several_choices(text: str) -> frozenset[str]:
    """The letters of several choices: ``AC``, ``A, C``, ``(A) and (C)``; empty where it is anything else."""
    match = _CHOICES.fullmatch(spelled(text))
    letters = re.findall(r"[A-H]", text) if match else []
    return frozenset(letters) if len(set(letters)) == len(letters) else frozenset()


def _decided(gold: Reading, given: Reading) -> Verdict | None:
    """The verdict where no formula has to be compared; None where one has."""
    if (gold.time and given.time) or ((gold.time or given.time) and not (gold.ratio or given.ratio)):
        return _times(gold, given)
    if gold.based or given.based:
        return Verdict(gold.based == given.based, "" if gold.based == given.based else "another base or number")
    if gold.ratio or given.ratio:
        return _ratios(gold, given)
    if gold.quantity and given.quantity and not _differ_in_names(gold.form, given.form):
        return _verdict(same(gold.quantity, given.quantity))
    if not gold.mathematical and gold.form is None:
        return _same_words(gold, given)
    return None


def _differ_in_names(gold: Form | None, given: Form | None) -> bool:
    """Whether both are equations, of different left sides."""
    return bool(gold and given and gold[0] == given[0] == "equation" and gold[1] != given[1])


def _times(gold: Reading, given: Reading) -> Verdict:
    if gold.time and given.time:
        return _verdict(same_time(gold.time, given.time), "does not say which half of the day")
    if given.time and gold.quantity and not gold.quantity.unit:
        return _verdict(gold.quantity.value * 60 == (given.time.minutes or 720))
    return _WRONG


def _ratios(gold: Reading, given: Reading) -> Verdict:
    if gold.ratio and given.ratio:
        return _verdict(gold.ratio == given.ratio)
    ratio, other = (gold.ratio, given.quantity) if gold.ratio else (given.ratio, gold.quantity)
    return _verdict(bool(ratio and other and len(ratio) == 2 and ratio[1] == 1 and ratio[0] == other.value))


def _verdict(same_: bool | None, otherwise: str = "") -> Verdict:
    if same_ is None:
        return Verdict(False, otherwise, undecided=True)
    return _RIGHT if same_ else _WRONG


def _same_words(gold: Reading, given: Reading) -> Verdict:
    """Whether an answer says the gold one's words, or begins with its yes or no."""
    wanted = gold.words[-1]
    if wanted in given.words or gold.words[0] in given.words or _listed(wanted) in map(_listed, given.words):
        return _RIGHT
    first = given.words[0][:1]
    plain = wanted in _PLAIN_WORDS and first == wanted and given.opens
    return _verdict(plain)


def _listed(words: tuple[str, ...]) -> list[str]:
    """What is joined by "and" and commas, in alphabetical order."""
    return sorted(part.strip() for part in re.split(r" (?:and|,|&|or)(?= )", f" {' '.join(words)}") if part.strip())


def _words_differ(gold: Reading, given: Reading) -> Verdict:
    """The verdict where one of two cannot be read as mathematics."""
    if gold.words[0] in given.words:
        return _RIGHT
    if given.form is None and not given.mathematical:
        return Verdict(False, "no value in the answer")
    unread = "the gold answer" if gold.form is None and gold.quantity is None else "the answer"
    return Verdict(False, f"{unread} cannot be read", undecided=True)
