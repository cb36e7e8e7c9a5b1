"What the cells do not say of `cnnbook.outputs`: random rounds, each cause on several networks, other targets."
import math

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from cnnbook import outputs as O
from cnnbook.calls import layer_calls
from cnnbook.outputs import evaluation, first_loss, output_and_loss, penalty
from cnnbook.trace import no_trace

CE, NLL = nn.CrossEntropyLoss(), nn.NLLLoss()
CHECKS = [getattr(O, n) for n in vars(O) if n.startswith('check_')]
NETS = {'linear': lambda k: nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, k)),
        'conv': lambda k: nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
                                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, k)),
        'shufflenet': lambda k: torchvision.models.shufflenet_v2_x0_5(num_classes=k)}


def causes(found): return [f.cause for f in found if f.status in ('fail', 'warn')]


class After(nn.Module):
    def __init__(self, net, f): super().__init__(); self.net, self.f = net, f
    def forward(self, x): return self.f(self.net(x))


@pytest.fixture(params=NETS)
def case(request):
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 3, 32, 32, generator=g), torch.randint(10, (24,), generator=g)
    y[:10] = torch.arange(10)
    return NETS[request.param], x, y


ENDS = [(lambda s: s, CE, []), (lambda s: s.softmax(1), CE, ['softmax in the model']),
        (lambda s: s.softmax(1), NLL, ['softmax in the model']), (lambda s: s.log_softmax(1), NLL, []),
        (lambda s: s.log_softmax(1), CE, ['log-softmax twice']),
        (lambda s: s, NLL, ['logits to a loss of probabilities']),
        (F.relu, CE, ['ReLU before the loss']), (lambda s: s/0, CE, ['NaN in the output'])]


def test_each_ending_on_each_network(case):
    make, x, y = case
    for f, loss, cause in ENDS:
        net = After(make(10), f)
        with no_trace(net, x, y): found = output_and_loss(layer_calls(net, x)[1], y, loss, 10)
        assert causes(found) == cause


def test_fault_51_head_and_classes(case):
    make, x, y = case
    with torch.no_grad(): few, many, right = (output_and_loss(make(k).eval()(x), y, CE, 10) for k in (9, 1000, 10))
    assert [f.status for f in few + many + right] == ['fail', 'warn', 'pass']
    assert 'labels 0 to 9, but the model gives 9 scores' in few[0].saw and '1000 scores' in many[0].saw


def test_fault_15_labels_out_of_range():
    s, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 4, 0])
    for wrong in (y, y - 2): assert causes(output_and_loss(s, wrong, CE, 5)) == ['wrong number of classes']
    assert causes(output_and_loss(s, torch.full_like(y, -100), CE, 1)) == ['target does not fit the loss']
    assert causes(output_and_loss(s, y.float(), CE, 5)) == ['target does not fit the loss']
    maps, target = torch.randn(2, 3, 4, 4), torch.full((2, 4, 4), 3)
    assert causes(output_and_loss(maps, target, CE, 1)) == ['wrong number of classes']


def test_evaluation_on_each_network(case):
    make, x, y = case
    net = make(10)
    for f, cause in ((lambda s: s, []), (lambda s: F.dropout(s, .2), ['random in eval mode']),
                     (lambda s: s - s.mean(0), ['samples are mixed']), (lambda s: s/0, ['NaN in the output']),
                     (lambda s: s[0], ['samples are mixed']), (lambda s: s.view(3, 3), ['error in eval mode'])):
        broken = After(net, f)
        with no_trace(broken, x): assert causes(evaluation(broken, x)) == cause


def test_norms_that_look_at_one_sample_are_sound():
    for norm in (nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.LayerNorm((4, 30, 30)), nn.BatchNorm2d(4)):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Flatten(), nn.Linear(4*900, 2))
        assert causes(evaluation(net, torch.randn(5, 3, 32, 32))) == []
    tokens = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 2))
    assert causes(evaluation(tokens, torch.randint(9, (5, 3)))) == []


@pytest.mark.parametrize('seed', range(10))
def test_penalty_is_what_decay_costs(seed):
    "Its gradient is what the optimizer adds: the step with weight decay against one on loss plus penalty."
    torch.manual_seed(seed)
    wd = 10**float(torch.rand(())*4 - 3)
    net = nn.Linear(4, 3).double()
    optimizer = torch.optim.SGD(net.parameters(), 1., weight_decay=wd)
    told = float(penalty(net, 1., optimizer)[0].saw.split()[-1])
    params = [p.detach().clone().requires_grad_() for p in net.parameters()]
    extra = wd/2*sum(p.square().sum() for p in params)
    assert abs(told - extra.item()) < 6e-3*told
    for p in net.parameters(): p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, q, slope in zip(net.parameters(), params, torch.autograd.grad(extra, params)):
        torch.testing.assert_close(p.detach(), q.detach() - slope)
    assert (penalty(net, extra.item()/100, torch.optim.SGD(net.parameters(), 1.))) == []


@pytest.mark.parametrize('k', [2, 3, 10, 100, 1000])
def test_first_loss_bounds(k):
    s, y, want = torch.zeros(4, k), torch.zeros(4, dtype=torch.int64), math.log(k)
    status = lambda v: first_loss(v, s, y)[0].status
    assert status(F.cross_entropy(s, y).item()) == 'pass' and status(1.39*want) == 'pass' and status(0.) == 'pass'
    assert status(1.41*want) == 'warn' and status(2*want + 1.01) == 'fail' and status(-1e-3) == 'fail'
    assert first_loss(1., torch.zeros(4, k, 2), y) == []                                 # targets of another shape


@pytest.mark.parametrize('check', CHECKS)
def test_exercises(check):
    assert check.judge(check.solution)
    for answer, words in check.wrong: assert words in check.judge(answer).message
