"""Whether rows hold what a method learns from; known from the manifest of their store."""

from collections.abc import Sequence

from store.manifest import RowsInfo, Task
from store.shape import ModelShape
from student_train.methods.base import Method
from student_train.recipe import MethodSpec, PhaseSpec


def unlearnable(method: Method, student: ModelShape, rows: RowsInfo) -> str:
    """Why ``method`` can learn nothing from ``rows``; empty if it can."""
    positions = {key.positions for key in method.student_keys}
    if method.reads_clozes and not rows.verbalisers:
        return "are no clozes (rows.cloze in the dump's recipe makes them)"
    if method.reads_labels and rows.task.kind == "none":
        return "have no labels (rows.label in the dump's recipe names them); kd learns without them with alpha: 1"
    if "masked" in positions and rows.objective != "mlm":
        return f"have no masked words; build rows with objective: mlm (found {rows.objective})"
    if "labels" in positions and rows.objective == "plain" and rows.task.kind != "token":
        return "have no labelled tokens; build rows with objective: mlm or causal, or with labels of tokens"
    if method.reads_phrases and all(array.name != "phrases" for array in rows.token_arrays):
        return "have no phrases (rows.phrases in the dump's recipe marks them)"
    if method.reads_domains and not rows.domains:
        return "have no domains (rows.domain in the dump's recipe names their column)"
    reads_task = any(key.site == "task_logits" for key in method.student_keys)
    if reads_task and rows.task.kind == "choice" and student.head != "multiple_choice":
        return f"are choices of questions, which take a student with head multiple_choice, found {student.head}"
    return ""


def label_problem(student: ModelShape, task: Task) -> str:
    """Why the labels of ``task`` cannot be those of the student's task head; empty if they can, or if there are none."""
    if (student.head, task.kind) in (("classification", "classification"), ("token_classification", "token")):
        return "" if student.labels == len(task.classes) else f"have {len(task.classes)} classes"
    if student.head == "classification" and task.kind == "regression" and student.labels != 1:
        return "are scores, which take one"
    if student.head == "multiple_choice" and task.kind in ("classification", "regression", "token"):
        return f"are of kind {task.kind}; a multiple_choice head takes rows built with choices"
    return ""


def check_domains(name: str, method: Method, taught: Sequence[RowsInfo]) -> None:
    """All ``taught`` rows of the method ``name``, where it tells domains apart, have them, from one list, and as many as it knows.

    Raises:
        ValueError: they do not.
    """
    lists = {rows.domains for rows in taught}
    if method.reads_domains and len(lists) > 1:
        found = " and ".join(f"[{', '.join(domains)}]" for domains in sorted(lists))
        raise ValueError(f"methods: {name}: expected rows of one list of domains (rows.domain.classes), found {found}")
    for domains in lists:
        if method.domains not in (None, len(domains)):
            raise ValueError(
                f"methods: {name}: expected domains: {len(domains)}, for its rows are of {', '.join(domains)}; found {method.domains}"
            )


def check_meta(phase: PhaseSpec, methods: Sequence[tuple[MethodSpec, Method]], student: ModelShape, rows: RowsInfo | None) -> None:
    """Held-out ``rows`` (None: of a store that does not exist yet) are there where a method judges by them, and nowhere else.

    Raises:
        ValueError: they are missing, of no use, or hold nothing that the method can judge by.
    """
    judges = [(spec.name, method) for spec, method in methods if method.reads_meta]
    if phase.meta is None:
        if judges:
            raise ValueError(f"methods: {judges[0][0]} judges rows by held-out ones; give the phase meta: {{store: STORE, split: SPLIT}}")
        return
    if not judges:
        raise ValueError("meta: none of the phase's methods looks at held-out rows; leave it out")
    for name, method in judges:
        if rows is None:
            continue
        bare = rows.task.kind == "none" and rows.objective == "plain"
        if problem := "have no labels to judge by" if bare else unlearnable(method, student, rows):
            raise ValueError(f"meta: {name}: the rows of {phase.meta.store} {problem}")
