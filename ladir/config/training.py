"""What is trained, and how."""

from __future__ import annotations

from dataclasses import dataclass

from ladir.config.declare import section, setting


@dataclass
class TrainSettings:
    max_steps: int | None = setting(None, "stop after this many optimizer steps")
    max_epochs: float | None = setting(None, "stop after this many passes over the data")
    max_seconds: float | None = setting(None, "stop after this many seconds of training (start-up not counted)")
    global_batch: int = setting(128, "samples in one optimizer step, over all ranks and micro batches")
    micro_batch: int = setting(8, "most samples in one forward pass of one rank; accumulation follows from it")
    pack_tokens: int = setting(
        0, "samples of a micro batch are laid end to end in rows of about this many tokens; 0: a row for every sample"
    )
    deepspeed: str | None = setting(None, "DeepSpeed configuration of this phase alone; not set: deepspeed.config")
    data_processes: int = setting(
        0,
        "processes per rank that make batches ahead; 0: a thread of the training process, enough unless a step is shorter "
        "than it takes to make its batch (data_wait)",
    )
    lr: float = setting(1e-5, "peak learning rate")
    heads_lr_factor: float = setting(
        1.0,
        "learning rate of what is not the LM's own (latent maps, time, marks, queries, stop and token heads) as a multiple of "
        "lr: fresh parameters may take larger steps than a pretrained LM bears; adapters count as the LM's",
    )
    min_lr_ratio: float = setting(0.1, "final learning rate as a fraction of the peak")
    schedule: str = setting(
        "cosine",
        "learning rate after warm-up; wsd: constant, then linear decay in the last decay_fraction",
        ("constant", "cosine", "linear", "wsd"),
    )
    warmup_fraction: float = setting(0.03, "fraction of the training spent warming up linearly")
    decay_fraction: float = setting(0.2, "fraction of the training spent decaying (schedule=wsd)")
    optimizer: str = setting(
        "adamw",
        "muon: orthogonalised momentum for the matrices of the LM's layers, in steps as long as AdamW's, which takes the rest",
        ("adamw", "muon"),
    )
    weight_decay: float = setting(0.01, "decoupled weight decay (matrices only)")
    beta1: float = setting(0.9, "AdamW beta1")
    beta2: float = setting(0.999, "AdamW beta2")
    eps: float = setting(1e-8, "AdamW epsilon")
    momentum: float = setting(0.95, "Muon's momentum")
    max_grad_norm: float = setting(1.0, "gradient clipping norm; 0: off")
    ema: float = setting(0.0, "decay of the exponential moving average of the weights; 0: off")
    log_every: int = setting(10, "steps between metric lines")
    validate_every: int | None = setting(None, "steps between validations; not set: only at the end")
    validation_batches: int = setting(8, "global batches in one validation")
    best: str | None = setting(
        None,
        "figure of the validations by which the finished model is chosen: that of the best validation, not of the last step; "
        "e.g. loss, or +token_accuracy, where + says that more is better; not set: the last step's",
    )
    patience: int | None = setting(
        None, "the training ends after so many validations in a row that brought nothing better (best); not set: it does not"
    )
    checkpoint_every: int | None = setting(None, "steps between checkpoints; not set: only when stopped and at the end")
    checkpoint_minutes: float | None = setting(
        None, "minutes of training between checkpoints, beside checkpoint_every or in its place; not set: by steps only"
    )
    checkpoint_in_background: bool = setting(
        False,
        "checkpoints under way are copied to the machine's memory and written from there while the training goes on: a step "
        "waits for the copy alone; takes a rank's part of weights, moments and averages once more in memory",
    )
    keep_checkpoints: int = setting(2, "newest checkpoints kept while a phase is trained")
    keep_finished: bool = setting(False, "keep the checkpoints of a finished phase, too; false: its model is what is left")
    skip_samples: list[int] = setting(
        [],
        "numbers of samples, as the message of a step that is not finite names them: the batches they stand in are left out, "
        "also of a training that goes on",
    )
    snapshot_every: int | None = setting(
        None,
        "steps between models that are kept as they then are (models/<phase>-<step>), for what longer training brings "
        "(evaluate.snapshot); not set: none",
    )


