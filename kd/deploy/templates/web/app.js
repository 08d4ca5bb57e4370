"use strict";
// What the page does: files are tagged one after the other, or the microphone is heard until it is stopped.

const SHOWN = 5, KEPT_COLUMNS = 3600;
const byId = (id) => document.getElementById(id);
const timeline = new Timeline(byId("view"), byId("spacer"), byId("canvas"));
const results = []; // of each file
let tagger = null, recorder = null, shown = null, queue = Promise.resolve(), job = 0;

function say(text, isError = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("error", isError);
}

const pause = () => new Promise((resolve) => { setTimeout(resolve, 0); }); // lets the page react between two windows

function add(parent, tag, className, text) {
  const element = document.createElement(tag);
  element.className = className;
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

function showTags(scores) {
  const list = byId("tags");
  list.replaceChildren();
  for (const index of highest(scores, SHOWN)) {
    const present = scores[index] >= card.thresholds[index];
    const item = add(list, "li", present ? "present" : "");
    add(item, "span", "name", card.class_names[index]);
    add(item, "span", "score", scores[index].toFixed(3));
    add(item, "span", "bar", "").style.width = `${100 * scores[index]}%`;
  }
}

function showColumns(columns, totalSeconds) {
  const { window_seconds: window, hop_seconds: hop } = card.timeline;
  timeline.clear(hop, (window - hop) / 2, totalSeconds); // a window's scores count for the hop in its middle
  columns.forEach((scores) => timeline.add(scores));
}

function select(result) {
  shown = result;
  byId("result").hidden = false;
  byId("heard").textContent = result.name;
  byId("note").textContent = `${result.seconds.toFixed(2)} s. ${result.note}`.trim();
  byId("player").hidden = false;
  if (byId("player").src !== result.audio) byId("player").src = result.audio;
  showTags(result.scores);
  showColumns(result.columns, result.seconds);
  if (result.complete) timeline.finish();
  for (const row of byId("files").children) row.classList.toggle("selected", row.result === result);
}

function list(result) {
  const row = add(byId("files"), "button", "file");
  row.type = "button";
  row.result = result;
  add(row, "span", "name", result.name);
  const best = highest(result.scores, 3).map((index) => `${card.class_names[index]} ${result.scores[index].toFixed(2)}`);
  add(row, "span", "best", best.join(" · "));
  row.addEventListener("click", () => stopRecorder().then(() => select(result)));
  byId("save").hidden = false;
}

async function tagFile(file, mine) {
  const current = () => mine === job;
  say(`Decoding ${file.name} …`);
  const bytes = new Uint8Array(await file.arrayBuffer());
  const { waveform: decoded, rateHz, exact } = await decodeFile(bytes, card.sample_rate_hz);
  const resampler = new Resampler(rateHz, card.sample_rate_hz);
  const waveform = resampler.range(decoded, 0, 0, resampler.length(decoded.length));
  const progress = async (share) => {
    say(`Tagging ${file.name} … ${Math.round(100 * share)} %`);
    await pause();
    return current();
  };
  const scores = await tagger.clipScores(waveform, progress);
  if (scores === null) return;
  const result = {
    name: file.name, seconds: waveform.length / card.sample_rate_hz, scores, columns: [], complete: false,
    note: exact ? "" : "The browser resampled this file, so scores may differ a little from those of kd tag.",
    audio: URL.createObjectURL(file),
  };
  results.push(result);
  list(result);
  select(result);
  await followInTime(waveform, result, current);
}

/** Fills the time line of a file: windows as a stream has them. */
async function followInTime(waveform, result, current) {
  const size = Math.round(card.timeline.window_seconds * card.sample_rate_hz);
  const hop = Math.round(card.timeline.hop_seconds * card.sample_rate_hz);
  const count = Math.max(1, Math.ceil((waveform.length - size) / hop) + 1);
  for (let number = 0; number < count && current(); number++) {
    const part = cutWindow(waveform, number * hop, size, card.short_clips);
    const scores = scoresOf(await tagger.logits(part));
    result.columns.push(scores);
    if (shown === result) timeline.add(scores);
    if (number % 8 === 0) {
      say(`Time line of ${result.name} … ${Math.round(100 * (number + 1) / count)} %`);
      await pause();
    }
  }
  result.complete = true;
  if (shown === result) timeline.finish();
}

async function tagFiles(files) {
  await stopRecorder();
  const mine = ++job, failed = [];
  queue = queue.then(async () => {
    for (const file of files) {
      if (mine !== job) return;
      try {
        await tagFile(file, mine);
      } catch (error) {
        failed.push(`${file.name} cannot be tagged: ${error.message || error.name}`);
      }
    }
    if (mine === job) say(failed.length ? failed.join("; ") : "Done.", failed.length > 0);
  });
  await queue;
}

async function startRecorder() {
  job += 1; // ends what is being tagged
  await queue;
  say("Waiting for the microphone …");
  const { window_seconds: window, hop_seconds: hop } = card.timeline;
  const started = performance.now();
  let computing = 0;
  recorder = await Recorder.start(async (waveform, passed) => {
    const begun = performance.now();
    const scores = scoresOf(await tagger.logits(waveform));
    computing += performance.now() - begun;
    showTags(scores);
    for (let number = 0; number < passed; number++) timeline.add(scores, KEPT_COLUMNS, true);
    const share = Math.round(100 * computing / (performance.now() - started));
    const lost = recorder?.skipped ? `; too slow for ${recorder.skipped} windows, which show the scores of the next` : "";
    say(`Listening; computing takes ${share} % of the time${lost}`);
    await pause();
  });
  shown = null;
  byId("result").hidden = false;
  byId("heard").textContent = "Microphone";
  byId("note").textContent = `windows of ${window} s, every ${hop} s`;
  byId("player").hidden = true;
  byId("player").pause();
  byId("microphone").textContent = "Stop";
  showColumns([]);
  for (const row of byId("files").children) row.classList.remove("selected");
}

async function stopRecorder() {
  if (recorder === null) return;
  const stopped = recorder;
  recorder = null;
  await stopped.stop();
  byId("microphone").textContent = "Microphone";
  say("Stopped.");
}

function save() {
  const lines = results.map(({ name, seconds, scores }) => {
    const named = highest(scores, scores.length).map((index) => [card.class_names[index], Number(scores[index].toFixed(6))]);
    return JSON.stringify({ file: name, duration_seconds: seconds, scores: Object.fromEntries(named) });
  });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: "application/jsonl" }));
  link.download = "tags.jsonl";
  link.click();
}

function connect() {
  const drop = byId("drop");
  byId("choose").addEventListener("change", (event) => {
    tagFiles([...event.target.files]);
    event.target.value = "";
  });
  for (const kind of ["dragover", "dragenter"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
  }
  document.addEventListener("dragleave", () => drop.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    if (event.dataTransfer.files.length) tagFiles([...event.dataTransfer.files]);
  });
  byId("microphone").addEventListener("click", () => {
    const action = recorder === null ? startRecorder() : stopRecorder();
    action.catch((error) => say(`The microphone cannot be used: ${error.message || error.name}`, true));
  });
  byId("save").addEventListener("click", save);
  timeline.onSeek = (seconds) => { byId("player").currentTime = seconds; };
  byId("player").addEventListener("timeupdate", () => { timeline.playheadSeconds = byId("player").currentTime; });
  document.querySelectorAll("[disabled]").forEach((element) => { element.disabled = false; });
}

Tagger.load().then((loaded) => {
  tagger = loaded;
  connect();
  say("Ready.");
}).catch((error) => say(`The model cannot be loaded: ${error.message}`, true));
