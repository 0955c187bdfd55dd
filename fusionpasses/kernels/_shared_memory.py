"""Shared memory in PTX, for what Triton has no words for: copies on their way that a thread reads when it wants.

A place is an address in shared memory, one for each thread. Tensors have one dimension and one element for each thread,
so each of these functions is an instruction of each thread. The space is static: Triton, which counts on dynamic shared
memory only, must not need any in the same kernel, or at most what is left of 48 KiB.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def _space_text(size):
    return f"{{ .shared .align 16 .b8 space[{size}]; mov.u32 $0, space; mad.lo.u32 $0, $1, 16, $0; }}"


@triton.constexpr_function
def _wait_text(groups):
    return f"cp.async.wait_group {groups}; mov.u32 $0, $1;"


@triton.jit
def _asm(text: tl.constexpr, constraints: tl.constexpr, operands):
    """With an effect besides its result."""
    return tl.inline_asm_elementwise(text, constraints, operands, dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def places(thread, SIZE: tl.constexpr):
    """Of each thread's first 16 bytes in SIZE bytes of shared memory."""
    return _asm(_space_text(SIZE), "=&r,r", [thread])


@triton.jit
def copy16(place, address, exists):
    text: tl.constexpr = "cp.async.cg.shared.global [$1], [$2], 16, $3; mov.u32 $0, $1;"
    _asm(text, "=r,r,l,r", [place, address, tl.where(exists, 16, 0)])


@triton.jit
def copy8(place, address, exists):
    text: tl.constexpr = "cp.async.ca.shared.global [$1], [$2], 8, $3; mov.u32 $0, $1;"
    _asm(text, "=r,r,l,r", [place, address, tl.where(exists, 8, 0)])


@triton.jit
def commit(place):
    _asm("cp.async.commit_group; mov.u32 $0, $1;", "=r,r", [place])


@triton.jit
def wait(place, GROUPS: tl.constexpr):
    _asm(_wait_text(GROUPS), "=r,r", [place])


@triton.jit
def barrier(place):
    _asm("bar.sync 0; mov.u32 $0, $1;", "=r,r", [place])


@triton.jit
def write16(place, values):
    text: tl.constexpr = "st.shared.v4.b32 [$1], {$2, $3, $4, $5}; mov.u32 $0, $1;"
    _asm(text, "=r,r,f,f,f,f", [place, values[0], values[1], values[2], values[3]])


@triton.jit
def read16(place):
    return tl.inline_asm_elementwise(
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,r",
        [place],
        dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def read8(place):
    return tl.inline_asm_elementwise(
        "ld.shared.v2.b32 {$0, $1}, [$2];", "=r,=r,r", [place], dtype=(tl.uint32, tl.uint32), is_pure=False, pack=1
    )
