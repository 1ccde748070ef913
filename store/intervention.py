"""What is written into a teacher while it answers: hidden states of each row's partner (interchange interventions)."""

from typing import Annotated

from pydantic import Field

from store.strict import Many, Strict

Blocks = Annotated[Many[Annotated[int, Field(ge=1)]], Field(min_length=1)]


class Intervention(Strict):
    """Each row takes hidden states of its partner in the places that its plan names (store.pairs)."""

    layers: Many[Blocks] = Field(min_length=1)
    """Alternatives, one of which the draw of a pair chooses: blocks, counted from 1, whose output is written; the other row's own
    output of the same block, as it was without intervention."""

    def check(self, where: str, layers: int) -> None:
        """Refuse blocks that a model of so many does not have, or that come twice in an alternative; raises ValueError."""
        for blocks in self.layers:
            if max(blocks) > layers or len(set(blocks)) < len(blocks):
                raise ValueError(f"{where}: intervention: layers: expected different blocks from 1 to {layers}, found {list(blocks)}")
