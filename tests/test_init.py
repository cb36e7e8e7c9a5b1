"""What the cells do not say of `depth`, `signals`, `schemes` and `init`: peers, odd networks, other processes."""
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cnnbook.data import stand_in
from cnnbook.depth import deep_mlp, gradient_norms, look_through
from cnnbook.events import Callback
from cnnbook.init import ActivationStats, accuracy, compare_init, init_weights
from cnnbook.schemes import SCHEMES, fans, law_of, lsuv
from cnnbook.trace import no_trace
from cnnbook.trainer import Trainer

PEERS = {'zeros': nn.init.zeros_, 'ones': nn.init.ones_, 'uniform01': nn.init.uniform_, 'normal_one': nn.init.normal_,
         'centred': lambda w, generator: nn.init.uniform_(w, -.5, .5, generator=generator),
         'normal_small': lambda w, generator: nn.init.normal_(w, 0, .001, generator=generator),
         'xavier_uniform': nn.init.xavier_uniform_, 'xavier_normal': nn.init.xavier_normal_,
         'orthogonal': nn.init.orthogonal_}
MAKERS = [lambda: nn.Linear(30, 20), lambda: nn.Linear(20, 30, bias=False), lambda: nn.Conv1d(4, 6, 5),
          lambda: nn.Conv2d(8, 12, 3, groups=4), lambda: nn.Conv3d(3, 4, (1, 2, 3)),
          lambda: nn.ConvTranspose1d(6, 4, 4),
          lambda: nn.ConvTranspose2d(6, 9, 3, groups=3), lambda: nn.ConvTranspose3d(2, 3, 2),
          lambda: nn.Conv2d(7, 7, 3, groups=7)]


def seeded(seed=3): return torch.Generator().manual_seed(seed)


def numbers(draw, w):
    return draw(w) if draw in (nn.init.zeros_, nn.init.ones_) else draw(w, generator=seeded())


@pytest.mark.parametrize('make', MAKERS)
@pytest.mark.parametrize('scheme', PEERS)
def test_bit_equal_to_torch_on_every_layer(scheme, make):
    layer = init_weights(make(), scheme, generator=seeded())
    assert torch.equal(layer.weight, numbers(PEERS[scheme], torch.empty_like(layer.weight)))
    assert layer.bias is None or not layer.bias.any()


@pytest.mark.parametrize('make', MAKERS)
@pytest.mark.parametrize('mode', ['fan_in', 'fan_out'])
@pytest.mark.parametrize('nonlinearity', ['linear', 'tanh', 'relu', 'leaky_relu', 'selu'])
def test_kaiming_bit_equal_in_every_mode(make, mode, nonlinearity):
    for scheme, draw in (('kaiming_uniform', nn.init.kaiming_uniform_), ('kaiming_normal', nn.init.kaiming_normal_)):
        layer = init_weights(make(), scheme, nonlinearity, mode, generator=seeded())
        slope = .01 if nonlinearity == 'leaky_relu' else 0
        want = draw(torch.empty_like(layer.weight), slope, mode, nonlinearity, generator=seeded())
        assert torch.equal(layer.weight, want)


@pytest.mark.parametrize('scheme', [s for s in SCHEMES if s not in ('zeros', 'ones', 'resnet', 'orthogonal', 'lsuv')])
def test_standard_deviation_within_sampling_error_and_bounds_exact(scheme):
    layer = init_weights(nn.Linear(400, 500), scheme, generator=seeded())
    law, w = law_of(scheme, 400, 500), layer.weight.detach()
    kurtosis = 1.8 if law.kind == 'uniform' else 3.
    error = math.sqrt((kurtosis - 1)/(4*w.numel()))                    # of a sample's standard deviation, relative
    assert abs(w.std()/law.std - 1) < 4*error
    if law.kind == 'uniform':
        assert law.a <= w.min() and w.max() <= law.b and w.max() - w.min() > .999*(law.b - law.a)


def test_fan_counts_equal_torch_and_brute_force_wiring():
    for make in MAKERS:
        layer = make()
        assert fans(layer) == nn.init._calculate_fan_in_and_fan_out(layer.weight)
    for groups, stride, kernel in ((1, 1, 3), (2, 2, 4), (4, 3, 3)):
        for kind in (nn.Conv2d, nn.ConvTranspose2d):
            layer = kind(4, 8, kernel, stride=stride, groups=groups, bias=False)
            nn.init.ones_(layer.weight)
            x = torch.zeros(1, 4, 24, 24)
            x[0, 0, 12:12 + stride, 12:12 + stride] = 1                # a whole period, so that the mean is exact
            near, far = fans(layer, wired=True)
            assert layer(x).sum().item()/stride**2 == pytest.approx(far)
            inside = layer(torch.ones(1, 4, 24, 24))[0, 0, 6:6 + stride, 6:6 + stride].mean().item()
            assert inside == pytest.approx(near)


