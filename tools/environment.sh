#!/bin/sh
# Makes the environment in $VENV. Arguments: the modules the caller needs; when they are there, nothing is installed.
#
# A torch that can be imported is never replaced: its exact version binds everything that is installed after it.
set -eu
here=$(dirname "$0")
sh "$here/check_tools.sh"

if [ ! -x "$VENV/bin/python" ]; then
    # Packages of PYTHON come along by a path file as well, because PYTHON may itself be a virtual environment, whose
    # packages --system-site-packages would not see.
    "$PYTHON" -m venv ${SYSTEM_SITE:+--system-site-packages} "$VENV"
    if [ -n "$SYSTEM_SITE" ]; then
        theirs=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
        ours=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
        echo "$theirs" > "$ours/reused_packages.pth"
    fi
fi
python=$VENV/bin/python

missing=""
for module in "$@"; do
    "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$module') is None)" ||
        missing="$missing $module"
done
if [ -z "$missing" ]; then
    exit 0
fi

if ! "$python" -c 'import torch' 2>/dev/null; then
    if [ -n "$SYSTEM_SITE" ]; then
        echo "SYSTEM_SITE=1 was given, but $PYTHON has no torch to reuse; name one that has, or leave SYSTEM_SITE out" >&2
        exit 1
    fi
    echo "installing $TORCH into $VENV"
    "$python" -m pip install --quiet --disable-pip-version-check "$TORCH"
fi
# The version that pip knows: a wheel of the package index says 2.10.0 where torch.__version__ is 2.10.0+cu128.
"$python" -c 'import importlib.metadata; print("torch==" + importlib.metadata.version("torch"))' > "$VENV/constraints.txt"
# A torch built for GPUs has brought its own Triton; other versions of it are not for this torch.
if "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("triton") is None)'; then
    extras=dev
else
    extras=dev,triton
fi
echo "using $(cat "$VENV/constraints.txt"); installing the rest into $VENV:$missing"
"$python" -m pip install --quiet --disable-pip-version-check --constraint "$VENV/constraints.txt" --editable ".[$extras]"
