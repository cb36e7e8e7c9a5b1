"""Images a second with random flip, turn up to 10 degrees and standardization: `Loader` with `Augment` against Pillow,
torchvision's transforms and torch's `DataLoader` (batch 20, no workers). One thread, medians of alternating rounds.

    python benchmarks/loader.py        exit code 1 if `Loader` is less than 9 times as fast
"""
import os
import statistics
import sys
import time

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from cnnbook.augment import Augment
from cnnbook.data import Loader, Standardize, load
from cnnbook.world import shapes

FLOOR = 9           # times as fast, with nearest on both sides
PEER_IMAGES = 1000  # a round of the slow side; the fast side runs through the whole set


class Pictures(Dataset):
    "The usual way: a Pillow image at a time, through a chain of transforms."
    def __init__(self, images, chain):
        self.x, self.y, self.chain = images.x.permute(0, 2, 3, 1).contiguous().numpy(), images.y.tolist(), chain

    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.chain(Image.fromarray(self.x[i])), self.y[i]


def usual(images, interpolation, batch_size, scale):
    "torch's own way: Pillow, transforms, DataLoader."
    turn = T.RandomRotation(10, interpolation=InterpolationMode(interpolation))
    chain = T.Compose([T.RandomHorizontalFlip(), turn, T.ToTensor(),
                       T.Normalize(scale.mean.flatten().tolist(), scale.std.flatten().tolist())])
    pictures = Pictures(images.subset(range(PEER_IMAGES)), chain)
    return DataLoader(pictures, batch_size=batch_size, shuffle=True, num_workers=0)


def rate(loader):
    "Images a second of one run through the loader."
    start, n = time.perf_counter(), 0
    for x, _ in loader: n += len(x)
    return n/(time.perf_counter() - start)


def compare(images, interpolation, batch_size, rounds):
    "Alternate the two sides: images a second of the usual way and of ours, in each round."
    scale = Standardize.fit(images.x)
    slow = usual(images, interpolation, batch_size, scale)
    augment = Augment(flip=True, rotate=10, interpolation=interpolation)
    fast = Loader(images, augment=augment, transform=scale, shuffle=True)
    x, z = next(iter(fast))[0], next(iter(slow))[0]
    if (x.dtype, x.shape[1:]) != (z.dtype, z.shape[1:]): raise SystemExit(f'not the same task: {x.shape}, {z.shape}')
    for side in (slow, fast): rate(side)                                   # once to warm up
    return [(rate(slow), rate(fast)) for _ in range(rounds)]


def data_sets():
    "The drawn world, and the real CIFAR-10 where $CNNBOOK_DATA has it."
    sets = {'drawn': shapes(10_000)}
    if os.environ.get('CNNBOOK_DATA'):
        cifar = load('cifar10', download=False)
        if 'real data' in cifar.source: sets['CIFAR-10'] = cifar.subset(range(10_000))
    return sets


def measure(rounds):
    figures, span = {}, lambda v: f'{min(v):,.1f} to {max(v):,.1f}'
    for name, images in data_sets().items():
        for interpolation, batch_size in (('nearest', 20), ('nearest', 128), ('bilinear', 20)):
            slow, fast = zip(*compare(images, interpolation, batch_size, rounds))
            ratios = [b/a for a, b in zip(slow, fast)]
            key = f'{name}, {interpolation}' + ', DataLoader with batch 128'*(batch_size == 128)
            figures |= {f'{key}: DataLoader, images/s': round(statistics.median(slow)),
                        f'{key}: Loader, images/s': round(statistics.median(fast)),
                        f'{key}: times as fast': round(statistics.median(ratios), 1),
                        f'{key}: times, least to most': span(ratios)}
            print(f'{key}: {statistics.median(slow):,.0f} and {statistics.median(fast):,.0f} images/s, '
                  f'{statistics.median(ratios):.1f} times as fast ({span(ratios)} in {rounds} rounds)', flush=True)
    return figures


def main(rounds=5):
    "The figures as a dict, measured on one thread."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try: return measure(rounds)
    finally: torch.set_num_threads(threads)


def too_slow(figures):
    "The data sets on which the claim does not hold."
    return [k for k, v in figures.items() if k.endswith(', nearest: times as fast') and v < FLOOR]


if __name__ == '__main__':
    short = too_slow(main())
    for key in short: print(f'{key}: expected at least {FLOOR}')
    sys.exit(1 if short else 0)
