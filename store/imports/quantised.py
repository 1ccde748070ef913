"""The bytes in which DistillKit keeps the log-probabilities of one position, and how to read them.

In order: the ``exact_k`` likeliest; the coefficients of a curve through the others; and for each bin of the others a
scale and whole numbers of a few bits, what the curve is off by. Word ids stand beside them as ``ceil(log2 d)`` bits each,
the highest bit first.

Shapes: n positions, K words, E exact ones, A = K - E others, P terms of the curve.
Source: arcee-ai/DistillKit at a61c2e7, ``distillkit/compression`` (the options are those of its configuration file).
"""

from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from store.codecs.cast import restore, round_to
from store.features import Dtype
from store.strict import Strict

Number = Literal["float16", "bfloat16", "float32", "float64"]
_BYTES: dict[Number, int] = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class Bin(Strict):
    """Some of the others, in a few bits each."""

    scale_dtype: Number
    element_bits: int = Field(ge=1, le=64)
    num_elements: int = Field(ge=1, le=1 << 16)

    @property
    def packed(self) -> int:
        return -(-self.element_bits * self.num_elements // 8)


class Quantisation(Strict):
    """DistillKit's ``logprob_compressor``, as it stands in ``compression_config.yaml`` beside the Parquet files."""

    d: int = Field(ge=2, le=1 << 24)
    """Words of the vocabulary."""
    k: int = Field(ge=1, le=1 << 16)
    exact_k: int = Field(ge=0)
    exact_dtype: Number = "float32"
    polynomial_terms: tuple[Literal["sqrt", "exp"] | int, ...] | None = None
    term_dtype: Number = "float32"
    residual_bins: tuple[Bin, ...] = ()
    delta_encoding: bool = True
    error_diffusion: bool = False
    """Says how numbers were rounded, not how to read them."""
    normalize_t: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.exact_k > self.k or sum(one.num_elements for one in self.residual_bins) > self.k - self.exact_k:
            raise ValueError(f"expected exact_k and the elements of residual_bins within k, found {self.exact_k} of {self.k}")
        if self.exact_k < self.k and not self.polynomial_terms and not self.residual_bins:
            raise ValueError("exact_k below k needs polynomial_terms or residual_bins")
        return self

    @property
    def id_bits(self) -> int:
        return int(np.ceil(np.log2(np.float32(self.d))))

    @property
    def id_bytes(self) -> int:
        """Bytes of the ids of one position."""
        return -(-self.k * self.id_bits // 8)

    @property
    def value_bytes(self) -> int:
        """Bytes of the log-probabilities of one position."""
        bins = sum(_BYTES[one.scale_dtype] + one.packed for one in self.residual_bins)
        return self.exact_k * _BYTES[self.exact_dtype] + len(self.polynomial_terms or ()) * _BYTES[self.term_dtype] + bins


def word_ids(bytes_nB: NDArray[np.uint8], form: Quantisation) -> NDArray[np.int64]:
    """[n, K] the ids in ``bytes_nB`` [n, id_bytes]."""
    return _integers(bytes_nB, form.id_bits, form.k)


def log_probs(bytes_nB: NDArray[np.uint8], form: Quantisation) -> NDArray[np.float64]:
    """[n, K] the log-probabilities in ``bytes_nB`` [n, value_bytes].

    The curve is evaluated in the type of its coefficients, because its writer measured what it is off by there;
    everything else is float64.
    """
    start = 0

    def taken(number: Number, count: int) -> NDArray[np.float64]:
        nonlocal start
        stop = start + count * _BYTES[number]
        values = np.ascontiguousarray(bytes_nB[:, start:stop]).view(np.dtype("<u2" if number == "bfloat16" else number).newbyteorder("<"))
        start = stop
        with np.errstate(invalid="ignore"):  # what is not finite is refused with the place where it stands
            return (restore(values, "bfloat16") if number == "bfloat16" else values).astype(np.float64)

    exact_nE = taken(form.exact_dtype, form.exact_k)
    others_nA = np.zeros((len(bytes_nB), form.k - form.exact_k))
    if form.polynomial_terms:
        others_nA += _curve(taken(form.term_dtype, len(form.polynomial_terms)), form)
    first = 0
    for one in form.residual_bins:
        scale_n1 = taken(one.scale_dtype, 1)
        numbers = _integers(bytes_nB[:, start : start + one.packed], one.element_bits, one.num_elements)
        start += one.packed
        centred = numbers * 2.0 - 1.0 if one.element_bits == 1 else numbers - float(1 << (one.element_bits - 1))
        others_nA[:, first : first + one.num_elements] += centred * scale_n1
        first += one.num_elements
    found_nK = np.concatenate([exact_nE, others_nA], axis=1)
    return np.cumsum(found_nK, axis=1) if form.delta_encoding else found_nK


def _curve(terms_nP: NDArray[np.float64], form: Quantisation) -> NDArray[np.float64]:
    """[n, A] sum of the terms at t = 0, 1, ... (or evenly from 0 to 1)."""
    count = form.k - form.exact_k
    t_A = _rounded(np.linspace(0, 1, count) if form.normalize_t else np.arange(count, dtype=np.float64), form.term_dtype)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        powers = [np.sqrt(t_A) if term == "sqrt" else np.exp(t_A) if term == "exp" else t_A**term for term in form.polynomial_terms or ()]
        design_AP = _rounded(np.stack(powers, axis=1), form.term_dtype)
        products_nAP = _rounded(design_AP * terms_nP[:, None, :], form.term_dtype)
    return _rounded(products_nAP.sum(2), form.term_dtype)


def _rounded(values: NDArray[np.float64], number: Number) -> NDArray[np.float64]:
    if number == "float64":
        return values
    dtype: Dtype = number
    return restore(round_to(values, dtype), dtype).astype(np.float64)


def _integers(bytes_nB: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int64]:
    """[n, count] whole numbers of ``bits`` bits, the highest first."""
    found = np.zeros((len(bytes_nB), count), np.int64)
    stream = np.unpackbits(bytes_nB, axis=1)[:, : bits * count].reshape(len(bytes_nB), count, bits)
    for bit in range(bits):
        found = (found << 1) | stream[:, :, bit]
    return found


def settings(tree: Any, where: str) -> Any:  # noqa: ANN401
    """The codec's part of a DistillKit configuration: the file beside the data, or that of a training run."""
    if isinstance(tree, dict) and isinstance(tree.get("teacher"), dict):
        tree = tree["teacher"]
    if isinstance(tree, dict) and "legacy_logit_compression" in tree:
        raise ValueError(f"{where}: {LEGACY}")
    return tree.get("logprob_compressor", tree) if isinstance(tree, dict) else tree


LEGACY = (
    "DistillKit's legacy form keeps logits less their mean, from which no probability follows: without the mass of all words "
    "there is nothing to learn from; capture again with its logprob_compressor, or dump the teacher with teacher-dump run"
)
