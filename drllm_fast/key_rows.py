"""Where the keys of a visit's rows lie, as the attention function asks for it."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from drllm_fast.tables import Tables


class KeyRows(NamedTuple):
    """Row i brings new[i] tokens and attends to total[i] keys, its new ones included, that begin at starts[i].

    Other forwards that route a model have a class of their own with the same two methods."""

    new: list[int]
    starts: list[int]
    total: list[int]
    tables: Tables
    known: dict[tuple, tuple]  # layouts of this forward: visits of the same rows mostly keep their keys alike
    name: tuple | None = None  # of the layout, where a forward has a shorter one than what is in it

    def segments(self) -> tuple[list[int], list[int], list[int]]:
        return self.new, self.starts, self.total

    def layout(self, device: torch.device) -> tuple[tuple[Tensor, Tensor, Tensor, int, int], bool]:
        """cu_seqlens, starts, lengths, max_query, max_length of `ops.ragged_attention`, and whether it is `packed`."""
        key = (self.name or (*self.new, *self.starts, *self.total), device)
        if key not in self.known:
            tables = (self.tables.get(*table, device) for table in layout_tables(*self.segments()))
            packed = self.total == self.new and self.starts == [0, *accumulate(self.new[:-1])]
            self.known[key] = (*tables, max(self.new), max(self.total)), packed
        return self.known[key]


def layout_tables(new: list[int], starts: list[int], total: list[int]) -> tuple:
    """Keys and makers, for `Tables`, of the three tensors of a layout."""
    return (
        cu_seqlens_table(new),
        (("starts", *starts), lambda: torch.tensor(starts, dtype=torch.int32, device="cpu")),
        (("lengths", *total), lambda: torch.tensor(total, dtype=torch.int32, device="cpu")),
    )


def cu_seqlens_table(lengths: list[int]) -> tuple:
    """Key and maker of the int32 cu_seqlens of rows of these lengths."""
    return ("cu_seqlens", *lengths), lambda: torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cpu")
