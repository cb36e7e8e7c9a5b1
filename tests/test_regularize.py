"""What the chapter's cells do not say of `cnnbook.regularize`: random rounds against PyTorch, odd models."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cnnbook import regularize as R
from cnnbook.held import decay_groups
from cnnbook.trace import no_trace

CHECKS = [R.check_l2_gradient, R.check_inverted, R.check_decayed, R.check_dropped_variance, R.check_mean_over_masks]


@pytest.mark.parametrize('seed', range(10))
def test_dropout_equals_torch_bit_for_bit_with_its_mask(seed):
    g = torch.Generator().manual_seed(seed)
    x, p = torch.randn(7, 5, 6, 4, generator=g, requires_grad=True), torch.rand((), generator=g).item()
    for theirs in (F.dropout, F.dropout2d):
        torch.manual_seed(seed)
        mask = (theirs(torch.ones_like(x), p) != 0).float()
        torch.manual_seed(seed)
        want, got = theirs(x, p), R.dropout(x, p, mask=mask)
        assert torch.equal(want, got)
        assert torch.equal(*(torch.autograd.grad(t.square().sum(), x)[0] for t in (want, got)))


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_shape_are_kept(dtype):
    x = torch.ones(3, 4, 5, dtype=dtype)
    for channels in (False, True):
        out = R.Dropout(.5, channels)(x)
        assert out.dtype == dtype and out.shape == x.shape and set(out.unique().tolist()) <= {0., 2.}


def test_a_bool_mask_scales_in_the_precision_of_the_input():
    x, mask = torch.ones(4, dtype=torch.float64), torch.tensor([True, False, True, True])
    assert R.dropout(x, .9, mask=mask).tolist() == [1/(1 - .9), 0, 1/(1 - .9), 1/(1 - .9)]


@pytest.mark.parametrize('p', [0., .1, .3, .5, .9])
@pytest.mark.parametrize('channels', [False, True])
def test_mean_over_masks_is_the_input(p, channels):
    g, x = torch.Generator().manual_seed(0), torch.ones(20_000, 3, 4)
    mean = R.dropout(x, p, mask=R.drop_mask(x, p, channels, g)).mean(0)
    assert ((mean - 1).abs() <= 5*(p/(1 - p)/20_000)**.5).all()


@pytest.mark.parametrize('p', [-.1, 1., 1.5, float('nan')])
def test_a_bad_probability_is_refused_when_the_layer_is_made(p):
    with pytest.raises(ValueError, match='p: expected a probability below 1'): R.Dropout(p)


def test_making_a_layer_draws_no_random_number():
    state = torch.get_rng_state()
    R.Dropout(.3)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize('kind', [nn.Dropout, nn.Dropout1d, nn.AlphaDropout, R.Dropout])
def test_every_kind_of_dropout_is_woken_and_nothing_else(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Unflatten(1, (4, 2)), kind(.5), nn.Flatten(),
                        nn.Linear(8, 3))
    net.train()
    net[1].eval()
    x = torch.randn(5, 6)
    with no_trace(net, x): found = R.mc_dropout(net, x, n=20, seed=3)
    assert (found.spread > 0).any() and torch.allclose(found.mean.sum(1), torch.ones(5))
    assert torch.equal(found.mean, R.mc_dropout(net, x, n=20, seed=3).mean)
    assert not torch.equal(found.mean, R.mc_dropout(net, x, n=20, seed=4).mean)


def test_nothing_is_left_behind_after_an_error():
    net = nn.Sequential(nn.Dropout(.5), nn.Linear(3, 2)).train()
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError): R.mc_dropout(net, torch.ones(2, 4))
    assert all(m.training for m in net.modules()) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize('momentum, nesterov', [(0., False), (.9, False), (.9, True)])
def test_groups_decay_as_the_penalty_on_the_same_parameters(momentum, nesterov):
    def steps(by_penalty):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).double()
        x, y = torch.randn(16, 1, 4, 4).double(), torch.arange(16) % 2
        groups = decay_groups(net, 0. if by_penalty else .1)
        optimizer = torch.optim.SGD(groups, .1, momentum=momentum, nesterov=nesterov)
        for _ in range(10):
            loss = F.cross_entropy(net(x), y) + (R.l2_penalty(groups[0]['params'], .1) if by_penalty else 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return nn.utils.parameters_to_vector(net.parameters()).detach()
    torch.testing.assert_close(steps(True), steps(False))


def test_a_shared_weight_is_in_one_group_once():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    assert [len(g['params']) for g in decay_groups(net, .1)] == [1, 2]
    torch.optim.SGD(decay_groups(net, .1), .1)                                 # refuses a parameter that comes twice
    assert [len(g['params']) for g in decay_groups(nn.LayerNorm(4), .1)] == [2]   # no empty group


@pytest.mark.parametrize('check', CHECKS, ids=lambda c: c.__name__)
def test_checks_stay_calm_with_odd_answers(check):
    for odd in (3, 'text', lambda *_: None, lambda *_: torch.zeros(7)): assert not check.judge(odd)


@pytest.mark.parametrize('p', [-.1, 1., 1.5])
def test_a_given_mask_does_not_let_a_bad_probability_through(p):
    for training in (True, False):
        with pytest.raises(ValueError, match='p: expected'): R.dropout(torch.ones(3), p, training, torch.ones(3))
