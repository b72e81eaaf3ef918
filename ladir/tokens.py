"""Tokenizer set-up: special-token ids are read from the tokenizer, never assumed.

``<BOT>``, ``<EOT>`` and ``<SOA>`` of the block layout are learned vectors of the denoiser, not vocabulary entries, so
that the base vocabulary stays as it is.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from ladir.config import BackboneSettings
from ladir.errors import UnusableError
from ladir.names import check_name

logger = logging.getLogger(__name__)

#: beside a tokenizer that was saved with an LM: a text and its ids
PROBE_FILE = "tokenizer_probe.json"
_PROBED_TOKENS = 500
_PROBE = (
    "It's 1234567 + 8.90 = 1,234,575.9 (x_1 != y2); isn't IT?  Two  spaces\n\n\tdef f(a):\n        return a**2 // 3\r\n"
    "naïve cafe\u0301 Ｆｕｌｌ width ½ ﬁ Straße ДА 你好，世界 こんにちは हिन्दी عربى 🙂👩‍🚀 <s> </s> [PAD] ▁_ \u00a0end "
)

_TEXTS_PER_CALL = 5000


def load_tokenizer(backbone: BackboneSettings) -> PreTrainedTokenizerBase:
    """The backbone's tokenizer with a padding token (its own, else the end-of-sequence token).

    Raises UnusableError where no tokenizer is named, it cannot be loaded, or it has no end-of-sequence token.
    """
    name = backbone.tokenizer or backbone.name_or_path
    if name is None:
        raise UnusableError(
            "no tokenizer: set backbone.tokenizer, or backbone.name_or_path to a model folder or Hub id that has one"
        )
    check_name(name, "tokenizer", "backbone.tokenizer" if backbone.tokenizer else "backbone.name_or_path")
    tokenizer = _read(name)
    if tokenizer.eos_token_id is None:
        raise UnusableError(
            f"the tokenizer {name!r} has no end-of-sequence token, which ends answers and sentences; set eos_token in "
            "its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash (16 hex digits) of which number stands for which token, and of the one that ends a text."""
    numbers = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps([numbers, tokenizer.eos_token_id]).encode()).hexdigest()[:16]


def tokenization_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash (16 hex digits) of everything on which the ids of a text depend: rules and vocabulary, which
    :func:`tokenizer_fingerprint` alone knows, and the ids of a probe text."""
    rules = ""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        rules = json.dumps({name: value for name, value in backend.items() if name not in ("truncation", "padding")})
    facts = [tokenizer_fingerprint(tokenizer), rules, tokenizer.bos_token_id, asdict(Probe.of(tokenizer))]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _read(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id, of the class that gives the ids it was saved with.

    For some architectures transformers takes their own class whatever was saved: with other rules, and so other ids.
    """
    with _one_line(name):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
        probe = _saved_probe(name, tokenizer)
    if probe is None or probe.holds(tokenizer):
        return tokenizer
    with _one_line(name):
        as_saved = PreTrainedTokenizerFast.from_pretrained(name)
    if not probe.holds(as_saved):
        raise UnusableError(
            f"the tokenizer in {name} does not give the ids that it was saved with ({PROBE_FILE}): it was replaced or changed; "
            "copy the folder again, or train or export the model anew"
        )
    logger.warning("%s: read as it was saved, not as transformers' %s, which gives other ids", name, type(tokenizer).__name__)
    return as_saved


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """What transformers raises for a tokenizer that it cannot read becomes an UnusableError of one line."""
    try:
        yield
    except Exception as error:  # of any kind: what is read is the user's, by code that checks little
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnusableError(
            f"the tokenizer {name!r} cannot be loaded: {reason}; set backbone.tokenizer to a folder written by "
            "save_pretrained, or to a Hub id"
        ) from error


