"""One spelling of what is written in many ways: Unicode, Markdown, HTML and LaTeX that only changes the looks."""

from __future__ import annotations

import html
import re
import unicodedata
from functools import lru_cache

_CHARACTERS = {
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe63", "-"),
    **dict.fromkeys("\u00d7\u2a2f", r"\times "),
    **dict.fromkeys("\u00b7\u22c5\u2219", r"\cdot "),
    **dict.fromkeys("\u2018\u2019\u2032", "'"),
    **dict.fromkeys("\u201c\u201d", '"'),
    "\u2217": "*",
    "\u00f7": r"\div ",
    "\u221a": r"\sqrt ",
    "\u221e": r"\infty ",
    "\u2264": r"\le ",
    "\u2265": r"\ge ",
    "\u2260": r"\ne ",
    "\u00b1": r"\pm ",
    "\u2213": r"\mp ",
    "\u2248": r"\approx ",
    "\u222a": r"\cup ",
    "\u2229": r"\cap ",
    "\u2205": r"\emptyset ",
    "\u2208": r"\in ",
    "\u2220": r"\angle ",
    "\u00b0": r"^\circ ",
    "\u2044": "/",
    "\u2192": r"\to ",
    "\u21d2": r"\Rightarrow ",
    "\u2234": r"\therefore ",
}
#: Greek letters by the names of their LaTeX commands
GREEK = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
    "nu",
    "xi",
    "pi",
    "rho",
    "sigma",
    "tau",
    "upsilon",
    "phi",
    "chi",
    "psi",
    "omega",
    "Gamma",
    "Delta",
    "Theta",
    "Lambda",
    "Xi",
    "Pi",
    "Sigma",
    "Phi",
    "Psi",
    "Omega",
]
_GREEK_LETTERS = {
    unicodedata.lookup(
        f"GREEK {'SMALL' if n.islower() else 'CAPITAL'} LETTER {n.replace('lambda', 'lamda').replace('Lambda', 'Lamda')}"
    ): f"\\{n} "
    for n in GREEK
}
_TRANSLATED = str.maketrans(_CHARACTERS | _GREEK_LETTERS)
_SUPERSCRIPTS, _SUBSCRIPTS = (
    ("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b\u207f", "0123456789+-n"),
    (
        "\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087\u2088\u2089",
        "0123456789",
    ),
)
_FUNCTIONS = "sqrt arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc ln log exp"
_SYNONYMS = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), r"\frac"),
    **dict.fromkeys(("dbinom", "tbinom"), r"\binom"),
    **dict.fromkeys(("leq", "leqslant", "le"), r"\le "),
    **dict.fromkeys(("geq", "geqslant", "ge"), r"\ge "),
    **dict.fromkeys(("neq", "ne"), r"\ne "),
    **dict.fromkeys(("varnothing", "emptyset"), r"\emptyset "),
    **dict.fromkeys(("quad", "qquad", "enspace", "thinspace", "displaystyle", "textstyle", "limits", "bf", "rm", "it"), " "),
    **dict.fromkeys(("left", "right", "big", "Big", "bigg", "Bigg", "bigl", "bigr", "Bigl", "Bigr", "middle"), ""),
    **dict.fromkeys(("land", "wedge"), " and "),
    **dict.fromkeys(("lor", "vee"), " or "),
    **dict.fromkeys(("ldots", "dots", "cdots"), r"\ldots "),
    **dict.fromkeys(("langle", "lparen"), "("),
    **dict.fromkeys(("rangle", "rparen"), ")"),
    **dict.fromkeys(("lvert", "rvert", "vert"), "|"),
    "lbrack": "[",
    "rbrack": "]",
    "lt": "<",
    "gt": ">",
    **dict.fromkeys(("degree", "degrees"), r"^\circ "),
    "ast": "*",
    **dict.fromkeys(("infin", "infinity"), r"\infty "),
    "colon": ":",
    "lbrace": r"\{",
    "rbrace": r"\}",
    "varphi": r"\phi ",
    "varepsilon": r"\epsilon ",
    "euro": "€",
    "pounds": "£",
    "lg": r"\log_{10}",
    **dict.fromkeys(("implies", "Longrightarrow", "rightarrow"), r"\Rightarrow "),
}

