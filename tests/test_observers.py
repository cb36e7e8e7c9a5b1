"""Faults 53 and 54: whatever looks into a network leaves it as it was, and says which layers there are.

A chapter that adds a way of looking adds one line to OBSERVERS; the line is then tried on every network of ZOO, as it
is, under no_grad, and with an error in the middle. PLANTED shows that the test can fail.
"""
import gc
import random
import re
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from cnnbook.attribution import compare_attributions, scorecard
from cnnbook.capacity import summary, training_memory
from cnnbook.excite import class_image, max_patches, push_toward
from cnnbook.fields import pixels_seen
from cnnbook.filters import class_filters
from cnnbook.gradients import grad_cam, guided_backprop, integrated_gradients, saliency, smooth_grad
from cnnbook.hooks import capture, eval_mode, tree
from cnnbook.nearby import cell_reach, nearby_occlusion
from cnnbook.occlusion import occlusion
from cnnbook.pictures import feature_maps, plot_filters
from cnnbook.sanity import deletion_curve, insertion_curve, randomized
from cnnbook.shapes import explain_shapes
from cnnbook.text import detect
from cnnbook.trace import digest, keep_rng, layer_shapes, no_trace
from cnnbook.walk import walk


def look_at_outputs(model, x):
    with eval_mode(model), keep_rng(), torch.no_grad(), capture(model) as seen: model(x)
    return seen


def look_at_gradients(model, x):
    pixels = x.detach().clone().requires_grad_()
    with eval_mode(model), keep_rng(), torch.enable_grad(), capture(model, grads=True) as seen:
        torch.autograd.grad(model(pixels).sum(), pixels)
    return seen.grads


def look_with_noise(model, x):
    "Twice, with noise on the input: SmoothGrad in short."
    with keep_rng(), eval_mode(model), torch.no_grad():
        random.random(), np.random.rand()
        return sum(model(x + .1*torch.randn_like(x)) for _ in range(2))


def from_size(look):
    "An observer that takes an input size; an error that it hands over or explains is raised as it was."
    def run(model, x):
        try: found = look(model, tuple(x.shape[1:]))
        except ValueError as e: raise (e.__cause__ or e) from None
        if error := getattr(getattr(found, 'walk', found), 'error', None): raise error
        return found
    return run


def look_at_pixels(model, x):
    conv = next((n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)), None)
    return pixels_seen(model, tuple(x.shape[1:]), conv) if conv else None


def if_it_can(look):
    "An observer that asks for scores (B, K), and refuses in words: no ReLU, no map, NaN in a buffer."
    def run(model, x):
        try: return look(nn.Sequential(model, nn.Flatten()), x)
        except ValueError as e:
            if not re.search('ReLUs to guide|gives a map|expected finite', str(e)): raise
    return run


def look_at_maps(model, x):
    return len(compare_attributions(model, x, methods={'saliency': saliency}).axes)


def score_maps(model, x):
    card = scorecard(model, x, x[:, 0] > 0, {'saliency': saliency}, few=1, seeds=1)
    return [(s.points, s.deletion, s.insertion) for s in card.values()]            # not the time


def on_maps(look):
    "An observer of networks with convolutions, given the name of the first and one image."
    def run(model, x):
        conv = next((n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)), None)
        return look(model, x[0], conv) if conv else None
    return run


def in_pieces(look):
    "An observer of one image that may say of a layer that pieces do not do there."
    def run(model, image, conv):
        try: return look(model, image[None], conv)
        except ValueError as e:
            if isinstance(e.__cause__, Boom): raise e.__cause__ from None       # said as the reason of a refusal
            assert str(e).startswith(('layer: expected', 'model, layer: expected', 'model: expected scores')), e
    return run


def on_scores(look):
    "An observer of classifiers."
    def run(model, x):
        try: return look(model, x)
        except ValueError as e: assert 'expected scores (B, K)' in str(e), e
    return run


class Says(nn.Module):
    "A text detector that runs a network of the zoo on its part of the image, and then says maps of its own."
    def __init__(self, model, x):
        super().__init__()
        self.model, self.size = model, x.shape[2:]
        self.training = model.training

    def forward(self, x):
        self.model(x[:, :, :self.size[0], :self.size[1]])
        return torch.ones(1, 1, 8, 8), torch.ones(1, 5, 8, 8)


def look_for_text(model, x): return detect(Says(model, x), x[0])


# (name, function of a model and a batch): every observer of the book stands here
OBSERVERS = [
    ('tree', lambda model, x: tree(model)),
    ('layer_shapes', layer_shapes),
    ('capture', look_at_outputs),
    ('capture with gradients', look_at_gradients),
    ('noise', look_with_noise),
    ('walk', from_size(walk)),
    ('explain_shapes', from_size(explain_shapes)),
    ('summary', from_size(summary)),
    ('training_memory', from_size(lambda model, size: training_memory(model, size, 2))),
    ('pixels_seen', look_at_pixels),
    ('saliency', if_it_can(saliency)),
    ('smooth_grad', if_it_can(lambda model, x: smooth_grad(model, x, n=2))),
    ('guided_backprop', if_it_can(guided_backprop)),
    ('grad_cam', if_it_can(grad_cam)),
    ('integrated_gradients', if_it_can(lambda model, x: integrated_gradients(model, x, steps=2))),
    ('occlusion', if_it_can(lambda model, x: occlusion(model, x, stride=8))),
    ('cell_reach', on_maps(in_pieces(lambda model, x, conv: cell_reach(model, x, conv)))),
    ('nearby_occlusion', on_maps(in_pieces(lambda model, x, conv: nearby_occlusion(model, x, conv, 0, stride=8)))),
    ('deletion_curve', if_it_can(lambda model, x: deletion_curve(model, x, x[:, 0], steps=2))),
    ('insertion_curve', if_it_can(lambda model, x: insertion_curve(model, x, x[:, 0], steps=2))),
    ('randomized', if_it_can(lambda model, x: randomized(model))),
    ('compare_attributions', if_it_can(look_at_maps)),
    ('scorecard', if_it_can(score_maps)),
    ('plot_filters', on_maps(lambda model, x, conv: len(plot_filters(model).axes))),
    ('feature_maps', on_maps(lambda model, x, conv: feature_maps(model, x))),
    ('class_filters', on_maps(lambda model, x, conv: class_filters(model, x, conv, [0, 1]))),
    ('max_patches', on_maps(lambda model, x, conv: max_patches(model, x[None], conv, 0, 1))),
    ('class_image', on_scores(lambda model, x: class_image(model, 0, tuple(x.shape[1:]), steps=2))),
    ('push_toward', on_scores(lambda model, x: push_toward(model, x, torch.zeros(len(x), dtype=torch.int64), 1))),
    ('detect', look_for_text),
]


class Twice(nn.Module):
    "One ReLU at two places, a skip, and a random number even in evaluation mode."
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)

    def forward(self, x): return self.relu(x + self.bn(self.conv(self.relu(x*1)))) + torch.rand(1, device=x.device)


class Reader(nn.Module):
    "Rows read one after the other: layers that give out tuples."
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(24, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x): return self.head(self.lstm(x.transpose(1, 2).flatten(2))[0][:, -1])


def cnn(*between): return nn.Sequential(nn.Conv2d(3, 4, 3), *between, nn.Flatten(), nn.Linear(144, 5))


def frozen_part():
    model = cnn(nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    model[:3].requires_grad_(False).eval()
    return model


def mixed_modes():
    model = cnn(nn.BatchNorm2d(4), nn.Dropout(.5), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)))
    model[3][1].eval()
    model.training = False                                                # the root alone
    return model


def in_use():
    "Hooks of its owner, gradients that are being accumulated, tied weights, a NaN in a buffer."
    model = cnn(nn.BatchNorm2d(4), nn.Identity(), nn.ReLU(inplace=True))
    model.append(nn.Linear(5, 5)).append(nn.Linear(5, 5))
    model[-1].weight = model[-2].weight
    model[1].running_mean[0] = float('nan')
    model[0].register_forward_hook(lambda *_: None)
    model[0].weight.register_hook(lambda g: g)
    model[-1].weight.sum().backward()
    return model


