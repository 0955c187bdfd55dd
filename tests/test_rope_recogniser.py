"""Rotations in real models, by hand and generated: what is recognised is proven by computing it a second time.

The proof: the graph is interpreted, and the rotation that was recognised (x, cos, sin, style, rounding) is computed
from the interpreted values by ``turned``, one element at a time in the sense of the op's documentation. Bytes must
agree. It runs on every rotation that is recognised without a reason against it, in legal and in illegal graphs.
"""

import collections
import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import fx

from benchmarks.tiny_models import LAYERS, MODELS
from fusionpasses.ops import _rope as op
from fusionpasses.patterns import _rope
from fusionpasses.patterns._rope import explain, illegal, mismatch, pair, recognise
from fusionpasses.patterns._rope_parts import same_value
from fusionpasses.testing import capture

GENERATE = settings(
    max_examples=7,  # of BUNDLE variants each: most of the time is that of a capture, not of a variant
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),  # a variant is small already; shrinking would trace for minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)

# --- the proof -------------------------------------------------------------------------------------------------------


class Values(fx.Interpreter):
    """Interprets a graph on random inputs and keeps what every node computed."""

    def __init__(self, module):
        super().__init__(module, garbage_collect_values=False)
        self.of = {}

    def run_node(self, n):
        value = super().run_node(n)
        self.of[n] = value.clone() if isinstance(value, torch.Tensor) else value
        return value


def _random(node, generator):
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return value.node.hint if hasattr(value, "node") else value
    sizes = [int(getattr(getattr(s, "node", None), "hint", s)) for s in value.shape]
    if value.dtype.is_complex or value.dtype.is_floating_point:
        return torch.randn(sizes, generator=generator).to(value.dtype)
    return torch.randint(0, 2, sizes, generator=generator).to(value.dtype)


def interpret(module):
    generator = torch.Generator().manual_seed(7)
    values = Values(module)
    with torch.no_grad():
        values.run(*[_random(n, generator) for n in module.graph.nodes if n.op == "placeholder"])
    return values.of


def angles(table, values, dtype):
    value = values[table.base]
    if table.component:
        value = getattr(value, table.component)
    value = value[..., list(table.columns)]
    return value[tuple(None if axis is None else slice(None) for axis in table.axes)].to(dtype)


