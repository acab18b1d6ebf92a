"""Inner loops of the compiled kernels, written as LLVM vectors: what a compiler does not find by itself.

LLVM's popcount of a vector of words is one instruction with AVX-512 VPOPCNTDQ, a few with AVX2 and NEON. (Sums of
absolute byte differences, one AVX2 instruction for 2.7 words, need 1.5 times the memory and were no faster: the kernel
waits for memory more than for arithmetic. Our measurement.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

NODES = 8
"""Control points of one block: two AVX2 or one AVX-512 register of 64-bit sums."""
FLOATS = 8
_FLOOR = float(np.float32(1e-6))
"""Least mean of the twelve distances (deedsBCV)."""
_WORD = ir.IntType(64)
_PREFETCH = "llvm.prefetch.p0" if binding.llvm_version_info[0] >= 17 else "llvm.prefetch.p0i8"
"""Older versions name the type a pointer points to."""


def _load(builder: Any, base: Any, index: Any, kind: Any, align: int = 8) -> Any:
    """The value of type `kind` at element `index` (of 8 bytes) behind the address `base`."""
    address = builder.inttoptr(builder.add(base, builder.mul(index, _WORD(8))), kind.as_pointer())
    return builder.load(address, align=align)


def _function(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """An LLVM intrinsic function, declared once a module."""
    return builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def _block(labels: int, masked: bool) -> Callable:
    """Intrinsic: summed distances of NODES neighbouring control points at `labels` neighbouring labels.

    Its arguments are addresses, and counts in 64-bit words: fixed words, mask words, moving words; for each read the
    place of node 0 in the fixed words and of the moving row; for each (label, read) the place in the moving row; the
    number of all reads, the first and the one after the last of these; the first label; the first node; totals (labels,
    NODES), which grow. The sums stay in registers over the reads, and each fixed vector is used for all labels.
    """
    kind = ir.VectorType(_WORD, NODES)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        fixed, mask, moving, fixed_at, moving_at, label_at, reads, begin, end, label, node, totals = arguments
        count_bits = _function(builder, f"llvm.ctpop.v{NODES}i64", kind, kind)
        targets = []
        for number in range(labels):
            row = builder.mul(builder.add(label, _WORD(number)), _WORD(8 * NODES))
            targets.append(builder.inttoptr(builder.add(totals, row), kind.as_pointer()))
        initial = [builder.load(target, align=8) for target in targets]
        before = builder.block
        loop, after = builder.append_basic_block("reads"), builder.append_basic_block("reads_end")
        builder.branch(loop)
        builder.position_at_end(loop)
        read = builder.phi(_WORD)
        read.add_incoming(begin, before)
        sums = [builder.phi(kind) for _ in range(labels)]
        for one, value in zip(sums, initial):
            one.add_incoming(value, before)
        start = builder.add(_load(builder, fixed_at, read, _WORD), node)
        here = _load(builder, fixed, start, kind)
        keep = _load(builder, mask, start, kind) if masked else None
        row = builder.add(_load(builder, moving_at, read, _WORD), node)
        grown = []
        for number, total in enumerate(sums):
            place = builder.add(builder.mul(builder.add(label, _WORD(number)), reads), read)
            there = _load(builder, moving, builder.add(row, _load(builder, label_at, place, _WORD)), kind)
            different = builder.xor(here, there)
            if masked:
                different = builder.and_(different, keep)
            grown.append(builder.add(total, builder.call(count_bits, [different])))
        following = builder.add(read, _WORD(1))
        read.add_incoming(following, builder.block)
        for one, total in zip(sums, grown):
            one.add_incoming(total, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, end), loop, after)
        builder.position_at_end(after)
        for target, total in zip(targets, grown):
            builder.store(total, target, align=8)
        return context.get_dummy_value()

    @intrinsic
    def block(
        typing_context: Any, fixed: Any, mask: Any, moving: Any, fixed_at: Any, moving_at: Any, label_at: Any,
        reads: Any, begin: Any, end: Any, label: Any, node: Any, totals: Any,
    ) -> tuple:  # fmt: skip
        return types.void(*[types.int64] * 12), generate

    return block


popcount_3, popcount_4 = _block(3, False), _block(4, False)
popcount_3_masked, popcount_4_masked = _block(3, True), _block(4, True)


@intrinsic
def prefetch(typing_context: Any, address: Any) -> tuple:
    """Ask for the cache line at an address; it goes to the second-level cache."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = _function(builder, _PREFETCH, ir.VoidType(), pointer, number, number, number)
        builder.call(function, [builder.inttoptr(arguments[0], pointer), number(0), number(2), number(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _spread_lanes(builder: Any, one: Any) -> Any:
    """A float in all FLOATS lanes."""
    empty = ir.Constant(ir.VectorType(ir.FloatType(), FLOATS), ir.Undefined)
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), FLOATS), [0] * FLOATS)
    return builder.shuffle_vector(builder.insert_element(empty, one, ir.IntType(32)(0)), empty, zeros)


