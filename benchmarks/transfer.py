"""SqueezeNet's ImageNet weights on real photographs of five flowers, three seeds: a new head alone, codes with a linear
probe, fine-tuning, and the same network from random weights. 1,000 photographs to learn from, 250 to test, read once a
seed. Settings were chosen on photographs cut from the 1,000, but for fine-tuning's rate, which is the usual one; the
probe's penalty is chosen so in the run itself.

It wants $CNNBOOK_DATA with flower_photos/train and flower_photos/test (a folder a class) and weights/squeezenet1_0*.
Each part is printed and noted in out/transfer.json; a run that was broken off goes on there.
"""
import hashlib
import json
import shutil
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import cnnbook
from cnnbook.augment import Augment
from cnnbook.codes import extract_codes, linear_probe
from cnnbook.data import Loader, split_indices
from cnnbook.files import data_root
from cnnbook.folders import image_folder
from cnnbook.heads import freeze, parameter_groups, replace_head
from cnnbook.weights import backbone, input_recipe

NAME, BATCH = 'squeezenet1_0', 10   # the same batch for a pass and for training, or their times could not be compared
GRID = .001, .003, .01, .03   # penalties that a probe is tried with
OUT = Path(__file__).resolve().parent.parent/'out'


def packed(x): return x.contiguous(memory_format=torch.channels_last)   # convolutions here run twice as fast on it
def prepared(x): return packed(input_recipe(NAME).transform(x))   # (B, 3, 224, 224) in 0..1 -> ImageNet's scale


