"""The answer of a probe."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Answer of a probe; truthy when ``ok``. ``why`` says what was found, or what is missing."""

    ok: bool
    why: str

    def __bool__(self) -> bool:
        return self.ok
