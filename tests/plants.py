"""Faults that run without an error, or nearly, planted in networks of many kinds: used by tests/test_preflight.py and
benchmarks/preflight.py. Each plant gives the arguments of `preflight` and states the cause that must be named first.
`KEPT` are networks on which no check was tuned: they were written when the checks were done."""
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from cnnbook.augment import Augment
from cnnbook.data import Loader
from cnnbook.images import Images
from cnnbook.whiten import Standardize
from cnnbook.world import shapes


class Functional(nn.Module):
    "Three convolutions; its ReLUs and pools are functions, not layers."
    def __init__(self, num_classes=10):
        super().__init__()
        self.c1, self.c2, self.c3 = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 16), (16, 32), (32, 64)))
        self.f1, self.head, self.drop = nn.Linear(64*4*4, 128), nn.Linear(128, num_classes), nn.Dropout(.25)

    def forward(self, x):
        for c in (self.c1, self.c2, self.c3): x = F.max_pool2d(F.relu(c(x)), 2)
        return self.head(self.drop(F.relu(self.f1(self.drop(x.flatten(1))))))


class Block(nn.Module):
    def __init__(self, i, o, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.short = nn.Identity() if i == o and stride == 1 else nn.Conv2d(i, o, 1, stride)
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x): return F.relu(self.short(x) + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Residual(nn.Module):
    "Three blocks, the last batch norm of each at zero."
    def __init__(self, num_classes=10):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.layers = nn.Sequential(Block(16, 16), Block(16, 32, 2), Block(32, 64, 2))
        self.head = nn.Linear(64, num_classes)

    def forward(self, x): return self.head(self.layers(self.stem(x)).mean((2, 3)))


class Attention(nn.Module):
    "Patches of 8 x 8, one layer of a transformer."
    def __init__(self, num_classes=10, d=32):
        super().__init__()
        self.patch, self.place = nn.Conv2d(3, d, 8, 8), nn.Parameter(torch.randn(1, 16, d)*.02)
        self.layer = nn.TransformerEncoderLayer(d, 4, 64, dropout=.1, batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, num_classes)

    def forward(self, x):
        return self.head(self.norm(self.layer(self.patch(x).flatten(2).transpose(1, 2) + self.place)).mean(1))


def perceptron(num_classes=10):
    return nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 256), nn.ReLU(), nn.Dropout(.2), nn.Linear(256, 128),
                         nn.ReLU(), nn.Linear(128, num_classes))


def vgg(num_classes=10, norm=True):
    layers, i = [], 3
    for o in (16, 32, 64):
        layers += [nn.Conv2d(i, o, 3, padding=1, bias=not norm), *[nn.BatchNorm2d(o)]*norm, nn.ReLU(True),
                   nn.MaxPool2d(2)]
        i = o
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64*16, 64), nn.ReLU(True), nn.Linear(64, num_classes))


def lenet(num_classes=10):
    return nn.Sequential(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.AvgPool2d(2),
                         nn.Conv2d(6, 16, 5), nn.ReLU(), nn.AvgPool2d(2),
                         nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(),
                         nn.Linear(84, num_classes))


class Mobile(nn.Module):
    "Depthwise convolutions between wide pointwise ones, hard swish, a residual where the shape stays."
    def __init__(self, num_classes=10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
        self.parts = nn.ModuleList(self.part(i, o, s) for i, o, s in ((16, 16, 1), (16, 32, 2), (32, 32, 1)))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.1), nn.Linear(32, num_classes))

    def part(self, i, o, stride, k=3):
        return nn.Sequential(nn.Conv2d(i, k*i, 1, bias=False), nn.BatchNorm2d(k*i), nn.Hardswish(),
                             nn.Conv2d(k*i, k*i, 3, stride, 1, groups=k*i, bias=False), nn.BatchNorm2d(k*i),
                             nn.Hardswish(), nn.Conv2d(k*i, o, 1, bias=False), nn.BatchNorm2d(o))

    def forward(self, x):
        x = self.stem(x)
        for part in self.parts:
            y = part(x)
            x = x + y if x.shape == y.shape else y
        return self.head(x)