ZOO = {
    'plain': lambda: cnn(nn.ReLU()),
    'batch norm': lambda: cnn(nn.BatchNorm2d(4), nn.ReLU()),
    'dropout': lambda: cnn(nn.Dropout(.5), nn.Dropout2d(.5)),
    'in place': lambda: cnn(nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(.5, inplace=True)),
    'partly frozen': frozen_part,
    'all frozen': lambda: cnn(nn.BatchNorm2d(4)).requires_grad_(False),
    'mixed modes': mixed_modes,
    'in evaluation mode': lambda: cnn(nn.BatchNorm2d(4)).eval(),
    'in use': in_use,
    'one layer twice': Twice,
    'tuples': Reader,
    'weight norm': lambda: cnn(nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))),
    'resnet18': lambda: torchvision.models.resnet18(weights=None),
}


class Boom(RuntimeError): pass


class Fuse(nn.Module):
    "Passes on what it gets, until its n-th call raises: by then every other layer has run."
    def __init__(self, n):
        super().__init__()
        self.n, self.calls = n, [0]

    def forward(self, x):
        self.calls[0] += 1
        if self.calls[0] == self.n: raise Boom
        return x


def build(case, seed=0):
    torch.manual_seed(seed)
    model = ZOO[case]()
    return model, torch.randn(2, 3, 32 if case == 'resnet18' else 8, 32 if case == 'resnet18' else 8)


def check(look, model, x, manner='as it is'):
    "Let `look` see the model and hold it to no_trace; with an error on its way if `manner` says so."
    nth = {'error in the first pass': 1, 'error in the second pass': 2}.get(manner, 0)
    root = nn.Sequential(model, Fuse(nth)) if nth else model
    if nth: root.training = model.training
    with no_trace(root, x), torch.no_grad() if manner == 'no_grad' else nullcontext():
        try: look(root, x)
        except Boom: pass
        else: assert not nth or root[1].calls[0] < nth, 'an error was swallowed'


MANNERS = ['as it is', 'no_grad', 'error in the first pass', 'error in the second pass']


@pytest.mark.parametrize('manner', MANNERS)
@pytest.mark.parametrize('case', ZOO)
@pytest.mark.parametrize('look', [pytest.param(f, id=name) for name, f in OBSERVERS])
def test_fault_53_no_trace(look, case, manner): check(look, *build(case), manner)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA here')
@pytest.mark.parametrize('look', [pytest.param(f, id=name) for name, f in OBSERVERS])
def test_fault_53_no_trace_on_cuda(look):
    for case in ZOO:
        model, x = build(case)
        torch.rand(1, device='cuda')
        check(look, model.cuda(), x.cuda())


def test_the_same_look_twice_sees_the_same():
    for _, look in OBSERVERS:
        model, x = build('mixed modes')
        assert repr(look(model, x)) == repr(look(model, x))


# -- ways of looking that must be found out, on a network that has everything in it --

def no_cleaning(model, x):
    for m in model.modules(): m.register_forward_hook(lambda *_: None)
    with eval_mode(model), torch.no_grad(): model(x)


def no_finally(model, x):
    handles = [m.register_forward_hook(lambda *_: None) for m in model.modules()]
    with eval_mode(model), torch.no_grad(): model(x)
    for h in handles: h.remove()                                          # right, unless the pass raises


def eval_then_train(model, x):
    with torch.no_grad(): model.eval()(x)
    model.train()


def eval_no_finally(model, x):
    modes = [(m, m.training) for m in model.modules()]
    with torch.no_grad(): model.eval()(x)
    for m, was in modes: m.training = was


def backward(model, x):
    with eval_mode(model), torch.enable_grad(): model(x.clone()).sum().backward()


def grad_of_input(model, x):
    with eval_mode(model), torch.enable_grad(): torch.autograd.grad(model(x.requires_grad_()).sum(), x)


def wiped(model, x):
    with eval_mode(model), torch.enable_grad():
        for p in model.parameters(): p.grad = torch.ones_like(p)
        model.zero_grad()


def frozen(model, x):
    model.requires_grad_(False)
    with eval_mode(model): model(x)


def no_in_place(model, x):
    for m in model.modules(): m.inplace = False
    with eval_mode(model), torch.no_grad(): model(x)


def patched(model, x):
    for m in model.modules():
        if isinstance(m, nn.ReLU): m.forward = lambda t: t.clamp(min=0)
    with eval_mode(model), torch.no_grad(): model(x)


