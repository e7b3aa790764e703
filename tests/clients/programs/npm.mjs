// npm's clients: Cohere's own, the AI SDK, LangChain. Reads and prints as asking.py does; each function is what a user
// writes, and stands without its last line in docs/clients.md.
import * as readline from "node:readline";
import { createCohere } from "@ai-sdk/cohere";
import { CohereRerank } from "@langchain/cohere";
import { Document } from "@langchain/core/documents";
import { rerank } from "ai";
import { CohereClient, CohereClientV2 } from "cohere-ai";

async function cohereJsV2({ url, key, model, query, documents }) {
  const client = new CohereClientV2({ token: key, environment: url });
  const answer = await client.rerank({ model, query, documents });
  return answer.results.map((one) => ({ index: one.index, score: one.relevanceScore }));
}

async function cohereJsV1({ url, key, model, query, documents }) {
  const client = new CohereClient({ token: key, environment: url });
  const answer = await client.rerank({ model, query, documents, returnDocuments: true });
  return answer.results.map((one) => ({ index: one.index, score: one.relevanceScore, text: one.document.text }));
}

async function aiSdk({ url, key, model, query, documents }) {
  const cohere = createCohere({ apiKey: key, baseURL: `${url}/v2` });
  const answer = await rerank({ model: cohere.reranking(model), query, documents });
  return answer.ranking.map((one) => ({ index: one.originalIndex, score: one.score }));
}

async function langchainJs({ url, key, model, query, documents }) {
  const client = new CohereClient({ token: key, environment: url });
  const ranker = new CohereRerank({ client, model, topN: documents.length });
  const found = await ranker.compressDocuments(documents.map((pageContent) => new Document({ pageContent })), query);
  return found.map((one) => ({ index: documents.indexOf(one.pageContent), score: one.metadata.relevanceScore }));
}

const clients = {
  "cohere-js-v2": cohereJsV2,
  "cohere-js-v1": cohereJsV1,
  "ai-sdk": aiSdk,
  "langchain-cohere-js": langchainJs,
};

for await (const line of readline.createInterface({ input: process.stdin })) {
  const { client, ...asked } = JSON.parse(line);
  let found;
  try {
    found = { results: await clients[client](asked) };
  } catch (error) {
    console.error(error);
    found = { error: { class: error.name === "Error" ? error.constructor.name : error.name, text: error.message } };
  }
  console.log(JSON.stringify(found));
}
