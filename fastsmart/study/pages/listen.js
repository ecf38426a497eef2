"use strict";
// A listening test that keeps its place. Nothing here or in the data says where a clip comes from.
const test = JSON.parse(document.getElementById("notes").textContent);
const store = `fastsmart-listening-${test.study}`;
const $ = (id) => document.getElementById(id);
const HEARD = 0.8; // share of a clip that must have been played before it can be judged

function random(below) {
  return crypto.getRandomValues(new Uint32Array(1))[0] % below;
}

function shuffle(items) {
  const mixed = [...items];
  for (let i = mixed.length - 1; i > 0; i--) {
    const j = random(i + 1);
    [mixed[i], mixed[j]] = [mixed[j], mixed[i]];
  }
  return mixed;
}

function load() {
  try {
    return JSON.parse(localStorage.getItem(store));
  } catch {
    return null; // no storage, or not ours: start anew
  }
}

function save() {
  try {
    localStorage.setItem(store, JSON.stringify(state));
  } catch {
    $("hint").textContent = "This browser keeps nothing: please finish without closing the page.";
  }
}

let state = load();
const show = (id) => ["welcome", "trial", "end"].forEach((other) => ($(other).hidden = other !== id));

// Block by block, so that whoever stops early has heard all policies on most of the prompts heard.
function ordered(trials) {
  const blocks = shuffle([...new Set(trials.map((trial) => trial.block))]);
  return blocks.flatMap((block) => shuffle(trials.filter((trial) => trial.block === block)));
}

function begin() {
  const trials = ordered(test.trials).map((trial) => ({ id: trial.id, clips: shuffle(trial.clips) }));
  state = {
    study: test.study,
    design: test.design,
    listener: $("listener").value.trim() || `listener-${random(1e9)}`,
    session: [...crypto.getRandomValues(new Uint8Array(8))].map((b) => b.toString(16).padStart(2, "0")).join(""),
    began: new Date().toISOString(),
    order: trials,
    answers: [],
  };
  save();
  ask();
}

// What is asked of a trial: the name of each answer, the question, and what may be answered.
function questions(clips, names, check) {
  const pair = clips.map((clip, i) => [clip, test.design === "sets" && !check ? `Set ${names[i]}` : names[i]]);
  if (check && clips.length > 1) return [["answer", "Attention check: which of the two has more tones?", pair]];
  const scale = test.scale.map((text, i) => [i + 1, check ? `${i + 1}` : text]);
  if (check) return [["answer", "Attention check: how many tones do you hear? Choose that number.", scale]];
  if (test.design === "rating") return [["answer", test.question, scale]];
  if (test.design === "styles") return [["answer", test.question, test.styles.map((style) => [style, style])]];
  if (test.design === "ab") return [["answer", test.question, [...pair, ["none", "No preference"]]]];
  const keep = clips.map((clip, i) => [clip, `${test.keep_question} ${names[i]}?`, [["yes", "Yes"], ["no", "No"]]]);
  return [["varied", test.question, [...pair, ["none", "No difference"]]], ...keep];
}

function answered(asked, clips, check) {
  const values = Object.fromEntries(
    asked.map(([name]) => [name, document.querySelector(`#choices input[name="${name}"]:checked`).value]),
  );
  if (test.design === "sets" && !check)
    return { varied: values.varied, keep: Object.fromEntries(clips.map((clip) => [clip, values[clip] === "yes"])) };
  if (clips.length > 1 || (test.design === "styles" && !check)) return values.answer;
  return Number(values.answer);
}

function ask() {
  const done = state.answers.length;
  if (done >= state.order.length) return finish();
  const { id, clips } = state.order[done];
  const check = test.trials.find((trial) => trial.id === id).check;
  const names = clips.length > 1 ? ["A", "B"] : ["Clip"];
  const heard = clips.map(() => 0);
  const plays = clips.map(() => 0);
  const began = performance.now();
  show("trial");
  $("place").textContent = `${done + 1} of ${state.order.length}`;
  $("progress").max = state.order.length;
  $("progress").value = done;
  const needed_s = HEARD * (check ? test.check_seconds : test.seconds);
  const asked = questions(clips, names, check);
  $("hint").textContent = clips.length > 1 ? "Listen to both to answer." : "Listen to answer.";
  $("next").disabled = true;

  const audios = clips.map((clip, i) => {
    const audio = document.createElement("audio");
    audio.controls = true;
    audio.src = test.clips[clip];
    audio.setAttribute("aria-label", names[i]);
    let last = 0;
    audio.addEventListener("play", () => {
      plays[i] += 1;
      for (const other of audios) if (other !== audio) other.pause();
    });
    audio.addEventListener("timeupdate", () => {
      const step = audio.currentTime - last;
      if (step > 0 && step < 1) heard[i] += step; // a jump is not listening
      last = audio.currentTime;
      if (heard.every((seconds) => seconds >= needed_s))
        document.querySelectorAll("#choices input").forEach((input) => (input.disabled = false));
    });
    return audio;
  });
  $("players").replaceChildren(
    ...audios.flatMap((audio, i) => {
      const title = document.createElement("h3");
      title.textContent = test.design === "sets" && !check ? `Set ${names[i]}` : names[i];
      return clips.length > 1 ? [title, audio] : [audio];
    }),
  );

  const open = () => asked.some(([name]) => !document.querySelector(`#choices input[name="${name}"]:checked`));
  $("choices").replaceChildren(
    ...asked.map(([name, question, options]) => {
      const field = document.createElement("fieldset");
      const legend = document.createElement("legend");
      legend.textContent = question;
      const labels = options.map(([value, text]) => {
        const label = document.createElement("label");
        const input = document.createElement("input");
        label.className = "choice";
        Object.assign(input, { type: "radio", name, value, disabled: true });
        input.addEventListener("change", () => ($("next").disabled = open()));
        label.append(input, ` ${text}`);
        return label;
      });
      field.append(legend, ...labels);
      return field;
    }),
  );

  $("next").onclick = () => {
    const value = answered(asked, clips, check);
    audios.forEach((audio) => audio.pause());
    state.answers.push({
      trial: id,
      clips,
      answer: value,
      plays,
      heard_s: heard.map((seconds) => Math.round(seconds * 10) / 10),
      seconds: Math.round((performance.now() - began) / 100) / 10,
      at: new Date().toISOString(),
    });
    save();
    ask();
    $("players").querySelector("audio")?.focus();
  };
}

function finish() {
  const { order, ...result } = state;
  result.trials = order.length;
  const text = JSON.stringify(result, null, 1);
  show("end");
  $("answers").value = text;
  $("download").onclick = () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = `answers-${result.listener.replace(/[^\w-]+/g, "_")}-${result.session.slice(0, 6)}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };
  $("again").onclick = () => {
    if (!confirm("Clear these answers? Download them first.")) return;
    localStorage.removeItem(store);
    location.reload();
  };
}

const pairs = !["rating", "styles"].includes(test.design);
const what = { rating: "clips", styles: "clips", ab: "pairs of clips", sets: "pairs of sets" }[test.design];
$("count").textContent = `${test.trials.length} ${what} of ${test.seconds} seconds`;
const total_s = test.trials.reduce(
  (sum, trial) => sum + (trial.check ? test.check_seconds : test.seconds) * (pairs ? 2 : 1) + 5, 0);
const minutes = Math.ceil(total_s / 60);
$("minutes").textContent = minutes === 1 ? "a minute" : `${minutes} minutes`;
$("start").onclick = begin;
if (state && state.study === test.study) ask();
else show("welcome");
