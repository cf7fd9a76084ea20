# SPDX-License-Identifier: Apache-2.0
"""Writes schedules.hpp beside itself: what Python's schedulers set, epoch by epoch, to the last bit.

    python3 tests/reference/schedules.py     # torch 2.11.0, transformers 4.57.1 (for wsd alone)

A row is an epoch, a column a parameter group; beta1 or momentum of the groups follow where they
cycle. Cosines and powers are the C library's: another library may differ in a last bit, so the
tables were made where glibc's were used.
"""
import pathlib
import warnings

import torch
from torch.optim import lr_scheduler as lr
from transformers.optimization import get_wsd_schedule

warnings.filterwarnings("ignore")
LRS = [0.1, 3e-3]


def groups(make=torch.optim.SGD, **options):
    return make([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in LRS],
                lr=1.0, **options)


def run(optimizer, epochs, *schedulers, every=1, momentum=None, between=None):
    rows = []
    for epoch in range(epochs):
        if epoch % every == 0:
            row = [group["lr"] for group in optimizer.param_groups]
            if momentum == "betas":
                row += [group["betas"][0] for group in optimizer.param_groups]
            elif momentum:
                row += [group["momentum"] for group in optimizer.param_groups]
            rows.append(row)
        if epoch == epochs - 1:
            break
        if between:
            between(epoch, optimizer)
        for scheduler in schedulers:
            scheduler.step()
    return rows


def simple(make, epochs, **how):
    optimizer = groups()
    return run(optimizer, epochs, make(optimizer), **how)


def halve_at_four(epoch, optimizer):
    if epoch == 4:
        for group in optimizer.param_groups:
            group["lr"] *= 0.5


def one_cycle(rows, make=torch.optim.SGD, momentum=None, options=None, **how):
    optimizer = groups(make, **(options or {}))
    return run(optimizer, rows, lr.OneCycleLR(optimizer, **how), momentum=momentum)


def chained():
    optimizer = groups()
    warm_up = lr.LinearLR(optimizer, start_factor=0.1, total_iters=4)
    cosine = lr.CosineAnnealingLR(optimizer, T_max=6, eta_min=1e-4)
    return run(optimizer, 16, warm_up, cosine)


def sequential(epochs, milestones, *makes, **how):
    optimizer = groups()
    parts = [make(optimizer) for make in makes]
    return run(optimizer, epochs, lr.SequentialLR(optimizer, parts, milestones), **how)


def wsd(epochs, **how):
    optimizer = groups()
    return run(optimizer, epochs, get_wsd_schedule(optimizer, **how))


def linear(**how):
    return lambda o: lr.LinearLR(o, **how)


def cosine(*a):
    return lambda o: lr.CosineAnnealingLR(o, *a)


def polynomial(*a):
    return lambda o: lr.PolynomialLR(o, *a)


def powers(o):
    return lr.LambdaLR(o, lambda epoch: 0.95**epoch)


TABLES = {
    "Linear": simple(linear(start_factor=0.1, total_iters=7), 11),
    "LinearDefaults": simple(linear(), 8),
    "LinearDown": simple(linear(start_factor=1.0, end_factor=0.0, total_iters=6), 9),
    "LinearLong": simple(linear(start_factor=1e-3, total_iters=900), 1001, every=50),
    "LinearHalved": simple(linear(start_factor=0.1, total_iters=7), 11, between=halve_at_four),
    "Cosine": simple(cosine(10, 1e-5), 35),
    "CosineOfOne": simple(cosine(1, 1e-3), 6),
    "CosineLong": simple(cosine(1000), 3001, every=100),
    "CosineHalved": simple(cosine(10), 12, between=halve_at_four),
    "Polynomial": simple(polynomial(7), 10),
    "PolynomialSquared": simple(polynomial(9, 2.0), 12),
    "PolynomialRoot": simple(polynomial(300, 0.9), 321, every=20),
    "OneCycle": one_cycle(21, max_lr=[0.5, 0.02], total_steps=20, momentum="momentum",
                          options={"momentum": 0.9}),
    "OneCycleBetas": one_cycle(31, make=torch.optim.AdamW, max_lr=0.01, epochs=6, steps_per_epoch=5,
                               pct_start=0.25, base_momentum=[0.8, 0.7], max_momentum=[0.9, 0.99],
                               div_factor=10.0, final_div_factor=300.0, momentum="betas"),
    "OneCycleLinear": one_cycle(25, max_lr=0.3, total_steps=25, pct_start=0.4,
                                anneal_strategy="linear", three_phase=True, cycle_momentum=False),
    "OneCycleThreePhases": one_cycle(24, max_lr=0.3, total_steps=23, three_phase=True,
                                     momentum="momentum", options={"momentum": 0.5}),
    "OneCycleDownOnly": one_cycle(8, max_lr=0.3, total_steps=8, pct_start=0.0,
                                  cycle_momentum=False),
    "Lambda": simple(lambda o: lr.LambdaLR(o, [lambda e: 0.95**e, lambda e: 1 / (1 + e // 3)]), 12),
    "Chained": chained(),
    "WarmUpCosine": sequential(30, [5], linear(start_factor=0.01, total_iters=5), cosine(20, 1e-4)),
    "FourParts": sequential(40, [4, 10, 22], powers, linear(start_factor=0.5, total_iters=5),
                            polynomial(9, 1.5), cosine(6, 1e-4)),
    "PartLeftOut": sequential(15, [5, 5], linear(start_factor=0.2), powers, polynomial(6)),
    "IntoRoundedCosine": sequential(8, [2], powers, cosine(5, 0.011)),  # 0.011 + (3e-3 - 0.011)
    "IntoOneCycle": sequential(20, [6], linear(start_factor=0.5), lambda o: lr.OneCycleLR(
        o, max_lr=0.4, total_steps=13, cycle_momentum=False)),
    "OneCycleFirst": sequential(20, [13], lambda o: lr.OneCycleLR(
        o, max_lr=0.4, total_steps=13, cycle_momentum=False), cosine(5)),
    "Wsd": wsd(26, num_warmup_steps=6, num_stable_steps=7, num_decay_steps=9),
    "WsdLinear": wsd(26, num_warmup_steps=6, num_stable_steps=7, num_decay_steps=9,
                     warmup_type="cosine", decay_type="linear", min_lr_ratio=0.1),
    "WsdRoot": wsd(26, num_warmup_steps=6, num_stable_steps=7, num_decay_steps=9,
                   warmup_type="1-sqrt", decay_type="1-sqrt", min_lr_ratio=0.01),
    "WsdNoWarmup": wsd(12, num_warmup_steps=0, num_stable_steps=4, num_decay_steps=6),
}


def written(row):
    return "{" + ", ".join(float.hex(float(value)) for value in row) + "}"


lines = [
    "// SPDX-License-Identifier: Apache-2.0",
    "#pragma once",
    f"/// Written by schedules.py with torch {torch.__version__.split('+')[0]}. A row is an epoch (or"
    " every n-th one), a column a group.",
    "// clang-format off",
    "namespace fourfold::reference {",
    "",
]
for name, rows in TABLES.items():
    lines.append(f"inline constexpr double k{name}[][{len(rows[0])}] = {{")
    lines += [f"    {written(row)}," for row in rows]
    lines += ["};", ""]
lines.append("}  // namespace fourfold::reference")
pathlib.Path(__file__).with_name("schedules.hpp").write_text("\n".join(lines) + "\n")
