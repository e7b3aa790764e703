// The page of a m0kit server: what is asked, the documents, and their ranking. Owns what stands on it and in which
// order; what is read, scored and refused is the server's.
//
// Functions up to `page` are pure, so that tests run them without a browser. Whatever comes from outside is put on the
// page as text.

"use strict";

const IMAGES = [  // formats by their first bytes, as letters of Latin-1; "?" stands for any
  ["PNG", "\x89PNG\r\n\x1a\n"], ["JPEG", "\xff\xd8\xff"], ["WEBP", "RIFF????WEBP"], ["GIF", "GIF8"], ["BMP", "BM"],
  ["TIFF", "II*\0"], ["TIFF", "MM\0*"], ["AVIF", "????ftypavi"], ["PPM", "P6"], ["PPM", "P5"], ["PPM", "P4"],
];
const TYPES = { PPM: "image/x-portable-anymap" };  // of HTTP, where it is not the name of the format
const EXCERPT = 400;  // characters of a text on its card
const SHOWN = 200_000;  // and in full view: browsers take long to lay out more, and no model reads it
const THUMBNAIL = 480;  // pixels of the longer side: twice what is shown, for fine screens
const DRAW_MS = 60;  // between two looks of a ranking that streams in
const RECALLED = 1000;  // documents that are kept on the server, listed at a time
const PLACE = /^documents\[(\d+)\][\w.[\]]*/;  // of a document in a request, as errors name it
const IMAGE_NAME = /\.(png|apng|jpe?g|jpe|jfif|webp|gif|bmp|dib|tiff?|p[pgb]m|avif)$/i;

/** What a file is: {kind: "image", format} | {kind: "pdf"} | {kind: "text"}, or {why} it is refused. `bytes`: all. */
function sniff(bytes, name = "") {
  const letters = String.fromCharCode(...bytes.subarray(0, 1024));
  const starts = (mark) => [...mark].every((letter, i) => letter === "?" || letter === letters[i]);
  if (letters.replace("\xef\xbb\xbf", "").startsWith("%PDF-") || (/\.pdf$/i.test(name) && letters.includes("%PDF-"))) {
    return { kind: "pdf" };
  }
  if (!bytes.length) return { why: "is empty." };
  let text = null;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {}
  if (text !== null && !text.includes("\0")) {
    const head = text.slice(0, 4096).toLowerCase();
    if (/\.svgz?$/i.test(name) || /^\s*(<\?xml|<!--|<!doctype svg|<svg)/.test(head) && head.includes("<svg")) {
      return { why: "is an SVG drawing. Save it as PNG." };
    }
    if (IMAGE_NAME.test(name)) return { why: "is called an image, but holds text. Rename it." };
    return text.trim() ? { kind: "text", text: text.replace(/\r\n?/g, "\n") } : { why: "has no text in it." };
  }
  const format = IMAGES.find(([, mark]) => starts(mark))?.[0];
  if (format) return { kind: "image", format };
  return { why: "is neither text in UTF-8, nor a page image, nor a PDF." };
}

/** 1536 → "2 KiB", 33554432 → "32 MiB". */
function size(bytes) {
  const mebi = bytes / 1048576;
  return mebi < 1 ? `${Math.ceil(bytes / 1024)} KiB` : `${mebi < 10 ? Math.ceil(mebi * 10) / 10 : Math.ceil(mebi)} MiB`;
}

/** 412 → "412 ms", 3400 → "3.4 s". */
function duration(ms) {
  return ms < 999.5 ? `${ms < 9.95 ? +ms.toFixed(1) : Math.round(ms)} ms` : `${(ms / 1000).toFixed(ms < 99500 ? 1 : 0)} s`;
}

