"""Maps by gradients: held against captum (peers), and faults 53 to 55: traces, layers that are not there, odd maps."""
import copy
import re
import warnings

import matplotlib.pyplot as plt
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from cnnbook.cifar import ClassicNet
from cnnbook.gradients import cam_layer, completeness_gap, grad_cam, guided_backprop, integrated_gradients
from cnnbook.saliency import saliency, scale_map, show_map, smooth_grad
from cnnbook.trace import no_trace


def few_steps(model, x, target=None): return integrated_gradients(model, x, target, steps=4)


def few_copies(model, x, target=None): return smooth_grad(model, x, target, n=3)


METHODS = [saliency, few_copies, guided_backprop, grad_cam, few_steps]
each_method = pytest.mark.parametrize('method', METHODS)


def small(*, act=nn.ReLU, classes=5, norm=True):
    between = [nn.BatchNorm2d(6)] if norm else []
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), *between, act(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1),
                         act(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.5), nn.Linear(8, classes))


def build(seed=0, **options):
    torch.manual_seed(seed)
    model = small(**options)
    model(torch.randn(16, 3, 12, 12))                                    # running statistics that are not 0 and 1
    return model, torch.randn(4, 3, 12, 12)


# -- captum --

def cifar():
    net = ClassicNet()
    nn.init.normal_(net.classifier.fc2.weight, std=.1)
    return net, 32, 'features.conv2'


PEERS = {'cifar': cifar,
         'resnet18': lambda: (torchvision.models.resnet18(num_classes=10), 64, 'layer2.0.conv2'),
         'vgg11': lambda: (torchvision.models.vgg11(num_classes=10, init_weights=False), 32, 'features.6')}


@pytest.fixture(scope='module', params=PEERS)
def pair(request):
    "A network, a copy for captum without ReLUs in place, images, labels and the name of a layer."
    pytest.importorskip('captum')
    torch.manual_seed(0)
    net, side, layer = PEERS[request.param]()
    apart = copy.deepcopy(net).eval()
    for m in apart.modules():
        if isinstance(m, nn.ReLU): m.inplace = False
    return net, apart, torch.randn(2, 3, side, side), torch.tensor([3, 1]), layer


def near(ours, theirs):
    theirs = theirs.detach()
    assert theirs.abs().max() > 0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours/theirs.abs().max(), theirs/theirs.abs().max(), rtol=0, atol=1e-4)   # small ones too


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', module='captum')
        yield


def test_saliency_and_smooth_grad_peers(pair):
    net, apart, x, y, _ = pair
    from captum.attr import NoiseTunnel, Saliency
    asking = x.clone().requires_grad_()
    near(saliency(net, x, y, signed=True), Saliency(apart).attribute(asking, y, abs=False))
    near(saliency(net, x, y), Saliency(apart).attribute(asking, y).amax(1))
    one, spread = asking[:1].detach().requires_grad_(), .15*(x[:1].max() - x[:1].min()).item()
    torch.manual_seed(7)
    theirs = NoiseTunnel(Saliency(apart)).attribute(one, nt_type='smoothgrad', nt_samples=6, stdevs=spread, target=3,
                                                    abs=False)
    near(smooth_grad(net, x[:1], 3, n=6, seed=7, signed=True), theirs)


def test_guided_backprop_peers(pair):
    net, apart, x, y, layer = pair
    from captum.attr import GuidedBackprop, NeuronGuidedBackprop
    asking = x.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        near(guided_backprop(net, x, y, signed=True), GuidedBackprop(apart).attribute(asking, y))
        neuron = NeuronGuidedBackprop(apart, apart.get_submodule(layer)).attribute(asking, (2, 3, 1))
    near(guided_backprop(net, x, layer=layer, neuron=(2, 3, 1), signed=True), neuron)


def test_grad_cam_and_integrated_gradients_peers(pair):
    net, apart, x, y, layer = pair
    from captum.attr import IntegratedGradients, LayerAttribution, LayerGradCam
    for name in (cam_layer(net, x), layer):
        theirs = LayerGradCam(apart, apart.get_submodule(name)).attribute(x, y, relu_attributions=True)
        theirs = LayerAttribution.interpolate(theirs, tuple(x.shape[2:]), 'bilinear')[:, 0]
        torch.testing.assert_close(grad_cam(net, x, y, name), theirs.detach(), rtol=0, atol=1e-4)
    theirs, gap = IntegratedGradients(apart).attribute(x, x*0 + .1, y, n_steps=8, return_convergence_delta=True)
    ours = integrated_gradients(net, x, y, steps=8, baseline=.1, signed=True, batch_size=6)
    near(ours, theirs)
    torch.testing.assert_close(completeness_gap(net, x, ours, y, .1), gap.float(), rtol=1e-3, atol=1e-4)


