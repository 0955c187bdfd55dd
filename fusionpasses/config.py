"""Settings of :func:`fusionpasses.fusion_backend`: one frozen object, checked when it is made."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence

from fusionpasses.errors import BadConfig

PROVIDER_CHOICES = ("auto", "aiter", "aiter_finite", "aiter_fast", "triton", "reference")


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """What the passes may do.

    Attributes:
        provider: who runs the fused ops. ``"auto"`` takes the first provider whose probe says yes for the device; a
            provider named here is used or :class:`~fusionpasses.ProviderUnavailable` is raised. ``"aiter"`` and
            ``"aiter_finite"`` are AITER where its bytes are ours, by a rule asked at each call, else Triton;
            ``"aiter_fast"`` also where it leaves roundings out, so that ordinary inputs give other bytes.
        passes: names of the passes to run, kept in the order of ``fusionpasses.patterns.PASS_NAMES``; None runs all.
    """

    provider: str = "auto"
    passes: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.provider not in PROVIDER_CHOICES:
            raise BadConfig(
                f"provider: got {self.provider!r}, allowed {', '.join(map(repr, PROVIDER_CHOICES))}"
                f"{did_you_mean(self.provider, PROVIDER_CHOICES)}"
            )
        if self.passes is not None:
            from fusionpasses.patterns import PASS_NAMES

            if isinstance(self.passes, str) or not isinstance(self.passes, Iterable):
                raise BadConfig(
                    f"passes: got {self.passes!r} of type {type(self.passes).__name__}, allowed a sequence of pass "
                    f"names, such as ({PASS_NAMES[0]!r},), or None for all"
                )
            wanted = tuple(self.passes)
            for name in wanted:
                if name not in PASS_NAMES:
                    raise BadConfig(
                        f"passes: got {name!r}, allowed {', '.join(map(repr, PASS_NAMES))}"
                        f"{did_you_mean(name, PASS_NAMES)}"
                    )
            # One way to say one thing: backends that do the same are equal.
            object.__setattr__(self, "passes", tuple(name for name in PASS_NAMES if name in wanted))


def did_you_mean(got: object, allowed: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` when one of ``allowed`` is close to ``got``, else the empty string."""
    close = difflib.get_close_matches(str(got), list(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def resolve_inductor_options(mode: str | None, options: Mapping[str, object] | None) -> dict[str, object]:
    """The Inductor ``config_patches`` for torch.compile's ``mode`` and ``options``, checked.

    Raises:
        BadConfig: an option Inductor does not have or of another type, an unknown mode, or a mode or option
            under which Inductor would never run a post-grad pass, so that nothing could be fused.
    """
    from torch._inductor import config, list_mode_options

    of_mode: Mapping[str, object] = {}
    if mode is not None and mode != "default":
        modes = list_mode_options()
        if mode not in tuple(modes):
            fusing = [name for name, settings in modes.items() if settings.get("use_post_grad_passes", True)]
            raise BadConfig(f"mode: got {mode!r}, allowed {', '.join(map(repr, fusing))}{did_you_mean(mode, fusing)}")
        of_mode = modes[mode]
    if options is not None and not isinstance(options, Mapping):
        raise BadConfig(
            f"options: got {options!r} of type {type(options).__name__}, allowed a dict from names in "
            "torch._inductor.config to values"
        )
    patches = dict(of_mode)
    known = config.get_config_copy()
    for key, value in (options or {}).items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise BadConfig(
                f"options: got {key!r}, which torch._inductor.config does not have"
                f"{did_you_mean(name, known)}; torch._inductor.list_options() prints all of them"
            )
        # Only plain types can be compared with; hooks and settings that may be None have others.
        allowed = config.get_type(name)  # type: ignore[attr-defined]
        if allowed in (bool, int, str, float) and not isinstance(value, (int, float) if allowed is float else allowed):
            raise BadConfig(
                f"options[{key!r}]: got {value!r} of type {type(value).__name__}, "
                f"allowed {allowed.__name__} (it is {known[name]!r} now)"
            )
        patches[name] = value
    if not patches.get("use_post_grad_passes", getattr(config, "use_post_grad_passes", True)):
        source = f"mode={mode!r}" if "use_post_grad_passes" in of_mode else "use_post_grad_passes=False"
        raise BadConfig(
            f"{source} switches Inductor's post-grad passes off, so no fusion pass would ever run; "
            "allowed: any mode or options that leave them on. Drop it, or use backend='inductor' to compile "
            "without fusions"
        )
    return patches
