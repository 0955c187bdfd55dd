#!/bin/sh
# Names everything that is missing before anything is installed. PYTHON: the interpreter to build the environment with.
python=${PYTHON:-python3}
missing=0
need() {
    echo "missing: $1" >&2
    echo "   what to do: $2" >&2
    missing=1
}

command -v git >/dev/null 2>&1 || need "git" "install git"
if ! command -v "$python" >/dev/null 2>&1; then
    need "$python" "install Python 3.10 or newer, or name one: make demo PYTHON=/path/to/python3"
else
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        need "Python 3.10 or newer ($python is $("$python" -V 2>&1))" "name a newer one: make demo PYTHON=python3.12"
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        need "the venv and ensurepip modules of $python" "install your system's python3-venv package"
    header=$("$python" -c 'import os, sysconfig; print(os.path.join(sysconfig.get_paths()["include"], "Python.h"))')
    [ -f "$header" ] ||
        need "the C headers of $python ($header)" "install your system's python3-dev package; torch.compile builds against them"
fi
if [ -n "$CXX" ]; then
    command -v "$CXX" >/dev/null 2>&1 || need "the C++ compiler that CXX names ($CXX)" "correct CXX or unset it"
else
    command -v g++ >/dev/null 2>&1 || command -v clang++ >/dev/null 2>&1 ||
        need "a C++ compiler (g++ or clang++)" "install g++; torch.compile builds CPU code with it"
fi
exit $missing
