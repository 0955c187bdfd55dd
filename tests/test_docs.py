"""What the README and the examples show, runs."""

import os
import pathlib
import re
import subprocess
import sys

import torch

from fusionpasses.patterns import PASS_NAMES, pass_class
from fusionpasses.testing import assert_equivalent, assert_fused

ROOT = pathlib.Path(__file__).parent.parent


def python_of(file):
    return re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), re.S)


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        check=False,
    )


def test_the_first_lines_of_the_readme_run():
    readme = (ROOT / "README.md").read_text()
    blocks = python_of("README.md")
    assert len([line for line in blocks[0].splitlines() if line.strip()]) == 8
    # The second block checks the model of the first.
    result = run("-c", f"{blocks[0]}\nx = torch.randn(2, 4096).bfloat16()\n{blocks[1]}")
    assert result.returncode == 0, result.stderr
    shown = re.findall(r"```text\n(.*?)```", readme, re.S)[0].splitlines()
    printed = result.stdout.splitlines()
    for i, line in enumerate(shown):
        # The time is that of the machine, and torch's line numbers are those of the installed one.
        if "passes took" not in line and " at torch/" not in line:
            assert line == printed[i]


def indented(code):
    return "\n".join(f"    {line}" for line in code.splitlines())


def test_quickstart():
    result = run("examples/quickstart.py")
    assert result.returncode == 0, result.stderr
    out = result.stdout
    assert "15 sites fused (21 quants), 0 refused, 6 with nothing to fuse" in out
    assert "model.layers.1.post_attention_layernorm" in out
    assert "modeling_deepseek_v3.py" in out
    assert "k has one head and q 4, as in MLA, but k is expanded to all heads" in out
    assert "0 differ, largest difference 0" in out
    assert "fused against eager                0 (byte-equal)" in out
    assert "UserWarning" not in result.stderr


def test_the_cache_write_of_the_readme_fuses():
    (code,) = [block for block in python_of("README.md") if "concat_and_cache_mla(kv_c" in block]
    names = {"torch": torch}
    exec(code, names)
    tokens, heads, latent, width = 5, 3, 16, 8
    angles = torch.rand(tokens, width // 2)
    rows = [torch.randn(tokens, heads, width), torch.randn(tokens, width), torch.randn(tokens, latent)]
    cache = torch.zeros(4, 2, latent + width)
    inputs = (*rows, angles.cos(), angles.sin(), torch.tensor([3, 0, -1, 7, 5]), cache)
    assert_fused(names["rotate_and_write"], inputs, {"fused_rope_mla_kv_cache": 1})
    assert_equivalent(names["rotate_and_write"], inputs)


def test_every_guard_is_in_the_page_of_passes():
    page = (ROOT / "docs" / "passes.md").read_text()
    sections = dict(zip(*[iter(re.split(r"^## `(\w+)`$", page, flags=re.M)[1:])] * 2, strict=True))
    assert tuple(sections) == PASS_NAMES
    for name, text in sections.items():
        rows = [
            f"| {guard.name} | {guard.requires} |" for guards in pass_class(name).guards.values() for guard in guards
        ]
        assert [line for line in text.splitlines() if line in rows] == rows


def test_every_example_has_a_main_and_is_tested():
    for example in (ROOT / "examples").glob("*.py"):
        name = example.stem
        assert "def main(" in example.read_text()
        here = f"def test_{name}" in pathlib.Path(__file__).read_text()
        assert here or (ROOT / "tests" / f"test_{name}.py").exists()
