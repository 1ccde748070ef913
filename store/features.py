"""The words for features: where in a model (site), for which tokens (positions), in what form.

``bert/hidden.6@all`` is the output of block 6 for every token of a row, as teacher pass ``bert`` answered it;
``bert/lm_logits@labels:top64`` its 64 likeliest words, with their tail mass, at the tokens that carry a label.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal, Self

from pydantic import Field, model_validator

from store.forms import word_form
from store.strict import Many, Strict, did_you_mean

SITES: dict[str, str] = {
    "hidden": "output of block i; hidden.0 is the embedding output",
    "final": "after the last norm",
    "input": "the tensor that enters block i's query and key projections, and with few exceptions (MobileBERT) the value projection",
    "query": "query projection output of block i, before rotary embedding and query norm",
    "key": "key projection output of block i, before rotary embedding and key norm",
    "value": "value projection output of block i",
    "attention_scores": "scaled scores of block i after rotary embedding; masked pairs hold the lowest finite number",
    "attention_probs": "attention probabilities of block i, before dropout",
    "head_input": "the tensor that the language-model head multiplies",
    "lm_logits": "word logits",
    "task_logits": "task logits: per row (classification, choice) or per token (token classification)",
}
LAYERED = frozenset({"hidden", "input", "query", "key", "value", "attention_scores", "attention_probs"})

POSITIONS: dict[str, str] = {
    "all": "every token that is not padding, special tokens included",
    "first": "the row's first token (BERT's [CLS])",
    "last": "the row's last token that is not padding",
    "mean": "the mean over the row's tokens",
    "masked": "the tokens chosen for masked-language-model prediction",
    "labels": "the tokens whose logits are scored against a label",
    "row": "the row as a whole",
}
"""And ``leftN``: the row's first N tokens as one value, N times as wide; zeros where the row is shorter."""
PER_ROW = frozenset({"first", "last", "mean", "row"})
VECTORS = SITES.keys() - {"attention_scores", "attention_probs", "lm_logits", "task_logits"}
"""Sites with a hidden vector for each token, of which ``leftN`` and the form ``widthM`` keep a part."""

_KEY = re.compile(
    r"(?:(?P<pass_name>[A-Za-z0-9][A-Za-z0-9_-]*)/)?(?P<site>[a-z_]+)(?:\.(?P<layer>\d+))?"
    r"(?:@(?P<positions>[a-z]+\d*))?(?::(?P<form>[a-z][a-z0-9]*))?"
)
_WIDTH, _LEFT = re.compile(r"width([1-9]\d*)"), re.compile(r"left([1-9]\d*)")