@pytest.mark.parametrize('depth, zero', [(18, False), (18, True), (50, True)])
def test_resnet_scheme_is_torchvisions(depth, zero):
    models = pytest.importorskip('torchvision').models
    make = getattr(models, f'resnet{depth}')
    torch.manual_seed(0)
    net = make(zero_init_residual=zero)
    fc = net.fc.weight.detach().clone()
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    init_weights(net, 'resnet', zero_init_residual=zero, generator=seeded())
    g = seeded()
    for m in convs:
        want = nn.init.kaiming_normal_(torch.empty_like(m.weight), mode='fan_out', nonlinearity='relu', generator=g)
        assert torch.equal(m.weight, want)
    last = [getattr(m, 'bn3', m.bn2) for m in net.modules() if type(m).__name__ in ('BasicBlock', 'Bottleneck')]
    others = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d) and not any(m is k for k in last)]
    assert all((m.weight == (0 if zero else 1)).all() and not m.bias.any() for m in last)
    assert all((m.weight == 1).all() for m in others) and torch.equal(net.fc.weight, fc)


def test_a_shared_weight_is_drawn_once_and_other_modules_are_left_alone():
    net = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Embedding(3, 5))
    net[1].weight = net[0].weight
    nn.init.constant_(net[2].weight, 7.)
    embedded = net[3].weight.detach().clone()
    init_weights(net, 'normal_one', generator=seeded())
    assert torch.equal(net[0].weight, torch.empty(5, 5).normal_(generator=seeded()))
    assert not net[0].bias.any() and not net[1].bias.any()
    assert (net[2].weight == 7).all() and torch.equal(net[3].weight, embedded)


@pytest.mark.parametrize('activation', [nn.Tanh, nn.ReLU, nn.GELU, nn.Sigmoid])
def test_lsuv_gives_every_layer_unit_size(activation):
    x = torch.randn(64, 3, 12, 12, generator=seeded())
    net = nn.Sequential(nn.Conv2d(3, 8, 3), activation(), nn.Conv2d(8, 8, 3, groups=2), activation(), nn.Dropout(.5),
                        nn.ConvTranspose2d(8, 4, 3), activation(), nn.Flatten(), nn.Linear(400, 5))
    init_weights(net, 'lsuv', data=x, generator=seeded()).eval()
    sizes = [t.std(correction=0).item() for t in look_through(
        net, x, torch.zeros(64).long(), layers=[nn.Conv2d, nn.ConvTranspose2d, nn.Linear]).activations.values()]
    assert sizes == pytest.approx([1.]*4, abs=1e-3)
    assert net.eval() is lsuv(net, x) and not any(m._forward_hooks for m in net.modules())


class OwnNorm(nn.Module):
    "A norm that replaces its buffer instead of writing into it."
    def __init__(self):
        super().__init__()
        self.register_buffer('mean', torch.zeros(8))
        self.linear = nn.Linear(4, 8)

    def forward(self, x):
        h = self.linear(x)
        if self.training: self.mean = .9*self.mean + .1*h.detach().mean(0)
        return F.dropout(h - self.mean, .3, self.training)


@pytest.mark.parametrize('mode', [True, False])
def test_fault_53_looking_leaves_no_trace(mode):
    net = nn.Sequential(OwnNorm(), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Linear(8, 3)).train(mode)
    net[1].eval()
    net[3].weight.grad = torch.ones(3, 8)
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    with no_trace(net, x, y): look_through(net, x, y)
    with no_trace(net, x, y): gradient_norms(net, x, y)
    with no_trace(net, x, y), torch.no_grad(): assert gradient_norms(net, x, y)['3.weight'] > 0
    with no_trace(net, x, y), pytest.raises(RuntimeError): gradient_norms(net, x[:, :2], y)
    with no_trace(net, x, y), pytest.raises(IndexError): look_through(net, x, y + 9)
    with no_trace(net, x, y): accuracy(net, [(x, y)])


@pytest.mark.parametrize('seed', range(4))
def test_gradients_equal_backward_on_random_networks(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3))
    x, y = torch.randn(5, 1, 8, 8), torch.randint(0, 3, (5,))
    norms, seen = gradient_norms(net, x, y), look_through(net, x, y, layers=['0', '3'])
    middle = net[:4](x)
    middle.retain_grad()
    F.cross_entropy(net[4:](middle), y).backward()
    assert norms == {n: p.grad.norm().item() for n, p in net.named_parameters() if p.ndim > 1}
    torch.testing.assert_close(seen.gradients['3'], middle.grad)


def test_looking_at_a_network_that_begins_in_place_or_has_nothing_to_learn():
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3))
    was = x.clone()
    assert gradient_norms(net, x, y)['1.weight'] > 0 and torch.equal(x, was)
    with torch.inference_mode(): assert gradient_norms(net, torch.randn(6, 4), y.clone())['1.weight'] > 0
    words = nn.Embedding(5, 3).requires_grad_(False)
    assert gradient_norms(words, y, y) == {} and look_through(words, y, y).gradients == {}


