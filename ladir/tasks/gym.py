"""Records from the generators of reasoning-gym (Stojanovski et al. 2025, arXiv:2505.24760; an optional package).

GSM-Symbolic is its main set here: word problems in GSM8K's form, made of templates with chains of thought.
"""

from __future__ import annotations

import difflib
import itertools
import json
import logging
import os
import random
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ladir.config import GymSettings
from ladir.errors import UnusableError
from ladir.tokens import build_bpe_tokenizer, vocabulary_size

logger = logging.getLogger(__name__)

TOKENIZER = "tokenizer"
#: what stands before the answer, as in GSM8K
MARK = "####"

_AT_A_TIME = 5000  # items of one data set object; the next one has another seed
_PATIENCE = 3000  # items without a new question after which a set is taken to have no more
#: fields of an item's metadata that hold a chain of thought, a text or a list of steps
_CHAINS = ("answer_cot", "cot", "chain_of_thought", "reasoning", "states")
#: GSM-Symbolic says this at the end of every question; GSM8K does not
_INSTRUCTION = " Give the result as your final answer. Do not include units."


def write(settings: GymSettings, seed: int, folder: str | os.PathLike[str]) -> dict[str, int]:
    """Generate and write ``{train,validation,test}.jsonl``, ``test_held_out.jsonl`` and ``tokenizer/`` into ``folder``.

    Returns the number of lines (of the tokenizer: tokens) by name.  Each file appears whole or not at all.
    """
    target = Path(folder)
    splits = generate(settings, seed)
    target.mkdir(parents=True, exist_ok=True)
    written = {}
    for name, rows in splits.items():
        aside = target / f".{name}.{os.getpid()}"
        aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        aside.replace(target / f"{name}.jsonl")
        written[f"{name}.jsonl"] = len(rows)
    if settings.vocabulary:
        texts = (row[field] for row in splits["train"] for field in ("input", "output"))
        tokenizer = build_bpe_tokenizer(texts, settings.vocabulary)
        tokenizer.save_pretrained(target / TOKENIZER)
        written[TOKENIZER] = vocabulary_size(tokenizer)
    return written


