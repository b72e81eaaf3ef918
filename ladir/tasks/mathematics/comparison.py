"""When two forms (:mod:`ladir.tasks.mathematics.forms`) are equal as mathematics.

No tolerance: rational numbers are compared exactly, others and formulas with variables, at points, to 400 digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import sympy

from ladir.tasks.mathematics.forms import Form, names_a_value
from ladir.tasks.mathematics.formula import UnreadableError, read_formula

#: digits to which values are compared: a few sort out nearly all that differ
_DIGITS = (60, 400)
#: values of the variables where formulas are compared; of whole numbers (n, k, ...) and of others
_POINTS = tuple(
    (sympy.Rational(a, 97), sympy.Rational(b, 89)) for a, b in ((131, 61), (-211, 54), (29, -127), (-67, -101), (353, 17))
)
_WHOLE = frozenset("nmkj")
_TURNED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "\\ne": "\\ne"}
_SETS: dict[str, Callable[..., Any]] = {"<": sympy.Lt, ">": sympy.Gt, "\\le": sympy.Le, "\\ge": sympy.Ge, "\\ne": sympy.Ne}


def equal(gold: Form, answer: Form) -> bool:
    """Whether the answer's form equals the gold one.  Raises UnreadableError where that cannot be told."""
    gold, answer = _unwrapped(gold), _unwrapped(answer)
    if gold[0] == "equation" and answer[0] == "equation":
        return _equations(gold, answer)
    if answer[0] == "equation":
        return gold[0] in ("scalar", "tuple", "set", "union", "empty", "list") and _states(answer) and equal(gold, answer[2])
    if gold[0] == "equation":
        return answer[0] != "relation" and _states(gold) and equal(gold[2], answer)
    if {gold[0], answer[0]} == {"scalar", "set"}:
        members = _distinct(gold[1] if gold[0] == "set" else answer[1])
        return len(members) == 1 and (equal(members[0], answer) if gold[0] == "set" else equal(gold, members[0]))
    if gold[0] == "scalar" and answer[0] == "scalar":
        return _labels(gold, answer) and _scalars(gold, answer)
    if {gold[0], answer[0]} == {"scalar", "tuple"}:
        return _components(*((gold, answer) if gold[0] == "scalar" else (answer, gold)))
    if "list" in (gold[0], answer[0]) and (found := _lists(gold, answer)) is not None:
        return found
    if gold[0] == answer[0] == "empty":
        return True
    if gold[0] == answer[0] == "set":
        return _matched(_distinct(gold[1]), _distinct(answer[1]))
    if gold[0] == answer[0] == "tuple" and len(gold[3]) != 2:
        return len(gold[3]) == len(answer[3]) and all(map(equal, gold[3], answer[3]))
    if gold[0] == answer[0] == "tuple":
        return list(gold[1:3]) == list(answer[1:3]) and all(map(equal, gold[3], answer[3]))
    if gold[0] == answer[0] == "relation" and _relations(gold, answer):
        return True
    return _as_sets(gold, answer)


def canonical(form: Form) -> str:
    """A text that equal forms have in common, as far as rearranging goes."""
    kind = form[0]
    if kind == "scalar":
        return _arranged(read_formula(form[1]))
    if kind == "equation":
        form = _unwrapped(form)
        if form[0] != "equation" or names_a_value(form[1]) or form[2][0] != "scalar":
            return canonical(form[2] if form[0] == "equation" else form)
        return f"{_primitive(read_formula(form[1]) - read_formula(form[2][1]))} = 0"
    if kind == "relation":
        return " ".join(f"{_arranged(read_formula(value))} {sign}" for value, sign in zip(form[2], [*form[1], ""], strict=True))
    if kind == "difference":
        return f"{kind} {[canonical(entry) for entry in form[1]]}"
    if kind in ("list", "set", "union"):
        return f"{kind} {sorted(map(canonical, form[-1]))}"
    return f"{form[1]}{', '.join(map(canonical, form[3]))}{form[2]}" if kind == "tuple" else kind


def values(form: Form) -> list[float]:
    """The real number that a form states, or those of a list, set or tuple.  UnreadableError where it states none."""
    form = _unwrapped(form)
    if form[0] == "equation":
        return values(form[2])
    if form[0] in ("list", "set", "tuple"):
        return [number for entry in form[-1] for number in values(entry)]
    value = sympy.N(read_formula(form[1]), _DIGITS[0]) if form[0] == "scalar" else None
    if not (isinstance(value, sympy.Expr) and value.is_number and value.is_real):
        raise UnreadableError("no number")
    if not math.isfinite(number := float(value)):
        raise UnreadableError("no number that a float holds")
    return [number]


