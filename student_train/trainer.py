"""The training loop: transformers.Trainer carries it, the bundle's forward pass is the whole step.

The data loader counts micro-batches of the whole run, so to Trainer a run is one epoch of examples that are batches
already: skipping to a position reads nothing. Denominators of loss terms are counted over ranks and accumulation steps
before the first forward pass of a step; each rank's loss is multiplied by their number because DDP and ZeRO average gradients.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments

from online.ranks import Ranks
from store.manifest import Json
from student_train import checkpoint
from student_train.agreement import check_agreement
from student_train.bundle import Bundle
from student_train.data import Failed, MicroBatches, loader
from student_train.engine import Engine
from student_train.gradients import Gates, check_norm, check_terms, norms, split_groups
from student_train.journal import Journal
from student_train.micro_batch import MicroBatch
from student_train.moment import Moment
from student_train.patience import is_better, out_of_patience
from student_train.random_state import random_state_kept
from student_train.use import looked
from student_train.window import Counts, Window, counted
from student_train.zero import Zero

TRAINER_STATE = "trainer_state.json"
SCHEDULER = "scheduler.pt"
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
        zero: Zero | None = None,
        callbacks: list[TrainerCallback],
    ) -> None:
        super().__init__(model=bundle, args=args, train_dataset=data, eval_dataset={}, callbacks=callbacks)
        self.gradient_norms = gradient_norms
        self.watched: dict[str, Tensor] = {}
        """Sums of the terms, of this step and rank, that methods want to know."""
        self.bundle, self.data, self.ranks, self.settings = bundle, data, ranks, settings
        self.together, self.zero = together, zero
        self.engine: Engine | None = None
        self.past: list[MicroBatch] = []
        self.measure, self.best, self.patience = evaluate, best, patience
        self.folder = Path(args.output_dir)
        self.best_weights: dict[str, Tensor] | None = None
        self.journal: Journal | None = None
        self.window = Window()

    # data

    def get_train_dataloader(self) -> DataLoader[MicroBatch | Failed]:
        """Items are micro-batches."""
        return loader(self.data, self.args)

    def get_batch_samples(
        self, epoch_iterator: Iterator[MicroBatch | Failed], num_batches: int, device: torch.device
    ) -> tuple[list[MicroBatch], Counts]:
        """The micro-batches of one optimiser step, and their counts over all ranks.

        Raises:
            ValueError: the step has nothing to learn from.
        """
        self.window.begin(time.perf_counter())
        self.bundle.begin(self.moment)
        check_agreement(self.ranks, self.bundle.decided(), self.state.global_step + 1)
        self.bundle.probed = {} if self._probes else None
        self.watched = {}
        started = time.perf_counter()
        self.past = self.read_again(self.bundle.looks_back(), num_batches)
        items = [next(epoch_iterator) for _ in range(num_batches)]
        self.window.waited += time.perf_counter() - started
        micro_batches = [self.written(item) for item in items]
        store = self.data.sources[micro_batches[0].source].store.path
        counts = counted(self.bundle, micro_batches, self.ranks, f"step {self.state.global_step + 1}: rows of {store}")
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

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader[MicroBatch | Failed], resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader[MicroBatch | Failed]]:
        """As Trainer's; under ZeRO the engine takes the places of the wrapped model and of the optimiser."""
        if self.zero is None:
            prepared: tuple[nn.Module, DataLoader[MicroBatch | Failed]] = super()._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint
            )
            return prepared
        looks = looked(self.bundle, self.data, self.written, self.args.seed, self.args.device)
        engine = Engine(self.zero, self.bundle, self.create_optimizer(), self.args, self.ranks, looks)
        self.create_scheduler(num_training_steps=max_steps)
        self.engine = self.optimizer = engine
        self.model_wrapped = self.engine.model
        if resume_from_checkpoint is not None:
            self.engine.load(Path(resume_from_checkpoint))
            self.lr_scheduler.load_state_dict(torch.load(Path(resume_from_checkpoint) / SCHEDULER, weights_only=True))
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        return self.model_wrapped, train_dataloader

    def training_step(self, model: nn.Module, inputs: MicroBatch, num_items_in_batch: Counts | None = None) -> Tensor:
        """As Trainer's; under ZeRO the engine goes backward."""
        if self.engine is None:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return loss
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        self.engine.backward(loss, last=self.accelerator.sync_gradients)
        return loss.detach()

    def compute_loss(
        self, model: nn.Module, inputs: MicroBatch, return_outputs: bool = False, num_items_in_batch: Counts | None = None
    ) -> Tensor:
        """The micro-batch's share of the step's loss; raises ValueError where a term of it is not finite."""
        source = self.data.sources[inputs.source]
        meta = None
        with torch.no_grad():
            features = source.answers(inputs.batch, inputs.fetched)
            if inputs.meta is not None and self.data.meta is not None:
                meta = inputs.meta.batch, self.data.meta.answers(inputs.meta.batch, inputs.meta.fetched)
            past = [
                (one.batch, self.data.sources[one.source].answers(one.batch, one.fetched)) for one in map(self._prepare_inputs, self.past)
            ]
        self.past = []  # the first micro-batch of the step has it
        loss, terms = model(inputs.batch, features, num_items_in_batch, inputs.taught, meta, past)
        check_terms(terms, f"step {self.state.global_step + 1}", source.store.path)
        self.window.add(terms)
        for name in filter(self.bundle.watched, terms):
            self.watched[name] = self.watched.get(name, torch.zeros(())) + terms[name].cpu()
        return loss * self.ranks.count

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | float | None:
        if self.engine is not None:  # clips as it steps, and knows the norm only then
            return None
        self._note_norms()
        clipped: Tensor | float | None = super()._clip_grad_norm(model)
        return clipped

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        if self.engine is not None:
            return None
        if not self.args.max_grad_norm:
            self._note_norms()
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None and norm is not None:
            check_norm(float(norm), self.state.global_step + 1)
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
        window, self.window = self.window, Window(time.perf_counter())
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
        if is_better(self.state, metrics, best):
            weights = self.weights(self.bundle.student)
            if self.ranks.number == 0:
                self.best_weights = {key: tensor.to("cpu", copy=True) for key, tensor in weights.items()}
        elif out_of_patience(self.state, self.patience):
            _log.info(
                "stopped at step %d: no better %s since step %d", self.state.global_step, best.lstrip("-"), self.state.best_global_step
            )
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
        if self.engine is not None:
            grad_norm = check_norm(self.engine.norm(), self.state.global_step)
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
            if self.engine is None:
                self._save_optimizer_and_scheduler(str(writing))
            else:
                self.engine.save(writing)
            self._save_scaler(str(writing))
            self._save_rng_state(str(writing))
            if self.ranks.count > 1:
                checkpoint.save(checkpoint.method_buffers(self.bundle.methods), writing / f"buffers_{self.ranks.number}.safetensors")
            weights = self.weights(self.bundle)
            if self.ranks.number == 0:
                checkpoint.save(weights, writing / "model.safetensors")
                if self.engine is not None:
                    torch.save(self.lr_scheduler.state_dict(), writing / SCHEDULER)
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
        checkpoint.read(self.bundle, self.bundle.methods, folder, self.ranks.number)
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

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """As ``checkpoint.weights``, on the first rank; all ranks come here."""
        return checkpoint.weights(module) if self.engine is None else self.engine.weights(module)

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
