"""A phase's records, out of token stores: made once by rank 0 and its helpers, mapped by all ranks.  A stop breaks that off."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

import ladir.tasks
from ladir.config import Config
from ladir.data import answers, blocks, formats, mbpp_plus, puzzles, question_store, questions, records, rows
from ladir.data.encode import refuse_or_list
from ladir.data.question_store import Questions, QuestionStore, write_questions
from ladir.data.rows import data_files, hub_commit, is_hub_name, with_commit
from ladir.data.token_lists import TokenPairs
from ladir.data.token_store import Store, TokenStore, open_or_make, store_key, stored_chains, stored_sentences
from ladir.data.tokenizing import write_chains, write_records, write_sentences
from ladir.tasks import Task
from ladir.tokens import tokenization_fingerprint
from training.runtime.alone import GiveWay, unbroken
from training.runtime.distributed import World
from training.runtime.files import code_digest, digests, locked, read_json, write_json
from training.runtime.preemption import StopRequest
from training.runtime.run import RunFolder
from training.runtime.status import say

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: what decides how a question is read and whether its task can judge it
READING = (ladir.tasks, answers, blocks, formats, mbpp_plus, puzzles, question_store, questions, records, rows)


@dataclass(frozen=True)
class Tokens:
    """Opens the token stores of a run's files, on all ranks together; what is not there yet is made.

    Where any rank is asked to stop (``stop``; None: nobody asks) while one is made, all raise
    :class:`~training.runtime.preemption.BrokenOff`: finished stores stay, of the one under way nothing does.
    """

    config: Config
    world: World
    tokenizer: PreTrainedTokenizerBase
    stop: StopRequest | None = None

    def records(self, named: str | Sequence[str] | None) -> TokenStore | None:
        """The records that a setting of the data names; None where it is not set.

        Bad ones are refused or counted as ``data.on_bad_record`` says.
        """
        store = self._told_of(self._open("records", named, write_records))
        return None if store is None else TokenStore(store)

    def sentences(self, named: str | None) -> Sequence[list[int]]:
        """The sentences of a file of such, as token ids."""
        store = self._told_of(self._open("sentences", named, write_sentences))
        return [] if store is None else stored_sentences(store)

    def questions(self, named: str | Sequence[str], task: Task) -> Questions:
        """The questions that ``task`` can judge, of what a setting names; the other lines as above.

        They are read anew where a newer version of the code may read or judge them otherwise.
        """
        code = code_digest(*READING)
        opened = self._open("questions", named, partial(write_questions, check=task.check), task.name, code)
        assert opened is not None
        store = QuestionStore(opened)
        if self._tells(int(np.count_nonzero(store.kinds)), len(store)):
            store.refuse(self.config.data)
        return Questions.of(store)

    def chains(self, records: TokenStore) -> TokenPairs:
        """(prompt ids, completion ids) of every record, as an autoregressive LM reads it."""
        prefix = self.config.data.answer_prefixes[0]
        key = store_key("chains", [records.store.folder.name], self.config.data, prefix)

        def make(folder: Path, give_way: GiveWay) -> None:
            write_chains(folder, records, prefix, self.tokenizer, self._processes, give_way)

        return stored_chains(self._made("chains", key, [], make))

    def contents(self, named: str | Sequence[str], give_way: GiveWay) -> list[str]:
        """What stands for the content of the files that a setting names, of Hub sets as this run reads them (rank 0)."""
        return digests(self._at_their_commits(data_files(named)), give_way)

    def _open(
        self,
        kind: str,
        named: str | Sequence[str] | None,
        write: Callable[..., None],
        *others: str,
    ) -> Store | None:
        """The store of what a setting names; ``others``: what it depends on beside files, settings of the data and tokenizer."""
        files = self.world.on_main(lambda: data_files(named))
        if not files:
            return None
        key, read = self._alone(lambda give_way: self._key(kind, files, others, give_way))

        def make(folder: Path, give_way: GiveWay) -> None:
            write(folder, read, self.config.data, self.tokenizer, self._processes, give_way)

        return self._made(kind, key, files, make)

    def _told_of(self, store: Store | None) -> Store | None:
        """The store, with its bad records told."""
        if store is not None and self._tells(store.num_bad, store.total):
            refuse_or_list(store.bad(), store.total, self.config.data)
        return store

    def _tells(self, bad: int, total: int) -> bool:
        """Whether this rank has something to tell of bad records: all raise an error, and one of them lists what is left out."""
        return bad > 0 and (self.world.is_main or self.config.data.on_bad_record == "error" or bad == total)

    def _alone(self, work: Callable[[GiveWay], T]) -> T:
        """What ``work`` returns on rank 0, on every rank."""
        return unbroken(self.world, self.stop, work)

    def _key(self, kind: str, files: Sequence[str], others: Sequence[str], give_way: GiveWay) -> tuple[str, list[str]]:
        """A store's key, and what it is to be read from: of Hub sets the commits that this run reads (rank 0)."""
        read, words = self._at_their_commits(files), tokenization_fingerprint(self.tokenizer)
        return store_key(kind, digests(read, give_way), self.config.data, words, *others), read

    def _at_their_commits(self, files: Sequence[str]) -> list[str]:
        """Files as they are, Hub sets with the commits that they had when this run first read them.

        Later starts ask nobody, and a commit that comes meanwhile changes nothing.
        """
        note = RunFolder(self.config).path / "hub-commits.json"
        known = read_json(note)
        for name in set(filter(is_hub_name, files)) - known.keys():
            if (commit := hub_commit(name)) is not None:
                with locked(note):  # of two jobs side by side the first one's counts
                    known = {name: commit, **read_json(note)}
                    write_json(note, known)
            else:
                logger.warning("%s: which commit of it is read is not known; its store goes by its name alone, so that a newer "
                               "commit is not noticed: delete the store to read it, or name one, ID@COMMIT", name)  # fmt: skip
        return [name if (commit := known.get(name)) is None or "@" in name else with_commit(name, commit) for name in files]

    def _made(self, kind: str, key: str, files: Sequence[str], make: Callable[[Path, GiveWay], None]) -> Store:
        folder = RunFolder(self.config).tokens / f"{kind}-{key}"

        def first(give_way: GiveWay) -> bool:
            with locked(folder, give_way):  # another job may want the same
                open_or_make(folder, files, lambda path: self._told(make, path, give_way))
            return True

        self._alone(first)
        return Store(folder, files)

    def _told(self, make: Callable[[Path, GiveWay], None], folder: Path, give_way: GiveWay) -> None:
        start = time.perf_counter()
        say(f"reading and tokenizing into {folder.parent}")
        make(folder, give_way)
        count, seconds = self._processes, time.perf_counter() - start
        logger.info("read and tokenized into %s in %.1f s (at most %d processes at a time)", folder, seconds, count)

    @property
    def _processes(self) -> int:
        return self.config.data.processes or len(os.sched_getaffinity(0))
