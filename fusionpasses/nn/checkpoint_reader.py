"""``open_checkpoint(path)``: MXFP4 checkpoints of Quark, GPT-OSS and compressed-tensors, one tensor at a time.

Names, dtypes and shapes of all tensors are read from the headers and checked when a checkpoint is opened; values are
read, and float scales checked, when a tensor is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fusionpasses.errors import BadCheckpoint, UnsupportedInput
from fusionpasses.nn import _checkpoint_files as files
from fusionpasses.nn import _checkpoint_formats as formats
from fusionpasses.nn._checkpoint_settings import Format, Settings
from fusionpasses.ops import _mxfp4


@dataclasses.dataclass(frozen=True, eq=False)
class Mxfp4Weight:
    """A weight in MXFP4.

    Attributes:
        codes: uint8 ``[.., N, K/2]``, two E2M1 codes per byte, the even element low.
        scales: uint8 (E8M0) ``[.., N, K/32]``.

    Raises:
        UnsupportedInput: other dtypes or shapes.
    """

    codes: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        for name, tensor in (("codes", self.codes), ("scales", self.scales)):
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.uint8 or tensor.dim() < 2:
                got = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
                raise UnsupportedInput(f"{name}: got {got}, allowed torch.uint8 of two axes or more")
        *rows, half = self.codes.shape
        per_scale = _mxfp4.BLOCK // 2
        if half == 0 or half % per_scale != 0 or list(self.scales.shape) != [*rows, half // per_scale]:
            raise UnsupportedInput(
                f"scales: got shape {tuple(self.scales.shape)} for codes {tuple(self.codes.shape)}, allowed "
                "[.., N, K/32] for [.., N, K/2], K a positive multiple of 32"
            )

    @property
    def shape(self) -> torch.Size:
        """``[.., N, K]``, of the values."""
        return torch.Size((*self.codes.shape[:-1], self.codes.shape[-1] * 2))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, ``[.., N, K]``; bfloat16 and float32 hold them exactly, up to 2**128, which is Inf there."""
        return _mxfp4.dequantize(self.codes, self.scales).to(dtype)


class Checkpoint:
    """An opened checkpoint. It holds headers only.

    Attributes:
        path: the folder or the file.
        format: "quark", "gpt_oss" or "compressed_tensors".
        act: "mxfp4" if the checkpoint quantises the inputs of its linears to MXFP4, "none" if it leaves them; else what
            was found, in words. Without a configuration: "mxfp4", and "none" for GPT-OSS.
        scale_mode: the rule for the scales of activations ("even" where the configuration says nothing).
        excluded: patterns of modules that were left in high precision, in the format's spelling.
        outputs: entries of the configuration that want outputs quantised, and to what. Nothing here does that.
        config: config.json, or {}.
        entries: name to :class:`Entry`, in the order of the files.
    """

    def __init__(
        self,
        path: pathlib.Path,
        spelling: Format,
        settings: Settings,
        config: Mapping[str, Any],
        entries: Mapping[str, files.Entry],
        stamps: Mapping[str, object],
    ) -> None:
        self.path, self.format, self.config, self.entries = path, spelling.name, config, entries
        self.act, self.scale_mode = settings.act, settings.scale_mode
        self.excluded, self.outputs = settings.excluded, settings.outputs
        self._spelling, self._settings = spelling, settings
        self._stamps = stamps  # of the files, when they were opened

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __repr__(self) -> str:
        packed = sum(entry.quantized for entry in self.entries.values())
        return f"Checkpoint({str(self.path)!r}, format={self.format!r}, {packed} of {len(self)} tensors in MXFP4)"

    def excluding(self, name: str) -> str | None:
        """The pattern of ``excluded`` that matches the parameter ``name``, or None."""
        return self._spelling.excluding(self._settings, name)

    def read(self, name: str, *, device: torch.device | str = "cpu") -> Tensor | Mxfp4Weight:
        """The tensor ``name``: a Tensor in the dtype of the file, or an :class:`Mxfp4Weight`.

        Raises:
            BadCheckpoint: there is none, its scales are not powers of two, or a file was changed since it was opened.
        """
        return next(self.items((name,), device=device))[1]

    def items(
        self, names: Iterable[str] | None = None, *, device: torch.device | str = "cpu", progress: bool = False
    ) -> Iterator[tuple[str, Tensor | Mxfp4Weight]]:
        """``(name, tensor)`` of ``names``, or of all, read one at a time; see :meth:`read`.

        Args:
            progress: draw a bar on stderr, if that is a terminal.
        """
        wanted = list(self.entries if names is None else names)
        for missing in (name for name in wanted if name not in self.entries):
            raise BadCheckpoint(
                f"{missing!r}: got no such tensor in {self.path}, allowed the names of list(checkpoint)"
            )
        entries = [self.entries[name] for name in wanted]
        with contextlib.ExitStack() as stack:
            handles: dict[str, Any] = {}

            def get(stored: files.Stored) -> Tensor:
                if stored.file not in handles:
                    path = self._unchanged(stored.file)
                    handles[stored.file] = stack.enter_context(files.open_file(path, device))
                tensor: Tensor = handles[stored.file].get_tensor(stored.name)
                # Copied on the CPU, where it is a view of the mapped file, which may change later.
                return tensor.clone() if tensor.device.type == "cpu" else tensor

            self._unchanged(files.CONFIG)
            bar = stack.enter_context(_bar(sum(e.nbytes for e in entries), progress))
            for entry in entries:
                # In one expression, so that no name here keeps the tensor alive while the caller reads the next.
                yield entry.name, get(entry.tensor) if entry.scales is None else _weight(entry, get)
                bar.update(entry.nbytes)

    def _unchanged(self, file: str) -> pathlib.Path:
        """The path of a file that is the one whose header was read."""
        path = files.folder_of(self.path) / file
        if files.stamp_of(path) != self._stamps[file]:
            raise BadCheckpoint(
                f"{path}: got a file that was changed after the checkpoint was opened, allowed the same; open it again"
            )
        return path


