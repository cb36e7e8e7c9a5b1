"""Chapters 14bb and 14c: weights that are hostile, damaged, renamed or published, and inputs on the wrong scale."""
import http.server
import io
import os
import pickle
import random
import struct
import sys
import tarfile
import threading
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from cnnbook import resnet, weight_files, weights
from cnnbook.blocks import BasicBlock
from cnnbook.disk import sha256
from cnnbook.files import DownloadError
from cnnbook.weights import (
    InputRecipe,
    WeightsError,
    backbone,
    find_weights,
    input_recipe,
    load_weights,
    named_digest,
    read_weights,
    verify_input,
)

BESIDE = Path(__file__).resolve().parents[2]/'shared'/'datasets'/'weights'   # where the real data sets lie packed
REAL = Path(os.environ.get('CNNBOOK_WEIGHTS') or BESIDE)


def net(seed=0, classes=10):
    torch.manual_seed(seed)
    return resnet.CifarResNet(BasicBlock, [1], classes, width=8)


def bits(model): return {k: v.numpy().tobytes() for k, v in model.state_dict().items()}


def saved(path, value, **options):
    torch.save(value, path, **options)
    return path


def refused(model, path, words, **how):
    before = bits(model)
    with pytest.raises(WeightsError) as caught: load_weights(model, path, **how)
    assert words in str(caught.value) and bits(model) == before
    return str(caught.value)


# --- names and shapes ---

def test_fault_48_names_empty_shape_missing_nan(tmp_path):
    state, model = net(1).state_dict(), net()
    n = len(state)
    counts = {k for k in state if 'num_batches' in k}
    report = load_weights(model, saved(tmp_path/'prefix.pth', {f'module.{k}': v for k, v in state.items()}))
    assert (report.matched, report.total) == (n, n) and bits(model) == bits(net(1))
    said = refused(net(), saved(tmp_path/'renamed.pth', {f'x.{k}': v for k, v in state.items()}), 'matched 0 of')
    ours, theirs = list(state)[:3], [f'x.{k}' for k in list(state)[:3]]
    assert all(name in said for name in theirs) and all(name in said for name in ours)
    refused(net(), saved(tmp_path/'renamed.pth', {f'x.{k}': v for k, v in state.items()}), 'matched 0 of', strict=False)
    refused(net(), saved(tmp_path/'empty.pth', {}), 'none among 0 keys')
    refused(net(), saved(tmp_path/'empty.pth', {'state_dict': {}}), 'none among')
    said = refused(net(classes=3), saved(tmp_path/'shape.pth', state), f'matched {n - 2} of {n}')
    assert 'fc.weight (3, 8) got (10, 8)' in said and 'fc.bias (3,) got (10,)' in said
    for name in set(state) - counts:
        less = saved(tmp_path/'less.pth', {k: v for k, v in state.items() if k != name})
        refused(net(), less, f'matched {n - 1} of {n}; 1 missing: {name}')
        for bad in (torch.nan, torch.inf, -torch.inf):
            value = state[name].clone()
            value.view(-1)[-1] = bad
            for strict in (True, False): refused(net(), saved(tmp_path/'nan.pth', state | {name: value}),
                                                 f'{name} holds 1 NaN or infinite', strict=strict)
        break
    bare = saved(tmp_path/'old.pth', {k: v for k, v in state.items() if k not in counts})
    assert load_weights(net(), bare).total == n - len(counts)          # files from before 2018 have no counts


