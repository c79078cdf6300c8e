"""Which noise levels a training sees: densities over the model's own table.

| timestep_density | a level's place in the table is |
|---|---|
| own | even over the table: DDPM's timesteps; of flow matching σ with the family's shift in it |
| uniform | even over the time that the network is told: σ of flow matching without the shift |
| logit_normal | sigmoid(m + s n), n normal, of the table's length (arXiv 2403.03206, section 3.1), the shift in it |
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..model import Schedule
from ..options import TaskOptions


def drawn(schedule: Schedule, options: TaskOptions, rows: int, generator: torch.Generator) -> Tensor:
    """Timesteps (rows, int64) of a batch, from the CPU generator of its step."""
    total = len(schedule)
    if options.timestep_density == "own":
        return torch.randint(total, (rows,), generator=generator)
    if options.timestep_density == "logit_normal":
        normal = torch.randn(rows, generator=generator)
        place = torch.sigmoid(options.density_mean + options.density_deviation * normal)
        return (place * total).long().clamp(max=total - 1)
    first, last = schedule.times[0], schedule.times[-1]
    at = first + (last - first) * torch.rand(rows, generator=generator)
    return torch.searchsorted(schedule.times, at).clamp(max=total - 1)
