"""Runtime feature probes: what is there, and why not when it is not.

A probe never raises, imports nothing heavy and does not initialise a device. Its verdict can be printed, and is
part of the compile-cache identity.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Answer of a probe; truthy when ``ok``. ``why`` says what was found, or what is missing."""

    ok: bool
    why: str

    def __bool__(self) -> bool:
        return self.ok


def distribution_version(name: str) -> str | None:
    """Version of an installed distribution without importing it, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def probe_triton() -> Verdict:
    """Is Triton importable (looked up, not imported)?"""
    try:
        found = importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError) as error:
        return Verdict(False, f"looking for triton failed: {error}")
    if not found:
        return Verdict(False, "triton is not installed")
    return Verdict(True, f"triton {distribution_version('triton') or 'of unknown version'}")


@functools.cache
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


def probe_fp4_arithmetic(architecture: str) -> Verdict:
    """Can a GPU multiply FP4 numbers as they are? ``architecture`` is "sm_90", "gfx942", ..; unknown ones can."""
    digits = architecture.removeprefix("sm_")
    old = digits.isdecimal() and int(digits) < 100
    if old or architecture.startswith(_AMD_WITHOUT_FP4):
        return Verdict(False, f"{architecture} has no FP4 arithmetic")
    return Verdict(True, f"{architecture} is not known to lack FP4 arithmetic")
