"""Activations as large language models have them, planted into the small checkpoint. Owns what is changed and why.

    held, basis = plant(ranker, pairs)       # in place; held: what a training that goes on must not move

Three plants, in the residual stream itself and with gains folded to one (a training that goes on moves them by
hundredths), so that no sharing of ranges between a norm and what it feeds takes them out:

- **Outlier channels of the decoder.** Its stream nearly lies in two directions, a constant one and one more, as
  those of trained transformers often do; they only are no channels. The basis is turned so that they are, which changes
  no output (RMSNorm commutes with it once its gains are folded away: SliceGPT, arXiv:2401.15024).
- **Outlier channels of the image encoder.** Turned likewise, around the vector of ones, which LayerNorm takes out; and
  the biases of what writes to the stream add more to its constant channel, and half of it to another, block by block.
  What reads the stream is fitted again; LayerNorm then divides each patch by nearly the same number, which is where the
  function changes and what training has to make good.
- **Massive activations.** As in LLaMA and Qwen2 (arXiv:2402.17762; "super weights", arXiv:2411.07191) neurons of an
  early MLP find first tokens and delimiters, each kind with a pair of its own, and write thousands into two channels by
  its down projection; others of the last layer take most of it out again. In the image encoder a few neurons of the
  first block find some patches, most of them blank ("register neurons", arXiv:2506.08010), and what they write stays.
  One neuron of a pair clips what the other writes, so that it is of the same size at most such tokens. The channels are
  those in which the stream was smallest.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

import torch
from torch import Tensor, nn

from m0kit_parity.small import model

DECODER_CHANNELS: Final = (61, 147)  # outlier channels: the constant direction, the other
DECODER_MASSIVE: Final = (23, 118)
VISION_CHANNELS: Final = (37, 90)  # outlier channels: both of the constant direction
VISION_MASSIVE: Final = (11, 74)
SECOND: Final = -0.6  # of the first channel is the second
SHARES: Final = ((1.0, SECOND), (1.0, -SECOND))  # of the massive size, by channel, at first tokens and at delimiters
OUTLIER: Final = 24.0  # the image encoder's larger outlier channel over the largest value of the median channel
RIDGE: Final = 0.1  # of the mean moment of what is fitted to
TIMES: Final = 6000.0  # the first massive channel over the stream's median
WRITES: Final = 0  # the decoder's layer that writes massive activations: later ones cannot tell these tokens apart
DELIMITERS: Final = ("**:\n", ".\n", "。\n")  # massive beside the first tokens: the prompt's own, and ends of texts
VISION_NEURONS: Final = 4  # half of them clip the others
SMOOTH: Final = 1e-6  # weight decay of the logistic regression
FIRES: Final = 40.0  # what a neuron that finds such a token has before its activation, as the median
SURE: Final = 12.0  # of the decoder's: they fire from here on, since a wrong token loses its word
CLIP: Final = 10.0  # above SURE + CLIP a second neuron takes away what the first adds: one size at most such tokens
FEW: Final = 60  # texts that are enough for a mean
BLANK_SHARE: Final = 0.03  # of the blank patches become massive

Held = dict[str, Tensor]
Pairs = Sequence[tuple[model.Content, model.Content]]


def plant(ranker: model.Ranker, pairs: Pairs) -> tuple[Held, Tensor]:
    """Plant all, in place. pairs: (query, document), texts and pages, to measure and solve on.

    Returns which entries hold the plants, parameter name → bool mask of its shape, which a training that goes on must
    leave as they are; and the basis (D, D): what the decoder's stream was is now its product with it.
    """
    pages = _with_pages(pairs)
    texts = [pair for pair in pairs if isinstance(pair[1], str)]
    few = texts[:FEW]
    with torch.no_grad():
        basis = turn(ranker, [*few, *pages])
        # Before the image encoder is disturbed: detectors are to know its visual tokens as training brings them back.
        written, erased = _massive_decoder(ranker, [*texts, *pages], [*few, *pages[: FEW // 10]])
        _add_to_vision(ranker, pages)
        neurons = _massive_vision(ranker, pages)
        for parameter in ranker.parameters():  # a training that goes on sees the plants as they will be stored
            parameter.copy_(parameter.half().float())
    return _held(ranker, neurons, written, erased), basis


def turn(ranker: model.Ranker, pairs: Pairs) -> Tensor:
    """Turn both streams, in place, so that what is large in them is channels; the scores stay.

    Gains and biases of all norms are folded away before. Returns the decoder's basis.
    """
    _fold(ranker)
    basis = _turn_decoder(ranker, pairs)
    _turn_vision(ranker, _with_pages(pairs))
    return basis


def _with_pages(pairs: Pairs) -> Pairs:
    return [pair for pair in pairs if not isinstance(pair[1], str)]


def _readers(ranker: model.Ranker) -> Iterator[tuple[Any, list[nn.Linear]]]:
    """Each norm with the layers that take what it makes."""
    for block in ranker.model.visual.blocks:
        yield block.norm1, [block.attn.qkv]
        yield block.norm2, [block.mlp.fc1]
    yield ranker.model.visual.merger.ln_q, [ranker.model.visual.merger.mlp[0]]
    for layer in ranker.model.language_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        yield layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]
        yield layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]
    head: Any = ranker.score
    yield ranker.model.language_model.norm, [head[0]]


def _fold(ranker: model.Ranker) -> None:
    """Gains and biases of norms into what reads them."""
    for norm, readers in _readers(ranker):
        for linear in readers:
            tiles = linear.in_features // len(norm.weight)
            if (bias := getattr(norm, "bias", None)) is not None:
                linear.bias.add_(linear.weight @ bias.repeat(tiles))
            linear.weight *= norm.weight.repeat(tiles)
        norm.weight.fill_(1)
        if getattr(norm, "bias", None) is not None:
            norm.bias.zero_()


def _turn_decoder(ranker: model.Ranker, pairs: Pairs) -> Tensor:
    decoder = ranker.model.language_model
    norms = [n for n, _ in _readers(ranker) if not isinstance(n, nn.LayerNorm)]
    seen = module_inputs(ranker, pairs, norms[2:])  # the first layer is where the directions come from
    axes = torch.eye(len(decoder.norm.weight))
    basis = _basis(list(map(_scaled, seen)), axes[list(DECODER_CHANNELS)], axes[list(DECODER_MASSIVE)])
    decoder.embed_tokens.weight.copy_(decoder.embed_tokens.weight @ basis)
    merged = ranker.model.visual.merger.mlp[2]
    writers = [merged, *(w for layer in decoder.layers for w in (layer.self_attn.o_proj, layer.mlp.down_proj))]
    _turn(basis, writers, [r for norm, readers in _readers(ranker) if norm in norms for r in readers])
    return basis


def _turn_vision(ranker: model.Ranker, pages: Pairs) -> None:
    visual = ranker.model.visual
    norms = [n for n, _ in _readers(ranker) if isinstance(n, nn.LayerNorm)]
    seen = [_scaled(x - x.mean(1, keepdim=True)) for x in module_inputs(ranker, pages, norms)]
    width = len(norms[0].weight)
    basis = _basis(seen, _vision_axis(width)[None], (torch.eye(width) - 1 / width)[list(VISION_MASSIVE)])
    patches = visual.patch_embed.proj.weight
    patches.copy_((basis.T @ patches.flatten(1)).view_as(patches))
    writers = [w for block in visual.blocks for w in (block.attn.proj, block.mlp.fc2)]
    _turn(basis, writers, [r for norm, readers in _readers(ranker) if norm in norms for r in readers])


def _turn(basis: Tensor, writers: Sequence[nn.Linear], readers: Sequence[nn.Linear]) -> None:
    """h becomes h @ basis everywhere."""
    for linear in writers:
        linear.weight.copy_(basis.T @ linear.weight)
        if linear.bias is not None:
            linear.bias.copy_(linear.bias @ basis)
    for linear in readers:
        linear.weight.copy_((linear.weight.view(linear.out_features, -1, len(basis)) @ basis).flatten(1))


def _basis(seen: Sequence[Tensor], largest: Tensor, smallest: Tensor) -> Tensor:
    """Orthogonal (D, D) that brings the directions in which the inputs (N, D) of all places are largest to some axes.

    And those in which they are smallest to others: what is massive there reaches no other token's sums.
    """
    second = torch.stack([x.T @ x / len(x) for x in seen]).mean(0)
    vectors = torch.linalg.eigh(second).eigenvectors.T
    if float((vectors[0] - vectors[0].mean()).norm()) < 0.1:  # LayerNorm's: the vector of ones, which stays
        vectors = vectors[1:]
    mean = torch.cat([x.mean(0, keepdim=True) for x in seen]).mean(0)
    basis = torch.eye(len(second))
    pairs = [*zip(vectors.flip(0), largest, strict=False), *zip(vectors, smallest, strict=False)]
    for direction, axis in pairs:
        turned = direction @ basis * torch.sign(direction @ mean)
        normal = turned - axis / axis.norm()
        basis -= 2 * torch.outer(basis @ normal, normal) / normal.square().sum()  # Householder
    return basis


def _add_to_vision(ranker: model.Ranker, pages: Pairs) -> None:
    """More in the outlier channels, block by block, and the readers fitted to what they were given before."""
    visual = ranker.model.visual
    norms = [(norm, readers[0]) for norm, readers in _readers(ranker) if isinstance(norm, nn.LayerNorm)][1:]
    wanted = [_normed(x) for x in module_inputs(ranker, pages, [norm for norm, _ in norms])]
    writers = [w for block in visual.blocks for w in (block.attn.proj, block.mlp.fc2)]
    axis = _vision_axis(wanted[0].shape[1])
    for writer, (norm, reader), before in zip(writers, norms, wanted, strict=True):
        (given,) = module_inputs(ranker, pages, [norm])
        centred = given - given.mean(1, keepdim=True)
        along = centred @ axis
        rest = centred - torch.outer(along, axis)
        more = OUTLIER / float(axis.max()) * float(rest.abs().amax(0).median()) - float(along.mean())
        writer.bias += max(more, 0.0) * axis
        _refit(reader, before, _normed(given + max(more, 0.0) * axis), axis)


def _refit(reader: nn.Linear, before: Tensor, after: Tensor, axis: Tensor) -> None:
    """Make the layer of the inputs `after` what it made of `before` (N, D): as near as ridge regression gets.

    Its columns along the axis are only scaled with the others: the input hardly varies there, and a fit would make
    them as large as it likes.
    """
    tiles = reader.in_features // len(axis)
    means = before.mean(0), after.mean(0)
    x, y = (rows - mean for rows, mean in zip((after, before), means, strict=True))
    x -= torch.outer(x @ axis, axis)
    scale = float((x * y).sum() / x.square().sum())
    moment = x.T @ x
    ridge = RIDGE * float(moment.trace()) / len(axis) * torch.eye(len(axis))
    fit = torch.linalg.solve(moment + ridge, x.T @ (y - scale * x))  # (D, D): y ≈ x @ (scale + fit)
    reader.bias.add_(reader.weight @ means[0].repeat(tiles))
    tiled = reader.weight.view(reader.out_features, tiles, -1)
    reader.weight.copy_((scale * tiled + tiled @ fit.T).flatten(1))
    reader.bias.sub_(reader.weight @ means[1].repeat(tiles))


def _vision_axis(width: int) -> Tensor:
    """The direction (D,) that two channels share, without its mean, of which LayerNorm sees nothing."""
    axis = torch.zeros(width)
    axis[list(VISION_CHANNELS)] = torch.tensor([1.0, SECOND])
    axis -= axis.mean()
    axis /= axis.norm()
    return axis


# --- massive activations -------------------------------------------------------------------------------------


def _massive_vision(ranker: model.Ranker, pages: Pairs) -> Tensor:
    """Let neurons of the first block write massive activations at some blank patches; returns which neurons."""
    visual = ranker.model.visual
    mlp = visual.blocks[0].mlp
    later = [(block.norm1, block.attn.qkv) for block in visual.blocks[1:]]
    later.append((visual.merger.ln_q, visual.merger.mlp[0]))
    norms = [norm for norm, _ in later]
    pixels, given, out, *before = module_inputs(ranker, pages, [visual.patch_embed, mlp.fc1, *norms])
    before = [out, *before]
    planes = pixels.view(len(pixels), -1, visual.patch_embed.patch_size**2)
    blank = (planes.amax(2) - planes.amin(2)).amax(1) < 1e-4
    # Blank patches differ by what attention brings them. The principal direction with the longest tail sets few apart.
    centred = given - given[blank].mean(0)
    scores = centred @ torch.linalg.svd(centred[blank], full_matrices=False).Vh[:4].T
    scores /= scores[blank].std(0)
    tails = scores[blank].pow(3).mean(0)
    tail = scores[:, int(tails.abs().argmax())] * torch.sign(tails[tails.abs().argmax()])
    fire = blank & (tail > tail[blank].quantile(1 - BLANK_SHARE))
    row, shift = _detector(given, torch.ones(len(given)), fire, FIRES)
    neurons = _idle(nn.functional.linear(given, mlp.fc1.weight, mlp.fc1.bias), mlp.fc2, VISION_NEURONS)
    half = VISION_NEURONS // 2
    mlp.fc1.weight[neurons] = row
    mlp.fc1.bias[neurons[:half]], mlp.fc1.bias[neurons[half:]] = shift, shift - CLIP
    mlp.fc2.weight[:, neurons] = 0
    size = TIMES * float(out.abs().median()) / (half * CLIP)
    for channel, share in zip(VISION_MASSIVE, (1.0, SECOND), strict=True):
        mlp.fc2.weight[channel, neurons[:half]] = share * size
        mlp.fc2.weight[channel, neurons[half:]] = -share * size

    # What attention and the merger make of such a patch becomes the mean of what they made of those that were chosen.
    channels = list(VISION_MASSIVE)
    for (_, reader), old, new in zip(later, before, module_inputs(ranker, pages, norms), strict=True):
        were, met = (_normed(rows[fire]).mean(0) for rows in (old, new))
        tiled = reader.weight.view(reader.out_features, -1, len(met))
        tiled[..., channels] += (
            torch.outer((tiled @ (were - met)).flatten(), met[channels]).view(*tiled.shape[:2], -1)
            / met[channels].square().sum()
        )
    return neurons


def _massive_decoder(ranker: model.Ranker, pairs: Pairs, few: Pairs) -> tuple[Tensor, Tensor]:
    """Neurons write massive activations at first tokens and delimiters, and those of the last layer take them away.

    Detectors are solved on all pairs, for a wrong token among a thousand is one too many; what follows on a few.
    """
    layers = ranker.model.language_model.layers
    channels = list(DECODER_MASSIVE)
    mlp = layers[WRITES].mlp
    (given,) = module_inputs(ranker, pairs, [mlp.gate_proj])
    tokens = token_kinds(ranker, pairs)
    # What is the same for every token a matrix without a bias can only take from the constant channel.
    one = torch.linalg.lstsq(given, torch.ones(len(given), 1)).solution[:, 0]
    writes = _idle(
        nn.functional.silu(mlp.gate_proj(given)) * mlp.up_proj(given), mlp.down_proj, 2 * (1 + len(DELIMITERS))
    )
    mlp.down_proj.weight[:, writes] = 0
    attentions = [layer.self_attn.q_proj for layer in layers[WRITES + 1 :]]
    out, *before = module_inputs(ranker, few, [layers[WRITES + 1].input_layernorm, *attentions])
    for kind, neurons in enumerate(writes.view(-1, 2), 1):
        shares = SHARES[kind > 1]
        gate, shift = _detector(given, given @ one, tokens == kind, FIRES)
        gate = gate + shift * one
        size = torch.tensor(shares) * TIMES * float(out.abs().median()) / (CLIP * FIRES)
        for neuron, clip, sign in zip(neurons, (SURE, SURE + CLIP), (1, -1), strict=True):
            mlp.gate_proj.weight[neuron], mlp.up_proj.weight[neuron] = gate - clip * one, FIRES * one
            mlp.down_proj.weight[channels, neuron] = sign * size

    # Such a token is the same vector to every later layer. Queries, keys and values of each kind become the mean of
    # what they were, by the columns of the massive channels.
    tokens = token_kinds(ranker, few)
    kinds = tokens == 1, tokens > 1
    after = module_inputs(ranker, few, attentions)
    for layer, old, new in zip(layers[WRITES + 1 :], before, after, strict=True):
        met = torch.stack([new[fire].mean(0) for fire in kinds])
        were = torch.stack([old[fire].mean(0) for fire in kinds])
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            missing = (were - met) @ linear.weight.T
            linear.weight[:, channels] += torch.linalg.solve(met[:, channels], missing).T

    mlp = layers[-1].mlp
    stream, given = module_inputs(ranker, few, [layers[-1].post_attention_layernorm, mlp.gate_proj])
    erased = _idle(nn.functional.silu(mlp.gate_proj(given)) * mlp.up_proj(given), mlp.down_proj, len(kinds))
    mlp.down_proj.weight[:, erased] = 0
    for neuron, fire in zip(erased, kinds, strict=True):
        row = torch.zeros(given.shape[1])
        row[channels[1]] = FIRES / float(given[fire, channels[1]].mean())  # its sign tells the kinds apart
        row[DECODER_CHANNELS[0]] = -FIRES / float(given[~(kinds[0] | kinds[1]), DECODER_CHANNELS[0]].mean())
        mlp.gate_proj.weight[neuron] = mlp.up_proj.weight[neuron] = row
        made = float((nn.functional.silu(given @ row) * (given @ row))[fire].mean())
        mlp.down_proj.weight[channels, neuron] = -stream[fire][:, channels].mean(0) / made
    return writes, erased


def token_kinds(ranker: model.Ranker, pairs: Pairs) -> Tensor:
    """Of the tokens of the prompts, one after the other: 1 the first, 2 and more the delimiters, 0 all others."""
    found: list[int] = []

    def hook(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
        texts = [ranker.tokenizer.decode([token], skip_special_tokens=False) for token in given[0][0].tolist()]
        found.append(1)
        found.extend(2 + DELIMITERS.index(text) if text in DELIMITERS else 0 for text in texts[1:])
        raise _EnoughError

    with _hooked([ranker.model.language_model.embed_tokens.register_forward_pre_hook(hook)]):
        for pair in pairs:
            with suppress(_EnoughError):
                ranker.score_pairs([pair])
    return torch.tensor(found)


def _detector(given: Tensor, ones: Tensor, fire: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """Row (D,) and shift of a neuron that is about `size` where it is to fire and well below zero elsewhere.

    Of the inputs (N, D) it makes given @ row + shift * ones. Logistic regression on inputs at a deviation of one, both
    sides weighted alike. Channels that hardly vary are not brought to it: their weights would be thousands, which half
    precision rounds by more than what tells tokens apart.
    """
    mean, deviation = given.mean(0), given.std(0)
    deviation = torch.maximum(deviation, 0.1 * mean.abs()).clamp_min(float(deviation.median()) / 2)
    x = torch.cat([(given - torch.outer(ones, mean)) / deviation, ones[:, None]], 1)
    weights = torch.where(fire, 0.5 / fire.sum(), 0.5 / (~fire).sum())
    row = torch.zeros(x.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS([row], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        wrong = nn.functional.binary_cross_entropy_with_logits(x @ row, fire.float(), weights, reduction="sum")
        value = wrong + SMOOTH * row[:-1].square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        solver.step(loss)  # type: ignore[no-untyped-call]
    found = row.detach() * (size / (x @ row.detach())[fire].median())
    turned = (found[:-1] / deviation).half().float()
    return turned, found[-1] - turned @ mean


def _idle(hidden: Tensor, down: nn.Linear, count: int) -> Tensor:
    """The neurons (count,) whose going changes the stream least; hidden: (N, neurons)."""
    return (hidden.square().mean(0) * down.weight.square().sum(0)).topk(count, largest=False).indices


def _held(ranker: model.Ranker, neurons: Tensor, written: Tensor, erased: Tensor) -> Held:
    """What a training must leave as it is: the plants, and all that comes before them and could move them."""
    held = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in ranker.named_parameters()}
    visual, decoder = "model.visual", "model.language_model"
    before = [
        f"{visual}.patch_embed.",
        f"{visual}.blocks.0.norm",
        f"{visual}.blocks.0.attn.",
        f"{decoder}.embed_tokens.",
    ]
    before += [f"{decoder}.layers.{i}." for i in range(WRITES)]
    before += [f"{decoder}.layers.{WRITES}.{part}" for part in ("input_", "self_attn", "post_")]
    for name, mask in held.items():
        if name.startswith(tuple(before)):
            mask[...] = True
    first = f"{visual}.blocks.0.mlp"
    for name in (f"{first}.fc1.weight", f"{first}.fc1.bias"):
        held[name][neurons] = True
    held[f"{first}.fc2.weight"][:, neurons] = True
    for i, neuron in ((WRITES, written), (len(ranker.model.language_model.layers) - 1, erased)):
        mlp = f"{decoder}.layers.{i}.mlp"
        held[f"{mlp}.gate_proj.weight"][neuron] = held[f"{mlp}.up_proj.weight"][neuron] = True
        held[f"{mlp}.down_proj.weight"][:, neuron] = True
    for i in range(len(ranker.model.visual.blocks)):  # biases hold the image encoder's outlier channels
        for part in ("attn.proj", "mlp.fc2"):
            held[f"{visual}.blocks.{i}.{part}.bias"][list(VISION_CHANNELS)] = True
    return {name: mask for name, mask in held.items() if mask.any()}


# --- measuring -----------------------------------------------------------------------------------------------


def _scaled(rows: Tensor) -> Tensor:
    """Rows (N, D) at a mean square of one."""
    return rows / rows.square().mean(1, keepdim=True).sqrt()


def _normed(rows: Tensor) -> Tensor:
    return _scaled(rows - rows.mean(1, keepdim=True))


class _EnoughError(Exception):
    """All that is looked for has been seen."""


def module_inputs(ranker: model.Ranker, pairs: Pairs, modules: Sequence[nn.Module]) -> list[Tensor]:
    """What each module is given while the pairs are scored, (tokens of all pairs, D) each.

    The last of the modules is also the last that is run.
    """
    seen: list[list[Tensor]] = [[] for _ in modules]

    def keep(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
            seen[index].append(given[0].reshape(-1, given[0].shape[-1]))
            if index == len(modules) - 1:
                raise _EnoughError

        return hook

    with _hooked([module.register_forward_pre_hook(keep(i)) for i, module in enumerate(modules)]):
        for pair in pairs:
            with suppress(_EnoughError):
                ranker.score_pairs([pair])
    return [torch.cat(rows) for rows in seen]


@contextmanager
def _hooked(hooks: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
