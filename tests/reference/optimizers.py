# SPDX-License-Identifier: Apache-2.0
"""Writes optimizers.hpp beside itself: where Python's optimizers take a matrix and a vector in 100 steps.

    python3 tests/reference/optimizers.py     # torch 2.11.0

Starts and gradients are formulas of small integers, exact in fp32 (start() and gradient() of
tests/optim/oracle.hpp are the same), so nothing but results need be written down. Tables are of fp32
parameters, those named Double of fp64 ones.
"""
import pathlib

import torch

SIZES = [(12, 10), (7,)]
STEPS = 100


def start(n):
    i = torch.arange(n, dtype=torch.int64)
    return ((i * 37 % 101 - 50).double() / 64)


def gradient(n, step):
    i = torch.arange(n, dtype=torch.int64)
    whole = (i * 7919 + step * 104729 + i * step * 31) % 2001 - 800
    return whole.double() / 1024 / 2.0 ** (i % 5)


class Lion(torch.optim.Optimizer):
    """Program 1 of arXiv 2302.06675, decaying first as its authors' PyTorch code does."""

    def __init__(self, params, lr, betas, weight_decay):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                b1, b2 = group["betas"]
                update = torch.sign(b1 * m + (1 - b1) * p.grad)
                m.mul_(b2).add_((1 - b2) * p.grad)
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)


def run(make, sizes=SIZES, dtype=torch.float32):
    params = []
    for size in sizes:
        n = torch.Size(size).numel()
        params.append(torch.nn.Parameter(start(n).reshape(size).to(dtype)))
    optimizer = make(params)
    for step in range(1, STEPS + 1):
        for p in params:
            p.grad = gradient(p.numel(), step).reshape(p.shape).to(dtype)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in params])


TABLES = {
    "AdamW": run(lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.99), eps=1e-7,
                                             weight_decay=0.1)),
    "Adam": run(lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.05)),
    "AdamMaximize": run(lambda p: torch.optim.Adam(p, lr=1e-2, maximize=True)),
    "SGD": run(lambda p: torch.optim.SGD(p, lr=1e-2)),
    "SGDMomentum": run(lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, dampening=0.3,
                                                 weight_decay=0.05)),
    "SGDNesterov": run(lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True,
                                                 weight_decay=0.05)),
    "SGDMaximize": run(lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.5, maximize=True)),
    "Lion": run(lambda p: Lion(p, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)),
    "AdamDouble": run(lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.05),
                      dtype=torch.float64),
    "SGDDouble": run(lambda p: torch.optim.SGD(p, lr=1e-2), dtype=torch.float64),
    "SGDMaximizeDouble": run(lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.5, maximize=True),
                             dtype=torch.float64),
    "LionDouble": run(lambda p: Lion(p, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1),
                      dtype=torch.float64),
}

out = ["// SPDX-License-Identifier: Apache-2.0", "#pragma once",
       "/// Written by optimizers.py with torch " + torch.__version__.split("+")[0] +
       ": values after 100 steps, the matrix's, then the vector's.",
       "// clang-format off", "namespace fourfold::reference {"]
for name, values in TABLES.items():
    out += ["", f"inline constexpr double k{name}[] = {{"]
    words = [f"{v:.17g}" if values.dtype == torch.float64 else f"{v:.9g}" for v in values.tolist()]
    out += ["    " + ", ".join(words[i:i + 5]) + "," for i in range(0, len(words), 5)]
    out += ["};"]
out += ["", "}  // namespace fourfold::reference", "// clang-format on", ""]
pathlib.Path(__file__).with_suffix(".hpp").write_text("\n".join(out))
