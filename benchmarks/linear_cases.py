"""What tune_linear.py tries: the products of a layer, and tilings of our kernel for few rows that may suit them."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.shapes import BYTES, H200, Shape
from penstock.kernels.row_linear import RowTiles, row_tiles_for
from penstock.kernels.small_linear import Tiles, tiles_for

Tiling = Tiles | RowTiles

PRODUCTS = ("qkv", "o", "gate_up", "down")
SHARED_BYTES = 227 << 10  # of a program, on Hopper
LEAST_PROGRAMS = 60  # nearly half of an H200's multiprocessors

HELD = 160  # registers of a thread for its weights

ONE_ROW = "1,2 1,4 1,8 2,1 2,2 2,4 2,8 2,16 4,1 4,2 4,4 4,8 4,16 8,2 8,4 8,8 16,4"  # outputs, warps

# outputs, depth, warps, stages, parts, prefetch, strips; what was among the best for one shape or another on an H200.
FEW_ROWS = """
    16,256,2,4,1,8 16,256,2,6,1,8 16,512,2,3,1,8 16,512,2,4,1,8 16,512,2,5,1,8 16,512,2,6,1,8 32,256,2,4,1,8
    32,256,4,7,1,8 32,512,4,4,1,8 32,512,4,5,1,0 16,512,2,4,1,8,2 16,512,2,6,1,8,2 16,256,2,9,1,8,2 16,1024,4,3,1,8,2
    32,256,4,4,1,8,2 16,512,2,6,1,8,3 16,256,2,4,4,0 16,256,2,4,4,8 16,512,2,3,4,8 16,512,2,4,2,8
    16,256,2,4,3,4 16,256,2,4,6,4 16,128,2,6,4,4 16,256,2,4,5,0
"""
FEW_ROWS_GATED = """
    16,256,2,4,1,0 16,512,2,3,1,0 32,256,4,4,1,8 16,256,2,4,1,8,2 16,256,2,4,1,0,3 16,512,2,3,1,0,4 16,512,2,3,1,0,7
    16,256,2,7,1,0,7 32,256,2,3,1,8,2 32,256,4,3,1,0,2 32,256,4,5,1,0,4 32,256,4,4,1,8,3
"""
MORE_ROWS = """
    64,128,4,4,1,8 64,128,4,6,1,8 32,256,4,4,1,8 32,128,4,4,1,8 32,128,4,8,1,8 32,256,4,4,1,8,2 32,128,4,8,1,8,2
    64,128,4,6,2,8 64,128,4,6,4,0 64,128,4,4,4,8 32,256,4,4,2,8 32,128,4,6,2,8 16,256,4,4,1,8 16,128,4,8,1,8
"""
MORE_ROWS_GATED = """
    32,64,4,4,1,0 32,128,4,2,1,8 32,64,4,4,1,8 64,64,4,4,1,8 64,64,8,4,1,8 64,128,4,2,1,8
    64,128,4,4,1,0 32,128,4,3,1,8 64,128,4,4,1,0,2 32,256,4,3,1,0,4 32,128,4,6,1,0,4 64,64,4,8,1,0,2 32,128,4,3,1,8,2
"""


@dataclass(frozen=True)
class Product:
    """One of a layer's products, with so many rows."""

    name: str
    rows: int
    outputs: int  # of the result: half of the weight's rows if gated
    columns: int
    gated: bool
    adds: bool  # to a residual
    has_bias: bool

    @property
    def weight_rows(self) -> int:
        return 2 * self.outputs if self.gated else self.outputs

    @property
    def weight_bytes(self) -> int:
        return self.weight_rows * self.columns * BYTES

    @property
    def floor_us(self) -> float:
        flops = 2.0 * self.rows * self.weight_rows * self.columns
        return 1e6 * max(self.weight_bytes / H200.bytes_s, flops / H200.flops)

    def __str__(self) -> str:
        return f"{self.name} {self.rows}x{self.columns}x{self.weight_rows}"

    @classmethod
    def of(cls, shape: Shape, name: str, rows: int) -> Product:
        weight_rows, columns = shape.linears[name]
        gated = name == "gate_up"
        has_bias = name == "qkv" and shape.architecture == "Qwen2ForCausalLM"
        outputs = weight_rows // 2 if gated else weight_rows
        return cls(name, rows, outputs, columns, gated, name in ("o", "down"), has_bias)


def parse_tiles(text: str) -> Tiling:
    """From numbers with commas, two for a product of one row. Raises ValueError for anything else."""
    numbers = [int(number) for number in text.split(",")]
    try:
        return RowTiles(*numbers) if len(numbers) == 2 else Tiles(*numbers)
    except TypeError as error:
        raise ValueError(f"{text}: give {','.join(Tiles._fields)}, or {','.join(RowTiles._fields)}") from error


def taken(product: Product) -> Tiling | None:
    """What the engine takes for a product; None: the library."""
    p = product
    row = row_tiles_for(p.outputs, p.columns, gated=p.gated, rotated=p.name == "qkv") if p.rows == 1 else None
    return row or tiles_for(p.rows, p.outputs, p.columns, p.gated)


def candidates(product: Product) -> list[Tiling]:
    """Tilings of the lists above that make sense for a product."""
    few = product.rows <= 16
    text = (FEW_ROWS_GATED if few else MORE_ROWS_GATED) if product.gated else FEW_ROWS if few else MORE_ROWS
    if product.rows == 1:
        text = ONE_ROW
    return [tiles for tiles in map(parse_tiles, text.split()) if fits(tiles, product)]


def fits(tiles: Tiling, product: Product) -> bool:
    """Whether a tiling has a full tile of depth a part, programs for half a card, and memory for its tiles."""
    if isinstance(tiles, RowTiles):
        rows = tiles.outputs * (2 if product.gated or product.name == "qkv" else 1)
        held = rows * -(-product.columns // (256 * tiles.warps)) * 4
        return product.weight_rows // rows >= LEAST_PROGRAMS and held <= HELD
    programs = -(-product.outputs // tiles.outputs) // tiles.strips * tiles.parts
    rows = max(16, 1 << (product.rows - 1).bit_length())
    tile_bytes = (tiles.outputs * (2 if product.gated else 1) + rows) * tiles.depth * BYTES
    # Matrix units that read shared memory (from 64 rows on) keep all stages, the others have one in registers.
    held = (tiles.stages if rows >= 64 else tiles.stages - 1) * tile_bytes
    return tiles.depth * tiles.parts <= product.columns and programs >= LEAST_PROGRAMS and held <= SHARED_BYTES
