"""The schemes by their names. To add one: a class of `scheme.Scheme`, a line here, a line in `m0kit.precision`.

SCHEMES["int4"](128).encode(weight)
"""

from typing import Final

from m0kit_quant.floats import Bf16Scheme, Fp16Scheme, Fp32Scheme
from m0kit_quant.int4 import Int4Scheme
from m0kit_quant.int8 import Int8Scheme
from m0kit_quant.nf4 import Nf4Scheme
from m0kit_quant.scheme import Scheme

SCHEMES: Final[dict[str, type[Scheme]]] = {
    scheme.name: scheme for scheme in (Fp32Scheme, Fp16Scheme, Bf16Scheme, Int8Scheme, Int4Scheme, Nf4Scheme)
}
