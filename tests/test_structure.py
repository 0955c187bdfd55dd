"""The rules of DESIGN.md that a machine can check."""

import ast
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "fusionpasses"
SOURCES = sorted(PACKAGE.rglob("*.py"))

#: What each layer may import of the package, at any level of a file.
ALLOWED = {
    "errors": set(),
    "_verdict": set(),
    "_aiter_files": set(),
    "_aiter_numerics": {"_verdict"},
    "probes": {"_aiter_files", "_aiter_numerics", "_verdict"},
    "report": {"errors"},
    "config": {"errors", "patterns"},
    "kernels": set(),
    "providers": {"_aiter_files", "_aiter_numerics", "errors", "config", "probes", "kernels", "ops"},
    "ops": {"errors", "providers"},
    "anchors": {"errors", "config", "ops"},
    "nn": {"errors", "ops"},
    "patterns": {"anchors", "config", "ops", "providers", "report"},
    "dynamo_floats": {"anchors"},
    "dump": {"errors", "patterns", "pipeline", "probes", "providers", "report"},
    "remarks": {"kernels", "patterns", "probes"},
    "who_runs": {"patterns", "providers", "remarks", "report"},
    "then_gemm": {"_verdict", "kernels", "patterns", "remarks"},
    "then_mlp": {"kernels", "ops", "patterns", "remarks", "then_gemm"},
    "pipeline": {
        "anchors",
        "config",
        "dump",
        "errors",
        "patterns",
        "probes",
        "providers",
        "remarks",
        "report",
        "then_gemm",
        "then_mlp",
        "who_runs",
    },
    "records": {"report"},
    "direct_calls": {"ops", "pipeline"},
    "backend": {
        "anchors",
        "config",
        "direct_calls",
        "dump",
        "dynamo_floats",
        "errors",
        "pipeline",
        "providers",
        "records",
        "report",
    },
    "bench": {"errors", "ops", "probes", "providers"},
    "doctor": {"_aiter_files", "_aiter_numerics", "errors", "kernels", "ops", "probes", "providers"},
    "__main__": {"bench", "doctor", "errors"},
    "testing": {"anchors", "backend", "config", "dynamo_floats", "errors", "ops", "pipeline", "report"},
}


def layer(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Names of modules imported anywhere in a file, and whether at its top level."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{a.name}" for a in node.names]
        for name in names:
            yield name, node in tree.body


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    if path.name == "__init__.py" and path.parent == PACKAGE:
        return
    own = layer(path)
    for name, _ in imports(path):
        if name.startswith("fusionpasses."):
            other = name.split(".")[1]
            assert other == own or other in ALLOWED[own], f"{own} must not import {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_optional_packages_are_imported_where_they_are_used(path):
    for name, top_level in imports(path):
        if name.split(".")[0] in ("triton", "aiter") and layer(path) != "kernels":
            holds_a_kernel = layer(path) == "providers" or path.name == "copy_kernel.py"
            assert not top_level or holds_a_kernel, f"{path} imports {name}"
        assert name.split(".")[0] not in ("transformers", "depyf")
        if name.split(".")[0] == "matplotlib":
            assert path.name == "plot.py"
            assert not top_level
        if top_level:
            assert not name.startswith("torch._inductor") or layer(path) in ("patterns", "pipeline")


def test_aiter_is_imported_in_one_place():
    """What importing it leaves behind is put right there."""
    for path in SOURCES:
        for name, _ in imports(path):
            assert name.split(".")[0] != "aiter" or path.name == "_aiter_import.py", f"{path} imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_code_rules(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"{path}:{node.lineno} asserts; raise an error a user can read"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path}:{node.lineno} catches everything"
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
            assert layer(path) == "dump", f"{path}:{node.lineno} reads the environment"
    assert ast.get_docstring(tree), f"{path} has no docstring"
    if layer(path) != "kernels":
        assert len(path.read_text().splitlines()) <= 450, f"{path} is long: can one idea be moved out?"


