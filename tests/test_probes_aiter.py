"""What is here of AITER, told from files; what is imported of it, and what is left behind."""

import importlib
import importlib.util
import inspect
import logging
import re
import subprocess
import sys
import time
import zipfile

import pytest
import torch
import torch._dynamo.config
from aiter_trees import (
    BROKEN,
    DEBRIS,
    GEMM,
    HIP_ROPE,
    LIVING,
    NEW,
    OLD,
    RMS,
    ROPE,
    ROUNDINGS,
    WRONG,
    changes,
    function,
    state,
    write,
)

import fusionpasses as fp
from fusionpasses import _aiter_files, probes, providers
from fusionpasses.errors import ProviderUnavailable
from fusionpasses.probes import Verdict
from fusionpasses.providers import _aiter_import, _aiter_source

FUNCTIONS = tuple(_aiter_files.CAPABILITIES)
ONLY_NEW = ("fused_qk_rope_concat_and_cache_mla",)
PUBLIC = (
    probes.has_dynamic_mxfp4_quant,
    probes.has_fused_rmsnorm_mxfp4_quant,
    probes.has_fused_rope_mla_kv_cache,
    probes.has_mxfp4_gemm,
)


def everything():
    """Every verdict on AITER, and of the public functions."""
    return [
        probes.probe_aiter(),
        *(ask(f) for f in FUNCTIONS for ask in (probes.probe_aiter_capability, probes.probe_aiter_kernel)),
        *(ask() for ask in PUBLIC),
    ]


@pytest.fixture(autouse=True)
def _as_before():
    """No answer of one test is another's, nor any module."""
    if importlib.util.find_spec("aiter") is not None:
        pytest.skip("an aiter is installed here; these tests bring their own")
    modules, path = dict(sys.modules), list(sys.path)
    probes.reset()
    _aiter_import.reset()
    yield
    probes.reset()
    _aiter_import.reset()
    for name in set(sys.modules) - set(modules):
        del sys.modules[name]
    sys.path[:] = path


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """``tree(files)`` puts a package named aiter on the path."""

    monkeypatch.setattr(_aiter_files, "ROUNDINGS", {**_aiter_files.ROUNDINGS, **ROUNDINGS})

    def put(files, name="site"):
        root = write(tmp_path / name, files)
        monkeypatch.syspath_prepend(str(tmp_path / name))
        return root

    return put


@pytest.fixture
def amd_gpu(monkeypatch, tmp_path):
    """``amd_gpu("gfx950")``: a machine with a GPU of that kind, as torch and the kernel driver tell it."""

    def put(*numbers):
        monkeypatch.setattr(torch.version, "hip", "7.0.1")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(numbers))
        for node, number in enumerate((0, *numbers)):
            file = tmp_path / "nodes" / str(node) / "properties"
            file.parent.mkdir(parents=True)
            file.write_text(f"cpu_cores_count 8\ngfx_target_version {number}\nvendor_id 4098\n")
        monkeypatch.setattr(probes, "_TOPOLOGY", tmp_path / "nodes")
        probes.reset()

    return put


def test_no_aiter():
    before = state()
    answers = everything()
    assert changes(before) == []
    assert not probes.probe_aiter()
    assert probes.probe_aiter().why.startswith("AITER is not installed; `pip install amd-aiter`")
    assert not any(probes.probe_aiter_capability(f) for f in FUNCTIONS)
    assert all(isinstance(answer, Verdict) and answer.why for answer in answers)
    assert not probes.probe_wrong_aiter()


def test_the_wrong_aiter(tree):
    root = tree(WRONG)
    before = state()
    everything()
    assert changes(before) == []
    answer = probes.probe_aiter()
    assert not answer
    assert answer.why.startswith(
        f"`aiter` at {root} is not AMD's AITER: it has no folder ops/; PyPI's aiter is a libra"
    )
    assert "`pip uninstall aiter`, then `pip install amd-aiter`" in answer.why
    assert "https://github.com/ROCm/aiter" in answer.why
    assert probes.probe_wrong_aiter() == Verdict(True, answer.why)
    for f in FUNCTIONS:
        assert probes.probe_aiter_capability(f) == answer
        with pytest.raises(ProviderUnavailable, match=rf"AITER's {f} was asked for and is not here: `aiter` at "):
            _aiter_import.load(f)
    assert changes(before) == []


