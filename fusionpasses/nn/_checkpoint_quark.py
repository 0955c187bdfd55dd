"""The ``quantization_config`` of AMD Quark."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

from fusionpasses.errors import BadCheckpoint
from fusionpasses.nn._checkpoint_settings import Settings, one_of_all, outputs_of, patterns, require, section
from fusionpasses.ops import _mxfp4


def _fp4(spec: object) -> Mapping[str, Any] | None:
    """The spec, if it is one of four bits. "mx" is Quark's older packing, which is refused where this is looked at."""
    return spec if isinstance(spec, Mapping) and spec.get("dtype") in ("fp4", "mx") else None


def read(config: Mapping[str, Any]) -> Settings:
    layers = {"global_quant_config": config.get("global_quant_config")}
    for key in ("layer_quant_config", "layer_type_quant_config"):
        layers.update({f"{key}[{k!r}]": v for k, v in section(config, key).items()})
    acts, modes = [], []
    for where, layer in layers.items():
        weight = _fp4(layer.get("weight")) if isinstance(layer, Mapping) else None
        if not isinstance(layer, Mapping) or weight is None:
            continue  # fp8 or int8: where a tensor is stored so, it is refused; what is stored decides
        block = {
            "dtype": ("fp4",),
            "qscheme": ("per_group",),
            "group_size": (_mxfp4.BLOCK,),
            "scale_format": ("e8m0",),
            "scale_calculation_mode": (None, *_mxfp4.SCALE_ADDEND),
        }
        require(f"{where}.weight", weight, block)
        inputs = _fp4(layer.get("input_tensors"))
        if inputs is not None:
            require(f"{where}.input_tensors", inputs, {**block, "is_dynamic": (True,)})
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
    layers |= {f"kv_cache_quant_config[{k!r}]": v for k, v in section(config, "kv_cache_quant_config").items()}
    outputs = {
        f"{where}.output_tensors": layer.get("output_tensors")
        for where, layer in layers.items()
        if isinstance(layer, Mapping)
    } | {"softmax_quant_spec": config.get("softmax_quant_spec")}
    return Settings(
        one_of_all("inputs", acts),
        one_of_all("scale modes", modes),
        patterns(config, "exclude"),
        outputs_of(outputs, "dtype"),
    )


def write(settings: Settings) -> dict[str, Any]:
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


def matches(pattern: str, module: str) -> bool:
    # "*mlp.gate.*" of released checkpoints means the module mlp.gate, whose only parameter is mlp.gate.weight.
    return fnmatch.fnmatchcase(module, pattern) or fnmatch.fnmatchcase(f"{module}.weight", pattern)