@dataclass
class VaeSettings:
    latent_dim: int = setting(512, "size d of one thought token")
    latents_per_block: int = setting(4, "thought tokens L per block")
    beta: float = setting(1e-5, "weight of the KL term (summed over d, mean over latents)")
    latent_noise: float = setting(3.0, "standard deviation k of the noise added to z in training")
    token_substitution: float = setting(0.3, "probability that an encoder input token is replaced by a random one in training")
    decoder: str = setting("frozen", "frozen: the base LM as it is; trained: a second LM trained along", ("frozen", "trained"))
    objective: str = setting(
        "reconstruct",
        "what the decoder learns from a sentence's latents; reconstruct: the sentence; grounded: also what follows it, the next "
        "sentences and the answer, from question and latents alone, so that latents hold what the rest needs",
        ("reconstruct", "grounded"),
    )
    grounded_weight: float = setting(1.0, "weight of the cross-entropy of what follows (objective=grounded)")
    grounded_tokens: int = setting(128, "first tokens of what follows that are learned (objective=grounded)")
    bos: bool = setting(
        True,
        "encoder and decoder read the tokenizer's <bos> first, where it has one, as the LM learned to read: pretrained LMs use "
        "position 0 as an attention sink, and hardly read what else stands there",
    )
    separator: str = setting(
        "\n",
        "text between a sentence's latents and the sentence where the decoder reads them; a line break stands between a text and "
        "its copy (ar.copy_fraction), behind which a frozen decoder repeats sooner; empty: nothing",
    )
    train: TrainSettings = section(TrainSettings, "training of the VAE", max_epochs=2.0, lr=2e-5)


@dataclass
class LatentSettings:
    dtype: str = setting(
        "float32",
        "dtype in which latents are stored (with log-variances only where denoiser.sample_latents wants them); bfloat16 and "
        "float16 take half the bytes",
        ("float32", "bfloat16", "float16"),
    )
    batch_size: int = setting(64, "sentences encoded in one forward pass of one rank")
    pack_tokens: int = setting(0, "sentences are laid end to end in rows of about this many tokens; 0: a row for every sentence")
    records_per_part: int = setting(1024, "records a rank encodes between two looks at the stop signal; finished parts are kept")
    report_sentences: int = setting(
        512,
        "held-out sentences (those trained on, where there are none) on which encode_latents reports what the latents are good "
        "for: reading them with and without noise, and what a probe learns; 0: no report",
    )
    probe_steps: int = setting(
        300,
        "steps that a small denoiser, the same for every VAE, is trained for that report: how hard the latents are to generate, "
        "which how well they decode does not say; seconds on a CPU; 0: none",
    )


