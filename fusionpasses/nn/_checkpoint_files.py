"""The files of a checkpoint: which tensors their headers list, and which of them are codes and scales of one parameter.

Everything here is decided by names, dtypes and shapes, before a value is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fusionpasses.errors import BadCheckpoint
from fusionpasses.nn._checkpoint_settings import Format
from fusionpasses.ops import _mxfp4

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"

#: safetensors' names of dtypes, and the bytes of an element.
_CODES = {"U8": 1.0, "I8": 1.0, "F4": 0.5}
_FLOATS = {"BF16": 2.0, "F16": 2.0, "F32": 4.0}
_SCALES = {"U8": 1.0, "F8_E8M0": 1.0, **_FLOATS}
_PLAIN = {**_FLOATS, "F64": 8.0, "I16": 2.0, "I32": 4.0, "I64": 8.0, "BOOL": 1.0}
_BYTES = {**_PLAIN, **_CODES, **_SCALES}

#: Ends of names of tensors that belong to another quantisation, and to which.
_FOREIGN = {
    "_global_scale": "NVFP4, which has a second scale",
    "_scale_2": "a quantisation in two levels, such as NVFP4",
    "_scale_inv": "fp8 in blocks",
    "_zero_point": "an asymmetric quantisation",
    "_g_idx": "GPTQ",
    ".input_scale": "a quantisation with static scales of activations",
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor of a file, as its header has it.

    ``dtype`` is safetensors' name. The shape of "F4" counts elements, where torch's float4_e2m1fn_x2 counts pairs.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(math.prod(self.shape) * _BYTES[self.dtype])

    def __str__(self) -> str:
        return f"{self.name!r} ({self.dtype} {list(self.shape)} in {self.file})"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A parameter or buffer of a checkpoint.

    Attributes:
        name: of the parameter, such as ``model.layers.0.mlp.up_proj.weight``, whatever its tensors are called.
        shape: of the values, ``[.., N, K]``.
        tensor: the values, or the packed codes.
        scales: None where it is not quantised.
    """

    name: str
    shape: tuple[int, ...]
    tensor: Stored
    scales: Stored | None = None

    @property
    def quantized(self) -> bool:
        return self.scales is not None

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes + (0 if self.scales is None else self.scales.nbytes)


def folder_of(path: pathlib.Path) -> pathlib.Path:
    return path.parent if path.suffix == ".safetensors" else path


def is_shard(name: object) -> bool:
    """Is it the name of a safetensors file in the checkpoint's own folder?"""
    return isinstance(name, str) and name.endswith(".safetensors") and pathlib.PurePath(name).name == name


def read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{path}: got {error}, allowed a JSON file; is it damaged?") from None
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{path}: got a JSON {type(value).__name__}, allowed an object; is it damaged?")
    return value


@contextlib.contextmanager
def open_file(path: pathlib.Path, device: torch.device | str = "cpu") -> Iterator[Any]:
    """safetensors' handle of a file; a damaged one is a BadCheckpoint."""
    safetensors = require("safetensors")
    try:
        handle = safetensors.safe_open(path, framework="pt", device=str(device))
    except (OSError, safetensors.SafetensorError) as error:
        raise BadCheckpoint(f"{path}: got {error}, allowed a safetensors file; is it damaged?") from None
    with handle:
        yield handle


def require(module: str) -> Any:
    """Import an optional package, or say what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ModuleNotFoundError(
            f"{module}: got no such package, allowed one that is installed; `pip install 'fusionpasses[checkpoints]'` "
            "brings it" + (", or pass progress=False" if module == "tqdm" else ""),
            name=module,
        ) from None


def stamp_of(path: pathlib.Path) -> tuple[int, ...] | None:
    """What changes when a file is written again or replaced; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def read_headers(path: pathlib.Path) -> tuple[dict[str, Stored], dict[str, object]]:
    """All tensors of a checkpoint by name, and the stamps of their files."""
    folder = folder_of(path)
    index: dict[str, str] | None = None
    if path.suffix == ".safetensors":
        files = [path.name]
    elif (folder / SINGLE).exists():
        files = [SINGLE]
    elif (folder / INDEX).exists():
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
            raise BadCheckpoint(f"{folder / INDEX}: got no weight_map of names to files, allowed one; is it damaged?")
        if not index:
            raise BadCheckpoint(f"{folder / INDEX}: got a weight_map without a tensor, allowed some; is it damaged?")
        for name, file in index.items():
            if not is_shard(file):
                raise BadCheckpoint(
                    f"{name!r}: got {file!r} in {folder / INDEX}, allowed a .safetensors file of the same folder"
                )
        files = list(dict.fromkeys(index.values()))
    else:
        raise BadCheckpoint(
            f"{path}: got neither {SINGLE} nor {INDEX} there, allowed a folder with one of them, or a .safetensors file"
        )
    stored: dict[str, Stored] = {}
    stamps: dict[str, object] = {}
    for file in files:
        stamps[file] = stamp_of(folder / file)
        if not (folder / file).is_file():
            first = next((name for name, f in index.items() if f == file), None) if index else None
            raise BadCheckpoint(
                f"{folder / file}: got no such file, allowed all that {path.name} needs"
                + (f"; {first!r} should be in it" if first else "")
            )
        with open_file(folder / file) as handle:
            for name in handle.offset_keys():
                header = handle.get_slice(name)
                if index is not None and index.get(name) != file:
                    raise BadCheckpoint(
                        f"{name!r}: got it in {file}, allowed {index.get(name)!r}, where {INDEX} has it; these files "
                        "are of different checkpoints"
                    )
                stored[name] = Stored(name, file, header.get_dtype(), tuple(header.get_shape()))
    for name, file in (index or {}).items():
        if name not in stored:
            raise BadCheckpoint(
                f"{name!r}: got no such tensor in {file}, allowed all that {INDEX} lists; these files are of different "
                "checkpoints"
            )
    return stored, stamps


