"""Chapter 14b: the large nets against torchvision's, and published weights on real data."""
import math
import os
import pickle
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from cnnbook import resnet
from cnnbook.hooks import eval_mode

BESIDE = Path(__file__).resolve().parents[2]/'shared'/'datasets'/'weights'   # where the real data sets lie packed
PUBLISHED = Path(os.environ.get('CNNBOOK_WEIGHTS') or BESIDE)/'resnet20-12fca82f.th'


def pair(name, seed=0, **options):
    "Ours and torchvision's with the same weights and statistics, none of them 0 or 1."
    ours, theirs = getattr(resnet, name)(**options), getattr(torchvision.models, name)(**options)
    g = torch.Generator().manual_seed(seed)
    for t in theirs.state_dict().values():
        if t.ndim == 1: t.uniform_(.5, 1.5, generator=g)
    for m in theirs.modules():                                       # sums over 33 blocks stay small
        if isinstance(m, (resnet.BasicBlock, torchvision.models.resnet.BasicBlock)): m.bn2.weight.data.mul_(.3)
        if isinstance(m, torchvision.models.resnet.Bottleneck): m.bn3.weight.data.mul_(.3)
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs.eval()


DILATED = [False, True, True]
CASES = [('resnet18', {}), ('resnet34', {}), ('resnet50', {}), ('resnet101', {}),
         ('resnet50', {'replace_stride_with_dilation': [False, False, True]}),
         ('resnet50', {'replace_stride_with_dilation': [True, True, True]}),
         ('resnet101', {'replace_stride_with_dilation': DILATED})]


@pytest.mark.parametrize('name,options', CASES)
def test_equal_to_torchvision(name, options):
    torch.manual_seed(0)
    ours, theirs = pair(name, num_classes=9, **options)
    x = torch.randn(2, 3, 65, 49)                                    # odd sizes: every stride rounds up
    with torch.no_grad(): torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_gradients_equal_torchvision():
    torch.manual_seed(0)
    ours, theirs = (m.train() for m in pair('resnet18', num_classes=3))
    x, y = torch.randn(4, 3, 40, 40), torch.tensor([0, 1, 2, 0])
    for m in (ours, theirs): nn.functional.cross_entropy(m(x), y).backward()
    for (n, p), q in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=n)
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers()))


def test_relatives_come_for_free():
    "ResNeXt and the wide net are ResNets with other groups and widths."
    torch.manual_seed(0)
    for name, options in (('resnext50_32x4d', {'groups': 32, 'width_per_group': 4}),
                          ('wide_resnet50_2', {'width_per_group': 128})):
        theirs = getattr(torchvision.models, name)(num_classes=2).eval()
        ours = resnet.resnet50(2, **options).eval()
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(1, 3, 33, 33)
        with torch.no_grad(): torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', ['resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152'])
def test_same_names_and_refusals(name):
    with torch.device('meta'):
        ours, theirs = getattr(resnet, name)(), getattr(torchvision.models, name)()
    names = lambda net: [(n, t.shape) for n, t in net.state_dict().items()]
    assert names(ours) == names(theirs)
    for make in (getattr(resnet, name), getattr(torchvision.models, name)):
        with pytest.raises(ValueError): make(replace_stride_with_dilation=[True])


@pytest.mark.parametrize('make', [resnet.resnet20, resnet.resnet18])
def test_born_as_torchvision_and_survives_pickling(make):
    torch.manual_seed(0)
    net = make(num_classes=4)
    again = pickle.loads(pickle.dumps(net))
    x = torch.randn(2, 3, 32, 32)
    with eval_mode(net), eval_mode(again), torch.no_grad(): assert torch.equal(net(x), again(x))
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            want = math.sqrt(2/(m.out_channels*m.kernel_size[0]**2))
            assert abs(m.weight.std().item()/want - 1) < .15


def test_zero_init_residual_as_torchvision():
    for name in ('resnet18', 'resnet50'):
        made = []
        for module in (resnet, torchvision.models):
            torch.manual_seed(3)
            made.append(getattr(module, name)(num_classes=2, zero_init_residual=True).state_dict())
        assert all(torch.equal(t, made[1][n]) for n, t in made[0].items())


@pytest.mark.real
def test_published_resnet20_on_cifar10():
    "91.73 % is what its author reports."
    if not os.environ.get('CNNBOOK_DATA'): pytest.skip('CNNBOOK_DATA is not set')
    if not PUBLISHED.exists(): pytest.skip(f'CNNBOOK_WEIGHTS: expected a folder with {PUBLISHED.name}')
    from cnnbook.data import load
    test = load('cifar10', train=False, download=False)
    net = resnet.resnet20()
    state = torch.load(PUBLISHED, map_location='cpu', weights_only=True)['state_dict']
    net.load_state_dict(resnet.tidy_names(state, {'linear': 'fc'}))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((.485, .456, .406), (.229, .224, .225)))
    with eval_mode(net), torch.no_grad():
        hits = sum((net((x.float()/255 - mean)/std).argmax(1) == y).sum().item()
                   for x, y in zip(test.x.split(500), test.y.split(500)))
    print(f'\nResNet-20, published weights: {hits/100:.2f} % of {len(test.y)} test images')
    assert len(test.y) == 10_000 and hits == pytest.approx(9173, abs=5)
