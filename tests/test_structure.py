"What the cells do not say of `cnnbook.calls` and `cnnbook.structure`: random networks, other dtypes, foreign hooks."
import pytest
import torch
import torchvision
from torch import nn

from cnnbook import calls as C
from cnnbook import structure as S
from cnnbook.hooks import capture
from cnnbook.structure import batch_norms, keep_buffers, layer_calls, shapes_fit, signal, weights, what_learns
from cnnbook.trace import no_trace

CHECKS = [getattr(m, n) for m in (C, S) for n in vars(m) if n.startswith('check_')]


def causes(found): return [f.cause for f in found if f.status in ('fail', 'warn')]


def random_net(seed):
    "A chain of convolutions with norms, in-place ReLUs, dropout, and a head that fits 8 x 8 images."
    g = torch.Generator().manual_seed(seed)
    pick = lambda *options: options[int(torch.randint(len(options), (1,), generator=g))]
    torch.manual_seed(seed)
    layers, c = [], 3
    for _ in range(pick(1, 2, 3)):
        width, norm = pick(4, 8), pick(True, False)
        layers += [nn.Conv2d(c, width, 3, padding=1, bias=not norm), *[nn.BatchNorm2d(width)]*norm,
                   nn.ReLU(inplace=pick(True, False)), *[nn.Dropout(.3, inplace=pick(True, False))]*pick(True, False)]
        c = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(c*64, 5))


@pytest.mark.parametrize('seed', range(12))
def test_random_networks_agree_with_capture_and_are_silent(seed):
    net, x = random_net(seed), torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    with no_trace(net, x):
        state = torch.get_rng_state()
        calls, output, error = layer_calls(net, x)
        with torch.no_grad(), keep_buffers(net), capture(net) as seen: net(x.clone())
        torch.set_rng_state(state)                                      # dropout took random numbers in capture's pass
    assert error is None and [c.name for c in calls] == list(seen)
    assert all(torch.equal(c.given, seen[c.name]) for c in calls) and torch.equal(calls[-1].given, output)
    assert all(torch.equal(a.given, b.taken) for a, b in zip(calls, calls[1:]))
    optimizer = torch.optim.SGD(net.parameters(), .1)
    assert causes(weights(net) + what_learns(net, optimizer) + signal(calls) + batch_norms(calls)) == []


@pytest.mark.parametrize('at', range(3))
def test_fault_53_an_error_anywhere_leaves_no_trace_and_the_calls_before_it(at):
    class Boom(nn.Module):
        def forward(self, x): raise OSError('disk full')

    net = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 4))
    net.insert(at, Boom())
    x = torch.randn(5, 4)
    with no_trace(net, x): calls, output, error = layer_calls(net, x)
    assert len(calls) == at + 1 and calls[-1].given is None and isinstance(error, OSError)
    assert shapes_fit(net, x, error)[0].saw.endswith('OSError: disk full')


def test_fault_48_nan_and_infinity_anywhere_are_named():
    for name in ('0.weight', '1.bias', '1.running_mean', '1.running_var'):
        for value in (float('nan'), float('inf'), -float('inf')):
            net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
            dict([*net.named_parameters(), *net.named_buffers()])[name].data.view(-1)[-1] = value
            assert causes(weights(net)) == ['NaN in the weights'] and weights(net)[0].saw.startswith(name)


def test_fault_49_and_52_transfer_learning():
    net = torchvision.models.shufflenet_v2_x0_5(num_classes=7)
    net.requires_grad_(False)
    net.fc = nn.Linear(net.fc.in_features, 4)
    optimizer = torch.optim.Adam(net.fc.parameters())
    assert causes(what_learns(net, optimizer)) == ['frozen batch norm drifts']
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.eval()
    assert causes(what_learns(net, optimizer)) == []
    net.conv5.requires_grad_(True)                                      # unfrozen after the optimizer was made
    found = what_learns(net, optimizer)
    assert causes(found) == ['parameters not in the optimizer', 'left in eval mode']
    assert 'conv5.0.weight' in found[0].saw


@pytest.mark.parametrize('name, size', [('resnet18', 64), ('shufflenet_v2_x0_5', 64), ('mobilenet_v3_small', 64)])
def test_sound_networks_are_silent_in_every_mode(name, size):
    net, x = getattr(torchvision.models, name)(num_classes=10), torch.randn(4, 3, size, size)
    for train in (True, False):
        net.train(train)
        with no_trace(net, x):
            calls, _, error = layer_calls(net, x)
            assert not causes(weights(net) + shapes_fit(net, x, error) + batch_norms(calls))
            assert not causes(signal(calls)) or not train               # in eval mode norms divide by 1


def test_wrong_channels_and_channels_last_are_told_apart():
    net = torchvision.models.shufflenet_v2_x0_5()
    for x, cause in ((torch.zeros(2, 64, 64, 3), 'channels stand last'),
                     (torch.zeros(2, 1, 64, 64), 'shapes do not fit'),
                     (torch.zeros(2, 3, 64, 64).half(), 'wrong dtype'), (torch.zeros(3, 64, 64), 'shapes do not fit')):
        assert causes(shapes_fit(net, x, layer_calls(net, x)[2])) == [cause]


def test_other_kinds_of_layers_and_numbers():
    lstm = nn.LSTM(4, 3, batch_first=True)
    calls, output, error = layer_calls(lstm, torch.ones(2, 5, 4))
    assert error is None and isinstance(output, tuple) and calls[0].given is None and calls[0].taken.shape == (2, 5, 4)
    half = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).to(torch.bfloat16)
    x = torch.randn(16, 8).to(torch.bfloat16)
    assert [f.status for f in signal(layer_calls(half, x)[0]) + weights(half)] == ['pass', 'pass']
    spectral = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2))
    with no_trace(spectral):
        found = weights(spectral) + what_learns(spectral) + signal(layer_calls(spectral, x[:, :4].float())[0])
    assert causes(found) == []


def test_hooks_of_others_stay_and_are_seen():
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    net[0].register_forward_hook(lambda m, args, out: out + 100)
    with no_trace(net): calls, *_ = layer_calls(net, torch.zeros(2, 3))
    assert calls[0].given.min() > 90 and len(net[0]._forward_hooks) == 1


def test_shared_layers_in_a_loop_are_no_shared_norm():
    class Loop(nn.Module):
        def __init__(self): super().__init__(); self.fc, self.norm = nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)
        def forward(self, x):
            for _ in range(3): x = self.norm(self.fc(x))
            return x

    calls, *_ = layer_calls(Loop(), torch.randn(8, 4))
    assert len(calls) == 6 and causes(batch_norms(calls)) == []


@pytest.mark.parametrize('seed', range(5))
def test_equal_units_only_where_they_stay_equal(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    for layer in net[::2]: nn.init.zeros_(layer.bias)
    value = float(torch.rand(()) + .1)
    nn.init.constant_(net[2].weight, value)
    if seed % 2: net[4].weight.data = net[4].weight.detach()[:, :1].expand(3, 6).clone()    # takes all units alike
    assert causes(weights(net)) == (['equal units'] if seed % 2 else [])
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    optimizer = torch.optim.SGD(net.parameters(), .5)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    rows = net[2].weight.detach()
    assert bool(torch.allclose(rows, rows[:1], atol=1e-6)) == bool(seed % 2)


@pytest.mark.parametrize('check', CHECKS)
def test_exercises(check):
    assert check.judge(check.solution)
    for answer, words in check.wrong: assert words in check.judge(answer).message
