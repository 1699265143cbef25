"""What a program is given on each platform: forms of one computation that are equal up to rounding, but not in speed.

A form is chosen while a program is traced, by the platform that the program is for: `cores.form()`. It is not left to
`lax.platform_dependent`, because most forms change the structure of a program (unrolled loops, parts of a batch), and
because a conditional over platforms traces and differentiates every branch, and keeps what each of them saves for the
gradient.

| form          | cpu         | cuda     | tpu         | decided by                                                    |
|---------------|-------------|----------|-------------|---------------------------------------------------------------|
| unroll        | yes         | no       | no          | PGD-10, ResNet-18, batch 32, 2 cores: 2.8 s a step, rolled    |
|               |             |          |             | 9.6 s. Accelerators run a rolled loop as fast and compile it  |
|               |             |          |             | faster                                                        |
| parts         | 4           | 1        | 1           | the same at batch 128: 9.5 s in 4 parts, 13.6 s whole         |
| serial        | yes         | no       | no          | two batched SVDs in one program deadlock on 2 cores (jaxlib   |
|               |             |          |             | 0.10.2)                                                       |
| fourier       | product     | fft      | fft         | several FFTs in one program deadlock on a CPU from jaxlib     |
|               |             |          |             | 0.11 on                                                       |
| resize        | product     | sum      | neighbours  | GPU: the compiler finds no tiling for the product with three  |
|               |             |          |             | channels. CPU: the gradient of the sum takes up to 200 times  |
|               |             |          |             | as long. TPU, the sizes of SiRIIB, 500 images: sums take 1.7  |
|               |             |          |             | ms forward, neighbours 1.2 with the gradient; products 0.3,   |
|               |             |          |             | and five times as long to compile                             |
| svd           | library     | library  | rotations   | TPU, 1,500 matrices of 32×32: JAX's own is factorisations     |
|               |             |          |             | without an estimate; rotations take 0.12 ms a round, some     |
|               |             |          |             | 310 rounds. Two such: 171 s of processor time to compile,     |
|               |             |          |             | with rotations 120                                            |
| fold          | no          | yes      | yes         | GPU: the loop's step falls from 123 kernels, 7.00 GB to 84,   |
|               |             |          |             | 6.44. TPU: 11.55 to 11.22 ms. CPU: no faster, 4.74 s as it    |
|               |             |          |             | is, 5.08 s folded (batch 32)                                  |
| relu          | input       | output   | input       | GPU: 84 kernels, 6.44 GB become 69, 5.38, as all ReLUs go     |
|               |             |          |             | into convolutions. TPU: slower by 1 %                         |
| stem          | float32     | split    | split       | GPU: 5.38 GB become 5.00. TPU: 1 % slower, but its products   |
|               |             |          |             | round float32 pixels to 8 bits                                |
| stem_gradient | convolution | product  | convolution | PGD-10 on an H100: 33.2 ms with the convolution, 32.6 with    |
|               |             |          |             | the product (5.05 GB). TPU: 11.4 and 13.7 ms                  |
| rows          | single      | single   | packed      | TPU, folded: 11.22 ms single, 10.26 packed; on a v6e 4.29 and |
|               |             |          |             | 4.20                                                          |
| norm_gradient | float32     | float32  | network     | TPU, WRN-16-10, batch 128: 19.75 and 9.45 ms, with a barrier  |
|               |             |          |             | where channels do not fill 128 lanes; PreActResNet-18: 11.15  |
|               |             |          |             | with it everywhere, 10.18 so. GPU: 3.01 and 3.16 GB           |
| norm          | two passes  | one pass | one pass    | PGD-AT outside the attack. GPU: 13.9 and 11.5 GB. TPU: 25.8   |
|               |             |          |             | and 19.7 ms. CPU: one training pass of a batch of 32 takes    |
|               |             |          |             | 5.7 and 5.2 s on busy cores, of twelve in a step              |
| max_pool      | own         | own      | usual       | VGG16. TPU: 8.53 and 5.61 ms. GPU: 2.27 and 3.99 GB with the  |
|               |             |          |             | usual one. CPU: the usual one takes three times as long       |
| average_pool  | mean        | mean     | window      | TPU, 64 to 128 channels at 32×32 with its convolution and     |
|               |             |          |             | gradients: 3.99 and 2.39 ms                                   |
| crop          | slice       | slice    | products    | TPU, 512 images of 32×32: 3.9 and 0.14 ms                     |
| compiling     | 30          | 500      | 500         | APGD's programs. CPU: 185 steps of a network of 17,000        |
|               |             |          |             | weights at batch 256, 2 of a ResNet-18 at 32. GPU: ResNet-18, |
|               |             |          |             | batch 512, 3 s before tuning, and 10 GB a step, at least 2 ms |
| ahead         | no          | yes      | yes         | on a CPU attack and compiler would share the cores            |
| queries       | 50          | 500      | 500         | Ctrl-C waits for them. CPU: ResNet-18, batch 256, 90 s for 50 |
| products      | exact       | rounded  | rounded     | a CPU ignores their precision, and what is judged at          |
|               |             |          |             | "highest" need not be asked for again                         |

Where nothing else is said, figures are of one step of PGD's loop on a ResNet-18 in bfloat16, batch 512: for a GPU the
kernels and bytes of the program compiled for an H200, for a TPU the milliseconds that its compiler estimates for a v5e
(jax 0.10.2, libtpu 0.0.42), each form tried by itself. They are no measurements of a run; those on an H100 and on a CPU
are. `benchmarks/forms.py` compiles these programs.
"""

