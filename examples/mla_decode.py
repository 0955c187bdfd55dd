"""Decoding with DeepSeek-V3's attention, quantised and compiled: absorbed MLA over a paged latent cache, all in MXFP4.

``python examples/mla_decode.py [--layers 2] [--steps 32] [--mode reduce-overhead] [--real-size]``

The model is written here in plain PyTorch, as serving engines write it: its residual adds, norms, rotations and cache
writes are ordinary code. A batch of sequences of different lengths is prefilled and then decoded greedily, by eager and
by compiled code. Checked on the way:

- in every layer the rotations and the cache write became ``fused_rope_mla_kv_cache``, and every norm and activation
  that feeds a quantised linear became one op with its quant; q_a's norm also does kv_a's, of the same rows;
- o_proj's quant reads what the bmm before it gives, heads first, without a copy that puts tokens first;
- each graph computes the same before and after the passes, byte for byte, when it is interpreted on its real input;
- compiled code generates eager's tokens and caches, with the roundings that Inductor drops put back. On a GPU, where
  kernels sum in another order than eager and MXFP4 enlarges a last bit, its logits are near eager's instead.

Exits with 1 if any of this does not hold. Runs on the GPU if there is one, else on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusionpasses as fp
from fusionpasses.report import FUSED, NOTHING, GraphReport
from fusionpasses.testing import Capture, assert_equivalent

# --- the model --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MlaConfig:
    """Sizes, named as in DeepSeek-V3's config. ``max_positions`` up to 4096: above, DeepSeek stretches its angles."""

    vocab_size: int = 256
    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    q_lora_rank: int = 64
    kv_lora_rank: int = 64
    qk_rope_head_dim: int = 16
    qk_nope_head_dim: int = 32
    v_head_dim: int = 32
    max_positions: int = 128
    block: int = 8  # tokens on a page of the cache
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0


TINY = MlaConfig()
REAL = MlaConfig(
    vocab_size=4096,  # a part of DeepSeek-V3's 129280: the output projection is not what this is about
    hidden_size=7168,
    intermediate_size=18432,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_rope_head_dim=64,
    qk_nope_head_dim=128,
    v_head_dim=128,
    max_positions=4096,
    block=64,
)


class RmsNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """DeepSeek's rotation, of neighbouring elements: ``x [..., R]`` by angles ``[..., R / 2]``, in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)


@dataclasses.dataclass
class Step:
    """What all layers share in one step."""

    cos: Tensor  # [T, R / 2], each token's angles
    sin: Tensor
    slots: Tensor  # [T], where each token's row goes; -1 for padding
    block_tables: Tensor  # [B, pages]
    visible: Tensor  # [B, T / B, 1, context]: which rows of its sequence a token sees


class MlaAttention(nn.Module):
    """Absorbed multi-head latent attention: queries meet the latent rows of the cache, which are keys and values."""

    def __init__(self, config: MlaConfig) -> None:
        super().__init__()
        heads, nope, latent = config.num_attention_heads, config.qk_nope_head_dim, config.kv_lora_rank
        self.config = config
        rope, v = config.qk_rope_head_dim, config.v_head_dim
        self.q_a_kv_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank + latent + rope, bias=False)
        self.q_a_norm = RmsNorm(config.q_lora_rank, config.rms_norm_eps)
        self.q_b_proj = nn.Linear(config.q_lora_rank, heads * (nope + rope), bias=False)
        self.kv_a_norm = RmsNorm(latent, config.rms_norm_eps)
        # The two halves of kv_b_proj, to be multiplied into q and out of the attention's result.
        self.w_uk = nn.Parameter(torch.randn(heads, nope, latent) / latent**0.5)
        self.w_uv = nn.Parameter(torch.randn(heads, latent, v) / latent**0.5)
        self.o_proj = nn.Linear(heads * v, config.hidden_size, bias=False)
        self.scale = (nope + rope) ** -0.5

    def forward(self, x: Tensor, cache: Tensor, step: Step) -> Tensor:
        c = self.config
        latent, rope = c.kv_lora_rank, c.qk_rope_head_dim
        q_a, kv_c, k_pe = self.q_a_kv_a_proj(x).split([c.q_lora_rank, latent, rope], -1)
        q = self.q_b_proj(self.q_a_norm(q_a)).unflatten(-1, (c.num_attention_heads, -1))
        q_nope, q_pe = q.split([c.qk_nope_head_dim, rope], -1)
        q_pe = self.rotate_and_write(q_pe, k_pe, self.kv_a_norm(kv_c), cache, step)
        q_nope = torch.bmm(q_nope.transpose(0, 1), self.w_uk).transpose(0, 1)
        out = self.attend(torch.cat([q_nope, q_pe], -1), cache, step)
        out = torch.bmm(out.transpose(0, 1), self.w_uv).transpose(0, 1)
        y: Tensor = self.o_proj(out.flatten(1))
        return y

    def rotate_and_write(self, q_pe: Tensor, k_pe: Tensor, kv_c: Tensor, cache: Tensor, step: Step) -> Tensor:
        """q_pe rotated; each token's row ``[kv_c | rotated k_pe]`` goes to its slot."""
        q_pe = rotate(q_pe, step.cos[:, None], step.sin[:, None])
        k_pe = rotate(k_pe, step.cos, step.sin)
        torch.ops.fusionpasses.concat_and_cache_mla(kv_c, k_pe, cache, step.slots)
        return q_pe

    def attend(self, q: Tensor, cache: Tensor, step: Step) -> Tensor:
        """``q [T, H, L + R]`` to ``[T, H, L]``: a sequence's pages are gathered once, for all its tokens and heads."""
        sequences = step.block_tables.shape[0]
        rows = cache[step.block_tables].flatten(1, 2)  # [B, context, L + R]
        scores = torch.bmm(q.reshape(sequences, -1, q.shape[-1]), rows.transpose(1, 2))
        scores = scores.view(sequences, -1, q.shape[1], rows.shape[1]).float() * self.scale
        weights = scores.masked_fill(~step.visible, -torch.inf).softmax(-1).to(q.dtype)
        out = torch.bmm(weights.flatten(1, 2), rows[..., : self.config.kv_lora_rank])
        return out.view(*q.shape[:2], -1)