@dataclass
class DenoiserSettings:
    objective: str = setting("velocity", "what the network predicts", ("velocity", "x0", "epsilon", "v"))
    timesteps: str = setting("uniform", "distribution of t in training", ("uniform", "logit_normal"))
    timestep_mean: float = setting(0.0, "mean of logit(t) (timesteps=logit_normal); positive: towards noise")
    timestep_std: float = setting(1.0, "standard deviation of logit(t) (timesteps=logit_normal)")
    draws: int = setting(4, "noise draws M per block and step")
    span: int = setting(
        1, "blocks that are denoised together, each at a noise level of its own: a block sees the next ones of its span form"
    )
    independent_levels: float = setting(
        0.5,
        "share of a span's noisy copies whose blocks draw their levels independently; in the others the blocks before a random "
        "one are finished and those behind it noise (span above 1)",
    )
    carry: str = setting(
        "none",
        "what a denoising step hands to the next one; hidden: its hidden states at the noisy latents, layer-normed and mapped, "
        "are added to the next step's inputs (zeros at first), so that more steps think further; a training step then takes a "
        "second forward pass",
        ("none", "hidden"),
    )
    carry_probability: float = setting(
        0.8, "share of training steps in which a first pass without gradient supplies the state; else it is zeros"
    )
    carry_own_rollout: float = setting(
        0.0,
        "share of noisy copies whose first pass stands at a random earlier time (more noise) of the same path, as in sampling; "
        "in the others at the same latents",
    )
    context: str = setting(
        "latents",
        "as what finished blocks stand before the next ones and the answer; latents: as they are; text: as the tokens that the "
        "VAE's decoder reads in them, so that numbers and names are copied from words (every block is read before the next, "
        "sequences are longer, and there is no stage 2, whose gradient goes through latents)",
        ("latents", "text"),
    )
    time_token: bool = setting(
        False,
        "the mark before a noisy block carries the time t, too, for the latents to attend to; false: it is added to them alone",
    )
    flow_weight: float = setting(5.0, "weight of the flow loss")
    answer_weight: float = setting(1.0, "weight of the answer's cross-entropy")
    stop_weight: float = setting(1.0, "weight of the stop head's cross-entropy")
    token_weight: float = setting(0.0, "weight of the auxiliary token head; 0: no such head")
    lm_weight: float = setting(
        0.0,
        "weight of the cross-entropy of finished sentences' own tokens, each behind those before it (denoiser.context=text): the "
        "LM goes on being one, and can have a say where blocks are read (sample.lm_weight); 0: none",
    )
    token_focus: float = setting(
        0.0,
        "exponent gamma of the token head's focal loss: a token's cross-entropy counts (1 - p) ** gamma, p being its "
        "probability, so that what is known already weighs little; 0: plain cross-entropy",
    )
    token_rank: int = setting(64, "rank of the auxiliary token head")
    token_positions: int = setting(32, "first tokens of a block that the auxiliary token head predicts")
    answer_every: int = setting(
        1,
        "the answer, the stop decisions and the last clean block are part of every n-th step only (the block of every one with "
        "denoiser.lm_weight)",
    )
    bidirectional_question: bool = setting(
        False,
        "a question's tokens all see each other; false: only those before them, as pretrained LMs learned to read (true is for "
        "LMs made from scratch)",
    )
    condition_dropout: float = setting(0.1, "probability that a question is hidden (classifier-free guidance)")
    init_from_vae: bool = setting(True, "start the latent maps from the VAE's")
    init_marks: bool = setting(
        True,
        "where finished blocks stand as text (denoiser.context), start <BOT>, <EOT> and <SOA> as the LM's embeddings of what a "
        "plain chain has in their places: a line break, <eos>, the first of data.answer_prefixes; false: at random",
    )
    sample_latents: bool = setting(False, "draw z from the encoder's posterior instead of taking its mean")
    timestep_features: int = setting(256, "sinusoidal features of t")
    train: TrainSettings = section(TrainSettings, "training of the denoiser, stage 1", max_epochs=20.0, lr=1e-5, global_batch=64)


