"""How much memory a call needs, counted operator by operator; on the device ``meta`` too, where nothing is computed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Context that sums the storages that operators returned and that are still alive; ``peak`` is the largest sum.

    Args:
        fixed: tensors that exist throughout and count.
        ignored: tensors that do not, though an operator may return a view of them.
    """

    def __init__(self, fixed: Sequence[Tensor] = (), *, ignored: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.ignored = {tensor.untyped_storage()._cdata for tensor in ignored}
        self.peak = 0
        self._count(fixed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._count([leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)])
        return result

    def _count(self, tensors: Sequence[Tensor]) -> None:
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata in self.ignored:
                continue
            reference = StorageWeakRef(storage)
            self.storages[reference.cdata] = (reference, storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
