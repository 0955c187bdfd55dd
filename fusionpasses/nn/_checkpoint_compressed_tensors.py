"""The ``quantization_config`` of compressed-tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fusionpasses.errors import BadCheckpoint
from fusionpasses.nn._checkpoint_settings import Settings, one_of_all, outputs_of, patterns, require, section
from fusionpasses.ops import _mxfp4

_FORMAT = "mxfp4-pack-quantized"


def read(config: Mapping[str, Any]) -> Settings:
    if config.get("transform_config"):
        raise BadCheckpoint(
            "quantization_config.transform_config: got transforms, allowed none; the inputs of these linears would "
            "need them"
        )
    acts, formats = [], set()
    for name, group in section(config, "config_groups").items():
        if group.get("weights") is None:
            continue  # of outputs, or of a cache
        weights, inputs = section(group, "weights"), group.get("input_activations")
        spelled = group.get("format") or config.get("format")
        formats.add(spelled)
        if spelled != _FORMAT:
            continue  # where a tensor is stored so, it is refused
        block = {
            "num_bits": (4,),
            "type": ("float",),
            "strategy": ("group",),
            "group_size": (_mxfp4.BLOCK,),
            "symmetric": (True,),
        }
        require(f"config_groups.{name}.weights", weights, block)
        if inputs is None:
            acts.append("none")
        elif (inputs.get("num_bits"), inputs.get("type")) == (4, "float"):
            require(f"config_groups.{name}.input_activations", inputs, {**block, "dynamic": (True,)})
            acts.append("mxfp4")
        else:
            acts.append(f"{inputs.get('type')}{inputs.get('num_bits')}")
    if not formats:
        raise BadCheckpoint(
            "quantization_config.config_groups: got no group that quantises weights, allowed one of format "
            f"{_FORMAT!r}; is the file damaged?"
        )
    if not acts:
        found = sorted(map(str, formats))
        raise BadCheckpoint(
            f"quantization_config.format: got {', '.join(found)}, allowed {_FORMAT!r}; this checkpoint is not MXFP4"
        )
    outputs = {
        f"config_groups.{name}.output_activations": group.get("output_activations")
        for name, group in section(config, "config_groups").items()
    } | {"kv_cache_scheme": config.get("kv_cache_scheme")}
    return Settings(
        one_of_all("inputs", acts), "even", patterns(config, "ignore"), outputs_of(outputs, "type", "num_bits")
    )


def write(settings: Settings) -> dict[str, Any]:
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
        "format": _FORMAT,
        "input_activations": spec(True) if settings.act == "mxfp4" else None,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": spec(False),
    }
    return {
        "config_groups": {"group_0": group},
        "format": _FORMAT,
        "global_compression_ratio": None,
        "ignore": list(settings.excluded),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.20.0",
    }


def matches(pattern: str, module: str) -> bool:
    return pattern.startswith("re:") and re.match(pattern.removeprefix("re:"), module) is not None