_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#x[0-9a-fA-F]{1,6}|[A-Za-z]{2,8});")
_VULGAR = re.compile(r"([0-9])? ?([\u00bc-\u00be\u2150-\u215e\u2189])")
_RAISED = re.compile(f"[{_SUPERSCRIPTS[0]}]+")
_LOWERED = re.compile(f"[{_SUBSCRIPTS[0]}]+")
_BLANK = re.compile(r"[\u200b-\u200f\u2060-\u2064\ufeff\u00ad]")
_STRONG = re.compile(r"(?<![0-9A-Za-z)\]*])(\*\*|__)(?=\S)([^*\n]{1,1000}?)(?<=\S)\1!?(?![0-9A-Za-z(*])")
_EMPHASIS = re.compile(r"(?<![0-9A-Za-z)\]}*\\])([*])(?=\S)([^*\n]{1,1000}?)(?<=\S)\1(?![0-9A-Za-z(*\\])")
_CODE = re.compile(r"`{1,3}([^`]{1,1000})`{1,3}")
_HEADING = re.compile(r"^\s{0,3}(?:#{1,6}|[->*+](?=\s+[A-Za-z]{2}))\s+", re.MULTILINE)
_SCRIPT = re.compile(r"<(sup|sub)>([^<>]{1,20})</\1>")
_TAG = re.compile(r"</?(?:b|i|u|em|strong|p|br|span|div|code|answer)\s?/?>", re.IGNORECASE)
_DISPLAYED = re.compile(r"\$\$([^$]{1,2000})\$\$|\\\[|\\\]|\\\(|\\\)")
_WHOLE = re.compile(r"\s*\$(?!\$)((?:\\\$|[^$])*)(?<!\\)\$\s*\.?\s*")
_INLINE = re.compile(r"(?<!\\)\$(?=\S)((?:\\\$|[^$]){0,2000}?[^\s\\$])\$(?!\d)")
_SPACED = re.compile(r"(?<!\\)\$\s([^$]{0,2000}[\\^_=<>][^$]{0,2000})\s\$")
_REALS = re.compile(r"\\mathbb\s?\{?R\}?|\u211d|\ball real numbers\b")
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|mathbb|boldsymbol|bm|mbox|hbox|operatorname)"
    r"\*?\s?\{([^{}]{0,500})\}"
)
_ORDINAL = re.compile(
    r"(?<=[0-9])\s?\^?\s?(\{)?\s?\\(?:text|textrm|mathrm)\s?\{\s?(st|nd|rd|th)\s?\}\s?(?(1)\})"  # 21^{\text{st}}
)
_ORDINALS = {
    "first": "1st",
    "second": "2nd",
    "third": "3rd",
    "fourth": "4th",
    "fifth": "5th",
    "sixth": "6th",
    "seventh": "7th",
    "eighth": "8th",
    "ninth": "9th",
    "tenth": "10th",
}
_COMMAND = re.compile(r"\\([A-Za-z]+)\*?")
_SPACES = re.compile(r"(?<!\\)\\[,;: \n]|~|\\q?quad")
_NO_SPACE = re.compile(r"(?<!\\)\\!\s*")
_SPECIAL = re.compile(r"<\|[A-Za-z_]{1,30}\|>\w*")
_ESCAPED = re.compile(
    r"\\(?=\\(?:[dtc]?frac|sqrt|left|right|text|math[a-z]+|boxed|pi|cdot|times|div|pm|leq?|geq?|neq?|infty|cup|cap|in|sin|cos|tan|log|ln|circ)\b)"
)
_PLAIN_NAME = re.compile(rf"(?<![\\A-Za-z])({'|'.join(_FUNCTIONS.split())}|{'|'.join(GREEK)}|infinity)(?![A-Za-z])")
_SHORT_FRACTION = re.compile(r"\\frac\s*(?:([0-9A-Za-z])\s*([0-9A-Za-z])|([0-9A-Za-z])\s*(?=\{)|(?=\{))")
_AFTER_FRACTION = re.compile(r"(\\frac\{[^{}]{0,200}\})\s*([0-9A-Za-z])")
_SHORT_ROOT = re.compile(r"\\sqrt\s*(?:([0-9]+(?:\.[0-9]+)?|[A-Za-z])|\(([^()]{1,200})\)|\s(?=[\[{\\]))")
_SHORT_POWER = re.compile(r"([_^])\s*(-?[0-9]+(?:\.[0-9]+)?)")
_POWER_OF_TEN = re.compile(r"(?<=[0-9])\s*[xX]\s*10\s*(?=\^)")


