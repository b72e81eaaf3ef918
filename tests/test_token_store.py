"""The token store holds what reading and tokenizing by hand gives, on any number of processes, and is made once."""

from __future__ import annotations

import ast
import gzip
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import Whitespace

from ladir.config import Config, DataSettings
from ladir.config.loader import load_config
from ladir.data import question_store, tokenizing
from ladir.data.columns import TokenRecord
from ladir.data.encode import check_records
from ladir.data.prompts import CopyPairs, bos_ids, chain_pairs
from ladir.data.records import BadRecords, RecordSet, read_records
from ladir.data.rows import data_files
from ladir.data.token_lists import Joined, TokenLists
from ladir.data.token_store import Store, TokenStore, store_key, stored_chains, stored_sentences
from ladir.data.tokenizing import in_order, write_chains, write_records, write_sentences
from ladir.errors import UnusableError
from ladir.tasks import get_task
from ladir.tokens import build_word_tokenizer, encode_text, tokenization_fingerprint
from tests.distributed import ProcessGroup
from tests.tiny import tiny_lm
from training import train_vae
from training.phases import tokens
from training.phases.tokens import Tokens
from training.runtime.distributed import World, run_as_program
from training.runtime.files import locked, sha256
from training.runtime.preemption import INTERRUPTED_STATUS, BrokenOff
from training.runtime.run import open_run

ALONE = World(0, 1, 0, torch.device("cpu"))
WORDS = build_word_tokenizer(["a", "b", "c", "d.", "e.", "####", "\n", "1", "2"])
LIMITS = DataSettings(max_block_tokens=4)


def record(i: int) -> dict[str, str]:
    return {"input": "a b"[: 1 + 2 * (i % 2)], "output": "\n".join(["a d.", "b c e."] * (1 + i % 3)) + f"\n#### {1 + i % 2}"}


