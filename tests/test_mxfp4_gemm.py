"""Products with MXFP4 weights: layouts, the kernel with an emulated tensor core anywhere, compiled on a GPU."""

from __future__ import annotations

import os
import random
import sys
from typing import Any

import pytest
import shuffled_layout
import torch
import triton_interpreter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusionpasses.errors import UnsupportedInput
from fusionpasses.ops import OPS, _mxfp4, _mxfp4_weight
from fusionpasses.probes import probe_triton

W4A4, W4A16 = "mxfp4_gemm.default", "mxfp4_gemm_a16w4.default"
ours = torch.ops.fusionpasses
needs_triton = pytest.mark.skipif(not probe_triton(), reason=probe_triton().why)
compiled = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs compiled kernels")


def weight(rows: int, width: int, low: int, high: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Random codes, scale bytes from low to high - 1."""
    codes = torch.randint(0, 256, (rows, width // 2), dtype=torch.uint8, device=device)
    return codes, torch.randint(low, high, (rows, width // 32), dtype=torch.uint8, device=device)


# ---- layouts


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 70),
    blocks=st.integers(1, 9),
    low=st.integers(0, 250),
    span=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_a_prepared_weight_means_the_same_and_is_undone_byte_by_byte(
    rows: int, blocks: int, low: int, span: int, seed: int
) -> None:
    torch.manual_seed(seed)
    codes, scales = weight(rows, 32 * blocks, low, min(low + span, 255))
    prepared, exponents, shift = _mxfp4_weight.prepare(codes, scales)
    assert prepared.shape == (-(-rows // 16), -(-blocks // 4), 1024)
    assert shift == max(0, int(scales.max()) - 128)
    again = _mxfp4_weight.unprepare(prepared, exponents, rows, 32 * blocks, shift)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scales)
    values = _mxfp4_weight.linear(prepared, exponents, "tiles", rows, shift, 32 * blocks)
    assert torch.equal(values, _mxfp4.dequantize(codes, scales))


def test_bits_of_a_word_all_move_to_places_of_their_own() -> None:
    targets = [target + i for _, target, width in _mxfp4_weight._MOVES for i in range(width)]
    assert sorted(targets) == list(range(32))


@pytest.mark.parametrize(
    ("scales", "reason"),
    [
        ([[127, 255]], r"got a block whose scale is NaN, allowed numbers; it stays 'linear'"),
        ([[140, 6]], r"got scale bytes from 6 to 140, allowed a span"),
        ([[254, 120]], r"got scale bytes from 120 to 254, allowed a span"),
    ],
)
def test_what_cannot_be_folded_exactly_is_refused(scales: list[list[int]], reason: str) -> None:
    codes = torch.full((1, 32), 0x11, dtype=torch.uint8)
    with pytest.raises(UnsupportedInput, match=reason):
        _mxfp4_weight.prepare(codes, torch.tensor(scales, dtype=torch.uint8))


def test_a_block_of_zeros_may_have_any_scale() -> None:
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 0] = 0x80  # a negative zero
    codes[0, 16:] = 0x11
    scales = torch.tensor([[5, 140]], dtype=torch.uint8)
    prepared, exponents, shift = _mxfp4_weight.prepare(codes, scales)
    again = _mxfp4_weight.unprepare(prepared, exponents, 1, 64, shift)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scales)


def test_a_weight_without_data_is_refused() -> None:
    codes, scales = weight(16, 64, 120, 121)
    with pytest.raises(UnsupportedInput, match="got one on the meta device, allowed one with data"):
        _mxfp4_weight.prepare(codes.to("meta"), scales.to("meta"))


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 4), pieces=st.integers(1, 4), seed=st.integers(0, 99))
def test_a_shuffled_weight_has_its_bytes_where_aiter_reads_them_and_is_undone(
    rows: int, pieces: int, seed: int
) -> None:
    torch.manual_seed(seed)
    rows, width = 32 * rows, 256 * pieces
    codes, scales = weight(rows, width, 0, 256)
    of_codes = {"shuffled": (rows // 16, width * 8), "shuffled_scales": (rows, width // 2)}
    for layout in _mxfp4_weight.SHUFFLED:
        shuffled = _mxfp4_weight.shuffle(codes, scales, layout)
        assert [t.shape for t in shuffled] == [of_codes[layout], (rows // 32, width)]
        assert all(t.is_contiguous() for t in shuffled)
        back = shuffled_layout.put_back(*shuffled, rows, width)
        if layout == "shuffled_scales":
            assert shuffled[0] is codes
            back = codes, back[1]
        for again in (back, _mxfp4_weight.unshuffle(*shuffled, layout)):
            assert torch.equal(again[0], codes)
            assert torch.equal(again[1], scales)
            assert again[0].is_contiguous()
            assert again[1].is_contiguous()
        values = _mxfp4_weight.linear(*shuffled, layout, rows, 0, width)
        torch.testing.assert_close(values, _mxfp4.dequantize(codes, scales), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", _mxfp4_weight.SHUFFLED)
@pytest.mark.parametrize(("rows", "width"), [(16, 256), (48, 256), (0, 256), (32, 128), (32, 288)])
def test_sizes_that_a_shuffled_weight_cannot_have_are_refused(rows: int, width: int, layout: str) -> None:
    reason = rf"got {rows} rows of {width}, allowed .* 32 rows .* 256 with layout '{layout}': it has no padding"
    with pytest.raises(UnsupportedInput, match=reason):
        _mxfp4_weight.shuffle(*weight(rows, width, 120, 130), layout)


# ---- arguments


def _call(**changes: Any) -> Tensor:
    codes, scales = weight(8, 64, 120, 130)
    arguments = {"x": torch.randn(2, 64), "w_codes": codes, "w_scales": scales} | changes
    result: Tensor = ours.mxfp4_gemm_a16w4(**arguments)
    return result


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"x": torch.randn(2, 32)}, r"w_codes: got shape \(8, 32\) with x 32 wide, allowed \[N, 16\]"),
        ({"x": torch.randn(2, 64).double()}, r"x.dtype: got torch.float64, allowed"),
        ({"w_scales": torch.zeros(8, 1, dtype=torch.uint8)}, r"w_scales: got shape \(8, 1\).*allowed \(8, 2\)"),
        ({"w_scales": torch.zeros(8, 2)}, r"w_scales.dtype: got torch.float32, allowed torch.uint8"),
        ({"w_codes": torch.zeros(32, 8, dtype=torch.uint8).T}, "allowed contiguous tensors"),
        ({"layout": "tile"}, "layout: got 'tile', allowed 'linear', 'tiles'"),
        ({"rows": 8}, "rows, shift: got 8 and 0 with layout 'linear', allowed None and 0"),
        ({"layout": "tiles"}, "rows, shift: got None and 0 with layout 'tiles', allowed N >= 1 and 0 to 126"),
        ({"layout": "tiles", "rows": 8}, r"w_codes: got shape \(8, 32\) for 8 rows of 64, allowed \(1, 1, 1024\)"),
        ({"layout": "shuffled"}, "rows, shift: got None and 0 with layout 'shuffled', allowed N >= 1 and 0"),
        ({"layout": "shuffled", "rows": 32, "shift": 1}, "rows, shift: got 32 and 1 with layout 'shuffled'"),
        ({"layout": "shuffled", "rows": 8}, "got 8 rows of 64, allowed positive multiples of 32"),
        (
            {"layout": "shuffled", "rows": 32, "x": torch.randn(2, 256)},
            r"w_codes: got shape \(8, 32\) for 32 rows of 256, allowed \(2, 2048\)",
        ),
        (
            {"layout": "shuffled", "rows": 32, "x": torch.randn(2, 256), "w_codes": torch.zeros(2, 2048).byte()},
            r"w_scales: got shape \(8, 2\) .* allowed \(1, 256\)",
        ),
        (
            {"layout": "shuffled_scales"},
            "rows, shift: got None and 0 with layout 'shuffled_scales', allowed N >= 1 and 0",
        ),
        ({"layout": "shuffled_scales", "rows": 32, "shift": 1}, "got 32 and 1 with layout 'shuffled_scales'"),
        (
            {"layout": "shuffled_scales", "rows": 8},
            "got 8 rows of 64, .* with layout 'shuffled_scales': it has no padd",
        ),
        (
            {"layout": "shuffled_scales", "rows": 32, "x": torch.randn(2, 256)},
            r"w_codes: got shape \(8, 32\) for 32 rows of 256, allowed \(32, 128\) with layout 'shuffled_scales'",
        ),
        (
            {"layout": "shuffled_scales", "rows": 32, "x": torch.randn(2, 256), "w_codes": torch.zeros(32, 128).byte()},
            r"w_scales: got shape \(8, 2\) .* allowed \(1, 256\)",
        ),
        ({"bias": torch.zeros(4)}, r"bias: got torch.float32 \(4,\), allowed \[8\]"),
        ({"bias": torch.zeros(8, dtype=torch.int32)}, r"bias: got torch.int32 \(8,\), allowed \[8\]"),
    ],
)
def test_operands_that_do_not_fit_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedInput, match=reason):
        _call(**changes)
    assert _call().shape == (2, 8)


# ---- x in bfloat16 summands


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_x_is_the_sum_of_its_summands(dtype: torch.dtype) -> None:
    from fusionpasses.providers import _triton_gemm

    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 65504.0, 6e-8, 1.0, 3e38, 1e-30])
    x = torch.cat((torch.randn(2000) * torch.randn(2000).exp2(), special, 1 / special)).to(dtype)
    summands = torch.empty(_triton_gemm._PIECES[dtype], 1, len(x), dtype=torch.bfloat16)
    _triton_gemm._take_apart(x, summands)
    total = summands[0].float()
    for summand in summands[1:]:
        total = total + summand.float()
    # bfloat16's least number is 2**-133.
    torch.testing.assert_close(total[0], x.float(), rtol=0, atol=2.0**-133, equal_nan=True)


# ---- addresses


@needs_triton
@pytest.mark.parametrize("tokens", [5, 20, 200])
@pytest.mark.parametrize("layout", ["linear", "tiles"])
def test_kernels_get_addresses_from_which_words_can_be_loaded(
    layout: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusionpasses.kernels import arch
    from fusionpasses.providers import _launch, _triton_gemm

    launched = []
    monkeypatch.setattr(arch, "of", lambda _: arch.Arch("sm_90", warp_size=32, processors=132))
    monkeypatch.setattr(_launch, "launch", lambda *args, **_: launched.append(args))
    keywords: dict[str, Any] = {}
    operands = weight(40, 160, 124, 130)
    if layout == "tiles":
        *operands, shift = _mxfp4_weight.prepare(*operands)
        keywords = {"layout": "tiles", "rows": 40, "shift": shift}
    x = torch.randn(tokens, 160).bfloat16()
    operands = _mxfp4.quantize(x, "even") + tuple(operands)
    # Contiguous, one element into their storage.
    x, *operands = (torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t) for t in (x, *operands))
    assert all(t.data_ptr() % 4 for t in (x, *operands))
    _triton_gemm._mxfp4_gemm(*operands, out_dtype=torch.bfloat16, **keywords)
    _triton_gemm._mxfp4_gemm_a16w4(x, *operands[2:], **keywords)
    loaded_as_words = [args[i] for args in launched for i in (2, 3, 4, 5) if isinstance(args[i], Tensor)]
    assert len(launched) >= 2
    by_byte = operands[1:4:2] if layout == "linear" else operands[1:2]  # scales of x, and of a weight as it is stored
    for t in loaded_as_words:
        assert t.data_ptr() % 4 == 0 or any(t is scales for scales in by_byte), (launched, t.shape)


@needs_triton
@pytest.mark.parametrize("name", ["sm_90", "sm_100", "gfx942", "gfx950"])
@pytest.mark.parametrize("tokens", [5, 200])
def test_kernels_get_a_shuffled_weight_in_order(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launches of the same weight as it is stored, with the same bytes."""
    from fusionpasses.kernels import arch
    from fusionpasses.providers import _launch, _triton_gemm

    launched: list[Any] = []
    monkeypatch.setattr(arch, "of", lambda _: arch.Arch(name, warp_size=32, processors=132))
    monkeypatch.setattr(_launch, "launch", lambda *args, **options: launched.append((args, options)))
    operands = weight(64, 512, 124, 130)
    x = torch.randn(tokens, 512).bfloat16()
    every = []
    for layout in ("linear", *_mxfp4_weight.SHUFFLED):
        keywords: dict[str, Any] = {} if layout == "linear" else {"layout": layout, "rows": 64}
        w = _mxfp4_weight.shuffle(*operands, layout) if keywords else operands
        launched.clear()
        _triton_gemm._mxfp4_gemm(*_mxfp4.quantize(x, "even"), *w, out_dtype=torch.bfloat16, **keywords)
        _triton_gemm._mxfp4_gemm_a16w4(x, *w, **keywords)
        every.append(list(launched))
    assert len(every[0]) >= 2
    for launches in every[1:]:
        for (args, options), (others, other_options) in zip(every[0], launches, strict=True):
            assert options == other_options
            for one, other in zip(args, others, strict=True):
                if isinstance(one, Tensor) and one.dtype == torch.uint8:
                    assert torch.equal(one, other)
                elif not isinstance(one, Tensor):
                    assert one == other


# ---- the kernels, interpreted


def emulate_tensor_core() -> None:
    """mma.m16n8k16 of bfloat16, with operands and sums where the PTX manual says that threads have them."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    from fusionpasses.kernels import mxfp4_gemm as kernels

    lane = np.arange(32)
    g, c = lane // 4, lane % 4

    def halves(words: Any) -> Any:
        bits = words.handle.data.astype(np.uint32).reshape(-1, 32)
        pair = np.stack(((bits << 16), bits & np.uint32(0xFFFF0000)), -1).astype(np.uint32)
        return pair.view(np.float32)

    def mma(a0: Any, a1: Any, a2: Any, a3: Any, b0: Any, b1: Any, sums: Any) -> Any:
        first = halves(a0)
        a = np.zeros((len(first), 16, 16), np.float32)
        b = np.zeros((len(first), 16, 8), np.float32)
        for i in range(2):
            for part, row, column in ((a0, 0, 0), (a1, 8, 0), (a2, 0, 8), (a3, 8, 8)):
                a[:, g + row, 2 * c + i + column] = halves(part)[..., i]
            for part, column in ((b0, 0), (b1, 8)):
                b[:, 2 * c + i + column, g] = halves(part)[..., i]
        with np.errstate(invalid="ignore", over="ignore"):
            product = a @ b
        new = [product[:, g + 8 * (i // 2), 2 * c + i % 2].reshape(-1) + sums[i].handle.data for i in range(4)]
        return tuple(tl.tensor(TensorHandle(n.astype(np.float32), tl.float32), sums[0].type) for n in new)

    kernels._mma = mma


class Stages:
    """Shared memory and what is on its way there, which arrives as late as the kernel allows; or at once, ``early``.

    Warps are in step here, and on no GPU: a word that another warp wrote since the last barrier must not be read, nor
    one that another read be written.
    """

    def __init__(self) -> None:
        self.words: Any = None
        self.early = False
        self.weight: tuple[Tensor, Tensor] | None = None  # nothing else is copied
        self.begun: list[Any] = []
        self.groups: list[list[Any]] = []

    def emulate(self) -> None:
        from fusionpasses.kernels import _shared_memory as memory

        memory.places, memory.commit, memory.wait = self._places, self._commit, self._wait
        memory.write16, memory.barrier = self._write, self._barrier
        memory.copy16 = lambda *args: self._copy(*args, words=4)
        memory.copy8 = lambda *args: self._copy(*args, words=2)
        memory.read16 = lambda place: self._read(place, 4)
        memory.read8 = lambda place: self._read(place, 2)

    def _places(self, thread: Any, size: Any) -> Any:
        import numpy as np

        self.words = np.full(int(getattr(size, "value", size)) // 4, 0xDEADBEEF, np.uint32)
        self.begun, self.groups = [], []
        self._barrier()
        return thread * 16

    def _barrier(self, place: Any = None) -> None:
        import numpy as np

        # The warp that has read or written a word since; -1: none.
        self.readers, self.writers = np.full((2, len(self.words)), -1)

    def _touch(self, at: Any, mine: Any, others: Any) -> None:
        import numpy as np

        warp = np.arange(len(at)) // 32
        assert ((others[at] == -1) | (others[at] == warp)).all(), "no barrier since another warp used these words"
        mine[at] = warp

    def _copy(self, place: Any, address: Any, exists: Any, words: int) -> None:
        import triton.language as tl

        assert self.weight is not None
        tensor = self.weight[0 if words == 4 else 1]
        first = address.handle.data[exists.handle.data.astype(bool)].astype("int64") - tensor.data_ptr()
        assert ((first >= 0) & (first + words * 4 <= tensor.numel())).all(), "copies what is not the weight's"
        from_ = address.to(tl.pointer_type(tl.uint32))
        for i in range(words):
            loaded = tl.load(from_ + i, mask=exists.to(tl.int32) != 0, other=0)
            self.begun.append((place.handle.data // 4 + i, loaded.handle.data.astype("uint32")))
        if self.early:
            self._arrive(self.begun)

    def _commit(self, place: Any) -> None:
        self.groups.append(self.begun)
        self.begun = []

    def _wait(self, place: Any, groups: Any) -> None:
        while len(self.groups) > int(getattr(groups, "value", groups)):
            self._arrive(self.groups.pop(0))

    def _arrive(self, copies: list[Any]) -> None:
        while copies:
            at, data = copies.pop(0)
            self._touch(at, self.writers, self.readers)
            self.words[at] = data

    def _write(self, place: Any, values: Any) -> None:
        assert not self.groups, "copies on their way may arrive on top of what is written"
        for i, value in enumerate(values):
            at = place.handle.data // 4 + i
            self._touch(at, self.writers, self.readers)
            self.words[at] = value.handle.data.view("uint32")

    def _read(self, place: Any, words: int) -> tuple[Any, ...]:
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        kind = tl.block_type(tl.uint32, place.shape)
        places = [place.handle.data // 4 + i for i in range(words)]
        for at in places:
            self._touch(at, self.readers, self.writers)
        data = [self.words[at] for at in places]
        return tuple(tl.tensor(TensorHandle(d, tl.uint32), kind) for d in data)


def check_products() -> None:
    """Layouts, tails of rows, columns and tokens, x as it is and in order, codes for x, bias: sums that are exact."""
    triton_interpreter.cast_bfloat16_as_gpus_do()
    emulate_tensor_core()
    stages_emulated = Stages()
    stages_emulated.emulate()
    from fusionpasses.kernels import mxfp4_gemm as kernels
    from fusionpasses.kernels.arch import PLAIN

    for seed in range(20):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        rows, width, tokens = rng.choice((1, 16, 33, 64)), 32 * rng.choice((1, 3, 8, 13)), rng.choice((1, 5, 9, 17))
        row_tiles, k_warps = rng.choice((1, 2, 3)), rng.choice((1, 2, 4))
        token_tiles, split, stages = rng.choice((1, 2, 4)), rng.choice((1, 1, 2, 3)), 0
        codes, scales = weight(rows, width, 124, 131)
        if seed % 4 == 2:  # infinite, in the last block, which is loaded for those that are not there
            codes[0, -1], scales[0, -1] = 0x77, 254
        want_w = _mxfp4.dequantize(codes, scales)
        layout, shift = kernels.LINEAR, 0
        if seed % 2:
            codes, scales, shift = _mxfp4_weight.prepare(codes, scales)
            layout, stages = kernels.TILES, rng.choice((0, 1, 2, 3, 4))
        stages_emulated.early, stages_emulated.weight = seed % 4 == 1, (codes, scales)
        # Sums of small integers are exact in any order.
        x, x_scales = torch.randint(-3, 4, (tokens, width)).bfloat16(), None
        values = x.float()
        if seed % 3 == 0:
            x, x_scales = _mxfp4.quantize(values, "even")
            values = _mxfp4.dequantize(x, x_scales)
        stride: int | None = x.stride(0)
        if rng.random() < 0.5:
            columns = -(-width // 128)
            arranged = torch.full((-(-tokens // 8) * columns * 1024,), torch.nan).bfloat16()
            kernels.mxfp4_gemm_arrange[(columns, -(-tokens // 8))](
                x,
                x_scales,
                arranged,
                tokens,
                stride,
                None if x_scales is None else x_scales.stride(0),
                K=width,
                LAYOUT=layout,
                WARPS=1,
                ISA=PLAIN,
            )
            x, x_scales, stride = arranged, None, None
        bias = torch.randint(-9, 9, (rows,)).float() if seed % 4 else None
        out = torch.full((split, tokens, rows), torch.nan)
        grid = (-(-tokens // (8 * token_tiles)), -(-rows // (16 * row_tiles)), split)
        kernels.mxfp4_gemm[grid](
            x,
            x_scales,
            codes,
            scales,
            bias if split == 1 else None,
            out,
            tokens,
            rows,
            stride,
            2.0**shift,
            K=width,
            LAYOUT=layout,
            ROW_TILES=row_tiles,
            TOKEN_TILES=token_tiles,
            K_WARPS=k_warps,
            STAGES=stages,
            SPLIT=split,
            ISA=PLAIN,
        )
        want = values @ want_w.T + (0 if bias is None or split > 1 else bias)
        got = out.sum(0)
        same = (got == want) | (got.isnan() & want.isnan())
        assert same.all(), f"seed {seed}: {int((~same).sum())} of {got.numel()} differ"


def check_values() -> None:
    """Every code with every scale byte, in both layouts, as bfloat16."""
    triton_interpreter.cast_bfloat16_as_gpus_do()
    from fusionpasses.kernels import mxfp4_dequantize as kernels
    from fusionpasses.kernels.arch import PLAIN

    every = torch.arange(256, dtype=torch.uint8)
    for low, high in ((0, 256), (0, 129), (123, 130), (245, 255)):
        scales = every[low:high].view(-1, 1)
        codes = every.view(16, 16)[torch.arange(len(scales)) % 16]
        layouts = [(kernels.LINEAR, codes, scales, 0)]
        if high - low < 20 or high == 129:
            layouts.append((kernels.TILES, *_mxfp4_weight.prepare(codes, scales)))
        for layout, w_codes, w_scales, shift in layouts:
            out = torch.full((len(scales), 32), 7.0).bfloat16()
            kernels.mxfp4_dequantize[(-(-w_codes.numel() // 512),)](
                w_codes,
                w_scales,
                out,
                w_codes.numel() // 4,
                len(scales),
                shift,
                K=32,
                LAYOUT=layout,
                UNROLLED=1,
                LANES=128,
                ISA=PLAIN,
            )
            want = _mxfp4.dequantize(codes, scales).bfloat16()
            torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(out.signbit() | out.isnan(), want.signbit() | want.isnan())


GROUPS = {"products": check_products, "values": check_values}


@needs_triton
@pytest.mark.parametrize("group", GROUPS)
def test_interpreted(group: str) -> None:
    triton_interpreter.run(__file__, group)


# ---- on a GPU

gpu = [pytest.mark.gpu, compiled, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def _operands(seed: int) -> tuple[str, tuple[Any, ...], dict[str, Any], Tensor, Tensor, Tensor | None]:
    """A random call on a GPU, and the values that it multiplies."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rows, width = rng.choice((1, 40, 576, 2112)), 32 * rng.choice((1, 5, 64, 90))
    tokens = rng.choice((1, 3, 8, 9, 16, 17, 32, 33, 64, 65, 200))
    codes, scales = weight(rows, width, *rng.choice(((118, 126), (125, 132))), "cuda")
    w = _mxfp4.dequantize(codes, scales)
    keywords: dict[str, Any] = {}
    if seed % 2:
        codes, scales, shift = _mxfp4_weight.prepare(codes, scales)
        keywords = {"layout": "tiles", "rows": rows, "shift": shift}
    dtype = (torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)[seed // 4 % 4]
    bias = torch.randn(rows, device="cuda").to(rng.choice((dtype, torch.float32))) if seed % 3 == 0 else None
    x = torch.randn(tokens, width + 64 * (seed % 5 == 0), device="cuda").to(dtype)[:, :width]
    if seed % 4 == 1:
        x = x.unflatten(0, (1, tokens))
    if seed % 8 < 4:
        return W4A16, (x, codes, scales, bias), keywords, x.flatten(0, -2), w, bias
    x_codes, x_scales = _mxfp4.quantize(x, "even")
    values = _mxfp4.dequantize(x_codes, x_scales).flatten(0, -2)
    return W4A4, (x_codes, x_scales, codes, scales, bias), keywords | {"out_dtype": dtype}, values, w, bias


@pytest.mark.parametrize("part", [pytest.param(part, marks=gpu) for part in range(4)])
def test_gpu_sums_are_within_the_bound_and_the_same_every_time(part: int) -> None:
    for seed in range(part, 160, 4):
        name, args, keywords, x, w, bias = _operands(seed)
        call = OPS[name].overload
        got = call(*args, **keywords, provider="triton")
        assert torch.equal(got, call(*args, **keywords, provider="triton")), f"seed {seed}: other bytes"
        exact = x.double() @ w.double().T
        magnitude = x.double().abs() @ w.double().abs().T
        if bias is not None:
            exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
        bound = w.shape[1] * 2.0**-24 * magnitude + torch.finfo(got.dtype).eps / 2 * exact.abs() * 1.01 + 1e-30
        if got.dtype == torch.float16:
            bound = bound + 2.0**-25  # its subnormal numbers
        off = (got.flatten(0, -2).double() - exact).abs() / bound
        assert off.max() <= 1, (
            f"seed {seed}: {name} {tuple(x.shape)} x {tuple(w.shape)}: {float(off.max())} of the bound"
        )


@pytest.mark.parametrize("tokens", [pytest.param(tokens, marks=gpu) for tokens in (1, 16, 64, 4096)])
def test_gpu_no_copy_of_a_weight_outlives_the_call(tokens: int) -> None:
    rows, width = 4096, 4096
    codes, scales = weight(rows, width, 118, 126, "cuda")
    x = torch.randn(tokens, width, device="cuda").bfloat16()
    for _ in range(2):  # a full call, then a replayed one
        out = ours.mxfp4_gemm_a16w4(x, codes, scales, provider="triton")
    torch.cuda.synchronize()
    del out
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = ours.mxfp4_gemm_a16w4(x, codes, scales, provider="triton")
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before <= out.numel() * 2 + 4096
    # Up to 64 tokens, programs that cut K have float32 sums of their own.
    scratch = rows * width * 2 if tokens > 64 else 8 * out.numel() * 4 + 2 * x.numel() * 2 + 2**20
    assert torch.cuda.max_memory_allocated() - before <= scratch + out.numel() * 2 + 4096


@pytest.mark.parametrize("layout", _mxfp4_weight.SHUFFLED)
@pytest.mark.parametrize("tokens", [pytest.param(tokens, marks=gpu) for tokens in (1, 16, 200)])
def test_gpu_a_shuffled_weight_gives_the_bytes_of_the_weight_as_stored(tokens: int, layout: str) -> None:
    codes, scales = weight(576, 2048, 118, 126, "cuda")
    shuffled = _mxfp4_weight.shuffle(codes, scales, layout)
    for _ in range(3):  # full calls, then replayed ones
        x = torch.randn(tokens, 2048, device="cuda").bfloat16()
        want = ours.mxfp4_gemm_a16w4(x, codes, scales, provider="triton")
        got = ours.mxfp4_gemm_a16w4(x, *shuffled, layout=layout, rows=576, provider="triton")
        assert torch.equal(got, want)


@pytest.mark.parametrize("tokens", [pytest.param(tokens, marks=gpu) for tokens in (1, 16, 200)])
def test_gpu_calls_can_be_captured(tokens: int) -> None:
    codes, scales = weight(576, 2048, 118, 126, "cuda")
    prepared, exponents, shift = _mxfp4_weight.prepare(codes, scales)
    x = torch.randn(tokens, 2048, device="cuda").bfloat16()

    def call() -> Tensor:
        keywords = {"layout": "tiles", "rows": 576, "shift": shift}
        result: Tensor = ours.mxfp4_gemm_a16w4(x, prepared, exponents, **keywords, provider="triton")
        return result

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(got, call())


if __name__ == "__main__":
    with triton_interpreter.without_needless_work():
        GROUPS[sys.argv[1]]()
