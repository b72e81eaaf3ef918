"""A formula of LaTeX as an expression of SymPy: exact, and nothing in it passed over.

A reader of its own, since those that there are guess: latex2sympy2-extended (which math-verify reads with) takes ``2(3)`` for 5,
``3 4`` for 7 and ``101_2`` for 101.  What this one does not know it refuses.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import sympy

from ladir.tasks.mathematics.spelling import GREEK

_TOKEN = re.compile(r"\s*(\\[A-Za-z]+|\\.|[0-9]+(?:\.[0-9]+)?|\.[0-9]+|[A-Za-z]|\S)", re.DOTALL)
_GREEK = frozenset([*GREEK, "ell", "hbar"]) - {"pi"}  # which is a number
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(sympy, name) for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "exp")
} | {"arcsin": sympy.asin, "arccos": sympy.acos, "arctan": sympy.atan, "ln": sympy.log}
_INVERSES: dict[str, Callable[..., Any]] = {
    "sin": sympy.asin,
    "cos": sympy.acos,
    "tan": sympy.atan,
    "cot": sympy.acot,
    "sec": sympy.asec,
    "csc": sympy.acsc,
    "sinh": sympy.asinh,
    "cosh": sympy.acosh,
    "tanh": sympy.atanh,
}
_POWER_OF_TEN = re.compile(r"[0-9][eE][0-9]")  # within a formula: of ten, or e times a number
_APPLIED = frozenset("fghFGHP")  # letters that are applied to what is in parentheses behind them
_BRACKETS = {"(": ")", "[": "]", "{": "}", "\\{": "\\}"}
_ROUNDED: dict[str, tuple[str, Callable[..., Any]]] = {
    "\\lfloor": ("\\rfloor", sympy.floor),
    "\\lceil": ("\\rceil", sympy.ceiling),
}
_ENDS = frozenset(
    {
        ")",
        "]",
        "}",
        "\\}",
        "\\rfloor",
        "\\rceil",
        "&",
        "\\\\",
        "\\end",
        ",",
        "+",
        "-",
        "*",
        "/",
        "\\cdot",
        "\\times",
        "\\div",
        "^",
        "!",
        "'",
        "_",
    }
)
_MAX_TOKENS, _MAX_DEPTH = 600, 60
_MAX_POWER_BITS = 200_000
_MAX_MATRIX_POWER = 20


class UnreadableError(ValueError):
    """A formula that the reader does not know, or that has no value."""


def read_formula(text: str) -> Any:
    """The expression (or matrix) of a formula.  Raises UnreadableError."""
    if _POWER_OF_TEN.search(text):
        raise UnreadableError("an e between two numbers: a power of ten, or the number e")
    reader = _Reader(text)
    value = reader.sum()
    reader.expect("")
    return value


class _Reader:
    """Recursive descent; every method reads what it is named after."""

    def __init__(self, text: str) -> None:
        self._tokens = [*_TOKEN.findall(text), ""]
        self._place, self._depth, self._bars = 0, 0, 0
        if len(self._tokens) > _MAX_TOKENS:
            raise UnreadableError("a formula of too many parts")

    @property
    def _next(self) -> str:
        return self._tokens[self._place]

    def _take(self) -> str:
        if not self._next:
            raise UnreadableError("a formula that breaks off")
        self._place += 1
        return self._tokens[self._place - 1]

    def _taken(self, *tokens: str) -> bool:
        if self._next in tokens and self._next:
            self._place += 1
            return True
        return False

    def expect(self, token: str) -> None:
        """Take this token; raise where another stands there."""
        if self._next != token:
            raise UnreadableError(f"no formula at {' '.join(self._tokens[self._place : self._place + 4]).strip() or 'its end'}")
        self._place += 1

    def sum(self) -> Any:
        """Terms with signs between them."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise UnreadableError("a formula nested too deeply")
        value = self._signed_product()
        while self._next in ("+", "-"):
            value = value + self._signed_product() if self._take() == "+" else value - self._signed_product()
        self._depth -= 1
        return value

    def _signed_product(self) -> Any:
        negative = False
        while self._next in ("+", "-"):
            negative ^= self._take() == "-"
        value = self._product()
        return -value if negative else value

    def _product(self) -> Any:
        value = self._power(first=True)
        while True:
            if self._taken("*", "\\cdot", "\\times"):
                value = value * self._signed_power()
            elif self._taken("/", "\\div"):
                value = _divided(value, self._signed_power())
            elif self._begins_factor():
                if self._next[0] in "0123456789." and self._tokens[self._place - 1][-1:].isdigit():
                    raise UnreadableError("two numbers side by side")
                value = value * self._power()
            else:
                return value

    def _begins_factor(self) -> bool:
        token = self._next
        return bool(token) and token not in _ENDS and not (token in ("|", "\\|") and self._bars)

    def _signed_power(self) -> Any:
        if self._taken("-"):
            return -self._signed_power()
        self._taken("+")
        return self._power(first=True)

    def _power(self, first: bool = False) -> Any:
        """A factor with its factorials and powers; a whole number before a proper fraction makes a mixed number."""
        start = self._next
        value = self._factor()
        if first and start.isdigit() and self._next == "\\frac" and (part := self._proper_fraction()) is not None:
            return value + part
        while self._next in ("!", "^", "'", "%"):
            token = self._take()
            if token == "!":
                if self._next == "!":
                    raise UnreadableError("a double factorial")
                value = sympy.factorial(_bounded(value, 5000))
            elif token == "^":
                value = value * sympy.pi / 180 if self._taken("\\circ") else _raised(value, self._exponent())
            else:
                raise UnreadableError(f"no formula at {token!r}")
        return value

    def _proper_fraction(self) -> Any | None:
        found = re.match(r"\\frac \{ ([0-9]+) \} \{ ([0-9]+) \}", " ".join(self._tokens[self._place : self._place + 7]))
        if not found:
            return None
        if not 0 < int(found[1]) < int(found[2]):
            raise UnreadableError("a whole number before a fraction that is not proper")
        self._place += 7
        return sympy.Rational(int(found[1]), int(found[2]))

    def _exponent(self) -> Any:
        if self._next == "{":
            return self._group()
        return self._signed_power() if self._next in ("-", "(", "\\frac") else self._factor()

    def _group(self) -> Any:
        closing = _BRACKETS[self._take()]
        bars, self._bars = self._bars, 0
        value = self.sum()
        self.expect(closing)
        self._bars = bars
        return value

    def _factor(self) -> Any:
        token = self._next
        if token[:1].isdigit() or token[:1] == ".":
            number = sympy.Rational(self._take())
            if self._next == "_":
                raise UnreadableError("a number with an index: its base is not read")
            return number
        if token in ("(", "[", "{"):
            return self._group()
        if token in ("|", "\\|"):
            return self._absolute()
        if len(token) == 1 and token.isalpha() and token.isascii():  # a word of another script is no variable
            return self._symbol(self._take())
        if token.startswith("\\") and token != "\\\\":
            return self._command(self._take())
        raise UnreadableError(f"no formula at {token or 'its end'}")

    def _absolute(self) -> Any:
        mark = self._take()
        bars, self._bars = self._bars, 1
        value = self.sum()
        self.expect(mark)
        self._bars = bars
        return sympy.Abs(value)

    def _symbol(self, name: str) -> Any:
        if self._taken("_"):
            name += f"_{self._index()}"
        while self._taken("'"):
            name += "'"
        if name == "e":
            return sympy.E
        if name == "i":
            return sympy.I
        if name[:1] in _APPLIED and self._next == "(":
            return sympy.Function(name)(self._group())
        return sympy.Symbol(name)

    def _index(self) -> str:
        if not self._taken("{"):
            return self._take()
        index = ""
        while self._next not in ("}", "", "{"):
            index += self._take()
        self.expect("}")
        return index

    def _command(self, command: str) -> Any:
        name = command[1:]
        if name == "pi":
            return sympy.pi
        if name == "infty":
            return sympy.oo
        if name in _GREEK:
            return self._symbol(name if name != "e" else command)
        if name == "frac":
            return _divided(self._argument(), self._argument())
        if name == "sqrt":
            return self._root()
        if name == "binom":
            return sympy.binomial(_bounded(self._argument(), 5000), self._argument())
        if name in _FUNCTIONS or name == "log":
            return self._function(name)
        if command in _ROUNDED:
            closing, rounded = _ROUNDED[command]
            value = self.sum()
            self.expect(closing)
            return rounded(value)
        if name in ("vec", "hat", "bar", "overline"):
            return sympy.Symbol(f"{name}({self._index() if self._next == '{' else self._take()})")
        if name == "begin":
            return self._matrix()
        raise UnreadableError(f"{command} is not read")

    def _argument(self) -> Any:
        if self._next != "{" and self._next.isdigit() and len(self._next) > 1:
            raise UnreadableError("an argument without braces")
        return self._factor()

    def _root(self) -> Any:
        degree = self._group() if self._next == "[" else sympy.Integer(2)
        return self._factor() ** (1 / degree)

    def _function(self, name: str) -> Any:
        base = None
        if name == "log" and self._taken("_"):
            base = self._group() if self._next == "{" else self._factor()
        power = self._exponent() if self._taken("^") else None
        function = _FUNCTIONS.get(name, sympy.log)
        if power == -1 and name in _INVERSES:
            function, power = _INVERSES[name], None
        value = function(self._function_argument())
        if name == "log":
            value = value / sympy.log(10 if base is None else base)
        return value if power is None else value**power

    def _function_argument(self) -> Any:
        """What stands in brackets, or the factors up to the next sign or function."""
        if self._next in ("(", "[", "{", "|"):
            return self._power()
        value = self._signed_power()
        while (
            self._begins_factor() and self._next not in ("(", "[") and self._next[1:] not in _FUNCTIONS and self._next != "\\log"
        ):
            value = value * self._power()
        if self._next == "/":
            self._take()
            value = _divided(value, self._power())
        return value

    def _matrix(self) -> Any:
        kind = self._index_after("{")
        if not kind.endswith("matrix") and kind != "array":
            raise UnreadableError(f"\\begin{{{kind}}} is not read")
        if kind == "array":
            self._index_after("{")
        rows: list[list[Any]] = [[self.sum()]]
        while self._next in ("&", "\\\\"):
            if self._take() == "&":
                rows[-1].append(self.sum())
            elif self._next != "\\end":
                rows.append([self.sum()])
        self.expect("\\end")
        self._index_after("{")
        if len({len(row) for row in rows}) > 1:
            raise UnreadableError("a matrix of uneven rows")
        matrix = sympy.Matrix(rows)
        return matrix.det() if kind == "vmatrix" else matrix

    def _index_after(self, opening: str) -> str:
        if self._next != opening:
            raise UnreadableError("an environment without a name")
        return self._index()


def _divided(top: Any, bottom: Any) -> Any:
    if bottom == 0:
        raise UnreadableError("a division by zero")
    return top / bottom


def _bounded(value: Any, limit: int) -> Any:
    if value.is_number and not abs(value) <= limit:
        raise UnreadableError("a number too large to compute")
    return value


def _raised(base: Any, exponent: Any) -> Any:
    """A power, unless its digits would fill the memory; of a matrix a small one, or what ``^T`` says."""
    if isinstance(base, sympy.MatrixBase):
        if exponent == sympy.Symbol("T"):
            return base.T
        if not (exponent.is_Integer and abs(exponent) <= _MAX_MATRIX_POWER and base.is_square):
            raise UnreadableError("a power of a matrix that is not read")
        return base**exponent
    if base.is_Rational and exponent.is_Integer:
        if base == 0 and exponent < 0:
            raise UnreadableError("a division by zero")
        if abs(int(exponent)) * max(int(base.p).bit_length(), int(base.q).bit_length()) > _MAX_POWER_BITS:
            raise UnreadableError("a number too large to compute")
    return base**exponent