@pytest.mark.slow
def test_the_package_of_that_name_on_the_index(tmp_path, monkeypatch):
    """The real one, in a folder of its own."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--retries", "0", "--timeout", "10"]
    done = subprocess.run(
        [*install, "--target", str(tmp_path), "aiter==0.13.20191203"], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"pip cannot install it: {done.stderr[-200:]}")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = state()
    everything()
    answer = probes.probe_aiter()
    assert not answer
    assert answer.why.startswith(f"`aiter` at {tmp_path / 'aiter'} is not AMD's AITER: it has no folder ops/; PyPI's")
    assert probes.probe_wrong_aiter()
    with pytest.raises(ProviderUnavailable, match=r"`pip uninstall aiter`, then `pip install amd-aite"):
        fp.fusion_backend(provider="aiter")
    assert [each for each in changes(before) if each not in ("modules", "loggers", "dynamo")] == []
    assert "aiter" not in sys.modules
    # What it is can be imported all the same.
    assert importlib.import_module("aiter").__file__ == str(tmp_path / "aiter" / "__init__.py")


def test_both_packages_in_one_folder(tree):
    root = tree({**NEW, **WRONG})
    assert not probes.probe_aiter()
    assert f"`aiter` at {root} is two packages in one folder" in probes.probe_aiter().why
    assert "`pip uninstall aiter amd-aiter`" in probes.probe_aiter().why


def test_a_folder_or_module_of_that_name_is_no_package(tree, tmp_path, monkeypatch):
    root = tree({name: text for name, text in NEW.items() if name != "__init__.py"})
    assert not probes.probe_aiter()
    assert f"`aiter` is {root}, which has no __init__.py and is no package; take it off" in probes.probe_aiter().why
    # A clone, seen from the folder that it lies in.
    write(tmp_path / "clones" / "aiter", NEW)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "clones")])
    probes.reset()
    clone = tmp_path / "clones" / "aiter"
    assert f"it holds AITER's in {clone / 'aiter'}: put {clone} on the path" in probes.probe_aiter().why
    # A single file.
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "aiter.py").write_text("raise SystemExit\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "file")])
    probes.reset()
    assert "a single module and not AMD's AITER" in probes.probe_aiter().why
    assert all(not probe() for probe in (probes.probe_aiter, *PUBLIC))


def test_an_archive_is_called_one(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "aiter.zip", "w") as archive:
        for name, text in NEW.items():
            archive.writestr(f"aiter/{name}", text)
    monkeypatch.syspath_prepend(str(tmp_path / "aiter.zip"))
    assert re.search(r"`aiter` at .*aiter.zip/aiter is in an archive", probes.probe_aiter().why)
    assert not any(answer for answer in everything())


@pytest.mark.parametrize(("files", "layout"), [(NEW, "new"), (OLD, "old")], ids=["new", "old"])
def test_layouts(tree, files, layout):
    root = tree(files)
    before = state()
    everything()
    assert probes.probe_aiter() == Verdict(True, f"AITER at {root}, amd-aiter of unknown version")
    assert not probes.probe_wrong_aiter()
    for f, capability in _aiter_files.CAPABILITIES.items():
        answer = probes.probe_aiter_capability(f)
        if layout == "old" and f in ONLY_NEW:
            assert not answer
            assert f"{root / 'ops/cache.py'} does not define {f}: another release; `pip install" in answer.why
            continue
        shared = capability.old is None
        file = capability.new if layout == "new" or shared else capability.old
        assert answer == Verdict(True, f"{root / file} ({'new' if shared else layout} layout)")
    assert changes(before) == []


@pytest.mark.parametrize("files", [NEW, OLD], ids=["new", "old"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_layout_without_one_file_lacks_what_is_in_it(tree, files, name):
    capability = _aiter_files.CAPABILITIES[name]
    gone = {capability.new, capability.old}
    root = tree({file: text for file, text in files.items() if file not in gone})
    answer = probes.probe_aiter_capability(name)
    assert not answer
    paths = " nor ".join(file for file in (capability.new, capability.old) if file)
    assert answer.why.startswith(f"AITER at {root} has no {paths}, where {name} would be; `pip install amd-aiter`")
    others = [f for f, other in _aiter_files.CAPABILITIES.items() if other.new not in gone and f not in ONLY_NEW]
    assert all(probes.probe_aiter_capability(f) for f in others)


def test_the_new_file_comes_first(tree):
    tree({**OLD, **NEW})
    assert "(new layout)" in probes.probe_aiter_capability("fused_rms_mxfp4_quant").why
    function, release = _aiter_import.load("fused_rms_mxfp4_quant")
    assert (function(1, 2, 3), release) == ("new rms", "new")
    assert "aiter.ops.triton.fused_mxfp4_quant" not in sys.modules


def test_an_unknown_capability():
    assert probes.probe_aiter_capability("fused_moe").why.startswith("'fused_moe' is none of dynamic_mxfp4_quant, ")


def test_the_probe_takes_no_time_and_prints_nothing(tree, capfd):
    slow = "import time\nprint('No ROCm runtime is found')\ntime.sleep(60)\n"
    tree({name: slow + text for name, text in NEW.items()})
    before, start = state(), time.perf_counter()
    assert all(probes.probe_aiter_capability(f) for f in FUNCTIONS)
    everything()
    assert time.perf_counter() - start < 5
    assert changes(before) == []
    assert capfd.readouterr() == ("", "")


def test_whatever_looking_for_it_raises_is_a_no(monkeypatch):
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name in ("aiter", "triton"):
                raise KeyError(name)

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    assert probes.probe_aiter() == Verdict(False, "probe_aiter failed with KeyError: 'aiter'")
    assert not any(answer for answer in everything())
    # A module put into sys.modules by hand, which find_spec refuses.
    monkeypatch.setitem(sys.modules, "aiter", type(sys)("aiter"))
    probes.reset()
    assert probes.probe_aiter().why.startswith("probe_aiter failed with ValueError")


def test_what_is_no_question_is_a_no_too(monkeypatch):
    assert probes.probe_aiter_capability([]).why.startswith("probe_aiter_capability failed with TypeError")
    assert not probes.probe_fp4_arithmetic(None)

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "aiter":
                raise SystemExit(3)

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    assert probes.probe_aiter() == Verdict(False, "probe_aiter failed with SystemExit: 3")


def test_damaged_metadata_are_no_version(tmp_path, monkeypatch):
    (tmp_path / "amd_aiter-1.0.dist-info").mkdir()
    (tmp_path / "amd_aiter-1.0.dist-info" / "METADATA").write_bytes(b"Version: \xff")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert probes.distribution_version("amd-aiter") is None


def test_reset_forgets_who_was_chosen(tree, amd_gpu):
    op = "fused_rope_mla_kv_cache.absorbed"
    amd_gpu(90500)
    assert providers.select(op, "cuda") == "triton"
    before = providers.decided("cuda")
    tree(NEW)
    probes.reset()
    assert providers.select(op, "cuda") == "aiter"
    assert providers.decided("cuda") != before


def test_answers_are_kept_until_reset(tree):
    assert not probes.probe_aiter()
    tree(NEW)
    assert not probes.probe_aiter()
    probes.reset()
    assert probes.probe_aiter()


# ---------------------------------------------------------------------------------------------------- architectures


@pytest.mark.parametrize(
    ("number", "name"),
    [(90402, "gfx942"), (90010, "gfx90a"), (90500, "gfx950"), (110501, "gfx1151"), (120001, "gfx1201")],
)
def test_the_driver_tells_the_architecture(amd_gpu, number, name):
    amd_gpu(number, number)
    assert probes.probe_hip_architecture() == Verdict(True, f"the GPU is {name}")
    assert not torch.cuda.is_initialized()


def test_of_several_kinds_torch_tells_which_is_used(amd_gpu, monkeypatch):
    amd_gpu(100306, 110000)
    properties = type("Properties", (), {"gcnArchName": "gfx1100:sramecc+:xnack-"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert probes.probe_hip_architecture() == Verdict(True, "the GPU is gfx1100")


def test_aiter_on_its_gpus(tree, amd_gpu):
    root = tree(NEW)
    amd_gpu(90500)
    assert all(probes.probe_aiter_kernel(f) for f in FUNCTIONS)
    for probe in PUBLIC:
        assert re.match(r"Triton: triton .*; AITER: .* \(new layout\); .*; on HIP 7.0.1, 1 device", probe().why)
        assert probe()
    rope = "AITER: {}/ops/triton/fusions/fused_kv_cache.py (new layout); fused_qk_rope_cat_and_cache_mla is exact, for"
    assert rope.format(root) in probes.has_fused_rope_mla_kv_cache().why
    # What an exact configuration rules out is told, with the setting that admits it, and does not count.
    for probe in PUBLIC:
        ruled_out = "provider='aiter_finite' admits it" in probe().why and "so Triton's kernel runs" in probe().why
        assert ruled_out == (probe is not probes.has_fused_rope_mla_kv_cache)
        # And what admits the calls in which AITER leaves a rounding out.
        fast = "(where ours rounds, provider='aiter_fast' admits it)" in probe().why
        assert fast == (probe is probes.has_fused_rmsnorm_mxfp4_quant)


def test_aiter_without_triton_runs_nothing(tree, amd_gpu, monkeypatch):
    monkeypatch.setattr(probes, "probe_triton", lambda: Verdict(False, "triton is not installed"))
    amd_gpu(90402)
    assert probes.has_dynamic_mxfp4_quant() == Verdict(
        False, "Triton: triton is not installed, and AITER's kernels need it, too; on HIP 7.0.1, 1 device(s)"
    )
    tree(NEW)
    probes.reset()
    answer = probes.has_fused_rope_mla_kv_cache()
    assert not answer
    assert "fused_qk_rope_cat_and_cache_mla is exact" in answer.why
    # AITER's products need FP4 arithmetic, and this GPU has none.
    assert probes.probe_aiter_kernel("gemm_afp4wfp4") == Verdict(
        False, "the GPU is gfx942; AITER serves gfx950, gfx1250"
    )
    assert "AITER: " not in probes.has_mxfp4_gemm().why


def test_without_rocm_aiter_runs_nothing(tree):
    tree(NEW)
    for f in FUNCTIONS:
        answer = probes.probe_aiter_kernel(f)
        assert not answer
        assert re.match(r"torch .* is not built for ROCm \(HIP\), which AITER needs", answer.why)


@pytest.mark.skipif(probes.probe_gpu().ok, reason="there is a GPU")
def test_without_a_gpu_the_public_functions_say_so():
    for probe in PUBLIC:
        assert not probe()
        assert "no GPU kernel can run: torch " in probe().why


@pytest.mark.parametrize(
    ("architecture", "triton", "ok", "why"),
    [
        ("gfx950", "3.6.0", True, "gfx950 is not known to lack FP4 arithmetic; triton 3.6.0"),
        ("sm_100", "3.9.0", True, "sm_100 is not known to lack FP4 arithmetic; triton 3.9.0"),
        ("sm_100", "3.6.0", True, "triton 3.6.0 may read a scale byte of 0 beside bfloat16 as 0, not as 2**-127"),
        ("gfx942", "3.9.0", False, "gfx942 has no FP4 arithmetic"),
        ("sm_90", "3.9.0", False, "sm_90 has no FP4 arithmetic"),
        ("gfx950", "3.1.0", False, "triton 3.1.0 is older than 3.2, the release that tl.dot_scaled came with"),
        ("gfx950", "main", False, "triton is of unknown version (main)"),
    ],
)
def test_dot_scaled(architecture, triton, ok, why):
    answer = probes.probe_dot_scaled(architecture, triton)
    assert answer.ok == ok
    assert why in answer.why


def test_versions(monkeypatch):
    assert probes.probe_torch() == Verdict(True, f"torch {torch.__version__}")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu126")
    probes.reset()
    assert probes.probe_torch().why.startswith(
        "torch 2.9.1+cu126 is older than 2.10, the oldest that fusionpasses works"
    )
    monkeypatch.setattr(probes, "triton_version", lambda: "3.5.1")
    if probes.probe_triton():
        assert not probes.probe_triton_version()
        assert probes.probe_triton_version().why.startswith("triton 3.5.1 is older than 3.6")


def test_triton_of_another_distribution_tells_its_version(tmp_path, monkeypatch):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text('"""isort"""\n__version__ = \'3.7.1+rocm\'\nraise RuntimeError\n')
    monkeypatch.setattr(probes, "distribution_version", lambda name: None)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert probes.probe_triton() == Verdict(True, "triton 3.7.1+rocm")


# ------------------------------------------------------------------------------------------------------------ import


@pytest.mark.parametrize(
    ("files", "release", "name"),
    [(NEW, "new", name) for name in FUNCTIONS] + [(OLD, "old", name) for name in FUNCTIONS if name not in ONLY_NEW],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_load(tree, files, release, name):
    tree(files)
    before = state()
    function, got = _aiter_import.load(name)
    assert callable(function)
    assert got == release
    assert set(changes(before)) == {"modules"}
    assert {module.partition(".")[0] for module in set(sys.modules) - set(before["modules"])} == {"aiter"}
    assert _aiter_import.load(name) == (function, got)
    assert _aiter_import.failure(name) is None


def test_an_import_that_raises_leaves_nothing(tree):
    logging.getLogger("of_a_user").setLevel(logging.WARNING)
    root = tree(BROKEN)
    before = state()
    reasons = []
    for name in (FUNCTIONS[0], FUNCTIONS[0], FUNCTIONS[1]):
        with pytest.raises(ProviderUnavailable) as raised:
            _aiter_import.load(name)
        reasons.append(str(raised.value))
        assert changes(before) == []
    assert len(set(reasons)) == 1
    assert reasons[0].startswith(
        "importing aiter failed with RuntimeError: ROCm version file not found; AITER needs RO"
    )
    assert "use provider='auto' or 'triton', or make `python -c 'import aiter'` work" in reasons[0]
    assert (root / "tries").read_text() == "x"
    assert _aiter_import.failure(FUNCTIONS[2]) == reasons[0]
    # The probe goes by files, and says what it said.
    assert probes.probe_aiter_capability(FUNCTIONS[0])


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"__init__.py": "raise SystemExit(3)\n"}, "importing aiter failed with SystemExit: 3"),
        (
            {"__init__.py": f"{DEBRIS}raise RuntimeError('ROCm version file not found')\n"},
            "importing aiter failed with RuntimeError",
        ),
        (
            {"ops/triton/fusions/fused_kv_cache.py": "def fused_qk_rope_cat_and_cache_mla(): pass\n"
             "fused_qk_rope_cat_and_cache_mla = dict.fromkeys\n"},
            "is not here|cannot be examined, with|signature that no known release",
        ),
        (
            {"ops/triton/fusions/fused_kv_cache.py": "def fused_qk_rope_cat_and_cache_mla(): pass\n"
             "fused_qk_rope_cat_and_cache_mla = type\n"},
            "cannot be examined, with ValueError: no signature found",
        ),
    ],
    ids=["exits", "raises", "a method", "a class in C"],
)  # fmt: skip
def test_who_asks_for_an_aiter_that_fails_is_told_at_once(tree, amd_gpu, files, words):
    tree({**BROKEN, "__init__.py": "", **files})
    amd_gpu(90500)
    before = state()
    for _ in range(2):
        with pytest.raises(ProviderUnavailable, match=rf"'aiter' was asked for and can run no op here: .*({words})"):
            fp.fusion_backend(provider="aiter")
        assert providers.select("fused_rope_mla_kv_cache.absorbed", "cuda") == "triton"
    if "__init__.py" in files:  # else AITER itself stays
        assert changes(before) == []
    # A graph of a process in which it works is not this one's.
    decided = providers.decided("cuda")
    tree(NEW, "other")
    probes.reset()
    _aiter_import.reset()
    for name in [name for name in sys.modules if name.partition(".")[0] == "aiter"]:
        del sys.modules[name]
    assert providers.decided("cuda") != decided


def test_logging_itself_is_as_before_after_a_failure(tree):
    class Other(logging.Logger):
        pass

    change = (
        "import logging\nlogging.disable(50)\nlogging.setLogRecordFactory(lambda *a, **k: None)\n"
        "class Other(logging.Logger): pass\nlogging.setLoggerClass(Other)\nlogging.addLevelName(20, 'NOTE')\n"
        "raise RuntimeError\n"
    )
    tree({**BROKEN, "__init__.py": change})
    before = logging.root.manager.disable, logging.getLoggerClass(), logging.getLogRecordFactory()
    with pytest.raises(ProviderUnavailable):
        _aiter_import.load(FUNCTIONS[0])
    assert (logging.root.manager.disable, logging.getLoggerClass(), logging.getLogRecordFactory()) == before
    assert (logging.getLevelName(20), logging.getLevelName("INFO"), logging.getLevelName("NOTE")[:5]) == (
        "INFO",
        20,
        "Level",
    )


def test_a_function_that_uses_what_it_never_imports(tree):
    """gemm_afp4wfp4_preshuffled_scales of 0.1.10 calls a kernel by a name that is not there."""
    file = "ops/triton/gemm/basic/gemm_afp4wfp4.py"
    name = "gemm_afp4wfp4_preshuffled_scales"
    tree(
        {**NEW, file: function("gemm_afp4wfp4", f"{GEMM}, skip_reduce=False") + function(name, GEMM, "_kernel(len(x))")}
    )
    with pytest.raises(ProviderUnavailable, match=rf"AITER's {name} in .* uses '_kernel', which is not defined there"):
        _aiter_import.load(name)
    assert _aiter_import.load("gemm_afp4wfp4")


def test_rows_without_queries_are_not_for_releases_that_count_both(tree):
    file = "ops/triton/fusions/fused_kv_cache.py"
    name, arguments = "fused_qk_rope_cat_and_cache_mla", {}
    for text, refused in (("assert b == b2 == bk == bk2\n", True), ("assert b == b2 and b <= bk\n", False)):
        tree({**NEW, file: f"def check(b, b2, bk, bk2):\n    {text}{NEW[file]}"}, f"refused {refused}")
        _aiter_import.reset()
        probes.reset()
        for module in [module for module in sys.modules if module.partition(".")[0] == "aiter"]:
            del sys.modules[module]
        loaded, _ = _aiter_import.load(name)
        why = _aiter_source.refused("concat_and_cache_mla.default", name, loaded, arguments)
        assert why.startswith("rows without queries") is refused
        assert not _aiter_source.refused("fused_rope_mla_kv_cache.absorbed", name, loaded, arguments)


@pytest.mark.parametrize("name", ["gemm_afp4wfp4", "gemm_afp4wfp4_preshuffled_scales"])
def test_widths_are_whole_tiles_for_releases_that_read_scales_behind_the_end(tree, name):
    file, kernels = "ops/triton/gemm/basic/gemm_afp4wfp4.py", "ops/triton/_triton_kernels/gemm.py"
    header = f"from aiter.{kernels[:-3].replace('/', '.')} import _gemm_afp4wfp4_kernel\n"
    jit = "class Jit:\n    def __init__(self, fn): self.fn = fn\n"
    for load, refused in (("load(a_scale_ptrs)", True), ("load(a_scale_ptrs, mask=scale_mask)", False)):
        kernel = f"{jit}@Jit\n@Jit\ndef _gemm_afp4wfp4_kernel():\n    {load}\n"
        files = {**NEW, kernels: kernel, "ops/triton/_triton_kernels/__init__.py": "", file: header + NEW[file]}
        tree(files, f"refused {refused}")
        _aiter_import.reset()
        probes.reset()
        for module in [module for module in sys.modules if module.partition(".")[0] == "aiter"]:
            del sys.modules[module]
        loaded, _ = _aiter_import.load(name)
        for width, fits in ((1024, True), (7168, True), (1536, False), (768, False)):
            given = {"x_codes": torch.empty(4, width // 2, dtype=torch.uint8)}
            why = _aiter_source.refused("mxfp4_gemm.default", name, loaded, given)
            assert bool(why) is (refused and not fits), why
        assert not _aiter_source.refused("mxfp4_gemm.default", "gemm_afp4wfp4_preshuffle", loaded, given)


def test_the_same_import_without_the_error_keeps_what_aiter_needs(tree):
    root = tree(LIVING)
    before = state()
    _, release = _aiter_import.load("fused_rms_mxfp4_quant")
    assert release == "new"
    assert torch._dynamo.config.ignore_logger_methods == before["ignored"]
    assert sys.path == [*before["path"], str(root / "jit" / "utils")]
    assert "build_targets" in sys.modules
    # What the import did beside that is AITER's own: undone here by hand.
    assert not logging.getLogger("aiter").propagate
    for name in ("aiter", "aiter.jit", "AITER_TRITON", "of_a_user"):
        logging.root.manager.loggerDict.pop(name)
    logging.getLogger().handlers[:] = before["loggers"][""][0]
    sys.meta_path[:] = before["meta_path"]
    torch._dynamo.config.cache_size_limit = before["dynamo"]["recompile_limit"]


NATIVE = "__spec__.origin = 'other_package.cpython-311-x86_64-linux-gnu.so'\n"


@pytest.mark.parametrize("case", ["plain Python", "an extension", "loaded before", "loaded before, with an extension"])
def test_modules_of_others_stay_where_a_second_import_may_fail(tree, tmp_path, monkeypatch, case):
    """To load an extension module twice fails, or ends the process."""
    other = tmp_path / "site" / "other_package"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text(
        "import sys, types\nsys.modules['other_package.made'] = types.ModuleType('made')\n"
    )
    (other / "part.py").write_text(NATIVE if case == "an extension" else "")
    tree({**BROKEN, "__init__.py": f"import other_package.part, colorsys\n{BROKEN['__init__.py']}"})
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    (other / "core.py").write_text(NATIVE)
    if case.startswith("loaded before"):
        importlib.import_module("other_package.core" if "extension" in case else "other_package")
    before = state()
    with pytest.raises(ProviderUnavailable):
        _aiter_import.load(FUNCTIONS[0])
    left = {
        "plain Python": set(),
        "an extension": {"other_package", "other_package.made", "other_package.part", "colorsys"},
        "loaded before": set(),
        "loaded before, with an extension": {"other_package.part", "colorsys"},
    }[case]
    assert set(sys.modules) - set(before["modules"]) == left
    assert changes(before) == (["modules"] if left else [])


def test_modules_that_were_replaced_or_taken_out_are_put_back(tree):
    import colorsys

    text = "import sys, types\nsys.modules['aiter_trees'] = types.ModuleType('x')\ndel sys.modules['colorsys']\n"
    text += "raise OSError\n"
    tree({**NEW, "__init__.py": text})
    before = state()
    with pytest.raises(ProviderUnavailable, match="importing aiter failed with OSError"):
        _aiter_import.load(FUNCTIONS[0])
    assert changes(before) == []
    assert sys.modules["colorsys"] is colorsys


def test_a_submodule_that_raises_is_taken_out_alone(tree):
    tree({**NEW, "ops/triton/activation.py": f"{function('act_mul_and_mxfp4_quant', 'x')}raise KeyError('gfx1030')\n"})
    _aiter_import.load("dynamic_mxfp4_quant")
    before = state()
    with pytest.raises(
        ProviderUnavailable, match=r"importing aiter\.ops\.triton\.activation failed with KeyError: 'gf"
    ):
        _aiter_import.load("act_mul_and_mxfp4_quant")
    assert changes(before) == []
    assert _aiter_import.load("dynamic_mxfp4_quant")[1] == "new"
    assert _aiter_import.load("fused_rms_mxfp4_quant")[1] == "new"


def test_an_interrupted_import_is_undone_and_not_remembered(tree):
    tree({**BROKEN, "__init__.py": BROKEN["__init__.py"].replace("RuntimeError", "KeyboardInterrupt")})
    before = state()
    with pytest.raises(KeyboardInterrupt):
        _aiter_import.load(FUNCTIONS[0])
    assert changes(before) == []
    assert _aiter_import.failure(FUNCTIONS[0]) is None


PADDED = f"{RMS}, scale_shuffle_padding=False"


@pytest.mark.parametrize(
    ("name", "parameters", "release"),
    [
        ("fused_rms_mxfp4_quant", f"{PADDED}, output_unquantized_inp1=False", "new"),
        ("fused_rms_mxfp4_quant", PADDED, "old"),
        ("fused_rms_mxfp4_quant", f"{PADDED}, output_unquantized_inp1=False, inargs='auto', more=None", None),
        ("fused_rms_mxfp4_quant", PADDED.replace("x1_weight, x1_epsilon", "x1_epsilon, x1_weight"), None),
        ("fused_rms_mxfp4_quant", "*args, **kwargs", None),
        # A known addition upstream: keyword-only, with defaults. Without a default it must be given.
        ("dynamic_mxfp4_quant", "x, scaling_mode='even', *, use_sr=False, philox_seed=0", "new"),
        ("dynamic_mxfp4_quant", "x, scaling_mode='even', *, use_sr", None),
        ("dynamic_mxfp4_quant", "x", None),
        ("gemm_afp4wfp4", "x, w, y, x_scales, w_scales, dtype=None", None),
        ("gemm_afp4wfp4", GEMM, "old"),
        ("fused_qk_rope_cat_and_cache_mla", ROPE, "old"),
        ("fused_qk_rope_cat_and_cache_mla", f"{ROPE}, shuffled_kv_cache=False", "new"),
        ("fused_qk_rope_cat_and_cache_mla", f"{ROPE}, shuffled=False", None),
        # Without the last parameter it writes no query for a token without a slot: known, and never given a call.
        ("fused_qk_rope_concat_and_cache_mla", HIP_ROPE, "old"),
        ("fused_qk_rope_concat_and_cache_mla", f"{HIP_ROPE}, compute_all_q_rope=False", "new"),
        ("fused_qk_rope_concat_and_cache_mla", f"{HIP_ROPE}, compute_all=False", None),
        ("gemm_afp4wfp4_preshuffled_scales", GEMM, "new"),
        ("gemm_afp4wfp4_preshuffled_scales", f"{GEMM}, skip_reduce=False", None),
    ],
)
def test_signatures(tree, name, parameters, release):
    file = _aiter_files.CAPABILITIES[name].new
    root = tree({**NEW, file: function(name, parameters)})
    assert probes.probe_aiter_capability(name)
    if release is not None:
        assert _aiter_import.load(name)[1] == release
        return
    for _ in range(2):
        with pytest.raises(ProviderUnavailable) as raised:
            _aiter_import.load(name)
        why = str(raised.value)
        assert f"AITER's {name} has a signature that no known release had: got (" in why
        assert f"in {root / file}, allowed (" in why
        assert "so it is not called. Use provider='auto' or 'triton'" in why


def test_a_signature_behind_a_guard_is_read_from_the_file(tree):
    """The guard came with the return of four tensors; before it the same parameters gave the cache back."""
    name, file = "fused_qk_rope_cat_and_cache_mla", "ops/triton/fusions/fused_kv_cache.py"
    guard = NEW[file][: NEW[file].index("def fused")]
    tree({**NEW, file: guard + function(name, ROPE)})
    loaded, release = _aiter_import.load(name)
    assert str(inspect.signature(loaded)) == "(*args, **kwargs)"
    assert release == "new"


def test_a_guard_hides_no_change(tree):
    name, file = "fused_qk_rope_concat_and_cache_mla", "ops/cache.py"
    tree({**NEW, file: NEW[file].replace("is_neox, is_nope_first", "is_nope_first, is_neox")})
    with pytest.raises(
        ProviderUnavailable, match=r"has a signature that no known release had: got .*q_nope, q_pe, kv_c"
    ):
        _aiter_import.load(name)


def test_a_module_that_is_not_the_file_that_was_found(tree, monkeypatch):
    root = tree(NEW)
    assert probes.probe_aiter_capability("act_mul_and_mxfp4_quant")
    name = "aiter.ops.triton.activation"
    stub = type(sys)(name)
    stub.__file__ = str(root / "elsewhere.py")
    monkeypatch.setitem(sys.modules, name, stub)
    with pytest.raises(
        ProviderUnavailable, match=r"aiter\.ops\.triton\.activation was loaded from .*elsewhere\.py, and"
    ):
        _aiter_import.load("act_mul_and_mxfp4_quant")


@pytest.mark.parametrize("name", _aiter_files.QUANTISING)
def test_how_codes_are_rounded_decides_the_release_too(tree, name):
    """amd-aiter 0.1.7 has today's signature of one of these, and rounds ties away from zero."""
    file = "ops/triton/_triton_kernels/quant/quant.py"
    root = tree({**NEW, file: OLD["ops/triton/_triton_kernels/quant.py"]})
    assert _aiter_import.load(name)[1] == "old"
    _aiter_import.reset()
    # Comments and layout are no code.
    (root / file).write_text(NEW[file].replace("return", '"""Docs."""\n    # why\n    return'))
    assert _aiter_import.load(name)[1] == "new"
    for text in (function("_mxfp4_quant_op", "x", "x + 1"), "", None):
        _aiter_import.reset()
        if text is None:
            (root / file).unlink()
        else:
            (root / file).write_text(text)
        with pytest.raises(
            ProviderUnavailable, match=rf"AITER's {name} rounds by code that no known release had: got "
        ):
            _aiter_import.load(name)
        # What quantises nothing does not mind.
        assert _aiter_import.load("gemm_afp4wfp4")[1] == "new"


