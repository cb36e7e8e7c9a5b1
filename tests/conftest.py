"""Every test keeps the reader's own notes and data out of the game and stays off the network."""
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent/'tools')]


@pytest.fixture(autouse=True)
def at_home_nowhere(tmp_path, monkeypatch, request):
    monkeypatch.setenv('CNNBOOK_HOME', str(tmp_path/'cnnbook-home'))
    if 'real' not in request.keywords:
        monkeypatch.delenv('CNNBOOK_DATA', raising=False)
        monkeypatch.setenv('CNNBOOK_OFFLINE', '1')