def turned(rope, values):
    """The rotation as the op documents it, by numbered elements."""
    x = values[rope.x]
    dtype = torch.float32 if rope.rounding == "once" else x.dtype
    cos, sin = angles(rope.cos, values, dtype), angles(rope.sin, values, dtype)
    r = x.shape[-1]
    out = torch.empty_like(x)
    for i in range(r // 2):
        a, b = (i, i + r // 2) if rope.style == "neox" else (2 * i, 2 * i + 1)
        first, second = (2 * i, 2 * i + 1) if rope.style == "interleaved" else (i, i + r // 2)
        at = (first, second) if cos.shape[-1] == r else (i, i)
        xa, xb = x[..., a].to(dtype), x[..., b].to(dtype)
        out[..., first] = xa * cos[..., at[0]] - xb * sin[..., at[0]]
        out[..., second] = xb * cos[..., at[1]] + xa * sin[..., at[1]]
    return out


def same_bytes(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.nan_to_num().contiguous().view(torch.uint8), b.nan_to_num().contiguous().view(torch.uint8))
    )


def prove(module):
    """Every rotation in a graph that has nothing against it, each proven."""
    found = [rope for node in module.graph.nodes if (rope := recognise(node)) is not None and illegal(rope) is None]
    if found:
        values = interpret(module)
        for rope in found:
            assert same_bytes(turned(rope, values), values[rope.root]), f"{rope.spelling}: {module.graph}"
            assert rope.x not in rope.nodes
            assert rope.root in rope.nodes
            assert rope.cos.base not in rope.nodes
    return found


def graph_of(model, inputs, dynamic_axes=()):
    for tensor, axis in dynamic_axes:
        torch._dynamo.mark_dynamic(tensor, axis)
    with torch.no_grad():
        graphs = capture(model, inputs, fullgraph=True).graphs
    assert len(graphs) == 1
    return graphs[0].before


def results_of(module):
    return next(n for n in module.graph.nodes if n.op == "output").args[0]


def result_of(module):
    return results_of(module)[0]


# --- real models -----------------------------------------------------------------------------------------------------

EXPECTED = {
    "llama": ("neox", 16, "x * cos + rotate_half(x) * sin"),
    "qwen3": ("neox", 16, "x * cos + rotate_half(x) * sin"),
    "gpt_oss": ("neox", 8, "halves written out"),
    "deepseek_v3": ("interleaved_to_neox", 8, "halves written out"),
}


@pytest.mark.parametrize(
    ("name", "dtype", "dynamic"),
    [
        ("llama", torch.bfloat16, "everything"),
        ("qwen3", torch.float32, None),
        ("gpt_oss", torch.bfloat16, None),
        ("deepseek_v3", torch.bfloat16, "tokens"),
    ],
)
def test_every_rotation_of_transformers_models(name, dtype, dynamic):
    torch.manual_seed(0)
    ids = torch.randint(0, 128, (2, 6))
    if dynamic == "tokens":
        torch._dynamo.mark_dynamic(ids, 1)
    model = MODELS[name].build().to(dtype).eval()
    with torch.no_grad():
        result = capture(model, (ids,), kwargs={"use_cache": False}, dynamic=dynamic == "everything" or None)
    style, columns, spelling = EXPECTED[name]
    found = [(g.before, prove(g.before)) for g in result.graphs]
    ropes = [rope for _, of_graph in found for rope in of_graph]
    assert len(ropes) == 2 * LAYERS
    for rope in ropes:
        assert (rope.style, rope.spelling, rope.rounding) == (style, spelling, "each step")
        assert rope.cos.columns == rope.sin.columns == range(columns)
        assert rope.x.meta["val"].shape[-1] == 16
        assert (rope.cos.axes, rope.cos.inserted) == ((0, None, 1, 2), (1,))
        assert rope.cos.whole == (name != "deepseek_v3")
    # q is rotated before k in all of them, and every layer uses the same tables.
    for i, rope in enumerate(ropes):
        assert pair(rope, ropes) is ropes[i ^ 1]
        others = [r for r in ropes if r is not ropes[i ^ 1]]
        assert pair(rope, others) is None, "a q of another layer was taken"
    # None writes to an MLA cache. DeepSeek's would: its k has one head, which transformers expands before it caches.
    sites = [(site.status, site.op, site.reason) for site in result.report.sites()]
    left = (
        "k has one head and q 4, as in MLA, but k is expanded to all heads; what is cached then, if anything is, are "
    )
    assert sites == [("nothing to fuse", "rope", f"{left}no rows [kv_c | k_pe]")] * (LAYERS * (name == "deepseek_v3"))


# --- spellings by hand -----------------------------------------------------------------------------------------------


def _rotate_half(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)


def llama(x, cos, sin):
    return x * cos + _rotate_half(x) * sin


def old_deepseek(x, cos, sin):
    b, h, s, d = x.shape
    return llama(x.view(b, h, s, d // 2, 2).transpose(4, 3).reshape(b, h, s, d), cos, sin)


def meta(x, freqs):
    turned = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2)) * freqs.view(1, x.shape[1], 1, -1)
    return torch.view_as_real(turned).flatten(3).to(x.dtype)


def _tensors(*shapes, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def test_older_deepseek_spelling_is_read_through_the_deinterleaving():
    module = graph_of(old_deepseek, _tensors((2, 3, 5, 8), (5, 8), (5, 8)))
    (rope,) = prove(module)
    assert rope.style == "interleaved_to_neox"
    assert rope.x.op == "placeholder"
    assert rope.spelling.endswith("x deinterleaved before")
    assert torch.ops.aten.permute.default in {n.target for n in rope.nodes}


def test_constant_widening_of_a_cast_before_the_deinterleaving():
    module = graph_of(lambda x, c, s: old_deepseek(x.float(), c, s).to(x.dtype), _tensors((2, 3, 5, 8), (5, 8), (5, 8)))
    ropes = [r for r in prove(module) if r.root is result_of(module)]
    assert [(r.style, r.rounding, r.x.op) for r in ropes] == [("interleaved_to_neox", "once", "placeholder")]


def test_partial_rotary_reports_the_slice():
    def model(x, cos, sin):
        return torch.cat((llama(x[..., :8], cos, sin), x[..., 8:]), -1)

    module = graph_of(model, _tensors((2, 3, 5, 12), (5, 8), (5, 8)))
    (rope,) = prove(module)
    assert rope.x.target is torch.ops.aten.slice.Tensor
    assert rope.x.meta["val"].shape == (2, 3, 5, 8)
    assert recognise(result_of(module)) is None


def test_attention_scaling_belongs_to_the_tables():
    def model(x, positions, inv):
        f = positions[:, None].float() * inv
        emb = torch.cat((f, f), -1)
        return llama(x, (emb.cos() * 1.3465735902799727).to(x.dtype), (emb.sin() * 1.3465735902799727).to(x.dtype))

    (rope,) = prove(graph_of(model, (_tensors((3, 5, 8))[0], torch.arange(5), torch.rand(4))))
    assert rope.cos.base.target is torch.ops.prims.convert_element_type.default
    assert rope.cos.base.args[0].args[1] == 1.3465735902799727


def test_one_tensor_holds_cos_and_sin():
    def model(x, cos_sin):
        cos, sin = cos_sin.chunk(2, -1)
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    (rope,) = prove(graph_of(model, _tensors((3, 5, 8), (5, 8))))
    assert rope.cos.base is rope.sin.base
    assert (rope.cos.columns, rope.sin.columns, rope.cos.whole) == (range(4), range(4, 8), False)


def test_full_tables_whose_halves_are_taken_one_by_one():
    def model(x, cos, sin):
        a, b = x.chunk(2, -1)
        (ca, cb), (sa, sb) = cos.chunk(2, -1), sin.chunk(2, -1)
        return torch.cat((a * ca - b * sa, b * cb + a * sb), -1)

    (rope,) = prove(graph_of(model, _tensors((3, 5, 8), (5, 8), (5, 8))))
    assert rope.cos.columns == rope.sin.columns == range(8)


def test_complex_numbers_reach_the_graph_and_are_refused():
    """They are no real arithmetic: this torch's CPU kernel contracts some elements into an FMA, not all."""
    (x,), freqs = _tensors((2, 5, 3, 8)), torch.randn(5, 4, dtype=torch.complex64)
    module = graph_of(meta, (x, freqs))
    rope = recognise(result_of(module))
    assert (rope.spelling, rope.style, rope.cos.component, rope.sin.component) == (
        "complex", "interleaved", "real", "imag"
    )  # fmt: skip
    assert rope.cos.base is rope.sin.base
    assert rope.cos.axes == (None, 0, None, 1)
    assert "complex" in illegal(rope)
    # What is read out of it is right nevertheless, to the last bits of float32.
    values = interpret(module)
    torch.testing.assert_close(turned(rope, values), values[rope.root], rtol=1e-2, atol=1e-2)


def test_complex_and_real_products_differ_in_bytes():
    generator = torch.Generator().manual_seed(0)
    x, f = torch.randn(64, 3, 5, 2, generator=generator), torch.randn(64, 1, 5, 2, generator=generator)
    product = torch.view_as_real(torch.view_as_complex(x) * torch.view_as_complex(f))
    real = x[..., 0] * f[..., 0] - x[..., 1] * f[..., 1]
    torch.testing.assert_close(product[..., 0], real)
    if torch.equal(product[..., 0], real):
        pytest.skip("the kernel of this machine rounds every product; the refusal is then only cautious")


def test_the_table_of_styles_is_that_of_the_op():
    assert set(_rope.STYLES.values()) == set(op.STYLES)


# --- pairing ---------------------------------------------------------------------------------------------------------


def _layers(x, cos, sin, w, *, skip_q=None, k_first=False):
    for layer in range(3):
        # A layer whose q rotation is none that can be fused.
        turn_q = (lambda q: q.roll(1, -1)) if layer == skip_q else (lambda q: llama(q, cos, sin))
        if k_first:
            k = llama(x @ w[1], cos, sin)
            q = turn_q(x @ w[0])
        else:
            q = turn_q(x @ w[0])
            k = llama(x @ w[1], cos, sin)
        x = x + torch.softmax(q @ k.transpose(-1, -2), -1) @ (x @ w[2])
    return x


@pytest.mark.parametrize("k_first", [False, True])
@pytest.mark.parametrize("skip_q", [None, 0, 1, 2])
def test_no_layer_takes_the_q_of_another(skip_q, k_first):
    module = graph_of(
        lambda *a: _layers(*a, skip_q=skip_q, k_first=k_first), _tensors((5, 8), (5, 8), (5, 8), (3, 8, 8))
    )
    ropes = prove(module)
    assert len(ropes) == (6 if skip_q is None else 5)

    def layer_and_kind(rope):
        """Which matmul of the graph computed x: they come three to a layer (q, k, v), then two of the attention."""
        mms = [n for n in module.graph.nodes if n.target is torch.ops.aten.mm.default]
        weight = rope.x.args[1]
        return rope.x, mms.index(rope.x), weight

    ks = [r for r in ropes if layer_and_kind(r)[2].args[2] == 1]
    qs = [r for r in ropes if r not in ks]
    assert len(ks) == 3
    expected = iter(qs)
    for layer, k in enumerate(ks):
        assert pair(k, qs) is (None if layer == skip_q else next(expected))


def test_other_tables_styles_or_dtypes_are_no_pair():
    def model(q, k, cos, sin, other):
        def split(x, c, s):
            a, b = x[..., ::2], x[..., 1::2]
            return torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)

        return (
            llama(k, cos, sin),
            llama(q, cos, other),
            llama(q, other, sin),
            split(q, cos[..., ::2], sin[..., ::2]),
            split(k, cos[..., ::2], sin[..., ::2]),
            llama(q.float(), cos, sin).to(q.dtype),
        )

    inputs = _tensors((5, 8), (5, 8), (5, 8), (5, 8), (5, 8))
    module = graph_of(model, inputs)
    roots = next(n for n in module.graph.nodes if n.op == "output").args[0]
    assert len(prove(module)) == 6 + 1 - 1  # the float32 sum before the last cast is no result in x's dtype
    k, *others = [recognise(root) for root in roots]
    reasons = [mismatch(k, q) for q in others]
    words = ["another sin", "another cos", "another cos", "another cos", "other dtypes"]
    for reason, expected in zip(reasons, words, strict=True):
        assert expected in reason
    assert pair(k, others) is None
    assert mismatch(others[3], others[2]) is None
    assert pair(others[3], others) is others[2]


def test_tables_that_were_sliced_twice_are_one_table():
    def model(q, k, cos, sin):
        def split(x, c, s):
            a, b = x[..., ::2], x[..., 1::2]
            return torch.cat((a * c - b * s, b * c + a * s), -1)

        return (
            split(q, cos[..., :4].unsqueeze(1), sin[..., :4].unsqueeze(1)),
            split(k, cos[..., :4], sin[..., :4]),
            split(k * 2, cos.float()[..., :4].to(k.dtype), sin.float()[..., :4].to(k.dtype)),
            split(k * 3, cos.float()[..., :4].to(k.dtype), sin.float()[..., :4].to(k.dtype)),
        )

    q, k, k2, k3 = prove(graph_of(model, _tensors((5, 3, 8), (5, 8), (5, 8), (5, 8))))
    assert mismatch(k, q) is None
    assert q.cos.axes == (0, None, 1)
    assert k.cos.axes == (0, 1)
    assert mismatch(k2, k3) is None
    assert k2.cos.base is not k3.cos.base


def test_random_and_empty_tensors_are_never_the_same_value():
    graph = fx.Graph()
    x = graph.placeholder("x")
    for packet in (torch.ops.aten.cos, torch.ops.aten.rand_like, torch.ops.aten.empty_like, torch.ops.aten.zero_):
        target, equal = packet.default, packet is torch.ops.aten.cos
        assert same_value(graph.call_function(target, (x,)), graph.call_function(target, (x,))) is equal
    assert not same_value(x, graph.placeholder("y"))
    assert not same_value(1, 1.0)


# --- generated -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Variant:
    style: str
    form: str  # "written out" or "rotated"
    layout: str  # of x: [T, R], [T, H, R], [B, H, S, R], [B, S, H, R]
    width: int
    x_dtype: torch.dtype
    table_dtype: str  # "same", "fp32", "bf16", "fp16"
    compute: str  # "as is", "x.float()", "parts.float()", "table.float()"
    round_at: str  # "end", "halves", where it is rounded
    taken: str  # how the parts of x are taken
    tables: str  # "half", "full", "half of full", "full of repeated", "one of both"
    broadcast: str
    flips: tuple[bool, ...]  # operand orders
    minus: str  # "sub", "neg", "neg of both"
    dynamic: bool
    partial: bool
    recompute: bool

    @property
    def shapes(self):
        t, b, h, s, r = 5, 2, 3, 4, self.width
        return {
            "TR": ((t, r), (t,), ()),
            "THR": ((t, h, r), (t,), (1,)),
            "BHSR": ((b, h, s, r), (b, s), (1,)),
            "BSHR": ((b, s, h, r), (b, s), (2,)),
            "HTR": ((h, t, r), (t,), ()),
        }[self.layout]

    @property
    def full(self):
        return self.form == "rotated" or self.tables == "full in two"

    def inputs(self):
        generator = torch.Generator().manual_seed(5)
        shape, lead, _ = self.shapes
        dtypes = {"same": self.x_dtype, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        wide = self.full or self.tables in ("half of full", "one of both")
        table = (*lead, self.width if wide and self.tables != "repeated" else self.width // 2)
        x_shape = (*shape[:-1], shape[-1] + 6) if self.partial else shape
        x = torch.randn(x_shape, generator=generator).to(self.x_dtype)
        cos, sin = (torch.randn(table, generator=generator).to(dtypes[self.table_dtype]) for _ in range(2))
        return x, cos, sin


def mul(v, i, a, b):
    return b * a if v.flips[i] else a * b


def add(v, i, a, b):
    return b + a if v.flips[i] else a + b


def take(v, x):
    """The parts (a, b) of x."""
    n = x.shape[-1] // 2
    if v.style == "neox":
        if v.taken == "slices":
            return x[..., :n], x[..., n:]
        if v.taken == "from the end":
            return x[..., :-n], x[..., -n:]
        if v.taken == "split":
            return x.split(n, -1)
        if v.taken == "sizes":
            return x.split([n, n], -1)
        if v.taken == "unbind":
            return x.unflatten(-1, (2, n)).unbind(-2)
        return x.reshape(*x.shape[:-1], 2, n)[..., 0, :], x.reshape(*x.shape[:-1], 2, n)[..., 1, :]
    if v.taken in ("slices", "split"):
        return x[..., 0::2], x[..., 1::2]
    if v.taken in ("from the end", "sizes"):
        return x[..., : 2 * n : 2], x[..., 1 : 2 * n : 2]
    if v.taken == "unbind":
        return x.unflatten(-1, (n, 2)).unbind(-1)
    return x.reshape(*x.shape[:-1], n, 2)[..., 0], x.reshape(*x.shape[:-1], n, 2)[..., 1]


def join(v, a, b):
    if v.style == "interleaved":
        return torch.stack((a, b), -1).flatten(-2)
    return torch.cat((a, b), -1)


def spread(v, t, rank):
    """A table brought to where it broadcasts against x."""
    for axis in v.shapes[2]:
        if v.broadcast == "unsqueeze":
            t = t.unsqueeze(axis)
        elif v.broadcast == "view":
            t = t.view(*t.shape[:axis], 1, *t.shape[axis:])
        else:
            sizes = list(v.shapes[0][:-1])
            t = t.unsqueeze(axis).expand(*[-1 if i != axis else sizes[i] for i in range(rank)])
    return t


def angles_for(v, cos, sin, rank):
    """cos and sin of the first and of the second result."""
    n = v.width // 2
    if v.compute == "table.float()":
        cos, sin = cos.float(), sin.float()
    if v.tables == "one of both" and v.form == "written out":
        both = torch.cat((cos[..., :n], sin[..., n:]), -1)
        cos, sin = both[..., :n], both[..., n:]
    elif v.tables == "half of full" and v.form == "written out":
        cos, sin = cos[..., :n], sin[..., :n]
    elif v.tables == "repeated" and v.form == "rotated":
        repeat = (
            (lambda t: t.repeat_interleave(2, -1)) if v.style == "interleaved" else (lambda t: torch.cat((t, t), -1))
        )
        cos, sin = repeat(cos), repeat(sin)
    if v.tables == "full in two" and v.form == "written out":
        two = (lambda t: (t[..., ::2], t[..., 1::2])) if v.style == "interleaved" else (lambda t: t.chunk(2, -1))
        return [tuple(spread(v, t, rank) for t in two(table)) for table in (cos, sin)]
    return [(spread(v, t, rank),) * 2 for t in (cos, sin)]


def rotation(v, x, cos, sin):
    if v.partial:
        x = x[..., : v.width]
    original = x
    if v.compute == "x.float()":
        x = x.float()
    (cos_a, cos_b), (sin_a, sin_b) = angles_for(v, cos, sin, x.dim())
    if v.form == "rotated":
        y = x
        if v.style == "interleaved_to_neox":
            y = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
            a, b = take(dataclasses.replace(v, style="neox"), y)
        else:
            a, b = take(v, y)
        if v.minus == "sub":  # rotate_half with the other half negated, and subtracted
            out = mul(v, 0, y, cos_a) - mul(v, 1, join(v, b, -a), sin_a)
        else:
            out = add(v, 2, mul(v, 0, y, cos_a), mul(v, 1, join(v, -b, a), sin_a))
        return out.to(original.dtype)
    a, b = take(v, x)
    again = take(v, x) if v.recompute else (a, b)
    if v.compute == "parts.float()":
        a, b, again = a.float(), b.float(), tuple(t.float() for t in again)
    if v.minus == "sub":
        first = mul(v, 0, a, cos_a) - mul(v, 1, b, sin_a)
    else:
        first = add(v, 2, mul(v, 0, a, cos_a), mul(v, 1, -b, sin_a))
    second = add(v, 3, mul(v, 4, again[1], cos_b), mul(v, 5, again[0], sin_b))
    if v.round_at == "halves":
        return join(v, first.to(original.dtype), second.to(original.dtype))
    return join(v, first, second).to(original.dtype)


variants = st.builds(
    Variant,
    style=st.sampled_from(["neox", "interleaved", "interleaved_to_neox"]),
    form=st.sampled_from(["written out", "rotated"]),
    layout=st.sampled_from(["TR", "THR", "BHSR", "BSHR", "HTR"]),
    width=st.sampled_from([4, 6, 8, 16]),
    x_dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    table_dtype=st.sampled_from(["same", "same", "fp32", "bf16", "fp16"]),
    compute=st.sampled_from(["as is", "as is", "x.float()", "parts.float()", "table.float()"]),
    round_at=st.sampled_from(["end", "halves"]),
    taken=st.sampled_from(["slices", "from the end", "split", "sizes", "unbind", "select"]),
    tables=st.sampled_from(["plain", "half of full", "repeated", "one of both", "full in two"]),
    broadcast=st.sampled_from(["unsqueeze", "view", "expand"]),
    flips=st.tuples(*[st.booleans()] * 6),
    minus=st.sampled_from(["sub", "neg"]),
    dynamic=st.sampled_from([False, False, True]),
    partial=st.booleans(),
    recompute=st.booleans(),
)

_judged = collections.Counter()


def expected_rounding(v, x, cos):
    widened = v.compute in ("x.float()", "table.float()") or (v.compute == "parts.float()" and v.form == "written out")
    promoted = torch.promote_types(x.dtype, cos.dtype)
    return "once" if x.dtype != torch.float32 and (widened or promoted == torch.float32) else "each step"


BUNDLE = 6


def trace(bundle, model):
    """One graph with ``model(item, x, cos, sin)`` for each item of the bundle, whose first entry is its variant."""
    inputs, axes = [], []
    for v, *_ in bundle:
        x, cos, sin = v.inputs()
        inputs.append((x, cos, sin))
        if v.dynamic:
            of_x, of_table = {"TR": (0, 0), "THR": (0, 0), "BHSR": (2, 1), "BSHR": (1, 1), "HTR": (1, 0)}[v.layout]
            axes += [(x, of_x), (cos, of_table), (sin, of_table)]

    def run(*tensors):
        return [model(item, *three) for item, three in zip(bundle, tensors, strict=True)]

    return graph_of(run, inputs, axes), inputs


@GENERATE
@given(st.lists(st.tuples(variants), min_size=BUNDLE, max_size=BUNDLE))
def test_generated_rotations_are_recognised_and_proven(bundle):
    module, inputs = trace(bundle, lambda item, *tensors: rotation(item[0], *tensors))
    ropes = {rope.root: rope for rope in prove(module)}
    for (v,), (x, cos, _), root in zip(bundle, inputs, results_of(module), strict=True):
        found = recognise(root)
        assert root in ropes, f"{v}\n{found and illegal(found)}\n{module.graph}"
        rope = ropes[root]
        assert (rope.style, rope.rounding) == (v.style, expected_rounding(v, x, cos)), v
        assert len(rope.cos.columns) == len(rope.sin.columns) == (v.width if v.full else v.width // 2)
        assert rope.x.target is torch.ops.aten.slice.Tensor if v.partial else rope.x.op == "placeholder"
        _judged["legal"] += 1


# --- one mutation away -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What the twins are made of: x, its parts, and tables that broadcast against them."""

    v: Variant
    x: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor  # as wide as a part
    s: torch.Tensor
    cos: torch.Tensor  # as wide as x
    sin: torch.Tensor

    def out(self, first, second):
        return join(self.v, first, second).to(self.x.dtype)

    def whole(self, turned, cos=None, sin=None):
        """x * cos + turned * sin; of neighbours, unless halves are read."""
        return (self.x * (self.cos if cos is None else cos) + turned * (self.sin if sin is None else sin)).to(
            self.x.dtype
        )


def pieces(v, x, cos, sin):
    a, b = take(v, x)
    repeat = (lambda t: t.repeat_interleave(2, -1)) if v.style == "interleaved" else (lambda t: torch.cat((t, t), -1))
    c, s, wide_c, wide_s = (spread(v, t, x.dim()) for t in (cos, sin, repeat(cos), repeat(sin)))
    return Pieces(v, x, a, b, c, s, wide_c, wide_s)


def other_half(dtype):
    return torch.float16 if dtype == torch.bfloat16 else torch.bfloat16


#: Each mutation, and words of the reason; None where the result is no reading of a rotation at all; True where it is
#: one of other tables, which the proof has to confirm.
TWINS = {
    "first: plus": (lambda p: p.out(p.a * p.c + p.b * p.s, p.b * p.c + p.a * p.s), "no rotation"),
    "second: minus": (lambda p: p.out(p.a * p.c - p.b * p.s, p.b * p.c - p.a * p.s), "no rotation"),
    "second: minus, other order": (lambda p: p.out(p.a * p.c - p.b * p.s, p.a * p.s - p.b * p.c), "no rotation"),
    "backwards": (lambda p: p.out(p.a * p.c + p.b * p.s, p.b * p.c - p.a * p.s), "the other way"),
    "results swapped": (lambda p: p.out(p.b * p.c + p.a * p.s, p.a * p.c - p.b * p.s), "no rotation"),
    "parts swapped": (lambda p: p.out(p.b * p.c - p.a * p.s, p.a * p.c + p.b * p.s), ""),
    "cos and sin swapped": (lambda p: p.out(p.a * p.s - p.b * p.c, p.b * p.s + p.a * p.c), True),
    "cos and sin swapped in one": (lambda p: p.out(p.a * p.c - p.b * p.s, p.b * p.s + p.a * p.c), "different tables"),
    "one part twice": (lambda p: p.out(p.a * p.c - p.a * p.s, p.b * p.c + p.a * p.s), "elements"),
    "stride from the wrong start": (
        lambda p: p.out(p.x[..., ::2] * p.c - p.x[..., ::2] * p.s, p.x[..., ::2] * p.c + p.x[..., ::2] * p.s),
        "elements",
    ),
    "halves and pairs mixed": (
        lambda p: p.out(p.x[..., : p.v.width // 2] * p.c - p.x[..., 1::2] * p.s, p.b * p.c + p.a * p.s),
        "elements",
    ),
    "bounds off by one": (
        lambda p: (
            lambda n: p.out(
                p.x[..., :n] * p.c - p.x[..., n - 1 : -1] * p.s, p.x[..., n - 1 : -1] * p.c + p.x[..., :n] * p.s
            )
        )(p.v.width // 2),
        "elements",
    ),
    "another table": (lambda p: p.out(p.a * p.c - p.b * p.s, p.b * (p.c * 2) + p.a * p.s), "different tables"),
    "another sin": (lambda p: p.out(p.a * p.c - p.b * p.s, p.b * p.c + p.a * (p.s + 1)), "different tables"),
    "shifted angles": (
        lambda p: p.out(
            p.a * p.cos[..., : p.v.width // 2] - p.b * p.s, p.b * p.cos[..., 1 : p.v.width // 2 + 1] + p.a * p.s
        ),
        "different",
    ),
    "another x": (lambda p: p.out(p.a * p.c - p.b * p.s, (p.b + 1) * p.c + p.a * p.s), None),
    "alpha of sub": (lambda p: p.out(torch.sub(p.a * p.c, p.b * p.s, alpha=2), p.b * p.c + p.a * p.s), "alpha=2"),
    "alpha of add": (lambda p: p.out(p.a * p.c - p.b * p.s, torch.add(p.b * p.c, p.a * p.s, alpha=0.5)), "alpha=0.5"),
    "products rounded": (
        lambda p: p.out(
            (p.a * p.c).to(other_half(p.x.dtype)) - (p.b * p.s).to(other_half(p.x.dtype)), p.b * p.c + p.a * p.s
        ),
        None,
    ),
    "half in float64": (lambda p: p.out(p.a.double() * p.c - p.b.double() * p.s, p.b * p.c + p.a * p.s), ""),
    "all in float64": (
        lambda p: p.out(p.a.double() * p.c - p.b.double() * p.s, p.b.double() * p.c + p.a.double() * p.s),
        "",
    ),
    "rounded to the other half": (
        lambda p: join(p.v, p.a * p.c - p.b * p.s, p.b * p.c + p.a * p.s).to(other_half(p.x.dtype)),
        "result is",
    ),
    "rounded on the way": (
        lambda p: p.out(*(t.to(other_half(p.x.dtype)) for t in (p.a * p.c - p.b * p.s, p.b * p.c + p.a * p.s))),
        "result is",
    ),
    "left in float64": (lambda p: p.x.double() * p.cos + _rotate_half(p.x).double() * p.sin, None),
    "sin of another dtype": (
        lambda p: p.out(
            p.a.float() * p.c - p.b.float() * p.s.double().to(other_half(p.c.dtype)),
            p.b.float() * p.c + p.a.float() * p.s.double().to(other_half(p.c.dtype)),
        ),
        "different dtypes",
    ),
    "one angle for all": (
        lambda p: p.out(p.a * p.c[..., :1] - p.b * p.s[..., :1], p.b * p.c[..., :1] + p.a * p.s[..., :1]),
        "angles",
    ),
    "result times two": (lambda p: p.out(p.a * p.c - p.b * p.s, p.b * p.c + p.a * p.s) * 2, None),
    "second scaled": (lambda p: p.out(p.a * p.c - p.b * p.s, (p.b * p.c + p.a * p.s) * 2), None),
    "three results": (lambda p: torch.cat((p.a * p.c - p.b * p.s, p.b * p.c + p.a * p.s, p.a), -1), None),
    "rotate_half: no minus": (lambda p: p.whole(_rotate_half(p.x).abs()), None),
    "rotate_half: both plus": (lambda p: p.whole(torch.cat(p.x.chunk(2, -1)[::-1], -1)), "no rotation"),
    "rotate_half: minus on the other": (
        lambda p: p.whole(torch.cat((p.x.chunk(2, -1)[1], -p.x.chunk(2, -1)[0]), -1)),
        "the other way",
    ),
    "rotate_half: halves not swapped": (
        lambda p: p.whole(torch.cat((-p.x.chunk(2, -1)[0], p.x.chunk(2, -1)[1]), -1)),
        "elements",
    ),
    "rotate_half: roll": (lambda p: p.whole(p.x.roll(p.v.width // 2, -1)), None),
    "rotate_half: odd elements before even ones": (
        lambda p: p.whole(torch.cat((-p.x[..., 1::2], p.x[..., ::2]), -1)),
        "elements",
    ),
    "rotate_half: of another tensor": (lambda p: p.whole(_rotate_half(p.x + 1)), None),
    "rotate_half: a third and two thirds": (
        lambda p: p.whole(torch.cat((-p.x[..., 1:], p.x[..., :1]), -1)),
        "elements",
    ),
    "rotate_half: alpha": (lambda p: torch.add(p.x * p.cos, _rotate_half(p.x) * p.sin, alpha=3), "alpha=3"),
    "rotate_half: subtracted": (lambda p: p.x * p.cos - _rotate_half(p.x) * p.sin, "the other way"),
    "rotate_half: cos and sin swapped": (lambda p: p.whole(_rotate_half(p.x), p.sin, p.cos), True),
    "rotate_half: sin negated": (lambda p: p.whole(_rotate_half(p.x), sin=-p.sin), "broadcast in different ways"),
    "rotate_half: x negated": (lambda p: (-p.x * p.cos + _rotate_half(p.x) * p.sin).to(p.x.dtype), None),
    "addcmul": (lambda p: torch.addcmul(p.x * p.cos, _rotate_half(p.x), p.sin), None),
}
EXPLAINED = {"addcmul": "addcmul", "products rounded": "is rounded to", "rotate_half: of another tensor": "spelling"}

plain = st.builds(
    dataclasses.replace,
    variants,
    form=st.just("written out"),
    tables=st.just("plain"),
    partial=st.just(False),
    width=st.sampled_from([6, 8, 16]),
    compute=st.just("as is"),
    table_dtype=st.sampled_from(["same", "fp32"]),
    dynamic=st.just(False),
)


def check_twins(bundle):
    module, _ = trace(bundle, lambda item, *tensors: TWINS[item[1]][0](pieces(item[0], *tensors)))
    legal = {rope.root for rope in prove(module)}
    for (v, name), root in zip(bundle, results_of(module), strict=True):
        words, rope = TWINS[name][1], recognise(root)
        where = f"{name} {v}\n{rope and (rope.spelling, illegal(rope))}"
        if words is True:
            assert root in legal, where
        elif words is None:
            assert rope is None, where
            assert EXPLAINED.get(name, "") in (explain(root) or ""), where
        else:
            assert root not in legal, where
            if rope is not None:
                assert words in illegal(rope), where
            else:
                assert not words, where
        _judged["illegal"] += 1


PLAIN = Variant(
    style="neox",
    form="written out",
    layout="BHSR",
    width=8,
    x_dtype=torch.bfloat16,
    table_dtype="same",
    compute="as is",
    round_at="end",
    taken="slices",
    tables="plain",
    broadcast="unsqueeze",
    flips=(False,) * 6,
    minus="sub",
    dynamic=False,
    partial=False,
    recompute=False,
)
#: Those that are made for any style: the others spell rotate_half, which is that of one style.
OF_ANY_STYLE = [name for name in TWINS if not name.startswith(("rotate_half", "addcmul", "left in"))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_mutation_of_a_rotation_has_its_reason(dtype):
    v = dataclasses.replace(PLAIN, x_dtype=dtype)
    check_twins([(v, name) for name in TWINS])


@GENERATE
@given(st.lists(st.tuples(plain, st.sampled_from(OF_ANY_STYLE)), min_size=BUNDLE, max_size=BUNDLE))
def test_generated_mutations_are_refused(bundle):
    check_twins(bundle)


def test_other_axes_and_odd_widths_are_refused():
    def other_axis(x, cos, sin):
        a, b = x.chunk(2, -2)
        cos, sin = cos[:2].repeat(1, 2), sin[:2].repeat(1, 2)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -2)

    def joined_on_other_axis(x, cos, sin):
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -2)

    def stacked_on_other_axis(x, cos, sin):
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), 1).view(x.shape)

    def odd(x, cos, sin):
        x = x[..., :7]
        return x * cos[..., :1] + torch.cat((-x[..., 3:], x[..., :3]), -1) * sin[..., :1]

    def tables_on_other_axes(x, cos, sin):
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos[:, None] - b * sin[:, None], b * cos[None] + a * sin[None]), -1)

    def broadcast_by_the_tables(x, cos, sin):
        a, b = x[:1].chunk(2, -1)
        cos, sin = cos[:, None], sin[:, None]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def wider(x, cos, sin):
        a, b = x[..., :2], x[..., 2:4]
        return torch.cat((a * cos[..., :2] - b * sin[..., :2], b * cos[..., :2] + a * sin[..., :2]), -1)

    def halves_to_pairs(x, cos, sin):
        a, b = x.chunk(2, -1)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)

    for model, words in (
        (other_axis, "elements"),
        (joined_on_other_axis, "axis"),
        (stacked_on_other_axis, "axis"),
        (odd, "odd"),
        (tables_on_other_axes, "broadcast in different ways"),
        (broadcast_by_the_tables, "another shape"),
        (wider, "elements"),
        (halves_to_pairs, "no style"),
    ):
        module = graph_of(model, _tensors((4, 4, 8), (4, 4), (4, 4)))
        assert not prove(module), model.__name__
        rope = recognise(result_of(module))
        assert rope is None or words in illegal(rope), f"{model.__name__}: {illegal(rope)}"
        assert rope is not None or model in (other_axis, stacked_on_other_axis)


def test_one_result_in_float32_and_one_in_bfloat16_is_refused():
    def model(x, cos, sin):
        a, b = x.chunk(2, -1)
        return torch.cat((a.float() * cos - b.float() * sin, b * cos + a * sin), -1).to(x.dtype)

    module = graph_of(model, _tensors((5, 8), (5, 4), (5, 4)))
    assert not prove(module)
    assert "rounded to different dtypes" in illegal(recognise(result_of(module)))


def test_what_looks_like_no_rotation_is_not_explained():
    def model(x, cos, sin):
        return x * cos + sin, torch.cat((x, cos), -1), (x[..., :4] * 2).relu()

    for root in results_of(graph_of(model, _tensors((4, 8), (4, 8), (4, 8)))):
        assert recognise(root) is None
        assert explain(root) is None


def test_at_least_a_hundred_and_fifty_variants_were_judged():
    """Runs after those above, in file order."""
    assert _judged["legal"] >= 40, _judged
    assert _judged["illegal"] >= 110, _judged
