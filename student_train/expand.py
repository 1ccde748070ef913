"""A student that keeps only some words as a plain Hugging Face folder with all of them: no program needs to know of its map.

Shapes: V words of the tokenizer.
"""

import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from online.kept_words import KeptWords, unmap_words
from online.models import LoadedModel
from online.quiet import quiet
from store.publish import sync_file, sync_folder
from student_train.export import check_tokenizer
from student_train.vocabulary import take_rows

UNLIKELY = -1e4
"""What is added to the logit of a dropped word where the head has a bias: its probability is 0 in every dtype."""


def expand(student: LoadedModel, folder: Path) -> None:
    """Write ``student``, which is changed, to ``folder`` with a row for each of the tokenizer's words, as many as before it was compressed.

    A dropped word has the row of the kept one that stands for it, so the model gives the same for the same ids. Its own logit is that
    of its stand-in, lowered by 10,000 where the head has a bias: a softmax over all words is then the student's over its kept ones. A
    head without a bias cannot say so; there the generation settings name the dropped words (``suppress_tokens``), and whoever reads
    logits otherwise must leave them out. GLMD's code repeats the row and compares kept words alone.

    Raises:
        ValueError: the student keeps all words, so that its folder is such a one already.
    """
    model = student.model
    words = unmap_words(model)
    if words is None:
        raise ValueError("the student has all words: its folder is a plain Hugging Face folder as it is, so there is nothing to expand")
    take_rows(model, student.shape.head, words.places)
    _make_unlikely(model, student, words)
    writing = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    with quiet():
        model.save_pretrained(writing)
    if student.tokenizer is not None:
        student.tokenizer.save_pretrained(str(writing))
        check_tokenizer(writing, student.tokenizer)
    (writing / "README.md").write_text(_card(words, model), encoding="utf-8")
    for path in writing.iterdir():
        sync_file(path)
    sync_folder(writing)
    writing.rename(folder)
    sync_folder(folder.parent)


def _make_unlikely(model: PreTrainedModel, student: LoadedModel, words: KeptWords) -> None:
    head = student.word_head
    if head is None:
        return
    dropped = torch.ones(words.words, dtype=torch.bool)
    dropped[words.kept] = False
    bias = getattr(head, "bias", None)
    if bias is not None:
        with torch.no_grad():
            bias[dropped] = UNLIKELY
    elif model.can_generate():
        settings = model.generation_config or GenerationConfig()
        settings.suppress_tokens = dropped.nonzero().squeeze(1).tolist()
        model.generation_config = settings


def _card(words: KeptWords, model: PreTrainedModel) -> str:
    return (
        f"# Expanded\n\nA student of TeacherCache's student-train that knows {len(words.kept):,} of {words.words:,} words, written with a "
        f"row for each of them ({model.num_parameters():,} parameters) so that any program runs it. The row of a dropped word repeats that "
        "of the word that stands for it: training this folder further would let them drift apart. The student's own folder, or its ONNX "
        "file, is the smaller model.\n"
    )
