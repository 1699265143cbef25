"""What a program is given on each platform: forms of one computation that are equal up to rounding, but not in speed.

A form is chosen while a program is traced, by the platform that the program is for: `cores.form()`. It is not left to
`lax.platform_dependent`, because most forms change the structure of a program (unrolled loops, parts of a batch), and
because a conditional over platforms traces and differentiates every branch, and keeps what each of them saves for the
gradient.

| form    | cpu     | cuda | tpu | decided by                                                                          |
|---------|---------|------|-----|-------------------------------------------------------------------------------------|
| unroll  | yes     | no   | no  | PGD-10, ResNet-18, batch 32, 2 cores: 2.8 s a step, rolled 9.6 s. Accelerators run  |
|         |         |      |     | a rolled loop as fast and compile it faster                                         |
| parts   | 4       | 1    | 1   | the same at batch 128: 9.5 s in 4 parts, 13.6 s whole                               |
| serial  | yes     | no   | no  | two batched SVDs in one program deadlock on 2 cores (jaxlib 0.10.2)                 |
| fourier | product | fft  | fft | several FFTs in one program deadlock on a CPU from jaxlib 0.11 on                   |
| resize  | product | sum  | sum | GPU: the compiler finds no tiling for the product with three channels. CPU: the     |
|         |         |      |     | gradient of the sum takes up to 200 times as long                                   |
"""

from typing import NamedTuple


class Form(NamedTuple):
    """One column of the table above."""

    unroll: bool  # whether short loops, such as those of attacks, are unrolled
    parts: int  # largest number of parts in which a network answers a batch, see `cores.in_parts`
    serial: bool  # whether factorisations of many matrices run one after the other
    fourier: str  # "product" where a Fourier transform may have to be a matrix product, or "fft"
    resize: str  # "product" or "sum": how images are resized


TABLE = {
    "cpu": Form(unroll=True, parts=4, serial=True, fourier="product", resize="product"),
    "cuda": Form(unroll=False, parts=1, serial=False, fourier="fft", resize="sum"),
    "tpu": Form(unroll=False, parts=1, serial=False, fourier="fft", resize="sum"),
}
