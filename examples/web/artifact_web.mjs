// Scores a text pair with onnxruntime-web, from an artifact alone; docs/artifact.md says what is what.
//
//     npm ci && node artifact_web.mjs m0-fp32/ "slm markdown" "a small language model writes markdown"
//
// It runs on the CPU, in WebAssembly, as in a browser: there fetch() stands in the place of readFile.
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-web";

const TILE = 4; // rows and pairs of a run are filled up to a multiple of it

const [folder, query, document] = process.argv.slice(2);
const bytes = (name) => readFile(join(folder, name));
const json = async (name) => JSON.parse(await bytes(name));
const [{ model }, tokenizerFile] = await Promise.all([json("manifest.json"), json("tokenizer.json")]);
const { decoder, prompt } = model;

// A graph's weights lie beside it; WebAssembly has no files, so it is handed them.
const open = async (name) =>
  ort.InferenceSession.create(await bytes(`${name}.onnx`), {
    externalData: [{ path: `${name}.onnx.data`, data: await bytes(`${name}.onnx.data`) }],
  });

// Special tokens are no part of the rules: whatever a text spells stays text.
tokenizerFile.added_tokens = tokenizerFile.added_tokens.filter((token) => !token.special);
const tokenizer = new Tokenizer(tokenizerFile, {});
const text = prompt.document_header + document + prompt.query_header + query;
const ids = tokenizer.encode(text, { add_special_tokens: false }).ids;
ids.push(prompt.score_token_id);
if (ids.length > prompt.max_length) throw new Error(`${ids.length} tokens; at most ${prompt.max_length}`);

const T = ids.length;
const filled = Math.ceil(T / TILE) * TILE;
const int64 = (values, shape) => new ort.Tensor("int64", BigInt64Array.from(values.flat(), BigInt), shape);
const float32 = (shape) => new ort.Tensor("float32", new Float32Array(shape.reduce((a, b) => a * b)), shape);
// Rows 0:T see themselves up to each row; each row that fills up sees itself alone. Columns: q0 q1 a0 a1 b0 b1 p0 p1 past.
const pieces = [[0, T, 0, 0, 0, T, 0, 0, 0]];
for (let row = T; row < filled; row++) pieces.push([row, row + 1, 0, 0, row, row + 1, 0, 0, 0]);
// Pair 0 asks from row T - 1; three more fill up, each sees row 0.
const lastPieces = [[0, 1, 0, 0, 0, T, 0, 0, 0]];
for (let pair = 1; pair < TILE; pair++) lastPieces.push([pair, pair + 1, 0, 0, 0, 1, 0, 0, 0]);
const positions = Array.from({ length: filled }, (_, row) => (row < T ? row : 0));

const feeds = {
  token_ids: int64([...ids, ...Array(filled - T).fill(ids[0])], [filled]),
  image_embeds: float32([0, decoder.hidden_size]),
  image_token_index: int64([], [0]),
  positions: int64([positions, positions, positions], [3, filled]),
  pieces: int64(pieces, [pieces.length, 9]),
  last_index: int64([T - 1, 0, 0, 0], [TILE]),
  last_pieces: int64(lastPieces, [TILE, 9]),
};
for (let layer = 0; layer < decoder.num_layers; layer++)
  for (const name of ["key", "value"])
    feeds[`past_key_values.${layer}.${name}`] = float32([decoder.num_kv_heads, 0, decoder.head_dim]);

const { hidden } = await (await open("decoder")).run(feeds, ["hidden"]);
const { logit } = await (await open("head")).run({ hidden }, ["logit"]);
const value = logit.data[0];
console.log(JSON.stringify({ logit: value, score: 1 / (1 + Math.exp(prompt.logit_bias - value)) }));
