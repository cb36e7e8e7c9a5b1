"Chapters 03a to 03b: random rounds against torch and torchinfo, and networks that are too large for a cell."
import math
import random

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cnnbook.capacity import (
    explain_shapes,
    fully_convolutional,
    kept_for_backward,
    pattern,
    peak_bytes,
    receptive_field,
    summary,
    training_memory,
)
from cnnbook.fields import pixels_seen
from cnnbook.hooks import eval_mode
from cnnbook.patterns import parse
from cnnbook.trace import no_trace
from cnnbook.walk import walk, windows


def on_meta(name):
    with torch.device('meta'): return torchvision.models.get_model(name)


# -- the pattern language --

def sentence(rng, depth=0):
    "A random pattern without its ends, and the layers that it stands for."
    text, words = [], []
    for _ in range(rng.randint(1, 3)):
        if depth < 3 and rng.random() < .5:
            inner, some = sentence(rng, depth + 1)
            inner = f'[{inner}]'
        else: inner, some = (name := rng.choice(['CONV', 'RELU', 'NORM', 'DROP'])), [name]
        n = rng.choice([1, 1, 0, 2, 3])
        text.append(inner if n == 1 else f'{inner}{rng.choice(["*", " * "])}{n}')
        words += some*n
    return rng.choice(['->', ' -> ', '  ->']).join(text), words


def test_random_patterns_are_read_as_they_were_written():
    rng = random.Random(0)
    for _ in range(300):
        text, words = sentence(rng)
        if len(words) < 200: assert [w.name for w in parse(f'INPUT -> {text} -> FC')] == ['INPUT', *words, 'FC']


def test_damaged_patterns_raise_value_errors_that_point_at_a_place():
    rng, refused = random.Random(1), 0
    for _ in range(1000):
        text = f'INPUT -> {sentence(rng)[0]} -> FC'
        at = rng.randrange(len(text))
        new = rng.choice(['', '?', ']', '[', '*', '->', 'POOL', '²', '\n', '-'])
        text = text[:at] + new + text[at + rng.randint(0, 2):]
        try: parse(text)
        except ValueError as e:
            refused += 1
            assert str(e).startswith('pattern: expected') and str(e).endswith('^')
    assert refused > 500


def test_what_a_pattern_builds_runs():
    rng, built = random.Random(2), 0
    for seed in range(60):
        torch.manual_seed(seed)
        n, m, size = rng.randint(1, 2), rng.randint(1, 3), (rng.randint(1, 3), rng.randint(4, 30), rng.randint(4, 30))
        text = f'INPUT -> [[CONV -> NORM -> RELU]*{n} -> POOL]*{m} -> [FC -> RELU]*{rng.randint(0, 2)} -> FC'
        kernel, padding = rng.choice([1, 3, 5]), rng.choice([None, 0, 1])
        try: net = pattern(text, size, 3, channels=4, hidden=5, kernel=kernel, padding=padding)
        except ValueError as e: assert 'a map of at least' in str(e) or 'hidden' in str(e)
        else:
            built += 1
            assert net.eval()(torch.zeros(2, *size)).shape == (2, 3)
    assert built > 15


# -- walks --

