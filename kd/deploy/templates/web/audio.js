"use strict";
// Audio as Python hears it: files decoded at their own rate, channels averaged, resampled by torchaudio's windowed sinc.

const FILTER_ZEROS = 6, FILTER_ROLLOFF = 0.99;

function roundHalfEven(value) { // as Python rounds
  const below = Math.floor(value);
  if (value - below !== 0.5) return Math.round(value);
  return below % 2 === 0 ? below : below + 1;
}

function greatestCommonDivisor(a, b) { return b === 0 ? a : greatestCommonDivisor(b, a % b); }

function sinc(x) { return x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x); }

/** Hann-windowed sinc interpolation. Output sample k lies at k * old / new input samples. */
class Resampler {
  constructor(fromHz, toHz) {
    const divisor = greatestCommonDivisor(fromHz, toHz);
    this.old = fromHz / divisor;
    this.new = toHz / divisor;
    const lower = Math.min(this.old, this.new) * FILTER_ROLLOFF, cutoff = lower / this.old;
    this.width = Math.ceil(FILTER_ZEROS * this.old / lower); // input samples that the filter reaches on either side
    this.taps = 2 * this.width + 2;
    if (this.old === this.new) return;
    this.table = new Float64Array(this.new * this.taps); // one row for each position between two input samples
    for (let phase = 0; phase < this.new; phase++) {
      for (let tap = 0; tap < this.taps; tap++) {
        const distance = (tap - this.width - phase / this.new) * cutoff;
        if (Math.abs(distance) >= FILTER_ZEROS) continue;
        const window = Math.cos(distance * Math.PI / FILTER_ZEROS / 2) ** 2;
        this.table[phase * this.taps + tap] = sinc(distance) * window * cutoff;
      }
    }
  }

  /** How many output samples so many input samples give. */
  length(samples) { return Math.ceil(samples * this.new / this.old); }

  /** Output samples first to first + count - 1. input[0] is sample inputStart of the signal; outside of it is silence. */
  range(input, inputStart, first, count) {
    const output = new Float32Array(count);
    for (let number = 0; number < count; number++) {
      const moment = (first + number) * this.old;
      const whole = Math.floor(moment / this.new);
      if (this.old === this.new) {
        output[number] = input[whole - inputStart] || 0;
        continue;
      }
      const row = (moment - whole * this.new) * this.taps, start = whole - this.width - inputStart;
      const begin = Math.max(0, -start), end = Math.min(this.taps, input.length - start);
      let sum = 0;
      for (let tap = begin; tap < end; tap++) sum += this.table[row + tap] * input[start + tap];
      output[number] = sum;
    }
    return output;
  }
}

/** The sample rate that a file's header states; null for a format that is not known. decodeAudioData must be told, or resamples. */
function statedRate(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const text = (at, length) => String.fromCharCode(...bytes.subarray(at, at + length));
  try {
    const start = text(0, 3) === "ID3" ? 10 + syncsafe(bytes, 6) : 0;
    if (/^(RIFF|RF64)$/.test(text(0, 4)) && text(8, 4) === "WAVE") return rateOfWave(view, text);
    if (text(start, 4) === "fLaC") return rateOfFlac(bytes, start + 8);
    if (text(0, 4) === "OggS") return rateOfOgg(view, bytes, text);
    if (text(4, 4) === "ftyp") return rateOfMp4(view, bytes);
    if (view.getUint32(0) === 0x1a45dfa3) return rateOfMatroska(view, bytes);
    return rateOfFrames(view, start);
  } catch (error) {
    if (error instanceof RangeError) return null; // the header ends before the rate
    throw error;
  }
}

function syncsafe(bytes, at) {
  return (bytes[at] << 21) | (bytes[at + 1] << 14) | (bytes[at + 2] << 7) | bytes[at + 3];
}

function rateOfWave(view, text) {
  for (let at = 12; at + 8 <= view.byteLength;) {
    const size = view.getUint32(at + 4, true);
    if (text(at, 4) === "fmt ") return view.getUint32(at + 12, true);
    at += 8 + size + size % 2;
  }
  return null;
}

function rateOfFlac(bytes, at) { // at: the stream information
  return (bytes[at + 10] << 12) | (bytes[at + 11] << 4) | (bytes[at + 12] >> 4);
}

