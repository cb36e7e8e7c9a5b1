"""From photographs that nobody has tidied up to a classifier; the parts of transfer together, against plain rules."""
import copy
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cnnbook import transfer
from cnnbook.data import Loader, split
from cnnbook.folders import image_folder
from cnnbook.images import Images
from cnnbook.transfer import (
    advise,
    backbone,
    check_test_view,
    check_told_apart,
    freeze,
    input_recipe,
    measure_cases,
    pick_classes,
    pick_few,
    replace_head,
    share_right,
    train_on,
    transfer_ways,
    verify_input,
)
from cnnbook.whiten import Standardize
from cnnbook.world import shapes

CLASSES = {'Große Ringe': 'ring', 'Mond (süß)': 'moon', 'a red cross': 'cross'}


def net(num_classes, width=12):
    "A small network in torchvision's manner: features, a pool, a classifier behind a dropout."
    stage = lambda a, b, *more: [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), *more]
    features = nn.Sequential(nn.Conv2d(3, width, 5, 2, 2), nn.ReLU(), *stage(width, 2*width, nn.MaxPool2d(2)),
                             *stage(2*width, 4*width))
    classifier = nn.Sequential(nn.Dropout(.1), nn.Linear(4*width, num_classes))
    parts = {'features': features, 'avgpool': nn.AdaptiveMaxPool2d(1), 'flat': nn.Flatten(), 'classifier': classifier}
    model = nn.Sequential()
    for name, part in parts.items(): model.add_module(name, part)
    return model


@pytest.fixture(scope='module')
def borrowed():
    "A network trained on four shapes, and the scale of its input."
    old = pick_classes(shapes(3000, size=24), ('circle', 'square', 'star', 'hourglass'))
    norm = Standardize.fit(old.x)
    torch.manual_seed(0)
    source = train_on(net(4), old, norm, 120, .01, 64)
    source.zero_grad()
    return source, norm


