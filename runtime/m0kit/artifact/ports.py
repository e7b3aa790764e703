"""What goes into an artifact's graphs and comes out: names, kinds and shapes, as the model's dimensions have them.

Owns the contract between who writes graphs and who feeds them: every port's name, the columns of the tables of pieces
and images, what a manifest must tell and an engine must find. Dimensions are numbers, or letters that `m0kit.config`
explains; V is the number of visual tokens, "past" that of the pasts, T_past that of all their tokens.

The portable graphs are always there. Beside them may be sets of others, each for one kind of device: a graph of a set
runs in the place of a portable one, under the name NAME.SET, and reads the same data file.

    check_ports(manifest.model, manifest.graphs, manifest.runs)
    for name, keys_or_values in zip(past_names(layer), state, strict=True): feeds[name] = keys_or_values
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

from m0kit.config import DecoderConfig, ModelConfig

Kept = Literal["fp32", "fp16", "int8"]  # how the decoder's keys and values of a document may be kept
KV: Final[tuple[Kept, ...]] = get_args(Kept)
GRAPHS: Final = ("vision", "decoder", "head")
GraphSet = Literal["cpu", "cuda"]  # graphs for one kind of device, as `m0kit.precision.provider_of` names it
SETS: Final[tuple[GraphSet, ...]] = get_args(GraphSet)
# Columns of the tables that say who looks at whom. All are row numbers, ends exclusive; "past" counts the pasts.
IMAGE_COLUMNS: Final = ("first", "end")  # an image's patches
# Rows q0:q1 ask; their keys are rows p0:p1 of the past, then a0:a1 and b0:b1 of the run. The last row sees all of them,
# each row before it one less.
PIECE_COLUMNS: Final = ("q0", "q1", "a0", "a1", "b0", "b1", "p0", "p1", "past")
_PAST: Final = "past_key_values."
STORED: Final[Mapping[Kept, str]] = {"fp32": "float32", "fp16": "float16", "int8": "uint8"}  # numpy's name for it


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


def set_name(name: str, which: GraphSet) -> str:
    """The graph of a set that runs in the place of the portable graph `name`."""
    return f"{name}.{which}"


def data_name(graph: str) -> str:
    """The file with a graph's weights: all graphs that stand for the same part of the model read the same."""
    return f"{graph.partition('.')[0]}.onnx.data"


def past_names(layer: int) -> tuple[str, str]:
    """The decoder's inputs for keys and values (K, T_past, C) of a layer that were computed before, as kept."""
    return f"{_PAST}{layer}.key", f"{_PAST}{layer}.value"


def table_names(layer: int) -> tuple[str, str]:
    """Its inputs (past, 3, K, C) beside those where the form is int8: scale, lowest value and first token of each."""
    return f"{_PAST}{layer}.key_table", f"{_PAST}{layer}.value_table"


def present_names(layer: int) -> tuple[str, str]:
    """Its outputs with keys and values (K, T, C) of the tokens of the run; float32 where the form is int8."""
    return f"present.{layer}.key", f"present.{layer}.value"


def vision_ports(config: ModelConfig) -> GraphPorts:
    """Of the graph "vision": patches of images one below the other, where each lies, and whose it is."""
    inputs = (
        Port("patches", "float32", ("P", config.vision.patch_values)),
        Port("positions", "int64", ("P", 2)),  # row and column
        Port("images", "int64", ("I", len(IMAGE_COLUMNS))),
    )
    return GraphPorts(inputs, (Port("image_embeds", "float32", ("V", config.decoder.hidden_size)),))


def decoder_ports(config: DecoderConfig, kv: Kept) -> GraphPorts:
    """Of the graph `decoder_name(kv)`: packed tokens, what each piece of them sees, and what was kept."""
    D, K, C = config.hidden_size, config.num_kv_heads, config.head_dim
    inputs = [
        Port("token_ids", "int64", ("T",)),
        Port("image_embeds", "float32", ("V", D)),
        Port("image_token_index", "int64", ("V",)),  # the rows of the tokens that the embeddings replace
        Port("positions", "int64", (3, "T")),  # time, row, column
        Port("pieces", "int64", ("N", len(PIECE_COLUMNS))),
        Port("last_index", "int64", ("B",)),  # row of each pair's last token
        Port("last_pieces", "int64", ("B", len(PIECE_COLUMNS))),  # q0 and q1 count the pairs
    ]
    outputs = [Port("hidden", "float32", ("B", D))]
    for layer in range(config.num_layers):
        inputs += [Port(name, STORED[kv], (K, "T_past", C)) for name in past_names(layer)]
        if kv == "int8":
            inputs += [Port(name, "float32", ("past", 3, K, C)) for name in table_names(layer)]
        new = "float32" if kv == "int8" else STORED[kv]
        outputs += [Port(name, new, (K, "T", C)) for name in present_names(layer)]
    return GraphPorts(tuple(inputs), tuple(outputs))


def head_ports(config: DecoderConfig) -> GraphPorts:
    """Of the graph "head"."""
    return GraphPorts((Port("hidden", "float32", ("B", config.hidden_size)),), (Port("logit", "float32", ("B",)),))


# --- CUDA ------------------------------------------------------------------------------------------------

PAGE_TOKENS: Final = 128  # of one page of the pool: what the flash kernel reads for heads of 128


def cuda_type(schemes: Iterable[str]) -> str | None:
    """What CUDA graphs compute in, by how matrices are stored: "float16", "bfloat16"; None: in float32 there are none.

    A few matrices may be stored wider than the others.
    """
    known = set(schemes)
    if known <= {"fp32"}:
        return None
    return "bfloat16" if known <= {"bf16", "fp32"} else "float16"


