"""The product by Hopper's asynchronous tensor cores: emulated anywhere, compiled on a Hopper GPU."""

from __future__ import annotations

import os
import random
import sys
from typing import Any

import pytest
import torch
import triton_interpreter
from torch import Tensor

from fusionpasses.kernels.arch import Arch
from fusionpasses.ops import OPS, _mxfp4, _mxfp4_weight
from fusionpasses.probes import probe_triton

needs_triton = pytest.mark.skipif(not probe_triton(), reason=probe_triton().why)
compiled = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs compiled kernels")

H200 = Arch("sm_90", warp_size=32, processors=132)
#: What shared memory holds until something is copied there: NaN as x; as a weight, whose factors are then Inf, too.
_NOTHING = 0xFFFFFFFF


def weight(rows: int, width: int, low: int, high: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Random codes, scale bytes from low to high - 1."""
    codes = torch.randint(0, 256, (rows, width // 2), dtype=torch.uint8, device=device)
    return codes, torch.randint(low, high, (rows, width // 32), dtype=torch.uint8, device=device)


# ---- which kernel it is


@needs_triton
@pytest.mark.parametrize(
    ("rows", "width", "least", "weight_only", "most"),
    [
        (8192, 1024, None, None, 0),  # small
        (1536, 7168, None, None, 0),
        (7168, 2048, 17, 65, 128),
        (4096, 4096, 17, 65, 128),
        (2112, 7168, 33, None, 48),  # few and long rows
        (6144, 4096, 9, 17, 128),
        (4608, 7168, 9, 17, 128),
        (24576, 1536, 17, 17, 256),  # short rows
        (14336, 4096, 1, 1, 256),
        (18432, 7168, 9, 9, 640),
        (36864, 7168, 9, 9, 640),
        (7168, 18432, 1, 1, 640),  # long rows
    ],
)
def test_it_is_chosen_where_it_is_faster(
    rows: int, width: int, least: int | None, weight_only: int | None, most: int
) -> None:
    from fusionpasses.kernels.gemm_choice import choose

    for w4a4, first in ((True, least), (False, weight_only)):
        chosen = [
            choose(tokens, rows, width, H200, w4a4=w4a4, layout="tiles").kernel == "mxfp4_gemm_wgmma"
            for tokens in range(1, 700)
        ]
        assert chosen == [first is not None and first <= tokens <= most for tokens in range(1, 700)]
    for arch, layout in ((H200, "linear"), (Arch("sm_100", 32, 132), "tiles")):
        assert choose(32, rows, width, arch, layout=layout).kernel != "mxfp4_gemm_wgmma"


@needs_triton
@pytest.mark.parametrize("tokens", [1, 16, 17, 32, 33, 64, 65, 100, 128, 129, 200, 256, 600, 640])
def test_shared_memory_and_programs_suffice(tokens: int) -> None:
    from fusionpasses.kernels import _warpgroup, mxfp4_gemm_wgmma

    options = mxfp4_gemm_wgmma.launch_options(tokens, 18432, 7168, H200)
    tiles, columns = options["TOKEN_TILES"], options["UNROLLED"]
    assert columns * (tiles * 2048 + options["WARPGROUPS"] * 128 * 40 + 8) <= _warpgroup.MOST_SPACE
    assert 8 * tiles * -(-tokens // mxfp4_gemm_wgmma.MOST_TOKENS) >= tokens
    assert options["PROGRAMS"] <= 288 * -(-tokens // 64) * 28
    # All at once: registers of a multiprocessor, and its shared memory.
    programs = options["PROGRAMS"] / 132
    assert programs * options["num_warps"] * 32 * options["maxnreg"] <= 65536
    assert programs * columns * (tiles * 2048 + options["WARPGROUPS"] * 128 * 40 + 8) <= 227 * 1024


@needs_triton
@pytest.mark.parametrize(
    ("tokens", "rows", "width", "programs"),
    [
        (64, 24576, 1536, 384),  # three tiles for each multiprocessor, but for twelve of them
        (16, 24576, 1536, 384),
        (32, 24576, 1536, 384),
        (32, 65536, 1536, 2 * 132),  # of 128 rows each: four and a half
        (128, 24576, 1536, 2 * 132),
        (128, 4608, 7168, 4 * 132),  # of 64 rows each
        (64, 24576, 2176, 4 * 132),  # long tiles
        (64, 18432, 2048, 4 * 132),  # three for some, two for others
        (64, 16384, 2048, 4 * 132),  # two, and registers suffice for four
    ],
)
def test_a_program_has_a_tile_where_that_is_an_even_share(tokens: int, rows: int, width: int, programs: int) -> None:
    from fusionpasses.kernels import mxfp4_gemm_wgmma

    assert mxfp4_gemm_wgmma.launch_options(tokens, rows, width, H200)["PROGRAMS"] == programs


# ---- interpreted


class Warpgroups:
    """Shared memory, copies that arrive as late as they may or at once, and products under way as long as they may.

    What is copied to must have been read by no product since the last barrier, nor by one that may be under way; what
    a product reads must have arrived; sums must not be read before ``finish``; a program must not end before copies do.
    What a program leaves for another is there once all its threads have written it and then its flag was released, and
    is seen by threads that have met after the flag was acquired.
    """

    def __init__(self) -> None:
        self.early = False
        self.sources: tuple[Tensor, ...] = ()
        self.fetched: dict[int, list[Any]] = {}
        self.exist: list[bool] = []  # of all that is copied by copy_tile
        self.waited = 0
        self.flags = self.partial = torch.empty(0)
        self.left: dict[int, Tensor] = {}
        self.acquired: list[int] = []
        self.written = False  # since all threads have met

    def emulate(self) -> None:
        from fusionpasses.kernels import _pieces, _warpgroup

        for name in (
            "space",
            "barriers",
            "fetch",
            "arrived",
            "read_once",
            "copy_tile",
            "read_tile",
            "afresh",
            "raised",
            "barrier",
            "multiply",
            "finish",
            "put",
            "take",
        ):
            setattr(_warpgroup, name, getattr(self, name))

        _pieces.multiply_word = _multiply_word
        self._emulate_flags()

    def _emulate_flags(self) -> None:
        from triton._C.libtriton.ir import MEM_SEMANTIC
        from triton.runtime.interpreter import InterpreterBuilder

        change, store = InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_masked_store

        def atomic(builder: Any, op: Any, pointer: Any, value: Any, mask: Any, order: Any, scope: Any) -> Any:
            before = change(builder, op, pointer, value, mask, order, scope)
            program = (int(pointer.data.reshape(-1)[0]) - self.flags.data_ptr()) // 4
            assert value.data.all()
            assert order == MEM_SEMANTIC.RELEASE
            assert not self.written, "a flag before what it stands for"
            self.left[program] = self.partial[program].clone()
            self.partial[program] = torch.nan
            return before

        def masked_store(builder: Any, *args: Any) -> Any:
            self.written = True
            return store(builder, *args)

        InterpreterBuilder.create_atomic_rmw = atomic
        InterpreterBuilder.create_masked_store = masked_store
        InterpreterBuilder.create_barrier = lambda builder: self._meet()

    def _meet(self) -> None:
        """All threads of a program, which see then what one of them has acquired."""
        self.written = False
        for program in self.acquired:
            self.partial[program] = self.left[program]
        self.acquired = []

    def afresh(self, thread: Any) -> Any:
        return thread

    def raised(self, wanted: Any, address: Any) -> None:
        for at in address.handle.data[wanted.handle.data != 0]:
            program = (int(at) - self.flags.data_ptr()) // 4
            assert int(self.flags[program]) == 1, "waits for a program that has not been started"
            self.acquired.append(program)

    def space(self, thread: Any, size: Any) -> None:
        import numpy as np

        self.end()
        self.threads = len(thread.handle.data)
        self.words = np.full(_int(size) // 4, _NOTHING, np.uint32)
        self.phases: dict[int, int] = {}
        self.copied: list[Any] = []
        self.exist, self.waited = [], 0
        self.under_way: list[range] = []
        self.read: list[range] = []
        self.sums: Any = None
        self.put_at: set[int] = set()  # what threads have put and taken since they met
        self.taken: set[int] = set()

    def end(self) -> None:
        """Of a program."""
        assert not self.fetched, "x that nobody waits for"
        assert not any(self.exist[self.waited :]), "a part of the weight that nobody waits for"

    def barriers(self, thread: Any, at: Any, count: Any) -> None:
        assert _int(at) % 8 == 0
        assert _int(at) + 8 * _int(count) <= 4 * len(self.words)
        self.new = {_int(at) + 8 * i: 0 for i in range(_int(count))}

    def barrier(self, thread: Any) -> None:
        self._meet()
        self.phases |= self.new
        self.new = {}
        self.read = []
        self.put_at, self.taken = set(), set()

    def fetch(self, wanted: Any, address: Any, at: Any, barrier: Any, size: Any) -> None:
        at, barrier, size = _int(at), _int(barrier), _int(size)
        warps = int(wanted.handle.data.reshape(-1, 32).any(1).sum())
        if warps == 0:
            return
        assert warps == 1, "several copies for one"
        place = range(at, at + size)
        assert all(not set(place) & set(used) for used in self.under_way + self.read), "x that is still read"
        assert barrier in self.phases
        assert barrier not in self.fetched, "an mbarrier for two copies"
        first = address.handle.data.reshape(-1)[:1]
        assert first[0] % 16 == 0
        self.fetched[barrier] = [place, self._from(first, size)[0]]
        if self.early:
            self._arrive(barrier)

    def _from(self, firsts: Any, size: int) -> Any:
        """The words at some addresses."""
        import numpy as np

        for tensor in self.sources:
            begins = firsts - tensor.data_ptr()
            if ((begins >= 0) & (begins + size <= tensor.nbytes)).all():
                words = tensor.view(torch.int32).reshape(-1).numpy().view(np.uint32)
                return words[begins[:, None] // 4 + np.arange(size // 4)]
        raise AssertionError("copies what is no operand's")

    def _arrive(self, barrier: int) -> None:
        place, data = self.fetched[barrier]
        if data is not None:
            self.words[place.start // 4 : place.stop // 4] = data
            self.fetched[barrier][1] = None
            self.phases[barrier] += 1

    def arrived(self, parity: Any, barrier: Any) -> None:
        barrier = _int(barrier)
        if barrier in self.fetched:
            self._arrive(barrier)
            del self.fetched[barrier]
        assert self.phases[barrier] % 2 != int(parity.handle.data.reshape(-1)[0]), "waits for ever"

    def read_once(self, thread: Any) -> str:
        return "first to be dropped"

    def copy_tile(
        self, thread: Any, codes: Any, scales: Any, exists: Any, policy: Any, at: Any, threads: Any, zeros: Any
    ) -> None:
        import numpy as np

        assert policy == "first to be dropped"

        at, threads = _int(at), _int(threads)
        words = np.zeros((self.threads, 10), np.uint32)
        there = np.broadcast_to(exists.handle.data.astype(bool), (self.threads,))
        if there.any():
            code, scale = codes.handle.data[there], scales.handle.data[there]
            words[there] = np.hstack((self._from(code, 16), self._from(code + 512, 16), self._from(scale, 8)))
        lanes = np.arange(threads)
        places = [at // 4 + 4 * lanes + i for i in range(4)]
        places += [at // 4 + 4 * threads + 4 * lanes + i for i in range(4)]
        places += [at // 4 + 8 * threads + 2 * lanes + i for i in range(2)]
        if not _int(zeros):  # nothing is written where nothing exists
            places = [place[there] for place in places]
            words = words[there]
        self.copied.append((places, words))
        self.exist.append(bool(there.any()))
        if self.early:
            self._land(len(self.copied) - 1)

    def _land(self, i: int) -> None:
        if self.copied[i] is not None:
            for place, data in zip(self.copied[i][0], self.copied[i][1].T, strict=True):
                self.words[place] = data
            self.copied[i] = None

    def read_tile(self, thread: Any, at: Any, threads: Any, left: Any) -> Any:
        import numpy as np
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        at, threads = _int(at), _int(threads)
        self.waited = len(self.copied) - _int(left)
        for i in range(self.waited):
            self._land(i)
        lanes = np.arange(threads)
        places = [at // 4 + 4 * lanes + i for i in range(4)]
        places += [at // 4 + 4 * threads + 4 * lanes + i for i in range(4)]
        places += [at // 4 + 8 * threads + 2 * lanes + i for i in range(2)]
        kind = tl.block_type(tl.uint32, [self.threads])
        words = tuple(tl.tensor(TensorHandle(self.words[place], tl.uint32), kind) for place in places)
        for place in places:  # so that what is read twice is noticed
            self.words[place] = _NOTHING
        return words

    def put(self, offset: Any, bits: Any, at: Any) -> None:
        import numpy as np

        places = _int(at) + offset.handle.data
        assert (places % 2 == 0).all()
        assert len(set(places)) == self.threads, "two numbers in one place"
        assert not self.taken & set(places // 16), "a number over one that is taken"
        self.put_at |= set(places // 16)
        self.words.view(np.uint16)[places // 2] = bits.handle.data.astype(np.uint16)

    def take(self, offset: Any, at: Any) -> Any:
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        places = _int(at) + offset.handle.data
        assert (places % 16 == 0).all()
        assert not self.put_at & set(places // 16), "taken before all threads have put theirs"
        self.taken |= set(places // 16)
        kind = tl.block_type(tl.uint32, [self.threads])
        return tuple(tl.tensor(TensorHandle(self.words[places // 4 + i], tl.uint32), kind) for i in range(4))

    def multiply(self, sums: Any, low: Any, high: Any, tiles: Any, at: Any, behind: Any) -> Any:
        import numpy as np

        tiles, at, behind = _int(tiles), _int(at), _int(behind)
        lane = np.arange(32)
        g, c = lane // 4, lane % 4
        before = self._true(sums)
        total = [before[i].copy() for i in range(4 * tiles)]
        for half in range(2):
            a = np.zeros((self.threads // 32, 16, 16), np.float32)
            for j, (part, row) in enumerate(((low, 0), (high, 8), (low, 0), (high, 8))):
                pair = _bfloat16s(part[2 * half + j // 2].handle.data).reshape(-1, 32, 2)
                for i in range(2):
                    a[:, g + row, 2 * c + i + 8 * (j // 2)] = pair[..., i]
            for n in range(tiles):
                b = np.zeros((16, 8), np.float32)
                for k in range(2):
                    start = (at + half * tiles * 256 + k * tiles * 128 + n * 128) // 4
                    b[8 * k : 8 * k + 8] = _bfloat16s(self.words[start : start + 32]).reshape(8, 8).T
                with np.errstate(invalid="ignore", over="ignore"):
                    product = a @ b
                for i in range(4):
                    total[4 * n + i] += product[:, g + 8 * (i // 2), 2 * c + i % 2].reshape(-1)
        self.under_way.append(range(at, at + tiles * 512))
        while len(self.under_way) > behind:
            self.read.append(self.under_way.pop(0))
        return self._hidden(total)

    def _true(self, sums: Any) -> Any:
        if self.sums is not None and sums[0] is self.sums[0][0]:
            return self.sums[1]
        return [s.handle.data for s in sums]

    def _hidden(self, total: Any) -> Any:
        import numpy as np
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        kind = tl.block_type(tl.float32, [self.threads])
        shown = tuple(tl.tensor(TensorHandle(np.full_like(t, np.nan), tl.float32), kind) for t in total)
        self.sums = shown, total
        return shown

    def finish(self, sums: Any, tiles: Any) -> Any:
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        self.read += self.under_way
        self.under_way = []
        kind = tl.block_type(tl.float32, [self.threads])
        return tuple(tl.tensor(TensorHandle(t, tl.float32), kind) for t in self._true(sums))


def _int(value: Any) -> int:
    return int(getattr(value, "value", value))


def _bfloat16s(words: Any) -> Any:
    import numpy as np

    bits = words.astype(np.uint32)
    return np.stack((bits << 16, bits & np.uint32(0xFFFF0000)), -1).astype(np.uint32).view(np.float32)


def _multiply_word(word: Any, factor: Any, *_: Any) -> Any:
    """The pairs' products, which are exact: Triton's interpreter takes the plain form most of the test's time."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    with np.errstate(invalid="ignore", over="ignore"):
        products = _bfloat16s(word.handle.data) * _bfloat16s(
            np.broadcast_to(factor.handle.data, word.handle.data.shape)
        )
    bits = products.astype(np.float32).view(np.uint32)
    assert (bits & 0xFFFF == 0).all()
    packed = (bits[..., 0] >> 16) | (bits[..., 1] & np.uint32(0xFFFF0000))
    return tl.tensor(TensorHandle(packed.astype(np.uint32), tl.uint32), word.type)


def check_products() -> None:
    """Tails of rows, columns and tokens, groups of tokens, shares of programs, codes for x, bias: sums are exact."""
    triton_interpreter.cast_bfloat16_as_gpus_do()
    emulated = Warpgroups()
    emulated.emulate()
    from fusionpasses.kernels import mxfp4_gemm_wgmma as kernels
    from fusionpasses.kernels.arch import PLAIN
    from fusionpasses.providers import _triton_gemm_wgmma

    for seed in range(16):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        rows, width = rng.choice((1, 16, 70, 200)), 32 * rng.choice((1, 4, 13, 20, 29))
        tokens, warpgroups = rng.choice((1, 9, 20, 33)), rng.choice((1, 1, 2))
        (unrolled, pieces), token_tiles = rng.choice(((2, 1), (3, 1), (1, 2), (2, 2), (1, 4))), rng.choice((1, 2, 3))
        codes, scales = weight(rows, width, 124, 131)
        want_w = _mxfp4.dequantize(codes, scales)
        w, exponents, shift = _mxfp4_weight.prepare(codes, scales)
        # Sums of small integers are exact in any order.
        x, x_scales = torch.randint(-3, 4, (tokens, width)).bfloat16(), None
        if seed % 4 == 2 and seed % 3:  # next to what is not there
            x[-1, -1] = torch.inf
        values = x.float()
        if seed % 3 == 0:
            x, x_scales = _mxfp4.quantize(values, "even")
            values = _mxfp4.dequantize(x, x_scales)
        groups, units = -(-tokens // (8 * token_tiles)), -(-width // (128 * unrolled))
        steps = -(-rows // (64 * warpgroups)) * groups * units
        programs = rng.choice((1, steps, rng.randint(1, steps), rng.randint(1, steps)))
        columns = units * unrolled
        in_order = torch.full((groups, columns, token_tiles * 1024), torch.nan).bfloat16()
        more = programs + rng.choice((0, 700))
        flags = torch.full((more + 9,), 7, dtype=torch.int32)
        kernels.mxfp4_gemm_interleave[(-(-columns // 2), groups * token_tiles)](
            x,
            x_scales,
            in_order,
            flags,
            tokens,
            more,
            x.stride(0),
            None if x_scales is None else x_scales.stride(0),
            K=width,
            COLUMNS=columns,
            TOKEN_TILES=token_tiles,
            WARPS=2,
            ISA=PLAIN,
        )
        assert not flags[:more].any()
        assert (flags[more:] == 7).all()
        assert not in_order.isnan().any(), f"seed {seed}: places of x that nothing was written to"
        bias = torch.randint(-9, 9, (rows,)).float() if seed % 2 else None
        out = torch.full((tokens, rows), torch.nan)
        partial = torch.full((programs, 4 * token_tiles, 128 * warpgroups), torch.nan)
        emulated.early, emulated.sources = seed % 4 == 1, (in_order, w, exponents)
        emulated.flags, emulated.partial = flags, partial
        kernels.mxfp4_gemm_wgmma[(programs,)](
            in_order,
            w,
            exponents,
            bias,
            out,
            partial,
            flags,
            tokens,
            rows,
            groups,
            *divmod(steps, programs),
            programs,
            2.0**shift,
            K=width,
            TOKEN_TILES=token_tiles,
            WARPGROUPS=warpgroups,
            UNROLLED=unrolled,
            PIECES=pieces,
            ISA=PLAIN,
            **_triton_gemm_wgmma.NOT_GATED,
        )
        emulated.end()
        _check_same(out, values @ want_w.T + (0 if bias is None else bias), f"seed {seed}")


def _check_same(out: Tensor, want: Tensor, what: str) -> None:
    same = (out == want) | (out.isnan() & want.isnan())
    assert same.all(), f"{what}: {int((~same).sum())} of {out.numel()} differ"


def check_adapter() -> None:
    """Sizes, strides and memory that the provider gives the kernels, with the options that are chosen for them."""
    triton_interpreter.cast_bfloat16_as_gpus_do()
    emulated = Warpgroups()
    emulated.emulate()
    from fusionpasses.kernels import mxfp4_gemm_wgmma as kernels
    from fusionpasses.kernels.arch import INTERPRETED
    from fusionpasses.providers import _launch, _triton_gemm_wgmma
    from fusionpasses.providers._product import Product

    def scratch(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        memory = torch.full(shape, 7 if dtype == torch.int32 else torch.nan, dtype=dtype)
        emulated.sources = (*emulated.sources, memory)
        emulated.flags = memory if dtype == torch.int32 else emulated.flags
        emulated.partial = memory if dtype == torch.float32 else emulated.partial
        return memory

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        kernel[grid](*args, **{name: value for name, value in constants.items() if name in kernel.arg_names})

    _launch.scratch, _launch.launch = scratch, launch
    for tokens, rows, width, packed in ((17, 90, 288, False), (70, 70, 160, True)):
        codes, scales = weight(rows, width, 124, 131)
        w, exponents, shift = _mxfp4_weight.prepare(codes, scales)
        x, x_scales = torch.randint(-3, 4, (tokens, width + 64)).bfloat16()[:, :width], None
        values = x.float()
        if packed:
            x, x_scales = _mxfp4.quantize(values, "even")
            values = _mxfp4.dequantize(x, x_scales)
        emulated.sources = w, exponents
        options = kernels.launch_options(tokens, rows, width, INTERPRETED)
        bias, out = torch.randint(-9, 9, (rows,)).float(), torch.full((tokens, rows), torch.nan)
        sizes = tokens, rows, width, "tiles", shift, INTERPRETED
        _triton_gemm_wgmma.multiply(Product(x, x_scales, w, exponents, bias, out, *sizes), options)
        emulated.end()
        _check_same(out, values @ _mxfp4.dequantize(codes, scales).T + bias, f"{tokens} tokens")


def check_gated() -> None:
    """Gate times up, quantised where they were summed, is what silu_mul_mxfp4_quant makes of them, to the byte."""
    triton_interpreter.cast_bfloat16_as_gpus_do()
    from fusionpasses.kernels import _pieces

    plain = _pieces.multiply_word
    emulated = Warpgroups()
    emulated.emulate()
    _pieces.multiply_word = plain  # products of activations are not exact
    from fusionpasses.kernels import mxfp4_gemm_wgmma as kernels
    from fusionpasses.kernels.arch import INTERPRETED
    from fusionpasses.providers import _destination, _launch, _triton_gemm_wgmma, triton
    from fusionpasses.providers._product import Product

    def scratch(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        memory = torch.full(shape, 7 if dtype == torch.int32 else torch.nan, dtype=dtype)
        if dtype == torch.float32:
            emulated.partial = memory
        return memory

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        kernel[grid](*args, **{name: value for name, value in constants.items() if name in kernel.arg_names})

    _launch.scratch, _launch.launch = scratch, launch
    contracts = ("silu", "cast_mul"), ("silu", "mul_cast"), ("gelu_tanh", "cast_mul"), ("x_sigmoid", "cast_each")
    for seed, tokens in enumerate((1, 5, 9, 16, 17, 23, 25, 32)):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        inner, width = 128 * rng.choice((1, 2, 3)), 256 * rng.choice((1, 2))
        activation, cast_order = contracts[seed % 4]
        mode = rng.choice(("even", "floor"))
        codes, scales = weight(2 * inner, width, 120, 126)
        w, exponents, shift = _mxfp4_weight.prepare(codes, scales)
        x = torch.randn(tokens, width).bfloat16()
        options = kernels.launch_options(tokens, 2 * inner, width, INTERPRETED)
        tiles = -(-2 * inner // (64 * options["WARPGROUPS"])) * (width // (128 * options["UNROLLED"]))
        options["PROGRAMS"] = rng.choice((1, tiles, rng.randint(1, tiles)))
        ordered = _triton_gemm_wgmma.destination(x, tokens, width, options)
        sizes = tokens, 2 * inner, width, "tiles", shift, INTERPRETED
        _triton_gemm_wgmma._interleave(Product(x, None, w, exponents, None, x, *sizes), ordered)
        emulated.sources, emulated.flags = (ordered.codes, w, exponents), ordered.scales
        both = torch.full((tokens, 2 * inner), torch.nan).bfloat16()
        _triton_gemm_wgmma.multiply(Product(x, None, w, exponents, None, both, *sizes, ordered), options)
        emulated.end()

        next_tiles = rng.choice((0, options["TOKEN_TILES"], 1))
        shape = -(-tokens // (8 * max(next_tiles, 1))), inner // 128, 1024 * max(next_tiles, 1)
        flags = [torch.full((300,), 7, dtype=torch.int32) if next_tiles else None for _ in range(2)]
        want, got = (
            _destination.Destination(torch.full(shape, torch.nan).bfloat16(), each, next_tiles) for each in flags
        )
        triton._silu_mul_mxfp4_quant(
            *both.chunk(2, -1), activation=activation, cast_order=cast_order, scale_mode=mode, into=want
        )
        ordered.scales.zero_()
        gated = _triton_gemm_wgmma.Gated(got, activation, cast_order, mode)
        product = Product(ordered.codes, None, w, exponents, None, got.codes, *sizes, ordered)
        _triton_gemm_wgmma.multiply(product, options, gated)
        emulated.end()
        what = f"{tokens} tokens, {inner} x {width}, {activation}, {cast_order}, {next_tiles}"
        assert torch.equal(got.codes.view(torch.int16), want.codes.view(torch.int16)), what
        assert bool(want.codes.isnan().any()) == (tokens % (8 * max(next_tiles, 1)) != 0), what
        assert got.scales is None or not got.scales.any(), what


GROUPS = {"products": check_products, "adapter": check_adapter, "gated": check_gated}


@needs_triton
@pytest.mark.parametrize("group", GROUPS)
def test_interpreted(group: str) -> None:
    triton_interpreter.run(__file__, group)


# ---- on a GPU


def _is_hopper() -> bool:
    return torch.version.hip is None and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


gpu = [pytest.mark.gpu, compiled, pytest.mark.skipif(not _is_hopper(), reason="no Hopper GPU")]


def _check(got: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, seed: int) -> None:
    exact, magnitude = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    bound = w.shape[1] * 2.0**-24 * magnitude + torch.finfo(got.dtype).eps / 2 * exact.abs() * 1.01 + 1e-30
    off = (got.double() - exact).abs() / bound
    assert off.max() <= 1, f"seed {seed}: {tuple(x.shape)} x {tuple(w.shape)}: {float(off.max())} of the bound"


@pytest.mark.parametrize("part", [pytest.param(part, marks=gpu) for part in range(4)])
def test_gpu_sums_of_any_size_are_within_the_bound_and_the_same_every_time(part: int) -> None:
    from fusionpasses.providers import _triton_gemm_wgmma
    from fusionpasses.providers._product import Product

    for seed in range(part, 80, 4):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        rows, width = rng.choice((1, 40, 576, 2112)), 32 * rng.choice((1, 5, 64, 90, 224))
        tokens, token_tiles = rng.choice((1, 8, 17, 33, 64, 65, 128, 200)), rng.choice((1, 2, 3, 4, 6, 8, 12, 16))
        codes, scales = weight(rows, width, *rng.choice(((118, 126), (125, 132))), "cuda")
        w = _mxfp4.dequantize(codes, scales)
        prepared, exponents, shift = _mxfp4_weight.prepare(codes, scales)
        bias = torch.randn(rows, device="cuda") if seed % 3 == 0 else None
        x, x_scales = torch.randn(tokens, width + 64 * (seed % 5 == 0), device="cuda").bfloat16()[:, :width], None
        values = x.float()
        if seed % 2:
            x, x_scales = _mxfp4.quantize(values, "even")
            values = _mxfp4.dequantize(x, x_scales)
        warpgroups, unrolled, pieces = (1, 2, 1) if token_tiles <= 8 else (2, 1, 2)
        options = {"TOKEN_TILES": token_tiles, "WARPGROUPS": warpgroups, "UNROLLED": unrolled, "PIECES": pieces}
        options |= {"num_warps": 4 * warpgroups, "enable_fp_fusion": False, "launch_pdl": True}
        steps = -(-rows // (64 * warpgroups)) * -(-tokens // (8 * token_tiles)) * -(-width // (128 * unrolled))
        options["PROGRAMS"] = rng.choice((min(steps, 660), rng.randint(1, min(steps, 660))))
        outs = [torch.full((tokens, rows), torch.nan, device="cuda").bfloat16() for _ in range(3)]
        for out in outs:
            sizes = tokens, rows, width, "tiles", shift, H200
            _triton_gemm_wgmma.multiply(Product(x, x_scales, prepared, exponents, bias, out, *sizes), options)
        assert torch.equal(outs[0], outs[1]), f"seed {seed}: other bytes"
        assert torch.equal(outs[0], outs[2]), f"seed {seed}: other bytes"
        _check(outs[0], values, w, bias, seed)


@pytest.mark.parametrize(
    ("tokens", "rows", "width"),
    [
        pytest.param(*sizes, marks=gpu)
        for sizes in (
            *((17, 4096, 8192), (64, 4096, 8192), (128, 4096, 8192), (256, 4096, 8192), (640, 8192, 8224)),
            *((2, 8192, 8224), (16, 8192, 8224)),
        )
    ],
)
def test_gpu_ops_multiply_so(tokens: int, rows: int, width: int) -> None:
    from fusionpasses.kernels import arch
    from fusionpasses.kernels.gemm_choice import choose

    assert choose(tokens, rows, width, arch.of(torch.device("cuda")), layout="tiles").kernel == "mxfp4_gemm_wgmma"
    codes, scales = weight(rows, width, 118, 126, "cuda")
    w = _mxfp4.dequantize(codes, scales)
    prepared, exponents, shift = _mxfp4_weight.prepare(codes, scales)
    misaligned = torch.empty(prepared.numel() + 4, dtype=torch.uint8, device="cuda")[4:].view(prepared.shape)
    misaligned.copy_(prepared)
    keywords = {"layout": "tiles", "rows": rows, "shift": shift, "provider": "triton"}
    x = torch.randn(tokens, width, device="cuda").bfloat16()
    call = OPS["mxfp4_gemm_a16w4.default"].overload
    for operand in (prepared, prepared, misaligned):  # in full, replayed, copied
        _check(call(x, operand, exponents, None, **keywords), x, w, None, tokens)
    half = x[: tokens // 2].half()
    _check(call(half, prepared, exponents, None, **keywords), half, w, None, tokens)
    x_codes, x_scales = _mxfp4.quantize(x, "even")
    got = OPS["mxfp4_gemm.default"].overload(
        x_codes, x_scales, prepared, exponents, None, out_dtype=torch.bfloat16, **keywords
    )
    _check(got, _mxfp4.dequantize(x_codes, x_scales), w, None, tokens)


if __name__ == "__main__":
    with triton_interpreter.without_needless_work():
        GROUPS[sys.argv[1]]()