@pytest.mark.parametrize('seed', range(20))
def test_random_rounds_loose_and_strict(tmp_path, seed):
    "Names dropped, added and reshaped at random: the report says exactly which, and only what fits has changed."
    dice, state = random.Random(seed), net(seed + 1).state_dict()
    names = [k for k in state if 'num_batches' not in k]
    dropped, reshaped = set(dice.sample(names, dice.randint(0, 4))), set(dice.sample(names, dice.randint(0, 3)))
    reshaped -= dropped
    added = {f'aux.{i}': torch.ones(i + 1) for i in range(dice.randint(0, 3))}
    file = {k: torch.zeros(5, 7) if k in reshaped else v for k, v in state.items() if k not in dropped} | added
    items = list(file.items())
    dice.shuffle(items)
    path = saved(tmp_path/'net.pth', {'epoch': 3, 'model': {dice.choice(['', 'module.', '_orig_mod.']) + k: v
                                                            for k, v in items}})
    faults = dropped | reshaped | set(added)
    if faults: refused(net(), path, f'matched {len(state) - len(dropped | reshaped)} of {len(state)}')
    model, before = net(), bits(net())
    report = load_weights(model, path, strict=bool(not faults))
    assert set(report.missing) == dropped and set(report.unexpected) == set(added) and report.inside == 'model'
    assert {m[0] for m in report.misshaped} == reshaped and all(m[2] == (5, 7) for m in report.misshaped)
    assert report.matched == len(state) - len(dropped | reshaped) and report.total == len(state)
    for k, v in bits(model).items(): assert v == (before if k in dropped | reshaped else bits(net(seed + 1)))[k]


def test_wrappings_types_and_oddities(tmp_path):
    state = net(1).state_dict()
    for wrap in ({'state_dict': state}, {'epoch': 1, 'model_state_dict': state}, {'model': {'state_dict': state}},
                 {'model_ema': state, 'args': {'lr': .1}}):
        assert load_weights(net(), saved(tmp_path/'w.pth', wrap)).matched == len(state)
    both = saved(tmp_path/'both.pth', {'model': state, 'model_ema': net(2).state_dict()})
    model = net()
    assert load_weights(model, both).inside == 'model' and bits(model) == bits(net(1))
    assert load_weights(model, both, key='model_ema').inside == 'model_ema' and bits(model) == bits(net(2))
    circle = {}
    circle['model'] = circle
    refused(net(), saved(tmp_path/'circle.pth', circle), 'none among 1 keys')
    double = saved(tmp_path/'double.pth', {k: v.double() if v.is_floating_point() else v for k, v in state.items()})
    assert load_weights(model, double).matched == len(state) and model.fc.weight.dtype == torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        refused(net(), saved(tmp_path/'s.pth', state | {'fc.bias': torch.ones(10).to_sparse()}), 'no dense tensor')
    refused(net(), saved(tmp_path/'m.pth', state | {'fc.bias': torch.ones(10, device='meta')}), 'no dense tensor')
    refused(net(), saved(tmp_path/'c.pth', state | {'fc.bias': torch.ones(10).cfloat()}), 'complex64 for')
    refused(net(), saved(tmp_path/'n.pth', state | {'fc.bias': 3}), 'fc.bias (10,) got int')
    refused(net(), saved(tmp_path/'t.pth', state | {'module.fc.bias': torch.ones(10)}), 'two for fc.bias')
    wrapped = nn.DataParallel(net())
    assert load_weights(wrapped, double).matched == len(state)
    half, big = net().half(), saved(tmp_path/'big.pth', state | {'fc.bias': torch.full((10,), 70_000.)})
    refused(half, big, 'fc.bias holds 10 NaN or infinite')


def test_old_names_of_densenet(tmp_path):
    theirs = torchvision.models.densenet121(num_classes=3)
    old = {k.replace('norm1', 'norm.1').replace('norm2', 'norm.2').replace('conv1', 'conv.1').replace('conv2', 'conv.2')
           if 'denselayer' in k else k: v for k, v in theirs.state_dict().items()}
    assert set(old) != set(theirs.state_dict())
    from cnnbook.stacked import densenet121
    ours = densenet121(3)
    report = load_weights(ours, saved(tmp_path/'densenet.pth', old))
    assert report.matched == len(old) and bits(ours) == bits(theirs)


# --- hostile and damaged files ---

class Call:
    def __init__(self, *call): self.call = call
    def __reduce__(self): return self.call[0], self.call[1:]


class Build:
    "Runs through the state of an object, in place of a function's arguments."
    def __reduce__(self): return os.putenv, ('CNNBOOK_HOSTILE', 'ran'), {'x': 1}