def plain_vgg(num_classes=10): return vgg(num_classes, norm=False)


NETS = {'perceptron': perceptron, 'functional': Functional, 'vgg': vgg, 'plain vgg': plain_vgg, 'residual': Residual,
        'attention': Attention, 'lenet': lenet, 'mobile': Mobile}
KEPT = 'lenet', 'mobile'
MAIN = 'perceptron', 'functional', 'vgg', 'residual', 'attention', *KEPT
PLAIN = 'perceptron', 'functional', 'plain vgg', 'lenet'          # without batch norm, which would hide the fault


def drawn(n, seed):
    scenes = shapes(n, size=32, seed=seed)
    return Images(scenes.x, scenes.y, scenes.classes, scenes.source)


TRAIN, OTHER = drawn(1600, 0), drawn(400, 7)
STANDARD = Standardize.fit(TRAIN.x)


def adam(model, rate=1e-3): return torch.optim.Adam((p for p in model.parameters() if p.requires_grad), rate)
def weighted(model): return [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
def loader(f=STANDARD, images=TRAIN, shuffle=True): return Loader(images, 64, transform=f, shuffle=shuffle)


def sound(net, num_classes=10):
    "Arguments of preflight in which nothing is wrong."
    torch.manual_seed(0)
    model = NETS[net](num_classes)
    return {'model': model, 'data': loader(), 'loss': nn.CrossEntropyLoss(), 'optimizer': adam(model)}


def with_model(model): return sound('perceptron') | {'model': model, 'optimizer': adam(model)}


class Around(nn.Module):
    def __init__(self, model, before=lambda x: x, after=lambda x: x):
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x): return self.after(self.model(self.before(x)))


def around(net, **change): return with_model(Around(sound(net)['model'], **change))


@dataclass(frozen=True)
class Plant:
    cause: str
    nets: tuple[str, ...]
    make: Callable      # (name of a net) -> arguments of preflight


PLANTS: dict[str, Plant] = {}


def plant(cause, nets=MAIN):
    def note(f):
        PLANTS[f.__name__] = Plant(cause, nets, f)
        return f
    return note


def pairs(kept=None):
    "All (fault, network); or only those whose network was kept aside while the checks were tuned, or only the others."
    return [(name, net) for name, p in PLANTS.items() for net in p.nets if kept is None or (net in KEPT) == kept]


@plant('NaN in the weights')
def nan_weight(net):
    args = sound(net)
    weighted(args['model'])[1].weight.data[0, 0] = float('nan')
    return args


@plant('equal units')
def constant_weights(net):
    args = sound(net)
    for m in weighted(args['model']): nn.init.constant_(m.weight, .01)
    return args


@plant('vanishing signal', PLAIN)
def uniform_by_fan_in(net):      # H10
    args = sound(net)
    for m in weighted(args['model']): nn.init.uniform_(m.weight, -1/m.weight[0].numel(), 1/m.weight[0].numel())
    return args


@plant('exploding signal', PLAIN)
def normal_of_one(net):
    args = sound(net)
    for m in weighted(args['model']): nn.init.normal_(m.weight)
    return args


@plant('frozen head')
def frozen_head(net):
    args = sound(net)
    for p in weighted(args['model'])[-1].parameters(): p.requires_grad_(False)
    return args | {'optimizer': adam(args['model'])}


@plant('parameters not in the optimizer')
def optimizer_before_head(net):  # H24
    args = sound(net, 17)
    old = weighted(args['model'])[-1]
    for parent in list(args['model'].modules()):
        for name, child in parent.named_children():
            if child is old: setattr(parent, name, nn.Linear(old.in_features, 10))
    return args


def _two_convs(k, norms, bias, pool):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, k, 3, 1, 1, bias=bias), norms[0], nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(k, k, 3, 1, 1, bias=False), norms[1], nn.ReLU(), nn.AdaptiveAvgPool2d(pool),
                         nn.Flatten(), nn.Linear(k*pool*pool, 10))


