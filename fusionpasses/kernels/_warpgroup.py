"""Hopper's asynchronous matrix instructions in PTX (sm_90a), with the shared memory that they and copies use.

A warpgroup is four warps that multiply together: 64 rows, 16 of each warp, from registers, by up to 256 columns from
shared memory. The sums stay in registers, where the instruction writes them while the warps go on; ``multiply`` and
``finish`` give them back as new values, so nothing can read them too early.

Shared memory is one static space, at most 48 KiB (Triton counts on dynamic shared memory only, and must need hardly
any). Offsets into it are constants: they end up in instructions, and what is the same in all threads costs no register
of each. Tensors have one dimension and one element for each thread, so each function is an instruction of each thread.
"""

# ruff: noqa: RUF005
# (Triton does not know (*a, b).)

from __future__ import annotations

import triton
import triton.language as tl

#: Static shared memory of a program, in bytes.
MOST_SPACE = 48 * 1024


@triton.constexpr_function
def _space_text(size):
    # Without braces: all texts of the kernel that follow know the name.
    return f".shared .align 128 .b8 space[{size}]; mov.u32 $0, $1;"


@triton.constexpr_function
def _barriers_text(at, count):
    inits = " ".join(f"@p mbarrier.init.shared::cta.b64 [space+{at + 8 * i}], 1;" for i in range(count))
    return (
        "{ .reg .pred p; setp.eq.u32 p, $1, 0; "
        f"{inits} }} fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta; mov.u32 $0, $1;"
    )


@triton.constexpr_function
def _fetch_text(at, barrier, size):
    return (
        "{ .reg .pred p, q; .reg .b32 lane; setp.ne.u32 q, $1, 0; elect.sync lane|p, 0xffffffff; and.pred p, p, q; "
        f"@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [space+{barrier}], {size}; "
        "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
        f"[space+{at}], [$2], {size}, [space+{barrier}]; mov.u32 $0, $1; }}"
    )


@triton.constexpr_function
def _arrived_text(barrier):
    return (
        f"{{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [space+{barrier}], $1; "
        "@!p bra again; mov.u32 $0, $1; }"
    )


@triton.constexpr_function
def _copy_text(at, threads, zeros):
    # What is not copied is not written either, or its size is 0, and zeros are.
    only, size, half = ("", "$4", "$0") if zeros else ("@p ", "16", "8")
    codes = "cp.async.cg.shared.global.L2::cache_hint"
    return (
        "{ .reg .pred p; .reg .b32 s, e; mov.u32 s, space; mad.lo.u32 e, $1, 8, s; mad.lo.u32 s, $1, 16, s; "
        f"setp.ne.u32 p, $4, 0; shr.u32 $0, $4, 1; {only}{codes} [s+{at}], [$2], 16, {size}, $5; "
        f"{only}{codes} [s+{at + threads * 16}], [$2+512], 16, {size}, $5; "
        f"{only}cp.async.ca.shared.global [e+{at + threads * 32}], [$3], 8, {half}; cp.async.commit_group; }}"
    )


@triton.constexpr_function
def _read_text(at, threads, left):
    words = ", ".join
    return (
        "{ .reg .b32 s, e; mov.u32 s, space; mad.lo.u32 e, $10, 8, s; mad.lo.u32 s, $10, 16, s; "
        f"cp.async.wait_group {left}; "
        f"ld.shared.v4.b32 {{{words(f'${i}' for i in range(4))}}}, [s+{at}]; "
        f"ld.shared.v4.b32 {{{words(f'${i}' for i in range(4, 8))}}}, [s+{at + threads * 16}]; "
        f"ld.shared.v2.b32 {{$8, $9}}, [e+{at + threads * 32}]; }}"
    )


@triton.constexpr_function
def _put_text(at):
    return (
        "{ .reg .b32 s; .reg .b16 h; mov.u32 s, space; add.u32 s, s, $1; cvt.u16.u32 h, $2; "
        f"st.shared.b16 [s+{at}], h; mov.u32 $0, $1; }}"
    )


@triton.constexpr_function
def _take_text(at):
    return f"{{ .reg .b32 s; mov.u32 s, space; add.u32 s, s, $4; ld.shared.v4.b32 {{$0, $1, $2, $3}}, [s+{at}]; }}"