def gadgets(mark):
    code, touch = f"open({str(mark)!r}, 'w').close()", f'touch {mark}'.encode()
    yield 'system', pickle.dumps(Call(os.system, f'touch {mark}'), 2)
    yield 'exec', pickle.dumps({'w': Call(exec, code)}, 2)
    yield 'eval', pickle.dumps([Call(eval, code)], 2)
    yield 'build', pickle.dumps(Build(), 2)
    yield 'nested', pickle.dumps({'state_dict': {'w': Call(os.listdir, '.')}}, 2)
    yield 'torch', pickle.dumps(Call(torch.load, str(mark.with_name('second.pth'))), 2)
    yield 'open', b'cbuiltins\nopen\n(V%b\nVw\ntR.' % str(mark).encode()
    yield 'inst', b'(V%b\nios\nsystem\n.' % touch
    yield 'obj', b'(cos\nsystem\nVtouch %b\no.' % str(mark).encode()
    yield 'stack', b'\x80\x04\x8c\x02os\x8c\x06system\x93\x8c%c%b\x85R.' % (len(touch), touch)


def old_start():
    "What stands in a file of torch before 1.6 ahead of the weights: a magic number, a version, the machine."
    return b''.join(pickle.dumps(v, 2) for v in (
        0x1950a86a20f9469cfc6c, 1001,
        {'protocol_version': 1001, 'little_endian': True, 'type_sizes': {'short': 2, 'int': 4, 'long': 4}}))


def test_hostile_pickles_do_not_run(tmp_path):
    "Bare, behind torch's old beginning, inside torch's zip, and as an object in an .npz."
    mark, good = tmp_path/'ran', saved(tmp_path/'good.pth', net().state_dict())
    innocent = io.BytesIO()
    torch.save({}, innocent, _use_new_zipfile_serialization=False)
    assert innocent.getvalue().startswith(old_start())
    model = net()
    before = bits(model)
    assert len(list(gadgets(mark))) == 10
    for name, data in gadgets(mark):
        files = [tmp_path/f'{name}.pt', tmp_path/f'{name}.bin', tmp_path/f'{name}.th', tmp_path/f'{name}.tar']
        files[0].write_bytes(data)
        with zipfile.ZipFile(good) as z, zipfile.ZipFile(files[1], 'w') as out:
            for part in z.namelist(): out.writestr(part, data if part.endswith('data.pkl') else z.read(part))
        files[2].write_bytes(old_start() + data + pickle.dumps([], 2))
        with tarfile.open(files[3], 'w') as t:
            info = tarfile.TarInfo('pickle')
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
        for file in files:
            for strict in (True, False):
                with pytest.raises(WeightsError, match=r'refused'): load_weights(model, file, strict)
            assert not mark.exists() and 'CNNBOOK_HOSTILE' not in os.environ, file
    np.savez(tmp_path/'hostile.npz', w=np.array([Call(os.system, f'touch {mark}')], dtype=object))
    refused(model, tmp_path/'hostile.npz', 'allow_pickle')
    assert not mark.exists() and bits(model) == before


def test_gadgets_would_run(tmp_path):
    "The test above means something: by pickle, most of them do what they are made for."
    ran = 0
    for name, data in gadgets(tmp_path/'ran'):
        if name in ('build', 'nested', 'torch'): continue           # these leave no file behind
        try: pickle.loads(data)
        except Exception: pass
        ran += (tmp_path/'ran').exists()
        (tmp_path/'ran').unlink(missing_ok=True)
    assert ran >= 6


def test_programs_and_strangers_are_refused(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path/'script.pt'))
    refused(net(), tmp_path/'script.pt', 'TorchScript, a program')
    refused(net(), saved(tmp_path/'whole.pt', nn.Linear(2, 2)), 'refused')            # a whole module, not its weights
    for name in ('a.pth', 'a.safetensors', 'a.npz', 'a.th'):
        for data, words in ((b'', 'refused'), (b'<html>', 'got HTML'), (b'\n <!DOCTYPE html>', 'got HTML'),
                            (b'version https://git-lfs.github.com/spec/v1\n', 'refused'), (bytes(1000), 'refused')):
            (tmp_path/name).write_bytes(data)
            refused(net(), tmp_path/name, words)
    with zipfile.ZipFile(tmp_path/'two.pth', 'w') as z, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for _ in range(2): z.writestr('a/data.pkl', b'.')
    refused(net(), tmp_path/'two.pth', 'two parts of one name')
    with zipfile.ZipFile(saved(tmp_path/'g.pth', net().state_dict())) as z, zipfile.ZipFile(
            tmp_path/'packed.pth', 'w', zipfile.ZIP_DEFLATED) as out:
        for part in z.namelist(): out.writestr(part, z.read(part))
    refused(net(), tmp_path/'packed.pth', 'a changed size')
    with pytest.raises(FileNotFoundError, match='expected a file'): load_weights(net(), tmp_path)
    with pytest.raises(ValueError, match='expected one of .npz'): load_weights(net(), __file__)


