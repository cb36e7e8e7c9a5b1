"""Chapters 14da and 14e: codes of torchvision's networks, files of other processes and damaged ones, random rounds."""
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torchvision
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import nn

from cnnbook.codes import Codes, extract_codes, linear_probe, nearest
from cnnbook.data import Loader
from cnnbook.images import Images
from cnnbook.trace import no_trace
from cnnbook.world import shapes

SMALL = """
import torch
from torch import nn
from cnnbook.codes import extract_codes
from cnnbook.world import shapes

torch.manual_seed(3)
net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                    nn.Linear(4, 3))
images = shapes(40, 16, seed=5)
"""


def small():
    names = {}
    exec(SMALL, names)
    return names['net'], names['images']


def made(n=60, d=7, k=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    centres, y = 2*torch.randn(k, d, generator=g), torch.arange(n) % k
    scale = 10**torch.randn(d, generator=g)
    x = (centres[y] + torch.randn(n, d, generator=g) + 3)*scale
    return Codes(x, y, tuple('abcdefgh'[:k]), 'fc', 'random')


HEADS = {'resnet18': 'fc', 'squeezenet1_1': 'classifier.1', 'mobilenet_v2': 'classifier.1', 'shufflenet_v2_x0_5': 'fc',
         'mnasnet0_5': 'classifier.1', 'regnet_y_400mf': 'fc', 'efficientnet_b0': 'classifier.1'}


@pytest.mark.parametrize('name', HEADS)
def test_codes_are_what_is_left_without_the_head(name):
    torch.manual_seed(0)
    net = getattr(torchvision.models, name)(num_classes=7)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.uniform_(-.1, .1), m.running_var.uniform_(.5, 1.5)
    g = torch.Generator().manual_seed(0)
    x = torch.randint(256, (3, 3, 64, 64), generator=g, dtype=torch.uint8)
    images = Images(x, torch.arange(3), tuple('abc'), 'noise')
    with no_trace(net, images.x): codes = extract_codes(net, images, batch_size=2)
    assert codes.layer == f'what enters {HEADS[name]}'
    at, _, key = HEADS[name].rpartition('.')
    setattr(net.get_submodule(at), key, nn.Identity())
    if name == 'squeezenet1_1': net.classifier[2] = nn.Identity()
    with torch.no_grad(): wanted = net.eval()(images.x/255)
    torch.testing.assert_close(codes.x, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match='expected a network whose scores'): extract_codes(net, images)


def test_no_trace_after_an_error():
    net, images = small()
    loader = Loader(images, 10)
    loader.set_epoch(3)
    calls = []

    def break_down(*_):
        calls.append(1)
        if len(calls) > 3: raise RuntimeError('fourth')

    net[2].register_forward_hook(break_down)
    with no_trace(net.train()), pytest.raises(RuntimeError, match='fourth'): extract_codes(net, loader)
    assert loader.epoch == 3 and len(calls) == 4


def test_another_process_finds_the_file(tmp_path):
    net, images = small()
    code = SMALL + f'print(float(extract_codes(net, images, cache={str(tmp_path)!r}).x.sum()))'
    root = Path(__file__).resolve().parent.parent
    there = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True, check=True).stdout
    file, = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        codes = extract_codes(net, images, cache=tmp_path)
    assert file.stat().st_mtime_ns == before and [*tmp_path.iterdir()] == [file]
    assert abs(float(codes.x.sum()) - float(there)) < 1e-3 and not codes.x.requires_grad


def test_damage_is_told_and_mended(tmp_path):
    net, images = small()
    good = extract_codes(net, images, cache=tmp_path)
    file, = tmp_path.iterdir()
    data, rng = file.read_bytes(), random.Random(0)
    for k in range(20):
        bad = bytearray(data)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        file.write_bytes(bad[:rng.randrange(len(bad))] if k % 4 == 0 else bad)
        with pytest.warns(UserWarning, match='are computed again'): codes = extract_codes(net, images, cache=tmp_path)
        assert torch.equal(codes.x, good.x) and len([*tmp_path.iterdir()]) == 1
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            assert torch.equal(extract_codes(net, images, cache=tmp_path).x, good.x)


