"""The pass of copies that a quant does not need: what fires changes no byte, and twins that must not fire."""

import dataclasses

import pytest
import torch
from helpers import calls_in
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

import fusionpasses as fp
from fusionpasses import anchors, providers
from fusionpasses.patterns import pass_class
from fusionpasses.report import FUSED, NOTHING
from fusionpasses.testing import assert_equivalent, capture

PASS = "dynamic_mxfp4_quant"
quant = torch.ops.fusionpasses.dynamic_mxfp4_quant
aten = torch.ops.aten

GENERATE = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow],
)


def bf16(*shape):
    return torch.randn(*shape, dtype=torch.bfloat16)


def run(model, *inputs, **options):
    """Proven equivalent: what is said of the sites, and the targets of the graph after the passes."""
    with torch.no_grad():
        result = assert_equivalent(model, inputs, **options)
    targets = [str(node.target) for captured in result.graphs for node in captured.after.graph.nodes]
    return result.report.sites(), targets


def is_fused(sites, targets, quants=1):
    (site,) = sites
    copied = "aten.clone.default" in targets
    assert (site.status == FUSED) == (not copied)
    if site.status == FUSED:
        assert (site.pass_name, site.op, site.provider) == (PASS, f"{PASS}.default", "reference")
        assert len(site.anchors) == quants
        assert targets.count(f"fusionpasses.{PASS}.default") == 1
    return site.status == FUSED


# --- what fires -------------------------------------------------------------------------------------------------------

HEADS, TOKENS, WIDTH, LATENT = 4, 5, 64, 16


def heads_first():
    return bf16(HEADS, TOKENS, LATENT), bf16(HEADS, LATENT, WIDTH)


def join(x):
    """``[heads, tokens, width]`` to rows of all heads."""
    return x.transpose(0, 1).reshape(x.shape[1], -1)


FIRES = {
    "reshape": lambda a, b: quant(join(a @ b)),
    "contiguous, view": lambda a, b: quant((a @ b).transpose(0, 1).contiguous().view(TOKENS, -1)),
    "clone, flatten": lambda a, b: quant(
        (a @ b).transpose(0, 1).clone(memory_format=torch.contiguous_format).flatten(1)
    ),
    "permute": lambda a, b: quant((a @ b).permute(1, 0, 2).reshape(1, TOKENS, -1)),
    "heads kept apart": lambda a, b: quant((a @ b).transpose(0, 1).contiguous()),
    "rows kept apart": lambda a, b: quant((a @ b).transpose(0, 1).reshape(-1, WIDTH)),
    "rows in two views": lambda a, b: quant(join(a @ b).view(TOKENS, 2, -1).view(-1, 2 * WIDTH)),
    "narrower rows": lambda a, b: quant((a @ b).transpose(0, 1).reshape(-1, 32)),
    "views of the quantised rows": lambda a, b: quant(join(a @ b).unsqueeze(0).unsqueeze(2)),
    "another scale mode": lambda a, b: quant(join(a @ b), "rceil"),
    "a part of the columns": lambda a, b: quant(join((a @ b)[..., 32:])),
    "a part of the tokens": lambda a, b: quant(join((a @ b)[:, 1:4])),
    "the product is read elsewhere": lambda a, b: (lambda y: (quant(join(y)), y, y + 1))(a @ b),
    "an axis of one": lambda a, b: quant((a @ b).view(2, 2, TOKENS, WIDTH)[:, :1].permute(2, 0, 1, 3).flatten(1)),
    "baddbmm": lambda a, b: quant(join(torch.baddbmm(b[:, :1], a, b))),
    "mm": lambda a, b: quant(join((a.flatten(0, 1) @ b[0]).view(HEADS, TOKENS, WIDTH))),
    "an input": lambda a, b: quant(join(b)),
}


@pytest.mark.parametrize("case", FIRES)
def test_a_copy_is_left_out(case):
    torch.manual_seed(0)
    assert is_fused(*run(FIRES[case], *heads_first()))


