"use strict";
// The model in onnxruntime-web. Its files are inside this page, or beside it on a server.

const card = JSON.parse(document.getElementById("card").textContent);

/** A file that belongs to the page, as bytes. */
async function asset(name) {
  const element = document.getElementById(name);
  if (element === null) {
    const response = await fetch(name);
    if (!response.ok) throw new Error(`${name} cannot be loaded (${response.status}); the folder is incomplete`);
    return new Uint8Array(await response.arrayBuffer());
  }
  const packed = atob(element.textContent.trim());
  element.remove();
  const bytes = new Uint8Array(packed.length);
  for (let at = 0; at < packed.length; at++) bytes[at] = packed.charCodeAt(at);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

class Tagger {
  static async load() {
    const [model, binary, loader] = await Promise.all(["model.onnx", "runtime.wasm", "runtime.mjs"].map(asset));
    ort.env.wasm.numThreads = 1; // threads need headers that a file from disk cannot have
    ort.env.wasm.wasmBinary = binary.buffer;
    ort.env.wasm.wasmPaths = { mjs: URL.createObjectURL(new Blob([loader], { type: "text/javascript" })) };
    return new Tagger(await ort.InferenceSession.create(model, { executionProviders: ["wasm"] }));
  }

  constructor(session) { this.session = session; }

  /** A waveform at the model's rate -> logits, one for each class. */
  async logits(waveform) {
    const input = new ort.Tensor("float32", waveform, [1, waveform.length]);
    const { logits } = await this.session.run({ waveform: input }, ["logits"]);
    if (!logits.data.every(Number.isFinite)) throw new Error("the model gave numbers that are not finite");
    return logits.data;
  }

  /** The scores of a whole clip at the model's rate, as in evaluation: of the mean logits of its windows. */
  async clipScores(waveform, progress) {
    const starts = windowStarts(waveform.length, card), size = Math.round(card.window_seconds * card.sample_rate_hz);
    const mean = new Float64Array(card.class_names.length);
    for (const [number, start] of starts.entries()) {
      const logits = await this.logits(cutWindow(waveform, start, size, card.short_clips));
      for (let index = 0; index < mean.length; index++) mean[index] += logits[index] / starts.length;
      if (!await progress((number + 1) / starts.length)) return null;
    }
    return scoresOf(mean);
  }
}

/** Softmax within a group of exclusive classes, sigmoid in others. */
function scoresOf(logits) {
  const scores = new Float64Array(logits.length);
  let start = 0;
  for (const group of card.label_groups) {
    const end = start + group.class_names.length, part = Array.from(logits.slice(start, end));
    const largest = Math.max(...part), total = part.reduce((sum, value) => sum + Math.exp(value - largest), 0);
    part.forEach((value, index) => {
      scores[start + index] = group.exclusive ? Math.exp(value - largest) / total : 0.5 * (1 + Math.tanh(0.5 * value));
    });
    start = end;
  }
  return scores;
}

/** Indices of the highest scores, highest first. */
function highest(scores, count) {
  return Array.from(scores.keys()).sort((a, b) => scores[b] - scores[a] || a - b).slice(0, count);
}
