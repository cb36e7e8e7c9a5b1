"""What each trick of the fast recipe brings: left out one at a time, on real CIFAR-10, judged on validation images.

A smaller budget than the recipe's own (so many images and epochs as the figures say), three seeds each; the test set is
not touched. A row gives the mean accuracy, the spread of the seeds, and the time as a share of the whole recipe's.
"""
import statistics
import sys
import time
from dataclasses import replace

import torch
from cifar import parts
from torch import nn

from cnnbook.cifar import RECIPES, train_cifar
from cnnbook.data import Loader
from cnnbook.fastnet import view_logits

WITHOUT = {'nothing': {}, 'Muon for the filters': {'filter_lr': 0.}, 'whitening': {'whiten': False},
           'wires at the start': {'identity': False},
           'label smoothing': {'label_smoothing': 0.}, 'small crops early': {'small': 32},
           'alternating flips (random ones)': {'flip': 'random'}, 'flips': {'flip': 'none'}, 'shifts': {'shift': 0},
           'the high rate of the norms': {'norm_lr': 1.}, 'weight decay': {'weight_decay': 0.},
           'the factor of the logits': {'factor': 1.}, 'warm-up': {'warmup': 0.}}


def run(recipe, train, valid, seed):
    "(accuracy, accuracy with flips and shifts at test time, seconds)."
    start = time.perf_counter()
    try: model, trainer, scale = train_cifar(recipe, train, seed=seed)
    except ValueError as e:                                     # a run that diverges is a result too
        if 'expected a finite number' not in str(e): raise
        return .1, .1, time.perf_counter() - start
    seconds = time.perf_counter() - start
    check = Loader(valid, 500, transform=scale)
    plain = trainer.validate(model, check, nn.CrossEntropyLoss())['valid_acc']
    model.eval()
    with torch.inference_mode():
        views = sum((view_logits(model, x, shift=1).argmax(1) == y).sum().item() for x, y in check)/len(valid)
    return plain, views, seconds


def main(seeds=(0, 1, 2), images=10_000, epochs=6, names=tuple(WITHOUT)):
    train, valid, _ = parts()
    train = train.subset(torch.randperm(len(train), generator=torch.Generator().manual_seed(1))[:images])
    base = replace(RECIPES['fast'], epochs=epochs)
    figures, whole = {'images': len(train), 'epochs': epochs, 'seeds': len(seeds),
                      'threads': torch.get_num_threads()}, None
    for name in names:
        accuracy, views, seconds = zip(*(run(replace(base, **WITHOUT[name]), train, valid, s) for s in seeds))
        if name == 'nothing':
            whole = statistics.median(seconds)
            figures['nothing left out, with flips and shifts at test time, %'] = f'{100*statistics.mean(views):.2f}'
        share = f', {statistics.median(seconds)/whole:.0%} of the time' if whole else ''
        figures[f'without {name}, %'] = (f'{100*statistics.mean(accuracy):.2f} '
                                         f'({100*min(accuracy):.2f} to {100*max(accuracy):.2f}){share}')
        print(name, figures[f'without {name}, %'], flush=True)
    return figures


if __name__ == '__main__':
    images, epochs = (int(v) for v in (*sys.argv[1:], 10_000, 6)[:2]) if len(sys.argv) > 2 else (10_000, 6)
    print(main(images=images, epochs=epochs))
