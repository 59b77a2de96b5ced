"""PTX words that Gluon lacks, and the barriers they work on."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Barriers of the words below, at each of which a warp arrives once.
K_FREE = gl.constexpr(0)
V_FREE = gl.constexpr(2)
DECIDED = gl.constexpr(5)
Q_FREE = gl.constexpr(8)
ITEM_THERE = gl.constexpr(11)
ITEM_FREE = gl.constexpr(13)
# Bytes of the words behind them: a warpgroup's decision on a tile, and the number of an item.
KEEP_AT = gl.constexpr(512)
ITEM_AT = gl.constexpr(768)

# Gluon's own arrive makes the whole warpgroup meet first, and its reduction to a scalar goes through shared
# memory; both would stand between two products of a skipped tile. These words keep their barriers, the
# warpgroups' decisions and the item numbers in 1024 bytes of their own (so the rest of shared memory stays
# aligned for TMA): 16 mbarriers, then decisions, then items. A thread is chosen by
# `elect`, and loaded scalars pass through `redux`, because ptxas then knows that a warp does not diverge;
# a predicate on %tid costs it the uniform registers of the whole loop.


@gluon.jit
def _ptx(text: gl.constexpr, a=0, b=0):
    """Runs PTX in every thread: $0 is the result, $1 and $2 are the arguments."""
    return gl.inline_asm_elementwise(
        text,
        "=r,r,r",
        [gl.to_tensor(a), gl.to_tensor(b)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def declare():
    """Makes room for the barriers and words, and two registers; once, before all others."""
    _ptx(
        """
        .shared .align 1024 .b8 skip_words[1024];
        .reg .b32 skip_vote;
        .reg .f32 skip_alpha;
        mov.b32 $0, 0;
        """
    )


@gluon.jit
def init(barrier, count):
    """Sets a barrier that completes a phase after `count` arrivals."""
    _ptx(
        """{
        .reg .pred first;
        .reg .b32 at;
        mov.u32 at, %tid.x;
        setp.eq.u32 first, at, 0;
        mov.u32 at, skip_words;
        mad.lo.u32 at, $1, 8, at;
        @first mbarrier.init.shared::cta.b64 [at], $2;
        mov.b32 $0, 0;
        }""",
        barrier,
        count,
    )


@gluon.jit
def arrive(barrier):
    """One arrival of each warp that executes it, for all that its threads did before."""
    _ptx(
        """{
        .reg .pred first;
        .reg .b32 at;
        bar.warp.sync 0xffffffff;
        elect.sync _|first, 0xffffffff;
        mov.u32 at, skip_words;
        mad.lo.u32 at, $1, 8, at;
        @first mbarrier.arrive.shared::cta.b64 _, [at];
        mov.b32 $0, 0;
        }""",
        barrier,
    )


@gluon.jit
def wait_for(barrier, phase):
    """Waits until a phase of a barrier, by its parity, is complete."""
    _ptx(
        """{
        .reg .pred done;
        .reg .b32 at;
        mov.u32 at, skip_words;
        mad.lo.u32 at, $1, 8, at;
        again:
        mbarrier.try_wait.parity.shared::cta.b64 done, [at], $2;
        @!done bra.uni again;
        mov.b32 $0, 0;
        }""",
        barrier,
        phase,
    )


@gluon.jit
def write(byte, value):
    """By one thread of the warp."""
    _ptx(
        """{
        .reg .pred first;
        .reg .b32 at;
        elect.sync _|first, 0xffffffff;
        mov.u32 at, skip_words;
        add.u32 at, at, $1;
        @first st.shared.b32 [at], $2;
        mov.b32 $0, 0;
        }""",
        byte,
        value,
    )


@gluon.jit
def read(byte):
    """By the thread that arrives for its warp: racecheck follows a read to its own thread's arrival only."""
    return _ptx(
        """{
        .reg .pred first;
        .reg .b32 at, word;
        elect.sync _|first, 0xffffffff;
        mov.u32 at, skip_words;
        add.u32 at, at, $1;
        mov.b32 word, 0;
        @first ld.shared.b32 word, [at];
        redux.sync.or.b32 $0, word, 0xffffffff;
        }""",
        byte,
    )


@gluon.jit
def uniform(x):
    """The same value, known to be one per warp."""
    return _ptx("redux.sync.or.b32 $0, $1, 0xffffffff;", x)


@gluon.jit
def any_wants(wanted, W: gl.constexpr):
    """Whether any row of warpgroup W wants the tile; `wanted` has two elements per thread."""
    gl.inline_asm_elementwise(
        "or.b32 skip_vote, $2, $3; mov.b32 $0, skip_vote; mov.b32 $1, skip_vote;",
        "=r,=r,r,r",
        [wanted.to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=2,
    )
    # Barriers 8 to 10: Triton numbers its own from 0.
    return _ptx(
        """{
        .reg .pred mine, all;
        setp.ne.b32 mine, skip_vote, 0;
        bar.red.or.pred all, $1, 128, mine;
        vote.sync.any.pred all, all, 0xffffffff;
        selp.b32 $0, 1, 0, all;
        }""",
        8 + W,
    )


@gluon.jit
def log2_threshold(factor, kv_len):
    """log2 of the threshold factor / kv_len; -inf (nothing is below it) where the call is dense."""
    length = kv_len.to(gl.float32)
    # 0 and a threshold of 1 or more are dense; so is NaN, which fails both comparisons.
    active = (factor > 0.0) & (factor < length)
    return gl.where(active, gl.log2(gl.where(active, factor, 1.0) / length), float("-inf"))


@gluon.jit
def meet(W: gl.constexpr):
    """The threads of warpgroup W wait for each other."""
    _ptx("bar.sync $1, 128; mov.b32 $0, 0;", 8 + W)


@gluon.jit
def moved(alpha):
    """Whether any row of the warp has a factor below 1: its warps may differ."""
    gl.inline_asm_elementwise(
        "min.f32 skip_alpha, $2, $3; mov.b32 $0, $2; mov.b32 $1, $3;",
        "=f,=f,f,f",
        [alpha],
        dtype=gl.float32,
        is_pure=False,
        pack=2,
    )
    return _ptx(
        """{
        .reg .pred any;
        setp.lt.f32 any, skip_alpha, 0f3F800000;
        vote.sync.any.pred any, any, 0xffffffff;
        selp.b32 $0, 1, 0, any;
        }"""
    )
