"""The run, the language model and the records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ladir.config.declare import section, setting


@dataclass
class RunSettings:
    name: str = setting("ladir", "name of the run; everything it writes lies in <folder>/<name>")
    folder: str = setting("runs", "folder of all runs")
    seed: int = setting(0, "seed of initialisation, data order, noise and sampling")
    exclusive: bool = setting(
        True,
        "keep other jobs out of the run's folder; false: train_ar.py, train_rl.py with rl.policy=text, and evaluations with a "
        "name, of a snapshot or of one lane (evaluate.lane), may work in it beside LaDiR's phases and one another",
    )
    allow_changes: list[str] = setting(
        [],
        "settings that may change when a training under way goes on: <phase>.train.lr, min_lr_ratio and max_grad_norm, by full "
        "name; what changed is kept in changes-<phase>.jsonl (<phase>.train.skip_samples may always change)",
    )


@dataclass
class LoraSettings:
    rank: int = setting(0, "rank of the adapters; 0 trains all parameters instead")
    alpha: float = setting(32.0, "scale of the adapters (effective scale alpha / rank)")
    dropout: float = setting(0.0, "dropout on the adapters' input")
    targets: list[str] = setting(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "names of the linear layers that get an adapter; [all-linear]: all of them but the LM head",
    )


@dataclass
class BackboneSettings:
    name_or_path: str | None = setting(None, "causal LM (docs/models.md: which ones): a local folder or a Hub id")
    scratch: dict[str, Any] = setting(
        {},
        "architecture of a new LM (a transformers config as a mapping: model_type, hidden_size, ...), "
        "used by train_ar.py with ar.from_scratch=true, and by plan.py where backbone.name_or_path is not at hand",
    )
    tokenizer: str | None = setting(None, "tokenizer folder or Hub id; not set: backbone.name_or_path")
    dtype: str = setting(
        "auto",
        "dtype of weights and activations; auto: bfloat16 where the device multiplies it faster, else float32",
        ("auto", "bfloat16", "float32"),
    )
    attention: str = setting(
        "auto",
        "attention kernel: eager and sdpa take a dense mask; flex (CUDA) costs what is visible, and leaves rows of less than "
        "1024 tokens, where that does not pay, to sdpa; flash (CUDA): flex, and "
        "flash-attn for plain text and cached prefixes; auto: on a CPU eager, and sdpa for long rows; else the first of "
        "flash, flex, sdpa, eager that the LM can run with here",
        ("auto", "eager", "sdpa", "flex", "flash"),
    )
    activation_checkpointing: str = setting(
        "none",
        "activations recomputed in the backward pass instead of stored: of no layer, of every layer, of every second layer",
        ("none", "full", "selective"),
    )
    logits_parts: int = setting(
        1,
        "the logits of a loss are made in so many parts, one after the other, and again in the backward pass: memory of one part "
        "(with 128k words and 4,096 labels all at once take several GiB); ZeRO-3 gathers the LM head for each",
    )
    compile: bool = setting(
        False, "compile the LM's layers for training (torch.compile, some minutes at the start); with ZeRO stage 0 or 2 only"
    )
    lora: LoraSettings = section(LoraSettings, "low-rank adapters (PEFT)")


@dataclass
class DataSettings:
    train: Any = setting(
        None,
        "training records: .jsonl or .json (either with .gz), .parquet, or a Hub id read through datasets; several as a list, or "
        "as a pattern (data/*.jsonl)",
    )
    validation: str | None = setting(None, "validation records: settings are chosen on them")
    test: str | None = setting(None, "test records: the final table is made on them")
    test_held_out: str | None = setting(
        None, "a second set of test records, of a kind that is in no other file (python -m ladir gym: templates held out)"
    )
    sentences: str | None = setting(None, 'extra sentences the VAE also trains on: JSONL of {"text": sentence} (optional)')
    store: str | None = setting(
        None,
        "folder of the token stores, which several runs may share: records are read and tokenized once per content (Hub sets: "
        "per commit), settings and tokenizer, and mapped afterwards; not set: the run's own, <folder>/<name>/tokens",
    )
    stream_hub: bool = setting(
        False,
        "Hub sets are read as they come over the network, into the token store, without a copy of them on disk; takes the "
        "network whenever a store is made; false: datasets keeps a copy",
    )
    processes: int | None = setting(
        None, "processes that read and tokenize records for a token store; not set: one for every core that the program may use"
    )
    input_field: str = setting("input", "name of the question's field")
    output_field: str = setting("output", "name of the reasoning chain's field: a text, or a list of steps")
    answer_field: str = setting("answer", "name of the explicit answer's field (a text or a number), used where a record has it")
    answer_prefixes: list[str] = setting(
        ["####", "The answer is"],
        "literal text, whatever its case, that starts the final answer; the last occurrence counts (beside an explicit answer "
        "only where one sentence or that answer follows); the AR baseline writes the first",
    )
    sentences_per_block: int = setting(1, "sentences in one block; 0: the whole chain is one block")
    chat_template: bool = setting(
        False,
        "a question stands in the tokenizer's chat template, as an instruct model's user turn, the assistant's begun behind it, "
        "in all phases, the AR baseline and answering; special tokens are the model's own",
    )
    strip_calculator: bool = setting(
        True,
        "remove GSM8K's <<...>> calculator annotations from the reasoning; a step that is nothing else keeps what is in them, a "
        "chain of nothing else is a bad record",
    )
    on_bad_record: str = setting(
        "error", "error: refuse the file; skip: leave the record out, count and list it", ("error", "skip")
    )
    max_question_tokens: int = setting(512, "longest question, in tokens; longer ones are bad records")
    max_block_tokens: int = setting(128, "longest block, in tokens")
    max_blocks: int = setting(32, "most blocks in a record")
    max_answer_tokens: int = setting(128, "longest answer, in tokens")


@dataclass
class CountdownSettings:
    numbers: int = setting(3, "numbers per puzzle")
    max_number: int = setting(20, "largest given number (smallest is 1)")
    max_value: int = setting(100, "largest target and intermediate result (smallest is 1)")
    min_target: int = setting(1, "smallest target")
    max_target: int | None = setting(None, "largest target; not set: countdown.max_value")
    train: int = setting(14000, "training puzzles")
    validation: int = setting(300, "validation puzzles")
    test: int = setting(500, "test puzzles")
    solutions_per_puzzle: int = setting(2, "most gold solutions written per training puzzle, one record each")
    orders: str = setting(
        "one",
        "one: solutions that differ only in the order of sums, products and their steps count as one; all: each counts",
        ("one", "all"),
    )


@dataclass
class GymSettings:
    dataset: str = setting("gsm_symbolic", "set of reasoning-gym that records are made from; one that has chains of thought")
    train: int = setting(20000, "training records")
    validation: int = setting(300, "validation records")
    test: int = setting(500, "test records; as many again of the templates that are held out")
    templates: list[int] = setting([], "numbers of the templates that records are made from (gsm_symbolic has 85); []: all")
    held_out_templates: int = setting(
        0, "so many of these templates, drawn with run.seed, are in test_held_out.jsonl and in no other file; 0: there is none"
    )
    vocabulary: int = setting(
        2048, "tokens of the tokenizer that is made of the training records (byte-level BPE, every digit by itself); 0: none"
    )
