"""Text to tokens: vocabularies, windows for next-token prediction, and padded rows for classification."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedjax_core import checks

PAD_LABEL = -1
"""Label of a padded position in `windows`."""

SEQUENCE_LENGTH = 80

_WORD = re.compile(r"[\w']+|[^\w\s]")

_ERRORS = "surrogatepass"  # JSON may hold half of a surrogate pair, which is no reason to lose the rest


class Vocabulary(NamedTuple):
    """How text becomes tokens.

    Attributes:
      size: tokens lie in [0, size).
      encode: `encode(text) -> int32[number of tokens]`.
    """

    size: int
    encode: Callable[[str], np.ndarray]


def vocabulary(choice: str, training_text: str) -> Vocabulary:
    """The vocabulary a user asked for.

    Args:
      choice: "characters", "words", "bytes", or the path of a vocabulary file of the `tokenizers` package (JSON).
      training_text: what the vocabulary of characters or words is made from; the others do not look at it.

    Raises:
      ValueError: as `tokenizer` does.
    """
    if choice == "characters":
        return characters(training_text)
    if choice == "words":
        return words(training_text)
    return utf8_bytes() if choice == "bytes" else tokenizer(choice)


def characters(training_text: str) -> Vocabulary:
    """The sorted distinct characters of a text, and after them one token for any other character."""
    known = np.unique(_code_points(training_text))
    unknown = len(known)
    table = np.full(int(known[-1]) + 1 if unknown else 0, unknown, np.int32)
    table[known] = np.arange(unknown)

    def encode(text: str) -> np.ndarray:
        points = _code_points(text)
        tokens = np.full(len(points), unknown, np.int32)
        inside = points < len(table)
        tokens[inside] = table[points[inside]]
        return tokens

    return Vocabulary(unknown + 1, encode)


def words(training_text: str) -> Vocabulary:
    """The words that a text has at least twice, in small letters, and after them one token for any other.

    A word is a run of letters, digits and apostrophes; any other character that is no space is one by itself.
    """
    counts = Counter(_WORD.findall(training_text.lower()))
    known = {word: i for i, word in enumerate(sorted(word for word, count in counts.items() if count > 1))}
    unknown = len(known)

    def encode(text: str) -> np.ndarray:
        return np.asarray([known.get(word, unknown) for word in _WORD.findall(text.lower())], np.int32)

    return Vocabulary(unknown + 1, encode)


def utf8_bytes() -> Vocabulary:
    """The 256 bytes of UTF-8: any text, nothing unknown."""
    return Vocabulary(256, lambda text: np.frombuffer(text.encode("utf-8", _ERRORS), np.uint8).astype(np.int32))


def tokenizer(path: str | Path) -> Vocabulary:
    """A vocabulary file of the `tokenizers` package, without the special tokens it may add around a text.

    Raises:
      ValueError: if the package is not installed, or the file is not there or not one of its own.
    """
    _check_file(path)
    try:
        import tokenizers  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ValueError(
            f"vocabulary={str(path)!r} needs the package tokenizers, which is not installed: `pip install tokenizers`, "
            "or take vocabulary='characters', 'words' or 'bytes'"
        ) from None
    try:
        model = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(
            f"vocabulary={str(path)!r} is no vocabulary file of the package tokenizers ({error}): write one with its "
            "Tokenizer.save"
        ) from error
    return Vocabulary(
        model.get_vocab_size(), lambda text: np.asarray(model.encode(text, add_special_tokens=False).ids, np.int32)
    )


def identity(choice: str) -> str:
    """What tells vocabularies apart: "characters", "words", "bytes" or, whatever it is called, the sha256 of a file."""
    if choice in ("characters", "words", "bytes"):
        return choice
    return hashlib.sha256(_check_file(choice).read_bytes()).hexdigest()


def windows(tokens: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows for next-token prediction that do not overlap: y is x one token later.

    T tokens give ceil((T - 1) / length) windows, so each token but the first is predicted once; fewer than two give
    none. The end of the last window is padded with `PAD_LABEL` in y and with token 0 in x.

    Args:
      tokens: int[T].
      length: positions of a window.

    Returns:
      (x, y), each int32[number of windows, length].
    """
    checks.positive_int("sequence_length", length, "a window has at least one position")
    targets = max(len(tokens) - 1, 0)
    count = -(-targets // length)
    x = np.zeros(count * length, np.int32)
    y = np.full(count * length, PAD_LABEL, np.int32)
    x[:targets] = tokens[:targets]
    y[:targets] = tokens[1:]
    return x.reshape(count, length), y.reshape(count, length)


def all_windows(texts: Iterable[str], encode: Callable[[str], np.ndarray], length: int) -> tuple[dict, np.ndarray]:
    """The windows of several texts, none of which reaches into the next.

    Args:
      texts: the texts; one that is too short for a prediction has no windows.
      encode: of a `Vocabulary`.
      length: positions of a window.

    Returns:
      {"x", "y"}, each int32[number of windows, length], and int32[number of windows], the text of each window.

    Raises:
      ValueError: if there is no window at all.
    """
    pieces = [windows(encode(text), length) for text in texts]
    owner = np.repeat(np.arange(len(pieces), dtype=np.int32), [len(x) for x, _ in pieces])
    if not len(owner):
        raise ValueError(f"none of {len(pieces)} texts has two tokens, which one prediction needs: give longer ones")
    return {"x": np.concatenate([x for x, _ in pieces]), "y": np.concatenate([y for _, y in pieces])}, owner


def padded(rows: Sequence[np.ndarray], length: int, pad: int) -> np.ndarray:
    """Rows of tokens as one array int32[n, length]: cut after `length` tokens, filled up at the end with `pad`."""
    checks.positive_int("sequence_length", length, "a row has at least one position")
    out = np.full((len(rows), length), pad, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row[:length]
    return out


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", _ERRORS), np.uint32)


def _check_file(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise ValueError(
            f"vocabulary={str(path)!r} is none of 'characters', 'words' and 'bytes', nor a file that is there: name one"
        )
    return Path(path)
