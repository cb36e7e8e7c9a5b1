"""The book as static pages: what is taken out of a chapter, what reference says, and links that lead nowhere."""
import ast
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'tools'))
make_site = pytest.importorskip('make_site', reason='needs the site extra', exc_type=ImportError)


def test_lines_for_tools_are_gone():
    shown = json.loads(make_site.page(ROOT/'nbs'/'07_mlp.ipynb', 'the end'))
    code = [''.join(c['source']) for c in shown['cells'] if c['cell_type'] == 'code']
    assert not [c for c in code if '#|' in c or not c] and sum('class MLP' in c for c in code) == 1
    assert shown['cells'][-1]['source'] in ('the end', ['the end'])
    assert any(o.get('data', {}).get('image/png') for c in shown['cells'] for o in c.get('outputs', []))


def test_parts_name_every_chapter_once():
    parts = make_site.parts(make_site.read(ROOT/'nbs'/'index.ipynb'))
    names = [n for chapters in parts.values() for n in chapters]
    assert sorted([*names, 'index']) == sorted(p.stem for p in (ROOT/'nbs').glob('*.ipynb'))
    assert len(parts) >= 4 and all(parts)
    assert '33_cli' in parts['Further'] and '00_device' in parts['Ground']       # a planned row names a part as well


def test_reference_says_what_the_source_says():
    text = make_site.reference('iou', '20w_iou')
    assert '.. py:function:: box_iou_numpy(a: np.ndarray, b: np.ndarray) -> np.ndarray' in text
    assert ':param a: (N, 4) boxes x1 y1 x2 y2' in text and ':returns: (N, M) float32' in text
    assert 'check_' not in text and ':doc:`/20w_iou`' in text
    assert 'cnnbook.findings.Finding' in make_site.reference('report', '10m_report')      # one name, several chapters
    assert ':py:obj:`Recipe <cnnbook.recipe.Recipe>`' in make_site.reference('cifar', '13_cifar')


def test_signatures():
    node = ast.parse('def f(self, a: int, *, b: str = "x") -> list[int]: ...').body[0]
    assert make_site.signature(node, None) == "(a: int, *, b: str='x') -> list[int]"
    assert make_site.escape('a_b is `c_d`*') == r'a\_b is \ ``c_d``\ \*'


def test_broken_links_are_found(tmp_path):
    (tmp_path/'b.html').write_text('<h1 id="top">b</h1>')
    (tmp_path/'a.html').write_text(
        '<a href="b.html">ok</a> <a href="b.html#top">ok</a> <a href="#here">ok</a> <p id="here"> '
        '<a href="b.html#lost">no</a> <a href="c.html">no</a> <a href="https://example.org">not ours</a> '
        '<script src="https://example.org/x.js"></script>')
    lost, pages, links = make_site.broken(tmp_path)
    assert sorted(link for _, link in lost) == ['b.html#lost', 'c.html', 'needs the net: https://example.org/x.js']
    assert (pages, links) == (2, 7)


@pytest.mark.slow
def test_site_has_no_warnings(tmp_path):
    assert make_site.main(tmp_path/'site') == 0
    assert len(list((tmp_path/'site').rglob('*.html'))) > 200
