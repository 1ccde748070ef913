"""RKD: distances over their mean, and cosines of angles, in loops over pairs and triplets of different rows."""

from case import Case
from given import BERT, SMALL_LLAMA, Given, Reference, ref_huber
from torch import Tensor


def side(x: Tensor, i: int, j: int) -> Tensor:
    return x[i] - x[j]


def distance(x: Tensor, i: int, j: int) -> Tensor:
    return (side(x, i, j) ** 2).sum().sqrt()


def angle(x: Tensor, i: int, j: int, k: int) -> Tensor:
    return (side(x, j, i) / distance(x, i, j)) @ (side(x, k, i) / distance(x, i, k))


def rkd(s_site: str, t_site: str, distances: float, angles: float) -> Reference:
    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        s, t = g.S[s_site], g.T[t_site]
        pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
        means = [sum(distance(x, i, j) for i, j in pairs) / 20 for x in (s, t)]
        far = [ref_huber((distance(s, i, j) / means[0])[None], (distance(t, i, j) / means[1])[None]) for i, j in pairs]
        triplets = [(i, j, k) for i, j in pairs for k in range(5) if k not in (i, j)]
        turned = [ref_huber(angle(s, i, j, k)[None], angle(t, i, j, k)[None]) for i, j, k in triplets]
        terms = {}
        if distances:
            terms["distance"] = (distances * sum(far) / 4, 5.0)
        if angles:
            terms["angle"] = (angles * sum(turned) / 12, 5.0)
        return terms

    return reference


CASES: dict[str, Case] = {
    "rkd": Case("rkd", {}, rkd("final", "final", 1, 2), coupled=frozenset({"distance", "angle"})),
    "rkd hidden": Case(
        "rkd",
        {"pooling": "last", "student_layer": 1, "teacher_layer": 3, "distance": 25, "angle": 0},
        rkd("hidden.1", "hidden.3", 25, 0),
        sizes=(SMALL_LLAMA, BERT),
        coupled=frozenset({"distance"}),
    ),
}

CHANGES: list[tuple[str, dict[str, object]]] = [
    ("rkd", {"pooling": "first"}),
    ("rkd", {"student_layer": 1}),
    ("rkd", {"teacher_layer": 1}),
    ("rkd", {"distance": 0}),
    ("rkd", {"angle": 0}),
]

MODELS = [("rkd", {}, "bert", "classification"), ("rkd", {"pooling": "last"}, "llama", "causal_lm")]

LIVE = [("rkd", "mlm", {}), ("rkd", "class", {"pooling": "first"}), ("rkd", "causal", {"pooling": "last", "teacher_layer": 2})]

RUNS = [("rkd", {})]
