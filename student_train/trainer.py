"""The training loop: transformers.Trainer carries it, the bundle's forward pass is the whole step.

The data loader counts micro-batches of the whole run, so to Trainer a run is one epoch of examples that are batches
already: skipping to a position reads nothing. Denominators of loss terms are counted over ranks and accumulation steps
before the first forward pass of a step; each rank's loss is multiplied by their number because DDP averages gradients.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments

from online.batch import Features
from online.ranks import Ranks
from store.manifest import Json
from store.strict import did_you_mean
from student_train import checkpoint
from student_train.agreement import check_agreement
from student_train.bundle import Bundle
from student_train.data import Failed, MicroBatches, Source
from student_train.gradients import Gates, norms, split_groups
from student_train.journal import Journal
from student_train.micro_batch import MicroBatch
from student_train.moment import Moment
from student_train.patience import out_of_patience
from student_train.random_state import random_state_kept
from student_train.window import Counts, Window

TRAINER_STATE = "trainer_state.json"
_log = logging.getLogger(__name__)


class DistillationTrainer(Trainer):
    """The overrides that make Trainer run micro-batches of rows and features through a ``Bundle``."""

    control: TrainerControl

    def __init__(
        self,
        bundle: Bundle,
        args: TrainingArguments,
        data: MicroBatches,
        ranks: Ranks,
        *,
        settings: Mapping[str, Json],
        evaluate: Callable[[], dict[str, float]] | None,
        together: bool,
        best: str | None,
        patience: int | None,
        gradient_norms: int | None = None,
        callbacks: list[TrainerCallback],
    ) -> None:
        super().__init__(model=bundle, args=args, train_dataset=data, eval_dataset={}, callbacks=callbacks)
        self.gradient_norms = gradient_norms
        self.watched: dict[str, Tensor] = {}
        """Sums of the terms, of this step and rank, that methods want to know."""
        self.bundle, self.data, self.ranks, self.settings = bundle, data, ranks, settings
        self.together = together
        self.past: list[MicroBatch] = []
        self.measure, self.best, self.patience = evaluate, best, patience
        self.folder = Path(args.output_dir)
        self.best_weights: dict[str, Tensor] | None = None
        self.journal: Journal | None = None
        self.window = Window()

    # data

    def get_train_dataloader(self) -> DataLoader[MicroBatch | Failed]:
        """Items are micro-batches; a generator of its own, so that starting the loader draws nothing from the global one."""
        args = self.args
        return DataLoader(
            self.data,
            collate_fn=itemgetter(0),
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor if args.dataloader_num_workers else None,
            multiprocessing_context=args.dataloader_multiprocessing_context if args.dataloader_num_workers else None,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            generator=torch.Generator().manual_seed(args.seed),
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[MicroBatch | Failed], num_batches: int, device: torch.device
    ) -> tuple[list[MicroBatch], Counts]:
        """The micro-batches of one optimiser step, and their counts over all ranks.

        Raises:
            ValueError: the step has nothing to learn from; its loss would be 0, and look like success.
        """
        started = time.perf_counter()
        self.bundle.begin(self.moment)
        check_agreement(self.ranks, self.bundle.decided(), self.state.global_step + 1)
        self.bundle.probed = {} if self._probes else None
        self.watched = {}
        self.past = self.read_again(self.bundle.looks_back(), num_batches)
        items = [next(epoch_iterator) for _ in range(num_batches)]
        self.window.waited += time.perf_counter() - started
        micro_batches: list[MicroBatch] = []
        counts: Counts = {"tokens": 0.0}
        for item in items:
            item = self.written(item)
            micro_batches.append(item)
            counts["tokens"] += float(item.batch.lengths.sum())
            for name, count in self.bundle.counts(item.batch, item.taught).items():
                counts[name] = counts.get(name, 0.0) + count
        counts = dict(zip(counts, self.ranks.sum(list(counts.values())), strict=True))
        terms = [name for name in counts if name != "tokens"]
        if not any(counts[name] for name in terms):
            store = self.data.sources[micro_batches[0].source].store.path
            raise ValueError(
                f"step {self.state.global_step + 1}: rows of {store} hold nothing for {', '.join(terms)} to learn from; expected labels or "
                "masked words: build the rows with a label, or with objective mlm or causal"
            )
        self.window.add_step(counts)
        return micro_batches, counts

    def written(self, item: MicroBatch | Failed) -> MicroBatch:
        """A micro-batch as the methods want its rows; raises the error of one that could not be read."""
        if isinstance(item, Failed):
            raise item.error
        if not self.bundle.rewrites:
            return item
        item = item.to(self.args.device)
        return replace(item, batch=self.bundle.rewrite(item.batch))

    def read_again(self, steps: int, micro_batches: int) -> list[MicroBatch]:
        """Those of the last ``steps`` optimiser steps, as the store has them."""
        end = self.state.global_step * micro_batches
        return [self.written(self.data[number]) for number in range(end - steps * micro_batches, end)]

    def _prepare_inputs(self, inputs: MicroBatch) -> MicroBatch:
        return inputs.to(self.args.device)

    def floating_point_ops(self, inputs: MicroBatch) -> int:
        """Not counted: Trainer would look for its own input names."""
        return 0

    # step

    @property
    def moment(self) -> Moment:
        """The optimiser step that comes next."""
        return Moment(self.state.global_step, self.data.steps, self.data.epoch_steps, self.args.seed)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As Trainer's; where methods change learning rates, with a parameter group for each part of the student."""
        optimizer = super().create_optimizer(model)
        if self.bundle.gates():
            split_groups(optimizer, self.bundle.loaded)
            self.add_callback(Gates(self.bundle))
        return optimizer

    def compute_loss(
        self, model: nn.Module, inputs: MicroBatch, return_outputs: bool = False, num_items_in_batch: Counts | None = None
    ) -> Tensor:
        """The micro-batch's share of the step's loss.

        Raises:
            ValueError: a term is not finite; names it, the step and the rows' store.
        """
        source = self.data.sources[inputs.source]
        meta = None
        with torch.no_grad():
            features = _features(source, inputs)
            if inputs.meta is not None and self.data.meta is not None:
                meta = inputs.meta.batch, _features(self.data.meta, inputs.meta)
            past = [(one.batch, _features(self.data.sources[one.source], one)) for one in map(self._prepare_inputs, self.past)]
        self.past = []  # the first micro-batch of the step has it
        loss, terms = model(inputs.batch, features, num_items_in_batch, inputs.taught, meta, past)
        finite = torch.isfinite(torch.stack(list(terms.values()))).tolist()
        for name, sound in zip(terms, finite, strict=True):
            if not sound:
                raise ValueError(
                    f"step {self.state.global_step + 1}: the loss term {name} is {terms[name].item()} on rows of {source.store.path}; "
                    "nothing of this step is kept; try a lower learning_rate, or look at the rows with teacher-dump show"
                )
        self.window.add(terms)
        for name in filter(self.bundle.watched, terms):
            self.watched[name] = self.watched.get(name, torch.zeros(())) + terms[name].cpu()
        return loss * self.ranks.count

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | float | None:
        self._note_norms()
        clipped: Tensor | float | None = super()._clip_grad_norm(model)
        return clipped

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        if not self.args.max_grad_norm:
            self._note_norms()
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None and norm is not None and not math.isfinite(norm):
            raise ValueError(
                f"step {self.state.global_step + 1}: the gradient is {float(norm)} though every loss term is finite; "
                "nothing of this step is kept; try a lower learning_rate"
            )
        return norm

    @property
    def _probes(self) -> bool:
        """Whether this step measures gradients."""
        return self.gradient_norms is not None and self.state.global_step % self.gradient_norms == 0

    def _note_norms(self) -> None:
        """Remember for the log what is measured of this step's gradient, before clipping."""
        if self._probes:
            self.window.norms = {f"gradient/{part}": norm for part, norm in norms(self.bundle.loaded).items()}
            self.window.norms |= {f"gradient/{term}": float(norm) for term, norm in (self.bundle.probed or {}).items()}

    # log

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms as they entered the loss (mean per unit, times weight), tokens per second and the loader's share of the time."""
        if "train_runtime" in logs:
            return  # Trainer's closing summary would count micro-batches as samples
        self.state.epoch = self.state.global_step / self.data.epoch_steps
        if "loss" in logs:
            logs.update(self._window_logs())
        super().log(logs, start_time)
        if self.journal is not None:
            self.journal.append(self.state.log_history[-1])

    def _window_logs(self) -> dict[str, float]:
        window, self.window = self.window, Window()
        return window.logs(self.ranks)

    # evaluate

    def evaluate(
        self, eval_dataset: object = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure on rank 0, tell all ranks, keep the weights if they are the best so far; leaves every random generator as it was."""
        assert self.measure is not None
        started = time.perf_counter()
        self.bundle.eval()  # training_step puts it back
        with random_state_kept(), torch.no_grad():
            found = self.measure() if self.together else None
            metrics = self.ranks.on_first(self.measure if found is None else lambda: found)
        self.log({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        if self.best is not None:
            self._keep_best(metrics, self.best)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.window.paused += time.perf_counter() - started
        return metrics

    def _keep_best(self, metrics: Mapping[str, float], best: str) -> None:
        name, sign = best.removeprefix("-"), -1 if best.startswith("-") else 1
        if name not in metrics:
            raise ValueError(f"best: no metric {name!r}{did_you_mean(name, sorted(metrics))}")
        value = metrics[name]
        known = -math.inf if self.state.best_metric is None else sign * self.state.best_metric
        if sign * value > known:  # never where it is NaN
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step
            if self.ranks.number == 0:
                self.best_weights = {key: tensor.to("cpu", copy=True) for key, tensor in checkpoint.weights(self.bundle.student).items()}
        elif out_of_patience(self.state, self.patience):
            _log.info("stopped at step %d: no better %s since step %d", self.state.global_step, name, self.state.best_global_step)
            self.control.should_training_stop = True

    # checkpoints

    def _maybe_log_save_evaluate(
        self,
        tr_loss: Tensor,
        grad_norm: Tensor | float | None,
        model: nn.Module,
        trial: object,
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        if self.watched:
            self.bundle.learned(dict(zip(self.watched, self.ranks.sum([float(term) for term in self.watched.values()]), strict=True)))
            self.watched = {}
        if self.control.should_save:  # windows end at checkpoints, so that a resumed run logs what an uninterrupted one does
            self.control.should_log = True
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        started = time.perf_counter()
        if self.ranks.number == 0:
            checkpoint.clear(self.folder)
        self.ranks.wait()
        with checkpoint.writing(self.folder) as writing:
            self._save_optimizer_and_scheduler(str(writing))
            self._save_scaler(str(writing))
            self._save_rng_state(str(writing))
            if self.ranks.count > 1:
                checkpoint.save(checkpoint.method_buffers(self.bundle.methods), writing / f"buffers_{self.ranks.number}.safetensors")
            if self.ranks.number == 0:
                checkpoint.save(checkpoint.weights(self.bundle), writing / "model.safetensors")
                if self.best_weights is not None:
                    checkpoint.save(self.best_weights, writing / "best.safetensors")
                self.state.save_to_json(str(writing / TRAINER_STATE))
        self.ranks.wait()
        self.ranks.on_first(self._publish)
        self.window.paused += time.perf_counter() - started

    def _publish(self) -> None:
        checkpoint.publish(self.folder, self.state.global_step, self.settings, self.ranks.count)
        checkpoint.rotate(self.folder, self.args.save_total_limit, self.state.global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        with torch.no_grad():
            checkpoint.restore(self.bundle, checkpoint.load(folder / "model.safetensors"), folder)
            buffers = folder / f"buffers_{self.ranks.number}.safetensors"
            for name, saved in (checkpoint.load(buffers) if buffers.exists() else {}).items():
                checkpoint.method_buffers(self.bundle.methods)[name].copy_(saved)
        if self.ranks.number == 0 and (folder / "best.safetensors").exists():
            self.best_weights = checkpoint.load(folder / "best.safetensors")

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, resume_from_checkpoint: str | None, trial: object
    ) -> tuple[int, int]:
        position: tuple[int, int] = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self.state.compute_steps(self.args, max_steps)  # when to log and save follows the recipe, not the checkpoint
        return position

    def use_best_weights(self) -> None:
        """Put the best weights into the student, on all ranks."""
        if self.state.best_global_step is None or self.best is None:
            return
        with torch.no_grad():
            if self.best_weights is not None:
                checkpoint.restore(self.bundle.student, self.best_weights, self.folder)
            if self.ranks.count > 1:
                for tensor in checkpoint.weights(self.bundle.student).values():
                    dist.broadcast(tensor, src=0)


def _features(source: Source, micro_batch: MicroBatch) -> Features:
    """What the teacher of ``source`` answers."""
    return {} if source.teacher is None else source.teacher.features(micro_batch.batch, micro_batch.fetched)
