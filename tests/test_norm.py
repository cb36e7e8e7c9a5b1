"""What the chapter's cells do not say of `cnnbook.norm`: random rounds against PyTorch, odd models, whole runs."""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cnnbook import norm as N
from cnnbook.trainer import Trainer

CHECKS = [N.check_conv_norm_count, N.check_running_pair, N.check_folded, N.check_group_means, N.check_awake_norms]
LAYERS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@pytest.mark.parametrize('seed', range(12))
def test_batch_norm_equals_torch_in_every_shape_and_mode(seed):
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: torch.randint(low, high, (), generator=g).item()
    c, affine, momentum = draw(1, 6), seed % 3 > 0, (None, .003, .1, 1.)[seed % 4]
    shape = (draw(2, 7), c, *(draw(1, 5) for _ in range(seed % 4)))
    theirs = LAYERS[len(shape)](c, eps=10.**-draw(1, 6), momentum=momentum, affine=affine)
    ours = N.BatchNorm(c, theirs.eps, momentum, affine)
    ours.load_state_dict(theirs.state_dict())
    for mode in (True, True, False, True):
        x = (2*torch.randn(shape, generator=g) + 1).requires_grad_()
        up = torch.randn(shape, generator=g)
        out, want = ours.train(mode)(x), theirs.train(mode)(x)
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
        grads = (torch.autograd.grad(o, (x, *m.parameters()), up) for o, m in ((out, ours), (want, theirs)))
        for a, b in zip(*grads): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    for (name, a), (other, b) in zip(ours.state_dict().items(), theirs.state_dict().items()):
        assert name == other and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_second_gradients_and_a_saved_layer():
    layer = N.BatchNorm(2).double()
    x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x), x)
    again = N.BatchNorm(2).double()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.eval()(x), layer.eval()(x))


def test_a_refused_batch_leaves_the_statistics_alone():
    layer = N.BatchNorm(3)
    for bad in (torch.ones(1, 3), torch.ones(4, 2), torch.ones(3), torch.ones(0, 3)):
        with pytest.raises(ValueError): layer(bad)
    assert layer.num_batches_tracked == 0 and not layer.running_mean.any() and (layer.running_var == 1).all()


@pytest.mark.parametrize('seed', range(8))
def test_relatives_equal_torch(seed):
    g = torch.Generator().manual_seed(seed)
    groups, per, places = (torch.randint(1, 5, (), generator=g).item() for _ in range(3))
    x = torch.randn(3, groups*per, places + 1, places, generator=g)
    w, b = torch.randn(2, groups*per, generator=g)
    near = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    near(N.group_norm(x, groups, w, b, 1e-3), F.group_norm(x, groups, w, b, 1e-3))
    last = x.shape[-2:]
    w, b = torch.randn(2, *last, generator=g)
    near(N.layer_norm(x, last, w, b, 1e-3), F.layer_norm(x, last, w, b, 1e-3))
    near(N.group_norm(x.transpose(2, 3), groups), F.group_norm(x.transpose(2, 3), groups))


def net():
    torch.manual_seed(0)
    body = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*body, nn.BatchNorm1d(64), nn.Linear(64, 2))


@pytest.mark.parametrize('optimizer', [torch.optim.SGD, torch.optim.AdamW])
def test_a_frozen_norm_survives_a_whole_run_and_an_optimizer_made_before(optimizer):
    model = net()
    data = [(torch.randn(8, 1, 6, 6), torch.arange(8) % 2) for _ in range(4)]
    optimizer = optimizer(model.parameters(), lr=.1, weight_decay=.1)
    F.cross_entropy(model(data[0][0]), data[0][1]).backward()        # gradients are there when it is frozen
    was = copy.deepcopy(model.state_dict())
    N.freeze_norm(model)
    Trainer(max_epochs=3, enable_progress_bar=False).fit(model, data, data, optimizer, nn.CrossEntropyLoss())
    now = model.state_dict()
    assert all(torch.equal(was[k], now[k]) for k in was if k[0] in '14')
    assert not torch.equal(was['0.weight'], now['0.weight'])


def test_checkpoints_fit_both_ways():
    model, frozen = net(), N.freeze_norm(net())
    model(torch.randn(8, 1, 6, 6))
    frozen.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(3, 1, 6, 6)
    torch.testing.assert_close(frozen.train()(x), copy.deepcopy(model).eval()(x))
    model.load_state_dict(frozen.state_dict(), strict=True)


def test_a_shared_norm_stays_shared():
    norm = nn.BatchNorm1d(3)
    model = N.freeze_norm(nn.Sequential(norm, nn.Linear(3, 3), norm))
    assert model[0] is model[2] and isinstance(model[0], N.FrozenNorm)


def test_a_norm_that_cannot_be_frozen_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)))
    with pytest.raises(ValueError, match='1.0: expected running statistics, got none'): N.freeze_norm(model)
    assert type(model[0]) is nn.BatchNorm1d and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('kind, other, shape', [(nn.Conv1d, nn.BatchNorm1d, (4, 6, 9)),
                                                (nn.Conv2d, nn.BatchNorm2d, (4, 6, 7, 7)),
                                                (nn.Conv3d, nn.BatchNorm3d, (4, 6, 5, 5, 5))])
def test_folding_in_every_dimension(kind, other, shape, bias, affine):
    torch.manual_seed(0)
    layer, norm = kind(6, 4, 3, padding=1, groups=2, bias=bias), other(4, affine=affine)
    if affine: nn.init.normal_(norm.weight); nn.init.normal_(norm.bias)
    x = torch.randn(shape)
    for _ in range(5): norm(layer(x + 1))
    was = copy.deepcopy(layer.state_dict())
    torch.testing.assert_close(N.fold_norm(layer, norm)(x), norm.eval()(layer(x)), rtol=0, atol=1e-5)
    torch.testing.assert_close(N.fold_norm(layer, N.FrozenNorm(norm))(x), norm(layer(x)), rtol=0, atol=1e-5)
    assert all(torch.equal(was[k], v) for k, v in layer.state_dict().items()) and (layer.bias is None) != bias


def test_a_transposed_convolution_is_refused():       # its channels out are axis 1 of the kernel
    with pytest.raises(TypeError, match='ConvTranspose2d'): N.fold_norm(nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4))


@pytest.mark.parametrize('check', CHECKS, ids=lambda c: c.__name__)
def test_checks_stay_calm_with_odd_answers(check):
    for odd in (3, 'text', lambda *_: None, lambda *_: torch.zeros(7)): assert not check.judge(odd)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_beside_float32_statistics_keeps_its_dtype(dtype):
    "What autocast does: activations in half precision, the layer's own numbers in float32."
    torch.manual_seed(0)
    x = (3*torch.randn(16, 4, 3, 3) + 1).to(dtype)
    ours, theirs = N.BatchNorm(4), nn.BatchNorm2d(4)
    for mode in (True, False):
        out = ours.train(mode)(x)
        assert out.dtype == dtype and ours.running_var.dtype == torch.float32
        torch.testing.assert_close(out, theirs.train(mode)(x), rtol=.02, atol=.02)
    frozen = N.FrozenNorm(theirs)
    assert frozen(x).dtype == dtype and N.group_norm(x, 2).dtype == dtype
    layer = nn.Conv2d(3, 4, 1, bias=False).to(dtype)
    folded = N.fold_norm(layer, frozen)
    assert folded.bias.dtype == folded.weight.dtype == dtype
