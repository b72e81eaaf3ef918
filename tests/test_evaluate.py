"""The evaluation as a program: a table from real models, killed and resumed, on one process and on two."""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ladir.config import Config, CountdownSettings, EvaluateSettings, SampleSettings
from ladir.config.loader import load_config
from ladir.data.batches import ArCollator
from ladir.data.latent_parts import write_latents
from ladir.data.latents import LatentForm
from ladir.data.prompts import ChainText, parse_completion, prompt_ids
from ladir.data.question_store import Questions
from ladir.data.records import BadRecords, Record
from ladir.errors import UnusableError
from ladir.evaluation.metrics import summarise
from ladir.evaluation.results import QuestionResult, Trajectory, read_questions
from ladir.inference.ar import complete
from ladir.models.ar import ArModel
from ladir.models.assembling import assemble_export
from ladir.models.backbone import Backbone
from ladir.models.folders import save_denoiser, save_lm, save_vae
from ladir.models.pairing import TrainedOn
from ladir.models.store import folder_fingerprint
from ladir.reasoner import Reasoner
from ladir.tasks import countdown, get_task
from ladir.tasks.countdown import CountdownTask
from ladir.tokens import build_word_tokenizer, decode_text, encode_text, load_tokenizer
from tests.distributed import ProcessGroup
from tests.test_code import why_not_isolated
from tests.tiny import EOS, VOCAB, tiny_denoiser, tiny_lm, tiny_vae
from training.evaluation import asking, stages, table
from training.evaluation.answerers import VARIANTS, Answerer, Answers, ar_answerers
from training.evaluation.answers import AnswerLog, cut
from training.evaluation.rows import lane_of
from training.evaluation.stages import evaluate
from training.evaluation.table import tell_of_limits, tell_of_undecided
from training.phases.tokens import Tokens
from training.runtime import run as run_module
from training.runtime.distributed import World, until
from training.runtime.files import write_json
from training.runtime.profiling import MemorySnapshot
from training.runtime.run import Outcome, RunConflict, RunFolder, open_run
from training.runtime.stages import stage_folder

ALONE = World(0, 1, 0, torch.device("cpu"))
TIMES = ("seconds_per_question", "wall_seconds", "training_seconds")
ROWS = ("ar-greedy", "ar", "ar-majority", "ladir", "ladir-zero-noise", "ladir-sde", "ladir-majority")
LATER = ("ladir-rollout", "ladir-rl", "ar-rl")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Puzzles and a run's untrained models in ``<folder>/tiny``."""
    folder = tmp_path_factory.mktemp("models")
    sizes = CountdownSettings(max_number=9, max_value=16, train=1, validation=1, test=8)
    countdown.write(sizes, 0, folder / "data")
    config = configure(folder, folder)
    tokenizer = load_tokenizer(config.backbone)
    assert len(tokenizer) == VOCAB
    denoiser = tiny_denoiser(tiny_lm(dtype=torch.float32))
    with torch.no_grad():
        denoiser.stop_head.weight.mul_(3.0)
    decoder = tiny_vae(dtype=torch.float32).thought_decoder
    Reasoner(denoiser, decoder, tokenizer, SampleSettings(num_steps=99)).save_pretrained(RunFolder(config).export)
    save_lm(Backbone(tiny_lm(dtype=torch.float32, seed=3)), RunFolder(config).model("ar"))
    return folder


def configure(models: Path, folder: Path, *overrides: str) -> Config:
    """A run in ``folder`` that reads the data in ``models``."""
    settings = {
        "run.folder": folder,
        "run.name": "tiny",
        "backbone.tokenizer": models / "data" / "tokenizer",
        "backbone.dtype": "float32",
        "data.test": models / "data" / "test.jsonl",
        "data.answer_prefixes": "['####']",
        "evaluate.num_trajectories": 10,
        "evaluate.questions_per_batch": 2,
        "evaluate.greedy_questions_per_batch": 2,
        "evaluate.ar_max_tokens": 6,
        "evaluate.examples": 1,
        "sample.num_steps": 2,
        "sample.max_blocks": 3,
        "sample.max_answer_tokens": 4,
        "sample.max_thought_tokens": 4,
    }
    return load_config(None, [*(f"{name}={value}" for name, value in settings.items()), *overrides])


def evaluate_in(models: Path, folder: Path, *overrides: str, world: World = ALONE) -> None:
    """Evaluate the models in a run folder of their own."""
    config = configure(models, folder, *overrides)
    if world.is_main:
        link_models(models, folder)
    world.barrier()
    with open_run(config, "evaluate", world) as opened:
        evaluate(opened)


def link_models(models: Path, folder: Path) -> None:
    """A run folder that has them, unless it is there."""
    run = RunFolder(configure(models, folder))
    if not run.path.is_dir():
        run.path.mkdir(parents=True)
        for name in ("export", "models"):
            (run.path / name).symlink_to(models / "tiny" / name)


def outcome(folder: Path) -> tuple[dict[str, Any], str]:
    """results.json without times, and generations.jsonl."""
    results = json.loads((folder / "tiny" / "results.json").read_text())
    for row in results["rows"]:
        for name in TIMES:
            assert row.pop(name) >= 0
        assert min(row.pop("seconds_by_process").values()) >= 0
    busy = results.pop("busy")
    assert busy["seconds"] >= 0 and all(0 <= share <= 1 for share in busy["ranks"]) and busy["ranks"]
    return results, (folder / "tiny" / "generations.jsonl").read_text()