@plant('shared batch norm', ('two convs', 'wide', 'residual', 'mobile'))
def shared_norm(net):
    if net in ('residual', 'mobile'):
        model = sound(net)['model']
        for b in getattr(model, 'layers', ()): b.bn2 = b.bn1
        for part in getattr(model, 'parts', ()): part[4] = part[1]
        return with_model(model)
    norm = nn.BatchNorm2d(32 if net == 'wide' else 16)
    return with_model(_two_convs(norm.num_features, (norm, norm), False, 4))


@plant('bias before batch norm', ('two convs', 'wide', 'small map'))
def useless_bias(net):           # H12
    k = {'two convs': 16, 'wide': 48, 'small map': 24}[net]
    return with_model(_two_convs(k, (nn.BatchNorm2d(k), nn.BatchNorm2d(k)), True, 2 if net == 'small map' else 4))


@plant('frozen batch norm drifts', ('vgg', 'residual', 'two convs', 'mobile'))
def frozen_norm(net):            # H13
    model = _two_convs(16, (nn.BatchNorm2d(16), nn.BatchNorm2d(16)), False, 4) if net == 'two convs' else (
        sound(net)['model'])
    for p in model.parameters(): p.requires_grad_(False)
    for p in weighted(model)[-1].parameters(): p.requires_grad_(True)
    return with_model(model)


@plant('softmax in the model')
def softmax_and_cross_entropy(net): return around(net, after=lambda o: o.softmax(1))      # H3


@plant('softmax in the model')
def softmax_and_nll(net): return around(net, after=lambda o: o.softmax(1)) | {'loss': nn.NLLLoss()}   # H1


@plant('logits to a loss of probabilities')
def logits_to_nll(net): return sound(net) | {'loss': nn.NLLLoss()}


@plant('log-softmax twice')
def log_softmax_twice(net): return around(net, after=lambda o: o.log_softmax(1))          # H3, harmless: a warning


@plant('target does not fit the loss')
def row_against_column(net):
    x, y = STANDARD(TRAIN.x[:640].float()/255), TRAIN.y[:640].float()
    args = sound(net, 1)
    return args | {'data': list(zip(x.split(64), y.split(64))), 'loss': nn.MSELoss()}


@plant('ReLU before the loss')
def relu_at_the_end(net): return around(net, after=F.relu)                                # H2


@plant('wrong number of classes')
def one_class_too_few(net): return sound(net, 9)


@plant('wrong number of classes')
def thousand_classes(net): return sound(net, 1000)


@plant('shapes do not fit', ('functional', 'vgg', 'plain vgg', 'lenet'))
def in_features_by_side(net):    # H6
    model = sound(net)['model']
    if net == 'functional': model.f1 = nn.Linear(64*4, 128)
    else: model[[isinstance(m, nn.Linear) for m in model].index(True)] = nn.Linear(64*4, 64)
    return with_model(model)


@plant('channels stand last', ('functional', 'vgg', 'residual', 'attention', *KEPT))
def channels_last(net): return sound(net) | {'data': loader(lambda x: STANDARD(x).permute(0, 2, 3, 1))}   # H8


@plant('range 0..255')
def bytes_as_floats(net): return sound(net) | {'data': loader(lambda x: x*255)}


@plant('wrong normalisation')
def divided_twice(net): return sound(net) | {'data': loader(lambda x: STANDARD(x/255))}


@plant('wrong normalisation')
def mean_in_bytes(net): return sound(net) | {'data': loader(lambda x: x - 125)}


@plant('not the expected normalisation')
def pretrained_on_raw(net):      # H25
    return sound(net) | {'data': loader(None), 'expected': ((.485, .456, .406), (.229, .224, .225))}


@plant('NaN in the data')
def nan_pixel(net):
    def spoil(x): return STANDARD(x).index_fill(3, torch.tensor([5]), float('nan'))
    return sound(net) | {'data': loader(spoil)}


