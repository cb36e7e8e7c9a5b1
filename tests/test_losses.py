"""What the cells do not say of `cnnbook.losses` and `losses_by_hand`: random rounds against torch, odd inputs."""
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import sigmoid_focal_loss

from cnnbook import losses as L
from cnnbook import losses_by_hand as H
from cnnbook.losses import explain_loss

CHECKS = [H.check_best_gap, H.check_smooth_rows, H.check_log_sigmoid, H.check_counted_mean,
          L.check_double_floor, L.check_sigmoid_floor, L.check_column_labels,
          L.check_kind_of]
ONES = [nn.CrossEntropyLoss(), nn.NLLLoss(), nn.BCELoss(), nn.BCEWithLogitsLoss(), nn.KLDivLoss(reduction='batchmean')]


def same(ours, theirs, x, *rest):
    got = []
    for f in (ours, theirs):
        leaf = x.detach().clone().requires_grad_()
        value = f(leaf, *rest)
        got.append((value, *torch.autograd.grad(value.sum(), leaf)))
    tol = 1e-6*max(1., x.abs().max().item())
    torch.testing.assert_close(*got, atol=tol, rtol=1e-6)


@pytest.mark.parametrize('seed', range(20))
def test_random_rounds_equal_torch(seed):
    g = torch.Generator().manual_seed(seed)
    k, places = int(torch.randint(2, 7, (1,), generator=g)), [(), (3,), (2, 3)][seed % 3]
    s = torch.randn(5, k, *places, generator=g, dtype=torch.float64)*[.1, 1, 30, 1e4][seed % 4]
    y = torch.randint(0, k, (5, *places), generator=g)
    ignored = [-100, 1][seed % 2]
    y[0] = ignored
    y[1] = 0
    options = dict(weight=torch.rand(k, generator=g, dtype=torch.float64) + .1 if seed % 5 else None,
                   ignore_index=ignored, reduction=['mean', 'sum', 'none'][seed % 3])
    same(partial(L.nll, **options), partial(F.nll_loss, **options), F.log_softmax(s, 1), y)
    for eps in (0., .1, .7):
        both = (partial(f, label_smoothing=eps, **options) for f in (L.cross_entropy, F.cross_entropy))
        same(*both, s, y)
    t = torch.rand(s.shape, generator=g, dtype=torch.float64)
    pos = torch.rand(s.shape, generator=g, dtype=torch.float64) + .5
    same(partial(L.bce_with_logits, pos_weight=pos), partial(F.binary_cross_entropy_with_logits, pos_weight=pos), s, t)
    same(partial(L.focal, gamma=2.), partial(sigmoid_focal_loss, reduction='mean'), s, (t > .5).double())
    if not places: same(L.hinge, F.multi_margin_loss, s, y.clamp(min=0))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_stays_finite_and_near(dtype):
    s = torch.tensor([[1e4, 0, -1e4], [3, 2, 1], [-1e4, -1e4, -1e4]]).to(dtype)
    y = torch.tensor([2, 0, 1])
    assert L.log_softmax(s, 1).isfinite().all() and L.cross_entropy(s, y).dtype == dtype
    torch.testing.assert_close(L.softmax(s, 1).float(), s.float().softmax(1), atol=.01, rtol=.01)
    torch.testing.assert_close(L.bce_with_logits(s, (s > 0).to(dtype)).float(),
                               F.binary_cross_entropy_with_logits(s.float(), (s > 0).float()), atol=.02, rtol=.02)


def test_ruled_out_classes_and_weights_of_zero():
    s = torch.tensor([[1., -torch.inf, 2], [0., -torch.inf, 1]])
    assert L.cross_entropy(s, torch.tensor([0, 2])).isclose(F.cross_entropy(s, torch.tensor([0, 2])))
    assert L.cross_entropy(s, torch.tensor([1, 0])) == torch.inf
    assert L.cross_entropy(s, torch.tensor([1, -100]), weight=torch.tensor([1., 0, 1])) == 0
    assert L.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]), ignore_index=1) > 0


def test_gradients_of_gradients():
    z = torch.tensor([-2., .3, 4], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0., 1, 1], dtype=torch.float64)
    for f in (L.bce_with_logits, L.focal): assert torch.autograd.gradgradcheck(lambda z, f=f: f(z, t), z)
    assert torch.autograd.gradgradcheck(lambda z: L.bce(torch.sigmoid(z), t), z)
    rows = torch.randn(3, 4, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradgradcheck(lambda s: L.cross_entropy(s, torch.tensor([0, 3, 1])), rows)


@pytest.mark.parametrize('shape', [(8, 5), (8, 5, 3), (4, 2, 3, 3)])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_kinds_are_told_on_every_shape_and_dtype(shape, dtype):
    s = 2*torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.zeros(shape[0], *shape[2:]).long()
    kinds = {'logits': s, 'probabilities': s.softmax(1), 'log-probabilities': s.log_softmax(1)}
    for kind, o in kinds.items():
        said = explain_loss(nn.CrossEntropyLoss(), o.to(dtype), y)
        assert (said.looks, said.target, said.takes) == (kind, '', kind != 'probabilities')


@pytest.mark.parametrize('loss', ONES, ids=lambda loss: type(loss).__name__)
def test_a_loss_that_fits_runs_and_a_target_that_does_not_is_named(loss):
    g = torch.Generator().manual_seed(1)
    s = 3*torch.randn(9, 4, generator=g)
    outputs = [s, s.softmax(1), s.log_softmax(1), s.sigmoid(), s.relu(), -s.abs()]
    y = torch.randint(0, 4, (9,), generator=g)
    one_hot = F.one_hot(y, 4).float()
    for o in outputs:
        for t in (y, y.int(), y.float(), y[:, None], one_hot, one_hot.long(), one_hot[:5], y + 1):
            said = explain_loss(loss, o, t)
            if said.takes and not said.target: assert loss(o, t).isfinite()
            assert repr(said).count('\n') == 2 and (said.takes is not False or said.cure)


def test_classes_functions_partials_and_half_made_losses():
    s, y = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])
    class Mine(nn.CrossEntropyLoss): pass
    for loss in (Mine(), partial(F.cross_entropy, label_smoothing=.1), L.cross_entropy):
        assert explain_loss(loss, s, y).loss == 'CrossEntropyLoss'
    with pytest.raises(TypeError, match='loss: expected one of Cross'): explain_loss(nn.CrossEntropyLoss, s, y)
    with pytest.raises(ValueError, match='output: expected floats'): explain_loss(nn.NLLLoss(), s[:0], y[:0])
    assert 'batchmean' in explain_loss(nn.KLDivLoss(), s.log_softmax(1), s.softmax(1)).cure
    assert 'log_target' in explain_loss(nn.KLDivLoss(reduction='sum'), s.log_softmax(1), s.log_softmax(1)).target
    assert explain_loss(nn.KLDivLoss(reduction='sum', log_target=True), s.log_softmax(1), s.log_softmax(1)).target == ''


@pytest.mark.parametrize('check', CHECKS)
def test_checks_survive_nonsense(check):
    for nonsense in ('text', 3.5, lambda *a: None, [], torch.zeros(2)):
        assert not check.judge(nonsense), nonsense
