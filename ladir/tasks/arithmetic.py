"""Arithmetic expressions over given numbers: exact evaluation and a normal form, safe on any text.

Nothing is ever evaluated by Python: a text is first checked character by character, then parsed to a syntax tree of
which only the four binary operations and plain integers are accepted.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

OPERATORS = ("+", "-", "*", "/")
_MAX_LENGTH = 2000  # characters; far above any honest expression, keeps hostile text cheap
_MAX_DEPTH = 80  # nested parentheses; the Python parser itself stops at 200
_MAX_DIGITS = 18
_ALLOWED = re.compile(r"[0-9+\-*/() \t\r\n]+")
_NUMBER = re.compile(r"[0-9]+")
_OPERATION: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_INVERSE = {"+": "-", "-": "+", "*": "/", "/": "*"}
_STEP = re.compile(
    r"\s*(-?[0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([-+*/])\s*(-?[0-9]{1,18}(?:\.[0-9]{1,18})?)"
    r"\s*=\s*(-?[0-9]{1,18}(?:\.[0-9]{1,18})?)\s*",
    re.ASCII,
)


class Form(NamedTuple):
    """Normal form of an expression under commutativity and associativity.

    ``kind`` is ``"number"``, ``"+"`` (a sum of signed parts) or ``"*"`` (a product of parts, or of their inverses);
    ``parts`` are (sign, text) pairs in sorted order.  Equal forms are the same solution written differently.
    """

    kind: str
    parts: tuple[tuple[str, str], ...]

    def text(self) -> str:
        """The form as an expression, e.g. ``"(12+3)*3"``."""
        if self.kind == "number":
            return self.parts[0][1]
        return "".join(sign + part for sign, part in self.parts)[1:]


def number_form(value: int) -> Form:
    """The normal form of a single number."""
    return Form("number", (("+", str(value)),))


def combine_forms(operator: str, left: Form, right: Form) -> Form:
    """The normal form of ``left operator right``: sums within sums and products within products are merged."""
    kind = "+" if operator in "+-" else "*"
    right_parts = _as_parts(right, kind)
    if operator in "-/":
        right_parts = tuple((_INVERSE[sign], text) for sign, text in right_parts)
    return Form(kind, tuple(sorted(_as_parts(left, kind) + right_parts)))


def _as_parts(form: Form, kind: str) -> tuple[tuple[str, str], ...]:
    if form.kind == kind:
        return form.parts
    needs_parentheses = form.kind == "+" and kind == "*"
    return ((kind, f"({form.text()})" if needs_parentheses else form.text()),)


def parse_expression(text: str) -> ast.expr | None:
    """Syntax tree of an expression of integers, ``+ - * /`` and parentheses; None for any other text.

    Unary signs, powers, floor divisions, names, calls, other digits than 0-9, over-long and over-nested texts are not
    expressions.  Never raises.
    """
    text = text.strip()
    if len(text) > _MAX_LENGTH or not _ALLOWED.fullmatch(text) or "**" in text or "//" in text:
        return None
    if _depth(text) > _MAX_DEPTH or any(len(digits) > _MAX_DIGITS for digits in _NUMBER.findall(text)):
        return None
    try:
        tree = ast.parse(" ".join(text.split()), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    return tree if _is_arithmetic(tree) else None


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    return deepest


def _is_arithmetic(tree: ast.expr) -> bool:
    """Whether the tree holds nothing but binary operations and integers (walked without recursion)."""
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATION:
            pending += [node.left, node.right]
        elif not (isinstance(node, ast.Constant) and type(node.value) is int):
            return False
    return True


def _numbers_of(text: str, limit: int) -> list[int] | None:
    text = text.strip()
    found = _NUMBER.findall(text[:_MAX_LENGTH])
    if len(text) > _MAX_LENGTH or len(found) > limit or any(len(digits) > _MAX_DIGITS for digits in found):
        return None
    return sorted(int(digits) for digits in found)


def check_expression(expression: str, numbers: Sequence[int], target: int) -> bool:
    """Whether ``expression`` uses every one of ``numbers`` exactly once and is exactly ``target``.

    Any white space, parentheses and order are accepted, and any rational or negative intermediate result.  Never
    raises.
    """
    # The numbers are compared first: afterwards the tree is known to be as small as the puzzle.
    if _numbers_of(expression, len(numbers)) != sorted(numbers):
        return False
    tree = parse_expression(expression)
    if tree is None:
        return False
    try:
        return _evaluate(tree) == target
    except ZeroDivisionError:
        return False


def _evaluate(node: ast.expr) -> Fraction:
    if isinstance(node, ast.BinOp):
        return apply(_OPERATION[type(node.op)], _evaluate(node.left), _evaluate(node.right))
    assert isinstance(node, ast.Constant) and isinstance(node.value, int)  # by _is_arithmetic
    return Fraction(node.value)


def apply(operator: str, left: Fraction, right: Fraction) -> Fraction:
    """``left operator right``, exactly.  Raises ZeroDivisionError."""
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    return left * right if operator == "*" else left / right


def check_steps(lines: Sequence[str], numbers: Sequence[int], target: int) -> bool:
    """Whether the lines ``a op b = c`` turn ``numbers`` into exactly ``[target]``.

    Every line must be exact and consume two numbers that are still there (given, or results of earlier lines), and
    nothing but the target may be left.  A line may hold several steps separated by newlines; empty ones are passed
    over.  Results may be negative or decimal.  Never raises.
    """
    available = [Fraction(number) for number in numbers]
    steps = [step for line in lines for step in line.splitlines() if step.strip()]
    if len(steps) != len(numbers) - 1:
        return False
    for step in steps:
        match = _STEP.fullmatch(step)
        if match is None or not _consume(available, match):
            return False
    return available == [target]


def _consume(available: list[Fraction], match: re.Match[str]) -> bool:
    """Take both operands of a step out of ``available`` and put its result in; False where the step is wrong."""
    for operand in (Fraction(match[1]), Fraction(match[3])):
        if operand not in available:
            return False
        available.remove(operand)
    available.append(Fraction(match[4]))
    return _exact(match)


def ends_in(lines: Sequence[str], target: int) -> bool:
    """Whether every line ``a op b = c`` is exact and the last result is the target, whatever numbers are used.  Never raises."""
    result = None
    for step in (step for line in lines for step in line.splitlines() if step.strip()):
        match = _STEP.fullmatch(step)
        if match is None or not _exact(match):
            return False
        result = Fraction(match[4])
    return result == target


def _exact(step: re.Match[str]) -> bool:
    left, right = Fraction(step[1]), Fraction(step[3])
    return not (step[2] == "/" and right == 0) and apply(step[2], left, right) == Fraction(step[4])


_Operation = tuple[str, Fraction, Fraction]


def steps_agree(lines: Sequence[str], expression: str) -> bool:
    """Whether the steps ``a op b = c`` are exact and compute ``expression``, by its own operations or others of the same normal
    form.  Never raises."""
    steps = _operations_of_steps("\n".join(lines))
    if not steps:
        return False
    tree = parse_expression(expression)
    if tree is not None and _operations_of(tree) == sorted(steps):
        return True
    computed = _expression_of(steps)
    return computed is not None and canonical_expression(computed) == canonical_expression(expression)


def _operations_of_steps(text: str) -> list[_Operation] | None:
    """The operations of a chain in their order, the larger operand of a sum or product first; None unless all are exact."""
    if len(text) > _MAX_LENGTH:
        return None
    found: list[_Operation] = []
    for step in filter(str.strip, text.splitlines()):
        match = _STEP.fullmatch(step)
        if match is None or not _exact(match):
            return None
        found.append(_operation(match[2], Fraction(match[1]), Fraction(match[3])))
    return found


def _operation(operator: str, left: Fraction, right: Fraction) -> _Operation:
    return (operator, right, left) if operator in "+*" and right > left else (operator, left, right)


def _operations_of(tree: ast.expr) -> list[_Operation] | None:
    """All operations of an expression, sorted; None where it divides by zero or is very long."""
    found: list[_Operation] = []

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            left, right, operator = value(node.left), value(node.right), _OPERATION[type(node.op)]
            found.append(_operation(operator, left, right))
            return apply(operator, left, right)
        return _evaluate(node)

    if sum(1 for _ in ast.walk(tree)) > _MAX_LENGTH // 4:
        return None
    try:
        value(tree)
    except ZeroDivisionError:
        return None
    return sorted(found)


def _expression_of(steps: Sequence[_Operation]) -> str | None:
    """The expression that steps compute; None unless they lead to one.  A result of an earlier step stands for that, once."""
    results: list[tuple[Fraction, str]] = []
    for operator, left, right in steps:
        text = f"({_take(results, left)} {operator} {_take(results, right)})"
        results.append((apply(operator, left, right), text))
    return results[0][1] if len(results) == 1 else None


def _take(results: list[tuple[Fraction, str]], value: Fraction) -> str:
    """The expression behind an operand: that of the latest result of this value, which is used up, or its own digits."""
    for place in reversed(range(len(results))):
        if results[place][0] == value:
            return results.pop(place)[1]
    return str(value)


def canonical_expression(expression: str) -> str:
    """Normal form of an expression under commutativity and associativity; other text is returned with its white space
    normalised.  Never raises."""
    tree = parse_expression(expression)
    if tree is None or sum(1 for _ in ast.walk(tree)) > _MAX_LENGTH // 4:
        return " ".join(expression[:_MAX_LENGTH].split())
    return _form_of(tree).text()


def _form_of(node: ast.expr) -> Form:
    if isinstance(node, ast.BinOp):
        return combine_forms(_OPERATION[type(node.op)], _form_of(node.left), _form_of(node.right))
    assert isinstance(node, ast.Constant) and isinstance(node.value, int)  # by _is_arithmetic
    return number_form(node.value)
