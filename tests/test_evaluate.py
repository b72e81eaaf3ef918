"""The evaluation as a program: a table from real models, killed and resumed, on one process and on two."""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ladir.config import Config, CountdownSettings, SampleSettings
from ladir.config_loader import load_config
from ladir.data.prompts import ChainText, parse_completion, prompt_ids
from ladir.errors import UnusableError
from ladir.evaluation.results import QuestionResult, Trajectory, read_questions
from ladir.inference.ar import complete
from ladir.models.backbone import Backbone
from ladir.models.folders import save_denoiser, save_lm
from ladir.reasoner import Reasoner
from ladir.tasks import countdown
from ladir.tokens import decode_text, load_tokenizer
from tests.distributed import ProcessGroup
from tests.tiny import EOS, VOCAB, tiny_denoiser, tiny_lm, tiny_vae
from training.answerers import VARIANTS, ar_answerers, stage_folder
from training.answers import Answered, AnswerLog, cut
from training.evaluate import _tell_of_limits, evaluate, read_questions_asked
from training.runtime.distributed import World
from training.runtime.files import write_json
from training.runtime.run import Outcome, RunFolder, open_run

ALONE = World(0, 1, 0, torch.device("cpu"))
TIMES = ("seconds_per_question", "wall_seconds", "training_seconds")
ROWS = ("ar-greedy", "ar", "ar-majority", "ladir", "ladir-zero-noise", "ladir-sde", "ladir-majority", "ladir-rollout")


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
    run = RunFolder(config)
    if world.is_main and not run.path.is_dir():
        run.path.mkdir(parents=True)
        for name in ("export", "models"):
            (run.path / name).symlink_to(models / "tiny" / name)
    world.barrier()
    with open_run(config, "evaluate", world) as opened:
        evaluate(opened)


def outcome(folder: Path) -> tuple[dict[str, Any], str]:
    """results.json without times, and generations.jsonl."""
    results = json.loads((folder / "tiny" / "results.json").read_text())
    for row in results["rows"]:
        for name in TIMES:
            assert row.pop(name) >= 0
    return results, (folder / "tiny" / "generations.jsonl").read_text()


