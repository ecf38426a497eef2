"use strict";
// What is heard: whole clips as the server renders them, and single notes of a small piano for what is still being played.

const HEARD_AHEAD_S = 0.06; // between a note's coming and its sound, so that its neighbours are in time
const RELEASE_S = 0.25;
const PIANO_LEVEL = 0.35; // single notes beside clips of -23 LUFS

class Sound {
  constructor() {
    this.context = null;
    this.clips = new Map(); // promises of AudioBuffers by id
    this.keys = new Map(); // promises of AudioBuffers by pitch
    this.playing = null; // {id, source, began, offset, duration, ended}
    this.struck = new Set();
  }

  // Browsers let a page sound after the first key or click.
  open() {
    this.context ??= new AudioContext();
    if (this.context.state === "suspended") this.context.resume().catch(() => {});
    return this.context;
  }

  async fetched(address) {
    const answer = await fetch(address);
    if (!answer.ok) throw new Error((await answer.json()).error);
    return this.open().decodeAudioData(await answer.arrayBuffer());
  }

  clip(id) {
    if (!this.clips.has(id)) {
      const coming = this.fetched(`clips/${id}.flac`);
      coming.catch(() => this.clips.delete(id));
      this.clips.set(id, coming);
      if (this.clips.size > 12) this.clips.delete(this.clips.keys().next().value);
    }
    return this.clips.get(id);
  }

  async play(id, offset, ended) {
    this.stop();
    const mine = (this.playing = { id, offset, began: null, ended });
    let buffer;
    try {
      buffer = await this.clip(id);
    } catch (error) {
      if (this.playing === mine) this.playing = null;
      throw error;
    }
    if (this.playing !== mine) return;
    const context = this.open();
    const source = context.createBufferSource();
    source.buffer = buffer;
    source.connect(context.destination);
    if (offset >= buffer.duration - 0.05) mine.offset = 0;
    Object.assign(mine, { source, duration: buffer.duration, began: context.currentTime });
    source.onended = () => {
      if (this.playing === mine) {
        this.playing = null;
        ended();
      }
    };
    source.start(0, mine.offset);
  }

  // Seconds into the clip that plays.
  get position() {
    const { playing } = this;
    if (!playing || playing.began === null) return playing ? playing.offset : 0;
    return Math.min(playing.offset + this.context.currentTime - playing.began, playing.duration);
  }

  stop() {
    const before = this.playing;
    this.playing = null;
    before?.source?.stop();
    for (const source of this.struck) source.stop();
    this.struck.clear();
  }

  key(pitch) {
    const nearest = Math.min(105, Math.max(21, 21 + 4 * Math.round((pitch - 21) / 4)));
    if (!this.keys.has(nearest)) {
      const coming = this.fetched(`piano/${nearest}.flac`);
      coming.catch(() => this.keys.delete(nearest));
      this.keys.set(nearest, coming);
    }
    return this.keys.get(nearest).then((buffer) => ({ buffer, rate: 2 ** ((pitch - nearest) / 12) }));
  }

  // Have the piano at hand, so that the first note need not wait for it.
  warm() {
    for (let pitch = 33; pitch <= 93; pitch += 4) this.key(pitch).catch(() => {});
  }

  // Strike a key at a time of the context, for so long; where no time is given now, until what it gives is called.
  async strike(pitch, velocity, at = 0, duration = 30) {
    const { buffer, rate } = await this.key(pitch);
    const context = this.open();
    const source = context.createBufferSource();
    const gain = context.createGain();
    const start = Math.max(at, context.currentTime);
    source.buffer = buffer;
    source.playbackRate.value = rate;
    gain.gain.setValueAtTime(PIANO_LEVEL * (velocity / 127) ** 1.5, start);
    gain.gain.setTargetAtTime(0, start + duration, RELEASE_S / 3);
    source.connect(gain).connect(context.destination);
    source.start(start);
    source.stop(start + duration + RELEASE_S);
    this.struck.add(source);
    source.onended = () => this.struck.delete(source);
    return () => {
      gain.gain.cancelScheduledValues(0);
      gain.gain.setTargetAtTime(0, context.currentTime, RELEASE_S / 3);
      source.stop(context.currentTime + RELEASE_S);
    };
  }
}

const sound = new Sound();
