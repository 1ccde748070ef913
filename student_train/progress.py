"""The progress bar of a run: loss and speed at its end, held-out scores on lines of their own. All else is in metrics.jsonl."""

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments


class Progress(ProgressCallback):
    """transformers' bar without its line for every log."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_unused: object,  # the signature is transformers'
    ) -> None:
        """The bar begins where the run goes on: steps of an earlier process are neither in its rate nor in the time that it foresees."""
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True, unit="step")

    def close(self) -> None:
        """End the bar's line also where training ends in an error, whose message would go on in it."""
        if self.training_bar is not None:
            self.training_bar.close()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_unused: object,  # the signature is transformers'
    ) -> None:
        bar = self.training_bar
        if bar is None or logs is None:
            return
        scores = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
        if scores:
            bar.write(f"step {state.global_step}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
        elif "loss" in logs:
            speed = f"{logs.get('tokens_per_second', 0):,.0f} tokens/s, {logs.get('loader_wait', 0):.0%} waiting for data"
            bar.set_postfix_str(f"loss {logs['loss']:.4g}, {speed}")
