"use strict";
// What is on its way to the devices: one card per rollout. Everything is only ever set as text.

(() => {
  const EVERY_MS = 2000;
  const MAX_CARDS = 6;
  const byId = (id) => document.getElementById(id);
  const number = new Intl.NumberFormat("en-GB");
  const cards = new Map();

  function set(element, text, className) {
    if (element.textContent !== text) element.textContent = text;
    if (className !== undefined && element.className !== className) element.className = className;
  }

  function card(id) {
    let found = cards.get(id);
    if (!found) {
      found = byId("rollout").content.firstElementChild.cloneNode(true);
      cards.set(id, found);
    }
    return found;
  }

  function whom({ site, board, tag }) {
    const parts = [site && `site ${site}`, board, tag && `tag ${tag}`].filter(Boolean);
    return parts.length ? parts.join(", ") : "all devices";
  }

  // The bar is all devices of the group; a mark stands where each stage ends.
  function marks(element, rollout) {
    const wanted = rollout.stages.join();
    if (element.dataset.stages === wanted) return;
    element.dataset.stages = wanted;
    element.replaceChildren(...rollout.stages.filter((percent) => percent < 100).map((percent) => {
      const mark = document.createElement("i");
      mark.style.left = `${percent}%`;
      return mark;
    }));
  }

  function state(rollout) {
    if (rollout.status !== "running") return rollout.why ? `${rollout.status}: ${rollout.why}` : rollout.status;
    return `stage ${rollout.stage} of ${rollout.stages.length}: up to ${rollout.stages[rollout.stage - 1]} %`;
  }

  function draw(rollout) {
    const element = card(rollout.id);
    const find = (name) => element.querySelector(`.${name}`);
    const share = (n) => `${(100 * n) / Math.max(1, rollout.devices)}%`;
    const trying = Math.max(0, rollout.exposed - rollout.kept - rollout.failed);
    set(find("name"), rollout.model);
    set(find("status"), rollout.status, `status ${{ done: "online", aborted: "offline" }[rollout.status] || ""}`);
    set(find("now"), `to ${whom(rollout.group)}, asked for by ${rollout.author}`);
    find("kept").style.width = share(rollout.kept);
    find("trying").style.width = share(trying);
    find("failed").style.width = share(rollout.failed);
    marks(find("marks"), rollout);
    const counts = [`${number.format(rollout.kept)} of ${number.format(rollout.devices)} keep it`, `${number.format(trying)} are trying it`];
    if (rollout.failed) counts.push(`${number.format(rollout.failed)} went back`);
    const text = counts.join(" · ");
    set(find("outcome"), text, rollout.failed ? "outcome wrong" : "outcome");
    element.querySelector("[role=img]").setAttribute("aria-label", text);
    set(find("detail"), state(rollout));
    find("story").href = `api/v1/rollouts/${rollout.id}`;
    return element;
  }

  async function look() {
    try {
      const answer = await fetch("api/v1/rollouts");
      if (answer.ok) {
        const rollouts = (await answer.json()).slice(0, MAX_CARDS);
        byId("rollouts").hidden = rollouts.length === 0;
        const drawn = rollouts.map(draw);
        const there = byId("rollouts").children;
        if (drawn.length !== there.length || drawn.some((element, at) => there[at] !== element)) byId("rollouts").replaceChildren(...drawn);
      }
    } catch {
      // The coordinator is away; the rest of the page says so.
    }
    setTimeout(look, EVERY_MS);
  }

  // Rollouts are about all sites: who may only see one is not shown them.
  me.then((who) => {
    if (who && !who.site) look();
  });
})();
