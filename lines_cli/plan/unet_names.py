"""The modules of Stable Diffusion's U-Net, which diffusers calls otherwise than the code that it was trained with.

Both number the same blocks: `down_blocks.1.attentions.0` is `input_blocks.4.1`. There are adapters for either.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_PER_BLOCK = 3  # what stands in a block of the original: two layers, and a change of size behind them
_INNER = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_INNER_BACK, _OUTER_BACK, _MIDDLE_BACK = (
    {new: old for old, new in names.items()} for names in (_INNER, _OUTER, _MIDDLE)
)

_OF_DIFFUSERS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str]], ...] = (
    (
        re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)"),
        lambda m: (
            f"{'input' if m[1] == 'down' else 'output'}_blocks."
            f"{_PER_BLOCK * int(m[2]) + int(m[4]) + (m[1] == 'down')}.{int(m[3] == 'attentions')}."
            f"{_renamed(m[5], _INNER) if m[3] == 'resnets' else m[5]}"
        ),
    ),
    (
        re.compile(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.+)"),
        lambda m: f"input_blocks.{_PER_BLOCK * (int(m[1]) + 1)}.0.op.{m[2]}",
    ),
    (
        re.compile(r"mid_block\.(resnets\.0|attentions\.0|resnets\.1)\.(.+)"),
        lambda m: f"middle_block.{_MIDDLE[m[1]]}.{_renamed(m[2], _INNER) if m[1] != 'attentions.0' else m[2]}",
    ),
)
_OF_THE_ORIGINAL: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str]], ...] = (
    (
        re.compile(r"input_blocks\.(\d+)\.0\.op\.(.+)"),
        lambda m: f"down_blocks.{int(m[1]) // _PER_BLOCK - 1}.downsamplers.0.conv.{m[2]}",
    ),
    (
        re.compile(r"output_blocks\.(\d+)\.[12]\.conv\.(.+)"),
        lambda m: f"up_blocks.{int(m[1]) // _PER_BLOCK}.upsamplers.0.conv.{m[2]}",
    ),
    (
        re.compile(r"(input|output)_blocks\.(\d+)\.([01])\.(.+)"),
        lambda m: (
            f"{'down' if m[1] == 'input' else 'up'}_blocks.{(int(m[2]) - (m[1] == 'input')) // _PER_BLOCK}."
            f"{'attentions' if m[3] == '1' else 'resnets'}.{(int(m[2]) - (m[1] == 'input')) % _PER_BLOCK}."
            f"{_renamed(m[4], _INNER_BACK) if m[3] == '0' else m[4]}"
        ),
    ),
    (
        re.compile(r"middle_block\.([012])\.(.+)"),
        lambda m: f"mid_block.{_MIDDLE_BACK[m[1]]}.{_renamed(m[2], _INNER_BACK) if m[1] != '1' else m[2]}",
    ),
)


def _renamed(name: str, table: dict[str, str]) -> str:
    """A name whose first parts are others in a table."""
    for old, new in table.items():
        if name.startswith(f"{old}."):
            return new + name[len(old) :]
    return name


def otherwise(name: str) -> str:
    """What the other side calls a tensor of the U-Net; its own name where there is no other. Behind a prefix, too:
    `model.diffusion_model.`, as in files that hold a whole pipeline.
    """
    match = _BEGIN.search(name)
    if match is None:
        return name
    prefix, own = name[: match.start()], name[match.start() :]
    for table in (_OUTER, _OUTER_BACK):
        if (other := _renamed(own, table)) != own:
            return prefix + other
    for pattern, other_name in (*_OF_DIFFUSERS, *_OF_THE_ORIGINAL):
        if found := pattern.fullmatch(own):
            return prefix + other_name(found)
    if found := _UPSAMPLER.fullmatch(own):
        return f"{prefix}output_blocks.{_PER_BLOCK * int(found[1]) + 2}.{1 if found[1] == '0' else 2}.conv.{found[2]}"
    return name


_BEGIN = re.compile(
    r"(?:(?<=\.)|\A)(?:(?:down|up|input|output)_blocks\.\d|mid_block\.|middle_block\.|conv_in\.|conv_out\.|conv_norm_out\."
    r"|time_embedding\.|add_embedding\.|time_embed\.|label_emb\.|out\.[02]\.)"
)
_UPSAMPLER = re.compile(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.+)")  # behind attention, but in the first block
