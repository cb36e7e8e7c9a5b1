"""What the cells do not say of `cnnbook.frozen` and `cnnbook.heads`: all of torchvision, timm, whole runs, faults."""
import copy
import io
import pickle

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.regnet import BlockParams

from cnnbook import classics, heads
from cnnbook.callbacks import ModelCheckpoint
from cnnbook.frozen import find_heads
from cnnbook.heads import freeze, parameter_groups, replace_head, unfreeze
from cnnbook.mlp import MLP
from cnnbook.resnet import resnet20
from cnnbook.trainer import Trainer

NAMES = torchvision.models.list_models(module=torchvision.models)


def on_meta(name):
    "Any of torchvision's classifiers without values; first weights are not drawn, which would take most of the time."
    widths = BlockParams.from_init_params                                       # reads values, so it needs a device

    def on_cpu(*args, **options):
        with torch.device('cpu'): return widths(*args, **options)

    options = {'init_weights': False} if name in ('googlenet', 'inception_v3') else {}
    with pytest.MonkeyPatch.context() as patch, torch.device('meta'):
        patch.setattr(BlockParams, 'from_init_params', on_cpu)
        for draw in [n for n in dir(nn.init) if n.endswith('_') and not n.startswith('_')]:
            patch.setattr(nn.init, draw, lambda *args, **options: args[0] if args else options['tensor'])
        return torchvision.models.get_model(name, **options)


def learns(model): return {name for name, p in model.named_parameters() if p.requires_grad}
def hooks(model): return sum(len(m._forward_pre_hooks) for m in model.modules())


def test_there_are_as_many_as_ever():
    assert len(NAMES) >= 80 and {'vit_h_14', 'swin_v2_b', 'maxvit_t', 'regnet_y_128gf', 'inception_v3'} <= {*NAMES}


@pytest.mark.parametrize('name', NAMES)
def test_every_classifier_of_torchvision(name):
    model = on_meta(name)
    keys, found, whole = list(model.state_dict()), find_heads(model), learns(model)
    old = {at: model.get_submodule(at) for at in found}
    assert all(len(layer.weight) == 1000 for layer in old.values())             # they do give ImageNet's scores
    assert len(found) == {'googlenet': 3, 'inception_v3': 2}.get(name, 1)
    assert replace_head(model, 7) is model and list(model.state_dict()) == keys
    assert sum(1000 in p.shape for p in model.parameters()) == 0                # nothing is left of the old scores
    for at in found:
        new = model.get_submodule(at)
        assert new is not old[at] and type(new) is type(old[at]) and len(new.weight) == 7 and new.weight.is_meta
        assert new.weight.shape[1:] == old[at].weight.shape[1:] and (new.bias is None) == (old[at].bias is None)
    assert freeze(model) is model and list(model.state_dict()) == keys
    assert {n.rpartition('.')[0] for n in learns(model)} == {*found}
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert all(len(m._forward_pre_hooks) == 1 and not m.training for m in norms)
    assert all(not model.get_submodule(at)._forward_pre_hooks for at in found) and model.training
    groups = parameter_groups(model, .1, frozen=True)
    assert sorted(n for g in groups for n in g['names']) == sorted(n for n, _ in model.named_parameters())
    assert sorted(n for g in parameter_groups(model, .1) for n in g['names']) == sorted(learns(model))
    assert unfreeze(model) is model and learns(model) == whole and not hooks(model)
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize('name', ['resnet18', 'mobilenet_v3_small', 'squeezenet1_1', 'densenet121', 'googlenet',
                                  'shufflenet_v2_x0_5'])
def test_a_pass_and_a_step(name):
    torch.manual_seed(0)
    options = {'init_weights': False} if name == 'googlenet' else {}
    model = freeze(replace_head(torchvision.models.get_model(name, **options), 5)).train()
    before, x = copy.deepcopy(model.state_dict()), torch.randn(2, 3, 64, 64)
    out = model(x)
    scores = [out] if torch.is_tensor(out) else [s for s in out if s is not None]
    assert all(s.shape == (2, 5) for s in scores) and len(scores) == len(find_heads(model))
    sum(s.square().sum() for s in scores).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == learns(model)
    torch.optim.SGD(model.parameters(), .1, weight_decay=.1).step()
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved and moved <= learns(model)                                     # no buffer among them


