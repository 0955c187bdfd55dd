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
    # The second block uses the model of the first.
    result = run("-c", blocks[0] + "\ntokens = torch.arange(8).view(1, 8)\ntorch.set_grad_enabled(False)\n" + blocks[1])
    assert result.returncode == 0, result.stderr
    shown = re.findall(r"```text\n(.*?)```", readme, re.S)[0]
    assert shown.splitlines()[0] in result.stdout
    for line in shown.splitlines()[2:7]:
        assert line in result.stdout


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
