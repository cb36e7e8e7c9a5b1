"""Chapter 08b where a cell is not enough: random devices, what failed tries hold, estimates right on average."""
import math
import random
import weakref

import pytest
import torch
from torch import nn

from cnnbook.batch import batch_gradients, exact_noise, largest_batch, noise_scale, sample_gradients


def test_the_search_finds_the_room_of_any_device_in_few_tries():
    draw = random.Random(0)
    for _ in range(500):
        limit = draw.randint(1, 5000)
        room, start, tries = draw.randint(1, 6000), draw.randint(1, limit), []
        def step(size, room=room, tries=tries):
            tries.append(size)
            if size > room: raise RuntimeError('cuDNN error: CUDNN_STATUS_ALLOC_FAILED')
        assert largest_batch(step, start, limit) == min(room, limit)
        assert len(tries) == len(set(tries)) <= 2*math.log2(limit) + 4 and max(tries) <= limit


def test_tensors_of_a_failed_try_are_gone_before_the_next():
    alive, most = weakref.WeakSet(), []
    class Big: pass
    def step(size):
        most.append(len(alive))
        held = [Big() for _ in range(size)]
        alive.update(held)
        if size > 5: raise MemoryError
    assert largest_batch(step, 8, 64) == 5 and set(most) == {0}


@pytest.mark.parametrize('error', [ValueError('labels'), RuntimeError('device-side assert triggered'),
                                   KeyboardInterrupt(), AssertionError('memory'), SystemExit(3)])
def test_nothing_but_a_full_memory_is_caught(error):
    def step(size):
        if size > 2: raise error
    with pytest.raises(type(error)) as caught: largest_batch(step)
    assert caught.value is error


@pytest.mark.parametrize('start, limit', [(True, 8), (1.5, 8), (1, 0), (1, '8'), (-1, 8)])
def test_sizes_are_whole_numbers_above_0(start, limit):
    with pytest.raises(ValueError, match='expected a whole number above 0'): largest_batch(lambda n: None, start, limit)


def test_two_batch_sizes_estimate_what_was_planted():
    "Gradients of a known mean and variance: signal 4, noise 50, so the scale is 12.5."
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        mean = torch.zeros(50).index_fill_(0, torch.tensor([0]), 2.)
        lengths = lambda size, mean=mean, g=g: (mean + torch.randn(4000, 50, generator=g)/size**.5).square().sum(1)
        found = noise_scale(lengths(2), lengths(40), 2, 40)
        assert abs(found.signal - 4) < .2 and abs(found.noise - 50) < 1 and abs(found.scale - 12.5) < 1


def test_sample_gradients_leave_no_trace_and_take_any_loss():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)).double().eval()
    x, y = torch.randn(7, 1, 4, 4).double(), torch.arange(7) % 3
    before = {k: v.clone() for k, v in net.state_dict().items()}
    rows = sample_gradients(net, nn.CrossEntropyLoss(reduction='sum'), x, y)
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    nn.CrossEntropyLoss(reduction='sum')(net(x), y).backward()
    torch.testing.assert_close(rows.sum(0), torch.cat([p.grad.flatten() for p in net.parameters()]))


def test_batches_without_replacement_hold_no_sample_twice():
    rows = torch.eye(9, dtype=torch.float64)                    # a batch's gradient shows who is in it
    for size in range(1, 10):
        got = batch_gradients(rows, size, 20, seed=size, replacement=False)
        assert ((got > 0).sum(1) == size).all() and torch.allclose(got.max(), torch.tensor(1/size, dtype=got.dtype))
    twice = batch_gradients(rows, 9, 50)
    assert (twice.max(1).values > 1.5/9).all() and exact_noise(rows).noise == pytest.approx(8/9)


def test_a_parameter_without_influence_has_a_gradient_of_zero():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(2, 3), nn.Linear(2, 3)
        def forward(self, x): return self.used(x)
    rows = sample_gradients(Idle(), nn.CrossEntropyLoss(), torch.ones(4, 2), torch.arange(4) % 3)
    assert rows.shape == (4, 18) and rows[:, :9].any() and not rows[:, 9:].any()


def test_a_refused_batch_norm_notes_nothing():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match="got '1' in training mode"):
        sample_gradients(net, nn.CrossEntropyLoss(), torch.randn(2, 1, 4, 4), torch.zeros(2, dtype=torch.long))
    assert net[1].num_batches_tracked == 0
