"use strict";
// The microphone, as windows at the model's rate that follow each other at every hop.

const WORKLET = `registerProcessor("samples", class extends AudioWorkletProcessor {
  process(inputs) {
    const channels = inputs[0];
    if (channels.length) {
      const mono = channels[0].slice();
      for (const other of channels.slice(1)) for (let at = 0; at < mono.length; at++) mono[at] += other[at];
      this.port.postMessage(channels.length > 1 ? mono.map((value) => value / channels.length) : mono);
    }
    return true;
  }
});`;

class Recorder {
  static async start(onWindow) {
    if (!navigator.mediaDevices?.getUserMedia) {
      throw new Error("this browser gives the microphone to pages from disk and to https only");
    }
    const stream = await navigator.mediaDevices.getUserMedia({
      audio: { echoCancellation: false, noiseSuppression: false, autoGainControl: false },
    });
    const context = new AudioContext();
    try {
      // A data address: on a page from disk, a worklet cannot be loaded from a blob.
      await context.audioWorklet.addModule(`data:text/javascript;base64,${btoa(WORKLET)}`);
      await context.resume();
      return new Recorder(stream, context, onWindow);
    } catch (error) {
      stream.getTracks().forEach((track) => track.stop());
      throw error;
    }
  }

  constructor(stream, context, onWindow) {
    Object.assign(this, { stream, context, onWindow, pieces: [], kept: 0, keptStart: 0, window: 0, busy: false });
    this.skipped = 0; // windows that there was no time for
    this.resampler = new Resampler(context.sampleRate, card.sample_rate_hz);
    this.size = Math.round(card.timeline.window_seconds * card.sample_rate_hz);
    this.hop = Math.round(card.timeline.hop_seconds * card.sample_rate_hz);
    const node = new AudioWorkletNode(context, "samples", { numberOfOutputs: 0 });
    node.port.onmessage = (event) => this.feed(event.data);
    context.createMediaStreamSource(stream).connect(node);
  }

  feed(samples) {
    this.pieces.push(samples);
    this.kept += samples.length;
    if (!this.busy) this.work();
  }

  /** Whether window number `number` has all its samples, with those that the filter reaches. */
  complete(number) {
    const last = (number * this.hop + this.size) * this.resampler.old / this.resampler.new + this.resampler.width + 1;
    return this.keptStart + this.kept >= last;
  }

  async work() {
    this.busy = true;
    while (this.context.state !== "closed" && this.complete(this.window)) {
      let newest = this.window;
      while (this.complete(newest + 1)) newest += 1;
      this.skipped += newest - this.window;
      const input = this.forget(newest);
      const waveform = this.resampler.range(input, this.keptStart, newest * this.hop, this.size);
      const passed = newest - this.window + 1;
      this.window = newest + 1;
      await this.onWindow(waveform, passed);
    }
    this.busy = false;
  }

  /** Drops what lies before a window; returns the rest as one array. */
  forget(number) {
    const joined = new Float32Array(this.kept);
    let at = 0;
    for (const piece of this.pieces) {
      joined.set(piece, at);
      at += piece.length;
    }
    const start = Math.floor(number * this.hop * this.resampler.old / this.resampler.new) - this.resampler.width - 1;
    const rest = joined.subarray(Math.max(0, start - this.keptStart));
    this.keptStart += joined.length - rest.length;
    this.pieces = [rest];
    this.kept = rest.length;
    return rest;
  }

  async stop() {
    this.stream.getTracks().forEach((track) => track.stop());
    if (this.context.state !== "closed") await this.context.close();
  }
}
