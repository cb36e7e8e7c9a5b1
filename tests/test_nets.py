"""The named networks against torchvision: same names, same numbers and the real weights."""
import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from gate import ROOT
from PIL import Image

from cnnbook import classics, nets
from cnnbook.classics import random_weights
from cnnbook.hooks import eval_mode
from cnnbook.squeeze import cam, global_average, squeezenet1_0

WEIGHTS = Path(os.environ.get('CNNBOOK_WEIGHTS') or ROOT.parent/'shared'/'datasets'/'weights')


def same(ours, theirs, size, seed=0):
    "The largest difference of two networks on meta that get the same random weights and image."
    state = random_weights(ours, seed)
    for net in (ours, theirs): net.load_state_dict(state, assign=True)
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed))
    with eval_mode(ours), eval_mode(theirs), torch.no_grad(): a, b = ours(x), theirs(x)
    assert a.std() > .01                                # the signal is alive: equal scores mean something
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('name, size', [('alexnet', (224, 224)), ('vgg16', (32, 64)), ('vgg16_bn', (64, 32))])
def test_classics_equal_torchvision(name, size):
    with torch.device('meta'): pair = getattr(nets, name)(), getattr(torchvision.models, name)()
    same(*pair, size)


@pytest.mark.parametrize('name', ['squeezenet1_0', 'squeezenet1_1', 'densenet121'])
def test_light_nets_equal_torchvision(name):
    with torch.device('meta'): pair = getattr(nets, name)(), getattr(torchvision.models, name)()
    same(*pair, (128, 96))


def test_blocks_bear_the_names_of_inception_v3():
    with torch.device('meta'):
        theirs = torchvision.models.inception_v3(init_weights=False)
        for name, ours in {'Mixed_5b': nets.InceptionA(192, 32), 'Mixed_6a': nets.InceptionB(288),
                           'Mixed_6c': nets.InceptionC(768, 160), 'Mixed_7a': nets.InceptionD(768),
                           'Mixed_7b': nets.InceptionE(1280)}.items():
            ours.load_state_dict(getattr(theirs, name).state_dict(), assign=True)


@pytest.mark.parametrize('name', ['squeezenet1_0', 'squeezenet1_1', 'densenet121'])
def test_born_as_torchvision(name):
    "The last fire module takes as many channels as the class maps do and must not be taken for them."
    born = []
    for module in (nets, torchvision.models):
        torch.manual_seed(0)
        born.append(getattr(module, name)(num_classes=3).state_dict())
    assert all(torch.equal(t, born[1][n]) for n, t in born[0].items())


SMALL = [(nets.lenet5, (1, 32, 32)), (nets.squeezenet1_1, (3, 40, 52)), (nets.small_inception, (3, 17, 20)),
         (lambda k: nets.DenseNet((2, 2), 8, k), (3, 40, 33))]


@pytest.mark.parametrize('make, size', SMALL)
def test_one_class_no_image_and_other_precisions(make, size):
    net = make(1)
    for kind in (torch.float64, torch.bfloat16):
        other = copy.deepcopy(net).to(kind).eval()
        for n in (2, 0): assert other(torch.zeros(n, *size, dtype=kind)).shape == (n, 1)
    again = copy.deepcopy(net)
    again.load_state_dict(net.state_dict())
    x = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    with eval_mode(net), eval_mode(again), torch.no_grad(): assert torch.equal(net(x), again(x))


def test_building_leaves_the_random_state_to_the_caller():
    before = torch.get_rng_state()
    with torch.device('meta'): random_weights(classics.vgg11_bn())
    assert torch.equal(before, torch.get_rng_state())


def real_squeezenet():
    file = WEIGHTS/'squeezenet1_0_imagenet_torchvision.npz'
    if not os.environ.get('CNNBOOK_DATA') or not file.exists(): pytest.skip('needs CNNBOOK_DATA and the weights')
    with torch.device('meta'): net = squeezenet1_0()
    with np.load(file) as f: net.load_state_dict({k: torch.from_numpy(f[k]) for k in f.files}, assign=True)
    return net


@pytest.mark.real
def test_squeezenet_calls_daisies_by_their_name():
    net = real_squeezenet().eval()
    folder = Path(os.environ['CNNBOOK_DATA'])/'flower_photos'/'test'/'daisy'
    x = torch.stack([torch.from_numpy(np.array(Image.open(p).convert('RGB'))) for p in sorted(folder.glob('*.jpg'))])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((.485, .456, .406), (.229, .224, .225)))
    x = (x.permute(0, 3, 1, 2)/255 - mean)/std                                     # (50, 3, 224, 224)
    with torch.no_grad(): scores = net(x)
    classes = torchvision.models.SqueezeNet1_0_Weights.IMAGENET1K_V1.meta['categories']
    right = (scores.argmax(1) == classes.index('daisy')).sum().item()
    print(f'{right} of {len(x)} daisies are called daisy')
    assert len(x) == 50 and right >= 40
    torch.testing.assert_close(global_average(cam(net, x[:4])), scores[:4], atol=1e-3, rtol=1e-3)
