"""Programs in answers as people and models write them."""

from __future__ import annotations

import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ladir.tasks.program_text import bodies, bound_names, readings, whole, without_prose

DOUBLE = "def double(xs):\n    return [2 * x for x in xs]\n"
FENCED = f"```python\n{DOUBLE}```"
WRONG = "```python\ndef double(xs):\n    return xs\n```"
DOCSTRING_FENCE = 'def double(xs):\n    """\n    ```\n    double([1])\n    ```\n    """\n    return [2 * x for x in xs]\n'


def indented(text: str, columns: int) -> str:
    return textwrap.indent(text, " " * columns)


INFOS = ["", "py", "python3", "Python", "{.python .numberLines}", 'python title="a.py"', "  python ", "text", "python\t"]
FORMS = {
    **{f"info {info!r}": f"Here:\n\n```{info}\n{DOUBLE}```\nDone." for info in INFOS},
    "bare": DOUBLE,
    "long fence": f"````python\n{DOUBLE}````",
    "tildes": f"~~~python\n{DOUBLE}~~~~",
    "no end": f"Sure.\n```python\n{DOUBLE}",
    "tildes, no end": f"Sure.\n~~~ py\n{DOUBLE}",
    "CRLF": f"Hi.\n{FENCED}\nBye.".replace("\n", "\r\n"),
    "byte order mark": f"\ufeff{FENCED}",
    "bare byte order mark": f"\ufeff{DOUBLE}",
    "tabs": "def double(xs):\n\treturn [2 * x for x in xs]",
    "in a list": f"1. Code:\n{indented(FENCED, 3)}",
    "in a list of lists": f"- a\n  - b\n{indented(FENCED, 8)}",
    "in the list's line": f"1. ```python\n{indented(DOUBLE, 3)}   ```",
    "all indented": f"```python\n{indented(DOUBLE, 4)}```",
    "quoted": "> " + FENCED.replace("\n", "\n> "),
    "fence behind words": f"Here it is: ```python\n{DOUBLE}```",
    "words behind the fence": f"```python\n{DOUBLE}``` This doubles.",
    "end behind code": FENCED.replace("\n```", "```"),
    "start before code": FENCED.replace("python\n", "python "),
    "one line": "```def double(xs): return [2 * x for x in xs]```",
    "inline": "Use `double = lambda xs: [2 * x for x in xs]` here.",
    "words around": f"Sure! This works.\n\n{DOUBLE}\nThis doubles every element, as asked.\nIt's O(n).\n",
    "list behind": f"{DOUBLE}\nExplanation:\n- doubles each `x`\n- returns a list\n",
    "words between": f"First an import:\n\nimport math\n\nThen the function:\n\n{DOUBLE}",
    "words without spaces": f"这是函数：\n\n{DOUBLE}\n它将每个元素加倍。\n",
    "heading": f"# Solution\n\n{FENCED}\n\n## Notes\n* fast",
    "usage behind": f"{FENCED}\nUsage:\n```python\nprint(double(undefined))\n```",
    "tests behind": f"{FENCED}\n```python\ndef test_double():\n    assert double([1]) == [2]\n\nraise SystemExit\n```",
    "shell before": f"```bash\npip install x\n```\n{FENCED}",
    "output behind": f"{FENCED}\n```\n[2, 4]\n```",
    "output behind bare code": f"{DOUBLE}\nOutput:\n```\n[2, 4]\n```",
    "corrected": f"{WRONG}\nThat is wrong. Corrected:\n{FENCED}",
    "thought aloud": f"<think>\n{FENCED.replace('2 *', '3 *')}\n</think>\n{FENCED}",
    "helper before": f"```python\ndef twice(x):\n    return 2 * x\n```\n{FENCED.replace('2 * x', 'twice(x)')}",
    "helper behind": f"{FENCED.replace('2 * x', 'twice(x)')}\n```python\ndef twice(x):\n    return 2 * x\n```",
    "imports before": f"```python\nfrom operator import (\n    mul,\n)\n```\n{FENCED.replace('2 * x', 'mul(2, x)')}",
    "future behind imports": f"```\nfrom typing import Any\n```\n```\nfrom __future__ import annotations\n{DOUBLE}y: Any\n```",
    "transcript": ">>> def double(xs):\n...     return [2 * x for x in xs]\n...\n>>> double([1, 2])\n[2, 4]",
    "fenced transcript": "```pycon\n>>> double = lambda xs: [2 * x for x in xs]\n>>> double([1, 2])\n[2, 4]\n```",
    "fence in a docstring": f"```python\n{DOCSTRING_FENCE}```",
    "fence in a bare docstring": DOCSTRING_FENCE,
    "marks": f"[BEGIN]\n{DOUBLE}[DONE]\nNext:\n[BEGIN]\ndef double(xs): return 0\n",
    "end mark": f"{DOUBLE}[DONE]\n",
    "language mark": f"[PYTHON]\n{DOUBLE}[/PYTHON]",
    "tags": f'<pre><code class="python">\n{DOUBLE}</code></pre>',
    "end of text": f"{DOUBLE}<|im_end|>",
    "tags and fences in strings": f"a = '<code>x</code>'\nb = '```'\n{DOUBLE}",
    "begun by the prompt": f"{DOUBLE}```\nIt doubles.\n```python\nprint(double(x))\n```",
    "label": f"python\nCopy code\n{DOUBLE}",
    "triple quotes": f"'''python\n{DOUBLE}'''",
    "title": f"solution:\n{DOUBLE}",
    "spaces of a web page": DOUBLE.replace("    ", "\xa0\u200b\xa0\xa0\xa0"),
    "entities": f"<pre>{DOUBLE.replace('[2 * x for x in xs]', '[2 * x for x in xs if x &lt; 9]')}</pre>",
    "two names at once": f"a, b = 1, 2\n{DOUBLE}",
}


