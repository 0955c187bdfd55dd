"""Yes or no, and why: what probes answer, and whether it pays to join two ops."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Truthy when ``ok``. ``why`` says what was found, or what is missing."""

    ok: bool
    why: str

    def __bool__(self) -> bool:
        return self.ok
