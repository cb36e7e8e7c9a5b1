"""What the chapter's cells do not say of `cnnbook.whiten`: sizes around a part, odd inputs, memory, wrong answers."""
import copy
import pickle

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from cnnbook import whiten
from cnnbook.whiten import Standardize, Whiten

CHECKS = [whiten.check_zscore, whiten.check_kept, whiten.check_rare_pixel, whiten.check_whitening]


def images(n, shape=(2, 3, 4), seed=0):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('n', [2, 3, 1023, 1024, 1025, 2049])
@pytest.mark.parametrize('correction', [0, 1])
def test_statistics_equal_numpy_around_the_size_of_a_part(n, correction):
    x = images(n)
    channel, pixel = (Standardize.fit(x, per, correction) for per in ('channel', 'pixel'))
    want = x.double().numpy()
    assert np.allclose(channel.mean.flatten(), want.mean((0, 2, 3)), atol=1e-6)
    assert np.allclose(channel.std.flatten(), want.std((0, 2, 3), ddof=correction), atol=1e-6)
    assert np.allclose(pixel.mean, want.mean(0), atol=1e-6)
    assert np.allclose(pixel.std, want.std(0, ddof=correction), atol=1e-6)


@pytest.mark.parametrize('n', [3, 24, 25, 26, 1025, 2049])
def test_components_equal_scikit_learn(n):
    x = images(n)
    k = min(n - 1, 24)
    ours, theirs = Whiten.fit(x, correction=1), PCA(svd_solver='full').fit(x.flatten(1).double().numpy())
    assert ours.components.shape == (k, 24)
    assert np.allclose(ours.eigenvalues, theirs.explained_variance_[:k], rtol=1e-4, atol=1e-8)
    assert np.allclose(ours.components@ours.components.T, np.eye(k), atol=1e-5)
    assert np.allclose(np.abs((ours.components.numpy()*theirs.components_[:k]).sum(1)), 1, atol=1e-3)
    assert torch.allclose(ours.inverse(ours(x)), x, atol=1e-4)
    assert (ours.components.gather(1, ours.components.abs().argmax(1, keepdim=True)) > 0).all()


def test_zca_is_the_symmetric_root_of_the_inverse_covariance():
    x, eps = images(500), .01
    flat = x.flatten(1).double()
    lam, v = torch.linalg.eigh(flat.T.cov(correction=0))
    want = (flat - flat.mean(0))@(v*(lam + eps)**-.5)@v.T
    assert torch.allclose(Whiten.fit(x, eps=eps, zca=True)(x).flatten(1).double(), want, atol=1e-4)


def test_fit_never_holds_more_than_a_part_in_float64(monkeypatch):
    seen, doubles = [], whiten._doubles
    monkeypatch.setattr(whiten, '_doubles', lambda part: seen.append(len(part)) or doubles(part))
    x = (255*images(5000)).to(torch.uint8)
    Standardize.fit(x), Standardize.fit(x, per='pixel'), Whiten.fit(x)
    assert max(seen) == 1024 and sum(seen) == 7*5000  # two passes each for the means, one for the components


@pytest.mark.parametrize('fit', [Standardize.fit, lambda x: Standardize.fit(x, per='pixel'), Whiten.fit,
                                 lambda x: Whiten.fit(x, zca=True), lambda x: Whiten.fit(x, components=3)])
def test_odd_inputs(fit):
    x = images(40)
    t = fit(x)
    for same in (x.double(), x.contiguous(memory_format=torch.channels_last), x.repeat(1, 1, 1, 2)[..., :4]):
        assert t(same).dtype == torch.float32 and torch.allclose(t(same), t(x), atol=1e-3)
        assert torch.allclose(fit(same).mean, t.mean, atol=1e-6)
    assert t(x.half()).dtype == t(x.bfloat16()).dtype == torch.float32
    assert len(t(x[:0])) == 0 and t.inverse(t(x[:0])).shape == (0, 2, 3, 4) and t(x[:1]).shape[0] == 1
    kept = x.clone()
    t(x), t.inverse(t(x))
    assert torch.equal(x, kept)  # nothing is changed in place
    for twin in (pickle.loads(pickle.dumps(t)), copy.deepcopy(t), t.to('cpu')):
        assert torch.equal(twin(x), t(x))
    with pytest.raises(AttributeError): t.mean = None
    with pytest.raises(TypeError, match='x: expected uint8 or float images, got ndarray'): t(x.numpy())
    with pytest.raises(ValueError, match='x: expected shape'): t(x[0])
    with pytest.raises(ValueError, match='x: expected at least 2 images'): fit(x[:0])
    with pytest.raises(ValueError, match='infinity in image 7'): fit(x.index_fill(0, torch.tensor([7]), float('inf')))


def test_images_that_never_change():
    flat = torch.full((9, 1, 2, 2), .3)
    assert Standardize.fit(flat)(flat).abs().max() == 0
    assert Whiten.fit(flat)(flat).abs().max() < 1e-3
    with pytest.raises(ValueError, match='eps'): Whiten.fit(flat, eps=0)
    for eps in (float('nan'), float('inf'), -1e-9):
        with pytest.raises(ValueError, match='eps: expected a number of at least 0'): Whiten.fit(images(9), eps=eps)


@pytest.mark.parametrize('check', CHECKS, ids=lambda c: c.__name__)
def test_checks_accept_their_solution_and_name_the_mistake(check):
    assert check.judge(check.solution)
    for answer, words in check.wrong:
        verdict = check.judge(answer)
        assert verdict.passed is False and words in verdict.message, verdict