def _weight(entry: files.Entry, get: Any) -> Mxfp4Weight:
    codes = get(entry.tensor).view(torch.uint8)
    rows = entry.shape[:-1]
    return Mxfp4Weight(codes.reshape(*rows, -1), scale_bytes(entry.scales, get(entry.scales)))


def scale_bytes(stored: object, scales: Tensor) -> Tensor:
    """E8M0 bytes of scales stored as uint8, float8_e8m0fnu, or floats that are powers of two from 2**-127 to 2**127."""
    if scales.is_floating_point() and scales.dtype != torch.float8_e8m0fnu:
        bits = scales.float().view(torch.int32)
        exponents, mantissas = bits >> 23, bits & 0x7FFFFF
        # 2**-127 is no normal float32: its exponent field is 0, which is its byte, too. The shift keeps the sign.
        exact = (
            torch.where(exponents == 0, mantissas == 0x400000, mantissas == 0) & (exponents >= 0) & (exponents < 255)
        )
        if not bool(exact.all()):
            where = tuple((~exact).nonzero()[0].tolist())
            raise BadCheckpoint(
                f"{stored}: got the scale {float(scales[where])} at {list(where)}, {int((~exact).sum())} of "
                f"{scales.numel()} like it, allowed powers of two from 2**-127 to 2**127; this is not MXFP4"
            )
        return exponents.to(torch.uint8)
    scales = scales.view(torch.uint8)
    not_a_number = scales == _mxfp4.NAN_SCALE
    if bool(not_a_number.any()):
        where = tuple(not_a_number.nonzero()[0].tolist())
        raise BadCheckpoint(
            f"{stored}: got the scale byte {_mxfp4.NAN_SCALE} (NaN) at {list(where)}, {int(not_a_number.sum())} of "
            f"{scales.numel()} like it, allowed bytes up to 254; the weight was not finite when it was quantised"
        )
    return scales


def open_checkpoint(path: str | pathlib.Path) -> Checkpoint:
    """Open an MXFP4 checkpoint; needs ``pip install 'fusionpasses[checkpoints]'``.

    Args:
        path: a folder with ``model.safetensors``, or ``model.safetensors.index.json`` and its shards, and
            ``config.json``; or one ``.safetensors`` file. The format is that of ``quantization_config``; without a
            config.json it is told by the names of tensors.

    Raises:
        BadCheckpoint: no such files, another quantisation, a damaged file, or tensors that do not fit together. The
            message names the tensor.
    """
    path = pathlib.Path(path)
    config_file = files.folder_of(path) / files.CONFIG
    stamp = files.stamp_of(config_file)
    stored, stamps = files.read_headers(path)
    stamps[files.CONFIG] = stamp
    config = files.read_json(config_file) if config_file.exists() else {}
    quantization = _quantization_of(config)
    if quantization:
        if not isinstance(quantization, Mapping):
            raise BadCheckpoint(f"quantization_config: got {quantization!r}, allowed a JSON object; is it damaged?")
        spelling = formats.format_of_config(quantization)
        try:
            settings = spelling.read_settings(quantization)
            for name in settings.excluded:
                spelling.matches(name, "")
        except (AttributeError, TypeError, KeyError, ValueError, re.error) as error:
            raise BadCheckpoint(
                f"quantization_config: got what cannot be read ({type(error).__name__}: {error}), allowed what "
                f"{spelling.name!r} writes; is it damaged?"
            ) from None
    else:
        found = formats.format_of_names(list(stored))
        if found is None:
            raise BadCheckpoint(
                f"{path}: got no quantization_config and no MXFP4 tensor, allowed a checkpoint in MXFP4; for others "
                "use the model's own loader and quantize_mxfp4(model)"
            )
        spelling, settings = found, Settings(found.act_without_config)
    entries = files.pair(spelling, stored)
    for entry in entries.values():
        pattern = spelling.excluding(settings, entry.name)
        if entry.quantized and pattern is not None:
            raise BadCheckpoint(
                f"{entry.tensor}: got an MXFP4 tensor, allowed none where the configuration excludes {pattern!r}; one "
                "of the two is wrong"
            )
    return Checkpoint(path, spelling, settings, config, entries, stamps)


def _quantization_of(config: Mapping[str, Any]) -> object:
    """Of a model of several parts, such as text and images, the configuration of one part may have it."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    found = [part.get("quantization_config") or part.get("compression_config") for part in parts]
    found = [quantization for quantization in found if quantization]
    if any(other != found[0] for other in found):
        raise BadCheckpoint(
            "quantization_config: got several that differ, of parts of the model, allowed one for all of it"
        )
    return found[0] if found else None


class _NoBar:
    def update(self, count: int) -> None:
        pass


@contextlib.contextmanager
def _bar(total: int, wanted: bool) -> Iterator[Any]:
    if not wanted:
        yield _NoBar()
        return
    # disable=None: no bar where stderr is no terminal.
    with files.require("tqdm").tqdm(total=total, unit="B", unit_scale=True, desc="checkpoint", disable=None) as bar:
        yield bar
