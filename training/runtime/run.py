"""The run folder: one folder per run, shared by its phases, from which everything continues."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
import torch
import yaml

from ladir.config import Config, EvaluateSettings, TrainSettings
from ladir.config.checks import CHANGEABLE
from ladir.config.idle import idle_settings
from training.runtime.alarm import Alarm, give_way, stop_agreed
from training.runtime.alone import GiveWay, alone, unbroken
from training.runtime.chain import LANES
from training.runtime.distributed import World
from training.runtime.files import digests_kept, publish_folder, read_json, try_lock, write_json, write_text
from training.runtime.inputs import input_digests
from training.runtime.preemption import BrokenOff, StopRequest
from training.runtime.profiling import MemorySnapshot
from training.runtime.status import Status
from training.runtime.topology import section_of, train_settings

logger = logging.getLogger(__name__)

T = TypeVar("T")

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "datasets", "safetensors", "numpy")
INTERRUPTED = "INTERRUPTED"
LOCK_SECONDS = 120.0
"""How long a job that has died may still hold the run folder (a network file system notices late)."""

IRRELEVANT = (
    "run.name", "run.folder", "run.exclusive", "run.allow_changes",
    "telemetry.", "deepspeed.", "evaluate.", "sample.", "countdown.", "gym.", "plan.", "demo.",
    "data.test", "data.validation", "data.on_bad_record", "data.store", "data.processes", "data.stream_hub",
    "backbone.activation_checkpointing", "backbone.attention",
    "backbone.compile", "backbone.logits_parts", "latents.pack_tokens", "latents.batch_size", "latents.records_per_part",
    "latents.report_sentences", "latents.probe_steps", "rollout.enabled", "rl.enabled", "rl.questions_per_batch",
    "rl.reward_seconds", "verifier.enabled", "verifier.questions_per_batch",
)  # fmt: skip
IRRELEVANT_IN_TRAIN = (
    "micro_batch", "pack_tokens", "log_every", "validate_every", "validation_batches", "checkpoint_every", "keep_checkpoints",
    "snapshot_every", "checkpoint_minutes", "keep_finished", "checkpoint_in_background", "deepspeed",
)  # fmt: skip
SECTIONS = {
    "vae": ("vae",),
    "latents": ("vae", "latents"),
    "denoiser": ("vae", "latents", "denoiser"),
    "rollout": ("vae", "latents", "denoiser", "rollout"),
    "rl": ("vae", "latents", "denoiser", "rollout", "rl"),
    "ar-rl": ("ar", "rl"),
    "verifier": ("vae", "latents", "denoiser", "rollout", "sample", "verifier"),
}
"""Sections of settings a phase depends on besides run, backbone and data; other phases depend on ``ar``."""
_JUDGED = ("evaluate.task", "evaluate.check_seconds", "evaluate.check_memory_mb", "evaluate.tolerance")
RELEVANT = {"rl": ("sample.", *_JUDGED), "ar-rl": ("evaluate.ar_temperature", "evaluate.ar_max_tokens", *_JUDGED)}
"""Settings that would be irrelevant, but for a phase that answers questions and judges the answers."""

DENOISING = (
    "sample.num_steps", "sample.lag", "sample.spacing", "sample.spacing_power", "sample.initial_noise", "sample.guidance_scale",
    "sample.guidance_interval", "sample.guidance_rescale",
)  # fmt: skip
"""What stage 2 has of the sampling; a setting of its own in ``rollout`` takes its place."""

BEFORE = {"vae.bos": False, "vae.separator": ""}
"""Settings that came later and whose default is not what was done before."""


class RunConflict(RuntimeError):
    """The run folder holds the work of other settings, data or models."""


@dataclass(frozen=True)
class Outcome:
    """How a training ended."""

    status: str
    """``finished``, ``interrupted`` (a checkpoint waits; start the same command again), ``unfinished`` (of a snapshot)."""
    steps: int
    samples: int
    seconds: float
    """Training time over all restarts; start-up, validation and checkpoints not counted."""
    metrics: dict[str, float]
    """The last logged training metrics and the last validation."""

    @property
    def finished(self) -> bool:
        """Whether the phase's model is written."""
        return self.status == "finished"


