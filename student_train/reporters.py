"""Who is told of a run's logs beside metrics.jsonl: the trackers that the trainer argument report_to names."""

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

TENSORBOARD = "tensorboard"


def reporters(args: TrainingArguments, where: str, output: Path, step: int, first: bool) -> list[TrainerCallback]:
    """A callback for each name of ``args.report_to``, which is then empty, so that the trainer makes none itself.

    TensorBoard writes to ``output/tensorboard``, on the ``first`` rank alone, and forgets what lies after ``step``; all others are
    transformers' own, with its environment variables for projects and addresses.

    Raises:
        ValueError: the package of one is not installed, or something that it needs is not set; the message is transformers'.
    """
    names, args.report_to = args.report_to or [], []
    callbacks: list[TrainerCallback] = []
    for name in names:
        if name != TENSORBOARD:
            try:
                callbacks += [made() for made in get_reporting_integration_callbacks([name])]
            except (RuntimeError, ImportError, ValueError) as error:
                raise ValueError(f"{where}: trainer: report_to {name}: {error}") from None
        elif first:
            callbacks.append(TensorBoardCallback(SummaryWriter(str(output / TENSORBOARD), purge_step=step + 1)))
    return callbacks
