"""The sparse-input linear layer for one row of x, as a stream of live columns.

Threads are written out as in CUDA: a tensor holds one number per thread. A program owns ``8 UNITS``
outputs and a share of the channels. Each of its warps lists the live ones among its own channels in
shared memory; the lists become one, and the warps take its columns in turn, so that all have as
many. An instruction copies the program's piece of COLUMNS columns, 16 bytes a lane, to a place of
the lane's own in a ring. The copy of a later column starts as soon as this one is in registers:
GROUPS * EACH of a lane are always under way, and a dead channel costs nothing after the list.

Shared memory, in bytes: the ring ``[warp, place, lane, 16]``, before the first column the warps'
lists ``[warp, channel]``, after the last the sums ``[warp, column, output]`` and their parts; the
list, a word of the value of x (high half) and the number of its channel; and the lists' lengths.
"""

# Triton has no unpacking inside a tuple.
# ruff: noqa: RUF005

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

BASE = gl.constexpr("mov.b32 $0, global_smem;")
COPY = gl.constexpr("cp.async.cg.shared.global.L2::128B [$1], [$2], 16, $3; mov.b32 $0, 0;")
COMMIT = gl.constexpr("cp.async.commit_group; mov.b32 $0, $1;")
BARRIER = gl.constexpr("bar.sync 0; mov.b32 $0, $1;")
MEET = gl.constexpr("bar.warp.sync 0xffffffff; mov.b32 $0, $1;")
READ4 = gl.constexpr("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];")
READ1 = gl.constexpr("ld.shared.b32 $0, [$1];")
WRITE4 = gl.constexpr(
    "{ .reg .pred p; setp.ne.b32 p, $6, 0; @p st.shared.v4.b32 [$1], {$2, $3, $4, $5}; "
    "mov.b32 $0, 0; }"
)
WRITE1 = gl.constexpr(
    "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.shared.b32 [$1], $2; mov.b32 $0, 0; }"
)
BATCH = gl.constexpr(8)  # values of x that a lane reads at once


@gluon.constexpr_function
def wait(groups):
    """Assembly that waits until at most so many groups of copies are under way."""
    return f"cp.async.wait_group {groups}; mov.b32 $0, $1;"


@gluon.constexpr_function
def enlist(half):
    """Assembly: append a warp's live channels to its list.

    $0: the list's new length; $1: x as 16 bits; $2: the threshold; $3: the channel; $4: the list;
    $5: its length.
    """
    lines = [".reg .pred p;", ".reg .b32 a, b, m, r;", ".reg .b16 h;"]
    if half:
        lines += ["cvt.u16.u32 h, $1;", "cvt.f32.f16 a, h;"]
    else:
        lines += ["shl.b32 a, $1, 16;"]
    lines += [
        "abs.f32 a, a;",
        "setp.gtu.f32 p, a, $2;",  # not a number counts
        "setp.neu.and.f32 p, a, 0f00000000, p;",
        "vote.sync.ballot.b32 b, p, 0xffffffff;",
        "mov.u32 m, %lanemask_lt;",
        "and.b32 r, b, m;",
        "popc.b32 r, r;",
        "add.u32 r, r, $5;",
        "shl.b32 r, r, 2;",
        "add.u32 r, r, $4;",
        "shl.b32 m, $1, 16;",
        "or.b32 m, m, $3;",
        "@p st.shared.b32 [r], m;",
        "popc.b32 m, b;",
        "add.u32 $0, m, $5;",
    ]
    return "{\n" + "\n".join(lines) + "\n}"


@gluon.constexpr_function
def list_at(warps, depth):
    """Where the list begins."""
    return warps * depth * 512


@gluon.constexpr_function
def counts_at(warps, depth, chunks):
    """Where the lengths of the warps' lists begin, of so many times 32 channels each."""
    return list_at(warps, depth) + warps * chunks * 128


@gluon.constexpr_function
def shared_bytes(warps, depth, chunks):
    """Bytes of shared memory."""
    return counts_at(warps, depth, chunks) + (warps + 3) // 4 * 16


