"""What is known of which method to take: conditions, the advice they lead to, and who says so. All of it is in RULES.

Nothing here is a forecast: a rule says what others have measured, or we ourselves, and on what. Where two papers have no common
measurement, the order of their rules is ours: what needs the fewest assumptions first. docs/choosing.md says the same as a page.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from store.shape import ModelShape

Task = Literal["classification", "regression", "masked_lm", "causal_lm"]
TASKS: tuple[Task, ...] = get_args(Task)
About = Literal["method", "start", "features", "order", "caution"]
Start = Literal["first", "every", "random"]
"""Blocks that a student of the teacher's width starts from: the first ones, every n-th, or none."""

Methods = tuple[Mapping[str, Any], ...]
"""Methods of a phase as a recipe lists them."""


@dataclass(frozen=True)
class Case:
    """What is asked for."""

    task: Task
    teacher: ModelShape
    student: ModelShape
    pretrained: bool
    """Whether the student is a folder with weights of its own."""
    tight: bool
    """Whether the disk takes less than the teacher's hidden states of two blocks at all tokens."""


CONDITIONS: dict[str, Callable[[Case], bool]] = {
    "labels": lambda case: case.task in ("classification", "regression"),
    "classes": lambda case: case.task == "classification",
    "masked words": lambda case: case.task == "masked_lm",
    "next words": lambda case: case.task == "causal_lm",
    "as many heads": lambda case: (case.student.heads, case.student.kv_heads) == (case.teacher.heads, case.teacher.kv_heads),
    "other heads": lambda case: (case.student.heads, case.student.kv_heads) != (case.teacher.heads, case.teacher.kv_heads),
    "equal width": lambda case: case.student.width == case.teacher.width,
    "another width": lambda case: case.student.width != case.teacher.width,
    "the teacher's blocks": lambda case: takes_blocks(case),
    "a folder": lambda case: case.pretrained,
    "nothing to start from": lambda case: not case.pretrained and not takes_blocks(case),
    "half the depth and width": lambda case: (
        2 * case.student.layers <= case.teacher.layers and 2 * case.student.width <= case.teacher.width
    ),
    "little disk": lambda case: case.tight,
}


def takes_blocks(case: Case) -> bool:
    """Whether a student can be cut out of the teacher block by block."""
    sizes = [(shape.width, shape.heads, shape.kv_heads, shape.head_width) for shape in (case.student, case.teacher)]
    return not case.pretrained and sizes[0] == sizes[1] and case.student.layers <= case.teacher.layers


@dataclass(frozen=True)
class Rule:
    """Where all of ``when`` hold, ``advice`` is given."""

    about: About
    when: tuple[str, ...]
    """Names of CONDITIONS."""
    advice: str
    source: str
    name: str = ""
    """Of a method rule: what it is called."""
    phases: tuple[Methods, ...] = ()
    """Methods of each phase of training, in their order."""
    start: Start = "first"
    online: bool = False
    """Whether its teacher must be at work."""
    recipe: str = ""
    """Recipe with the published numbers."""

    def holds(self, case: Case) -> bool:
        """Whether it is said of ``case``."""
        return all(CONDITIONS[one](case) for one in self.when)


WANG = "Wang, Weissweiler, Schuetze, Plank 2023 (How to Distill your BERT), arXiv 2305.15032"
GLMD = "Tan et al. 2023 (GLMD), arXiv 2306.06625"
GKD = "Tan et al. 2023 (GKD), arXiv 2306.06629"
MINILM = "Wang, Wei, Dong, Bao, Yang, Zhou 2020 (MiniLM), arXiv 2002.10957"
OWN = "own, SST-2, a teacher of 6 small blocks, one seed: docs/results.md"
BYTES = "own: docs/word-predictions.md"

_SOFT: Methods = ({"name": "kd", "options": {"alpha": 0.5, "temperature": 2.0}},)
_SOFT_ALONE: Methods = ({"name": "kd", "options": {"alpha": 1.0, "temperature": 1.0}},)
_ALL_WORDS: Mapping[str, Any] = {"name": "lm_kd", "options": {"positions": "all", "temperature": 15.0}}

