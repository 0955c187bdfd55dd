"""What the launch heuristics and the kernels' fast paths know of a GPU."""

from __future__ import annotations

import dataclasses
import functools

import torch


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
    def hopper_ptx(self) -> bool:
        """Packed bfloat16 arithmetic, packed 16-bit minima and programmatic dependent launch: PTX from sm_90 on."""
        return self.name.startswith("sm_") and int(self.name[3:]) >= 90


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
