"""Check a GPU machine in one command of less than ten minutes: tests, attention kernels, MFU, memory of the large shapes.

    python3 training/gpu_check.py --wheels wheels        (make gpu-check WHEELS=wheels)

Needs Python with a recent torch and transformers.  What is missing or older than in a folder of wheels (`make wheels` fills one,
on a machine with network and the same Python version) is taken from there and put beside the results, never into the machine's
own packages.
Every part is a process of its own; a part that fails or takes too long does not stop the others.  ``--dry`` goes through all
of it on a CPU with a tiny model.  Ends with status 0 where every part succeeded.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from packaging.version import parse  # comes with transformers

ROOT = Path(__file__).resolve().parents[1]

#: modules that the parts import, beside those that these bring along
NEEDED = (
    "torch",
    "transformers",
    "deepspeed",
    "hjson",
    "pydantic",
    "peft",
    "omegaconf",
    "datasets",
    "pyarrow",
    "safetensors",
    "matplotlib",
    "tensorboard",
    "rich",
    "tqdm",
    "psutil",
    "yaml",
    "pytest",
    "pytest_timeout",
    "hypothesis",
)

_TOTAL_SECONDS = 580.0
_LEAST_SECONDS = 15.0
_TEST_WORKERS = 4


@dataclass(frozen=True)
class Part:
    """A process, and the seconds it may take."""

    name: str
    seconds: float
    arguments: tuple[str, ...]


def parts(dry: bool) -> tuple[list[list[Part]], list[Part]]:
    """Rows of parts that run beside one another, then parts that have the machine to themselves: their times are compared.

    The tests and the offloaded steps wait for the same compiler, for a minute.
    """
    own = str(Path(__file__).resolve())
    tests = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--durations", "10")
    if dry:
        every = "attention,mfu,denoiser-lora,vae-lora,denoiser-full-offload,vae-full-offload"
        collect = Part("tests", 120, (*tests, "--collect-only", "tests/test_attention.py"))
        return [[collect]], [Part("all", 300, (own, "--dry", "--part", every))]

    def measured(name: str, seconds: float) -> Part:
        return Part(name, seconds, (own, "--part", name))

    workers = ("-n", str(_TEST_WORKERS)) if importlib.util.find_spec("xdist") else ()
    files = [str(file) for file in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in file.read_text(encoding="utf-8")]
    offloaded = [measured("denoiser-full-offload", 180), measured("vae-full-offload", 150)]
    then = [measured("attention", 120), measured("mfu", 210), measured("denoiser-lora", 120), measured("vae-lora", 120)]
    return [[Part("tests", 240, (*tests, *workers, *files))], offloaded], then


def complete(wheels: Path, site: Path) -> list[str]:
    """Install the wheels whose package is missing here, or older, into ``site``; what is still missing afterwards."""
    lacking = [str(wheel) for wheel in sorted(wheels.glob("*.whl")) if not _is_installed(*wheel.name.split("-")[:2])]
    if lacking:
        site.mkdir(parents=True, exist_ok=True)
        install = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            "--upgrade",
            "--target",
            str(site),
        ]
        subprocess.run([*install, *lacking], check=True)
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()
    return _missing()


def _missing() -> list[str]:
    return [module for module in NEEDED if importlib.util.find_spec(module) is None]


def _is_installed(distribution: str, version: str) -> bool:
    """Whether this version of a distribution, or a newer one, is at hand."""
    try:
        return parse(importlib.metadata.version(distribution)) >= parse(version)
    except importlib.metadata.PackageNotFoundError:
        return False


def run_part(name: str, dry: bool) -> dict[str, Any]:
    """One measurement in this process."""
    import torch  # the machine may lack what the parts need: it is completed before any of them starts

    from training.benchmarks import large, steps, training_rows
    from training.benchmarks.setup import Bench
    from training.benchmarks.sizes import SIZES
    from training.runtime.distributed import start

    device = torch.device("cpu" if dry else "cuda")
    bench = Bench(SIZES["smoke" if dry else "1b"], device)
    if name == "attention":
        rows = training_rows.attention(bench)
        return {
            row.key: {"title": row.title, "ratio": row.ratio, "seconds": row.ours, "dense_seconds": row.obvious, **row.details}
            for row in rows
        }
    if name == "mfu":
        measured = [
            *steps.training_steps(bench),
            *steps.compiled_steps(bench, "aot_eager" if dry else "inductor"),
            steps.encoding(bench),
            steps.denoising_step(bench),
        ]
        return {
            step.name: {"mfu": step.mfu, "of_own_shapes": step.of_own_shapes, "seconds": step.seconds, "peak": step.peak}
            for step in measured
        }
    size = SIZES["smoke" if dry else "8b"]
    return large.measure(large.CASES[name], size, start(size.config(device.type).deepspeed))


def _run_parts(names: Sequence[str], dry: bool, folder: Path) -> None:
    """What a child process does: measure, and leave a file for each part."""
    for name in names:
        (folder / f"{name}.json").write_text(json.dumps(run_part(name, dry), indent=1), encoding="utf-8")


def check(dry: bool, folder: Path, site: Path) -> bool:
    """Run all parts; their results lie in ``folder``.  Returns whether all succeeded."""
    start = time.monotonic()
    for earlier in folder.glob("*.json"):
        earlier.unlink()
    paths = [str(ROOT), *([str(site)] if site.is_dir() else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _TEST_WORKERS)))

    def in_turn(row: Sequence[Part]) -> bool:
        succeeded = True
        for part in row:
            begin = time.monotonic()
            left = _TOTAL_SECONDS - (begin - start)
            status = _run(part, min(part.seconds, left), folder, environment) if left > _LEAST_SECONDS else "no time left"
            succeeded &= status == "done"
            _say(f"{part.name}: {status} ({time.monotonic() - begin:.0f} s)")
        return succeeded

    beside, then = parts(dry)
    with ThreadPoolExecutor() as rows:
        found = list(rows.map(in_turn, beside))
    found.append(in_turn(then))
    for result in sorted(folder.glob("*.json")):
        _say(f"{result.stem}: {json.dumps(json.loads(result.read_text(encoding='utf-8')))}")
    return all(found)


def _run(part: Part, seconds: float, folder: Path, environment: dict[str, str]) -> str:
    """How a part's process ended; its output is in ``<name>.log``."""
    log = folder / f"{part.name}.log"
    folder_option = [] if part.name == "tests" else ["--out", str(folder)]
    with log.open("w", encoding="utf-8") as output:
        command = [sys.executable, *part.arguments, *folder_option]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return f"took longer than {seconds:.0f} s"
    nothing_collected = part.name == "tests" and done.returncode == 5
    if done.returncode == 0 or nothing_collected:
        return "done"
    last = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()][-1:]
    return f"FAILED with status {done.returncode}, see {log}: {' '.join(last)}"


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, default=Path("wheels"), help="folder of wheels for what is missing (wheels)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="where results and logs go (runs/gpu-check)")
    parser.add_argument("--dry", action="store_true", help="go through all of it on a CPU with a tiny model")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    folder = arguments.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # ranks take what they see
    if arguments.part:
        sys.path.insert(0, str(ROOT))
        from training.runtime.distributed import run_as_program  # what it imports is there in a child process

        run_as_program(partial(_run_parts, arguments.part.split(","), arguments.dry, folder))
    site = folder / "site"
    missing = complete(arguments.wheels, site)
    if missing:
        _say(
            f"gpu-check: not installed here, and no wheel of it in {arguments.wheels}/: {', '.join(missing)}. On a machine with "
            "network and the same Python version `make wheels` fills that folder; or pip install -r requirements-dev.txt"
        )
        return 2
    import torch  # only now is it known to be there

    if not arguments.dry and not torch.cuda.is_available():
        _say("gpu-check: PyTorch sees no CUDA device here; --dry (make gpu-check DRY=1) goes through it on a CPU")
        return 2
    return 0 if check(arguments.dry, folder, site) else 1


if __name__ == "__main__":
    sys.exit(main())