@triton.constexpr_function
def _multiply_text(tiles, at, behind):
    sums = ", ".join(f"${i}" for i in range(4 * tiles))

    def one(a, descriptor):
        words = ", ".join(f"${4 * tiles + a + i}" for i in range(4))
        return (
            f"wgmma.mma_async.sync.aligned.m64n{8 * tiles}k16.f32.bf16.bf16 "
            f"{{{sums}}}, {{{words}}}, {descriptor}, p, 1, 1, 0; "
        )

    # A descriptor: where the matrix starts, 16 bytes as the unit; how far apart its two halves of K are, from bit 16
    # on; and eight columns and the next eight, from bit 32 on.
    def descriptor(name, start):
        low = (tiles * 128 // 16 << 16) + start // 16
        return f"add.u64 {name}, f, {low}; "

    return (
        "{ .reg .pred p; .reg .b32 s, l, h; .reg .b64 d, e, f; setp.eq.u32 p, 0, 0; mov.b32 h, 8; "
        "mov.u32 s, space; shr.u32 s, s, 4; and.b32 s, s, 0x3FFF; mov.b64 f, {s, h}; "
        f"wgmma.fence.sync.aligned; {descriptor('d', at)}{one(0, 'd')}{descriptor('e', at + tiles * 256)}{one(4, 'e')}"
        f"wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned {behind}; }}"
    )


@triton.constexpr_function
def _sums(tiles):
    return ",".join(["=f"] * (4 * tiles))


@triton.constexpr_function
def _the_same(tiles):
    return ",".join(str(i) for i in range(4 * tiles))


@triton.constexpr_function
def _float32s(tiles):
    return (tl.float32,) * (4 * tiles)


@triton.constexpr_function
def _ten_words():
    return (tl.uint32,) * 10


@triton.jit
def _asm(text: tl.constexpr, constraints: tl.constexpr, operands):
    """With an effect besides its result."""
    return tl.inline_asm_elementwise(text, constraints, operands, dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def space(thread, SIZE: tl.constexpr):
    """Before all others, once: shared memory."""
    _asm(_space_text(SIZE), "=r,r", [thread])


@triton.jit
def barriers(thread, AT: tl.constexpr, COUNT: tl.constexpr):
    """COUNT mbarriers of 8 bytes, each for one arrival. ``barrier`` must follow before they are used."""
    _asm(_barriers_text(AT, COUNT), "=r,r", [thread])


@triton.jit
def fetch(wanted, address, AT: tl.constexpr, BARRIER: tl.constexpr, SIZE: tl.constexpr):
    """One thread of each warp where ``wanted`` is not 0 begins to copy SIZE bytes; the mbarrier waits for them."""
    _asm(_fetch_text(AT, BARRIER, SIZE), "=r,r,l", [wanted, address])


@triton.jit
def arrived(parity, BARRIER: tl.constexpr):
    """Waits for the mbarrier's phase: 0 the first time, then 1, then 0."""
    _asm(_arrived_text(BARRIER), "=r,r", [parity])


@triton.jit
def read_once(thread):
    """A policy for copies of a weight: L2 drops it before activations, caches and sums, which are soon read again."""
    text: tl.constexpr = "createpolicy.fractional.L2::evict_first.b64 $0, 1.0; // $1"
    return tl.inline_asm_elementwise(text, "=l,r", [thread], dtype=tl.int64, is_pure=True, pack=1)


@triton.jit
def copy_tile(thread, codes, scales, exists, policy, AT: tl.constexpr, THREADS: tl.constexpr, ZEROS: tl.constexpr):
    """Begins to copy a thread's part of a tile of a prepared weight, 40 bytes, to where it alone reads it.

    Of a tile that does not exist, zeros if ZEROS, else nothing.
    """
    _asm(_copy_text(AT, THREADS, ZEROS), "=&r,r,l,l,r,l", [thread, codes, scales, tl.where(exists, 16, 0), policy])


@triton.jit
def read_tile(thread, AT: tl.constexpr, THREADS: tl.constexpr, LEFT: tl.constexpr):
    """That part, once no more than the LEFT last copies of the thread are on their way: rows g, g + 8, scales."""
    return tl.inline_asm_elementwise(
        _read_text(AT, THREADS, LEFT),
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
        [thread],
        dtype=_ten_words(),
        is_pure=False,
        pack=1,
    )


@triton.jit
def afresh(thread):
    """The same number. Compilers do not know that, so what follows from it takes no registers before."""
    return _asm("mov.u32 $0, $1;", "=r,r", [thread])


@triton.jit
def raised(wanted, address):
    """Each thread where ``wanted`` is not 0 waits until the int32 at its address is not 0, and acquires it."""
    text: tl.constexpr = (
        "{ .reg .pred p, q; .reg .b32 v; setp.ne.u32 q, $1, 0; again: mov.b32 v, 1; "
        "@q ld.acquire.gpu.global.u32 v, [$2]; setp.eq.u32 p, v, 0; @p bra again; mov.u32 $0, $1; }"
    )
    _asm(text, "=r,r,l", [wanted, address])


@triton.jit
def barrier(thread):
    """Of all warps."""
    _asm("bar.sync 0; mov.u32 $0, $1;", "=r,r", [thread])


@triton.jit
def put(offset, bits, AT: tl.constexpr):
    """16 bits of each thread to shared memory, ``offset`` bytes behind AT."""
    _asm(_put_text(AT), "=r,r,r", [offset, bits])


@triton.jit
def take(offset, AT: tl.constexpr):
    """Four words from there, of each thread; ``offset`` is a multiple of 16. A ``barrier`` is between what was put."""
    return tl.inline_asm_elementwise(
        _take_text(AT), "=&r,=&r,=&r,=&r,r", [offset], dtype=(tl.uint32,) * 4, is_pure=False, pack=1
    )


@triton.jit
def multiply(sums, low, high, TILES: tl.constexpr, AT: tl.constexpr, BEHIND: tl.constexpr):
    """``sums`` and 64 rows by 32 of K, times 32 by ``8 * TILES`` columns at AT, begun; BEHIND may be under way.

    Args:
        sums: of each 8 columns four float32, as ``mma.m16n8k16`` has them.
        low: four words, pairs of bfloat16 of row g (``lane // 4``): its left operands of two products over 16 of K.
        high: the same of row g + 8.
    """
    constraints: tl.constexpr = _sums(TILES) + ",r,r,r,r,r,r,r,r," + _the_same(TILES)
    return tl.inline_asm_elementwise(
        _multiply_text(TILES, AT, BEHIND),
        constraints,
        (low[0], high[0], low[1], high[1], low[2], high[2], low[3], high[3]) + sums,
        dtype=_float32s(TILES),
        is_pure=False,
        pack=1,
    )


@triton.jit
def finish(sums, TILES: tl.constexpr):
    """``sums``, when nothing is under way any more."""
    constraints: tl.constexpr = _sums(TILES) + "," + _the_same(TILES)
    return tl.inline_asm_elementwise(
        "wgmma.wait_group.sync.aligned 0;", constraints, sums, dtype=_float32s(TILES), is_pure=False, pack=1
    )
