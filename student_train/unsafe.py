"""What a phase asks for that would be wrong, or silently another thing, where the student lies in parts under ZeRO."""

from collections.abc import Sequence

from student_train.methods.base import Method
from student_train.recipe import MethodSpec, PhaseSpec
from student_train.zero import Zero, check_arguments


def check_zero(phase: PhaseSpec, methods: Sequence[tuple[MethodSpec, Method]]) -> None:
    """Refuse what ZeRO, as the phase asks for it, cannot do; nothing where it does not.

    What only the run itself shows (weights that some steps use and others do not) is refused there, before a weight moves.

    Raises:
        ValueError: the reason, and what to give instead.
    """
    zero, where = phase.zero, f"phase {phase.name!r}"
    if zero is None:
        return
    check_arguments(phase.trainer, where)
    if phase.gradient_norms is not None:
        raise ValueError(f"{where}: gradient_norms reads whole gradients, and zero leaves each rank a part; leave it out, or zero (DDP)")
    if phase.student.dtype != "float32":
        raise ValueError(f"{where}: zero: expected a student of dtype float32 (trainer: {{bf16: true}} computes in half), found bfloat16")
    for spec, method in methods:
        reason = _reason(zero, method)
        if reason:
            remedy = "give zero a stage of 1 or 2, or leave zero out (DDP)"
            raise ValueError(f"{where}: zero: stage {zero.stage}: {spec.name} {reason}; {remedy}")


def _reason(zero: Zero, method: Method) -> str:
    """Why ``method`` cannot learn under ``zero``; empty if it can."""
    if zero.stage < 3:
        return ""
    kind = type(method)
    if kind.gates is not Method.gates or kind.running is not Method.running:
        return "lets some blocks of the student stand still in some steps, and ZeRO-3 would move them by the gradient of an earlier step"
    if "reads other features as it goes" in kind.kinds:
        return "learns other blocks of the student as it goes, and ZeRO-3 would move the rest by the gradient of an earlier step"
    if method.perturbs:
        return "takes the gradient of its perturbation by itself, while ZeRO-3 has hooks on the weights (perturbation: false does without)"
    if kind.takes_gradients:
        return "takes gradients in all weights of the student by itself, and a rank of ZeRO-3 lacks most of them"
    if method.rewrites:
        return "lets the student write rows, which takes all of its weights on every rank for as long as it writes"
    return ""