def first_program(texts: tuple[str, ...]) -> dict[str, object]:
    """The names of the first text that compiles, as the sandbox would choose it."""
    for text in texts:
        try:
            code = compile(whole(text), "answer", "exec", dont_inherit=True)
        except SyntaxError:
            continue
        names: dict[str, object] = {"__name__": "program"}
        exec(code, names)  # noqa: S102 (the texts of this file)
        return names
    raise AssertionError(texts)


@pytest.mark.parametrize("name", FORMS)
def test_programs_are_found(name: str) -> None:
    double = first_program(readings(FORMS[name], lambda asked: asked == "double"))["double"]
    assert callable(double) and double([1, 2]) == [2, 4]


@pytest.mark.parametrize("answer", ["", " \n", "I cannot do it, sorry.", "```python\n```", "It is impossible."])
def test_words_are_no_program(answer: str) -> None:
    assert readings(answer, lambda _: True) == ()


@pytest.mark.parametrize(
    "answer", [f"{DOUBLE})\n", f"{DOUBLE}\nprint(double([1])\n", "def double(xs:\n    return 0", "improt os\nx = 1"]
)
def test_faulty_programs_are_not_mended(answer: str) -> None:
    with pytest.raises(AssertionError):
        first_program(readings(answer, lambda asked: asked == "double"))


@pytest.mark.parametrize(
    "answer", ["    return a\n```\nUsage:\n```python\nf(1)\n```", "return a\n```\nf(1)\n```", "a\nreturn a\n```\n"]
)
def test_a_body_may_stand_before_the_fence_that_ends_it(answer: str) -> None:
    forms = readings(answer, lambda asked: asked == "f")
    f = first_program(tuple(body for form in forms for body in bodies("def f(a):\n", form)))["f"]
    assert callable(f) and f(3) == 3


SETUP = 'def total(xs):\n    """Sum."""\n'
BODIES = {
    "as it was": "    return sum(xs)\n",
    "stripped": "return sum(xs)",
    "tabs": "\tresult = 0\n\tfor x in xs:\n\t\tresult += x\n\treturn result",
    "two columns": "  result = 0\n  for x in xs:\n    result += x\n  return result",
    "first line stripped": "result = 0\n    for x in xs:\n        result += x\n    return result",
    "first line stripped, tabs": "result = 0\n\tfor x in xs:\n\t\tresult += x\n\treturn result",
    "all lines stripped": "result = 0\nfor x in xs:\n    result += x\nreturn result",
    "goes on": "    return sum(xs)\n\n\ndef other(y):\n    if y",
    "more behind": "    return sum(xs)\n\nprint(total([1]))",
    "function in it": "    def add(a, b):\n        return a + b\n    return add(sum(xs), 0)",
    "comment behind": "    return sum(xs)\n# the end",
}


@pytest.mark.parametrize("setup", [SETUP, "def total(xs):\n", "def total(\n    xs,\n):\n", SETUP.replace("    ", "\t")])
@pytest.mark.parametrize("name", BODIES)
def test_bodies_are_put_behind_their_head(name: str, setup: str) -> None:
    total = first_program(tuple(bodies(setup, BODIES[name])))["total"]
    assert callable(total) and total([1, 2]) == 3


@pytest.mark.parametrize(
    ("program", "names"),
    [
        ("def f(x): pass\nclass  A: pass\nasync def g(): pass", {"f": True, "A": True, "g": True}),
        ("f: Callable = lambda x: x\ny = 3\nz == 3", {"f": True, "y": False}),
        ("import a.b, c as d\nfrom e import (f,\n  g as h)", {"a": True, "d": True, "f": True, "h": True}),
        ("from math import *\nimport the libs (numpy[all], *)\nx = 1", {"x": False}),
        ("try:\n    def f(): pass\nexcept E:\n    f = 1\ndef g():\n    inner = 1\n    def h(): pass", {"f": True, "g": True}),
        ("    def f():\n        x = 1", {"f": True}),
    ],
)
def test_names_at_the_outermost_level(program: str, names: dict[str, bool]) -> None:
    assert bound_names(program) == names


@pytest.mark.parametrize(
    "line",
    [
        "a, b = b, a",
        "print('all is well, is it')",
        "x = y  # as you can see",
        "return x if y else z",
        "lambda x: x",
        "match x:",
        "@f",
        "not x",
        "for a in b: c",
        "from a import b as c",
        "async def f(): await g",
        "    indented words are code",
        "f(x)[0] -= 1",
    ],
)
def test_code_is_not_prose(line: str) -> None:
    assert without_prose(line) == line


@settings(max_examples=300)
@given(st.one_of(st.text(), st.text(alphabet="def f(x):\n\t `~'\"#\\=+1>.[]", max_size=80)))
def test_any_text_is_read(text: str) -> None:
    assert all(form.strip() for form in readings(text, lambda name: name == "f"))


@pytest.mark.parametrize(
    "unit",
    [
        "`",
        "~~~\n",
        "```\n",
        "```python\nf = 1\n",
        "<code ",
        "a-",
        "import (",
        "'",
        "> ",
        "<|",
        "x = ",
        ">>> f = 1\n",
        "def f(\n",
        " \t",
    ],
)
def test_long_texts_come_to_an_end(unit: str) -> None:
    """Reading is about linear: a pattern that is not would take hours here."""
    text = (unit * 100_000)[:100_000]
    for program in readings(text, lambda name: name == "f")[:3]:
        assert all(body.startswith("def f():") for body in bodies("def f():\n", program))
