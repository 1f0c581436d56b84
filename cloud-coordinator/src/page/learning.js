"use strict";
// What is being learned: one card per task that has labels. Everything is only ever set as text.

(() => {
  const EVERY_MS = 2000;
  const MAX_TASKS = 12;
  const PHASES = { features: "looking at the images", train: "training", write: "writing the model", holdout: "measuring on the holdout" };
  const byId = (id) => document.getElementById(id);
  const number = new Intl.NumberFormat("en-GB");
  const cards = new Map();

  const share = (value) => `${(100 * value).toFixed(1)} %`;

  async function get(path) {
    const answer = await fetch(`api/v1/${path}`);
    if (answer.status === 401) signIn();
    if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
    return answer.json();
  }

  function set(element, text, className) {
    if (element.textContent !== text) element.textContent = text;
    if (className !== undefined && element.className !== className) element.className = className;
  }

  function card(task) {
    let found = cards.get(task.name);
    if (!found) {
      found = byId("lesson").content.firstElementChild.cloneNode(true);
      set(found.querySelector(".name"), `learning: ${task.name}`);
      found.querySelector(".labels").href = `label#${encodeURIComponent(task.name)}`;
      byId("learning").append(found);
      cards.set(task.name, found);
    }
    return found;
  }

  function work(job) {
    if (!job) return { text: "nothing is being trained", done: 0 };
    if (job.state === "queued") return { text: "a training waits", done: 0 };
    if (job.state === "failed") return { text: `the last training failed: ${job.error}`, done: 0 };
    if (job.state !== "running") return { text: `last trained ${job.author.startsWith("by itself") ? job.author : `by ${job.author}`}`, done: 1 };
    const { phase, step, steps, eta_s: eta } = job.progress || {};
    const left = eta > 1 ? `, ${Math.ceil(eta)} s left` : "";
    return { text: `${PHASES[phase] || "beginning"}${left}`, done: steps ? step / steps : 0 };
  }

  function outcome(model) {
    const { report, verdict } = model;
    if (!verdict) return { text: "", detail: "" };
    const measured = report
      ? `${report.current ? `${share(report.current_accuracy)} → ` : ""}${share(report.accuracy)} right`
      : "not measured";
    const closed = (verdict.reasons || []).filter((reason) => !reason.pass).map((reason) => reason.text);
    const detail = verdict.pass
      ? `on ${number.format(report.rows)} held-out images; better beyond chance`
      : closed.join(" · ");
    return { text: `${model.version}: ${measured}`, detail, className: verdict.pass ? "outcome right" : "outcome wrong" };
  }

  async function draw(task, jobs) {
    const element = card(task);
    const find = (name) => element.querySelector(`.${name}`);
    set(find("labels"), `${number.format(task.labelled)} labels, ${number.format(task.open)} open`);
    const { text, done } = work(jobs.find((job) => job.task === task.name));
    set(find("now"), text);
    find("fill").style.width = share(done);
    const [model] = (await get(`catalog?name=${encodeURIComponent(task.name)}&limit=1`)).filter((one) => one.verdict);
    const said = model ? outcome(model) : { text: "", detail: "" };
    set(find("outcome"), said.text, said.className || "outcome");
    set(find("detail"), said.detail);
    const proof = find("proof");
    proof.hidden = !model || !model.report;
    if (!proof.hidden) proof.href = `api/v1/catalog/${model.name}@${model.version}/confusion.svg`;
  }

  async function look() {
    try {
      const { items } = await get("tasks");
      const taught = items.filter((task) => task.labelled + task.open > 0).slice(0, MAX_TASKS);
      byId("learning").hidden = taught.length === 0;
      const jobs = taught.length ? await get("jobs?limit=50") : [];
      for (const task of taught) await draw(task, jobs);
    } catch {
      // The coordinator is away; the rest of the page says so.
    }
    setTimeout(look, EVERY_MS);
  }

  look();
})();