def test_a_tar_that_begins_like_old_torch_is_not_opened(tmp_path, monkeypatch):
    "Its first member is called by the bytes of torch's old beginning; up to torch 2.5.1 reading it could run code."
    path, opened = tmp_path/'net.th', []
    first = weight_files._OLD.decode('utf-8', 'surrogateescape')
    with tarfile.open(path, 'w', format=tarfile.GNU_FORMAT) as t:
        for name in (first, 'storages', 'tensors', 'pickle'): t.addfile(tarfile.TarInfo(name))
    assert path.read_bytes().startswith(weight_files._OLD) and tarfile.is_tarfile(path)
    monkeypatch.setattr(tarfile, 'open', lambda *args, **options: opened.append(args))
    refused(net(), path, 'refused')
    assert not opened


@pytest.mark.parametrize('was,now', [(b"'<f4'", b"'<f2'"), (b'(300, 300)', b'(100, 300)')])
def test_npz_whose_header_asks_for_less_is_refused(tmp_path, was, now):
    "Of a large array numpy then reads a part, and never comes to the checksum."
    np.savez(tmp_path/'net.npz', weight=np.ones((300, 300), '<f4'))
    data = (tmp_path/'net.npz').read_bytes()
    assert data.count(was) == 1
    (tmp_path/'net.npz').write_bytes(data.replace(was, now))
    with pytest.raises(WeightsError, match='a wrong checksum of weight.npy'): read_weights(tmp_path/'net.npz')


