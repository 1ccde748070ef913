"""What is kept of a teacher's word prediction: the grammar of the forms of ``lm_logits``.

``topK`` the K likeliest words; ``topKpP`` of these the fewest whose mass reaches .P, ``topKpPminM`` at least M of them; ``topKbandB`` the K
likeliest, and the mass of the others in B bands of ids; ``drawN`` N random draws, ``drawNtauX`` from the X / 100-th power of the
prediction; ``topHdrawM`` the H likeliest and M draws of the others; ``...xD`` D independent sets of draws; ``select`` chosen words.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

_FORM = re.compile(
    r"top(?P<top>[1-9]\d{0,7})(?:p(?P<nucleus>\d{0,8}[1-9])(?:min(?P<least>[1-9]\d{0,7}))?|band(?P<bands>[1-9]\d{0,7}))?"
    r"|(?:top(?P<head>[1-9]\d{0,7}))?draw(?P<draws>[1-9]\d{0,7})(?:tau(?P<tau>[1-9]\d{0,7}))?(?:x(?P<samples>[1-9]\d{0,7}))?"
)

MOST_DRAWS = 65_535
"""Draws of one set: their counts are kept in two bytes."""


@dataclass(frozen=True)
class WordForm:
    """A form of ``lm_logits``; as text it is the form itself."""

    top: int = 0
    """Likeliest words that are kept, at most."""
    nucleus: float = 1.0
    """Mass that the likeliest words need to reach and no further."""
    least: int = 1
    """Words that are kept although fewer reach the mass."""
    draws: int = 0
    """Words drawn in one set."""
    tau: float = 1.0
    """Power of the prediction that they are drawn from."""
    samples: int = 1
    """Independent sets of draws."""
    bands: int = 0
    """Parts of the vocabulary whose mass is kept beside the likeliest words."""

    def __post_init__(self) -> None:
        if self.least > self.top > 0:
            raise ValueError(f"{self}: at least {self.least} of at most {self.top} words are to be kept; expected no more than {self.top}")
        if self.draws > MOST_DRAWS:
            raise ValueError(f"{self}: expected at most {MOST_DRAWS} draws, found {self.draws}")
        if abs(self.tau * 100 - round(self.tau * 100)) > 1e-9:
            raise ValueError(f"tau: expected hundredths, such as 0.8 or 1.25, found {self.tau}")
        if self.top and self.tau != 1:
            raise ValueError(f"{self}: beside likeliest words the others are drawn as they are; leave tau out")

    @property
    def codec(self) -> Literal["topk", "draw", "topdraw", "topband"]:
        """Name of the codec that keeps it (store.codecs)."""
        if self.bands:
            return "topband"
        return "topk" if not self.draws else "topdraw" if self.top else "draw"

    @property
    def drawn(self) -> int:
        """Places of drawn words, of all sets together."""
        return self.draws * self.samples

    @property
    def ragged(self) -> bool:
        """Whether places stay unused, so that compression pays."""
        return self.nucleus < 1 or self.codec == "draw"

    def check(self, words: int) -> None:
        """Raise a ValueError unless a vocabulary of so many words has what is kept."""
        if self.top > words - (self.draws > 0):
            others = " with others to draw from" if self.draws else ""
            raise ValueError(f"{self}: the vocabulary has {words} words, fewer than {self} asks for{others}")
        if self.bands > words:
            raise ValueError(f"{self}: the vocabulary has {words} words; expected at most as many bands")

    def __str__(self) -> str:
        head = f"top{self.top}" if self.top else ""
        if self.bands:
            return f"{head}band{self.bands}"
        if not self.draws:
            share = f"{self.nucleus:.9f}".rstrip("0").removeprefix("0.") if self.nucleus < 1 else ""
            return head + (f"p{share}" if share else "") + (f"min{self.least}" if self.least > 1 else "")
        power = f"tau{round(self.tau * 100)}" if self.tau != 1 else ""
        return f"{head}draw{self.draws}{power}" + (f"x{self.samples}" if self.samples > 1 else "")


@lru_cache(maxsize=1024)
def word_form(text: str) -> WordForm | None:
    """The form that ``text`` names; None for ``select`` and for what is no form of word predictions.

    Raises:
        ValueError: its numbers contradict each other, or it has a shorter name.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        return None
    found = {name: int(value) for name, value in match.groupdict().items() if value and name != "nucleus"}
    form = WordForm(
        top=found.get("top", found.get("head", 0)),
        nucleus=float(f"0.{match['nucleus']}") if match["nucleus"] else 1.0,
        least=found.get("least", 1),
        draws=found.get("draws", 0),
        tau=found.get("tau", 100) / 100,
        samples=found.get("samples", 1),
        bands=found.get("bands", 0),
    )
    if str(form) != text:
        raise ValueError(f"the form {text} is written {form}")
    return form
