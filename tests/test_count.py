# SPDX-License-Identifier: MIT
"""Instructions are counted in the loop that multiplies, whichever assembler's words it is written in."""

import platform
import shutil

import pytest

from experiments import count

X86 = """
outer_loop:
	movl	$1, %eax
.L3:
	addq	$8, %rcx
	.p2align 4
.L2:
	vpermb	%zmm1, %zmm3, %zmm12
	vpdpbusd	4(%rdi){1to16}, %zmm12, %zmm0
	prefetcht0	64(%rax)
	cmpq	%rsi, %rdx
	jne	.L2
	cmpq	%rsi, %r8
	jb	.L3
	ret
other:
.L9:
	vpmaddubsw	%ymm1, %ymm2, %ymm3
	vpmaddwd	%ymm1, %ymm3, %ymm3
	jne	.L9
	jmp	.L11
"""
ARM = """
one:                                    // @one
.LBB0_1:                                // =>This Inner Loop
	ldr	q3, [x0, #64]
	sdot	v0.4s, v1.16b, v3.4b[0]
	.inst	0x4fbfe19d
	//APP
	smmla	v2.4s, v1.16b, v3.16b           // two tokens
	subs	w8, w8, #1
	cbnz	w8, .LBB0_1
"""


def test_the_innermost_loop_is_counted():
    found = count.functions(X86)
    assert [len(loop) for loop in count.loops(found["outer_loop"])] == [5]
    assert [len(loop) for loop in count.loops(found["other"])] == [3]


def test_arms_words_are_known():
    loops = list(count.loops(count.functions(ARM)["one"]))
    assert [loop[0] for loop in loops] == ["ldr q3, [x0, #64]"] and sum(map(count.products, loops[0])) == 16 + 16 + 32


@pytest.mark.parametrize(
    ("instruction", "products"),
    [
        ("vpdpbusd %zmm1, %zmm2, %zmm3", 64),
        ("vpdpbusd (%rax){1to8}, %ymm2, %ymm3", 32),
        ("vpmaddubsw %xmm1, %xmm2, %xmm3", 16),
        ("vpmaddwd %zmm1, %zmm2, %zmm3", 0),  # adds what the one before has multiplied
        ("sdot v0.4s, v1.16b, v3.4b[0]", 16),
        ("smmla v2.4s, v1.16b, v3.16b", 32),
        (".inst 0x4e80a400", 32),
        (".inst 0xd503201f", 0),
    ],
)
def test_what_multiplies(instruction, products):
    assert count.products(instruction) == products


@pytest.mark.skipif(not shutil.which("cc"), reason="no compiler")
def test_the_kernels_are_found_in_what_the_compiler_makes(patched_tree, monkeypatch):
    monkeypatch.setattr(count.fetching, "fetch", lambda: patched_tree)
    machine = count.Target(("cc",), ("-march=haswell",) if platform.machine() == "x86_64" else ())
    found = machine.count("splitq.c", "splitq_vec_dot_sq4_q8_0", 512)
    assert 512 / 64 < found < 16 * 512
    assert machine.count("splitq.c", "splitq_vec_dot_sq4_q8_0", 1024, 2) == 4 * found
    assert machine.name.split()[0] in ("gcc", "clang")
