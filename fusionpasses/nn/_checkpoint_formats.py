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

import dataclasses
import fnmatch
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fusionpasses.errors import BadCheckpoint, UnsupportedInput
from fusionpasses.ops import _mxfp4

#: What a checkpoint does with the inputs of its quantised linears.
ACTS = ("mxfp4", "none")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the configuration of a checkpoint says.

    Attributes:
        act: "mxfp4" if inputs are quantised to MXFP4 on the fly, "none" if they are not, else what was found.
        scale_mode: the rule for the scales of activations.
        excluded: patterns of modules that were not quantised, in the format's own spelling.
        outputs: entries that want outputs quantised, those of k_proj and v_proj for example, for a cache in fp8.
    """

    act: str
    scale_mode: str = "even"
    excluded: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Format:
    """One spelling of MXFP4 checkpoints."""

    name: str
    quant_method: str
    codes_suffix: str
    scales_suffix: str
    read_settings: Callable[[Mapping[str, Any]], Settings]
    write_settings: Callable[[Settings], dict[str, Any]]
    matches: Callable[[str, str], bool]  # (pattern, module name)
    is_exact: Callable[[str], bool]  # does the pattern match the module of that name and no other?
    acts: tuple[str, ...]  # what its configuration can say; the first is meant where there is none
    scale_modes: tuple[str, ...]
    blocks_apart: bool = False  # codes are [E, N, K/32, 16] of any parameter, not [.., N, K/2] of a weight

    def parameter_of_scales(self, name: str) -> str | None:
        """The parameter whose scales are called ``name``, or None."""
        return self._parameter(name, self.scales_suffix)

    def parameter_of_codes(self, name: str) -> str | None:
        """The parameter whose codes are called ``name``, if they are codes, or None."""
        return self._parameter(name, self.codes_suffix)

    def _parameter(self, name: str, suffix: str) -> str | None:
        parameter = name.removesuffix(suffix)
        spelled = name.endswith(suffix) and (self.blocks_apart or parameter.split(".")[-1] == "weight")
        return parameter if spelled else None

    @property
    def act_without_config(self) -> str:
        return self.acts[0]

    def excluding(self, settings: Settings, name: str) -> str | None:
        """The pattern that excludes the parameter ``name``, or None."""
        module = name.removesuffix(".weight")
        exact, others = _by_kind(settings.excluded, self.is_exact)
        return module if module in exact else next((p for p in others if self.matches(p, module)), None)


@functools.lru_cache
def _by_kind(patterns: tuple[str, ...], is_exact: Callable[[str], bool]) -> tuple[frozenset[str], tuple[str, ...]]:
    """Names, and what has to be matched: tools list hundreds of names, and there are a hundred thousand tensors."""
    exact = frozenset(filter(is_exact, patterns))
    return exact, tuple(p for p in patterns if p not in exact)


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise BadCheckpoint(f"quantization_config.{key}: got {value!r}, allowed a JSON object; is the file damaged?")
    return value


def _patterns(config: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = config.get(key) or []
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(p, str) for p in value):
        raise BadCheckpoint(
            f"quantization_config.{key}: got {value!r}, allowed a list of strings; is the file damaged?"
        )
    return tuple(value)


def _require(where: str, spec: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse a spec with another value than the allowed ones; a key that is absent says nothing."""
    for key, values in allowed.items():
        if key in spec and spec[key] not in values:
            raise BadCheckpoint(
                f"quantization_config.{where}.{key}: got {spec[key]!r}, allowed {' or '.join(map(repr, values))}: "
                "MXFP4 has blocks of 32 with power-of-two scales; load this checkpoint with the tool that made it"
            )


def _one_of_all(what: str, values: Sequence[str]) -> str:
    """The value all quantised layers share; otherwise a word that :func:`load_checkpoint` refuses."""
    return (
        values[0]
        if len(set(values)) == 1
        else f"different {what} for different layers: {', '.join(sorted(set(values)))}"
    )


def _outputs(specs: Mapping[str, object], *kind: str) -> tuple[str, ...]:
    """The entries that are there, with what they say of these keys."""
    found = {where: spec for where, spec in specs.items() if spec is not None}
    return tuple(
        f"{where} ({''.join(str(spec.get(key, '')) for key in kind) if isinstance(spec, Mapping) else spec})"
        for where, spec in found.items()
    )


