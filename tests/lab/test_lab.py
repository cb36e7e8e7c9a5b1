"""A chapter in JupyterLab in a real browser: run all cells, look for errors, move each slider, take pictures."""
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')
pytestmark = [pytest.mark.lab, pytest.mark.skipif(not CHROMIUM, reason='needs chromium (apt-get install chromium)')]
SETTINGS = {'@jupyterlab/apputils-extension/notification': '{"fetchNews": "false", "checkForUpdates": false}',
            '@jupyterlab/notebook-extension/tracker': '{"windowingMode": "none"}'}    # every cell is in the page
DARK = {'@jupyterlab/apputils-extension/themes': '{"theme": "JupyterLab Dark"}'}
BAD = ('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"], '
       '.jp-RenderedText[data-mime-type="application/vnd.jupyter.error"]')
ALL_RAN = """() => {
    const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(p => p.textContent);
    const idle = /\\| Idle/.test(document.querySelector('#jp-main-statusbar').textContent);
    return idle && !prompts.some(p => p.includes('*')) && prompts.some(p => /\\d/.test(p));
}"""
SHOWN = """cell => {                              // what a cell shows, without the slider's own number
    const area = cell.querySelector('.jp-Cell-outputArea').cloneNode(true);
    area.querySelectorAll('.widget-readout, .noUi-target').forEach(e => e.remove());
    return [...area.querySelectorAll('img')].map(i => i.src).join() + area.innerText;
}"""


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def answers(url):
    with contextlib.suppress(OSError): return urllib.request.urlopen(url, timeout=2).status == 200


@contextlib.contextmanager
def jupyterlab(folder, settings):
    "A server on 127.0.0.1 that serves `folder` with settings of its own; stopped at the end."
    for name, text in settings.items():
        path = folder/'.settings'/f'{name}.jupyterlab-settings'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    port, token = free_port(), secrets.token_hex(16)
    homes = {f'{k}_DIR': str(folder/f'.{k.lower()}') for k in ('JUPYTER_CONFIG', 'JUPYTER_DATA',
                                                               'JUPYTERLAB_WORKSPACES')}
    env = os.environ | homes | {'JUPYTERLAB_SETTINGS_DIR': str(folder/'.settings'), 'JUPYTER_TOKEN': token,
                                'IPYTHONDIR': str(folder/'.ipython'), 'CNNBOOK_OFFLINE': '1'}
    env.pop('MPLBACKEND', None)                              # the kernel shows figures by its own
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--ip=127.0.0.1', f'--port={port}',
               '--ServerApp.port_retries=0', f'--ServerApp.root_dir={folder}'] + ['--allow-root']*(os.getuid() == 0)
    server = subprocess.Popen(command, env=env, stdout=(folder/'.log').open('w'), stderr=subprocess.STDOUT)
    try:
        base = f'http://127.0.0.1:{port}'
        deadline = time.time() + 60
        while not answers(f'{base}/api?token={token}'):
            assert server.poll() is None and time.time() < deadline, (folder/'.log').read_text()[-2000:]
            time.sleep(.2)
        yield base, token
    finally:
        server.send_signal(signal.SIGINT)
        for stop in (server.terminate, server.kill):
            try:
                server.wait(5)
                break
            except subprocess.TimeoutExpired: stop()


def move_sliders(page, back=False):
    "Move each slider two steps by keyboard; the numbers of those whose cell shows the same as before."
    dead, (ahead, other, end) = [], ('Left', 'Right', 'min') if back else ('Right', 'Left', 'max')
    handles = page.locator('.jp-OutputArea .noUi-handle')
    for k in range(handles.count()):
        handle = handles.nth(k)
        handle.scroll_into_view_if_needed()
        cell = handle.evaluate_handle("e => e.closest('.jp-Cell')").as_element()
        before = cell.evaluate(SHOWN)
        at_end = handle.get_attribute('aria-valuenow') == handle.get_attribute(f'aria-value{end}')
        handle.focus()
        for _ in range(2): page.keyboard.press(f'Arrow{other if at_end else ahead}')
        deadline, last, now = time.time() + 15, None, before
        while (now == before or now != last) and time.time() < deadline:      # until something else is there, at rest
            page.wait_for_timeout(400)
            last, now = now, cell.evaluate(SHOWN)
        if now == before: dead.append(k)
    return handles.count(), dead


LOOKED_AT = {'index': DARK, '16w_pictures': DARK, '18_attribution': {}, '19_embedding': DARK, '19b_flatmaps': {},
             '24_text': DARK}
FOLLOWED = '03_conv', '07_mlp', '13_cifar', '17_filters', '20_thresholds', '31_playground'  # in both themes


