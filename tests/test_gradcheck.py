"""What chapters 10da and 10e do not say in a cell: random functions against torch, whole networks, other models."""
import copy
import math

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from cnnbook.gradcheck import gradient_check, parameter_check
from cnnbook.slopes import centred, compare_slope, relative_error
from cnnbook.trace import no_trace


class Planted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad): return ctx.factor*grad, None


class Wrong(nn.Module):
    def __init__(self, factor=-1.):
        super().__init__()
        self.factor = factor

    def forward(self, x): return Planted.apply(x, self.factor)


LOSS = nn.CrossEntropyLoss()


def resnet():
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=10), torch.randn(1, 3, 32, 32), torch.tensor([3])


def test_sound_resnet18_passes_and_keeps_every_bit():
    model, x, y = resnet()
    model(torch.randn(2, 3, 32, 32)).sum().backward()                        # gradients that must stay
    with no_trace(model, x): found = parameter_check(model, x, y, LOSS)
    assert found.passed and not found.without and len(found) == len(list(model.parameters()))


def test_wrong_sign_in_the_middle_of_resnet18_is_found():
    model, x, y = resnet()
    model.layer4[1].bn1 = nn.Sequential(model.layer4[1].bn1, Wrong())
    for p in model.parameters(): p.requires_grad_(False)
    for part in (model.layer3[0].conv1, model.layer4[1], model.fc): part.requires_grad_()
    found = parameter_check(model, x, y, LOSS)
    right = {'layer4.1.conv2.weight', 'layer4.1.bn2.weight', 'layer4.1.bn2.bias', 'fc.weight', 'fc.bias'}
    assert found.wrong[-1] == 'layer4.1.bn1.0.bias' and right.isdisjoint(found.wrong)
    assert {'layer3.0.conv1.weight', 'layer4.1.conv1.weight'} <= set(found.wrong)
    assert 'conv1.weight' in found.without and 'layer4.1.bn1.0.bias' in repr(found)


@pytest.mark.parametrize('seed', range(5))
def test_random_functions_against_torch(seed):
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    fn = lambda x: ((x @ a).tanh() @ b).square().sum() + (x*x).exp().mean()
    x = torch.randn(3, 4, generator=g)
    for factor in (1., 1.01, -1., 0.):
        f = lambda x, k=factor: fn(Planted.apply(x, k))
        try: theirs = torch.autograd.gradcheck(f, x.double().requires_grad_())
        except RuntimeError: theirs = False
        assert gradient_check(f, x).passed == theirs == (factor == 1)


def test_slopes_of_random_polynomials_and_kinks():
    g = torch.Generator().manual_seed(0)
    for c in torch.randn(50, 4, generator=g, dtype=torch.float64).tolist():
        f = lambda t, c=c: c[0] + c[1]*t + c[2]*t*t + c[3]*t**3
        assert abs(centred(f, 1e-3) - c[1] - 1e-6*c[3]) < 1e-9
        assert compare_slope(f, c[1])[1] < 1e-6 and not compare_slope(f, c[1])[2]
        kinked = lambda t, c=c, f=f: f(t) + abs(c[3]*t)
        low, high = sorted((c[1] - c[3], c[1] + c[3]))
        assert compare_slope(kinked, low)[2] and compare_slope(kinked, high)[2]
        assert not compare_slope(kinked, high + .1)[2] and not compare_slope(kinked, low - .1)[2]
    assert relative_error(math.inf, 1) != relative_error(math.inf, 1)        # NaN: never within a tolerance


def test_an_error_near_a_kink_is_not_excused():
    for distance in (0., 1e-9, 1e-7, 1e-6, 1e-5, 1e-3):
        f = lambda t, d=distance: max(t + d, 0.)
        assert not compare_slope(f, -1.)[2] and compare_slope(f, -1.)[1] > 1
    assert compare_slope(lambda t: max(t + 1e-6, 0.), .5)[2] is False


@pytest.mark.parametrize('at', range(4))
def test_a_gradient_of_nan_or_infinity_never_passes(at):
    x = torch.ones(4)
    for bad in (math.nan, math.inf, -math.inf):
        factor = torch.ones(4, dtype=torch.float64)
        factor[at] = bad
        found = gradient_check(lambda x, k=factor: Planted.apply(x, k).square().sum(), x)
        assert not found.passed and math.isinf(found.worst) and found.kinks == 0


def test_inputs_of_every_kind_are_left_alone():
    x = torch.randint(255, (2, 3, 4, 4), dtype=torch.uint8)
    was = x.clone()
    assert gradient_check(lambda x: x.square().mean(), x).passed and torch.equal(x, was)
    strided = torch.randn(4, 6)[:, ::2].t()
    with torch.no_grad(): assert gradient_check(lambda x: x.exp().sum(), strided).passed
    with torch.inference_mode(): inner = torch.randn(3)
    with torch.inference_mode(): assert gradient_check(lambda x: x.sin().sum(), inner).passed
    assert gradient_check(lambda x: x*2, torch.tensor(3.)).entries[0][:2] == ((), 2.)


@pytest.mark.parametrize('make', [
    lambda: nn.Sequential(nn.Flatten(), torch.nn.utils.parametrizations.spectral_norm(nn.Linear(48, 10))),
    lambda: nn.Sequential(nn.Flatten(), torch.nn.utils.parametrizations.weight_norm(nn.Linear(48, 10))),
    lambda: nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten(), nn.Linear(4, 10)),
    lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(10)),
])
def test_other_networks(make):
    torch.manual_seed(0)
    model, x, y = make(), torch.randn(2, 3, 4, 4), torch.tensor([1, 2])
    with no_trace(model, x): assert parameter_check(model, x, y, LOSS).passed


def test_a_kept_output_and_tied_weights():
    class Keeps(nn.Linear):
        def forward(self, x):
            self.kept = super().forward(x)
            return self.kept

    model = nn.Sequential(nn.Flatten(), Keeps(10, 10), nn.Tanh(), nn.Linear(10, 10))
    model[3].weight = model[1].weight
    x, y = torch.randn(3, 10), torch.tensor([0, 1, 2])
    model(x)
    with no_trace(model, x): found = parameter_check(model, x, y, LOSS)
    assert found.passed and list(found) == ['1.weight', '1.bias', '3.bias']


def test_fault_53_an_error_in_the_pass_leaves_no_trace():
    class Fails(nn.Module):
        def forward(self, x):
            torch.rand(1)
            raise KeyError('planted')

    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Fails())
    with no_trace(model), pytest.raises(KeyError): parameter_check(model, torch.ones(2, 4), torch.tensor([0, 1]), LOSS)
    with no_trace(model), pytest.raises(KeyError): gradient_check(lambda x: model[2](x), torch.ones(2, 4))


def test_the_loss_is_copied_and_its_weights_are_float64():
    loss = nn.CrossEntropyLoss(weight=torch.rand(10))
    was = copy.deepcopy(loss.state_dict())
    model = nn.Sequential(nn.Linear(4, 10), nn.Dropout(.5))
    assert parameter_check(model, torch.randn(3, 4), torch.tensor([0, 1, 2]), loss).passed
    assert loss.weight.dtype == torch.float32 and torch.equal(loss.weight, was['weight'])


def test_dropout_that_never_sleeps_has_a_fixed_mask():
    class Always(nn.Module):
        def forward(self, x): return F.dropout(x, .5, training=True)

    model, x, y = nn.Sequential(nn.Linear(4, 9), Always(), nn.Linear(9, 3)), torch.randn(3, 4), torch.tensor([0, 1, 2])
    with no_trace(model): assert parameter_check(model, x, y, LOSS).passed
