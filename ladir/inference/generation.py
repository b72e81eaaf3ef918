"""How questions are answered: prefixes, blocks, answers, in batches; what is seen of it, and how far thoughts drift."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ladir.config import SampleSettings
from ladir.data.batches import pad_left
from ladir.data.prompts import Frame
from ladir.errors import UnusableError
from ladir.inference.asking import Ask, BatchSize, Extras, Rows, TraceHook, Watch, in_batches
from ladir.inference.cache import Prefix
from ladir.inference.decode import (
    Between,
    LmReading,
    Steer,
    TokenHeadReading,
    TokenHook,
    between_tokens,
    decode,
    decode_thoughts,
    encode_read,
    steered_by,
    thought_ids,
    thought_limit,
)
from ladir.inference.graphs import Graphs
from ladir.inference.guidance import BlockValue, Reward
from ladir.inference.memory import trajectories_that_fit
from ladir.inference.sampler import (
    NOISE,
    BlockHook,
    BlockSampler,
    FinishedTrajectories,
    KeptSteps,
    Reader,
    StepHook,
    TrajectoryNoise,
    passes_per_span,
    sentence_inputs,
)
from ladir.inference.trajectory import Trajectory, check_questions
from ladir.layout import Mark
from ladir.models.denoiser import Denoiser
from ladir.models.pairing import TrainedOn
from ladir.models.positions import check_room, position_limit
from ladir.models.vae import ThoughtDecoder, Vae
from ladir.models.verifier import Verifier, drift_features
from ladir.spans import num_spans, with_room
from ladir.tokens import decode_text, encode_texts

logger = logging.getLogger(__name__)


class BlockReader:
    """Reads finished blocks as text, which stays in ``read``, by row and block; and encodes it again (``sample.reencode``)."""

    own = True

    def __init__(
        self,
        generator: TrajectoryGenerator,
        settings: SampleSettings,
        noise: TrajectoryNoise,
        between: Between | None = None,
    ) -> None:
        """``between`` is called after every token."""
        self.generator, self.settings, self.encodes, self._between = generator, settings, settings.reencode, between
        self._noise = noise
        self.read: dict[tuple[int, int], list[int]] = {}

    def __call__(self, rows: list[int], blocks: list[int], z: Tensor, state: Tensor, prefix: Prefix) -> Tensor:
        """``z`` [R, E, L, d], or standardised latents of the sentences it reads as; ``state`` [R, E, L, H]: of the last step."""
        # What the LM expects depends on the sentences before: then one block after another.
        together = [[place] for place in range(len(blocks))] if self.settings.lm_weight else [[*range(len(blocks))]]
        for places in together:
            numbers = [blocks[place] for place in places]
            steer = steered_by(*self._beside(rows, numbers[0], state[:, places].flatten(0, 1), prefix))
            texts = self._texts(rows, z[:, places], steer)
            self.read.update(zip(itertools.product(rows, numbers), texts, strict=True))
            del steer  # with the cache that the LM wrote along from: the next one is made
        return self._encoded([self.read[place] for place in itertools.product(rows, blocks)], z) if self.encodes else z

    def _texts(self, rows: list[int], z: Tensor, steer: Steer | None) -> list[list[int]]:
        """Of blocks ``z`` [R, E, L, d], row by row."""
        of, temperature = self.generator, self.settings.thought_temperature
        limit, plain = of.settings.max_thought_tokens, of.plain(z.flatten(0, 1))
        uniform = None
        if temperature:
            uniform = self._noise.uniform_of_thoughts(rows, (z.shape[1], limit)).flatten(0, 1).to(z.device)
        return thought_ids(of.thought_decoder, of.eos, plain, limit, steer, self._between, temperature, uniform)

    def _beside(self, rows: list[int], block: int, state: Tensor, prefix: Prefix) -> Iterator[Steer]:
        """Who has a say beside the decoder."""
        of, denoiser = self.generator, self.generator.denoiser
        if self.settings.lm_weight:
            before = self._before(rows, block, prefix)
            yield LmReading(before, denoiser.mark(Mark.BOT), self.settings.lm_weight).steer
        if self.settings.token_head_weight and (head := denoiser.token_head) is not None:
            yield TokenHeadReading(head, head.features(state), self.settings.token_head_weight).steer(of.eos)

    def _before(self, rows: list[int], block: int, prefix: Prefix) -> Prefix:
        """A copy of what stands before ``block`` of the rows, with the question: ``prefix``, and what was read of its span."""
        denoiser = self.generator.denoiser
        copied = prefix.select(torch.arange(len(rows), device=prefix.valid.device))
        for earlier in range(block // denoiser.settings.span * denoiser.settings.span, block):
            inputs, lengths = sentence_inputs(denoiser, [self.read[row, earlier] for row in rows])
            copied.append_text(inputs, lengths)
        return copied

    def _encoded(self, texts: list[list[int]], z: Tensor) -> Tensor:
        """Standardised latents of the sentences that the blocks ``z`` [R, E, L, d] read as."""
        denoiser, encoder = self.generator.denoiser, self.generator.encoder
        assert encoder is not None
        again = (encode_read(encoder, texts) - denoiser.latent_mean) / denoiser.latent_std
        return again.unflatten(0, z.shape[:2])


class TrajectoryGenerator:
    """Denoiser, VAE decoder and tokenizer together, and how they answer; :class:`ladir.reasoner.Reasoner` is its face."""

    def __init__(
        self,
        denoiser: Denoiser,
        thought_decoder: ThoughtDecoder,
        tokenizer: PreTrainedTokenizerBase,
        settings: SampleSettings | None = None,
        encoder: Vae | None = None,
        trained_on: TrainedOn | None = None,
        card: str | None = None,
        verifier: Verifier | None = None,
    ) -> None:
        """``encoder``: the VAE, of which the encoder alone is asked; needed where blocks are encoded again.

        ``trained_on``: what the denoiser's folder says of its training; ``card``: the text of its model card; ``verifier``:
        foretells which answers will be right.
        """
        self.card = card
        self.encoder, self.verifier = encoder, verifier
        self.trained_on = trained_on or TrainedOn()
        self._longest_told, self._cut_told = 0, 0
        self.denoiser = denoiser.eval()
        self.thought_decoder = thought_decoder
        self.tokenizer = tokenizer
        self.settings = settings or SampleSettings()
        self.graphs = Graphs()

    @property
    def device(self) -> torch.device:
        return self.denoiser.latent_mean.device

    @torch.no_grad()
    def answer(
        self,
        asks: Sequence[Ask],
        settings: SampleSettings,
        watch: Watch | None = None,
        thoughts: bool = True,
        reward: Reward | None = None,
        extras: Extras | None = None,
        batch_size: BatchSize = None,
        scores: bool = True,
    ) -> list[list[Trajectory]]:
        """What :meth:`generate` does, with complete ``settings`` and questions that differ in number of trajectories and seed.

        ``watch`` sees them form; ``scores`` False leaves out the verifier's scores (:meth:`score` gives them later).
        """
        if not asks:
            return []
        self._check_lengths([ask.question for ask in asks], settings)
        rows, watch, extras = Rows(asks, together=settings.diversity_scale != 0), watch or Watch(), extras or Extras()

        def one_batch(part: range) -> list[Trajectory]:
            return self._one_batch(rows, part, settings, watch.of_batch(part.start), thoughts, reward, extras)

        found = iter(in_batches(rows, self._size_of_batch(asks, settings, batch_size), batch_size == "auto", one_batch))
        groups = [list(itertools.islice(found, ask.num_trajectories)) for ask in asks]
        self._tell_of_long_sentences([trajectory for group in groups for trajectory in group])
        if scores:
            self.score(asks, groups, settings, batch_size, watch.between_steps)
        return groups

    def _size_of_batch(self, asks: Sequence[Ask], settings: SampleSettings, batch_size: BatchSize) -> int | None:
        """Trajectories at a time; None: all of them.  ValueError for what is no number of them."""
        if batch_size == "auto":
            longest = max(map(len, encode_texts(self.tokenizer, [ask.question for ask in asks])))
            decoder = self.thought_decoder if self.reads_blocks(settings) else None
            return trajectories_that_fit(self.denoiser, settings, longest, self.device, decoder)
        if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
            raise ValueError(f'batch_size must be a number of trajectories, "auto" or None, not {batch_size!r}')
        return batch_size

    def _one_batch(
        self,
        rows: Rows,
        part: range,
        settings: SampleSettings,
        watch: Watch,
        thoughts: bool,
        reward: Reward | None,
        extras: Extras,
    ) -> list[Trajectory]:
        """The trajectories ``part`` of all rows, together."""
        noise, owner = rows.noise(part), rows.owner(part).to(self.device)
        prefix = self._question_prefix(rows.questions(part), owner, settings.guidance_scale != 1.0)
        traces, texts = dict[tuple[int, int], list[str]](), dict[tuple[int, int], str]()
        value = BlockValue(self.denoiser, self.verifier) if self.verifier is not None else None
        reader = self._reader(settings, noise, watch.between_steps)
        kept = KeptSteps(*extras.random_steps) if extras.random_steps is not None else None
        sampler = BlockSampler(self.denoiser, settings, noise, reward, reader, self.graphs, kept, value)
        on_block = self._block_hook(texts, watch.on_block, reader) if watch.on_block is not None else None
        flat: dict[int, Trajectory] = {}
        for group in sampler.sample(prefix, owner, self._step_hook(traces, watch), on_block):
            flat.update(self._finish(group, settings, noise, extras, watch))
            del group  # and its cache, before the others think on
        if kept is not None:
            for row, trajectory in flat.items():
                trajectory.steps = kept.of(row)
        if reader is not None and reader.own:
            for row, trajectory in flat.items():
                trajectory.thought_ids = [reader.read[row, block] for block in range(len(trajectory.latents))]
        if thoughts and on_block is None:
            self.read_thoughts([flat[row] for row in range(len(part))], watch.between_steps)
        for (row, block), steps in sorted(traces.items()):
            if block < len(flat[row].thoughts):  # a span may reach beyond the last block
                flat[row].trace.append(steps)
        for (row, block), text in texts.items():
            flat[row].thoughts[block] = text
        return [flat[row] for row in range(len(part))]

    def _tell_of_long_sentences(self, found: Sequence[Trajectory]) -> None:
        """Warns where blocks were read up to the limit, of more than it warned of before: what follows took them for whole."""
        read = [ids for trajectory in found for ids in trajectory.thought_ids or []]
        if not read:
            return
        most = thought_limit(self.thought_decoder, self.denoiser.latents_per_block, self.settings.max_thought_tokens)
        long = sum(len(ids) >= most for ids in read)
        if long > self._cut_told:
            self._cut_told = long
            logger.warning(
                "%d of %d blocks that were read as text reached the limit of %d tokens: longer ones were cut, and what follows "
                "took them for whole; set a higher sample.max_thought_tokens, unless the model never ends its sentences",
                long,
                len(read),
                most,
            )

    def _reader(self, settings: SampleSettings, noise: TrajectoryNoise, between: Between | None) -> Reader | None:
        """What reads finished blocks of one batch, where they are read; ``between`` is called after every token."""
        return BlockReader(self, settings, noise, between) if self.reads_blocks(settings) else None

    def reads_blocks(self, settings: SampleSettings) -> bool:
        """Whether finished blocks are read as text before the next ones."""
        return settings.reencode or self.denoiser.settings.context == "text"

    @torch.no_grad()
    def score(
        self,
        asks: Sequence[Ask],
        found: Sequence[Sequence[Trajectory]],
        settings: SampleSettings,
        batch_size: BatchSize = None,
        between_steps: Between | None = None,
    ) -> None:
        """Fill in the ``score`` of finished trajectories, where there is a verifier; one that goes by drifts measures them first,
        as in its training (``between_steps``: as there)."""
        if self.verifier is None:
            return
        flat = [trajectory for group in found for trajectory in group]
        logits = torch.tensor([trajectory.logit for trajectory in flat])
        if (renoise := self.verifier.renoise) is not None:
            self.measure_drift(asks, found, replace(settings, **asdict(renoise)), batch_size, between_steps)
            features = torch.stack([drift_features(trajectory.drifts or []) for trajectory in flat])
            logits = logits + self.verifier.drift_logit(features.to(self.device)).cpu()
        for trajectory, score in zip(flat, logits.sigmoid().tolist(), strict=True):
            trajectory.score = score

    @torch.no_grad()
    def measure_drift(
        self,
        asks: Sequence[Ask],
        found: Sequence[Sequence[Trajectory]],
        settings: SampleSettings | None = None,
        batch_size: BatchSize = None,
        between_steps: Between | None = None,
    ) -> None:
        """Fill in the ``drifts`` of finished trajectories: how far they move when they are noised and denoised again.

        ``between_steps`` is called after every denoising step, and may raise.
        """
        plain = replace(settings or self.settings, sampler="ode", diversity_scale=0.0, verifier_scale=0.0)
        rows, flat = Rows(asks, together=False), [trajectory for group in found for trajectory in group]
        on_step = self._step_hook({}, Watch(between_steps=between_steps))

        def one_batch(part: range) -> list[list[float]]:
            return self._drifts(rows, part, plain, flat[part.start : part.stop], on_step)

        size = self._size_of_batch(asks, plain, batch_size)
        for trajectory, drifts in zip(flat, in_batches(rows, size, batch_size == "auto", one_batch), strict=True):
            trajectory.drifts = drifts

    def _drifts(
        self,
        rows: Rows,
        part: range,
        settings: SampleSettings,
        finished: Sequence[Trajectory],
        on_step: StepHook | None,
    ) -> list[list[float]]:
        """The drifts of ``finished`` trajectories, which are ``part`` of all rows; those of one length go together."""
        owner, guided = rows.owner(part).to(self.device), settings.guidance_scale != 1.0
        prefix = self._question_prefix(rows.questions(part), owner, guided)
        sampler = BlockSampler(self.denoiser, settings, rows.noise(part).apart("drift"), graphs=self.graphs)
        drifts = dict[int, list[float]]()
        for length in sorted({len(trajectory.latents) for trajectory in finished}):
            alike = [row for row, trajectory in enumerate(finished) if len(trajectory.latents) == length]
            latents = torch.stack([finished[row].latents for row in alike]).to(self.device)
            z, kept = (latents - self.denoiser.latent_mean) / self.denoiser.latent_std, torch.tensor(alike, device=self.device)
            behind = prefix.select(torch.cat([kept, kept + len(finished)]) if guided else kept)
            sentences = [self._sentences(finished, alike, block) for block in range(length)]
            moved = sampler.drift(behind, alike, owner[kept], z, sentences, on_step)
            drifts.update(zip(alike, moved.tolist(), strict=True))
        return [drifts[row] for row in range(len(finished))]

    def _sentences(self, finished: Sequence[Trajectory], rows: Sequence[int], block: int) -> list[list[int]] | None:
        """What a block of those ``rows`` was read as, where finished blocks stand as text."""
        if self.denoiser.settings.context == "latents":
            return None
        return [_read_of(finished[row])[block] for row in rows]

    def plain(self, z: Tensor) -> Tensor:
        """Standardised latents as the VAE knows them.  UnusableError where they are not finite."""
        latents = z * self.denoiser.latent_std + self.denoiser.latent_mean
        if not latents.isfinite().all():
            raise UnusableError(
                "the thoughts did not stay finite under these controls; lower initial_noise, guidance_scale, diversity_scale or "
                "the reward (or the model's own weights are not finite)"
            )
        return latents

    def check_question(self, question: str, settings: SampleSettings | None = None) -> None:
        """ValueError for a question that cannot be asked: :func:`check_questions`, or too long for the LM."""
        check_questions([question])
        self._check_lengths([question], settings or self.settings)

    def _check_lengths(self, questions: Sequence[str], settings: SampleSettings) -> None:
        """Warns of a question longer than the training's; UnusableError where the LM has no positions left to answer it, or might
        come to the end of its table of positions."""
        longest, number = max((len(ids), -n) for n, ids in enumerate(encode_texts(self.tokenizer, questions), start=1))
        lm = self.denoiser.backbone.base.config
        limit = position_limit(lm)
        rest = len(self._frame) + self.denoiser.latents_per_block + len((Mark.BOT, Mark.EOT, Mark.SOA))
        if limit is not None and longest + rest >= limit:
            raise UnusableError(
                f"question {-number} has {longest} tokens, too many for an LM of {limit} positions, of which a block and an "
                f"answer take {rest + 1} or more; shorten it"
            )
        block = self.denoiser.longest_block(settings.max_thought_tokens)
        room = with_room(settings.max_blocks, self.denoiser.settings.span) * block
        most = longest + len(self._frame) + room + 1 + settings.max_answer_tokens
        limits = f"max_blocks ({settings.max_blocks}) or max_answer_tokens ({settings.max_answer_tokens})"
        check_room(
            lm, most, f"question {-number} ({longest} tokens) with thoughts and answer", f"set a lower {limits}, or shorten it"
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
        ids, lengths = pad_left([frame.around(ids) for ids in encode_texts(self.tokenizer, questions)], self.eos)
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

    def _finish(
        self, group: FinishedTrajectories, settings: SampleSettings, noise: TrajectoryNoise, extras: Extras, watch: Watch
    ) -> dict[int, Trajectory]:
        """Answers of trajectories that ended after the same block, their thoughts not read yet."""
        hidden = group.prefix.append(self.denoiser.mark(Mark.SOA).expand(len(group.rows), 1, -1))[:, 0]
        logits = None if self.verifier is None else self.verifier.logit(hidden).tolist()
        seen = torch.cat([group.states, hidden[:, None]], dim=1).cpu() if extras.states else None
        answers = self._answers(group, hidden, settings, noise, extras.num_answers, watch)
        latents = self.plain(group.latents)
        blocks, span = latents.shape[1], self.denoiser.settings.span
        return {
            row: Trajectory(
                answer=decode_text(self.tokenizer, answers[0][i]),
                thoughts=[""] * blocks,
                latents=latents[i].cpu(),
                num_steps=passes_per_span(settings, span) * num_spans(blocks, span),
                stopped=group.stopped,
                answer_ids=[answer[i] for answer in answers],
                logit=None if logits is None else logits[i],
                states=None if seen is None else seen[i],
            )
            for i, row in enumerate(group.rows)
        }

    def _answers(
        self,
        group: FinishedTrajectories,
        hidden: Tensor,
        settings: SampleSettings,
        noise: TrajectoryNoise,
        count: int,
        watch: Watch,
    ) -> list[list[list[int]]]:
        """``count`` answers of every trajectory of a group, as token ids; ``hidden`` [n, H]: its states at <SOA>.

        ``watch`` is told of the first ones.
        """
        first, others = self._token_hook(group.rows, watch), between_tokens(watch.between_steps)
        limit = settings.max_answer_tokens
        uniform = noise.uniform(group.rows, count * limit).to(self.device)
        everyone = torch.arange(len(group.rows), device=self.device)
        prefixes = (group.prefix.select(everyone) if later else group.prefix for later in range(count - 1, -1, -1))
        return [
            decode(prefix, hidden, self.eos, limit, settings.answer_temperature, own, on_tokens=others if later else first)
            for later, (prefix, own) in enumerate(zip(prefixes, uniform.split(limit, dim=1), strict=True))
        ]

    @staticmethod
    def _token_hook(rows: Sequence[int], watch: Watch) -> TokenHook | None:
        """What is done after each token of the answers of trajectories ``rows``; None where nothing is."""
        if watch.on_answer is None and watch.between_steps is None:
            return None
        answers: list[list[int]] = [[] for _ in rows]

        def hook(going: list[int], tokens: list[int]) -> None:
            if watch.between_steps is not None:
                watch.between_steps()
            for place, token in zip(going, tokens, strict=True):
                answers[place].append(token)
                if watch.on_answer is not None:
                    watch.on_answer(rows[place], answers[place])

        return hook

    def answering(self) -> list[nn.Module]:
        """The models that take part in answering under the settings; reading thoughts afterwards is not part of it."""
        if not self.reads_blocks(self.settings):
            return [self.denoiser]
        encoder = [self.encoder] if self.settings.reencode and self.encoder is not None else []
        return [self.denoiser, self.thought_decoder.backbone, self.thought_decoder.from_latent, *encoder]

    @property
    def _frame(self) -> Frame:
        """What stands around a question: as in training, where that is known."""
        saved = self.trained_on.frame
        return Frame.of(self.tokenizer, chat=False) if saved is None else Frame.saved(saved)

    @property
    def eos(self) -> int:
        """The id of <eos>."""
        return int(self.tokenizer.eos_token_id)

    @torch.no_grad()
    def decode_latents(self, z: Tensor, between: Between | None = None) -> list[str]:
        """Text of each block of latents ``z`` [K, L, d] (not standardised), greedily; ``between`` is called after every token."""
        return decode_thoughts(self.thought_decoder, self.tokenizer, z, self.settings.max_thought_tokens, between)

    def read_thoughts(self, trajectories: Sequence[Trajectory], between: Between | None = None) -> None:
        """Fill in the ``thoughts`` of trajectories that were generated without, ``thoughts_per_batch`` blocks at a time.

        ``between`` is called before each batch and after every token, and may raise.

        Blocks that were read as they were finished (``reencode``, or text as the context) are not read again: what was read is
        what their chain went on from.
        """
        places = []
        for entry in trajectories:
            if entry.thought_ids is None:
                places += [(entry, block) for block in range(len(entry.latents))]
            else:
                entry.thoughts = [decode_text(self.tokenizer, ids) for ids in entry.thought_ids]
        size = self.settings.thoughts_per_batch
        for part in (places[first : first + size] for first in range(0, len(places), size)):
            if between is not None:
                between()
            z = torch.stack([entry.latents[block] for entry, block in part]).to(self.device)
            texts = self.decode_latents(z, between)
            for (entry, block), text in zip(part, texts, strict=True):
                entry.thoughts[block] = text

    def _step_hook(self, traces: dict[tuple[int, int], list[str]], watch: Watch) -> StepHook | None:
        """What is done after each step; None where nothing is."""
        hook, between = self._trace_hook(traces, watch.on_step) if watch.on_step is not None else None, watch.between_steps
        if between is None:
            return hook

        def checked(rows: list[int], block: int, step: int, x0: Tensor) -> None:
            between()
            if hook is not None:
                hook(rows, block, step, x0)

        return checked

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

    def _block_hook(
        self, texts: dict[tuple[int, int], str], on_block: Callable[[int, int, str], None], reader: Reader | None
    ) -> BlockHook:
        """Decodes every finished block of every trajectory that was not read already."""

        def read(rows: list[int], block: int, z: Tensor) -> list[str]:
            if reader is None:
                return self.decode_latents(self.plain(z))
            return [decode_text(self.tokenizer, reader.read[row, block]) for row in rows]

        def hook(rows: list[int], block: int, z: Tensor) -> None:
            for row, text in zip(rows, read(rows, block, z), strict=True):
                texts[row, block] = text
                on_block(row, block, text)

        return hook


def _read_of(trajectory: Trajectory) -> list[list[int]]:
    """What the blocks of a trajectory were read as.  UnusableError where nothing is known of that."""
    if trajectory.thought_ids is None:
        raise UnusableError(
            "a trajectory without thought_ids: how far it drifts depends on what its blocks were read as, since this model's "
            "finished thoughts stand as text (denoiser.context=text); give trajectories as the model made them"
        )
    return trajectory.thought_ids
