"use strict";
// A phrase of the listener's own: a MIDI file, chosen or dropped, or what is played on a MIDI keyboard.

const PHRASE_ENDS_MS = 1500; // after the last key has been let go
const LARGEST_FILE = 8 * 2 ** 20;

class Recorder {
  constructor(ended) {
    this.ended = ended;
    this.clear();
  }

  clear() {
    clearTimeout(this.timer);
    this.notes = [];
    this.down = new Map(); // pitch -> {at, velocity, release}
  }

  message({ data, timeStamp }) {
    const [status, pitch, velocity] = data;
    const kind = status & 0xf0;
    if (kind === 0x90 && velocity > 0) this.press(pitch, velocity, timeStamp);
    else if (kind === 0x80 || kind === 0x90) this.lift(pitch, timeStamp);
  }

  press(pitch, velocity, at) {
    this.lift(pitch, at);
    clearTimeout(this.timer);
    const release = $("echo").checked ? sound.strike(pitch, velocity).catch(() => () => {}) : null;
    this.down.set(pitch, { at, velocity, release });
  }

  lift(pitch, at) {
    const key = this.down.get(pitch);
    if (!key) return;
    this.down.delete(pitch);
    key.release?.then((release) => release());
    this.notes.push([key.at / 1000, Math.max(at - key.at, 20) / 1000, pitch, key.velocity]);
    if (!this.down.size) this.timer = setTimeout(() => this.end(), PHRASE_ENDS_MS);
  }

  end() {
    const first = Math.min(...this.notes.map((note) => note[0]));
    const notes = this.notes.map(([onset, ...rest]) => [Math.max(onset - first, 0), ...rest]);
    this.clear();
    if (notes.length) this.ended(notes);
  }
}

async function sendFile(file) {
  if (!file) return;
  if (file.size > LARGEST_FILE) {
    trouble(`${file.name} is larger than 8 MiB, which no piece needs; choose a MIDI file`);
    return;
  }
  const address = `phrase?name=${encodeURIComponent(file.name)}&bars=${encodeURIComponent($("bars").value || 0)}`;
  await askForAnswer(address, await file.arrayBuffer());
}

// Ask for an answer and take the time until its first note.
async function askForAnswer(address, content) {
  sound.open();
  sound.stop();
  sound.warm();
  asked = performance.now();
  $("first-note").textContent = "";
  if (!(await post(address, content))) asked = null;
}

function takePhrases() {
  $("file").addEventListener("change", async (event) => {
    await sendFile(event.target.files[0]);
    event.target.value = "";
  });
  for (const kind of ["dragover", "dragleave", "drop"])
    document.addEventListener(kind, (event) => {
      if (![...(event.dataTransfer?.types ?? [])].includes("Files")) return;
      event.preventDefault();
      $("drop").classList.toggle("over", kind === "dragover");
      if (kind === "drop") sendFile(event.dataTransfer.files[0]);
    });
  $("again").addEventListener("click", () => askForAnswer("answer"));
  $("drop-phrase").addEventListener("click", () => {
    sound.stop();
    post("drop");
  });
  takeKeyboard();
}

function takeKeyboard() {
  const button = $("midi");
  const say = (text) => ($("midi-say").textContent = text);
  if (!navigator.requestMIDIAccess) {
    button.disabled = true;
    say("This browser does not listen to MIDI keyboards; Chrome, Edge and Firefox do.");
    return;
  }
  let access = null;
  const recorder = new Recorder((notes) => {
    say("It answers. Play again whenever you like.");
    askForAnswer("played", { notes, tempo: Number($("tempo").value) || 100 });
  });
  const listen = () => {
    const names = [...access.inputs.values()].map((input) => input.name);
    for (const input of access.inputs.values()) input.onmidimessage = (message) => recorder.message(message);
    say(names.length ? `Listening to ${names.join(", ")}: play a phrase, then wait a moment.` : "No MIDI keyboard is connected.");
  };
  button.addEventListener("click", async () => {
    sound.open();
    sound.warm();
    if (access) {
      for (const input of access.inputs.values()) input.onmidimessage = null;
      access = null;
      recorder.clear();
      button.classList.remove("recording");
      button.textContent = "Play it on a MIDI keyboard";
      say("");
      return;
    }
    try {
      access = await navigator.requestMIDIAccess();
    } catch {
      say("The browser did not let this page hear the keyboard.");
      return;
    }
    access.onstatechange = listen;
    button.classList.add("recording");
    button.textContent = "Stop listening to the keyboard";
    listen();
  });
}
