"""Occlusion and the tests of maps: against captum and SciPy, against plain loops, and with odd input."""
import warnings

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from cnnbook.cifar import ClassicNet
from cnnbook.hooks import capture
from cnnbook.nearby import cell_reach, nearby_occlusion
from cnnbook.occlusion import blank, covers, near, occlusion, pointing_game
from cnnbook.sanity import deletion_curve, insertion_curve, map_similarity, randomized
from cnnbook.trace import no_trace


def small(channels=3, classes=4, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
                         nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Dropout(.5), nn.Linear(54, classes))


def pixels(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


NETS = {'classic': (lambda: randomized(ClassicNet()), 32), 'small': (small, 20),
        'resnet18': (lambda: torchvision.models.resnet18(num_classes=7), 64),
        'vgg11': (lambda: torchvision.models.vgg11(num_classes=7), 32)}


@pytest.mark.parametrize('name', NETS)
def test_equals_captum_peers(name):
    captum = pytest.importorskip('captum.attr')
    torch.manual_seed(0)
    build, side = NETS[name]
    model, x = build().eval(), pixels(2, 3, side, side)
    for (h, w), (i, j), fill in (((side//2, side//4), (side//4, side//4), 0.),
                                 ((side//3, side//2), (side//4, side//3), .5)):
        theirs = captum.Occlusion(model).attribute(x, (3, h, w), (3, i, j), target=1, baselines=fill)[:, 0]
        ours = occlusion(model, x, 1, (h, w), (i, j), fill, batch_size=5, overhang=False)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4*float(theirs.abs().max()))
    if name == 'resnet18':
        ours = nearby_occlusion(model, x, 'maxpool', 1, (h, w), (i, j), fill, overhang=False)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4*float(theirs.abs().max()))


def by_loops(model, x, target, window, stride, fill):
    "One window at a time, over the border on all sides."
    (h, w), (wh, ww), (sh, sw) = x.shape[2:], window, stride
    total, count = torch.zeros(h, w), torch.zeros(h, w)
    with torch.no_grad():
        before = model(x)[0, target]
        for top in range(sh - wh, h, sh):
            for left in range(sw - ww, w, sw):
                rows, cols, covered = slice(max(top, 0), top + wh), slice(max(left, 0), left + ww), x.clone()
                covered[:, :, rows, cols] = fill[:, :, rows, cols]
                total[rows, cols] += before - model(covered)[0, target]
                count[rows, cols] += 1
    return total/count


def test_equals_loops_at_random():
    r, model = np.random.default_rng(0), small().eval()
    for n in range(12):
        h, w = r.integers(4, 14, 2)
        window = tuple(int(v) for v in (r.integers(1, h + 1), r.integers(1, w + 1)))
        stride = tuple(int(r.integers(1, v + 1)) for v in window)
        x, fill = pixels(2, 3, h, w, seed=n), ('mean', 'blur', .3)[n % 3]
        ours = occlusion(model, x, torch.tensor([1, 2]), window, stride, fill, batch_size=int(r.integers(1, 40)))
        for k in range(2):
            wanted = by_loops(model, x[k:k + 1], k + 1, window, stride, blank(x, fill)[k:k + 1])
            torch.testing.assert_close(ours[k], wanted, rtol=1e-3, atol=1e-4)


PIECES = [('small', '0', 20), ('small', '2', 20), ('resnet18', 'maxpool', 64), ('resnet18', 'layer1', 96),
          ('vgg11', 'features.2', 64), ('vgg11', 'features.5', 64)]


@pytest.mark.parametrize('name, layer, side', PIECES)
def test_pieces_give_the_same_map(name, layer, side):
    r = np.random.default_rng(side)
    torch.manual_seed(0)
    model = NETS[name][0]().eval()
    for n in range(4):
        window = tuple(int(v) for v in r.integers(side//4, side//2, 2))
        stride = tuple(int(r.integers(v//2, v + 1)) for v in window)
        x, fill, overhang = pixels(2, 3, side, side, seed=n), ('mean', 'blur', .3)[n % 3], bool(n % 2)
        wanted = occlusion(model, x, torch.tensor([1, 2]), window, stride, fill, overhang=overhang)
        size = int(r.integers(1, 20))
        got = nearby_occlusion(model, x, layer, torch.tensor([1, 2]), window, stride, fill, size, overhang)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4*float(wanted.abs().max()))


def test_pieces_behind_a_wide_max_pool_of_few_channels():
    for seed in range(6):
        torch.manual_seed(seed)
        early = nn.Conv2d(3, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4)
        model = nn.Sequential(*early, nn.Flatten(), nn.Linear(128, 5))
        x = pixels(1, 3, 32, 32, seed=seed)
        torch.testing.assert_close(nearby_occlusion(model, x, '2', 1), occlusion(model, x, 1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('factor', [1., .01, .001])
def test_a_wrong_layer_is_found_however_small_the_scores(factor):
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5)
        def forward(self, x): return factor*(self.fc(self.conv(x).mean((2, 3))) + x.mean((1, 2, 3))[:, None])
    torch.manual_seed(0)
    with pytest.raises(ValueError, match='others than those of the whole'):
        nearby_occlusion(Skip(), pixels(1, 3, 32, 32), 'conv', 1)
    torch.manual_seed(0)
    guessed = nn.Sequential(nn.Conv2d(3, 4, 17), nn.Flatten(), nn.Linear(1024, 5))         # 16 cells, but a jump of 1
    with pytest.raises(ValueError, match='depend on alone'): nearby_occlusion(guessed, pixels(1, 3, 32, 32), '0', 1)


def test_a_cell_that_is_touched_is_touched():
    "Every cell that a changed pixel changes is among the touched ones, along both sides."
    torch.manual_seed(0)
    model, x = torchvision.models.resnet18(num_classes=7).eval(), pixels(1, 3, 64, 96)
    for layer in ('conv1', 'maxpool', 'layer1', 'layer2'):
        down, across = cell_reach(model, x, layer)
        assert down.cells*down.jump == 64 and across.cells*across.jump == 96
        for row, col in ((0, 0), (31, 40), (63, 95), (17, 64)):
            other = x.clone()
            other[:, :, row, col] += 5
            with torch.no_grad(), capture(model, layer) as a: model(x)
            with torch.no_grad(), capture(model, layer) as b: model(other)
            changed = (a[layer] != b[layer])[0].any(0)
            assert set(changed.any(1).nonzero().flatten().tolist()) <= set(down.touched(row, row + 1))
            assert set(changed.any(0).nonzero().flatten().tolist()) <= set(across.touched(col, col + 1))


@pytest.mark.parametrize('layer, words', [('layer1.0.bn2', 'depend on alone'), ('layer4.1', 'depend on alone'),
                                          ('fc', 'one map'), ('layer9', 'conv1, bn1')])
def test_where_pieces_do_not_do_it_is_said(layer, words):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=7).eval()
    if layer == 'layer4.1':                                              # a path around all layers
        class Around(nn.Module):
            def __init__(self): super().__init__(); self.net = model
            def forward(self, x): return self.net(x) + x.mean((2, 3)).sum(1, keepdim=True)
        model, layer = Around(), 'net.maxpool'
    with no_trace(model), pytest.raises(ValueError, match=words):
        nearby_occlusion(model, pixels(1, 3, 64, 64), layer, window=16, stride=16)


def test_every_pixel_is_covered_alike():
    for size in range(1, 20):
        for window in range(1, size + 1):
            for stride in range(1, window + 1):
                times = covers(size, window, stride).sum(0)
                assert times.min() >= window//stride and times.max() <= -(-window//stride)
                assert covers(size, window, stride, False).any(0).all()


@pytest.mark.parametrize('channels', [1, 2, 4])
def test_other_channels_and_kinds(channels):
    model, x = small(channels), pixels(2, channels, 9, 11)
    with no_trace(model, x): maps = occlusion(model, x, window=3, stride=2)
    assert maps.shape == (2, 9, 11) and not maps.requires_grad
    torch.testing.assert_close(occlusion(model.double(), x.double(), window=3, stride=2), maps, rtol=1e-3, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(occlusion(model.float(), x, window=3, stride=2), maps, rtol=1e-3, atol=1e-5)


def test_fault_55_odd_images():
    model, same = small(), torch.full((1, 3, 8, 8), .3)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert occlusion(model, same).abs().max() < 1e-5                       # one colour, covered with its mean
        assert occlusion(model, same[:0]).shape == (0, 8, 8)
        assert occlusion(model, same[..., :1, :1], window=1, stride=1).shape == (1, 1, 1)
    for x, words in ((same*float('nan'), 'x: expected finite numbers, got NaN or infinity in image 0'),
                     (same.permute(0, 2, 3, 1), 'channels last'), (same[0], 'x: expected images')):
        with pytest.raises(ValueError, match=words): occlusion(model, x, window=2, stride=2)
    with pytest.raises(TypeError, match='x: expected floats'): occlusion(model, (same*255).byte())
    with pytest.raises(ValueError, match='model: expected scores'): occlusion(nn.Conv2d(3, 2, 3), same)


def test_fault_54_frozen_and_detached():
    class Detached(nn.Module):
        def forward(self, x): return net(x).detach()
    net, x = small().requires_grad_(False).eval(), pixels(1, 3, 8, 8)
    torch.testing.assert_close(occlusion(Detached(), x), occlusion(net, x))


def test_near_equals_distance():
    from scipy.ndimage import distance_transform_edt
    r = np.random.default_rng(0)
    masks = torch.from_numpy(r.random((20, 17, 13)) < .02)
    masks[:, 3, 4] = True
    for tolerance in (0, 1, 2, 5):
        far = torch.from_numpy(np.stack([distance_transform_edt(~m) for m in masks.numpy()]))
        assert torch.equal(near(masks, tolerance), far <= tolerance + 1e-9)


def test_blind_maps_score_the_chance():
    g = torch.Generator().manual_seed(0)
    masks = torch.zeros(4000, 12, 12, dtype=torch.bool)
    masks[:, 4:9, 2:6] = True
    game = pointing_game(torch.rand(masks.shape, generator=g), masks, 1)
    assert abs(game.rate - game.chance) < .03
    assert abs(pointing_game(torch.zeros(masks.shape), masks, 1).rate - game.chance) < 1e-5


def test_similarity_equals_scipy():
    from scipy.stats import spearmanr
    r = np.random.default_rng(0)
    for values in (3, 50, 10**6):                                               # many ties, some, none
        a, b = (r.integers(0, values, (6, 9, 7)).astype(np.float32) for _ in range(2))
        b += .5*a
        wanted = [spearmanr(p.ravel(), q.ravel()).statistic for p, q in zip(a, b)]
        np.testing.assert_allclose(map_similarity(*map(torch.from_numpy, (a, b))).numpy(), wanted, atol=1e-9)


def test_curves_begin_and_end_where_they_should():
    model, x = small().eval(), pixels(3, 3, 10, 8)
    maps = pixels(3, 10, 8, seed=1)
    with torch.no_grad():
        whole, nothing = (model(v).softmax(1)[:, 2] for v in (x, blank(x, .1)))
    down, up = (f(model, x, maps, 2, 7, .1, 2) for f in (deletion_curve, insertion_curve))
    for curve, ends in ((down, (whole, nothing)), (up, (nothing, whole))):
        assert curve.scores.shape == (3, 8) and curve.shares[0] == 0 and curve.shares[-1] == 1
        for k, end in zip((0, -1), ends): torch.testing.assert_close(curve.scores[:, k], end, rtol=1e-4, atol=1e-5)
    reversed_up = insertion_curve(model, x, -maps, 2, 80, .1)                   # one pixel a step, no ties
    torch.testing.assert_close(deletion_curve(model, x, maps, 2, 80, .1).scores, reversed_up.scores.flip(1),
                               rtol=1e-4, atol=1e-5)


def test_randomized_leaves_nothing_of_the_old():
    for build in (small, lambda: torchvision.models.resnet18(num_classes=5),
                  lambda: nn.ModuleList([nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
                                         nn.MultiheadAttention(8, 2)])):
        torch.manual_seed(0)
        model = build()
        for b in model.buffers(): b.add_(1)
        with no_trace(model): fresh = randomized(model, 3)
        kinds = {n: p for n, p in model.named_parameters() if p.std(correction=0) > 0}
        assert kinds and not any(torch.equal(p, fresh.get_parameter(n)) for n, p in kinds.items())
        assert all(torch.equal(p, q) for p, q in zip(fresh.parameters(), randomized(model, 3).parameters()))
    frozen = small().requires_grad_(False)
    assert not any(p.requires_grad for p in randomized(frozen).parameters())
