"""What is known of a teacher that another program ran: what its answers show, and what its configuration says."""

from store.features import FeatureSpec
from store.manifest import IMPORTED, PassInfo, Provenance
from store.shape import ModelShape, Wiring

FAMILY = "custom"
"""Nothing is derived for it, as nothing could be: no weights come with imported answers."""


def imported_pass(
    features: tuple[FeatureSpec, ...],
    *,
    vocab: int,
    width: int,
    model: str,
    dtype: str,
    made: Provenance,
    layers: int | None = None,
    known: ModelShape | None = None,
) -> PassInfo:
    """The description of a causal language model's answers.

    Args:
        width: Of its hidden states; 0 where none were kept and nothing else is known.
        dtype: Type that it ran in, or that its answers came in where nothing else is known.
        layers: How many blocks it has; by default as many as the highest one named, at least one.
        known: The shape that its configuration gives, in place of the above.

    Raises:
        ValueError: answers and configuration contradict each other.
    """
    named = max((spec.feature.layer or 0 for spec in features), default=0)
    blocks = known.layers if known is not None else layers if layers is not None else max(named, 1)
    if named > blocks:
        raise ValueError(f"features name block {named}, the teacher has {blocks}")
    if known is not None and (layers not in (None, known.layers) or vocab != known.vocab or width not in (0, known.width)):
        found = f"{layers or known.layers} blocks of width {width or known.width} and {vocab} words"
        raise ValueError(
            f"the teacher's configuration has {known.layers} blocks of width {known.width} and {known.vocab} words; "
            f"what is imported has {found}"
        )
    shape = ModelShape(
        family=FAMILY,
        head="causal_lm",
        layers=blocks,
        width=width if known is None else known.width,
        heads=0 if known is None else known.heads,
        kv_heads=0 if known is None else known.kv_heads,
        head_width=0 if known is None else known.head_width,
        vocab=vocab,
        causal=True,
        pre_norm=False,
        windows=(None,) * blocks if known is None else known.windows,
        attends=False,
    )
    return PassInfo(
        teacher=IMPORTED,
        model=model,
        dtype=dtype,
        shape=shape,
        wiring=Wiring(),
        requested=tuple(spec.key for spec in features),
        features=features,
        statics=(),
        shipped=False,
        made=made,
    )
