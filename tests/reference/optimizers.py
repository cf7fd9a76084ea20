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


class Paper(torch.optim.Optimizer):
    """Optimizers that torch lacks, plainly: step_one(p, grad, state, group) steps one tensor."""

    def __init__(self, params, **options):
        super().__init__(params, options)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                self.step_one(p, p.grad, state, group)

    @staticmethod
    def adam(grad, state, betas, eps):
        """The direction of Adam with bias corrections."""
        m = state.setdefault("m", torch.zeros_like(grad))
        v = state.setdefault("v", torch.zeros_like(grad))
        m.mul_(betas[0]).add_((1 - betas[0]) * grad)
        v.mul_(betas[1]).add_((1 - betas[1]) * grad * grad)
        m_hat, v_hat = m / (1 - betas[0] ** state["step"]), v / (1 - betas[1] ** state["step"])
        return m_hat / (v_hat.sqrt() + eps)


class Scale(Paper):
    """Algorithm 1 of arXiv 2506.16659; vectors by AdamW."""

    def step_one(self, p, grad, state, group):
        if p.dim() < 2:
            way = self.adam(grad, state, (0.9, 0.999), 1e-8)
        else:
            b = group["momentum"]
            m = state.setdefault("momentum", torch.zeros_like(p))
            m.mul_(b).add_((1 - b) * grad)
            rows = m.flatten(1)
            way = (rows / (rows.norm(dim=1, keepdim=True) + 1e-8)).view_as(p)
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * way)


class AdamMini(Paper):
    """Algorithm 1 of arXiv 2406.16793, a block for `share` rows."""

    def step_one(self, p, grad, state, group):
        b1, b2 = group["betas"]
        rows = grad.flatten(1) if grad.dim() > 1 else grad.unsqueeze(0)
        blocks = rows.split(group["share"])
        mean = torch.stack([(block * block).mean() for block in blocks])
        m = state.setdefault("m", torch.zeros_like(p))
        v = state.setdefault("v", torch.zeros_like(mean))
        m.mul_(b1).add_((1 - b1) * grad)
        v.mul_(b2).add_((1 - b2) * mean)
        h = (v / (1 - b2 ** state["step"])).sqrt() + group["eps"]
        of_row = h.repeat_interleave(group["share"])[:len(rows)].unsqueeze(1)
        way = (m / (1 - b1 ** state["step"])).view_as(rows) / of_row
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * way.view_as(p))


def in_full_precision(make):
    """torch.optim.Muon computes in bf16: here in the parameter's dtype."""
    def made(params):
        optimizer = make(params)
        step = optimizer.step

        def patched():
            bfloat16 = torch.Tensor.bfloat16
            torch.Tensor.bfloat16 = lambda self: self.clone()
            try:
                step()
            finally:
                torch.Tensor.bfloat16 = bfloat16
        optimizer.step = patched
        return optimizer
    return made


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
    "Adafactor": run(lambda p: torch.optim.Adafactor(p, lr=1e-2)),
    "AdafactorDecay": run(lambda p: torch.optim.Adafactor(
        p, lr=5e-2, beta2_decay=-0.5, eps=(1e-4, 1e-2), d=2.0, weight_decay=0.1, maximize=True)),
    "Scale": run(lambda p: Scale(p, lr=1e-2, momentum=0.0, weight_decay=0.1)),
    "ScaleMomentum": run(lambda p: Scale(p, lr=1e-2, momentum=0.9, weight_decay=0.1)),
    "AdamMini": run(lambda p: AdamMini(p, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1,
                                       share=1)),
    "AdamMiniHeads": run(lambda p: AdamMini(p, lr=1e-2, betas=(0.9, 0.99), eps=1e-8,
                                            weight_decay=0.1, share=5)),
    "MuonWide": run(in_full_precision(lambda p: torch.optim.Muon(p, lr=1e-2)), [(6, 20)]),
    "MuonTall": run(in_full_precision(lambda p: torch.optim.Muon(
        p, lr=1e-2, momentum=0.8, nesterov=False, weight_decay=0.3,
        adjust_lr_fn="match_rms_adamw")), [(20, 6)]),
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
