"""Pure tensor functions: no model, no I/O. Each stands beside a readable reference, `naive_*`, in the same file."""

from steer.kernels.attention import attend, naive_attend
from steer.kernels.mixture import (
    arithmetic,
    geometric,
    keep_nucleus,
    naive_arithmetic,
    naive_geometric,
    naive_keep_nucleus,
)
from steer.kernels.neighbours import mix_neighbours, naive_mix_neighbours
from steer.kernels.rows import (
    add_rows,
    add_rows_keeping_norm,
    low_rank_rows,
    naive_add_rows,
    naive_add_rows_keeping_norm,
    naive_low_rank_rows,
    naive_overwrite_rows,
    naive_project_rows,
    naive_similarity_to_projection,
    naive_slots_at,
    overwrite_rows,
    project_rows,
    similarity_to_projection,
    slots_at,
)
from steer.kernels.tilt import naive_tilted_log_probs, naive_tilted_moments, tilted_log_probs, tilted_moments

__all__ = [
    "add_rows",
    "add_rows_keeping_norm",
    "arithmetic",
    "attend",
    "geometric",
    "keep_nucleus",
    "low_rank_rows",
    "mix_neighbours",
    "naive_add_rows",
    "naive_add_rows_keeping_norm",
    "naive_arithmetic",
    "naive_attend",
    "naive_geometric",
    "naive_keep_nucleus",
    "naive_low_rank_rows",
    "naive_mix_neighbours",
    "naive_overwrite_rows",
    "naive_project_rows",
    "naive_similarity_to_projection",
    "naive_slots_at",
    "naive_tilted_log_probs",
    "naive_tilted_moments",
    "overwrite_rows",
    "project_rows",
    "similarity_to_projection",
    "slots_at",
    "tilted_log_probs",
    "tilted_moments",
]
