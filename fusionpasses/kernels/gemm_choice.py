"""Which kernels a product with an MXFP4 weight runs: a function of sizes and architecture, to be printed.

``python -c "from fusionpasses.kernels.gemm_choice import *; print(choose(16, 18432, 7168, Arch('sm_90', 32, 132)))"``
"""

from __future__ import annotations

from typing import NamedTuple

from fusionpasses.kernels import mxfp4_dequantize, mxfp4_gemm, mxfp4_gemm_dot, mxfp4_gemm_wgmma
from fusionpasses.kernels.arch import Arch

_COLUMN = 128  # elements of K
#: Tiles of eight tokens, and warpgroups, of which a gated product's bytes were compared on a GPU.
_GATED = ((2, 1), (3, 2), (4, 2))


class Choice(NamedTuple):
    """A kernel of this package, its tile and compile options, and why it is this one."""

    kernel: str
    options: dict[str, int | bool]
    why: str


def token_order(choice: Choice, tokens: int, rows: int, width: int, layout: str) -> int | None:
    """``TOKEN_TILES`` of ``_token_order.py``, the order in which the product can be given MXFP4 x; or None.

    Whoever quantises x may as well leave it so. ``choice`` is what ``choose`` says of the same call; widths
    that end within a column, or a step of ``mxfp4_gemm_wgmma``, are left to the product, which fills in zeros; so are
    tokens of which the numbers have no places in 32 bits.
    """
    if layout != "tiles" or tokens * width >= 2**30:
        return None
    if choice.kernel == "mxfp4_gemm_wgmma":
        whole = width % (_COLUMN * int(choice.options["UNROLLED"])) == 0
        return int(choice.options["TOKEN_TILES"]) if whole else None
    if choice.kernel == "mxfp4_gemm":
        return 0 if width % _COLUMN == 0 else None
    return None


def gated(
    tokens: int, rows: int, width: int, rows_behind: int, arch: Arch, *, layout: str, layout_behind: str
) -> tuple[Choice, Choice] | None:
    """Choices of a gated MLP's two products, if the first can quantise gate times up as the second reads it, or None.

    ``rows`` are gate's and as many of up, in one weight; the second's is ``[rows_behind, rows / 2]``.
    """
    first = choose(tokens, rows, width, arch, w4a4=True, layout=layout)
    if first.kernel != "mxfp4_gemm_wgmma" or token_order(first, tokens, rows, width, layout) is None:
        return None
    second = choose(tokens, rows_behind, rows // 2, arch, w4a4=True, layout=layout_behind)
    if (
        second.kernel != "mxfp4_gemm_wgmma"
        or token_order(second, tokens, rows_behind, rows // 2, layout_behind) is None
    ):
        return None
    # Both halves are whole columns of the second's x, so each tile of rows is half of gate's and half of up's.
    return (first, second) if (first.options["TOKEN_TILES"], first.options["WARPGROUPS"]) in _GATED else None


def choose(tokens: int, rows: int, width: int, arch: Arch, *, w4a4: bool = False, layout: str = "linear") -> Choice:
    """The kernel for x of ``[tokens, width]`` and a weight of ``[rows, width]`` in ``layout``.

    Args:
        w4a4: x is MXFP4, too.
        layout: "linear", as checkpoints have a weight, or "tiles", as ``Mxfp4Linear.prepare`` makes one; ask with
            "linear" for "shuffled", which is put back in that order before.
    """
    if mxfp4_gemm_wgmma.for_some_tokens(tokens, rows, width, arch, layout, w4a4=w4a4):
        options = mxfp4_gemm_wgmma.launch_options(tokens, rows, width, arch)
        return Choice(
            "mxfp4_gemm_wgmma",
            options,
            f"a prepared weight that is not small, some tokens or few long rows, and {arch.name}",
        )
    if mxfp4_gemm.for_few_tokens(tokens, rows, width, arch):
        decodes = w4a4 and mxfp4_gemm.decodes_tokens(tokens, rows, width)
        options = mxfp4_gemm.launch_options(tokens, rows, width, arch, layout, decodes=decodes)
        return Choice("mxfp4_gemm", options, f"few tokens, and {arch.name} has its PTX")
    if layout == "linear" and mxfp4_gemm_dot.for_dot(tokens, arch, w4a4=w4a4):
        options = mxfp4_gemm_dot.launch_options(tokens, rows, width, arch, w4a4)
        return Choice("mxfp4_gemm_dot", options, f"few tokens, or {arch.name} multiplies codes as they are")
    why = "many tokens" if layout == "linear" or arch.hopper_ptx else f"no kernel for {arch.name} reads tiles"
    return Choice(
        "mxfp4_dequantize", mxfp4_dequantize.dequantize_options(arch), f"{why}: BLAS, with a copy in bfloat16"
    )
