"""Muon: what a step is, what it leaves alone, and that a run goes on where it stopped."""
import copy

import pytest
import torch
from torch import nn

from cnnbook.muon import Muon, muon_for_filters, orthogonalize


def small(seed=0):
    torch.manual_seed(seed)
    body = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(64, 5))


def rule(net): return muon_for_filters(torch.optim.SGD(net.parameters(), .1, momentum=.9, nesterov=True), .05)


def learn(net, optimizer, steps, seed=0):
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(6, 3, 8, 8, generator=g)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize('shape', [(8, 27), (27, 8), (8, 3, 3, 3), (16, 1, 3, 3), (4, 4)])
def test_directions_are_those_of_the_svd(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(g.flatten(1), full_matrices=False)
    got = orthogonalize(g, 5)
    assert got.shape == g.shape
    inner = torch.linalg.svdvals(got.flatten(1))
    assert (u.T@got.flatten(1)@vh.T).diagonal().min() > .6 and inner.max() < 1.25    # the same directions, none turned
    off = u.T@got.flatten(1)@vh.T
    assert (off - off.diagonal().diag()).abs().max() < 1e-3


def test_half_precision_keeps_its_kind():
    g = torch.randn(8, 27, generator=torch.Generator().manual_seed(0))
    got = orthogonalize(g.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), orthogonalize(g), atol=.03, rtol=.05)


def test_goes_on_bit_for_bit():
    net = small()
    optimizer = rule(net)
    learn(net, optimizer, 3)
    later, state = copy.deepcopy(net), copy.deepcopy(optimizer.state_dict())
    again = rule(later)
    again.load_state_dict(state)
    for model, way in ((net, optimizer), (later, again)): learn(model, way, 3, seed=1)
    for a, b in zip(net.parameters(), later.parameters()): assert torch.equal(a, b)


def test_no_gradient_no_step_and_the_layout_stays():
    net = small().to(memory_format=torch.channels_last)
    net[0].weight.requires_grad_(False)
    before = net[0].weight.clone()
    optimizer = rule(net)
    learn(net, optimizer, 2)
    assert torch.equal(net[0].weight, before) and net[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert optimizer.state[net[3].weight]['momentum_buffer'].shape == (4, 8, 3, 3)


def test_layout_changes_nothing():
    plain, last = small(), small().to(memory_format=torch.channels_last)
    for net in (plain, last): learn(net, rule(net), 3)
    for a, b in zip(plain.parameters(), last.parameters()): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_closure_is_asked_with_gradients():
    net = small()
    optimizer = rule(net)
    def closure():
        optimizer.zero_grad()
        loss = net(torch.ones(2, 3, 8, 8)).square().mean()
        loss.backward()
        return loss
    assert optimizer.step(closure).requires_grad


def test_kept_length():
    w = nn.Parameter(7*torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0)))
    optimizer = Muon([w], lr=0., keep_length=True)
    w.grad = torch.ones_like(w)
    optimizer.step()
    assert abs(w.norm().item() - 8**.5) < 1e-5


@pytest.mark.parametrize('make, words', [
    (lambda p: Muon(p, weight_decay=-1), 'weight_decay: expected at least 0, got -1'),
    (lambda p: Muon(p, momentum=-.1), 'momentum: expected at least 0 and below 1, got -0.1'),
    (lambda p: muon_for_filters(torch.optim.SGD(p, .1), .1), 'nesterov=True, got SGD with nesterov=False'),
    (lambda p: muon_for_filters(torch.optim.AdamW(p), .1), 'expected SGD with nesterov=True, got AdamW')])
def test_refused(make, words):
    with pytest.raises(ValueError, match=words): make([nn.Parameter(torch.ones(4, 4))])