@dataclass
class RolloutSettings:
    enabled: bool = setting(
        True,
        "whether make demo, slurm/submit.sh and plan.py include stage 2; train_denoiser.py stage=rollout trains it in any case",
    )
    answer_weight: float = setting(1.0, "weight of the answer's cross-entropy through the model's own blocks")
    num_steps: int | None = setting(
        None, "Euler steps per block; not set: sample.num_steps, so that training meets what sampling makes (spacing is the same)"
    )
    lag: int | None = setting(
        None, "steps by which a block of a span starts after the one before it (denoiser.span above 1); not set: sample.lag"
    )
    guidance_scale: float | None = setting(
        None,
        "classifier-free guidance of the own blocks, in sample.guidance_interval and with sample.guidance_rescale; 1: off, half "
        "the passes; not set: sample.guidance_scale",
    )
    gradient_steps: int | None = setting(None, "last steps of a block that carry gradient; not set: all")
    last_blocks: int | None = setting(
        None,
        "blocks of a record, counted from its end, that are the model's own; not set: all (as in the paper; in small models it "
        "costs accuracy, the last block alone does not)",
    )
    own_context: float = setting(
        1.0,
        "share of steps whose flow loss stands behind the model's own blocks (in small models this costs accuracy: 0); in the "
        "others it stands behind the true ones",
    )
    carry_gradient: bool = setting(
        False, "the carried state (denoiser.carry) keeps its gradient through the steps that carry gradient"
    )
    initial_noise: float | None = setting(None, "scale of the noise a block starts from; not set: sample.initial_noise")
    gold: str = setting(
        "nearest",
        "which gold solution is trained towards where a question has several of as many blocks; nearest: to the model's own "
        "blocks (mean square of the latents); sampled: the record that was drawn",
        ("nearest", "sampled"),
    )
    candidates: int = setting(8, "most gold solutions that are compared (gold=nearest)")
    train: TrainSettings = section(TrainSettings, "training of the denoiser, stage 2", max_epochs=20.0, lr=1e-5, global_batch=12)


@dataclass
class RlSettings:
    enabled: bool = setting(
        False, "whether make demo, slurm/submit.sh and plan.py include stage 3; training/train_rl.py trains it in any case"
    )
    algorithm: str = setting(
        "nft",
        "how the thoughts learn from rewards; nft: DiffusionNFT, from finished latents alone, whatever sampled them; flow_grpo: "
        "Flow-GRPO, from denoising steps that are made random",
        ("nft", "flow_grpo"),
    )
    policy: str = setting(
        "latents",
        "what learns from rewards; latents: the thoughts; answer: the tokens of the answers behind them; both; text: the "
        "AR baseline's completions, from models/ar, in place of LaDiR",
        ("latents", "answer", "both", "text"),
    )
    questions: str | None = setting(
        None,
        "questions that are asked, with what the task judges by (no reasoning is needed); not set: those of data.train. New ones "
        "teach more than those that are known by heart",
    )
    reward: str = setting(
        "answer",
        "what an attempt is worth; answer, chain: 1 where the task's checker (evaluate.task) accepts the answer, or the thoughts "
        "alone; both: the mean of the two; my_module:my_function: one of your own, called with lists of questions, thoughts, "
        "answers and records, which gives a number each",
    )
    reward_seconds: float = setting(
        60.0,
        "most seconds that a function of your own (rl.reward) takes for all attempts at one question; one that takes longer ends "
        "the run, which names the question",
    )
    checker_weight: float = setting(
        0.0,
        "added to what a function of your own (rl.reward) gives where the task's checker accepts the answer; 0: its verdict does "
        "not count",
    )
    format_weight: float = setting(
        0.0,
        "added to the reward of an attempt that has the expected form, right or wrong: thoughts and answer ended by themselves, "
        "there is an answer (in a completion: behind its mark), and it is none that the checker of mathematics cannot read "
        "(those of countdown and code tell no such answer from a wrong one)",
    )
    length_weight: float = setting(
        0.0, "taken off the reward of an answer of sample.max_answer_tokens tokens; of a shorter one less, in proportion"
    )
    unstopped_weight: float = setting(0.0, "taken off the reward where the thoughts were cut off at sample.max_blocks")
    prompts: int = setting(48, "questions asked in an iteration, over all ranks")
    group: int = setting(16, "lines of thought per question: rewards count relative to those of the same question")
    answers: int = setting(
        1, "answers to every line of thought, whose reward is their mean: a bad thought is told from a bad answer"
    )
    updates: int = setting(2, "optimizer steps in an iteration, each of all its attempts, at fresh noise")
    questions_per_batch: int = setting(8, "questions that a rank answers in one batch")
    beta: float = setting(
        1.0, "how far the positive and negative predictions of nft are from the old model's; smaller: larger steps of the model"
    )
    advantage_clip: float = setting(
        5.0,
        "standard deviations above or below its group's mean that count as certainly good or bad thoughts; the larger, the "
        "less far nft moves the model from the old one",
    )
    random_steps: int = setting(
        2, "denoising steps of a block, drawn anew for every iteration, that are random and learned from (flow_grpo)"
    )
    step_randomness: float = setting(
        0.7, "share of the noise in a random step that is fresh: its standard deviation over that of the SDE's (flow_grpo)"
    )
    step_clip: float = setting(
        1e-4, "a random step learns while its density per latent element is within this share of what it was (flow_grpo)"
    )
    kl_weight: float = setting(
        0.0,
        "weight of the random steps' KL divergence, per latent element, from those of the model that this stage began with "
        "(flow_grpo; published .01 to .04); above 0 every rank holds that model, too. 0: off, the anchor holds the model",
    )
    token_clip: float = setting(
        0.2, "an answer's token learns while its probability is within this share of what it was when it was sampled"
    )
    old_decay: float = setting(
        0.9, "decay, per iteration, of the moving average of the weights that samples; 0: the present weights"
    )
    anchor_weight: float = setting(
        1.0,
        "weight of stage 1's losses, on rl.train.global_batch gold records per step, beside the rewards'; 0: off (thoughts are "
        "then reported to lose their variety)",
    )
    train: TrainSettings = section(
        TrainSettings,
        "training of the denoiser, stage 3; global_batch: gold records of the anchor; micro_batch: of these, and of attempts",
        max_steps=300,
        lr=1e-5,
        global_batch=64,
        schedule="constant",
    )