function rateOfOgg(view, bytes, text) {
  const at = 27 + bytes[26]; // behind the page's table of segments
  if (text(at, 7) === "\x01vorbis") return view.getUint32(at + 12, true);
  if (text(at, 8) === "OpusHead") return 48000;
  return text(at, 5) === "\x7fFLAC" ? rateOfFlac(bytes, at + 17) : null;
}

function rateOfMp4(view, bytes) { // the first audio sample entry
  const kinds = [0x6d703461, 0x4f707573, 0x664c6143, 0x616c6163]; // mp4a, Opus, fLaC, alac
  for (let at = 4; at + 32 <= bytes.length; at++) {
    if (!kinds.includes(view.getUint32(at)) || view.getUint32(at + 4) !== 0) continue;
    const rate = view.getUint32(at + 28) >>> 16;
    if (rate > 0) return rate;
  }
  return null;
}

function rateOfMatroska(view, bytes) { // element SamplingFrequency
  for (let at = 0; at + 10 <= Math.min(bytes.length, 65536); at++) {
    if (bytes[at] !== 0xb5) continue;
    const rate = bytes[at + 1] === 0x88 ? view.getFloat64(at + 2) : bytes[at + 1] === 0x84 ? view.getFloat32(at + 2) : 0;
    if (rate >= 3000 && rate <= 768000 && Number.isInteger(rate)) return rate;
  }
  return null;
}

function rateOfFrames(view, start) { // MPEG audio, or AAC in ADTS
  const end = Math.min(view.byteLength - 4, start + 65536);
  for (let at = start; at < end; at++) {
    const header = view.getUint32(at);
    if (header >>> 21 !== 0x7ff) continue;
    const version = (header >>> 19) & 3, layer = (header >>> 17) & 3, index = (header >>> 10) & 3;
    if (layer === 0 && version & 2) {
      const rates = [96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350];
      const rate = rates[(header >>> 10) & 15];
      if (rate) return rate;
    } else if (layer !== 0 && version !== 1 && index !== 3 && ((header >>> 12) & 15) !== 15) {
      return [44100, 48000, 32000][index] / { 3: 1, 2: 2, 0: 4 }[version];
    }
  }
  return null;
}

/** A file's bytes as {waveform, rateHz, exact}; exact is false where the browser had to resample. */
async function decodeFile(bytes, rateHz) {
  const stated = statedRate(bytes);
  let context = null, exact = stated !== null;
  try {
    context = new OfflineAudioContext(1, 1, stated ?? rateHz);
  } catch { // a rate that this browser does not take
    context = new OfflineAudioContext(1, 1, rateHz);
    exact = false;
  }
  const buffer = await context.decodeAudioData(bytes.slice().buffer);
  if (buffer.length === 0) throw new Error("it holds no samples");
  return { waveform: toMono(buffer), rateHz: buffer.sampleRate, exact };
}

function toMono(buffer) {
  const mono = buffer.getChannelData(0).slice();
  if (buffer.numberOfChannels === 1) return mono;
  for (let number = 1; number < buffer.numberOfChannels; number++) {
    const channel = buffer.getChannelData(number);
    for (let at = 0; at < mono.length; at++) mono[at] += channel[at];
  }
  const share = Math.fround(1 / buffer.numberOfChannels);
  return mono.map((value) => value * share);
}

/** First samples of the windows that cover a clip, spread evenly from its start to its end, as in evaluation. */
function windowStarts(samples, card) {
  const duration = samples / card.sample_rate_hz, seconds = card.window_seconds;
  const count = Math.max(1, Math.ceil(duration / seconds - 0.05));
  const step = count === 1 ? 0 : (duration - seconds) / (count - 1);
  return Array.from({ length: count }, (_, number) => roundHalfEven(number * step * card.sample_rate_hz));
}

/** A window of size samples from start; what the clip lacks is silence, or the clip again. */
function cutWindow(waveform, start, size, shortClips) {
  const part = waveform.subarray(start, start + size);
  if (part.length === size) return part;
  const filled = new Float32Array(size);
  filled.set(part);
  if (shortClips === "repeat" && part.length > 0) {
    for (let at = part.length; at < size; at++) filled[at] = part[at % part.length];
  }
  return filled;
}