@pytest.mark.filterwarnings('ignore:Using padding')
def test_windows_count_as_torch_does():
    rng = random.Random(3)
    for _ in range(300):
        k, s, d, p = (rng.randint(1, 4), rng.randint(1, 4)), rng.randint(1, 3), rng.randint(1, 3), rng.randint(0, 2)
        size = rng.randint(12, 30), rng.randint(12, 30)
        layer = rng.choice([nn.Conv2d(1, 1, k, s, p, d), nn.Conv2d(1, 1, k, 1, rng.choice(['valid', 'same']), d),
                            nn.MaxPool2d(k, s, min(p, min(k)//2), d), nn.AvgPool2d(k, s, min(p, min(k)//2))])
        given = layer.to('meta')(torch.empty(1, 1, *size, device='meta')).shape[2:]
        assert [(n + p - r)//s + 1 for n, (r, s, p) in zip(size, windows(layer))] == list(given), layer


def test_a_wrong_linear_is_told_the_right_number():
    rng = random.Random(4)
    for _ in range(40):
        c, size = rng.randint(2, 9), (3, rng.randint(8, 20), rng.randint(8, 20))
        body = [nn.Conv2d(3, c, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
        right = nn.Sequential(*body)(torch.zeros(1, *size)).shape[1]
        wrong = nn.Sequential(*body, nn.Linear(rng.choice([c, right//2, right + 1]), 2))
        assert explain_shapes(wrong, size).fault.endswith(f'Set in_features={right}')
        wrong[4] = nn.Linear(right, 2)
        assert explain_shapes(wrong, size).fault == ''


@pytest.mark.parametrize('name', ['shufflenet_v2_x1_0', 'swin_t', 'convnext_tiny', 'efficientnet_b0', 'vit_b_16'])
def test_networks_that_are_right_get_no_note(name):
    shapes = explain_shapes(on_meta(name), (3, 224, 224))
    assert (shapes.fault, shapes.notes) == ('', ()) and shapes.walk.gap


# -- turned into convolutions --

@pytest.mark.parametrize('name', ['alexnet', 'vgg11'])
def test_classifiers_of_torchvision_give_the_same_scores(name):
    model = on_meta(name).to_empty(device='cpu')
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                m.weight.uniform_(-1, 1, generator=g).mul_(math.sqrt(6/m.weight[0].numel()))
                m.bias.uniform_(-.1, .1, generator=g)
    x = torch.rand(1, 3, 224, 224, generator=g)
    dense = fully_convolutional(model, (3, 224, 224))
    with eval_mode(model), eval_mode(dense), torch.no_grad(): a, b = model(x), dense(x)
    assert b.shape == (1, 1000, 1, 1)
    torch.testing.assert_close(b.flatten(1), a, atol=1e-5*a.abs().max().item(), rtol=1e-5)


# -- counts --

@pytest.mark.parametrize('name', ['resnet18', 'mobilenet_v2', 'squeezenet1_1', 'shufflenet_v2_x1_0', 'mnasnet1_0'])
def test_multiply_adds_are_those_of_torch(name):
    model = on_meta(name)
    with eval_mode(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device='meta'))
    s = summary(model, (3, 224, 224))
    assert 2*s.macs == counter.get_total_flops() and s.notes == () and sum(v.params for v in s.layers) == s.params


@pytest.mark.parametrize('name', ['alexnet', 'resnet18', 'mobilenet_v2', 'squeezenet1_1'])
def test_counts_are_those_of_torchinfo(name):
    "torchinfo counts a bias and the weights of a norm as multiply-adds, the norm's once for each image; we do not."
    torchinfo = pytest.importorskip('torchinfo')
    model = torchvision.models.get_model(name, num_classes=10)
    theirs, s = torchinfo.summary(model, (1, 3, 64, 64), verbose=0), summary(model, (3, 64, 64))
    layers = dict(model.named_modules())
    def more(v):
        m = layers[v.name.split('#')[0]]
        if isinstance(m, nn.BatchNorm2d): return m.weight.numel() + m.bias.numel()
        return 0 if getattr(m, 'bias', None) is None else m.bias.numel()*math.prod(v.output[1:])
    assert (s.params, s.trainable_params) == (theirs.total_params, theirs.trainable_params)
    assert s.macs + sum(more(v) for v in s.layers) == theirs.total_mult_adds


def test_numbers_of_the_literature():
    known = {'alexnet': 61_100_840, 'vgg16': 138_357_544, 'resnet50': 25_557_032, 'densenet121': 7_978_856}
    for name, params in known.items(): assert summary(on_meta(name), (3, 224, 224)).params == params


# -- fields --

def test_arithmetic_and_gradient_agree():
    rng = random.Random(5)
    for seed in range(12):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(2, 8, 1)]
        for _ in range(rng.randint(1, 4)):
            k = rng.choice([1, 2, 3, 5])
            layers.append(rng.choice([nn.Conv2d(8, 8, k, rng.randint(1, 2), rng.randint(0, k//2)), nn.Sigmoid(),
                                      nn.AvgPool2d(k, rng.randint(1, 2)), nn.Conv2d(8, 8, 3, dilation=2)]))
        net = nn.Sequential(*layers)
        f = receptive_field(net, (2, 90, 90))[-1]
        seen = (pixels_seen(net, (2, 90, 90), f.name, 1) > 0).nonzero()
        for axis in (0, 1):
            begin, at = f.first[axis] + f.output[axis]//2*f.jump[axis], seen[:, axis]
            assert (at.amin(), at.amax()) == (max(0, begin), min(89, begin + f.size[axis] - 1)), net


def test_fault_54_a_layer_that_is_not_there_or_gives_no_map():
    model = torchvision.models.resnet18(num_classes=2).requires_grad_(False)
    for layer, words in (('layer9', 'expected one of conv1, bn1'), ('fc', 'gives a map'), ('', 'expected one of')):
        with no_trace(model), pytest.raises(ValueError, match=words): pixels_seen(model, (3, 64, 64), layer)
    assert (pixels_seen(model, (3, 64, 64), 'layer1', 1) > 0).any()                # frozen weights, and yet a gradient


# -- memory --

OPTIMIZERS = {'sgd': (torch.optim.SGD, {}), 'momentum': (torch.optim.SGD, {'momentum': .9}),
              'rmsprop': (torch.optim.RMSprop, {}), 'adagrad': (torch.optim.Adagrad, {}),
              'adam': (torch.optim.Adam, {}), 'adamw': (torch.optim.AdamW, {})}


@pytest.mark.parametrize('foreach', [False, True])
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_the_estimate_is_near_the_peak(name, foreach):
    torch.manual_seed(0)
    net = pattern('INPUT -> [CONV -> NORM -> RELU -> POOL]*2 -> [FC -> RELU]*3 -> FC', (3, 16, 16), hidden=300)
    make, more = OPTIMIZERS[name]
    optimizer = make(net.parameters(), 1e-3, foreach=foreach, **more)
    x, y = torch.randn(2, 3, 16, 16), torch.tensor([0, 1])

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    step()
    optimizer.zero_grad()
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    guess = training_memory(net, (3, 16, 16), 2, name, foreach)
    assert abs(sum(v.nbytes for v in state if v.ndim) - guess.state) == 0
    real = peak_bytes(step, *net.parameters(), *net.buffers(), *state, x, y)
    assert .85 < guess.total/real < 1.15, (guess, real)


def test_what_is_kept_on_meta_is_what_is_kept():
    "The same count, of a real pass."
    for name in ('resnet18', 'mobilenet_v2', 'densenet121'):
        model, kept = torchvision.models.get_model(name, num_classes=2), {}
        own = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}

        def keep(t, own=own, kept=kept):
            if t.untyped_storage()._cdata not in own: kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
            return t

        with no_trace(model): guess = kept_for_backward(model, (3, 32, 32), 2)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t): out = model(torch.zeros(2, 3, 32, 32))
        assert abs(guess/sum(kept.values()) - 1) < .02, name
        del out


def test_a_walk_of_a_failing_network_leaves_no_trace():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(5), nn.Dropout())
    for look in (walk, explain_shapes):
        with no_trace(model): look(model, (3, 8, 8))
    for look in (summary, receptive_field, training_memory, fully_convolutional):
        with no_trace(model), pytest.raises(ValueError, match='takes 5 channels, but 4 arrive'): look(model, (3, 8, 8))
