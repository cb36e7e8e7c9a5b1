"""A folder of pictures that is not in order: faults 10 to 14, the order of torchvision, and real photographs."""
import os
import resource
import signal
import struct
import sys
import tempfile
import warnings
import weakref
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features
from torchvision.datasets import ImageFolder

from cnnbook import folders
from cnnbook.folders import image_folder, imagenet
from cnnbook.world import shapes


def picture(seed, width=40, height=30):
    "A smooth colour picture that differs from seed to seed."
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def root(tmp_path):
    "Three classes of four pictures each; some lie deeper."
    for k in range(12):
        path = tmp_path/'pictures'/('daisy', 'rose', 'tulip')[k//4]/('deep/er' if k % 4 == 3 else '.')/f'{k:02}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(k).save(path)
    return tmp_path/'pictures'


def quietly(*args, **kwargs):
    "image_folder, and the texts of its warnings."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        got = image_folder(*args, **kwargs)
    return got, [str(w.message) for w in said]


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(2**20 if sys.platform == 'darwin' else 2**10)


def png(width, height):
    "A black PNG of 1 bit a pixel and of thousands of rows, written bit by bit: small on disk, whatever its size."
    packer, row = zlib.compressobj(1), bytes(1 + (width + 7)//8)
    body = b''.join(packer.compress(row*1000) for _ in range(height//1000)) + packer.flush()
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    head = struct.pack('>IIBBBBB', width, height, 1, 0, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', body) + chunk(b'IEND', b'')


@pytest.mark.parametrize('share', [.1, .5, .9])
@pytest.mark.parametrize('ending', ['jpg', 'png', 'bmp', 'tif', 'ppm', 'webp'])
def test_fault_10_truncated(root, ending, share):
    if ending == 'webp' and not features.check('webp'): pytest.skip('PIL without WebP')
    whole = image_folder(root, 16)
    cut = root/'rose'/f'99.{ending}'
    noisy = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(noisy).save(cut)
    assert len(image_folder(root, 16)) == 13
    cut.write_bytes(cut.read_bytes()[:int(cut.stat().st_size*share)])
    with pytest.raises(ValueError, match=rf' 1 of 13 files in .*: rose/99.{ending} \(.+\)') as e: image_folder(root, 16)
    assert str(e.value).startswith('path: expected pictures, got ') and '\n' not in str(e.value)
    assert e.value.__cause__ is not None
    rest, said = quietly(root, 16, on_error='skip')
    assert torch.equal(rest.x, whole.x) and torch.equal(rest.y, whole.y) and rest.classes == whole.classes
    assert len(said) == 1 and said[0].startswith('image_folder: skipped 1 of 13') and f'rose/99.{ending}' in said[0]
    assert '1 bad files skipped' in rest.source


def test_fault_10_names_three_and_counts_all(root):
    for k in (0, 4, 5, 8, 9): next(root.rglob(f'{k:02}.png')).write_bytes(b'')
    with pytest.raises(ValueError, match='got 5 of 12 files') as e: image_folder(root)
    assert all(f'{name}.png (not an image)' in str(e.value) for name in ('daisy/00', 'rose/04', 'rose/05'))
    assert 'and 2 more' in str(e.value) and '08.png' not in str(e.value)
    rest, _ = quietly(root, on_error='skip')
    assert rest.y.tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_fault_10_a_class_that_loses_all_keeps_its_number(root):
    for path in (root/'rose').rglob('*.png'): path.write_bytes(b'\x89PNG')
    rest, said = quietly(root, on_error='skip')
    assert rest.classes == ('daisy', 'rose', 'tulip') and rest.y.tolist() == [0]*4 + [2]*4
    assert len(said) == 2 and 'no picture for rose' in said[1]


def test_fault_10_bad_files_do_not_pile_up_in_memory(root, monkeypatch):
    class Big: pass
    alive = []

    def read(path, size):
        big = Big()
        alive.append(weakref.ref(big))
        raise OSError('damaged')                                   # its traceback holds `big`

    monkeypatch.setattr(folders, '_read', read)
    _, bad, first = folders._decode([(f'{k}.png', 'a') for k in range(50)], 8, '')
    assert len(bad) == 50 and str(first) == 'damaged' and sum(ref() is not None for ref in alive) <= 1


@pytest.mark.parametrize('name, content', [
    ('empty.jpg', b''), ('text.jpg', b'<html>not found</html>'), ('gone.png', None), ('head.png', b'\x89PNG\r\n\x1a\n'),
    ('zeros.bmp', bytes(5000))])
def test_fault_11_no_pictures(root, name, content):
    words = 'No such file' if content is None else 'not an image'
    path = root/'tulip'/name
    if content is None: path.symlink_to(root/'nowhere.png')
    else: path.write_bytes(content)
    with pytest.raises(ValueError) as e: image_folder(root)
    assert f'1 of 13 files in {root} that cannot be read: tulip/{name} (' in str(e.value) and words in str(e.value)
    assert len(quietly(root, on_error='skip')[0]) == 12


def as_mode(im, mode):
    "The picture in another mode, and what it should look like as RGB (None: about as it was)."
    grey = np.asarray(im.convert('L'))
    like_grey = np.repeat(grey[..., None], 3, 2)
    if mode == 'I;16': return Image.fromarray(grey.astype(np.uint16)*257), like_grey
    if mode == 'I': return Image.fromarray(grey.astype(np.int32)*257), like_grey
    if mode == 'F': return Image.fromarray((grey/255).astype(np.float32)), like_grey
    if mode == 'P': return im.quantize(256), None
    if mode in ('L', 'LA'): return im.convert(mode), like_grey
    if mode == '1': return im.convert('1'), np.repeat(np.uint8(255)*np.asarray(im.convert('1'))[..., None], 3, 2)
    return im.convert(mode), None


@pytest.mark.parametrize('mode, ending', [
    ('1', 'png'), ('L', 'png'), ('L', 'jpg'), ('LA', 'png'), ('P', 'png'), ('P', 'bmp'), ('RGB', 'webp'),
    ('RGBA', 'png'), ('RGBA', 'tif'), ('CMYK', 'jpg'), ('CMYK', 'tif'), ('YCbCr', 'jpg'), ('LAB', 'tif'),
    ('I;16', 'png'), ('I;16', 'tif'), ('I', 'tif'), ('F', 'tif')])
def test_fault_11_every_mode_becomes_rgb(tmp_path, mode, ending):
    if ending == 'webp' and not features.check('webp'): pytest.skip('PIL without WebP')
    if mode == 'LAB':
        from PIL import ImageCms
        profiles = ImageCms.createProfile('sRGB'), ImageCms.createProfile('LAB')
        im, right = ImageCms.profileToProfile(picture(3, 32, 32), *profiles, outputMode='LAB'), None
    else: im, right = as_mode(picture(3, 32, 32), mode)
    im.save(tmp_path/f'x.{ending}', **({'quality': 95} if ending in ('jpg', 'webp') else {}))
    got = folders._read(tmp_path/f'x.{ending}', 32).permute(1, 2, 0).numpy().astype(int)
    assert got.shape == (32, 32, 3)
    right = np.asarray(picture(3, 32, 32)) if right is None else right
    assert np.abs(got - right).mean() < (25 if mode == 'LAB' else 8)


def test_fault_11_big_endian_and_out_of_range(tmp_path):
    grey = np.arange(1024, dtype=np.uint16).reshape(32, 32)*64
    Image.frombytes('I;16B', (32, 32), grey.astype('>u2').tobytes()).save(tmp_path/'x.tif')
    got = folders._read(tmp_path/'x.tif', 32)
    assert np.array_equal(got[0], (grey/257).round()) and torch.equal(got[0], got[2])
    for value, kind in ((70_000, np.int32), (-1, np.int32), (np.nan, np.float32)):
        Image.fromarray(np.full((4, 4), value, kind)).save(tmp_path/'y.tif')
        with pytest.raises(ValueError, match='mode [IF]: expected values 0 to'): folders._read(tmp_path/'y.tif', 4)


def test_fault_11_what_is_transparent_becomes_white(tmp_path):
    clear = Image.new('RGBA', (8, 8), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 8, 4))
    palette = Image.new('P', (8, 8), 1)
    palette.putpalette([0, 0, 255, 10, 20, 30])
    palette.paste(0, (0, 0, 8, 4))
    grey = Image.new('L', (8, 8), 7)
    grey.paste(200, (0, 0, 8, 4))
    kinds = (clear, {}, [0, 0, 255]), (palette, {'transparency': 1}, [0, 0, 255]), (grey, {'transparency': 7}, [200]*3)
    for im, more, top in kinds:
        im.save(tmp_path/'x.png', **more)
        got = folders._read(tmp_path/'x.png', 8)
        assert got[:, 0, 0].tolist() == top and (got[:, 4:] == 255).all()


@pytest.mark.parametrize('ending', ['jpg', 'png', 'tif'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_fault_11_exif(tmp_path, ending, orientation):
    turns = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
             5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
             8: Image.Transpose.ROTATE_270}
    upright = picture(5, 48, 32)
    stored = upright if orientation == 1 else upright.transpose(turns[orientation])  # as the sensor saw it
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path/f'x.{ending}', exif=exif, **({'quality': 98, 'subsampling': 0} if ending == 'jpg' else {}))
    upright.save(tmp_path/'upright.png')
    got, right = folders._read(tmp_path/f'x.{ending}', 16).int(), folders._read(tmp_path/'upright.png', 16).int()
    assert (got - right).abs().float().mean() < 2


@pytest.mark.parametrize('junk', [
    '.ipynb_checkpoints/00-checkpoint.png', '__MACOSX/rose/._04.png', '.DS_Store', 'rose/.DS_Store', '.git/x.png',
    'rose/._04.png', 'rose/.ipynb_checkpoints/04.png', 'rose/deep/__MACOSX/x.png', 'LICENSE.txt', 'rose/IMG_1.HEIC',
    'loose.png'])
def test_fault_12_junk_changes_no_label(root, junk):
    before = image_folder(root, 16)
    (root/junk).parent.mkdir(parents=True, exist_ok=True)
    picture(99).save(root/junk, 'PNG')
    after, said = quietly(root, 16)
    assert torch.equal(after.x, before.x) and torch.equal(after.y, before.y) and after.classes == before.classes
    named = next(part for part in Path(junk).parts if part.startswith(('.', '__')) or part == Path(junk).name)
    assert len(said) == 1 and said[0] == f'image_folder: ignored 1 entries in {root}: {named}'


def test_fault_13_class_lists(root, tmp_path):
    train = image_folder(root)
    (root/'rose').rename(root/'roses')
    (root/'aster').mkdir()
    with pytest.raises(ValueError, match='^classes: .* missing: rose; extra: aster, roses$'):
        image_folder(root, classes=train.classes)
    with pytest.raises(ValueError, match='^path: .* each class in .*, got none for aster$'): image_folder(root)
    rest, said = quietly(root, on_error='skip')
    assert rest.classes == ('aster', 'daisy', 'roses', 'tulip') and rest.y.unique().tolist() == [1, 2, 3]
    assert len(said) == 1 and 'no picture for aster' in said[0]
    (tmp_path/'one').mkdir()
    root.rename(tmp_path/'one'/'pictures')
    _, said = quietly(tmp_path/'one')
    assert len(said) == 1 and said[0].endswith('pictures; is this the folder above the classes?')


def test_fault_13_given_classes_number_the_labels(root):
    given = image_folder(root, classes=['tulip', 'daisy', 'rose'])
    assert given.classes == ('tulip', 'daisy', 'rose') and given.y.tolist() == [1]*4 + [2]*4 + [0]*4


@pytest.mark.parametrize('name, side', [('twice.png', 30_000), ('once.png', 10_000), ('head.ppm', 0)])
def test_fault_14_decompression_bomb(root, name, side):
    "30000 x 30000 is over twice PIL's limit, 10000 x 10000 between the limit and twice: PIL itself only warns of that."
    quietly(root)
    (root/'daisy'/name).write_bytes(png(side, side) if side else b'P6 30000 30000 255\n')
    before = peak_mb()
    with pytest.raises(ValueError, match=rf'1 of 13 files .*: daisy/{name} \(Image size \(\d+ pixels\) exceeds limit'):
        image_folder(root)
    assert len(quietly(root, on_error='skip')[0]) == 12
    assert peak_mb() - before < 50                                 # decoded it would be 900 MB at least, or 100


def test_fault_14_long_strips_stay_small(tmp_path):
    before = peak_mb()
    for width, height in ((100_000, 2), (1, 60_000)):
        Image.new('RGB', (width, height), (9, 99, 199)).save(tmp_path/'x.png')
        got = folders._read(tmp_path/'x.png', 64)
        assert got.shape == (3, 64, 64) and got.flatten(1).unique(dim=1).flatten().tolist() == [9, 99, 199]
    assert peak_mb() - before < 50                                 # resized whole, the first would be 600 MB


def test_order_and_labels_are_torchvisions(tmp_path):
    for k, name in enumerate(('a', 'a-b', 'a b', 'A', 'Ä', 'Z', '10', '9', 'ä')):
        for j, file in enumerate('x.png X.PNG b/1.png b-1/1.png b/z/0.png b.png 10.jpeg 9.JPG é.bmp'.split()):
            path = tmp_path/'root'/name/file
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(20*k + j, 8, 8).save(path)
    (tmp_path/'root'/'linked').symlink_to(tmp_path/'root'/'a')
    theirs, ours = ImageFolder(tmp_path/'root'), image_folder(tmp_path/'root', 8)
    assert list(ours.classes) == theirs.classes and ours.y.tolist() == theirs.targets and len(ours) == 90
    for x, (path, _) in zip(ours.x[:-9], theirs.samples): assert torch.equal(x, folders._read(path, 8))
    assert [f for f, _ in folders._scan(tmp_path/'root')[1]] == [f for f, _ in theirs.samples]


def test_links_that_lead_back_are_not_followed(root):
    (root/'rose'/'up').symlink_to(root)
    (root/'rose'/'deep'/'self').symlink_to(root/'rose'/'deep')
    assert len(image_folder(root)) == 12


@pytest.mark.parametrize('way', ['text', 'spaces and umlauts', 'link', 'relative', 'home'])
def test_paths(root, tmp_path, monkeypatch, way):
    path = root
    if way == 'text': path = str(root)
    if way == 'spaces and umlauts': path = root.rename(tmp_path/'Schöne Blüten 1')
    if way == 'link': path = tmp_path/'link'; path.symlink_to(root)
    if way == 'relative': monkeypatch.chdir(tmp_path); path = 'pictures'
    if way == 'home': monkeypatch.setenv('HOME', str(tmp_path)); path = '~/pictures'
    assert image_folder(path).y.tolist() == [0]*4 + [1]*4 + [2]*4


def said_to_another_user(path):
    "What the scan of image_folder says in a process without the rights of root (a forked one: no torch in it)."
    ends = os.pipe()
    child = os.fork()
    if not child:
        try:
            if os.geteuid() == 0: os.setgroups([]), os.setgid(65534), os.setuid(65534)
            signal.alarm(30)
            folders._scan(path)
            text = 'read'
        except BaseException as e: text = f'{type(e).__name__}: {e}'
        os.write(ends[1], text.encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(ends[1])
    with os.fdopen(ends[0]) as f: return f.read()


ONE_USER = Path('/proc/self/uid_map').exists() and Path('/proc/self/uid_map').read_text().split()[2:] == ['1']


@pytest.mark.skipif(not hasattr(os, 'fork') or ONE_USER, reason='needs fork and a second user')
@pytest.mark.parametrize('closed', ['.', 'rose', 'rose/deep'])
def test_a_folder_that_may_not_be_read_is_named(closed):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, 'set')
        for name in ('daisy/a.png', 'rose/a.png', 'rose/deep/b.png'):
            Path(root, name).parent.mkdir(parents=True, exist_ok=True)
            picture(0).save(Path(root, name))
        os.chmod(folder, 0o755)
        assert said_to_another_user(root) == 'read'
        (root/closed).chmod(0)
        said = said_to_another_user(root)
        (root/closed).chmod(0o755)
    words = f'path: expected a folder with one sub-folder a class, got {root/closed}: Permission denied'
    assert said == f'PermissionError: {words}'


def test_progress_bar_only_for_many(root, capsys):
    image_folder(root, 8)
    assert capsys.readouterr().err == ''
    for k in range(190): picture(k, 8, 8).save(root/'rose'/f'more{k}.png')
    image_folder(root, 8)
    assert 'pictures' in capsys.readouterr().err


def test_warnings_point_at_the_caller(root):
    (root/'.DS_Store').touch()
    with pytest.warns(UserWarning) as said: image_folder(root)
    assert said[0].filename == __file__


@pytest.fixture
def toynet(tmp_path):
    words = {'n01440764': ('tench', 'Tinca tinca'), 'n01443537': ('goldfish', 'Carassius auratus')}
    for split in ('train', 'val'):
        for k in range(10):
            path = tmp_path/'net'/split/sorted(words)[k % 2]/f'{k}.JPEG'
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(k, 90, 70).save(path)
    torch.save((words, sorted(words)*5), tmp_path/'net'/'meta.bin')
    return tmp_path/'net'


def test_imagenet_with_workers(toynet):
    plain, one = ([(x, y) for x, y in imagenet(toynet, 'val', 32, 4, workers)] for workers in (0, 1))
    assert [len(y) for _, y in plain] == [4, 4, 2]
    for batch, same in zip(plain, one): assert torch.equal(batch[0], same[0]) and torch.equal(batch[1], same[1])
    train = imagenet(toynet, patch_size=32, batch_size=10, workers=0)
    torch.manual_seed(0)
    (x1, y1), (x2, y2) = next(iter(train)), next(iter(train))
    assert not torch.equal(x1, x2) and y1.sum() == y2.sum() == 5
    assert train.dataset.classes[0] == ('tench', 'Tinca tinca')
    assert plain[0][0].mean().abs() < 2 and x1.shape == (10, 3, 32, 32)


def test_imagenet_says_what_is_missing(toynet, tmp_path):
    (toynet/'val').rename(tmp_path/'elsewhere')
    with pytest.raises(FileNotFoundError, match='_devkit_t12.tar.gz and ILSVRC2012_img_val.tar there') as e:
        imagenet(toynet, 'val')
    assert str(e.value).startswith(f'root: expected ImageNet 2012 in {toynet}, got: ') and e.value.__cause__ is not None
    (toynet/'val').mkdir()
    with pytest.raises(FileNotFoundError, match='ILSVRC2012_img_val.tar'): imagenet(toynet, 'val')
    (toynet/'meta.bin').unlink()
    with pytest.raises(FileNotFoundError, match='ILSVRC2012_img_train.tar'): imagenet(toynet)


def test_random_crops_are_for_training_only():
    train, val = ([type(t).__name__ for t in folders._imagenet_transform(s, 224).transforms] for s in ('train', 'val'))
    assert train[:2] == ['RandomResizedCrop', 'RandomHorizontalFlip'] and not any('Random' in name for name in val)
    assert folders._imagenet_transform('val', 224).transforms[0].size == 256


def test_any_size_of_a_drawn_world_survives_the_disk(tmp_path):
    world = shapes(30, size=24, seed=3)
    for k, (x, y) in enumerate(zip(world.x, world.y)):
        path = tmp_path/'world'/world.classes[y]/f'{k:03}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(path)
    back = image_folder(tmp_path/'world', 24)
    order = sorted(range(30), key=lambda k: (world.classes[world.y[k]], k))
    assert torch.equal(back.x, world.x[order])                    # size kept: bit for bit
    assert [back.classes[y] for y in back.y] == [world.classes[world.y[k]] for k in order]


@pytest.mark.real
def test_flower_photographs():
    path = Path(os.environ.get('CNNBOOK_DATA', 'nowhere'))/'flower_photos'
    if not (path/'train').is_dir(): pytest.skip(f'real flowers: expected {path}/train and test, got nothing there')
    train = image_folder(path/'train')
    test = image_folder(path/'test', classes=train.classes)
    assert train.classes == ('daisy', 'dandelion', 'roses', 'sunflowers', 'tulips')
    assert train.y.bincount().tolist() == [200]*5 and test.y.bincount().tolist() == [50]*5
    assert train.y.tolist() == ImageFolder(path/'train').targets
    means = train.x.float().mean((0, 2, 3)).tolist()
    print(f'\n{train}\n{test}\nmean red, green, blue: {means}')
    assert means[0] > means[2] + 20                               # flowers are rather red and yellow than blue