# -- what must hold for every method --

@each_method
@pytest.mark.parametrize('seed', range(3))
def test_each_image_for_itself(method, seed):
    model, x = build(seed)
    y = torch.tensor([0, 3, 3, 1])
    whole = method(model, x, y)
    assert whole.shape == (4, 12, 12) and whole.dtype == torch.float32 and not whole.requires_grad
    for k in range(4):
        torch.testing.assert_close(method(model, x[k:k + 1], int(y[k])), whole[k:k + 1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(method(model, x.flip(0), y.flip(0)).flip(0), whole, rtol=1e-4, atol=1e-6)
    predicted = model.eval()(x).argmax(1)
    torch.testing.assert_close(method(model, x), method(model, x, predicted))


@each_method
def test_linear_networks_are_known(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(24, 3))
    x, w = torch.randn(2, 2, 3, 4), model[2].weight[1].detach().view(2, 3, 4)
    if method is guided_backprop:
        with pytest.raises(ValueError, match='ReLUs to guide'): method(model, x, 1)
        return
    wanted = {few_steps: (w*x).sum(1), grad_cam: (w.mean((1, 2), True)*x).sum(1).relu()}.get(method)
    wanted = w.abs().amax(0).expand(2, 3, 4) if wanted is None else wanted
    torch.testing.assert_close(method(model, x, 1), wanted)


@each_method
def test_fault_53_nothing_is_left_behind(method):
    model, x = build(act=lambda: nn.ReLU(inplace=True))
    model[0].requires_grad_(False)
    model[1].eval()
    model[-1].weight.grad = torch.ones_like(model[-1].weight)
    wanted = method(model, x)
    asking = x.clone().requires_grad_()
    asking.grad = torch.ones_like(x)
    with no_trace(model, asking):
        for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
            with mode(): assert torch.equal(method(model, asking), wanted)
        with pytest.raises(ValueError): method(model, x, 7)
        with pytest.raises(RuntimeError): method(model, x[:, :2])
    assert (asking.grad == 1).all()


def test_fault_53_same_seed_same_map_and_no_global_draw():
    model, x = build()
    state = torch.get_rng_state()
    a, b, c = (smooth_grad(model, x, n=3, seed=s) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(state, torch.get_rng_state())


# -- fault 54 --

def test_fault_54_layers():
    model, x = build()
    assert cam_layer(model, x) == '5'                                   # 6 x 6; the pooling gives one place
    for layer, words in (('9', "3, 4, 5, 6, got '9'"), ('5x', 'layer: expected one of 5, '), (5, 'expected one')):
        with no_trace(model, x), pytest.raises(ValueError, match=re.escape(words)): grad_cam(model, x, layer=layer)
    with no_trace(model, x), pytest.raises(ValueError, match='layer: expected'):
        guided_backprop(model, x, layer='conv', neuron=(0, 0, 0))
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(432, 3))
    with no_trace(mlp, x), pytest.raises(ValueError, match='gives a map'): grad_cam(mlp, x)


@each_method
def test_fault_54_frozen_and_detached(method):
    model, x = build()
    wanted = method(model, x)
    assert torch.equal(method(model.requires_grad_(False), x), wanted)

    class Cut(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x): return self.inner(x).detach()

    class Blind(Cut):
        def forward(self, x):
            with torch.no_grad(): return self.inner(x)

    if method is grad_cam: assert torch.equal(grad_cam(Blind(model), x), wanted)     # it asks only behind its layer
    for broken in (Cut(model), *[Blind(model)]*(method is not grad_cam)):
        words = 'depend on the input' if not (method is guided_backprop and type(broken) is Blind) else 'ReLUs'
        with no_trace(broken, x), pytest.raises(ValueError, match=words): method(broken, x)


# -- fault 55 --

@each_method
@pytest.mark.parametrize('net', [small, lambda: torchvision.models.resnet18(num_classes=5)])
def test_fault_55_nothing_constant_and_black(method, net):
    torch.manual_seed(0)
    model = net()
    assert method(model, torch.zeros(0, 3, 32, 32)).shape == (0, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for x in (torch.zeros(2, 3, 32, 32), torch.full((2, 3, 32, 32), 1e30), torch.ones(2, 3, 32, 32)):
            m = scale_map(method(model, x))
            assert m.shape == (2, 32, 32) and -1 <= m.min() <= m.max() <= 1


@each_method
def test_fault_55_refusals(method):
    model, x = build()
    for bad, kind, words in ((x.mul(9).byte(), TypeError, 'uint8'), (x[0], ValueError, '(B, C, H, W)'),
                             (x.permute(0, 2, 3, 1), ValueError, 'channels last'),
                             (x*float('nan'), ValueError, 'image 0'), (x[..., :0], ValueError, 'images (B'),
                             ('x.png', TypeError, 'got str')):
        with pytest.raises(kind, match=re.escape(words)): method(model, bad)
    model[0].weight.data[0] = float('nan')
    with no_trace(model, x), pytest.raises(ValueError, match='finite'): method(model, x)


def test_fault_55_nan_activations_and_one_place():
    model, x = build(norm=False)
    with pytest.raises(ValueError, match='expected finite'): grad_cam(nn.Sequential(*model[:3], Spoil(), *model[3:]), x)
    one = grad_cam(model, x, 2, layer='5', scale=True)
    assert one.flatten(1).std(1).max() == 0 and one.isfinite().all() and set(one.unique().tolist()) <= {0., 1.}
    assert grad_cam(model, x[:, :, :1, :1].repeat(1, 1, 2, 2)).shape == (4, 2, 2)


class Spoil(nn.Module):
    def forward(self, x): return torch.where(x > x.mean(), x*float('nan'), x)


def test_fault_55_maps_are_drawn_without_warnings():
    image = torch.randint(0, 256, (3, 8, 6), dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for m in (torch.zeros(8, 6), torch.ones(8, 6), torch.randn(8, 6), torch.rand(8, 6).half()):
            for picture in (image, image/255, image[:1]): show_map(picture, m).canvas.draw()
    assert plt.get_fignums() == []
    assert scale_map(torch.full((2, 2), 1e-42)).max() <= 1 and scale_map(torch.zeros(0, 2, 2)).shape == (0, 2, 2)


# -- dtypes, and ReLUs however they are written --

@each_method
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(method, dtype):
    model, x = build()
    wanted, got = method(model, x, 2), method(copy.deepcopy(model).to(dtype), x, 2)
    assert got.dtype == torch.float32 and got.isfinite().all()
    alike = torch.corrcoef(torch.stack([wanted.flatten(), got.flatten()]))[0, 1]
    assert alike > (.99999 if dtype == torch.float64 else .97)
    assert method(copy.deepcopy(model).to(dtype), x.to(dtype), 2).dtype == torch.promote_types(dtype, torch.float32)


class Block(nn.Module):
    "A residual block whose one ReLU, given as anything callable, stands at three places."
    def __init__(self, relu):
        super().__init__()
        self.relu, self.one, self.two = relu, nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        h = self.relu(self.one(x))
        h = self.relu(h + self.two(self.relu(self.two(h))))
        return self.last(h.mean((2, 3)))


@pytest.mark.parametrize('seed', range(3))
def test_every_way_to_write_a_relu(seed):
    torch.manual_seed(seed)
    blocks = [Block(relu) for relu in (nn.ReLU(), nn.ReLU(inplace=True), F.relu, torch.relu, torch.relu_, F.relu_,
                                       torch.Tensor.relu, torch.Tensor.relu_, lambda x: F.relu(x, inplace=True))]
    for b in blocks[1:]: b.load_state_dict(blocks[0].state_dict())
    x = torch.randn(2, 3, 7, 7)
    maps = [guided_backprop(b, x, signed=True) for b in blocks]
    assert all(torch.equal(m, maps[0]) for m in maps) and not torch.equal(maps[0], saliency(blocks[0], x, signed=True))
    by_hand = guided_by_hand(blocks[0], x)
    torch.testing.assert_close(maps[0], by_hand)


class Gate(torch.autograd.Function):
    "The guided rule, written as a function of its own."
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, g): return g.clamp(min=0)*(ctx.saved_tensors[0] > 0)


def guided_by_hand(block, x):
    twin, x = Block(Gate.apply), x.clone().requires_grad_()
    twin.load_state_dict(block.state_dict())
    scores = twin(x)
    return torch.autograd.grad(scores.amax(1).sum(), x)[0]


def test_completeness_in_double():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(600, 3)).double()      # smooth
    x = torch.randn(4, 3, 12, 12).double()
    for baseline in (None, .3, torch.rand(3, 1, 1), torch.rand(4, 3, 12, 12)):
        maps = [integrated_gradients(model, x, 1, n, baseline) for n in (1, 4, 40)]
        gaps = [completeness_gap(model, x, m, 1, baseline).abs().max() for m in maps]
        assert gaps[0] > 1e-3 > gaps[1] and gaps[2] < 1e-9 and maps[2].dtype == torch.float64
