"""Check A2: packed bases. The bytes that a device packs against a CPU's, what it decodes from the same bytes, the
start-up self-test, and steps of training on them.
"""

import torch
from torch import Tensor, nn

from benchmarks.gpu.facts import Facts
from benchmarks.gpu.runs import tiny_words, written_rows
from benchmarks.gpu.scene import Scene, measured, relative
from dsft.quantizers.int8 import Int8Codec
from dsft.quantizers.nf4 import NF4Codec
from dsft.quantizers.packed import ByteLinear

FEW = 1e-4
"""Share of packed bytes that may differ between devices: they sum the mean of the scales in another order, and divide
with other last bits, so that a weight half way between two levels may take the other one.
"""


def packing(scene: Scene, facts: Facts) -> None:
    """Bytes, decoding, training."""
    shape = (4096, 4096) if scene.cuda else (384, 256)
    for dtype in (torch.bfloat16, torch.float32):
        weight = scene.normal(*shape).mul(0.02).to(dtype)
        for name, linear in _linears(shape).items():
            with facts.part(f"{name} of {str(dtype).removeprefix('torch.')}"):
                _bytes(name, linear, weight, facts)
    rows = written_rows(scene)
    for method in ("qlora", "int8_lora"):
        with facts.part(f"{method}, 5 steps"):
            exact = measured(scene, tiny_words(rows, method))
            facts.note(f"{method} fp32: loss goes from, to", [exact.losses[0], exact.losses[-1]], "nats",
                       ok=exact.losses[-1] < exact.losses[0], why="must fall")  # fmt: skip
            rounded = measured(scene, tiny_words(rows, method, precision="bf16"))
            facts.near(f"{method} bf16 against fp32, losses", relative(rounded.losses, exact.losses), 3e-2)
    with facts.part("pissa on nf4"):
        words = tiny_words(rows, "pissa", "quantization=nf4")
        facts.note("pissa on nf4: first loss", measured(scene, words, steps=2).losses[0], "nats")


def _linears(shape: tuple[int, int]) -> dict[str, ByteLinear]:
    with torch.device("meta"):
        linear = nn.Linear(shape[1], shape[0], bias=False)
    return {
        "nf4": ByteLinear(linear, NF4Codec(double_quant=True), None),
        "nf4 single": ByteLinear(linear, NF4Codec(double_quant=False), None),
        "int8": ByteLinear(linear, Int8Codec(), None),
    }


def _bytes(name: str, linear: ByteLinear, weight: Tensor, facts: Facts) -> None:
    here, again, there = (linear.matrix.pack([each]) for each in (weight, weight, weight.cpu()))
    what = f"{name} {str(weight.dtype).removeprefix('torch.')}"
    same = all(torch.equal(here[part], again[part]) for part in here)
    facts.note(f"{what}: packed twice on one device", "same bytes" if same else "other bytes", ok=same)
    for part in here:
        share = float((here[part].cpu() != there[part]).double().mean())
        most = FEW if part == "payload" else 1.0  # a scale may differ in its last bit, which nobody sees
        facts.near(f"{what}: share of {part} unlike the CPU's", share, most)
    given = tuple(there[part] for part in there)
    ours = linear.matrix.unpack([part.to(weight.device) for part in given], weight.dtype)
    theirs = linear.matrix.unpack(given, weight.dtype)
    apart = (ours.cpu().double() - theirs.double()).abs().max() / theirs.double().abs().max()
    facts.near(f"{what}: decoded from the CPU's bytes, off by", float(apart), 1e-6 if _wide(weight) else 5e-3)
    lost = (theirs.double() - weight.cpu().double()).norm() / weight.cpu().double().norm()
    facts.near(f"{what}: rounding of the weight", float(lost), 0.02 if name == "int8" else 0.12)


def _wide(weight: Tensor) -> bool:
    return weight.dtype == torch.float32
