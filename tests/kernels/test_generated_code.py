"""The generated C++ becomes the machine code that it is meant to become, for CPUs that are not at hand as well."""

import re
import subprocess

import pytest
import torch

from ctrlcompile.kernels import build, cpp_rows, cpp_rows_lines, cpp_wgrad, isa

BLOCKS = [(16, 16), (32, 32), (64, 64), (96, 48)]
MULTIPLY_ADDS = ("vfmadd", "vdpbf16ps")


def assembly(source: str, target: isa.Isa) -> str:
    command = [*build.compiler(), "-std=c++17", "-O3", "-fopenmp", *target.flags, "-S", "-x", "c++", "-", "-o", "-"]
    result = subprocess.run(command, input=source, capture_output=True, text=True)
    if result.returncode and ("unrecognized" in result.stderr or "unknown argument" in result.stderr):
        pytest.skip(f"this compiler does not know {target.name}")
    assert not result.returncode, result.stderr
    return result.stdout


def inner_loops(text: str, kernel: str = "6kernel") -> list[list[str]]:
    """Of each instance of an inner kernel, the loop with the most multiply-adds: the one that runs longest."""
    loops = []
    for function in re.findall(rf"^\w*{kernel}I[\w.]+:$(.*?)\.cfi_endproc", text, re.MULTILINE | re.DOTALL):
        pieces = re.split(r"^\.L\w+:$", function, flags=re.MULTILINE)
        bodies = [re.split(r"^\tj\w+\t.*$", piece, maxsplit=1, flags=re.MULTILINE)[0] for piece in pieces]
        body = max(bodies, key=lambda body: sum(map(body.count, MULTIPLY_ADDS)))
        loops.append([line.strip() for line in body.splitlines() if line.startswith("\t") and line[1] != "."])
    return loops


@pytest.mark.parametrize("target", [isa.AVX512_BF16, isa.AVX512, isa.AVX2], ids=lambda target: target.name)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("role", ["forward", "wgrad"])
def test_the_inner_loop_is_multiply_adds_loads_and_nothing_on_the_stack(target, block, role):
    types = (torch.bfloat16, torch.bfloat16) if target.pairs else (torch.float32, torch.float32)
    if role == "forward":
        text = assembly(cpp_rows.source(target, *block, *types, "none"), target)
    else:
        text = assembly(cpp_wgrad.source(target, block, *types), target)
    register = {16: "zmm", 8: "ymm"}[target.lanes]
    strips = isa.panels(block[0] if role == "forward" else block[1], target)
    loops = inner_loops(text)
    assert loops
    whole = 0
    for loop in loops:
        adds = [line for line in loop if line.startswith(MULTIPLY_ADDS[0 if not target.pairs else 1])]
        assert all(register in line for line in adds)
        on_stack = [line for line in loop if "rsp" in line or "rbp" in line]
        assert not on_stack or (role == "wgrad" and len(on_stack) == 1 and "mm" not in on_stack[0])  # a pointer, an end
        # A strip's sums, once for each step that the compiler unrolls, and little beside them.
        whole += any(len(adds) == steps * strip.rows * strip.vectors for strip in strips for steps in (1, 2))
        packing = 20 if role == "wgrad" else 0  # a panel to come, some of it at each step
        assert len(loop) < 2.2 * len(adds) + (8 if len(adds) > 20 else 24) + packing  # of pairs, put side by side
    assert whole or role == "wgrad"  # the weight gradient's groups of rows divide the block


@pytest.mark.parametrize("target", [isa.AVX512_BF16, isa.AVX512, isa.AVX2], ids=lambda target: target.name)
@pytest.mark.parametrize("block", [(16, 16), (32, 32), (24, 64)])
def test_where_taps_share_loads_sums_stay_in_registers_from_tap_to_tap(target, block):
    types = (torch.bfloat16, torch.bfloat16) if target.pairs else (torch.float32, torch.float32)
    text = assembly(cpp_rows.source(target, *block, *types, "none"), target)
    strips = sum(cpp_rows_lines.segments(strip, target) > 0 for strip in isa.panels(block[0], target))
    loops = inner_loops(text, "11line_kernel")
    sums = [count * cpp_rows_lines.SEGMENT for count in (4, 5, 6)]
    expected = sorted(taps * count for taps in (2, 3, 3) for count in sums) * strips
    found = [sum(line.startswith(MULTIPLY_ADDS) for line in loop) for loop in loops]
    assert sorted(found) == sorted(expected)
    for loop, adds in zip(loops, found, strict=True):
        on_stack = [line for line in loop if "rsp" in line or "rbp" in line]
        assert not [line for line in on_stack if "mm" in line]
        assert len(on_stack) <= adds / 8  # an address here and there
    for function in re.findall(r"^\w*11line_kernelI[\w.]+:$(.*?)\.cfi_endproc", text, re.MULTILINE | re.DOTALL):
        pieces = re.split(r"^\.L\w+:$", function, flags=re.MULTILINE)
        spilled = [re.search(r"[yz]mm.*\(%r[sb]p|\(%r[sb]p.*[yz]mm", piece) is not None for piece in pieces]
        assert target.pairs or sum(spilled) <= 1  # where a row's last columns are stored, fewer than a vector has


@pytest.mark.parametrize("target", isa.ALL.values(), ids=lambda target: target.name)
@pytest.mark.parametrize("width", range(8, 129, 8))
def test_strips_cover_a_block_within_the_registers(target, width):
    strips = isa.panels(width, target)
    assert [strip.first for strip in strips] == [sum(before.width for before in strips[:i]) for i in range(len(strips))]
    assert sum(strip.width for strip in strips) == width
    for strip in strips:
        assert strip.rows * strip.vectors + strip.vectors + 1 <= target.registers


@pytest.mark.parametrize(
    ("capability", "multiplies_pairs", "of_float", "of_half"),
    [
        ("AVX512", True, isa.AVX512, isa.AVX512_BF16),
        ("AVX512", False, isa.AVX512, isa.AVX512),
        ("AVX2", True, isa.AVX2, isa.AVX2),  # PyTorch was told to use no more
        ("DEFAULT", False, isa.PORTABLE, isa.PORTABLE),
    ],
)
def test_the_instruction_set_is_the_best_that_there_is(capability, multiplies_pairs, of_float, of_half, monkeypatch):
    monkeypatch.delenv("CTRLCOMPILE_ISA", raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: multiplies_pairs)
    isa._named.cache_clear()
    try:
        assert (isa.current(), isa.current(torch.bfloat16)) == (of_float, of_half)
    finally:
        isa._named.cache_clear()


def test_the_instruction_set_is_the_one_that_is_asked_for(monkeypatch):
    for name, target in isa.ALL.items():
        monkeypatch.setenv("CTRLCOMPILE_ISA", name)
        assert isa.current(torch.bfloat16) is target
        assert isa.current() is (isa.AVX512 if target.pairs else target)
    monkeypatch.setenv("CTRLCOMPILE_ISA", "sse9")
    with pytest.raises(ValueError, match=r"sse9.*avx512_bf16, avx512, avx2, portable"):
        isa.current()