class Mlp(nn.Module):
    def __init__(self, config: MlaConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        y: Tensor = self.down_proj(F.silu(gate) * up)
        return y


class DecoderLayer(nn.Module):
    def __init__(self, config: MlaConfig) -> None:
        super().__init__()
        self.input_norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = MlaAttention(config)
        self.post_attention_norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, residual: Tensor | None, cache: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """What the layer adds, and the residual stream it is to be added to."""
        residual = x if residual is None else x + residual
        x = self.attention(self.input_norm(residual), cache, step)
        residual = x + residual
        return self.mlp(self.post_attention_norm(residual)), residual


class MlaDecoder(nn.Module):
    """DeepSeek-V3 with dense layers only.

    ``forward(tokens [T], positions [T], slots [T], block_tables [B, pages], caches) -> logits [T, vocabulary]``, one
    forward for prefill and decode. The T tokens are B sequences of T / B tokens each, one after the other; a sequence
    that has fewer is padded with tokens whose slot is -1 and whose logits mean nothing. A token sees the rows of its
    sequence up to its own position. ``caches`` holds a tensor ``[blocks, block, L + R]`` for each layer.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: MlaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        pairs = torch.arange(0, config.qk_rope_head_dim, 2, dtype=torch.float32)
        angles = torch.outer(
            torch.arange(config.max_positions, dtype=torch.float32),
            config.rope_theta ** (-pairs / config.qk_rope_head_dim),
        )
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, block_tables: Tensor, caches: Sequence[Tensor]
    ) -> Tensor:
        sequences, context = block_tables.shape[0], block_tables.shape[1] * self.config.block
        seen = torch.arange(context, device=positions.device) <= positions.view(sequences, -1, 1, 1)
        step = Step(self.cos[positions], self.sin[positions], slots, block_tables, seen)
        x, residual = self.embed_tokens(tokens), None
        for layer, cache in zip(self.layers, caches, strict=True):
            x, residual = layer(x, residual, cache, step)
        logits: Tensor = self.lm_head(self.norm(x + residual))
        return logits


def unquantised(config: MlaConfig, device: str, *, seed: int = 0) -> MlaDecoder:
    """The model with random weights, made on the device, all in bfloat16."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return MlaDecoder(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def build(config: MlaConfig, device: str, *, seed: int = 0) -> MlaDecoder:
    """The model with random weights, quantised: every linear but lm_head is MXFP4, everything else is bfloat16."""
    model = unquantised(config, device, seed=seed)
    fp.quantize_mxfp4(model)
    return model


# --- the sequences ----------------------------------------------------------------------------------------------------


class Sequences:
    """A batch of sequences: their pages and caches, how long each one is, and the model's arguments for a step."""

    def __init__(self, config: MlaConfig, batch: int, context: int, device: str) -> None:
        pages = -(-context // config.block)
        # Handed out in random order, as they are after some hours of serving.
        order = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(batch))
        self.block = config.block
        self.block_tables = order.view(batch, pages).to(device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        width = config.kv_lora_rank + config.qk_rope_head_dim
        self.caches = [
            torch.zeros(batch * pages, config.block, width, dtype=torch.bfloat16, device=device)
            for _ in range(config.num_hidden_layers)
        ]
        for cache in self.caches:
            torch._dynamo.mark_static_address(cache)  # CUDA graphs write to inputs that do not move

    def arguments(self, tokens: Tensor, counts: Tensor) -> tuple[Any, ...]:
        """The model's, for ``tokens [B, n]`` of which the first ``counts [B]`` are new and the rest padding."""
        new = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        is_token = new < counts[:, None]
        positions = torch.where(is_token, self.lengths[:, None] + new, 0)
        slots = self.block_tables.gather(1, positions // self.block) * self.block + positions % self.block
        slots = torch.where(is_token, slots, -1)
        return tokens.flatten(), positions.flatten(), slots.flatten(), self.block_tables, self.caches


Model = Callable[..., Tensor]


@dataclasses.dataclass
class Generated:
    tokens: Tensor  # [steps + 1, B]
    logits: Tensor  # [steps + 1, B, vocabulary], what each was chosen from
    caches: list[Tensor]


@torch.no_grad()
def generate(model: Model, sequences: Sequences, prompts: Tensor, counts: Tensor, steps: int) -> Generated:
    """Prefill of ``prompts [B, n]``, of which ``counts [B]`` tokens are real, then greedy decoding.

    A sequence without a prompt is a row that pads the batch: it stays empty.
    """
    batch, busy = len(prompts), (counts > 0).long()
    tokens, logits = [], []
    for _ in range(steps + 1):
        torch.compiler.cudagraph_mark_step_begin()
        every = model(*sequences.arguments(prompts, counts)).view(*prompts.shape, -1)
        last = every[torch.arange(batch, device=counts.device), (counts - 1).clamp(min=0)].clone()
        sequences.lengths += counts
        tokens.append(last.argmax(-1))
        logits.append(last)
        prompts, counts = tokens[-1][:, None], busy
    return Generated(torch.stack(tokens), torch.stack(logits), sequences.caches)


def random_prompts(config: MlaConfig, lengths: Sequence[int], device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (len(lengths), max(lengths)), generator=generator)
    return tokens.to(device), torch.tensor(lengths, device=device)


# --- the checks -------------------------------------------------------------------------------------------------------

#: How far compiled code's logits may be from eager's, relative to their norm. Inductor sums in another order than
#: eager, which rarely moves a bfloat16. On a CPU the last norm may show that; on a GPU all of them, and MXFP4 enlarges
#: what they show: 0.012 with two layers of real size on an H200.
LOGITS_OFF = {"cpu": 0.002, "cuda": 0.05}


def expected_ops(config: MlaConfig) -> dict[str, int]:
    """Of each graph, derived from the architecture: all norms but kv_a's and the last one feed a quantised linear.

    kv_a's is a part of q_a's op.
    """
    layers = config.num_hidden_layers
    return {
        "fused_rope_mla_kv_cache": layers,
        "concat_and_cache_mla": 0,
        "rmsnorm_mxfp4_quant": layers + 1,  # q_a's with kv_a's, and the very first, before which nothing is added
        "rmsnorm_add_mxfp4_quant": 2 * layers - 1,
        "silu_mul_mxfp4_quant": layers,  # down_proj's
        "dynamic_mxfp4_quant": layers,  # o_proj's, of the rows of a bmm, which it reads where they lie
        "mxfp4_gemm": 5 * layers,
    }


def fused_as_expected(name: str, graph: GraphReport, expected: dict[str, int]) -> bool:
    """Prints what happened to the sites of a graph."""
    print(f"{name}: {graph.nodes_before} -> {graph.nodes_after} nodes, {graph.source}")
    lines = []
    for site in graph.sites:
        if site.status == FUSED:
            lines.append(f"fused into {site.op} [{site.provider}]")
        elif site.status == NOTHING:
            lines.append(f"nothing to fuse at {site.where.line}")
        else:
            lines.append(f"REFUSED: {site.op} at {site.where.line}\n        because {site.reason}")
    for line, count in sorted(Counter(lines).items()):
        print(f"  {count:3d} {line}")
    wrong = {op: count for op, count in expected.items() if graph.ops_after.get(op, 0) != count}
    for op, count in wrong.items():
        print(f"  WRONG: {graph.ops_after.get(op, 0)} {op} in the graph, expected {count}")
    return not wrong


class Prover:
    """Stands for the model, and interprets the graph of each call before and after the passes, on its arguments.

    With the reference implementations of the fused ops, so that all bytes must be equal on a GPU too.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.proofs: list[Capture] = []

    def __call__(self, *arguments: Any) -> Tensor:
        backend = fp.fusion_backend(provider="reference")
        options = {"emulate_precision_casts": True}
        proof = assert_equivalent(
            self.model, arguments, backend=backend, dynamic=False, fullgraph=True, options=options
        )
        self.proofs.append(proof)
        logits: Tensor = proof.output
        return logits


def is_proven(name: str, graph: GraphReport, proof: Capture) -> bool:
    """Prints how the proof went, which is one of the compiled graph if both have the same nodes and sites."""

    def shape(report: GraphReport) -> tuple[Any, ...]:
        return report.nodes_before, report.nodes_after, [(site.status, site.op, site.where) for site in report.sites]

    c = proof.comparison
    same = [shape(captured.report) for captured in proof.graphs] == [shape(graph)]
    print(
        f"  {name}, interpreted before and after the passes: {c.tensors} tensors compared, {c.unequal} differ"
        f"{'' if same else '; WRONG: the graph that was compiled is another'}"
    )
    return same and c.unequal == 0


def agrees(compiled: Generated, eager: Generated) -> bool:
    """Prints how compiled code's tokens, logits and caches differ from eager's. Is that allowed?"""
    device = eager.tokens.device.type
    # The step in which a row gets another token is the last one with the same inputs.
    other = (compiled.tokens != eager.tokens).any(1).nonzero().flatten().tolist()
    same_inputs = other[0] + 1 if other else len(eager.tokens)
    pairs = zip(compiled.logits[:same_inputs].float(), eager.logits[:same_inputs].float(), strict=True)
    off = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    caches = [torch.equal(a, b) for a, b in zip(compiled.caches, eager.caches, strict=True)]
    steps, rows = eager.tokens.shape
    print(f"  tokens, {steps} for each of {rows} rows: {f'others from step {other[0]} on' if other else 'equal'}")
    print(f"  caches: {sum(caches)} of {len(caches)} byte-equal")
    print(f"  logits: {f'off by {off:.2g} of their norm' if off else 'byte-equal'}, up to step {same_inputs - 1}")
    return off <= LOGITS_OFF[device] and (device != "cpu" or (not other and all(caches)))


@contextlib.contextmanager
def same_rounding_as_eager() -> Iterator[None]:
    """Keep the casts to bfloat16 that Inductor drops by default, so that its result can be compared with eager."""
    import torch._inductor.config

    with torch._inductor.config.patch(emulate_precision_casts=True):
        yield


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=32, help="decode steps, after the prefill")
    parser.add_argument("--mode", default="default", choices=["default", "reduce-overhead"])
    parser.add_argument("--real-size", action="store_true", help="DeepSeek-V3's sizes, for a GPU")
    args = parser.parse_args(arguments)
    if args.layers < 1 or args.steps < 1:
        parser.error(f"got --layers {args.layers} --steps {args.steps}, allowed 1 and more of each")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = dataclasses.replace(REAL if args.real_size else TINY, num_hidden_layers=args.layers)
    model = build(config, device)
    print(fp.last_quantization())
    lengths = (5, 11, 8, 0)  # the last row is one that pads the batch
    prompts, counts = random_prompts(config, lengths, device)

    def run(model: Model, steps: int) -> Generated:
        sequences = Sequences(config, len(lengths), max(lengths) + args.steps, device)
        return generate(model, sequences, prompts, counts, steps)

    eager = run(model, args.steps)
    print("\ncompiling a graph for the prefill and one for decoding; about a minute on a CPU ...", flush=True)
    backend = fp.fusion_backend()
    torch._dynamo.utils.counters.clear()
    started = time.perf_counter()
    with same_rounding_as_eager():
        compiled = run(torch.compile(model, backend=backend, mode=args.mode, dynamic=False, fullgraph=True), args.steps)
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    print(f"compiled and run in {time.perf_counter() - started:.0f} s\n")

    graphs = dict(zip(("prefill", "decode"), backend.report.graphs, strict=True))
    right = [fused_as_expected(name, graph, expected_ops(config)) for name, graph in graphs.items()]
    print("proof:")
    prover = Prover(model)
    run(prover, 1)
    right += [is_proven(name, graph, proof) for (name, graph), proof in zip(graphs.items(), prover.proofs, strict=True)]
    print(f"compiled ({args.mode}) against eager:")
    right.append(agrees(compiled, eager))
    if args.mode == "reduce-overhead" and device == "cuda":
        print(f"  CUDA graphs: {skipped or 'none'} skipped")
        right.append(not skipped)
    print("all as expected" if all(right) else "NOT as expected")
    return int(not all(right))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