def photos(part, most=None):
    "The photographs of 'train' or 'test'; `most`: only so many, for a quick look."
    folder = data_root()/'flower_photos'/part
    if not folder.is_dir(): raise SystemExit(f'transfer: expected photographs in {folder}, got none')
    images = image_folder(folder, 224)
    return images if most is None else images.subset(torch.arange(0, len(images), -(-len(images)//most)))


def plain(x): return packed((x - .45)/.225)   # for a network that nobody has trained yet


def halved(images):
    "The photographs at half their size."
    return replace(images, x=nn.functional.avg_pool2d(images.x.float(), 2).round().to(torch.uint8))


def fit(model, images, groups, epochs, seed, batch_size=BATCH, transform=prepared):
    "Adam with a warm start and a cosine end, photographs mirrored at random; seconds."
    batches = Loader(images, batch_size, Augment(flip=True), transform, shuffle=True, seed=seed)
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [g['lr'] for g in optimizer.param_groups],
                                                   total_steps=epochs*len(batches), pct_start=.2)
    model.train()
    start = time.perf_counter()
    for _ in range(epochs):
        for x, y in batches:
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return time.perf_counter() - start


def mirrored(images): return replace(images, x=images.x.flip(3))


def scores_of(model, images, transform):
    with torch.no_grad(): return torch.cat([model(x) for x, _ in Loader(images, 50, transform=transform)])


def accuracy(model, images, transform=prepared):
    "Each photograph and its mirror image are asked, here and for the probes; the mean of the two scores counts."
    model.eval()
    scores = scores_of(model, images, transform) + scores_of(model, mirrored(images), transform)
    return (scores.argmax(1) == images.y).double().mean().item()


def new_head(model, num_classes):
    "A new last layer on standardized maps, no ReLU behind it: two epochs are too few to find the scale of each map."
    replace_head(model, num_classes)
    model.classifier[0] = nn.Sequential(nn.BatchNorm2d(512, affine=False), model.classifier[0])
    model.classifier[2] = nn.Identity()
    return model


def head_only(train, test, seed):
    "The network held still, a new head on it, 2 epochs."
    torch.manual_seed(seed)
    model = freeze(new_head(backbone(NAME), len(train.classes)))
    seconds = fit(model, train, parameter_groups(model, .01), 2, seed)
    return {'accuracy': accuracy(model, test), 'seconds': seconds}


def fine_tuned(train, test, seed):
    "The head begins as a probe on codes; then the last three blocks learn with it at low rates; 2 epochs."
    torch.manual_seed(seed)
    probe = linear_probe(codes_of(train), c=.03)
    model = freeze(replace_head(backbone(NAME), len(train.classes), dropout=.2), 'features.8')
    model.classifier[1].load_state_dict({'weight': probe.weight[:, :, None, None], 'bias': probe.bias})
    model.classifier[2] = nn.Identity()   # a probe's scores may be below zero
    seconds = fit(model, train, parameter_groups(model, 2e-4, decay=.5), 2, seed)
    return {'accuracy': accuracy(model, test), 'seconds': seconds}


def from_scratch(train, test, seed):
    "The same network from random weights, all layers; 2 epochs too, at half the size to save time."
    torch.manual_seed(seed)
    model = replace_head(backbone(NAME, weights=None), len(train.classes))
    seconds = fit(model, halved(train), parameter_groups(model, 1e-3, decay=1.), 2, seed, transform=plain)
    return {'accuracy': accuracy(model, halved(test), plain), 'seconds': seconds}


def codes_of(images): return extract_codes(backbone(NAME), images, batch_size=BATCH, transform=prepared,
                                          cache=OUT/'codes')


def timed(f, *args):
    start = time.perf_counter()
    return f(*args), time.perf_counter() - start


def one_pass(train, test):
    "Codes of all photographs, kept in out/codes; seconds for the 1,000 to learn from, with loading and writing."
    shutil.rmtree(OUT/'codes', ignore_errors=True)   # a pass is to be timed, not a file
    seconds = [timed(codes_of, images)[1] for images in (train, mirrored(train), test, mirrored(test))]
    return {'seconds': seconds[0], 'seconds of the mirror images': seconds[1]}


def both(codes, other): return replace(codes, x=torch.cat([codes.x, other.x]), y=torch.cat([codes.y, other.y]))


def probes(train, test, seed, mirror=False):
    "The penalty chosen on a fifth of the 1,000, then a probe on all of them; and the time that ten probes take."
    codes, extra = codes_of(train), codes_of(mirrored(train)) if mirror else None
    own, valid = split_indices(len(codes), (.8, .2), seed, codes.y)
    most, every = (both(codes[i], extra[i]) if mirror else codes[i] for i in (own, slice(None)))
    chosen = linear_probe(most, 'svm', codes[valid], GRID, seed)
    ten, seconds = timed(lambda: [linear_probe(every, 'svm', c=GRID[k % len(GRID)], seed=seed) for k in range(10)])
    probe = next(p for p in ten if p.c == chosen.c)
    scores = probe.scores(codes_of(test)), probe.scores(codes_of(mirrored(test)))
    right = lambda s: (s.argmax(1) == test.y).double().mean().item()
    return {'accuracy': right(scores[0]), 'asked both ways round': right(scores[0] + scores[1]),
            'seconds of ten': seconds, 'c': chosen.c, 'validation': dict(chosen.tried)[chosen.c]}


def mirror_probes(train, test, seed):
    "The same with the codes of the mirror images beside: the cheap substitute for augmentation."
    return probes(train, test, seed, mirror=True)


class Notes:
    "Figures of the parts that are done, on disk; those of another script, torch or number of threads do not count."
    def __init__(self, path, *facts):
        self.path, facts = path, [Path(__file__).read_text(), torch.__version__, torch.get_num_threads(), *facts]
        self.key = hashlib.sha256(repr(facts).encode()).hexdigest()
        old = json.loads(path.read_text()) if path.exists() else {}
        self.done = old['done'] if old.get('key') == self.key else {}

    def part(self, name, make, *args):
        if name not in self.done:
            self.done[name] = make(*args)
            self.path.parent.mkdir(exist_ok=True)
            self.path.write_text(json.dumps({'key': self.key, 'done': self.done}, indent=1))
        print(f'{name}:', ', '.join(f'{k} {v:.4g}' for k, v in self.done[name].items()), flush=True)
        return self.done[name]


def main(seeds=(0, 1, 2), most=None):
    train, test = photos('train', most), photos('test', most and most//4)
    notes = Notes(OUT/'transfer.json', cnnbook.__version__, most)
    once = notes.part('one pass', one_pass, train, test)
    parts = {'codes and probe': probes, 'with mirror images': mirror_probes, 'head only, 2 epochs': head_only,
             'fine-tuned, 2 epochs': fine_tuned, 'from scratch, 2 epochs at 112 px': from_scratch}
    runs = {name: [notes.part(f'{name}, seed {seed}', make, train, test, seed) for seed in seeds]
            for name, make in parts.items()}
    percent = lambda name, what='accuracy': ', '.join(f'{100*r[what]:.1f}' for r in runs[name])
    middle = lambda name, what: statistics.median(r[what] for r in runs[name])
    heads, passes = 10*middle('head only, 2 epochs', 'seconds'), once['seconds']
    ten, ten_both = (middle(name, 'seconds of ten') for name in ('codes and probe', 'with mirror images'))
    twice = passes + once['seconds of the mirror images']
    return {f'{name}: test accuracy, %': percent(name) for name in runs} | {
        f'{name}, asked both ways round: test accuracy, %': percent(name, 'asked both ways round')
        for name in list(runs)[:2]} | {
        'photographs': f'{len(train):,} to learn from, {len(test)} to test', 'threads': torch.get_num_threads(),
        'seconds of one head run': round(heads/10, 1), 'seconds of one pass': round(passes, 1),
        'seconds of ten probes': round(ten, 2),
        'ten head runs / one pass and ten probes': round(heads/(passes + ten), 1),
        'ten head runs / ten probes alone': round(heads/ten),
        'ten head runs / two passes and ten probes with mirror images': round(heads/(twice + ten_both), 1)}


if __name__ == '__main__': print(json.dumps(main(), indent=1))
