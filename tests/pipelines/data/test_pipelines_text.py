import builtins
import json

import numpy as np
import pytest

from pipelines.data import text

SHAKEN = "So shaken as we are"
FOREIGN = "naïve Ωmega 漢字 👩‍🚀"


def test_characters_are_sorted_and_others_unknown():
    words = text.characters("banana")
    assert words.size == 4
    assert words.encode("nab").tolist() == [2, 0, 1]
    assert words.encode("bxé漢").tolist() == [1, 3, 3, 3]
    assert words.encode("").tolist() == []
    assert words.encode("a").dtype == np.int32
    assert text.characters("").encode("ab").tolist() == [0, 0]


def test_every_character_of_foreign_text_has_its_token():
    words = text.characters(FOREIGN)
    tokens = words.encode(FOREIGN)
    assert len(tokens) == len(FOREIGN)
    assert words.size == len(set(FOREIGN)) + 1
    in_order = sorted(set(FOREIGN))
    assert "".join(in_order[token] for token in tokens) == FOREIGN


def test_bytes_are_those_of_utf8():
    words = text.utf8_bytes()
    assert words.size == 256
    assert bytes(words.encode(FOREIGN).astype(np.uint8)).decode("utf-8") == FOREIGN
    assert words.encode("").tolist() == []


@pytest.mark.parametrize("words", [text.characters("ab"), text.utf8_bytes()])
def test_half_a_surrogate_pair_does_not_stop_it(words):
    tokens = words.encode(json.loads('"a\\ud83d"'))
    assert tokens[0] == words.encode("a")[0]
    assert len(tokens) > 1


@pytest.fixture(scope="module")
def vocabulary_file(tmp_path_factory):
    """A vocabulary file of the package tokenizers, without which it cannot be read either."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["[UNK]"],
        show_progress=False,
    )
    model.train_from_iterator([SHAKEN] * 20, trainer)
    path = tmp_path_factory.mktemp("vocabulary") / "words.json"
    model.save(str(path))
    return path


def test_a_vocabulary_file_is_read_with_its_package(vocabulary_file):
    words = text.vocabulary(str(vocabulary_file), "not looked at")
    for written in (SHAKEN, FOREIGN):
        tokens = words.encode(written)
        assert tokens.dtype == np.int32
        assert 0 <= tokens.min() <= tokens.max() < words.size
    assert len(words.encode(SHAKEN)) < len(SHAKEN)
    assert words.encode("").tolist() == []


def test_a_file_that_is_none_is_named(vocabulary_file, tmp_path):
    (tmp_path / "half.json").write_text(vocabulary_file.read_text()[:100])
    with pytest.raises(ValueError, match=r"half.json' is no vocabulary file of the package tokenizers \(.*save"):
        text.tokenizer(tmp_path / "half.json")


def test_without_the_package_it_is_said_what_to_install(tmp_path, monkeypatch):
    path = tmp_path / "words.json"
    path.write_text("{}")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install tokenizers.*'characters', 'words' or 'bytes'"):
        text.vocabulary(str(path), "")


def test_an_unknown_vocabulary_is_named():
    with pytest.raises(ValueError, match="'character' is none of 'characters', 'words' and 'bytes', nor a file"):
        text.vocabulary("character", "")
    with pytest.raises(ValueError, match="vocabulary='character' is none of"):
        text.identity("character")


def test_a_vocabulary_file_is_told_by_its_content(tmp_path):
    assert text.identity("bytes") == "bytes"
    for name, content in (("one", "a"), ("same", "a"), ("other", "b")):
        (tmp_path / name).write_text(content)
    one, same, other = (text.identity(str(tmp_path / name)) for name in ("one", "same", "other"))
    assert one == same != other


@pytest.mark.parametrize("length", [1, 2, 3, 5, 6, 7])
@pytest.mark.parametrize("total", [0, 1, 2, 3, 6, 7, 8])
def test_windows_predict_every_token_but_the_first_once(total, length):
    tokens = 10 + np.arange(total)
    x, y = text.windows(tokens, length)
    assert x.shape == y.shape == (-(-max(total - 1, 0) // length), length)
    assert x.dtype == y.dtype == np.int32
    real = y != text.PAD_LABEL
    assert y[real].tolist() == tokens[1:].tolist()
    assert x[real].tolist() == tokens[:-1].tolist()
    assert (x[~real] == 0).all()
    # Only the end of the last window is padded, and no window is empty.
    assert real[:-1].all()
    assert real.any(axis=1).all()


def test_a_window_needs_a_length():
    with pytest.raises(ValueError, match="sequence_length must be an integer of at least 1, got 0"):
        text.windows(np.arange(3), 0)
    with pytest.raises(ValueError, match=r"sequence_length must be an integer of at least 1, got 2\.5"):
        text.padded([np.arange(3)], 2.5, 0)


def test_no_window_reaches_into_the_next_text():
    words = text.utf8_bytes()
    examples, owner = text.all_windows(["abcd", "", "x", "漢"], words.encode, 2)
    assert owner.tolist() == [0, 0, 3]
    assert owner.dtype == np.int32
    a = ord("a")
    assert examples["x"].tolist() == [[a, a + 1], [a + 2, 0], list("漢".encode())[:2]]
    assert examples["y"].tolist() == [[a + 1, a + 2], [a + 3, -1], list("漢".encode())[1:]]
    with pytest.raises(ValueError, match="none of 2 texts has two tokens"):
        text.all_windows(["", "x"], words.encode, 2)


def test_rows_are_cut_or_filled_up():
    rows = [np.arange(5), np.zeros(0, np.int32), np.array([7, 8])]
    assert text.padded(rows, 3, pad=9).tolist() == [[0, 1, 2], [9, 9, 9], [7, 8, 9]]


def test_words_are_those_that_are_there_twice():
    words = text.vocabulary("words", "It's good. GOOD! it's bad.")
    assert words.size == 3 + 1  # ".", "good", "it's" and the unknown
    assert words.encode("it's  Bad, good.").tolist() == [2, 3, 3, 1, 0]
    assert words.encode("").tolist() == []
    assert text.identity("words") == "words"