# Quark


def _quark_fp4(spec: object) -> Mapping[str, Any] | None:
    """The spec, if it is one of four bits. "mx" is Quark's older packing, which is refused where this is looked at."""
    return spec if isinstance(spec, Mapping) and spec.get("dtype") in ("fp4", "mx") else None


def _read_quark(config: Mapping[str, Any]) -> Settings:
    layers = {"global_quant_config": config.get("global_quant_config")}
    for key in ("layer_quant_config", "layer_type_quant_config"):
        layers.update({f"{key}[{k!r}]": v for k, v in _section(config, key).items()})
    acts, modes = [], []
    for where, layer in layers.items():
        weight = _quark_fp4(layer.get("weight")) if isinstance(layer, Mapping) else None
        if not isinstance(layer, Mapping) or weight is None:
            continue  # fp8 or int8: where a tensor is stored so, it is refused; what is stored decides
        block = {
            "dtype": ("fp4",),
            "qscheme": ("per_group",),
            "group_size": (_mxfp4.BLOCK,),
            "scale_format": ("e8m0",),
            "scale_calculation_mode": (None, *_mxfp4.SCALE_ADDEND),
        }
        _require(f"{where}.weight", weight, block)
        inputs = _quark_fp4(layer.get("input_tensors"))
        if inputs is not None:
            _require(f"{where}.input_tensors", inputs, {**block, "is_dynamic": (True,)})
            acts.append("mxfp4")
            modes.append(inputs.get("scale_calculation_mode") or "even")
        else:
            other = layer.get("input_tensors")
            acts.append("none" if other is None else str(other.get("dtype") if isinstance(other, Mapping) else other))
            modes.append(weight.get("scale_calculation_mode") or "even")
    if not acts:
        raise BadCheckpoint(
            "quantization_config: got a Quark configuration without an fp4 weight, allowed one with dtype 'fp4' and "
            f"group_size {_mxfp4.BLOCK}; this checkpoint is not MXFP4"
        )
    for algorithm in config.get("algo_config") or []:
        # r4 rotates the input of the down projection when the model runs; r1 and r2 are merged into weights.
        online = [k for k, v in algorithm.items() if (k.startswith("online") or k == "r4") and v]
        if online:
            raise BadCheckpoint(
                f"quantization_config.algo_config: got {online[0]}={algorithm[online[0]]!r}, allowed rotations that "
                "are merged into the weights; a linear of this checkpoint would need its inputs rotated"
            )
    layers |= {f"kv_cache_quant_config[{k!r}]": v for k, v in _section(config, "kv_cache_quant_config").items()}
    outputs = {
        f"{where}.output_tensors": layer.get("output_tensors")
        for where, layer in layers.items()
        if isinstance(layer, Mapping)
    } | {"softmax_quant_spec": config.get("softmax_quant_spec")}
    return Settings(
        _one_of_all("inputs", acts),
        _one_of_all("scale modes", modes),
        _patterns(config, "exclude"),
        _outputs(outputs, "dtype"),
    )


def _write_quark(settings: Settings) -> dict[str, Any]:
    def spec(is_dynamic: bool) -> dict[str, Any]:
        return {
            "ch_axis": -1,
            "dtype": "fp4",
            "group_size": _mxfp4.BLOCK,
            "is_dynamic": is_dynamic,
            "is_scale_quant": False,
            "mx_element_dtype": None,
            "observer_cls": "PerBlockMXObserver",
            "qscheme": "per_group",
            "round_method": "half_even",
            "scale_calculation_mode": settings.scale_mode,
            "scale_format": "e8m0",
            "scale_type": "float",
            "symmetric": None,
        }

    return {
        "algo_config": None,
        "exclude": list(settings.excluded),
        "export": {
            "kv_cache_group": [],
            "min_kv_scale": 0.0,
            "pack_method": "reorder",
            "weight_format": "real_quantized",
            "weight_merge_groups": None,
        },
        "global_quant_config": {
            "bias": None,
            "input_tensors": spec(True) if settings.act == "mxfp4" else None,
            "output_tensors": None,
            "target_device": None,
            "weight": spec(False),
        },
        "kv_cache_quant_config": {},
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "quant_method": "quark",
        "quant_mode": "eager_mode",
        "softmax_quant_spec": None,
        "version": "0.13",
    }


