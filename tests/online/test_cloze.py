"""A masked word is answered as the model alone would answer it, in whole words."""

import re

import pytest
import torch
from tiny_cloze import LENGTH, OTHERS, WORDS, likeliest, make_model, make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from online.cloze import BATCH_TOKENS, Cloze, whole_words
from online.models import LoadedModel

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return make_model(make_tokenizer())


def spans(text: str) -> list[tuple[int, int]]:
    return [match.span() for match in re.finditer(r"\w+", text)]


def test_answers_are_the_likeliest_whole_words_in_the_unpadded_text(loaded: LoadedModel) -> None:
    """Texts of several lengths in one call; golden values in float64, one word at a time."""
    texts = ["The old river", "green", "people in the small new city , and the great house of light . " * 2, "Rivers of unknown stone"]
    found = Cloze(loaded, CPU, LENGTH).answers(texts, [spans(text) for text in texts], 5)
    for text, answers in zip(texts, found, strict=True):
        tokens = loaded.tokenizer.tokenize(text)
        expected = []
        for place, token in enumerate(tokens):
            if token in (",", ".") or token.startswith("##"):
                continue
            cut = tokens[place + 1 : place + 2] == ["##s"]
            expected.append(None if cut else likeliest(loaded, tokens, place, WORDS, 5))
        assert answers == expected
    assert found[3][0] is None, "rivers is two pieces"
    assert found[3][2] is not None, "an unknown word is one token"


def test_words_beyond_the_last_token_that_the_model_sees_are_not_answered(loaded: LoadedModel) -> None:
    text = "old river rivers stone house"
    answers = Cloze(loaded, CPU, 5).answers([text], [spans(text)], 3)[0]  # [CLS] old river river [SEP]: rivers is cut
    seen = ["old", "river", "river"]
    assert answers == [likeliest(loaded, seen, 0, WORDS, 3), likeliest(loaded, seen, 1, WORDS, 3), None, (), ()]


def test_many_batches_answer_like_one_word_alone(loaded: LoadedModel) -> None:
    texts = [f"{first} {second} stone" for first in WORDS for second in WORDS]
    assert len(texts) * 16 > BATCH_TOKENS, "otherwise one batch takes all"
    found = Cloze(loaded, CPU, LENGTH).answers(texts, [[(0, text.index(" "))] for text in texts], 4)
    for number in range(0, len(texts), 53):
        assert found[number] == [likeliest(loaded, texts[number].split(), 0, WORDS, 4)]


def test_more_words_than_there_are_is_all_of_them(loaded: LoadedModel) -> None:
    [[answer]] = Cloze(loaded, CPU, LENGTH).answers(["river"], [[(0, 5)]], 1000)
    assert answer is not None
    assert sorted(answer) == sorted(WORDS)


def test_pieces_numbers_signs_and_special_tokens_are_no_words() -> None:
    tokenizer = make_tokenizer()
    assert list(whole_words(tokenizer, len(tokenizer)).values()) == WORDS
    first = tokenizer.convert_tokens_to_ids("river")
    assert list(whole_words(tokenizer, first + 1).values()) == WORDS[: WORDS.index("river") + 1], "a model may have fewer words"
    assert set(OTHERS).isdisjoint(whole_words(tokenizer, len(tokenizer)).values())


def byte_level(trim: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the words " old" and " river", and the pieces of "river" without a space."""
    merges = [("r", "i"), ("v", "e"), ("ve", "r"), ("ri", "ver"), ("Ġ", "river"), ("o", "l"), ("ol", "d"), ("Ġ", "old")]
    names = [*"abcdefghijklmnopqrstuvwxyz", "Ġ", *("".join(merge) for merge in merges), "<pad>", "<mask>", "<unk>"]
    vocabulary = {name: number for number, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", mask_token="<mask>", unk_token="<unk>")


def test_words_of_a_byte_level_tokenizer_are_those_that_follow_a_space() -> None:
    tokenizer = byte_level(trim=True)
    assert sorted(whole_words(tokenizer, len(tokenizer)).values()) == ["old", "river"]


@pytest.mark.parametrize("trim", [True, False])
def test_a_token_that_takes_the_space_before_its_word_is_the_word(trim: bool) -> None:
    loaded = make_model(byte_level(trim))
    text = "a river rivers"  # a, Ġriver, Ġriver, s
    answers = Cloze(loaded, CPU, LENGTH).answers([text], [spans(text)], 1)[0]
    assert [answer is not None and len(answer) for answer in answers] == [1, 1, False]


def test_a_token_that_takes_more_than_the_word_is_not_the_word() -> None:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "[MASK]": 1, "river": 2, "river,": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    loaded = make_model(PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="[MASK]", unk_token="[UNK]", pad_token="[UNK]"))
    assert Cloze(loaded, CPU, LENGTH).answers(["river, river"], [[(0, 5), (7, 12)]], 1) == [[None, ("river",)]]


def test_what_a_model_cannot_answer_for_is_refused(loaded: LoadedModel) -> None:
    model = loaded.model
    with pytest.raises(ValueError, match="needs a fast tokenizer"):
        Cloze(LoadedModel.of(model, "masked_lm"), CPU, LENGTH)
    with pytest.raises(ValueError, match="needs a mask token, and this tokenizer has none"):
        Cloze(LoadedModel.of(model, "masked_lm", make_tokenizer(mask=False)), CPU, LENGTH)
    with pytest.raises(ValueError, match=f"max_length: bert takes rows of up to {LENGTH} tokens, found {LENGTH + 1}"):
        Cloze(loaded, CPU, LENGTH + 1)
    signs = Tokenizer(models.WordLevel({"[MASK]": 0, "[UNK]": 1, "7": 2}, unk_token="[UNK]"))
    numbers = PreTrainedTokenizerFast(tokenizer_object=signs, mask_token="[MASK]", unk_token="[UNK]", pad_token="[UNK]")
    with pytest.raises(ValueError, match="needs tokens that are whole words, and this tokenizer has none"):
        Cloze(LoadedModel.of(model, "masked_lm", numbers), CPU, LENGTH)