def spiral_like(n=120):
    x = torch.randn(n, 6, generator=seeded())
    return x, (x[:, 0] > 0).long()


class Fail(Callback):
    def __init__(self, hook, error): setattr(self, hook, self.fail); self.error = error
    def fail(self, *args): raise self.error


@pytest.mark.parametrize('hook', ['on_train_batch_start', 'on_after_backward', 'on_before_optimizer_step',
                                  'on_train_batch_end', 'on_validation_start', 'on_train_epoch_end'])
@pytest.mark.parametrize('error', [RuntimeError('planted'), KeyboardInterrupt()])
@pytest.mark.parametrize('first', [True, False])
def test_hooks_are_gone_after_every_error(hook, error, first):
    x, y = spiral_like()
    net, stats = deep_mlp(2, 8, nn.ReLU, 6, 2), ActivationStats()
    both = [stats, Fail(hook, error)][::1 if first else -1]
    trainer = Trainer(max_epochs=2, callbacks=both, enable_progress_bar=False)
    data = list(zip(x.split(50), y.split(50)))
    try: trainer.fit(net, data, data, torch.optim.SGD(net.parameters(), .1), F.cross_entropy)
    except RuntimeError as e: assert str(e) == 'planted'
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_statistics_by_brute_force_with_accumulation_and_a_short_batch():
    x, y = spiral_like(110)
    net, stats, outs = deep_mlp(2, 8, nn.ReLU, 6, 2), ActivationStats(nn.ReLU, limits=(0., 1.), bins=5), []
    handle = net[2].register_forward_hook(lambda m, args, out: outs.append(out.detach().clone()))
    trainer = Trainer(max_epochs=2, callbacks=stats, accumulate_grad_batches=2, enable_progress_bar=False)
    data = list(zip(x.split(25), y.split(25)))                         # five batches, the last of ten samples
    trainer.fit(net, data, None, torch.optim.SGD(net.parameters(), .1), F.cross_entropy)
    handle.remove()
    assert stats.column('2', 'step') == [1, 2, 3, 4, 5, 6]
    for k, out in enumerate(outs[i] for i in (1, 3, 4, 6, 8, 9)):     # the batches after which a step was taken
        assert stats.column('2', 'mean')[k] == pytest.approx(out.mean().item(), rel=1e-5)
        assert stats.column('2', 'dead')[k] == pytest.approx((out.amax(0) == out.amin(0)).float().mean().item())
        hist = np.histogram(out.clamp(0, 1).numpy(), 5, (0, 1))[0]
        assert stats.counts['2'][k].tolist() == hist.tolist()


def test_watch_on_images_shared_modules_and_every_second_pass():
    relu = nn.ReLU()
    net = nn.Sequential(nn.Conv2d(1, 3, 3), relu, nn.Conv2d(3, 3, 3), relu)
    with ActivationStats(nn.ReLU, every_n_steps=2).watch(net) as stats:
        for _ in range(5): net(torch.randn(2, 1, 8, 8))
    assert list(stats.rows) == ['1', '1#2'] and stats.column('1#2', 'step') == [2, 4]
    assert len(stats.show().axes) == 2 and len(stats.plot().axes) == 3
    with pytest.raises(ValueError, match='every_n_steps'): ActivationStats(every_n_steps=0)


def tiny(): return stand_in('mnist').subset(torch.arange(200))


def test_fault_43_a_seed_gives_the_same_twice_and_leaves_the_users_random_state_alone():
    states = lambda: (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist())
    data = tiny()
    before = states()
    first = compare_init(['rule_normal', 'lsuv'], data, 2, 1, progress=False)
    assert states() == before
    torch.manual_seed(5), torch.randn(100), np.random.rand(3), random.random()
    again = compare_init(['lsuv', 'rule_normal'], data, [1, 0], 1, progress=False)
    assert again.runs['lsuv'] == first.runs['lsuv'][::-1]
    before = states()
    with pytest.raises(RuntimeError, match='planted'):
        compare_init({'bad': lambda model: (_ for _ in ()).throw(RuntimeError('planted'))}, data, 1, progress=False)
    assert states() == before


def test_fault_43_the_same_in_another_process_and_importing_draws_no_random_number():
    code = ("import torch; torch.randn(9); was = torch.get_rng_state(); from cnnbook.init import compare_init; "
            "from cnnbook.data import stand_in; assert torch.equal(was, torch.get_rng_state()); "
            "print(compare_init(['kaiming_normal'], stand_in('mnist').subset(torch.arange(200)), 1, 1, "
            "progress=False).runs['kaiming_normal'][0].losses)")
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    here = compare_init(['kaiming_normal'], tiny(), 1, 1, progress=False)
    assert out.strip() == str(here.runs['kaiming_normal'][0].losses)
