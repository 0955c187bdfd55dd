"""pytest fixtures: ``assert_fused`` and ``assert_equivalent``.

pytest imports this in every run of an environment that has fusionpasses installed. It is no module of the package,
because importing one imports torch; nothing is, until a fixture is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def assert_fused() -> Callable[..., Any]:
    """:func:`fusionpasses.testing.assert_fused`: ``assert_fused(model, inputs, {"rmsnorm_mxfp4_quant": 4})``."""
    from fusionpasses.testing import assert_fused

    return assert_fused


@pytest.fixture
def assert_equivalent() -> Callable[..., Any]:
    """:func:`fusionpasses.testing.assert_equivalent`: ``assert_equivalent(model, inputs)``."""
    from fusionpasses.testing import assert_equivalent

    return assert_equivalent