@pytest.mark.parametrize('ending,n', [('.pth', 500), ('.npz', 150)])
def test_500_byte_flips_load_equal_or_are_refused(tmp_path, ending, n):
    state, path, dice = net(1).state_dict(), tmp_path/f'net{ending}', random.Random(0)
    if ending == '.npz': np.savez(path, **{k: v.numpy() for k, v in state.items()})
    else: torch.save(state, path)
    data, wanted, model, ends = path.read_bytes(), bits(net(1)), net(), []
    places = [dice.randrange(len(data)) for _ in range(n - n//5)] + [-dice.randrange(1, 1500) for _ in range(n//5)]
    for at in places:
        spoilt = bytearray(data)
        spoilt[at] ^= dice.randrange(1, 256)
        path.write_bytes(spoilt)
        before = bits(model)
        try: load_weights(model, path)
        except WeightsError as e:
            assert path.name in str(e) and bits(model) == before
            ends.append('refused')
        else:
            assert bits(model) == wanted, at
            ends.append('equal')
            model = net()
    assert len(ends) == n and ends.count('refused') > .3*n


def test_cut_anywhere_is_refused(tmp_path):
    state, dice = net(1).state_dict(), random.Random(1)
    for ending in ('.pth', '.npz', '.safetensors', '.th'):
        path = tmp_path/f'net{ending}'
        if ending == '.npz': np.savez(path, **{k: v.numpy() for k, v in state.items()})
        elif ending == '.safetensors': save_file(state, path)
        else: torch.save(state, path, _use_new_zipfile_serialization=ending == '.pth')
        data = path.read_bytes()
        for n in [1, 2, len(data) - 1] + [dice.randrange(len(data)) for _ in range(15)]:
            path.write_bytes(data[:n])
            refused(net(), path, path.name)


def test_damage_that_only_a_digest_finds(tmp_path):
    "Old torch and safetensors keep no checksum: one bit passes, unless the name or the caller knows better."
    state = net(1).state_dict()
    for ending in ('.safetensors', '.th'):
        path = tmp_path/f'net{ending}'
        if ending == '.safetensors': save_file(state, path)
        else: torch.save(state, path, _use_new_zipfile_serialization=False)
        digest, data = sha256(path), bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
        assert load_weights(net(), path).matched == len(state)
        refused(net(), path, f'expected sha256 {digest}', digest=digest)
        refused(net(), path.rename(tmp_path/f'net-{digest[:8]}{ending}'), f'expected sha256 {digest[:8]}, got')


def test_formats_agree_with_their_own_readers(tmp_path):
    g = torch.Generator().manual_seed(0)
    state = {'a': torch.randn(3, 4, generator=g), 'b': torch.tensor(7), 'c': torch.randn(0, 2, generator=g),
             'd': torch.randn(5, generator=g).half(), 'e': torch.tensor([True, False])}
    save_file(state, tmp_path/'x.safetensors')
    np.savez_compressed(tmp_path/'x.npz', **{k: v.numpy() for k, v in state.items()})
    saved(tmp_path/'x.pth', state), saved(tmp_path/'x.pth.tar', state)
    for path in tmp_path.iterdir():
        found, _ = read_weights(path)
        assert {k: (v.dtype, v.shape, v.numpy().tobytes()) for k, v in found.items()} == {
            k: (v.dtype, v.shape, v.numpy().tobytes()) for k, v in state.items()}
    assert load_file(tmp_path/'x.safetensors').keys() == state.keys()
    np.savez(tmp_path/'big-endian.npz', a=np.arange(3, dtype='>f4'))
    assert read_weights(tmp_path/'big-endian.npz')[0]['a'].tolist() == [0, 1, 2]
    from cnnbook.checkpoint import save_checkpoint
    save_checkpoint(tmp_path/'ours.ckpt', {'state_dict': net(1).state_dict(), 'epoch': 3})    # of chapter 06
    assert load_weights(net(), tmp_path/'ours.ckpt').inside == 'state_dict'
    (tmp_path/'long.safetensors').write_bytes(struct.pack('<Q', 15392) + b' '*100)   # begins with a space and a <
    refused(net(), tmp_path/'long.safetensors', 'refused')


def test_safetensors_that_is_not_installed(tmp_path, monkeypatch):
    save_file(net().state_dict(), tmp_path/'x.safetensors')
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    with pytest.raises(ImportError, match='x.safetensors: expected safetensors installed'):
        load_weights(net(), tmp_path/'x.safetensors')


# --- finding and fetching ---

@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv('CNNBOOK_DATA', str(tmp_path/'data'))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'torch'))
    monkeypatch.delenv('CNNBOOK_WEIGHTS', raising=False)
    return tmp_path/'data'


def test_fault_47_wrong_digest_or_none(root, tmp_path, monkeypatch):
    source = saved(tmp_path/'resnet20.pth', resnet.resnet20().state_dict())
    right, wrong = tmp_path/f'resnet20-{sha256(source)[:8]}.pth', tmp_path/'resnet20-deadbeef.pth'
    for path in (right, wrong): path.write_bytes(source.read_bytes())
    hits = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args): super().__init__(*args, directory=tmp_path)
        def log_message(self, *args): hits.append(args)

    monkeypatch.setattr(weights, '_url', lambda name: wrong.as_uri())
    with pytest.raises(WeightsError, match=f'expected sha256 deadbeef, got {sha256(source)[:8]}: not kept'):
        backbone('resnet20')
    assert list((root/'weights').iterdir()) == []                      # not cached
    monkeypatch.setattr(weights, '_url', lambda name: source.as_uri())
    with pytest.raises(WeightsError, match='a name with a digest'): backbone('resnet20')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv('CNNBOOK_OFFLINE', '')
        monkeypatch.setattr(weights, '_url', lambda name: f'http://127.0.0.1:{server.server_port}/{right.name}')
        with pytest.raises(WeightsError, match='expected https'): backbone('resnet20')
        server.shutdown()
    assert hits == []                                                  # http is not even asked
    monkeypatch.setattr(weights, '_url', lambda name: right.as_uri())
    model = backbone('resnet20')
    assert [p.name for p in (root/'weights').iterdir()] == [right.name] and find_weights('resnet20').name == right.name
    assert bits(model) == {k: v.numpy().tobytes() for k, v in torch.load(right, weights_only=True).items()}


