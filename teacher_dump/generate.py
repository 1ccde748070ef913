"""The recipe of texts that a causal teacher writes, and the corpus file that is made of it (sequence-level distillation).

A student that learns from its teacher's texts needs neither its probabilities nor its tokenizer: Kim, Rush, "Sequence-Level Knowledge
Distillation", EMNLP 2016, arXiv 1606.07947, where the texts come from beam search; here they are the likeliest words one by one, or drawn.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from jinja2 import TemplateError
from pydantic import Field, field_validator, model_validator
from tqdm import tqdm

from online.batch import Batch
from online.corpus import Record, SourceSpec, read_records
from online.examples import text_of
from online.fingerprints import tokenizer_fingerprint
from online.models import LoadedModel, ModelSpec, check_length, load_model
from online.packing import wrapping_of
from online.rollout import Writing, end_tokens, prompt_lengths, roll_out
from online.rows import pad_id
from online.templates import Template
from store.remote import url_of
from store.strict import Strict, load_yaml
from teacher_dump.augmented_file import made_before, survey, whole
from teacher_dump.generated_file import join, write_part
from teacher_dump.recipe import known_device

GENERATING = 1
"""Version of generation; any change that alters texts bumps it."""
PART = 16
"""Batches after which texts are safe: a run that is stopped loses no more."""


class GenerateRecipe(Strict):
    """Prompts of a corpus, and what a causal teacher writes to them."""

    output: Path
    """Parquet file to write: `prompt`, `response`, `ended` (whether the teacher ended it itself), `original` (number of the record, from 0)
    and `sample` (of the responses to one prompt, from 0)."""
    sources: tuple[SourceSpec, ...] = Field(min_length=1)
    prompt: str = "{prompt}"
    """Template over columns of the sources."""
    chat: bool = False
    """Whether the prompt is what a user says, written as the tokenizer's chat template says; otherwise the teacher goes on with it as it
    is."""
    teacher: ModelSpec
    """Its head is causal_lm."""
    max_prompt: int = Field(default=512, ge=1)
    """Longest prompt in tokens; records with longer ones are left out, and counted."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Longest response in tokens."""
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the likeliest word each time."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the likeliest words alone that together have this probability."""
    samples: int = Field(default=1, ge=1)
    """Responses to each prompt."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Of what is drawn: a response follows from it, from the number of its record and from its own."""
    batch_rows: int = Field(default=16, ge=1)
    """Responses that are written at a time."""
    device: str | None = None
    """Where the teacher runs, such as cpu or cuda:1; by default the first GPU if there is one."""

    @field_validator("output")
    @classmethod
    def _parquet(cls, value: Path) -> Path:
        if url_of(value) or value.suffix != ".parquet":
            raise ValueError("expected a file on this machine that ends in .parquet")
        return value

    @field_validator("device")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        return None if value is None else known_device(value)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.teacher.head != "causal_lm":
            raise ValueError(f"teacher.head: expected causal_lm, found {self.teacher.head}")
        if not Template(self.prompt).fields:
            raise ValueError("prompt: expected a column name between braces, such as {prompt}")
        if not self.temperature and (self.samples > 1 or self.top_p < 1):
            raise ValueError("samples and top_p are of words that are drawn: give a temperature above 0")
        return self


class Prompt(NamedTuple):
    """One response to be written."""

    original: int
    sample: int
    text: str
    ids: list[int]


def load(path: Path, overrides: Sequence[str] = ()) -> GenerateRecipe:
    """Read a recipe; raises ValueError for a missing file, an unknown key or a wrong value."""
    return load_yaml(GenerateRecipe, path, overrides)


