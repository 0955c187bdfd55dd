"""Cache writes by ops: one registered by the user, and calls functionalised by either of torch's wrappers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_fused_rope_mla_kv_cache import EAGER_ROUNDINGS, LATENT, ROPE, neox
from torch import Tensor

import fusionpasses as fp
from fusionpasses import anchors
from fusionpasses.testing import Capture, assert_equivalent

FUSED_OP = "fused_rope_mla_kv_cache"
FLOAT8 = torch.float8_e4m3fn
TOKENS = 6


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An op with the schema and meaning of vLLM's, and a registry of anchors that forgets it afterwards."""
    monkeypatch.setattr(anchors, "_registered", dict(anchors._registered))
    with torch.library._scoped_library("test_rope_vllm", "FRAGMENT") as library:
        rows = "Tensor kv_c, Tensor k_pe, Tensor(a!) kv_cache, Tensor slot_mapping"
        library.define(f"concat_and_cache_mla({rows}, str kv_cache_dtype, Tensor scale) -> ()")
        library.define(f"with_more({rows}, Tensor? scale=None, int tile=16, float scale_number=1.0) -> ()")
        library.define(f"returning({rows}) -> Tensor")
        library.define("mutating_slots(Tensor kv_c, Tensor k_pe, Tensor kv_cache, Tensor(a!) slots) -> ()")
        library.define("short(Tensor kv_c, Tensor(a!) kv_cache) -> ()")
        library.define("pure(Tensor x) -> Tensor")

        def write(kv_c, k_pe, kv_cache, slots, kv_cache_dtype="auto", scale=None):
            for i, slot in enumerate(slots.tolist()):
                if slot < 0:
                    continue
                row = torch.cat([kv_c[i], k_pe[i].flatten()])
                if kv_cache_dtype != "auto":
                    row = (row.float() / scale).clamp(-448, 448).to(FLOAT8).view(torch.uint8)
                kv_cache.view(-1, kv_cache.shape[-1])[slot] = row

        library.impl("concat_and_cache_mla", write, "CPU")
        library.impl("concat_and_cache_mla", lambda *args: None, "Meta")
        library.impl("with_more", lambda *args: write(*args[:4]), "CPU")
        library.impl("with_more", lambda *args: None, "Meta")
        yield torch.ops.test_rope_vllm


def register(vllm: Any) -> None:
    fp.register_cache_write_anchor(vllm.concat_and_cache_mla, cache_dtype="kv_cache_dtype", cache_scale="scale")


