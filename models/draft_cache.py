"""The draft's cache: keys and values of the committed context, for each layer, ragged in a batch.

The slot of a token is its position. A block's own rows are written behind the context, attended to,
and cropped by leaving the lengths as they are: the next append overwrites them. Nothing here copies
a length to the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dspark_compile.models.draft_config import DraftConfig, DraftError


class ContextCache:
    """Context keys and values of every draft layer.

    Attributes:
        keys, values: one ``[B, G, capacity, D]`` a layer.
        lengths: committed tokens of each row, ``[B]`` int64 on the device.
        capacity: slots of a row. A round needs ``block_size`` more than the context.
    """

    def __init__(
        self,
        config: DraftConfig,
        batch: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if batch < 1 or capacity < config.block_size:
            raise DraftError(
                f"batch={batch}, capacity={capacity}: a context cache needs one row and "
                f"{config.block_size} slots (a block) at least"
            )
        self.shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(self.shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(self.shape, device=device, dtype=dtype) for _ in layers]
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    def slots(self, rows: int) -> Tensor:
        """The next ``rows`` slots of each request ``[B, rows]``: their positions as well."""
        steps = torch.arange(rows, device=self.lengths.device)
        return self.lengths[:, None] + steps

    def write(self, layer: int, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Put keys and values ``[B, G, N, D]`` at slots ``[B, N]``."""
        index = slots[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
        self.keys[layer].scatter_(2, index, key.to(self.keys[layer].dtype))
        self.values[layer].scatter_(2, index, value.to(self.values[layer].dtype))

    def commit(self, counts: Tensor | int) -> None:
        """The first ``counts [B]`` of the tokens just written belong to the context now."""
        self.lengths += counts

    def crop(self, lengths: Tensor) -> None:
        """Forget what lies at or behind ``lengths [B]``."""
        self.lengths.copy_(torch.minimum(self.lengths, lengths))

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` slots a row, doubling; the contents stay."""
        capacity = self.capacity
        if tokens <= capacity:
            return
        capacity = max(tokens, 2 * capacity)
        for tensors in (self.keys, self.values):
            for i, old in enumerate(tensors):
                new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
                new[:, :, : old.shape[2]] = old
                tensors[i] = new

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self.lengths.zero_()

    def select(self, rows: Tensor) -> None:
        """Keep or reorder requests: ``rows`` are indices ``[B']``."""
        self.keys = [k.index_select(0, rows) for k in self.keys]
        self.values = [v.index_select(0, rows) for v in self.values]
        self.lengths = self.lengths.index_select(0, rows)

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in (*self.keys, *self.values))
