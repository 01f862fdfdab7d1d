"""Keeping one layer's keys and values under a text: the two calls of the source document.

A text prefix is not a token prefix, because cutting a text changes its tokens. So these records never meet
those of the token calls: another record kind, another key domain, any shape, one layer each.
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
from kvlab.stores.base import told
from kvlab.stores.faults import Reason


@dataclass(frozen=True)
class TextRecords:
    """Pairs of tensors in a store, by text and layer.

    Attributes:
        fingerprint: of the model; b"" binds the keys to none, and a second model that uses the same text
            reads the first one's tensors.
    """

    store: Store
    format: Format
    salt: bytes = field(repr=False)
    fingerprint: bytes

    def put(self, prefix: str, layer: int, keys: Tensor, values: Tensor) -> tuple[Reason | None, int]:
        """Store a pair.

        Returns:
            why it was dropped, None if the store took it; and the bytes that were offered.

        Raises:
            InputError: an empty text, a negative layer, tensors that differ or that no record holds.
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
        """The pair in its original shape and dtype, None on a miss; why it is a miss, "" for none; its bytes.

        Raises:
            InputError: an empty text, a negative layer.
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
            raise InputError(f"expected a text as prefix, not empty and encodable, got {told(prefix)}")
        if type(layer) is not int or not 0 <= layer < 2**32:
            raise InputError(f"expected a layer number of 0 … 2**32 - 1, got {told(layer)}")
        return text_key(prefix, layer, self.format.precision, self.salt, self.fingerprint)


def _check_pair(keys: Tensor, values: Tensor) -> None:
    if not (isinstance(keys, Tensor) and isinstance(values, Tensor)):
        raise InputError(f"expected two tensors, got {type(keys).__name__} and {type(values).__name__}")
    if keys.shape != values.shape or keys.dtype != values.dtype:
        raise InputError(
            "expected keys and values of one shape and dtype, got "
            f"{tuple(keys.shape)} {keys.dtype} and {tuple(values.shape)} {values.dtype}"
        )
    if keys.ndim >= record.MAX_DIMS or keys.layout != torch.strided or keys.is_meta:
        raise InputError(f"expected dense tensors of up to 7 dims, got {tuple(keys.shape)} {keys.layout}")