@plant('one class only')
def one_class(net):
    i = TRAIN.y == 3
    return sound(net) | {'data': loader(images=replace(TRAIN, x=TRAIN.x[i], y=TRAIN.y[i]))}


@plant('labels do not go with the inputs')
def labels_shuffled(net):
    order = torch.randperm(len(TRAIN.y), generator=torch.Generator().manual_seed(len(net)))
    return sound(net) | {'data': loader(images=replace(TRAIN, y=TRAIN.y[order]))}


@plant('not shuffled')
def sorted_by_class(net):
    i = TRAIN.y.argsort()
    return sound(net) | {'data': loader(images=replace(TRAIN, x=TRAIN.x[i], y=TRAIN.y[i]), shuffle=False)}


@plant('random validation data')
def augmented_validation(net):   # H4, H19
    return sound(net) | {'valid': Loader(OTHER, 64, transform=STANDARD, augment=Augment(flip=True, shift=2))}


@plant('leak')
def train_in_validation(net):
    both = replace(OTHER, x=torch.cat([OTHER.x, TRAIN.x[:300]]), y=torch.cat([OTHER.y, TRAIN.y[:300]]))
    return sound(net) | {'valid': loader(images=both, shuffle=False)}


@plant('validation normalised otherwise')
def validation_left_raw(net): return sound(net) | {'valid': loader(None, OTHER, shuffle=False)}


@plant('weights not loaded')
def prefix_not_stripped(net):
    args = sound(net)
    return args | {'state_dict': {f'module.{k}': v for k, v in args['model'].state_dict().items()}}


@plant('random in eval mode')
def dropout_always(net): return around(net, before=lambda x: F.dropout(x, .2))


@plant('samples are mixed')
def view_for_permute(net):
    return around(net, before=lambda x: x.reshape(x.shape[1], len(x), *x.shape[2:]).transpose(0, 1))


@plant('detached graph', ('perceptron', 'functional', 'vgg', 'residual', *KEPT))
def detached(net):
    args = sound(net)
    weighted(args['model'])[1].register_forward_hook(lambda m, inputs, output: output.detach())
    return args


@plant('dead ReLUs', PLAIN)
def dead_layer(net):
    args = sound(net)
    nn.init.constant_(weighted(args['model'])[1].bias, -10.)
    return args


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, grad): return -grad


@plant('wrong backward')
def sign_error(net):
    args = sound(net)
    weighted(args['model'])[-1].register_forward_pre_hook(lambda m, inputs: (Reversed.apply(inputs[0]),))
    return args


@plant('learning rate too high')
def adam_too_high(net):
    args = sound(net)
    return args | {'optimizer': adam(args['model'], .1)}


@plant('learning rate too high')
def sgd_too_high(net):
    args = sound(net)
    return args | {'optimizer': torch.optim.SGD(args['model'].parameters(), 5., momentum=.9)}


@plant('learning rate too low')
def adam_too_low(net):
    args = sound(net)
    return args | {'optimizer': adam(args['model'], 1e-5)}


@plant('learning rate too low')
def sgd_too_low(net):
    args = sound(net)
    return args | {'optimizer': torch.optim.SGD(args['model'].parameters(), 1e-4)}


@plant('maximizing')
def maximize(net):
    args = sound(net)
    return args | {'optimizer': torch.optim.Adam(args['model'].parameters(), maximize=True)}


@plant('missing zero_grad')
def gradients_pile_up(net):
    def step(model, x, y, loss, optimizer):
        loss(model(x), y).backward()
        optimizer.step()
    return sound(net) | {'step': step}


@plant('left in eval mode')
def eval_in_training(net):       # H11
    def step(model, x, y, loss, optimizer):
        model.eval()
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    return sound(net) | {'step': step}


@plant('no backward')
def backward_forgotten(net):
    def step(model, x, y, loss, optimizer):
        optimizer.zero_grad()
        loss(model(x), y)
        optimizer.step()
    return sound(net) | {'step': step}
