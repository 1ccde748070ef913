"""Other programs' answers as a store: finds the files, reads the tokenizer, shows progress, says what was made."""

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from online.batch import BUCKET
from online.fingerprints import tokenizer_fingerprint
from online.models import ModelSpec, load_config, load_tokenizer, model_shape
from online.rows import pad_id
from store import layout
from store.features import FeatureKey, StoreDtype
from store.imports import DistillKit, HiddenStates, Imported, LogProbs, Source, Target, import_answers, import_rows, imported_pass, natural
from store.imports.quantised import Quantisation, settings
from store.manifest import IMPORTED
from store.provenance import provenance
from store.publish import sync_file, sync_folder
from store.strict import parse
from store.writer import StoreWriter

CODEC = "compression_config.yaml"
"""What DistillKit's capture puts beside its Parquet files."""


@dataclass(frozen=True)
class ImportOptions:
    """What all formats are told on the command line."""

    sources: tuple[Path, ...]
    store: Path
    tokenizer: Path | None
    vocab: int | None
    config: Path | None
    model: str
    pass_name: str
    split: str
    slot_tokens: int
    dtype: StoreDtype | None
    layers: int | None
    command: tuple[str, ...]


def import_logprobs(options: ImportOptions, top: int) -> str:
    """JSON lines of an inference server's responses."""
    tokenizer, vocab = _words(options)
    texts = {} if tokenizer is None else token_texts(tokenizer)
    source = LogProbs(_files(options.sources, (".jsonl", ".json", ".ndjson")), top, vocab, options.dtype or "float32", texts)
    return _import(source, options, tokenizer, vocab, width=0, ran_in="float32")


def import_distillkit(options: ImportOptions, top: int | None, codec: Path | None) -> str:
    """Parquet files of DistillKit."""
    tokenizer, vocab = _words(options)
    files = _files(options.sources, (".parquet",))
    beside = files[0].parent / CODEC
    codec = codec or (beside if beside.is_file() else None)
    source = DistillKit(files, top, vocab, options.dtype or "float32", None if codec is None else _quantisation(codec))
    return _import(source, options, tokenizer, vocab, width=0, ran_in="float32")


def import_hidden_states(options: ImportOptions, features: Sequence[str]) -> str:
    """Safetensors files of hidden states."""
    tokenizer, vocab = _words(options)
    files = _files(options.sources, (".safetensors",), (".ckpt", ".ckpt.gz", ".pt", ".pth"))
    source = HiddenStates(files, [FeatureKey.parse(text) for text in features], vocab, options.dtype)
    return _import(source, options, tokenizer, vocab, width=source.width, ran_in=source.number)


def token_texts(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Text of a token, as a server decodes it alone, or its name in the vocabulary -> id; texts that several tokens share are left out."""
    names = {number: name for name, number in tokenizer.get_vocab().items()}
    texts = {number: str(tokenizer.decode([number], clean_up_tokenization_spaces=False)) for number in names}
    shared = Counter(texts.values())
    found = {text: number for number, text in texts.items() if shared[text] == 1}
    return {name: number for number, name in names.items() if name not in shared} | found


def _import(source: Source, options: ImportOptions, tokenizer: PreTrainedTokenizerBase | None, vocab: int, width: int, ran_in: str) -> str:
    made = provenance(options.command)
    known = None if options.config is None else model_shape(load_config(options.config), "causal_lm")
    info = imported_pass(
        source.features, vocab=vocab, width=width, model=options.model, dtype=ran_in, made=made, layers=options.layers, known=known
    )
    layout.pass_name(options.pass_name)
    target = Target(
        path=options.store,
        pass_name=options.pass_name,
        split=options.split,
        slot_tokens=options.slot_tokens,
        bucket=BUCKET,
        pad_id=0 if tokenizer is None else pad_id(tokenizer),
        tokenizer=IMPORTED if tokenizer is None else tokenizer_fingerprint(tokenizer),
        made=made,
    )
    with tqdm(desc="rows", unit=" tokens", unit_scale=True) as progress:
        import_rows(source, target, progress.update)
    with tqdm(desc="answers", unit=" tokens", unit_scale=True) as progress:
        done = import_answers(source, target, info, progress.update)
    if tokenizer is not None:
        with StoreWriter.open(options.store) as writer, writer.announcing():
            _ship(tokenizer, layout.model(options.store, options.pass_name))
    return _summary(options, source, done)


def _summary(options: ImportOptions, source: Source, done: Imported) -> str:
    lines = [
        f"{options.store}: {done.rows:,} rows of {done.tokens:,} tokens in {done.slots:,} shards, pass {options.pass_name}, "
        + (f"{done.new_slots:,} committed now" if done.new_slots else "nothing was left to do"),
        *(f"  {spec.key} in {spec.kept_as}" for spec in source.features),
    ]
    if done.full:
        lines.append(f"at {done.full:,} of {done.positions:,} positions the words kept hold all of the mass, as far as can be told")
    if options.tokenizer is None:
        lines.append("no tokenizer was given: students cannot be checked against it; import with --tokenizer to train from the store")
    return "\n".join(lines)


def _words(options: ImportOptions) -> tuple[PreTrainedTokenizerBase | None, int]:
    """The tokenizer, if one is given, and the number of words that the teacher's head tells apart."""
    folder = options.tokenizer
    tokenizer = None if folder is None else load_tokenizer(ModelSpec(model=folder, head="causal_lm"))
    if options.vocab is not None:
        return tokenizer, options.vocab
    if options.config is not None:
        return tokenizer, model_shape(load_config(options.config), "causal_lm").vocab
    if tokenizer is None:
        raise ValueError("expected --tokenizer FOLDER, or the number of words with --vocab or --config")
    return tokenizer, max(tokenizer.get_vocab().values()) + 1


def _files(sources: Sequence[Path], suffixes: tuple[str, ...], refused: tuple[str, ...] = ()) -> list[Path]:
    """Files as they are named, and those below folders; names with numbers in the order of these."""
    found = []
    for source in sources:
        if not source.exists():
            raise ValueError(f"no such file or folder: {source}")
        inside = sorted((path for path in source.rglob("*") if path.is_file()), key=natural) if source.is_dir() else []
        matching = [path for path in inside if path.name.endswith(suffixes)] or [path for path in inside if path.name.endswith(refused)]
        if source.is_dir() and not matching:
            raise ValueError(f"expected files that end in {' or '.join(suffixes)} in {source}, found none")
        found += matching or [source]
    return found


def _quantisation(path: Path) -> Quantisation:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not a YAML file that can be read: {error}") from None
    return parse(Quantisation, settings(tree, str(path)), str(path))


def _ship(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Put the tokenizer beside the pass, whole or not at all, so that rows can be shown as text."""
    if folder.exists():
        return
    temporary = layout.temporary(folder)
    if temporary.exists():
        shutil.rmtree(temporary)
    tokenizer.save_pretrained(temporary)
    for path in sorted(temporary.rglob("*")):
        sync_folder(path) if path.is_dir() else sync_file(path)
    temporary.rename(folder)
    sync_folder(folder.parent)
