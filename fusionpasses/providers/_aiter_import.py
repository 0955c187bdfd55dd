"""Imports one function of AITER's, when it is first used; ``_aiter_traces.py`` cleans up behind it.

Whatever the import raises, SystemExit included, is caught; the reason is kept, and given again instead of a second try.

A signature decides how a function is called and what it returns; releases carry no other flag. How codes are rounded is
told by no signature either: the code that does it is compared with what is known (``_aiter_files.ROUNDINGS``).
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import dis
import importlib
import inspect
import pathlib
import threading
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from fusionpasses import _aiter_files, probes
from fusionpasses.errors import ProviderUnavailable
from fusionpasses.providers import _aiter_traces


@dataclasses.dataclass(frozen=True)
class Form:
    """One signature that a function had.

    Attributes:
        parameters: names, in order, separated by blanks. More of them may follow that are keyword-only with defaults.
        release: "new" or "old", what callers go by; None where the signature never changed, and the layout decides.
        guarded: is the function behind AITER's ``torch_compile_guard``? None: either.
    """

    parameters: str
    release: str | None = None
    guarded: bool | None = None


_RMS = "x1 x1_weight x1_epsilon x2 x2_weight x2_epsilon res1 shuffle scale_shuffle_padding"
_ROPE = (
    "q_nope q_pe k_nope k_pe kv_cache slot_mapping pos cos sin k_scale is_neox num_decode_toks_for_zeros apply_scale "
    "q_out decode_q_pe_out k_pe_out q_out_dtype"
)
_HIP_ROPE = (
    "q_nope q_pe kv_c k_pe kv_cache q_out slot_mapping k_scale q_scale positions cos_cache sin_cache is_neox "
    "is_nope_first"
)
_GEMM = "x w x_scales w_scales dtype y config"
_SHUFFLED = "x_fp4 w_preshuf x_scales w_scales dtype y config"

#: Every signature in AITER's history up to e4048607 (2026-08-22) that adapters can call, by function.
FORMS: dict[str, tuple[Form, ...]] = {
    "dynamic_mxfp4_quant": (Form("x scaling_mode"),),
    # New ones return ((codes, scales), norm, norm of x2, sum), old ones leave the norm out.
    "fused_rms_mxfp4_quant": (
        Form(f"{_RMS} output_unquantized_inp1 inargs", "new"),
        Form(f"{_RMS} output_unquantized_inp1", "new"),
        Form(_RMS, "old"),
    ),
    "act_mul_and_mxfp4_quant": (
        Form("x activation scaling_mode shuffle scale_shuffle_padding", "new"),
        Form("x activation scaling_mode shuffle", "old"),
    ),
    # New ones return four tensors, the last q_nope_zeros_out; old ones have the cache there. The guard came with that.
    "fused_qk_rope_cat_and_cache_mla": (
        Form(f"{_ROPE} shuffled_kv_cache upcast_operand", "new"),
        Form(f"{_ROPE} shuffled_kv_cache", "new"),
        Form(_ROPE, "new", guarded=True),
        Form(_ROPE, "old", guarded=False),
    ),
    "fused_qk_rope_concat_and_cache_mla": (Form(f"{_HIP_ROPE} compute_all_q_rope", "new"), Form(_HIP_ROPE, "old")),
    "gemm_afp4wfp4": (Form(f"{_GEMM} skip_reduce", "new"), Form(_GEMM, "old")),
    "gemm_afp4wfp4_preshuffle": (
        Form(f"{_SHUFFLED} skip_reduce", "new"),
        Form(f"{_GEMM} skip_reduce", "new"),
        Form(f"{_GEMM} use_aot skip_reduce", "old"),
        Form(f"{_GEMM} use_aot", "old"),
    ),
    "gemm_afp4wfp4_preshuffled_scales": (Form(_GEMM),),
}

_lock = threading.RLock()
_loaded: dict[str, tuple[Callable[..., Any], str]] = {}
_failed: dict[str, str] = {}
#: The key in ``_failed`` of a failed import of AITER itself, which every function needs.
_AITER = "aiter"


def load(capability: str) -> tuple[Callable[..., Any], str]:
    """A function of AITER's, and whether it is to be called as in "new" or in "old" releases.

    AITER itself is imported first, then the function's module: where the first succeeds and the second fails, AITER
    stays, because to load its compiled modules twice is no way back.

    Raises:
        ProviderUnavailable: AITER, or the function, is not here; its import failed, now or earlier in this process; or
            its signature is none of ``FORMS``.
    """
    with _lock:
        if capability not in _loaded:
            reason = failure(capability)
            if reason is not None:
                raise ProviderUnavailable(reason)
            _loaded[capability] = _load(capability)
        return _loaded[capability]


def failure(capability: str) -> str | None:
    """Why an earlier ``load`` failed, and a later one would; None if none did. Imports nothing."""
    return _failed.get(_AITER) or _failed.get(capability)


def reset() -> None:
    """Forgets what was loaded, and what failed: for tests."""
    with _lock:
        _loaded.clear()
        _failed.clear()


def _load(capability: str) -> tuple[Callable[..., Any], str]:
    found = probes.probe_aiter_capability(capability)
    root = _aiter_files.package().root if found else None
    place = _aiter_files.locate(root, _aiter_files.CAPABILITIES[capability]) if root is not None else None
    if root is None or place is None:
        raise ProviderUnavailable(
            f"AITER's {capability} was asked for and is not here: {found.why}; or use provider='auto' or 'triton'"
        )
    file, layout = place
    _import("aiter", _AITER)
    module = _import(_aiter_files.module_name(root, file), capability)
    try:
        return _checked(module, root, file, layout, capability)
    except ProviderUnavailable as error:
        _failed[capability] = str(error)
        raise
    except Exception as error:  # seen: a function in C, which has no signature; a file that is no Python
        _failed[capability] = (
            f"AITER's {capability} in {file} cannot be examined, with {type(error).__name__}: {error}; use "
            f"provider='auto' or 'triton'; {_aiter_files.INSTALL}"
        )
        raise ProviderUnavailable(_failed[capability]) from error


def _import(name: str, key: str) -> ModuleType:
    """The module ``name``; a failure is remembered under ``key``."""
    try:
        with _aiter_traces.removed():
            return importlib.import_module(name)
    # Seen: ImportError, RuntimeError, AttributeError, KeyError, AssertionError, OSError. A package may exit, too.
    except (Exception, SystemExit) as error:
        _failed[key] = (
            f"importing {name} failed with {type(error).__name__}: {error}; AITER needs ROCm and a GPU it knows. It is "
            "not tried again in this process; use provider='auto' or 'triton', or make `python -c 'import "
            f"{name}'` work and start anew"
        )
        raise ProviderUnavailable(_failed[key]) from error


def _checked(
    module: ModuleType, root: pathlib.Path, file: pathlib.Path, layout: str, name: str
) -> tuple[Callable[..., Any], str]:
    """The function of a module and its release, if all of it is as known."""
    got = getattr(module, "__file__", None)
    if got is None or pathlib.Path(got).resolve() != file.resolve():
        raise ProviderUnavailable(
            f"{module.__name__} was loaded from {got}, and the probe found {file}: something was put in its place; "
            "use provider='triton', or start a process in which there is one AITER"
        )
    function = getattr(module, name, None)
    if not callable(function):
        raise ProviderUnavailable(f"{file} has no function {name}; use provider='triton'; {_aiter_files.INSTALL}")
    parameters, guarded = declared(function, file, name)
    names = " ".join(p.name for p in parameters.values() if p.kind is not p.KEYWORD_ONLY)
    optional = all(p.default is not p.empty for p in parameters.values() if p.kind is p.KEYWORD_ONLY)
    for form in FORMS[name]:
        if names == form.parameters and optional and form.guarded in (None, guarded):
            _require_names(function, file)
            return function, _rounding_release(root, name, form.release, layout)
    raise ProviderUnavailable(
        f"AITER's {name} has a signature that no known release had: got ({', '.join(map(str, parameters.values()))}) "
        f"in {file}, allowed {' or '.join('(' + form.parameters.replace(' ', ', ') + ')' for form in FORMS[name])}; "
        f"what it returns may have changed, too, so it is not called. Use provider='auto' or 'triton'"
    )


def _require_names(function: Callable[..., Any], file: pathlib.Path) -> None:
    """That all its global names exist: releases had a function that calls one that it never imports (0.1.10)."""
    function = inspect.unwrap(function)
    code, known = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    names = [] if code is None else [i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"]
    missing = [name for name in names if name not in known and not hasattr(builtins, name)]
    if missing:
        raise ProviderUnavailable(
            f"AITER's {function.__name__} in {file} uses {missing[0]!r}, which is not defined there: it cannot run in "
            f"this release; use provider='auto' or 'triton'; {_aiter_files.INSTALL}"
        )


def _rounding_release(root: pathlib.Path, name: str, release: str | None, layout: str) -> str:
    """The release of a function: of one that quantises, "new" only if its code is known to round as new ones do.

    Releases with the signatures of new ones rounded as old ones do (0.1.7), and some with the layout of old ones as new
    ones (0.1.8).
    """
    if name not in _aiter_files.QUANTISING:
        return release or layout
    rounding, where = _aiter_files.rounding(root)
    if rounding is None:
        raise ProviderUnavailable(
            f"AITER's {name} rounds by code that no known release had: got {where}, allowed that of ROCm/aiter e404860 "
            "(2026-08-22) or amd-aiter 0.1.7; use provider='auto' or 'triton'"
        )
    return release if release is not None and rounding == "new" else rounding


def declared(
    function: Callable[..., Any], file: pathlib.Path, name: str
) -> tuple[Mapping[str, inspect.Parameter], bool]:
    """The parameters of a function, and whether AITER's ``torch_compile_guard`` hides them.

    The guard returns a function of ``*args, **kwargs`` that says nothing of what it wraps. Then they are read from the
    file, as names and defaults.
    """
    parameters = inspect.signature(function).parameters
    if [p.kind for p in parameters.values()] != [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]:
        return parameters, False
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return _parameters_of(node.args), True
    return parameters, True


def _parameters_of(arguments: ast.arguments) -> dict[str, inspect.Parameter]:
    ordered = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(ordered) - len(arguments.defaults)) + list(arguments.defaults)
    kind = inspect.Parameter
    found: dict[str, inspect.Parameter] = {}
    for names, values, how in (
        (ordered, defaults, kind.POSITIONAL_OR_KEYWORD),
        (arguments.kwonlyargs, arguments.kw_defaults, kind.KEYWORD_ONLY),
    ):
        for each, default in zip(names, values, strict=True):
            found[each.arg] = kind(each.arg, how, default=kind.empty if default is None else ast.unparse(default))
    # A function of any number of arguments is no known release.
    for star, k in ((arguments.vararg, kind.VAR_POSITIONAL), (arguments.kwarg, kind.VAR_KEYWORD)):
        if star is not None:
            found[star.arg] = kind(star.arg, k)
    return found
