"""Features of networks that other people wrote: torchvision's families, and timm's where it is installed."""
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from cnnbook.features import FeaturePyramid, forward_features, penultimate_features, pooled_features, pyramid
from cnnbook.hooks import eval_mode
from cnnbook.trace import no_trace

# channels of the map that enters the pooling, length of what the last linear layer takes, channels of the stages
FAMILIES = {
    'alexnet': (256, 4096, [64, 192, 256, 256]),
    'convnext_tiny': (768, 768, [96, 192, 384, 768]),
    'densenet121': (1024, 1024, [64, 256, 512, 1024, 1024]),
    'googlenet': (1024, 1024, [64, 192, 480, 832, 1024]),
    'mobilenet_v3_small': (576, 1024, [16, 16, 24, 48, 576]),
    'resnet50': (2048, 2048, [64, 256, 512, 1024, 2048]),
    'shufflenet_v2_x0_5': (1024, 1024, [24, 24, 48, 96, 1024]),
    'squeezenet1_1': (1000, 1000, [64, 128, 256, 1000]),          # it pools its scores
    'vgg11': (512, 4096, [64, 128, 256, 512, 512, 512]),
}
LEVELS = [(64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)]


def on_meta(build, *args, **options):
    with torch.device('meta'): return build(*args, **options)


def image(side): return torch.empty(1, 3, side, side, device='meta')


def shape(out): return tuple(out.shape[1:])


class Wrapped(nn.Module):
    "A network inside another: no method forward_features to ask, so it has to be watched."
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x): return self.inner(x)


def family(name):
    options = {'init_weights': False} if name == 'googlenet' else {}
    return on_meta(torchvision.models.get_model, name, weights=None, **options)


@pytest.mark.parametrize('name', FAMILIES)
def test_families_of_torchvision(name):
    net, (channels, length, stages) = family(name), FAMILIES[name]
    f = forward_features(net, image(224))
    assert f.shape[1] == channels and pooled_features(net, image(224)).shape == (1, channels)
    assert penultimate_features(net, image(224)).shape == (1, length)
    found = pyramid(net)
    assert found.channels == stages and found[-1].shape == shape(f)


def test_attention_has_no_pyramid_of_maps():
    vit = on_meta(torchvision.models.vit_b_32)
    assert penultimate_features(vit, image(224)).shape == (1, 768)
    with pytest.raises(ValueError, match='pools or flattens a map'): forward_features(vit, image(224))
    swin = on_meta(torchvision.models.swin_t)                            # its maps are (B, H, W, C) up to the pooling
    assert forward_features(swin, image(224)).shape == (1, 768, 7, 7)
    with pytest.raises(ValueError, match='name layers'): pyramid(swin)


@pytest.mark.parametrize('name', ['densenet121', 'shufflenet_v2_x0_5'])
def test_pyramid_module_equals_traced_graph(name):
    torch.manual_seed(0)
    net, x = torchvision.models.get_model(name, num_classes=5).eval(), torch.randn(2, 3, 64, 96)
    levels = FeaturePyramid(net, input_size=(3, 64, 96))
    names = levels.stages.names[:-1 if name == 'densenet121' else None]    # there a ReLU works in place on the last map
    with no_trace(net, x), torch.no_grad(): maps = levels(x)
    with torch.no_grad(): traced = create_feature_extractor(net, names)(x)
    for n, m in zip(names, maps): torch.testing.assert_close(m, traced[n])


def test_looking_leaves_no_trace_and_ends_after_errors():
    net, x = torchvision.models.resnet18(num_classes=3).train(), torch.randn(2, 3, 64, 64)
    with no_trace(net, x):
        for look in (forward_features, pooled_features, penultimate_features): look(net, x)
        pyramid(net, (3, 64, 64))
        for look in (forward_features, penultimate_features):
            with pytest.raises(RuntimeError): look(net, x[:, :2])
        with pytest.raises(RuntimeError): pyramid(net, (2, 64, 64))
    levels = FeaturePyramid(net, ['layer1'], (3, 64, 64))
    with no_trace(net):
        with pytest.raises(RuntimeError): levels(x[:, :2])