def _unwrapped(form: Form) -> Form:
    """The one member of a list or union for it."""
    return form[-1][0] if form[0] in ("list", "union") and len(form[-1]) == 1 else form


def _labels(gold: Form, answer: Form) -> bool:
    """Whether the units agree; one that only one side names is passed over."""
    return not gold[2] or not answer[2] or gold[2] == answer[2]


def _scalars(gold: Form, answer: Form) -> bool:
    one, other = read_formula(gold[1]), read_formula(answer[1])
    if same_value(one, other):
        return True
    if (gold[2] == "%") != (answer[2] == "%") and not (gold[2] and answer[2]):
        return same_value(one / 100, other) if gold[2] else same_value(one, other / 100)
    return False


def same_value(one: Any, other: Any) -> bool:
    """Whether two expressions or matrices are equal.  Raises UnreadableError where they have no value to compare."""
    if isinstance(one, sympy.MatrixBase) or isinstance(other, sympy.MatrixBase):
        shapes = getattr(one, "shape", None), getattr(other, "shape", None)
        return shapes[0] == shapes[1] and all(map(same_value, one, other))
    if one == other:
        return True
    if any(value.has(sympy.nan, sympy.zoo) for value in (one, other)):
        raise UnreadableError("an expression without a value")
    names = one.free_symbols | other.free_symbols
    if (one.is_Rational and other.is_Rational) or one.has(sympy.oo, -sympy.oo) or other.has(sympy.oo, -sympy.oo):
        return False
    if one.atoms(sympy.core.function.AppliedUndef) | other.atoms(sympy.core.function.AppliedUndef):
        return bool(sympy.simplify(one - other) == 0)
    if not names:
        return _same_number(one, other)
    return _same_everywhere(one, other, sorted(names, key=str))


def _same_everywhere(one: Any, other: Any, names: Sequence[Any]) -> bool:
    """Whether two formulas have the same value wherever both are real, or, where they never are, everywhere."""
    real, all_ = list[bool](), list[bool]()
    for point in _points(names):
        values = [value.subs(point) for value in (one, other)]
        shown = [sympy.N(value, _DIGITS[0]) for value in values]
        if not all(value.is_number and value.is_finite for value in shown):
            continue
        all_.append(_same_number(*values))
        if all(abs(sympy.im(value)) <= _near_zero(_DIGITS[0]) for value in shown):
            real.append(all_[-1])
    if not all_:
        raise UnreadableError("formulas that have no value where they are compared")
    return all(real or all_)


def _same_number(one: Any, other: Any) -> bool:
    """Whether two numbers agree in so many digits; where both are nearly zero, whether their difference simplifies to it."""
    for digits in _DIGITS:
        values = [sympy.N(value, digits) for value in (one, other)]
        distance, limit = abs(values[0] - values[1]), _near_zero(digits)
        if distance > limit * max(map(abs, values)):
            if distance > limit:
                return False
            continue
    return bool(distance <= limit * max(map(abs, values)) or sympy.simplify(one - other) == 0)


