"use strict";
// A piano roll that follows the sound. Notes are [onset s, duration s, pitch, velocity].

class Roll {
  constructor(canvas, series) {
    this.canvas = canvas;
    this.series = series;
    this.notes = [];
    this.phrase = 0; // so many of the notes are the listener's own
    this.now = 0;
    this.seconds = 10;
    this.low = 48;
    this.high = 84;
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  // span : lowest and highest pitch, of both clips of a pair
  show(notes, phrase = 0, span = notes.map((note) => note[2])) {
    this.notes = notes;
    this.phrase = phrase;
    this.seconds = notes.reduce((end, [onset, duration]) => Math.max(end, onset + duration), 1);
    this.low = Math.min(48, ...span) - 1;
    this.high = Math.max(84, ...span) + 1;
    this.draw();
  }

  draw(now = this.now) {
    this.now = now;
    const { canvas } = this;
    const style = getComputedStyle(document.documentElement);
    const scale = window.devicePixelRatio || 1;
    const width = (canvas.width = Math.round(canvas.clientWidth * scale));
    const height = (canvas.height = Math.round(canvas.clientHeight * scale));
    if (!width || !height) return;
    const pen = canvas.getContext("2d");
    const row = height / (this.high - this.low + 1);
    const across = width / this.seconds;
    pen.fillStyle = style.getPropertyValue("--rule");
    for (let pitch = this.low; pitch <= this.high; pitch++) // a line below every C
      if (pitch % 12 === 0) pen.fillRect(0, (this.high - pitch + 1) * row, width, scale);
    this.notes.forEach(([onset, duration, pitch, velocity], i) => {
      const sounding = now > onset && now < onset + duration;
      const colour = i < this.phrase ? "--soft" : `--series-${this.series}`;
      pen.fillStyle = style.getPropertyValue(sounding ? "--ink" : colour);
      pen.globalAlpha = sounding ? 1 : 0.4 + (0.6 * velocity) / 127;
      pen.fillRect(onset * across, (this.high - pitch) * row, Math.max(duration * across - scale, 2 * scale), Math.max(row, 2 * scale));
    });
    pen.globalAlpha = 1;
    pen.fillStyle = style.getPropertyValue("--ink");
    if (now > 0) pen.fillRect(Math.min(now * across, width - 2 * scale), 0, 2 * scale, height);
  }
}
