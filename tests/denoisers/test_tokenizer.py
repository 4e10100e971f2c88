"""Text and ids, and text that tries to look like a control token."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from unveil.denoisers.tokenizer import TextTokenizer, whole


@pytest.fixture
def words() -> TextTokenizer:
    return TextTokenizer.of_words(["one", "two", "three"])


def subwords() -> TextTokenizer:
    """A byte-level tokenizer whose alphabet can spell the special tokens out."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<mask>": 0, "<pad>": 1, "<end>": 2, "<unk>": 3} | {c: i + 4 for i, c in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<mask>", "<pad>", "<end>", "<unk>"])
    return TextTokenizer(backend)


def test_words_go_there_and_back(words: TextTokenizer) -> None:
    assert len(words) == 7
    assert [words.id(token) for token in ("<mask>", "<pad>", "<end>", "<unk>", "one")] == [0, 1, 2, 3, 4]
    assert words.encode(" two  one\nthree ") == [5, 4, 6]
    assert words.decode([5, 0, 4, 2, 1]) == "two one"
    assert words.decode_batch([[4], [5, 2]]) == ["one", "two"]
    assert words.tokens([0, 4, 99]) == ["<mask>", "one", "#99"]
    assert "one" in words and "four" not in words
    with pytest.raises(KeyError, match="four"):
        words.id("four")


@pytest.mark.parametrize("hostile", ["<mask>", "one <mask> two", "<pad><mask>", "<end>", "one<mask>", "<MASK>"])
def test_special_tokens_in_text_are_unknown_words(words: TextTokenizer, hostile: str) -> None:
    ids = words.encode(hostile)
    assert not {0, 1, 2} & set(ids)
    assert 3 in ids


@pytest.mark.parametrize("hostile", ["<mask>", "a<end>b", "<unk>"])
def test_subword_tokenizers_spell_special_tokens_out(hostile: str) -> None:
    tokenizer = subwords()
    ids = tokenizer.encode(hostile)
    assert min(ids) >= 4 and tokenizer.decode(ids) == hostile


def test_protection_survives_a_file(tmp_path, words: TextTokenizer) -> None:  # type: ignore[no-untyped-def]
    words.save(tmp_path / "tokenizer.json")
    assert TextTokenizer.load(tmp_path / "tokenizer.json").encode("<mask> one") == [3, 4]


@pytest.mark.parametrize("given", [["a", "a"], ["a", "<mask>"]])
def test_doubled_words_are_refused(given: list[str]) -> None:
    with pytest.raises(ValueError, match="different from one another"):
        TextTokenizer.of_words(given)


def test_half_a_surrogate_pair_becomes_the_replacement_character() -> None:
    assert whole("a\udcffb") == "a\ufffdb" and whole("\ud83d\ude00") == "\U0001f600" and whole("\ud83d") == "\ufffd"
    words = TextTokenizer.of_words(["a", "\ufffd"])
    assert words.encode("a \udcff a") == words.encode("a \ufffd a") == [4, 5, 4]
