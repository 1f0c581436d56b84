"use strict";
// The page to label in. Everything that a device or a person said is only ever set as text.

const byId = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en-GB");
// The keys of the classes in their order; 0, u and space mean something else.
const KEYS = [..."123456789abcdefghijklmnopqrstvwxyz"];
const AHEAD = 10;
const MAX_UNDO = 100;
const WHY = {
  wrong: "somebody said that the result was wrong",
  missed: "somebody said that something was missed",
  uncertain: "the model was not sure",
  novel: "it looks like nothing that training saw",
  random: "drawn by lot",
  disputed: "a model on trial said something else than the one that runs",
};

let task = null;
let queue = [];
let done = [];
let busy = false;

function note(text, bad) {
  byId("note").textContent = text;
  byId("note").className = bad ? "link off" : "link on";
}

async function ask(path, method, body) {
  const answer = await fetch(`api/v1/${path}`, {
    method: method || "GET",
    headers: body === undefined ? {} : { "content-type": "application/json" },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  if (answer.status === 401) signIn();
  const said = answer.status === 204 ? null : await answer.json();
  if (!answer.ok) {
    const error = new Error(said.detail || said.title);
    error.status = answer.status;
    throw error;
  }
  return said;
}

// One thing at a time: a key that is held down must not label what nobody has seen.
async function alone(work) {
  if (busy) return;
  busy = true;
  try {
    await work();
  } catch (error) {
    note(error.message, true);
  } finally {
    busy = false;
  }
}

function choices() {
  const buttons = task.classes.map((name, at) => {
    const button = document.createElement("button");
    button.type = "button";
    if (KEYS[at]) {
      const key = document.createElement("kbd");
      key.textContent = KEYS[at];
      button.append(key, " ");
    }
    button.append(name);
    button.addEventListener("click", () => alone(() => label({ class: name })));
    return button;
  });
  byId("classes").replaceChildren(...buttons);
}

function answer(sample) {
  const parts = [];
  if (sample.label) parts.push(`the model says ${sample.label}, ${(100 * sample.score).toFixed(1)} % sure`);
  if (sample.reason) parts.push(WHY[sample.reason] || sample.reason);
  if (sample.device) parts.push(`${sample.device} / ${sample.source}`);
  if (sample.file) parts.push(sample.file);
  parts.push(new Date(sample.ts).toLocaleString());
  return parts.join(" · ");
}

function draw() {
  const sample = queue[0];
  byId("undo").disabled = done.length === 0;
  byId("work").hidden = !sample;
  byId("more").hidden = !task;
  byId("empty").hidden = Boolean(sample);
  if (task) {
    const said = task.labelled + task.none;
    byId("progress").textContent =
      `${number.format(said)} labelled · ${number.format(task.open)} open · ${number.format(task.skipped)} skipped · ${number.format(task.holdout)} in the holdout`;
    choices();
  }
  if (!task) {
    byId("empty").textContent =
      "There is no task yet. One appears as soon as a device sends a sample; or bring labelled images: cloud-coordinator import TASK FOLDER --format folder.";
    return;
  }
  if (!sample) {
    byId("empty").textContent = task.samples
      ? "Everything has been looked at. New samples appear here when devices send them."
      : "There is nothing to label yet. Devices send what they are not sure of; mark a result as wrong to send it at once.";
    return;
  }
  const source = `api/v1/samples/${sample.id}/image`;
  if (byId("image").getAttribute("src") !== source) byId("image").src = source;
  byId("said").textContent = answer(sample);
  // The next image is there before it is needed.
  if (queue[1]) new Image().src = `api/v1/samples/${queue[1].id}/image`;
}

async function load() {
  const wanted = byId("task").value;
  if (!wanted) {
    draw();
    return;
  }
  const next = await ask(`tasks/${encodeURIComponent(wanted)}/queue?limit=${AHEAD}`);
  task = next.task;
  queue = next.items;
  note("ready");
  draw();
}

async function label(said) {
  const sample = queue[0];
  if (!sample) return;
  try {
    await ask(`samples/${sample.id}/labels`, "POST", said);
  } catch (error) {
    // Somebody deleted it meanwhile: there is nothing to say about it any more.
    if (error.status !== 404 && error.status !== 410) throw error;
    await load();
    return;
  }
  done = done.concat(sample).slice(-MAX_UNDO);
  queue.shift();
  task.open -= 1;
  if (said.skip) task.skipped += 1;
  else if (said.class === null) task.none += 1;
  else task.labelled += 1;
  note(said.skip ? "skipped" : said.class === null ? "none of these" : said.class);
  if (queue.length === 0) await load();
  else draw();
}

async function undo() {
  const sample = done[done.length - 1];
  if (!sample) return;
  await ask(`samples/${sample.id}/labels/last`, "DELETE");
  done.pop();
  await load();
  queue = [sample, ...queue.filter((other) => other.id !== sample.id)];
  note("taken back");
  draw();
}

async function add(name) {
  const classes = task.classes.concat(name);
  task = await ask(`tasks/${encodeURIComponent(task.name)}`, "PUT", { classes });
  byId("class").value = "";
  byId("class").blur();
  note(`class ${name} added`);
  draw();
}

async function start() {
  await me;
  const { items } = await ask("tasks");
  const options = items.map((one) => {
    const option = document.createElement("option");
    option.value = option.textContent = one.name;
    return option;
  });
  byId("task").replaceChildren(...options);
  const asked = location.hash.slice(1);
  if (items.some((one) => one.name === asked)) byId("task").value = asked;
  else if (items.length) byId("task").value = items.reduce((a, b) => (b.open > a.open ? b : a)).name;
  byId("task").hidden = items.length === 0;
  note("ready");
  await load();
}

byId("more").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = byId("class").value.trim();
  if (name) alone(() => add(name));
});
byId("task").addEventListener("change", () => {
  location.hash = byId("task").value;
  done = [];
  alone(load);
});
byId("none").addEventListener("click", () => alone(() => label({ class: null })));
byId("skip").addEventListener("click", () => alone(() => label({ skip: true })));
byId("undo").addEventListener("click", () => alone(undo));
byId("image").addEventListener("error", () => note("the image cannot be shown; skip it", true));
document.addEventListener("keydown", (event) => {
  const typing = event.target instanceof HTMLInputElement || event.target instanceof HTMLSelectElement;
  if (typing || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.toLowerCase();
  if (key === "u") alone(undo);
  else if (key === "0") alone(() => label({ class: null }));
  else if (key === " ") {
    event.preventDefault();
    alone(() => label({ skip: true }));
  } else if (task && KEYS.includes(key)) {
    const name = task.classes[KEYS.indexOf(key)];
    if (name !== undefined) alone(() => label({ class: name }));
  }
});
alone(start);
