"""``save_checkpoint(source, path, format=...)``: writes the formats that :func:`open_checkpoint` reads.

For round trips, for conversion from one format to another, and for models of :func:`quantize_mxfp4`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fusionpasses.errors import BadCheckpoint, UnsupportedInput
from fusionpasses.nn import _checkpoint_files as files
from fusionpasses.nn import _checkpoint_formats as formats
from fusionpasses.nn import _compiled
from fusionpasses.nn._checkpoint_plan import slots_of
from fusionpasses.nn._checkpoint_settings import Format, Settings
from fusionpasses.nn.checkpoint_reader import Checkpoint, Mxfp4Weight, open_checkpoint, scale_bytes
from fusionpasses.nn.mxfp4_linear import Mxfp4Linear
from fusionpasses.ops import _mxfp4

Tensors = Mapping[str, "Tensor | Mxfp4Weight"] | Iterable[tuple[str, "Tensor | Mxfp4Weight"]]

log = logging.getLogger(__name__)
_PLAIN = (*_mxfp4.INPUT_DTYPES, torch.float64, torch.int16, torch.int32, torch.int64, torch.bool)


def save_checkpoint(
    source: nn.Module | Checkpoint | Tensors,
    path: str | pathlib.Path,
    *,
    format: str,
    act: str | None = None,
    scale_mode: str | None = None,
    config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Write an MXFP4 checkpoint: ``config.json`` and ``model.safetensors``, or shards and their index.

    Nothing is quantised: what is an Mxfp4Linear or an Mxfp4Weight is written packed, byte for byte, and the rest as it
    is, listed in the configuration as excluded. At most one shard is in memory.

    Args:
        source: a module, compiled or not, a :class:`Checkpoint` (to convert it), or names and tensors, as
            ``checkpoint.items()`` gives.
        path: a folder. What is written goes to a hidden folder, in it or, if there is none yet, beside it, and is
            renamed when it is complete and could be opened.
        format: "quark", "gpt_oss" or "compressed_tensors". GPT-OSS has expert parameters ``[E, N, K]`` only.
        act: "mxfp4" or "none": does the model quantise the inputs of its linears? None: as the source does; names and
            tensors do not, so with them it has to be given where the format can say either.
        scale_mode: for those inputs. None: as the source does, or "even".
        config: the other entries of config.json. None: those of the source.
        max_shard_bytes: a larger checkpoint is split; a larger tensor has a file of its own.
        overwrite: replace the checkpoint that is in ``path``; other files there are kept. While its files are replaced,
            both checkpoints are there, so that a process that is killed then loses neither. Of several processes that
            write to one folder of a machine, each waits for the one before.

    Raises:
        UnsupportedInput: an argument, or a tensor, that the format does not have.
        BadCheckpoint: there is a checkpoint or a config.json in ``path``, or a scale is NaN. In both cases ``path`` was
            not changed.
    """
    spelling, path = formats.check_format(format), pathlib.Path(path)
    if isinstance(source, Checkpoint) and source.outputs:
        log.warning("%s: its entries for outputs are not written: %s", source.path, ", ".join(source.outputs))
    if not isinstance(max_shard_bytes, int) or max_shard_bytes <= 0:
        raise UnsupportedInput(f"max_shard_bytes: got {max_shard_bytes!r}, allowed a positive number of bytes")
    if isinstance(source, str | bytes):
        raise UnsupportedInput(f"source: got {source!r}, allowed a module, a Checkpoint, or names and tensors")
    if isinstance(source, nn.Module):
        source = _compiled.unwrapped(source)
        _warn_of_extra_state(source)
    if config is not None and not isinstance(config, Mapping):
        raise UnsupportedInput(f"config: got {type(config).__name__}, allowed a mapping, the entries of config.json")
    found_act, found_mode, found_config = _settings_of(source, spelling)
    act = act or found_act
    settings = Settings(act or spelling.act_without_config, scale_mode or found_mode)
    formats.check_settings(spelling, settings)
    if (os.path.lexists(path) and not path.is_dir()) or path.suffix == ".safetensors":
        raise UnsupportedInput(f"path: got {str(path)!r}, allowed a folder")
    if not overwrite:
        _refuse_replacing(path, (files.SINGLE, files.INDEX, files.CONFIG))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
    # In a folder that exists: its parent may be somewhere else, or not ours to write to.
    temporary = (path if path.exists() else path.parent) / f".{path.name[:32]}.{secrets.token_hex(8)}.partial"
    temporary.mkdir()
    try:
        tensors = _spelled(_tensors_of(source), spelling, says_act=act is not None)
        excluded = _write_tensors(tensors, temporary, max_shard_bytes)
        settings = Settings(settings.act, settings.scale_mode, tuple(excluded))
        document = _without_quantization(found_config if config is None else config)
        document["quantization_config"] = spelling.write_settings(settings)
        (temporary / files.CONFIG).write_text(json.dumps(document, indent=2) + "\n", "utf-8")
        for file in temporary.iterdir():
            shutil.copymode(temporary / files.CONFIG, file)  # safetensors lets nobody else read what it writes
        open_checkpoint(temporary)  # names that mean something else in this format are refused here
        _publish(temporary, path, overwrite)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _warn_of_extra_state(model: nn.Module) -> None:
    own = [
        name or type(module).__name__
        for name, module in _compiled.named_modules(model)
        if type(module).get_extra_state is not nn.Module.get_extra_state
    ]
    if own:
        log.warning("extra state is not written, because checkpoints hold tensors only: %s", ", ".join(own))


