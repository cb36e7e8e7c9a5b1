"""What the chapter's cells do not say of `cnnbook.activations`: other dtypes, random networks, odd data, no trace."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cnnbook import activations as A
from cnnbook.trace import no_trace

PAIRS = [(A.sigmoid, torch.sigmoid), (A.tanh, torch.tanh), (A.relu, torch.relu), (A.leaky_relu, F.leaky_relu),
         (A.gelu, F.gelu)]
CHECKS = [A.check_sigmoid_slope, A.check_tanh_depth, A.check_never_fires, A.check_revive]


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('ours, theirs', PAIRS)
def test_values_and_slopes_equal_torch_at_every_scale(ours, theirs, dtype):
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(2000, generator=g, dtype=torch.float64)*10**(4*torch.rand(2000, generator=g) - 2)).to(dtype)
    tol = dict(atol=max(1e-6, 2*torch.finfo(dtype).eps), rtol=max(1e-6, 4*torch.finfo(dtype).eps))
    torch.testing.assert_close(ours(x), theirs(x), **tol)
    torch.testing.assert_close(A.slope(ours, x), A.slope(theirs, x), **tol)
    assert A.slope(ours, x).isfinite().all() and ours(x).dtype == dtype


@pytest.mark.parametrize('ours', [A.sigmoid, A.tanh, A.gelu])
def test_second_slopes_are_right_too(ours):
    x = torch.tensor([-3., -.4, .3, 2.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(ours, x)


def test_small_numbers_keep_their_digits():
    x = torch.tensor([1e-6, -1e-6, 1e-3])
    torch.testing.assert_close(A.tanh(x), x.double().tanh().float(), rtol=1e-6, atol=0)
    far = torch.tensor([-20., -60.])
    torch.testing.assert_close(A.sigmoid(far), far.double().sigmoid().float(), rtol=1e-6, atol=0)


def test_slope_and_saturation_under_no_grad_leave_the_input_alone():
    x = torch.randn(50, requires_grad=True)
    with torch.no_grad(): assert A.slope(A.tanh, x).shape == (50,) and A.saturation(A.relu, x) > 0
    assert x.grad is None and x.requires_grad


class Shared(nn.Module):
    "One ReLU at two places, and a branch that only some batches take."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.relu = nn.Linear(6, 9), nn.Linear(9, 9), nn.ReLU()

    def forward(self, x): return self.relu(self.b(self.relu(self.a(x)))) if len(x) > 1 else self.relu(self.a(x))


@pytest.mark.parametrize('seed', range(8))
def test_counts_equal_brute_force_on_random_networks(seed):
    torch.manual_seed(seed)
    net, x = Shared(), torch.randn(41, 6)                        # batches of 10 and a last one of 1
    with torch.no_grad(): net.a.bias -= 1.5; net.b.bias -= .3
    found = A.dead_units(net, x.split(10))
    with torch.no_grad():
        first = net.relu(net.a(x))
        second = net.relu(net.b(first[:40]))
    for name, h in (('relu', first), ('relu#2', second)): assert torch.equal(found.dead[name], ~(h > 0).any(0))
    assert found.total == 18 and found.count == sum(int(d.sum()) for d in found.dead.values())


def test_channels_of_images_by_brute_force():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(16, 16, 3), nn.ReLU())
    with torch.no_grad(): net[0].bias -= 1.2; net[3].bias -= .2
    x = torch.randn(30, 3, 8, 8)
    found = A.dead_units(net, x)
    with torch.no_grad(): h = [net[:2](x), net(x)]
    assert [d.tolist() for d in found.dead.values()] == [(t <= 0).all(0).flatten(1).all(1).tolist() for t in h]
    assert 0 < found.count < 32


def test_fault_53_no_trace_also_with_a_shuffling_loader_and_after_an_error():
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Dropout(.5), nn.Linear(5, 2))
    net[1].eval()
    x = torch.randn(64, 6)
    net(x).sum().backward()
    with no_trace(net, x): A.dead_units(net, DataLoader(TensorDataset(x, x), 10, shuffle=True))
    with no_trace(net, x), pytest.raises(RuntimeError): A.dead_units(net, [x, x[:, :3]])
    with no_trace(net, x), pytest.raises(ZeroDivisionError): A.dead_units(net, (1/0 for _ in range(3)))


def test_odd_data_and_layers():
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    x = torch.randn(20, 6)
    want = A.dead_units(net, x).count
    for data in (iter([x]), [[x, 0]], [(x,)], [x[:0], x]): assert A.dead_units(net, data).count == want
    assert set(A.dead_units(net, x, [nn.ReLU, '2']).dead) == {'1', '2'}
    with pytest.raises(ValueError, match='data: expected at least one sample'): A.dead_units(net, [])
    with pytest.raises(ValueError, match='0: expected units on axis 2'): A.dead_units(net, x, '0', axis=2)
    with pytest.raises(ValueError, match='got NaN'): A.dead_units(net, torch.full((3, 6), float('inf')))
    with pytest.raises(TypeError, match='model: expected an nn.Module'): A.dead_units(F.relu, x)


@pytest.mark.parametrize('check', CHECKS)
def test_checks_survive_nonsense(check):
    for nonsense in ('text', 3.5, lambda *a: None, [], torch.zeros(2)):
        assert not check.judge(nonsense), nonsense