def swapped(model, x):
    for m in model.modules():
        for name, child in m.named_children():
            if isinstance(child, nn.ReLU): setattr(m, name, nn.ReLU(inplace=True))


def half_and_back(model, x): model.half().float()


def seeded(model, x):
    torch.manual_seed(7)
    np.random.seed(7)


def remembers(model, x): model.maps = [x]


def grad_off(model, x): torch.set_grad_enabled(False)


def global_hook(model, x): nn.modules.module.register_module_forward_hook(lambda *_: None)


def new_weights(model, x):
    for m in model.modules():
        if isinstance(m, nn.Conv2d): m.weight = nn.Parameter(m.weight.detach())


def scaled_input(model, x): x.div_(255)


def nothing_at_all(model, x): model(x)


PLANTED = [
    (no_cleaning, 'as it is', '_forward_hooks'),
    (no_finally, 'error in the first pass', '_forward_hooks'),
    (eval_then_train, 'as it is', 'training False -> True'),
    (eval_no_finally, 'error in the first pass', 'training True -> False'),
    (nothing_at_all, 'no_grad', 'running_mean values'),
    (nothing_at_all, 'no_grad', 'random state of torch'),
    (nothing_at_all, 'error in the first pass', 'num_batches_tracked values'),
    (backward, 'as it is', '.grad'),
    (grad_of_input, 'as it is', 'input 0.requires_grad False -> True'),
    (wiped, 'as it is', '.grad'),
    (frozen, 'as it is', 'requires_grad True -> False'),
    (no_in_place, 'as it is', 'inplace'),
    (patched, 'as it is', 'forward'),
    (swapped, 'as it is', 'children'),
    (half_and_back, 'as it is', 'weight values'),
    (seeded, 'as it is', 'random state of numpy'),
    (remembers, 'as it is', 'maps'),
    (grad_off, 'as it is', 'autograd on True -> False'),
    (global_hook, 'as it is', '_global_forward_hooks'),
    (new_weights, 'as it is', 'weight (the object)'),
    (scaled_input, 'as it is', 'input 0 values'),
]


@pytest.mark.parametrize('look, manner, words', [pytest.param(*p, id=f'{p[0].__name__} {p[2]}') for p in PLANTED])
def test_fault_53_planted_observers_are_found(look, manner, words):
    model, x = build('in place')
    model[1].eval()                                                        # not the same mode everywhere
    if look not in (eval_then_train,): model[1].train()
    model[0].weight.grad = torch.full_like(model[0].weight, .5)
    try:
        with pytest.raises(AssertionError, match=re.escape(words)): check(look, model, x, manner)
    finally:
        torch.set_grad_enabled(True)
        for key, v in vars(nn.modules.module).items():
            if key.startswith('_global_') and isinstance(v, dict): v.clear()


def test_an_error_is_kept_beside_the_traces():
    model, x = build('batch norm')
    with pytest.raises(AssertionError) as e:
        with no_trace(model, x):
            model.eval()
            raise Boom('the reason')
    assert isinstance(e.value.__context__, Boom)
    with pytest.raises(Boom):
        with no_trace(model, x): raise Boom


def test_keep_rng_and_digest_see_one_bit():
    with keep_rng():
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.random(), np.random.rand(), torch.rand(1).item()
    with keep_rng(): inside = random.random(), np.random.rand(), torch.rand(1).item()
    assert inside == (random.random(), np.random.rand(), torch.rand(1).item()) != before
    t = torch.randn(1000)
    u = t.clone()
    u.view(torch.int32)[500] ^= 1
    assert digest(t) != digest(u) and digest(t.to_sparse()) == digest(t)


# -- fault 54: layers by name --

def hooks_left(model):
    parts = [v for m in model.modules() for k, v in vars(m).items() if k.endswith('hooks') and isinstance(v, dict)]
    return sum(map(len, parts))


@pytest.mark.parametrize('layers, kind, words', [
    ('layer4.3', ValueError, 'layer4.1'), (['conv1', 'fc1'], ValueError, "'fc1'"), (nn.LSTM, ValueError, 'BasicBlock'),
    ([], ValueError, 'at least one'), (3, TypeError, 'got int'), ([None], TypeError, 'got NoneType'), ('', None, '')])
