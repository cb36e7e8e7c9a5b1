"""The plane and the playground: the same from the same setting, a clock that gives way, and no trace in pyplot."""
import asyncio
import gc
import subprocess
import sys

import matplotlib.pyplot as plt
import pytest
import torch

from cnnbook.plane import ACTIVATIONS, DATA, Play, Setting, draw_play, grid_points, responses
from cnnbook.playground import EXPLORERS, Playground, explore, figure_png


@pytest.mark.parametrize('data', DATA)
@pytest.mark.parametrize('activation', ACTIVATIONS)
def test_a_setting_printed_and_read_is_the_same_run(data, activation):
    setting = Setting(data=data, activation=activation, hidden=(3,), batch_size=32, seed=5)
    one, other = Play(setting, 2), Play(eval(repr(setting)), 2)
    assert one.losses == other.losses and repr(one) == repr(other)
    assert figure_png(draw_play(one), 30) == figure_png(draw_play(other), 30)
    assert torch.equal(responses(one.model, grid_points(5))[-1], one.model(grid_points(5)).detach())
    assert not plt.get_fignums()


def test_start_gives_way_and_pause_is_heard():
    async def lesson():
        ground = Playground(Setting(hidden=(2,), batch_size=150))
        ground.start.value = True                      # what a click does
        while ground.play.epochs < 3: await asyncio.sleep(.01)
        assert ground.start.description == 'Pause'
        task = ground.task
        ground.start.value = False
        ground.start.value = True                      # before the loop had its turn: still one loop
        assert ground.task is task
        ground.start.value = False
        await ground.task
        epochs, picture = ground.play.epochs, ground.shown.value
        await asyncio.sleep(.1)
        assert ground.play.epochs == epochs and ground.shown.value == picture and ground.start.description == 'Start'
        return ground, epochs
    ground, epochs = asyncio.run(lesson())
    assert ground.play.losses == Play(ground.play.setting, epochs).losses


def test_start_ends_by_itself_and_a_change_begins_anew():
    async def lesson():
        ground = Playground(Setting(hidden=(), batch_size=150), most=4)
        ground.start.value = True
        await ground.task
        assert ground.play.epochs == 4 and not ground.start.value
        ground.rate.value = .3
        assert ground.play.epochs == 0 and ground.play.setting.lr == .3
        ground.layers.value, ground.units.value = 2, 5
        assert ground.play.setting.hidden == (5, 5)
    asyncio.run(lesson())


def test_every_position_of_every_control_is_drawn_or_refused_in_words():
    for name in EXPLORERS:
        box = explore(name)
        *controls, said, shown = box.children
        for c in controls:
            was, options = c.value, list(c.options)
            for value in (options[0], options[-1], was):
                picture, c.value = shown.value, value
                assert said.value or bytes(shown.value[:4]) == b'\x89PNG'
                if said.value: assert ': expected ' in said.value and shown.value == picture
    assert not plt.get_fignums()


def test_a_hundred_pictures_leave_nothing():
    play = Play(Setting(hidden=(2,)))
    def figures(): return sum(type(o) is plt.Figure for o in gc.get_objects())
    figure_png(draw_play(play, 10), 30)
    gc.collect()
    before = figures()
    for _ in range(100): figure_png(draw_play(play, 10), 30)
    gc.collect()
    assert figures() <= before + 1


def test_figures_need_no_widgets():
    code = ("import sys; sys.modules['ipywidgets'] = None\n"
            "from cnnbook.playground import conv_arithmetic, explore, figure_png\n"
            "print(figure_png(conv_arithmetic())[:4])\n"
            "try: explore()\nexcept ImportError as e: print(e)")
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert run.returncode == 0 and r"b'\x89PNG'" in run.stdout and 'ipywidgets' in run.stdout, run.stderr
