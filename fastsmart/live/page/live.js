"use strict";
// The page: it draws the state that the server sends, and says what its listener does.

const $ = (id) => document.getElementById(id);
const SIDES = ["left", "right"];
const BOLD = ["timid", "careful", "middling", "bold", "daring"];
let state = null;
let asked = null; // when an answer was asked for, until its first note has come
let busy = false; // while an order is on its way
let stream = null; // an answer that is heard while it is being played: {id, at}
let rest = null; // where Space has stopped: {id, at}
const coming = new Map(); // notes of clips that are still being played, by id
const cards = {};

function trouble(text) {
  $("trouble").textContent = text;
  $("trouble").hidden = !text;
}

// Send an order; what the server refuses is said in its own words.
async function post(address, content = {}) {
  const raw = content instanceof ArrayBuffer;
  try {
    const answer = await fetch(address, {
      method: "POST",
      body: raw ? content : JSON.stringify(content),
      headers: { "content-type": raw ? "audio/midi" : "application/json" },
    });
    const found = await answer.json();
    trouble(answer.ok ? "" : sentence(found.error));
    if (answer.ok && found.listener) show(found);
    return answer.ok;
  } catch {
    trouble("The program does not answer; is it still running?");
    return false;
  }
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
const counted = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
const begins = () => (state.answering && state.phrase ? state.phrase.seconds : 0);
const notesOf = (clip) => (clip.whole ? clip.notes : [...(state.phrase?.notes ?? []), ...(coming.get(clip.id) ?? [])]);

function show(next) {
  const before = state;
  state = next;
  showPair(before?.pair?.map((clip) => clip.id).join() ?? "");
  showLearnt(next.learnt);
  showSettings(next);
  showPhrase(next);
  const count = counted(next.choices, "choice");
  $("count").textContent = next.choices ? `${count} so far` : "No choices yet";
  $("undo").disabled = next.choices === 0;
  $("skip").disabled = !next.pair;
  $("damaged").hidden = !next.damaged.length;
  $("damaged").textContent = next.damaged.length ? `Of the choices on disk, ${next.damaged.join("; ")}. It counts for nothing.` : "";
  if (next.trouble) trouble(sentence(next.trouble));
  else if (before?.trouble) trouble("");
}

function showPair(before) {
  const { pair } = state;
  $("pair").hidden = !pair;
  $("waiting").hidden = Boolean(pair);
  if (!pair) {
    $("waiting").textContent = state.choices ? "One moment: it is playing something new." : "One moment: it is playing its first pieces.";
    sound.stop();
  }
  const fresh = (pair?.map((clip) => clip.id).join() ?? "") !== before;
  const whole = Boolean(pair?.every((clip) => clip.whole));
  if (fresh) {
    sound.stop();
    stream = null;
  }
  const span = (pair ?? []).flatMap((clip) => notesOf(clip).map((note) => note[2]));
  SIDES.forEach((side, i) => {
    const clip = pair?.[i];
    const card = cards[side];
    card.clip = clip ?? null;
    if (!clip) return;
    const notes = notesOf(clip);
    const name = i ? "Right" : "Left";
    card.roll.show(notes, state.answering ? (state.phrase?.notes.length ?? 0) : 0, span);
    if (fresh) card.roll.draw(0);
    card.about.textContent = clip.whole ? `${clip.about}, ${clip.policy}` : "is being played";
    card.canvas.setAttribute("aria-label", `Piano roll, ${name.toLowerCase()}: ${clip.about || "is being played"}`);
    card.save.href = `clips/${clip.id}.mid`;
    card.save.setAttribute("aria-label", `Save the ${name.toLowerCase()} piece as MIDI`);
    card.save.hidden = !clip.whole;
  });
  for (const button of $("choices").children) {
    button.disabled = false;
    button.setAttribute("aria-disabled", String(!whole));
  }
  if (fresh && whole) {
    if (sound.context) pair.forEach((clip) => sound.clip(clip.id).catch(() => {}));
    if (before && $("auto").checked) playBoth();
  }
  drawButtons();
}

function showLearnt({ features, guessed, right, followed }) {
  const missing = state.training.missing;
  if (guessed) $("guesses").textContent = `Of your last ${counted(guessed, "choice")} between left and right it had guessed ${right} before you said so. ${following(followed)}`;
  else $("guesses").textContent = state.choices ? "It has not dared a guess yet." : "Nothing yet: it learns from your choices.";
  $("features").replaceChildren(...features.map(featureRow));
  const doing = { training: "It is practising now.", paused: "Learning is paused.", off: "It listens, but does not practise." }[state.training.doing];
  const waits = missing ? `It begins to practise after ${counted(missing, "more choice")}.` : "It waits for more of your choices.";
  $("training").textContent = state.training.error ? sentence(state.training.error) : (doing ?? waits);
}

function following(share) {
  const percent = Math.round(100 * share);
  if (percent < 3) return "So far that may be chance, and practice does not follow it.";
  return percent < 95 ? `Some of that may be chance: practice follows it ${percent} % of the way.` : "Practice follows it all the way.";
}

function featureRow({ low, high, liked, effect, sure }) {
  const row = document.createElement("li");
  const words = document.createElement("div");
  words.className = "words";
  for (const end of [low, high]) {
    const word = document.createElement("span");
    word.className = end === liked ? "liked" : "other";
    word.textContent = end;
    if (end === liked) {
      const how = document.createElement("span");
      how.className = "sure";
      how.textContent = ` ${sure}`;
      word.append(how);
    }
    words.append(word);
  }
  const drawing = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  drawing.setAttribute("viewBox", "-1 0 2 1");
  drawing.setAttribute("preserveAspectRatio", "none");
  drawing.setAttribute("aria-hidden", "true");
  const size = Math.min(Math.abs(effect), 1);
  for (const [kind, x, width, y, height] of [["axis", -1, 2, 0.42, 0.16], ["bar", effect < 0 ? -size : 0, size, 0.1, 0.8], ["axis", -0.005, 0.01, 0, 1]]) {
    const box = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    for (const [key, value] of Object.entries({ class: kind, x, y, width, height })) box.setAttribute(key, value);
    drawing.append(box);
  }
  row.append(words, drawing);
  return row;
}

function showSettings({ boldness, paused, policies, listener, training }) {
  if (document.activeElement !== $("boldness")) $("boldness").value = boldness;
  $("boldness-word").textContent = BOLD[Math.min(Math.floor(Number($("boldness").value) / 2.2), 4)];
  $("pause").textContent = paused ? "Go on learning" : "Pause learning";
  $("pause").disabled = training.doing === "off";
  if (document.activeElement !== $("listener")) $("listener").value = listener;
  const list = $("policies");
  const known = policies.map((policy) => `${policy.version}${policy.now}`).join();
  if (list.dataset.known === known) return;
  list.dataset.known = known;
  list.replaceChildren(
    ...policies.toReversed().map(({ version, name, now }) => new Option(now ? `${name} (now)` : name, version, now, now)),
  );
  $("back").disabled = true;
}

function showPhrase({ phrase, answering }) {
  const on = Boolean(phrase && answering);
  $("again").hidden = $("drop-phrase").hidden = !on;
  $("phrase-say").textContent = on
    ? `Both go on from ${phrase.name}. Say which you like, as above.`
    : "Give it a phrase, and it goes on from there in several ways. Say which you like, as above.";
}

// Playing -------------------------------------------------------------------------------------------------------

const isPlaying = (side) => Boolean(cards[side].clip) && (sound.playing?.id ?? stream?.id) === cards[side].clip.id;

function drawButtons() {
  for (const side of SIDES) {
    const on = isPlaying(side);
    cards[side].box.classList.toggle("now", on);
    cards[side].sign.textContent = on ? "■" : "▶";
    cards[side].word.textContent = `${on ? "Stop" : "Play"} ${side}`;
  }
}

function follow() {
  for (const side of SIDES) {
    if (!isPlaying(side)) continue;
    const now = sound.playing ? sound.position : sound.context.currentTime - stream.at;
    const over = stream && !sound.playing && now > cards[side].roll.seconds + 1;
    if (over) stream = null;
    cards[side].roll.draw(over ? 0 : now);
  }
  drawButtons();
  if (sound.playing || stream) requestAnimationFrame(follow);
}

function play(side, offset = begins(), then = () => {}) {
  const { clip, roll } = cards[side];
  if (!clip) return;
  sound.open();
  rest = null;
  const other = cards[side === "left" ? "right" : "left"];
  sound.stop();
  stream = null;
  other.roll.draw(0);
  roll.draw(offset);
  if (!clip.whole) playComing(clip.id);
  else
    sound.play(clip.id, offset, () => {
      roll.draw(0);
      drawButtons();
      then();
    }).catch((error) => trouble(sentence(error.message)));
  requestAnimationFrame(follow);
}

const playBoth = () => play("left", begins(), () => play("right"));

function stopPlaying() {
  sound.stop();
  stream = null;
  drawButtons();
}

const heardNow = () => SIDES.find((side) => isPlaying(side));

// Stop, or go on where it was stopped.
function stopOrGoOn() {
  const side = heardNow();
  if (side) {
    const at = sound.playing ? sound.position : begins();
    stopPlaying();
    rest = { id: cards[side].clip.id, at };
    return;
  }
  const rested = SIDES.find((name) => cards[name].clip && cards[name].clip.id === rest?.id);
  play(rested ?? "left", rested ? rest.at : begins());
}

// Go some seconds on, or back, in what is played or was stopped.
function move(seconds) {
  const side = heardNow() ?? SIDES.find((name) => cards[name].clip && cards[name].clip.id === rest?.id);
  if (!side || !cards[side].clip.whole) return;
  const at = (sound.playing ? sound.position : (rest?.at ?? begins())) + seconds;
  const to = Math.min(Math.max(at, 0), cards[side].roll.seconds);
  if (isPlaying(side)) play(side, to);
  else {
    rest = { id: cards[side].clip.id, at: to };
    cards[side].roll.draw(to);
  }
}

function toggle(side) {
  if (isPlaying(side)) stopPlaying();
  else play(side);
}

// Hear a clip while it is being played: its notes so far, and each that comes.
function playComing(id) {
  const notes = coming.get(id) ?? [];
  const from = notes.length ? Math.min(...notes.map((note) => note[0])) : begins();
  stream = { id, at: sound.open().currentTime + HEARD_AHEAD_S - from };
  notes.forEach(strikeComing);
}

const strikeComing = ([onset, duration, pitch, velocity]) =>
  sound.strike(pitch, velocity, stream.at + onset, duration).catch(() => {});

function hear({ id, notes }) {
  if (asked !== null) {
    const waited = performance.now() - asked;
    asked = null;
    $("first-note").textContent = `Its first note came after ${(waited / 1000).toFixed(2)} s.`;
    $("first-note").dataset.ms = Math.round(waited);
  }
  if (!coming.has(id) && coming.size > 15) coming.delete(coming.keys().next().value);
  coming.set(id, [...(coming.get(id) ?? []), ...notes]);
  const side = SIDES.find((name) => cards[name].clip?.id === id);
  if (!side || cards[side].clip.whole) return;
  cards[side].roll.show(notesOf(cards[side].clip), state.phrase?.notes.length ?? 0);
  if (stream?.id === id) notes.forEach(strikeComing);
  else if (side === "left" && !stream && !sound.playing) {
    playComing(id);
    requestAnimationFrame(follow);
  }
}

// What a listener does ------------------------------------------------------------------------------------------

async function choose(choice) {
  const pair = state?.pair;
  if (busy || !pair) return;
  if (!pair.every((clip) => clip.whole)) {
    trouble("One of the two is still being played.");
    return;
  }
  busy = true;
  stopPlaying();
  await post("choose", { left: pair[0].id, right: pair[1].id, choice });
  busy = false;
}

async function once(address, content) {
  if (busy) return;
  busy = true;
  stopPlaying();
  await post(address, content);
  busy = false;
}

const KEYS = {
  1: () => toggle("left"),
  2: () => toggle("right"),
  ArrowLeft: () => choose("left"),
  ArrowRight: () => choose("right"),
  ArrowUp: () => choose("equal"),
  ArrowDown: () => choose("both_bad"),
  u: () => state?.choices && once("undo"),
  s: () => state?.pair && once("skip"),
  ",": () => move(-2),
  ".": () => move(2),
  " ": stopOrGoOn,
};

function onKey(event) {
  const { target, key } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (target.matches("input:not([type=checkbox]), select, textarea")) return;
  if (key === " " && target.matches("button, input, a, summary, label")) return;
  const act = KEYS[key.length === 1 ? key.toLowerCase() : key];
  if (!act) return;
  event.preventDefault();
  act();
}

function listen() {
  const source = new EventSource("events");
  source.addEventListener("state", (event) => show(JSON.parse(event.data)));
  source.addEventListener("notes", (event) => hear(JSON.parse(event.data)));
  let lost = false;
  source.onerror = () => {
    lost = true;
    trouble("The program does not answer; is it still running? This page goes on when it is.");
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, 2000);
  };
  source.onopen = () => {
    if (lost) trouble("");
    lost = false;
  };
}

