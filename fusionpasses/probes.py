"""Runtime feature probes: what is there, and why not when it is not.

A probe never raises, imports nothing heavy, starts no process and, but for ``probe_hip_architecture`` where the kernel
driver does not tell, initialises no device. Its verdict can be printed, and is part of the compile-cache identity.
``has_*`` say whether a GPU kernel for an op can run here. Answers are kept; ``reset`` forgets them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import pathlib
import re
from collections.abc import Callable
from typing import ParamSpec

from fusionpasses import _aiter_files, _aiter_numerics
from fusionpasses._verdict import Verdict as Verdict

_P = ParamSpec("_P")
_kept: list[dict[object, Verdict]] = []
_forgets: list[Callable[[], None]] = []


def _probe(question: Callable[_P, Verdict]) -> Callable[_P, Verdict]:
    """Keeps the answers of a probe, and makes an error the answer no."""
    answers: dict[object, Verdict] = {}
    _kept.append(answers)

    @functools.wraps(question)
    def ask(*args: _P.args, **kwargs: _P.kwargs) -> Verdict:
        # Import hooks, broken installations, drivers, arguments that are none: whatever it is, it is no yes.
        try:
            key = (args, tuple(kwargs.items()))
            if key not in answers:
                answers[key] = question(*args, **kwargs)
            return answers[key]
        except (Exception, SystemExit) as error:
            failed = Verdict(False, f"{question.__name__} failed with {type(error).__name__}: {error}")
            with contextlib.suppress(TypeError):  # what cannot be a key
                answers[key] = failed
            return failed

    return ask


def forget_with(forget: Callable[[], None]) -> None:
    """Have ``reset`` call this, too: what follows from answers goes with them."""
    _forgets.append(forget)


def reset() -> None:
    """Forgets every answer, and what follows from them: for tests, and after something was installed."""
    for answers in _kept:
        answers.clear()
    for forget in _forgets:
        forget()


def distribution_version(name: str) -> str | None:
    """Version of an installed distribution without importing it, or None, also where its metadata are damaged."""
    try:
        return importlib.metadata.version(name)
    except Exception:  # not found, or damaged: bytes that are no text, paths that are none
        return None


#: The oldest torch that the package asks for (pyproject.toml), and the oldest Triton that its kernels ran with.
OLDEST_TORCH = (2, 10)
OLDEST_TRITON = (3, 6)


def _release(version: str) -> tuple[int, ...]:
    """(2, 13, 0) for "2.13.0+cpu"; empty for what does not begin with numbers."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _at_least(name: str, version: str | None, oldest: tuple[int, ...], what: str) -> Verdict:
    wanted = ".".join(map(str, oldest))
    if version is None or not _release(version):
        return Verdict(False, f"{name} is of unknown version ({version}); {wanted} is {what}")
    if _release(version) < oldest:
        return Verdict(False, f"{name} {version} is older than {wanted}, {what}; install a newer one")
    return Verdict(True, f"{name} {version}")


@_probe
def probe_torch() -> Verdict:
    """Is this torch as new as the package needs?"""
    import torch

    return _at_least("torch", torch.__version__, OLDEST_TORCH, "the oldest that fusionpasses works with")


def triton_version() -> str | None:
    """Triton's version, from its metadata or from its file: builds of torch bring it under other names."""
    version = distribution_version("triton")
    if version is None:
        spec = importlib.util.find_spec("triton")
        text = "" if spec is None or spec.origin is None else pathlib.Path(spec.origin).read_text(errors="replace")
        found = re.search(r"""^__version__ *= *["']([^"']+)""", text, re.MULTILINE)
        version = found[1] if found else None
    return version


@_probe
def probe_triton() -> Verdict:
    """Is Triton importable (looked up, not imported)?"""
    if importlib.util.find_spec("triton") is None:
        return Verdict(False, "triton is not installed")
    return Verdict(True, f"triton {triton_version() or 'of unknown version'}")


@_probe
def probe_triton_version() -> Verdict:
    """Is Triton one of the releases that the kernels ran with, or newer?"""
    found = probe_triton()
    if not found:
        return found
    return _at_least("triton", triton_version(), OLDEST_TRITON, "the oldest that the kernels ran with")