@dataclass(frozen=True)
class Probe:
    """A text and the ids that a tokenizer gives it."""

    text: str
    ids: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Probe:
        """Of what tokenizers differ in: words, numbers, white space, signs and letters of many kinds, and its own tokens."""
        size = vocabulary_size(tokenizer)
        ids = list(range(0, size, max(1, size // _PROBED_TOKENS)))
        own = [decode_text(tokenizer, [id]) for id in ids]
        text = "\n".join([_PROBE, *own, " ".join(token for token in tokenizer.convert_ids_to_tokens(ids) if token)])
        return cls(text, encode_text(tokenizer, text))

    def holds(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether a tokenizer gives the same ids."""
        return encode_text(tokenizer, self.text) == self.ids


def _saved_probe(name: str, tokenizer: PreTrainedTokenizerBase) -> Probe | None:
    """What :func:`save_tokenizer` wrote, or, where transformers took another class than was declared, of the file as it is."""
    saved = Path(name) / PROBE_FILE
    if saved.is_file():
        return Probe(**json.loads(saved.read_text(encoding="utf-8")))
    declared = str(get_tokenizer_config(name).get("tokenizer_class") or type(tokenizer).__name__)
    if declared.removesuffix("Fast") == type(tokenizer).__name__ or not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    return Probe.of(PreTrainedTokenizerFast.from_pretrained(name))


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write a tokenizer beside an LM, with the ids of a probe text by which :func:`load_tokenizer` knows it again.

    UnusableError where it cannot be read back with the ids it has now.
    """
    tokenizer.save_pretrained(str(folder))
    (Path(folder) / PROBE_FILE).write_text(json.dumps(asdict(Probe.of(tokenizer))), encoding="utf-8")
    _read(str(folder))


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding needs for every id of a tokenizer (more than its tokens, where ids are left out)."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, name: str, padding: bool = True) -> None:
    """UnusableError where a tokenizer has ids that an embedding of ``rows`` rows, of the LM ``name``, does not have.

    Special tokens without a role never enter a text (:func:`encode_texts`) and are let through, as Gemma 3's for images.
    ``padding``: a padding token is asked of as well, though nothing here looks it up; other programs would.
    """
    roles = {role: getattr(tokenizer, f"{role}_token_id") for role in ("eos", "bos", "unk", *(["pad"] if padding else []))}
    idle = set(tokenizer.all_special_ids) - set(roles.values())
    idle |= {id for id, token in tokenizer.added_tokens_decoder.items() if token.special} - set(roles.values())
    behind = sorted((id, token) for token, id in tokenizer.get_vocab().items() if id >= rows and id not in idle)
    if behind:
        named = ", ".join(f"{token!r} ({id})" for id, token in behind[:3])
        more = f" and {len(behind) - 3} more" if len(behind) > 3 else ""
        of_roles = [f"{role}_token" for role, id in roles.items() if id is not None and id >= rows]
        remedy = (
            f"set {' and '.join(of_roles)} to a token that it has"
            if len(of_roles) == len(behind)
            else "take the LM's own tokenizer"
        )
        raise UnusableError(
            f"the tokenizer has tokens that the LM {name!r} has no embedding for, whose ids end at {rows - 1}: {named}{more}; "
            f"{remedy} (backbone.tokenizer), or resize the LM with transformers' resize_token_embeddings and save it"
        )


def ordinary_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that text is made of, ascending: no special or added token, and nothing beyond the tokenizer's own vocabulary.

    A model may have more rows than its tokenizer has tokens.  Raises UnusableError where there are none.
    """
    apart = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    found = sorted({*tokenizer.get_vocab().values()} - apart)
    if not found:
        raise UnusableError(
            "the tokenizer has no ordinary tokens, only special and added ones; set backbone.tokenizer to another"
        )
    return found


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of every text; no special token is added, and none is read out of the text itself."""
    if not texts:
        return []
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        return _encode_plainly(tokenizer.backend_tokenizer, texts)
    encoded = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def _encode_plainly(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids alone: masks and offsets of every token, which the caller above would make, take as long as the ids."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def encode_stream(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[list[int]]:
    """As :func:`encode_texts`, one by one: what a tokenizer returns takes a hundred bytes a token, so it gets a few at a time."""
    left = iter(texts)
    while some := list(itertools.islice(left, _TEXTS_PER_CALL)):
        yield from encode_texts(tokenizer, some)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text; no special token is added, and none is read out of the text itself."""
    return encode_texts(tokenizer, [text])[0]


def decode_text(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    """Text of token ids up to the first end-of-sequence token, special tokens left out."""
    kept = []
    for token in ids:
        if int(token) == tokenizer.eos_token_id:
            break
        kept.append(int(token))
    text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text if isinstance(text, str) else text[0]


def build_word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are ``<pad>``, ``<eos>``, ``<unk>`` and ``words``: text is split at white space.

    A newline is a token of its own where it is among ``words``; other white space is not kept, and decoding puts single
    spaces between words and none around newlines.
    """
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<pad>", "<eos>", "<unk>", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"[^\S\n]+"), "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    # The WordPiece decoder puts a space before every token but the first (its continuation prefix cannot occur here).
    tokenizer.decoder = decoders.Sequence(
        [decoders.WordPiece(prefix="\0", cleanup=False), decoders.Fuse(), decoders.Replace(Regex(" ?\n ?"), "\n")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def build_bpe_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of ``size`` tokens made of ``texts``: ``<pad>``, ``<eos>``, all bytes, and what they build.

    Every digit is a token, alone or with the space before it, so that no number is one whole; any text can be written.
    """
    tokenizer = Tokenizer(models.BPE())
    by_digit = pre_tokenizers.Split(Regex(r" ?\p{N}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([by_digit, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )
