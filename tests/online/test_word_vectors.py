"""Neighbours are those of the largest cosine, and a file of any size is read in bounded memory."""

import gzip
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from online.word_vectors import WordVectors, WordVectorsSpec

NAMES = [first + second for first in "abcdefgh" for second in "klmnop"]


def read(path: Path, words: int = 100_000) -> WordVectors:
    return WordVectors.read(WordVectorsSpec(file=path, words=words))


def lines(vectors: dict[str, list[float]]) -> str:
    return "".join(f"{word} {' '.join(map(str, vector))}\n" for word, vector in vectors.items())


@pytest.fixture
def vectors() -> dict[str, list[float]]:
    draw = np.random.default_rng(5)
    return {name: (draw.normal(size=7) * draw.uniform(0.1, 9)).tolist() for name in NAMES}


def test_the_nearest_words_have_the_largest_cosines(tmp_path: Path, vectors: dict[str, list[float]]) -> None:
    (tmp_path / "v.txt").write_text(lines(vectors))
    found = read(tmp_path / "v.txt")

    def cosine(one: str, other: str) -> float:
        dot = sum(a * b for a, b in zip(vectors[one], vectors[other], strict=True))
        return dot / math.sqrt(sum(a * a for a in vectors[one]) * sum(b * b for b in vectors[other]))

    for name in NAMES:
        expected = sorted((other for other in NAMES if other != name), key=lambda other: -cosine(name, other))
        assert found.nearest(name, 15) == tuple(expected[:15])
    assert len(found.nearest(NAMES[0], 1000)) == len(NAMES) - 1


def test_equal_neighbours_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text(lines({"b": [1, 0], "d": [0, 1], "c": [0, 2], "a": [0, 3], "e": [1, 1]}))
    assert read(tmp_path / "v.txt").nearest("b", 5) == ("e", "d", "c", "a")


def test_a_word_is_looked_up_as_it_stands_and_then_in_small_letters(tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text(lines({"paris": [1, 0], "Rome": [1, 0.1], "rome": [0, 1], "milan": [0.1, 1], "london": [1, 0.05]}))
    found = read(tmp_path / "v.txt")
    assert found.nearest("Paris", 1) == found.nearest("PARIS", 1) == ("london",)
    assert found.nearest("Rome", 1) == ("london",)
    assert found.nearest("ROME", 1) == ("milan",)
    assert found.nearest("oslo", 3) == ()


def test_what_is_no_word_is_neither_offered_nor_found(tmp_path: Path) -> None:
    """Words of letters alone; the first of two vectors; no vector of zeros; a header, spaces in words, and spaces at the end of lines."""
    text = "9 2\nriver 1 0 \n, 1 0\n2nd 1 0\nnew york 1 0\ntwo\u2028lines 1 0\ncity 1 1\nriver 0 1\nnil 0 0\nsea 1 0.5"
    (tmp_path / "v.vec").write_bytes(text.encode())
    (tmp_path / "v.vec.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("v.vec", "v.vec.gz"):
        found = read(tmp_path / name)
        assert found.nearest("river", 9) == ("sea", "city")
        assert found.nearest("nil", 9) == found.nearest("2nd", 9) == ()


def test_only_the_first_words_are_read_and_only_they_are_held(tmp_path: Path) -> None:
    row = " ".join(["0.123456"] * 60)
    path = tmp_path / "v.txt"
    with path.open("w") as file:
        for number in range(30_000):
            file.write(f"{'w' * (number % 7 + 1)}{'abcdefghij'[number % 10]} {row}\n")
        file.write("no numbers\n")
    tracemalloc.start()
    found = read(path, words=200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6  # the file has 16 MB
    assert found.nearest("wa", 1) == ("wwb",)
    with pytest.raises(ValueError, match="line 30001: expected a word and 60 finite numbers"):
        read(path)


def test_the_fingerprint_is_of_the_lines_that_were_read(tmp_path: Path, vectors: dict[str, list[float]]) -> None:
    (tmp_path / "v.txt").write_text(lines(vectors))
    (tmp_path / "more.txt").write_text(lines(vectors | {"zz": [1.0] * 7}))
    (tmp_path / "other.txt").write_text(lines(vectors | {NAMES[3]: [1.0] * 7}))
    first = read(tmp_path / "v.txt", words=len(NAMES)).fingerprint
    assert read(tmp_path / "more.txt", words=len(NAMES)).fingerprint == first
    assert read(tmp_path / "more.txt").fingerprint != first
    assert read(tmp_path / "other.txt").fingerprint != first


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected words with vectors in .*, found none"),
        ("river\n", "line 1: expected a word and numbers, between single spaces, found 'river'"),
        ("river 1 x\n", "line 1: expected a word and 2 finite numbers"),
        ("river 1 nan\n", "line 1: expected a word and 2 finite numbers"),
        ("river 1 2\nsea 1\n", "line 2: expected a word and 2 finite numbers, between single spaces, found 'sea 1'"),
        ("river 1e999 2\n", "line 1: expected a word and 2 finite numbers"),
        ("a" * (1 << 20) + " 1\n", "line 1: .* found more than 1,048,576 letters"),
        (b"\xff\xfe 1\n", "cannot be read"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, text: str | bytes, said: str) -> None:
    (tmp_path / "v.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=said):
        read(tmp_path / "v.txt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"word vectors .*nowhere\.txt cannot be read"):
        read(tmp_path / "nowhere.txt")
