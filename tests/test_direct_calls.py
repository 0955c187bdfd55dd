"""Generated code calls our ops without the dispatcher, with the same results, and whoever watches still sees them."""

import re

import pytest
import torch
from helpers import calls_in
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

from fusionpasses import fusion_backend
from fusionpasses.ops import DIRECT, OPS

ours = torch.ops.fusionpasses


def quantized(x):
    codes, scales = ours.dynamic_mxfp4_quant(x * 2)
    return codes + 1, scales


def product(x):
    weight = ours.dynamic_mxfp4_quant(x.flip(0).contiguous())
    return ours.mxfp4_gemm(*ours.dynamic_mxfp4_quant(x), *weight, None, out_dtype=x.dtype)


def cache_write(x):
    cache = x.new_zeros(8, 64)
    ours.concat_and_cache_mla(x[:, :48].contiguous(), x[:, 48:].contiguous(), cache, torch.arange(len(x)))
    return cache * 2


MODELS = {"dynamic_mxfp4_quant": quantized, "mxfp4_gemm": product, "concat_and_cache_mla": cache_write}


def compiled_and_code(model, x, **kwargs):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=fusion_backend(), fullgraph=True, **kwargs)
    with fresh_cache(), torch.no_grad():
        got, (code,) = run_and_get_code(compiled, x)
    return compiled, got, code


def assert_equal(got, want):
    for one, two in zip(*(value if isinstance(value, tuple) else (value,) for value in (got, want)), strict=True):
        assert torch.equal(one, two)
        assert one.stride() == two.stride()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_generated_code_goes_straight_to_the_op(name, dynamic):
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    compiled, got, code = compiled_and_code(MODELS[name], x, dynamic=dynamic)
    assert_equal(got, MODELS[name](x))
    body = code[code.index("def call(") :]
    sites = set(re.findall(r"\bfusionpasses_\w+_default_[0-9a-f]{16}(?=\()", body))
    if dynamic:
        assert not sites
        assert f"fusionpasses.{name}.default(" in body
    else:
        assert "fusionpasses.dynamic_mxfp4_quant.default(" not in body
        assert any(site.startswith(f"fusionpasses_{name}_default_") for site in sites)
        for site in sites:
            assert (
                len(re.findall(rf"^{site} = fusionpasses\.site\('\w+\.default', \(torch\.\w+, 'cpu', \(", code, re.M))
                == 1
            )
    for rows in (3, 7):
        x = torch.randn(rows, 64, dtype=torch.bfloat16)
        with torch.no_grad():
            assert_equal(compiled(x), MODELS[name](x))


def test_equal_calls_share_a_site_and_others_do_not():
    def model(x, y):
        one, two = ours.dynamic_mxfp4_quant(x * 2), ours.dynamic_mxfp4_quant(y * 3)
        other = ours.dynamic_mxfp4_quant(x * 2, scale_mode="rceil")
        return *one, *two, *other

    def sites_of(x, y):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=fusion_backend(), fullgraph=True, dynamic=False)
        with fresh_cache(), torch.no_grad():
            got, (code,) = run_and_get_code(compiled, x, y)
        assert_equal(got, model(x, y))
        return re.findall(r"= (fusionpasses_\w+)\(", code)

    x, y = torch.randn(5, 64).bfloat16(), torch.randn(5, 64).bfloat16()
    one, two, other = sorted(sites_of(x, y), key=sites_of(x, y).count, reverse=True)
    assert one == two != other
    # Code is shared among graphs by its text, which a dtype that nothing else tells must therefore be in.
    assert not {one, other} & set(sites_of(x.half(), y.half()))
    assert not {one, other} & set(sites_of(x[:4], y[:4]))


def test_an_argument_by_name_makes_another_site():
    weight = torch.ones(64, dtype=torch.bfloat16)

    def model(x):
        plain = ours.rmsnorm_mxfp4_quant(x, weight, 1e-6, cast_order="cast_scale")
        wide = ours.rmsnorm_mxfp4_quant(x, weight, 1e-6, cast_order="cast_scale", norm_dtype=torch.float32)
        return *plain, *wide

    x = torch.randn(5, 64, dtype=torch.bfloat16)
    _, got, code = compiled_and_code(model, x)
    assert_equal(got, model(x))
    assert len(set(re.findall(r"= (fusionpasses_\w+)\(", code))) == calls_in(code, "rmsnorm_mxfp4_quant") == 2


