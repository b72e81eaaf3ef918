"""Disks that are full: the error says so, whatever was being written."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tests.toy_phase import toy_config
from training.runtime.distributed import World
from training.runtime.files import lacks_room
from training.runtime.job import job
from training.runtime.run import Run
from training.runtime.telemetry import Telemetry


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
    with pytest.raises(SystemExit) as end, job([f"run.folder={tmp_path}"], "", lambda config: "export"):
        raise OSError(errno.ENOSPC, "No space left on device", "answers.jsonl")
    assert end.value.code == 2
    assert f"'answers.jsonl': make room in {tmp_path}, then start the same command again" in caplog.text


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