def cuda_vision_ports(config: ModelConfig, dtype: str) -> GraphPorts:
    """Of "vision.cuda": bytes of patches, one frame of each, of I images that are filled up to S patches."""
    area = config.vision.in_channels * config.vision.patch_size**2
    inputs = (
        Port("pixels", "uint8", ("I", "S", area)),
        Port("positions", "int64", ("I", "S", 2)),  # row and column
        Port("lengths", "int32", ("I",)),  # patches of each image
    )
    return GraphPorts(inputs, (Port("image_embeds", dtype, ("V", config.decoder.hidden_size)),))


def cuda_decoder_ports(config: DecoderConfig, dtype: str) -> GraphPorts:
    """Of "decoder.cuda": packed tokens of sequences, the pages of each, and the pool, which is updated in place."""
    D, K, C = config.hidden_size, config.num_kv_heads, config.head_dim
    inputs = [
        Port("token_ids", "int64", ("T",)),
        Port("image_embeds", dtype, ("V", D)),  # as "vision.cuda" gives them
        Port("image_rows", "int64", ("Y",)),  # those of them that replace
        Port("image_token_index", "int64", ("Y",)),  # these rows of tokens
        Port("positions", "int64", (3, "T")),
        Port("cumulative", "int32", ("Q+1",)),  # row at which each sequence begins, and the end
        Port("past", "int32", ("Q",)),  # tokens of each that its pages hold already
        Port("block_table", "int32", ("Q", "M")),  # pages of each in order; −1 where it has fewer
        Port("metadata", "int32", (2,)),  # in the computer's memory: most new tokens of a sequence, most keys
        Port("last_index", "int64", ("B",)),
    ]
    outputs = [Port("hidden", "float32", ("B", D))]
    for layer in range(config.num_layers):
        page = ("N", PAGE_TOKENS, K, C)
        inputs += [Port(name, dtype, page) for name in past_names(layer)]
        outputs += [Port(name, dtype, page) for name in present_names(layer)]
    return GraphPorts(tuple(inputs), tuple(outputs))


# What each set must have: the portable graph in whose place one of it runs → its ports, where it computes in a type.
_SET_PORTS: Final[Mapping[GraphSet, Mapping[str, Callable[[ModelConfig, str], GraphPorts]]]] = {
    "cpu": {  # ONNX Runtime's own operators for CPUs, fed as the portable graph is
        "vision": lambda config, _: vision_ports(config),
    },
    "cuda": {
        "vision": cuda_vision_ports,
        "decoder": lambda config, dtype: cuda_decoder_ports(config.decoder, dtype),
        "head": lambda config, _: head_ports(config.decoder),
    },
}


def set_graphs(which: GraphSet) -> dict[str, str]:
    """The graphs of a set, by the portable graphs in whose place they run."""
    return {name: set_name(name, which) for name in _SET_PORTS[which]}


def expected_ports(config: ModelConfig, name: str, dtype: str | None = None) -> GraphPorts:
    """The ports of the graph `name`: "vision", "head", one of `decoder_name` or of `set_graphs`.

    `dtype`: what CUDA graphs compute in (`cuda_type`).
    """
    of_sets = {set_name(part, which): ports for which in SETS for part, ports in _SET_PORTS[which].items()}
    if name in of_sets:
        return of_sets[name](config, dtype or "float16")
    if name == "vision":
        return vision_ports(config)
    if name == "head":
        return head_ports(config.decoder)
    return decoder_ports(config.decoder, next(kv for kv in KV if decoder_name(kv) == name))


def check_ports(
    config: ModelConfig,
    graphs: Mapping[str, GraphPorts],
    runs: Mapping[str, Mapping[str, str]],
    dtype: str | None,
) -> None:
    """Raises ValueError, a sentence part that names the port, where these are not the graphs of such a model.

    `runs`: of each set that is there, its graphs by the portable graphs in whose place they run. `dtype`: what CUDA
    graphs compute in, None where there are none.
    """
    needed = [*GRAPHS, *(decoder_name(kv) for kv in KV if kv != "fp32")]
    if unknown := sorted(set(runs) - set(SETS)):
        raise ValueError(f"runs: {unknown[0]!r:.60} is not known; known are {', '.join(SETS)}")
    for which in SETS:
        if which in runs:
            if which == "cuda" and dtype is None:
                raise ValueError("runs: there are no graphs for CUDA that compute in float32")
            if dict(runs[which]) != (own := set_graphs(which)):
                raise ValueError(f"runs: {which} is {dict(runs[which])!r:.200}, and it can only be {own}")
            needed += own.values()
    if missing := [name for name in needed if name not in graphs]:
        raise ValueError(f"graphs: {missing[0]} is missing")
    if extra := sorted(set(graphs) - set(needed)):
        raise ValueError(f"graphs: {extra[0]!r} is not known; known are {', '.join(needed)}")
    for name in needed:
        found = graphs[name]
        if name.startswith("decoder"):  # layers are counted before so many ports are thought of
            kinds = 4 if name == decoder_name("int8") else 2
            layers = sum(port.name.startswith(_PAST) for port in found.inputs) / kinds
            if layers != config.decoder.num_layers:
                raise ValueError(
                    f"model.decoder.num_layers is {config.decoder.num_layers}, and the graph {name} has the inputs of "
                    f"{layers:g} layers"
                )
        expected = expected_ports(config, name, dtype)
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


def _told(port: Port) -> str:
    return f"{port.name} {port.dtype} [{', '.join(map(str, port.shape))}]"