def picture(scene, k):
    "A scene (3, 48, 48) on a ground that makes it wide or tall, as a camera would deliver it."
    pixels, ends = scene.permute(1, 2, 0).numpy(), (k % 23, 2*k % 31)
    pixels = np.pad(pixels, [(0, 0), ends, (0, 0)] if k % 2 else [ends, (0, 0), (0, 0)], 'edge')
    return Image.fromarray(pixels).resize([side*(1 + k % 3) for side in pixels.shape[1::-1]])


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "A folder in no order at all: 3 classes of 40, odd names, odd files, and what programs leave behind."
    root = tmp_path_factory.mktemp('photos')/'Meine Bilder 2024'
    world = pick_few(pick_classes(shapes(1200, size=48, seed=9), tuple(CLASSES.values())), 40)
    folders = dict(zip(CLASSES.values(), CLASSES))
    for k in range(len(world)):
        file = root/folders[world.classes[world.y[k]]]/f'IMG {k:03}.{("jpg", "png", "webp", "JPEG")[k % 4]}'
        file.parent.mkdir(parents=True, exist_ok=True)
        im = picture(world.x[k], k)
        if k % 40 == 0: im = im.convert('L')
        if k % 40 == 1: file = file.with_suffix('.png'); im = im.convert('RGBA')
        if k % 40 == 3: im = im.convert('CMYK')                      # a JPEG, as from a print shop
        exif = Image.Exif()
        if k % 40 == 4: im, exif[0x0112] = im.transpose(Image.Transpose.ROTATE_90), 6   # to be turned when shown
        im.save(file, **({'exif': exif} if len(exif) else {}))
    whole = (root/'a red cross'/next(p.name for p in sorted((root/'a red cross').glob('*.jpg')))).read_bytes()
    (root/'a red cross'/'cut off.jpg').write_bytes(whole[:len(whole)//2])
    (root/'Mond (süß)'/'empty.png').write_bytes(b'')
    for junk in ('.ipynb_checkpoints', 'Mond (süß)/.ipynb_checkpoints'):
        (root/junk).mkdir()
        (root/junk/'copy-checkpoint.jpg').write_bytes(whole)
    (root/'Große Ringe'/'notes.txt').write_text('the best ones')
    return root


def read(root, **how):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        return image_folder(root, 24, **how), ' | '.join(str(w.message) for w in said)


def test_bad_files_are_named_and_good_ones_read(photos):
    with pytest.raises(ValueError) as e: read(photos)
    assert 'cut off.jpg' in str(e.value) and 'empty.png' in str(e.value) and '2 of 122 files' in str(e.value)
    images, said = read(photos, on_error='skip')
    assert images.classes == tuple(sorted(CLASSES)) and images.y.bincount().tolist() == [40, 40, 40]
    for word in ('cut off.jpg', 'empty.png', '.ipynb_checkpoints', 'notes.txt'): assert word in said, word


def test_fault_11_a_photograph_with_a_turn_is_read_upright(photos):
    turned = next(p for p in photos.rglob('*004.*'))
    with Image.open(turned) as im: assert im.getexif()[0x0112] == 6
    images, _ = read(photos, on_error='skip')
    place = [p.name for p in sorted(turned.parent.iterdir()) if p.suffix in ('.jpg', '.png', '.webp', '.JPEG')]
    k = int((images.y == images.classes.index(turned.parent.name)).nonzero()[place.index(turned.name)])
    world = pick_few(pick_classes(shapes(1200, size=48, seed=9), tuple(CLASSES.values())), 40)
    upright = picture(world.x[4], 4)
    near = torch.from_numpy(np.array(upright.resize((24, round(24*upright.height/upright.width))))).permute(2, 0, 1)
    top = (near.shape[1] - 24)//2
    middle = near[:, top:top + 24].float()
    off = lambda x: (images.x[k].float() - x).abs().mean()
    assert off(middle) < min(off(middle.rot90(n, (1, 2))) for n in (1, 2, 3))


def test_untidy_photographs_train_without_surprise(photos, borrowed):
    source, norm = borrowed
    images, _ = read(photos, on_error='skip')
    train, test = split(images, (.6, .4), stratify=True)
    torch.manual_seed(0)
    model = freeze(replace_head(copy.deepcopy(source), len(images.classes)))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        train_on(model, train, norm, 100, .01)
    assert share_right(model, test, norm) > .5   # a third by chance; about .6, by processor


@pytest.mark.parametrize('decay', [0., .01])
def test_fault_49_52_what_is_frozen_stays_and_the_rest_moves(borrowed, decay):
    source, norm = borrowed
    few = pick_few(pick_classes(shapes(300, size=24, seed=3), ('ring', 'cross')), 10)
    model = freeze(replace_head(copy.deepcopy(source), 2))
    start = copy.deepcopy(model.state_dict())
    train_on(model, few, norm, 12, [{'params': list(model.parameters()), 'lr': .01, 'weight_decay': decay}])
    moved = {name for name, v in model.state_dict().items() if not torch.equal(v, start[name])}
    assert moved == {'classifier.1.weight', 'classifier.1.bias'}


def test_picking_against_plain_python():
    rng = np.random.default_rng(0)
    for _ in range(50):
        classes = tuple('abcdefg'[:rng.integers(2, 8)])
        y = torch.from_numpy(rng.integers(0, len(classes), 60))
        images = Images(torch.arange(60, dtype=torch.uint8).view(60, 1, 1, 1), y, classes, 'numbers')
        names = tuple(rng.permutation(classes)[:rng.integers(1, len(classes) + 1)])
        got = pick_classes(images, names)
        want = [(k, names.index(classes[label])) for k, label in enumerate(y.tolist()) if classes[label] in names]
        assert list(zip(got.x.flatten().tolist(), got.y.tolist())) == want and got.classes == names
        if len(got.y.unique()) < len(names): continue
        most = int(got.y.bincount().min())
        few, fewer = pick_few(got, most, 7), pick_few(got, 1, 7)
        assert few.y.bincount().tolist() == [most]*len(names)
        assert set(fewer.x.flatten().tolist()) <= set(few.x.flatten().tolist())
        assert len(few.x.unique()) == len(few)


def test_no_way_touches_the_source_and_a_seed_says_all(borrowed):
    source, norm = borrowed
    start = copy.deepcopy(source.state_dict())
    ways = transfer_ways(source, net, norm, 'features.5', steps=lambda n: 5)
    pool = pick_classes(shapes(400, size=24, seed=4), ('ring', 'cross'))
    task = {'similar': (pool, pick_few(pool, 20, 1))}
    first, second = (measure_cases(ways, task, {'few': 4}, seeds=(0, 1)) for _ in range(2))
    assert first.scores == second.scores
    assert all(torch.equal(v, source.state_dict()[name]) for name, v in start.items())
    assert not any(p.grad is not None for p in source.parameters())


def test_advice_changes_at_its_border():
    assert advise(1999, 'similar').body_lr is None and advise(2000, 'similar').body_lr == 1e-4
    assert advise(99, 'different', few=100).way == 'early head' and advise(100, 'different', few=100).way == 'all'


def test_the_lines_for_photographs_run_with_a_real_network(photos):
    images, _ = read(photos, on_error='skip')
    recipe = input_recipe('squeezenet1_1')
    model = freeze(replace_head(backbone('squeezenet1_1', weights=None), len(images.classes)))
    few = pick_few(images, 2)
    seen = recipe.transform(few.x.float()/255)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert verify_input(seen, recipe) == []
    with pytest.warns(UserWarning, match='expected 224 x 224'): verify_input(few.x.float()/255, recipe)
    was = copy.deepcopy(model.state_dict())
    train_on(model, few, recipe.transform, 2, .001, batch_size=3)
    moved = {name for name, v in model.state_dict().items() if not torch.equal(v, was[name])}
    assert moved == {'classifier.1.weight', 'classifier.1.bias'}


def test_images_go_where_the_model_is(monkeypatch):
    images, asked = pick_few(shapes(400, size=24, seed=4), 2), []

    def spied(*args, device=None, **how):
        asked.append(device)
        return Loader(*args, **how)                                             # no GPU here: they stay on the CPU

    class Elsewhere(nn.Module):
        def parameters(self, recurse=True): return iter([torch.empty(0, device='meta')])
        def forward(self, x): return torch.zeros(len(x), 10)

    monkeypatch.setattr(transfer, 'Loader', spied)
    share_right(Elsewhere(), images, lambda x: x)
    assert asked == [torch.device('meta')]


def test_checks_know_odd_margins_and_ranges_that_touch():
    half_up = lambda n: (n + 1)//2
    assert not check_test_view.judge(
        lambda x, size: x[..., half_up(x.shape[-2] - size):, half_up(x.shape[-1] - size):][..., :size, :size])
    assert not check_told_apart.judge(lambda a, b: min(a) >= max(b) or min(b) >= max(a))


def test_all_names_are_offered_here():
    from cnnbook import codes, heads, weights
    for module, names in ((weights, 'backbone load_weights input_recipe verify_input'),
                          (heads, 'find_head replace_head freeze unfreeze unfreeze_gradually parameter_groups '
                                  'trainable_table'), (codes, 'Codes extract_codes linear_probe nearest')):
        for name in names.split(): assert getattr(transfer, name) is getattr(module, name)
