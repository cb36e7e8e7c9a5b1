"""Preflight on planted faults, as a sample (all of them: benchmarks/preflight.py), and what a cell cannot say of it."""
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cnnbook.preflight import preflight
from cnnbook.trace import no_trace

sys.path.insert(0, str(Path(__file__).parent))
import plants  # noqa: E402 (it lies beside this file)

SLOW = {'adam_too_high', 'adam_too_low', 'sgd_too_low', 'labels_shuffled', 'sgd_too_high'}


def test_every_fault_is_planted_in_three_networks():
    assert len(plants.PLANTS) >= 25 and all(len(p.nets) >= 3 for p in plants.PLANTS.values())
    assert set(plants.pairs()) == set(plants.pairs(kept=True)) | set(plants.pairs(kept=False))
    assert not {net for _, net in plants.pairs(kept=False)} & set(plants.KEPT)


@pytest.mark.parametrize('fault', sorted(set(plants.PLANTS) - SLOW))
def test_a_planted_fault_is_named(fault):
    nets = plants.PLANTS[fault].nets
    args = plants.PLANTS[fault].make('lenet' if 'lenet' in nets else nets[0])
    with no_trace(args['model']): report = preflight(**args, seconds=3, progress=False)
    assert report.cause == plants.PLANTS[fault].cause, report


def test_fault_43_the_same_report_twice_and_no_random_number_of_yours_is_used():
    args = plants.sound('perceptron')
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b = (preflight(**args, seconds=100, progress=False) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before) and a.findings == b.findings and a.passed


def test_fault_53_nothing_is_changed_when_a_model_fails():
    class Bad(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        def forward(self, x): return self.norm(self.conv(x)).relu_().nothing()
    bad = Bad().eval()
    x, y = plants.STANDARD(plants.TRAIN.x[:64].float()/255), plants.TRAIN.y[:64]
    with no_trace(bad, x): report = preflight(bad, (x, y), nn.CrossEntropyLoss(), plants.adam(bad), progress=False)
    assert not report.passed and 'nothing' in repr(report)


@pytest.mark.parametrize('data', [[], iter([]), 3, [(torch.zeros(2, 3), 'ab')], [torch.zeros(2, 3)]])
def test_what_is_no_data_is_refused(data):
    with pytest.raises((TypeError, ValueError), match='data'):
        preflight(nn.Linear(3, 2), data, nn.CrossEntropyLoss(), progress=False)


def test_a_step_that_raises_is_a_finding():
    def step(model, x, y, loss, optimizer): raise KeyError('gone')
    report = preflight(**plants.sound('lenet'), step=step, seconds=3, progress=False)
    assert report.cause == 'error in your step' and 'gone' in report.of('fail')[0].saw


def test_other_kinds_of_models():
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50, (640, 12), generator=g)
    text = nn.Sequential(nn.Embedding(50, 16), nn.Flatten(), nn.Linear(192, 2))
    report = preflight(text, (tokens, (tokens[:, 0] > 25).long()), nn.CrossEntropyLoss(), plants.adam(text, 1e-2))
    assert report.passed, report
    x = torch.randn(640, 5, generator=g)
    line = nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 1))
    report = preflight(line, (x, x[:, :1]*2 + 1), nn.MSELoss(), plants.adam(line, 1e-2))
    assert report.passed, report
