"""The denoising player against the trajectory it shows."""

import html
import re

import pytest
from test_sampling import PROMPTS

from mdmrl.config import InputError
from mdmrl.sampling import SamplerConfig, generate
from mdmrl.study.player import STILLS, Player
from mdmrl.study.widgets import MASK_SHOWN, shown_canvas


def drawn(policy, **settings):
    config = SamplerConfig(max_new_tokens=12, **settings)
    return generate(policy, PROMPTS[:2], config, record=True)


def texts(shown):
    """The canvases of a frame, without markup."""
    boxes = re.findall(r"<div[^>]*>(.*?)</div>", shown, re.S)
    return [html.unescape(re.sub(r"<[^>]*>", "", box)) for box in boxes]


def test_every_frame_holds_what_the_steps_so_far_revealed(mdm):
    """Also where a step masks tokens again."""
    for settings in ({"steps": 4}, {"steps": 6, "revise": 1, "remasking": "low_confidence"}):
        output = drawn(mdm, **settings)
        player = Player(output, mdm, row=1)
        assert player.steps == len(output.trajectory)
        canvas = [mdm.mask_token_id] * 12
        for step, made in enumerate(output.trajectory, start=1):
            for row, position in made.remasked.T.tolist():
                if row == 1:
                    canvas[position] = mdm.mask_token_id
            revealed = zip(made.rows, made.positions, made.tokens, strict=True)
            for row, position, token in revealed:
                if row == 1:
                    canvas[int(position)] = int(token)
            shown = player.frame(step)
            assert texts(shown) == ["".join(shown_canvas(mdm, canvas))]
            assert shown.count("outline") == (made.rows == 1).sum()
        assert texts(player.frame(0)) == [MASK_SHOWN * 12]


def test_two_samplers_side_by_side(mdm):
    few, many = drawn(mdm, steps=2), drawn(mdm, steps=12)
    values = {"many": [0.25] * 11 + [float("nan")]}
    player = Player({"few": few, "many": many}, mdm, block_length=4, values=values)
    assert len(texts(player.frame(5))) == 2
    assert "step 2 of 2" in player.frame(5) and "step 5 of 12, V = 0.25" in player.frame(5)
    assert "V =" not in player.frame(12)
    assert player.frame(5).count("border-left") == 2 * 2
    assert texts(player.frame(12))[0] == texts(player.frame(2))[0]


def test_the_widget_and_its_static_twin(mdm, monkeypatch):
    player = Player(drawn(mdm, steps=8), mdm)
    box = player.widget()
    (play, slider), view = box.children[0].children, box.children[1]
    assert (play.max, slider.max) == (8, 8)
    slider.value = 3
    assert view.value == player.frame(3)
    twin = {"text/html": player._repr_html_()}
    assert player._repr_mimebundle_() == twin  # papermill, by hand
    monkeypatch.setenv("JPY_SESSION_NAME", "00_tour.ipynb")
    bundle = player._repr_mimebundle_()
    assert {"application/vnd.jupyter.widget-view+json", "text/html"} <= bundle.keys()
    assert bundle["text/html"].count("step ") >= STILLS
    monkeypatch.setenv("MDMRL_NOTEBOOK", "00_tour")
    assert player._repr_mimebundle_() == twin
    with pytest.raises(InputError, match="record=True"):
        Player(generate(mdm, PROMPTS[:1], SamplerConfig(max_new_tokens=4, steps=2)), mdm)
