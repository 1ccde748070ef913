"""Hidden states in safetensors files, one file for each sample, as tools that train draft models dump them.

Two sets of names, [n] tokens, L layers of width H:

- speculators (``hs_<i>.safetensors``, written by vLLM): ``token_ids`` [n], ``hidden_states`` [n, L, H]; with its float8
  backend also ``hidden_states_scales`` [n, 1, 1], by which the numbers are multiplied;
- SpecForge and Model-Optimizer, once converted: ``input_ids`` [n], ``aux_hidden_state(s)`` [n, (L - 1) H] or without it,
  ``hidden_state(s)`` [n, H], ``loss_mask`` [n]; a leading axis of 1 is left out. What the mask leaves out is not scored:
  token t is a label, of the logits at t - 1, where its mask is 1.

Which layers these are stands in no file, so that the features are named by whoever imports. vLLM's layer id i is the output
of i blocks, ``hidden.<i>``, also for the last one, before the final norm. SpecForge's ``hidden_state`` is after it: ``final``.

Source: vllm-project/speculators 0.9.0 (``hs_connectors``), sgl-project/SpecForge (``scripts/prepare_hidden_states.py``).
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.codecs import decode, encode, feature_spec
from store.codecs.cast import restore
from store.features import FeatureKey, FeatureSpec, StoreDtype
from store.imports.samples import UNSCORED, Sample
from store.manifest import Json
from store.tensors import TensorFile

_FLOATS: dict[str, StoreDtype] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_FLOAT8, _SCALES = "F8_E4M3", "hidden_states_scales"
_SITES = ("hidden", "final", "input", "head_input")
_AUX, _LAST = ("aux_hidden_state", "aux_hidden_states"), ("hidden_state", "hidden_states")
_PICKLES = (".pt", ".pth", ".ckpt", ".ckpt.gz", ".bin", ".pkl")

CONVERT = """\
{path} is a pickle, which can run whatever its maker put into it when it is read, so it is never read here.
Convert such files with torch's reader that builds nothing but tensors (weights_only=True), and import the new folder:
  python -c "
import gzip, pathlib, sys, torch
from safetensors.torch import save_file
for path in pathlib.Path(sys.argv[1]).rglob('*{suffix}'):
    with (gzip.open if path.name.endswith('.gz') else open)(path, 'rb') as file:
        record = torch.load(file, weights_only=True, map_location='cpu')
    out = pathlib.Path(sys.argv[2], path.name.removesuffix('{suffix}') + '.safetensors')
    out.parent.mkdir(exist_ok=True)
    save_file({{name: value.clone() for name, value in record.items() if torch.is_tensor(value)}}, out)
" {folder} NEW-FOLDER"""


