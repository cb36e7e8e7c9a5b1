"""What each trick of the fast recipe brings: left out one at a time, on real CIFAR-10, judged on validation images.

A much smaller budget than the recipe's own (so many images and epochs as the figures say), in smaller batches, and
still fewer steps, which want to be longer (filter_lr); three seeds each; the test set is not touched. A row gives the
mean accuracy and the spread of the seeds; nothing else is searched again for it.
"""
import statistics
import sys
from dataclasses import replace

import torch
from cifar import judged, parts
from torch import nn

from cnnbook.cifar import RECIPES, train_cifar
from cnnbook.data import Loader

WITHOUT = {'nothing': {}, 'Muon for the filters': {'filter_lr': 0.}, 'whitening': {'whiten': False},
           'wires at the start': {'identity': False},
           'label smoothing': {'label_smoothing': 0.}, 'GELU (ReLU)': {'act': 'ReLU'},
           'full size in half of the epochs (crops of 24 pixels)': {'late': .5},              # of the epochs
           'alternating flips (random ones)': {'flip': 'random'}, 'flips': {'flip': 'none'}, 'shifts': {'shift': 0},
           'the high rate of the norms': {'norm_lr': 1.}, 'weight decay': {'weight_decay': 0.},
           'the factor of the logits': {'factor': 1.}, 'warm-up': {'warmup': 0.}}


def run(recipe, train, valid, seed):
    "(accuracy, the trained network, its validation images)."
    try: model, trainer, scale = train_cifar(recipe, train, seed=seed)
    except ValueError as e:                                     # a run that diverges is a result too
        if 'expected a finite number' not in str(e): raise
        return .1, None, None
    check = Loader(valid, 500, transform=scale)
    return trainer.validate(model, check, nn.CrossEntropyLoss())['valid_acc'], model.eval(), check


def main(seeds=(0, 1, 2), images=5_000, epochs=4, names=tuple(WITHOUT)):
    train, valid, _ = parts()
    train = train.subset(torch.randperm(len(train), generator=torch.Generator().manual_seed(1))[:images])
    base = replace(RECIPES['fast'], epochs=epochs, batch_size=128, filter_lr=.2)
    figures = {'images': len(train), 'epochs': epochs, 'seeds': len(seeds), 'batch size': base.batch_size,
               'filter_lr': base.filter_lr, 'threads': torch.get_num_threads()}
    for name in names:
        less = {k: int(v*epochs) if k == 'late' else v for k, v in WITHOUT[name].items()}
        accuracy, models, checks = zip(*(run(replace(base, **less), train, valid, s) for s in seeds))
        if name == 'nothing':
            views = [judged(*one)[1] for one in zip(models, checks)]
            figures['nothing left out, with flips and shifts at test time, %'] = f'{100*statistics.mean(views):.2f}'
        figures[f'without {name}, %'] = (f'{100*statistics.mean(accuracy):.2f} '
                                         f'({100*min(accuracy):.2f} to {100*max(accuracy):.2f})')
        print(name, figures[f'without {name}, %'], flush=True)
    return figures


if __name__ == '__main__':
    images, epochs = (int(v) for v in sys.argv[1:3]) if len(sys.argv) > 2 else (5_000, 4)
    print(main(images=images, epochs=epochs))
