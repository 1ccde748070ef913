"""The verb ``teacher-dump import``: one command for each format."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click

from store.features import StoreDtype

_PATH = click.Path(path_type=Path)
_SHARED = (
    click.argument("sources", nargs=-1, required=True, type=_PATH, metavar="SOURCE..."),
    click.option("--store", required=True, type=_PATH, help="New folder for the store; an import that was cut short goes on there."),
    click.option("--tokenizer", type=_PATH, help="Folder of the teacher's tokenizer; students are checked against it."),
    click.option("--vocab", type=click.IntRange(2, 1 << 24), help="Words that the teacher's head tells apart; else those of --config."),
    click.option("--config", type=_PATH, help="Folder with the teacher's config.json: its blocks, width and vocabulary."),
    click.option("--layers", type=click.IntRange(1, 10_000), help="The teacher's blocks; else as many as --features names, or one."),
    click.option("--model", default="unknown", show_default=True, help="Name of the teacher, for people."),
    click.option("--pass", "pass_name", default="teacher", show_default=True, help="Name of its answers in the store."),
    click.option("--split", default="train", show_default=True, help="Split of all rows."),
    click.option("--slot-tokens", default=32768, show_default=True, type=click.IntRange(128), help="Tokens of a shard."),
    click.option("--dtype", type=click.Choice(get_args(StoreDtype)), help="Type to store numbers in.  [default: that of the source]"),
)


def _shared(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_SHARED):
        command = option(command)
    return command


@click.group(name="import")
def imports() -> None:
    """Make a store of what another program kept of a teacher: words with log-probabilities, or hidden states.

    Sources are files, or folders of them, and are read as a stream; nothing in them is ever executed. The store has one
    pass, whose teacher is known only by the name that you give it.
    """


@imports.command()
@_shared
@click.option("--top", required=True, type=click.IntRange(1), help="Likeliest words to keep; every position must have as many.")
def logprobs(top: int, **_unused: object) -> None:
    """JSON lines with one response of an inference server each.

    Read are vLLM's prompt_logprobs and the logprobs of choices, as the OpenAI protocol has them, also inside the
    output of batch runs. Ask the server for token ids (vLLM: return_token_ids, return_tokens_as_token_ids); text of
    tokens is looked up in --tokenizer. What was not scored, such as a prompt, is read but learnt nothing from.
    """
    from teacher_dump.imports import import_logprobs

    click.echo(import_logprobs(_options(), top))


@imports.command()
@_shared
@click.option("--top", type=click.IntRange(1), help="Likeliest words to keep; by default all that were.")
@click.option("--codec", type=_PATH, help="DistillKit's compression settings.  [default: compression_config.yaml beside the files]")
def distillkit(top: int | None, codec: Path | None, **_unused: object) -> None:
    """Parquet files of DistillKit: its compressed log-probabilities, or plain words and values.

    The legacy form (packed_indices, coeffs) holds logits without their log-sum-exp, and is refused.
    """
    from teacher_dump.imports import import_distillkit

    click.echo(import_distillkit(_options(), top, codec))


@imports.command(name="hidden-states")
@_shared
@click.option("--features", multiple=True, required=True, help="What the layers of a file are, in order; once for each, as hidden.16.")
def hidden_states(features: tuple[str, ...], **_unused: object) -> None:
    """Safetensors files of hidden states, one for each sample: of speculators, or converted from SpecForge.

    vLLM's layer id i is hidden.<i> here, also for its last layer; SpecForge's hidden_state is final. Pickles (.pt, .ckpt)
    are never read; the message says how to convert them.
    """
    from teacher_dump.imports import import_hidden_states

    click.echo(import_hidden_states(_options(), features))


def _options() -> Any:  # noqa: ANN401
    from teacher_dump.imports import ImportOptions

    context = click.get_current_context()
    given = {name: value for name, value in context.params.items() if name in ImportOptions.__dataclass_fields__}
    return ImportOptions(**given, command=context.obj)
