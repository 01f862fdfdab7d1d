"""Text records: the keys and values of one layer, stored under an exact text.

A text prefix is not a token prefix, because a cut text can have other tokens. Text records are therefore
separate from block records: they have another record kind, another key domain, any shape and one layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvlab.core import record
from kvlab.core.keys import text_key
from kvlab.core.precisions import Unholdable
from kvlab.core.record import BadRecord, Format
from kvlab.errors import InputError
from kvlab.stores import Store
from kvlab.stores.base import described
from kvlab.stores.faults import Reason


@dataclass(frozen=True)
class TextRecords:
    """Pairs of tensors in a store, by text and layer.

    Attributes:
        fingerprint: the fingerprint of the model. With b"" the cache keys are not bound to a model: a
            second model that uses the same text reads the tensors of the first one.
    """

    store: Store
    format: Format
    salt: bytes = field(repr=False)
    fingerprint: bytes

    def put(self, prefix: str, layer: int, keys: Tensor, values: Tensor) -> tuple[Reason | None, int]:
        """Store a pair.

        Returns:
            The reason for a drop (None if the store accepted the pair), and the bytes offered.

        Raises:
            InputError: the text is empty, the layer is negative, or the tensors differ or do not
                fit into a record.
        """
        key = self._key(prefix, layer)
        _check_pair(keys, values)
        try:
            value = record.encode(torch.stack((keys, values)), key, self.format, record.KIND_TEXT)
        except Unholdable:
            return Reason.OVERFLOW, 0
        taken = self.store.put_many([key], [value])
        return None if taken else Reason.STORE, sum(len(piece) for piece in value)

    def get(self, prefix: str, layer: int) -> tuple[tuple[Tensor, Tensor] | None, str, int]:
        """Return the pair in its original shape and dtype (None on a miss), the reason for the miss, and the bytes.

        Raises:
            InputError: the text is empty, or the layer is negative.
        """
        key = self._key(prefix, layer)
        reasons: list[str] = []
        value = self.store.get_many([key], reasons=reasons)[0]
        if value is None:
            return None, reasons[0], 0
        try:
            both = record.decode(value, key, self.format, None, record.KIND_TEXT)
            if both.shape[0] != 2:
                raise BadRecord(Reason.DIMS)
        except BadRecord as error:
            if error.damaged:
                self.store.delete_many([key])
            return None, error.reason, 0
        return (both[0], both[1]), "", len(value)

    def _key(self, prefix: str, layer: int) -> bytes:
        if not (isinstance(prefix, str) and prefix and prefix.encode(errors="replace").decode() == prefix):
            raise InputError(f"expected a prefix of non-empty text that UTF-8 can encode, got {described(prefix)}")
        if type(layer) is not int or not 0 <= layer < 2**32:
            raise InputError(f"expected a layer number of 0 … 2**32 - 1, got {described(layer)}")
        return text_key(prefix, layer, self.format.precision, self.salt, self.fingerprint)


def _check_pair(keys: Tensor, values: Tensor) -> None:
    if not (isinstance(keys, Tensor) and isinstance(values, Tensor)):
        raise InputError(f"expected two tensors, got {type(keys).__name__} and {type(values).__name__}")
    if keys.shape != values.shape or keys.dtype != values.dtype:
        raise InputError(
            "expected keys and values of the same shape and dtype, got "
            f"{tuple(keys.shape)} {keys.dtype} and {tuple(values.shape)} {values.dtype}"
        )
    if keys.ndim >= record.MAX_DIMS or keys.layout != torch.strided or keys.is_meta:
        raise InputError(f"expected dense tensors of up to 7 dims, got {tuple(keys.shape)} {keys.layout}")