@dataclass(frozen=True, order=True)
class FeatureKey:
    """Name of one tensor: ``pass/site.layer@positions:form``.

    ``pass_name`` is empty for a student's feature and for a teacher's until the recipe names the pass. ``form`` is
    empty for the values themselves; of word logits ``topK`` is the K likeliest words with their tail mass, ``drawN`` and ``topHdrawM``
    have random words (store.forms), and ``select`` has the logits of chosen words and of the true one with the log-sum-exp of all;
    ``widthM`` (hidden vectors only) is M numbers of each vector, those that ``neurons`` names.
    """

    site: str
    layer: int | None = None
    positions: str = "all"
    form: str = ""
    pass_name: str = ""

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise ValueError(f"unknown feature {self.site!r}{did_you_mean(self.site, sorted(SITES))}")
        if (self.layer is None) == (self.site in LAYERED):
            raise ValueError(
                f"{self.site!r} needs a layer, as in {self.site}.1"
                if self.site in LAYERED
                else f"{self.site!r} has no layers, found {self.site}.{self.layer}"
            )
        if self.positions not in POSITIONS and not (self.leftmost and self.site in VECTORS):
            also = "; hidden vectors also have leftN, such as left10"
            raise ValueError(f"unknown positions {self.positions!r} of {self.site}{did_you_mean(self.positions, sorted(POSITIONS))}{also}")
        if self.form and not ((self.words and self.site == "lm_logits") or (self.kept and self.site in VECTORS)):
            raise ValueError(
                f"unknown form {self.form!r} of {self.site}: lm_logits has topK (such as top64), topKpP (top64p95), drawN (draw50), "
                "topHdrawM (top4draw9), topKbandB (top6band12) and select, hidden vectors have widthM (width64)"
            )

    def __str__(self) -> str:
        form = f":{self.form}" if self.form else ""
        return f"{f'{self.pass_name}/' if self.pass_name else ''}{self.name}@{self.positions}{form}"

    @property
    def name(self) -> str:
        """Site and layer: ``hidden.6``."""
        return self.site if self.layer is None else f"{self.site}.{self.layer}"

    @property
    def per_row(self) -> bool:
        """Whether a row holds one value instead of one for each of its tokens."""
        return self.positions in PER_ROW or self.leftmost > 0

    @property
    def unit(self) -> str:
        """What it has a value for, for people: ``row``, ``token`` or ``labelled token``."""
        if self.per_row:
            return "row"
        return "token" if self.positions == "all" else "labelled token"

    @property
    def leftmost(self) -> int:
        """N of the positions ``leftN``; 0 for others."""
        match = _LEFT.fullmatch(self.positions)
        return int(match[1]) if match else 0

    @property
    def words(self) -> bool:
        """Whether its form is one of word predictions."""
        return self.form == "select" or word_form(self.form) is not None

    @property
    def kept(self) -> int:
        """M of the form ``widthM``; 0 for others."""
        match = _WIDTH.fullmatch(self.form)
        return int(match[1]) if match else 0

    def of(self, pass_name: str) -> "FeatureKey":
        """The same feature as answered by ``pass_name``."""
        return replace(self, pass_name=pass_name)

    def at(self, positions: str) -> "FeatureKey":
        """The same site for other tokens."""
        return replace(self, positions=positions)

    @classmethod
    def parse(cls, text: str) -> "FeatureKey":
        """Read ``pass/site.layer@positions:form``; pass, positions (``row`` for task_logits, else ``all``) and form may be left out."""
        match = _KEY.fullmatch(text)
        if not match:
            raise ValueError(f"expected a feature such as hidden.6@all, found {text!r}")
        site, layer = match["site"], match["layer"]
        default = "row" if site == "task_logits" else "all"
        return cls(
            site, None if layer is None else int(layer), match["positions"] or default, match["form"] or "", match["pass_name"] or ""
        )