def _least_sums(parts: int) -> Callable:
    """Intrinsic: out[r] = min over c of source[c * stride + r] + weight[c], for FLOATS * parts values of r.

    Arguments: addresses of source, weight and out (float32), number of c, stride in values.
    """
    number = ir.FloatType()
    kind = ir.VectorType(number, FLOATS)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, weight, out, count, stride = arguments

        def sums(index: Any) -> list:
            address = builder.add(weight, builder.mul(index, _WORD(4)))
            one = builder.load(builder.inttoptr(address, number.as_pointer()), align=4)
            spread = _spread_lanes(builder, one)
            start = builder.add(source, builder.mul(builder.mul(index, stride), _WORD(4)))
            values = []
            for part in range(parts):
                place = builder.inttoptr(builder.add(start, _WORD(4 * FLOATS * part)), kind.as_pointer())
                values.append(builder.fadd(builder.load(place, align=4), spread))
            return values

        first = sums(_WORD(0))
        before = builder.block
        loop, after = builder.append_basic_block("sums"), builder.append_basic_block("sums_end")
        builder.cbranch(builder.icmp_signed("<", _WORD(1), count), loop, after)
        builder.position_at_end(loop)
        index = builder.phi(_WORD)
        index.add_incoming(_WORD(1), before)
        best = [builder.phi(kind) for _ in range(parts)]
        for one, value in zip(best, first):
            one.add_incoming(value, before)
        least = []
        for one, value in zip(best, sums(index)):
            least.append(builder.select(builder.fcmp_ordered("<", value, one), value, one))
        following = builder.add(index, _WORD(1))
        index.add_incoming(following, builder.block)
        for one, value in zip(best, least):
            one.add_incoming(value, builder.block)
        last = builder.block
        builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
        builder.position_at_end(after)
        for part in range(parts):
            found = builder.phi(kind)
            found.add_incoming(first[part], before)
            found.add_incoming(least[part], last)
            first[part] = found
        for part in range(parts):
            place = builder.inttoptr(builder.add(out, _WORD(4 * FLOATS * part)), kind.as_pointer())
            builder.store(first[part], place, align=4)
        return context.get_dummy_value()

    @intrinsic
    def least_sums(typing_context: Any, source: Any, weight: Any, out: Any, count: Any, stride: Any) -> tuple:
        return types.void(*[types.int64] * 5), generate

    return least_sums


least_sums_4, least_sums_1 = _least_sums(4), _least_sums(1)


@intrinsic
def quantise(typing_context: Any, rows: Any, thresholds: Any, out: Any, first: Any) -> tuple:
    """Descriptor words of FLOATS voxels from the twelve distances of each, all in registers.

    Arguments: address of twelve row addresses (float32), of five thresholds (float32, decreasing), of the row of words,
    and the first voxel. Subtract the least, divide the thresholds' side by the mean, and set a bit for each threshold
    that a value stays below; the order of the additions is that of the numpy version.
    """
    floats, integers = ir.VectorType(ir.FloatType(), FLOATS), ir.VectorType(ir.IntType(32), FLOATS)
    words = ir.VectorType(_WORD, FLOATS)

    def constant(kind: Any, value: float) -> Any:
        return ir.Constant(kind, [value] * FLOATS)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        table, limits_at, target, start = arguments
        values = []
        for channel in range(12):
            row = builder.add(_load(builder, table, _WORD(channel), _WORD), builder.mul(start, _WORD(4)))
            values.append(builder.load(builder.inttoptr(row, floats.as_pointer()), align=4))
        least = values[0]
        for value in values[1:]:
            least = builder.select(builder.fcmp_ordered("<", value, least), value, least)
        values = [builder.fsub(value, least) for value in values]
        noise = values[0]
        for value in values[1:]:
            noise = builder.fadd(noise, value)
        noise = builder.fdiv(noise, constant(floats, 12.0))
        floor = constant(floats, _FLOOR)
        noise = builder.select(builder.fcmp_ordered(">", noise, floor), noise, floor)
        limits = []
        for number in range(5):
            address = builder.inttoptr(builder.add(limits_at, _WORD(4 * number)), ir.FloatType().as_pointer())
            limits.append(builder.fmul(_spread_lanes(builder, builder.load(address, align=4)), noise))
        halves = []
        for half in (values[:6], values[6:]):
            code = constant(integers, 0)
            for channel, value in enumerate(half):
                for bit, limit in enumerate(limits):
                    mark = constant(integers, 1 << (5 * channel + bit))
                    below = builder.fcmp_ordered("<", value, limit)
                    code = builder.or_(code, builder.select(below, mark, constant(integers, 0)))
            halves.append(builder.zext(code, words))
        found = builder.or_(halves[0], builder.shl(halves[1], constant(words, 30)))
        place = builder.add(target, builder.mul(start, _WORD(8)))
        builder.store(found, builder.inttoptr(place, words.as_pointer()), align=8)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate
