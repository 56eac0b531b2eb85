"""Makes the fixtures of the weight formats: random GGUF blocks, their values, and what GGUF makes of f32 weights.

    python make_format_fixtures.py

tests/fixtures/formats/ gets, for each integer format, <format>.blocks (8 rows of 512 weights) and <format>.values (f32)
as the `gguf` package reads them; and weights.values (f32, 8 rows of 512) with <format>.quantised: the blocks that the
package makes of them, or llama.cpp where the package can only read. Needs llama-cpp-python for the latter.
"""

import ctypes
import pathlib
import warnings

import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType, quants
from gguf.constants import GGML_QUANT_SIZES

FIXTURES = pathlib.Path(__file__).resolve().parent.parent / "fixtures" / "formats"
ROWS, K = 8, 512
# Where a block of the format has f16 numbers.
HALVES = {"q8_0": [0], "q4_0": [0], "q4_k": [0, 2], "q6_k": [208], "mxfp4": []}
EDGES = [0.0, -0.0, 2.0**-24, 65504.0, -65504.0]


def qtype(name):
    return GGMLQuantizationType[name.upper()]


def random_blocks(name, random):
    """All bytes random; the f16 numbers are finite, and the first blocks have edge cases."""
    weights, size = GGML_QUANT_SIZES[qtype(name)]
    blocks = random.integers(0, 256, (ROWS * K // weights, size), dtype=np.uint8)
    for at in HALVES[name]:
        bits = random.integers(0, 0x7C00, len(blocks), dtype=np.uint16)
        numbers = (bits | random.integers(0, 2, len(blocks), dtype=np.uint16) << 15).view(np.float16)
        numbers[: len(EDGES)] = EDGES
        blocks[:, at : at + 2] = numbers[:, None].view(np.uint8)
    # The greatest of all other bits, and the least, under the greatest scales.
    rest = np.ones(size, bool)
    for at in HALVES[name]:
        rest[at : at + 2] = False
    blocks[3, rest] = 255
    blocks[4, rest] = 0
    if name == "mxfp4":
        # The subnormal ones, and those whose greatest code overflows.
        blocks[:4, 0] = [0, 1, 254, 255]
    return blocks.reshape(ROWS, -1)


def weights(random):
    """Gaussian and heavy-tailed rows, small and large, and rows with edge cases."""
    rows = [
        random.normal(0, 0.02, K),
        random.standard_t(2, K) * 0.01,
        random.normal(0, 1e-6, K),
        random.normal(0, 300, K),
        # Ties of rounding: multiples of half a step and of a quarter.
        random.integers(-254, 255, K) / 2,
        random.integers(-48, 49, K) / 4,
        # Blocks of zeros, of one value, of two signs of the greatest magnitude.
        np.repeat(random.choice([0.0, -0.0, 1.0, -1.0, 0.3], K // 32), 32),
        random.choice([-0.7, 0.7, 0.1, 0.0], K),
    ]
    return np.array(rows, np.float32)


def quantised(values, name):
    if name in ("q8_0", "q4_0", "mxfp4"):
        return quants.quantize(values, qtype(name))
    block_weights, size = GGML_QUANT_SIZES[qtype(name)]
    blocks = np.zeros((ROWS, K // block_weights * size), np.uint8)
    ggml = ctypes.CDLL(pathlib.Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so")
    pointers = [ctypes.c_void_p(values.ctypes.data), ctypes.c_void_p(blocks.ctypes.data)]
    first, rows, k = ctypes.c_int64(0), ctypes.c_int64(ROWS), ctypes.c_int64(K)
    ggml.ggml_quantize_chunk(int(qtype(name)), *pointers, first, rows, k, None)
    return blocks


def main():
    random = np.random.default_rng(4)
    FIXTURES.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", "overflow encountered", RuntimeWarning)
    for name in HALVES:
        blocks = random_blocks(name, random)
        blocks.tofile(FIXTURES / f"{name}.blocks")
        quants.dequantize(blocks, qtype(name)).tofile(FIXTURES / f"{name}.values")
    values = weights(random)
    values.tofile(FIXTURES / "weights.values")
    for name in HALVES:
        quantised(values, name).tofile(FIXTURES / f"{name}.quantised")


if __name__ == "__main__":
    main()