def test_the_layout_of_old_releases_with_the_rounding_of_new_ones(tree):
    """amd-aiter 0.1.8: dynamic_mxfp4_quant, whose signature never changed, rounds to even."""
    file = "ops/triton/_triton_kernels/quant.py"
    tree({**OLD, file: NEW["ops/triton/_triton_kernels/quant/quant.py"]})
    assert _aiter_import.load("dynamic_mxfp4_quant")[1] == "new"
    assert _aiter_import.load("gemm_afp4wfp4")[1] == "old"


def test_the_digest_is_of_code_alone():
    code = "@jit\ndef f(x):\n    y = x + 1\n    return g(y, 'even')\n"
    digest = _aiter_files.digest(code, "f")
    alike = (
        code.replace("@jit\n", "import a\n\n\n@jit\n"),
        code.replace("    y", '    """What it does,\n\n    and why."""\n    y'),
        code.replace("+ 1", "+ 1  # one"),
        code.replace("g(y, 'even')", "g(\n        y, 'even'\n    )"),
    )
    assert {_aiter_files.digest(text, "f") for text in alike} == {digest}
    changes = (("+", "-"), ("1", "2"), ("g(", "h("), ("'even'", "'odd'"), ("return g(y, 'even')", "return y"))
    others = {_aiter_files.digest(code.replace(old, new), "f") for old, new in changes}
    assert len(others - {digest, ""}) == len(changes)
    assert _aiter_files.digest(code, "g") == ""


def test_every_capability_has_forms():
    assert set(_aiter_import.FORMS) == set(_aiter_files.CAPABILITIES)