def test_fault_54_wrong_layers(layers, kind, words):
    model, x = build('resnet18')
    if kind is None:                                                       # '' is the name of the whole model
        with eval_mode(model), capture(model, layers) as seen: assert torch.equal(model(x), seen[''])
        return
    with pytest.raises(kind, match=re.escape(words)) as e:
        with capture(model, layers): raise Boom
    assert len(str(e.value)) < 700 and '\n' not in str(e.value) and hooks_left(model) == 0


def test_fault_54_gradients_that_do_not_exist():
    model, x = build('partly frozen')
    with capture(model, grads=True) as seen: model(x).sum().backward()
    assert list(seen) == ['0', '1', '2', '3', '4'] and list(seen.grads) == ['4']      # only the head has a graph
    with pytest.raises(KeyError, match='frozen'): seen.grads['0']
    model, x = build('all frozen')
    with capture(model, '0', grads=True) as seen: model(x.requires_grad_()).sum().backward()
    assert seen.grads['0'].shape == seen['0'].shape                        # frozen weights, but the input asks
    assert hooks_left(model) == 0


def test_fault_54_outputs_without_height_and_width():
    model, x = build('tuples')
    with capture(model) as seen: model(x)
    assert list(seen) == ['lstm[0]', 'lstm[1][0]', 'lstm[1][1]', 'head'] and '(2, 8, 5)' in repr(seen)
    with pytest.raises(KeyError, match=re.escape('lstm[0]')): seen['lstm']


def test_empty_and_odd_tensors_are_shown():
    with capture(nn.Identity()) as seen: pass
    assert len(seen) == 0 and 'layer' in repr(seen)
    for t in (torch.zeros(0, 3), torch.ones(2).bool(), torch.arange(3), torch.ones(2, dtype=torch.complex64)):
        model = nn.Identity()
        with capture(model) as seen: model(t)
        assert torch.equal(seen[''], t) and str(tuple(t.shape)) in repr(seen) and '<table>' in seen._repr_html_()


def test_dicts_names_and_parametrizations():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleDict({'a': nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), 'b': nn.Tanh()})
            self.again = self.parts['b']

        def forward(self, x): return {'logits': self.again(self.parts['a'](x)), 'aux': [self.parts['b'](x), None, 3]}

    model, x = Two(), torch.randn(4, 2)
    with capture(model) as seen: out = model(x)
    assert list(seen) == ['parts.a', 'parts.b', 'parts.b#2']
    with capture(model, ['', 'again']) as seen: out = model(x)
    assert list(seen) == ['again', 'again#2', "['logits']", "['aux'][0]"]
    assert torch.equal(seen["['logits']"], out['logits']) and torch.equal(seen['again'], out['logits'])
    assert layer_shapes(model, x)['parts.a']['parameters'] == 8            # weight norm: a direction and a length


def test_parts_called_alone_do_not_pile_up():
    model, x = build('plain')
    with capture(model, grads=True) as seen:
        for _ in range(50): model[0](x)
        assert list(seen) == ['0']
        model(x)
        model[1](x)
    assert list(seen) == ['0', '1', '2', '3'] and torch.equal(seen['1'], x.clamp(min=0))


def test_nothing_is_kept_alive():
    model, x = build('plain')
    x.requires_grad_()
    with capture(model, grads=True) as seen: out = model(x)
    out.sum().backward()                                                   # after the block: nothing listens any more
    assert not seen.grads and len(seen) == 4
    watched = weakref.ref(x)
    del x, out
    gc.collect()
    assert watched() is None                                               # no graph behind the records


def test_two_captures_and_an_error_inside():
    model, x = build('one layer twice')
    with eval_mode(model), capture(model, 'conv') as outer:
        with pytest.raises(Boom), capture(model) as inner:
            model(x)
            raise Boom
        kept = dict(inner)
        model(2*x)
    assert torch.equal(inner['conv'], kept['conv']) and not torch.equal(outer['conv'], inner['conv'])
    assert hooks_left(model) == 0


def test_inference_mode():
    model, x = build('in place')
    with torch.inference_mode(), eval_mode(model), capture(model, grads=True) as seen: model(x)
    assert list(seen) == ['0', '1', '2', '3', '4', '5'] and not seen.grads and hooks_left(model) == 0
    with no_trace(model, x), torch.inference_mode(): layer_shapes(model, x)
