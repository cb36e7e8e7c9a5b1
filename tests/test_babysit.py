"""What chapters 10d, 10f and 10g do not say in a cell: whole networks, workers, persistent loaders, errors half-way."""
import copy
import math

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler, Subset, TensorDataset

from cnnbook.babysit import (
    exploded,
    first_batch,
    initial_loss_check,
    knowing_nothing,
    overfit_small,
    trial_copy,
    update_ratio,
)
from cnnbook.data import Loader, load
from cnnbook.finder import lr_find, smoothed, suggest_rate
from cnnbook.trace import digest, no_trace
from cnnbook.trial import borrowed, on_a_copy, trial_step

LOSS = nn.CrossEntropyLoss()


class Counting(Dataset):
    "Draws from a generator of its own, counts its reads, opens a file late."
    def __init__(self): self.rng, self.reads, self.file = np.random.default_rng(0), 0, None
    def __len__(self): return 12
    def __getitem__(self, i):
        self.reads, self.file = self.reads + 1, object()
        return torch.full((3,), i + self.rng.random()), i % 3


def small(): return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(.2), nn.Linear(8, 3))


LOOKS = {
    'initial': lambda m, d, o: initial_loss_check(m, d, LOSS),
    'overfit': lambda m, d, o: overfit_small(m, d, LOSS, o, samples=6, steps=4),
    'overfit with Adam': lambda m, d, o: overfit_small(m, d, LOSS, samples=6, steps=4),
    'update ratio': lambda m, d, o: update_ratio(m, d, LOSS, o),
    'finder': lambda m, d, o: lr_find(m, d, LOSS, o, steps=12),
}


@pytest.mark.parametrize('look', LOOKS.values(), ids=LOOKS)
def test_fault_43_nothing_of_the_users_moves(look):
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(3)
    data = DataLoader(Subset(Counting(), range(10)), 4, sampler=RandomSampler(range(10), generator=g))
    model = small()
    model[1].eval()                                                          # frozen on purpose
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    LOSS(model(torch.randn(5, 3)), torch.tensor([0, 1, 2, 0, 1])).backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    was, state, dataset = copy.deepcopy(optimizer.state_dict()), g.get_state(), data.dataset.dataset
    drawn = dataset.rng.bit_generator.state
    with no_trace(model), torch.no_grad(): look(model, data, optimizer)
    now = optimizer.state_dict()
    assert now['param_groups'] == was['param_groups'] and scheduler.last_epoch == 0
    for k, moments in was['state'].items():
        for name, t in moments.items(): assert digest(t) == digest(now['state'][k][name])
    assert torch.equal(g.get_state(), state) and dataset.rng.bit_generator.state == drawn
    assert dataset.reads == 0 and dataset.file is None


@pytest.mark.parametrize('look', LOOKS.values(), ids=LOOKS)
def test_fault_53_an_error_half_way_leaves_no_trace(look):
    class Fails(nn.Module):
        def forward(self, x):
            torch.rand(1)
            raise KeyError('planted')

    data = Loader(load('digits'), 32, shuffle=True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10), Fails())
    optimizer = torch.optim.SGD(model.parameters(), .1)
    with no_trace(model), pytest.raises(KeyError): look(model, data, optimizer)
    assert data.epoch == 0 and optimizer.param_groups[0]['lr'] == .1


def test_resnet18_learns_twenty_samples_and_starts_near_log_c():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    data = DataLoader(TensorDataset(torch.randn(24, 3, 32, 32), torch.arange(24) % 10), 8, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), .01, momentum=.9)
    with no_trace(model):
        assert initial_loss_check(model, data, LOSS).passed
        found = overfit_small(model, data, LOSS)
        ratios = [r[1] for r in update_ratio(model, data, LOSS, optimizer).rows]
    assert found.passed and len(found.losses) < 60 and len(ratios) == 21 and max(ratios) < .5


def test_a_persistent_loader_in_the_middle_of_its_epoch_goes_on():
    numbers = TensorDataset(torch.arange(12.), torch.arange(12))
    data = DataLoader(numbers, 2, num_workers=1, persistent_workers=True)
    running = iter(data)
    seen = [next(running)[1].tolist()]
    assert first_batch(data)[1].tolist() == [0, 1]
    seen += [y.tolist() for _, y in running]
    assert sum(seen, []) == list(range(12)) and data.persistent_workers
    running._shutdown_workers()


def test_workers_end_also_after_an_error():
    import multiprocessing
    data = DataLoader(TensorDataset(torch.randn(8, 3), torch.arange(8) % 3), 2, num_workers=1)
    before = set(multiprocessing.active_children())
    with pytest.raises(ZeroDivisionError), on_a_copy(small(), data, LOSS) as (net, loss, _, batches):
        next(batches())
        1/0
    assert set(multiprocessing.active_children()) == before


