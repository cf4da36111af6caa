"""Which optimizers step element by element is found out, not listed."""

from __future__ import annotations

import pytest
import torch
from transformers.optimization import Adafactor

from accel_tp_ddp.training.by_element import likeness, steps_by_element

from ..helpers.optimizers import Lamb, Quantized

BY_ELEMENT = "Adadelta Adagrad Adam Adamax AdamW ASGD NAdam RAdam RMSprop Rprop SGD".split()


class Cautious(torch.optim.SGD):
    """Element by element but for one mean, as cautious optimizers have it (arXiv:2411.16085)."""

    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                mask = (param.grad > 0).float()
                param.grad.mul_(mask / mask.mean())
        return super().step(closure)


def verdict(make, **options):
    optimizer = make([torch.nn.Parameter(torch.ones(4, 4))], **options)
    before = torch.get_rng_state(), str(optimizer.state), optimizer.param_groups[0]["params"][0].clone()
    found = steps_by_element(optimizer, optimizer.param_groups[0])
    assert torch.equal(torch.get_rng_state(), before[0]) and str(optimizer.state) == before[1]
    assert torch.equal(optimizer.param_groups[0]["params"][0], before[2])
    return found


@pytest.mark.parametrize("name", BY_ELEMENT)
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"weight_decay": 0.1}])
def test_optimizers_of_torch_step_by_element(name, options):
    if not (name == "Rprop" and "weight_decay" in options):
        assert verdict(getattr(torch.optim, name), **options)


def test_so_do_fused_ones_also_at_the_beginning_of_a_warm_up():
    assert verdict(torch.optim.AdamW, fused=True, amsgrad=True, lr=0.0)
    assert verdict(torch.optim.SGD, fused=True, momentum=0.9, nesterov=True, lr=0.0)


@pytest.mark.parametrize("make", [Lamb, Quantized, Cautious, torch.optim.Adafactor, torch.optim.Muon, Adafactor])
def test_others_do_not(make):
    assert not verdict(make)


def test_what_looks_at_other_parameters_is_refused():
    with pytest.raises(ValueError, match="Lamb on a parameter depends on other parameters too"):
        verdict(Lamb, among_all=True)


def test_what_takes_no_step_by_itself_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match="closure.*register_whole_step"):
        verdict(torch.optim.LBFGS)


def test_groups_are_alike_whatever_their_rates():
    group = {"params": [], "lr": 0.1, "momentum": 0.9, "foreach": None}
    assert likeness(group) == likeness({**group, "lr": 0.0, "momentum": 0.5})
    assert likeness(group) != likeness({**group, "momentum": 0})