def test_a_file_under_another_name_is_not_believed(tmp_path):
    net, images = small()
    extract_codes(net, images, cache=tmp_path/'a')
    with torch.no_grad(): net[0].bias += 1
    extract_codes(net, images, cache=tmp_path/'b')
    (wrong,), (right,) = (list((tmp_path/k).iterdir()) for k in 'ab')
    right.write_bytes(wrong.read_bytes())
    with pytest.warns(UserWarning, match='belongs to another key'): extract_codes(net, images, cache=tmp_path/'b')


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x): return self.conv(x).mean((2, 3))


def test_codes_of_another_width_are_not_believed(tmp_path):
    "The same weights and the same print, and a forward that gives twice as many numbers."
    torch.manual_seed(0)
    net, images = Mean(), shapes(10, 16, seed=0)
    wide = type('Mean', (Mean,), {'forward': lambda self, x: torch.cat([Mean.forward(self, x)]*2, 1)})()
    wide.load_state_dict(net.state_dict())
    codes = extract_codes(net, images, layer='', cache=tmp_path)
    with pytest.warns(UserWarning, match='now gives other codes'):
        again = extract_codes(wide, images, layer='', cache=tmp_path)
    assert torch.equal(again.x, codes.x.repeat(1, 2))


def test_a_buffer_outside_the_state_dict_is_part_of_the_key(tmp_path):
    net, images = small()
    net.register_buffer('shift', torch.zeros(1), persistent=False)
    extract_codes(net, images, cache=tmp_path)
    net.shift += 1
    extract_codes(net, images, cache=tmp_path)
    assert len([*tmp_path.iterdir()]) == 2


def test_half_precision_gives_floats():
    net, images = small()
    codes = extract_codes(net.bfloat16(), images, transform=lambda x: x.bfloat16())
    torch.testing.assert_close(codes.x, extract_codes(small()[0], images).x, rtol=.05, atol=.02)


@pytest.mark.parametrize('seed', range(5))
def test_probe_equals_scikit_learn(seed):
    codes, other = made(k=2 + seed % 3, seed=seed), made(40, k=2 + seed % 3, seed=seed)
    x, z = codes.x.double().numpy(), other.x.double().numpy()
    for kind, learner in (('softmax', LogisticRegression(C=.3, max_iter=2000)),
                          ('svm', LinearSVC(C=.3, dual=False, max_iter=5000))):
        theirs = make_pipeline(StandardScaler(), learner).fit(x, codes.y)
        probe, wanted = linear_probe(codes, kind, c=.3), torch.from_numpy(theirs.decision_function(z)).float()
        scores = probe.scores(other)
        if len(codes.classes) == 2: scores = scores[:, 1] - scores[:, 0]
        torch.testing.assert_close(scores, wanted, rtol=1e-3, atol=1e-3)
        assert probe.predict(other).tolist() == theirs.predict(z).tolist()
        torch.testing.assert_close(probe.as_linear()(other.x), probe.scores(other))


@pytest.mark.parametrize('seed', range(5))
def test_nearest_equals_scikit_learn(seed):
    codes, queries = made(300, 5, seed=seed), made(270, 5, seed=seed + 100)   # more than one block of queries
    for metric in ('cosine', 'euclidean'):
        found = nearest(codes, queries, 6, metric)
        peer = NearestNeighbors(n_neighbors=6, metric=metric).fit(codes.x.double())
        distance, index = peer.kneighbors(queries.x.double())
        torch.testing.assert_close(found.distance, torch.from_numpy(distance).float(), rtol=1e-4, atol=1e-6)
        assert (found.index.numpy() == index).mean() > .995
        assert nearest(codes, codes, 1, metric).index[:, 0].tolist() == list(range(300))


def test_probe_takes_the_place_of_the_head():
    torch.manual_seed(0)
    net, images = small()[0].eval(), shapes(60, 16, seed=2)
    images = Images(images.x, torch.arange(60) % 3, tuple('abc'), '')
    probe = linear_probe(extract_codes(net, images))
    state = torch.get_rng_state()
    net[5] = probe.as_linear()
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad(): scores = net(images.x/255)
    torch.testing.assert_close(scores, probe.scores(extract_codes(net, images)), rtol=1e-3, atol=1e-3)