def toy():
    "Convolutions with every kind of layer that has modes."
    torch.manual_seed(0)
    block = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.Dropout(.3), nn.ReLU())
    head = nn.Dropout(.5), nn.Linear(8, 4)
    return nn.Sequential(block(3, 8), block(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)


def data(seed=0, n=24, size=8):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 3, 8, 8, generator=g), torch.randint(0, 4, (n,), generator=g)
    return list(zip(x.split(size), y.split(size)))


def fit(model, optimizer, epochs=2, callbacks=(), folder=None, **options):
    keep = [ModelCheckpoint(dirpath=folder, save_last=True)] if folder else []
    trainer = Trainer(max_epochs=epochs, callbacks=[*callbacks, *keep], enable_progress_bar=False)
    trainer.fit(model, data(), None, optimizer, nn.CrossEntropyLoss(), **options)
    return trainer


@pytest.mark.parametrize('seed', range(3))
def test_fault_49_frozen_norms_stay_to_the_bit(seed):
    model = freeze(toy())
    before = copy.deepcopy(model.state_dict())
    fit(model, torch.optim.AdamW(model.parameters(), .1, weight_decay=.1), 4)
    for _ in range(3): model.train()(5*torch.randn(4, 3, 8, 8))                  # also without a trainer
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {'5.weight', '5.bias'}
    body = model[:4].train()
    assert torch.equal(body(x := torch.randn(4, 3, 8, 8)), body(x))              # no dropout, no batch statistics
    assert model.train()[4].training                                            # the one before the head goes on


def test_fault_51_head_and_classes():
    with pytest.raises(ValueError, match='expected 5 scores, one for each class, got 4'): heads.verify_head(toy(), 5)
    with pytest.raises(ValueError, match='expected 2 scores, one for each class, got 4'):
        heads.verify_head(toy(), ['cat', 'dog'])
    assert heads.verify_head(replace_head(toy(), 2), ['cat', 'dog']) == 2


@pytest.mark.parametrize('make', [lambda p: torch.optim.SGD(p, .1, momentum=.9, weight_decay=.1),
                                  lambda p: torch.optim.AdamW(p, .01, weight_decay=.1)], ids=['sgd', 'adamw'])
def test_fault_52_optimizer_made_before_unfreezing(make):
    model = toy()
    optimizer = make(model.parameters())
    fit(model, optimizer, 1)                                                    # so there are gradients and momenta
    freeze(model)
    before = copy.deepcopy(model.state_dict())
    fit(model, optimizer, 2)
    assert {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])} == {'5.weight', '5.bias'}
    fit(unfreeze(model, '1'), optimizer, 1)
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {n for n in before if n[0] in '15'}


def test_gradual_runs_go_on_exactly(tmp_path):
    def run(epochs, folder, **options):
        model = toy()
        optimizer = torch.optim.AdamW(parameter_groups(model, .01, frozen=True))
        fit(model, optimizer, epochs, [heads.unfreeze_gradually(model)], folder, **options)
        return model
    whole, part = run(4, tmp_path/'a'), run(2, tmp_path/'b')
    again = run(4, tmp_path/'b', ckpt_path='last')
    differ = lambda a, b: {n for n, t in a.state_dict().items() if not torch.equal(t, b.state_dict()[n])}
    assert differ(part, again) and not differ(whole, again) and learns(again) == learns(whole)


def test_gradual_stages_move_when_it_is_their_turn():
    model, seen = toy(), []
    note = type('Note', (heads.Callback,), {'on_train_epoch_end': lambda self, t, m: seen.append(
        (learns(m), copy.deepcopy(m.state_dict())))})
    optimizer = torch.optim.SGD(parameter_groups(model, .1, frozen=True), .1, momentum=.9)
    start = copy.deepcopy(model.state_dict())
    fit(model, optimizer, 4, [heads.UnfreezeGradually(['1', '0'], every=1), note()])
    moved = [{n[0] for n, t in state.items() if not torch.equal(t, start[n])} for _, state in seen]
    assert moved == [{'5'}, {'1', '5'}, {'0', '1', '5'}, {'0', '1', '5'}]
    assert [{n[0] for n in names} for names, _ in seen] == moved


