"""The noise levels of flow matching, as diffusers' FlowMatchEulerDiscreteScheduler lays them out."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class FlowSchedule(msgspec.Struct, frozen=True, kw_only=True):
    """``scheduler_config.json``: levels from 1 down to 0, the fewer at the end the larger ``shift``."""

    shift: float
    num_train_timesteps: int
    use_dynamic_shifting: bool = False
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    invert_sigmas: bool = False
    shift_terminal: None = None

    def __post_init__(self) -> None:
        odd = [name for name in self.__struct_fields__ if getattr(self, name) is True]
        if odd:
            raise ValueError(f"{odd[0]} is not supported in a model with text.json")

    def sigmas(self, steps: int) -> Tensor:
        """The levels at steps 0..T, shape (T + 1,).

        The shift comes in twice, as it does in diffusers: the least level that training knows is a shifted one itself.
        """
        times = self.num_train_timesteps
        highest, lowest = self._shifted(np.array([times, 1], dtype=np.float32) / times)
        levels = self._shifted(np.linspace(float(highest) * times, float(lowest) * times, steps) / times)
        return torch.cat([torch.from_numpy(levels).float(), torch.zeros(1)])

    def _shifted(self, levels: NDArray[Any]) -> NDArray[Any]:
        return self.shift * levels / (1 + (self.shift - 1) * levels)
