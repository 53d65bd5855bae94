// The page of `worldvla play`: keys, gamepad and buttons to the server, its frames and numbers to the screen.
"use strict";

const MOVES = { // key -> what it moves, and which way
  KeyW: ["away", 1], ArrowUp: ["away", 1], KeyS: ["away", -1], ArrowDown: ["away", -1],
  KeyD: ["right", 1], ArrowRight: ["right", 1], KeyA: ["right", -1], ArrowLeft: ["right", -1],
  KeyE: ["up", 1], KeyR: ["up", 1], KeyQ: ["up", -1], KeyF: ["up", -1],
  KeyZ: ["turn", 1], KeyX: ["turn", -1],
};
const KEYS = { // key -> what it does, once
  Space: "gripper", KeyP: "policy", KeyT: "person", KeyV: "simulator", KeyB: "reality", KeyC: "record",
  Enter: "reset", Period: "pause", Comma: "step",
};
const PADS = { 0: "gripper", 1: "person", 2: "simulator", 3: "policy", 8: "reality", 9: "pause" };
const TURN = 0.5, SLOW = 0.3, DEAD = 0.15, RETRY_MS = 1000;
const DIMS = ["x", "y", "z", "roll", "pitch", "yaw", "grip"];

const $ = (id) => document.getElementById(id);
const held = new Set();
let socket = null, hello = null, status = null, wasConnected = false, isSlow = false, isFull = false;
let sent = "", stick = { right: 0, away: 0, up: 0, turn: 0 }, pressed = new Set(), isPolling = false, curve = [];

// -- connection

function connect() {
  const at = new URL("socket" + location.search, location.href);
  at.protocol = at.protocol.replace("http", "ws");
  socket = new WebSocket(at);
  socket.binaryType = "arraybuffer";
  socket.onmessage = ({ data }) => (typeof data === "string" ? hear(JSON.parse(data)) : show(data));
  socket.onclose = () => {
    release();
    $("link").className = "";
    $("link").textContent = isFull ? "the server is full" : "connection lost, reconnecting";
    if (!isFull) setTimeout(connect, RETRY_MS);
  };
}

function send(message) {
  if (socket && socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message));
}

function hear(message) {
  if (message.type === "hello") greet(message);
  else if (message.type === "recorded") list(message);
  else {
    isFull = hello === null && message.type === "error";
    notice(message.text, message.type === "error");
  }
}

function greet(message) {
  const before = status; // before the connection was lost
  hello = message;
  const { model } = hello;
  const size = (model.parameters / 1e6).toFixed(1);
  $("model").textContent = `${model.name}, ${size} M parameters, temperature ${hello.temperature}`;
  $("link").className = "up";
  $("link").textContent = "connected";
  fill($("suite"), Object.keys(hello.suites).map((name) => [name, name]));
  fill($("init"), [...Array(hello.inits).keys()].map((i) => [i, i]));
  $("suite").value = before ? before.suite : hello.start.suite;
  if (!$("suite").value) $("suite").value = hello.start.suite;
  instructions();
  $("task").value = before ? before.task : hello.start.task;
  $("init").value = before ? before.init : hello.start.init;
  if (wasConnected) notice("Reconnected. Imagination starts again from the initial state.");
  wasConnected = true;
  sent = "";
  start();
  if ($("simulator").hidden === false) send({ type: "simulator", on: true });
}

function start() {
  send({ type: "start", suite: $("suite").value, task: Number($("task").value), init: Number($("init").value) });
}

function fill(select, options) {
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
}

function instructions() {
  fill($("task"), hello.suites[$("suite").value].map((text, i) => [i, text]));
}

function notice(text, isBad = false) {
  $("notice").textContent = text;
  $("notice").className = isBad ? "bad" : "";
}

function list({ folder, files, steps }) {
  const line = document.createElement("li");
  line.append(`Recorded ${steps} steps in ${folder}: `);
  for (const file of files) {
    const link = document.createElement("a");
    link.href = `recordings/${file}${location.search}`;
    link.download = link.textContent = file.split("/")[1];
    line.append(link);
  }
  $("recordings").prepend(line);
}

// -- screen

function show(data) {
  const length = new DataView(data).getUint32(0, true);
  status = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
  let offset = 4 + length;
  const worlds = new Set();
  for (const [world, view, rows, cols] of status.pictures) {
    worlds.add(world);
    const pixels = new Uint8ClampedArray(data, offset, 4 * rows * cols);
    canvas(world, view, rows, cols).getContext("2d").putImageData(new ImageData(pixels, cols, rows), 0, 0);
    offset += 4 * rows * cols;
  }
  $("simulator").hidden = !worlds.has("simulator");
  $("stage").classList.toggle("both", worlds.has("simulator"));
  numbers();
}

