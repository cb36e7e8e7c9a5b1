"""Real data sets under $CNNBOOK_DATA: `make test-real`."""
import os
import sys

import pytest
import torch
import torchvision
from gate import ROOT

from cnnbook.data import load

sys.path.insert(0, str(ROOT/'benchmarks'))
import mnist

pytestmark = [pytest.mark.real,
              pytest.mark.skipif(not os.environ.get('CNNBOOK_DATA'), reason='CNNBOOK_DATA is not set')]
OTHERS = {'mnist': torchvision.datasets.MNIST, 'fashion_mnist': torchvision.datasets.FashionMNIST,
          'cifar10': torchvision.datasets.CIFAR10}


@pytest.mark.parametrize('name', OTHERS)
def test_equal_to_torchvision(name):
    for train in (True, False):
        ours, theirs = load(name, train, download=False), OTHERS[name](os.environ['CNNBOOK_DATA'], train,
                                                                       download=False)
        assert 'real data' in ours.source
        x = torch.as_tensor(theirs.data)
        x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)
        assert torch.equal(ours.x, x) and torch.equal(ours.y, torch.as_tensor(theirs.targets))
        if name == 'cifar10': assert list(ours.classes) == theirs.classes


def test_mlp_on_mnist():
    figures = mnist.main()
    print(figures)
    assert figures['median, %'] >= 98.3 and figures['median seconds of training'] <= 180
