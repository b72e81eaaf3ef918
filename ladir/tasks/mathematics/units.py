"""Units of measure: which are the same, and how many of one are another."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

#: one line a dimension: its units, each with its spellings and its size in the dimension's first unit
_TABLE = """
length: m metre meter=1; cm centimetre centimeter=1/100; mm millimetre millimeter=1/1000; km kilometre kilometer=1000;
  in inch inches=254/10000; ft foot feet=3048/10000; yd yard=9144/10000; mi mile=1609344/1000
mass: g gram gramme=1; kg kilogram kilo=1000; mg milligram=1/1000; ton tonne=1000000; lb pound £=45359237/100000;
  oz ounce=45359237/1600000
time: s sec second=1; min minute=60; h hr hour=3600; day=86400; week=604800; ms millisecond=1/1000
years: year yr=12; month=1; decade=120; century centuries=1200
volume: l L liter litre=1; ml mL milliliter millilitre=1/1000; cl centiliter centilitre=1/100; gallon gal=473176473/125000000;
  quart qt=473176473/500000000; pint pt=473176473/1000000000
dollar: $ dollar buck USD=1; cent ¢=1/100; dime=1/10; nickel=1/20; quarter=1/4; penny pennies=1/100
euro: € euro EUR=1
rupee: ₹ rupee Rs INR=1
yen: ¥ yen JPY=1
angle: degree deg=1
radian: radian rad=1
celsius: celsius degC=1
fahrenheit: fahrenheit degF=1
temperature: kelvin K=1
speed: mph=1397/3125; kph kmh kmph=5/18
force: N newton=1
energy: J joule=1; kJ kilojoule=1000; cal calorie=4184/1000; kcal=4184
power: W watt=1; kW kilowatt=1000
voltage: V volt=1
current: A amp ampere=1
frequency: Hz hertz=1; kHz=1000; MHz=1000000
data: byte B=1; KB=1000; MB=1000000; GB=1000000000
mole: mol mole=1
"""
#: a dimension that is made of others: its power in each, and the size of its first unit in theirs
_COMPOSED = {"speed": ({"length": 1, "time": -1}, Fraction(1)), "volume": ({"length": 3}, Fraction(1, 1000))}


def _read_table() -> dict[str, tuple[str, Fraction]]:
    units = {}
    for line in _TABLE.replace("\n  ", " ").strip().splitlines():
        dimension, _, entries = line.partition(":")
        for entry in entries.split(";"):
            names, _, size = entry.strip().partition("=")
            units.update({name: (dimension, Fraction(size)) for name in names.split()})
    return units


_UNITS = _read_table()
_PLAIN = frozenset({"unit", "units"})  # says nothing
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
#: words that end a unit
# Words behind a number that make another number of it: "3 plus 4", "3 squared" (but not "3 squared metres"), "3 less than x".
CALCULATING = re.compile(
    r"\s*(?:(?:plus|minus|mod|modulo|choose|factorial|(?:divided|multiplied) by)\b|(?:squared|cubed|negative)(?!\s+[A-Za-z]{2})"
    r"|(?:times|over|remainder|(?:less|fewer|more) than)\s+(?:[0-9\\]|[b-z]\b)"
    r"|(?:third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|hundredth|thousandth)s\b|(?:[a-z]+ )?below zero\b)",
    re.IGNORECASE,
)
FILLERS = frozenset(
    [
        "of",
        "in",
        "for",
        "at",
        "on",
        "to",
        "from",
        "with",
        "and",
        "or",
        "so",
        "that",
        "which",
        "who",
        "each",
        "left",
        "remaining",
        "total",
        "altogether",
        "long",
        "wide",
        "tall",
        "high",
        "deep",
        "old",
        "more",
        "than",
        "per",
        "a",
        "an",
        "the",
        "away",
        "apart",
        "ago",
        "later",
        "is",
        "are",
        "was",
        "were",
        "will",
        "would",
        "because",
        "since",
        "if",
        "when",
        "by",
        "as",
        "he",
        "she",
        "it",
        "they",
    ]
)
_TOKEN = re.compile(r"\^\\circ(?: ?[CF]\b)?|[A-Za-z\u00a2$€£¥₹]+\.?|\^?\{?-?[0-9]\}?|[/*·]|\\cdot|\\times|\s+|.", re.DOTALL)


@dataclass(frozen=True)
class Unit:
    """A unit: of known dimensions, or words that are only the same or not."""

    dimensions: tuple[tuple[str, int], ...] = ()
    size: Fraction = Fraction(1)
    words: frozenset[str] = frozenset()

    @property
    def known(self) -> bool:
        """Whether it has dimensions."""
        return bool(self.dimensions)


def ratio(one: Unit | None, other: Unit | None) -> Fraction | None:
    """How many of ``other`` are ``one``; 1 where one of them is not said; None where they measure different things."""
    if one is None or other is None or one == other:
        return Fraction(1)
    if one.known != other.known:
        return None
    if one.known:
        return one.size / other.size if one.dimensions == other.dimensions else None
    return Fraction(1) if one.words & other.words else None


def unit_named(name: str) -> Unit | None:
    """A single unit by its sign or name in any number; None where it is not in the table."""
    for spelling in (name, name.lower(), name.rstrip("s"), name.lower().rstrip("s"), name.rstrip("."), name.lower().rstrip(".")):
        if spelling in _UNITS:
            dimension, size = _UNITS[spelling]
            powers, factor = _COMPOSED.get(dimension, ({dimension: 1}, Fraction(1)))
            return Unit(tuple(sorted(powers.items())), size * factor)
    return None


def read_unit(text: str) -> Unit | None:
    """The unit behind a number: ``km/h``, ``square inches``, ``dollars per hour``; words where it is none that is known.

    What follows it (``of rope``, ``in total``) is passed over.  None where there is none.
    """
    powers: dict[str, int] = {}
    size, words, sign, power = Fraction(1), set[str](), 1, 1
    last: tuple[Unit, int] | None = None
    tokens = [token for token in _TOKEN.findall(text.strip()) if token.strip()]
    for place, token in enumerate(tokens):
        word = token.rstrip(".").lower()
        if word in ("/", "per") and (last or words):
            sign = -1
        elif word in _POWERS:
            if last and word.endswith("ed"):
                size, power = _raise(powers, size, last, _POWERS[word] - 1), 1
            else:
                power = _POWERS[word]
        elif last and (found := re.fullmatch(r"\^?\{?(-?[0-9])\}?", token)):
            size = _raise(powers, size, last, int(found[1]) - 1)
        elif word in ("*", "·", "\\cdot", "\\times") and last:
            continue
        elif word in FILLERS and not (word == "in" and place + 1 >= len(tokens)):
            break
        elif unit := _sign_or_name(token):
            last = (unit, sign)
            size = _raise(powers, size, last, power)
            power = 1
        elif is_word(token.rstrip(".")) and not powers:
            words.add(stem(word))
        else:
            break
    words -= _PLAIN
    if words and not powers:
        return Unit(words=frozenset(words))
    found_powers = tuple(sorted((name, count) for name, count in powers.items() if count))
    return Unit(found_powers, size) if found_powers else None


def is_word(text: str) -> bool:
    """Whether letters are a word and no product of variables."""
    return (
        re.fullmatch(r"[A-Za-z]{3,}", text) is not None and re.fullmatch(r"[abc]{3}|[xyz]{3}|[pqr]{3}|[A-Z]{3,4}", text) is None
    )


def _sign_or_name(token: str) -> Unit | None:
    if token.startswith("^\\circ"):
        return unit_named({"C": "celsius", "F": "fahrenheit"}.get(token[-1], "degree"))
    return unit_named(token)


def _raise(powers: dict[str, int], size: Fraction, factor: tuple[Unit, int], power: int) -> Fraction:
    """Multiply by a unit (or divide, where its sign is -1) to a power."""
    unit, sign = factor
    for name, count in unit.dimensions:
        powers[name] = powers.get(name, 0) + count * sign * power
    return size * unit.size ** (sign * power)


def stem(word: str) -> str:
    """A word without its plural ending."""
    return re.sub(r"(?<=[^aeious])ies$", "y", word) if word.endswith("ies") else re.sub(r"(?<=s|x|z|h)es$|(?<!s)s$", "", word)
