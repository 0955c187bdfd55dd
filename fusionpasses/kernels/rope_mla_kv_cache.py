"""RoPE of q and k, the copy of q_nope and the write to the MLA cache, in one launch; or the write alone.

Nothing here needs another thread, so the work is four flat ranges, one after the other in the grid, each cut into tiles
of one unit a thread:

======  ==========================================  ===================================================================
range   unit                                        does
======  ==========================================  ===================================================================
k       ``VECTOR`` pairs of one token               rotates them into the cache, and into k if that is returned
row     ``ROW_COPIES`` times ``VECTOR`` elements    kv_c into the cache
q       ``VECTOR`` pairs of one head                rotates them into q
copy    ``COPIES`` times ``VECTOR`` elements        q_nope into q; or q's programs do, if ``JOINED``
======  ==========================================  ===================================================================

What is short and waits for loads that depend on each other (slot, position, angle, element) comes first, so that it is
not all that runs at the end. ``VECTOR`` is 8, a piece, where all widths are multiples of it and all rows are aligned to
words; else 1.

Bytes: exactly those of the reference, for every input, on every target; but for a slot that occurs twice.
"""

# ruff: noqa: RET505, RUF005
# mypy: disable-error-code="assignment,misc"
# (Triton needs the else of a constexpr if, and does not know (*a, b); tuples grow.)

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusionpasses.kernels import _pieces
from fusionpasses.kernels._pieces import PTX
from fusionpasses.kernels.arch import Arch


def launch_options(tokens: int, heads: int, nope: int, rope: int, vector: int, arch: Arch) -> dict[str, int | bool]:
    """Tile and compile options; ``nope`` is 0 if there is no q_nope.

    Measured on an H200 with a latent of 512 and a rope of 64, 16 and 128 heads, 1 to 8192 tokens, in CUDA graphs.
    """
    pieces_for_each_unit = -(-2 * nope // rope)
    # Many rows of q are written faster as wholes; with fewer, what can run at once should. Then heads of two tokens are
    # taken in turn: what a warp reads of a q_nope laid out by heads is twice as long, and what it writes still lies
    # side by side.
    joined = vector > 1 and nope > 0 and tokens * heads >= 131072 and pieces_for_each_unit <= 16
    if joined:
        # With 64 threads in a warp, sixteen would not fit their registers, nor would two tokens at once.
        warps, copies, row_copies = 1, pieces_for_each_unit, 512 // arch.warp_size
    else:
        warps, row_copies = 4, 4 if tokens >= 256 else 1
        # Several loads at once in a thread, as soon as there are programs enough to fill the GPU.
        copied = tokens * heads * nope // vector
        copies = next((c for c in (4, 2) if copied >= c * warps * arch.warp_size * 2 * arch.processors), 1)
    options: dict[str, int | bool] = {
        "LANES": warps * arch.warp_size,
        "COPIES": copies,
        "ROW_COPIES": row_copies,
        "JOINED": joined,
        "TOGETHER": 2 if joined and arch.warp_size == 32 else 1,
        "num_warps": warps,
        # Whether it is on otherwise depends on the Triton version.
        "enable_fp_fusion": False,
        # The asserts on slots and positions, without Triton's own on overflows. AMD's are calls of printf, thousands of
        # instructions; torch leaves its own out there, too.
        "debug": not arch.name.startswith("gfx"),
        "sanitize_overflow": False,
    }
    if arch.hopper_ptx:
        options["launch_pdl"] = True
    return options


# ---- elements of a thread: pieces, or one element


@triton.jit
def _load(base, column, mask, VECTOR: tl.constexpr):
    if VECTOR == 1:
        return (tl.load(base + column, mask=mask, other=0),)
    else:
        return _pieces.load_piece(base, column, mask, True, "")


@triton.jit
def _store(base, column, piece, mask, VECTOR: tl.constexpr):
    if VECTOR == 1:
        tl.store(base + column, piece[0], mask=mask)
    else:
        _pieces.store_piece(base, column, piece, mask, True)


@triton.jit
def _floats_of(piece, dtype: tl.constexpr, VECTOR: tl.constexpr):
    if VECTOR == 1:
        return (piece[0].to(tl.float32),)
    else:
        return _pieces.floats_of(piece, dtype)


@triton.jit
def _of_floats(e, dtype: tl.constexpr, VECTOR: tl.constexpr, ISA: tl.constexpr):
    """Rounded to ``dtype``, as it is stored."""
    if VECTOR == 1:
        return (e[0].to(dtype),)
    elif dtype == tl.float32:
        return e
    else:
        return _pieces.to_words(e, dtype, ISA)


@triton.jit
def _low_halves(a, b):
    return (a & 0xFFFF) | (b << 16)


@triton.jit
def _high_halves(a, b):
    return (a >> 16) | (b & 0xFFFF0000)


@triton.jit
def _unwoven(p, q, dtype: tl.constexpr, VECTOR: tl.constexpr):
    """The even and the odd elements of two pieces that follow each other."""
    if VECTOR == 1:
        return p, q
    elif dtype == tl.float32:
        return (p[0], p[2], p[4], p[6], q[0], q[2], q[4], q[6]), (p[1], p[3], p[5], p[7], q[1], q[3], q[5], q[7])
    else:
        even = (_low_halves(p[0], p[1]), _low_halves(p[2], p[3]), _low_halves(q[0], q[1]), _low_halves(q[2], q[3]))
        odd = (_high_halves(p[0], p[1]), _high_halves(p[2], p[3]), _high_halves(q[0], q[1]), _high_halves(q[2], q[3]))
        return even, odd


@triton.jit
def _woven(a, b, dtype: tl.constexpr, VECTOR: tl.constexpr):
    """The other way round."""
    if VECTOR == 1:
        return a, b
    elif dtype == tl.float32:
        return (a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3]), (a[4], b[4], a[5], b[5], a[6], b[6], a[7], b[7])
    else:
        p = (_low_halves(a[0], b[0]), _high_halves(a[0], b[0]), _low_halves(a[1], b[1]), _high_halves(a[1], b[1]))
        q = (_low_halves(a[2], b[2]), _high_halves(a[2], b[2]), _low_halves(a[3], b[3]), _high_halves(a[3], b[3]))
        return p, q


