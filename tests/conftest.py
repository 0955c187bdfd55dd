"""What all tests run under."""

from __future__ import annotations

import gc

import pytest

# Tracing makes objects by the million, and hardly any is garbage: looking for it took up to a tenth of the time of
# tests that compile.
gc.set_threshold(50_000, 20, 100)

#: Few tests, and long ones. pytest-xdist starts the files with the most tests first: one worker of two would be left
#: with these at the end.
LONG = ("test_models.py", "test_docs.py", "test_mla_decode.py", "test_kernels.py", "test_rope_variants.py")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # since pytest-xdist 3.7
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)
