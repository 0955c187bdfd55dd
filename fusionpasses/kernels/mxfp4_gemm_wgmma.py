"""Product of up to 640 tokens with a large prepared MXFP4 weight, by Hopper's asynchronous tensor cores.

The weight is decoded to registers, as in ``mxfp4_gemm`` and from the same layout TILES, and is the left operand of
``wgmma``: four warps have 64 rows. x comes from shared memory. ``mxfp4_gemm_interleave`` has put it in the order in
which the instruction wants it, so that a column of 128 elements of K, or half of it, is one copy in bulk. While the
tensor cores multiply, the warps decode what comes next: that is what ``mma.sync`` cannot do, and why it takes longer.

Work is divided by steps, not by tiles: a step is UNROLLED columns of a tile of rows and tokens, and each program has
as many as any other, which may be the end of one tile, some whole ones and the start of another. A program that has not
the first columns of a tile leaves its sums in ``partial``, and raises its flag; the one that has them adds, in the
order of K, so a result has the same bytes in every call. It waits for programs of lower numbers only: GPUs start those
first, so they end, whatever else runs.
"""

# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,misc"
# (Triton does not know (*a, b); tuples grow.)

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusionpasses.kernels import _gated_tile, _mxfp4_words, _token_order, _warpgroup, mxfp4_gemm
from fusionpasses.kernels._mxfp4_words import TILES
from fusionpasses.kernels._pieces import PTX
from fusionpasses.kernels.arch import Arch

#: Tokens of a tile, at most: there is no room in shared memory for more.
MOST_TOKENS = 128


class _Weights(NamedTuple):
    """Weights of so many codes and more, and the tokens of which they are multiplied so."""

    codes: int
    least_w4a4: int
    least_weight_only: int
    most: int


_WEIGHTS = (
    _Weights(2**26, 9, 9, 5 * MOST_TOKENS),
    _Weights(48 * 2**20, 1, 1, 2 * MOST_TOKENS),
    _Weights(2**25, 9, 9, 2 * MOST_TOKENS),
    _Weights(20 * 2**20, 9, 17, MOST_TOKENS),
    _Weights(13 * 2**20, 17, 65, MOST_TOKENS),
)
#: From so many codes on, programs of 128 rows have enough steps.
_ENOUGH = 2**25
#: So few elements of K are too few for 9 to 16 tokens.
_SHORT_ROWS = 2048
#: Of a small weight whose rows are so many times as long as they are many, many programs share a tile.
_MEDIUM, _LONG = 20 * 2**20, 3
#: Steps of a tile that is short.
_SHORT = 8
_ROWS = 64  # of a warpgroup
_COLUMN = 128  # elements of K


def for_some_tokens(tokens: int, rows: int, width: int, arch: Arch, layout: str, *, w4a4: bool) -> bool:
    """Is it ``mxfp4_gemm_wgmma`` that runs?

    Of few tokens ``mma.sync`` keeps up with memory, and weight-only needs no kernel before it, W4A4 none up to 16; but
    where rows are few and long its programs are no equal shares of the processors, and from 9 tokens on it has too much
    to do. Every 128 tokens take about as long as the first 128, so many more are better multiplied by
    ``mxfp4_dequantize`` and torch: of 18432 x 7168, 512 take 205 us and 258 there, 768 take 312 and 323, 1024 take 423
    and 426. Of 19 weights that were measured on an H200, some, W4A4; by ``mma.sync``, or torch from 65 on, and by this:

    ============  =======================================================
    weight        tokens and microseconds
    ============  =======================================================
    7168 x 2048   16: 6.4 and 7.5; 24: 8.4 and 7.8; 128: 18.9 and 17.5
    2112 x 7168   16: 7.7 and 8.6; 32: 9.6 and 9.6; 48: 12.9 and 11.7
    6144 x 4096   8: 8.0 and 8.6; 16: 9.2 and 9.6; 48: 19.1 and 11.9
    4608 x 7168   8: 9.8 and 10.0; 16: 13.0 and 10.8; 32: 16.5 and 11.9
    14336 x 4096  1: 13.6 and 13.0; 8: 14.3 and 13.1
    18432 x 7168  8: 21.6 and 23.1; 16: 25.9 and 24.9
    7168 x 16384  8: 30.5 and 23.7
    ============  =======================================================
    """
    codes = rows * width
    found = next((weights for weights in _WEIGHTS if codes >= weights.codes), None)
    if found is None or arch.name != "sm_90" or layout != "tiles":
        return False
    least, most = found.least_w4a4 if w4a4 else found.least_weight_only, found.most
    if codes >= mxfp4_gemm.LARGE and rows < width:
        least = 1
    if width < _SHORT_ROWS:
        least = max(least, 17)
    if codes < _MEDIUM and _LONG * rows < width:
        least, most = max(least, 33), 48
    return least <= tokens <= most