def _refuse_replacing(path: pathlib.Path, names: Iterable[str]) -> None:
    for name in names:
        if os.path.lexists(path / name):
            raise BadCheckpoint(f"{path}: got {name} in it, allowed no checkpoint; overwrite=True replaces it")


def _publish(temporary: pathlib.Path, path: pathlib.Path, overwrite: bool) -> None:
    """All files of the old checkpoint go aside before the first new one comes; after an error they are back."""
    if not path.exists():
        try:
            temporary.rename(path)
            return
        except OSError:
            if not path.exists():  # else one has come in the meantime
                raise
    with _alone_in(path):
        new = sorted(file.name for file in temporary.iterdir())
        if not overwrite:  # one may have come in the meantime
            _refuse_replacing(path, (files.SINGLE, files.INDEX, *new))
        # A link is there, whatever it leads to.
        old = [name for name in {files.SINGLE, files.INDEX, *_shards(path), *new} if os.path.lexists(path / name)]
        aside = path / f"{temporary.name}.old"
        aside.mkdir()
        try:
            for name in old:
                (path / name).rename(aside / name)
            for name in new:
                (temporary / name).rename(path / name)
        except BaseException:
            for name in new:
                if not (temporary / name).exists():
                    (path / name).unlink()
            for file in aside.iterdir():
                file.rename(path / file.name)
            aside.rmdir()
            raise
        shutil.rmtree(aside)


def _shards(path: pathlib.Path) -> list[str]:
    """Files that an old index names, if it can be read: of what is damaged, the rest stays."""
    try:
        named = files.read_json(path / files.INDEX).get("weight_map", {}).values()
    except (BadCheckpoint, AttributeError):
        return []
    return [name for name in named if files.is_shard(name) and not (path / name).is_dir()]


@contextlib.contextmanager
def _alone_in(path: pathlib.Path) -> Iterator[None]:
    """One process at a time; the system takes the lock from one that dies. Windows has none, nor locks of folders."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without what quantised it before, of a part of the model, too."""

    def of(part: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in part.items() if key not in ("quantization_config", "compression_config")}

    return {key: of(value) if isinstance(value, Mapping) else value for key, value in of(config).items()}


def _settings_of(source: object, spelling: Format) -> tuple[str | None, str, dict[str, Any]]:
    """act, scale mode and config.json of a source; no act if it does not say which of several."""
    if isinstance(source, Checkpoint):
        return source.act, source.scale_mode, dict(source.config)
    if isinstance(source, nn.Module):
        linears = [m for m in source.modules() if isinstance(m, Mxfp4Linear)]
        acts = {linear.act for linear in linears} or {spelling.act_without_config}
        modes = {linear.scale_mode for linear in linears} or {"even"}
        if len(acts) > 1 or len(modes) > 1:
            raise UnsupportedInput(
                f"source: got linears with acts {sorted(acts)} and scale modes {sorted(modes)}, allowed one of each: a "
                "checkpoint says it once for all"
            )
        config: Any = getattr(source, "config", None)
        document: dict[str, Any] = {}
        if hasattr(config, "to_json_string"):
            document = {"architectures": [type(source).__name__], **json.loads(config.to_json_string())}
        return acts.pop(), modes.pop(), document
    return (spelling.acts[0] if len(spelling.acts) == 1 else None), "even", {}