def test_samplers_keep_their_epoch_and_loaders_their_place():
    sampler = DistributedSampler(range(8), num_replicas=2, rank=0, seed=1)
    sampler.set_epoch(5)
    data = DataLoader(TensorDataset(torch.arange(8.), torch.arange(8)), 2, sampler=sampler)
    assert torch.equal(first_batch(data)[1], next(iter(data))[1]) and sampler.epoch == 5
    loader = Loader(load('digits'), 32, shuffle=True)
    loader.set_epoch(7)
    with borrowed(loader) as mine: list(mine), list(mine)
    assert loader.epoch == 7


@pytest.mark.parametrize('make', [
    lambda p: torch.optim.SGD(p, .1, momentum=.9), lambda p: torch.optim.Adam(p, 1e-2), torch.optim.RMSprop,
    lambda p: torch.optim.LBFGS(p, lr=.1), torch.optim.Adagrad])
def test_a_step_of_the_copy_is_the_step_of_the_original(make):
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(6, 3), torch.arange(6) % 3
    optimizer = make(model.parameters())
    net, loss, opt = trial_copy(model, LOSS, optimizer)
    for _ in range(3): trial_step(net, loss, opt, x, y)
    for _ in range(3): trial_step(model, LOSS, optimizer, x, y)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), net.parameters()))


def test_an_optimizer_that_wraps_another():
    class Wraps(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {'lr': .1})
            self.inner = torch.optim.SGD(self.param_groups, .1)
            self.param_groups = self.inner.param_groups

        def step(self, closure=None): return self.inner.step(closure)

    model = nn.Linear(3, 3)
    optimizer = Wraps(model.parameters())
    net, loss, opt = trial_copy(model, LOSS, optimizer)
    assert opt.inner.param_groups[0]['params'][0] is net.weight
    x, y = torch.randn(3, 3), torch.arange(3)
    with no_trace(model): trial_step(net, loss, opt, x, y)
    assert not torch.equal(net.weight, model.weight)


def test_a_loss_that_refers_to_the_model():
    model = small()
    penalised = lambda pred, y: F.cross_entropy(pred, y) + .1*sum(p.square().sum() for p in model.parameters())
    data, optimizer = (torch.randn(8, 3), torch.arange(8) % 3), torch.optim.SGD(model.parameters(), .1)
    with no_trace(model):
        lr_find(model, data, penalised, optimizer, steps=12)
        overfit_small(model, data, penalised, optimizer, steps=3)
        update_ratio(model, data, penalised, optimizer)


def test_under_inference_mode():
    with torch.inference_mode():
        data = torch.randn(8, 3), torch.arange(8) % 3
        assert len(overfit_small(small(), data, LOSS, steps=3).losses) == 3
        assert len(lr_find(small(), data, LOSS, steps=12).raw) > 2


@pytest.mark.parametrize('classes', [2, 3, 10, 1000])
def test_knowing_nothing_is_log_c(classes):
    y = torch.arange(12) % classes
    for loss in (LOSS, F.cross_entropy, nn.NLLLoss(), nn.CrossEntropyLoss(label_smoothing=.2)):
        assert abs(knowing_nothing(torch.randn(12, classes), y, loss) - math.log(classes)) < 1e-4
    assert abs(knowing_nothing(torch.randn(12, classes), y, nn.CrossEntropyLoss(reduction='sum'))
               - 12*math.log(classes)) < 1e-3
    assert abs(knowing_nothing(torch.randn(2, classes, 3, 2), y.view(2, 3, 2), LOSS) - math.log(classes)) < 1e-4


def test_exploded_agrees_with_brute_force():
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        losses = (3*torch.rand(6, generator=g)**2 + .2).tolist()
        assert exploded(losses) == (max(losses) > 3*losses[0])


def test_smoothing_and_suggestion_on_random_curves():
    g = torch.Generator().manual_seed(0)
    rates = [10**(i/10 - 6) for i in range(61)]
    for _ in range(20):
        values = torch.rand(61, generator=g).tolist()
        weights = np.array([.8**(60 - i) for i in range(61)])
        assert abs(smoothed(values, .8)[-1] - (weights*values).sum()/weights.sum()) < 1e-9
        assert all(min(values) - 1e-9 <= v <= max(values) + 1e-9 for v in smoothed(values))
        rate, how = suggest_rate(rates, smoothed(values))
        assert rate is None and 'no suggestion' in how or rates[0]/10 <= rate <= rates[smoothed(values).index(
            min(smoothed(values)))]