@gluon.jit
def _say(asm: gl.constexpr, some):
    """One instruction without operands; ``some`` is any number per thread."""
    gl.inline_asm_elementwise(asm, "=r,r", [some], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _read4(address):
    """Four words of shared memory."""
    return gl.inline_asm_elementwise(
        READ4, "=r,=r,=r,=r,r", [address],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _read1(address):
    """One word of shared memory."""
    return gl.inline_asm_elementwise(
        READ1, "=r,r", [address], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _write4(address, a, b, c, d, keep):
    """Four float32 to shared memory."""
    gl.inline_asm_elementwise(
        WRITE4, "=r,r,f,f,f,f,r", [address, a, b, c, d, keep],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _write1(address, value, keep):
    """One float32 to shared memory."""
    gl.inline_asm_elementwise(
        WRITE1, "=r,r,f,r", [address, value, keep], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _limits(threshold, channel, in_features, first, step, COUNT: gl.constexpr):
    """Thresholds of COUNT channels a step apart; infinite past the last."""
    limits = ()
    for i in gl.static_range(0, COUNT):
        place = channel + (first + i) * step
        limits = limits + (
            gl.load(threshold + place, mask=place < in_features, other=float("inf")),
        )
    return limits


@gluon.jit
def _enlist(x, limits, channel, list_base, count, in_features, first, step, COUNT: gl.constexpr):
    """Append the live ones of COUNT channels a step apart to the warp's list."""
    HALF: gl.constexpr = x.dtype.element_ty == gl.float16
    values = ()
    for i in gl.static_range(0, COUNT):
        place = channel + (first + i) * step
        bits = x.to(gl.pointer_type(gl.int16), bitcast=True) + place
        value = gl.load(bits, mask=place < in_features, other=0)
        values = values + (value.to(gl.int32) & 65535,)
    for i in gl.static_range(0, COUNT):
        place = channel + (first + i) * step
        count = gl.inline_asm_elementwise(
            enlist(HALF), "=&r,r,f,r,r,r", [values[i], limits[i], place, list_base, count],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    return count


@gluon.jit
def _join(
    base, own, count, lane, warp, WARPS: gl.constexpr, DEPTH: gl.constexpr, CHUNKS: gl.constexpr
):
    """Move the warps' lists behind each other; return how many channels they have."""
    counts = base + counts_at(WARPS, DEPTH, CHUNKS)
    _write1(counts + warp * 4, count.to(gl.float32, bitcast=True), (lane == 0).to(gl.int32))
    _say(BARRIER, base)
    before = warp * 0
    for i in gl.static_range(0, (WARPS + 3) // 4):
        four = _read4(counts + 16 * i)
        for k in gl.static_range(0, 4):
            before += gl.where(4 * i + k < warp, four[k], 0)
    target = base + list_at(WARPS, DEPTH) + before * 4
    for i in gl.static_range(0, CHUNKS):
        entry = 32 * i + lane
        word = _read1(own + entry * 4).to(gl.float32, bitcast=True)
        _write1(target + entry * 4, word, (entry < count).to(gl.int32))
    return gl.sum(gl.where(lane == 0, count, 0), 0)


@gluon.jit
def _start(slot, source, list_base, entry, count, stride, whole):
    """Start the copy of a listed column's piece; return its word of the list, 0 past the end."""
    there = entry < count
    word = gl.where(there, _read1(list_base + gl.where(there, entry, 0) * 4), 0)
    address = source + (word & 65535).to(gl.int64) * stride
    size = gl.where(there & whole, 16, 0)
    gl.inline_asm_elementwise(
        COPY, "=r,r,l,r", [slot, address, size], dtype=gl.int32, is_pure=False, pack=1
    )
    return word


@gluon.jit
def _add(sums, words, word, HALF: gl.constexpr):
    """Add eight weights times x to the sums."""
    if HALF:
        value = (word >> 16).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
    else:
        value = (word & -65536).to(gl.float32, bitcast=True)
    new = ()
    for i in gl.static_range(0, 4):
        if HALF:
            low = words[i].to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
            high = (words[i] >> 16).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
        else:
            low = (words[i] << 16).to(gl.float32, bitcast=True)
            high = (words[i] & -65536).to(gl.float32, bitcast=True)
        new = new + (sums[2 * i] + low * value, sums[2 * i + 1] + high * value)
    return new


@gluon.jit
def multiply(
    x, weight, threshold, bias, y, out_features, in_features, column_stride,
    UNITS: gl.constexpr, CHUNKS: gl.constexpr, GROUPS: gl.constexpr, EACH: gl.constexpr,
    WARPS: gl.constexpr, BIASED: gl.constexpr,
):  # fmt: skip
    """y[share, o] = sum over the live channels i of a share of x[i] W[o, i], + bias[o] if given.

    Program ``(b, share)``: outputs ``8 UNITS b`` and on; chunks of 32 channels, CHUNKS <= 4 DEPTH
    to a warp, are dealt to the shares' warps in turn. Sums in float32 by lane, added up at the end.
    """
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    DEPTH: gl.constexpr = GROUPS * EACH
    COLUMNS: gl.constexpr = 32 // UNITS
    HALF: gl.constexpr = x.dtype.element_ty == gl.float16
    ALL: gl.constexpr = shared_bytes(WARPS, DEPTH, CHUNKS)
    gdc_launch_dependents()
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    # Large and alive to the end, so it begins where the assembly takes shared memory to begin.
    shared = gl.allocate_shared_memory(gl.int32, [(ALL + 255) // 256 + 1, 64], plain)
    # Assembly alone would not have the compiler declare it.
    shared.index((ALL + 255) // 256).store(gl.zeros([64], gl.int32, layout=flat))
    thread = gl.arange(0, 32 * WARPS, layout=flat)
    base = gl.inline_asm_elementwise(BASE, "=r,r", [thread], dtype=gl.int32, is_pure=True, pack=1)
    lane = thread % 32
    warp = thread // 32
    step = gl.num_programs(1) * (32 * WARPS)
    channel = gl.program_id(1) * (32 * WARPS) + thread
    own = base + warp * (CHUNKS * 128)
    FIRST: gl.constexpr = CHUNKS % BATCH if CHUNKS % BATCH else BATCH
    limits = _limits(threshold, channel, in_features, 0, step, FIRST)
    gdc_wait()
    count = _enlist(x, limits, channel, own, thread * 0, in_features, 0, step, FIRST)
    for first in range(FIRST, CHUNKS, BATCH):
        more = _limits(threshold, channel, in_features, first, step, BATCH)
        count = _enlist(x, more, channel, own, count, in_features, first, step, BATCH)
    total = _join(base, own, count, lane, warp, WARPS, DEPTH, CHUNKS)
    _say(BARRIER, base)  # the list is whole, and the ring is free
    list_base = base + list_at(WARPS, DEPTH)

    sub = lane // UNITS
    unit = gl.program_id(0) * UNITS + lane % UNITS
    whole = (sub < COLUMNS) & (unit * 8 < out_features)
    source = weight.to(gl.int64) + (gl.where(whole, unit, 0) * 16).to(gl.int64)
    stride = column_stride.to(gl.int64) * 2
    slot = base + warp * (DEPTH * 512) + lane * 16
    held = ()
    for place in gl.static_range(0, DEPTH):
        entry = (place * WARPS + warp) * COLUMNS + sub
        at = slot + place * 512
        held = held + (_start(at, source, list_base, entry, total, stride, whole),)
        if place % EACH == EACH - 1:
            _say(COMMIT, base)
    sums = ()
    for _ in gl.static_range(0, 8):
        sums = sums + (gl.zeros([32 * WARPS], gl.float32, layout=flat),)
    for done in range(0, total, DEPTH * WARPS * COLUMNS):
        under_way = ()
        for group in gl.static_range(0, GROUPS):
            _say(wait(GROUPS - 1), base)
            pieces = ()
            for i in gl.static_range(0, EACH):
                pieces = pieces + (_read4(slot + (group * EACH + i) * 512),)
            for i in gl.static_range(0, EACH):
                entry = ((DEPTH + group * EACH + i) * WARPS + warp) * COLUMNS + done + sub
                at = slot + (group * EACH + i) * 512
                started = _start(at, source, list_base, entry, total, stride, whole)
                under_way = under_way + (started,)
            _say(COMMIT, base)
            for i in gl.static_range(0, EACH):
                sums = _add(sums, pieces[i], held[group * EACH + i], HALF)
        held = under_way
    _say(wait(0), base)  # no copy may land on the sums
    _say(BARRIER, base)
    _finish(
        y + gl.program_id(1).to(gl.int64) * out_features, bias, sums, base, thread, out_features,
        UNITS, WARPS, BIASED,
    )  # fmt: skip
    shared._keep_alive()


@gluon.jit
def _finish(
    y, bias, sums, base, thread, out_features,
    UNITS: gl.constexpr, WARPS: gl.constexpr, BIASED: gl.constexpr,
):  # fmt: skip
    """Add up the lanes' sums in two stages and store; at the end a thread has one output."""
    COLUMNS: gl.constexpr = 32 // UNITS
    OUTPUTS: gl.constexpr = 8 * UNITS
    ROWS: gl.constexpr = WARPS * COLUMNS
    PARTS: gl.constexpr = (32 * WARPS) // OUTPUTS
    EACH: gl.constexpr = (ROWS + PARTS - 1) // PARTS
    lane = thread % 32
    row = thread // 32 * COLUMNS + lane // UNITS
    keep = (lane < UNITS * COLUMNS).to(gl.int32)
    place = base + (row * OUTPUTS + lane % UNITS * 8) * 4
    _write4(place, sums[0], sums[1], sums[2], sums[3], keep)
    _write4(place + 16, sums[4], sums[5], sums[6], sums[7], keep)
    _say(BARRIER, base)
    output = thread % OUTPUTS
    part = thread // OUTPUTS
    total = gl.full_like(thread, 0.0, dtype=gl.float32)
    for i in gl.static_range(0, EACH):
        row = part * EACH + i
        place = base + (gl.minimum(row, ROWS - 1) * OUTPUTS + output) * 4
        value = _read1(place).to(gl.float32, bitcast=True)
        total += gl.where(row < ROWS, value, 0.0)
    base += ROWS * OUTPUTS * 4
    _write1(base + thread * 4, total, (part < PARTS).to(gl.int32))
    _say(BARRIER, base)
    total = gl.full_like(thread, 0.0, dtype=gl.float32)
    for i in gl.static_range(0, PARTS):
        total += _read1(base + (i * OUTPUTS + output) * 4).to(gl.float32, bitcast=True)
    place = gl.program_id(0) * OUTPUTS + output
    keep = (thread < OUTPUTS) & (place < out_features)
    if BIASED:
        total += gl.load(bias + place, mask=keep, other=0.0).to(gl.float32)
    gl.store(y + place, total.to(y.dtype.element_ty), mask=keep)
