"""What an evaluation asks: its data sets with their numbers of questions, its ways of sampling, and what each of them takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ladir.config import Config
from ladir.config.suites import file_key
from ladir.data.rows import EXTENSIONS, file_rows
from training.evaluation.answers import cut
from training.evaluation.asking import portion_size, rows_of
from training.evaluation.benchmarks import set_configs
from training.evaluation.readiness import question_file
from training.evaluation.rows import GREEDY, model_of, questions_at_a_time, sampling_of
from training.planning.asking import Architecture, answering, drifting
from training.planning.models import DataSize

#: questions of the test sets as they are published; of OlympiadBench and DeepMind-Mathematics those that papers ask: open-ended
#: mathematics in English (Tong et al. 2024, DART-Math), and 1,000 of all kinds (Tang et al. 2024, MathScale)
PUBLISHED = {
    "gsm8k": 1319,
    "math": 5000,
    "math500": 500,
    "gaokao2023en": 385,
    "deepmindmathematics": 1000,
    "collegemath": 2818,
    "olympiadbench": 675,
    "theoremqa": 800,
    "humaneval": 164,
    "openaihumaneval": 164,
    "humaneval+": 164,
    "mbpp": 500,
    "mbpp+": 378,
}
#: questions of a set of which nothing is known
UNKNOWN = 1000


@dataclass(frozen=True)
class Questions:
    """A data set under its own settings; ``known``: its number of questions is that of its file, or of its publication."""

    name: str
    config: Config
    number: int
    known: bool

    @property
    def asked(self) -> int:
        """Questions that ``evaluate.num_questions`` leaves."""
        most = self.config.evaluate.num_questions
        if most is None:
            return self.number
        return min(most, self.number) if self.known else most

    @property
    def assumed(self) -> bool:
        """Whether the number asked is a guess."""
        return not self.known and self.config.evaluate.num_questions is None


@dataclass(frozen=True)
class Work:
    """Of one way of asking one data set: tokens through an LM, useful FLOPs, and passes that a rank launches."""

    tokens: int
    flops: float
    passes: int


def questions(config: Config) -> list[Questions]:
    """The data sets that are asked.  UnusableError for settings of a set that cannot be."""
    return [_questions(name, own) for name, own in set_configs(config)]


def _questions(name: str, config: Config) -> Questions:
    path = question_file(config) or ""
    if path.endswith(EXTENSIONS) and Path(path).is_file():
        return Questions(name or path, config, sum(1 for _ in file_rows(path)), known=True)
    number = PUBLISHED.get(file_key(name or _hub_name(path)))
    return Questions(name or path, config, number or UNKNOWN, known=number is not None)


def _hub_name(path: str) -> str:
    """A Hub data set's name without its owner, where the split is the one for tests; else ""."""
    return path.partition(":")[0].rpartition("/")[2] if path.endswith(":test") else ""


def samplings(config: Config) -> list[str]:
    """The samplings behind ``evaluate.methods``; those of stages that are not trained are left out, as the evaluation does."""
    reinforced, text = config.rl.enabled, config.rl.policy == "text"
    trained = {"rollout": config.rollout.enabled, "rl": reinforced and not text, "ar-rl": reinforced and text}
    found = dict.fromkeys(sampling_of(method)[0] for method in config.evaluate.methods)
    return [sampling for sampling in found if trained.get(model_of(sampling), True)]


def work(asked: Questions, sampling: str, data: DataSize, lm: Architecture, gpus: int, replayed: bool) -> Work:
    """What it takes to ask a data set in one way."""
    if not asked.asked:
        return Work(0, 0.0, 0)
    if model_of(sampling).startswith("ar"):
        return _by_text(asked, sampling, data, lm, gpus)
    config, lines = asked.config, rows_of(asked.config.evaluate, sampling)
    batches = cut(asked.asked, portion_size(config.evaluate, sampling, asked.asked, gpus), gpus)
    found = answering(config, data, lm, max(map(len, batches)), lines, replayed=replayed, reads=True)
    if f"{sampling}-stable" in config.evaluate.methods:
        found = drifting(found, config, data, lm, lines, replayed)
    rounds = -(-len(batches) // gpus)
    return Work(asked.asked * lines * found.row_tokens, asked.asked * found.flops, rounds * found.real_passes)


def _by_text(asked: Questions, sampling: str, data: DataSize, lm: Architecture, gpus: int) -> Work:
    """The AR baseline, a pass for every token.

    Its arithmetic is that of mean completions.  A batch goes on to its longest one, which is taken to be as long as may be;
    samples beyond its rows join as others end.
    """
    ask, lines = asked.config.evaluate, rows_of(asked.config.evaluate, sampling)
    size = questions_at_a_time(ask, sampling in GREEDY)
    mean, longest = (min(ask.ar_max_tokens, lengths.completion) for lengths in (data.mean, data.longest))
    batches = cut(asked.asked, portion_size(ask, sampling, asked.asked, gpus), gpus)
    together = -(-max(map(len, batches)) // size)
    passes = together + longest + (together - 1) * mean
    row = data.mean.question + lines * mean
    return Work(asked.asked * row, asked.asked * 2 * lm.parameters * row, -(-len(batches) // gpus) * passes)