def test_fault_18_offline_and_nothing_at_hand(root, monkeypatch):
    monkeypatch.setenv('CNNBOOK_OFFLINE', '1')
    with pytest.raises(DownloadError) as caught: backbone('resnet18')
    assert 'resnet18-f37072fd.pth' in str(caught.value) and str(root/'weights') in str(caught.value)
    monkeypatch.setenv('CNNBOOK_OFFLINE', '')
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')
    with pytest.raises(DownloadError, match='no connection') as caught: backbone('resnet18')
    assert str(root/'weights'/'resnet18-f37072fd.pth') in str(caught.value) and list((root/'weights').iterdir()) == []


def test_fault_16_a_root_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path/'Daten für alle').write_text('a file, not a folder')
    monkeypatch.setenv('CNNBOOK_DATA', str(tmp_path/'Daten für alle'))
    monkeypatch.setattr(weights, '_url', lambda name: 'file:///net-12fca82f.pth')
    with pytest.raises(DownloadError, match='Daten für alle'): backbone('resnet20')


def test_published_file_wins_wherever_it_lies(root, tmp_path, monkeypatch):
    cache = tmp_path/'torch'/'hub'/'checkpoints'
    cache.mkdir(parents=True)
    (cache/'resnet50-11ad3fa6.pth').touch()
    (cache/'resnet50-0676ba61.pth').touch()                             # older: another recipe
    assert find_weights('resnet50') == cache/'resnet50-11ad3fa6.pth' and find_weights('resnet34') is None
    (root/'weights').mkdir(parents=True)
    (root/'weights'/'resnet50-0676ba61.pth').touch()
    (root/'weights'/'resnet50_a1_0-14fe96d1.pth').touch()               # timm's
    assert find_weights('resnet50') == cache/'resnet50-11ad3fa6.pth'
    name = torchvision.models.MNASNet0_5_Weights.DEFAULT.url.rpartition('/')[2]
    (root/'weights'/name).touch()                                       # mnasnet0.5, where the network is mnasnet0_5
    assert not name.startswith('mnasnet0_5') and find_weights('mnasnet0_5').name == name
    monkeypatch.setenv('CNNBOOK_WEIGHTS', str(tmp_path/'mine'))
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'resnet50.safetensors').touch()
    assert find_weights('resnet50') == tmp_path/'mine'/'resnet50.safetensors'


def test_every_published_name_carries_its_digest():
    models = torchvision.models
    for name in models.list_models(module=models):
        for entry in models.get_model_weights(name):
            assert len(named_digest(entry.url.rpartition('/')[2])) >= 8, entry.url


def test_timm_when_it_is_there(root):
    timm = pytest.importorskip('timm')
    model = backbone('timm.resnet18', weights=None)
    assert type(model) is timm.models.resnet.ResNet and type(backbone('resnet18', None)) is resnet.ResNet
    cfg = timm.get_pretrained_cfg('resnet50')
    recipe = input_recipe('timm.resnet50')
    assert (recipe.size, recipe.mean, recipe.interpolation) == (224, cfg.mean, cfg.interpolation)
    (root/'weights').mkdir(parents=True)
    state = timm.create_model('resnet18', num_classes=1000).state_dict()
    saved(root/'weights'/'resnet18.pth', state)
    assert bits(backbone('timm.resnet18')) == {k: v.numpy().tobytes() for k, v in state.items()}
    assert input_recipe('timm.vit_base_patch16_224').mean == (.5, .5, .5)


def test_googlenet_scales_its_input_when_weights_come_from_a_file(tmp_path):
    theirs = torchvision.models.googlenet(weights=None, init_weights=False, transform_input=True)
    model = backbone('googlenet', saved(tmp_path/'g.pth', theirs.state_dict()))
    assert model.transform_input and bits(model) == bits(theirs)
    assert not backbone('googlenet', weights=None).transform_input


# --- the input ---