def test_a_tensor_by_name_is_shared_by_equal_calls():
    def model(x, caches, scale):
        for cache in caches:
            ours.concat_and_cache_mla(
                x[:, :48].contiguous(), x[:, 48:].contiguous(), cache, torch.arange(len(x)), cache_scale=scale
            )
        return x + 1

    def arguments():
        caches = [torch.zeros(8, 64, dtype=torch.float8_e4m3fn) for _ in range(2)]
        return torch.ones(5, 64, dtype=torch.bfloat16), caches, torch.full((), 2.0)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=fusion_backend(), fullgraph=True)
    got, want = arguments(), arguments()
    with fresh_cache(), torch.no_grad():
        _, (code,) = run_and_get_code(compiled, *got)
        model(*want)
    for one, two in zip(got[1], want[1], strict=True):
        assert torch.equal(one.view(torch.uint8), two.view(torch.uint8))
    assert calls_in(code, "concat_and_cache_mla.default") == 2
    assert len(set(re.findall(r"\b(fusionpasses_concat_and_cache_mla_\w+)\(", code))) == 1


def test_a_symbolic_stride_makes_no_site():
    def model(x):
        return ours.dynamic_mxfp4_quant(x[:, :64])

    x = torch.randn(5, 96, dtype=torch.bfloat16)
    torch._dynamo.mark_dynamic(x, 1)
    compiled, got, code = compiled_and_code(model, x)
    assert_equal(got, model(x))
    assert "fusionpasses.dynamic_mxfp4_quant.default(" in code
    wider = torch.randn(5, 160, dtype=torch.bfloat16)
    with torch.no_grad():
        assert_equal(compiled(wider), model(wider))


def test_lowerings_are_what_inductor_makes_of_a_custom_op():
    """But for the call: tensors have the strides that the op's tag asks for."""
    from torch._inductor import lowering
    from torch._library.utils import get_layout_constraint_tag

    compiled_and_code(quantized, torch.randn(5, 64, dtype=torch.bfloat16))
    for op in OPS.values():
        tag = get_layout_constraint_tag(op.overload, with_default=True)
        assert lowering._maybe_layout_constraints[op.overload] is lowering.tag_to_layout_constraint(tag)
        assert lowering.lowerings[op.overload]._is_fallback_handler


def test_what_is_symbolic():
    import sympy

    from fusionpasses.direct_calls import _is_symbolic

    s = sympy.Symbol("s0", integer=True)
    assert all(map(_is_symbolic, (s, s + 1, 2 * s // 3)))
    assert not any(map(_is_symbolic, (3, sympy.Integer(3), 1e-6, None, "even", torch.bfloat16, True)))


def test_without_asserts_on_sizes_there_are_no_sites():
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    _, got, code = compiled_and_code(quantized, x, options={"size_asserts": False})
    assert_equal(got, quantized(x))
    assert "fusionpasses.dynamic_mxfp4_quant.default(" in code


def test_every_op_has_its_direct_call():
    for name, op in OPS.items():
        packet, overload = name.split(".")
        assert str(op.overload) == f"fusionpasses.{name}"  # what is written into generated code
        assert callable(getattr(getattr(DIRECT, packet), overload))


def test_a_direct_call_checks_its_arguments():
    with pytest.raises(Exception, match="x"):
        DIRECT.dynamic_mxfp4_quant.default(torch.zeros(2, 33))


def test_a_profiler_sees_the_op():
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    compiled, *_ = compiled_and_code(quantized, x)
    with torch.no_grad(), torch.profiler.profile() as profiler:
        compiled(x)
    assert "fusionpasses::dynamic_mxfp4_quant" in {event.name for event in profiler.events()}


def test_a_dispatch_mode_sees_the_op():
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    compiled, *_ = compiled_and_code(quantized, x)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        DIRECT.dynamic_mxfp4_quant.default(x)
        assert seen == [ours.dynamic_mxfp4_quant.default]
    with torch.no_grad():
        assert_equal(compiled(x), quantized(x))


def test_with_cpp_wrapper_the_dispatcher_is_asked():
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    _, got, code = compiled_and_code(quantized, x, options={"cpp_wrapper": True})
    assert_equal(got, quantized(x))
    assert "DIRECT" not in code


def test_plain_inductor_asks_the_dispatcher():
    """Its cache would hand the code to another version of this package."""
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    compiled_and_code(quantized, x)
    torch._dynamo.reset()
    with torch.no_grad(), fresh_cache():
        got, (code,) = run_and_get_code(torch.compile(product, fullgraph=True), x)
    assert_equal(got, product(x))
    assert "DIRECT" not in code
    assert "= torch.ops.fusionpasses.mxfp4_gemm.default(" in code
