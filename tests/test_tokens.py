"""Tokenizer set-up: nothing is assumed about special tokens, and text stays text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

from ladir import tokens
from ladir.config import BackboneSettings, VaeSettings
from ladir.data.batches import VaeCollator
from ladir.errors import UnusableError
from ladir.names import check_name
from ladir.tokens import (
    PROBE_FILE,
    build_word_tokenizer,
    decode_text,
    encode_text,
    encode_texts,
    load_tokenizer,
    ordinary_ids,
    save_tokenizer,
    vocabulary_size,
)

WORDS = ["12", "3", "+", "(", ")", "####", "##", "->", "\n", "it's"]


def byte_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with special tokens at its end, as Llama's and Qwen's are."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@given(st.lists(st.sampled_from(WORDS), max_size=30))
def test_words_survive_the_round_trip(words: list[str]) -> None:
    tokenizer = build_word_tokenizer(WORDS)
    ids = encode_text(tokenizer, " ".join(words))
    assert len(ids) == len(words) and tokenizer.unk_token_id not in ids
    text = decode_text(tokenizer, ids)
    assert encode_text(tokenizer, text) == ids
    assert " \n" not in text and "\n " not in text and "  " not in text


def test_word_tokenizer_is_reloaded_the_same(tmp_path: Path) -> None:
    tokenizer = build_word_tokenizer([*WORDS, "12"])
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(BackboneSettings(tokenizer=str(tmp_path)))
    text = "12 + 3\n#### ( 12 )"
    assert encode_text(loaded, text) == encode_text(tokenizer, text)
    assert decode_text(loaded, encode_text(loaded, text)) == text
    assert len({loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id}) == 3
    assert len(loaded) == len(WORDS) + 3
    assert decode_text(loaded, encode_text(loaded, "12 nowhere 3")) == "12 3"


@given(st.text())
def test_byte_tokens_survive_the_round_trip(text: str) -> None:
    tokenizer = byte_tokenizer(eos_token="<|end|>")
    assert decode_text(tokenizer, encode_text(tokenizer, text)) == text


def test_special_tokens_in_a_text_are_text() -> None:
    tokenizer = byte_tokenizer(eos_token="<|end|>", bos_token="<|start|>")
    text = "a <|end|> b <|start|>"
    ids = encode_text(tokenizer, text)
    assert not {tokenizer.eos_token_id, tokenizer.bos_token_id} & set(ids)
    assert decode_text(tokenizer, ids) == text


def test_decoding_stops_at_the_end_token_and_leaves_special_tokens_out() -> None:
    tokenizer = byte_tokenizer(eos_token="<|end|>", bos_token="<|start|>")
    a, b = encode_text(tokenizer, "ab")
    assert decode_text(tokenizer, [tokenizer.bos_token_id, a, tokenizer.eos_token_id, b]) == "a"
    assert decode_text(tokenizer, []) == ""


def test_many_texts_equal_one_by_one() -> None:
    tokenizer = byte_tokenizer(eos_token="<|end|>")
    texts = ["", "a", "longer text"]
    assert encode_texts(tokenizer, texts) == [encode_text(tokenizer, text) for text in texts]
    assert encode_texts(tokenizer, []) == []


@given(st.lists(st.text() | st.sampled_from(["a <|end|>", "<|end|><|end|>", "x" * 5000]), min_size=1))
def test_ids_are_those_of_the_library(texts: list[str]) -> None:
    tokenizer = byte_tokenizer(eos_token="<|end|>", pad_token="<|end|>")
    tokenizer("a b c", truncation=True, max_length=2, padding="max_length")  # leaves its mark on the tokenizer below
    ids = encode_texts(tokenizer, texts)
    assert ids == tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def test_a_stream_of_texts_is_encoded_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_TEXTS_PER_CALL", 3)
    tokenizer, taken = byte_tokenizer(eos_token="<|end|>"), []
    texts = [str(number) for number in range(7)]
    encoded = tokens.encode_stream(tokenizer, (taken.append(text) or text for text in texts))
    assert next(encoded) == encode_text(tokenizer, "0") and taken == texts[:3]
    assert [encode_text(tokenizer, "0"), *encoded] == encode_texts(tokenizer, texts)
    assert list(tokens.encode_stream(tokenizer, [])) == []


def test_padding_falls_back_to_the_end_token(tmp_path: Path) -> None:
    byte_tokenizer(eos_token="<|end|>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(BackboneSettings(name_or_path=str(tmp_path)))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id is not None


def test_a_name_that_may_be_of_the_hub_is_looked_at_beside_what_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "tokenizer").mkdir(parents=True)
    check_name("my/tokenizer", "tokenizer", "backbone.tokenizer")
    check_name("owner/lm", "LM", "backbone.name_or_path")
    assert not caplog.messages
    check_name("my/tokeniser", "tokenizer", "backbone.tokenizer")
    assert "is looked for on the Hub; did you mean my/tokenizer?" in caplog.text
    with pytest.raises(UnusableError, match=r"did you mean .*/my/tokenizer\? correct backbone\.tokenizer, or make it first"):
        check_name(f"{tmp_path}/my/tokenise", "tokenizer", "backbone.tokenizer")


def test_unusable_tokenizers_are_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer: set backbone.tokenizer"):
        load_tokenizer(BackboneSettings())
    with pytest.raises(ValueError, match=r"the tokenizer '\./nowhere': no such folder \(looked in .*correct backbone.tokenizer"):
        load_tokenizer(BackboneSettings(tokenizer="./nowhere"))
    with pytest.raises(ValueError, match=r"cannot be loaded.*set backbone.tokenizer"):
        load_tokenizer(BackboneSettings(tokenizer=str(tmp_path)))
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no end-of-sequence token"):
        load_tokenizer(BackboneSettings(tokenizer=str(tmp_path)))


def test_ordinary_ids_are_those_of_words_alone() -> None:
    words = [f"w{number}" for number in range(20)]
    tokenizer = build_word_tokenizer(words)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<mark>"]})
    ids = ordinary_ids(tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == words
    settings = VaeSettings(latent_dim=2, latents_per_block=1, token_substitution=1.0)
    batch = VaeCollator(settings, ids, int(tokenizer.eos_token_id), seed=0)([[3] * 50] * 20, list(range(20)))
    assert set(batch.encoder_ids.tolist()) == set(ids)
    with pytest.raises(UnusableError, match="no ordinary tokens"):
        ordinary_ids(build_word_tokenizer([]))


def beside(model_type: str, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """The tokenizer in the folder of an LM of another family."""
    AutoConfig.for_model(model_type, vocab_size=400).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def digits_together() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that has numbers of two digits as tokens, which Qwen's would cut."""
    tokenizer = byte_tokenizer(eos_token="<|end|>")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"]["vocab"] |= {f"{i}{j}": 256 + 10 * i + j for i in range(10) for j in range(10)}
    backend["model"]["merges"] = [[str(i), str(j)] for i in range(10) for j in range(10)]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), eos_token="<|end|>")


