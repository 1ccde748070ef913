"""The progress bar of a run: loss and speed at its end, held-out scores on lines of their own. All else is in metrics.jsonl."""

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments


class Progress(ProgressCallback):
    """transformers' bar without its line for every log."""

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
            bar.set_postfix_str(f"loss {logs['loss']:.4g}, {logs.get('tokens_per_second', 0):,.0f} tokens/s")