def test_what_an_op_gives_that_is_not_torchs_is_read_where_it_lies():
    def model(x, weight):
        y = torch.ops.fusionpasses.mxfp4_gemm(*quant(x), *quant(weight), out_dtype=x.dtype)
        return quant(join(y.view(HEADS, TOKENS, WIDTH)))

    sites, targets = run(model, bf16(HEADS * TOKENS, 64), bf16(WIDTH, 64))
    assert [site.notes for site in sites if site.status == FUSED] == [
        ("reads the rows of fusionpasses.mxfp4_gemm.default where they lie, without the copy that put them in order",)
    ]
    assert "aten.clone.default" not in targets


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(dtype):
    assert is_fused(*run(FIRES["reshape"], *(x.to(dtype) for x in heads_first())))


def test_two_quants_of_one_copy_become_one():
    def model(a, b):
        y = join(a @ b)
        return *quant(y), *quant(y.view(-1, 1, HEADS * WIDTH))

    assert is_fused(*run(model, *heads_first()), quants=2)


def test_tokens_may_be_dynamic():
    a, b = heads_first()
    torch._dynamo.mark_dynamic(a, 1)
    torch._dynamo.mark_static(b)
    sites, targets = run(lambda a, b: quant((a @ b).transpose(0, 1).reshape(a.shape[1], HEADS * WIDTH)), a, b)
    assert is_fused(sites, targets)


class Attended(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.proj = nn.Linear(HEADS * width, 32, bias=False, dtype=torch.bfloat16)
        fp.quantize_mxfp4(self)

    def forward(self, a, b):
        return self.proj(join(self.between(a @ b)))

    def between(self, x):
        return x


@pytest.mark.parametrize("dynamic", [False, True])
def test_generated_code_has_no_copy(dynamic):
    model, inputs = Attended(), heads_first()
    if dynamic:
        torch._dynamo.mark_dynamic(inputs[0], 1)
    eager = model(*inputs)
    for passes, kernels in ((None, 0), ((), 1)):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=fp.fusion_backend(passes=passes))
        with torch.no_grad(), torch._inductor.utils.fresh_cache():
            output, (code,) = run_and_get_code(compiled, *inputs)
        assert torch.equal(output, eager)
        body = code[code.index("def call(") :]
        assert body.count("cpp_fused") == kernels, code
        assert calls_in(code, f"{PASS}.default") == calls_in(code, "mxfp4_gemm.default") == 1


def test_what_is_written_later_is_read_before():
    """The quant takes the place of the copy."""

    def model(x, y):
        copied = join(x)
        x.add_(1)
        return quant(copied), y + 1

    assert is_fused(*run(model, bf16(HEADS, TOKENS, WIDTH), bf16(3)))
    x = bf16(HEADS, TOKENS, WIDTH)
    want = quant(join(x))
    with torch.no_grad():
        (got, _) = torch.compile(model, backend=fp.fusion_backend())(x, bf16(3))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@dataclasses.dataclass
