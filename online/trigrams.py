"""A model that mixes the word embeddings of neighbouring tokens (MobileBERT's trigrams): what it meets beyond the ends of a text.

Shapes: B rows, T padded tokens, E width of a word embedding.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from online.batch import Batch


@contextmanager
def empty_padding(model: PreTrainedModel, batch: Batch) -> Iterator[None]:
    """Inside, word embeddings of padding are zeros, which are what ``model`` puts before and after a text that fills its row.

    They would be the padding token's embedding, and the last token of a row would depend on whether the batch pads it. (That
    embedding starts as zeros; a head that is tied to it moves it, and then transformers' own answers do depend on padding.)

    Raises:
        ValueError: packed documents, whose outermost tokens would be mixed with those of the next document.
    """
    if batch.documents is not None:
        raise ValueError("packed documents: trigram_input mixes the words of neighbouring documents; expected rows of one document")

    def emptied(module: nn.Module, args: object, words_BTE: Tensor) -> Tensor:
        return words_BTE * batch.mask[..., None]

    handle = model.get_input_embeddings().register_forward_hook(emptied)
    try:
        yield
    finally:
        handle.remove()