def _matches_quark(pattern: str, module: str) -> bool:
    # "*mlp.gate.*" of released checkpoints means the module mlp.gate, whose only parameter is mlp.gate.weight.
    return fnmatch.fnmatchcase(module, pattern) or fnmatch.fnmatchcase(f"{module}.weight", pattern)


# GPT-OSS


def _read_gpt_oss(config: Mapping[str, Any]) -> Settings:
    return Settings("none", "even", _patterns(config, "modules_to_not_convert"))


def _write_gpt_oss(settings: Settings) -> dict[str, Any]:
    return {"modules_to_not_convert": list(settings.excluded), "quant_method": "mxfp4"}


def _matches_gpt_oss(pattern: str, module: str) -> bool:
    # A pattern names a module and all below it, from the root or as the end of a name.
    globs = (pattern, f"{pattern}.*", f"*.{pattern}")
    return any(fnmatch.fnmatchcase(module, glob) for glob in globs)


# compressed-tensors

_CT_FORMAT = "mxfp4-pack-quantized"


def _read_compressed_tensors(config: Mapping[str, Any]) -> Settings:
    if config.get("transform_config"):
        raise BadCheckpoint(
            "quantization_config.transform_config: got transforms, allowed none; the inputs of these linears would "
            "need them"
        )
    acts, formats = [], set()
    for name, group in _section(config, "config_groups").items():
        if group.get("weights") is None:
            continue  # of outputs, or of a cache
        weights, inputs = _section(group, "weights"), group.get("input_activations")
        spelled = group.get("format") or config.get("format")
        formats.add(spelled)
        if spelled != _CT_FORMAT:
            continue  # where a tensor is stored so, it is refused
        block = {
            "num_bits": (4,),
            "type": ("float",),
            "strategy": ("group",),
            "group_size": (_mxfp4.BLOCK,),
            "symmetric": (True,),
        }
        _require(f"config_groups.{name}.weights", weights, block)
        if inputs is None:
            acts.append("none")
        elif (inputs.get("num_bits"), inputs.get("type")) == (4, "float"):
            _require(f"config_groups.{name}.input_activations", inputs, {**block, "dynamic": (True,)})
            acts.append("mxfp4")
        else:
            acts.append(f"{inputs.get('type')}{inputs.get('num_bits')}")
    if not formats:
        raise BadCheckpoint(
            "quantization_config.config_groups: got no group that quantises weights, allowed one of format "
            f"{_CT_FORMAT!r}; is the file damaged?"
        )
    if not acts:
        found = sorted(map(str, formats))
        raise BadCheckpoint(
            f"quantization_config.format: got {', '.join(found)}, allowed {_CT_FORMAT!r}; this checkpoint is not MXFP4"
        )
    outputs = {
        f"config_groups.{name}.output_activations": group.get("output_activations")
        for name, group in _section(config, "config_groups").items()
    } | {"kv_cache_scheme": config.get("kv_cache_scheme")}
    return Settings(
        _one_of_all("inputs", acts), "even", _patterns(config, "ignore"), _outputs(outputs, "type", "num_bits")
    )


def _write_compressed_tensors(settings: Settings) -> dict[str, Any]:
    def spec(is_dynamic: bool) -> dict[str, Any]:
        return {
            "dynamic": is_dynamic,
            "group_size": _mxfp4.BLOCK,
            "num_bits": 4,
            "scale_dtype": "torch.uint8",
            "strategy": "group",
            "symmetric": True,
            "type": "float",
        }

    group = {
        "format": _CT_FORMAT,
        "input_activations": spec(True) if settings.act == "mxfp4" else None,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": spec(False),
    }
    return {
        "config_groups": {"group_0": group},
        "format": _CT_FORMAT,
        "global_compression_ratio": None,
        "ignore": list(settings.excluded),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.20.0",
    }


def _matches_compressed_tensors(pattern: str, module: str) -> bool:
    return pattern.startswith("re:") and re.match(pattern.removeprefix("re:"), module) is not None


FORMATS = {
    "quark": Format(
        name="quark",
        quant_method="quark",
        codes_suffix="",
        scales_suffix="_scale",
        read_settings=_read_quark,
        write_settings=_write_quark,
        matches=_matches_quark,
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
        read_settings=_read_compressed_tensors,
        write_settings=_write_compressed_tensors,
        matches=_matches_compressed_tensors,
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
