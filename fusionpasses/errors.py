"""The errors this package raises on purpose.

Every message has four parts, in this order: what is wrong, what was got, what is allowed, what to do.
"""

from __future__ import annotations


class FusionError(Exception):
    """Base of every error raised by fusionpasses."""


class UnsupportedInput(FusionError):
    """A tensor, module or argument outside the contract of an op. Nothing was changed."""


class ProviderUnavailable(FusionError):
    """A provider was asked for by name and cannot serve; explicit requests never fall back.

    Where a name means a rule (AITER for the calls it is exact for, else Triton), following it is no fallback."""


class BadConfig(FusionError):
    """A setting of the backend, or a registration, that cannot be honoured. Raised before compilation."""


class BadCheckpoint(FusionError):
    """A checkpoint that does not hold what its format, or the model, asks for. The model was not changed."""


class OpCountMismatch(FusionError, AssertionError):
    """The compiled graphs do not hold the number of ops a test asked for."""


class NotEquivalent(FusionError, AssertionError):
    """A graph computes something else after the passes than before them."""
