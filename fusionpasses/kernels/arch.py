"""What the launch heuristics and the kernels' fast paths know of a GPU."""

from __future__ import annotations

import dataclasses
import functools

import torch

# Instructions that the kernels have a form of their own for; a GPU that has one has those before it.
#: None of them.
PLAIN = 0
#: One for a maximum that keeps NaN. Without it, and a comparison for each, the maximum is one of integers.
NAN_MAXIMUM = 1
#: One rounds float32 to bfloat16. Without it, three for each element do.
ROUNDS_BF16 = 2
#: PTX from sm_90 on: packed arithmetic, packed 16-bit minima and programmatic dependent launch.
PTX = 3


@dataclasses.dataclass(frozen=True)
class Arch:
    """A GPU architecture, and how many multiprocessors (AMD: compute units) this GPU has.

    Attributes:
        name: "sm_90", "gfx942", ...
        warp_size: threads of a warp (AMD: of a wavefront).
        processors: multiprocessors, or compute units.
    """

    name: str
    warp_size: int
    processors: int

    @property
    def isa(self) -> int:
        """The last of PLAIN, NAN_MAXIMUM, ROUNDS_BF16 and PTX that it has."""
        if self.name.startswith("sm_"):
            version = int(self.name[3:])
            return PTX if version >= 90 else ROUNDS_BF16 if version >= 80 else PLAIN
        if self.name.startswith(("gfx950", "gfx125")):
            return ROUNDS_BF16
        return NAN_MAXIMUM if self.name.startswith("gfx12") else PLAIN

    @property
    def hopper_ptx(self) -> bool:
        return self.isa == PTX


#: Where the kernels are interpreted there is no GPU; few programs, because each costs time.
INTERPRETED = Arch("interpreted", warp_size=32, processors=2)


@functools.cache
def of(device: torch.device) -> Arch:
    """The architecture of a device; that of a CPU is INTERPRETED."""
    if device.type != "cuda":
        return INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        name = properties.gcnArchName.partition(":")[0]
    else:
        name = f"sm_{properties.major}{properties.minor}"
    return Arch(name, properties.warp_size, properties.multi_processor_count)