def rows(start: int, count: int) -> list[bytes]:
    """Good records, one in five that is no JSON, and one in seven with a block that is too long."""
    found = []
    for i in range(start, start + count):
        row = json.dumps(record(i) if i % 7 else {**record(i), "output": "a a a a a d.\n#### 1"})
        found.append((row[:-1] if i % 5 == 3 else row).encode())
    return found


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Three files of three kinds, with blank lines."""
    (tmp_path / "a.jsonl").write_bytes(b"\n" + b"\n".join(rows(0, 13)))
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as packed:
        packed.write(b"\n\n".join(rows(13, 4)))
    (tmp_path / "c.json").write_text(json.dumps([record(i) for i in range(1, 6)]))
    return [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz", "c.json")]


def by_hand(files: Sequence[str], settings: DataSettings = LIMITS) -> tuple[list[Any], list[Any], int]:
    """Usable and bad records of all files, and how many there are."""
    read = [read_records(file, settings) for file in files]
    whole = RecordSet([r for s in read for r in s.records], [b for s in read for b in s.bad], sum(s.total for s in read))
    usable, bad = check_records(whole, WORDS, settings)
    return list(usable), bad, whole.total


@pytest.mark.parametrize("processes", [1, 2])
def test_a_store_holds_what_reading_by_hand_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], processes: int
) -> None:
    monkeypatch.setattr(tokenizing, "_ROWS", 3)
    write_records(tmp_path / "store", files, LIMITS, WORDS, processes)
    store = TokenStore(Store(tmp_path / "store", files))
    usable, bad, total = by_hand(files)
    assert (len(store), store.store.num_bad, store.store.total) == (len(usable), len(bad), total) and len(bad) > 3
    assert list(store) == [TokenRecord(one.question, one.blocks, one.answer) for one in usable]
    assert store.store.bad() == bad
    for text, one in zip(store.texts, usable, strict=True):
        assert (text.question, text.blocks, text.answer) == (one.record.question, one.record.blocks, one.record.answer)
        assert text.source == one.record.source
    blocks = [block for one in usable for block in one.blocks]
    assert [store.blocks.length(i) for i in range(len(blocks))] == list(map(len, blocks))
    assert list(store.blocks) == blocks and store.blocks[2:-1] == blocks[2:-1]
    write_chains(tmp_path / "chains", store, "####", WORDS, processes)
    chains = stored_chains(Store(tmp_path / "chains", []))
    assert list(chains) == list(chain_pairs(WORDS, [one.record for one in usable], "####"))


def test_copies_are_made_of_the_stored_sentences() -> None:
    texts = ["a b", "c", "d."]
    pairs = CopyPairs(WORDS, [encode_text(WORDS, text) for text in texts], np.array([2, 0, 0]))
    start, newline = bos_ids(WORDS), encode_text(WORDS, "\n")
    expected = [encode_text(WORDS, texts[i]) for i in (2, 0, 0)]
    assert list(pairs) == [(start + ids + newline, [*ids, WORDS.eos_token_id]) for ids in expected]
    both = Joined(TokenLists([[1], [2, 3]]), TokenLists(), [[4]])
    assert (len(both), list(both), both[-1], both[1:]) == (3, [[1], [2, 3], [4]], [4], [[2, 3], [4]])


def test_a_list_and_a_pattern_name_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    for name in ("b1.jsonl", "b2.jsonl", "a[1].jsonl", "deep/b3.jsonl"):
        (tmp_path / name).touch()
    assert data_files(None) == [] and data_files("x.jsonl") == ["x.jsonl"]
    assert data_files(["b*.jsonl", "openai/gsm8k:main:train", "a[1].jsonl"]) == [
        "b1.jsonl", "b2.jsonl", "openai/gsm8k:main:train", "a[1].jsonl",
    ]  # fmt: skip
    assert data_files("**/b?.jsonl") == ["b1.jsonl", "b2.jsonl", "deep/b3.jsonl"]
    with pytest.raises(FileNotFoundError, match=r"c\*.jsonl: no file matches.*correct the pattern"):
        data_files("c*.jsonl")


def test_a_list_of_files_is_a_setting(tmp_path: Path) -> None:
    assert load_config(None, ["data.train=[a.jsonl, 007]"]).data.train == ["a.jsonl", "007"]
    assert load_config(None, ["data.train=007"]).data.train == "007"
    (tmp_path / "c.yaml").write_text("data:\n  train:\n    - a.jsonl\n    - b*.jsonl\n")
    assert load_config(str(tmp_path / "c.yaml")).data.train == ["a.jsonl", "b*.jsonl"]
    for wrong in ("[]", "{a: b}", "[[a]]"):
        with pytest.raises(ValueError, match=r"data.train=.*must be text, or a list of some"):
            load_config(None, [f"data.train={wrong}"])


def configure(folder: Path, *settings: str) -> Config:
    return load_config(None, [f"run.folder={folder}", "data.max_block_tokens=4", "data.on_bad_record=skip", *settings])


def test_a_store_is_made_once_by_content_and_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    made = []

    def counted(write: Callable[..., None]) -> Callable[..., None]:
        return lambda folder, *rest: made.append(folder.name) or write(folder, *rest)

    for name in ("write_records", "write_chains"):
        monkeypatch.setattr(tokens, name, counted(getattr(tokens, name)))

    def opened(*settings: str, tokenizer: Any = WORDS) -> TokenStore:
        one = Tokens(configure(tmp_path, *settings), ALONE, tokenizer)
        store = one.records(files[:2])
        assert store is not None
        one.chains(store)
        return store

    with caplog.at_level(logging.WARNING):
        first = opened()
    assert len(made) == 2 and f"{first.store.num_bad} of 17 records are left out" in caplog.text
    assert list(opened("data.processes=1", "run.seed=3")) == list(first) and len(made) == 2
    with pytest.raises(BadRecords, match="of 17 records cannot be used"):
        opened("data.on_bad_record=error")
    assert len(made) == 2
    opened("data.max_blocks=30")
    opened(tokenizer=build_word_tokenizer(["a"]))
    opened(f"data.store={tmp_path / 'elsewhere'}")
    assert len(made) == 8 and len({*made}) == 6
    arrow = first.store.folder / "tokens.arrow"
    arrow.write_bytes(arrow.read_bytes()[:-8])
    assert list(opened()) == list(first) and len(made) == 9
    Path(files[1]).write_bytes(gzip.compress(b"\n".join(rows(13, 3))))
    assert len(list(Tokens(configure(tmp_path), ALONE, WORDS).records(files[:2]) or [])) == len(first) - 1


def test_questions_are_read_once_for_a_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"input": "a", "answer": "1"}\n{"input": "b"}\n{"input": "c", "tests": "assert True"}\n')
    read = Tokens(configure(tmp_path), ALONE, WORDS)
    with caplog.at_level(logging.WARNING):
        first = list(read.questions(str(file), get_task("maths")))
    assert [record.question for record in first] == ["a"] and caplog.text.count("2 of 3 records are left out") == 1
    assert [record.question for record in read.questions(str(file), get_task("code"))] == ["c"]
    with pytest.raises(UnusableError, match=r"a\.jsonl:1: not a Countdown record"):
        read.questions(str(file), get_task("countdown"))
    monkeypatch.setattr("ladir.data.question_store.question_of", lambda *_: pytest.fail("read again"))
    assert list(read.questions([str(file)], get_task("maths"))) == first
    with monkeypatch.context() as patch, pytest.raises(pytest.fail.Exception, match="read again"):
        patch.setattr(tokens, "code_digest", lambda *_: "a task that was mended")
        read.questions(str(file), get_task("maths"))
    with pytest.raises(BadRecords, match="2 of 3 records cannot be used"):
        Tokens(configure(tmp_path, "data.on_bad_record=error"), ALONE, WORDS).questions(str(file), get_task("maths"))


def test_nothing_that_questions_are_read_with_is_left_out_of_what_a_store_of_them_depends_on() -> None:
    """Else a store of before would hide what another version of it reads."""
    known = {module.__name__ for module in tokens.READING}
    readers = {name for name in known if name.startswith("ladir.data.")} - {question_store.__name__}  # which also keeps them
    for name in sorted(readers):
        tree = ast.parse(Path(str(sys.modules[name].__file__)).read_text(encoding="utf-8"))
        found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        used = {node.module for node in found if node.module != "ladir.data"}
        used |= {f"ladir.data.{alias.name}" for node in found if node.module == "ladir.data" for alias in node.names}
        assert {module for module in used if str(module).startswith("ladir.data.")} <= known, name


def test_the_tokenizer_s_rules_are_part_of_what_a_store_depends_on() -> None:
    one, other = build_word_tokenizer(["a", "b"]), build_word_tokenizer(["a", "b"])
    assert tokenization_fingerprint(one) == tokenization_fingerprint(other)
    encode_text(one, "a")  # sets truncation and padding aside
    assert tokenization_fingerprint(one) == tokenization_fingerprint(other)
    other.backend_tokenizer.pre_tokenizer = Whitespace()
    assert tokenization_fingerprint(one) != tokenization_fingerprint(other)
    keys = {store_key(kind, sources, LIMITS, "t") for kind in ("a", "b") for sources in (["1", "2"], ["2", "1"])}
    assert len(keys) == 4


def test_files_that_cannot_be_read_as_a_whole_leave_no_store(tmp_path: Path, files: list[str]) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    for file, error in ((tmp_path / "empty.jsonl", UnusableError), (tmp_path / "none.jsonl", FileNotFoundError)):
        with pytest.raises(error, match=str(file)):
            Tokens(configure(tmp_path), ALONE, WORDS).records([files[0], str(file)])
    assert [path for path in (tmp_path / "ladir" / "tokens").iterdir() if path.is_dir()] == []


def test_a_torn_store_says_so(tmp_path: Path, files: list[str]) -> None:
    write_records(tmp_path / "store", files, LIMITS, WORDS, 1)
    with pytest.raises(FileNotFoundError, match="no token store"):
        Store(tmp_path / "none", files)
    (tmp_path / "store" / "index.json").write_text("{")
    with pytest.raises(UnusableError, match=r"damaged.*delete it, and it is made again"):
        Store(tmp_path / "store", files)


def test_extra_sentences_are_stored_alike(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "s.jsonl"
    file.write_text('{"text": "a b"}\n{"txt": "c"}\n1\n{"text": "a b c"}\n')
    limits = DataSettings(max_block_tokens=2)
    write_sentences(tmp_path / "store", [str(file)], limits, WORDS, 1)
    store = Store(tmp_path / "store", [str(file)])
    assert list(stored_sentences(store)) == [[3, 4]]
    message = (
        r"3 of 4 records(.|\n)*s.jsonl:2: no field 'text'(.|\n)*s.jsonl:3: a JSON number(.|\n)*s.jsonl:4: it has 3 tokens, "
        r"of 1 to data.max_block_tokens=2"
    )
    with pytest.raises(BadRecords, match=message):
        Tokens(load_config(None, [f"run.folder={tmp_path}", "data.max_block_tokens=2"]), ALONE, WORDS).sentences(str(file))
    skip = load_config(None, [f"run.folder={tmp_path}", "data.max_block_tokens=2", "data.on_bad_record=skip"])
    with caplog.at_level(logging.WARNING):
        assert list(Tokens(skip, ALONE, WORDS).sentences(str(file))) == [[3, 4]]
    assert "3 of 4 records are left out" in caplog.text
    assert list(Tokens(skip, ALONE, WORDS).sentences(None)) == []


def test_what_fails_in_a_helper_s_process_is_raised_and_nothing_random_is_used_up() -> None:
    def work(chunk: int) -> int:
        if chunk == 5:
            raise ValueError("of chunk 5")
        return chunk * chunk

    state = torch.get_rng_state()
    assert list(in_order(work, range(5), 2)) == [0, 1, 4, 9, 16]
    assert torch.equal(torch.get_rng_state(), state)  # models start from the same weights whether or not a store was made
    with pytest.raises(ValueError, match="of chunk 5"):
        list(in_order(work, range(9), 2))


def read_slowly(told: Callable[[], object], seconds: float) -> Callable[..., Any]:
    """In the place of ``records_of``: three rows take so long; ``told`` is called at the first of a process."""
    read, calls = tokenizing.records_of, []

    def slow(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            told()
        time.sleep(seconds)
        return read(*arguments)

    return slow


def train_on_slow_rows(arguments: list[str], pipe: Connection) -> None:
    """A process of its own: says when it has begun to read."""
    tokenizing._ROWS, tokenizing.records_of = 3, read_slowly(lambda: pipe.send("reading"), 0.2)
    run_as_program(lambda: train_vae.main(arguments))


def train_as_it_is(arguments: list[str]) -> None:
    run_as_program(lambda: train_vae.main(arguments))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stop_while_records_are_tokenized_ends_the_program_and_the_next_start_reads_them(
    tmp_path: Path, processes: int
) -> None:
    """A real program and a real signal."""
    build_word_tokenizer(["a", "b", "c", "d.", "e.", "####", "\n", "1", "2"]).save_pretrained(str(tmp_path / "tokenizer"))
    tiny_lm(dtype=torch.float32).save_pretrained(str(tmp_path / "lm"))
    file, run = tmp_path / "many.jsonl", tmp_path / "toy"
    file.write_text("".join(json.dumps(record(i)) + "\n" for i in range(900)))
    lm = [f"backbone.name_or_path={tmp_path / 'lm'}", f"backbone.tokenizer={tmp_path / 'tokenizer'}", "backbone.dtype=float32"]
    train = ["vae.train.max_epochs=null", "vae.train.max_steps=1", "vae.train.global_batch=2", "vae.latent_dim=2"]
    arguments = [f"run.folder={tmp_path}", "run.name=toy", f"data.train={file}", f"data.processes={processes}", *lm, *train]
    arguments += ["telemetry.loggers=[]", 'data.answer_prefixes=["####"]']
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=train_on_slow_rows, args=(arguments, theirs))
    process.start()
    assert ours.recv() == "reading" and process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == INTERRUPTED_STATUS
    assert (run / "INTERRUPTED").read_text() == "vae\n"
    assert [path for path in (run / "tokens").iterdir() if path.is_dir()] == []
    process = context.Process(target=train_as_it_is, args=(arguments,))
    process.start()
    process.join()
    assert process.exitcode == 0 and not (run / "INTERRUPTED").exists()
    (folder,) = (path for path in (run / "tokens").iterdir() if path.is_dir())
    assert len(TokenStore(Store(folder, [str(file)]))) == 900


def tokenized(world: World, folder: Path, file: str, signalled: int | None) -> int | None:
    """How many records all ranks have; None where they broke off.  Rank ``signalled`` is asked to stop while rank 0 reads."""
    config = configure(folder, f"data.train={file}", "data.processes=1", "run.name=two")
    with pytest.MonkeyPatch.context() as patch, open_run(config, "vae", world) as run:
        patch.setattr(tokenizing, "_ROWS", 3)
        if signalled is not None:
            patch.setattr(tokenizing, "records_of", read_slowly(lambda: None, 0.2))
        if signalled == world.rank:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR2)).start()
        try:
            store = Tokens(config, world, WORDS, run.stop).records(file)
        except BrokenOff:
            return None
        return len(store or [])


@pytest.mark.parametrize("signalled", [0, 1])
def test_any_rank_breaks_the_reading_off(two_processes: ProcessGroup, tmp_path: Path, signalled: int) -> None:
    file = tmp_path / "many.jsonl"
    file.write_text("".join(json.dumps(record(i)) + "\n" for i in range(150)))
    assert two_processes.run(tokenized, tmp_path, str(file), signalled) == [None, None]
    assert [path for path in (tmp_path / "two" / "tokens").iterdir() if path.is_dir()] == []
    assert two_processes.run(tokenized, tmp_path, str(file), None) == [150, 150]


def test_a_stop_is_obeyed_while_another_job_makes_the_same_store_and_while_a_file_is_hashed(tmp_path: Path) -> None:
    asked: list[int] = []

    def give_way() -> None:
        asked.append(1)
        if len(asked) > 1:
            raise BrokenOff

    with locked(tmp_path / "store"), pytest.raises(BrokenOff), locked(tmp_path / "store", give_way):
        pytest.fail("two have the lock")
    with locked(tmp_path / "store", give_way):  # free again: nobody is asked
        assert len(asked) == 2
    (tmp_path / "file").write_bytes(b"content")
    with pytest.raises(BrokenOff):
        sha256(tmp_path / "file", give_way)


def test_a_hub_sets_store_goes_by_its_commit_which_a_run_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that share their stores get the set as it is when they begin; later starts of theirs ask nobody."""
    import datasets

    now, read = ["a" * 40], list[str | None]()

    def load(name: str, config: str | None, split: str, streaming: bool, revision: str | None = None) -> Any:
        read.append(revision)
        return datasets.Dataset.from_list([record(len(read))])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("training.phases.tokens.hub_commit", lambda name: now[0])

    def texts(run: str) -> list[str]:
        shared = [f"run.name={run}", f"data.store={tmp_path}/stores", "data.processes=1"]
        store = Tokens(configure(tmp_path, *shared), ALONE, WORDS).records("some/set:train")
        assert store is not None
        return [store.text(0).question, store.text(0).source]

    first = texts("one")
    assert first[1] == "some/set:train:row 1"
    now[0] = "b" * 40
    assert texts("one") == first and read == ["a" * 40]
    second = texts("two")
    assert second != first and read == ["a" * 40, "b" * 40]
    now[0] = "a" * 40
    assert texts("three") == first and len(read) == 2

    def beside(name: str) -> str:
        monkeypatch.setattr("training.phases.tokens.hub_commit", lambda name: "a" * 40)
        assert texts("four") == first  # another job of the run, which is there first
        return "b" * 40

    monkeypatch.setattr("training.phases.tokens.hub_commit", beside)
    assert texts("four") == first


def test_a_hub_set_of_which_no_commit_is_known_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **options: datasets.Dataset.from_list([record(len(options))]))
    monkeypatch.setattr("training.phases.tokens.hub_commit", lambda name: None)
    assert Tokens(configure(tmp_path, "data.processes=1"), ALONE, WORDS).records("some/set") is not None
    assert "some/set: which commit of it is read is not known" in caplog.text and "ID@COMMIT" in caplog.text
    assert not list(tmp_path.rglob("hub-commits.json"))
