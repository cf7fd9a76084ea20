# SPDX-License-Identifier: Apache-2.0
"""Writes grad_scales.hpp beside itself: what Python's GradScaler does in two scripted runs.

    python3 tests/reference/grad_scales.py     # torch 2.11.0

A row is an iteration: the scale after it, the growth tracker, and how many steps the two optimizers
have made. tests/gradients/grad_scaler_test.cpp plays the same scripts.
"""
import pathlib

import torch

inf, nan = float("inf"), float("nan")


def scaler_of(**options):
    return torch.amp.GradScaler("cpu", **options)


def parameter():
    weight = torch.nn.Parameter(torch.zeros(4))
    return weight, torch.optim.SGD([weight], lr=1.0)


def backward(scaler, weight, value):
    weight.grad = None
    scaler.scale((weight * torch.tensor([1.0, 2.0, value, 3.0])).sum()).backward()


def row(scaler, *steps):
    state = scaler.state_dict()
    return [state["scale"], state["_growth_tracker"], *steps]


def step(scaler, weight, optimizer):
    before = weight.detach().clone()
    scaler.step(optimizer)
    return int(not torch.equal(before, weight.detach()))


def scripted():
    """Infinities where the script has them; b is left out of each fourth iteration."""
    scaler = scaler_of(init_scale=1000.0, growth_factor=1.7, backoff_factor=0.3, growth_interval=3)
    bad_a, bad_b = {2: inf, 7: nan, 8: inf, 30: -inf}, {8: nan, 14: inf, 16: inf}
    (a, optimizer_a), (b, optimizer_b) = parameter(), parameter()
    steps_a = steps_b = 0
    rows = []
    for t in range(48):
        backward(scaler, a, bad_a.get(t, 1.0))
        if t % 5 == 0:
            scaler.unscale_(optimizer_a)
        steps_a += step(scaler, a, optimizer_a)
        if t % 4 != 3:
            backward(scaler, b, bad_b.get(t, 1.0))
            steps_b += step(scaler, b, optimizer_b)
        scaler.update(12345.678) if t == 20 else scaler.update()
        if t == 33:
            saved, scaler = scaler.state_dict(), scaler_of()
            scaler.load_state_dict(saved)
        if t == 40:
            scaler.set_growth_interval(1)
        rows.append(row(scaler, steps_a, steps_b))
    return rows


def overflowing():
    """Gradients of 2^30 under a scale that grows until their product leaves fp32."""
    scaler = scaler_of(init_scale=2.0**100, growth_interval=4)
    (a, optimizer), steps, rows = parameter(), 0, []
    for _ in range(30):
        backward(scaler, a, 2.0**30)
        steps += step(scaler, a, optimizer)
        scaler.update()
        rows.append(row(scaler, steps, 0))
    return rows


lines = [
    "// SPDX-License-Identifier: Apache-2.0",
    "#pragma once",
    f"/// Written by grad_scales.py with torch {torch.__version__.split('+')[0]}: an iteration's scale,"
    " growth tracker, and steps made.",
    "// clang-format off",
    "namespace fourfold::reference {",
    "",
]
for name, rows in {"Scripted": scripted(), "Overflowing": overflowing()}.items():
    lines.append(f"inline constexpr double kScales{name}[][4] = {{")
    lines += [f"    {{{float.hex(r[0])}, {r[1]}, {r[2]}, {r[3]}}}," for r in rows]
    lines += ["};", ""]
lines.append("}  // namespace fourfold::reference")
pathlib.Path(__file__).with_name("grad_scales.hpp").write_text("\n".join(lines) + "\n")
