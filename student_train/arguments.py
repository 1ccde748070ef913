"""The arguments of transformers.TrainingArguments that a phase may give, and those that student-train sets itself."""

import dataclasses
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from online.ranks import talking
from store.strict import did_you_mean

# fmt: off
CADENCE = frozenset({
    "logging_strategy", "logging_steps", "logging_first_step", "save_strategy", "save_steps", "save_total_limit", "eval_strategy",
    "eval_steps", "eval_delay", "eval_on_start", "report_to", "run_name", "project", "disable_tqdm", "log_level", "log_level_replica",
    "dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "ddp_timeout",
})
"""When to log, save and evaluate, and how to load: may change between a run and its resumption."""

TRAINING = frozenset({
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16", "tf32", "activation_checkpointing", "gradient_checkpointing",
    "use_cpu", "full_determinism", "torch_empty_cache_steps", "ddp_backend", "ddp_bucket_cap_mb",
})
"""What shapes the weights: must stay the same when a run is resumed."""
# fmt: on

OWNED: dict[str, str] = {
    "output_dir": "the recipe's output",
    "max_steps": "the phase's steps",
    "num_train_epochs": "the phase's epochs",
    "per_device_train_batch_size": "the phase's batch_rows",
    "gradient_accumulation_steps": "the phase's accumulation",
    "dataloader_num_workers": "the phase's workers",
    "seed": "the recipe's seed",
    "data_seed": "the recipe's seed",
    "metric_for_best_model": "the phase's best",
    "greater_is_better": "the phase's best (a leading minus: lower is better)",
    "load_best_model_at_end": "the phase's best",
    "resume_from_checkpoint": "nothing: a run goes on by itself from its newest whole checkpoint",
}
"""Argument -> what to give instead."""


def training_arguments(
    given: Mapping[str, object],
    where: str,
    checkpoints: Path,
    *,
    seed: int,
    accumulation: int,
    workers: int,
    steps: int,
    epoch_steps: float,
    evaluates: bool,
    every_backward: bool = False,
) -> TrainingArguments:
    """The arguments of a run of ``steps`` optimiser steps whose items are micro-batches (one item is one "example").

    ``epoch_steps`` is how many steps go once through the data: the loop itself knows one epoch, the whole run. ``every_backward``:
    ranks sum up gradients after each micro-batch, as ZeRO does.

    Raises:
        ValueError: an argument is unknown, has no effect here, is set by another field (named in the message), or has the wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    chosen: dict[str, object] = {
        "logging_steps": 10,
        "save_steps": 500,
        "save_total_limit": 2,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": max(1, steps // 10),
        "report_to": "tensorboard",
        "use_cpu": not torch.accelerator.is_available(),  # without it, ranks on a CPU train alone and say nothing
    }
    for name, value in given.items():
        if name in OWNED:
            raise ValueError(f"{where}: trainer: {name} is not given here; use {OWNED[name]}")
        if name not in CADENCE | TRAINING:
            hint = "; it has no effect in student-train" if name in fields else did_you_mean(name, sorted(CADENCE | TRAINING))
            raise ValueError(f"{where}: trainer: unknown argument {name!r}{hint}")
        chosen[name] = _typed(value, fields[name].default, f"{where}: trainer: {name}")
    if chosen.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy"):
        raise ValueError(f"{where}: trainer: lr_scheduler_type {chosen['lr_scheduler_type']!r} has no effect in student-train")
    if chosen.get("save_strategy") == "best":
        raise ValueError(f"{where}: trainer: save_strategy is no, steps or epoch; the best weights are kept where the phase gives best")
    _check_reports(chosen["report_to"], where)
    if not evaluates and chosen["eval_strategy"] != "no":
        raise ValueError(f"{where}: trainer: eval_strategy {chosen['eval_strategy']!r} needs the phase's evaluate")
    for verb in ("logging", "save", "eval"):  # the loop's one epoch is the whole run
        if chosen.get(f"{verb}_strategy") == "epoch":
            chosen |= {f"{verb}_strategy": "steps", f"{verb}_steps": max(1, round(epoch_steps))}
    chosen.pop("gradient_checkpointing", None)
    chosen.pop("activation_checkpointing", None)
    ours: dict[str, object] = {
        "output_dir": str(checkpoints),
        "max_steps": steps,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": accumulation,
        "dataloader_num_workers": workers,
        "seed": seed,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,  # it prints a loss of 0 where there is none
        "ddp_broadcast_buffers": False,  # a method's memory bank belongs to its rank
        "ddp_find_unused_parameters": True,  # a loss on hidden states leaves the head without gradient
    }
    if every_backward:
        ours["accelerator_config"] = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    try:
        if chosen["use_cpu"] and "RANK" in os.environ and not dist.is_initialized():
            # or its ranks would wait for each other for half an hour, whatever ddp_timeout says
            seconds = float(str(chosen.get("ddp_timeout", fields["ddp_timeout"].default)))
            with talking():
                dist.init_process_group(str(chosen.get("ddp_backend") or "gloo"), timeout=timedelta(seconds=seconds))
        args = TrainingArguments(**chosen, **ours)
    except (TypeError, ValueError, ImportError) as error:
        raise ValueError(f"{where}: trainer: {error}") from None
    if args.n_gpu > 1:  # asking for it has set up the device, and torch.distributed under torchrun
        args._n_gpu = 1  # several devices are several processes (torchrun), never threads of one
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if args.world_size != launched:
        raise ValueError(f"{where}: {launched} processes were launched, but they do not see each other (found {args.world_size})")
    return args


def checkpoints_student(given: Mapping[str, object]) -> bool:
    """Whether the phase asks to recompute the student's activations in the backward pass."""
    return bool(given.get("activation_checkpointing") or given.get("gradient_checkpointing"))


def fixed_on_resume(given: Mapping[str, object]) -> dict[str, object]:
    """The given arguments that must not change between a run and its resumption."""
    return {name: value for name, value in given.items() if name in TRAINING}


def _check_reports(given: object, where: str) -> None:
    """Refuse a tracker that transformers does not know; whether it is installed is seen when it is made."""
    known = [*INTEGRATION_TO_CALLBACK, "all", "none"]
    for name in given if isinstance(given, list) else [given]:
        if name not in known:
            raise ValueError(f"{where}: trainer: report_to: unknown tracker {name!r}{did_you_mean(str(name), known)}")


def _typed(value: object, default: object, where: str) -> object:
    """``value``, as a number where the argument is one: YAML reads 1e-4 as text."""
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{where}: expected true or false, found {value!r}")
    elif isinstance(default, int | float):
        try:
            number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None
        except ValueError:
            number = None
        if number is None:
            raise ValueError(f"{where}: expected a number, found {value!r}")
        return value if isinstance(value, int | float) else number
    return value
