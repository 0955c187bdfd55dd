"""Every message about a setting or a registration that cannot be honoured: what, what was got, what is allowed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config

import fusionpasses as fp
from fusionpasses import anchors
from fusionpasses.config import did_you_mean, resolve_inductor_options


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(fp.BadConfig) as error:
        call()
    return str(error.value)


# --- FusionConfig -----------------------------------------------------------------------------------------------------

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "provider, misspelt": (
        {"provider": "trition"},
        "provider: got 'trition', allowed 'auto', 'aiter', 'aiter_finite', 'aiter_fast', 'triton', 'reference' "
        "(did you mean 'triton'?)",
    ),
    "provider, unheard of": (
        {"provider": "cuda"},
        "provider: got 'cuda', allowed 'auto', 'aiter', 'aiter_finite', 'aiter_fast', 'triton', 'reference'",
    ),
    "provider of another type": (
        {"provider": None},
        "provider: got None, allowed 'auto', 'aiter', 'aiter_finite', 'aiter_fast', 'triton', 'reference'",
    ),
    "pass, misspelt": (
        {"passes": ["rmsnorm_mxfp4"]},
        "passes: got 'rmsnorm_mxfp4', allowed 'rmsnorm_mxfp4_quant', 'silu_mul_mxfp4_quant', "
        "'fused_rope_mla_kv_cache', 'dynamic_mxfp4_quant' (did you mean 'rmsnorm_mxfp4_quant'?)",
    ),
    "pass, unheard of": (
        {"passes": ("rope",)},
        "passes: got 'rope', allowed 'rmsnorm_mxfp4_quant', 'silu_mul_mxfp4_quant', 'fused_rope_mla_kv_cache', "
        "'dynamic_mxfp4_quant'",
    ),
    "pass of another type": (
        {"passes": [1]},
        "passes: got 1, allowed 'rmsnorm_mxfp4_quant', 'silu_mul_mxfp4_quant', 'fused_rope_mla_kv_cache', "
        "'dynamic_mxfp4_quant'",
    ),
    "passes is a string": (
        {"passes": "rmsnorm_mxfp4_quant"},
        "passes: got 'rmsnorm_mxfp4_quant' of type str, allowed a sequence of pass names, such as "
        "('rmsnorm_mxfp4_quant',), or None for all",
    ),
    "passes is a number": (
        {"passes": 1},
        "passes: got 1 of type int, allowed a sequence of pass names, such as ('rmsnorm_mxfp4_quant',), or None "
        "for all",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("make", [fp.fusion_backend, fp.FusionConfig])
def test_a_bad_setting_is_refused_when_the_backend_is_made(make, case):
    settings, text = CONFIGS[case]
    assert refused(lambda: make(**settings)) == text


def test_good_settings_are_kept_in_one_form():
    name = "rmsnorm_mxfp4_quant"
    assert fp.FusionConfig() == fp.FusionConfig("auto", None)
    for passes in ((name,), [name], {name}, iter([name, name])):
        config = fp.FusionConfig(passes=passes)  # type: ignore[arg-type]
        assert config.passes == (name,)
        assert hash(config) == hash(fp.FusionConfig(passes=(name,)))
    assert fp.FusionConfig(passes=[]).passes == ()
    for provider in ("auto", "aiter", "aiter_finite", "aiter_fast", "triton", "reference"):
        assert fp.FusionConfig(provider=provider).provider == provider
    assert fp.fusion_backend(provider="reference").config == fp.FusionConfig("reference")


def test_a_config_cannot_be_changed():
    with pytest.raises(AttributeError):
        fp.FusionConfig().provider = "triton"  # type: ignore[misc]


def test_did_you_mean():
    assert did_you_mean("referense", ("auto", "reference")) == " (did you mean 'reference'?)"
    assert did_you_mean("gluon", ("auto", "reference")) == ""
    assert did_you_mean(None, ("auto", "reference")) == ""


# --- mode and options of torch.compile --------------------------------------------------------------------------------

LITE = (
    " switches Inductor's post-grad passes off, so no fusion pass would ever run; allowed: any mode or options that "
    "leave them on. Drop it, or use backend='inductor' to compile without fusions"
)
OPTIONS: dict[str, tuple[Any, Any, str]] = {
    "option, misspelt": (
        None,
        {"epilog_fusion": True},
        "options: got 'epilog_fusion', which torch._inductor.config does not have (did you mean 'epilogue_fusion'?); "
        "torch._inductor.list_options() prints all of them",
    ),
    "option, unheard of": (
        None,
        {"zzzzzzzz": True},
        "options: got 'zzzzzzzz', which torch._inductor.config does not have; torch._inductor.list_options() prints "
        "all of them",
    ),
    "option that is no name": (
        None,
        {3: True},
        "options: got 3, which torch._inductor.config does not have; torch._inductor.list_options() prints all of them",
    ),
    "text for a switch": (
        None,
        {"epilogue-fusion": "on"},
        "options['epilogue-fusion']: got 'on' of type str, allowed bool (it is True now)",
    ),
    "number for a switch": (
        None,
        {"epilogue_fusion": 1},
        "options['epilogue_fusion']: got 1 of type int, allowed bool (it is True now)",
    ),
    "None for a number": (
        None,
        {"max_fusion_size": None},
        "options['max_fusion_size']: got None of type NoneType, allowed int (it is 64 now)",
    ),
    "not a dict": (
        None,
        ["freezing"],
        "options: got ['freezing'] of type list, allowed a dict from names in torch._inductor.config to values",
    ),
    "mode=lite": ("lite", None, "mode='lite'" + LITE),
    "post-grad passes off": (None, {"use_post_grad_passes": False}, "use_post_grad_passes=False" + LITE),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_bad_option_is_refused(case):
    mode, options, text = OPTIONS[case]
    assert refused(lambda: resolve_inductor_options(mode, options)) == text


@pytest.mark.parametrize("mode", ["reduce-overhed", ["default"]])
def test_a_bad_mode_is_refused_and_only_modes_that_fuse_are_offered(mode):
    text = refused(lambda: resolve_inductor_options(mode, None))
    head, _, allowed = text.partition(", allowed ")
    assert head == f"mode: got {mode!r}"
    for name in ("'reduce-overhead'", "'max-autotune'", "'max-autotune-no-cudagraphs'"):
        assert name in allowed
    assert "lite" not in allowed
    assert allowed.endswith(" (did you mean 'reduce-overhead'?)") == (mode == "reduce-overhed")


def test_post_grad_passes_switched_off_globally_are_refused_whatever_the_mode():
    with torch._inductor.config.patch(use_post_grad_passes=False):
        for mode in (None, "reduce-overhead"):
            text = refused(lambda mode=mode: resolve_inductor_options(mode, None))
            assert text == "use_post_grad_passes=False" + LITE


def test_good_options_become_config_patches():
    def hook(graph: object) -> None: ...

    assert resolve_inductor_options(None, None) == {}
    assert resolve_inductor_options("default", {}) == {}
    given = {
        "epilogue-fusion": False,
        "triton.cudagraphs": True,
        "max_fusion_size": 8,
        "cpp.simdlen": None,  # may be None
        "joint_custom_pre_pass": hook,  # may be anything callable
        "use_post_grad_passes": True,
    }
    assert resolve_inductor_options(None, given) == {"epilogue_fusion": False} | {
        k: v for k, v in given.items() if k != "epilogue-fusion"
    }


def test_a_mode_becomes_what_inductor_lists_for_it():
    assert resolve_inductor_options("reduce-overhead", None) == {"triton.cudagraphs": True}
    # torch.compile takes a mode or options; a backend called by hand may get both, and options go first.
    both = resolve_inductor_options("reduce-overhead", {"triton.cudagraphs": False})
    assert both == {"triton.cudagraphs": False}


def test_a_whole_number_may_stand_for_a_float():
    assert torch._inductor.config.get_type("cpu_gpu_bw") is float
    assert resolve_inductor_options(None, {"cpu_gpu_bw": 50}) == {"cpu_gpu_bw": 50}


# --- register_anchor --------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch) -> None:
    monkeypatch.setattr(anchors, "_registered", dict(anchors._registered))


@pytest.fixture
def ops() -> Iterator[Any]:
    """Ops that a user might register, and ops that cannot be anchors."""
    with torch.library._scoped_library("test_config", "FRAGMENT") as library:
        library.define("quant(Tensor x) -> (Tensor, Tensor)")
        library.define('moded(Tensor x, str scale_mode="even", int tile=0) -> (Tensor, Tensor)')
        library.define("into(Tensor x, Tensor(a!) out) -> (Tensor, Tensor)")
        library.define("one(Tensor x) -> Tensor")
        library.define("no_tensor(int x) -> (Tensor, Tensor)")
        library.define("no_arguments() -> (Tensor, Tensor)")
        library.define("two(Tensor x) -> (Tensor, Tensor)")
        library.define("two.other(Tensor x, int y) -> (Tensor, Tensor)")
        yield torch.ops.test_config


NAMED = "torch.ops.mylib.quant.default; register the function as a custom op first (torch.library)"
FORM = ", allowed (Tensor x, ...) -> (Tensor codes, Tensor scales); wrap the op in one of that form"
ONE_OF = ", allowed exactly one of them: the mode the op always uses, or the name of the argument that carries it"
ANCHORS: dict[str, tuple[Callable[[Any], Any], dict[str, Any], str]] = {
    "no op": (
        lambda ops: "mylib::quant",
        {"scale_mode": "even"},
        "register_anchor: got 'mylib::quant' of type str, allowed a torch.ops overload such as " + NAMED,
    ),
    "two overloads": (
        lambda ops: ops.two,
        {"scale_mode": "even"},
        "register_anchor: got the packet test_config.two with overloads ['default', 'other'], allowed an overload; "
        "name one: test_config.two.default",
    ),
    "mutates": (
        lambda ops: ops.into.default,
        {"scale_mode": "even"},
        "register_anchor: got test_config.into.default, which mutates its arguments (test_config::into(Tensor x, "
        "Tensor(a!) out) -> (Tensor, Tensor)); allowed: ops that return fresh tensors. Register the functional "
        "overload",
    ),
    "one result": (
        lambda ops: ops.one.default,
        {"scale_mode": "even"},
        "register_anchor: got test_config::one(Tensor x) -> Tensor" + FORM,
    ),
    "no tensor": (
        lambda ops: ops.no_tensor.default,
        {"scale_mode": "even"},
        "register_anchor: got test_config::no_tensor(int x) -> (Tensor, Tensor)" + FORM,
    ),
    "no arguments": (
        lambda ops: ops.no_arguments.default,
        {"scale_mode": "even"},
        "register_anchor: got test_config::no_arguments() -> (Tensor, Tensor)" + FORM,
    ),
    "layout": (
        lambda ops: ops.quant,
        {"scale_mode": "even", "layout": "swizzled"},
        "register_anchor: layout: got 'swizzled', allowed 'row_major': scales [..., N/32] contiguous; return row-major "
        "scales and permute them in an op of their own",
    ),
    "no scale mode": (
        lambda ops: ops.quant,
        {},
        "register_anchor: got scale_mode=None and scale_mode_argument=None" + ONE_OF,
    ),
    "two scale modes": (
        lambda ops: ops.moded,
        {"scale_mode": "even", "scale_mode_argument": "scale_mode"},
        "register_anchor: got scale_mode='even' and scale_mode_argument='scale_mode'" + ONE_OF,
    ),
    "unknown scale mode": (
        lambda ops: ops.quant,
        {"scale_mode": "nearest"},
        "register_anchor: scale_mode: got 'nearest', allowed 'even', 'floor', 'rceil', 'ceil'; take the mode the "
        "checkpoint was made with ('even' for AMD Quark, 'rceil' for NVIDIA tools)",
    ),
    "unknown argument": (
        lambda ops: ops.moded,
        {"scale_mode_argument": "scale_mod"},
        "register_anchor: scale_mode_argument: got 'scale_mod', allowed one of ['scale_mode', 'tile'] (did you mean "
        "'scale_mode'?)",
    ),
    "the tensor as scale mode": (
        lambda ops: ops.moded,
        {"scale_mode_argument": "x"},
        "register_anchor: scale_mode_argument: got 'x', allowed one of ['scale_mode', 'tile']",
    ),
}


@pytest.mark.parametrize("case", ANCHORS)
def test_a_bad_anchor_is_refused_and_not_registered(case, ops):
    op, settings, text = ANCHORS[case]
    before = anchors.registered_anchors()
    assert refused(lambda: fp.register_anchor(op(ops), **settings)) == text
    assert anchors.registered_anchors() == before


def test_an_op_has_one_meaning(ops):
    fp.register_anchor(ops.quant, scale_mode="even")
    fp.register_anchor(ops.quant.default, scale_mode="even")  # the same again is no error
    text = refused(lambda: fp.register_anchor(ops.quant, scale_mode="floor"))
    assert text.startswith("register_anchor: test_config::quant.default is registered already as Anchor(")
    assert "scale_mode='even'" in text.partition(", got Anchor(")[0]
    assert "scale_mode='floor'" in text.partition(", got Anchor(")[2]
    assert text.endswith("; allowed: one meaning per op")
    assert [a.op for a in anchors.registered_anchors()] == [
        "fusionpasses::dynamic_mxfp4_quant.default",
        "test_config::quant.default",
    ]


def test_good_anchors(ops):
    fp.register_anchor(ops.quant, scale_mode="rceil")
    fp.register_anchor(ops.moded.default, scale_mode_argument="scale_mode")
    fp.register_anchor(ops.two.other, scale_mode="ceil")
    _, fixed, given, overload = anchors.registered_anchors()
    assert (fixed.scale_mode, fixed.scale_mode_argument, fixed.layout) == ("rceil", None, "row_major")
    assert (given.scale_mode, given.scale_mode_argument) == (None, "scale_mode")
    assert overload.target is ops.two.other
