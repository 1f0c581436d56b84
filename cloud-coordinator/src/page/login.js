"use strict";
// The page to log in on.

const byId = (id) => document.getElementById(id);

// Where somebody came from, if that is a page of this coordinator.
function next() {
  const wanted = sessionStorage.getItem("next");
  sessionStorage.removeItem("next");
  const home = new URL("./", location.href);
  if (!wanted || !URL.canParse(wanted)) return home.href;
  const url = new URL(wanted);
  return url.origin === home.origin && url.pathname !== location.pathname ? url.href : home.href;
}

async function login() {
  const body = JSON.stringify({ name: byId("name").value.trim(), password: byId("password").value });
  const answer = await fetch("api/v1/login", { method: "POST", headers: { "content-type": "application/json" }, body });
  if (answer.ok) {
    location.replace(next());
    return;
  }
  const said = await answer.json();
  byId("password").value = "";
  byId("password").focus();
  throw new Error(said.detail || said.title);
}

async function directory() {
  const answer = await fetch("api/v1/oidc");
  byId("directory").hidden = !(answer.ok && (await answer.json()).enabled);
}

// Without an answer the password still does.
directory().catch(() => {});

byId("login").addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = event.target.querySelector("button");
  button.disabled = true;
  byId("said").textContent = "";
  try {
    await login();
  } catch (error) {
    byId("said").textContent = error.message;
  } finally {
    button.disabled = false;
  }
});
