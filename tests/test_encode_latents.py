"""A stopped encoding: written parts are kept, the rest follows, and the store is that of an undisturbed run."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ladir.config.loader import load_config
from ladir.data.latents import LatentStore
from tests.distributed import ProcessGroup
from training.phases import latent_report
from training.phases import latents as encode_latents
from training.phases.tokens import Tokens
from training.runtime.distributed import World
from training.runtime.run import Run, RunFolder

TOKENIZER: Any = SimpleNamespace(pad_token_id=0, eos_token_id=1)
ALONE = World(0, 1, 0, torch.device("cpu"))


class Encoder:
    """Stands for the VAE: latents are a function of the sentence; asks the run to stop during its ``stop_in``-th batch."""

    settings = SimpleNamespace(latent_dim=2, latents_per_block=1)

    def __init__(self, run: Run, stop_in: int = 0) -> None:
        self.run, self.stop_in = run, stop_in
        self.sentences = self.batches = 0

    def __call__(self, vae: object, sentences: Sequence[Sequence[int]], pack_tokens: int) -> tuple[Tensor, Tensor]:
        self.stop_in -= 1
        self.run.stop.requested |= self.stop_in == 0
        self.sentences += len(sentences)
        self.batches += 1
        mean = torch.tensor([[[float(sum(sentence)), float(len(sentence))]] for sentence in sentences])
        return mean, -mean


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return stand_ins(monkeypatch)


def stand_ins(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Ten records of one to three blocks, in place of a file's; any VAE folder has the fingerprint ``vae``."""
    made = [SimpleNamespace(question=[i], blocks=[[i, b] for b in range(1 + i % 3)], answer=[i, i]) for i in range(10)]
    monkeypatch.setattr(Tokens, "records", lambda tokens, named: made)
    monkeypatch.setattr(encode_latents, "fingerprint", lambda *of: "vae")
    monkeypatch.setattr(encode_latents, "_check_lengths", lambda *arguments: None)
    monkeypatch.setattr(encode_latents, "load_tokenizer", lambda backbone: TOKENIZER)
    return made


def encode(
    folder: Path, monkeypatch: pytest.MonkeyPatch, stop_in: int = 0, world: World = ALONE, settings: Sequence[str] = ()
) -> tuple[bool, Encoder, Path]:
    """Encode in a process that just started; every batch takes a second."""
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").touch()  # its records are stand-ins
    settings = [f"data.train={folder / 'train.jsonl'}", "latents.records_per_part=3", "latents.batch_size=2", *settings]
    settings.append("latents.report_sentences=0")  # there is no VAE to read them
    run = Run(load_config(None, [f"run.folder={folder}", *settings]), "latents", world)
    vae: Any = Encoder(run, stop_in)
    monkeypatch.setattr(encode_latents, "encode_sentences", vae)
    monkeypatch.setattr(encode_latents, "load_vae", lambda *arguments, **options: vae)
    monkeypatch.setattr(encode_latents, "time", SimpleNamespace(perf_counter=lambda: float(vae.batches)))
    return encode_latents.encode(run), vae, run.folder.latents / "train"


def seconds(folder: Path) -> float | None:
    """What a finished encoding says it took."""
    outcome = RunFolder(load_config(None, [f"run.folder={folder}"])).outcome("latents")
    return outcome.seconds if outcome is not None else None


def test_a_stopped_encoding_continues_after_its_last_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[Any]
) -> None:
    finished, whole, expected = encode(tmp_path / "whole", monkeypatch)
    assert finished
    assert whole.sentences == sum(len(record.blocks) for record in records)

    finished, first, store = encode(tmp_path / "stopped", monkeypatch, stop_in=4)
    assert not finished
    assert not store.exists()
    assert seconds(tmp_path / "stopped") is None
    (next(store.parent.glob("train.parts-*")) / "000000009.arrow").write_bytes(b"torn")  # left by a process that was killed
    finished, second, store = encode(tmp_path / "stopped", monkeypatch)
    assert finished
    assert 0 < first.sentences < whole.sentences
    assert first.sentences + second.sentences == whole.sentences
    assert files(store) == files(expected)
    assert sorted(path.name for path in store.parent.iterdir()) == ["seconds.json", "sources.json", "train"]