@lru_cache(maxsize=8192)
def spelled(text: str) -> str:
    """The text in one spelling: ASCII and LaTeX commands, without Markdown, styles, and marks around formulas."""
    text = _SPECIAL.sub("", text)
    text = _latex(_plain(_characters(text if "\\begin" in text else _ESCAPED.sub("", text))))
    return _ORDINALS.get(text.lower().removeprefix("the ").rstrip("."), text)


def folded_words(text: str) -> str:
    """A text in one spelling without case, where it is words or the letter of a choice and no formula."""
    words = re.search(r"[A-Za-z]{3}|^\W*(?:[A-Ja-j]|[Nn][Oo])\W*$", text) and not re.search(r"[\\^_=+*/<>|]", text)
    return text.casefold() if words else text


def _characters(text: str) -> str:
    """HTML entities, fractions in one character, raised and lowered digits, full-width forms, dashes and signs."""
    text = _ENTITY.sub(lambda match: html.unescape(match[0]), text)
    text = _VULGAR.sub(_vulgar_fraction, text)
    for pattern, mark, (shown, meant) in ((_RAISED, "^", _SUPERSCRIPTS), (_LOWERED, "_", _SUBSCRIPTS)):
        table = str.maketrans(shown, meant)
        text = pattern.sub(lambda match: f"{mark}{{{match[0].translate(table)}}}", text)  # noqa: B023 (used at once)
    return _BLANK.sub("", unicodedata.normalize("NFKC", text).translate(_TRANSLATED))


def _vulgar_fraction(match: re.Match[str]) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", match[2]).partition("\u2044")
    return f"{match[1] or ''}\\frac{{{top}}}{{{bottom}}}"


def _plain(text: str) -> str:
    """Without Markdown's emphasis, code marks and headings."""
    text = _TAG.sub("", _SCRIPT.sub(lambda match: f"{'^' if match[1] == 'sup' else '_'}{{{match[2]}}}", text))
    text = _CODE.sub(r"\1", _HEADING.sub("", text))
    for pattern in (_STRONG, _EMPHASIS, _STRONG):
        text = pattern.sub(r"\2", text)
    return text


def _latex(text: str) -> str:
    """Without LaTeX that only changes the looks; short forms in full."""
    if whole := _WHOLE.fullmatch(text):
        text = whole[1]
    text = _DISPLAYED.sub(lambda match: f" {match[1] or ''} ", text)
    text = _SPACED.sub(r" \1 ", text)
    text = _INLINE.sub(r" \1 ", text).replace("\\$", "$").replace("\\%", "%").replace("\\#", "#").replace("\\&", "&")
    text = _REALS.sub(r"\\reals ", text)
    text = _NO_SPACE.sub("", text.replace("{,}", ","))
    text = _ORDINAL.sub(r"\2", text)
    for _ in range(3):  # styles within styles
        text = _TEXT.sub(r" \1 ", text)
    text = _SPACES.sub(" ", text)
    text = _COMMAND.sub(lambda match: _SYNONYMS.get(match[1], match[0]), text)
    text = _PLAIN_NAME.sub(lambda match: _SYNONYMS.get(match[1], f"\\{match[1]} "), text)
    text = text.replace("**", "^").replace("<=", r"\le ").replace(">=", r"\ge ").replace("!=", r"\ne ").replace("==", "=")
    text = _POWER_OF_TEN.sub(r"\\times 10", text)
    text = _SHORT_FRACTION.sub(_full_fraction, text)
    text = _AFTER_FRACTION.sub(r"\1{\2}", text)
    text = _SHORT_ROOT.sub(lambda match: f"\\sqrt{{{match[1] or match[2]}}}" if match[1] or match[2] else "\\sqrt", text)
    text = _SHORT_POWER.sub(r"\1{\2}", text)
    text = re.sub(r"\^\{?\s*\\circ\s*\}?", r"^\\circ ", text)
    return re.sub(r" (?=[.,;:!?](?:\s|$))", "", re.sub(r"[ \t]+", " ", text)).strip()


def _full_fraction(match: re.Match[str]) -> str:
    if match[1]:
        return f"\\frac{{{match[1]}}}{{{match[2]}}}"
    return f"\\frac{{{match[3]}}}" if match[3] else "\\frac"
