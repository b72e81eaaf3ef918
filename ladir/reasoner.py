"""The face of the package: a trained LaDiR that answers questions and shows its thoughts."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ladir.config import SampleSettings
from ladir.config.checks import section_errors
from ladir.data.batches import pad_left
from ladir.data.prompts import Frame
from ladir.errors import UnusableError
from ladir.inference.cache import Prefix
from ladir.inference.decode import decode, decode_thoughts, reencode
from ladir.inference.graphs import Graphs
from ladir.inference.guidance import Reward, RewardFn
from ladir.inference.memory import trajectories_that_fit
from ladir.inference.sampler import NOISE, BlockSampler, KeptSteps, StepHook, Think, TrajectoryNoise, passes_per_span
from ladir.layout import Mark
from ladir.models.backbone import DTYPES
from ladir.models.denoiser import Denoiser
from ladir.models.exports import Export, load_export, save_export
from ladir.models.pairing import TrainedOn
from ladir.models.store import settings_of
from ladir.models.vae import ThoughtDecoder, Vae
from ladir.spans import num_spans
from ladir.tokens import decode_text, encode_texts

logger = logging.getLogger(__name__)

#: called after every denoising step with (trajectory, block, step, the block's current text)
TraceHook = Callable[[int, int, int, str], None]


@dataclass
class Trajectory:
    """One line of thought and its answer.

    ``thoughts``: text per block; ``latents`` fp32 [B, L, d] (not standardised); ``num_steps``: forward passes that denoised them;
    ``stopped``: whether the stop head ended it (else the limit on blocks did); ``answer_ids``: token ids of its answers, the
    first of which is ``answer``; ``trace``: text per block and step, if asked; ``steps``: those that were kept
    (:meth:`KeptSteps.of`).
    """

    answer: str
    thoughts: list[str]
    latents: Tensor
    num_steps: int
    stopped: bool
    trace: list[list[str]] = field(default_factory=list)
    answer_ids: list[list[int]] = field(default_factory=list)
    steps: Tensor | None = None


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


def check_questions(questions: Sequence[str]) -> None:
    """ValueError for a single text in place of several; UnusableError for an empty question or one that is no Unicode text."""
    if isinstance(questions, str):
        raise ValueError("questions must be a list of texts, not one text, whose characters would be answered one by one")
    for number, question in enumerate(questions, start=1):
        if not question.strip():
            raise UnusableError(f"question {number} is empty")
        try:
            question.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UnusableError(
                f"question {number} holds half a surrogate pair at character {error.start}, as text does that was not UTF-8; "
                "write it in UTF-8"
            ) from error


def _dtype_name(dtype: str | torch.dtype | None) -> str | None:
    """A dtype as ``backbone.dtype`` names it.  UnusableError for one that the models do not run in."""
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    if name not in (None, "auto", *DTYPES):
        raise UnusableError(f"dtype {name!r} is not supported; valid: auto, {', '.join(DTYPES)} (as text or torch dtype)")
    return name


@dataclass(frozen=True)
class _Ask:
    """What :meth:`Reasoner.generate` was asked for, checked."""

    questions: Sequence[str]
    num_trajectories: int
    settings: SampleSettings
    seed: int
    on_step: TraceHook | None
    thoughts: bool
    reward: Reward | None
    num_answers: int
    random_steps: tuple[Sequence[int], float] | None

    @property
    def total(self) -> int:
        return len(self.questions) * self.num_trajectories


def _from(first: int, on_step: TraceHook) -> TraceHook:
    """The hook for a batch whose trajectories are numbered from ``first`` on."""
    return lambda trajectory, block, step, text: on_step(first + trajectory, block, step, text)


def _in_steps(size: int, step: int) -> int:
    """The largest multiple of ``step`` up to ``size``, one step at least."""
    return max(size // step, 1) * step


class Reasoner:
    """Denoiser, VAE decoder and tokenizer together; made by :meth:`from_pretrained` or from trained parts."""

    def __init__(
        self,
        denoiser: Denoiser,
        thought_decoder: ThoughtDecoder,
        tokenizer: PreTrainedTokenizerBase,
        settings: SampleSettings | None = None,
        encoder: Vae | None = None,
        trained_on: TrainedOn | None = None,
        card: str | None = None,
    ) -> None:
        """``encoder``: the VAE, of which the encoder alone is asked; needed where blocks are encoded again.

        ``trained_on``: what the denoiser's folder says of its training; ``card``: the text of its model card.
        """
        self.card = card
        self.encoder = encoder
        self.trained_on = trained_on or TrainedOn()
        self._longest_told = 0
        self.denoiser = denoiser.eval()
        self.thought_decoder = thought_decoder
        self.tokenizer = tokenizer
        self.settings = settings or SampleSettings()
        self.graphs = Graphs()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device | None = None,
        attention: str = "auto",
        dtype: str | torch.dtype | None = None,
        denoiser: str | Path | None = None,
        base: str | Path | None = None,
    ) -> Reasoner:
        """Load an export: a folder, or an id of the Hub (``owner/name``).

        Raises UnusableError naming what is missing, damaged, of another version or does not belong together, and for a device or
        dtype that cannot be used.

        ``device`` defaults to CUDA where there is one; ``dtype`` (float32, bfloat16, or auto: the faster one) to the one it was
        saved in (float32 where the device only emulates bfloat16).  ``denoiser``: the model folder of another denoiser, trained
        on the same latents, that takes the export's place.  ``base``: the folder of the LM that the export's adapters stand on,
        where it no longer lies where the export says.
        """
        device = usable_device(device)
        loaded = load_export(folder, device, attention, _dtype_name(dtype), denoiser, base)
        settings = settings_of(SampleSettings, loaded.sample, folder)
        parts = loaded.denoiser, loaded.thought_decoder, loaded.tokenizer
        return cls(*parts, settings, loaded.encoder, loaded.trained_on, loaded.card)

    @property
    def device(self) -> torch.device:
        return self.denoiser.latent_mean.device

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
        batch_size: int | Literal["auto"] | None = None,
        num_answers: int = 1,
        random_steps: tuple[Sequence[int], float] | None = None,
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
        fresh noise, the others none, and they are kept (:attr:`Trajectory.steps`).

        ``num_answers`` independent answers are written to every line of thought (:attr:`Trajectory.answer_ids`).

        Raises ValueError for questions that are none (:func:`check_questions`) and for controls that make no sense, all of them
        at once; UnusableError for a question too long for the LM, and where the latents did not stay finite.  Warns of questions
        longer than those of the training.
        """
        settings = self.settings_with(
            num_steps=num_steps,
            initial_noise=initial_noise,
            guidance_scale=guidance_scale,
            diversity_scale=diversity_scale,
            max_blocks=max_blocks,
            sampler=sampler,
            answer_temperature=answer_temperature,
            spacing=spacing,
            spacing_power=spacing_power,
            max_answer_tokens=max_answer_tokens,
            restarts=restarts,
            restart_time=restart_time,
            restart_steps=restart_steps,
            restart_keeps_state=restart_keeps_state,
            reencode=reencode,
            lag=lag,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
        )
        for name, count in (("num_trajectories", num_trajectories), ("num_answers", num_answers)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, not {count}")
        check_questions(questions)
        if not questions:
            return []
        self._check_lengths(questions)
        reward = Reward(reward_fn, reward_scale) if reward_fn is not None else None
        ask = _Ask(questions, num_trajectories, settings, seed, on_step, thoughts, reward, num_answers, random_steps)
        found = self._in_batches(ask, batch_size)
        return [found[i : i + num_trajectories] for i in range(0, len(found), num_trajectories)]

    def _in_batches(self, ask: _Ask, batch_size: int | Literal["auto"] | None) -> list[Trajectory]:
        """All trajectories in their order, ``batch_size`` at a time.

        A trajectory's random numbers are its own, so that the batches change nothing but rounding.
        """
        together = ask.num_trajectories if ask.settings.diversity_scale else 1
        size = _in_steps(self._first_size(ask, batch_size), together)
        found: list[Trajectory] = []
        while len(found) < ask.total:
            rows = range(len(found), min(len(found) + size, ask.total))
            try:
                found += self._answer(ask, rows)
                continue
            except torch.OutOfMemoryError as error:
                if batch_size != "auto" or size <= together:
                    error.add_note("Ask for fewer trajectories at a time: batch_size, or num_trajectories.")
                    raise
            size = _in_steps(size // 2, together)  # here the error no longer holds the batch's tensors
            torch.cuda.empty_cache()
            logger.warning("out of memory: from here on %d trajectories at a time", size)
        return found

    def _first_size(self, ask: _Ask, batch_size: int | Literal["auto"] | None) -> int:
        if batch_size is None:
            return ask.total
        if batch_size == "auto":
            longest = max(map(len, encode_texts(self.tokenizer, ask.questions)))
            return min(trajectories_that_fit(self.denoiser, ask.settings, longest, self.device), ask.total)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f'batch_size must be a number of trajectories, "auto" or None, not {batch_size!r}')
        return batch_size

    def _answer(self, ask: _Ask, rows: range) -> list[Trajectory]:
        """The trajectories numbered ``rows``, in one batch."""
        settings, numbers = ask.settings, [divmod(row, ask.num_trajectories) for row in rows]
        first, last = numbers[0][0], numbers[-1][0]
        noise = TrajectoryNoise(ask.seed, [(ask.questions[question], number) for question, number in numbers])
        owner = torch.tensor([question - first for question, _ in numbers], device=self.device)
        prefix = self._question_prefix(ask.questions[first : last + 1], owner, settings.guidance_scale != 1.0)
        traces: dict[tuple[int, int], list[str]] = {}
        hook = self._trace_hook(traces, _from(rows.start, ask.on_step)) if ask.on_step is not None else None
        settle = self._reencode if settings.reencode else None
        kept = KeptSteps(*ask.random_steps) if ask.random_steps is not None else None
        sampler = BlockSampler(self.denoiser, settings, noise, ask.reward, settle, self.graphs, kept)
        sampled = sampler.think(prefix, owner, hook)
        flat: dict[int, Trajectory] = {}
        for group in sampled:
            flat.update(self._finish(group, ask, noise))
            del group  # and its cache, before the others think on
        if kept is not None:
            for row, trajectory in flat.items():
                trajectory.steps = kept.of(row)
        if ask.thoughts:
            self.read_thoughts([flat[row] for row in range(len(rows))])
        for (row, block), texts in sorted(traces.items()):
            if block < len(flat[row].thoughts):  # a span may reach beyond the last block
                flat[row].trace.append(texts)
        return [flat[row] for row in range(len(rows))]

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
        if problems:
            raise UnusableError("; ".join(problems))
        return settings

    def _reencode(self, z: Tensor) -> Tensor:
        """Standardised latents [R, L, d] of the sentences that ``z`` [R, L, d] reads as."""
        assert self.encoder is not None
        mean, std = self.denoiser.latent_mean, self.denoiser.latent_std
        means = reencode(self.encoder, self.thought_decoder, self._eos, self._plain(z), self.settings.max_thought_tokens)
        return (means - mean) / std

    def _plain(self, z: Tensor) -> Tensor:
        """Standardised latents as the VAE knows them.  UnusableError where they are not finite."""
        latents = z * self.denoiser.latent_std + self.denoiser.latent_mean
        if not latents.isfinite().all():
            raise UnusableError(
                "the thoughts did not stay finite under these controls; lower initial_noise, guidance_scale, diversity_scale or "
                "the reward (or the model's own weights are not finite)"
            )
        return latents

    def _check_lengths(self, questions: Sequence[str]) -> None:
        """Warns of a question longer than the training's; UnusableError where the LM has no positions left to answer it."""
        longest, number = max((len(ids), -n) for n, ids in enumerate(encode_texts(self.tokenizer, questions), start=1))
        limit = getattr(self.denoiser.backbone.base.config.get_text_config(), "max_position_embeddings", None)
        rest = len(self._frame) + self.denoiser.latents_per_block + len((Mark.BOT, Mark.EOT, Mark.SOA))
        if limit is not None and longest + rest >= limit:
            raise UnusableError(
                f"question {-number} has {longest} tokens, too many for an LM of {limit} positions, of which a block and an "
                f"answer take {rest + 1} or more; shorten it"
            )
        seen = self.trained_on.longest_question
        if seen is not None and longest > max(seen, self._longest_told):
            self._longest_told = longest
            logger.warning(
                "question %d has %d tokens; the longest that this model was trained on has %d: the answer may suffer",
                -number,
                longest,
                seen,
            )

    def _question_prefix(self, questions: Sequence[str], owner: Tensor, guided: bool) -> Prefix:
        """The questions' cache, read by a row per trajectory; with guidance the hidden-question branch behind it."""
        frame = self._frame
        # Padded with <eos>, which the embedding has for certain: a padding token may have no row there.
        ids, lengths = pad_left([frame.around(ids) for ids in encode_texts(self.tokenizer, questions)], self._eos)
        inputs, lengths = self.denoiser.backbone.embed(ids.to(self.device)), lengths.to(self.device)
        if guided:
            places = torch.arange(inputs.shape[1], device=self.device)
            hidden = places >= (inputs.shape[1] - lengths + len(frame.before))[:, None]  # <bos> stays, and a chat template
            hidden &= places < inputs.shape[1] - len(frame.behind)
            free = torch.where(hidden[..., None], self.denoiser.mark(Mark.NULL), inputs)
            inputs, lengths = torch.cat([inputs, free]), lengths.repeat(2)
            owner = torch.cat([owner, owner + len(questions)])
        prefix, _ = Prefix.start(self.denoiser.backbone, inputs, lengths, self.denoiser.settings.bidirectional_question)
        return prefix.share(owner)

    def _finish(self, group: Think, ask: _Ask, noise: TrajectoryNoise) -> dict[int, Trajectory]:
        """Answers of trajectories that ended after the same block, their thoughts not read yet."""
        answers = self._answers(group, ask.settings, noise, ask.num_answers)
        latents = self._plain(group.latents)
        blocks, span = latents.shape[1], self.denoiser.settings.span
        return {
            row: Trajectory(
                answer=decode_text(self.tokenizer, answers[0][i]),
                thoughts=[""] * blocks,
                latents=latents[i].cpu(),
                num_steps=passes_per_span(ask.settings, span) * num_spans(blocks, span),
                stopped=group.stopped,
                answer_ids=[answer[i] for answer in answers],
            )
            for i, row in enumerate(group.rows)
        }

    def _answers(self, group: Think, settings: SampleSettings, noise: TrajectoryNoise, count: int) -> list[list[list[int]]]:
        """``count`` answers of every trajectory of a group, as token ids."""
        limit = settings.max_answer_tokens
        uniform = noise.uniform(group.rows, count * limit).to(self.device)
        everyone = torch.arange(len(group.rows), device=self.device)
        hidden = group.prefix.append(self.denoiser.mark(Mark.SOA).expand(len(everyone), 1, -1))[:, 0]
        prefixes = (group.prefix.select(everyone) if later else group.prefix for later in range(count - 1, -1, -1))
        return [
            decode(prefix, hidden, self._eos, limit, settings.answer_temperature, own)
            for prefix, own in zip(prefixes, uniform.split(limit, dim=1), strict=True)
        ]

    def answering(self) -> list[nn.Module]:
        """The models that take part in answering under the settings; reading thoughts afterwards is not part of it."""
        if not self.settings.reencode or self.encoder is None:
            return [self.denoiser]
        return [self.denoiser, self.thought_decoder.backbone, self.thought_decoder.from_latent, self.encoder]

    @property
    def _frame(self) -> Frame:
        """What stands around a question: as in training, where that is known."""
        saved = self.trained_on.frame
        return Frame.of(self.tokenizer, chat=False) if saved is None else Frame.saved(saved)

    @property
    def _eos(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @torch.no_grad()
    def decode_latents(self, z: Tensor) -> list[str]:
        """Text of each block of latents ``z`` [K, L, d] (not standardised), greedily."""
        return decode_thoughts(self.thought_decoder, self.tokenizer, z, self.settings.max_thought_tokens)

    def read_thoughts(self, trajectories: Sequence[Trajectory]) -> None:
        """Fill in the ``thoughts`` of trajectories that were generated without, ``thoughts_per_batch`` blocks at a time."""
        places = [(entry, block) for entry in trajectories for block in range(len(entry.latents))]
        size = self.settings.thoughts_per_batch
        for part in (places[first : first + size] for first in range(0, len(places), size)):
            texts = self.decode_latents(torch.stack([entry.latents[block] for entry, block in part]).to(self.device))
            for (entry, block), text in zip(part, texts, strict=True):
                entry.thoughts[block] = text

    def _trace_hook(self, traces: dict[tuple[int, int], list[str]], on_step: TraceHook) -> StepHook:
        """Decodes the current estimate of every trajectory's block after each step."""

        def hook(rows: list[int], block: int, step: int, x0: Tensor) -> None:
            if step == NOISE:
                return
            texts = self.decode_latents(x0 * self.denoiser.latent_std + self.denoiser.latent_mean)
            for row, text in zip(rows, texts, strict=True):
                traces.setdefault((row, block), []).append(text)
                on_step(row, block, step, text)

        return hook

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the export folder: the denoiser's LM in Hugging Face's layout, our heads, ``vae/``, the tokenizer.

        A model that is there already is replaced; UnusableError where ``folder`` holds anything else.
        """
        parts = self.denoiser, self.thought_decoder, self.tokenizer
        save_export(Export(*parts, asdict(self.settings), self.encoder, self.trained_on, self.card), folder)

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