def _tensors_of(source: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(source, nn.Module):
        for slot in dict.fromkeys(slots_of(source).values()):
            module, attribute = slot.holders[0]
            if isinstance(module, Mxfp4Linear) and attribute == "weight":
                yield slot.names[0], Mxfp4Weight(*module.checkpoint_weight())
            else:
                yield slot.names[0], slot.tensor
    elif isinstance(source, Checkpoint | Mapping):
        yield from source.items()
    elif isinstance(source, Iterable):
        yield from source
    else:
        raise UnsupportedInput(
            f"source: got {type(source).__name__}, allowed a module, a Checkpoint, or names and tensors"
        )


def _spelled(
    tensors: Iterable[tuple[str, Any]], spelling: Format, *, says_act: bool
) -> Iterator[tuple[str, Tensor, str | None]]:
    """(name in the file, tensor, name of a module that is not quantised or None) of every tensor."""
    for name, tensor in _pairs(tensors):
        if isinstance(tensor, Mxfp4Weight) and not tensor.codes.is_meta and not tensor.scales.is_meta:
            if not says_act:
                raise UnsupportedInput(
                    f"act: got None with names and tensors, allowed {' or '.join(map(repr, spelling.acts))}: are the "
                    f"inputs of {name!r} quantised, too? A Checkpoint or a module as source says it"
                )
            codes = tensor.codes
            if spelling.blocks_apart:
                if codes.dim() != 3:
                    raise UnsupportedInput(
                        f"{name!r}: got an MXFP4 weight of shape {list(tensor.shape)}, allowed experts [E, N, K] in "
                        f"{spelling.name!r}; write linears as 'quark' or 'compressed_tensors'"
                    )
                codes = codes.unflatten(-1, (-1, _mxfp4.BLOCK // 2))
            if spelling.parameter_of_codes(name + spelling.codes_suffix) is None:
                raise UnsupportedInput(
                    f"{name!r}: got an MXFP4 weight of this name, allowed names that end in '.weight' in "
                    f"{spelling.name!r}"
                )
            yield name + spelling.codes_suffix, codes, None
            scales = scale_bytes(repr(name), tensor.scales)
            yield name + spelling.scales_suffix, scales, None
        elif isinstance(tensor, Tensor) and tensor.dtype in _PLAIN and _has_dense_data(tensor):
            is_weight = tensor.dim() >= 2 and name.endswith(".weight")
            yield name, tensor, name.removesuffix(".weight") if is_weight else None
        else:
            got = f"{type(tensor).__name__}{' on meta' if isinstance(tensor, Mxfp4Weight) else ''}"
            if isinstance(tensor, Tensor):
                got = f"{tensor.dtype} on {tensor.device}" if tensor.layout == torch.strided else str(tensor.layout)
            raise UnsupportedInput(
                f"{name!r}: got {got}, allowed an Mxfp4Weight, or a tensor with data in {', '.join(map(str, _PLAIN))}"
            )


def _pairs(tensors: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    for pair in tensors:
        if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            kinds = (type(each).__name__ for each in (pair if isinstance(pair, tuple) else (pair,)))
            raise UnsupportedInput(f"source: got ({', '.join(kinds)}), allowed pairs of a name and a tensor")
        yield pair


def _has_dense_data(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta


def _write_tensors(
    tensors: Iterable[tuple[str, Tensor, str | None]], folder: pathlib.Path, max_shard_bytes: int
) -> list[str]:
    """Write the files and, if there are several, their index. Returns the modules that are not quantised."""
    save_file = files.require("safetensors.torch").save_file
    shards: list[list[str]] = []
    excluded: list[str] = []
    shard: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal shard, size
        shards.append(list(shard))
        # transformers refuses files without this.
        save_file(shard, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shard, size = {}, 0

    seen: set[str] = set()
    for name, tensor, plain in tensors:
        if name in seen:
            raise UnsupportedInput(f"{name!r}: got it twice, allowed every name once")
        seen.add(name)
        if shard and size + tensor.nbytes > max_shard_bytes:
            flush()
        # A copy of its own: safetensors refuses tensors that share memory.
        shard[name] = tensor.detach().cpu().contiguous().clone()
        size, total = size + tensor.nbytes, total + tensor.nbytes
        excluded += [plain] if plain is not None else []
    if not seen:
        raise UnsupportedInput("source: got no tensors, allowed at least one")
    flush()
    if len(shards) == 1:
        (folder / "1.part").rename(folder / files.SINGLE)
        return excluded
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for i, name in enumerate(names, 1):
        (folder / f"{i}.part").rename(folder / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {tensor: file for file, held in zip(names, shards) for tensor in held},
    }
    (folder / files.INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return excluded
