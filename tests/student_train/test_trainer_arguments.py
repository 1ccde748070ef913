"""The trainer arguments of a phase: what may be given, what it means in a run that is one epoch, and what is refused."""

import dataclasses
from pathlib import Path

import pytest
from transformers import TrainingArguments

from student_train.arguments import CADENCE, OWNED, TRAINING, training_arguments


def parse(given: dict[str, object], evaluates: bool = True) -> TrainingArguments:
    return training_arguments(
        {"use_cpu": True, **given},
        "phase 'p'",
        Path("out"),
        seed=5,
        accumulation=2,
        workers=1,
        steps=100,
        epoch_steps=30.4,
        evaluates=evaluates,
    )


def test_every_argument_we_name_exists_in_the_installed_transformers() -> None:
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert fields >= CADENCE | TRAINING | OWNED.keys()
    assert not CADENCE & TRAINING
    assert not OWNED.keys() & (CADENCE | TRAINING)


def test_the_traps_of_the_loop_are_switched_off() -> None:
    args = parse({})
    assert (args.logging_nan_inf_filter, args.ddp_broadcast_buffers, args.remove_unused_columns) == (False, False, False)
    assert args.ddp_find_unused_parameters
    assert (args.max_steps, args.gradient_accumulation_steps, args.per_device_train_batch_size, args.seed) == (100, 2, 1, 5)
    assert (args.eval_strategy, args.eval_steps, args.report_to) == ("steps", 10, ["tensorboard"])
    assert parse({}, evaluates=False).eval_strategy == "no"


def test_numbers_that_yaml_reads_as_text_are_numbers() -> None:
    assert parse({"learning_rate": "1e-4"}).learning_rate == 1e-4


def test_an_epoch_is_one_through_the_data_and_not_the_whole_run() -> None:
    args = parse({"eval_strategy": "epoch", "save_strategy": "epoch"})
    assert (args.eval_strategy, args.eval_steps, args.save_strategy, args.save_steps) == ("steps", 30, "steps", 30)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rat": 1.0}, r"unknown argument 'learning_rat'; did you mean 'learning_rate'"),
        ({"label_smoothing_factor": 0.1}, r"'label_smoothing_factor'; it has no effect in student-train"),
        ({"logging_nan_inf_filter": True}, r"'logging_nan_inf_filter'; it has no effect"),
        ({"max_steps": 3}, r"max_steps is not given here; use the phase's steps"),
        ({"per_device_train_batch_size": 3}, r"use the phase's batch_rows"),
        ({"gradient_accumulation_steps": 3}, r"use the phase's accumulation"),
        ({"output_dir": "x"}, r"use the recipe's output"),
        ({"seed": 3}, r"use the recipe's seed"),
        ({"load_best_model_at_end": True}, r"use the phase's best"),
        ({"learning_rate": "fast"}, r"learning_rate: expected a number, found 'fast'"),
        ({"learning_rate": True}, r"learning_rate: expected a number, found True"),
        ({"bf16": "yes"}, r"bf16: expected true or false, found 'yes'"),
        ({"lr_scheduler_type": "linaer"}, r"phase 'p': trainer: .*linaer"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, r"'reduce_lr_on_plateau' has no effect"),
        ({"save_strategy": "best"}, r"save_strategy is no, steps or epoch"),
        ({"optim": "sgdd"}, r"phase 'p': trainer: .*sgdd"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(given)


def test_evaluation_without_data_to_evaluate_on_is_refused() -> None:
    with pytest.raises(ValueError, match="eval_strategy 'steps' needs the phase's evaluate"):
        parse({"eval_strategy": "steps"}, evaluates=False)