def test_a_stop_is_obeyed_while_the_decoder_that_reads_the_latents_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which has no end here."""
    run, released = Run(load_config(None, [f"run.folder={tmp_path}"]), "latents", ALONE), threading.Event()

    def load(*about: object) -> None:
        run.stop.requested = True
        released.wait()

    monkeypatch.setattr(latent_report, "load_thought_decoder", load)
    monkeypatch.setattr(encode_latents, "stored_records", lambda *about: None)
    tokenizer: Any = SimpleNamespace(eos_token_id=0)
    assert encode_latents._report(run, tokenizer) is None
    released.set()


def test_the_seconds_of_a_stopped_encoding_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[Any]) -> None:
    whole = encode(tmp_path / "whole", monkeypatch)[1].batches
    assert seconds(tmp_path / "whole") == whole
    spent = [encode(tmp_path / "stopped", monkeypatch, stop_in=stop_in)[1].batches for stop_in in (1, 2, 0)]
    assert min(spent) > 0 and sum(spent) == whole
    assert seconds(tmp_path / "stopped") == whole
    assert encode(tmp_path / "stopped", monkeypatch)[1].batches == 0
    assert seconds(tmp_path / "stopped") == whole
    monkeypatch.setattr(encode_latents, "fingerprint", lambda *of: "another")
    encode(tmp_path / "stopped", monkeypatch)
    assert seconds(tmp_path / "stopped") == whole  # of the latents that are there now


def test_latents_of_other_records_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[Any]) -> None:
    """As when the run was stopped before the latents were finished, and its data changed."""
    file = tmp_path / "train.jsonl"
    file.write_text("one")
    assert encode(tmp_path, monkeypatch)[1].sentences > 0
    assert encode(tmp_path, monkeypatch)[1].sentences == 0
    file.write_text("two")
    RunFolder(load_config(None, [f"run.folder={tmp_path}"])).outcome_file("latents").unlink()
    assert encode(tmp_path, monkeypatch)[1].sentences > 0


def test_latents_of_a_hub_set_go_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[Any]) -> None:
    """Which a run keeps as it has read it first, until its note of it is gone."""
    now = ["a" * 40]
    monkeypatch.setattr("training.phases.tokens.hub_commit", lambda name: name.partition("@")[2] or now[0])

    def sentences(name: str) -> int:
        return encode(tmp_path, monkeypatch, settings=[f"data.train={name}"])[1].sentences

    assert sentences("some/set") > 0
    now[0] = "b" * 40
    assert sentences("some/set") == 0
    (RunFolder(load_config(None, [f"run.folder={tmp_path}"])).path / "hub-commits.json").unlink()
    assert sentences("some/set") > 0 and sentences("some/set") == 0


def test_damaged_latents_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    _, _, store = encode(tmp_path, monkeypatch)
    arrow = store / "000000003.arrow"
    whole = arrow.read_bytes()
    assert encode(tmp_path, monkeypatch)[1].sentences == 0
    arrow.write_bytes(whole[:-9])
    finished, vae, _ = encode(tmp_path, monkeypatch)
    assert finished and vae.sentences > 0
    assert arrow.read_bytes() == whole
    assert "damaged" in caplog.text and "encoding it anew" in caplog.text


def test_an_encoding_under_way_starts_over_when_the_vae_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[Any]
) -> None:
    assert not encode(tmp_path, monkeypatch, stop_in=4)[0]
    monkeypatch.setattr(encode_latents, "fingerprint", lambda *of: "another")
    finished, vae, store = encode(tmp_path, monkeypatch)
    assert finished
    assert vae.sentences == sum(len(record.blocks) for record in records)
    assert LatentStore.open(store).fingerprint == "another"
    assert sorted(path.name for path in store.parent.iterdir()) == ["seconds.json", "sources.json", "train"]


def test_a_part_that_was_cut_short_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[Any]) -> None:
    _, whole, expected = encode(tmp_path / "whole", monkeypatch)
    _, first, store = encode(tmp_path / "copied", monkeypatch, stop_in=4)
    arrow = next(store.parent.glob("train.parts-*/*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:-9])
    finished, second, store = encode(tmp_path / "copied", monkeypatch)
    assert finished and first.sentences + second.sentences > whole.sentences
    assert files(store) == files(expected)


def encode_on(world: World, folder: Path, stopped_rank: int | None) -> tuple[bool, int]:
    """Encode on this rank; ``stopped_rank`` gets a signal in its first batch.  Whether all is done, and sentences."""
    with pytest.MonkeyPatch.context() as patch:
        stand_ins(patch)
        finished, vae, _ = encode(folder, patch, stop_in=int(world.rank == stopped_rank), world=world)
        return finished, vae.sentences


@pytest.mark.parametrize("stopped_rank", [0, 1])
def test_processes_share_the_records_stop_together_and_any_number_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[Any], two_processes: ProcessGroup, stopped_rank: int
) -> None:
    """What two have encoded one goes on with, and the files are those of one that was never stopped."""
    whole, expected = encode(tmp_path / "alone", monkeypatch)[1:]
    first = two_processes.run(encode_on, tmp_path / "shared", stopped_rank)
    assert not any(finished for finished, _ in first)
    if stopped_rank:
        second = two_processes.run(encode_on, tmp_path / "shared", None)
        assert all(finished and sentences for finished, sentences in second)
    else:
        finished, vae, _ = encode(tmp_path / "shared", monkeypatch)
        second = [(finished, vae.sentences)]
        assert finished
    assert sum(sentences for _, sentences in first + second) == whole.sentences
    assert files(tmp_path / "shared" / expected.relative_to(tmp_path / "alone")) == files(expected)


def test_what_a_store_lacks_is_encoded_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[Any]) -> None:
    """Log-variances are there only where they are wanted."""
    store = encode(tmp_path, monkeypatch)[2]
    assert LatentStore.open(store)[0].logvar is None
    _, vae, _ = encode(tmp_path, monkeypatch, settings=["denoiser.sample_latents=true"])
    one = LatentStore.open(store)[0]
    assert vae.sentences > 0 and one.logvar is not None and torch.equal(one.logvar, -one.mu)
    assert encode(tmp_path, monkeypatch)[1].sentences == 0  # more than is wanted


def files(folder: Path) -> dict[str, bytes]:
    """The content of every file of a store, by name."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}