class Layout:
    """A bmm's result ``[heads, tokens, width]`` seen through views, copied, and its rows joined or cut."""

    heads: int
    tokens: int
    width: int
    order: tuple[int, ...]
    first_token: int
    first_column: int
    rows: int  # of each token

    def model(self, a, b):
        y = (a @ b)[:, self.first_token :, self.first_column :]
        y = y.permute(*self.order, 2)
        return quant(y.contiguous().view(-1, y.numel() // (y.shape[0] * self.rows)), "floor")


@st.composite
def layouts(draw):
    width = draw(st.sampled_from((32, 64, 96, 160)))
    heads, tokens = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    return Layout(
        heads,
        tokens,
        width,
        tuple(draw(st.permutations((0, 1)))),
        draw(st.integers(0, tokens - 1)),
        draw(st.sampled_from((0, 0, 0, 32, 2, 1))) % width,
        draw(st.sampled_from((1, 1, 2))),
    )


@GENERATE
@given(layouts())
def test_generated_layouts(layout):
    heads, tokens, width = layout.heads, layout.tokens - layout.first_token, layout.width - layout.first_column
    first = (heads, tokens)[layout.order[0]]
    whole = heads * tokens * width
    if whole % (first * layout.rows) or whole // (first * layout.rows) % 32:
        return
    torch.manual_seed(0)
    inputs = bf16(heads, layout.tokens, LATENT), bf16(heads, LATENT, layout.width)
    sites, targets = run(layout.model, *inputs, dynamic=False)
    # Two axes that are one in memory, or of size 1, have one distance.
    two = heads > 1 and tokens > 1 and (layout.order == (1, 0) or tokens != layout.tokens)
    (site,) = sites
    fires = two and width % 32 == 0
    assert (site.status == FUSED) == fires, (layout, site)
    assert ("aten.clone.default" in targets) == ("copied" in site.reason)


# --- twins that must not fire -----------------------------------------------------------------------------------------


def _returned(a, b):
    y = join(a @ b)
    return quant(y), y


def _summed(a, b):
    y = (a @ b).transpose(0, 1).contiguous()
    return quant(y.view(TOKENS, -1)), y.sum()


def _two_modes(a, b):
    y = join(a @ b)
    return quant(y), quant(y, "rceil")


LEFT = {
    "the copy is returned": (_returned, "output also reads the copy"),
    "the copy is summed": (_summed, "also reads the copy"),
    "two scale modes": (_two_modes, "also reads the copy"),
    "narrow heads": (lambda a, b: quant(join((a @ b)[..., :16])), "is 16, no static multiple of 32"),
    "odd heads": (lambda a, b: quant(join((a @ b)[..., :48]).view(-1, 64)), "is 48, no static multiple of 32"),
    "columns": (lambda a, b: quant((a @ b).transpose(1, 2).reshape(-1, 160)), "is 5, no static multiple of 32"),
    "every second column": (lambda a, b: quant(join((a @ b)[..., ::2])), "are 2 apart in memory"),
    "one distance": (lambda a, b: quant((a @ b)[..., 32:].flatten(1)), "rows that lie at two distances"),
    "three distances": (
        lambda a, b: quant((a @ b).view(2, 2, TOKENS, WIDTH)[:, :, :4].permute(1, 2, 0, 3)[:, ::2].flatten(2)),
        "rows that lie at two distances",
    ),
    "off words": (lambda a, b: quant(join((a @ b)[..., 1:33])), "off a multiple of 4 bytes"),
    "after a cast": (lambda a, b: quant(join((a @ b).float())), "after prims.convert_element_type.default"),
    "before a cast": (lambda a, b: quant(join(a @ b).float()), "prims.convert_element_type.default, not from"),
    "as other numbers": (lambda a, b: quant(join(a @ b).view(torch.float16)), "aten.view.dtype, not from"),
    "a relu in front": (lambda a, b: quant(join((a @ b).relu())), "after aten.relu.default, which Inductor may do"),
    "a cat in front": (lambda a, b: quant(join(torch.cat([a @ b, a @ b]))), "after aten.cat.default"),
    "a copy in order": (lambda a, b: quant((a @ b).clone()), "aten.bmm.default, not from"),
    "no copy": (lambda a, b: quant((a @ b).transpose(0, 1)), "aten.permute.default, not from"),
    "a product": (lambda a, b: quant(a @ b), "aten.bmm.default, not from"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_has_its_reason(case):
    model, reason = LEFT[case]
    torch.manual_seed(0)
    with torch.no_grad():
        result = capture(model, heads_first())
    assert result.comparison.unequal == 0
    for site in result.report.sites():
        assert site.status == NOTHING, str(result.report)
        assert reason in site.reason, str(result.report)
    (captured,) = result.graphs
    assert captured.report.ops_before == captured.report.ops_after


def test_a_dynamic_width_is_left():
    a, b = heads_first()
    torch._dynamo.mark_dynamic(b, 2)

    def model(a, b):
        torch._check(b.shape[2] % 32 == 0)
        return quant(join(a @ b))

    sites, targets = run(model, a, b)
    assert not is_fused(sites, targets)
    assert "no static multiple of 32" in sites[0].reason


def test_a_dynamic_number_of_heads_is_left():
    a, b = heads_first()
    for x in (a, b):
        torch._dynamo.mark_dynamic(x, 0)
    sites, targets = run(FIRES["reshape"], a, b)
    assert not is_fused(sites, targets)
    assert "the last axis of the copy is dynamic" in sites[0].reason


@pytest.fixture
def foreign(monkeypatch):
    """A quant of somebody else's, registered."""
    monkeypatch.setattr(anchors, "_registered", dict(anchors._registered))
    with torch.library._scoped_library("copies_test", "FRAGMENT") as library:
        library.define("quant(Tensor x) -> (Tensor, Tensor)")
        library.impl("quant", lambda x: quant(x), "CompositeExplicitAutograd")
        torch.library.register_fake("copies_test::quant", lambda x: quant(x), lib=library)
        fp.register_anchor(torch.ops.copies_test.quant.default, scale_mode="even")
        yield torch.ops.copies_test.quant.default


def test_a_foreign_quant_is_left(foreign):
    sites, targets = run(lambda a, b: foreign(join(a @ b)), *heads_first())
    assert not is_fused(sites, targets)
    assert "it is not known in which strides copies_test::quant" in sites[0].reason

    def both(a, b):
        y = join(a @ b)
        return *foreign(y), *quant(y)

    sites, targets = run(both, *heads_first())
    assert [site.status for site in sites] == [NOTHING, NOTHING]
    assert sum("also reads the copy, which is made for it anyway" in site.reason for site in sites) == 1
    assert "aten.clone.default" in targets


def judged(*chosen: str) -> fx.Graph:
    """A graph of quants of one copy, which name these providers. Nobody asks whether these are here."""

    def model(a, b):
        y = join(torch.bmm(a, b))
        return [quant(y) for _ in chosen]

    graph = make_fx(model, tracing_mode="fake")(*heads_first()).graph
    names = iter(chosen)
    for node in graph.nodes:
        if node.target is quant.default:
            node.update_kwarg("provider", next(names))
    return graph


def sites_of(graph: fx.Graph):
    fusion_pass = pass_class(PASS)(fp.FusionConfig(), anchors.registered_anchors())
    fusion_pass.run(graph)
    graph.lint()
    return fusion_pass.sites


def test_a_copy_of_rows_in_order_is_none():
    graph = make_fx(lambda a, b: quant(torch.bmm(a, b).clone().view(TOKENS, -1)), tracing_mode="fake")(*heads_first())
    (site,) = sites_of(graph.graph)
    assert site.reason.endswith("not from a copy of rows")


def test_aiter_wants_rows():
    (site,) = sites_of(judged("triton"))
    assert (site.status, site.provider) == (FUSED, "triton")
    for provider in providers.LEVELS:
        (site,) = sites_of(judged(provider))
        assert (site.status, site.provider) == (NOTHING, "")
        assert site.reason == f"rows are copied for it: {provider} runs the quant, and AITER takes rows at one distance"


def test_one_provider_runs_the_one_quant():
    for chosen in (("triton", "reference"), ("triton", "aiter_fast")):
        (site,) = sites_of(judged(*chosen))
        assert (site.status, len(site.anchors)) == (NOTHING, 2)
        assert site.reason == f"rows are copied for it: its quants are run by {chosen[0]} and by {chosen[1]}"
    (site,) = sites_of(judged("triton", "triton"))
    assert (site.status, len(site.anchors)) == (FUSED, 2)
