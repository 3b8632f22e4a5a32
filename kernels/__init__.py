"""Pure tensor functions: no model, no I/O. Each stands beside a readable reference, `naive_*`, in the same file."""

from steer.kernels.attention import attend, naive_attend
from steer.kernels.mixture import geometric, naive_geometric
from steer.kernels.rows import add_rows, naive_add_rows, naive_overwrite_rows, overwrite_rows

__all__ = [
    "add_rows",
    "attend",
    "geometric",
    "naive_add_rows",
    "naive_attend",
    "naive_geometric",
    "naive_overwrite_rows",
    "overwrite_rows",
]