@pytest.fixture(scope="module")
def whole(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    child(models, folder, None)
    return folder


def child(models: Path, folder: Path, kill_at: int | None) -> None:
    """Evaluate in a process of its own; ``kill_at``: it must die of SIGKILL at that batch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_evaluate"])
    process = context.Process(target=evaluate_until, args=(models, folder, kill_at))
    process.start()
    process.join()
    assert process.exitcode == (0 if kill_at is None else -signal.SIGKILL)


def evaluate_until(models: Path, folder: Path, kill_at: int | None) -> None:
    """Evaluate in a process of its own; see :func:`die_at`."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        die_at(kill_at, patch)
        evaluate_in(models, folder)


def die_at(kill_at: int | None, patch: pytest.MonkeyPatch) -> None:
    """A SIGKILL takes this process while it writes the answers of its ``kill_at``-th batch."""
    add, batches = AnswerLog.add, itertools.count(1)

    def add_and_die(log: AnswerLog, method: str, answers: Mapping[int, Answered]) -> None:
        add(log, method, answers)
        if next(batches) == kill_at:
            file = max(log._folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
            os.truncate(file, file.stat().st_size - 40)
            os.kill(os.getpid(), signal.SIGKILL)

    patch.setattr(AnswerLog, "add", add_and_die)


def test_the_table_has_every_row_and_what_it_cost(whole: Path) -> None:
    results, generations = outcome(whole)
    rows = {row["method"]: row for row in results["rows"]}
    assert tuple(rows) == ROWS[:-1]  # there is no model of the second stage
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
    assert [line["method"] for line in lines] == [m for m in ROWS[:-1] if not m.endswith("majority") for _ in range(8)]
    assert all(line["question"] and line["reference"] for line in lines)
    assert {len(line["trajectories"]) for line in lines} == {1, 10}
    shown = next(line for line in lines if line["method"] == "ladir")["trajectories"][0]
    assert {"thoughts", "answer", "correct", "consistent"} <= shown.keys() and shown["thoughts"]
    assert not (whole / "tiny" / "evaluation").exists()


def test_sigkilled_and_resumed_it_ends_the_same(models: Path, whole: Path, tmp_path: Path) -> None:
    for kill_at in (2, 5, 6):  # in the first method, at the first batch of the second after a torn line, further on
        child(models, tmp_path, kill_at)
        assert not (tmp_path / "tiny" / "results.json").exists()
    child(models, tmp_path, None)
    assert outcome(tmp_path) == outcome(whole)


def evaluate_on(world: World, models: Path, folder: Path, kill_at: int | None = None) -> None:
    """Evaluate on this rank; the second one dies at its ``kill_at``-th batch."""
    with pytest.MonkeyPatch.context() as patch:
        die_at(kill_at if world.rank == 1 else None, patch)
        evaluate_in(models, folder, world=world)


def test_two_processes_share_the_questions(models: Path, whole: Path, tmp_path: Path, two_processes: ProcessGroup) -> None:
    two_processes.run(evaluate_on, models, tmp_path)
    assert outcome(tmp_path) == outcome(whole)


def test_one_of_two_processes_is_killed_and_both_start_again(
    models: Path, whole: Path, tmp_path: Path, two_processes: ProcessGroup
) -> None:
    errors = [error for _, error in two_processes.outcomes(evaluate_on, models, tmp_path, 3)]
    assert all(errors)  # the other one does not wait for it
    assert not (tmp_path / "tiny" / "results.json").exists()
    two_processes.run(evaluate_on, models, tmp_path)
    assert outcome(tmp_path) == outcome(whole)


def test_rows_of_votes_of_a_few_samples_and_of_the_second_stage(models: Path, tmp_path: Path) -> None:
    config = configure(models, tmp_path)
    folder = RunFolder(config)
    second = tiny_denoiser(tiny_lm(dtype=torch.float32, seed=8), seed=9)
    save_denoiser(second, folder.model("rollout"))
    (folder.path / "export").symlink_to(models / "tiny" / "export")
    for phase, seconds in (("vae", 1.0), ("latents", 2.0), ("denoiser", 4.0), ("rollout", 8.0)):
        folder.outcome_file(phase).write_text(json.dumps(vars(Outcome("finished", 0, 0, seconds, {}))))
    methods = "evaluate.methods=[ladir,ladir-rollout,ladir-consistent,ladir-majority]"
    settings = ("evaluate.voters=5", "evaluate.num_questions=3", "evaluate.name=votes-5")
    with open_run(configure(models, tmp_path, methods, *settings), "evaluate", ALONE) as run:
        evaluate(run)
    assert not (folder.path / "results.json").exists()
    rows = {row["method"]: row for row in json.loads((folder.path / "results-votes-5.json").read_text())["rows"]}
    assert (rows["ladir"]["training_seconds"], rows["ladir-rollout"]["training_seconds"]) == (7.0, 15.0)
    lines = [json.loads(line) for line in (folder.path / "generations-votes-5.jsonl").read_text().splitlines()]
    assert [line["method"] for line in lines] == ["ladir"] * 3 + ["ladir-rollout"] * 3
    assert lines[0]["trajectories"] != lines[3]["trajectories"]
    passes = {method: row["forward_passes_per_question"] for method, row in rows.items()}
    assert passes["ladir-majority"] == passes["ladir"] / 2
    assert passes["ladir-consistent"] > passes["ladir-majority"]  # its thoughts are read, too


def test_a_row_of_each_stage_is_of_its_own_denoiser_whichever_was_exported(tmp_path: Path) -> None:
    folder = RunFolder(load_config(None, [f"run.folder={tmp_path}"]))
    folder.export.mkdir(parents=True)
    for origin, first, second in ((None, None, folder.model("rollout")), ("0123", folder.model("denoiser"), None)):
        (folder.export / "ladir.json").write_text(json.dumps({"kind": "denoiser", "origin": origin}))
        assert [stage_folder(folder, stage, snapshot=None) for stage in (False, True)] == [first, second]


@given(st.integers(0, 200), st.integers(1, 30), st.integers(1, 9))
def test_batches_cover_every_question_once_and_evenly(count: int, size: int, ranks: int) -> None:
    batches = cut(count, size, ranks)
    assert [i for batch in batches for i in batch] == list(range(count))
    sizes = [len(batch) for batch in batches]
    assert not sizes or (min(sizes) >= 1 and max(sizes) <= min(size, min(sizes) + 1))
    assert len(batches) % ranks == 0 or len(batches) == count


def test_the_baseline_reads_questions_as_its_folder_says(models: Path, tmp_path: Path) -> None:
    config = configure(models, tmp_path)
    folder, tokenizer = RunFolder(config), load_tokenizer(config.backbone)
    backbone = Backbone(tiny_lm(dtype=torch.float32, seed=3))
    records = read_questions_asked(config)[:3]
    prompts, keys = [prompt_ids(tokenizer, record.question) for record in records], [record.question for record in records]
    found: dict[bool, list[ChainText]] = {}
    for bidirectional in (False, True):
        save_lm(backbone, folder.model("ar"), bidirectional_question=bidirectional)
        answers = ar_answerers(config, folder, ["ar-greedy"], torch.device("cpu"))["ar-greedy"](records)
        texts = complete(backbone, prompts, keys, 1, int(tokenizer.pad_token_id), EOS, 6, 0.0, 0, bidirectional)
        found[bidirectional] = [parse_completion(decode_text(tokenizer, ids), ["####"]) for [ids] in texts]
        assert [(list(a.thoughts), a.answer) for [a] in answers.samples] == [(c.thoughts, c.answer) for c in found[bidirectional]]
    assert found[False] != found[True]


def test_the_methods_of_the_default_table_are_known() -> None:
    methods: Sequence[str] = Config().evaluate.methods
    assert tuple(methods) == ROWS


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
    for name, seconds in (("base", 5.0), ("ar", 90.0), ("ar-7", 30.0), ("denoiser-7", 20.0)):
        write_json(folder.outcome_file(name), dataclasses.asdict(Outcome("unfinished", 7, 7, seconds, {})))
    evaluate_in(models, tmp_path, methods, "evaluate.snapshot=7")
    rows = json.loads((folder.path / "results-7.json").read_text())["rows"]
    assert {row["method"]: row["training_seconds"] for row in rows} == {"ar": 35.0, "ladir": 25.0}
    config = configure(models, tmp_path)
    reasoner = Reasoner.from_pretrained(folder.export, "cpu", denoiser=folder.model("denoiser-7"))
    reasoner.settings = config.sample
    asked = read_questions_asked(config)
    expected = reasoner.generate([record.question for record in asked[:2]], 10, seed=config.run.seed)
    found = read_questions(folder.path / "generations-7.jsonl")["ladir"]
    assert [[t.answer for t in group] for group in expected] == [[t.answer for t in q.trajectories] for q in found[:2]]


def test_records_that_cannot_be_judged_are_refused_before_a_model_is_loaded(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.evaluate.load_answerers", lambda *_: pytest.fail("loaded a model"))
    (tmp_path / "test.jsonl").write_text('{"input": "1 2 -> 3", "output": "1 + 2 = 3\\n#### 1 + 2"}\n')
    with pytest.raises(UnusableError, match=r"test\.jsonl:1: not a Countdown record"):
        evaluate_in(models, tmp_path, f"data.test={tmp_path / 'test.jsonl'}")


def test_zero_noise_is_without_randomness_whatever_the_sampler() -> None:
    settings = dataclasses.replace(
        SampleSettings(sampler="sde"),
        **{name: value for name, value in VARIANTS["ladir-zero-noise"].items() if name != "num_trajectories"},
    )
    assert (settings.sampler, settings.initial_noise, settings.answer_temperature) == ("ode", 0.0, 0.0)


def test_answers_that_were_cut_off_are_told(caplog: pytest.LogCaptureFixture) -> None:
    def asked(*stopped: bool) -> list[QuestionResult]:
        return [QuestionResult("q", tuple(Trajectory("a", False, "a", stopped=ended) for ended in stopped))]

    _tell_of_limits("ar", asked(True, True), 256, 32)
    assert not caplog.messages
    _tell_of_limits("ar", asked(True, False), 256, 32)
    _tell_of_limits("ladir-sde", asked(False, False), 256, 32)
    assert caplog.messages == [
        "ar: 1 of 2 answers were cut off or forced at evaluate.ar_max_tokens=256",
        "ladir-sde: 2 of 2 answers were cut off or forced at sample.max_blocks=32",
    ]