@pytest.mark.parametrize("model_type", ["qwen2", "llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("kind", ["words", "digits"])
def test_a_tokenizer_beside_an_lm_of_another_family_keeps_its_ids(model_type: str, kind: str, tmp_path: Path) -> None:
    tokenizer = build_word_tokenizer(WORDS) if kind == "words" else digits_together()
    beside(model_type, tokenizer, tmp_path)
    loaded = load_tokenizer(BackboneSettings(tokenizer=str(tmp_path)))
    for text in ("12 + 3\n#### ( 12 )", "it's 1234567 and 89"):
        assert encode_text(loaded, text) == encode_text(tokenizer, text)
    assert loaded.eos_token_id == tokenizer.eos_token_id


def test_a_base_folder_without_a_probe_keeps_the_ids_of_its_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = digits_together()
    beside("qwen2", tokenizer, tmp_path)
    (tmp_path / PROBE_FILE).unlink()
    loaded = load_tokenizer(BackboneSettings(tokenizer=str(tmp_path)))
    assert encode_text(loaded, "1234") == encode_text(tokenizer, "1234")
    assert "not as transformers' Qwen2Tokenizer, which gives other ids" in caplog.text


def test_a_tokenizer_that_was_replaced_is_refused(tmp_path: Path) -> None:
    save_tokenizer(build_word_tokenizer(WORDS), tmp_path)
    build_word_tokenizer(reversed(WORDS)).save_pretrained(tmp_path)
    with pytest.raises(UnusableError, match="does not give the ids that it was saved with"):
        load_tokenizer(BackboneSettings(tokenizer=str(tmp_path)))


def test_an_embedding_has_a_row_for_the_last_id_whatever_is_left_out() -> None:
    vocabulary = {"<eos>": 0, "a": 5}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="a")), eos_token="<eos>"
    )
    assert vocabulary_size(tokenizer) == 6
