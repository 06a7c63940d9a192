"""Names of a part of a model, made up to those of all layers."""

from __future__ import annotations

import pytest

from lines_cli.errors import DepthError, RecipeError
from lines_cli.scaling.find_depth import find_depth
from lines_cli.scaling.partial import completed, layers_held, refuse_other_counts


@pytest.mark.parametrize(
    ("names", "layers", "places"),
    [
        (["model.layers.5.q.weight", "model.layers.7.q.weight"], 12, [5, 7]),
        (["h.3.attn.c_attn.weight"], 4, [3]),
        (["transformer.h.0.mlp.weight", "lm_head.weight"], 24, [0, None]),
        (["model.layers.2.mlp.experts.3.up.weight"], 6, [2]),
        (["encoder.block.1.layer.0.q.weight"], 3, [1]),
        (["blocks.9.norm.weight", "blocks.9.mlp.fc1.weight"], 10, [9, 9]),
        (["embed.weight"], 4, [None]),
    ],
)
def test_a_layer_has_its_own_number(names: list[str], layers: int, places: list[int | None]) -> None:
    """Not its place among those that are there."""
    every = completed(names, layers)
    assert set(names) <= set(every)
    if places == [None]:
        assert every == names
        return
    depth = find_depth(every)
    refuse_other_counts(depth, names, layers)
    found = [depth.places.get(name) for name in names]
    assert [place.index if place else None for place in found] == places
    assert [stack.layers for stack in depth.stacks] == [layers]


def test_stacks_have_numbers_of_their_own() -> None:
    """Each by its name, or a part of it."""
    names = ["encoder.layers.1.q.weight", "decoder.layers.4.q.weight"]
    with pytest.raises(DepthError, match="2 lists of layers"):
        completed(names, 6)
    with pytest.raises(DepthError, match="not said how many"):
        completed(names, {"encoder": 6})
    with pytest.raises(RecipeError, match="names no stack"):
        completed(names, {"encoder": 6, "other": 3})
    every = completed(names, {"encoder": 2, "decoder": 6})
    depth = find_depth(every)
    assert [depth.places[name].index for name in names] == [1, 4]
    assert depth.layers == {"encoder.layers": 2, "decoder.layers": 6}


def test_a_layer_beyond_the_last_is_refused() -> None:
    """By its name."""
    with pytest.raises(RecipeError, match=r"num_layers is 4, and model.layers.4.q.weight lies in layer 4"):
        completed(["model.layers.4.q.weight"], 4)


def test_stages_are_not_counted_by_one_number() -> None:
    """Blocks within stages need the base's names."""
    names = [f"layers.{stage}.blocks.{block}.mlp.weight" for stage in range(2) for block in range(2)]
    every = completed(names, 2)
    with pytest.raises(DepthError, match="does not fit"):
        refuse_other_counts(find_depth(every), names, 2)


def test_what_is_held() -> None:
    """The numbers of each list; experts are none."""
    assert layers_held(["a.layers.3.x.weight", "a.layers.5.x.weight", "head.weight"]) == {"a.layers": {3, 5}}
    assert layers_held(["mlp.experts.3.weight"]) == {}