def launch_options(tokens: int, rows: int, width: int, arch: Arch) -> dict[str, int | bool]:
    """Tile and compile options; ``PROGRAMS``, no constant of the kernel, is the grid.

    More columns of a step were measured and are not faster on an H200, nor are twice the rows, but from 17 to 32
    tokens of a large weight: x is read half as often then, which saves no time, but power (a chain of products that
    keeps the GPU at its limit takes 3 % less). With more than 64 the sums leave no room for as many programs, and
    x is what most bytes are. Of so many tokens a column does not fit shared memory twice; half of it does.

    All programs must be on the GPU at once, or the last ones double the time: so many as a multiprocessor has registers
    for, and no more registers. Fewer take longer (four instead of five for each, 13 to 17 %), but where tiles are short
    and even shares without being cut: no program then waits for another's sums (24576 x 1536 takes 2 to 5 % less).
    """
    groups = -(-tokens // MOST_TOKENS)
    token_tiles = -(-tokens // (8 * groups))
    two_from = mxfp4_gemm.LARGE if 2 < token_tiles <= 4 else _ENOUGH
    warpgroups = 2 if rows * width >= two_from and (2 < token_tiles <= 4 or token_tiles > 8) else 1
    unrolled, pieces = (2, 1) if token_tiles <= 8 else (1, 2)
    tiles = -(-rows // (_ROWS * warpgroups)) * groups
    steps_of_tile = -(-width // (_COLUMN * unrolled))
    programs, registers = (5, 96) if token_tiles <= 2 else (4 // warpgroups, 128)
    programs = min(tiles * steps_of_tile, programs * arch.processors)
    most = -(-tiles // arch.processors)  # tiles of a multiprocessor, if each program has one
    if steps_of_tile <= _SHORT and most >= 3 and 0.9 * most * arch.processors <= tiles <= programs:
        programs = tiles
    return {
        "TOKEN_TILES": token_tiles,
        "WARPGROUPS": warpgroups,
        "UNROLLED": unrolled,
        "PIECES": pieces,
        "PROGRAMS": programs,
        "maxnreg": registers,
        "num_warps": 4 * warpgroups,
        "enable_fp_fusion": False,
        "launch_pdl": True,
    }


@triton.jit(do_not_specialize=["tokens", "flags"])
def mxfp4_gemm_interleave(
    x_ptr,
    x_scales_ptr,  # None: x is bfloat16
    out_ptr,  # bfloat16, of whole tiles
    flags_ptr,  # int32 [flags]: made 0
    tokens,
    flags,
    x_stride,
    x_scales_stride,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,  # that out has; those beyond K are zeros
    TOKEN_TILES: tl.constexpr,
    WARPS: tl.constexpr,
    ISA: tl.constexpr,
):
    """Tokens in the order in which ``wgmma`` reads them from shared memory; codes become bfloat16.

    For each 16 of K, of which a thread of ``mxfp4_gemm_wgmma`` has four, two halves; of each half the tiles of eight
    tokens; of each token 16 bytes. It must wait before it lets ``mxfp4_gemm_wgmma`` start, which relies on that.
    """
    if ISA == PTX:
        gdc_wait()
        gdc_launch_dependents()
    thread = tl.arange(0, WARPS * 32)
    lane = thread % 32
    tile = tl.program_id(1)
    column = tl.program_id(0) * WARPS + thread // 32
    program = tile * tl.num_programs(0) + tl.program_id(0)
    for first in tl.range(program * (WARPS * 32), flags, tl.num_programs(0) * tl.num_programs(1) * (WARPS * 32)):
        tl.store(flags_ptr + first + thread, 0, mask=first + thread < flags)
    x = mxfp4_gemm.load_tokens(
        x_ptr,
        x_scales_ptr,
        tile * 8,
        tokens,
        x_stride,
        x_scales_stride,
        column,
        lane // 4,
        lane % 4,
        K // 32,
        False,
        TILES,
        ISA,
    )
    group, part = tile // TOKEN_TILES, tile % TOKEN_TILES
    words = out_ptr.to(tl.pointer_type(tl.uint32)) + (group.to(tl.int64) * COLUMNS + column) * (TOKEN_TILES * 512)
    for q in tl.static_range(4):
        for j in tl.static_range(4):
            at = ((q * 4 + j) * TOKEN_TILES + part) * 32 + lane
            tl.store(words + at, x[q][j], mask=column < COLUMNS)


@triton.jit
def _first_step(p, steps_each, left_over, programs):
    """Of ``p * steps // programs`` no product is too large for int32, of which a division takes a few instructions."""
    return p * steps_each + p * left_over // programs


@triton.jit
def _weight_of(
    tile,
    unit,
    groups,
    warp,
    w,
    scales,
    UNROLLED: tl.constexpr,
    COLUMNS: tl.constexpr,
    WARPGROUPS: tl.constexpr,
    GATE_TILES: tl.constexpr,
):
    """Where a thread's part of the weight is, and its tile of 16 rows."""
    if GATE_TILES is None:
        row_tile = tile // groups * (WARPGROUPS * 4) + warp
    else:
        row_tile = _gated_tile.row_tile(tile // groups, warp, GATE_TILES, WARPGROUPS)
    at = row_tile.to(tl.int64) * COLUMNS + unit * UNROLLED
    return w + at * 1024, scales + at * 64, row_tile


@triton.jit
def _copy_column(
    thread,
    w,
    scales,
    exists,
    unit,
    policy,
    i: tl.constexpr,
    FIRST_W: tl.constexpr,
    W: tl.constexpr,
    UNROLLED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of the i-th column of a step a thread's part of the weight; zeros of a column that is not there."""
    ENDS: tl.constexpr = COLUMNS % UNROLLED != 0
    if ENDS:
        exists = exists & (unit * UNROLLED + i < COLUMNS)
    _warpgroup.copy_tile(thread, w + i * 1024, scales + i * 64, exists, policy, FIRST_W + i * W, W // 40, ENDS)


@triton.jit
def _tokens_of(x, tile, unit, groups, UNITS: tl.constexpr, STEP: tl.constexpr):
    return x + ((tile % groups).to(tl.int64) * UNITS + unit) * STEP


@triton.jit
def _fetch_piece(wanted, step, n: tl.constexpr, PIECE: tl.constexpr, FIRST_BARRIER: tl.constexpr):
    """The n-th piece of x of a step, to its place."""
    _warpgroup.fetch(wanted, step + n * PIECE, n * PIECE, FIRST_BARRIER + n * 8, PIECE)


@triton.jit(do_not_specialize=["tokens", "rows", "groups", "steps_each", "left_over", "programs"])
def mxfp4_gemm_wgmma(
    x_ptr,  # from mxfp4_gemm_interleave
    w_ptr,  # layout TILES
    w_scales_ptr,
    bias_ptr,  # or None
    out_ptr,
    partial_ptr,  # float32 [programs, 4 * TOKEN_TILES, 128 * WARPGROUPS]
    flags_ptr,  # int32 [programs], 0
    tokens,
    rows,
    groups,  # of tokens: tiles next to each other have the same rows, which are then in the L2 cache
    steps_each,  # of a program, and how many more all programs have together
    left_over,
    programs,
    factor,  # float32, a power of two that all sums take
    K: tl.constexpr,
    TOKEN_TILES: tl.constexpr,  # of eight tokens
    WARPGROUPS: tl.constexpr,  # of 64 rows
    UNROLLED: tl.constexpr,  # columns of a step, and how many of the weight a thread has on their way
    PIECES: tl.constexpr,  # of a column of x, each copied by itself; 1, 2 or 4
    ISA: tl.constexpr,
    # None, as what is below, or rows are so many tiles of 16 of gate, then as many of up: out is then their product,
    # quantised, as the next product reads it, TOKEN_TILES of _token_order.
    GATE_TILES: tl.constexpr,
    NEXT_TILES: tl.constexpr,
    next_flags_ptr,  # or None; int32 [NEXT_FLAGS]: made 0
    NEXT_FLAGS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CAST_ORDER: tl.constexpr,
    SCALE_ADDEND: tl.constexpr,
):
    COLUMNS: tl.constexpr = (K // 32 + 3) // 4
    UNITS: tl.constexpr = (COLUMNS + UNROLLED - 1) // UNROLLED
    THREADS: tl.constexpr = WARPGROUPS * 128
    X: tl.constexpr = TOKEN_TILES * 2048  # bytes of a column of x
    PIECE: tl.constexpr = X // PIECES
    PARTS: tl.constexpr = 4 // PIECES  # products with a piece
    LAST: tl.constexpr = UNROLLED * PIECES - 1  # of a step's, each with its place
    W: tl.constexpr = THREADS * 40
    FIRST_W: tl.constexpr = UNROLLED * X
    FIRST_BARRIER: tl.constexpr = FIRST_W + UNROLLED * W
    END: tl.constexpr = FIRST_BARRIER + (LAST + 1) * 8
    SUMS: tl.constexpr = TOKEN_TILES * 4
    # Sums of other programs that are loaded at once: a load takes as long as hundreds of additions.
    AT_ONCE: tl.constexpr = 6 if TOKEN_TILES <= 2 else 3 if TOKEN_TILES <= 4 else 2 if TOKEN_TILES <= 8 else 1
    tl.static_assert(LAST > 0, "x that comes next goes to another place than this")
    thread = tl.arange(0, THREADS)
    lane = thread % 32
    warp = thread // 32
    zero = tl.zeros([], tl.int32)
    row_tiles = (rows + 15) // 16
    # Backwards, so that what a program waits for has been started before it.
    p = programs - 1 - tl.program_id(0)
    begin = _first_step(p, steps_each, left_over, programs)
    end = _first_step(p + 1, steps_each, left_over, programs)
    tile = begin // UNITS
    unit = begin - tile * UNITS

    GATED_AT: tl.constexpr = (END + 15) // 16 * 16
    if GATE_TILES is None:
        _warpgroup.space(thread, END)
    else:
        _warpgroup.space(thread, GATED_AT + _gated_tile.space(TOKEN_TILES, WARPGROUPS))
    _warpgroup.barriers(thread, FIRST_BARRIER, LAST + 1)
    w = w_ptr.to(tl.uint64, bitcast=True).to(tl.int64) + lane * 16
    scales = w_scales_ptr.to(tl.uint64, bitcast=True).to(tl.int64) + lane // 4 * 8
    policy = _warpgroup.read_once(thread)
    # Of the step to be copied next: its tile, its place in it, and how many there are.
    next_tile, next_unit, left = tile, unit, end - begin
    next_w, next_scales, row_tile = _weight_of(
        tile, unit, groups, warp, w, scales, UNROLLED, COLUMNS, WARPGROUPS, GATE_TILES
    )
    for i in tl.static_range(UNROLLED):
        exists = row_tile < row_tiles
        _copy_column(thread, next_w, next_scales, exists, next_unit, policy, i, FIRST_W, W, UNROLLED, COLUMNS)
    next_unit += 1
    left -= 1
    if next_unit == UNITS:
        next_tile += 1
        next_unit = 0
    next_w, next_scales, row_tile = _weight_of(
        next_tile, next_unit, groups, warp, w, scales, UNROLLED, COLUMNS, WARPGROUPS, GATE_TILES
    )
    _warpgroup.barrier(thread)
    if ISA == PTX:
        # The kernel before is mxfp4_gemm_interleave, which has itself waited for all that may have written the weight.
        gdc_wait()
    x = x_ptr.to(tl.uint64, bitcast=True).to(tl.int64)
    first_warp = (warp == 0).to(tl.int32)
    here = _tokens_of(x, tile, unit, groups, UNITS, UNROLLED * X)
    for n in tl.static_range(LAST):
        _fetch_piece(first_warp, here, n, PIECE, FIRST_BARRIER)
    parity = zero

    last_tile = (end - 1) // UNITS
    for _ in tl.range(last_tile - tile + 1):
        stop = tl.minimum(end - tile * UNITS, UNITS)
        start = unit
        sums = ()
        for _ in tl.static_range(SUMS):
            sums = sums + (tl.zeros([THREADS], tl.float32),)
        for step in tl.range(start, stop):
            after = here + UNROLLED * X
            if step == UNITS - 1:
                after = _tokens_of(x, tile + 1, 0, groups, UNITS, UNROLLED * X)
            more = tl.where(left > 0, first_warp, 0)
            for i in tl.static_range(UNROLLED):
                words = _warpgroup.read_tile(thread, FIRST_W + i * W, THREADS, UNROLLED - 1)
                exists = (row_tile < row_tiles) & (left > 0)
                _copy_column(thread, next_w, next_scales, exists, next_unit, policy, i, FIRST_W, W, UNROLLED, COLUMNS)
                f_low, f_high = _mxfp4_words.factors(words[8]), _mxfp4_words.factors(words[9])
                for piece in tl.static_range(PIECES):
                    _warpgroup.arrived(parity, FIRST_BARRIER + (i * PIECES + piece) * 8)
                    for part in tl.static_range(PARTS):
                        low = _mxfp4_words.scaled_of_tile(words[piece * PARTS + part], f_low, piece * PARTS + part, ISA)
                        high = _mxfp4_words.scaled_of_tile(
                            words[4 + piece * PARTS + part], f_high, piece * PARTS + part, ISA
                        )
                        sums = _warpgroup.multiply(
                            sums, low, high, TOKEN_TILES, i * X + piece * PIECE + part * (X // 4), 1
                        )
                        if part == 0:
                            # All products with the piece before are done, in every warp: its place is free.
                            _warpgroup.barrier(thread)
                            if i + piece == 0:
                                _fetch_piece(first_warp, here, LAST, PIECE, FIRST_BARRIER)
                            else:
                                _fetch_piece(more, after, i * PIECES + piece - 1, PIECE, FIRST_BARRIER)
            parity ^= 1
            here = after
            left -= 1
            next_w += UNROLLED * 1024
            next_scales += UNROLLED * 64
            next_unit += 1
            if next_unit == UNITS:
                next_tile += 1
                next_unit = 0
                next_w, next_scales, row_tile = _weight_of(
                    next_tile, 0, groups, warp, w, scales, UNROLLED, COLUMNS, WARPGROUPS, GATE_TILES
                )
        sums = _warpgroup.finish(sums, TOKEN_TILES)
        late = _warpgroup.afresh(thread)
        if ISA == PTX:
            # Not before: programs of the next kernel would all wait on the processors that are done first.
            if tile == last_tile:
                gdc_launch_dependents()

        if start > 0:
            mine = partial_ptr + p.to(tl.int64) * (SUMS * THREADS) + late
            for i in tl.static_range(SUMS):
                tl.store(mine + i * THREADS, sums[i])
            tl.debug_barrier()
            tl.atomic_xchg(flags_ptr + p, 1, sem="release")
        else:
            # The programs before ``last`` have the rest of the tile. All flags are awaited at once, each by a thread.
            after_tile = (tile + 1) * UNITS
            last = p + 1 + tl.maximum(after_tile - end, 0) // (steps_each + 1)  # no more than there are
            while _first_step(last, steps_each, left_over, programs) < after_tile:
                last += 1
            for first in tl.range(p + 1, last, THREADS):
                other = first + late
                address = flags_ptr.to(tl.uint64, bitcast=True).to(tl.int64) + other * 4
                _warpgroup.raised((other < last).to(tl.int32), address)
            _warpgroup.barrier(thread)
            theirs = partial_ptr + (p + 1).to(tl.int64) * (SUMS * THREADS) + late
            others = last - p - 1
            while others > 0:
                parts = ()
                for j in tl.static_range(AT_ONCE):
                    for i in tl.static_range(SUMS):
                        at = theirs + (j * SUMS + i) * THREADS
                        if j == 0:
                            parts = parts + (tl.load(at, cache_modifier=".cg"),)
                        else:
                            parts = parts + (
                                tl.load(at, mask=late < (others - j) * THREADS, other=-0.0, cache_modifier=".cg"),
                            )
                for j in tl.static_range(AT_ONCE):
                    new = ()
                    for i in tl.static_range(SUMS):
                        new = new + (sums[i] + parts[j * SUMS + i],)
                    sums = new
                theirs += AT_ONCE * SUMS * THREADS
                others -= AT_ONCE
            if GATE_TILES is None:
                row = (tile // groups * (WARPGROUPS * 4) + late // 32) * 16 + late % 32 // 4
                token = tile % groups * (TOKEN_TILES * 8) + late % 4 * 2
                for n in tl.static_range(TOKEN_TILES):
                    part = sums[4 * n], sums[4 * n + 1], sums[4 * n + 2], sums[4 * n + 3]
                    mxfp4_gemm.store_tile(part, 0, n, row, token, bias_ptr, out_ptr, tokens, rows, factor, thread >= 0)
            else:
                _gated_tile.store(
                    sums,
                    late,
                    tile // groups,
                    tile % groups * (TOKEN_TILES * 8),
                    tokens,
                    factor,
                    out_ptr,
                    GATED_AT,
                    TOKEN_TILES,
                    WARPGROUPS,
                    GATE_TILES // 2,
                    NEXT_TILES,
                    ACTIVATION,
                    CAST_ORDER,
                    SCALE_ADDEND,
                    ISA,
                )
        tile += 1
        unit = tl.zeros([], tl.int32)
    if GATE_TILES is not None:
        _token_order.lower_flags(next_flags_ptr, NEXT_FLAGS)
