"""Where AITER's files lie on disk, without importing any of them.

To import AITER takes seconds, may compile C++, and raises RuntimeError where there is no ROCm, with its modules half
loaded. So whether it is here, and what it has, is told from its files. ``find_spec`` is asked for the top level alone:
for ``aiter.ops`` it would import the parents.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib.util
import io
import pathlib
import re
import tokenize

#: What to do about a package that is not AITER.
FIX = (
    "`pip uninstall aiter`, then `pip install amd-aiter` (on PyPI: an old release) or build the present one from "
    "https://github.com/ROCm/aiter"
)
INSTALL = (
    "`pip install amd-aiter` (on PyPI: an old release), or build the present one from https://github.com/ROCm/aiter"
)


@dataclasses.dataclass(frozen=True)
class Capability:
    """A function of AITER's, and the file that defines it in new and in old releases, relative to the package.

    Attributes:
        function: its name, which is also the capability's.
        new: the file since AITER sorted its Triton ops into folders (2026-01-07).
        old: the file before that; None where there was none. New releases still resolve old module names, by loading
            the file a second time; so an old name is used only where the new file is absent.
        architectures: those it serves, by the start of their name; None if AITER checks for none.
    """

    function: str
    new: str
    old: str | None
    architectures: tuple[str, ...] | None = None


_QUANT = "ops/triton/quant"
_GEMM = ("ops/triton/gemm/basic/gemm_afp4wfp4.py", "ops/triton/gemm_afp4wfp4.py", ("gfx950", "gfx1250"))

CAPABILITIES = {
    capability.function: capability
    for capability in (
        Capability("dynamic_mxfp4_quant", f"{_QUANT}/quant.py", f"{_QUANT}.py"),
        Capability("fused_rms_mxfp4_quant", f"{_QUANT}/fused_mxfp4_quant.py", "ops/triton/fused_mxfp4_quant.py"),
        Capability("act_mul_and_mxfp4_quant", "ops/triton/activation.py", None),
        Capability(
            "fused_qk_rope_cat_and_cache_mla", "ops/triton/fusions/fused_kv_cache.py", "ops/triton/fused_kv_cache.py"
        ),
        # Written in HIP, not in Triton.
        Capability("fused_qk_rope_concat_and_cache_mla", "ops/cache.py", None),
        Capability("gemm_afp4wfp4", *_GEMM),
        Capability("gemm_afp4wfp4_preshuffle", *_GEMM),
        Capability("gemm_afp4wfp4_preshuffled_scales", *_GEMM),
    )
}


#: Functions that quantise, by one function of their kernels: how it rounds changed, and no signature with it.
QUANTISING = ("dynamic_mxfp4_quant", "fused_rms_mxfp4_quant", "act_mul_and_mxfp4_quant")
_ROUNDING = "_mxfp4_quant_op"
_ROUNDING_FILES = ("ops/triton/_triton_kernels/quant/quant.py", "ops/triton/_triton_kernels/quant.py")

#: What is known of that function, by the digest of its code: "new" rounds ties to even, "old" away from zero.
ROUNDINGS = {"fa7cc8fa97a779af": "new", "e3395dfc2dc8fec4": "old"}


@dataclasses.dataclass(frozen=True)
class Package:
    """What ``aiter`` is here.

    Attributes:
        root: the folder of AMD's package; None if it is not here.
        why: what was found, or what is missing and what to do.
        wrong: something else goes by that name.
    """

    root: pathlib.Path | None
    why: str
    wrong: bool = False


def package() -> Package:
    """Looks for AITER. May raise what a foreign import hook raises."""
    spec = importlib.util.find_spec("aiter")
    if spec is None:
        return Package(None, f"AITER is not installed; {INSTALL}")
    if spec.submodule_search_locations is None:
        return Package(None, f"`aiter` is {spec.origin}, a single module and not AMD's AITER; {FIX}", wrong=True)
    folders = [pathlib.Path(folder) for folder in spec.submodule_search_locations]
    if spec.origin is None:
        # A folder without __init__.py on the path: often a clone of ROCm/aiter, seen from the folder that it lies in.
        inner = next((folder / "aiter" for folder in folders if (folder / "aiter" / "ops").is_dir()), None)
        fix = (
            f"it holds AITER's in {inner}: put {inner.parent} on the path, or `pip install -e` it"
            if inner is not None
            else f"take it off the path, or complete it; {INSTALL}"
        )
        where = folders[0] if folders else "a folder"
        return Package(None, f"`aiter` is {where}, which has no __init__.py and is no package; {fix}", wrong=True)
    root = folders[0]
    if not root.is_dir():
        return Package(
            None, f"`aiter` at {root} is in an archive, and its files cannot be read there; {INSTALL}", wrong=True
        )
    if not (root / "ops").is_dir():
        return Package(
            None,
            f"`aiter` at {root} is not AMD's AITER: it has no folder ops/; PyPI's aiter is a library for async "
            f"iterators; {FIX}",
            wrong=True,
        )
    if (root / "azip.py").is_file():
        return Package(
            None,
            f"`aiter` at {root} is two packages in one folder: amd-aiter, and PyPI's aiter, a library for async "
            f"iterators; {FIX.replace('uninstall aiter', 'uninstall aiter amd-aiter')}",
            wrong=True,
        )
    return Package(root, f"AITER at {root}")


def locate(root: pathlib.Path, capability: Capability) -> tuple[pathlib.Path, str] | None:
    """The file of a capability and the layout it belongs to, "new" or "old"; None if there is neither."""
    for file, layout in ((capability.new, "new"), (capability.old, "old")):
        if file is not None and (root / file).is_file():
            return root / file, layout
    return None


def defines(file: pathlib.Path, function: str) -> bool:
    """Does a file define a function at its top level? Old releases have some of the files without the functions."""
    return re.search(rf"^def {function}\(", file.read_text(errors="replace"), re.MULTILINE) is not None


def rounding(root: pathlib.Path) -> tuple[str | None, str]:
    """How AITER rounds to codes, "new" or "old", or None for code that was never read; and where that code is."""
    for place in _ROUNDING_FILES:
        file = root / place
        if file.is_file():
            code = digest(file.read_text(encoding="utf-8"), _ROUNDING)
            return ROUNDINGS.get(code), f"{_ROUNDING} in {file}"
    return None, f"{root}, which has no {' nor '.join(_ROUNDING_FILES)}"


def digest(text: str, function: str) -> str:
    """Of the code of a function at the top level of a file: no comment, layout or docstring counts. "" if not there."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            lines = "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])
            counts = (tokenize.NAME, tokenize.NUMBER, tokenize.OP, tokenize.STRING)
            tokens = [t for t in tokenize.generate_tokens(io.StringIO(lines).readline) if t.type in counts]
            docs = node.body[0].lineno - node.lineno + 1 if ast.get_docstring(node) is not None else None
            code = " ".join(t.string for t in tokens if t.type != tokenize.STRING or t.start[0] != docs)
            return hashlib.sha256(code.encode()).hexdigest()[:16]
    return ""


def module_name(root: pathlib.Path, file: pathlib.Path) -> str:
    """``aiter.ops.cache`` for ``root/ops/cache.py``."""
    return ".".join(("aiter", *file.relative_to(root).with_suffix("").parts))