SIDES.forEach((side, i) => {
  const box = $(side);
  const [canvas, button] = [box.querySelector("canvas"), box.querySelector(".play")];
  cards[side] = {
    box,
    canvas,
    clip: null,
    roll: new Roll(canvas, i + 1),
    about: box.querySelector(".about"),
    save: box.querySelector(".save"),
    sign: box.querySelector(".sign"),
    word: box.querySelector(".word"),
  };
  button.addEventListener("click", () => toggle(side));
  canvas.addEventListener("click", (click) => play(side, (click.offsetX / canvas.clientWidth) * cards[side].roll.seconds));
});
for (const button of $("choices").children) button.addEventListener("click", () => choose(button.dataset.choice));
$("undo").addEventListener("click", () => once("undo"));
$("skip").addEventListener("click", () => once("skip"));
$("boldness").addEventListener("input", () => state && showSettings(state));
$("boldness").addEventListener("change", () => post("settings", { boldness: Number($("boldness").value) }));
$("pause").addEventListener("click", () => post("settings", { paused: !state.paused }));
$("policies").addEventListener("change", () => {
  const chosen = state.policies.find((policy) => policy.version === Number($("policies").value));
  $("back").disabled = !chosen || chosen.now;
});
$("back").addEventListener("click", () => once("back", { version: Number($("policies").value) }));
$("listener").addEventListener("change", () => post("settings", { listener: $("listener").value }));
$("reset").addEventListener("click", () => {
  if (confirm("Begin again with the piano as it came? Your choices so far are put aside, not lost.")) once("reset");
});
document.addEventListener("keydown", onKey);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => SIDES.forEach((side) => cards[side].roll.draw()));
takePhrases();
listen();
