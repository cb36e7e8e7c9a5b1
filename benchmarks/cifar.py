"""Real CIFAR-10 on a CPU: the course's own recipe, and our classic recipe on the same network.

Everything was chosen on validation images; the test set is read once a seed. The course trains 30 epochs and publishes
76.7 %. Its time is measured here on a part of an epoch, with its own pipeline, and taken times 30.
"""
import statistics
import time

import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torchvision import transforms

from cnnbook.cifar import RECIPES, train_cifar
from cnnbook.data import Loader, load, split
from cnnbook.fastnet import view_logits
from cnnbook.files import data_root


def parts():
    "Training, validation and test images, or an end with words."
    data, test = load('cifar10', download=False), load('cifar10', train=False, download=False)
    if 'real data' not in data.source or 'real data' not in test.source:
        raise SystemExit(f'cifar: expected the real data under $CNNBOOK_DATA, got {data.source}')
    return *split(data, (.9, .1), seed=0, stratify=True), test


class OriginalNet(nn.Module):
    "The course's network as it is usually written: conv, ReLU, pool."
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 16), (16, 32), (32, 64)))
        self.pool, self.dropout = nn.MaxPool2d(2, 2), nn.Dropout(.25)
        self.fc1, self.fc2 = nn.Linear(64*4*4, 512), nn.Linear(512, 10)

    def forward(self, x):
        for conv in (self.conv1, self.conv2, self.conv3): x = self.pool(F.relu(conv(x)))
        x = self.dropout(x.view(-1, 64*4*4))
        return self.fc2(self.dropout(F.relu(self.fc1(x))))


def original(share=.1, epochs=30):
    "(seconds of the course's whole run, share of one epoch that was measured): PIL, batches of 20, plain SGD."
    pipeline = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.RandomRotation(10),
                                   transforms.ToTensor(), transforms.Normalize((.5,)*3, (.5,)*3)])
    data = torchvision.datasets.CIFAR10(data_root(), train=True, download=False, transform=pipeline)
    torch.manual_seed(0)
    index = torch.randperm(len(data)).tolist()
    learn = index[:int(.8*len(data))]                               # the course validates on a fifth
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(data, learn), batch_size=20, shuffle=True)
    model = OriginalNet().train()
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=.01), nn.CrossEntropyLoss()
    batches, done, total, start = int(share*len(loader)), 0, 0., None
    for x, y in loader:
        if done == 20: start = time.perf_counter()                  # the first ones warm up
        if done == batches + 20: break
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
        total += value.item()*len(x)
        done += 1
    counted = done - 20
    return (time.perf_counter() - start)*len(loader)/counted*epochs, counted/len(loader)


@torch.inference_mode()
def judged(model, loader):
    "Accuracy, asked once and in six views."
    right = [((model(x).argmax(1) == y).sum(), (view_logits(model, x, shift=1).argmax(1) == y).sum(), len(y))
             for x, y in loader]
    once, views, n = (int(sum(r)) for r in zip(*right))
    return once/n, views/n


def run(recipe, train, valid, test, seed, epochs=None):
    """One training run, judged: {'seconds', 'valid', 'test', 'views' (test, each image asked in six ways)}.

    While a benchmark runs it prints validation figures only: whoever stops it early has not seen the test set.
    """
    start = time.perf_counter()
    model, _, scale = train_cifar(recipe, train, epochs=epochs, seed=seed)
    seconds = time.perf_counter() - start
    model.eval()
    checks, tests = (judged(model, Loader(part, 500, transform=scale)) for part in (valid, test))
    print(f"{getattr(recipe, 'name', recipe)}, seed {seed}: validation {checks[0]:.4f}, "
          f'in six views {checks[1]:.4f}, {seconds:.0f} s', flush=True)
    return {'seconds': seconds, 'valid': checks[0], 'test': tests[0], 'views': tests[1]}


def percent(runs, key): return ', '.join(f'{100*r[key]:.2f}' for r in runs)


def main(seeds=(0, 1, 2), share=.07):
    data, times, ours = parts(), [], []
    for seed in seeds:                                              # taken in turns: the machine may not stay as quiet
        times.append(original(share))
        ours.append(run('classic', *data, seed))
    whole, took = statistics.median(t for t, _ in times), statistics.median(r['seconds'] for r in ours)
    return {'threads': torch.get_num_threads(),
            'original recipe, 30 epochs, seconds': round(whole),
            'measured of its first epoch, %': round(100*sum(s for _, s in times), 1),
            'classic recipe, test accuracy, %': percent(ours, 'test'),
            'classic recipe, validation accuracy, %': percent(ours, 'valid'),
            'classic recipe, epochs': RECIPES['classic'].epochs,
            'classic recipe, median seconds': round(took, 1),
            'classic recipe, share of the original time, %': round(100*took/whole, 1)}


if __name__ == '__main__':
    print(main())