@pytest.fixture(scope="module")
def whole(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    child(models, folder, None)
    return folder


#: what is under way when a SIGKILL strikes, and at the how many-th time
Death = tuple[str, int]


def child(models: Path, folder: Path, death: Death | None, *overrides: str) -> None:
    """Evaluate in a process of its own; ``death``: there it must die of SIGKILL."""
    process = start_child(models, folder, death, *overrides)
    process.join()
    assert process.exitcode == (0 if death is None else -signal.SIGKILL)


def start_child(models: Path, folder: Path, death: Death | None, *overrides: str) -> Any:
    """:func:`child`, which goes on by itself."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_evaluate"])
    process = context.Process(target=evaluate_until, args=(models, folder, death, *overrides))
    process.start()
    return process


def evaluate_until(models: Path, folder: Path, death: Death | None, *overrides: str) -> None:
    """Evaluate in a process of its own; see :func:`die_at` and :func:`asked`."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        die_at(death, patch)
        note_questions(folder, patch)
        evaluate_in(models, folder, *overrides)


def die_at(death: Death | None, patch: pytest.MonkeyPatch) -> None:
    """A SIGKILL takes this process while it

    answers a batch, which is then lost; writes a batch's answers, of which the last line is torn; writes results.json, the
    answers being in generations.jsonl; or is about to remove the answers kept, the results being there.
    """
    if death is None:
        return
    doing, number = death
    owner, name = {
        "answer": (asking, "judge_samples"),
        "write": (AnswerLog, "add"),
        "report": (table, "write_results"),
        "remove": (AnswerLog, "remove"),
    }[doing]
    real, calls = getattr(owner, name), itertools.count(1)

    def die(*arguments: Any, **named: Any) -> Any:
        last = next(calls) == number
        if doing == "write" or not last:
            result = real(*arguments, **named)
        if last:
            if doing == "write":
                log, method, _ = arguments
                file = log.folder(lane_of(method)) / f"{method}.{log._run.world.rank:05d}.jsonl"
                os.truncate(file, file.stat().st_size - 40)
                dead_in(log._run.folder.path.parent).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    patch.setattr(owner, name, die)


def dead_in(folder: Path) -> Path:
    """There as soon as a process dies that writes answers in a run of ``folder``."""
    return folder / "dead"


def second_dies(death: Death | None, world: World, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """:func:`die_at` on the second of two ranks, as it writes.  The first one's second batch is not kept before: else it might
    answer everything while the other is still on its first."""
    if world.rank or death is None:
        die_at(death, patch)
        return
    add, calls = AnswerLog.add, itertools.count(1)

    def wait(*arguments: Any) -> None:
        if next(calls) == 2:
            until(dead_in(folder).exists, lambda: None)
        add(*arguments)

    patch.setattr(AnswerLog, "add", wait)


def note_questions(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """From now on every question that a model is asked becomes a line of ``<folder>/asked``."""
    load = asking.load_answerers

    def noted(sampling: str, answerer: Answerer) -> Answerer:
        def answer(records: Sequence[Record]) -> Answers:
            with (folder / "asked").open("a") as file:
                file.write("".join(f"{sampling}: {record.question}\n" for record in records))
            return answerer(records)

        return answer

    def load_noted(*about: Any) -> list[dict[str, Answerer]]:
        return [{name: noted(name, real) for name, real in answerers.items()} for answerers in load(*about)]

    patch.setattr(asking, "load_answerers", load_noted)


def asked(folder: Path) -> list[str]:
    """Every question asked so far, in all starts, behind the way in which it was asked."""
    return (folder / "asked").read_text().splitlines()


def test_the_table_has_every_row_and_what_it_cost(whole: Path) -> None:
    results, generations = outcome(whole)
    rows = {row["method"]: row for row in results["rows"]}
    assert tuple(rows) == ROWS  # there is no model of the later stages
    assert (results["num_questions"], results["num_trajectories"], results["seed"]) == (8, 10, 0)
    assert results["sample"]["num_steps"] == 2  # the settings', not the export's
    for method, row in rows.items():
        assert (row["pass@10"] is None) == (method in ("ar-greedy", "ladir-zero-noise") or method.endswith("majority"))
        assert row["confidence_intervals"]["pass@1"][0] <= row["pass@1"] <= row["confidence_intervals"]["pass@1"][1]
        assert row["flops_per_question"] > row["forward_passes_per_question"] > 0
    for sampling in ("ar", "ladir"):
        assert rows[f"{sampling}-majority"]["forward_passes_per_question"] == rows[sampling]["forward_passes_per_question"]
        assert rows[f"{sampling}-majority"]["pass@1"] == rows[sampling]["majority"]
    lines = [json.loads(line) for line in generations.splitlines()]
    assert [line["method"] for line in lines] == [m for m in ROWS if not m.endswith("majority") for _ in range(8)]
    assert all(line["question"] and line["reference"] for line in lines)
    assert {len(line["trajectories"]) for line in lines} == {1, 10}
    shown = next(line for line in lines if line["method"] == "ladir")["trajectories"][0]
    assert {"thoughts", "answer", "correct", "consistent"} <= shown.keys() and shown["thoughts"]
    assert not (whole / "tiny" / "evaluation").exists()


def test_sigkilled_and_resumed_it_ends_the_same(models: Path, whole: Path, tmp_path: Path) -> None:
    """And asks only what was not answered: of five ways of asking in four batches of two questions."""
    assert len(asked(whole)) == len(set(asked(whole))) == 40
    starts: dict[Death | None, int] = {  # the batches that each asks
        ("write", 2): 2,
        ("write", 4): 4,  # from the second batch, which was torn, to the first of the second method
        ("answer", 3): 3,
        ("report", 1): 14,
        ("remove", 1): 0,
        None: 0,
    }
    before = 0
    for death, batches in starts.items():
        child(models, tmp_path, death)
        assert (len(asked(tmp_path)) - before, death) == (2 * batches, death)
        before = len(asked(tmp_path))
        done = death in (("remove", 1), None)
        assert (tmp_path / "tiny" / "results.json").exists() == done
        assert not done or outcome(tmp_path) == outcome(whole)
    assert not (tmp_path / "tiny" / "evaluation").exists()


def test_two_lanes_at_once_end_in_the_table_of_one_job(models: Path, whole: Path, tmp_path: Path) -> None:
    """Each asks its own rows, is killed and goes on; the table is written by a third job where another dtype would be chosen."""
    link_models(models, tmp_path)
    beside = "run.exclusive=false"
    with pytest.raises(UnusableError, match=r"0 of 8 answers of ar-greedy can be read.* or ask them first: evaluate\.lane=ar"):
        evaluate_in(models, tmp_path, "evaluate.lane=table")
    first = {lane: start_child(models, tmp_path, ("write", 2), f"evaluate.lane={lane}", beside) for lane in ("ar", "ladir")}
    for process in first.values():
        process.join()
        assert process.exitcode == -signal.SIGKILL
    second = [start_child(models, tmp_path, None, f"evaluate.lane={lane}", beside) for lane in first]
    for process in second:
        process.join()
        assert process.exitcode == 0
    assert sorted(set(asked(tmp_path))) == sorted(asked(whole))
    assert len(asked(tmp_path)) == 44  # a torn batch of each lane is asked again
    assert not (tmp_path / "tiny" / "results.json").exists()
    with pytest.raises(FileNotFoundError, match=r"nothing is left to ask in evaluate\.lane=ar"):
        evaluate_in(models, tmp_path, "evaluate.lane=ar", "evaluate.methods=[ladir]", "evaluate.name=other")
    evaluate_in(models, tmp_path, "evaluate.lane=ar", "evaluate.methods=[ladir,ar-rl]", "evaluate.name=other")  # not trained
    shutil.rmtree(tmp_path / "tiny" / "evaluation" / "answers-other")
    evaluate_in(models, tmp_path, "evaluate.lane=table", "backbone.dtype=bfloat16")
    assert outcome(tmp_path) == outcome(whole)
    assert not (tmp_path / "tiny" / "evaluation").exists()
    evaluate_in(models, tmp_path, "evaluate.lane=table")  # once more, as after a node was lost in the last moment
    assert outcome(tmp_path) == outcome(whole)


def test_no_two_jobs_ask_the_same_lane(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "LOCK_SECONDS", 0.0)

    def opened(*overrides: str) -> Any:
        return open_run(configure(models, tmp_path, "run.exclusive=false", *overrides), "evaluate", ALONE)

    with opened("evaluate.lane=ar"), opened("evaluate.lane=ladir"), opened("evaluate.lane=ar", "evaluate.name=x"):
        for lane in ("ar", "ladir", "all", "table"):
            with pytest.raises(RunConflict, match="is in use by phase evaluate"), opened(f"evaluate.lane={lane}"):
                pass
    with opened("evaluate.lane=all"), pytest.raises(RunConflict, match="is in use by"), opened("evaluate.lane=ar"):
        pass


def test_the_baseline_is_given_several_batches_while_every_rank_still_gets_some() -> None:
    settings = EvaluateSettings(questions_per_batch=2, ar_batches=4)

    def sizes(questions: int, sampling: str) -> set[int]:
        log, config = SimpleNamespace(done=lambda sampling: set()), SimpleNamespace(evaluate=settings)
        asked = SimpleNamespace(records=[None] * questions)
        benchmark: Any = SimpleNamespace(log=log, run=SimpleNamespace(config=config), asked=asked)
        run: Any = SimpleNamespace(world=World(0, 2, 0, torch.device("cpu")))
        return {len(portion.batch) for portion in asking.portions(run, [benchmark], [sampling])}

    assert sizes(64, "ar") == {8} and sizes(16, "ar") == {2} and sizes(64, "ladir") == {2}


def evaluate_on(world: World, models: Path, folder: Path, death: Death | None = None) -> None:
    """Evaluate on this rank; the second one dies."""
    with pytest.MonkeyPatch.context() as patch:
        second_dies(death, world, folder, patch)
        note_questions(folder, patch)
        evaluate_in(models, folder, world=world)


def test_two_processes_share_the_questions(models: Path, whole: Path, tmp_path: Path, two_processes: ProcessGroup) -> None:
    two_processes.run(evaluate_on, models, tmp_path)
    assert outcome(tmp_path) == outcome(whole)
    assert sorted(asked(tmp_path)) == sorted(asked(whole))


def test_one_of_two_processes_is_killed_and_both_start_again(
    models: Path, whole: Path, tmp_path: Path, two_processes: ProcessGroup
) -> None:
    errors = [error for _, error in two_processes.outcomes(evaluate_on, models, tmp_path, ("write", 3))]
    assert all(errors)  # the other one answers all that is left, and does not wait for it
    assert not (tmp_path / "tiny" / "results.json").exists()
    before = len(asked(tmp_path))
    two_processes.run(evaluate_on, models, tmp_path)
    assert outcome(tmp_path) == outcome(whole)
    assert len(asked(tmp_path)) - before == 2  # of the batch that was torn; all others the first one had answered meanwhile


class Signalled:
    """Sends this process a signal at the ``at``-th pass through an LM of those that answer in one way (``at`` 0: never)."""

    def __init__(self, sampling: str, at: int, patch: pytest.MonkeyPatch) -> None:
        self.at, self.passes, self._counts = at, 0, False
        load, forward = asking.load_answerers, Backbone.forward

        def passed(backbone: Backbone, *about: Any, **named: Any) -> torch.Tensor:
            self.passes += self._counts
            if self._counts and self.passes == self.at:
                os.kill(os.getpid(), signal.SIGUSR2)
            return forward(backbone, *about, **named)

        def counted(answerer: Answerer) -> Answerer:
            def answer(records: Sequence[Record]) -> Answers:
                self._counts = True
                try:
                    return answerer(records)
                finally:
                    self._counts = False

            return answer

        def load_counted(*about: Any) -> list[dict[str, Answerer]]:
            own = {sampling}
            return [{name: counted(real) if name in own else real for name, real in all_.items()} for all_ in load(*about)]

        patch.setattr(asking, "load_answerers", load_counted)
        patch.setattr(Backbone, "forward", passed)


def evaluate_signalled(world: World, models: Path, folder: Path, sampling: str, at: int) -> int:
    """Evaluate until the ``at``-th pass of this rank; the passes that were made in that way of asking."""
    with pytest.MonkeyPatch.context() as patch:
        signalled = Signalled(sampling, at, patch)
        note_questions(folder, patch)
        evaluate_in(models, folder, world=world)
        return signalled.passes


#: of a portion's passes, the one at which a stop comes: a denoising step or token, and one of the last
STOPS = [("ladir", 4), ("ladir", 13), ("ar", 3), ("ar-greedy", 5)]


@pytest.mark.parametrize(("sampling", "at"), STOPS)
def test_a_stop_in_the_middle_of_a_batch_is_obeyed_before_its_end(
    sampling: str, at: int, models: Path, whole: Path, tmp_path: Path, one_process: ProcessGroup
) -> None:
    """At the next step or token; the batch is asked again, in whole, and the table is that of an undisturbed run."""
    (before,) = one_process.run(evaluate_signalled, models, tmp_path, sampling, at)
    assert at <= before <= at + 1 and not (tmp_path / "tiny" / "results.json").exists()
    lost = asked(tmp_path)[-2:]
    (passes,) = one_process.run(evaluate_signalled, models, tmp_path, sampling, 0)
    assert before < passes / 4  # of four batches
    assert outcome(tmp_path) == outcome(whole)
    assert sorted(asked(tmp_path)) == sorted([*asked(whole), *lost])


@pytest.mark.distributed
@pytest.mark.parametrize(("sampling", "at"), STOPS[::2])
def test_two_processes_stop_in_the_middle_of_a_batch_and_go_on(
    sampling: str, at: int, models: Path, whole: Path, tmp_path: Path, two_processes: ProcessGroup
) -> None:
    passes = two_processes.run(evaluate_signalled, models, tmp_path, sampling, at)
    assert max(passes) >= at and all(made <= at + 1 for made in passes)
    assert not (tmp_path / "tiny" / "results.json").exists()
    two_processes.run(evaluate_signalled, models, tmp_path, sampling, 0)
    assert outcome(tmp_path) == outcome(whole)
    again = len(asked(tmp_path)) - len(asked(whole))
    assert again in (2, 4)  # of a rank's batch, or of both'


def stopped_behind_the_results(world: World, models: Path, folder: Path) -> list[str]:
    """Evaluate until the last rank is asked to stop, while the first writes results; the answers that are kept."""

    def reported(*about: Any) -> None:
        table.report(*about)
        time.sleep(2)  # until the other rank's signal is heard

    def asked_and_signalled(*about: Any) -> Any:
        found = asking.ask(*about)
        if world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "report", reported)
        patch.setattr(stages, "ask", asked_and_signalled)
        evaluate_in(models, folder, "evaluate.methods=[ar-greedy]", world=world)
        return sorted(path.name for path in (folder / "tiny" / "evaluation").rglob("*.jsonl"))


@pytest.mark.distributed
def test_a_stop_while_results_are_written_keeps_the_answers(
    models: Path, tmp_path: Path, two_processes: ProcessGroup, one_process: ProcessGroup
) -> None:
    first, second = two_processes.run(stopped_behind_the_results, models, tmp_path)
    assert first == second != [] and (tmp_path / "tiny" / "INTERRUPTED").is_file()
    one_process.run(evaluate_without_asking, models, tmp_path)
    assert outcome(tmp_path)[0]["num_questions"] == 8 and not (tmp_path / "tiny" / "evaluation").exists()


def evaluate_without_asking(world: World, models: Path, folder: Path) -> None:
    """Write the results of answers that are all there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asking, "load_answerers", None)
        evaluate_in(models, folder, "evaluate.methods=[ar-greedy]", world=world)


#: what the baseline is to say
TAUGHT = {
    "sum": "3 + 4 = 7\n#### 7",
    "half": "half = 1/2\n#### 1/2",
    "nine": "9\n#### 9",
    "inc": "a + 1\n#### inc = lambda a : a + 1",
    "dec": "a - 1\n#### dec = lambda a : a + 1",
}
#: the same numbers written otherwise, and another one
MATHS = [
    {"input": question, "output": f"So.\n#### {gold}"}
    for question, gold in (("sum", "7.0"), ("half", r"\sqrt{\frac14}"), ("nine", "8"))
]
#: tests of the second program that it does not pass
CODE = [
    {"input": name, "output": f"So.\n#### {name} = lambda a: {body}", "tests": f"assert {name}(1) == {result}"}
    for name, body, result in (("inc", "1 + a", 2), ("dec", "a - 1", 0))
]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A baseline that knows the answers of ``TAUGHT`` by heart, beside an untrained LaDiR, as the run ``tiny``."""
    folder = tmp_path_factory.mktemp("taught")
    words = {word for question, output in TAUGHT.items() for word in (*question.split(), *output.split())} | {"\n"}
    fill = map(str, range(100, 126 - len(words)))  # as many tokens as the tiny models have
    tokenizer = build_word_tokenizer([*sorted(words), *fill])
    assert len(tokenizer) == VOCAB
    tokenizer.save_pretrained(str(folder / "data" / "tokenizer"))
    pairs = [(prompt_ids(tokenizer, question), [*encode_text(tokenizer, output), EOS]) for question, output in TAUGHT.items()]
    model = ArModel(Backbone(tiny_lm(dtype=torch.float32))).train()
    batch, optimizer = ArCollator()(pairs, range(len(pairs))), torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(200):
        optimizer.zero_grad()
        outputs = model(batch)
        outputs["text"].backward()
        optimizer.step()
        if float(outputs["text"].detach()) < 0.5:
            break
    run = RunFolder(configure(folder, folder))
    save_lm(model.backbone.eval(), run.model("ar"))
    denoiser, decoder = tiny_denoiser(tiny_lm(dtype=torch.float32)), tiny_vae(dtype=torch.float32).thought_decoder
    Reasoner(denoiser, decoder, tokenizer, SampleSettings()).save_pretrained(run.export)
    return folder


@pytest.mark.parametrize(
    ("task", "rows", "right", "consistent"),
    [("maths", MATHS, [True, True, False], True), ("code", CODE, [True, False], None)],
    ids=["maths", "code"],
)
def test_maths_and_programs_are_asked_and_judged(
    task: str, rows: list[dict[str, str]], right: list[bool], consistent: bool | None, taught: Path, tmp_path: Path
) -> None:
    """From records and models to the table: the answers that are known by heart get the verdicts they deserve."""
    isolation = "limits" if task == "code" and why_not_isolated() else "namespaces"
    file = tmp_path / "asked.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    methods = "evaluate.methods=[ar-greedy,ar,ar-majority,ladir]"
    sizes = (
        "evaluate.num_trajectories=2",
        "evaluate.ar_max_tokens=16",
        "evaluate.check_seconds=60",
        f"evaluate.isolation={isolation}",
    )
    evaluate_in(taught, tmp_path, f"evaluate.task={task}", f"data.test={file}", methods, *sizes)
    results, generations = outcome(tmp_path)
    assert (results["task"], results["num_questions"]) == (task, len(rows))
    found = {row["method"]: row for row in results["rows"]}
    assert list(found) == ["ar-greedy", "ar", "ar-majority", "ladir"]
    assert found["ar-greedy"]["pass@1"] == pytest.approx(sum(right) / len(right))
    assert (found["ar-greedy"]["consistent"] is None) == (consistent is None)
    lines = [json.loads(line) for line in generations.splitlines()]
    assert [line["method"] for line in lines] == [method for method in ("ar-greedy", "ar", "ladir") for _ in rows]
    for line, row, verdict in zip(lines, rows, right, strict=False):
        thought, answer = TAUGHT[row["input"]].split("\n#### ")
        (trajectory,) = line["trajectories"]
        assert (line["question"], trajectory["thoughts"], trajectory["answer"]) == (row["input"], [thought], answer)
        assert (trajectory["correct"], trajectory["chain_correct"], trajectory["consistent"]) == (verdict, None, consistent)
    assert {len(line["trajectories"]) for line in lines[len(rows) :]} == {2}


def test_rows_of_votes_of_a_few_samples_and_of_the_second_stage(models: Path, tmp_path: Path) -> None:
    config = configure(models, tmp_path)
    folder = RunFolder(config)
    second = tiny_denoiser(tiny_lm(dtype=torch.float32, seed=8), seed=9)
    save_denoiser(second, folder.model("rollout"))
    (folder.path / "export").symlink_to(models / "tiny" / "export")
    for phase, seconds in (("vae", 1), ("latents", 2), ("denoiser", 4), ("rollout", 8)):
        folder.outcome_file(phase).write_text(json.dumps(vars(Outcome("finished", 100 * seconds, 0, float(seconds), {}))))
    methods = "evaluate.methods=[ladir,ladir-rollout,ladir-consistent,ladir-majority]"
    settings = ("evaluate.voters=5", "evaluate.num_questions=3", "evaluate.name=votes-5")
    with open_run(configure(models, tmp_path, methods, *settings), "evaluate", ALONE) as run:
        evaluate(run)
    assert not (folder.path / "results.json").exists()
    rows = {row["method"]: row for row in json.loads((folder.path / "results-votes-5.json").read_text())["rows"]}
    assert (rows["ladir"]["training_seconds"], rows["ladir-rollout"]["training_seconds"]) == (7.0, 15.0)
    steps = {method: row["training_steps"] for method, row in rows.items()}  # the VAE's are another model's
    assert steps == {"ladir": 400, "ladir-rollout": 1200, "ladir-consistent": 400, "ladir-majority": 400}
    lines = [json.loads(line) for line in (folder.path / "generations-votes-5.jsonl").read_text().splitlines()]
    assert [line["method"] for line in lines] == ["ladir"] * 3 + ["ladir-rollout"] * 3
    assert lines[0]["trajectories"] != lines[3]["trajectories"]
    passes = {method: row["forward_passes_per_question"] for method, row in rows.items()}
    assert passes["ladir-majority"] == passes["ladir"] / 2
    assert passes["ladir-consistent"] > passes["ladir-majority"]  # its thoughts are read, too


def test_a_row_s_training_steps_are_its_model_s_over_its_stages_and_unknown_where_one_end_is(tmp_path: Path) -> None:
    folder = RunFolder(load_config(None, [f"run.folder={tmp_path}"]))
    folder.path.mkdir(parents=True)

    def steps(*methods: str) -> list[int | None]:
        return [table.training_steps(folder, method) for method in methods]

    for number, phase in enumerate(("base", "vae", "latents", "verifier", "denoiser", "rl", "ar")):
        write_json(folder.outcome_file(phase), dataclasses.asdict(Outcome("finished", 10**number, 0, 1.0, {})))
    assert steps("ladir-best", "ladir-rl", "ladir-rollout", "ar-greedy", "ar-rl") == [10_001, 110_001, None, 1_000_001, None]
    folder.outcome_file("denoiser").unlink()
    folder.outcome_file("base").unlink()  # an LM from elsewhere: its steps are nobody's
    assert steps("ladir", "ladir-rl", "ar") == [None, None, 10**6]


def test_a_row_of_each_stage_is_of_its_own_denoiser_whichever_was_exported(tmp_path: Path) -> None:
    folder = RunFolder(load_config(None, [f"run.folder={tmp_path}"]))
    folder.export.mkdir(parents=True)
    for origin, first, second in ((None, None, folder.model("rollout")), ("0123", folder.model("denoiser"), None)):
        (folder.export / "ladir.json").write_text(json.dumps({"kind": "denoiser", "origin": origin}))
        assert [stage_folder(folder, stage, snapshot=None) for stage in ("denoiser", "rollout")] == [first, second]
    (folder.export / "ladir.json").write_text(json.dumps({"kind": "denoiser", "origin": "0123", "stage": "rl"}))
    found = [stage_folder(folder, stage, snapshot=None) for stage in ("denoiser", "rollout", "rl")]
    assert found == [folder.model("denoiser"), folder.model("rollout"), None]
    assert stage_folder(folder, "rl", snapshot=7) == folder.model("rl-7")


@given(st.integers(0, 200), st.integers(1, 30), st.integers(1, 9))
def test_batches_cover_every_question_once_and_evenly(count: int, size: int, ranks: int) -> None:
    batches = cut(count, size, ranks)
    assert [i for batch in batches for i in batch] == list(range(count))
    sizes = [len(batch) for batch in batches]
    assert not sizes or (min(sizes) >= 1 and max(sizes) <= min(size, min(sizes) + 1))
    assert len(batches) % ranks == 0 or len(batches) == count


def countdown_questions(config: Config) -> Questions:
    """Those that an evaluation asks."""
    return Tokens(config, ALONE, load_tokenizer(config.backbone)).questions(config.data.test, get_task("countdown"))


def test_the_baseline_reads_questions_as_its_folder_says(models: Path, tmp_path: Path) -> None:
    config = configure(models, tmp_path)
    folder, tokenizer = RunFolder(config), load_tokenizer(config.backbone)
    backbone = Backbone(tiny_lm(dtype=torch.float32, seed=3))
    records = countdown_questions(config)[:3]
    prompts, keys = [prompt_ids(tokenizer, record.question) for record in records], [record.question for record in records]
    found: dict[bool, list[ChainText]] = {}
    for bidirectional in (False, True):
        save_lm(backbone, folder.model("ar"), bidirectional_question=bidirectional)
        (answerers,) = ar_answerers([config], folder, ["ar-greedy"], torch.device("cpu"))
        answers = answerers["ar-greedy"](records)
        texts = complete(backbone, prompts, keys, 1, EOS, 6, 0.0, 0, bidirectional)
        found[bidirectional] = [parse_completion(decode_text(tokenizer, ids), ["####"]) for [ids] in texts]
        assert [(list(a.thoughts), a.answer) for [a] in answers.samples] == [(c.thoughts, c.answer) for c in found[bidirectional]]
    assert found[False] != found[True]


def test_the_methods_of_the_default_table_are_known() -> None:
    methods: Sequence[str] = Config().evaluate.methods
    assert tuple(methods) == (*ROWS, *LATER)


def test_snapshots_of_a_training_are_asked_in_place_of_the_finished_models(models: Path, tmp_path: Path) -> None:
    methods = "evaluate.methods=[ar,ladir]"
    with pytest.raises(
        FileNotFoundError,
        match=r"no snapshot of step 7: .*outcome-ar-7\.json missing; kept are the steps none; set ar\.train\.snapshot_every",
    ):
        evaluate_in(models, tmp_path, methods, "evaluate.snapshot=7")
    folder = RunFolder(configure(models, tmp_path))
    (folder.path / "models").unlink()
    other = tiny_denoiser(tiny_lm(dtype=torch.float32, seed=5))
    save_denoiser(other, folder.model("denoiser-7"))
    save_lm(Backbone(tiny_lm(dtype=torch.float32, seed=6)), folder.model("ar-7"))
    for name, steps, seconds in (("base", 3, 5.0), ("ar", 21, 90.0), ("ar-7", 7, 30.0), ("denoiser-7", 7, 20.0)):
        write_json(folder.outcome_file(name), dataclasses.asdict(Outcome("unfinished", steps, 7, seconds, {})))
    evaluate_in(models, tmp_path, methods, "evaluate.snapshot=7")
    rows = json.loads((folder.path / "results-7.json").read_text())["rows"]
    assert {row["method"]: row["training_seconds"] for row in rows} == {"ar": 35.0, "ladir": 25.0}
    assert {row["method"]: row["training_steps"] for row in rows} == {"ar": 10, "ladir": 10}
    config = configure(models, tmp_path)
    reasoner = Reasoner.from_pretrained(folder.export, "cpu", denoiser=folder.model("denoiser-7"))
    reasoner.settings = config.sample
    asked = countdown_questions(config)
    expected = reasoner.generate([record.question for record in asked[:2]], 10, seed=config.run.seed)
    found = read_questions(folder.path / "generations-7.jsonl")["ladir"]
    assert [[t.answer for t in group] for group in expected] == [[t.answer for t in q.trajectories] for q in found[:2]]


def test_a_snapshot_is_asked_while_its_training_has_no_export(models: Path, tmp_path: Path) -> None:
    """With the run's own VAE; one of another VAE's latents is refused."""
    folder = RunFolder(configure(models, tmp_path))
    vae = tiny_vae(dtype=torch.float32, decoder="trained")
    save_vae(vae, folder.model("vae"))
    known = TrainedOn(vae=folder_fingerprint(folder.model("vae")))
    save_denoiser(tiny_denoiser(tiny_lm(dtype=torch.float32, seed=5)), folder.model("denoiser-7"), trained_on=known)
    write_json(folder.outcome_file("denoiser-7"), dataclasses.asdict(Outcome("unfinished", 7, 7, 1.0, {})))
    settings = ("evaluate.methods=[ladir]", "evaluate.snapshot=7", "evaluate.name=denoiser")
    with open_run(configure(models, tmp_path, *settings), "evaluate", ALONE) as run:
        evaluate(run)
    export = tmp_path / "export"
    assemble_export(
        folder.model("denoiser-7"), folder.model("vae"), load_tokenizer(run.config.backbone), export, SampleSettings()
    )
    reasoner = Reasoner.from_pretrained(export, "cpu")
    reasoner.settings = run.config.sample
    expected = reasoner.generate([record.question for record in countdown_questions(run.config)[:2]], 10)
    found = read_questions(folder.path / "generations-denoiser-7.jsonl")["ladir"]
    assert [[t.answer for t in group] for group in expected] == [[t.answer for t in q.trajectories] for q in found[:2]]
    save_vae(tiny_vae(dtype=torch.float32, seed=9, decoder="trained"), folder.model("vae"))
    with (
        pytest.raises(UnusableError, match="another VAE"),
        open_run(configure(models, tmp_path, *settings), "evaluate", ALONE) as run,
    ):
        evaluate(run)


def test_memory_that_runs_out_in_an_evaluation_is_explained(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*about: Any) -> Answers:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(MemorySnapshot, "dumped", lambda self: iter([str(self._file)]))
    monkeypatch.setattr(asking, "load_answerers", lambda *about: [dict.fromkeys(("ar", "ladir"), full)])
    for lane, file in (("all", "evaluate"), ("ar", "evaluate.ar")):  # two lanes may be at work at once
        with pytest.raises(torch.OutOfMemoryError) as caught:
            evaluate_in(models, tmp_path, "evaluate.methods=[ar,ladir]", f"evaluate.lane={lane}")
        remedy, snapshot = caught.value.__notes__
        assert remedy.startswith("Lower evaluate.questions_per_batch")
        assert snapshot.endswith(f"tiny/memory/{file}/rank-00000.pickle")


def refuse_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.evaluation.asking.load_answerers", lambda *_: pytest.fail("loaded a model"))


def test_records_that_cannot_be_judged_are_refused_before_a_model_is_loaded(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_load(monkeypatch)
    (tmp_path / "test.jsonl").write_text('{"input": "1 2 -> 3", "output": "1 + 2 = 3\\n#### 1 + 2"}\n')
    with pytest.raises(UnusableError, match=r"test\.jsonl:1: not a Countdown record"):
        evaluate_in(models, tmp_path, f"data.test={tmp_path / 'test.jsonl'}")


def test_all_that_is_missing_is_told_at_once_before_anything_is_read(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_load(monkeypatch)
    monkeypatch.setattr("training.evaluation.questions.read_split", lambda *_: pytest.fail("read questions"))
    run = RunFolder(configure(models, tmp_path))
    run.path.mkdir(parents=True)
    (run.path / "export").mkdir()
    (run.path / "export" / "ladir.json").write_text('{"kind": "denoiser", "origin": "of stage 2"}')
    with pytest.raises(FileNotFoundError) as told:
        evaluate_in(models, tmp_path, f"data.test={tmp_path / 'none.jsonl'}", "evaluate.methods=[ar-greedy,ar,ladir,ladir-sde]")
    lines = str(told.value).splitlines()
    assert lines[0] == f"data.test={tmp_path}/none.jsonl: no such file (looked in {Path.cwd()}); correct the path"
    left_out = "or leave them out (evaluate.methods)"
    assert lines[1] == f"rows ar-greedy, ar: {run.model('ar')} is not there; run training/train_ar.py {left_out}"
    assert lines[2] == f"rows ladir, ladir-sde: {run.model('denoiser')} is not there; run training/train_denoiser.py {left_out}"
    shutil.rmtree(run.export)
    with pytest.raises(
        FileNotFoundError, match=r"^data.validation is not set.*\nrows ladir-majority: .*export is not there; run "
    ):
        evaluate_in(models, tmp_path, "evaluate.split=validation", "evaluate.methods=[ladir-majority]")
    with pytest.raises(
        FileNotFoundError, match=r"^evaluate.methods: nothing is left to ask; run .*train_denoiser.py stage=rollout"
    ):
        evaluate_in(models, tmp_path, "evaluate.methods=[ladir-rollout]")


#: MATH's form: a solution of 2,000 tokens, none at all, a short one; and a question that is too long
PUBLISHED = [
    {"problem": "sum", "solution": f"{'3 + 4 = 7 ' * 400}so $\\boxed{{7}}$.", "level": "Level 1"},
    {"problem": "half", "answer": "\\frac{1}{2}"},
    {"problem": "nine", "solution": "It is $\\boxed{9}$."},
    {"problem": "sum " * 20, "solution": "It is $\\boxed{7}$."},
]


@pytest.mark.parametrize("left_out", ["count", "exclude"])
def test_reasoning_leaves_no_question_out_and_what_is_left_out_is_counted(left_out: str, taught: Path, tmp_path: Path) -> None:
    file, sizes = (
        tmp_path / "math.jsonl",
        ("data.max_question_tokens=8", "evaluate.ar_max_tokens=16", "evaluate.check_seconds=60"),
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in PUBLISHED))
    asked = (f"data.test={file}", "evaluate.task=maths", "evaluate.methods=[ar-greedy]", f"evaluate.left_out={left_out}")
    with pytest.raises(BadRecords, match=r"math\.jsonl:4: its question has 20 tokens, more than data\.max_question_tokens=8"):
        evaluate_in(taught, tmp_path, *asked, *sizes)
    evaluate_in(taught, tmp_path, *asked, *sizes, "data.on_bad_record=skip")
    results, generations = outcome(tmp_path)
    assert [json.loads(line)["question"] for line in generations.splitlines()] == ["sum", "half", "nine"]
    assert (results["num_questions"], results["left_out"]["number"], results["gold"]["judged"]) == (3, 1, 3)
    assert results["left_out"]["counted"] == (left_out == "count") and "math.jsonl:4" in results["left_out"]["reasons"][0]
    (row,) = results["rows"]
    assert row["pass@1"] == row["majority"] == row["pass_curve"]["1"] == pytest.approx(0.75 if left_out == "count" else 1.0)


def test_questions_that_were_trained_on_are_told_and_counted(
    taught: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the tokens of the encoded training records, wherever their file is now; no word of it where none are encoded."""
    file = tmp_path / "math.jsonl"
    file.write_text("".join(json.dumps({"input": text, "answer": "7"}) + "\n" for text in ("sum", "half", "nine")))
    asked = (f"data.test={file}", "evaluate.task=maths", "evaluate.methods=[ar-greedy]", "evaluate.check_seconds=60")
    evaluate_in(taught, tmp_path, *asked)
    assert outcome(tmp_path)[0]["trained_on"] == 0 and "trained on" not in caplog.text + capsys.readouterr().out
    config = configure(taught, tmp_path)
    tokenizer = load_tokenizer(config.backbone)
    latents = np.zeros((1, 1, 2), np.float32)
    rows = [
        {"question": encode_text(tokenizer, text), "blocks": [[3]], "answer": [3], "mu": latents, "logvar": latents}
        for text in ("nine", "other", "nine", "half")
    ]
    write_latents(RunFolder(config).latents / "train", rows, "vae", LatentForm(2, 1))
    evaluate_in(taught, tmp_path, *asked)
    assert outcome(tmp_path)[0]["trained_on"] == 2
    assert f"2 of 3 questions were trained on, the first at {file}:2" in caplog.text
    assert "2 of 3 questions were trained on" in capsys.readouterr().out
    for part in (RunFolder(config).latents / "train").glob("*.arrow"):
        part.write_bytes(b"torn")
    evaluate_in(taught, tmp_path, *asked)
    assert outcome(tmp_path)[0]["trained_on"] == 0


def test_a_file_whose_own_answers_are_refused_is_refused_or_counted(
    taught: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A puzzle's own answer that is wrong; what was right is not judged again."""
    file = tmp_path / "puzzles.jsonl"
    rows = [("sum", [3, 4], 7, "3 + 4"), ("inc", [3, 4], 8, "3 + 4"), ("nine", [4, 5], 9, None)]
    file.write_text("".join(json.dumps({"input": q, "numbers": n, "target": t, "answer": a}) + "\n" for q, n, t, a in rows))
    asked = (f"data.test={file}", "evaluate.methods=[ar-greedy]")
    judged: list[str] = []
    judge = CountdownTask.verdict
    monkeypatch.setattr(CountdownTask, "verdict", lambda *about: judged.append(about[2].question) or judge(*about))
    with monkeypatch.context() as patch:
        refuse_to_load(patch)
        with pytest.raises(UnusableError, match=r"(?s)^1 of 2 records have .*puzzles\.jsonl:2 \('inc'\): .*on_bad_gold=skip"):
            evaluate_in(taught, tmp_path, *asked)
    for handling, questions in (("skip", ["sum", "nine"]), ("ignore", ["sum", "inc", "nine"])):
        judged.clear()
        evaluate_in(taught, tmp_path, *asked, f"evaluate.on_bad_gold={handling}")
        assert judged == ["inc", *questions]
        results, generations = outcome(tmp_path)
        assert [json.loads(line)["question"] for line in generations.splitlines()] == questions
        assert (results["gold"]["judged"], results["gold"]["refused"], results["left_out"]["number"]) == (2, 1, 0)
        assert any(message.startswith("1 of 2 records have an own answer") for message in caplog.messages)


def test_zero_noise_is_without_randomness_whatever_the_sampler() -> None:
    settings = dataclasses.replace(
        SampleSettings(sampler="sde"),
        **{name: value for name, value in VARIANTS["ladir-zero-noise"].items() if name != "num_trajectories"},
    )
    assert (settings.sampler, settings.initial_noise, settings.answer_temperature) == ("ode", 0.0, 0.0)


def test_answers_that_could_not_be_judged_are_told_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    wrong, right = Trajectory("a", False, "a", reason="not equal"), Trajectory("b", True, "b")
    undecided = [Trajectory("c", False, "c", reason=reason, undecided=True) for reason in ("too long", "unreadable", "too long")]
    decided, both = QuestionResult("q", (wrong, right)), QuestionResult("q", (wrong, *undecided, right))
    tell_of_undecided("ar", [decided])
    assert not caplog.messages and summarise([decided])["undecided"] == 0
    tell_of_undecided("ar", [decided, both])
    assert caplog.messages == ["ar: 3 of 7 answers could not be judged and count as wrong (2 too long, 1 unreadable)"]
    assert summarise([decided, both])["undecided"] == 3


def test_answers_that_were_cut_off_are_told(caplog: pytest.LogCaptureFixture) -> None:
    def asked(*stopped: bool) -> list[QuestionResult]:
        return [QuestionResult("q", tuple(Trajectory("a", False, "a", stopped=ended) for ended in stopped))]

    tell_of_limits("ar", asked(True, True), 256, 32)
    assert not caplog.messages
    tell_of_limits("ar", asked(True, False), 256, 32)
    tell_of_limits("ladir-sde", asked(False, False), 256, 32)
    assert caplog.messages == [
        "ar: 1 of 2 answers were cut off or forced at evaluate.ar_max_tokens=256",
        "ladir-sde: 2 of 2 answers were cut off or forced at sample.max_blocks=32",
    ]