function canvas(world, view, rows, cols) {
  const id = `${world}-${view}`;
  if (!$(id)) {
    const figure = document.createElement("figure"), picture = document.createElement("canvas");
    const caption = document.createElement("figcaption");
    caption.textContent = view === "agentview" ? "front view" : view;
    picture.id = id;
    picture.setAttribute("role", "img");
    picture.setAttribute("aria-label", `${world}, ${caption.textContent}`);
    figure.append(picture, caption);
    $(world).querySelector("aside").before(figure);
  }
  if ($(id).width !== cols || $(id).height !== rows) Object.assign($(id), { width: cols, height: rows });
  return $(id);
}

function numbers() {
  const s = status, isPolicy = s.driver === "policy";
  document.body.classList.toggle("policy", isPolicy);
  $("age").textContent = s.imagined ? `imagined for ${s.imagined} steps` : "a real frame, tokenized";
  $("driver").textContent = isPolicy ? "policy" : "you";
  $("fps").textContent = s.fps ? s.fps.toFixed(1) : "-";
  $("passes").textContent = s.passes ?? "-";
  $("steps").textContent = s.steps;
  $("success").hidden = s.success === null;
  $("success").textContent = `success at step ${s.success}`;
  $("gripper").textContent = `gripper ${s.gripper}`;
  press("policy", isPolicy);
  press("person", !isPolicy);
  press("simulator", !$("simulator").hidden);
  press("pause", s.paused);
  press("record", s.recorded !== null);
  document.querySelector("[data-do=record]").firstChild.textContent = s.recorded === null ? "record " : `stop (${s.recorded}) `;
  const views = Object.entries(s.psnr ?? {}).map(([view, value]) => `${view === "agentview" ? "front" : view} ${value.toFixed(1)}`);
  $("psnr").textContent = views.join(", ") || "-";
  if (s.imagined === 0) curve = [];
  if (s.psnr) curve.push([s.imagined, Object.values(s.psnr)[0]]);
  draw();
  s.action.forEach((value, i) => {
    const bar = $("action").children[i].querySelector("b");
    bar.style.top = `${50 - 50 * Math.max(0, value)}%`;
    bar.style.height = `${Math.max(2, 50 * Math.abs(value))}%`;
  });
}

function press(name, isOn) {
  document.querySelector(`[data-do=${name}]`).setAttribute("aria-pressed", isOn);
}

function draw() { // PSNR of the front view since the last real frame, 10 to 40 dB
  const pen = $("curve").getContext("2d"), { width, height } = $("curve");
  const style = getComputedStyle($("driver")), quiet = getComputedStyle($("model")).color;
  const at = (value) => (height - 8) * (1 - Math.min(1, Math.max(0, (value - 10) / 30))) + 4;
  pen.clearRect(0, 0, width, height);
  pen.fillStyle = pen.strokeStyle = quiet;
  pen.font = "20px system-ui, sans-serif";
  pen.lineWidth = 1;
  for (const value of [20, 30]) {
    pen.fillText(value, 0, at(value) + 7);
    pen.strokeRect(34, at(value), width, 0);
  }
  if (!curve.length) return;
  pen.strokeStyle = style.color;
  pen.lineWidth = 4;
  pen.beginPath();
  const last = curve[curve.length - 1][0], first = curve[0][0];
  for (const [step, value] of curve) pen.lineTo(36 + ((width - 40) * (step - first)) / Math.max(1, last - first), at(value));
  pen.stroke();
}

// -- input: the state of all keys is sent when it changes, and the server takes the latest

function tell() {
  const speed = Number($("speed").value) * (isSlow ? SLOW : 1), move = { right: 0, away: 0, up: 0, turn: 0 };
  for (const code of held) move[MOVES[code][0]] += MOVES[code][1];
  for (const name in move) {
    const value = Math.max(-1, Math.min(1, move[name])) * speed + stick[name];
    move[name] = Math.round(100 * Math.max(-1, Math.min(1, name === "turn" ? TURN * value : value))) / 100;
  }
  const text = JSON.stringify(move);
  if (text !== sent) send({ type: "move", ...move });
  sent = text;
}

