"""Optimizers of a user's own, as ZeRO-1 meets them."""

from __future__ import annotations

import torch


class Lamb(torch.optim.Optimizer):
    """Steps in proportion to the norm of the parameter, and counts its steps by group."""

    def __init__(self, params, lr=0.01, among_all=False):
        super().__init__(params, {"lr": lr, "step": 0, "among_all": among_all})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] += 1
            with_grad = [param for param in group["params"] if param.grad is not None]
            total = sum(param.grad.square().sum() for param in with_grad) if group["among_all"] else 1.0
            for param in with_grad:
                mean = self.state[param].setdefault("mean", torch.zeros_like(param))
                mean.lerp_(param.grad, 0.5)
                param -= group["lr"] * mean * (param.norm() / mean.norm()) / total


class Quantized(torch.optim.SGD):
    """Has a state of another shape than its parameter's, as of 8 bits with a scale for each block."""

    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.state[param]["scales"] = param.grad.detach().flatten()[::256].clone()
        return super().step(closure)
