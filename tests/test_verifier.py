"""The verifier: what it reads, what it learns, what it chooses, and thoughts at rest."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

import ladir.data.judged
from ladir.config import Config, CountdownSettings
from ladir.config.loader import load_config
from ladir.data.judged import JudgedStore, JudgedTrajectory, collate_judged, pack_judged
from ladir.data.records import Record
from ladir.errors import UnusableError
from ladir.evaluation.calibration import calibration
from ladir.evaluation.choosing import RULES, Candidate, choose
from ladir.evaluation.results import read_questions, read_results
from ladir.inference.asking import Ask, Extras, Watch
from ladir.inference.guidance import BlockValue
from ladir.inference.sampler import TrajectoryNoise, renoise_times
from ladir.layout import Mark
from ladir.models.denoiser import Denoiser
from ladir.models.folders import save_denoiser, save_vae
from ladir.models.pairing import TrainedOn
from ladir.models.store import folder_fingerprint, heads_fingerprint
from ladir.models.verifier import Renoise, Verifier, save_verifier
from ladir.models.weights import save_tensors
from ladir.reasoner import Reasoner
from ladir.reference import clean_group, plain_forward, question_groups
from ladir.tasks import countdown
from ladir.tasks.verdict import Verdict
from ladir.tokens import encode_text
from tests.distributed import ProcessGroup
from tests.test_evaluate import ALONE, configure, evaluate_in
from tests.test_reasoner import CPU, QUESTIONS, PlainTrajectory, plain_velocity, standard, tiny_reasoner
from tests.test_status import words_said
from tests.tiny import randomise, tiny_denoiser, tiny_lm, tiny_vae
from tests.toy_task import Judge
from training import train_verifier
from training.export import last_verifier
from training.phases import judged
from training.phases.judged import collect, judged_trajectories, load_trained_reasoner, reading_vae
from training.phases.verifier import split_by_question, verifier_phase
from training.runtime.distributed import World
from training.runtime.files import write_json
from training.runtime.loop import train
from training.runtime.run import Outcome, RunFolder, open_run


def with_verifier(renoise: Renoise | None = None, **controls: Any) -> Reasoner:
    """A tiny reasoner whose verifier is random, too."""
    reasoner = tiny_reasoner(**controls)
    verifier = Verifier(reasoner.denoiser.backbone.hidden_size, 6, renoise).eval()
    randomise(verifier, 3, std=0.8)
    reasoner.verifier = verifier.double()
    return reasoner


def plain_states(d: Denoiser, ids: Sequence[int], blocks: Tensor) -> Tensor:
    """Hidden states [B + 1, H] at every <EOT> and at <SOA>, of one sequence without cache or padding."""
    question = question_groups(d, ids, hidden=False)
    groups = [*question, *(clean_group(d, block) for block in blocks), d.marks.weight[Mark.SOA][None]]
    ends = torch.tensor([len(vectors) for vectors in groups]).cumsum(0)[len(question) :] - 1
    return plain_forward(d.backbone, groups)[ends]


# --- what it reads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "renoise"), [("llama", None), ("qwen2", Renoise(0.7, 2))])
def test_a_score_is_that_of_the_plain_sequence_whatever_it_is_batched_with(kind: str, renoise: Renoise | None) -> None:
    reasoner = with_verifier(renoise, kind=kind, max_blocks=3)
    asks = [Ask(question, 1 + number, number) for number, question in enumerate(QUESTIONS)]
    groups = reasoner.answer(asks, reasoner.settings, extras=Extras(states=True))
    assert [len(group) for group in groups] == [1, 2, 3]
    assert len({len(entry.latents) for group in groups for entry in group}) > 1
    for ask, group in zip(asks, groups, strict=True):
        (alone,) = reasoner.answer([ask], reasoner.settings)
        if renoise is not None:
            reasoner.measure_drift([ask], [alone], replace(reasoner.settings, renoise_time=0.7, renoise_steps=2))
        for entry, other in zip(group, alone, strict=True):
            assert entry.score == pytest.approx(other.score, abs=1e-6) and other.states is None
            with torch.no_grad():
                states = plain_states(reasoner.denoiser, encode_text(reasoner.tokenizer, ask.question), standard(reasoner, entry))
                assert reasoner.verifier is not None and entry.states is not None
                assert torch.allclose(entry.states, states, atol=1e-5)
                logit = reasoner.verifier.logit(states[-1])
                if renoise is not None:
                    drifts = other.drifts or []
                    features = torch.tensor([math.log(sum(drifts) / len(drifts)), math.log(max(drifts))])
                    logit = logit + reasoner.verifier.drift_logit(features)
                assert entry.score == pytest.approx(float(logit.sigmoid()), abs=1e-4)


def test_without_a_verifier_there_are_no_scores_and_nothing_can_be_chosen_by_them() -> None:
    reasoner = tiny_reasoner()
    assert {entry.score for group in reasoner.generate(QUESTIONS, 2) for entry in group} == {None}
    for rule in ("best", "weighted"):
        with pytest.raises(UnusableError, match=f"choose={rule}: this model came without a verifier"):
            reasoner.generate(QUESTIONS, 2, choose=rule)
    with pytest.raises(UnusableError, match=r"verifier_scale=1.0: this model came without a verifier"):
        reasoner.generate(QUESTIONS, verifier_scale=1.0)
    with pytest.raises(ValueError, match="choose='loudest': must be one of first, majority, best, weighted, stable"):
        reasoner.generate(QUESTIONS, choose="loudest")


def test_questions_of_different_seeds_and_numbers_are_answered_as_alone() -> None:
    reasoner = tiny_reasoner()
    asks = [Ask("a b c", 2, 5), Ask("a b c", 1, 6), Ask("d", 3, 5)]
    for ask, group in zip(asks, reasoner.answer(asks, reasoner.settings), strict=True):
        (alone,) = reasoner.generate([ask.question], ask.num_trajectories, seed=ask.seed)
        assert [entry.answer for entry in group] == [entry.answer for entry in alone]
        for entry, other in zip(group, alone, strict=True):
            assert torch.allclose(entry.latents, other.latents, atol=1e-5)


def test_finished_blocks_are_told_as_they_come_and_whoever_watches_may_end_it() -> None:
    reasoner = tiny_reasoner(span=2, max_blocks=4)
    told: dict[int, list[str]] = defaultdict(list)

    def on_block(row: int, block: int, text: str) -> None:
        assert block == len(told[row])
        told[row].append(text)

    groups = reasoner.answer([Ask(q, 2) for q in QUESTIONS], reasoner.settings, Watch(on_block=on_block))
    flat = [entry for group in groups for entry in group]
    assert [entry.thoughts for entry in flat] == [told[row] for row in range(len(flat))]
    plain = reasoner.generate(QUESTIONS, 2)
    assert [entry.thoughts for entry in flat] == [entry.thoughts for group in plain for entry in group]
    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reasoner.answer([Ask("a b c")], reasoner.settings, Watch(between_steps=stop))
    assert len(calls) == 4


@pytest.mark.parametrize(
    "controls",
    [{}, {"span": 2}, {"reencode": True}, {"guidance_scale": 2.0}, {"context": "text", "span": 2, "lm_weight": 0.5}],
    ids=str,
)
def test_whoever_watches_is_asked_between_any_few_passes(controls: dict[str, Any]) -> None:
    """Of steps, blocks that are read, every answer, scores by drifts, and thoughts that are read afterwards."""
    reasoner = with_verifier(Renoise(0.7, 3), max_blocks=4, thoughts_per_batch=1, **controls)
    asks, settings, gaps, tokens = [Ask(q, 3) for q in QUESTIONS], reasoner.settings, [0], reasoner.settings.max_thought_tokens

    def between() -> None:
        gaps.append(0)

    def passed(*about: Any) -> None:
        gaps[-1] += 1

    for lm in (reasoner.denoiser.backbone, reasoner.thought_decoder.backbone):
        lm.register_forward_pre_hook(passed)
    found = reasoner.answer(asks, settings, Watch(between_steps=between), thoughts=False, extras=Extras(num_answers=2))
    assert max(gaps) <= 5 and sum(gaps) > 50
    gaps[:] = [0]
    reasoner.measure_drift(asks, found, between_steps=between)
    assert max(gaps) <= 5 and sum(gaps) > 10
    gaps[:] = [0]
    reasoner.read_thoughts([trajectory for group in found for trajectory in group], between)
    assert max(gaps) <= tokens + 1  # of a batch


# --- its gradient ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("controls", [{}, {"span": 2}, {"guidance_scale": 2.0}], ids=str)
def test_one_step_moves_along_the_gradient_of_every_blocks_own_value(controls: dict[str, Any]) -> None:
    """At t = 1 a single Euler step ends at the estimate; the question and the blocks before it are in view."""
    span = controls.get("span", 1)
    reasoner = with_verifier(num_steps=1, lag=0, max_blocks=span, **controls)
    with torch.no_grad():
        reasoner.denoiser.stop_head.bias.fill_(-1e4)
    verifier, d, scale = reasoner.verifier, reasoner.denoiser, 0.3
    assert verifier is not None
    free, drawn = (reasoner.generate(QUESTIONS, 2, verifier_scale=x) for x in (0.0, scale))
    for question, before, after in zip(QUESTIONS, free, drawn, strict=True):
        ids = encode_text(reasoner.tokenizer, question)
        for entry, moved in zip(before, after, strict=True):
            z = standard(reasoner, entry)
            for block in range(span):
                leaf = z[block].clone().requires_grad_()
                states = plain_states(d, ids, torch.cat([z[:block], leaf[None]]))
                value = F.logsigmoid(verifier.logit(states[block]))
                (gradient,) = torch.autograd.grad(value, leaf)
                assert float(gradient.abs().max()) > 1e-3
                torch.testing.assert_close(standard(reasoner, moved)[block] - z[block], scale * gradient, atol=1e-4, rtol=1e-3)


def test_the_value_leaves_its_prefix_as_it_was_and_agrees_with_finite_differences() -> None:
    reasoner = with_verifier()
    assert reasoner.verifier is not None
    value = BlockValue(reasoner.denoiser, reasoner.verifier)
    with torch.no_grad():
        prefix = reasoner._question_prefix(["a b c d e f g h i j k l m n o p q r s t"], torch.zeros(3, dtype=torch.int64), False)
    assert prefix.shared is not None
    z = torch.randn(3, 1, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = (prefix.valid.clone(), prefix.next_position.clone(), prefix.cache.get_seq_length())
    with torch.no_grad():
        gradient = value.gradient(prefix, z)
        step = 1e-2
        for index in [(0, 0, 0, 0), (1, 0, 1, 2), (2, 0, 0, 1)]:
            up, down = z.clone(), z.clone()
            up[index] += step
            down[index] -= step
            slope = (value(prefix, up[:, 0]) - value(prefix, down[:, 0]))[index[0]] / (2 * step)
            assert float(gradient[index]) == pytest.approx(float(slope), abs=2e-3)
    assert torch.equal(before[0], prefix.valid) and torch.equal(before[1], prefix.next_position)
    assert before[2] == prefix.cache.get_seq_length() and gradient.requires_grad is False


# --- thoughts at rest --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "controls",
    [
        {},
        {"span": 2, "lag": 0},
        {"guidance_scale": 1.5, "carry": "hidden"},
        {"guidance_scale": 1.5, "carry": "hidden", "context": "text"},
    ],
    ids=str,
)
def test_drift_is_how_far_plain_denoising_moves_finished_thoughts(controls: dict[str, Any]) -> None:
    reasoner = tiny_reasoner(max_blocks=3, renoise_time=0.6, renoise_steps=2, **controls)
    asks = [Ask(question, 2, 4) for question in QUESTIONS[:2]]
    groups = reasoner.answer(asks, reasoner.settings)
    reasoner.measure_drift(asks, groups)
    s, d = reasoner.settings, reasoner.denoiser
    size, times = d.settings.span, renoise_times(s)
    for ask, group in zip(asks, groups, strict=True):
        noise = TrajectoryNoise(4, [(ask.question, i) for i in range(2)]).apart("drift")
        ids = encode_text(reasoner.tokenizer, ask.question)
        for row, entry in enumerate(group):
            finished, total = standard(reasoner, entry), 0.0
            for first in range(0, len(finished), size):
                blocks = finished[first : first + size]
                eps = noise.normal([row], (size, d.latents_per_block, d.latent_dim))[0]
                z = torch.cat([blocks, torch.zeros(size - len(blocks), *blocks.shape[1:])])
                z, carried, free_carried = (1 - times[0]) * z + times[0] * eps, None, None
                for t, t_next in itertools.pairwise(times):
                    before = PlainTrajectory([], list(finished[:first]), (entry.thought_ids or [])[:first], False, []).groups(d)
                    with torch.no_grad():
                        velocity, carried = plain_velocity(reasoner, ids, before, z, [t] * size, False, carried)
                        if s.guidance_scale != 1:
                            free, free_carried = plain_velocity(reasoner, ids, before, z, [t] * size, True, free_carried)
                            velocity = free + s.guidance_scale * (velocity - free)
                    z = z + (t_next - t) * velocity
                total += float((z[: len(blocks)] - blocks).square().mean((-2, -1)).sum())
            assert entry.drift == pytest.approx(total / len(finished), rel=1e-4)
            assert len(entry.drifts or []) == len(finished)


# --- choosing ----------------------------------------------------------------------------------------------------------

CANDIDATES = st.lists(
    st.builds(
        Candidate,
        st.sampled_from(["", "a", "b", "c"]),
        st.sampled_from([0.125, 0.25, 0.5, 0.75]),
        st.sampled_from([0.1, 0.2, 0.4]),
        st.booleans(),
    ),
    min_size=1,
    max_size=8,
)


@given(CANDIDATES)
def test_every_rule_equals_its_obvious_version(candidates: list[Candidate]) -> None:
    voters = [entry for entry in candidates if entry.answer] or candidates
    chosen = {rule: candidates[choose(candidates, rule)] for rule in RULES}
    assert chosen["first"] is candidates[0]
    assert chosen["best"] is next(entry for entry in voters if entry.score == max(e.score or 0 for e in voters))
    assert chosen["stable"] is next(entry for entry in voters if entry.drift == min(e.drift or 0 for e in voters))
    totals = {entry.answer: sum(e.score or 0 for e in voters if e.answer == entry.answer) for entry in voters}
    assert chosen["weighted"] is next(entry for entry in voters if totals[entry.answer] == max(totals.values()))


def test_what_was_not_measured_cannot_choose() -> None:
    for rule, missing in (("best", "needs a verifier"), ("weighted", "needs a verifier"), ("stable", "was not measured")):
        with pytest.raises(UnusableError, match=missing):
            choose([Candidate("a", 0.5, 0.5), Candidate("b")], rule)


@pytest.mark.parametrize("rule", ["first", "majority", "best", "weighted", "stable"])
def test_the_reasoner_gives_the_one_that_the_rule_chooses(rule: str) -> None:
    reasoner = with_verifier(answer_temperature=1.0)
    canonical = str.upper
    everything = reasoner.generate(QUESTIONS, 5, seed=2)
    reasoner.measure_drift([Ask(question, 5, 2) for question in QUESTIONS], everything)
    expected = []
    for group in everything:
        answered = [entry for entry in group if entry.answer.strip()] or group
        scores = [entry.score or 0.0 for entry in answered]
        totals = {a: sum(s for s, e in zip(scores, answered, strict=True) if e.answer == a) for a in {e.answer for e in answered}}
        key = {
            "first": lambda entry, group=group: entry is group[0],
            "majority": lambda entry, answered=answered: [e.answer for e in answered].count(entry.answer),
            "best": lambda entry: entry.score,
            "weighted": lambda entry, totals=totals: totals[entry.answer],
            "stable": lambda entry: -(entry.drift or 0.0),
        }[rule]
        expected.append(max(group if rule == "first" else answered, key=key))
    for _ in range(2):
        found = reasoner.generate(QUESTIONS, 5, seed=2, choose=rule, canonical=canonical)
        assert [[entry.answer for entry in group] for group in found] == [[entry.answer] for entry in expected]
        for (entry,), other in zip(found, expected, strict=True):
            assert torch.equal(entry.latents, other.latents)


# --- scores and the truth ----------------------------------------------------------------------------------------------


def test_calibration_of_scores_by_hand() -> None:
    scores, right = [0.05, 0.05, 0.35, 0.35, 0.95, 1.0], [False, True, False, False, True, True]
    found = calibration(scores, right)
    assert found.counts == [2, 2, 2] and found.rates == [0.5, 0.0, 1.0]
    assert found.scores == pytest.approx([0.05, 0.35, 0.975])
    assert found.error == pytest.approx((2 * 0.45 + 2 * 0.35 + 2 * 0.025) / 6)
    assert found.brier == pytest.approx(sum((s - r) ** 2 for s, r in zip(scores, right, strict=True)) / 6)
    pairs = [(s, o) for s, r in zip(scores, right, strict=True) if r for o, q in zip(scores, right, strict=True) if not q]
    assert found.auc == pytest.approx(sum((s > o) + 0.5 * (s == o) for s, o in pairs) / len(pairs))
    assert calibration([0.2, 0.4], [True, True]).auc is None
    with pytest.raises(ValueError, match="no scores"):
        calibration([], [])


# --- learning ----------------------------------------------------------------------------------------------------------


def toy_trajectories(count: int, seed: int) -> list[JudgedTrajectory]:
    """Trajectories of one to three blocks that are right where one direction of the last state is positive."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        states = torch.randn(int(torch.randint(2, 5, (1,), generator=generator)), 8, generator=generator)
        drift = torch.randn(2, generator=generator)
        found.append(JudgedTrajectory(states, bool(states[-1, 2] > states[-1, 5]), number // 2, drift))
    return found


def test_losses_are_those_of_one_trajectory_after_another() -> None:
    verifier, items = Verifier(8, 4, Renoise(0.5, 5)), toy_trajectories(7, 0)
    batch = collate_judged(items, range(7))
    losses = verifier(batch)
    expected = {"verifier": torch.zeros(()), "value": torch.zeros(())}
    for item in items:
        for place, state in enumerate(item.states):
            term = "verifier" if place + 1 == len(item.states) else "value"
            logit = verifier.logit(state)
            if term == "verifier":
                logit = logit + verifier.drift_logit(item.drift)
            log_p = F.logsigmoid(logit * (1 if item.right else -1))
            expected[term] = expected[term] - log_p
    for term, value in expected.items():
        torch.testing.assert_close(losses[term], value)
        assert batch.counts[term] == sum(1 if term == "verifier" else len(item.states) - 1 for item in items)
    assert batch.num_tokens == sum(len(item.states) for item in items) == len(batch.right)


def test_a_separable_toy_is_learned() -> None:
    torch.manual_seed(0)
    verifier, batch = Verifier(8, 16), collate_judged(toy_trajectories(300, 1), range(300))
    optimizer = torch.optim.AdamW(verifier.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        verifier(batch)["verifier"].div(300).backward()
        optimizer.step()
    right, count = verifier(collate_judged(toy_trajectories(200, 2), range(200)))["metric/verifier_accuracy"].tolist()
    assert count == 200 and right / count > 0.95


def stored(folder: Path, trajectories: Sequence[JudgedTrajectory]) -> JudgedStore:
    """In files of seven each."""
    files = [folder / f"{first:03d}.safetensors" for first in range(0, len(trajectories), 7)]
    for number, file in enumerate(files):
        save_tensors(pack_judged(trajectories[7 * number : 7 * number + 7]), file)
    return JudgedStore(files)


def test_no_question_is_learned_from_and_held_out(tmp_path: Path) -> None:
    items, held_out = split_by_question(stored(tmp_path, toy_trajectories(20, 0)), 0.3)
    assert {item.question for item in items} == set(range(7)) and {item.question for item in held_out} == {7, 8, 9}
    whole, none = split_by_question(items, 0.0)
    assert len(whole) == len(items) == 14 and len(none) == 0


class Counted:
    """Opened files that count what is read of them."""

    def __init__(self, rows: list[int]) -> None:
        self.rows, self.read = rows, set[str]()

    def open(self, file: Path, framework: str) -> Any:
        opened = safe_open(file, framework)

        def get_tensor(name: str) -> torch.Tensor:
            self.read.add(name)
            return opened.get_tensor(name)

        def rows_of(name: str, rows: slice) -> torch.Tensor:
            found = opened.get_slice(name)[rows]
            self.rows.append(len(found))
            return found

        def get_slice(name: str) -> Any:
            return type("Rows", (), {"__getitem__": lambda _, rows: rows_of(name, rows)})()

        return SimpleNamespace(get_tensor=get_tensor, get_slice=get_slice)


def test_judged_states_are_read_when_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start reads no part whole; what is asked for, in whatever order, is bit for bit what was kept."""
    kept, counted = toy_trajectories(20, 0), Counted([])
    monkeypatch.setattr(ladir.data.judged, "safe_open", counted.open)
    store = stored(tmp_path, kept)
    items, held_out = split_by_question(store, 0.3)
    assert counted.rows == [] and "states" not in counted.read
    collate_judged([held_out[2]], [0])
    assert counted.rows == [len(kept[16].states)]
    assert len(store[3:5]) == 2 and len(items) + len(held_out) == len(store)
    for place in reversed(range(20)):
        found, before = store[place], kept[place]
        assert torch.equal(found.states, before.states) and torch.equal(found.drift, before.drift)
        assert (found.right, found.question) == (before.right, before.question)
    ours, theirs = (collate_judged(entries, range(6)) for entries in (held_out, kept[14:]))
    assert all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in ("states", "right", "at_end", "drifts"))


# --- exports -----------------------------------------------------------------------------------------------------------


def test_an_export_keeps_its_verifier_and_one_without_loads_as_before(tmp_path: Path) -> None:
    reasoner = with_verifier(Renoise(0.4, 3))
    reasoner.save_pretrained(tmp_path / "with")
    loaded = Reasoner.from_pretrained(tmp_path / "with", CPU, dtype="float32")
    assert [[e.score for e in group] for group in loaded.generate(QUESTIONS, 2)] == [
        [pytest.approx(e.score, abs=1e-4) for e in group] for group in reasoner.generate(QUESTIONS, 2)
    ]
    loaded.save_pretrained(tmp_path / "again")
    again = Reasoner.from_pretrained(tmp_path / "again", CPU).verifier
    assert again is not None and again.renoise == Renoise(0.4, 3)
    tiny_reasoner().save_pretrained(tmp_path / "without")
    assert Reasoner.from_pretrained(tmp_path / "without", CPU).verifier is None


def test_a_verifier_of_another_denoiser_is_refused(tmp_path: Path) -> None:
    with_verifier().save_pretrained(tmp_path / "export")
    other = tmp_path / "other"
    save_denoiser(tiny_denoiser(tiny_lm(), seed=9), other)
    save_verifier(Verifier(16, 4), tmp_path / "verifier", heads_fingerprint(other))
    assert Reasoner.from_pretrained(tmp_path / "export", CPU, denoiser=other).verifier is None
    assert Reasoner.from_pretrained(tmp_path / "export", CPU, denoiser=other, verifier=tmp_path / "verifier").verifier is not None
    with pytest.raises(UnusableError, match=r"was trained on what another denoiser makes of thoughts .* run training/train_ver"):
        Reasoner.from_pretrained(tmp_path / "export", CPU, verifier=tmp_path / "verifier")


# --- the program -------------------------------------------------------------------------------------------------------


class Parity(Judge):
    """An answer is right where it has an even number of letters."""

    def verdict(self, answer: str, record: Record) -> Verdict:
        return Verdict(len(answer) % 2 == 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Puzzles, and the run ``tiny`` with a denoiser that was never trained and its export."""
    folder = tmp_path_factory.mktemp("verifier")
    countdown.write(CountdownSettings(max_number=9, max_value=16, train=9, validation=1, test=4), 0, folder / "data")
    reasoner = tiny_reasoner(dtype=torch.float32)
    run = RunFolder(judging(folder))
    save_denoiser(reasoner.denoiser, run.model("denoiser"))
    reasoner.encoder = None
    reasoner.save_pretrained(run.export)
    write_json(run.outcome_file("denoiser"), Outcome("finished", 1, 1, 7.0, {}).__dict__)
    return folder


def judging(folder: Path, *overrides: str) -> Config:
    settings = ["verifier.num_trajectories=3", "verifier.questions_per_batch=2", "verifier.held_out=0.25", "verifier.width=4"]
    steps = ["verifier.train.max_epochs=null", "verifier.train.max_steps=2", "verifier.train.log_every=1"]
    sizes = ["verifier.train.global_batch=8", "verifier.train.micro_batch=8", "sample.answer_temperature=2.0"]
    given = [*settings, *steps, *sizes, f"data.train={folder}/data/train.jsonl", "deepspeed.config=ds_configs/zero0.json"]
    return configure(folder, folder, "telemetry.loggers=[]", *given, *overrides)


def stopped_behind(choose: Callable[..., Any]) -> Callable[..., Any]:
    """The same, and this process is asked to stop when it is done."""

    def chosen(*arguments: Any) -> Any:
        found = choose(*arguments)
        os.kill(os.getpid(), signal.SIGUSR2)
        return found

    return chosen


def train_in(world: World, folder: Path, overrides: Sequence[str] = (), stop: bool = False) -> dict[str, Any] | None:
    """Collect and train with :class:`Parity`; None where it was asked to stop in between."""
    with pytest.MonkeyPatch.context() as patch, open_run(judging(folder, *overrides), "verifier", world) as run:
        patch.setattr(judged, "get_task", lambda name, settings: Parity())
        if stop and world.rank == world.size - 1:
            patch.setattr(judged, "chosen_questions", stopped_behind(judged.chosen_questions))
        denoiser = train_verifier.judged_denoiser(run.config, run.folder)
        said = words_said(patch)
        found = collect(run, denoiser)
        if found is None:
            return None
        outcome = train(run, verifier_phase(run.config, denoiser, found))
        kept = [(item.question, item.right, item.states.sum().item()) for item in judged_trajectories(found)]
        return {"kept": kept, "metrics": outcome.metrics, "parts": sorted(file.name for file in found.iterdir()), "said": said}


@pytest.mark.distributed
def test_trajectories_are_judged_and_learned_alike_on_any_number_of_ranks_and_after_a_stop(
    trained: Path, one_process: ProcessGroup, two_processes: ProcessGroup, tmp_path: Path
) -> None:
    (alone,) = one_process.run(train_in, trained)
    assert alone is not None
    questions = {number for number, *_ in alone["kept"]}
    assert len(alone["kept"]) == 3 * len(questions) and {right for _, right, _ in alone["kept"]} == {True, False}
    assert any(words.startswith("collecting judged trajectories, questions 1 to ") for words in alone["said"])
    assert {"loss", "verifier", "value", "verifier_accuracy", "validation/verifier"} <= alone["metrics"].keys()
    other = tmp_path / "two"
    for name in ("tiny/models/denoiser", "tiny/export", "data"):
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).symlink_to(trained / name)
    assert two_processes.run(train_in, other, [], True) == [None, None]
    for found in two_processes.run(train_in, other, ["deepspeed.config=ds_configs/zero3.json"]):
        assert found is not None and found["parts"] == alone["parts"]
        assert [entry[:2] for entry in found["kept"]] == [entry[:2] for entry in alone["kept"]]
        assert found["metrics"]["validation/verifier"] == pytest.approx(alone["metrics"]["validation/verifier"], rel=1e-3)


def collect_signalled(world: World, folder: Path, patch_in: str) -> list[str] | None:
    """Collect until the last rank gets a signal in the middle of its first batch; what is kept of it, None where it went on."""
    with pytest.MonkeyPatch.context() as patch, open_run(judging(folder), "verifier", world) as run:
        patch.setattr(judged, "get_task", lambda name, settings: Parity())
        owner, name = {"asked": (Reasoner, "answer"), "judged": (judged, "judge_samples")}[patch_in]
        real = getattr(owner, name)

        def signalled(*about: Any, **named: Any) -> Any:
            os.kill(os.getpid(), signal.SIGUSR2)
            return real(*about, **named)

        if world.rank == world.size - 1:
            patch.setattr(owner, name, signalled)
        found = collect(run, train_verifier.judged_denoiser(run.config, run.folder))
        return None if found is not None else sorted(file.name for file in run.folder.judged.glob("*/*.safetensors"))


@pytest.mark.distributed
@pytest.mark.parametrize("doing", ["asked", "judged"])
def test_a_stop_leaves_the_batch_under_way_undone(
    doing: str, trained: Path, two_processes: ProcessGroup, one_process: ProcessGroup, tmp_path: Path
) -> None:
    """The other rank's is kept: it got no signal.  The next start, of one process, judges the rest."""
    for name in ("tiny/models/denoiser", "tiny/export", "data"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(trained / name)
    assert two_processes.run(collect_signalled, tmp_path, doing) == [["000000000.safetensors"]] * 2
    (found,) = one_process.run(train_in, tmp_path)
    assert found is not None and len(found["parts"]) > 1
    assert len(found["kept"]) == 3 * len({number for number, *_ in found["kept"]})


def test_what_teaches_nothing_or_is_missing_is_told(trained: Path, tmp_path: Path) -> None:
    config = judging(tmp_path / "empty", f"data.train={trained}/data/train.jsonl")
    with pytest.raises(FileNotFoundError, match=r"denoiser is not there: run training/train_denoiser.py first"):
        train_verifier.judged_denoiser(config, RunFolder(config))
    items = [replace(item, right=True) for item in toy_trajectories(4, 0)]
    save_tensors(pack_judged(items), tmp_path / "0.safetensors")
    with pytest.raises(UnusableError, match="of 4 judged trajectories 4 are right: there is nothing to tell apart"):
        verifier_phase(config, trained, tmp_path)


def test_blocks_are_read_by_the_vae_that_the_denoiser_was_trained_on(tmp_path: Path) -> None:
    """By what the denoiser was trained with, whatever the settings say; one that was trained anew is refused before what is
    judged is removed."""
    config = judging(tmp_path, f"data.train={tmp_path}/data/train.jsonl")
    folder = RunFolder(config)
    vae, denoiser = folder.model("vae"), folder.model("denoiser")
    tiny_lm(seed=7, dtype=torch.float32).save_pretrained(tmp_path / "base")  # the VAE's frozen decoder
    save_vae(tiny_vae(dtype=torch.float32), vae, base=str(tmp_path / "base"))
    text = tiny_reasoner(dtype=torch.float32, context="text")
    save_denoiser(text.denoiser, denoiser, trained_on=TrainedOn(vae=folder_fingerprint(vae)))
    countdown.write(CountdownSettings(max_number=9, max_value=16, train=2, validation=1, test=1), 0, tmp_path / "data")
    with open_run(config, "verifier", ALONE) as run:
        assert reading_vae(run, denoiser) == vae
        run.config.sample.reencode = False
        reader = load_trained_reasoner(run.config, denoiser, vae, text.tokenizer, CPU)
        assert reader.encoder is None and reader.reads_blocks(reader.settings)
        text.settings = reader.settings
        [[ours]], [[theirs]] = (entry.generate(QUESTIONS[:1], seed=3) for entry in (reader, text))
        assert ours.thought_ids == theirs.thought_ids is not None
        run.config.sample.reencode = True
        assert load_trained_reasoner(run.config, denoiser, vae, text.tokenizer, CPU).encoder is not None
        kept = run.folder.judged / "of-the-old-vae"
        kept.mkdir(parents=True)
        save_vae(tiny_vae(dtype=torch.float32, seed=8), vae, base=str(tmp_path / "base"))
        with pytest.raises(UnusableError, match="was trained on the latents of another VAE"):
            collect(run, denoiser)
        assert kept.is_dir()
        save_denoiser(tiny_reasoner(dtype=torch.float32).denoiser, denoiser, trained_on=TrainedOn(vae="another"))
        run.config.sample.reencode = False
        assert reading_vae(run, denoiser) is None  # nothing is read, whichever VAE lies there


def test_rows_that_choose_by_scores_and_by_drift(trained: Path, tmp_path: Path) -> None:
    """Their figures are those of the obvious choice among the samples that the evaluation keeps."""
    models = RunFolder(judging(trained))
    verifier = models.model("verifier")
    rows = ["ladir", "ladir-best", "ladir-weighted", "ladir-majority", "ladir-stable"]
    settings = [f"evaluate.methods=[{','.join(rows)}]", "evaluate.num_trajectories=4", "evaluate.voters=2"]
    if not verifier.is_dir():  # the test above trains one
        head = Verifier(16, 4)
        randomise(head, 1)
        save_verifier(head, verifier, heads_fingerprint(models.model("denoiser")))
    assert last_verifier(models, models.model("denoiser")) == verifier
    evaluate_in(trained, tmp_path, *settings)
    found = read_results(tmp_path / "tiny" / "results.json")
    by_method = {row["method"]: row for row in found["rows"]}
    assert list(by_method) == rows and by_method["ladir"]["verifier"]["answers"] == 4 * found["num_questions"]
    (questions,) = read_questions(tmp_path / "tiny" / "generations.jsonl").values()
    for row, key in (("ladir-best", "score"), ("ladir-stable", "drift")):
        sign = 1 if key == "score" else -1
        chosen = []
        for question in questions:
            for first in (0, 2):
                pair = question.trajectories[first : first + 2]
                entries = [entry for entry in pair if entry.canonical] or pair
                chosen.append(max(entries, key=lambda entry: sign * getattr(entry, key)).correct)
        assert by_method[row]["pass@1"] == pytest.approx(sum(chosen) / len(chosen))
    passes = {method: row["forward_passes_per_question"] for method, row in by_method.items()}
    assert passes["ladir-stable"] > passes["ladir-majority"] <= passes["ladir-best"] == passes["ladir-weighted"]
    assert all(math.isfinite(entry.drift or 0) for question in questions for entry in question.trajectories)


def test_rows_of_a_verifier_that_is_not_there_are_refused(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    (folder / "models").mkdir(parents=True)
    (folder / "export").symlink_to(trained / "tiny" / "export")
    with pytest.raises(FileNotFoundError, match=r"rows ladir-best: there is no verifier of .*verifier.stage=denoiser, or leave"):
        evaluate_in(trained, tmp_path, "evaluate.methods=[ladir,ladir-best]")
    assert json.loads((trained / "tiny" / "export" / "ladir.json").read_text())["kind"] == "denoiser"
    assert load_config(None, []).verifier.stage == "last"
