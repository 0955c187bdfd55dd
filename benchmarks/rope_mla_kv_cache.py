"""RoPE + write to the MLA cache + q for absorbed attention, beside a copy, plain Inductor and AITER.

``python -m benchmarks.rope_mla_kv_cache [--tokens T ...] [--heads H ...] [--only-bmm] [--peer-path DIR]
[--json FILE]``, on a GPU.

DeepSeek-V3's sizes: latent 512, rope 64, bfloat16, the table of angles and positions, interleaved pairs. q_nope comes
heads first, as the absorbing bmm gives it, the rest as slices of what the projections give; the cache is flat. All on
the same buffers, in one run; nothing is timed before its q and its cache are compared with the reference's. Then the
same with that bmm in front (``bmm``), of 128 elements of q_nope with weights of its own for each set of buffers.

=======  ===============================================================================================================
ours     ``fused_rope_mla_kv_cache.absorbed``
plain    the same in aten ops, compiled by Inductor with emulated precision casts
opaque   Inductor's rotations and q, then ``concat_and_cache_mla`` as an op of its own
aiter    ``fused_qk_rope_cat_and_cache_mla``, with --peer-path
into     only with the bmm: ``fused_rope_mla_kv_cache.absorbed_bmm``, which writes the product into q
=======  ===============================================================================================================

The yardstick is a copy kernel that moves as many bytes: inputs and outputs once, without angles and slots; with the
bmm, that bmm alone and a copy of what is not its product. Times are those of a CUDA graph over sets of buffers larger
than the L2 cache (``fusionpasses/bench/timing.py``).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import _command
from fusionpasses.bench import peers
from fusionpasses.bench.timing import copy_time, replay_time, sets_for
from fusionpasses.ops import OPS

LATENT, ROPE, Q_LORA, NOPE_IN = 512, 64, 1536, 128
TOKENS = (1, 16, 64, 256, 1024, 8192)
HEADS = (128, 16)
TABLE = 4096
OP = "fused_rope_mla_kv_cache.absorbed"
KWARGS = {"style": "interleaved", "negative_slots": "wrap"}

Buffers = dict[str, Tensor]


def buffers(tokens: int, heads: int, device: str, *, by_bmm: bool = False) -> Buffers:
    """Arguments; with q_nope, or with the factors that give it, ``up`` and ``w_uk``."""
    make = functools.partial(torch.randn, device=device, dtype=torch.bfloat16)
    joint = make(tokens, Q_LORA + LATENT + ROPE)
    slots = 2 * tokens + 64
    angle = torch.rand(TABLE, ROPE // 2, device=device) * 7
    q = make(tokens, heads, NOPE_IN + ROPE)
    factors = {"up": q[..., :NOPE_IN].transpose(0, 1), "w_uk": make(heads, NOPE_IN, LATENT) / NOPE_IN**0.5}
    nope = factors if by_bmm else {"q_nope": make(heads, tokens, LATENT).transpose(0, 1)}
    return nope | {
        "q_pe": q[..., NOPE_IN:],
        "k_pe": joint[:, Q_LORA + LATENT :],
        "kv_c": joint[:, Q_LORA : Q_LORA + LATENT],
        "kv_cache": make(slots, LATENT + ROPE),
        "cos": angle.cos().bfloat16(),
        "sin": angle.sin().bfloat16(),
        "slots": torch.randperm(slots, device=device)[:tokens],
        "positions": torch.randint(TABLE, (tokens,), device=device),
    }


def bytes_moved(tokens: int, heads: int, *, by_bmm: bool) -> int:
    """Without the product, if there is a bmm."""
    return 2 * 2 * tokens * (heads * (ROPE if by_bmm else LATENT + ROPE) + LATENT + ROPE)


def q_nope_of(b: Buffers) -> Tensor:
    return b["q_nope"] if "q_nope" in b else torch.bmm(b["up"], b["w_uk"]).transpose(0, 1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (t.view(len(t), *(1,) * (x.dim() - 2), -1) for t in (cos, sin))
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


def plain(b: Buffers) -> Tensor:
    cos, sin = b["cos"][b["positions"]], b["sin"][b["positions"]]
    b["kv_cache"][b["slots"]] = torch.cat((b["kv_c"], rotated(b["k_pe"], cos, sin)), -1)
    return torch.cat((q_nope_of(b), rotated(b["q_pe"], cos, sin)), -1)


def opaque(b: Buffers) -> Tensor:
    cos, sin = b["cos"][b["positions"]], b["sin"][b["positions"]]
    torch.ops.fusionpasses.concat_and_cache_mla(b["kv_c"], rotated(b["k_pe"], cos, sin), b["kv_cache"], b["slots"])
    return torch.cat((q_nope_of(b), rotated(b["q_pe"], cos, sin)), -1)


def ours(b: Buffers, provider: str) -> Tensor:
    first = (q_nope_of(b), b["q_pe"], b["k_pe"], b["kv_c"], b["kv_cache"], b["cos"], b["sin"], b["slots"])
    q: Tensor = OPS[OP].overload(*first, **KWARGS, positions=b["positions"], provider=provider)
    return q


def into(b: Buffers) -> Tensor:
    first = (b["up"], b["w_uk"], b["q_pe"], b["k_pe"], b["kv_c"], b["kv_cache"], b["cos"], b["sin"], b["slots"])
    q: Tensor = OPS[f"{OP}_bmm"].overload(*first, **KWARGS, positions=b["positions"], provider="triton")
    return q


def aiter(function: Callable[..., Any], b: Buffers) -> Tensor:
    one_head = [b[name].unsqueeze(1) for name in ("kv_c", "k_pe", "kv_cache")]
    q: Tensor = function(
        q_nope_of(b), b["q_pe"], *one_head, b["slots"], b["positions"], b["cos"], b["sin"], None, is_neox=False
    )[0]
    return q


def contenders(rope_of_aiter: Callable[..., Any] | None, *, by_bmm: bool) -> dict[str, Callable[[Buffers], Tensor]]:
    as_eager = {"emulate_precision_casts": True}
    compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False, options=as_eager)
    found: dict[str, Callable[[Buffers], Tensor]] = {"ours": functools.partial(ours, provider="triton")}
    if by_bmm:
        found["into"] = into
    found |= {"plain": compiled(plain), "opaque": compiled(opaque)}
    if rope_of_aiter is not None:
        found["aiter"] = functools.partial(aiter, rope_of_aiter)
    return found


@torch.inference_mode()
def measure(
    tokens: int, heads: int, rope_of_aiter: Callable[..., Any] | None, *, by_bmm: bool = False
) -> list[dict[str, Any]]:
    torch._dynamo.reset()
    moved = bytes_moved(tokens, heads, by_bmm=by_bmm)
    sets = [buffers(tokens, heads, "cuda", by_bmm=by_bmm) for _ in range(sets_for(moved))]
    fresh = sets[0] | {"kv_cache": sets[0]["kv_cache"].clone()}
    q = ours(fresh, "reference")
    yardstick = copy_time(moved)
    if by_bmm:
        yardstick += replay_time([functools.partial(q_nope_of, b) for b in sets])
    rows = []
    for who, run in contenders(rope_of_aiter, by_bmm=by_bmm).items():
        row: dict[str, Any] = {"tokens": tokens, "heads": heads, "bmm": by_bmm, "who": who, "copy_us": yardstick}
        sets[0]["kv_cache"].zero_()
        sets[0]["kv_cache"][sets[0]["slots"]] = -1.0
        try:
            got = run(sets[0])
            slots = sets[0]["slots"]
            pairs = ((got, q), (sets[0]["kv_cache"][slots], fresh["kv_cache"][slots]))
            row["differ"] = sum(int((a != b).sum()) for a, b in pairs)
            row["error"] = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)
            # AITER may round elsewhere; a rotation that is wrong is off by far more.
            if row["differ"] == 0 or (who == "aiter" and row["error"] < 0.01):
                row["us"] = replay_time([functools.partial(run, b) for b in sets])
                row["of_copy"] = yardstick / row["us"]
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}"
        rows.append(row)
        print(line(row), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    start = f"{row['tokens']:6d} {row['heads']:5d} {'bmm ' if row['bmm'] else '':4}{row['who']:7}"
    if "failed" in row:
        return f"{start} failed: {row['failed'][:600]}"
    timed = f"{row['us']:9.2f} {row['of_copy']:8.2f}" if "us" in row else f"{'wrong':>9} {'-':>8}"
    return f"{start} {timed} {row['copy_us']:9.2f} {row['differ']:8d} {row['error']:9.1e}"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, metavar="T")
    parser.add_argument("--heads", type=int, nargs="+", default=HEADS, metavar="H")
    parser.add_argument("--peer-path", type=pathlib.Path, metavar="DIR", help="checkout of AITER")
    parser.add_argument("--only-bmm", action="store_true", help="only with the absorbing bmm in front")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    args = parser.parse_args(arguments)
    if not _command.has_gpu("rope_mla_kv_cache"):
        return 2
    rope_of_aiter = None if args.peer_path is None else peers.load_aiter_rope(args.peer_path)
    columns = f"{'us':>9} {'of copy':>8} {'copy us':>9} {'differ':>8} {'error':>9}"
    _command.start(f"{'tokens':>6} {'heads':>5} {'who':11} {columns}")
    rows: list[_command.Row] = []
    for heads, tokens, by_bmm in itertools.product(args.heads, args.tokens, (False, True)):
        if not args.only_bmm or by_bmm:
            rows += measure(tokens, heads, rope_of_aiter, by_bmm=by_bmm)
    _command.save(args.json, rows)
    return _command.status(rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
