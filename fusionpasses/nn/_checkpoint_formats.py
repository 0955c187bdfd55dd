"""How three tools spell MXFP4 in a checkpoint: names of tensors, and ``quantization_config`` of config.json.

Every format packs alike (``ops/_mxfp4.py``: element 2i in the low nibble, one E8M0 scale per 32 elements along K), so a
format is a pair of suffixes and a configuration:

====================  ==================  ============================  ==========================================
format                quant_method        codes, scales of ``X``        sources
====================  ==================  ============================  ==========================================
"quark"               quark               ``X``, ``X_scale``            amd-quark 0.13; amd/DeepSeek-R1-MXFP4
"gpt_oss"             mxfp4               ``X_blocks``, ``X_scales``    transformers 5.23; openai/gpt-oss-20b
"compressed_tensors"  compressed-tensors  ``X_packed``, ``X_scale``     compressed-tensors 0.20, llm-compressor
====================  ==================  ============================  ==========================================

``X`` is ``a.b.weight``, or, for GPT-OSS, an expert parameter such as ``mlp.experts.down_proj``. Codes are
``[.., N, K/2]`` bytes, GPT-OSS's ``[E, N, K/32, 16]``.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from fusionpasses.errors import BadCheckpoint, UnsupportedInput
from fusionpasses.nn import _checkpoint_compressed_tensors, _checkpoint_quark
from fusionpasses.nn._checkpoint_settings import Format, Settings, patterns


def _read_gpt_oss(config: Mapping[str, Any]) -> Settings:
    return Settings("none", "even", patterns(config, "modules_to_not_convert"))


def _write_gpt_oss(settings: Settings) -> dict[str, Any]:
    return {"modules_to_not_convert": list(settings.excluded), "quant_method": "mxfp4"}


def _matches_gpt_oss(pattern: str, module: str) -> bool:
    # A pattern names a module and all below it, from the root or as the end of a name.
    globs = (pattern, f"{pattern}.*", f"*.{pattern}")
    return any(fnmatch.fnmatchcase(module, glob) for glob in globs)


FORMATS = {
    "quark": Format(
        name="quark",
        quant_method="quark",
        codes_suffix="",
        scales_suffix="_scale",
        read_settings=_checkpoint_quark.read,
        write_settings=_checkpoint_quark.write,
        matches=_checkpoint_quark.matches,
        is_exact=lambda pattern: not set("*?[") & set(pattern) and not pattern.endswith(".weight"),
        acts=("mxfp4", "none"),
        scale_modes=("even", "floor", "ceil"),
    ),
    "gpt_oss": Format(
        name="gpt_oss",
        quant_method="mxfp4",
        codes_suffix="_blocks",
        scales_suffix="_scales",
        read_settings=_read_gpt_oss,
        write_settings=_write_gpt_oss,
        matches=_matches_gpt_oss,
        is_exact=lambda pattern: False,
        acts=("none",),
        scale_modes=("even",),
        blocks_apart=True,
    ),
    "compressed_tensors": Format(
        name="compressed_tensors",
        quant_method="compressed-tensors",
        codes_suffix="_packed",
        scales_suffix="_scale",
        read_settings=_checkpoint_compressed_tensors.read,
        write_settings=_checkpoint_compressed_tensors.write,
        matches=_checkpoint_compressed_tensors.matches,
        is_exact=lambda pattern: not pattern.startswith("re:"),
        acts=("mxfp4", "none"),
        scale_modes=("even",),
    ),
}


def check_format(name: object) -> Format:
    if not isinstance(name, str) or name not in FORMATS:
        raise UnsupportedInput(f"format: got {name!r}, allowed {', '.join(map(repr, FORMATS))}")
    return FORMATS[name]


def check_settings(spelling: Format, settings: Settings) -> None:
    """Refuse what the configuration of a format cannot say."""
    for what, got, allowed in (
        ("act", settings.act, spelling.acts),
        ("scale_mode", settings.scale_mode, spelling.scale_modes),
    ):
        if got not in allowed:
            raise UnsupportedInput(
                f"{what}: got {got!r}, allowed {', '.join(map(repr, allowed))}: {spelling.name!r} cannot say another; "
                f"pass {what}= to write one of these"
            )


def format_of_config(config: Mapping[str, Any]) -> Format:
    method = config.get("quant_method")
    for known in FORMATS.values():
        if known.quant_method == method:
            return known
    raise BadCheckpoint(
        f"quantization_config.quant_method: got {method!r}, allowed "
        f"{', '.join(repr(f.quant_method) for f in FORMATS.values())}; load this checkpoint with the tool that made it"
    )


def format_of_names(names: Sequence[str]) -> Format | None:
    """The format whose names are among these; None if there is none. For files without a configuration."""
    present = set(names)
    found = []
    if any(n.endswith("_blocks") and n.removesuffix("_blocks") + "_scales" in present for n in names):
        found.append("gpt_oss")
    if any(n.endswith(".weight_packed") for n in names):
        found.append("compressed_tensors")
    if any(n.endswith(".weight") and n + "_scale" in present for n in names):
        found.append("quark")
    if len(found) > 1:
        raise BadCheckpoint(
            f"names of tensors: got those of {' and of '.join(map(repr, found))}, allowed one format; put a "
            "config.json with a quantization_config beside the file"
        )
    return FORMATS[found[0]] if found else None
