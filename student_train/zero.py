"""ZeRO for the student (Rajbhandari et al. 2020, arXiv 1910.02054): what a recipe says of it, and DeepSpeed's configuration for that.

Its arithmetic is that of plain training: weights, gradients and moments stay float32, ``bf16`` computes under autocast.
"""

import os
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import model_validator
from torch import nn
from transformers import TrainingArguments

from online.skeleton import largest_block, largest_parameter
from store.strict import Strict

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop")
"""Values of ``optim`` that move each weight by its own gradient alone: ZeRO hands them long vectors of many weights."""

BUCKET = 50_000_000
"""Elements of gradients that are reduced at a time; DeepSpeed sets as much memory aside."""


class Zero(Strict):
    """How the student lies over the ranks of a job."""

    stage: Literal[1, 2, 3]
    """What each rank holds only its part of: 1 the optimiser's state, 2 also gradients, 3 also weights."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Where a rank keeps its part of the optimiser's state, and takes its step."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """Where a rank keeps its part of the weights while no module needs them; stage 3 only."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.offload_parameters != "none" and self.stage != 3:
            raise ValueError(f"zero: offload_parameters needs stage: 3, which cuts weights into parts; found stage {self.stage}")
        return self


def check_launch(where: str) -> None:
    """Refuse ZeRO in a process that was started by itself.

    Raises:
        ValueError: it was.
    """
    if "RANK" not in os.environ:
        raise ValueError(
            f"{where}: zero shares the student out over the processes of a launch, and this is one by itself: start it with "
            "torchrun --standalone --nproc-per-node=RANKS -m student_train.cli run RECIPE, or leave zero out"
        )


def check_arguments(given: Mapping[str, object], where: str) -> None:
    """Refuse arguments of the ``trainer`` that ZeRO cannot follow.

    Raises:
        ValueError: names the argument and what to give instead.
    """
    if given.get("fp16"):
        raise ValueError(f"{where}: trainer: fp16 under zero would scale the loss of each parameter group by itself; give bf16, or no zero")
    optimizer = given.get("optim")
    if optimizer is not None and optimizer not in OPTIMIZERS:
        raise ValueError(
            f"{where}: trainer: optim: {optimizer} looks at weights one by one, and zero hands an optimiser long vectors of many: "
            f"expected one of {', '.join(OPTIMIZERS)}"
        )
    for name in ("torch_empty_cache_steps", "ddp_bucket_cap_mb"):
        if given.get(name) is not None:
            raise ValueError(f"{where}: trainer: {name} has no effect under zero; leave it out")


def configuration(zero: Zero, module: nn.Module, args: TrainingArguments) -> dict[str, Any]:
    """DeepSpeed's configuration for training ``module``, which is whole yet, with ``args``."""
    trained = sum(weight.numel() for weight in module.parameters() if weight.requires_grad)
    stage: dict[str, Any] = {"stage": zero.stage, "reduce_bucket_size": max(1, min(trained, BUCKET))}
    if zero.stage == 3:
        # as for teachers: what must be there at once is the module that runs and the next one
        block, largest = largest_block(module), largest_parameter(module)
        stage |= {
            "stage3_max_live_parameters": block // 2 + largest,
            "stage3_prefetch_bucket_size": block // 2,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": 0,
            "memory_efficient_linear": False,  # would replace torch's linear function for all models of this process
        }
    if zero.offload_optimizer != "none":
        stage["offload_optimizer"] = {"device": zero.offload_optimizer, "pin_memory": args.device.type == "cuda"}
    if zero.offload_parameters != "none":
        stage["offload_param"] = {"device": zero.offload_parameters, "pin_memory": args.device.type == "cuda"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "gradient_clipping": args.max_grad_norm or 0.0,
        "zero_optimization": stage,
        "zero_allow_untested_optimizer": True,  # torch's own: DeepSpeed's would be compiled in the middle of a run
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 40,
    }
    if args.bf16:
        # no modules: those named here would have their gradients reduced in bfloat16
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return config