@_probe
def probe_gpu() -> Verdict:
    """Is this torch built for a GPU, and is one visible? Does not create a device context."""
    import torch

    build = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    if not torch.version.hip and not torch.version.cuda:
        return Verdict(False, f"torch {torch.__version__} is a CPU build")
    count = torch.cuda.device_count()
    if count == 0:
        return Verdict(False, f"torch is built for {build}, no device is visible")
    return Verdict(True, f"{build}, {count} device(s)")


#: AMD architectures without FP4 arithmetic, by the start of their name. NVIDIA's are told by number.
_AMD_WITHOUT_FP4 = ("gfx90", "gfx94", "gfx10", "gfx11", "gfx120")


@_probe
def probe_fp4_arithmetic(architecture: str) -> Verdict:
    """Can a GPU multiply FP4 numbers as they are? ``architecture`` is "sm_90", "gfx942", ..; unknown ones can."""
    digits = architecture.removeprefix("sm_")
    old = digits.isdecimal() and int(digits) < 100
    if old or architecture.startswith(_AMD_WITHOUT_FP4):
        return Verdict(False, f"{architecture} has no FP4 arithmetic")
    return Verdict(True, f"{architecture} is not known to lack FP4 arithmetic")


#: tl.dot_scaled came with this release.
_DOT_SCALED_SINCE = (3, 2)
#: NVIDIA's, before this one: a scale byte of 0 may count as 0, where 2**-127 is meant. 3.6 does that, 3.9 does not.
_DOT_SCALED_RIGHT_SINCE = (3, 9)


@_probe
def probe_dot_scaled(architecture: str, triton: str | None = None) -> Verdict:
    """Does ``tl.dot_scaled`` multiply FP4 codes as they are? ``triton`` is a version; None asks for the installed one.

    Elsewhere it decodes them to bfloat16 first, or does not compile (gfx942 with Triton 3.6): then the kernels decode.
    """
    if triton is None:
        installed = probe_triton()
        if not installed:
            return installed
        triton = triton_version() or ""
    version = _at_least("triton", triton, _DOT_SCALED_SINCE, "the release that tl.dot_scaled came with")
    arithmetic = probe_fp4_arithmetic(architecture)
    if not version or not arithmetic:
        return arithmetic if version else version
    if architecture.startswith("sm_") and _release(triton) < _DOT_SCALED_RIGHT_SINCE:
        return Verdict(
            True, f"{arithmetic.why}; triton {triton} may read a scale byte of 0 beside bfloat16 as 0, not as 2**-127"
        )
    return Verdict(True, f"{arithmetic.why}; triton {triton}")


@_probe
def probe_hip() -> Verdict:
    """Is this torch built for AMD GPUs (ROCm)?"""
    import torch

    if torch.version.hip is None:
        return Verdict(False, f"torch {torch.__version__} is not built for ROCm (HIP), which AITER needs")
    return Verdict(True, f"HIP {torch.version.hip}")


#: Where AMD's kernel driver lists the GPUs of a machine.
_TOPOLOGY = pathlib.Path("/sys/class/kfd/kfd/topology/nodes")


def _architectures_of_driver() -> set[str]:
    """Architectures of this machine's AMD GPUs as their kernel driver tells them: no device is initialised."""
    names = set()
    for file in sorted(_TOPOLOGY.glob("*/properties")):
        try:
            found = re.search(r"^gfx_target_version (\d+)$", file.read_text(), re.MULTILINE)
        except OSError:  # a GPU that this container may not use
            continue
        number = int(found[1]) if found else 0  # 90402 for gfx942; 0 for a CPU
        if number:
            names.add(f"gfx{number // 10000}{number // 100 % 100:x}{number % 100:x}")
    return names


def hip_architecture() -> str:
    """Architecture of the GPU, such as "gfx942". Initialises the device if the driver lists none, or several kinds."""
    names = _architectures_of_driver()
    if len(names) == 1:
        return names.pop()
    import torch

    name: str = torch.cuda.get_device_properties(0).gcnArchName
    return name.partition(":")[0]