def test_copies_and_files_keep_the_model_still():
    model = freeze(toy())
    state = io.BytesIO()
    torch.save(model.state_dict(), state)
    state.seek(0)
    plain = toy()
    plain.load_state_dict(torch.load(state, weights_only=True), strict=True)    # the names are those of any such model
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = copy.deepcopy(twin.state_dict())
        twin.train()(torch.randn(4, 3, 8, 8))
        assert all(torch.equal(t, before[n]) for n, t in twin.state_dict().items())
        unfreeze(twin)
        twin(torch.randn(4, 3, 8, 8))
        assert not torch.equal(twin[0][1].running_mean, before['0.1.running_mean']) and not hooks(twin) and hooks(model)


def test_other_hooks_stay():
    model, calls = toy(), []
    model[0].register_forward_pre_hook(lambda m, args: calls.append(m.training))
    freeze(freeze(model))
    assert hooks(model) == 1 + 10                                # twice does no harm: one each
    model.train()(torch.randn(2, 3, 8, 8))
    unfreeze(model)(torch.randn(2, 3, 8, 8))
    assert len(calls) == 2 and hooks(model) == 1


def test_parts_of_the_book_and_odd_ends():
    for net, name in ((classics.lenet5(), 'classifier.2'), (resnet20(), 'fc'), (MLP(4, (8,), 3), None)):
        found = heads.find_head(net)
        assert name in (None, found) and len(replace_head(net, 2).get_submodule(found).weight) == 2
    shared = nn.Linear(4, 3)
    two = nn.ModuleDict({'a': nn.Linear(4, 4), 'b': shared, 'c': shared})        # one layer under two names
    replace_head(two, 2)
    assert two['b'] is two['c'] and len(two['b'].weight) == 2
    backbone = nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])
    before = copy.deepcopy(backbone.state_dict())
    for do in (lambda m: replace_head(m, 3), freeze, heads.find_stages, lambda m: parameter_groups(m, .1)):
        with pytest.raises(ValueError, match=r'ends with a Linear or a 1 x 1 convolution, got BatchNorm2d 7\.1\.bn2'):
            do(backbone)
    assert all(torch.equal(t, before[n]) for n, t in backbone.state_dict().items()) and len(learns(backbone)) == 60
    alone = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(4, 2))
    assert len(learns(freeze(alone))) == 2 and not hooks(alone)                  # nothing before the head
    for odd in (nn.Linear(2, 2), nn.Sequential(), nn.Identity(), nn.Sequential(nn.Conv2d(3, 4, 3))):
        with pytest.raises(ValueError, match='ends with a Linear'): replace_head(odd, 2)
    with pytest.raises(TypeError, match='model: expected an nn.Module, got str'): replace_head('resnet18', 2)


def test_groups_agree_with_the_chapter_on_optimizers():
    from cnnbook.held import decay_groups
    for model in (toy(), resnet20(), torchvision.models.squeezenet1_1()):
        ours = {id(p) for g in parameter_groups(model, .1) if g['weight_decay'] for p in g['params']}
        assert ours == {id(p) for g in decay_groups(model, .01) if g['weight_decay'] for p in g['params']}


TIMM = ['resnet18', 'vit_tiny_patch16_224', 'convnext_atto', 'mobilenetv3_small_050', 'levit_128s', 'resnetv2_50',
        'deit_tiny_distilled_patch16_224']


@pytest.mark.parametrize('name', TIMM)
def test_networks_of_timm(name):
    timm = pytest.importorskip('timm')
    with torch.device('meta'): model = timm.create_model(name)
    keys = list(model.state_dict())
    freeze(replace_head(model, 6))
    assert list(model.state_dict()) == keys and model.num_classes == 6
    assert {n.rpartition('.')[0] for n in learns(model)} == {*find_heads(model)}
    with torch.device('meta'): x = torch.randn(2, 3, *model.default_cfg['input_size'][1:])
    assert model.eval()(x).shape == (2, 6)
