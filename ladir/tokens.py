"""Tokenizer set-up: special-token ids are read from the tokenizer, never assumed.

``<BOT>``, ``<EOT>`` and ``<SOA>`` of the block layout are learned vectors of the denoiser, not vocabulary entries, so
that the base vocabulary stays as it is.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ladir.config import BackboneSettings
from ladir.errors import UnusableError

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
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UnusableError(
            f"the tokenizer {name!r} cannot be loaded: {reason}; set backbone.tokenizer to a folder written by "
            "save_pretrained, or to a Hub id"
        ) from error
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
