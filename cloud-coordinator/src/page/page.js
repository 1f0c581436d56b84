"use strict";
// The live page. Everything that a device says is untrusted: it is only ever set as text.

const devices = new Map();
const byId = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en-GB");
const MAX_CARDS = 200;
// What each sign of drift means.
const DRIFT = {
  unknown: "often unknown",
  scores: "less sure than in training",
  embedding: "sees something else than training",
  novelty: "unlike training",
  dark: "too dark",
  bright: "too bright",
  blurred: "blurred",
  blocked: "lens covered",
  frozen: "picture frozen",
};

// Devices whose samples are not learnt from, and why.
let apart = new Map();
const APART_MS = 5000;
const MAY_LIFT = ["operator", "admin"];

async function whoIsApart() {
  try {
    const answer = await fetch("api/v1/quarantine");
    if (answer.ok) {
      const lasting = (await answer.json()).filter((one) => one.lifted_by === undefined);
      apart = new Map(lasting.map((one) => [`${one.site}/${one.device}`, one.why]));
    }
  } catch {
    // The coordinator is away; the rest of the page says so.
  }
}

function drawApart(card, key) {
  const place = card.querySelector(".apart");
  const why = apart.get(key);
  place.hidden = why === undefined;
  if (why === undefined) return;
  set(place.querySelector(".why"), `Not learnt from: ${why}`);
  const lift = place.querySelector(".lift");
  me.then((who) => {
    lift.hidden = !who || !MAY_LIFT.includes(who.role);
  });
  lift.onclick = async () => {
    lift.disabled = true;
    try {
      const [site, device] = key.split("/").map(encodeURIComponent);
      const answer = await fetch(`api/v1/devices/${site}/${device}/quarantine`, { method: "DELETE" });
      if (answer.ok) place.hidden = apart.delete(key);
    } finally {
      lift.disabled = false;
    }
  };
}

function rate(perSecond) {
  return perSecond >= 10 ? number.format(Math.round(perSecond)) : perSecond.toFixed(1);
}

function bytes(n) {
  return `${(n / 1048576).toFixed(0)} MiB`;
}

function percent(part, whole) {
  return whole > 0 ? `${((100 * part) / whole).toFixed(1)} %` : "–";
}

function ago(ms) {
  const s = Math.max(0, Math.round((Date.now() - ms) / 1000));
  if (s < 3) return "now";
  if (s < 90) return `${s} s ago`;
  if (s < 5400) return `${Math.round(s / 60)} min ago`;
  if (s < 129600) return `${Math.round(s / 3600)} h ago`;
  return `${Math.round(s / 86400)} days ago`;
}

function set(element, text, className) {
  if (element.textContent !== text) element.textContent = text;
  if (className !== undefined && element.className !== className) element.className = className;
}

function spark(card, history) {
  const width = 120, height = 32, seconds = 60;
  const counts = Array(seconds).fill(0).concat(history).slice(-seconds);
  const top = Math.max(1, ...counts);
  const points = counts.map((n, i) => {
    const x = (i * width) / (seconds - 1);
    const y = height - 1 - (n / top) * (height - 4);
    return `${x.toFixed(1)} ${y.toFixed(1)}`;
  });
  card.querySelector(".line").setAttribute("d", `M${points.join("L")}`);
  card.querySelector(".area").setAttribute("d", `M0 ${height}L${points.join("L")}L${width} ${height}Z`);
}

function newCard(device) {
  const card = byId("card").content.firstElementChild.cloneNode(true);
  set(card.querySelector(".site"), `${device.site} / `);
  set(card.querySelector(".name"), device.device);
  // Cards stay in the order of their names.
  const after = [...devices.entries()].filter(([key]) => key > keyOf(device)).sort(([a], [b]) => (a < b ? -1 : 1))[0];
  byId("devices").insertBefore(card, after ? after[1].card : null);
  return card;
}

function keyOf(device) {
  return `${device.site}/${device.device}`;
}