@dataclass
class ArSettings:
    phase: str = setting("ar", "name of the phase, and of the model folder it writes: models/<phase>")
    from_scratch: bool = setting(False, "build a new LM from backbone.scratch instead of loading backbone.name_or_path")
    copy_fraction: float = setting(0.0, "share of samples that ask to repeat a sentence (teaches a frozen decoder to copy)")
    bidirectional_question: bool = setting(
        False,
        "the same as denoiser.bidirectional_question, for the LM that train_ar trains (baseline or base LM); its folder keeps it "
        "for the evaluation. Training then takes flex or sdpa in place of flash-attn",
    )
    train: TrainSettings = section(TrainSettings, "chain-of-thought fine-tuning", max_epochs=3.0, lr=1e-5)


@dataclass
class VerifierSettings:
    enabled: bool = setting(
        False,
        "whether slurm/submit.sh and the command that comes next include the verifier; train_verifier.py trains it in any case",
    )
    stage: str = setting(
        "last",
        "whose trajectories it learns to judge; denoiser: stage 1's (rows ladir-best, ladir-weighted); rollout: stage 2's (rows "
        "ladir-rollout-best, ...); rl: stage 3's; last: those of the one that is exported",
        ("last", "denoiser", "rollout", "rl"),
    )
    questions: str | None = setting(
        None,
        "file of questions that are asked for judged trajectories; best ones that the denoiser has not seen; not set: data.train",
    )
    num_questions: int = setting(2000, "most questions asked, drawn from the file")
    num_trajectories: int = setting(8, "trajectories of each")
    questions_per_batch: int = setting(20, "questions answered in one batch")
    held_out: float = setting(0.1, "share of the questions whose trajectories are kept for validation")
    width: int = setting(128, "width of the head's inner layers")
    drift: bool = setting(
        True,
        "scores go by how far finished thoughts move when they are noised and denoised again, too (sample.renoise_*); scoring "
        "then takes sample.renoise_steps passes more per block",
    )
    value_weight: float = setting(
        0.5, "weight of the judgement behind every block, before the chain is complete (sample.verifier_scale)"
    )
    train: TrainSettings = section(
        TrainSettings, "training of the verifier", max_epochs=5.0, lr=1e-3, global_batch=256, micro_batch=256, ema=0.99
    )
