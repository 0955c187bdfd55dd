"""What the README and the examples show, runs."""

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


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
    blocks = re.findall(r"```python\n(.*?)```", readme, re.S)
    assert len([line for line in blocks[0].splitlines() if line.strip()]) == 8
    # The second block checks the model of the first.
    result = run(
        "-c", f"{blocks[0]}\nx = torch.randn(2, 4096).bfloat16()\nwith torch.no_grad():\n{indented(blocks[1])}"
    )
    assert result.returncode == 0, result.stderr
    shown = re.findall(r"```text\n(.*?)```", readme, re.S)[0].splitlines()
    printed = result.stdout.splitlines()
    for i, line in enumerate(shown):
        # The time is that of the machine, and the line numbers are those of the installed torch.
        if "passes took" not in line and " at " not in line:
            assert line == printed[i]


def indented(code):
    return "\n".join(f"    {line}" for line in code.splitlines())


def test_quickstart():
    result = run("examples/quickstart.py")
    assert result.returncode == 0, result.stderr
    out = result.stdout
    assert "12 sites fused (18 quants), 0 refused, 6 with nothing to fuse" in out
    assert "model.layers.1.post_attention_layernorm" in out
    assert "modeling_deepseek_v3.py" in out
    assert "0 differ, largest difference 0" in out
    assert "fused against eager                0 (byte-equal)" in out
    assert "UserWarning" not in result.stderr


def test_every_example_has_a_main_and_is_tested_here():
    examples = sorted(p.stem for p in (ROOT / "examples").glob("*.py"))
    for name in examples:
        assert "def main()" in (ROOT / "examples" / f"{name}.py").read_text()
        assert f"def test_{name}" in pathlib.Path(__file__).read_text()