def generate(recipe: GenerateRecipe) -> str:
    """Make the corpus file of ``recipe`` unless it is there, going on where an earlier run stopped; what was done.

    Raises:
        ValueError: the recipe asks for something that cannot be had, a text cannot be read, or the output is another kind of file.
        StoreError: the output was made of something else, or another process writes it.
    """
    found = survey(recipe.sources, Template(recipe.prompt).fields, recipe.output)
    device = torch.device(recipe.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loaded = load_model(recipe.teacher, device=device)
    if loaded.tokenizer is None:
        raise ValueError(f"{recipe.teacher.model} has no tokenizer: give teacher.tokenizer, the folder of the one that it was trained with")
    if recipe.chat and not loaded.tokenizer.chat_template:
        raise ValueError("chat: the teacher's tokenizer has no chat template; leave chat out to have it go on with the prompts as they are")
    check_length(loaded, recipe.max_prompt + recipe.max_new_tokens)
    made = _made_of(recipe, found.fingerprint, loaded)
    if (there := made_before(recipe.output, made, "generate")) is not None:
        return f"{recipe.output}: {there:,} responses, nothing was left to do"
    kept, name = 0, hashlib.sha256(json.dumps(made, sort_keys=True, default=str).encode()).hexdigest()[:12]
    parts = recipe.output.with_name(f"{recipe.output.name}.{name}.parts")  # those of another recipe are no hindrance
    with whole(recipe.output) as file, tqdm(desc="generate", total=found.records, unit=" records", unit_scale=True) as progress:
        files: list[Path] = []
        for prompts in _blocks(recipe, loaded, progress):
            files.append(parts / f"{len(files):06d}.parquet")
            if made_before(files[-1], made, "generate") is None:
                batches = [prompts[start : start + recipe.batch_rows] for start in range(0, len(prompts), recipe.batch_rows)]
                write_part(files[-1], (row for batch in batches for row in _answers(recipe, loaded, batch, device)), made)
            kept += len(prompts)
        if not files:
            raise ValueError(f"no prompt of up to {recipe.max_prompt} tokens among the {found.records:,} records; raise max_prompt")
        join(files, file, made)
    for folder in list(parts.absolute().parent.iterdir()):
        if folder.name.startswith(f"{recipe.output.name}.") and folder.suffix == ".parts":
            shutil.rmtree(folder)
    left_out = found.records - kept // recipe.samples
    return (
        f"{recipe.output}: {kept:,} responses to {kept // recipe.samples:,} prompts"
        + (f"; {left_out:,} prompts of more than {recipe.max_prompt} tokens, or of none, were left out" if left_out else "")
        + "\nName it in rows.sources of a dump or of rows for students of any tokenizer; see docs/causal.md."
    )


def _blocks(recipe: GenerateRecipe, loaded: LoadedModel, progress: "tqdm[Any]") -> Iterator[list[Prompt]]:
    """The responses that are to be written, as many at a time as a part holds."""
    assert loaded.tokenizer is not None
    front = [] if recipe.chat else wrapping_of(loaded.tokenizer).prefix.tolist()  # what a tokenizer puts behind a text would end it
    records = read_records(recipe.sources, Template(recipe.prompt).fields)
    prompts = (prompt for record in records for prompt in _prompts(recipe, loaded, front, record, progress))
    while block := list(islice(prompts, PART * recipe.batch_rows)):
        yield block


def _prompts(recipe: GenerateRecipe, loaded: LoadedModel, front: list[int], record: Record, progress: "tqdm[Any]") -> Iterator[Prompt]:
    """The responses to be written to a record; none where its prompt is too long."""
    template, tokenizer = Template(recipe.prompt), loaded.tokenizer
    assert tokenizer is not None
    text = template.render({name: text_of(record, name) for name in template.fields}).text
    if recipe.chat:
        try:
            said = [{"role": "user", "content": text}]
            ids = list(tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True)["input_ids"])
        except TemplateError as error:
            raise ValueError(f"{record.where}: the tokenizer's chat template refuses the prompt: {error}") from None
    else:
        ids = [*front, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    progress.update()
    if 0 < len(ids) <= recipe.max_prompt:
        yield from (Prompt(record.ordinal, sample, text, ids) for sample in range(recipe.samples))


def _answers(recipe: GenerateRecipe, loaded: LoadedModel, prompts: Sequence[Prompt], device: torch.device) -> Iterator[dict[str, object]]:
    """What the teacher writes to ``prompts``, in one go."""
    tokenizer = loaded.tokenizer
    assert tokenizer is not None
    lengths, ends = [len(prompt.ids) for prompt in prompts], end_tokens(loaded)
    mask_BT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids_BT = torch.full(mask_BT.shape, pad_id(tokenizer))
    ids_BT[mask_BT] = torch.tensor([word for prompt in prompts for word in prompt.ids])
    order = torch.arange(len(prompts))
    batch = Batch(order, ids_BT, mask_BT, None, None, None, None, None, order).to(device)
    chances_BL = None
    if recipe.temperature:
        drawn = [np.random.default_rng([recipe.seed, one.original, one.sample]).random(recipe.max_new_tokens) for one in prompts]
        chances_BL = torch.from_numpy(np.stack(drawn))
    writing = Writing(recipe.max_new_tokens, recipe.temperature or 1.0, recipe.top_p)
    written = roll_out(loaded, batch, writing, chances_BL, ends)
    for prompt, ids, start, length in zip(
        prompts, written.input_ids.tolist(), prompt_lengths(batch).tolist(), written.lengths.tolist(), strict=True
    ):
        words = ids[start:length]
        ended = bool(words) and words[-1] in ends
        response = tokenizer.decode(words[:-1] if ended else words, skip_special_tokens=True)
        yield {"prompt": prompt.text, "response": response, "ended": ended, "original": prompt.original, "sample": prompt.sample}


def _made_of(recipe: GenerateRecipe, corpus: str, loaded: LoadedModel) -> dict[str, Any]:
    """Everything that the responses depend on, by content; names of files and the device do not count."""
    assert loaded.tokenizer is not None
    fields = ("prompt", "chat", "max_prompt", "max_new_tokens", "temperature", "top_p", "samples", "seed", "batch_rows")
    return {
        "version": GENERATING,
        "corpus": corpus,
        **recipe.model_dump(mode="json", include=set(fields)),
        "teacher": loaded.fingerprint,
        "dtype": recipe.teacher.dtype,
        "tokenizer": tokenizer_fingerprint(loaded.tokenizer),
    }