def pair(spelling: Format, stored: Mapping[str, Stored]) -> dict[str, Entry]:
    """Codes and scales brought together; every tensor is checked."""
    entries: dict[str, Entry] = {}
    for name, tensor in stored.items():
        for end, what in _FOREIGN.items():
            if name.endswith(end):
                raise BadCheckpoint(f"{tensor}: got a part of {what}, allowed MXFP4 and what is not quantised")
        scaled = spelling.parameter_of_scales(name)
        if scaled is not None:
            if scaled + spelling.codes_suffix not in stored:
                plain = stored.get(scaled)
                raise BadCheckpoint(
                    f"{tensor}: got scales without codes {scaled + spelling.codes_suffix!r}, allowed both or none; "
                    + ("the codes are missing" if plain is None else f"{plain} is not MXFP4")
                )
            continue
        parameter = spelling.parameter_of_codes(name)
        scales = None if parameter is None else stored.get(parameter + spelling.scales_suffix)
        # Where codes have the name of the parameter (Quark), what is not quantised has it, too.
        if parameter is not None and (scales or spelling.codes_suffix or tensor.dtype in _CODES):
            entry = _quantized(spelling, parameter, tensor, scales)
        elif tensor.dtype in _PLAIN:
            entry = Entry(name, tensor.shape, tensor)
        else:
            raise BadCheckpoint(
                f"{tensor}: got {tensor.dtype}, allowed MXFP4 by the names of {spelling.name!r} or one of "
                f"{', '.join(_PLAIN)}; other quantisations in the same checkpoint are not supported"
            )
        if entry.name in entries:
            raise BadCheckpoint(f"{tensor}: got {entry.name!r} both packed and as it is, allowed one of them")
        entries[entry.name] = entry
    return entries


def _quantized(spelling: Format, parameter: str, codes: Stored, scales: Stored | None) -> Entry:
    if codes.dtype not in _CODES:
        raise BadCheckpoint(
            f"{codes}: got {codes.dtype} where packed codes are, allowed {', '.join(_CODES)}; this is not MXFP4"
        )
    if scales is None:
        wanted = parameter + spelling.scales_suffix
        raise BadCheckpoint(f"{codes}: got codes without scales {wanted!r}, allowed both; the scales are missing")
    if scales.dtype not in _SCALES:
        raise BadCheckpoint(
            f"{scales}: got {scales.dtype} for scales, allowed {', '.join(_SCALES)}; MXFP4 has powers of two (F8_E4M3 "
            "scales are NVFP4's)"
        )
    *rows, last = codes.shape or (0,)
    width = last if codes.dtype == "F4" else last * 2
    if spelling.blocks_apart:
        fits = len(codes.shape) == 4 and width == _mxfp4.BLOCK and tuple(rows) == scales.shape
        allowed = "[E, N, K/32, 16] and [E, N, K/32]"
        width *= rows.pop() if fits else 1
    else:
        blocks = (*rows, width // _mxfp4.BLOCK)
        fits = len(codes.shape) >= 2 and width % _mxfp4.BLOCK == 0 and blocks == scales.shape
        allowed = "[.., N, K/2] and [.., N, K/32]"
    if not fits or 0 in codes.shape:
        raise BadCheckpoint(
            f"{codes}: got scales of shape {list(scales.shape)} ({scales.name!r}), allowed shapes {allowed}, K a "
            "positive multiple of 32; this is another packing"
        )
    return Entry(parameter, (*rows, width), codes, scales)