def inputs_for(cache: torch.dtype = torch.bfloat16, numbers: tuple[int, ...] = (7, -1, 0, 11, 7, -3)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    angle = torch.rand(TOKENS, 1, ROPE // 2, generator=generator) * 6
    angle = torch.cat([angle, angle], -1)
    stacked = random(3, 4, 4, LATENT + ROPE)
    stacked = stacked.to(FLOAT8).view(torch.uint8) if cache is torch.uint8 else stacked.to(cache)
    rows = [random(TOKENS, 4, ROPE), random(TOKENS, 1, ROPE), random(TOKENS, LATENT)]
    return [*rows, angle.cos().bfloat16(), angle.sin().bfloat16(), torch.tensor(numbers), torch.tensor([0.5]), stacked]


def layers(op: Any, *more: Any, squeeze: bool = True, **keywords: Any) -> Any:
    """Two layers that write with ``op`` into their part of a stacked cache."""

    def step(q: Tensor, k: Tensor, kv_c: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, scale: Tensor, cache: Tensor):
        outputs = []
        for layer in range(2):
            k1 = neox(k + layer, cos, sin)
            given = [scale if a == "scale" else a for a in more]
            op(kv_c + layer, k1[:, 0] if squeeze else k1, cache[layer + 1], slots, *given, **keywords)
            outputs.append(neox(q + layer, cos, sin) + cache.float().mean())
        return outputs

    return step


def run(step: Any, inputs: list[Tensor], **options: Any) -> Capture:
    return assert_equivalent(step, inputs, fullgraph=True, options={**EAGER_ROUNDINGS, **options})


def reasons(result: Capture) -> set[str]:
    assert not result.report.fused, result.report
    assert len(result.report.refused) == 2, result.report
    return {site.reason for site in result.report.refused}


@pytest.mark.parametrize("v2", [True, False], ids=["auto_functionalized_v2", "auto_functionalized"])
@pytest.mark.parametrize(
    ("kind", "cache", "scale"),
    [("auto", torch.bfloat16, False), ("fp8", torch.uint8, True), ("fp8_e4m3", torch.uint8, True)],
)
def test_a_registered_op_fuses_and_skips_negative_slots(
    vllm: Any, kind: str, cache: torch.dtype, scale: bool, v2: bool
) -> None:
    register(vllm)
    step = layers(vllm.concat_and_cache_mla, kind, "scale")
    result = run(step, inputs_for(cache), enable_auto_functionalized_v2=v2)
    (graph,) = result.graphs
    assert [site.op for site in graph.report.sites] == [f"{FUSED_OP}.default"] * 2, graph.report
    wrapper = "auto_functionalized_v2" if v2 else "auto_functionalized"
    assert any(getattr(node.target, "__name__", "") == wrapper for node in graph.before.graph.nodes)
    calls = [n for n in graph.after.graph.nodes if n.args and str(n.args[0]).startswith(f"fusionpasses.{FUSED_OP}")]
    assert [n.kwargs["negative_slots"] for n in calls] == ["skip"] * 2
    assert [n.kwargs["cache_scale"] is not None for n in calls] == [scale] * 2
    assert [n.kwargs["scaling"] for n in calls] == ["divide"] * 2


def test_without_registration_it_is_left_and_backends_of_before_do_not_see_it(vllm: Any) -> None:
    step = layers(vllm.concat_and_cache_mla, "auto", "scale")
    backend = fp.fusion_backend()
    register(vllm)
    result = assert_equivalent(step, inputs_for(), backend=backend, options=EAGER_ROUNDINGS)
    assert not result.report.fused
    (reason,) = {site.reason for site in result.report.sites("nothing to fuse")}
    assert "handed to test_rope_vllm.concat_and_cache_mla.default; if that writes rows" in reason
    assert backend != fp.fusion_backend()


@pytest.mark.parametrize(
    ("kind", "cache", "scale", "reason"),
    [
        ("fp8_e5m2", torch.uint8, 0.5, "kv_cache_dtype='fp8_e5m2'; the fused op has 'auto', 'fp8', 'fp8_e4m3'"),
        ("fp8_ds_mla", torch.uint8, 0.5, "kv_cache_dtype='fp8_ds_mla'; the fused op has"),
        ("fp8", torch.bfloat16, 0.5, "kv_cache_dtype='fp8' and a cache of torch.bfloat16"),
        ("auto", torch.uint8, 0.5, "kv_cache_dtype='auto' and a cache of torch.uint8"),
        ("auto", torch.float32, 0.5, "the cache torch.float32; the write converts"),
        ("fp8", torch.uint8, [0.5, 0.5], "the fused op takes one float32 in a tensor"),
        ("fp8", torch.uint8, [[0.5]], "has shape [1, 1]; the fused op takes [] or [1]"),
    ],
)
def test_calls_that_the_fused_op_does_not_have_are_refused(
    vllm: Any, kind: str, cache: torch.dtype, scale: Any, reason: str
) -> None:
    register(vllm)

    def unchecked(kv_c, k_pe, kv_cache, slots, kv_cache_dtype, scale):
        """The interpreted op would fail on some of them; the judgement is what is tested."""

    with torch.library._scoped_library("test_rope_vllm", "IMPL") as library:
        library.impl("concat_and_cache_mla", unchecked, "CPU", allow_override=True)
        inputs = inputs_for(cache)
        inputs[6] = torch.tensor(scale)
        (got,) = reasons(run(layers(vllm.concat_and_cache_mla, kind, "scale"), inputs))
    assert reason in got


def test_other_arguments_must_have_their_defaults(vllm: Any) -> None:
    fp.register_cache_write_anchor(vllm.with_more, cache_scale="scale")
    assert len(run(layers(vllm.with_more), inputs_for()).report.fused) == 2
    (reason,) = reasons(run(layers(vllm.with_more, None, 32), inputs_for()))
    assert reason == "test_rope_vllm::with_more is called with tile=32; only its default is known to the pass"


@pytest.mark.parametrize("two_caches", [False, True])
def test_our_own_op_in_the_older_functional_form(two_caches: bool) -> None:
    ours = torch.ops.fusionpasses.concat_and_cache_mla

    def write(kv_c: Tensor, k: Tensor, cache: Tensor, slots: Tensor) -> None:
        if two_caches:
            ours(kv_c, k, cache[0, ..., :LATENT], slots, pe_cache=cache[1, ..., LATENT:])
        else:
            ours(kv_c, k, cache[1], slots)

    def step(q, k, kv_c, cos, sin, slots, scale, cache):
        k1 = neox(k, cos, sin)
        write(kv_c, k1, cache, slots)
        return neox(q, cos, sin), k1 * 2, cache.float().sum()

    result = run(step, inputs_for(), enable_auto_functionalized_v2=False)
    (site,) = result.report.sites()
    if two_caches:  # of one tensor: the second is put back into a version that is no longer its own
        assert (site.status, site.reason) == (
            "refused", "what the call writes is not put back into a tensor that is read"
        )  # fmt: skip
    else:
        assert site.op == f"{FUSED_OP}.with_k"


def test_the_older_functional_form_compiles() -> None:
    step, inputs = layers(torch.ops.fusionpasses.concat_and_cache_mla), inputs_for()
    expected = inputs_for()
    with torch.no_grad():
        want = step(*expected)
        options = {**EAGER_ROUNDINGS, "enable_auto_functionalized_v2": False}
        torch._dynamo.reset()
        backend = fp.fusion_backend()
        got = torch.compile(step, backend=backend, options=options)(*inputs)
    assert backend.report.counts == {FUSED_OP: 2}
    assert torch.equal(inputs[-1], expected[-1])
    torch.testing.assert_close(got, want)


def test_k_pe_with_an_axis_of_one_head(vllm: Any) -> None:
    fp.register_cache_write_anchor(vllm.with_more)
    for op in (vllm.with_more, torch.ops.fusionpasses.concat_and_cache_mla):
        assert len(run(layers(op, squeeze=False), inputs_for()).report.fused) == 2


# ---- what cannot be registered

FORM = (
    ", allowed (Tensor kv_c, Tensor k_pe, Tensor(a!) kv_cache, Tensor slots, ...) -> (), which mutates the third "
    "argument alone; wrap the op in one of that form"
)
BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no op": (
        lambda ops: "mylib::write",
        {},
        "got 'mylib::write' of type str, allowed a torch.ops overload such as "
        "torch.ops.mylib.concat_and_cache_mla.default; register the function as a custom op first (torch.library)",
    ),
    "returns": (lambda ops: ops.returning, {}, FORM),
    "another is mutated": (lambda ops: ops.mutating_slots, {}, FORM),
    "too few": (lambda ops: ops.short, {}, FORM),
    "pure": (lambda ops: ops.pure, {}, FORM),
    "no such string": (
        lambda ops: ops.concat_and_cache_mla,
        {"cache_dtype": "kv_cache_dtyp"},
        "cache_dtype: got 'kv_cache_dtyp', allowed None or one of ['kv_cache_dtype'], the op's arguments of type str "
        "(did you mean 'kv_cache_dtype'?)",
    ),
    "scale is no tensor": (
        lambda ops: ops.with_more,
        {"cache_scale": "scale_number"},
        "cache_scale: got 'scale_number', allowed None or one of ['scale'], the op's arguments of type Tensor",
    ),
    "scaling": (
        lambda ops: ops.concat_and_cache_mla,
        {"scaling": "divided"},
        "scaling: got 'divided', allowed 'divide', 'reciprocal': row / scale, or row * (1 / scale); bytes differ "
        "(did you mean 'divide'?)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_cache_write_is_refused_and_not_registered(case: str, vllm: Any) -> None:
    op, settings, text = BAD[case]
    before = anchors.registered_anchors()
    with pytest.raises(fp.BadConfig) as error:
        fp.register_cache_write_anchor(op(vllm), **settings)
    assert str(error.value).startswith("register_cache_write_anchor: ")
    assert text in str(error.value)
    assert anchors.registered_anchors() == before


def test_a_cache_write_has_one_meaning(vllm: Any) -> None:
    register(vllm)
    register(vllm)  # the same again is no error
    with pytest.raises(fp.BadConfig, match="is registered already as CacheWriteAnchor"):
        fp.register_cache_write_anchor(vllm.concat_and_cache_mla)
    with pytest.raises(fp.BadConfig, match="mutates its arguments"):
        fp.register_anchor(vllm.concat_and_cache_mla, scale_mode="even")
    assert [a.op for a in fp.fusion_backend().anchors][1:] == ["test_rope_vllm::concat_and_cache_mla.default"]