function draw(entry) {
  const { card, device } = entry;
  const find = (name) => card.querySelector(`.${name}`);
  card.className = `card ${device.status || ""}`;
  set(find("status"), device.status || "unknown", `status ${device.status || ""}`);
  const model = device.model;
  if (device.detail) set(find("model"), device.detail);
  else set(find("model"), model ? `${model.name} ${model.version} · ${model.sha256.slice(0, 8)}` : "no model reported");
  const last = device.last;
  if (last) {
    set(find("label"), last.label);
    find("fill").style.width = `${(100 * last.score).toFixed(1)}%`;
    const verdict = find("verdict");
    if (last.truth === undefined) set(verdict, "", "verdict");
    else if (last.truth === last.label) set(verdict, "right", "verdict right");
    else set(verdict, `is ${last.truth}`, "verdict wrong");
    const parts = [`${(100 * last.score).toFixed(1)} % sure`, last.source, last.file || `frame ${number.format(last.frame)}`, `${last.latency_ms.toFixed(1)} ms`];
    set(find("detail"), parts.join(" · "));
  } else {
    set(find("label"), "–");
    set(find("detail"), "no result yet");
  }
  spark(card, device.history);
  set(find("rate"), `${rate(device.rate)}/s`);
  set(find("stored"), number.format(device.stored));
  const backlog = device.backlog;
  set(find("backlog"), backlog === undefined ? "–" : number.format(backlog), backlog > 50 ? "backlog some" : "backlog");
  set(find("missing"), number.format(device.missing), device.missing > 0 ? "missing some" : "missing");
  const { right, wrong } = entry.lately;
  set(find("accuracy"), percent(right, right + wrong), right < 0.8 * (right + wrong) ? "accuracy some" : "accuracy");
  const drifts = (device.drift || []).filter((drift) => drift.names);
  find("drift").hidden = drifts.length === 0;
  set(find("drift"), drifts.map((drift) => `${drift.source}: ${drift.names.split(",").map((name) => DRIFT[name] || name).join(", ")}`).join(" · "));
  drawApart(card, keyOf(device));
  set(find("seen"), ago(device.last_seen_ms));
  card.title = [device.board, device.arch, device.agent && `agent ${device.agent}`, device.rss_bytes && bytes(device.rss_bytes)].filter(Boolean).join(" · ");
}

// How many readings of the last minute were right, where the truth is known: from two looks at the totals.
function recent(entry) {
  const { device, marks } = entry;
  const now = { at: Date.now(), right: device.right, wrong: device.wrong };
  marks.push(now);
  while (marks.length > 1 && now.at - marks[0].at > 60000) marks.shift();
  const first = marks[0];
  const gone = first.right + first.wrong > now.right + now.wrong;
  if (gone) marks.splice(0, marks.length - 1);
  const right = now.right - marks[0].right;
  const wrong = now.wrong - marks[0].wrong;
  // Just opened: everything so far.
  return right + wrong > 0 ? { right, wrong } : { right: now.right, wrong: now.wrong };
}

function totals() {
  let online = 0, perSecond = 0, stored = 0, backlog = 0, missing = 0, right = 0, wrong = 0;
  for (const { device } of devices.values()) {
    online += device.status === "online" ? 1 : 0;
    perSecond += device.rate;
    stored += device.stored;
    backlog += device.backlog || 0;
    missing += device.missing;
  }
  for (const { lately } of devices.values()) {
    right += lately.right;
    wrong += lately.wrong;
  }
  set(byId("t-online"), `${number.format(online)} of ${number.format(devices.size)}`);
  set(byId("t-rate"), rate(perSecond));
  set(byId("t-stored"), number.format(stored));
  set(byId("t-backlog"), number.format(backlog), backlog > 200 ? "some" : "");
  set(byId("t-missing"), number.format(missing), missing > 0 ? "some" : "");
  byId("t-accuracy-box").hidden = right + wrong === 0;
  set(byId("t-accuracy"), percent(right, right + wrong));
  byId("empty").hidden = devices.size > 0;
}

function take(list) {
  for (const device of list) {
    const key = keyOf(device);
    let entry = devices.get(key);
    if (!entry) {
      entry = { card: devices.size < MAX_CARDS ? newCard(device) : null, marks: [] };
      devices.set(key, entry);
    }
    entry.device = device;
    entry.lately = recent(entry);
    if (entry.card) draw(entry);
  }
  totals();
}

function connect() {
  const link = byId("link");
  const events = new EventSource("api/v1/live?what=devices");
  events.addEventListener("open", () => set(link, "live", "link on"));
  events.addEventListener("devices", (event) => take(JSON.parse(event.data)));
  events.addEventListener("error", () => {
    set(link, "coordinator away, trying again", "link off");
    // A browser tries again by itself unless the answer was an error.
    if (events.readyState !== EventSource.CLOSED) return;
    // The session may be over, which the event does not say.
    whoAmI();
    setTimeout(connect, 3000);
  });
}

connect();
setInterval(() => {
  for (const { card, device } of devices.values()) {
    if (card) set(card.querySelector(".seen"), ago(device.last_seen_ms));
  }
}, 1000);

whoIsApart();
setInterval(whoIsApart, APART_MS);