RULES: tuple[Rule, ...] = (
    # labels of rows: task-specific distillation
    Rule(
        "method",
        ("labels", "as many heads"),
        "Best overall of ten objectives there (BERT and RoBERTa, GLUE), and much the same from every start. First attention, then soft and "
        "hard labels in a phase of their own, so that no weight lies between them",
        WANG,
        name="attention",
        phases=(({"name": "att_mse"},), _SOFT),
        start="every",
        recipe="recipes/how_to_distill/train.yaml",
    ),
    Rule(
        "method",
        ("labels", "other heads"),
        "Called the best combination there: TinyBERT's embeddings and hidden states, MiniLMv2's relations, soft labels. Relations take any "
        "heads. It stands on a pretraining phase of the same kind; which features the paper's row has is unverified",
        GKD,
        name="relations",
        phases=(({"name": "tinybert", "options": {"attention": 0.0}}, {"name": "minilmv2"}), _SOFT_ALONE),
        recipe="recipes/methods/best_c.yaml",
    ),
    Rule(
        "method",
        ("labels",),
        "Hidden states at all tokens; takes any width through a projection. Sensitive to the start: lower blocks do better than higher "
        "ones",
        WANG,
        name="hidden states",
        phases=(({"name": "hid_seq"},), _SOFT),
        recipe="recipes/how_to_distill/train.yaml",
    ),
    Rule(
        "method",
        ("labels",),
        "Soft labels alone: some bytes a row, any student. The most sensitive to the start: QNLI 66.5 from every fourth block, 86.2 from "
        "the first three",
        WANG,
        name="soft labels",
        phases=(_SOFT,),
        recipe="recipes/sst2/train.yaml",
    ),
    Rule(
        "method",
        ("labels",),
        "A thousandth of the hidden numbers (one block, ten tokens, a tenth of the neurons) does nearly what all of them do, on GLUE with "
        "augmented texts: for little disk",
        "Liu, Meng, Lin, Wang, Zhou 2021 (Marginal Utility Diminishes), arXiv 2106.05691",
        name="few numbers",
        phases=(({"name": "marginal_utility"},), _SOFT_ALONE),
        recipe="recipes/methods/marginal_utility.yaml",
    ),
    # masked language models: general distillation
    Rule(
        "method",
        ("masked words",),
        "Word predictions at every token at T = 15, no inner layers: SuperGLUE 67.9 against TinyBERT's 67.3 (110M to 22M) and 71.5 against "
        "70.8 (to 66M); TinyBERT's inner losses added to it: 67.2. Any depth and width. Without its phase on the task's "
        "words 64.4 (our reading of table 4)",
        GLMD,
        name="all words",
        phases=((_ALL_WORDS,),),
        start="random",
        recipe="recipes/glmd/train.yaml",
    ),
    Rule(
        "method",
        ("masked words", "as many heads"),
        "Attention and value relations of the last block: attention transfer was best overall of the objectives compared in arXiv "
        "2305.15032 too. One hidden state a token. The student's last feed-forward layer learns nothing, so it must be fine-tuned",
        MINILM,
        name="last attention",
        phases=(({"name": "minilm"},),),
        start="random",
        recipe="recipes/methods/minilm.yaml",
    ),
    Rule(
        "method",
        ("masked words",),
        "Relations of the last block with any number of heads; of large teachers an upper-middle block does better. One hidden state a "
        "token. To be fine-tuned",
        "Wang, Bao, Huang, Dong, Wei 2021 (MiniLMv2), arXiv 2012.15828",
        name="last relations",
        phases=(({"name": "minilmv2"},),),
        start="random",
        recipe="recipes/methods/minilmv2.yaml",
    ),
    Rule(
        "method",
        ("masked words",),
        "Called the best combination there: TinyBERT's embeddings and hidden states, MiniLMv2's relations, soft words. Which features the "
        "paper's row has is unverified; the later study of the same group (GLMD) has words alone in front of words with inner layers",
        GKD,
        name="combination",
        phases=(({"name": "tinybert", "options": {"attention": 0.0}}, {"name": "minilmv2"}, _ALL_WORDS),),
        start="random",
        recipe="recipes/methods/best_c.yaml",
    ),
    # causal language models
    Rule(
        "method",
        ("next words",),
        "What the head takes in, from which every divergence follows at every temperature, exactly; with the text in equal parts",
        BYTES,
        name="exact words",
        phases=(({"name": "lm_loss", "weight": 0.5}, {"name": "lm_kd", "weight": 0.5}),),
        start="every",
        recipe="recipes/decoder/train.yaml",
    ),
    Rule(
        "method",
        ("next words",),
        "36 bytes a token for forward KL at T = 1: of the sparse forms measured at this size, the gradient of a token that is nearest to "
        "the exact one. For runs so long that only the average counts: `draws: 50`",
        BYTES,
        name="few words",
        phases=(({"name": "lm_loss", "weight": 0.5}, {"name": "lm_kd", "weight": 0.5, "options": {"top": 6, "bands": 12}}),),
        start="every",
        recipe="recipes/decoder/train.yaml",
    ),
    Rule(
        "method",
        ("next words",),
        "Learns from what the student itself writes, which no text of others shows it. Needs prompts, a student that writes already, and "
        "the teacher at work: nothing can be stored. Not compared here with text that is given",
        "Agarwal et al. 2024, arXiv 2306.13649",
        name="own words",
        phases=(({"name": "gkd"},),),
        start="every",
        online=True,
        recipe="recipes/online/gkd.yaml",
    ),
    # where the student starts from
    Rule(
        "start",
        ("labels", "the teacher's blocks"),
        "Lower blocks for soft labels and hidden states (QNLI, soft labels: 66.5 to 86.2); attention is insensitive (84 to 86 there), and "
        "best from every n-th block",
        WANG,
    ),
    Rule(
        "start",
        ("nothing to start from",),
        "Starts of students differ by more than methods do: take a pretrained model of this shape if there is one (--student FOLDER), "
        "or distil on general text first, from the pretrained teacher; a random student on a task alone has nothing to build on",
        f"{GLMD}, appendix B.1",
    ),
    Rule("start", ("a folder",), "A pretrained student keeps its own weights: its tokenizer must be that of the teacher", "docs/design.md"),
    Rule(
        "start",
        ("masked words",),
        "Random weights, as GLMD and MiniLM start. Whether the teacher's first blocks do better is not known here: try "
        "student.layers as one more value of a sweep",
        f"{GLMD}; {MINILM}",
    ),
    Rule(
        "start",
        ("next words",),
        "Which blocks a decoder does best to start from is not known here; recipes/decoder takes every second one. To write its own words "
        "a student must write well before: tune it on the responses first",
        "recipes/decoder; Gu et al. 2024 (MiniLLM), arXiv 2306.08543, for the latter",
    ),
    Rule(
        "start",
        ("half the depth and width", "masked words"),
        "At half of the depth and of the width or less: an assistant with the teacher's depth and the student's width between the two "
        "(recipes/takd has such a chain)",
        MINILM,
    ),
    # what is kept
    Rule(
        "features",
        ("masked words",),
        "At T = 15 the 50 likeliest words hold 0.3 % of the mass: no sparse form serves. The store keeps what the head takes in",
        "own: docs/glmd.md",
    ),
    Rule(
        "features",
        ("labels", "little disk"),
        "Features by rows (`hid_cls`, `pkd`, `marginal_utility`, `kd`) instead of by tokens; or the same in int8, whose error "
        "`teacher-dump plan` measures",
        "own: docs/stores.md",
    ),
    Rule(
        "features",
        ("next words", "little disk"),
        "Few words (`top6band12`, 36 bytes) or what the head takes in as int8 (KL 4e-5 on a small teacher)",
        BYTES,
    ),
    # what comes first
    Rule(
        "order",
        ("labels",),
        "The teacher must be tuned on the task: answers of a pretrained one are of no use there. Texts of few rows are augmented before "
        "they are dumped, 20 copies each in the paper (unverified)",
        "Jiao et al. 2020 (TinyBERT), arXiv 1909.10351; docs/augmentation.md",
    ),
    Rule("order", ("masked words",), "Then the same loss on the task's clozes, then its answers: three phases", GLMD),
    # what is not settled
    Rule(
        "caution",
        ("classes",),
        "10,000 rows and one epoch resolve hardly anything: attention with hidden states 0.849, hidden states 0.846, soft labels 0.837, "
        "with intervals that hold equality. `lrc_bert` stays at chance in so few steps. Measure with seeds (`student-train sweep`)",
        OWN,
    ),
    Rule(
        "caution",
        ("labels",),
        "More teachers did not help there: TMKD 65.6, Uncertainty 65.4, RL-KD 65.3, MT-BERT 59.1 from two teachers, 72.1 from one by GLMD "
        "(340M to 66M); TAKD 54.5 and DGKD 54.0 with assistants that were cut out",
        GLMD,
    ),
    Rule(
        "caution",
        ("labels",),
        "Several losses at once had lower logit losses than logits alone, in one course report without repeated runs; gradient norms of "
        "different numbers of losses do not compare",
        "Barakat, Huang 2023 (course report)",
    ),
)


def about(kind: About, case: Case) -> list[Rule]:
    """The rules of a kind that hold, the first one first."""
    return [rule for rule in RULES if rule.about == kind and rule.holds(case)]
