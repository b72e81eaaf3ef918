"""Hub ids: the real client of ``datasets`` fetches sets, laid out as the public ones are, from a stand-in for the Hub."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tests.hub import COMMIT, hub

#: name, configuration and split; a row as it is published, the field that asks first; its question and answer for us
SETS: list[tuple[tuple[str, str, str], dict[str, Any], tuple[str, str]]] = [
    (
        ("openai/gsm8k", "main", "train"),
        {"question": "How many are 2 and 2?", "answer": "2+2=<<2+2=4>>4. So 4.\n#### 4"},
        ("How many are 2 and 2?", "4"),
    ),
    (
        ("EleutherAI/hendrycks_math", "algebra", "test"),
        {"problem": "Solve $x=1$.", "level": "Level 1", "type": "Algebra", "solution": "It is so. Hence $\\boxed{1}$."},
        ("Solve $x=1$.", "1"),
    ),
    (
        ("google-research-datasets/mbpp", "full", "test"),
        {
            "text": "Write a function that adds one.",
            "task_id": 11,
            "code": "def plus(n):\n    return n + 1",
            "test_list": ["assert plus(1) == 2"],
            "test_setup_code": "",
            "challenge_test_list": [],
        },
        (
            "Write a function that adds one.\nYour code should pass these tests:\n\nassert plus(1) == 2",
            "def plus(n):\n    return n + 1",
        ),
    ),
    (
        ("openai/openai_humaneval", "openai_humaneval", "test"),
        {
            "prompt": 'def plus(n):\n    """Adds one."""\n',
            "task_id": "HumanEval/0",
            "canonical_solution": "    return n + 1\n",
            "test": "def check(candidate):\n    assert candidate(1) == 2\n",
            "entry_point": "plus",
        },
        ('def plus(n):\n    """Adds one."""\n', 'def plus(n):\n    """Adds one."""\n    return n + 1'),
    ),
]

#: reads Hub ids in a process of its own, since the client looks at its surroundings once
READ = """
import json, sys
from ladir.config import DataSettings
from ladir.data.records import read_records
from ladir.data.rows import hub_commit
from ladir.errors import UnusableError

found = {}
for name in sys.argv[1:]:
    try:
        result = read_records(name, DataSettings())
        found[name] = [[[record.question, record.answer] for record in result.records], [bad.source for bad in result.bad]]
    except UnusableError as error:
        found[name] = str(error)
json.dump({**found, "commits": [hub_commit(name) for name in sys.argv[1:]]}, sys.stdout)
"""


def read(names: Sequence[str], endpoint: str, home: Path, offline: bool = False) -> dict[str, Any]:
    """By name: the records (question, answer) and where the bad ones are; or why there are none."""
    surroundings = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    surroundings |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}
    command = [sys.executable, "-c", READ, *names]
    ended = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    return dict(json.loads(ended.stdout))


def published(config: str, split: str, rows: list[dict[str, Any]]) -> dict[str, bytes]:
    """The files of a set: its card, which names configurations and splits, and a Parquet file."""
    card = {"configs": [{"config_name": config, "data_files": [{"split": split, "path": f"{config}/{split}-*"}]}]}
    parquet = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    return {
        "README.md": f"---\n{yaml.safe_dump(card)}---\n".encode(),
        f"{config}/{split}-00000-of-00001.parquet": parquet.getvalue(),
    }


def test_sets_are_fetched_whole_and_kept_and_what_is_not_there_is_named(tmp_path: Path) -> None:
    names = [":".join(where) for where, *_ in SETS]
    absent = ["openai/gsm8k:main:valid", "openai/gsm8k:sub:train", "openai/gsm9k:main:train"]
    sets = {}
    for (name, config, split), row, _ in SETS:
        without_question = {**row, next(iter(row)): None}
        sets[name] = published(config, split, [row, without_question, row])
    with hub(sets) as endpoint:
        fetched = read([*names, *absent], endpoint, tmp_path)
    for name, (*_, expected) in zip(names, SETS, strict=True):
        assert fetched[name] == [[list(expected)] * 2, [f"{name}:row 2"]]
    at = f"openai/gsm8k@{COMMIT}:main:train"
    assert fetched.pop("commits") == [COMMIT] * len(names) + [COMMIT, None, None]  # a split is no part of it
    for name in absent:
        assert fetched[name].startswith(f"{name}: neither a file")
    kept = read([*names, at], "http://127.0.0.1:9", tmp_path, offline=True)
    assert kept.pop("commits") == [COMMIT] * (len(names) + 1)
    assert kept.pop(at)[0] == fetched[names[0]][0]
    assert kept == {name: fetched[name] for name in names}
