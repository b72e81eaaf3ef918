"""Sentences and answers: what is split, what is kept whole, and that nothing but white space is lost."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ladir.data.blocks import group_sentences, split_answer, split_sentences, strip_calculator


@pytest.mark.parametrize(
    "sentences",
    [
        ["One two.", "Three four!", "Five?", "Six"],
        ["It is 3.14 or 1,000.5 m.", "So 2.5 x 4 = 10."],
        ["She has $5.50.", "He has $20.", "Together $25.50."],
        ["She pays $5 and $6.", "That is $11."],
        ["Mr. Smith and Dr. J. K. Jones met.", "They left."],
        ["The U.S. Army bought 5.", "It paid."],
        ["E.g. five, i.e. half of ten, vs. six.", "Done."],
        ["It opens at 5 p.m.", "She is late."],
        ["It opens at 5 p.m. on Monday."],
        ["See Fig. 3 and Eq. 4.", "Then stop."],
        ["Take No. 5 first.", "Then go."],
        ["Is it six?", "No.", "It is five."],
        ["The board is 6 ft. long.", "Cut it."],
        ["Wait... what is it... 5?", "Yes."],
        ["So it goes...", "Then it stops."],
        ["1, 2, ... 10 are ten numbers.", "Add them."],
        ['"Stop!" he said.', "She stopped."],
        ['He said "stop."', "She stopped."],
        ["(It is five.)", "Then six."],
        ["1. Add three.", "2. Take two."],
        ["Let $x = 1. Then$ be so.", "Next $y$ is 2."],
        ["We get \\(a. B\\) here.", "Next."],
        ["Use `a. B` here.", "Next."],
        ["これは五です。", "次は六です。"],
        ["There are 6!/(2! * 3!) = 60 ways.", "So 5! = 120.", "Then (3!)! = 720.", "n! > 2^n for n > 3."],
        ["She yelled 5!", "Then she left."],
        ["a = 5.", "b = 6.", "x_1 = 3.", "f(x) = 2.", "x, y = 1, 2.", "cost > 5."],
        ["So x is 5.", "y is 6.", "k^2 is odd.", "m and n are even."],
        ["\u03b1 = 5.", "f'(x) = 2.", "sin x = 1.", "gcd(4, 6) = 2."],
        ["C(5,2) = 5!/(3! 2!) = 10.", "Done!"],
        ["It is 5 ft.", "x = 6."],
        ["We take e.g. x = 5 or approx. y = 6."],
        ["यह पाँच है।", "अगला छह है।"],
        ["هل هو خمسة؟", "نعم هو كذلك."],
        ["یہ پانچ ہے۔", "اگلا چھ ہے۔"],
        ["これは３．５です．", "次は六です．"],
        ["「止まれ。」と彼は言った。", "次は六です。"],
        ["We get $x = 5.$", "Then \\(y = 2.\\)", "Next."],
        ["**1.** Add three.", "**2.** Take two."],
        ["Step 1. Add three.", "Step 2. Take two."],
        ["See www.a.com.", "Mail a.b@c.org.", "Use v1.2.3 or https://a.b/c?d=1.", "Is it so?!", "Yes."],
        ["a) Add three.", "b) Take two."],
        ["Mt. Everest is 5\u00a0km high.", "It is cold."],
    ],
    ids=lambda sentences: sentences[0][:24],
)
def test_sentences(sentences: list[str]) -> None:
    assert split_sentences(" ".join(sentences)) == sentences
    assert split_sentences("\n".join(sentences)) == sentences
    assert split_sentences("\n\n  " + " \r\n\n".join(sentences) + "\n") == sentences


@pytest.mark.parametrize(
    "sentences",
    [
        ["x=4", "4x=16"],
        ["- first", "- second"],
        ["a) Add three.", "b) Take two."],
        ["\\[ a = 1.\nB = 2. C \\]", "Next."],
        ["$$ a. B\nC. D $$", "Next."],
        ["\\begin{align}\na &= 1. \\\\\nB &= 2.\n\\end{align}", "So it is."],
        ["\\begin{a}\n\\begin{a}\nx\n\\end{a}\ny. Z\n\\end{a}", "Next."],
        ["Code:", "```python\nx = 1.\n\ny = 2. Z\n```", "Done."],
        ["```\nnever closed\n\nx. Y"],
    ],
    ids=lambda sentences: sentences[0][:24],
)
def test_lines(sentences: list[str]) -> None:
    assert split_sentences("\n".join(sentences)) == sentences


HARD = st.sampled_from(
    [
        ". ",
        "\n",
        "$",
        "$$",
        "\\[",
        "\\]",
        "\\(",
        "```",
        "`",
        "\\begin{a}",
        "\\end{a}",
        "Mr. ",
        "... ",
        "! ",
        "5.2",
        "U.S. ",
        "A",
        "b",
    ]
)


@settings(max_examples=300)
@given(st.one_of(st.text(), st.lists(st.one_of(HARD, st.text(max_size=3)), max_size=30).map("".join)), st.integers(0, 4))
def test_nothing_but_white_space_is_lost(text: str, per_block: int) -> None:
    def solid(string: str) -> str:
        return re.sub(r"\s", "", string)

    sentences = split_sentences(text)
    assert all(sentence == sentence.strip() and sentence for sentence in sentences)
    assert solid("".join(sentences)) == solid(text)
    blocks = group_sentences(sentences, per_block)
    assert solid("".join(blocks)) == solid(text)
    assert len(blocks) == (min(len(sentences), 1) if per_block == 0 else -(-len(sentences) // per_block))


@pytest.mark.parametrize(
    "piece",
    [
        "\\begin{a}",
        "\\end{a}",
        "$",
        "$x",
        "\\[",
        "```\n",
        "`",
        ". A",
        "... ",
        "Mr. ",
        "(",
        "<<",
        "A. ",
        " ",
        "\\(",
        ".",
        "=",
        "!)",
    ],
)
def test_long_hostile_texts_do_not_hang(piece: str) -> None:
    for text in (piece * (100_000 // len(piece)), "<<" + piece * (100_000 // len(piece)) + "x"):
        assert isinstance(split_sentences(text), list)
        strip_calculator(text)
        split_answer(text, ["####", "A"])


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("It is 3.\n#### 3", "It is 3.", "3"),
        ("It is 3. The answer is: 3.", "It is 3.", "3."),
        ("#### 1\nmore\n#### 2 ", "#### 1\nmore", "2"),
        ("The answer is 4? No.\n#### 5", "The answer is 4? No.", "5"),
        ("no answer", "no answer", None),
        ("steps ####", "steps", ""),
        ("#### 7", "", "7"),
        ("It is 3. THE ANSWER IS 3", "It is 3.", "3"),
        ("It is 3. So, the answer is 3", "It is 3.", "3"),
        ("##### 7", "##### 7", None),
        ("The answer isn't 3.", "The answer isn't 3.", None),
    ],
)
def test_last_prefix_starts_the_answer(text: str, reasoning: str, answer: str | None) -> None:
    assert split_answer(text, ["####", "The answer is"]) == (reasoning, answer)


def test_other_line_ends_end_sentences_too() -> None:
    assert split_sentences("one\rtwo\u2028three\x0cfour") == ["one", "two", "three", "four"]


def test_no_prefix_no_answer() -> None:
    assert split_answer("x #### 3", []) == ("x #### 3", None)
    assert split_answer("x #### 3", [""]) == ("x #### 3", None)


def test_calculator_annotations_are_removed_and_shifts_are_not() -> None:
    assert strip_calculator("48/2 = <<48/2=24>>24 clips, <<5=5>>5") == "48/2 = 24 clips, 5"
    assert strip_calculator("so 6 = <<2*3=6>>. And $5 = $<<10/2=5>> each") == "so 6 = 6. And $5 = $5 each"
    assert strip_calculator("cout << x;\ncin >> y") == "cout << x;\ncin >> y"
    assert strip_calculator("a << 2; b >> 3") == "a << 2; b >> 3"