def neurons(width: int, kept: int) -> list[int]:
    """Which of ``width`` numbers the form ``widthM`` keeps, for M = ``kept``: number i * width / M, rounded down, for i from 0 to M - 1.

    Evenly spaced, so that no draw has to be stored (Liu et al. 2021, arXiv 2106.05691: uniform masks).

    Raises:
        ValueError: there are not so many.
    """
    if not 1 <= kept <= width:
        raise ValueError(f"width{kept}: expected 1 to {width} numbers, all that there are")
    return [number * width // kept for number in range(kept)]


Dtype = Literal["float32", "float16", "bfloat16", "float8_e4m3fn", "float64", "int32", "int8", "uint16", "uint8"]

StoreDtype = Literal["float32", "float16", "bfloat16", "int8", "float8"]
"""Types that the numbers of a feature are kept in; int8 and float8 (e4m3fn) have a float32 scale for each unit."""

Compression = Literal["none", "zstd"]

MANTISSA: dict[str, int] = {"float32": 23, "float16": 10, "bfloat16": 7}
"""Bits after the leading one in types that can be kept with fewer."""


MOST_WIDTH = 1 << 24
"""Numbers of one unit of an array: sixty times the largest vocabulary."""


class ArraySpec(Strict):
    """One array of a stored feature, [slots * slot_tokens, width]. ``name`` is empty where a feature has only one."""

    name: str = Field(max_length=200)
    dtype: Dtype
    width: int = Field(ge=1, le=MOST_WIDTH)
    compression: Compression = "none"
    """Of its inner chunks: Zarr's codec ``blosc`` with zstd behind a bit shuffle."""
    keep_bits: int | None = Field(default=None, ge=1, le=22)
    """Mantissa bits that its numbers were rounded to before they were stored, to nearest even; all by default."""
    bits: int | None = Field(default=None, ge=8, le=24)
    """Of each word id where ids are packed into the bytes of the array (store.codecs.ids)."""

    @model_validator(mode="after")
    def _packed(self) -> Self:
        if self.bits is not None and (self.dtype != "uint8" or self.width * 8 < self.bits):
            raise ValueError(f"array {self.name}: ids of {self.bits} bits lie in uint8, {-(-self.bits // 8)} or more")
        return self

    @property
    def numbers(self) -> int:
        """Numbers that it stands for in each unit."""
        return self.width if self.bits is None else self.width * 8 // self.bits


class FeatureSpec(Strict):
    """A feature as stored: its arrays, and the codec that turns them back into what was captured.

    What is read back differs from each captured number x by at most ``error * |x| + error_of_largest * m``, m the largest
    magnitude of its unit (token or row), where the numbers are normal ones.
    """

    key: str = Field(max_length=200)
    codec: Literal["cast", "topk", "select", "int8", "float8", "draw", "topdraw", "topband"]
    arrays: Many[ArraySpec]
    ids: Many[int] = ()
    """Vocabulary ids kept by ``select``, in order."""
    error: float = Field(ge=0)
    """Declared bound of the codec's rounding error, relative to the element."""
    error_of_largest: float = Field(default=0.0, ge=0)
    """The rest of the bound, relative to the largest magnitude of the unit."""

    @model_validator(mode="after")
    def _of_codec(self) -> Self:
        names = tuple(array.name for array in self.arrays)
        if names not in _ARRAYS[self.codec]:
            raise ValueError(f"codec {self.codec} of {self.key} has no arrays {names}")
        return self

    @property
    def feature(self) -> FeatureKey:
        return FeatureKey.parse(self.key)

    @property
    def exact(self) -> bool:
        """Whether what is read back is what was captured."""
        return self.error == self.error_of_largest == 0

    @property
    def unit_bytes(self) -> int:
        """Stored bytes for one token (one row where the key is per row) without compression, checksums left out."""
        return sum(array.width * ITEM_BYTES[array.dtype] for array in self.arrays)

    @property
    def compressed(self) -> bool:
        """Whether any of its arrays is."""
        return any(array.compression != "none" for array in self.arrays)

    @property
    def kept_as(self) -> str:
        """How its numbers are kept, for people: ``bfloat16 of 4 bits, zstd``."""
        numbers = self.numbers
        bits = f" of {numbers.keep_bits} bits" if numbers.keep_bits else ""
        return f"{numbers.dtype}{bits}, zstd" if self.compressed else f"{numbers.dtype}{bits}"

    @property
    def numbers(self) -> ArraySpec:
        """The array in the type that was asked for; of draws without weights their counts."""
        others = [array for array in self.arrays if array.name != "ids"]
        return next((array for array in others if array.name == "log_weights"), others[0])

    @property
    def at_most(self) -> str:
        """What to say before its bytes, for people: forms that leave places unused take less once compressed."""
        form = word_form(self.feature.form)
        return "at most " if self.compressed and form is not None and form.ragged else ""


_ARRAYS: dict[str, tuple[tuple[str, ...], ...]] = {
    "cast": (("",),),
    "topk": (("ids", "log_probs", "log_tail"),),
    "draw": (("ids", "counts"), ("ids", "counts", "log_weights")),
    "topdraw": (("ids", "log_probs", "log_tail"),),
    "topband": (("ids", "log_probs", "bands"),),
    "select": (("logits", "true_logit", "log_sum_exp"), ("true_logit", "log_sum_exp")),
    "int8": (("values", "scale"),),
    "float8": (("values", "scale"),),
}
"""Names of the arrays that each codec can have."""

ITEM_BYTES: dict[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "int32": 4,
    "int8": 1,
    "uint16": 2,
    "uint8": 1,
}
