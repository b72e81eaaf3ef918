"""The face of the package: a trained LaDiR that answers questions and shows its thoughts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi

from ladir.config import SampleSettings
from ladir.config.checks import section_errors
from ladir.errors import UnusableError
from ladir.evaluation.choosing import CHOICES, Candidate, choose
from ladir.inference.asking import Ask, BatchSize, Extras, RandomSteps, TraceHook, Watch
from ladir.inference.decode import Between
from ladir.inference.generation import TrajectoryGenerator
from ladir.inference.guidance import Reward, RewardFn
from ladir.inference.trajectory import Trajectory, check_questions, plain_answer
from ladir.models.backbone import DTYPES
from ladir.models.exports import Export, load_export, save_export
from ladir.models.store import settings_of

#: what :meth:`Reasoner.generate` takes under the settings' names
CONTROLS = frozenset(entry.name for entry in fields(SampleSettings)) - {"max_thought_tokens", "thoughts_per_batch"}


def usable_device(device: str | torch.device | None) -> torch.device:
    """A device by its name; not given: CUDA where there is one.  UnusableError for one that this machine does not have."""
    try:
        usable = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=usable)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # PyTorch without CUDA asserts
        raise UnusableError(
            f"device {str(device)!r} cannot be used; valid: cpu, and cuda or cuda:N for each GPU that PyTorch sees "
            f"(here {torch.cuda.device_count()})"
        ) from error
    return usable


def _dtype_name(dtype: str | torch.dtype | None) -> str | None:
    """A dtype as ``backbone.dtype`` names it.  UnusableError for one that the models do not run in."""
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    if name not in (None, "auto", *DTYPES):
        raise UnusableError(f"dtype {name!r} is not supported; valid: auto, {', '.join(DTYPES)} (as text or torch dtype)")
    return name


class Reasoner(TrajectoryGenerator):
    """Denoiser, VAE decoder and tokenizer together; made by :meth:`from_pretrained` or from trained parts."""

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device | None = None,
        attention: str = "auto",
        dtype: str | torch.dtype | None = None,
        denoiser: str | Path | None = None,
        base: str | Path | None = None,
        verifier: str | Path | None = None,
    ) -> Reasoner:
        """Load an export: a folder, or an id of the Hub (``owner/name``).

        Raises UnusableError naming what is missing, damaged, of another version or does not belong together, and for a device or
        dtype that cannot be used.

        ``device`` defaults to CUDA where there is one; ``dtype`` (float32, bfloat16, or auto: the faster one) to the one it was
        saved in (float32 where the device only emulates bfloat16).  ``denoiser``: the model folder of another denoiser, trained
        on the same latents, that takes the export's place.  ``base``: the folder of the LM that the export's adapters stand on,
        where it no longer lies where the export says.  ``verifier``: the folder of a verifier of that denoiser; not given: the
        export's, where it has one.
        """
        device = usable_device(device)
        loaded = load_export(folder, device, attention, _dtype_name(dtype), denoiser, base, verifier)
        settings = settings_of(SampleSettings, loaded.sample, folder)
        parts = (loaded.encoder, loaded.trained_on, loaded.card, loaded.verifier)
        return cls(loaded.denoiser, loaded.thought_decoder, loaded.tokenizer, settings, *parts)

    @torch.no_grad()
    def generate(
        self,
        questions: Sequence[str],
        num_trajectories: int = 1,
        num_steps: int | None = None,
        initial_noise: float | None = None,
        guidance_scale: float | None = None,
        diversity_scale: float | None = None,
        max_blocks: int | None = None,
        sampler: str | None = None,
        answer_temperature: float | None = None,
        seed: int = 0,
        on_step: TraceHook | None = None,
        thoughts: bool = True,
        spacing: str | None = None,
        spacing_power: float | None = None,
        max_answer_tokens: int | None = None,
        restarts: int | None = None,
        restart_time: float | None = None,
        restart_steps: int | None = None,
        restart_keeps_state: bool | None = None,
        reencode: bool | None = None,
        lag: int | None = None,
        guidance_interval: Sequence[float] | None = None,
        guidance_rescale: float | None = None,
        reward_fn: RewardFn | None = None,
        reward_scale: float = 1.0,
        batch_size: BatchSize = None,
        verifier_scale: float | None = None,
        renoise_time: float | None = None,
        renoise_steps: int | None = None,
        choose: str | None = None,
        canonical: Callable[[str], str] = plain_answer,
        num_answers: int = 1,
        random_steps: RandomSteps | None = None,
        token_head_weight: float | None = None,
        lm_weight: float | None = None,
        thought_temperature: float | None = None,
        between: Between | None = None,
    ) -> list[list[Trajectory]]:
        """Answer ``questions``, each with ``num_trajectories`` independent trajectories.

        ``batch_size``: trajectories that are generated together; not given: all of them; "auto": as many as memory holds, for
        any number of questions (half as many where it runs out all the same; their steps are then told to ``on_step`` again).
        With diversity guidance the trajectories of a question, which repel one another, stay together.

        Controls not given come from the export's settings (:class:`~ladir.config.SampleSettings` says what they mean).  The same
        seed gives a trajectory the same random numbers whatever it is batched with.  ``thoughts`` False leaves the blocks
        undecoded (:meth:`read_thoughts` decodes them later).

        ``reward_fn(latents, t)`` gives a scalar per trajectory [R] for the estimate of a block's clean latents [R, L, d] (as
        :attr:`Trajectory.latents`); every step moves along its gradient, weighted by ``reward_scale * t`` as the diversity
        guidance is.  A row is a trajectory of any question: the function must treat them one by one.

        ``random_steps``: numbers of denoising steps and their randomness, for those who learn from what a step did: these add
        fresh noise, the others none, and they are kept (:attr:`Trajectory.steps`).  ``num_answers`` independent answers are
        written to every line of thought (:attr:`Trajectory.answer_ids`).

        ``choose`` leaves one trajectory of each question (:meth:`choose`, with ``canonical``).  ``between`` is called after every
        denoising step, every token and every batch of thoughts that is read: what it raises ends everything.
        Raises ValueError for questions that are none (:func:`check_questions`) and for controls that make no sense, all of them
        at once; UnusableError for a question too long for the LM, and where the latents did not stay finite.  Warns of questions
        longer than those of the training.
        """
        given = locals()
        settings = self.settings_with(**{name: value for name, value in given.items() if name in CONTROLS})
        for name, count in (("num_trajectories", num_trajectories), ("num_answers", num_answers)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, not {count}")
        check_questions(questions)
        self.check_choice(choose)
        asks = [Ask(question, num_trajectories, seed) for question in questions]
        reward = None if reward_fn is None else Reward(reward_fn, reward_scale)
        extras = Extras(num_answers=num_answers, random_steps=random_steps)
        found = self.answer(asks, settings, Watch(on_step, between_steps=between), thoughts, reward, extras, batch_size)
        if choose is None or not found:
            return found
        return self.choose(asks, found, choose, settings, canonical, batch_size, between)

    def check_choice(self, rule: str | None) -> None:
        """ValueError for a rule that is none, UnusableError for one that this model has no verifier for."""
        if rule is not None and rule not in CHOICES:
            raise ValueError(f"choose={rule!r}: must be one of {', '.join(CHOICES)}")
        if rule in ("best", "weighted") and self.verifier is None:
            raise UnusableError(
                f"choose={rule}: this model came without a verifier; train one with training/train_verifier.py and export again, "
                "or choose by majority"
            )

    @torch.no_grad()
    def choose(
        self,
        asks: Sequence[Ask],
        found: Sequence[Sequence[Trajectory]],
        rule: str,
        settings: SampleSettings | None = None,
        canonical: Callable[[str], str] = plain_answer,
        batch_size: BatchSize = None,
        between: Between | None = None,
    ) -> list[list[Trajectory]]:
        """The one trajectory of each question that ``rule`` chooses (:func:`ladir.evaluation.choosing.choose`).

        ``canonical``: the normal form of an answer: those with the same are the same answer.  ``stable`` thinks again first, and
        calls ``between`` after every step.
        """
        self.check_choice(rule)
        if rule == "stable":
            self.measure_drift(asks, found, settings, batch_size, between)
        chosen = []
        for group in found:
            candidates = [Candidate(canonical(entry.answer), entry.score, entry.drift) for entry in group]
            chosen.append([group[choose(candidates, rule)]])
        return chosen

    def settings_with(self, **given: Any) -> SampleSettings:
        """The export's settings with what the caller gave (None: not given); ValueError names a control that makes no sense."""
        settings = replace(self.settings, **{name: value for name, value in given.items() if value is not None})
        problems = section_errors("sample", settings)
        if settings.guidance_scale != 1 and self.denoiser.settings.condition_dropout == 0:
            problems.append(
                f"guidance_scale={settings.guidance_scale}: this model never saw a hidden question (it was trained with "
                "denoiser.condition_dropout=0), so that nothing can be guided; use 1"
            )
        if settings.reencode and self.encoder is None:
            problems.append("reencode: this model came without the VAE's encoder; export it with sample.reencode=true")
        if settings.token_head_weight and not self.denoiser.reads_tokens:
            problems.append(
                f"token_head_weight={settings.token_head_weight}: this model was trained without a token head "
                "(denoiser.token_weight) or without a carried state (denoiser.carry), which the head reads; use 0"
            )
        if given.get("token_head_weight") and not self.reads_blocks(settings):
            problems.append(
                "token_head_weight: the head has a say where finished blocks are read as text, which they are with reencode=True "
                "or by a model trained with denoiser.context=text; set that, or use 0"
            )
        if given.get("thought_temperature") and not self.reads_blocks(settings):
            problems.append(
                "thought_temperature: finished blocks are read as text with reencode=True or by a model trained with "
                "denoiser.context=text; set that, or use 0"
            )
        if settings.lm_weight and not self.denoiser.settings.lm_weight:
            problems.append(
                f"lm_weight={settings.lm_weight}: the LM of this model was not trained on sentences (denoiser.lm_weight); use 0"
            )
        if settings.verifier_scale and self.denoiser.settings.context == "text":
            problems.append(
                f"verifier_scale={settings.verifier_scale}: this model reads thoughts as text (denoiser.context=text), and the "
                "verifier has no gradient through that; use 0"
            )
        if settings.verifier_scale and self.verifier is None:
            problems.append(
                f"verifier_scale={settings.verifier_scale}: this model came without a verifier; train one with "
                "training/train_verifier.py and export again, or use 0"
            )
        if problems:
            raise UnusableError("; ".join(problems))
        return settings

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the export folder: the denoiser's LM in Hugging Face's layout, our heads, ``vae/``, the tokenizer.

        A model that is there already is replaced; UnusableError where ``folder`` holds anything else.
        """
        sample = asdict(self.settings)
        parts = (self.encoder, self.trained_on, self.card, self.verifier)
        save_export(Export(self.denoiser, self.thought_decoder, self.tokenizer, sample, *parts), folder)

    def push_to_hub(
        self, repo_id: str, private: bool | None = None, token: str | None = None, commit_message: str = "LaDiR export"
    ) -> str:
        """Upload what :meth:`save_pretrained` writes to the Hub, where ``repo_id`` (``owner/name``) is made if it is not there.

        ``private`` and ``token`` as in :mod:`huggingface_hub`.  Returns the commit's address.
        """
        hub = HfApi(token=token)
        hub.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as aside:
            folder = Path(aside) / "export"
            self.save_pretrained(folder)
            return hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message).commit_url
