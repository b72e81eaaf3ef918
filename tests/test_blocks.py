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
    ],
)
def test_last_prefix_starts_the_answer(text: str, reasoning: str, answer: str | None) -> None:
    assert split_answer(text, ["####", "The answer is"]) == (reasoning, answer)


def test_no_prefix_no_answer() -> None:
    assert split_answer("x #### 3", []) == ("x #### 3", None)
    assert split_answer("x #### 3", [""]) == ("x #### 3", None)


def test_calculator_annotations_are_removed_and_shifts_are_not() -> None:
    assert strip_calculator("48/2 = <<48/2=24>>24 clips, <<5=5>>5") == "48/2 = 24 clips, 5"
    assert strip_calculator("cout << x;\ncin >> y") == "cout << x;\ncin >> y"
    assert strip_calculator("a << 2; b >> 3") == "a << 2; b >> 3"
