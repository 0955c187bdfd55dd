"""What a format of MXFP4 checkpoints is, what its configuration says, and how that is read."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fusionpasses.errors import BadCheckpoint

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


def section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise BadCheckpoint(f"quantization_config.{key}: got {value!r}, allowed a JSON object; is the file damaged?")
    return value


def patterns(config: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = config.get(key) or []
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(p, str) for p in value):
        raise BadCheckpoint(
            f"quantization_config.{key}: got {value!r}, allowed a list of strings; is the file damaged?"
        )
    return tuple(value)


def require(where: str, spec: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse a spec with another value than the allowed ones; a key that is absent says nothing."""
    for key, values in allowed.items():
        if key in spec and spec[key] not in values:
            raise BadCheckpoint(
                f"quantization_config.{where}.{key}: got {spec[key]!r}, allowed {' or '.join(map(repr, values))}: "
                "MXFP4 has blocks of 32 with power-of-two scales; load this checkpoint with the tool that made it"
            )


def one_of_all(what: str, values: Sequence[str]) -> str:
    """The value all quantised layers share; otherwise a word that :func:`load_checkpoint` refuses."""
    return (
        values[0]
        if len(set(values)) == 1
        else f"different {what} for different layers: {', '.join(sorted(set(values)))}"
    )


def outputs_of(specs: Mapping[str, object], *kind: str) -> tuple[str, ...]:
    """The entries that are there, with what they say of these keys."""
    found = {where: spec for where, spec in specs.items() if spec is not None}
    return tuple(
        f"{where} ({''.join(str(spec.get(key, '')) for key in kind) if isinstance(spec, Mapping) else spec})"
        for where, spec in found.items()
    )