def test_fault_50_wrong_scale_size_channels():
    recipe, g = input_recipe('resnet18'), torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 224, 224, generator=g)
    for batch, words in ((255*x, 'bytes'), ((255*x).byte(), 'bytes'), (x, 'not normalised'),
                         (recipe.transform(x)[:, :1], '3 channels, got 1'),
                         (recipe.transform(x)[..., :64], 'got (224, 64)'), (x.round()*2 - 1, '-1..1')):
        with pytest.warns(UserWarning) as caught: said = verify_input(batch, recipe)
        assert words in str(caught[0].message) and any(words in s for s in said)
    with pytest.warns(UserWarning, match=r'mean \(0.485, 0.456, 0.406\) and std \(0.229'): verify_input(x, recipe)


@pytest.mark.parametrize('name', ['resnet18', 'resnet50', 'efficientnet_b0', 'inception_v3', 'vit_h_14', 'resnet20'])
def test_a_right_batch_is_never_warned_of(name):
    "Fifty batches of drawn scenes of any contrast and tint, some of one colour."
    from cnnbook.world import shapes
    recipe, g = input_recipe(name), torch.Generator().manual_seed(1)
    small = InputRecipe(48, recipe.mean, recipe.std, recipe.interpolation, resize=50)
    scenes = shapes(100, size=64, seed=2).x.float()/255
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for x in scenes.split(2):
            low = torch.rand(3, 1, 1, generator=g)*.3
            x = torch.cat((low + (1 - low)*x*torch.rand(3, 1, 1, generator=g), torch.zeros(1, 3, 64, 64)))
            assert verify_input(small.transform(x), small) == []


def test_recipes_equal_every_preset_of_torchvision():
    models, x = torchvision.models, torch.rand(1, 3, 60, 70, generator=torch.Generator().manual_seed(0))
    for name in models.list_models(module=models):
        for entry in models.get_model_weights(name):
            t, recipe = entry.transforms(), input_recipe(entry)
            assert (recipe.size, recipe.resize, list(recipe.mean), list(recipe.std), recipe.interpolation) == (
                t.crop_size[0], t.resize_size[0], list(t.mean), list(t.std), t.interpolation.value)
    for entry in (models.ResNet18_Weights.DEFAULT, models.EfficientNet_B3_Weights.DEFAULT):
        torch.testing.assert_close(input_recipe(entry).transform(x), entry.transforms()(x))


# --- published weights ---

@pytest.mark.real
def test_published_resnet20_on_cifar10(monkeypatch):
    "91.73 % is what its author reports; by name alone, the file found, its digest checked, its recipe applied."
    if not os.environ.get('CNNBOOK_DATA'): pytest.skip('CNNBOOK_DATA is not set')
    if not (REAL/'resnet20-12fca82f.th').exists(): pytest.skip('CNNBOOK_WEIGHTS: expected the published resnet20')
    monkeypatch.setenv('CNNBOOK_WEIGHTS', str(REAL))
    from cnnbook.data import Loader, load
    model, recipe = backbone('resnet20').eval(), input_recipe('resnet20')
    test = load('cifar10', train=False, download=False)
    with torch.no_grad():
        hits = sum((model(x).argmax(1) == y).sum().item()
                   for x, y in Loader(test, batch_size=500, transform=recipe.transform))
    assert len(test.y) == 10_000 and hits == pytest.approx(9173, abs=5)


@pytest.mark.real
def test_published_squeezenet_from_npz(monkeypatch):
    if not (REAL/'squeezenet1_0_imagenet_torchvision.npz').exists(): pytest.skip('CNNBOOK_WEIGHTS: expected the .npz')
    monkeypatch.setenv('CNNBOOK_WEIGHTS', str(REAL))
    ours, theirs = backbone('squeezenet1_0').eval(), torchvision.models.squeezenet1_0().eval()
    report = load_weights(theirs, find_weights('squeezenet1_0'))
    assert (report.matched, report.total, report.format) == (52, 52, '.npz')
    x = input_recipe('squeezenet1_0').transform(torch.rand(2, 3, 300, 256, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad(): torch.testing.assert_close(ours(x), theirs(x))
