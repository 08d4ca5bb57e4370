"use strict";
// Scores over time: one row for each of the classes that are heard most in the part that is shown. It scrolls sideways.

const ROWS = 8, ROW_HEIGHT = 30, AXIS_HEIGHT = 22, NARROWEST = 40, WIDEST = 200;

class Timeline {
  constructor(view, spacer, canvas) {
    Object.assign(this, { view, spacer, canvas, rows: [], onSeek: null });
    view.addEventListener("scroll", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(view);
    canvas.addEventListener("click", (event) => this.onSeek?.((view.scrollLeft + event.offsetX) / this.pixels));
    this.clear(0.5, 0);
  }

  /** Columns of columnSeconds each follow firstSeconds, which belong to the first. A short clip of totalSeconds fills the view. */
  clear(columnSeconds, firstSeconds, totalSeconds = Infinity) {
    Object.assign(this, { columnSeconds, firstSeconds, totalSeconds, columns: [], dropped: 0, rows: [] });
    Object.assign(this, { playhead: null, finished: false });
    this.view.scrollLeft = 0;
    this.draw();
  }

  /** The scores of the next column; memory is kept for the last `keep` columns. */
  add(scores, keep = Infinity, follow = false) {
    this.columns.push(Uint8Array.from(scores, (score) => Math.round(255 * score)));
    if (this.columns.length > keep) {
      this.columns.shift();
      this.dropped += 1;
    }
    this.draw();
    if (follow) this.view.scrollLeft = this.spacer.offsetWidth;
  }

  set playheadSeconds(seconds) {
    this.playhead = seconds;
    const x = seconds * this.pixels - this.view.scrollLeft;
    if (x < 0 || x > this.view.clientWidth) this.view.scrollLeft += x - 0.2 * this.view.clientWidth;
    this.draw();
  }

  get pixels() { // per second
    return Math.min(WIDEST, Math.max(NARROWEST, this.view.clientWidth / this.totalSeconds));
  }

  startOf(column) { return column + this.dropped === 0 ? 0 : this.endOf(column - 1); }

  endOf(column) {
    if (this.finished && column === this.columns.length - 1) return this.totalSeconds;
    return this.firstSeconds + (column + this.dropped + 1) * this.columnSeconds;
  }

  /** No column follows; the last one goes on to the end. */
  finish() {
    this.finished = true;
    this.draw();
  }

  draw() {
    const end = Number.isFinite(this.totalSeconds) ? this.totalSeconds : this.endOf(this.columns.length - 1);
    this.spacer.style.width = `${Math.floor(end * this.pixels)}px`;
    const width = this.view.clientWidth, height = ROWS * ROW_HEIGHT + AXIS_HEIGHT, scale = window.devicePixelRatio || 1;
    this.canvas.style.width = `${width}px`;
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(height * scale);
    const context = this.canvas.getContext("2d");
    context.scale(scale, scale);
    const style = getComputedStyle(this.view), left = this.view.scrollLeft;
    const colours = { accent: style.getPropertyValue("--accent"), text: style.color, line: style.getPropertyValue("--line") };
    const shown = this.columns.map((_, column) => column).filter((column) => {
      return this.startOf(column) * this.pixels < left + width && this.endOf(column) * this.pixels > left;
    });
    this.chooseRows(shown);
    this.drawRows(context, shown, left, colours);
    this.drawAxis(context, width, left, colours);
  }

  /** The classes with the highest peaks; a class that stays keeps its row. */
  chooseRows(shown) {
    const peaks = new Float64Array(card.class_names.length);
    for (const column of shown) {
      this.columns[column].forEach((value, index) => { if (value > peaks[index]) peaks[index] = value; });
    }
    const chosen = shown.length ? highest(peaks, ROWS) : [];
    const fresh = chosen.filter((index) => !this.rows.includes(index));
    this.rows = this.rows.map((index) => chosen.includes(index) ? index : fresh.shift()).concat(fresh);
    this.rows = this.rows.filter((index) => index !== undefined).slice(0, ROWS);
  }

  drawRows(context, shown, left, colours) {
    context.font = "12px system-ui, sans-serif";
    this.rows.forEach((index, row) => {
      const y = row * ROW_HEIGHT;
      context.fillStyle = colours.accent;
      for (const column of shown) {
        const start = this.startOf(column), end = this.endOf(column);
        const score = this.columns[column][index] / 255, bar = Math.round(score * (ROW_HEIGHT - 4));
        context.globalAlpha = score >= card.thresholds[index] ? 1 : 0.45;
        context.fillRect(start * this.pixels - left, y + ROW_HEIGHT - 2 - bar, (end - start) * this.pixels - 1, bar);
      }
      context.globalAlpha = 1;
      context.fillStyle = colours.line;
      context.fillRect(0, y + ROW_HEIGHT - 1, this.view.clientWidth, 1);
      context.fillStyle = colours.text;
      context.fillText(card.class_names[index], 6, y + 14, this.view.clientWidth - 12);
    });
  }

  drawAxis(context, width, left, colours) {
    const y = ROWS * ROW_HEIGHT + 14, step = this.pixels < 80 ? 2 : 1;
    context.fillStyle = colours.text;
    for (let second = Math.floor(left / this.pixels / step) * step; second * this.pixels < left + width; second += step) {
      const minutes = Math.floor(second / 60), rest = String(second % 60).padStart(2, "0");
      context.fillText(`${minutes}:${rest}`, second * this.pixels - left + 2, y);
    }
    if (this.playhead === null) return;
    context.fillRect(this.playhead * this.pixels - left, 0, 2, ROWS * ROW_HEIGHT);
  }
}
