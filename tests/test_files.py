"""Disks that are full: the error says so, whatever was being written."""

from __future__ import annotations

import errno
import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ladir.files import replace_folder, sync_file
from tests.toy_phase import toy_config
from training.runtime.distributed import World
from training.runtime.files import lacks_room
from training.runtime.job import job
from training.runtime.run import Run
from training.runtime.telemetry import Telemetry, withdraw


def test_a_full_disk_is_told_from_other_errors(tmp_path: Path) -> None:
    assert lacks_room(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert not lacks_room(PermissionError(errno.EACCES, "denied")) and not lacks_room(ValueError("28"))
    assert lacks_room(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"))
    with pytest.raises(SafetensorError) as absent:
        save_file({"x": torch.zeros(4)}, tmp_path / "no" / "folder")
    assert not lacks_room(absent.value)


def test_a_job_on_a_full_disk_ends_in_one_line_that_says_what_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = World(0, 1, 0, torch.device("cpu"))
    monkeypatch.setattr("training.runtime.job.start", lambda settings: alone)
    full, denied = OSError(errno.ENOSPC, "No space left on device", "a.jsonl"), PermissionError(errno.EACCES, "denied", "b.jsonl")
    for error in (full, denied):
        with pytest.raises(SystemExit) as end, job([f"run.folder={tmp_path}"], "", lambda config: "export"):
            raise error
        assert end.value.code == 2
    assert f"'a.jsonl': make room in {tmp_path}, then start the same command again" in caplog.text
    assert "'b.jsonl': give back the permission, then start the same command again" in caplog.text


def test_the_training_goes_on_where_its_record_has_no_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(toy_config(tmp_path), "ar", World(0, 1, 0, torch.device("cpu")))
    run.folder.path.mkdir(parents=True)
    with Telemetry(run, 0) as telemetry:
        telemetry.record("train", 1, {"loss": 1.0})
        kept = run.folder.metrics.rename(tmp_path / "kept")
        run.folder.metrics.symlink_to("/dev/full")
        telemetry.record("train", 2, {"loss": 1.0})
    assert json.loads(kept.read_text())["step"] == 1
    assert "make room; the record of step 2 is lost" in caplog.text


def test_charts_end_where_there_is_no_room_and_the_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config = toy_config(tmp_path)
    config.telemetry.loggers = ["tensorboard"]
    run = Run(config, "ar", World(0, 1, 0, torch.device("cpu")))
    run.occupy()
    run.prepare()
    with Telemetry(run, 0) as telemetry:
        assert telemetry.shows_samples
        monkeypatch.setattr("torch.utils.tensorboard.writer.FileWriter.add_event", full)
        for step in (1, 2):
            telemetry.record("train", step, {"loss": 1.0})
            telemetry.text("sample", "a thought", step)
            telemetry.histogram("latents", torch.randn(8), step)
        assert not telemetry.shows_samples
    assert len(run.folder.metrics.read_text().splitlines()) == 2
    assert caplog.text.count("TensorBoard cannot be written") == 1


def test_the_validation_of_the_step_that_was_saved_before_it_is_withdrawn(tmp_path: Path) -> None:
    rows = [{"phase": "ar", "kind": kind, "step": step} for step in (1, 2, 3) for kind in ("train", "validation")]
    for validated, left in ((True, 4), (False, 3)):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        withdraw(tmp_path / "metrics.jsonl", "ar", 2, validated)
        kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert kept == rows[:left]


def test_a_folder_takes_the_place_of_one_that_cannot_be_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where another process still reads what was in it, on NFS."""
    monkeypatch.setattr("ladir.files.shutil.rmtree", lambda *_, **__: None)
    for content in ("one", "two", "three"):
        (tmp_path / "aside").mkdir()
        (tmp_path / "aside" / "file").write_text(content)
        replace_folder(tmp_path / "aside", tmp_path / "final")
        assert (tmp_path / "final" / "file").read_text() == content


@pytest.mark.parametrize(("number", "told"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_folders_are_brought_to_disk_where_that_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, told: bool
) -> None:
    def refuse(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("ladir.files.os.fsync", refuse)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError):
        sync_file(tmp_path / "file")
    with pytest.raises(OSError) if told else nullcontext():
        sync_file(tmp_path)
