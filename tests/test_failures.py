"""How programs fail: a package that is not installed, and what torchrun's summary says of a process that failed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ladir.config.loader import load_config
from ladir.errors import UnusableError
from ladir.installation import missing_package
from ladir.tokens import build_word_tokenizer
from tests.tiny import tiny_lm
from training.phases import ar, latents, vae
from training.runtime.distributed import World
from training.runtime.failures import tell_launcher
from training.runtime.run import open_run

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "training").glob("*.py"))}
ENTRIES = {name: text for name, text in SOURCES.items() if 'if __name__ == "__main__"' in text}

FAILING = """
import sys
from ladir.errors import UnusableError
from training.runtime.distributed import run_as_program

def main():
    try:
        raise UnusableError("the weights of rank {rank} are torn; copy them again")
    except UnusableError as error:
        sys.stderr.write(f"{{error}}\\n")
        raise SystemExit(2) from error

run_as_program(main)
"""


def without_packages(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python that has nothing but its standard library."""
    command = [sys.executable, "-S", "-E", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)


def test_every_entry_point_says_in_one_line_that_a_package_is_not_installed() -> None:
    """One is run; the others begin alike.  gpu_check.py brings what it needs."""
    for command in (["training/train_vae.py", "--help"], ["slurm/settings.py", "x"], ["-m", "ladir", "question", "--model", "x"]):
        done = without_packages(*command)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
        assert "is not installed for" in done.stderr and "run make venv" in done.stderr and "requirements.txt" in done.stderr
    guard = "from __future__ import annotations\n\nif not __package__:  # started as a program\n    import preflight"
    assert len(ENTRIES) > 6
    assert [name for name, text in ENTRIES.items() if guard not in text] == ["gpu_check.py"]


def test_segments_of_gpu_memory_grow_unless_the_user_says_otherwise() -> None:
    """Every entry point begins with preflight, which must not bring PyTorch: that reads the setting when it is imported."""
    begins = "import os, sys; sys.path.insert(0, 'training'); import preflight"
    told = f"{begins}; print(os.environ.get('PYTORCH_ALLOC_CONF'), 'torch' in sys.modules)"
    for given, expected in (({}, "expandable_segments:True"), ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "None")):
        bare = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
        environment = bare | given
        done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
        assert done.stdout.split() == [expected, "False"]


def test_a_missing_module_of_our_own_or_of_a_package_that_is_there_is_a_fault() -> None:
    for name in ("ladir.nothing", "training", "torch.nothing", None):
        assert missing_package(ModuleNotFoundError("no module", name=name)) is None
    assert missing_package(ImportError("broken", name="nothing_of_this_name")) is None
    line = missing_package(ModuleNotFoundError("no module", name="nothing_of_this_name.part"))
    assert line is not None and line.startswith("the package nothing_of_this_name is not installed")


def test_what_only_follows_from_another_failure_is_dated_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tell_launcher("no launcher asks")
    monkeypatch.setattr("time.time", lambda: 100.7)
    said = []
    for follows in (False, True):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
        tell_launcher("torn", follows)
        said.append(json.loads((tmp_path / "error.json").read_text()))
    assert said == [{"message": "torn", "timestamp": 100}, {"message": "torn", "timestamp": 101}]
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "no" / "folder"))
    tell_launcher("cannot be written")


@pytest.mark.distributed
def test_our_line_is_the_last_that_torchrun_shows(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING.format(rank=0))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(tmp_path / "failing.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, cwd=ROOT)
    assert done.returncode == 1
    *_, line, border = done.stderr.rstrip().splitlines()
    assert set(border) == {"="}
    assert line == "  traceback : the weights of rank 0 are torn; copy them again"


@pytest.mark.parametrize("phase", ["vae", "latents", "ar"])
@pytest.mark.parametrize("path", ["nowhere.jsonl", ".", "table.csv"])
def test_data_that_is_not_there_is_told_before_a_model_is_loaded(
    phase: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((vae, "new_vae"), (latents, "load_vae"), (ar, "build_backbone")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("loaded a model"))
    for module in (vae, ar):
        monkeypatch.setattr(module, "check_lm", lambda *_, **__: None)  # by its config: another test's
    build_word_tokenizer(["a"]).save_pretrained(str(tmp_path / "tokenizer"))
    tiny_lm(dtype=torch.float32).save_pretrained(str(tmp_path / "lm"))
    files = [f"data.{name}={tmp_path / path}" for name in ("train", "validation")]
    lm = [f"backbone.name_or_path={tmp_path / 'lm'}", f"backbone.tokenizer={tmp_path / 'tokenizer'}"]
    config = load_config(None, [f"run.folder={tmp_path}", *lm, *files])
    world = World(0, 1, 0, torch.device("cpu"))
    builders = {"vae": vae.vae_phase, "ar": ar.ar_phase}
    faults = pytest.raises((FileNotFoundError, UnusableError), match=r"no such file|name a file|unknown kind")
    with open_run(config, phase, world) as run, faults:
        latents.encode(run) if phase == "latents" else builders[phase](config, world)
