"""What the Triton provider's adapters of products give their kernels, on a GPU that is not there."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from test_host_cost import Launched, Recorder, recorder  # noqa: F401  (a fixture)
from torch import Tensor

from fusionpasses.kernels.arch import Arch
from fusionpasses.ops import OPS, _mxfp4, _mxfp4_weight
from fusionpasses.probes import probe_triton
from fusionpasses.providers import _launch

pytestmark = [
    pytest.mark.skipif(not probe_triton(), reason=probe_triton().why),
    pytest.mark.usefixtures("recorder"),
]

H200 = Arch("sm_90", warp_size=32, processors=132)


class Weight(NamedTuple):
    codes: Tensor
    scales: Tensor
    shift: int


@pytest.fixture(autouse=True)
def on_an_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusionpasses.kernels import arch

    monkeypatch.setattr(arch, "of", lambda device: H200)


def prepared(rows: int, width: int) -> Weight:
    return Weight(*_mxfp4_weight.prepare(*_mxfp4.quantize(torch.randn(rows, width) * 2.0**10, "even")))


def launches(recorder: Recorder, name: str, *args: Any, **kwargs: Any) -> list[tuple[str, dict[str, Any]]]:  # noqa: F811
    """Kernels by name, and what each is given by name, of a call that is done in full."""
    _launch.forget()
    recorder.launches.clear()
    with torch.no_grad():
        OPS[name].overload(*args, **kwargs)
    return [_named(launched) for launched in recorder.launches]


def _named(launched: Launched) -> tuple[str, dict[str, Any]]:
    from fusionpasses.kernels import dynamic_mxfp4_quant, mxfp4_dequantize, mxfp4_gemm, mxfp4_gemm_sum

    name = launched.kernel.partition(" ")[0]
    modules = dynamic_mxfp4_quant, mxfp4_dequantize, mxfp4_gemm, mxfp4_gemm_sum
    kernel = next(getattr(module, name) for module in modules if hasattr(module, name))
    return name, dict(zip(kernel.arg_names, launched.args, strict=True))


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("name", ["mxfp4_gemm.default", "mxfp4_gemm_a16w4.default"])
def test_parts_of_k_take_bias_and_shift_once(
    recorder: Recorder,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    split: int,
) -> None:
    from fusionpasses.kernels import mxfp4_gemm

    choose = mxfp4_gemm.launch_options
    monkeypatch.setattr(mxfp4_gemm, "launch_options", lambda *a, **k: choose(*a, **k) | {"SPLIT": split})
    w, bias = prepared(48, 512), torch.randn(48).bfloat16()
    assert w.shift
    given = {"layout": "tiles", "rows": 48, "shift": w.shift}
    x: tuple[Tensor, ...] = (torch.randn(3, 512).bfloat16(),)
    if name == "mxfp4_gemm.default":
        x, given = _mxfp4.quantize(x[0], "even"), given | {"out_dtype": torch.bfloat16}
    (kernel, got), *rest = launches(recorder, name, *x, w.codes, w.scales, bias, **given)
    assert kernel == "mxfp4_gemm"
    if split == 1:
        assert (got["bias_ptr"] is bias, got["factor"], rest) == (True, 2.0**w.shift, [])
    else:
        assert (got["bias_ptr"], got["factor"]) == (None, 1.0)
        ((kernel, got),) = rest
        assert (kernel, got["bias_ptr"] is bias, got["factor"]) == ("mxfp4_gemm_sum", True, 2.0**w.shift)


@pytest.mark.parametrize("off", ["nothing", "codes", "scales"])
def test_only_what_is_aligned_is_copied_to_shared_memory(recorder: Recorder, off: str) -> None:  # noqa: F811
    w = prepared(48, 512)
    moved = w._replace(**{name: _moved(getattr(w, name)) for name in (off,) if off != "nothing"})
    x = torch.randn(3, 512).bfloat16()
    given = {"layout": "tiles", "rows": 48, "shift": w.shift}
    ((_, got),) = launches(recorder, "mxfp4_gemm_a16w4.default", x, moved.codes, moved.scales, None, **given)
    assert (got["STAGES"] == 0) == (off != "nothing")
    named = {"w_codes": moved.codes, "w_scales": moved.scales, "out_dtype": torch.bfloat16}
    (kernel, got), *_ = launches(recorder, "dynamic_mxfp4_quant.then_gemm", x, **named, **given)
    assert (kernel, got["TOKEN_TILES"]) == ("dynamic_mxfp4_quant", 0 if off == "nothing" else None)


def _moved(tensor: Tensor) -> Tensor:
    """The same, 8 bytes behind a multiple of 16."""
    moved = torch.empty(tensor.numel() + 24, dtype=torch.uint8)
    start = (8 - moved.data_ptr()) % 16
    return moved[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)


def test_codes_with_gaps_become_contiguous(recorder: Recorder) -> None:  # noqa: F811
    w, (codes, scales) = prepared(48, 512), _mxfp4.quantize(torch.randn(3, 512), "even")
    gaps = [torch.cat((part, part), 1)[:, : part.shape[1]] for part in (codes, scales)]
    given = {"layout": "tiles", "rows": 48, "shift": w.shift, "out_dtype": torch.bfloat16}
    ((_, got),) = launches(recorder, "mxfp4_gemm.default", *gaps, w.codes, w.scales, None, **given)
    for name, part in (("x_ptr", codes), ("x_scales_ptr", scales)):
        assert got[name].is_contiguous()
        assert torch.equal(got[name].view(torch.uint8).view(part.shape), part)


def test_bias_is_no_part_of_products_that_are_added_up(recorder: Recorder) -> None:  # noqa: F811
    w, bias = prepared(48, 512), torch.randn(48)
    given = {"layout": "tiles", "rows": 48, "shift": w.shift}
    launched = launches(recorder, "mxfp4_gemm_a16w4.default", torch.randn(3, 512), w.codes, w.scales, bias, **given)
    assert launched
    assert all(got["bias_ptr"] is None for _, got in launched)


def test_codes_of_many_tokens_are_dequantised_as_they_lie(recorder: Recorder) -> None:  # noqa: F811
    """x has the order of a checkpoint and no shift, whatever the weight has."""
    w, (codes, scales) = prepared(48, 512), _mxfp4.quantize(torch.randn(700, 512), "even")
    given = {"layout": "tiles", "rows": 48, "shift": w.shift, "out_dtype": torch.bfloat16}
    (_, of_x), (_, of_w) = launches(recorder, "mxfp4_gemm.default", codes, scales, w.codes, w.scales, None, **given)
    assert (of_x["LAYOUT"] != of_w["LAYOUT"], of_x["shift"], of_w["shift"]) == (True, 0, w.shift)
