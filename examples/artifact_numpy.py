"""Score a query on a text and on an image with an artifact and without m0kit: docs/artifact.md as a program.

Needs numpy, onnxruntime, tokenizers and Pillow. One pair in a run:
    python artifact_numpy.py m0-fp32/ "slm markdown" "a small language model writes markdown" page.png
"""

import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer

TILE = 4  # rows and pairs of a run are filled up to a multiple of it


class Artifact:
    """Graphs, tokenizer, and what the manifest says of prompts, images and the decoder."""

    def __init__(self, folder):
        model = json.loads((folder / "manifest.json").read_text("utf-8"))["model"]
        self.prompt, self.image, self.decoder = model["prompt"], model["image"], model["decoder"]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.encode_special_tokens = True  # whatever a text spells stays text
        self.graphs = {n: onnxruntime.InferenceSession(folder / f"{n}.onnx") for n in ("vision", "decoder", "head")}

    def score(self, query, document):
        """Query and document are each a text or an image in RGB → relevance between 0 and 1."""
        prompt, ids, positions, embeds, text = self.prompt, [], [], [], ""

        def add(tokens, offsets):  # offsets (3, tokens): frame, row and column, from where the tokens before ended
            positions.append(offsets + (positions[-1].max() + 1 if positions else 0))
            ids.extend(tokens)

        def add_text(text, special):  # the three go together
            tokens = [*self.tokenizer.encode(text, add_special_tokens=False).ids, special]
            add(tokens, np.tile(np.arange(len(tokens)), (3, 1)))

        for part in (prompt["document_header"], document, prompt["query_header"], query):
            if isinstance(part, str):
                text += part  # texts side by side are tokenised as one
                continue
            visual, rows, columns = self.embed(part)
            embeds.append(visual)
            add_text(text, prompt["vision_start_id"])
            add([prompt["image_pad_id"]] * len(visual), np.indices((1, rows, columns)).reshape(3, -1))
            add_text("", prompt["vision_end_id"])
            text = ""
        add_text(text, prompt["score_token_id"])

        if (T := len(ids)) > prompt["max_length"]:
            raise ValueError(f"{T} tokens, and the model takes {prompt['max_length']}")
        fill = -T % TILE  # rows that belong to nobody: each is a piece that sees itself alone
        no_past = np.zeros((self.decoder["num_kv_heads"], 0, self.decoder["head_dim"]), np.float32)
        feeds = {
            "token_ids": np.array(ids + ids[:1] * fill),
            "positions": np.pad(np.concatenate(positions, axis=1), ((0, 0), (0, fill))),
            "image_embeds": np.concatenate([*embeds, np.zeros((0, self.decoder["hidden_size"]), np.float32)]),
            "image_token_index": np.flatnonzero(np.array(ids) == prompt["image_pad_id"]),
            "pieces": np.array([(a, b, 0, 0, a, b, 0, 0, 0) for a, b in pairwise([0, *range(T, T + fill + 1)])]),
            "last_index": np.array([T - 1] + [0] * (TILE - 1)),
            "last_pieces": np.array([(i, i + 1, 0, 0, 0, 1 if i else T, 0, 0, 0) for i in range(TILE)]),
        }
        for i in range(self.decoder["num_layers"]):
            feeds |= {f"past_key_values.{i}.{name}": no_past for name in ("key", "value")}
        (hidden,) = self.graphs["decoder"].run(["hidden"], feeds)
        (logits,) = self.graphs["head"].run(["logit"], {"hidden": hidden})
        return 1 / (1 + math.exp(prompt["logit_bias"] - float(logits[0])))

    def embed(self, image):
        """An image in RGB → its visual tokens (V, D), in rows × columns."""
        c, patch, merge = self.image, self.image["patch_size"], self.image["merge_size"]
        sides, factor = (image.height, image.width), patch * merge
        size = [round(side / factor) * factor for side in sides]
        if math.prod(size) > c["max_pixels"]:
            shrink = math.sqrt(math.prod(sides) / c["max_pixels"])
            size = [max(factor, math.floor(side / shrink / factor) * factor) for side in sides]
        elif math.prod(size) < c["min_pixels"]:
            grow = math.sqrt(c["min_pixels"] / math.prod(sides))
            size = [math.ceil(side * grow / factor) * factor for side in sides]
        rows, columns = (side // factor for side in size)
        pixels = np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC)) * c["rescale"]
        values = (pixels.astype(np.float32) - np.float32(c["mean"])) / np.float32(c["std"])
        values = values.reshape(rows, merge, patch, columns, merge, patch, 3).transpose(0, 3, 1, 4, 6, 2, 5)
        values = values[..., None, :, :].repeat(c["temporal_patch_size"], axis=5)  # one frame stands for both
        places = np.indices((rows * merge, columns * merge)).reshape(2, rows, merge, columns, merge)
        positions = places.transpose(1, 3, 2, 4, 0).reshape(-1, 2)  # (P, 2)
        images = np.array([(0, len(positions))])  # one, of all these patches
        feeds = {"patches": values.reshape(len(positions), -1), "positions": positions, "images": images}
        return self.graphs["vision"].run(["image_embeds"], feeds)[0], rows, columns


if __name__ == "__main__":
    folder, query, text, page = sys.argv[1:]
    artifact, image = Artifact(Path(folder)), ImageOps.exif_transpose(Image.open(page)).convert("RGB")
    print(f"{artifact.score(query, text):.6f}  {text}\n{artifact.score(query, image):.6f}  {page}")