from typing import NamedTuple


class Form(NamedTuple):
    """One column of the table above."""

    unroll: bool  # whether short loops, such as those of attacks, are unrolled
    parts: int  # largest number of parts in which a network answers a batch, see `cores.in_parts`
    serial: bool  # whether factorisations of many matrices run one after the other
    fourier: str  # "product" where a Fourier transform may have to be a matrix product, or "fft"
    resize: str  # how images are resized: by a "product", a "sum", or from the two "neighbours" of a pixel
    svd: str  # of many small matrices: the "library", or "rotations" of their columns, see `information.jacobi`
    fold: bool  # whether batch-norm is folded into the convolution before it, once per attack (evaluation mode)
    relu: str  # "input" or "output": what its gradient looks at
    stem: str  # how a bfloat16 network reads pixels: "float32", or "split" into two bfloat16 numbers
    stem_gradient: str  # of split pixels: "convolution", or "product" of matrices
    rows: str  # of maps of 64 channels in evaluation mode: "single", or two rows "packed", see `models.packed`
    norm_gradient: str  # of batch-norm that is not folded, in evaluation mode: "float32", or the dtype of the "network"
    norm: str  # batch-norm in training mode: "two passes" for mean and variance, or "one pass"
    max_pool: str  # gradient of max-pooling: "own", see `models.gradients`, or the "usual" one
    average_pool: str  # average-pooling: the "mean" of a reshaped array, or a "window"
    crop: str  # random crops: a "slice" for each image, or "products" with ones and zeros
    compiling: int  # steps of an attack at the largest batch whose time compiling them for another batch takes
    ahead: bool  # whether the programs of AutoAttack's next part are compiled in threads while one part runs
    queries: int  # largest number of queries that one program of Square makes before the host is asked
    products: str  # of float32: "exact" whatever their precision is, or "rounded" as `devices.precision` says


TABLE = {
    "cpu": Form(
        unroll=True,
        parts=4,
        serial=True,
        fourier="product",
        resize="product",
        svd="library",
        fold=False,
        relu="input",
        stem="float32",
        stem_gradient="convolution",
        rows="single",
        norm_gradient="float32",
        norm="two passes",
        max_pool="own",
        average_pool="mean",
        crop="slice",
        compiling=30,
        ahead=False,
        queries=50,
        products="exact",
    ),
    "cuda": Form(
        unroll=False,
        parts=1,
        serial=False,
        fourier="fft",
        resize="sum",
        svd="library",
        fold=True,
        relu="output",
        stem="split",
        stem_gradient="product",
        rows="single",
        norm_gradient="float32",
        norm="one pass",
        max_pool="own",
        average_pool="mean",
        crop="slice",
        compiling=500,
        ahead=True,
        queries=500,
        products="rounded",
    ),
    "tpu": Form(
        unroll=False,
        parts=1,
        serial=False,
        fourier="fft",
        resize="neighbours",
        svd="rotations",
        fold=True,
        relu="input",
        stem="split",
        stem_gradient="convolution",
        rows="packed",
        norm_gradient="network",
        norm="one pass",
        max_pool="usual",
        average_pool="window",
        crop="products",
        compiling=500,
        ahead=True,
        queries=500,
        products="rounded",
    ),
}

# those of accelerators that were a CPU's, or everybody's, before this table: benchmarks/forms.py compares both
SINCE_THE_TABLE = (
    "fold",
    "relu",
    "stem",
    "stem_gradient",
    "rows",
    "norm_gradient",
    "norm",
    "max_pool",
    "average_pool",
)