@pytest.fixture
def pictures(tmp_path):
    folder = Path(os.environ.get('CNNBOOK_PICTURES', tmp_path/'pictures'))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def opened(name, theme, tmp_path):
    "A page of JupyterLab that shows a notebook whose kernel is ready."
    from playwright.sync_api import sync_playwright
    folder = tmp_path/'lab'                                  # never in the checkout: JupyterLab saves by itself
    folder.mkdir()
    for path in (*ROOT.glob('nbs/*.ipynb'), ROOT/'nbs'/'budget.json'): shutil.copy(path, folder)
    with jupyterlab(folder, SETTINGS | theme) as (base, token), sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, headless=True,
                                    args=['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage',
                                          '--disable-background-networking'])
        page = browser.new_page(viewport={'width': 1280, 'height': 1000})
        page.goto(f'{base}/lab/tree/{name}.ipynb?token={token}&reset')
        ready(page)
        yield page
        browser.close()


def ready(page):
    page.wait_for_selector('.jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook .jp-Cell', timeout=60_000)
    page.wait_for_selector('.jp-NotebookPanel .jp-Spinner', state='detached', timeout=60_000)
    page.wait_for_function("() => /\\| Idle/.test(document.querySelector('#jp-main-statusbar').textContent)",
                           timeout=60_000)


def run_all(page):
    "Run all cells; none may end in an error or warn."
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.get_by_role('menuitem', name='Run All Cells', exact=True).click()
    page.wait_for_timeout(1000)                              # the first stars must be there before we wait for the last
    page.wait_for_function(ALL_RAN, timeout=180_000)
    page.wait_for_timeout(1000)
    bad = page.locator(BAD).all_text_contents()
    assert not bad, bad


def all_sliders_live(page, least, back=False):
    count, dead = move_sliders(page, back)
    assert not dead and count >= least, f'sliders {count}, of which change nothing: {dead}'


@pytest.mark.parametrize('name, theme', LOOKED_AT.items(), ids=LOOKED_AT)
def test_chapter_in_a_browser(name, theme, tmp_path, pictures):
    with opened(name, theme, tmp_path) as page:
        run_all(page)
        page.screenshot(path=pictures/f'{name}-ran.png')
        all_sliders_live(page, name != 'index')
        page.screenshot(path=pictures/f'{name}-slider.png')
        assert len(page.locator('.jp-RenderedImage img').all()) >= 3*(name != 'index')


@pytest.mark.parametrize('name', FOLLOWED)
def test_a_chapter_followed_from_index_in_both_themes(name, tmp_path, pictures):
    with opened('index', {}, tmp_path) as page:
        assert 'cnnbook (venv)' in page.locator('.jp-Toolbar-kernelName').first.text_content()
        page.locator(f'.jp-RenderedMarkdown a[href*="{name}.ipynb"]').first.click()
        page.wait_for_function("() => document.querySelectorAll('.jp-NotebookPanel').length === 2", timeout=60_000)
        heading = page.locator('.jp-NotebookPanel:not(.lm-mod-hidden) h1').first.text_content(timeout=60_000)
        assert 'cnnbook' not in heading, heading             # the chapter, no longer index
        ready(page)
        run_all(page)
        assert len(page.locator('.jp-RenderedImage img').all()) >= 3
        for theme in 'Light', 'Dark':
            if theme == 'Dark':
                page.get_by_role('menuitem', name='Settings', exact=True).click()
                for label in 'Theme', 'JupyterLab Dark':
                    page.locator('.lm-Menu-itemLabel').get_by_text(label, exact=True).click()
                page.wait_for_function("() => document.body.dataset.jpThemeLight === 'false'", timeout=20_000)
            all_sliders_live(page, 1, back=theme == 'Dark')
            page.screenshot(path=pictures/f'{name}-{theme.lower()}.png')
        if name == '31_playground': start_and_pause(page)


def start_and_pause(page):
    "The network learns while buttons still work."
    picture = page.locator('.jp-OutputArea img').last
    start, at_first = page.get_by_role('button', name='Start', exact=True), picture.get_attribute('src')
    start.click()
    for _ in range(40):
        page.wait_for_timeout(250)
        if picture.get_attribute('src') != at_first: break
    else: raise AssertionError('Start was pressed, and the picture is the same')
    page.get_by_role('button', name='Pause', exact=True).click()
    start.wait_for(timeout=20_000)                           # the button says Start again
    page.wait_for_timeout(1000)
    at_rest = picture.get_attribute('src')
    page.wait_for_timeout(1000)
    assert picture.get_attribute('src') == at_rest != at_first


def test_server_is_private(tmp_path):
    with jupyterlab(tmp_path, SETTINGS) as (base, token):
        assert answers(f'{base}/api/contents?token={token}')
        with pytest.raises(urllib.error.HTTPError, match='403'): urllib.request.urlopen(f'{base}/api/contents')
        listening = subprocess.run(['ss', '-ltnH'], capture_output=True, text=True).stdout
        port = base.rpartition(':')[2]
        assert [w for w in listening.split() if w.endswith(f':{port}')] in ([f'127.0.0.1:{port}'], [])
        arguments = subprocess.run(['ps', '-eo', 'args'], capture_output=True, text=True).stdout
        assert token not in arguments