def test_gates_are_not_the_end():
    class Gated(nn.Module):
        def __init__(self, last):
            super().__init__()
            self.conv, self.gate, self.last = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4, 4), last

        def forward(self, x):
            x = self.conv(x)
            y = x*self.gate(x.mean((2, 3))).sigmoid()[:, :, None, None]
            self.saw = y
            return self.last(y)

    x = torch.randn(2, 3, 16, 16)
    for last in (nn.Flatten(), nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.AvgPool2d(8), nn.Flatten())):
        net = Gated(last)
        assert torch.equal(forward_features(net, x), net.saw)


def test_table_of_timm_peers():
    timm = pytest.importorskip('timm')
    make = lambda name, **options: on_meta(timm.create_model, name, **options).eval()
    with torch.no_grad():
        assert shape(make('xception41').forward_features(image(299))) == (2048, 10, 10)
        assert shape(make('resnet50').forward_features(image(224))) == (2048, 7, 7)
        assert shape(make('resnet50', num_classes=0, global_pool='')(image(224))) == (2048, 7, 7)
        assert shape(make('resnet50', num_classes=0)(image(224))) == (2048,)
        dense, ese = make('densenet121'), make('ese_vovnet19b_dw')
        on_meta(dense.reset_classifier, 0, '')
        on_meta(ese.reset_classifier, 0)
        assert (shape(dense(image(224))), shape(ese(image(224)))) == ((1024, 7, 7), (1024,))
        assert [shape(m) for m in make('resnest26d', features_only=True)(image(224))] == [(c, s, s) for c, s in LEVELS]
        regnet = make('regnety_032', features_only=True)
        assert regnet.feature_info.channels() == [m.shape[1] for m in regnet(image(224))] == [32, 72, 216, 576, 1512]
        eca = make('ecaresnet101d', features_only=True, output_stride=8, out_indices=(2, 4))
        assert (eca.feature_info.channels(), eca.feature_info.reduction()) == ([512, 2048], [8, 8])
        assert [m.shape[2:] for m in eca(image(320))] == [(40, 40)]*2


def test_same_numbers_by_our_functions_peers():
    timm = pytest.importorskip('timm')
    make = lambda name, **options: on_meta(timm.create_model, name, **options)
    assert shape(forward_features(Wrapped(make('xception41')), image(299))) == (2048, 10, 10)
    for name, length in (('resnet50', 2048), ('densenet121', 1024), ('ese_vovnet19b_dw', 1024)):
        net = make(name)
        assert shape(forward_features(Wrapped(net), image(224))) == (length, 7, 7)
        assert shape(penultimate_features(net, image(224))) == (length,)
    assert [(s.channels, s.shape[1]) for s in pyramid(make('resnest26d'))] == LEVELS
    assert pyramid(make('regnety_032')).channels == [32, 72, 216, 576, 1512]
    eca = pyramid(make('ecaresnet101d', output_stride=8), (3, 320, 320), ['layer2', 'layer4'])
    assert (eca.channels, eca.reductions, [s.shape[1:] for s in eca]) == ([512, 2048], [8, 8], [(40, 40)]*2)


@pytest.mark.parametrize('name', ['resnet10t', 'mobilenetv3_small_050', 'regnetz_005'])
def test_watching_equals_asking_peers(name):
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    net, x = timm.create_model(name, num_classes=5), torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(forward_features(Wrapped(net), x), forward_features(net, x))
    with eval_mode(net), torch.no_grad():
        wanted = net.forward_head(net.forward_features(x), pre_logits=True)
    torch.testing.assert_close(penultimate_features(net, x), wanted)


@pytest.mark.parametrize('side', [64, 65])
def test_reductions_equal_feature_info_peers(side):
    timm = pytest.importorskip('timm')
    for name in ('resnet18', 'regnety_002'):
        info = on_meta(timm.create_model, name, features_only=True).feature_info
        found = pyramid(on_meta(timm.create_model, name), (3, side, side))
        assert (found.channels, found.reductions) == (info.channels(), info.reduction())


def test_channels_last_maps_are_refused_peers():
    timm = pytest.importorskip('timm')
    swin = on_meta(timm.create_model, 'swin_tiny_patch4_window7_224')
    with pytest.raises(ValueError, match=r'features are \(B, C, h, w\)'): pooled_features(swin, image(224))
