"""Patches, made images and pushed images: brute force over random networks, faults 53-55, another trainer."""
import pytest
import torch
from torch import nn

from cnnbook.cifar import failing_image
from cnnbook.excite import ConfusedLogits, class_image, max_patches, push_toward
from cnnbook.trace import no_trace
from cnnbook.trainer import Trainer


def net(seed=0, inplace=True):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=inplace),
                         nn.Conv2d(4, 6, 3, padding=2, dilation=2), nn.ReLU(inplace=inplace), nn.MaxPool2d(2),
                         nn.Flatten(), nn.Linear(96, 5))


def images(n=23, seed=0): return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def maps_of(model, x, last):
    was = model.training
    with torch.no_grad(): out = model.eval()[:last](x)
    model.train(was)
    return out


@pytest.mark.parametrize('per_image', [True, False])
@pytest.mark.parametrize('seed', range(3))
def test_patches_are_the_true_maxima_and_see_just_their_box(seed, per_image):
    model, x = net(seed), images(seed=seed)
    for last, layer in ((1, '0'), (4, '3'), (6, '5')):
        values = maps_of(model, x, last)[:, 2]
        got = max_patches(model, x, layer, 2, 7, batch_size=5, per_image=per_image)
        every = sorted((-v, i, r, c) for i, m in enumerate(values.tolist()) for r, line in enumerate(m)
                       for c, v in enumerate(line))
        if per_image: every = [next(e for e in every if e[1] == i) for i in dict.fromkeys(e[1] for e in every)]
        assert [(i, r, c) for i, (r, c) in zip(got.index.tolist(), got.place.tolist())] == [e[1:] for e in every[:7]]
        i, (r, c), (x0, y0, x1, y1) = got.index[0], got.place[0], got.box[0].clamp(0, 16).tolist()
        pixels = x[i:i + 1].clone().requires_grad_()
        eased = net(seed, inplace=False).eval()[:last](pixels)[0, 2, r, c]
        slope = torch.autograd.grad(eased, pixels)[0][0].abs().sum(0)
        assert slope.any() or got.value[0] == 0                              # behind a ReLU all may be zero
        slope[y0:y1, x0:x1] = 0
        assert not slope.any()                                               # nothing outside
        shown = torch.nn.functional.pad(x, (40,)*4, value=.5)
        for k in range(7):
            x0, y0, x1, y1 = (got.box[k] + 40).tolist()
            assert torch.equal(got.crops[k], shown[got.index[k], :, y0:y1, x0:x1])


def test_batches_and_ties_do_not_matter():
    x = torch.randint(0, 3, (40, 1, 4, 4), generator=torch.Generator().manual_seed(0)).float()
    model = nn.Conv2d(1, 1, 1, bias=False)
    model.weight.data.fill_(1)
    for per_image in (True, False):
        ways = [max_patches(model, x, '', 0, 12, size, per_image=per_image) for size in (1, 7, 40)]
        assert all(torch.equal(w.index, ways[0].index) and torch.equal(w.place, ways[0].place) for w in ways)
        assert (ways[0].value == 2).all() and ways[0].index.tolist() == sorted(ways[0].index.tolist())


def test_the_failing_image_is_found_by_its_own_patch():
    x = failing_image().image[None]
    model = net()[:5]
    got = max_patches(model, x, '3', 0, 1, transform=lambda t: t.float()/255)
    assert got.crops.dtype == torch.uint8 and got.index.tolist() == [0]
    assert got.value[0] == maps_of(model, x.float()/255, 4)[0, 0].max()


def look(model, x, name):
    if name == 'patches': return max_patches(model, x, '3', 0, 3).value
    if name == 'class': return class_image(model, 1, (3, 16, 16), steps=3).image
    return push_toward(model, x, torch.ones(len(x), dtype=torch.int64), 2)


LOOKS = ['patches', 'class', 'push']


@pytest.mark.parametrize('name', LOOKS)
@pytest.mark.parametrize('inplace', [True, False])
def test_fault_53_no_trace_frozen_no_grad_inference(name, inplace):
    model, x = net(inplace=inplace), images(4)
    want = look(model, x, name)
    for p in list(model.parameters())[::2]: p.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with no_trace(model, x): assert torch.equal(look(model, x, name), want)
    with no_trace(model, x), torch.no_grad(): assert torch.equal(look(model, x, name), want)
    with torch.inference_mode(): assert torch.equal(look(model, x*1, name), want)
    model.requires_grad_(False)
    with no_trace(model, x): assert torch.equal(look(model, x, name), want)


class Boom(RuntimeError): pass


@pytest.mark.parametrize('name', LOOKS)
def test_fault_53_an_error_on_the_way(name):
    model, x = net(), images(4)

    class Fuse(nn.Module):
        def forward(self, t): raise Boom

    broken = nn.Sequential(*model, Fuse())
    with no_trace(broken, x), pytest.raises(Boom): look(broken, x, name)