class HiddenStates:
    """Safetensors files; ``keys`` names the layers in the order in which a file holds them.

    Args:
        dtype: Type to store them in; by default their own, bfloat16 for those in eight bits.
    """

    def __init__(self, files: Sequence[Path], keys: Sequence[FeatureKey], vocab: int, dtype: StoreDtype | None) -> None:
        if pickles := [path for path in files if path.name.endswith(_PICKLES)]:
            suffix = next(suffix for suffix in _PICKLES if pickles[0].name.endswith(suffix))
            raise ValueError(CONVERT.format(path=pickles[0], suffix=suffix, folder=pickles[0].parent))
        if not keys or len(set(keys)) < len(keys):
            raise ValueError("expected the feature of each layer, in order, each once, as in --features hidden.2 --features hidden.16")
        if wrong := [str(key) for key in keys if key.site not in _SITES or key.positions != "all" or key.pass_name]:
            raise ValueError(f"--features: expected hidden states of all tokens such as hidden.16, found {', '.join(wrong)}")
        self.files, self.vocab = tuple(files), vocab
        self._keys = tuple(keys)
        first = TensorFile(self.files[0])
        found, states = self._states(first)
        self.number = _FLOATS.get(found, "bfloat16")
        """Type of the numbers in the first file; bfloat16 for those in eight bits, which were quantised from it."""
        self.width = states.shape[2]
        self._masked = "loss_mask" in first
        kept = dtype or self.number
        self.features: tuple[FeatureSpec, ...] = tuple(feature_spec(key, kept, self.width) for key in keys)
        self.options: Json = {"features": [str(key) for key in keys], "vocab": vocab, "dtype": kept}

    def records(self, start: int, answers: bool) -> Iterator[list[Sample]]:
        """One record for each file; its number is the last one in the file's name, else its place."""
        for place, path in enumerate(self.files[start:], start):
            digits = re.findall(r"\d+", path.stem)
            yield [self._sample(path, int(digits[-1]) if digits and len(digits[-1]) < 16 else place, answers)]

    def _sample(self, path: Path, number: int, answers: bool) -> Sample:
        file = TensorFile(path)
        ids = _numbers(file, "token_ids" if "token_ids" in file else "input_ids")
        if len(ids) == 0 or ids.min() < 0 or ids.max() >= self.vocab:
            found = f"{ids.min()} to {ids.max()}" if len(ids) else "none"
            raise ValueError(f"{path}: expected token ids 0 to {self.vocab - 1}, found {found}")
        labels = None
        if ("loss_mask" in file) != self._masked:
            raise ValueError(f"{path}: expected a loss_mask in all files or in none")
        if self._masked:
            mask = _numbers(file, "loss_mask")
            if mask.shape != ids.shape:
                raise ValueError(f"{path}: expected a loss_mask of {len(ids)} tokens, found {len(mask)}")
            labels = np.append(np.where(mask[1:] > 0, ids[1:], UNSCORED), UNSCORED).astype(np.int32)
        return Sample(
            str(path), number, ids.astype(np.int32), token_labels=labels, answers=self._answers(file, len(ids)) if answers else {}
        )

    def _answers(self, file: TensorFile, tokens: int) -> dict[FeatureKey, dict[str, NDArray[Any]]]:
        dtype, states_nLH = self._states(file)
        if states_nLH.shape[::2] != (tokens, self.width):
            raise ValueError(f"{file.path}: expected states of {tokens} tokens, {self.width} wide, found {list(states_nLH.shape[::2])}")
        answers = {}
        for layer, spec in enumerate(self.features):
            held = states_nLH[:, layer]
            as_it_is = spec.codec == "cast" and spec.arrays[0].dtype == _FLOATS.get(dtype)
            arrays = {"": held} if as_it_is else encode(spec, _floats(held, dtype))
            if not np.isfinite(decode(spec, arrays)[""]).all():
                raise ValueError(
                    f"{file.path}: {spec.key} is not finite, or not as it is stored; leave the file out or give another --dtype"
                )
            answers[spec.feature] = arrays
        return answers

    def _states(self, file: TensorFile) -> tuple[str, NDArray[Any]]:
        """[n, L, H] all layers, and the type of their numbers; of eight bits, float32 times scale."""
        layers, ours = len(self._keys), "token_ids" in file
        aux, name = (next((name for name in names if name in file), None) for names in (_AUX, _LAST))
        if name is None:
            raise ValueError(f"{file.path}: expected hidden_states, found {', '.join(file.names)}")
        dtype = file.dtype(name)
        if dtype not in (*_FLOATS, _FLOAT8) or (aux is not None and file.dtype(aux) != dtype):
            raise ValueError(f"{file.path}: expected hidden states in one type of {', '.join((*_FLOATS, _FLOAT8))}, found {dtype}")
        last = file.read(name) if ours else _squeezed(file.read(name))
        if aux is not None:
            others = _squeezed(file.read(aux))
            if others.ndim != 2 or last.ndim != 2 or others.shape != (len(last), (layers - 1) * last.shape[1]):
                raise ValueError(
                    f"{file.path}: {layers} features are named; expected {layers - 1} layers in {aux} and one in {name}, "
                    f"found {list(others.shape)} and {list(last.shape)}"
                )
            last = np.concatenate([others, last], axis=1).reshape(len(last), layers, last.shape[1])
        elif not ours and last.ndim == 2:
            last = last[:, None]
        if last.ndim != 3 or last.shape[1] != layers or not last.shape[2]:
            raise ValueError(
                f"{file.path}: {layers} features are named; expected {name} [tokens, {layers}, width], found {list(last.shape)}"
            )
        if dtype != _FLOAT8:
            return dtype, last
        scales = file.read(_SCALES) if _SCALES in file else np.zeros(0, np.float32)
        if scales.size != len(last) or file.dtype(_SCALES) != "F32":
            raise ValueError(f"{file.path}: numbers of eight bits need {_SCALES} in F32, one for each of {len(last)} tokens")
        return "F32*", _floats(last, dtype) * scales.reshape(-1, 1, 1)


def _floats(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    return restore(values, "float8_e4m3fn" if dtype == _FLOAT8 else _FLOATS.get(dtype, "float32"))  # type: ignore[arg-type]


def _squeezed(values: NDArray[Any]) -> NDArray[Any]:
    """Without the axis of batches of one."""
    return values[0] if values.ndim == 3 and len(values) == 1 else values


def _numbers(file: TensorFile, name: str) -> NDArray[np.int64]:
    """[n] whole numbers, also where they are a batch of one."""
    values = file.read(name)
    if file.dtype(name)[0] not in "IUB" or file.dtype(name) == "BF16" or values.size != max(values.shape, default=0):
        raise ValueError(f"{file.path}: expected {name} [tokens] in whole numbers, found {list(values.shape)} in {file.dtype(name)}")
    return values.reshape(-1).astype(np.int64)
