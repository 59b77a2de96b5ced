"""PTX operations that Gluon lacks, and the barriers that they use."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Numbers of the barriers; a warp arrives at each at most once per phase.
K_FREE = gl.constexpr(0)
V_FREE = gl.constexpr(2)
DECIDED = gl.constexpr(5)
Q_FREE = gl.constexpr(8)
ITEM_THERE = gl.constexpr(11)
ITEM_FREE = gl.constexpr(13)
# Byte offsets of the words after them: a warpgroup's decision on a tile, and the number of an item.
KEEP_AT = gl.constexpr(512)
ITEM_AT = gl.constexpr(768)

# Gluon's own arrive first synchronises the whole warpgroup, and its reduction to a scalar goes through shared
# memory; both would delay the next product after a skipped tile. The operations below keep their barriers,
# the warpgroups' decisions and the item numbers in 1024 bytes of their own, so that the rest of shared memory
# stays aligned for TMA: 16 mbarriers, then decisions, then items. `elect` chooses a thread, and loaded
# scalars pass through `redux`, because ptxas then knows that the warp does not diverge; with a predicate on
# %tid it gives up uniform registers in the whole loop.


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
    """Declares the barriers and words, and two registers; must run once, before the other operations."""
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
    """Initialises a barrier whose phases complete after `count` arrivals."""
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
    """Arrives once for each warp that executes it; covers all that the warp's threads did before."""
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
    """Waits until the barrier's phase of this parity is complete."""
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
    """Writes a word, by one thread of the warp."""
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
    """Reads a word in the thread that arrives for its warp: racecheck orders a read by that arrival only."""
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
    """The same value, which ptxas now knows to be uniform across the warp."""
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
    """Synchronises the threads of warpgroup W."""
    _ptx("bar.sync $1, 128; mov.b32 $0, 0;", 8 + W)


@gluon.jit
def moved(alpha):
    """Whether any row of the warp has a factor below 1; the answer may differ between warps."""
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
