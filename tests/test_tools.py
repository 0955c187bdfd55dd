"""The two commands name what is missing before anything is set up."""

import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def check_tools(tmp_path, *programs, **environment):
    """Run the check with only these programs on the PATH."""
    for program in ("sh", "command", *programs):
        found = shutil.which(program)
        if found and not (tmp_path / program).exists():
            (tmp_path / program).symlink_to(found)
    return subprocess.run(
        [shutil.which("sh"), str(ROOT / "tools" / "check_tools.sh")],
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path), "PYTHON": sys.executable, **environment},
        check=False,
    )


def test_nothing_is_missing_here(tmp_path):
    compiler = "g++" if shutil.which("g++") else "clang++"
    result = check_tools(tmp_path, "git", compiler)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_each_missing_tool_is_named_with_what_to_do(tmp_path):
    result = check_tools(tmp_path)
    assert result.returncode == 1
    assert "missing: git\n   what to do: install git" in result.stderr
    assert "missing: a C++ compiler (g++ or clang++)" in result.stderr


def test_a_missing_or_old_python_is_named(tmp_path):
    result = check_tools(tmp_path, "git", PYTHON="python-of-nowhere")
    assert result.returncode == 1
    assert "missing: python-of-nowhere" in result.stderr
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.1\nexit 1\n')
    old.chmod(0o755)
    result = check_tools(tmp_path, PYTHON=str(old))
    assert "missing: Python 3.10 or newer" in result.stderr
    assert "Python 3.9.1" in result.stderr


def test_a_compiler_that_cxx_names_must_exist(tmp_path):
    result = check_tools(tmp_path, "git", CXX="no-such-compiler")
    assert "the C++ compiler that CXX names (no-such-compiler)" in result.stderr
