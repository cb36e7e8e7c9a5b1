"""Chapters 08 and 08a where a cell is not enough: random settings beside torch, frozen parameters, torch's rules."""
import random
from functools import partial

import pytest
import torch
from torch import nn

from cnnbook.held import decay_groups, held_parameters
from cnnbook.optim import SGD, AdaGrad, Adam, AdamW, Momentum, Nesterov, RMSProp, descend, newton_step

RULES = {'SGD': (SGD, torch.optim.SGD, ()), 'Momentum': (Momentum, torch.optim.SGD, ('momentum',)),
         'Nesterov': (Nesterov, partial(torch.optim.SGD, nesterov=True), ('momentum',)),
         'AdaGrad': (AdaGrad, torch.optim.Adagrad, ('eps',)),
         'RMSProp': (RMSProp, torch.optim.RMSprop, ('eps', 'alpha')),
         'Adam': (Adam, torch.optim.Adam, ('eps', 'betas')), 'AdamW': (AdamW, torch.optim.AdamW, ('eps', 'betas'))}


@pytest.mark.parametrize('name', RULES)
def test_any_setting_equals_torch_on_the_same_gradients(name):
    "100 steps at rates that may be far too large: gradients are given, so that rounding is not multiplied by training."
    ours, theirs, keys = RULES[name]
    draw, g = random.Random(name), torch.Generator().manual_seed(1)
    for _ in range(10):
        drawn = {'momentum': draw.uniform(.01, .999), 'eps': 10**draw.uniform(-10, 0), 'alpha': draw.uniform(0, .999),
                 'betas': (draw.uniform(0, .99), draw.uniform(.5, .9999))}
        more = {'lr': 10**draw.uniform(-5, 0), 'weight_decay': draw.choice((0., 10**draw.uniform(-4, -.5)))}
        more |= {key: drawn[key] for key in keys}
        sizes = 10**torch.linspace(-4, 3, 6, dtype=torch.float64)                   # gradients of very different sizes
        a, b = ([torch.ones(s, dtype=torch.float64, requires_grad=True) for s in ((6,), (2, 6))] for _ in range(2))
        first, second = ours(a, **more), theirs(b, **more)
        for step in range(100):
            for p, q in zip(a, b):
                p.grad = None if step % 7 == 3 and p.ndim == 2 else torch.randn(p.shape, generator=g).double()*sizes
                q.grad = None if p.grad is None else p.grad.clone()
            first.step()
            second.step()
            if step == 50: first.lr = second.param_groups[0]['lr'] = more['lr']/3   # a schedule
            for p, q in zip(a, b):
                torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9, msg=f'{more}, step {step}')


@pytest.mark.parametrize('name', RULES)
def test_free_runs_equal_torch_in_float32(name):
    ours, theirs, _ = RULES[name]
    def run(make):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(),
                            nn.Linear(64, 3))      # no bias before the norm: its gradient would be rounding alone
        optimizer, x = make(net.parameters()), torch.randn(8, 1, 6, 6)
        for _ in range(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), torch.arange(8) % 3).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in net.parameters()])
    more = {'lr': .001} | ({'momentum': .9} if name in ('Momentum', 'Nesterov') else {})
    torch.testing.assert_close(run(partial(ours, **more)), run(partial(theirs, **more)), rtol=1e-3, atol=1e-4)


def everything(lr=.05):
    kinds = 'Adadelta Adagrad Adam AdamW Adamax NAdam RAdam RMSprop SGD'.split()
    makes = {k: partial(getattr(torch.optim, k), lr=lr, weight_decay=.1) for k in kinds}
    makes['SGD'] = partial(makes['SGD'], momentum=.9)
    return makes | {f'our {k}': partial(rule, lr=lr, weight_decay=.1) for k, (rule, *_) in RULES.items()}


@pytest.mark.parametrize('name', everything())
def test_fault_52_frozen_parameters_are_bit_equal(name):
    "Frozen before the optimizer or in the middle, with weight decay and momentum: not a bit moves, the rest does."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    net[0].requires_grad_(False)
    optimizer, x = everything()[name](net.parameters()), torch.randn(5, 4)
    start = [p.clone() for p in net.parameters()]
    for step in range(10):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
        if step == 4:
            net[2].requires_grad_(False)
            middle = [p.clone() for p in net[2].parameters()]
    assert all(torch.equal(a, b) for a, b in zip(start[:2], net[0].parameters()))
    assert all(torch.equal(a, b) for a, b in zip(middle, net[2].parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(start[2:], list(net.parameters())[2:]))
    assert held_parameters(net, optimizer)['frozen']['tensors'] == 4
    for p in net[2].parameters(): p.grad = torch.zeros_like(p)                    # what set_to_none=False leaves behind
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(middle, net[2].parameters()))


def test_fault_52_built_before_unfreeze_is_seen():
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    net[:2].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], weight_decay=.1)
    net.requires_grad_(True)
    seen = held_parameters(net, optimizer)
    assert (seen['left out']['tensors'], seen['left out']['first'], seen['moves']['tensors']) == (4, '0.weight', 2)


def test_decay_groups_share_out_every_parameter_once():
    tied = nn.Linear(8, 8, bias=False)
    net = nn.Sequential(nn.Embedding(5, 8), tied, nn.GroupNorm(2, 8), tied, nn.InstanceNorm1d(8, affine=True),
                        nn.PReLU())
    groups = decay_groups(net, .1)
    ids = [id(p) for group in groups for p in group['params']]
    assert sorted(ids) == sorted(id(p) for p in net.parameters()) and len(ids) == len(set(ids))
    assert [len(group['params']) for group in groups] == [2, 5]
    optimizer = torch.optim.AdamW(groups, weight_decay=.5)                        # the groups' own decay wins
    assert [group['weight_decay'] for group in optimizer.param_groups] == [.1, 0]


def test_newton_solves_random_quadratics_at_once():
    g = torch.Generator().manual_seed(2)
    for n in (1, 3, 20):
        a = torch.randn(n, n, generator=g, dtype=torch.float64)
        h, goal = a@a.T + torch.eye(n), torch.randn(n, generator=g, dtype=torch.float64)
        at = newton_step(lambda w, h=h, goal=goal: (w - goal)@h@(w - goal)/2, torch.randn(n, generator=g).double())
        torch.testing.assert_close(at, goal)
        limit = 2/torch.linalg.eigvalsh(h)[-1].item()
        f = lambda w, h=h: w@h@w/2
        below, above = (descend(f, [1.]*n, partial(SGD, lr=k*limit), 300) for k in (.95, 1.05))
        assert f(below[-1]) < f(below[0]) and f(above[-1]) > f(above[0])