@triton.jit
def _fp8_byte(e, scale, SCALING: tl.constexpr):
    """A float32, scaled and saturated, as the byte of the nearest float8_e4m3fn, ties to even. Integers throughout."""
    if SCALING == "divide":
        e = tl.div_rn(e, scale)
    elif SCALING == "multiply":
        e = e * scale
    bits = e.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    largest = tl.minimum(magnitude, 0x43E00000)  # 448
    normal = ((largest + 0x7FFFF + ((largest >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6 codes are multiples of 2**-9, the last bit of a sum with 2**14.
    small = (largest.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(largest < 0x3C800000, small, normal)
    return tl.where(magnitude > 0x7F800000, 0x7F, code) | ((bits >> 24) & 0x80)


@triton.jit
def _store_in_cache(
    row,
    column,
    piece,
    mask,
    scale,
    dtype: tl.constexpr,
    SCALING: tl.constexpr,  # None: the cache has the model's dtype
    VECTOR: tl.constexpr,
):
    if SCALING is None:
        _store(row, column, piece, mask, VECTOR)
    else:
        e = _floats_of(piece, dtype, VECTOR)
        if VECTOR == 1:
            tl.store(row + column, _fp8_byte(e[0], scale, SCALING).to(tl.uint8), mask=mask)
        else:
            # Four halves of words, not two words: Triton gives a thread as many elements of a load as of a store of the
            # same shape. Loads of rows off alignment would else be cut among threads and gathered in shared memory.
            halves = ()
            for i in tl.static_range(4):
                half = _fp8_byte(e[2 * i], scale, SCALING) | (_fp8_byte(e[2 * i + 1], scale, SCALING) << 8)
                halves = halves + (half.to(tl.uint16),)
            _pieces.store4(row.to(tl.pointer_type(tl.uint16)) + column // 2, halves, mask, True)


# ---- rotation


@triton.jit
def _load_pairs(base, unit, mask, dtype: tl.constexpr, WIDTH: tl.constexpr, WOVEN: tl.constexpr, VECTOR: tl.constexpr):
    """First and second elements of the pairs of a unit; ``WIDTH`` elements in a row."""
    if WOVEN:
        p = _load(base, unit * (2 * VECTOR), mask, VECTOR)
        q = _load(base, unit * (2 * VECTOR) + VECTOR, mask, VECTOR)
        return _unwoven(p, q, dtype, VECTOR)
    else:
        a = _load(base, unit * VECTOR, mask, VECTOR)
        return a, _load(base, unit * VECTOR + WIDTH // 2, mask, VECTOR)


@triton.jit
def _load_angles(
    base,
    unit,
    mask,
    dtype: tl.constexpr,
    WIDTH: tl.constexpr,
    FULL: tl.constexpr,  # one angle for each element written; else for each pair
    WOVEN: tl.constexpr,
    VECTOR: tl.constexpr,
):
    if FULL:
        return _load_pairs(base, unit, mask, dtype, WIDTH, WOVEN, VECTOR)
    else:
        angles = _load(base, unit * VECTOR, mask, VECTOR)
        return angles, angles


@triton.jit
def _round(e, dtype: tl.constexpr, ROUND: tl.constexpr):
    if ROUND:
        return e.to(dtype).to(tl.float32)
    else:
        return e


@triton.jit
def _rotated(
    x,
    cos,
    sin,
    dtype: tl.constexpr,
    angle_dtype: tl.constexpr,
    VECTOR: tl.constexpr,
    ISA: tl.constexpr,
):
    """First and second elements of the rotated pairs, as they are stored. All arguments are pairs (first, second)."""
    ROUND: tl.constexpr = angle_dtype == dtype and dtype != tl.float32
    first = ()
    second = ()
    if ROUND and VECTOR != 1:
        for i in tl.static_range(4):
            # A sign that is flipped is exact.
            b_sin = _pieces.multiply_word(x[1][i], sin[0][i], dtype, ISA) ^ 0x80008000
            a_cos = _pieces.multiply_word(x[0][i], cos[0][i], dtype, ISA)
            first = first + (_pieces.add_word(a_cos, b_sin, dtype, ISA),)
            b_cos = _pieces.multiply_word(x[1][i], cos[1][i], dtype, ISA)
            a_sin = _pieces.multiply_word(x[0][i], sin[1][i], dtype, ISA)
            second = second + (_pieces.add_word(b_cos, a_sin, dtype, ISA),)
        return first, second
    else:
        a = _floats_of(x[0], dtype, VECTOR)
        b = _floats_of(x[1], dtype, VECTOR)
        cos_a = _floats_of(cos[0], angle_dtype, VECTOR)
        cos_b = _floats_of(cos[1], angle_dtype, VECTOR)
        sin_a = _floats_of(sin[0], angle_dtype, VECTOR)
        sin_b = _floats_of(sin[1], angle_dtype, VECTOR)
        for i in tl.static_range(VECTOR):
            a_cos = _round(a[i] * cos_a[i], dtype, ROUND)
            first = first + (a_cos - _round(b[i] * sin_a[i], dtype, ROUND),)
            b_cos = _round(b[i] * cos_b[i], dtype, ROUND)
            second = second + (b_cos + _round(a[i] * sin_b[i], dtype, ROUND),)
        return _of_floats(first, dtype, VECTOR, ISA), _of_floats(second, dtype, VECTOR, ISA)


@triton.jit
def _rotated_unit(
    x_row,
    cos_ptr,
    sin_ptr,
    angle_row,
    unit,
    mask,
    cos_row_stride,
    sin_row_stride,
    WIDTH: tl.constexpr,
    FULL: tl.constexpr,
    READ_WOVEN: tl.constexpr,
    WRITE_WOVEN: tl.constexpr,
    VECTOR: tl.constexpr,
    ISA: tl.constexpr,
):
    """A unit of a row, rotated: two pieces as they are stored, and the columns they are stored at."""
    dtype: tl.constexpr = x_row.dtype.scalar.element_ty
    angle_dtype: tl.constexpr = cos_ptr.dtype.element_ty
    x = _load_pairs(x_row, unit, mask, dtype, WIDTH, READ_WOVEN, VECTOR)
    cos_row = cos_ptr + angle_row * cos_row_stride
    sin_row = sin_ptr + angle_row * sin_row_stride
    cos = _load_angles(cos_row, unit, mask, angle_dtype, WIDTH, FULL, WRITE_WOVEN, VECTOR)
    sin = _load_angles(sin_row, unit, mask, angle_dtype, WIDTH, FULL, WRITE_WOVEN, VECTOR)
    first, second = _rotated(x, cos, sin, dtype, angle_dtype, VECTOR, ISA)
    if WRITE_WOVEN:
        p, q = _woven(first, second, dtype, VECTOR)
        return p, q, unit * (2 * VECTOR), unit * (2 * VECTOR) + VECTOR
    else:
        return first, second, unit * VECTOR, unit * VECTOR + WIDTH // 2


@triton.jit
def _angle_row(positions_ptr, token, exists, table_rows, ASSERT: tl.constexpr):
    """Row of the angles of each token; row 0 for a position outside the table."""
    if positions_ptr is None:
        return token
    else:
        row = tl.load(positions_ptr + token, mask=exists, other=0).to(tl.int64)
        row = tl.where(row < 0, row + table_rows, row)
        inside = (row >= 0) & (row < table_rows)
        if ASSERT:
            tl.device_assert(inside, "fusionpasses: a position outside cos and sin; make the table longer")
        return tl.where(inside, row, 0)


@triton.jit
def _slot(slots_ptr, token, exists, capacity, NEGATIVE_SLOTS: tl.constexpr, ASSERT: tl.constexpr):
    """Slot of each token, and whether it is written."""
    slot = tl.load(slots_ptr + token, mask=exists, other=0).to(tl.int64)
    skipped = (slot < 0) & (NEGATIVE_SLOTS == "skip")
    if NEGATIVE_SLOTS == "wrap":
        slot = tl.where(slot < 0, slot + capacity, slot)
    inside = (slot >= 0) & (slot < capacity)
    if ASSERT:
        tl.device_assert(inside | skipped | ~exists, "fusionpasses: a slot outside the cache; pad with -1 and 'skip'")
    return slot, exists & inside


@triton.jit
def _place(slot, block_stride, slot_stride, PAGE: tl.constexpr):
    """Offset of a slot's row in its cache; ``PAGE`` slots in a block, None: all slots are one stride apart."""
    if PAGE is None:
        return slot * slot_stride
    else:
        return slot // PAGE * block_stride + slot % PAGE * slot_stride


@triton.jit
def _units(
    program,
    tokens,
    HEADS: tl.constexpr,
    PER_HEAD: tl.constexpr,
    TOGETHER: tl.constexpr,
    LANES: tl.constexpr,
):
    """Token, head, unit within it and whether it exists, for each lane of a tile of a flat range.

    In the range a head of ``TOGETHER`` tokens is followed by the next head of these tokens.
    """
    # 64 bits for what all lanes share; divisions of what is theirs in 32.
    ROWS: tl.constexpr = HEADS * TOGETHER
    start = program.to(tl.int64) * LANES
    lane = tl.arange(0, LANES)[None, :]
    at = (start % (ROWS * PER_HEAD)).to(tl.int32) + lane
    row = at // PER_HEAD
    token = (start // (ROWS * PER_HEAD) + row // ROWS) * TOGETHER + row % TOGETHER
    return token, row % ROWS // TOGETHER, at % PER_HEAD, token < tokens


@triton.jit
def _load_copied(
    base,
    tile,
    tokens,
    token_stride,
    head_stride,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOGETHER: tl.constexpr,
    COPIES: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
):
    """``COPIES`` pieces for each lane, from a tile on."""
    pieces = ()
    for i in tl.static_range(COPIES):
        token, head, unit, exists = _units(tile + i, tokens, HEADS, WIDTH // VECTOR, TOGETHER, LANES)
        row = base + token * token_stride + head.to(tl.int64) * head_stride
        pieces = pieces + (_load(row, unit * VECTOR, exists, VECTOR),)
    return pieces


@triton.jit
def _store_copied(
    base,
    pieces,
    tile,
    tokens,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    TOGETHER: tl.constexpr,
    COPIES: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
):
    for i in tl.static_range(COPIES):
        token, head, unit, exists = _units(tile + i, tokens, HEADS, WIDTH // VECTOR, TOGETHER, LANES)
        _store(base + (token * (HEADS * STRIDE) + head * STRIDE), unit * VECTOR, pieces[i], exists, VECTOR)


@triton.jit(do_not_specialize=["tokens", "k_programs", "row_programs", "q_programs", "capacity", "table_rows"])
def rope_mla_kv_cache(
    nope_ptr,  # None: q is rope(q_pe) alone
    q_pe_ptr,  # None: the write alone, k_pe as it is
    k_pe_ptr,
    kv_c_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,  # None: angles are gathered
    slots_ptr,
    cache_ptr,
    pe_cache_ptr,  # None: the rope part follows in the rows of the cache
    scale_ptr,  # None: nothing is scaled
    q_ptr,
    k_ptr,  # None: k is not returned
    tokens,
    k_programs,  # where in the grid the ranges end
    row_programs,
    q_programs,
    capacity,
    table_rows,
    nope_token_stride,
    nope_head_stride,
    q_pe_token_stride,
    q_pe_head_stride,
    k_pe_token_stride,
    kv_c_token_stride,
    cos_row_stride,
    sin_row_stride,
    cache_block_stride,
    cache_slot_stride,
    pe_cache_block_stride,
    pe_cache_slot_stride,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    FULL: tl.constexpr,  # as many angles as elements
    READ_WOVEN: tl.constexpr,
    WRITE_WOVEN: tl.constexpr,
    NEGATIVE_SLOTS: tl.constexpr,
    PAGE: tl.constexpr,
    SCALING: tl.constexpr,  # of a float8 cache: "divide", "multiply" by the reciprocal, "none"; None: no float8
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    COPIES: tl.constexpr,  # pieces of q_nope for a thread
    ROW_COPIES: tl.constexpr,  # pieces of kv_c for a thread
    JOINED: tl.constexpr,  # who rotates heads of q copies their q_nope, too
    TOGETHER: tl.constexpr,  # tokens whose heads are taken in turn, in q's range and the copy's
    ISA: tl.constexpr,
):
    dtype: tl.constexpr = k_pe_ptr.dtype.element_ty
    Q_UNITS: tl.constexpr = ROPE // (2 * VECTOR)
    if ISA == PTX:
        # Launched before the kernel in front has ended (``launch_pdl``): wait for its writes, let the next one come.
        gdc_wait()
        gdc_launch_dependents()
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
        if SCALING == "multiply":
            scale = tl.div_rn(1.0, scale)
    if SCALING is not None:
        cache_ptr = cache_ptr.to(tl.pointer_type(tl.uint8))
        if pe_cache_ptr is not None:
            pe_cache_ptr = pe_cache_ptr.to(tl.pointer_type(tl.uint8))
    program = tl.program_id(0)

    if program < k_programs:
        token, _, unit, exists = _units(program, tokens, 1, Q_UNITS, 1, LANES)
        slot, written = _slot(slots_ptr, token, exists, capacity, NEGATIVE_SLOTS, False)
        source = k_pe_ptr + token * k_pe_token_stride
        if q_pe_ptr is None:
            p_at, q_at = unit * (2 * VECTOR), unit * (2 * VECTOR) + VECTOR
            p = _load(source, p_at, exists, VECTOR)
            q = _load(source, q_at, exists, VECTOR)
        else:
            angle_row = _angle_row(positions_ptr, token, exists, table_rows, True)
            p, q, p_at, q_at = _rotated_unit(
                source,
                cos_ptr,
                sin_ptr,
                angle_row,
                unit,
                exists,
                cos_row_stride,
                sin_row_stride,
                ROPE,
                FULL,
                READ_WOVEN,
                WRITE_WOVEN,
                VECTOR,
                ISA,
            )
        if k_ptr is not None:
            _store(k_ptr + token * ROPE, p_at, p, exists, VECTOR)
            _store(k_ptr + token * ROPE, q_at, q, exists, VECTOR)
        if pe_cache_ptr is None:
            pe_row = cache_ptr + (_place(slot, cache_block_stride, cache_slot_stride, PAGE) + LATENT)
        else:
            pe_row = pe_cache_ptr + _place(slot, pe_cache_block_stride, pe_cache_slot_stride, PAGE)
        _store_in_cache(pe_row, p_at, p, written, scale, dtype, SCALING, VECTOR)
        _store_in_cache(pe_row, q_at, q, written, scale, dtype, SCALING, VECTOR)
    elif program < row_programs:
        tile = (program - k_programs) * ROW_COPIES
        pieces = ()
        for i in tl.static_range(ROW_COPIES):
            token, _, unit, exists = _units(tile + i, tokens, 1, LATENT // VECTOR, 1, LANES)
            pieces = pieces + (_load(kv_c_ptr + token * kv_c_token_stride, unit * VECTOR, exists, VECTOR),)
        for i in tl.static_range(ROW_COPIES):
            token, _, unit, exists = _units(tile + i, tokens, 1, LATENT // VECTOR, 1, LANES)
            slot, written = _slot(slots_ptr, token, exists, capacity, NEGATIVE_SLOTS, True)
            row = cache_ptr + _place(slot, cache_block_stride, cache_slot_stride, PAGE)
            _store_in_cache(row, unit * VECTOR, pieces[i], written, scale, dtype, SCALING, VECTOR)
    elif program < q_programs:
        if q_pe_ptr is not None:
            if JOINED:
                nope_tile = (program - row_programs) * COPIES
                nope = _load_copied(
                    nope_ptr,
                    nope_tile,
                    tokens,
                    nope_token_stride,
                    nope_head_stride,
                    HEADS,
                    NOPE,
                    TOGETHER,
                    COPIES,
                    VECTOR,
                    LANES,
                )
            token, head, unit, exists = _units(program - row_programs, tokens, HEADS, Q_UNITS, TOGETHER, LANES)
            angle_row = _angle_row(positions_ptr, token, exists, table_rows, False)
            p, q, p_at, q_at = _rotated_unit(
                q_pe_ptr + token * q_pe_token_stride + head.to(tl.int64) * q_pe_head_stride,
                cos_ptr,
                sin_ptr,
                angle_row,
                unit,
                exists,
                cos_row_stride,
                sin_row_stride,
                ROPE,
                FULL,
                READ_WOVEN,
                WRITE_WOVEN,
                VECTOR,
                ISA,
            )
            q_row = q_ptr + (token * (HEADS * (NOPE + ROPE)) + head * (NOPE + ROPE) + NOPE)
            _store(q_row, p_at, p, exists, VECTOR)
            _store(q_row, q_at, q, exists, VECTOR)
            if JOINED:
                _store_copied(q_ptr, nope, nope_tile, tokens, HEADS, NOPE, NOPE + ROPE, TOGETHER, COPIES, VECTOR, LANES)
    else:
        if nope_ptr is not None and not JOINED:
            nope_tile = (program - q_programs) * COPIES
            nope = _load_copied(
                nope_ptr,
                nope_tile,
                tokens,
                nope_token_stride,
                nope_head_stride,
                HEADS,
                NOPE,
                TOGETHER,
                COPIES,
                VECTOR,
                LANES,
            )
            _store_copied(q_ptr, nope, nope_tile, tokens, HEADS, NOPE, NOPE + ROPE, TOGETHER, COPIES, VECTOR, LANES)