function hold(code, isDown) {
  if (isDown) held.add(code);
  else held.delete(code);
  document.querySelectorAll("[data-key]").forEach((b) => b.classList.toggle("held", held.has(b.dataset.key)));
  tell();
}

function release() {
  held.clear();
  isSlow = false;
  document.querySelectorAll(".held").forEach((b) => b.classList.remove("held"));
  tell();
}

function act(name) {
  if (!hello) return;
  if (name === "policy" || name === "person") send({ type: "drive", driver: name });
  else if (name === "simulator") send({ type: "simulator", on: $("simulator").hidden });
  else if (name === "pause") send({ type: "pause", on: !(status && status.paused) });
  else if (name === "record") send({ type: "record", on: !status || status.recorded === null });
  else if (name === "reset") start();
  else send({ type: name });
}

addEventListener("keydown", (event) => {
  const isField = /^(SELECT|INPUT)$/.test(event.target.tagName);
  const isButton = event.target.tagName === "BUTTON" && /^(Space|Enter)$/.test(event.code);
  if (event.ctrlKey || event.metaKey || event.altKey || isField || isButton) return;
  if (event.key === "Shift") { isSlow = true; tell(); }
  if (!(event.code in MOVES || event.code in KEYS)) return;
  event.preventDefault();
  if (event.repeat) return;
  if (event.code in MOVES) hold(event.code, true);
  else act(KEYS[event.code]);
});
addEventListener("keyup", (event) => {
  if (event.key === "Shift") { isSlow = false; tell(); }
  if (held.has(event.code)) hold(event.code, false);
});
addEventListener("blur", release);
document.addEventListener("visibilitychange", () => document.hidden && release());

for (const button of document.querySelectorAll("[data-do]")) {
  button.addEventListener("click", (event) => {
    act(button.dataset.do);
    if (event.detail) $("stage").focus({ preventScroll: true }); // a mouse's click: the space bar stays the gripper's
  });
}
for (const button of document.querySelectorAll("[data-key]")) {
  const { key } = button.dataset;
  button.addEventListener("pointerdown", (event) => { button.setPointerCapture(event.pointerId); hold(key, true); });
  for (const name of ["pointerup", "pointercancel"]) button.addEventListener(name, () => hold(key, false));
  button.addEventListener("keydown", (event) => /^(Space|Enter)$/.test(event.code) && hold(key, true));
  button.addEventListener("keyup", (event) => /^(Space|Enter)$/.test(event.code) && hold(key, false));
  button.addEventListener("blur", () => hold(key, false));
  button.addEventListener("contextmenu", (event) => event.preventDefault());
}
$("suite").onchange = () => { instructions(); start(); };
$("task").onchange = $("init").onchange = start;
$("choice").onsubmit = (event) => event.preventDefault();
$("speed").oninput = tell;
$("smooth").onchange = () => document.body.classList.toggle("smooth", $("smooth").checked);

// -- gamepad: sticks move and turn, A gripper, B take over, X simulator, Y policy

function poll() {
  const pads = [...navigator.getGamepads()].filter(Boolean);
  isPolling = pads.length > 0;
  if (!isPolling) { stick = { right: 0, away: 0, up: 0, turn: 0 }; tell(); return; }
  const [x = 0, y = 0, u = 0, v = 0] = pads[0].axes.map((a) => (Math.abs(a) < DEAD ? 0 : a));
  stick = { right: x, away: -y, up: -v, turn: -u };
  tell();
  const now = new Set(Object.keys(PADS).filter((i) => pads[0].buttons[i] && pads[0].buttons[i].pressed));
  for (const i of now) if (!pressed.has(i)) act(PADS[i]);
  pressed = now;
  requestAnimationFrame(poll);
}

if ("getGamepads" in navigator) {
  $("gamepad").textContent = "Gamepad: press a button on it.";
  addEventListener("gamepadconnected", ({ gamepad }) => {
    $("gamepad").textContent = `${gamepad.id}: sticks move, A gripper, Y policy, B take over.`;
    if (!isPolling) poll();
  });
  addEventListener("gamepaddisconnected", () => { $("gamepad").textContent = "Gamepad disconnected."; });
} else $("gamepad").textContent = "This browser does not support gamepads.";

$("action").replaceChildren(...DIMS.map((name) => {
  const column = document.createElement("span"), box = document.createElement("i");
  box.append(document.createElement("b"));
  column.append(box, name);
  return column;
}));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
if ("WebSocket" in window) {
  connect();
  $("stage").focus({ preventScroll: true });
} else notice("This browser does not support WebSocket: open the page in another one.", true);