class RunFolder:
    """Names of everything in ``runs/<name>/``."""

    def __init__(self, config: Config) -> None:
        self.path = Path(config.run.folder) / config.run.name
        self.metrics = self.path / "metrics.jsonl"
        self.latents = self.path / "latents"
        #: says of which records the latents of every split are
        self.sources = self.latents / "sources.json"
        self.export = self.path / "export"
        #: token stores, which runs may share
        self.tokens = Path(config.data.store) if config.data.store else self.path / "tokens"
        #: trajectories that a verifier learns from
        self.judged = self.path / "judged"
        self.interrupted = self.path / INTERRUPTED
        #: says which records' own answers their checker accepted
        self.gold = self.path / "gold.json"

    def lock(self, lane: str = "") -> Path:
        """Who holds this file locked works in the folder; ``lane``: beside others."""
        return self.path / (f".lock-{lane}" if lane else ".lock")

    def status(self, lane: str = "") -> Path:
        """What the job that holds the lock of the same lane is doing."""
        return self.path / (f"status-{lane}.json" if lane else "status.json")

    def checkpoints(self, phase: str) -> Path:
        """Folder of a phase's checkpoints."""
        return self.path / "checkpoints" / phase

    def model(self, phase: str) -> Path:
        """Folder of a phase's finished model."""
        return self.path / "models" / phase

    @staticmethod
    def snapshot(phase: str, step: int | None) -> str:
        """What a phase's model of a training step, and its outcome so far, are filed under; ``step`` None: the finished one."""
        return phase if step is None else f"{phase}-{step}"

    def tensorboard(self, phase: str) -> Path:
        """Folder of the TensorBoard events of a phase (of an evaluation: with its label)."""
        return self.path / "tensorboard" / phase

    def profile(self, phase: str) -> Path:
        """Folder of the profiler's traces of a phase."""
        return self.path / "profile" / phase

    def memory_snapshot(self, phase: str, rank: int) -> Path:
        """What lay in a rank's GPU memory when it ran out."""
        return self.path / "memory" / phase / f"rank-{rank:05d}.pickle"

    def config(self, phase: str) -> Path:
        """The settings a phase was started with."""
        return self.path / f"config-{phase}.yaml"

    def changes(self, phase: str) -> Path:
        """Settings that changed while a phase was trained, a line for each start with others."""
        return self.path / f"changes-{phase}.jsonl"

    def inputs(self, phase: str) -> Path:
        """What a phase was started on, the export is made of: hashes of data and models, by name."""
        return self.path / f"inputs-{phase}.json"

    def outcome_file(self, phase: str) -> Path:
        """Its presence says that a phase is finished."""
        return self.path / f"outcome-{phase}.json"

    def outcome(self, phase: str) -> Outcome | None:
        """How a phase finished; None where it has not."""
        file = self.outcome_file(phase)
        return Outcome(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


class Run:
    """One phase of a run, opened: its folder, settings, processes and stop signal."""

    def __init__(self, config: Config, phase: str, world: World) -> None:
        self.config, self.phase, self.world = config, phase, world
        self.folder = RunFolder(config)
        self.stop = StopRequest(config.deepspeed.stop_signal)
        self.interrupted = False
        """Set where the phase was asked to stop, and waits to be continued."""
        self.given: Sequence[str] = ()
        """The settings of the command line, as they were written, --config first."""
        self._locks: list[TextIO] = []
        self._changes: dict[str, list[Any]] = {}
        self.status = Status(phase, world.size)

    def under(self, config: Config) -> Run:
        """The same run, folder, processes and stop signal, under other settings (of one of its data sets)."""
        other = copy.copy(self)
        other.config = config
        return other

    @property
    def settings(self) -> TrainSettings:
        """The training settings of this phase."""
        return train_settings(self.config, self.phase)

    @property
    def outcome(self) -> Outcome | None:
        """Set where this phase is already finished, on all ranks alike."""
        found = self.world.broadcast(dataclasses.asdict(done) if (done := self.folder.outcome(self.phase)) else None)
        return Outcome(**found) if found else None

    def occupy(self) -> None:
        """Make the folder, keep other jobs out of it, and take over its status (rank 0; the others wait)."""
        self._agree(self._occupy)

    def prepare(self) -> None:
        """Refuse a conflict, record settings and environment (rank 0; the others wait)."""
        self._agree(self._prepare)

    def _agree(self, work: Callable[[GiveWay], str]) -> None:
        """Raise RunConflict, on all ranks, where ``work`` tells rank 0 of a problem; BrokenOff where a stop was asked for."""
        if problem := unbroken(self.world, self.stop, lambda give_way: self._writing(work, give_way)):
            raise RunConflict(problem)

    def _writing(self, work: Callable[[GiveWay], str], give_way: GiveWay) -> str:
        try:
            return work(give_way)
        except OSError as error:
            return f"{self.folder.path} cannot be written: {error}; choose another run.folder"

    def _occupy(self, give_way: GiveWay) -> str:
        self.folder.path.mkdir(parents=True, exist_ok=True)
        if not (problem := self._occupied(give_way)):
            seconds = self.config.telemetry.status_every_seconds
            self.status = Status(self.phase, self.world.size, self.folder.status(self._locked_lane()), seconds)
        return problem

    def _prepare(self, give_way: GiveWay) -> str:
        self.status.say("looking at what it is begun on: data and models are hashed")
        inputs, problem = self._read_inputs(give_way)
        problem = problem or self._conflict(inputs)
        if not problem:
            self._record(inputs)
            for remark in idle_settings(self.config):
                logger.warning("%s", remark)
        return problem

    def _record(self, inputs: dict[str, str]) -> None:
        """Keep with what the phase is begun."""
        settings = yaml.safe_dump(dataclasses.asdict(self.config), sort_keys=False, allow_unicode=True)
        write_text(self.folder.config(self.phase), settings)
        if inputs and not (self._has_work() and self.folder.inputs(self.phase).is_file()):
            write_json(self.folder.inputs(self.phase), inputs)
        if self.phase != "evaluate" or not (self.folder.path / "config.yaml").is_file():
            write_text(self.folder.path / "config.yaml", settings)  # an evaluation's controls are not the run's
        write_json(self.folder.path / "environment.json", environment())
        self._note_changes()
        self.folder.interrupted.unlink(missing_ok=True)

    def _read_inputs(self, give_way: GiveWay) -> tuple[dict[str, str], str]:
        """Hashes of what the phase is begun on, now that no other job writes it; or what cannot be read."""
        try:
            return input_digests(self.config, self.phase, self.folder, give_way), ""
        except (OSError, ValueError) as error:
            return {}, f"what phase '{self.phase}' is begun on cannot be read: {error}"

    def _occupied(self, give_way: GiveWay) -> str:
        """Keep other jobs out, which would write the same files; or who keeps us out for longer than a job takes to die."""
        owner = f"phase {self.phase}, process {os.getpid()} on {platform.node()}"
        if job := os.environ.get("SLURM_JOB_ID"):
            owner = f"{owner}, job {job}"
        end, waiting = time.monotonic() + LOCK_SECONDS, False
        for lane in dict.fromkeys([self._locked_lane(), *self._asked_lanes()]):
            file = self.folder.lock(lane)
            while (lock := try_lock(file, owner)) is None:
                other = file.read_text(encoding="utf-8")
                if time.monotonic() > end:
                    return f"{self.folder.path} is in use by {other}: wait for it or end it, then start the same command again"
                if not waiting:
                    logger.info("%s is in use by %s: waiting at most %.0f seconds", self.folder.path, other, LOCK_SECONDS)
                waiting = True
                give_way()
                time.sleep(0.5)
            self._locks.append(lock)
        return ""

    def _locked_lane(self) -> str:
        return "" if self.config.run.exclusive else self._lane()

    def _lane(self) -> str:
        """What else may go on in the folder beside this job is in another lane.

        The AR baseline and its stage 3 read and write nothing that LaDiR's phases do, but metrics.jsonl, which several may write;
        an evaluation that has a label writes under it, and that of a lane its answers alone.
        """
        if self.phase in (self.config.ar.phase, "ar-rl"):
            return self.phase
        if self.phase != "evaluate":
            return ""
        label, lane = evaluation_label(self.config.evaluate), self.config.evaluate.lane
        return f"evaluate{label}.{lane}" if lane in LANES else f"evaluate{label}" if label else ""

    @property
    def lane(self) -> str:
        """What the job's own files are named after: no other job that is at work in the folder has the same."""
        return self._lane() or self.phase

    def _asked_lanes(self) -> list[str]:
        """Which answers this job adds or takes: no two jobs do so with the same."""
        if self.phase != "evaluate":
            return []
        label, lane = evaluation_label(self.config.evaluate), self.config.evaluate.lane
        return [f"evaluate{label}.{name}" for name in ([lane] if lane in LANES else LANES)]

    def release(self) -> None:
        """Let other jobs into the run folder."""
        for lock in self._locks:
            lock.close()
        self._locks = []

    def _conflict(self, inputs: dict[str, str]) -> str:
        """What differs from the settings and ``inputs`` this phase was started with, where it left work behind."""
        file = self.folder.config(self.phase)
        if not file.is_file() or not self._has_work():
            return ""
        old = relevant_settings(yaml.safe_load(file.read_text(encoding="utf-8")), self.phase)
        new = relevant_settings(dataclasses.asdict(self.config), self.phase)
        # A setting that came later: its default is what was done before, but for a few.
        defaults = relevant_settings(dataclasses.asdict(Config()), self.phase) | BEFORE
        old |= {key: defaults[key] for key in (new.keys() & defaults.keys()) - old.keys()}
        changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        if not self.folder.outcome_file(self.phase).is_file():
            allowed = {*self.config.run.allow_changes, f"{section_of(self.phase)}.train.skip_samples"}
            self._changes = {key: [old.get(key), new.get(key)] for key in changed if key in allowed}
            changed = [key for key in changed if key not in allowed]
        lines = [f"  {key}: {old.get(key)!r} -> {new.get(key)!r}" for key in changed]
        lines += [f"  {name}: is not what it was (its content has changed)" for name in self._changed_inputs(inputs)]
        if not lines:
            return ""
        listed = "\n".join(lines)
        return (
            f"phase '{self.phase}' of {self.folder.path} was started with other settings or inputs:\n{listed}\n"
            f"Give them back{self._allowing(changed)}, choose another run.name, or delete {self.folder.checkpoints(self.phase)}, "
            f"{self.folder.outcome_file(self.phase)} and its snapshots' (outcome-{self.phase}-*.json) to train this phase anew"
        )

    def _allowing(self, changed: Sequence[str]) -> str:
        """The remedy where what changed may change on request."""
        may = [key for key in changed if CHANGEABLE.fullmatch(key)] if not self.folder.outcome_file(self.phase).is_file() else []
        return f", say run.allow_changes=[{','.join(may)}]" if may else ""

    def _note_changes(self) -> None:
        """Keep what a training goes on with that it was not begun with."""
        if not self._changes:
            return
        latest = self.folder.checkpoints(self.phase) / "latest"
        after = latest.read_text(encoding="utf-8").strip() if latest.is_file() else "the start"
        with self.folder.changes(self.phase).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"after": after, "changed": self._changes}) + "\n")
        listed = ", ".join(f"{key}: {old!r} -> {new!r}" for key, (old, new) in self._changes.items())
        logger.warning("phase %s goes on after %s with other settings: %s", self.phase, after, listed)

    def _has_work(self) -> bool:
        """Whether the phase left something behind that another start would use."""
        snapshots = self.folder.path.glob(f"outcome-{self.phase}-*.json")
        return self.folder.outcome_file(self.phase).is_file() or self.folder.checkpoints(self.phase).is_dir() or any(snapshots)

    def _changed_inputs(self, inputs: dict[str, str]) -> list[str]:
        """Names of what the phase was started on and has another content now; what is gone is not missed by a finished phase."""
        before = read_json(self.folder.inputs(self.phase))
        return sorted(name for name in before.keys() & inputs.keys() if before[name] != inputs[name])

    def interrupt(self) -> None:
        """Leave the mark that the phase waits, and the one by which a batch script knows that its job should be queued again."""
        self.interrupted = True
        self.status.stopped()
        if self.world.is_main:
            shared = [self.folder.interrupted] if self._locks else []  # else it is another job's
            own = os.environ.get("INTERRUPTED_MARK")
            for mark in (*shared, *([Path(own)] if own else [])):
                write_text(mark, f"{self.phase}\n")

    def stop_agreed(self) -> bool:
        """Whether any rank was asked to stop, answered alike on all of them (collective)."""
        return stop_agreed(self.world, self.stop)

    def alarm(self) -> Alarm:
        """Whether any rank was asked to stop, for ranks that go their own ways (collective)."""
        return Alarm(self.world, self.stop)

    def give_way(self) -> None:
        """Raise BrokenOff, on all ranks, where any was asked to stop (collective)."""
        give_way(self.world, self.stop)

    def alone(self, work: Callable[[GiveWay], T]) -> T | None:
        """What ``work`` returns on rank 0, on every rank; None where a stop broke it off."""
        return alone(self.world, self.stop, work)

    def finish(self, outcome: Outcome, snapshot: int | None = None) -> None:
        """Record that the phase is finished, or that the model of a step is kept."""
        if self.world.is_main:
            name = self.folder.snapshot(self.phase, snapshot)
            write_json(self.folder.outcome_file(name), dataclasses.asdict(outcome))
        self.world.barrier()

    @contextmanager
    def new_folder(self, target: Path) -> Iterator[Path]:
        """An empty folder to fill (rank 0 only), which becomes ``target`` when the block ends without an error."""
        aside = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        publish_folder(aside, target)


