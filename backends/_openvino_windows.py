"""Attention in a window: blocks of queries, each over the keys that its window reaches, and caches of that length.

OpenVINO's attention with a cache computes all pairs of queries and keys, whatever their mask hides, and its caches hold
the whole text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunepass.backends._openvino_core import require

__all__ = ["attend_by_blocks"]

#: axes of queries, keys and values [B, H, tokens, D]
_HEADS, _TOKENS, _WIDTH = 1, 2, 3
#: queries of a block, where the window is no shorter
LENGTH = 256
#: slots that a cache keeps beyond the window: a chat that goes on otherwise takes the last tokens of a turn back
SPARE = 64
#: what stands between a cache and the attention that reads it
_BETWEEN = ("Reshape", "Broadcast", "Unsqueeze", "Squeeze", "Transpose", "Tile", "Convert")


def attend_by_blocks(model: Any, windows: Mapping[str, int], goes_on: Any) -> set[str]:
    """The attention of layers with a window, in an ``openvino.Model`` whose caches are inputs still.

    Exact where queries see keys of the window's last tokens alone: slots of a cache are in the order of the text, so
    tokens that are W positions apart are W slots apart at most.

    In a call without a past and with more than 2 * W tokens, all queries but the last one are cut into blocks, and each
    attends to its own block and to those before it that the window reaches. The last query, and all those of other
    calls, attend to all keys.

    A call with a single row takes the last ``W + SPARE`` slots of its caches, unless a query sees one before them: a
    row that is left of a batch may have empty slots between its tokens. Caches of several rows stay whole, as each row
    has its own empty slots.

    Queries whose heads share keys are attended to as more queries of one head, so that no keys are repeated.

    Args:
        model: edited in place.
        windows: by name of the input that holds a layer's keys, how many of the last tokens its queries see at most.
        goes_on: [1] bool, whether the call has a past. Without one caches are read as empty, whatever they hold.

    Returns:
        The names of the inputs that hold keys and values of attentions that changed.
    """
    blocks: dict[tuple[str, int], _Blocks] = {}
    changed: set[str] = set()
    for attention in model.get_ordered_ops():
        if attention.get_type_name() != "ScaledDotProductAttention" or attention.get_input_size() < 4:
            continue
        keys, values = (_cache_of(attention.input_value(i)) for i in (1, 2))
        if keys is None or values is None or _name_of(keys) not in windows:
            continue
        mask, window = attention.input_value(3), windows[_name_of(keys)]
        if not _is_one_for_all_heads(mask):
            continue
        key = mask.get_node().get_name(), window  # unique, as friendly names are not
        if key not in blocks:
            blocks[key] = _Blocks(mask, keys.input_value(0), window, goes_on)
        blocks[key].replace(attention, keys, values)
        changed |= {_name_of(keys), _name_of(values)}
    if changed:
        model.validate_nodes_and_infer_types()
    return changed


def _cache_of(read: Any) -> Any:
    """The operator that puts keys or values behind those of the cache; None where there is none."""
    node = read.get_node()
    while node.get_type_name() in _BETWEEN:
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Concat" and node.get_input_size() == 2 else None


def _name_of(joined: Any) -> str:
    """Of the cache that an operator appends to."""
    node = joined.input_value(0).get_node()
    while node.get_type_name() in ("Gather", "Slice"):
        node = node.input_value(0).get_node()
    return str(node.get_friendly_name())


def _is_one_for_all_heads(mask: Any) -> bool:
    shape = mask.get_partial_shape()
    return bool(shape.rank.is_static and shape.rank.get_length() == 4 and shape[_HEADS] == 1)


class _Blocks:
    """How the queries of all attentions with one mask are cut into N blocks of L slots, and the mask of each block.

    Args:
        mask: [B, 1, Q, T], bool or added, with columns for at least the P + Q slots of the cache and of the call.
        past: [B, H', P, D], keys of the cache.
        window: W.
        goes_on: [1] bool, whether P counts.
    """

    def __init__(self, mask: Any, past: Any, window: int, goes_on: Any) -> None:
        ops = _ops()
        self._length = min(window, LENGTH)
        #: blocks before a query's own that its window reaches
        self._reach = -(-window // self._length)
        seen, self._added = _condition(mask)
        self._rows, queries, columns = (_size(mask, axis) for axis in (0, 2, 3))
        #: [1] from which slot of a cache on, and up to which, the call reads it
        self._end = ops.select(goes_on, _size(past, _TOKENS), _numbers(0))
        self._first = self._first_wanted(seen, ops.subtract(columns, ops.add(queries, self._end)), window)
        slots = ops.add(ops.subtract(self._end, self._first), queries)
        seen = _from(seen, ops.subtract(columns, slots), 3)
        alone = ops.logical_and(ops.equal(slots, queries), ops.greater(queries, _numbers(2 * window)))
        #: [1] how many queries go into blocks
        self._cut = ops.select(alone, ops.subtract(queries, _numbers(1)), _numbers(0))
        #: [1] N, and how many slots all blocks have, some more than there are queries
        self._number = ops.divide(ops.add(self._cut, _numbers(self._length - 1)), _numbers(self._length))
        self._slots = ops.multiply(self._number, _numbers(self._length))
        self._rest, self._banded = _from(seen, self._cut, 2), self._band(seen)
        #: by how many heads share keys, the masks of the last queries and of blocks
        self._shared: dict[int, list[Any]] = {}

    def replace(self, attention: Any, keys: Any, values: Any) -> None:
        """One attention. ``keys`` and ``values`` put those of the call [B, H', Q, D] behind those of the cache."""
        ops = _ops()
        query, _, _, _, *scale = attention.input_values()
        readers = attention.output(0).get_target_inputs()
        heads, own_heads, width = (_known(x, axis) for x, axis in ((query, 1), (keys.output(0), 1), (query, 3)))
        rest_mask, band = self._masks(heads // own_heads)
        for joined in (keys, values):
            past = _between(joined.input_value(0), self._first, self._end, _TOKENS)
            joined.input(0).replace_source_output(past.output(0))
        cut = self._in_rows(self._cut_up(query), heads, self._length)
        whole = [ops.reshape(cut, _numbers(0, own_heads, heads // own_heads * self._length, width), True)]
        whole += [self._of_keys(joined.input_value(1)) for joined in (keys, values)]
        blocks = ops.scaled_dot_product_attention(*whole, band, *scale)
        rest = ops.reshape(_from(query, self._cut, _TOKENS), _numbers(0, own_heads, -1, width), True)
        last = ops.scaled_dot_product_attention(rest, keys, values, rest_mask, *scale)
        last.set_friendly_name(attention.get_friendly_name())
        width = _known(values.output(0), _WIDTH)
        last = ops.reshape(last, _numbers(0, heads, -1, width), True)
        blocks = ops.reshape(blocks, _numbers(0, heads, self._length, width), True)
        made = ops.concat([self._in_order(blocks, heads), last], axis=_TOKENS)
        for reader in readers:
            reader.replace_source_output(made.output(0))

    def _masks(self, sharing: int) -> list[Any]:
        """Masks of the last queries and of blocks, for ``sharing`` heads of queries one after the other."""
        ops = _ops()
        if sharing not in self._shared:
            several = [ops.tile(seen, _numbers(1, 1, sharing, 1)) for seen in (self._rest, self._banded)]
            added = self._added
            self._shared[sharing] = several if added is None else [ops.select(seen, *added) for seen in several]
        return self._shared[sharing]

    def _first_wanted(self, seen: Any, column: Any, window: int) -> Any:
        """[1] int64. ``column`` [1] is that of the cache's first slot in the mask."""
        ops = _ops()
        first = ops.maximum(ops.subtract(self._end, _numbers(window + SPARE)), _numbers(0))
        before = _between(seen, column, ops.add(column, first), 3)
        unseen = ops.logical_not(ops.reduce_logical_or(before, _numbers(0, 1, 2, 3), False))
        single = ops.equal(self._rows, _numbers(1))
        return ops.select(ops.logical_and(single, unseen), first, _numbers(0))

    def _of_keys(self, own: Any) -> Any:
        """[B, H', Q, D] -> [B * N, H', (reach + 1) * L, D]: each block behind those before it."""
        ops = _ops()
        own_heads, width = (_known(own, axis) for axis in (_HEADS, _WIDTH))
        blocks = self._cut_up(own)
        before = _zeros(own, self._sizes(own_heads, _numbers(self._reach), self._length, width))
        line = ops.concat([before, blocks], axis=2)
        shifted = [_between(line, _numbers(i), ops.add(self._number, _numbers(i)), 2) for i in range(self._reach)]
        joined = ops.concat([*shifted, blocks], axis=3)
        return self._in_rows(joined, own_heads, (self._reach + 1) * self._length)

    def _cut_up(self, x: Any) -> Any:
        """[B, H, Q, D] -> [B, H, N, L, D], the last block filled up with zeros."""
        ops = _ops()
        heads, width = (_known(x, axis) for axis in (_HEADS, _WIDTH))
        missing = ops.subtract(self._slots, self._cut)
        whole = _padded(_between(x, _numbers(0), self._cut, _TOKENS), _TOKENS, after=missing)
        return ops.reshape(whole, _numbers(0, heads, -1, self._length, width), True)

    def _in_rows(self, blocks: Any, heads: int, length: int) -> Any:
        """[B, H, N, length, D] -> [B * N, H, length, D]"""
        ops = _ops()
        sizes = _numbers(-1, heads, length, _known(blocks.output(0), 4))
        return ops.reshape(ops.transpose(blocks, _numbers(0, 2, 1, 3, 4)), sizes, False)

    def _in_order(self, blocks: Any, heads: int) -> Any:
        """[B * N, H, L, D] -> [B, H, cut, D]"""
        ops = _ops()
        width = _known(blocks.output(0), _WIDTH)
        apart = ops.reshape(blocks, self._sizes(-1, heads, self._length, width), False)
        line = ops.reshape(ops.transpose(apart, _numbers(0, 2, 1, 3, 4)), _numbers(0, heads, -1, width), True)
        return _between(line, _numbers(0), self._cut, _TOKENS)

    def _band(self, seen: Any) -> Any:
        """[B, 1, Q, Q] bool -> [B * N, 1, L, (reach + 1) * L]: of each block of rows the columns of its keys.

        With ``reach * L`` columns of nothing in front, a row has R, and the columns of block j begin at ``j * L``. So a
        block begins ``L * R + L`` values behind the one before, and cutting the line of all values there finds them.
        """
        ops, length = _ops(), self._length
        own = _between(_between(ops.squeeze(seen, _numbers(1)), _numbers(0), self._cut, 1), _numbers(0), self._cut, 2)
        missing = ops.subtract(self._slots, self._cut)
        number = _padded(ops.convert(own, "u8"), 1, after=missing)
        number = _padded(number, 2, before=_numbers(self._reach * length), after=missing)
        columns = ops.add(self._slots, _numbers(self._reach * length))
        block = ops.multiply(columns, _numbers(length))
        line = ops.reshape(number, self._sizes(ops.multiply(block, self._number)), False)
        line = _padded(line, 1, after=self._slots)
        rows = ops.reshape(line, self._sizes(self._number, ops.add(block, _numbers(length))), False)
        rows = ops.reshape(_between(rows, _numbers(0), block, 2), self._sizes(self._number, length, columns), False)
        width = (self._reach + 1) * length
        rows = _between(rows, _numbers(0), _numbers(width), 3)
        return ops.convert(ops.reshape(rows, _numbers(-1, 1, length, width), False), "boolean")

    def _sizes(self, *parts: Any) -> Any:
        """[n] int64: the number of rows, and other sizes, each a number or [1] int64."""
        return _ops().concat([self._rows, *(_numbers(n) if isinstance(n, int) else n for n in parts)], axis=0)


def _condition(mask: Any) -> tuple[Any, tuple[Any, Any] | None]:
    """Which pairs a mask leaves, and what is added to those and to the others; None where the mask is itself that."""
    node = mask.get_node()
    if node.get_type_name() == "Select":
        return node.input_value(0), (node.input_value(1), node.input_value(2))
    return mask, None


def _ops() -> Any:
    require()
    from openvino import opset13

    return opset13


def _numbers(*numbers: int) -> Any:
    return _ops().constant(list(numbers), dtype="int64")


def _size(x: Any, axis: int) -> Any:
    """[1] int64"""
    ops = _ops()
    return ops.gather(ops.shape_of(x, output_type="i64"), _numbers(axis), ops.constant(0))


def _known(x: Any, axis: int) -> int:
    return int(x.get_partial_shape()[axis].get_length())


def _between(x: Any, start: Any, end: Any, axis: int) -> Any:
    return _ops().slice(x, start, end, _numbers(1), _numbers(axis))


def _from(x: Any, start: Any, axis: int) -> Any:
    return _between(x, start, _numbers(2**31 - 1), axis)


def _zeros(like: Any, sizes: Any) -> Any:
    ops = _ops()
    zero = ops.constant(0.0, dtype="float32")  # numpy has no bfloat16
    return ops.broadcast(ops.convert_like(zero, like), sizes)


def _padded(x: Any, axis: int, *, before: Any = None, after: Any) -> Any:
    """Zeros in front of and behind an axis, [1] int64 of them."""
    ops = _ops()
    others = x.output(0).get_partial_shape().rank.get_length() - axis - 1

    def at(number: Any) -> Any:
        around = [_numbers(*[0] * axis), _numbers(0) if number is None else number]
        return ops.concat(around + ([_numbers(*[0] * others)] if others else []), axis=0)

    return ops.pad(x, at(before), at(after), "constant", ops.convert_like(ops.constant(0, dtype="int32"), x))
