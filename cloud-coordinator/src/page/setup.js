"use strict";
// The page that the setup link opens. What stands behind the # is never sent by a browser by itself.

const byId = (id) => document.getElementById(id);
const token = location.hash.slice(1);
// Neither in the history nor over somebody's shoulder.
history.replaceState(null, "", location.pathname);

async function setUp() {
  if (byId("password").value !== byId("again").value) {
    byId("again").focus();
    throw new Error("the passwords differ");
  }
  const body = JSON.stringify({ token, name: byId("name").value.trim(), password: byId("password").value });
  const answer = await fetch("api/v1/setup", { method: "POST", headers: { "content-type": "application/json" }, body });
  if (answer.ok) {
    location.replace("login");
    return;
  }
  const said = await answer.json();
  throw new Error(said.detail || said.title);
}

if (!token) byId("said").textContent = "This page is opened by the link that the coordinator has logged.";

byId("setup").addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = event.target.querySelector("button");
  button.disabled = true;
  byId("said").textContent = "";
  try {
    await setUp();
  } catch (error) {
    byId("said").textContent = error.message;
  } finally {
    button.disabled = false;
  }
});