def evaluation_label(settings: EvaluateSettings) -> str:
    """What tells the results of one evaluation of a run from another's: its name, and the snapshot it asks."""
    return "".join(f"-{part}" for part in (settings.name, settings.snapshot) if part)


@contextmanager
def open_run(config: Config, phase: str, world: World) -> Iterator[Run]:
    """``with open_run(config, "vae", world) as run:`` prepares the run folder and listens to the stop signals.

    Random numbers are seeded on all ranks alike, so that what is built inside starts from the same weights each time.
    Raises :class:`RunConflict` when the folder cannot be used.  What a stop breaks off, here or inside, is marked as interrupted.
    """
    run = Run(config, phase, world)
    try:
        with run.stop, digests_kept():
            run.occupy()
            with run.status:  # from here on it speaks of this job
                run.prepare()
                seed_everything(config.run.seed, phase)
                file, events = run.folder.memory_snapshot(run.lane, world.rank), config.telemetry.memory_events
                with MemorySnapshot(events, file, world.device).explained():
                    yield run
    except BrokenOff:
        run.interrupt()
        raise
    finally:
        run.release()


def seed_everything(seed: int, phase: str) -> None:
    """Seed Python, numpy and torch from the run's seed and the phase's name."""
    mixed = int.from_bytes(hashlib.blake2b(f"{seed}:{phase}".encode(), digest_size=4).digest(), "little")
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def relevant_settings(config: dict[str, Any], phase: str) -> dict[str, Any]:
    """The flattened settings on which the result of a phase depends."""
    sections = {"run", "backbone", "data", *SECTIONS.get(phase, ("ar",))}
    also = RELEVANT.get(phase, ())
    everything = dict(flatten(config))
    flat = {key: value for key, value in everything.items() if key.split(".")[0] in sections or key.startswith(also)}
    own = SECTIONS.get(phase, ("ar",))[-1]
    ignored = tuple(name for name in IRRELEVANT if name.removesuffix(".") not in sections)
    relevant = {
        key: value
        for key, value in flat.items()
        if (key.startswith(also) or not key.startswith(ignored))
        and not (key.startswith(f"{own}.train.") and key.rsplit(".", 1)[1] in IRRELEVANT_IN_TRAIN)
        and not (".train." in key and not key.startswith(f"{own}."))
    }
    if everything.get(f"{own}.train.best"):  # which validations choose the model
        choosing = (f"{own}.train.validate_every", f"{own}.train.validation_batches", "data.validation")
        relevant |= {key: everything[key] for key in choosing if key in everything}
    if phase == "denoiser":  # which of its two forms
        relevant["stage"] = everything.get("stage")
    return relevant if phase != "rollout" else _as_denoised(relevant, everything)


def _as_denoised(relevant: dict[str, Any], everything: dict[str, Any]) -> dict[str, Any]:
    """Stage 2's settings with how its own blocks are denoised, wherever that is set."""
    how = {key: everything[key] for key in DENOISING if key in everything}
    own = {key: f"rollout.{key.partition('.')[2]}" for key in how}
    how |= {key: everything[name] for key, name in own.items() if everything.get(name) is not None}
    return {key: value for key, value in relevant.items() if key not in own.values()} | how


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their full names."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def environment() -> dict[str, Any]:
    """Versions, code commit and machine, for the record."""
    versions = {name: metadata.version(name) for name in PACKAGES if _installed(name)}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"command": sys.argv, "python": platform.python_version(), "packages": versions, "device": device,
            "host": platform.node(), **_code_version()}  # fmt: skip


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _code_version() -> dict[str, Any]:
    """Commit of the checkout this file lies in, and whether it has local changes; None outside git."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            answer = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "modified": None if changes is None else bool(changes)}
