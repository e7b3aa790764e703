"""What goes into an artifact's graphs and comes out: names, kinds and shapes, as the model's dimensions have them.

Owns the ports that a manifest must tell and an engine must find. Dimensions are numbers, or letters that `m0kit.config`
explains; V is the number of visual tokens, "past" that of the pasts, T_past that of all their tokens.

    check_ports(manifest.model, manifest.graphs)
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

from m0kit.config import DecoderConfig, ModelConfig

Kept = Literal["fp32", "fp16", "int8"]  # how the decoder's keys and values of a document may be kept
KV: Final[tuple[Kept, ...]] = get_args(Kept)
GRAPHS: Final = ("vision", "decoder", "head")
IMAGE_COLUMNS: Final = 2  # first row, end
PIECE_COLUMNS: Final = 9  # q0 q1 a0 a1 b0 b1 p0 p1 past
FIRST_PIECE_COLUMNS: Final = 8  # before documents could be kept: without the number of the past
_STORED: Final = {"fp32": "float32", "fp16": "float16", "int8": "uint8"}


@dataclass(frozen=True, slots=True)
class Port:
    """One input or output."""

    name: str
    dtype: str  # numpy's name for it
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class GraphPorts:
    """All of a graph, in its order."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def decoder_name(kv: str) -> str:
    """The decoder's graph for pasts kept so: all of them read the data file of "decoder"."""
    return "decoder" if kv == "fp32" else f"decoder.kv-{kv}"


def is_first_format(graphs: Mapping[str, GraphPorts]) -> bool:
    """Whether the graphs are from before documents could be kept: pasts (T_past, K·C), pieces of eight columns."""
    inputs = graphs["decoder"].inputs if "decoder" in graphs else ()
    return any(port.name == "pieces" and port.shape[1:] == (FIRST_PIECE_COLUMNS,) for port in inputs)


def expected_ports(config: ModelConfig, name: str, *, first_format: bool = False) -> GraphPorts:
    """The ports of the graph `name`: "vision", "head", or one of `decoder_name`."""
    D = config.decoder.hidden_size
    if name == "vision":
        patches = Port("patches", "float32", ("P", config.vision.patch_values))
        places = Port("positions", "int64", ("P", 2)), Port("images", "int64", ("I", IMAGE_COLUMNS))
        return GraphPorts((patches, *places), (Port("image_embeds", "float32", ("V", D)),))
    if name == "head":
        return GraphPorts((Port("hidden", "float32", ("B", D)),), (Port("logit", "float32", ("B",)),))
    kv = next(kv for kv in KV if decoder_name(kv) == name)
    columns = FIRST_PIECE_COLUMNS if first_format else PIECE_COLUMNS
    inputs = (
        Port("token_ids", "int64", ("T",)),
        Port("image_embeds", "float32", ("V", D)),
        Port("image_token_index", "int64", ("V",)),
        Port("positions", "int64", (3, "T")),
        Port("pieces", "int64", ("N", columns)),
        Port("last_index", "int64", ("B",)),
        Port("last_pieces", "int64", ("B", columns)),
    )
    pasts, presents = _states(config.decoder, kv, first_format)
    return GraphPorts((*inputs, *pasts), (Port("hidden", "float32", ("B", D)), *presents))


def check_ports(config: ModelConfig, graphs: Mapping[str, GraphPorts]) -> None:
    """Raises ValueError, a sentence part that names the port, where these are not the graphs of such a model."""
    first = is_first_format(graphs)
    needed = GRAPHS if first else (*GRAPHS, *(decoder_name(kv) for kv in KV if kv != "fp32"))
    if missing := [name for name in needed if name not in graphs]:
        raise ValueError(f"graphs: {missing[0]} is missing")
    if extra := sorted(set(graphs) - set(needed)):
        raise ValueError(f"graphs: {extra[0]!r} is not known; known are {', '.join(needed)}")
    for name in needed:
        found = graphs[name]
        if name.startswith("decoder"):  # layers are counted before so many ports are thought of
            kinds = 4 if name == decoder_name("int8") else 2
            layers = sum(port.name.startswith("past_key_values.") for port in found.inputs) / kinds
            if layers != config.decoder.num_layers:
                raise ValueError(
                    f"model.decoder.num_layers is {config.decoder.num_layers}, and the graph {name} has the inputs of "
                    f"{layers:g} layers"
                )
        expected = expected_ports(config, name, first_format=first)
        for kind in ("inputs", "outputs"):
            if told := difference(getattr(expected, kind), getattr(found, kind)):
                raise ValueError(f"graphs: {name} has other {kind} than this model: {told}")


def difference(expected: tuple[Port, ...], found: tuple[Port, ...]) -> str:
    """How ports differ from what they should be, in their order; "" where they do not."""
    for wanted, port in zip(expected, found, strict=False):
        if wanted != port:
            return f"{_told(port)} in place of {_told(wanted)}"
    if len(found) < len(expected):
        return f"{_told(expected[len(found)])} is missing"
    return f"{_told(found[len(expected)])} is one too many" if len(found) > len(expected) else ""


def _states(config: DecoderConfig, kv: Kept, first_format: bool) -> tuple[list[Port], list[Port]]:
    """Ports of the pasts, and of what is new."""
    K, C, stored = config.num_kv_heads, config.head_dim, _STORED[kv]
    given: tuple[int | str, ...] = ("T_past", K * C) if first_format else (K, "T_past", C)
    new: tuple[int | str, ...] = ("T", K * C) if first_format else (K, "T", C)

    def of_layer(layer: int) -> Iterator[Port]:
        names = [f"past_key_values.{layer}.{name}" for name in ("key", "value")]
        yield from (Port(name, stored, given) for name in names)
        if kv == "int8":
            yield from (Port(f"{name}_table", "float32", ("past", 3, K, C)) for name in names)

    layers = range(config.num_layers)
    presents = [
        Port(f"present.{layer}.{name}", "float32" if kv == "int8" else stored, new)
        for layer in layers
        for name in ("key", "value")
    ]
    return [port for layer in layers for port in of_layer(layer)], presents


def _told(port: Port) -> str:
    return f"{port.name} {port.dtype} [{', '.join(map(str, port.shape))}]"