@_probe
def probe_hip_architecture(allowed: tuple[str, ...] | None = None) -> Verdict:
    """Is there an AMD GPU, of an architecture whose name starts with one of ``allowed`` (None: any)?"""
    hip = probe_hip()
    if not hip:
        return hip
    gpu = probe_gpu()
    if not gpu:
        return gpu
    name = hip_architecture()
    if allowed is not None and not name.startswith(allowed):
        return Verdict(False, f"the GPU is {name}; AITER serves {', '.join(allowed)}")
    return Verdict(True, f"the GPU is {name}")


@_probe
def probe_aiter() -> Verdict:
    """Is AMD's AITER here, and not another package of that name? By its files; nothing of it is imported."""
    package = _aiter_files.package()
    if package.root is None:
        return Verdict(False, package.why)
    return Verdict(True, f"{package.why}, amd-aiter {distribution_version('amd-aiter') or 'of unknown version'}")


@_probe
def probe_wrong_aiter() -> Verdict:
    """Is something here that is named aiter and is not AMD's AITER? Then ``why`` says what to do."""
    package = _aiter_files.package()
    return Verdict(package.wrong, package.why)


@_probe
def probe_aiter_capability(function: str) -> Verdict:
    """Has the AITER that is here a function (one of ``_aiter_files.CAPABILITIES``), on any machine? By its files.

    Its signature is looked at when it is loaded (``providers/_aiter_import.py``).
    """
    capability = _aiter_files.CAPABILITIES.get(function)
    if capability is None:
        return Verdict(False, f"{function!r} is none of {', '.join(_aiter_files.CAPABILITIES)}")
    package = _aiter_files.package()
    if package.root is None:
        return Verdict(False, package.why)
    found = _aiter_files.locate(package.root, capability)
    if found is None:
        files = " nor ".join(file for file in (capability.new, capability.old) if file)
        return Verdict(False, f"{package.why} has no {files}, where {function} would be; {_aiter_files.INSTALL}")
    file, layout = found
    if not _aiter_files.defines(file, function):
        return Verdict(False, f"{file} does not define {function}: another release; {_aiter_files.INSTALL}")
    return Verdict(True, f"{file} ({layout} layout)")


@_probe
def probe_aiter_kernel(function: str) -> Verdict:
    """Can AITER's ``function`` run on the GPU of this machine?"""
    capability = _aiter_files.CAPABILITIES.get(function)
    gpu = probe_hip_architecture(capability.architectures if capability else None)
    return probe_aiter_capability(function) if gpu else gpu


def _kernel(op: str) -> Verdict:
    """Can a GPU of this machine run ``op`` by a kernel, in the default configuration?

    By Triton, or by a kernel of AITER's that is exact. Those are Triton's, too, and calls that AITER must not run go to
    our own: so without Triton there is neither.
    """
    gpu = probe_gpu()
    if not gpu:
        return Verdict(False, f"no GPU kernel can run: {gpu.why}; the reference (plain torch) runs everywhere")
    triton = probe_triton()
    found = [f"Triton: {triton.why}" if triton else f"Triton: {triton.why}, and AITER's kernels need it, too"]
    here = probe_aiter_kernel(_aiter_numerics.FUNCTIONS[op][0])
    if here:
        exact = _aiter_numerics.serves(op)
        found.append(f"AITER: {here.why}; {exact.why}" + ("" if exact else "; so Triton's kernel runs"))
    return Verdict(triton.ok, f"{'; '.join(found)}; on {gpu.why}")


@_probe
def has_dynamic_mxfp4_quant() -> Verdict:
    """Can a GPU kernel run the MXFP4 quant here, and whose, or why not?"""
    return _kernel("dynamic_mxfp4_quant.default")


@_probe
def has_fused_rmsnorm_mxfp4_quant() -> Verdict:
    """Can a GPU kernel run RMSNorm + MXFP4 quant here, and whose, or why not?"""
    return _kernel("rmsnorm_mxfp4_quant.default")


@_probe
def has_fused_rope_mla_kv_cache() -> Verdict:
    """Can a GPU kernel run RoPE + the write to the MLA cache here, and whose, or why not?"""
    return _kernel("fused_rope_mla_kv_cache.absorbed")


@_probe
def has_mxfp4_gemm() -> Verdict:
    """Can a GPU kernel run the product with an MXFP4 weight here, and whose, or why not?"""
    return _kernel("mxfp4_gemm.default")
