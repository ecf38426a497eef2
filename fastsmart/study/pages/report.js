"use strict";
// Piano rolls that follow their audio. Notes are [onset s, duration s, pitch, velocity].
const notes = JSON.parse(document.getElementById("notes").textContent);
const players = [...document.querySelectorAll(".player")].map((box) => ({
  audio: box.querySelector("audio"),
  canvas: box.querySelector("canvas"),
  notes: notes.clips[box.dataset.notes],
  colour: `--series-${box.dataset.series}`,
}));

function length(player) {
  const last = player.notes.reduce((end, [onset, duration]) => Math.max(end, onset + duration), 1);
  return Math.max(last, Number.isFinite(player.audio.duration) ? player.audio.duration : 0);
}

function draw(player) {
  const { canvas, audio } = player;
  const style = getComputedStyle(document.documentElement);
  const scale = window.devicePixelRatio || 1;
  const width = (canvas.width = Math.round(canvas.clientWidth * scale));
  const height = (canvas.height = Math.round(canvas.clientHeight * scale));
  const pen = canvas.getContext("2d");
  const seconds = length(player);
  const row = height / (notes.high - notes.low + 1);
  const now = audio.currentTime;
  pen.fillStyle = style.getPropertyValue("--rule");
  for (let pitch = notes.low; pitch <= notes.high; pitch++) // a line at every C
    if (pitch % 12 === 0) pen.fillRect(0, (notes.high - pitch + 1) * row, width, scale);
  for (const [onset, duration, pitch, velocity] of player.notes) {
    const sounding = now > onset && now < onset + duration && now > 0;
    pen.fillStyle = style.getPropertyValue(sounding ? "--ink" : player.colour);
    pen.globalAlpha = sounding ? 1 : 0.35 + (0.65 * velocity) / 127;
    const left = (onset / seconds) * width;
    pen.fillRect(left, (notes.high - pitch) * row, Math.max((duration / seconds) * width - scale, 2 * scale), Math.max(row, 2 * scale));
  }
  pen.globalAlpha = 1;
  pen.fillStyle = style.getPropertyValue("--ink");
  pen.fillRect((now / seconds) * width, 0, 2 * scale, height);
}

function follow(player) {
  draw(player);
  if (!player.audio.paused) requestAnimationFrame(() => follow(player));
}

for (const player of players) {
  player.audio.addEventListener("play", () => {
    for (const other of players) if (other !== player) other.audio.pause();
    follow(player);
  });
  for (const event of ["pause", "seeked", "loadedmetadata", "timeupdate"])
    player.audio.addEventListener(event, () => draw(player));
  player.canvas.addEventListener("click", (click) => {
    player.audio.currentTime = (click.offsetX / player.canvas.clientWidth) * length(player);
  });
}

for (const button of document.querySelectorAll(".switch"))
  button.addEventListener("click", () => {
    const own = players.filter((player) => button.closest("section").contains(player.audio));
    const from = Math.max(own.findIndex((player) => !player.audio.paused), 0);
    const to = own[(from + 1) % own.length];
    to.audio.currentTime = own[from].audio.currentTime;
    to.audio.play();
  });

const drawAll = () => players.forEach(draw);
addEventListener("resize", drawAll);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
drawAll();
