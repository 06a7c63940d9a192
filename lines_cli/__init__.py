"""lines: edit and merge model checkpoints so that a model keeps what it learnt and stops forgetting what it knew.

import lines_cli as lines

recipe = lines.edit_recipe("base", "ft", alpha=0.1, beta=0.9)
with lines.open_inputs(recipe) as (base, ft): ...
"""

__version__ = "0.1.0"