def generate(settings: GymSettings, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Records by split, no question twice; the same settings and seed give the same ones.

    A record has ``input``, ``output`` (the chain, a sentence a line, and ``#### answer``) and, of a set made of templates,
    ``template``, its number.  Raises UnusableError where the set is not there, has no chains, or has too few questions.
    """
    _check_set(settings.dataset)
    kept, held_out = _templates(settings, random.Random(f"{seed} templates"))
    # Training records last: the others do not depend on their number.
    first, last = settings.validation, settings.validation + settings.test
    drawn = _draw(settings, kept, last + settings.train, random.Random(f"{seed} records"))
    splits = {"train": drawn[last:], "validation": drawn[:first], "test": drawn[first:last]}
    if held_out:
        splits["test_held_out"] = _draw(settings, held_out, settings.test, random.Random(f"{seed} held out"))
    return splits


def _package() -> ModuleType:
    """reasoning-gym, which an installation may lack."""
    try:
        import reasoning_gym.factory
    except ModuleNotFoundError as error:
        raise UnusableError(
            f"the package {error.name} is not installed for {sys.executable}, with which these records are made: "
            f"{sys.executable} -m pip install -r requirements-examples.txt"
        ) from error
    return reasoning_gym.factory


def _check_set(name: str) -> None:
    """UnusableError where there is no such set, or its items have no chain of thought."""
    package = _package()
    if name not in package.DATASETS:
        close = difflib.get_close_matches(name, package.DATASETS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else "gsm_symbolic is one"
        raise UnusableError(f"gym.dataset={name}: reasoning-gym has no such set; {hint}")
    if _chain(package.create_dataset(name, seed=0, size=1)[0]) is None:
        raise UnusableError(
            f"gym.dataset={name}: its items have questions and answers, but no chain of thought to train on; take gsm_symbolic, "
            "or have a model write chains, keep the right ones and name that file in data.train"
        )


def _chain(item: Mapping[str, Any]) -> str | None:
    """An item's chain of thought, if it has one."""
    found = [item["metadata"].get(field) for field in _CHAINS]
    texts = ("\n".join(map(str, chain)) if isinstance(chain, list) else chain for chain in found)
    return next((text for text in texts if isinstance(text, str) and text.strip()), None)


def _templates(settings: GymSettings, rng: random.Random) -> tuple[Collection[int], Collection[int]]:
    """Templates of most files, and those that are held out; both empty where the set has none."""
    name, chosen = settings.dataset, settings.templates
    known = set(_template_numbers(_package().create_dataset(name, seed=0, size=_AT_A_TIME)) or [])
    if not known and (chosen or settings.held_out_templates):
        wrong = "templates" if chosen else "held_out_templates"
        raise UnusableError(f"gym.{wrong}: {name} is not made of templates; leave it away")
    if unknown := sorted(set(chosen) - known):
        raise UnusableError(f"gym.templates: {name} has no template {unknown[0]}; it has {', '.join(map(str, sorted(known)))}")
    templates = sorted(set(chosen) or known)
    if templates and settings.held_out_templates >= len(templates):
        raise UnusableError(
            f"gym.held_out_templates={settings.held_out_templates}: of {len(templates)} templates none would be left to train on"
        )
    held_out = set(rng.sample(templates, settings.held_out_templates))
    return set(templates) - held_out, held_out


def _template_numbers(dataset: Any) -> list[int] | None:
    """The template of every item of a data set object, where the set is made of templates."""
    numbers: list[int] | None = getattr(dataset, "task_indices", None)
    return numbers


def _draw(settings: GymSettings, templates: Collection[int], wanted: int, rng: random.Random) -> list[dict[str, Any]]:
    """``wanted`` records with questions of their own, of ``templates`` (empty: of all)."""
    records: dict[str, dict[str, Any]] = {}
    items, unusable, since = _items(settings.dataset, templates, rng), 0, 0
    while len(records) < wanted and since < _PATIENCE:
        record = _record(*next(items))
        new = record is not None and record["input"] not in records
        since = 0 if new else since + 1
        if record is None:
            unusable += 1
        else:
            records.setdefault(record["input"], record)
    if unusable:
        left_out = "%s: %d items whose chain ends with another answer than their own were left out"
        logger.warning(left_out, settings.dataset, unusable)
    if len(records) < wanted:
        raise UnusableError(
            f"gym: {wanted} records are asked for (train + validation + test) but {settings.dataset} gave only {len(records)} "
            "different questions; ask for fewer, or for more templates"
        )
    return list(records.values())


def _items(name: str, templates: Collection[int], rng: random.Random) -> Iterator[tuple[dict[str, Any], int | None]]:
    """Items with their templates, without end."""
    while True:
        dataset = _package().create_dataset(name, seed=rng.getrandbits(32), size=_AT_A_TIME)
        numbers = _template_numbers(dataset) or itertools.repeat(None, _AT_A_TIME)
        for place, number in enumerate(numbers):
            if not templates or number in templates:
                yield dataset[place], number


def _record(item: Mapping[str, Any], template: int | None) -> dict[str, Any] | None:
    """An item as a record; None where its chain ends with another answer than its own."""
    chain, answer = _chain(item), str(item["answer"]).strip()
    if chain is None:
        return None
    reasoning, mark, marked = chain.rpartition(MARK)
    if mark and not _same(marked.strip(), answer):
        return None
    steps = reasoning if mark else chain
    record: dict[str, Any] = {
        "input": item["question"].removesuffix(_INSTRUCTION).strip(),
        "output": f"{steps.strip()}\n{MARK} {answer}",
    }
    return record if template is None else {**record, "template": template}


def _same(marked: str, answer: str) -> bool:
    """Whether two answers are one text or one number."""
    try:
        return marked == answer or float(marked.replace(",", "")) == float(answer.replace(",", ""))
    except ValueError:
        return False