function counted(n, one, many = `${one}s`) {
  return `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
}

/** Why the server would not take an image of so many bytes and pixels, or "". */
function imageProblem({ format, bytes, pixels }, { formats, limits = {} }) {
  if (formats && format && !formats.includes(format)) {
    return `is ${format}; the server reads ${formats.join(", ")}.`;
  }
  if (bytes > limits.max_image_bytes) {
    return `has ${size(bytes)}; the server takes ${size(limits.max_image_bytes)} for an image.`;
  }
  if (pixels > limits.max_image_pixels) {
    const most = limits.max_image_pixels / 1e6;
    return `has ${(pixels / 1e6).toFixed(1)} megapixels; the server takes ${most}. Make it smaller.`;
  }
  return "";
}

/** Why the server would not take a request of these sides ({text} | {bytes, pixels} | {kept}), or "". */
function requestProblem(query, documents, { limits = {}, index = false }) {
  const sides = [query, ...documents];
  const images = sides.filter((side) => side.bytes !== undefined && !side.kept);
  const over = [  // [found, most, in words, whether what is kept on the server is left out of it]
    [documents.length, limits.max_documents, (n) => counted(n, "document"), false],
    [images.length, limits.max_images, (n) => counted(n, "image"), true],
    [sum(images, (side) => side.pixels ?? 0), limits.max_request_pixels, (n) => `${Math.ceil(n / 1e6)} megapixels`, true],
    [sum(sides, wireBytes) + 200, limits.max_body_bytes, size, true],
  ].find(([found, most]) => found > most);
  if (!over) return "";
  const [found, most, words, spared] = over;
  const help = index && spared ? "Remove some, or keep them on the server first." : "Remove some.";
  return `These are ${words(found)}; the server takes ${words(most)} in one request. ${help}`;
}

function sum(values, of) {
  return values.reduce((total, value) => total + of(value), 0);
}

/** What a side takes of a body, in bytes. */
function wireBytes(side) {
  if (side.kept) return new TextEncoder().encode(JSON.stringify(side.kept)).length + 10;
  if (side.text !== undefined) return new TextEncoder().encode(JSON.stringify(side.text)).length + 1;
  return 4 * Math.ceil(side.bytes / 3) + 14;
}

/** Documents as they stand on the page: by score, ties by index, then those without one as they came. */
function ranked(documents) {
  return documents.map((document, i) => [document, i]).sort(([a, i], [b, j]) => {
    if ((a.score ?? null) === null || (b.score ?? null) === null) {
      return ((a.score ?? null) === null) - ((b.score ?? null) === null) || i - j;
    }
    return b.score - a.score || i - j;
  }).map(([document]) => document);
}

/** "documents[3].image" → 3; null for another field. */
function documentIndex(field) {
  const found = PLACE.exec(field ?? "");
  return found ? Number(found[1]) : null;
}

/** Whole lines of what came so far, as JSON, and the rest: [values, rest]. */
function lines(text) {
  const parts = text.split("\n");
  const rest = parts.pop();
  return [parts.filter((part) => part.trim()).map((part) => JSON.parse(part)), rest];
}

const SILENT = {  // what comes from something before the server, without a sentence of its own
  401: "Something before the server wants to know who you are.",
  413: "Something before the server takes no request of this size. Ask with fewer documents at a time.",
  429: "Something before the server takes no more requests for now.",
  502: "Something before the server does not reach it.",
  503: "Something before the server says that it is not there for now.",
  504: "Something before the server did not wait for its answer. Ask with fewer documents at a time.",
};

/** What an answer that is not 200, or a line with an error, says: {message, fields: [{field, message}], code}. */
function told(body, status = 0) {
  const error = body?.error;
  const message = body?.message ?? error?.message ?? body?.detail ?? (typeof error === "string" ? error : "");
  const fields = Array.isArray(body?.errors) ? body.errors.filter((one) => one && one.field && one.message) : [];
  return {
    message: typeof message === "string" && message ? message : SILENT[status] ?? `The server answered ${status}, and did not say why.`,
    fields: fields.length || !error?.param ? fields : [{ field: error.param, message }],
    code: body?.code ?? error?.code ?? "",
  };
}

/** Seconds of a Retry-After header, a number or a date; null where there is none. */
function retryAfter(value, now = Date.now()) {
  if (!value) return null;
  const at = /^\d+$/.test(value.trim()) ? Number(value) : (Date.parse(value) - now) / 1000;
  return Number.isFinite(at) ? Math.min(Math.max(0, Math.ceil(at)), 3600) : null;
}

/** "12 documents in 3.4 s · …". */
function totals(documents, ms, info, model) {
  const done = documents.filter((document) => (document.score ?? null) !== null);
  const cached = done.filter((document) => document.cached).length;
  const rate = (done.length * 1000) / Math.max(ms, 1);
  const served = (info.models ?? []).find(({ name }) => name === model) ?? info.models?.[0] ?? {};
  const about = [served.name ?? model, served.precision, served.device].filter(Boolean).join(", ");
  return [
    `${counted(done.length, "document")} in ${duration(ms)}`,
    `${rate.toFixed(rate < 10 ? 1 : 0)} documents/s`,
    `${cached} cached, ${done.length - cached} computed`,
    about,
  ].filter(Boolean).join(" · ");
}

/** A cell of CSV that no spreadsheet takes for a formula. */
function cell(value) {
  const text = String(value ?? "");
  const plain = typeof value !== "number" && /^[\s]*[=+\-@]|^[\t\r]/.test(text) ? `'${text}` : text;
  return /[",\r\n]|^'|^\s|\s$/.test(plain) ? `"${plain.replaceAll('"', '""')}"` : plain;
}

/** A ranking, rows as `rows` gives them, as CSV with a header. */
function csv(rows) {
  const names = ["rank", "score", "name", "page", "pages", "kind", "cached", "ms", "text"];
  return [names, ...rows.map((row) => names.map((name) => row[name]))]
    .map((row) => row.map(cell).join(",") + "\r\n").join("");
}

/** What is downloaded of documents that were ranked: an object for each. */
function rows(documents) {
  return ranked(documents).filter((document) => (document.score ?? null) !== null).map((document, i) => ({
    rank: i + 1, score: document.score, name: document.name, page: document.page ?? null,
    pages: document.pages ?? null, kind: document.kind, cached: Boolean(document.cached), ms: document.ms ?? null,
    text: document.text ?? null,
  }));
}

/** As it begins a line; the server's go on behind a name. */
function sentence(text) {
  return text.replace(/^\p{Ll}/u, (letter) => letter.toUpperCase());
}

/** A word of the shell. */
function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

/** Where a side comes from, for code: {pdf, page} | {file} | {value: JSON}. Only what was on disk is read from there. */
function source(side, base64) {
  if (side.kept) return { value: { id: side.kept } };
  if (side.text !== undefined) return { value: side.text };
  if (side.pdf) return { pdf: side.pdf, page: side.page };
  return side.file ? { file: side.file } : { value: { image: base64 } };
}

/** The request as a command: JSON in a here-document, into which images are read. `request`: {url, model, auth, query,
 * documents}, sides as `source` gives them. */
function curl({ url, model, auth, query, documents }) {
  const pdfs = [...new Set([query, ...documents].map((side) => side.pdf).filter(Boolean))];
  const key = auth ? ' -H "Authorization: Bearer $M0KIT_API_KEY"' : "";
  const inside = (text) => text.replace(/[\\$`]/g, "\\$&");  // of a here-document
  const json = (side) => {
    if (side.pdf) return `{"image":"$(printf '%s\\n' "$pages${pdfs.indexOf(side.pdf)}" | sed -n ${side.page}p)"}`;
    if (side.file) return `{"image":"$(base64 < ${quoted(side.file)} | tr -d '\\n')"}`;
    return inside(JSON.stringify(side.value));
  };
  const drawn = pdfs.map((name, i) => `pages${i}=$(curl -sS${key} -H 'Content-Type: application/pdf' --data-binary ` +
    `@- ${quoted(`${url}pdf`)} < ${quoted(name)} |\n` +
    `  sed 's/.*"image": *"\\([^"]*\\)".*/\\1/')\n`);
  const fields = [
    ...(model ? [`"model":${inside(JSON.stringify(model))}`] : []), `"query":${json(query)}`,
    `"documents":[\n${documents.map(json).join(",\n")}\n]`, '"return_documents":false',
  ];
  return `${drawn.join("")}curl -sS${key} -H 'Content-Type: application/json' --data-binary @- ` +
    `${quoted(`${url}v1/rerank`)} <<END_OF_REQUEST\n{${fields.join(",\n")}}\nEND_OF_REQUEST\n`;
}

/** The same in Python's standard library. */
function python({ url, model, auth, query, documents }) {
  const all = [query, ...documents];
  const text = JSON.stringify;  // a literal of Python too
  const code = (side) => {
    if (side.pdf) return `pdf(${text(side.pdf)})[${side.page - 1}]`;
    if (side.file) return `image(${text(side.file)})`;
    return text(side.value);
  };
  const key = auth ? ', "Authorization": "Bearer " + os.environ["M0KIT_API_KEY"]' : "";
  const out = [
    `${all.some((side) => side.file) ? "import base64\n" : ""}${all.some((side) => side.pdf) ? "import functools\n" : ""}` +
      `import json\n${auth ? "import os\n" : ""}${all.some((side) => side.file || side.pdf) ? "import pathlib\n" : ""}` +
      "import urllib.request\n",
    `SERVER = ${text(url)}\n\n`,
    "def post(path, body, media_type):",
    `    headers = {"Content-Type": media_type${key}}`,
    "    return urllib.request.urlopen(urllib.request.Request(SERVER + path, body, headers)).read()\n\n",
  ];
  if (all.some((side) => side.file)) {
    out.push("def image(name):", "    return {\"image\": base64.b64encode(pathlib.Path(name).read_bytes()).decode()}\n\n");
  }
  if (all.some((side) => side.pdf)) {
    out.push("@functools.cache", "def pdf(name):", "    pages = post(\"pdf\", pathlib.Path(name).read_bytes(), \"application/pdf\")",
      "    return [{\"image\": json.loads(line).get(\"image\")} for line in pages.splitlines()]\n\n");
  }
  out.push("body = {");
  if (model) out.push(`    "model": ${text(model)},`);
  out.push(`    "query": ${code(query)},`, "    \"documents\": [", ...documents.map((side) => `        ${code(side)},`), "    ],",
    "    \"return_documents\": False,", "}", "answer = json.loads(post(\"v1/rerank\", json.dumps(body).encode(), \"application/json\"))",
    "for result in answer[\"results\"]:", "    print(result[\"index\"], result[\"relevance_score\"])", "");
  return out.join("\n");
}

/** The name that a document is kept by: readable, and another one for other content. */
function keptName({ name, page }, digest) {
  const readable = [...name.replace(/[\p{C}/]/gu, "_")].slice(0, 80).join("");  // no half of a character
  return `${readable}${page ? ` page ${page}` : ""} ${digest.slice(0, 32)}`;
}

/** The readable part of it; of another id all. */
function shownName(id) {
  return id.replace(/ [0-9a-f]{32}$/, "");
}

/** The page itself. */
function page() {
  const get = (id) => document.getElementById(id);
  const server = Object.assign(new URL(".", location.href), { username: "", password: "" }).href;
  let info = {};
  let documents = [];  // {kind, name, text | blob | kept, …, score, element}
  let queryImage = null;
  let key = "";  // in memory alone
  let auth = false;
  let asked = null;  // {query, documents, model}: what the scores on the page answer
  let asking = null;  // AbortController
  const busy = new Set();  // AbortControllers of whatever Stop ends
  let shown = null;  // the item in full view
  let pasted = 0;
  let drawTimer = 0;
  let countdown = 0;
  let stopWaiting = () => {};  // for a server that starts

  // ---- Elements

  function element(tag, properties = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name in made) made[name] = value;
      else made.setAttribute(name, value);
    }
    made.append(...children);  // strings become text
    return made;
  }

  function button(text, onclick, className = "") {
    return element("button", { type: "button", textContent: text, onclick, className });
  }

  function announce(text) {
    get("live").textContent = text;
  }

  /** A sentence with what may be done about it; `parts` are elements below it. */
  function problem(message, ...parts) {
    clearProblem();
    const close = button("×", () => { clearProblem(); get("query").focus(); }, "round");
    close.setAttribute("aria-label", "Close this message");
    const buttons = parts.filter((part) => part.tagName === "BUTTON");
    get("problems").append(element("div", { className: "problem" }, element("div", {}, element("p", { textContent: message, dir: "auto" }),
      ...parts.filter((part) => part.tagName !== "BUTTON"), ...(buttons.length ? [element("div", { className: "row" }, ...buttons)] : [])), close));
    get("problems").scrollIntoView({ block: "nearest" });
  }

  function clearProblem() {
    clearInterval(countdown);
    stopWaiting();
    get("problems").replaceChildren();
    get("query").removeAttribute("aria-invalid");
  }

  // ---- The server

  class Problem extends Error {
    constructor(said, status = 0, wait = null) {
      super(said.message);
      Object.assign(this, { status, wait, fields: said.fields ?? [], code: said.code ?? "" });
    }
  }

  async function call(path, { method = "GET", body, type, accept, signal } = {}) {
    const headers = {};
    if (type) headers["Content-Type"] = type;
    if (accept) headers.Accept = accept;
    if (key) headers.Authorization = `Bearer ${key}`;
    let answer;
    try {
      answer = await fetch(new URL(path, server), { method, body, headers, signal, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem({ message: "The server cannot be reached. See whether it still runs." });
    }
    if (answer.ok) return answer;
    const said = told(await answer.json().catch(() => null), answer.status);
    throw new Problem(said, answer.status, retryAfter(answer.headers.get("Retry-After")));
  }

  /** Raises what the signal is aborted with. */
  function later(ms, signal) {
    return new Promise((done, fail) => {
      setTimeout(done, ms);
      signal.onabort = () => fail(signal.reason);
    });
  }

  /** Each line of an answer, as JSON, when it comes. */
  async function* streamed(answer) {
    let rest = "";
    const decoder = new TextDecoder();
    const reader = answer.body.getReader();
    try {
      while (true) {
        const { done, value } = await reader.read();
        rest += decoder.decode(value, { stream: !done });
        let values;
        [values, rest] = lines(done ? `${rest}\n` : rest);
        yield* values;
        if (done) return;
      }
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem({ message: "The connection to the server broke off." });
    } finally {
      reader.cancel().catch(() => {});
    }
  }

  const model = () => get("model").value || info.models?.[0]?.name || "";
  const chosen = () => ((info.models?.length ?? 0) > 1 ? model() : "");
  const withModel = (path) => (chosen() ? `${path}${path.includes("?") ? "&" : "?"}model=${encodeURIComponent(chosen())}` : path);

  /** Show what failed, with what may be done; `again` does it anew. */
  function failed(error, again) {
    if (error.name === "AbortError") return;
    if (!(error instanceof Problem)) {
      problem("Something is wrong with this page itself. Reload it; the browser's console says more.");
      throw error;
    }
    if (error.status === 401) return askKey(error.message, again);
    const retry = button("Try again", () => { clearProblem(); again(); });
    const indexes = error.fields.map(({ field }) => documentIndex(field)).filter((i) => i !== null);
    const wrong = indexes.map((i) => error.documents?.[i]).filter((item) => documents.includes(item));
    const parts = [];
    const named = (message) => {  // as the reader calls it
      const item = error.documents?.[documentIndex(message) ?? -1];
      return item ? message.replace(PLACE, () => titled(item)) : sentence(message);
    };
    const others = error.fields.map(({ message }) => message).filter((message) => message !== error.message).map(named);
    if (others.length) parts.push(element("ul", {}, ...others.map((message) => element("li", { textContent: message }))));
    if (wrong.length && wrong.length < documents.length) {
      parts.push(button(`Leave ${wrong.length === 1 ? "it" : "these"} out and ask again`, () => {
        remove(...wrong);
        clearProblem();
        again();
      }));
    } else if (!wrong.length && (error.status === 0 || error.status === 429 || error.status >= 500)) {
      parts.push(retry);
    }
    problem(named(error.message), ...parts);
    if (error.wait === null) return;
    const until = performance.now() + 1000 * error.wait;
    const tick = () => {
      const left = Math.ceil((until - performance.now()) / 1000);
      retry.textContent = left > 0 ? `Try again (in ${left} s)` : "Try again";
      if (left <= 0) {
        clearInterval(countdown);
        announce("It can be tried again now.");
      }
    };
    countdown = setInterval(tick, 1000);
    tick();
  }

  function askKey(message, again) {
    const field = element("input", { type: "password", id: "key", autocomplete: "off", spellcheck: false });
    const form = element("form", { className: "row" }, element("label", { htmlFor: "key", textContent: "API key" }), field,
      element("button", { textContent: "Use this key" }));
    form.onsubmit = async (event) => {
      event.preventDefault();
      key = field.value.trim();
      if (!key) return;
      clearProblem();
      if (!info.version && !info.limits) await start();
      else again();
    };
    problem(`${sentence(message)} A key is kept by this page until it is closed, and nowhere else.`, form);
    field.focus();
  }

  /** Run what Stop ends. */
  async function working(run) {
    const controller = new AbortController();
    busy.add(controller);
    get("stop").hidden = false;
    try {
      return await run(controller);
    } finally {
      busy.delete(controller);
      if (!busy.size) {
        if (document.activeElement === get("stop")) get("rank").focus();
        get("stop").hidden = true;
        get("progress").hidden = true;
      }
    }
  }

  function progress(done, all) {
    Object.assign(get("progress"), { max: Math.max(all, 1), value: done, hidden: false });
  }

  // ---- Documents

  async function read(file, name = file.name) {
    if (file.size > Math.max(info.limits?.max_body_bytes ?? Infinity, info.limits?.max_image_bytes ?? 0)) {
      return { why: `has ${size(file.size)}; the server takes ${size(info.limits.max_body_bytes)} in one request.` };
    }
    let bytes;
    try {
      bytes = new Uint8Array(await file.arrayBuffer());
    } catch {
      return { why: "cannot be read. Of a folder, choose the files in it." };
    }
    const found = sniff(bytes, name);
    if (found.why || found.kind !== "image") return { ...found, name };
    const type = TYPES[found.format] ?? `image/${found.format.toLowerCase()}`;
    const blob = new Blob([bytes], { type });
    const drawn = await thumbnail(blob);
    const why = imageProblem({ format: found.format, bytes: blob.size, pixels: drawn.pixels }, info);
    return why ? { why } : { kind: "image", name, format: found.format, blob, bytes: blob.size, ...drawn };
  }

  /** A small image of an image, where the browser can show it; the original is what is sent. */
  async function thumbnail(blob) {
    let bitmap;
    try {
      bitmap = await createImageBitmap(blob);
    } catch {
      return { pixels: null, thumbnail: "" };
    }
    const { width, height } = bitmap;
    const scale = Math.min(1, THUMBNAIL / Math.max(width, height));
    const canvas = element("canvas", { width: Math.max(1, width * scale), height: Math.max(1, height * scale) });
    const context = canvas.getContext("2d");
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    bitmap.close();
    const small = await new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.85));
    return { pixels: width * height, wide: width > height, thumbnail: small ? URL.createObjectURL(small) : "" };
  }

  function base64(blob) {
    return new Promise((done, fail) => {
      const reader = new FileReader();
      reader.onload = () => done(reader.result.slice(reader.result.indexOf(",") + 1));
      reader.onerror = () => fail(new Problem({ message: "A file could not be read again. Was it moved?" }));
      reader.readAsDataURL(blob);
    });
  }

  function fromBase64(text, type) {
    return new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))], { type });
  }

  /** Files as they were dropped, chosen or pasted; what is refused is said, and costs the others nothing. */
  async function addFiles(files, named = (file) => file.name) {
    const refused = [];
    let added = 0;
    clearProblem();
    await working(async ({ signal }) => {
      for (const [i, file] of [...files].entries()) {
        if (signal.aborted) break;
        if (files.length > 1) progress(i, files.length);
        const name = named(file);
        const found = await read(file, name);
        if (isLate(found, signal)) break;
        if (found.kind === "pdf") {
          const [pages, problems] = await addPdf(file, name, signal);
          added += pages;
          refused.push(...problems);
        } else if (found.why) {
          refused.push(`${name} ${found.why}`);
        } else {
          add({ ...found, file: file.pasted ? "" : file.name });
          added += 1;
        }
      }
    });
    if (added) announce(`${counted(added, "document")} added, ${documents.length} in all.`);
    if (refused.length) {
      problem(`${counted(refused.length, "file or page", "files or pages")} not added:`,
        element("ul", {}, ...refused.map((why) => element("li", { textContent: why, dir: "auto" }))));
    }
  }

  /** Whether it was stopped while something was read; that is let go then. */
  function isLate({ thumbnail: url }, signal) {
    if (signal.aborted && url) URL.revokeObjectURL(url);
    return signal.aborted;
  }

  async function addPdf(file, name, signal) {
    if (info.pdf === false) {
      return [0, [`${name} is a PDF, and this server reads none: it lacks an extra. pip install 'm0kit[pdf]' there, or give pages as PNG.`]];
    }
    const refused = [];
    let added = 0;
    const said = (one) => refused.push(one.message.startsWith("PDF") ? name + one.message.slice(3).replace(/^:/, "") : `${name}: ${one.message}`);
    try {
      const ask = { method: "POST", body: file, type: "application/pdf", accept: "application/x-ndjson", signal };
      const answer = await call("pdf", ask).catch(async (error) => {
        if (error.status !== 429 || !error.wait) throw error;
        announce(`${name} waits, since others have PDFs drawn too.`);
        await later(1000 * error.wait, signal);
        return call("pdf", ask);
      });
      for await (const line of streamed(answer)) {
        if (line.error) {
          said(told(line));
          continue;
        }
        progress(line.page, line.pages);
        const blob = fromBase64(line.image.slice(line.image.indexOf(",") + 1), "image/png");
        const drawn = await thumbnail(blob);
        if (isLate(drawn, signal)) break;
        add({
          kind: "image", name, format: "PNG", page: line.page, pages: line.pages, pdf: file.name, blob,
          bytes: blob.size, ...drawn,
        });
        added += 1;
      }
    } catch (error) {
      if (error.name === "AbortError") return [added, refused];
      if (!(error instanceof Problem) || error.status === 401) throw error;
      said(error);
    }
    return [added, refused];
  }

  function addText(text, name = `text ${++pasted}`) {
    if (!text.trim()) return;
    add({ kind: "text", name, text });
    announce(`${name} added, ${counted(documents.length, "document")} in all.`);
  }

  function add(item) {
    documents.push(item);
    makeCard(item);
    get("cards").append(item.element);
    update();
  }

  function remove(...items) {
    const others = (all) => all.filter((item) => !items.includes(item));
    documents = others(documents);
    if (asked) asked.documents = others(asked.documents);
    for (const item of items) {
      const focused = item.element.contains(document.activeElement);
      const next = item.element.nextElementSibling ?? item.element.previousElementSibling;
      waiting.unobserve(item.element);
      item.element.remove();
      if (item.thumbnail) URL.revokeObjectURL(item.thumbnail);
      if (focused) (next?.querySelector(".remove") ?? get("choose")).focus();
    }
    update();
    draw();
  }

  function removeAll() {
    stop();
    asked = null;
    remove(...documents);
    get("suggestions").hidden = true;
    clearProblem();
    update();
    announce("All documents removed.");
    get("choose").focus();
  }

  // ---- Cards

  const place = ({ page, pages }) => (page ? `page ${page} of ${pages}` : "");
  const titled = (item) => [item.name, place(item)].filter(Boolean).join(", ");

  function makeCard(item) {
    const open = element("button", { type: "button", className: "open", onclick: () => view(item) });
    open.setAttribute("aria-label", `Show ${titled(item)}`);
    const parts = {
      rank: element("span", { className: "rank" }), score: element("span", { className: "score" }),
      how: element("span", { className: "how" }), fill: element("span"), wrong: element("p", { className: "wrong-because", dir: "auto" }),
      kept: element("p", { className: "quiet small" }),
    };
    const bar = element("div", { className: "bar" }, parts.fill);
    bar.setAttribute("aria-hidden", "true");
    const off = button("×", () => remove(item), "round remove");
    off.setAttribute("aria-label", `Remove ${titled(item)}`);
    item.element = element("li", { className: "card" }, open,
      element("div", { className: "what" }, element("p", { className: "line" }, parts.rank, element("span", { className: "unseen", textContent: "Score" }), parts.score, parts.how), bar,
        element("div", { className: "foot" }, element("p", { className: "name", textContent: shorten(item.name, 120), title: item.name, dir: "auto" }), off),
        element("p", { className: "quiet small", textContent: place(item), hidden: !item.page }), parts.kept, parts.wrong));
    item.element.onclick = (event) => {
      if (!event.target.closest("button") && !String(getSelection())) view(item);
    };
    Object.assign(item, { open, parts, bar });
    face(item);
    dress(item, 0);
    if (item.kind === "kept") waiting.observe(item.element);
  }

  /** What a card shows of its document. */
  function face(item) {
    if (item.thumbnail) {
      item.open.replaceChildren(element("img", { src: item.thumbnail, alt: "", draggable: false, className: item.wide ? "wide" : "" }));
    } else {
      const text = item.text ?? (item.kind === "image" ? `${item.format}: this browser cannot show it.` : "");
      item.open.replaceChildren(element("span", { className: "excerpt", dir: "auto", textContent: shorten(text.trimStart(), EXCERPT) }));
    }
  }

  function shorten(text, most) {
    return text.length > most ? `${text.slice(0, most).replace(/[\ud800-\udbff]$/, "")}…` : text;
  }

  // Documents that are on the server are fetched when they come into sight.
  const waiting = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      const item = isIntersecting && documents.find(({ element }) => element === target);
      if (!item) continue;
      waiting.unobserve(target);
      fetchKept(item).then(() => face(item)).catch(() => {});
    }
  });

  async function fetchKept(item) {
    if (item.kind !== "kept" || item.fetched) return;
    const found = await (await call(withModel(`v1/documents/${encodeURIComponent(item.kept)}`))).json();
    item.fetched = true;
    if (typeof found.text === "string") item.text = found.text;
    if (typeof found.image === "string") {
      item.blob = fromBase64(found.image.slice(found.image.indexOf(",") + 1), /^data:([^;,]+)/.exec(found.image)?.[1] ?? "");
      Object.assign(item, await thumbnail(item.blob));
      if (!documents.includes(item)) URL.revokeObjectURL(item.thumbnail);  // it was removed meanwhile
    }
  }

  /** What stands outside of cards, by what there is. */
  function update() {
    const has = documents.length > 0;
    get("results").hidden = !has;
    get("drop").classList.toggle("brief", has);  // it has said its part
    get("asked").hidden = !asked;
    get("totals").hidden = get("hint").hidden = !asked;
    get("keep").hidden = !info.index || !documents.some((item) => !item.kept);
    const left = asked && !asking ? documents.filter((item) => !isScored(item) && !item.wrong).length : 0;
    if (left && documents.some(isScored)) get("hint").textContent = `${counted(left, "document")} not ranked yet: rank again.`;
    get("results-title").textContent = asked ? "Ranking" : counted(documents.length, "document");
  }

  function drawSoon() {
    drawTimer ||= setTimeout(draw, DRAW_MS);
  }

  const isScored = (item) => (item.score ?? null) !== null;

  /** What a card tells of its document, which is the i-th. */
  function dress(item, i) {
    const { parts } = item;
    const scored = isScored(item);
    item.element.classList.toggle("wrong", Boolean(item.wrong));
    parts.rank.textContent = scored ? `${i + 1}.` : "";
    parts.score.textContent = scored ? item.score.toFixed(3) : "";
    parts.fill.style.width = scored ? `${Math.max(0, Math.min(1, item.score)) * 100}%` : "0";
    const took = [item.ms === undefined ? "" : duration(item.ms), item.cached ? "cached" : "computed"];
    parts.how.textContent = scored ? took.filter(Boolean).join(" · ") : item.waiting ? "waiting" : "";
    item.bar.hidden = parts.rank.parentElement.hidden = !scored && !item.waiting;
    parts.kept.textContent = item.kept ? "kept on the server" : "";
    parts.kept.hidden = !item.kept;
    parts.wrong.textContent = item.wrong ?? "";
    parts.wrong.hidden = !item.wrong;
  }

  /** Cards in their order. The one that has the focus is never moved, but all others around it: else it would lose it. */
  function draw() {
    clearTimeout(drawTimer);
    drawTimer = 0;
    const list = get("cards");
    const sorted = ranked(documents);
    const most = asked ? Number(get("top").value) : 0;
    sorted.forEach((item, i) => {
      dress(item, i);
      item.element.hidden = Boolean(most) && i >= most && isScored(item);
    });
    const order = sorted.map((item) => item.element);
    if (order.every((card, i) => card === list.children[i])) return;
    const fixed = order.findIndex((card) => card.contains(document.activeElement));
    order.forEach((card, i) => {
      if (i < fixed) order[fixed].before(card);
      else if (i > fixed) list.append(card);
    });
  }

  // ---- Asking

  async function setQueryImage(file, name = file.name) {
    clearProblem();
    const found = await read(file, name);
    if (found.kind !== "image") return problem(`${name} ${found.why ?? "is no image. Ask with a page image, or write a text."}`);
    if (queryImage?.thumbnail) URL.revokeObjectURL(queryImage.thumbnail);
    queryImage = { ...found, file: file.pasted ? "" : file.name };
    get("query-image").querySelector("img").src = found.thumbnail;
    get("query-name").textContent = shorten(name, 120);
    get("query").hidden = true;
    get("query-image").hidden = false;
    get("query-off").focus();
    announce(`${name} is what is asked with.`);
  }

  function dropQueryImage() {
    if (queryImage?.thumbnail) URL.revokeObjectURL(queryImage.thumbnail);
    queryImage = null;
    get("query-image").hidden = true;
    get("query").hidden = false;
    get("query").focus();
  }

  function stop() {
    for (const controller of busy) controller.abort();
  }

  /** A side as the request has it. */
  async function sent(side) {
    if (side.kept) return JSON.stringify({ id: side.kept });
    if (side.text !== undefined) return JSON.stringify(side.text);
    return `{"image":"${await base64(side.blob)}"}`;
  }

  async function ask() {
    clearProblem();
    const query = queryImage ?? { text: get("query").value.trim() };
    if (query.text === "") {
      problem("Write what you are looking for first, or give an image to ask with.");
      get("query").setAttribute("aria-invalid", "true");
      get("query").focus();
      return;
    }
    if (!documents.length) {
      problem("There is nothing to rank yet. Give some pages or texts, or take a sample set.");
      get("choose").focus();
      return;
    }
    const why = requestProblem(query, documents, info);
    if (why) return problem(why);
    asking?.abort();  // a new question ends the one before
    asked = { query, documents: [...documents], model: chosen() };
    const { documents: all } = asked;
    for (const item of all) Object.assign(item, { score: null, cached: false, ms: undefined, wrong: "", waiting: true });
    update();
    draw();
    get("totals").textContent = `Ranking ${counted(all.length, "document")} …`;
    get("hint").textContent = "";
    announce(get("totals").textContent);
    if (get("results").getBoundingClientRect().top > 0.6 * innerHeight) {  // on a phone
      get("results").scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
    }
    await working(async (controller) => {
      asking = controller;
      get("cards").setAttribute("aria-busy", "true");
      const began = performance.now();
      let done = 0;
      let complete = false;
      try {
        const parts = [asked.model ? `{"model":${JSON.stringify(asked.model)},` : "{", '"query":', await sent(query), ',"documents":['];
        for (const [i, item] of all.entries()) parts.push(i ? "," : "", await sent(item));
        parts.push('],"return_documents":false}');
        controller.signal.throwIfAborted();
        progress(0, all.length);
        const answer = await call("v1/rerank", {
          method: "POST", body: new Blob(parts), type: "application/json", accept: "application/x-ndjson", signal: controller.signal,
        });
        for await (const line of streamed(answer)) {
          if (line.error) throw new Problem(told(line));
          for (const result of line.done ? line.results ?? [] : [line]) {
            const item = all[result.index];
            if (!item) continue;
            if (item.waiting) done += 1;
            Object.assign(item, { score: result.relevance_score, waiting: false });
            if (!line.done) Object.assign(item, { cached: Boolean(result.cached), ms: result.ms });
          }
          complete ||= Boolean(line.done);
          progress(done, all.length);
          get("totals").textContent = `${done} of ${counted(all.length, "document")} in ${duration(performance.now() - began)} …`;
          drawSoon();
        }
        if (!complete) throw new Problem({ message: `The answer broke off after ${done} of ${counted(all.length, "document")}.` });
        finished(all, performance.now() - began);
      } catch (error) {
        if (asking !== controller) return;  // the next question has the page
        get("totals").textContent = error.name === "AbortError" ? `Stopped after ${done} of ${counted(all.length, "document")}.`
          : `${done} of ${counted(all.length, "document")} ranked.`;
        announce(get("totals").textContent);
        for (const { field, message } of error.fields ?? []) {
          const item = all[documentIndex(field) ?? -1];
          if (item) Object.assign(item, { wrong: message.replace(PLACE, "").replace(/^: /, "") });
          if (/^query/.test(field)) get("query").setAttribute("aria-invalid", "true");
        }
        error.documents = all;
        failed(error, ask);
      } finally {
        if (asking === controller) {
          asking = null;
          get("cards").removeAttribute("aria-busy");
          for (const item of all) item.waiting = false;
          update();
          draw();
        }
      }
    });
  }

  function finished(all, ms) {
    asked.ms = ms;
    const [best] = ranked(all);
    get("totals").textContent = totals(all, ms, info, asked.model || info.models?.[0]?.name);
    get("hint").textContent = "Ask something else: the server remembers what it read, and computes the new question alone.";
    announce(`${get("totals").textContent}. First: ${titled(best)}, ${best.score.toFixed(3)}.`);
  }

  // ---- Documents on the server

  async function digest(bytes) {
    // Where the page came without TLS from another machine, browsers do not hash: then each time is another name.
    const raw = crypto.subtle ? await crypto.subtle.digest("SHA-256", bytes) : crypto.getRandomValues(new Uint8Array(32)).buffer;
    return [...new Uint8Array(raw)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  }

  async function keep() {
    clearProblem();
    const left = documents.filter((item) => !item.kept);
    await working(async ({ signal }) => {
      for (const [i, item] of left.entries()) {
        progress(i, left.length);
        const body = item.blob ?? new Blob([item.text], { type: "text/plain;charset=utf-8" });
        try {
          const id = keptName(item, await digest(await body.arrayBuffer()));
          await call(withModel(`v1/documents/${encodeURIComponent(id)}`), { method: "PUT", body, type: body.type, signal });
          Object.assign(item, { kept: id, wrong: "" });
        } catch (error) {
          if (error instanceof Problem && error.status === 422) {
            item.wrong = sentence(error.message.replace(/^body: /, ""));  // costs this one alone
            continue;
          }
          return failed(error, keep);
        } finally {
          drawSoon();
        }
      }
      announce(`${counted(left.filter((item) => item.kept).length, "document")} kept on the server.`);
    }).finally(update);
  }

  /** Offer what the server keeps already. */
  async function offerKept() {
    get("recall").hidden = true;
    if (!(info.models ?? []).some((one) => one.index)) return;
    const { total } = await (await call(withModel("v1/documents?limit=1"))).json();
    get("recall").hidden = !total;
    get("recall").textContent = `Take what the server keeps (${total.toLocaleString("en")})`;
  }

  async function recall() {
    const most = Math.min(RECALLED, info.limits?.max_documents ?? RECALLED) - documents.length;
    const here = new Set(documents.map((item) => item.kept));
    try {
      const { ids, total } = await (await call(withModel(`v1/documents?limit=${Math.max(most, 1)}`))).json();
      for (const id of ids) if (!here.has(id)) add({ kind: "kept", name: shownName(id), kept: id });
      announce(`${counted(documents.length, "document")} in all.`);
      if (total > ids.length) problem(`The server keeps ${total.toLocaleString("en")} documents; these are the first ${ids.length}.`);
    } catch (error) {
      failed(error, recall);
    }
  }

  function changeModel() {
    stop();
    asked = null;
    for (const item of documents) Object.assign(item, { score: null, wrong: "" });
    remove(...documents.filter(({ kind }) => kind === "kept"));  // another model's index
    for (const item of documents) delete item.kept;
    update();
    draw();
    offerKept().catch((error) => failed(error, offerKept));
  }

  // ---- Full view

  const visible = () => ranked(documents).filter((item) => !item.element.hidden);

  async function view(item) {
    shown = item;
    const order = visible();
    const i = order.indexOf(item);
    const score = (item.score ?? null) === null ? "" : `${item.score.toFixed(3)}, `;
    get("view-title").textContent = `${shorten(titled(item), 200)} (${score}${i + 1} of ${order.length})`;
    get("before").disabled = i <= 0;
    get("after").disabled = i >= order.length - 1;
    get("save").hidden = !item.blob && item.text === undefined;
    if (!get("view").open) get("view").showModal();
    if (document.activeElement === null || document.activeElement === document.body || document.activeElement.disabled) get("view-page").focus();
    if (get("view-page").shows === item) return;
    release();
    get("view-page").shows = item;
    get("view-page").scrollTop = 0;
    get("view-page").classList.remove("large");
    if (item.kind === "kept" && !item.fetched) {
      get("view-page").replaceChildren(element("p", { className: "quiet", textContent: "Loading …" }));
      try {
        await fetchKept(item);
        face(item);
      } catch (error) {
        if (shown === item) get("view-page").replaceChildren(element("p", { textContent: error.message }));
        return;
      }
      if (shown !== item) return;
      get("save").hidden = false;
    }
    if (item.blob && item.thumbnail) {
      const url = URL.createObjectURL(item.blob);
      get("view-page").replaceChildren(element("img", { src: url, alt: titled(item), draggable: false }));
    } else {
      const text = item.text ?? `This browser cannot show ${item.format ?? "this image"}. The server reads it.`;
      const rest = text.length > SHOWN ? [element("p", { className: "quiet", textContent: "Save it to see the rest." })] : [];
      get("view-page").replaceChildren(element("div", { className: "text", dir: "auto", textContent: shorten(text, SHOWN) }), ...rest);
    }
    get("zoom").hidden = !(item.blob && item.thumbnail);
  }

  function release() {
    const image = get("view-page").querySelector("img");
    if (image) URL.revokeObjectURL(image.src);
    get("view-page").shows = null;
    get("view-page").replaceChildren();
  }

  function step(by) {
    const order = visible();
    const next = order[order.indexOf(shown) + by];
    if (next) view(next);
  }

  function closed() {
    release();
    shown?.open.isConnected && shown.open.focus();  // where the reader was, not where it was opened
    shown = null;
  }

  // ---- Taking things away

  function download(name, content, type) {
    const url = URL.createObjectURL(new Blob([content], { type }));
    element("a", { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  }

  function saveShown() {
    const { name, page: number, blob, text, kind } = shown;
    const stem = number || kind === "kept" ? `${name.replace(/\.pdf$/i, "")}${number ? ` page ${number}` : ""}.${blob ? "png" : "txt"}` : name;
    download(stem, blob ?? text, blob?.type ?? "text/plain;charset=utf-8");
  }

  async function copyCode(write) {
    const { query, documents: all, model: name } = asked;
    const inline = (side) => (side.blob && !side.kept && !side.file && !side.pdf ? base64(side.blob) : "");
    const sides = [];
    for (const side of [query, ...all]) sides.push(source(side, await inline(side)));
    const code = write({ url: server, model: name, auth: auth || Boolean(key), query: sides[0], documents: sides.slice(1) });
    try {
      await navigator.clipboard.writeText(code);
      announce("Copied.");
      get("hint").textContent = sides.some((side) => side.file || side.pdf) ? "Copied. Run it in the folder that has the files." : "Copied.";
    } catch {
      get("code-text").value = code;
      get("code").showModal();
      get("code-text").select();
    }
  }

  function downloadJson() {
    const query = asked.query.text ?? asked.query.name;
    const about = { query, model: asked.model || info.models?.[0]?.name, ms: asked.ms, results: rows(asked.documents) };
    download("ranking.json", `${JSON.stringify(about, null, 1)}\n`, "application/json");
  }

  // ---- Samples

  async function offerSamples() {
    const sets = await (await call("sample.json")).json();
    get("samples").replaceChildren(element("span", { className: "quiet", textContent: "Try a sample:" }), ...sets.map((set) => {
      const made = button(set.name, () => takeSample(set));
      made.setAttribute("aria-label", `Try the sample ${set.name}`);
      return made;
    }));
  }

  async function takeSample({ queries, documents: given }) {
    clearProblem();
    await working(async ({ signal }) => {
      for (const one of given) {
        const found = one.text === undefined ? await read(fromBase64(one.image, "image/png"), one.name)
          : { kind: "text", name: one.name, text: one.text };
        if (isLate(found, signal)) return;
        if (!documents.some((item) => item.sample === one)) add({ ...found, sample: one });  // not twice by two clicks
        else if (found.thumbnail) URL.revokeObjectURL(found.thumbnail);
      }
    });
    if (!documents.some((item) => given.includes(item.sample))) return;  // removed meanwhile
    get("suggestions").replaceChildren(element("span", { className: "quiet", textContent: "Try:" }), ...queries.map((text) => {
      const made = button(text, () => { if (queryImage) dropQueryImage(); get("query").value = text; ask(); });
      made.dir = "auto";
      return made;
    }));
    get("suggestions").hidden = false;
    announce(`${counted(documents.length, "document")} in all. There are questions to try.`);
    get("suggestions").querySelector("button").focus();
  }

  // ---- Events

  function files(transfer) {
    const found = [...transfer?.files ?? []];
    return found.length ? found : null;
  }

  /** Files from the clipboard have names that mean nothing. */
  function pastedFiles(found) {
    for (const file of found) if (/^image\.\w+$/.test(file.name)) file.pasted = true;
    return found;
  }

  const pastedName = (file) => (file.pasted ? `pasted ${++pasted}` : file.name);

  function listen() {
    get("ask").onsubmit = (event) => { event.preventDefault(); ask(); };
    get("query").onkeydown = (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(); }
    };
    get("stop").onclick = stop;
    get("query-choose").onclick = () => get("query-file").click();
    get("query-file").onchange = (event) => {
      const [file] = event.target.files;
      if (file) setQueryImage(file);
      event.target.value = "";
    };
    get("query-off").onclick = dropQueryImage;
    get("choose").onclick = () => get("files").click();
    get("files").onchange = async (event) => {
      const found = [...event.target.files];
      event.target.value = "";
      await addOrFail(found);
    };
    get("write").onclick = () => {
      const open = get("writer").hidden;
      get("writer").hidden = !open;
      get("write").setAttribute("aria-expanded", String(open));
      if (open) get("text").focus();
    };
    get("text-add").onclick = () => { addText(get("text").value); get("text").value = ""; get("text").focus(); };
    get("model").onchange = changeModel;
    get("top").onchange = draw;
    get("curl").onclick = () => copyCode(curl);
    get("python").onclick = () => copyCode(python);
    get("json").onclick = downloadJson;
    get("csv").onclick = () => download("ranking.csv", `\ufeff${csv(rows(asked.documents))}`, "text/csv;charset=utf-8");
    get("keep").onclick = keep;
    get("recall").onclick = recall;
    get("clear").onclick = removeAll;
    get("before").onclick = () => step(-1);
    get("after").onclick = () => step(1);
    get("save").onclick = saveShown;
    get("zoom").onclick = () => get("view-page").classList.toggle("large");
    get("close").onclick = () => get("view").close();
    get("view").onclose = closed;
    get("view").onkeydown = (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (by && !event.altKey && !event.ctrlKey && !event.metaKey) { event.preventDefault(); step(by); }
    };
    get("code-close").onclick = () => get("code").close();
    const zone = (event) => (event.target.closest?.("#question") ? get("question") : get("drop"));
    const unmark = () => document.querySelectorAll(".over").forEach((over) => over.classList.remove("over"));
    const textual = (event) => !event.dataTransfer.types.includes("Files") && event.target.matches?.("textarea, input");
    addEventListener("dragover", (event) => {
      if (textual(event)) return;
      event.preventDefault();  // else the browser leaves the page for the file
      unmark();
      zone(event).classList.add("over");
    });
    addEventListener("dragleave", (event) => { if (!event.relatedTarget) unmark(); });
    addEventListener("drop", (event) => {
      unmark();
      if (textual(event)) return;
      event.preventDefault();
      const found = files(event.dataTransfer);
      if (!found) addText(event.dataTransfer.getData("text/plain"));
      else if (zone(event) === get("question")) setQueryImage(found[0]);
      else addOrFail(found);
    });
    addEventListener("paste", (event) => {
      if (get("view").open || get("code").open) return;
      const found = files(event.clipboardData);
      if (found) {
        event.preventDefault();
        pastedFiles(found);
        if (event.target.closest?.("#question")) setQueryImage(found[0], pastedName(found[0]));
        else addOrFail(found, pastedName);
      } else if (!event.target.matches?.("textarea, input")) {
        event.preventDefault();
        addText(event.clipboardData.getData("text/plain"));
      }
    });
  }

  async function addOrFail(found, named) {
    try {
      await addFiles(found, named);
    } catch (error) {
      failed(error, () => addOrFail(found, named));
    }
  }

  async function start() {
    try {
      info = await (await call("info")).json();
      auth = Boolean(info.keys);
      const { limits = {}, formats = [], models = [] } = info;
      get("drop-what").textContent = `Drop page images, ${info.pdf ? "PDFs " : ""}or text files anywhere, or paste them with Ctrl-V.`;
      get("limits").textContent = `Images: ${formats.join(", ")}${info.pdf ? ". PDFs: each page is a document" : ""}. ` +
        `At most ${counted(limits.max_documents, "document")} and ${size(limits.max_body_bytes)} in one request, ` +
        `${size(limits.max_image_bytes)} for an image.`;
      get("model").replaceChildren(...models.map(({ name }) => element("option", { value: name, textContent: name })));
      get("models").hidden = models.length < 2;
      get("model-about").textContent = models.length === 1 ? [models[0].name, models[0].precision, models[0].device].filter(Boolean).join(" · ") : "";
      update();
      await offerSamples();
      await offerKept();
    } catch (error) {
      failed(error, start);
      if (error.status !== 503 || error.wait === null) return;
      const again = setTimeout(() => { clearProblem(); start(); }, 1000 * error.wait);  // it opens its models
      stopWaiting = () => clearTimeout(again);
    }
  }

  listen();
  start();
}

if (typeof module !== "undefined") {
  module.exports = {
    cell, counted, csv, curl, documentIndex, duration, imageProblem, keptName, lines, python, ranked, requestProblem, retryAfter,
    rows, shownName, size, sniff, source, told, totals,
  };
} else {
  page();
}