def test_no_pass_name_contains_another():
    from fusionpasses.patterns import PASS_NAMES

    assert not [(a, b) for a in PASS_NAMES for b in PASS_NAMES if a != b and a in b]
    for name in PASS_NAMES:
        assert (PACKAGE / "patterns" / f"{name}.py").exists()


BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked!r}:
            raise ModuleNotFoundError(f'{{name}} is blocked', name=name)
sys.meta_path.insert(0, Blocker())
"""


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        check=False,
    )


def test_works_without_optional_packages():
    code = BLOCKER.format(blocked=("triton", "aiter", "depyf", "transformers")) + (
        "import torch, fusionpasses as fp\n"
        "model = fp.quantize_mxfp4(torch.nn.Sequential(torch.nn.RMSNorm(64), torch.nn.Linear(64, 64)))\n"
        "from fusionpasses.testing import assert_fused\n"
        "with torch.no_grad(): assert_fused(model, (torch.randn(4, 64),), {'rmsnorm_mxfp4_quant': 1})\n"
        "print('ok', fp.last_quantization().quantized)"
    )
    result = run_python(code)
    assert result.stdout.strip() == "ok ['1']", result.stderr


def test_import_is_light():
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        # Of the processor: what runs beside the tests is not what is measured.
        "import time; start = time.process_time()\n"
        "import fusionpasses\n"
        "took = time.process_time() - start\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "assert not any(m.startswith('torch._inductor') for m in set(sys.modules) - before)\n"
        "assert not new & {'triton', 'aiter', 'depyf', 'transformers', 'numpy', 'pytest'}, new\n"
        "print(took)"
    )
    times = []
    for _ in range(3):
        result = run_python(code)
        assert result.returncode == 0, result.stderr
        times.append(float(result.stdout))
    assert min(times) < 0.3, times


def test_the_pytest_plugin_imports_neither_torch_nor_the_package():
    """It is imported in every pytest run of an environment."""
    result = run_python("import sys, fusionpasses_pytest; print('torch' in sys.modules, 'fusionpasses' in sys.modules)")
    assert result.stdout.strip() == "False False", result.stderr


def test_the_pytest_plugin_gives_the_assertions(pytester_free_run):
    result = pytester_free_run(
        "import torch\n"
        "def test_it(assert_fused, assert_equivalent):\n"
        "    model = lambda x: torch.ops.fusionpasses.dynamic_mxfp4_quant(torch.nn.functional.rms_norm(x, (64,)))\n"
        "    assert_fused(model, (torch.randn(4, 64),), {'rmsnorm_mxfp4_quant': 1})\n"
        "    assert_equivalent(model, (torch.randn(4, 64),))\n"
    )
    assert "1 passed" in result.stdout, result.stdout


@pytest.fixture
def pytester_free_run(tmp_path):
    """A pytest run of its own on one file, with the plugin given by name: it may not be installed."""

    def run(source):
        file = tmp_path / "test_plugin.py"
        file.write_text(source)
        code = (
            "import sys, pytest\n"
            f"sys.exit(pytest.main(['-q', '-p', 'fusionpasses_pytest', '-p', 'no:cacheprovider', {str(file)!r}]))"
        )
        return run_python(code, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")

    return run


def test_the_repository_speaks_of_the_project_alone():
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False)
    if tracked.returncode != 0:
        files = [p for p in ROOT.rglob("*") if p.suffix in (".py", ".md", ".toml") and ".venv" not in p.parts]
    else:
        files = [ROOT / f for f in tracked.stdout.splitlines()]
    machine = re.compile("/(" + "|".join(("root", "home", "work", "opt")) + r")/[a-z]+/")
    for file in files:
        if file.suffix in (".py", ".md", ".toml", ".sh", "") and file.is_file():
            found = machine.search(file.read_text(errors="ignore"))
            assert not found, f"{file}: {found}"