def _near_zero(digits: int) -> Any:
    return sympy.Float(10, 30) ** (-digits * 3 // 4)


def _points(names: Sequence[Any]) -> Iterable[Mapping[Any, Any]]:
    for place, (first, step) in enumerate(_POINTS):
        yield {
            name: sympy.Integer(3 + place + 2 * number) if str(name)[:1] in _WHOLE else first + step * number
            for number, name in enumerate(names)
        }


def _equations(gold: Form, answer: Form) -> bool:
    """Whether two equations say the same of the same names, or are one another's multiples."""
    if _name(gold) == _name(answer):
        return equal(gold[2], answer[2])
    if gold[2][0] != "scalar" or answer[2][0] != "scalar":
        return False
    sides = [(read_formula(form[1]), read_formula(form[2][1])) for form in (gold, answer)]
    if any(isinstance(side, sympy.MatrixBase) for pair in sides for side in pair):
        return False
    differences = [left - right for left, right in sides]
    if differences[0].free_symbols != differences[1].free_symbols:
        return not differences[1].free_symbols and names_a_value(gold[1]) and equal(gold[2], answer[2])
    return (
        _multiples(*differences) is not None
        or _multiples(*(sympy.fraction(sympy.together(value))[0] for value in differences)) is not None
    )


def _name(equation: Form) -> str:
    """The left side; f(x) is called y."""
    name = "".join(equation[1].split())
    return "y" if name == "f(x)" else name


def _states(equation: Form) -> bool:
    """Whether an equation only states a value: on its left is a name, or a calculation where its right is a number."""
    letters = any(character.isalpha() for character in equation[1].replace("\\frac", "").replace("\\sqrt", ""))
    right = equation[2]
    return names_a_value(equation[1]) and (letters or right[0] != "scalar" or not read_formula(right[1]).free_symbols)


def _multiples(one: Any, other: Any) -> Any | None:
    """The constant, not zero, that ``one`` is times ``other``; else None."""
    if one == 0 or other == 0:
        return None
    names = sorted(one.free_symbols | other.free_symbols, key=str)
    ratios = list[Any]()
    for point in _points(names):
        values = [sympy.N(value.subs(point), _DIGITS[-1]) for value in (one, other)]
        if all(value.is_number and value.is_finite and abs(value) > _near_zero(_DIGITS[-1]) for value in values):
            ratios.append(values[0] / values[1])
    if len(ratios) < 3 or any(abs(ratio - ratios[0]) > _near_zero(_DIGITS[-1]) * abs(ratios[0]) for ratio in ratios):
        return None
    return ratios[0]


def _lists(gold: Form, answer: Form) -> bool | None:
    """Compare where one of two is a list; None where both may still be sets of numbers."""
    one, other = (list(form[2]) if form[0] == "list" else None for form in (gold, answer))
    either = "or" in (gold[1:2] + answer[1:2])
    if one is not None and other is not None:
        if (ordered := _each_named(one, other)) is not None:
            return ordered
        one, other = _named_alike(one, other), _named_alike(other, one)
        if any(entry[0] in ("relation", "tuple", "union") for entry in [*one, *other]) and not _matched(one, other):
            return None if any(entry[0] == "relation" for entry in [*one, *other]) else False
        return _matched(one, other)
    entries, single = (one, answer) if one is not None else (other, gold)
    assert entries is not None
    if single[0] == "set":
        return _matched(_distinct(single[1]), _distinct(_without_names(entries)))
    if _may_be_point(single, entries):
        return not either and not _named_twice(entries) and all(map(equal, single[3], _in_order(entries)))
    return None if single[0] in ("union", "relation", "tuple") else False


def _may_be_point(single: Form, entries: Sequence[Form]) -> bool:
    """Whether the tuple may have the entries for its coordinates."""
    bounds = any(entry[0] == "relation" for entry in entries)
    return single[0] == "tuple" and list(single[1:3]) == ["(", ")"] and len(entries) == len(single[3]) and not bounds


def _named_twice(entries: Sequence[Form]) -> bool:
    """Whether they are values of one name: ``x = 2, x = 3`` is no point."""
    names = [entry[1] for entry in entries if entry[0] == "equation"]
    return len(set(names)) < len(names)


def _components(value: Form, entries: Form) -> bool:
    """Whether a matrix is ``[[1, 2], [3, 4]]``, or a vector ``(1, 2)``."""
    if "\\begin" not in value[1] or list(entries[1:3]) not in (["(", ")"], ["[", "]"]):
        return False
    rows = [entry[3] if entry[0] == "tuple" else [entry] for entry in entries[3]]
    if any(entry[0] != "scalar" for row in rows for entry in row) or len({len(row) for row in rows}) > 1:
        return False
    matrix, given = read_formula(value[1]), sympy.Matrix([[read_formula(entry[1]) for entry in row] for row in rows])
    return isinstance(matrix, sympy.MatrixBase) and (
        same_value(matrix, given) or (1 in given.shape and same_value(matrix, given.T))
    )


def _each_named(ones: Sequence[Form], others: Sequence[Form]) -> bool | None:
    """Compare values that each have a name of their own with as many that have none, in the order they are written; else None."""
    for named, bare in ((ones, others), (others, ones)):
        names = {entry[1] for entry in named if entry[0] == "equation"}
        if len(names) == len(named) == len(bare) and not any(entry[0] in ("equation", "tuple") for entry in bare):
            return all(map(equal, [entry[2] for entry in named], bare))
    return None


def _named_alike(entries: Sequence[Form], others: Sequence[Form]) -> list[Form]:
    """The entries without their one name, unless all of these and of the others have one."""
    all_named = all(entry[0] == "equation" for entry in [*entries, *others])
    return list(entries if all_named else _without_names(entries))


def _without_names(entries: Sequence[Form]) -> Sequence[Form]:
    names = {entry[1] for entry in entries if entry[0] == "equation"}
    return [entry[2] if entry[0] == "equation" else entry for entry in entries] if len(names) == 1 else entries


def _in_order(entries: Sequence[Form]) -> Sequence[Form]:
    """Values in the order of their names, where all are named: (x, y) of ``y = 2, x = 1``."""
    if all(entry[0] == "equation" for entry in entries) and len({entry[1] for entry in entries}) == len(entries):
        return [entry[2] for entry in sorted(entries, key=lambda entry: str(entry[1]))]
    return entries


def _matched(ones: Sequence[Form], others: Sequence[Form]) -> bool:
    """Whether the entries are equal in some order."""
    left = list(others)
    for one in ones:
        found = next((place for place, other in enumerate(left) if _equal_or_not(one, other)), None)
        if found is None:
            return False
        del left[found]
    return not left


def _equal_or_not(one: Form, other: Form) -> bool:
    return one[0] == other[0] and equal(one, other)


def _distinct(entries: Sequence[Form]) -> list[Form]:
    kept = list[Form]()
    for entry in entries:
        if not any(_equal_or_not(entry, other) for other in kept):
            kept.append(entry)
    return kept


def _relations(gold: Form, answer: Form) -> bool:
    """Whether two chains of inequalities are the same pairwise, turned round or multiplied."""
    return _pairs_match(_pairs(gold), _pairs(answer))


def _pairs(form: Form) -> list[tuple[str, Any]]:
    values = [_with_names(read_formula(value)) if value != "?" else sympy.Symbol("?") for value in form[2]]
    return [(sign, left - right) for sign, left, right in zip(form[1], values, values[1:], strict=False)]


def _with_names(value: Any) -> Any:
    """With a symbol for every f(x)."""
    return value.xreplace({applied: sympy.Symbol(str(applied)) for applied in value.atoms(sympy.core.function.AppliedUndef)})


def _pairs_match(ones: list[tuple[str, Any]], others: list[tuple[str, Any]]) -> bool:
    left = list(others)
    for sign, value in ones:
        for place, (other_sign, other) in enumerate(left):
            factor = _multiples(value, _asked(other, value))
            if factor is not None and (
                sign == "\\ne" == other_sign or (sign == other_sign if factor > 0 else sign == _TURNED[other_sign])
            ):
                del left[place]
                break
        else:
            return False
    return not left


def _asked(value: Any, other: Any) -> Any:
    """With the one variable of ``other`` for the quantity asked for, or the other way round."""
    asked, names = sympy.Symbol("?"), sorted(other.free_symbols, key=str)
    if asked in value.free_symbols and len(names) == 1:
        return value.subs(asked, names[0])
    if names == [asked] and len(value.free_symbols) == 1:
        return value.subs(next(iter(value.free_symbols)), asked)
    return value


def _as_sets(gold: Form, answer: Form) -> bool:
    """Whether intervals, unions and inequalities of one variable are the same set of numbers."""
    kinds = {gold[0], answer[0]}
    if not kinds & {"relation", "union", "list", "difference"} or "scalar" in kinds:
        return False
    names = {str(name) for form in (gold, answer) for name in _variables(form)}
    if len(names - {"?"}) > 1:
        return False
    sets = [_set_of(form) for form in (gold, answer)]
    return None not in sets and bool(sets[0] == sets[1] or sympy.SymmetricDifference(*sets).is_empty)


def _variables(form: Form) -> set[Any]:
    if form[0] == "relation":
        return {name for _, value in _pairs(form) for name in value.free_symbols}
    entries = form[-1] if form[0] in ("list", "union") else ()
    return {name for entry in entries for name in _variables(entry)}


def _set_of(form: Form) -> Any | None:
    """The set of real numbers that a form describes; None where it describes none."""
    if form[0] == "empty":
        return sympy.S.EmptySet
    if form[0] == "relation":
        name = sympy.Symbol("t", real=True)
        parts = [_SETS[sign](value.subs(dict.fromkeys(value.free_symbols, name)), 0) for sign, value in _pairs(form)]
        sets = [part.as_set() for part in parts]
        return sympy.Intersection(*sets)
    if form[0] in ("union", "list", "difference"):
        parts_ = [_set_of(entry) for entry in form[-1]]
        if None in parts_:
            return None
        if form[0] == "difference":
            return sympy.Complement(*parts_)
        return sympy.Intersection(*parts_) if form[0] == "list" and form[1] == "and" else sympy.Union(*parts_)
    if form[0] == "tuple" and len(form[3]) == 2 and all(entry[0] == "scalar" for entry in form[3]):
        low, high = (read_formula(entry[1]) for entry in form[3])
        return (
            sympy.Interval(low, high, form[1] == "(", form[2] == ")")
            if low.is_extended_real and high.is_extended_real and low < high
            else None
        )
    if form[0] == "set" and all(entry[0] == "scalar" for entry in form[1]):
        return sympy.FiniteSet(*(read_formula(entry[1]) for entry in form[1]))
    return None


def _arranged(value: Any) -> str:
    return str(sympy.expand(value)) if isinstance(value, sympy.Expr) else str(value)


def _primitive(value: Any) -> str:
    """An expression up to a factor: its first coefficient is 1."""
    value = sympy.expand(sympy.fraction(sympy.together(value))[0])
    terms = value.as_ordered_terms()
    return str(sympy.expand(value / terms[0].as_coeff_Mul()[0])) if value != 0 else "0"