def test_fault_54_names_channels_and_flat_outputs():
    model, x = net(), images(4)
    for bad, words in ((dict(layer='9'), 'expected one of'), (dict(layer='7'), r"got '7' with \(4, 5\)"),
                       (dict(channel=6), 'channel: expected 0 to 5, got 6'), (dict(channel=-1), 'channel'),
                       (dict(k=0), 'k: expected 1 to 4'), (dict(k=5), 'k: expected 1 to 4')):
        with no_trace(model), pytest.raises(ValueError, match=words):
            max_patches(model, x, **{'layer': '3', 'channel': 0, 'k': 1} | bad)
    with no_trace(model), pytest.raises(ValueError, match='target: expected 0 to 4, got 5'):
        class_image(model, 5, (3, 16, 16))
    body, zeros = model[:3], torch.zeros(4).long()
    for call in (lambda: class_image(body, 0, (3, 16, 16)), lambda: push_toward(body, x, zeros)):
        with no_trace(model), pytest.raises(ValueError, match=r'model: expected scores \(B, K\)'): call()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_fault_55_dead_constant_and_nan_maps():
    model, x = net(), images(6)
    model[3].weight.data.zero_(), model[3].bias.data.fill_(-1)
    dead = max_patches(model, x, '4', 0, 3)
    assert dead.value.tolist() == [0, 0, 0] and dead.index.tolist() == [0, 1, 2] and not dead.place.any()
    made = class_image(model, 0, (3, 16, 16), steps=2, tv=0, l2=0)            # no slope: the image stays as it is
    assert made.image.isfinite().all() and made.scores[0] == made.scores[1]
    pushed = push_toward(model, x, torch.zeros(6).long())
    assert torch.equal(pushed, x)                                             # it cannot rise, so nothing is added
    with pytest.raises(ValueError, match='0: expected numbers, got NaN'): max_patches(model, x*torch.nan, '0', 0, 1)
    one = max_patches(nn.Sequential(nn.Conv2d(3, 2, 16), nn.ReLU()), x, '1', 1, 2)
    assert one.place.tolist() == [[0, 0]]*2 and one.box.tolist() == [[0, 0, 16, 16]]*2


@pytest.mark.parametrize('seed', range(3))
def test_the_pushed_score_rises(seed):
    model, x = net(seed).eval(), images(12, seed)
    target = torch.randint(0, 5, (12,), generator=torch.Generator().manual_seed(seed))
    for size in (.01, .3, 30.):                                               # much too long a step is halved
        pushed = push_toward(model, x, target, 2, size)
        with torch.no_grad(): before, after = (model(t).gather(1, target[:, None])[:, 0] for t in (x, pushed))
        moved = (pushed != x).flatten(1).any(1)
        assert (after[moved] > before[moved]).all() and torch.equal(after[~moved], before[~moved])
        assert moved.all() or size == 30.


class OtherTrainer:                                                           # Lightning's names, and nothing of ours
    sanity_checking, current_epoch = False, 3


def test_the_callback_as_a_guest_of_another_trainer():
    model, x = net().eval(), images(12)
    for outputs in (None, torch.tensor(1.), {'loss': 1}):
        callback = ConfusedLogits(10., limit=5)
        with no_trace(model, x), torch.inference_mode():
            callback.on_validation_start(OtherTrainer, model)
            for k in range(3): callback.on_validation_batch_end(OtherTrainer, model, outputs, (x[4*k:4*k + 4], None), k)
        assert [(c.batch_idx, c.row, c.epoch) for c in callback.found] == [(0, 0, 3), (0, 1, 3), (0, 2, 3), (0, 3, 3),
                                                                          (1, 0, 3)]
        assert all(c.after[1] > c.before[1] for c in callback.found)
    sane = ConfusedLogits(10.)
    sane.on_validation_batch_end(type('T', (OtherTrainer,), {'sanity_checking': True}), model, None, (x, None), 0)
    assert sane.found == []


def test_a_fit_does_not_move_by_a_bit():
    def fit(*callbacks):
        model, g = net(), torch.Generator().manual_seed(0)
        data = [(torch.rand(4, 3, 16, 16, generator=g), torch.arange(4)) for _ in range(3)]
        trainer = Trainer(max_epochs=2, callbacks=list(callbacks), enable_progress_bar=False)
        trainer.fit(model, data, data, torch.optim.SGD(model.parameters(), .1), nn.CrossEntropyLoss())
        return model
    watch = ConfusedLogits(10.)
    assert all(torch.equal(a, b) for a, b in zip(fit(watch).state_dict().values(), fit().state_dict().values()))
    assert {c.epoch for c in watch.found} == {1}                              # the last validation alone
