# SPDX-License-Identifier: Apache-2.0
"""Writes ema.hpp beside itself: averages of a scripted run by Python's torch.optim.swa_utils.

    python3 tests/reference/ema.py     # torch 2.11.0
"""
import pathlib

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def weights(step):
    """As the test makes them: exact in fp32."""
    return torch.arange(6, dtype=torch.float32) * (step % 5) / 8 - step / 4


def bits(tensor):
    return ", ".join(f"0x{b & 0xFFFFFFFF:08X}u" for b in tensor.view(torch.int32).tolist())


lines = ["// SPDX-License-Identifier: Apache-2.0"]
lines.append("#pragma once")
lines.append(f"/// By tests/reference/ema.py, of Python's torch {torch.__version__.split('+')[0]}: bits of fp32 averages.")
lines.append("#include <array>\n#include <cstdint>\n")
lines.append("struct EmaStep {\n  double decay;\n  int updates;\n  std::array<std::uint32_t, 6> average;\n};\n")
lines.append("inline constexpr EmaStep kEmaSteps[] = {")
for decay in (0.999, 0.9, 0.25, 1.0, 0.0):
    model = torch.nn.Linear(6, 1, bias=False)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    for step in range(1, 31):
        with torch.no_grad():
            model.weight.copy_(weights(step).view(1, 6))
        average.update_parameters(model)
        if step in (1, 2, 3, 10, 30):
            lines.append(f"    {{{decay}, {step}, {{{bits(average.module.weight.detach().flatten())}}}}},")
lines.append("};")
pathlib.Path(__file__).with_suffix(".hpp").write_text("\n".join(lines) + "\n")
